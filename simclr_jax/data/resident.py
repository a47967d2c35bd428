"""A data set that is kept on the devices: the step computes its own order and gathers its own batch."""

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from simclr_jax import randomness
from simclr_jax.data import arrays, device_augment, distortion
from simclr_jax.data import order as order_lib
from simclr_jax.hardware import sharding


def on_devices(source: arrays.Arrays, mesh: jax.sharding.Mesh) -> dict[str, jax.Array]:
  """Returns `image` u8[N, H, W, 3] and `label` i32[N], replicated on every device of the mesh.

  They are not sharded, because a step takes any image on any device: whole batches would then be exchanged.
  """
  place = lambda x: jax.make_array_from_process_local_data(sharding.replicated(mesh), x, x.shape)
  return {"image": place(source.images), "label": place(source.labels())}


def batch(
  dataset: dict[str, jax.Array], step: jax.Array, *, order: order_lib.Order, mesh: jax.sharding.Mesh
) -> dict[str, jax.Array]:
  """Returns the global batch after the first `step` i32[] ones, sharded over the mesh; `dataset` is of `on_devices`.

  `image` u8[batch_size, H, W, 3], `label`, `index` and `epoch` i32[batch_size].
  """
  return gathered(dataset, positions(step, examples=len(dataset["image"]), order=order), mesh)


def gathered(
  dataset: dict[str, jax.Array], position: tuple[jax.Array, jax.Array], mesh: jax.sharding.Mesh
) -> dict[str, jax.Array]:
  """Returns what `batch` does of examples and their epochs, i32[batch_size] each."""
  index, epoch = jax.lax.with_sharding_constraint(position, sharding.batched(mesh))
  rows = {"image": dataset["image"][index], "label": dataset["label"][index], "index": index, "epoch": epoch}
  return jax.lax.with_sharding_constraint(rows, sharding.batched(mesh))


def positions(step: jax.Array, *, examples: int, order: order_lib.Order) -> tuple[jax.Array, jax.Array]:
  """Returns the examples of one global batch and their epochs, i32[batch_size] each; a function of (seed, step).

  As in the host's pipeline (`pipeline.train_batches`) each shard, a consecutive part of the data, has an endless
  stream of its own, every example once an epoch, and gives batch_size / shards rows to every batch. The permutations
  differ from the host's, and the shuffle window is not used. `step` times batch_size / shards is below 2^31.
  """
  bounds = np.array(order_lib.bounds(examples, order.shards))
  sizes, count = np.diff(bounds), order.batch_size // order.shards
  shards = jnp.arange(order.shards, dtype=jnp.int32)[:, None]
  size = jnp.asarray(sizes, jnp.int32)[:, None]
  begin = step.astype(jnp.int32) * count
  position = begin + jnp.arange(count, dtype=jnp.int32)[None]  # i32[1, count], in the streams
  first, epoch, place = begin // size, position // size, position % size
  spanned = int((count - 2 + sizes.min()) // sizes.min()) + 1  # number of epochs that one batch may touch
  purpose = randomness.FORMER_ORDER if order.law == 1 else randomness.ORDER
  key = jax.random.fold_in(randomness.key(order.seed), purpose)

  def permutation(shard, epoch):
    own = jax.random.fold_in(jax.random.fold_in(key, shard), epoch)
    numbers = jax.random.bits(own, (int(sizes.max()),), jnp.uint32)
    # To sort random numbers is to permute. Sizes differ by one: an entry beyond this shard's end is sorted last.
    beyond = jnp.arange(len(numbers), dtype=jnp.int32) >= size[shard, 0]
    return jnp.argsort(jnp.where(beyond, jnp.uint32(2**32 - 1), numbers >> 1)).astype(jnp.int32)

  epochs = first + jnp.arange(spanned, dtype=jnp.int32)[None]  # i32[shards, spanned]
  permutations = jax.vmap(jax.vmap(permutation, (None, 0)))(shards[:, 0], epochs)  # i32[shards, spanned, largest shard]
  # Gathered shard by shard: each device computes the order of its own shards, and nothing is exchanged.
  index = jax.vmap(lambda x, *where: x[where])(permutations, epoch - first, place)
  index += jnp.asarray(bounds[:-1], jnp.int32)[:, None]
  return index.reshape(-1), epoch.reshape(-1)


def evaluation_batches(
  source: arrays.Arrays, *, batch_size: int, image_size: int, process: order_lib.Process = order_lib.ALONE
) -> Iterator[dict[str, np.ndarray]]:
  """Yields this host's rows of one pass over the split, in the order and with the padding of the host's pipeline.

  The centre crops `image` f32[n, image_size, image_size, 3] in [0, 1], 0 in padded rows; `label`, `index` i32[n];
  `mask` f32[n].
  """
  uncropped = image_size <= distortion.SMALL_IMAGE and source.images.shape[1:3] == (image_size, image_size)
  crop = jax.jit(device_augment.center_crop, static_argnums=1)
  for rows in _batches(source, batch_size, process):
    images = rows["image"].astype(np.float32) / 255 if uncropped else np.asarray(crop(rows["image"], image_size))
    yield {**rows, "image": images * rows["mask"][:, None, None, None]}


def augmented_batches(
  source: arrays.Arrays,
  view: Callable[[jax.Array, jax.Array], jax.Array],
  *,
  batch_size: int,
  seed: int,
  epoch: int,
  process: order_lib.Process = order_lib.ALONE,
) -> Iterator[dict[str, np.ndarray]]:
  """Yields what `evaluation_batches` does, with random views in place of the centre crops.

  `view` is (images u8[n, H, W, 3], keys[n]) -> images; an example's key is a function of seed, epoch and its index.
  """
  views = jax.jit(lambda images, index: view(images, device_augment.example_keys(seed, index * 0 + epoch, index)))
  for rows in _batches(source, batch_size, process):
    yield {**rows, "image": np.asarray(views(rows["image"], rows["index"]))}


def _batches(source, batch_size, process):
  """Yields this host's `image` u8, `label`, `index` and `mask`, padded with rows of mask 0, label -1 and index -1."""
  order_lib.check_evaluation(batch_size, process.count)
  local = batch_size // process.count
  bounds = order_lib.bounds(source.num_examples, process.count)
  begin, end = bounds[process.index], bounds[process.index + 1]
  labels = source.labels()
  for number in range(-(-max(np.diff(bounds)) // local)):
    index = np.arange(begin + number * local, begin + (number + 1) * local)
    real = index < end
    index = np.where(real, index, 0)
    yield {
      "image": source.images[index],
      "label": np.where(real, labels[index], -1).astype(np.int32),
      "index": np.where(real, index, -1).astype(np.int32),
      "mask": real.astype(np.float32),
    }
