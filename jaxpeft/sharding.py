"""Placing arrays on devices: one mesh, the batch split over it, everything else on every device.

`pjit` is `jax.jit` with `NamedSharding` today: the step is one program, and the compiler adds the reductions.
"""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxpeft.tree import Tree


def mesh(batch_size: int) -> Mesh:
    """All devices on one axis 'data'. Raises ValueError when they do not divide the batch."""
    devices = jax.devices()
    if batch_size % len(devices):
        raise ValueError(f"batch_size {batch_size} is not divisible by the {len(devices)} devices; change batch_size")
    # jax.make_mesh makes Explicit axes by default, under which gathers from sharded tables need annotations
    return jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)


def replicate(x: Tree, on: Mesh) -> Tree:
    """The same value on every device."""
    return jax.device_put(x, NamedSharding(on, PartitionSpec()))


def shard_batch(batch: dict[str, np.ndarray], on: Mesh) -> dict[str, jax.Array]:
    """Each array split along its first axis."""
    return jax.device_put(batch, NamedSharding(on, PartitionSpec("data")))
