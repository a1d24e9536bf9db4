"""Bottleneck adapters: a small MLP beside or after a sublayer, D -> m -> D.

SerialAdapter    Houlsby et al. 2019, arXiv 1902.00751, section 2.1: y <- y + s * A(y), A(h) = act(h D + d) U + u, after
                 every attention and MLP, before the residual add. placement='pfeiffer' (Pfeiffer et al. 2020, arXiv
                 2005.00247): once per layer, after the MLP, and A reads the residual stream as the block's own
                 LayerNorm leaves it: y <- y + s * A(LN(x + y)). In a pre-norm block (ViT) it reads x + y
ParallelAdapter  He et al. 2021, arXiv 2110.04366, table 1: y <- y + s * A(x), x the input of the sublayer (in a
                 pre-norm block the normalised one). Best on the MLP in that paper; on attention it is added after the
                 output projection. The paper has s = 4 ("scaled"), 1 (plain), or learned starting at 1
Compacter        Karimi Mahabadi et al. 2021, arXiv 2106.04647: a serial adapter whose matrices are sums of n Kronecker
                 products A_i (x) (s_i t_i), the A_i (n x n) shared by all adapters, s_i t_i of rank one

Both older papers start near the identity (std 1e-2, .02 in later code). The default, init_weights='zero_up', starts exactly
at the identity, as the other methods do. init_weights='normal' draws both matrices with `std`; the entries of Compacter's, sums
of products of normal factors, have this standard deviation.
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxpeft.methods.base import Base, Method, Params, Site, Stream, at_least, kaiming, one_of
from jaxpeft.ops import matmul

ACTIVATIONS = {
    "relu": nn.relu,
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "swish": nn.swish,
    "linear": lambda x: x,
}
# sublayers by the last name of their path, in any model: self_attention, MultiHeadDotProductAttention_0, MlpBlock
_MLP = r"(mlp|ffn|feed_?forward)"
PLACEMENTS = {
    placement: rf"(?i)({kinds})(_?(block|layer))?(_?\d+)?$"
    for placement, kinds in {"houlsby": rf"attention|attn|{_MLP}", "pfeiffer": _MLP}.items()
}


@dataclasses.dataclass(frozen=True)
class _Bottleneck(Method):
    targets: str = "text"
    bottleneck: int = 64
    scale: float = 1.0
    activation: str = "relu"
    init_weights: str = "zero_up"  # or 'normal'
    std: float = 0.02  # of 'normal'
    kinds: ClassVar[tuple[str, ...]] = ("sublayer",)
    size_field: ClassVar[str] = "bottleneck"

    def __post_init__(self) -> None:
        at_least(self.name, "bottleneck", self.bottleneck, 1)
        one_of(self.name, "activation", self.activation, ACTIVATIONS)
        one_of(self.name, "init_weights", self.init_weights, ("zero_up", "normal"))

    def init(self, rng: jax.Array, site: Site, base: Base) -> Params:
        (width,), m = site.shape, self.bottleneck
        one, other = jax.random.split(rng)
        if self.init_weights == "normal":
            down = self.std * jax.random.normal(one, (width, m))
            up = self.std * jax.random.normal(other, (m, width))
        else:
            down, up = kaiming(one, (width, m), width), jnp.zeros((m, width))
        return {"down": down, "down_bias": jnp.zeros(m), "up": up, "up_bias": jnp.zeros(width)}

    def adapt(self, params: Params, h_BTD: jax.Array) -> jax.Array:
        """act(h D + d) U + u."""
        params = {name: x.astype(h_BTD.dtype) for name, x in params.items()}
        h_BTM = ACTIVATIONS[self.activation](matmul(h_BTD, params["down"], params["down_bias"]))
        return matmul(h_BTM, params["up"], params["up_bias"])


@dataclasses.dataclass(frozen=True)
class SerialAdapter(_Bottleneck):
    """A bottleneck after a sublayer. `targets` selects towers or stacks, `placement` the sublayers in them."""

    placement: str = "houlsby"
    name: ClassVar[str] = "serial_adapter"

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self.name, "placement", self.placement, PLACEMENTS)

    def selects(self, site: Site) -> bool:
        return super().selects(site) and re.search(PLACEMENTS[self.placement], site.path) is not None

    @property
    def acts_at(self) -> str:
        named = "attention or mlp" if self.placement == "houlsby" else "mlp"
        return f"sublayers named {named} (placement={self.placement!r})"

    def sublayer(self, params: Params, x_BTD: jax.Array, y_BTD: jax.Array, stream: Stream) -> jax.Array:
        reads_BTD = stream(y_BTD) if self.placement == "pfeiffer" else y_BTD
        return y_BTD + self.scale * self.adapt(params, reads_BTD)


@dataclasses.dataclass(frozen=True)
class ParallelAdapter(_Bottleneck):
    """A bottleneck parallel to a sublayer."""

    targets: str = "text.mlp"
    scale: float = 4.0
    learned_scale: bool = False  # a scalar per layer that starts at `scale`
    name: ClassVar[str] = "parallel_adapter"

    def init(self, rng: jax.Array, site: Site, base: Base) -> Params:
        scale = {"scale": jnp.float32(self.scale)} if self.learned_scale else {}
        return super().init(rng, site, base) | scale

    def sublayer(self, params: Params, x_BTD: jax.Array, y_BTD: jax.Array, stream: Stream) -> jax.Array:
        scale = params["scale"].astype(y_BTD.dtype) if self.learned_scale else self.scale
        return y_BTD + scale * self.adapt(params, x_BTD)


@dataclasses.dataclass(frozen=True)
class Compacter(SerialAdapter):
    """A serial adapter made of Kronecker products; `n` must divide width and bottleneck."""

    activation: str = "gelu"
    n: int = 4
    name: ClassVar[str] = "compacter"
    rule_std: ClassVar[float] = 0.01  # of the initial A_i
    expands: ClassVar[bool] = True

    def sizes(self, model: nn.Module, sites: list[Site]) -> Sequence[int]:
        return range(self.n, 1 << 20, self.n)

    def init_shared(self, rng: jax.Array, sites: list[Site]) -> Params:
        return {"rule": self.rule_std * jax.random.normal(rng, (self.n, self.n, self.n))}

    def init(self, rng: jax.Array, site: Site, base: Base) -> Params:
        (width,), m, n = site.shape, self.bottleneck, self.n
        if width % n or m % n:
            raise ValueError(f"compacter: n={n} must divide width {width} and bottleneck {m} at {site.path}")
        draw = jax.nn.initializers.glorot_uniform(in_axis=-2, out_axis=-1, batch_axis=0)
        if self.init_weights == "normal":  # an entry is the sum of n products of an entry of A_i and two factors
            draw = jax.nn.initializers.normal((self.std / (self.rule_std * n**0.5)) ** 0.5)
        keys = jax.random.split(rng, 4)
        params = {
            "down_s": draw(keys[0], (n, width // n, 1)),
            "down_t": draw(keys[1], (n, 1, m // n)),
            "up_s": draw(keys[2], (n, m // n, 1)),
            "up_t": draw(keys[3], (n, 1, width // n)),
        }
        if self.init_weights == "zero_up":
            params["up_t"] = jnp.zeros_like(params["up_t"])
        return params | {"down_bias": jnp.zeros(m), "up_bias": jnp.zeros(width)}

    def expand(self, params: Params, shared: Params, site: Site) -> Params:
        def whole(s: jax.Array, t: jax.Array) -> jax.Array:
            """sum_i kron(rule_i, s_i t_i): (..., n, in/n, 1), (..., n, 1, out/n) -> (..., in, out)."""
            products = jnp.einsum("iab,...ixr,...iry->...axby", shared["rule"], s, t)
            a, x, b, y = products.shape[-4:]
            return products.reshape(*products.shape[:-4], a * x, b * y)

        down, up = (whole(params[f"{part}_s"], params[f"{part}_t"]) for part in ("down", "up"))
        return {"down": down, "down_bias": params["down_bias"], "up": up, "up_bias": params["up_bias"]}
