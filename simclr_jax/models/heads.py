"""The heads on top of the encoder: the projection that the loss sees, and the linear classifier."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from simclr_jax import errors
from simclr_jax.models import layers


class ProjectionHead(nn.Module):
  """The projection head: h f[N, d] -> [h, layer 1 f[N, d], ..., z f[N, out_dim]].

  Layers 1 to L-1: dense to d, batch norm, ReLU. Layer L: dense to `out_dim` and a batch norm with
  scale only. No dense layer has a bias. `layers=1` is the linear head, `layers=0` returns [h].
  Section 4.2 of Chen et al. 2020; the batch norms are those of the reference's code.
  """

  layers: int = 3
  out_dim: int = 128
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, h: jax.Array, *, train: bool) -> list[jax.Array]:
    if self.layers < 0:
      raise errors.UserError(f"the projection head has {self.layers} layers; give 0 (none) or more.")
    make = layers.Layers(self.dtype, self.param_dtype)
    outputs = [h]
    for number in range(1, self.layers + 1):
      last = number == self.layers
      x = make.dense(self.out_dim if last else h.shape[-1], name=f"dense{number}")(outputs[-1])
      x = make.batch_norm(train=train, bias=not last, name=f"bn{number}")(x)
      outputs.append(x if last else nn.relu(x))
    return outputs


class LinearHead(nn.Module):
  """The linear classifier: h f[N, d] -> logits f[N, classes], computed in at least float32."""

  classes: int
  zero_init: bool = False
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, h: jax.Array) -> jax.Array:
    init = nn.initializers.zeros if self.zero_init else nn.initializers.normal(0.01)
    dtype = layers.at_least_float32(self.dtype)
    return nn.Dense(self.classes, kernel_init=init, dtype=dtype, param_dtype=self.param_dtype, name="dense")(h)
