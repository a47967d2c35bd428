"""cifar: ResNet-18 on resident CIFAR-10 from the first step to kNN and linear accuracy, by the clock."""

import datetime
import time
from typing import Any

import jax
from etils import epath

from benchmarks import measure, step
from simclr_jax import inference
from simclr_jax.evaluation import features, neighbours
from simclr_jax.jobs import linear_eval, pretrain

NEIGHBOURS, TEMPERATURE = 200, 0.1
# lightly's own figures for 200 epochs with batches of 512, from its documentation.
PUBLISHED = {"minutes": 87.1, "knn_top1": 0.848}
OVERRIDES = {
  "data.source": "arrays",
  "data.resident": True,
  "model.dtype": "bfloat16",
  "augment.dtype": "bfloat16",
  "evaluate_every_epochs": 0.0,
  "checkpoint_every_epochs": 50.0,
  "linear_eval.protocol": "features",
}
SMALL = {
  "data.source": "shapes",
  "data.examples": 96,
  "data.image_size": 16,
  "batch_size": 16,
  "eval_batch_size": 32,
  "model.dtype": "float32",
  "augment.dtype": "float32",
  "model.depth": 10,
  "model.width": 0.0625,
  "head.out_dim": 8,
  "probes.learning_rates": "0.1",
  "probes.weight_decays": "0.0",
  "probes.l2_strengths": "1e-2",
  "probes.epochs": 1,
  "probes.batch_size": 16,
  "probes.lbfgs_steps": 20,
  "monitor.knn_images": 0,
  "monitor.pairs": 0,
}


def run(workdir: str, *, npz: str, epochs: float, steps: int, small: bool) -> dict:
  """Prints and returns wall clock and accuracies of a run of its own in `workdir`.

  Args:
    workdir: where the run gets a folder.
    npz: CIFAR-10 in one file, see `arrays.from_mapping`; "" leaves this out, unless `small`.
    epochs: of pretraining.
    steps: above 0, in place of epochs.
    small: whether a tiny network on the built-in shapes stands for it, to try the command itself.
  """
  if not npz and not small:
    reason = "cifar is left out: no --npz=FILE with CIFAR-10's train and test images"
    measure.say(reason)
    return {"left_out": reason}
  overrides = {**OVERRIDES, "total_epochs": epochs, "total_steps": steps, "data.dir": npz}
  # A new folder: a finished run would be continued and take no time.
  folder = epath.Path(workdir) / f"cifar_{datetime.datetime.now():%Y%m%dT%H%M%S}"
  result = measure.alone(train_and_evaluate, {**overrides, **(SMALL if small else {})}, str(folder))
  minutes = result["seconds"]["pretrain"] / 60
  ratio = {"of_published_minutes": minutes / PUBLISHED["minutes"]} if result["epochs"] >= 200 and not small else {}
  measure.say(
    f"{minutes:.1f} minutes for {result['epochs']:.3g} epochs on one {result['device']}"
    + "".join(f", {value:.3f} of lightly's published {PUBLISHED['minutes']}" for value in ratio.values())
    + f"; kNN {result['knn_top1']:.2%} (lightly {PUBLISHED['knn_top1']:.1%}), linear {result['linear_top1']:.2%}, "
    f"logistic regression {result['lbfgs_top1']:.2%}; images: {npz or 'the built-in shapes'}"
  )
  accuracies = {key: result[key] for key in ("knn_top1", "linear_top1", "lbfgs_top1", "epochs", "device")}
  return {**result, "published": PUBLISHED, "headline": {**ratio, "pretrain_minutes": minutes, **accuracies}}


def train_and_evaluate(overrides: dict[str, Any], workdir: str) -> dict:
  """Returns seconds and held-out accuracies of pretraining, kNN and linear evaluation.

  Args:
    overrides: of configs/cifar10.py.
    workdir: of the runs.
  """
  this = step.experiment_of(overrides)
  config = this.config
  folder = epath.Path(workdir)
  seconds = {}
  begin = time.monotonic()
  pretrain.run(config, str(folder / "pretrain"))
  seconds["pretrain"] = time.monotonic() - begin
  config.checkpoint = str(folder / "pretrain")

  begin = time.monotonic()
  train, held_out = this.train, this.held_out
  encode, _ = inference.load_encoder(config.checkpoint)
  known, test = (features.Features(encode(images.images), images.labels()) for images in (train, held_out))
  (found,) = neighbours.accuracies(
    known,
    test,
    neighbours=[min(NEIGHBOURS, train.num_examples)],
    temperatures=[TEMPERATURE],
    classes=train.num_classes,
  )
  seconds["knn"] = time.monotonic() - begin
  begin = time.monotonic()
  linear = linear_eval.run(config, str(folder / "linear"))
  seconds["linear"] = time.monotonic() - begin
  steps = this.optimizer(train.num_examples).total_steps
  return {
    "seconds": seconds,
    "knn_top1": found["top1"],
    "linear_top1": linear["eval/top1"],
    "lbfgs_top1": linear["eval/lbfgs_top1"],
    "epochs": steps * config.batch_size / train.num_examples,
    "steps": steps,
    "data": train.name,
    "device": jax.devices()[0].device_kind,
    "overrides": overrides,
  }
