"""The mesh and the placements: one axis, `data`, over all devices."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from simclr_jax import errors

AXIS = "data"


def data_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
  """Returns a 1-D mesh over the devices (default: all), each process's together, in process order."""
  devices = sorted(devices or jax.devices(), key=lambda d: (d.process_index, d.id))
  # Explicit axes, the default of jax.make_mesh, reject `z @ z.T`.
  return Mesh(np.array(devices), (AXIS,), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
  """Returns the placement of what every device holds whole."""
  return NamedSharding(mesh, PartitionSpec())


def batched(mesh: Mesh) -> NamedSharding:
  """Returns the placement of a batch: the leading dimension split over the devices."""
  return NamedSharding(mesh, PartitionSpec(AXIS))


def global_batch(mesh: Mesh, local_rows: Any) -> Any:
  """Returns a tree of global arrays, given this process's rows of them as NumPy arrays.

  The rows of process p are the p-th contiguous part of the batch.
  """
  return jax.tree.map(lambda rows: jax.make_array_from_process_local_data(batched(mesh), rows), local_rows)


def check_divisible(batch_size: int, mesh: Mesh, *, name: str = "batch_size") -> None:
  """Raises a UserError, about `name`, unless the batch splits evenly over the devices."""
  devices = mesh.size
  if batch_size < 1 or batch_size % devices:
    below = batch_size // devices * devices
    choices = f"{below} or {below + devices}" if below > 0 else f"{devices}"
    raise errors.UserError(
      f"{name} {batch_size} does not split over {devices} devices; use a multiple of {devices}, for example {choices}"
    )
