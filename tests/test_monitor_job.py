"""The measures of pretraining on its own input and network: what they are of, and that measuring changes nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_step
from runs import TINY

from simclr_jax import __main__ as command
from simclr_jax import config as config_lib
from simclr_jax import errors, experiment, figures
from simclr_jax.data import arrays, device_augment, shapes, source, sources
from simclr_jax.evaluation import features, geometry, neighbours
from simclr_jax.hardware import sharding
from simclr_jax.jobs import pretrain
from simclr_jax.training import symptoms

MEASURED = ["--config.monitor.knn_images=48", "--config.monitor.knn_neighbours=5", "--config.monitor.pairs=24"]
EIGHT = pytest.mark.devices(8)


def experiment_of(*more, devices=None):
  options, overrides = command.parse("pretrain", [*TINY, *MEASURED, *more])
  return experiment.Experiment(config_lib.load(options["config"], overrides), "pretrain", devices=devices)


def parts(devices, *more, dtype=np.float32):
  """Returns (model, its state with optimizer and schedule, evaluate, images) of a small network on so many devices."""
  this = experiment_of(*more, devices=jax.devices()[:devices])
  assert this.mesh.size == devices
  model, images = small_step.network(dtype), this.pairs(this.train)
  evaluate = pretrain._evaluate_of(this, model, pretrain._pairs_of(this, images).views)
  return model, small_step.start(model, this.mesh), evaluate, images


@pytest.fixture(scope="module")
def one():
  """The parts on one device."""
  return parts(1)


@pytest.fixture(scope="module")
def measured(one):
  """The metrics of that network."""
  _, (state, _, _), evaluate, _ = one
  return evaluate(state)


@pytest.mark.slow
def test_every_measure_is_there_and_in_its_range(measured):
  assert set(measured) == {
    *(f"eval/online_{name}" for name in ("top1", "balanced_top1", "top5", "loss", "examples")),
    *(f"eval/{name}" for name in ("knn_top1", "knn_balanced_top1", "alignment", "uniformity", "rank_h", "rank_z")),
  }
  assert measured["eval/online_examples"] == 80
  assert 0 <= measured["eval/alignment"] <= 4
  assert -8 <= measured["eval/uniformity"] <= 0
  assert 1 <= measured["eval/rank_z"] <= 32
  assert 1 <= measured["eval/rank_h"] <= 48


@pytest.mark.slow
@EIGHT
def test_eight_devices_measure_what_one_does(x64):
  results = []
  for devices in (1, 8):
    _, (state, _, _), evaluate, _ = parts(devices, dtype=np.float64)
    results.append(evaluate(state))
  assert results[0] == pytest.approx(results[1], rel=1e-9)


@pytest.mark.slow
def test_streamed_images_are_measured_as_resident_ones(measured):
  _, (state, _, _), evaluate, _ = parts(1, "--config.data.resident=false")
  found = evaluate(state)
  assert set(found) == set(measured)
  # The pairs differ: streamed and resident images have orders of their own.
  for name in measured:
    if "online" in name:
      assert found[name] == pytest.approx(measured[name], rel=1e-5), name


def test_the_measures_are_of_the_pairs_and_images_that_they_say(one, measured):
  model, (state, _, _), _, images = one
  variables = {"params": state.params, "batch_stats": state.batch_stats}
  h_and_z = jax.jit(lambda images: model.apply(variables, images, train=False)[:2])
  # 24 pairs of two batches of 16: the whole first batch, then the first rows of the second.
  batches = [jax.jit(images.batch_of)(images.dataset, np.int32(step)) for step in (0, 1)]
  views = np.concatenate([jax.jit(images.prepare)(batch)["views"] for batch in batches])[:24]
  h, z = (np.asarray(x, np.float64).reshape(24, 2, -1) for x in h_and_z(views.reshape(48, 16, 16, 3)))
  assert measured["eval/alignment"] == pytest.approx(geometry.alignment(z), rel=1e-4)
  assert measured["eval/uniformity"] == pytest.approx(geometry.uniformity(z), rel=1e-4)
  assert measured["eval/rank_h"] == pytest.approx(geometry.effective_rank(h.reshape(48, -1)), rel=1e-4)

  (train, train_y), (test, test_y) = (shapes.draw(split, 80, 16, 0) for split in ("train", "test"))
  chosen = np.sort(np.random.default_rng([0, 0, 0, 1]).permutation(80)[:48])
  (x, _), (test_x, _) = (h_and_z(images.astype(np.float32) / 255) for images in (train[chosen], test))
  known, test = features.Features(np.asarray(x), train_y[chosen]), features.Features(np.asarray(test_x), test_y)
  (found,) = neighbours.accuracies(known, test, neighbours=[5], temperatures=[0.1], classes=10)
  assert measured["eval/knn_top1"] == found["top1"]


@EIGHT
def test_a_part_of_a_batch_is_taken_in_even_steps(tmp_path, monkeypatch):
  # The subject are the rows and their order over the devices; the augmentation takes long to compile.
  twice = lambda images, *_, **__: jnp.stack([images, images // 2], axis=1) / 255
  monkeypatch.setattr(device_augment, "two_views", twice)
  this = experiment_of()
  images = this.pairs(this.train)
  batch = jax.jit(images.batch_of)(images.dataset, np.int32(0))
  (rows,) = images.first_batches(1, 8)()
  np.testing.assert_array_equal(rows["index"], batch["index"][::2])
  # The figure shows one image of each class of the whole batch in turn.
  shown = []
  monkeypatch.setattr(figures, "view_pairs", lambda pairs, path: shown.append(pairs))
  monkeypatch.setattr(figures, "curves", lambda *_, **__: None)
  pretrain._draw(str(tmp_path), pretrain._pairs_of(this, images), symptoms.Facts(16, None))
  prepared = jax.jit(images.prepare)(batch)["views"]
  chosen = figures.varied(np.asarray(batch["label"]), figures.PAIRS)
  np.testing.assert_allclose(shown[0], prepared[chosen], rtol=0, atol=1e-6)
  with pytest.raises(errors.UserError, match="config.monitor.pairs 12 does not split over 8 devices"):
    pretrain._pairs_of(experiment_of("--config.monitor.pairs=12"), images)


def test_a_second_evaluation_traces_no_network(one, measured, monkeypatch):
  _, (state, _, _), evaluate, _ = one
  traced = []
  monkeypatch.setattr(small_step.Encoder, "__call__", lambda *_, **__: traced.append(1))
  assert evaluate(state) == measured
  assert not traced


def test_without_labels_or_held_out_images_the_geometry_is_left():
  model, (state, _, _), evaluate, _ = parts(1, "--config.data.eval_split=")
  assert set(evaluate(state)) == {f"eval/{name}" for name in ("alignment", "uniformity", "rank_h", "rank_z")}
  nothing = experiment_of("--config.data.eval_split=", "--config.monitor.pairs=0")
  assert pretrain._evaluate_of(nothing, model, None) is None
  with pytest.raises(errors.UserError, match="knn_neighbours is 0; use 1 or more"):
    pretrain._evaluate_of(experiment_of("--config.monitor.knn_neighbours=0"), model, None)


@pytest.mark.slow
def test_measuring_in_between_leaves_every_bit_of_the_training(one, measured):
  model, _, evaluate, images = one
  state, tx, rate = small_step.start(model, images.mesh)
  step_fn = small_step.jitted(small_step.contrastive(model, images.mesh), images.mesh, state, tx, rate)
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
  held = shapes.open(source.Request("train", image_size=16, num_examples=80))
  assert isinstance(held, arrays.Arrays)
  chosen = held.sample(30, 4)
  rows = np.sort(np.random.default_rng([4, 0, 0, 1]).permutation(80)[:30])
  np.testing.assert_array_equal(chosen.images, held.images[rows])
  np.testing.assert_array_equal(chosen.labels(), held.labels()[rows])
  assert held.sample(80, 4) is held
  streamed = sources.load("tfds", source.Request("train", name="imagenet2012", data_dir=tfds_dir))
  part = streamed.sample(20, 0)
  assert part.num_examples == 20
  assert len({piece.file for piece in part.pieces}) == 8
  known = streamed.names()
  firsts = np.cumsum([0] + [piece.take for piece in streamed.pieces])[:-1]
  heads = {known[first + place] for first in firsts for place in range(3)}
  assert set(part.names()) <= heads
