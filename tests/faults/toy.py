"""Training that compiles in a moment: a real loop, real checkpoints and real signals around a matrix with dropout.

As a program, `python toy.py WORKDIR STEPS EVERY [SLEEP]` trains and says 'saved N' after each step that is on disk.
"""

import functools
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft import config as defaults
from jaxpeft.runtime import signals
from jaxpeft.training import loop


class Task:
    """Least squares with dropout, in the form that `train_step` asks of a task."""

    def loss(self, model, variables, batch, rngs):
        params = variables["params"]
        keep = jax.random.bernoulli(rngs["dropout"], 0.8, batch["x"].shape)
        wrong = jnp.where(keep, batch["x"], 0) @ params["w"] + params["fixed"][None] - batch["y"]
        return jnp.sum(wrong**2), jnp.float32(batch["x"].shape[0])


def config(steps=12, every=4, **changes):
    c = defaults.get_config()
    c.steps, c.batch_size, c.log_every, c.checkpoint_every, c.check_frozen = steps, 8, 1, every, True
    c.optim.lr, c.optim.schedule, c.optim.warmup = 1e-2, "constant", 0.0
    c.update_from_flattened_dict(changes)
    return c


def batches(start, change=lambda step, batch: batch):
    """Endless batches, each a function of its step; `change(step, batch)` may damage one."""
    step = start
    while True:
        step += 1
        rng = np.random.default_rng(step)
        batch = {name: rng.normal(size=(8, n)).astype(np.float32) for name, n in (("x", 256), ("y", 64))}
        yield change(step, batch)


def fit(workdir, c=None, log=lambda *_: None, change=lambda step, batch: batch, manifest=None, step_fn=None, **options):
    """`train.fit` on the toy -> the tuned matrix after the last step."""
    rng = np.random.default_rng(0)
    tuned = {"params": {"w": jnp.asarray(rng.normal(size=(256, 64)), jnp.float32), "fixed": None}}
    frozen = {"params": {"w": None, "fixed": jnp.ones(64)}}
    step_fn = step_fn or functools.partial(loop.train_step, model=None, task=Task(), grad_accum=1)
    with signals.handled():
        state, _ = loop.fit(
            c or config(), workdir, step_fn, tuned, frozen, None, lambda start: batches(start, change),
            manifest or {"data": "a"}, log, **options,
        )  # fmt: skip
    return np.asarray(state.tuned["params"]["w"])


if __name__ == "__main__":
    from pathlib import Path

    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update(
        "jax_disable_most_optimizations", True
    )  # as in the tests' own process: other programs round otherwise
    workdir, steps, every, sleep = Path(sys.argv[1]), *map(int, sys.argv[2:4]), float((*sys.argv, "0")[4])

    def pause(step, batch):
        time.sleep(sleep)
        return batch

    try:
        fit(workdir, config(steps, every), lambda text: print(text, flush=True), pause)
    except (ValueError, loop.NonFinite, KeyboardInterrupt) as error:
        print(signals.message(error), flush=True)
        sys.exit(signals.exit_code(error))
    print("ends", flush=True)
