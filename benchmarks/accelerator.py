"""accelerator: ResNet-50 at 224 in bfloat16, views/s and MFU, against PyTorch on the same card."""

import contextlib
import importlib.util
import statistics
import time
from collections.abc import Sequence
from concurrent import futures
from typing import Any

import jax
import numpy as np

from benchmarks import measure, step
from simclr_jax import config as config_lib
from simclr_jax import errors, experiment
from simclr_jax.data import inputs
from simclr_jax.hardware import chips, sharding
from simclr_jax.training import objectives

BATCHES = (512, 384, 256, 128, 64)
STEPS = 20
EXAMPLES = 1_281_167
# Variants: (input, model.remat). The first two are PyTorch's case, which takes ready-made views.
VARIANTS = (("views", "none"), ("views", "convs"), ("pairs", "none"), ("pairs", "convs"))
SMALL_VARIANTS = (("views", "none"), ("pairs", "convs"))
REAL = (("real", "none"), ("real", "convs"))
INPUTS = {
  "views": "ready-made views",
  "pairs": "ready-made uint8 pairs, colours and blur in the step",
  "real": "JPEGs from the disk, colours and blur in the step",
}
OVERRIDES = {"augment.dtype": "bfloat16", "head.online": False}
SMALL = {"model.depth": 10, "model.width": 0.0625, "data.image_size": 32}
# Contestants run one after the other, so each may take the whole card.
ENVIRONMENT = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"}


def run(*, data_dir: str, batches: Sequence[int], small: bool, rounds: int) -> dict:
  """Prints and returns the rates at the largest of some batch sizes that fits ours and PyTorch's step.

  Args:
    data_dir: TFDS folder with imagenet2012 for the steps on real images; "" leaves them out.
    batches: images of a batch, to be tried from the largest.
    small: whether a tiny network stands for ResNet-50, to try the command itself.
    rounds: of which the medians are taken.
  """
  overrides = {**OVERRIDES, **(SMALL if small else {})}
  steps, variants = (2, SMALL_VARIANTS) if small else (STEPS, VARIANTS)
  for batch in sorted(batches, reverse=True):
    overrides["batch_size"] = batch
    ours = measure.alone(rates, overrides, variants, rounds, steps, environment=ENVIRONMENT)
    theirs, left_out = _pytorch(overrides, rounds, steps, compiled=not small)
    ready = [row for row in ours["rows"] if row["input"] == "views" and "seconds" in row]
    if ready and (left_out or "seconds" in theirs):
      break
    measure.say(f"a batch of {batch} images does not fit both")
  else:
    tried = ", ".join(map(str, batches))
    raise errors.UserError(f"none of the batches {tried} fits the card; give smaller ones with --batches=32,16.")
  rows = ours["rows"] + ([] if left_out else [theirs])
  if data_dir and importlib.util.find_spec("tensorflow"):
    real = {**overrides, "data.dir": data_dir}
    rows += measure.alone(rates, real, REAL, rounds, steps, environment=ENVIRONMENT)["rows"]
  else:
    measure.say("real input is left out: " + ("TensorFlow is not installed" if data_dir else "no --data_dir"))
  for row in rows:
    _complete(row, ours, theirs)
  measure.say(
    f"a SimCLR step: ResNet-{ours['depth']} at {ours['size']}, bfloat16, one {ours['device']}\n\n"
    f"{'of torch':>9}{'views/s':>10}{'MFU':>7}{'batch':>7}"
  )
  for row in rows:
    measure.say(_line(row))
  if left_out:
    measure.say(left_out)
  result = {**ours, "rows": rows, **({"left_out": left_out} if left_out else {})}
  return {**result, "headline": _headline(rows, ours)}


def rates(overrides: dict[str, Any], variants: Sequence[tuple[str, str]], rounds: int, steps: int) -> dict:
  """Returns a row for each variant of our step on one device of this process; one that does not fit says so.

  Args:
    overrides: of configs/imagenet.py:v1.
    variants: of `VARIANTS` and `REAL`.
    rounds: of which the median is taken.
    steps: of a round.
  """
  rows = []
  for source, remat in variants:
    row = {"name": "ours", "input": source, "remat": remat}
    config = config_lib.load("imagenet:v1", {**overrides, "model.remat": remat})
    try:
      measured = _rates_of(config, source, rounds, steps)
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
      if "RESOURCE_EXHAUSTED" not in str(error):
        raise
      measured = {"batch": config.batch_size, "left_out": "does not fit"}
    rows.append({**row, **measured})
  device = jax.devices()[0]
  return {
    "rows": rows,
    "device": device.device_kind,
    "peak": chips.peak_of([device]),
    "flops_per_image": _flops(_experiment(config)) / config.batch_size,
    "depth": config.model.depth,
    "size": config.data.image_size,
  }


def _rates_of(config, source, rounds, steps):
  """Returns the seconds of a step of one variant."""
  if source == "real":
    # The data at hand may be smaller than a batch.
    most = _experiment(config).train.num_examples // config.data.shards * config.data.shards
    config.batch_size = min(config.batch_size, most)
  this = _experiment(config)
  model, optimizer = this.network.pretraining_model(classes=0), this.optimizer(EXAMPLES)
  if source == "real":
    images = this.pairs(this.train)
    prepare, feeding = images.prepare, images.feeding(0)
  else:
    prepare, batch = _ready(this, source)
    feeding = contextlib.nullcontext(lambda count: (batch,))
  state = this.state(model, optimizer.tx)
  step_fn = inputs.jit_step(this.step(this.contrastive(model, prepare), optimizer), this.mesh, state)
  seconds = []
  with feeding as arguments:
    for _ in range(1 + rounds):
      begin = time.perf_counter()
      for _ in range(steps):
        state, metrics = step_fn(state, *arguments(1))
      jax.block_until_ready((state, metrics))
      seconds.append((time.perf_counter() - begin) / steps)
  return {"batch": config.batch_size, "seconds": statistics.median(seconds[1:]), "rounds": seconds[1:]}


def _experiment(config) -> experiment.Experiment:
  return experiment.Experiment(config, "pretrain", devices=jax.devices()[:1])


def _ready(this, source) -> tuple[inputs.Prepare, inputs.Batch]:
  """Returns the step's part of the augmentation, and the batch of every step, which is on the device already."""
  rng, count, size = np.random.default_rng(0), this.config.batch_size, this.config.data.image_size
  pairs = rng.integers(0, 256, (count, 2, size, size, 3), np.uint8)
  index = np.arange(count, dtype=np.int32)
  if source == "views":
    rows = {"views": pairs.astype(np.float32) / 255, "label": index * 0}
    return objectives.as_it_is, sharding.global_batch(this.mesh, rows)
  rows = {"views": pairs, "label": index * 0, "index": index, "epoch": index * 0}
  return this.prepare_pairs, sharding.global_batch(this.mesh, rows)


def _flops(this) -> int:
  """Returns the model FLOPs of one step."""
  model = this.network.pretraining_model(classes=0)
  state = this.abstract_state(model, this.optimizer(EXAMPLES).tx)
  return this.network.step_flops(this.network.forward_flops(model, state))


def _pytorch(overrides, rounds, steps, *, compiled):
  """Returns (row, "") of PyTorch's step on ready-made views, or ({}, why it is left out)."""
  if importlib.util.find_spec("torch") is None:
    return {}, "PyTorch is left out: it is not installed; `pip install -e '.[bench]'` brings it."
  config = config_lib.load("imagenet:v1", overrides)
  keys = {**step.config_keys(config), "compiled": compiled}
  try:
    return measure.alone(_pytorch_rates, keys, rounds, steps), ""
  except ImportError as error:
    return {}, f"PyTorch is left out: it cannot be imported: {error}"
  except futures.process.BrokenProcessPool:
    return {}, "PyTorch is left out: its process was killed."


def _pytorch_rates(keys, rounds, steps):
  import torch

  row = {"name": "pytorch", "input": "views", "batch": keys["images"], "torch": torch.__version__}
  row["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
  try:
    run_steps = step.pytorch_trainer(keys)
    seconds = [run_steps(steps)["seconds"] for _ in range(1 + rounds)][1:]
  except torch.cuda.OutOfMemoryError:
    return {**row, "left_out": "does not fit"}
  return {**row, "seconds": statistics.median(seconds), "rounds": seconds}


def _complete(row, ours, theirs) -> None:
  """Adds views/s, MFU and the ratio to PyTorch's rate."""
  if "seconds" not in row:
    return
  row["views_per_second"] = 2 * row["batch"] / row["seconds"]
  if ours["peak"]:
    row["mfu"] = ours["flops_per_image"] * row["batch"] / row["seconds"] / ours["peak"]
  if "seconds" in theirs:
    row["of_pytorch"] = row["views_per_second"] * theirs["seconds"] / (2 * theirs["batch"])


def _line(row) -> str:
  def shown(key, form):
    return f"{row[key]:{form}}" if key in row else "-"

  text = INPUTS[row["input"]] + (f", remat {row['remat']}" if "remat" in row else "")
  return (
    f"{shown('of_pytorch', '.2f'):>9}{shown('views_per_second', ',.0f'):>10}{shown('mfu', '.1%'):>7}{row['batch']:>7}"
    f"  {row['name']}: {text}  {row.get('left_out', '')}"
  ).rstrip()


def _headline(rows, ours) -> dict:
  """Returns the best of ours on each input, and PyTorch's."""
  headline = {"device": ours["device"]}
  for row in sorted((row for row in rows if "seconds" in row), key=lambda row: row["views_per_second"]):
    for key in ("of_pytorch", "views_per_second", "mfu", "batch"):
      if key in row:
        headline[f"{row['name']}_{row['input']}_{key}"] = row[key]
  return headline
