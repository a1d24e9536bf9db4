"""How step time, memory and preparation grow with model, image size, batch, lanes and data, with an exponent for each.

    python benchmarks/growth.py --out results/growth.json

- model: tiny (64 pixels), BLIP-base (ViT-B), BLIP-large (ViT-L, the same text layers) at 384 pixels, drawn weights, batch 2;
- picture: BLIP-base at 96 to 768 pixels, batch 1; batch: BLIP-base at 192 pixels, 1 to 16 images;
- lanes: K learning rates of the tiny base in one program, batch 16 (see also benchmarks/lanes.py);
- pictures: indices of 1,000 to 1,000,000 images with one caption each and no pixels: a nested half of them, texts to tokens,
  the first batch, and the first batch after resuming in the middle; in one process per number.

A step is LoRA r8 on captions of 20 tokens, with the image encoder computed in each step, float32: forward, backward and AdamW.
Milliseconds are medians after warm-up; MB are what XLA plans for activations and gradients (plans do not vary), or the growth
of the process. An exponent e is the slope of log y on log x: doubling x multiplies y by 2**e; 'last' is for the two largest x.
Runs on accelerators too; takes about four minutes on two cores.
"""

import argparse
import dataclasses
import functools
import json
import statistics
import subprocess
import sys
import time

import numpy as np
import reference
from reference import facts, table, write_json

sys.path.insert(0, str(reference.ROOT))  # for configs
LENGTH = 20
LARGE = {"vision_width": 1024, "vision_layers": 24, "vision_heads": 16, "vision_mlp": 4096}
TINY = {
    "image_size": 64, "patch_size": 8, "vision_width": 128, "vision_layers": 4, "vision_heads": 4, "vision_mlp": 512,
    "text_width": 128, "text_layers": 3, "text_heads": 4, "text_mlp": 512, "vocab_size": 76, "max_positions": 48,
    "cls_id": 2, "sep_id": 3, "bos_id": 5, "enc_id": 6,
}  # fmt: skip


def step_of(config, batch_size: int):
    """(jitted step, state, frozen, batch) of LoRA on captions."""
    import jax
    import jax.numpy as jnp

    from jaxpeft import config as defaults
    from jaxpeft import methods, tasks, tree
    from jaxpeft.adapt import sites
    from jaxpeft.inputs.processor import Template
    from jaxpeft.models.blip import build
    from jaxpeft.tasks.base import teacher_forced
    from jaxpeft.training import loop, optim

    model, rng = build(config), np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), model.example()))["params"]
    params = jax.tree.map(lambda s: jnp.asarray(rng.standard_normal(s.shape, np.float32) * 0.02), shapes)
    variables = sites.attach(model, params, methods.build("lora"), jax.random.key(0))
    tuned, frozen = tree.split(variables, sites.trainable(variables))
    tx = optim.optimizer(defaults.get_config().optim, tuned, 1000)
    first = [config.bos_id, 7, 8]
    ids = [[[*first, *rng.integers(9, config.vocab_size - 2, LENGTH - 4).tolist(), config.sep_id]]] * batch_size
    template = Template(None, start=tuple(first), stop=(config.sep_id,), pad=config.pad_id)
    batch = teacher_forced(ids, [[1.0]] * batch_size, template)
    size = config.image_size
    batch["image"] = rng.integers(0, 256, (batch_size, size, size, 3)).astype(np.uint8)
    step = functools.partial(
        loop.train_step, loss=functools.partial(tasks.build("captioning").loss, model), tx=tx, grad_accum=1
    )
    return step, loop.start(tuned, tx=tx, seed=0, best=False), frozen, batch


def measured(config, batch_size: int, runs: int, lanes: int = 1) -> dict:
    """The parameters, planned MB and milliseconds of a step."""
    import jax
    import jax.numpy as jnp

    from jaxpeft import tree

    step, state, frozen, batch = step_of(config, batch_size)
    if lanes > 1:
        state = jax.tree.map(lambda x: jnp.stack([x] * lanes), state)
        step = jax.vmap(step, in_axes=(0, None, None))
    began = time.perf_counter()
    compiled = jax.jit(step).lower(state, frozen, batch).compile()
    compile_s, plan = time.perf_counter() - began, compiled.memory_analysis()
    seconds = []
    for _ in range(runs + 1):
        began = time.perf_counter()
        state, _ = jax.block_until_ready(compiled(state, frozen, batch))
        seconds.append(time.perf_counter() - began)
    ms = [1000 * s for s in seconds[1:]]
    row = {"parameters": tree.count(frozen), "ms": statistics.median(ms), "least": min(ms), "most": max(ms)}
    return row | {"planned MB": plan.temp_size_in_bytes / 1e6, "compile s": compile_s}


class Nothing:
    """A sequence of identical images."""

    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return np.zeros((8, 8, 3), np.uint8)


def indices(n: int) -> dict:
    """The cost of n images before the first step, without their pixels."""
    from jaxpeft import tasks
    from jaxpeft.data import pipeline
    from jaxpeft.data.base import Split
    from jaxpeft.models import loading

    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096 / 1e6

    task, model = tasks.build("captioning"), loading.abstract("tiny", task="captioning")
    words, rng, before = model.tokenizer.vocabulary[7:], np.random.default_rng(0), resident()
    texts = [" ".join(words[i] for i in row) for row in rng.integers(0, len(words), (n, 10))]
    rows = [{"image_id": str(i), "captions": [text], "questions": []} for i, text in enumerate(texts)]
    split, found = Split("train", Nothing(n), rows), {"rows MB": resident() - before}
    began = time.perf_counter()
    half, _ = pipeline.subset(split, seed=0, fraction=0.5)
    found["half s"] = time.perf_counter() - began
    began, before = time.perf_counter(), resident()
    examples = task.examples(split, task.template(model))
    found |= {"texts s": time.perf_counter() - began, "texts MB": resident() - before}
    for name, start in (("first batch s", 0), ("resumed batch s", 10 * n)):
        began = time.perf_counter()
        next(pipeline.batches(examples, 32, seed=0, start=start, threads=2))
        found[name] = time.perf_counter() - began
    assert len(half.rows) == n // 2
    return found


def exponent(xs, ys) -> dict:
    """Slope of log y on log x over all points, and between the two largest."""
    x, y = np.log(np.asarray(xs, float)), np.log(np.maximum(np.asarray(ys, float), 1e-12))
    return {"all": float(np.polyfit(x, y, 1)[0]), "last": float((y[-1] - y[-2]) / (x[-1] - x[-2]))}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="+", default=["model", "picture", "batch", "lanes", "pictures"])
    parser.add_argument("--size", choices=["base", "tiny"], default="base", help="tiny: to try it")
    parser.add_argument("--indices", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    reference.use_threads(args.threads)
    if args.indices:
        return print(json.dumps(indices(args.indices)))
    from jaxpeft.models.blip import BlipConfig
    from jaxpeft.runtime import host, malloc

    malloc.keep_freed_memory()
    host.keep_compiled_programs()
    tiny = BlipConfig(**TINY)
    base = BlipConfig() if args.size == "base" else tiny
    sides = [6 * base.patch_size * k for k in (1, 2, 4, 8)]
    series = {
        "model": [("parameters", name, c, 2, 1) for name, c in (
            ("tiny", tiny), ("base", base), ("large", dataclasses.replace(base, **LARGE)))],
        "picture": [("pixels a side", n, dataclasses.replace(base, image_size=n), 1, 1) for n in sides],
        "batch": [("pictures", n, dataclasses.replace(base, image_size=sides[1]), n, 1) for n in (1, 2, 4, 8, 16)],
        "lanes": [("lanes", k, tiny, 16, k) for k in (1, 2, 4, 8)],
    }  # fmt: skip
    found = {}
    for name, points in series.items():
        if name not in args.only:
            continue
        rows = []
        for axis, x, config, batch_size, k in points:
            row = measured(config, batch_size, args.runs, k)
            rows.append({"": f"{name} {x}", axis: row["parameters"] if name == "model" else x} | row)
            print(rows[-1], flush=True)
        found[name] = rows, [points[0][0], "ms", "planned MB"]
    if "pictures" in args.only:
        rows = []
        for n in (1_000, 10_000, 100_000, 1_000_000):
            command = [sys.executable, __file__, "--indices", str(n), "--out", "-", "--threads", str(args.threads)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            rows.append({"": f"pictures {n:,}", "pictures": n} | json.loads(done.stdout))
            print(rows[-1], flush=True)
        found["pictures"] = rows, ["pictures", *(key for key in rows[0] if key not in ("", "pictures"))]
    exponents = {
        name: {y: exponent([row[x] for row in rows], [row[y] for row in rows]) for y in ys}
        for name, (rows, (x, *ys)) in found.items()
    }
    for name, (rows, _) in found.items():
        print(
            table(rows), "\nexponents:", {y: {k: round(v, 2) for k, v in e.items()} for y, e in exponents[name].items()}
        )
    tables = {name: rows for name, (rows, _) in found.items()}
    write_json(args.out, {**facts(), "settings": vars(args), "rows": tables, "exponents": exponents})


if __name__ == "__main__":
    main()
