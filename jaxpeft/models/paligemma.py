"""PaliGemma (Beyer et al. 2024, arXiv 2407.07726): SigLIP-So400m, one linear projector, and Gemma 2B as a prefix-LM.

    [image tokens; <bos> prompt \\n]  text <eos>
     `-- every token sees all ---'    causal

Captioning has the prompt 'caption en', VQA 'answer en <question>'. Texts are not lower-cased. Word embeddings are multiplied by
sqrt(D), in the dtype of the products, image tokens are not. The prompt holds no ids for the image, which always comes first.
Learned prompts stand before the image and belong to the bidirectional block.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from jaxpeft.inputs.processor import Template
from jaxpeft.inputs.tokenizer import Tokenizer
from jaxpeft.models.layers import Dense
from jaxpeft.models.prefix_lm import PrefixLM, PrefixLMConfig


@dataclasses.dataclass(frozen=True)
class PaliGemmaConfig(PrefixLMConfig):
    """PaliGemma-3B at 224 pixels by default."""

    bos_id: int = 2
    eos_id: int = 1

    activation: ClassVar[str] = "gelu_tanh"

    @property
    def word_scale(self) -> float:
        return self.text_width**0.5


def _template(config: PaliGemmaConfig, tokenizer: Tokenizer, before: str, max_words: int = 0, **options) -> Template:
    """<bos> before<question>\\n, then text <eos>."""

    def clean(text: str) -> str:
        return " ".join(text.split(" ")[: max_words or None])

    return Template(
        tokenizer,
        start=(),
        stop=(config.eos_id,),
        pad=config.pad_id,
        before=(config.bos_id, *tokenizer.pieces(before)),
        after=tuple(tokenizer.pieces("\n")),
        clean_text=clean,
        **options,
    )


def _captioning(
    config: PaliGemmaConfig, tokenizer: Tokenizer, prompt: str | None = None, max_words: int = 0
) -> Template:
    return _template(config, tokenizer, "caption en" if prompt is None else prompt, max_words)


def _vqa(config: PaliGemmaConfig, tokenizer: Tokenizer) -> Template:
    # the space belongs to the question's first piece
    return _template(config, tokenizer, "answer en", clean_question=" {}".format)


class PaliGemma(PrefixLM):
    """PaliGemma."""

    config: PaliGemmaConfig
    model_type: ClassVar = "paligemma"  # the key in MODELS
    causal: ClassVar[bool] = False
    templates: ClassVar = {"captioning": _captioning, "vqa": _vqa}

    def setup(self):
        super().setup()
        self.projector = Dense(self.config.text_width, self.config.dtype)

    def project(self, x_BPD):
        return self.projector(x_BPD)

    def joined(self, image_BPD, words_BQD, prompt_BQ):
        mask_BP = jnp.ones(image_BPD.shape[:2], bool)
        mask_BS = jnp.concatenate([mask_BP, prompt_BQ != self.config.pad_id], axis=1)
        return jnp.concatenate([image_BPD, words_BQD], axis=1), mask_BS


def build(config: PaliGemmaConfig, tokenizer: Tokenizer | None = None) -> PaliGemma:
    """The model with its processor."""
    return PaliGemma.build(config, tokenizer)
