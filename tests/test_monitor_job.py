"""The measures of pretraining on its own input and network: what they are of, and that measuring changes nothing."""

import pathlib

import jax
import numpy as np
import pytest
import small_step

from simclr_jax import __main__ as command
from simclr_jax import errors
from simclr_jax.data import arrays, shapes, sources, subset
from simclr_jax.evaluation import geometry, neighbours
from simclr_jax.hardware import sharding
from simclr_jax.jobs import feed, monitor, setup

ROOT = pathlib.Path(__file__).parents[1]
SMALL = [
  f"--config={ROOT}/configs/cifar10.py",
  "--config.data.source=shapes",
  "--config.data.examples=80",
  "--config.data.image_size=16",
  "--config.batch_size=16",
  "--config.eval_batch_size=24",
  "--config.monitor.knn_images=48",
  "--config.monitor.knn_neighbours=5",
  "--config.monitor.pairs=24",
]


def config_of(*more):
  _, file, overrides = command.parse([*SMALL, *more])
  return command.load_config(file, overrides)


def parts(devices, *more, dtype=np.float32):
  """Returns (model, its state with optimizer and schedule, evaluate, images) of a small network on so many devices."""
  config, mesh = config_of(*more), sharding.data_mesh(jax.devices()[:devices])
  model = small_step.network(dtype)
  train = setup.source_of(config, config.data.train_split)
  images = feed.pairs(config, train, mesh)
  evaluate = monitor.evaluate_of(config, model, mesh, train, monitor.views_of(config, images))
  return model, small_step.start(model, mesh), evaluate, images


@pytest.fixture(scope="module")
def one():
  """The parts on one device."""
  return parts(1)


@pytest.fixture(scope="module")
def measured(one):
  """The metrics of that network."""
  _, (state, _, _), evaluate, _ = one
  return evaluate(state)


def test_every_measure_is_there_and_in_its_range(measured):
  assert set(measured) == {
    *(f"eval/online_{name}" for name in ("top1", "top5", "loss", "examples")),
    *(f"eval/{name}" for name in ("knn_top1", "alignment", "uniformity", "rank_h", "rank_z")),
  }
  assert measured["eval/online_examples"] == 80
  assert 0 <= measured["eval/alignment"] <= 4
  assert -8 <= measured["eval/uniformity"] <= 0
  assert 1 <= measured["eval/rank_z"] <= 32
  assert 1 <= measured["eval/rank_h"] <= 48


def test_eight_devices_measure_what_one_does(x64):
  results = []
  for devices in (1, 8):
    _, (state, _, _), evaluate, _ = parts(devices, dtype=np.float64)
    results.append(evaluate(state))
  assert results[0] == pytest.approx(results[1], rel=1e-9)


def test_fed_images_are_measured_as_resident_ones(measured):
  _, (state, _, _), evaluate, _ = parts(8, "--config.data.resident=false")
  found = evaluate(state)
  assert set(found) == set(measured)
  # The pairs are others: the two feeds have orders of their own.
  for name in measured:
    if "online" in name:
      assert found[name] == pytest.approx(measured[name], rel=1e-5), name


def test_the_measures_are_of_the_pairs_and_images_that_they_say(one, measured):
  model, (state, _, _), _, images = one
  variables = {"params": state.params, "batch_stats": state.batch_stats}
  h_and_z = jax.jit(lambda images: model.apply(variables, images, train=False)[:2])
  # 24 pairs of two batches of 16: all of the first, then those that come first in the second.
  batches = [jax.jit(images.batch_of)(images.dataset, np.int32(step)) for step in (0, 1)]
  views = np.concatenate([jax.jit(images.prepare)(batch)["views"] for batch in batches])[:24]
  h, z = (np.asarray(x, np.float64).reshape(24, 2, -1) for x in h_and_z(views.reshape(48, 16, 16, 3)))
  assert measured["eval/alignment"] == pytest.approx(geometry.alignment(z), rel=1e-4)
  assert measured["eval/uniformity"] == pytest.approx(geometry.uniformity(z), rel=1e-4)
  assert measured["eval/rank_h"] == pytest.approx(geometry.effective_rank(h.reshape(48, -1)), rel=1e-4)

  (train, train_y), (test, test_y) = (shapes.draw(split, 80, 16, 0) for split in ("train", "test"))
  chosen = np.sort(np.random.default_rng(0).permutation(80)[:48])
  (x, _), (test_x, _) = (h_and_z(images.astype(np.float32) / 255) for images in (train[chosen], test))
  keys = {"neighbours": [5], "temperatures": [0.1], "classes": 10}
  (found,) = neighbours.accuracies((np.asarray(x), train_y[chosen]), (np.asarray(test_x), test_y), **keys)
  assert measured["eval/knn_top1"] == found["top1"]


def test_a_part_of_a_batch_is_taken_in_even_steps():
  config, mesh = config_of(), sharding.data_mesh()
  images = feed.pairs(config, setup.source_of(config, "train"), mesh)
  whole = jax.jit(images.batch_of)(images.dataset, np.int32(0))["index"]
  (rows,) = monitor._pairs(images, 8, 16)()
  np.testing.assert_array_equal(rows["index"], whole[::2])
  # The figure's, of a whole batch, the first ones.
  prepared = jax.jit(images.prepare)(jax.jit(images.batch_of)(images.dataset, np.int32(0)))["views"]
  shown = monitor.shown(monitor.views_of(config, images))
  np.testing.assert_allclose(shown, prepared[:12], rtol=0, atol=1e-6)
  with pytest.raises(errors.UserError, match="config.monitor.pairs 12 does not split over 8 devices"):
    monitor._pairs(images, 12, 16)


def test_a_second_evaluation_traces_no_network(one, measured, monkeypatch):
  _, (state, _, _), evaluate, _ = one
  traced = []
  monkeypatch.setattr(small_step.Encoder, "__call__", lambda *_, **__: traced.append(1))
  assert evaluate(state) == measured
  assert not traced


def test_without_labels_or_held_out_images_the_geometry_is_left():
  config, mesh = config_of("--config.data.eval_split="), sharding.data_mesh(jax.devices()[:1])
  model = small_step.network(np.float32)
  train = setup.source_of(config, "train")
  state, _, _ = small_step.start(model, mesh)
  views = monitor.views_of(config, feed.pairs(config, train, mesh))
  evaluate = monitor.evaluate_of(config, model, mesh, train, views)
  assert set(evaluate(state)) == {f"eval/{name}" for name in ("alignment", "uniformity", "rank_h", "rank_z")}
  nothing = config_of("--config.data.eval_split=", "--config.monitor.pairs=0")
  assert monitor.evaluate_of(nothing, model, mesh, train, None) is None
  with pytest.raises(errors.UserError, match="knn_neighbours is 0; use 1 or more"):
    monitor.evaluate_of(config_of("--config.monitor.knn_neighbours=0"), model, mesh, train, None)


def test_measuring_in_between_leaves_every_bit_of_the_training(one, measured):
  model, _, evaluate, images = one
  state, tx, rate = small_step.start(model, images.mesh)
  step_fn = small_step.jitted(model, images.mesh, state, tx, rate)
  batch = sharding.global_batch(images.mesh, small_step.rows(np.float32))
  ends = []
  for measure in (False, True):
    state, _, _ = small_step.start(model, images.mesh)
    for _ in range(3):
      if measure:
        evaluate(state)
      state, metrics = step_fn(state, batch)
    ends.append(jax.device_get((state, metrics)))
  for one, other in zip(*map(jax.tree.leaves, ends), strict=True):
    assert one.tobytes() == other.tobytes()


def test_a_sample_is_fixed_and_spread(tfds_dir):
  held = arrays.from_shapes("train", 80, 16, 0)
  chosen = subset.sample(held, 30, 4)
  rows = np.sort(np.random.default_rng(4).permutation(80)[:30])
  np.testing.assert_array_equal(chosen.images, held.images[rows])
  np.testing.assert_array_equal(chosen.labels, held.labels[rows])
  assert subset.sample(held, 80, 4) is held
  streamed = sources.load("tfds", name="imagenet2012", split="train", data_dir=tfds_dir)
  part = subset.sample(streamed, 20, 0)
  assert part.num_examples == 20
  assert len({piece.file for piece in part.pieces}) == 8
  known = subset.names_of(streamed)
  firsts = np.cumsum([0] + [piece.take for piece in streamed.pieces])[:-1]
  heads = {known[first + place] for first in firsts for place in range(3)}
  assert set(subset.names_of(part)) <= heads
