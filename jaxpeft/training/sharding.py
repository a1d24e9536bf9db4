"""Placing arrays on devices: a mesh (data, fsdp, tensor), sharding rules by leaf name, and global arrays of several hosts.

The training step is one program, `jax.jit` with `NamedSharding`; the compiler adds the communication. A batch is split over
'data' and 'fsdp'. A model's `sharding` maps leaf names to axes: 'fsdp' splits the memory of weights, 'tensor' the work of heads
and hidden units. Leaves that a method adds inherit the axes of the leaf they adapt, and optimizer states those of their leaf,
because both contain its name. All hosts make the same calls.
"""

import contextlib
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxpeft.adapt import sites
from jaxpeft.methods.base import Site
from jaxpeft.models.stack import Layers
from jaxpeft.ops import ROWS
from jaxpeft.tree import Tree, flatten, pack, path_name

AXES = ("data", "fsdp", "tensor")
BATCH = PartitionSpec(ROWS)
Rules = tuple[
    tuple[str, tuple[str | None, ...]], ...
]  # (regular expression of leaf names, the axis of each last dimension)
WHOLE: Rules = (("", ()),)  # every device holds every leaf


def mesh(shape: Mapping[str, int] | None = None, devices: Sequence[Any] | None = None) -> Mesh:
    """Arrange devices as (data, fsdp, tensor); `shape` has some of these keys. data = 0, the default, takes what remains.

    Raises ValueError for another key, and where the product is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    if unknown := set(shape or {}) - set(AXES):
        raise ValueError(f"unknown mesh axis {', '.join(sorted(unknown))}; allowed: {', '.join(AXES)}")
    data, fsdp, tensor = ((shape or {}).get(axis, default) for axis, default in zip(AXES, (0, 1, 1), strict=True))
    if (
        min(fsdp, tensor) < 1
        or data < 0
        or len(devices) % (fsdp * tensor)
        or data * fsdp * tensor not in (0, len(devices))
    ):
        raise ValueError(
            f"mesh (data {data}, fsdp {fsdp}, tensor {tensor}) does not fit {len(devices)} devices: the product of the "
            f"three must be the number of devices (data 0: what remains)"
        )
    # jax.make_mesh makes Explicit axes by default, for which gathers from sharded tables need annotations
    sizes = (len(devices) // (fsdp * tensor), fsdp, tensor)
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def n_batch(on: Mesh) -> int:
    """The number of parts that a batch is split into."""
    return on.shape["data"] * on.shape["fsdp"]


def check_batch(batch_size: int, grad_accum: int, on: Mesh) -> None:
    """Raise ValueError where the batch is not divisible by microbatches and devices."""
    if batch_size % grad_accum:
        raise ValueError(f"batch_size {batch_size} is not divisible by grad_accum {grad_accum}")
    if (batch_size // grad_accum) % n_batch(on):
        raise ValueError(
            f"batch_size {batch_size} / grad_accum {grad_accum} is not divisible by the {n_batch(on)} parts that mesh "
            f"{dict(on.shape)} splits a batch into; change batch_size, grad_accum or mesh"
        )


# ---------------------------------------------------------------- where a leaf goes


def shardings(tree: Tree, rules: Rules, on: Mesh) -> Tree:
    """A NamedSharding for every leaf of variables, of the trainable or frozen ones, or of a training state.

    A dimension that is not divisible by its axis is not split. Neither are optimizer arrays that have fewer dimensions than
    their rule, or belong to no leaf (Muon's coefficients). Raises ValueError for array leaves of the model that no rule covers.
    """
    uncovered = []

    def spec(name: str) -> tuple:
        for pattern, axes in rules:
            if re.search(pattern, name):
                return axes
        uncovered.append(name)
        return ()

    def place(shape: tuple[int, ...], axes: tuple[str | None, ...]) -> NamedSharding:
        axes = (None,) * (len(shape) - len(axes)) + tuple(axes) if len(shape) >= len(axes) else (None,) * len(shape)
        fits = (a if a and n % on.shape[a] == 0 else None for n, a in zip(shape, axes, strict=True))
        return NamedSharding(on, PartitionSpec(*fits))

    def of(path: tuple, node: Tree) -> Tree:
        name = path_name(path)
        if sites.is_bound(node):
            axes = functools.partial(_inherited, node.site, spec)
            return jax.tree.map(lambda x: place(x.shape, axes(x.shape)), node)
        if "params/" in name:
            axes = spec(name[name.index("params/") :])
            return jax.tree.map(lambda x: place(x.shape, axes), node)  # of `Layers`, that of every layer
        if np.ndim(node) and not name.startswith("opt/"):
            uncovered.append(name)
        return place(np.shape(node), ())

    found = jax.tree_util.tree_map_with_path(of, tree, is_leaf=lambda x: sites.is_bound(x) or isinstance(x, Layers))
    if uncovered:
        raise ValueError(
            f"no sharding rule covers {len(uncovered)} leaves: {', '.join(sorted(set(uncovered))[:5])}; add a rule to the "
            f"model's `sharding` (jaxpeft/models/)"
        )
    return found


def _inherited(site: Site, spec: Callable[[str], tuple], shape: tuple[int, ...]) -> tuple[str | None, ...]:
    """The axes of an adapter leaf: a dimension with the same length as one of the site's is split like it.

    So LoRA's A (in, R) and B (R, out) follow the kernel's input and output, and a prefix (K, N, H) the heads. Where two
    lengths are equal by chance the split may differ; that costs communication but changes no value.
    """
    own = shape[0 if site.layers is None else 1 :]
    if not site.path or not own:  # leaves shared by all sites
        return ()
    leaf = {"linear": "kernel", "norm": "scale"}.get(site.kind, Site.key(site.kind))
    here = site.shape[1:] if site.kind == "kv" else site.shape
    axes, n = spec(f"params/{site.path}/{leaf}"), len(here)
    axes = (None,) * (n - len(axes)) + tuple(axes[-n:] if axes else ())
    if own[-n:] == here:
        return (None,) * (len(own) - n) + axes
    found = [None] * len(own)
    if own[-1] == here[-1]:
        found[-1] = axes[-1]
    if len(own) > 1 and own[0] == here[0] and axes[0] not in found:
        found[0] = axes[0]
    return tuple(found)


def bytes_per_device(tree: Tree, placed: Tree) -> int:
    """The bytes that the leaves take on one device; works on shapes."""
    sizes = jax.tree.map(lambda x, s: int(np.prod(s.shard_shape(x.shape))) * x.dtype.itemsize, tree, placed)
    return sum(jax.tree.leaves(sizes))


def whole(tree: Tree, placed: Tree, at_least: int = 1 << 20) -> list[str]:
    """The leaves of at least `at_least` bytes that are replicated although the mesh could split them, largest first."""
    if not jax.tree.leaves(placed) or n_split(jax.tree.leaves(placed)[0].mesh) == 1:
        return []
    flat, where = flatten(tree), flatten(placed)
    sizes = {name: x.size * x.dtype.itemsize for name, x in flat.items() if where[name].is_fully_replicated}
    large = sorted((name for name in sizes if sizes[name] >= at_least), key=lambda name: -sizes[name])
    return [f"{name} ({sizes[name] / 1e6:.1f} MB)" for name in large]


def n_split(on: Mesh) -> int:
    """The number of parts that a weight can be split into."""
    return on.shape["fsdp"] * on.shape["tensor"]


# ---------------------------------------------------------------- from a host's memory to global arrays and back


def put(tree: Tree, placed: Tree) -> Tree:
    """Put every leaf on devices as in `placed`. Hosts pass the same values, and each keeps the parts of its own devices."""

    def one(x: jax.Array | np.ndarray, sharding: NamedSharding) -> jax.Array:
        if sharding.is_fully_addressable or isinstance(x, jax.Array) and not x.is_fully_addressable:
            return jax.device_put(x, sharding)
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(one, tree, placed)


def placing(rules: Rules, on: Mesh) -> Callable[[str, Any], jax.Array]:
    """The argument `place` of `loading.read`: puts a leaf (a `convert.Leaf`) on devices as soon as it is made. Each of several
    hosts reads only what its own devices hold."""

    def place(name: str, leaf: Any) -> jax.Array:
        shape = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        (sharding,) = jax.tree.leaves(shardings({"params": {name: shape}}, rules, on))
        if sharding.is_fully_addressable:
            return jax.device_put(leaf[...], sharding)
        part = functools.cache(
            lambda *bounds: leaf[tuple(slice(*bound) for bound in bounds)]
        )  # several devices hold it
        bounds = lambda index: (one.indices(n)[:2] for one, n in zip(index, leaf.shape, strict=True))  # noqa: E731
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: part(*bounds(index)))

    return place


def replicated(on: Mesh) -> NamedSharding:
    """The sharding of a value that every device holds whole."""
    return NamedSharding(on, PartitionSpec())


def rows(n: int, on: Mesh) -> np.ndarray:
    """The rows of a batch of `n` that this host must have, ascending; all of them on one host."""
    if jax.process_count() == 1:
        return np.arange(n)
    parts = NamedSharding(on, BATCH).addressable_devices_indices_map((n,)).values()
    return np.unique(np.concatenate([np.arange(n)[index] for index in parts]))


def shard_batch(batch: dict[str, np.ndarray], on: Mesh, n: int | None = None) -> dict[str, jax.Array]:
    """Split each array along its first axis. Of a batch of `n` rows this host passes those of `rows(n, on)`."""
    sharding = NamedSharding(on, BATCH)
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)
    assert n is not None, "each host has only some rows of the batch: n must be the number of all rows"
    mine = rows(n, on)

    def one(x: np.ndarray) -> jax.Array:
        def part(index: Any) -> np.ndarray:
            start, stop, _ = index[0].indices(n)
            first = int(np.searchsorted(mine, start))
            return x[first : first + stop - start]

        return jax.make_array_from_callback((n, *x.shape[1:]), sharding, part)

    return {name: one(np.asarray(x)) for name, x in batch.items()}


def packed(leaves: list[jax.Array]) -> jax.Array:
    """`tree.pack` of arrays on the devices that hold them, replicated on each; all hosts call it."""
    return _packer(mesh_of(leaves))(leaves)


@functools.lru_cache(maxsize=4)
def _packer(on: Mesh | None) -> Callable[[list[jax.Array]], jax.Array]:
    return jax.jit(pack, out_shardings=None if on is None else replicated(on))


def mesh_of(tree: Tree) -> Mesh | None:
    """The mesh that a tree was put on, or None for arrays that are on no such mesh."""
    for leaf in jax.tree.leaves(tree):
        on = getattr(getattr(leaf, "sharding", None), "mesh", None)
        return on if on is not None and on.axis_names == AXES else None
    return None


def using(tree: Tree) -> AbstractContextManager:
    """A context in which traced functions split their batch over the devices that hold `tree` (`ops.by_rows`)."""
    return using_mesh(mesh_of(tree))


def using_mesh(on: Mesh | None) -> AbstractContextManager:
    """`using` for a mesh."""
    return contextlib.nullcontext() if on is None or on.size == 1 else jax.set_mesh(on)


def is_first() -> bool:
    """Whether this process is the one that writes files and logs."""
    return jax.process_index() == 0


def most_soon(number: int, on: Mesh) -> jax.Array | int:
    """The largest `number` of all hosts, as an array that is ready once every host has sent its own; all hosts call it."""
    if jax.process_count() == 1:
        return number
    of_devices = NamedSharding(on, PartitionSpec(AXES))
    return _most(
        jax.make_array_from_callback((on.size,), of_devices, lambda _: np.full(1, number, np.int32)), replicated(on)
    )


@functools.partial(jax.jit, static_argnums=1)
def _most(numbers: jax.Array, placed: NamedSharding) -> jax.Array:
    return jax.lax.with_sharding_constraint(numbers.max(), placed)


def any_of(flag: bool) -> bool:
    """Whether `flag` is true on any host; all hosts call it."""
    return bool(flag) if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.array(flag)).any())
