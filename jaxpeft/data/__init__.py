"""Data sets, by the name that configs use: each is a function `load(config, splits) -> {split: Split}`.

One of your own is a line in a module of yours, `DATASETS["mine"] = load` (see jaxpeft/runtime/registry.py). `config` is
config.data: `name`, and every key that the function reads.
"""

import importlib
from collections.abc import Callable, Sequence
from typing import Any

from jaxpeft.data.base import Examples, Split
from jaxpeft.runtime.registry import Registry

__all__ = ["DATASETS", "Examples", "Split", "load"]


def load(config: Any, splits: Sequence[str]) -> dict[str, Split]:
    """The named splits of `config.name`. Raises ValueError for an unknown data set, before anything is read."""
    return DATASETS.find(config.name)(config, splits)


def _in(module: str) -> Callable[..., dict[str, Split]]:
    """`load` of a module of this package, imported when it is called: TFDS and Pillow's codecs take seconds."""
    return lambda config, splits: importlib.import_module(f"jaxpeft.data.{module}").load(config, splits)


DATASETS = Registry(
    "data set", {"scenes": _in("scenes"), "folder": _in("folder"), "coco_captions": _in("coco"), "vqav2": _in("coco")}
)
