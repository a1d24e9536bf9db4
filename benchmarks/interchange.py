"""Parity with PyTorch: exports every method that HF PEFT supports, loads it with PEFT, and compares logits.

    python benchmarks/interchange.py --out results/interchange.json

For each method: random leaves on a BLIP with random weights, `export_peft`, and `peft.PeftModel.from_pretrained` on
transformers' BLIP. No key may be missing or unexpected, and keys and values must equal PEFT's own state dict. Then the largest
difference of logits between PEFT and jaxpeft, between the disabled adapter and the base, between both merged models, and
after `import_peft`. Also the reverse: a directory that PEFT wrote, read by jaxpeft. Everything is float32. The scale of logits
and the effect of the adapter are shown too, because a small difference between small numbers is no evidence.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import peft
import torch
import transformers
from safetensors.numpy import load_file

from jaxpeft.runtime import files

sys.path.insert(0, str(Path(__file__).parents[1]))

import jaxpeft as jp
from jaxpeft.adapt import sites
from jaxpeft.methods import Head, Scoped
from jaxpeft.models import loading
from jaxpeft.runtime import host

GOLDEN = Path(__file__).parents[1] / "tests" / "golden"
TEXT = r"text_decoder.*attention/(query|value)$"
BOTH = r"(text_.*attention/(query|value)|vision.*attention/(query|value))$"
# name -> (methods, tower: caption or vqa)
CASES = {
    "LoRA": (jp.LoRA(rank=3), "caption"),
    "LoRA, fused ViT qkv too": (jp.LoRA(targets=BOTH, rank=2, alpha=5.0), "caption"),
    "LoRA, VQA": (jp.LoRA(targets=BOTH, rank=2), "vqa"),
    "LoRA, every linear but the tied one": (jp.LoRA(targets=r"blocks/|head/dense$", rank=2), "caption"),
    "LoRA, every linear, the tied one too": (jp.LoRA(targets=r"blocks/|head/(dense|vocabulary)$", rank=2), "caption"),
    "DoRA, the tied head": (jp.DoRA(targets=r"head/(dense|vocabulary)$", rank=2), "caption"),
    "LoRA, one layer": (Scoped(method=jp.LoRA(rank=2), layers=(1,)), "caption"),
    "LoRA + head": ((jp.LoRA(rank=2), Head()), "caption"),
    "LoRA + untied head": ((jp.LoRA(rank=2), Head(matrix="untied")), "caption"),
    "rsLoRA": (jp.LoRA(targets=BOTH, rank=4, alpha=8.0, rank_stabilized=True), "caption"),
    "PiSSA as LoRA": (jp.PiSSA(targets=TEXT, rank=2), "caption"),
    "DoRA": (jp.DoRA(targets=BOTH, rank=2), "caption"),
    "IA3": (jp.IA3(targets=r"(attention/(key|value)|mlp/down)$"), "caption"),
    "LayerNorms": (jp.LayerNorms(targets=""), "caption"),
    "VeRA": (jp.VeRA(targets=r"text_.*(attention/(query|value)|mlp/down)$", rank=5), "caption"),
    "OFT": (jp.OFT(targets=TEXT, block=4), "caption"),
    "Prompt": (jp.Prompt(targets="^text_decoder$", length=3, positions="shift"), "caption"),
    "Prefix": (jp.Prefix(targets="^text_decoder.*self_attention$", length=3, positions="shift"), "caption"),
}
DECODER = ("Prompt", "Prefix")
VOCABULARY = sites.Site("text_decoder/head/vocabulary", "linear", (0, 0))


def drawn(variables, mask, seed=0):
    """Move every trainable leaf at random, so that none is zero."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x, on: x + jnp.asarray(rng.normal(0, 0.2, x.shape), x.dtype) if on else x, variables, mask
    )


def inputs(config, vqa, seed=0):
    rng = np.random.default_rng(seed)
    image = rng.normal(size=(2, config.image_size, config.image_size, 3)).astype(np.float32)
    tokens = rng.integers(5, config.vocab_size - 5, (2, 5)).astype(np.int32)
    batch = {"image": image, "tokens": tokens[:, None]}
    return batch | ({"prompt": rng.integers(5, config.vocab_size - 5, (2, 4)).astype(np.int32)} if vqa else {})


def ours(model, variables, batch):
    return np.asarray(model.apply(variables, batch)[:, 0])


def theirs(module, batch, decoder=None):
    """Logits of transformers' BLIP with `decoder` as its text decoder. There is no padding."""
    image = torch.tensor(batch["image"]).permute(0, 3, 1, 2)
    tokens = torch.tensor(batch["tokens"][:, 0]).long()
    with torch.no_grad():
        context = module.vision_model(image)[0]
        if "prompt" in batch:
            question = torch.tensor(batch["prompt"]).long()
            context = module.text_encoder(question, encoder_hidden_states=context)[0]
        mask = torch.ones_like(tokens)
        out = (decoder or module.text_decoder)(input_ids=tokens, attention_mask=mask, encoder_hidden_states=context)
    return out.logits[:, -tokens.shape[1] :].numpy()


def gap(a, b):
    return float(np.abs(a - b).max())


def check(name, directory) -> dict:
    """All comparisons of one method. Exits where PEFT reports a missing or unexpected key."""
    method, tower = CASES[name]
    base_dir = GOLDEN / f"blip_{tower}_tiny"
    cls = transformers.BlipForQuestionAnswering if tower == "vqa" else transformers.BlipForConditionalGeneration
    torch_model = cls.from_pretrained(base_dir).eval()
    model, params = loading.load(base_dir)
    variables = jp.attach(model, params, method, jax.random.key(0))
    mask = jp.trainable(variables)
    variables, batch = drawn(variables, mask), inputs(model.config, tower == "vqa")
    here, base = ours(model, variables, batch), ours(model, {"params": params}, batch)
    jp.export_peft(model, variables, directory)

    whole, inner = torch_model, torch_model.text_decoder if name in DECODER else torch_model
    base_there = theirs(whole, batch)
    tuned = peft.PeftModel.from_pretrained(inner, directory).eval()
    loaded = tuned.load_adapter(directory, "again")
    strange = [key for key in loaded.missing_keys if "again" in key] + list(loaded.unexpected_keys)
    if name in DECODER:  # PEFT loads this key separately and then reports it as unexpected; it is compared below
        strange.remove("prompt_embeddings")
    if strange:
        raise SystemExit(f"{name}: keys missing or unexpected: {strange[:10]}")
    tuned.set_adapter("default")
    state, file = peft.get_peft_model_state_dict(tuned), load_file(directory / "adapter_model.safetensors")
    if set(state) != set(file) or any(not np.array_equal(state[k].detach().numpy(), file[k]) for k in file):
        raise SystemExit(f"{name}: PEFT's state dict is not what the file holds: {sorted(set(state) ^ set(file))[:10]}")
    run = (lambda: theirs(whole, batch, tuned)) if name in DECODER else (lambda: theirs(tuned.base_model.model, batch))
    there = run()
    with tuned.disable_adapter():
        off = run()
    back, methods = jp.import_peft(model, params, directory)
    row = {
        "method": name,
        "logits": float(np.abs(here).max()),
        "effect": gap(here, base),
        "here - there": gap(here, there),
        "off - base": gap(off, base_there),
        "imported - here": gap(ours(model, back, batch), here),
        "merged there - here": None,
        "PEFT's own file": None,
    }
    if name not in DECODER:
        # merging into a matrix that is also the word embedding changes both: PEFT warns, jaxpeft raises an error
        tied = any(isinstance(one, Head) or one.selects(VOCABULARY) for one in sites.as_methods(method))
        if not tied:
            row["merged there - here"] = gap(theirs(tuned.merge_and_unload(), batch), here)
        row["PEFT's own file"] = other_way(name, cls, base_dir, directory, model, params, batch)
    return row


def other_way(name, cls, base_dir, directory, model, params, batch) -> float:
    """Read a directory that PEFT wrote (same kind of adapter, other random leaves)."""
    config = peft.PeftConfig.from_pretrained(directory)
    config.inference_mode = False
    plain = cls.from_pretrained(base_dir).eval()
    base = theirs(plain, batch)
    torch.manual_seed(1)
    tuned = peft.get_peft_model(plain, config).eval()
    for parameter_name, parameter in tuned.named_parameters():
        if parameter.requires_grad and "modules_to_save" not in parameter_name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    tuned.save_pretrained(directory.with_name("theirs"))
    back, _ = jp.import_peft(model, params, directory.with_name("theirs"))
    there = theirs(tuned.base_model.model, batch)
    if gap(there, base) < 1e-2:
        raise SystemExit(f"{name}: the adapter that PEFT wrote does nothing")
    return gap(ours(model, back, batch), there)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only")
    args = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    jax.config.update("jax_default_matmul_precision", "highest")
    rows = []
    for name in CASES:
        if args.only and args.only != name:
            continue
        with tempfile.TemporaryDirectory() as directory:
            rows.append(check(name, Path(directory) / "ours"))
        one = {
            key: value if isinstance(value, str) else "-" if value is None else f"{value:.1e}"
            for key, value in rows[-1].items()
        }
        if len(rows) == 1:
            print("  ".join(key.ljust(36 if key == "method" else 19) for key in one))
        print("  ".join(value.ljust(36 if key == "method" else 19) for key, value in one.items()), flush=True)
    versions = host.versions() | {one.__name__: one.__version__ for one in (peft, torch, transformers)}
    if args.out:
        facts = {
            "command": "python " + " ".join(sys.argv),
            "machine": host.machine(),
            "versions": versions,
            "rows": rows,
        }
        files.write_json(args.out, facts)
    errors = [value for row in rows for key, value in row.items() if key not in ("method", "logits", "effect")]
    worst = max(value for value in errors if value is not None)
    print(f"worst difference {worst:.1e}")
    sys.exit(worst > 1e-4)


if __name__ == "__main__":
    main()
