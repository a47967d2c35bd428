"""The pretraining step: the reference's six-step trajectories, and the same numbers on one device and on eight."""

import flax
import float64_convolution
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_step
import trajectories

from simclr_jax.hardware import sharding
from simclr_jax.models import heads, resnet, simclr
from simclr_jax.training import objectives
from simclr_jax.training import state as state_lib


@pytest.mark.slow
@pytest.mark.large
# Three steps of momentum: the third loss follows from an update that the buffer went into.
@pytest.mark.parametrize(("name", "steps"), [("lars", 6), ("momentum", 3)])
def test_steps_are_the_reference_s(reference, monkeypatch, x64, name, steps):
  float64_convolution.patch(monkeypatch)
  case, mesh = trajectories.Case(reference("train_steps"), name), sharding.data_mesh()
  model = simclr.SimCLR(case.encoder, case.projection_head, case.linear_head)
  initial, (tx, rate) = case.variables(model, mesh), case.optimizer()
  before = jax.device_get(initial)
  state = state_lib.create(initial["params"], initial["batch_stats"], tx)
  objective = objectives.Contrastive(model, case.decay, temperature=case.flag("temperature"), scale=2.0, mesh=mesh)
  step_fn = small_step.jitted(objective, mesh, state, tx, rate)
  assert len(case.labels) == 6
  for t, (images, label) in enumerate(zip(case.images[:steps] / np.float64(255), case.labels[:steps], strict=True)):
    views = np.stack([images[..., :3], images[..., 3:]], axis=1)
    state, metrics = step_fn(state, sharding.global_batch(mesh, {"views": views, "label": label}))
    keys = ("contrast_acc", "contrast_entropy", "supervised_loss", "supervised_acc")
    keys += ("weight_decay", "total_loss", "grad_norm")
    wanted = {"loss": case.get("contrast_loss")[t] / 2, **{key: case.get(key)[t] for key in keys}}
    for key, value in wanted.items():
      np.testing.assert_allclose(metrics[key], value, rtol=1e-6, err_msg=f"{key} of step {t}")
    np.testing.assert_allclose(metrics["learning_rate"], case.get("learning_rate")[t], rtol=1e-6, atol=1e-12)
  if steps == 6:
    assert case.assert_variables(before, state) == len(case.paths)


def two_steps(devices):
  """Returns the metrics of the first of two steps on so many devices, the state after it, both sums of updates."""
  types = {"dtype": jnp.float64, "param_dtype": jnp.float64}
  encoder = resnet.ResNet(depth=10, width=1 / 8, small_images=True, **types)
  model = simclr.SimCLR(encoder, heads.ProjectionHead(2, 32, **types), heads.LinearHead(10, **types))
  mesh = sharding.data_mesh(jax.devices()[:devices])
  assert mesh.size == devices
  state, tx, rate = small_step.start(model, mesh)
  step_fn = small_step.jitted(small_step.contrastive(model, mesh), mesh, state, tx, rate, micro_batches=2)
  rng = np.random.default_rng(0)
  rows = {"views": rng.random((48, 2, 8, 8, 3)), "label": rng.integers(0, 10, 48, np.int32)}
  before, results = jax.device_get(state.params), []
  for _ in range(2):
    state, metrics = step_fn(state, sharding.global_batch(mesh, rows))
    results.append(jax.device_get((metrics, flax.serialization.to_state_dict(state))))
  updates = [jax.tree.map(np.subtract, after["params"], before) for _, after in results]
  return *results[0], updates


def assert_equal_leaves(ours, theirs, tolerance):
  for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
    largest = np.max(np.abs(b), initial=1e-30)
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * largest, err_msg=jax.tree_util.keystr(path))


@pytest.mark.slow
@pytest.mark.devices(8)
def test_eight_devices_take_the_steps_of_one_in_micro_batches(x64, monkeypatch):
  float64_convolution.patch(monkeypatch)
  assert_equal_leaves(two_steps(8), two_steps(1), 1e-9)
