"""NT-Xent, SupCon and DCL in blocks of columns, the dense losses of v1 table 4, and the queue of negatives."""

from simclr_jax.losses.contrast import BLOCKWISE, KINDS, WITH_QUEUE, contrast, dcl, l2_normalized, nt_xent, sup_con
from simclr_jax.losses.supervised import cross_entropy, weighted_cross_entropy

__all__ = [
  "BLOCKWISE",
  "KINDS",
  "WITH_QUEUE",
  "contrast",
  "cross_entropy",
  "dcl",
  "l2_normalized",
  "nt_xent",
  "sup_con",
  "weighted_cross_entropy",
]
