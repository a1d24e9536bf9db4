"""Write the BLIP golden numbers: tiny transformers checkpoints, their inputs and their outputs.

Run it with torch and transformers installed (written with torch 2.13.0, transformers 5.23.0):  python make_blip.py
It writes, next to itself,
  blip_caption_tiny/  blip_vqa_tiny/          checkpoints as `save_pretrained` writes them
  blip_caption_tiny.npz  blip_vqa_tiny.npz    inputs and reference outputs (key list: `caption_numbers`, `vqa_numbers`)
  blip_bin_tiny/                              a smaller checkpoint, the same weights as .bin and as .safetensors
  torch_tiny.pth  torch_tiny.npz              tensors in every layout that `torch.save` can store

Weights are drawn in float32, the reference runs in float64 and is stored as float32, so a comparison sees only the
error of the implementation under test. Tokens are checked to be the same in float32 and to differ between images.
Patch kernel, class token and positions are drawn small, as in trained models: the first LayerNorm then has a small
variance and a wrong epsilon shows in the logits.
"""

import copy
import functools
import pathlib

import numpy as np
import torch
import transformers
from transformers.models.blip import modeling_blip_text

HERE = pathlib.Path(__file__).parent
PAD, CLS, SEP, BOS, ENC = 0, 1, 2, 95, 96
PROMPT = [BOS, 5, 6, 7]
MAX_LENGTH, BEAMS = 12, 3
SMOOTHING = 0.1
IDS = dict(bos_token_id=BOS, sep_token_id=SEP, eos_token_id=SEP, pad_token_id=PAD, cls_token_id=CLS, enc_token_id=ENC)


def settings_of(vision, text):
    """The configuration of a model from the sizes of its towers."""
    shared = dict(vocab_size=97, encoder_hidden_size=vision["hidden_size"], layer_norm_eps=1e-12, **IDS)
    return dict(vision_config=vision | dict(layer_norm_eps=1e-6), text_config=text | shared)


CAPTION = settings_of(
    dict(hidden_size=48, num_hidden_layers=3, num_attention_heads=4, intermediate_size=80, patch_size=8, image_size=40),
    dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=56, max_position_embeddings=24),
)
VQA = settings_of(
    dict(hidden_size=40, num_hidden_layers=2, num_attention_heads=5, intermediate_size=56, patch_size=4, image_size=24),
    dict(hidden_size=40, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, max_position_embeddings=24),
)
MINIMAL = settings_of(
    dict(hidden_size=12, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, patch_size=4, image_size=8),
    dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12, max_position_embeddings=6),
)


# ---------------------------------------------------------------------------------------------- models
def pass_cross_attention_mask():
    """transformers 5.23.0 hands the encoder mask to text cross-attention under a name that is then overwritten by None.

    Padded question tokens therefore receive attention. Route the mask to the argument that is used.
    """
    original = modeling_blip_text.BlipTextSelfAttention.forward

    @functools.wraps(original)
    def forward(
        self, hidden_states, attention_mask=None, encoder_hidden_states=None, encoder_attention_mask=None, **kw
    ):
        if encoder_hidden_states is not None and encoder_attention_mask is None:
            encoder_attention_mask = attention_mask
        return original(self, hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask, **kw)

    modeling_blip_text.BlipTextSelfAttention.forward = forward


def redraw(model, seed):
    """Random weights everywhere, large enough that the outputs depend on the image."""
    rng = np.random.default_rng(seed)
    for name, parameter in sorted(model.named_parameters()):
        value = rng.standard_normal(tuple(parameter.shape)) * 0.25
        if "norm" in name.lower() and name.endswith("weight"):
            value += 1.0
        elif any(part in name for part in ("class_embedding", "vision_model.embeddings.position", "embedding.bias")):
            value *= 0.2
        elif "patch_embedding.weight" in name:
            value *= 0.04
        elif "word_embeddings" in name:  # rows of different sizes; the prompt's are small, so text eps shows too
            value *= rng.uniform(0.8, 1.2, size=(len(value), 1))
            value[[*PROMPT, ENC]] *= 0.05
        elif "position_embeddings" in name:
            value[len(PROMPT) :] *= 2.0  # later positions are large, so that words do not repeat
            value[: len(PROMPT)] *= 0.05
        elif "text" in name and "output.dense.weight" in name:
            value *= 1.0 if "crossattention" in name else 0.5  # a word must depend on the one before and on the image
        elif name.endswith("cls.predictions.bias"):
            value[SEP] += 1.0  # some sequences must end before the longest length
            value[[PAD, CLS, BOS, ENC]] -= 9.0  # never written
        parameter.data = torch.tensor(value, dtype=torch.float32)
    model.tie_weights()
    centre_vocabulary(model.eval(), rng)
    return model


def centre_vocabulary(model, rng):
    """Take the mean over random inputs out of the logits: otherwise the same word wins for every image."""
    vision, text = model.config.vision_config, model.config.text_config
    images = pictures(rng, 16, vision.image_size)
    length = min(8, text.max_position_embeddings)
    with torch.no_grad():
        states = model.vision_model(images)[0]
        if hasattr(model, "text_encoder"):
            states = model.text_encoder(*ragged(rng, [length] * 16, [ENC], length), encoder_hidden_states=states)[0]
        tokens, _ = ragged(rng, [length] * 16, [BOS], length)
        logits = model.text_decoder(tokens, encoder_hidden_states=states).logits
        model.text_decoder.cls.predictions.bias -= logits.mean((0, 1)) - model.text_decoder.cls.predictions.bias


def build(kind, settings, seed=None, state=None, **changes):
    """A model with drawn weights (seed) or given weights (state); changes: {'vision_config.key': value}."""
    settings = copy.deepcopy(settings)
    for key, value in changes.items():
        part, key = key.split("__")
        settings[part][key] = value
    config = transformers.BlipConfig(**settings)
    config._attn_implementation = "eager"
    model = kind(config)
    if state is None:
        return redraw(model, seed)
    model.load_state_dict(state)
    model.tie_weights()
    return model.eval()


def saved(kind, settings, seed, name):
    """A model that is saved as `name`: in float32, and in float64 as the reference."""
    single = build(kind, settings, seed=seed)
    single.save_pretrained(HERE / name)
    model = copy.deepcopy(single).double()
    model.tie_weights()
    return single, model


WRONG = {
    "vision_eps": dict(vision_config__layer_norm_eps=1e-5),
    "text_eps": dict(text_config__layer_norm_eps=1e-6),
    "tanh_gelu": dict(vision_config__hidden_act="gelu_pytorch_tanh", text_config__hidden_act="gelu_pytorch_tanh"),
    "text_heads": dict(text_config__num_attention_heads=2),
}


def wrong_models(kind, settings, state):
    """The same weights under a wrong configuration: what a mistake in an implementation would compute."""
    heads = {"vision_heads": dict(vision_config__num_attention_heads=2 if settings is CAPTION else 1)}
    for name, changes in {**WRONG, **heads}.items():
        yield name, build(kind, settings, state=state, **changes).double()


def block_outputs(layers, call):
    """Run call(); return its result and the outputs of the layers, stacked on a leading axis."""
    seen = []
    hooks = [layer.register_forward_hook(lambda _m, _i, out: seen.append(out)) for layer in layers]
    result = call()
    for hook in hooks:
        hook.remove()
    return result, torch.stack(seen)


def image_tokens(model, images):
    """Image tokens, and the states after every layer of the image tower."""
    out, blocks = block_outputs(model.vision_model.encoder.layers, lambda: model.vision_model(images))
    return {"vision_blocks": blocks[:, :2], "image_tokens": out[0]}  # of layers, two pictures are enough


def ragged(rng, lengths, first, width):
    """Token rows: first tokens, random words (10..94), SEP, then padding to width; with their 0/1 mask."""
    tokens = np.full((len(lengths), width), PAD)
    for row, length in zip(tokens, lengths, strict=True):
        row[:length] = [*first, *rng.integers(10, 95, length - len(first) - 1), SEP]
    return torch.tensor(tokens), torch.tensor(tokens != PAD).long()


def pictures(rng, count, size):
    """Normalised pixels (count, 3, size, size): noise plus a different smooth wave for each picture."""
    y, x = np.mgrid[:size, :size] / size
    out = rng.standard_normal((count, 3, size, size))
    for i in range(count):
        for c in range(3):
            fy, fx, phase = rng.uniform(0, 12, 3)
            out[i, c] += 1.5 * np.sin(fy * y + fx * x + phase)
    return torch.tensor((np.round(out * 8) / 8).astype(np.float32))  # a coarse grid compresses well


def token_rows(sequences):
    """Generated tokens padded to MAX_LENGTH. After the end beam search writes SEP (its pad is `pad_id or eos_id`)."""
    rows = np.full((len(sequences), MAX_LENGTH), PAD)
    rows[:, : sequences.shape[1]] = sequences.numpy()
    rows[np.cumsum(rows == SEP, 1) - (rows == SEP) > 0] = PAD
    return rows


def decoded(min_length, generate):
    """Greedy, default beam and constrained beam outputs of generate(**options). Lengths count the prompt."""
    out = {}
    generate = functools.partial(generate, do_sample=False, return_dict_in_generate=True, output_scores=True)
    greedy = generate(num_beams=1, max_length=MAX_LENGTH, output_logits=True)
    out["greedy_tokens"] = token_rows(greedy.sequences)
    out["greedy_logits"] = torch.stack(greedy.logits, 1)  # (B, steps, V): step 0 predicts the first new token
    beam = generate(num_beams=BEAMS, max_length=MAX_LENGTH)
    out["beam_tokens"], out["beam_scores"] = token_rows(beam.sequences), beam.sequences_scores
    beam2 = generate(num_beams=BEAMS, max_length=MAX_LENGTH, length_penalty=0.0, min_length=min_length)
    out["beam2_min_length"], out["beam2_length_penalty"] = min_length, 0.0
    out["beam2_tokens"], out["beam2_scores"] = token_rows(beam2.sequences), beam2.sequences_scores
    return out


def check_decoded(double, single):
    """The tokens must be worth comparing: stable in float32, different between images, of different lengths."""
    for key in ("greedy_tokens", "beam_tokens", "beam2_tokens"):
        rows = {tuple(row) for row in double[key]}
        assert np.array_equal(double[key], single[key]), f"{key}: float32 and float64 disagree; take another seed"
        assert len(rows) >= 4, f"{key}: too few different rows; take another seed: {double[key]}"
    ended = (double["greedy_tokens"] == SEP).any(1)
    assert ended.any() and not ended.all(), (
        f"no mix of ended and cut rows; take another seed: {double['greedy_tokens']}"
    )
    assert (double["greedy_tokens"] != double["beam_tokens"]).any(), "beam search found nothing new"
    assert (double["beam2_tokens"] != double["beam_tokens"]).any(), "the constrained beam search changed nothing"
    top = torch.sort(double["greedy_logits"], -1).values
    margin = float((top[..., -1] - top[..., -2]).min())
    start = MAX_LENGTH - len(double["greedy_logits"][0])  # the prompt does not count
    words = np.mean([len(set(row[start:])) for row in double["greedy_tokens"]])
    print(f"  smallest greedy margin {margin:.4f}, different tokens in a row {words:.1f}")
    assert margin > 5e-3 and words > 3, f"too close to a tie, or too repetitive; take another seed: {margin}, {words}"


def save(name, numbers):
    """Write the npz: floats as float32, integers as int32."""
    arrays = {}
    for key, value in numbers.items():
        value = value.detach().numpy() if torch.is_tensor(value) else np.asarray(value)
        arrays[key] = value.astype(np.float32 if value.dtype.kind == "f" else np.int32)
    np.savez_compressed(HERE / name, **arrays)
    print(name, f"{(HERE / name).stat().st_size / 1e3:.0f} kB")
    for key, value in arrays.items():
        print(f"  {key} {value.dtype} {value.shape}")


def shared_ids(numbers):
    numbers.update(pad_id=PAD, cls_id=CLS, sep_id=SEP, bos_id=BOS, enc_id=ENC, max_length=MAX_LENGTH, beams=BEAMS)


def gradients(model, loss, names):
    """{'grad/' + name: d loss / d parameter}"""
    model.zero_grad()
    loss.backward()
    leaves = dict(model.named_parameters())
    return {f"grad/{name}": leaves[name].grad.clone() for name in names}


def channels_last(images):
    return images.permute(0, 2, 3, 1)


# ---------------------------------------------------------------------------------------------- captioning
CAPTION_GRADS = (
    "text_decoder.bert.embeddings.word_embeddings.weight",
    "text_decoder.bert.embeddings.position_embeddings.weight",
    "text_decoder.bert.encoder.layer.1.crossattention.self.key.weight",
    "text_decoder.bert.encoder.layer.0.attention.output.LayerNorm.weight",
    "text_decoder.cls.predictions.bias",
    "vision_model.embeddings.position_embedding",
    "vision_model.embeddings.patch_embedding.weight",
    "vision_model.encoder.layers.1.self_attn.qkv.weight",
    "vision_model.encoder.layers.2.self_attn.qkv.bias",
    "vision_model.encoder.layers.0.layer_norm2.weight",
)


def caption_logits(model, images, tokens, mask):
    states = model.vision_model(images)[0]
    return model.text_decoder(tokens, mask, encoder_hidden_states=states).logits


def caption_losses(model, images, tokens, mask, labels, smoothing):
    """(per-example sums over scored tokens, mean over all scored tokens)"""
    model.text_decoder.label_smoothing = smoothing
    states = model.vision_model(images)[0]
    sums, mean = (
        model.text_decoder(tokens, mask, encoder_hidden_states=states, labels=labels, reduction=kind).loss
        for kind in ("none", "mean")
    )
    return sums, mean


def caption_decoded(model, images):
    prompt = torch.tensor([[*PROMPT, SEP]] * len(images))  # generate() drops the last id
    images = images.to(next(model.parameters()).dtype)
    return decoded(8, lambda **options: model.generate(images, prompt.clone(), torch.ones_like(prompt), **options))


def caption_numbers(seed=5):
    rng = np.random.default_rng(100 + seed)
    single, model = saved(transformers.BlipForConditionalGeneration, CAPTION, seed, "blip_caption_tiny")
    images32 = pictures(rng, 5, 40)
    images = images32.double()
    tokens, mask = ragged(rng, [10, 7, 6, 9, 10], PROMPT, 10)
    labels = tokens.masked_fill(mask == 0, -100)
    labels[:, : len(PROMPT)] = -100

    numbers = dict(images=channels_last(images32), tokens=tokens, token_mask=mask, labels=labels, prompt=PROMPT)
    shared_ids(numbers)
    with torch.no_grad():
        numbers |= image_tokens(model, images)
        decoder, about = model.text_decoder, {"encoder_hidden_states": numbers["image_tokens"]}
        out, numbers["decoder_blocks"] = block_outputs(
            decoder.bert.encoder.layer, lambda: decoder(tokens, mask, **about)
        )
        numbers["logits"] = out.logits
        large = pictures(rng, 1, 56)
        numbers["resized_images"] = channels_last(large)
        numbers["resized_image_tokens"] = model.vision_model(large.double(), interpolate_pos_encoding=True)[0]
        noise = caption_logits(single, images32, tokens, mask) - out.logits
        print(f"caption: logits {out.logits.std():.2f} std, float32 noise {noise.abs().max():.1e}")
        for name, wrong in wrong_models(type(model), CAPTION, single.state_dict()):
            values = caption_logits(wrong, images, tokens, mask)
            numbers[f"wrong/{name}"] = values[:3]  # three rows are enough
            print(f"  wrong {name}: {(values - out.logits)[mask.bool()].abs().max():.1e}")
        numbers |= caption_decoded(model, images)
        check_decoded(numbers, caption_decoded(single, images))
    for smoothing, suffix in ((0.0, ""), (SMOOTHING, "_smooth")):
        sums, mean = caption_losses(model, images, tokens, mask, labels, smoothing)
        numbers |= {f"loss_sums{suffix}": sums, f"loss{suffix}": mean}
    numbers["smoothing"] = SMOOTHING
    numbers |= gradients(model, mean, CAPTION_GRADS)  # of loss_smooth
    save("blip_caption_tiny.npz", numbers)


# ---------------------------------------------------------------------------------------------- question answering
VQA_GRADS = (
    "text_encoder.embeddings.word_embeddings.weight",
    "text_encoder.embeddings.position_embeddings.weight",
    "text_encoder.encoder.layer.1.crossattention.self.key.weight",
    "text_encoder.encoder.layer.0.attention.self.value.bias",
    "text_decoder.bert.embeddings.word_embeddings.weight",
    "text_decoder.bert.encoder.layer.0.crossattention.self.key.weight",
    "text_decoder.bert.encoder.layer.1.output.LayerNorm.weight",
    "text_decoder.cls.predictions.bias",
    "vision_model.embeddings.class_embedding",
    "vision_model.encoder.layers.0.self_attn.qkv.weight",
    "vision_model.post_layernorm.weight",
)


def question_states(model, images, questions, mask):
    return model.text_encoder(questions, mask, encoder_hidden_states=model.vision_model(images)[0])[0]


def answered(model, states, state_mask, answers, answer_mask, **options):
    """The decoder's output for answers about question states."""
    about = dict(encoder_hidden_states=states, encoder_attention_mask=state_mask)
    return model.text_decoder(answers, answer_mask, **about, **options)


def answer_logits(*inputs):
    return answered(*inputs).logits


def answers_decoded(model, images, questions, mask):
    """Answers decoded from question states under the TRUE question mask (model.generate would use all ones)."""
    states = question_states(model, images.to(next(model.parameters()).dtype), questions, mask)
    bos = torch.full((len(states), 1), BOS)
    about = dict(input_ids=bos, attention_mask=torch.ones_like(bos), eos_token_id=SEP, pad_token_id=PAD)
    about |= dict(encoder_hidden_states=states, encoder_attention_mask=mask)
    return decoded(5, functools.partial(model.text_decoder.generate, **about))


def check_question_mask(model, images, questions, mask, answers, answer_mask):
    """Padded question tokens must not matter: neither junk in them nor leaving them out."""
    states = question_states(model, images, questions, mask)
    first = answers[: len(states)], answer_mask[: len(states)]
    right = answer_logits(model, states, mask, *first)
    junk = torch.where(mask[..., None] == 0, torch.randn_like(states) * 9, states)
    moved = (answer_logits(model, junk, mask, *first) - right).abs().max()
    row, length = 1, int(mask[1].sum())
    alone = question_states(
        model, images[row : row + 1], questions[row : row + 1, :length], mask[row : row + 1, :length]
    )
    cut = answer_logits(model, alone, mask[row : row + 1, :length], first[0][row : row + 1], first[1][row : row + 1])
    apart = (cut[0] - right[row])[first[1][row].bool()].abs().max()
    print(f"  junk in question pads moves logits by {moved:.1e}; row {row} padded against unpadded {apart:.1e}")
    assert moved == 0 and apart < 1e-5 and length < mask.shape[1]


def vqa_numbers(seed=7):
    rng = np.random.default_rng(200 + seed)
    torch.manual_seed(0)
    single, model = saved(transformers.BlipForQuestionAnswering, VQA, seed, "blip_vqa_tiny")
    images32 = pictures(rng, 5, 24)
    images = images32.double()
    questions, mask = ragged(rng, [9, 5, 7, 4, 6], [ENC], 9)
    answers, answer_mask = ragged(rng, [4, 6, 3, 5, 4, 3, 5, 4], [BOS], 6)
    owner = torch.tensor([0, 0, 1, 2, 2, 2, 3, 4])  # the question that an answer belongs to
    weights = torch.tensor([0.75, 0.25, 1.0, 0.5, 0.3, 0.2, 1.0, 0.6], dtype=torch.float64)
    labels = answers.masked_fill(answer_mask == 0, -100)
    numbers = dict(
        images=channels_last(images32),
        questions=questions,
        question_mask=mask,
        answers=answers,
        answer_mask=answer_mask,
        labels=labels,
        owner=owner,
        weights=weights,
    )
    shared_ids(numbers)
    with torch.no_grad():
        numbers |= image_tokens(model, images)
        encoded, numbers["encoder_blocks"] = block_outputs(
            model.text_encoder.encoder.layer,
            lambda: model.text_encoder(questions, mask, encoder_hidden_states=numbers["image_tokens"]),
        )
        states = encoded[0]
        numbers["question_states"] = states
        logits, numbers["decoder_blocks"] = block_outputs(
            model.text_decoder.bert.encoder.layer,
            lambda: answer_logits(model, states[owner], mask[owner], answers, answer_mask),
        )
        numbers["logits"] = logits
        single_states = question_states(single, images32, questions, mask)
        noise = answer_logits(single, single_states[owner], mask[owner], answers, answer_mask) - logits
        print(f"vqa: logits {logits.std():.2f} std, float32 noise {noise.abs().max():.1e}")
        check_question_mask(model, images, questions, mask, answers, answer_mask)
        wrong = {"question_mask": answer_logits(model, states[owner], None, answers, answer_mask)}
        for name, other in wrong_models(type(model), VQA, single.state_dict()):
            other_states = question_states(other, images, questions, mask)
            wrong[name] = answer_logits(other, other_states[owner], mask[owner], answers, answer_mask)
        for name, values in wrong.items():
            numbers[f"wrong/{name}"] = values[:3]
            print(f"  wrong {name}: {(values - logits)[answer_mask.bool()].abs().max():.1e}")
        numbers |= answers_decoded(model, images, questions, mask)
        check_decoded(numbers, answers_decoded(single, images, questions, mask))
    for smoothing, suffix in ((0.0, ""), (SMOOTHING, "_smooth")):
        states = question_states(model, images, questions, mask)
        model.text_decoder.label_smoothing = smoothing
        about = states[owner], mask[owner], answers, answer_mask
        sums = answered(model, *about, labels=labels, reduction="none").loss  # of the token cross-entropies
        loss = (sums * weights).sum() / len(questions)
        numbers |= {f"loss_sums{suffix}": sums, f"loss{suffix}": loss}
    numbers["smoothing"] = SMOOTHING
    numbers |= gradients(model, loss, VQA_GRADS)  # of loss_smooth
    save("blip_vqa_tiny.npz", numbers)


# ---------------------------------------------------------------------------------------------- torch files
def torch_files():
    model = build(transformers.BlipForConditionalGeneration, MINIMAL, seed=3)
    directory = HERE / "blip_bin_tiny"
    model.save_pretrained(directory)
    torch.save(model.state_dict(), directory / "pytorch_model.bin")  # with both names of the tied entries

    rng = np.random.default_rng(4)
    base = torch.tensor(rng.standard_normal((5, 6)).astype(np.float32))
    tensors = {
        "float32": base,
        "float64": base.double() * 3,
        "float16": base.half(),
        "bfloat16": base.bfloat16(),
        "int64": torch.arange(7),
        "int32": torch.arange(4, dtype=torch.int32) - 2,
        "uint8": torch.arange(5).byte(),
        "bool": base > 0,
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "transposed": base.T,
        "sliced": base[1:4, ::2],
        "shared": base[2],
        "expanded": base[:, :1].expand(5, 4),
        "parameter": torch.nn.Parameter(base[:2].clone()),
    }
    torch.save({"model": tensors, "epoch": 3}, HERE / "torch_tiny.pth")
    np.savez_compressed(
        HERE / "torch_tiny.npz",
        **{
            key: (value.float() if value.dtype == torch.bfloat16 else value).detach().numpy()
            for key, value in tensors.items()
        },
    )


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    pass_cross_attention_mask()
    caption_numbers()
    vqa_numbers()
    torch_files()
