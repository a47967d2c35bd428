"""The representation that a job reads: a checkpoint's encoder, and as much of the projection head as is asked for."""

import jax
import jax.numpy as jnp
import ml_collections

from simclr_jax import errors, inference
from simclr_jax.evaluation import features as evaluation
from simclr_jax.hardware import sharding
from simclr_jax.jobs import setup
from simclr_jax.models import simclr
from simclr_jax.training import checkpoint
from simclr_jax.training import state as state_lib


def load(config, mesh: jax.sharding.Mesh, *, job: str):
  """Returns ((variables, images) -> f[N, D], variables) of `config.checkpoint`, in inference mode.

  Images are f32 in [0, 1] or u8, [N, H, W, 3]; what comes out is the output of the layer `config.head.evaluate_from`.

  Args:
    config: the run's; `config.checkpoint` may be `random`, the encoder as it is initialised.
    mesh: where the variables go.
    job: for messages.
  """
  if not config.checkpoint:
    raise errors.UserError(
      f"{job} has no encoder; give --config.checkpoint=RUN, the workdir of a pretraining run (or `random`)."
    )
  pretrained = config.checkpoint != setup.RANDOM
  layer = setup.layer_of(config, "evaluate_from")
  if pretrained:
    setup.fits(config, config.checkpoint, head=bool(layer))
  model = simclr.Representation(
    inference.encoder_of(config.model), setup.projection_head_of(config) if layer else None, layer
  )
  params, batch_stats = state_lib.variables(
    model, config.data.image_size, config.seed, mesh, split=setup.is_split(config)
  )
  if pretrained:
    params, batch_stats = checkpoint.load_model(config.checkpoint, params, batch_stats)
  whole = setup.whole_of(config, mesh)

  def encode(variables, images):
    return model.apply({**variables, "params": whole(variables["params"])}, images, train=False)

  return encode, {"params": params, "batch_stats": batch_stats}


def of_split(encode, variables, config, source, mesh):
  """Returns f32[N, D] and label i32[N] of a whole split in order, by the evaluation's crop, on every process."""
  return evaluation.features(encode, variables, setup.evaluation_rows(config, source)(), mesh)


def classifier(path: str, mesh: jax.sharding.Mesh):
  """Returns ((variables, images) -> logits f[N, K], variables, K, config) of a checkpoint that has a classifier.

  In inference mode, whole on every device; its classifier reads the layer of the projection head that it was trained
  on.
  """
  config = ml_collections.ConfigDict(checkpoint.read_config(path))
  classes, layer = checkpoint.classes(path), checkpoint.classifier_layer(path)
  head = setup.projection_head_of(config) if layer else None
  model = simclr.Classifier(inference.encoder_of(config.model), setup.linear_head_of(config, classes), head, layer)
  images = jax.ShapeDtypeStruct((1, config.data.image_size, config.data.image_size, 3), jnp.float32)
  tree = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), images)
  tree = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding.replicated(mesh)), tree)
  params, batch_stats = checkpoint.load_model(path, tree["params"], tree["batch_stats"])
  logits_of = lambda variables, images: model.apply(variables, images, train=False)
  return logits_of, {"params": params, "batch_stats": batch_stats}, classes, config
