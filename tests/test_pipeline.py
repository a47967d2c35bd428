"""The host's input pipeline: its order is a function of (seed, step), each example once an epoch."""

import dataclasses
import itertools
import pathlib

import numpy as np
import pytest
import tensorflow as tf

from simclr_jax import errors
from simclr_jax.data import arrays, host_augment, pipeline, sources, stored
from simclr_jax.data.distortion import Distortion
from simclr_jax.data.order import Order, Process
from simclr_jax.data.source import Request

ORDER = Order(batch_size=8, shards=4, seed=5, shuffle_window=3)


def in_memory(count):
  numbers = np.arange(count)
  images = np.broadcast_to(numbers[:, None, None, None], [count, 2, 2, 3]).astype(np.uint8)
  return arrays.from_mapping({"train_images": images, "train_labels": numbers % 7}, "train")


def in_files(count, folder, per_file=5):
  """Returns a source of TFRecord files whose records are the texts of 0, 1, ..., between two others."""
  pieces = []
  for first in range(0, count, per_file):
    held = list(range(first, min(first + per_file, count)))
    path = str(folder / f"{first}.tfrecord")
    with tf.io.TFRecordWriter(path) as writer:
      for number in ["before", *held, "after"]:
        writer.write(str(number).encode())
    pieces.append(stored.Piece(path, 1, len(held)))

  def decode(record):
    number = tf.strings.to_number(record, tf.int32)
    return tf.cast(tf.fill([2, 2, 3], number), tf.uint8), number % 7

  names = tuple("abcdefg")
  return stored.Stored("files", names, decode, pieces=tuple(pieces))


@pytest.fixture(params=["memory", "files"])
def make(request, tmp_path):
  """A source of the given number of examples; image i is filled with i, its label is i % 7."""
  return in_memory if request.param == "memory" else lambda count: in_files(count, tmp_path)


def show(image, seed):
  return {"image": tf.ensure_shape(image, [2, 2, 3]), "seed": seed}


def train(source, steps, *, process=(0, 1), start_step=0, threads=0, **order):
  order = dataclasses.replace(ORDER, **order)
  batches = pipeline.train_batches(
    source, show, order, start_step=start_step, process=Process(*process), threads=threads
  )
  return list(itertools.islice(batches, steps))


def assert_same(batches, others):
  assert len(batches) == len(others)
  for batch, other in zip(batches, others, strict=True):
    assert batch.keys() == other.keys()
    for key in batch:
      np.testing.assert_array_equal(batch[key], other[key], err_msg=key)


def stack(batches):
  return {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}


def joined(by_host):
  """Returns the global batches of the batches of each host."""
  return [stack(rows) for rows in zip(*by_host, strict=True)]


def part_streams(batches, shards):
  """Returns the examples that each part gave, in order."""
  blocks = np.stack([batch["index"].reshape(shards, -1) for batch in batches], 1)
  return blocks.reshape(shards, -1)


def test_every_part_gives_each_of_its_examples_once_an_epoch(make):
  streams = part_streams(train(make(37), steps=20), shards=4)
  bounds = [37 * part // 4 for part in range(5)]
  for stream, begin, end in zip(streams, bounds, bounds[1:], strict=False):
    epochs = len(stream) // (end - begin)
    assert epochs >= 4
    for epoch in stream[: epochs * (end - begin)].reshape(epochs, -1):
      assert sorted(epoch) == list(range(begin, end))


def test_rows_hold_the_image_and_the_label_of_their_index(make):
  for batch in train(make(37), steps=8):
    np.testing.assert_array_equal(batch["image"], np.broadcast_to(batch["index"][:, None, None, None], [8, 2, 2, 3]))
    np.testing.assert_array_equal(batch["label"], batch["index"] % 7)
    assert {key: batch[key].dtype for key in batch} == {
      "image": np.uint8,
      "seed": np.int32,
      "label": np.int32,
      "index": np.int32,
      "epoch": np.int32,
    }


def test_epochs_parts_and_seeds_have_orders_of_their_own(make):
  knobs = {"shuffle_window": 100}
  streams = part_streams(train(make(80), steps=20, **knobs), shards=4)
  orders = [stream[epoch * 20 :][:20] - 20 * part for part, stream in enumerate(streams) for epoch in (0, 1)]
  orders.append(part_streams(train(make(80), steps=10, seed=6, **knobs), shards=4)[0])
  orders.append(np.arange(20))
  for order, other in itertools.combinations(orders, 2):
    assert np.mean(order == other) < 0.5


def test_a_window_of_records_is_permuted_after_the_files(tmp_path):
  streams = part_streams(train(in_files(80, tmp_path), steps=10, shuffle_window=5), shards=4)
  for part, stream in enumerate(streams):  # windows are as long as files: every file stays together
    files = stream.reshape(4, 5) // 5
    assert np.all(files == files[:, :1])
    assert sorted(files[:, 0]) == list(range(4 * part, 4 * part + 4))
  assert np.any(np.diff(streams.reshape(16, 5)[:, 0] // 5) < 0)
  assert np.any(np.diff(streams.reshape(16, 5), axis=1) < 0)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_batches_do_not_depend_on_the_number_of_hosts(make, count):
  source = make(37)
  alone = train(source, steps=12)
  hosts = [train(source, steps=12, process=(host, count)) for host in range(count)]
  assert all(len(batch["index"]) == 8 // count for host in hosts for batch in host)
  assert_same(joined(hosts), alone)


@pytest.mark.slow
@pytest.mark.parametrize("window", [None, 1, 3, 7, 100])
def test_a_resumed_stream_is_the_uninterrupted_one(tmp_path, window):
  # Parts of 9 and 10 examples, two a step: epochs end inside and between batches. Data in memory has no window.
  source = in_files(37, tmp_path) if window else in_memory(37)
  window = window or ORDER.shuffle_window
  whole = train(source, steps=16, shuffle_window=window)
  for step in (1, 4, 5, 11):
    assert_same(train(source, steps=16 - step, start_step=step, shuffle_window=window), whole[step:])


def test_batches_do_not_depend_on_the_number_of_threads(make):
  source = make(37)
  assert_same(train(source, steps=10, threads=1), train(source, steps=10, threads=7))


def test_a_resumed_stream_skips_whole_files_by_their_counts(tmp_path):
  source = in_files(40, tmp_path, per_file=5)
  knobs = {"shards": 1, "batch_size": 10, "shuffle_window": 5}
  whole = train(source, steps=4, **knobs)
  done = {index // 5 for batch in whole[:2] for index in batch["index"].tolist()}
  assert len(done) == 4
  for number in done:
    pathlib.Path(source.pieces[number].file).write_bytes(b"not to be read")
  assert_same(train(source, steps=2, start_step=2, **knobs), whole[2:])


def test_a_batch_may_be_larger_than_the_data(make):
  streams = part_streams(train(make(5), steps=2, batch_size=24), shards=4)
  assert [sorted(set(stream)) for stream in streams] == [[0], [1], [2], [3, 4]]


def test_seeds_belong_to_the_example_and_the_epoch(make):
  rows = stack(train(make(20), steps=15))  # parts of 5 examples, two a step: six epochs
  seen = {}
  for index, seed in zip(rows["index"].tolist(), rows["seed"].tolist(), strict=True):
    seen.setdefault(index, []).append(tuple(seed))
  assert all(len(seeds) == 6 for seeds in seen.values())
  assert len({seed for seeds in seen.values() for seed in seeds}) == 120
  for index, seeds in seen.items():
    assert seeds == [tuple(pipeline.example_seed(5, epoch, index).numpy()) for epoch in range(6)]
  assert set(map(tuple, train(make(20), steps=1, seed=6)[0]["seed"])).isdisjoint(map(tuple, rows["seed"]))


def test_memory_and_files_give_the_same_seeds_and_the_same_evaluation(tmp_path):
  from_memory, from_files = (
    list(pipeline.evaluation_batches(source, show, batch_size=8)) for source in (in_memory(21), in_files(21, tmp_path))
  )
  assert_same(from_memory, from_files)


@pytest.mark.slow
@pytest.mark.parametrize("hosts", [1, 2, 4])
@pytest.mark.parametrize("count", [1, 3, 16, 37])
def test_an_evaluation_takes_each_example_once_over_all_hosts(make, hosts, count):
  source = make(count)
  by_host = [
    list(pipeline.evaluation_batches(source, show, batch_size=8, process=Process(host, hosts))) for host in range(hosts)
  ]
  assert len({len(batches) for batches in by_host}) == 1
  assert all(len(batch["mask"]) == 8 // hosts for batches in by_host for batch in batches)
  rows = stack([batch for batches in by_host for batch in batches])
  real = rows["mask"] == 1
  np.testing.assert_array_equal(rows["index"][real], np.arange(count))
  np.testing.assert_array_equal(rows["label"][real], np.arange(count) % 7)
  np.testing.assert_array_equal(rows["image"][real][:, 1, 1, 2], np.arange(count))
  assert np.all(rows["mask"][~real] == 0)
  assert np.all(rows["index"][~real] == -1)
  assert np.all(rows["label"][~real] == -1)


def test_a_file_with_fewer_records_than_recorded_stops_the_run(tmp_path):
  source = in_files(20, tmp_path)
  with tf.io.TFRecordWriter(source.pieces[1].file) as writer:
    writer.write(b"before")
    writer.write(b"5")
  with pytest.raises(tf.errors.OpError):
    train(source, steps=3)
  with pytest.raises(tf.errors.OpError):
    list(pipeline.evaluation_batches(source, show, batch_size=8))


@pytest.mark.parametrize(
  ("knobs", "message"),
  [
    ({"batch_size": 9}, "a batch of 9 does not split into 4 data shards; use a multiple"),
    ({"process": (0, 3)}, "4 data shards .* do not split over 3 hosts; use multiples"),
    ({"batch_size": 64, "shards": 64}, "has 37 examples for 64 data shards; use at most 37"),
    ({"seed": -1}, "seed -1 does not fit; use one from 0"),
    ({"shuffle_window": 0}, "a shuffle window of 0 records; use at least 1"),
  ],
)
def test_numbers_that_do_not_fit_are_refused_with_a_remedy(knobs, message):
  with pytest.raises(errors.UserError, match=message):
    train(in_memory(37), steps=1, **knobs)


def test_an_evaluation_batch_splits_over_the_hosts():
  with pytest.raises(errors.UserError, match="batch of 9 does not split over 2 hosts; use a multiple"):
    pipeline.evaluation_batches(in_memory(37), show, batch_size=9, process=Process(0, 2))


@pytest.mark.slow
def test_views_of_real_images_do_not_depend_on_hosts_or_on_a_restart(tfds_dir):
  distortion = Distortion(48)

  @tf.function(autograph=False)  # traced once for all of the pipelines
  def views(content, seed):
    return {
      "views": host_augment.two_views(content, seed, distortion),
      "crops": host_augment.two_crops(content, seed, distortion),
    }

  order = Order(batch_size=8, shards=4, seed=1, shuffle_window=8)

  def batches(source, steps, host=0, count=1, start_step=0):
    rows = pipeline.train_batches(source, views, order, start_step=start_step, process=Process(host, count))
    return list(itertools.islice(rows, steps))

  stored, cached = (
    sources.load("tfds", Request("train[10:60]", name="imagenet2012", data_dir=tfds_dir, cache=cache))
    for cache in (False, True)
  )
  whole = batches(stored, 4)
  assert whole[0]["views"].shape == (8, 2, 48, 48, 3)
  assert_same(joined([batches(stored, 4, host, 2) for host in range(2)]), whole)
  assert_same(batches(cached, 2, start_step=2), batches(cached, 4)[2:])
