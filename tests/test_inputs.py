"""How images reach the step: cropped on the host and coloured inside the step, alike in any batch and on any mesh."""

import functools
import io
import itertools

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_step
from PIL import Image
from plain_encoder import PlainEncoder

from simclr_jax import config, errors, experiment
from simclr_jax.data import arrays, inputs, order, pipeline
from simclr_jax.data.distortion import Distortion
from simclr_jax.hardware import sharding
from simclr_jax.models import heads, simclr
from simclr_jax.training import objectives, step

SIZE, SHARDS = 16, 4
DISTORTION = Distortion(SIZE, blur_probability=0.5)


def plan_of(batch_size=16, seed=0, **options):
  return inputs.Plan(order.Order(batch_size, SHARDS, seed), **options)


def source_of(count=20, kind="jpeg"):
  """Returns a source of encoded images of several sizes."""
  rng, held = np.random.default_rng(0), []
  for number in range(count):
    pixels = np.kron(rng.integers(0, 256, (4, 5, 3), np.uint8), np.ones((5 + number % 3, 6, 1), np.uint8))
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    held.append(stream.getvalue())
  offsets = np.cumsum([0, *map(len, held)])
  named = {"train_bytes": np.frombuffer(b"".join(held), np.uint8), "train_offsets": offsets}
  return arrays.from_mapping({**named, "train_labels": np.arange(count) % 3}, "train")


@functools.cache
def prepare_of(seed=0):
  """Returns the step's part of the augmentation, jitted; it depends on the seed alone, not on the batch size."""
  return jax.jit(inputs.pair_augmentation(DISTORTION, plan_of(seed=seed))[1])


def by_example(batches):
  """Returns (example, epoch) -> views."""
  return {
    (int(index), int(epoch)): views
    for batch in batches
    for index, epoch, views in zip(batch["index"], batch["epoch"], np.asarray(batch["views"]), strict=True)
  }


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["jpeg", "png"])
def test_views_of_an_example_do_not_depend_on_the_batch_around_it(kind):
  source, seen = source_of(kind=kind), []
  for batch_size, steps in ((8, 4), (16, 2)):
    images = inputs.pairs(source, DISTORTION, plan_of(batch_size), sharding.data_mesh())
    batches = [prepare_of()(batch) for batch in itertools.islice(images.batches(0), steps)]
    for batch in batches:
      assert batch["views"].shape == (batch_size, 2, SIZE, SIZE, 3)
      assert batch["views"].dtype == jnp.float32
      assert batch["views"].min() >= 0
      assert batch["views"].max() <= 1
    seen.append(by_example(batches))
  small, large = seen
  assert small.keys() == large.keys()
  assert {epoch for _, epoch in small} == {0, 1}
  for key, views in small.items():
    np.testing.assert_allclose(views, large[key], rtol=0, atol=1e-6)
  # The two views of an image differ, and so do its views in two epochs.
  first, second = next((small[index, 0], small[index, 1]) for index, epoch in small if epoch and (index, 0) in small)
  assert min(np.abs(first[0] - first[1]).max(), np.abs(first - second).max()) > 0.05


@pytest.mark.slow
def test_another_seed_gives_other_crops_and_other_colours():
  source, views = source_of(), {}
  for crop_seed, color_seed in ((0, 0), (0, 1), (1, 1)):
    transform, _ = inputs.pair_augmentation(DISTORTION, plan_of(seed=crop_seed))
    batch = next(pipeline.evaluation_batches(source, transform, batch_size=16, seed=crop_seed))
    prepared = prepare_of(color_seed)({**batch, "epoch": 0 * batch["index"]})
    views[crop_seed, color_seed] = np.asarray(prepared["views"])
  changed = lambda a, b: np.abs(views[a] - views[b]).max(axis=(1, 2, 3, 4))
  assert np.mean(changed((0, 0), (0, 1)) > 0.05) > 0.9
  assert np.mean(changed((0, 1), (1, 1)) > 0.05) > 0.9


def test_with_place_host_the_step_augments_nothing():
  images = inputs.pairs(source_of(), DISTORTION, plan_of(place="host"), sharding.data_mesh())
  batch = next(images.batches(0))
  assert images.prepare(batch) is batch
  assert batch["views"].dtype == np.float32
  assert batch["views"].shape == (16, 2, SIZE, SIZE, 3)


def cropped_rows(count=16):
  """Returns a batch as the host gives it: crops, not coloured yet."""
  rng = np.random.default_rng(0)
  return {
    "views": rng.integers(0, 256, (count, 2, SIZE, SIZE, 3), np.uint8),
    "label": rng.integers(0, 10, count, np.int32),
    "index": rng.permutation(count).astype(np.int32),
    "epoch": np.full(count, 3, np.int32),
  }


# Without batch norm the embedding of a row does not depend on the rows beside it.
TYPES = {"dtype": jnp.float64, "param_dtype": jnp.float64}
PLAIN = simclr.SimCLR(PlainEncoder(8), heads.ProjectionHead(0))
PLAIN64 = simclr.SimCLR(PlainEncoder(8, **TYPES), heads.ProjectionHead(0), heads.LinearHead(10, **TYPES))


@pytest.mark.slow
@pytest.mark.devices(8)
def test_a_step_sees_the_same_views_on_any_mesh_and_in_any_parts(x64):
  rows, (_, prepare) = cropped_rows(), inputs.pair_augmentation(DISTORTION, plan_of())
  seen = {**rows, "views": np.asarray(jax.jit(prepare)(rows)["views"])}

  def after_one_step(rows, devices=1, *, micro_batches=1, **options):
    mesh = sharding.data_mesh(jax.devices()[:devices])
    assert mesh.size == devices
    state, tx, rate = small_step.start(PLAIN64, mesh, optimizer="momentum")
    objective = small_step.contrastive(PLAIN64, mesh, optimizer="momentum", **options)
    step_fn = small_step.jitted(objective, mesh, state, tx, rate, micro_batches=micro_batches)
    state, metrics = step_fn(state, sharding.global_batch(mesh, rows))
    return jax.device_get((metrics, flax.serialization.to_state_dict(state)))

  theirs = after_one_step(seen)
  for devices, micro_batches in ((1, 1), (8, 2)):
    ours = after_one_step(rows, devices, micro_batches=micro_batches, prepare=prepare)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
      np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max(), err_msg=jax.tree_util.keystr(path))


@pytest.mark.slow
def test_streamed_steps_are_one_program_and_the_state_is_donated():
  mesh = sharding.data_mesh()
  images = inputs.pairs(source_of(), DISTORTION, plan_of(), mesh)
  state, tx, rate = small_step.start(PLAIN, mesh, optimizer="momentum")
  objective = small_step.contrastive(PLAIN, mesh, optimizer="momentum", prepare=images.prepare)
  keys = {"tx": tx, "schedule": rate, "placement": objectives.Placement(mesh)}
  step_fn = images.jit(functools.partial(step.train_step, objective=objective, **keys), state)
  assert images.steps_per_dispatch == 1
  with images.feeding(0) as arguments:
    for number in range(1, 5):
      before = state
      state, metrics = step_fn(state, *arguments(1))
      assert all(leaf.is_deleted() for leaf in jax.tree.leaves((before.params, before.opt_state, before.step)))
      assert int(state.step) == number
      assert np.isfinite(metrics["loss"])
  assert step_fn._cache_size() == 1


def pairs(**options):
  return inputs.pairs(source_of(), DISTORTION, plan_of(**options), sharding.data_mesh())


def singles(**options):
  return inputs.singles(source_of(), DISTORTION, plan_of(**options), sharding.data_mesh())


def experiment_of(**keys):
  overrides = {name.replace("__", "."): value for name, value in keys.items()}
  return experiment.Experiment(config.load("cifar10", overrides), "pretrain")


@pytest.mark.parametrize(
  ("ask", "options", "message"),
  [
    (pairs, {"batch_size": 32}, "20 training images cannot fill a batch of config.batch_size = 32; choose a smaller"),
    (
      singles,
      {"batch_size": 32, "batch_key": "finetune.batch_size"},
      "20 training images cannot fill a batch of config.finetune.batch_size = 32; choose a smaller",
    ),
    (experiment_of, {"augment__resize": "bicubc"}, "config.augment.resize is 'bicubc'; did you mean \"bicubic\""),
    (experiment_of, {"augment__resize": "area"}, "config.augment.resize is 'area'; use bicubic, bilinear"),
    (experiment_of, {"augment__dtype": "float16"}, "config.augment.dtype is 'float16'.*bfloat16"),
    (experiment_of, {"augment__place": "devices"}, "config.augment.place is 'devices'; did you mean \"device\""),
    (
      lambda **keys: experiment_of(**keys).images_of("train"),
      {"data__resident": "true", "augment__place": "host", "data__source": "shapes"},
      "config.data.resident augments on the devices, config.augment.place is 'host'; set it to device",
    ),
  ],
)
def test_what_does_not_fit_is_a_user_error(ask, options, message):
  with pytest.raises(errors.UserError, match=message) as error:
    ask(**options)
  assert "\n" not in str(error.value)
