"""step: a whole training step on small images, ours against plain Flax layers and PyTorch, in turns."""

import contextlib
import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import ml_collections
import numpy as np

from benchmarks import loss, measure, plain
from simclr_jax import config as config_lib
from simclr_jax import experiment
from simclr_jax.data import inputs
from simclr_jax.hardware import sharding
from simclr_jax.models import simclr
from simclr_jax.training import objectives

IMAGES = 64
EXAMPLES = 50_000
# The recipe of CIFAR-10 with the loss of the other contestants, and without the online classifier.
OVERRIDES = {
  "loss.temperature": loss.TEMPERATURE,
  "head.out_dim": loss.DIM,
  "head.online": False,
  "batch_size": IMAGES,
}


def experiment_of(overrides: dict[str, Any]) -> experiment.Experiment:
  """Returns pretraining by configs/cifar10.py with some keys changed, on the first device."""
  return experiment.Experiment(config_lib.load("cifar10", overrides), "pretrain", devices=jax.devices()[:1])


def run(overrides: dict[str, Any] | None = None, rounds: int = measure.ROUNDS) -> dict:
  """Prints and returns seconds of a step, forward, loss, gradients and LARS, in float32 on one device.

  Args:
    overrides: of the config, for a smaller network.
    rounds: of which the medians are taken.
  """
  this = experiment_of({**OVERRIDES, **(overrides or {})})
  config, parts = this.config, this.network
  model, optimizer = parts.pretraining_model(classes=0), this.optimizer(EXAMPLES)
  state = this.state(model, optimizer.tx)
  # A copy, because our step donates its state.
  held = jax.device_get((state.params, state.batch_stats, state.opt_state))
  other = jax.device_put(held, jax.devices()[0])
  flops = parts.step_flops(parts.forward_flops(model, state))
  views = np.random.default_rng(0).random((config.batch_size, 2, *[config.data.image_size] * 2, 3), np.float32)
  batch = {"views": views, "label": np.zeros(config.batch_size, np.int32)}
  batch = sharding.global_batch(this.mesh, batch)
  ours = inputs.jit_step(this.step(this.contrastive(model, objectives.as_it_is), optimizer), this.mesh, state)
  network = simclr.SimCLR(plain.ResNet(config.model.depth, config.model.width), parts.projection_head())
  contestants = {
    "ours": _again(ours, state, batch),
    "plain_flax": _again(plain.step_of(network, optimizer.tx), other, jax.device_put(views, jax.devices()[0])),
  }
  measure.say(
    f"seconds of a step: ResNet-{config.model.depth}, {2 * config.batch_size} views of {config.data.image_size} "
    f"pixels, float32, one {jax.devices()[0].device_kind}\n\n{'of plain':>9}{'of torch':>9}{'seconds':>9}{'GFLOP/s':>9}"
  )
  with contextlib.ExitStack() as stack:
    left_out = _with_pytorch(stack, contestants, config)
    found = measure.interleaved(contestants, rounds)
  seconds = measure.medians(found)
  ratios = {
    name: {f"of_{other}": value / seconds[other] for other in ("plain_flax", "pytorch") if other in seconds}
    for name, value in seconds.items()
  }
  for name, value in seconds.items():
    shown = "".join(
      f"{ratios[name][key]:>9.2f}" if key in ratios[name] else f"{'-':>9}" for key in ("of_plain_flax", "of_pytorch")
    )
    measure.say(f"{shown}{value:>9.3f}{flops / value / 1e9:>9.0f}  {name}")
  if left_out:
    measure.say(left_out)
  headline = {f"ours_{key}": value for key, value in ratios["ours"].items()}
  headline |= {f"{name}_seconds": value for name, value in seconds.items()}
  result = {"seconds": seconds, "ratios": ratios, "rounds": found, "flops": flops, "views": 2 * config.batch_size}
  return {**result, **({"left_out": left_out} if left_out else {}), "headline": headline}


def torch_keys(config: ml_collections.ConfigDict) -> dict:
  """Returns what `pytorch.network` takes, for the same network."""
  model = {"depth": config.model.depth, "width": config.model.width, "small_images": config.model.small_images}
  return {**model, "layers": config.head.layers, "out_dim": config.head.out_dim}


def _again(step_fn, state, batch):
  """Returns a function that takes one step further and returns its seconds."""
  held = [state]

  def once():
    def step():
      held[0], out = step_fn(held[0], batch)
      jax.block_until_ready((held[0], out))

    return measure.once(step)

  return once


def _with_pytorch(stack, contestants, config) -> str:
  """Adds PyTorch, in a process of its own, and returns ""; or why it cannot take part."""
  if importlib.util.find_spec("torch") is None:
    return "PyTorch is left out: it is not installed; `pip install -e '.[bench]'` brings it."
  if jax.default_backend() != "cpu":
    return "PyTorch is left out: beside an accelerator, bench --gpu compares the two."
  try:
    run_steps = stack.enter_context(measure.in_a_process(pytorch_trainer, config_keys(config)))
  except ImportError as error:
    return f"PyTorch is left out: it cannot be imported: {error}"
  contestants["pytorch"] = lambda: run_steps(1)["seconds"]
  return ""


def config_keys(config: ml_collections.ConfigDict) -> dict:
  """Returns the arguments of `pytorch_trainer`; they can be pickled."""
  return {"keys": torch_keys(config), "images": config.batch_size, "size": config.data.image_size, "compiled": False}


def pytorch_trainer(keys: dict) -> Callable[[int], dict]:
  """Returns `pytorch.trainer`, imported late because PyTorch need not be installed."""
  from benchmarks import pytorch

  return pytorch.trainer(**keys)
