"""The reference's augmentation in TensorFlow: exact operations, and seeded random views for tf.data."""

import tensorflow as tf

from simclr_jax.data import law, sources

tf.config.set_visible_devices([], "GPU")  # the accelerators belong to JAX

# The ops behind tf.image.resize, whose Python wrapper costs a dozen more.
RESIZES = dict(zip(law.RESIZES, (tf.raw_ops.ResizeBicubic, tf.raw_ops.ResizeBilinear), strict=True))


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
  luma = tf.tensordot(image, tf.constant(law.LUMA, image.dtype), 1)
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
    min_object_covered=law.MIN_COVERED,
    aspect_ratio_range=aspect,
    area_range=area,
    max_attempts=law.ATTEMPTS,
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
  resized = RESIZES["bicubic"](images=crop, size=[size, size], half_pixel_centers=True)
  return tf.reshape(resized, tf.concat([shape[:-3], [size, size, 3]], 0))


def center_crop(image, size):
  """Returns f32[..., size, size, 3], the evaluation's crop, in [0, 1].

  The central square of 0.875 of the shorter side is resized. Where `size` is at
  most 32, an image that has it already is taken as it is.
  """
  image = tf.convert_to_tensor(image)
  height, width = tf.unstack(tf.shape(image)[-3:-1])

  def crop():
    side = tf.cast(tf.math.rint(law.EVALUATION_SHARE * tf.cast(tf.minimum(height, width), tf.float32)), tf.int32)
    return crop_and_resize(image, [(height - side + 1) // 2, (width - side + 1) // 2, side, side], size)

  def whole():
    return crop_and_resize(image, [0, 0, height, width], size)  # of its own size: the same numbers

  as_it_is = tf.logical_and(tf.equal(height, size), tf.equal(width, size))
  return tf.clip_by_value(tf.cond(as_it_is, whole, crop) if size <= law.SMALL_IMAGE else crop(), 0.0, 1.0)


def resized_center(image, size):
  """Returns f32[..., size, size, 3] in [0, 1]: the shorter side resized to `size`, then the central square.

  Bicubic with half-pixel centres and no antialiasing, as `crop_and_resize` and the images of pretraining, clipped. An
  image that is `size` by `size` already is taken as it is.
  """
  image = tf.convert_to_tensor(image)
  height, width = tf.unstack(tf.shape(image)[-3:-1])
  shorter = tf.cast(tf.minimum(height, width), tf.float32)
  resized = [tf.cast(tf.math.rint(tf.cast(side, tf.float32) * size / shorter), tf.int32) for side in (height, width)]
  image, shape = _as_batch(tf.cast(image, tf.float32) / 255.0 if image.dtype == tf.uint8 else image)
  image = RESIZES["bicubic"](images=image, size=resized, half_pixel_centers=True)
  y, x = ((side - size) // 2 for side in resized)
  square = tf.clip_by_value(image[:, y : y + size, x : x + size], 0.0, 1.0)
  return tf.reshape(square, tf.concat([shape[:-3], [size, size, 3]], 0))


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
  law.check_color(color_strength, brightness)
  crop_seed, number_seed = tf.unstack(_split(seed))
  numbers = iter(tf.unstack(tf.random.stateless_uniform([10], number_seed)))
  view = _crop_and_flip(image, crop_seed, next(numbers), size=size, flip=flip, area=area, aspect=aspect)

  additive = brightness == "additive"
  ranges = law.color_ranges(color_strength, additive)
  factors = [low + (high - low) * next(numbers) for low, high in ranges]
  order = tf.gather(law.ORDERS, tf.cast(next(numbers) * len(law.ORDERS), tf.int32))
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


def two_views(content, seed, *, size, **knobs):
  """Returns two independent views f32[2, size, size, 3]; `knobs` are those of `pretrain_view`.

  The content is an image, f32[H, W, 3] in [0, 1] or u8, or its encoded bytes.
  """
  image = sources.decode_image(tf.convert_to_tensor(content))
  seeds = tf.unstack(_split(seed))
  return tf.stack([pretrain_view(image, view_seed, size=size, **knobs) for view_seed in seeds])


def two_crops(content, seed, *, size, flip=True, area=(0.08, 1.0), aspect=(3 / 4, 4 / 3), resize="bicubic"):
  """Returns two random crops u8[2, size, size, 3]: those of `two_views` of this seed before their colours change.

  What bicubic interpolation overshoots is clipped, the rest rounded. Of a JPEG only the part that the crops cover is
  decoded, once.

  Args:
    content: an image u8[H, W, 3], or its encoded bytes.
    seed: int[2].
    size, flip, area, aspect: as in `pretrain_view`.
    resize: one of `law.RESIZES`; bilinear is faster, and not the reference's.
  """
  views = [tf.unstack(_split(view_seed)) for view_seed in tf.unstack(_split(seed))]
  coins = [tf.random.stateless_uniform([10], numbers)[0] for _, numbers in views]
  image, boxes = _covering(content, [crop_seed for crop_seed, _ in views], area, aspect)
  return tf.stack(
    [_uint8_crop(image, box, coin, size, flip, resize) for box, coin in zip(tf.unstack(boxes), coins, strict=True)]
  )


def train_view(content, seed, *, size, flip=True, area=(0.08, 1.0), aspect=(3 / 4, 4 / 3)):
  """Returns a random crop and flip f32[size, size, 3] in [0, 1], the law of supervised training.

  The content is an image, f32[H, W, 3] in [0, 1] or u8, or its encoded bytes.
  """
  crop_seed, number_seed = tf.unstack(_split(seed))
  coin = tf.random.stateless_uniform([], number_seed)
  image = sources.decode_image(tf.convert_to_tensor(content))
  view = _crop_and_flip(image, crop_seed, coin, size=size, flip=flip, area=area, aspect=aspect)
  return tf.clip_by_value(view, 0.0, 1.0)


def train_crop(content, seed, *, size, flip=True, area=(0.08, 1.0), aspect=(3 / 4, 4 / 3), resize="bicubic"):
  """Returns the `train_view` of this seed as u8[size, size, 3]; see `two_crops`."""
  crop_seed, number_seed = tf.unstack(_split(seed))
  coin = tf.random.stateless_uniform([], number_seed)
  image, boxes = _covering(content, [crop_seed], area, aspect)
  return _uint8_crop(image, boxes[0], coin, size, flip, resize)


def eval_view(content, *, size):
  """Returns the evaluation's `center_crop` f32[size, size, 3] of one image, f32[H, W, 3] in [0, 1], u8, or encoded."""
  return tf.ensure_shape(center_crop(sources.decode_image(tf.convert_to_tensor(content)), size), [size, size, 3])


def transfer_view(content, *, size):
  """Returns the `resized_center` f32[size, size, 3] of one image, f32[H, W, 3] in [0, 1], u8, or encoded."""
  return tf.ensure_shape(resized_center(sources.decode_image(tf.convert_to_tensor(content)), size), [size, size, 3])


def _split(seed):
  return tf.random.experimental.stateless_split(seed, 2)


def _covering(content, seeds, area, aspect):
  """Returns (u8[h, w, 3], boxes i32[len(seeds), 4] in it): as much of an image as its random crops need."""
  content = tf.convert_to_tensor(content)

  def boxes_in(height, width):
    return tf.stack([crop_box(seed, height, width, area=area, aspect=aspect) for seed in seeds])

  def part_of_jpeg():
    height, width, _ = tf.unstack(tf.image.extract_jpeg_shape(content))
    boxes = boxes_in(height, width)
    # A column more on either side: the colours at the edges of what is decoded miss their neighbours.
    begin = tf.maximum(tf.reduce_min(boxes[:, :2], 0) - [0, 1], 0)
    end = tf.minimum(tf.reduce_max(boxes[:, :2] + boxes[:, 2:], 0) + [0, 1], [height, width])
    image = tf.image.decode_and_crop_jpeg(content, tf.concat([begin, end - begin], 0), channels=3)
    return image, boxes - tf.pad(begin, [[0, 2]])

  def whole():
    image = sources.decode_image(content)
    height, width, _ = tf.unstack(tf.shape(image))
    return image, boxes_in(height, width)

  return tf.cond(tf.io.is_jpeg(content), part_of_jpeg, whole) if content.dtype == tf.string else whole()


def _uint8_crop(image, box, coin, size, flip, resize):
  """Returns a crop of u8[H, W, 3] resized to u8[size, size, 3], mirrored if there is a flip and `coin` is below 0.5."""
  y, x, height, width = tf.unstack(box)
  # The same numbers from uint8 take twice as long: the op converts each pixel again for every one that it makes.
  crop = tf.cast(tf.slice(image, [y, x, 0], [height, width, 3]), tf.float32)
  view = RESIZES[resize](images=crop[None], size=[size, size], half_pixel_centers=True)[0]
  view = _rounded(view)
  if flip:
    view = tf.raw_ops.Reverse(tensor=view, dims=tf.stack([False, coin < 0.5, False]))
  return tf.ensure_shape(view, [size, size, 3])


def _rounded(view):
  """Returns f32[...] clipped to 0..255 and rounded to u8[...], halves to even, in one pass over it."""
  quantized, _, _ = tf.raw_ops.QuantizeV2(
    input=view, min_range=0.0, max_range=255.0, T=tf.quint8, mode="SCALED", round_mode="HALF_TO_EVEN"
  )
  return tf.bitcast(quantized, tf.uint8)


def _crop_and_flip(image, seed, coin, *, size, flip, area, aspect):
  """Returns a random crop f32[size, size, 3], not clipped; mirrored if `coin` is below 0.5."""
  height, width = tf.unstack(tf.shape(image)[:2])
  view = crop_and_resize(image, crop_box(seed, height, width, area=area, aspect=aspect), size)
  view = tf.ensure_shape(view, [size, size, 3])
  return tf.cond(coin < 0.5, lambda: tf.reverse(view, [1]), lambda: view) if flip else view


def _as_batch(image):
  """Returns `image` f32[..., H, W, C] with its leading axes made one, and its shape."""
  image = tf.convert_to_tensor(image)
  shape = tf.shape(image)
  batch = image[None] if image.shape.rank == 3 else tf.reshape(image, tf.concat([[-1], shape[-3:]], 0))
  return batch, shape
