"""finetune: trains the network with labels, many or few, from a checkpoint or from scratch (the supervised baseline).

Encoder and a fresh classifier learn, BatchNorm included (v1 appendix B.5, v2 section 3.2). Needs --config and
--workdir; --config.checkpoint=RUN starts from a pretraining run, and without --config uses the run's own. Writes
`result.json` and a checkpoint.

  --config.labels.fraction=0.01     learns from 1 % of each class (seeded); --config.labels.ids=FILE from the images
                                    that a list names, such as the reference's imagenet_subsets
  --config.head.finetune_from=1     puts the classifier on the projection head's first layer, which learns too (v2)
  --config.finetune.after_block=2   freezes stem and block groups 1 and 2, BatchNorm included; 4 leaves the classifier
                                    (and the projection head's layers below it)
"""

from simclr_jax.jobs import classifier, setup


def run(config, workdir: str, *, profile_steps: str = "") -> dict[str, float]:
  """Returns the held-out accuracies of the network trained by `config.finetune`."""
  mesh = classifier.mesh_of(config, config.finetune, "finetune")
  layer, after_block = setup.layer_of(config, "finetune_from"), classifier.after_block_of(config)
  train, held_out = setup.labelled_splits(config, "finetune")
  return classifier.train(
    config,
    config.finetune,
    workdir,
    job="finetune",
    train=train,
    held_out=held_out,
    classes=train.num_classes,
    mesh=mesh,
    after_block=after_block,
    layer=layer,
    result={"layer": layer, "after_block": after_block},
    profile_steps=profile_steps,
  )
