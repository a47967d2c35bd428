"""NT-Xent, sharded over devices and computed in blocks of columns."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from simclr_jax import errors, sharding

# Columns of the similarity matrix that exist at one time, per device.
DEFAULT_BLOCK = 256

Metrics = dict[str, jax.Array]


def nt_xent(
  z: jax.Array,
  *,
  temperature: float | jax.Array,
  normalize: bool = True,
  mesh: Mesh | None = None,
  block_size: int | None = None,
) -> tuple[jax.Array, Metrics]:
  """Returns the mean NT-Xent loss over the 2N embeddings, and metrics without gradient.

  Equation 1 of Chen et al. 2020; half of what the reference optimises. Memory is linear in N.

  Args:
    z: f32[N, 2, D], both views of an image together.
    temperature: divides the similarities.
    normalize: divides each embedding by its L2 norm first.
    mesh: shards N over its axis `data`; None computes on one device.
    block_size: at most so many columns are scored at a time (default 256).

  Returns:
    The loss, in at least float32, and the metrics: `contrast_acc` and `contrast_entropy` score each
    first view against the N second views, as the reference does; `contrast_top1` scores all 2N rows
    against their 2N-1 others. Of equal similarities the first one is the answer.
  """
  devices = 1 if mesh is None else mesh.shape[sharding.AXIS]
  _check(z, temperature, devices, block_size)
  z = z.astype(jnp.promote_types(z.dtype, jnp.float32))
  if normalize:
    z = l2_normalized(z)
  temperature = jnp.asarray(temperature, z.dtype)
  block = DEFAULT_BLOCK if block_size is None else block_size
  if mesh is None:
    return _contrast(z, temperature, None, block)
  sharded = jax.shard_map(
    lambda z, temperature: _contrast(z, temperature, sharding.AXIS, block),
    mesh=mesh,
    in_specs=(PartitionSpec(sharding.AXIS), PartitionSpec()),
    out_specs=PartitionSpec(),
  )
  return sharded(z, temperature)


def l2_normalized(z: jax.Array) -> jax.Array:
  """Returns f32[..., D] over its L2 norm; as in the reference, squared norms are at least 1e-12."""
  return z * lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(z), axis=-1, keepdims=True), 1e-12))


def _check(z: jax.Array, temperature: float | jax.Array, devices: int, block_size: int | None) -> None:
  if z.ndim != 3 or z.shape[1] != 2 or z.shape[0] == 0:
    raise errors.UserError(
      f"nt_xent got z of shape {tuple(z.shape)}; it wants [N, 2, D], both views of an image together"
    )
  if z.shape[0] % devices:
    raise errors.UserError(f"nt_xent got {z.shape[0]} images for {devices} devices; use a multiple of {devices}")
  if isinstance(temperature, int | float) and not temperature > 0:
    raise errors.UserError(f"nt_xent got temperature {temperature}; it must be positive, for example 0.1")
  if block_size is not None and block_size < 1:
    raise errors.UserError(f"nt_xent got block_size {block_size}; it must be at least 1, or None for {DEFAULT_BLOCK}")


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _contrast(z: jax.Array, temperature: jax.Array, axis: str | None, block: int) -> tuple[jax.Array, Metrics]:
  """Returns loss and metrics of the whole batch from this device's f32[n, 2, D].

  Without an axis there is one device.
  """
  return _forward(z, temperature, axis, block)[0]


def _forward(z, temperature, axis, block):
  n = z.shape[0]
  columns = _views(z if axis is None else lax.all_gather(z, axis, tiled=True))
  total = columns.shape[1]
  rows, examples = _rows(z, axis)

  # Axes of the following four: view of the column, view of the row, image.
  before, after, sums, own = (
    jnp.stack(pair).reshape(2, 2, n)
    for pair in zip(*(_row_statistics(rows, examples, view, temperature, block) for view in columns), strict=True)
  )
  positive = jnp.stack([own[1, 0], own[0, 1]])
  # As a distance between the positive and the negatives alone, a loss close to zero keeps its digits.
  negatives = jnp.maximum(before, after) - positive[None] + jnp.log(sums)
  gap = jnp.logaddexp(negatives[0], negatives[1])

  first = (positive > jnp.max(before, axis=0)) & (positive >= jnp.max(after, axis=0))
  first_across = (positive[0] > before[1, 0]) & (positive[0] >= after[1, 0])
  candidates = positive[0] + jax.nn.softplus(negatives[1, 0])
  entropies = _row_entropies(rows[:n], candidates, columns[1], temperature, block)

  sums = (
    jnp.sum(jnp.mean(jax.nn.softplus(gap), axis=0)),
    jnp.sum(first_across, dtype=z.dtype),
    jnp.sum(entropies),
    jnp.sum(jnp.mean(first, axis=0, dtype=z.dtype)),
  )
  loss, acc, entropy, top1 = (x / total for x in (sums if axis is None else lax.psum(sums, axis)))
  metrics = {"contrast_acc": acc, "contrast_entropy": entropy, "contrast_top1": top1}
  return (loss, metrics), (z, temperature, columns, gap, positive)


def _backward(axis, block, residuals, cotangents):
  z, temperature, columns, gap, positive = residuals
  n, _, dim = z.shape
  total = columns.shape[1]
  rows, examples = _rows(z, axis)
  row_lse = positive + jax.nn.softplus(gap)
  column_lse = row_lse if axis is None else lax.all_gather(row_lse, axis, axis=1, tiled=True)
  row_lse = row_lse.reshape(2 * n)
  # The similarities are symmetric, so row i's gradient is sum_j (p_ij + p_ji - 2 [j is i's positive]) z_j.
  # For the positive, p - 1 is formed without cancellation, in both directions: its row is local too.
  pull = -jnp.sum(jax.nn.sigmoid(gap), axis=0)
  grad = jnp.zeros_like(rows)
  for view in (0, 1):
    own = jnp.concatenate([jnp.where(row_view == view, 0, pull) for row_view in (0, 1)])

    def add(grad, piece, own=own):
      (vectors, lse), index = piece
      logits = _logits(rows, vectors, temperature)
      coefficients = jnp.exp(logits - row_lse[:, None]) + jnp.exp(logits - lse[None, :])
      coefficients = jnp.where(index == examples[:, None], own[:, None], coefficients)
      coefficients = jnp.where(index < total, coefficients, 0)
      return grad + jnp.matmul(coefficients, vectors, precision=lax.Precision.HIGHEST)

    grad = _over_blocks(add, grad, (columns[view], column_lse[view]), block)
  grad = grad.reshape(2, n, dim).swapaxes(0, 1) * (cotangents[0] / (2 * total * temperature))
  # The loss depends on z / sqrt(temperature) alone.
  temperature_grad = -jnp.sum(grad * z) / (2 * temperature)
  return grad, temperature_grad if axis is None else lax.psum(temperature_grad, axis)


_contrast.defvjp(_forward, _backward)


def _row_statistics(rows, examples, columns, temperature, block):
  """Returns four f32[R] about rows f32[R, D] and columns f32[N, D] of one view.

  The largest similarity to an image before the row's own and to one after it; the sum of all these
  similarities' exponentials, relative to the larger of the two; the similarity to the own image.
  """
  # Made from the rows, because a carry must enter a scan as what it is inside: different per device.
  lowest, zeros = (jnp.full_like(rows[:, 0], value) for value in (jnp.finfo(rows.dtype).min, 0))

  def add(carry, piece):
    before, after, sums, own = carry
    (vectors,), index = piece
    logits = _logits(rows, vectors, temperature)
    earlier = index < examples[:, None]
    later = (index > examples[:, None]) & (index < columns.shape[0])
    top = jnp.maximum(before, after)
    before = jnp.maximum(before, jnp.max(jnp.where(earlier, logits, -jnp.inf), axis=1))
    after = jnp.maximum(after, jnp.max(jnp.where(later, logits, -jnp.inf), axis=1))
    new_top = jnp.maximum(before, after)
    exponentials = jnp.exp(jnp.where(earlier | later, logits, -jnp.inf) - new_top[:, None])
    sums = sums * jnp.exp(top - new_top) + jnp.sum(exponentials, axis=1)
    own = own + jnp.sum(jnp.where(index == examples[:, None], logits, 0), axis=1)
    return before, after, sums, own

  return _over_blocks(add, (lowest, lowest, zeros, zeros), (columns,), block)


def _row_entropies(rows, lse, columns, temperature, block):
  """Returns f32[R]: -sum p ln(p + 1e-8) of each row's softmax over columns f32[N, D], lse f32[R] given."""

  def add(entropy, piece):
    (vectors,), index = piece
    p = jnp.exp(_logits(rows, vectors, temperature) - lse[:, None])
    return entropy - jnp.sum(jnp.where(index < columns.shape[0], p * jnp.log(p + 1e-8), 0), axis=1)

  return _over_blocks(add, jnp.zeros_like(lse), (columns,), block)


def _over_blocks(add: Callable, carry: Any, columns: tuple[jax.Array, ...], block: int) -> Any:
  """Returns the carry after carry = add(carry, (piece, column numbers)) over all pieces of the columns.

  A piece has at most `block` columns; the last one is padded with zeros.
  """
  total = columns[0].shape[0]
  count = -(-total // block)
  size = -(-total // count)

  def pieces(x):
    padding = [(0, count * size - total)] + [(0, 0)] * (x.ndim - 1)
    return jnp.pad(x, padding).reshape(count, size, *x.shape[1:])

  index = jnp.arange(count * size).reshape(count, 1, size)
  carry, _ = lax.scan(lambda c, piece: (add(c, piece), None), carry, (jax.tree.map(pieces, columns), index))
  return carry


def _rows(z, axis):
  """Returns f32[2n, D], this device's first views and then its second views, and their image numbers."""
  start = 0 if axis is None else lax.axis_index(axis) * z.shape[0]
  examples = start + jnp.arange(z.shape[0])
  return _views(z).reshape(-1, z.shape[-1]), jnp.concatenate([examples, examples])


def _views(z):
  # A view at a time keeps the blocks two-dimensional, which is what TPU tiles want.
  return z.swapaxes(0, 1)


def _logits(rows, columns, temperature):
  # Dividing after the product, as the reference: near-duplicates then tie as they do there.
  return jnp.matmul(rows, columns.T, precision=lax.Precision.HIGHEST) / temperature
