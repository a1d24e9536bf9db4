"""The plans of a LoRA step of BLIP-base on devices that are not here, as `--preflight` prints them.

    pip install 'jaxpeft[preflight-cuda]' libtpu
    python benchmarks/preflights.py --out results/preflights.json [--only a100 h200]

The base is a directory with the config.json of BLIP-base and a vocab.txt without English words, so that every word of a caption
is one token; no weights. LoRA r8 on captions, 384 pixels, bfloat16, the image encoder in each step. For GPUs the batch is 64,
for the TPU slice 256, with `mesh.fsdp=8`, where the report prints the plan of data=8 too, and layers in a loop, which compiles
faster. "two at once" starts two plans of the tiny base at the same time. Rows that are not named stay in the file; a plan that
fails is a row with its error.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import reference
from reference import BASE, BOS, CLS, ENC, PAD, ROOT, SEP, facts, write_json

BLIP = ["--config=configs/point.py:task=captioning,method=lora,size=8", "--config.data.augment=crop"]
BLIP += ["--config.model.dtype=bfloat16", "--config.model.frozen_dtype=bfloat16"]
TPU, TINY = "--topology=v5e:2x4", "--config=configs/quickstart.py:task=captioning"
PLANS = {  # name: the options of the plans that are made at the same time
    **{gpu: [[*BLIP, "--config.batch_size=64", f"--topology={gpu}"]] for gpu in ("h100", "a100", "h200", "b200")},
    "two at once": [[TINY, "--config.batch_size=16", TPU]] * 2,
    "v5e, fsdp=8": [[*BLIP, "--config.batch_size=256", "--config.mesh.fsdp=8", "--config.model.unroll=1", TPU]],
}


def base(path: Path) -> Path:
    """BLIP-base without weights: its settings, and a vocabulary with the special tokens in their places."""
    special = {PAD: "[PAD]", 100: "[UNK]", CLS: "[CLS]", SEP: "[SEP]", 103: "[MASK]", BOS: "[DEC]", ENC: "[ENC]"}
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": "blip", **BASE}))
    (path / "vocab.txt").write_text("".join(f"{special.get(i, f'w{i}')}\n" for i in range(ENC + 1)))
    return path


def planned(options: list[list[str]], directory: Path) -> list[dict]:
    """What these commands printed, started at the same time: {label: value}, or the last line of an error."""
    began = time.perf_counter()
    commands = [[sys.executable, "main.py", f"--workdir={directory}/run", "--preflight", *one] for one in options]
    if options[0][0] != TINY:
        commands = [[*one, f"--config.base={directory}/blip"] for one in commands]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started, found = [subprocess.Popen(one, cwd=ROOT, **pipes) for one in commands], []
    for given, process in zip(options, started, strict=True):
        out, error = process.communicate()
        lines = (line.partition("  ") for line in out.splitlines())
        row = {"options": " ".join(given)} | {label: value.strip() for label, _, value in lines}
        if process.returncode:
            row["failed"] = (error.strip().splitlines() or [f"exit code {process.returncode}"])[-1]
        found.append(row | {"seconds": round(time.perf_counter() - began)})
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PLANS, default=list(PLANS))
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    reference.use_threads(2)
    rows = json.loads(args.out.read_text())["rows"] if args.out.exists() else {}
    with tempfile.TemporaryDirectory() as directory:
        base(Path(directory) / "blip")
        for name in args.only:
            rows[name] = planned(PLANS[name], Path(directory))
            print(name, json.dumps(rows[name], indent=1), flush=True)
            about = facts() | {"command": "python benchmarks/preflights.py --out results/preflights.json"}
            write_json(args.out, {"rows": {one: rows[one] for one in PLANS if one in rows}, "facts": about})


if __name__ == "__main__":
    main()
