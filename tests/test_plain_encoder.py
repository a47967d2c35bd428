"""An encoder without batch norm goes through every job, with and without batch norm in the projection head."""

import json
import shutil

import numpy as np
import plain_encoder
import pytest
from runs import arrays, job, read_by, tiny, training_rows

import simclr_jax
from simclr_jax import __main__ as command
from simclr_jax import config as config_lib
from simclr_jax.models import encoders
from simclr_jax.training import checkpoint

PLAIN = ["--config.model.encoder=plain", "--config.total_steps=2", "--config.data.resident=true"]
# The projection head's batch norms are the only ones; without its layers the network has none at all.
NO_HEAD = ["--config.head.layers=0"]
STREAMED = [*PLAIN, *NO_HEAD, "--config.data.resident=false", "--config.checkpoint_every_steps=1"]


@pytest.fixture(scope="module", autouse=True)
def registered():
  """Adds the row to the table of encoders, all that an encoder without keys of its own needs."""
  encoders.ENCODERS["plain"] = plain_encoder.PlainEncoder
  yield
  del encoders.ENCODERS["plain"]


@pytest.fixture(scope="module")
def plain(registered, tmp_path_factory):
  """A pretraining run with a projection head."""
  return job("pretrain", tmp_path_factory.mktemp("plain"), *PLAIN)


@pytest.fixture(scope="module")
def headless(registered, tmp_path_factory):
  """A pretraining run of a network without any batch norm, on images that the host streams."""
  return job("pretrain", tmp_path_factory.mktemp("headless"), *STREAMED)


@pytest.fixture(scope="module")
def tuned(headless, tmp_path_factory):
  """A fine-tuning of `headless`, with all of the network."""
  folder = tmp_path_factory.mktemp("tuned")
  return job("finetune", folder, *read_by("finetune", PLAIN), *NO_HEAD, f"--config.checkpoint={headless}")


def result(workdir):
  return json.loads((workdir / "result.json").read_text())


def model_arrays(workdir):
  return {name: array for name, array in arrays(workdir).items() if name.startswith("['model']")}


@pytest.mark.slow
def test_pretraining_has_statistics_of_the_head_alone(plain, headless):
  statistics = {name for name in model_arrays(plain) if "batch_stats" in name}
  assert statistics
  assert all("projection_head" in name for name in statistics)
  names = model_arrays(headless)
  assert names
  assert not any("batch_stats" in name for name in names)
  for workdir in (plain, headless):
    assert set(training_rows(workdir)) == {1, 2}
    assert result(workdir)["eval/online_examples"] == 80


@pytest.mark.slow
def test_a_stopped_run_without_batch_norm_continues_bit_for_bit(headless, tmp_path):
  workdir = tmp_path / "run"
  shutil.copytree(headless, workdir)
  shutil.rmtree(workdir / "checkpoints" / "2")
  (workdir / "result.json").unlink()
  job("pretrain", workdir, *STREAMED)
  again, whole = arrays(workdir), arrays(headless)
  assert again.keys() == whole.keys()
  assert all(again[name].tobytes() == whole[name].tobytes() for name in whole)


@pytest.mark.parametrize("run", ["plain", "headless"])
def test_the_encoder_loads_in_one_line(run, request):
  encode, config = simclr_jax.load_encoder(str(request.getfixturevalue(run)))
  assert config.model.encoder == "plain"
  features = encode(np.zeros((3, 16, 16, 3), np.uint8))
  assert (features.shape, features.dtype) == ((3, 32), np.float32)


@pytest.mark.slow
@pytest.mark.parametrize("run", ["plain", "headless"])
def test_a_linear_classifier_learns_on_the_frozen_encoder(run, request, tmp_path):
  workdir = request.getfixturevalue(run)
  options = [*read_by("linear_eval", PLAIN), *(NO_HEAD if run == "headless" else ["--config.head.evaluate_from=1"])]
  job("linear_eval", tmp_path, *options, f"--config.checkpoint={workdir}", "--config.linear_eval.total_epochs=0.4")
  assert result(tmp_path)["eval/examples"] == 80
  before, after = model_arrays(workdir), model_arrays(tmp_path)
  encoder = [name for name in after if "['encoder']" in name]
  assert len(encoder) == 14
  assert all(before[name].tobytes() == after[name].tobytes() for name in encoder)


@pytest.mark.slow
def test_classifiers_of_features_and_stored_ones_are_counted(headless, tuned, tmp_path):
  probes = ["epochs=2", "batch_size=16", "lbfgs_steps=3", "lbfgs_tolerance=10.0", "learning_rates=0.1", "passes=2"]
  probes += ["weight_decays=0.0", "l2_strengths=1e-2"]
  options = [*read_by("linear_eval", PLAIN), *NO_HEAD, f"--config.checkpoint={headless}"]
  options += [f"--config.probes.{key}" for key in probes]
  job("linear_eval", tmp_path / "features", *options, "--config.linear_eval.protocol=features")
  assert result(tmp_path / "features")["eval/examples"] == 80
  argv = [f"--config.checkpoint={tuned}", "--config.linear_eval.protocol=stored", f"--workdir={tmp_path}/stored"]
  assert command.main(["linear_eval", *argv]) == 0
  stored = result(tmp_path / "stored")
  assert stored["eval/top1"] == result(tuned)["eval/top1"]


def stages_that_changed(before, after):
  moved = {name for name in before if np.any(before[name] != after[name])}
  return {name.split("']['")[3].partition("_")[0] for name in moved if "['encoder']" in name}


@pytest.mark.slow
def test_finetuning_freezes_the_stages_up_to_the_one_named(headless, tuned, tmp_path):
  before = model_arrays(headless)
  assert stages_that_changed(before, model_arrays(tuned)) == {"patches", "block1", "block2"}
  for after_block, learning in ((0, {"block1", "block2"}), (1, {"block2"})):
    workdir = tmp_path / str(after_block)
    options = [f"--config.checkpoint={headless}", f"--config.finetune.after_block={after_block}"]
    job("finetune", workdir, *read_by("finetune", PLAIN), *NO_HEAD, *options, "--config.finetune.total_epochs=0.2")
    assert stages_that_changed(before, model_arrays(workdir)) == learning


@pytest.mark.slow
def test_it_is_a_teacher_and_a_student(tuned, tmp_path):
  options = ["--config.distill.total_epochs=0.2", "--config.distill.label_weight=0.5"]
  job("distill", tmp_path, *read_by("distill", PLAIN), *NO_HEAD, *options, f"--config.distill.teacher={tuned}")
  assert checkpoint.open(str(tmp_path)).config["model"]["encoder"] == "plain"
  assert result(tmp_path)["eval/examples"] == 80
  assert len(model_arrays(tmp_path)) == len(model_arrays(tuned))


@pytest.mark.slow
def test_neighbours_files_and_plans_are_of_its_features(headless, tmp_path):
  frozen = [*PLAIN, *NO_HEAD, f"--config.checkpoint={headless}"]
  job("knn", tmp_path / "knn", *read_by("knn", frozen))
  assert result(tmp_path / "knn")["dimensions"] == 32
  job("embed", tmp_path / "embed", *read_by("embed", frozen))
  assert result(tmp_path / "embed")["dimension"] == 32
  job("plan", tmp_path / "plan", *PLAIN, *NO_HEAD)
  (plan,) = json.loads((tmp_path / "plan" / "plan.json").read_text())["plans"]
  # The encoder's parameters and those of the classifier, float32.
  trained = [x for name, x in model_arrays(headless).items() if "params" in name]
  assert plan["memory"]["parameters"] == 4 * sum(x.size for x in trained)
  assert plan["memory"]["batch statistics"] == 0


def test_an_unknown_encoder_gets_the_nearest_name(capsys, tmp_path):
  assert command.main(["pretrain", *tiny("pretrain"), "--config.model.encoder=plane", f"--workdir={tmp_path}"]) == 2
  assert "config.model.encoder is 'plane'; did you mean \"plain\"?; use resnet" in capsys.readouterr().err
  assert config_lib.load("cifar10", {"model.encoder": "plain"}).model.encoder == "plain"
  assert isinstance(encoders.build({"encoder": "plain"}), plain_encoder.PlainEncoder)
