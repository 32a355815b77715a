"""Data parallelism over the devices of one process: a mesh, and where things lie on it.

Steps need no change: `jax.jit` splits the work by the sharding of its arguments, so batch
statistics and metrics are those of the whole batch, whatever the number of devices.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jtl.errors import DataError
from jtl.typing import Batch, PyTree


def data_mesh(devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of one axis, `data`, over the given devices, by default all of them."""
    devices = jax.devices() if devices is None else devices
    return Mesh(np.asarray(devices), ("data",), axis_types=(AxisType.Auto,))


def replicate(tree: PyTree, mesh: Mesh) -> PyTree:
    """A copy of every leaf on every device of the mesh."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def shard_batch(batch: Batch, mesh: Mesh) -> Batch:
    """Split a batch over the mesh along its leading axis.

    Args:
      batch: leaves `[batch, ...]`.
      mesh: as `data_mesh` makes it.

    Returns:
      The batch, on the devices.

    Raises:
      DataError: the batch size is not a multiple of the device count.
    """
    shapes = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(batch)}
    if () in shapes:
        raise DataError("the batch has an entry that is a single number: every entry leads with the batch axis")
    for (size,) in shapes:
        if size % mesh.size:
            few = "smaller than" if size < mesh.size else "not a multiple of"
            raise DataError(
                f"a batch of {size} examples is {few} the {mesh.size} devices: "
                f"use a batch size of {-(-size // mesh.size) * mesh.size}, or fewer devices"
            )
    return jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
