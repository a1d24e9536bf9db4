"""The form of a model in transformers and PEFT, which export and import need.

A model's converter provides one `HuggingFace` (`model.hf`). Most of it follows from its table of names: the mapping of tensors
to leaves also maps modules of transformers to ours. `HeadPlace` and `Decoder` hold what the table does not, and a subclass
writes the files beside the weights (such as models/blip_hf.py).
"""

import dataclasses
import functools
from collections.abc import Container, Iterator, Mapping
from typing import Any

import numpy as np

from jaxpeft import tree
from jaxpeft.models import convert
from jaxpeft.tree import Tree


@dataclasses.dataclass(frozen=True)
class Place:
    """Where one of our linears or norms is in transformers: module name ('{}' for the layer) and part of a fused matrix."""

    module: str
    part: int = 0
    parts: int = 1
    layers: int | None = None
    convolution: bool = False

    def names(self) -> list[str]:
        """The modules, in the order of the layers."""
        return [self.module] if self.layers is None else [self.module.format(i) for i in range(self.layers)]


@dataclasses.dataclass(frozen=True)
class HeadPlace:
    """The output head. PEFT saves its modules whole, which unties its vocabulary matrix."""

    saved_as: tuple[str, ...]  # names in PEFT's modules_to_save
    tensors: tuple[str, ...]  # of those modules in transformers, besides the vocabulary's
    linear: str  # in transformers: the linear that computes the logits
    vocabulary: str  # our path of that linear
    embedding: str  # our leaf (V, D) that is its matrix if it has no kernel of its own
    bias: str = ""  # our leaf, which `linear` holds too; '' if logits have no bias

    def matrix(self, flat: Mapping[str, Any]) -> np.ndarray:
        """The vocabulary matrix (V, D) in flat params: that of the head, or the word embedding that it is tied to."""
        own = flat.get(f"{self.vocabulary}/kernel")
        return np.asarray(flat[self.embedding] if own is None else own.T)


@dataclasses.dataclass(frozen=True)
class Decoder:
    """The text layers in which PEFT's virtual tokens act."""

    embed: str  # our site where prompt tokens are added
    attention: str  # our site where a prefix is added
    width: int
    heads: int
    layers: int


@dataclasses.dataclass(frozen=True, eq=False)
class HuggingFace:
    """The form of one model in transformers. `task` below is the task that was trained, None if unknown."""

    model: Any
    table: convert.Table
    head: HeadPlace
    decoder: Decoder | None  # None if PEFT's virtual tokens do not act in this model as ours do
    config: dict[str, Any]  # the content of config.json

    @functools.cached_property
    def places(self) -> dict[str, Place]:
        """Our module path -> Place, for every linear and norm and for the head's vocabulary, tied or not."""
        found = {}
        for rule in self.table.rules:
            layers = None if rule.layers is None else len(rule.layers)
            for part, leaf in enumerate(rule.leaves):
                path, _, last = leaf.rpartition("/")
                if last in ("kernel", "scale"):
                    module = rule.name.removesuffix(".weight")
                    found[path] = Place(module, part, len(rule.leaves), layers, len(rule.shape) == 4)
        # a separate module in transformers, which an adapter may wrap, even if its weight is the word embedding
        return found | {self.head.vocabulary: Place(self.head.linear)}

    def rules(self, names: Container[str]) -> list[convert.Rule]:
        """The rules of the table that write any of these tensors."""
        return [rule for rule in self.table.rules if any(name in names for name in rule.names())]

    def tensors(self, params: Tree) -> Iterator[tuple[str, np.ndarray]]:
        """The tensors of a file of weights, one at a time; tied tensors once."""
        return convert.tensors(tree.flatten(params), self.table)

    def settings(self, task: Any, beams: int) -> dict[str, dict]:
        """File name -> JSON of the files beside the weights; with a `task`, generation has the same prompt and lengths."""
        raise NotImplementedError

    def code(
        self, task: Any, out: str, base: str = "", revision: str = "", in_decoder: bool = False, beams: int = 1
    ) -> list[str]:
        """Lines of Python that generate the text of an image with transformers: with the merged model in `out` or, with
        `base`, with that model and the PEFT adapter in `out`, which wraps only the decoder if `in_decoder`."""
        raise NotImplementedError

    def notes(self, task: Any) -> list[str]:
        """Notes for users of that code."""
        return []


def of(model: Any) -> HuggingFace:
    """`model.hf`. Raises ValueError for a model without one."""
    found = getattr(model, "hf", None)
    if found is None:
        raise ValueError(
            f"{type(model).__name__} has no Hugging Face form; use save_tuned, which supports every model and method"
        )
    return found
