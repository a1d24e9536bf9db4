"""The base class of methods: a frozen dataclass with pure functions, bound to the sites that its `targets` selects.

A method may add adapter parameters at any kind of site (`Site.KINDS`), train base leaves in place (`trains`), or both. It
overrides `init` and one or two site functions; all others are the identity defined here. Equal dataclasses have equal
hashes, so equal methods share one compiled program.

In some methods the trained parameters are not those that the forward pass uses: an MLP that makes a prefix, matrices that
all layers share, Cayley parameters of a rotation. They set `expands` and define `expand`, which computes the parameters in
use from the trained ones, once per forward pass and outside the scan over layers.
"""

import dataclasses
import numbers
import re
import types
import typing
from collections.abc import Callable, Collection, Sequence
from typing import Any, ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxpeft.runtime import renamed

Params = dict[str, jax.Array]  # adapter parameters of one site
Base = dict[str, Any]  # base parameters at a site: arrays by name, None for an absent bias; a text stack's tokenizer
Stream = Callable[[jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Site:
    """A place in a model: its module path, kind, shape (see KINDS) and number of stacked layers (None: not stacked)."""

    path: str
    kind: str
    shape: tuple[int, ...]
    layers: int | None = None

    # The axes of the recorded shape of each kind. A stacked site has one more axis in front, L.
    KINDS: ClassVar[dict[str, tuple[str, ...]]] = {
        "linear": ("in", "out"),  # a matrix product with its bias
        "norm": ("D",),  # the output of a LayerNorm
        "sublayer": ("D",),  # input and output of an attention or MLP, before the residual add
        "kv": ("D", "N", "H"),  # keys, values and mask of an attention; D: width of the input of its queries
        "block": ("D",),  # the sequence entering one layer of a stack
        "embed": ("D",),  # the sequence and padding mask entering a stack
    }

    @staticmethod
    def key(kind: str) -> str:
        """The name of a site's entry beside the submodules of its module; no submodule can have this name."""
        return f"@{kind}"


class Added(NamedTuple):
    """Keys and values that a method puts before those of an attention, the same for every row of the batch."""

    k_KNH: jax.Array
    v_KNH: jax.Array
    on: jax.Array | None = None  # scalar bool: False hides them (in a layer without the method)
    gain_BT: jax.Array | None = None  # per query: a factor for these keys and these values


_OURS: set[str] = set()  # names of the built-in method classes


@dataclasses.dataclass(frozen=True)
class Method:
    """The identity on every site. Subclasses add fields (the paper's hyper-parameters) with defaults."""

    targets: str = ""  # a named group of sites (`model.targets`), or a regular expression searched in site paths
    name: ClassVar[str] = ""  # in configs, leaf names and messages
    kinds: ClassVar[tuple[str, ...]] = ()  # kinds of site this method can act on
    train: ClassVar[str] = ""  # regular expression of base leaves trained in place; '' for none
    fixed: ClassVar[tuple[str, ...]] = ()  # adapter parameters that are stored but not trained
    expands: ClassVar[bool] = False  # whether `expand` must run before the forward pass
    first: ClassVar[bool] = False  # must be the first method that changes a linear's output (it reads the base kernel)
    acts_at: ClassVar[str] = ""  # for messages: what `selects` requires of a site besides kind and `targets`
    instead: ClassVar[str] = ""  # for messages: what to use where a model does not have the leaves of `train`
    size_field: ClassVar[str] = ""  # the field that a parameter budget determines

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Raise TypeError for a class with the name of a built-in one: saved files identify a method by its class name."""
        super().__init_subclass__(**kwargs)
        if cls.__module__.startswith("jaxpeft."):
            _OURS.add(cls.__name__)
        elif cls.__name__ in _OURS:
            raise TypeError(f"{cls.__name__} is a built-in method class; choose another name")

    def __new__(cls, *args: Any, **fields: Any) -> Self:
        """Raise TypeError for positional fields (`LoRA(16)` would set `targets`) and for values of a wrong type."""
        mine = {field.name: field.type for field in dataclasses.fields(cls)}
        if args:
            name = next((one for one in (cls.size_field, *mine) if one and one in mine), "targets")
            raise TypeError(
                f"{cls.__name__} takes keyword arguments: {cls.__name__}({name}={args[0]!r}); it has {', '.join(mine)}"
            )
        for name, value in fields.items():
            if name not in mine and renamed.FIELDS.get(name) in mine:
                raise TypeError(f"{cls.__name__}: the field {name} is now {renamed.FIELDS[name]}")
            if name in mine and not _takes(mine[name], value):
                raise TypeError(
                    f"{cls.__name__}: {name} is {value!r}; expected {getattr(mine[name], '__name__', mine[name])}"
                )
        return super().__new__(cls)

    def on(self, groups: dict[str, str]) -> "Method":
        """The method with a model's named groups (group -> regular expression) resolved; other patterns are kept."""
        found = {}
        for name in ("targets", "leaves"):
            if (value := getattr(self, name, None)) in groups:
                found[name] = groups[value]
        inner = getattr(self, "method", None)
        if isinstance(inner, Method):
            found["method"] = inner.on(groups)
        return dataclasses.replace(self, **found) if found else self

    # where the method acts and what it trains
    def selects(self, site: Site) -> bool:
        """Whether the method binds at a site."""
        return site.kind in self.kinds and re.search(self.targets, self.matched(site)) is not None

    def matched(self, site: Site) -> str:
        """The path that `targets` is searched in."""
        return site.path

    def trains(self, leaf: str) -> bool:
        """Whether the base leaf named `leaf`, 'params/...', is trained in place."""
        return bool(self.train) and re.search(self.train, leaf) is not None

    def lr_scale(self, leaf: str) -> float:
        """The factor of the learning rate for an adapter parameter (LoRA+)."""
        return 1.0

    def sizes(self, model: nn.Module, sites: list[Site]) -> Sequence[int]:
        """The useful values of `size_field` for the sites of a model, ascending."""
        return range(1, 1 << 20)

    # adapter parameters
    def init(self, rng: jax.Array, site: Site, base: Base) -> Params:
        """Adapter parameters for one layer of a site. `base` holds a linear's 'kernel' and 'bias', a norm's 'scale' and
        'bias', or a text stack's 'word', 'word_scale', 'norm/scale', 'norm/bias' (None without a norm) and 'tokenizer'."""
        raise ValueError(f"{self.name} adds nothing at a {site.kind} site")

    def init_site(self, rng: jax.Array, site: Site, base: Base) -> Params:
        """Adapter parameters for a site: `init` per layer, stacked. Methods whose layers share parameters override it."""
        if site.layers is None:
            return self.init(rng, site, base)
        rngs = jax.random.split(rng, site.layers)
        return jax.vmap(lambda key, one: self.init(key, site, one))(rngs, base)

    def init_shared(self, rng: jax.Array, sites: list[Site]) -> Params:
        """Adapter parameters that all sites of the method share, stored once."""
        return {}

    def expand(self, params: Params, shared: Params, site: Site) -> Params:
        """Stored parameters of a site -> those that the forward pass uses, stacked for a stacked site."""
        return params

    def folded(self) -> "Method":
        """The method to deploy: its parameters are the expanded ones of this one, if training needs more than inference."""
        return self

    def fold(self, params: Params, site: Site) -> Params:
        """Stored parameters of a site -> those of `folded()`."""
        return self.expand(params, {}, site)

    def shift(self, site: Site) -> int:
        """The number of positions by which the method shifts the tokens of the stack at an embed site."""
        return 0

    def on_input(self, site: Site) -> bool:
        """Whether the method changes a linear's input (True) or output (False)."""
        return False

    # the forward pass
    def inputs(self, params: Params, x: jax.Array) -> jax.Array:
        """The input x (..., in) of a linear -> new x."""
        return x

    def linear(self, params: Params, x: jax.Array, y: jax.Array, base: Base, rng: jax.Array | None) -> jax.Array:
        """x (..., in), y (..., out) = x @ kernel + bias -> new y. `base`: 'kernel' and 'bias' (None if absent). `rng` is
        None in evaluation."""
        return y

    def norm(self, params: Params, y: jax.Array) -> jax.Array:
        """The output of a LayerNorm -> new output."""
        return y

    def sublayer(self, params: Params, x_BTD: jax.Array, y_BTD: jax.Array, stream: Stream) -> jax.Array:
        """Input and output of an attention or MLP, before the residual add -> new output. `stream(y_BTD)` is the
        residual stream after y_BTD is added: normalised in a post-norm block, plain in a pre-norm one."""
        return y_BTD

    def kv(self, params: Params, x_BTD: jax.Array) -> Added:
        """Keys and values to put in front; x_BTD is the input of the queries."""
        raise NotImplementedError(self.name)

    def block(self, params: Params, x_BTD: jax.Array) -> jax.Array:
        """The sequence that enters one layer of a stack -> new one."""
        return x_BTD

    def embed(self, params: Params, x_BTD: jax.Array, as_tokens: Stream | None) -> jax.Array | None:
        """Rows (K, D) to put before the sequence that enters a stack, or None. `as_tokens(rows_KD)` treats rows as word
        embeddings at positions 0..K-1; it is None for a stack without words."""
        raise NotImplementedError(self.name)

    def merge(self, params: Params, base: Base) -> Base:
        """The base leaves of one layer with this method merged; raises ValueError if that is not exact."""
        raise ValueError(f"{self.name} cannot be merged into the base exactly; save it as an adapter instead")


def _takes(kind: Any, value: object) -> bool:
    """Whether a field of type `kind` accepts a value: float accepts integers too, and no number accepts a bool."""
    origin = typing.get_origin(kind)
    if origin in (types.UnionType, typing.Union):
        return any(_takes(one, value) for one in typing.get_args(kind))
    if origin is typing.Literal:
        return value in typing.get_args(kind)
    kind = origin or kind
    if kind in (int, float):
        return isinstance(value, numbers.Integral if kind is int else numbers.Real) and not isinstance(value, bool)
    return not isinstance(kind, type) or isinstance(value, (tuple, list) if kind is tuple else kind)


def kaiming(rng: jax.Array, shape: tuple[int, ...], n_in: int) -> jax.Array:
    """Kaiming-uniform with a = sqrt(5), the default of torch's Linear: U(-1/sqrt(in), 1/sqrt(in))."""
    return jax.random.uniform(rng, shape, jnp.float32, -(n_in**-0.5), n_in**-0.5)


def one_of(method: str, field: str, value: str, allowed: Collection[str]) -> None:
    """Raise ValueError unless a field has an allowed value."""
    if value not in allowed:
        raise ValueError(f"{method}: {field} is {value!r}; choose one of {', '.join(allowed)}")


def at_least(method: str, field: str, value: float, least: float) -> None:
    """Raise ValueError if a field is below its minimum."""
    if value < least:
        raise ValueError(f"{method}: {field} is {value}; it must be at least {least}")
