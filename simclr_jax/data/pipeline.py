"""The order of examples and their batches: pure functions of (seed, step), whatever the number of hosts."""

import os
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import tensorflow as tf

from simclr_jax.data import allocator, order, sources

allocator.keep_freed_memory()

NO_CONVERSION = tf.autograph.experimental.do_not_convert


def train_batches(
  source: sources.Source,
  transform: Callable,
  *,
  batch_size: int,
  shards: int,
  seed: int,
  start_step: int,
  shuffle_window: int,
  process_index: int,
  process_count: int,
  threads: int = 0,
) -> Iterator[dict[str, np.ndarray]]:
  """Returns this host's rows of the global batches that follow step `start_step`, without end.

  The data is cut into `shards` consecutive parts. Each has its own endless
  stream, epoch after epoch, every example once an epoch, and gives
  batch_size / shards rows to every batch: rows of part p are block p of the
  global batch. A host owns consecutive parts.

  Args:
    source: of the examples.
    transform: (content, seed i32[2]) to a dict of tensors, in TensorFlow; the content is an image u8[H, W, 3] or its
      encoded bytes, see `sources.Source.read`, the seed a function of (`seed`, epoch, example).
    batch_size: images of the global batch.
    shards: number of parts; the hosts divide it, and it divides the batch.
    seed: of the order and of the transform.
    start_step: number of steps done.
    shuffle_window: records permuted at a time where a source streams; others are permuted whole.
    process_index, process_count: which host this is.
    threads: of the transform; 0 takes one for each processor.

  Yields:
    what `transform` gives, stacked, and `label` i32[n] (-1: none), `index` i32[n], the position in the split,
    `epoch` i32[n].
  """
  order.check(source, batch_size, shards, seed, shuffle_window, process_count)
  count = batch_size // shards
  bounds = [source.num_examples * part // shards for part in range(shards + 1)]
  owned = range(shards * process_index // process_count, shards * (process_index + 1) // process_count)
  if source.examples is None:
    plans = [
      _epoch_plans(
        sources.cut(source.pieces, bounds[part], bounds[part + 1]),
        bounds[part],
        key=(seed, part),
        position=count * start_step,
        window=shuffle_window,
      )
      for part in owned
    ]
    rows = _streamed_parts(plans, shuffle_window, count)
  else:
    steps = [
      _indexed_part(bounds[part], bounds[part + 1], key=(seed, part), position=count * start_step, count=count)
      for part in owned
    ]
    signature = (tf.TensorSpec([None], tf.int64), tf.TensorSpec([None], tf.int64))
    blocks = lambda: (
      tuple(np.concatenate(column) for column in zip(*step, strict=True)) for step in zip(*steps, strict=True)
    )
    rows = tf.data.Dataset.from_generator(blocks, output_signature=signature)
  dataset = _finish(rows.unbatch(), source, transform, seed, threads).batch(count * len(owned))
  return dataset.prefetch(2).as_numpy_iterator()


def evaluation_batches(
  source: sources.Source,
  transform: Callable,
  *,
  batch_size: int,
  process_index: int,
  process_count: int,
  threads: int = 0,
  seed: int = 0,
) -> Iterator[dict[str, np.ndarray]]:
  """Returns this host's rows of one pass over the split, each example once over all hosts, in order.

  Every host has a consecutive slice and gives equally many batches of
  batch_size / process_count rows; rows that fill up the last ones have mask 0,
  label -1 and index -1.

  Args:
    source, transform, batch_size, process_index, process_count, threads: as in `train_batches`.
    seed: of the transform, at epoch 0.

  Yields:
    what `transform` gives, stacked, and `label` i32[n], `index` i32[n], `mask` f32[n].
  """
  order.check_evaluation(batch_size, process_count)
  bounds = [source.num_examples * host // process_count for host in range(process_count + 1)]
  begin, end = bounds[process_index], bounds[process_index + 1]
  rows = tf.data.Dataset.range(begin, end).map(lambda index: (index, tf.constant(0, tf.int64)))
  if source.examples is None:
    stored = sources.records(sources.cut(source.pieces, begin, end))
    rows = tf.data.Dataset.zip(rows, stored).map(lambda row, record: (*row, record))
  dataset = _finish(rows, source, transform, seed, threads)
  local = batch_size // process_count
  empty = {
    key: np.full([local, *spec.shape], -1 if key in ("label", "index") else 0, spec.dtype.as_numpy_dtype)
    for key, spec in dataset.element_spec.items()
  }
  batches = -(-max(b - a for a, b in zip(bounds, bounds[1:], strict=False)) // local)
  return _padded(dataset.batch(local).prefetch(2).as_numpy_iterator(), empty, batches)


def example_seed(seed, epoch, index):
  """Returns the seed i32[2] of the example at `index` of the split in one epoch."""
  fold_in = tf.random.experimental.stateless_fold_in
  return fold_in(fold_in(tf.constant([seed, 0], tf.int32), tf.cast(epoch, tf.int32)), tf.cast(index, tf.int32))


def _finish(rows, source, transform, seed, threads):
  """Returns the transformed rows of rows (index, epoch) or (index, epoch, record), in order."""

  @NO_CONVERSION
  def finish(index, epoch, *stored):
    content, label = source.read(*(stored or (column[index] for column in source.examples)))
    position = {"index": tf.cast(index, tf.int32), "epoch": tf.cast(epoch, tf.int32)}
    return {**transform(content, example_seed(seed, epoch, index)), "label": label, **position}

  workers = threads or os.cpu_count()
  options = tf.data.Options()
  options.threading.private_threadpool_size = workers
  options.threading.max_intra_op_parallelism = 1
  options.deterministic = True
  return rows.map(finish, num_parallel_calls=workers, deterministic=True).with_options(options)


def _indexed_part(begin, end, *, key, position, count):
  """Yields (index i64[count], epoch i64[count]) of one part for each step, from a position of its stream.

  Args:
    begin, end: the part's examples.
    key: (seed, number of the part).
    position: examples of the stream that are done.
    count: examples of one step.
  """
  epoch, offset = divmod(position, end - begin)
  indices, epochs = np.zeros([2, 0], np.int64)
  while True:
    while len(indices) < count:
      fresh = begin + _generator(key, epoch).permutation(end - begin)[offset:]
      indices = np.concatenate([indices, fresh])
      epochs = np.concatenate([epochs, np.full(len(fresh), epoch)])
      epoch, offset = epoch + 1, 0
    yield indices[:count], epochs[:count]
    indices, epochs = indices[count:], epochs[count:]


def _streamed_parts(plans, window, count):
  """Returns undecoded blocks (index, epoch, record) of `count` rows, of each part in turn, by their plans."""
  vector = lambda dtype: tf.TensorSpec([None], dtype)
  scalar = tf.TensorSpec([], tf.int64)
  signature = (vector(tf.string), *[vector(tf.int64)] * 4, scalar, scalar)

  @NO_CONVERSION
  def one_epoch(files, skips, takes, places, indices, epoch, done):
    turns = tf.data.Dataset.from_tensor_slices((places, indices)).batch(window)
    windows = tf.data.Dataset.zip(sources.records_of(files, skips, takes).batch(window), turns)
    shuffled = windows.map(lambda records, turns: (turns[1], tf.gather(records, turns[0])))
    rows = shuffled.prefetch(1).unbatch().skip(done)
    return rows.map(lambda index, record: (index, epoch, record))

  @NO_CONVERSION
  def one_part(number):
    epochs = tf.data.Dataset.from_generator(lambda k: plans[k], args=(number,), output_signature=signature)
    return epochs.flat_map(one_epoch).batch(count).prefetch(1)

  # One block of each part in turn: the parts' order is that of the blocks in the batch.
  return tf.data.Dataset.range(len(plans)).interleave(one_part, cycle_length=len(plans), block_length=1)


def _epoch_plans(pieces: Sequence[sources.Piece], begin, *, key, position, window):
  """Yields how each epoch of a part of TFRecord files is read, from a position of its stream.

  The pieces are permuted; then every window of consecutive records is.

  Yields:
    (files, skips, takes) of the pieces to read in turn; for each of their records which one of its window
    comes in its place, and that one's position in the split; the epoch; how many of these are done already.
  """
  firsts = begin + np.cumsum([0] + [piece.take for piece in pieces])
  epoch, offset = divmod(position, int(firsts[-1]) - begin)
  while True:
    rng = _generator(key, epoch)
    turns = rng.permutation(len(pieces))
    stream = np.concatenate([np.arange(firsts[turn], firsts[turn + 1]) for turn in turns])
    starts = range(0, len(stream), window)
    places = [rng.permutation(min(window, len(stream) - start)) for start in starts]
    indices = np.concatenate([stream[start + place] for start, place in zip(starts, places, strict=True)])
    skipped = offset // window * window
    rest = sources.cut([pieces[turn] for turn in turns], skipped, len(stream))
    files, skips, takes = zip(*((piece.file, piece.skip, piece.take) for piece in rest), strict=True)
    yield files, skips, takes, np.concatenate(places)[skipped:], indices[skipped:], epoch, offset - skipped
    epoch, offset = epoch + 1, 0


def _generator(key, epoch):
  seed, part = key
  return np.random.default_rng([seed, epoch, part])


def _padded(batches, empty, count):
  """Yields `count` batches with their `mask`, the missing rows being those of `empty`."""
  local = len(empty["index"])
  for _ in range(count):
    batch = next(batches, {key: value[:0] for key, value in empty.items()})
    have = len(batch["index"])
    batch = {key: np.concatenate([batch[key], empty[key][have:]]) for key in empty} if have < local else batch
    yield {**batch, "mask": (np.arange(local) < have).astype(np.float32)}
