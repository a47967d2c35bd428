"""The queue of negatives: the loss against its definition, the step on any devices, exact resumption."""

import functools
import re

import flax
import float64_convolution
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_step

from simclr_jax import config as config_lib
from simclr_jax import errors, experiment, losses
from simclr_jax.hardware import cost, sharding
from simclr_jax.losses import negatives
from simclr_jax.training import checkpoint
from simclr_jax.training import state as state_lib

DECAY = 0.999  # The objective's default.
VIEWS = 2 * small_step.IMAGES


def random_views(n, dim, seed=0, noise=1.0, dtype=np.float64):
  rng = np.random.default_rng(seed)
  return (rng.normal(size=(n, 1, dim)) + noise * rng.normal(size=(n, 2, dim))).astype(dtype)


def twin(kind, z, older, temperature, normalize=True):
  """Returns loss and gradient [N, 2, D] with negatives `older` [M, D], a row at a time in float64."""
  z = np.asarray(z, np.float64)
  n, _, dim = z.shape
  rows = z.reshape(2 * n, dim)
  norms = np.linalg.norm(rows, axis=1, keepdims=True)
  u = rows / norms if normalize else rows
  candidates = np.concatenate([u, older])
  loss, grad = 0.0, np.zeros_like(u)
  for i in range(2 * n):
    chosen = np.arange(len(candidates)) != i
    if kind == "dcl":
      chosen &= np.arange(len(candidates)) != (i ^ 1)
    logits = candidates @ u[i] / temperature
    p = np.where(chosen, np.exp(logits - logits.max()), 0)
    loss += np.log(p.sum()) + logits.max() - logits[i ^ 1]
    slope = p / p.sum()
    slope[i ^ 1] -= 1
    grad[i] += slope @ candidates
    grad += slope[: 2 * n, None] * u[i]
  grad /= 2 * n * temperature
  if normalize:
    grad = (grad - u * np.sum(u * grad, axis=1, keepdims=True)) / norms
  return loss / (2 * n), grad.reshape(z.shape)


@functools.partial(jax.jit, static_argnames=("kind", "normalize", "mesh", "block_size"))
def evaluate(z, temperature, queue, filled, kind, **options):
  """Returns ((loss, metrics), gradients of z and temperature)."""

  def loss_fn(z, temperature):
    return losses.contrast(kind, z, temperature=temperature, queue=queue, filled=filled, **options)

  return jax.value_and_grad(loss_fn, (0, 1), has_aux=True)(z, temperature)


@pytest.mark.slow
@pytest.mark.devices(8)
@pytest.mark.parametrize(("kind", "normalize"), [("nt_xent", True), ("nt_xent", False), ("dcl", True)])
def test_value_and_gradients_are_the_definition_on_any_mesh(kind, normalize, x64):
  z = random_views(16, 5, seed=3, noise=0.5)
  queue = np.random.default_rng(4).normal(size=(24, 5))
  at_hand = random_views(16, 5, seed=3, noise=0.5)
  metrics_alone = jax.jit(functools.partial(losses.nt_xent, temperature=0.4, normalize=normalize))(at_hand)[1]
  for mesh, block_size in ((None, 7), (sharding.data_mesh(), None)):
    for filled in (0, 13, 24):
      want_loss, want_grad = twin(kind, z, queue[:filled], 0.4, normalize)
      ahead, behind = (twin(kind, z, queue[:filled], 0.4 + h, normalize)[0] for h in (1e-6, -1e-6))
      (loss, metrics), (grad, slope) = evaluate(
        z, 0.4, queue, filled, kind, normalize=normalize, mesh=mesh, block_size=block_size
      )
      np.testing.assert_allclose(loss, want_loss, rtol=1e-12)
      np.testing.assert_allclose(grad, want_grad, rtol=0, atol=1e-12 * np.abs(want_grad).max())
      np.testing.assert_allclose(slope, (ahead - behind) / 2e-6, rtol=1e-7)
      # The metrics are those of the batch alone, whatever the queue holds.
      for name, value in metrics_alone.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-12)


def test_the_queue_gets_no_gradient_and_float32_keeps_its_digits():
  z = random_views(16, 64, noise=0.01, dtype=np.float32)
  older = random_views(12, 64, seed=8, dtype=np.float64).reshape(24, 64)
  older /= np.linalg.norm(older, axis=1, keepdims=True)

  def loss_fn(z, queue):
    return losses.contrast("nt_xent", z, temperature=0.1, queue=queue)[0]

  loss, (grad, into_queue) = jax.jit(jax.value_and_grad(loss_fn, (0, 1)))(z, jnp.asarray(older, jnp.float32))
  want_loss, want_grad = twin("nt_xent", z, older, 0.1)
  assert want_loss < 0.05
  np.testing.assert_allclose(loss, want_loss, rtol=1e-5)
  np.testing.assert_allclose(grad, want_grad, rtol=0, atol=1e-5 * np.abs(want_grad).max())
  np.testing.assert_array_equal(into_queue, 0)


@pytest.mark.slow
@pytest.mark.optimized
@pytest.mark.devices(8)
def test_a_queue_adds_no_exchange_and_its_logits_are_never_whole():
  mesh, size = sharding.data_mesh(), 1024
  z = jax.ShapeDtypeStruct((64, 2, 4), jnp.float32, sharding=sharding.batched(mesh))
  queue = jax.ShapeDtypeStruct((size, 4), jnp.float32, sharding=sharding.replicated(mesh))

  def loss_fn(z, queue):
    return losses.contrast("nt_xent", z, temperature=0.1, queue=queue, filled=5, mesh=mesh, block_size=16)

  hlo = jax.jit(jax.value_and_grad(loss_fn, has_aux=True)).lower(z, queue).compile().as_text()
  found = re.findall(r"= (.*?) (all-\w+|reduce-scatter|collective-\w+|ragged-\S+)(?:-start)?\(", hlo)
  assert sum(operation == "all-gather" for _, operation in found) == 2
  assert {operation for _, operation in found} == {"all-gather", "all-reduce"}
  sizes = [np.prod([int(d) for d in dims.split(",")]) for dims in re.findall(r"\w\d+\[([\d,]+)\]", hlo)]
  assert 4 * size in sizes, "the queue is in the program"
  assert max(sizes) < 8 * size, "a device has 8 rows of each view"


def with_queue(state, batches):
  embedding = jax.eval_shape(lambda: jnp.zeros((2, 32), state.params["encoder"]["bn1"]["scale"].dtype))
  return state.replace(memory=negatives.create(state.params, embedding, batches * VIEWS))


def steps(devices, count, *, sharded=False, micro_batches=1, batches=2):
  """Returns the states (on the host) before and after each of `count` float64 steps, and the metrics."""
  model, mesh = small_step.network(np.float64), sharding.data_mesh(jax.devices()[:devices])
  state, tx, rate = small_step.start(model, mesh, sharded=sharded, optimizer="momentum")
  state = with_queue(state, batches)
  objective = small_step.contrastive(model, mesh, optimizer="momentum")
  step_fn = small_step.jitted(objective, mesh, state, tx, rate, micro_batches=micro_batches, sharded=sharded)
  states, metrics = [jax.device_get(state)], []
  for number in range(count):
    state, found = step_fn(state, sharding.global_batch(mesh, batch_of(number)))
    states.append(jax.device_get(state))
    metrics.append(jax.device_get(found))
  return states, metrics


def batch_of(step):
  """Returns the batch of one step: other images each time, the same ones in reverse."""
  batch = small_step.rows(np.float64)
  return {"views": np.roll(batch["views"], 5 * step, axis=0)[:, :: (-1) ** step] ** (1 + step), "label": batch["label"]}


def assert_equal_leaves(ours, theirs, tolerance):
  for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
    largest = np.max(np.abs(b), initial=1e-30)
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * largest, err_msg=jax.tree_util.keystr(path))


@pytest.fixture(scope="module")
def one_device():
  with jax.enable_x64(True), pytest.MonkeyPatch.context() as patches:
    float64_convolution.patch(patches)
    return steps(1, 3)


@pytest.mark.slow
def test_a_step_sees_older_embeddings_then_replaces_the_oldest(one_device, x64, monkeypatch):
  float64_convolution.patch(monkeypatch)
  states, metrics = one_device
  model = small_step.network(np.float64)

  @jax.jit
  def embed(params, batch_stats, views):
    variables = {"params": params, "batch_stats": batch_stats}
    (_, z, _), _ = model.apply(variables, views.reshape(VIEWS, 16, 16, 3), train=True, mutable=["batch_stats"])
    return z.reshape(-1, 2, 32)

  kept = np.zeros((2 * VIEWS, 32))
  slow = states[0].params
  for number, (before, after) in enumerate(zip(states[:-1], states[1:], strict=True)):
    views = batch_of(number)["views"]
    z = embed(before.params, before.batch_stats, views)
    loss, _ = twin("nt_xent", z, kept[: min(number, 2) * VIEWS], small_step.TEMPERATURE)
    np.testing.assert_allclose(metrics[number]["loss"], loss, rtol=1e-10)
    assert metrics[number]["memory_filled"] == min(number, 2) / 2
    older = np.asarray(embed(slow, before.batch_stats, views)).reshape(VIEWS, 32)
    place = (number % 2) * VIEWS
    kept[place : place + VIEWS] = older / np.linalg.norm(older, axis=1, keepdims=True)
    np.testing.assert_allclose(after.memory["buffer"], kept, rtol=0, atol=1e-11)
    slow = jax.tree.map(lambda old, new: DECAY * old + (1 - DECAY) * new, slow, after.params)
    assert after.memory["params"].keys() == {"encoder", "projection_head"}
    assert_equal_leaves(after.memory["params"], {part: slow[part] for part in after.memory["params"]}, 1e-12)
  assert np.abs(kept[:VIEWS] - kept[VIEWS:]).max() > 0.01


@pytest.mark.slow
@pytest.mark.devices(8)
def test_eight_devices_take_the_steps_of_one(one_device, x64, monkeypatch):
  float64_convolution.patch(monkeypatch)
  states, metrics = steps(8, 2)
  assert_equal_leaves(metrics, one_device[1][:2], 1e-9)
  as_dict = flax.serialization.to_state_dict
  assert_equal_leaves(as_dict(states[2]), as_dict(one_device[0][2]), 1e-9)


@pytest.mark.slow
@pytest.mark.devices(8)
def test_sharded_micro_batches_on_eight_devices_are_those_of_one(one_device, x64, monkeypatch):
  float64_convolution.patch(monkeypatch)
  (one, one_metrics), (eight, eight_metrics) = (
    steps(devices, 2, micro_batches=2, sharded=devices > 1) for devices in (1, 8)
  )
  assert_equal_leaves(eight_metrics, one_metrics, 1e-9)
  as_dict = flax.serialization.to_state_dict
  assert_equal_leaves(as_dict(eight[2]), as_dict(one[2]), 1e-9)
  # In parts or not, the order of the buffer is the batch's: these rows differ by BatchNorm's statistics alone.
  whole = one_device[0][1].memory["buffer"][:VIEWS]
  parts = one[1].memory["buffer"][:VIEWS]
  assert (whole @ parts.T).argmax(axis=1).tolist() == list(range(VIEWS))


@pytest.mark.slow
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path):
  model, mesh = small_step.network(np.float32), sharding.data_mesh()
  plain, tx, rate = small_step.start(model, mesh)
  fresh = lambda: with_queue(small_step.start(model, mesh)[0], 2)
  state = fresh()
  step_fn = small_step.jitted(small_step.contrastive(model, mesh), mesh, state, tx, rate)
  batch = lambda number: jax.tree.map(lambda x: x.astype(np.float32) if x.dtype == np.float64 else x, batch_of(number))
  take = lambda state, number: step_fn(state, sharding.global_batch(mesh, batch(number)))[0]
  keep = lambda: checkpoint.Checkpoints(str(tmp_path), {}, every_steps=1, keep=1)
  before = keep()
  for number in range(4):
    state = take(state, number)
    if number == 1:
      before.save(state, 2)
  before.close()
  after = keep()
  resumed, done = after.restore_latest(fresh())
  assert done == 2
  for number in (2, 3):
    resumed = take(resumed, number)
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(resumed), jax.device_get(state))
  # A run without a queue refuses this checkpoint.
  with pytest.raises(errors.UserError, match="extra array training/memory"):
    after.restore_latest(plain)
  after.close()


def test_a_plan_counts_the_queue_and_its_pass():
  def planned(**keys):
    this = experiment.Experiment(config_lib.load("demo", keys), "plan")
    model = this.network.pretraining_model(4)
    return this.network, model, this.abstract_state(model, this.optimizer(6000).tx)

  network, model, plain = planned()
  assert plain.memory is None
  forward = network.forward_flops(model, plain)
  with_one, _, state = planned(**{"memory.size": 1024})
  assert state.memory["buffer"].shape == (1024, 64)
  weights = state_lib.count(plain.params["encoder"]) + state_lib.count(plain.params["projection_head"])
  assert cost.bytes_per_device(state.memory) == 4 * (weights + 1024 * 64)
  # A forward pass of 128 images, and scores and their gradient for 256 views against 1024 embeddings of 64 numbers.
  added = with_one.step_flops(forward) - network.step_flops(forward)
  assert added == 128 * forward + 2 * (2 * 256 * 1024 * 64)


def test_without_a_queue_nothing_of_it_is_saved(tmp_path):
  state = small_step.start(small_step.network(np.float32), sharding.data_mesh())[0]
  assert len(jax.tree.leaves(state)) == len(jax.tree.leaves((0, state.params, state.batch_stats, state.opt_state)))
  kept = checkpoint.Checkpoints(str(tmp_path), {}, every_steps=1, keep=1)
  kept.save(state, 1)
  kept.close()
  kept = checkpoint.Checkpoints(str(tmp_path), {}, every_steps=1, keep=1)
  assert kept.restore_latest(state)[0].memory is None
  with pytest.raises(errors.UserError, match="lacks the array training/memory/buffer"):
    kept.restore_latest(with_queue(state, 1))
  kept.close()


@pytest.mark.parametrize(
  ("size", "decay", "kind", "says"),
  [
    (65536, 0.999, "nt_xent", None),
    (0, 7.0, "sup_con", None),
    (4096, 0.999, "nt_xent", "use a multiple of 8192, for example 8192"),
    (65537, 0.999, "nt_xent", "for example 65536"),
    (-8192, 0.999, "nt_xent", "multiple"),
    (8192, 1.0, "nt_xent", "config.memory.decay is 1.0"),
    (8192, 0.999, "sup_con", "use nt_xent or dcl"),
    (8192, 0.999, "margin", "use nt_xent or dcl"),
  ],
)
def test_a_queue_that_does_not_fit_is_refused_in_one_line(size, decay, kind, says):
  check = functools.partial(negatives.check, size, decay, batch_size=4096, kind=kind)
  if says is None:
    check()
    return
  with pytest.raises(errors.UserError, match=re.escape(says)) as caught:
    check()
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
  ("kind", "queue", "says"),
  [("sup_con", (8, 4), "use nt_xent or dcl"), ("nt_xent", (8, 5), "wants [M, 4]"), ("dcl", (0, 4), "wants [M, 4]")],
)
def test_a_wrong_queue_of_the_loss_is_named_in_one_line(kind, queue, says):
  with pytest.raises(errors.UserError, match=re.escape(says)) as caught:
    losses.contrast(kind, jnp.zeros((4, 2, 4)), np.arange(4), temperature=0.1, queue=jnp.zeros(queue))
  assert "\n" not in str(caught.value)


def test_averages_of_bfloat16_weights_move_as_far_as_they_should():
  mesh, embedding = sharding.data_mesh(), jax.ShapeDtypeStruct((2, 4), jnp.bfloat16)
  place = lambda value: {
    "encoder": {"kernel": jax.device_put(jnp.full(3, value, jnp.bfloat16), sharding.replicated(mesh))}
  }
  queue = negatives.create(place(0), embedding, 4)
  assert queue["params"]["encoder"]["kernel"].dtype == jnp.float32
  z = jnp.zeros((2, 2, 4), jnp.bfloat16)
  step = lambda number, queue: negatives.after(queue, number, z, place(1), decay=DECAY, mesh=None)
  moved = jax.jit(lambda queue: jax.lax.fori_loop(0, 3000, step, queue))(queue)
  np.testing.assert_allclose(moved["params"]["encoder"]["kernel"], 1 - DECAY**3000, rtol=1e-3)
