"""SimCLR in JAX: contrastive pretraining at any scale, and everything that turns the encoder into a result."""

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from simclr_jax.version import __version__

if TYPE_CHECKING:
  import ml_collections
  import numpy as np

__all__ = ["__version__", "load_classifier", "load_config", "load_encoder", "run"]


# Everything else is imported late, so that `import simclr_jax` costs nothing.


def load_config(name_or_path: str, **overrides: Any) -> "ml_collections.ConfigDict":
  """Returns the locked config of an experiment.

  It is a bundled one (`cifar10`) or a Python file, with a variant after a colon (`imagenet:v1`). Keys are overridden by
  name (`batch_size=64`), dotted (`**{"loss.temperature": 0.5}`) or nested (`loss={"temperature": 0.5}`).
  UserError: there is no such experiment or key, or a value is not of its key's type.
  """
  from simclr_jax import config

  return config.load(name_or_path, config.flat(overrides))


def run(job: str, config: "ml_collections.ConfigDict | None", workdir: str, **options: Any) -> dict[str, Any]:
  """Runs a job, as `python -m simclr_jax JOB` does, and returns what its `result.json` holds.

  Args:
    job: `pretrain`, `linear_eval`, ...; `python -m simclr_jax --help` lists them.
    config: from `load_config`; None for `convert` and `bench`, which take none.
    workdir: the folder for checkpoints, metrics and results; the same call continues a stopped run.
    **options: the job's own, such as `profile_steps=(10, 15)`.
  UserError: something in config or options does not fit.
  """
  from simclr_jax import errors, files, jobs, preflight, progress

  if job not in jobs.JOBS:
    raise errors.UserError(f"unknown job {job!r}{errors.nearest(job, jobs.JOBS)}; the jobs are {', '.join(jobs.JOBS)}.")
  workdir = files.absolute(workdir) if workdir else ""
  preflight.check(job, config, workdir)
  with progress.alive():
    progress.doing("loading JAX and TensorFlow")
    import jax

    from simclr_jax.training import telemetry

    telemetry.set_up_logging()
    inputs = () if job in jobs.WITHOUT_CONFIG else (config,)
    if config is not None and "float64" in (config.model.dtype, config.model.param_dtype):
      jax.config.update("jax_enable_x64", True)
    module = importlib.import_module(f"simclr_jax.jobs.{job}")
    progress.doing(f"{job}: preparing")
    result = module.run(*inputs, workdir, **options)
  return {**result, "version": __version__} if isinstance(result, dict) else {"version": __version__}


def load_classifier(
  path: str,
) -> "tuple[Callable[[np.ndarray], np.ndarray], tuple[str, ...], ml_collections.ConfigDict]":
  """Returns (classify, class_names, config) of the checkpoint at `path`, of a run that has a classifier.

  `classify` takes what `encode` of `load_encoder` takes, and gives probabilities f32[N, K] in the order of
  `class_names`; names that an older checkpoint lacks are numbers. `config` is the training run's.
  UserError: there is no checkpoint, or it has no classifier.
  """
  from simclr_jax import startup

  startup.quiet()
  from simclr_jax import inference

  return inference.load_classifier(path)


def load_encoder(path: str) -> "tuple[Callable[[np.ndarray], np.ndarray], ml_collections.ConfigDict]":
  """Returns (encode, config) of the checkpoint at `path`.

  `encode` turns images u8 or f32 in [0, 1] [N, H, W, 3] into features f32[N, D]; H and W should be the config's
  `data.image_size`. It also takes the names of N image files, which are cropped as `embed` does. `config` is the
  training run's, `path` its workdir or one of its checkpoints/STEP folders.
  UserError: there is no checkpoint, or it does not fit its config.
  """
  from simclr_jax import startup

  startup.quiet()
  from simclr_jax import inference

  return inference.load_encoder(path)
