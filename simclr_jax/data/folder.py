"""Folders of image files, with a sub-folder for each class, for each split, for both or for neither."""

import logging
import os
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from simclr_jax import errors
from simclr_jax.data import decode, stored
from simclr_jax.data import source as source_lib

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp")
SPLIT_FOLDERS = {"train": ("train",), "test": ("test",), "validation": ("validation", "val", "valid")}

log = logging.getLogger("simclr_jax")


def open(request: source_lib.Request) -> stored.Stored:
  """Returns one split of the images under `request.data_dir`, after decoding each once to see whether it can be read.

  No such folder or split, or more than `request.max_bad_share` of unreadable images, is a UserError.
  """
  root, split = request.data_dir, request.split
  files = _image_files(root)
  paths, labels, class_names = _split_of(root, split, files)
  good = _readable(root, paths, request.max_bad_share)
  log.info("%s: split %s has %d images in %d classes.", root, split, len(good), len(class_names))
  content, labels = stored.on_host(np.array([os.path.join(root, paths[number]) for number in good]), labels[good])
  load = tf.io.read_file
  if request.cache:
    content, load = stored.all_elements(tf.data.Dataset.from_tensor_slices(content).map(load)), tf.identity
  read, names = lambda path, label: (load(path), label), tuple(paths[number] for number in good)
  return stored.Stored(f"{root} ({split})", class_names, read, (content, labels), example_names=names)


def split_names(request: source_lib.Request) -> tuple[str, ...]:
  """Returns which of train, validation and test have a folder under `request.data_dir`; ("train",) without any."""
  return tuple(_split_folders([path.split(os.sep) for path in _image_files(request.data_dir)])) or ("train",)


def _image_files(root: str) -> list[str]:
  """Returns the sorted paths, relative to `root`, of the images under it; there is at least one."""
  if not root or not tf.io.gfile.isdir(root):
    raise errors.UserError(f'no folder "{root}"; set data_dir to the folder that holds the images.')
  images, others = [], 0
  for folder, _, names in tf.io.gfile.walk(root):
    for name in names:
      path = os.path.relpath(os.path.join(folder, name), root)
      hidden = any(part.startswith(".") for part in path.split(os.sep))
      if hidden or not name.lower().endswith(IMAGE_ENDINGS):
        others += 1
      else:
        images.append(path)
  if not images:
    raise errors.UserError(f'no image in folder "{root}"; put files there that end in {", ".join(IMAGE_ENDINGS)}.')
  if others:
    log.info("%s: %d files that are no images are ignored.", root, others)
  return sorted(images)


def _split_of(root: str, split: str, files: Sequence[str]) -> tuple[list[str], np.ndarray, tuple[str, ...]]:
  """Returns the images of one split: their paths, their labels i32[N] (-1 without classes), the names of all classes.

  The classes are those of all splits together, so that every split numbers them alike.
  """
  parts = [path.split(os.sep) for path in files]
  splits = _split_folders(parts)
  wanted = next((name for name, known in SPLIT_FOLDERS.items() if split in known), split)
  if wanted not in (splits or ("train",)):
    known = list(splits.values()) or ["train"]
    raise errors.UserError(
      f'folder "{root}" has no split "{split}"; its splits: {", ".join(known)}; '
      f"put the images of a split into a sub-folder of that name{errors.nearest(split, known)}"
    )
  depth = 1 if splits else 0
  used = [names for names in parts if not splits or names[0] in splits.values()]
  if len(used) < len(files):
    log.warning("%s: %d images outside the folders of splits are not used.", root, len(files) - len(used))
  loose = sum(len(names) == depth + 1 for names in used)
  if 0 < loose < len(used):
    log.warning("%s: %d images are in no class folder, so no image has a label.", root, loose)
  class_names = () if loose else tuple(sorted({names[depth] for names in used}))
  numbers = {class_name: number for number, class_name in enumerate(class_names)}
  chosen = [names for names in used if not splits or names[0] == splits[wanted]]
  labels = np.array([numbers.get(names[depth], -1) for names in chosen], np.int32)
  return [os.path.join(*names) for names in chosen], labels, class_names


def _split_folders(parts: Sequence[Sequence[str]]) -> dict[str, str]:
  """Returns {split: its folder}, empty without split folders, given the components of each image's path."""
  tops = {names[0] for names in parts if len(names) > 1}
  splits = {name: top for name, known in SPLIT_FOLDERS.items() for top in sorted(tops) if top in known}
  # A class may be called "train": one such folder beside others is a class, two are splits.
  return {} if len(splits) < 2 and tops - set(splits.values()) else splits


def _readable(root: str, paths: Sequence[str], max_bad_share: float) -> list[int]:
  """Returns the numbers of the paths whose images decode; logs the others, and raises where they are too many."""
  (names,) = stored.on_host(np.array([os.path.join(root, path) for path in paths]))
  numbered = tf.data.Dataset.from_tensor_slices(names).enumerate()
  read = lambda number, path: (number, tf.shape(decode.decode_image(tf.io.read_file(path))))
  decoded = numbered.map(read, num_parallel_calls=os.cpu_count()).ignore_errors().batch(1024)
  good = sorted(number for numbers, _ in decoded.as_numpy_iterator() for number in numbers.tolist())
  bad = sorted(set(range(len(paths))) - set(good))
  if len(bad) > max_bad_share * len(paths) or not good:
    raise errors.UserError(
      f'{len(bad)} of {len(paths)} images in "{root}" cannot be read (first: {paths[bad[0]]}), more than the '
      f"allowed share of {max_bad_share}; repair or remove them, or raise max_bad_share."
    )
  if bad:
    log.warning("%s: %d of %d images cannot be read and are left out:", root, len(bad), len(paths))
  for number in bad:
    log.warning("  left out: %s", paths[number])
  return good
