"""Convolution of images whose gradients are fast on a CPU too; elsewhere it is XLA's own.

XLA's CPU backend has a fast path for convolutions written as a forward pass is, in float32. The gradients that JAX
makes miss it inside a loop, where they take about fifty times as long (github.com/jax-ml/jax/issues/12868); weight
gradients are slow outside of one too, because they sweep over the whole batch for each entry. Here both gradients are
forward convolutions, and weight gradients go through a few images at a time, which stay in the cache. Float64, for
which there is no fast path at all, takes a matrix product for each tap of the kernel.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import ad_checkpoint

NAME = "convolution"
NUMBERS = ("NHWC", "HWIO", "NHWC")

# Images that a weight gradient takes at a time: as measured, more of small ones.
LARGE_PARTS, SMALL_PARTS, FEW_PLACES = 8, 32, 8 * 8 + 1


def convolve(images: jax.Array, kernel: jax.Array, strides, padding, **rest) -> jax.Array:
  """Returns f[N, H', W', O] of images f[N, H, W, I] and a kernel f[h, w, I, O].

  Takes the arguments that Linen's `Conv` gives to `jax.lax.conv_general_dilated`; dilation and groups are plain.
  """
  plain = {
    "lhs_dilation": (1, 1),
    "rhs_dilation": (1, 1),
    "dimension_numbers": jax.lax.conv_dimension_numbers(images.shape, kernel.shape, NUMBERS),
    "feature_group_count": 1,
    "precision": None,
  }
  other = {name: value for name, value in rest.items() if name not in plain or value != plain[name]}
  if other:
    raise NotImplementedError(f"a convolution with {other}")
  result = _convolve(images, kernel, tuple(strides), tuple(map(tuple, padding)))
  # What a rematerialisation policy goes by: it does not look into functions that have their own gradients.
  return ad_checkpoint.checkpoint_name(result, NAME)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _convolve(images, kernel, strides, padding):
  if images.dtype == jnp.float64:
    return _by_taps(images, kernel, strides, padding)
  return _native(images, kernel, strides, padding)


def _forward(images, kernel, strides, padding):
  return _convolve(images, kernel, strides, padding), (images, kernel)


def _backward(strides, padding, saved, pull):
  images, kernel = saved

  def own(images, kernel, pull):
    return _images_gradient(images, kernel, pull, strides, padding), _kernel_gradient(
      images, kernel, pull, strides, padding
    )

  def xla(images, kernel, pull):
    return jax.vjp(lambda x, k: _native(x, k, strides, padding), images, kernel)[1](pull)

  return jax.lax.platform_dependent(images, kernel, pull, cpu=own, default=xla)


_convolve.defvjp(_forward, _backward)


def _native(images, kernel, strides, padding):
  return jax.lax.conv_general_dilated(images, kernel, strides, padding, dimension_numbers=NUMBERS)


def _taps(images, kernel, strides, padding, size):
  """Yields (y, x, what the tap at (y, x) of the kernel meets, f[N, H', W', I]) for an output of `size` (H', W')."""
  padded = jnp.pad(images, ((0, 0), *padding, (0, 0)))
  for y in range(kernel.shape[0]):
    for x in range(kernel.shape[1]):
      begin, end = (y, x), (y + (size[0] - 1) * strides[0] + 1, x + (size[1] - 1) * strides[1] + 1)
      met = jax.lax.slice(
        padded, (0, *begin, 0), (padded.shape[0], *end, padded.shape[3]), (1, strides[0], strides[1], 1)
      )
      yield y, x, met


def _by_taps(images, kernel, strides, padding):
  shape = jax.eval_shape(lambda x, k: _native(x, k, strides, padding), images, kernel).shape
  products = (
    jnp.einsum("nhwi,io->nhwo", met, kernel[y, x]) for y, x, met in _taps(images, kernel, strides, padding, shape[1:3])
  )
  return sum(products)


def _kernel_gradient(images, kernel, pull, strides, padding):
  """Returns the correlation of the images with what is pulled back, over batch and places."""
  if kernel.shape[:2] == (1, 1) or kernel.dtype == jnp.float64:
    parts = [
      jnp.einsum("nhwi,nhwo->io", met, pull) for _, _, met in _taps(images, kernel, strides, padding, pull.shape[1:3])
    ]
    return jnp.stack(parts).reshape(kernel.shape)
  some = math.gcd(len(pull), SMALL_PARTS if math.prod(pull.shape[1:3]) < FEW_PLACES else LARGE_PARTS)
  if some < LARGE_PARTS:
    return _correlation(images, kernel, pull, strides, padding)
  # Every so-manieth image, so that nothing moves between devices.
  images, pull = (x.reshape(some, -1, *x.shape[1:]) for x in (images, pull))
  part = lambda x, number: jax.lax.dynamic_index_in_dim(x, number, axis=1, keepdims=False)
  add = lambda number, total: (
    total + _correlation(part(images, number), kernel, part(pull, number), strides, padding).astype(total.dtype)
  )
  zeros = jnp.zeros(kernel.shape, jnp.promote_types(kernel.dtype, jnp.float32))
  return jax.lax.fori_loop(0, images.shape[1], add, zeros).astype(kernel.dtype)


def _correlation(images, kernel, pull, strides, padding):
  # The size of the output, which is the kernel's, decides how much is padded after the images, or cut off.
  ends = [
    tap + (size - 1) * stride - have - before
    for tap, size, stride, have, (before, _) in zip(
      kernel.shape[:2], pull.shape[1:3], strides, images.shape[1:3], padding, strict=True
    )
  ]
  gradient = jax.lax.conv_general_dilated(
    images.transpose(3, 1, 2, 0),
    pull.transpose(1, 2, 0, 3),
    (1, 1),
    [(before, end) for (before, _), end in zip(padding, ends, strict=True)],
    rhs_dilation=strides,
    dimension_numbers=NUMBERS,
  )  # [I, h, w, O]
  return gradient.transpose(1, 2, 0, 3)


def _images_gradient(images, kernel, pull, strides, padding):
  """Returns the convolution of what is pulled back, spread out by the strides, with the kernel mirrored."""
  sizes, taps = images.shape[1:3], kernel.shape[:2]
  spread = [(size - 1) * stride + 1 for size, stride in zip(pull.shape[1:3], strides, strict=True)]
  before = [tap - 1 - low for tap, (low, _) in zip(taps, padding, strict=True)]
  after = [size + tap - 1 - s - b for size, tap, s, b in zip(sizes, taps, spread, before, strict=True)]
  mirrored = jnp.flip(kernel, (0, 1)).swapaxes(2, 3)
  interior = [(0, 0, 0), *((b, a, s - 1) for b, a, s in zip(before, after, strides, strict=True)), (0, 0, 0)]
  pull = jax.lax.pad(pull, jnp.zeros((), pull.dtype), interior)
  no_padding = ((0, 0), (0, 0))
  if pull.dtype == jnp.float64:
    return _by_taps(pull, mirrored, (1, 1), no_padding)
  return _native(pull, mirrored, (1, 1), no_padding)
