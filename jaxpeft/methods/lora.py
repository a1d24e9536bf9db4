"""The LoRA family: low-rank updates of linear layers.

LoRA    Hu et al. 2021, arXiv 2106.09685, eq. 3
            y = x W + b + s * dropout(x) A B        A: (in, r), B: (r, out), s = alpha / r
        A is U(-1/sqrt(in), 1/sqrt(in)) and B is zero, so a fresh LoRA is the identity exactly. Dropout acts on the
        adapter's path only. The paper adapts query and value projections.
rsLoRA  Kalajdzievski 2023, arXiv 2312.03732: s = alpha / sqrt(r)   (`rank_stabilized`)
LoRA+   Hayou et al. 2024, arXiv 2402.12354: B learns `lr_ratio` times faster than A (the paper suggests 16 with a
        smaller learning rate for A; weight decay scales with the learning rate, as in an optimizer group)
DoRA    Liu et al. 2024, arXiv 2402.09353, eq. 5: W' = m * (W + s A B) / ||W + s A B||, with a norm per output that is
        constant in the backward pass; m starts as the norms of W
PiSSA   Meng et al. 2024, arXiv 2404.02948: A B starts as the top-r part of W's SVD. The paper replaces W by the
        residual; here W is kept and the initial A0 B0 is subtracted, which is the same map and keeps one base for all
        methods. A0 and B0 are stored, so loading does not depend on an SVD

How alpha depends on the rank sets the size of updates, a confound in a sweep over ranks, so `alpha` can be a number (fixed),
'r' (s = 1) or '2r' (s = 2, the default; with `rank_stabilized` s = 2 sqrt(r)).
"""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxpeft.methods.base import Base, Method, Params, Site, at_least, kaiming
from jaxpeft.ops import matmul, per_feature


@dataclasses.dataclass(frozen=True)
class LoRA(Method):
    """Low-rank update of the linear layers that `targets` selects."""

    targets: str = "text.attention.qv"
    rank: int = 8
    alpha: float | str = "2r"  # a number, 'r' or '2r'
    rank_stabilized: bool = False
    dropout: float = 0.0
    lr_ratio: float = 1.0  # learning rate of B / learning rate of A
    name: ClassVar[str] = "lora"
    kinds: ClassVar[tuple[str, ...]] = ("linear",)
    size_field: ClassVar[str] = "rank"

    def __post_init__(self) -> None:
        at_least(self.name, "rank", self.rank, 1)
        if not 0 <= self.dropout < 1:
            raise ValueError(f"{self.name}: dropout is {self.dropout}; it must be in [0, 1)")
        try:
            object.__setattr__(self, "alpha", self.alpha if self.alpha in ("r", "2r") else float(self.alpha))
        except (TypeError, ValueError):
            raise ValueError(f"{self.name}: alpha is {self.alpha!r}; expected a number, 'r' or '2r'") from None

    @property
    def scale(self) -> float:
        """s of the equation."""
        alpha = {"r": self.rank, "2r": 2 * self.rank}[self.alpha] if isinstance(self.alpha, str) else self.alpha
        return alpha / (self.rank**0.5 if self.rank_stabilized else self.rank)

    def sizes(self, model: nn.Module, sites: list[Site]) -> Sequence[int]:
        """1 to the largest rank of a kernel."""
        return range(1, max(min(site.shape) for site in sites) + 1)

    def lr_scale(self, leaf: str) -> float:
        return self.lr_ratio if leaf in ("b", "b1", "b2") else 1.0  # LoHa has two

    def init(self, rng: jax.Array, site: Site, base: Base) -> Params:
        n_in, n_out = site.shape
        return {"a": kaiming(rng, (n_in, self.rank), n_in), "b": jnp.zeros((self.rank, n_out), jnp.float32)}

    def _drop(self, x: jax.Array, rng: jax.Array | None) -> jax.Array:
        if not self.dropout or rng is None:
            return x
        return jnp.where(jax.random.bernoulli(rng, 1 - self.dropout, x.shape), x / (1 - self.dropout), 0)

    def update(self, params: Params, x: jax.Array, rng: jax.Array | None) -> jax.Array:
        """s * dropout(x) A B. The narrow x A is scaled: scaling the result is one more pass over it."""
        x = self._drop(x, rng)
        return matmul(matmul(x, params["a"].astype(x.dtype)) * self.scale, params["b"].astype(x.dtype))

    def delta(self, params: Params) -> jax.Array:
        """What is added to the kernel (in, out)."""
        return self.scale * params["a"] @ params["b"]

    def linear(self, params: Params, x: jax.Array, y: jax.Array, base: Base, rng: jax.Array | None) -> jax.Array:
        return y + self.update(params, x, rng)

    def merge(self, params: Params, base: Base) -> Params:
        return base | {"kernel": base["kernel"] + self.delta(params)}


@dataclasses.dataclass(frozen=True)
class DoRA(LoRA):
    """LoRA on the direction of each output's weights, with a trained magnitude."""

    name: ClassVar[str] = "dora"
    first: ClassVar[bool] = True

    def init(self, rng: jax.Array, site: Site, base: Base) -> Params:
        return super().init(rng, site, base) | {"m": _norms(base["kernel"])}

    def linear(self, params: Params, x: jax.Array, y: jax.Array, base: Base, rng: jax.Array | None) -> jax.Array:
        update = self.update(params, x, rng)
        ratio = params["m"] / jax.lax.stop_gradient(_norms(base["kernel"] + self.delta(params)))
        plain = y if base["bias"] is None else y - per_feature(base["bias"].astype(y.dtype), y)
        ratio = per_feature(ratio.astype(y.dtype), y)
        return y + (ratio - 1) * plain + ratio * update  # this form is exactly y at initialization

    def merge(self, params: Params, base: Base) -> Base:
        kernel = base["kernel"] + self.delta(params)
        return base | {"kernel": kernel * (params["m"] / _norms(kernel))[None]}


def _norms(kernel: jax.Array) -> jax.Array:
    """The norm of each output's weights, (out,), in float32: a frozen kernel may be narrower."""
    return jnp.sqrt(jnp.sum(jnp.square(kernel.astype(jnp.float32)), axis=0))


@dataclasses.dataclass(frozen=True)
class PiSSA(LoRA):
    """LoRA that starts from the principal part of the kernel."""

    name: ClassVar[str] = "pissa"
    fixed: ClassVar[tuple[str, ...]] = ("a0", "b0")

    def sizes(self, model: nn.Module, sites: list[Site]) -> Sequence[int]:
        return range(1, min(min(site.shape) for site in sites) + 1)

    def init(self, rng: jax.Array, site: Site, base: Base) -> Params:
        if self.rank > min(site.shape):
            raise ValueError(f"pissa: rank is {self.rank}; {site.path} {site.shape} allows at most {min(site.shape)}")
        left, values, right = jnp.linalg.svd(base["kernel"].astype(jnp.float32), full_matrices=False)
        root = jnp.sqrt(values[: self.rank] / self.scale)
        a, b = left[:, : self.rank] * root[None], right[: self.rank] * root[:, None]
        return {"a": a, "b": b, "a0": a, "b0": b}

    def update(self, params: Params, x: jax.Array, rng: jax.Array | None) -> jax.Array:
        return super().update(params, x, rng) - super().update({"a": params["a0"], "b": params["b0"]}, x, rng)

    def delta(self, params: Params) -> jax.Array:
        return self.scale * (params["a"] @ params["b"] - params["a0"] @ params["b0"])
