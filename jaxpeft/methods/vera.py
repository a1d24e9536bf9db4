"""VeRA: Vector-based Random Matrix Adaptation (Kopiczko et al. 2023, arXiv 2310.11454, eq. 2).

    y = x W + b + ((x A) * d) B * l        A: (in, r), B: (r, out) random, frozen, shared by all sites and layers

d starts at 0.1 and l at zero, so a fresh VeRA is the identity. A and B are drawn for the largest input and output and
sliced per site. They are stored, as another random generator would give other matrices, and counted as stored, not trained.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxpeft.methods.base import Base, Method, Params, Site, at_least, kaiming
from jaxpeft.ops import matmul, per_feature


@dataclasses.dataclass(frozen=True)
class VeRA(Method):
    """Trained scales of a random low-rank update that all sites share."""

    targets: str = "text.attention.qv"
    rank: int = 256
    d_initial: float = 0.1
    name: ClassVar[str] = "vera"
    kinds: ClassVar[tuple[str, ...]] = ("linear",)
    fixed: ClassVar[tuple[str, ...]] = ("a", "b")
    expands: ClassVar[bool] = True
    size_field: ClassVar[str] = "rank"

    def __post_init__(self) -> None:
        at_least(self.name, "rank", self.rank, 1)

    def init_shared(self, rng: jax.Array, sites: list[Site]) -> Params:
        n_in, n_out = (max(site.shape[i] for site in sites) for i in (0, 1))
        one, other = jax.random.split(rng)
        return {"a": kaiming(one, (n_in, self.rank), n_in), "b": kaiming(other, (self.rank, n_out), self.rank)}

    def init(self, rng: jax.Array, site: Site, base: Base) -> Params:
        return {"d": jnp.full((self.rank,), self.d_initial), "l": jnp.zeros((site.shape[1],))}

    def expand(self, params: Params, shared: Params, site: Site) -> Params:
        n_in, n_out = site.shape
        cut = {"a": shared["a"][:n_in], "b": shared["b"][:, :n_out]}
        if site.layers is not None:
            cut = {name: jnp.broadcast_to(x, (site.layers, *x.shape)) for name, x in cut.items()}
        return params | cut

    def linear(self, params: Params, x: jax.Array, y: jax.Array, base: Base, rng: jax.Array | None) -> jax.Array:
        h = matmul(x, params["a"].astype(x.dtype))
        h = matmul(h * per_feature(params["d"].astype(x.dtype), h), params["b"].astype(x.dtype))
        return y + h * per_feature(params["l"].astype(x.dtype), h)

    def merge(self, params: Params, base: Base) -> Base:
        return base | {"kernel": base["kernel"] + params["a"] * params["d"][None] @ params["b"] * params["l"][None]}
