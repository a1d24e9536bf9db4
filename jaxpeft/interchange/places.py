"""Where our modules are in transformers' BLIP, read from the converter's table, and the names of PEFT's files."""

import dataclasses
from typing import Any

import numpy as np

from jaxpeft.methods import Method, Scoped
from jaxpeft.models import blip_convert

PREFIX = "base_model.model."
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
HEAD = "text_decoder.cls.predictions."
VOCABULARY = "text_decoder/head/vocabulary"
HEAD_KEYS = {  # under HEAD -> our leaf, transposed?
    "transform.dense.weight": ("head/dense/kernel", True),
    "transform.dense.bias": ("head/dense/bias", False),
    "transform.LayerNorm.weight": ("head/norm/scale", False),
    "transform.LayerNorm.bias": ("head/norm/bias", False),
    "bias": ("head/bias", False),
}


@dataclasses.dataclass(frozen=True)
class Place:
    """Where one of our linears or norms is in transformers' model: module name ('{}' for the layer), part of a fusion."""

    module: str
    part: int
    parts: int
    layers: int | None

    def names(self) -> list[str]:
        return [self.module] if self.layers is None else [self.module.format(i) for i in range(self.layers)]


def places(config: Any) -> dict[str, Place]:
    """Our module path -> Place, for every module with a weight, and the head's vocabulary, tied or not."""
    found = {}
    for rule in blip_convert.table(config):
        if rule.name.endswith(".weight") and not rule.leaves[0].endswith(("embed/word", "embed/position")):
            for part, leaf in enumerate(rule.leaves):
                path, layers = leaf.rsplit("/", 1)[0], None if rule.layers is None else len(rule.layers)
                found[path] = Place(rule.name.removesuffix(".weight"), part, len(rule.leaves), layers)
    # a module of its own there, which an adapter may wrap, though its weight is the word embedding
    return found | {VOCABULARY: Place(f"{HEAD}decoder", 0, 1, None)}


def vocabulary_matrix(flat: dict[str, Any]) -> np.ndarray:
    """The head's vocabulary matrix (V, D) in flat params: its own, or the word embedding that it is tied to."""
    own = flat.get(f"{VOCABULARY}/kernel")
    return np.asarray(flat["text_decoder/embed/word"] if own is None else own.T)


def inner_of(method: Method) -> Method:
    """The method inside a `Scoped`, or the method."""
    return method.method if isinstance(method, Scoped) else method
