"""One command on a machine with a GPU and no network: how fast are we there, beside torch.compile + peft, and are we right?

    python benchmarks/gpu.py --out gpu.json                      # at most ten minutes
    python benchmarks/gpu.py --out gpu.json                      # again: only what is missing or failed
    python benchmarks/gpu.py --out gpu.json --sections 'ceilings,ours blip full'
    python benchmarks/gpu.py --tiny --seconds 3600 --out results/gpu_rehearsal.json # on a CPU; its numbers mean nothing

The machine needs Python 3.12, jax 0.11 with CUDA 13, flax, optax, orbax-checkpoint, torch, transformers and peft. What else
jaxpeft imports is brought as wheels (11 MB) in an ignored folder:

    python3 -m pip download --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
        --platform manylinux_2_28_x86_64 --platform manylinux_2_24_x86_64 --platform manylinux_2_17_x86_64 \
        --platform manylinux2014_x86_64 -d .whl array_record==0.8.6 grain==0.2.18 ml_collections==1.1.0 \
        tensorflow-datasets==4.9.10 tensorflow-metadata==1.21.0 googleapis-common-protos==1.76.0 dm-tree==0.1.10 \
        immutabledict==4.3.1 importlib_resources==7.1.0 docstring_parser==0.18.0 simple-parsing==0.1.9 termcolor==3.3.0 \
        toml==0.10.2 portpicker==1.6.0
    python3 -m pip wheel --no-deps -w .whl promise==2.3          # has no wheel on PyPI; it is pure Python

and there:

    python3 -m pip install -q --no-index --no-deps --target /tmp/site .whl/*.whl
    PYTHONPATH=/tmp/site python3 benchmarks/gpu.py --out gpu.json

Every section runs in a process of its own, because an allocator of GPU memory keeps what it has. PLAN holds them with the most
seconds that each may take, most important first; a section that fails or is late is recorded with what it had found, and the
next one starts. All together get --seconds: a section of which not even half of its time is left is recorded as 'not run: out
of time', and a shorter one may still start. The file is written after each. Settings of the card are never changed.

Both sides do the same work on drawn weights: LoRA of rank 8 on queries and values (of the text decoder, in 'vit_lora' of all
towers) or all parameters ('full'), captions of 20 tokens, products in bfloat16, frozen matrices in bfloat16, trained leaves and
AdamW in float32, images given on the device. The peer uses autocast, fused AdamW, `torch.compile`, and the attention that
transformers chooses for the model: fused where it has it, which BLIP lacks ('attention' in the rows). It computes the
vocabulary of every position, image and prompt too, where transformers does so.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LENGTH, RANK = 20, 8
PROMPT = {"smolvlm": 24, "paligemma": 8}  # ids of a prompt; the one image id of SmolVLM's stands for all image tokens
# the fields of our configurations, from which the peer's are made
BASE = {
    "blip": {
        "image_size": 384, "patch_size": 16, "vision_width": 768, "vision_layers": 12, "vision_heads": 12, "vision_mlp": 3072,
        "text_width": 768, "text_layers": 12, "text_heads": 12, "text_mlp": 3072, "vocab_size": 30524, "max_positions": 512,
        "bos_id": 30522, "enc_id": 30523,
    },
    "smolvlm": {  # 256M
        "image_size": 512, "patch_size": 16, "vision_width": 768, "vision_layers": 12, "vision_heads": 12, "vision_mlp": 3072,
        "text_width": 576, "text_layers": 30, "text_heads": 9, "kv_heads": 3, "head_size": 64, "text_mlp": 1536,
        "vocab_size": 49280, "max_positions": 8192, "shuffle": 4, "pad_id": 2, "image_id": 49190,
    },
    "paligemma": {  # 3B
        "image_size": 224, "patch_size": 14, "vision_width": 1152, "vision_layers": 27, "vision_heads": 16, "vision_mlp": 4304,
        "text_width": 2048, "text_layers": 18, "text_heads": 8, "kv_heads": 1, "head_size": 256, "text_mlp": 16384,
        "vocab_size": 257216, "max_positions": 8192, "pad_id": 0,
    },
}  # fmt: skip
_SMALL = {
    "image_size": 32, "patch_size": 8, "vision_width": 32, "vision_layers": 2, "vision_heads": 2, "vision_mlp": 64,
    "text_width": 32, "text_layers": 2, "text_heads": 2, "text_mlp": 64, "vocab_size": 96, "max_positions": 128,
}  # fmt: skip
_DECODER = _SMALL | {"kv_heads": 1, "head_size": 16, "pad_id": 0}
TINY = {
    "blip": _SMALL | {"cls_id": 2, "sep_id": 3, "bos_id": 5, "enc_id": 6},
    "smolvlm": _DECODER | {"shuffle": 2, "image_id": 90},
    "paligemma": _DECODER,
}
# label -> (script, arguments, most seconds), the most important first
PLAN = {
    "ceilings": ("ours", ["ceilings"], 60),
    "ours blip lora": ("ours", ["steps", "--kind", "lora", "--batches", "64"], 100),
    "peer blip lora": ("peer", ["steps", "--kind", "lora", "--batches", "64"], 120),
    "ours blip full": ("ours", ["steps", "--kind", "full", "--batches", "32"], 100),
    "peer blip full": ("peer", ["steps", "--kind", "full", "--batches", "32"], 120),
    "exactness": ("ours", ["exactness"], 90),
    "ours blip vit_lora": ("ours", ["steps", "--kind", "vit_lora", "--batches", "32"], 90),
    "peer blip vit_lora": ("peer", ["steps", "--kind", "vit_lora", "--batches", "32"], 120),
    "ours generation": ("ours", ["generation", "--batches", "64"], 60),
    "peer generation": ("peer", ["generation", "--batches", "64"], 60),
    "ours smolvlm lora": ("ours", ["steps", "--model", "smolvlm", "--batches", "32"], 90),
    "peer smolvlm lora": ("peer", ["steps", "--model", "smolvlm", "--batches", "32"], 120),
    "ours paligemma lora": ("ours", ["steps", "--model", "paligemma", "--batches", "16"], 90),
    "peer paligemma lora": ("peer", ["steps", "--model", "paligemma", "--batches", "16"], 120),
    "loop": ("ours", ["loop"], 60),
    "loader": ("ours", ["loader"], 40),
    "lanes": ("ours", ["lanes"], 60),
    "ours blip lora 256": ("ours", ["steps", "--kind", "lora", "--batches", "256"], 90),
}
OUT_OF_TIME = "not run: out of time"
PEAK = 989  # TFLOP/s: the published dense bfloat16 rate of an H100 SXM


def useful_flops(model: str, kind: str, size: dict, batch: int) -> float:
    """Products that a step cannot leave out (2 for a multiply-add), by hand: no padding, no recomputation, no LoRA (under 1 %).

    A frozen tower below the first trained leaf: forward only. One that gradients pass through: twice as much. A trained one:
    three times.
    """
    s = size
    n_patches, d, mlp = (s["image_size"] // s["patch_size"]) ** 2, s["vision_width"], s["vision_mlp"]
    p = n_patches + (model == "blip")
    vit = s["vision_layers"] * (2 * p * (4 * d * d + 2 * d * mlp) + 4 * p * p * d)
    vit += 2 * n_patches * 3 * s["patch_size"] ** 2 * d
    w, g, t = s["text_width"], s["text_mlp"], LENGTH
    if model == "blip":
        layer = (
            2 * t * (4 * w * w + 2 * w * w + 2 * w * g) + 4 * t * t * w + 4 * t * p * w
        )  # self, cross q and out, mlp
        keys = (
            s["text_layers"] * 2 * p * 2 * d * w
        )  # keys and values of image tokens: no gradient passes with LoRA in text
        text = s["text_layers"] * layer + 2 * t * (w * w + w * s["vocab_size"])
        times = {"lora": (1, 1, 2), "vit_lora": (2, 2, 2), "full": (3, 3, 3)}[kind]
        return batch * sum(n * part for n, part in zip(times, (vit, keys, text), strict=True))
    n_image = n_patches // s.get("shuffle", 1) ** 2
    prefix = n_image + PROMPT[model]
    n = prefix + t
    heads, groups = s["text_heads"] * s["head_size"], s["kv_heads"] * s["head_size"]
    pairs = prefix**2 * (0.5 if model == "smolvlm" else 1) + t * (
        prefix + t / 2
    )  # queries and keys that see each other
    layer = 2 * n * (2 * w * heads + 2 * w * groups + 3 * w * g) + 4 * pairs * heads
    vit += 2 * n_image * (d * s.get("shuffle", 1) ** 2) * w
    return batch * (vit + 2 * (s["text_layers"] * layer + 2 * t * w * s["vocab_size"]))


def median_ms(call, runs: int, wait) -> dict:
    """Milliseconds of a call when `runs` are started without waiting in between, as in training, and of one alone."""
    for _ in range(2):
        wait(call())
    alone = []
    for _ in range(min(runs, 10)):
        began = time.perf_counter()
        wait(call())
        alone.append(time.perf_counter() - began)
    began = time.perf_counter()
    for _ in range(runs):
        out = call()
    wait(out)
    return {"ms": 1e3 * (time.perf_counter() - began) / runs, "alone_ms": 1e3 * sorted(alone)[len(alone) // 2]}


def options():
    """The arguments of a section."""
    parser = argparse.ArgumentParser()
    parser.add_argument("section")
    parser.add_argument("--model", default="blip", choices=BASE)
    parser.add_argument("--kind", default="lora", choices=("lora", "vit_lora", "full"))
    parser.add_argument("--batches", type=int, nargs="+", default=[64])
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--set", nargs="*", default=[], help="fields of our model's configuration, such as unroll=12")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    args.size = (TINY if args.tiny else BASE)[args.model]
    return args


def say(row: dict) -> dict:
    """Print a row at once, so that it counts even if the section does not end."""
    print("ROW " + json.dumps(row), flush=True)
    return row


def failed(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:300]}"


# the driver, which imports neither jax nor torch


def run(command: list[str], seconds: float) -> dict:
    """The result of a section, or {'failed', 'rows'} with what it had printed."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    environment = os.environ | {"PYTHONPATH": path, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    began, why = time.perf_counter(), ""
    process = subprocess.Popen(command, env=environment, **pipes)
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # with compilers that it started
        (out, err), why = process.communicate(), f"took longer than {seconds:.0f} s"
    lines = out.splitlines()
    found = [json.loads(line[7:]) for line in lines if line.startswith("RESULT ")]
    rows = [json.loads(line[4:]) for line in lines if line.startswith("ROW ")]
    result = found[-1] if found else {"failed": why or err[-1500:], "rows": rows}
    return result | {"seconds": round(time.perf_counter() - began, 1)}


def incomplete(result: dict | None) -> bool:
    """Whether a section must run (again)."""
    return result is None or "failed" in result or any("failed" in row for row in result.get("rows", []))


def ratios(found: dict) -> list[dict]:
    """A row for each of our times, with the peer's fastest."""
    peak, rows = found.get("ceilings", {}).get("bf16_tflops"), []
    for label, result in found.items():
        if not label.startswith("ours "):
            continue
        others = [row for row in found.get("peer" + label[4:], {}).get("rows", []) if "ms" in row]
        for mine in result.get("rows", []):
            if "ms" not in mine:
                continue
            same = [one for one in others if all(one.get(key) == mine.get(key) for key in ("batch", "beams"))]
            best = min(same, key=lambda one: one["ms"], default=None)
            beams = f", beams {mine['beams']}" if "beams" in mine else ""
            row = {"": f"{label[5:]}, batch {mine['batch']}{beams}", "ms": mine["ms"], "images/s": mine["pictures_s"]}
            row |= {"peer images/s": best["pictures_s"] if best else "-"}
            row |= {"ours / peer": mine["pictures_s"] / best["pictures_s"] if best else "-"}
            row |= {"TFLOP/s": mine.get("tflops", "-")}
            row |= {"% of the measured product": 100 * mine["tflops"] / peak if peak and "tflops" in mine else "-"}
            row |= {f"% of {PEAK}": 100 * mine["tflops"] / PEAK if "tflops" in mine else "-"}
            row |= {"GB": mine.get("peak_gb", "-"), "peer GB": best.get("peak_gb", "-") if best else "-"}
            rows.append(row)
    return rows


def sections(said: str) -> list[str]:
    """Names of sections, separated by commas."""
    names = [one.strip() for one in said.split(",")]
    if unknown := [one for one in names if one not in PLAN]:
        raise argparse.ArgumentTypeError(f"no section {', '.join(unknown)}; choose from {', '.join(PLAN)}")
    return names


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--sections", type=sections, help="run these, separated by commas, even if they are done: " + ", ".join(PLAN)
    )
    parser.add_argument("--seconds", type=float, default=570, help="of all sections together")
    parser.add_argument("--runs", type=int, default=20, help="timed steps")
    parser.add_argument("--set", nargs="*", default=[], help="fields of our model's configuration, such as unroll=12")
    parser.add_argument(
        "--tiny", action="store_true", help="a rehearsal: tiny models, batches of 2, no time limit per section"
    )
    args = parser.parse_args()
    from reference import table

    began, report = time.perf_counter(), json.loads(args.out.read_text()) if args.out.exists() else {}
    report |= {"command": " ".join(["python", *sys.argv]), "found": report.get("found", {})}
    if args.tiny:
        report["rehearsal"] = (
            "tiny models, torch.compile without its compiler: these numbers say only that the sections run"
        )
    found = report["found"]
    for label in args.sections or PLAN:
        script, arguments, most = PLAN[label]
        if not args.sections and not incomplete(found.get(label)):
            continue
        left = args.seconds - (time.perf_counter() - began)
        if left < most / 2:
            found.setdefault(label, {"failed": OUT_OF_TIME})
        else:
            arguments = ["2" if args.tiny and one.isdigit() else one for one in arguments]
            command = [sys.executable, str(ROOT / f"benchmarks/gpu_{script}.py"), *arguments, "--set", *args.set]
            command += ["--tiny", "--runs", "2"] if args.tiny else ["--runs", str(args.runs)]
            found[label] = run(command, left if args.tiny else min(most, left))
        report |= {"found": {name: found[name] for name in PLAN if name in found}, "table": ratios(found)}
        print(f"== {label}: {json.dumps(found[label])}", flush=True)
        args.out.write_text(json.dumps(report, indent=1) + "\n")
    rows = ratios(found)
    print(table(rows) if rows else "no times", flush=True)
    late = [label for label, result in found.items() if result.get("failed") == OUT_OF_TIME]
    bad = [label for label, result in found.items() if incomplete(result) and label not in late]
    print(f"{len(found) - len(late) - len(bad)} of {len(PLAN)} sections have a result")
    for what, labels in (("failed", bad), (OUT_OF_TIME, late)):
        if labels:
            print(f"{what}: {', '.join(labels)}")


if __name__ == "__main__":
    main()
