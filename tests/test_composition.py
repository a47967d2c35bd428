"""Compositions of augmentations: each operation against a NumPy twin, each random law, and how both feeds use them."""

import functools
import itertools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from samples import distance_to_uniform

from simclr_jax import __main__ as command
from simclr_jax import cost, errors, sharding
from simclr_jax.data import arrays, composition, device_augment, resident, sources
from simclr_jax.jobs import feed

ROOT = pathlib.Path(__file__).parents[1]
SIZE = 16
COLORS = {"color_strength": 0.5, "brightness": "multiplicative", "color_probability": 0.8, "grayscale_probability": 0.2}


def keys_of(count):
  return device_augment.example_keys(3, jnp.zeros(count, jnp.int32), jnp.arange(count))


def images_of(count, size=SIZE):
  return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), np.uint8)


def unit(images):
  return images.astype(np.float64) / 255


@functools.partial(jax.jit, static_argnames="dtype")
def pairs(crops, keys, operations, dtype="float32"):
  return composition.pairs_of_crops(crops, keys, operations, area=(0.25, 0.5), dtype=jnp.dtype(dtype), **COLORS)


def changed(images, text, **knobs):
  """Returns the second views after the operations that `text` names, and checks that the first are as they came."""
  views = np.asarray(pairs(images, keys_of(len(images)), composition.codes(text), **knobs))
  np.testing.assert_allclose(views[:, 0], unit(images), rtol=0, atol=1e-7)
  assert views.min() >= 0
  assert views.max() <= 1
  return views[:, 1]


# NumPy twins, in float64.


def sobel(images):
  padded = np.pad(images, [(0, 0), (1, 1), (1, 1), (0, 0)], mode="reflect")
  kernel, height, width = np.array([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]]), *images.shape[1:3]
  across, down = np.zeros_like(images), np.zeros_like(images)
  for y, x in np.ndindex(3, 3):
    window = padded[:, y : y + height, x : x + width]
    across += kernel[y, x] * window
    down += kernel[x, y] * window
  return np.clip(np.hypot(across, down) / 4, 0, 1)


def cutout(image, center):
  image, side = image.copy(), len(image) // 2
  top, left = np.asarray(center) - side // 2
  image[max(top, 0) : max(top + side, 0), max(left, 0) : max(left + side, 0)] = 0.5
  return image


def test_sobel_is_that_of_numpy():
  images = images_of(3, 12)
  seen = jax.jit(composition.sobel)(jnp.asarray(unit(images), jnp.float32))
  np.testing.assert_allclose(seen, sobel(unit(images)), rtol=0, atol=1e-6)
  edge = np.zeros((1, 8, 8, 3), np.float32)
  edge[:, :, 4:] = 1
  np.testing.assert_array_equal(composition.sobel(edge)[0, :, :, 0], [[0, 0, 0, 1, 1, 0, 0, 0]] * 8)


@pytest.mark.parametrize("size", [16, 11])
def test_the_square_of_cutout_is_that_of_numpy_also_at_the_borders(size):
  corners = [(y, x) for y in (0, 5, size - 1) for x in (0, 4, size - 1)]
  images = unit(images_of(len(corners), size)).astype(np.float32)
  seen = jax.jit(composition.cutout)(images, np.array(corners, np.int32))
  np.testing.assert_array_equal(seen, [cutout(*pair) for pair in zip(images, corners, strict=True)])


def test_a_rotation_is_that_of_numpy():
  images = images_of(3)
  seen = jax.jit(composition.rotate)(images, np.array([1, 2, 3], np.int32))
  np.testing.assert_array_equal(seen, [np.rot90(image, k + 1) for k, image in enumerate(images)])


def test_noise_is_that_of_numpy():
  images, normal = unit(images_of(3)), np.random.default_rng(1).standard_normal((3, SIZE, SIZE, 3))
  seen = jax.jit(composition.noise)(jnp.asarray(images, jnp.float32), jnp.asarray(normal, jnp.float32))
  np.testing.assert_allclose(seen, np.clip(images + 0.2 * normal, 0, 1), rtol=0, atol=1e-6)


def own_keys(count, position):
  """Returns the keys of the operation at `position`, by the rule that composed views are documented to follow."""
  key = jax.random.key(3, impl="threefry2x32")
  chain = lambda index: functools.reduce(jax.random.fold_in, (0, index, composition.COMPOSED, position), key)
  return jax.vmap(chain)(jnp.arange(count))


def test_each_operation_draws_its_own_numbers_and_does_what_it_is_named_for():
  images, keys = images_of(40), own_keys(40, 0)
  floats = unit(images).astype(np.float32)
  wanted = {
    "cutout": lambda: [cutout(*pair) for pair in zip(floats, np.asarray(composition.centers(keys, SIZE)), strict=True)],
    "sobel": lambda: sobel(unit(images)),
    "rotate": lambda: [np.rot90(*pair) for pair in zip(floats, np.asarray(composition.quarter_turns(keys)), strict=True)],
    "noise": lambda: np.clip(
      unit(images) + 0.2 * jax.vmap(lambda key: jax.random.normal(key, (SIZE, SIZE, 3)))(keys), 0, 1
    ),
    "blur": lambda: np.clip(device_augment.gaussian_blur(floats, composition.sigmas(keys), 3), 0, 1),
    "crop": lambda: np.clip(
      device_augment.crop_and_resize(floats, composition.crop_boxes(keys, SIZE, (0.25, 0.5)), SIZE), 0, 1
    ),
    "color": lambda: device_augment.distorted_pairs(floats[:, None], keys, blur=False, **COLORS)[:, 0],
  }
  assert set(wanted) == set(composition.OPERATIONS)
  for name, twin in wanted.items():
    seen = changed(images, name)
    np.testing.assert_allclose(seen, twin(), rtol=0, atol=3e-6, err_msg=name)
    share = np.mean(np.abs(seen - floats).max((1, 2, 3)) > 1e-3)
    # Always, but for the colours, whose law has coins of its own: 1 - 0.2 * 0.8 of the images.
    assert 0.6 < share < 1 if name == "color" else share == 1, name


def test_operations_follow_each_other_in_the_order_asked_for():
  images = images_of(8)
  turned = np.stack([np.rot90(*p) for p in zip(unit(images), np.asarray(composition.quarter_turns(own_keys(8, 0))))])
  twice = np.stack([np.rot90(*p) for p in zip(turned, np.asarray(composition.quarter_turns(own_keys(8, 1))))])
  np.testing.assert_allclose(changed(images, "rotate,rotate"), twice, rtol=0, atol=1e-6)
  np.testing.assert_allclose(changed(images, "rotate,sobel"), sobel(turned), rtol=0, atol=1e-6)
  cut = [cutout(*p) for p in zip(sobel(turned), np.asarray(composition.centers(own_keys(8, 2), SIZE)), strict=True)]
  np.testing.assert_allclose(changed(images, "rotate, sobel,cutout"), cut, rtol=0, atol=1e-6)
  assert np.abs(changed(images, "sobel,noise") - changed(images, "noise,sobel")).max() > 0.1


def test_what_is_drawn_for_an_example_depends_on_nothing_beside_it():
  images, keys, operations = images_of(8), keys_of(8), composition.codes("crop,color")
  together = pairs(images, keys, operations)
  np.testing.assert_allclose(pairs(images[5:7], keys[5:7], operations), together[5:7], rtol=0, atol=1e-6)


def test_random_numbers_are_uniform():
  keys = own_keys(20000, 1)
  sigmas = np.asarray(composition.sigmas(keys))
  assert distance_to_uniform(sigmas, np.float32(0.1), np.float32(2.0)) < 0.02
  for numbers, values in ((composition.quarter_turns(keys), [1, 2, 3]), (composition.centers(keys, 12), range(12))):
    numbers = np.asarray(numbers).reshape(20000, -1)
    for column in numbers.T:
      seen, counts = np.unique(column, return_counts=True)
      np.testing.assert_array_equal(seen, values)
      assert np.abs(counts / 20000 - 1 / len(counts)).max() < 0.02
  rows, columns = np.asarray(composition.centers(keys, 12)).T
  assert abs(np.corrcoef(rows, columns)[0, 1]) < 0.02
  boxes = np.asarray(composition.crop_boxes(keys[:4000], 64, (0.25, 0.5)))
  areas = boxes[:, 2] * boxes[:, 3] / 64**2
  assert 0.249 < areas.min() < 0.26
  assert 0.49 < areas.max() < 0.51


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_the_type_asked_for_comes_out(dtype):
  with jax.enable_x64(dtype == "float64"):
    views = pairs(images_of(4), keys_of(4), composition.codes("noise,sobel"), dtype=dtype)
    assert views.dtype == jnp.dtype(dtype)


@pytest.mark.parametrize("text", ["crop,colour", "crop,", "crop;color"])
def test_an_unknown_operation_is_a_user_error(text):
  with pytest.raises(errors.UserError, match=r"config.augment.compose is .*no operation .*use one or more of crop, cut"):
    composition.codes(text)


# The feeds.


def config_of(**overrides):
  known = {"batch_size": 16, "data.image_size": SIZE, "data.shards": 4, "augment.compose": "crop,color"}
  known |= {name.replace("__", "."): value for name, value in overrides.items()}
  return command.load_config(f"{ROOT}/configs/cifar10.py", {name: str(value) for name, value in known.items()})


@pytest.fixture(scope="module")
def split():
  named = {"train_images": images_of(20, 20), "train_labels": np.arange(20) % 3}
  return arrays.from_mapping(named, "train")


def views_of(config, split, steps):
  """Returns (example, epoch) -> views, of both feeds."""
  images = feed.pairs(config, split if config.data.resident else sources.in_memory(split), sharding.data_mesh())
  if images.dataset is None:
    batches = itertools.islice(images.batches(0), steps)
  else:
    batches = (jax.jit(images.batch_of)(images.dataset, np.int32(step)) for step in range(steps))
  prepare, seen = jax.jit(images.prepare), {}
  for batch in map(prepare, batches):
    assert batch["views"].shape == (config.batch_size, 2, SIZE, SIZE, 3)
    for index, epoch, views in zip(batch["index"], batch["epoch"], np.asarray(batch["views"]), strict=True):
      seen[int(index), int(epoch)] = views
  return seen


@pytest.mark.parametrize("is_resident", [True, False])
def test_an_example_has_its_views_in_any_batch_resident_or_streamed(split, is_resident):
  small = views_of(config_of(batch_size=8, data__resident=is_resident), split, 4)
  large = views_of(config_of(data__resident=is_resident), split, 2)
  assert small.keys() == large.keys()
  for key, views in small.items():
    np.testing.assert_allclose(views, large[key], rtol=0, atol=1e-6)
    assert np.abs(views[0] - views[1]).max() > 0.05
  first, second = next((small[i, 0], small[i, 1]) for i, epoch in small if epoch and (i, 0) in small)
  assert np.abs(first - second).max() > 0.05


def test_the_first_view_is_the_random_crop_that_is_not_mirrored(split):
  seen = views_of(config_of(augment__compose="rotate", augment__min_area=0.5), split, 1)
  law = {"size": SIZE, "flip": False, "area": (0.5, 1.0)}
  keys = device_augment.example_keys(0, jnp.zeros(20, jnp.int32), jnp.arange(20))
  wanted = np.asarray(device_augment.train_view(split.images, keys, **law))
  turns = np.array([[np.abs(np.rot90(v[0], k) - v[1]).max() < 1e-6 for k in range(4)] for v in seen.values()])
  np.testing.assert_array_equal(turns.sum(1), 1)
  assert not turns[:, 0].any()
  for (index, _), views in seen.items():
    np.testing.assert_allclose(views[0], wanted[index], rtol=0, atol=1e-6)


def test_compositions_are_one_program_where_nothing_of_the_images_moves(split):
  mesh, texts = sharding.data_mesh(), []
  for compose in ("crop", "blur,color"):
    images = feed.pairs(config_of(augment__compose=compose), split, mesh)
    views = lambda dataset, step, images=images: images.prepare(images.batch_of(dataset, step))["views"]
    step = jax.device_put(np.int32(1), sharding.replicated(mesh))
    lowered = jax.jit(views, out_shardings=sharding.batched(mesh)).lower(images.dataset, step)
    texts.append(lowered.as_text())
  assert texts[0] == texts[1]
  assert cost.collectives(lowered.compile().as_text(), mesh.size) == []


def test_without_compositions_the_dataset_is_what_it_was(split):
  images = feed.pairs(config_of(augment__compose=""), split, sharding.data_mesh())
  assert images.dataset.keys() == resident.on_devices(split, sharding.data_mesh()).keys()


def test_compositions_on_the_host_are_a_user_error(split):
  with pytest.raises(errors.UserError, match=r"config.augment.compose is done on the devices, .*'host'; set it to dev"):
    feed.law_of_pairs(config_of(augment__place="host", data__resident="false"))
