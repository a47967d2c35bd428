"""Distances between samples, for tests of random laws."""

import numpy as np


def distance(a, b):
  """Returns the two-sample Kolmogorov-Smirnov distance."""
  points = np.concatenate([a, b])
  below = [np.searchsorted(np.sort(x), points, side="right") / len(x) for x in (a, b)]
  return np.abs(below[0] - below[1]).max()


def distance_to_uniform(x, low, high):
  assert low <= x.min()
  assert x.max() <= high
  return distance(x, np.linspace(low, high, 10 * len(x)))
