"""The reference's augmentation in JAX, for inside a jitted step: its operations, and views as functions of keys."""

import jax
import jax.numpy as jnp
import numpy as np

from simclr_jax.data import law

# A float32 product on a TPU rounds its operands to bfloat16, and on a GPU to TF32, unless it is told not to.
PRECISION = jax.lax.Precision.HIGHEST
# TensorFlow reads the cubic kernel from a table of so many points per pixel.
CUBIC_POINTS = 1024
# In pixels: all taps but the middle one are exactly zero.
NO_BLUR = 1e-3

CONTRAST, SATURATION, HUE = 1, 2, 3  # as `order` numbers them; 0 is brightness


def brightness(image, factor, additive=False):
  """Returns `image` times `factor` (SimCLR v2), or plus `factor` (v1); float[..., H, W, 3], not clipped."""
  planes = _planes(_wide(image))
  factor = _per_image(factor, planes[0].dtype)
  return _image([x + factor if additive else x * factor for x in planes], image.dtype)


def contrast(image, factor):
  """Returns float[..., H, W, 3] with each channel's distance from its mean scaled; not clipped."""
  planes = _planes(_wide(image))
  factor = _per_image(factor, planes[0].dtype)
  means = [_mean(x) for x in planes]
  return _image([(x - mean) * factor + mean for x, mean in zip(planes, means, strict=True)], image.dtype)


def saturation(image, factor):
  """Returns float[..., H, W, 3] with the HSV saturation scaled by `factor` and clipped to [0, 1]."""
  planes = _planes(_wide(image))
  return _image(_repainted(planes, True, _per_image(factor, planes[0].dtype), 0.0), image.dtype)


def hue(image, factor):
  """Returns float[..., H, W, 3] with the HSV hue turned by `factor` of a full turn."""
  planes = _planes(_wide(image))
  return _image(_repainted(planes, False, 1.0, _per_image(factor, planes[0].dtype)), image.dtype)


def to_grayscale(image):
  """Returns float[..., H, W, 3], three times the luma of `image`."""
  return _image([_luma(_planes(_wide(image)))] * 3, image.dtype)


def color_jitter(image, factors, order, additive=False):
  """Returns `image` after the four colour operations, clipped to [0, 1] after each.

  Without branches: at each of the four positions an image goes through one affine map and one turn of its colours,
  and takes the result that its order asks for.

  Args:
    image: float[..., H, W, 3].
    factors: f32[..., 4], of brightness, contrast, saturation and hue, in this order; [4] serves all images.
    order: i32[..., 4], the numbers of the operations as they follow each other.
    additive: whether the brightness factor is added.
  """
  return _jittered(image, factors, order, additive, image.dtype)


def gaussian_blur(image, sigma, size):
  """Returns float[..., H, W, 3] blurred by a Gaussian of 2 * (size // 2) + 1 taps, with zeros around the image.

  Both passes are products with band matrices, which may differ from image to image without a convolution for each.

  Args:
    image: float[..., H, W, 3]; bfloat16 goes into the products as it is.
    sigma: f32[...] in pixels, of each image or of all.
    size: a tenth of the image in the reference: 23, 9, 7 and 3 taps for 224, 96, 64 and 32 pixels.
  """
  radius = size // 2
  variance = jnp.square(jnp.asarray(sigma, _wide(image).dtype))[..., None]
  x = jnp.arange(-radius, radius + 1, dtype=variance.dtype)
  taps = jnp.exp(-jnp.square(x).reshape([1] * (variance.ndim - 1) + [-1]) / (2.0 * variance))
  taps /= taps.sum(-1, keepdims=True)

  def band(length):
    distance = np.subtract.outer(np.arange(length), np.arange(length)) + radius
    inside = (distance >= 0) & (distance <= 2 * radius)
    return jnp.where(inside, taps[..., distance.clip(0, 2 * radius)], 0.0)

  return _product(band(image.shape[-3]), band(image.shape[-2]), image)


def crop_box(key, height, width, *, area=(0.08, 1.0), aspect=(3 / 4, 4 / 3)):
  """Returns a random crop i32[4] (y, x, height, width) by the law of TensorFlow's sample_distorted_bounding_box.

  All attempts are drawn at once, and the first that is good is taken: the law of the loop, without the loop.

  Args:
    key: of one crop.
    height, width: of the image.
    area: range of the crop's share of the image; the law's own floor is 0.1.
    aspect: range of width / height.
  """
  numbers = jax.random.uniform(key, [2 * law.ATTEMPTS + 2], jnp.float32)
  ratio = aspect[0] + (aspect[1] - aspect[0]) * numbers[: law.ATTEMPTS]
  height, width = jnp.asarray(height, jnp.float32), jnp.asarray(width, jnp.float32)
  least_area, most_area = area[0] * height * width, area[1] * height * width

  least, most = jnp.round(jnp.sqrt(least_area / ratio)), jnp.round(jnp.sqrt(most_area / ratio))
  widest = jnp.floor((width + 0.5) / ratio)
  widest -= jnp.round(widest * ratio) > width
  most = jnp.minimum(jnp.where(jnp.round(most * ratio) > width, widest, most), height)
  least = jnp.minimum(least, most)
  rows = least + jnp.floor(numbers[law.ATTEMPTS : -2] * (most - least + 1))
  rows += rows * jnp.round(rows * ratio) < least_area
  rows -= rows * jnp.round(rows * ratio) > most_area
  columns = jnp.round(rows * ratio)

  covered = rows * columns
  good = (covered >= least_area) & (covered <= most_area) & (covered / (height * width) >= law.MIN_COVERED)
  good &= (rows >= 1) & (columns >= 1) & (rows <= height) & (columns <= width)
  first = jnp.argmax(good)
  side = jnp.where(good.any(), jnp.stack([rows[first], columns[first]]), jnp.stack([height, width]))
  # The reference never draws the last position.
  corner = jnp.floor(numbers[-2:] * (jnp.stack([height, width]) - side))
  return jnp.concatenate([corner, side]).astype(jnp.int32)


def crop_and_resize(image, box, size):
  """Returns float[..., size, size, 3], a crop resized: bicubic, half-pixel centres, no antialiasing, no clip.

  Args:
    image: float[..., H, W, 3], or u8, which is divided by 255.
    box: int[..., 4], (y, x, height, width), of each image or of all.
    size: int.
  """
  image = _unit(image, image.dtype)
  rows, columns = _cubic_weights(box, image, size)
  return _product(rows, columns, image)


def center_crop(image, size):
  """Returns float[..., size, size, 3], the evaluation's crop of float[..., H, W, 3] in [0, 1] or u8, in [0, 1].

  The central square of 0.875 of the shorter side is resized. Where `size` is at
  most 32, an image that has it already is taken as it is.
  """
  height, width = image.shape[-3:-1]
  if size <= law.SMALL_IMAGE and height == width == size:
    return jnp.clip(_unit(image, image.dtype), 0.0, 1.0)
  side = round(law.EVALUATION_SHARE * min(height, width))
  y, x = (height - side + 1) // 2, (width - side + 1) // 2
  square = image[..., y : y + side, x : x + side, :]
  return jnp.clip(crop_and_resize(square, [0, 0, side, side], size), 0.0, 1.0)


def example_keys(seed, epoch, index):
  """Returns the keys key[N] of examples, each a function of (seed, epoch, index) whatever is beside it.

  Args:
    seed: int.
    epoch: i32[N].
    index: i32[N], of the example in its data set.
  """
  # Said outright: with the generator `rbg`, what vmap draws for one key depends on the others.
  key = jax.random.key(seed, impl="threefry2x32")
  return jax.vmap(lambda epoch, index: jax.random.fold_in(jax.random.fold_in(key, epoch), index))(epoch, index)


def distorted_pairs(
  views,
  keys,
  *,
  color_strength=1.0,
  brightness="multiplicative",
  color_probability=0.8,
  grayscale_probability=0.2,
  blur=True,
  blur_probability=0.5,
  blur_sigma=(0.1, 2.0),
  dtype=jnp.float32,
):
  """Returns views after the random colours and blur, `dtype`[N, V, H, W, 3] in [0, 1].

  The reference's law from the crop on: colour jitter, grayscale, clip, blur, clip. The blur's sigma is drawn per image
  and view; the reference draws it per view and replica.

  Args:
    views: u8[N, V, H, W, 3], or float (then not clipped before the first operation); two of each image in pretraining.
    keys: key[N], of `example_keys`.
    color_strength: s of the paper: factors go up to 1 + 0.8 s, the hue turns by up to 0.2 s.
    brightness: "multiplicative" (SimCLR v2) or "additive" (v1).
    color_probability, grayscale_probability, blur_probability: of the three coins.
    blur: whether there is any blur.
    blur_sigma: range of the blur's sigma in pixels.
    dtype: of the result and of the blur's products; the colours are computed in at least float32.
  """
  law.check_color(color_strength, brightness)
  shape = [views.shape[1], 9]
  numbers = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, 1), shape, jnp.float32))(keys)
  numbers = iter(jnp.moveaxis(numbers, -1, 0))  # each f32[N, V]
  additive = brightness == "additive"
  factors = [low + (high - low) * next(numbers) for low, high in law.color_ranges(color_strength, additive)]
  order = jnp.asarray(law.ORDERS)[(next(numbers) * len(law.ORDERS)).astype(jnp.int32)]
  colored, gray, blurred = (next(numbers) < p for p in (color_probability, grayscale_probability, blur_probability))
  low, high = blur_sigma
  sigma = jnp.where(blurred, low + (high - low) * next(numbers), NO_BLUR)
  factors, order, colored, gray, sigma = _materialised((jnp.stack(factors, -1), order, colored, gray, sigma))

  views = _unit(views, dtype)
  views = jnp.where(_per_image(colored)[..., None], _jittered(views, factors, order, additive, dtype), views)
  planes = _planes(_wide(views))
  planes = [jnp.clip(jnp.where(_per_image(gray), _luma(planes), x), 0.0, 1.0) for x in planes]
  views = _image(planes, dtype)
  if blur:
    views = jnp.clip(gaussian_blur(_materialised(views), sigma, views.shape[-3] // 10), 0.0, 1.0)
  return views


def two_views(images, keys, *, size, flip=True, area=(0.08, 1.0), aspect=(3 / 4, 4 / 3), dtype=jnp.float32, **colors):
  """Returns two independent views of each image for pretraining, `dtype`[N, 2, size, size, 3] in [0, 1].

  Args:
    images: u8[N, H, W, 3], or float in [0, 1].
    keys: key[N], of `example_keys`.
    size: of the views.
    flip: whether half of the views are mirrored.
    area, aspect: ranges of the crop, as in `crop_box`.
    dtype, **colors: as in `distorted_pairs`.
  """
  views = _cropped(images, keys, 2, size=size, flip=flip, area=area, aspect=aspect, dtype=dtype)
  return distorted_pairs(views, keys, dtype=dtype, **colors)


def train_view(images, keys, *, size, flip=True, area=(0.08, 1.0), aspect=(3 / 4, 4 / 3)):
  """Returns a random crop and flip of each image, f32[N, size, size, 3] in [0, 1], the law of supervised training.

  Args:
    images, keys, size, flip, area, aspect: as in `two_views`.
  """
  views = _cropped(images, keys, 1, size=size, flip=flip, area=area, aspect=aspect, dtype=jnp.float32)
  return jnp.clip(views[:, 0], 0.0, 1.0)


def _cropped(images, keys, count, *, size, flip, area, aspect, dtype):
  """Returns `count` random crops of each image, float[N, count, size, size, 3], not clipped; half of them mirrored."""
  height, width = images.shape[1:3]

  def draw(key):
    box_key, coin_key = jax.random.split(key)
    box = crop_box(box_key, height, width, area=area, aspect=aspect)
    return box, jax.random.uniform(coin_key, [], jnp.float32) < 0.5

  view_keys = jax.vmap(lambda key: jax.random.split(jax.random.fold_in(key, 0), count))(keys)
  boxes, mirrored = jax.vmap(jax.vmap(draw))(view_keys)
  images = _unit(images, dtype)[:, None]
  rows, columns = _cubic_weights(boxes, images, size)
  if flip:
    columns = jnp.where(mirrored[..., None, None], columns[..., ::-1, :], columns)
  return _product(rows, columns, images)


def _cubic_weights(box, image, size):
  """Returns the matrices [..., size, H] and [..., size, W] that crop and resize the rows and columns of an image.

  Keys' kernel with a = -0.5. What it would take from outside the box is dropped, and the rest made 1 again.
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


def _jittered(image, factors, order, additive, dtype):
  """Returns `color_jitter` of `image`, kept as `dtype` between the operations but computed in at least float32."""
  wide = _wide(image).dtype
  factors, order = jnp.asarray(factors, wide), jnp.asarray(order)
  bright, contrasted, saturated, turn = (_per_image(factors[..., i], wide) for i in range(4))

  def step(image, operation):
    operation = _per_image(operation)
    planes = _planes(_wide(image))
    # Brightness and contrast are both a factor and a shift of each channel.
    factor = jnp.where(operation == CONTRAST, contrasted, 1.0 if additive else bright)
    constant = bright if additive else 0.0
    means = [_mean(x) for x in planes]
    shifts = [jnp.where(operation == CONTRAST, (1.0 - contrasted) * mean, constant) for mean in means]
    plain = [factor * x + shift for x, shift in zip(planes, shifts, strict=True)]
    colored = _repainted(planes, operation == SATURATION, saturated, jnp.where(operation == HUE, turn, 0.0))
    planes = [jnp.where(operation < SATURATION, x, y) for x, y in zip(plain, colored, strict=True)]
    return _image([jnp.clip(x, 0.0, 1.0) for x in planes], dtype), None

  # Four turns whatever the data; the body is compiled once, and its result is kept as `_materialised` wants it.
  return jax.lax.scan(step, image.astype(dtype), jnp.moveaxis(order, -1, 0))[0]


def _repainted(planes, saturates, factor, turn):
  """Returns the planes with their HSV saturation scaled by `factor` where `saturates`, and their hue turned.

  Without a way through HSV: value minus chroma times a ramp of the hue.
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
  # One sum over all the pixels loses digits on a CPU, which adds them one after the other.
  return plane.mean(-1, keepdims=True).mean(-2, keepdims=True)


def _luma(planes):
  return sum(weight * x for weight, x in zip(law.LUMA, planes, strict=True))


def _unit(image, dtype):
  """Returns `image` in `dtype`, but at least float32; u8 is divided by 255."""
  if jnp.issubdtype(dtype, jnp.integer):
    dtype = jnp.float32
  wide = image.astype(jnp.promote_types(dtype, jnp.float32))
  return wide / 255.0 if image.dtype == jnp.uint8 else wide


def _wide(image):
  return image.astype(jnp.promote_types(image.dtype, jnp.float32))


def _planes(image):
  """Returns the channels [..., H, W]: a pixel's three numbers are then elementwise arithmetic."""
  return [image[..., channel] for channel in range(3)]


def _image(planes, dtype):
  return jnp.stack(planes, -1).astype(dtype)


def _per_image(number, dtype=None):
  """Returns a number of each image with axes for the pixels, or one number of all images."""
  number = jnp.asarray(number, dtype)
  return number[..., None, None] if number.ndim else number


def _materialised(arrays):
  """Returns what it is given, computed once.

  XLA on CPU fuses a chain of elementwise operations whole, and then computes a pixel's first numbers, and the random
  numbers of its image, again for each use in the last: 3 s where this takes 10 ms.
  """
  return jax.lax.optimization_barrier(arrays)
