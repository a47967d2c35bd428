"""The table of data sources, and how one is opened; TensorFlow is imported by those that need it."""

import dataclasses
import importlib
import importlib.util
import types

from simclr_jax import errors
from simclr_jax.data import parts
from simclr_jax.data import source as source_lib

# Each is a module of this package with open(request) -> Source and split_names(request) -> tuple[str, ...].
SOURCES = ("tfds", "folder", "arrays", "shapes")
# These are NumPy arrays; all others are read by TensorFlow.
WITHOUT_TENSORFLOW = ("arrays", "shapes")


def load(kind: str, request: source_lib.Request) -> source_lib.Source:
  """Returns one split, or a part of one; a UserError for a kind not in SOURCES or without its TensorFlow.

  Also for data that are not there.
  """
  module = _module(kind)
  if kind == "tfds":  # It cuts by itself, and reads no more of a file than it needs.
    return module.open(request)
  name, cut = parts.named(request.split)
  if not cut:
    return module.open(request)
  images = module.open(dataclasses.replace(request, split=name))
  return images.take(parts.rows(cut, images.labels()))


def split_names(kind: str, request: source_lib.Request) -> tuple[str, ...]:
  """Returns the names of a source's splits, whatever `request.split` is; raises what `load` does."""
  return _module(kind).split_names(request)


def check_tensorflow(kind: str) -> None:
  """Raises a UserError where TensorFlow, which streams this source, is not installed."""
  if importlib.util.find_spec("tensorflow") is None:
    raise errors.UserError(
      f"config.data.source {kind} is read by TensorFlow, which is not installed; install it, or use "
      "data.resident=true with data.source=arrays (an .npz file) or shapes."
    )


def _module(kind: str) -> types.ModuleType:
  if kind not in SOURCES:
    raise errors.UserError(
      f'unknown data source "{kind}"; use one of {", ".join(SOURCES)}{errors.nearest(kind, SOURCES)}'
    )
  if kind not in WITHOUT_TENSORFLOW:
    check_tensorflow(kind)
  return importlib.import_module(f"simclr_jax.data.{kind}")
