"""The jobs that evaluate frozen features, knn and linear_eval's protocol `features`, by their commands."""

import json

import numpy as np
import pytest
from runs import job, tiny

from simclr_jax import __main__ as command
from simclr_jax import classifier, errors, experiment, inference, numbers
from simclr_jax import config as config_lib
from simclr_jax.data import arrays
from simclr_jax.evaluation import features
from simclr_jax.jobs import linear_eval
from simclr_jax.version import __version__


def test_knn_counts_every_combination_on_the_whole_split(pretrained, tmp_path, capsys):
  keys = ["--config.knn.neighbours=5,1", "--config.knn.temperatures=0.1,0.5", "--config.data.eval_split=train"]
  job("knn", tmp_path, *keys, f"--config.checkpoint={pretrained}")
  result = json.loads((tmp_path / "result.json").read_text())
  assert [(cell["k"], cell["temperature"]) for cell in result["table"]] == [(5, 0.1), (5, 0.5), (1, 0.1), (1, 0.5)]
  assert (result["eval/knn_top1"], result["eval/knn_top5"]) == (result["table"][0]["top1"], result["table"][0]["top5"])
  assert (result["eval/examples"], result["train/examples"], result["layer"]) == (80, 80, 0)
  # Every image is its own nearest neighbour.
  assert result["table"][2]["top1"] == 1
  assert f"{100 * result['eval/knn_top1']:.2f} /" in capsys.readouterr().err


@pytest.mark.parametrize(
  ("override", "said"),
  [
    ("knn.neighbours=81", "81 neighbours asked for and there are 80 training images; use 1 to 80"),
    ("knn.neighbours=5,0", "config.knn.neighbours is '5,0'; give whole numbers above 0"),
    ("knn.neighbours=", "config.knn.neighbours is ''; give whole numbers"),
    ("knn.temperatures=0", "config.knn.temperatures is '0'; give numbers above 0"),
    ("checkpoint=", "knn has no encoder; give --config.checkpoint=RUN"),
  ],
)
def test_a_mistake_in_knn_gets_one_line(tmp_path, capsys, override, said):
  argv = [*tiny("knn"), "--config.checkpoint=random", f"--config.{override}", f"--workdir={tmp_path}"]
  assert command.main(["knn", *argv]) == 2
  err = capsys.readouterr().err
  assert said in err
  assert err.count("\n") == 1


@pytest.mark.parametrize("text", ["", "0.1,", "0.1 0.2", "a,1", "nan", "inf,1", "-0.1", "0"])
def test_text_that_is_not_a_list_of_numbers_is_refused(text):
  with pytest.raises(errors.UserError, match="config.probes.learning_rates") as caught:
    numbers.floats("config.probes.learning_rates", text)
  assert "\n" not in str(caught.value)


def test_lists_of_numbers_are_read():
  assert numbers.floats("config.probes.weight_decays", "0.0, 1e-6,1", zero=True) == [0, 1e-6, 1]


@pytest.fixture
def evaluate(monkeypatch, tmp_path):
  """Returns a function that runs the protocol on features given for the splits `train` (any pass) and `test`."""

  def run(train, test, *overrides):
    table = {"train": train, "test": test}
    images = {
      name: arrays.Arrays(name, x, np.zeros(len(x), np.int32), tuple("abcd")) for name, (x, *_) in table.items()
    }
    split_of = lambda _, name: images[name]
    passes = []
    monkeypatch.setattr(inference, "representation", lambda run: inference.Representation(None, None, layer=0))
    monkeypatch.setattr(experiment.Experiment, "images_of", split_of)
    monkeypatch.setattr(experiment.Experiment, "rows", lambda _, images: lambda: (images.name, 0))
    monkeypatch.setattr(experiment.Experiment, "augmented_rows", lambda _, images, number: (images.name, number))

    def of_split(encode, variables, batches, mesh):
      passes.append(batches)
      return features.Features(*table[batches[0]])

    monkeypatch.setattr(features, "of_split", of_split)
    monkeypatch.setattr(classifier, "store", lambda *parts: passes.append(parts[-2]["kernel"].shape))
    keys = {
      **{"linear_eval.protocol": "features", "checkpoint": "random", "probes.batch_size": 32, "probes.epochs": 40},
      "baselines.train_images": 0,
      **dict(override.split("=") for override in overrides),
    }
    result = linear_eval.run(config_lib.load("cifar10", keys), str(tmp_path))
    assert json.loads((tmp_path / "result.json").read_text()) == {**result, "version": __version__}
    return result, passes

  return run


def test_the_features_protocol_reads_every_pass_and_writes_its_choices(evaluate):
  # Random labels can only be memorised: accurate on the images of the training, at chance on the held-back ones.
  rng = np.random.default_rng(0)
  data = rng.standard_normal((100, 200)).astype(np.float32), rng.integers(0, 4, 100).astype(np.int32)
  result, passes = evaluate(
    data,
    data,
    *("probes.passes=3", "probes.validation_share=0.4"),
    *("probes.learning_rates=1.0", "probes.weight_decays=0.0", "probes.l2_strengths=1e-4"),
  )
  *passes, kernel = passes
  assert passes == [("train", 0), ("train", 1), ("train", 2), ("test", 0)]
  assert kernel == (200, 4)
  assert max(cell["top1"] for cell in result["validation/top1"] + result["validation/lbfgs_top1"]) < 0.6
  assert result["eval/top1"] == result["eval/lbfgs_top1"] == 1
  assert (result["learning_rate"], result["weight_decay"], result["l2_strength"]) == (1.0, 0.0, 1e-4)
  assert result["validation/examples"] == 40
