"""The pretraining step: the reference's six-step trajectories, and the same numbers on one device and on eight."""

import functools

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import weights_by_name
from flax import traverse_util

from simclr_jax import optim
from simclr_jax.hardware import sharding
from simclr_jax.jobs import convert, pretrain
from simclr_jax.models import heads, resnet, simclr
from simclr_jax.released import names as reference
from simclr_jax.training import state as state_lib


def network(*, depth, projection_layers, dtype, width=1.0, out_dim=128, classes=10):
  types = {"dtype": dtype, "param_dtype": dtype}
  return simclr.SimCLR(
    resnet.ResNet(depth=depth, width=width, small_images=True, **types),
    heads.ProjectionHead(layers=projection_layers, out_dim=out_dim, **types),
    heads.LinearHead(classes, **types),
  )


def optimizer_and_schedule(name, *, weight_decay, **schedule):
  rate = optim.schedule(**schedule)
  return (optim.lars(rate, weight_decay=weight_decay) if name == "lars" else optim.momentum(rate)), rate


def jitted_step(model, tx, rate, mesh, **keywords):
  step = functools.partial(
    pretrain.train_step,
    model=model,
    tx=tx,
    schedule=rate,
    mesh=mesh,
    normalize=True,
    loss_scale=2.0,
    **keywords,
  )
  replicated, batched = sharding.replicated(mesh), sharding.batched(mesh)
  return jax.jit(step, in_shardings=(replicated, batched), out_shardings=replicated)


@pytest.mark.slow
def test_six_steps_are_the_reference_s(reference_cases, x64):
  arrays, case = reference_cases
  get = lambda key: arrays[f"{case}__{key}"]
  flag = lambda key: get(f"flag_{key}").item()
  model = network(depth=flag("resnet_depth"), projection_layers=flag("num_proj_layers"), dtype=jnp.float64)
  size = flag("image_size")
  tree = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), jnp.zeros((1, size, size, 3)))
  layers = reference.encoder_layers(flag("resnet_depth"), stem="small", selective=False, squeeze=False)
  paths = (
    reference.encoder_paths(layers) | reference.projection_paths(flag("num_proj_layers")) | reference.LINEAR_HEAD_PATHS
  )
  initial = convert.from_reference(weights_by_name.of_network(tree, paths, get("name_prefix").item()))
  initial = jax.tree.map(jnp.asarray, initial)

  examples, batch = get("n_train").item(), get("batch").item()
  tx, rate = optimizer_and_schedule(
    flag("optimizer"),
    weight_decay=flag("weight_decay"),
    base_learning_rate=flag("learning_rate"),
    batch_size=batch,
    scaling=flag("learning_rate_scaling"),
    warmup_steps=optim.warmup_steps(examples, flag("warmup_epochs"), batch),
    total_steps=optim.total_steps(examples, flag("train_epochs"), batch),
  )
  mesh = sharding.data_mesh(jax.devices()[:1])
  step = jitted_step(
    model,
    tx,
    rate,
    mesh,
    temperature=flag("temperature"),
    weight_decay=flag("weight_decay"),
    optimizer=flag("optimizer"),
  )
  initial = jax.device_put(initial, sharding.replicated(mesh))
  state = state_lib.create(initial["params"], initial["batch_stats"], tx)
  for t in range(len(arrays["labels"])):
    images = arrays["images"][t].astype(np.float64) / 255
    views = np.stack([images[..., :3], images[..., 3:]], axis=1)
    batch_t = {"views": views, "label": arrays["labels"][t].astype(np.int32)}
    state, metrics = step(state, jax.device_put(batch_t, sharding.batched(mesh)))
    wanted = {
      "loss": get("contrast_loss")[t] / 2,
      **{key: get(key)[t] for key in ("contrast_acc", "contrast_entropy", "supervised_loss", "supervised_acc")},
      **{key: get(key)[t] for key in ("weight_decay", "total_loss", "grad_norm")},
    }
    for key, value in wanted.items():
      np.testing.assert_allclose(metrics[key], value, rtol=1e-6, err_msg=f"{key} of step {t}")
    np.testing.assert_allclose(metrics["learning_rate"], get("learning_rate")[t], rtol=1e-6, atol=1e-12)

  before = traverse_util.flatten_dict(initial)
  after = traverse_util.flatten_dict({"params": state.params, "batch_stats": state.batch_stats})
  for i, name in enumerate(get("variable_names")):
    ours, start = np.asarray(after[paths[name]]), np.asarray(before[paths[name]])
    np.testing.assert_allclose(np.linalg.norm(ours), get("final_norm")[i], rtol=1e-6, err_msg=name)
    np.testing.assert_allclose(np.linalg.norm(ours - start), get("change_norm")[i], rtol=1e-6, err_msg=name)
    first = ours.ravel()[:4]
    np.testing.assert_allclose(first, get("final_first4")[i][: len(first)], rtol=1e-6, atol=1e-9, err_msg=name)


def one_step(devices, dtype, *, optimizer):
  """Returns loss, gradient norm, statistics and updated parameters after two steps on so many devices."""
  model = network(depth=10, width=0.25, projection_layers=2, out_dim=32, dtype=dtype)
  mesh = sharding.data_mesh(jax.devices()[:devices])
  tx, rate = optimizer_and_schedule(
    optimizer,
    weight_decay=1e-4,
    base_learning_rate=0.3,
    batch_size=256,
    scaling="linear",
    warmup_steps=0,
    total_steps=9,
  )
  step = jitted_step(model, tx, rate, mesh, temperature=0.2, weight_decay=1e-4, optimizer=optimizer)
  state = state_lib.create(*state_lib.variables(model, 16, 0, mesh), tx)
  rng = np.random.default_rng(0)
  rows = {"views": rng.random((24, 2, 16, 16, 3)).astype(dtype), "label": rng.integers(0, 10, 24, np.int32)}
  first, metrics = step(state, sharding.global_batch(mesh, rows))
  second, _ = step(first, sharding.global_batch(mesh, rows))
  gradients = jax.tree.map(lambda before, after: after - before, state.params, first.params)
  return jax.device_get((metrics, flax.serialization.to_state_dict(first), second.params, gradients))


def assert_equal_leaves(ours, theirs, tolerance):
  for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
    largest = np.max(np.abs(b), initial=1e-30)
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * largest, err_msg=jax.tree_util.keystr(path))


@pytest.mark.slow
def test_eight_devices_take_the_step_of_one_in_float64(x64):
  assert_equal_leaves(one_step(8, jnp.float64, optimizer="lars"), one_step(1, jnp.float64, optimizer="lars"), 1e-9)


@pytest.mark.slow
def test_eight_devices_see_the_loss_and_statistics_of_one_in_float32():
  (metrics8, first8, *_), (metrics1, first1, *_) = (one_step(n, jnp.float32, optimizer="lars") for n in (8, 1))
  for key in ("loss", "contrast_acc", "contrast_entropy", "contrast_top1", "supervised_loss"):
    np.testing.assert_allclose(metrics8[key], metrics1[key], rtol=1e-5)
  assert_equal_leaves(first8["batch_stats"], first1["batch_stats"], 1e-5)


@pytest.fixture(params=["lars", "momentum"])
def reference_cases(request, reference):
  arrays = globals_reference(reference)
  if request.param not in {name.split("__")[0] for name in arrays}:
    pytest.skip(f"the fixtures have no case {request.param}")
  return arrays, request.param


def globals_reference(reference_loader):
  return reference_loader("train_steps")
