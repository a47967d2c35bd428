"""NT-Xent, SupCon and DCL, sharded over devices and computed in blocks of columns.

The similarity matrix f[2N, 2N] never exists as a whole: each device takes its own rows and scans over blocks of
columns with an online log-sum-exp. Views are the leading axis inside: rows f[2, n, D], columns f[2, N, D].
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from simclr_jax.hardware import sharding

# Columns of the similarity matrix in memory at a time, per device.
DEFAULT_BLOCK = 256

Metrics = dict[str, jax.Array]

# Embeddings of earlier steps f[M, D], and the number i32[] of valid rows at their start.
Queue = tuple[jax.Array, jax.Array]


def loss_and_metrics(
  z: jax.Array,  # f[N, 2, D], at least float32, normalised by the caller where that is wanted.
  *,
  temperature: jax.Array,  # f[]
  mesh: Mesh | None,  # Shards N over its axis `data`; None computes on one device.
  block_size: int,  # Largest number of columns in memory at a time.
  label: jax.Array | None = None,  # i[N]; with labels the loss is SupCon.
  queue: Queue | None = None,  # Further negatives of every row, replicated.
  decoupled: bool = False,  # Whether the positive is left out of the denominator (DCL).
) -> tuple[jax.Array, Metrics]:
  """Returns the mean loss over the 2N embeddings, and the metrics of `losses.nt_xent`."""
  if mesh is None:
    return _contrast(z, label, queue, temperature, decoupled, None, block_size)
  sharded = jax.shard_map(
    lambda z, label, queue, temperature: _contrast(z, label, queue, temperature, decoupled, sharding.AXIS, block_size),
    mesh=mesh,
    in_specs=(PartitionSpec(sharding.AXIS), PartitionSpec(sharding.AXIS), PartitionSpec(), PartitionSpec()),
    out_specs=PartitionSpec(),
  )
  return sharded(z, label, queue, temperature)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _contrast(z, label, queue, temperature, decoupled, axis, block):
  """Returns loss and metrics of the whole batch from this device's z f[n, 2, D] and label i[n].

  `axis` is the mesh axis of the devices, None for one device.
  """
  return _evaluate(z, label, queue, temperature, decoupled, axis, block, with_gradient=False)[0]


def _forward(z, label, queue, temperature, decoupled, axis, block):
  # The loss is a scalar, so its gradient can be computed here, while the logits are in memory for the entropy.
  result, (grad, queue_term) = _evaluate(z, label, queue, temperature, decoupled, axis, block, with_gradient=True)
  return result, (z, temperature, grad, queue_term)


def _backward(decoupled, axis, block, residuals, cotangents):
  z, temperature, grad, queue_term = residuals
  grad = grad * cotangents[0]
  # Without a queue the loss is a function of z / sqrt(temperature), so the derivative by the temperature follows from
  # the gradient. The queue is not divided by sqrt(temperature): its logits count once more.
  product = jnp.sum(grad * z)
  if queue_term is not None:
    product += queue_term * cotangents[0]
  temperature_grad = -product / (2 * temperature)
  return grad, None, None, temperature_grad if axis is None else lax.psum(temperature_grad, axis)


_contrast.defvjp(_forward, _backward)


def _evaluate(z, label, queue, temperature, decoupled, axis, block, *, with_gradient):
  """Returns ((loss, metrics), (gradient f[n, 2, D], queue term f[])).

  The queue term is the sum of z times the part of the gradient that is due to the queue. Gradient and queue term are
  None where they are not asked for, the queue term also where there is no queue.
  """
  n = z.shape[0]
  start = 0 if axis is None else lax.axis_index(axis) * n
  # One view at a time keeps the blocks two-dimensional, as TPU tiles want them.
  rows = z.swapaxes(0, 1)
  columns = rows if axis is None else lax.all_gather(z, axis, tiled=True).swapaxes(0, 1)
  total = columns.shape[1]
  gap, positive, across_lse, hits = _scores(rows, columns, start, temperature, block)
  if queue is not None:
    gap = jnp.logaddexp(gap, _queue_lse(rows, *queue, positive, temperature, block))

  if decoupled:
    row_loss, own_coefficient = gap, jnp.full_like(gap[0], -2)
  else:
    # p - 1 of the positive is computed without cancellation, for both directions: the other view's row is local too.
    row_loss, own_coefficient = jax.nn.softplus(gap), -jnp.sum(jax.nn.sigmoid(gap), axis=0)
  row_lse = positive + row_loss
  groups = None
  if label is not None:
    groups, spread = _label_groups(rows, columns, label, positive, temperature, axis)
    row_loss = row_loss + spread
    own_coefficient = own_coefficient + (2 - groups[2])

  grad = queue_term = None
  if with_gradient:
    column_lse = row_lse if axis is None else lax.all_gather(row_lse, axis, axis=1, tiled=True)
    grad, entropies = _gradient(
      rows, columns, (row_lse, column_lse, across_lse), own_coefficient, groups, start, temperature, block
    )
    if queue is not None:
      queue_grad = _queue_gradient(rows, *queue, row_lse, temperature, block)
      grad += queue_grad
      queue_term = jnp.sum(queue_grad * rows) / (2 * total * temperature)
    grad = grad.swapaxes(0, 1) / (2 * total * temperature)
  else:
    first, second = rows[0], columns[1]
    add = lambda terms, piece: terms + _entropy_terms(_products(first, piece[0][0]) / temperature, across_lse)
    entropies = _over_blocks(add, jnp.zeros_like(across_lse), (second,), block)

  sums = (jnp.sum(jnp.mean(row_loss, axis=0)), jnp.sum(entropies), *hits)
  loss, entropy, acc, top1 = (x / total for x in (sums if axis is None else lax.psum(sums, axis)))
  return (loss, {"contrast_acc": acc, "contrast_entropy": entropy, "contrast_top1": top1}), (grad, queue_term)


def _scores(rows, columns, start, temperature, block):
  """Returns what the loss and the accuracies need from the similarities of rows f[2, n, D] to columns f[2, N, D].

  gap f[2, n]: log-sum-exp over a row's negatives, minus the similarity to its positive.
  positive f[2, n]: that similarity.
  across_lse f[n]: log-sum-exp of a first view over all second views.
  hits: number of first views whose positive ranks first among the second views; number of rows whose positive ranks
    first among all others, divided by 2.
  """
  # f[view of the column, view of the row, image] each.
  before, after, sums, own = (
    jnp.stack(pair)
    for pair in zip(*(_row_statistics(rows, view, start, temperature, block) for view in columns), strict=True)
  )
  positive = jnp.stack([own[1, 0], own[0, 1]])
  # Relative to the positive, because a loss close to zero would lose its digits in a difference of log-sum-exps.
  negatives = jnp.maximum(before, after) - positive[None] + jnp.log(sums)
  gap = jnp.logaddexp(negatives[0], negatives[1])
  across_lse = positive[0] + jax.nn.softplus(negatives[1, 0])

  first = (positive > jnp.max(before, axis=0)) & (positive >= jnp.max(after, axis=0))
  first_across = (positive[0] > before[1, 0]) & (positive[0] >= after[1, 0])
  hits = jnp.sum(first_across, dtype=rows.dtype), jnp.sum(jnp.mean(first, axis=0, dtype=rows.dtype))
  return gap, positive, across_lse, hits


def _row_statistics(rows, columns, start, temperature, block):
  """Returns four f[2, n] that summarise the similarities of rows f[2, n, D] to columns f[N, D] of one view.

  The largest similarity to an image with a lower index than the row's own, and to one with a higher index; the sum of
  exponentials of all these similarities relative to the larger of the two; the similarity to the own image.
  """
  n = rows.shape[1]
  examples = start + jnp.arange(n)
  # Derived from the rows, because shard_map wants the initial carry to vary over the devices as the later ones do.
  lowest, zeros = (jnp.full_like(rows[..., 0], value) for value in (jnp.finfo(rows.dtype).min, 0))

  def add(carry, piece):
    before, after, sums, own = carry
    (vectors,), index = piece
    products = _products(rows, vectors)
    # Division keeps the order, so the largest product gives the largest quotient.
    largest = jnp.max(products, axis=2) / temperature
    # Only rows whose own image is in this block need a mask: their statistics are computed again with it and written
    # over the others. Masking every row would take four more arrays of the size of the block.
    count = min(n, vectors.shape[0])
    first = jnp.clip(index[0] - start, 0, n - count)
    near = lax.dynamic_slice_in_dim(products, first, count, axis=1)
    distance = index[None, None, :] - lax.dynamic_slice_in_dim(examples, first, count)[None, :, None]
    near_own = jnp.sum(jnp.where(distance == 0, near, 0), axis=2) / temperature
    near_before, near_after = (
      jnp.max(jnp.where(side, near, -jnp.inf), axis=2) / temperature for side in (distance < 0, distance > 0)
    )
    put = lambda x, part: lax.dynamic_update_slice_in_dim(x, part, first, axis=1)
    top = jnp.maximum(before, after)
    is_before = index[0] < examples[None, :]
    before = jnp.maximum(before, put(jnp.where(is_before, largest, -jnp.inf), near_before))
    after = jnp.maximum(after, put(jnp.where(is_before, -jnp.inf, largest), near_after))
    new_top = jnp.maximum(before, after)
    near_top = lax.dynamic_slice_in_dim(new_top, first, count, axis=1)
    near = jnp.where(distance == 0, -jnp.inf, near)
    new_sums = put(_exponential_sums(products, new_top, temperature), _exponential_sums(near, near_top, temperature))
    sums = sums * jnp.exp(top - new_top) + new_sums
    own = own + put(zeros, near_own)
    return before, after, sums, own

  return _over_blocks(add, (lowest, lowest, zeros, zeros), (columns,), block)


def _exponential_sums(products, top, temperature):
  return jnp.sum(jnp.exp(products / temperature - top[..., None]), axis=-1)


def _label_groups(rows, columns, label, positive, temperature, axis):
  """Returns what the labels i[n] of rows f[2, n, D] change in NT-Xent, given the positives' similarities f[2, n].

  groups: labels of all images i[N], labels of the rows i[n], 2 / (number of positives of a row) f[n].
  spread f[2, n]: similarity to the other view, minus the mean similarity over all positives.
  """
  labels = label if axis is None else lax.all_gather(label, axis, tiled=True)
  ordered = jnp.sort(labels)
  # Any integers are numbered from 0 to N-1 by the position of their first occurrence in the sorted labels.
  sums = jax.ops.segment_sum(columns[0] + columns[1], jnp.searchsorted(ordered, labels), labels.shape[0])
  number = jnp.searchsorted(ordered, label)
  positives = (2 * (jnp.searchsorted(ordered, label, side="right") - number) - 1).astype(rows.dtype)
  others = (sums[number] - (rows[0] + rows[1]))[None]
  others = jnp.sum(rows * others, axis=2) / temperature
  spread = ((positives - 1)[None] * positive - others) / positives[None]
  return (labels, label, 2 / positives), spread


def _gradient(rows, columns, lses, own_coefficient, groups, start, temperature, block):
  """Returns the gradient of the rows f[2, n, D] times 2N temperature, and the entropies f[n] of the first views.

  The similarities are symmetric, so the gradient of row i is sum_j c_ij z_j with c_ij = p_ij + p_ji - 2 [j is a
  positive of i] / (number of positives of i). Each c is completed before the product with z; subtracting the positive
  afterwards would lose digits.

  `lses` are the log-sum-exps of the rows f[2, n] and of the columns f[2, N], so that p_ij = exp(logit - lse of i), and
  of the first views over the second views f[n]; `own_coefficient` f[n] is c between the two views of an image; `groups`
  is that of `_label_groups`, or None where the other view is the only positive.
  """
  row_lse, column_lse, across_lse = lses
  _, n, dim = rows.shape
  examples = jnp.arange(2 * n)[:, None] % n + start
  own_coefficient = jnp.concatenate([own_coefficient, own_coefficient])[:, None]
  rows, row_lse = rows.reshape(2 * n, dim), row_lse.reshape(2 * n, 1)
  first_view = jnp.arange(2 * n)[:, None] < n
  labels = None
  if groups is not None:
    labels, row_labels, share = (groups[0], *(jnp.concatenate([x, x])[:, None] for x in groups[1:]))
  carry = jnp.zeros_like(rows), jnp.zeros_like(across_lse)
  for view in (0, 1):
    own = jnp.where(first_view == (view == 0), 0, own_coefficient)

    def add(carry, piece, view=view, own=own):
      grad, entropies = carry
      (vectors, lse, labels), index = piece
      logits = _products(rows, vectors) / temperature
      coefficients = jnp.exp(logits - row_lse) + jnp.exp(logits - lse[None, :])
      if labels is not None:
        coefficients -= jnp.where(labels[None, :] == row_labels, share, 0)
      coefficients = jnp.where(index[None, :] == examples, own, coefficients)
      grad += jnp.matmul(coefficients, vectors, precision=lax.Precision.HIGHEST)
      if view == 1:
        entropies += _entropy_terms(logits[:n], across_lse)
      return grad, entropies

    carry = _over_blocks(add, carry, (columns[view], column_lse[view], labels), block)
  grad, entropies = carry
  return grad.reshape(2, n, dim), entropies


def _queue_lse(rows, queue, filled, positive, temperature, block):
  """Returns f[2, n], the log-sum-exp of rows f[2, n, D] over a queue f[M, D], minus the positive's similarity.

  Only the first `filled` embeddings of the queue count; with none the result is minus infinity.
  """

  def add(carry, piece):
    top, sums = carry
    (vectors,), index = piece
    products = jnp.where(index[None, None, :] < filled, _products(rows, vectors), -jnp.inf)
    new_top = jnp.maximum(top, jnp.max(products, axis=2) / temperature)
    return new_top, sums * jnp.exp(top - new_top) + _exponential_sums(products, new_top, temperature)

  top, sums = _over_blocks(
    add, (jnp.full_like(positive, jnp.finfo(rows.dtype).min), jnp.zeros_like(positive)), (queue,), block
  )
  return top - positive + jnp.log(sums)


def _queue_gradient(rows, queue, filled, row_lse, temperature, block):
  """Returns f[2, n, D]: the sum over the queue f[M, D] of exp(logit - row_lse) times its embeddings."""

  def add(grad, piece):
    (vectors,), index = piece
    p = jnp.exp(_products(rows, vectors) / temperature - row_lse[..., None])
    p = jnp.where(index[None, None, :] < filled, p, 0)
    return grad + jnp.matmul(p, vectors, precision=lax.Precision.HIGHEST)

  return _over_blocks(add, jnp.zeros_like(rows), (queue,), block)


def _entropy_terms(logits, lse):
  """Returns f[n], what these columns add to -sum p ln(p + 1e-8), the entropy of a softmax with log-sum-exp `lse`."""
  p = jnp.exp(logits - lse[:, None])
  return -jnp.sum(p * jnp.log(p + 1e-8), axis=1)


def _over_blocks(add: Callable, carry: Any, columns: tuple[jax.Array | None, ...], block: int) -> Any:
  """Returns the carry after carry = add(carry, (columns, their indices)) for one block of columns after the other.

  Blocks have equal sizes of at most `block` columns; the last one may be smaller.
  """
  total = columns[0].shape[0]
  size = -(-total // -(-total // block))
  count = total // size
  index = jnp.arange(total)
  pieces = jax.tree.map(lambda x: x[: count * size].reshape(count, size, *x.shape[1:]), (columns, index))
  carry, _ = lax.scan(lambda c, piece: (add(c, piece), None), carry, pieces)
  if count * size < total:
    carry = add(carry, jax.tree.map(lambda x: x[count * size :], (columns, index)))
  return carry


def _products(rows, vectors):
  # The temperature divides the product, as in the reference, and not z: near-duplicates then tie as they do there.
  return jnp.matmul(rows, vectors.T, precision=lax.Precision.HIGHEST)
