"""Where random numbers come from: one generator, and keys of its own for every purpose.

Generator and dtypes are said wherever something is drawn: no number may depend on JAX's default generator (of `rbg`,
what vmap draws for one key depends on the other keys) or on x64. Folded into the run's key, one after the other:

  parameters at initialisation    hashes of their names, by Flax
  augmentation of an example      epoch, index, then: CROP (crops and mirrors), COLORS (colours and blur), or
                                  COMPOSED and the position of a composed operation
  order of resident data          ORDER, shard, epoch
  rows of the linear probes       PROBES, epoch

NumPy's generators take lists, whose missing numbers are zeros:

  order of streamed data          seed, epoch, shard
  a sample of a split             seed, 0, 0, SAMPLE
  images held back for a choice   seed, 0, 0, HELD_BACK
  images held out of a split      data.holdout_seed, 0, 0, HOLDOUT
  balanced sampling, in a class   seed, pass over the class, class, BALANCED
  balanced sampling, the classes  seed, block of turns, 0, TURNS
"""

import jax
import numpy as np

GENERATOR = "threefry2x32"

# Epochs are below 2^31: none of them is one of these.
ORDER, PROBES = np.uint32(2**31), np.uint32(2**31 + 1)
# Before 0.2.0 in place of ORDER: the order of a shard shared keys with the augmentation of an example in epoch 1.
FORMER_ORDER = np.uint32(1)

CROP, COLORS, COMPOSED = 0, 1, 2

SAMPLE, HELD_BACK, HOLDOUT, BALANCED, TURNS = 1, 2, 3, 4, 5


def key(seed: int) -> jax.Array:
  """Returns the key of a run with this seed, 0 to 2^31 - 1; parameters are drawn from it as it is."""
  return jax.random.key(seed, impl=GENERATOR)


def host(seed: int, purpose: int, first: int = 0, second: int = 0) -> np.random.Generator:
  """Returns the host's generator for a purpose from SAMPLE on, with the two numbers of the table."""
  return np.random.default_rng([seed, first, second, purpose])
