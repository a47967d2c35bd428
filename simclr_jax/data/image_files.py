"""Image files as people name them: a file, a folder or a pattern; those that cannot be decoded are told apart."""

import os
from collections.abc import Sequence
from concurrent import futures

import numpy as np
import tensorflow as tf
from PIL import Image

from simclr_jax import errors
from simclr_jax.data import arrays, decode, layout, pictures

WILDCARDS = "*?["


def found(where: str) -> tuple[str, list[str]]:
  """Returns (a folder, the sorted paths of images relative to it) of a file, a folder with all below it, or a pattern.

  Of a folder these are the files with an image's ending that are not hidden; a pattern such as `new/*.jpg` takes what
  it matches. Local or gs://. UserError: there is none.
  """
  if tf.io.gfile.isdir(where):
    paths = [
      os.path.normpath(os.path.join(below, name)) for below, names in layout.files_under(where) for name in names
    ]
    hidden = lambda path: any(part.startswith(".") for part in path.split("/"))
    paths = [path for path in paths if path.lower().endswith(pictures.ENDINGS) and not hidden(path)]
    wanted = f"files that end in {', '.join(pictures.ENDINGS)}"
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


def opened(
  root: str, paths: Sequence[str], class_names: Sequence[str] = (), rule: pictures.Rule = pictures.PLAIN
) -> tuple[arrays.Arrays, dict[str, str]]:
  """Returns the images at paths under a folder, still encoded, and why others cannot be decoded, by path.

  The label of an image is the nearest folder above it, below `root`, with the name of a class; -1 where none has.
  """
  numbers = {name: number for number, name in enumerate(class_names)}

  def read(path):
    """Returns the bytes of an image, or why there are none."""
    try:
      with tf.io.gfile.GFile(os.path.join(root, path), "rb") as file:
        content = file.read()
      content = pictures.plain(content, rule)
      decode.decode_image(content)
    except tf.errors.OpError:
      return "it is damaged"
    except pictures.BROKEN as error:
      return "it is no image" if isinstance(error, Image.UnidentifiedImageError) else str(error)
    return content

  # Threads, because TensorFlow and Pillow release the interpreter's lock while they decode.
  with futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    contents = dict(zip(paths, pool.map(read, paths), strict=True))
  bad = {path: content for path, content in contents.items() if isinstance(content, str)}
  names = tuple(path for path in paths if path not in bad)
  images = np.empty(len(names), object)
  images[:] = [contents[name] for name in names]
  label = lambda path: next((numbers[part] for part in reversed(path.split("/")[:-1]) if part in numbers), -1)
  labels = np.array([label(name) for name in names], np.int32)
  return arrays.Arrays(root, images, labels, tuple(class_names), names), bad
