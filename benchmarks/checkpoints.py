"""The cost of a checkpoint for different sizes of the state.

    python benchmarks/checkpoints.py --out results/checkpoints.json

For each state (trainable parameters and Adam's two moments): milliseconds for which `save` blocks the training loop (leaves are
copied and digested), and until the checkpoint is on disk. Medians with quartiles, and the resulting seconds between saves:
`checkpoint_seconds`, or more if saves block for long.
"""

import argparse
import json
import shlex
import sys
import tempfile
import time
from pathlib import Path

import growth
import jax
import jax.numpy as jnp
import numpy as np

import jaxpeft as jp
from jaxpeft import config as defaults
from jaxpeft import tree
from jaxpeft.adapt import budget, sites
from jaxpeft.models.blip import Blip, BlipConfig
from jaxpeft.runtime import files, host
from jaxpeft.training import loop, optim
from jaxpeft.training.checkpoint import Checkpoints

STATES = {
    "tiny, LoRA 8": (BlipConfig(**growth.TINY), jp.LoRA()),
    "BLIP-base, LoRA 8": (BlipConfig(), jp.LoRA()),
    "BLIP-base, parallel adapter 96": (BlipConfig(), jp.ParallelAdapter(bottleneck=96)),
    "BLIP-base, full": (BlipConfig(), jp.Full()),
}


def state_of(model_config, method):
    """A training state of this size, filled with ones."""
    variables = budget.abstract_variables(Blip(model_config), (method,))
    trainable, _ = tree.split(variables, sites.trainable(variables))
    trainable = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), trainable)
    return loop.start(trainable, tx=optim.optimizer(defaults.get_config().optim, trainable, 100), seed=0, best=False)


def measured(state, calls: int) -> dict:
    times = []
    with tempfile.TemporaryDirectory() as home:
        checkpoints = Checkpoints(home, keep=1)
        for step in range(calls + 1):
            began = time.perf_counter()
            checkpoints.save(step, state, {})
            blocked = time.perf_counter() - began
            checkpoints.wait()
            times.append((blocked, time.perf_counter() - began))
        checkpoints.close()
    blocks_ms, on_disk_ms = (1e3 * np.percentile(column, [25, 50, 75]) for column in zip(*times[1:], strict=True))
    pause = max(defaults.get_config().checkpoint_seconds, loop.PAUSE * blocks_ms[1] / 1e3)
    row = {"leaves": len(jax.tree.leaves(state)), "MB": sum(x.nbytes for x in jax.tree.leaves(state)) / 1e6}
    return row | {"blocks_ms": blocks_ms.tolist(), "on_disk_ms": on_disk_ms.tolist(), "s_between": pause}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=10)
    parser.add_argument("--only", nargs="+", default=list(STATES))
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    rows = {}
    for name in args.only:
        rows[name] = measured(state_of(*STATES[name]), args.calls)
        print(name, json.dumps(rows[name]), flush=True)
    command = shlex.join(["python", "benchmarks/checkpoints.py", *sys.argv[1:]])
    files.write_json(args.out, {"command": command, "machine": host.machine(), "states": rows})


if __name__ == "__main__":
    main()
