"""The host's augmentation: its operations give the reference's numbers, its views the distributions."""

import colorsys
import dataclasses

import numpy as np
import pytest
import tensorflow as tf
from samples import distance, distance_to_uniform

from simclr_jax import errors
from simclr_jax.data import distortion as distortion_lib
from simclr_jax.data import host_augment
from simclr_jax.data.distortion import Distortion

# Without any effect: each test switches on what it looks at.
NOTHING = Distortion(
  size=16,
  min_area=1.0,
  aspect=(1.0, 1.0),
  flip=False,
  color_probability=0.0,
  grayscale_probability=0.0,
  blur_probability=0.0,
)
PIXELS = np.array([[[0.2, 0.5, 0.9], [0.7, 0.1, 0.3]], [[0.0, 1.0, 0.4], [0.6, 0.6, 0.6]]], np.float32)


def unit(image):
  return image.astype(np.float32) / 255 if image.dtype == np.uint8 else image


def draws(function, count):
  """Returns `function` of `count` seeds, stacked."""
  seeds = tf.range(count, dtype=tf.int32)
  mapped = tf.function(lambda: tf.map_fn(lambda i: function(tf.stack([i, 7])), seeds, tf.float32), autograph=False)
  return mapped().numpy()


def views(image, count, **parameters):
  distortion = dataclasses.replace(NOTHING, size=len(image), **parameters)
  return draws(lambda seed: host_augment.pretrain_view(image, seed, distortion), count)


def test_color_operations_give_the_numbers_of_the_reference(reference):
  fixture = reference("color_ops")
  operations = {
    "brightness_v1": lambda image, factor: host_augment.brightness(image, factor, additive=True),
    "brightness_v2": host_augment.brightness,
    "contrast": host_augment.contrast,
    "saturation": host_augment.saturation,
    "hue": host_augment.hue,
    "grayscale": lambda image, _: host_augment.to_grayscale(image),
  }
  single = [str(key) for key in fixture["keys"] if "chain" not in str(key)]
  assert single
  for key in single:
    name, operation = key.split("__")
    result = operations[operation.rsplit("_", 1)[0]](unit(fixture[name]), fixture.get(f"{key}__factor"))
    np.testing.assert_allclose(result, fixture[key], rtol=0, atol=4e-7, err_msg=key)


def test_color_jitter_gives_the_chains_of_the_reference(reference):
  fixture = reference("color_ops")
  chains = [str(key) for key in fixture["keys"] if "chain" in str(key)]
  assert chains
  for key in chains:
    additive = fixture[f"{key}__impl"] == "simclrv1"
    image, factors, order = (
      unit(fixture[key.split("__")[0]]),
      fixture[f"{key}__factors"],
      fixture[f"{key}__order"],
    )
    result = host_augment.color_jitter(image, factors, order, additive=additive)
    np.testing.assert_allclose(result, fixture[key], rtol=0, atol=8e-7, err_msg=key)


def test_color_operations_give_the_golden_pixels():
  close = lambda result, wanted: np.testing.assert_allclose(result, np.array(wanted), rtol=0, atol=1e-6)
  close(
    host_augment.contrast(PIXELS, 0.5),
    [[[0.2875, 0.525, 0.725], [0.5375, 0.325, 0.425]], [[0.1875, 0.775, 0.475], [0.4875, 0.575, 0.575]]],
  )
  close(
    host_augment.saturation(PIXELS, 1.6),
    [[[0, 0.3857143, 0.9], [0.7, 0, 0.2333333]], [[0, 1, 0.4], [0.6, 0.6, 0.6]]],
  )
  close(host_augment.hue(PIXELS, 0.1), [[[0.32, 0.2, 0.9], [0.7, 0.26, 0.1]], [[0, 1, 1], [0.6, 0.6, 0.6]]])
  gray = np.array([[0.45588, 0.30213], [0.6326, 0.59994]])
  close(host_augment.to_grayscale(PIXELS), np.repeat(gray[..., None], 3, -1))


def test_blur_gives_the_numbers_of_the_reference(reference):
  fixture = reference("blur")
  for size in fixture["sizes"].tolist():
    assert 2 * (size // 10 // 2) + 1 == 2 * fixture[f"radius_{size}"] + 1
    for sigma, wanted in zip(fixture["sigmas"], fixture[f"blurred_{size}"], strict=True):
      image = unit(fixture[f"image_{size}"])
      for taps in (size // 10, 2 * fixture[f"radius_{size}"] + 1):
        blurred = host_augment.gaussian_blur(image, sigma, int(taps))
        np.testing.assert_allclose(blurred, wanted / 65535, rtol=0, atol=1e-5)


def test_blur_has_the_golden_taps_and_darkens_the_border():
  point = np.zeros([1, 9, 3], np.float32)
  point[0, 4] = 1 / 0.451863  # the middle tap of the vertical pass, on an image of one row
  blurred = host_augment.gaussian_blur(point, 1.0, 3)[0, 3:6, 0]
  np.testing.assert_allclose(blurred, [0.274069, 0.451863, 0.274069], rtol=0, atol=1e-6)
  ones = host_augment.gaussian_blur(np.ones([32, 32, 3], np.float32), 2.0, 3).numpy()
  np.testing.assert_allclose([ones[0, 0, 0], ones[0, 9, 1], ones[9, 9, 2]], [0.463533, 0.680832, 1], atol=1e-6)


def test_the_evaluation_crop_gives_the_numbers_of_the_reference(reference):
  fixture = reference("eval_preprocess")
  names = [name for name in fixture if name.removeprefix("image").isdigit()]
  assert names
  for name in names:
    for size in fixture["targets"].tolist():
      wanted = fixture[f"{name}_to_{size}"] / 65535
      for image in (fixture[name], unit(fixture[name])):
        np.testing.assert_allclose(host_augment.center_crop(image, size), wanted, rtol=0, atol=1e-5)
  small = host_augment.center_crop(fixture["image_32"], 32)
  np.testing.assert_allclose(small, fixture["image_32_to_32"], rtol=0, atol=1e-7)


@pytest.mark.parametrize(
  ("shape", "size", "box"),
  [((375, 500), 224, (24, 86, 328)), ((500, 375), 224, (86, 24, 328)), ((224, 224), 224, (14, 14, 196))],
)
def test_the_evaluation_crop_lies_where_the_reference_puts_it(shape, size, box):
  image = np.random.default_rng(0).random((*shape, 3), np.float32)
  y, x, side = box
  wanted = np.clip(host_augment.crop_and_resize(image, [y, x, side, side], size), 0, 1)
  np.testing.assert_array_equal(host_augment.center_crop(image, size), wanted)


def test_a_small_image_of_another_size_is_cropped_and_resized():
  image = np.random.default_rng(0).random((48, 64, 3), np.float32)
  wanted = np.clip(host_augment.crop_and_resize(image, [3, 11, 42, 42], 32), 0, 1)
  np.testing.assert_array_equal(host_augment.center_crop(image, 32), wanted)


@pytest.mark.parametrize(
  ("size", "wanted"),
  [
    (3, [0.172212, 4.0, 14.243602]),
    (8, [-0.07196, 0.24375, 1.12891, 2.84766, 5.34766, 8.62891, 13.48818, 16.50369]),
  ],
)
def test_the_resize_is_bicubic_with_half_pixel_centers(size, wanted):
  line = np.array([0, 1, 4, 9, 16], np.float32)
  image = np.tile(line[None, :, None], [5, 1, 3])
  resized = host_augment.crop_and_resize(image, [0, 0, 5, 5], size)
  np.testing.assert_allclose(resized[size // 2, :, 1], wanted, rtol=0, atol=2e-5)


def test_operations_take_leading_axes():
  images = np.random.default_rng(0).random((2, 3, 40, 50, 3), np.float32)
  for operation in (
    lambda x: host_augment.brightness(x, 1.2),
    lambda x: host_augment.contrast(x, 1.2),
    lambda x: host_augment.saturation(x, 1.2),
    lambda x: host_augment.hue(x, 0.1),
    host_augment.to_grayscale,
    lambda x: host_augment.color_jitter(x, [1.1, 0.8, 1.2, 0.1], [2, 0, 3, 1]),
    lambda x: host_augment.gaussian_blur(x, 1.1, 9),
    lambda x: host_augment.crop_and_resize(x, [4, 5, 20, 30], 24),
    lambda x: host_augment.center_crop(x, 64),
  ):
    together = operation(images)
    one_by_one = np.stack([[operation(image) for image in row] for row in images])
    np.testing.assert_allclose(together, one_by_one, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_crops_have_the_distribution_of_the_reference(reference):
  fixture = reference("crop_law")
  columns = {"y0": 0, "x0": 1, "height": 2, "width": 3}
  for height, width in fixture["sizes"].tolist():
    wanted = fixture[f"{height}x{width}__boxes"].astype(np.float64)
    wanted = wanted[:, [list(fixture["columns"]).index(name) for name in columns]]
    box = lambda seed, h=height, w=width: tf.cast(host_augment.crop_box(seed, h, w), tf.float32)
    boxes = draws(box, len(wanted)).astype(np.float64)
    numbers = {name: lambda x, column=column: x[:, column] for name, column in columns.items()}
    numbers |= {"area": lambda x: x[:, 2] * x[:, 3] / (height * width), "aspect": lambda x: x[:, 3] / x[:, 2]}  # noqa: B023
    for name, value in numbers.items():
      assert distance(value(boxes), value(wanted)) < 0.02, (height, width, name)
    assert numbers["area"](boxes).min() >= 0.1


def test_a_crop_that_no_attempt_finds_is_the_whole_image():
  # A strip 1 pixel high holds no crop of at least 0.08 of it with these sides.
  np.testing.assert_array_equal(host_augment.crop_box([1, 2], 1, 500), [0, 0, 1, 500])


def test_a_crop_is_sought_many_times_before_the_whole_image_is_taken():
  # Most attempts in this range are below the smallest share, 0.1.
  boxes = draws(lambda seed: tf.cast(host_augment.crop_box(seed, 100, 100, area=(0.08, 0.105)), tf.float32), 300)
  assert boxes[:, 2].max() < 50


def test_the_ranges_of_the_crop_can_be_set():
  box = lambda seed: host_augment.crop_box(seed, 300, 600, area=(0.5, 0.6), aspect=(1.9, 2.1))
  boxes = draws(lambda seed: tf.cast(box(seed), tf.float32), 300)
  area, aspect = boxes[:, 2] * boxes[:, 3] / 180000, boxes[:, 3] / boxes[:, 2]
  assert 0.49 < area.min() < 0.52 < 0.58 < area.max() < 0.61
  assert 1.88 < aspect.min() < 1.92 < 2.08 < aspect.max() < 2.12


def test_a_view_without_distortion_is_the_image():
  image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
  np.testing.assert_allclose(views(image, 3), np.stack([unit(image)] * 3), rtol=0, atol=1e-7)


@pytest.mark.slow
def test_each_change_is_as_frequent_as_asked():
  image = np.random.default_rng(0).random((16, 16, 3), np.float32)
  count = 2000

  def share(**parameters):
    return np.mean(np.abs(views(image, count, **parameters) - image).max((1, 2, 3)) > 1e-4)

  assert share(flip=True) == pytest.approx(0.5, abs=0.045)
  for probability in (0.8, 0.3):
    assert share(color_probability=probability) == pytest.approx(probability, abs=0.042)
  for probability in (0.2, 0.6):
    assert share(grayscale_probability=probability) == pytest.approx(probability, abs=0.045)
  large = np.random.default_rng(0).random((24, 24, 3), np.float32)  # below 20 pixels one tap is left
  blurred = views(large, count, blur_probability=0.5, blur_sigma=(1.0, 2.0))
  assert np.mean(np.abs(blurred - large).max((1, 2, 3)) > 1e-4) == pytest.approx(0.5, abs=0.045)
  assert share(blur_probability=0.0) == 0.0


def test_a_flip_mirrors_left_and_right():
  image = np.random.default_rng(0).random((16, 16, 3), np.float32)
  for view in views(image, 20, flip=True):
    assert np.array_equal(view, image) or np.array_equal(view, image[:, ::-1])


@pytest.mark.slow
def test_color_factors_are_uniform_in_the_ranges_of_the_reference():
  strength, count = 0.5, 4000
  color = {"color_probability": 1.0, "color_strength": strength}
  gray = np.full([4, 4, 3], 0.25, np.float32)  # only brightness changes it
  factor = views(gray, count, **color)[:, 0, 0, 0] / 0.25
  assert distance_to_uniform(np.round(factor, 6), 0.6, 1.4) < 0.03
  added = views(gray * 2, count, brightness="additive", **color)[:, 0, 0, 0] - 0.5
  assert distance_to_uniform(np.round(added, 6), -0.4, 0.4) < 0.03

  red = np.broadcast_to(np.array([0.5, 0.25, 0.25], np.float32), [4, 4, 3])  # of hue 0; no clipping at this strength
  seen = np.array([colorsys.rgb_to_hsv(*pixel) for pixel in views(red, count, **color)[:, 0, 0].astype(np.float64)])
  turn = (seen[:, 0] + 0.5) % 1 - 0.5
  assert distance_to_uniform(np.round(turn, 5), -0.1, 0.1) < 0.03
  assert distance_to_uniform(np.round(seen[:, 1] / 0.5, 5), 0.6, 1.4) < 0.03

  step = np.full([4, 4, 3], 0.4, np.float32)
  step[2:] = 0.6  # the ratio of the difference to the sum shows the contrast, whatever the brightness
  seen = views(step, count, **color)[:, ::2, 0, 0]
  contrast = (seen[:, 1] - seen[:, 0]) / seen.sum(1) / 0.2
  assert distance_to_uniform(np.round(contrast, 5), 0.6, 1.4) < 0.03
  factors = np.stack([factor, turn, contrast])
  assert np.abs(np.corrcoef(factors) - np.eye(3)).max() < 0.06


def test_brightness_never_turns_negative():
  gray = np.full([4, 4, 3], 0.25, np.float32)
  factor = views(gray, 2000, color_probability=1.0, color_strength=1.25)[:, 0, 0, 0] / 0.25
  assert distance_to_uniform(np.round(factor, 6), 0.0, 2.0) < 0.04


def test_the_four_operations_come_in_every_order_equally_often(monkeypatch):
  code = tf.constant([1.0, 10.0, 100.0, 1000.0])
  show = lambda image, factors, order, additive: tf.fill(
    tf.shape(image), tf.reduce_sum(tf.cast(order, tf.float32) * code) / 4000
  )
  monkeypatch.setattr(host_augment, "color_jitter", show)
  seen = np.round(views(np.zeros([4, 4, 3], np.float32), 4800, color_probability=1.0)[:, 0, 0, 0] * 4000)
  orders, counts = np.unique(seen, return_counts=True)
  assert len(orders) == 24
  assert all(sorted(f"{int(order):04d}") == list("0123") for order in orders)
  assert np.abs(counts - 200).max() < 60


def test_the_sigma_of_the_blur_is_uniform(monkeypatch):
  monkeypatch.setattr(host_augment, "gaussian_blur", lambda image, sigma, size: tf.fill(tf.shape(image), sigma / 4))
  sigma = views(np.zeros([4, 4, 3], np.float32), 4000, blur_probability=1.0)[:, 0, 0, 0] * 4
  assert distance_to_uniform(sigma, 0.1, 2.0) < 0.03


@pytest.mark.slow
def test_the_blur_of_a_view_has_a_tenth_of_its_size(reference):
  fixture = reference("blur")
  size = int(fixture["sizes"][1])
  image = fixture[f"image_{size}"]
  for number, sigma in enumerate(fixture["sigmas"].tolist()):
    view = views(image, 1, blur_probability=1.0, blur_sigma=(sigma, sigma))[0]
    wanted = fixture[f"blurred_{size}"][number] / 65535
    np.testing.assert_allclose(view, np.clip(wanted, 0, 1), rtol=0, atol=1e-5)


def test_a_view_is_a_function_of_its_seed():
  image = np.random.default_rng(0).integers(0, 256, (50, 60, 3), np.uint8)
  again = [host_augment.two_views(image, seed, Distortion(32)).numpy() for seed in ([1, 2], [1, 2], [2, 2], [1, 3])]
  np.testing.assert_array_equal(again[0], again[1])
  pairs = [again[0][0], again[0][1], again[2][0], again[3][0]]
  for i, one in enumerate(pairs):
    for other in pairs[:i]:
      assert np.abs(one - other).mean() > 0.01


def test_views_have_their_size_and_lie_between_0_and_1():
  image = np.random.default_rng(0).integers(0, 2, (50, 60, 3), np.uint8) * 255
  for seed in range(20):
    both = host_augment.two_views(image, [seed, 0], Distortion(40)).numpy()
    one = host_augment.train_view(image, [seed, 0], Distortion(40)).numpy()
    assert both.shape == (2, 40, 40, 3)
    assert one.shape == (40, 40, 3)
    for view in (both, one):
      assert view.min() >= 0.0
      assert view.max() <= 1.0
  assert host_augment.eval_view(image, size=40).shape == (40, 40, 3)


def test_a_training_view_is_cropped_and_flipped_and_nothing_else():
  image = np.random.default_rng(0).random((16, 16, 3), np.float32)
  distortion = Distortion(16, min_area=1.0, aspect=(1.0, 1.0))
  seen = draws(lambda seed: host_augment.train_view(image, seed, distortion), 400)
  mirrored = np.array([np.array_equal(view, image[:, ::-1]) for view in seen])
  same = np.array([np.array_equal(view, image) for view in seen])
  assert np.all(mirrored | same)
  assert mirrored.mean() == pytest.approx(0.5, abs=0.1)


def test_impossible_parameters_are_refused():
  with pytest.raises(errors.UserError, match=r"color_strength 1\.3 is outside 0 to 1\.25.*use at most 1\.25"):
    Distortion(8, color_strength=1.3)
  with pytest.raises(errors.UserError, match='unknown brightness "aditive".*did you mean "additive"'):
    Distortion(8, brightness="aditive")
  with pytest.raises(errors.UserError, match='unknown resize "bicubc".*did you mean "bicubic"'):
    Distortion(8, resize="bicubc")


def photo(seed, height=75, width=100):
  """Returns u8[height, width, 3] with the smoothness of a photograph, so that JPEG keeps it."""
  rng = np.random.default_rng(seed)
  coarse = rng.random((9, 9, 3), np.float32)
  smooth = np.asarray(host_augment.crop_and_resize(coarse, [0, 0, 9, 9], max(height, width)))
  return np.clip(255 * smooth[:height, :width], 0, 255).astype(np.uint8)


@pytest.mark.parametrize("kind", ["image", "jpeg", "png"])
def test_crops_are_the_views_before_their_colors_change(kind):
  distortion = Distortion(32, color_probability=0.0, grayscale_probability=0.0, blur_probability=0.0)
  for number in range(8):
    image = photo(number)
    encode = {"image": lambda x: x, "jpeg": tf.io.encode_jpeg, "png": tf.io.encode_png}[kind]
    content, seed = encode(image), [number, 5]
    crops = host_augment.two_crops(content, seed, distortion)
    assert crops.dtype == tf.uint8
    views = host_augment.two_views(content, seed, distortion)
    np.testing.assert_allclose(crops / 255, views, rtol=0, atol=0.5 / 255 + 1e-5)
    single = host_augment.train_crop(content, seed, distortion)
    view = host_augment.train_view(content, seed, distortion)
    np.testing.assert_allclose(single / 255, view, rtol=0, atol=0.5 / 255 + 1e-5)


def test_a_jpeg_is_decoded_only_where_crops_are_with_the_same_pixels(monkeypatch):
  decoded = []

  def watched(content, window, **options):
    decoded.append(np.array(window))
    return original(content, window, **options)

  original, distortion = tf.image.decode_and_crop_jpeg, Distortion(40, min_area=0.1, max_area=0.3)
  monkeypatch.setattr(tf.image, "decode_and_crop_jpeg", watched)
  for number in range(40):
    content = tf.io.encode_jpeg(photo(number, 150, 200), quality=90)
    # Many random places and sizes, because the colours of a JPEG are stored for blocks of pixels.
    parts = host_augment.two_crops(content, [number, 1], distortion)
    whole = host_augment.two_crops(tf.io.decode_jpeg(content, channels=3), [number, 1], distortion)
    np.testing.assert_array_equal(parts, whole)
  areas = np.array([window[2] * window[3] for window in decoded])
  assert areas.mean() < 0.7 * 150 * 200


def test_the_faster_resize_is_close_to_the_references():
  image = photo(3)
  distortions = [Distortion(32, resize=name) for name in distortion_lib.RESIZES]
  crops = [host_augment.two_crops(image, [1, 2], distortion).numpy().astype(int) for distortion in distortions]
  assert 0 < np.abs(crops[0] - crops[1]).mean() < 1.0  # of 255
