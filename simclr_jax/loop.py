"""The training loop, the one that every job that trains uses: step, log, evaluate, save, stop when preempted."""

import collections
import contextlib
import math
import signal
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.experimental import multihost_utils

from simclr_jax import checkpoint, errors, sharding, telemetry
from simclr_jax import state as state_lib

# Steps handed to the device ahead of its work: enough that it never idles, few enough that the batches that wait there
# do not fill its memory.
AHEAD = 2

# What a shell reports for a process that SIGTERM ended; a supervisor starts the same command again.
PREEMPTED = 128 + signal.SIGTERM


class Preempted(SystemExit):
  """SIGTERM arrived, the state is saved; the same command continues the run."""


def train(
  state: state_lib.TrainState,
  step_fn: Callable[[state_lib.TrainState, Any], tuple[state_lib.TrainState, dict[str, jax.Array]]],
  batches: Callable[[int], Iterator[Any]],
  *,
  mesh: jax.sharding.Mesh,
  workdir: str,
  total_steps: int,
  batch_size: int,
  checkpoints: checkpoint.Checkpoints,
  log_every_steps: int,
  title: str,
  show: dict[str, str],
  evaluate: Callable[[state_lib.TrainState], dict[str, float]] | None = None,
  evaluate_every_steps: int = 0,
) -> tuple[state_lib.TrainState, dict[str, float]]:
  """Returns the state after `total_steps` steps and its evaluation, going on from the newest checkpoint if any.

  Args:
    state: before the first step; its arrays are donated.
    step_fn: jitted (state, batch) -> (state, metrics); scalars, each on all devices.
    batches: first step -> this process's rows of the batch of each step from then on, as NumPy.
    mesh: where the batches go.
    workdir: for the metrics.
    total_steps: the run's length, counted from its very beginning.
    batch_size: images of one global batch.
    checkpoints: where the state is kept.
    log_every_steps: interval of metric rows.
    title: of the progress bar.
    show: metric name -> label, for the progress bar.
    evaluate: state -> metrics, at the end and every `evaluate_every_steps` (0: only at the end).
    evaluate_every_steps: see `evaluate`.

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
  with (
    telemetry.Telemetry(
      workdir, total_steps=total_steps, start_step=done, images_per_step=batch_size, title=title, show=show
    ) as out,
    contextlib.closing(checkpoints),
    _termination_notice() as terminated,
  ):
    rows = batches(done)
    pending, dispatched = None, collections.deque()
    for step in range(done + 1, total_steps + 1):
      with out.waiting_for_data():
        batch = sharding.global_batch(mesh, next(rows))
      state, metrics = step_fn(state, batch)
      out.tick()
      dispatched.append(metrics)
      if len(dispatched) > AHEAD:
        jax.block_until_ready(dispatched.popleft())
      if pending:  # Read the last due metrics while the device works on this step.
        _report(out, *pending)
        pending = None
      if step % log_every_steps == 0 or step in (1, total_steps):
        pending = (step, metrics)
      last = step == total_steps
      if evaluate and (last or (evaluate_every_steps and step % evaluate_every_steps == 0)):
        result = evaluate(state)
        out.write(step, result)
      stop = terminated(step)
      if last or stop or checkpoints.due(step):
        if pending:  # A row up to a saved step is never lost, whatever happens next.
          _report(out, *pending)
          pending = None
        checkpoints.save(state, step)
      if stop and not last:
        telemetry.log.info("SIGTERM: saving step %d; the same command continues from there.", step)
        checkpoints.close()
        raise Preempted(PREEMPTED)
  return state, result


def _report(out: telemetry.Telemetry, step: int, metrics: dict[str, jax.Array]) -> None:
  values = {f"train/{name}": float(value) for name, value in jax.device_get(metrics).items()}
  out.write(step, {**values, **out.speed(step)})
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
