"""The training state: arrays only, placed on the mesh at birth."""

from typing import Any

import flax
import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from simclr_jax import sharding


@flax.struct.dataclass
class TrainState:
  """Everything that a step changes.

  Attributes:
    step: i32[], optimizer updates done; the only position that a run has.
    params: the model's parameters by part: encoder, projection_head, linear_head.
    batch_stats: BatchNorm's moving means and variances, by the same parts.
    opt_state: the optimizer's own arrays.
  """

  step: jax.Array
  params: Any
  batch_stats: Any
  opt_state: Any


def variables(model: nn.Module, image_size: int, seed: int, mesh: jax.sharding.Mesh) -> tuple[Any, Any]:
  """Returns (params, batch_stats) of `model` at initialisation, the same on every device.

  Args:
    model: called as `model(images, train=...)`.
    image_size: side of its square input in pixels.
    seed: of `jax.random.key`.
    mesh: whose devices hold a copy each.
  """

  def init(key):
    tree = model.init(key, jnp.zeros((1, image_size, image_size, 3), jnp.float32), train=False)
    return tree["params"], tree.get("batch_stats", {})

  return jax.jit(init, out_shardings=sharding.replicated(mesh))(jax.random.key(seed))


def create(params, batch_stats, tx: optax.GradientTransformation, trainable=lambda params: params) -> TrainState:
  """Returns the state before the first step.

  Args:
    params: the whole model's.
    batch_stats: the whole model's.
    tx: the optimizer.
    trainable: picks the part of the parameters that `tx` sees.
  """
  placement = jax.tree.leaves(params)[0].sharding
  return TrainState(
    step=jax.device_put(jnp.zeros((), jnp.int32), placement),
    params=params,
    batch_stats=batch_stats,
    opt_state=jax.jit(tx.init, out_shardings=placement)(trainable(params)),
  )


def count(tree) -> int:
  """Returns how many numbers the tree holds."""
  return sum(leaf.size for leaf in jax.tree.leaves(tree))
