"""The protocol that encoders follow, and the table of encoders by name.

To add an encoder, write it in a file of its own, give it a row in `ENCODERS`, and its config keys defaults.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp

from simclr_jax import errors
from simclr_jax.models import resnet

DTYPES: dict[str, Any] = {"bfloat16": jnp.bfloat16, "float32": jnp.float32, "float64": jnp.float64}


class Encoder(Protocol):
  """A Linen module from images to representations, made of stages that can be frozen from the input upwards.

  Its fields are keys of the config's `model` section, `dtype` and `param_dtype` among them. Whether it has batch
  statistics shows in its variables alone: `variables.get("batch_stats", {})`.
  """

  @property
  def stages(self) -> tuple[str, ...]:
    """The names of the stages from the input to the output, for messages."""
    ...

  def stage_of(self, name: str) -> int:
    """Returns the index in `stages` of a top-level module, by its name in the parameter tree."""
    ...

  def __call__(self, images: jax.Array, *, train: bool, after_stage: int = -1) -> jax.Array:
    """Returns h f[N, D], in at least float32, of images f[N, H, W, 3], RGB, in [0, 1] or u8.

    Stages up to the index `after_stage` (-1 for none) are frozen: they run in inference mode and get no gradient.
    """
    ...


ENCODERS: dict[str, type[nn.Module]] = {"resnet": resnet.ResNet}


def build(keys: Mapping[str, Any]) -> Encoder:
  """Returns the encoder that the config's `model` section describes.

  It has `encoder`, a key of `ENCODERS` ("resnet" where absent), and the fields of that class, dtypes by name; keys of
  other encoders are ignored.
  """
  name = keys.get("encoder", "resnet")
  if name not in ENCODERS:
    raise errors.UserError(
      f"config.model.encoder is {name!r}{errors.nearest(name, ENCODERS)}; use {', '.join(ENCODERS)}."
    )
  fields = [field.name for field in dataclasses.fields(ENCODERS[name]) if field.name not in ("parent", "name")]
  given = {key: keys[key] for key in fields if key in keys}
  return ENCODERS[name](**{key: DTYPES[value] if key.endswith("dtype") else value for key, value in given.items()})
