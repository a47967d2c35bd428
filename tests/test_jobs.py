"""The jobs, each by its command: they feed each other by path, continue bit for bit, and agree among processes."""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image
from runs import ROOT, TINY, arrays, job, read_by, start, tiny, training_rows

import simclr_jax
from simclr_jax import __main__ as command
from simclr_jax import config as config_lib
from simclr_jax import errors
from simclr_jax.data import profile
from simclr_jax.training import checkpoint, interruption, telemetry

OLD = pathlib.Path(__file__).parent / "old" / "0.1.0"

# TINY's network, for one view, by hand; FLOPs of a pair, with the similarities of 32 views, three times in training.
MULTIPLY_ADDS = 279_104
FLOPS_OF_A_PAIR = 3 * (2 * 2 * MULTIPLY_ADDS + 2 * 32**2 * 8 / 16)


def test_pretraining_leaves_checkpoints_metrics_and_figures(pretrained):
  assert checkpoint.open(str(pretrained)).path.name == "6"
  assert set(training_rows(pretrained)) == {1, 2, 3, 4, 5, 6}
  for figure in ("view_pairs.png", "curves.png"):
    with Image.open(pretrained / "figures" / figure) as image:
      assert image.size[0] > 300
  result = json.loads((pretrained / "result.json").read_text())
  assert result["eval/online_examples"] == 80
  assert list((pretrained / "tensorboard").iterdir())


@pytest.mark.slow
@pytest.mark.devices(8)
def test_micro_batches_and_sharded_parameters_leave_an_encoder(tmp_path):
  wide = ["--config.model.width=0.125", "--config.sharding.parameters=sharded", "--config.micro_batches=2"]
  other = ["--config.loss.kind=dcl", "--config.head.online=false", "--config.total_steps=1"]
  other += ["--config.data.resident=false", "--config.augment.place=host"]
  workdir = job("pretrain", tmp_path, *wide, *other)
  encode, config = simclr_jax.load_encoder(str(workdir))
  assert config.loss.kind == "dcl"
  assert encode(np.zeros((2, 16, 16, 3), np.uint8)).shape == (2, 64)


def test_the_loss_starts_where_random_embeddings_put_it(pretrained):
  # ln(2N - 1) for unrelated views; two identical views would start far below.
  assert abs(training_rows(pretrained)[1]["train/loss"] - np.log(31)) < 1.0


@pytest.mark.slow
def test_linear_eval_counts_the_whole_split_once(linear):
  result = json.loads((linear / "result.json").read_text())
  assert result["eval/examples"] == 80
  assert 0 <= result["eval/top1"] <= result["eval/top5"] <= 1
  assert result["eval/top1"] * 80 == pytest.approx(round(result["eval/top1"] * 80))


@pytest.mark.slow
def test_the_features_protocol_counts_the_split_once(pretrained, tmp_path):
  probes = ["batch_size=16", "epochs=3", "learning_rates=0.1,1.0", "weight_decays=0.0,1e-4", "l2_strengths=1e-2"]
  probes += ["passes=2", "lbfgs_steps=20", "validation_share=0.2"]
  argv = [f"--config.checkpoint={pretrained}", "--config.linear_eval.protocol=features", f"--workdir={tmp_path}"]
  assert command.main(["linear_eval", *argv, *(f"--config.probes.{key}" for key in probes)]) == 0
  result = json.loads((tmp_path / "result.json").read_text())
  assert result["eval/examples"] == 80
  assert result["validation/examples"] == 16
  assert len(result["validation/top1"]) == 4
  assert (result["learning_rate"], result["l2_strength"]) in ((0.1, 0.01), (1.0, 0.01))
  for name in ("eval/top1", "eval/lbfgs_top1"):
    assert result[name] * 80 == pytest.approx(round(result[name] * 80))


def test_speed_waits_and_flops_are_in_every_row(pretrained):
  rows = [row for row in telemetry.read_rows(str(pretrained)) if "train/loss" in row]
  for row in rows:
    assert row["speed/images_per_second"] > 0
    assert 0 <= row["speed/data_wait_share"] <= 1
    assert 0 <= row["speed/checkpoint_wait_share"] <= 1
    per_image = row["speed/model_tflop_per_second"] * 1e12 / row["speed/images_per_second"]
    assert per_image == pytest.approx(FLOPS_OF_A_PAIR, rel=0.01)
    assert "speed/mfu" not in row  # Nobody knows the peak of this CPU.


def test_linear_eval_leaves_the_backbone_bit_for_bit(pretrained, linear):
  before, after = arrays(pretrained), arrays(linear)
  encoder = [name for name in before if name.startswith("['model']") and "['encoder']" in name]
  assert len(encoder) > 50
  for name in encoder:
    assert before[name].tobytes() == after[name].tobytes(), name
  head = [name for name in after if "['linear_head']" in name and name.startswith("['model']")]
  assert all(np.any(after[name]) for name in head)


@pytest.mark.slow
def test_a_random_encoder_can_be_evaluated_too(tmp_path):
  job("linear_eval", tmp_path, "--config.checkpoint=random", "--config.linear_eval.total_epochs=0.2")
  assert json.loads((tmp_path / "result.json").read_text())["checkpoint"] == "random"


@pytest.mark.slow
def test_finetuning_trains_the_whole_network(pretrained, tmp_path):
  job("finetune", tmp_path, f"--config.checkpoint={pretrained}")
  before, after = arrays(pretrained), arrays(tmp_path)
  changed = [n for n in after if n in before and n.startswith("['model']") and np.any(before[n] != after[n])]
  assert any("stem_conv" in name for name in changed)
  assert any("batch_stats" in name for name in changed)


def test_an_encoder_loads_in_one_line(pretrained):
  encode, config = simclr_jax.load_encoder(str(pretrained))
  images = np.random.default_rng(0).integers(0, 256, (131, 16, 16, 3), np.uint8)
  features = encode(images)
  assert features.shape == (131, 32)
  assert features.dtype == np.float32
  np.testing.assert_allclose(encode(images.astype(np.float32) / 255), features, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(encode(images[:100]), features[:100], rtol=1e-6)  # The same program, other padding.
  # Fewer images are another program, equal up to the rounding of the largest feature.
  np.testing.assert_allclose(encode(images[:3]), features[:3], rtol=0, atol=1e-5 * np.abs(features).max())
  assert encode(images[:0]).shape == (0, 32)
  assert config.data.image_size == 16
  with pytest.raises(errors.UserError, match="16, 3"):
    encode(images[0])


@pytest.mark.parametrize(
  ("override", "named"), [("model.width=0.125", "config.model.width"), ("model.depth=18", "depth")]
)
def test_a_checkpoint_of_another_architecture_is_refused(pretrained, tmp_path, capsys, override, named):
  argv = [*tiny("linear_eval"), f"--config.checkpoint={pretrained}", f"--config.{override}", f"--workdir={tmp_path}"]
  assert command.main(["linear_eval", *argv]) == 2
  assert named in capsys.readouterr().err


def test_a_workdir_that_holds_another_run_is_refused(pretrained, capsys):
  assert command.main(["pretrain", *tiny("pretrain"), f"--workdir={pretrained}", "--config.total_steps=7"]) == 2
  said = capsys.readouterr().err
  assert "total_steps was 6, now is 7" in said
  assert f"to train for longer, start from its weights: another --workdir and --config.checkpoint={pretrained}" in said


@pytest.mark.slow
@pytest.mark.parametrize("out_dim", [8, 4])
def test_pretraining_starts_from_the_weights_of_a_run(pretrained, tmp_path, out_dim):
  job(
    "pretrain",
    tmp_path,
    f"--config.checkpoint={pretrained}",
    "--config.total_steps=1",
    f"--config.head.out_dim={out_dim}",
  )
  before, after = arrays(pretrained), arrays(tmp_path)
  # The first step has a learning rate of zero.
  weights = [name for name in before if name.startswith("['model']['params']['encoder']")]
  assert len(weights) > 10
  assert all(before[name].tobytes() == after[name].tobytes() for name in weights)
  heads = [name for name in before if name.startswith("['model']['params']['projection_head']")]
  assert all((before[name].tobytes() == after[name].tobytes()) == (out_dim == 8) for name in heads if "kernel" in name)
  assert json.loads((tmp_path / "result.json").read_text())["checkpoint"] == str(pretrained)


def test_pretraining_from_a_run_that_is_not_there_is_refused(tmp_path, capsys):
  argv = [*tiny("pretrain"), f"--config.checkpoint={tmp_path}/none", f"--workdir={tmp_path}/run"]
  assert command.main(["pretrain", *argv]) == 2
  assert "does not exist" in capsys.readouterr().err


def test_what_a_run_started_from_and_its_labels_are_not_inherited(finetuned, pretrained):
  assert checkpoint.open(str(finetuned)).config["checkpoint"] == str(pretrained)
  config = config_lib.load("", {"distill.teacher": str(finetuned)})
  assert (config.checkpoint, config.model.depth, config.data.image_size) == ("", 10, 16)
  saved = {**config.to_dict(), "labels": {"fraction": 0.1, "seed": 3, "ids": "/x"}, "checkpoint": "/y"}
  after = config_lib.inherited(saved)
  assert (after.labels.to_dict(), after.checkpoint) == ({"fraction": 1.0, "seed": 0, "ids": ""}, "")
  said = config_lib.changed(after, {"data.image_size": "16"}, "finetune")
  assert "model.depth=10" in said
  assert "image_size" not in said
  assert "\n" not in said


@pytest.mark.parametrize("resident", ["true", "false"])
def test_the_input_is_profiled_alone(capsys, monkeypatch, resident):
  monkeypatch.setattr(profile, "SECONDS", 0.1)
  argv = [
    "pretrain",
    *tiny("pretrain"),
    "--profile_input",
    "--chip=v5e",
    "--mfu=0.5",
    f"--config.data.resident={resident}",
  ]
  assert command.main(argv) == 0
  said = capsys.readouterr().out
  needed = 0.5 * 197e12 / (3 * 2 * 2 * MULTIPLY_ADDS)
  assert f"One TPU v5e takes {needed:,.0f} pairs/s at 50% of its peak" in said
  rate, *threads = (float(number.replace(",", "")) for number in re.findall(r"([\d,.]+) pairs/s (?:on|and)", said))
  assert rate > 0
  if resident == "true":
    assert "no host thread takes part" in said
  else:
    assert threads[0] == pytest.approx(rate / os.cpu_count(), rel=0.02)
    wanted = int(re.search(r"Threads like these to feed it: ([\d,]+)", said)[1].replace(",", ""))
    assert wanted == pytest.approx(needed / threads[0], rel=0.1)


@pytest.mark.slow
def test_a_run_of_the_release_before_continues(tmp_path):
  # Run with 0.1.0 to step 6; what is kept is its folder as it stood at step 3, and the six losses.
  shutil.copytree(OLD / "pretrain", tmp_path / "run")
  argv = [*tiny("pretrain"), "--config.total_steps=6", "--config.checkpoint_every_steps=3", f"--workdir={tmp_path}/run"]
  assert command.main(["pretrain", *argv]) == 0
  wanted = json.loads((OLD / "losses.json").read_text())
  rows = training_rows(tmp_path / "run")
  # To rounding: other machines add in another order. On the machine that made it the bits were equal.
  np.testing.assert_allclose([rows[step]["train/loss"] for step in range(1, 7)], wanted, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["linear_eval", "finetune", "knn", "embed", "distill"])
def test_a_checkpoint_of_the_release_before_feeds_every_job(tmp_path, name):
  source = "distill.teacher" if name == "distill" else "checkpoint"
  short = ["--config.linear_eval.total_epochs=0.2", "--config.finetune.total_epochs=0.2"]
  more = [f"--config.{source}={OLD / 'pretrain'}", *short, "--config.distill.total_epochs=0.2"]
  job(name, tmp_path, *read_by(name, [*more, "--config.distill.optimizer.warmup_epochs=0"]))
  assert json.loads((tmp_path / "result.json").read_text())["version"] == simclr_jax.__version__


def test_load_encoder_reads_a_checkpoint_of_the_release_before():
  encode, config = simclr_jax.load_encoder(str(OLD / "pretrain"))
  assert encode(np.zeros((1, 16, 16, 3), np.uint8)).shape == (1, 32)
  assert config.model.encoder == "resnet"


def test_a_job_runs_from_python_too(pretrained, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  overrides = {option.partition("=")[0].removeprefix("--config."): option.partition("=")[2] for option in TINY[1:]}
  config = simclr_jax.load_config("cifar10", **overrides, checkpoint=str(pretrained))
  result = simclr_jax.run("knn", config, "runs/knn")
  assert result == json.loads((tmp_path / "runs" / "knn" / "result.json").read_text())
  assert result["version"] == simclr_jax.__version__
  with pytest.raises(errors.UserError, match='did you mean "knn"'):
    simclr_jax.run("kn", config, "runs/knn")


def test_a_profile_for_an_unknown_chip_is_refused(capsys):
  assert command.main(["pretrain", *tiny("pretrain"), "--profile_input", "--chip=v5q"]) == 2
  assert "unknown chip 'v5q'; did you mean \"v5p\"?; use one of" in capsys.readouterr().err


def test_steps_to_profile_are_two_numbers(tmp_path, capsys):
  assert command.main(["pretrain", *tiny("pretrain"), f"--workdir={tmp_path}", "--profile_steps=10"]) == 2
  assert "--profile_steps=10 is not FIRST,LAST" in capsys.readouterr().err


@pytest.mark.slow
def test_a_flat_folder_pretrains_and_a_corrupt_image_is_named(tmp_path, capsys):
  rng = np.random.default_rng(0)
  folder = tmp_path / "images"
  folder.mkdir()
  for i in range(40):
    Image.fromarray(rng.integers(0, 256, (20 + i, 30, 3), np.uint8)).save(folder / f"photo{i:02d}.jpg")
  (folder / "photo07.jpg").write_bytes(b"\xff\xd8 no picture")
  job(
    "pretrain",
    tmp_path / "run",
    "--config.data.source=folder",
    f"--config.data.dir={folder}",
    "--config.data.resident=false",
    "--config.data.max_bad_share=0.05",
    "--config.total_steps=2",
  )
  err = capsys.readouterr().err
  assert "photo07.jpg" in err
  assert re.search(r"pretrain: 39 images", err)
  assert "train/supervised_loss" not in training_rows(tmp_path / "run")[1]


@pytest.mark.slow
def test_a_killed_and_a_terminated_run_continue_bit_for_bit(tmp_path, monkeypatch):
  settings = [
    "--config.total_steps=40",
    "--config.checkpoint_every_steps=10",
    "--config.keep_checkpoints=99",
    "--config.evaluate_every_epochs=0",
    "--config.data.steps_per_dispatch=2",
  ]
  whole, broken = job("pretrain", tmp_path / "whole", *settings), tmp_path / "broken"

  killed = start(broken, *settings)
  wait_for_step(killed, broken, 12)
  killed.kill()
  killed.communicate()
  reached = max(training_rows(broken))
  assert 12 <= reached < 34

  write = telemetry.Telemetry.write
  with monkeypatch.context() as patched:
    patched.setattr(telemetry.Telemetry, "write", lambda *row: (write(*row), terminate_at(reached + 6, row[1])))
    with pytest.raises(interruption.Preempted) as terminated:
      job("pretrain", broken, *settings)
    assert terminated.value.code == 130
  stopped = max(training_rows(broken))
  assert reached < stopped < 40
  assert checkpoint.open(str(broken)).path.name == str(stopped)

  job("pretrain", broken, *settings)
  assert training_rows(broken) == training_rows(whole)
  for step in (20, 30, 40):
    ours, theirs = (arrays(folder / "checkpoints" / str(step)) for folder in (broken, whole))
    assert ours.keys() == theirs.keys()
    for name in ours:
      assert ours[name].tobytes() == theirs[name].tobytes(), (step, name)


def wait_for_step(process, workdir, step):
  deadline = time.monotonic() + 300
  while max(training_rows(workdir), default=0) < step:
    assert process.poll() is None, process.communicate()
    assert time.monotonic() < deadline
    time.sleep(0.05)


def terminate_at(step, done):
  if done == step:
    os.kill(os.getpid(), signal.SIGINT)  # Ctrl-C; a study's test has SIGTERM.


@pytest.mark.slow
@pytest.mark.devices(8)
def test_two_processes_of_four_devices_are_one_of_eight(tmp_path):
  # In float64 what differs between the two can only be rounding, so the batches were the same.
  settings = ["--config.total_steps=3", "--config.model.dtype=float64", "--config.model.param_dtype=float64"]
  settings += ["--config.data.resident=false"]  # So that each process reads its part.
  job("pretrain", tmp_path / "one", *settings)
  together = [
    ROOT / "launch" / "local.sh",
    "--processes=2",
    "--cpu_devices=4",
    "--",
    sys.executable,
    "-m",
    "simclr_jax",
  ]
  together += ["pretrain", *tiny("pretrain"), "--workdir=two", *settings]
  environment = {**os.environ, "PYTHONPATH": str(ROOT)}
  done = subprocess.run(together, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
  assert done.returncode == 0, done.stderr
  assert "Traceback" not in done.stderr + (tmp_path / "two" / "logs" / "process-1.log").read_text()

  one, two = training_rows(tmp_path / "one"), training_rows(tmp_path / "two")
  assert one.keys() == two.keys() == {1, 2, 3}
  for step in one:
    for name, value in one[step].items():
      np.testing.assert_allclose(two[step][name], value, rtol=1e-9, atol=1e-12, err_msg=f"{name} of step {step}")
  ours, theirs = (arrays(tmp_path / name) for name in ("two", "one"))
  for name in theirs:
    largest = np.max(np.abs(theirs[name]), initial=1e-30)
    np.testing.assert_allclose(ours[name], theirs[name], rtol=0, atol=1e-9 * largest, err_msg=name)
  results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("one", "two")]
  assert results[0]["eval/online_examples"] == results[1]["eval/online_examples"] == 80
  assert results[0]["eval/online_top1"] == results[1]["eval/online_top1"]
