"""PaliGemma and SmolVLM of a few thousand parameters with awkward sizes, their toy tokenizers, and a reference without caches.

`Whole` computes a text the slow way: one sequence, one mask, no cache, nothing shared or padded.
"""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft.adapt import sites
from jaxpeft.data.base import Split
from jaxpeft.inputs.bpe import Bpe
from jaxpeft.models import paligemma, smolvlm

FOLDER = pathlib.Path(__file__).parent / "golden" / "vlm_inputs"
KINDS = ("paligemma", "smolvlm")
SIZES = dict(
    image_size=12, patch_size=3, vision_width=12, vision_layers=2, vision_heads=4, vision_mlp=20, text_width=14,
    text_layers=2, text_heads=4, kv_heads=2, head_size=6, text_mlp=20, max_positions=64,
)  # fmt: skip


@functools.cache
def tokenizer(kind) -> Bpe:
    return Bpe.from_file(FOLDER / kind)


class Whole:
    """The reference: logits (T, V) of every token of one text. `at`: where the id of the image stands in a prompt of SmolVLM;
    the prompts of PaliGemma have none."""

    def whole(self, image_YXC, prompt_Q, text_T, at):
        decoder = self.decoder
        image_1PD, words_1QD = self.stage({"image": image_YXC[None]}, "image_tokens"), decoder.words(prompt_Q[None])
        parts = words_1QD[:, :at], image_1PD, words_1QD[:, at + self.causal :]
        x_1SD = jnp.concatenate(parts, axis=1)
        n_prefix = x_1SD.shape[1]
        x_1SD = jnp.concatenate([x_1SD, decoder.words(text_T[None, :-1])], axis=1)
        n_bare = x_1SD.shape[1]
        x_1SD, _ = sites.embed(decoder, x_1SD, None, lambda rows_KD: rows_KD)
        n_added = x_1SD.shape[1] - n_bare
        step = jnp.arange(-n_added, n_bare)
        mask_1SS = (step[None] <= step[:, None])[None]
        if not self.causal:
            mask_1SS |= ((step[None] < n_prefix) & (step[:, None] < n_prefix))[None]
        position_1S = (step + sites.shift(decoder))[None]
        x_1SD, _ = decoder.blocks(x_1SD, None, position_1S, mask_1SS, None, 0)
        return decoder._logits(x_1SD[:, n_added + n_prefix - 1 :])[0]


class WholePaliGemma(Whole, paligemma.PaliGemma):
    pass


class WholeSmolVLM(Whole, smolvlm.SmolVLM):
    pass


@functools.cache
def model(kind, **overrides):
    words = tokenizer(kind)
    ids = {"vocab_size": len(words) + 3, "pad_id": words.pad_id, "image_id": words.id_of("<image>")}
    sizes = SIZES | ids | overrides  # rows without a token
    if kind == "paligemma":
        return WholePaliGemma.build(paligemma.PaliGemmaConfig(**sizes), words)
    return WholeSmolVLM.build(smolvlm.SmolVLMConfig(**sizes, shuffle=2), words)


@functools.cache
def params(kind, seed=0, **overrides):
    """Random weights far from zero, so that every leaf matters."""
    net = model(kind, **overrides)
    shapes = jax.eval_shape(lambda: net.init(jax.random.key(0), net.example()))["params"]
    rng = np.random.default_rng(seed)
    drawn = jax.tree.map(lambda s: jnp.asarray(rng.normal(0, 0.3, s.shape), jnp.float32), shapes)
    return jax.tree_util.tree_map_with_path(lambda path, x: x + 1 if path[-1].key == "scale" else x, drawn)


LENGTHS = (2, 5, 2)  # of the questions in one batch


def batch(kind, n_texts=2, seed=0):
    """Images, prompts of different lengths with padding on either side, and texts with a placeholder in front."""
    rng, pad = np.random.default_rng(seed), tokenizer(kind).pad_id
    words = lambda *shape: rng.integers(300, 398, shape).astype(np.int32)  # noqa: E731
    prompt = np.full((len(LENGTHS), 3 + max(LENGTHS)), pad, np.int32)
    for i, (row, n) in enumerate(zip(prompt, LENGTHS, strict=True)):
        ids = words(2 + n)
        if kind == "smolvlm":
            ids = np.insert(ids, 2, model(kind).config.image_id)
        row[slice(-len(ids), None) if i % 2 == 0 else slice(len(ids))] = ids
    tokens = np.concatenate([np.full((len(LENGTHS), n_texts, 1), pad), words(len(LENGTHS), n_texts, 3)], axis=2)
    image = rng.integers(0, 256, (len(LENGTHS), 12, 12, 3)).astype(np.uint8)
    return {"image": image, "prompt": prompt, "tokens": tokens.astype(np.int32)}


SPLIT = Split(
    "val",
    [np.random.default_rng(i).integers(0, 256, (12, 12, 3), np.uint8) for i in range(3)],
    [
        {"image_id": str(i), "captions": ["a cat is here", "the dog"][: 1 + i], "questions": [
            {"question_id": f"{i}{k}", "question": "what is the dog?"[: 8 + 4 * k], "type": "", "answers": ["a cat", "the dog"]}
            for k in range(1 + i)
        ]} for i in range(3)
    ],
)  # fmt: skip
