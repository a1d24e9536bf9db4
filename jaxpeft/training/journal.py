"""The state after the last steps, in a file beside the checkpoints: what a SIGKILL would cost otherwise.

Checkpoints are some minutes apart; here every step is written, in place, turn about into two slots. The file's pages belong to
the system from the moment they are written, so they outlive the process (not the machine: for that there are checkpoints).
Whatever moment the process dies at, one slot is whole, and its digest says which. The space is taken when training starts, so
a disk that fills up later does not stop it. A step is written while the next one runs. Where that takes longer than a step
does (a mounted bucket uploads the whole file each time), steps are left out, so that it takes less than a tenth of the time.
"""

import collections
import hashlib
import json
import os
import struct
import time
from pathlib import Path

import jax
import numpy as np

from jaxpeft import tree
from jaxpeft.runtime.files import reading
from jaxpeft.training import sharding
from jaxpeft.training.checkpoint import check_manifest
from jaxpeft.tree import Tree

PAGE = 4096
_SLOT = struct.Struct("<QQ32s")  # the step, how many words follow, and a digest (of the head, the step and the words)


def n_bytes(state: Tree) -> int:
    """Bytes of a state as words."""
    return 4 * tree.count(state)


def _pages(n: int) -> int:
    return -(-n // PAGE) * PAGE


class Journal:
    """One file: a head (JSON: the manifest, and the leaves' layout), and two slots for the state as words (`tree.pack`).

    Of several hosts the first one writes; the others read its file, as they do checkpoints.
    """

    def __init__(self, path: str | Path, like: Tree, manifest: dict, log=print):
        self._path, self._log, self._manifest = Path(path), log, manifest
        self._like = like
        head = json.dumps({"layout": tree.layout(tree.flatten(like)), "manifest": manifest}, sort_keys=True).encode()
        self._head = struct.pack("<Q", len(head)) + head
        self._next: int | None = None  # the slot to write; None before the first
        self._failing = False
        self._last, self._ended, self._not_before = collections.deque(maxlen=3), 0.0, 0.0

    def restore(self, after: int, accept: bool = False) -> tuple[int, Tree] | None:
        """(step, state as numpy arrays) of the newest whole slot, where that is of a step later than `after`.

        Raises ValueError when it belongs to another run (`checkpoint.check_manifest`) or its leaves are others. All hosts
        call it.
        """
        try:
            head, found = _read(self._path)
        except (OSError, ValueError):  # there is none, or it is damaged: checkpoints are what is safe
            found = {}
        step, words = max(found.values(), key=lambda one: one[0], default=(0, None))
        if not sharding.agreed(step) or step <= after:
            return None
        what = f"step {step} of {self._path.name}"
        with reading(self._path, "is damaged"):
            check_manifest(what, head["manifest"], self._manifest, accept, self._log)
            return step, tree.unflatten(self._like, tree.unpack(words, head["layout"], what), what)

    def write(self, step: int, words: jax.Array) -> None:
        """The state after `step`, from `sharding.packed`, unless it was slow of late. What cannot be written is said once, and
        training goes on."""
        if not sharding.is_first() or time.perf_counter() < self._not_before:
            return
        words = np.asarray(words)
        try:
            if self._next is None:
                self._next = self._begin()
            began = time.perf_counter()
            digest = _digest(self._head, step, words)
            at = _pages(len(self._head)) + self._next * _pages(_SLOT.size + n_bytes(self._like))
            with self._path.open("r+b", buffering=0) as file:
                _write(file, memoryview(words).cast("B"), at + _SLOT.size)
                _write(file, memoryview(_SLOT.pack(step, words.size, digest)), at)
        except OSError as error:
            if not self._failing:
                self._log(
                    f"{self._path} cannot be written ({error.strerror}); after a kill training repeats from a checkpoint"
                )
            self._failing = True
            if isinstance(error, FileNotFoundError):  # somebody has deleted it: the next step makes a new one
                self._next = None
            return
        self._next, self._failing = 1 - self._next, False
        self._pause(began)

    def _pause(self, began: float) -> None:
        """Leave steps out when each of the last three writes took longer than what passes between two."""
        between, self._ended = began - self._ended, time.perf_counter()
        self._last.append((self._ended - began, between))
        took, between = map(min, zip(*self._last, strict=True))
        if len(self._last) == 3 and took > between:
            if not self._not_before:
                self._log(
                    f"writing {self._path} takes {took:.2f} s, more than a step: it is written every {20 * took:.0f} s"
                )
            self._not_before = self._ended + 20 * took

    def _begin(self) -> int:
        """The slot to write first: in a file of this run the older one, as a newer state must be whole before it goes."""
        try:
            _, found = _read(self._path, self._head)
        except (OSError, ValueError):
            self._create()
            return 0
        return 1 - max(found, key=lambda slot: found[slot][0]) if found else 0

    def _create(self) -> None:
        temporary = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        self._path.parent.mkdir(parents=True, exist_ok=True)
        for left in self._path.parent.glob(f".{self._path.name}.*"):  # by a process that was killed here
            left.unlink()
        size = _pages(len(self._head)) + 2 * _pages(_SLOT.size + n_bytes(self._like))
        try:
            with temporary.open("wb", buffering=0) as file:
                if hasattr(os, "posix_fallocate"):  # not on macOS
                    os.posix_fallocate(file.fileno(), 0, size)
                file.truncate(size)
                _write(file, memoryview(self._head), 0)
            os.replace(temporary, self._path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise


def _write(file, data: memoryview, at: int) -> None:
    file.seek(at)
    while data:  # without a buffer, some of it may be written
        data = data[file.write(data) :]


def _digest(head: bytes, step: int, words: np.ndarray) -> bytes:
    sha = hashlib.sha256(head)
    sha.update(struct.pack("<Q", step))
    sha.update(words.data)
    return sha.digest()


def _read(path: Path, expected: bytes | None = None) -> tuple[dict, dict[int, tuple[int, np.ndarray]]]:
    """(head, slot -> (step, words) of the whole ones). Raises ValueError where this is no journal, or not the `expected`."""
    size, found = path.stat().st_size, {}
    with reading(path, "is damaged"), path.open("rb") as file:
        (n,) = struct.unpack("<Q", file.read(8))
        if n > size:
            raise ValueError(f"{path} is damaged: a head of {n} bytes in a file of {size}")
        raw = struct.pack("<Q", n) + file.read(n)
        if expected not in (None, raw):
            raise ValueError(f"{path} is of another run")
        head, slot = json.loads(raw[8:]), (size - _pages(len(raw))) // 2
        for i in range(2):
            file.seek(_pages(len(raw)) + i * slot)
            data = file.read(slot)
            step, n_words, digest = _SLOT.unpack_from(data)
            words = np.frombuffer(data[: _SLOT.size + 4 * n_words], np.uint32, offset=_SLOT.size)
            if step and _digest(raw, step, words) == digest:
                found[i] = step, words
    return head, found
