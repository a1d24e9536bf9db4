"""What a data set gives (`Split`) and what a task makes of it (`Examples`)."""

import dataclasses
import sys
from collections.abc import Iterable, Sequence

import numpy as np


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

    def take(self, indices: Iterable[int]) -> "Split":
        """The pictures at `indices`, in that order."""
        return dataclasses.replace(self, images=_Subset(self.images, indices), rows=[self.rows[i] for i in indices])


class _Subset(Sequence):
    def __init__(self, images: Sequence, indices: Iterable[int]) -> None:
        self._images, self._indices = images, list(indices)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, i: int) -> np.ndarray:
        return self._images[self._indices[i]]


def progress_bars() -> None:
    """Let TFDS draw its bars on a terminal only: in a log they are control characters."""
    import tensorflow_datasets as tfds

    (tfds.enable_progress_bar if sys.stderr.isatty() else tfds.disable_progress_bar)()


@dataclasses.dataclass(frozen=True)
class Examples:
    """What a task makes of a split: arrays with one row per example, the images, and what scoring needs per example.

    arrays['image_index'] (n,) says which image an example looks at; the others go to the model as they are. `tables` hold
    outputs of frozen stages with one row per image; where they stand in for the images, `images` is None.
    """

    arrays: dict[str, np.ndarray]
    images: Sequence | None
    rows: list[dict]
    tables: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.arrays["image_index"])


def pad_tokens(sequences: Sequence[Sequence[int]], pad_id: int, length: int | None = None) -> np.ndarray:
    """Ragged ids -> (n, longest or `length`) int32, right-padded."""
    longest = max(map(len, sequences)) if length is None else length
    out = np.full((len(sequences), longest), pad_id, np.int32)
    for row, ids in zip(out, sequences, strict=True):
        row[: len(ids)] = ids
    return out
