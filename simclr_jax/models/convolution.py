"""Convolution of images with gradients that are fast on a CPU too; on other devices it is XLA's own.

XLA's CPU backend has a fast path for float32 convolutions in the form of a forward pass. The gradients that JAX
derives miss it inside a loop, where they take about fifty times as long (github.com/jax-ml/jax/issues/12868); kernel
gradients are slow outside a loop as well, because they read the whole batch for each entry. Here both gradients are
forward convolutions, and a kernel gradient adds up over a few images at a time, which fit in the cache. Float64 has no
fast path and is computed as one matrix product per tap (entry of the kernel's height and width).
"""

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import ad_checkpoint

# Name of the output for rematerialisation policies.
NAME = "convolution"
NUMBERS = ("NHWC", "HWIO", "NHWC")

# Images in one part of a kernel gradient, by measurement: SMALL_PARTS where the output has fewer than FEW_PLACES
# pixels, else LARGE_PARTS.
LARGE_PARTS, SMALL_PARTS, FEW_PLACES = 8, 32, 8 * 8 + 1

Pair = tuple[int, int]
Padding = tuple[Pair, Pair]


def convolve(
  images: jax.Array, kernel: jax.Array, strides: Sequence[int], padding: Sequence[Sequence[int]], **rest: Any
) -> jax.Array:
  """Returns f[N, H', W', O] of images f[N, H, W, I] and a kernel f[h, w, I, O], both of one dtype.

  `padding` is (before, after) for height and width, `rest` what Linen's `Conv` gives to `jax.lax.conv_general_dilated`
  beside; dilation, groups, another layout or a precision is a NotImplementedError.
  """
  supported = {
    "lhs_dilation": (1, 1),
    "rhs_dilation": (1, 1),
    "dimension_numbers": jax.lax.conv_dimension_numbers(images.shape, kernel.shape, NUMBERS),
    "feature_group_count": 1,
    "precision": None,
  }
  other = {name: value for name, value in rest.items() if name not in supported or value != supported[name]}
  if other:
    raise NotImplementedError(f"a convolution with {other}")
  result = _convolve(images, kernel, tuple(strides), tuple(map(tuple, padding)))
  # Policies go by this name, because they do not look inside functions with a custom gradient.
  return ad_checkpoint.checkpoint_name(result, NAME)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _convolve(images: jax.Array, kernel: jax.Array, strides: Pair, padding: Padding) -> jax.Array:
  if images.dtype == jnp.float64:
    return _by_taps(images, kernel, strides, padding)
  return _native(images, kernel, strides, padding)


def _forward(images, kernel, strides, padding):
  return _convolve(images, kernel, strides, padding), (images, kernel)


def _backward(strides, padding, saved, cotangent):
  images, kernel = saved

  def own(images, kernel, cotangent):
    arguments = (images, kernel, cotangent, strides, padding)
    return _images_gradient(*arguments), _kernel_gradient(*arguments)

  def xla(images, kernel, cotangent):
    return jax.vjp(lambda x, k: _native(x, k, strides, padding), images, kernel)[1](cotangent)

  return jax.lax.platform_dependent(images, kernel, cotangent, cpu=own, default=xla)


_convolve.defvjp(_forward, _backward)


def _native(images, kernel, strides, padding):
  return jax.lax.conv_general_dilated(images, kernel, strides, padding, dimension_numbers=NUMBERS)


def _taps(images, kernel, strides, padding, size) -> Iterator[tuple[int, int, jax.Array]]:
  """Yields (y, x, f[N, H', W', I]), the pixels that kernel[y, x] multiplies, for an output of `size` (H', W')."""
  padded = jnp.pad(images, ((0, 0), *padding, (0, 0)))
  for y in range(kernel.shape[0]):
    for x in range(kernel.shape[1]):
      end = (y + (size[0] - 1) * strides[0] + 1, x + (size[1] - 1) * strides[1] + 1)
      yield y, x, jax.lax.slice(padded, (0, y, x, 0), (len(padded), *end, padded.shape[3]), (1, *strides, 1))


def _by_taps(images, kernel, strides, padding):
  size = jax.eval_shape(lambda x, k: _native(x, k, strides, padding), images, kernel).shape[1:3]
  taps = _taps(images, kernel, strides, padding, size)
  return sum(jnp.einsum("nhwi,io->nhwo", pixels, kernel[y, x]) for y, x, pixels in taps)


def _kernel_gradient(images, kernel, cotangent, strides, padding):
  """Returns the kernel's gradient: the correlation of images and cotangent over batch and pixels."""
  if kernel.shape[:2] == (1, 1) or kernel.dtype == jnp.float64:
    taps = _taps(images, kernel, strides, padding, cotangent.shape[1:3])
    return jnp.stack([jnp.einsum("nhwi,nhwo->io", pixels, cotangent) for *_, pixels in taps]).reshape(kernel.shape)
  size = math.gcd(len(cotangent), SMALL_PARTS if math.prod(cotangent.shape[1:3]) < FEW_PLACES else LARGE_PARTS)
  if size < LARGE_PARTS:
    return _correlation(images, kernel, cotangent, strides, padding)
  # A part takes images at equal distances in the batch, so that nothing moves between devices.
  images, cotangent = (x.reshape(size, -1, *x.shape[1:]) for x in (images, cotangent))
  part = lambda x, number: jax.lax.dynamic_index_in_dim(x, number, axis=1, keepdims=False)
  add = lambda number, total: (
    total + _correlation(part(images, number), kernel, part(cotangent, number), strides, padding).astype(total.dtype)
  )
  zeros = jnp.zeros(kernel.shape, jnp.promote_types(kernel.dtype, jnp.float32))
  return jax.lax.fori_loop(0, images.shape[1], add, zeros).astype(kernel.dtype)


def _correlation(images, kernel, cotangent, strides, padding):
  # The output of this convolution has the size of the kernel: padding after the images is what that takes, and may be
  # negative.
  ends = [
    tap + (size - 1) * stride - have - before
    for tap, size, stride, have, (before, _) in zip(
      kernel.shape[:2], cotangent.shape[1:3], strides, images.shape[1:3], padding, strict=True
    )
  ]
  images, cotangent = images.transpose(3, 1, 2, 0), cotangent.transpose(1, 2, 0, 3)
  pads = [(before, end) for (before, _), end in zip(padding, ends, strict=True)]
  options = {"rhs_dilation": strides, "dimension_numbers": NUMBERS}
  gradient = jax.lax.conv_general_dilated(images, cotangent, (1, 1), pads, **options)  # [I, h, w, O]
  return gradient.transpose(1, 2, 0, 3)


def _images_gradient(images, kernel, cotangent, strides, padding):
  """Returns the images' gradient: the cotangent, dilated by the strides, convolved with the mirrored kernel."""
  sizes, taps = images.shape[1:3], kernel.shape[:2]
  spread = [(size - 1) * stride + 1 for size, stride in zip(cotangent.shape[1:3], strides, strict=True)]
  before = [tap - 1 - low for tap, (low, _) in zip(taps, padding, strict=True)]
  after = [size + tap - 1 - s - b for size, tap, s, b in zip(sizes, taps, spread, before, strict=True)]
  mirrored = jnp.flip(kernel, (0, 1)).swapaxes(2, 3)
  interior = [(0, 0, 0), *((b, a, s - 1) for b, a, s in zip(before, after, strides, strict=True)), (0, 0, 0)]
  cotangent = jax.lax.pad(cotangent, jnp.zeros((), cotangent.dtype), interior)
  no_padding = ((0, 0), (0, 0))
  if cotangent.dtype == jnp.float64:
    return _by_taps(cotangent, mirrored, (1, 1), no_padding)
  return _native(cotangent, mirrored, (1, 1), no_padding)
