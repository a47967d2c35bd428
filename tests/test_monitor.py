"""Measures during pretraining: the formulas, and what they are computed on, with a network of three matrices."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from simclr_jax.evaluation import geometry, monitor, neighbours
from simclr_jax.hardware import sharding

# Slow versions of the formulas, in float64.


def unit(x):
  return [[value / math.sqrt(sum(v * v for v in row)) for value in row] for row in x.tolist()]


def squared_distance(a, b):
  return sum((x - y) ** 2 for x, y in zip(a, b, strict=True))


def alignment(z):
  pairs = list(zip(unit(z[:, 0]), unit(z[:, 1]), strict=True))
  return sum(squared_distance(a, b) for a, b in pairs) / len(pairs)


def uniformity(z):
  views = [unit(z[:, view]) for view in range(z.shape[1])]
  rows = [(image, row) for view in views for image, row in enumerate(view)]
  kernel = [math.exp(-2 * squared_distance(a, b)) for i, a in rows for j, b in rows if i != j]
  return math.log(sum(kernel) / len(kernel))


def effective_rank(x):
  # Singular values as roots of the eigenvalues of the Gram matrix.
  values = np.sqrt(np.maximum(np.linalg.eigvalsh(x.astype(np.float64).T @ x.astype(np.float64)), 0))
  shares = [value / values.sum() for value in values if value > 0]
  return math.exp(-sum(share * math.log(share) for share in shares))


def test_alignment_uniformity_and_rank_agree_with_the_formulas():
  z = np.random.default_rng(0).normal(size=(20, 2, 6)).astype(np.float32) * 3 + 0.5
  assert geometry.alignment(z) == pytest.approx(alignment(z.astype(np.float64)), rel=1e-6)
  assert geometry.uniformity(z) == pytest.approx(uniformity(z.astype(np.float64)), rel=1e-6)
  assert geometry.effective_rank(z.reshape(40, 6)) == pytest.approx(effective_rank(z.reshape(40, 6)), rel=1e-6)


def test_a_collapse_shows_and_gaussians_have_nearly_full_rank():
  point = np.broadcast_to(np.float32([1, 2, 3, 4]), (16, 2, 4))
  assert geometry.alignment(point) == pytest.approx(0, abs=1e-12)
  assert geometry.uniformity(point) == pytest.approx(0, abs=1e-12)
  # Multiples of one vector have one direction.
  line = point[:, 0] * np.arange(1, 17, dtype=np.float32)[:, None]
  assert geometry.effective_rank(line) == pytest.approx(1, abs=1e-6)
  spread = np.random.default_rng(0).normal(size=(4096, 2, 32))
  assert 0.99 * 32 < geometry.effective_rank(spread[:, 0]) <= 32
  # Independent views: E d^2 = 2.
  assert geometry.alignment(spread) == pytest.approx(2, abs=0.02)
  assert geometry.uniformity(spread[:200]) < -3.5
  assert geometry.effective_rank(np.eye(7)) == pytest.approx(7)
  assert geometry.effective_rank(np.zeros((5, 3))) == 0
  assert math.isnan(geometry.effective_rank(np.full((5, 3), np.nan)))


class Network:
  """h = relu(images w), z = h v, logits = h u (None without u); counts how often it is traced."""

  def __init__(self):
    self.traced = 0

  def apply(self, variables, images, *, train):
    assert not train
    self.traced += 1
    params = variables["params"]
    h = jax.nn.relu(images.reshape(len(images), -1) @ params["w"])
    return h, h @ params["v"], h @ params["u"] if "u" in params else None


CLASSES, PAIRS = 7, 24


def variables(dtype, *, online=True):
  rng = np.random.default_rng(0)
  shapes = {"w": (48, 20), "v": (20, 7), "u": (20, CLASSES)}
  params = {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items() if online or name != "u"}
  return {"params": params, "batch_stats": {}}


def images(seed, count):
  """Returns images f64[N, 4, 4, 3] and label i32[N]."""
  rng = np.random.default_rng(seed)
  return rng.normal(size=(count, 4, 4, 3)), rng.integers(0, CLASSES, count).astype(np.int32)


def batches(seed, count, dtype, size=24):
  """Returns a function that starts a pass over `images`, the last batch padded."""

  def rows():
    image, label = (np.concatenate([x, np.zeros((-count % size, *x.shape[1:]), x.dtype)]) for x in images(seed, count))
    index = np.arange(len(image))
    columns = {"image": image.astype(dtype), "label": label, "index": index, "mask": (index < count).astype(np.float32)}
    return ({name: x[begin : begin + size] for name, x in columns.items()} for begin in range(0, count, size))

  return rows


def pairs(dtype):
  return np.random.default_rng(3).normal(size=(2, 16, 2, 4, 4, 3)).astype(dtype)


def measures(devices, dtype, *, network=None, known=48, gather=lambda params: params):
  """Returns (accuracies, geometry), both variables -> metrics, on so many devices."""
  network, mesh = network or Network(), sharding.data_mesh(jax.devices()[:devices])
  views = lambda: (sharding.global_batch(mesh, part) for part in pairs(dtype))
  held_out, known = batches(1, 80, dtype), known and batches(2, known, dtype)
  accuracies = monitor.held_out_accuracies(
    network, mesh, held_out, known, knn_neighbours=5, gather_params=gather, classes=CLASSES
  )
  return accuracies, monitor.pair_geometry(network, mesh, views, PAIRS, gather)


@pytest.mark.devices(8)
def test_eight_devices_measure_what_one_does(x64):
  results = []
  for devices in (1, 8):
    accuracies, shape = measures(devices, np.float64)
    results.append({**accuracies(variables(np.float64)), **shape(variables(np.float64))})
  assert results[0] == pytest.approx(results[1], rel=1e-9)


def test_held_out_accuracies_agree_with_numpy():
  accuracies, _ = measures(1, np.float32)
  found, params = accuracies(variables(np.float32)), variables(np.float64)["params"]
  h = {
    seed: np.maximum(images(seed, count)[0].reshape(count, -1) @ params["w"], 0) for seed, count in ((1, 80), (2, 48))
  }
  label, logits = images(1, 80)[1], h[1] @ params["u"]
  order = np.argsort(-logits, axis=1)
  assert found["online_examples"] == 80
  assert found["online_top1"] == np.mean(order[:, 0] == label)
  assert found["online_top5"] == np.mean(np.any(order[:, :5] == label[:, None], axis=1))
  losses = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(80), label]
  assert found["online_loss"] == pytest.approx(losses.mean(), rel=1e-5)
  known, test = (h[2].astype(np.float32), images(2, 48)[1]), (h[1].astype(np.float32), label)
  keys = {"neighbours": [5], "temperatures": [0.1], "classes": CLASSES}
  (cell,) = neighbours.accuracies(known, test, **keys)
  assert (found["knn_top1"], found["knn_balanced_top1"]) == (cell["top1"], cell["balanced_top1"])
  recalls = [np.mean(order[label == each, 0] == each) for each in np.unique(label)]
  assert found["online_balanced_top1"] == pytest.approx(np.mean(recalls), rel=1e-12)


def test_pair_geometry_measures_the_first_pairs():
  _, shape = measures(1, np.float32)
  found, params = shape(variables(np.float32)), variables(np.float64)["params"]
  flat = pairs(np.float64).reshape(32, 2, -1)[:PAIRS]
  h = np.maximum(flat @ params["w"], 0)
  z = h @ params["v"]
  assert found["alignment"] == pytest.approx(alignment(z), rel=1e-4)
  assert found["uniformity"] == pytest.approx(uniformity(z), rel=1e-4)
  assert found["rank_h"] == pytest.approx(effective_rank(h.reshape(2 * PAIRS, -1)), rel=1e-4)
  assert found["rank_z"] == pytest.approx(effective_rank(z.reshape(2 * PAIRS, -1)), rel=1e-4)


def test_metrics_without_their_images_or_classifier_are_absent():
  accuracies, _ = measures(1, np.float32, known=None)
  online = {f"online_{name}" for name in ("top1", "balanced_top1", "loss", "examples")}
  online |= {f"online_{name}" for name in ("top5",) if CLASSES > 5}
  assert set(accuracies(variables(np.float32))) == online
  accuracies, _ = measures(1, np.float32)
  assert set(accuracies(variables(np.float32, online=False))) == {"knn_top1", "knn_balanced_top1"}


def test_fewer_known_images_than_neighbours_all_vote():
  accuracies, _ = measures(1, np.float32, known=3)
  assert 0 <= accuracies(variables(np.float32))["knn_top1"] <= 1


def test_a_second_evaluation_traces_no_network():
  network, gathered = Network(), []

  def gather(params):
    gathered.append(set(params))
    return jax.tree.map(jnp.asarray, params)

  accuracies, shape = measures(1, np.float32, network=network, gather=gather)
  first = {**accuracies(variables(np.float32)), **shape(variables(np.float32))}
  traced = network.traced
  assert gathered == [{"w", "v", "u"}] * traced
  assert {**accuracies(variables(np.float32)), **shape(variables(np.float32))} == first
  assert network.traced == traced
