"""The two networks that the jobs train: SimCLR for pretraining, a classifier afterwards."""

import flax.linen as nn
import jax


class SimCLR(nn.Module):
  """Encoder, projection head and an online classifier that the encoder does not feel.

  The parameter tree has the keys `encoder`, `projection_head` and, with a classifier,
  `linear_head`.
  """

  encoder: nn.Module
  projection_head: nn.Module
  linear_head: nn.Module | None = None

  def __call__(self, images: jax.Array, *, train: bool) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Returns h f[M, d], z f[M, D] and logits f[M, K] of images f[M, H, W, 3]; logits may be None.

    Both views of a batch belong into one call: batch norm takes its statistics over all M.
    """
    h = self.encoder(images, train=train)
    z = self.projection_head(h, train=train)[-1]
    logits = None if self.linear_head is None else self.linear_head(jax.lax.stop_gradient(h))
    return h, z, logits


class Classifier(nn.Module):
  """Encoder and linear classifier; the keys of the tree are `encoder` and `linear_head`."""

  encoder: nn.Module
  linear_head: nn.Module

  def __call__(self, images: jax.Array, *, train: bool, frozen: bool = False) -> jax.Array:
    """Returns logits f[M, K] of images f[M, H, W, 3].

    A frozen encoder uses its moving averages, keeps them, and gets no gradient.
    """
    h = self.encoder(images, train=train and not frozen)
    return self.linear_head(jax.lax.stop_gradient(h) if frozen else h)
