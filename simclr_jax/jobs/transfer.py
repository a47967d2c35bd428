"""transfer: linear classifiers of other data sets on frozen features, by the paper's protocol (v1 appendix B.8).

Needs --workdir, --config.checkpoint=RUN (a pretraining run, or `random`) and --config.data.dir=DIR, which holds TFDS
data sets that are prepared; nothing is downloaded. L2-regularised logistic regressions by L-BFGS, over 45 strengths;
the best on the validation split is trained again with the validation images and counts the test split once. One data
set after the other; those that have their result in WORKDIR/NAME are not run again. Writes `result.json`.

  --config.transfer.datasets=paper                    its twelve; those that are not in DIR are reported and left out
  --config.transfer.datasets=cifar10,food101          some of them, or other TFDS names
  --config.transfer.datasets=NAME:TRAIN:VALIDATION:TEST   other splits; without VALIDATION a share of TRAIN is held back
  --config.transfer.datasets=folder:DIR               train/CLASS/image.jpg, test/CLASS/..., maybe validation/CLASS/...
"""

import dataclasses
import json
import time
from typing import Any

import jax
import ml_collections
import numpy as np
from etils import epath

from simclr_jax import config as config_lib
from simclr_jax import errors, experiment, files, inference
from simclr_jax.data import inputs, source, sources, transfer_sets
from simclr_jax.evaluation import features, probes, scores, selection
from simclr_jax.training import checkpoint, telemetry

METRICS = {
  "top1": (scores.top1, "top-1"),
  "mean_per_class": (scores.mean_per_class, "mean per class"),
  "map_11": (scores.mean_average_precision, "11-point mAP"),
}


def run(config: ml_collections.ConfigDict, workdir: str) -> dict[str, Any]:
  """Returns (and writes to `result.json`) the test scores of every data set."""
  keys = config.transfer
  path = probes.L2Path(_strengths(keys), keys.lbfgs_steps, keys.lbfgs_tolerance)
  tasks = transfer_sets.chosen(keys.datasets, config.data.dir)
  this = experiment.Experiment(config, "transfer", workdir)
  frozen = inference.representation(this)
  this.claim((*config_lib.FREE, "transfer.datasets"))

  step = str(checkpoint.open(config.checkpoint).path) if this.is_pretrained else config.checkpoint
  settings = {task.key: json.loads(json.dumps({**dataclasses.asdict(task), "checkpoint": step})) for task in tasks}
  finished = {task.key: _finished(workdir, task.key, settings[task.key]) for task in tasks}
  # All are opened before the first is computed, so that a mistake in the last one's name is found now.
  ready, missing = _opened([task for task in tasks if not finished[task.key]], this)
  if len(missing) == len(tasks):
    raise errors.UserError(f"none of the {len(tasks)} data sets is there; {next(iter(missing.values()))}")
  table = {}
  for task in tasks:
    if task.key in ready:
      table[task.key] = _evaluate(this, task, ready[task.key], frozen, path)
      if jax.process_index() == 0:
        files.write_json(f"{workdir}/{task.key}/result.json", {**table[task.key], "settings": settings[task.key]})
      telemetry.log.info("%s", _line(task.key, table[task.key]))
    elif finished[task.key]:
      table[task.key] = finished[task.key]
      telemetry.log.info("%s: finished before.", task.key)
  result = {"datasets": table, "missing": missing, "checkpoint": config.checkpoint, "layer": frozen.layer}
  telemetry.log.info("%s\n%s", report(result), telemetry.write_result(workdir, result))
  return result


def report(result: dict[str, Any]) -> str:
  """Returns the table of all data sets, with the published figures beside, for people."""
  lines = [
    "transfer: test %; published: SimCLR on ImageNet, linear, ResNet-50 and ResNet-50 4x (arXiv 2002.05709, B.8)",
    f"{'data set':<24}{'metric':<16}{'test %':>8}{'balanced':>10}{'published 1x':>14}{'4x':>7}{'L2':>10}"
    f"{'classes':>9}{'test':>8}",
  ]
  lines += [_line(key, row) for key, row in result["datasets"].items()]
  lines += [f"{key:<24}missing" for key in result["missing"]]
  return "\n".join(lines)


def _line(key, row):
  published = row["published"] or ("-", "-")
  balanced = f"{100 * row['balanced_top1']:.2f}" if "balanced_top1" in row else "-"
  return (
    f"{key:<24}{METRICS[row['metric']][1]:<16}{100 * row['value']:>8.2f}{balanced:>10}"
    f"{published[0]:>14}{published[1]:>7}{row['l2']:>10.3g}{row['classes']:>9}{row['examples']['test']:>8}"
  )


def _strengths(keys: ml_collections.ConfigDict) -> np.ndarray:
  """Returns the strengths of the L2 penalty, f64[S], ascending."""
  if keys.l2_low > keys.l2_high:
    raise errors.UserError(f"config.transfer.l2_low is {keys.l2_low} and l2_high {keys.l2_high}; use a lower l2_low.")
  return np.geomspace(keys.l2_low, keys.l2_high, keys.l2_strengths)


def _finished(workdir: str, key: str, settings: dict[str, Any]) -> dict[str, Any] | None:
  """Returns the result that an earlier run with the same settings left, or None."""
  path = epath.Path(workdir) / key / "result.json"
  result = json.loads(path.read_text()) if path.exists() else {}
  return result if result.pop("settings", None) == settings else None


def _opened(
  tasks: list[transfer_sets.Task], this: experiment.Experiment
) -> tuple[dict[str, dict[str, source.Source]], dict[str, str]]:
  """Returns the splits of each data set by key, and why others are missing, of those that may be."""
  sources.check_tensorflow("tfds")
  config, ready, missing = this.config, {}, {}
  may_miss = transfer_sets.optional(config.transfer.datasets)
  for task in tasks:
    at = {"name": task.location, "data_dir": config.data.dir} if task.source == "tfds" else {"data_dir": task.location}
    request = source.Request("", max_bad_share=config.data.max_bad_share, multi_label=True, **at)
    try:
      found = sources.split_names(task.source, request)
      if this.config.data.holdout and task.source == "folder" and found == ("train",):
        images = sources.load(task.source, dataclasses.replace(request, split="train"))
        ready[task.key] = dict(zip(("train", "test"), this.divided(images), strict=True))
        continue
      names = transfer_sets.splits_of(task, found)
      parts = zip(("train", "validation", "test"), names, strict=True)
      requests = {part: dataclasses.replace(request, split=split) for part, split in parts if split}
      ready[task.key] = {part: sources.load(task.source, wanted) for part, wanted in requests.items()}
    except errors.UserError as error:
      if task.key not in may_miss:
        raise
      telemetry.log.warning("%s is left out: %s", task.key, error)
      missing[task.key] = str(error)
  return ready, missing


def _evaluate(
  this: experiment.Experiment,
  task: transfer_sets.Task,
  splits: dict[str, source.Source],
  frozen: inference.Representation,
  path: probes.L2Path,
) -> dict[str, Any]:
  """Returns what a data set's result says."""
  train = splits["train"]
  if not train.num_classes:
    raise errors.UserError(f"transfer needs labels; {train.name} has none.")
  metric = task.metric or ("map_11" if train.multi_label else "top1")
  begin, read = time.monotonic(), {}
  for part, images in splits.items():
    rows = inputs.transfer_pass(images, this.config.data.image_size, batch_size=this.config.eval_batch_size)
    found = read[part] = features.labelled(features.of_split(frozen.encode, frozen.variables, rows, this.mesh))
    features.check_finite(found.x, images.name, this.config.checkpoint)
  seconds = {"features": time.monotonic() - begin}
  if "validation" not in read:
    share = this.config.transfer.validation_share
    read["train"], read["validation"] = selection.split_off(read["train"], share, this.config.seed)
  begin = time.monotonic()
  options = {"score": METRICS[metric][0], "classes": train.num_classes, "mesh": this.mesh}
  best = selection.best_regression(task.key, **read, path=path, **options)
  seconds["regressions"] = time.monotonic() - begin
  by_strength = zip(path.l2_strengths, best.validation, strict=True)
  balanced = {} if train.multi_label else {"balanced_top1": scores.mean_per_class(best.logits, read["test"].label)}
  return {
    "metric": metric,
    "value": best.value,
    **balanced,
    "l2": float(best.l2),
    "validation": [{"l2": float(l2), "value": value} for l2, value in by_strength],
    "examples": {part: len(found.x) for part, found in read.items()},
    "classes": train.num_classes,
    "splits": {part: images.name for part, images in splits.items()},
    "published": list(task.published) if task.published else None,
    "seconds": seconds,
  }
