"""What a run says while it runs: a progress bar, JSON lines for scripts, TensorBoard where TensorFlow is installed."""

import contextlib
import dataclasses
import importlib.util
import json
import logging
import math
import sys
import time
import types
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from tqdm import auto as tqdm

from simclr_jax import files, progress
from simclr_jax.hardware import chips
from simclr_jax.version import __version__

# What a progress bar shows of every run.
SPEED = {
  "speed/images_per_second": "images/s",
  "speed/data_wait_share": "data wait",
  "speed/checkpoint_wait_share": "save wait",
  "speed/mfu": "MFU",
}

# Batches that may be ready when an evaluation ends, on the host and on the devices: the steps that take them show what
# the step can do, not what the input can.
READY = 4

log = logging.getLogger("simclr_jax")


def set_up_logging() -> None:
  """Sends the package's log to stderr, above the progress bar, from the first process only."""
  handler = logging.StreamHandler()
  handler.setFormatter(logging.Formatter("%(message)s"))
  # tqdm redraws its bar below whatever is written through it.
  handler.emit = lambda record: tqdm.tqdm.write(handler.format(record), file=sys.stderr)
  log.handlers = [handler]
  log.propagate = False
  log.setLevel(logging.INFO if jax.process_index() == 0 else logging.ERROR)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
  """Within it there are no progress bars, and the log has warnings only: for jobs that are a part of another one."""
  before = log.level
  log.setLevel(max(before, logging.WARNING))
  try:
    yield
  finally:
    log.setLevel(before)


@dataclasses.dataclass(frozen=True)
class Meter:
  """What turns steps into speed."""

  images_per_step: int  # Images (not views) of one global batch.
  flops_per_step: float = 0  # Model FLOPs of one step on all devices; 0 if unknown.
  devices: tuple[jax.Device, ...] = ()  # That share the work.


class Telemetry:
  """Writes metric rows and draws the progress bar of one run; use it as a context manager.

  Rows go to `workdir/metrics.jsonl`, one JSON object a line with `step` and slash-prefixed names, and to
  `workdir/tensorboard`. Only process 0 writes.
  """

  def __init__(
    self,
    workdir: str,
    *,
    total_steps: int,
    start_step: int,  # Steps that are already done; metric rows after them are dropped, so none appears twice.
    meter: Meter,
    title: str,
    shown: Mapping[str, str] = types.MappingProxyType({}),  # Metric -> label in the progress bar, beside the speed.
  ):
    self._lead = jax.process_index() == 0
    self._shown = {**shown, **SPEED}
    self._numbers: dict[str, str] = {}  # In the bar.
    self._shown_at = -math.inf
    self._meter, self._peak = meter, chips.peak_of(meter.devices)
    self._dispatched = start_step
    # What counts for the next row: pieces that an evaluation ended, and the present piece since (time, step), which is
    # None while the steps after an evaluation take what was ready.
    self._steps, self._time = 0, 0.0
    self._since: tuple[float, int] | None = (time.monotonic(), start_step)
    self._counts_from = start_step
    self._waits = dict.fromkeys(("data", "checkpoint"), 0.0)
    self._rows, self._tensorboard = None, None
    if not self._lead:
      return
    if meter.flops_per_step and not self._peak and meter.devices[0].platform != "cpu":
      log.info("The peak of %s is not known: model FLOP/s are reported, MFU is not.", meter.devices[0].device_kind)
    path = epath.Path(workdir) / "metrics.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = [line for line in _complete_lines(path) if json.loads(line)["step"] <= start_step]
    path.write_text("".join(line + "\n" for line in kept))
    self._rows = path.open("a")
    if importlib.util.find_spec("tensorflow") and importlib.util.find_spec("clu"):
      from clu import metric_writers  # imports TensorFlow, which a TensorFlow-free run must never do

      self._tensorboard = metric_writers.SummaryWriter(str(epath.Path(workdir) / "tensorboard"))
    else:
      log.info("TensorFlow or clu is not installed: metrics go to %s only.", path)
    self._bar = progress.bar(total_steps, title, "step", initial=start_step)
    self.say("compiling, usually 30 s")

  def __enter__(self):
    return self

  def say(self, what: str) -> None:
    """Shows what the loop does beside stepping, until the next row."""
    if self._lead:
      self._bar.set_postfix_str(what)

  @contextlib.contextmanager
  def waiting_for(self, what: str) -> Iterator[None]:
    """Times what the loop spends on `data` or a `checkpoint` that is not ready."""
    start = time.monotonic()
    yield
    if self._since:
      self._waits[what] += time.monotonic() - start

  @contextlib.contextmanager
  def aside(self) -> Iterator[None]:
    """Leaves an evaluation out of the speed, which begins when every dispatched step is done.

    The input goes on during it: the first READY steps after it are left out too.
    """
    if self._since:
      self._time += time.monotonic() - self._since[0]
      self._steps += self._dispatched - self._since[1]
    self._since, self._counts_from = None, self._dispatched + READY
    self.say("evaluating")
    yield
    self.say("")

  def tick(self, steps: int = 1) -> None:
    """So many more steps were dispatched."""
    self._dispatched += steps
    if self._since is None and self._dispatched >= self._counts_from:
      self._since = (time.monotonic(), self._dispatched)
    if self._lead:
      self._bar.update(steps)

  def speed(self, step: int) -> dict[str, float]:
    """Returns how fast the steps since the last call were, up to `step`; empty where none of them counts.

    Images/s, the shares of time spent waiting for data and for checkpoints, model TFLOP/s of all devices, and MFU,
    their share of the chips' peak, where that is known. Model FLOPs leave out what rematerialisation and micro-batches
    compute again.
    """
    now, steps, seconds = time.monotonic(), self._steps, self._time
    if self._since and step > self._since[1]:
      steps, seconds = steps + step - self._since[1], seconds + now - self._since[0]
      self._since = (now, step)
    if not steps:
      return {}
    speed = {"speed/images_per_second": steps * self._meter.images_per_step / seconds}
    speed |= {f"speed/{what}_wait_share": min(waited / seconds, 1.0) for what, waited in self._waits.items()}
    flops = steps * self._meter.flops_per_step / seconds
    if flops:
      speed["speed/model_tflop_per_second"] = flops / 1e12
      if self._peak:
        speed["speed/mfu"] = flops / self._peak
    self._steps, self._time, self._waits = 0, 0.0, dict.fromkeys(self._waits, 0.0)
    return speed

  def write(self, step: int, metrics: dict[str, float]) -> None:
    """Writes one row; what JSON cannot hold (NaN, infinities) becomes null."""
    if not self._lead:
      return
    row = {k: v if math.isfinite(v) else None for k, v in metrics.items()}
    self._rows.write(json.dumps({"step": step, **row}) + "\n")
    self._rows.flush()
    if self._tensorboard:
      self._tensorboard.write_scalars(step, metrics)
    self._show(metrics)

  def refresh(self, metrics: Mapping[str, jax.Array]) -> None:
    """Shows the training metrics of a step, which are ready, in the bar; at most once a second."""
    if not self._lead or time.monotonic() - self._shown_at < progress.SECONDS:
      return
    last = {name: float(np.ravel(value)[-1]) for name, value in jax.device_get(dict(metrics)).items()}
    self._show({f"train/{name}": value for name, value in last.items()})

  def _show(self, metrics):
    number = lambda value: f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    text = lambda name, value: f"{value:.0%}" if name.endswith(("_share", "/mfu")) else number(value)
    new = {label: text(name, metrics[name]) for name, label in self._shown.items() if name in metrics}
    if new:
      self._numbers |= new
      self._bar.set_postfix(self._numbers)
      self._shown_at = time.monotonic()

  def __exit__(self, *exc):
    if self._lead:
      self._bar.close()
      self._rows.close()
      if self._tensorboard:
        self._tensorboard.close()


def read_rows(workdir: str) -> list[dict[str, float]]:
  """Returns the metric rows of a run, in order."""
  return [json.loads(line) for line in _complete_lines(epath.Path(workdir) / "metrics.jsonl")]


def write_result(workdir: str, result: Mapping[str, Any]) -> epath.Path:
  """Writes `workdir`/result.json, with the version of this package, from the first process only; returns its path."""
  path = epath.Path(workdir) / "result.json"
  if jax.process_index() == 0:
    files.write_json(path, {**result, "version": __version__})
  return path


def _complete_lines(path: epath.Path) -> list[str]:
  # A killed run may leave half a line at the end.
  return [line for line in path.read_text().split("\n")[:-1] if line] if path.exists() else []
