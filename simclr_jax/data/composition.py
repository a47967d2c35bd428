"""Single augmentations and their compositions (v1 figure 5) in JAX: one view is a crop, the other is that crop changed.

Section 3.1 of v1: an image is cropped at random and resized, and that crop is what both views start from. The first
view is the crop as it is; the second one goes through one operation or several, one after the other, always. The paper
names the operations but leaves sizes and strengths open: the constants below are ours.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from simclr_jax import errors
from simclr_jax.data import device_augment

OPERATIONS = ("crop", "cutout", "color", "sobel", "noise", "blur", "rotate")

CUTOUT_SHARE = 0.5  # Of the image's side: the square that is erased, 16 of 32 pixels as for CIFAR-10 in 1708.04552.
CUTOUT_FILL = 0.5  # Grey; the same paper fills with the mean, which is 0 of its standardised images.
SOBEL_SCALE = 0.25  # So that an edge from 0 to 1 gives 1.
NOISE_SIGMA = 0.2
BLUR_SIGMA = (0.1, 2.0)  # In pixels, as in the reference's distortion.
LEAST_TAPS = 3  # A tenth of an image below 20 pixels is one tap, which would not blur.

# Apart from those that `device_augment` takes of an example's key for its own crops (0) and colours (1).
COMPOSED = 2
NOTHING = len(OPERATIONS)  # Fills up codes, so that one operation and two of them are one program.
LEAST_CODES = 2


def codes(text: str) -> np.ndarray:
  """Returns the operations that a text such as "crop,color" names, in order, as `pairs_of_crops` takes them: i32[K].

  Raises:
    UserError: one of them is not known.
  """
  names = [name.strip() for name in text.split(",")]
  for name in names:
    if name not in OPERATIONS:
      raise errors.UserError(
        f"config.augment.compose is {text!r}: no operation {name!r}{errors.nearest(name, OPERATIONS)}; "
        f"use one or more of {', '.join(OPERATIONS)}, with commas between."
      )
  numbers = [OPERATIONS.index(name) for name in names]
  return np.array(numbers + [NOTHING] * (LEAST_CODES - len(numbers)), np.int32)


def pairs_of_images(images, keys, operations, *, size: int, area=(0.08, 1.0), **knobs):
  """Returns `pairs_of_crops` of a random crop of each image, not mirrored.

  Args:
    images: u8[N, H, W, 3], or float in [0, 1].
    keys: key[N], of `device_augment.example_keys`.
    operations: see `pairs_of_crops`.
    size: of the views.
    area: range of the crop's share of the image.
    **knobs: of `pairs_of_crops`.
  """
  crops = device_augment.train_view(images, keys, size=size, flip=False, area=area)
  return pairs_of_crops(crops, keys, operations, area=area, **knobs)


def pairs_of_crops(crops, keys, operations, *, area=(0.08, 1.0), dtype=jnp.float32, **colors):
  """Returns each crop beside the same crop after the operations, `dtype`[N, 2, S, S, 3] in [0, 1].

  Which operations is data: one program, compiled once, does all of them, and computes those that are asked for.

  Args:
    crops: u8[N, S, S, 3], or float in [0, 1].
    keys: key[N], of `device_augment.example_keys`; what is drawn for an example depends on nothing else.
    operations: i32[K], of `codes`, applied in this order; the same one may come again, with other numbers.
    area: range of the share of the crop that the operation `crop` takes.
    dtype: of the result; computed in at least float32.
    **colors: color_strength, brightness, color_probability and grayscale_probability of the operation `color`, as in
      `device_augment.distorted_pairs`.
  """
  wide = jnp.promote_types(dtype, jnp.float32)
  crops = crops.astype(wide) / 255 if crops.dtype == jnp.uint8 else crops.astype(wide)
  branches = [functools.partial(_changed, name, area=area, colors=colors) for name in OPERATIONS]
  branches.append(lambda images, keys: images)

  def step(images, numbers):
    position, operation = numbers
    own = jax.vmap(lambda key: jax.random.fold_in(jax.random.fold_in(key, COMPOSED), position))(keys)
    return jax.lax.switch(operation, branches, images, own), None

  operations = jnp.asarray(operations)
  changed, _ = jax.lax.scan(step, crops, (jnp.arange(len(operations), dtype=jnp.int32), operations))
  return jnp.stack([crops, changed], 1).astype(dtype)


def sobel(images):
  """Returns the size of each channel's gradient by Sobel's kernels, float[..., H, W, 3] in [0, 1].

  Scaled so that an edge from 0 to 1 gives 1; what is steeper (at corners) is clipped. Beyond the border the image is
  mirrored about its outermost pixels, as TensorFlow's `sobel_edges` has it.

  Args:
    images: float[..., H, W, 3] in [0, 1], of at least two pixels a side.
  """
  padded = jnp.pad(images, [(0, 0)] * (images.ndim - 3) + [(1, 1), (1, 1), (0, 0)], mode="reflect")
  smooth = lambda x, axis: _shifted(x, 0, axis) + 2 * _shifted(x, 1, axis) + _shifted(x, 2, axis)
  slope = lambda x, axis: _shifted(x, 2, axis) - _shifted(x, 0, axis)
  down, across = slope(smooth(padded, -2), -3), slope(smooth(padded, -3), -2)
  return jnp.clip(SOBEL_SCALE * jnp.sqrt(jnp.square(down) + jnp.square(across)), 0.0, 1.0)


def cutout(images, center):
  """Returns float[N, S, S, 3] with a square of CUTOUT_SHARE of the side filled with CUTOUT_FILL.

  Args:
    images: float[N, S, S, 3].
    center: i32[N, 2], row and column; the part of the square that is outside of the image erases nothing.
  """
  size = images.shape[-2]
  side = int(CUTOUT_SHARE * size)
  offset = jnp.arange(size, dtype=jnp.int32)[None, :, None] - center[:, None, :] + side // 2  # [N, S, 2]
  inside = (offset >= 0) & (offset < side)
  erased = inside[:, :, None, 0] & inside[:, None, :, 1]
  return jnp.where(erased[..., None], jnp.asarray(CUTOUT_FILL, images.dtype), images)


def noise(images, normal):
  """Returns images plus NOISE_SIGMA times `normal`, clipped to [0, 1]; both float[..., H, W, 3]."""
  return jnp.clip(images + NOISE_SIGMA * normal, 0.0, 1.0)


def rotate(images, quarters):
  """Returns float[N, S, S, 3] turned counter-clockwise by `quarters`, i32[N] of 1, 2 and 3, times 90 degrees."""
  turned = [jnp.rot90(images, count, axes=(1, 2)) for count in (1, 2, 3)]
  quarters = quarters[:, None, None, None]
  return jnp.where(quarters == 1, turned[0], jnp.where(quarters == 2, turned[1], turned[2]))


def crop_boxes(keys, size, area):
  """Returns random crops i32[N, 4] of square images by the law of `device_augment.crop_box`."""
  return jax.vmap(lambda key: device_augment.crop_box(key, size, size, area=area))(keys)


def centers(keys, size):
  """Returns random pixels i32[N, 2], all equally likely."""
  return jax.vmap(lambda key: jax.random.randint(key, [2], 0, size, jnp.int32))(keys)


def sigmas(keys):
  """Returns the blur's sigma f32[N] in pixels, uniform in BLUR_SIGMA."""
  low, high = BLUR_SIGMA
  return jax.vmap(lambda key: jax.random.uniform(key, [], jnp.float32, low, high))(keys)


def quarter_turns(keys):
  """Returns 1, 2 or 3, i32[N], equally likely."""
  return jax.vmap(lambda key: jax.random.randint(key, [], 1, 4, jnp.int32))(keys)


def _changed(name, images, keys, area, colors):
  """Returns images float[N, S, S, 3] in [0, 1] after one operation, with the numbers of its own keys."""
  size = images.shape[-2]
  if name == "crop":
    boxes = jax.lax.optimization_barrier(crop_boxes(keys, size, area))
    return jnp.clip(device_augment.crop_and_resize(images, boxes, size), 0.0, 1.0)
  if name == "cutout":
    return cutout(images, centers(keys, size))
  if name == "color":
    # The law of the SimCLR distortion, whose jitter and grayscale each have a probability of their own.
    return device_augment.distorted_pairs(images[:, None], keys, blur=False, dtype=images.dtype, **colors)[:, 0]
  if name == "sobel":
    return sobel(images)
  if name == "noise":
    return noise(images, jax.vmap(lambda key: jax.random.normal(key, images.shape[1:], images.dtype))(keys))
  if name == "blur":
    taps = max(size // 10, LEAST_TAPS)
    return jnp.clip(device_augment.gaussian_blur(images, sigmas(keys), taps), 0.0, 1.0)
  return rotate(images, quarter_turns(keys))


def _shifted(padded, start, axis):
  """Returns `padded` without two of its rows or columns, from `start` on."""
  return jax.lax.slice_in_dim(padded, start, padded.shape[axis] - 2 + start, axis=axis % padded.ndim)
