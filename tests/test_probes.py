"""Probes: a cell of the grid is what it would be alone, L-BFGS finds the minimum, test labels choose nothing."""

import json
import pathlib
import types

import jax
import numpy as np
import pytest
from sklearn import linear_model

from simclr_jax import __main__ as command
from simclr_jax import errors
from simclr_jax.evaluation import features as evaluation
from simclr_jax.evaluation import probes
from simclr_jax.hardware import sharding
from simclr_jax.jobs import feature_eval, feed, representation, setup

ROOT = pathlib.Path(__file__).parents[1]
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
    order = np.asarray(jax.random.permutation(jax.random.fold_in(jax.random.key(seed), epoch), len(x)))
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


@pytest.mark.parametrize("mesh", MESHES)
def test_a_cell_of_the_grid_is_the_classifier_trained_alone(x64, mesh):
  x, y = clusters(70, 6, 3, np.float64)
  rates, decays = [0.1, 2.0], [0.0, 0.01, 0.3]
  keys = {"classes": 3, "epochs": 3, "batch_size": 16, "seed": 5}
  grid = probes.train_grid(x, y, learning_rates=rates, weight_decays=decays, mesh=MESHES[mesh](), **keys)["dense"]
  assert grid["kernel"].shape == (2, 3, 6, 3)
  for row, rate in enumerate(rates):
    for column, decay in enumerate(decays):
      kernel, bias = nesterov(x, y, learning_rate=rate, weight_decay=decay, **keys)
      largest = np.abs(kernel).max()
      np.testing.assert_allclose(grid["kernel"][row, column], kernel, rtol=0, atol=1e-9 * largest)
      np.testing.assert_allclose(grid["bias"][row, column], bias, rtol=0, atol=1e-9 * largest)


def test_an_epoch_of_the_grid_is_one_dispatch_and_every_device_computes_its_own_rows(monkeypatch):
  x, y = clusters(64, 6, 3, np.float32)
  compiled, jit = [], jax.jit

  def recording(fun, **options):
    jitted = jit(fun, **options)

    def call(*args):
      compiled.append((fun.__name__, jitted.lower(*args).compile().as_text()))
      return jitted(*args)

    return call

  monkeypatch.setattr(jax, "jit", recording)
  keys = {"classes": 3, "learning_rates": [0.1, 1.0], "weight_decays": [0.0], "seed": 0}
  probes.train_grid(x, y, epochs=3, batch_size=32, mesh=sharding.data_mesh(), **keys)
  assert [name for name, _ in compiled].count("run_epoch") == 3
  text = compiled[-1][1]
  assert "f32[4,6]" in text
  assert "f32[32,6]" not in text


def test_logistic_regression_finds_the_minimum_that_scikit_learn_does(x64):
  x, y = clusters(203, 7, 4, np.float64, spread=2.0)
  strengths = [1e-3, 1e-1, 1e-2]
  params, ended = probes.logistic_regression(
    x, y, classes=4, l2_strengths=strengths, max_steps=200, tolerance=1e-9, mesh=sharding.data_mesh()
  )
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


def test_a_search_that_cannot_end_stops_and_says_how_far_it_came():
  x, y = clusters(64, 6, 3, np.float32)
  _, ended = probes.logistic_regression(x, y, classes=3, l2_strengths=[1e-3], max_steps=3, tolerance=0.0)
  assert ended["steps"] == 3
  assert ended["gradient"] > 0


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


def test_rows_held_back_are_a_function_of_the_seed_and_the_others_are_all_the_rest():
  train, held_back = probes.held_back(101, 0.1, 3)
  assert len(held_back) == 10
  np.testing.assert_array_equal(np.sort(np.concatenate([train, held_back])), np.arange(101))
  np.testing.assert_array_equal(probes.held_back(101, 0.1, 3)[1], held_back)
  assert np.any(probes.held_back(101, 0.1, 4)[1] != held_back)
  assert [len(part) for part in probes.held_back(2, 0.9, 0)] == [1, 1]


def test_a_batch_larger_than_the_rows_is_refused():
  keys = {"classes": 3, "learning_rates": [0.1], "weight_decays": [0.0], "epochs": 1, "seed": 0}
  with pytest.raises(errors.UserError, match="20 training rows cannot fill a batch of 32"):
    probes.train_grid(np.zeros((20, 4), np.float32), np.zeros(20, np.int32), batch_size=32, **keys)


@pytest.mark.parametrize("text", ["", "0.1,", "0.1 0.2", "a,1", "nan", "inf,1", "-0.1", "0"])
def test_what_is_no_list_of_numbers_is_refused(text):
  with pytest.raises(errors.UserError, match="config.probes.learning_rates") as caught:
    feature_eval.numbers("probes.learning_rates", text)
  assert "\n" not in str(caught.value)


def test_lists_of_numbers_are_read():
  assert feature_eval.numbers("probes.weight_decays", "0.0, 1e-6,1", zero=True) == [0, 1e-6, 1]


@pytest.fixture
def evaluate(monkeypatch, tmp_path):
  """Returns a function that runs the job on features given for the splits `train` (any pass) and `test`."""

  def run(train, test, *overrides):
    table = {"train": train, "test": test}
    source = lambda config, split: types.SimpleNamespace(name=split, num_examples=len(table[split][0]), num_classes=4)
    passes = []
    monkeypatch.setattr(representation, "load", lambda config, mesh, *, job: (None, None))
    # One device: eight virtual ones take ten times as long to agree on each of the many small sums.
    monkeypatch.setattr(setup, "mesh_for", lambda *_: sharding.data_mesh(jax.devices()[:1]))
    monkeypatch.setattr(setup, "source_of", source)
    monkeypatch.setattr(setup, "evaluation_rows", lambda config, source: lambda: (source.name, 0))
    monkeypatch.setattr(feed, "augmented_rows", lambda config, source, number: (source.name, number))

    def features(encode, variables, batches, mesh):
      passes.append(batches)
      return table[batches[0]]

    monkeypatch.setattr(evaluation, "features", features)
    keys = {
      **{"checkpoint": "random", "probes.batch_size": "32", "probes.epochs": "40"},
      **{"probes.learning_rates": "0.3,1.0", "probes.weight_decays": "300.0,0.0", "probes.l2_strengths": "1e3,1e-4"},
      **dict(override.split("=") for override in overrides),
    }
    result = feature_eval.run(command.load_config(str(ROOT / "configs/base.py"), keys), str(tmp_path))
    assert json.loads((tmp_path / "result.json").read_text()) == result
    return result, passes

  return run


def test_copies_of_an_image_do_not_both_train_and_choose_and_in_the_end_all_train(evaluate):
  # Labels without rhyme or reason can be learnt by heart only.
  rng = np.random.default_rng(0)
  data = rng.standard_normal((100, 200)).astype(np.float32), rng.integers(0, 4, 100).astype(np.int32)
  result, passes = evaluate(
    data,
    data,
    *("probes.passes=3", "probes.validation_share=0.4"),
    *("probes.learning_rates=1.0", "probes.weight_decays=0.0", "probes.l2_strengths=1e-4"),
  )
  assert passes == [("train", 0), ("train", 1), ("train", 2), ("test", 0)]
  assert max(cell["top1"] for cell in result["validation/top1"] + result["validation/lbfgs_top1"]) < 0.6
  assert result["eval/top1"] == result["eval/lbfgs_top1"] == 1
  assert result["validation/examples"] == 40


def test_the_setting_that_is_best_in_validation_counts_whatever_the_test_labels(evaluate):
  x, y = clusters(400, 8, 4, np.float32)
  # On these a regression that has learnt nothing but its bias beats a good one.
  result, _ = evaluate((x[:300], y[:300]), (x[300:], 3 - y[300:]))
  assert (result["weight_decay"], result["l2_strength"]) == (0.0, 1e-4)
  assert max(result["eval/top1"], result["eval/lbfgs_top1"]) < 0.1
  cells = {(cell["learning_rate"], cell["weight_decay"]): cell["top1"] for cell in result["validation/top1"]}
  assert cells[0.3, 300.0] == cells[1.0, 300.0] == 0  # It diverged.
  assert cells[result["learning_rate"], 0.0] == max(cells.values()) > 0.8
