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
import importlib.util
import json
import time

import jax
import numpy as np
from etils import epath

from simclr_jax import errors
from simclr_jax.evaluation import features as evaluation
from simclr_jax.evaluation import probes, scores
from simclr_jax.jobs import knn, representation, setup, transfer_sets
from simclr_jax.training import checkpoint, telemetry

JOB = "transfer"
METRICS = {
  "top1": (scores.top1, "top-1"),
  "mean_per_class": (scores.mean_per_class, "mean per class"),
  "map_11": (scores.mean_average_precision, "11-point mAP"),
}


def run(config, workdir: str) -> dict:
  """Returns (and writes to `result.json`) the test scores of every data set."""
  keys = config.transfer
  strengths = _strengths(keys)
  tasks = transfer_sets.chosen(keys.datasets, config.data.dir)
  mesh = setup.mesh_for(config, ("eval_batch_size", config.eval_batch_size))
  encode, variables = representation.load(config, mesh, job=JOB)
  checkpoint.claim_workdir(workdir, config.to_dict(), JOB, (*setup.FREE_KEYS, "transfer.datasets"))

  step = config.checkpoint if config.checkpoint == setup.RANDOM else str(checkpoint.find(config.checkpoint))
  settings = {task.key: json.loads(json.dumps({**dataclasses.asdict(task), "checkpoint": step})) for task in tasks}
  finished = {task.key: _finished(workdir, task.key, settings[task.key]) for task in tasks}
  # All are opened before the first is computed, so that a mistake in the last one's name is found now.
  ready, missing = _opened([task for task in tasks if not finished[task.key]], config)
  if len(missing) == len(tasks):
    raise errors.UserError(f"none of the {len(tasks)} data sets is there; {next(iter(missing.values()))}")
  table = {}
  for task in tasks:
    if task.key in ready:
      result = _evaluate(task, ready[task.key], encode, variables, config, strengths, mesh)
      if jax.process_index() == 0:
        telemetry.write_json(f"{workdir}/{task.key}/result.json", {**result, "settings": settings[task.key]})
        telemetry.log.info("%s", _line(task.key, result))
    elif finished[task.key]:
      telemetry.log.info("%s: finished before.", task.key)
      result = finished[task.key]
    else:
      continue
    table[task.key] = result
  result = {
    "datasets": table,
    "missing": missing,
    "checkpoint": config.checkpoint,
    "layer": setup.layer_of(config, "evaluate_from"),
  }
  if jax.process_index() == 0:
    path = epath.Path(workdir) / "result.json"
    telemetry.write_json(path, result)
    telemetry.log.info("%s\n%s", report(result), path)
  return result


def report(result: dict) -> str:
  """Returns the table of all data sets, with the published figures beside, for people."""
  lines = [
    f"{JOB}: test %; published: SimCLR on ImageNet, linear, ResNet-50 and ResNet-50 4x (arXiv 2002.05709, B.8)",
    f"{'data set':<24}{'metric':<16}{'test %':>8}{'published 1x':>14}{'4x':>7}{'L2':>10}{'classes':>9}{'test':>8}",
  ]
  lines += [_line(key, row) for key, row in result["datasets"].items()]
  lines += [f"{key:<24}missing" for key in result["missing"]]
  return "\n".join(lines)


def _line(key, row):
  published = row["published"] or ("-", "-")
  return (
    f"{key:<24}{METRICS[row['metric']][1]:<16}{100 * row['value']:>8.2f}{published[0]:>14}{published[1]:>7}"
    f"{row['l2']:>10.3g}{row['classes']:>9}{row['examples']['test']:>8}"
  )


def _strengths(keys):
  """Returns the strengths of the L2 penalty, f64[S], ascending."""
  if not (keys.l2_strengths >= 1 and 0 < keys.l2_low <= keys.l2_high and keys.lbfgs_steps >= 1):
    raise errors.UserError(
      f"config.transfer has l2_strengths {keys.l2_strengths} from l2_low {keys.l2_low} to l2_high {keys.l2_high} and "
      f"lbfgs_steps {keys.lbfgs_steps}; use 1 or more of both, and 0 < l2_low <= l2_high."
    )
  if not 0 < keys.validation_share < 1:
    raise errors.UserError(f"config.transfer.validation_share is {keys.validation_share}; use a share such as 0.2.")
  return np.geomspace(keys.l2_low, keys.l2_high, keys.l2_strengths)


def _finished(workdir, key, settings):
  """Returns the result that an earlier run with the same settings left, or None."""
  path = epath.Path(workdir) / key / "result.json"
  result = json.loads(path.read_text()) if path.exists() else {}
  return (
    {name: value for name, value in result.items() if name != "settings"}
    if result.get("settings") == settings
    else None
  )


def _opened(tasks, config):
  """Returns the splits of each data set by key, and why others are missing, of those that may be."""
  if importlib.util.find_spec("tensorflow") is None:
    raise errors.UserError(f"{JOB} reads its data sets by TensorFlow, which is not installed; install it.")
  from simclr_jax.data import sources

  ready, missing = {}, {}
  may_miss = transfer_sets.optional(config.transfer.datasets)
  for task in tasks:
    where = (
      {"name": task.location, "data_dir": config.data.dir} if task.source == "tfds" else {"data_dir": task.location}
    )
    try:
      names = transfer_sets.splits_of(task, sources.split_names(task.source, **where))
      ready[task.key] = {
        part: sources.load(task.source, split=split, max_bad_share=config.data.max_bad_share, multi_label=True, **where)
        for part, split in zip(("train", "validation", "test"), names, strict=True)
        if split
      }
    except errors.UserError as error:
      if task.key not in may_miss:
        raise
      telemetry.log.warning("%s is left out: %s", task.key, error)
      missing[task.key] = str(error)
  return ready, missing


def _evaluate(task, splits, encode, variables, config, strengths, mesh):
  """Returns what a data set's result says."""
  train_source = splits["train"]
  if not train_source.num_classes:
    raise errors.UserError(f"{JOB} needs labels; {train_source.name} has none.")
  metric = task.metric or ("map_11" if train_source.multi_label else "top1")
  score = METRICS[metric][0]
  begin = time.monotonic()
  read = {part: _features(encode, variables, source, config, mesh) for part, source in splits.items()}
  seconds = {"features": time.monotonic() - begin}
  if "validation" not in read:
    x, y = read["train"]
    rows = probes.held_back(len(x), config.transfer.validation_share, config.seed)
    read["train"], read["validation"] = ((x[part], y[part]) for part in rows)
  begin = time.monotonic()

  def scored(train, held_out, l2):
    """Returns the scores of the regressions of penalties l2 (on sums over images) on held-out images."""
    (x, y), (other_x, other_y) = train, held_out
    x, other_x, scale = _conditioned(x, other_x)
    strengths = [value / (len(x) * scale**2) for value in l2]
    trained = _regressions(task.key, x, y, strengths, train_source.num_classes, config.transfer, mesh)
    return [score(logits, other_y) for logits in probes.logits(trained, other_x, mesh=mesh)]

  by_strength = scored(read["train"], read["validation"], strengths)
  # Of equals the strongest penalty.
  best = len(strengths) - 1 - int(np.argmax(by_strength[::-1]))
  both = tuple(np.concatenate(arrays) for arrays in zip(read["train"], read["validation"], strict=True))
  (value,) = scored(both, read["test"], strengths[[best]])
  seconds["regressions"] = time.monotonic() - begin
  return {
    "metric": metric,
    "value": value,
    "l2": float(strengths[best]),
    "validation": [{"l2": float(l2), "value": value} for l2, value in zip(strengths, by_strength, strict=True)],
    "examples": {part: len(x) for part, (x, _) in read.items()},
    "classes": train_source.num_classes,
    "splits": {part: source.name for part, source in splits.items()},
    "published": list(task.published) if task.published else None,
    "seconds": seconds,
  }


def _conditioned(x, *others):
  """Returns features with the mean of x taken off, all divided by one number, and that number.

  The same regressions in other coordinates, which L-BFGS finds in a tenth of the steps: the bias, which is free, takes
  up the mean, and a penalty divided by the number's square the number.

  Args:
    x: f[N, D].
    others: f[M, D] each.
  """
  columns = np.array_split(x, -(-x.shape[1] // 64), axis=1)  # Sums in float64 without a copy of x in float64.
  mean, variance = (
    np.concatenate([of(part, axis=0, dtype=np.float64) for part in columns]) for of in (np.mean, np.var)
  )
  scale = float(np.sqrt(np.mean(variance))) or 1.0
  return *((part - mean.astype(x.dtype)) / x.dtype.type(scale) for part in (x, *others)), scale


def _features(encode, variables, source, config, mesh):
  """Returns f32[N, D] and label, i32[N] or i32[N, K], of a whole split."""
  from simclr_jax.data import host_augment, pipeline

  view = lambda content, seed: {"image": host_augment.transfer_view(content, size=config.data.image_size)}
  rows = pipeline.evaluation_batches(
    source,
    view,
    batch_size=config.eval_batch_size,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
  )
  x, y = evaluation.features(encode, variables, rows, mesh)
  knn.check_finite(x, source.name, config.checkpoint)
  if y.ndim == 1 and np.any(y < 0):
    raise errors.UserError(
      f"{np.sum(y < 0)} of {len(y)} images of {source.name} have no label; name other splits, as "
      "NAME:TRAIN:VALIDATION:TEST."
    )
  return x, y


def _regressions(key, x, y, strengths, classes, keys, mesh):
  """Returns the logistic regressions of mean-form strengths, and says so where a search did not end."""
  trained, ended = probes.logistic_regression(
    *(x, y),
    classes=classes,
    l2_strengths=strengths,
    max_steps=keys.lbfgs_steps,
    tolerance=keys.lbfgs_tolerance,
    mesh=mesh,
  )
  far = ~(ended["gradient"] <= keys.lbfgs_tolerance)
  if np.any(far):
    telemetry.log.warning(
      "%s: %d of %d searches stopped after up to %d steps with gradients up to %.2g, above tolerance %g.",
      *(key, np.sum(far), len(far), np.max(ended["steps"]), np.max(ended["gradient"]), keys.lbfgs_tolerance),
    )
  return trained
