"""The images of a run: its splits, what is held out of them, and whose labels it sees."""

import functools
import logging

import ml_collections
import numpy as np

from simclr_jax import errors
from simclr_jax.data import parts, pictures, source, sources, subset

log = logging.getLogger("simclr_jax")


class Splits:
  """The splits that `config` names, each opened once; `job` is for messages."""

  config: ml_collections.ConfigDict
  job: str

  def images_of(self, split: str) -> source.Source:
    """Returns the examples of one split, decoded in memory where they are resident."""
    data = self.config.data
    if data.resident and self.config.augment.place != "device":
      raise errors.UserError(
        "config.data.resident augments on the devices, config.augment.place is 'host'; set it to device."
      )
    if not data.resident:
      sources.check_tensorflow(data.source)
    if data.holdout and split in (data.train_split, parts.HELD_OUT):
      images = self._halves[int(split == parts.HELD_OUT)]
    else:
      images = self._opened(split)
    return images.decoded() if data.resident else images

  def _opened(self, split: str) -> source.Source:
    data = self.config.data
    keys = {"cache": data.cache, "max_bad_share": data.max_bad_share, "num_examples": data.examples}
    keys |= {"name": data.name, "data_dir": data.dir, "image_size": data.image_size, "seed": self.config.seed}
    return sources.load(data.source, source.Request(split, **keys, pictures=self.pictures))

  @property
  def pictures(self) -> pictures.Rule:
    """How images that are no 8-bit RGB become that."""
    return pictures.Rule(self.config.data.white, self.config.data.background)

  @functools.cached_property
  def _halves(self) -> tuple[source.Source, source.Source]:
    """The training split and what is held out of it, which is read once for both."""
    if self.config.data.source == "tfds":
      raise errors.UserError(
        "config.data.holdout is for folders and arrays; set data.train_split to train[:80%] and data.eval_split to "
        "train[80%:]."
      )
    return self.divided(self._opened(self.config.data.train_split))

  def divided(self, images: source.Source) -> tuple[source.Source, source.Source]:
    """Returns (the images to train on, those that `config.data.holdout` holds out) of a split."""
    keys = self.config.data
    both = parts.divided(images, keys.holdout, seed=keys.holdout_seed, group=keys.holdout_group)
    log.info("%s: %d images to train on, %d held out.", images.name, *(part.num_examples for part in both))
    return both

  @functools.cached_property
  def train(self) -> source.Source:
    """The whole training split, without what is held out of it."""
    return self.images_of(self.config.data.train_split)

  @property
  def has_held_out(self) -> bool:
    """Whether there are images to count on."""
    return bool(self.config.data.eval_split or self.config.data.holdout)

  @functools.cached_property
  def classes(self) -> int:
    """Classes of the training images, 0 where none has a label."""
    return self.train.num_classes if has_labels(self.train) else 0

  @functools.cached_property
  def held_out(self) -> source.Source:
    """The split that the job counts on."""
    if not self.has_held_out:
      raise errors.UserError(
        f"{self.job} counts on held-out images; set --config.data.eval_split, such as test, or "
        "--config.data.holdout=0.2."
      )
    images = self.images_of(parts.HELD_OUT if self.config.data.holdout else self.config.data.eval_split)
    return self._of_rows(images, _with_labels(images, np.arange(images.num_examples)))

  @functools.cached_property
  def labelled(self) -> source.Source:
    """The part of the training split that has labels, and whose labels `config.labels` gives away."""
    if not self.train.num_classes:
      data = self.config.data
      raise errors.UserError(f"{self.job} needs labels; {data.source} {data.name or data.dir} has none.")
    return self._of_rows(self.train, self.labelled_rows(self.train))

  def _of_rows(self, images, rows):
    return images if len(rows) == images.num_examples else images.take(rows)

  def labelled_rows(self, images: source.Source) -> np.ndarray:
    """Returns the sorted row numbers of the labelled examples whose labels `config.labels` gives away.

    Of a split that is streamed from files and not chosen from, all: reading its labels takes as long as an epoch, and
    losses and counts leave images without a label out.
    """
    keys = self.config.labels
    if keys.ids:
      if keys.fraction != 1:
        raise errors.UserError("config.labels has a list of ids and a fraction; use one of them.")
      return _with_labels(images, subset.listed(images.names(), keys.ids))
    if keys.fraction == 1:
      return _with_labels(images, np.arange(images.num_examples))
    return _with_labels(images, subset.balanced(images.labels(), keys.fraction, keys.seed))


def has_labels(images: source.Source, most: int = 1024) -> bool:
  """Returns whether an image of a split (of one that is streamed from files, one of the first `most`) has a label."""
  known = images if images.holds_labels else images.consecutive(0, min(most, images.num_examples))
  return images.num_classes > 0 and bool(np.any(known.labels() >= 0))


def _with_labels(images, rows):
  """Returns those of some row numbers whose examples have a label, all where `labelled_rows` says so."""
  if not images.num_classes:
    return rows
  if not has_labels(images):
    raise errors.UserError(f"{images.name}: no image has a label (all are -1); name a split with labels.")
  return rows[images.labels()[rows] >= 0] if images.holds_labels else rows
