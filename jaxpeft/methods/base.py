"""What a method is: a frozen dataclass with pure functions, bound to the sites that its `targets` selects.

A method may add leaves at any kind of site (`Site.KINDS`), train base leaves in place (`trains`), or both. A method
file overrides `init` and one or two site functions; everything else stays the identity defined here. Equal dataclasses
hash alike, so two equal methods share one compilation.

Some methods train other leaves than those that act in the forward pass: an MLP that makes a prefix, matrices that all
layers share, Cayley parameters of a rotation. They set `expands` and define `expand`, which turns what is trained into
what acts, once per forward and outside the scan over layers.
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

Params = dict[str, jax.Array]  # one site's own leaves
Base = dict[str, Any]  # what stands at a site: arrays by name, None for a bias that is not there, a tokenizer
Stream = Callable[[jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Site:
    """A place in a model: its module path, kind, shape (see KINDS) and number of stacked layers (None: not stacked)."""

    path: str
    kind: str
    shape: tuple[int, ...]
    layers: int | None = None

    # What the recorded shape of each kind means; its length tells a stacked site (one more axis, L) from a single one.
    KINDS: ClassVar[dict[str, tuple[str, ...]]] = {
        "linear": ("in", "out"),  # a matrix product with its bias
        "norm": ("D",),  # the output of a LayerNorm
        "sublayer": ("D",),  # input and output of an attention or MLP, before the residual add
        "kv": ("D", "N", "H"),  # keys, values and mask of an attention; D of what its queries are made of
        "block": ("D",),  # the sequence entering one layer of a stack
        "embed": ("D",),  # the sequence and padding mask entering a stack
    }

    @staticmethod
    def key(kind: str) -> str:
        """The name of a site's entry among the submodules of its module, which no submodule can have."""
        return f"@{kind}"


class Added(NamedTuple):
    """Keys and values that a method puts in front of an attention's own, the same for every row of the batch."""

    k_KNH: jax.Array
    v_KNH: jax.Array
    on: jax.Array | None = None  # scalar bool: False hides them (a layer that the method leaves alone)
    gain_BT: jax.Array | None = None  # per query: multiplies these keys, and these values


_OURS: set[str] = set()  # names of jaxpeft's own method classes


@dataclasses.dataclass(frozen=True)
class Method:
    """The identity on every site. Subclasses add fields (the paper's hyper-parameters) with defaults."""

    targets: str = ""  # a group of the model's (`model.targets`), or a regular expression searched in site paths
    name: ClassVar[str] = ""  # in configs, leaf names and messages
    kinds: ClassVar[tuple[str, ...]] = ()  # kinds of site this method can act on
    train: ClassVar[str] = ""  # regular expression of base leaves trained in place; '' for none
    fixed: ClassVar[tuple[str, ...]] = ()  # own leaves that are stored but not trained
    expands: ClassVar[bool] = False  # whether `expand` must run before the leaves can act
    first: ClassVar[bool] = False  # must be the first to change a linear's output (it reads the base kernel)
    acts_at: ClassVar[str] = ""  # for messages: what `selects` asks of a site beside kind and `targets`
    size_field: ClassVar[str] = ""  # the field that a parameter budget is spent on

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Raises TypeError for a class with the name of one of jaxpeft's: saved files know a method by its class's name."""
        super().__init_subclass__(**kwargs)
        if cls.__module__.startswith("jaxpeft."):
            _OURS.add(cls.__name__)
        elif cls.__name__ in _OURS:
            raise TypeError(f"jaxpeft has a method class {cls.__name__}; call yours something else")

    def __new__(cls, *args: Any, **fields: Any) -> Self:
        """Raises TypeError for fields without a name (`LoRA(16)` would set `targets`) and of another type than declared."""
        mine = {field.name: field.type for field in dataclasses.fields(cls)}
        if args:
            name = next((one for one in (cls.size_field, *mine) if one and one in mine), "targets")
            raise TypeError(
                f"{cls.__name__} takes named fields: {cls.__name__}({name}={args[0]!r}); it has {', '.join(mine)}"
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
        """The method with named groups of a model (group -> regular expression) resolved; other patterns stay."""
        found = {}
        for name in ("targets", "leaves"):
            if (value := getattr(self, name, None)) in groups:
                found[name] = groups[value]
        inner = getattr(self, "method", None)
        if isinstance(inner, Method):
            found["method"] = inner.on(groups)
        return dataclasses.replace(self, **found) if found else self

    # where it acts and what it trains
    def selects(self, site: Site) -> bool:
        """Whether the method binds at a site."""
        return site.kind in self.kinds and re.search(self.targets, site.path) is not None

    def trains(self, leaf: str) -> bool:
        """Whether the base leaf 'params/...' is trained in place."""
        return bool(self.train) and re.search(self.train, leaf) is not None

    def lr_scale(self, leaf: str) -> float:
        """Multiplies the learning rate of an own leaf (LoRA+)."""
        return 1.0

    def sizes(self, model: nn.Module, sites: list[Site]) -> Sequence[int]:
        """The sensible values of `size_field` at the sites of a model, ascending."""
        return range(1, 1 << 20)

    # leaves
    def init(self, rng: jax.Array, site: Site, base: Base) -> Params:
        """Own leaves for one layer of a site. `base`: what stands there: a linear's 'kernel' and 'bias', a norm's
        'scale' and 'bias', a text stack's 'word', 'norm/scale', 'norm/bias' and 'tokenizer'."""
        raise ValueError(f"{self.name} adds nothing at a {site.kind} site")

    def init_site(self, rng: jax.Array, site: Site, base: Base) -> Params:
        """Own leaves for a site: `init` per layer, stacked. Methods whose layers share leaves override it."""
        if site.layers is None:
            return self.init(rng, site, base)
        rngs = jax.random.split(rng, site.layers)
        return jax.vmap(lambda key, one: self.init(key, site, one))(rngs, base)

    def init_shared(self, rng: jax.Array, sites: list[Site]) -> Params:
        """Leaves that all sites of the method share, stored once."""
        return {}

    def expand(self, params: Params, shared: Params, site: Site) -> Params:
        """Stored leaves of a site -> the leaves that act, stacked for a stacked site."""
        return params

    def folded(self) -> "Method":
        """The method whose own leaves are this one's expanded leaves, if training needs more than using it does."""
        return self

    def fold(self, params: Params, site: Site) -> Params:
        """Stored leaves of a site -> those of `folded()`."""
        return self.expand(params, {}, site)

    def shift(self, site: Site) -> int:
        """By how many positions the tokens of the stack at an embed site move."""
        return 0

    def on_input(self, site: Site) -> bool:
        """Whether a linear's input (True) or output is what changes."""
        return False

    # acting
    def inputs(self, params: Params, x: jax.Array) -> jax.Array:
        """The input x (..., in) of a linear -> new x."""
        return x

    def linear(self, params: Params, x: jax.Array, y: jax.Array, base: Base, rng: jax.Array | None) -> jax.Array:
        """x (..., in), y (..., out) = x @ kernel + bias -> new y. `base`: 'kernel' and 'bias' (None where there is
        none). `rng` is None when nothing is random (evaluation)."""
        return y

    def norm(self, params: Params, y: jax.Array) -> jax.Array:
        """The output of a LayerNorm -> new output."""
        return y

    def sublayer(self, params: Params, x_BTD: jax.Array, y_BTD: jax.Array, stream: Stream) -> jax.Array:
        """Input and output of an attention or MLP, before the residual add -> new output. `stream(y_BTD)` is the
        residual stream after y_BTD is added: normalised in a post-norm block, plain in a pre-norm one."""
        return y_BTD

    def kv(self, params: Params, x_BTD: jax.Array) -> Added:
        """Keys and values to put in front; x_BTD is what the queries are made of."""
        raise NotImplementedError(self.name)

    def block(self, params: Params, x_BTD: jax.Array) -> jax.Array:
        """The sequence that enters one layer of a stack -> new one."""
        return x_BTD

    def embed(self, params: Params, x_BTD: jax.Array, as_tokens: Stream | None) -> jax.Array | None:
        """Rows (K, D) to put in front of the sequence that enters a stack. `as_tokens(rows_KD)` treats rows as word
        embeddings at positions 0..K-1 (None where the stack has no words). None: nothing is put there."""
        raise NotImplementedError(self.name)

    def merge(self, params: Params, base: Base) -> Base:
        """The base leaves of one layer with this method folded in; raises where that is not exact."""
        raise ValueError(f"{self.name} cannot be merged into the base exactly; export the tuned tree instead")


def _takes(kind: Any, value: object) -> bool:
    """Whether a field that is declared as `kind` takes a value: float a whole number too, no number a bool."""
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
    """Raise ValueError unless a field has one of its allowed values."""
    if value not in allowed:
        raise ValueError(f"{method}: {field} is {value!r}; choose one of {', '.join(allowed)}")


def at_least(method: str, field: str, value: float, least: float) -> None:
    """Raise ValueError when a field is below its least value."""
    if value < least:
        raise ValueError(f"{method}: {field} is {value}; it must be at least {least}")
