"""linear_eval: how good are frozen features? Trains a linear classifier on them and counts the held-out split once.

The reference's protocol (v1 appendix B.6): the encoder runs in inference mode and never changes, images are cropped and
flipped, the classifier learns with Nesterov momentum and a cosine rate. Needs --workdir and
--config.checkpoint=RUN, a pretraining run's workdir (or `random`: the encoder as it is initialised, the number to
beat). Without --config the run's own is used. --config.head.evaluate_from=-1 reads the projection head's output instead
of the encoder's. --config.labels.fraction=0.1 learns from a tenth of the labels. Writes `result.json`, and a
checkpoint with encoder and classifier. --config.linear_eval.protocol=features takes one pass over the images and trains
many classifiers at once; =stored trains none, and counts with the one that the checkpoint has: a run of finetune,
distill or linear_eval, pretraining's online one, or a converted release.
"""

import jax

from simclr_jax import errors
from simclr_jax.evaluation import features as evaluation
from simclr_jax.jobs import classifier, feature_eval, representation, setup
from simclr_jax.training import checkpoint, telemetry

PROTOCOLS = ("reference", "features", "stored")


def run(config, workdir: str, *, profile_steps: str = "") -> dict[str, float]:
  """Returns the held-out accuracies of a linear classifier on the frozen encoder of `config.checkpoint`."""
  if not config.checkpoint:
    raise errors.UserError(
      "linear_eval has no encoder; give --config.checkpoint=RUN, the workdir of a pretraining run (or `random`)."
    )
  protocol = setup.choice("linear_eval.protocol", config.linear_eval.protocol, PROTOCOLS)
  if protocol != "reference":
    if profile_steps:
      raise errors.UserError(f"--profile_steps is for linear_eval.protocol reference; {protocol} trains no network.")
    return feature_eval.run(config, workdir) if protocol == "features" else _stored(config, workdir)
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


def _stored(config, workdir: str) -> dict[str, float]:
  """Returns (and writes to `result.json`) the held-out accuracies of the classifier that the checkpoint has."""
  if config.checkpoint == setup.RANDOM:
    raise errors.UserError("linear_eval.protocol stored needs a classifier; give --config.checkpoint=RUN, not random.")
  mesh = setup.mesh_for(config, ("eval_batch_size", config.eval_batch_size))
  setup.fits(config, config.checkpoint)
  held_out = setup.held_out_split(config, "linear_eval")
  logits_of, variables, classes, _ = representation.classifier(config.checkpoint, mesh)
  if held_out.num_classes != classes:
    raise errors.UserError(
      f"the classifier of {config.checkpoint} tells {classes} classes apart and {held_out.name} has "
      f"{held_out.num_classes}; use the data that it was trained on."
    )
  checkpoint.claim_workdir(workdir, config.to_dict(), "linear_eval", setup.FREE_KEYS)
  rows = setup.evaluation_rows(config, held_out)
  counted = evaluation.accuracy(logits_of, variables, rows(), mesh)
  result = {f"eval/{name}": value for name, value in counted.items()}
  result |= {"layer": checkpoint.classifier_layer(config.checkpoint), "protocol": "stored"}
  result["checkpoint"] = config.checkpoint
  if jax.process_index() == 0:
    telemetry.write_json(f"{workdir}/result.json", result)
  telemetry.log.info(
    "linear_eval: stored classifier, top-1 %.2f %%, top-5 %.2f %% of %d held-out images",
    *(100 * result["eval/top1"], 100 * result["eval/top5"], result["eval/examples"]),
  )
  return result
