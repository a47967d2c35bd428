"""linear_eval: how good are frozen features? Trains a linear classifier on them and counts the held-out split once.

The reference's protocol (v1 appendix B.6): the encoder runs in inference mode and never changes, images are cropped and
flipped, the classifier learns with Nesterov momentum and a cosine rate. Needs --workdir and
--config.checkpoint=RUN, a pretraining run's workdir (or `random`: the encoder as it is initialised). Without --config
the run's own is used. The result ends with a table beside raw pixels, colours, an untrained encoder and chance, and
with a verdict. --config.head.evaluate_from=-1 reads the projection head's output instead of the encoder's.
--config.labels.fraction=0.1 learns from a tenth of the labels. Where some classes have few images,
--config.linear_eval.sampling=balanced shows all equally often, and --config.linear_eval.class_weights=balanced weighs
the loss. Writes `result.json`, and a checkpoint with encoder and classifier.

--config.linear_eval.protocol=features takes one pass over the images and trains many classifiers at once: a grid of
learning rates and weight decays, and a path of L2 strengths. A held-back part of the training images chooses one of
each; these two are trained again on all training images and count the held-out split once. The checkpoint has the one
that did better on the part held back.
--config.linear_eval.protocol=stored trains none, and counts with the classifier of the checkpoint: a run of finetune,
distill or linear_eval, pretraining's online classifier, or a converted release.
"""

import dataclasses
import itertools
import time
from typing import Any

import ml_collections
import numpy as np

from simclr_jax import classifier, comparison, errors, experiment, inference, numbers
from simclr_jax.data import order
from simclr_jax.evaluation import baselines, features, probes, scores, selection
from simclr_jax.hardware import sharding
from simclr_jax.training import telemetry


def run(
  config: ml_collections.ConfigDict, workdir: str, *, profile_steps: tuple[int, int] | None = None
) -> dict[str, Any]:
  """Returns the held-out accuracies of a linear classifier on the frozen encoder of `config.checkpoint`."""
  if not config.checkpoint:
    raise errors.UserError(
      "linear_eval has no encoder; give --config.checkpoint=RUN, the workdir of a pretraining run (or `random`)."
    )
  protocol = config.linear_eval.protocol
  this = experiment.Experiment(config, "linear_eval", workdir)
  known = {"features": ("sampling",), "stored": ("sampling", "class_weights")}
  for key in known.get(protocol, ()):
    if config.linear_eval[key] == "balanced":
      raise errors.UserError(f"config.linear_eval.{key}=balanced is not for protocol {protocol}; leave it out.")
  if protocol != "reference":
    if profile_steps:
      raise errors.UserError(f"--profile_steps is for linear_eval.protocol reference; {protocol} trains no network.")
    return _features(this) if protocol == "features" else _stored(this)
  layer, train = this.network.layer("evaluate_from"), this.labelled
  task = classifier.Task(
    *(train, this.held_out, train.num_classes, layer),
    after_stage=len(this.network.encoder().stages) - 1,
    frozen_head=True,
    about={"layer": layer},
    compare=lambda *own: _compared(this, *own),
  )
  return classifier.train(this, task, profile_steps=profile_steps)


def _compared(
  this: experiment.Experiment, top1: float, examples: int, frozen: inference.Representation | None = None
) -> dict[str, Any]:
  """Returns what a result of so many held-out images is worth, see `comparison.of_result`."""
  if not this.config.baselines.train_images:
    return {}
  frozen = frozen or inference.representation(this)
  judge = comparison.regression_judge(this, this.train.num_classes)
  options = {"encoder": (frozen.encode, frozen.variables), "classifier": (top1, examples)}
  return comparison.of_result(this, this.labelled, this.held_out, judge, **options)


def _stored(this: experiment.Experiment) -> dict[str, Any]:
  """Returns (and writes to `result.json`) the held-out accuracies of the classifier that the checkpoint has."""
  path = this.config.checkpoint
  if not this.is_pretrained:
    raise errors.UserError("linear_eval.protocol stored needs a classifier; give --config.checkpoint=RUN, not random.")
  saved, held_out = this.saved(), this.held_out
  stored = inference.classifier(path, this.mesh)
  stored.check_classes(held_out, path)
  this.claim()
  counted = scores.accuracy(stored.logits_of, stored.variables, this.rows(held_out)(), this.mesh)
  result = {f"eval/{name}": value for name, value in counted.items()}
  result["eval/top1_interval"] = baselines.interval(counted["top1"], counted["examples"])
  result |= {"layer": saved.classifier_layer, "protocol": "stored", "checkpoint": path}
  telemetry.write_result(this.workdir, result)
  telemetry.log.info(
    "linear_eval: stored classifier, %s of %d held-out images", scores.shown(result), result["eval/examples"]
  )
  return result


def _features(this: experiment.Experiment) -> dict[str, Any]:
  """Returns (and writes to `result.json`) held-out accuracies of the classifiers that a validation share chose."""
  config, keys, mesh = this.config, this.config.probes, this.mesh
  grid, path = _settings(keys)
  sharding.check_divisible(keys.batch_size, mesh, name="config.probes.batch_size")
  train, held_out = this.labelled, this.held_out
  rows = probes.held_back(train.num_examples, keys.validation_share, config.seed)
  frozen = inference.representation(this)
  this.claim()
  begin = time.monotonic()
  passes = [this.rows(train)()] + [this.augmented_rows(train, number) for number in range(1, keys.passes)]
  read = lambda batches: features.of_split(frozen.encode, frozen.variables, batches, mesh)
  parts = [features.labelled(read(batches)) for batches in passes]
  known = features.Features(np.stack([part.x for part in parts]), parts[0].label)
  if len(known.label) < train.num_examples:  # A split that is streamed shows only now which images have a label.
    rows = probes.held_back(len(known.label), keys.validation_share, config.seed)
  fitted = order.fitted(keys.batch_size, len(rows[0]) * keys.passes, shards=config.data.shards)
  if fitted < keys.batch_size:
    telemetry.log.info(
      "config.probes.batch_size is %d and there are %d rows beside the validation share: batches of %d.",
      *(keys.batch_size, len(rows[0]) * keys.passes, fitted),
    )
    sharding.check_divisible(fitted, mesh, name="config.probes.batch_size")
    grid = dataclasses.replace(grid, batch_size=fitted)
  test = features.labelled(inference.of_split(frozen, this, held_out))
  seconds = {"features": time.monotonic() - begin}
  telemetry.log.info(
    "linear_eval: %d + %d features of %d numbers in %.1f s",
    *(known.x.shape[0] * known.x.shape[1], *test.x.shape, seconds["features"]),
  )
  begin = time.monotonic()
  options = {"classes": train.num_classes, "mesh": mesh}
  options["is_balanced"] = config.linear_eval.class_weights == "balanced"
  by_grid = selection.choose_from_grid(known, rows, test, grid, seed=config.seed, **options)
  seconds["grid"] = time.monotonic() - begin
  begin = time.monotonic()
  by_path = selection.choose_from_path(known, rows, test, path, **options)
  seconds["lbfgs"] = time.monotonic() - begin
  stored, best = max((("grid", by_grid), ("lbfgs", by_path)), key=lambda choice: choice[1].validation_top1.max())
  classifier.store(this, frozen.variables, frozen.layer, best.dense, train.class_names)
  by_cell = zip(itertools.product(grid.learning_rates, grid.weight_decays), by_grid.validation_top1.flat, strict=True)
  cells = [{"learning_rate": rate, "weight_decay": decay, "top1": float(top1)} for (rate, decay), top1 in by_cell]
  by_strength = zip(path.l2_strengths, by_path.validation_top1, strict=True)
  result = {
    **_counted("eval/", by_grid),
    **_counted("eval/lbfgs_", by_path),
    "eval/top1_interval": baselines.interval(by_grid.top1, len(test.label)),
    "learning_rate": by_grid.learning_rate,
    "weight_decay": by_grid.weight_decay,
    "l2_strength": by_path.l2_strength,
    "validation/top1": cells,
    "validation/lbfgs_top1": [{"l2_strength": strength, "top1": float(top1)} for strength, top1 in by_strength],
    "eval/examples": len(test.label),
    "validation/examples": len(rows[1]),
    **{f"seconds/{name}": value for name, value in seconds.items()},
    "passes": keys.passes,
    "train_examples": train.num_examples,
    "layer": frozen.layer,
    "protocol": "features",
    "stored_classifier": stored,
    "checkpoint": config.checkpoint,
  }
  telemetry.log.info("%s", report(result))
  result |= _compared(this, by_grid.top1, len(test.label), frozen)
  telemetry.log.info("%s", telemetry.write_result(this.workdir, result))
  return result


def _counted(prefix: str, choice: selection.GridChoice | selection.PathChoice) -> dict[str, float]:
  """Returns the accuracies of a choice by their names in the result."""
  values = {name: getattr(choice, name) for name in ("top1", "balanced_top1", "top5")}
  return {prefix + name: value for name, value in values.items() if value is not None}


def _settings(keys) -> tuple[probes.Grid, probes.L2Path]:
  """Returns the grid and the path that `config.probes` describes."""
  rates = numbers.floats("config.probes.learning_rates", keys.learning_rates)
  decays = numbers.floats("config.probes.weight_decays", keys.weight_decays, zero=True)
  strengths = numbers.floats("config.probes.l2_strengths", keys.l2_strengths)
  grid = probes.Grid(rates, decays, keys.epochs, keys.batch_size)
  return grid, probes.L2Path(strengths, keys.lbfgs_steps, keys.lbfgs_tolerance)


def report(result: dict[str, Any]) -> str:
  """Returns the validation table and the held-out accuracies of protocol `features`, for people."""
  cells = {(cell["learning_rate"], cell["weight_decay"]): cell["top1"] for cell in result["validation/top1"]}
  rates, decays = (list(dict.fromkeys(axis)) for axis in zip(*cells, strict=True))
  lines = [
    f"linear_eval: top-1 % of {result['validation/examples']} validation images by learning rate and weight decay",
    " " * 10 + "".join(f"{decay:>9g}" for decay in decays),
  ]
  lines += [f"{rate:>10g}" + "".join(f"{100 * cells[rate, decay]:>9.2f}" for decay in decays) for rate in rates]
  lines += [
    "logistic regression, by L2 strength: "
    + ", ".join(f"{cell['l2_strength']:g}: {100 * cell['top1']:.2f}" for cell in result["validation/lbfgs_top1"]),
    f"of {result['eval/examples']} held-out images: "
    f"{scores.shown(result)} "
    f"(learning rate {result['learning_rate']:g}, weight decay {result['weight_decay']:g}); "
    f"logistic regression {scores.shown(result, 'eval/lbfgs_')} "
    f"(L2 strength {result['l2_strength']:g})",
    "seconds: " + ", ".join(f"{part} {result[f'seconds/{part}']:.1f}" for part in ("features", "grid", "lbfgs")),
  ]
  return "\n".join(lines)
