"""Learned tokens before a sequence.

Prompt   Lester et al. 2021, arXiv 2104.08691: `length` learned rows before the tokens of a stack, at its input only.
         They get no position embedding and the text keeps its positions. positions='shift' is what transformers does
         with HF PEFT's prompts: rows are word embeddings at positions 0..length-1, normalised with the text, whose
         positions shift by `length`. init_weights: 'normal' (std), 'vocabulary' (random words of the base) or 'text' (the
         words of `text`, repeated)
VPT      Jia et al. 2022, arXiv 2203.12119: the same for a ViT ('shallow'), or new learned rows at the input of every
         layer in place of the previous ones ('deep'). Initially uniform with bound sqrt(6 / (3 patch^2 + D)). The paper
         writes [class; prompt; patches]; without positions the order has no effect, and here they come first

Learned tokens never leave the stack: later layers see as many tokens as without them.
"""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxpeft.methods.base import Base, Method, Params, Site, Stream, at_least, one_of
from jaxpeft.methods.prefix import POSITIONS

INITS = ("normal", "vocabulary", "text")


@dataclasses.dataclass(frozen=True)
class Prompt(Method):
    """Learned tokens at the input of the stacks that `targets` selects."""

    targets: str = "text"
    length: int = 16
    init_weights: str = "vocabulary"
    text: str = ""  # of init_weights='text'
    std: float = 0.02  # of init_weights='normal'
    positions: str = "keep"
    name: ClassVar[str] = "prompt"
    kinds: ClassVar[tuple[str, ...]] = ("embed",)
    size_field: ClassVar[str] = "length"

    def __post_init__(self) -> None:
        at_least("prompt", "length", self.length, 1)
        one_of("prompt", "init_weights", self.init_weights, INITS)
        one_of("prompt", "positions", self.positions, POSITIONS)
        if bool(self.text) != (self.init_weights == "text"):
            raise ValueError("prompt: `text` must be set if and only if init_weights='text'")

    def sizes(self, model: nn.Module, sites: list[Site]) -> Sequence[int]:
        """1 to the number of positions of the text stack, the length of the longest text that the base can read."""
        return range(1, model.config.max_positions + 1)

    def shift(self, site: Site) -> int:
        return self.length if self.positions == "shift" else 0

    def init(self, rng: jax.Array, site: Site, base: Base) -> Params:
        if self.init_weights == "normal":
            return {"rows": self.std * jax.random.normal(rng, (self.length, *site.shape))}
        if "word" not in base:
            raise ValueError(f"prompt: {site.path} has no word embedding to start from; use init_weights='normal'")
        if self.init_weights == "vocabulary":
            ids = jax.random.randint(rng, (self.length,), 0, base["word"].shape[0])
        else:
            if base["tokenizer"] is None:
                raise ValueError(
                    "prompt: init_weights='text' needs the base's vocabulary (vocab.txt beside the weights)"
                )
            words = base["tokenizer"].pieces(self.text)
            ids = np.resize(np.array(words, np.int32), self.length)
        rows = jnp.asarray(base["word"])[ids].astype(jnp.float32) * base["word_scale"]
        # rows are added after the embedding's LayerNorm, so they begin normalized; a row of zeros stays one
        if self.positions == "keep" and base["norm/scale"] is not None:
            deviation = jnp.sqrt(rows.var(-1, keepdims=True) + 1e-12)
            rows = (rows - rows.mean(-1, keepdims=True)) / deviation
            rows = rows * base["norm/scale"][None] + base["norm/bias"][None]
        return {"rows": rows}

    def embed(self, params: Params, x_BTD: jax.Array, as_tokens: Stream | None) -> jax.Array | None:
        if self.positions == "keep":
            return params["rows"]
        if as_tokens is None:
            raise ValueError("prompt: positions='shift' needs a text stack; use positions='keep'")
        return as_tokens(params["rows"])


@dataclasses.dataclass(frozen=True)
class VPT(Method):
    """Learned tokens in a ViT, at its input ('shallow') or at every layer's ('deep')."""

    targets: str = "vision"
    length: int = 10
    depth: str = "shallow"
    patch: int = 16  # side of a patch in pixels, for the initialization
    name: ClassVar[str] = "vpt"
    size_field: ClassVar[str] = "length"

    def __post_init__(self) -> None:
        at_least("vpt", "length", self.length, 1)
        one_of("vpt", "depth", self.depth, ("shallow", "deep"))

    @property
    def kinds(self) -> tuple[str, ...]:
        return ("embed", "block") if self.depth == "deep" else ("embed",)

    def init(self, rng: jax.Array, site: Site, base: Base) -> Params:
        if self.depth == "deep" and site.kind == "embed":  # `embed` adds zeros, which the first block replaces
            return {}
        bound = (6 / (3 * self.patch**2 + site.shape[0])) ** 0.5
        return {"rows": jax.random.uniform(rng, (self.length, *site.shape), jnp.float32, -bound, bound)}

    def embed(self, params: Params, x_BTD: jax.Array, as_tokens: Stream | None) -> jax.Array | None:
        return params["rows"] if "rows" in params else jnp.zeros((self.length, x_BTD.shape[-1]))

    def block(self, params: Params, x_BTD: jax.Array) -> jax.Array:
        rows = jnp.broadcast_to(params["rows"].astype(x_BTD.dtype)[None], (x_BTD.shape[0], *params["rows"].shape))
        return jnp.concatenate([rows, x_BTD[:, self.length :]], axis=1)
