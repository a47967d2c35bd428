"""Data on the devices: its order is a function of (seed, step), its evaluation that of the host's pipeline."""

import functools
import io
import itertools
import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import tensorflow as tf
from PIL import Image
from runs import REAL_DATA

from simclr_jax import errors
from simclr_jax.data import arrays, decode, device_augment, host_augment, pipeline, resident, sources
from simclr_jax.data.order import Order, Process
from simclr_jax.data.source import Request
from simclr_jax.hardware import cost, sharding

ROOT = pathlib.Path(__file__).parents[1]


def split_of(count, height=5, width=4):
  """Returns a split of random images; the label of image i is i % 7."""
  images = np.random.default_rng(0).integers(0, 256, (count, height, width, 3), np.uint8)
  return arrays.from_mapping({"train_images": images, "train_labels": np.arange(count) % 7}, "train")


@functools.partial(jax.jit, static_argnames=("examples", "batch_size", "shards"))
def compiled_positions(steps, seed, *, examples, batch_size, shards):
  order = Order(batch_size, shards, seed)
  return jax.vmap(lambda step: resident.positions(step, examples=examples, order=order))(steps)


def positions(steps, *, seed, **sizes):
  """Returns (examples, epochs) of the global batches of many steps, i32[steps, batch_size] each."""
  return [np.asarray(x) for x in compiled_positions(np.asarray(steps, np.int32), seed, **sizes)]


# Parts of unequal size; a batch larger than the data; of several epochs of a part; of one epoch; of one example.
SIZES = [(37, 8, 4), (37, 64, 4), (5, 16, 4), (16, 16, 16), (7, 1, 1)]


@pytest.mark.parametrize(("examples", "batch_size", "shards"), SIZES)
def test_every_part_gives_each_of_its_examples_once_an_epoch(examples, batch_size, shards):
  count, bounds = batch_size // shards, [examples * part // shards for part in range(shards + 1)]
  steps = -(-4 * examples // batch_size) + 3
  index, epoch = positions(np.arange(steps), examples=examples, batch_size=batch_size, shards=shards, seed=3)
  for part, (begin, end) in enumerate(itertools.pairwise(bounds)):
    # Rows of part p are block p of the batch.
    stream, numbers = (x.reshape(steps, shards, count)[:, part].reshape(-1) for x in (index, epoch))
    np.testing.assert_array_equal(numbers, np.arange(steps * count) // (end - begin))
    whole = len(stream) // (end - begin)
    assert whole >= 3
    for passed in stream[: whole * (end - begin)].reshape(whole, -1):
      np.testing.assert_array_equal(np.sort(passed), np.arange(begin, end))
    assert len(np.unique(stream[whole * (end - begin) :])) == len(stream) % (end - begin)


def test_another_seed_epoch_or_part_gives_another_order():
  one = {"examples": 120, "batch_size": 120, "shards": 4}
  first = positions([0, 1], seed=0, **one)[0]
  other = positions([0, 1], seed=1, **one)[0]
  lines = np.concatenate([first, other]).reshape(-1, 30) % 30  # Each part, epoch and seed: a permutation of 30.
  assert len(np.unique(lines, axis=0)) == 16
  np.testing.assert_array_equal(first, positions([0, 1], seed=0, **one)[0])


def test_the_order_of_a_step_does_not_depend_on_the_steps_before_it():
  index, epoch = positions(np.arange(22), examples=37, batch_size=8, shards=4, seed=9)
  alone = jax.jit(lambda: resident.positions(jnp.int32(17), examples=37, order=Order(8, 4, 9)))()
  np.testing.assert_array_equal(alone[0], index[17])
  np.testing.assert_array_equal(alone[1], epoch[17])


def test_places_are_uniform_and_independent_across_epochs_and_parts():
  epochs, size = 4000, 6
  index, _ = positions(np.arange(epochs), examples=2 * size, batch_size=2 * size, shards=2, seed=0)
  index = index.reshape(epochs, 2, size) % size
  places = np.argsort(index, axis=2)  # [epoch, part, example]
  likely = lambda kinds, count: scipy.stats.chisquare(np.bincount(kinds.reshape(-1), minlength=count)).pvalue > 1e-3
  for part, example in np.ndindex(2, size):
    column = places[:, part, example]
    assert likely(column, size)
    assert likely(column[:-1] * size + column[1:], size**2)
    assert likely(column * size + places[:, 1 - part, example], size**2)
  # 717 of the 720 permutations are expected in 4000 draws.
  assert all(len(np.unique(index[:, part], axis=0)) > 700 for part in range(2))


@pytest.mark.slow
@pytest.mark.devices(8)
@pytest.mark.optimized
@pytest.mark.parametrize(("batch_size", "shards"), [(16, 4), (48, 16)])
def test_a_batch_needs_no_exchange_and_is_the_same_on_one_device(batch_size, shards):
  split, mesh = split_of(37), sharding.data_mesh()
  dataset = resident.on_devices(split, mesh)
  assert dataset["image"].dtype == jnp.uint8
  assert all(leaf.sharding.is_fully_replicated for leaf in dataset.values())
  batch = jax.jit(functools.partial(resident.batch, order=Order(batch_size, shards, seed=4), mesh=mesh))
  step = jax.device_put(np.int32(11), sharding.replicated(mesh))
  program = batch.lower(dataset, step).compile()
  assert cost.collectives(program.as_text(), mesh.size) == []
  rows = program(dataset, step)
  assert all(leaf.sharding.is_equivalent_to(sharding.batched(mesh), leaf.ndim) for leaf in rows.values())
  (index,), (epoch,) = positions([11], examples=37, batch_size=batch_size, shards=shards, seed=4)  # On one device.
  wanted = {"image": split.images[index], "label": np.int32(index % 7), "index": index, "epoch": epoch}
  assert rows.keys() == wanted.keys()
  for name, value in wanted.items():
    assert rows[name].dtype == value.dtype
    np.testing.assert_array_equal(rows[name], value)


# (side of the images, of the network, largest difference): images that are taken as they are, and the crop.
@pytest.mark.parametrize(
  ("height", "width", "size", "tolerance"), [(32, 32, 32, 0), (40, 48, 32, 1e-5), (40, 48, 36, 1e-5)]
)
def test_evaluation_rows_are_those_of_the_host(height, width, size, tolerance):
  split = split_of(11, height, width)
  view = lambda content, seed: {"image": host_augment.eval_view(content, size=size)}
  passed = []
  for process in range(2):
    host = {"batch_size": 8, "process": Process(process, 2)}
    ours = list(resident.evaluation_batches(split, image_size=size, **host))
    theirs = list(pipeline.evaluation_batches(split, view, **host))
    assert len(ours) == len(theirs) == 2
    for a, b in zip(ours, theirs, strict=True):
      b.pop("epoch")
      assert {name: (x.dtype, x.shape) for name, x in a.items()} == {name: (x.dtype, x.shape) for name, x in b.items()}
      for name in ("label", "index", "mask"):
        np.testing.assert_array_equal(a[name], b[name])
      np.testing.assert_allclose(a["image"], b["image"], rtol=0, atol=tolerance)
      assert not np.any(a["image"][a["mask"] == 0])
      passed += a["index"][a["mask"] == 1].tolist()
  assert passed == list(range(11))


def test_augmented_rows_differ_by_epoch_and_hold_each_example_once():
  split = split_of(11)
  drawn = jax.vmap(lambda key: jax.random.uniform(key, (1, 1, 1)))
  view = lambda images, keys: images / 255.0 * drawn(keys)

  def images(number, batch_size):
    batches = list(resident.augmented_batches(split, view, seed=2, epoch=number, batch_size=batch_size))
    rows = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    real = rows["mask"] == 1
    np.testing.assert_array_equal(rows["index"][real], np.arange(11))
    np.testing.assert_array_equal(rows["label"][real], split.labels())
    np.testing.assert_array_equal(rows["index"][~real], -1)
    return rows["image"][real]

  first = images(1, 4)
  np.testing.assert_array_equal(first, images(1, 11))
  assert np.abs(first - images(2, 4)).max(axis=(1, 2, 3)).min() > 1e-3
  keys = lambda index: device_augment.example_keys(2, np.ones(11, np.int32), index)
  alone = jax.jit(lambda images, index: view(images, keys(index)))(split.images, np.arange(11, dtype=np.int32))
  np.testing.assert_allclose(first, alone, rtol=1e-6)


# Decoded images.


def encoded(images, kind="png"):
  """Returns a split of encoded images."""
  held = []
  for image in images:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, kind)
    held.append(stream.getvalue())
  offsets = np.cumsum([0, *map(len, held)])
  return {"train_bytes": np.frombuffer(b"".join(held), np.uint8), "train_offsets": offsets}


@pytest.fixture
def cifar_jpeg():
  """An .npz file of CIFAR-10 as JPEGs beside the project; the test is skipped where it is absent."""
  path = REAL_DATA / "cifar10_jpeg.npz"
  if not path.is_file():
    pytest.skip("real data (../shared/data/cifar10_jpeg.npz) is not beside the project")
  return str(path)


def test_jpegs_are_decoded_to_the_pixels_of_tensorflows_accurate_mode(cifar_jpeg):
  with np.load(cifar_jpeg) as file:
    cut = file["test_offsets"][:501]
    held = arrays.from_mapping({"test_bytes": file["test_bytes"][: cut[-1]], "test_offsets": cut}, "test")
  ours = held.decoded()
  assert ours.images.shape == (500, 32, 32, 3)
  accurate = functools.partial(tf.io.decode_jpeg, channels=3, dct_method="INTEGER_ACCURATE")
  accurate = np.stack([accurate(image) for image in held.images])
  np.testing.assert_array_equal(ours.images, accurate)
  # The pipeline uses TensorFlow's default mode, an approximation: differences of about one level, at most a few.
  fast = np.stack([decode.decode_image(tf.constant(image)) for image in held.images])
  off = np.abs(ours.images.astype(int) - fast)
  assert off.max() <= 6
  assert off.mean() < 1.1


@pytest.mark.parametrize("kind", ["png", "bmp", "gif", "webp"])
def test_other_image_formats_are_decoded_as_in_the_pipeline(kind):
  smooth = np.kron(np.random.default_rng(0).integers(0, 256, (5, 3, 4, 3), np.uint8), np.ones((1, 7, 5, 1), np.uint8))
  held = arrays.from_mapping(encoded(smooth, kind), "train")
  ours = held.decoded()
  assert ours.images.shape == smooth.shape
  np.testing.assert_array_equal(ours.images, held.stored().decoded().images)
  if kind in ("png", "bmp"):
    np.testing.assert_array_equal(ours.images, smooth)
  assert ours.decoded() is ours


def test_images_of_two_sizes_are_a_user_error():
  images = [np.zeros((4, 6, 3), np.uint8)] * 3 + [np.zeros((6, 4, 3), np.uint8)]
  held = arrays.from_mapping(encoded(images), "train", name="mine")
  message = r"image 3 of mine \(train\) is 6 x 4 pixels and the first one is 4 x 6; .*data.resident=false"
  with pytest.raises(errors.UserError, match=message):
    held.decoded()
  with pytest.raises(errors.UserError, match=message):
    held.stored().decoded()


@pytest.mark.parametrize("number", [0, 2])
@pytest.mark.parametrize("broken", [b"no image", "cut", "huge"], ids=str)
def test_an_image_that_cannot_be_decoded_is_named(number, broken):
  held = arrays.from_mapping(encoded(split_of(4, 20, 20).images, "bmp"), "train", name="mine")
  good = held.images[number]
  # A BMP file says its width in bytes 18 to 21.
  made = {"cut": good[:300], "huge": good[:18] + (10**8).to_bytes(4, "little") + good[22:]}
  held.images[number] = made.get(broken, broken)
  with pytest.raises(errors.UserError, match=rf"image {number} of mine \(train\) cannot be decoded \(.*\); replace it"):
    held.decoded()


def test_a_split_without_images_is_a_user_error():
  with pytest.raises(errors.UserError, match=r"mine \(train\) has no images"):
    arrays.from_mapping(encoded([]), "train", name="mine").decoded()


def assert_shown(source, name):
  """Checks that a decoded source holds what its evaluation rows show."""
  held = source.decoded()
  assert (held.name, held.class_names, held.num_examples) == (source.name, source.class_names, source.num_examples)
  view = lambda content, seed: {"image": tf.ensure_shape(decode.decode_image(content), held.images.shape[1:])}
  (rows,) = pipeline.evaluation_batches(source, view, batch_size=source.num_examples)
  np.testing.assert_array_equal(held.images, rows["image"], err_msg=name)
  np.testing.assert_array_equal(held.labels(), rows["label"], err_msg=name)
  assert held.images.dtype == np.uint8
  assert held.labels().dtype == np.int32


@pytest.mark.parametrize("cache", [False, True])
def test_a_folder_in_memory_holds_what_its_evaluation_rows_show(tmp_path, cache):
  for number, image in enumerate(split_of(6).images):
    folder = tmp_path / "train" / "ab"[number % 2]
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(folder / f"{number}.png")
  assert_shown(sources.load("folder", Request("train", data_dir=str(tmp_path), cache=cache)), "folder")


def test_a_tfds_split_in_memory_holds_what_its_evaluation_rows_show(tfds_dir):
  source = sources.load("tfds", Request("train[100:400]", name="cifar10", data_dir=tfds_dir))
  assert_shown(source, "tfds")


# Without TensorFlow.

WITHOUT_TENSORFLOW = """
import sys
for package in ("tensorflow", "tensorflow_datasets", "clu"):
  sys.modules[package] = None  # To import it is an ImportError, and importlib finds no such package.
from simclr_jax import __main__
for command in sys.argv[1].split("\\n"):
  print("exit code", __main__.main(command.split()))
"""


@pytest.mark.slow
def test_without_tensorflow_arrays_must_be_resident(tmp_path):
  images = np.random.default_rng(0).integers(0, 256, (20, 16, 16, 3), np.uint8)
  np.savez(tmp_path / "data.npz", **encoded(images))
  knobs = {
    "data.source": "arrays",
    "data.dir": tmp_path / "data.npz",
    "data.eval_split": "",
    "data.image_size": 16,
    "model.depth": 10,
    "model.width": 0.0625,
    "model.small_images": False,
    "head.layers": 1,
    "head.out_dim": 8,
    "head.online": False,
    "batch_size": 16,
    "eval_batch_size": 16,
    "total_steps": 2,
    "log_every_steps": 1,
  }
  tiny = [f"--config={ROOT}/configs/cifar10.py", *(f"--config.{key}={value}" for key, value in knobs.items())]
  commands = [
    " ".join(["pretrain", *tiny, f"--config.data.resident={resident}", f"--workdir={tmp_path}/{resident}"])
    for resident in ("false", "true")
  ]
  devices = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
  done = subprocess.run(
    [sys.executable, "-c", WITHOUT_TENSORFLOW, "\n".join(commands)],
    cwd=ROOT,
    env={**os.environ, **devices},
    capture_output=True,
    text=True,
    timeout=600,
  )
  assert re.findall("exit code (.*)", done.stdout) == ["2", "0"], done.stderr
  line = r"simclr_jax: config.data.source arrays is read by TensorFlow, which is not installed; .*data.resident=true"
  assert len(re.findall(line, done.stderr)) == 1
  assert "Traceback" not in done.stderr
  rows = [json.loads(line) for line in (tmp_path / "true" / "metrics.jsonl").read_text().splitlines()]
  assert [row["step"] for row in rows if "train/loss" in row] == [1, 2]
