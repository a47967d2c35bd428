"""Compositions of augmentations: each operation against NumPy, its random numbers, and both inputs of the step."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from samples import distance_to_uniform

from simclr_jax import errors, randomness
from simclr_jax.data import arrays, composition, device_augment, inputs, resident
from simclr_jax.data.distortion import Distortion
from simclr_jax.data.order import Order
from simclr_jax.hardware import cost, sharding

SIZE = 16
DISTORTION = Distortion(SIZE, min_area=0.25, max_area=0.5, color_strength=0.5)
ORDER = Order(batch_size=16, shards=4, seed=0)
RESIDENT = inputs.Plan(ORDER, resident=True)

# Compiled whole: done eagerly, each of their many small operations is compiled by itself.
centers = jax.jit(composition.centers, static_argnums=1)
crop_boxes = jax.jit(composition.crop_boxes, static_argnums=1)
gaussian_blur = jax.jit(device_augment.gaussian_blur, static_argnums=2)
quarter_turns = jax.jit(composition.quarter_turns)
sigmas = jax.jit(composition.sigmas)


def keys_of(count):
  return device_augment.example_keys(3, jnp.zeros(count, jnp.int32), jnp.arange(count))


def images_of(count, size=SIZE):
  return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), np.uint8)


def unit(images):
  return images.astype(np.float64) / 255


def each(function, images, numbers):
  """Returns `function` of each image and its number."""
  return np.stack([function(*pair) for pair in zip(images, np.asarray(numbers), strict=True)])


def pairs(crops, keys, operations, dtype=jnp.float32):
  return composition.pairs_of_crops(crops, keys, operations, DISTORTION, dtype=dtype)


jitted = jax.jit(pairs)
COUNT, MOST = 40, 3  # numbers of images and of operations, always the same, so that it is compiled once


def changed(text):
  """Returns the second views of `images_of(COUNT)`, and checks that the first are as they came."""
  operations = composition.codes(text)
  operations = np.append(operations, [composition.NOTHING] * (MOST - len(operations))).astype(np.int32)
  views = np.asarray(jitted(images_of(COUNT), keys_of(COUNT), operations))
  np.testing.assert_allclose(views[:, 0], unit(images_of(COUNT)), rtol=0, atol=1e-7)
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
  np.testing.assert_array_equal(seen, each(cutout, images, corners))


def test_a_rotation_is_that_of_numpy():
  images = images_of(3)
  seen = jax.jit(composition.rotate)(images, np.array([1, 2, 3], np.int32))
  np.testing.assert_array_equal(seen, [np.rot90(image, k + 1) for k, image in enumerate(images)])


def test_noise_is_that_of_numpy():
  images, normal = unit(images_of(3)), np.random.default_rng(1).standard_normal((3, SIZE, SIZE, 3))
  seen = jax.jit(composition.noise)(jnp.asarray(images, jnp.float32), jnp.asarray(normal, jnp.float32))
  np.testing.assert_allclose(seen, np.clip(images + 0.2 * normal, 0, 1), rtol=0, atol=1e-6)


@jax.jit
def own_keys(seed, epoch, index, position):
  """Returns the keys of the operation at `position` for examples, derived independently of the code under test."""
  key = jax.random.key(seed, impl="threefry2x32")
  chain = lambda *example: functools.reduce(jax.random.fold_in, (*example, randomness.COMPOSED, position), key)
  return jax.vmap(chain)(epoch, index)


def first_keys(count, position):
  """Returns the keys of the operation at `position` for `images_of(count)` with `keys_of(count)`."""
  return own_keys(3, np.zeros(count, np.int32), np.arange(count, dtype=np.int32), position)


@pytest.mark.slow
def test_each_operation_is_that_of_numpy_with_random_numbers_of_its_own():
  images, keys = images_of(COUNT), first_keys(COUNT, 0)
  floats = unit(images).astype(np.float32)
  crop = jax.jit(lambda boxes: device_augment.crop_and_resize(floats, boxes, SIZE))
  colors = dataclasses.replace(DISTORTION, blur_probability=0.0)
  normal = jax.jit(jax.vmap(lambda key: jax.random.normal(key, (SIZE, SIZE, 3))))
  distort = jax.jit(lambda: device_augment.distorted_pairs(floats[:, None], keys, colors)[:, 0])
  wanted = {
    "cutout": lambda: each(cutout, floats, centers(keys, SIZE)),
    "sobel": lambda: sobel(unit(images)),
    "rotate": lambda: each(np.rot90, floats, quarter_turns(keys)),
    "noise": lambda: np.clip(unit(images) + 0.2 * normal(keys), 0, 1),
    "blur": lambda: np.clip(gaussian_blur(floats, sigmas(keys), 3), 0, 1),
    "crop": lambda: np.clip(crop(crop_boxes(keys, DISTORTION)), 0, 1),
    "color": distort,
  }
  assert set(wanted) == set(composition.OPERATIONS)
  for name, twin in wanted.items():
    seen = changed(name)
    np.testing.assert_allclose(seen, twin(), rtol=0, atol=3e-6, err_msg=name)
    share = np.mean(np.abs(seen - floats).max((1, 2, 3)) > 1e-3)
    # All images change but for colours, which have probabilities of their own, and blurs of a fraction of a pixel.
    assert 0.6 < share < 1 if name == "color" else share > 0.8 if name == "blur" else share == 1, name


def test_operations_follow_each_other_in_the_order_asked_for():
  turned = each(np.rot90, unit(images_of(COUNT)), quarter_turns(first_keys(COUNT, 0)))
  twice = each(np.rot90, turned, quarter_turns(first_keys(COUNT, 1)))
  cut = each(cutout, sobel(turned), centers(first_keys(COUNT, 2), SIZE))
  np.testing.assert_allclose(changed("rotate,rotate"), twice, rtol=0, atol=1e-6)
  np.testing.assert_allclose(changed("rotate,sobel"), sobel(turned), rtol=0, atol=1e-6)
  np.testing.assert_allclose(changed("rotate, sobel,cutout"), cut, rtol=0, atol=1e-6)
  assert np.abs(changed("sobel,noise") - changed("noise,sobel")).max() > 0.1


def test_random_numbers_of_an_example_depend_on_no_other_example():
  order, images, keys = np.random.default_rng(2).permutation(COUNT), images_of(COUNT), keys_of(COUNT)
  for text in ("crop,color,noise", "cutout,blur,rotate"):
    operations = composition.codes(text)
    together = np.asarray(jitted(images, keys, operations))
    other = jitted(images[order], keys[order], operations)
    np.testing.assert_allclose(other, together[order], rtol=0, atol=1e-6)


def test_random_numbers_are_uniform():
  keys = first_keys(20000, 1)
  assert distance_to_uniform(np.asarray(sigmas(keys)), np.float32(0.1), np.float32(2.0)) < 0.02
  for numbers, values in ((quarter_turns(keys), [1, 2, 3]), (centers(keys, 12), range(12))):
    numbers = np.asarray(numbers).reshape(20000, -1)
    for column in numbers.T:
      seen, counts = np.unique(column, return_counts=True)
      np.testing.assert_array_equal(seen, values)
      assert np.abs(counts / 20000 - 1 / len(counts)).max() < 0.02
  rows, columns = np.asarray(centers(keys, 12)).T
  assert abs(np.corrcoef(rows, columns)[0, 1]) < 0.02
  boxes = np.asarray(crop_boxes(keys[:4000], dataclasses.replace(DISTORTION, size=64)))
  areas = boxes[:, 2] * boxes[:, 3] / 64**2
  assert 0.249 < areas.min() < 0.26
  assert 0.49 < areas.max() < 0.51


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float64])
def test_the_type_asked_for_comes_out(dtype):
  with jax.enable_x64(dtype == jnp.float64):
    views = jax.eval_shape(lambda: pairs(images_of(4), keys_of(4), composition.codes("noise"), dtype=dtype))
  assert (views.dtype, views.shape) == (dtype, (4, 2, SIZE, SIZE, 3))


@pytest.mark.parametrize("text", ["crop,colour", "crop,", "crop;color"])
def test_an_unknown_operation_is_a_user_error(text):
  with pytest.raises(errors.UserError, match=r"config.augment.compose is .*no operation .*use one or more of"):
    composition.codes(text)


# The inputs of the step.


@pytest.fixture(scope="module")
def split():
  named = {"train_images": images_of(20, 20), "train_labels": np.arange(20) % 3}
  return arrays.from_mapping(named, "train")


@pytest.mark.slow
def test_a_streamed_pair_is_the_hosts_crop_and_that_crop_changed(split):
  images = inputs.pairs(split, DISTORTION, inputs.Plan(ORDER), sharding.data_mesh(), compose="rotate")
  prepare, seen = jax.jit(images.prepare), {}
  for batch in itertools.islice(images.batches(0), 3):
    assert batch["image"].dtype == np.uint8
    views = np.asarray(prepare(batch)["views"])
    np.testing.assert_allclose(views[:, 0], unit(batch["image"]), rtol=0, atol=1e-7)
    turns = quarter_turns(own_keys(0, batch["epoch"], batch["index"], 0))
    np.testing.assert_array_equal(views[:, 1], each(np.rot90, views[:, 0], turns))
    seen |= {(int(i), int(e)): v for i, e, v in zip(batch["index"], batch["epoch"], views, strict=True)}
  first, second = next((seen[i, 0], seen[i, 1]) for i, epoch in seen if epoch and (i, 0) in seen)
  assert np.abs(first - second).max() > 0.05


@pytest.mark.slow
@pytest.mark.devices(8)
def test_resident_compositions_are_one_program_that_exchanges_no_images(split):
  mesh, lowered, distortion = sharding.data_mesh(), {}, Distortion(SIZE, min_area=0.5, flip=False)
  step = jax.device_put(np.int32(0), sharding.replicated(mesh))
  for compose in ("blur,color", "rotate"):
    images = inputs.pairs(split, distortion, RESIDENT, mesh, compose=compose)
    rows = lambda dataset, step, images=images: images.prepare(images.batch_of(dataset, step))
    lowered[compose] = jax.jit(rows, out_shardings=sharding.batched(mesh)).lower(images.dataset, step)
  texts = [program.as_text() for program in lowered.values()]
  assert texts[0] == texts[1]
  program = lowered["rotate"].compile()
  # The devices may exchange the codes of the two operations, nothing else.
  assert sum(collective.bytes for collective in cost.collectives(program.as_text(), mesh.size)) <= 8

  # The first view is the random crop, not mirrored, and the second one that crop turned.
  batch = jax.device_get(program(images.dataset, step))
  keys = device_augment.example_keys(0, batch["epoch"], batch["index"])
  crops = jax.jit(lambda images: device_augment.train_view(images, keys, distortion))(split.images[batch["index"]])
  np.testing.assert_allclose(batch["views"][:, 0], crops, rtol=0, atol=1e-6)
  for first, second in batch["views"]:
    same = [np.array_equal(np.rot90(first, turns), second) for turns in range(4)]
    assert (sum(same), same[0]) == (1, False)


def test_without_compositions_the_dataset_holds_no_operations(split):
  images = inputs.pairs(split, DISTORTION, RESIDENT, sharding.data_mesh())
  assert images.dataset.keys() == resident.on_devices(split, sharding.data_mesh()).keys()


def test_compositions_on_the_host_are_a_user_error():
  with pytest.raises(errors.UserError, match=r"config.augment.compose is done on the devices, .*'host'; set it to dev"):
    inputs.pair_augmentation(DISTORTION, inputs.Plan(ORDER, place="host"), "crop,color")
