"""The reference's augmentation in TensorFlow: exact operations, and seeded random views for tf.data."""

import itertools

import numpy as np
import tensorflow as tf

from simclr_jax import errors

tf.config.set_visible_devices([], "GPU")  # the accelerators belong to JAX

LUMA = (0.2989, 0.5870, 0.1140)
ORDERS = np.array(list(itertools.permutations(range(4))), np.int32)  # of the four colour operations
BRIGHTNESS = ("multiplicative", "additive")  # SimCLR v2 and v1
LARGEST_STRENGTH = 1.25  # above it 1 - 0.8 strength, the smallest contrast factor, is negative
SMALL_IMAGE = 32  # up to this size the evaluation neither crops nor resizes
EVALUATION_SHARE = 0.875  # of the shorter side


def brightness(image, factor, additive=False):
  """Returns `image` times `factor` (SimCLR v2), or plus `factor` (v1); f32[..., H, W, 3], not clipped."""
  image = tf.convert_to_tensor(image)
  return image + factor if additive else image * factor


def contrast(image, factor):
  """Returns f32[..., H, W, 3] with each channel's distance from its mean scaled; not clipped."""
  return tf.image.adjust_contrast(image, factor)


def saturation(image, factor):
  """Returns f32[..., H, W, 3] with the HSV saturation scaled by `factor` and clipped to [0, 1]."""
  return tf.image.adjust_saturation(image, factor)


def hue(image, factor):
  """Returns f32[..., H, W, 3] with the HSV hue turned by `factor` of a full turn."""
  return tf.image.adjust_hue(image, factor)


def to_grayscale(image):
  """Returns f32[..., H, W, 3], three times the luma of `image`."""
  image = tf.convert_to_tensor(image)
  luma = tf.tensordot(image, tf.constant(LUMA, image.dtype), 1)
  return tf.stack([luma] * 3, axis=-1)


def color_jitter(image, factors, order, additive=False):
  """Returns `image` after the four colour operations, clipped to [0, 1] after each.

  Args:
    image: f32[..., H, W, 3].
    factors: f32[4], of brightness, contrast, saturation and hue, in this order.
    order: i32[4], the numbers of the operations as they follow each other.
    additive: whether the brightness factor is added.
  """
  operations = [lambda x, f: brightness(x, f, additive), contrast, saturation, hue]
  order = tf.convert_to_tensor(order, tf.int32)
  for position in range(4):
    branches = [lambda x=image, o=o, f=factors[i]: o(x, f) for i, o in enumerate(operations)]
    image = tf.clip_by_value(tf.switch_case(order[position], branches), 0.0, 1.0)
  return image


def gaussian_blur(image, sigma, size):
  """Returns f32[..., H, W, 3] blurred by a Gaussian of 2 * (size // 2) + 1 taps, with zeros around the image.

  The reference's `size` is a tenth of the image, which makes 23, 9, 7 and 3
  taps for 224, 96, 64 and 32 pixels.
  """
  radius = size // 2
  x = tf.range(-radius, radius + 1, dtype=tf.float32)
  taps = tf.exp(-tf.square(x) / (2.0 * tf.square(tf.cast(sigma, tf.float32))))
  blurred, shape = _as_batch(image)
  taps = tf.cast(taps / tf.reduce_sum(taps), blurred.dtype)
  taps = tf.tile(taps[:, None, None], [1, 3, 1])  # [tap, channel, 1]
  for kernel in (taps[None], taps[:, None]):
    blurred = tf.nn.depthwise_conv2d(blurred, kernel, strides=[1, 1, 1, 1], padding="SAME")
  return tf.reshape(blurred, shape)


def crop_box(seed, height, width, *, area=(0.08, 1.0), aspect=(3 / 4, 4 / 3)):
  """Returns a random crop i32[4] (y, x, height, width), a function of `seed`, by the reference's law.

  Args:
    seed: int[2].
    height, width: of the image.
    area: range of the crop's share of the image; the law's own floor is 0.1.
    aspect: range of width / height.
  """
  begin, extent, _ = tf.image.stateless_sample_distorted_bounding_box(
    tf.stack([height, width, 3]),
    tf.constant([[[0.0, 0.0, 1.0, 1.0]]]),
    seed,
    min_object_covered=0.1,
    aspect_ratio_range=aspect,
    area_range=area,
    max_attempts=100,
    use_image_if_no_bounding_boxes=True,
  )
  return tf.concat([begin[:2], extent[:2]], 0)


def crop_and_resize(image, box, size):
  """Returns f32[..., size, size, 3], a crop resized: bicubic, half-pixel centres, no antialiasing, no clip.

  Args:
    image: f32[..., H, W, 3], or u8, which is divided by 255.
    box: int[4], (y, x, height, width).
    size: int.
  """
  y, x, height, width = tf.unstack(box)
  image = tf.convert_to_tensor(image)
  crop = image[..., y : y + height, x : x + width, :]
  crop, shape = _as_batch(tf.cast(crop, tf.float32) / 255.0 if crop.dtype == tf.uint8 else crop)
  # The op behind tf.image.resize, whose Python wrapper costs a dozen more.
  resized = tf.raw_ops.ResizeBicubic(images=crop, size=[size, size], half_pixel_centers=True)
  return tf.reshape(resized, tf.concat([shape[:-3], [size, size, 3]], 0))


def center_crop(image, size):
  """Returns f32[..., size, size, 3], the evaluation's crop, in [0, 1].

  The central square of 0.875 of the shorter side is resized. Where `size` is at
  most 32, an image that has it already is taken as it is.
  """
  image = tf.convert_to_tensor(image)
  height, width = tf.unstack(tf.shape(image)[-3:-1])

  def crop():
    side = tf.cast(tf.math.rint(EVALUATION_SHARE * tf.cast(tf.minimum(height, width), tf.float32)), tf.int32)
    return crop_and_resize(image, [(height - side + 1) // 2, (width - side + 1) // 2, side, side], size)

  def whole():
    return crop_and_resize(image, [0, 0, height, width], size)  # of its own size: the same numbers

  as_it_is = tf.logical_and(tf.equal(height, size), tf.equal(width, size))
  return tf.clip_by_value(tf.cond(as_it_is, whole, crop) if size <= SMALL_IMAGE else crop(), 0.0, 1.0)


def pretrain_view(
  image,
  seed,
  *,
  size,
  color_strength=1.0,
  brightness="multiplicative",
  color_probability=0.8,
  grayscale_probability=0.2,
  blur=True,
  blur_probability=0.5,
  blur_sigma=(0.1, 2.0),
  flip=True,
  area=(0.08, 1.0),
  aspect=(3 / 4, 4 / 3),
):
  """Returns a random view f32[size, size, 3] in [0, 1] for pretraining, a function of `seed`.

  The reference's law: crop, flip, colour jitter, grayscale, clip, blur, clip. The
  blur's sigma is drawn per image; the reference draws it per view and replica.

  Args:
    image: f32[H, W, 3] in [0, 1], or u8.
    seed: int[2].
    size: of the view.
    color_strength: s of the paper: factors go up to 1 + 0.8 s, the hue turns by up to 0.2 s.
    brightness: "multiplicative" (SimCLR v2) or "additive" (v1).
    color_probability, grayscale_probability, blur_probability: of the three coins.
    blur: whether there is any blur.
    blur_sigma: range of the blur's sigma in pixels.
    flip: whether half of the views are mirrored.
    area, aspect: ranges of the crop, as in `crop_box`.
  """
  check_color(color_strength, brightness)
  crop_seed, number_seed = tf.unstack(tf.random.experimental.stateless_split(seed, 2))
  numbers = iter(tf.unstack(tf.random.stateless_uniform([10], number_seed)))
  view = _crop_and_flip(image, crop_seed, next(numbers), size=size, flip=flip, area=area, aspect=aspect)

  additive = brightness == "additive"
  factors = _color_factors([next(numbers) for _ in range(4)], color_strength, additive)
  order = tf.gather(ORDERS, tf.cast(next(numbers) * len(ORDERS), tf.int32))
  jitter = lambda x=view: color_jitter(x, factors, order, additive)
  view = tf.cond(next(numbers) < color_probability, jitter, lambda x=view: x)
  view = tf.cond(next(numbers) < grayscale_probability, lambda x=view: to_grayscale(x), lambda x=view: x)
  view = tf.clip_by_value(view, 0.0, 1.0)
  if blur:
    low, high = blur_sigma
    sigma = low + (high - low) * next(numbers)
    blurred = lambda x=view: tf.clip_by_value(gaussian_blur(x, sigma, size // 10), 0.0, 1.0)
    view = tf.cond(next(numbers) < blur_probability, blurred, lambda x=view: x)
  return tf.ensure_shape(view, [size, size, 3])


def two_views(image, seed, *, size, **law):
  """Returns two independent views f32[2, size, size, 3]; `law` are the knobs of `pretrain_view`."""
  seeds = tf.unstack(tf.random.experimental.stateless_split(seed, 2))
  return tf.stack([pretrain_view(image, view_seed, size=size, **law) for view_seed in seeds])


def train_view(image, seed, *, size, flip=True, area=(0.08, 1.0), aspect=(3 / 4, 4 / 3)):
  """Returns a random crop and flip f32[size, size, 3] in [0, 1], the law of supervised training."""
  crop_seed, number_seed = tf.unstack(tf.random.experimental.stateless_split(seed, 2))
  coin = tf.random.stateless_uniform([], number_seed)
  view = _crop_and_flip(image, crop_seed, coin, size=size, flip=flip, area=area, aspect=aspect)
  return tf.clip_by_value(view, 0.0, 1.0)


def eval_view(image, *, size):
  """Returns the evaluation's `center_crop` f32[size, size, 3] of one image, f32[H, W, 3] in [0, 1] or u8."""
  return tf.ensure_shape(center_crop(image, size), [size, size, 3])


def check_color(color_strength, brightness):
  """Raises a UserError for a strength or an implementation of brightness that has no meaning."""
  if not 0.0 <= color_strength <= LARGEST_STRENGTH:
    raise errors.UserError(
      f"color_strength {color_strength} is outside 0 to {LARGEST_STRENGTH}, above which contrast factors "
      f"would be negative; use at most {LARGEST_STRENGTH}."
    )
  if brightness not in BRIGHTNESS:
    raise errors.UserError(
      f'unknown brightness "{brightness}"; use one of {", ".join(BRIGHTNESS)}{errors.nearest(brightness, BRIGHTNESS)}'
    )


def _crop_and_flip(image, seed, coin, *, size, flip, area, aspect):
  """Returns a random crop f32[size, size, 3], not clipped; mirrored if `coin` is below 0.5."""
  height, width = tf.unstack(tf.shape(image)[:2])
  view = crop_and_resize(image, crop_box(seed, height, width, area=area, aspect=aspect), size)
  view = tf.ensure_shape(view, [size, size, 3])
  return tf.cond(coin < 0.5, lambda: tf.reverse(view, [1]), lambda: view) if flip else view


def _color_factors(numbers, strength, additive):
  """Returns the factors of `color_jitter` for four numbers uniform in [0, 1)."""
  spread, turn = 0.8 * strength, 0.2 * strength
  least = max(0.0, 1.0 - spread)
  ranges = [(-spread, spread) if additive else (least, 1.0 + spread)]
  ranges += [(1.0 - spread, 1.0 + spread)] * 2 + [(-turn, turn)]
  return [low + (high - low) * number for number, (low, high) in zip(numbers, ranges, strict=True)]


def _as_batch(image):
  """Returns `image` f32[..., H, W, C] with its leading axes made one, and its shape."""
  image = tf.convert_to_tensor(image)
  shape = tf.shape(image)
  batch = image[None] if image.shape.rank == 3 else tf.reshape(image, tf.concat([[-1], shape[-3:]], 0))
  return batch, shape
