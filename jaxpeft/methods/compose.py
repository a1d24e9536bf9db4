"""Methods composed of other methods.

Scoped   another method, restricted to the paths that a second pattern selects and to some layers of a stack. Layers are
         scanned, so every layer runs the method and a mask selects where it counts. Other layers have no parameters
         (`expand` fills in zeros), so counts, files and optimizer state hold only what is trained
Gated    another method times a gate sigmoid(x g + c) of the site's input, per token: UniPELT's (Mao et al. 2021,
         arXiv 2110.07577, section 3.2). The paper averages the gate over the sequence, which in a causal decoder would
         let a token see later ones; a gate per token does not. A gated prefix scales its keys and values per query
UniPELT  gated prefix, serial adapter and LoRA together (section 3.3; prefix 10, bottleneck D / 16 = 48, rank 8)
MAM      Mix-And-Match (He et al. 2021, arXiv 2110.04366, section 4.6): a small prefix in attention (30) and a scaled
         parallel adapter on the FFN (512)
"""

import dataclasses
import operator
import re
import typing
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft.methods.adapter import ParallelAdapter, SerialAdapter
from jaxpeft.methods.base import Added, Base, Method, Params, Site, Stream
from jaxpeft.methods.lora import LoRA
from jaxpeft.methods.prefix import Prefix
from jaxpeft.ops import matmul


def _of_inner(name: str) -> Any:
    """A property or function that a wrapper has of its inner method."""
    return property(operator.attrgetter(f"inner.{name}"))


@dataclasses.dataclass(frozen=True)
class _Around(Method):
    """A wrapper that forwards everything to its inner method."""

    method: Method | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.method, Method) or not isinstance(self.targets, str):
            kind = type(self).__name__
            raise ValueError(f"{kind} wraps another method: {kind}(method=LoRA(...), targets='text')")

    @property
    def inner(self) -> Method:
        """`method`, checked by `__post_init__`."""
        return typing.cast(Method, self.method)

    name, kinds, train, fixed, first, size_field = map(
        _of_inner, ("name", "kinds", "train", "fixed", "first", "size_field")
    )
    matched, lr_scale, sizes, shift, on_input, init_shared = map(
        _of_inner, ("matched", "lr_scale", "sizes", "shift", "on_input", "init_shared")
    )

    def selects(self, site: Site) -> bool:
        return self.inner.selects(site) and re.search(self.targets, self.matched(site)) is not None

    def trains(self, leaf: str) -> bool:
        return self.inner.trains(leaf) and re.search(self.targets, leaf.removeprefix("params/")) is not None

    def folded(self) -> Method:
        return dataclasses.replace(self, method=self.inner.folded())


@dataclasses.dataclass(frozen=True)
class Scoped(_Around):
    """`method` at the sites that `targets` matches too and, if `layers` (numbered from 0) is given, in those layers only."""

    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(sorted(set(self.layers))))
            if not self.layers or self.layers[0] < 0:
                raise ValueError(f"scoped: layers is {self.layers}; expected layer numbers of at least 0")
            if self.inner.train:
                raise ValueError(
                    f"scoped: {self.inner.name} trains base leaves, which hold all layers of a stack in one array; "
                    "restrict it with `targets`, not with `layers`"
                )
            if "embed" in self.kinds and "kv" not in self.kinds:
                raise ValueError(
                    f"scoped: {self.inner.name} adds its tokens at the input of a stack, for all layers; leave out `layers`"
                )

    @property
    def expands(self) -> bool:
        return self.layers is not None or self.inner.expands

    def selects(self, site: Site) -> bool:
        return super().selects(site) and (self.layers is None or site.layers is not None or site.kind == "embed")

    def _fewer(self, site: Site) -> Site | None:
        """The site as the inner method sees it, or None if `layers` does not apply."""
        if self.layers is None or site.layers is None:
            return None
        if self.layers[-1] >= site.layers:
            raise ValueError(f"scoped: no layer {self.layers[-1]} in {site.path}; it has layers 0..{site.layers - 1}")
        return dataclasses.replace(site, layers=len(self.layers))

    def init_site(self, rng: jax.Array, site: Site, base: Base) -> Params:
        fewer = self._fewer(site)
        if fewer is None:
            return self.inner.init_site(rng, site, base)
        return self.inner.init_site(
            rng, fewer, {k: x if x is None else x[jnp.array(self.layers)] for k, x in base.items()}
        )

    def expand(self, params: Params, shared: Params, site: Site) -> Params:
        fewer = self._fewer(site)
        acting = self.inner.expand(params, shared, fewer or site) if self.inner.expands else params
        if fewer is None:
            return acting
        here = jnp.array(self.layers)
        acting = {k: jnp.zeros((site.layers, *x.shape[1:]), x.dtype).at[here].set(x) for k, x in acting.items()}
        return acting | {"on": jnp.zeros(site.layers, bool).at[here].set(True)}

    def fold(self, params: Params, site: Site) -> Params:
        return self.inner.fold(params, self._fewer(site) or site)

    def _choose(self, params: Params, new: jax.Array, old: jax.Array) -> jax.Array:
        return jnp.where(params["on"], new, old) if "on" in params else new

    def inputs(self, params: Params, x: jax.Array) -> jax.Array:
        return self._choose(params, self.inner.inputs(params, x), x)

    def linear(self, params: Params, x: jax.Array, y: jax.Array, base: Base, rng: jax.Array | None) -> jax.Array:
        return self._choose(params, self.inner.linear(params, x, y, base, rng), y)

    def norm(self, params: Params, y: jax.Array) -> jax.Array:
        return self._choose(params, self.inner.norm(params, y), y)

    def sublayer(self, params: Params, x_BTD: jax.Array, y_BTD: jax.Array, stream: Stream) -> jax.Array:
        return self._choose(params, self.inner.sublayer(params, x_BTD, y_BTD, stream), y_BTD)

    def kv(self, params: Params, x_BTD: jax.Array) -> Added:
        added = self.inner.kv(params, x_BTD)
        return added._replace(on=params["on"]) if "on" in params else added

    def block(self, params: Params, x_BTD: jax.Array) -> jax.Array:
        return self._choose(params, self.inner.block(params, x_BTD), x_BTD)

    def embed(self, params: Params, x_BTD: jax.Array, as_tokens: Stream | None) -> jax.Array | None:
        return self.inner.embed(params, x_BTD, as_tokens)

    def merge(self, params: Params, base: Base) -> Base:
        new = {name: x for name, x in self.inner.merge(params, base).items() if x is not None}  # no bias
        return {name: self._choose(params, x, base[name]) for name, x in new.items()}


@dataclasses.dataclass(frozen=True)
class Gated(_Around):
    """`method` (on linear, sublayer or kv sites) times a gate on the site's input; `targets` restricts it further."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.kinds or "embed" in self.inner.kinds:
            raise ValueError(
                f"gated: {self.inner.name} acts at {', '.join(self.inner.kinds) or 'base leaves'}; expected a method at "
                "linears, sublayers, or keys and values"
            )

    def selects(self, site: Site) -> bool:
        return site.kind in self.kinds and super().selects(site)

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(kind for kind in self.inner.kinds if kind in ("linear", "sublayer", "kv"))

    @property
    def expands(self) -> bool:
        return self.inner.expands

    def init_site(self, rng: jax.Array, site: Site, base: Base) -> Params:
        stack = () if site.layers is None else (site.layers,)
        gate = {"gate": jnp.zeros((*stack, site.shape[0], 1)), "gate_bias": jnp.zeros((*stack, 1))}
        return self.inner.init_site(rng, site, base) | gate

    def expand(self, params: Params, shared: Params, site: Site) -> Params:
        gate = {name: params[name] for name in ("gate", "gate_bias")}
        inner = {name: x for name, x in params.items() if name not in gate}
        return self.inner.expand(inner, shared, site) | gate

    def _gate(self, params: Params, x: jax.Array) -> jax.Array:
        """sigmoid(x g + c): (..., 1)."""
        return jax.nn.sigmoid(matmul(x, params["gate"].astype(x.dtype), params["gate_bias"].astype(x.dtype)))

    def inputs(self, params: Params, x: jax.Array) -> jax.Array:
        return x + self._gate(params, x) * (self.inner.inputs(params, x) - x)

    def linear(self, params: Params, x: jax.Array, y: jax.Array, base: Base, rng: jax.Array | None) -> jax.Array:
        return y + self._gate(params, x) * (self.inner.linear(params, x, y, base, rng) - y)

    def sublayer(self, params: Params, x_BTD: jax.Array, y_BTD: jax.Array, stream: Stream) -> jax.Array:
        new = self.inner.sublayer({k: v for k, v in params.items() if "gate" not in k}, x_BTD, y_BTD, stream)
        return y_BTD + self._gate(params, x_BTD) * (new - y_BTD)

    def kv(self, params: Params, x_BTD: jax.Array) -> Added:
        return self.inner.kv(params, x_BTD)._replace(gain_BT=self._gate(params, x_BTD)[..., 0])


def UniPELT(
    targets: str = "text", length: int = 10, bottleneck: int = 48, rank: int = 8, alpha: float | str = "2r"
) -> tuple[Gated, ...]:
    """Gated prefix, serial adapter (after the MLP) and LoRA (query and value) in the stacks that `targets` selects."""
    adapter = SerialAdapter(targets="", bottleneck=bottleneck, placement="pfeiffer")
    lora = LoRA(targets=r"attention/(query|value)$", rank=rank, alpha=alpha)
    parts = (Prefix(targets=r"attention$", length=length), adapter, lora)
    return tuple(Gated(method=part, targets=targets) for part in parts)


def MAM(targets: str = "text", length: int = 30, bottleneck: int = 512, scale: float = 4.0) -> tuple[Scoped, ...]:
    """Prefix in every attention and scaled parallel adapter on every MLP of the stacks that `targets` selects."""
    parts = (
        Prefix(targets=r"attention$", length=length),
        ParallelAdapter(targets=r"mlp$", bottleneck=bottleneck, scale=scale),
    )
    return tuple(Scoped(method=part, targets=targets) for part in parts)
