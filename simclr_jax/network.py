"""The encoder and the heads that a config describes, and the model FLOPs of pretraining them."""

from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from simclr_jax import errors
from simclr_jax.hardware import cost
from simclr_jax.models import encoders, heads, simclr
from simclr_jax.training import state as state_lib


class Network:
  """The encoder and the heads that a config describes."""

  def __init__(self, config: ml_collections.ConfigDict):
    """Takes what the config says of model, heads, images and batch."""
    self._model, self._head, self._queue = config.model, config.head, config.memory.size
    self._image_size, self._batch_size = config.data.image_size, config.batch_size

  def images(self, count: int) -> jax.ShapeDtypeStruct:
    """Returns the shape of so many images."""
    return jax.ShapeDtypeStruct((count, self._image_size, self._image_size, 3), jnp.float32)

  def encoder(self) -> encoders.Encoder:
    """Returns the encoder that `config.model` describes."""
    return encoders.build(self._model)

  def projection_head(self) -> heads.ProjectionHead:
    """Returns the projection head that `config.head` describes."""
    return heads.ProjectionHead(self._head.layers, self._head.out_dim, **self._dtypes)

  def linear_head(self, classes: int, *, zero_init: bool = False) -> heads.LinearHead | None:
    """Returns the classifier, or None where there are no labels."""
    return heads.LinearHead(classes, zero_init=zero_init, **self._dtypes) if classes else None

  def layer(self, key: str) -> int:
    """Returns the layer of the projection head that `config.head.<key>` names, counted from h = 0."""
    layer, layers = self._head[key], self._head.layers
    if not -layers - 1 <= layer <= layers:
      raise errors.UserError(
        f"config.head.{key} is {layer} and the projection head has {layers} layers; use 0 (the encoder's h) to "
        f"{layers}, or -1 for the last one."
      )
    return layer % (layers + 1)

  def pretraining_model(self, classes: int) -> simclr.SimCLR:
    """Returns the network of pretraining, with an online classifier where there are classes and `head.online`."""
    online = self.linear_head(classes if self._head.online else 0)
    return simclr.SimCLR(self.encoder(), self.projection_head(), online)

  @property
  def _dtypes(self) -> dict[str, Any]:
    return {name: encoders.DTYPES[self._model[name]] for name in ("dtype", "param_dtype")}

  def forward_flops(self, model: simclr.SimCLR, state: state_lib.TrainState) -> int:
    """Returns the matrix FLOPs of both views of one image on their way through encoder and heads."""
    return cost.matrix_flops(lambda v, x: model.apply(v, x, train=False), state.variables, self.images(2))

  @property
  def passes(self) -> int:
    """Passes of a batch through the network: forward, backward twice that, forward by the weights of a queue."""
    return 4 if self._queue else 3

  def step_flops(self, forward: int) -> int:
    """Returns the model FLOPs of one step of pretraining, given `forward_flops`: all images, and all pairs of views."""
    # Every pair of views is scored once forward, and the gradient takes two more products of that size. No gradient
    # flows into a queue of negatives, which spares one of them.
    views = 2 * self._batch_size
    pairs = 2 * views * self._head.out_dim * (3 * views + 2 * self._queue)
    return self.passes * forward * self._batch_size + pairs
