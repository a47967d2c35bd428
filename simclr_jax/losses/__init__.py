"""NT-Xent, SupCon and DCL in blocks of columns, the dense losses of v1 table 4, and the queue of negatives."""

from simclr_jax.losses.blockwise import (
  BLOCKWISE,
  DEFAULT_BLOCK,
  KINDS,
  WITH_MEMORY,
  contrast,
  dcl,
  l2_normalized,
  nt_xent,
  sup_con,
)

__all__ = [
  "BLOCKWISE",
  "DEFAULT_BLOCK",
  "KINDS",
  "WITH_MEMORY",
  "contrast",
  "dcl",
  "l2_normalized",
  "nt_xent",
  "sup_con",
]
