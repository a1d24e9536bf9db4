"""The methods, by the names that configs use. A new method is one file, its class here and in jaxpeft/__init__.py, a row in the
test table and its reference in the docs (docs/adding/method.md lists all of it); or one line in your own module,
`METHODS["mine"] = Mine` (see jaxpeft/runtime/registry.py)."""

import inspect
from collections.abc import Mapping
from typing import Any

from jaxpeft.methods.adapter import Compacter, ParallelAdapter, SerialAdapter
from jaxpeft.methods.base import Added, Method, Params, Site
from jaxpeft.methods.compose import MAM, Gated, Scoped, UniPELT
from jaxpeft.methods.loha import LoHa
from jaxpeft.methods.lora import DoRA, LoRA, PiSSA
from jaxpeft.methods.oft import OFT
from jaxpeft.methods.prefix import Prefix
from jaxpeft.methods.prompt import VPT, Prompt
from jaxpeft.methods.scaling import IA3, SSF
from jaxpeft.methods.selective import HEADS, BitFit, Full, Head, LayerNorms, NewWords, Selective
from jaxpeft.methods.vera import VeRA
from jaxpeft.runtime.registry import Registry

_SINGLE = (
    Prompt, Prefix, SerialAdapter, ParallelAdapter, LoRA, LoHa, DoRA, PiSSA, VeRA, IA3, SSF, OFT, Compacter, VPT,
    BitFit, LayerNorms, Full, Head, Selective,
)  # fmt: skip
# name -> a method, or a function that returns several methods
METHODS = Registry("method", {cls.name: cls for cls in _SINGLE} | {"mam": MAM, "unipelt": UniPELT})

__all__ = [  # pyright: ignore[reportUnsupportedDunderAll]  of `_SINGLE` too; it exports every public name
    "HEADS", "METHODS", "Added", "Gated", "Method", "NewWords", "Params", "Scoped", "Site", "build", "defaults",
    "MAM", "UniPELT", *(cls.__name__ for cls in _SINGLE),
]  # fmt: skip


def defaults(name: str) -> dict:
    """The fields of method `name` with their default values, for a config."""
    return {key: one.default for key, one in inspect.signature(METHODS.find(name)).parameters.items()}


def size_field(name: str) -> str:
    """The field of method `name` that `size` sets; '' if there is none."""
    field = getattr(METHODS.find(name), "size_field", "bottleneck" if name == "mam" else "rank")
    return field if field in defaults(name) else ""


def size_of(method: Mapping[str, Any]) -> int:
    """The size in config.method, such as LoRA's rank; 0 if the method has none."""
    field = size_field(method["name"])
    return method[field] if field else 0


def build(name: str, head: str = "none", **fields: Any) -> tuple[Method, ...]:
    """The methods of a run: `name` with its fields and, unless head='none', the head that is trained with it."""
    cls = METHODS.find(name)
    unknown = set(fields) - set(defaults(name))
    if unknown:
        raise ValueError(f"method {name}: unknown fields {sorted(unknown)}; choose from {sorted(defaults(name))}")
    if head not in HEADS:
        raise ValueError(f"unknown head {head!r}; choose one of {', '.join(HEADS)}")
    beside = () if head == "none" else (Head(matrix=head),)
    if beside and cls is Head:
        raise ValueError("method 'head' and head=... train the same leaves; set method.matrix and head='none'")
    made = cls(**fields)
    return (*(made if isinstance(made, tuple) else (made,)), *beside)
