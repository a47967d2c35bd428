"""A data set that lives on the devices: its order is computed inside the step, and nothing is fed."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from simclr_jax.data import arrays, device_augment, law
from simclr_jax.data import order as order_lib
from simclr_jax.hardware import sharding

ORDER = 1  # Apart from the keys of the augmentation, which have the same seed.


def on_devices(split: arrays.Arrays, mesh: jax.sharding.Mesh) -> dict[str, jax.Array]:
  """Returns `image` u8[N, H, W, 3] and `label` i32[N], whole on every device of the mesh.

  Whole, because a step takes any image on any device: of a data set in parts, whole batches would travel.
  """
  place = lambda x: jax.make_array_from_process_local_data(sharding.replicated(mesh), x, x.shape)
  return {"image": place(split.images), "label": place(split.labels)}


def batch(
  dataset: dict[str, jax.Array], step: jax.Array, *, batch_size: int, shards: int, seed: int, mesh: jax.sharding.Mesh
) -> dict[str, jax.Array]:
  """Returns the global batch of a step, split over the mesh: `image` u8[N, H, W, 3], `label`, `index`, `epoch` i32[N].

  Args:
    dataset: from `on_devices`.
    step: i32[], steps done.
    batch_size, shards, seed: as in `order`.
    mesh: where the dataset is.
  """
  position = order(step, examples=len(dataset["image"]), batch_size=batch_size, shards=shards, seed=seed)
  index, epoch = jax.lax.with_sharding_constraint(position, sharding.batched(mesh))
  rows = {"image": dataset["image"][index], "label": dataset["label"][index], "index": index, "epoch": epoch}
  return jax.lax.with_sharding_constraint(rows, sharding.batched(mesh))


def order(step: jax.Array, *, examples: int, batch_size: int, shards: int, seed: int) -> tuple[jax.Array, jax.Array]:
  """Returns the examples of one global batch and their epochs, i32[batch_size] each; a function of (seed, step).

  The data is cut into `shards` consecutive parts. Each has its own endless stream, epoch after epoch, every example
  once an epoch, and gives batch_size / shards rows to every batch. (The law of the host's pipeline; its permutations
  are others.)

  Args:
    step: i32[], steps done; times batch_size / shards it is below 2^31.
    examples: of the split.
    batch_size: a multiple of `shards`.
    shards: number of parts.
    seed: of the order.
  """
  bounds = np.array([examples * part // shards for part in range(shards + 1)])
  sizes, count = np.diff(bounds), batch_size // shards
  parts = jnp.arange(shards, dtype=jnp.int32)[:, None]
  size = jnp.asarray(sizes, jnp.int32)[:, None]
  begin = step.astype(jnp.int32) * count
  position = begin + jnp.arange(count, dtype=jnp.int32)[None]  # [1, count] in the streams.
  first, epoch, place = begin // size, position // size, position % size
  spanned = int((count - 2 + sizes.min()) // sizes.min()) + 1  # Epochs that one batch may touch.
  key = jax.random.fold_in(jax.random.key(seed), ORDER)

  def permutation(part, epoch):
    numbers = jax.random.bits(jax.random.fold_in(jax.random.fold_in(key, part), epoch), (int(sizes.max()),))
    # Sorting random numbers permutes. Parts differ by one in size: what is beyond the end of this one comes last.
    beyond = jnp.arange(len(numbers)) >= size[part, 0]
    return jnp.argsort(jnp.where(beyond, jnp.uint32(2**32 - 1), numbers >> 1)).astype(jnp.int32)

  epochs = first + jnp.arange(spanned, dtype=jnp.int32)[None]  # [shards, spanned]
  permutations = jax.vmap(jax.vmap(permutation, (None, 0)))(parts[:, 0], epochs)  # [shards, spanned, largest part]
  # Part by part, so that a device computes the order of its own parts and nothing moves.
  index = jax.vmap(lambda x, *where: x[where])(permutations, epoch - first, place)
  index += jnp.asarray(bounds[:-1], jnp.int32)[:, None]
  return index.reshape(-1), epoch.reshape(-1)


def evaluation_batches(
  split: arrays.Arrays, *, batch_size: int, image_size: int, process_index: int, process_count: int
) -> Iterator[dict[str, np.ndarray]]:
  """Yields this host's rows of one pass over the split, as `pipeline.evaluation_batches` does.

  Yields:
    `image` f32[n, image_size, image_size, 3], the evaluation's crop; `label`, `index` i32[n] and `mask` f32[n].
  """
  as_it_is = image_size <= law.SMALL_IMAGE and split.images.shape[1:3] == (image_size, image_size)
  crop = jax.jit(device_augment.center_crop, static_argnums=1)
  for rows in _passed(split, batch_size, process_index, process_count):
    images = rows["image"].astype(np.float32) / 255 if as_it_is else np.asarray(crop(rows["image"], image_size))
    yield {**rows, "image": images * rows["mask"][:, None, None, None]}


def augmented_batches(
  split: arrays.Arrays, view_of, *, seed: int, epoch: int, batch_size: int, process_index: int, process_count: int
) -> Iterator[dict[str, np.ndarray]]:
  """Yields what `evaluation_batches` does, with `view_of`(images u8[n, H, W, 3], keys[n]) as the images."""
  view = jax.jit(lambda images, index: view_of(images, device_augment.example_keys(seed, index * 0 + epoch, index)))
  for rows in _passed(split, batch_size, process_index, process_count):
    yield {**rows, "image": np.asarray(view(rows["image"], rows["index"]))}


def _passed(split, batch_size, process_index, process_count):
  """Yields this host's `image` u8, `label`, `index` and `mask`; what fills up the last batches has mask 0."""
  order_lib.check_evaluation(batch_size, process_count)
  local = batch_size // process_count
  bounds = [len(split.images) * host // process_count for host in range(process_count + 1)]
  begin, end = bounds[process_index], bounds[process_index + 1]
  for number in range(-(-max(np.diff(bounds)) // local)):
    index = np.arange(begin + number * local, begin + (number + 1) * local)
    real = index < end
    index = np.where(real, index, 0)
    yield {
      "image": split.images[index],
      "label": np.where(real, split.labels[index], -1).astype(np.int32),
      "index": np.where(real, index, -1).astype(np.int32),
      "mask": real.astype(np.float32),
    }
