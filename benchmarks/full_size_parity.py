"""Full-size BLIP against transformers: the same drawn weights, read by `jaxpeft.models.loading` from a transformers directory.

    python benchmarks/full_size_parity.py --task caption --out caption.json
    python benchmarks/full_size_parity.py --task vqa --out vqa.json
    python benchmarks/full_size_parity.py --size tiny --out tiny.json             a quick test, seconds

The reference is transformers in float64. Its own float32 error is shown beside jaxpeft's, which should be about as large.
Exits with 1 if an error is above its tolerance or a token differs.
"""

import argparse
import copy
import dataclasses
import gc
import tempfile
import time

import numpy as np
import reference

COUNTS = {("base", "caption"): 223_971_644, ("base", "vqa"): 361_230_140}
TOLERANCE = {
    "base": 1e-3,
    "tiny": 5e-5,
}  # absolute for states, logits and loss; relative to the largest value for gradients
CLASS_DEFAULTS = {"vision_eps": 1e-5, "text_heads": 8}
LENGTH, BEAMS = 20, 3
GRADIENTS = {
    "caption": (
        "text_decoder.bert.embeddings.word_embeddings.weight",
        "text_decoder.bert.encoder.layer.1.crossattention.self.key.weight",
        "text_decoder.bert.encoder.layer.0.attention.output.LayerNorm.weight",
        "text_decoder.cls.predictions.bias",
        "vision_model.embeddings.patch_embedding.weight",
        "vision_model.encoder.layers.0.self_attn.qkv.weight",
        "vision_model.encoder.layers.1.layer_norm2.weight",
    ),
    "vqa": (
        "text_encoder.embeddings.position_embeddings.weight",
        "text_encoder.encoder.layer.1.crossattention.self.key.weight",
        "text_decoder.bert.encoder.layer.0.crossattention.self.value.weight",
        "text_decoder.bert.encoder.layer.1.output.LayerNorm.weight",
        "text_decoder.cls.predictions.bias",
        "vision_model.embeddings.class_embedding",
        "vision_model.encoder.layers.0.self_attn.qkv.weight",
    ),
}


def inputs(rng, config: dict, task: str) -> dict:
    """Two images (B,Y,X,C) with padded texts; for VQA also padded questions with one answer each."""
    one, pictures = reference.ids(config), reference.golden().pictures
    image_BYXC = pictures(rng, 2, config["vision_config"]["image_size"]).numpy().transpose(0, 2, 3, 1)
    batch = {"image": np.ascontiguousarray(image_BYXC)}
    if task == "vqa":
        batch["question"] = reference.ragged(rng, [14, 9], [one["enc"]], one)
    first = one["prompt"] if task == "caption" else [one["bos"]]
    batch["tokens"] = reference.ragged(rng, [16, 11] if task == "caption" else [5, 8], first, one)
    scored = (np.arange(batch["tokens"].shape[1]) >= len(first))[None] & (batch["tokens"] != one["pad"])
    return batch | {"labels": np.where(scored, batch["tokens"], -100), "prompt": np.tile(first, (2, 1))}


# ------------------------------------------------------------------------------------------------ transformers
def torch_stages(model, batch):
    """{'image_tokens', 'question_states' (VQA), 'logits', 'loss'} as tensors, differentiable."""
    dtype = next(model.parameters()).dtype
    states = model.vision_model(batch["image"].permute(0, 3, 1, 2).to(dtype))[0]
    out, mask = {"image_tokens": states}, None
    if "question" in batch:
        mask = (batch["question"] != model.config.text_config.pad_token_id).long()
        states = model.text_encoder(batch["question"], mask, encoder_hidden_states=states)[0]
        out["question_states"] = states
    token_mask = (batch["tokens"] != model.config.text_config.pad_token_id).long()
    answer = model.text_decoder(
        batch["tokens"], token_mask, encoder_hidden_states=states, encoder_attention_mask=mask, labels=batch["labels"]
    )
    return out | {"logits": answer.logits, "loss": answer.loss}


def torch_tokens(model, batch, beams: int):
    """The tokens of transformers' generate, from the states above with the correct question mask."""
    import torch

    with torch.no_grad():
        stages = torch_stages(model, batch)
        pad = model.config.text_config.pad_token_id
        context = stages.get("question_states", stages["image_tokens"])
        mask = (batch["question"] != pad).long() if "question" in batch else torch.ones(context.shape[:2]).long()
        written = model.text_decoder.generate(
            input_ids=batch["prompt"],
            attention_mask=torch.ones_like(batch["prompt"]),
            encoder_hidden_states=context,
            encoder_attention_mask=mask,
            eos_token_id=model.config.text_config.sep_token_id,
            pad_token_id=pad,
            do_sample=False,
            num_beams=beams,
            max_length=LENGTH,
        ).numpy()
    rows = np.full((len(written), LENGTH), pad)
    rows[:, : written.shape[1]] = written
    ended = rows == model.config.text_config.sep_token_id
    return np.where(np.cumsum(ended, axis=1) - ended > 0, pad, rows)  # beam search pads with the end token


def torch_numbers(model, batch, task) -> dict:
    """All arrays that are compared, by name."""
    import torch

    tensors = {k: torch.tensor(x, dtype=None if x.dtype.kind == "f" else torch.long) for k, x in batch.items()}
    stages = torch_stages(model, tensors)
    leaves = dict(model.named_parameters())
    grads = torch.autograd.grad(stages["loss"], [leaves[name] for name in GRADIENTS[task]])
    numbers = {name: x.detach().numpy() for name, x in stages.items()}
    numbers |= {f"gradient {name}": x.numpy() for name, x in zip(GRADIENTS[task], grads, strict=True)}
    del stages, grads
    numbers |= {f"tokens, {'greedy' if k == 1 else f'beam {k}'}": torch_tokens(model, tensors, k) for k in (1, BEAMS)}
    return numbers


# ------------------------------------------------------------------------------------------------ jaxpeft
def jax_stages(model, params, batch):
    """The same as torch_stages, by jaxpeft."""
    from jaxpeft import ops

    seen = {"image": batch["image"]} | ({"prompt": batch["question"]} if "question" in batch else {})
    for stage in model.stages:
        seen[stage.name] = model.apply({"params": params}, seen, stage.name, method="stage")
    context = model.apply({"params": params}, seen, method="context")
    logits_BTV = model.apply({"params": params}, batch["tokens"], context, method="score")
    scored = batch["labels"][:, 1:] != -100
    targets = np.where(scored, batch["labels"][:, 1:], 0)
    total, count = ops.token_loss(logits_BTV[:, :-1], targets, scored.astype(np.float32))
    stages = {stage.name: seen[stage.name] for stage in model.stages}
    return stages | {"logits": logits_BTV, "loss": total / count}


def jax_numbers(model, params, batch, task) -> dict:
    """The same as torch_numbers, by jaxpeft in float32."""
    import jax

    from jaxpeft import tree
    from jaxpeft.models import convert, decode

    def stages(params):
        out = jax_stages(model, params, batch)
        return out["loss"], out

    (_, out), gradient = jax.jit(jax.value_and_grad(stages, has_aux=True))(params)
    numbers = {name: np.asarray(x) for name, x in out.items()}
    gradient = convert.written(tree.flatten(jax.device_get(gradient)), model.hf.table)
    numbers |= {f"gradient {name}": gradient[name] for name in GRADIENTS[task]}
    del gradient
    c, variables = model.config, {"params": params}
    made = {stage.name: out[stage.name] for stage in model.stages}
    asked = {"prompt": batch["question"]} if "question" in batch else {}
    context = model.apply(variables, made | asked, method="context")
    ids = {"start": tuple(batch["prompt"][0].tolist()), "stop": (c.sep_id,), "pad": c.pad_id}
    search = decode.Search(**ids, n_words=c.vocab_size, length=LENGTH)
    numbers["tokens, greedy"] = np.asarray(decode.greedy(model, variables, context, search)[0])
    search = dataclasses.replace(search, beams=BEAMS)
    numbers[f"tokens, beam {BEAMS}"] = np.asarray(decode.beam_search(model, variables, context, search)[0][:, 0])
    return numbers


def controls(model, params, batch, double, where, allowed: float) -> list[dict]:
    """Logits with transformers' class defaults, which are not BLIP's: the comparison must detect both differences."""
    import jax

    from jaxpeft.models.blip import Blip

    rows = []
    for field, value in CLASS_DEFAULTS.items():
        wrong = Blip.build(dataclasses.replace(model.config, **{field: value}))
        logits_BTV = jax.jit(lambda params, wrong=wrong: jax_stages(wrong, params, batch)["logits"])(params)
        far = float(np.abs(np.asarray(logits_BTV) - double["logits"])[where].max())
        rows.append({"wrong on purpose": f"{field} = {value}", "logits are off by": far,
                     "": "noticed" if far > allowed else "MISSED"})  # fmt: skip
    return rows


# ------------------------------------------------------------------------------------------------ comparison
def compare(double, single, ours, batch, pad_id: int, tolerance: float) -> list[dict]:
    """A row per tensor: its largest value, errors against float64, and verdict. Padding is left out."""
    rows = []
    for name, expected in double.items():
        where = ...
        if name in ("logits", "question_states"):
            where = batch["tokens" if name == "logits" else "question"] != pad_id
        far = {k: float(np.abs(x[name] - expected)[where].max()) for k, x in (("ours", ours), ("torch", single))}
        largest = float(np.abs(expected).max())
        if name.startswith("tokens"):
            good, allowed = np.array_equal(ours[name], expected), "equal"
        else:
            allowed = tolerance * (largest if name.startswith("gradient") else 1.0)
            good = far["ours"] <= allowed
        rows.append({"tensor": name, "shape": "x".join(map(str, expected.shape)) or "-", "largest": largest,
                     "jaxpeft f32": far["ours"], "transformers f32": far["torch"], "allowed": allowed,
                     "": "ok" if good else "FAR"})  # fmt: skip
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=("caption", "vqa"), default="caption")
    parser.add_argument("--size", choices=("base", "tiny"), default="base")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    began = time.perf_counter()
    reference.use_threads(args.threads)
    reference.quiet_torch(args.threads)
    import torch

    reference.golden().pass_cross_attention_mask()
    config = reference.settings(args.size, args.task)
    batch = inputs(np.random.default_rng(reference.SEED), config, args.task)

    with tempfile.TemporaryDirectory() as directory:
        model = reference.build(config, args.task, reference.SEED)
        tensors = {k: torch.tensor(x, dtype=None if x.dtype.kind == "f" else torch.long) for k, x in batch.items()}
        with torch.no_grad():
            reference.centre(model, torch_stages(model, tensors)["logits"], reference.ids(config))
        model.save_pretrained(directory)
        single = torch_numbers(model, batch, args.task)
        double = torch_numbers(copy.deepcopy(model).double(), batch, args.task)
        del model
        gc.collect()
        facts = reference.facts()
        from jaxpeft import tree
        from jaxpeft.models import loading

        model, params, report = loading.read(directory)
    n_parameters, expected = tree.count(params), COUNTS.get((args.size, args.task))
    if expected not in (None, n_parameters):
        raise SystemExit(f"{n_parameters:,} parameters; BLIP has {expected:,}")
    ours = jax_numbers(model, params, batch, args.task)

    rows = compare(double, single, ours, batch, model.config.pad_id, TOLERANCE[args.size])
    where = batch["tokens"] != model.config.pad_id
    control = controls(model, params, batch, double, where, TOLERANCE[args.size])
    apart = {name: bool((x[0] != x[1]).any()) for name, x in double.items() if name.startswith("tokens")}
    bad = [row["tensor"] for row in rows if row[""] != "ok"] + [
        f"{k} of both pictures" for k, other in apart.items() if not other
    ]
    bad += [row["wrong on purpose"] for row in control if row[""] != "noticed"]
    n = expected and "as expected" or "no expectation for this size"
    print(
        f"{args.size} {args.task}: {n_parameters:,} parameters ({n}); class defaults used: {report['defaults'] or 'none'}"
    )
    print("largest absolute errors against transformers in float64\n" + reference.table(rows))
    print(reference.table(control))
    print("tokens equal" if not any(name.startswith("tokens") for name in bad) else "TOKENS DIFFER")
    peak, seconds = reference.peak_bytes(), time.perf_counter() - began
    print(f"{seconds:.0f} s, peak memory {peak / 2**30:.1f} GiB")
    tokens = {name: x.tolist() for name, x in double.items() if name.startswith("tokens")}
    result = {
        **facts,
        "task": args.task,
        "size": args.size,
        "parameters": n_parameters,
        "rows": rows,
        "controls": control,
    }
    result |= {
        "tokens": tokens,
        "tokens_differ_between_pictures": apart,
        "seconds": seconds,
        "peak_bytes": peak,
        "failed": bad,
    }
    reference.write_json(args.out, result)
    if bad:
        raise SystemExit(f"failed: {', '.join(bad)}")


if __name__ == "__main__":
    main()
