"""The device's augmentation: the reference's numbers, the host's distributions, no exchange between devices."""

import dataclasses
import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow as tf
from samples import distance, distance_to_uniform

from simclr_jax.data import device_augment, host_augment
from simclr_jax.data.distortion import Distortion
from simclr_jax.hardware import cost, sharding

SIZE = 24
# The blur's probability decides what is compiled, so that most tests take this one.
DEFAULT = Distortion(SIZE, blur_probability=0.8)


@functools.partial(jax.jit, static_argnames=("blur_probability", "dtype"))
def compiled_pairs(views, keys, blur_probability, dtype, parameters):
  distortion = dataclasses.replace(DEFAULT, blur_probability=blur_probability, **parameters)
  return device_augment.distorted_pairs(views, keys, distortion, dtype=dtype)


def distort(views, keys, blur_probability=DEFAULT.blur_probability, dtype=jnp.float32, **parameters):
  """Returns `distorted_pairs`; three of the parameters are traced, so that one program serves all their values."""
  traced = ("color_probability", "grayscale_probability", "blur_sigma")
  parameters = {name: getattr(DEFAULT, name) for name in traced} | parameters
  return compiled_pairs(views, keys, blur_probability, dtype, parameters)


def unit(image, dtype=np.float32):
  return (image.astype(np.float32) / 255 if image.dtype == np.uint8 else image).astype(dtype)


def noise(*shape):
  return np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)


compiled_keys = jax.jit(device_augment.example_keys)


def example_keys(count):
  return compiled_keys(7, np.zeros(count, np.int32), np.arange(count, dtype=np.int32))


OPERATIONS = {
  "brightness_v1": jax.jit(functools.partial(device_augment.brightness, additive=True)),
  "brightness_v2": jax.jit(device_augment.brightness),
  "contrast": jax.jit(device_augment.contrast),
  "saturation": jax.jit(device_augment.saturation),
  "hue": jax.jit(device_augment.hue),
  "grayscale": jax.jit(lambda image, _: device_augment.to_grayscale(image)),
  "chain": jax.jit(device_augment.color_jitter, static_argnames="additive"),
}


@pytest.mark.parametrize(("dtype", "single", "chain"), [(np.float32, 1e-6, 2e-6), (np.float64, 5e-7, None)])
def test_color_operations_give_the_numbers_of_the_reference(reference, dtype, single, chain):
  fixture = reference("color_ops")
  keys = [key.split("__") for key in fixture["keys"].tolist() if chain or "chain" not in key]
  assert len(keys) > 20
  # In float64 what is left is the rounding of the reference itself.
  with jax.enable_x64(dtype == np.float64):
    for name, operation in keys:
      key, image = f"{name}__{operation}", unit(fixture[name], dtype)
      if operation.startswith("chain"):
        additive = bool(fixture[f"{key}__impl"] == "simclrv1")
        result = OPERATIONS["chain"](image, fixture[f"{key}__factors"], fixture[f"{key}__order"], additive=additive)
      else:
        result = OPERATIONS[operation.rsplit("_", 1)[0]](image, fixture.get(f"{key}__factor"))
      assert result.dtype == dtype
      atol = chain if operation.startswith("chain") else single
      np.testing.assert_allclose(result, fixture[key], rtol=0, atol=atol, err_msg=key)


def test_blur_gives_the_numbers_of_the_reference(reference):
  fixture = reference("blur")
  blur = jax.jit(device_augment.gaussian_blur, static_argnames="size")
  for size in fixture["sizes"].tolist():
    image = np.broadcast_to(unit(fixture[f"image_{size}"]), (len(fixture["sigmas"]), size, size, 3))
    for taps in {size // 10, 2 * int(fixture[f"radius_{size}"]) + 1}:
      blurred = blur(image, fixture["sigmas"], size=taps)
      np.testing.assert_allclose(blurred, fixture[f"blurred_{size}"] / 65535, rtol=0, atol=1e-5)


def test_the_evaluation_crop_gives_the_numbers_of_the_reference(reference):
  fixture = reference("eval_preprocess")
  names = [name for name in fixture if name.removeprefix("image").isdigit()]
  assert names
  crop = jax.jit(device_augment.center_crop, static_argnums=1)
  for name in names:
    for size in fixture["targets"].tolist():
      seen = crop(jnp.asarray(fixture[name]), size)
      np.testing.assert_allclose(seen, fixture[f"{name}_to_{size}"] / 65535, rtol=0, atol=1e-5)
  small = device_augment.center_crop(jnp.asarray(fixture["image_32"]), 32)
  np.testing.assert_allclose(small, fixture["image_32_to_32"], rtol=0, atol=1e-7)


@pytest.mark.parametrize(("shape", "size"), [((75, 100), 40), ((64, 48), 32)])
def test_the_evaluation_crop_is_that_of_the_host(shape, size):
  image = noise(*shape)
  seen = jax.jit(device_augment.center_crop, static_argnums=1)(image, size)
  np.testing.assert_allclose(seen, host_augment.center_crop(image, size), rtol=0, atol=2e-6)


BOXES = np.array([[0, 0, 40, 50], [3, 7, 20, 31], [39, 49, 1, 1], [10, 0, 30, 2], [5, 9, 24, 24]], np.int32)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_a_crop_is_resized_as_on_the_host(dtype):
  images = noise(len(BOXES), 40, 50)
  images = images if dtype == np.uint8 else unit(images)
  seen = jax.jit(device_augment.crop_and_resize, static_argnames="size")(images, BOXES, size=24)
  wanted = [host_augment.crop_and_resize(image, box, 24) for image, box in zip(images, BOXES, strict=True)]
  np.testing.assert_allclose(seen, wanted, rtol=0, atol=2e-6)


def test_a_crop_of_the_size_asked_for_is_copied():
  image = unit(noise(40, 50))
  seen = jax.jit(device_augment.crop_and_resize, static_argnames="size")(image, BOXES[4], size=24)
  np.testing.assert_allclose(seen, image[5:29, 9:33], rtol=0, atol=1e-6)


def test_nothing_outside_a_crop_has_influence():
  images = unit(noise(len(BOXES), 40, 50))
  others = np.full_like(images, 1e6)
  for image, other, (y, x, height, width) in zip(images, others, BOXES, strict=True):
    other[y : y + height, x : x + width] = image[y : y + height, x : x + width]
  resize = jax.jit(device_augment.crop_and_resize, static_argnames="size")
  np.testing.assert_array_equal(resize(images, BOXES, size=24), resize(others, BOXES, size=24))


def test_every_image_may_have_its_own_numbers():
  images = unit(noise(2, 3, 24, 24))
  rng = np.random.default_rng(1)
  factor, sigma = rng.uniform(0.5, 1.5, (2, 2, 3)).astype(np.float32)
  factors = rng.uniform(0.1, 1.5, (2, 3, 4)).astype(np.float32)
  order = rng.permuted(np.tile(np.arange(4), (2, 3, 1)), axis=-1)
  box = np.concatenate([rng.integers(0, 8, (2, 3, 2)), rng.integers(8, 16, (2, 3, 2))], -1)
  for operation, numbers in (
    (device_augment.contrast, (factor,)),
    (device_augment.hue, (factor,)),
    (device_augment.color_jitter, (factors, order)),
    (lambda x, s: device_augment.gaussian_blur(x, s, 5), (sigma,)),
    (lambda x, b: device_augment.crop_and_resize(x, b, 16), (box,)),
  ):
    operation = jax.jit(operation)
    together = operation(images, *numbers)
    for at in ((0, 1), (1, 2)):
      of_all = operation(images, *(n[at] for n in numbers))
      np.testing.assert_allclose(of_all[at], together[at], rtol=0, atol=2e-6)
      assert np.abs(of_all - together).max() > 0.01


@jax.jit
def boxes(height, width, area=(0.08, 1.0), aspect=(3 / 4, 4 / 3)):
  draw = lambda key: device_augment.crop_box(key, height, width, area=area, aspect=aspect)
  return jax.vmap(draw)(jax.random.split(jax.random.key(3), 20000))


@pytest.mark.slow
def test_crops_have_the_distribution_of_the_reference(reference):
  fixture = reference("crop_law")
  for height, width in fixture["sizes"].tolist():
    wanted = fixture[f"{height}x{width}__boxes"].astype(np.float64)
    wanted = wanted[:, [fixture["columns"].tolist().index(name) for name in ("y0", "x0", "height", "width")]]
    seen = np.asarray(boxes(height, width), np.float64)
    seen, wanted = (np.c_[b, b[:, 2] * b[:, 3] / (height * width), b[:, 3] / b[:, 2]] for b in (seen, wanted))
    for column in range(6):
      assert distance(seen[:, column], wanted[:, column]) < 0.02, (height, width, column)
    assert seen[:, 4].min() >= 0.1
    # The ends of the ranges, which no distance sees: the last position is never drawn.
    assert np.all((seen[:, :2] + seen[:, 2:4] < [height, width]) | (seen[:, 2:4] == [height, width]))
    np.testing.assert_allclose([seen.min(0), seen.max(0)], [wanted.min(0), wanted.max(0)], rtol=0.02, atol=3)


@pytest.mark.slow
def test_crops_have_the_distribution_of_the_host_in_other_ranges():
  for (height, width), ranges in {
    (40, 70): {"area": (0.5, 0.6), "aspect": (1.9, 2.1)},  # the width limits the height
    (9, 11): {"area": (0.3, 0.4)},  # one pixel more or less repairs the area
    (100, 100): {"area": (0.08, 0.105)},  # most attempts end below the floor of 0.1
  }.items():
    seeds = tf.range(4000, dtype=tf.int32)
    box = lambda i, h=height, w=width, ranges=ranges: host_augment.crop_box(tf.stack([i, 7]), h, w, **ranges)
    wanted = tf.function(lambda box=box, seeds=seeds: tf.map_fn(box, seeds), autograph=False)().numpy()
    seen = np.asarray(boxes(height, width, **ranges))
    for column in range(4):
      assert distance(seen[:, column], wanted[:, column]) < 0.04, (height, width, column)


def test_a_crop_that_no_attempt_finds_is_the_whole_image():
  np.testing.assert_array_equal(boxes(1, 500)[:20], [[0, 0, 1, 500]] * 20)


def test_color_factors_and_the_sigma_are_uniform(monkeypatch):
  drawn = {}

  def show(name, numbers, image):
    drawn[name] = numbers
    return image

  monkeypatch.setattr(device_augment, "color_jitter", lambda image, f, o, *_: show("factors", (f, o), image))
  monkeypatch.setattr(device_augment, "gaussian_blur", lambda image, sigma, _: show("sigma", sigma, image))
  count, strength = 9600, 0.5
  views = jnp.zeros([count // 2, 2, 2, 2, 3])
  blurred = Distortion(2, color_probability=0.0, grayscale_probability=0.0, blur_probability=1.0)

  def draw(**color):
    """Returns what one call draws: factors f32[count, 4], order i32[count, 4], sigma f32[count]."""

    def numbers(views, keys):
      device_augment.distorted_pairs(views, keys, dataclasses.replace(blurred, **color))
      return *drawn["factors"], drawn["sigma"]

    factors, order, sigma = map(np.asarray, jax.jit(numbers)(views, example_keys(count // 2)))
    return factors.reshape(count, 4), order.reshape(count, 4), sigma.reshape(count)

  factors, order, sigma = draw(color_strength=strength)
  for column, (low, high) in enumerate([(0.6, 1.4)] * 3 + [(-0.1, 0.1)]):
    assert distance_to_uniform(factors[:, column], np.float32(low), np.float32(high)) < 0.02
  assert distance_to_uniform(sigma, np.float32(0.1), np.float32(2.0)) < 0.02
  orders, counts = np.unique(order @ [1000, 100, 10, 1], return_counts=True)
  assert len(orders) == 24
  assert all(sorted(f"{code:04d}") == list("0123") for code in orders)
  assert np.abs(counts - 400).max() < 80
  of_views = np.c_[factors, sigma, order[:, 0]].reshape(-1, 12)  # the two views are independent
  assert np.abs(np.corrcoef(of_views.T) - np.eye(12)).max() < 0.06

  added = draw(brightness="additive")[0][:, 0]
  assert distance_to_uniform(added, np.float32(-0.8), np.float32(0.8)) < 0.02
  assert draw(color_strength=1.25)[0][:, 0].min() >= 0.0


@pytest.mark.slow
def test_each_change_is_as_frequent_as_asked():
  image = noise(SIZE, SIZE)
  views, keys = np.broadcast_to(image, (1000, 2, *image.shape)), example_keys(1000)
  nothing = {"color_probability": 0.0, "grayscale_probability": 0.0, "blur_probability": 0.0}

  def share(**parameters):
    seen = np.asarray(distort(views, keys, blur_sigma=(1.0, 2.0), **{**nothing, **parameters}))
    return np.mean(np.abs(seen - unit(image)).max((2, 3, 4)) > 1e-4)

  assert share() == 0.0
  assert share(color_probability=0.8) == pytest.approx(0.8, abs=0.042)
  assert share(grayscale_probability=0.2) == pytest.approx(0.2, abs=0.042)
  assert share(blur_probability=0.8) == pytest.approx(0.8, abs=0.042)


def test_a_training_view_is_cropped_and_flipped_and_nothing_else():
  images = np.broadcast_to(noise(16, 16), (600, 16, 16, 3))
  image, distortion = unit(images[0]), Distortion(16, min_area=1.0, aspect=(1.0, 1.0))
  seen = np.asarray(jax.jit(lambda x, k: device_augment.train_view(x, k, distortion))(images, example_keys(600)))
  same, mirrored = (np.abs(seen - wanted).max((1, 2, 3)) < 1e-6 for wanted in (image, image[:, ::-1]))
  assert np.all(same ^ mirrored)
  assert mirrored.mean() == pytest.approx(0.5, abs=0.07)


@functools.cache
def pairs_of(devices):
  """Returns the compiled views of 16 images on so many devices, a function of (images, seed, epoch, index)."""
  place = sharding.batched(sharding.data_mesh(jax.devices()[:devices]))

  def views(images, seed, epoch, index):
    return device_augment.two_views(images, device_augment.example_keys(seed, epoch, index), Distortion(SIZE))

  index = jax.ShapeDtypeStruct((16,), np.int32)
  function = jax.jit(views, in_shardings=(place, None, place, place), out_shardings=place)
  compiled = function.lower(jax.ShapeDtypeStruct((16, 30, 40, 3), np.uint8), 0, index, index).compile()

  def run(*arguments):
    placed = [jax.device_put(a, s) for a, s in zip(arguments, compiled.input_shardings[0], strict=True)]
    return np.asarray(compiled(*placed))

  return compiled, run


INDEX = np.arange(16, dtype=np.int32)


def statistics(views):
  """Returns statistics of each view [N, H, W, 3], whose distributions are compared."""
  pixels = views[:, [0, SIZE // 2, SIZE - 1], [SIZE // 3, SIZE // 2, 0]].reshape(len(views), -1)
  slopes = np.abs(np.diff(views, axis=2)).mean((1, 2))
  return np.c_[views.mean((1, 2)), views.std((1, 2)), views.min((1, 2, 3)), views.max((1, 2, 3)), slopes, pixels]


@pytest.mark.slow
@pytest.mark.parametrize("case", ["same crop", "same crop, blurred", "all of it"])
def test_views_have_the_distributions_of_the_host(case):
  shape = (30, 40) if case == "all of it" else (SIZE, SIZE)
  smooth = tf.image.resize(noise(6, 6), shape, "bicubic")  # as photographs: neighbours resemble each other
  image = np.clip(0.8 * smooth + 0.2 * noise(*shape), 0, 255).astype(np.uint8)
  if case == "all of it":
    images, distortion = np.broadcast_to(image, (16, *image.shape)), Distortion(SIZE)
    seen = np.concatenate([pairs_of(1)[1](images, 7, INDEX * 0, INDEX + 16 * i) for i in range(64)])
  else:
    probability = 0.8 if "blurred" in case else 0.0
    distortion = Distortion(SIZE, min_area=1.0, aspect=(1.0, 1.0), flip=False, blur_probability=probability)
    seen = distort(np.broadcast_to(image, (1000, 2, *image.shape)), example_keys(1000), probability)
  seen = np.asarray(seen).reshape(-1, SIZE, SIZE, 3)
  assert seen.min() >= 0.0
  assert seen.max() <= 1.0
  view = lambda i: host_augment.pretrain_view(image, tf.stack([i, 5]), distortion)
  seeds = tf.range(len(seen), dtype=tf.int32)
  wanted = tf.function(lambda: tf.map_fn(view, seeds, tf.float32), autograph=False)().numpy()
  # Rounded, because the last bit matters to a distance between distributions that have steps (0, 1, unchanged).
  distances = [distance(a, b) for a, b in zip(*(np.round(statistics(x), 4).T for x in (seen, wanted)), strict=True)]
  assert max(distances) < 0.06, distances


@pytest.mark.slow
@pytest.mark.devices(8)
@pytest.mark.optimized
def test_views_are_the_same_on_eight_devices_without_any_exchange():
  (_, on_one), (eight, on_eight) = pairs_of(1), pairs_of(8)
  assert cost.collectives(eight.as_text(), 8) == []
  arguments = noise(16, 30, 40), 3, INDEX // 4, INDEX
  # The compiler orders the sums of 2 images otherwise than those of 16.
  np.testing.assert_allclose(on_eight(*arguments), on_one(*arguments), rtol=0, atol=2e-6)


def test_views_are_a_function_of_seed_epoch_and_example():
  _, views = pairs_of(1)
  images = np.broadcast_to(noise(30, 40), (16, 30, 40, 3))
  zero = np.zeros(16, np.int32)
  first = views(images, 3, zero, INDEX)
  np.testing.assert_array_equal(views(images, 3, zero, INDEX), first)
  # Example 3 at another place, among others.
  moved = views(images, 3, np.array([1] * 9 + [0] * 7, np.int32), np.r_[INDEX[:9], 3, INDEX[10:] * 7])
  np.testing.assert_array_equal(moved[9], first[3])
  of_3 = [first[3], first[4], views(images, 3, zero + 1, INDEX)[3], views(images, 4, zero, INDEX)[3]]
  different = np.concatenate([*of_3, views(images, 3, INDEX, zero)[3]])  # (epoch, index) is not (index, epoch)
  for i, one in enumerate(different):
    for other in different[:i]:
      assert np.abs(one - other).mean() > 0.01


def test_bfloat16_is_within_a_few_levels_of_float32():
  views, keys = noise(1000, 2, SIZE, SIZE), example_keys(1000)
  exact, half = distort(views, keys), distort(views, keys, dtype=jnp.bfloat16)
  assert (exact.dtype, half.dtype) == (jnp.float32, jnp.bfloat16)
  assert half.min() >= 0.0
  assert half.max() <= 1.0
  levels = 255 * np.abs(np.asarray(half, np.float32) - exact)
  assert levels.mean() < 0.5
  assert np.quantile(levels, 0.99) < 2.0
  assert levels.max() < 6.0


@pytest.mark.slow
def test_float64_changes_nothing_but_the_rounding():
  views, keys, small = noise(1000, 2, SIZE, SIZE), example_keys(1000), Distortion(16)
  wanted = np.asarray(distort(views, keys))
  with jax.enable_x64(True):
    seen = distort(views, keys, dtype=jnp.float64)
    assert seen.dtype == jnp.float64
    np.testing.assert_allclose(seen, wanted, rtol=0, atol=5e-6)
    for dtype in (jnp.float32, jnp.float64, jnp.bfloat16):
      pairs = jax.eval_shape(lambda k, d=dtype: device_augment.two_views(views[:, 0], k, small, dtype=d), keys)
      assert (pairs.shape, pairs.dtype) == ((1000, 2, 16, 16, 3), dtype)
    assert jax.eval_shape(lambda k: device_augment.train_view(views[:, 0], k, small), keys).dtype == jnp.float32
    assert jax.eval_shape(lambda k: device_augment.crop_box(k[0], 40, 50), keys).dtype == jnp.int32


def test_the_device_side_needs_no_tensorflow():
  modules = ("device_augment", "composition", "resident", "arrays", "shapes", "sources", "subset", "prefetch")
  code = f"from simclr_jax.data import {', '.join(modules)}; import sys; assert 'tensorflow' not in sys.modules"
  subprocess.run([sys.executable, "-c", code], check=True)
