"""PaliGemma at its released size and SmolVLM-256M, with drawn weights: loading, a LoRA step, export, and peers.

    python benchmarks/vlm_large.py --out results/vlm_large.json                       everything; 25 GB of disk, 22 GB of memory
    python benchmarks/vlm_large.py --out results/vlm_large.json --sections smolvlm    one part; the others in the file stay

Every section is a process of its own, so that its peak is its own (VmHWM, Linux). The 3B checkpoint is written by transformers
in bfloat16 and in shards, and is deleted afterwards unless --directory keeps it.

    load      jaxpeft reads it as a run with model.frozen_dtype=bfloat16 does: nothing is wider than in the file but scales,
              biases and positions
    split     the same by two processes, as two hosts whose devices hold half of every matrix (mesh fsdp=2)
    step      `setup.prepare` of a captioning run, then steps of LoRA at batch 1 in bfloat16 with remat
    export    LoRA with random weights, merged and written by `export_hf`; then read by transformers, and the logits compared
    smolvlm   a LoRA step and greedy generation beside transformers + peft, in turns; then memory, one process each
"""

import argparse
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import reference
from memory import resident

SECTIONS = ("load", "split", "step", "export", "smolvlm")
TOKENIZER = reference.ROOT / "tests" / "golden" / "vlm_inputs" / "paligemma"  # a toy; ids below 430
IMAGE = 423  # of <image> in it
SIGLIP = dict(
    hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16, patch_size=14,
    image_size=224, vision_use_head=False,
)  # fmt: skip
GEMMA = dict(
    vocab_size=257216, hidden_size=2048, intermediate_size=16384, num_hidden_layers=18, num_attention_heads=8,
    num_key_value_heads=1, head_dim=256, pad_token_id=0, bos_token_id=2, eos_token_id=1,
)  # fmt: skip
SMOLLM = dict(
    vocab_size=49280, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
    num_key_value_heads=3, head_dim=64, rms_norm_eps=1e-5, rope_theta=1e5, pad_token_id=2, bos_token_id=1,
    eos_token_id=49279, max_position_embeddings=8192, tie_word_embeddings=False,
)  # fmt: skip
SIGLIP_B = dict(
    hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, patch_size=16, image_size=512
)
# XLA on CPU converts bfloat16 matrices to float32; these passes would do it for all layers at once, before the loop over them
NOT_HOISTED = "--xla_disable_hlo_passes=while-loop-invariant-code-motion,while-loop-expensive-invariant-code-motion"
LIMIT = 1.3  # peak of loading over the bytes of the weights
LOGITS = 2e-3  # largest difference of the logits after an export, of transformers in float32


# ------------------------------------------------------------------------------------------------ PaliGemma-3B


def write(args) -> dict:
    """The checkpoint, as transformers saves it."""
    reference.quiet_torch(args.threads)
    import torch
    from transformers import GemmaConfig, PaliGemmaConfig, PaliGemmaForConditionalGeneration

    text, vision = (GEMMA, SIGLIP) if args.size == "released" else (GEMMA | TINY["text"], SIGLIP | TINY["vision"])
    width = text["hidden_size"]
    config = PaliGemmaConfig(
        text_config=GemmaConfig(**text), vision_config=vision, image_token_index=IMAGE, projection_dim=width,
        hidden_size=width, vocab_size=257216,
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    torch.manual_seed(0)
    model = PaliGemmaForConditionalGeneration(config)
    model.save_pretrained(args.directory, max_shard_size="2GB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, args.directory)
    return {"parameters": sum(p.numel() for p in model.parameters()), "files": sorted(p.name for p in shards(args))}


TINY = {
    "text": dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, head_dim=16),
    "vision": dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2),
}


def shards(args) -> list[Path]:
    """The files of weights."""
    return list(Path(args.directory).glob("*.safetensors"))


def kept(name: str) -> str | None:
    """The type of a leaf, as in a LoRA run with frozen_dtype=bfloat16: None is that of the file."""
    from jaxpeft.models.paligemma import PaliGemma

    return None if re.search(PaliGemma.narrow, name) else "float32"


def measured(args, place) -> dict:
    """Read the checkpoint with `place` -> bytes held, peaks, seconds."""
    import jax

    from jaxpeft.models import loading

    jax.devices()
    before, began = resident(), time.perf_counter()
    _, params, report = loading.read(args.directory, place=place, param_dtype=kept)
    seconds = time.perf_counter() - began
    held = sum(shard.data.nbytes for x in jax.tree.leaves(params) for shard in x.addressable_shards)
    return {
        "file_MB": round(sum(path.stat().st_size for path in shards(args)) / 1e6, 1),
        "held_MB": round(held / 1e6, 1),
        "before": before,
        "after": resident(),
        "seconds": round(seconds, 1),
        "digest": report["digest"],
    }


def load(args) -> dict:
    from jaxpeft.models import convert

    return measured(args, convert.on_device)


def split(args) -> dict:
    """Start the two processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    both = [started(args, "part", process=me, port=port) for me in range(2)]
    return {"processes": [answer(one) for one in both]}


def part(args) -> dict:
    """One of the two processes of `split`."""
    import jax

    from jaxpeft.models import loading
    from jaxpeft.runtime import host
    from jaxpeft.training import sharding

    jax.config.update("jax_num_cpu_devices", 1)
    assert host.join_others("auto", f"127.0.0.1:{args.port}", 2, args.process)
    on = sharding.mesh({"data": 1, "fsdp": 2})
    found = measured(args, sharding.placing(loading.abstract(args.directory).sharding, on))
    sharding.any_of(False)  # neither leaves before the other is done
    return found


def step(args) -> dict:
    """Prepare a run as main.py does, and take steps of its training."""
    os.environ.setdefault("XLA_FLAGS", NOT_HOISTED)
    import dataclasses
    import functools

    import jax

    from jaxpeft import config, tree
    from jaxpeft.data import pipeline
    from jaxpeft.runtime import malloc
    from jaxpeft.training import loop, optim, setup, sharding

    malloc.keep_freed_memory()
    c = config.get_config("captioning", "lora", 8)
    c.base, c.batch_size, c.steps = args.directory, 1, args.steps
    c.model.dtype = c.model.frozen_dtype = "bfloat16"
    c.model.remat = "full"
    c.data.n_train = c.data.n_val = c.data.n_test = 8
    phases = {"start": resident()}
    run = setup.prepare(c, print)
    phases["prepared"] = resident()
    print(json.dumps(phases), flush=True)  # what is known if memory ends
    examples = run.task.examples(run.splits["train"], run.task.template(run.model))
    examples = dataclasses.replace(examples, images=pipeline.Resized.of(examples.images, run.model))
    batch = sharding.shard_batch(next(pipeline.batches(examples, 1, seed=0)), run.mesh)
    tx = optim.optimizer(c.optim, run.trainable, c.steps)
    loss = functools.partial(run.task.loss, run.model)
    program = jax.jit(functools.partial(loop.train_step, loss=loss, tx=tx, grad_accum=1), donate_argnums=0)
    state, began = loop.start(run.trainable, tx=tx, seed=0, best=False), time.perf_counter()
    compiled = program.lower(state, run.frozen, batch).compile()
    compile_s, plan = time.perf_counter() - began, compiled.memory_analysis()
    phases["compiled"] = resident()
    print(json.dumps(phases["compiled"]), flush=True)
    losses, seconds = [], []
    for _ in range(args.steps):
        began = time.perf_counter()
        state, metrics = compiled(state, run.frozen, batch)
        losses.append(float(metrics["loss"]))
        seconds.append(round(time.perf_counter() - began, 2))
    phases["steps"] = resident()
    return {
        "trained": tree.count(run.trainable),
        "tokens": {name: list(x.shape) for name, x in batch.items()},
        "phases": phases,
        "planned_MB": {
            "arguments": round(plan.argument_size_in_bytes / 1e6, 1), "temporary": round(plan.temp_size_in_bytes / 1e6, 1)
        },
        "xla_flags": os.environ["XLA_FLAGS"],
        "compile_s": round(compile_s, 1),
        "step_s": seconds,
        "losses": losses,
    }  # fmt: skip


def inputs() -> dict:
    """One image and one text for the comparison after an export."""
    rng = np.random.default_rng(0)
    image = rng.standard_normal((1, 224, 224, 3)).astype(np.float32)
    return {"image": image, "prompt": np.array([[2, 300, 301, 302]]), "text": np.array([[310, 311, 312, 313, 1]])}


def export(args) -> dict:
    """Write the merged model and its logits, then compare in a process of its own."""
    merged = f"{args.directory}_merged"
    try:
        found = answer(started(args, "merge", merged=merged))
        return found | answer(started(args, "reread", merged=merged))
    finally:
        shutil.rmtree(merged, ignore_errors=True)


def merge(args) -> dict:
    """LoRA that changes the model, its logits, and `export_hf`."""
    import jax
    import jax.numpy as jnp

    import jaxpeft as jp
    from jaxpeft import tree
    from jaxpeft.interchange import export_hf
    from jaxpeft.models import loading

    model, params, _ = loading.read(args.directory, param_dtype=kept)
    variables = jp.attach(model, params, jp.LoRA(rank=8), jax.random.key(0))
    flat = tree.flatten(variables)
    moved = {
        name: 0.05 * jax.random.normal(jax.random.key(1), x.shape) for name, x in flat.items() if name.endswith("/b")
    }
    variables = tree.unflatten(variables, flat | moved)
    given = inputs()
    tokens = np.pad(given["text"][:, :-1], ((0, 0), (1, 0)))[:, None]
    batch = {"image": given["image"], "prompt": given["prompt"], "tokens": tokens}
    run = jax.jit(model.apply)
    logits = np.asarray(run(variables, jax.tree.map(jnp.asarray, batch)))[0, 0]
    base = np.asarray(run({"params": params}, jax.tree.map(jnp.asarray, batch)))[0, 0]
    phases = {"logits": resident()}
    began = time.perf_counter()
    export_hf(model, variables, args.merged)
    phases["exported"] = resident()
    np.save(Path(args.directory) / "logits.npy", logits)
    return {
        "export_s": round(time.perf_counter() - began, 1), "lora_moves_logits_by": float(np.abs(logits - base).max()),
        "std_of_logits": float(logits.std()), "export_phases": phases,
    }  # fmt: skip


def reread(args) -> dict:
    """The exported directory in transformers."""
    reference.quiet_torch(args.threads)
    import torch
    from transformers import AutoModelForImageTextToText

    model, loading = AutoModelForImageTextToText.from_pretrained(
        args.merged, dtype=torch.float32, output_loading_info=True
    )
    given = inputs()
    n_image = (224 // 14) ** 2
    ids = np.concatenate([np.full((1, n_image), IMAGE), given["prompt"], given["text"]], axis=1)
    types = np.zeros_like(ids)
    types[:, n_image + given["prompt"].shape[1] :] = 1
    with torch.no_grad():
        logits = model(
            input_ids=torch.tensor(ids), attention_mask=torch.ones(ids.shape, dtype=torch.long),
            token_type_ids=torch.tensor(types), pixel_values=torch.tensor(given["image"]).permute(0, 3, 1, 2),
            logits_to_keep=given["text"].shape[1] + 1,
        ).logits[0, :-1].numpy()  # fmt: skip
    ours = np.load(Path(args.directory) / "logits.npy")
    problems = {key: sorted(map(str, loading[key])) for key in ("missing_keys", "unexpected_keys")}
    return {"logits_differ_by": float(np.abs(logits - ours).max()), "reread": resident(), **problems}


# ------------------------------------------------------------------------------------------------ SmolVLM-256M


def prepare(args, directory: Path) -> None:
    """Write the files that both sides read: a transformers SmolVLM and inputs.npz."""
    reference.quiet_torch(args.threads)
    import torch
    from peers import LENGTH, RANK
    from transformers import LlamaConfig, SmolVLMConfig, SmolVLMForConditionalGeneration
    from vlm_peers import BATCH, IMAGE

    text = SMOLLM if args.size == "released" else SMOLLM | {"num_hidden_layers": 2}
    vision = SIGLIP_B if args.size == "released" else SIGLIP_B | {"num_hidden_layers": 1}
    config = SmolVLMConfig(
        text_config=LlamaConfig(**text), vision_config=vision, image_token_id=IMAGE, scale_factor=4,
        tie_word_embeddings=False, pad_token_id=2,
    )  # fmt: skip
    model, generator = SmolVLMForConditionalGeneration(config), torch.Generator().manual_seed(reference.SEED)
    for name, p in sorted(model.named_parameters()):
        # as reference.build: with the usual 0.02 every image would get the same text, and equal tokens would prove nothing
        scale = 0.1 if p.ndim == 1 else 1.6 * p[0].numel() ** -0.5
        p.data.normal_(0.0, scale, generator=generator)
        if p.ndim == 1 and "norm" in name and name.endswith("weight"):
            p.data.add_(1.0)
    model.save_pretrained(directory)
    rng = np.random.default_rng(reference.SEED)
    words = rng.integers(1000, 40000, (BATCH, 20 + LENGTH))
    prompt = words[:, :20].copy()
    prompt[:, 0], prompt[:, 4] = 1, IMAGE
    arrays = {"image": rng.uniform(-1, 1, (BATCH, 512, 512, 3)).astype(np.float32)}
    arrays |= {"prompt": prompt.astype(np.int32), "text": words[:, 20:].astype(np.int32)}
    for name in ("q_proj", "v_proj"):  # both start from the same LoRA
        size = (text["num_hidden_layers"], text["hidden_size"], RANK)
        arrays[name] = rng.uniform(-(size[1] ** -0.5), size[1] ** -0.5, size).astype(np.float32)
    np.savez(directory / "inputs.npz", **arrays)


def smolvlm(args) -> dict:
    """Turns of both sides in this process, then the memory of each in a process of its own."""
    import gc

    import blip_base
    from peers import LENGTH, RANK
    from vlm_peers import BATCH, PEERS

    found = {"settings": {"batch": BATCH, "tokens": LENGTH, "rank": RANK, "runs": args.runs}}
    with tempfile.TemporaryDirectory() as directory:
        answer(started(args, "prepare", directory=directory))
        peers = {name: kind(Path(directory), args.threads) for name, kind in PEERS.items()}
        for mode in ("generate", "train"):  # peft tunes the model in place
            rows, bad = blip_base.measure(mode, peers, args.runs, BATCH)
            found[mode] = {"rows": rows, "failed": bad}
            print(reference.table(rows))
        found["trained"] = peers["jaxpeft"].trained
        del peers
        gc.collect()
        found["memory"] = [
            answer(started(args, "one", directory=directory, peer=name, mode=mode))
            for mode in ("train", "generate")
            for name in PEERS
        ]
    return found


def one(args) -> dict:
    """One side alone: its peak after loading and after the main work, twice."""
    from vlm_peers import PEERS

    peer = PEERS[args.peer](Path(args.directory), args.threads)
    loaded = resident()
    calls = peer.steps(others=False) if args.mode == "train" else peer.writers()
    for call in calls.values():
        call(), call()
    if {"jax", "torch"} <= set(sys.modules):
        raise RuntimeError("both frameworks are loaded; this would measure their sum")
    return {"peer": args.peer, "mode": args.mode, "loaded": loaded, "done": resident()}


# ------------------------------------------------------------------------------------------------ processes


def started(args, name: str, **changes) -> subprocess.Popen:
    """A process that runs one function of this file."""
    command = [sys.executable, __file__, "--only", name]
    for key, value in (vars(args) | changes).items():
        if key not in ("only", "out", "sections") and value is not None:
            command += [f"--{key}", str(value)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def answer(process: subprocess.Popen) -> dict:
    """What a process printed last."""
    said = process.communicate()[0]
    if process.returncode:
        raise SystemExit(f"{process.args} ended with {process.returncode}:\n{said}")
    return json.loads(said.splitlines()[-1])


def failures(found: dict) -> list[str]:
    """What is not as it should be."""
    bad = []
    loads = [found["load"]] if "load" in found else []
    loads += found.get("split", {}).get("processes", [])
    for one in loads:
        if one["file_MB"] > 1000 and one["after"]["peak"] > LIMIT * one["held_MB"]:
            bad.append(f"a peak of {one['after']['peak']} MB for {one['held_MB']} MB")
    if len({one["digest"] for one in loads}) > 1:
        bad.append("digests differ")
    if "export" in found and not found["export"]["logits_differ_by"] <= LOGITS:
        bad.append(f"logits differ by {found['export']['logits_differ_by']}")
    for mode in ("train", "generate"):
        bad += found.get("smolvlm", {}).get(mode, {}).get("failed", [])
    return bad


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--directory", help="keep the 3B checkpoint there, and use the one that is there")
    parser.add_argument("--size", choices=("released", "tiny"), default="released", help="tiny: a quick test")
    parser.add_argument("--steps", type=int, default=2, help="of PaliGemma")
    parser.add_argument("--runs", type=int, default=5, help="timed runs of SmolVLM")
    parser.add_argument("--threads", type=int, default=2)
    for hidden, kind in (("only", str), ("merged", str), ("peer", str), ("mode", str), ("port", int), ("process", int)):
        parser.add_argument(f"--{hidden}", type=kind, help=argparse.SUPPRESS)
    args = parser.parse_args()
    reference.use_threads(args.threads)
    if args.only:
        work = globals()[args.only]
        found = work(args, Path(args.directory)) if args.only == "prepare" else work(args)
        print(json.dumps(found or {}))
        return
    if not args.out:
        parser.error("--out is required")
    found = json.loads(Path(args.out).read_text()) if Path(args.out).exists() else {}
    with tempfile.TemporaryDirectory() as scratch:
        args.directory = args.directory or f"{scratch}/paligemma"
        if set(args.sections) - {"smolvlm"} and not (Path(args.directory) / "config.json").exists():
            found["written"] = answer(started(args, "write"))
        for name in args.sections:
            found[name] = answer(started(args, name)) | {"load_average": os.getloadavg()[0]}
            print(name, json.dumps(found[name], indent=1))
            reference.write_json(args.out, found)
    found |= reference.facts() | {"failed": failures(found)}
    reference.write_json(args.out, found)
    if found["failed"]:
        raise SystemExit("; ".join(found["failed"]))


if __name__ == "__main__":
    main()
