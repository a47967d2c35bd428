"""Negatives from earlier steps (v2 section 3.1, after MoCo): a slow copy of the network, and what it embedded."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from simclr_jax import errors, losses
from simclr_jax.hardware import sharding

# Of the model's parameters: what it takes to embed an image.
PARTS = ("encoder", "projection_head")

# "params": the moving averages of these parts; "buffer": f[size, D], on every device.
Memory = dict[str, Any]


def check(size: int, decay: float, *, batch_size: int, kind: str) -> None:
  """Raises a UserError unless a memory of `size` embeddings (0: none) goes with this batch and this loss."""
  if not size:
    return
  views = 2 * batch_size
  if size < 0 or size % views:
    near = max(round(size / views), 1) * views
    raise errors.UserError(
      f"config.memory.size is {size}, and a batch of {batch_size} images brings {views} embeddings; use a multiple of "
      f"{views}, for example {near}, or 0 for no memory."
    )
  if not 0 <= decay < 1:
    raise errors.UserError(f"config.memory.decay is {decay}; it must be at least 0 and below 1, for example 0.999.")
  if kind not in losses.WITH_MEMORY:
    raise errors.UserError(
      f"config.loss.kind {kind} takes no negatives from a memory; use {' or '.join(losses.WITH_MEMORY)}, or "
      "config.memory.size=0."
    )


def shapes(params, embedding: jax.ShapeDtypeStruct, size: int) -> Memory:
  """Returns shapes, types and placements of the memory of a model; its weights are placed as the model's are.

  Args:
    params: the model's by part, arrays or their placed shapes.
    embedding: f[..., D], what the network makes of images.
    size: embeddings that are kept.
  """
  copies = {part: params[part] for part in PARTS if part in params}
  mesh = jax.tree.leaves(copies)[0].sharding.mesh
  dtype = jnp.promote_types(embedding.dtype, jnp.float32)
  return {
    "params": jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), copies),
    "buffer": jax.ShapeDtypeStruct((size, embedding.shape[-1]), dtype, sharding=sharding.replicated(mesh)),
  }


def create(params, embedding: jax.ShapeDtypeStruct, size: int) -> Memory:
  """Returns the memory before the first step: the model's weights as they are, and nothing embedded; see `shapes`."""
  wanted = shapes(params, embedding, size)
  buffer = wanted["buffer"]

  # Copies in fact: the state is donated, and no array can be given away twice.
  def copied(params):
    return {"params": jax.tree.map(jnp.copy, params), "buffer": jnp.zeros(buffer.shape, buffer.dtype)}

  placement = jax.tree.map(lambda x: x.sharding, wanted)
  return jax.jit(copied, out_shardings=placement)({part: params[part] for part in wanted["params"]})


def filled(memory: Memory, step: jax.Array, views: int) -> jax.Array:
  """Returns i32[]: how many rows of the buffer hold embeddings after `step` steps of so many views."""
  size = memory["buffer"].shape[0]
  return jnp.minimum(step, size // views) * views


def after(memory: Memory, step: jax.Array, z: jax.Array, params, *, decay: float, mesh) -> Memory:
  """Returns the memory after a step: the oldest embeddings give way to z, and the weights follow the model's.

  Args:
    memory: before the step.
    step: i32[], the steps before this one; where the oldest embeddings are follows from it.
    z: f[N, 2, D], what the memory's network made of this batch, as it is to be scored.
    params: the model's after the step.
    decay: of the moving average.
    mesh: the devices that share N; None for one.
  """
  buffer = memory["buffer"]
  z = z.reshape(-1, z.shape[-1]).astype(buffer.dtype)
  if mesh is not None:
    z = lax.with_sharding_constraint(z, sharding.replicated(mesh))
  # The remainder first: a long run has more views than an int32 can count.
  start = step % (buffer.shape[0] // z.shape[0]) * z.shape[0]
  average = lambda old, new: (decay * old + (1 - decay) * new).astype(old.dtype)
  return {
    "params": {part: jax.tree.map(average, old, params[part]) for part, old in memory["params"].items()},
    "buffer": lax.dynamic_update_slice_in_dim(buffer, z, start, axis=0),
  }
