"""The training step, a pure function, and `fit`, which calls it until the steps are done.

`fit` can be read from top to bottom: there is no trainer class and there are no hooks. Randomness is `fold_in(seed, step)` and
batches are a function of the step, so a resumed run does what the interrupted one would have done, bit for bit on the same
machine.
"""

import collections
import contextlib
import dataclasses
import functools
import signal
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter as clock
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxpeft import tree
from jaxpeft.runtime import signals
from jaxpeft.training import optim, results, sharding
from jaxpeft.training.checkpoint import Checkpoints
from jaxpeft.training.progress import Progress
from jaxpeft.tree import Tree

Loss = Callable[[Tree, dict[str, jax.Array], dict[str, jax.Array]], tuple[jax.Array, jax.Array]]
NOTHING, SAVE, STOP = range(3)  # what a host requests; all hosts do the highest of their requests
PAUSE = 50  # the next save waits this many times as long as the last one took, so saving takes at most 2 % of the time


class Best(NamedTuple):
    """The trainable parameters with the lowest validation loss so far, for runs that stop when it no longer falls."""

    loss: jax.Array
    step: jax.Array
    tuned: Tree
    mark: jax.Array  # the last loss that was progress: lower than the mark before by a share of stop.min_gain
    since: jax.Array  # validations since then
    stopped: jax.Array  # whether the decay was started because progress ended


class TrainState(NamedTuple):
    """What training changes, and the seed: step `s` draws from fold_in(seed, s). `best` is None without validation.

    After a step whose loss or gradient is not finite, `ok` is False and nothing changes any more: the state stays the one
    before that step, even if more steps were already dispatched.
    """

    step: jax.Array
    tuned: Tree
    opt: Any  # optax's state; that of `optim.optimizer` is a tuple whose last item is its Schedule
    seed: jax.Array | int = 0
    best: Best | None = None
    ok: jax.Array | bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What a run passes to the loop.

    loss: `loss(variables, batch, rngs) -> (sum, count)` over the rows of a batch: the loss of a task with its model.
    trainable, frozen: the variables, split (`tree.split`).
    batches: `batches(n)` iterates over the batches after step n, with the rows of this host (`sharding.rows`).
    manifest: what the run depends on, as JSON; a checkpoint with another manifest is an error.
    validate: `validate(trainable)` is the validation loss, for the schedule 'plateau'; None for the others.
    rules: how leaves are split over the mesh.
    """

    loss: Loss
    trainable: Tree
    frozen: Tree
    batches: Callable[[int], Iterator[dict[str, np.ndarray]]]
    manifest: dict
    validate: Callable[[Tree], float] | None = None
    rules: sharding.Rules = sharding.WHOLE


class NonFinite(FloatingPointError):
    """The loss or a gradient is NaN or infinite; the message names the step and the leaves."""


def train_step(
    state: TrainState, frozen: Tree, batch: dict[str, jax.Array], *, loss: Loss, tx: Any, grad_accum: int
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Update the trainable parameters once -> (state, metrics). Every array of `batch` has B rows; grad_accum must divide B.

    Gradients are those of sums over rows, divided once by the total count. Metrics: 'loss', 'grad_norm', and 'squares' (G,),
    the squared norm of each leaf's gradient.
    """
    rng = jax.random.fold_in(jax.random.key(state.seed), state.step)

    def loss_fn(tuned: Tree, micro: dict[str, jax.Array], rng: jax.Array) -> tuple[jax.Array, jax.Array]:
        return loss(tree.join(tuned, frozen), micro, {"dropout": rng})

    def add(total: Tree, indexed: tuple[Any, dict[str, jax.Array]]) -> tuple[Tree, None]:
        i, micro = indexed
        grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
        (value, count), grads = grad_fn(state.tuned, micro, jax.random.fold_in(rng, i))
        return jax.tree.map(jnp.add, total, (value, jnp.float32(count), grads)), None

    zero = (jnp.float32(0), jnp.float32(0), jax.tree.map(jnp.zeros_like, state.tuned))
    # a microbatch takes every grad_accum-th row, so that each device's part of it is in its part of the batch
    micros = jax.tree.map(lambda x: x.reshape(-1, grad_accum, *x.shape[1:]).swapaxes(0, 1), batch)
    if grad_accum == 1:
        (value, count, grads), _ = add(zero, (0, jax.tree.map(lambda x: x[0], micros)))
    else:
        (value, count, grads), _ = jax.lax.scan(add, zero, (jnp.arange(grad_accum), micros))
    value, grads = value / count, jax.tree.map(lambda g: g / count, grads)
    squares_G = jnp.stack([jnp.sum(jnp.square(g)) for g in jax.tree.leaves(grads)])
    norm = jnp.sqrt(jnp.sum(squares_G))
    updates, opt = tx.update(grads, state.opt, state.tuned)
    new = (state.step + 1, optax.apply_updates(state.tuned, updates), opt)
    ok = state.ok & jnp.isfinite(value) & jnp.isfinite(norm)
    step, tuned, opt = jax.tree.map(lambda a, b: jnp.where(ok, a, b), new, (state.step, state.tuned, state.opt))
    metrics = {"loss": value, "grad_norm": norm, "squares": squares_G}
    return state._replace(step=step, tuned=tuned, opt=opt, ok=ok), metrics


def check_finite(step: int, metrics: dict[str, np.ndarray], names: list[str]) -> None:
    """Raise NonFinite if the loss or the gradient of a leaf is not finite; `names`: the trainable leaves, in order."""
    bad = [name for name, square in zip(names, metrics["squares"], strict=True) if not np.isfinite(square)]
    if bad or not np.isfinite(metrics["loss"]):
        groups = collections.Counter(
            "/".join(name.split("/")[:2]) for name in bad
        )  # 'params/vision', 'peft/text_decoder'
        some = ", ".join(bad if len(bad) < 5 else (f"{group} ({n} leaves)" for group, n in groups.items()))
        raise NonFinite(
            f"step {step}: loss {float(metrics['loss'])}, gradients not finite in: {some or 'no leaf'}. Try a lower "
            f"optim.lr or optim.clip_norm (--accept_changes resumes from the saved step), or check the examples of this step"
        )


def start(tuned: Tree, *, tx: optax.GradientTransformation, seed: int, best: bool) -> TrainState:
    """The state before the first step; `best`: whether training validates.

    The parameters are copied, because the step donates its state and the caller keeps reading its trainable tree.
    """
    kept = Best(jnp.float32(jnp.inf), jnp.int32(0), _copy(tuned), jnp.float32(jnp.inf), jnp.int32(0), jnp.bool_(False))
    rest = {"seed": jnp.uint32(seed), "best": kept if best else None, "ok": jnp.bool_(True)}
    return TrainState(jnp.int32(0), _copy(tuned), tx.init(tuned), **rest)


def fit(
    config: optim.Config,
    workdir: Path,
    job: Job,
    log: Callable[[str], object] = print,
    accept: bool = False,
) -> tuple[TrainState, dict]:
    """Train from the newest good checkpoint in `workdir` to `config.steps` -> (state, timing).

    With `job.validate` the schedule is 'plateau' (early stopping with a cooldown) and config.steps is a cap. There is a
    validation before the first step and one every config.stop.every steps. If the loss has not fallen by a share of
    config.stop.min_gain in config.stop.patience validations, the learning rate decays to zero over optim.cooldown of the steps
    done. With a patience of 0 it always decays over the last optim.cooldown of config.steps. The parameters with the lowest
    validation loss are returned, those of step 0 included. timing['stopped'] is 'plateau', 'cap', or with a patience of 0
    'budget'; timing['kept_step'] is the step that is returned.

    Checkpoints are saved config.checkpoint_seconds after the last one (0: after every step), or later where a save takes more
    than 1 / PAUSE of that time, by the clock of the first host, and after the last step. If a signal, an error or a loss that
    is not finite ends training early, the last good step is saved first. A SIGKILL loses that time, one save and one step.

    Raises ValueError where a checkpoint does not match job.manifest, unless `accept`; NonFinite; and signals.Stopped after a
    stop was requested.
    """
    mesh = sharding.mesh(config.mesh)
    sharding.check_batch(config.batch_size, config.grad_accum, mesh)
    tx = optim.optimizer(config.optim, job.trainable, config.steps)
    timing: dict[str, Any] = {"steps": config.steps, "compile_s": 0.0, "step_s": 0.0, "train_s": 0.0}
    checkpoints = Checkpoints(workdir / "checkpoints", config.checkpoint_keep, log)
    with contextlib.closing(checkpoints):
        # the state on the mesh: that of the newest good checkpoint, or a new one
        new_state = functools.partial(start, tx=tx, seed=config.seed, best=job.validate is not None)
        like = jax.eval_shape(new_state, job.trainable)
        placed = sharding.shardings(like, job.rules, mesh)
        if (restored := checkpoints.restore(like, job.manifest, accept)) is None:
            state = jax.jit(new_state, out_shardings=placed)(sharding.put(job.trainable, placed.tuned))
        else:
            log(f"resumed from step {restored[0]}")
            state = sharding.put(_resumed(config, restored[1]), placed)
        step = first = saved = int(state.step)
        last = _last_step(config, state)
        if step >= last:
            return _chosen(config, state, timing)
        frozen = sharding.put(job.frozen, sharding.shardings(job.frozen, job.rules, mesh))
        frozen_digest = tree.digest(frozen) if config.check_frozen else None

        # the first batch, and the step compiled for it
        stream = job.batches(first)
        batch = sharding.shard_batch(next(stream), mesh, config.batch_size)
        began = clock()
        out = (placed, sharding.replicated(mesh))
        step_fn = functools.partial(train_step, loss=job.loss, tx=tx, grad_accum=config.grad_accum)
        step_fn = jax.jit(step_fn, donate_argnums=0, out_shardings=out)
        with sharding.using(state):
            step_fn = step_fn.lower(state, frozen, batch).compile()
        timing["compile_s"] = clock() - began
        log(f"compiled the training step in {timing['compile_s']:.1f} s; batch {config.batch_size}")

        # the steps
        names = list(tree.flatten(state.tuned))
        bar = Progress(last, config.batch_size, first)
        pending = collections.deque()  # (step, metrics, requests of hosts) of dispatched steps that are not checked yet
        planned = _planned(state)  # changes where a validation starts the decay
        durations = collections.deque(maxlen=1000)  # seconds per step
        shown = {}  # what the progress bar shows beside the loss
        began = clock()
        save_at = began + config.checkpoint_seconds

        def asked() -> int:
            """The request of this host. Only the first host's clock decides when to save."""
            if signals.asked() is not None:
                return STOP
            return SAVE if sharding.is_first() and clock() >= save_at else NOTHING

        def settle(keep: int = 0) -> int:
            """Wait for the pending steps except the newest `keep`, check and log them -> the highest request of a host."""
            most = NOTHING
            while len(pending) > keep:
                done, metrics, wish = pending.popleft()
                metrics = jax.device_get(metrics)
                check_finite(done, metrics, names)
                loss = float(metrics["loss"])
                if done % config.log_every == 0 or done == last:
                    rate = optim.rate_at(config.optim, planned, done)
                    writer.write(done, loss=loss, grad_norm=float(metrics["grad_norm"]), learning_rate=rate)
                bar.update(done, loss=loss, **shown)
                most = max(most, int(wish))
            return most

        with contextlib.closing(results.Metrics(workdir, first, log)) as writer, signals.polled():
            try:
                if job.validate is not None and step == 0:
                    state, shown = _validated(config, state, job.validate, writer)
                tick = clock()
                while step < last:
                    step += 1
                    state, metrics = step_fn(state, frozen, batch)
                    pending.append((step, metrics, sharding.most_soon(asked(), mesh)))
                    wish = settle(keep=1)  # checks the step before while this one runs
                    if step < last:
                        batch = sharding.shard_batch(next(stream), mesh, config.batch_size)
                    durations.append(clock() - tick)
                    if job.validate is not None and (step % config.stop.every == 0 or step == last):
                        wish = max(wish, settle())
                        state, shown = _validated(config, state, job.validate, writer)
                        bar.n_steps = last = _last_step(config, state)
                        planned = _planned(state)
                    if jax.process_count() == 1:  # no need to agree with other hosts
                        wish = asked()
                    if wish != NOTHING or step == last or config.checkpoint_seconds == 0:
                        settle()
                        saving = clock()
                        if checkpoints.save(step, state, job.manifest):
                            saved = step
                        save_at = clock() + max(config.checkpoint_seconds, PAUSE * (clock() - saving))
                    if wish == STOP and step < last:
                        goes_on = "is saved; run the same command again to resume from it"
                        said = goes_on if checkpoints.wait() else "could not be saved"
                        log(f"\nstopped at step {step}, which {said}")
                        raise signals.Stopped("stopped", signals.asked() or signal.SIGTERM)
                    tick = clock()
            except Exception as error:  # save the last good step, on a single host only: others may be at another step
                if jax.process_count() == 1:
                    with contextlib.suppress(Exception):  # if a step ran out of memory, its state is lost
                        if not isinstance(error, NonFinite):
                            settle()
                        good = int(state.step)
                        if good > saved or not checkpoints.wait():
                            checkpoints.save(good, state, job.manifest)
                        if good > first and checkpoints.wait():
                            log(f"step {good} is saved; run the same command again to resume from it")
                raise
        timing |= {"step_s": statistics.median(durations), "train_s": clock() - began}
        if frozen_digest is not None and tree.digest(frozen) != frozen_digest:
            raise AssertionError("a frozen leaf changed during training")
        if not checkpoints.wait() and not (checkpoints.save(step, state, job.manifest) and checkpoints.wait()):
            log("the last step is not stored: if this run is interrupted now, it resumes from the last stored step")
    return _chosen(config, state, timing)


@jax.jit
def _copy(tuned: Tree) -> Tree:
    return jax.tree.map(jnp.copy, tuned)


def _schedule(state: TrainState) -> optim.Schedule:
    return state.opt[-1]


def _planned(state: TrainState) -> optim.Schedule:
    """The schedule, copied to the host: the step donates its state."""
    return jax.tree.map(np.array, jax.device_get(_schedule(state)))


def _resumed(config: optim.Config, state: TrainState) -> TrainState:
    """A restored state with the schedule of `config`, which may have changed; a decay that validation began keeps its steps."""
    old, new = _schedule(state), optim.schedule(config.optim, config.steps)
    if state.best is not None and state.best.stopped:
        new = new._replace(decay_from=old.decay_from, n_steps=old.n_steps)
    return state._replace(opt=(*state.opt[:-1], new._replace(step=old.step)), ok=np.bool_(True))


def _last_step(config: optim.Config, state: TrainState) -> int:
    return config.steps if state.best is None else int(_schedule(state).n_steps)


def _chosen(config: optim.Config, state: TrainState, timing: dict) -> tuple[TrainState, dict]:
    """What `fit` returns: where training validates, the state with the best parameters."""
    if state.best is None:
        return state, timing
    stopped = "plateau" if state.best.stopped else "cap" if config.stop.patience else "budget"
    timing |= {"steps": int(state.step), "stopped": stopped, "kept_step": int(state.best.step)}
    timing |= {"validation_loss": float(state.best.loss)}
    return state._replace(tuned=state.best.tuned), timing


def _validated(
    config: optim.Config, state: TrainState, validate: Callable[[Tree], float], writer: results.Metrics
) -> tuple[TrainState, dict[str, float]]:
    """Validate once -> (state, values for the progress bar). Keeps the best parameters; starts the decay if progress ended."""
    assert state.best is not None
    loss, step = validate(state.tuned), int(state.step)
    best, s = jax.device_get((state.best._replace(tuned=None), _schedule(state)))
    if not loss < best.mark * (1 - config.stop.min_gain):
        best = best._replace(since=best.since + 1)
    else:
        best = best._replace(mark=loss, since=0)
    # in the warm-up, the start of the decay would raise the rate
    if 0 < config.stop.patience <= best.since and s.n_warm <= step < s.decay_from:
        s = s._replace(decay_from=step, n_steps=min(step + max(1, round(config.optim.cooldown * step)), s.n_steps))
        best = best._replace(stopped=True)
    tuned = state.best.tuned
    if loss < best.loss:
        tuned, best = _copy(state.tuned), best._replace(loss=loss, step=step)
    # same types and shardings as before: the compiled step accepts no others
    old = (_schedule(state), state.best._replace(tuned=None))
    new = jax.tree.map(lambda new, old: np.asarray(new, old.dtype), (s, best), old)
    s, best = sharding.put(new, jax.tree.map(lambda x: x.sharding, old))
    writer.write(step, validation_loss=loss)
    return state._replace(opt=(*state.opt[:-1], s), best=best._replace(tuned=tuned)), {"val": loss}
