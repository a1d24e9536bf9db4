"""A study: a grid of points, run by any number of processes on one directory, resumed, and then reported.

A study is a config (configs/studies/): `levels` (what is learned, from near to far from pre-training), `arms` (method,
head, sizes or stored-count budgets), `n_images` (nested subsets), `rates` and `seeds`. A cell is (level, arm, size,
n_images). Each cell is trained at every rate with seed 0; the rate with the best main metric on validation pictures, and
never the test ones, is then trained with the other seeds, which draw another subset, initialisation and order.

    DIR/study.json          the config and the command
    DIR/points/ID/          one run, as `main.py` leaves it for a single point: result.json, predictions.jsonl, ...
    DIR/claims/ID           who is working on it; survives its owner by at most locks.STALE seconds, then others take over
    DIR/failures/ID.jsonl   a line per failed try; after TRIES the run is given up and reported as failed
    DIR/features/           image features that the runs share, where nothing tuned is in the image encoder
    DIR/stale/              runs that a change of config or code has made out of date
    DIR/results.jsonl       a line per run: what the report reads
"""

import ast
import collections
import contextlib
import dataclasses
import datetime
import functools
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
import urllib.parse
import uuid
from collections.abc import Iterator
from pathlib import Path

import jax
import ml_collections
import numpy as np
from PIL import Image

from jaxpeft import data, methods, tasks, tree
from jaxpeft.adapt import budget
from jaxpeft.models import loading
from jaxpeft.runtime import files, host, locks, registry, signals
from jaxpeft.training import preflight
from jaxpeft.training import run as training_run

TRIES = 3
PACKAGE = Path(__file__).parent
# what a run's numbers cannot depend on
APART = (
    "study",
    "report",
    "progress",
    "pretrain",
    "preflight",
    "cluster",
    "locks",
    "stop",
    "journal",
    "claims",
    "demo",
    "export",
    "generate",
    "use",
    "foreign",
    "__init__",
    "interchange/",
    "methods/",
    "tasks/",
    "datasets/",
)


# ---------------------------------------------------------------- the grid


@dataclasses.dataclass(frozen=True, order=True)
class Cell:
    """A place in the grid; `size` is the method's rank, bottleneck or length, 0 where it has none."""

    level: str
    arm: str
    size: int
    n_images: int

    def __str__(self):
        return f"{self.level}-{self.arm}{self.size or ''}-n{self.n_images}"


@dataclasses.dataclass(frozen=True)
class Run:
    """One training: a cell of a study, a seed, a learning rate."""

    cell: Cell
    seed: int
    lr: float
    study: ml_collections.ConfigDict = dataclasses.field(compare=False, repr=False)

    @property
    def id(self) -> str:
        return f"{self.cell}-s{self.seed}-lr{self.lr:.3g}"

    @functools.cached_property
    def config(self) -> ml_collections.ConfigDict:
        """The config that `main.py` would run alone."""
        level, arm = self.study.levels[self.cell.level], self.study.arms[self.cell.arm]
        c = self.study.points[level["task"]].copy_and_resolve_references()
        fields = {**methods.defaults(arm.method), **arm.get("fields", {})}
        if field := methods.size_field(arm.method):
            fields[field] = self.cell.size
        c.method = ml_collections.ConfigDict({"name": arm.method, **fields})
        c.name, c.size, c.head = self.id, self.cell.size, arm.head
        c.seed = c.data.subset_seed = self.seed
        c.data.n_images, c.optim.lr = self.cell.n_images, self.lr
        c.eval.base = bool(arm.get("base")) and self.seed == 0  # the base is the same everywhere: scored once a level
        c.update({key: value for key, value in level.items() if key not in ("task", "lr_scale")})
        return c


def cells(config) -> list[Cell]:
    """The grid in a fixed order. Raises ValueError for an unknown method or level before anything runs."""
    found = {}
    for level, settings in config.levels.items():
        for name, arm in config.arms.items():
            if arm.get("levels") and level not in arm.levels:
                continue
            sizes = _sizes(config, settings["task"], arm)
            for size, n_images in _pairs(config, sizes, tuple(arm.get("n_images", ())) or config.n_images):
                found[Cell(level, name, size, n_images)] = None
    return list(found)


def _pairs(config, sizes, all_n_images) -> Iterator[tuple[int, int]]:
    """(size, n_images): every pair, or with config.cross=False the two axes through (middle size, all images)."""
    middle, most = sizes[len(sizes) // 2], max(all_n_images)
    for n_images in all_n_images:
        for size in sizes:
            if config.cross or size == middle or n_images == most:
                yield size, n_images


def _sizes(config, task: str, arm) -> tuple[int, ...]:
    field = methods.size_field(arm.method)
    if not field:
        return (0,)
    if arm.get("sizes"):
        return tuple(arm.sizes)
    budgets = arm.get("budgets") or config.budgets
    return tuple(dict.fromkeys(_solved(config.points[task].base, task, arm.method, n) for n in budgets))


@functools.cache
def _solved(base: str, task: str, method: str, stored: int) -> int:
    return budget.solve_size(_model(base, task), methods.build(method), stored).size


@functools.cache
def _model(base: str, task: str):
    return loading.abstract(
        base, question_encoder=tasks.build(task).question_encoder
    )  # weights need not be there to plan


def rates(config, cell: Cell) -> list[float]:
    """The cell's learning rates: the arm's middle one, times the level's `lr_scale`, times each of config.rates."""
    middle = config.arms[cell.arm].lr * config.levels[cell.level].get("lr_scale", 1.0)
    return [float(f"{middle * factor:.3g}") for factor in config.rates]


def runs(config, finished: dict[str, dict], given_up=frozenset()) -> list[Run]:
    """Every run that can be named now: all of seed 0, and of the other seeds where the cell's rate is chosen."""
    named, later = [], []
    for cell in cells(config):
        tried = [Run(cell, 0, lr, config) for lr in rates(config, cell)]
        named += tried
        if all(one.id in finished or one.id in given_up for one in tried):
            lr = chosen_rate([finished[one.id] for one in tried if one.id in finished], config.select_on)
            later += [Run(cell, seed, lr, config) for seed in range(1, config.seeds)] if lr else []
    return named + later


def chosen_rate(tried: list[dict], split: str) -> float | None:
    """The rate of the result with the best main metric on `split`; of equal ones the smallest. None of no results."""
    key = [(-one["metrics"][split]["tuned"][one["main_metric"]], one["lr"]) for one in tried]
    return min(key)[1] if key else None


def check(config) -> None:
    """Raise ValueError where a base cannot be read for its task, where a level's data cannot, or where they have fewer
    training pictures than a cell asks for."""
    for task in dict.fromkeys(level["task"] for level in config.levels.values()):
        loading.read(config.points[task].base, question_encoder=tasks.build(task).question_encoder)
    for level in config.levels:
        mine = [cell for cell in cells(config) if cell.level == level]
        most = max(mine, key=lambda cell: cell.n_images)
        c = Run(most, 0, 1.0, config).config
        n = len(data.load(c.data, training_run.needed_splits(c))["train"].rows)
        if most.n_images > n:
            raise ValueError(
                f"study {config.name}: n_images has {most.n_images}, but the training split of level {level!r} has {n} "
                f"pictures; lower n_images"
            )


def n_runs(config) -> int:
    """How many runs the whole study has."""
    return len(cells(config)) * (len(config.rates) + config.seeds - 1)


# ---------------------------------------------------------------- what a run depends on


@functools.cache
def source() -> dict[str, str]:
    """File of the package, or module of one's own -> digest of what it does, as this process first saw it."""
    ours = {str(path.relative_to(PACKAGE)): _code_of(path) for path in sorted(PACKAGE.rglob("*.py"))}
    return ours | {name: _code_of(path) for name, path in registry.files.items()}


def _code_of(path: Path) -> str:
    """A digest of what a file does: comments, docstrings and layout do not count."""
    module = ast.parse(path.read_text())
    for node in ast.walk(module):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            del node.body[0]
    return hashlib.sha256(ast.dump(module).encode()).hexdigest()[:16]


def depends_on(config) -> dict[str, str]:
    """Name -> digest of the source files and settings that decide a point's numbers, for telling what a change touches."""
    files = {name for name in source() if not name.startswith(APART)}
    files |= {"methods/base.py", "methods/compose.py", "tasks/base.py", f"tasks/{config.task}.py"}
    files |= {name for name in source() if name.startswith(f"datasets/{config.data.name}")}
    chosen, task = training_run.methods_of(config), tasks.build(config.task, **config.task_options)
    modules = {cls.__module__ for one in (*chosen, task) for cls in type(one).__mro__}
    files |= {f"{name.removeprefix('jaxpeft.').replace('.', '/')}.py" for name in modules}
    files |= set(training_run.imports_of(config, chosen, task))
    files = {name: source()[name] for name in sorted(files & source().keys())}
    return files | {"config": training_run.digest(training_run.as_json(config))}


def changes(directory: Path, run: Run) -> list[str]:
    """What differs from when the run's directory was made; [] where nothing does or there is no such directory."""
    try:
        before = json.loads((directory / "points" / run.id / "depends_on.json").read_text())
    except FileNotFoundError:
        return []
    return sorted(name for name, digest in depends_on(run.config).items() if before.get(name) != digest)


def check_source(directory: Path, run: Run) -> None:
    """Raise ValueError where the newest start of the study had other source files than this process, of those that `run`
    depends on: each of the two would do again what the other has done, without end."""
    try:
        newest = json.loads((directory / "source.json").read_text())
    except FileNotFoundError:
        return
    mine = source()
    if differ := [name for name in depends_on(run.config) if name in mine and newest.get(name) != mine[name]]:
        raise ValueError(
            f"{', '.join(differ)} changed after this study, or this part of it, was started; stop all of it, and start the "
            f"same command again: what the change touches is done again"
        )


# ---------------------------------------------------------------- what it will cost


def dry_run(config, directory: Path) -> str:
    """The plan, and per cell what is tuned and stored, memory and time: measured where the directory has a finished run
    of the same level, method and size, estimated else (the step's FLOPs, at half of what a matrix product reaches here,
    for as many steps as the cap allows; memory without activations). Traces a step per task and arm, compiles none."""
    state = read(config, directory)
    lines, total, speed, traced = [plan(config, state)], 0.0, 0.5 * _flops_per_second(), {}
    left = runs_left(config, state)
    rows = [("cell", "runs left", "tuned", "stored", "MB", "s a run", "")]
    for cell in cells(config):
        c = Run(cell, 0, rates(config, cell)[0], config).config
        key = (c.task, cell.arm)
        if key not in traced:
            traced[key] = _traced(c)
        flops, features, params = traced[key]
        counts = _counts(c)
        measured = [
            one["timing"]["total_s"] for run in state.runs if (one := state.finished.get(run.id))
            and (run.cell.level, run.cell.arm, run.cell.size) == (cell.level, cell.arm, cell.size)
        ]  # fmt: skip
        seconds = float(np.median(measured)) if measured else _steps(c) * flops / speed
        total += seconds * left[cell]
        megabytes = (4 * (params + 3 * counts["tuned"] + counts["stored"]) + features) / 1e6
        said = "measured" if measured else "training alone, at most"
        numbers = (f"{counts['tuned']:,}", f"{counts['stored']:,}", f"{megabytes:.0f}", f"{seconds:.0f}")
        rows.append((str(cell), str(left[cell]), *numbers, said))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines += ["  ".join(value.ljust(w) for value, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.append(f"{left.total()} runs left, about {total / 3600:.1f} hours on one worker")
    return "\n".join(lines)


def _counts(c) -> dict[str, int]:
    """What a point tunes and stores, words that its texts add included."""
    model, chosen = _model(c.base, c.task), training_run.methods_of(c)
    if model.tokenizer is not None and not model.tokenizer.has_pieces:
        task = tasks.build(c.task, **c.task_options)
        model, chosen, *_ = training_run.with_new_words(c, task, model, chosen, preflight.training_texts(c))
    return budget.abstract_counts(model, chosen)


def _steps(c) -> int:
    """The most steps of a point, which follow from its examples where it has epochs."""
    if c.steps:
        return c.steps
    task, model = tasks.build(c.task, **c.task_options), _model(c.base, c.task)
    return training_run.scheduled(c, len(task.examples(preflight.training_texts(c), model.tokenizer))).steps


def _flops_per_second() -> float:
    """What a float32 matrix product reaches on this device."""
    x, product = jax.numpy.ones((1024, 1024)), jax.jit(lambda x: x @ x)
    product(x).block_until_ready()
    began = time.perf_counter()
    for _ in range(5):
        product(x).block_until_ready()
    return 5 * 2 * 1024**3 / (time.perf_counter() - began)


def _traced(c) -> tuple[float, int, int]:
    """(FLOPs of a training step, bytes of image features, parameters of the base) of a point, nothing computed."""
    model = training_run.abstract_model(c)
    n_images = None if c.data.name == "scenes" else c.data.n_images
    step, shapes = preflight.step_in_shapes(c, model, n_images=n_images)
    features = shapes[2]
    n_bytes = 0 if features is None else int(np.prod(features.shape)) * features.dtype.itemsize
    n_params = tree.count(budget.abstract_params(model))
    return preflight.flops_of(step, shapes, model), n_bytes, n_params


# ---------------------------------------------------------------- the state of a directory


@dataclasses.dataclass
class State:
    """What a study directory holds now."""

    finished: dict[str, dict]  # id -> result
    tries: dict[str, list[dict]]  # id -> failures
    stale: dict[str, list[str]]  # id -> what changed
    runs: list[Run]

    @property
    def given_up(self) -> set[str]:
        return {name for name, failures in self.tries.items() if len(failures) >= TRIES}

    @property
    def todo(self) -> list[Run]:
        return [run for run in self.runs if run.id not in self.finished and run.id not in self.given_up]


def read(config, directory: Path, known: State | None = None) -> State:
    """Look at everything in `directory` that belongs to the study's runs; what `known` has finished is taken over."""
    finished, stale = dict(known.finished) if known else {}, {}
    tries = {
        path.stem: [json.loads(line) for line in path.read_text().splitlines()]
        for path in sorted((directory / "failures").glob("*.jsonl"))
    }
    state = State(finished, tries, stale, [])
    seen: set[str] = set()
    while True:  # finished trials name the runs of the other seeds
        state.runs = runs(config, finished, state.given_up)
        new = [run for run in state.runs if run.id not in seen]
        if not new:
            return state
        for run in new:
            seen.add(run.id)
            if run.id in finished:
                continue
            if changed := changes(directory, run):
                stale[run.id] = changed
                continue
            try:
                finished[run.id] = json.loads((directory / "points" / run.id / "result.json").read_text())
            except FileNotFoundError:
                pass


def plan(config, state: State) -> str:
    """What will run and why, for the user to read before it does."""
    n_all, n_known = n_runs(config), len(state.runs)
    lines = [
        f"study {config.name}: {len(cells(config))} cells, {n_all} runs; {len(state.finished)} done, {len(state.todo)} "
        f"to do, {n_all - n_known} wait for their cell's learning rate"
    ]
    for name, changed in sorted(state.stale.items()):
        lines.append(f"  out of date, runs again: {name} ({', '.join(changed)})")
    for name in sorted(state.given_up):
        lines.append(f"  given up after {TRIES} tries: {name} ({state.tries[name][-1]['error']})")
    return "\n".join(lines)


def set_aside(directory: Path, state: State) -> None:
    """Move runs that are out of date, and their failures, to DIR/stale: nothing that was computed is deleted."""
    for name in state.stale:
        aside = directory / "stale" / f"{name}.{uuid.uuid4().hex[:6]}"
        aside.parent.mkdir(exist_ok=True)
        os.replace(directory / "points" / name, aside)
        (directory / "failures" / f"{name}.jsonl").unlink(missing_ok=True)
        state.tries.pop(name, None)
    state.stale.clear()


def collect(directory: Path, state: State) -> list[dict]:
    """The rows of results.jsonl: every run that is done, and every one given up, by id."""
    rows = []
    for run in state.runs:
        facts = {**dataclasses.asdict(run.cell), "id": run.id, "seed": run.seed, "lr": run.lr}
        if run.id in state.finished:
            rows.append(facts | state.finished[run.id])
        elif run.id in state.given_up:
            rows.append(facts | {"status": "failed", "error": state.tries[run.id][-1]["error"]})
    rows.sort(key=lambda row: row["id"])
    files.write_jsonl(directory / "results.jsonl", rows)
    return rows


def keep_pictures(config, directory: Path, n: int = 8) -> None:
    """The first test pictures of every level, for the report, which reads files only."""
    for level in config.levels:
        c = Run(next(cell for cell in cells(config) if cell.level == level), 0, 1.0, config).config
        out = directory / "pictures" / level
        if out.exists():
            continue
        split = data.load(c.data, ["test"])["test"]
        aside = out.with_name(f".{level}.{uuid.uuid4().hex}")
        aside.mkdir(parents=True)
        for i in np.linspace(0, len(split.rows) - 1, min(n, len(split.rows))).round().astype(int).tolist():
            name = urllib.parse.quote(split.rows[i]["image_id"], safe="")  # ids may be paths
            Image.fromarray(np.asarray(split.images[i])).save(aside / f"{name}.png")
        os.replace(aside, out)


# ---------------------------------------------------------------- how far it is


def progress(config, directory: Path, state: State) -> str:
    """'13 of 48 runs done, ETA about 0:07:10', from what all workers have left in `directory`."""
    said = [f"{len(state.finished)} of {n_runs(config)} runs done"]
    if state.given_up:
        said.append(f"{len(state.given_up)} given up")
    if not runs_left(config, state):
        return ", ".join([*said, "none left"])
    seconds = seconds_left(config, directory, state)
    eta = "unknown" if seconds is None else f"about {datetime.timedelta(seconds=round(seconds))}"
    return ", ".join([*said, f"ETA {eta}"])


def as_of(run: Run, directory: Path, state: State) -> State:
    """`state` without what was finished after `run`; all of it where `run` is not finished.

    So of two workers that end at once one says that 12 runs are done, and the other one 13.
    """

    def written(name):
        return _written(directory / "points" / name / "result.json")

    if run.id not in state.finished:
        return state
    finished = {name: result for name, result in state.finished.items() if written(name) <= written(run.id)}
    return dataclasses.replace(state, finished=finished, runs=runs(run.study, finished, state.given_up))


def runs_left(config, state: State) -> collections.Counter[Cell]:
    """How many runs each cell still needs; a cell with none is not in it."""
    left = collections.Counter(run.cell for run in state.todo)
    undecided = {run.cell for run in state.todo if run.seed == 0}
    for cell in undecided:  # the runs of the other seeds get their names when the rate is chosen
        left[cell] += config.seeds - 1
    return left


def seconds_left(config, directory: Path, state: State) -> float | None:
    """About how long the rest of the study takes; None before the first run since its newest start is finished."""
    # Each run that is left is expected to take what finished ones like it took (see `_expected`). The sum is divided by
    # the number of workers that hold a run now. It is never less than the longest run that is left: workers do not share
    # one. Left out: how far the runs of the other workers are, tries that fail, workers that come or go.
    measured = _measured(directory, state)
    if not measured:
        return None
    left = runs_left(config, state)
    seconds = {cell: _expected(cell, measured) for cell in left}
    in_all = sum(n * seconds[cell] for cell, n in left.items())
    return max(in_all / _live_workers(directory), max(seconds.values(), default=0.0))


def _measured(directory: Path, state: State) -> dict[tuple, list[float]]:
    """How long the runs took that finished since the latest start of the study: each stands under (), (level,),
    (level, arm), (level, arm, size) and all of its cell.

    Those of before may come from another machine, or from another number of workers on this one.
    """
    # files are compared with files: the clocks of the hosts may differ
    began, found = _written(directory / "source.json"), collections.defaultdict(list)
    for run in state.runs:
        if run.id in state.finished and _written(directory / "points" / run.id / "result.json") >= began:
            fields = dataclasses.astuple(run.cell)
            for n in range(len(fields) + 1):
                found[fields[:n]].append(_seconds(state.finished[run.id]["timing"]))
    return dict(found)


def _written(path: Path) -> int:
    """When a file was written, in nanoseconds; 0 where there is none."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def _seconds(timing: dict) -> float:
    """How long a run takes when nothing interrupts it.

    The times of a run that went on from a stored step have only the steps since then: the others are added.
    """
    return timing["total_s"] + max(0.0, timing["steps"] * timing["step_s"] - timing["train_s"])


def _expected(cell: Cell, measured: dict[tuple, list[float]]) -> float:
    """The median of the measured runs that are most like those of `cell`: of that cell, or else of its level, arm and
    size, of its level and arm, of its level, of any."""
    fields = dataclasses.astuple(cell)
    alike = next(fields[:n] for n in range(len(fields), -1, -1) if fields[:n] in measured)
    return float(np.median(measured[alike]))


def _live_workers(directory: Path) -> int:
    """How many workers hold a run now, on any host; at least 1. The claim of one that is gone does not count."""
    claims = directory / "claims"
    held = [path.name for path in claims.glob("[!.]*")]
    return max(1, sum(locks.Lease(claims, name).owner() is not None for name in held))


# ---------------------------------------------------------------- running


def execute(run: Run, directory: Path, log, keep_checkpoints: bool = False) -> bool:
    """Run one point in its directory; a failure is written down and False returned. KeyboardInterrupt goes through."""
    workdir = directory / "points" / run.id
    workdir.mkdir(parents=True, exist_ok=True)
    files.write_json(workdir / "depends_on.json", depends_on(run.config))
    began = time.time()
    with (workdir / "log.txt").open("a", buffering=1) as file, contextlib.redirect_stdout(file):
        try:
            result = training_run.run(run.config, workdir, features_in=directory / "features")
        except Exception as error:  # whatever it is, the other points go on
            traceback.print_exc(file=file)
            if signals.is_transient(error):  # of the machine, not of the run: it does not count as a try
                raise
            result, said = None, f"{type(error).__name__}: {error}"[:500]
    if result is None:
        failed(directory, run.id, said, began)
        log(f"failed: {run.id}: {said}")
        return False
    if not keep_checkpoints:
        shutil.rmtree(workdir / "checkpoints", ignore_errors=True)
    split = result["metrics"][run.config.eval.splits[-1]]
    log(
        f"{run.id}: {run.config.eval.splits[-1]} {result['main_metric']} {split['tuned'][result['main_metric']]:.3f}, "
        f"{result['timing']['steps']} steps, {result['timing']['total_s']:.0f} s"
    )
    return True


def attempt(run: Run, directory: Path, log, known: State | None = None) -> bool:
    """Do a run that is not done; False where another process is doing it. Raises ValueError where the code has changed.

    How far the study is then stands behind what the run says; what `known` has finished is not read again for that.
    """

    def announce(text):
        state = as_of(run, directory, read(run.study, directory, known))
        log(f"{text}; {progress(run.study, directory, state)}")

    check_source(directory, run)
    claim = locks.Lease(directory / "claims", run.id)
    if not claim.take():
        return False
    try:
        if changed := changes(directory, run):
            set_aside(directory, State({}, {}, {run.id: changed}, []))
        if not (directory / "points" / run.id / "result.json").exists():  # finished since somebody looked
            execute(run, directory, announce, run.study.keep_checkpoints)
        return True
    finally:
        claim.release()


def work(config, directory: Path, log=print) -> None:
    """Do runs until none is left that nobody else is doing. Any number of processes may do this on one directory."""
    state = None
    while True:
        state, busy = read(config, directory, state), 0
        for run in state.todo:
            if attempt(run, directory, log, state):
                break
            busy += 1
        else:
            if not busy:
                return
            time.sleep(1.0)


def run(
    config, workdir: str | Path, workers: int = 0, command: list[str] | None = None, log=print, elsewhere=None
) -> list[dict]:
    """Everything of the study that is not done, then results.jsonl -> its rows.

    Raises ValueError before anything is written where the config or its data cannot be right.

    `workers` processes, each on its own cores (0: one per core on CPU, one on an accelerator), are started with `command`
    and `--worker=I`; with one, or no command, this process does the work. With `elsewhere(config, directory, log=)` that
    does it instead, as `cluster.work` of a Ray cluster.
    """
    directory = Path(workdir)
    state = read(config, directory)
    log(plan(config, state))
    if state.todo:
        check(config)
    directory.mkdir(parents=True, exist_ok=True)
    set_aside(directory, state)
    files.write_json(directory / "source.json", source())
    files.write_json(
        directory / "study.json", {"config": training_run.as_json(config), "command": " ".join(command or [])}
    )
    if state.todo:
        log(progress(config, directory, state))
    if elsewhere:
        elsewhere(config, directory, log=log)
    else:
        workers = workers or (host.cores() if jax.default_backend() == "cpu" else 1)
        if workers == 1 or not command or not state.todo:
            work(config, directory, log)
        else:
            _processes(command, min(workers, len(state.todo)), directory, log)
    state = read(config, directory)
    rows = collect(directory, state)
    keep_pictures(config, directory)
    log(plan(config, state))
    return rows


# In a worker before anything is imported: an equal share of the cores (XLA takes its threads from that), and a stop when
# the launcher is killed, which cannot tell it.
_PIN = """
import ctypes, os, signal, sys
i, n = int(sys.argv[1]), int(sys.argv[2])
if hasattr(os, "sched_setaffinity"):
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[i * len(cores) // n : (i + 1) * len(cores) // n] or [cores[i % len(cores)]])
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)
os.execv(sys.executable, [sys.executable, *sys.argv[3:]])
"""


def _processes(command: list[str], workers: int, directory: Path, log=print) -> None:
    """Start workers and wait; an interrupt here, or the end of this process, stops them with their state saved.

    A worker that the system kills (out of memory, for one) has failed in the run that it held: that is written down, and
    another worker takes its place.
    """

    def start(i):
        return subprocess.Popen([sys.executable, "-c", _PIN, str(i), str(workers), *command, f"--worker={i}"])

    children, codes = {i: start(i) for i in range(workers)}, []
    try:
        while children:
            time.sleep(0.2)
            for i, child in list(children.items()):
                if child.poll() is None:
                    continue
                held = _held_by(directory, child.pid) if child.returncode < 0 else []
                if not held:
                    codes.append(child.returncode)
                    del children[i]
                    continue
                for run in held:
                    name = signal.Signals(-child.returncode).name
                    failed(directory, run, f"the worker was killed by {name}, as for want of memory", time.time())
                    log(f"failed: {run}: the worker was killed by {name}; another one takes its place")
                children[i] = start(i)
    except KeyboardInterrupt:
        for child in children.values():
            child.terminate()
        for child in children.values():
            child.wait()
        raise
    if bad := [code for code in codes if code not in (0, signals.RESTARTABLE, signals.INTERRUPTED)]:
        raise RuntimeError(f"{len(bad)} of {workers} workers ended with {bad}; the same command goes on from here")
    for code in (signals.INTERRUPTED, signals.RESTARTABLE):
        if code in codes:
            raise signals.Stopped("", signal.SIGINT if code == signals.INTERRUPTED else signal.SIGTERM)


def _held_by(directory: Path, pid: int) -> list[str]:
    """The runs that a process of this host had claimed when it ended."""
    found = []
    for path in (directory / "claims").glob("[!.]*"):
        try:
            owner = json.loads(path.read_text())
        except (FileNotFoundError, ValueError):
            continue
        if (owner["host"], owner["pid"]) == (socket.gethostname(), pid):
            found.append(path.name)
    return found


def failed(directory: Path, run: str, error: str, began: float) -> None:
    """Write down a try that failed."""
    failures = directory / "failures"
    failures.mkdir(exist_ok=True)
    with (failures / f"{run}.jsonl").open("a") as out:
        out.write(json.dumps({"error": error, "time": began, "host": socket.gethostname()}) + "\n")
