"""The two networks that the jobs train: SimCLR for pretraining, a classifier afterwards."""

from typing import Any

import flax.linen as nn
import jax

from simclr_jax.models import resnet


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


class Representation(nn.Module):
  """Encoder and projection head, read at a layer: 0 is h, 1 the output of the first layer, ..., -1 is z.

  The keys of the tree are `encoder` and, where a layer is asked for, `projection_head`.
  """

  encoder: nn.Module
  projection_head: nn.Module | None = None
  layer: int = 0

  def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
    """Returns f[M, D] of images f[M, H, W, 3]."""
    h = self.encoder(images, train=train)
    return h if self.projection_head is None else self.projection_head(h, train=train)[self.layer]


class Classifier(nn.Module):
  """Encoder and linear classifier on top of a `Representation`; the keys of the tree are its and `linear_head`.

  Attributes:
    after_block: what comes before is frozen: -1 nothing, 0 the stem, k block group k and all before it.
    frozen_head: whether the projection head is frozen too.
  """

  encoder: nn.Module
  linear_head: nn.Module
  projection_head: nn.Module | None = None
  layer: int = 0
  after_block: int = -1
  frozen_head: bool = False

  def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
    """Returns logits f[M, K] of images f[M, H, W, 3].

    What is frozen uses its moving averages, keeps them, and gets no gradient. The projection head runs whole: while
    it learns, the moving averages of the layers above `layer` follow, as in the reference's TF2 code.
    """
    h = self.encoder(images, train=train, after_block=self.after_block)
    if self.projection_head is not None:
      h = self.projection_head(h, train=train and not self.frozen_head)[self.layer]
    return self.linear_head(h)


def trained_part(model: Classifier, params: dict[str, Any]) -> dict[str, Any]:
  """Returns the parameters that learn: a tree of the same form without the rest.

  Of the projection head these are the layers up to the one that feeds the classifier. Those above it get no gradient;
  the reference's TF2 code leaves them out as well, so that not even weight decay touches them.
  """
  encoder = {name: tree for name, tree in params["encoder"].items() if resnet.group_of(name) > model.after_block}
  parts = {"encoder": encoder, "linear_head": params["linear_head"]}
  if "projection_head" in params and not model.frozen_head:
    head = params["projection_head"]
    last = model.layer % (model.projection_head.layers + 1)
    names = [f"{kind}{number}" for number in range(1, last + 1) for kind in ("dense", "bn")]
    parts["projection_head"] = {name: head[name] for name in names}
  return {name: tree for name, tree in parts.items() if tree}


def merged(params: dict[str, Any], part: dict[str, Any]) -> dict[str, Any]:
  """Returns `params` with the leaves of `part`, a tree of the same form with some of them, in place of its own."""
  return {
    name: merged(tree, part[name]) if name in part and isinstance(tree, dict) else part.get(name, tree)
    for name, tree in params.items()
  }
