"""BLIP's pre-training objectives (Li et al. 2022, arXiv 2201.12086, section 3.2) at toy size. See apps/pretrain.py.

    text     masked language modelling on text alone, in place of BLIP's initialisation from BERT
    lm       language modelling of two web captions per image
    lm_itm   the same, and image-text matching against hard negatives
    qa       the answers to two questions per image, and no captions: for bases that know one task, as `lm` knows the other

Encoder and decoder share everything except self-attention, as in BLIP: of the encoder only the self-attention is stored, and
`shared` adds the rest before every forward pass. BLIP mines negatives with a contrastive head; at this size word overlap is
enough.
"""

import functools

import jax
import jax.numpy as jnp

from jaxpeft.apps.pretrain import caption_loss, masked_loss, matching_loss
from jaxpeft.data import scenes
from jaxpeft.models.blip import Blip, BlipConfig
from jaxpeft.models.blip_tokens import BlipTokenizer
from jaxpeft.tree import Tree

ALIASES = {f"text_encoder/{part}": f"text_decoder/{part}" for part in ("embed",)} | {
    f"text_encoder/blocks/{part}": f"text_decoder/blocks/{part}"
    for part in ("cross_attention", "cross_norm", "mlp", "mlp_norm")
}
NAME = "tiny BLIP on scenes"


def tokenizer() -> BlipTokenizer:
    """The words of the scenes."""
    return BlipTokenizer.from_words(scenes.WORDS)


def model(tokenizer: BlipTokenizer, **architecture) -> Blip:
    """The model that is trained, with every part."""
    ids = {name: getattr(tokenizer, name) for name in ("pad_id", "cls_id", "sep_id", "bos_id", "enc_id")}
    return Blip.build(BlipConfig(**architecture, vocab_size=len(tokenizer), question_encoder=True, **ids), tokenizer)


def shared(params: Tree) -> Tree:
    """The full parameters from the stored ones: the encoder gets everything except self-attention from the decoder."""
    decoder, own = params["text_decoder"], params["text_encoder"]["blocks"]
    blocks = {part: decoder["blocks"][part] for part in ("cross_attention", "cross_norm", "mlp", "mlp_norm")}
    return {
        "vision": params["vision"],
        "text_decoder": decoder,
        "text_encoder": {"embed": decoder["embed"], "blocks": blocks | own},
    }


def init(model: Blip, seed: int) -> Tree:
    """The initial stored parameters and matching head."""
    full = jax.jit(lambda: model.init(jax.random.key(seed), model.example()))()["params"]
    own = {part: full["text_encoder"]["blocks"][part] for part in ("self_attention", "self_norm")}
    itm = {"kernel": jnp.zeros((model.config.text_width, 2)), "bias": jnp.zeros(2)}
    stored = {"vision": full["vision"], "text_decoder": full["text_decoder"], "text_encoder": {"blocks": own}}
    return stored | {"itm": itm}


def after_text(params: Tree) -> Tree:
    """Encoder and decoder get the same self-attention; both of BLIP's are initialised from BERT."""
    blocks = params["text_decoder"]["blocks"]
    return params | {"text_encoder": {"blocks": {part: blocks[part] for part in ("self_attention", "self_norm")}}}


def loss(stage: str, model: Blip, variables: Tree, batch: dict, rngs: dict) -> tuple[jax.Array, jax.Array]:
    """The loss of a stage, with a count of 1, as each term is a mean. `stage`: 'text', 'lm', 'lm_itm' or 'qa'."""
    params = variables["params"]
    apply = functools.partial(model.apply, {"params": shared(params)}, rngs=rngs)
    if stage == "text":
        return masked_loss(apply, batch), jnp.float32(1)
    image_BPD = apply(batch["image"], method="encode_image")
    if stage == "qa":
        asked_RT = batch["answer_prompt"]
        image_RPD = jnp.repeat(image_BPD, asked_RT.shape[0] // image_BPD.shape[0], axis=0)
        states_RTD = apply(image_RPD, asked_RT, method="encode_question")
        answers = {name.removeprefix("answer_"): x for name, x in batch.items() if name.startswith("answer_")}
        return caption_loss(apply, states_RTD, answers, asked_RT != model.config.pad_id), jnp.float32(1)
    total = caption_loss(apply, image_BPD, batch)
    if stage == "lm_itm":
        n_images, n_texts, n_tokens = batch["pairs"].shape
        states_BTD = apply(image_BPD, batch["pairs"].reshape(-1, n_tokens), method="encode_question")
        total += matching_loss(params["itm"], states_BTD[:, 0].reshape(n_images, n_texts, -1))
    return total, jnp.float32(1)
