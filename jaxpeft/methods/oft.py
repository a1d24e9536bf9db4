"""OFT: Orthogonal Fine-Tuning (Qiu et al. 2023, arXiv 2306.07280) in the input-rotating form of HF PEFT.

    y = (x R) W + b        R = diag(R_1, ..., R_n), R_i = (I - Q_i)(I + Q_i)^-1 (Cayley), Q_i skew of size `block`

Q is stored as its upper triangle, row by row; it starts at zero, so R = I and a fresh OFT is the identity. The Cayley
transform is exact (a linear solve); HF PEFT's default is a truncated series of the *inverse* rotation, so exports set
`use_cayley_neumann: false`.
"""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxpeft.methods.base import Base, Method, Params, Site, at_least


@dataclasses.dataclass(frozen=True)
class OFT(Method):
    """Block-diagonal rotation of the input of the linear layers that `targets` selects."""

    targets: str = "text.attention.qv"
    block: int = 32
    name: ClassVar[str] = "oft"
    kinds: ClassVar[tuple[str, ...]] = ("linear",)
    expands: ClassVar[bool] = True
    size_field: ClassVar[str] = "block"

    def __post_init__(self) -> None:
        at_least(self.name, "block", self.block, 2)

    def sizes(self, model: nn.Module, sites: list[Site]) -> Sequence[int]:
        """The common divisors of the input widths."""
        widths = [site.shape[0] for site in sites]
        return [b for b in range(2, min(widths) + 1) if not any(width % b for width in widths)]

    def on_input(self, site: Site) -> bool:
        return True

    def init(self, rng: jax.Array, site: Site, base: Base) -> Params:
        n_in = site.shape[0]
        if n_in % self.block:
            raise ValueError(f"oft: block is {self.block}; it must divide the {n_in} inputs of {site.path}")
        return {"q": jnp.zeros((n_in // self.block, self.block * (self.block - 1) // 2))}

    def expand(self, params: Params, shared: Params, site: Site) -> Params:
        upper = np.triu_indices(self.block, 1)
        q = params["q"]
        skew = jnp.zeros((*q.shape[:-1], self.block, self.block)).at[..., upper[0], upper[1]].set(q)
        skew = skew - jnp.swapaxes(skew, -1, -2)
        one = jnp.broadcast_to(jnp.eye(self.block), skew.shape)
        return {"r": jnp.linalg.solve(one + skew, one - skew)}  # the two factors commute

    def inputs(self, params: Params, x: jax.Array) -> jax.Array:
        blocks = x.reshape(-1, *params["r"].shape[:2])
        return jnp.einsum("XGI,GIJ->XGJ", blocks, params["r"].astype(x.dtype)).reshape(x.shape)

    def merge(self, params: Params, base: Base) -> Base:
        kernel = base["kernel"].reshape(*params["r"].shape[:2], -1)
        return base | {"kernel": jnp.einsum("GIJ,GJO->GIO", params["r"], kernel).reshape(base["kernel"].shape)}
