"""The device mesh with its one axis `data`, and placements of arrays on it."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from simclr_jax import errors

AXIS = "data"

# Smaller arrays stay replicated: gathering them costs more time than splitting them saves memory.
SMALLEST_SPLIT = 2**14


def data_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
  """Returns a 1-D mesh over the devices (default: all), those of each process adjacent, in process order."""
  devices = sorted(devices or jax.devices(), key=lambda d: (d.process_index, d.id))
  # Explicit axes, the default of jax.make_mesh, reject `z @ z.T`.
  return Mesh(np.array(devices), (AXIS,), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
  """Returns the placement of an array that every device holds whole."""
  return NamedSharding(mesh, PartitionSpec())


def batched(mesh: Mesh) -> NamedSharding:
  """Returns the placement of a batch: the leading dimension split over the devices."""
  return NamedSharding(mesh, PartitionSpec(AXIS))


def replicate(array: np.ndarray, mesh: Mesh, rows: int | None = None, dtype: Any = None) -> jax.Array:
  """Returns an array, the same on every process, whole on every device; padded with zeros to `rows`, and cast."""
  return _placed(array, replicated(mesh), len(array) if rows is None else rows, dtype)


def place_rows(array: np.ndarray, mesh: Mesh, rows: int | None = None, dtype: Any = None) -> jax.Array:
  """Returns an array, the same on every process, with its rows split; each device's part is padded and cast alone.

  The length `rows` is a multiple of the devices, by default the smallest one; padded rows are zeros.
  """
  return _placed(array, batched(mesh), -(-len(array) // mesh.size) * mesh.size if rows is None else rows, dtype)


def _placed(array: np.ndarray, placement: NamedSharding, rows: int, dtype: Any) -> jax.Array:
  def part(index):
    own = np.asarray(array[index], dtype)
    begin, end, _ = index[0].indices(rows)
    missing = end - begin - len(own)
    return np.concatenate([own, np.zeros((missing, *own.shape[1:]), own.dtype)]) if missing else own

  # Not device_put, which compares the array between processes.
  return jax.make_array_from_callback((rows, *array.shape[1:]), placement, part)


def split_arrays(tree: Any, mesh: Mesh) -> Any:
  """Returns a tree of placements that splits every large array over the devices.

  Along its longest dimension that the number of devices divides (the last one of equals). Arrays without such a
  dimension and small ones are replicated.
  """

  def place(array):
    fitting = [axis for axis, size in enumerate(array.shape) if size % mesh.size == 0]
    if array.size < SMALLEST_SPLIT or not fitting:
      return replicated(mesh)
    axis = max(fitting, key=lambda axis: (array.shape[axis], axis))
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, AXIS))

  return jax.tree.map(place, tree)


def gather_params(mesh: Mesh) -> Callable[[Any], Any]:
  """Returns the function that gathers split parameters on every device, and splits their gradients.

  Without it the compiler may split the convolutions by channels and exchange activations instead.
  """

  @jax.custom_vjp
  def gather(params):
    return jax.lax.with_sharding_constraint(params, replicated(mesh))

  # The transpose of a constraint is the same constraint, which would replicate the gradients.
  gather.defvjp(
    lambda params: (gather(params), None),
    lambda _, grads: (jax.lax.with_sharding_constraint(grads, split_arrays(grads, mesh)),),
  )
  return gather


def global_batch(mesh: Mesh, local_rows: Any) -> Any:
  """Returns a tree of global arrays, given this process's rows of them as NumPy arrays.

  The rows of process p are the p-th contiguous part of the batch.
  """
  return jax.tree.map(lambda rows: jax.make_array_from_process_local_data(batched(mesh), rows), local_rows)


def check_divisible(batch_size: int, mesh: Mesh, *, micro_batches: int = 1, name: str = "batch_size") -> None:
  """Raises a UserError that names the key `name` unless each micro-batch splits evenly over the devices."""
  if micro_batches < 1:
    raise errors.UserError(f"micro_batches is {micro_batches}; use 1 for the batch as a whole, or more.")
  parts = mesh.size * micro_batches
  if batch_size < 1 or batch_size % parts:
    below = batch_size // parts * parts
    choices = f"{below} or {below + parts}" if below > 0 else f"{parts}"
    into = f" in {micro_batches} micro-batches" if micro_batches > 1 else ""
    raise errors.UserError(
      f"{name} {batch_size}{into} does not split over {mesh.size} devices; "
      f"use a multiple of {parts}, for example {choices}"
    )
