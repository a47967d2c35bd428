"""finetune: trains the whole network with labels, from a checkpoint or from scratch (the supervised baseline).

All of the encoder and a fresh classifier learn, BatchNorm included (v1 appendix B.5). Needs --config and --workdir;
--config.checkpoint=RUN starts from a pretraining run. Writes `result.json` and a checkpoint.
"""

from simclr_jax.jobs import linear_eval


def run(config, workdir: str, *, profile_steps: str = "") -> dict[str, float]:
  """Returns the held-out accuracies of the network trained by `config.finetune`."""
  return linear_eval.train_classifier(
    config, config.finetune, workdir, job="finetune", frozen=False, profile_steps=profile_steps
  )
