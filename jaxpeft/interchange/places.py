"""Where our modules are in transformers' BLIP, read from the converter's table, and the names of PEFT's files."""

import dataclasses

from jaxpeft.methods import Method, Scoped
from jaxpeft.models import blip_port

PREFIX = "base_model.model."
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
HEAD = "text_decoder.cls.predictions."
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


def places(config) -> dict[str, Place]:
    """Our module path -> Place, for every module with a weight."""
    found = {}
    for row in blip_port.table(config):
        if row.reference.endswith(".weight") and not row.leaves[0].endswith(("embed/word", "embed/position")):
            for part, leaf in enumerate(row.leaves):
                path = leaf.rsplit("/", 1)[0]
                found[path] = Place(row.reference.removesuffix(".weight"), part, len(row.leaves), row.layers or None)
    return found


def inner_of(method: Method) -> Method:
    """The method inside a `Scoped`, or the method."""
    return method.method if isinstance(method, Scoped) else method
