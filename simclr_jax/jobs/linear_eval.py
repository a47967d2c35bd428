"""linear_eval: how good are frozen features? Trains a linear classifier on them and counts the held-out split once.

The reference's protocol (v1 appendix B.6): the encoder runs in inference mode and never changes, images are cropped and
flipped, the classifier learns with Nesterov momentum and a cosine rate. Needs --workdir and
--config.checkpoint=RUN, a pretraining run's workdir (or `random`: the encoder as it is initialised, the number to
beat). Without --config the run's own is used. --config.head.evaluate_from=-1 reads the projection head's output instead
of the encoder's. --config.labels.fraction=0.1 learns from a tenth of the labels. Writes `result.json`, and a
checkpoint with encoder and classifier.
"""

from simclr_jax import errors
from simclr_jax.jobs import classifier, feature_eval, setup


def run(config, workdir: str, *, profile_steps: str = "") -> dict[str, float]:
  """Returns the held-out accuracies of a linear classifier on the frozen encoder of `config.checkpoint`."""
  if not config.checkpoint:
    raise errors.UserError(
      "linear_eval has no encoder; give --config.checkpoint=RUN, the workdir of a pretraining run (or `random`)."
    )
  protocol = setup.choice("linear_eval.protocol", config.linear_eval.protocol, ("reference", "features"))
  if protocol == "features":
    if profile_steps:
      raise errors.UserError("--profile_steps is for linear_eval.protocol reference; features trains no network.")
    return feature_eval.run(config, workdir)
  mesh = classifier.mesh_of(config, config.linear_eval, "linear_eval")
  layer = setup.layer_of(config, "evaluate_from")
  train, held_out = setup.labelled_splits(config, "linear_eval")
  return classifier.train(
    config,
    config.linear_eval,
    workdir,
    job="linear_eval",
    train=train,
    held_out=held_out,
    classes=train.num_classes,
    mesh=mesh,
    after_block=4,
    layer=layer,
    frozen_head=True,
    result={"layer": layer},
    profile_steps=profile_steps,
  )
