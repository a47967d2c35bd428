"""Image files as people name them: a file, a folder or a pattern; those that cannot be decoded are told apart."""

import os
from collections.abc import Iterator, Sequence
from concurrent import futures

import numpy as np
import tensorflow as tf

from simclr_jax import errors
from simclr_jax.data import arrays, decode, folder

WILDCARDS = "*?["


def found(where: str) -> tuple[str, list[str]]:
  """Returns (a folder, the sorted paths of images relative to it) of a file, a folder with all below it, or a pattern.

  Of a folder these are the files with an image's ending that are not hidden; a pattern such as `new/*.jpg` takes what
  it matches. Local or gs://. UserError: there is none.
  """
  if tf.io.gfile.isdir(where):
    paths = [path for path in _below(where) if path.lower().endswith(folder.IMAGE_ENDINGS)]
    wanted = f"files that end in {', '.join(folder.IMAGE_ENDINGS)}"
  elif any(letter in where for letter in WILDCARDS):
    parts = where.split("/")
    fixed = next(number for number, part in enumerate(parts) if any(letter in part for letter in WILDCARDS))
    # A class is the name of a folder, so that those in the pattern stay in the paths.
    where, pattern = "/".join(parts[:fixed]) or "/", where
    paths = [os.path.relpath(path, where) for path in tf.io.gfile.glob(pattern) if not tf.io.gfile.isdir(path)]
    wanted = f"files that match {pattern}"
  elif tf.io.gfile.exists(where):
    return os.path.dirname(where), [os.path.basename(where)]
  else:
    raise errors.UserError(f'no file or folder "{where}" for config.predict.images; give one, or a pattern.')
  if not paths:
    raise errors.UserError(f'no image in "{where}"; config.predict.images wants {wanted}.')
  return where, sorted(paths)


def _below(root: str) -> Iterator[str]:
  """Yields the paths, relative to a folder, of the files below it that are not hidden; each folder once."""
  seen = set()
  walk = tf.io.gfile.walk(root) if "://" in root else os.walk(root, followlinks=True)
  for where, folders, names in walk:
    real = where if "://" in where else os.path.realpath(where)
    # A link to a parent would lead down for ever.
    if real in seen:
      folders.clear()
      continue
    seen.add(real)
    folders[:] = [name for name in folders if not name.startswith(".")]
    yield from (os.path.relpath(os.path.join(where, name), root) for name in names if not name.startswith("."))


def opened(root: str, paths: Sequence[str], class_names: Sequence[str] = ()) -> tuple[arrays.Arrays, list[str]]:
  """Returns the images at paths under a folder, still encoded, and the paths of those that cannot be decoded.

  The label of an image is the nearest folder above it, below `root`, with the name of a class; -1 where none has.
  """
  numbers = {name: number for number, name in enumerate(class_names)}

  def read(path):
    try:
      with tf.io.gfile.GFile(os.path.join(root, path), "rb") as file:
        content = file.read()
      decode.decode_image(content)
    except (OSError, ValueError, tf.errors.OpError):
      return None
    return content

  # Threads, because TensorFlow releases the interpreter's lock while it decodes.
  with futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    contents = list(pool.map(read, paths))
  good = [number for number, content in enumerate(contents) if content is not None]
  images = np.empty(len(good), object)
  images[:] = [contents[number] for number in good]
  label = lambda path: next((numbers[part] for part in reversed(path.split("/")[:-1]) if part in numbers), -1)
  names = tuple(paths[number] for number in good)
  labels = np.array([label(name) for name in names], np.int32)
  bad = [path for path, content in zip(paths, contents, strict=True) if content is None]
  return arrays.Arrays(root, images, labels, tuple(class_names), names), bad
