"""How transformers and PEFT have a model: what exporting and importing ask of it.

A model's converter gives one `HuggingFace` (`model.hf`), most of which its table of names says already: which tensor of a
checkpoint is which leaf says which module over there is which of ours, too. What a table cannot say is written down in
`HeadPlace` and `Decoder`, and the files beside the weights are methods of a subclass (models/blip_hf.py is one).
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxpeft import tree
from jaxpeft.models import convert
from jaxpeft.tree import Tree


@dataclasses.dataclass(frozen=True)
class Place:
    """Where one of our linears or norms is in transformers' model: module name ('{}' for the layer), part of a fusion."""

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
    """The head that writes words. PEFT saves its module whole, and its vocabulary matrix is then its own over there."""

    module: str  # over there
    saved_as: str  # its name in PEFT's modules_to_save
    leaves: dict[str, str]  # tensor below `module` -> our leaf; kernels are transposed
    linear: str  # below `module`: the linear that gives the logits; it holds `bias` too
    vocabulary: str  # our path of that linear
    embedding: str  # our leaf (V, D) that is its matrix where it has no kernel of its own
    bias: str  # our leaf

    def matrix(self, flat: Mapping[str, Any]) -> np.ndarray:
        """The vocabulary matrix (V, D) in flat params: the head's own, or the word embedding that it is tied to."""
        own = flat.get(f"{self.vocabulary}/kernel")
        return np.asarray(flat[self.embedding] if own is None else own.T)


@dataclasses.dataclass(frozen=True)
class Decoder:
    """The text layers that PEFT's virtual tokens act in."""

    module: str  # over there: what PEFT wraps
    embed: str  # our site where tokens are put in front
    attention: str  # our site whose keys and values a prefix goes to
    width: int
    heads: int
    layers: int


@dataclasses.dataclass(frozen=True, eq=False)
class HuggingFace:
    """One model as transformers has it. `task` below is the task that was tuned, None where it is not known."""

    model: Any
    table: convert.Table
    head: HeadPlace
    decoder: Decoder

    @functools.cached_property
    def places(self) -> dict[str, Place]:
        """Our module path -> Place, for every linear and norm, and the head's vocabulary, tied or not."""
        found = {}
        for rule in self.table.rules:
            layers = None if rule.layers is None else len(rule.layers)
            for part, leaf in enumerate(rule.leaves):
                path, _, last = leaf.rpartition("/")
                if last in ("kernel", "scale"):
                    module = rule.name.removesuffix(".weight")
                    found[path] = Place(module, part, len(rule.leaves), layers, len(rule.shape) == 4)
        # a module of its own there, which an adapter may wrap, though its weight is the word embedding
        return found | {self.head.vocabulary: Place(f"{self.head.module}.{self.head.linear}")}

    def tensors(self, params: Tree) -> dict[str, np.ndarray]:
        """The weights file, float32; a tied tensor under each of its names, as some releases do not tie when they load."""
        flat = convert.written(tree.flatten(params), self.table)
        tensors = {name: np.asarray(x, np.float32) for name, x in flat.items()}
        return tensors | {second: tensors[first] for second, first in self.table.tied.items()}

    def settings(self, task: Any, beams: int) -> dict[str, dict]:
        """File name -> JSON of the files beside the weights; with a `task`, generation there begins and ends as ours."""
        raise NotImplementedError

    def code(
        self, task: Any, out: str, base: str = "", revision: str = "", in_decoder: bool = False, beams: int = 1
    ) -> list[str]:
        """Lines of Python that write the text of a picture with transformers: of the merged model in `out`, or, with
        `base`, of that with the PEFT adapter in `out`, which is put on the decoder where `in_decoder`."""
        raise NotImplementedError

    def notes(self, task: Any) -> list[str]:
        """What users of that code must know."""
        return []


def of(model: Any) -> HuggingFace:
    """`model.hf`. Raises ValueError for a model without one."""
    found = getattr(model, "hf", None)
    if found is None:
        raise ValueError(
            f"{type(model).__name__} has no Hugging Face form; use save_tuned, which keeps any method exactly"
        )
    return found
