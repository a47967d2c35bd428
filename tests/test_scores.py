"""Scores of classes: values worked out by hand, the definition in exact fractions, and NaN, which is never correct."""

import fractions

import numpy as np
import pytest

from simclr_jax.evaluation import scores


def test_of_equal_scores_the_lower_class_counts():
  table = np.array([[0, 1, 1], [2, 1, 0], [np.nan, 5, 0], [3, 3, 3]], np.float32)
  np.testing.assert_array_equal(scores.predicted(table), [1, 0, -1, 0])
  assert scores.top1(table, np.array([1, 0, 1, 1])) == 0.5


def test_mean_per_class_weighs_classes_not_images():
  table = np.eye(4)[[0, 0, 0, 1, 2]]
  # Class 0: 3 of 4, class 2: 1 of 1; no image is of classes 1 and 3.
  assert scores.mean_per_class(table, np.array([0, 0, 0, 0, 2])) == (3 / 4 + 1) / 2
  assert scores.top1(table, np.array([0, 0, 0, 0, 2])) == 4 / 5


def test_average_precision_by_hand():
  # Precision 1 at recall 1/2 and 2/3 at recall 1: six of the 11 points have the first, five the second.
  value = scores.average_precision(np.array([0.9, 0.8, 0.7, 0.6, 0.5]), np.array([1, 0, 1, 0, 0]))
  assert value == pytest.approx((6 + 5 * 2 / 3) / 11, rel=1e-15)
  # An image that is not counted changes nothing.
  value = scores.average_precision(np.array([0.9, 0.95, 0.8, 0.7, 0.6, 0.5]), np.array([1, -1, 0, 1, 0, 0]))
  assert value == pytest.approx((6 + 5 * 2 / 3) / 11, rel=1e-15)
  # The best precision at any higher recall, not the one at this recall: 2/3 from the start.
  assert scores.average_precision(np.array([3.0, 2, 1]), np.array([0, 1, 1])) == pytest.approx(2 / 3, rel=1e-15)
  assert scores.average_precision(np.array([3.0, np.nan, 1]), np.array([0, 1, 1])) == 0


def test_mean_average_precision_agrees_with_the_definition():
  rng = np.random.default_rng(0)
  # Few distinct scores, so that many are equal; ten positives, so that recalls are multiples of 1/10.
  table, y = rng.integers(0, 9, (60, 5)) / 8, rng.choice([-1, 0, 1], (60, 5), p=[0.1, 0.7, 0.2])
  y[:, 1] = -1
  y[:, 2] = [1] * 10 + [0] * 50
  wanted = []
  for label in (0, 2, 3, 4):
    rows = sorted((i for i in range(60) if y[i, label] >= 0), key=lambda i: (-table[i, label], i))
    total, hits, curve = sum(y[i, label] == 1 for i in rows), 0, []
    for place, row in enumerate(rows, 1):
      hits += int(y[row, label])
      curve.append((fractions.Fraction(hits, int(total)), fractions.Fraction(hits, place)))
    points = [max(p for recall, p in curve if recall >= fractions.Fraction(tenths, 10)) for tenths in range(11)]
    wanted.append(sum(points) / 11)
  assert scores.mean_average_precision(table, y) == pytest.approx(float(sum(wanted) / 4), rel=1e-14)


# Newcombe (1998), table I, method 3.
@pytest.mark.parametrize(
  ("correct", "n", "low", "high"),
  [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_the_interval_is_that_of_newcombe_1998(correct, n, low, high):
  np.testing.assert_allclose(scores.wilson(correct, n), (low, high), atol=5e-5)
  np.testing.assert_allclose(scores.wilson(n - correct, n), (1 - high, 1 - low), atol=5e-5)


def test_the_interval_stays_within_0_and_1_and_needs_examples():
  assert scores.wilson(0, 3)[0] == 0
  assert scores.wilson(3, 3)[1] == 1
  for correct, n in ((0, 0), (3, 2), (-1, 2), (float("nan"), 2)):
    with pytest.raises(ValueError, match="correct"):
      scores.wilson(correct, n)
