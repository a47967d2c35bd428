"""The data sets of `transfer`: the twelve of the paper, and the notation for any other."""

import dataclasses
import os
import re

from simclr_jax import errors, files

PAPER = "paper"  # stands for TWELVE
FOLDER = "folder:"


@dataclasses.dataclass(frozen=True)
class Task:
  """A data set to transfer to."""

  key: str  # its name in the results, and the name of its folder there
  source: str  # tfds | folder
  location: str  # the TFDS name, or the path of the folder
  # (train, validation, test); without a validation split ("") a share of train is held back. None: see `splits_of`.
  splits: tuple[str, str, str] | None
  metric: str = ""  # top1 | mean_per_class | map_11; "": map_11 if an image may have several classes, else top1
  # The paper's accuracies of ResNet-50 and ResNet-50 4x, linear, % (Chen et al. 2020, table 8 and B.8).
  published: tuple[float, float] | None = None
  remark: str = ""  # about its splits


def _paper(key, location, splits, metric, published, remark="", *, source="tfds"):
  return Task(key, source, location, ("train", *splits), metric, published, remark)


# In the paper's order. Birdsnap and Aircraft are not in TFDS 4.9.10: they are read as folders in the same directory.
TWELVE = (
  _paper("food101", "food101", ("", "validation"), "top1", (68.4, 76.9), "TFDS calls the test split validation"),
  _paper("cifar10", "cifar10", ("", "test"), "top1", (90.6, 95.3)),
  _paper("cifar100", "cifar100", ("", "test"), "top1", (71.6, 80.2)),
  _paper("birdsnap", "birdsnap", ("validation", "test"), "top1", (37.4, 48.4), "a folder", source="folder"),
  _paper("sun397", "sun397/standard-part1-120k", ("", "test"), "top1", (58.8, 65.9), "the first of ten splits"),
  _paper("cars196", "cars196", ("", "test"), "top1", (50.3, 60.0)),
  _paper("aircraft", "aircraft", ("validation", "test"), "mean_per_class", (50.3, 61.2), "a folder", source="folder"),
  _paper("voc2007", "voc/2007", ("validation", "test"), "map_11", (80.5, 84.2), "difficult objects do not count"),
  _paper("dtd", "dtd", ("validation", "test"), "top1", (74.5, 78.9), "the first of ten splits"),
  _paper("oxford_iiit_pet", "oxford_iiit_pet", ("", "test"), "mean_per_class", (83.6, 89.2)),
  _paper("caltech101", "caltech101", ("", "test"), "mean_per_class", (90.3, 93.9), "30 images a class to train on"),
  _paper("oxford_flowers102", "oxford_flowers102", ("validation", "test"), "mean_per_class", (91.2, 95.0)),
)


def chosen(text: str, data_dir: str) -> list[Task]:
  """Returns the data sets in the text of `config.transfer.datasets`, each once.

  With commas between: paper | a name in TWELVE | a TFDS name | NAME:TRAIN:VALIDATION:TEST | folder:DIR. The folders of
  TWELVE are in `data_dir`. A name that cannot be read, or two data sets with one folder of results, is a UserError.
  """
  tasks = []
  for word in (word.strip() for word in text.split(",")):
    tasks += [_placed(task, data_dir) for task in TWELVE] if word == PAPER else [_named(word, data_dir)]
  tasks = list(dict.fromkeys(tasks))
  keys = [task.key for task in tasks]
  for key in keys:
    if keys.count(key) > 1:
      raise errors.UserError(
        f"config.transfer.datasets names several data sets {key!r}, whose results would be in one folder; "
        "give each a --workdir of its own."
      )
  return tasks


def absolute(text: str) -> str:
  """Returns the text of `config.transfer.datasets` with every folder:DIR made independent of the current folder."""
  words = [word.strip() for word in text.split(",")]
  full = lambda word: FOLDER + files.absolute(word.removeprefix(FOLDER)) if word.startswith(FOLDER) else word
  return ",".join(map(full, words))


def optional(text: str) -> set[str]:
  """Returns the keys of the data sets that only `paper` stands for; the job may skip those that are not prepared."""
  words = [word.strip() for word in text.split(",")]
  named = {_named(word, "").key for word in words if word != PAPER}
  return {task.key for task in TWELVE} - named if PAPER in words else set()


def splits_of(task: Task, names: tuple[str, ...]) -> tuple[str, str, str]:
  """Returns (train, validation or "", test), given the names of the splits that a data set has.

  A task without splits, of a data set without train and test, is a UserError.
  """
  if task.splits:
    train, validation, test = task.splits
    # The validation split of a folder is optional.
    return (train, validation if task.source == "tfds" or validation in names else "", test)
  if "train" in names and "test" in names:
    return "train", "validation" if "validation" in names else "", "test"
  if "train" in names and "validation" in names:
    return "train", "", "validation"
  remedy = "name three as NAME:TRAIN:VALIDATION:TEST" if task.source == "tfds" else "make folders train and test"
  raise errors.UserError(f"{task.location} has the splits {', '.join(names)}, not train and test; {remedy}.")


def _placed(task, data_dir):
  return dataclasses.replace(task, location=os.path.join(data_dir, task.location)) if task.source == "folder" else task


def _named(word, data_dir):
  if word.startswith(FOLDER):
    location = word.removeprefix(FOLDER).rstrip("/")
    name = os.path.basename(location)
    known = [task for task in TWELVE if task.source == "folder" and task.key == name]
    return dataclasses.replace(known[0] if known else Task(name, "folder", "", None), location=location)
  # Splits at colons, except those inside brackets, as in train[:90%].
  name, *splits = re.split(r":(?![^\[]*\])", word)
  if len(splits) not in (0, 3) or not name or splits and not (splits[0] and splits[2]):
    raise errors.UserError(
      f"config.transfer.datasets has {word!r}; give paper, a TFDS name, NAME:TRAIN:VALIDATION:TEST "
      "(VALIDATION may be empty) or folder:DIR, with commas between."
    )
  known = [task for task in TWELVE if name in (task.key, task.location)]
  if known and not splits:
    return _placed(known[0], data_dir)
  task = _placed(known[0], data_dir) if known else Task(name, "tfds", name, None)
  key = re.sub(r"[^\w.%+-]+", "_", word).strip("_")
  # The published accuracies are of other splits.
  return dataclasses.replace(task, key=key, splits=tuple(splits) or None, published=None, remark="")
