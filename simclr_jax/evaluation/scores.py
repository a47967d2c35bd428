"""How well scores of classes fit the labels: top-1, mean per class, and VOC's 11-point mean average precision."""

import numpy as np


def top1(scores, y) -> float:
  """Returns the share of rows whose class has the highest score; of equals the lower class.

  Args:
    scores: f[N, K]; a row with what is no number is never right.
    y: i32[N].
  """
  return float(np.mean(predicted(scores) == y))


def mean_per_class(scores, y) -> float:
  """Returns the mean over the classes that occur in `y` of the share of their rows that `top1` has right.

  Args:
    scores: f[N, K].
    y: i32[N].
  """
  right = predicted(scores) == y
  return float(np.mean([np.mean(right[y == label]) for label in np.unique(y)]))


def mean_average_precision(scores, y) -> float:
  """Returns the mean of `average_precision` over the classes that any row shows (PASCAL VOC 2007's mAP).

  Args:
    scores: f[N, K].
    y: i32[N, K]: 1 yes, 0 no, -1 does not count in this class.
  """
  shown = np.flatnonzero(np.any(y == 1, axis=0))
  return float(np.mean([average_precision(scores[:, label], y[:, label]) for label in shown]))


def average_precision(scores, y) -> float:
  """Returns the 11-point interpolated average precision of one class; Everingham et al. 2010, section 4.2.

  The mean over recalls r = 0, 0.1, ..., 1 of the highest precision at any recall of r or more. Rows come in the order
  of their scores, of equals in their own; scores that are not numbers are worth 0.

  Args:
    scores: f[N].
    y: i32[N]: 1 yes, 0 no, -1 does not count; at least one is 1.
  """
  scores, y = scores[y >= 0], y[y >= 0]
  if np.any(np.isnan(scores)):
    return 0.0
  found = np.cumsum(y[np.argsort(-scores, kind="stable")])
  precision = found / np.arange(1, len(y) + 1)
  # In whole numbers: 3 of 10 is a recall of 0.3, whatever 3 * 0.1 is in floating point.
  reached = [10 * found >= tenths * found[-1] for tenths in range(11)]
  return float(np.mean([np.max(precision[far]) for far in reached]))


def predicted(scores) -> np.ndarray:
  """Returns i64[N], the class with the highest score; -1 in rows with what is no number.

  Args:
    scores: f[N, K].
  """
  return np.where(np.any(np.isnan(scores), axis=1), -1, np.argmax(scores, axis=1))
