"""The loop and what it reports, with a step that counts."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from runs import ROOT

from simclr_jax import errors
from simclr_jax.data import inputs, prefetch
from simclr_jax.hardware import chips, sharding
from simclr_jax.training import checkpoint, loop, telemetry
from simclr_jax.training import state as state_lib

TX = optax.sgd(1.0)


def step_fn(state, batch):
  """Adds the mean of the batch to the one number w."""
  updates, opt_state = TX.update({"w": -jnp.mean(batch["x"])}, state.opt_state)
  params = optax.apply_updates(state.params, updates)
  return state_lib.TrainState(state.step + 1, params, state.batch_stats, opt_state), {"loss": params["w"]}


def streamed(mesh, data, steps, seen):
  def batches(start):
    for step in range(start, steps + 3):
      seen.append(step)
      yield {"x": np.full(8, data(step), np.float32)}

  return inputs.Streamed(mesh, lambda batch: batch, batches)


def resident(mesh, data, steps, most):
  """The same steps from a table of all batches on the devices."""
  table = jax.device_put(np.array([data(step) for step in range(steps + 1)], np.float32), sharding.replicated(mesh))
  batch_of = lambda table, step: {"x": table[step] * jnp.ones(8)}
  return inputs.Resident(mesh, lambda batch: batch, table, batch_of, most)


def run(workdir, *, steps, data=lambda step: step, most=0, every_steps=2, log_every_steps=1, guarded=False, **options):
  """Trains w by w += data(step) and returns it, the last evaluation, and the batches that were asked for."""
  mesh, seen = sharding.data_mesh(), []
  params = jax.device_put({"w": jnp.zeros(())}, sharding.replicated(mesh))
  state = state_lib.create(params, {}, TX)
  images = resident(mesh, data, steps, most) if most else streamed(mesh, data, steps, seen)
  # What the loop hands over it places itself: nothing is copied to or from the devices behind its back.
  with jax.transfer_guard("disallow") if guarded else contextlib.nullcontext():
    settings = loop.Run(
      str(workdir),
      steps,
      batch_size=8,
      checkpoints=checkpoint.Checkpoints(str(workdir), {}, every_steps=every_steps, keep=2),
      log_every_steps=log_every_steps,
      title="test",
      shown={"train/loss": "loss"},
      **options,
    )
    state, result = loop.train(state, images.jit(step_fn, state), images, settings)
  return float(state.params["w"]), result, seen


@pytest.mark.parametrize("most", [0, 1, 3])
def test_every_step_is_taken_once_and_logged_once(tmp_path, most):
  w, _, seen = run(tmp_path, steps=7, most=most)
  assert w == sum(range(7))
  assert seen[:7] == ([] if most else list(range(7)))
  rows = telemetry.read_rows(str(tmp_path))
  assert [(row["step"], row["train/loss"]) for row in rows] == [(t, sum(range(t))) for t in range(1, 8)]
  assert all(row["speed/images_per_second"] > 0 and 0 <= row["speed/data_wait_share"] <= 1 for row in rows)


def test_a_longer_run_continues_and_no_row_appears_twice(tmp_path):
  run(tmp_path, steps=5, every_steps=0)
  with (tmp_path / "metrics.jsonl").open("a") as file:
    file.write(json.dumps({"step": 6, "train/loss": 99.0}) + '\n{"step": 7, "tra')
  w, _, seen = run(tmp_path, steps=9)
  assert seen[:4] == [5, 6, 7, 8]
  assert w == sum(range(9))
  rows = telemetry.read_rows(str(tmp_path))
  assert [(row["step"], row["train/loss"]) for row in rows] == [(t, sum(range(t))) for t in range(1, 10)]


def test_a_finished_run_takes_no_step_but_is_evaluated(tmp_path):
  run(tmp_path, steps=4)
  w, result, seen = run(tmp_path, steps=4, evaluate=lambda state: {"eval/w": float(state.params["w"])})
  assert seen == []
  assert result == {"eval/w": w}


@pytest.mark.parametrize("most", [0, 5])
def test_evaluation_comes_at_its_interval_and_at_the_end(tmp_path, most):
  evaluate = lambda state: {"eval/step": int(state.step)}
  _, result, _ = run(tmp_path, steps=7, most=most, evaluate=evaluate, evaluate_every_steps=3)
  rows = [row for row in telemetry.read_rows(str(tmp_path)) if "eval/step" in row]
  assert [(row["step"], row["eval/step"]) for row in rows] == [(3, 3), (6, 6), (7, 7)]
  assert result == {"eval/step": 7}


def test_what_watches_a_run_sees_its_rows_and_evaluations(tmp_path):
  seen = []
  watch = lambda step, row: seen.append((step, row.get("train/loss"), row.get("eval/w")))
  evaluate = lambda state: {"eval/w": float(state.params["w"])}
  run(tmp_path, steps=5, log_every_steps=2, watch=watch, evaluate=evaluate)
  assert [entry[:2] for entry in seen if entry[1] is not None] == [(1, 0), (2, 1), (4, 6), (5, 10)]
  assert [entry for entry in seen if entry[1] is None] == [(5, None, 10)]


def test_a_diverged_run_stops_and_says_where(tmp_path):
  with pytest.raises(errors.UserError, match="train/loss is nan at step 3"):
    run(tmp_path, steps=9, data=lambda step: float("nan") if step == 2 else step)
  assert telemetry.read_rows(str(tmp_path))[-1]["train/loss"] is None


@pytest.mark.parametrize("most", [0, 4])
def test_steps_that_are_not_logged_fetch_nothing(tmp_path, most, monkeypatch):
  # CPU arrays are host memory, so that a guard of device-to-host transfers proves nothing here: count the reads.
  reads, device_get = [], jax.device_get
  monkeypatch.setattr(jax, "device_get", lambda x: reads.append(1) or device_get(x))
  run(tmp_path, steps=10, most=most, log_every_steps=5, every_steps=0, guarded=True)
  assert len(reads) == 3  # Steps 1, 5 and 10.


@pytest.mark.slow
@pytest.mark.optimized
def test_the_cut_into_dispatches_changes_no_bit(tmp_path):
  values = np.random.default_rng(0).normal(size=40)
  data = lambda step: values[step]
  whole = run(tmp_path / "a", steps=23, most=7, every_steps=0, data=data)[0]
  cut = run(tmp_path / "b", steps=23, most=7, every_steps=5, data=data, log_every_steps=4)[0]
  run(tmp_path / "c", steps=11, most=7, every_steps=0, data=data)
  continued = run(tmp_path / "c", steps=23, most=7, every_steps=0, data=data)[0]
  assert whole == cut == continued


def test_dispatches_grow_and_stop_where_something_is_due(tmp_path, monkeypatch):
  counts, feeding = [], inputs.Resident.feeding

  @contextlib.contextmanager
  def counted(self, done):
    with feeding(self, done) as arguments:
      yield lambda count: counts.append(count) or arguments(count)

  monkeypatch.setattr(inputs.Resident, "feeding", counted)
  run(tmp_path, steps=200, most=16, every_steps=50, log_every_steps=100)
  assert sum(counts) == 200
  assert counts[0] == 1
  assert max(counts) == 16
  assert {50, 100, 150} <= set(np.cumsum(counts).tolist())


def test_several_steps_are_one_program_whatever_their_number():
  mesh = sharding.data_mesh()
  images = resident(mesh, lambda step: step, 20, 5)
  state = state_lib.create(jax.device_put({"w": jnp.zeros(())}, sharding.replicated(mesh)), {}, TX)
  take = images.jit(step_fn, state)
  with images.feeding(0) as arguments:
    for count in (1, 5, 3, 1):
      state, metrics = take(state, *arguments(count))
  assert int(state.step) == 10
  assert float(state.params["w"]) == sum(range(10))
  assert metrics["loss"].shape == (5,)
  assert take._cache_size() == 1


def test_a_profile_of_the_asked_steps_is_written(tmp_path):
  run(tmp_path, steps=6, profile_steps=(3, 4))
  assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_a_profile_that_cannot_be_is_announced(tmp_path, caplog, monkeypatch):
  monkeypatch.setattr(telemetry.log, "propagate", True)
  run(tmp_path, steps=4, profile_steps=(9, 10))
  assert "No profile: step 9 is not among steps 1 to 4." in caplog.text
  assert not (tmp_path / "profile").exists()


def test_what_goes_wrong_in_the_input_is_raised_by_the_loop(tmp_path):
  def data(step):
    if step == 3:
      raise OSError("the disk is gone")
    return step

  with pytest.raises(OSError, match="the disk is gone"):
    run(tmp_path, steps=9, data=data)


def test_two_batches_wait_on_the_devices():
  mesh, taken = sharding.data_mesh(), []

  def rows():
    for number in range(100):
      taken.append(number)
      yield {"x": np.full(8, number, np.float32)}

  batches = prefetch.to_devices(rows(), mesh, ahead=2)
  first = next(batches)
  assert first["x"].sharding == sharding.batched(mesh)
  deadline = time.monotonic() + 10
  while len(taken) < 4 and time.monotonic() < deadline:
    time.sleep(0.01)
  time.sleep(0.05)
  assert len(taken) == 4  # One in use, two waiting, one at the door.
  assert [float(next(batches)["x"][0]) for _ in range(5)] == [1, 2, 3, 4, 5]
  batches.close()
  assert not [thread for thread in threading.enumerate() if thread.name == "prefetch"]


@pytest.mark.devices(4)
def test_model_flops_and_waits_are_reported_over_the_chips_peak(tmp_path, monkeypatch):
  clock = iter([0.0, 10.0, 12.0, 14.0, 15.0, 20.0, 24.0, 30.0, 31.0, 36.0])
  monkeypatch.setattr(telemetry.time, "monotonic", clock.__next__)
  monkeypatch.setitem(chips.CHIPS, "cpu", chips.Chip("test", 1, 1e9, 1, "", devices=2))
  meter = telemetry.Meter(64, 4e9, tuple(jax.devices()[:4]))
  with telemetry.Telemetry(str(tmp_path), total_steps=9, start_step=0, meter=meter, title="test") as out:
    with out.waiting_for("data"):
      pass  # 10 to 12
    with out.waiting_for("checkpoint"):
      pass  # 14 to 15
    out.tick(10)
    with out.aside():
      pass  # From 20 on.
    speed = out.speed(10)  # At 24, of 20 seconds of training.
    # The batches that were ready when the evaluation ended say nothing about the input.
    out.tick(telemetry.READY)  # at 30
    unknown = out.speed(12)  # at 31
    out.tick(6)
    later = out.speed(20)  # At 36: 6 steps since 30.
  assert speed == {
    "speed/images_per_second": 32.0,
    "speed/data_wait_share": 0.1,
    "speed/checkpoint_wait_share": 0.05,
    "speed/model_tflop_per_second": 2e-3,
    "speed/mfu": 1.0,
  }
  assert unknown == {}
  assert later["speed/images_per_second"] == 64.0


def test_the_first_ctrl_c_saves_and_the_second_leaves_at_once(tmp_path):
  # The thread that answers is not stopped by the main one, which waits as if it compiled.
  program = """
import signal, sys, time
from simclr_jax.training import interruption
with interruption.notice() as stop_after:
  print("ready", flush=True)
  end = time.monotonic() + 60
  while not stop_after(1) and time.monotonic() < end:
    time.sleep(0.01)
  print(stop_after(1).name, flush=True)
  time.sleep(60)
"""
  child = subprocess.Popen(
    [sys.executable, "-c", program],
    env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  assert child.stdout.readline() == "ready\n"
  child.send_signal(signal.SIGINT)
  assert child.stdout.readline() == "SIGINT\n"
  child.send_signal(signal.SIGINT)
  errors_of = child.communicate(timeout=10)[1]
  assert child.returncode == 130
  assert "Ctrl-C: the run stops after this step and saves; press it again to leave at once." in errors_of
  assert "Ctrl-C again: leaving without saving." in errors_of
