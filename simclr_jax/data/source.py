"""The protocol of a data source: one split of images, in memory or as TensorFlow reads it. Imports no TensorFlow."""

from __future__ import annotations

import abc
import dataclasses
import hashlib
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from simclr_jax import randomness
from simclr_jax.data import pictures

if TYPE_CHECKING:
  from simclr_jax.data import arrays, stored


@dataclasses.dataclass(frozen=True)
class Request:
  """Which split of which data set to open; each source reads the fields that it needs."""

  split: str  # or a part of one, as "train[:90%]"
  name: str = ""  # of the TFDS data set, as "imagenet2012_subset/1pct"
  data_dir: str = ""  # TFDS folder, image folder or .npz file
  image_size: int = 32  # of the built-in shapes, in pixels
  cache: bool = False  # whether the encoded images of TFDS or of a folder are kept in memory
  max_bad_share: float = 0.01  # largest share of a folder's images that may be unreadable
  num_examples: int = 0  # of the built-in shapes
  seed: int = 0  # of the built-in shapes
  # Whether a TFDS data set without the feature `label` gives its feature `labels`, any number of classes for each
  # image; without it such a data set has no labels.
  multi_label: bool = False
  pictures: pictures.Rule = pictures.PLAIN  # how a folder's or file's images that are no 8-bit RGB become that


class Source(abc.ABC):
  """One split of images; its implementations are frozen dataclasses with these fields."""

  name: str  # for messages
  class_names: tuple[str, ...]  # empty without labels
  example_names: tuple[str, ...]  # empty where they are not known without reading the data
  multi_label: bool  # whether an image has any number of classes
  checksums: tuple[int, ...] = ()  # of the examples' contents, where reading them was no further work
  read_name: Any = None  # reads an example's name from stored data, where they hold names

  @property
  @abc.abstractmethod
  def num_examples(self) -> int:
    """The number of images."""

  @property
  def num_classes(self) -> int:
    """The number of classes, 0 without labels."""
    return len(self.class_names)

  @property
  def holds_labels(self) -> bool:
    """Whether `labels` answers without reading files."""
    return True

  @property
  def has_names(self) -> bool:
    """Whether the names of the examples are known without reading the data."""
    return bool(self.example_names)

  def names(self) -> tuple[str, ...]:
    """Returns a name for each example: its path or file name, else its number in the split."""
    return self.example_names or tuple(map(str, range(self.num_examples)))

  def fingerprint(self) -> str:
    """Returns a hash of what is known of the examples without reading the data: names, labels and checksums."""
    known = hashlib.sha256(f"{self.num_examples} {self.class_names} {self.example_names} {self.checksums}".encode())
    if self.holds_labels:
      known.update(np.ascontiguousarray(self.labels()).tobytes())
    return known.hexdigest()

  @abc.abstractmethod
  def labels(self) -> np.ndarray:
    """Returns the label of each example without decoding an image, i32[N], -1 where it has none.

    Of a multi-label source i32[N, num_classes]: 1 the image shows the class, 0 it does not, -1 unknown.
    """

  def take(self, rows: np.ndarray) -> Self:
    """Returns a source of the examples at the sorted row numbers int[n], in memory."""
    names = tuple(self.example_names[row] for row in rows) if self.has_names else ()
    sums = tuple(self.checksums[row] for row in rows) if self.checksums else ()
    name = f"{self.name}, {len(rows)} of {self.num_examples}"
    return dataclasses.replace(self, name=name, example_names=names, checksums=sums, **self._at(rows))

  def consecutive(self, begin: int, end: int) -> Self:
    """Returns a source of the examples from `begin` to `end` - 1, which reads no others; they keep their names."""
    numbers = () if self.read_name else tuple(map(str, range(begin, end)))
    names = self.example_names[begin:end] or numbers
    name = f"{self.name}, rows {begin} to {end}"
    known = {"example_names": names, "checksums": self.checksums[begin:end]}
    return dataclasses.replace(self, name=name, **known, **self._at(slice(begin, end)))

  def sample(self, count: int, seed: int) -> Self:
    """Returns a source of about `count` examples, a function of the seed; the whole source where it has no more."""
    if count >= self.num_examples:
      return self
    return self.take(np.sort(randomness.host(seed, randomness.SAMPLE).permutation(self.num_examples)[:count]))

  @abc.abstractmethod
  def _at(self, rows: np.ndarray | slice) -> dict[str, Any]:
    """Returns the fields of a source of some rows: in memory, unless they are a slice."""

  @abc.abstractmethod
  def decoded(self) -> arrays.Arrays:
    """Returns the split in memory with its images decoded, u8[N, H, W, 3].

    Images of different sizes, one that cannot be decoded, or a split without images is a UserError.
    """

  @abc.abstractmethod
  def stored(self) -> stored.Stored:
    """Returns the split as TensorFlow reads it; raises a UserError where TensorFlow is not installed."""
