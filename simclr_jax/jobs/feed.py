"""How training images reach the step: augmented on the host, cropped there and coloured on the device, or resident."""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator
from typing import Any

import jax

from simclr_jax import errors
from simclr_jax.data import arrays, composition, device_augment, law, resident
from simclr_jax.hardware import sharding
from simclr_jax.inference import DTYPES
from simclr_jax.jobs import setup
from simclr_jax.training import loop

Batch = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Feed:
  """Training images on their way into the step.

  Attributes:
    mesh: the devices.
    prepare: batch, or any of its rows -> the same with what the network sees, `views` or `image`; part of the step.
    batches: first step -> this process's rows of every batch from then on; None where the data is resident.
    dataset: the data on the devices, where it is resident.
    batch_of: (dataset, step) -> global batch, where it is resident.
    most: steps of a dispatch.
  """

  mesh: jax.sharding.Mesh
  prepare: Callable[[Batch], Batch]
  batches: Callable[[int], Iterator[dict[str, Any]]] | None = None
  dataset: Any = None
  batch_of: Callable[[Any, jax.Array], Batch] | None = None
  most: int = 1

  def steps(self, step_fn, state, *constants) -> loop.Streamed | loop.Resident:
    """Returns what the loop runs for a step (state, batch, *constants) -> (state, metrics).

    States stay placed as `state` is; the constants, trees of arrays on the devices, go to every step.
    """
    if self.dataset is None:
      return loop.Streamed(setup.jitted(step_fn, self.mesh, state, *constants), self.batches, self.mesh, constants)
    replicated = sharding.replicated(self.mesh)
    placement, *others = (jax.tree.map(lambda array: array.sharding, tree) for tree in (state, *constants))
    jitted = jax.jit(
      loop.several(step_fn, self.batch_of, self.most),
      in_shardings=(placement, replicated, replicated, *others),
      out_shardings=(placement, replicated),
      donate_argnums=0,
    )
    return loop.Resident(jitted, self.dataset, self.mesh, self.most, constants)


def pairs(config, source, mesh: jax.sharding.Mesh) -> Feed:
  """Returns two augmented views of each image, by the reference's law and the config's knobs."""
  transform, prepare = law_of_pairs(config)
  images = _feed(config, source, mesh, transform, prepare, batch_size=config.batch_size, key="batch_size")
  if images.dataset is None or not config.augment.compose:
    return images
  operations = jax.device_put(composition.codes(config.augment.compose), sharding.replicated(mesh))
  return dataclasses.replace(
    images, dataset={**images.dataset, "operations": operations}, batch_of=_composed(images.batch_of)
  )


def law_of_pairs(config) -> tuple[Callable | None, Callable[[Batch], Batch]]:
  """Returns what happens to an image on the host (None where it is resident), and to a batch inside the step."""
  knobs = config.augment
  if knobs.compose:
    return _law_of_compositions(config)
  crop = {"size": config.data.image_size, "flip": knobs.flip, "area": (knobs.min_area, knobs.max_area)}
  color = {
    "color_strength": knobs.color_strength,
    "brightness": knobs.brightness,
    "color_probability": knobs.color_probability,
    "grayscale_probability": knobs.grayscale_probability,
    "blur": knobs.blur_probability > 0,
    "blur_probability": knobs.blur_probability,
  }
  on_device = {**color, "dtype": DTYPES[setup.choice("augment.dtype", knobs.dtype, DTYPES)]}
  keys = functools.partial(_keys, config.seed)
  if config.data.resident:
    views = lambda batch: device_augment.two_views(batch["image"], keys(batch), **crop, **on_device)
    return None, lambda batch: {**batch, "views": views(batch)}
  if knobs.place == "host":
    return lambda x, seed: {"views": _host().two_views(x, seed, **crop, **color)}, lambda batch: batch
  crop["resize"] = setup.choice("augment.resize", knobs.resize, law.RESIZES)
  views = lambda batch: device_augment.distorted_pairs(batch["views"], keys(batch), **on_device)
  return lambda x, seed: {"views": _host().two_crops(x, seed, **crop)}, lambda batch: {**batch, "views": views(batch)}


def step_depends_on(config) -> str:
  """Returns what a training step's program is a function of, on the same devices: the config, but for its own data."""
  known = config.to_dict()
  if config.data.resident and config.augment.compose:
    known["augment"]["compose"] = len(composition.codes(config.augment.compose))
  return json.dumps(known, sort_keys=True)


def _composed(plain):
  """Returns a feed's `batch_of` with the operations of the dataset in each row."""

  def batch_of(dataset, step):
    rows = plain(dataset, step)
    operations = jax.numpy.broadcast_to(dataset["operations"][None], (len(rows["index"]), len(dataset["operations"])))
    return {**rows, "operations": operations}

  return batch_of


def _law_of_compositions(config):
  """Returns `law_of_pairs` where `config.augment.compose` names what the second view goes through."""
  knobs, area = config.augment, (config.augment.min_area, config.augment.max_area)
  operations = composition.codes(knobs.compose)
  if knobs.place != "device":
    raise errors.UserError(
      f"config.augment.compose is done on the devices, config.augment.place is {knobs.place!r}; set it to device."
    )
  on_device = {
    "area": area,
    "dtype": DTYPES[setup.choice("augment.dtype", knobs.dtype, DTYPES)],
    **{name: knobs[name] for name in ("color_strength", "brightness", "color_probability", "grayscale_probability")},
  }
  keys = functools.partial(_keys, config.seed)
  size = config.data.image_size
  if config.data.resident:
    # Data of the step, not a part of its program: the cells of a study share what is compiled. All rows are the same.
    views = lambda batch: composition.pairs_of_images(
      batch["image"], keys(batch), batch["operations"][0], size=size, **on_device
    )
    return None, lambda batch: {**batch, "views": views(batch)}
  crop = {
    "size": size,
    "flip": False,
    "area": area,
    "resize": setup.choice("augment.resize", knobs.resize, law.RESIZES),
  }
  views = lambda batch: composition.pairs_of_crops(batch["image"], keys(batch), operations, **on_device)
  transform = lambda content, seed: {"image": _host().train_crop(content, seed, **crop)}
  return transform, lambda batch: {**batch, "views": views(batch)}


def singles(config, source, mesh: jax.sharding.Mesh, *, batch_size: int, min_area: float, key: str) -> Feed:
  """Returns one crop, flipped or not, of each image: the law of supervised training.

  Args:
    config: the run's.
    source: of the images.
    mesh: the devices.
    batch_size: of the recipe.
    min_area: of the crop, as a share of the image.
    key: of the batch size in the config, for messages.
  """
  crop = {"size": config.data.image_size, "flip": config.augment.flip, "area": (min_area, 1.0)}
  transform, prepare = _single_on_host(config, crop), lambda batch: batch
  if config.data.resident:
    view = lambda batch: device_augment.train_view(batch["image"], _keys(config.seed, batch), **crop)
    transform, prepare = None, lambda batch: {**batch, "image": view(batch)}
  return _feed(config, source, mesh, transform, prepare, batch_size=batch_size, key=key)


def augmented_rows(config, source, number: int) -> Iterator[dict[str, Any]]:
  """Returns one pass over a split like `setup.evaluation_rows`, but randomly cropped and flipped, anew by number."""
  crop = {"size": config.data.image_size, "flip": config.augment.flip, "area": (config.linear_eval.min_area, 1.0)}
  knobs = {
    "batch_size": config.eval_batch_size,
    "process_index": jax.process_index(),
    "process_count": jax.process_count(),
  }
  if isinstance(source, arrays.Arrays):
    view = lambda images, keys: device_augment.train_view(images, keys, **crop)
    return resident.augmented_batches(source, view, seed=config.seed, epoch=number, **knobs)
  from simclr_jax.data import pipeline

  # The seed of a pass is its own: in an evaluation every epoch is number 0.
  seed = config.seed + number
  return pipeline.evaluation_batches(source, _single_on_host(config, crop), seed=seed, **knobs)


def _single_on_host(config, crop):
  """Returns the host's transform to one crop."""
  if config.augment.place == "host":
    return lambda content, seed: {"image": _host().train_view(content, seed, **crop)}
  resize = setup.choice("augment.resize", config.augment.resize, law.RESIZES)
  return lambda content, seed: {"image": _host().train_crop(content, seed, resize=resize, **crop)}


def _host():
  # Imported late: it brings TensorFlow, which a resident run must do without.
  from simclr_jax.data import host_augment

  return host_augment


def _keys(seed, batch):
  return device_augment.example_keys(seed, batch["epoch"], batch["index"])


def _feed(config, source, mesh, transform, prepare, *, batch_size, key) -> Feed:
  if source.num_examples < batch_size:
    raise errors.UserError(
      f"{source.num_examples} training images cannot fill a batch of config.{key} = {batch_size}; choose a smaller one."
    )
  numbers = {"batch_size": batch_size, "shards": config.data.shards, "seed": config.seed}
  setup.check_order(source, shuffle_window=config.data.shuffle_window, **numbers)
  if isinstance(source, arrays.Arrays):
    if config.data.steps_per_dispatch < 1:
      raise errors.UserError(f"config.data.steps_per_dispatch is {config.data.steps_per_dispatch}; use 1 or more.")
    batch_of = functools.partial(resident.batch, mesh=mesh, **numbers)
    dataset = resident.on_devices(source, mesh)
    return Feed(mesh, prepare, dataset=dataset, batch_of=batch_of, most=config.data.steps_per_dispatch)
  from simclr_jax.data import pipeline

  batches = lambda step: pipeline.train_batches(
    source,
    transform,
    start_step=step,
    shuffle_window=config.data.shuffle_window,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
    **numbers,
  )
  return Feed(mesh, prepare, batches=batches)
