"""Make tests/golden/peft: adapters that HF PEFT itself wrote on the tiny BLIP, and the logits that it computes.

    python tests/golden/make_peft.py          (torch, transformers, peft: pip install -e '.[golden]')

One directory per case of benchmarks/interchange.py that a test reads without torch, and peft.npz with the inputs and
one array of logits per directory.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import peft
import torch
import transformers

GOLDEN = Path(__file__).parent
sys.path[:0] = [str(GOLDEN.parents[1]), str(GOLDEN.parents[1] / "benchmarks")]

import jax  # noqa: E402
from interchange import CASES, DECODER, inputs, theirs  # noqa: E402

import jaxpeft as jp  # noqa: E402
from jaxpeft.models import loading  # noqa: E402

NAMES = {
    "lora": "LoRA, fused ViT qkv too",
    "all_linear": "LoRA, every linear, the tied one too",
    "rslora": "rsLoRA",
    "dora": "DoRA",
    "ia3": "IA3",
    "layer_norms": "LayerNorms",
    "vera": "VeRA",
    "oft": "OFT",
    "prompt": "Prompt",
    "prefix": "Prefix",
}


def main():
    base = GOLDEN / "blip_caption_tiny"
    model, params = loading.load(base)
    batch, logits = inputs(model.config, False, seed=5), {}
    shutil.rmtree(GOLDEN / "peft", ignore_errors=True)
    for short, name in NAMES.items():
        method, _ = CASES[name]
        with (
            tempfile.TemporaryDirectory() as directory
        ):  # the configuration is ours, the weights and the file are PEFT's
            directory = Path(directory) / "ours"
            jp.export_peft(model, jp.attach(model, params, method, jax.random.key(0)), directory)
            config = peft.PeftConfig.from_pretrained(directory)
        config.inference_mode = False
        whole = transformers.BlipForConditionalGeneration.from_pretrained(base).eval()
        inner = whole.text_decoder if name in DECODER else whole
        torch.manual_seed(0)
        tuned = peft.get_peft_model(inner, config).eval()
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.data += 0.2 * torch.randn_like(parameter)
        tuned.save_pretrained(GOLDEN / "peft" / short)
        (GOLDEN / "peft" / short / "README.md").unlink()
        written = GOLDEN / "peft" / short / "adapter_config.json"
        values = json.loads(written.read_text()) | {"base_model_name_or_path": None}  # not the path on this machine
        written.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
        logits[short] = theirs(whole, batch, tuned) if name in DECODER else theirs(tuned.base_model.model, batch)
    versions = [f"{one.__name__} {one.__version__}" for one in (peft, torch, transformers)]
    np.savez_compressed(GOLDEN / "peft.npz", image=batch["image"], tokens=batch["tokens"], versions=versions, **logits)
    print({name: float(np.abs(x).max()) for name, x in logits.items()})


if __name__ == "__main__":
    main()
