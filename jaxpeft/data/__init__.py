"""The data sets, by the name that configs use. Each is a function `load(config, splits) -> {split: Split}`.

`config` is config.data: `name`, and every key that the function reads. To add a data set, write `DATASETS["mine"] = load` in
a module of your own (see jaxpeft/runtime/registry.py).
"""

import importlib
from collections.abc import Callable, Sequence
from typing import Any

from jaxpeft.data.base import Examples, Split
from jaxpeft.runtime.registry import Registry

__all__ = ["DATASETS", "Examples", "Split", "load"]


def load(config: Any, splits: Sequence[str]) -> dict[str, Split]:
    """Load the named splits of `config.name`. Raises ValueError for an unknown data set before anything is read."""
    return DATASETS.find(config.name)(config, splits)


def _in(module: str) -> Callable[..., dict[str, Split]]:
    """`load` of a module of this package, imported on the first call: importing TFDS and Pillow's codecs takes seconds."""
    return lambda config, splits: importlib.import_module(f"jaxpeft.data.{module}").load(config, splits)


DATASETS = Registry(
    "data set", {"scenes": _in("scenes"), "folder": _in("folder"), "coco_captions": _in("coco"), "vqav2": _in("coco")}
)
