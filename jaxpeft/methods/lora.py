"""LoRA: Low-Rank Adaptation (Hu et al. 2021, arXiv 2106.09685, eq. 3).

    y = x W + b + (alpha / r) * dropout(x) A B        A: (in, r), B: (r, out)

A is Kaiming-uniform with a = sqrt(5), i.e. U(-1/sqrt(in), 1/sqrt(in)), and B is zero, so a fresh LoRA is the identity
exactly. Dropout acts on the adapter's path only. The paper adapts the query and value projections; alpha/r is fixed
by `alpha`, so a rank sweep at fixed alpha changes the step size too: set alpha with the rank (alpha=None means 2r).
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxpeft.methods.base import Method, Theta
from jaxpeft.ops import matmul


@dataclasses.dataclass(frozen=True)
class LoRA(Method):
    """Low-rank update of the linear layers that `where` selects."""

    where: str = r"text_.*attention/(query|value)$"
    rank: int = 8
    alpha: float | None = None  # None: 2 * rank
    dropout: float = 0.0
    kinds: ClassVar[tuple[str, ...]] = ("linear",)

    def __post_init__(self):
        if self.rank < 1:
            raise ValueError(f"lora: rank is {self.rank}; it must be at least 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora: dropout is {self.dropout}; it must be in [0, 1)")

    @property
    def scale(self) -> float:
        return (2 * self.rank if self.alpha is None else self.alpha) / self.rank

    def init(self, rng, kind, shape, kernel) -> Theta:
        n_in, n_out = shape
        bound = n_in**-0.5
        a_DR = jax.random.uniform(rng, (n_in, self.rank), jnp.float32, -bound, bound)
        return {"a": a_DR, "b": jnp.zeros((self.rank, n_out), jnp.float32)}

    def linear(self, theta, x, y, kernel, rng):
        if self.dropout and rng is not None:
            keep = jax.random.bernoulli(rng, 1 - self.dropout, x.shape)
            x = jnp.where(keep, x / (1 - self.dropout), 0)
        return y + matmul(matmul(x, theta["a"].astype(x.dtype)), theta["b"].astype(x.dtype)) * self.scale

    def merge(self, theta, base) -> Theta:
        return base | {"kernel": base["kernel"] + self.scale * theta["a"] @ theta["b"]}
