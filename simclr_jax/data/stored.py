"""A split as TensorFlow reads it: examples in memory, or TFRecord files that are streamed."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from simclr_jax.data import arrays, decode, order
from simclr_jax.data import source as source_lib


class Piece(NamedTuple):
  """`take` consecutive records of a TFRecord file, after the first `skip`."""

  file: str
  skip: int
  take: int


@dataclasses.dataclass(frozen=True, eq=False)
class Stored(source_lib.Source):
  """One split of images as stored examples, either in memory (`examples`) or in files (`pieces`).

  For the fields of every source see `source.Source`.
  """

  name: str
  class_names: tuple[str, ...]
  # A stored example (TensorFlow) -> (content, label): an image u8[H, W, 3] or the bytes of an encoded one; i32[], -1
  # without a label, or i32[num_classes] of a multi-label source, see `Source.labels`.
  read: Callable[..., tuple[tf.Tensor, tf.Tensor]]
  examples: tuple[tf.Tensor, ...] | None = None  # row i of these tensors is stored example i
  pieces: tuple[Piece, ...] = ()  # their records, one after the other, are the stored examples
  example_names: tuple[str, ...] = ()
  read_name: Callable[..., tf.Tensor] | None = None  # a stored example (TensorFlow) -> its name, where it holds one
  multi_label: bool = False
  checksums: tuple[int, ...] = ()

  @property
  def num_examples(self) -> int:
    if self.examples is not None:
      return int(self.examples[0].shape[0])
    return sum(piece.take for piece in self.pieces)

  @property
  def holds_labels(self) -> bool:
    return self.examples is not None

  def dataset(self) -> tf.data.Dataset:
    """Returns the stored examples of the split in order, each a tuple."""
    if self.examples is not None:
      return tf.data.Dataset.from_tensor_slices(self.examples)
    return read_pieces(self.pieces).map(lambda record: (record,))

  def names(self) -> tuple[str, ...]:
    if self.has_names or self.read_name is None:
      return super().names()
    rows = self.dataset().map(self.read_name, num_parallel_calls=os.cpu_count()).batch(4096)
    return tuple(name.decode() for block in rows.as_numpy_iterator() for name in block)

  def labels(self) -> np.ndarray:
    rows = self.dataset().map(lambda *example: self.read(*example)[1], num_parallel_calls=os.cpu_count())
    empty = np.zeros([0, self.num_classes] if self.multi_label else [0], np.int32)
    return np.concatenate([empty, *rows.batch(4096).as_numpy_iterator()])

  def sample(self, count: int, seed: int) -> Stored:
    """Returns a source of at most `count` examples, the same ones for the same seed.

    In memory these are random rows, sorted. Of files they are the first records of each, whatever the seed: to reach
    those further on costs as much as reading the file, and files of a data set are usually shuffled when written.
    """
    if self.examples is not None or count >= self.num_examples:
      return super().sample(count, seed)
    parts = order.bounds(count, len(self.pieces))
    shares = zip(self.pieces, parts, parts[1:], strict=False)
    pieces = tuple(p._replace(take=min(p.take, end - begin)) for p, begin, end in shares if end > begin)
    return dataclasses.replace(self, name=f"{self.name}, {count} of {self.num_examples}", pieces=pieces)

  def decoded(self) -> arrays.Arrays:
    def decoded_row(*example):
      content, label = self.read(*example)
      return decode.decode_image(content), label

    arrays.check_any(self)
    images, labels = None, None
    rows = self.dataset().map(decoded_row, num_parallel_calls=os.cpu_count())
    for number, (image, label) in enumerate(rows.as_numpy_iterator()):
      if images is None:
        images = np.empty((self.num_examples, *image.shape), np.uint8)
        labels = np.empty((self.num_examples, *label.shape), np.int32)
      arrays.check_size(image, images[0], number, self.name)
      images[number], labels[number] = image, label
    known = {"example_names": self.names(), "multi_label": self.multi_label, "checksums": self.checksums}
    return arrays.Arrays(self.name, images, labels, self.class_names, **known)

  def stored(self) -> Stored:
    return self

  def _at(self, rows):
    if isinstance(rows, slice):
      if self.examples is None:
        return {"pieces": tuple(pieces_between(self.pieces, rows.start, rows.stop))}
      return {"examples": tuple(column[rows] for column in self.examples)}
    if self.examples is not None:
      with tf.device("CPU"):
        return {"examples": tuple(tf.gather(column, rows) for column in self.examples)}
    wanted = np.zeros(self.num_examples, bool)
    wanted[rows] = True
    chosen = tf.data.Dataset.zip(self.dataset(), tf.data.Dataset.from_tensor_slices(wanted))
    chosen = chosen.filter(lambda _, use: use).map(lambda example, _: example[0])
    return {"examples": (all_elements(chosen),), "pieces": ()}


def pieces_between(pieces: Sequence[Piece], begin: int, end: int) -> list[Piece]:
  """Returns the pieces that hold the records `begin` to `end` - 1 of `pieces`."""
  found, first = [], 0
  for piece in pieces:
    low, high = max(begin, first), min(end, first + piece.take)
    if low < high:
      found.append(Piece(piece.file, piece.skip + low - first, high - low))
    first += piece.take
  return found


def read_pieces(pieces: Sequence[Piece]) -> tf.data.Dataset:
  """Returns the records of `pieces`, one piece after the other."""
  return read_records(
    np.array([piece.file for piece in pieces], np.str_),
    np.array([piece.skip for piece in pieces], np.int64),
    np.array([piece.take for piece in pieces], np.int64),
  )


def read_records(files: tf.Tensor, skips: tf.Tensor, takes: tf.Tensor) -> tf.data.Dataset:
  """Returns `takes[i]` records of `files[i]` after the first `skips[i]`, for each i in turn."""
  pieces = tf.data.Dataset.from_tensor_slices((files, skips, takes))
  stream = pieces.flat_map(lambda file, skip, take: tf.data.TFRecordDataset(file).skip(skip).take(take))
  # Without it a file that holds fewer records than its data set says would give a shorter epoch, not an error.
  return stream.apply(tf.data.experimental.assert_cardinality(tf.reduce_sum(takes)))


def all_elements(dataset: tf.data.Dataset) -> tf.Tensor:
  """Returns all elements of a finite dataset in one tensor, with a leading axis."""
  return tf.concat(list(dataset.batch(4096)), 0)


def on_host(*columns: np.ndarray) -> tuple[tf.Tensor, ...]:
  """Returns arrays as tensors in the host's memory."""
  with tf.device("CPU"):
    return tuple(tf.constant(column) for column in columns)
