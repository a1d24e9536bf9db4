"""mPLUG's pre-training objectives (Li et al. 2022, arXiv 2205.12005, section 3.3) at toy size. See apps/pretrain.py.

    text            masked language modelling on text alone by the decoder, in place of the initialisation from BERT: text
                    encoder and fusion stack then start as copies of its layers, as they are halves of one BERT in mPLUG
    lm              language modelling of two web captions per image, from the image tokens as in the release's captioning
    lm_prefix_itm   the same, prefix language modelling, and image-text matching against hard negatives

The release has no code for pre-training. From the paper: prefix language modelling (the decoder writes the rest of a caption
about the fused image and beginning) and matching by the first fused text state. Ours: stages `text` and `lm`, the choice of
negatives, and equal weights. Left out: the contrast of image and text, which only selects negatives here, and masked language
modelling of fused states.
"""

import functools

import jax
import jax.numpy as jnp

from jaxpeft.apps.pretrain import caption_loss, masked_loss, matching_loss
from jaxpeft.data import scenes
from jaxpeft.inputs.tokenizer import Tokenizer
from jaxpeft.models.base import Context
from jaxpeft.models.mplug import Mplug, MplugConfig
from jaxpeft.tree import Tree

ALIASES: dict[str, str] = {}
NAME = "tiny mPLUG on scenes"


def tokenizer() -> Tokenizer:
    """The words of the scenes."""
    return Tokenizer.from_words(scenes.WORDS)


def model(tokenizer: Tokenizer, **architecture) -> Mplug:
    """The model that is trained, with every part."""
    ids = {name: getattr(tokenizer, name) for name in ("pad_id", "cls_id", "sep_id")}
    return Mplug.build(MplugConfig(**architecture, vocab_size=len(tokenizer), fusion=True, **ids), tokenizer)


def shared(params: Tree) -> Tree:
    """The parameters of the model: the stored ones without the matching head."""
    return {name: x for name, x in params.items() if name != "itm"}


def init(model: Mplug, seed: int) -> Tree:
    """The initial parameters and matching head."""
    full = jax.jit(lambda: model.init(jax.random.key(seed), model.example()))()["params"]
    return full | {"itm": {"kernel": jnp.zeros((model.config.text_width, 2)), "bias": jnp.zeros(2)}}


def after_text(params: Tree) -> Tree:
    """Text encoder and fusion stack get the decoder's layers in order, starting again where it has no more. Cross-attention
    keeps its own initialisation."""
    decoder, new, first = params["text_decoder"], dict(params), 0
    copied = ("self_attention", "self_norm", "mlp", "mlp_norm")

    def taken(blocks: Tree) -> Tree:
        nonlocal first
        n_layers = jax.tree.leaves(blocks)[0].shape[0]
        n_decoder = jax.tree.leaves(decoder["blocks"])[0].shape[0]
        layers = jnp.arange(first, first + n_layers) % n_decoder
        first += n_layers
        return blocks | {part: jax.tree.map(lambda x: x[layers], decoder["blocks"][part]) for part in copied}

    new["text_encoder"] = {"embed": decoder["embed"], "blocks": taken(params["text_encoder"]["blocks"])}
    runs = sorted(params["text_fusion"], key=lambda name: int(name.lstrip("crosjint")))
    new["text_fusion"] = {run: {"blocks": taken(params["text_fusion"][run]["blocks"])} for run in runs}
    return new


def loss(stage: str, model: Mplug, variables: Tree, batch: dict, rngs: dict) -> tuple[jax.Array, jax.Array]:
    """The loss of a stage, with a count of 1, as each term is a mean. `stage`: 'text', 'lm' or 'lm_prefix_itm'."""
    params = variables["params"]
    apply = functools.partial(model.apply, {"params": shared(params)}, rngs=rngs)
    if stage == "text":
        return masked_loss(apply, batch), jnp.float32(1)
    image_BPD = apply(batch["image"], method="encode_image")
    total = caption_loss(apply, image_BPD, batch)
    if stage == "lm_prefix_itm":
        context: Context = apply({"image_tokens": image_BPD, "prompt": batch["prefix"]}, method="context")
        rest = {name.removeprefix("rest_"): x for name, x in batch.items() if name.startswith("rest_")}
        total += caption_loss(apply, context.memory, rest, context.mask_BS)
        n_images, n_texts, n_tokens = batch["pairs"].shape
        pairs = batch["pairs"].reshape(-1, n_tokens)
        fused_BSD = apply(
            jnp.repeat(image_BPD, n_texts, axis=0), apply(pairs, method="encode_text"), pairs, method="fuse"
        )
        total += matching_loss(params["itm"], fused_BSD[:, image_BPD.shape[1]].reshape(n_images, n_texts, -1))
    return total, jnp.float32(1)
