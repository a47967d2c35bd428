"""The reference's augmentation in JAX, part of a jitted step: its operations, and random views as functions of keys."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from simclr_jax import randomness
from simclr_jax.data import distortion as distortion_lib
from simclr_jax.data.distortion import Distortion

# Without it a TPU rounds the operands of a float32 product to bfloat16, and a GPU to TF32.
PRECISION = jax.lax.Precision.HIGHEST
CUBIC_POINTS = 1024  # per pixel in TensorFlow's table of the cubic kernel; positions are rounded to them
NO_BLUR = 1e-3  # a standard deviation in pixels at which all taps of the blur but the middle one are exactly zero
CONTRAST, SATURATION, HUE = 1, 2, 3  # their numbers in `order`; 0 is brightness


def brightness(image: jax.Array, factor: ArrayLike, additive: bool = False) -> jax.Array:
  """Returns `image` times `factor` (SimCLR v2), or plus `factor` (v1); float[..., H, W, 3], not clipped."""
  planes = _planes(image)
  factor = _per_image(factor, planes[0].dtype)
  return _image([x + factor if additive else x * factor for x in planes], image.dtype)


def contrast(image: jax.Array, factor: ArrayLike) -> jax.Array:
  """Returns float[..., H, W, 3] with each channel's distance from its mean scaled; not clipped."""
  planes = _planes(image)
  factor = _per_image(factor, planes[0].dtype)
  means = [_mean(x) for x in planes]
  return _image([(x - mean) * factor + mean for x, mean in zip(planes, means, strict=True)], image.dtype)


def saturation(image: jax.Array, factor: ArrayLike) -> jax.Array:
  """Returns float[..., H, W, 3] with the HSV saturation scaled by `factor` and clipped to [0, 1]."""
  planes = _planes(image)
  return _image(_recolored(planes, True, _per_image(factor, planes[0].dtype), 0.0), image.dtype)


def hue(image: jax.Array, factor: ArrayLike) -> jax.Array:
  """Returns float[..., H, W, 3] with the HSV hue shifted by `factor` turns."""
  planes = _planes(image)
  return _image(_recolored(planes, False, 1.0, _per_image(factor, planes[0].dtype)), image.dtype)


def to_grayscale(image: jax.Array) -> jax.Array:
  """Returns float[..., H, W, 3], the luma of `image` in all three channels."""
  return _image([_luma(_planes(image))] * 3, image.dtype)


def color_jitter(
  image: jax.Array, factors: ArrayLike, order: ArrayLike, additive: bool = False, dtype: DTypeLike | None = None
) -> jax.Array:
  """Returns `dtype`[..., H, W, 3] after the four colour operations, clipped to [0, 1] after each.

  There are no branches: at each of the four positions both an affine map (brightness or contrast) and a change of
  saturation or hue are computed, and the image's order selects one of the two.

  Args:
    image: float[..., H, W, 3].
    factors: f32[..., 4], of brightness, contrast, saturation and hue, per image; f32[4] for all images.
    order: i32[..., 4], a permutation of the numbers 0 to 3 of these operations: the order in which they are applied.
    additive: whether the brightness factor is added.
    dtype: of the result of each operation, which computes in at least float32; None for the image's.
  """
  dtype = image.dtype if dtype is None else dtype
  wide = jnp.promote_types(image.dtype, jnp.float32)
  factors, order = jnp.asarray(factors, wide), jnp.asarray(order)
  bright, contrasted, saturated, turn = (_per_image(factors[..., i], wide) for i in range(4))

  def step(image, operation):
    operation = _per_image(operation)
    planes = _planes(image)
    # Brightness and contrast are both affine: a factor and a constant for each channel.
    factor = jnp.where(operation == CONTRAST, contrasted, 1.0 if additive else bright)
    constant = bright if additive else 0.0
    means = [_mean(x) for x in planes]
    shifts = [jnp.where(operation == CONTRAST, (1.0 - contrasted) * mean, constant) for mean in means]
    plain = [factor * x + shift for x, shift in zip(planes, shifts, strict=True)]
    colored = _recolored(planes, operation == SATURATION, saturated, jnp.where(operation == HUE, turn, 0.0))
    planes = [jnp.where(operation < SATURATION, x, y) for x, y in zip(plain, colored, strict=True)]
    return _image([jnp.clip(x, 0.0, 1.0) for x in planes], dtype), None

  # A scan rather than four copies: the body is compiled once, and its results are stored, see `distorted_pairs`.
  return jax.lax.scan(step, image.astype(dtype), jnp.moveaxis(order, -1, 0))[0]


def gaussian_blur(image: jax.Array, sigma: ArrayLike, size: int) -> jax.Array:
  """Returns float[..., H, W, 3] blurred by a Gaussian of 2 * (size // 2) + 1 taps, with zero padding.

  Both passes are batched products with band matrices, because a convolution would need a loop over images that have
  different kernels. A bfloat16 image is multiplied in bfloat16. `sigma` is the standard deviation in pixels, f32[...]
  per image or f32[] for all; `size` is a tenth of the image's side in the reference: 23, 9, 7 and 3 taps for 224, 96,
  64 and 32 pixels.
  """
  radius = size // 2
  variance = jnp.square(jnp.asarray(sigma, jnp.promote_types(image.dtype, jnp.float32)))[..., None]
  x = jnp.arange(-radius, radius + 1, dtype=variance.dtype)
  taps = jnp.exp(-jnp.square(x).reshape([1] * (variance.ndim - 1) + [-1]) / (2.0 * variance))
  taps /= taps.sum(-1, keepdims=True)

  def band(length):
    distance = np.subtract.outer(np.arange(length), np.arange(length)) + radius
    inside = (distance >= 0) & (distance <= 2 * radius)
    return jnp.where(inside, taps[..., distance.clip(0, 2 * radius)], 0.0)

  return _product(band(image.shape[-3]), band(image.shape[-2]), image)


def crop_box(
  key: jax.Array,
  height: ArrayLike,
  width: ArrayLike,
  *,
  area: tuple[float, float] = (0.08, 1.0),
  aspect: tuple[float, float] = (3 / 4, 4 / 3),
) -> jax.Array:
  """Returns a random crop i32[4] (y, x, height, width), distributed as TensorFlow's sample_distorted_bounding_box.

  All attempts are drawn at once and the first valid one is taken, which has the distribution of TensorFlow's loop.
  `area` is the range of the crop's area as a share of the image's (crops below a share of 0.1 are never taken),
  `aspect` that of width / height.
  """
  numbers = jax.random.uniform(key, [2 * distortion_lib.ATTEMPTS + 2], jnp.float32)
  ratio = aspect[0] + (aspect[1] - aspect[0]) * numbers[: distortion_lib.ATTEMPTS]
  height, width = jnp.asarray(height, jnp.float32), jnp.asarray(width, jnp.float32)
  least_area, most_area = area[0] * height * width, area[1] * height * width

  least, most = jnp.round(jnp.sqrt(least_area / ratio)), jnp.round(jnp.sqrt(most_area / ratio))
  widest = jnp.floor((width + 0.5) / ratio)
  widest -= jnp.round(widest * ratio) > width
  most = jnp.minimum(jnp.where(jnp.round(most * ratio) > width, widest, most), height)
  least = jnp.minimum(least, most)
  rows = least + jnp.floor(numbers[distortion_lib.ATTEMPTS : -2] * (most - least + 1))
  rows += rows * jnp.round(rows * ratio) < least_area
  rows -= rows * jnp.round(rows * ratio) > most_area
  columns = jnp.round(rows * ratio)

  covered = rows * columns
  good = (covered >= least_area) & (covered <= most_area) & (covered / (height * width) >= distortion_lib.MIN_COVERED)
  good &= (rows >= 1) & (columns >= 1) & (rows <= height) & (columns <= width)
  first = jnp.argmax(good)
  side = jnp.where(good.any(), jnp.stack([rows[first], columns[first]]), jnp.stack([height, width]))
  # As in the reference, the last possible position is never drawn.
  corner = jnp.floor(numbers[-2:] * (jnp.stack([height, width]) - side))
  return jnp.concatenate([corner, side]).astype(jnp.int32)


def crop_and_resize(image: jax.Array, box: ArrayLike, size: int) -> jax.Array:
  """Returns float[..., size, size, 3], a crop resized: bicubic, half-pixel centres, no antialiasing, not clipped.

  `image` is float[..., H, W, 3], or u8, which is divided by 255; `box` is (y, x, height, width), int[..., 4] per image
  or int[4] for all.
  """
  image = _unit(image, image.dtype)
  return _product(*_cubic_weights(box, image, size), image)


def center_crop(image: jax.Array, size: int) -> jax.Array:
  """Returns float[..., size, size, 3], the evaluation's crop of float[..., H, W, 3] in [0, 1] or u8, in [0, 1].

  The central square of 0.875 of the shorter side is resized. An image of `size` by `size` is taken whole where `size`
  is at most 32.
  """
  height, width = image.shape[-3:-1]
  if size <= distortion_lib.SMALL_IMAGE and height == width == size:
    return jnp.clip(_unit(image, image.dtype), 0.0, 1.0)
  side = round(distortion_lib.EVALUATION_SHARE * min(height, width))
  y, x = (height - side + 1) // 2, (width - side + 1) // 2
  square = image[..., y : y + side, x : x + side, :]
  return jnp.clip(crop_and_resize(square, [0, 0, side, side], size), 0.0, 1.0)


def example_keys(seed: int, epoch: jax.Array, index: jax.Array) -> jax.Array:
  """Returns the keys key[N] of examples, each a function of the seed and of its own epoch and index, i32[N], alone."""
  key = randomness.key(seed)
  return jax.vmap(lambda epoch, index: jax.random.fold_in(jax.random.fold_in(key, epoch), index))(epoch, index)


def distorted_pairs(
  views: jax.Array, keys: jax.Array, distortion: Distortion, *, dtype: DTypeLike = jnp.float32
) -> jax.Array:
  """Returns views after the random colours and blur, `dtype`[N, V, H, W, 3] in [0, 1].

  What the reference does after the crop: colour jitter, grayscale, clip, blur, clip. The blur's sigma is drawn per
  image and view; the reference draws it per view and replica.

  Args:
    views: u8[N, V, H, W, 3], or float (then not clipped before the first operation); V is 2 in pretraining.
    keys: key[N], of `example_keys`.
    distortion: only its colours and blur are used.
    dtype: of the result and of the blur's products; the colours are computed in at least float32.
  """
  shape = [views.shape[1], 9]
  own = lambda key: jax.random.fold_in(key, randomness.COLORS)
  numbers = jax.vmap(lambda key: jax.random.uniform(own(key), shape, jnp.float32))(keys)
  numbers = iter(jnp.moveaxis(numbers, -1, 0))  # each f32[N, V]
  factors = [low + (high - low) * next(numbers) for low, high in distortion.color_ranges]
  orders = jnp.asarray(distortion_lib.ORDERS)
  order = orders[(next(numbers) * len(orders)).astype(jnp.int32)]
  probabilities = (distortion.color_probability, distortion.grayscale_probability, distortion.blur_probability)
  colored, gray, blurred = (next(numbers) < probability for probability in probabilities)
  low, high = distortion.blur_sigma
  sigma = jnp.where(blurred, low + (high - low) * next(numbers), NO_BLUR)
  # Behind a barrier these are computed once and stored. On CPU, XLA would otherwise fuse the whole chain of operations
  # and draw the numbers again at each use: 3 s instead of 10 ms.
  numbers = (jnp.stack(factors, -1), order, colored, gray, sigma)
  factors, order, colored, gray, sigma = jax.lax.optimization_barrier(numbers)

  views = _unit(views, dtype)
  jittered = color_jitter(views, factors, order, distortion.additive, dtype)
  views = jnp.where(_per_image(colored)[..., None], jittered, views)
  planes = _planes(views)
  planes = [jnp.clip(jnp.where(_per_image(gray), _luma(planes), x), 0.0, 1.0) for x in planes]
  views = _image(planes, dtype)
  if distortion.blur_probability > 0:
    views = jnp.clip(gaussian_blur(jax.lax.optimization_barrier(views), sigma, views.shape[-3] // 10), 0.0, 1.0)
  return views


def two_views(
  images: jax.Array, keys: jax.Array, distortion: Distortion, *, dtype: DTypeLike = jnp.float32
) -> jax.Array:
  """Returns two independent views of each image for pretraining, `dtype`[N, 2, size, size, 3] in [0, 1].

  The crops, of images u8[N, H, W, 3] or float in [0, 1], are bicubic; `keys` and `dtype` are as in `distorted_pairs`.
  """
  return distorted_pairs(_cropped(images, keys, 2, distortion, dtype), keys, distortion, dtype=dtype)


def train_view(images: jax.Array, keys: jax.Array, distortion: Distortion) -> jax.Array:
  """Returns a random crop (bicubic) and flip of each image, f32[N, size, size, 3] in [0, 1], as in supervised training.

  `images` are u8[N, H, W, 3], or float in [0, 1]; `keys` key[N] are those of `example_keys`.
  """
  return jnp.clip(_cropped(images, keys, 1, distortion, jnp.float32)[:, 0], 0.0, 1.0)


def _cropped(images, keys, count, distortion, dtype):
  """Returns `count` random crops of each image, float[N, count, size, size, 3], not clipped; half of them mirrored."""
  height, width = images.shape[1:3]

  def draw(key):
    box_key, coin_key = jax.random.split(key)
    box = crop_box(box_key, height, width, area=distortion.area, aspect=distortion.aspect)
    return box, jax.random.uniform(coin_key, [], jnp.float32) < 0.5

  view_keys = jax.vmap(lambda key: jax.random.split(jax.random.fold_in(key, randomness.CROP), count))(keys)
  boxes, mirrored = jax.vmap(jax.vmap(draw))(view_keys)
  images = _unit(images, dtype)[:, None]
  rows, columns = _cubic_weights(boxes, images, distortion.size)
  if distortion.flip:
    columns = jnp.where(mirrored[..., None, None], columns[..., ::-1, :], columns)
  return _product(rows, columns, images)


def _cubic_weights(box, image, size):
  """Returns the matrices [..., size, H] and [..., size, W] that crop and resize an image's columns and rows.

  Cubic convolution (Keys 1981) with a = -0.5. Weights outside the box are set to zero and the others are normalised to
  a sum of 1.
  """
  box = jnp.asarray(box)[..., None, None]

  def weights(start, extent, length):
    extent = extent.astype(jnp.float32)
    shape = [1] * (extent.ndim - 2)
    out = jnp.arange(size, dtype=jnp.float32).reshape([*shape, size, 1])
    pixel = jnp.arange(length, dtype=jnp.int32).reshape([*shape, 1, length]) - start
    source = (out + 0.5) * (extent / size) - 0.5
    source = jnp.round(source * CUBIC_POINTS) / CUBIC_POINTS
    x = jnp.abs(source - pixel).astype(image.dtype)
    near, far = (1.5 * x - 2.5) * x * x + 1.0, ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
    kernel = jnp.where(x < 1.0, near, jnp.where(x < 2.0, far, 0.0))
    kernel = jnp.where((pixel >= 0) & (pixel < extent), kernel, 0.0)
    return kernel / kernel.sum(-1, keepdims=True)

  y, x, height, width = (box[..., i, :, :] for i in range(4))
  return weights(y, height, image.shape[-3]), weights(x, width, image.shape[-2])


def _product(rows, columns, image):
  """Returns `rows` [..., O, H] times each channel of `image` [..., H, W, 3] times the transposed `columns` [..., P, W].

  The sums are of at least float32; the result has the type of `image`.
  """
  rows, columns = rows.astype(image.dtype), columns.astype(image.dtype)
  wide = jnp.promote_types(image.dtype, jnp.float32)
  half = jnp.einsum("...oh,...hwc->...owc", rows, image, precision=PRECISION, preferred_element_type=wide)
  half = half.astype(image.dtype)
  whole = jnp.einsum("...pw,...owc->...opc", columns, half, precision=PRECISION, preferred_element_type=wide)
  return whole.astype(image.dtype)


def _recolored(planes, saturates, factor, turn):
  """Returns the planes with their HSV saturation scaled by `factor` where `saturates`, their hue shifted by `turn`.

  A channel is value - chroma * ramp(hue), which needs no conversion to HSV and back.
  """
  red, green, blue = planes
  value = jnp.maximum(jnp.maximum(red, green), blue)
  chroma = value - jnp.minimum(jnp.minimum(red, green), blue)
  divisor = jnp.where(chroma > 0.0, chroma, 1.0)
  below = jnp.where(value == green, 2.0 + (blue - red) / divisor, 4.0 + (red - green) / divisor)
  angle = jnp.where(value == red, (green - blue) / divisor, below) / 6.0 + turn
  sixth = 6.0 * (angle - jnp.floor(angle))
  scaled = jnp.clip(factor * chroma / jnp.where(value > 0.0, value, 1.0), 0.0, 1.0) * jnp.maximum(value, 0.0)
  chroma = jnp.where(saturates, scaled, chroma)
  ramps = (2.0 - jnp.abs(sixth - 3.0), jnp.abs(sixth - 2.0) - 1.0, jnp.abs(sixth - 4.0) - 1.0)
  return [value - chroma * jnp.clip(ramp, 0.0, 1.0) for ramp in ramps]


def _mean(plane):
  """Returns the means [..., 1, 1] of planes [..., H, W]."""
  # In two stages: a CPU adds all pixels one after the other, which loses digits in one long sum.
  return plane.mean(-1, keepdims=True).mean(-2, keepdims=True)


def _luma(planes):
  return sum(weight * x for weight, x in zip(distortion_lib.LUMA, planes, strict=True))


def _unit(image, dtype):
  """Returns `image` in `dtype`, but at least float32; u8 is divided by 255."""
  if jnp.issubdtype(dtype, jnp.integer):
    dtype = jnp.float32
  wide = image.astype(jnp.promote_types(dtype, jnp.float32))
  return wide / 255.0 if image.dtype == jnp.uint8 else wide


def _planes(image):
  """Returns the three channels, each [..., H, W], in at least float32: arithmetic between them is then elementwise."""
  image = image.astype(jnp.promote_types(image.dtype, jnp.float32))
  return [image[..., channel] for channel in range(3)]


def _image(planes, dtype):
  return jnp.stack(planes, -1).astype(dtype)


def _per_image(number, dtype=None):
  """Returns numbers [...], one per image, as [..., 1, 1] to broadcast over pixels; a scalar as it is."""
  number = jnp.asarray(number, dtype)
  return number[..., None, None] if number.ndim else number
