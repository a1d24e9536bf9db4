"""What a data set returns (`Split`) and what a task turns it into (`Examples`)."""

import dataclasses
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxpeft.data.mapped import Ragged, Rows, empty
from jaxpeft.inputs.images import Pixels


@dataclasses.dataclass(frozen=True)
class Split:
    """Images and their texts. `images[i]` is a uint8 RGB array image_YXC of its original size; access is thread-safe. Where
    files are decoded, `images.opened(i)` may return the same pixels as an image of Pillow.

    `rows[i]` belongs to the same image: {'image_id': str, 'captions': [str, ...], 'questions': [{'question_id',
    'question', 'answers': [str, ...], 'type'}, ...]}; for millions of them, give `mapped.Rows`. `report`, which goes into the
    result file, lists what loading dropped or changed. `source` and the image ids together identify the images; `source` is ''
    where their origin is unknown.
    """

    name: str
    images: Sequence
    rows: Sequence[dict]
    report: dict = dataclasses.field(default_factory=dict)
    source: str = ""

    def take(self, indices: Sequence[int] | np.ndarray) -> "Split":
        """The images at `indices`, in that order."""
        rows = self.rows.take(indices) if isinstance(self.rows, Rows) else [self.rows[i] for i in indices]
        return dataclasses.replace(self, images=_Subset(self.images, indices), rows=rows)


class _Subset(Sequence):
    def __init__(self, images: Sequence, indices: Sequence[int] | np.ndarray) -> None:
        self._images, self._indices = images, np.asarray(indices, np.int64)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, i: int) -> np.ndarray:
        return self._images[int(self._indices[i])]

    def opened(self, i: int) -> Pixels:
        return opened(self._images, int(self._indices[i]))


def opened(images: Sequence, i: int) -> Pixels:
    """Image `i`, without the copy into an array where `images` decodes it with Pillow."""
    return images.opened(i) if hasattr(images, "opened") else images[i]


def jpeg_edge_of(config: Mapping[str, Any]) -> int:
    """The key `jpeg_edge` of a data set, see `images.opened`; 0 where it is not set. Raises ValueError if it is no length."""
    edge = config.get("jpeg_edge")
    if edge is not None and (type(edge) is not int or edge < 1):
        raise ValueError(f"data.jpeg_edge is {edge!r}; expected a number of pixels, at least 1, or None for full size")
    return edge or 0


def source_of(origin: str, jpeg_edge: int) -> str:
    """`Split.source` of images that are decoded with `jpeg_edge`, on which their pixels depend."""
    return f"{origin}, jpeg_edge {jpeg_edge}" if jpeg_edge else origin


def progress_bars() -> None:
    """Show TFDS progress bars on a terminal only: in a log file they are control characters."""
    import tensorflow_datasets as tfds

    (tfds.enable_progress_bar if sys.stderr.isatty() else tfds.disable_progress_bar)()


@dataclasses.dataclass(frozen=True)
class Examples:
    """The examples of a split: arrays with one row per example, the images, and the rows that scoring needs (none in training).

    arrays['image_index'] (n,) is the index of each example's image; the other arrays are passed to the model. `tables` hold
    outputs of frozen stages, one row per image. `images` is None where the tables replace the images.
    """

    arrays: dict[str, np.ndarray]
    images: Sequence | None
    rows: list[dict]
    tables: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.arrays["image_index"])


def pad_tokens(sequences: Iterable[Sequence[int]], pad_id: int, length: int | None = None) -> np.ndarray:
    """Right-pad token ids to an int32 array (n, length of the longest, or `length`)."""
    ragged = Ragged(sequences)
    out_NT = empty((len(ragged.length_N), int(ragged.length_N.max()) if length is None else length), np.int32)
    out_NT[:] = pad_id
    ragged.fill(out_NT)
    return out_NT
