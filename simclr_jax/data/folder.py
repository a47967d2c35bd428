"""Folders of image files, with a sub-folder for each class, for each split, for both or for neither."""

import json
import logging
import os
import zlib
from collections.abc import Iterator, Sequence
from concurrent import futures

import numpy as np
import tensorflow as tf

from simclr_jax import errors
from simclr_jax.data import decode, pictures, stored
from simclr_jax.data import source as source_lib

# The spellings of a split's folder, in any case.
SPLIT_FOLDERS = {
  "train": ("train", "training", "train_set", "training_set", "trainset"),
  "test": ("test", "testing", "test_set", "testset"),
  "validation": ("validation", "val", "valid", "validate", "validation_set", "val_set", "dev"),
}
# A split whose only folder has such a name has no classes there.
IMAGES_FOLDERS = ("images", "image", "imgs", "img", "jpegimages", "unlabeled", "unlabelled")
ANNOTATIONS = "val_annotations.txt"  # Of Tiny-ImageNet: file, class and a box, separated by tabs.
IGNORED = ("__MACOSX",)
# What a run leaves in its workdir.
RUN_FOLDERS = ("checkpoints", "figures", "tensorboard", "profile")
# Classes that a line of the log lists.
LISTED = 20

log = logging.getLogger("simclr_jax")


def open(request: source_lib.Request) -> stored.Stored:
  """Returns one split of the images under `request.data_dir`, after decoding each once to see whether it can be read.

  No such folder or split, folders that cannot be meant as they are, or more than `request.max_bad_share` of unreadable
  images, is a UserError.
  """
  root, split = request.data_dir, request.split
  paths, labels, class_names = _split_of(root, split, _image_files(root))
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
  return tuple(_split_folders(_unwrapped(_image_files(request.data_dir))[1])) or ("train",)


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


def files_under(root: str) -> Iterator[tuple[str, list[str]]]:
  """Yields (folder relative to `root`, its file names); folders that hold a run, and links to a folder above, once."""
  if "://" in root:  # Object stores have no links.
    for folder, _, names in tf.io.gfile.walk(root):
      yield os.path.relpath(folder, root), names
    return
  above: dict[str, tuple[str, ...]] = {}
  for folder, inner, names in os.walk(root, followlinks=True):
    place = os.path.realpath(folder)
    line = (*above.pop(folder, ()), place)
    is_run, kept = _is_run(folder) if "config.json" in names else False, []
    if is_run and folder != root:
      log.warning("%s: %s is the folder of a run; its images are not used.", root, os.path.relpath(folder, root))
      inner.clear()
      continue
    for name in sorted(inner):
      path = os.path.join(folder, name)
      if is_run and name in RUN_FOLDERS:
        log.warning("%s: %s belongs to a run whose --workdir it is; its images are not used.", root, name)
      elif os.path.realpath(path) in line:
        log.warning("%s: %s is a link to a folder above it; it is not followed.", root, os.path.relpath(path, root))
      else:
        above[path] = line
        kept.append(name)
    inner[:] = kept
    yield os.path.relpath(folder, root), names


def _is_run(folder):
  try:
    with tf.io.gfile.GFile(os.path.join(folder, "config.json")) as file:
      return {"job", "version", "config"} <= json.load(file).keys()
  except (ValueError, AttributeError):
    return False


def _image_files(root: str) -> list[str]:
  """Returns the sorted paths, relative to `root`, of the images under it; there is at least one."""
  if not root or not tf.io.gfile.isdir(root):
    raise errors.UserError(f'no folder "{root}"; set --config.data.dir to the folder that holds the images.')
  images, others, unread = [], 0, []
  for folder, names in files_under(root):
    for name in names:
      path = os.path.normpath(os.path.join(folder, name))
      hidden = any(part.startswith(".") or part in IGNORED for part in path.split(os.sep))
      if not hidden and name.lower().endswith(pictures.ENDINGS):
        images.append(path)
      elif not hidden and name.lower().endswith(pictures.UNREAD):
        unread.append(path)
      else:
        others += 1
  endings = ", ".join(pictures.ENDINGS)
  if unread:
    line = f"{len(unread)} images are in formats that are not read, such as {min(unread)}"
    if len(unread) > len(images):
      raise errors.UserError(f"{root}: {line}; convert them to one of {endings}.")
    log.warning("%s: %s; they are left out.", root, line)
  if not images:
    raise errors.UserError(f'no image in folder "{root}"; put files there that end in {endings}.')
  if others:
    log.info("%s: %d files that are no images are ignored.", root, others)
  return sorted(images)


def _unwrapped(files: Sequence[str]) -> tuple[str, list[list[str]]]:
  """Returns the folder that holds all the images and is no split's, and the components of their paths below it."""
  parts, inside = [path.split(os.sep) for path in files], []
  while all(len(names) > 2 for names in parts) and len(tops := {names[0] for names in parts}) == 1:
    (top,) = tops
    if _split_named(top):
      break
    inside.append(top)
    parts = [names[1:] for names in parts]
  return os.path.join("", *inside), parts


def _split_of(root: str, split: str, files: Sequence[str]) -> tuple[list[str], np.ndarray, tuple[str, ...]]:
  """Returns the images of one split: their paths, their labels i32[N] (-1 without classes), the names of all classes.

  The classes are those of all splits together, so that every split numbers them alike.
  """
  inside, parts = _unwrapped(files)
  splits = _split_folders(parts)
  wanted = _split_named(split) or split
  if wanted not in (splits or ("train",)):
    known = list(splits.values()) or ["train"]
    raise errors.UserError(
      f'folder "{root}" has no split "{split}"; its splits: {", ".join(known)}; '
      f"put the images of a split into a sub-folder of that name, or hold images out with --config.data.holdout=0.2"
      f"{errors.nearest(split, known)}"
    )
  used = [names for names in parts if not splits or names[0] in splits.values()]
  if len(used) < len(parts):
    log.warning("%s: %d images outside the folders of splits are not used.", root, len(parts) - len(used))
  classes = _classes(os.path.join(root, inside), used, splits)
  class_names = tuple(sorted({name for name in classes if name}))
  numbers = {class_name: number for number, class_name in enumerate(class_names)}
  chosen = [number for number, names in enumerate(used) if not splits or names[0] == splits[wanted]]
  labels = np.array([numbers.get(classes[number], -1) for number in chosen], np.int32)
  return [os.path.join(inside, *used[number]) for number in chosen], labels, class_names


def _classes(root: str, used: Sequence[Sequence[str]], splits: dict[str, str]) -> list[str]:
  """Returns the class of each image, given the components of its path; "" without one.

  In a split that has class folders every image has to be in one; a split may have none. UserError: the class folders
  of two splits, or of one, cannot be meant as they are.
  """
  classes, of_split = [""] * len(used), {}
  for top in splits.values() or ("",):
    rows = [row for row, names in enumerate(used) if not top or names[0] == top]
    below = [used[row][1:] if top else used[row] for row in rows]
    loose, folders = sum(len(names) == 1 for names in below), {names[0] for names in below if len(names) > 1}
    if folders and loose:
      log.warning("%s: %d images are in no class folder, so no image has a label.", os.path.join(root, top), loose)
      return [""] * len(used)
    if len(folders) == 1 and next(iter(folders)).lower() in IMAGES_FOLDERS:
      own = _annotated(os.path.join(root, top))
      found = [own.get(names[-1], "") for names in below]
    else:
      found = [names[0] if folders else "" for names in below]
    for row, name in zip(rows, found, strict=True):
      classes[row] = name
    if any(found):
      of_split[top] = set(found) - {""}
  _check_classes(root, of_split)
  if len(names := set(classes) - {""}) == 1:
    log.info("%s: one class folder (%s), and so no labels.", root, *names)
    return [""] * len(used)
  return classes


def _check_classes(root: str, of_split: dict[str, set[str]]) -> None:
  """Raises a UserError for class folders, by split, that their owner cannot have meant."""
  spelled: dict[str, str] = {}
  for name in sorted(set().union(*of_split.values())):
    if (other := spelled.setdefault(name.lower(), name)) != name:
      raise errors.UserError(f'{root}: the class folders "{other}" and "{name}" differ in case only; rename one.')
  first, *others = of_split or ("",)
  for other in others:
    if not of_split[first] & of_split[other]:
      listed = lambda top: ", ".join(sorted(of_split[top])[:3])
      raise errors.UserError(
        f'{root}: the splits "{first}" ({listed(first)}, ...) and "{other}" ({listed(other)}, ...) have no class in '
        "common; name their class folders alike."
      )


def _annotated(folder: str) -> dict[str, str]:
  """Returns {file name: class} by the annotations in a folder, empty without any."""
  path = os.path.join(folder, ANNOTATIONS)
  if not tf.io.gfile.exists(path):
    return {}
  with tf.io.gfile.GFile(path) as file:
    return dict(line.split("\t")[:2] for line in file.read().splitlines() if "\t" in line)


def _split_named(folder: str) -> str:
  """Returns the split that a folder's name spells, or ""."""
  return next((name for name, known in SPLIT_FOLDERS.items() if folder.lower() in known), "")


def _split_folders(parts: Sequence[Sequence[str]]) -> dict[str, str]:
  """Returns {split: its folder}, empty without split folders, given the components of each image's path."""
  tops = sorted({names[0] for names in parts if len(names) > 1})
  splits: dict[str, str] = {}
  for top in tops:
    if (name := _split_named(top)) and (other := splits.setdefault(name, top)) != top:
      raise errors.UserError(f'the folders "{other}" and "{top}" both spell the split {name}; keep one of them.')
  # A class may be called "train": one such folder beside others is a class, two are splits.
  splits = {} if len(splits) < 2 and set(tops) - set(splits.values()) else splits
  return {name: splits[name] for name in SPLIT_FOLDERS if name in splits}


def _readable(root: str, paths: Sequence[str], request: source_lib.Request) -> tuple[list[int], np.ndarray, list[int]]:
  """Returns, of the paths whose images decode, the numbers, which are not plain, bool[N], and checksums.

  Logs the others, and raises where they are too many.
  """

  def decodes(path):
    """Returns (0 for a plain image, 1 for another one that decodes, -1 for one that does not; its checksum)."""
    try:
      with tf.io.gfile.GFile(os.path.join(root, path), "rb") as file:
        content = file.read()
      if is_plain := pictures.is_plain(content):
        decode.decode_image(content)
      else:
        pictures.rgb(content, request.pictures)
      return int(not is_plain), zlib.crc32(content)
    except (*pictures.BROKEN, tf.errors.OpError):
      return -1, 0

  with futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    kinds, sums = np.array(list(pool.map(decodes, paths)), np.int64).T
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
  return good.tolist(), odd, sums[good].tolist()
