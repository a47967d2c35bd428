"""The mesh, the placements, and batches made of process-local rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from simclr_jax import errors
from simclr_jax.hardware import sharding

pytestmark = pytest.mark.devices(8)


def test_the_mesh_has_one_automatic_axis_over_all_devices():
  mesh = sharding.data_mesh()
  assert mesh.axis_names == ("data",)
  assert mesh.axis_types == (AxisType.Auto,)
  assert mesh.size == jax.device_count() == 8


def test_the_order_of_the_devices_does_not_depend_on_how_they_are_listed():
  devices = jax.devices()
  assert sharding.data_mesh(devices[::-1]) == sharding.data_mesh(devices)
  assert sharding.data_mesh(devices[:3]).size == 3


def test_each_processs_devices_are_together_and_in_process_order():
  class Device:
    def __init__(self, process_index, id):
      self.process_index, self.id = process_index, id

  # Interleaved ids, as on machines where they follow the network and not the hosts.
  devices = [Device(process_index=i % 2, id=7 - i) for i in range(8)]
  mesh = sharding.data_mesh(devices)
  assert [d.process_index for d in mesh.devices] == [0, 0, 0, 0, 1, 1, 1, 1]
  assert [d.id for d in mesh.devices] == [1, 3, 5, 7, 0, 2, 4, 6]


def test_a_global_batch_holds_equal_parts_of_the_rows_in_order():
  mesh = sharding.data_mesh()
  rows = {
    "views": np.random.default_rng(0).random((16, 2, 3), np.float32),
    "label": np.arange(16, dtype=np.int32),
  }
  batch = sharding.global_batch(mesh, rows)
  for name, values in rows.items():
    assert batch[name].sharding == sharding.batched(mesh)
    assert batch[name].dtype == values.dtype
    np.testing.assert_array_equal(batch[name], values)
    for shard in batch[name].addressable_shards:
      place = list(mesh.devices).index(shard.device)
      np.testing.assert_array_equal(shard.data, values[2 * place : 2 * place + 2])


def test_replicated_arrays_are_whole_on_every_device():
  mesh = sharding.data_mesh()
  array = jax.device_put(jnp.arange(5), sharding.replicated(mesh))
  assert array.is_fully_replicated
  assert len(array.addressable_shards) == 8


@pytest.mark.parametrize(("length", "rows"), [(16, None), (13, None), (13, 24), (3, 8)])
def test_placed_rows_are_split_in_order_and_padded_with_zeros(length, rows):
  mesh = sharding.data_mesh()
  array = np.random.default_rng(0).random((length, 3), np.float32) + 1
  placed = sharding.place_rows(array, mesh, rows)
  assert placed.sharding == sharding.batched(mesh)
  assert len(placed) == (rows or 16)
  np.testing.assert_array_equal(placed[:length], array)
  np.testing.assert_array_equal(placed[length:], 0)


def test_replicated_rows_are_padded_and_cast_on_every_device():
  mesh = sharding.data_mesh()
  array = np.arange(6, dtype=np.int32).reshape(3, 2)
  placed = sharding.replicate(array, mesh, 5, np.float32)
  assert placed.dtype == np.float32
  assert len(placed.addressable_shards) == 8
  for shard in placed.addressable_shards:
    np.testing.assert_array_equal(shard.data, np.pad(array, ((0, 2), (0, 0))))
  np.testing.assert_array_equal(sharding.replicate(array, mesh), array)


def test_embeddings_can_be_multiplied_with_each_other_under_jit():
  mesh = sharding.data_mesh()
  z = jax.device_put(jnp.eye(8), sharding.batched(mesh))
  np.testing.assert_array_equal(jax.jit(lambda z: z @ z.T)(z), np.eye(8))


@pytest.mark.parametrize(
  ("batch_size", "says"),
  [(100, "96 or 104"), (7, "for example 8"), (0, "for example 8"), (-8, "for example 8")],
)
def test_a_batch_that_does_not_split_is_refused_with_the_nearest_that_do(batch_size, says):
  with pytest.raises(errors.UserError, match=says) as caught:
    sharding.check_divisible(batch_size, sharding.data_mesh())
  assert f"batch_size {batch_size} " in str(caught.value)
  assert "\n" not in str(caught.value)


def test_a_batch_that_splits_is_accepted():
  sharding.check_divisible(64, sharding.data_mesh())
