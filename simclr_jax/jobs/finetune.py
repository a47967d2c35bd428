"""finetune: trains the network with labels, many or few, from a checkpoint or from scratch (the supervised baseline).

Encoder and a fresh classifier learn, BatchNorm included (v1 appendix B.5, v2 section 3.2). Needs --config and
--workdir; --config.checkpoint=RUN starts from a pretraining run, and without --config uses the run's own. Writes
`result.json` and a checkpoint.

  --config.labels.fraction=0.01     learns from 1 % of each class (seeded); --config.labels.ids=FILE from the images
                                    that a list names, such as the reference's imagenet_subsets
  --config.head.finetune_from=1     puts the classifier on the projection head's first layer, which learns too (v2)
  --config.finetune.after_block=2   freezes stem and block groups 1 and 2, BatchNorm included; 4 leaves the classifier
                                    (and the projection head's layers below it)
  --config.finetune.sampling=balanced
                                    shows every class equally often, where some have few images;
                                    --config.finetune.class_weights=balanced weighs the loss instead
  --config.finetune.micro_batches=4 takes a batch that does not fit in four parts, one after the other
"""

import ml_collections

from simclr_jax import classifier, comparison, errors, experiment


def run(
  config: ml_collections.ConfigDict, workdir: str, *, profile_steps: tuple[int, int] | None = None
) -> dict[str, float]:
  """Returns the held-out accuracies of the network trained by `config.finetune`."""
  this = experiment.Experiment(config, "finetune", workdir)
  layer, after_stage = this.network.layer("finetune_from"), config.finetune.after_block
  stages = this.network.encoder().stages
  if not -1 <= after_stage < len(stages):
    raise errors.UserError(
      f"config.finetune.after_block is {after_stage}; use -1 (all learns) or "
      + ", ".join(f"{number} (what follows {stage})" for number, stage in enumerate(stages))
      + "."
    )
  train = this.labelled
  judge = comparison.regression_judge(this, train.num_classes)
  task = classifier.Task(
    *(train, this.held_out, train.num_classes, layer, after_stage),
    about={"layer": layer, "after_block": after_stage},
    compare=lambda *own: comparison.of_result(this, train, this.held_out, judge, classifier=own),
  )
  return classifier.train(this, task, profile_steps=profile_steps)
