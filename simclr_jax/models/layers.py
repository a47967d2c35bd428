"""The convolution and the batch normalisation that the encoder and the heads are made of."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from simclr_jax import errors
from simclr_jax.models import convolution


def at_least_float32(dtype: Any) -> jnp.dtype:
  """Returns the type for statistics and outputs of a network that computes in `dtype`."""
  return jnp.promote_types(dtype, jnp.float32)


def _our_convolution():
  return convolution.convolve


@dataclasses.dataclass(frozen=True)
class Layers:
  """Makes layers that compute in `dtype` and keep their parameters in `param_dtype`."""

  dtype: Any
  param_dtype: Any

  def conv(self, features: int, kernel: int, stride: int = 1, *, bias: bool = False, name: str) -> nn.Conv:
    """Returns a convolution whose padding depends on its kernel alone, not on the image.

    At stride 1 that is SAME; at stride 2, SAME would shift even-sized images by one pixel.
    Linen's default initialiser is the one wanted: LeCun's truncated normal, not He's.
    """
    before = (kernel - 1) // 2
    padding = (before, kernel - 1 - before)
    return nn.Conv(
      features,
      (kernel, kernel),
      (stride, stride),
      padding=(padding, padding),
      use_bias=bias,
      dtype=self.dtype,
      param_dtype=self.param_dtype,
      conv_general_dilated_cls=_our_convolution,
      name=name,
    )

  def batch_norm(self, *, train: bool, zero_scale: bool = False, bias: bool = True, name: str) -> nn.BatchNorm:
    """Returns a batch normalisation over the global batch; its output is in at least float32.

    Moving averages decay by 0.9 and hold the biased variance. There is no axis name: under jit
    the mean over a sharded batch already is the mean over all devices.
    """
    dtype = at_least_float32(self.dtype)
    # Never narrower than the statistics, or the first update would change the state's types.
    param_dtype = jnp.promote_types(self.param_dtype, dtype)
    return nn.BatchNorm(
      use_running_average=not train,
      momentum=0.9,
      epsilon=1e-5,
      use_bias=bias,
      scale_init=nn.initializers.zeros if zero_scale else nn.initializers.ones,
      dtype=dtype,
      param_dtype=param_dtype,
      # What the name hides: with True, Linen creates the moving averages in float32 whatever
      # param_dtype says. The arithmetic is in `dtype` either way.
      force_float32_reductions=param_dtype == jnp.float32,
      name=name,
    )

  def dense(self, features: int, *, name: str) -> nn.Dense:
    """Returns a dense layer without bias, drawn from N(0, 0.01^2) as the reference's heads."""
    return nn.Dense(
      features,
      use_bias=False,
      kernel_init=nn.initializers.normal(0.01),
      dtype=self.dtype,
      param_dtype=self.param_dtype,
      name=name,
    )


def as_float(images: jax.Array, dtype: Any) -> jax.Array:
  """Returns images in `dtype`; uint8 ones are divided by 255, in at least float32."""
  if images.dtype == jnp.uint8:
    images = images.astype(at_least_float32(dtype)) / 255
  if not jnp.issubdtype(images.dtype, jnp.floating):
    raise errors.UserError(f"images are {images.dtype}; give uint8, or floats between 0 and 1.")
  return images.astype(dtype)
