"""Prefix tuning: Li & Liang 2021, arXiv 2101.00190, section 4; equation as in He et al. 2021 (2110.04366), eq. 5.

    head = softmax(q [P_k; K]^T / sqrt(H)) [P_v; V]      P_k, P_v: `length` learned keys and values per layer and head

which equals (1 - g) attention(q, K, V) + g attention(q, P_k, P_v), g the softmax mass of the prefix. So a prefix is
never the identity: even zero keys take softmax mass from the others.

With `mlp` > 0 the paper's reparameterisation is trained: P = tanh(E W1 + b1) W2 + b2, one E (length, D) and MLP for all
layers of an attention type. Only training needs it: `sites.fold` replaces it exactly by the prefix that it computes, and
'stored' counts that prefix. `positions='shift'` counts the prefix as `length` positions before the text, as transformers
does with a prefix of HF PEFT (needed to export one); by default the text keeps its positions.
"""

import dataclasses
from collections.abc import Iterator
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxpeft.methods.base import Added, Base, Method, Params, Site, Stream, at_least, kaiming, one_of

POSITIONS = ("keep", "shift")


@dataclasses.dataclass(frozen=True)
class Prefix(Method):
    """Learned keys and values in the attentions that `targets` selects (self-attention, cross-attention or both)."""

    targets: str = "text.attention"
    length: int = 16
    mlp: int = 0  # hidden width of the reparameterisation (800 in the authors' code); 0: train the prefix directly
    std: float = 0.02  # of the initial prefix, or of E
    positions: str = "keep"
    name: ClassVar[str] = "prefix"
    size_field: ClassVar[str] = "length"

    def __post_init__(self) -> None:
        at_least("prefix", "length", self.length, 1)
        at_least("prefix", "mlp", self.mlp, 0)
        one_of("prefix", "positions", self.positions, POSITIONS)

    @property
    def kinds(self) -> tuple[str, ...]:
        return ("kv", "embed") if self.positions == "shift" else ("kv",)

    @property
    def expands(self) -> bool:
        return self.mlp > 0

    def matched(self, site: Site) -> str:
        # the prefix in a stack's self-attention shifts the positions of the stack
        return f"{site.path}/blocks/self_attention" if site.kind == "embed" else site.path

    def shift(self, site: Site) -> int:
        return self.length if self.positions == "shift" else 0

    def init(self, rng: jax.Array, site: Site, base: Base) -> Params:
        if site.kind == "embed":
            return {}
        return {
            name: self.std * jax.random.normal(key, (self.length, *site.shape[1:])) for name, key in _two(rng, "kv")
        }

    def init_site(self, rng: jax.Array, site: Site, base: Base) -> Params:
        if not self.mlp or site.kind == "embed":
            return super().init_site(rng, site, base)
        _, n_heads, size = site.shape
        width, stack = n_heads * size, () if site.layers is None else (site.layers,)
        keys = jax.random.split(rng, 5)
        return {
            "embedding": self.std * jax.random.normal(keys[0], (self.length, width)),
            "w1": kaiming(keys[1], (width, self.mlp), width),
            "b1": kaiming(keys[2], (self.mlp,), width),
            "w2": kaiming(keys[3], (*stack, self.mlp, 2, n_heads, size), self.mlp),
            "b2": kaiming(keys[4], (*stack, 2, n_heads, size), self.mlp),
        }

    def expand(self, params: Params, shared: Params, site: Site) -> Params:
        if not self.mlp or site.kind == "embed":
            return params
        h_KM = jnp.tanh(params["embedding"] @ params["w1"] + params["b1"][None])
        both = jnp.einsum("KM,...MCNH->...CKNH", h_KM, params["w2"]) + params["b2"][..., None, :, :]
        return {"k": both[..., 0, :, :, :], "v": both[..., 1, :, :, :]}

    def folded(self) -> Method:
        return dataclasses.replace(self, mlp=0)

    def kv(self, params: Params, x_BTD: jax.Array) -> Added:
        return Added(params["k"], params["v"])

    def embed(self, params: Params, x_BTD: jax.Array, as_tokens: Stream | None) -> jax.Array | None:
        return None


def _two(rng: jax.Array, names: str) -> Iterator[tuple[str, jax.Array]]:
    return zip(names, jax.random.split(rng), strict=True)
