"""Classes that count alike: weights of a loss, and an order of training examples in which all come equally often."""

import dataclasses
import functools

import numpy as np

from simclr_jax import errors, randomness

# Turns of all classes whose order is drawn together.
BLOCK = 256


@dataclasses.dataclass(frozen=True, eq=False)
class Balanced:
  """The order of training examples by class: a function of these numbers and the step, not of hosts or devices.

  The batches, one after the other, are one stream of examples. In each turn it takes one example of each class that
  has any, the classes in an order of the turn's own. A class goes through its examples in a random order, then through
  all of them in another one.
  """

  labels: np.ndarray  # i32[N]; examples of label -1 are never taken
  batch_size: int
  seed: int

  def __post_init__(self):
    """Raises a UserError where no example has a label."""
    if not len(self._members):
      raise errors.UserError("no training image has a label; use sampling=uniform.")

  def at(self, step: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the examples i32[batch_size] of the batch after the first `step` ones, and how often each came before."""
    place = step * self.batch_size + np.arange(self.batch_size)
    turn, position = np.divmod(place, len(self._members))
    first = int(turn[0]) // BLOCK
    blocks = np.concatenate([self._turns(block) for block in range(first, int(turn[-1]) // BLOCK + 1)])
    number = blocks[turn - first * BLOCK, position]
    index, passes = np.zeros([2, self.batch_size], np.int32)
    for own in np.unique(number):
      rows, members = number == own, self._members[own]
      passes[rows], within = np.divmod(turn[rows], len(members))
      for count in np.unique(passes[rows]):
        these = np.flatnonzero(rows)[passes[rows] == count]
        index[these] = members[self._permutation(int(own), int(count))[within[passes[rows] == count]]]
    return index, passes

  @functools.cached_property
  def _members(self) -> list[np.ndarray]:
    """The examples of each class that has any."""
    return [np.flatnonzero(self.labels == label) for label in np.unique(self.labels[self.labels >= 0])]

  # Cached for all orders together: few of the orders are in use at a time.
  @functools.lru_cache(maxsize=8)  # noqa: B019
  def _turns(self, block):
    order = np.tile(np.arange(len(self._members)), (BLOCK, 1))
    return randomness.host(self.seed, randomness.TURNS, block).permuted(order, axis=1)

  @functools.lru_cache(maxsize=4096)  # noqa: B019
  def _permutation(self, own, count):
    return randomness.host(self.seed, randomness.BALANCED, count, own).permutation(len(self._members[own]))


def weights(labels: np.ndarray, classes: int) -> tuple[float, ...]:
  """Returns the weight of each class in a loss: n / (k n_c) of n labels i[N], n_c of the class, k classes that occur.

  It is scikit-learn's `balanced`; a class that does not occur has the weight 0. Labels of -1 do not count.
  """
  counts = np.bincount(labels[labels >= 0], minlength=classes)
  found = counts.sum() / (np.count_nonzero(counts) * np.maximum(counts, 1))
  return tuple(np.where(counts > 0, found, 0).tolist())
