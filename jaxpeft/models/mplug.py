"""mPLUG (Li et al. 2022, arXiv 2205.12005): a CLIP ViT, a text encoder, a fusion stack and a text decoder.

Captioning:  image -> encode_image -> score(caption)
VQA:         image -> encode_image --------------------v
             question -> encode_text -> text states -> fuse -> score(answer), which attends to [image; question]

Captioning runs neither text encoder nor fusion, as in the release. In the fusion stack, layers of two kinds alternate:

    cross    text = BERT layer(text, cross-attention to the image tokens)
    joint    [image'; text] = BERT layer([image; text]), self-attention over both; image += image'

Layer i of the stack (from 0) is a joint layer if i > 0 and i is a multiple of `stride`. The base model has one, the large model
none: there the image tokens stay those of the ViT. The decoder masks the padding of the question.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from flax import linen as nn

from jaxpeft.inputs.processor import Template
from jaxpeft.inputs.tokenizer import Tokenizer
from jaxpeft.models import attention
from jaxpeft.models.base import Stage
from jaxpeft.models.bert import TextBlock, TextStack
from jaxpeft.models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from jaxpeft.models.layers import Dense, LayerNorm, dropout
from jaxpeft.models.stack import stack


@dataclasses.dataclass(frozen=True)
class MplugConfig(EncoderDecoderConfig):
    """mPLUG-base by default. `dropout` acts where the release has it: in the text stacks, on the ViT's attention weights, and
    after the projection of the large model; it trains with 0.1."""

    vision_eps: float = 1e-5
    encoder_layers: int = 6
    fusion_layers: int = 6
    stride: int = 3
    fusion: bool = False  # whether the model has text encoder and fusion stack, which VQA needs

    clip: ClassVar[bool] = True
    token_types: ClassVar[int] = 2  # BERT's; the second is never read
    most: ClassVar = EncoderDecoderConfig.most | {"encoder_layers": 256, "fusion_layers": 256}

    @property
    def asks(self) -> bool:
        return self.fusion

    @property
    def vision_dropout(self) -> float:
        return self.dropout

    @property
    def runs(self) -> list[tuple[str, list[int]]]:
        """The fusion layers as runs, each one scanned stack: [('cross', [0, 1, 2]), ('joint', [3]), ('cross', [4, 5])]."""
        found: list[tuple[str, list[int]]] = []
        for i in range(self.fusion_layers):
            if i and i % self.stride == 0:
                found.append(("joint", [i]))
            elif found and found[-1][0] == "cross":
                found[-1][1].append(i)
            else:
                found.append(("cross", [i]))
        return found


LARGE = {"vision_width": 1024, "vision_layers": 24, "vision_heads": 16, "vision_mlp": 4096, "patch_size": 14,
         "image_size": 336, "stride": 6}  # fmt: skip
KINDS = {"mplug-base": MplugConfig(), "mplug-large": MplugConfig(**LARGE)}


class Projector(nn.Module):
    """Image tokens in the width of the text stacks, where the ViT's differs: the large model."""

    config: MplugConfig

    @nn.compact
    def __call__(self, x_BPD):
        c = self.config
        x_BPD = Dense(c.text_width, c.dtype, name="dense")(x_BPD)
        return dropout(self, LayerNorm(epsilon=c.text_eps, dtype=c.dtype, name="norm")(x_BPD), c.dropout)


class FusionRun(nn.Module):
    """Some fusion layers of one kind as a stack: see `MplugConfig.runs`."""

    config: MplugConfig
    layers: int

    @nn.compact
    def __call__(self, x_BTD, context_BSD, mask_BT):
        c, n_tokens, context_mask = self.config, x_BTD.shape[1], None
        x_BTD, mask = attention.padded(x_BTD, mask_BT, c.attention_here)
        if context_BSD is not None:
            context_BSD, context_mask = attention.padded(context_BSD, None, c.attention_here)
        blocks = stack(TextBlock, c, self.layers, 4)(c, name="blocks")
        return blocks(x_BTD, None, context_BSD, context_mask, mask, 0)[0][:, :n_tokens]


class Fusion(nn.Module):
    """Image tokens (B, 1 + P, D), text states (B, T, D) and the text's mask -> [image; text] (B, 1 + P + T, D)."""

    config: MplugConfig

    @nn.compact
    def __call__(self, image_BPD, text_BTD, mask_BT):
        n_image, mask_BS = image_BPD.shape[1], joint_mask(image_BPD.shape[1], mask_BT)
        for i, (kind, layers) in enumerate(self.config.runs):
            run = FusionRun(self.config, len(layers), name=f"{kind}{i}")
            if kind == "cross":
                text_BTD = run(text_BTD, image_BPD, mask_BT)
            else:
                both_BSD = run(jnp.concatenate([image_BPD, text_BTD], axis=1), None, mask_BS)
                image_BPD, text_BTD = image_BPD + both_BSD[:, :n_image], both_BSD[:, n_image:]
        return jnp.concatenate([image_BPD, text_BTD], axis=1)


def joint_mask(n_image: int, mask_BT):
    """The mask (B, n_image + T) of [image; text], from that of the text."""
    return jnp.concatenate([jnp.ones((mask_BT.shape[0], n_image), bool), mask_BT], axis=1)


def _captioning(tokenizer: Tokenizer, prompt: str | None = None, max_words: int = 0) -> Template:
    """[CLS] <caption> [SEP], lower-cased."""
    words = prompt or ""

    def clean(text: str) -> str:
        return " ".join(text.lower().split(" ")[: max_words or None])

    start = (tokenizer.cls_id, *tokenizer.pieces(words))
    stop = (tokenizer.sep_id,)
    return Template(tokenizer, start, stop, tokenizer.pad_id, words, clean_text=clean, beam_search="mplug")


def _vqa(tokenizer: Tokenizer) -> Template:
    """[CLS] <question> into the encoder, without [SEP]; the decoder writes [CLS] <answer> [SEP]. Nothing is cleaned."""
    cls, stop = (tokenizer.cls_id,), (tokenizer.sep_id,)
    return Template(tokenizer, cls, stop, tokenizer.pad_id, before=cls, beam_search="mplug")


class Mplug(EncoderDecoder):
    """mPLUG. The context of a captioning model is its image tokens; with fusion it is [image; question]."""

    config: MplugConfig
    model_type: ClassVar = "mplug"  # the key in MODELS
    templates: ClassVar = {"captioning": _captioning, "vqa": _vqa}
    targets: ClassVar = EncoderDecoder.targets | {"fusion": r"^text_fusion", "projector": r"^projector"}

    @property
    def stages(self) -> tuple[Stage, ...]:
        image = Stage("image_tokens", ("image",), "image")
        text = Stage("text_states", ("prompt",), "example")
        fused = Stage("fused", ("image_tokens", "text_states", "prompt"), "example")
        return (image, text, fused) if self.config.fusion else (image,)

    @nn.nowrap
    def for_task(self, task: str) -> "Mplug":
        if task == "vqa" and not self.config.fusion:
            raise ValueError("this mPLUG has no text encoder and no fusion stack, which task 'vqa' needs")
        return self.replaced(fusion=task == "vqa")

    def setup(self):
        super().setup()
        c = self.config
        if c.vision_width != c.text_width:
            self.projector = Projector(c)
        if c.fusion:
            self.text_encoder = TextStack(c, c.encoder_layers, head=False)
            self.text_fusion = Fusion(c)

    def encode_image(self, image_BYXC):
        """uint8 images, or normalised floats -> image tokens (B, 1 + P, text_width)."""
        x_BPD, c = super().encode_image(image_BYXC), self.config
        return self.projector(x_BPD) if c.vision_width != c.text_width else x_BPD

    def encode_text(self, prompt_BT):
        """Question ids, or other texts that begin with cls_id -> text states (B, T, D), without the image."""
        return self.text_encoder(prompt_BT, prompt_BT != self.config.pad_id, None, None, causal=False)[0]

    def fuse(self, image_BPD, text_BTD, prompt_BT):
        """Image tokens and text states of the ids `prompt_BT` -> [image; text] (B, 1 + P + T, D)."""
        return self.text_fusion(image_BPD, text_BTD, prompt_BT != self.config.pad_id)

    def stage(self, batch, name):
        if name == "image_tokens":
            return self.encode_image(batch["image"])
        if name == "text_states":
            return self.encode_text(batch["prompt"])
        return self.fuse(batch["image_tokens"], batch["text_states"], batch["prompt"])

    def memory_mask(self, batch):
        c = self.config
        return joint_mask(1 + c.n_patches, batch["prompt"] != c.pad_id) if c.fusion else None
