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

import jax
import numpy as np
from etils import epath

from simclr_jax import errors
from simclr_jax.evaluation import neighbours
from simclr_jax.jobs import feature_eval, representation, setup
from simclr_jax.training import checkpoint, telemetry

JOB = "knn"


def run(config, workdir: str) -> dict:
  """Returns (and writes to `result.json`) the held-out accuracies of every k and temperature."""
  ks = whole_numbers("knn.neighbours", config.knn.neighbours)
  temperatures = feature_eval.numbers("knn.temperatures", config.knn.temperatures)
  mesh = setup.mesh_for(config, ("eval_batch_size", config.eval_batch_size))
  train, held_out = setup.labelled_splits(config, JOB)
  neighbours.check(ks, train.num_examples)
  encode, variables = representation.load(config, mesh, job=JOB)
  checkpoint.claim_workdir(workdir, config.to_dict(), JOB, setup.FREE_KEYS)

  begin = time.monotonic()
  splits = [representation.of_split(encode, variables, config, source, mesh) for source in (train, held_out)]
  for source, (x, _) in zip((train, held_out), splits, strict=True):
    check_finite(x, source.name, config.checkpoint)
  seconds = {"features": time.monotonic() - begin}
  begin = time.monotonic()
  table = neighbours.accuracies(
    *splits[0], *splits[1], neighbours=ks, temperatures=temperatures, classes=train.num_classes, mesh=mesh
  )
  seconds["knn"] = time.monotonic() - begin
  result = {
    "eval/knn_top1": table[0]["top1"],
    "eval/knn_top5": table[0]["top5"],
    "eval/examples": held_out.num_examples,
    "train/examples": train.num_examples,
    "neighbours": ks,
    "temperatures": temperatures,
    "table": table,
    "dimensions": splits[0][0].shape[1],
    **{f"seconds/{name}": value for name, value in seconds.items()},
    "checkpoint": config.checkpoint,
    "layer": setup.layer_of(config, "evaluate_from"),
  }
  if jax.process_index() == 0:
    path = epath.Path(workdir) / "result.json"
    telemetry.write_json(path, result)
    telemetry.log.info("%s\n%s", report(result), path)
  return result


def whole_numbers(key: str, text: str) -> list[int]:
  """Returns the numbers of `text`, separated by commas, or raises a UserError about `config.<key>`."""
  words = [word.strip() for word in text.split(",")]
  if not all(word.isdecimal() and int(word) > 0 for word in words):
    raise errors.UserError(f"config.{key} is {text!r}; give whole numbers above 0 with commas between, such as 20,200.")
  return list(dict.fromkeys(map(int, words)))


def check_finite(x: np.ndarray, name: str, source: str) -> None:
  """Raises a UserError if features f[N, D] of the split `name` are not all numbers."""
  # The sum of a row is not finite if a part of it is not, and takes no memory of the size of x.
  bad = np.count_nonzero(~np.isfinite(x.sum(axis=1, dtype=np.float64)))
  if bad:
    raise errors.UserError(
      f"{bad} of {len(x)} features of {name} are not numbers; checkpoint {source} has diverged, take an earlier one."
    )


def report(result: dict) -> str:
  """Returns the table of all k and temperatures, for people."""
  cells = {(cell["k"], cell["temperature"]): cell for cell in result["table"]}
  lines = [
    f"{JOB}: top-1 / top-5 % of {result['eval/examples']} held-out images, {result['train/examples']} training images "
    f"with {result['dimensions']} numbers each; by k and temperature",
    " " * 8 + "".join(f"{temperature:>16g}" for temperature in result["temperatures"]),
  ]
  for k in result["neighbours"]:
    row = [cells[k, temperature] for temperature in result["temperatures"]]
    lines.append(f"{k:>8}" + "".join(f"{100 * cell['top1']:>8.2f} /{100 * cell['top5']:>6.2f}" for cell in row))
  lines.append("seconds: " + ", ".join(f"{part} {result[f'seconds/{part}']:.1f}" for part in ("features", "knn")))
  return "\n".join(lines)
