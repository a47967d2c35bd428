"""plan: compile before you pay. What one pretraining step needs on hardware that you do not have yet.

Compiles the real training step of --config for --topology=NAME:SHAPE without that hardware (v2, v3, v4, v5e, v5p, v6e
or tpu7x and the shape in chips, such as v3:8x8 or v5p:2x2x1; one chip is v5e:1x1), or for this machine's devices where
it is left out. Prints memory by kind against what the chip has, model FLOPs, what the devices exchange, step time and
hours of the run, and says what to change where it does not fit. --devices=N takes the first N of the devices,
--batch_sizes=4096,8192 plans for each, --mfu=0.35 is the share of the chip's peak that hours are estimated with. Needs
--config; writes `plan.json` to --workdir (default: runs/plan). A topology needs the TPU compiler, the extra [tpu].
"""

import dataclasses
import importlib.util
import math
import multiprocessing
import os
import re
import sys
import time
from concurrent import futures
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from etils import epath
from jax.experimental import topologies

from simclr_jax import config as config_lib
from simclr_jax import errors, experiment, files
from simclr_jax.data import composition, inputs
from simclr_jax.hardware import chips, cost, sharding
from simclr_jax.training import state as state_lib
from simclr_jax.training import telemetry
from simclr_jax.version import __version__

TPUS = ("v2", "v3", "v4", "v5e", "v5p", "v6e", "tpu7x")

# Training images and classes of data sets that need not be at hand to plan with.
KNOWN_SPLITS = {
  ("imagenet2012", "train"): (1_281_167, 1000),
  ("imagenet2012_subset/1pct", "train"): (12_811, 1000),
  ("imagenet2012_subset/10pct", "train"): (128_116, 1000),
  ("cifar10", "train"): (50_000, 10),
  ("cifar100", "train"): (50_000, 100),
}


@dataclasses.dataclass
class Plan:
  """What one training step needs."""

  batch_size: int
  micro_batches: int
  devices: int
  device_kind: str
  memory: dict[str, int] | None  # Bytes of one device by kind; None where the compiler gave up: it does not fit.
  needed: int  # Their sum, or what the compiler says it would take.
  available: float | None  # Bytes of one device; None where the chip is unknown.
  forward_flops: int  # Of both views of an image, matrices alone; the backward pass takes twice that.
  step_flops: int  # Model FLOPs on all devices: no rematerialisation, no second forward pass of micro-batches.
  step_seconds_at_peak: float | None  # Those over the devices' peak; None where it is unknown.
  exchanged: list[dict]  # By kind and purpose: calls and bytes of one device in one step.
  steps: int
  compile_seconds: float
  step_seconds_measured: float | None = None  # On this machine's CPU, the mean of two steps without their input.

  @property
  def fits(self) -> bool:
    return self.memory is not None and (self.available is None or self.needed <= self.available)


def run(
  config: ml_collections.ConfigDict,
  workdir: str,
  *,
  topology: str = "",
  devices: int = 0,
  batch_sizes: tuple[int, ...] = (),
  mfu: float = 0.35,
) -> list[Plan]:
  """Returns (and prints, and writes to `plan.json`) the plans of one or more batch sizes."""
  count = len(_devices(topology)[0])
  if devices > count:
    raise errors.UserError(f"--devices got '{devices}'; it wants a number from 1 to {count}.")
  count = devices or count
  config = _measured(config)
  path = epath.Path(workdir) / "plan.json"
  command = "python -m simclr_jax " + " ".join(sys.argv[1:])
  facts = {"command": command, "topology": topology, "jax": jax.__version__, "mfu": mfu, "config": config.to_dict()}
  plans, rows = [], []
  for size in batch_sizes or (config.batch_size,):
    part = config.copy_and_resolve_references()
    part.batch_size = size
    part.eval_batch_size = count  # Not planned for.
    plan = _apart(part, topology, count) if topology else make(part, topology, count)
    plans.append(plan)
    rows.append({**dataclasses.asdict(plan), "fits": plan.fits, **estimates(plan, mfu)})
    print(table(plan, topology, mfu), flush=True)
    files.write_json(path, {**facts, "version": __version__, "plans": rows})
  telemetry.log.info("Written to %s", path)
  return plans


def _measured(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """Returns the config with what the images of a folder give."""
  if not config_lib.unmeasured(config):
    return config
  config = config.copy_and_resolve_references()
  before, config.eval_batch_size = config.eval_batch_size, jax.device_count()  # Not planned for.
  config = experiment.Experiment(config, "count").config
  config.eval_batch_size = before
  return config


def _apart(config: ml_collections.ConfigDict, topology: str, count: int) -> Plan:
  """Returns `make` of these, from a process of its own: the TPU compiler ends the process when it crashes."""
  with futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
    try:
      return pool.submit(make, config, topology, count).result()
    except futures.process.BrokenProcessPool:
      raise errors.UserError(
        f"the TPU compiler crashed on batch {config.batch_size} for {topology}, as said above: a fault in "
        "it. Try another batch size, number of micro-batches or topology."
      ) from None


def make(config: ml_collections.ConfigDict, topology: str, count: int) -> Plan:
  """Returns the plan of the config's training step on the first `count` devices of a topology, or of this machine."""
  devices, chip_count = _devices(topology)
  chip = chips.chip_of(devices[0])
  devices_per_chip = (len(devices) / chip_count if topology else chip.devices) if chip else None
  this = experiment.Experiment(config, "plan", devices=devices[:count])
  examples, classes = _split_of(config)
  model, optimizer = this.network.pretraining_model(classes), this.optimizer(examples)
  state, batch = this.abstract_state(model, optimizer.tx), batch_of(config, this.mesh)
  begin = time.monotonic()
  # Traced before it is compiled, since a wrong value in the config is found there.
  step_fn = this.step(this.contrastive(model, this.prepare_pairs), optimizer)
  traced = inputs.jit_step(step_fn, this.mesh, state).trace(state, batch)
  memory, exchanged, needed, compiled = _compiled(traced, state, batch, devices[0].platform, this.mesh.size)
  compile_seconds = round(time.monotonic() - begin, 1)
  if memory is not None and config.data.resident:
    # As they are stored; of a data set that is not here, as the network sees them.
    memory["resident images"] = examples * (3 * config.data.image_size**2 + 4)
    needed += memory["resident images"]
  forward = this.network.forward_flops(model, state)
  flops = this.network.step_flops(forward)
  is_here = not topology and devices[0].platform == "cpu"
  return Plan(
    batch_size=config.batch_size,
    micro_batches=config.micro_batches,
    devices=this.mesh.size,
    device_kind=devices[0].device_kind,
    memory=memory,
    needed=needed,
    available=chip.memory / devices_per_chip if chip else None,
    forward_flops=forward,
    step_flops=flops,
    step_seconds_at_peak=flops / (this.mesh.size * chip.flops / devices_per_chip) if chip else None,
    exchanged=exchanged,
    steps=optimizer.total_steps,
    compile_seconds=compile_seconds,
    step_seconds_measured=_seconds(compiled, state, batch) if is_here and compiled else None,
  )


def _compiled(
  traced: Any, state: state_lib.TrainState, batch: Any, platform: str, devices: int
) -> tuple[dict[str, int] | None, list[dict[str, Any]], int, Any]:
  """Returns memory by kind, what the devices exchange, the bytes needed, and the compiled step.

  The first and the last are None where the step does not fit.
  """
  lowered = traced.lower(lowering_platforms=(platform,))
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    needed = _memory_in(str(error))
    if not needed:
      raise
    if "HLO temporaries" in str(error):
      # Told before the compiler has placed state and batch; later its count has them.
      needed += cost.bytes_per_device((state, batch))
    return None, [], needed, None
  memory = _memory_of(compiled.memory_analysis(), state, batch)
  return memory, _exchanged(cost.collectives(compiled.as_text(), devices)), sum(memory.values()), compiled


def _seconds(step, state, batch):
  """Returns the mean time of two steps, after one more, on zeros."""
  zeros = lambda leaf: jax.device_put(jnp.zeros(leaf.shape, leaf.dtype), leaf.sharding)
  state, batch = jax.tree.map(zeros, (state, batch))
  for number in range(3):
    if number == 1:
      begin = time.monotonic()
    state, _ = jax.block_until_ready(step(state, batch))
  return (time.monotonic() - begin) / 2


def batch_of(config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh) -> dict[str, jax.ShapeDtypeStruct]:
  """Returns the shapes of a global batch, as it comes before the part of the augmentation that the step does."""
  n, size, at = config.batch_size, config.data.image_size, sharding.batched(mesh)
  rows = lambda dtype, *shape: jax.ShapeDtypeStruct((n, *shape), dtype, sharding=at)
  batch = dict.fromkeys(("label", "index", "epoch"), rows(jnp.int32))
  if not (config.data.resident or config.augment.compose):
    dtype = jnp.uint8 if config.augment.place == "device" else jnp.float32
    return {"views": rows(dtype, 2, size, size, 3), **batch}
  if config.data.resident and config.augment.compose:
    batch["operations"] = rows(jnp.int32, len(composition.codes(config.augment.compose)))
  return {"image": rows(jnp.uint8, size, size, 3), **batch}


def estimates(plan: Plan, mfu: float) -> dict[str, float | None]:
  """Returns seconds of a step, images (not views) a second and hours of the run, at a share of the chip's peak."""
  if plan.step_seconds_at_peak is None:
    return {"step_seconds": None, "images_per_second": None, "hours": None}
  seconds = plan.step_seconds_at_peak / mfu
  return {"step_seconds": seconds, "images_per_second": plan.batch_size / seconds, "hours": plan.steps * seconds / 3600}


def table(plan: Plan, topology: str, mfu: float) -> str:
  """Returns the plan as lines of text."""
  chip = chips.CHIPS.get(plan.device_kind)
  where = f"{plan.devices} device{'s' * (plan.devices > 1)} ({chip.name if chip else plan.device_kind})"
  where = f"{topology}, {where}" if topology else where
  parts = f" in {plan.micro_batches} micro-batches" if plan.micro_batches > 1 else ""
  lines = [f"\nBatch {plan.batch_size:,}{parts} on {where}; compiled in {plan.compile_seconds:.0f} s"]
  row = lambda title, value: lines.append(f"    {title:<34}{value}")
  lines.append("\n  memory of one device")
  sizes = {**(plan.memory or {}), "needed": plan.needed}
  if plan.available is not None:
    sizes |= {"the chip has": plan.available, "left": plan.available - plan.needed}
  for kind, size in sizes.items():
    row(kind, f"{size / chips.GIB:10.3f} GiB")
  if not plan.fits:
    lines.append("  DOES NOT FIT. " + advice(plan))
  if plan.exchanged:
    lines.append("\n  exchanged in one step, by each device")
  for found in plan.exchanged:
    row(f"{found['kind']}, {found['purpose']}", f"{found['calls']:10,} x {_bytes(found['bytes'])} together")
  lines.append("\n  time")
  row("model FLOPs of a step", f"{plan.step_flops / 1e12:10.1f} TFLOP, all devices")
  if plan.step_seconds_at_peak is not None:
    step, rate, hours = estimates(plan, mfu).values()
    row("step at the peak", f"{1e3 * plan.step_seconds_at_peak:10.1f} ms")
    row(f"step at {mfu:.0%} of it (assumed)", f"{1e3 * step:10.1f} ms, {rate:,.0f} images/s to be fed")
    row(f"run of {plan.steps:,} steps", f"{hours:10.1f} h")
  if plan.step_seconds_measured is not None:
    step = plan.step_seconds_measured
    row("step on this CPU (two timed)", f"{1e3 * step:10.1f} ms, {plan.batch_size / step:,.0f} images/s")
    row(f"run of {plan.steps:,} steps", f"{plan.steps * step / 3600:10.2f} h, without reading the images")
  return "\n".join(lines)


def advice(plan: Plan) -> str:
  """Returns what to change where a step does not fit."""
  per_device = plan.batch_size // plan.devices // plan.micro_batches
  over = plan.needed / plan.available if plan.available else 2
  advised = []
  if per_device > 1:
    more = plan.micro_batches * min(2 ** math.ceil(math.log2(max(over, 1.01))), per_device)
    advised.append(f"--config.micro_batches={more}")
  advised += ["--config.model.remat=convs or blocks", "--config.sharding.parameters=sharded", "or take more chips"]
  return "Try " + ", ".join(advised) + "."


def _devices(topology: str):
  """Returns the devices of a topology such as `v5e:4x4`, or this machine's, and how many chips they are."""
  if not topology:
    return jax.devices(), None
  match = re.fullmatch(r"(\w+):(\d+)x(\d+)(?:x(\d+))?", topology)
  if match is None or match[1] not in TPUS:
    raise errors.UserError(
      f"--topology={topology} is not NAME:SHAPE in chips{errors.nearest(topology.partition(':')[0], TPUS)}; "
      f"use one of {', '.join(TPUS)}, for example v3:8x8 or v5p:2x2x1."
    )
  if importlib.util.find_spec("libtpu") is None:
    raise errors.UserError(
      f'--topology={topology} needs the TPU compiler, which is not here: pip install -e ".[tpu]" in this environment.'
    )
  # This need not be a TPU host: the compiler would ask a metadata server what it is, and complain. What it is told here
  # has no effect on the topology.
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
  os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
  # Only one process may use a TPU, but any number may compile for one; this one needs no devices of this machine.
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  jax.config.update("jax_platforms", "cpu")
  shape = [int(n) for n in match.groups()[1:] if n]
  chip_count = math.prod(shape)
  # By default a host has 2x2x1 chips, which one or two do not fill.
  bounds = {"chips_per_host_bounds": [*shape, 1, 1][:3]} if chip_count < 4 else {}
  try:
    return topologies.get_topology_desc(platform="tpu", topology_name=topology, **bounds).devices, chip_count
  except jax.errors.JaxRuntimeError as error:
    first_line = str(error).splitlines()[0]
    raise errors.UserError(f"--topology={topology} is not one that the TPU compiler knows: {first_line}") from error


def _split_of(config: ml_collections.ConfigDict) -> tuple[int, int]:
  """Returns images and classes of the training split: the data's own where it is at hand."""
  known = KNOWN_SPLITS.get((config.data.name, config.data.train_split)) if config.data.source == "tfds" else None
  if config.data.source in ("tfds", "folder"):
    config = config.copy_and_resolve_references()
    config.data.resident = False  # To count the images none need be decoded.
  try:
    images = experiment.Experiment(config, "count").train
  except errors.UserError:
    if known is None:
      raise
    return known
  return images.num_examples, images.num_classes


def _memory_of(analysis, state, batch) -> dict[str, int]:
  trees = {"parameters": state.params, "batch statistics": state.batch_stats, "optimizer": state.opt_state}
  trees["batch"] = batch
  if state.memory is not None:
    trees["queue of negatives"] = state.memory
  parts = {name: cost.bytes_per_device(tree) for name, tree in trees.items()}
  layout = analysis.argument_size_in_bytes - sum(parts.values())
  # The new state takes the place of the old one; what is left of the outputs are the metrics.
  outputs = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
  return {
    **parts,
    "padding of these by the chip": max(layout, 0),
    "activations and temporaries": analysis.temp_size_in_bytes + max(outputs, 0),
    "program": analysis.generated_code_size_in_bytes,
  }


def _memory_in(message: str) -> int:
  """Returns the bytes that the TPU compiler says are too many; 0 if it complains about something else."""
  match = re.search(r"(?:HLO temporaries \(|Used )([\d.]+)([KMGT])", message)
  return int(float(match[1]) * 1024 ** (" KMGT".index(match[2]))) if match else 0


def _exchanged(found: list[cost.Collective]) -> list[dict]:
  totals = {}
  for item in found:
    calls, size = totals.get((item.kind, item.purpose), (0, 0))
    totals[item.kind, item.purpose] = (calls + item.calls, size + item.bytes)
  rows = [{"kind": k, "purpose": p, "calls": c, "bytes": b} for (k, p), (c, b) in totals.items()]
  return sorted(rows, key=lambda row: -row["bytes"])


def _bytes(size: float) -> str:
  for unit in ("B", "KiB", "MiB"):
    if size < 1024:
      return f"{size:8.1f} {unit}"
    size /= 1024
  return f"{size:8.1f} GiB"
