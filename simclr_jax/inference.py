"""An encoder from a checkpoint as a plain function, for notebooks and products."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from simclr_jax import errors
from simclr_jax.hardware import sharding
from simclr_jax.models import resnet
from simclr_jax.training import checkpoint

DTYPES = {"bfloat16": jnp.bfloat16, "float32": jnp.float32, "float64": jnp.float64}

# Images that go through the network together; the last batch is padded, so one compilation serves any N.
BATCH = 128


def encoder_of(keys: Mapping[str, Any]) -> resnet.ResNet:
  """Returns the encoder that the `model` section of a config describes."""
  dtypes = {name: DTYPES[keys[name]] for name in ("dtype", "param_dtype")}
  return resnet.ResNet(**{**keys, **dtypes})


def load_encoder(path: str):
  """Returns (encode, config) of the checkpoint at `path`; see `simclr_jax.load_encoder`."""
  config = ml_collections.ConfigDict(checkpoint.read_config(path))
  model = encoder_of(config.model)
  size = config.data.image_size
  images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
  placement = sharding.replicated(sharding.data_mesh(jax.local_devices()[:1]))
  tree = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), images)
  tree = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placement), tree)
  params, batch_stats = checkpoint.load_model(path, {"encoder": tree["params"]}, {"encoder": tree["batch_stats"]})
  variables = {"params": params["encoder"], "batch_stats": batch_stats["encoder"]}
  apply = jax.jit(lambda x: model.apply(variables, x, train=False).astype(jnp.float32))

  def encode(images) -> np.ndarray:
    """Returns f32[N, D] of images u8 or f32 in [0, 1] [N, H, W, 3]."""
    images = np.asarray(images)
    if images.ndim != 4 or images.shape[-1] != 3:
      raise errors.UserError(f"images have shape {images.shape}; wanted [N, H, W, 3], RGB.")
    if images.dtype != np.uint8:
      images = images.astype(np.float32)
    parts = []
    for start in range(0, len(images), BATCH):
      piece = images[start : start + BATCH]
      padding = [(0, BATCH - len(piece)), (0, 0), (0, 0), (0, 0)]
      parts.append(np.asarray(apply(np.pad(piece, padding)))[: len(piece)])
    dim = jax.eval_shape(apply, images[:1]).shape[-1]
    return np.concatenate([np.zeros((0, dim), np.float32), *parts])

  return encode, config
