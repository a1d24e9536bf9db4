"""Data sets, by the name that configs use: each is a function `load(config, splits) -> {split: Split}`.

One of your own is a line in a module of yours, `DATASETS["mine"] = load` (see jaxpeft/registry.py). `config` is config.data:
`name`, and every key that the function reads.
"""

import dataclasses
import importlib
import sys
from collections.abc import Sequence

from jaxpeft.registry import Registry


@dataclasses.dataclass(frozen=True)
class Split:
    """Pictures and their texts. `images[i]` is a uint8 RGB array image_YXC of native size; access is thread-safe.

    `rows[i]` belongs to the same picture: {'image_id': str, 'captions': [str, ...], 'questions': [{'question_id',
    'question', 'answers': [str, ...], 'type'}, ...]}. `report` is what loading dropped or changed, for the result file.
    `source` and the image ids together say which pictures these are; '' where that is not known.
    """

    name: str
    images: Sequence
    rows: list[dict]
    report: dict = dataclasses.field(default_factory=dict)
    source: str = ""

    def take(self, indices) -> "Split":
        """The pictures at `indices`, in that order."""
        return dataclasses.replace(self, images=_Subset(self.images, indices), rows=[self.rows[i] for i in indices])


class _Subset(Sequence):
    def __init__(self, images, indices):
        self._images, self._indices = images, list(indices)

    def __len__(self):
        return len(self._indices)

    def __getitem__(self, i):
        return self._images[self._indices[i]]


def progress_bars() -> None:
    """Let TFDS draw its bars on a terminal only: in a log they are control characters."""
    import tensorflow_datasets as tfds

    (tfds.enable_progress_bar if sys.stderr.isatty() else tfds.disable_progress_bar)()


def load(config, splits: Sequence[str]) -> dict[str, Split]:
    """The named splits of `config.name`. Raises ValueError for an unknown data set, before anything is read."""
    return DATASETS.find(config.name)(config, splits)


def _in(module: str):
    """`load` of a module of this package, imported when it is called: TFDS and Pillow's codecs take seconds."""
    return lambda config, splits: importlib.import_module(f"jaxpeft.datasets.{module}").load(config, splits)


DATASETS = Registry(
    "data set", {"scenes": _in("scenes"), "folder": _in("folder"), "coco_captions": _in("coco"), "vqav2": _in("coco")}
)
