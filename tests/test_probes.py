"""Linear probes: each cell of the grid as if trained alone, L-BFGS at scikit-learn's minimum, standardisation."""

import jax
import numpy as np
import pytest
from sklearn import linear_model

from simclr_jax import errors, randomness
from simclr_jax.evaluation import probes
from simclr_jax.hardware import sharding

EIGHT = pytest.mark.devices(8)
MESHES = {"one device": lambda: None, "eight devices": sharding.data_mesh}


def clusters(examples, dim, classes, dtype, *, spread=1.0):
  """Returns overlapping classes: features [N, D] and label i32[N]."""
  rng = np.random.default_rng(0)
  label = rng.integers(0, classes, examples).astype(np.int32)
  centre = rng.standard_normal((classes, dim))
  return (centre[label] + spread * rng.standard_normal((examples, dim))).astype(dtype), label


def nesterov(x, y, *, classes, learning_rate, weight_decay, epochs, batch_size, seed):
  """Returns (kernel, bias) after the updates v = 0.9 v - lr g; w = w + 0.9 v - lr g, one classifier alone."""
  with_one = np.concatenate([x, np.ones((len(x), 1))], axis=1)
  w = np.zeros((with_one.shape[1], classes))
  v = np.zeros_like(w)
  steps = len(x) // batch_size
  for epoch in range(epochs):
    key = jax.random.fold_in(jax.random.fold_in(randomness.key(seed), randomness.PROBES), epoch)
    order = np.asarray(jax.random.permutation(key, len(x)))
    for step in range(steps):
      rows = order[step * batch_size : (step + 1) * batch_size]
      p = np.exp(with_one[rows] @ w)
      p /= p.sum(axis=1, keepdims=True)
      g = with_one[rows].T @ (p - np.eye(classes)[y[rows]]) / batch_size + weight_decay * w
      done = (epoch * steps + step) / (epochs * steps)
      rate = learning_rate * batch_size / 256 * (1 + np.cos(np.pi * done)) / 2
      v = 0.9 * v - rate * g
      w = w + 0.9 * v - rate * g
  return w[:-1], w[-1]


@pytest.mark.parametrize("mesh", ["one device", pytest.param("eight devices", marks=EIGHT)])
def test_a_cell_of_the_grid_is_the_classifier_trained_alone(x64, mesh):
  x, y = clusters(70, 6, 3, np.float64)
  rates, decays = [0.1, 2.0], [0.0, 0.01, 0.3]
  keys = {"classes": 3, "epochs": 3, "batch_size": 16, "seed": 5}
  settings = probes.Grid(rates, decays, keys["epochs"], keys["batch_size"])
  grid = probes.train_grid(x, y, settings, classes=3, seed=5, mesh=MESHES[mesh]())["dense"]
  assert grid["kernel"].shape == (2, 3, 6, 3)
  for row, rate in enumerate(rates):
    for column, decay in enumerate(decays):
      kernel, bias = nesterov(x, y, learning_rate=rate, weight_decay=decay, **keys)
      largest = np.abs(kernel).max()
      np.testing.assert_allclose(grid["kernel"][row, column], kernel, rtol=0, atol=1e-9 * largest)
      np.testing.assert_allclose(grid["bias"][row, column], bias, rtol=0, atol=1e-9 * largest)


@EIGHT
def test_an_epoch_is_one_dispatch_and_devices_compute_their_own_rows(monkeypatch):
  x, y = clusters(64, 6, 3, np.float32)
  compiled, jit = [], jax.jit

  def recording(fun, **options):
    jitted = jit(fun, **options)

    def call(*args):
      compiled.append((fun.__name__, jitted.lower(*args).compile().as_text()))
      return jitted(*args)

    return call

  monkeypatch.setattr(jax, "jit", recording)
  probes.train_grid(x, y, probes.Grid([0.1, 1.0], [0.0], 3, 32), classes=3, seed=0, mesh=sharding.data_mesh())
  assert [name for name, _ in compiled].count("run_epoch") == 3
  text = compiled[-1][1]
  assert "f32[4,6]" in text
  assert "f32[32,6]" not in text


@pytest.mark.slow
@EIGHT
def test_logistic_regression_finds_scikit_learn_s_minimum(x64):
  x, y = clusters(203, 7, 4, np.float64, spread=2.0)
  strengths = [1e-3, 1e-1, 1e-2]
  path = probes.L2Path(strengths, 200, 1e-9)
  params, ended = probes.logistic_regression(x, y, path, classes=4, mesh=sharding.data_mesh())
  assert max(ended["gradient"]) <= 1e-9
  for number, strength in enumerate(strengths):
    theirs = linear_model.LogisticRegression(C=1 / (len(x) * strength), tol=1e-10, max_iter=5000).fit(x, y)
    ours = [np.asarray(params["dense"][name][number]) for name in ("kernel", "bias")]
    values = []
    for kernel, bias in (ours, (theirs.coef_.T, theirs.intercept_)):
      logits = x @ kernel + bias
      losses = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(x)), y]
      values.append(losses.mean() + strength / 2 * np.square(kernel).sum())
    np.testing.assert_allclose(values[0], values[1], rtol=1e-6)
    np.testing.assert_allclose(ended["objective"][number], values[0], rtol=1e-12)
    np.testing.assert_array_equal(np.argmax(x @ ours[0] + ours[1], axis=1), theirs.predict(x))


@pytest.mark.slow
def test_weak_penalties_go_beyond_the_minimum_of_the_next_stronger():
  # Wide features: the classes can be separated, and the gradient is small long before the minimum.
  x, y = clusters(120, 40, 4, np.float32, spread=2.0)
  strengths = [1e-2, 1e-3, 1e-4, 1e-5]
  params, ended = probes.logistic_regression(x, y, probes.L2Path(strengths, 500, 1e-4), classes=4)
  assert np.all(ended["converged"])
  assert min(ended["steps"]) >= probes.STEADY
  for number, strength in enumerate(strengths):
    theirs = linear_model.LogisticRegression(C=1 / (len(x) * strength), tol=1e-8, max_iter=20_000).fit(x, y)
    values = []
    for kernel, bias in (
      [np.asarray(params["dense"][name][number], np.float64) for name in ("kernel", "bias")],
      (theirs.coef_.T, theirs.intercept_),
    ):
      logits = x @ kernel + bias
      logits -= logits.max(axis=1, keepdims=True)
      losses = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(x)), y]
      values.append(losses.mean() + strength / 2 * np.square(kernel).sum())
    assert values[0] == pytest.approx(values[1], rel=5e-3), strength
  _, ended = probes.logistic_regression(x, y, probes.L2Path(strengths, 12, 1e-4), classes=4)
  assert not ended["converged"][-1]


@EIGHT
def test_regressions_of_label_vectors_are_one_binary_for_each_class(x64):
  rng = np.random.default_rng(0)
  x = rng.standard_normal((101, 5))
  y = (x @ rng.standard_normal((5, 3)) + rng.standard_normal((101, 3)) > 0).astype(np.int32)
  y[rng.random((101, 3)) < 0.2] = -1
  strengths = [0.1, 1e-3]
  path = probes.L2Path(strengths, 300, 1e-9)
  params, ended = probes.logistic_regression(x, y, path, classes=3, mesh=sharding.data_mesh())
  assert max(ended["gradient"]) <= 1e-9
  for number, logits in enumerate(probes.logits(params, x, mesh=sharding.data_mesh())):
    for label in range(3):
      known = y[:, label] >= 0
      # C is the inverse of the strength on sums over examples; unknown labels do not change the weight of the others.
      fitted = linear_model.LogisticRegression(C=1 / (len(x) * strengths[number]), tol=1e-10, max_iter=5000)
      fitted.fit(x[known], y[known, label])
      np.testing.assert_allclose(logits[:, label], fitted.decision_function(x), rtol=0, atol=2e-4)


def test_a_search_stops_after_max_steps_and_reports_its_gradient():
  x, y = clusters(64, 6, 3, np.float32)
  _, ended = probes.logistic_regression(x, y, probes.L2Path([1e-3], 3, 0.0), classes=3)
  assert ended["steps"] == 3
  assert ended["gradient"] > 0


@EIGHT
def test_accuracies_count_every_row_of_every_classifier_once(monkeypatch):
  monkeypatch.setattr(probes, "BLOCK", 16)
  rng = np.random.default_rng(0)
  kernel, bias = rng.standard_normal((2, 3, 5, 8)).astype(np.float32), np.zeros((2, 3, 8), np.float32)
  kernel[1, 2] = np.nan
  x, y = rng.standard_normal((37, 5)).astype(np.float32), rng.integers(0, 8, 37)
  mesh = sharding.data_mesh()
  params = jax.device_put({"dense": {"kernel": kernel, "bias": bias}}, sharding.replicated(mesh))
  found = probes.accuracies(params, x, y, mesh=mesh)
  order = np.argsort(-np.einsum("nd,lwdk->lwnk", x, kernel), axis=-1)
  for name, top in (("top1", 1), ("top5", 5)):
    right = np.mean(np.any(order[..., :top] == y[:, None], axis=-1), axis=-1)
    right[1, 2] = 0
    np.testing.assert_allclose(found[name], right, rtol=1e-12)
  recalls = [np.mean(order[..., y == label, 0] == label, axis=-1) for label in np.unique(y)]
  balanced = np.mean(recalls, axis=0)
  balanced[1, 2] = 0
  np.testing.assert_allclose(found["balanced_top1"], balanced, rtol=1e-12)


def test_features_are_standardised_by_the_training_ones():
  rng = np.random.default_rng(0)
  train, other = (rng.normal(1000, 3, (size, 130)).astype(np.float32) for size in (500, 7))
  train[:, 4] = 0.1
  ours, theirs = probes.standardise(train, other)
  assert ours.dtype == theirs.dtype == np.float32
  np.testing.assert_array_equal(ours[:, 4], 0)
  np.testing.assert_array_equal(theirs[:, 4], 0)
  wide = train.astype(np.float64)
  wanted = np.delete((other - wide.mean(0)) / np.where(np.arange(130) == 4, 1, wide.std(0)), 4, axis=1)
  np.testing.assert_allclose(np.delete(theirs, 4, axis=1), wanted, atol=1e-4)


def test_preconditioned_features_have_the_same_regressions(x64):
  rng = np.random.default_rng(0)
  x, y = rng.standard_normal((80, 5)) * 3 + 40, rng.integers(0, 3, 80).astype(np.int32)
  (ours, other), scale = probes.precondition(x, x[:7])
  np.testing.assert_array_equal(other, ours[:7])
  assert ours.mean() == pytest.approx(0, abs=1e-12)
  assert ours.var(axis=0).mean() == pytest.approx(1)
  trained, _ = probes.logistic_regression(ours, y, probes.L2Path([0.1 / (80 * scale**2)], 300, 1e-10), classes=3)
  (logits,) = probes.logits(trained, ours)
  theirs = linear_model.LogisticRegression(C=1 / 0.1, tol=1e-10, max_iter=20_000).fit(x, y).predict_log_proba(x)
  np.testing.assert_allclose(logits - np.log(np.exp(logits).sum(1, keepdims=True)), theirs, atol=1e-3)


def test_rows_held_back_depend_on_the_seed_and_leave_all_the_others():
  train, held_back = probes.held_back(101, 0.1, 3)
  assert len(held_back) == 10
  np.testing.assert_array_equal(np.sort(np.concatenate([train, held_back])), np.arange(101))
  np.testing.assert_array_equal(probes.held_back(101, 0.1, 3)[1], held_back)
  assert np.any(probes.held_back(101, 0.1, 4)[1] != held_back)
  assert [len(part) for part in probes.held_back(2, 0.9, 0)] == [1, 1]


def test_a_batch_larger_than_the_rows_is_refused():
  x, y = np.zeros((20, 4), np.float32), np.zeros(20, np.int32)
  with pytest.raises(errors.UserError, match="20 training rows cannot fill a batch of 32"):
    probes.train_grid(x, y, probes.Grid([0.1], [0.0], 1, 32), classes=3, seed=0)


def test_scikit_learn_s_probe_separates_what_is_linearly_separable():
  rng = np.random.default_rng(0)
  labels = rng.integers(0, 3, 300)
  x = np.eye(3)[labels] + 0.1 * rng.standard_normal((300, 3))
  assert probes.probe_accuracy(x[:200], labels[:200], x[200:], labels[200:]) == 1.0


def test_a_classifier_of_standardised_features_has_an_equal_one_of_raw_features():
  rng = np.random.default_rng(0)
  train, other = (np.float64([5, 50, 3, 1, 0]) + rng.random((n, 5)) * [1, 9, 0, 1e-3, 1] for n in (40, 7))
  dense = {"kernel": rng.standard_normal((5, 3)), "bias": rng.standard_normal(3)}
  raw = probes.of_raw(dense, train)
  for x, standard in zip((train, other), probes.standardise(train, other), strict=True):
    wanted = standard @ dense["kernel"] + dense["bias"]
    np.testing.assert_allclose(x @ raw["kernel"] + raw["bias"], wanted, rtol=1e-9, atol=1e-9)
