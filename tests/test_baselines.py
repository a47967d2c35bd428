"""Baselines of a result: pixels, colours, chance and the untrained encoder, the rules of the verdict, and the jobs."""

import json
import shutil

import numpy as np
import pytest

from simclr_jax import config as config_lib
from simclr_jax import experiment
from simclr_jax.evaluation import baselines
from simclr_jax.evaluation.baselines import CHANCE, COLORS, ENCODER, RANDOM, RAW, Score
from simclr_jax.hardware import sharding
from simclr_jax.jobs import pretrain
from simclr_jax.training import telemetry
from tests import runs


def test_pixels_are_means_of_squares_and_bytes_count_as_shares():
  images = np.random.default_rng(0).integers(0, 256, (2, 128, 128, 3), np.uint8)
  found = np.asarray(baselines.raw_pixels((), images)).reshape(2, 32, 32, 3)
  # A triangle of twice the width of a cell: what is uniform stays so, and no cell is off by more than noise.
  means = images.reshape(2, 32, 4, 32, 4, 3).mean((2, 4)) / 255
  assert np.corrcoef(found.ravel(), means.ravel())[0, 1] > 0.7
  np.testing.assert_allclose(found.mean(), means.mean(), rtol=1e-2)
  small = images[:, :16, :16]
  np.testing.assert_allclose(baselines.raw_pixels((), small), small.reshape(2, -1) / 255, rtol=1e-6)


def test_a_histogram_counts_the_cells_of_the_colour_cube():
  image = np.zeros((1, 2, 2, 3), np.float32)
  image[0, 0, 0] = (1.0, 0.5, 0.0)
  found = np.asarray(baselines.color_histogram((), image))[0] ** 2
  wanted = np.zeros(512)
  wanted[7 * 64 + 4 * 8], wanted[0] = 1 / 4, 3 / 4
  np.testing.assert_allclose(found, wanted, rtol=1e-6)


@pytest.mark.devices(8)
def test_every_baseline_is_judged_on_the_same_labelled_images():
  rng = np.random.default_rng(1)
  # Five images with a label, one without, two rows of padding.
  label, mask = np.array([0, 0, 0, 1, 2, -1, -1, -1], np.int32), np.array([1, 1, 1, 1, 1, 1, 0, 0], np.float32)
  images = rng.random((8, 4, 4, 3), np.float32)
  batch = {"image": images, "label": label, "index": np.where(mask > 0, np.arange(8), -1), "mask": mask}
  seen = []

  def top1(known, test):
    seen.append((known, test))
    return 0.6

  encoders = {ENCODER: (lambda w, x: w * x.mean((1, 2)), np.float32(2))}
  found = baselines.measure(encoders, *[lambda: [batch]] * 2, top1, sharding.data_mesh())
  assert list(found) == [ENCODER, RAW, COLORS, CHANCE]
  np.testing.assert_allclose(seen[0][0].x, 2 * images[:5].mean((1, 2)), rtol=1e-6)
  assert all(pair[1].label.tolist() == [0, 0, 0, 1, 2] for pair in seen)
  # Three of five are of the largest class: Wilson's interval of 3 of 5.
  np.testing.assert_allclose(found[CHANCE], (0.6, 0.2307, 0.8824), atol=1e-4)
  assert found[RAW] == found[CHANCE]


OTHERS = {RAW: (0.5, 0.45, 0.55), COLORS: (0.3, 0.25, 0.35), RANDOM: (0.2, 0.15, 0.25), CHANCE: (0.1, 0.05, 0.15)}


@pytest.mark.parametrize(
  ("own", "others", "words"),
  [
    ((0.7, 0.65, 0.75), {}, "better than raw pixels, colour histograms and an untrained encoder"),
    ((0.6, 0.55, 0.65), {}, "no better than raw pixels"),  # The ends touch.
    ((0.4, 0.35, 0.44), {}, "worse than raw pixels"),
    ((0.6, 0.54, 0.65), {COLORS: (0.55, 0.5, 0.6)}, "no better than colour histograms"),
    ((0.6, 0.54, 0.65), {RANDOM: (0.7, 0.6, 0.8)}, "no better than an untrained encoder"),
    ((0.15, 0.1, 0.2), {}, "no better than chance"),
    ((0.05, 0.01, 0.09), {}, "below chance"),
  ],
)
def test_the_verdict_follows_the_written_rules(own, others, words):
  found = {name: Score(*value) for name, value in {**OTHERS, **others}.items()}
  text = baselines.verdict("the encoder", Score(*own), {**found, ENCODER: Score(*own)})
  assert text.startswith(f"the encoder is {words}")
  untrained = baselines.verdict("the encoder", Score(*own), found, is_trained=False)
  assert untrained.startswith("the encoder is as it was initialised; a trained one has to beat ")


def test_a_classifier_that_is_behind_a_quick_regression_is_said():
  high, low = Score(0.7, 0.65, 0.75), Score(0.3, 0.25, 0.35)
  assert "raise its epochs or learning rate" in baselines.shortfall("linear_eval", low, high)
  assert baselines.shortfall("linear_eval", high, high) == baselines.shortfall("linear_eval", high, low) == ""


def test_the_table_fits_into_80_columns():
  text = baselines.table({"encoder, logistic regression": Score(1.0, 0.99, 1.0)}, "title")
  assert max(map(len, text.splitlines())) <= 80
  assert text.splitlines()[-1].split() == ["encoder,", "logistic", "regression", "100.0", "99.0", "to", "100.0"]


ON = "--config.baselines.train_images=60"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["knn", "linear_eval"])
def test_jobs_end_with_baselines_and_a_verdict(name, pretrained, tmp_path, capfd):
  folder = runs.job(name, tmp_path / name, f"--config.checkpoint={pretrained}", ON)
  result = json.loads((folder / "result.json").read_text())
  found = result["baselines"]
  assert set(found) == {ENCODER, RAW, COLORS, RANDOM, CHANCE}
  top1 = result["eval/knn_top1" if name == "knn" else "eval/top1"]
  low, high = result["eval/top1_interval"]
  assert low <= top1 <= high
  assert result["verdict"].startswith("the encoder is ")
  log = capfd.readouterr().err
  assert "raw pixels, 16 x 16" in log
  assert f"{name}: {result['verdict']}" in " ".join(log.split())
  assert "60 of 80 training images" in log


@pytest.mark.slow
def test_finished_runs_of_pretrain_and_finetune_are_compared_too(pretrained, finetuned, tmp_path):
  shutil.copytree(pretrained, tmp_path / "pretrain")
  shutil.copytree(finetuned, tmp_path / "finetune")
  keys = ["--config.total_steps=6", "--config.keep_checkpoints=9", "--config.checkpoint_every_steps=3"]
  folder = runs.job("pretrain", tmp_path / "pretrain", *keys, ON, "--config.monitor.knn_images=80")
  result = json.loads((folder / "result.json").read_text())
  assert result["verdict"].startswith("the encoder is ")
  assert set(result["baselines"]) == {ENCODER, RAW, COLORS, RANDOM, CHANCE}
  low, high = result["eval/top1_interval"]
  assert low <= result["eval/knn_top1"] <= high

  folder = runs.job("finetune", tmp_path / "finetune", f"--config.checkpoint={pretrained}", ON)
  result = json.loads((folder / "result.json").read_text())
  assert result["verdict"].startswith("the classifier is ")
  assert set(result["baselines"]) == {RAW, COLORS, RANDOM, CHANCE}


@pytest.mark.parametrize(
  ("keys", "said"),
  [
    (["data.eval_split="], "there are no held-out images with labels (--config.data.holdout=0.2"),
    (["baselines.train_images=0", "data.eval_split="], ""),
  ],
)
def test_pretrain_says_before_it_trains_that_there_is_nothing_to_compare(keys, said, capfd):
  typed = [*runs.TINY[1:], ON, *(f"--config.{key}" for key in keys)]
  overrides = dict(entry.removeprefix("--config.").split("=", 1) for entry in typed)
  this = experiment.Experiment(config_lib.load("cifar10", overrides), "pretrain")
  telemetry.set_up_logging()
  assert not pretrain._is_comparable(this)
  assert said in capfd.readouterr().err
