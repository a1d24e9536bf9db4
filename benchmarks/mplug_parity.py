"""mPLUG against the reference: the stored numbers of tests/golden and, at full size, modelscope's own code on drawn weights.

    python benchmarks/mplug_parity.py --out results/mplug_parity.json                  small models, a minute
    python benchmarks/mplug_parity.py --out results/mplug_parity.json --full base      also mplug_base.pth of drawn weights

--full needs torch, transformers and modelscope (see tests/golden/make_mplug.py). It writes the weights as the release's
pre-training does (names with 'fusion.' and 'bert.', momentum copies), loads the bare file, and compares both tasks.
Exits with 1 if a difference is above its tolerance or a token differs.
"""

import argparse
import dataclasses
import functools
import json
import re
import resource
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

import jaxpeft as jp
from jaxpeft import tree
from jaxpeft.methods import METHODS
from jaxpeft.models import decode, loading, mplug, mplug_convert
from jaxpeft.runtime import host
from jaxpeft.runtime.text import aligned

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
TOLERANCE = {"small": 5e-5, "full": 1e-3}  # of states and logits
NAMES = {"vqa": "vqa", "caption": "captioning"}
SEARCHES = ((1, 0, 6), (3, 1, 8), (5, 4, 9))


def far(a, b, where=...):
    """The largest difference."""
    return float(np.abs(np.asarray(a)[where] - np.asarray(b)[where]).max())


@functools.partial(jax.jit, static_argnames=("model", "method"))
def run(model, method, params, *args):
    """One function of a model."""
    return model.apply({"params": params}, *args, method=method)


def small(kind: str, task: str) -> dict:
    """The largest differences from the stored numbers."""
    import test_mplug_parity as parity

    model, params, golden = parity.loaded(kind, task)
    context, logits = parity.outputs(kind, task)
    found = {"logits": far(logits, golden[f"{task}/logits"], parity.valid(kind, task))}
    if task == "vqa":
        n_image, real = golden["vqa/image_tokens"].shape[1], golden["question_mask"] == 1
        found["image tokens"] = far(
            parity.run(model, "encode_image", params, golden["images"]), golden["vqa/image_tokens"]
        )
        found["fused image"] = far(context.memory[:, :n_image], golden["vqa/layers/image"][-1])
        found["fused text"] = far(context.memory[:, n_image:], golden["vqa/layers/text"][-1], real)
    loss = float(golden[f"{task}/loss"])
    found["loss / loss"] = abs(float(parity.loss_of(logits, golden, task)) - loss) / loss

    def scalar(params):
        batch = {"image": golden["images"], "prompt": golden["prompt"]}
        context = model.apply({"params": params}, batch, method="context")
        context = context if task == "caption" else parity.rows(context, golden["owner"])
        texts = golden["captions" if task == "caption" else "answers"]
        return parity.loss_of(model.apply({"params": params}, texts, context, method="score"), golden, task)

    ours = mplug_convert.to_release(jax.jit(jax.grad(scalar))(params), model.config, first=parity.FIRST)
    pairs = [(x, ours[name.removeprefix(f"{task}/grad/")]) for name, x in golden.items() if f"{task}/grad/" in name]
    found["gradient / largest entry"] = max(far(b, a) / float(np.abs(a).max()) for a, b in pairs)
    equal = []
    for beams, least, most in SEARCHES:
        options = {"length": 1 + most, "min_length": 1 + least, "beams": beams, "kind": "mplug"}
        search = decode.Search((101,), (102,), 0, model.config.vocab_size, **options)
        tokens, _ = decode.beam_search(model, {"params": params}, parity.context_of(model, params, golden), search)
        expected = golden[f"{task}/beam{beams}_{least}_{most}/ids"]
        equal.append(bool(np.array_equal(tokens, np.where(expected < 0, 0, expected))))
    found["beams 1, 3, 5 equal"] = all(equal)
    return found


def controls(kind: str) -> dict:
    """How far the logits of wrong models are from ours."""
    import test_mplug_parity as parity

    golden, n = parity.loaded(kind)[2], parity.N_WRONG
    ours, where = parity.outputs(kind, "vqa")[1], parity.valid(kind, "vqa")
    names = [name for name in golden if name.startswith("wrong/")]
    return {name.removeprefix("wrong/"): far(ours[:n], golden[name], where[:n]) for name in names}


def sites() -> dict:
    """Method -> the towers in which its default trains something, on mPLUG base, and the number of trained parameters."""
    found = {}
    for task, fusion in (("vqa", True), ("captioning", False)):
        model = mplug.Mplug.build(dataclasses.replace(mplug.KINDS["mplug-base"], fusion=fusion))
        for name in METHODS:
            fields = {"leaves": "text_"} if name == "selective" else {}
            if name == "prompt":
                fields["init_weights"] = "normal"  # there is no vocabulary
            shapes = jp.adapt.budget.abstract_variables(model, jp.methods.build(name, **fields))
            on = [leaf for leaf, moves in tree.flatten(jp.trainable(shapes)).items() if moves]
            towers = sorted({leaf.split("/")[1] for leaf in on})
            sizes = tree.flatten(shapes)
            found.setdefault(name, {})[task] = [towers, int(sum(np.prod(sizes[leaf].shape) for leaf in on))]
    return found


# ------------------------------------------------------------------------------------------------ full size


def full(kind: str, directory: Path) -> dict:
    """The same comparison on a checkpoint of the released size with drawn weights, in float32."""
    import torch
    from golden import make_mplug as make

    name = f"mplug-{kind}"
    c = mplug.KINDS[name]
    bert = make.BERT | {
        "hidden_size": c.text_width, "num_attention_heads": c.text_heads, "intermediate_size": c.text_mlp,
        "num_hidden_layers": 12, "text_encoder_layers": c.encoder_layers, "fusion_layers": c.fusion_layers,
        "text_decode_layers": c.text_layers, "stride_layer": c.stride, "vocab_size": c.vocab_size,
        "max_position_embeddings": c.max_positions, "encoder_width": c.vision_width,
    }  # fmt: skip
    make.KINDS = {kind: {"vision": c.vision_width, "heads": c.vision_heads, "bert": bert, "seed": 0}}
    make.IMAGE, make.PATCH, make.VOCAB = c.image_size, c.patch_size, c.vocab_size
    make.VISION_LAYERS, make.DRAWN = c.vision_layers, lambda model, seed: drawn(model)
    module, clip = make.reference()
    rng, found = np.random.default_rng(1), {}
    images = rng.standard_normal((2, c.image_size, c.image_size, 3)).astype(np.float32)
    prompt = np.zeros((2, 12), np.int64)
    prompt[0, :12], prompt[1, :7] = rng.integers(1000, 30000, 12), rng.integers(1000, 30000, 7)
    prompt[:, 0] = 101
    texts = np.concatenate([np.full((2, 1), 101), rng.integers(1000, 30000, (2, 6))], axis=1)
    path = directory / f"mplug_{kind}.pth"
    for task in ("vqa", "caption"):
        theirs = make.build(kind, task, module, clip).float()
        if task == "vqa":
            state = {renamed(key): x for key, x in theirs.state_dict().items() if x.is_floating_point()}
            state |= {
                "text_encoder_m.embeddings.word_embeddings.weight": torch.zeros(3),
                "itm_head.weight": torch.zeros(2),
            }
            torch.save({"model": state}, path)
            del state
        data = {"images": images, "questions": prompt, "question_mask": (prompt != 0).astype(np.int64)}
        data["answers" if task == "vqa" else "captions"] = texts
        with torch.no_grad():
            image, context, mask = torch_context(theirs, data, task)
            logits = theirs.text_decoder(
                torch.tensor(texts), attention_mask=torch.ones(texts.shape, dtype=torch.long),
                encoder_hidden_states=context, encoder_attention_mask=mask, return_dict=True,
            ).logits.numpy()  # fmt: skip
            theirs.beam_generator.beam_size, theirs.beam_generator.min_length, theirs.beam_generator.max_length = (
                3,
                2,
                8,
            )
            ids, _ = theirs.beam_generator.translate_batch([context, mask], out_size=3)
        image, context = image.numpy(), context.numpy()
        del theirs
        began = time.perf_counter()
        model, params = loading.load(path, task=NAMES[task])
        seconds = time.perf_counter() - began
        ours = run(model, "context", params, {"image": images, "prompt": prompt.astype(np.int32)})
        real = np.asarray(ours.mask_BS) if ours.mask_BS is not None else ...
        search = decode.Search((101,), (102,), 0, c.vocab_size, length=9, min_length=3, beams=3, kind="mplug")
        tokens, _ = decode.beam_search(model, {"params": params}, ours, search)
        padded = [[[*row, *[0] * (9 - len(row))] for row in map(np.asarray, rows)] for rows in ids]
        found[task] = {
            "parameters": int(sum(x.size for x in jax.tree.leaves(params))),
            "context": far(ours.memory, context, real),
            "logits": far(run(model, "score", params, texts, ours), logits),
            "std of logits": float(logits.std()),
            "beams of 3 equal": bool(np.array_equal(tokens, padded)),
            "load_s": round(seconds, 2),
        }
        del params, ours
        jax.clear_caches()
    found["file_bytes"] = path.stat().st_size
    found["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return found


def drawn(model):
    """Small random weights of a usual scale."""
    import torch

    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            parameter.normal_(0, 0.03, generator=generator)
            if re.search(r"(ln_\w+|LayerNorm|layer_norm)\.weight$", name):
                parameter.add_(1.0)


def renamed(name: str) -> str:
    """A name of fine-tuning in the layout of pre-training."""
    return name.replace("text_encoder.", "text_encoder.bert.").replace("fusion_encoder.", "fusion_encoder.fusion.bert.")


def torch_context(model, data: dict, task: str):
    """(image tokens, what the decoder attends to, its mask) of the reference."""
    import torch

    images = torch.tensor(data["images"]).permute(0, 3, 1, 2)
    image = model.visual_encoder.visual(images, skip_last_layer=True)
    if model.large:
        image = model.visn_layer_norm(model.visn_fc(image))
    ones = torch.ones(image.shape[:2], dtype=torch.long)
    if task == "caption":
        return image, image, ones
    questions, mask = torch.tensor(data["questions"]), torch.tensor(data["question_mask"])
    states = model.text_encoder(questions, attention_mask=mask).last_hidden_state
    fused = model.fusion_encoder(
        encoder_embeds=states, attention_mask=mask, encoder_hidden_states=image.clone(), encoder_attention_mask=ones,
        return_dict=False,
    )  # fmt: skip
    return image, torch.cat(list(fused), 1), torch.cat([ones, mask], 1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--full", choices=("base", "large"), nargs="*", default=[])
    args = parser.parse_args()
    jax.config.update("jax_default_matmul_precision", "highest")
    found = {
        "small": {f"{kind} {task}": small(kind, task) for kind in ("base", "large") for task in ("vqa", "caption")},
        "controls": {kind: controls(kind) for kind in ("base", "large")},
        "sites": sites(),
        "full": {},
    }
    with tempfile.TemporaryDirectory() as directory:
        for kind in args.full:
            found["full"][kind] = full(kind, Path(directory))
    found |= {"machine": host.machine(), "versions": host.versions()}
    args.out.write_text(json.dumps(found, indent=1) + "\n")
    for name, one in found["small"].items():
        shown = [(key, str(x) if isinstance(x, bool) else f"{x:.1e}") for key, x in one.items()]
        print("\n".join([name, *aligned(shown)]))
    for kind, one in found["full"].items():
        print(kind, json.dumps(one, indent=1))
    good = all(one["logits"] <= TOLERANCE["small"] and one["beams 1, 3, 5 equal"] for one in found["small"].values())
    tasks = [one[task] for one in found["full"].values() for task in ("vqa", "caption")]
    good &= all(one["logits"] <= TOLERANCE["full"] and one["beams of 3 equal"] for one in tasks)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
