"""How far a study is, and how long the rest will take, from what all of its workers have left in the directory."""

import collections
import dataclasses
import datetime
from pathlib import Path

import numpy as np

from jaxpeft.runtime import locks
from jaxpeft.study import grid
from jaxpeft.study.grid import Cell, Run
from jaxpeft.study.state import State


def progress(config, directory: Path, state: State) -> str:
    """'13 of 48 runs done, ETA about 0:07:10', from what all workers have left in `directory`."""
    said = [f"{len(state.finished)} of {grid.n_runs(config)} runs done"]
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
    return dataclasses.replace(state, finished=finished, runs=grid.runs(run.study, finished, state.given_up))


def runs_left(config, state: State) -> collections.Counter[Cell]:
    """How many runs each cell still needs; a cell with none is not in it."""
    left = collections.Counter(run.cell for run in state.todo)
    undecided = {run.cell for run in state.todo if run.seed == 0}
    for cell in undecided:  # the runs of the other seeds get their names when the learning rate is chosen
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
    """How long the runs took that finished since the latest start of the study: each stands under (), (setting,),
    (setting, variant), (setting, variant, size) and all of its cell.

    Those of before may come from another machine, or from another number of workers on this one.
    """
    # files are compared with files: the clocks of the hosts may differ
    began, found = _written(directory / "study.json"), collections.defaultdict(list)
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
    """The median of the measured runs that are most like those of `cell`: of that cell, or else of its setting, variant
    and size, of its setting and variant, of its setting, of any."""
    fields = dataclasses.astuple(cell)
    alike = next(fields[:n] for n in range(len(fields), -1, -1) if fields[:n] in measured)
    return float(np.median(measured[alike]))


def _live_workers(directory: Path) -> int:
    """How many workers hold a run now, on any host; at least 1. The claim of one that is gone does not count."""
    claims = directory / "claims"
    held = [path.name for path in claims.glob("[!.]*")]
    return max(1, sum(locks.Lease(claims, name).owner() is not None for name in held))
