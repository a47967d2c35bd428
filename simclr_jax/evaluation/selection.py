"""Selection of linear classifiers: the best setting by held-back images, trained again on all, counted once on test.

The warnings of searches that did not converge go to the log of this module.
"""

import dataclasses
import logging
from collections.abc import Callable

import numpy as np
from jax.sharding import Mesh

from simclr_jax.evaluation import probes
from simclr_jax.evaluation.features import Features

log = logging.getLogger(__name__)

# Of `regression_top1`.
STRENGTHS, STEPS = (1e-3, 1e-2, 1e-1), 100

Rows = tuple[np.ndarray, np.ndarray]  # Row numbers to train on, and to choose by; see `probes.held_back`.


@dataclasses.dataclass(frozen=True)
class GridChoice:
  """The classifier of a `probes.Grid` with the highest validation accuracy; of equal ones the first."""

  learning_rate: float
  weight_decay: float
  top1: float  # On the test split, trained on all rows.
  balanced_top1: float  # Its mean over the classes.
  validation_top1: np.ndarray  # f64[L, W], of every cell.
  top5: float | None = None  # From six classes on.
  dense: dict[str, np.ndarray] | None = None  # The classifier of the features: `kernel` f[D, K] and `bias` f[K].


@dataclasses.dataclass(frozen=True)
class PathChoice:
  """The logistic regression of a `probes.L2Path` with the highest validation accuracy; of equal ones the first."""

  l2_strength: float
  top1: float  # On the test split, trained on all rows.
  balanced_top1: float  # Its mean over the classes.
  validation_top1: np.ndarray  # f64[S], of every strength.
  top5: float | None = None  # From six classes on.
  dense: dict[str, np.ndarray] | None = None  # The classifier of the features: `kernel` f[D, K] and `bias` f[K].


@dataclasses.dataclass(frozen=True)
class Regression:
  """The logistic regression of the transfer protocol with the highest validation score; of equal ones the strongest."""

  value: float  # Score on the test split, trained on the training and validation splits.
  l2: float
  validation: list[float]  # Score of every strength.
  logits: np.ndarray  # f[M, K] of the test split.


def choose_from_grid(
  train: Features,  # x f[P, N, D], the training images in P passes (the first one undistorted), and label i32[N].
  rows: Rows,  # Those to choose by count in the first pass.
  test: Features,
  grid: probes.Grid,
  *,
  classes: int,
  seed: int,  # Of the order of the rows.
  is_balanced: bool = False,  # Whether the classes count alike, in the loss and in the choice.
  mesh: Mesh | None = None,
) -> GridChoice:
  """Returns the cell of a grid that is best on held-back images, and its accuracies on the test split."""
  x, y = train
  fitted, chosen_by = rows
  options = {"classes": classes, "seed": seed, "is_balanced": is_balanced, "mesh": mesh}
  trained = probes.train_grid(*_flat(x[:, fitted], y[fitted]), grid, **options)
  counted = probes.accuracies(trained, x[0, chosen_by], y[chosen_by], mesh=mesh)
  table = counted["top1"]
  row, column = np.unravel_index(np.argmax(counted["balanced_top1"] if is_balanced else table), table.shape)
  rate, decay = grid.learning_rates[row], grid.weight_decays[column]
  cell = dataclasses.replace(grid, learning_rates=[rate], weight_decays=[decay])
  again = probes.train_grid(*_flat(x, y), cell, **options)
  counted = {name: float(value[0, 0]) for name, value in probes.accuracies(again, *test, mesh=mesh).items()}
  dense = {name: np.asarray(leaf[0, 0]) for name, leaf in again["dense"].items()}
  return GridChoice(rate, decay, **counted, validation_top1=table, dense=dense)


def choose_from_path(
  train: Features,
  rows: Rows,
  test: Features,
  path: probes.L2Path,
  *,
  classes: int,
  is_balanced: bool = False,
  mesh: Mesh | None = None,
) -> PathChoice:
  """Returns the L2 strength that is best on held-back images, and its accuracies on the test split.

  Features are standardised by those that the regression is trained on; arguments as for `choose_from_grid`.
  """
  x, y = train
  fitted, chosen_by = rows

  def fit(train, other, path):
    train_x, other_x = probes.standardise(train[0], other[0])
    options = {"classes": classes, "is_balanced": is_balanced, "mesh": mesh}
    trained, ended = probes.logistic_regression(train_x, train[1], path, **options)
    for strength, steps, fine in zip(path.l2_strengths, ended["steps"], ended["converged"], strict=True):
      if not fine:
        log.warning(
          "logistic regression, L2 strength %g: stopped after %d steps, before its minimum: its accuracy is that of an "
          "early stop. Raise lbfgs_steps, or leave weak strengths out of l2_strengths.",
          *(strength, steps),
        )
    return trained, probes.accuracies(trained, other_x, other[1], mesh=mesh)

  counted = fit(_flat(x[:, fitted], y[fitted]), (x[0, chosen_by], y[chosen_by]), path)[1]
  by_strength = counted["top1"]
  strength = path.l2_strengths[int(np.argmax(counted["balanced_top1"] if is_balanced else by_strength))]
  whole = _flat(x, y)
  trained, counted = fit(whole, test, dataclasses.replace(path, l2_strengths=[strength]))
  dense = probes.of_raw({name: np.asarray(leaf[0]) for name, leaf in trained["dense"].items()}, whole[0])
  counted = {name: float(value[0]) for name, value in counted.items()}
  return PathChoice(strength, **counted, validation_top1=by_strength, dense=dense)


def regression_top1(known: Features, test: Features, *, classes: int, seed: int, mesh: Mesh | None = None) -> float:
  """Returns the top-1 on `test` of a logistic regression of `known` whose L2 strength held-back rows choose; quick.

  A search ends after STEPS steps, converged or not: for comparisons of features, not for the number of an encoder.
  """
  path = probes.L2Path(STRENGTHS, STEPS, 1e-4)

  def accuracies(x, y, other, path):
    x, other_x = probes.standardise(x, other.x)
    trained, _ = probes.logistic_regression(x, y, path, classes=classes, mesh=mesh)
    return probes.accuracies(trained, other_x, other.label, mesh=mesh)["top1"]

  fitted, chosen_by = split_off(known, 0.1, seed)
  best = STRENGTHS[int(np.argmax(accuracies(*fitted, chosen_by, path)))]
  return float(accuracies(*known, test, dataclasses.replace(path, l2_strengths=[best]))[0])


def split_off(features: Features, share: float, seed: int) -> tuple[Features, Features]:
  """Returns (train, validation) features, a random `share` of the rows in the second part; see `probes.held_back`."""
  x, y = features
  train, validation = (Features(x[rows], y[rows]) for rows in probes.held_back(len(x), share, seed))
  return train, validation


def best_regression(
  name: str,  # Of the data set, for warnings.
  train: Features,
  validation: Features,  # Chooses the strength; then trained on, too.
  test: Features,
  path: probes.L2Path,  # Ascending strengths, for the sum, not the mean, of the losses over the images.
  *,
  score: Callable[[np.ndarray, np.ndarray], float],  # (logits f[M, K], labels) -> float, such as `scores.top1`.
  classes: int,
  mesh: Mesh | None = None,
) -> Regression:
  """Returns the logistic regression of the transfer protocol; Chen et al. 2020, appendix B.8."""

  def logits_of(train, held_out, strengths):
    (train_x, other_x), scale = probes.precondition(train.x, held_out.x)
    # `logistic_regression` takes strengths for the mean of the losses, here in coordinates divided by `scale`.
    of_mean = dataclasses.replace(path, l2_strengths=[strength / (len(train_x) * scale**2) for strength in strengths])
    trained, ended = probes.logistic_regression(train_x, train.label, of_mean, classes=classes, mesh=mesh)
    far = ~np.asarray(ended["converged"])
    if np.any(far):
      log.warning(
        "%s: %d of %d logistic regressions (L2 up to %.3g) stopped after up to %d steps, before their minimum. Raise "
        "lbfgs_steps, or l2_low.",
        *(name, np.sum(far), len(far), np.max(np.asarray(strengths)[far]), np.max(ended["steps"])),
      )
    return list(probes.logits(trained, other_x, mesh=mesh))

  train, validation, test = (Features(*split) for split in (train, validation, test))
  found = logits_of(train, validation, path.l2_strengths)
  by_strength = [score(logits, validation.label) for logits in found]
  best = len(by_strength) - 1 - int(np.argmax(by_strength[::-1]))
  both = Features(*(np.concatenate(arrays) for arrays in zip(train, validation, strict=True)))
  (logits,) = logits_of(both, test, [path.l2_strengths[best]])
  return Regression(score(logits, test.label), float(path.l2_strengths[best]), by_strength, logits)


def _flat(x, y):
  """Returns (f[P * N, D], i32[P * N]) of P passes over N images."""
  return x.reshape(-1, x.shape[-1]), np.tile(y, len(x))
