"""Folders of image files, with a sub-folder for each class, for each split, for both or for neither."""

import logging
import os
import zlib
from collections.abc import Sequence
from concurrent import futures

import numpy as np
import tensorflow as tf

from simclr_jax import errors, progress
from simclr_jax.data import decode, layout, pictures, stored
from simclr_jax.data import source as source_lib

# Classes that a line of the log lists.
LISTED = 20

# Below it converted images are hardly seen.
DARK = 64

log = logging.getLogger("simclr_jax")


def open(request: source_lib.Request) -> stored.Stored:
  """Returns one split of the images under `request.data_dir`, after decoding each once to see whether it can be read.

  No such folder or split, folders that cannot be meant as they are, or more than `request.max_bad_share` of unreadable
  images, is a UserError.
  """
  root, split = request.data_dir, request.split
  paths, labels, class_names = layout.split_of(root, split)
  good, odd, sums = _readable(root, paths, request)
  labels, is_converted = labels[good], bool(odd.any())
  log.info("%s: split %s has %d images%s", root, split, len(good), _counts(labels, class_names))
  content, labels, odd = stored.on_host(np.array([os.path.join(root, paths[number]) for number in good]), labels, odd)
  load, examples = tf.io.read_file, (content, labels)
  if is_converted:
    load, examples = _converting(request.pictures), (content, labels, odd)
  if request.cache:
    files = tf.data.Dataset.from_tensor_slices((content, *examples[2:]))
    examples = (stored.all_elements(files.map(load, num_parallel_calls=os.cpu_count())), labels)
  read = lambda path, label, *odd: (path if request.cache else load(path, *odd), label)
  names = tuple(paths[number] for number in good)
  return stored.Stored(f"{root} ({split})", class_names, read, examples, example_names=names, checksums=tuple(sums))


def split_names(request: source_lib.Request) -> tuple[str, ...]:
  """Returns which of train, validation and test have a folder under `request.data_dir`; ("train",) without any."""
  return layout.split_names(request.data_dir)


def _converting(rule):
  """Returns (path, whether its image is not plain) -> bytes that TensorFlow decodes."""

  def load(path, odd):
    content = tf.io.read_file(path)
    converted = lambda: tf.ensure_shape(tf.numpy_function(lambda x: pictures.plain(x, rule), [content], tf.string), [])
    return tf.cond(odd, converted, lambda: content)

  return load


def _counts(labels, class_names):
  """Returns the rest of a line on so many images: the classes and how many each has."""
  if not class_names:
    return ", no class folders and so no labels."
  counts = np.bincount(labels[labels >= 0], minlength=len(class_names)).tolist()
  each = [f"{name} {count}" for name, count in zip(class_names, counts, strict=True)]
  more = f", ... ({len(each) - LISTED} more)" if len(each) > LISTED else ""
  missing = int(np.sum(labels < 0))
  return (
    f" in {len(each)} classes: {', '.join(each[:LISTED])}{more}" + (f"; {missing} without" if missing else "") + "."
  )


def _readable(root: str, paths: Sequence[str], request: source_lib.Request) -> tuple[list[int], np.ndarray, list[int]]:
  """Returns, of the paths whose images decode, the numbers, which are not plain, bool[N], and checksums.

  Logs the others, and raises where they are too many.
  """

  brightest = 0

  def decodes(path):
    """Returns (0 for a plain image, 1 for another one that decodes, -1 for one that does not; its checksum)."""
    nonlocal brightest
    try:
      with tf.io.gfile.GFile(os.path.join(root, path), "rb") as file:
        content = file.read()
      if is_plain := pictures.is_plain(content):
        decode.decode_image(content)
      else:
        brightest = max(brightest, int(pictures.rgb(content, request.pictures).max()))
      return int(not is_plain), zlib.crc32(content)
    except (*pictures.BROKEN, tf.errors.OpError):
      return -1, 0

  with futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    kinds, sums = np.array(
      list(progress.counted(pool.map(decodes, paths), len(paths), "reading images", "image")), np.int64
    ).T
  good, bad = np.flatnonzero(kinds >= 0), np.flatnonzero(kinds < 0).tolist()
  if len(bad) > request.max_bad_share * len(paths) or not len(good):
    raise errors.UserError(
      f'{len(bad)} of {len(paths)} images in "{root}" cannot be read (first: {paths[bad[0]]}), more than the '
      f"allowed share of {request.max_bad_share}; repair or remove them, or raise max_bad_share."
    )
  if bad:
    log.warning("%s: %d of %d images cannot be read and are left out:", root, len(bad), len(paths))
  for number in bad:
    log.warning("  left out: %s", paths[number])
  odd = kinds[good] == 1
  if odd.any():
    first = paths[good[np.argmax(odd)]]
    log.info("%s: %d images are 16-bit, transparent, rotated or not JPEG, PNG or BMP (%s); they are converted.",
             root, odd.sum(), first)  # fmt: skip
  if odd.any() and brightest < DARK:
    line = (
      "%s: the brightest pixel of these is %d of 255; give --config.data.white=VALUE, their largest value such as 4095."
    )
    log.warning(line, root, brightest)
  return good.tolist(), odd, sums[good].tolist()
