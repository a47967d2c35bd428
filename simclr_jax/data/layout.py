"""What a folder of images means: which files are images, which folders splits and classes. Imports no TensorFlow."""

import json
import logging
import os
from collections.abc import Iterator, Sequence

import numpy as np
from etils import epath

from simclr_jax import errors
from simclr_jax.data import pictures

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
log = logging.getLogger("simclr_jax")


def files_under(root: str) -> Iterator[tuple[str, list[str]]]:
  """Yields (folder relative to `root`, its file names); folders that hold a run, and links to a folder above, once."""
  if "://" in root:  # Object stores have no links.
    for folder, _, names in epath.Path(root).walk():
      yield os.path.relpath(str(folder), root), names
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
    return {"job", "version", "config"} <= json.loads((epath.Path(folder) / "config.json").read_text()).keys()
  except (OSError, ValueError, AttributeError):
    return False


def image_files(root: str) -> list[str]:
  """Returns the sorted paths, relative to `root`, of the images under it; there is at least one."""
  if not root or not epath.Path(root).is_dir():
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


def split_names(root: str) -> tuple[str, ...]:
  """Returns which of train, validation and test have a folder under `root`; ("train",) without any."""
  return tuple(_split_folders(_unwrapped(image_files(root))[1])) or ("train",)


def split_of(root: str, split: str) -> tuple[list[str], np.ndarray, tuple[str, ...]]:
  """Returns the images of one split: their paths, their labels i32[N] (-1 without classes), the names of all classes.

  The classes are those of all splits together, so that every split numbers them alike.
  """
  inside, parts = _unwrapped(image_files(root))
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
  path = epath.Path(folder) / ANNOTATIONS
  if not path.exists():
    return {}
  return dict(line.split("\t")[:2] for line in path.read_text().splitlines() if "\t" in line)


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
