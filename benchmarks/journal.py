"""What it costs to keep the state after every step, and to store a checkpoint, by the size of the state.

    python benchmarks/journal.py --out results/journal.json

Per state (tuned leaves, Adam's two moments): milliseconds of one write of the journal (packed on the device, fetched, digested,
written; while the next step runs, in training); and of one checkpoint from
`save` to its end on the disk. Medians with quartiles, in turn. Then whole runs of the tiny base, 600 steps of LoRA, with
the journal and without, turns taken: milliseconds per step. About three minutes on two cores.
"""

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import reference

from jaxpeft import config as defaults
from jaxpeft.runtime import files

sys.path.insert(0, str(reference.ROOT))

import growth

import jaxpeft as jp
from jaxpeft import tree
from jaxpeft.adapt import budget, sites
from jaxpeft.models.blip import Blip, BlipConfig
from jaxpeft.training import loop, optim, results, sharding
from jaxpeft.training.checkpoint import Checkpoints
from jaxpeft.training.journal import Journal, n_bytes

STATES = {
    "tiny, LoRA 8": (BlipConfig(**growth.TINY), jp.LoRA()),
    "BLIP-base, prompt 16": (BlipConfig(), jp.Prompt()),
    "BLIP-base, LoRA 8": (BlipConfig(), jp.LoRA()),
    "BLIP-base, LoRA 8, ViT too": (BlipConfig(), jp.LoRA(targets=r"attention/(query|value)$")),
    "BLIP-base, parallel adapter 96": (BlipConfig(), jp.ParallelAdapter(bottleneck=96)),
}
RUN = [
    "main.py", "--config=configs/point.py:task=captioning,method=lora,size=8", "--config.steps=600", "--config.batch_size=16",
    "--config.data.n_train=256", "--config.data.n_val=0", "--config.data.n_test=16", "--config.eval.batch_size=16",
]  # fmt: skip


def state_of(config, method):
    """The state of training such a model, of ones."""
    variables = budget.abstract_variables(Blip(config), (method,))
    tuned, _ = tree.split(variables, sites.trainable(variables))
    tuned = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), tuned)
    return loop.start(tuned, tx=optim.optimizer(defaults.get_config().optim, tuned, 100), seed=0, best=False)


def milliseconds(function, n):
    """[quartile, median, quartile] of n calls after two."""
    times = []
    for i in range(n + 2):
        began = time.perf_counter()
        function(i + 1)
        times.append(1e3 * (time.perf_counter() - began))
    return np.percentile(times[2:], [25, 50, 75]).tolist()


def one_state(state, home: Path, n: int) -> dict:
    """Both costs of a state."""
    journal, checkpoints = Journal(home / "journal", state, {}), Checkpoints(home / "checkpoints")

    def stored(step):
        checkpoints.save(step, state, {})
        checkpoints.wait()

    row = {
        "leaves": len(jax.tree.leaves(state)),
        "mb": n_bytes(state) / 1e6,
        "journal_ms": milliseconds(lambda step: journal.write(step, sharding.packed(jax.tree.leaves(state))), n),
        "checkpoint_ms": milliseconds(stored, max(3, n // 3)),
    }
    checkpoints.close()
    return row


def run(journal_mb: int) -> float:
    """Milliseconds per step of a whole run: all of its time in training, by its steps."""
    with tempfile.TemporaryDirectory() as home:
        command = [sys.executable, *RUN, f"--workdir={home}/run", f"--config.journal_mb={journal_mb}"]
        subprocess.run(command, cwd=reference.ROOT, check=True, capture_output=True)
        timing = json.loads(Path(home, "run", "result.json").read_text())["timing"]
    return 1e3 * timing["train_s"] / timing["steps"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=20)
    parser.add_argument("--runs", type=int, default=4, help="pairs of whole runs")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    rows = {}
    for name, (config, method) in STATES.items():
        with tempfile.TemporaryDirectory() as home:
            rows[name] = one_state(state_of(config, method), Path(home), args.calls)
        row = rows[name]
        print(f"{name:32s} {row['mb']:7.2f} MB  journal {row['journal_ms'][1]:6.1f} ms  checkpoint "
              f"{row['checkpoint_ms'][1]:6.1f} ms", flush=True)  # fmt: skip
    pairs = [[run(0), run(256)] for _ in range(args.runs)]
    for without, with_it in pairs:
        print(f"a step of the tiny base: {without:.2f} ms without, {with_it:.2f} ms with the journal", flush=True)
    found = {"command": shlex.join(["python", "benchmarks/journal.py", *sys.argv[1:]])}
    found |= {"machine": results.machine(), "versions": results.versions()}
    files.write_json(args.out, found | {"states": rows, "ms per step [without, with]": pairs})


if __name__ == "__main__":
    main()
