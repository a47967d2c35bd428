"""The training loop of every job that trains: step, log, evaluate, save, stop when preempted."""

import collections
import contextlib
import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from simclr_jax import errors
from simclr_jax.data import inputs
from simclr_jax.training import checkpoint, interruption, telemetry
from simclr_jax.training import state as state_lib

# Dispatches handed to the device ahead of its work: enough that it never idles, few enough that the waiting batches
# do not fill its memory.
AHEAD = 2

# Target duration of a dispatch of several steps: long against the host's part of it, short against a SIGTERM's grace.
DISPATCH_SECONDS = 0.5

Metrics = dict[str, jax.Array]
Evaluate = Callable[[state_lib.TrainState], dict[str, float]]


@dataclasses.dataclass(frozen=True)
class Run:
  """What the loop is told beside the state, the step and the input."""

  workdir: str  # For the metrics.
  total_steps: int  # Counted from the very beginning.
  batch_size: int  # Images of one global batch.
  checkpoints: checkpoint.Checkpoints
  log_every_steps: int
  title: str  # Of the progress bar.
  shown: dict[str, str]  # Metric name -> label, for the progress bar.
  flops_per_step: float = 0  # See `telemetry.Meter`.
  evaluate: Evaluate | None = None  # Called at the end and every `evaluate_every_steps` (0: only at the end).
  evaluate_every_steps: int = 0
  watch: Callable[[int, dict[str, float]], None] | None = None  # Sees every metric row: (step, row).
  profile_steps: tuple[int, int] | None = None  # First and last step of a profiler trace, in `workdir`/profile.

  def save_due(self, begin: int, end: int) -> bool:
    """Returns whether a checkpoint follows the steps after `begin` up to `end`; the same on all processes."""
    if self.checkpoints.due(end):
      return True
    if jax.process_count() == 1:
      return self.checkpoints.late(time.monotonic())
    # Saves are made together and clocks differ: the first process's counts. It is asked where rows are logged, which
    # waits for the step anyway.
    if self.checkpoints.every_seconds == 0 or end // self.log_every_steps == begin // self.log_every_steps:
      return False
    return bool(multihost_utils.broadcast_one_to_all(np.int32(self.checkpoints.late(time.monotonic()))))

  def evaluation_due(self, step: int) -> bool:
    """Returns whether an evaluation follows `step`, the end of the run aside."""
    return self.evaluate is not None and self.evaluate_every_steps > 0 and step % self.evaluate_every_steps == 0


def train(
  state: state_lib.TrainState, step_fn: Callable, images: inputs.Input, run: Run, constants: tuple[Any, ...] = ()
) -> tuple[state_lib.TrainState, dict[str, float]]:
  """Returns the state after `run.total_steps` steps and its evaluation; goes on from the newest checkpoint, if any.

  The arrays of `state`, which is the one before the first step, are donated. `step_fn` comes from `images.jit`;
  `constants` are trees of arrays on the devices that every step takes and none changes. A metric that is not finite is
  a UserError; after SIGTERM or Ctrl-C the state is saved and `interruption.Preempted` is raised.
  """
  state, done = run.checkpoints.restore_latest(state)
  if done:
    telemetry.log.info("Continuing from step %d of %d.", done, run.total_steps)
  if done >= run.total_steps:
    run.checkpoints.close()
    return state, run.evaluate(state) if run.evaluate else {}
  trace = _Trace(run.workdir, run.profile_steps)
  if run.profile_steps and not done < run.profile_steps[0] <= run.total_steps:
    telemetry.log.warning(
      "No profile: step %d is not among steps %d to %d.", run.profile_steps[0], done + 1, run.total_steps
    )
  # Steps at which the loop has something to do between two dispatches: none goes past one of them.
  pauses = lambda step: (
    step == run.total_steps or run.evaluation_due(step) or run.checkpoints.due(step) or trace.due(step)
  )
  meter, result = telemetry.Meter(run.batch_size, run.flops_per_step, tuple(images.mesh.devices.flat)), {}
  with (
    telemetry.Telemetry(
      run.workdir, total_steps=run.total_steps, start_step=done, meter=meter, title=run.title, shown=run.shown
    ) as out,
    contextlib.closing(run.checkpoints),
    contextlib.closing(trace),
    interruption.notice() as stop_after,
    images.feeding(done, *constants) as arguments,
  ):
    rows, pace = _Rows(out, run), _Pace(images.steps_per_dispatch)
    while done < run.total_steps:
      trace.before(done + 1)
      begin, end = done, done + pace.steps
      done = next((step for step in range(begin + 1, end) if pauses(step)), end)
      with out.waiting_for("data"):
        following = arguments(done - begin)
      state, metrics = step_fn(state, *following)
      out.tick(done - begin)
      if (ready := pace.dispatched(metrics, done - begin)) is not None:
        out.refresh(ready)
      rows.flush()  # The device works on this dispatch while the last due metrics are read.
      rows.add(begin, done, metrics)
      last = done == run.total_steps
      trace.after(done, metrics)
      if run.evaluation_due(done) or last and run.evaluate:
        jax.block_until_ready(metrics)
        with out.aside():
          result = run.evaluate(state)
        out.write(done, result)
        if run.watch:
          run.watch(done, result)
      stop = stop_after(done)
      if last or stop or run.save_due(begin, done):
        rows.flush()  # A row up to a saved step is never lost, whatever happens next.
        jax.block_until_ready(metrics)
        with out.waiting_for("checkpoint"):
          run.checkpoints.save(state, done)
      if stop and not last:
        run.checkpoints.close()
        line = "%s: saved step %d of %d; the same command continues from there."
        telemetry.log.info(line, interruption.NAMES[stop], done, run.total_steps)
        raise interruption.Preempted(interruption.CODES[stop])
  return state, result


class _Pace:
  """How many steps one dispatch holds, and how many dispatches are ahead of the device."""

  def __init__(self, most: int):
    # Processes that counted differently would wait for each other for ever, and their clocks differ.
    self._adapts = most > 1 and jax.process_count() == 1
    self._most, self._clock = most, None
    self._waiting = collections.deque()
    self.steps = 1 if self._adapts else most

  def dispatched(self, metrics: Metrics, count: int) -> Metrics | None:
    """Notes a dispatch of `count` steps; waits for an earlier one where too many are ahead, and returns its metrics."""
    self._waiting.append((metrics, count))
    if len(self._waiting) <= AHEAD:
      return None
    before, finished = self._waiting.popleft()
    jax.block_until_ready(before)
    now = time.monotonic()
    if self._adapts and self._clock is not None:
      self.steps = min(max(int(DISPATCH_SECONDS * finished / (now - self._clock)), 1), self._most)
    self._clock = now
    return before


class _Rows:
  """Metric rows that are due, read from the device one dispatch later."""

  def __init__(self, out: telemetry.Telemetry, run: Run):
    self._out, self._run, self._pending = out, run, None

  def add(self, begin: int, end: int, metrics: Metrics) -> None:
    """Notes the due steps among those of one dispatch, `begin` + 1 to `end`."""
    every, total = self._run.log_every_steps, self._run.total_steps
    due = [step for step in range(begin + 1, end + 1) if step % every == 0 or step in (1, total)]
    if due:
      self._pending = begin, end, due, metrics

  def flush(self) -> None:
    """Writes what is noted; a metric that is not finite is a UserError."""
    if not self._pending:
      return
    (begin, end, due, metrics), self._pending = self._pending, None
    # The clock is read when the steps are done: to fetch from a GPU may wait for what was dispatched since.
    jax.block_until_ready(metrics)
    speed, rows = self._out.speed(end), jax.device_get(metrics)
    for step in due:
      values = {f"train/{name}": float(np.ravel(row)[step - begin - 1]) for name, row in rows.items()}
      self._out.write(step, {**values, **speed})
      for name, value in values.items():
        if not math.isfinite(value):
          raise errors.UserError(
            f"{name} is {value} at step {step}: training diverged; lower config.optimizer.base_learning_rate, "
            "or warm up for longer (config.optimizer.warmup_epochs)."
          )
      if self._run.watch:
        self._run.watch(step, values)


class _Trace:
  """A profiler trace of some steps, for TensorBoard's profile page or Perfetto."""

  def __init__(self, workdir: str, steps: tuple[int, int] | None):
    self._folder, self._steps, self._active = str(epath.Path(workdir) / "profile"), steps, False

  def due(self, step: int) -> bool:
    """Returns whether a dispatch must end with `step`, for the trace to begin or end there."""
    return self._steps is not None and step in (self._steps[0] - 1, self._steps[1])

  def before(self, step: int) -> None:
    """Starts the trace if `step` is its first."""
    if self._steps is not None and step == self._steps[0]:
      jax.profiler.start_trace(self._folder)
      self._active = True

  def after(self, step: int, metrics: Metrics) -> None:
    """Ends the trace if `step` is its last."""
    if self._active and step >= self._steps[1]:
      jax.block_until_ready(metrics)
      self.close()

  def close(self) -> None:
    """Ends the trace."""
    if self._active:
      jax.profiler.stop_trace()
      self._active = False
      telemetry.log.info("Profiler trace of steps %d to %d: %s", *self._steps, self._folder)
