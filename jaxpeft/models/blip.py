"""BLIP (Li et al. 2022, arXiv 2201.12086): a ViT, a text decoder and, for VQA, a question encoder.

Captioning:  image -> encode_image -> score(caption)
VQA:         image -> encode_image -> encode_question -> score(answer), which attends to the question states only

The ViT is pre-norm, the text stacks are post-norm like BERT; every text layer has self-attention, cross-attention and an
MLP. The vocabulary matrix is tied to the word embedding. Stages are separate methods, so a frozen one can be computed once.
"""

import dataclasses
import functools
from typing import ClassVar

from flax import linen as nn

from jaxpeft.inputs.processor import Template
from jaxpeft.inputs.tokenizer import clean_caption, clean_question
from jaxpeft.models.base import Stage
from jaxpeft.models.bert import TextStack
from jaxpeft.models.blip_tokens import BlipTokenizer
from jaxpeft.models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig


@dataclasses.dataclass(frozen=True)
class BlipConfig(EncoderDecoderConfig):
    """BLIP-base by default. `dropout` acts in the text stacks (BLIP trains with 0.1, transformers' default is 0)."""

    vocab_size: int = 30524
    bos_id: int = 30522  # [DEC], the first token of the decoder
    enc_id: int = 30523  # [ENC], the first token of a question
    question_encoder: bool = False

    @property
    def asks(self) -> bool:
        return self.question_encoder


def _captioning(tokenizer: BlipTokenizer, prompt: str | None = None, max_words: int = 0) -> Template:
    """[DEC] a picture of <caption> [SEP]."""
    words = "a picture of" if prompt is None else prompt
    return Template(
        tokenizer,
        start=(tokenizer.bos_id, *tokenizer.pieces(words)),
        start_text=words,
        stop=(tokenizer.sep_id,),
        pad=tokenizer.pad_id,
        clean_text=functools.partial(clean_caption, max_words=max_words or 10**6),
    )


def _vqa(tokenizer: BlipTokenizer) -> Template:
    """[ENC] <question> [SEP] into the encoder; the decoder writes [DEC] <answer> [SEP]."""
    return Template(
        tokenizer,
        start=(tokenizer.bos_id,),
        stop=(tokenizer.sep_id,),
        pad=tokenizer.pad_id,
        before=(tokenizer.enc_id,),
        after=(tokenizer.sep_id,),
        clean_question=clean_question,
    )


class Blip(EncoderDecoder):
    """BLIP. The context of a captioning model is its image tokens; with a question encoder it is the question states."""

    config: BlipConfig
    model_type: ClassVar = "blip"  # the key in MODELS
    templates: ClassVar = {"captioning": _captioning, "vqa": _vqa}

    @property
    def stages(self) -> tuple[Stage, ...]:
        image = Stage("image_tokens", ("image",), "image")
        states = Stage("question_states", ("image_tokens", "prompt"), "example")
        return (image, states) if self.config.question_encoder else (image,)

    @nn.nowrap
    def for_task(self, task: str) -> "Blip":
        if task == "vqa" and not self.config.question_encoder:
            raise ValueError("this BLIP has no question encoder, which task 'vqa' needs")
        return self.replaced(question_encoder=task == "vqa")

    def setup(self):
        super().setup()
        if self.config.question_encoder:
            self.text_encoder = TextStack(self.config, self.config.text_layers, head=False)

    def encode_question(self, image_BPD, prompt_BT, mask_BT=None):
        """Question ids (starting with enc_id) -> question states (B, T, text_width); the default mask excludes padding."""
        mask_BT = prompt_BT != self.config.pad_id if mask_BT is None else mask_BT
        return self.text_encoder(prompt_BT, mask_BT, image_BPD, None, causal=False)[0]

    def stage(self, batch, name):
        if name == "image_tokens":
            return self.encode_image(batch["image"])
        return self.encode_question(batch["image_tokens"], batch["prompt"])

    def memory_mask(self, batch):
        return batch["prompt"] != self.config.pad_id if self.config.question_encoder else None
