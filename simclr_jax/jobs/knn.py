"""knn: nearest neighbours vote on held-out images, on frozen features (Wu et al. 2018, section 3.4).

Needs --workdir and --config.checkpoint=RUN, a pretraining run (or `random`, the encoder as it is initialised); takes
its config from there unless --config is given. Nothing is trained: the k training images with the largest cosine
similarity s vote for their labels with weight exp(s / temperature). Writes `result.json`.

  --config.knn.neighbours=10,200        k's, one search for all
  --config.knn.temperatures=0.07,0.1    the first of both is the headline, eval/knn_top1
  --config.labels.fraction=0.01         only these training images vote
  --config.head.evaluate_from=1         compares outputs of a layer of the projection head in place of the encoder's h
"""

import time
from typing import Any

import ml_collections
import numpy as np

from simclr_jax import comparison, experiment, inference, numbers
from simclr_jax.evaluation import baselines, features, neighbours
from simclr_jax.training import telemetry


def run(config: ml_collections.ConfigDict, workdir: str) -> dict[str, Any]:
  """Returns (and writes to `result.json`) the held-out accuracies of every k and temperature."""
  ks = numbers.integers("config.knn.neighbours", config.knn.neighbours)
  temperatures = numbers.floats("config.knn.temperatures", config.knn.temperatures)
  this = experiment.Experiment(config, "knn", workdir)
  train, held_out = this.labelled, this.held_out
  ks = _possible(ks, train.num_examples)
  frozen = inference.representation(this)
  this.claim()

  begin = time.monotonic()
  known, test = (inference.of_split(frozen, this, images) for images in (train, held_out))
  for images, found in ((train, known), (held_out, test)):
    features.check_finite(found.x, images.name, config.checkpoint)
  seconds = {"features": time.monotonic() - begin}
  begin = time.monotonic()
  options = {"neighbours": ks, "temperatures": temperatures, "classes": train.num_classes, "mesh": this.mesh}
  table = neighbours.accuracies(known, test, **options)
  seconds["knn"] = time.monotonic() - begin
  counted = int(np.sum(test.label >= 0))
  result = {
    **{f"eval/knn_{name}": table[0][name] for name in ("top1", "balanced_top1", "top5") if name in table[0]},
    "eval/top1_interval": baselines.interval(table[0]["top1"], counted),
    "eval/examples": held_out.num_examples,
    "train/examples": train.num_examples,
    "neighbours": ks,
    "temperatures": temperatures,
    "table": table,
    "dimensions": known.x.shape[1],
    **{f"seconds/{name}": value for name, value in seconds.items()},
    "checkpoint": config.checkpoint,
    "layer": frozen.layer,
  }
  telemetry.log.info("%s", report(result))
  judge = comparison.neighbours_judge(this, train.num_classes, ks[0], temperatures[0])
  result |= comparison.of_result(this, train, held_out, judge, encoder=(frozen.encode, frozen.variables))
  telemetry.log.info("%s", telemetry.write_result(workdir, result))
  return result


def _possible(ks: list[int], examples: int) -> list[int]:
  """Returns those numbers of neighbours for which there are training images; a UserError where there is none."""
  fit = [k for k in ks if k <= examples]
  neighbours.check(fit or ks, examples)
  if len(fit) < len(ks):
    left_out = ", ".join(str(k) for k in ks if k > examples)
    telemetry.log.info("knn: %d training images are too few for %s neighbours, left out.", examples, left_out)
  return fit


def report(result: dict[str, Any]) -> str:
  """Returns the table of all k and temperatures, for people."""
  cells = {(cell["k"], cell["temperature"]): cell for cell in result["table"]}
  shown = {"top-1": "top1", "balanced": "balanced_top1", "top-5": "top5"}
  shown = {title: name for title, name in shown.items() if name in result["table"][0]}
  width = 9 * len(shown)
  lines = [
    f"knn: {' / '.join(shown)} % of {result['eval/examples']} held-out images, "
    f"{result['train/examples']} training images with {result['dimensions']} numbers each; by k and temperature",
    " " * 8 + "".join(f"{temperature:>{width}g}" for temperature in result["temperatures"]),
  ]
  for k in result["neighbours"]:
    row = [cells[k, temperature] for temperature in result["temperatures"]]
    texts = [" / ".join(f"{100 * cell[name]:.2f}" for name in shown.values()) for cell in row]
    lines.append(f"{k:>8}" + "".join(f"{text:>{width}}" for text in texts))
  lines.append("seconds: " + ", ".join(f"{part} {result[f'seconds/{part}']:.1f}" for part in ("features", "knn")))
  return "\n".join(lines)
