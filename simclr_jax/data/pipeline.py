"""The host's input pipeline (tf.data): batches that depend on seed and step alone, whatever the number of hosts."""

import itertools
import os
from collections.abc import Callable, Iterator

import numpy as np
import tensorflow as tf

from simclr_jax import errors
from simclr_jax.data import allocator, stored
from simclr_jax.data import order as order_lib
from simclr_jax.data import source as source_lib

allocator.keep_freed_memory()

NO_CONVERSION = tf.autograph.experimental.do_not_convert

# (content, seed i32[2]) -> what a batch holds of an example, in TensorFlow; the content is an image u8[H, W, 3] or its
# encoded bytes, the seed a function of (seed of the run, epoch, example).
Transform = Callable[[tf.Tensor, tf.Tensor], dict[str, tf.Tensor]]

# Step -> the examples of the global batch after the first `step` ones, and their epochs, i32[batch_size] each.
Positions = Callable[[int], tuple[np.ndarray, np.ndarray]]


def train_batches(
  source: source_lib.Source,
  transform: Transform,
  order: order_lib.Order,
  *,
  start_step: int = 0,
  process: order_lib.Process = order_lib.ALONE,
  threads: int = 0,
  positions: Positions | None = None,
) -> Iterator[dict[str, np.ndarray]]:
  """Returns this host's rows of the global batches without end, after the first `start_step` ones.

  Each shard (a consecutive part of the data) has an endless stream of its own, epoch after epoch, every example once
  an epoch, and gives batch_size / shards rows to every batch: shard p fills the p-th block of the global batch. A host
  reads consecutive shards. `threads` transform examples at the same time; 0 takes one for each processor. `positions`
  takes the place of that order; the examples have to be in memory.

  Yields:
    what `transform` returns, stacked, and i32[n] each: `label` (-1 without one), `index`, the position in the split,
    and `epoch`. Numbers of shards, hosts and examples that do not fit each other are a UserError.
  """
  order.check(source, process.count)
  source = source.stored()
  count = order.batch_size // order.shards
  bounds = order_lib.bounds(source.num_examples, order.shards)
  first, end = (order.shards * host // process.count for host in (process.index, process.index + 1))
  shards = [((order.seed, shard), bounds[shard], bounds[shard + 1]) for shard in range(first, end)]
  position = count * start_step
  if positions:
    if source.examples is None:
      raise errors.UserError(
        f"{source.name} is streamed from files, and balanced sampling wants images in memory; set data.cache=true."
      )
    own = slice(count * first, count * end)
    blocks = lambda: (tuple(column[own] for column in positions(step)) for step in itertools.count(start_step))
    column = tf.TensorSpec([None], tf.int32)
    rows = tf.data.Dataset.from_generator(blocks, output_signature=(column, column))
  elif source.examples is None:
    plans = [
      _epoch_plans(stored.pieces_between(source.pieces, low, high), low, key, position, order.shuffle_window)
      for key, low, high in shards
    ]
    rows = _streamed_shards(plans, order.shuffle_window, count)
  else:
    streams = [_indexed_shard(low, high, key, position, count) for key, low, high in shards]
    blocks = lambda: (tuple(map(np.concatenate, zip(*block, strict=True))) for block in zip(*streams, strict=True))
    column = tf.TensorSpec([None], tf.int64)
    rows = tf.data.Dataset.from_generator(blocks, output_signature=(column, column))
  dataset = _transformed(rows.unbatch(), source, transform, order.seed, threads).batch(count * (end - first))
  return dataset.prefetch(2).as_numpy_iterator()


def evaluation_batches(
  source: source_lib.Source,
  transform: Transform,
  *,
  batch_size: int,
  process: order_lib.Process = order_lib.ALONE,
  seed: int = 0,
) -> Iterator[dict[str, np.ndarray]]:
  """Returns this host's rows of one pass over the split in order, each example on exactly one host.

  Every host has a consecutive slice of the split and gives the same number of batches, of batch_size / process.count
  rows each. The last ones are padded with rows of mask 0, label -1 and index -1. The seeds of the transform are those
  of epoch 0. A batch that does not split over the hosts is a UserError.

  Yields:
    what `transform` returns, stacked, and `label`, `index`, `epoch` i32[n], `mask` f32[n].
  """
  order_lib.check_evaluation(batch_size, process.count)
  source = source.stored()
  bounds = order_lib.bounds(source.num_examples, process.count)
  begin, end = bounds[process.index], bounds[process.index + 1]
  rows = tf.data.Dataset.range(begin, end).map(lambda index: (index, tf.constant(0, tf.int64)))
  if source.examples is None:
    records = stored.read_pieces(stored.pieces_between(source.pieces, begin, end))
    rows = tf.data.Dataset.zip(rows, records).map(lambda row, record: (*row, record))
  dataset = _transformed(rows, source, transform, seed)
  local = batch_size // process.count
  padding = {
    key: np.full([local, *spec.shape], -1 if key in ("label", "index") else 0, spec.dtype.as_numpy_dtype)
    for key, spec in dataset.element_spec.items()
  }
  batches = -(-max(np.diff(bounds)) // local)
  return _padded(dataset.batch(local).prefetch(2).as_numpy_iterator(), padding, batches)


def example_seed(seed: int, epoch: tf.Tensor | int, index: tf.Tensor | int) -> tf.Tensor:
  """Returns the seed i32[2] of the example at position `index` of the split in an epoch."""
  fold_in = tf.random.experimental.stateless_fold_in
  return fold_in(fold_in(tf.constant([seed, 0], tf.int32), tf.cast(epoch, tf.int32)), tf.cast(index, tf.int32))


def _transformed(rows, source, transform, seed, threads=0) -> tf.data.Dataset:
  """Returns the examples of rows (index, epoch) or (index, epoch, record) after the transform, in order."""

  @NO_CONVERSION
  def example(index, epoch, *record):
    content, label = source.read(*(record or (column[index] for column in source.examples)))
    position = {"index": tf.cast(index, tf.int32), "epoch": tf.cast(epoch, tf.int32)}
    return {**transform(content, example_seed(seed, epoch, index)), "label": label, **position}

  workers = threads or os.cpu_count()
  options = tf.data.Options()
  options.threading.private_threadpool_size = workers
  options.threading.max_intra_op_parallelism = 1
  options.deterministic = True
  return rows.map(example, num_parallel_calls=workers, deterministic=True).with_options(options)


def _indexed_shard(begin, end, key, position, count):
  """Yields (index i64[count], epoch i64[count]) of the shard of the examples `begin` to `end` - 1 for each step.

  `key` is (seed, number of the shard); the first `position` examples of its stream are left out.
  """
  (seed, shard), (epoch, offset) = key, divmod(position, end - begin)
  indices, epochs = np.zeros([2, 0], np.int64)
  while True:
    while len(indices) < count:
      fresh = begin + np.random.default_rng([seed, epoch, shard]).permutation(end - begin)[offset:]
      indices = np.concatenate([indices, fresh])
      epochs = np.concatenate([epochs, np.full(len(fresh), epoch)])
      epoch, offset = epoch + 1, 0
    yield indices[:count], epochs[:count]
    indices, epochs = indices[count:], epochs[count:]


def _streamed_shards(plans, window, count) -> tf.data.Dataset:
  """Returns undecoded blocks (index, epoch, record) of `count` rows, one of each shard in turn, by their plans."""
  vector, scalar = tf.TensorSpec([None], tf.int64), tf.TensorSpec([], tf.int64)
  signature = (tf.TensorSpec([None], tf.string), vector, vector, vector, vector, scalar, scalar)

  @NO_CONVERSION
  def one_epoch(files, skips, takes, places, indices, epoch, done):
    turns = tf.data.Dataset.from_tensor_slices((places, indices)).batch(window)
    windows = tf.data.Dataset.zip(stored.read_records(files, skips, takes).batch(window), turns)
    shuffled = windows.map(lambda records, turns: (turns[1], tf.gather(records, turns[0])))
    rows = shuffled.prefetch(1).unbatch().skip(done)
    return rows.map(lambda index, record: (index, epoch, record))

  @NO_CONVERSION
  def one_shard(number):
    epochs = tf.data.Dataset.from_generator(lambda k: plans[k], args=(number,), output_signature=signature)
    return epochs.flat_map(one_epoch).batch(count).prefetch(1)

  # Blocks follow each other in the order of the shards, as they do in the batch.
  return tf.data.Dataset.range(len(plans)).interleave(one_shard, cycle_length=len(plans), block_length=1)


def _epoch_plans(pieces, begin, key, position, window):
  """Yields how each epoch of a shard of TFRecord files is read; `begin`, `key`, `position` as in `_indexed_shard`.

  First the pieces are permuted, then the records of each window of consecutive ones.

  Yields:
    (files, skips, takes) of the pieces to read in turn; for each record's place, which record of its window comes
    there and that record's position in the split; the epoch; the number of leading records to skip.
  """
  firsts = begin + np.cumsum([0] + [piece.take for piece in pieces])
  (seed, shard), (epoch, offset) = key, divmod(position, int(firsts[-1]) - begin)
  while True:
    rng = np.random.default_rng([seed, epoch, shard])
    turns = rng.permutation(len(pieces))
    stream = np.concatenate([np.arange(firsts[turn], firsts[turn + 1]) for turn in turns])
    starts = range(0, len(stream), window)
    places = [rng.permutation(min(window, len(stream) - start)) for start in starts]
    indices = np.concatenate([stream[start + place] for start, place in zip(starts, places, strict=True)])
    skipped = offset // window * window
    rest = stored.pieces_between([pieces[turn] for turn in turns], skipped, len(stream))
    files, skips, takes = zip(*rest, strict=True)
    yield files, skips, takes, np.concatenate(places)[skipped:], indices[skipped:], epoch, offset - skipped
    epoch, offset = epoch + 1, 0


def _padded(batches, padding, count):
  """Yields `count` batches with a `mask`; missing rows are taken from the batch `padding`."""
  local = len(padding["index"])
  for _ in range(count):
    batch = next(batches, {key: value[:0] for key, value in padding.items()})
    have = len(batch["index"])
    batch = {key: np.concatenate([batch[key], padding[key][have:]]) for key in padding} if have < local else batch
    yield {**batch, "mask": (np.arange(local) < have).astype(np.float32)}
