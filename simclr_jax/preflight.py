"""Mistakes in paths, found before the slow imports: of data, checkpoints and the workdir. Imports no TensorFlow."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from typing import Any

from simclr_jax import config as config_lib
from simclr_jax import errors
from simclr_jax.data import layout, parts, transfer_sets

# These read other images than `data.dir`, or none.
OTHER_IMAGES = ("transfer", "plan", "study")


def check(job: str, config: Any, workdir: str) -> None:
  """Raises a UserError where the images that a config names are not there, or the workdir cannot be written.

  `config` is a ConfigDict, or None for jobs without one; `workdir` is "" for none. Object stores (gs://) are not asked.
  """
  if config is not None:
    for name in ("checkpoint", "distill.teacher"):
      _check_run(name, config_lib.get_key(config, name))
  if job == "predict" and config.predict.images:
    _check_images(config.predict.images)
  elif config is not None and job not in OTHER_IMAGES:
    only = {"embed": config.embed.split, "predict": config.predict.split}
    _check_data(job, config.data, only.get(job, ""))
  if workdir and "://" not in workdir:
    _check_workdir(workdir)


def _check_run(name, path):
  if config_lib.names_run(path) and "://" not in path and not os.path.isdir(path):
    what = "is a file" if os.path.exists(path) else "does not exist"
    raise errors.UserError(f"config.{name} {path} {what}; give a run's workdir or one of its checkpoints/STEP folders.")


def _check_data(job, data, only):
  path = data.dir
  if "://" in path or data.source == "shapes":
    return
  if data.source == "folder":
    if not path:
      raise errors.UserError(f"{job} has no images; give the folder that holds them: --config.data.dir=FOLDER.")
    with _silent():
      split = lambda text: layout.split_of(path, parts.named(text)[0])
      if only and only != parts.HELD_OUT:
        split(only)
      # Without labels nothing is counted on held-out images.
      elif split(data.train_split)[2] and not only and data.eval_split and not data.holdout:
        split(data.eval_split)
  elif data.source == "arrays" and not os.path.isfile(path):
    raise errors.UserError(f'no file "{path}"; give an .npz file of images: --config.data.dir=FILE.npz.')
  elif data.source == "tfds" and path and not os.path.isdir(path):
    raise errors.UserError(
      f'no folder "{path}"; set --config.data.dir to the folder that holds the TFDS data sets, or leave it out for '
      "TFDS's own."
    )
  elif data.source == "tfds" and data.name.partition("/")[0] in _known_data_sets():
    folder = path or os.environ.get("TFDS_DATA_DIR") or os.path.expanduser("~/tensorflow_datasets")
    if not os.path.isdir(os.path.join(folder, data.name.partition("/")[0])):
      command = f"tfds build {data.name}" + (f" --data_dir={path}" if path else "")
      raise errors.UserError(f'TFDS data set "{data.name}" is not prepared in "{folder}"; prepare it with: {command}')


def _known_data_sets():
  """Returns TFDS names that need no look into TFDS, which knows others and says which is meant."""
  paper = {task.location.partition("/")[0] for task in transfer_sets.TWELVE if task.source == "tfds"}
  return {*paper, "imagenet2012", "imagenet2012_subset", "stl10"}


def _check_images(path):
  is_pattern = any(letter in path for letter in "*?[")
  if "://" not in path and not is_pattern and not os.path.exists(path):
    raise errors.UserError(f'no file or folder "{path}" for config.predict.images; give one, or a pattern.')


def _check_workdir(workdir):
  # A job that is refused for another mistake leaves no folder behind: the nearest one that is there is tried.
  there = os.path.abspath(workdir)
  while not os.path.lexists(there):
    there = os.path.dirname(there)
  try:
    with tempfile.TemporaryFile(dir=there):
      pass
  except OSError as error:
    what = "is a file" if os.path.isfile(workdir) else f"cannot be written ({error.strerror})"
    raise errors.UserError(f"workdir {workdir} {what}; give --workdir=DIR, a folder of your own.") from error


@contextlib.contextmanager
def _silent() -> Iterator[None]:
  """The folder is read once more when the images are opened, and says then what there is to say."""
  refuse = lambda record: False
  layout.log.addFilter(refuse)
  try:
    yield
  finally:
    layout.log.removeFilter(refuse)
