"""What a classifier takes for what: the confusion matrix, accuracies by class, and their intervals."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from simclr_jax.evaluation import scores


def matrix(label: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
  """Returns i64[K, K], how many images of a class (row) are taken for another (column); i[N] each, labels from 0."""
  return np.bincount(label * classes + predicted, minlength=classes**2).reshape(classes, classes)


def balanced_interval(correct: np.ndarray, of_class: np.ndarray) -> tuple[float, float]:
  """Returns the ends of the 95 % interval of the mean over the classes of the share of i[K] images in correct i[K].

  The intervals of the classes that have images are combined by MOVER; Zou and Donner 2008, section 2.
  """
  present = np.flatnonzero(of_class)
  ends = np.array([scores.wilson(int(correct[row]), int(of_class[row])) for row in present])
  shares = correct[present] / of_class[present]
  mean, (below, above) = shares.mean(), np.sqrt(np.sum((ends - shares[:, None]) ** 2, axis=0)) / len(present)
  return max(0.0, float(mean - below)), min(1.0, float(mean + above))


def by_class(counts: np.ndarray, class_names: Sequence[str]) -> list[dict[str, Any]]:
  """Returns a row for each class that has images, of its confusions i[K, K].

  `class`, `images`, `accuracy` with the ends `low` and `high` of its 95 % interval, `precision` (the share of what is
  taken for the class that is of it; None where nothing is), and `taken_for`, its commonest wrong class ("" for none).
  """
  rows = []
  for number in np.flatnonzero(counts.sum(axis=1)):
    images, correct, taken = int(counts[number].sum()), int(counts[number, number]), int(counts[:, number].sum())
    low, high = scores.wilson(correct, images)
    wrong = np.where(np.arange(len(counts)) == number, 0, counts[number])
    rows.append(
      {
        **{"class": class_names[number], "images": images, "accuracy": correct / images, "low": low, "high": high},
        "precision": correct / taken if taken else None,
        "taken_for": class_names[int(np.argmax(wrong))] if wrong.any() else "",
      }
    )
  return rows


def summary(counts: np.ndarray) -> dict[str, Any]:
  """Returns `top1` and `balanced_top1` of confusions i[K, K] with their 95 % intervals, and the `examples`."""
  correct, of_class, examples = np.diag(counts), counts.sum(axis=1), int(counts.sum())
  return {
    "top1": int(correct.sum()) / examples,
    "top1_interval": list(scores.wilson(int(correct.sum()), examples)),
    "balanced_top1": float(scores.balanced_of(correct, of_class)),
    "balanced_top1_interval": list(balanced_interval(correct, of_class)),
    "examples": examples,
  }
