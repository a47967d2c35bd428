"""Classes that count alike: the weights of the loss, and the balanced order on the host and on the devices."""

import itertools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
from runs import job, tiny
from sklearn import linear_model
from sklearn.utils import class_weight

from simclr_jax import __main__ as command
from simclr_jax import errors
from simclr_jax.data import arrays, balanced, inputs, order, pipeline
from simclr_jax.data.distortion import Distortion
from simclr_jax.evaluation import probes
from simclr_jax.hardware import sharding
from simclr_jax.training import objectives

# Class 2 has one image, class 3 none; five images have no label.
LABELS = np.random.default_rng(0).permutation(np.repeat([0, 1, 2, 4, -1], [30, 7, 1, 3, 5])).astype(np.int32)
OPTIONS = ["--config.finetune.sampling=balanced", "--config.checkpoint_every_steps=1", "--config.keep_checkpoints=9"]


def stream(steps, *, batch_size=6, seed=0):
  drawn = balanced.Balanced(LABELS, batch_size, seed)
  return [np.concatenate(column) for column in zip(*map(drawn.at, steps), strict=True)]


def test_every_class_comes_equally_often_and_every_image_once_a_pass():
  index, passes = stream(range(60))
  turns = LABELS[index].reshape(-1, 4)
  assert {tuple(sorted(turn)) for turn in turns} == {(0, 1, 2, 4)}
  assert len({tuple(turn) for turn in turns}) == 24
  for label in (0, 1, 2, 4):
    rows, images = LABELS[index] == label, np.flatnonzero(label == LABELS)
    for number in range(passes[rows].max()):
      np.testing.assert_array_equal(np.sort(index[rows][passes[rows] == number]), images)
    assert np.all(np.diff(passes[rows]) >= 0)
  first, second = (index[(LABELS[index] == 1) & (passes == number)].tolist() for number in (0, 1))
  assert first != second
  assert not np.array_equal(index, stream(range(60), seed=1)[0])


def test_the_balanced_stream_is_the_same_in_any_batches_and_from_any_step():
  for whole, parts in zip(stream(range(40)), stream(range(16), batch_size=15), strict=True):
    np.testing.assert_array_equal(whole, parts)
  # Beyond a block of turns.
  begin = 4 * balanced.BLOCK // 6 - 3
  for far, near in zip(stream(range(begin + 9)), stream(range(begin, begin + 9)), strict=True):
    np.testing.assert_array_equal(far[-54:], near)


def images_of():
  return arrays.Arrays("x", np.zeros((len(LABELS), 4, 4, 3), np.uint8), LABELS, tuple("abcde"))


def test_the_host_and_the_devices_take_the_same_balanced_examples():
  drawn, mesh, distortion = balanced.Balanced(LABELS, 6, 0), sharding.data_mesh(), Distortion(4)
  plan = inputs.Plan(order.Order(6, 2, 0), resident=True, steps_per_dispatch=4)
  resident = inputs.singles(images_of(), distortion, plan, mesh, positions=drawn.at)
  take = jax.jit(resident.batch_of)
  with resident.feeding(3) as arguments:
    found = []
    for count in (1, 4, 2):
      dataset, steps = arguments(count)
      for _ in range(int(steps)):
        found.append(take(dataset, jnp.int32(3 + len(found))))
  whole = [drawn.at(step) for step in range(3, 10)]
  content = lambda image, seed: {}
  hosts = [
    itertools.islice(
      pipeline.train_batches(
        images_of(), content, plan.order, start_step=3, process=order.Process(host, 2), positions=drawn.at
      ),
      7,
    )
    for host in (0, 1)
  ]
  streamed = [
    {k: np.concatenate([half[k] for half in halves]) for k in halves[0]} for halves in zip(*hosts, strict=True)
  ]
  for batch in (found, streamed):
    for (index, passes), rows in zip(whole, batch, strict=True):
      np.testing.assert_array_equal(rows["index"], index)
      np.testing.assert_array_equal(rows["epoch"], passes)
      np.testing.assert_array_equal(rows["label"], LABELS[index])


def test_balanced_weights_are_those_of_scikit_learn():
  known = LABELS[LABELS >= 0]
  wanted = class_weight.compute_class_weight("balanced", classes=np.unique(known), y=known)
  np.testing.assert_allclose(np.array(balanced.weights(LABELS, 5))[[0, 1, 2, 4]], wanted)
  assert balanced.weights(LABELS, 5)[3] == 0


@pytest.mark.parametrize("parts", [1, 3])
def test_the_weighted_loss_is_its_definition_in_any_parts(parts):
  rng = np.random.default_rng(1)
  logits, label, weights = rng.standard_normal((12, 5)), rng.integers(-1, 5, 12), rng.random(5)
  objective = objectives.Classification(None, None, class_weights=tuple(weights))
  rows = lambda part: (jnp.asarray(logits[part::parts]), {"label": jnp.asarray(label[part::parts])})
  found = [objective.loss(*rows(part), jnp.sum(label >= 0), parts)[0] for part in range(parts)]
  wanted = 0.0
  for row, number in zip(logits, label, strict=True):
    if number >= 0:
      wanted -= weights[number] * (row[number] - np.log(np.sum(np.exp(row))))
  assert np.mean(found) == pytest.approx(wanted / np.sum(label >= 0), rel=1e-5)


@pytest.mark.slow
def test_balanced_regressions_are_those_of_scikit_learn():
  rng, y = np.random.default_rng(0), np.repeat([0, 1, 2], [120, 30, 6]).astype(np.int32)
  x = rng.standard_normal((156, 4)) + np.eye(3, 4)[y]
  path = probes.L2Path([0.01], 500, 1e-6)
  with jax.enable_x64(True):
    found, _ = probes.logistic_regression(x, y, path, classes=3, is_balanced=True)
  wanted = linear_model.LogisticRegression(C=1 / (156 * 0.01), class_weight="balanced", tol=1e-10).fit(x, y)
  np.testing.assert_allclose(found["dense"]["kernel"][0].T, wanted.coef_, rtol=1e-3, atol=1e-4)
  # A step from zero of the grid's classifiers follows the gradient, in which each class has a third.
  grid = probes.Grid([1.0], [0.0], 1, 156)
  trained = probes.train_grid(x.astype(np.float32), y, grid, classes=3, seed=0, is_balanced=True)
  np.testing.assert_allclose(trained["dense"]["bias"][0, 0], 0, atol=1e-6)


@pytest.mark.slow
def test_a_balanced_run_continues_bit_for_bit(pretrained, tmp_path):
  settings = [f"--config.checkpoint={pretrained}", *OPTIONS]
  job("finetune", tmp_path, *settings)
  whole, rows = runs.arrays(tmp_path), runs.training_rows(tmp_path)
  assert set(rows) == {1, 2, 3}
  shutil.rmtree(tmp_path / "checkpoints" / "3")
  (tmp_path / "result.json").unlink()
  job("finetune", tmp_path, *settings)
  again = runs.arrays(tmp_path)
  assert all(again[name].tobytes() == whole[name].tobytes() for name in whole)
  assert runs.training_rows(tmp_path) == rows
  assert json.loads((tmp_path / "result.json").read_text())["steps"] == 3


@pytest.mark.parametrize(
  ("name", "settings", "words"),
  [
    (
      "finetune",
      ["finetune.sampling=balanced", "finetune.class_weights=balanced"],
      "counts rare classes twice; use one",
    ),
    ("finetune", ["finetune.sampling=even"], "config.finetune.sampling is 'even'; use uniform, balanced"),
    (
      "linear_eval",
      ["checkpoint=random", "linear_eval.sampling=balanced", "linear_eval.protocol=features"],
      "config.linear_eval.sampling=balanced is not for protocol features; leave it out",
    ),
  ],
)
def test_what_cannot_be_balanced_gets_one_line(tmp_path, capsys, name, settings, words):
  overrides = [f"--config.{text}" for text in settings]
  assert command.main([name, *tiny(name), f"--workdir={tmp_path}", *overrides]) == 2
  assert words in capsys.readouterr().err.splitlines()[-1]


def test_images_without_labels_cannot_be_sampled_by_class():
  with pytest.raises(errors.UserError, match="no training image has a label"):
    balanced.Balanced(np.full(4, -1), 2, 0)
