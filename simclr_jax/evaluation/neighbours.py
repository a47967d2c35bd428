"""Weighted nearest neighbours on features split over the devices, without the matrix of all similarities."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from simclr_jax import errors
from simclr_jax.evaluation import features as evaluation
from simclr_jax.hardware import sharding

# Test rows that are compared at a time, and training rows of a device that they are compared with at a time: on every
# device there are QUERIES * BLOCK similarities in memory, whatever the number of training rows.
QUERIES = 1024
BLOCK = 4096
# Of a device's last block; what is no row is never a neighbour.
GRAIN = 128


def accuracies(
  train_x,
  train_y,
  test_x,
  test_y,
  *,
  neighbours: Sequence[int],
  temperatures: Sequence[float],
  classes: int,
  mesh: Mesh | None = None,
  queries: int = QUERIES,
  block: int = BLOCK,
) -> list[dict[str, Any]]:
  """Returns the held-out accuracies of weighted nearest-neighbour classifiers; Wu et al. 2018, section 3.4.

  The k training features with the largest cosine similarity s vote for their labels with weight exp(s / temperature).
  One search for the largest k serves every k and temperature. Of equal similarities the lower training row comes
  first, of equal votes the lower class; a class without a vote is never right.

  Args:
    train_x: f[N, D], the same on every process; compared in float32.
    train_y: i32[N].
    test_x: f[M, D].
    test_y: i32[M].
    neighbours: the k's, 1 to N each.
    temperatures: of the weights, above 0.
    classes: number of labels.
    mesh: whose devices share the training rows; None for one device.
    queries: test rows that are compared at a time.
    block: training rows of a device that they are compared with at a time.

  Returns:
    for each k, and for each temperature in it, in the order given: `k`, `temperature`, `top1`, `top5` (shares of M).
  """
  check(neighbours, len(train_x))
  mesh = mesh or sharding.data_mesh(jax.local_devices()[:1])
  queries = min(queries, len(test_x))
  search, keys, queries = searcher(train_x, max(neighbours), mesh=mesh, queries=queries, block=block)
  labels = _placed(np.asarray(train_y, np.int32), len(train_y), sharding.replicated(mesh))
  ends = tuple(sorted(set(neighbours)))
  count = _counter(search, ends, tuple(temperatures), classes, mesh)
  right = np.zeros((len(ends), len(temperatures), 2), np.int64)
  for begin in range(0, len(test_x), queries):
    rows = slice(begin, begin + queries)
    x = _placed(np.asarray(test_x[rows], np.float32), queries, sharding.replicated(mesh))
    # No class is -1: the rows that fill up the last part are never right.
    y = np.full(queries, -1, np.int32)
    y[: len(test_y[rows])] = test_y[rows]
    right += np.asarray(jax.device_get(count(keys, labels, x, _placed(y, queries, sharding.replicated(mesh)))))
  shares = right / len(test_x)
  return [
    {"k": k, "temperature": temperature, "top1": float(top1), "top5": float(top5)}
    for k in neighbours
    for temperature, (top1, top5) in zip(temperatures, shares[ends.index(k)], strict=True)
  ]


def check(neighbours: Sequence[int], examples: int) -> None:
  """Raises a UserError unless every k is one of 1 to `examples`, the number of training rows."""
  for k in neighbours:
    if not 0 < k <= examples:
      raise errors.UserError(f"{k} neighbours asked for and there are {examples} training images; use 1 to {examples}.")


def searcher(train_x, k: int, *, mesh: Mesh, queries: int = QUERIES, block: int = BLOCK):
  """Returns (search, keys, queries): search(keys, f32[queries, D]) -> (cosine f32[queries, k], row i32[queries, k]).

  Neighbours are sorted, the most similar first, of equals the lower row. Each device has its part of the training
  rows, goes through it block by block and keeps the best k so far; then each merges all devices' candidates for its
  part of the queries, so that what comes out is split over the devices by query.

  Args:
    train_x: f[N, D], the same on every process.
    k: neighbours, at most N.
    mesh: the devices.
    queries: at a time; rounded up to a multiple of the devices.
    block: rows of a device at a time.
  """
  examples = len(train_x)
  queries = -(-queries // mesh.size) * mesh.size
  block = min(block, -(-examples // (mesh.size * GRAIN)) * GRAIN)
  own = -(-examples // (mesh.size * block)) * block
  keys = _units(_placed(train_x, own * mesh.size, sharding.batched(mesh), np.float32))
  return _search(examples, own, k, mesh, queries, block), keys, queries


# Kept, so that what is compiled for them serves every evaluation of a run.
@functools.lru_cache(maxsize=8)
def _search(examples, own, k, mesh, queries, block):
  """Returns `search` of `searcher` for so many rows, `own` of them on each device."""

  def nearest(keys, x):
    first = jax.lax.axis_index(sharding.AXIS) * own

    def step(best, part):
      number, rows = part
      index = first + number * block + jnp.arange(block, dtype=jnp.int32)
      similarity = jnp.matmul(x, rows.T, precision=jax.lax.Precision.HIGHEST)
      similarity = jnp.where(index[None] < examples, similarity, -jnp.inf)
      # What was found before has lower rows and stands first, so that top_k, which is stable, resolves ties.
      return _best(
        jnp.concatenate([best[0], similarity], axis=1),
        jnp.concatenate([best[1], jnp.broadcast_to(index[None], similarity.shape)], axis=1),
        k,
      ), None

    start = (jnp.full((queries, k), -jnp.inf, jnp.float32), jnp.full((queries, k), examples, jnp.int32))
    start = jax.lax.pcast(start, sharding.AXIS, to="varying")
    parts = (jnp.arange(own // block, dtype=jnp.int32), keys.reshape(own // block, block, -1))
    found, _ = jax.lax.scan(step, start, parts)
    # By query instead of by training row: each device gets all candidates of its queries, in the order of the devices.
    merged = [jax.lax.all_to_all(part, sharding.AXIS, split_axis=0, concat_axis=1, tiled=True) for part in found]
    return _best(*merged, k)

  split, whole = PartitionSpec(sharding.AXIS), PartitionSpec()
  local = jax.shard_map(nearest, mesh=mesh, in_specs=(split, whole), out_specs=split)
  return lambda keys, x: local(keys, _unit(x))


@functools.lru_cache(maxsize=8)
def _counter(search, ends, temperatures, classes, mesh):
  """Returns (keys, labels, x, y) -> how many are right, [len(ends)][len(temperatures)][2]; see `_right`."""

  def count(keys, labels, x, y):
    similarity, index = search(keys, x)
    votes = _votes(similarity, labels[index], ends, temperatures, classes)
    return [[_right(of_temperature, y) for of_temperature in of_k] for of_k in votes]

  return jax.jit(count, out_shardings=sharding.replicated(mesh))


def _best(similarity, index, k):
  similarity, place = jax.lax.top_k(similarity, k)
  return similarity, jnp.take_along_axis(index, place, axis=1)


def _unit(x):
  return x / jnp.maximum(jnp.linalg.norm(x, axis=1, keepdims=True), 1e-12)


_units = jax.jit(_unit, donate_argnums=0)


def _votes(similarity, label, ends, temperatures, classes):
  """Returns the votes f32[queries, classes] of the first k neighbours, for each k of `ends` and each temperature.

  Added up one neighbour after the other: in an order of its own, and without a [queries, k, classes] array.
  """
  # Only ratios count, and exp(1 / temperature) may be too large.
  weights = [jnp.exp((similarity - similarity[:, :1]) / temperature).T for temperature in temperatures]

  def step(votes, neighbour):
    label, *weight = neighbour
    of_class = label[:, None] == jnp.arange(classes)[None]
    return [vote + jnp.where(of_class, w[:, None], 0.0) for vote, w in zip(votes, weight, strict=True)], None

  votes = [jnp.zeros((len(similarity), classes), jnp.float32)] * len(temperatures)
  found = []
  for begin, end in zip([0, *ends], ends, strict=False):
    votes, _ = jax.lax.scan(step, votes, [part[begin:end] for part in (label.T, *weights)])
    found.append(votes)
  return found


def _right(votes, y):
  """Returns how many of the rows are right among the first, and among the first five."""
  own = jnp.take_along_axis(votes, y[:, None], axis=1)[:, 0]
  rank = evaluation.ranks(votes, y)
  return [jnp.sum((rank < top) & (own > 0) & (y >= 0)) for top in (1, 5)]


def _placed(array, rows, sharding, dtype=None):
  """Returns the array, filled up with zeros to so many rows, as `sharding` has it; each device's part is made alone."""

  def part(index):
    own = np.asarray(array[index], dtype)
    begin, end, _ = index[0].indices(rows)
    return np.concatenate([own, np.zeros((end - begin - len(own), *own.shape[1:]), own.dtype)])

  return jax.make_array_from_callback((rows, *array.shape[1:]), sharding, part)
