"""feature_eval: linear evaluation at the speed of one pass over the images; linear_eval with protocol = "features".

Features of both splits are computed once. A grid of learning rates and weight decays and a path of L2 strengths are
trained on them, a part of the training images held back chooses one of each, and these two, trained again on all
training images, count the held-out split once. Writes `result.json`.
"""

import json
import math
import time

import jax
import numpy as np
from etils import epath

from simclr_jax import errors
from simclr_jax.evaluation import features as evaluation
from simclr_jax.evaluation import probes
from simclr_jax.jobs import feed, representation, setup
from simclr_jax.training import checkpoint, telemetry

JOB = "linear_eval"


def run(config, workdir: str) -> dict:
  """Returns (and writes to `result.json`) held-out accuracies of the classifiers that a validation share chose."""
  keys = config.probes
  rates = numbers("probes.learning_rates", keys.learning_rates)
  decays = numbers("probes.weight_decays", keys.weight_decays, zero=True)
  strengths = numbers("probes.l2_strengths", keys.l2_strengths)
  if keys.passes < 1 or keys.epochs < 1 or keys.lbfgs_steps < 1:
    raise errors.UserError(
      f"config.probes has passes {keys.passes}, epochs {keys.epochs}, lbfgs_steps {keys.lbfgs_steps}; use 1 or more."
    )
  if not 0 < keys.validation_share < 1:
    raise errors.UserError(f"config.probes.validation_share is {keys.validation_share}; use a share such as 0.1.")
  mesh = setup.mesh_for(config, ("probes.batch_size", keys.batch_size), ("eval_batch_size", config.eval_batch_size))
  train, held_out = setup.labelled_splits(config, JOB)
  train_rows, choice_rows = probes.held_back(train.num_examples, keys.validation_share, config.seed)
  if len(train_rows) * keys.passes < keys.batch_size:
    raise errors.UserError(
      f"{len(train_rows)} training images beside the validation share cannot fill a batch of "
      f"config.probes.batch_size = {keys.batch_size}; choose a smaller one."
    )
  encode, variables = representation.load(config, mesh, job=JOB)
  checkpoint.claim_workdir(workdir, config.to_dict(), JOB, setup.FREE_KEYS)

  begin = time.monotonic()
  passes = [setup.evaluation_rows(config, train)()]
  passes += [feed.augmented_rows(config, train, number) for number in range(1, keys.passes)]
  x, y = _features(encode, variables, passes, mesh)
  test_x, test_y = evaluation.features(encode, variables, setup.evaluation_rows(config, held_out)(), mesh)
  seconds = {"features": time.monotonic() - begin}
  telemetry.log.info(
    "%s: %d + %d features of %d numbers in %.1f s", JOB, x.shape[0] * x.shape[1], *test_x.shape, seconds["features"]
  )

  split = (x[:, train_rows], y[train_rows]), (x[0, choice_rows], y[choice_rows])
  whole = (x, y), (test_x, test_y)
  grid = {"epochs": keys.epochs, "batch_size": keys.batch_size, "seed": config.seed, "mesh": mesh}
  grid["classes"] = train.num_classes
  begin = time.monotonic()
  sgd, rate, decay, table = _chosen_of_grid(split, whole, rates, decays, grid)
  seconds["grid"] = time.monotonic() - begin
  begin = time.monotonic()
  search = {"max_steps": keys.lbfgs_steps, "tolerance": keys.lbfgs_tolerance, "mesh": mesh}
  search["classes"] = train.num_classes
  lbfgs, strength, by_strength = _chosen_of_path(split, whole, strengths, search)
  seconds["lbfgs"] = time.monotonic() - begin
  result = {
    "eval/top1": sgd["top1"],
    "eval/top5": sgd["top5"],
    "eval/lbfgs_top1": lbfgs["top1"],
    "eval/lbfgs_top5": lbfgs["top5"],
    "eval/examples": len(test_y),
    "learning_rate": rate,
    "weight_decay": decay,
    "l2_strength": strength,
    "validation/top1": [
      {"learning_rate": rate, "weight_decay": decay, "top1": float(table[row, column])}
      for row, rate in enumerate(rates)
      for column, decay in enumerate(decays)
    ],
    "validation/lbfgs_top1": [
      {"l2_strength": s, "top1": float(top1)} for s, top1 in zip(strengths, by_strength, strict=True)
    ],
    "validation/examples": len(choice_rows),
    **{f"seconds/{name}": value for name, value in seconds.items()},
    "passes": keys.passes,
    "train_examples": train.num_examples,
    "layer": setup.layer_of(config, "evaluate_from"),
    "protocol": "features",
    "checkpoint": config.checkpoint,
  }
  if jax.process_index() == 0:
    path = epath.Path(workdir) / "result.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    telemetry.log.info("%s", report(result, str(path)))
  return result


def numbers(key: str, text: str, *, zero: bool = False) -> list[float]:
  """Returns the numbers of `text`, separated by commas, or raises a UserError about `config.<key>`.

  Args:
    key: of the config.
    text: such as "0.1,1e-3"; finite and positive.
    zero: whether 0 is allowed too.
  """
  try:
    values = [float(word) for word in text.split(",")]
  except ValueError:
    values = []
  if not values or not all(math.isfinite(value) and (value > 0 or zero and value == 0) for value in values):
    least = "0 or more" if zero else "above 0"
    raise errors.UserError(f"config.{key} is {text!r}; give numbers {least} with commas between, such as 1e-4,1e-3.")
  return values


def report(result: dict, path: str) -> str:
  """Returns the validation table and the held-out accuracies, for people."""
  cells = {(cell["learning_rate"], cell["weight_decay"]): cell["top1"] for cell in result["validation/top1"]}
  rates, decays = (list(dict.fromkeys(axis)) for axis in zip(*cells, strict=True))
  lines = [
    f"{JOB}: top-1 % of {result['validation/examples']} validation images by learning rate and weight decay",
    " " * 10 + "".join(f"{decay:>9g}" for decay in decays),
  ]
  lines += [f"{rate:>10g}" + "".join(f"{100 * cells[rate, decay]:>9.2f}" for decay in decays) for rate in rates]
  lines += [
    "logistic regression, by L2 strength: "
    + ", ".join(f"{cell['l2_strength']:g}: {100 * cell['top1']:.2f}" for cell in result["validation/lbfgs_top1"]),
    f"of {result['eval/examples']} held-out images: "
    f"top-1 {100 * result['eval/top1']:.2f} %, top-5 {100 * result['eval/top5']:.2f} % "
    f"(learning rate {result['learning_rate']:g}, weight decay {result['weight_decay']:g}); "
    f"logistic regression {100 * result['eval/lbfgs_top1']:.2f} %, {100 * result['eval/lbfgs_top5']:.2f} % "
    f"(L2 strength {result['l2_strength']:g})",
    "seconds: " + ", ".join(f"{part} {result[f'seconds/{part}']:.1f}" for part in ("features", "grid", "lbfgs")),
    path,
  ]
  return "\n".join(lines)


def _features(encode, variables, passes, mesh):
  """Returns f32[passes, N, D] and label i32[N]."""
  parts = [evaluation.features(encode, variables, batches, mesh) for batches in passes]
  return np.stack([x for x, _ in parts]), parts[0][1]


def _rows(x, y):
  """Returns f32[passes * N, D] and i32[passes * N]."""
  return x.reshape(-1, x.shape[-1]), np.tile(y, len(x))


def _chosen_of_grid(split, whole, rates, decays, keys):
  """Returns held-out accuracies, learning rate and weight decay of the best on the validation share, and the table."""
  mesh = keys["mesh"]
  trained = probes.train_grid(*_rows(*split[0]), learning_rates=rates, weight_decays=decays, **keys)
  table = probes.accuracies(trained, *split[1], mesh=mesh)["top1"]
  # Of equals the first: the smaller rate and decay, as one would list them.
  row, column = np.unravel_index(np.argmax(table), table.shape)
  rate, decay = rates[row], decays[column]
  again = probes.train_grid(*_rows(*whole[0]), learning_rates=[rate], weight_decays=[decay], **keys)
  counted = probes.accuracies(again, *whole[1], mesh=mesh)
  return {name: float(value[0, 0]) for name, value in counted.items()}, rate, decay, table


def _chosen_of_path(split, whole, strengths, keys):
  """Returns held-out accuracies and strength of the best on the validation share, and each one's accuracy there."""
  mesh = keys["mesh"]

  def fit(part, strengths):
    (x, y), (other_x, other_y) = _rows(*part[0]), part[1]
    x, other_x = probes.standardise(x, other_x)
    trained, ended = probes.logistic_regression(x, y, l2_strengths=strengths, **keys)
    for strength, steps, gradient in zip(strengths, ended["steps"], ended["gradient"], strict=True):
      if not gradient <= keys["tolerance"]:
        telemetry.log.warning(
          "logistic regression, L2 strength %g: stopped after %d steps with gradient %.2g, above tolerance %g.",
          *(strength, steps, gradient, keys["tolerance"]),
        )
    return probes.accuracies(trained, other_x, other_y, mesh=mesh)

  by_strength = fit(split, strengths)["top1"]
  strength = strengths[int(np.argmax(by_strength))]
  counted = fit(whole, [strength])
  return {name: float(value[0]) for name, value in counted.items()}, strength, by_strength
