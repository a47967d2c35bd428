"""How images reach the step: cropped on the host and coloured inside the step, alike in any batch and on any mesh."""

import functools
import io
import itertools
import pathlib

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_step
from PIL import Image

from simclr_jax import __main__ as command
from simclr_jax import errors, optim
from simclr_jax.data import arrays, pipeline, sources
from simclr_jax.hardware import sharding
from simclr_jax.jobs import feed, pretrain, setup
from simclr_jax.training import state as state_lib

ROOT = pathlib.Path(__file__).parents[1]
SIZE = 16
TX = optim.momentum(lambda step: 0.1)


def config_of(**overrides):
  """Returns the CIFAR-10 config for small images, blur included; `data_shards=4` overrides data.shards."""
  known = {
    "batch_size": 16,
    "data.image_size": SIZE,
    "data.shards": 4,
    "data.resident": "false",
    "augment.blur_probability": 0.5,
  }
  changed = {name.replace("_", ".", 1) if "_" in name else name: value for name, value in overrides.items()}
  changed = {"batch_size" if name == "batch.size" else name: value for name, value in changed.items()}
  texts = {name: str(value) for name, value in (known | changed).items()}
  return command.load_config(f"{ROOT}/configs/cifar10.py", texts)


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
  return sources.in_memory(arrays.from_mapping({**named, "train_labels": np.arange(count) % 3}, "train"))


def by_example(batches):
  """Returns (example, epoch) -> views."""
  return {
    (int(index), int(epoch)): views
    for batch in batches
    for index, epoch, views in zip(batch["index"], batch["epoch"], np.asarray(batch["views"]), strict=True)
  }


@pytest.mark.parametrize("kind", ["jpeg", "png"])
def test_an_example_in_an_epoch_has_its_views_whatever_the_batch_around_it(kind):
  source, seen = source_of(kind=kind), []
  for batch_size, steps in ((8, 4), (16, 2)):
    images = feed.pairs(config_of(batch_size=batch_size), source, sharding.data_mesh())
    prepare = jax.jit(images.prepare)
    batches = [prepare(batch) for batch in itertools.islice(images.batches(0), steps)]
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
  # Of an image, the two views differ, and so do those of two epochs.
  first, second = next((small[index, 0], small[index, 1]) for index, epoch in small if epoch and (index, 0) in small)
  assert min(np.abs(first[0] - first[1]).max(), np.abs(first - second).max()) > 0.05


def test_another_seed_gives_other_crops_and_other_colours():
  source, views = source_of(), {}
  for order_seed, color_seed in ((0, 0), (0, 1), (1, 1)):
    transform, _ = feed.law_of_pairs(config_of(seed=order_seed))
    _, prepare = feed.law_of_pairs(config_of(seed=color_seed))
    order = {"batch_size": 16, "process_index": 0, "process_count": 1, "seed": order_seed}
    batch = next(pipeline.evaluation_batches(source, transform, **order))
    views[order_seed, color_seed] = np.asarray(jax.jit(prepare)({**batch, "epoch": 0 * batch["index"]})["views"])
  changed = lambda a, b: np.abs(views[a] - views[b]).max(axis=(1, 2, 3, 4))
  assert np.mean(changed((0, 0), (0, 1)) > 0.05) > 0.9
  assert np.mean(changed((0, 1), (1, 1)) > 0.05) > 0.9


def test_where_the_host_does_it_all_nothing_is_left_to_the_step():
  images = feed.pairs(config_of(augment_place="host"), source_of(), sharding.data_mesh())
  batch = next(images.batches(0))
  assert images.prepare(batch) is batch
  assert batch["views"].dtype == np.float32
  assert batch["views"].shape == (16, 2, SIZE, SIZE, 3)


def cropped_rows():
  """Returns a batch as the host gives it: crops, not coloured yet."""
  rng, count = np.random.default_rng(0), small_step.IMAGES
  return {
    "views": rng.integers(0, 256, (count, 2, SIZE, SIZE, 3), np.uint8),
    "label": rng.integers(0, 10, count, np.int32),
    "index": rng.permutation(count).astype(np.int32),
    "epoch": np.full(count, 3, np.int32),
  }


def step_on(mesh, state, model, prepare, **options):
  return setup.jitted(
    pretrain.train_step,
    mesh,
    state,
    model=model,
    tx=TX,
    schedule=lambda step: 0.1,
    mesh=mesh,
    temperature=0.2,
    normalize=True,
    loss_scale=2.0,
    weight_decay=1e-4,
    optimizer="momentum",
    prepare=prepare,
    **options,
  )


def test_a_step_that_augments_is_the_same_on_one_device_and_on_eight(x64):
  _, prepare = feed.law_of_pairs(config_of())

  def step(devices):
    model, mesh = small_step.network(jnp.float64), sharding.data_mesh(jax.devices()[:devices])
    state, _, _ = small_step.start(model, mesh, optimizer="momentum")
    state, metrics = step_on(mesh, state, model, prepare)(state, sharding.global_batch(mesh, cropped_rows()))
    return jax.device_get((metrics, flax.serialization.to_state_dict(state)))

  ours, theirs = step(8), step(1)
  for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max(), err_msg=jax.tree_util.keystr(path))


class Plain(nn.Module):
  """A network without batch norm: a row's embedding does not depend on the rows beside it."""

  @nn.compact
  def __call__(self, images, *, train):
    self.variable("batch_stats", "none", lambda: jnp.zeros(()))
    h = images.astype(jnp.float32).reshape(len(images), -1) - 0.5
    return h, nn.Dense(8, use_bias=False)(h), None


def plain_start(mesh):
  return state_lib.create(*state_lib.variables(Plain(), SIZE, 0, mesh), TX)


def test_in_micro_batches_a_step_sees_the_views_of_the_whole_batch():
  mesh = sharding.data_mesh()
  _, prepare = feed.law_of_pairs(config_of())
  rows = cropped_rows()
  seen = {**rows, "views": np.asarray(jax.jit(prepare)(rows)["views"])}

  def step(rows, prepare, **options):
    state = plain_start(mesh)
    state, metrics = step_on(mesh, state, Plain(), prepare, **options)(state, sharding.global_batch(mesh, rows))
    return float(metrics["loss"]), jax.device_get(state.params["Dense_0"]["kernel"])

  loss, kernel = step(seen, lambda batch: batch)
  for options in ({}, {"micro_batches": 2}):
    ours = step(rows, prepare, **options)
    np.testing.assert_allclose(ours[0], loss, rtol=1e-5)
    np.testing.assert_allclose(ours[1], kernel, rtol=0, atol=1e-5 * np.abs(kernel).max())


def test_streamed_steps_are_one_program_and_the_state_is_donated():
  mesh, config = sharding.data_mesh(), config_of()
  images = feed.pairs(config, source_of(), mesh)
  keywords = {"tx": TX, "schedule": lambda step: 0.1, "mesh": mesh, "temperature": 0.2, "normalize": True}
  keywords |= {"loss_scale": 2.0, "weight_decay": 0.0, "optimizer": "momentum", "prepare": images.prepare}
  state = plain_start(mesh)
  steps = images.steps(functools.partial(pretrain.train_step, model=Plain(), **keywords), state)
  assert steps.most == 1
  with steps.feeding(0) as arguments:
    for number in range(1, 5):
      before = state
      state, metrics = steps.step_fn(state, *arguments(1))
      assert all(leaf.is_deleted() for leaf in jax.tree.leaves((before.params, before.opt_state, before.step)))
      assert int(state.step) == number
      assert np.isfinite(metrics["loss"])
  assert steps.step_fn._cache_size() == 1


def pairs(config):
  return feed.pairs(config, source_of(), sharding.data_mesh())


def singles(config):
  return feed.singles(
    config, source_of(), sharding.data_mesh(), batch_size=32, min_area=0.08, key="finetune.batch_size"
  )


@pytest.mark.parametrize(
  ("ask", "overrides", "message"),
  [
    (pairs, {"batch_size": 32}, "20 training images cannot fill a batch of config.batch_size = 32; choose a smaller"),
    (singles, {}, "20 training images cannot fill a batch of config.finetune.batch_size = 32; choose a smaller"),
    (pairs, {"augment_resize": "bicubc"}, "config.augment.resize is 'bicubc'; did you mean \"bicubic\""),
    (singles, {"augment_resize": "area"}, "config.augment.resize is 'area'; use bicubic, bilinear"),
    (pairs, {"augment_dtype": "float16"}, "config.augment.dtype is 'float16'.*bfloat16"),
    (pretrain.mesh_of, {"augment_place": "devices"}, "config.augment.place is 'devices'; did you mean \"device\""),
    (
      lambda config: setup.source_of(config, "train"),
      {"data_resident": "true", "augment_place": "host", "data_source": "shapes"},
      "config.data.resident augments on the devices, config.augment.place is 'host'; set it to device",
    ),
  ],
)
def test_what_does_not_fit_is_a_user_error(ask, overrides, message):
  with pytest.raises(errors.UserError, match=message) as error:
    ask(config_of(**overrides))
  assert "\n" not in str(error.value)
