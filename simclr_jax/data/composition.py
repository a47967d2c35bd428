"""Single augmentations and their compositions (Chen et al. 2020, section 3.1 and figure 5) in JAX.

Both views start from the same random crop of an image. The first view is that crop; the second one is the crop after
one or several operations, which are always applied. The paper names the operations without sizes or strengths: the
constants below are this project's choice.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from simclr_jax import errors, randomness
from simclr_jax.data import device_augment
from simclr_jax.data.distortion import Distortion

OPERATIONS = ("crop", "cutout", "color", "sobel", "noise", "blur", "rotate")

CUTOUT_SHARE = 0.5  # side of the erased square as a share of the image's: 16 of 32 pixels, as in arXiv 1708.04552
CUTOUT_FILL = 0.5  # grey; arXiv 1708.04552 fills with the mean of standardised images, 0
SOBEL_SCALE = 0.25  # makes an edge from 0 to 1 give 1
NOISE_SIGMA = 0.2
BLUR_SIGMA = (0.1, 2.0)  # pixels, as in the reference's distortion
LEAST_TAPS = 3  # a tenth of an image below 20 pixels would be a single tap, which does not blur

NOTHING = len(OPERATIONS)  # code of the identity, which pads lists of codes to one length and so to one program
LEAST_CODES = 2


def codes(text: str) -> np.ndarray:
  """Returns the codes i32[K] of the operations in a text such as "crop,color", in order, padded to LEAST_CODES.

  An unknown operation is a UserError.
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


def pairs_of_crops(
  crops: jax.Array, keys: jax.Array, operations: ArrayLike, distortion: Distortion, *, dtype: DTypeLike = jnp.float32
) -> jax.Array:
  """Returns each crop beside the same crop after the operations, `dtype`[N, 2, S, S, 3] in [0, 1].

  The operations are data of the program, which branches at run time: it is compiled once for all of them.

  Args:
    crops: u8[N, S, S, 3], or float in [0, 1].
    keys: key[N]; the random numbers of an example depend on its key alone.
    operations: i32[K], of `codes`, applied in this order; a repeated one has other random numbers.
    distortion: its colours are those of the operation `color`, its areas and aspects those of `crop`.
    dtype: of the result, which is computed in at least float32.
  """
  wide = jnp.promote_types(dtype, jnp.float32)
  crops = crops.astype(wide) / 255 if crops.dtype == jnp.uint8 else crops.astype(wide)
  branches = [functools.partial(_apply, name, distortion=distortion) for name in OPERATIONS]
  branches.append(lambda images, keys: images)

  def step(images, numbers):
    position, operation = numbers
    own = jax.vmap(lambda key: jax.random.fold_in(jax.random.fold_in(key, randomness.COMPOSED), position))(keys)
    return jax.lax.switch(operation, branches, images, own), None

  operations = jnp.asarray(operations)
  changed, _ = jax.lax.scan(step, crops, (jnp.arange(len(operations), dtype=jnp.int32), operations))
  return jnp.stack([crops, changed], 1).astype(dtype)


def sobel(images: jax.Array) -> jax.Array:
  """Returns the magnitude of each channel's gradient by Sobel's kernels, float[..., H, W, 3] in [0, 1].

  An edge from 0 to 1 gives 1; larger values (at corners) are clipped. The border is padded by reflection without
  repeating the outermost pixels, as in TensorFlow's `sobel_edges`, so `images` are at least two pixels high and wide.
  """
  padded = jnp.pad(images, [(0, 0)] * (images.ndim - 3) + [(1, 1), (1, 1), (0, 0)], mode="reflect")
  smooth = lambda x, axis: _shifted(x, 0, axis) + 2 * _shifted(x, 1, axis) + _shifted(x, 2, axis)
  slope = lambda x, axis: _shifted(x, 2, axis) - _shifted(x, 0, axis)
  down, across = slope(smooth(padded, -2), -3), slope(smooth(padded, -3), -2)
  return jnp.clip(SOBEL_SCALE * jnp.sqrt(jnp.square(down) + jnp.square(across)), 0.0, 1.0)


def cutout(images: jax.Array, center: ArrayLike) -> jax.Array:
  """Returns float[N, S, S, 3] with a square, whose side is CUTOUT_SHARE of S, filled with CUTOUT_FILL.

  `center` i32[N, 2] is the row and column of the square, which may extend over the image's border.
  """
  size = images.shape[-2]
  side = int(CUTOUT_SHARE * size)
  offset = jnp.arange(size, dtype=jnp.int32)[None, :, None] - center[:, None, :] + side // 2  # [N, S, 2]
  inside = (offset >= 0) & (offset < side)
  erased = inside[:, :, None, 0] & inside[:, None, :, 1]
  return jnp.where(erased[..., None], jnp.asarray(CUTOUT_FILL, images.dtype), images)


def noise(images: jax.Array, normal: jax.Array) -> jax.Array:
  """Returns images plus NOISE_SIGMA times `normal`, clipped to [0, 1]; both float[..., H, W, 3]."""
  return jnp.clip(images + NOISE_SIGMA * normal, 0.0, 1.0)


def rotate(images: jax.Array, quarters: jax.Array) -> jax.Array:
  """Returns float[N, S, S, 3] rotated counter-clockwise by 90 degrees times `quarters`, i32[N] of 1, 2 or 3."""
  turned = [jnp.rot90(images, count, axes=(1, 2)) for count in (1, 2, 3)]
  quarters = quarters[:, None, None, None]
  return jnp.where(quarters == 1, turned[0], jnp.where(quarters == 2, turned[1], turned[2]))


def crop_boxes(keys: jax.Array, distortion: Distortion) -> jax.Array:
  """Returns random crops i32[N, 4] of square images of `distortion.size` pixels; see `device_augment.crop_box`."""
  size, ranges = distortion.size, {"area": distortion.area, "aspect": distortion.aspect}
  return jax.vmap(lambda key: device_augment.crop_box(key, size, size, **ranges))(keys)


def centers(keys: jax.Array, size: int) -> jax.Array:
  """Returns a random row and column for each key, i32[N, 2], uniform over `size` by `size` pixels."""
  return jax.vmap(lambda key: jax.random.randint(key, [2], 0, size, jnp.int32))(keys)


def sigmas(keys: jax.Array) -> jax.Array:
  """Returns the blur's standard deviation for each key in pixels, f32[N], uniform in BLUR_SIGMA."""
  low, high = BLUR_SIGMA
  return jax.vmap(lambda key: jax.random.uniform(key, [], jnp.float32, low, high))(keys)


def quarter_turns(keys: jax.Array) -> jax.Array:
  """Returns 1, 2 or 3 for each key, i32[N], with equal probabilities."""
  return jax.vmap(lambda key: jax.random.randint(key, [], 1, 4, jnp.int32))(keys)


def _apply(name, images, keys, distortion):
  """Returns images float[N, S, S, 3] in [0, 1] after one operation, whose random numbers come from `keys`."""
  size = images.shape[-2]
  if name == "crop":
    boxes = jax.lax.optimization_barrier(crop_boxes(keys, dataclasses.replace(distortion, size=size)))
    return jnp.clip(device_augment.crop_and_resize(images, boxes, size), 0.0, 1.0)
  if name == "cutout":
    return cutout(images, centers(keys, size))
  if name == "color":
    # As in the SimCLR distortion: jitter and grayscale each keep a probability of their own.
    colors = dataclasses.replace(distortion, blur_probability=0.0)
    return device_augment.distorted_pairs(images[:, None], keys, colors, dtype=images.dtype)[:, 0]
  if name == "sobel":
    return sobel(images)
  if name == "noise":
    return noise(images, jax.vmap(lambda key: jax.random.normal(key, images.shape[1:], images.dtype))(keys))
  if name == "blur":
    taps = max(size // 10, LEAST_TAPS)
    return jnp.clip(device_augment.gaussian_blur(images, sigmas(keys), taps), 0.0, 1.0)
  return rotate(images, quarter_turns(keys))


def _shifted(padded, start, axis):
  """Returns `padded` from `start` on along an axis, two entries shorter."""
  return jax.lax.slice_in_dim(padded, start, padded.shape[axis] - 2 + start, axis=axis % padded.ndim)
