"""BLIP-base fine-tuning and captioning on CPU: jaxpeft and transformers + peft with the same weights and inputs.

    python benchmarks/blip_base.py --mode train --out train.json
    python benchmarks/blip_base.py --mode generate --out generate.json
    python benchmarks/blip_base.py --mode train --size tiny --out tiny.json        a quick test, seconds

One process runs both in turns, so that a slow minute of the machine affects both. Peak memory is measured afterwards, in one
process per framework. Exits with 1 if the two do not compute the same. README.md describes what makes the comparison fair.
"""

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import reference
from peers import BATCH, LENGTH, PEERS, RANK

TRAINED = {"base": 589_824}
CHECKED = 3  # steps or texts that must agree; they also warm up both
LOSS = 1e-3  # largest difference of the losses of these steps


def prepare(args, directory: Path) -> None:
    """Write the files that both read: a transformers model directory and inputs.npz."""
    reference.quiet_torch(args.threads)
    import torch

    config = reference.settings(args.size, "caption", args.image_size)
    one, rng = reference.ids(config), np.random.default_rng(reference.SEED)
    image_BYXC = reference.golden().pictures(rng, BATCH, config["vision_config"]["image_size"]).permute(0, 2, 3, 1)
    arrays = {
        "image": image_BYXC.contiguous().numpy(),
        "prompt": np.tile(np.array(one["prompt"], np.int32), (BATCH, 1)),
    }
    arrays["tokens"] = reference.ragged(rng, [LENGTH] * BATCH, one["prompt"], one)
    model = reference.build(config, "caption", reference.SEED)
    with torch.no_grad():
        states = model.vision_model(image_BYXC.permute(0, 3, 1, 2))[0]
        logits = model.text_decoder(torch.tensor(arrays["tokens"]).long(), encoder_hidden_states=states).logits
        reference.centre(model, logits, one)
    model.save_pretrained(directory)
    text = model.config.text_config
    for part in ("attention", "crossattention"):  # both start from the same LoRA
        for name in ("query", "value"):
            from_image = part == "crossattention" and name == "value"
            width = model.config.vision_config.hidden_size if from_image else text.hidden_size
            size = (text.num_hidden_layers, width, RANK)
            arrays[f"{part} {name}"] = rng.uniform(-(width**-0.5), width**-0.5, size).astype(np.float32)
    np.savez(directory / "inputs.npz", **arrays)


def timed(call):
    started = time.perf_counter()
    value = call()
    return time.perf_counter() - started, value


def measure(mode: str, peers: dict, runs: int, batch: int = BATCH) -> tuple[list[dict], list[str]]:
    """(a row per peer and variant, disagreements): warm-up and agreement first, then turns in alternating order."""
    calls = {name: peer.steps() if mode == "train" else peer.writers() for name, peer in peers.items()}
    first, seen, bad = {}, {}, []
    for name, ways in calls.items():
        for way, call in ways.items():
            pairs = [timed(call) for _ in range(CHECKED if mode == "train" else 2)]
            first[name, way], seen[name, way] = pairs[0][0], np.array([value for _, value in pairs])
    (one, other) = peers
    for way in calls[other]:
        if mode == "train" and way == "":
            print("losses of the first steps:", seen[one, way], seen[other, way])
            if not np.abs(seen[one, way] - seen[other, way]).max() <= LOSS:
                bad.append("losses differ")
        elif mode == "generate" and not np.array_equal(seen[one, way], seen[other, way]):
            bad.append(f"tokens differ ({way})")
    if mode == "train" and peers[one].trained != peers[other].trained:
        bad.append(f"trained parameters: {peers[one].trained:,} and {peers[other].trained:,}")
    if mode == "generate":
        texts = seen[one, "greedy"][0]
        print(
            f"{len(np.unique(texts, axis=0))} different texts for {len(texts)} pictures, {texts.shape[1]} tokens each"
        )

    turns, seconds = list(first), {key: [] for key in first}
    for i in range(runs):
        for name, way in turns[:: 1 if i % 2 == 0 else -1]:
            seconds[name, way].append(timed(calls[name][way])[0])
    rows = []
    for (name, way), values in seconds.items():
        middle = statistics.median(values)
        row = {
            "": f"{name}{', ' if way else ''}{way}",
            "compile s": getattr(peers[name], "seconds", {}).get(way, "-"),
        }
        row |= {"first s": first[name, way], "median s": middle, "min s": min(values), "max s": max(values)}
        row |= {"images/s": batch / middle}
        if (one, way) in seconds:
            row["speed-up"] = statistics.median(seconds[one, way]) / middle
        rows.append(row if "speed-up" in row else row | {"speed-up": "-"})
    return rows, bad


def memory(args, directory: Path) -> list[dict]:
    """Peak resident memory of a process that loads one peer and does the main work twice."""
    rows = []
    for name in PEERS:
        command = [sys.executable, __file__, "--mode", args.mode, "--only", name, "--directory", str(directory)]
        command += ["--threads", str(args.threads)]
        rows.append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout))
    return rows


def only(args) -> None:
    """Print one peer's memory for `memory`."""
    peer = PEERS[args.only](Path(args.directory), args.threads)
    loaded = reference.peak_bytes() / 2**30
    calls = peer.steps(others=False) if args.mode == "train" else peer.writers()
    for call in calls.values():
        call(), call()
    if {"jax", "torch"} <= set(sys.modules):
        raise RuntimeError("both frameworks are loaded; this would measure their sum")
    print(json.dumps({"": args.only, "peak GiB after loading": loaded, "peak GiB": reference.peak_bytes() / 2**30}))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", choices=("train", "generate"), required=True)
    parser.add_argument("--size", choices=("base", "tiny"), default="base")
    parser.add_argument("--image-size", type=int, default=224, help="of base; tiny has its own")
    parser.add_argument("--runs", type=int, help="timed runs of each: 5 steps, 3 texts")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out")
    parser.add_argument("--only", choices=PEERS, help=argparse.SUPPRESS)
    parser.add_argument("--directory", help=argparse.SUPPRESS)
    args = parser.parse_args()
    reference.use_threads(args.threads)
    if args.only:
        return only(args)
    if not args.out:
        parser.error("--out is required")
    with tempfile.TemporaryDirectory() as directory:
        prepare(args, Path(directory))
        gc.collect()
        peers = {name: kind(Path(directory), args.threads) for name, kind in PEERS.items()}
        facts = reference.facts()
        args.runs = args.runs or {"train": 5, "generate": 3}[args.mode]
        rows, bad = measure(args.mode, peers, args.runs)
        trained = getattr(peers["jaxpeft"], "trained", None)
        if args.mode == "train" and trained != TRAINED.get(args.size, trained):
            bad.append(f"{trained:,} trained parameters, expected {TRAINED[args.size]:,}")
        del peers
        gc.collect()
        used = memory(args, Path(directory))
    print(f"{args.size} {args.mode}, batch {BATCH}, {args.threads} threads, float32; trained parameters: {trained}")
    print(reference.table(rows) + "\n\n" + reference.table(used))
    settings = {k: v for k, v in vars(args).items() if k not in ("only", "directory", "out")}
    settings |= {"batch": BATCH, "length": LENGTH, "rank": RANK, "trained": trained}
    reference.write_json(args.out, {**facts, "settings": settings, "rows": rows, "memory": used, "failed": bad})
    if bad:
        raise SystemExit(f"not the same work: {', '.join(bad)}")


if __name__ == "__main__":
    main()
