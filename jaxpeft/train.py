"""The step and the loop: one pure function, and one straight line that calls it until the steps are done.

There is no trainer class and no hook. Randomness is `fold_in(seed, step)` and batches are a function of the step, so a
resumed run repeats what the interrupted one would have done, bit for bit on the same machine.
"""

import functools
import signal
import statistics
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxpeft import evals, optim, results, sharding, tree
from jaxpeft.checkpoint import Checkpoints
from jaxpeft.progress import Progress
from jaxpeft.tree import Tree


class TrainState(NamedTuple):
    """What training changes. No rng: step `s` uses fold_in(seed, s)."""

    step: jax.Array
    tuned: Tree
    opt: optax.OptState


class NonFinite(FloatingPointError):
    """The loss or a gradient is NaN or infinite; the message names the step and the leaf groups."""


def train_step(state: TrainState, frozen: Tree, features, batch: dict, *, model, task, tx, seed: int, accumulate: int):
    """One update of the tuned half -> (state, metrics). Gradients are of sums, divided once by the total count."""
    rng = jax.random.fold_in(jax.random.key(seed), state.step)

    def loss_fn(tuned, micro, rng):
        return task.loss(model, tree.join(tuned, frozen), micro, {"dropout": rng})

    def add(total, indexed):
        i, micro = indexed
        (loss, count), grads = jax.value_and_grad(loss_fn, has_aux=True)(
            state.tuned, evals.with_features(micro, features), jax.random.fold_in(rng, i)
        )
        return jax.tree.map(jnp.add, total, (loss, jnp.float32(count), grads)), None

    zero = (jnp.float32(0), jnp.float32(0), jax.tree.map(jnp.zeros_like, state.tuned))
    micros = jax.tree.map(lambda x: x.reshape(accumulate, -1, *x.shape[1:]), batch)
    if accumulate == 1:
        (loss, count, grads), _ = add(zero, (0, jax.tree.map(lambda x: x[0], micros)))
    else:
        (loss, count, grads), _ = jax.lax.scan(add, zero, (jnp.arange(accumulate), micros))
    grads = jax.tree.map(lambda g: g / count, grads)
    updates, opt = tx.update(grads, state.opt, state.tuned)
    squares = _group_squares(grads)
    metrics = {"loss": loss / count, "grad_norm": jnp.sqrt(sum(squares.values())), "groups": squares}
    return TrainState(state.step + 1, optax.apply_updates(state.tuned, updates), opt), metrics


def _group_squares(grads: Tree) -> dict[str, jax.Array]:
    """Squared gradient norm per leaf group ('params/vision', 'peft/text_decoder', ...)."""
    squares: dict[str, jax.Array] = {}
    for name, leaf in tree.flatten(grads).items():
        group = "/".join(name.split("/")[:2])
        squares[group] = squares.get(group, 0.0) + jnp.sum(jnp.square(leaf))
    return squares


def check_finite(step: int, metrics: dict) -> None:
    """Raise NonFinite when the loss or any group's gradient is not finite."""
    bad = [group for group, square in metrics["groups"].items() if not np.isfinite(square)]
    if bad or not np.isfinite(metrics["loss"]):
        raise NonFinite(
            f"step {step}: loss {float(metrics['loss'])}, gradients not finite in: {', '.join(bad) or 'no group'}. "
            f"Training stopped; the last checkpoint is kept. Try a lower optim.lr or optim.clip."
        )


class _Stop:
    """Ctrl-C and SIGTERM ask for a stop at the next step boundary; a second Ctrl-C stops at once."""

    def __init__(self):
        self.asked, self._before = False, {}

    def __enter__(self):
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._before[number] = signal.signal(number, self._ask)
            except ValueError:  # not the main thread: whoever owns it decides
                pass
        return self

    def _ask(self, number, frame):
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)


def fit(config, workdir: Path, step_fn, tuned: Tree, frozen: Tree, features, batches, manifest: dict, log=print):
    """Train `tuned` from the newest good checkpoint to `config.steps` -> (state, timing).

    `step_fn(state, frozen, features, batch, tx=...)` is the pure step; `batches(step)` iterates from a step on. Metrics
    of step n are read while step n + 1 runs, so the device never waits for the log.
    """
    if config.batch_size % config.accumulate:
        raise ValueError(f"batch_size {config.batch_size} is not divisible by accumulate {config.accumulate}")
    mesh = sharding.mesh(config.batch_size // config.accumulate)
    tx = optim.optimizer(config.optim, tuned, config.steps)
    state = TrainState(jnp.int32(0), tuned, jax.jit(tx.init)(tuned))
    timing = {"steps": config.steps, "compile_s": 0.0, "step_s": 0.0, "train_s": 0.0}
    checkpoints = Checkpoints(workdir / "checkpoints")
    try:
        if (restored := checkpoints.restore(state, manifest, log)) is not None:
            log(f"resumed from step {restored[0]}")
            state = restored[1]
        start = int(state.step)
        if start >= config.steps:
            return state, timing
        # donated below: a copy, so that the caller's tuned tree stays readable
        state = sharding.replicate(jax.tree.map(jnp.array, state), mesh)
        frozen, features = sharding.replicate((frozen, features), mesh)
        before = tree.digest(frozen) if config.check_frozen else None

        stream = batches(start)
        batch = sharding.shard_batch(next(stream), mesh)
        started = time.perf_counter()
        step_fn = jax.jit(functools.partial(step_fn, tx=tx), donate_argnums=0)
        step_fn = step_fn.lower(state, frozen, features, batch).compile()
        timing["compile_s"] = time.perf_counter() - started
        log(f"compiled the training step in {timing['compile_s']:.1f} s; batch {config.batch_size}")

        started = time.perf_counter()
        state, durations = _loop(
            config, workdir, step_fn, state, frozen, features, batch, stream, mesh, checkpoints, manifest, log
        )
        timing |= {"step_s": statistics.median(durations), "train_s": time.perf_counter() - started}
        if before is not None and tree.digest(frozen) != before:
            raise AssertionError("a frozen leaf changed during training")
    finally:
        checkpoints.close()
    return state, timing


def _loop(config, workdir, step_fn, state, frozen, features, batch, stream, mesh, checkpoints, manifest, log):
    start = int(state.step)
    writer, bar = results.Metrics(workdir, start), Progress(config.steps, config.batch_size, start)
    durations, pending = [], None

    def settle(step, metrics):
        """Wait for a dispatched step, check it, log it."""
        metrics = jax.device_get(metrics)
        check_finite(step, metrics)
        if step % config.log_every == 0 or step == config.steps:
            writer.write(step, loss=float(metrics["loss"]), grad_norm=float(metrics["grad_norm"]))
        bar.update(step, loss=float(metrics["loss"]))

    try:
        with _Stop() as stop:
            last = time.perf_counter()
            for step in range(start + 1, config.steps + 1):
                state, metrics = step_fn(state, frozen, features, batch)
                if step < config.steps:
                    batch = sharding.shard_batch(next(stream), mesh)
                if pending is not None:
                    settle(*pending)
                pending = (step, metrics)
                durations.append(time.perf_counter() - last)
                last = time.perf_counter()
                if step % config.checkpoint_every == 0 or step == config.steps or stop.asked:
                    settle(*pending)
                    pending = None
                    checkpoints.save(step, state, manifest)
                    last = time.perf_counter()
                if stop.asked and step < config.steps:
                    log(f"\nstopped at step {step}, which is saved; the same command goes on from it")
                    raise KeyboardInterrupt
    finally:
        writer.close()
    return state, durations
