"""Rows and arrays that are too large for memory, in temporary files that the system maps.

The files have no name any more, so they are gone when the process ends. They are in the directory of `tempfile`, which TMPDIR
sets; it should be on a disk.
"""

import array
import json
import tempfile
from collections.abc import Iterable, Sequence
from typing import Any, overload

import numpy as np

MOST_ROWS = 100_000  # rows of a split that are kept as Python objects, 1 KB each or more
MOST_BYTES = 1 << 28  # of an array in memory
CHUNK = 1 << 16  # rows that are worked on at a time


class Rows(Sequence):
    """The rows of a split (JSON values), each read when it is asked for. Thread-safe; a row that was changed is not kept."""

    def __init__(self, rows: Iterable[dict]) -> None:
        end = array.array("q", [0])
        with tempfile.TemporaryFile(prefix="jaxpeft-") as file:
            for row in rows:
                end.append(end[-1] + file.write(json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass")))
            file.flush()
            self._bytes = np.memmap(file, np.uint8, "r") if end[-1] else np.zeros(0, np.uint8)
        self._end = np.array(end)
        self._indices = np.arange(len(end) - 1)

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, i: int) -> dict: ...

    @overload
    def __getitem__(self, i: slice) -> "Rows": ...

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return self.take(np.arange(len(self))[i])
        k = self._indices[i]
        return json.loads(self._bytes[self._end[k] : self._end[k + 1]].tobytes().decode("utf-8", "surrogatepass"))

    def take(self, indices: Sequence[int] | np.ndarray) -> "Rows":
        """The rows at `indices`, in that order, from the same file."""
        some = object.__new__(Rows)
        some._bytes, some._end, some._indices = self._bytes, self._end, self._indices[np.asarray(indices, np.int64)]
        return some


def rows_of(rows: Iterable[dict]) -> Sequence[dict]:
    """A list of the rows, or `Rows` if there are more than MOST_ROWS; in both cases without a second copy of all rows."""
    rows, first = iter(rows), []
    for row in rows:
        first.append(row)
        if len(first) > MOST_ROWS:
            return Rows(_chained(first, rows))
    return first


def _chained(first: list[dict], rest: Iterable[dict]) -> Iterable[dict]:
    yield from first
    first.clear()
    yield from rest


def empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """As `np.empty`; an array of more than MOST_BYTES is in a temporary file."""
    if int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize <= MOST_BYTES:
        return np.empty(shape, dtype)
    with tempfile.TemporaryFile(prefix="jaxpeft-") as file:
        return np.memmap(file, dtype, "w+", shape=shape)


class Ragged:
    """Sequences of integers of any length, one behind the other: 4 bytes a number, 4 a sequence."""

    def __init__(self, sequences: Iterable[Sequence[int]]) -> None:
        flat, lengths = array.array("i"), array.array("i")
        for one in sequences:
            flat.extend(one)
            lengths.append(len(one))
        self.flat, self.length_N = (np.frombuffer(x or bytes(0), np.int32) for x in (flat, lengths))

    def fill(self, out_NT: np.ndarray, at_N: np.ndarray | None = None, column: int = 0) -> None:
        """Write sequence n into row at_N[n], by default n, of out_NT, from `column` on. Raises ValueError if it is too long."""
        width, start = out_NT.shape[1] - column, 0
        if self.length_N.max(initial=0) > width:
            raise ValueError(f"a sequence of {self.length_N.max()} tokens does not fit into {width}")
        for k in range(0, len(self.length_N), CHUNK):
            some_N = self.length_N[k : k + CHUNK]
            inside_NT = np.arange(width)[None] < some_N[:, None]
            row_N, column_N = np.nonzero(inside_NT)
            end = start + len(row_N)
            first_N = np.arange(k, k + len(some_N)) if at_N is None else at_N[k : k + CHUNK]
            out_NT[first_N[row_N], column + column_N] = self.flat[start:end]
            start = end
