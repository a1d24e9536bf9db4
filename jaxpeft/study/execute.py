"""Executing the runs of a study: any number of processes on one directory, stopped and started at any time.

The layout of a study directory is described in state.py; `jaxpeft study` calls `run`.
"""

import contextlib
import shlex
import shutil
import time
import traceback
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from jaxpeft import data
from jaxpeft.runtime import files, host, locks, signals
from jaxpeft.study import cases, grid, processes, progress, reruns, state
from jaxpeft.study.grid import Run
from jaxpeft.study.state import State
from jaxpeft.training import checkpoint, setup
from jaxpeft.training import run as training_run

LARGEST = 512  # pixels of the longer side of an image for the report, whose page holds the files


def run(
    config,
    workdir: str | Path,
    workers: int = 0,
    command: list[str] | None = None,
    log=print,
    elsewhere=None,
    rerun: str = "",
) -> list[dict]:
    """Execute all runs that are not done and write results.jsonl -> its rows.

    Raises ValueError before anything is written where the config or its data are invalid.

    `workers` processes, each on its own cores (0: one per core on CPU, one on an accelerator), are started with `command`
    and `--worker=I`; with one worker, or without a command, this process does the work. `elsewhere(config, directory, log=)`
    replaces the workers, such as `ray_executor.work` for a Ray cluster. `rerun`: a pattern of ids, see reruns.py.
    """
    directory = Path(workdir)
    grid.check_config(config)
    found = state.read(config, directory)
    has_work = bool(found.todo or rerun)
    if has_work:
        grid.check(config)
    directory.mkdir(parents=True, exist_ok=True)
    if rerun:
        reruns.ask(directory, rerun, found, log)
        found = state.read(config, directory)
    log(state.plan(config, found))
    files.write_json(directory / "study.json", {"config": state.as_json(config), "command": shlex.join(command or [])})
    if found.todo:
        log(progress.progress(config, directory, found))
    if elsewhere:
        elsewhere(config, directory, log=log)
    else:
        workers = workers or (host.cores() if jax.default_backend() == "cpu" else 1)
        if workers == 1 or not command or not found.todo:
            work(config, directory, log)
        else:
            processes.run_workers(command, min(workers, len(found.todo)), directory, log)
    found = state.read(config, directory)
    rows = state.collect(directory, found)
    cases.write(directory, rows, {"test", "test_comp"})
    keep_images(config, directory, has_work)
    log(state.plan(config, found))
    return rows


def work(config, directory: Path, log=print) -> None:
    """Execute runs until all are done. Any number of processes may do this in one directory."""
    found = None
    while True:
        found, busy = state.read(config, directory, found), 0
        for one in found.todo:
            if attempt(one, directory, log, found):
                break
            busy += 1
        else:
            if not busy:
                return
            time.sleep(1.0)


def attempt(one: Run, directory: Path, log, known: State | None = None) -> bool:
    """Execute a run that is not done; returns False where another process is executing it.

    The study's progress is appended to the run's messages; results that `known` holds are not read again for that.
    """

    def announce(text):
        found = state.read(one.study, directory, known)
        log(f"{text}; {progress.progress(one.study, directory, found)}")

    lease = locks.Lease(directory / "claims", one.id)
    if not lease.take():
        return False
    try:
        if state.out_of_date(directory, one):
            state.set_aside(directory, one.id)
        if not (directory / "points" / one.id / "result.json").exists():  # another process may have finished it
            try:
                execute(one, directory, announce, one.study.keep_checkpoints)
            except checkpoint.OtherRun as error:  # the data or the base changed after the run was interrupted
                log(f"{one.id} starts afresh: {error}")
                state.set_aside(directory, one.id)
                execute(one, directory, announce, one.study.keep_checkpoints)
        return True
    finally:
        lease.release()


def execute(one: Run, directory: Path, log, keep_checkpoints: bool = False) -> bool:
    """Train and score a run in its directory. A failure is recorded and False returned; raises KeyboardInterrupt, and OtherRun
    where the directory holds a checkpoint of other data or another base."""
    workdir = directory / "points" / one.id
    workdir.mkdir(parents=True, exist_ok=True)
    # written before the run does it, so that a run that fails at once is tried again when its config changes
    files.write_json(workdir / "config.json", setup.as_json(one.config))
    began = time.time()
    with (workdir / "log.txt").open("a", buffering=1, encoding="utf-8") as file, contextlib.redirect_stdout(file):
        try:
            result = training_run.run(one.config, workdir, features_in=directory / "features")
        except checkpoint.OtherRun:
            raise
        except Exception as error:  # of any type: the other runs continue
            traceback.print_exc(file=file)
            if signals.is_transient(error):  # an error of the machine, not of the run, does not count as a try
                raise
            result, said = None, f"{type(error).__name__}: {error}"[:500]
    if result is None:
        state.write_failure(directory, one.id, said, began)
        log(f"failed: {one.id}: {said}")
        return False
    if not keep_checkpoints:
        shutil.rmtree(workdir / "checkpoints", ignore_errors=True)
    log(f"{one.id}: {_said(result)}, {result['timing']['steps']} steps, {result['timing']['total_s']:.0f} s")
    return True


def _said(result: dict) -> str:
    """The score of a run for its line in the log: on test images, or in a search that of its validation."""
    split = next((name for name in ("test", *result["metrics"]) if name in result["metrics"]), None)
    if split is None:
        return f"{result['validation']['split']} nll {result['validation']['kept']:.3f}"
    return f"{split} {result['main_metric']} {result['metrics'][split]['tuned'][result['main_metric']]:.3f}"


def keep_images(config, directory: Path, renew: bool = True, n: int = 8) -> None:
    """Save some test images of every setting, at most LARGEST pixels a side, for the report, which reads files only.

    `renew`: replace those of other data; otherwise data are read only for a setting without images.
    """
    for setting in config.settings:
        c = Run(next(cell for cell in grid.cells(config) if cell.setting == setting), 0, 1.0, config).config
        out = directory / "pictures" / setting
        if out.exists() and not renew:
            continue
        # the splits that the runs load: what one holds can depend on which others are asked for
        splits = dict.fromkeys([*setup.needed_splits(c), "test"])
        split = data.load(c.data, [*splits])["test"]
        chosen = np.linspace(0, len(split.rows) - 1, min(n, len(split.rows))).round().astype(int).tolist()
        rows = [split.rows[i] for i in chosen]
        # ids may be those of other images; a source may be a directory that was moved
        digest = setup.digest([Path(split.source).name, rows])
        if (out / "data.txt").exists() and (out / "data.txt").read_text("utf-8") == digest:
            continue
        with files.whole_directory(out, [path.name for path in out.glob("*")]) as aside:
            for i, row in zip(chosen, rows, strict=True):
                image = Image.fromarray(np.asarray(split.images[i]))
                image.thumbnail((LARGEST, LARGEST))
                image.save(aside / f"{files.name_for(row['image_id'])}.png")  # ids may be paths
            (aside / "data.txt").write_text(digest, "utf-8")
