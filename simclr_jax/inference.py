"""Networks of checkpoints in inference mode: the encoder for notebooks, the representation and classifier of jobs."""

import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from simclr_jax import config as config_lib
from simclr_jax import errors, experiment, network
from simclr_jax.data import arrays, inputs, pictures, source
from simclr_jax.evaluation import features
from simclr_jax.hardware import sharding
from simclr_jax.models import encoders, simclr
from simclr_jax.training import checkpoint
from simclr_jax.training import state as state_lib

# Images that go through the network together, at most; fewer are padded to a power of two, so that a few compilations
# serve any N and one image does not wait for 127 of padding.
BATCH = 128
OVERSHOOT = 0.25

Variables = dict[str, Any]


def load_encoder(path: str) -> tuple[Callable[[np.ndarray], np.ndarray], ml_collections.ConfigDict]:
  """Returns (encode, config) of the checkpoint at `path`; see `simclr_jax.load_encoder`."""
  saved = checkpoint.open(path)
  config = config_lib.completed(saved.config)
  model = encoders.build(config.model)
  mesh = sharding.data_mesh(jax.local_devices()[:1])
  params, batch_stats = state_lib.abstract_variables(model, config.data.image_size, mesh)
  params, batch_stats = saved.load({"encoder": params}, {"encoder": batch_stats})
  variables = {"params": params["encoder"], "batch_stats": batch_stats["encoder"]}
  apply = jax.jit(lambda x: model.apply(variables, x, train=False).astype(jnp.float32))
  return _on_images(apply, config, mesh), config


def load_classifier(
  path: str,
) -> tuple[Callable[[np.ndarray], np.ndarray], tuple[str, ...], ml_collections.ConfigDict]:
  """Returns (classify, class_names, config) of the checkpoint at `path`; see `simclr_jax.load_classifier`."""
  mesh = sharding.data_mesh(jax.local_devices()[:1])
  found = classifier(path, mesh)
  apply = jax.jit(lambda x: probabilities(found.logits_of(found.variables, x)))
  return _on_images(apply, found.config, mesh), found.class_names, found.config


def probabilities(logits: jax.Array) -> jax.Array:
  """Returns f32[N, K] of logits f[N, K]."""
  return jax.nn.softmax(logits.astype(jnp.float32))


def _on_images(apply, config, mesh):
  """Returns `apply`, jitted images [BATCH, H, W, 3] -> f32[BATCH, D], for any number of images or files."""
  applied = lambda _, images: apply(images)

  rule = pictures.Rule(config.data.white, config.data.background)

  def of_files(names):
    batches = inputs.evaluation(
      _files(names, rule), config.data.image_size, batch_size=_width(len(names)), is_resident=False, shared=False
    )
    return features.of_split(applied, (), batches(), mesh).x

  def on_images(images: np.ndarray | Sequence[str | os.PathLike]) -> np.ndarray:
    """Returns f32[N, D] of images u8 or f32 in [0, 1] [N, H, W, 3], or of N files, which are cropped as in `embed`."""
    images = [images] if isinstance(images, str | os.PathLike) else images
    if len(images) and isinstance(images[0], str | os.PathLike):
      return of_files(images)
    images = np.asarray(images)
    if images.ndim != 4 or images.shape[-1] != 3:
      raise errors.UserError(f"images have shape {images.shape}; wanted [N, H, W, 3], RGB.")
    if images.dtype != np.uint8:
      if not np.issubdtype(images.dtype, np.floating):
        raise errors.UserError(f"images are {images.dtype}; wanted uint8, or floats in [0, 1].")
      images = images.astype(np.float32)
      # Bicubic resizing overshoots a little.
      if images.size and not (images.min() > -OVERSHOOT and images.max() < 1 + OVERSHOOT):
        raise errors.UserError(
          f"images have values from {images.min():g} to {images.max():g}; wanted uint8, or floats in [0, 1]."
        )
    parts = []
    for start in range(0, len(images), BATCH):
      piece = images[start : start + BATCH]
      padding = [(0, _width(len(images)) - len(piece)), (0, 0), (0, 0), (0, 0)]
      parts.append(np.asarray(apply(np.pad(piece, padding)))[: len(piece)])
    dim = jax.eval_shape(apply, images[:1]).shape[-1]
    return np.concatenate([np.zeros((0, dim), np.float32), *parts])

  return on_images


def _width(count: int) -> int:
  return min(BATCH, 1 << max(count - 1, 0).bit_length())


def _files(names: Sequence[str | os.PathLike], rule: pictures.Rule) -> arrays.Arrays:
  """Returns the images in files, still encoded, without labels; a UserError for one that is not there or no image."""
  contents = np.empty(len(names), object)
  for number, name in enumerate(names):
    try:
      contents[number] = pictures.plain(pathlib.Path(name).expanduser().read_bytes(), rule)
    except pictures.BROKEN as error:
      raise errors.UserError(f'"{name}" cannot be read as an image ({error}); replace it or leave it out.') from error
  return arrays.Arrays("files", contents, np.full(len(names), -1, np.int32), (), tuple(map(str, names)))


class Representation(NamedTuple):
  """A frozen network, as far as a layer of the projection head."""

  encode: Callable[[Variables, jax.Array], jax.Array]  # (variables, f32 in [0, 1] or u8 [N, H, W, 3]) -> f[N, D].
  variables: Variables
  layer: int  # Whose output it gives; 0 is the encoder's h.


def representation(run: experiment.Experiment, mesh: jax.sharding.Mesh | None = None) -> Representation:
  """Returns what `config.checkpoint` (or `random`) and `config.head.evaluate_from` name, placed on a mesh."""
  config, mesh = run.config, mesh or run.mesh
  if not config.checkpoint:
    raise errors.UserError(
      f"{run.job} has no encoder; give --config.checkpoint=RUN, the workdir of a pretraining run (or `random`)."
    )
  layer = run.network.layer("evaluate_from")
  saved = run.saved(head=bool(layer)) if run.is_pretrained else None
  model = simclr.Representation(run.network.encoder(), run.network.projection_head() if layer else None, layer)
  size = config.data.image_size
  if saved:
    params, batch_stats = saved.load(*state_lib.abstract_variables(model, size, mesh, sharded=run.is_sharded))
  else:
    params, batch_stats = state_lib.variables(model, size, config.seed, mesh, sharded=run.is_sharded)
  gather_params = sharding.gather_params(mesh) if run.is_sharded else lambda params: params

  def encode(variables, images):
    return model.apply({**variables, "params": gather_params(variables["params"])}, images, train=False)

  return Representation(encode, {"params": params, "batch_stats": batch_stats}, layer)


def of_split(frozen: Representation, run: experiment.Experiment, images: Any) -> features.Features:
  """Returns the features of a whole split in order, by the evaluation's crop, on every process."""
  return features.of_split(frozen.encode, frozen.variables, run.rows(images)(), run.mesh)


class Classifier(NamedTuple):
  """A network with a classifier, replicated, in inference mode."""

  logits_of: Callable[[Variables, jax.Array], jax.Array]  # (variables, f32 in [0, 1] or u8 [N, H, W, 3]) -> f[N, K].
  variables: Variables
  classes: int
  class_names: tuple[str, ...]  # Numbers where the checkpoint has none.
  config: ml_collections.ConfigDict  # Of the run that trained it.

  def check_classes(self, images: source.Source, path: str) -> None:
    """Raises a UserError unless a split has the classes of this classifier, of the checkpoint `path`, in order."""
    if images.num_classes != self.classes:
      raise errors.UserError(
        f"the classifier of {path} tells {self.classes} classes apart and {images.name} has {images.num_classes}; use "
        "the data that it was trained on."
      )
    pairs = zip(self.class_names, images.class_names, strict=True)
    number = next((number for number, (ours, theirs) in enumerate(pairs) if ours != theirs), None)
    if number is not None and not are_numbers(self.class_names) and not are_numbers(images.class_names):
      raise errors.UserError(
        f"class {number} of the classifier of {path} is {self.class_names[number]} and that of {images.name} is "
        f"{images.class_names[number]}; use the data that it was trained on, or the job predict, which matches names."
      )


def are_numbers(class_names: Sequence[str]) -> bool:
  """Returns whether the names of classes are their numbers, as those of a checkpoint that has no names."""
  return tuple(class_names) == tuple(map(str, range(len(class_names))))


def classifier(path: str, mesh: jax.sharding.Mesh) -> Classifier:
  """Returns the network of a checkpoint that has a classifier, which reads the layer that it was trained on."""
  saved = checkpoint.open(path)
  config = config_lib.completed(saved.config)
  parts = network.Network(config)
  layer = saved.classifier_layer
  head = parts.projection_head() if layer else None
  model = simclr.Classifier(parts.encoder(), parts.linear_head(saved.classes), head, layer)
  params, batch_stats = saved.load(*state_lib.abstract_variables(model, config.data.image_size, mesh))
  logits_of = lambda variables, images: model.apply(variables, images, train=False)
  variables = {"params": params, "batch_stats": batch_stats}
  return Classifier(logits_of, variables, saved.classes, saved.class_names, config)
