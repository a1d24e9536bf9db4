"""The sections of gpu.py on our side. Run by gpu.py, each in a process of its own."""

import dataclasses
import functools
import json
import os
import re
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
from gpu import LENGTH, PROMPT, RANK, failed, median_ms, options, say, useful_flops

TARGETS = {"lora": "text.attention.qv", "vit_lora": r"attention/(query|value)$"}


def ceilings(args):
    """The rates of a large matrix product and of a copy, which nothing here can exceed."""
    n = 256 if args.tiny else 8192
    a, b = (jax.random.normal(jax.random.key(i), (n, n), jnp.bfloat16) for i in (0, 1))
    product, ones = jax.jit(jnp.matmul), jnp.ones((1 << (20 if args.tiny else 30),), jnp.bfloat16)
    added = jax.jit(lambda x: x + jnp.bfloat16(1))
    product_ms = median_ms(lambda: product(a, b), 20, jax.block_until_ready)["ms"]
    copy_ms = median_ms(lambda: added(ones), 20, jax.block_until_ready)["ms"]
    device = jax.devices()[0]
    return {
        "device": device.device_kind, "platform": device.platform, "jax": jax.__version__,
        "bf16_tflops": 2 * n**3 / product_ms / 1e9, "copy_tbs": 2 * ones.nbytes / copy_ms / 1e9,
    }  # fmt: skip


def model_of(args):
    """The model with drawn weights that a section works on."""
    from jaxpeft.models import blip, paligemma, smolvlm

    module, kind = {
        "blip": (blip, blip.BlipConfig), "smolvlm": (smolvlm, smolvlm.SmolVLMConfig),
        "paligemma": (paligemma, paligemma.PaliGemmaConfig),
    }[args.model]  # fmt: skip
    changes = dict(one.split("=", 1) for one in args.set)
    changes = {key: int(value) if value.isdigit() else value for key, value in changes.items()}
    model = module.build(kind(**args.size | {"dtype": "bfloat16"} | changes))
    return model, jax.jit(lambda: model.init(jax.random.key(0), model.example()))()["params"]


def work(args, batch_size: int):
    """(model, step, state, frozen, batch) of the work that gpu.py describes."""
    from jaxpeft import config, methods, tasks, tree
    from jaxpeft.adapt import sites
    from jaxpeft.training import loop, optim

    model, params = model_of(args)
    method = (
        methods.build("full") if args.kind == "full" else methods.build("lora", targets=TARGETS[args.kind], rank=RANK)
    )
    variables = sites.attach(model, params, method, jax.random.key(1))
    mask = sites.trainable(variables)
    variables = jax.jit(functools.partial(sites.narrowed, model, mask=mask, dtype="bfloat16"), donate_argnums=0)(
        variables
    )
    tuned, frozen = tree.split(variables, mask)
    tx = optim.optimizer(config.get_config().optim, tuned, 1000)
    loss = functools.partial(tasks.build("captioning").loss, model)
    step = functools.partial(loop.train_step, loss=loss, tx=tx, grad_accum=1)
    batch = jax.tree.map(jnp.asarray, batch_of(model, args.model, batch_size))
    return model, step, loop.start(tuned, tx=tx, seed=0, best=False), frozen, batch


def batch_of(model, name: str, batch_size: int) -> dict:
    rng, c = np.random.default_rng(0), model.config
    tokens = rng.integers(10, min(c.vocab_size, 30000) - 8, (batch_size, 1, LENGTH)).astype(np.int32)
    weights = np.ones(tokens.shape, np.float32)
    weights[..., -1] = 0
    batch = {"tokens": tokens, "targets": np.roll(tokens, -1, -1), "weights": weights}
    batch["image"] = rng.integers(0, 256, (batch_size, c.image_size, c.image_size, 3)).astype(np.uint8)
    if name in PROMPT:
        batch["prompt"] = rng.integers(10, 80, (batch_size, PROMPT[name])).astype(np.int32)
        if name == "smolvlm":
            batch["prompt"][:, 4] = c.image_id
    return batch


def steps(args):
    """Training steps: ms, useful TFLOP/s, memory planned and taken, and what the compiled program gives away."""
    rows = []
    for batch_size in args.batches:
        try:
            _, step, state, frozen, batch = work(args, batch_size)
            began = time.perf_counter()
            compiled = jax.jit(step, donate_argnums=0).lower(state, frozen, batch).compile()
            compile_s, plan, text = time.perf_counter() - began, compiled.memory_analysis(), compiled.as_text()
            kept = [state]

            def call(compiled=compiled, kept=kept, frozen=frozen, batch=batch):
                kept[0], metrics = compiled(kept[0], frozen, batch)
                return metrics

            row = {"batch": batch_size, "compile_s": compile_s} | median_ms(call, args.runs, jax.block_until_ready)
            flops = useful_flops(args.model, args.kind, args.size, batch_size)
            row |= {"pictures_s": 1e3 * batch_size / row["ms"], "tflops": flops / row["ms"] / 1e9}
            row |= {"planned_gb": (plan.temp_size_in_bytes + plan.argument_size_in_bytes) / 1e9}
            row |= {"peak_gb": (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0) / 1e9}
            row |= {"loss": float(call()["loss"]), "fused attention": len(re.findall("fmha|flash", text))}
            row |= {"loops": text.count(" while("), "f32 products": len(re.findall(r"= \(?f32\[[^=]*cublas\$lt", text))}
        except Exception as error:  # out of memory, for example: another batch size may fit
            row = {"batch": batch_size, "failed": failed(error)}
        rows.append(say(row))
    return {"rows": rows, "size": args.size, "set": args.set}


def generation(args):
    """From uint8 pixels to LENGTH new tokens: greedy and beam 3."""
    from jaxpeft.adapt import sites
    from jaxpeft.models import decode
    from jaxpeft.training import evaluate

    args.set = [*args.set]
    model, params = model_of(args)
    never = jax.tree.map(lambda _: False, {"params": params})
    variables = jax.jit(functools.partial(sites.narrowed, model, mask=never, dtype="bfloat16"))({"params": params})
    c, rows = model.config, []
    for batch_size in args.batches:
        batch = jax.tree.map(jnp.asarray, batch_of(model, args.model, batch_size))
        for beams in (1, 3):
            length = {"length": LENGTH + 1, "min_length": LENGTH + 1}
            search = decode.Search((c.bos_id,), (c.sep_id,), c.pad_id, c.vocab_size, beams=beams, **length)

            def write(batch=batch, search=search):
                context = evaluate.contexts(model, variables, batch)
                return (decode.greedy if search.beams == 1 else decode.beam_search)(model, variables, context, search)

            try:
                row = median_ms(write, max(2, args.runs // 4), jax.block_until_ready)
                row = {"batch": batch_size, "beams": beams} | row | {"pictures_s": 1e3 * batch_size / row["ms"]}
            except Exception as error:
                row = {"batch": batch_size, "beams": beams, "failed": failed(error)}
            rows.append(say(row))
    return {"rows": rows}


def exactness(args):
    """A LoRA step on this device against one on the CPU in float32, and whether a step gives the same bits twice."""
    from growth import step_of

    from jaxpeft.models.blip import BlipConfig

    config, found = BlipConfig(**args.size), {}

    def metrics_of(config, precision, device):
        with jax.default_device(device), jax.default_matmul_precision(precision):
            step, state, frozen, batch = step_of(config, 4)
            return jax.tree.map(lambda x: np.asarray(x, np.float64), jax.jit(step)(state, frozen, batch)[1])

    want = metrics_of(config, "highest", jax.devices("cpu")[0])
    half = dataclasses.replace(config, dtype="bfloat16")
    ways = {
        "float32, highest": (config, "highest"),
        "float32, default": (config, "default"),
        "bfloat16": (half, "default"),
    }
    for name, (one, precision) in ways.items():
        got = metrics_of(one, precision, jax.devices()[0])
        norms = np.sqrt(got["squares"] / np.maximum(want["squares"], 1e-30))
        found[name] = {key: abs(float(got[key] / want[key] - 1)) for key in ("loss", "grad_norm")}
        found[name]["norm of a leaf"] = float(np.max(np.abs(norms - 1), where=want["squares"] > 1e-20, initial=0))
    step, state, frozen, batch = step_of(half, 4)
    jitted = jax.jit(step)
    pair = [jax.tree.leaves(jitted(state, frozen, batch)[0].tuned) for _ in range(2)]
    return {
        "relative error": found,
        "same bits twice": all(bool(jnp.array_equal(a, b)) for a, b in zip(*pair, strict=True)),
    }


def loader(args):
    """Images a second that the cores of this machine read: in training with augmentation, and in evaluation."""
    from data_loading import evaluation, jpegs, ours, parts, rate

    files, cores, n = jpegs(32 if args.tiny else 256), len(os.sched_getaffinity(0)), 2 if args.tiny else 20
    found = {"cores": cores, "ms an image": parts(files, 384)}
    for name, stream in (("training", ours), ("evaluation", evaluation)):
        counts = sorted({cores, 2 * cores})
        found[f"{name}, images/s by threads"] = {
            k: rate(stream(files, 384, k), n, warm=2 if args.tiny else k) for k in counts
        }
    return found


def loop(args):
    """The tiny base, images encoded once: a step of the real loop, with few and many checkpoints, beside the bare step."""
    from lanes import measure

    from jaxpeft import config
    from jaxpeft.training import run

    (bare,) = measure("captioning", "lora", [], runs=3, check=0)
    found = {"bare step, ms": bare["ms a step and run"]}
    for seconds in (60.0, 0.0):
        c = config.get_config("captioning", "lora", 8)
        c.steps, c.checkpoint_seconds, c.eval.gallery, c.eval.base = 40 if args.tiny else 1000, seconds, False, False
        c.data.update({"n_train": 4096 if not args.tiny else 256, "n_val": 32, "n_test": 32})
        with tempfile.TemporaryDirectory() as workdir:
            timing = run.run(c, workdir, log=lambda *_: None)["timing"]
        name = "a checkpoint a minute" if seconds else "a checkpoint as often as the loop allows"
        found[name] = {"ms a step": 1e3 * timing["train_s"] / timing["steps"]}
        found[name] |= {key: timing[key] for key in ("step_s", "train_s", "compile_s", "eval_s")}
    return found


def lanes(args):
    """Eight learning rates in one program (benchmarks/lanes.py)."""
    from lanes import measure

    return {"lanes": measure("captioning", "lora", [2 if args.tiny else 8], runs=2 if args.tiny else 5, check=3)}


SECTIONS = {one.__name__: one for one in (ceilings, steps, generation, exactness, loader, loop, lanes)}

if __name__ == "__main__":
    given = options()
    print("RESULT " + json.dumps(SECTIONS[given.section](given)), flush=True)
