"""The methods, by the name that configs use. A new method is one file, one line here and one row in the test table."""

import dataclasses

from jaxpeft.methods.base import Method, Theta
from jaxpeft.methods.lora import LoRA
from jaxpeft.methods.selective import HEADS, Full, Head, Selective

METHODS: dict[str, type[Method]] = {"lora": LoRA, "full": Full, "head": Head, "selective": Selective}

__all__ = ["HEADS", "METHODS", "Full", "Head", "LoRA", "Method", "Selective", "Theta", "build", "defaults"]


def _lookup(name: str) -> type[Method]:
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; choose one of {', '.join(sorted(METHODS))}")
    return METHODS[name]


def defaults(name: str) -> dict:
    """The fields of method `name` with their default values, for a config."""
    return {field.name: field.default for field in dataclasses.fields(_lookup(name))}


def build(name: str, head: str = "none", **fields) -> tuple[Method, ...]:
    """The methods of one run: `name` with its fields and, unless head='none', the tuned head beside it."""
    cls = _lookup(name)
    unknown = set(fields) - set(defaults(name))
    if unknown:
        raise ValueError(f"method {name}: unknown fields {sorted(unknown)}; it has {sorted(defaults(name))}")
    if head not in HEADS:
        raise ValueError(f"unknown head {head!r}; choose one of {', '.join(HEADS)}")
    beside = () if head == "none" else (Head(matrix=head),)
    if beside and cls is Head:
        raise ValueError("method 'head' with head=...: they are the same leaves; set method.matrix and head='none'")
    return (cls(**fields), *beside)
