"""A small encoder without batch norm, for what the encoder protocol promises about networks that are no ResNet."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from simclr_jax.models import layers


class PlainEncoder(nn.Module):
  """Patches by a strided convolution, then two residual MLP blocks with layer norm; h is the mean over patches."""

  features: int = 32
  patch: int = 4
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  @property
  def stages(self) -> tuple[str, ...]:
    return ("patches", "block1", "block2")

  @nn.nowrap
  def stage_of(self, name: str) -> int:
    return self.stages.index(name.partition("_")[0])

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool, after_stage: int = -1) -> jax.Array:
    types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    side = (self.patch, self.patch)
    x = layers.as_float(images, self.dtype)
    x = nn.Conv(self.features, side, side, padding="VALID", **types, name="patches")(x)
    if after_stage == 0:
      x = jax.lax.stop_gradient(x)
    for stage in (1, 2):
      hidden = nn.LayerNorm(**types, name=f"block{stage}_norm")(x)
      hidden = nn.gelu(nn.Dense(2 * self.features, **types, name=f"block{stage}_dense1")(hidden))
      x = x + nn.Dense(self.features, **types, name=f"block{stage}_dense2")(hidden)
      if after_stage == stage:
        x = jax.lax.stop_gradient(x)
    return x.mean(axis=(1, 2), dtype=layers.at_least_float32(self.dtype))
