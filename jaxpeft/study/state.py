"""The content of a study directory: finished runs, failed tries, runs that are out of date.

DIR/study.json          the config and the command
DIR/points/ID/          one run, as written by `main.py` for a single run: result.json, predictions.jsonl, ...
DIR/claims/ID           the worker that holds the run; locks.STALE seconds after the worker ended, others take over
DIR/failures/ID.jsonl   a line per failed try; after TRIES the run is given up and reported as failed
DIR/features/           outputs of frozen stages (image tokens, question states) that the runs share
DIR/stale/              earlier files of runs that were executed again because of a changed config or --rerun, or changed data
DIR/results.jsonl       a line per run, which the report reads
DIR/cases.npz           the scores of every test case in every run (cases.py)
DIR/search.jsonl        a line per run of the search, where this has fewer steps than the other runs (`search_steps`)
"""

import dataclasses
import json
import os
import socket
import uuid
from pathlib import Path

from jaxpeft import tree
from jaxpeft.runtime import files, renamed
from jaxpeft.study import axes, grid
from jaxpeft.study.grid import Run
from jaxpeft.training import results, setup

TRIES = 3


@dataclasses.dataclass
class State:
    """The current content of a study directory."""

    finished: dict[str, dict]  # id -> result
    tries: dict[str, list[dict]]  # id -> failures
    stale: dict[str, list[str]]  # id -> why it is out of date
    runs: list[Run]

    @property
    def given_up(self) -> set[str]:
        return {name for name, failures in self.tries.items() if len(failures) >= TRIES}

    @property
    def todo(self) -> list[Run]:
        return [run for run in self.runs if run.id not in self.finished and run.id not in self.given_up]


def read(config, directory: Path, known: State | None = None) -> State:
    """Read the state of the study's runs in `directory`; the results in `known` are not read again."""
    tries = {path.stem: files.read_jsonl(path) for path in sorted((directory / "failures").glob("*.jsonl"))}
    state = State(dict(known.finished) if known else {}, tries, {}, [])
    seen = set(state.finished)
    while True:  # finished runs with seed 0 determine the runs with other seeds
        state.runs = grid.runs(config, state.finished, state.given_up)
        new = [run for run in state.runs if run.id not in seen]
        if not new:
            return state
        for run in new:
            seen.add(run.id)
            if why := out_of_date(directory, run):
                state.stale[run.id] = why
                tries.pop(run.id, None)  # these tries are out of date too
                continue
            try:
                state.finished[run.id] = json.loads((directory / "points" / run.id / "result.json").read_text())
            except FileNotFoundError:
                pass


def out_of_date(directory: Path, run: Run) -> list[str]:
    """The config keys in which an existing run differs from the grid; where there are any, it must be executed again."""
    place = directory / "points" / run.id
    try:
        before = renamed.with_defaults(json.loads((place / "config.json").read_text()))
        if (place / "result.json").exists():  # old names are no difference; an unfinished run of 0.1 cannot be resumed
            before = renamed.translated(before)
    except FileNotFoundError:  # not begun, or just moved to stale/ by another process
        return []
    before, now = tree.flatten(before), tree.flatten(setup.as_json(run.config))
    return sorted(key.replace("/", ".") for key in before.keys() | now.keys() if before.get(key) != now.get(key))


def set_aside(directory: Path, name: str, mark: str = "") -> None:
    """Move a run to DIR/stale/NAME.MARK, by default a new one, and delete its failures."""
    aside = directory / "stale" / f"{name}.{mark or uuid.uuid4().hex[:6]}"
    aside.parent.mkdir(exist_ok=True)
    os.replace(directory / "points" / name, aside)
    (directory / "failures" / f"{name}.jsonl").unlink(missing_ok=True)


def write_failure(directory: Path, name: str, error: str, began: float) -> None:
    """Record a failed try of a run."""
    failures = directory / "failures"
    failures.mkdir(exist_ok=True)
    with (failures / f"{name}.jsonl").open("a") as out:
        out.write(json.dumps({"error": error, "time": began, "host": socket.gethostname()}) + "\n")


def plan(config, state: State) -> str:
    """A summary of what will run and why."""
    n_all, n_known = grid.n_runs(config, state.runs), len(state.runs)
    lines = [
        f"study {config.name}: {len(grid.cells(config))} cells, {n_all} runs; {len(state.finished)} done, "
        f"{len(state.todo)} to do, {n_all - n_known} waiting for the choice of their cell's learning rate"
    ]
    if config.get("extend", 0):
        lines.append(
            f"  a cell whose best rate is the smallest or largest one tries the next, at most {config.extend} more"
        )
    for name, why in sorted(state.stale.items()):
        lines.append(f"  out of date, will run again: {name} ({', '.join(why)})")
    for name in sorted(state.given_up):
        lines.append(f"  given up after {TRIES} tries: {name} ({state.tries[name][-1]['error']})")
    if other := sorted(name for name, result in state.finished.items() if result.get("code", "") != results.code()):
        lines.append(
            f"  {len(other)} of {len(state.finished)} finished runs were made by other code than the current code "
            f"({results.code()}), such as {other[0]}. They do not run again automatically, but the report does not compare "
            f"runs of one cell made by different code. To run them again, pass a pattern of their ids, such as "
            f"--rerun='{other[0].rsplit('-s', 1)[0]}-*' or --rerun='*'"
        )
    return "\n".join(lines)


def as_json(config) -> dict:
    """A study's config as JSON, with the variants that its axes make."""
    about = setup.as_json(config)
    if about.get("axes"):
        made = {name: dict(variant) for name, variant in axes.variants(config).items()}
        about["variants"] = json.loads(json.dumps(made, default=dict))
    return about


def collect(directory: Path, state: State) -> list[dict]:
    """Write results.jsonl -> its rows: all runs that are done or given up, sorted by id. Those of a search with fewer steps
    are written to search.jsonl and left out."""
    variants, rows, searched = axes.variants(state.runs[0].study), [], []
    for run in state.runs:
        facts = {**dataclasses.asdict(run.cell), "id": run.id, "seed": run.seed, "lr": run.lr}
        more = {"axes": variants[run.cell.variant].get("axes"), "drawn": run.drawn}
        facts |= {name: dict(value) for name, value in more.items() if value}
        some = searched if run.short else rows
        if run.id in state.finished:
            some.append(facts | state.finished[run.id])
        elif run.id in state.given_up:
            some.append(facts | {"status": "failed", "error": state.tries[run.id][-1]["error"]})
    for name, some in (("results", rows), ("search", searched)):
        some.sort(key=lambda row: row["id"])
        if some or name == "results":
            files.write_jsonl(directory / f"{name}.jsonl", some)
    return rows
