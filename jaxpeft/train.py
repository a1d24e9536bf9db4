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


class Best(NamedTuple):
    """The tuned half with the lowest validation loss so far, for runs that stop when it no longer falls."""

    loss: jax.Array
    tuned: Tree
    mark: jax.Array  # the loss that counts as progress when undercut by stop.min_gain
    since: jax.Array  # validations since then
    stopped: jax.Array  # whether the decay was started because of that


class TrainState(NamedTuple):
    """What training changes, and the seed: step `s` draws from fold_in(seed, s). `best` where training validates."""

    step: jax.Array
    tuned: Tree
    opt: optax.OptState
    seed: jax.Array | int = 0
    best: Best | None = None


class NonFinite(FloatingPointError):
    """The loss or a gradient is NaN or infinite; the message names the step and the leaf groups."""


def train_step(state: TrainState, frozen: Tree, features, batch: dict, *, model, task, tx, accumulate: int):
    """One update of the tuned half -> (state, metrics). Gradients are of sums, divided once by the total count."""
    rng = jax.random.fold_in(jax.random.key(state.seed), state.step)

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
    return state._replace(step=state.step + 1, tuned=optax.apply_updates(state.tuned, updates), opt=opt), metrics


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


def fit(
    config,
    workdir: Path,
    step_fn,
    tuned: Tree,
    frozen: Tree,
    features,
    batches,
    manifest: dict,
    log=print,
    validate=None,
):
    """Train `tuned` from the newest good checkpoint to `config.steps` -> (state, timing).

    `step_fn(state, frozen, features, batch, tx=...)` is the pure step; `batches(step)` iterates from a step on. Metrics
    of step n are read while step n + 1 runs, so the device never waits for the log.

    With `validate(tuned) -> loss` the schedule is 'plateau' and config.steps a cap: when the loss has not fallen by
    config.stop.min_gain (a share of it) in config.stop.patience validations, one every config.stop.every steps, the
    rate decays to zero over optim.cooldown of the steps done, and the tuned half with the lowest loss is returned.
    timing['stopped'] says 'plateau' or 'cap'.
    """
    if config.batch_size % config.accumulate:
        raise ValueError(f"batch_size {config.batch_size} is not divisible by accumulate {config.accumulate}")
    mesh = sharding.mesh(config.batch_size // config.accumulate)
    tx = optim.optimizer(config.optim, tuned, config.steps)
    state = TrainState(jnp.int32(0), tuned, jax.jit(tx.init)(tuned), jnp.uint32(config.seed))
    if validate:
        infinity = jnp.float32(jnp.inf)
        state = state._replace(best=Best(infinity, tuned, infinity, jnp.int32(0), jnp.bool_(False)))
    timing = {"steps": config.steps, "compile_s": 0.0, "step_s": 0.0, "train_s": 0.0}
    checkpoints = Checkpoints(workdir / "checkpoints")
    try:
        if (restored := checkpoints.restore(state, manifest, log)) is not None:
            log(f"resumed from step {restored[0]}")
            state = restored[1]
        start = int(state.step)
        if start >= _last_step(config, state):
            return _chosen(state, timing)
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
            config, workdir, step_fn, state, frozen, features, batch, stream, mesh, checkpoints, manifest, log, validate
        )
        timing |= {"step_s": statistics.median(durations), "train_s": time.perf_counter() - started}
        if before is not None and tree.digest(frozen) != before:
            raise AssertionError("a frozen leaf changed during training")
    finally:
        checkpoints.close()
    return _chosen(state, timing)


def _last_step(config, state: TrainState) -> int:
    return config.steps if state.best is None else int(state.opt[-1].n_steps)


def _chosen(state: TrainState, timing: dict):
    if state.best is None:
        return state, timing
    stopped = "plateau" if state.best.stopped else "cap"
    timing |= {"steps": int(state.step), "stopped": stopped, "validation_loss": float(state.best.loss)}
    return state._replace(tuned=state.best.tuned), timing


def _validated(config, state: TrainState, loss: float) -> TrainState:
    """The state after a validation: the better of its tuned halves kept, and the decay started if progress ended."""
    best = jax.device_get(state.best._replace(tuned=None))
    if not loss < best.mark * (1 - config.stop.min_gain):
        best = best._replace(since=best.since + 1)
    else:
        best = best._replace(mark=loss, since=0)
    s, step = jax.device_get(state.opt[-1]), int(state.step)
    if best.since >= config.stop.patience and step < s.decay_from:
        s = s._replace(decay_from=step, n_steps=min(step + max(1, round(config.optim.cooldown * step)), s.n_steps))
        best = best._replace(stopped=True)
    tuned = jax.tree.map(jnp.copy, state.tuned) if loss < best.loss else state.best.tuned
    best = best._replace(loss=min(loss, best.loss))
    # same types and places as before: the compiled step takes no others
    placed = jax.tree.map(
        lambda new, old: jax.device_put(np.asarray(new, old.dtype), old.sharding),
        (s, best), (state.opt[-1], state.best._replace(tuned=None)),
    )  # fmt: skip
    return state._replace(opt=(*state.opt[:-1], placed[0]), best=placed[1]._replace(tuned=tuned))


def _loop(config, workdir, step_fn, state, frozen, features, batch, stream, mesh, checkpoints, manifest, log, validate):
    start, last_step = int(state.step), _last_step(config, state)
    writer, bar = results.Metrics(workdir, start), Progress(last_step, config.batch_size, start)
    durations, pending = [], None

    def settle(step, metrics):
        """Wait for a dispatched step, check it, log it."""
        metrics = jax.device_get(metrics)
        check_finite(step, metrics)
        if step % config.log_every == 0 or step == last_step:
            writer.write(step, loss=float(metrics["loss"]), grad_norm=float(metrics["grad_norm"]))
        bar.update(step, loss=float(metrics["loss"]))

    try:
        with _Stop() as stop:
            last, step = time.perf_counter(), start
            while step < last_step:
                step += 1
                state, metrics = step_fn(state, frozen, features, batch)
                if step < last_step:
                    batch = sharding.shard_batch(next(stream), mesh)
                if pending is not None:
                    settle(*pending)
                pending = (step, metrics)
                durations.append(time.perf_counter() - last)
                last = time.perf_counter()
                if validate and (step % config.stop.every == 0 or step == last_step):
                    settle(*pending)
                    pending = None
                    state = _validated(config, state, loss := validate(state.tuned))
                    writer.write(step, validation_loss=loss)
                    bar.n_steps = last_step = _last_step(config, state)
                    last = time.perf_counter()
                if step % config.checkpoint_every == 0 or step == last_step or stop.asked:
                    if pending is not None:
                        settle(*pending)
                        pending = None
                    checkpoints.save(step, state, manifest)
                    last = time.perf_counter()
                if stop.asked and step < last_step:
                    log(f"\nstopped at step {step}, which is saved; the same command goes on from it")
                    raise KeyboardInterrupt
    finally:
        writer.close()
    return state, durations
