"""The training state: arrays only, placed on the mesh at birth."""

from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from simclr_jax.hardware import sharding


@flax.struct.dataclass
class TrainState:
  """Everything that a step changes.

  Attributes:
    step: i32[], optimizer updates done; the only position that a run has.
    params: the model's parameters by part: encoder, projection_head, linear_head.
    batch_stats: BatchNorm's moving means and variances, by the same parts.
    opt_state: the optimizer's own arrays.
    memory: see the module of that name; None where negatives come from the batch alone.
  """

  step: jax.Array
  params: Any
  batch_stats: Any
  opt_state: Any
  memory: Any = None


def variables(
  model: nn.Module, image_size: int, seed: int, mesh: jax.sharding.Mesh, *, split: bool = False
) -> tuple[Any, Any]:
  """Returns (params, batch_stats) of `model` at initialisation, the same on any number of devices.

  Args:
    model: called as `model(images, train=...)`.
    image_size: side of its square input in pixels.
    seed: of `jax.random.key`.
    mesh: whose devices hold a copy each.
    split: rather let each hold a part of every large parameter.
  """

  def init(key):
    tree = model.init(key, jnp.zeros((1, image_size, image_size, 3), jnp.float32), train=False)
    return tree["params"], tree.get("batch_stats", {})

  key = jax.random.key(seed)
  placement = sharding.replicated(mesh)
  if split:
    params, _ = jax.eval_shape(init, key)
    placement = (sharding.split_arrays(params, mesh), placement)
  return jax.jit(init, out_shardings=placement)(key)


def create(params, batch_stats, tx: optax.GradientTransformation, trainable=lambda params: params) -> TrainState:
  """Returns the state before the first step; the optimizer's arrays are placed as the parameters are.

  Args:
    params: the whole model's.
    batch_stats: the whole model's.
    tx: the optimizer.
    trainable: picks the part of the parameters that `tx` sees.
  """
  leaves = jax.tree.leaves(params)
  mesh = leaves[0].sharding.mesh
  replicated, opt_state = sharding.replicated(mesh), jax.eval_shape(tx.init, trainable(params))
  is_split = any(not leaf.sharding.is_fully_replicated for leaf in leaves)
  placement = sharding.split_arrays(opt_state, mesh) if is_split else replicated
  return TrainState(
    step=jax.device_put(np.zeros((), np.int32), replicated),
    params=params,
    batch_stats=batch_stats,
    opt_state=jax.jit(tx.init, out_shardings=placement)(trainable(params)),
  )


def abstract(model: nn.Module, image_size: int, tx: optax.GradientTransformation, mesh, *, split: bool) -> TrainState:
  """Returns the shapes, types and placements of the state before the first step; computes nothing, on any devices.

  Args:
    model: see `variables`.
    image_size: see `variables`.
    tx: the optimizer.
    mesh: the devices, which may be described ones that this machine does not have.
    split: see `variables`.
  """

  def init(key):
    tree = model.init(key, jnp.zeros((1, image_size, image_size, 3), jnp.float32), train=False)
    params = tree["params"]
    return TrainState(jnp.zeros((), jnp.int32), params, tree.get("batch_stats", {}), tx.init(params))

  state = jax.eval_shape(init, jax.random.key(0))
  placement = jax.tree.map(lambda _: sharding.replicated(mesh), state)
  if split:
    placement = placement.replace(
      params=sharding.split_arrays(state.params, mesh), opt_state=sharding.split_arrays(state.opt_state, mesh)
    )
  return jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), state, placement)


def count(tree) -> int:
  """Returns how many numbers the tree holds."""
  return sum(leaf.size for leaf in jax.tree.leaves(tree))
