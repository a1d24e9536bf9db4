"""Every method on BLIP-base: stored parameters, identity at the start, exact merging, and the cost of a step.

    python benchmarks/methods_base.py --out results/methods_base.json
    python benchmarks/methods_base.py --size tiny --out /tmp/tiny.json          a quick test, a minute

Random weights (223,679,804 parameters), captioning, 224 pixels, batch 4, 20 tokens, float32, images encoded in every step.
Step: forward, backward to the trainable leaves, AdamW; compiled once; the median of the timed steps, with the methods one
after the other. Memory: what XLA plans for the step (arguments + temporaries + outputs - reused), which does not depend on the
machine's load. Identity: the largest change of a logit at the start. Merge: with randomly moved leaves, the largest difference
of a logit between merged and unmerged, and whether 12 greedy tokens are equal.
"""

import argparse
import functools
import statistics
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from jaxpeft.runtime import files

sys.path.insert(0, str(Path(__file__).parents[1]))

import jaxpeft as jp
from jaxpeft import tasks, tree
from jaxpeft.adapt import sites
from jaxpeft.models import decode
from jaxpeft.models.blip import Blip, BlipConfig
from jaxpeft.runtime import host, malloc
from jaxpeft.training import loop, optim

TINY = {"vision_width": 64, "vision_layers": 2, "vision_heads": 4, "vision_mlp": 96, "text_width": 64, "text_layers": 2}
TINY |= {"text_heads": 4, "text_mlp": 96, "vocab_size": 200, "bos_id": 5, "enc_id": 6, "sep_id": 3, "cls_id": 2}
# method, and its number of trainable parameters at BLIP-base by the paper's formula (d 768, F 3072, 12 layers)
METHODS = {
    "full": (jp.Full(), 223_971_644 - (577 - 197) * 768),  # fewer positions than at 384 pixels
    "head": (jp.Head(), 768 * 768 + 768 + 2 * 768 + 30_524),
    "prompt 16": (jp.Prompt(), 16 * 768),
    "prefix 16": (jp.Prefix(), 36_864 * 16),
    "prefix 16, MLP 800": (jp.Prefix(mlp=800), 2 * (16 * 768 + 768 * 800 + 800 + (800 + 1) * 12 * 2 * 768)),
    "serial adapter 16 (Houlsby)": (jp.SerialAdapter(bottleneck=16), 912_960),
    "serial adapter 32 (Pfeiffer)": (jp.SerialAdapter(bottleneck=32, placement="pfeiffer"), 599_424),
    "parallel adapter 32": (jp.ParallelAdapter(bottleneck=32), 599_424),
    "compacter 64": (jp.Compacter(bottleneck=64), 64 + 36 * (2 * (768 + 64) + 768 + 64)),
    "LoRA 8": (jp.LoRA(), 589_824),
    "LoRA 8, ViT too": (jp.LoRA(targets=r"attention/(query|value)$"), 589_824 + 12 * 2 * 2 * 768 * 8),
    "rsLoRA 8": (jp.LoRA(rank_stabilized=True), 589_824),
    "DoRA 8": (jp.DoRA(), 626_688),
    "PiSSA 8": (jp.PiSSA(), 589_824),
    "VeRA 256": (jp.VeRA(), 49_152),
    "IA3": (jp.IA3(), 73_728),
    "SSF, text": (jp.SSF(), 2 * 12 * (12 * 768 + 3072)),
    "OFT 32": (jp.OFT(), 571_392),
    "VPT 10": (jp.VPT(), 10 * 768),
    "VPT 10 deep": (jp.VPT(depth="deep"), 12 * 10 * 768),
    "MAM (prefix 8, adapter 16)": (jp.MAM(length=8, bottleneck=16), 36_864 * 8 + 12 * (1536 * 16 + 16 + 768)),
    "UniPELT": (
        jp.UniPELT(),
        24 * (2 * 10 * 768 + 769) + 12 * (1536 * 48 + 48 + 768 + 769) + 589_824 + 48 * 769,
    ),
    "BitFit": (jp.BitFit(), 180_284),
    "LayerNorms": (jp.LayerNorms(targets="^text_"), 58_368),
}


def make_batch(config, n=4, length=20):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (n, config.image_size, config.image_size, 3)).astype(np.uint8)
    tokens = rng.integers(10, config.vocab_size, (n, 1, length)).astype(np.int32)
    return {
        "image": image,
        "tokens": tokens,
        "targets": np.roll(tokens, -1, -1),
        "weights": np.ones(tokens.shape, np.float32),
    }


def planned_bytes(compiled) -> int:
    m = compiled.memory_analysis()
    return m.argument_size_in_bytes + m.temp_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes


def step_of(model, method, params, batch, runs):
    """(seconds per step, compile seconds, planned bytes, counts)."""
    variables = jax.jit(lambda p: sites.attach(model, p, method, jax.random.key(0))["peft"])(params)
    variables = {"params": params, "peft": variables}
    mask = sites.trainable(variables)
    tuned, frozen = tree.split(variables, mask)
    settings = {
        "lr": 1e-4,
        "schedule": "constant",
        "warmup": 0.0,
        "weight_decay": 0.0,
        "no_decay": "",
        "clip_norm": 1.0,
    }
    tx = optim.optimizer(ml_collections.ConfigDict(settings | {"b1": 0.9, "b2": 0.999}), tuned, 100)
    state = loop.TrainState(jnp.int32(0), jax.tree.map(jnp.array, tuned), tx.init(tuned))
    step = functools.partial(
        loop.train_step, loss=functools.partial(tasks.build("captioning").loss, model), tx=tx, grad_accum=1
    )
    started = time.perf_counter()
    compiled = jax.jit(step, donate_argnums=0).lower(state, frozen, batch).compile()
    compile_s, seconds = time.perf_counter() - started, []
    for _ in range(runs + 1):
        started = time.perf_counter()
        state, _ = jax.block_until_ready(compiled(state, frozen, batch))
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:]), compile_s, planned_bytes(compiled), sites.counts(variables, mask), variables


@functools.partial(jax.jit, static_argnames="model")
def logits(model, variables, batch):
    return model.apply(variables, {"image": batch["image"], "tokens": batch["tokens"]})


@functools.partial(jax.jit, static_argnames="model")
def tokens(model, variables, batch):
    c, context = model.config, model.apply(variables, {"image": batch["image"]}, method="context")
    search = decode.Search(start=(c.bos_id,), stop=(c.sep_id,), pad=c.pad_id, n_words=c.vocab_size, length=12)
    return decode.greedy(model, variables, context, search)[0]


def exactness(model, variables, base, batch) -> dict:
    row = {"identity": float(jnp.abs(logits(model, variables, batch) - base).max()), "merge": None, "tokens": None}
    keys = iter(jax.random.split(jax.random.key(1), 500))
    peft = jax.tree.map(lambda x: x + 0.02 * jax.random.normal(next(keys), x.shape), variables["peft"])
    moved = variables | {"peft": peft}
    try:
        merged = {"params": jp.merge(model, moved)}
    except ValueError:
        return row
    if jax.tree.leaves(peft):
        row["merge"] = float(jnp.abs(logits(model, moved, batch) - logits(model, merged, batch)).max())
        row["tokens"] = bool(jnp.array_equal(tokens(model, moved, batch), tokens(model, merged, batch)))
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--size", choices=("base", "tiny"), default="base")
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    malloc.keep_freed_memory()
    config = BlipConfig(**({"image_size": 224} | (TINY if args.size == "tiny" else {})))
    model = Blip.build(config)
    params = jax.jit(lambda: model.init(jax.random.key(0), model.example()))()["params"]
    batch = make_batch(config)
    base = logits(model, {"params": params}, batch)
    rows, bad = [], []
    for name, (method, formula) in METHODS.items():
        seconds, compile_s, planned, counts, variables = step_of(model, method, params, batch, args.runs)
        full = rows[0] if rows else {"step_s": seconds, "bytes": planned}
        row = {"method": name, "trained": counts["tuned"], "formula": formula, "stored": counts["stored"]}
        row |= {"percent": 100 * counts["tuned"] / counts["total"], "compile_s": compile_s, "step_s": seconds}
        row |= {"step / full": seconds / full["step_s"], "bytes": planned, "bytes / full": planned / full["bytes"]}
        row |= exactness(model, variables, base, batch)
        if args.size == "base" and counts["tuned"] != formula:
            bad.append(f"{name}: {counts['tuned']:,} trained, formula {formula:,}")
        rows.append(row)
        if args.out:
            facts = {
                "command": "python " + " ".join(sys.argv),
                "machine": host.machine(),
                "versions": host.versions(),
            }
            files.write_json(args.out, facts | {"failed": bad, "rows": rows})
        merge = "-" if row["merge"] is None else f"{row['merge']:.1e}, tokens {'equal' if row['tokens'] else 'DIFFER'}"
        cells = [f"{name:30}", f"{row['trained']:>12,}", f"{row['stored']:>12,}", f"{row['percent']:8.3f} %"]
        cells += [
            f"identity {row['identity']:.1e}",
            f"merge {merge:22}",
            f"step {seconds:.2f} s ({row['step / full']:.2f})",
        ]
        print("  ".join([*cells, f"memory {row['bytes / full']:.2f}", f"compile {compile_s:.1f} s"]), flush=True)
    if bad:
        raise SystemExit("\n".join(bad))


if __name__ == "__main__":
    main()
