"""step: a whole training step on small images, ours against plain Flax layers and PyTorch, in turns."""

import contextlib
import importlib.util

import jax
import numpy as np

from benchmarks import loss, measure, plain
from simclr_jax import __main__ as command
from simclr_jax.hardware import sharding
from simclr_jax.jobs import pretrain, setup
from simclr_jax.models import simclr
from simclr_jax.training import state as state_lib

IMAGES = 64
EXAMPLES = 50_000
# The recipe of CIFAR-10 with the loss that the others have, and without a classifier beside it.
OVERRIDES = {
  "loss.temperature": str(loss.TEMPERATURE),
  "head.out_dim": str(loss.DIM),
  "head.online": "false",
  "batch_size": str(IMAGES),
}


def config_of(overrides: dict[str, str]):
  """Returns configs/cifar10.py with some keys changed."""
  return command.load_config(str(command.ROOT / "configs" / "cifar10.py"), overrides)


def run(overrides: dict[str, str] | None = None, rounds: int = measure.ROUNDS) -> dict:
  """Prints and returns seconds of a step, forward, loss, gradients and LARS, in float32 on one device.

  Args:
    overrides: of the config, for a smaller network.
    rounds: of which the medians are taken.
  """
  config = config_of({**OVERRIDES, **(overrides or {})})
  mesh = pretrain.mesh_of(config, jax.devices()[:1])
  model, tx, schedule, _ = pretrain.parts_of(config, examples=EXAMPLES, classes=0)
  params, batch_stats = state_lib.variables(model, config.data.image_size, config.seed, mesh)
  # Copies, because the state of ours is donated.
  other = jax.device_put(jax.device_get((params, batch_stats, tx.init(params))), jax.devices()[0])
  state = state_lib.create(params, batch_stats, tx)
  flops = pretrain.step_flops(config, pretrain.forward_flops(config, model, state))
  views = np.random.default_rng(0).random((config.batch_size, 2, *[config.data.image_size] * 2, 3), np.float32)
  batch = {"views": views, "label": np.zeros(config.batch_size, np.int32)}
  batch = sharding.global_batch(mesh, batch)
  ours = setup.jitted(pretrain.step_of(config, model, tx, schedule, mesh, lambda rows: rows), mesh, state)
  network = simclr.SimCLR(plain.ResNet(config.model.depth, config.model.width), setup.projection_head_of(config))
  contestants = {
    "ours": _again(ours, state, batch),
    "plain_flax": _again(plain.step_of(network, tx), other, jax.device_put(views, jax.devices()[0])),
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


def torch_keys(config) -> dict:
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


def config_keys(config) -> dict:
  """Returns the arguments of `pytorch_trainer`, which a process can be sent."""
  return {"keys": torch_keys(config), "images": config.batch_size, "size": config.data.image_size, "compiled": False}


def pytorch_trainer(keys: dict):
  """Returns `pytorch.trainer`, imported where it is called."""
  from benchmarks import pytorch

  return pytorch.trainer(**keys)
