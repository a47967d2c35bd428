"""Checkpoints: what survives, what comes back, and what stops a load that does not fit."""

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from simclr_jax import errors
from simclr_jax.hardware import sharding
from simclr_jax.training import checkpoint
from simclr_jax.training import state as state_lib


@pytest.fixture
def state():
  """A small state, two steps of LARS old."""
  tree = {"encoder": {"kernel": jnp.arange(6.0).reshape(2, 3)}, "linear_head": {"bias": jnp.ones(4)}}
  stats = {"encoder": {"bn": {"mean": jnp.full(3, 0.5)}}}
  params, stats = jax.device_put((tree, stats), sharding.replicated(sharding.data_mesh()))
  tx = optax.lars(lambda count: 0.1 * (count + 1), momentum=0.9)
  state = state_lib.create(params, stats, tx)
  for _ in range(2):
    updates, opt_state = tx.update(jax.tree.map(jnp.ones_like, state.params), state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    state = state_lib.TrainState(state.step + 1, params, stats, opt_state)
  return state


def saved_steps(tmp_path):
  return sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir())


@pytest.mark.slow
def test_the_latest_and_the_multiples_stay(tmp_path, state):
  checkpoints = checkpoint.Checkpoints(str(tmp_path), {}, every_steps=1, keep=2, keep_every_steps=4)
  for step in range(1, 10):
    checkpoints.save(state, step)
  checkpoints.close()
  assert saved_steps(tmp_path) == [4, 8, 9]


@pytest.mark.parametrize(("every", "due"), [(0, []), (3, [3, 6, 9])])
def test_saves_are_due_at_the_interval(tmp_path, every, due):
  checkpoints = checkpoint.Checkpoints(str(tmp_path), {}, every_steps=every, keep=1)
  assert [step for step in range(1, 10) if checkpoints.due(step)] == due
  checkpoints.close()


@pytest.mark.devices(8)
def test_a_state_comes_back_bit_for_bit_where_it_belongs(tmp_path, state):
  first = checkpoint.Checkpoints(str(tmp_path), {"model": {"depth": 18}}, every_steps=1, keep=2)
  first.save(state, 2)
  first.close()
  blank = jax.tree.map(lambda x: jax.device_put(jnp.zeros_like(x), x.sharding), state)
  second = checkpoint.Checkpoints(str(tmp_path), {}, every_steps=1, keep=2)
  restored, step = second.restore_latest(blank)
  second.close()
  assert step == 2
  assert jax.tree.structure(restored) == jax.tree.structure(state)
  for ours, theirs in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
    assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()
    assert ours.sharding.is_equivalent_to(theirs.sharding, ours.ndim)


def test_without_a_checkpoint_the_state_starts_at_step_0(tmp_path, state):
  checkpoints = checkpoint.Checkpoints(str(tmp_path), {}, every_steps=1, keep=2)
  restored, step = checkpoints.restore_latest(state)
  checkpoints.close()
  assert restored is state
  assert step == 0


@pytest.fixture
def saved(tmp_path, state):
  checkpoints = checkpoint.Checkpoints(str(tmp_path), {"model": {"depth": 18}}, every_steps=1, keep=2)
  for step in (7, 12):
    checkpoints.save(state, step)
  checkpoints.close()
  return tmp_path


@pytest.mark.parametrize(("path", "step"), [("", "12"), ("checkpoints", "12"), ("checkpoints/7", "7")])
def test_a_run_its_checkpoints_and_one_of_them_can_be_named(saved, path, step):
  assert checkpoint.open(str(saved / path)).path.name == step


def test_a_checkpoint_carries_its_config(saved):
  assert checkpoint.open(str(saved)).config == {"model": {"depth": 18}}


def test_the_parts_asked_for_are_loaded(saved, state):
  params, stats = checkpoint.open(str(saved)).load(
    {"encoder": state.params["encoder"]}, {"encoder": state.batch_stats["encoder"]}
  )
  np.testing.assert_array_equal(params["encoder"]["kernel"], state.params["encoder"]["kernel"])
  np.testing.assert_array_equal(stats["encoder"]["bn"]["mean"], 0.5)
  assert set(params) == {"encoder"}


@pytest.mark.parametrize(
  ("params", "expected"),
  [
    ({"encoder": {"kernel": (2, 4)}}, "params/encoder/kernel is [2, 3], wanted [2, 4]"),
    ({"encoder": {"kernel": (2, 3), "bias": (4,)}}, "lacks the array params/encoder/bias [4]"),
    ({"encoder": {}}, "extra array params/encoder/kernel [2, 3]"),
    ({"projection_head": {"kernel": (2, 3)}}, "no params/projection_head; it holds encoder, linear_head"),
  ],
)
def test_an_array_that_does_not_fit_is_named_in_one_line(saved, state, params, expected):
  placement = sharding.replicated(sharding.data_mesh())
  abstract = jax.tree.map(
    lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=placement),
    params,
    is_leaf=lambda x: isinstance(x, tuple),
  )
  with pytest.raises(errors.UserError) as error:
    checkpoint.open(str(saved)).load(abstract, {"encoder": state.batch_stats["encoder"]})
  assert expected in str(error.value)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("path", ["nowhere", "empty"])
def test_a_path_without_a_checkpoint_is_named(tmp_path, path):
  (tmp_path / "empty").mkdir()
  with pytest.raises(errors.UserError, match=path):
    checkpoint.open(str(tmp_path / path))


@pytest.mark.devices(8)
def test_saving_on_eight_devices_compiles_no_program_for_each_shape(tmp_path, state):
  # Orbax cuts a replicated array into a slice for each device, each shape a program; small arrays are written whole.
  compiled = []
  listener = lambda event, seconds, **_: compiled.append(event) if "backend_compile" in event else None
  jax.monitoring.register_event_duration_secs_listener(listener)
  checkpoints = checkpoint.Checkpoints(str(tmp_path), {}, every_steps=1, keep=2)
  checkpoints.save(state, 2)
  checkpoints.close()
  jax.monitoring.unregister_event_duration_listener(listener)
  assert compiled == []


def test_a_network_without_batch_norm_comes_back(tmp_path, state):
  bare = state.replace(batch_stats={})
  for _ in range(2):  # The second one restores what the first one saved.
    checkpoints = checkpoint.Checkpoints(str(tmp_path), {}, every_steps=1, keep=2)
    restored, _ = checkpoints.restore_latest(bare)
    checkpoints.save(restored, 2)
    checkpoints.close()
  assert restored.batch_stats == {}
  params, stats = checkpoint.open(str(tmp_path)).load({"encoder": state.params["encoder"]}, {"encoder": {}})
  assert stats == {"encoder": {}}
  np.testing.assert_array_equal(params["encoder"]["kernel"], state.params["encoder"]["kernel"])
