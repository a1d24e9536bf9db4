"""What the benchmarks share: random BLIP models in transformers' format, their inputs, tables and facts.

This module imports neither torch nor jax: a process that measures the memory of one must not load the other.
"""

import json
import os
import platform
import resource
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
SEED = 3
PAD, CLS, SEP, BOS, ENC = 0, 101, 102, 30522, 30523
IDS = {"pad_token_id": PAD, "cls_token_id": CLS, "sep_token_id": SEP, "bos_token_id": BOS, "enc_token_id": ENC}
PROMPT = [BOS, 1037, 3861, 1997]  # a picture of
# Scales of random weights: sharp attention and small updates, or twelve post-norm text layers would average out all words
FACTORS = {"crossattention.output.dense": 0.1, "output.dense": 0.2, "attention.self.query": 2.0}
# BLIP-base, with all settings that differ from transformers' class defaults
BASE = {
    "vision_config": {"image_size": 384, "num_attention_heads": 12, "layer_norm_eps": 1e-6},
    "text_config": {"num_attention_heads": 12, "layer_norm_eps": 1e-12, "eos_token_id": SEP, **IDS},
}


def use_threads(n: int) -> None:
    """Restrict this process and its children to n cores, which sets XLA's number of threads. Call it before other imports."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:n])
    os.environ["OMP_NUM_THREADS"] = str(n)


def quiet_torch(threads: int) -> None:
    """Import torch and transformers with this many threads, without progress bars and advice."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(threads)


def golden():
    """The module tests/golden/make_blip.py, with the tiny settings and the fix of transformers' cross-attention mask."""
    sys.path.insert(0, str(ROOT / "tests" / "golden"))
    import make_blip

    return make_blip


def settings(size: str, task: str, image_size: int | None = None) -> dict:
    """The arguments of transformers.BlipConfig. `image_size` applies to base models only; tiny ones keep their own."""
    if size == "tiny":
        return {"caption": golden().CAPTION, "vqa": golden().VQA}[task]
    vision = BASE["vision_config"] | ({"image_size": image_size} if image_size else {})
    return BASE | {"vision_config": vision}


def ids(config: dict) -> dict:
    """The special ids, the prompt of a caption and the range of ordinary words of a model with these settings."""
    text = config["text_config"]
    one = {name: text[f"{name}_token_id"] for name in ("pad", "sep", "bos", "enc")}
    tiny = text["bos_token_id"] != BOS
    return one | {"prompt": golden().PROMPT if tiny else PROMPT, "words": (10, 95) if tiny else (1000, 30000)}


def build(config: dict, task: str, seed: int):
    """A transformers model with random weights, float32, in evaluation mode.

    Matrices have standard deviation 1.6 / sqrt(fan in), so that states, attention and logits vary: with the usual 0.02
    every image would get the same text, and equal tokens would prove nothing. The inputs of the vision blocks are small, as in
    trained models, so that a wrong epsilon is detected.
    """
    import torch
    import transformers

    kind = {"caption": "BlipForConditionalGeneration", "vqa": "BlipForQuestionAnswering"}[task]
    settings = transformers.BlipConfig(**config)
    settings._attn_implementation = "eager"
    model = getattr(transformers, kind)(settings).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, p in sorted(model.named_parameters()):
        scale = 0.1
        if name.startswith("vision_model.embeddings"):
            scale = 0.02 if p.ndim < 4 else 0.02 * p[0].numel() ** -0.5
        elif "position_embeddings" in name or "word_embeddings" in name:
            scale = 1.6 * p.shape[-1] ** -0.5
        elif p.ndim > 1:
            scale = 1.6 * p[0].numel() ** -0.5
            scale *= next((factor for part, factor in FACTORS.items() if part in name), 1.0)
        p.data.normal_(0.0, scale, generator=generator)
        if "norm" in name.lower() and name.endswith("weight"):
            p.data.add_(1.0)
    model.tie_weights()
    return model


def centre(model, logits, one: dict) -> None:
    """Subtract the mean of some logits (..., V) from the bias, so that the images decide; exclude special tokens."""
    import torch

    with torch.no_grad():
        bias = model.text_decoder.cls.predictions.bias
        bias -= logits.flatten(0, -2).mean(0)
        bias[[one[name] for name in ("pad", "bos", "enc")]] -= 12.0


def ragged(rng, lengths, first, one: dict) -> np.ndarray:
    """Rows of tokens (B, T): the first tokens, random words, the end token, padding."""
    rows = np.full((len(lengths), max(lengths)), one["pad"], np.int32)
    for row, n in zip(rows, lengths, strict=True):
        row[:n] = [*first, *rng.integers(*one["words"], n - len(first) - 1), one["sep"]]
    return rows


def peak_bytes() -> int:
    """Peak resident memory of this process, in bytes. Not `ru_maxrss` on Linux, where a child inherits its parent's value."""
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def facts() -> dict:
    """The command, machine and versions to store with a number. Imports jax."""
    import importlib.metadata

    from jaxpeft.runtime import host

    info = Path("/proc/cpuinfo")
    model = (
        [line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        if info.exists()
        else []
    )
    machine = host.machine() | {"cpu": model[0] if model else platform.processor()}
    machine |= {"threads": int(os.environ["OMP_NUM_THREADS"]), "load_before": round(os.getloadavg()[0], 2)}
    if hasattr(os, "sysconf"):
        machine["memory_bytes"] = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    installed = {found.metadata["Name"] for found in importlib.metadata.distributions()}
    peers = [name for name in ("torch", "transformers", "peft") if name in installed]
    versions = host.versions() | {name: importlib.metadata.version(name) for name in peers}
    return {"command": " ".join(["python", *sys.argv]), "machine": machine, "versions": versions}


def table(rows: list[dict]) -> str:
    """Rows with the same keys as an aligned table; floats have three significant digits. Imports jax."""
    from jaxpeft.runtime.text import aligned

    def cell(value):
        return f"{value:.3g}" if isinstance(value, float) else str(value)

    return "\n".join(aligned([list(rows[0]), *([cell(value) for value in row.values()] for row in rows)]))


def write_json(path, value: dict) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(value, indent=1) + "\n")
