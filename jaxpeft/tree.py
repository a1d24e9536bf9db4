"""Trees of arrays by name: select leaves, split a tree into trainable and frozen halves, join, count, compare, digest.

Freezing is a split, not a mask inside the optimizer: `tuned, frozen = split(variables, mask)` puts `None` where a leaf
belongs to the other half, JAX treats `None` as an empty subtree, and `jax.grad` never sees a frozen leaf.
(`optax.masked` alone would apply the raw gradient to frozen leaves as an update.)
"""

import difflib
import functools
import hashlib
import math
import re
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

Tree = Any  # a pytree of arrays
Mask = Any  # a pytree of bools of the same structure
PART = 1 << 24  # elements that `digest` reads at a time


def path_name(path: tuple[Any, ...]) -> str:
    """A key path of `jax.tree_util` as 'params/vision/patch/kernel'."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def names(tree: Tree) -> Tree:
    """The same tree with each leaf replaced by its name."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path_name(path), tree)


def flatten(tree: Tree) -> dict[str, Any]:
    """Leaves by name, in tree order; the form in which trees are stored."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def unflatten(like: Tree, leaves: dict[str, Any], what: str = "tree") -> Tree:
    """Put leaves by name into the structure of `like`; raises ValueError listing missing, unexpected and wrong-shaped ones."""
    check_same(flatten(like), leaves, what)
    return jax.tree_util.tree_map_with_path(lambda path, _: leaves[path_name(path)], like)


def check_same(expected: dict[str, Any], got: dict[str, Any], what: str) -> None:
    """Raise ValueError unless both hold the same names with the same shapes."""
    missing = [name for name in expected if name not in got]
    extra = [name for name in got if name not in expected]
    shapes = [
        f"{name}: expected {tuple(np.shape(expected[name]))}, got {tuple(np.shape(got[name]))}"
        for name in expected
        if name in got and np.shape(expected[name]) != np.shape(got[name])
    ]
    if missing or extra or shapes:
        parts = [("missing", missing), ("unexpected", extra), ("wrong shape", shapes)]
        lines = [f"  {label} ({len(rows)}): {_some(rows)}" for label, rows in parts if rows]
        raise ValueError(f"{what} does not match:\n" + "\n".join(lines))


def nearest(where: str, candidates: Iterable[str], n: int = 3) -> list[str]:
    """The names closest to a pattern that matched nothing, for an error message."""
    plain = re.sub(r"[\\^$()?*+|\[\]]", "", where)
    score = {name: difflib.SequenceMatcher(None, plain, name).ratio() for name in candidates}
    return sorted(score, key=score.get, reverse=True)[:n]


def split(tree: Tree, mask: Mask) -> tuple[Tree, Tree]:
    """Split into (tuned, frozen): the leaves where `mask` is True, and the rest; each half has `None` for the other's."""
    tuned = jax.tree.map(lambda leaf, keep: leaf if keep else None, tree, mask)
    frozen = jax.tree.map(lambda leaf, keep: None if keep else leaf, tree, mask)
    return tuned, frozen


def join(tuned: Tree, frozen: Tree) -> Tree:
    """The inverse of `split`; raises ValueError if both halves or neither hold a leaf."""

    def pick(path: tuple[Any, ...], a: Any, b: Any) -> Any:
        if (a is None) == (b is None):
            raise ValueError(f"cannot join at {path_name(path)}: {'neither' if a is None else 'both'} half holds it")
        return b if a is None else a

    return jax.tree_util.tree_map_with_path(pick, tuned, frozen, is_leaf=lambda x: x is None)


def count(tree: Tree) -> int:
    """Number of scalars in all leaves; works on abstract shapes too."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


def fetch(x: jax.Array | np.ndarray | np.generic | float) -> np.ndarray:
    """The whole value of a leaf in this host's memory; if several hosts hold parts of it, all of them must call this."""
    if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
        return multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x)


def layout(leaves: dict[str, Any]) -> list[list]:
    """[name, dtype, shape] of leaves by name, ready for JSON: what `unpack` needs."""
    return [[name, str(np.dtype(leaf.dtype)), list(leaf.shape)] for name, leaf in leaves.items()]


def pack(leaves: list) -> jax.Array:
    """Concatenate leaves as 32-bit words, bit for bit: one array is copied and written faster than hundreds."""

    def words(x: jax.Array) -> jax.Array:
        x = x.astype(np.uint8) if x.dtype == bool else x
        if x.dtype.itemsize > 4:
            raise ValueError(f"a leaf of {x.dtype} does not fit into 32-bit words")
        return jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}").astype(np.uint32).ravel()

    return jax.numpy.concatenate([words(x) for x in leaves])


def unpack(words: np.ndarray, layout: list[list]) -> dict[str, np.ndarray]:
    """The inverse of `pack`. Raises ValueError if the number or the types of the words do not match the layout."""
    sizes = [math.prod(shape) for _, _, shape in layout]
    if any(np.dtype(dtype).hasobject or np.dtype(dtype).itemsize > 4 for _, dtype, _ in layout):
        raise ValueError(
            f"tree: leaves of {sorted({dtype for _, dtype, _ in layout})}, expected types of 32 bits at most"
        )
    if sum(sizes) != words.size or words.dtype != np.uint32:
        raise ValueError(f"tree: {words.size} words of {words.dtype}, expected {sum(sizes)} of uint32")
    leaves, at = {}, 0
    for (name, dtype, shape), size in zip(layout, sizes, strict=True):
        dtype = np.dtype(dtype)
        leaves[name] = words[at : at + size].astype(f"uint{8 * dtype.itemsize}").view(dtype).reshape(shape)
        at += size
    return leaves


def digest(tree: Tree) -> str:
    """A hex digest of names, dtypes, shapes and bytes: two trees have the same digest if and only if they are equal.

    Floats of 16 bits count as float32 of the same values, so that a base has one digest, whether it was read wider or not.
    """
    sha = hashlib.sha256()
    for name, leaf in sorted(flatten(tree).items()):
        leaf = leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)
        narrow = leaf.dtype.itemsize == 2 and jax.numpy.issubdtype(leaf.dtype, np.floating)
        kind = np.dtype(np.float32) if narrow else leaf.dtype
        sha.update(f"{name} {kind} {leaf.shape or (1,)}\n".encode())
        for values in _parts(leaf):
            sha.update(values.astype(kind, copy=False).view(np.uint8))  # without the copy that `tobytes` makes
    return sha.hexdigest()[:16]


def _parts(leaf: jax.Array | np.ndarray) -> Iterator[np.ndarray]:
    """The values of a leaf in order, in flat arrays of about PART elements: neither copies nor what several hosts hold is whole
    in memory."""
    if isinstance(leaf, jax.Array) and leaf.ndim and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
        step = max(1, PART * leaf.shape[0] // leaf.size)
        for start in range(0, leaf.shape[0], step):
            yield fetch(_rows(leaf, start, min(step, leaf.shape[0] - start))).reshape(-1)
        return
    values = np.ascontiguousarray(fetch(leaf)).reshape(-1)
    for start in range(0, values.size, PART):
        yield values[start : start + PART]


@functools.partial(jax.jit, static_argnums=2)
def _rows(x: jax.Array, start: int, n: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, start, n)


def _some(rows: list[str], most: int = 10) -> str:
    more = f", ... (+{len(rows) - most} more)" if len(rows) > most else ""
    return ", ".join(rows[:most]) + more
