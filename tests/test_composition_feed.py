"""Compositions of augmentations in training: on streamed data, and on data that is on the devices."""

import itertools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from simclr_jax import __main__ as command
from simclr_jax import errors
from simclr_jax.data import arrays, composition, device_augment, resident
from simclr_jax.data.distortion import Distortion
from simclr_jax.hardware import cost, sharding
from simclr_jax.jobs import feed

ROOT = pathlib.Path(__file__).parents[1]
SIZE = 16


@pytest.fixture(autouse=True, scope="module")
def compiles_fast():
  """Compiling takes longer than running these tiny programs."""
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)


def images_of(count, size=SIZE):
  return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), np.uint8)


def unit(images):
  return images.astype(np.float64) / 255


def config_of(**overrides):
  known = {"batch_size": 16, "data.image_size": SIZE, "data.shards": 4, "augment.compose": "crop,color"}
  known |= {name.replace("__", "."): value for name, value in overrides.items()}
  return command.load_config(f"{ROOT}/configs/cifar10.py", {name: str(value) for name, value in known.items()})


@pytest.fixture(scope="module")
def split():
  named = {"train_images": images_of(20, 20), "train_labels": np.arange(20) % 3}
  return arrays.from_mapping(named, "train")


def test_a_streamed_pair_is_the_hosts_crop_and_that_crop_changed(split):
  config, mesh = config_of(data__resident="false", augment__compose="rotate"), sharding.data_mesh(jax.devices()[:1])
  images = feed.pairs(config, split, mesh)
  prepare, seen = jax.jit(images.prepare), {}
  for batch in itertools.islice(images.batches(0), 3):
    assert batch["image"].dtype == np.uint8
    views = np.asarray(prepare(batch)["views"])
    np.testing.assert_allclose(views[:, 0], unit(batch["image"]), rtol=0, atol=1e-7)
    seen |= {(int(i), int(e)): v for i, e, v in zip(batch["index"], batch["epoch"], views, strict=True)}
  for (index, epoch), views in seen.items():
    keys = device_augment.example_keys(0, jnp.array([epoch], jnp.int32), jnp.array([index], jnp.int32))
    own = jax.random.fold_in(jax.random.fold_in(keys[0], composition.COMPOSED), 0)
    turn = int(composition.quarter_turns(own[None])[0])
    np.testing.assert_array_equal(views[1], np.rot90(views[0], turn))
  first, second = next((seen[i, 0], seen[i, 1]) for i, epoch in seen if epoch and (i, 0) in seen)
  assert np.abs(first - second).max() > 0.05


@pytest.mark.devices(8)
def test_resident_compositions_are_one_program_that_exchanges_no_images(split):
  mesh, lowered = sharding.data_mesh(), {}
  step = jax.device_put(np.int32(0), sharding.replicated(mesh))
  for compose in ("blur,color", "rotate"):
    images = feed.pairs(config_of(augment__compose=compose, augment__min_area=0.5), split, mesh)
    rows = lambda dataset, step, images=images: images.prepare(images.batch_of(dataset, step))
    lowered[compose] = jax.jit(rows, out_shardings=sharding.batched(mesh)).lower(images.dataset, step)
  texts = [program.as_text() for program in lowered.values()]
  assert texts[0] == texts[1]
  program = lowered["rotate"].compile()
  # What may be exchanged is the two numbers of the operations.
  assert sum(collective.bytes for collective in cost.collectives(program.as_text(), mesh.size)) <= 8

  # The first view is the random crop, not mirrored, and the second one that crop turned.
  batch = jax.device_get(program(images.dataset, step))
  keys = device_augment.example_keys(0, batch["epoch"], batch["index"])
  distortion = Distortion(SIZE, min_area=0.5, flip=False)
  crops = jax.jit(lambda images: device_augment.train_view(images, keys, distortion))(split.images[batch["index"]])
  np.testing.assert_allclose(batch["views"][:, 0], crops, rtol=0, atol=1e-6)
  for first, second in batch["views"]:
    same = [np.array_equal(np.rot90(first, turns), second) for turns in range(4)]
    assert (sum(same), same[0]) == (1, False)


def test_without_compositions_the_dataset_is_what_it_was(split):
  images = feed.pairs(config_of(augment__compose=""), split, sharding.data_mesh())
  assert images.dataset.keys() == resident.on_devices(split, sharding.data_mesh()).keys()


def test_compositions_on_the_host_are_a_user_error(split):
  with pytest.raises(errors.UserError, match=r"config.augment.compose is done on the devices, .*'host'; set it to dev"):
    feed.law_of_pairs(config_of(augment__place="host", data__resident="false"))
