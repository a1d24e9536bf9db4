"""Write the mPLUG golden numbers: tiny random checkpoints, their inputs and what the reference computes.

    pip install torch==2.13.0 transformers==5.23.0 && pip install --no-deps modelscope==1.40.2
    OMP_NUM_THREADS=1 python make_mplug.py          # about 15 s on one core; transformers 4.40.2 gives the same numbers

The reference is modelscope's mPLUG (Apache-2.0, from PyPI), a copy of the release's; only the model's own files are imported,
so it needs none of that package's dependencies. It writes, next to itself,
    mplug_{base,large}_tiny/     config.yaml, config_bert.json and pytorch_model.bin, as modelscope publishes mPLUG, float16
    mplug_{base,large}_tiny.npz  inputs and outputs (key list: `vqa_numbers`, `caption_numbers`, `controls`)
    mplug_positions.npz          position embeddings at other image sizes
base: vision width = text width, stride 3 (two joint layers, so the second one reads image tokens that have moved).
large: vision width != text width (projection), stride 6 as in the released large config: no joint layer.

Weights are drawn in float16 and the reference runs in float64 and eval mode, so there is no dropout. Images are stored
(B, Y, X, C). Generated ids start with [CLS] = 101 and are padded with -1.
"""

import importlib
import importlib.metadata
import json
import pathlib
import re
import sys
import tempfile
import types

import numpy as np
import torch

HERE = pathlib.Path(__file__).parent
VISION_LAYERS = 3
N_WRONG = 3  # rows stored of wrong logits
PAD, CLS, SEP = 0, 101, 102  # the ends are constants of the reference's TextGenerator, so the vocabulary is over 102
VOCAB, IMAGE, PATCH = 107, 48, 16
BERT = dict(
    model_type="bert", hidden_act="gelu", hidden_size=24, num_attention_heads=3, intermediate_size=40,
    num_hidden_layers=8, text_encoder_layers=2, fusion_layers=7, text_decode_layers=2, stride_layer=3,
    vocab_size=VOCAB, type_vocab_size=2, max_position_embeddings=20, layer_norm_eps=1e-12, pad_token_id=PAD,
    encoder_width=24, add_cross_attention=False, use_cache=False, gradient_checkpointing=False,
    attention_probs_dropout_prob=0.1, hidden_dropout_prob=0.1, initializer_range=0.02,
)  # fmt: skip
LARGE = BERT | {"stride_layer": 6, "fusion_layers": 6, "num_hidden_layers": 7}  # layers 0..5: 6 divides none but 0
# seeds whose words depend on the picture and whose texts sometimes end early (`telling` checks)
KINDS = {"base": dict(vision=24, heads=4, bert=BERT, seed=8), "large": dict(vision=40, heads=5, bert=LARGE, seed=46)}
UNUSED = (  # what no task reads; checked below: exactly these have no gradient in VQA
    r"visual_encoder\.(positional_embedding|text_projection|logit_scale|transformer\..*|token_embedding\..*|ln_final\..*)",
    r"visual_encoder\.visual\.proj",
    r"(fusion_encoder)\.encoder\.layer\.0\..*",  # layers before num_hidden_layers - fusion_layers
)


def reference():
    """modelscope.models.multi_modal.mplug.modeling_mplug, without the rest of the package."""
    root = pathlib.Path(importlib.metadata.distribution("modelscope").locate_file("modelscope"))
    mplug = "modelscope.models.multi_modal.mplug"
    for name in ("modelscope", "modelscope.utils", "modelscope.models", "modelscope.models.multi_modal", mplug):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = [str(root.joinpath(*name.split(".")[1:]))]
    sys.modules[f"{mplug}.mvit"] = types.ModuleType("mvit")  # the video model's tower; wants timm
    sys.modules[f"{mplug}.mvit"].MViTv2 = sys.modules[f"{mplug}.mvit"].MViTv2_Base_config = None
    module = importlib.import_module(f"{mplug}.modeling_mplug")
    tokenizer = types.SimpleNamespace(pad_token_id=PAD)  # all that the models read of it
    module.BertTokenizer = types.SimpleNamespace(from_pretrained=lambda *_: tokenizer)
    # What transformers 5 took away, in the form that 4.40.2 had it. Tying is done in `build`.
    for part in (module.BertModel, module.FusionModel, module.BertLMHeadModel, module.BertPrefixModel):
        part.init_weights = lambda self: None
        part.get_head_mask = lambda self, mask, n_layers, *_: [None] * n_layers
        part.invert_attention_mask = lambda self, mask: (
            (1.0 - mask[:, None, None, :].to(self.dtype)) * torch.finfo(self.dtype).min
        )
    return module, importlib.import_module(f"{mplug}.clip.clip")


def build(kind, task, module, clip, seed=0):
    """A tiny model of a kind for 'visual-question-answering' or 'image-captioning', float64, eval mode."""
    k = KINDS[kind]

    def tiny_clip(config, num_patches=240):
        # its constructor derives heads from widths (width // 64), so the tower is made by itself
        tower = clip.CLIP(8, IMAGE, 1, 64, PATCH, 4, 11, 8, 2, 1)
        tower.visual = clip.VisualTransformer(IMAGE, PATCH, k["vision"], VISION_LAYERS, k["heads"], 8)
        tower.visual.transformer.use_grad_ckp = False
        return tower

    module.MPlug._initialize_clip = staticmethod(tiny_clip)
    with tempfile.TemporaryDirectory() as directory:
        pathlib.Path(directory, "config_bert.json").write_text(json.dumps(k["bert"]))
        config = module.MPlugConfig(
            task=task, bert_config="config_bert.json", image_res=IMAGE, vision_width=k["vision"], distill=False,
            clip_name="ViT-B-16", beam_size=3, min_length=1, max_length=8,
        )  # fmt: skip
        config.model_dir = directory
        name = {"vqa": "MPlugForVisualQuestionAnswering", "caption": "MPlugForImageCaption"}[task]
        model = getattr(module, name)(config)
    decoder = model.text_decoder
    decoder.cls.predictions.decoder.weight = decoder.bert.embeddings.word_embeddings.weight
    DRAWN(model, seed)
    for layer in model.fusion_encoder.encoder.layer:
        # modelscope adds to the image states in place, which autograd refuses in backward (the first release does not)
        layer.register_forward_pre_hook(lambda _, args: (*args[:3], args[3].clone(), *args[4:]))
    return model.double().eval()


def redraw(model, seed):
    """Random weights everywhere, large enough that outputs depend on image, question and the word before."""
    for name, parameter in sorted(model.named_parameters()):
        rng = np.random.default_rng([seed, *name.encode()])  # by name: shared parts are equal for both tasks
        value = rng.standard_normal(tuple(parameter.shape)) * 0.25
        if re.search(r"(ln_\w+|LayerNorm|layer_norm)\.weight$", name):
            value += 1.0
        elif "conv1.weight" in name or "class_embedding" in name or "visual.positional_embedding" in name:
            value *= 0.1  # small in front of the first LayerNorm, so that a wrong epsilon shows
        elif name.endswith("word_embeddings.weight"):
            value *= rng.uniform(0.8, 1.2, size=(len(value), 1))
            value[CLS] *= 0.04  # with type and first position: a wrong epsilon of the text shows
        elif name.endswith("token_type_embeddings.weight"):
            value *= 0.04
        elif name.endswith("position_embeddings.weight"):
            value *= 6.0  # words must not repeat
            value[0] *= 0.01
        elif "text_decoder" in name and "output.dense.weight" in name:
            value *= 4.0 if "crossattention" in name else 0.7  # a word must depend on the picture
        elif name.endswith("cls.predictions.bias"):
            value[SEP] += 3.0  # some sequences must end before the longest length
            value[[PAD, CLS]] -= 9.0
        with torch.no_grad():
            parameter.copy_(torch.tensor(np.float32(np.float16(value))).to(parameter.dtype))


DRAWN = redraw  # benchmarks/mplug_parity.py draws other weights for models of full size


def words(rng, lengths, end):
    """[CLS] w w w ([SEP]) [PAD]...: ids and mask, as the reference's own tokenizer makes them."""
    ids = np.zeros((len(lengths), max(lengths)), np.int64)
    for row, n in zip(ids, lengths, strict=True):
        row[:n] = rng.integers(1, 100, n)
        row[0] = CLS
        if end:
            row[n - 1] = SEP
    mask = (np.arange(ids.shape[1])[None] < np.array(lengths)[:, None]).astype(np.int64)
    return ids, mask


def text(ids, mask):
    return types.SimpleNamespace(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask))


def inputs():
    rng = np.random.default_rng(7)
    out = {"images": rng.standard_normal((3, IMAGE, IMAGE, 3)).astype(np.float16)}
    out["questions"], out["question_mask"] = words(rng, [7, 4, 5], end=False)  # a question does not end with [SEP]
    out["answers"], out["answer_mask"] = words(rng, [3, 5, 4, 3, 6], end=True)
    out["n_answers"], out["owner"] = np.array([2, 1, 2]), np.array([0, 0, 1, 2, 2])
    out["answer_weights"] = np.array([0.7, 0.3, 1.0, 0.6, 0.4], np.float32)
    out["captions"], out["caption_mask"] = words(rng, [9, 6, 7], end=True)
    return out


def images(data, model):
    """In the dtype of the model."""
    return torch.tensor(data["images"], dtype=next(model.parameters()).dtype).permute(0, 3, 1, 2)


def gradients(loss, model):
    model.zero_grad()
    loss.backward()
    return {f"grad/{n}": p.grad for n, p in model.named_parameters() if p.grad is not None}


def generated(model, run):
    """Every (beam, min, max) that is asked for -> ids (B, beams, T) padded with -1, scores (B, beams)."""
    out = {}
    for beams, least, most in ((1, 0, 6), (3, 1, 8), (5, 4, 9)):
        model.beam_generator.beam_size = beams
        model.beam_generator.min_length, model.beam_generator.max_length = least, most
        with torch.no_grad():
            ids, scores = model.beam_generator.translate_batch(run, out_size=beams)
        padded = np.full((len(ids), beams, most + 1), -1)
        for b, rows in enumerate(ids):
            for j, row in enumerate(rows):
                padded[b, j, : len(row)] = row
        out[f"beam{beams}_{least}_{most}/ids"] = padded
        out[f"beam{beams}_{least}_{most}/scores"] = np.array([[float(s) for s in row] for row in scores])
    return out


def context_of(model, data, found):
    """What the decoder looks at, and its mask, of `stages`: the image tokens in captioning; in VQA [fused image; fused
    question]."""
    _, image, _, _, fused_image, fused_text = found
    mask = torch.ones(image.shape[:2], dtype=torch.long)
    if type(model).__name__ == "MPlugForImageCaption":
        return image, mask
    return torch.cat([fused_image, fused_text], 1), torch.cat([mask, torch.tensor(data["question_mask"])], 1)


def answered(model, data, context, mask, **options):
    """The decoder's output for the answers."""
    return model.text_decoder(
        torch.tensor(data["answers"]), attention_mask=torch.tensor(data["answer_mask"]), return_dict=True,
        encoder_hidden_states=context[data["owner"]], encoder_attention_mask=mask[data["owner"]], **options,
    )  # fmt: skip


def telling(model, data):
    with torch.no_grad():
        context = context_of(model, data, stages(model, data))
    ids = generated(model, context)["beam3_1_8/ids"][:, 0]
    rows = [tuple(row[row >= 0]) for row in ids]
    ended = sum(len(row) < ids.shape[1] for row in rows)
    return len(set(rows)) > 1 and 0 < ended < len(rows) and sum(len(set(row)) for row in rows) > 8


def image_tokens(model, data):
    """(tokens of the ViT, as the text stacks read them)"""
    tower = model.visual_encoder.visual(images(data, model), skip_last_layer=True)
    return tower, model.visn_layer_norm(model.visn_fc(tower)) if model.large else tower


def stages(model, data):
    """(image tokens, text states, image and text after every fusion layer, fused image, fused text)"""
    tower, image = image_tokens(model, data)
    question = text(data["questions"], data["question_mask"])
    states = model.text_encoder(question.input_ids, attention_mask=question.attention_mask).last_hidden_state
    seen = []
    hooks = [
        layer.register_forward_pre_hook(lambda _, args: seen.append((args[3].clone(), args[0].clone())))
        for layer in model.fusion_encoder.encoder.layer
    ]
    fused = model.fusion_encoder(
        encoder_embeds=states, attention_mask=question.attention_mask, encoder_hidden_states=image.clone(),
        encoder_attention_mask=torch.ones(image.shape[:2], dtype=torch.long), return_dict=False,
    )  # fmt: skip
    for hook in hooks:
        hook.remove()
    return tower, image, states, seen[1:] + [tuple(fused)], *fused


def vqa_numbers(model, data):
    tower, image, states, seen, *_ = found = stages(model, data)
    out = {"tower": tower, "image_tokens": image, "text_states": states}
    out["layers/image"], out["layers/text"] = (
        torch.stack(x) for x in zip(*seen, strict=True)
    )  # (L, B, P, D), (L, B, T, D)
    context, mask = context_of(model, data, found)
    answers = text(data["answers"], data["answer_mask"])
    labels = answers.input_ids.masked_fill(answers.input_ids == PAD, -100)
    output = answered(model, data, context, mask, reduction="none", labels=labels)
    question = text(data["questions"], data["question_mask"])
    loss = model(
        images(data, model), question, answers, train=True, k=data["n_answers"].tolist(),
        weights=torch.tensor(data["answer_weights"], dtype=torch.float64),
    )  # fmt: skip
    out |= {"logits": output.logits, "answer_loss": output.loss, "loss": loss}
    expected = (torch.tensor(data["answer_weights"]) * output.loss).sum() / len(data["images"])
    assert torch.allclose(loss, expected), "the loss is not what its parts say"
    out |= gradients(loss, model)
    without = {n for n, _ in model.named_parameters() if f"grad/{n}" not in out}
    stride = model.config_fusion.stride_layer
    unused = [*UNUSED, *(
        rf"fusion_encoder\.encoder\.layer\.{1 + i}\.crossattention\..*" for i in range(1, 7) if i % stride == 0
        and i < model.config_fusion.fusion_layers
    )]  # fmt: skip
    known = {n for n, _ in model.named_parameters() if any(re.fullmatch(p, n) for p in unused)}
    assert without == known, sorted(without ^ known)
    return out | generated(model, [context.detach(), mask])


def caption_numbers(model, data):
    _, image = image_tokens(model, data)
    captions = text(data["captions"], data["caption_mask"])
    mask = torch.ones(image.shape[:2], dtype=torch.long)
    logits = model.text_decoder(
        captions.input_ids, attention_mask=captions.attention_mask, encoder_hidden_states=image,
        encoder_attention_mask=mask, return_dict=True,
    ).logits  # fmt: skip
    loss = model(images(data, model), None, captions, train=True)
    out = {"logits": logits, "loss": loss} | gradients(loss, model)
    assert not any(re.match(r"grad/(text_encoder|fusion_encoder)", n) for n in out), "captioning reads no fusion"
    return out | generated(model, [image.detach(), mask])


def positions():
    """The position embedding at another image size: bilinear, corners not aligned, no antialiasing; class kept."""
    out = {"before": np.random.default_rng(3).standard_normal((17, 5)).astype(np.float32)}
    for side in (3, 6):
        grid = torch.tensor(out["before"][1:]).double().reshape(1, 4, 4, 5).permute(0, 3, 1, 2)
        grid = torch.nn.functional.interpolate(grid, size=(side, side), mode="bilinear")
        out[f"after{side}"] = np.concatenate([out["before"][:1], grid.permute(0, 2, 3, 1).reshape(-1, 5)])
    return out


def controls(kind, module, clip, data, right, seed):
    """The logits of wrong models, which a comparison at 5e-5 must tell from the right one."""

    def far(change):
        model = build(kind, "vqa", module, clip, seed)
        change(model)
        with torch.no_grad():
            context, mask = context_of(model, data, stages(model, data))
            mask = torch.ones_like(mask) if getattr(model, "no_mask", False) else mask
            return answered(model, data, context, mask).logits

    def gelu(model):
        for block in model.visual_encoder.visual.transformer.resblocks:
            block.mlp.gelu = torch.nn.GELU()

    def eps(pattern, value):
        def change(model):
            for name, part in model.named_modules():
                if isinstance(part, torch.nn.LayerNorm) and re.search(pattern, name):
                    part.eps = value

        return change

    def heads(model):
        for part in model.modules():
            if type(part).__name__ == "BertSelfAttention":
                part.num_attention_heads, part.attention_head_size = 2, 12

    def stride(value):
        def change(model):
            for layer in model.fusion_encoder.encoder.layer:
                layer.stride_layer = value

        return change

    def no_outer(model):  # image := image part, without the old image
        for i, layer in enumerate(model.fusion_encoder.encoder.layer[1:]):
            if i and i % layer.stride_layer == 0:
                layer.register_forward_hook(lambda _, args, out: (
                    torch.cat([out[0][:, : args[3].shape[1]] - args[3], out[0][:, args[3].shape[1] :]], 1), *out[1:]
                ))  # fmt: skip

    table = {
        "gelu": gelu, "vision_eps": eps("visual_encoder", 1e-6), "text_eps": eps("text_|fusion", 1e-5), "text_heads": heads,
        "no_joint": stride(100), "stride": stride(2), "no_outer_residual": no_outer,
        "question_mask": lambda model: setattr(model, "no_mask", True),
    }  # fmt: skip
    wrong = {}
    for name, change in table.items():
        logits = far(change)
        where = torch.tensor(data["answer_mask"])[..., None]
        print(f"  {kind}: {name}: logits move by {float(((logits - right).abs() * where).max()):.2g}")
        wrong[f"wrong/{name}"] = logits[:N_WRONG]
    return wrong


KEPT = (  # the stored gradients, one of each kind of tensor; of queries in fusion none, as the last softmax is saturated there
    r"visual\.(conv1|class_embedding|positional_embedding|ln_pre)|resblocks\.1\.(attn\.(in|out)_proj_?\.?weight|mlp\.c_fc\.bias)"
    r"|visn_fc|text_encoder\.(embeddings\.(token_type|LayerNorm)|encoder\.layer\.1\.attention\.self\.key\.weight)"
    r"|fusion_encoder\.encoder\.layer\.(1|4|6)\.(attention\.self\.value|crossattention\.self\.value|output\.dense)\.weight"
    r"|text_decoder\.(bert\.embeddings\.(word|token_type)|cls\.predictions\.(bias|transform\.dense\.weight))"
    r"|text_decoder\.bert\.encoder\.layer\.0\.crossattention\.self\.key\.weight"
)


def main():
    module, clip = reference()
    data = inputs()
    np.savez_compressed(HERE / "mplug_positions.npz", **positions())
    for kind, k in KINDS.items():
        torch.manual_seed(0)
        seed = k["seed"]
        vqa, caption = (build(kind, task, module, clip, seed) for task in ("vqa", "caption"))
        assert all(telling(model, data) for model in (vqa, caption)), f"{kind}: take another seed"
        numbers = {f"vqa/{n}": x for n, x in vqa_numbers(vqa, data).items()}
        numbers |= {f"caption/{n}": x for n, x in caption_numbers(caption, data).items()}
        single = vqa_numbers_single(kind, module, clip, data, seed)  # float32 must write the same words
        for name in [n for n in single if n.endswith("/ids")]:
            assert np.array_equal(single[name], numbers[f"vqa/{name}"]), f"float32 writes other words: {name}"
        numbers |= controls(kind, module, clip, data, numbers["vqa/logits"], seed)
        numbers = {n: x.detach().numpy() if isinstance(x, torch.Tensor) else x for n, x in numbers.items()}
        logits, where = numbers["vqa/logits"], data["answer_mask"] == 1
        error = np.abs(single["logits"] - logits)[where].max()
        print(f"{kind}: float32 error {error:.2g} at logits of std {logits[where].std():.2g}")
        for task in ("vqa", "caption"):
            ids = numbers[f"{task}/beam3_1_8/ids"]
            print(f"  {task} beam 3: {[[int(t) for t in row if t >= 0] for row in ids[:, 0]]}")
            ids = numbers[f"{task}/beam5_4_9/ids"].reshape(-1, 10)
            print(f"    beam 5: {sum(SEP in row[:-1][row[1:] >= 0] for row in ids)} hypotheses go on after [SEP]")
        numbers = {n: x for n, x in numbers.items() if "grad/" not in n or re.search(KEPT, n)}
        if kind == "large":  # its largest tensor
            numbers = {n: x for n, x in numbers.items() if "conv1" not in n}
        numbers = {
            n: np.asarray(x, np.int32 if np.asarray(x).dtype.kind == "i" else np.float32) for n, x in numbers.items()
        }
        directory = HERE / f"mplug_{kind}_tiny"
        directory.mkdir(exist_ok=True)
        (directory / "config_bert.json").write_text(json.dumps(k["bert"], indent=1))
        said = dict(
            task="visual-question-answering", bert_config="config_bert.json", clip_name="ViT-B-16", image_res=IMAGE,
            vision_width=k["vision"], clip_vision_width=k["vision"], clip_vision_layers=VISION_LAYERS,
            clip_vision_patch_size=PATCH, clip_vision_heads=k["heads"],
        )  # fmt: skip
        (directory / "config.yaml").write_text("".join(f"{key}: {value}\n" for key, value in said.items()))
        state = {n: x.half() for n, x in vqa.state_dict().items() if x.is_floating_point()}
        torch.save({"model": state}, directory / "pytorch_model.bin")
        np.savez_compressed(HERE / f"mplug_{kind}_tiny.npz", **data, **numbers)


def vqa_numbers_single(kind, module, clip, data, seed):
    """The same in float32."""
    model = build(kind, "vqa", module, clip, seed).float()
    with torch.no_grad():
        context, mask = context_of(model, data, stages(model, data))
        logits = answered(model, data, context, mask).logits
    return {"logits": logits.numpy()} | generated(model, [context, mask])


if __name__ == "__main__":
    main()
