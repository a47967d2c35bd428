"""The data order's parameters, and how examples are divided among shards and hosts."""

import dataclasses
import math

from simclr_jax import errors
from simclr_jax.data import source as source_lib

# Of the order of resident data: 1 before 0.2.0, see `randomness`. A run keeps the law that it began with.
LAW = 2


@dataclasses.dataclass(frozen=True)
class Process:
  """One host of a run, and how many there are."""

  index: int = 0
  count: int = 1


ALONE = Process()


@dataclasses.dataclass(frozen=True)
class Order:
  """The order of training examples: a function of these numbers, the epoch and the data, not of the hosts.

  The data is cut into `shards` consecutive parts. Each part is permuted anew every epoch and gives batch_size / shards
  examples to every global batch.
  """

  batch_size: int  # images of the global batch, a multiple of `shards`
  shards: int  # number of parts, a multiple of the hosts
  seed: int  # of the permutations and of the augmentation, 0 to 2^31 - 1
  shuffle_window: int = 2048  # records of files that are permuted together; data in memory is permuted whole
  law: int = LAW  # of the order of resident data

  def check(self, source: source_lib.Source, process_count: int = 1) -> None:
    """Raises a UserError where batch, shards, seed, window, hosts and number of examples do not fit each other."""
    if self.shards < 1 or self.batch_size < 1 or self.batch_size % self.shards:
      raise errors.UserError(
        f"a batch of {self.batch_size} does not split into {self.shards} data shards; use a multiple of the shards."
      )
    if self.shards % process_count:
      raise errors.UserError(
        f"{self.shards} data shards (the greatest common divisor of config.data.shards and the batch of "
        f"{self.batch_size}) do not split over {process_count} hosts; use multiples of the hosts for both."
      )
    if source.num_examples < self.shards:
      raise errors.UserError(
        f"{source.name} has {source.num_examples} examples for {self.shards} data shards; "
        f"use at most {source.num_examples} shards."
      )
    if not 0 <= self.seed < 2**31:
      raise errors.UserError(f"seed {self.seed} does not fit; use one from 0 to {2**31 - 1}.")
    if self.shuffle_window < 1:
      raise errors.UserError(f"a shuffle window of {self.shuffle_window} records; use at least 1.")


def shards_of(batch_size: int, shards: int) -> int:
  """Returns how many of `shards` parts a batch takes its images from: the most that divide both numbers."""
  return math.gcd(batch_size, shards)


def fitted(batch_size: int, examples: int, *, shards: int = 16, micro_batches: int = 1) -> int:
  """Returns the batch size, or the largest smaller one that so many examples fill, a multiple of the micro-batches.

  It keeps as many of the shards as there are examples for, halved where need be, so that it splits over as many hosts
  and devices as it can; it is the same on any number of these. UserError: too few examples for the micro-batches.
  """
  if batch_size <= examples:
    return batch_size
  parts = shards_of(batch_size, shards)
  while parts > 1 and math.lcm(parts, micro_batches) > examples:
    parts = parts // 2 if parts % 2 == 0 else 1
  unit = math.lcm(parts, micro_batches)
  if unit > examples:
    raise errors.UserError(f"{examples} images do not fill {micro_batches} micro-batches; use fewer of these.")
  return examples // unit * unit


def check_evaluation(batch_size: int, process_count: int) -> None:
  """Raises a UserError unless an evaluation's batch splits over the hosts."""
  if batch_size < 1 or batch_size % process_count:
    raise errors.UserError(
      f"an evaluation batch of {batch_size} does not split over {process_count} hosts; use a multiple."
    )


def bounds(num_examples: int, parts: int) -> list[int]:
  """Returns the parts + 1 ends of consecutive, nearly equal parts: part i holds bounds[i] to bounds[i + 1] - 1."""
  return [num_examples * part // parts for part in range(parts + 1)]
