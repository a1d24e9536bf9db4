"""Training that compiles quickly: the real loop, checkpoints and signals, with a single matrix and dropout.

`python toy.py WORKDIR STEPS SECONDS` trains with SECONDS between checkpoints.
"""

import signal
import sys

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft import config as defaults
from jaxpeft.runtime import signals
from jaxpeft.training import loop


def loss(variables, batch, rngs):
    """Least squares with dropout."""
    params = variables["params"]
    keep = jax.random.bernoulli(rngs["dropout"], 0.8, batch["x"].shape)
    wrong = jnp.where(keep, batch["x"], 0) @ params["w"] + params["fixed"][None] - batch["y"]
    return jnp.sum(wrong**2), jnp.float32(batch["x"].shape[0])


def config(steps=12, seconds=0.0, **changes):
    """The config of a run with a checkpoint after every step, or with `seconds` between checkpoints."""
    c = defaults.get_config()
    c.steps, c.batch_size, c.log_every, c.checkpoint_seconds, c.check_frozen = steps, 8, 1, seconds, True
    c.optim.lr, c.optim.schedule, c.optim.warmup = 1e-2, "constant", 0.0
    c.update_from_flattened_dict(changes)
    return c


def rarely(steps=12, **changes):
    """The config of a run that saves only its last step, or the last good step where it ends early."""
    return config(steps, 3600.0, **changes)


def unchanged(step, batch):
    return batch


def raise_at(moment, number=signal.SIGTERM, times=1):
    """A `change` for `batches` that raises a signal when batch `moment` is made, while the step before runs."""

    def change(step, batch):
        if step == moment:
            for _ in range(times):
                signal.raise_signal(number)
        return batch

    return change


def batches(start, change=unchanged):
    """Endless batches, each a function of its step; `change(step, batch)` may modify a batch."""
    step = start
    while True:
        step += 1
        rng = np.random.default_rng(step)
        batch = {name: rng.normal(size=(8, n)).astype(np.float32) for name, n in (("x", 256), ("y", 64))}
        yield change(step, batch)


def quiet(*_):
    pass


def train(workdir, c, log=quiet, change=unchanged, accept=False, **given):
    """Run `loop.fit` on the toy -> (state, timing); `given`: fields of its `loop.Job`."""
    w = jnp.asarray(np.random.default_rng(0).normal(size=(256, 64)), jnp.float32)
    job = {
        "loss": loss,
        "trainable": {"params": {"w": w, "fixed": None}},
        "frozen": {"params": {"w": None, "fixed": jnp.ones(64)}},
        "batches": lambda start: batches(start, change),
        "manifest": {"data": "a"},
    }
    with signals.handled():
        return loop.fit(c, workdir, loop.Job(**job | given), log, accept)


def fit(workdir, c=None, log=quiet, **options):
    """The trained matrix after the last step."""
    return np.asarray(train(workdir, c or config(), log, **options)[0].tuned["params"]["w"])


if __name__ == "__main__":
    from pathlib import Path

    jax.config.update("jax_num_cpu_devices", 8)
    try:
        fit(Path(sys.argv[1]), config(int(sys.argv[2]), float(sys.argv[3])), lambda text: print(text, flush=True))
    except (ValueError, loop.NonFinite, KeyboardInterrupt) as error:
        print(signals.message(error), flush=True)
        sys.exit(signals.exit_code(error))
    print("ends", flush=True)
