"""NT-Xent, SupCon and DCL in blocks of columns, the dense losses of v1 table 4, and the queue of negatives."""

from simclr_jax.losses.blockwise import DEFAULT_BLOCK
from simclr_jax.losses.contrast import (
  BLOCKWISE,
  KINDS,
  WITH_QUEUE,
  Loss,
  contrast,
  dcl,
  l2_normalized,
  nt_xent,
  sup_con,
)
from simclr_jax.losses.supervised import cross_entropy

__all__ = [
  "BLOCKWISE",
  "DEFAULT_BLOCK",
  "KINDS",
  "WITH_QUEUE",
  "Loss",
  "contrast",
  "cross_entropy",
  "dcl",
  "l2_normalized",
  "nt_xent",
  "sup_con",
]
