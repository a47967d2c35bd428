"""Weighted nearest neighbours on features split over the devices, without the matrix of all similarities."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from simclr_jax import errors
from simclr_jax.evaluation import features, geometry, scores
from simclr_jax.evaluation.features import Features
from simclr_jax.hardware import sharding

# Test rows per step, and training rows of one device per block: each device holds QUERIES * BLOCK similarities at a
# time, however many training rows there are.
QUERIES = 1024
BLOCK = 4096
# A device's number of training rows is padded to a multiple of this where it fits into one block.
GRAIN = 128

Search = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


def accuracies(
  train: Features,  # The same on every process; similarities are computed in float32.
  test: Features,
  *,
  neighbours: Sequence[int],  # The values of k, each from 1 to the number of training rows.
  temperatures: Sequence[float],  # Above 0.
  classes: int,
  mesh: Mesh | None = None,  # Shares the training rows; None for one device.
  queries: int = QUERIES,
  block: int = BLOCK,
) -> list[dict[str, Any]]:
  """Returns the held-out accuracies of weighted nearest-neighbour classifiers; Wu et al. 2018, section 3.4.

  For each k, and each temperature within it, in the given order: `k`, `temperature`, `top1`, `balanced_top1` (its mean
  over the classes) and, where `scores.tops` has it, `top5`. The k training features with the largest cosine similarity
  s vote for their labels with weight exp(s / temperature). One search for the largest k serves every k and temperature.
  Of equal similarities the lower training row ranks first, of equal votes the lower class; a class without a vote is
  never correct. Rows of label -1 neither vote nor count.
  """
  (train_x, train_y), (test_x, test_y) = (features.labelled(Features(*split)) for split in (train, test))
  check(neighbours, len(train_x))
  mesh = mesh or sharding.data_mesh(jax.local_devices()[:1])
  queries = min(queries, len(test_x))
  search, keys, queries = searcher(train_x, max(neighbours), mesh=mesh, queries=queries, block=block)
  labels = sharding.replicate(np.asarray(train_y, np.int32), mesh)
  ends = tuple(sorted(set(neighbours)))
  count = _counter(search, ends, tuple(temperatures), classes, mesh)
  correct = 0
  for begin in range(0, len(test_x), queries):
    rows = slice(begin, begin + queries)
    x = sharding.replicate(np.asarray(test_x[rows], np.float32), mesh, queries)
    # No class is -1: the rows that fill up the last step are never correct.
    y = np.full(queries, -1, np.int32)
    y[: len(test_y[rows])] = test_y[rows]
    correct += np.asarray(jax.device_get(count(keys, labels, x, sharding.replicate(y, mesh))), np.int64)
  found = {name: np.sum(correct[:, :, place], axis=-1) / len(test_x) for place, name in enumerate(scores.tops(classes))}
  found["balanced_top1"] = scores.balanced_of(correct[:, :, 0], np.bincount(test_y, minlength=classes))
  return [
    {"k": k, "temperature": temperature, **{name: float(table[ends.index(k), column]) for name, table in found.items()}}
    for k in neighbours
    for column, temperature in enumerate(temperatures)
  ]


def check(neighbours: Sequence[int], examples: int) -> None:
  """Raises a UserError unless every k is from 1 to `examples`, the number of training rows."""
  for k in neighbours:
    if not 0 < k <= examples:
      raise errors.UserError(f"{k} neighbours asked for and there are {examples} training images; use 1 to {examples}.")


def searcher(
  train_x: np.ndarray, k: int, *, mesh: Mesh, queries: int = QUERIES, block: int = BLOCK
) -> tuple[Search, jax.Array, int]:
  """Returns (search, keys, queries): search(keys, f32[queries, D]) -> (cosine f32[queries, k], row i32[queries, k]).

  `train_x` is f[N, D], the same on every process, k at most N. Neighbours are sorted by similarity, of equal ones the
  lower row first. `queries` is rounded up to a multiple of the devices, `block` counts training rows of one device.

  Each device searches its own training rows block by block and keeps the best k; then each device merges the
  candidates of all devices for its part of the queries, so that the results are split over the devices by query.
  """
  examples = len(train_x)
  queries = -(-queries // mesh.size) * mesh.size
  block = min(block, -(-examples // (mesh.size * GRAIN)) * GRAIN)
  own = -(-examples // (mesh.size * block)) * block
  keys = _units(sharding.place_rows(train_x, mesh, own * mesh.size, np.float32))
  return _search(examples, own, k, mesh, queries, block), keys, queries


# Cached, so that all evaluations of a run share one compilation.
@functools.lru_cache(maxsize=8)
def _search(examples, own, k, mesh, queries, block):
  """Returns `search` of `searcher` for this many training rows in total, `own` of them (with padding) per device."""

  def nearest(keys, x):
    first = jax.lax.axis_index(sharding.AXIS) * own

    def step(best, part):
      number, rows = part
      index = first + number * block + jnp.arange(block, dtype=jnp.int32)
      similarity = jnp.matmul(x, rows.T, precision=jax.lax.Precision.HIGHEST)
      # Padded rows are never neighbours.
      similarity = jnp.where(index[None] < examples, similarity, -jnp.inf)
      # Earlier candidates have lower rows and are put first, because top_k is stable: ties go to the lower row.
      return _best(
        jnp.concatenate([best[0], similarity], axis=1),
        jnp.concatenate([best[1], jnp.broadcast_to(index[None], similarity.shape)], axis=1),
        k,
      ), None

    start = (jnp.full((queries, k), -jnp.inf, jnp.float32), jnp.full((queries, k), examples, jnp.int32))
    start = jax.lax.pcast(start, sharding.AXIS, to="varying")
    parts = (jnp.arange(own // block, dtype=jnp.int32), keys.reshape(own // block, block, -1))
    found, _ = jax.lax.scan(step, start, parts)
    # From split by training row to split by query: each device gets all candidates of its queries, in device order.
    merged = [jax.lax.all_to_all(part, sharding.AXIS, split_axis=0, concat_axis=1, tiled=True) for part in found]
    return _best(*merged, k)

  split, whole = PartitionSpec(sharding.AXIS), PartitionSpec()
  local = jax.shard_map(nearest, mesh=mesh, in_specs=(split, whole), out_specs=split)
  return lambda keys, x: local(keys, geometry.unit(x))


@functools.lru_cache(maxsize=8)
def _counter(search, ends, temperatures, classes, mesh):
  """Returns (keys, labels, x, y) -> correct rows i32[len(ends), len(temperatures), T, classes]; see `_correct`."""

  def count(keys, labels, x, y):
    similarity, index = search(keys, x)
    votes = _votes(similarity, labels[index], ends, temperatures, classes)
    return jnp.stack([jnp.stack([_correct(of_temperature, y) for of_temperature in of_k]) for of_k in votes])

  return jax.jit(count, out_shardings=sharding.replicated(mesh))


def _best(similarity, index, k):
  similarity, place = jax.lax.top_k(similarity, k)
  return similarity, jnp.take_along_axis(index, place, axis=1)


_units = jax.jit(geometry.unit, donate_argnums=0)


def _votes(similarity, label, ends, temperatures, classes):
  """Returns the votes f32[queries, classes] of the first k neighbours, for each k of `ends` and each temperature.

  Votes are added one neighbour after the other: a fixed order of summation, and no [queries, k, classes] array.
  """
  # Relative to the largest similarity, because only ratios count and exp(1 / temperature) may overflow.
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


def _correct(votes, y):
  """Returns the numbers of rows, by their class, that are correct by each of `scores.tops`; i32[T, classes]."""
  own = jnp.take_along_axis(votes, y[:, None], axis=1)[:, 0]
  rank = scores.ranks(votes, y)
  of_class = jax.nn.one_hot(y, votes.shape[1], dtype=jnp.int32)
  correct = [(rank < top) & (own > 0) & (y >= 0) for top in scores.tops(votes.shape[1]).values()]
  return jnp.stack([jnp.sum(of_class * rows[:, None], axis=0) for rows in correct])
