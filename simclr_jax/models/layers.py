"""Convolution, batch normalisation and dense layers as encoders and heads use them."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from simclr_jax import errors
from simclr_jax.models import convolution


def at_least_float32(dtype: Any) -> jnp.dtype:
  """Returns the dtype for statistics and outputs of a network that computes in `dtype`."""
  return jnp.promote_types(dtype, jnp.float32)


# Defined once, since Linen compares modules by their fields.
_our_convolution = lambda: convolution.convolve


@dataclasses.dataclass(frozen=True)
class Layers:
  """Creates layers that compute in `dtype` with parameters in `param_dtype`."""

  dtype: Any
  param_dtype: Any

  def conv(self, features: int, kernel: int, stride: int = 1, *, bias: bool = False, name: str) -> nn.Conv:
    """Returns a convolution whose padding depends only on the kernel, as in the reference.

    At stride 1 this is SAME; at stride 2, SAME would shift even-sized images by one pixel.
    """
    before = (kernel - 1) // 2
    padding = (before, kernel - 1 - before)
    options = {"use_bias": bias, "conv_general_dilated_cls": _our_convolution, "name": name, **self._dtypes}
    return nn.Conv(features, (kernel, kernel), (stride, stride), padding=(padding, padding), **options)

  def batch_norm(self, *, train: bool, zero_scale: bool = False, bias: bool = True, name: str) -> nn.BatchNorm:
    """Returns a batch normalisation over the global batch; its output is in at least float32.

    Moving averages decay by 0.9, those of the variance are of the biased one. No axis name is needed: under jit
    the mean over a sharded batch is the mean over all devices.
    """
    dtype = at_least_float32(self.dtype)
    # Not narrower than the statistics, because the first update would change the dtypes of the state.
    param_dtype = jnp.promote_types(self.param_dtype, dtype)
    return nn.BatchNorm(
      use_running_average=not train,
      momentum=0.9,
      epsilon=1e-5,
      use_bias=bias,
      scale_init=nn.initializers.zeros if zero_scale else nn.initializers.ones,
      dtype=dtype,
      param_dtype=param_dtype,
      # With True, Linen creates the moving averages in float32 whatever param_dtype is. The flag does not change the
      # precision of the reductions, which are in `dtype`.
      force_float32_reductions=param_dtype == jnp.float32,
      name=name,
    )

  def dense(self, features: int, *, name: str) -> nn.Dense:
    """Returns a dense layer without bias, initialised from N(0, 0.01^2) as in the reference's heads."""
    return nn.Dense(features, use_bias=False, kernel_init=nn.initializers.normal(0.01), name=name, **self._dtypes)

  @property
  def _dtypes(self) -> dict[str, Any]:
    return {"dtype": self.dtype, "param_dtype": self.param_dtype}


def as_float(images: jax.Array, dtype: Any) -> jax.Array:
  """Returns images in `dtype`; uint8 images are divided by 255 in at least float32. Integers else are a UserError."""
  if images.dtype == jnp.uint8:
    images = images.astype(at_least_float32(dtype)) / 255
  if not jnp.issubdtype(images.dtype, jnp.floating):
    raise errors.UserError(f"images are {images.dtype}; give uint8, or floats between 0 and 1.")
  return images.astype(dtype)
