"""The loop and what it reports, with a step that counts."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from simclr_jax import checkpoint, errors, loop, sharding, telemetry
from simclr_jax import state as state_lib


def run(workdir, *, steps, data=None, every_steps=2, evaluate=None, evaluate_every_steps=0, log_every_steps=1):
  """Trains one number w by w += mean(batch) and returns it."""
  mesh = sharding.data_mesh()
  tx = optax.sgd(1.0)
  params = jax.device_put({"w": jnp.zeros(())}, sharding.replicated(mesh))
  seen = []

  def step_fn(state, batch):
    grads = {"w": -jnp.mean(batch["x"])}
    updates, opt_state = tx.update(grads, state.opt_state)
    params = optax.apply_updates(state.params, updates)
    return state_lib.TrainState(state.step + 1, params, state.batch_stats, opt_state), {"loss": params["w"]}

  def batches(start):
    for step in range(start, steps + 1):
      seen.append(step)
      yield {"x": np.full(8, data(step) if data else step, np.float32)}

  state, result = loop.train(
    state_lib.create(params, {}, tx),
    jax.jit(step_fn, donate_argnums=0),
    batches,
    mesh=mesh,
    workdir=str(workdir),
    total_steps=steps,
    batch_size=8,
    checkpoints=checkpoint.Checkpoints(str(workdir), {}, every_steps=every_steps, keep=2),
    log_every_steps=log_every_steps,
    title="test",
    show={"train/loss": "loss"},
    evaluate=evaluate,
    evaluate_every_steps=evaluate_every_steps,
  )
  return float(state.params["w"]), result, seen


def test_every_step_is_taken_once_and_logged_once(tmp_path):
  w, _, seen = run(tmp_path, steps=7)
  assert w == sum(range(7))
  assert seen == list(range(7))
  rows = telemetry.read_rows(str(tmp_path))
  assert [(row["step"], row["train/loss"]) for row in rows] == [(t, sum(range(t))) for t in range(1, 8)]
  assert all(row["speed/images_per_second"] > 0 and 0 <= row["speed/data_wait_share"] <= 1 for row in rows)


def test_a_longer_run_goes_on_from_the_newest_checkpoint_and_no_row_appears_twice(tmp_path):
  run(tmp_path, steps=5, every_steps=0)
  with (tmp_path / "metrics.jsonl").open("a") as file:
    file.write(json.dumps({"step": 6, "train/loss": 99.0}) + '\n{"step": 7, "tra')
  w, _, seen = run(tmp_path, steps=9)
  assert seen == [5, 6, 7, 8]
  assert w == sum(range(9))
  rows = telemetry.read_rows(str(tmp_path))
  assert [(row["step"], row["train/loss"]) for row in rows] == [(t, sum(range(t))) for t in range(1, 10)]


def test_a_finished_run_takes_no_step_but_is_evaluated(tmp_path):
  run(tmp_path, steps=4)
  w, result, seen = run(tmp_path, steps=4, evaluate=lambda state: {"eval/w": float(state.params["w"])})
  assert seen == []
  assert result == {"eval/w": w}


def test_evaluation_comes_at_its_interval_and_at_the_end(tmp_path):
  _, result, _ = run(tmp_path, steps=7, evaluate=lambda state: {"eval/step": int(state.step)}, evaluate_every_steps=3)
  rows = [row for row in telemetry.read_rows(str(tmp_path)) if "eval/step" in row]
  assert [(row["step"], row["eval/step"]) for row in rows] == [(3, 3), (6, 6), (7, 7)]
  assert result == {"eval/step": 7}


def test_a_diverged_run_stops_and_says_where(tmp_path):
  with pytest.raises(errors.UserError, match="train/loss is nan at step 3"):
    run(tmp_path, steps=9, data=lambda step: float("nan") if step == 2 else step)
  assert telemetry.read_rows(str(tmp_path))[-1]["train/loss"] is None


def test_the_loop_fetches_nothing_on_steps_that_are_not_logged(tmp_path):
  with jax.transfer_guard_device_to_host("disallow_explicit"):
    # CPU arrays are host memory, so the guard alone proves nothing here: count the reads too.
    reads = []
    original = jax.device_get
    jax.device_get = lambda x: reads.append(1) or original(x)
    try:
      run(tmp_path, steps=10, log_every_steps=5, every_steps=0)
    finally:
      jax.device_get = original
  assert len(reads) == 3  # Steps 1, 5 and 10.
