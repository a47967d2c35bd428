"""Nearest neighbours: the results of the definition on any number of devices, without a matrix of all similarities."""

import jax
import numpy as np
import pytest

from simclr_jax import errors
from simclr_jax.evaluation import neighbours
from simclr_jax.hardware import sharding
from simclr_jax.jobs import knn as knn_job

EIGHT = pytest.mark.devices(8)
MESHES = {"one device": lambda: None, "eight devices": sharding.data_mesh}
KS, TEMPERATURES = [5, 413, 1], [0.07, 1.0]


def twin(train, test, *, ks, temperatures, classes):
  """Returns the accuracies by the definition, in float64."""
  (train_x, train_y), (test_x, test_y) = train, test
  unit = lambda x: x.astype(np.float64) / np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True)
  similarity = unit(test_x) @ unit(train_x).T
  order = np.argsort(-similarity, axis=1, kind="stable")
  found = []
  for k in ks:
    for temperature in temperatures:
      ranks = []
      for row, y in enumerate(test_y):
        votes = np.zeros(classes)
        for neighbour in order[row, :k]:
          votes[train_y[neighbour]] += np.exp(similarity[row, neighbour] / temperature)
        place = np.argsort(-votes, kind="stable").tolist().index(y)
        ranks.append(place if votes[y] else classes)
      top1, top5 = (np.mean(np.array(ranks) < top) for top in (1, 5))
      balanced = np.mean([np.mean(np.array(ranks)[test_y == label] < 1) for label in np.unique(test_y)])
      cell = {"k": k, "temperature": temperature, "top1": top1, "balanced_top1": balanced}
      found.append(cell | ({"top5": top5} if classes > 5 else {}))
  return found


def drawn(*, ties, train=413, test=90, classes=9):
  """Returns (train, test) features whose classes overlap; with ties, most similarities occur many times, exactly."""
  rng = np.random.default_rng(0)
  sizes = (train, test)
  if ties:
    # Entries of +1 and -1 in 16 dimensions: the norm is exactly 4 and every similarity an exact multiple of 1/8.
    x = [rng.choice([-1.0, 1.0], (size, 16)) for size in sizes]
  else:
    # Their norms are very different, which must not matter.
    x = [rng.standard_normal((size, 16)) * rng.uniform(0.1, 10, (size, 1)) for size in sizes]
  # The class of the nearest of some random directions, or any class.
  directions = rng.standard_normal((16, classes))
  y = [
    np.where(rng.random(len(part)) < 0.7, np.argmax(part @ directions, axis=1), rng.integers(0, classes, len(part)))
    for part in x
  ]
  return (x[0].astype(np.float32), y[0]), (x[1].astype(np.float32), y[1])


@pytest.mark.parametrize("mesh", ["one device", pytest.param("eight devices", marks=EIGHT)])
@pytest.mark.parametrize("ties", [True, False])
def test_every_k_and_temperature_is_what_the_definition_says(mesh, ties):
  data = drawn(ties=ties)
  keys = {"temperatures": TEMPERATURES, "classes": 9}
  found = neighbours.accuracies(*data, neighbours=KS, mesh=MESHES[mesh](), queries=64, block=100, **keys)
  wanted = twin(*data, ks=KS, **keys)
  assert [(cell["k"], cell["temperature"]) for cell in found] == [(k, t) for k in KS for t in TEMPERATURES]
  for ours, theirs in zip(found, wanted, strict=True):
    assert ours == pytest.approx(theirs, abs=1e-12)
  assert len({cell["top1"] for cell in found}) > 3


@EIGHT
@pytest.mark.parametrize("block", [7, 4096])
def test_one_and_eight_devices_find_the_same_neighbours(block):
  (train_x, _), (test_x, _) = drawn(ties=True)
  similarity = test_x.astype(np.float64) @ train_x.T.astype(np.float64) / 16
  order = np.argsort(-similarity, axis=1, kind="stable")[:, :100]
  for devices in (1, 8):
    mesh = sharding.data_mesh(jax.devices()[:devices])
    search, keys, queries = neighbours.searcher(train_x, 100, mesh=mesh, queries=len(test_x), block=block)
    x = np.zeros((queries, 16), np.float32)
    x[: len(test_x)] = test_x
    found, index = jax.jit(search)(keys, x)
    np.testing.assert_array_equal(np.asarray(index)[: len(test_x)], order)
    np.testing.assert_array_equal(np.asarray(found)[: len(test_x)], np.take_along_axis(similarity, order, axis=1))


@EIGHT
def test_no_device_holds_all_training_rows_or_their_similarities():
  rng = np.random.default_rng(0)
  mesh = sharding.data_mesh()
  train_x = rng.standard_normal((16_384, 32)).astype(np.float32)
  search, keys, queries = neighbours.searcher(train_x, 10, mesh=mesh, queries=64, block=256)
  assert {shard.data.shape for shard in keys.addressable_shards} == {(2048, 32)}
  x = jax.device_put(np.zeros((queries, 32), np.float32), sharding.replicated(mesh))
  compiled = jax.jit(search).lower(keys, x).compile()
  text = compiled.as_text()
  assert "f32[64,256]" in text
  for shape in ("[64,2048]", "[64,16384]", "[16384,32]"):
    assert shape not in text
  # The similarities of one block, with their row numbers and sorted, not those of all eight blocks of a device.
  assert compiled.memory_analysis().temp_size_in_bytes < 6 * 64 * (256 + 10) * 4


def test_a_class_without_a_vote_is_never_correct():
  x = np.eye(4, dtype=np.float32)
  (found,) = neighbours.accuracies((x[:2], [3, 3]), (x[:2], [0, 3]), neighbours=[2], temperatures=[0.1], classes=6)
  assert (found["top1"], found["top5"]) == (0.5, 0.5)


def test_with_nan_among_the_features_no_row_is_correct():
  train, test = drawn(ties=False)
  train[0][7] = np.nan
  (found,) = neighbours.accuracies(train, test, neighbours=[3], temperatures=[0.1], classes=9)
  assert (found["top1"], found["top5"]) == (0, 0)


@pytest.mark.parametrize("k", [0, 414])
def test_more_neighbours_than_there_are_images_are_refused(k):
  with pytest.raises(errors.UserError, match=f"{k} neighbours asked for and there are 413 training images; use 1 to"):
    neighbours.accuracies(*drawn(ties=False), neighbours=[3, k], temperatures=[0.1], classes=9)


def test_numbers_of_neighbours_without_training_images_are_left_out():
  assert knn_job._possible([10, 20, 100, 200], 80) == [10, 20]
  with pytest.raises(errors.UserError, match="100 neighbours asked for and there are 80"):
    knn_job._possible([100, 200], 80)
