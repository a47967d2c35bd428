"""The table of data sources, and how one is opened; TensorFlow is imported by those that need it."""

import importlib
import importlib.util
import types

from simclr_jax import errors
from simclr_jax.data import source as source_lib

# Each is a module of this package with open(request) -> Source and split_names(request) -> tuple[str, ...].
SOURCES = ("tfds", "folder", "arrays", "shapes")
# These are NumPy arrays; all others are read by TensorFlow.
WITHOUT_TENSORFLOW = ("arrays", "shapes")


def load(kind: str, request: source_lib.Request) -> source_lib.Source:
  """Returns one split; a UserError for a kind not in SOURCES or without its TensorFlow, and for data not there."""
  return _module(kind).open(request)


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
