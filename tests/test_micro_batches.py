"""Micro-batches, split parameters and rematerialisation: one step, computed in other ways, is the same step."""

import re

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_step

from simclr_jax import losses, optim
from simclr_jax.hardware import cost, sharding
from simclr_jax.jobs import setup
from simclr_jax.models import resnet
from simclr_jax.training import state as state_lib


def assert_equal_leaves(ours, theirs, tolerance):
  for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
    largest = np.max(np.abs(b), initial=1e-30)
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * largest, err_msg=jax.tree_util.keystr(path))


def unchunked_step_with_grouped_statistics(groups, loss_kind, dtype):
  """Returns what a micro-batched step should: one plain gradient through all groups side by side, by momentum."""
  model, mesh = small_step.network(dtype), sharding.data_mesh(jax.devices()[:1])
  state, tx, rate = small_step.start(model, mesh, optimizer="momentum")
  batch = small_step.rows(dtype)

  def loss_fn(params):
    images = batch["views"].reshape(small_step.IMAGES // groups, groups, 2, 16, 16, 3).swapaxes(0, 1)

    def group(images):
      variables = {"params": params, "batch_stats": state.batch_stats}
      return model.apply(variables, images.reshape(-1, 16, 16, 3), train=True, mutable=["batch_stats"])

    (_, z, logits), updates = jax.vmap(group)(images)
    ungroup = lambda x: (
      x.reshape(groups, small_step.IMAGES // groups, 2, -1).swapaxes(0, 1).reshape(small_step.IMAGES, 2, -1)
    )
    contrast, metrics = losses.contrast(loss_kind, ungroup(z), batch["label"], temperature=small_step.TEMPERATURE)
    supervised, accuracy = setup.cross_entropy(
      ungroup(logits).reshape(2 * small_step.IMAGES, -1), batch["label"].repeat(2)
    )
    decay = optim.weight_decay_loss(params, small_step.WEIGHT_DECAY, optimizer="momentum")
    total = small_step.LOSS_SCALE * contrast + supervised + decay
    metrics |= {"loss": contrast, "supervised_loss": supervised, "supervised_acc": accuracy}
    return total, (metrics | {"weight_decay": decay, "total_loss": total}, updates["batch_stats"])

  grads, (metrics, batch_stats) = jax.jit(jax.grad(loss_fn, has_aux=True))(state.params)
  updates, opt_state = tx.update(grads, state.opt_state, state.params)
  batch_stats = jax.tree.map(lambda x: x.mean(axis=0), batch_stats)
  params = jax.tree.map(jnp.add, state.params, updates)
  after = state_lib.TrainState(state.step + 1, params, batch_stats, opt_state)
  norm = jnp.sqrt(sum(jnp.sum(x**2) for x in jax.tree.leaves(grads)))
  metrics |= {"grad_norm": norm, "learning_rate": rate(0)}
  return jax.device_get((metrics, flax.serialization.to_state_dict(after)))


@pytest.mark.slow
@pytest.mark.parametrize("loss_kind", losses.BLOCKWISE)
def test_micro_batches_take_the_step_of_the_unchunked_model_with_grouped_statistics(loss_kind, x64):
  wanted = unchunked_step_with_grouped_statistics(3, loss_kind, np.float64)
  for devices in (1, 8):
    got = small_step.step(devices, np.float64, micro_batches=3, loss_kind=loss_kind, optimizer="momentum")
    assert got[0].keys() == wanted[0].keys()
    assert_equal_leaves(got, wanted, 1e-9)


def test_micro_batches_in_float32_see_the_same_loss_and_statistics():
  wanted, got = (small_step.step(devices, np.float32, micro_batches=2) for devices in (1, 8))
  for key in ("loss", "contrast_acc", "contrast_entropy", "contrast_top1", "supervised_loss"):
    np.testing.assert_allclose(got[0][key], wanted[0][key], rtol=1e-5)
  assert_equal_leaves(got[1]["batch_stats"], wanted[1]["batch_stats"], 1e-5)


def test_eight_devices_take_the_step_of_one_with_momentum_too(x64):
  one, eight = (small_step.step(devices, np.float64, optimizer="momentum") for devices in (1, 8))
  assert_equal_leaves(eight, one, 1e-9)


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_split_parameters_take_the_step_of_replicated_ones(micro_batches, x64):
  wanted = small_step.step(1, np.float64, micro_batches=micro_batches)
  assert_equal_leaves(small_step.step(8, np.float64, micro_batches=micro_batches, split=True), wanted, 1e-9)


def test_large_parameters_and_their_momentum_are_split_and_stay_split():
  mesh = sharding.data_mesh()
  state, *_ = small_step.start(small_step.network(np.float32), mesh, split=True)
  kernel = lambda tree: tree["encoder"]["conv2"]["kernel"]
  momentum = [x for x in jax.tree.leaves(state.opt_state) if x.shape == kernel(state.params).shape]
  for array in (kernel(state.params), *momentum):
    assert {shard.data.shape for shard in array.addressable_shards} == {(3, 3, 32, 8)}
  assert len(momentum) == 1
  assert state.params["encoder"]["bn1"]["scale"].is_fully_replicated
  assert state.batch_stats["encoder"]["bn1"]["mean"].is_fully_replicated


MIXED = "none,blocks,none,convs"


def test_rematerialisation_changes_no_gradient(x64):
  images = np.random.default_rng(0).random((4, 16, 16, 3))

  def gradient_of(remat, dtype):
    model = resnet.ResNet(depth=10, width=1 / 16, remat=remat, dtype=dtype, param_dtype=dtype)
    shapes = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), images)
    rng = np.random.default_rng(1)
    variables = jax.tree.map(lambda x: np.abs(rng.normal(size=x.shape)) / np.prod(x.shape[:-1]) ** 0.5, shapes)

    def loss_fn(params):
      h, updates = model.apply({**variables, "params": params}, images, train=True, mutable=["batch_stats"])
      return jnp.sum(h**2), updates

    return jax.grad(loss_fn, has_aux=True), variables["params"]

  def convolutions(remat):
    function, params = gradient_of(remat, np.float32)
    return str(jax.make_jaxpr(function)(params)).count("conv_general_dilated[")

  wanted, got = (
    jax.jit(function)(params) for function, params in (gradient_of(r, np.float64) for r in ("none", MIXED))
  )
  assert_equal_leaves(got, wanted, 1e-9)
  assert convolutions(MIXED) - convolutions("none") == 3, "the second group's; the fourth keeps its own"


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_nothing_crosses_devices_but_embeddings_statistics_and_gradients(micro_batches):
  model, mesh, images = small_step.network(jnp.float32), sharding.data_mesh(), 264
  _, tx, rate = small_step.start(model, mesh)
  state = state_lib.abstract(model, 16, tx, mesh, split=False)
  at = sharding.batched(mesh)
  batch = {
    "views": jax.ShapeDtypeStruct((images, 2, 16, 16, 3), jnp.float32, sharding=at),
    "label": jax.ShapeDtypeStruct((images,), jnp.int32, sharding=at),
  }
  hlo = (
    small_step.jitted(model, mesh, state, tx, rate, micro_batches=micro_batches).lower(state, batch).compile().as_text()
  )

  # A device's rows of the logits of one view would be [66, 264].
  shapes = {tuple(map(int, dims.split(","))) for dims in re.findall(r"\w+\[([\d,]+)\]", hlo)}
  assert any(images in shape for shape in shapes), "the gathered embeddings are in the program"
  large = [shape for shape in shapes if len(shape) > 1 and sorted(shape)[-1] >= images and sorted(shape)[-2] >= 66]
  assert not large

  found = cost.collectives(hlo, 8)
  assert {item.kind for item in found} == {"all-gather", "all-reduce"}
  gathers = [item for item in found if item.kind == "all-gather"]
  assert [(item.purpose, item.calls) for item in gathers] == [("loss", 1), ("loss", 1)]
  assert sorted(item.bytes for item in gathers) == [images * 2 * 4, images * 2 * 32 * 4]
  # The compiler may transpose a gradient.
  sizes = lambda tree: {tuple(sorted(leaf.shape)) for leaf in jax.tree.leaves(tree)}
  names = {shape for item in found if item.kind == "all-reduce" for shape in item.shapes}
  reduced = {tuple(sorted(map(int, re.findall(r"\d+", name.removeprefix("f32"))))) for name in names}
  assert sizes(state.params) < reduced <= sizes(state.params) | sizes(state.batch_stats) | {()}
