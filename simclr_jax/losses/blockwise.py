"""NT-Xent and its relatives SupCon and DCL, sharded over devices and computed in blocks of columns.

`contrast` picks among them and the dense losses of `pair_losses`.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from simclr_jax import errors
from simclr_jax.hardware import sharding
from simclr_jax.losses import dense as pair_losses

BLOCKWISE = ("nt_xent", "sup_con", "dcl")
KINDS = BLOCKWISE + pair_losses.KINDS

# Whose negatives may come from earlier steps too; a memory has no labels for sup_con.
WITH_MEMORY = ("nt_xent", "dcl")

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

  Equation 1 of Chen et al. 2020; half of what the reference optimises. Memory is linear in N. Two arrays
  are gathered from all devices: the embeddings and, for the gradient, a log-sum-exp of each row.

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
  return contrast("nt_xent", z, temperature=temperature, normalize=normalize, mesh=mesh, block_size=block_size)


def sup_con(
  z: jax.Array,
  label: jax.Array,
  *,
  temperature: float | jax.Array,
  normalize: bool = True,
  mesh: Mesh | None = None,
  block_size: int | None = None,
) -> tuple[jax.Array, Metrics]:
  """Returns the mean supervised contrastive loss over the 2N embeddings, and the metrics of `nt_xent`.

  Equation 2 (L_out) of Khosla et al. 2020: the positives of a row are all other rows of its label, its other
  view included, and their log-probabilities are averaged outside of the logarithm. Without the factor
  temperature / base_temperature of the authors' code. With all labels different it is `nt_xent`.
  A third array is gathered, the labels.

  Args:
    z: f32[N, 2, D], both views of an image together.
    label: i32[N], any integers; sharded as z.
    temperature, normalize, mesh, block_size: as for `nt_xent`.
  """
  return contrast("sup_con", z, label, temperature=temperature, normalize=normalize, mesh=mesh, block_size=block_size)


def dcl(
  z: jax.Array,
  *,
  temperature: float | jax.Array,
  normalize: bool = True,
  mesh: Mesh | None = None,
  block_size: int | None = None,
) -> tuple[jax.Array, Metrics]:
  """Returns the mean decoupled contrastive loss over the 2N embeddings, and the metrics of `nt_xent`.

  Yeh et al. 2021: NT-Xent whose denominator leaves the positive out, so that the loss can be negative and
  N must be at least 2. Arguments and communication are those of `nt_xent`.
  """
  return contrast("dcl", z, temperature=temperature, normalize=normalize, mesh=mesh, block_size=block_size)


def contrast(
  kind: str,
  z: jax.Array,
  label: jax.Array | None = None,
  *,
  temperature: float | jax.Array,
  normalize: bool = True,
  margin: float = 0.8,
  memory: jax.Array | None = None,
  filled: jax.Array | int | None = None,
  mesh: Mesh | None = None,
  block_size: int | None = None,
) -> tuple[jax.Array, Metrics]:
  """Returns loss and metrics of one of KINDS, which the function of that name or `pair_losses.pair_loss` defines.

  Only `sup_con` reads the labels, and only the margin losses read the margin. The metrics are those of `nt_xent` for
  every kind, with these embeddings and this temperature, and never see the memory.

  Args:
    kind: one of KINDS.
    z: f32[N, 2, D], both views of an image together.
    label: i32[N], see `sup_con`.
    temperature, normalize, mesh, block_size: as for `nt_xent`.
    margin: see `pair_losses.pair_loss`.
    memory: f32[M, D], whole on every device and scored as it is: more negatives of every row, for WITH_MEMORY. Nothing
      flows back into it.
    filled: i32[], how many of its first rows there are by now; None for all.
  """
  devices = 1 if mesh is None else mesh.shape[sharding.AXIS]
  _check(kind, z, label, temperature, devices, block_size)
  _check_pairs(kind, z, margin)
  _check_memory(kind, z, memory)
  z = z.astype(jnp.promote_types(z.dtype, jnp.float32))
  if normalize:
    z = l2_normalized(z)
  temperature = jnp.asarray(temperature, z.dtype)
  if kind in pair_losses.KINDS:
    loss = pair_losses.pair_loss(kind, z, temperature=temperature, margin=margin)
    seen = lax.stop_gradient((z, temperature))
    return loss, contrast("nt_xent", seen[0], temperature=seen[1], normalize=False, mesh=mesh, block_size=block_size)[1]
  label = jnp.asarray(label) if kind == "sup_con" else None
  block = DEFAULT_BLOCK if block_size is None else block_size
  older = None
  if memory is not None:
    older = memory.astype(z.dtype), jnp.asarray(memory.shape[0] if filled is None else filled, jnp.int32)
  if mesh is None:
    return _contrast(z, label, older, temperature, kind, None, block)
  sharded = jax.shard_map(
    lambda z, label, older, temperature: _contrast(z, label, older, temperature, kind, sharding.AXIS, block),
    mesh=mesh,
    in_specs=(PartitionSpec(sharding.AXIS), PartitionSpec(sharding.AXIS), PartitionSpec(), PartitionSpec()),
    out_specs=PartitionSpec(),
  )
  return sharded(z, label, older, temperature)


def l2_normalized(z: jax.Array) -> jax.Array:
  """Returns f32[..., D] over its L2 norm; as in the reference, squared norms are at least 1e-12."""
  return z * lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(z), axis=-1, keepdims=True), 1e-12))


def _check(kind, z, label, temperature, devices, block_size) -> None:
  if kind not in KINDS:
    raise errors.UserError(f"unknown loss {kind!r}{errors.nearest(kind, KINDS)}; the losses are {', '.join(KINDS)}")
  if z.ndim != 3 or z.shape[1] != 2 or z.shape[0] == 0:
    raise errors.UserError(
      f"{kind} got z of shape {tuple(z.shape)}; it wants [N, 2, D], both views of an image together"
    )
  if z.shape[0] % devices:
    raise errors.UserError(f"{kind} got {z.shape[0]} images for {devices} devices; use a multiple of {devices}")
  if kind == "dcl" and z.shape[0] == 1:
    raise errors.UserError("dcl got 1 image, which has no negatives; use at least 2")
  if isinstance(temperature, int | float) and not temperature > 0:
    raise errors.UserError(f"{kind} got temperature {temperature}; it must be positive, for example 0.1")
  if block_size is not None and block_size < 1:
    raise errors.UserError(f"{kind} got block_size {block_size}; it must be at least 1, or None for {DEFAULT_BLOCK}")
  if kind != "sup_con":
    return
  if label is None:
    raise errors.UserError("sup_con got no labels; use a data set with labels, or nt_xent or dcl, which need none")
  if jnp.shape(label) != z.shape[:1] or not jnp.issubdtype(jnp.result_type(label), jnp.integer):
    raise errors.UserError(
      f"sup_con got labels {jnp.result_type(label)}{list(jnp.shape(label))}; it wants one integer for each image, "
      f"[{z.shape[0]}]"
    )


def _check_pairs(kind, z, margin) -> None:
  if kind not in pair_losses.KINDS:
    return
  if z.shape[0] == 1:
    raise errors.UserError(f"{kind} got 1 image, which has no negatives; use at least 2")
  if kind.startswith("margin") and not margin > 0:
    raise errors.UserError(f"{kind} got margin {margin}; it must be positive, for example 0.8")


def _check_memory(kind, z, memory) -> None:
  if memory is None:
    return
  if kind not in WITH_MEMORY:
    raise errors.UserError(f"{kind} takes no negatives from a memory; use {' or '.join(WITH_MEMORY)}, or no memory")
  if memory.ndim != 2 or memory.shape[1] != z.shape[2] or memory.shape[0] == 0:
    raise errors.UserError(f"{kind} got a memory of shape {tuple(memory.shape)}; it wants [M, {z.shape[2]}]")


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _contrast(
  z: jax.Array,
  label: jax.Array | None,
  older: tuple[jax.Array, jax.Array] | None,
  temperature: jax.Array,
  kind: str,
  axis: str | None,
  block: int,
) -> tuple[jax.Array, Metrics]:
  """Returns loss and metrics of the whole batch from this device's f32[n, 2, D] and i32[n].

  Without an axis there is one device. `older` is a memory f32[M, D] with the number i32[] of its first rows that count.
  """
  return _evaluate(z, label, older, temperature, kind, axis, block, with_gradient=False)[0]


def _forward(z, label, older, temperature, kind, axis, block):
  # The loss is a scalar, so its gradient can be formed at once, while the logits are there for the entropy too.
  result, (grad, from_memory) = _evaluate(z, label, older, temperature, kind, axis, block, with_gradient=True)
  return result, (z, temperature, grad, from_memory)


def _backward(kind, axis, block, residuals, cotangents):
  z, temperature, grad, from_memory = residuals
  grad = grad * cotangents[0]
  # Without a memory the loss depends on z / sqrt(temperature) alone; the memory is not divided along.
  along = jnp.sum(grad * z)
  if from_memory is not None:
    along += from_memory * cotangents[0]
  temperature_grad = -along / (2 * temperature)
  return grad, None, None, temperature_grad if axis is None else lax.psum(temperature_grad, axis)


_contrast.defvjp(_forward, _backward)


def _evaluate(z, label, older, temperature, kind, axis, block, *, with_gradient):
  """Returns (loss, metrics) and the gradient of the loss, if it is asked for.

  That is the gradient f32[n, 2, D] and, with a memory, the memory's part of it times z, summed.
  """
  n = z.shape[0]
  start = 0 if axis is None else lax.axis_index(axis) * n
  # A view at a time keeps the blocks two-dimensional, which is what TPU tiles want.
  rows = z.swapaxes(0, 1)
  columns = rows if axis is None else lax.all_gather(z, axis, tiled=True).swapaxes(0, 1)
  total = columns.shape[1]
  gap, positive, candidates, hits = _scores(rows, columns, start, temperature, block)
  if older is not None:
    gap = jnp.logaddexp(gap, _memory_lse(rows, *older, positive, temperature, block))

  if kind == "dcl":
    row_loss, pull = gap, jnp.full_like(gap[0], -2)
  else:
    # For the positive, p - 1 is formed without cancellation, in both directions: its row is local too.
    row_loss, pull = jax.nn.softplus(gap), -jnp.sum(jax.nn.sigmoid(gap), axis=0)
  row_lse = positive + row_loss
  groups = None
  if kind == "sup_con":
    groups, spread = _label_groups(rows, columns, label, positive, temperature, axis)
    row_loss = row_loss + spread
    pull = pull + (2 - groups[2])

  grad = from_memory = None
  if with_gradient:
    column_lse = row_lse if axis is None else lax.all_gather(row_lse, axis, axis=1, tiled=True)
    grad, entropies = _gradient(rows, columns, row_lse, column_lse, pull, groups, candidates, start, temperature, block)
    if older is not None:
      memory_grad = _memory_gradient(rows, *older, row_lse, temperature, block)
      grad += memory_grad
      from_memory = jnp.sum(memory_grad * rows) / (2 * total * temperature)
    grad = grad.swapaxes(0, 1) / (2 * total * temperature)
  else:
    entropies = _entropies(rows[0], columns[1], candidates, temperature, block)

  sums = (jnp.sum(jnp.mean(row_loss, axis=0)), jnp.sum(entropies), *hits)
  loss, entropy, acc, top1 = (x / total for x in (sums if axis is None else lax.psum(sums, axis)))
  return (loss, {"contrast_acc": acc, "contrast_entropy": entropy, "contrast_top1": top1}), (grad, from_memory)


def _scores(rows, columns, start, temperature, block):
  """Returns what the first pass over all similarities finds out about rows f32[2, n, D].

  The log-sum-exp over the negatives less the positive's similarity f32[2, n]; that similarity f32[2, n];
  the log-sum-exp of each first view over all second views f32[n]; how many first views have their
  positive first among the second views, and how many rows (in pairs) among all others.
  """
  # Axes of the following four: view of the column, view of the row, image.
  before, after, sums, own = (
    jnp.stack(pair)
    for pair in zip(*(_row_statistics(rows, view, start, temperature, block) for view in columns), strict=True)
  )
  positive = jnp.stack([own[1, 0], own[0, 1]])
  # As a distance between the positive and the negatives alone, a loss close to zero keeps its digits.
  negatives = jnp.maximum(before, after) - positive[None] + jnp.log(sums)
  gap = jnp.logaddexp(negatives[0], negatives[1])
  candidates = positive[0] + jax.nn.softplus(negatives[1, 0])

  first = (positive > jnp.max(before, axis=0)) & (positive >= jnp.max(after, axis=0))
  first_across = (positive[0] > before[1, 0]) & (positive[0] >= after[1, 0])
  hits = jnp.sum(first_across, dtype=rows.dtype), jnp.sum(jnp.mean(first, axis=0, dtype=rows.dtype))
  return gap, positive, candidates, hits


def _row_statistics(rows, columns, start, temperature, block):
  """Returns four f32[2, n] about rows f32[2, n, D] and columns f32[N, D] of one view.

  The largest similarity to an image before the row's own and to one after it; the sum of all these
  similarities' exponentials, relative to the larger of the two; the similarity to the own image.
  """
  n = rows.shape[1]
  examples = start + jnp.arange(n)
  # Made from the rows, because a carry must enter a scan as what it is inside: different per device.
  lowest, zeros = (jnp.full_like(rows[..., 0], value) for value in (jnp.finfo(rows.dtype).min, 0))

  def add(carry, piece):
    before, after, sums, own = carry
    (vectors,), index = piece
    products = _products(rows, vectors)
    # Division keeps the order, so the largest quotient is the quotient of the largest.
    largest = jnp.max(products, axis=2) / temperature
    # Of all rows only those near the diagonal, with images of this block, need masks: for them all that
    # follows is done again with masks and put in place. Masking every row would take four more arrays.
    count = min(n, vectors.shape[0])
    first = jnp.clip(index[0] - start, 0, n - count)
    near = lax.dynamic_slice_in_dim(products, first, count, axis=1)
    distance = index[None, None, :] - lax.dynamic_slice_in_dim(examples, first, count)[None, :, None]
    near_own = jnp.sum(jnp.where(distance == 0, near, 0), axis=2) / temperature
    near_before, near_after = (
      jnp.max(jnp.where(side, near, -jnp.inf), axis=2) / temperature for side in (distance < 0, distance > 0)
    )

    def put(x, part):
      return lax.dynamic_update_slice_in_dim(x, part, first, axis=1)

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
  """Returns what SupCon adds for labels i32[n] and rows f32[2, n, D] whose own positives score f32[2, n].

  A group (labels i32[N], the rows' labels i32[n], 2 / positives of a row f32[n]), and the own positive's
  similarity less the mean over all positives f32[2, n].
  """
  labels = label if axis is None else lax.all_gather(label, axis, tiled=True)
  ordered = jnp.sort(labels)
  # The place of a label's first copy among all labels serves as its number, below N whatever the labels are.
  sums = jax.ops.segment_sum(columns[0] + columns[1], jnp.searchsorted(ordered, labels), labels.shape[0])
  number = jnp.searchsorted(ordered, label)
  positives = (2 * (jnp.searchsorted(ordered, label, side="right") - number) - 1).astype(rows.dtype)
  others = (sums[number] - (rows[0] + rows[1]))[None]
  others = jnp.sum(rows * others, axis=2) / temperature
  spread = ((positives - 1)[None] * positive - others) / positives[None]
  return (labels, label, 2 / positives), spread


def _gradient(rows, columns, row_lse, column_lse, pull, groups, candidates, start, temperature, block):
  """Returns the rows' gradient f32[2, n, D] times 2N temperature, and f32[n] of `_entropies`.

  The similarities are symmetric, so row i's gradient is sum_j c_ij z_j with c_ij = p_ij + p_ji - 2 [j is i's
  positive] / i's positives. Each c is complete before the product, which else would lose digits.

  Args:
    row_lse, column_lse: f32[2, n], f32[2, N], so that p_ij = exp(logit - lse of i).
    pull: f32[n], c for the two views of one image.
    groups: of `_label_groups`, or None where the other view is the only positive.
  """
  _, n, dim = rows.shape
  examples, pull = jnp.arange(2 * n)[:, None] % n + start, jnp.concatenate([pull, pull])[:, None]
  rows, row_lse = rows.reshape(2 * n, dim), row_lse.reshape(2 * n, 1)
  first_view = jnp.arange(2 * n)[:, None] < n
  labels = None
  if groups is not None:
    labels, row_labels, share = (groups[0], *(jnp.concatenate([x, x])[:, None] for x in groups[1:]))
  carry = jnp.zeros_like(rows), jnp.zeros_like(candidates)
  for view in (0, 1):
    own = jnp.where(first_view == (view == 0), 0, pull)

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
        entropies += _entropy_terms(logits[:n], candidates)
      return grad, entropies

    carry = _over_blocks(add, carry, (columns[view], column_lse[view], labels), block)
  grad, entropies = carry
  return grad.reshape(2, n, dim), entropies


def _memory_lse(rows, memory, filled, positive, temperature, block):
  """Returns f32[2, n]: the log-sum-exp of rows f32[2, n, D] over the filled rows of a memory f32[M, D].

  Less the own positive's similarity f32[2, n]; minus infinity where none is filled.
  """

  def add(carry, piece):
    top, sums = carry
    (vectors,), index = piece
    products = jnp.where(index[None, None, :] < filled, _products(rows, vectors), -jnp.inf)
    new_top = jnp.maximum(top, jnp.max(products, axis=2) / temperature)
    return new_top, sums * jnp.exp(top - new_top) + _exponential_sums(products, new_top, temperature)

  top, sums = _over_blocks(
    add, (jnp.full_like(positive, jnp.finfo(rows.dtype).min), jnp.zeros_like(positive)), (memory,), block
  )
  return top - positive + jnp.log(sums)


def _memory_gradient(rows, memory, filled, row_lse, temperature, block):
  """Returns f32[2, n, D]: the sum over a memory f32[M, D] of exp(logit - row_lse) times its rows."""

  def add(grad, piece):
    (vectors,), index = piece
    p = jnp.exp(_products(rows, vectors) / temperature - row_lse[..., None])
    p = jnp.where(index[None, None, :] < filled, p, 0)
    return grad + jnp.matmul(p, vectors, precision=lax.Precision.HIGHEST)

  return _over_blocks(add, jnp.zeros_like(rows), (memory,), block)


def _entropies(rows, columns, lse, temperature, block):
  """Returns f32[n]: -sum p ln(p + 1e-8) of the softmax of rows f32[n, D] over columns f32[N, D], its lse f32[n]."""

  def add(entropies, piece):
    (vectors,), _ = piece
    return entropies + _entropy_terms(_products(rows, vectors) / temperature, lse)

  return _over_blocks(add, jnp.zeros_like(lse), (columns,), block)


def _entropy_terms(logits, lse):
  p = jnp.exp(logits - lse[:, None])
  return -jnp.sum(p * jnp.log(p + 1e-8), axis=1)


def _over_blocks(add: Callable, carry: Any, columns: tuple[jax.Array | None, ...], block: int) -> Any:
  """Returns the carry after carry = add(carry, (piece, image numbers)) over all pieces of the columns.

  A piece has at most `block` columns; the last one may have fewer.
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
  # Divided by the temperature after the product, as the reference: near-duplicates then tie as they do there.
  return jnp.matmul(rows, vectors.T, precision=lax.Precision.HIGHEST)
