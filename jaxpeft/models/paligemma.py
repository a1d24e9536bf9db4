"""PaliGemma (Beyer et al. 2024, arXiv 2407.07726): SigLIP-So400m, one linear projector, and Gemma 2B as a prefix-LM.

    [image tokens; <bos> prompt \\n]  text <eos>
     `-- every token sees all ---'    causal

Word embeddings are multiplied by sqrt(D), in the dtype of the products, image tokens are not. The ids of a prompt hold no
image, which always comes first. Learned prompts stand before the image, in the block in which every token sees all. Prompts:
paligemma_text.py.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from jaxpeft.models import paligemma_text
from jaxpeft.models.layers import Dense
from jaxpeft.models.prefix_lm import PrefixLM, PrefixLMConfig


@dataclasses.dataclass(frozen=True)
class PaliGemmaConfig(PrefixLMConfig):
    """PaliGemma-3B at 224 pixels by default."""

    image_id: int = 257152  # of <image>, which no prompt of ours holds

    activation: ClassVar[str] = "gelu_tanh"

    @property
    def word_scale(self) -> float:
        return self.text_width**0.5


class PaliGemma(PrefixLM):
    """PaliGemma."""

    config: PaliGemmaConfig
    model_type: ClassVar = "paligemma"  # the key in MODELS
    causal: ClassVar[bool] = False
    templates: ClassVar = paligemma_text.TEMPLATES

    def setup(self):
        super().setup()
        self.projector = Dense(self.config.text_width, self.config.dtype)

    def project(self, x_BPD):
        return self.projector(x_BPD)

    def joined(self, image_BPD, words_BQD, prompt_BQ):
        mask_BP = jnp.ones(image_BPD.shape[:2], bool)
        mask_BS = jnp.concatenate([mask_BP, prompt_BQ != self.config.pad_id], axis=1)
        return jnp.concatenate([image_BPD, words_BQD], axis=1), mask_BS
