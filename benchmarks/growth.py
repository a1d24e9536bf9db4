"""How step time, memory and preparation grow with model, image size, batch, lanes and data, with an exponent for each.

    python benchmarks/growth.py --out results/growth.json [--only decoder pictures]

Each series is written when it is done, and those that are not named stay in the file:

- model: tiny (64 pixels), BLIP-base (ViT-B), BLIP-large (ViT-L, the same text layers) at 384 pixels, drawn weights, batch 2;
- decoder: SmolVLM's architecture: tiny, 256M, 500M at 512 pixels, batch 2; and the plan of PaliGemma-3B, which is not run;
- picture: BLIP-base at 96 to 768 pixels, batch 1; batch: BLIP-base at 192 pixels, 1 to 16 images;
- lanes: K learning rates of the tiny base in one program, batch 16 (see also benchmarks/lanes.py);
- pictures: rows of 1,000 to 10,000,000 images with one caption each and no pixels: a nested half of them, the lengths of their
  texts, texts to tokens, the first batch, and the first batch after resuming in the middle; in one process per number.

A step is LoRA r8 on captions of 20 tokens, with the image encoder computed in each step, float32: forward, backward and AdamW.
Milliseconds are medians after warm-up; MB are what XLA plans for activations and gradients (plans do not vary), or, of
pictures, memory of the process: what it grew by, without mapped files, and the peak since its start. An exponent e is the
slope of log y on log x: doubling x multiplies y by 2**e; 'last' is for the two largest x. Runs on accelerators too; takes
about ten minutes on two cores, most of it for the ten million.
"""

import argparse
import dataclasses
import functools
import json
import statistics
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

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


SMOL = {
    "image_size": 64, "patch_size": 8, "vision_width": 64, "vision_layers": 4, "vision_heads": 4, "vision_mlp": 256,
    "text_width": 64, "text_layers": 4, "text_heads": 4, "kv_heads": 2, "head_size": 16, "text_mlp": 128, "vocab_size": 76,
    "max_positions": 256, "image_id": 70,
}  # fmt: skip
SMOL_500M = {"text_width": 960, "text_layers": 32, "text_heads": 15, "kv_heads": 5, "text_mlp": 2560}


def model_of(config):
    from jaxpeft.models import blip, paligemma, smolvlm

    build = {blip.BlipConfig: blip, smolvlm.SmolVLMConfig: smolvlm, paligemma.PaliGemmaConfig: paligemma}
    return build[type(config)].build(config)


def texts_of(config, batch_size: int) -> dict:
    """Arrays of captions of LENGTH tokens, behind a prompt in a decoder-only model."""
    from jaxpeft.inputs.processor import Template
    from jaxpeft.tasks.base import teacher_forced

    rng, blip = np.random.default_rng(0), hasattr(config, "bos_id")
    first, end = [config.bos_id, 7, 8] if blip else [], config.sep_id if blip else 5
    words = rng.integers(9, config.vocab_size - 8, LENGTH - 1 - len(first)).tolist()
    template = Template(None, start=tuple(first), stop=(end,), pad=config.pad_id)
    batch = teacher_forced([[[*first, *words, end]]] * batch_size, [[1.0]] * batch_size, template)
    if not blip:
        batch["prompt"] = np.tile(np.arange(9, 9 + LENGTH, dtype=np.int32), (batch_size, 1))
        batch["prompt"][:, 4] = getattr(config, "image_id", 9)
    return batch


def step_of(config, batch_size: int, abstract: bool = False):
    """(step, state, frozen, batch) of LoRA on captions; `abstract`: shapes in place of the weights."""
    import jax
    import jax.numpy as jnp

    from jaxpeft import config as defaults
    from jaxpeft import methods, tasks, tree
    from jaxpeft.adapt import sites
    from jaxpeft.training import loop, optim

    model, rng = model_of(config), np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), model.example()))["params"]

    def made(params):
        variables = sites.attach(model, params, methods.build("lora"), jax.random.key(0))
        tuned, frozen = tree.split(variables, sites.trainable(variables))
        tx = optim.optimizer(defaults.get_config().optim, tuned, 1000)
        return tx, loop.start(tuned, tx=tx, seed=0, best=False), frozen

    def drawn(shape):
        return jnp.asarray(rng.standard_normal(shape.shape, np.float32) * 0.02)

    found = []
    if abstract:
        state, frozen = jax.eval_shape(lambda params: found.append(made(params)) or found[0][1:], shapes)
        tx = found[0][0]
    else:
        tx, state, frozen = made(jax.tree.map(drawn, shapes))
    batch, size = texts_of(config, batch_size), config.image_size
    batch["image"] = rng.integers(0, 256, (batch_size, size, size, 3)).astype(np.uint8)
    loss = functools.partial(tasks.build("captioning").loss, model)
    return functools.partial(loop.train_step, loss=loss, tx=tx, grad_accum=1), state, frozen, batch


def measured(config, batch_size: int, runs: int, lanes: int = 1) -> dict:
    """The parameters, planned MB and milliseconds of a step; 0 lanes: only the plan."""
    import jax
    import jax.numpy as jnp

    from jaxpeft import tree

    step, state, frozen, batch = step_of(config, batch_size, abstract=not lanes)
    if lanes > 1:
        state = jax.tree.map(lambda x: jnp.stack([x] * lanes), state)
        step = jax.vmap(step, in_axes=(0, None, None))
    began = time.perf_counter()
    compiled = jax.jit(step).lower(state, frozen, batch).compile()
    compile_s, plan = time.perf_counter() - began, compiled.memory_analysis()
    seconds, row = [], {"parameters": tree.count(frozen), "ms": "-", "least": "-", "most": "-"}
    if lanes:
        for _ in range(runs + 1):
            began = time.perf_counter()
            state, _ = jax.block_until_ready(compiled(state, frozen, batch))
            seconds.append(time.perf_counter() - began)
        ms = [1000 * s for s in seconds[1:]]
        row |= {"ms": statistics.median(ms), "least": min(ms), "most": max(ms)}
    return row | {"planned MB": plan.temp_size_in_bytes / 1e6, "compile s": compile_s}


class Nothing:
    """A sequence of identical images."""

    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return np.zeros((8, 8, 3), np.uint8)


def anonymous() -> float:
    """MB of this process that are not mapped files, which the system drops when it needs the memory."""
    with open("/proc/self/status") as file:
        return sum(int(line.split()[1]) for line in file if line.startswith(("RssAnon", "RssShmem"))) / 1e3


class Peak(threading.Thread):
    """The most anonymous memory, looked at twenty times a second."""

    def __init__(self):
        super().__init__(daemon=True)
        self.most, self.stop = 0.0, threading.Event()

    def run(self):
        while not self.stop.wait(0.05):
            self.most = max(self.most, anonymous())


def rows_with(words, n):
    """Rows with a caption of ten words."""
    rng = np.random.default_rng(0)
    for start in range(0, n, 10_000):
        for i, row in enumerate(rng.integers(0, len(words), (min(10_000, n - start), 10)).tolist(), start):
            yield {"image_id": str(i), "captions": [" ".join(words[k] for k in row)], "questions": []}


def indices(n: int, same: bool = False) -> dict:
    """The cost of n images before the first step, without their pixels. `same`: the same 14 tokens for every caption, which
    takes the same memory, and no lengths: ten million captions in a fraction of the time."""
    from jaxpeft import tasks
    from jaxpeft.data import mapped, pipeline
    from jaxpeft.data.base import Split
    from jaxpeft.models import loading

    task, model = tasks.build("captioning"), loading.abstract("tiny", task="captioning")
    template, peak, found = task.template(model), Peak(), {"start MB": anonymous()}
    if same:
        ids = [*template.start, *range(9, 22 - len(template.start)), *template.stop]
        template = types.SimpleNamespace(**vars(template), target=lambda *_: (ids, True), prompt=lambda _: ((), True))
    peak.start()

    def timed(name, make):
        began, before = time.perf_counter(), anonymous()
        made = make()
        found[f"{name} s"], found[f"{name} MB"] = time.perf_counter() - began, anonymous() - before
        return made

    rows = timed("rows", lambda: mapped.rows_of(rows_with(model.tokenizer.vocabulary[7:], n)))
    split = Split("train", Nothing(n), rows)
    half, _ = timed("half", lambda: pipeline.subset(split, seed=0, fraction=0.5))
    if not same:
        timed("lengths", lambda: task.lengths(split, template))
    examples = timed("texts", lambda: task.examples(split, template))
    for name, start in (("first batch", 0), ("resumed batch", 10 * n)):
        timed(name, lambda start=start: next(pipeline.batches(examples, 32, seed=0, start=start, threads=2)))
    assert len(half.rows) == n // 2
    peak.stop.set()
    peak.join()
    return found | {"peak MB": peak.most}


def exponent(xs, ys) -> dict:
    """Slope of log y on log x over all points, and between the two largest."""
    x, y = np.log(np.asarray(xs, float)), np.log(np.maximum(np.asarray(ys, float), 1e-12))
    return {"all": float(np.polyfit(x, y, 1)[0]), "last": float((y[-1] - y[-2]) / (x[-1] - x[-2]))}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="+", default=["model", "decoder", "picture", "batch", "lanes", "pictures"])
    parser.add_argument("--most", type=int, default=10_000_000, help="images of the last point of 'pictures'")
    parser.add_argument("--size", choices=["base", "tiny"], default="base", help="tiny: to try it")
    parser.add_argument("--indices", type=int, help="print only the point of `pictures` with this number of images")
    parser.add_argument("--same", action="store_true", help="with --indices: the same tokens for every caption")
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    reference.use_threads(args.threads)
    if args.indices:
        return print(json.dumps(indices(args.indices, args.same)))
    from jaxpeft.models.blip import BlipConfig
    from jaxpeft.models.paligemma import PaliGemmaConfig
    from jaxpeft.models.smolvlm import SmolVLMConfig
    from jaxpeft.runtime import host, malloc

    malloc.keep_freed_memory()
    host.keep_compiled_programs()
    tiny = BlipConfig(**TINY)
    base = BlipConfig() if args.size == "base" else tiny
    smol = [("tiny", SmolVLMConfig(**SMOL))]
    if args.size == "base":
        smol += [("256M", SmolVLMConfig()), ("500M", SmolVLMConfig(**SMOL_500M))]
    sides = [6 * base.patch_size * k for k in (1, 2, 4, 8)]
    series = {
        "model": [("parameters", name, c, 2, 1) for name, c in (
            ("tiny", tiny), ("base", base), ("large", dataclasses.replace(base, **LARGE)))],
        "decoder": [("parameters", name, c, 2, 1) for name, c in smol],
        "picture": [("pixels a side", n, dataclasses.replace(base, image_size=n), 1, 1) for n in sides],
        "batch": [("pictures", n, dataclasses.replace(base, image_size=sides[1]), n, 1) for n in (1, 2, 4, 8, 16)],
        "lanes": [("lanes", k, tiny, 16, k) for k in (1, 2, 4, 8)],
    }  # fmt: skip
    for name, points in series.items():
        if name not in args.only:
            continue
        rows = []
        for axis, x, config, batch_size, k in points:
            row = measured(config, batch_size, args.runs, k)
            rows.append({"": f"{name} {x}", axis: row["parameters"] if axis == "parameters" else x} | row)
            print(rows[-1], flush=True)
        save(args, name, rows, [points[0][0], "ms", "planned MB"])
    if args.size == "base" and "decoder" in args.only:
        save(args, "PaliGemma-3B, planned", [measured(PaliGemmaConfig(), 2, 0, 0)], [])
    if "pictures" in args.only:
        rows = []
        for n in (10**k for k in range(3, 1 + round(np.log10(args.most)))):
            command = [sys.executable, __file__, "--indices", str(n), "--out", "-", "--threads", str(args.threads)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            rows.append({"": f"pictures {n:,}", "pictures": n} | json.loads(done.stdout))
            print(rows[-1], flush=True)
        save(args, "pictures", rows, ["pictures", *(key for key in rows[0] if key not in ("", "pictures"))])


def save(args, name: str, rows: list[dict], axes: list[str]) -> None:
    """Print a series, with an exponent on the first of `axes` for each other, and write it with its facts beside the series
    that the file has."""
    out = Path(args.out)
    known = json.loads(out.read_text()) if out.exists() else {}
    x, *ys = axes or [""]
    ys = ys if len(rows) > 1 else []
    exponents = {y: exponent([row[x] for row in rows], [row[y] for row in rows]) for y in ys}
    rounded = {y: {k: round(v, 2) for k, v in e.items()} for y, e in exponents.items()}
    print(table(rows), "\nexponents:", rounded, flush=True)
    write_json(out, known | {name: {**facts(), "settings": vars(args), "rows": rows, "exponents": exponents}})


if __name__ == "__main__":
    main()
