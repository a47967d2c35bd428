"""Decoding of images by TensorFlow, which is kept away from the accelerators."""

import tensorflow as tf

tf.config.set_visible_devices([], "GPU")  # JAX needs the accelerators' whole memory


def decode_image(content: tf.types.experimental.TensorLike) -> tf.Tensor:
  """Returns u8[H, W, 3] for the bytes of a JPEG, PNG, BMP, GIF (its first frame) or WebP image; an image as it is."""
  content = tf.convert_to_tensor(content)
  if content.dtype != tf.string:
    return content
  return tf.ensure_shape(tf.io.decode_image(content, channels=3, expand_animations=False), [None, None, 3])
