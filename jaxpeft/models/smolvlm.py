"""SmolVLM (Marafioti et al. 2025, arXiv 2504.05299) and Idefics3 (Laurencon et al. 2024, arXiv 2408.12637): SigLIP, a pixel
shuffle, one linear projector, and a Llama-like decoder that is causal everywhere.

    User: [image tokens] question
    Assistant: text

The pixel shuffle puts r x r neighbouring patches into one token of r^2 times the width (64 tokens per image in the small
models). In the ids of a prompt one <image> stands for all image tokens; they take its place, wherever it stands in a row.
Prompts: smolvlm_text.py.

Deviation: an image is one square, which transformers calls do_image_splitting=False; there are no crops of larger images.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from flax import linen as nn

from jaxpeft.inputs import images
from jaxpeft.models import smolvlm_text
from jaxpeft.models.layers import Dense
from jaxpeft.models.prefix_lm import PrefixLM, PrefixLMConfig
from jaxpeft.ops import by_rows


@dataclasses.dataclass(frozen=True)
class SmolVLMConfig(PrefixLMConfig):
    """SmolVLM-256M by default."""

    image_size: int = 512
    patch_size: int = 16
    vision_width: int = 768
    vision_layers: int = 12
    vision_heads: int = 12
    vision_mlp: int = 3072
    image_resample: int = images.SMOLVLM.resample
    image_longest_edge: int = 2048  # of an image after a first resize
    shuffle: int = 4  # side, in patches, of what becomes one image token
    vocab_size: int = 49280
    text_width: int = 576
    text_layers: int = 30
    text_heads: int = 9
    kv_heads: int = 3
    head_size: int = 64
    text_mlp: int = 1536
    text_eps: float = 1e-5
    rope_theta: float = 1e5
    pad_id: int = 2
    image_id: int = 49190  # of <image>
    untied_head: bool = True

    activation: ClassVar[str] = "silu"

    def __post_init__(self) -> None:
        super().__post_init__()
        if (side := self.image_size // self.patch_size) % self.shuffle:
            raise ValueError(f"{side} patches in a row are not divisible by shuffle {self.shuffle}")

    @property
    def n_image_tokens(self) -> int:
        return self.n_patches // self.shuffle**2


class SmolVLM(PrefixLM):
    """SmolVLM and Idefics3."""

    config: SmolVLMConfig
    model_type: ClassVar = "smolvlm"  # the key in MODELS
    causal: ClassVar[bool] = True
    templates: ClassVar = smolvlm_text.TEMPLATES

    def setup(self):
        super().setup()
        self.projector = Dense(self.config.text_width, self.config.dtype, use_bias=False)

    def project(self, x_BPD):
        return self.projector(shuffled(x_BPD, self.config.shuffle))

    def joined(self, image_BPD, words_BQD, prompt_BQ):
        n_image, n_words = image_BPD.shape[1], prompt_BQ.shape[1]
        at_B1 = jnp.argmax(prompt_BQ == self.config.image_id, axis=1, keepdims=True)
        step_1S = jnp.arange(n_image + n_words - 1)[None]
        is_image_BS = (step_1S >= at_B1) & (step_1S < at_B1 + n_image)
        from_image_BS = jnp.clip(step_1S - at_B1, 0, n_image - 1)
        from_words_BS = jnp.where(step_1S < at_B1, step_1S, jnp.maximum(step_1S - n_image + 1, 0))
        x_BSD = jnp.where(
            is_image_BS[..., None],
            jnp.take_along_axis(image_BPD, from_image_BS[..., None], axis=1),
            jnp.take_along_axis(words_BQD, from_words_BS[..., None], axis=1),
        )
        is_word_BS = jnp.take_along_axis(prompt_BQ != self.config.pad_id, from_words_BS, axis=1)
        return by_rows(x_BSD), is_image_BS | is_word_BS

    @nn.nowrap
    def example(self):
        return super().example() | {"prompt": jnp.full((1, 2), self.config.image_id, jnp.int32)}


def shuffled(x_BPD, side: int):
    """Tokens of a square grid -> tokens of side x side neighbours, whose features are joined row by row."""
    n_rows, n_patches, width = x_BPD.shape
    n = round(n_patches**0.5) // side
    x = x_BPD.reshape(n_rows, n, side, n, side, width).swapaxes(2, 3)
    return x.reshape(n_rows, n * n, side * side * width)
