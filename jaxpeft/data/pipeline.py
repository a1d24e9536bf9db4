"""From a split to batches: nested subsets, resized images, and an order that is a pure function of (seed, step).

Texts are tokenised once into arrays (`Examples.arrays`). Images are read and resized when a batch is made, in grain's reader
threads, in training and in evaluation, and stay uint8 until they are on the device. A step and a seed always give the same
batch, so a resumed run needs no saved reader state: it starts reading at its step.
"""

import collections
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import grain
import numpy as np

from jaxpeft.data.base import Examples, Split, opened
from jaxpeft.data.randaugment import randaugment
from jaxpeft.inputs import images
from jaxpeft.models.base import VisionLanguageModel
from jaxpeft.runtime import host

MAGNITUDES = {"blip": 5, "mplug": 7}  # augmentations that add RandAugment to crop_flip -> its magnitude
AUGMENTS = ("none", "crop", "crop_flip", *MAGNITUDES)


def subset(split: Split, *, seed: int, fraction: float = 1.0, n_images: int | None = None) -> tuple[Split, np.ndarray]:
    """The first `n_images` (or `fraction`) of the images in an order drawn from `seed`, and their indices in `split`.

    Subsets of one seed are nested. Raises ValueError where the size is out of range.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"data.fraction is {fraction}; it must be above 0 and at most 1")
    n_all = len(split.rows)
    n = max(1, round(fraction * n_all)) if n_images is None else n_images
    if n > n_all or n < 1:
        raise ValueError(f"data.n_images is {n}; split {split.name!r} has {n_all} images, so it must be 1 to {n_all}")
    if n == n_all:
        return split, np.arange(n_all)
    indices = np.random.Generator(np.random.Philox(key=seed)).permutation(n_all)[:n]
    return split.take(indices), indices


class Resized(Sequence):
    """Images resized to the model's square input size; up to `cache_bytes` of them are kept in memory after first use."""

    def __init__(
        self,
        source: Sequence,
        size: int,
        resample: int = images.BICUBIC,
        cache_bytes: int = 1 << 30,
        longest_edge: int = 0,
    ) -> None:
        self.source, self._size, self._resample, self._cache_bytes = source, size, resample, cache_bytes
        self._longest_edge = longest_edge
        self._room = cache_bytes // (size * size * 3)
        self._kept: dict[int, np.ndarray] = {}
        self._lock = threading.Lock()

    @classmethod
    def of(cls, source: Sequence, model: VisionLanguageModel) -> "Resized":
        """Images in the size and with the resampling that `model` was trained with."""
        one = model.processor
        return cls(source, one.image_size, one.resample, longest_edge=one.longest_edge)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, i: int) -> np.ndarray:
        if i not in self._kept:
            image_YXC = images.resize(opened(self.source, i), self._size, self._resample, self._longest_edge)
            with self._lock:
                if len(self._kept) >= self._room:
                    return image_YXC
                self._kept[i] = image_YXC
        return self._kept[i]

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle without the kept images and the lock, for worker processes."""
        return Resized, (self.source, self._size, self._resample, self._cache_bytes, self._longest_edge)

    def augmented(self, i: int, kind: str, rng: np.random.Generator) -> np.ndarray:
        """A random crop of image `i` at its original size, resized; a function of the state of `rng`."""
        crop = images.cropped(opened(self.source, i), rng, flip=kind != "crop")
        image_YXC = images.resize(crop, self._size, self._resample, self._longest_edge)
        return randaugment(image_YXC, rng, magnitude=MAGNITUDES[kind]) if kind in MAGNITUDES else image_YXC


def check_augment(augment: str) -> None:
    """Raise ValueError for an unknown kind of augmentation."""
    if augment not in AUGMENTS:
        raise ValueError(f"data.augment is {augment!r}; choose one of {', '.join(AUGMENTS)}")


def batches(
    examples: Examples,
    batch_size: int,
    *,
    seed: int,
    start: int = 0,
    augment: str = "none",
    rows: np.ndarray | None = None,
    threads: int | None = None,
) -> Iterator[dict[str, Any]]:
    """Endless training batches from step `start`. Every epoch is shuffled anew; batches cross epochs, so nothing is dropped.

    `rows`: the rows of a batch that this host needs, by default all; a row is the same on every host. `threads`: the number of
    reader threads, each making one batch at a time, by default one per core and at least 2 (Pillow releases the GIL: see
    benchmarks/data_loading.py). It does not change the batches.
    """
    threads = threads or max(2, host.cores())
    check_augment(augment)
    order = grain.MapDataset.range(len(examples)).seed(seed).shuffle().repeat().batch(batch_size, drop_remainder=True)

    def fetch(indices: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
        seeds = rng.integers(2**63, size=batch_size) if augment != "none" else None
        mine = slice(None) if rows is None else rows
        return gather(examples, indices[mine], augment, None if seeds is None else seeds[mine])

    steps = order.seed(seed + 1).random_map(fetch)[start:]
    return iter(steps.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads + 2)))


def gather(
    examples: Examples, indices: np.ndarray, augment: str = "none", seeds: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """One batch: the rows of arrays and tables at `indices` and, unless tables replace them, the images.

    `seeds`: one per image, for its augmentation. Without augmentation, an image that several rows share is read once.
    """
    batch = {name: array[indices] for name, array in examples.arrays.items()}
    wanted = batch.pop("image_index")
    batch |= {name: table[wanted] for name, table in examples.tables.items()}
    if examples.images is not None:
        if augment != "none":
            rngs = [np.random.Generator(np.random.Philox(key=seed)) for seed in seeds]
            pictures = [examples.images.augmented(i, augment, rng) for i, rng in zip(wanted, rngs, strict=True)]
        else:
            different = {i: examples.images[i] for i in dict.fromkeys(wanted.tolist())}
            pictures = [different[i] for i in wanted.tolist()]
        batch["image"] = np.stack(pictures)
    return batch


def one_pass(
    examples: Examples, batch_size: int, rows: np.ndarray | slice = slice(None), threads: int | None = None
) -> Iterator[tuple[dict[str, np.ndarray], int]]:
    """Every example once, in order: (batch, number of real rows). The last batch is padded with copies of its last row.

    `rows`: the rows of a batch that are made. `threads`: the number of reader threads, as in `batches`. They read ahead where
    there are images, at most `threads` batches; tables are in memory already.
    """
    n_batches = -(-len(examples) // batch_size)
    threads = min(threads or max(2, host.cores()), n_batches)

    def make(k: int) -> tuple[dict[str, np.ndarray], int]:
        indices = np.arange(k * batch_size, min((k + 1) * batch_size, len(examples)))
        return gather(examples, np.pad(indices, (0, batch_size - len(indices)), mode="edge")[rows]), len(indices)

    if examples.images is None or n_batches < 2:
        return map(make, range(n_batches))
    steps = grain.MapDataset.range(n_batches).map(make)
    return iter(steps.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)))


def most_common(items: Iterable[Any]) -> Any:
    """The most frequent item; of equally frequent ones the smallest, so that baselines do not depend on order."""
    counts = collections.Counter(items)
    return min(counts, key=lambda item: (-counts[item], item))
