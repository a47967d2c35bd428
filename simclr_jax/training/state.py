"""The training state: arrays only, placed on the mesh at birth."""

import functools
from collections.abc import Callable
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax.sharding import Mesh

from simclr_jax import randomness
from simclr_jax.hardware import sharding


@flax.struct.dataclass
class TrainState:
  """Everything that a step changes."""

  step: jax.Array  # i32[], optimizer updates done; the only position that a run has.
  params: Any  # The model's parameters by part: encoder, projection_head, linear_head.
  batch_stats: Any  # BatchNorm's moving means and variances, by the same parts.
  opt_state: Any
  memory: Any = None  # The queue of negatives, see `losses.negatives`; None where negatives come from the batch alone.

  @property
  def variables(self) -> dict[str, Any]:
    """What the network is applied with."""
    return {"params": self.params, "batch_stats": self.batch_stats}


def variables(model: nn.Module, image_size: int, seed: int, mesh: Mesh, *, sharded: bool = False) -> tuple[Any, Any]:
  """Returns (params, batch_stats) of `model` at initialisation, the same on any number of devices.

  The seed is that of `randomness.key`. Each device holds a copy; with `sharded`, a part of every large parameter.
  """
  params, batch_stats = abstract_variables(model, image_size, mesh, sharded=sharded)
  placement = jax.tree.map(lambda x: x.sharding, (params, batch_stats))
  return jax.jit(functools.partial(_init, model, image_size), out_shardings=placement)(randomness.key(seed))


def abstract_variables(model: nn.Module, image_size: int, mesh: Mesh, *, sharded: bool = False) -> tuple[Any, Any]:
  """Returns shapes, dtypes and placements of (params, batch_stats); computes nothing. Arguments as `variables`."""
  params, batch_stats = jax.eval_shape(functools.partial(_init, model, image_size), randomness.key(0))
  return _placed(params, mesh, sharded), _placed(batch_stats, mesh, False)


def _init(model, image_size, key):
  tree = model.init(key, jnp.zeros((1, image_size, image_size, 3), jnp.float32), train=False)
  return tree["params"], tree.get("batch_stats", {})


def _placed(tree, mesh, sharded):
  at = sharding.split_arrays(tree, mesh) if sharded else jax.tree.map(lambda _: sharding.replicated(mesh), tree)
  return jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), tree, at)


def create(
  params: Any,
  batch_stats: Any,
  tx: optax.GradientTransformation,
  trained: Callable[[Any], Any] = lambda params: params,  # Picks the part of the parameters that `tx` sees.
) -> TrainState:
  """Returns the state before the first step; the optimizer's arrays are placed as the parameters are."""
  leaves = jax.tree.leaves(params)
  mesh, is_sharded = leaves[0].sharding.mesh, any(not leaf.sharding.is_fully_replicated for leaf in leaves)
  opt_state = _placed(jax.eval_shape(tx.init, trained(params)), mesh, is_sharded)
  placement = jax.tree.map(lambda x: x.sharding, opt_state)
  step = jax.device_put(np.zeros((), np.int32), sharding.replicated(mesh))
  return TrainState(step, params, batch_stats, jax.jit(tx.init, out_shardings=placement)(trained(params)))


def abstract(
  model: nn.Module, image_size: int, tx: optax.GradientTransformation, mesh: Mesh, *, sharded: bool
) -> TrainState:
  """Returns shapes, dtypes and placements of the state before the first step, for an optimizer of all parameters.

  Computes nothing; the devices may be described ones that this machine does not have. Arguments as `variables`.
  """
  params, batch_stats = abstract_variables(model, image_size, mesh, sharded=sharded)
  step = _placed(jax.ShapeDtypeStruct((), jnp.int32), mesh, False)
  return TrainState(step, params, batch_stats, _placed(jax.eval_shape(tx.init, params), mesh, sharded))


def count(tree: Any) -> int:
  """Returns the number of entries of all arrays of the tree."""
  return sum(leaf.size for leaf in jax.tree.leaves(tree))
