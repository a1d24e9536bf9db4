"""The step and the loop: one pure function, and one straight line that calls it until the steps are done.

There is no trainer class and no hook. Randomness is `fold_in(seed, step)` and batches are a function of the step, so a
resumed run repeats what the interrupted one would have done, bit for bit on the same machine.
"""

import collections
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

from jaxpeft import tree
from jaxpeft.runtime import signals
from jaxpeft.training import evaluate, optim, results, sharding
from jaxpeft.training.checkpoint import Checkpoints
from jaxpeft.training.journal import Journal, n_bytes
from jaxpeft.training.progress import Progress
from jaxpeft.tree import Tree

JOURNAL = Path("checkpoints", "journal")  # in a run's directory


class Best(NamedTuple):
    """The tuned half with the lowest validation loss so far, for runs that stop when it no longer falls."""

    loss: jax.Array
    step: jax.Array
    tuned: Tree
    mark: jax.Array  # the loss that counts as progress when undercut by stop.min_gain
    since: jax.Array  # validations since then
    stopped: jax.Array  # whether the decay was started because of that


class TrainState(NamedTuple):
    """What training changes, and the seed: step `s` draws from fold_in(seed, s). `best` where training validates.

    After a step whose loss or gradient is not finite `ok` is False and nothing changes any more: the state is the one
    from before that step, however many were dispatched behind it.
    """

    step: jax.Array
    tuned: Tree
    opt: optax.OptState
    seed: jax.Array | int = 0
    best: Best | None = None
    ok: jax.Array | bool = True


class NonFinite(FloatingPointError):
    """The loss or a gradient is NaN or infinite; the message names the step and the leaves."""


def train_step(state: TrainState, frozen: Tree, features, batch: dict, *, model, task, tx, grad_accum: int):
    """One update of the tuned half -> (state, metrics). Gradients are of sums, divided once by the total count."""
    rng = jax.random.fold_in(jax.random.key(state.seed), state.step)

    def loss_fn(tuned, micro, rng):
        return task.loss(model, tree.join(tuned, frozen), micro, {"dropout": rng})

    def add(total, indexed):
        i, micro = indexed
        (loss, count), grads = jax.value_and_grad(loss_fn, has_aux=True)(
            state.tuned, evaluate.with_features(micro, features), jax.random.fold_in(rng, i)
        )
        return jax.tree.map(jnp.add, total, (loss, jnp.float32(count), grads)), None

    zero = (jnp.float32(0), jnp.float32(0), jax.tree.map(jnp.zeros_like, state.tuned))
    # every accumulate-th row: each device's share of a microbatch is in its share of the batch
    micros = jax.tree.map(lambda x: x.reshape(-1, grad_accum, *x.shape[1:]).swapaxes(0, 1), batch)
    if grad_accum == 1:
        (loss, count, grads), _ = add(zero, (0, jax.tree.map(lambda x: x[0], micros)))
    else:
        (loss, count, grads), _ = jax.lax.scan(add, zero, (jnp.arange(grad_accum), micros))
    loss, grads = loss / count, jax.tree.map(lambda g: g / count, grads)
    squares_G = jnp.stack([jnp.sum(jnp.square(g)) for g in jax.tree.leaves(grads)])
    norm = jnp.sqrt(jnp.sum(squares_G))
    updates, opt = tx.update(grads, state.opt, state.tuned)
    new = (state.step + 1, optax.apply_updates(state.tuned, updates), opt)
    ok = state.ok & jnp.isfinite(loss) & jnp.isfinite(norm)
    step, tuned, opt = jax.tree.map(lambda a, b: jnp.where(ok, a, b), new, (state.step, state.tuned, state.opt))
    metrics = {"loss": loss, "grad_norm": norm, "squares": squares_G}  # of the gradient's leaves, as `tuned` has them
    return state._replace(step=step, tuned=tuned, opt=opt, ok=ok), metrics


def check_finite(step: int, metrics: dict, names: list[str]) -> None:
    """Raise NonFinite when the loss or the gradient of any leaf is not finite; `names` of the tuned leaves, in order."""
    bad = [name for name, square in zip(names, metrics["squares"], strict=True) if not np.isfinite(square)]
    if bad or not np.isfinite(metrics["loss"]):
        groups = collections.Counter(
            "/".join(name.split("/")[:2]) for name in bad
        )  # 'params/vision', 'peft/text_decoder'
        some = ", ".join(bad if len(bad) < 5 else (f"{group} ({n} leaves)" for group, n in groups.items()))
        raise NonFinite(
            f"step {step}: loss {float(metrics['loss'])}, gradients not finite in: {some or 'no leaf'}. Try a lower "
            f"optim.lr or optim.clip_norm, with --accept_changes to go on from what is saved, or look at the examples of this "
            f"step"
        )


def start(tuned: Tree, *, tx, seed: int, best: bool) -> TrainState:
    """The state before the first step; `best` where training validates.

    Of copies: outputs that are inputs would be donated to the step, and the caller keeps reading its tuned tree.
    """
    kept = Best(jnp.float32(jnp.inf), jnp.int32(0), _copy(tuned), jnp.float32(jnp.inf), jnp.int32(0), jnp.bool_(False))
    rest = {"seed": jnp.uint32(seed), "best": kept if best else None, "ok": jnp.bool_(True)}
    return TrainState(jnp.int32(0), _copy(tuned), tx.init(tuned), **rest)


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
    rules: sharding.Rules = sharding.WHOLE,
    accept: bool = False,
):
    """Train `tuned` from the newest good checkpoint to `config.steps` -> (state, timing).

    `step_fn(state, frozen, features, batch, tx=...)` is the pure step; `batches(step)` iterates from a step on, over the
    rows of a batch that are this host's (`sharding.rows`). Leaves go to the devices of config.mesh as `rules` say. Metrics
    of step n are read while step n + 1 runs, so the device never waits for the log.

    With `validate(tuned) -> loss` the schedule is 'plateau' and config.steps a cap: when the loss has not fallen by
    config.stop.min_gain (a share of it) in config.stop.patience validations, one before the first step and then one every
    config.stop.every steps, the rate decays to zero over optim.cooldown of the steps done, and the tuned half with the
    lowest loss is returned. timing['stopped'] says 'plateau' or 'cap', timing['kept_step'] which step is returned.

    What ends training early (a signal, an error, a loss that is not finite) leaves the last good step stored; after a
    SIGKILL at most one step is done again, where the state has no more than config.journal_mb. Raises ValueError where a
    stored step depends on something else than `manifest` says, unless `accept`.
    """
    mesh = sharding.mesh(config.get("mesh"))
    sharding.check_batch(config.batch_size, config.grad_accum, mesh)
    tx = optim.optimizer(config.optim, tuned, config.steps)

    make = functools.partial(start, tx=tx, seed=config.seed, best=validate is not None)
    like = jax.eval_shape(make, tuned)
    placed = sharding.shardings(like, rules, mesh)
    timing = {"steps": config.steps, "compile_s": 0.0, "step_s": 0.0, "train_s": 0.0}
    checkpoints = Checkpoints(workdir / "checkpoints", config.get("checkpoint_keep", 2), log)
    journal = Journal(workdir / JOURNAL, like, manifest, log)
    try:
        restored = checkpoints.restore(like, manifest, accept)
        stored = restored[0] if restored else 0
        newer = journal.restore(stored, accept)
        if (restored := newer or restored) is not None:
            log(f"resumed from step {restored[0]}{', which the journal holds' if newer else ''}")
            state = sharding.put(restored[1]._replace(ok=np.bool_(True)), placed)
        else:
            state = jax.jit(make, out_shardings=placed)(sharding.put(tuned, placed.tuned))
        first = int(state.step)
        if newer:
            checkpoints.save(first, state, manifest)
        if first >= _last_step(config, state):
            return _chosen(state, timing)
        frozen = sharding.put(frozen, sharding.shardings(frozen, rules, mesh))
        features = sharding.replicate(features, mesh)
        before = tree.digest(frozen) if config.check_frozen else None

        stream = batches(first)
        batch = sharding.shard_batch(next(stream), mesh, config.batch_size)
        started = time.perf_counter()
        out = (placed, sharding.replicated(mesh))
        step_fn = jax.jit(functools.partial(step_fn, tx=tx), donate_argnums=0, out_shardings=out)
        with sharding.using(state):
            step_fn = step_fn.lower(state, frozen, features, batch).compile()
        size, most = n_bytes(state) / 1e6, config.get("journal_mb", 0)
        if journaled := size <= most:
            jax.block_until_ready(sharding.packed(jax.tree.leaves(state)))  # compiles it
        timing["compile_s"] = time.perf_counter() - started
        if 0 < most < size:
            log(f"a state of {size:,.0f} MB is not kept after every step (journal_mb is {most}): see checkpoint_every")
        log(f"compiled the training step in {timing['compile_s']:.1f} s; batch {config.batch_size}")

        started = time.perf_counter()
        loop = _Loop(config, workdir, checkpoints, journal if journaled else None, manifest, log, mesh, state)
        durations = loop.run(step_fn, frozen, features, batch, stream, validate)
        state = loop.state
        timing |= {"step_s": statistics.median(durations), "train_s": time.perf_counter() - started}
        if before is not None and tree.digest(frozen) != before:
            raise AssertionError("a frozen leaf changed during training")
        if not checkpoints.wait() and not (checkpoints.save(int(state.step), state, manifest) and checkpoints.wait()):
            log("the last step is not stored: should what follows be cut off, training repeats from the step before")
    finally:
        checkpoints.close()
    return _chosen(state, timing)


@jax.jit
def _copy(tuned: Tree) -> Tree:
    return jax.tree.map(jnp.copy, tuned)


def _last_step(config, state: TrainState) -> int:
    return config.steps if state.best is None else int(state.opt[-1].n_steps)


def _chosen(state: TrainState, timing: dict):
    if state.best is None:
        return state, timing
    stopped = "plateau" if state.best.stopped else "cap"
    timing |= {"steps": int(state.step), "stopped": stopped, "kept_step": int(state.best.step)}
    timing |= {"validation_loss": float(state.best.loss)}
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
    tuned = state.best.tuned
    if loss < best.loss:
        tuned, best = _copy(state.tuned), best._replace(loss=loss, step=step)
    # same types and places as before: the compiled step takes no others
    old = (state.opt[-1], state.best._replace(tuned=None))
    new = jax.tree.map(lambda new, old: np.asarray(new, old.dtype), (s, best), old)
    s, best = sharding.put(new, jax.tree.map(lambda x: x.sharding, old))
    return state._replace(opt=(*state.opt[:-1], s), best=best._replace(tuned=tuned))


class _Loop:
    """The loop's state, so that whatever ends it early can store the last good step."""

    def __init__(self, config, workdir, checkpoints: Checkpoints, journal: Journal | None, manifest, log, mesh, state):
        self._config, self._checkpoints, self._journal = config, checkpoints, journal
        self._manifest, self._log, self._mesh = manifest, log, mesh
        self.state, self._start, self._last_step = state, int(state.step), _last_step(config, state)
        self._names = list(tree.flatten(state.tuned))
        self._writer = results.Metrics(workdir, self._start, log)
        self._bar = Progress(self._last_step, config.batch_size, self._start)
        # (step, metrics, whether a host was asked to stop, state as words or None), dispatched and not yet looked at
        self._pending = []
        self._stored = self._start
        self._last_validation = {}  # for the bar

    def _settle(self, keep: int = 0) -> bool:
        """Wait for pending steps but the newest `keep`, check and log them -> whether all hosts know now that they stop."""
        stopping = False
        while len(self._pending) > keep:
            step, metrics, asked, words = self._pending.pop(0)
            metrics = jax.device_get(metrics)
            check_finite(step, metrics, self._names)
            if step % self._config.log_every == 0 or step == self._last_step:
                self._writer.write(step, loss=float(metrics["loss"]), grad_norm=float(metrics["grad_norm"]))
            self._bar.update(step, loss=float(metrics["loss"]), **self._last_validation)
            if words is not None:
                self._journal.write(step, words)
            stopping |= bool(asked)
        return stopping

    def _words(self) -> jax.Array | None:
        """The state for the journal."""
        return sharding.packed(jax.tree.leaves(self.state)) if self._journal else None

    def _store(self, step: int) -> None:
        if self._checkpoints.save(step, self.state, self._manifest):
            self._stored = step

    def run(self, step_fn, frozen, features, batch, stream, validate) -> collections.deque[float]:
        """All steps that are left -> seconds of each of the last thousand."""
        try:
            with signals.polled():
                return self._run(step_fn, frozen, features, batch, stream, validate)
        except Exception as error:
            self._rescue(error)
            raise
        finally:
            self._writer.close()

    def _run(self, step_fn, frozen, features, batch, stream, validate) -> collections.deque[float]:
        config, durations, step = self._config, collections.deque(maxlen=1000), self._start
        if validate is not None and step == 0:
            self._validate(step, validate)
        last = time.perf_counter()
        while step < self._last_step:
            step += 1
            self.state, metrics = step_fn(self.state, frozen, features, batch)
            validated = validate is not None and (step % config.stop.every == 0 or step == self._last_step)
            words = None if validated else self._words()  # before the next step takes the state's place
            self._pending.append((step, metrics, sharding.any_soon(signals.asked() is not None, self._mesh), words))
            stopping = self._settle(keep=1)
            if step < self._last_step:  # while the step runs
                batch = sharding.shard_batch(next(stream), self._mesh, config.batch_size)
            durations.append(time.perf_counter() - last)
            last = time.perf_counter()
            if validated:
                stopping |= self._settle()
                self._validate(step, validate)
                if self._journal:
                    self._journal.write(step, self._words())
                self._bar.n_steps = self._last_step = _last_step(config, self.state)
                last = time.perf_counter()
            if jax.process_count() == 1:  # no other host has to be told
                stopping = signals.asked() is not None
            if step % config.checkpoint_every == 0 or step == self._last_step or stopping:
                self._settle()
                self._store(step)
                last = time.perf_counter()
            if stopping and step < self._last_step:
                saved = self._checkpoints.wait()
                said = "which is saved; the same command goes on from it" if saved else "which could not be saved"
                self._log(f"\nstopped at step {step}, {said}")
                raise signals.Stopped("stopped", signals.asked() or signal.SIGTERM)
        return durations

    def _validate(self, step: int, validate) -> None:
        loss = validate(self.state.tuned)
        self.state = _validated(self._config, self.state, loss)
        self._writer.write(step, validation_loss=loss)
        self._last_validation = {"val": loss}

    def _rescue(self, error: Exception) -> None:
        """After an error: store the last good state. Not with several hosts, as the others may be in another place."""
        if jax.process_count() > 1:
            return
        try:
            if not isinstance(error, NonFinite):
                self._settle()
            step = int(self.state.step)
        except Exception:  # the step that ran out of memory took its state with it, or this is a second error
            return
        if step > self._stored or not self._checkpoints.wait():
            self._store(step)
        if step > self._start and self._checkpoints.wait():
            self._log(f"step {step} is saved; the same command goes on from it")
