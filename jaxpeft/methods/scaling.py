"""Methods that scale activations of the base.

IA3     Liu et al. 2022, arXiv 2205.05638, section 3.3: keys, values and the FFN's inner activation are multiplied by
        learned vectors that start at one. Keys and values are outputs of a linear (their bias is scaled too); the inner
        activation is the input of the FFN's second linear, which `feedforward` names
SSF     Lian et al. 2022, arXiv 2210.08823, eq. 2: y <- g * y + t after every linear and LayerNorm (and the patch
        embedding). The paper draws g ~ N(1, std), t ~ N(0, std) with std .02; the default here is 0, the identity
"""

import dataclasses
import re
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxpeft.methods.base import Base, Method, Params, Site
from jaxpeft.ops import per_feature


@dataclasses.dataclass(frozen=True)
class IA3(Method):
    """Learned scales of keys, values and inner FFN activations."""

    targets: str = "text.attention.kv_mlp.down"
    feedforward: str = r"mlp/down$"  # linears whose input is scaled; of all others the output is
    name: ClassVar[str] = "ia3"
    kinds: ClassVar[tuple[str, ...]] = ("linear",)

    def on_input(self, site: Site) -> bool:
        return re.search(self.feedforward, site.path) is not None

    def init(self, rng: jax.Array, site: Site, base: Base) -> Params:
        n_in, n_out = site.shape
        return {"l_in": jnp.ones(n_in)} if self.on_input(site) else {"l": jnp.ones(n_out)}

    def inputs(self, params: Params, x: jax.Array) -> jax.Array:
        return x * per_feature(params["l_in"].astype(x.dtype), x) if "l_in" in params else x

    def linear(self, params: Params, x: jax.Array, y: jax.Array, base: Base, rng: jax.Array | None) -> jax.Array:
        return y * per_feature(params["l"].astype(y.dtype), y) if "l" in params else y

    def merge(self, params: Params, base: Base) -> Base:
        if "l_in" in params:
            return base | {"kernel": base["kernel"] * params["l_in"][:, None]}
        bias = None if base["bias"] is None else base["bias"] * params["l"]
        return {"kernel": base["kernel"] * params["l"][None], "bias": bias}


@dataclasses.dataclass(frozen=True)
class SSF(Method):
    """A learned scale and shift after every operation that `targets` selects."""

    targets: str = "text.blocks"
    std: float = 0.0
    name: ClassVar[str] = "ssf"
    kinds: ClassVar[tuple[str, ...]] = ("linear", "norm")

    def init(self, rng: jax.Array, site: Site, base: Base) -> Params:
        g, t = self.std * jax.random.normal(rng, (2, site.shape[-1]))
        return {"g": 1 + g, "t": t}

    def norm(self, params: Params, y: jax.Array) -> jax.Array:
        return y * per_feature(params["g"].astype(y.dtype), y) + per_feature(params["t"].astype(y.dtype), y)

    def linear(self, params: Params, x: jax.Array, y: jax.Array, base: Base, rng: jax.Array | None) -> jax.Array:
        return self.norm(params, y)

    def merge(self, params: Params, base: Base) -> Base:
        if base["bias"] is None:
            raise ValueError("ssf: the layer has no bias that the shift could be merged into")
        (weight,) = base.keys() - {"bias"}  # a linear's kernel or a norm's scale, outputs last
        scaled = {name: x * per_feature(params["g"], x) if x.ndim > 1 else x * params["g"] for name, x in base.items()}
        return {weight: scaled[weight], "bias": scaled["bias"] + params["t"]}
