"""The cost of a study (`--dry_run`): traces a training step per task and variant; compiles and trains nothing."""

import time
from pathlib import Path

import jax
import numpy as np

from jaxpeft import tasks, tree
from jaxpeft.adapt import budget
from jaxpeft.runtime.text import aligned
from jaxpeft.study import grid, progress, state
from jaxpeft.study.grid import Run
from jaxpeft.training import preflight, setup


def dry_run(config, directory: Path) -> str:
    """The plan, and for each cell the numbers of trainable and stored parameters, memory and time.

    Seconds are measured if the directory has a finished run of the same setting, variant and size. Otherwise they are
    estimated as the FLOPs of a step, at half the speed of a matrix product on this device, times the cap on steps. Memory is
    that of parameters, optimizer and cached stages, without activations.
    """
    grid.check_config(config)
    found = state.read(config, directory)
    left, total, rows = progress.runs_left(config, found), 0.0, []
    speed, traced, share = 0.5 * _flops_per_second(), {}, config.get("search_steps", 1.0)
    for cell in grid.cells(config):
        run = Run(cell, 0, grid.learning_rates(config, cell)[0], config)
        c = run.config
        key = (c.task, c.base, c.data.get("captions"), cell.variant)
        if key not in traced:
            traced[key] = _traced(c)
        flops, features, params = traced[key]
        counts = _counts(c)
        measured = _measured(found, run)
        seconds = float(np.median(measured)) if measured else _steps(c) * flops / speed
        short, whole = left[cell, True], left[cell, False]
        total += seconds * (whole + share * short)
        megabytes = (4 * (params + 3 * counts["tuned"] + counts["stored"]) + features) / 1e6
        numbers = (f"{counts['tuned']:,}", f"{counts['stored']:,}", f"{megabytes:.0f}", f"{seconds:.0f}")
        n_left = f"{whole} + {short} short" if short else str(whole)
        rows.append((str(cell), n_left, *numbers, "measured" if measured else "training alone, at most"))
    rows.insert(0, ("cell", "runs left", "tuned", "stored", "MB", "s a run", ""))
    end = f"{left.total()} runs left, about {total / 3600:.1f} hours on one worker"
    return "\n".join([state.plan(config, found), *aligned(rows), end + _extended(config, found)])


def _extended(config, found: state.State) -> str:
    """How many runs may be added where the best rate stands at an edge, at most."""
    undecided = len({run.cell for run in found.todo if run.searches})
    most = undecided * config.get("extend", 0)
    return f"; at most {most} more of the search where the best rate is at an edge, not in these hours" if most else ""


def _measured(found: state.State, like: Run) -> list[float]:
    """Seconds of the finished runs of the same setting, variant and size, in proportion to the steps of `like`."""
    cell = like.cell
    alike = (cell.setting, cell.variant, cell.size)
    return [
        found.finished[run.id]["timing"]["total_s"] * max(like.config.steps, 1) / max(run.config.steps, 1)
        for run in found.runs
        if run.id in found.finished and (run.cell.setting, run.cell.variant, run.cell.size) == alike
    ]


def _counts(c) -> dict[str, int]:
    """The numbers of parameters that a run trains and stores, including new words of its texts."""
    model, chosen = grid.abstract_model(c.base, c.task), setup.methods_of(c)
    if model.tokenizer is not None and not model.tokenizer.has_pieces:
        task = tasks.build(c.task, **c.task_options)
        model, chosen, *_ = setup.with_new_words(c, task, model, chosen, preflight.training_texts(c))
    return budget.abstract_counts(model, chosen)


def _steps(c) -> int:
    """The maximum number of steps of a run; with epochs it depends on the number of examples."""
    if c.steps:
        return c.steps
    task, model = tasks.build(c.task, **c.task_options), grid.abstract_model(c.base, c.task)
    return setup.scheduled(c, len(task.examples(preflight.training_texts(c), task.template(model)))).steps


def _flops_per_second() -> float:
    """The FLOP/s of a float32 matrix product on this device: the fastest of 20, as other programs slow some of them down."""
    x, product = jax.numpy.ones((1024, 1024)), jax.jit(lambda x: x @ x)
    product(x).block_until_ready()
    seconds = []
    for _ in range(20):
        began = time.perf_counter()
        product(x).block_until_ready()
        seconds.append(time.perf_counter() - began)
    return 2 * 1024**3 / min(seconds)


def _traced(c) -> tuple[float, int, int]:
    """(FLOPs of a training step, bytes of cached stages, parameters of the base) of a run; nothing is computed."""
    model = setup.abstract_model(c)
    step, shapes, n_bytes = preflight.step_in_shapes(c, model)
    n_params = tree.count(budget.abstract_params(model))
    return preflight.flops_of(step, shapes, model), n_bytes, n_params
