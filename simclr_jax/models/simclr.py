"""The networks that the jobs train or read: SimCLR for pretraining, a representation and a classifier afterwards.

Their parameter trees have the keys `encoder` and, where there are such parts, `projection_head` and `linear_head`.
"""

from typing import Any

import flax.linen as nn
import jax

from simclr_jax.models import encoders


class SimCLR(nn.Module):
  """Encoder, projection head and an online classifier whose gradient stops before the encoder."""

  encoder: encoders.Encoder
  projection_head: nn.Module
  linear_head: nn.Module | None = None

  def __call__(self, images: jax.Array, *, train: bool) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Returns h f[M, d], z f[M, D] and logits f[M, K] of images f[M, H, W, 3]; without a classifier, logits are None.

    Both views of a batch go into one call, because batch norm takes its statistics over all M.
    """
    h = self.encoder(images, train=train)
    z = self.projection_head(h, train=train)[-1]
    logits = None if self.linear_head is None else self.linear_head(jax.lax.stop_gradient(h))
    return h, z, logits


class Representation(nn.Module):
  """Encoder and projection head up to a layer: 0 is h, 1 the output of the first layer, ..., -1 is z."""

  encoder: encoders.Encoder
  projection_head: nn.Module | None = None
  layer: int = 0

  def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
    """Returns f[M, D] of images f[M, H, W, 3]."""
    h = self.encoder(images, train=train)
    return h if self.projection_head is None else self.projection_head(h, train=train)[self.layer]


class Classifier(nn.Module):
  """Linear classifier on h or on a layer of the projection head, with frozen stages for fine-tuning."""

  encoder: encoders.Encoder
  linear_head: nn.Module
  projection_head: nn.Module | None = None
  layer: int = 0  # Of the projection head, as in `Representation`.
  after_stage: int = -1  # Index of the encoder's last frozen stage, -1 for none.
  frozen_head: bool = False  # Whether the projection head is frozen too.

  def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
    """Returns logits f[M, K] of images f[M, H, W, 3].

    Frozen parts run in inference mode, keep their moving averages and get no gradient. All layers of the projection
    head run: while it is trained, the moving averages of the layers above `layer` are updated too, as in the
    reference's TF2 code.
    """
    h = self.encoder(images, train=train, after_stage=self.after_stage)
    if self.projection_head is not None:
      h = self.projection_head(h, train=train and not self.frozen_head)[self.layer]
    return self.linear_head(h)


def trained_part(model: Classifier, params: dict[str, Any]) -> dict[str, Any]:
  """Returns the tree of the parameters that are trained, without the frozen ones.

  Layers of the projection head above the classifier's input are left out, as in the reference's TF2 code: they get no
  gradient, and weight decay must not change them.
  """
  encoder = {name: tree for name, tree in params["encoder"].items() if model.encoder.stage_of(name) > model.after_stage}
  parts = {"encoder": encoder, "linear_head": params["linear_head"]}
  if "projection_head" in params and not model.frozen_head:
    head = params["projection_head"]
    last = model.layer % (model.projection_head.layers + 1)
    names = [f"{kind}{number}" for number in range(1, last + 1) for kind in ("dense", "bn")]
    parts["projection_head"] = {name: head[name] for name in names}
  return {name: tree for name, tree in parts.items() if tree}


def moving_part(model: Classifier, batch_stats: dict[str, Any]) -> dict[str, Any]:
  """Returns the tree of the moving averages that training changes, without the frozen ones.

  The projection head runs whole: while it learns, the averages of the layers above the classifier's input move too.
  """
  frozen = ("projection_head",) if model.frozen_head else ()
  parts = {name: tree for name, tree in batch_stats.items() if name not in frozen}
  if "encoder" in parts:
    stage_of = model.encoder.stage_of
    parts["encoder"] = {name: tree for name, tree in parts["encoder"].items() if stage_of(name) > model.after_stage}
  return parts


def merged(params: dict[str, Any], part: dict[str, Any]) -> dict[str, Any]:
  """Returns `params` with the leaves that `part`, a subtree of the same form, has in place of its own."""
  return {
    name: merged(tree, part[name]) if name in part and isinstance(tree, dict) else part.get(name, tree)
    for name, tree in params.items()
  }
