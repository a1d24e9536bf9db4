"""The image tower of PaliGemma and SmolVLM: the ViT of SigLIP (Zhai et al. 2023, arXiv 2303.15343), without its pooling head.

    x = patches W + b + position;  x += attention(norm1(x));  x += mlp(norm2(x));  image tokens = norm(x)

Unlike BLIP's ViT it has no class token, and its GELU is the approximation by tanh. Pixels are x / 127.5 - 1. As in a strided
convolution without padding, pixels after the last whole patch are ignored (SmolVLM-2.2B: 384 pixels, 27 patches of 14).
"""

import dataclasses
from typing import ClassVar

from flax import linen as nn

from jaxpeft.models.layers import LayerNorm, Stored
from jaxpeft.models.vit import PatchEmbed, VitConfig, encoded, position_init
from jaxpeft.ops import by_rows


@dataclasses.dataclass(frozen=True)
class SiglipConfig(VitConfig):
    """The fields of the image tower: SigLIP-So400m/14 at 224 pixels by default."""

    image_size: int = 224
    patch_size: int = 14
    vision_width: int = 1152
    vision_layers: int = 27
    vision_heads: int = 16
    vision_mlp: int = 4304
    image_mean: tuple = (0.5, 0.5, 0.5)
    image_std: tuple = (0.5, 0.5, 0.5)

    crops: ClassVar[bool] = True

    @property
    def vision_activation(self) -> str:
        return "gelu_tanh"


def _position_init(key, shape, dtype="float32"):
    """`position_init` without the row of a class token."""
    return position_init(key, (1 + shape[0], shape[1]), dtype)[1:]


class Siglip(Stored):
    """image_BYXC (normalised float) -> tokens_BPD of all patches."""

    config: SiglipConfig

    @nn.compact
    def __call__(self, image_BYXC):
        c = self.config
        position_PD = self.param("position", _position_init, (c.n_patches, c.vision_width))
        x_BPD = by_rows(PatchEmbed(c, name="patch")(image_BYXC) + position_PD.astype(c.dtype)[None])
        return LayerNorm(epsilon=c.vision_eps, dtype=c.dtype, name="norm")(encoded(self, x_BPD, c))
