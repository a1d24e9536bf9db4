"""The training step of BLIP-base as XLA compiles it for an H100 that is not here: kernels, memory, predicted time.

    pip install 'jaxpeft[preflight-cuda]'
    python benchmarks/h100_program.py --out results/h100_program.json [--rows lora full] [--hlo DIRECTORY]

Captions of 20 tokens, 384 pixels, bfloat16, frozen matrices in bfloat16, no dropout, the image encoder in each step; LoRA r8 on
the text at batch 64, full tuning at batch 32. Each is compiled as the defaults for a GPU say, and with what they replace. The
time is that of the model in jaxpeft/training/gpu.py, and the share of the peak counts the FLOPs of the step on paper
(`preflight.flops_of`). Rows that are not named stay in the file. A row takes one to four minutes on two idle cores. Stored with
each are its kernels by kind and by part of the model; 'at least 3 us' counts those whose time is that of the launch.
"""

import argparse
import functools
import json
import re
from pathlib import Path

import reference
from reference import facts, table, write_json

PLAIN = {"attention": "plain", "unroll": 1, "remat": "none"}  # as before the defaults by platform
FUSED = {"attention": "cudnn", "remat": "none"}
ROWS = {  # name: (method, batch size, fields of the model)
    "lora, written out, in loops": ("lora", 64, PLAIN),
    "lora, fused, in loops": ("lora", 64, FUSED | {"unroll": 1}),
    "lora": ("lora", 64, FUSED),
    "lora, batch 128": ("lora", 128, FUSED),
    "full, written out, in loops": ("full", 32, PLAIN),
    "full, fused, no remat": ("full", 32, FUSED),
    "full": ("full", 32, FUSED | {"remat": "dots"}),
}
LENGTH = 20
# (kind of a kernel, what its target or name contains): the first that fits
KINDS = (
    ("fused attention", "fmha"), ("products", "matmul|gemm"), ("slices of stacked weights", "slice"),
    ("transposed, padded, joined, copied", "transpose|pad|concatenate|copy"), ("sums", "reduce"), ("elementwise", ""),
)  # fmt: skip
PARTS = (("image", "/vision/"), ("text", "/text_decoder/"), ("optimizer, loss, unnamed", ""))  # in a kernel's scope


def shapes_of(model, method: str, batch_size: int):
    """(step, its arguments in shapes) of a method on captions."""
    import jax
    import jax.numpy as jnp

    from jaxpeft import config as defaults
    from jaxpeft import methods, tasks, tree
    from jaxpeft.adapt import budget, sites
    from jaxpeft.training import loop, optim

    variables = budget.abstract_variables(model, methods.build(method))
    mask = sites.trainable(variables)
    variables = jax.eval_shape(functools.partial(sites.narrowed, model, dtype="bfloat16", mask=mask), variables)
    tuned, frozen = tree.split(variables, mask)
    tx = optim.optimizer(defaults.get_config().optim, tuned, 1000)
    state = jax.eval_shape(functools.partial(loop.start, tx=tx, seed=0, best=False), tuned)
    size = model.config.image_size
    batch = {name: jax.ShapeDtypeStruct((batch_size, 1, LENGTH), jnp.int32) for name in ("tokens", "targets")}
    batch["weights"] = jax.ShapeDtypeStruct((batch_size, 1, LENGTH), jnp.float32)
    batch["image"] = jax.ShapeDtypeStruct((batch_size, size, size, 3), jnp.uint8)

    def step(state, frozen, batch, model=model):
        loss = functools.partial(tasks.build("captioning").loss, model)
        return loop.train_step(state, frozen, batch, loss=loss, tx=tx, grad_accum=1)

    return step, (state, frozen, batch)


def parts(kernels, chip) -> list[dict]:
    """Kernels by kind and part of the model: predicted ms, how many, and those that take as long as a launch."""
    from jaxpeft.training import gpu

    found = {(part, kind): {"ms": 0.0, "kernels": 0, "at least 3 us": 0} for part, _ in PARTS for kind, _ in KINDS}
    for one in kernels:
        part = next(part for part, where in PARTS if where in one.scope)
        kind = next(kind for kind, pattern in KINDS if re.search(pattern, one.target or f"{one.op} {one.name}"))
        seconds = one.seconds(chip.flops, chip.bandwidth)
        found[part, kind]["ms"] += 1e3 * one.times * seconds
        found[part, kind]["kernels"] += one.times
        found[part, kind]["at least 3 us"] += one.times * (seconds == gpu.LAUNCH)
    return [{"": f"{part}: {kind}"} | row for (part, kind), row in found.items() if row["kernels"]]


def row(name: str, devices: list, hlo: str | None) -> dict:
    """What was compiled for one of `ROWS`, with its kernels in 'parts'."""
    from jaxpeft.models.blip import Blip, BlipConfig
    from jaxpeft.training import gpu, preflight, sharding

    method, batch_size, fields = ROWS[name]
    here = Blip.build(BlipConfig(dtype="bfloat16"))
    step, shapes = shapes_of(here, method, batch_size)
    flops = preflight.flops_of(step, shapes, here)
    there = here.replaced(**here.replaced(**fields).config.on("gpu"), remat=fields["remat"])
    mesh = sharding.mesh(None, devices)
    plan = preflight.compiled(functools.partial(step, model=there), shapes, here.sharding, mesh, keep_program=True)
    if hlo:
        Path(hlo).mkdir(parents=True, exist_ok=True)
        (Path(hlo) / f"{name.replace(', ', '_').replace(' ', '_')}.hlo").write_text(plan.program)
    chip = preflight.CHIPS["h100"]
    seconds = gpu.seconds(plan.kernels, chip.flops, chip.bandwidth)
    vocabulary = here.config.vocab_size
    return {
        "": name,
        "batch": batch_size,
        "kernels": sum(one.times for one in plan.kernels),
        "fused attention": sum(one.times for one in plan.kernels if "fmha" in one.target),
        "scores in float32": len(re.findall(r"= \(?f32\[(?:\d+,)*5(?:77|84),5(?:77|84)\]", plan.program)),
        "scatters over words": len(re.findall(rf"= f32\[(?:\d+,)*{vocabulary}\]\S* scatter\(", plan.program)),
        "temporary GB": plan.temporary / 1e9,
        "predicted ms": 1e3 * seconds,
        "share of peak %": 100 * flops / seconds / chip.flops,
        "TFLOP": flops / 1e12,
        "compiled in s": plan.seconds,
        "parts": parts(plan.kernels, chip),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--hlo", help="directory for the programs' text")
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    reference.use_threads(2)
    from jaxpeft.runtime import host
    from jaxpeft.training import gpu

    host.plan_for(0, "h100")
    devices = gpu.devices("h100")
    out = Path(args.out)
    found = {one[""]: one for one in json.loads(out.read_text())["rows"]} if out.exists() else {}
    for name in args.rows:
        found[name] = row(name, devices, args.hlo)
        rows = [found[one] for one in ROWS if one in found]
        about = facts() | {
            "command": "python benchmarks/h100_program.py --out results/h100_program.json"
        }  # any row alone
        write_json(out, {"rows": rows, "model": {"launch s": gpu.LAUNCH, "of bandwidth": gpu.BANDWIDTH, "of peak": gpu.PRODUCTS,
                                                 "of peak in attention": gpu.ATTENTION}, "facts": about})  # fmt: skip
        print(table([{key: value for key, value in one.items() if key != "parts"} for one in rows]))
        print(f"\n{name}\n{table(found[name]['parts'])}\n", flush=True)


if __name__ == "__main__":
    main()
