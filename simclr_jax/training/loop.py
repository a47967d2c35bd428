"""The training loop, the one that every job that trains uses: step, log, evaluate, save, stop when preempted."""

import collections
import contextlib
import dataclasses
import math
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from simclr_jax import errors
from simclr_jax.data import prefetch
from simclr_jax.hardware import sharding
from simclr_jax.training import checkpoint, telemetry
from simclr_jax.training import state as state_lib

# Dispatches handed to the device ahead of its work: enough that it never idles, few enough that the batches that wait
# there do not fill its memory.
AHEAD = 2

# What a dispatch of several steps should last: long against the host's part of it, short against a SIGTERM's patience.
DISPATCH_SECONDS = 0.5

# What a shell reports for a process that SIGTERM ended; a supervisor starts the same command again.
PREEMPTED = 128 + signal.SIGTERM

Metrics = dict[str, jax.Array]


class Preempted(SystemExit):
  """SIGTERM arrived, the state is saved; the same command continues the run."""


@dataclasses.dataclass(frozen=True)
class Streamed:
  """Steps that are fed: each takes a batch, which waits on the devices before it is due.

  Attributes:
    step_fn: jitted (state, batch, *constants) -> (state, metrics); scalars, each on all devices.
    batches: first step -> this process's rows of the batch of each step from then on, as NumPy.
    mesh: where the batches go.
    constants: trees of arrays on the devices that every step takes and none changes.
  """

  step_fn: Callable[..., tuple[state_lib.TrainState, Metrics]]
  batches: Callable[[int], Iterator[Any]]
  mesh: jax.sharding.Mesh
  constants: tuple[Any, ...] = ()
  most: ClassVar[int] = 1

  @contextlib.contextmanager
  def feeding(self, done: int):
    """Yields the function that gives the arguments of the next dispatch."""
    with contextlib.closing(prefetch.to_devices(self.batches(done), self.mesh)) as batches:
      yield lambda count: (next(batches), *self.constants)


@dataclasses.dataclass(frozen=True)
class Resident:
  """Steps that take their batches from a data set on the devices, several in one dispatch.

  Attributes:
    step_fn: jitted (state, dataset, count i32[], *constants) -> (state, metrics), the first `count` entries of f[most]
      each.
    dataset: its second argument.
    mesh: where that is.
    most: steps of a dispatch.
    constants: as in `Streamed`.
  """

  step_fn: Callable[..., tuple[state_lib.TrainState, Metrics]]
  dataset: Any
  mesh: jax.sharding.Mesh
  most: int
  constants: tuple[Any, ...] = ()

  @contextlib.contextmanager
  def feeding(self, done: int):
    """Yields the function that gives the arguments of the next dispatch."""
    place = lambda count: jax.device_put(np.int32(count), sharding.replicated(self.mesh))
    yield lambda count: (self.dataset, place(count), *self.constants)


def several(step_fn, batch_of, most: int):
  """Returns (state, dataset, count, *constants) -> (state, metrics f[most]): `count` steps in one program, not jitted.

  One program for any count, so that the same steps give the same bits however they are dispatched, and nothing is
  compiled again where an evaluation or a checkpoint cuts in.

  Args:
    step_fn: (state, batch, *constants) -> (state, metrics).
    batch_of: (dataset, step i32[]) -> batch.
    most: the largest count.
  """

  def run(state, dataset, count, *constants):
    one = lambda state: step_fn(state, batch_of(dataset, state.step), *constants)
    rows = jax.tree.map(lambda x: jax.numpy.zeros((most, *x.shape), x.dtype), jax.eval_shape(one, state)[1])

    def body(number, carry):
      state, rows = carry
      state, metrics = one(state)
      return state, jax.tree.map(lambda row, x: row.at[number].set(x), rows, metrics)

    return jax.lax.fori_loop(0, count, body, (state, rows))

  return run


def train(
  state: state_lib.TrainState,
  steps: Streamed | Resident,
  *,
  workdir: str,
  total_steps: int,
  batch_size: int,
  checkpoints: checkpoint.Checkpoints,
  log_every_steps: int,
  title: str,
  show: dict[str, str],
  flops_per_step: float = 0,
  evaluate: Callable[[state_lib.TrainState], dict[str, float]] | None = None,
  evaluate_every_steps: int = 0,
  profile_steps: tuple[int, int] | None = None,
) -> tuple[state_lib.TrainState, dict[str, float]]:
  """Returns the state after `total_steps` steps and its evaluation, going on from the newest checkpoint if any.

  Args:
    state: before the first step; its arrays are donated.
    steps: what a step does, and with which data.
    workdir: for the metrics.
    total_steps: the run's length, counted from its very beginning.
    batch_size: images of one global batch.
    checkpoints: where the state is kept.
    log_every_steps: interval of metric rows.
    title: of the progress bar.
    show: metric name -> label, for the progress bar.
    flops_per_step: model FLOPs, see `telemetry.Telemetry`.
    evaluate: state -> metrics, at the end and every `evaluate_every_steps` (0: only at the end).
    evaluate_every_steps: see `evaluate`.
    profile_steps: first and last step of a profiler trace, which goes to `workdir`/profile.

  Raises:
    UserError: the loss is not finite.
    Preempted: SIGTERM arrived and the state was saved.
  """
  state, done = checkpoints.restore_latest(state)
  if done:
    telemetry.log.info("Continuing from step %d of %d.", done, total_steps)
  result = {}
  if done >= total_steps:
    checkpoints.close()
    return state, evaluate(state) if evaluate else result
  evaluation_due = lambda step: evaluate_every_steps and step % evaluate_every_steps == 0
  trace = _Trace(workdir, profile_steps)
  if profile_steps and not done < profile_steps[0] <= total_steps:
    telemetry.log.warning("No profile: step %d is not among steps %d to %d.", profile_steps[0], done + 1, total_steps)
  # Steps at which the loop has something to do between two dispatches.
  pauses = lambda step: step == total_steps or evaluation_due(step) or checkpoints.due(step) or trace.due(step)
  with (
    telemetry.Telemetry(
      workdir,
      total_steps=total_steps,
      start_step=done,
      images_per_step=batch_size,
      title=title,
      show=show,
      flops_per_step=flops_per_step,
      devices=list(steps.mesh.devices.flat),
    ) as out,
    contextlib.closing(checkpoints),
    contextlib.closing(trace),
    _termination_notice() as terminated,
    steps.feeding(done) as arguments,
  ):
    pending, dispatched, pace = None, collections.deque(), _Pace(steps.most)
    while done < total_steps:
      trace.before(done + 1)
      begin, done = done, _reach(done, pace.steps, pauses)
      with out.waiting_for("data"):
        following = arguments(done - begin)
      state, metrics = steps.step_fn(state, *following)
      out.tick(done - begin)
      dispatched.append((metrics, done - begin))
      if len(dispatched) > AHEAD:
        metrics_before, count = dispatched.popleft()
        jax.block_until_ready(metrics_before)
        pace.finished(count)
      if pending:  # Read the last due metrics while the device works on this dispatch.
        _report(out, *pending)
        pending = None
      due = [s for s in range(begin + 1, done + 1) if s % log_every_steps == 0 or s in (1, total_steps)]
      if due:
        pending = (begin, done, due, metrics)
      last = done == total_steps
      trace.after(done, metrics)
      if evaluate and (last or evaluation_due(done)):
        jax.block_until_ready(metrics)
        with out.waiting_for("aside"):
          result = evaluate(state)
        out.write(done, result)
      stop = terminated(done)
      if last or stop or checkpoints.due(done):
        if pending:  # A row up to a saved step is never lost, whatever happens next.
          _report(out, *pending)
          pending = None
        jax.block_until_ready(metrics)
        with out.waiting_for("checkpoint"):
          checkpoints.save(state, done)
      if stop and not last:
        telemetry.log.info("SIGTERM: saving step %d; the same command continues from there.", done)
        checkpoints.close()
        raise Preempted(PREEMPTED)
  return state, result


def _reach(done: int, count: int, pauses: Callable[[int], bool]) -> int:
  """Returns the last step of a dispatch of at most `count` steps: none goes past a step that pauses."""
  return next((step for step in range(done + 1, done + count) if pauses(step)), done + count)


class _Pace:
  """How many steps make a dispatch: what a moment holds, where a single process decides."""

  def __init__(self, most: int):
    # Processes that count differently would wait for each other for ever, and their clocks differ.
    self._adapts = most > 1 and jax.process_count() == 1
    self._most, self._clock = most, None
    self.steps = 1 if self._adapts else most

  def finished(self, count: int) -> None:
    """A dispatch of so many steps has just been done."""
    now = time.monotonic()
    if self._adapts and self._clock is not None:
      self.steps = min(max(int(DISPATCH_SECONDS * count / (now - self._clock)), 1), self._most)
    self._clock = now


class _Trace:
  """A profiler trace of some steps, for TensorBoard's profile page or Perfetto."""

  def __init__(self, workdir: str, steps: tuple[int, int] | None):
    self._folder, self._steps, self._active = str(epath.Path(workdir) / "profile"), steps, False

  def due(self, step: int) -> bool:
    """Whether a dispatch must end with `step`, for the trace to begin or end there."""
    return self._steps is not None and step in (self._steps[0] - 1, self._steps[1])

  def before(self, step: int) -> None:
    if self._steps is not None and step == self._steps[0]:
      jax.profiler.start_trace(self._folder)
      self._active = True

  def after(self, step: int, metrics: Metrics) -> None:
    if self._active and step >= self._steps[1]:
      jax.block_until_ready(metrics)
      self.close()

  def close(self) -> None:
    if self._active:
      jax.profiler.stop_trace()
      self._active = False
      telemetry.log.info("Profiler trace of steps %d to %d: %s", *self._steps, self._folder)


def _report(out: telemetry.Telemetry, begin: int, end: int, due: list[int], metrics: Metrics) -> None:
  """Writes the rows of the due steps among those of one dispatch, `begin` + 1 to `end`."""
  rows = jax.device_get(metrics)
  speed = out.speed(end)
  for step in due:
    values = {f"train/{name}": float(np.ravel(row)[step - begin - 1]) for name, row in rows.items()}
    out.write(step, {**values, **speed})
    for name, value in values.items():
      if not math.isfinite(value):
        raise errors.UserError(
          f"{name} is {value} at step {step}: training diverged; lower config.optimizer.base_learning_rate, "
          "or warm up for longer (config.optimizer.warmup_epochs)."
        )


@contextlib.contextmanager
def _termination_notice():
  """Yields step -> whether to stop, agreed among the processes; SIGTERM keeps its default effect outside."""
  if jax.process_count() > 1:
    # jax.distributed has its own handler, which lets all processes stop after the same step.
    yield multihost_utils.reached_preemption_sync_point
    return
  received = []
  previous = signal.signal(signal.SIGTERM, lambda *_: received.append(True))
  try:
    yield lambda step: bool(received)
  finally:
    signal.signal(signal.SIGTERM, previous)
    if received and callable(previous):  # Whoever runs one training after the other wants to know as well.
      previous(signal.SIGTERM, None)
