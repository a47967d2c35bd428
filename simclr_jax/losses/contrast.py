"""The contrastive losses under their public names, the table of kinds, and the checks of their arguments.

To add a loss, write it in a file of its own and give it a row in `KINDS`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from simclr_jax import errors
from simclr_jax.hardware import sharding
from simclr_jax.losses import blockwise, dense

Metrics = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Loss:
  """One kind of contrastive loss: its function, and which arguments the function takes.

  The function is called with z f[N, 2, D] and the keyword `temperature` f[], and further keywords as the flags say. A
  blockwise loss returns (loss, metrics), a dense one the loss alone.
  """

  function: Callable[..., Any]
  blockwise: bool = False  # Takes `mesh` and `block_size`; memory is linear in N, otherwise quadratic.
  needs_labels: bool = False  # Takes `label` i[N].
  takes_queue: bool = False  # Takes `queue`, negatives from earlier steps; see `blockwise.loss_and_metrics`.
  needs_margin: bool = False  # Takes `margin`, a positive number.
  min_images: int = 1  # Smallest N.


KINDS: dict[str, Loss] = {
  "nt_xent": Loss(blockwise.loss_and_metrics, blockwise=True, takes_queue=True),
  # The queue holds no labels, so sup_con cannot use it.
  "sup_con": Loss(blockwise.loss_and_metrics, blockwise=True, needs_labels=True),
  "dcl": Loss(
    functools.partial(blockwise.loss_and_metrics, decoupled=True), blockwise=True, takes_queue=True, min_images=2
  ),
  "margin": Loss(dense.margin_loss, needs_margin=True, min_images=2),
  "margin_semi_hard": Loss(functools.partial(dense.margin_loss, semi_hard=True), needs_margin=True, min_images=2),
  "nt_logistic": Loss(dense.nt_logistic, min_images=2),
  "nt_logistic_semi_hard": Loss(functools.partial(dense.nt_logistic, semi_hard=True), min_images=2),
}
BLOCKWISE: tuple[str, ...] = tuple(name for name, loss in KINDS.items() if loss.blockwise)
WITH_QUEUE: tuple[str, ...] = tuple(name for name, loss in KINDS.items() if loss.takes_queue)


def nt_xent(
  z: jax.Array,
  *,
  temperature: float | jax.Array,
  normalize: bool = True,
  mesh: Mesh | None = None,
  block_size: int | None = None,
) -> tuple[jax.Array, Metrics]:
  """Returns the mean NT-Xent loss over the 2N embeddings, in at least float32, and metrics without gradient.

  Equation 1 of Chen et al. 2020; half of what the reference optimises. Memory is linear in N. Two arrays
  are gathered from all devices: the embeddings and, for the gradient, the log-sum-exp of each row.

  The metrics `contrast_acc` and `contrast_entropy` score each first view against the N second views, as the reference
  does; `contrast_top1` scores all 2N rows against their 2N-1 others. Of equal candidates the lowest index counts.

  Args:
    z: f32[N, 2, D], both views of an image together.
    temperature: divides the similarities.
    normalize: whether each embedding is first divided by its L2 norm.
    mesh: shards N over its axis `data`; None computes on one device.
    block_size: largest number of columns of the similarity matrix in memory at a time (default 256).
  """
  return contrast("nt_xent", z, temperature=temperature, normalize=normalize, mesh=mesh, block_size=block_size)


def contrast(
  kind: str,
  z: jax.Array,
  label: jax.Array | None = None,
  *,
  temperature: float | jax.Array,
  normalize: bool = True,
  margin: float = 0.8,
  queue: jax.Array | None = None,
  filled: jax.Array | int | None = None,
  mesh: Mesh | None = None,
  block_size: int | None = None,
) -> tuple[jax.Array, Metrics]:
  """Returns the loss of the given kind, and the metrics of `nt_xent` for these embeddings.

  Arguments that the kind does not take are ignored, except the queue, which is refused. The metrics are computed from
  the batch alone, without the queue.

  Args:
    kind: a key of `KINDS`.
    z, temperature, normalize, mesh, block_size: as for `nt_xent`.
    label: i32[N], any integers; sharded as z.
    margin: see `dense.margin_loss`.
    queue: f32[M, D], replicated: embeddings of earlier steps, scored without normalisation as further negatives of
      every row. They get no gradient.
    filled: i32[], number of valid rows at the start of the queue; None for all.
  UserError: an argument does not fit the kind, z or the mesh.
  """
  _check(kind, z, temperature, 1 if mesh is None else mesh.shape[sharding.AXIS], block_size)
  loss, z = KINDS[kind], z.astype(jnp.promote_types(z.dtype, jnp.float32))
  temperature = jnp.asarray(temperature, z.dtype)
  keywords: dict[str, Any] = {"temperature": temperature}
  if loss.needs_labels:
    _check_labels(kind, z, label)
    keywords["label"] = jnp.asarray(label)
  if loss.needs_margin:
    if not margin > 0:
      raise errors.UserError(f"{kind} got margin {margin}; it must be positive, for example 0.8")
    keywords["margin"] = margin
  if queue is not None:
    _check_queue(kind, z, queue)
    count = queue.shape[0] if filled is None else filled
    keywords["queue"] = (queue.astype(z.dtype), jnp.asarray(count, jnp.int32))
  if normalize:
    z = l2_normalized(z)
  if loss.blockwise:
    return loss.function(z, mesh=mesh, block_size=block_size or blockwise.DEFAULT_BLOCK, **keywords)
  value = loss.function(z, **keywords)
  seen, temperature = lax.stop_gradient((z, temperature))
  return value, nt_xent(seen, temperature=temperature, normalize=False, mesh=mesh, block_size=block_size)[1]


# Equation 2 (L_out) of Khosla et al. 2020, called with z and label: the positives of a row are all other rows with its
# label, including its other view; their log-probabilities are averaged outside the logarithm. Without the factor
# temperature / base_temperature of the authors' code. With all labels different the loss equals `nt_xent`.
sup_con = functools.partial(contrast, "sup_con")

# Yeh et al. 2021: NT-Xent without the positive in the denominator, so it can be negative, and N must be at least 2.
dcl = functools.partial(contrast, "dcl")


def l2_normalized(z: jax.Array) -> jax.Array:
  """Returns f[..., D] divided by its L2 norm over the last axis.

  The squared norm is taken to be at least 1e-12, as in the reference: embeddings with a norm below 1e-6 are divided
  by 1e-6, and zeros stay zeros.
  """
  return z * lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(z), axis=-1, keepdims=True), 1e-12))


def _check(kind: str, z: jax.Array, temperature: float | jax.Array, devices: int, block_size: int | None) -> None:
  if kind not in KINDS:
    raise errors.UserError(f"unknown loss {kind!r}{errors.nearest(kind, KINDS)}; the losses are {', '.join(KINDS)}")
  if z.ndim != 3 or z.shape[1] != 2 or z.shape[0] == 0:
    raise errors.UserError(
      f"{kind} got z of shape {tuple(z.shape)}; it wants [N, 2, D], both views of an image together"
    )
  if z.shape[0] % devices:
    raise errors.UserError(f"{kind} got {z.shape[0]} images for {devices} devices; use a multiple of {devices}")
  if z.shape[0] < KINDS[kind].min_images:
    raise errors.UserError(
      f"{kind} got {z.shape[0]} image, which has no negatives; use at least {KINDS[kind].min_images}"
    )
  if isinstance(temperature, int | float) and not temperature > 0:
    raise errors.UserError(f"{kind} got temperature {temperature}; it must be positive, for example 0.1")
  if block_size is not None and block_size < 1:
    raise errors.UserError(
      f"{kind} got block_size {block_size}; it must be at least 1, or None for {blockwise.DEFAULT_BLOCK}"
    )


def _check_labels(kind: str, z: jax.Array, label: jax.Array | None) -> None:
  if label is None:
    raise errors.UserError(f"{kind} got no labels; use a data set with labels, or nt_xent or dcl, which need none")
  if jnp.shape(label) != z.shape[:1] or not jnp.issubdtype(jnp.result_type(label), jnp.integer):
    raise errors.UserError(
      f"{kind} got labels {jnp.result_type(label)}{list(jnp.shape(label))}; it wants one integer for each image, "
      f"[{z.shape[0]}]"
    )


def _check_queue(kind: str, z: jax.Array, queue: jax.Array) -> None:
  if not KINDS[kind].takes_queue:
    raise errors.UserError(f"{kind} takes no queue of negatives; use {' or '.join(WITH_QUEUE)}, or no queue")
  if queue.ndim != 2 or queue.shape[1] != z.shape[2] or queue.shape[0] == 0:
    raise errors.UserError(f"{kind} got a queue of shape {tuple(queue.shape)}; it wants [M, {z.shape[2]}]")
