"""LoHa: Hadamard product of two low-rank matrices (Hyeon-Woo et al. 2021, FedPara, arXiv 2108.06098, eq. 3).

    y = x W + b + (alpha / r) * x ((A1 B1) * (A2 B2))        A: (in, r), B: (r, out), the product elementwise

The update has rank up to r^2. A1, B1, B2 are normal (std 1, .1, 1) and A2 is zero, so a fresh LoHa is the identity.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxpeft.methods.base import Base, Params, Site
from jaxpeft.methods.lora import LoRA
from jaxpeft.ops import matmul


@dataclasses.dataclass(frozen=True)
class LoHa(LoRA):
    """Elementwise product of two low-rank updates, with the fields of LoRA."""

    name: ClassVar[str] = "loha"

    def init(self, rng: jax.Array, site: Site, base: Base) -> Params:
        (n_in, n_out), keys = site.shape, jax.random.split(rng, 3)
        shapes = {"a1": (n_in, self.rank), "b1": (self.rank, n_out), "b2": (self.rank, n_out)}
        stds = {"a1": 1.0, "b1": 0.1, "b2": 1.0}
        drawn = {k: stds[k] * jax.random.normal(key, shapes[k]) for k, key in zip(shapes, keys, strict=True)}
        return drawn | {"a2": jnp.zeros((n_in, self.rank))}

    def delta(self, params: Params) -> jax.Array:
        return self.scale * (params["a1"] @ params["b1"]) * (params["a2"] @ params["b2"])

    def update(self, params: Params, x: jax.Array, rng: jax.Array | None) -> jax.Array:
        return matmul(self._drop(x, rng), self.delta(params).astype(x.dtype))
