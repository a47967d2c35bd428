"""Selection: held-back images choose the setting, test labels never do, and all training images train the last one."""

import logging

import numpy as np
import pytest
from sklearn import linear_model

from simclr_jax.evaluation import probes, scores, selection
from simclr_jax.evaluation.features import Features


def clusters(examples, dim, classes):
  """Returns overlapping classes: features f32[N, D] and label i32[N]."""
  rng = np.random.default_rng(0)
  label = rng.integers(0, classes, examples).astype(np.int32)
  centre = rng.standard_normal((classes, dim))
  return Features((centre[label] + rng.standard_normal((examples, dim))).astype(np.float32), label)


def chosen(train, test, *, passes=1, share=0.1, rates=(0.3,), decays=(0.0,), strengths=(1e-4,), tolerance=1e-3):
  """Returns the choices from a grid and from a path, with `passes` equal copies of the training features."""
  train = Features(np.stack([train.x] * passes), train.label)
  rows = probes.held_back(len(train.label), share, 0)
  grid, path = probes.Grid(rates, decays, 40, 32), probes.L2Path(strengths, 100, tolerance)
  return (
    selection.choose_from_grid(train, rows, test, grid, classes=4, seed=0),
    selection.choose_from_path(train, rows, test, path, classes=4),
  )


def converged(path):
  return {"converged": np.ones(len(path.l2_strengths), bool), "steps": np.ones(len(path.l2_strengths), int)}


@pytest.fixture
def quick(monkeypatch):
  """Replaces the L-BFGS of `probes`, which takes seconds to compile, by scikit-learn's."""

  def solve(x, y, path, *, classes, is_balanced, mesh):
    fitted = [
      linear_model.LogisticRegression(C=1 / (len(x) * strength), max_iter=5000).fit(x, y)
      for strength in path.l2_strengths
    ]
    kernel = np.stack([each.coef_.T for each in fitted]).astype(np.float32)
    bias = np.stack([each.intercept_ for each in fitted]).astype(np.float32)
    return {"dense": {"kernel": kernel, "bias": bias}}, converged(path)

  monkeypatch.setattr(probes, "logistic_regression", solve)


def test_no_copy_of_a_held_back_image_trains_until_the_choice_is_made(quick):
  # Random labels can only be learnt by heart.
  rng = np.random.default_rng(0)
  data = Features(rng.standard_normal((100, 200)).astype(np.float32), rng.integers(0, 4, 100).astype(np.int32))
  for choice in chosen(data, data, passes=3, share=0.4, rates=[1.0]):
    assert choice.validation_top1.max() < 0.6
    assert choice.top1 == 1


def test_the_setting_that_is_best_in_validation_counts_not_in_test(quick):
  x, y = clusters(400, 8, 4)
  # On these test labels a regression that has only learnt its bias beats a good one.
  settings = {"rates": [0.3, 1.0], "decays": [300.0, 0.0], "strengths": [1e3, 1e-4]}
  grid, path = chosen(Features(x[:300], y[:300]), Features(x[300:], 3 - y[300:]), **settings)
  assert (grid.weight_decay, path.l2_strength) == (0.0, 1e-4)
  assert max(grid.top1, path.top1) < 0.1
  assert grid.validation_top1[0, 0] == grid.validation_top1[1, 0] == 0  # They diverged.
  assert grid.validation_top1[[0.3, 1.0].index(grid.learning_rate), 1] == grid.validation_top1.max() > 0.8


def test_of_equal_settings_the_first_is_chosen(monkeypatch):
  data = clusters(40, 8, 4)
  zeros = lambda *axes: {"dense": {"kernel": np.zeros((*axes, 8, 4)), "bias": np.zeros((*axes, 4))}}
  grid_of = lambda x, y, grid, **_: zeros(len(grid.learning_rates), len(grid.weight_decays))
  monkeypatch.setattr(probes, "train_grid", grid_of)
  path_of = lambda x, y, path, **_: (zeros(len(path.l2_strengths)), converged(path))
  monkeypatch.setattr(probes, "logistic_regression", path_of)
  share = lambda params, value: np.full(params["dense"]["bias"].shape[:-1], value)
  equal = lambda params, *_, **__: {"top1": share(params, 0.5), "balanced_top1": share(params, 0.4)}
  monkeypatch.setattr(probes, "accuracies", equal)
  grid, path = chosen(data, data, rates=[0.3, 0.1], decays=[0.1, 0.0], strengths=[1e-2, 1e-3])
  assert (grid.learning_rate, grid.weight_decay, path.l2_strength) == (0.3, 0.1, 1e-2)
  # The transfer protocol takes the strongest penalty.
  monkeypatch.setattr(probes, "logits", lambda params, x, **_: [x] * len(params["dense"]["bias"]))
  path = probes.L2Path([1e-3, 1e-2], 1, 1.0)
  assert selection.best_regression("cars", data, data, data, path, score=scores.top1, classes=4).l2 == 1e-2


def test_searches_that_do_not_converge_are_logged(monkeypatch, caplog):
  data = clusters(100, 8, 4)

  def solve(x, y, path, **_):
    count = len(path.l2_strengths)
    params = {"kernel": np.zeros((count, 8, 4), np.float32), "bias": np.zeros((count, 4), np.float32)}
    return {"dense": params}, {"converged": np.array([True, False])[:count], "steps": np.array([3, 4])[:count]}

  monkeypatch.setattr(probes, "logistic_regression", solve)
  with caplog.at_level(logging.WARNING):
    chosen(data, data, strengths=[1e-2, 1e-3], tolerance=0.2)
    selection.best_regression("cars", *[data] * 3, probes.L2Path([1e-3, 1e-2], 4, 0.2), score=scores.top1, classes=4)
  assert caplog.messages == [
    "logistic regression, L2 strength 0.001: stopped after 4 steps, before its minimum: its accuracy is that of an "
    "early stop. Raise lbfgs_steps, or leave weak strengths out of l2_strengths.",
    "cars: 1 of 2 logistic regressions (L2 up to 0.01) stopped after up to 4 steps, before their minimum. Raise "
    "lbfgs_steps, or l2_low.",
  ]


def drawn(examples, rng, centre):
  y = rng.integers(0, len(centre), examples)
  x = centre[y] + 2 * rng.standard_normal((examples, centre.shape[1]))
  return Features(x.astype(np.float32), y.astype(np.int32))


@pytest.mark.slow
def test_the_transfer_protocol_chooses_what_scikit_learn_would():
  rng = np.random.default_rng(0)
  centre = rng.standard_normal((4, 12))
  read = {part: drawn(size, rng, centre) for part, size in (("train", 60), ("validation", 57), ("test", 83))}
  strengths = np.geomspace(1e-2, 1e4, 9)
  path = probes.L2Path(strengths, 500, 1e-6)
  result = selection.best_regression("cars", **read, path=path, score=scores.mean_per_class, classes=4)

  def theirs(train, test, l2):
    fitted = linear_model.LogisticRegression(C=1 / l2, tol=1e-8, max_iter=5000).fit(*train)
    return scores.mean_per_class(fitted.decision_function(test[0]), test[1])

  by_strength = [theirs(read["train"], read["validation"], l2) for l2 in strengths]
  assert result.validation == pytest.approx(by_strength, abs=1e-12)
  best = max(l2 for l2, value in zip(strengths, by_strength, strict=True) if value == max(by_strength))
  assert result.l2 == best
  assert strengths[0] < best < strengths[-1]
  both = [np.concatenate(pair) for pair in zip(read["train"], read["validation"], strict=True)]
  assert result.value == pytest.approx(theirs(both, read["test"], best), abs=1e-12)
