"""The image tower of BLIP and mPLUG: a ViT (Dosovitskiy et al. 2020, arXiv 2010.11929), or CLIP's variant of it.

CLIP's (Radford et al. 2021, arXiv 2103.00020) has no bias in the patch embedding, a LayerNorm before the first layer, and
QuickGELU, x * sigmoid(1.702 x).
"""

import dataclasses
import math
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxpeft.adapt import sites
from jaxpeft.inputs import images
from jaxpeft.models import attention
from jaxpeft.models.layers import INIT, Attention, LayerNorm, Mlp, Stored
from jaxpeft.models.stack import StackConfig, stack
from jaxpeft.ops import by_rows

MOST_PATCHES = 1 << 14


@dataclasses.dataclass(frozen=True)
class VitConfig(StackConfig):
    """The fields of an image tower and of its images. All widths, epsilons and head counts are explicit: a wrong epsilon
    changes logits by 1e-4 but no shape."""

    image_size: int = 384
    patch_size: int = 16
    vision_width: int = 768
    vision_layers: int = 12
    vision_heads: int = 12
    vision_mlp: int = 3072
    vision_eps: float = 1e-6
    image_mean: tuple = tuple(images.MEAN_C.tolist())  # per channel of pixels in [0, 1]: CLIP's
    image_std: tuple = tuple(images.STD_C.tolist())
    image_resample: int = images.BICUBIC  # number of the Pillow filter that resizes images to squares

    image_longest_edge: ClassVar[int] = 0  # images are resized once
    clip: ClassVar[bool] = False  # whether the tower is CLIP's
    crops: ClassVar[bool] = False  # whether pixels after the last whole patch are ignored; otherwise there must be none
    most: ClassVar = StackConfig.most | {"image_size": 4096, "vision_layers": 256, "vision_width": 1 << 14}

    def __post_init__(self) -> None:
        for name in ("image_mean", "image_std"):
            object.__setattr__(self, name, images.per_channel(name, getattr(self, name)))
        if self.image_resample not in images.FILTERS:
            raise ValueError(f"image_resample is {self.image_resample!r}; expected a Pillow filter, {images.FILTERS}")
        super().__post_init__()
        self._check_heads("vision")
        if self.image_size % self.patch_size and not self.crops:
            raise ValueError(f"image_size {self.image_size} is not divisible by patch_size {self.patch_size}")
        if self.n_patches > MOST_PATCHES:
            raise ValueError(f"{self.n_patches:,} patches per image; the limit is {MOST_PATCHES:,}")

    @property
    def n_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def vision_activation(self) -> str:
        """Of the MLPs, a key of `layers.ACTIVATIONS`."""
        return "quick_gelu" if self.clip else "gelu"

    @property
    def vision_dropout(self) -> float:
        """Dropout of the attention weights in training."""
        return 0.0


def position_init(key, shape, dtype=jnp.float32):
    """(1 + side^2, D) position embeddings that distinguish rows and columns from the first step: sines and cosines of both,
    with wavelengths of 1 to 20 grid sides, centred over the patches; noise for the class token and the last D mod 4 columns.

    Used only to train from scratch (pre-training and `init=scratch`). In a small tower the noise of std 0.02 that BLIP adds to
    an ImageNet ViT is too weak beside patches whose brightness alone has ten times its norm: a base that was pre-trained from
    it could not tell left from right, unlike this one (docs/results/scenes.md).
    """
    side, waves = math.isqrt(shape[0] - 1), shape[1] // 4
    waves_F = 2 * np.pi / side / 20 ** (np.arange(waves) / waves)
    angles_PF = [steps.reshape(-1, 1) * waves_F for steps in np.indices((side, side))]
    position_PD = np.concatenate([wave(angle) for angle in angles_PF for wave in (np.sin, np.cos)], axis=1)
    return INIT(key, shape, dtype).at[1:, : 4 * waves].set((position_PD - position_PD.mean(0)).astype(dtype))


def normalised(image_BYXC, config: VitConfig):
    """uint8 images, or already normalised floats -> normalised floats."""
    if image_BYXC.dtype != jnp.uint8:
        return image_BYXC
    mean_C, std_C = (jnp.asarray(x, jnp.float32)[None, None, None] for x in (config.image_mean, config.image_std))
    return (image_BYXC.astype(jnp.float32) / 255 - mean_C) / std_C


class PatchEmbed(Stored):
    """Patch embedding: the strided convolution of a ViT as one matrix product over non-overlapping patches. Site: linear."""

    config: VitConfig

    @nn.compact
    def __call__(self, image_BYXC):
        c = self.config
        p, grid = c.patch_size, c.image_size // c.patch_size
        if image_BYXC.shape[1:] != (c.image_size, c.image_size, 3):
            raise ValueError(f"images are {image_BYXC.shape[1:]}; expected ({c.image_size}, {c.image_size}, 3)")
        kernel = self.param("kernel", INIT, (p, p, 3, c.vision_width)).reshape(-1, c.vision_width)
        bias = None if c.clip else self.param("bias", nn.initializers.zeros, (c.vision_width,))
        if c.crops:
            image_BYXC = image_BYXC[:, : grid * p, : grid * p]
        x = image_BYXC.astype(c.dtype).reshape(-1, grid, p, grid, p, 3).swapaxes(2, 3).reshape(-1, grid**2, p * p * 3)
        return sites.linear(self, x, kernel, bias)


class VisionBlock(nn.Module):
    """x += attention(norm1(x)); x += mlp(norm2(x)). `mask`: of the tokens, see `Attention`."""

    config: VitConfig

    @nn.compact
    def __call__(self, x_BPD, _, mask):
        c = self.config
        norm = [LayerNorm(epsilon=c.vision_eps, dtype=c.dtype, name=f"norm{i}") for i in (1, 2)]
        attend = Attention(
            c.vision_width, c.vision_heads, c.vision_dropout, c.dtype, c.attention_here, name="attention"
        )
        mlp = Mlp(c.vision_width, c.vision_mlp, c.dtype, c.vision_activation, name="mlp")
        x_BPD = sites.block(self, x_BPD)
        h_BPD = norm[0](x_BPD)
        x_BPD = x_BPD + attend(h_BPD, *attend.keys_values(h_BPD), mask, stream=x_BPD.__add__)
        x_BPD = x_BPD + mlp(norm[1](x_BPD), stream=x_BPD.__add__)
        return x_BPD, None


def encoded(module: nn.Module, x_BPD, c: VitConfig):
    """Tokens of an image (B, P, D) through the blocks of the tower `module`, without those that methods add. Site: embed."""
    n_tokens = x_BPD.shape[1]
    x_BPD, _ = sites.embed(module, x_BPD, None)
    n_added = x_BPD.shape[1] - n_tokens
    x_BPD, mask = attention.padded(x_BPD, None, c.attention_here)
    x_BPD, _ = stack(VisionBlock, c, c.vision_layers, 1)(c, name="blocks")(x_BPD, None, mask)
    return x_BPD[:, n_added : n_added + n_tokens]


class Vision(Stored):
    """image_BYXC (normalised float) -> tokens (B, 1 + P, D): class token and patches, all read by the text stacks."""

    config: VitConfig

    @nn.compact
    def __call__(self, image_BYXC):
        c = self.config
        x_BPD = PatchEmbed(c, name="patch")(image_BYXC)
        cls_D = self.param("class_embedding", INIT, (c.vision_width,)).astype(c.dtype)
        position_PD = self.param("position", position_init, (1 + c.n_patches, c.vision_width))
        cls_B1D = jnp.broadcast_to(cls_D, (x_BPD.shape[0], 1, c.vision_width))
        x_BPD = by_rows(jnp.concatenate([cls_B1D, x_BPD], axis=1) + position_PD.astype(c.dtype)[None])
        if c.clip:
            x_BPD = LayerNorm(epsilon=c.vision_eps, dtype=c.dtype, name="norm_in")(x_BPD)
        return LayerNorm(epsilon=c.vision_eps, dtype=c.dtype, name="norm")(encoded(self, x_BPD, c))
