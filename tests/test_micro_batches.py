"""Micro-batches, sharded parameters and rematerialisation: one step, computed in other ways, is the same step."""

import functools
import re

import flax
import float64_convolution
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_step
from flax import traverse_util
from plain_encoder import PlainEncoder

from simclr_jax import losses, optim
from simclr_jax.hardware import cost, sharding
from simclr_jax.models import heads, resnet, simclr
from simclr_jax.training import objectives
from simclr_jax.training import state as state_lib

N, CLASSES = small_step.IMAGES, 10
as_dict = flax.serialization.to_state_dict


def assert_equal_leaves(ours, theirs, tolerance):
  for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
    largest = np.max(np.abs(b), initial=1e-30)
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * largest, err_msg=jax.tree_util.keystr(path))


def assert_equal_steps(ours, theirs, rows):
  """Compares (metrics, state) to 1e-9; accuracies, float32 means over `rows` rows, as numbers of rows."""
  (ours, our_state), (theirs, their_state) = ours, theirs
  assert ours.keys() == theirs.keys()
  for name in ("supervised_acc", "accuracy", "agreement"):
    if name in theirs:
      ours, theirs = ({**metrics, name: np.round(rows * metrics[name], 3)} for metrics in (ours, theirs))
  assert_equal_leaves((ours, our_state), (theirs, their_state), 1e-9)


def grouped(network, rows, groups):
  """Returns the outputs f[n, ...] of a network that sees every `groups`-th row apart, and the mean of its statistics.

  Args:
    network: rows -> (outputs, batch_stats).
    rows: f[n, ...].
    groups: number of parts; part i holds the rows i, i + groups, i + 2 groups, ...
  """
  outputs, batch_stats = jax.vmap(network)(rows.reshape(-1, groups, *rows.shape[1:]).swapaxes(0, 1))
  ungroup = lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:])
  return jax.tree.map(ungroup, outputs), jax.tree.map(lambda x: x.mean(axis=0), batch_stats)


def one_update(state, tx, rate, loss_fn, trained):
  """Returns (metrics, state) after one plain gradient step of the parameters `trained`.

  Args:
    state: before the step.
    tx, rate: optimizer and schedule.
    loss_fn: trained -> (total loss, (metrics, batch_stats)).
    trained: the part of the parameters that learns.
  """
  grads, (metrics, batch_stats) = jax.grad(loss_fn, has_aux=True)(trained)
  updates, opt_state = jax.jit(tx.update)(grads, state.opt_state, trained)
  moved = traverse_util.flatten_dict(jax.tree.map(jnp.add, trained, updates))
  params = traverse_util.unflatten_dict(traverse_util.flatten_dict(state.params) | moved)
  norm = jnp.sqrt(sum(jnp.sum(x**2) for x in jax.tree.leaves(grads)))
  metrics |= {"grad_norm": norm, "learning_rate": rate(0)}
  after = state_lib.TrainState(state.step + 1, params, batch_stats, opt_state)
  return jax.device_get((metrics, as_dict(after)))


@functools.cache
def pair_network(groups):
  """Returns (params, batch_stats, views) -> ((z, logits), batch_stats); all losses share what is compiled of it."""
  model = small_step.network(np.float64)

  @jax.jit
  def apply(params, batch_stats, views):
    def network(views):
      variables = {"params": params, "batch_stats": batch_stats}
      (_, z, logits), updates = model.apply(
        variables, views.reshape(-1, *views.shape[2:]), train=True, mutable=["batch_stats"]
      )
      return (z.reshape(-1, 2, z.shape[-1]), logits.reshape(-1, 2, CLASSES)), updates["batch_stats"]

    return grouped(network, views, groups)

  return apply


@functools.cache
def contrastive_step_with_grouped_statistics(groups, kind):
  """Returns what a micro-batched step should: one plain gradient through all groups side by side, by momentum."""
  model, mesh = small_step.network(np.float64), sharding.data_mesh(jax.devices()[:1])
  state, tx, rate = small_step.start(model, mesh, optimizer="momentum")
  batch = small_step.rows(np.float64)

  @jax.jit
  def loss_of(z, logits, params):
    contrast, metrics = losses.contrast(kind, z, batch["label"], temperature=small_step.TEMPERATURE)
    supervised, accuracy = losses.cross_entropy(logits.reshape(-1, CLASSES), batch["label"].repeat(2))
    decay = optim.weight_decay_loss(params, small_step.WEIGHT_DECAY, optimizer="momentum")
    total = small_step.LOSS_SCALE * contrast + supervised + decay
    metrics |= {"loss": contrast, "supervised_loss": supervised, "supervised_acc": accuracy}
    return total, metrics | {"weight_decay": decay, "total_loss": total}

  def loss_fn(params):
    (z, logits), batch_stats = pair_network(groups)(params, state.batch_stats, batch["views"])
    total, metrics = loss_of(z, logits, params)
    return total, (metrics, batch_stats)

  return one_update(state, tx, rate, loss_fn, state.params)


@pytest.mark.slow
@pytest.mark.devices(8)
@pytest.mark.parametrize(
  ("kind", "devices", "sharded"),
  [("nt_xent", 1, False), ("nt_xent", 8, True), ("sup_con", 1, False), ("dcl", 8, False)],
)
def test_micro_batches_take_the_step_of_grouped_statistics(kind, devices, sharded, x64, monkeypatch):
  float64_convolution.patch(monkeypatch)
  wanted = contrastive_step_with_grouped_statistics(3, kind)
  options = {"micro_batches": 3, "kind": kind, "optimizer": "momentum", "sharded": sharded}
  assert_equal_steps(small_step.one_step(devices, np.float64, **options), wanted, 2 * N)


# Fine-tuning behind the first layer of the projection head, with the encoder's first stage frozen.


def classifier(after_stage=0, *, frozen_head=False, dtype=np.float64):
  types = {"dtype": dtype, "param_dtype": dtype}
  linear, head = heads.LinearHead(CLASSES, **types), heads.ProjectionHead(2, 32, **types)
  return simclr.Classifier(small_step.Encoder(dtype), linear, head, 1, after_stage, frozen_head)


def distillation_arrays():
  """Returns `labelled` bool[2 N] and the teacher's logits f[2 N, K], by example.

  The three parts of `image_rows` hold 7, 1 and 5 labelled images.
  """
  labelled = np.zeros(2 * N, bool)
  for part, count in enumerate((7, 1, 5)):
    labelled[image_rows()["index"][part::3][:count]] = True
  return labelled, np.random.default_rng(5).normal(size=(2 * N, CLASSES))


def image_rows():
  rng = np.random.default_rng(1)
  label = rng.integers(0, CLASSES, N, np.int32)
  return {"image": rng.random((N, 16, 16, 3)), "label": label, "index": rng.permutation(2 * N)[:N].astype(np.int32)}


LABEL_WEIGHT, SOFTENING = 0.3, 2.0


def supervised_objective(kind, model):
  """Returns the objective of fine-tuning or distillation, and its constants."""
  decay = objectives.Decay(small_step.WEIGHT_DECAY, "momentum")
  if kind == "classification":
    return objectives.Classification(model, decay), ()
  teacher_of = lambda rows, table: table[rows["index"]]
  keys = {"teacher_of": teacher_of, "temperature": SOFTENING, "label_weight": LABEL_WEIGHT}
  return objectives.Distillation(model, decay, **keys), distillation_arrays()


def supervised_loss(kind, logits, rows):
  """Returns the loss of the whole batch without its weight decay, and the metrics, from their definitions."""
  log_p = jax.nn.log_softmax(logits)
  cross_entropies = -log_p[np.arange(N), rows["label"]]
  if kind == "classification":
    loss = cross_entropies.mean()
    return loss, {"loss": loss, "accuracy": jnp.mean(logits.argmax(1) == rows["label"])}
  labelled, table = distillation_arrays()
  known, teacher = labelled[rows["index"]], table[rows["index"]]
  soft = -jnp.sum(jax.nn.softmax(teacher / SOFTENING) * jax.nn.log_softmax(logits / SOFTENING), axis=1)
  distilled, supervised = SOFTENING**2 * soft.mean(), cross_entropies[np.flatnonzero(known)].mean()
  loss = (1 - LABEL_WEIGHT) * distilled + LABEL_WEIGHT * supervised
  agreement = jnp.mean(logits.argmax(1) == teacher.argmax(1))
  terms = {"distill_loss": distilled, "supervised_loss": supervised}
  return loss, {**terms, "loss": loss, "agreement": agreement}


def start(model, mesh, *, sharded=False):
  """Returns the state of a classifier before the first step, its optimizer and schedule."""
  rate = optim.schedule(base_learning_rate=0.3, batch_size=256, scaling="linear", warmup_steps=0, total_steps=9)
  tx = optim.momentum(rate)
  params, batch_stats = small_step.drawn(state_lib.abstract_variables(model, 16, mesh, sharded=sharded))
  return state_lib.create(params, batch_stats, tx, functools.partial(simclr.trained_part, model)), tx, rate


def supervised_step(kind, model, devices, *, micro_batches=3, sharded=False):
  """Returns metrics and state after one step of fine-tuning or distillation."""
  mesh = sharding.data_mesh(jax.devices()[:devices])
  assert mesh.size == devices
  state, tx, rate = start(model, mesh, sharded=sharded)
  objective, constants = supervised_objective(kind, model)
  constants = jax.device_put(constants, sharding.replicated(mesh))
  keys = {"micro_batches": micro_batches, "sharded": sharded}
  step_fn = small_step.jitted(objective, mesh, state, tx, rate, *constants, **keys)
  state, metrics = step_fn(state, sharding.global_batch(mesh, image_rows()), *constants)
  if sharded:
    kernel = state.params["encoder"]["conv2"]["kernel"]
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(3, 3, 32, 8)}
  return jax.device_get((metrics, as_dict(state)))


def supervised_step_with_grouped_statistics(kind):
  """Returns what three micro-batches should: one plain gradient through three groups of images side by side."""
  model, mesh, rows = classifier(), sharding.data_mesh(jax.devices()[:1]), jax.tree.map(jnp.asarray, image_rows())
  state, tx, rate = start(model, mesh)
  params = state.params
  trained = {
    "encoder": {name: params["encoder"][name] for name in ("conv2", "bn2")},
    "linear_head": params["linear_head"],
    "projection_head": {name: params["projection_head"][name] for name in ("dense1", "bn1")},
  }

  @jax.jit
  def loss_fn(trained):
    merged = {part: {**params[part], **trained[part]} for part in params}

    def network(images):
      variables = {"params": merged, "batch_stats": state.batch_stats}
      logits, updates = model.apply(variables, images, train=True, mutable=["batch_stats"])
      return logits, updates["batch_stats"]

    logits, batch_stats = grouped(network, rows["image"], 3)
    loss, metrics = supervised_loss(kind, logits, rows)
    decay = (
      small_step.WEIGHT_DECAY
      / 2
      * sum(
        jnp.sum(leaf**2)
        for path, leaf in traverse_util.flatten_dict(trained).items()
        if path[-1] == "kernel" or path[0] == "linear_head"
      )
    )
    return loss + decay, ({**metrics, "weight_decay": decay, "total_loss": loss + decay}, batch_stats)

  return one_update(state, tx, rate, loss_fn, trained)


@pytest.mark.slow
@pytest.mark.devices(8)
@pytest.mark.parametrize("kind", ["classification", "distillation"])
def test_supervised_micro_batches_take_the_step_of_grouped_statistics(kind, x64, monkeypatch):
  float64_convolution.patch(monkeypatch)
  wanted = supervised_step_with_grouped_statistics(kind)
  before = as_dict(start(classifier(), sharding.data_mesh(jax.devices()[:1]))[0])
  for devices, sharded in ((1, False), (8, True)):
    got = supervised_step(kind, classifier(), devices, sharded=sharded)
    assert_equal_steps(got, wanted, N)
    for part, name in (("params", "conv1"), ("params", "bn1"), ("batch_stats", "bn1")):
      for leaf, kept in zip(*(jax.tree.leaves(x[part]["encoder"][name]) for x in (got[1], before)), strict=True):
        assert leaf.tobytes() == np.asarray(kept).tobytes(), f"{part} of {name} is frozen"
    assert_equal_leaves(got[1]["params"]["projection_head"]["dense2"], before["params"]["projection_head"]["dense2"], 0)


@pytest.mark.slow
@pytest.mark.devices(8)
def test_frozen_statistics_keep_their_bits_over_three_micro_batches():
  # The mean of three equal float32 numbers is not always that number.
  model, mesh = classifier(1, frozen_head=True, dtype=np.float32), sharding.data_mesh()
  for sharded in (False, True):
    state, tx, rate = start(model, mesh, sharded=sharded)
    third = lambda x: jax.device_put(np.linspace(0.1, 0.7, x.size, dtype=x.dtype), x.sharding)
    state = state.replace(batch_stats=jax.tree.map(third, state.batch_stats))
    before = jax.device_get(state)
    objective, _ = supervised_objective("classification", model)
    step_fn = small_step.jitted(objective, mesh, state, tx, rate, micro_batches=3, sharded=sharded)
    rows = jax.tree.map(lambda x: x.astype(np.float32) if x.dtype == np.float64 else x, image_rows())
    after = jax.device_get(step_fn(state, sharding.global_batch(mesh, rows))[0])
    assert_equal_leaves(after.batch_stats, before.batch_stats, 0)
    for part in ("encoder", "projection_head"):
      assert_equal_leaves(after.params[part], before.params[part], 0)
    assert np.any(after.params["linear_head"]["dense"]["kernel"] != before.params["linear_head"]["dense"]["kernel"])


# Without batch norm a row does not depend on its neighbours: the cut into parts changes nothing at all.


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["contrastive", "classification", "distillation"])
def test_without_batch_norm_micro_batches_are_the_whole_batch(kind, x64):
  types = {"dtype": np.float64, "param_dtype": np.float64}
  encoder, linear = PlainEncoder(8, **types), heads.LinearHead(CLASSES, **types)
  if kind == "contrastive":
    model = simclr.SimCLR(encoder, heads.ProjectionHead(0), linear)

    def after(micro_batches):
      mesh = sharding.data_mesh()
      state, tx, rate = small_step.start(model, mesh, optimizer="momentum")
      objective = small_step.contrastive(model, mesh, optimizer="momentum")
      step_fn = small_step.jitted(objective, mesh, state, tx, rate, micro_batches=micro_batches)
      state, metrics = step_fn(state, sharding.global_batch(mesh, small_step.rows(np.float64)))
      return jax.device_get((metrics, as_dict(state)))

  else:
    model = simclr.Classifier(encoder, linear, after_stage=1)

    def after(micro_batches):
      return supervised_step(kind, model, 1, micro_batches=micro_batches)

  whole, parts = after(1), after(3)
  assert whole[1]["batch_stats"] == {}
  assert_equal_steps(parts, whole, 2 * N if kind == "contrastive" else N)


@pytest.mark.slow
@pytest.mark.devices(8)
def test_sharded_parameters_take_the_step_of_replicated_ones(x64):
  wanted, got = (small_step.one_step(devices, np.float64, sharded=devices > 1) for devices in (1, 8))
  assert_equal_leaves(got, wanted, 1e-9)


@pytest.mark.devices(8)
def test_large_parameters_and_their_momentum_are_sharded():
  mesh = sharding.data_mesh()
  state, *_ = small_step.start(small_step.network(np.float32), mesh, sharded=True)
  kernel = lambda tree: tree["encoder"]["conv2"]["kernel"]
  momentum = [x for x in jax.tree.leaves(state.opt_state) if x.shape == kernel(state.params).shape]
  for array in (kernel(state.params), *momentum):
    assert {shard.data.shape for shard in array.addressable_shards} == {(3, 3, 32, 8)}
  assert len(momentum) == 1
  assert state.params["encoder"]["bn1"]["scale"].is_fully_replicated
  assert state.batch_stats["encoder"]["bn1"]["mean"].is_fully_replicated


MIXED = "none,blocks,none,convs"


@pytest.mark.slow
def test_rematerialisation_changes_no_gradient(x64, monkeypatch):
  images = np.random.default_rng(0).random((4, 8, 8, 3))

  def gradient_of(remat, dtype):
    model = resnet.ResNet(depth=10, width=1 / 16, small_images=True, remat=remat, dtype=dtype, param_dtype=dtype)
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

  assert convolutions(MIXED) - convolutions("none") == 3, "those of group 2; group 4 keeps its outputs"
  float64_convolution.patch(monkeypatch)
  wanted, got = (
    jax.jit(function)(params) for function, params in (gradient_of(r, np.float64) for r in ("none", MIXED))
  )
  assert_equal_leaves(got, wanted, 1e-9)


@pytest.mark.slow
@pytest.mark.optimized
@pytest.mark.devices(8)
def test_only_embeddings_statistics_and_gradients_cross_devices():
  model, mesh, images = small_step.network(jnp.float32), sharding.data_mesh(), 264
  _, tx, rate = small_step.start(model, mesh)
  state = state_lib.abstract(model, 16, tx, mesh, sharded=False)
  at = sharding.batched(mesh)
  batch = {
    "views": jax.ShapeDtypeStruct((images, 2, 16, 16, 3), jnp.float32, sharding=at),
    "label": jax.ShapeDtypeStruct((images,), jnp.int32, sharding=at),
  }
  objective = small_step.contrastive(model, mesh)
  step_fn = small_step.jitted(objective, mesh, state, tx, rate, micro_batches=3)
  hlo = step_fn.lower(state, batch).compile().as_text()

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
