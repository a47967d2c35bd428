"""The queue of negatives from earlier steps, after MoCo (v2 section 3.1), and the averaged weights that embed them."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from simclr_jax import errors, losses
from simclr_jax.hardware import sharding

# Parts of the model that an embedding takes.
PARTS = ("encoder", "projection_head")

# "params": moving averages of the weights of PARTS; "buffer": embeddings f[size, D], replicated.
Queue = dict[str, Any]


def check(size: int, decay: float, *, batch_size: int, kind: str) -> None:
  """Raises a UserError unless a queue of `size` embeddings (0: none) fits the batch and the kind of loss."""
  if not size:
    return
  views = 2 * batch_size
  if size < 0 or size % views:
    near = max(round(size / views), 1) * views
    raise errors.UserError(
      f"config.memory.size is {size}, and a batch of {batch_size} images gives {views} embeddings; use a multiple of "
      f"{views}, for example {near}, or 0 for no queue."
    )
  if not 0 <= decay < 1:
    raise errors.UserError(f"config.memory.decay is {decay}; it must be at least 0 and below 1, for example 0.999.")
  if kind not in losses.WITH_QUEUE:
    raise errors.UserError(
      f"config.loss.kind {kind} takes no queue of negatives; use {' or '.join(losses.WITH_QUEUE)}, or "
      "config.memory.size=0."
    )


def shapes(params: dict[str, Any], embedding: jax.ShapeDtypeStruct, size: int) -> Queue:
  """Returns the queue of a model as shapes with dtypes and placements; the weights are placed as the model's are.

  The model's parameters, by part, are arrays or shapes with placements; the embedding f[..., D] is what the projection
  head gives; `size` is the number of embeddings.
  """
  copies = {part: params[part] for part in PARTS if part in params}
  mesh = jax.tree.leaves(copies)[0].sharding.mesh
  # At least float32: in bfloat16 an average with a decay of 0.999 hardly moves.
  dtype_of = lambda x: jnp.promote_types(x.dtype, jnp.float32)
  buffer = (size, embedding.shape[-1])
  return {
    "params": jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype_of(x), sharding=x.sharding), copies),
    "buffer": jax.ShapeDtypeStruct(buffer, dtype_of(embedding), sharding=sharding.replicated(mesh)),
  }


def create(params: dict[str, Any], embedding: jax.ShapeDtypeStruct, size: int) -> Queue:
  """Returns the queue before the first step: a copy of the model's weights and an empty buffer; see `shapes`."""
  wanted = shapes(params, embedding, size)
  buffer = wanted["buffer"]

  # The copy must be a real one: the state is donated, and no buffer can be donated twice.
  def copied(params):
    copies = jax.tree.map(lambda x, like: jnp.array(x, like.dtype, copy=True), params, wanted["params"])
    return {"params": copies, "buffer": jnp.zeros(buffer.shape, buffer.dtype)}

  placement = jax.tree.map(lambda x: x.sharding, wanted)
  return jax.jit(copied, out_shardings=placement)({part: params[part] for part in wanted["params"]})


def filled(queue: Queue, step: jax.Array, views: int) -> jax.Array:
  """Returns i32[], the number of valid rows of the buffer after `step` steps of `views` embeddings each."""
  size = queue["buffer"].shape[0]
  return jnp.minimum(step, size // views) * views


def after(
  queue: Queue,
  step: jax.Array,  # i32[], number of earlier steps, which says where the oldest embeddings are.
  z: jax.Array,  # f[N, 2, D], this batch embedded by the averaged weights, normalised where the loss normalises.
  params: dict[str, Any],  # The model's after the step.
  *,
  decay: float,
  mesh: jax.sharding.Mesh | None,
) -> Queue:
  """Returns the queue after a step: z replaces the oldest embeddings, and the averages follow the model's weights."""
  buffer = queue["buffer"]
  z = z.reshape(-1, z.shape[-1]).astype(buffer.dtype)
  if mesh is not None:
    z = lax.with_sharding_constraint(z, sharding.replicated(mesh))
  # The remainder comes first: the number of embeddings of a long run overflows int32.
  start = step % (buffer.shape[0] // z.shape[0]) * z.shape[0]
  average = lambda old, new: (decay * old + (1 - decay) * new).astype(old.dtype)
  return {
    "params": {part: jax.tree.map(average, old, params[part]) for part, old in queue["params"].items()},
    "buffer": lax.dynamic_update_slice_in_dim(buffer, z, start, axis=0),
  }
