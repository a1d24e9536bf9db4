"""The progress of a study and the time left, from the files that all of its workers have written."""

import collections
import dataclasses
import datetime
from pathlib import Path

import numpy as np

from jaxpeft.runtime import locks
from jaxpeft.study import grid
from jaxpeft.study.grid import Cell
from jaxpeft.study.state import State


def progress(config, directory: Path, state: State) -> str:
    """A line such as '13 of 48 runs done, ETA about 0:07:10', from the files in `directory`."""
    said = [f"{len(state.finished)} of {grid.n_runs(config, state.runs)} runs done"]
    if state.given_up:
        said.append(f"{len(state.given_up)} given up")
    if not runs_left(config, state):
        return ", ".join([*said, "none left"])
    seconds = seconds_left(config, directory, state)
    eta = "unknown" if seconds is None else f"about {datetime.timedelta(seconds=round(seconds))}"
    return ", ".join([*said, f"ETA {eta}"])


def runs_left(config, state: State) -> collections.Counter[tuple[Cell, bool]]:
    """The number of runs left for each (cell, whether they are short runs of its search) that has any."""
    left = collections.Counter((run.cell, run.short) for run in state.todo)
    undecided = {run.cell for run in state.todo if run.searches}
    for cell in undecided:  # the runs after the search are known only when the learning rate is chosen
        left[cell, False] += grid.n_final(config)
    return +left


def seconds_left(config, directory: Path, state: State) -> float | None:
    """The estimated time of the runs left; None until a run has finished."""
    # Each run left is expected to take as long as similar finished runs (see `_expected`), and the workers that hold a run now
    # share them. The estimate ignores the progress of runs of other workers, failed tries, and workers that join or leave.
    measured = _measured(state)
    if not measured:
        return None
    left = runs_left(config, state).items()
    seconds = sum(n * _expected(cell, measured) * (config.search_steps if short else 1) for (cell, short), n in left)
    return seconds / _live_workers(directory)


def _measured(state: State) -> dict[tuple, list[float]]:
    """Durations of the finished runs, each under the keys (), (setting,), (setting, variant), (setting, variant, size) and its
    whole cell. A short run of a search counts as if it had all steps."""
    found = collections.defaultdict(list)
    for run in state.runs:
        if run.id in state.finished:
            share = run.study.search_steps if run.short else 1
            fields = dataclasses.astuple(run.cell)
            for n in range(len(fields) + 1):
                found[fields[:n]].append(state.finished[run.id]["timing"]["total_s"] / share)
    return dict(found)


def _expected(cell: Cell, measured: dict[tuple, list[float]]) -> float:
    """The median duration of the measured runs most similar to those of `cell`: of the same cell, or else of the same setting,
    variant and size, setting and variant, or setting, or of all runs."""
    fields = dataclasses.astuple(cell)
    alike = next(fields[:n] for n in range(len(fields), -1, -1) if fields[:n] in measured)
    return float(np.median(measured[alike]))


def _live_workers(directory: Path) -> int:
    """The number of workers that hold a run now, on any host; at least 1. Claims of ended workers do not count."""
    claims = directory / "claims"
    held = [path.name for path in claims.glob("[!.]*")]
    return max(1, sum(locks.Lease(claims, name).owner() is not None for name in held))
