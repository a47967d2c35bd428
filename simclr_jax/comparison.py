"""A job's result beside chance, raw pixels, colours and an untrained encoder: the table and the verdict at its end."""

import textwrap
from collections.abc import Callable
from typing import Any, NamedTuple

from simclr_jax import experiment, progress
from simclr_jax.data import source
from simclr_jax.evaluation import baselines, neighbours, selection
from simclr_jax.evaluation.features import Features
from simclr_jax.models import simclr
from simclr_jax.training import telemetry


class Judge(NamedTuple):
  """What makes an accuracy of features."""

  name: str  # For people.
  top1: Callable[[Features, Features], float]  # (of training images, of held-out images) -> share correct.


def neighbours_judge(run: experiment.Experiment, classes: int, k: int, temperature: float) -> Judge:
  """Returns the vote of k nearest neighbours, all where there are fewer; see `neighbours.accuracies`."""

  def top1(known, test):
    options = {"temperatures": [temperature], "classes": classes, "mesh": run.mesh}
    return neighbours.accuracies(known, test, neighbours=[min(k, len(known.label))], **options)[0]["top1"]

  return Judge(f"{k} nearest neighbours", top1)


def regression_judge(run: experiment.Experiment, classes: int) -> Judge:
  """Returns a logistic regression, see `selection.regression_top1`."""
  keys = {"classes": classes, "seed": run.config.seed, "mesh": run.mesh}
  return Judge("logistic regression", lambda known, test: selection.regression_top1(known, test, **keys))


def of_result(
  run: experiment.Experiment,
  known: source.Source,
  held_out: source.Source,
  judge: Judge,
  *,
  encoder: tuple[Callable[[Any, Any], Any], Any] | None = None,  # (encode, variables) of what is judged.
  classifier: tuple[float, int] | None = None,  # The job's own top-1, and the images that it is of.
) -> dict[str, Any]:
  """Returns `baselines` and `verdict` for `result.json`, and logs the table; nothing where `baselines` is off.

  The verdict is about the encoder, where one is given, by the judge that the baselines have on the same images; else
  about the classifier.
  """
  keys = run.config.baselines
  if not keys.train_images:
    return {}
  progress.doing("comparing with pixels, colours and an untrained encoder")
  parts = known.sample(keys.train_images, run.config.seed), held_out.sample(keys.held_out_images, run.config.seed)
  counts = [part.num_examples for part in parts]
  telemetry.log.info("%s: measuring baselines on %d + %d images ...", run.job, *counts)
  untrained = simclr.Representation(run.network.encoder())
  params, batch_stats = run.variables(untrained)
  encoders = {baselines.ENCODER: encoder} if encoder else {}
  encoders[baselines.RANDOM] = run.applied(untrained), {"params": params, "batch_stats": batch_stats}
  found = baselines.measure(encoders, *(run.rows(part) for part in parts), judge.top1, run.mesh)
  own = found[baselines.ENCODER] if encoder else baselines.score(*classifier)
  subject = "the encoder" if encoder else "the classifier"
  is_trained = run.is_pretrained or run.job in ("pretrain", "finetune")
  verdict = baselines.verdict(subject, own, found, is_trained=is_trained)
  if encoder and classifier:
    verdict += baselines.shortfall(run.job, baselines.score(*classifier), own)
  sentence = textwrap.fill(f"{run.job}: {verdict}", 80)
  telemetry.log.info("%s\n%s", _table(run, judge, found, classifier, known, held_out, parts), sentence)
  entries = {name: {"top1": own.top1, "interval": [own.low, own.high]} for name, own in found.items()}
  return {"baselines": entries, "verdict": verdict}


def _table(run, judge, found, classifier, known, held_out, parts):
  """Returns the table of a result."""
  numbers = [
    f"{part.num_examples:,}" + (f" of {whole.num_examples:,}" if part.num_examples < whole.num_examples else "")
    for part, whole in zip(parts, (known, held_out), strict=True)
  ]
  rows = {f"{run.job}'s classifier": baselines.score(*classifier)} if classifier else {}
  side = min(run.config.data.image_size, baselines.PIXELS)
  shown = {
    baselines.ENCODER: f"encoder, {judge.name}",
    baselines.RAW: f"raw pixels, {side} x {side}",
    baselines.RANDOM: "encoder without training",
    baselines.CHANCE: "chance (the largest class)",
  }
  rows |= {shown.get(name, name): value for name, value in found.items()}
  title = f"{run.job}: beside baselines by {judge.name}, {numbers[0]} training images\nand {numbers[1]} held-out images"
  return baselines.table(rows, title)
