"""The reference's augmentation in TensorFlow, for tf.data: its operations, and random views as functions of a seed."""

import tensorflow as tf

from simclr_jax.data import decode
from simclr_jax.data import distortion as distortion_lib
from simclr_jax.data.distortion import Distortion

# The raw ops, because the Python wrapper tf.image.resize adds a dozen others to each.
RESIZES = dict(zip(distortion_lib.RESIZES, (tf.raw_ops.ResizeBicubic, tf.raw_ops.ResizeBilinear), strict=True))

Array = tf.types.experimental.TensorLike


def brightness(image: Array, factor: Array, additive: bool = False) -> tf.Tensor:
  """Returns `image` times `factor` (SimCLR v2), or plus `factor` (v1); f32[..., H, W, 3], not clipped."""
  image = tf.convert_to_tensor(image)
  return image + factor if additive else image * factor


def contrast(image: Array, factor: Array) -> tf.Tensor:
  """Returns f32[..., H, W, 3] with each channel's distance from its mean scaled; not clipped."""
  return tf.image.adjust_contrast(image, factor)


def saturation(image: Array, factor: Array) -> tf.Tensor:
  """Returns f32[..., H, W, 3] with the HSV saturation scaled by `factor` and clipped to [0, 1]."""
  return tf.image.adjust_saturation(image, factor)


def hue(image: Array, factor: Array) -> tf.Tensor:
  """Returns f32[..., H, W, 3] with the HSV hue shifted by `factor` turns."""
  return tf.image.adjust_hue(image, factor)


def to_grayscale(image: Array) -> tf.Tensor:
  """Returns f32[..., H, W, 3], the luma of `image` in all three channels."""
  image = tf.convert_to_tensor(image)
  luma = tf.tensordot(image, tf.constant(distortion_lib.LUMA, image.dtype), 1)
  return tf.stack([luma] * 3, axis=-1)


def color_jitter(image: Array, factors: Array, order: Array, additive: bool = False) -> tf.Tensor:
  """Returns f32[..., H, W, 3] after the four colour operations, clipped to [0, 1] after each.

  `factors` f32[4] are those of brightness, contrast, saturation and hue; `order` i32[4] is a permutation of their
  numbers 0 to 3: the order in which they are applied.
  """
  operations = [lambda x, f: brightness(x, f, additive), contrast, saturation, hue]
  order = tf.convert_to_tensor(order, tf.int32)
  for position in range(4):
    branches = [lambda x=image, o=o, f=factors[i]: o(x, f) for i, o in enumerate(operations)]
    image = tf.clip_by_value(tf.switch_case(order[position], branches), 0.0, 1.0)
  return image


def gaussian_blur(image: Array, sigma: Array, size: int) -> tf.Tensor:
  """Returns f32[..., H, W, 3] blurred by a Gaussian of 2 * (size // 2) + 1 taps, with zero padding.

  `sigma` is the standard deviation in pixels. `size` is a tenth of the image's side in the reference: 23, 9, 7 and 3
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


def crop_box(
  seed: Array,
  height: Array,
  width: Array,
  *,
  area: tuple[float, float] = (0.08, 1.0),
  aspect: tuple[float, float] = (3 / 4, 4 / 3),
) -> tf.Tensor:
  """Returns a random crop i32[4] (y, x, height, width), a function of `seed` int[2], distributed as the reference's.

  `area` is the range of the crop's area as a share of the image's (crops below a share of 0.1 are never drawn),
  `aspect` that of width / height.
  """
  begin, extent, _ = tf.image.stateless_sample_distorted_bounding_box(
    tf.stack([height, width, 3]),
    tf.constant([[[0.0, 0.0, 1.0, 1.0]]]),
    seed,
    min_object_covered=distortion_lib.MIN_COVERED,
    aspect_ratio_range=aspect,
    area_range=area,
    max_attempts=distortion_lib.ATTEMPTS,
    use_image_if_no_bounding_boxes=True,
  )
  return tf.concat([begin[:2], extent[:2]], 0)


def crop_and_resize(image: Array, box: Array, size: int) -> tf.Tensor:
  """Returns f32[..., size, size, 3], a crop resized: bicubic, half-pixel centres, no antialiasing, not clipped.

  `image` is f32[..., H, W, 3], or u8, which is divided by 255; `box` is int[4], (y, x, height, width).
  """
  y, x, height, width = tf.unstack(box)
  crop, shape = _as_batch(tf.convert_to_tensor(image)[..., y : y + height, x : x + width, :])
  resized = RESIZES["bicubic"](images=crop, size=[size, size], half_pixel_centers=True)
  return tf.reshape(resized, tf.concat([shape[:-3], [size, size, 3]], 0))


def center_crop(image: Array, size: int) -> tf.Tensor:
  """Returns f32[..., size, size, 3], the evaluation's crop, in [0, 1].

  The central square of 0.875 of the shorter side is resized. An image of `size` by `size` is taken whole where `size`
  is at most 32.
  """
  image = tf.convert_to_tensor(image)
  height, width = tf.unstack(tf.shape(image)[-3:-1])

  def crop():
    shorter = tf.cast(tf.minimum(height, width), tf.float32)
    side = tf.cast(tf.math.rint(distortion_lib.EVALUATION_SHARE * shorter), tf.int32)
    return crop_and_resize(image, [(height - side + 1) // 2, (width - side + 1) // 2, side, side], size)

  whole = lambda: crop_and_resize(image, [0, 0, height, width], size)  # the identity, as the size stays
  uncropped = tf.logical_and(tf.equal(height, size), tf.equal(width, size))
  return tf.clip_by_value(tf.cond(uncropped, whole, crop) if size <= distortion_lib.SMALL_IMAGE else crop(), 0.0, 1.0)


def resized_center(image: Array, size: int) -> tf.Tensor:
  """Returns f32[..., size, size, 3] in [0, 1]: the shorter side resized to `size`, then the central square.

  The preprocessing of the paper's transfer experiments (appendix B.8). Resized as by `crop_and_resize`, then clipped;
  an image of `size` by `size` is returned unchanged.
  """
  image = tf.convert_to_tensor(image)
  height, width = tf.unstack(tf.shape(image)[-3:-1])
  shorter = tf.cast(tf.minimum(height, width), tf.float32)
  resized = [tf.cast(tf.math.rint(tf.cast(side, tf.float32) * size / shorter), tf.int32) for side in (height, width)]
  image, shape = _as_batch(image)
  image = RESIZES["bicubic"](images=image, size=resized, half_pixel_centers=True)
  y, x = ((side - size) // 2 for side in resized)
  square = tf.clip_by_value(image[:, y : y + size, x : x + size], 0.0, 1.0)
  return tf.reshape(square, tf.concat([shape[:-3], [size, size, 3]], 0))


def pretrain_view(image: Array, seed: Array, distortion: Distortion) -> tf.Tensor:
  """Returns a random view f32[size, size, 3] in [0, 1] for pretraining, a function of `seed`.

  As in the reference: crop (bicubic), flip, colour jitter, grayscale, clip, blur, clip. The blur's sigma is drawn per
  image; the reference draws it per view and replica. `image` is f32[H, W, 3] in [0, 1], or u8.
  """
  crop_seed, number_seed = tf.unstack(_split(seed))
  numbers = iter(tf.unstack(tf.random.stateless_uniform([10], number_seed)))
  view = _crop_and_flip(image, crop_seed, next(numbers), distortion)
  sometimes = lambda probability, change, x: tf.cond(next(numbers) < probability, lambda: change(x), lambda: x)

  factors = [low + (high - low) * next(numbers) for low, high in distortion.color_ranges]
  order = tf.gather(distortion_lib.ORDERS, tf.cast(next(numbers) * len(distortion_lib.ORDERS), tf.int32))
  jitter = lambda x: color_jitter(x, factors, order, distortion.additive)
  view = sometimes(distortion.color_probability, jitter, view)
  view = tf.clip_by_value(sometimes(distortion.grayscale_probability, to_grayscale, view), 0.0, 1.0)
  if distortion.blur_probability > 0:
    low, high = distortion.blur_sigma
    sigma = low + (high - low) * next(numbers)
    blur = lambda x: tf.clip_by_value(gaussian_blur(x, sigma, distortion.size // 10), 0.0, 1.0)
    view = sometimes(distortion.blur_probability, blur, view)
  return tf.ensure_shape(view, [distortion.size, distortion.size, 3])


def two_views(content: Array, seed: Array, distortion: Distortion) -> tf.Tensor:
  """Returns two independent views f32[2, size, size, 3] of an image, or of its encoded bytes; see `pretrain_view`."""
  image = decode.decode_image(content)
  return tf.stack([pretrain_view(image, view_seed, distortion) for view_seed in tf.unstack(_split(seed))])


def two_crops(content: Array, seed: Array, distortion: Distortion) -> tf.Tensor:
  """Returns two random crops u8[2, size, size, 3]: those of `two_views` for this seed, before their colours change.

  The overshoot of bicubic interpolation is clipped and the rest rounded. Of a JPEG only the rectangle that contains
  both crops is decoded, once. `content` is an image u8[H, W, 3], or its encoded bytes.
  """
  views = [tf.unstack(_split(view_seed)) for view_seed in tf.unstack(_split(seed))]
  coins = [tf.random.stateless_uniform([10], numbers)[0] for _, numbers in views]
  image, boxes = _covering(content, [crop_seed for crop_seed, _ in views], distortion)
  crops = zip(tf.unstack(boxes), coins, strict=True)
  return tf.stack([_uint8_crop(image, box, coin, distortion) for box, coin in crops])


def train_view(content: Array, seed: Array, distortion: Distortion) -> tf.Tensor:
  """Returns a random crop (bicubic) and flip f32[size, size, 3] in [0, 1], the augmentation of supervised training.

  `content` is an image, f32[H, W, 3] in [0, 1] or u8, or its encoded bytes.
  """
  crop_seed, number_seed = tf.unstack(_split(seed))
  coin = tf.random.stateless_uniform([], number_seed)
  image = decode.decode_image(content)
  return tf.clip_by_value(_crop_and_flip(image, crop_seed, coin, distortion), 0.0, 1.0)


def train_crop(content: Array, seed: Array, distortion: Distortion) -> tf.Tensor:
  """Returns the `train_view` for this seed as u8[size, size, 3]; see `two_crops`."""
  crop_seed, number_seed = tf.unstack(_split(seed))
  coin = tf.random.stateless_uniform([], number_seed)
  image, boxes = _covering(content, [crop_seed], distortion)
  return _uint8_crop(image, boxes[0], coin, distortion)


def eval_view(content: Array, *, size: int) -> tf.Tensor:
  """Returns the evaluation's `center_crop` f32[size, size, 3] of one image, f32[H, W, 3] in [0, 1], u8, or encoded."""
  return tf.ensure_shape(center_crop(decode.decode_image(content), size), [size, size, 3])


def transfer_view(content: Array, *, size: int) -> tf.Tensor:
  """Returns the `resized_center` f32[size, size, 3] of one image, f32[H, W, 3] in [0, 1], u8, or encoded."""
  return tf.ensure_shape(resized_center(decode.decode_image(content), size), [size, size, 3])


def _split(seed):
  return tf.random.experimental.stateless_split(seed, 2)


def _covering(content, seeds, distortion):
  """Returns the part u8[h, w, 3] of a JPEG that contains its random crops, or all of another image, and their boxes.

  The boxes i32[len(seeds), 4] are relative to that part.
  """
  content = tf.convert_to_tensor(content)

  def boxes_in(height, width):
    return tf.stack([crop_box(s, height, width, area=distortion.area, aspect=distortion.aspect) for s in seeds])

  def part_of_jpeg():
    height, width, _ = tf.unstack(tf.image.extract_jpeg_shape(content))
    boxes = boxes_in(height, width)
    # One more column on either side: JPEG interpolates colour between columns, so those at an edge come out wrong.
    begin = tf.maximum(tf.reduce_min(boxes[:, :2], 0) - [0, 1], 0)
    end = tf.minimum(tf.reduce_max(boxes[:, :2] + boxes[:, 2:], 0) + [0, 1], [height, width])
    image = tf.image.decode_and_crop_jpeg(content, tf.concat([begin, end - begin], 0), channels=3)
    return image, boxes - tf.pad(begin, [[0, 2]])

  def whole():
    image = decode.decode_image(content)
    height, width, _ = tf.unstack(tf.shape(image))
    return image, boxes_in(height, width)

  return tf.cond(tf.io.is_jpeg(content), part_of_jpeg, whole) if content.dtype == tf.string else whole()


def _uint8_crop(image, box, coin, distortion):
  """Returns a crop of u8[H, W, 3] resized to u8[size, size, 3], mirrored if `coin` is below 0.5 and flips are on."""
  size = distortion.size
  y, x, height, width = tf.unstack(box)
  # Cast first: on uint8 the op gives the same numbers in twice the time, as it converts a pixel at each use.
  crop = tf.cast(tf.slice(image, [y, x, 0], [height, width, 3]), tf.float32)
  view = RESIZES[distortion.resize](images=crop[None], size=[size, size], half_pixel_centers=True)[0]
  # One op that clips to 0..255 and rounds to u8, halves to even.
  view, _, _ = tf.raw_ops.QuantizeV2(
    input=view, min_range=0.0, max_range=255.0, T=tf.quint8, mode="SCALED", round_mode="HALF_TO_EVEN"
  )
  view = tf.bitcast(view, tf.uint8)
  if distortion.flip:
    view = tf.raw_ops.Reverse(tensor=view, dims=tf.stack([False, coin < 0.5, False]))
  return tf.ensure_shape(view, [size, size, 3])


def _crop_and_flip(image, seed, coin, distortion):
  """Returns a random crop f32[size, size, 3], not clipped; mirrored if `coin` is below 0.5 and flips are on."""
  height, width = tf.unstack(tf.shape(image)[:2])
  box = crop_box(seed, height, width, area=distortion.area, aspect=distortion.aspect)
  view = crop_and_resize(image, box, distortion.size)
  view = tf.ensure_shape(view, [distortion.size, distortion.size, 3])
  return tf.cond(coin < 0.5, lambda: tf.reverse(view, [1]), lambda: view) if distortion.flip else view


def _as_batch(image):
  """Returns f32[..., H, W, C], or u8 divided by 255, as one batch f32[N, H, W, C], and its original shape."""
  image = tf.convert_to_tensor(image)
  image = tf.cast(image, tf.float32) / 255.0 if image.dtype == tf.uint8 else image
  shape = tf.shape(image)
  batch = image[None] if image.shape.rank == 3 else tf.reshape(image, tf.concat([[-1], shape[-3:]], 0))
  return batch, shape
