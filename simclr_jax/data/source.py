"""The protocol of a data source: one split of images, in memory or as TensorFlow reads it. Imports no TensorFlow."""

from __future__ import annotations

import abc
import dataclasses
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
  from simclr_jax.data import arrays, stored


@dataclasses.dataclass(frozen=True)
class Request:
  """Which split of which data set to open; each source reads the fields that it needs.

  Attributes:
    split: its name; for TFDS also a part of one, as "train[:90%]".
    name: of the TFDS data set, as "imagenet2012_subset/1pct".
    data_dir: TFDS folder, image folder or .npz file.
    image_size: of the built-in shapes, in pixels.
    cache: whether the encoded images of TFDS or of a folder are kept in memory.
    max_bad_share: largest share of a folder's images that may be unreadable.
    num_examples, seed: of the built-in shapes.
    multi_label: whether a TFDS data set without the feature `label` gives its feature `labels`, any number of classes
      for each image; without it such a data set has no labels.
  """

  split: str
  name: str = ""
  data_dir: str = ""
  image_size: int = 32
  cache: bool = False
  max_bad_share: float = 0.01
  num_examples: int = 0
  seed: int = 0
  multi_label: bool = False


class Source(abc.ABC):
  """One split of images.

  Attributes:
    name: for messages.
    class_names: one for each class; empty without labels.
    multi_label: whether an image has any number of classes.
  """

  name: str
  class_names: tuple[str, ...]
  multi_label: bool

  @property
  @abc.abstractmethod
  def num_examples(self) -> int:
    """The number of images."""

  @property
  def num_classes(self) -> int:
    """The number of classes, 0 without labels."""
    return len(self.class_names)

  @property
  @abc.abstractmethod
  def has_names(self) -> bool:
    """Whether the names of the examples are known without reading the data."""

  @abc.abstractmethod
  def names(self) -> tuple[str, ...]:
    """Returns a name for each example: its path or file name, else its number in the split."""

  @abc.abstractmethod
  def labels(self) -> np.ndarray:
    """Returns the label of each example without decoding an image, i32[N], -1 where it has none.

    Of a multi-label source i32[N, num_classes]: 1 the image shows the class, 0 it does not, -1 unknown.
    """

  @abc.abstractmethod
  def take(self, rows: np.ndarray) -> Source:
    """Returns a source of the examples at the sorted row numbers int[n], in memory."""

  @abc.abstractmethod
  def consecutive(self, begin: int, end: int) -> Source:
    """Returns a source of the examples from `begin` to `end` - 1, which reads no others; they keep their names."""

  @abc.abstractmethod
  def sample(self, count: int, seed: int) -> Source:
    """Returns a source of about `count` examples, a function of the seed; the whole source where it has no more."""

  @abc.abstractmethod
  def decoded(self) -> arrays.Arrays:
    """Returns the split in memory with its images decoded, u8[N, H, W, 3].

    Raises:
      UserError: the images differ in size, one cannot be decoded, or there is none.
    """

  @abc.abstractmethod
  def stored(self) -> stored.Stored:
    """Returns the split as TensorFlow reads it.

    Raises:
      UserError: TensorFlow is not installed.
    """
