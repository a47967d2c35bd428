"""The jobs, each by its command: they feed each other by path, continue bit for bit, and agree among processes."""

import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp
from PIL import Image

import simclr_jax
from simclr_jax import __main__ as command
from simclr_jax import errors
from simclr_jax.jobs import input_profile
from simclr_jax.training import checkpoint, telemetry

ROOT = pathlib.Path(__file__).parents[1]
TINY = [
  f"--config={ROOT}/configs/cifar10.py",
  "--config.data.source=shapes",
  "--config.data.examples=80",
  "--config.data.image_size=16",
  "--config.model.depth=10",
  "--config.model.width=0.0625",
  "--config.head.layers=2",
  "--config.head.out_dim=8",
  "--config.batch_size=16",
  "--config.eval_batch_size=24",
  "--config.log_every_steps=1",
  "--config.linear_eval.batch_size=16",
  "--config.linear_eval.total_epochs=2.0",
  "--config.finetune.batch_size=16",
  "--config.finetune.total_epochs=0.4",
  # What these measure has tests of its own, and takes long to compile.
  "--config.monitor.knn_images=0",
  "--config.monitor.pairs=0",
]

# Of a view in TINY's network, by hand; and FLOPs of a pair, with the similarities of 32 views, three times in training.
MULTIPLY_ADDS = 279_104
FLOPS_OF_A_PAIR = 3 * (2 * 2 * MULTIPLY_ADDS + 2 * 32**2 * 8 / 16)


def job(name, workdir, *more):
  """Runs a job in this process, on its eight devices."""
  assert command.main([name, *TINY, f"--workdir={workdir}", *more]) == 0
  return pathlib.Path(workdir)


def start(workdir, *more, devices=1):
  """Starts a pretraining process of its own; those of one test share what they compile."""
  environment = {
    **os.environ,
    "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": str(devices),
    "JAX_COMPILATION_CACHE_DIR": str(workdir.parent / "compiled"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
  }
  argv = [sys.executable, "-m", "simclr_jax", "pretrain", *TINY, f"--workdir={workdir}", *more]
  return subprocess.Popen(argv, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)


def finish(process) -> int:
  _, err = process.communicate(timeout=600)
  assert "Traceback" not in err, err
  return process.returncode


def arrays(step_folder):
  """Returns every array of a checkpoint by name, wherever it was written."""
  saved = ocp.checkpointables_metadata(step_folder).metadata
  here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  abstract = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here),
    {part: saved[part] for part in (checkpoint.MODEL, checkpoint.TRAINING)},
  )
  leaves = jax.tree_util.tree_leaves_with_path(ocp.load_checkpointables(step_folder, abstract))
  return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def training_rows(workdir):
  """Returns the training metrics by step, without what depends on the clock."""
  rows = telemetry.read_rows(str(workdir))
  trained = [row for row in rows if "train/loss" in row]
  steps = [row["step"] for row in trained]
  assert steps == sorted(set(steps))
  return {row["step"]: {k: v for k, v in row.items() if k.startswith("train/")} for row in trained}


# With several pytest workers: on one of them, so that the run is made once.
shares_a_run = pytest.mark.xdist_group("shares a run")


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
  """A run of six steps on eight devices."""
  return job("pretrain", tmp_path_factory.mktemp("pretrained"), "--config.total_steps=6")


@shares_a_run
def test_pretraining_leaves_checkpoints_metrics_figures_and_a_result(pretrained):
  assert checkpoint.find(str(pretrained)).name == "6"
  assert set(training_rows(pretrained)) == {1, 2, 3, 4, 5, 6}
  for figure in ("view_pairs.png", "curves.png"):
    with Image.open(pretrained / "figures" / figure) as image:
      assert image.size[0] > 300
  result = json.loads((pretrained / "result.json").read_text())
  assert result["eval/online_examples"] == 80
  assert list((pretrained / "tensorboard").iterdir())


def test_a_run_in_micro_batches_with_split_parameters_leaves_an_encoder_like_any_other(tmp_path):
  wide = ["--config.model.width=0.125", "--config.sharding.parameters=sharded", "--config.micro_batches=2"]
  other = ["--config.loss.kind=dcl", "--config.head.online=false", "--config.total_steps=1"]
  other += ["--config.data.resident=false", "--config.augment.place=host"]
  workdir = job("pretrain", tmp_path, *wide, *other)
  encode, config = simclr_jax.load_encoder(str(workdir))
  assert config.loss.kind == "dcl"
  assert encode(np.zeros((2, 16, 16, 3), np.uint8)).shape == (2, 64)


@shares_a_run
def test_the_loss_starts_where_random_embeddings_put_it(pretrained):
  # ln(2N - 1) for unrelated views; two identical views would start far below.
  assert abs(training_rows(pretrained)[1]["train/loss"] - np.log(31)) < 1.0


@pytest.fixture(scope="module")
def linear(pretrained, tmp_path_factory):
  """The linear evaluation of that run, its config taken from the checkpoint."""
  workdir = tmp_path_factory.mktemp("linear")
  assert command.main(["linear_eval", f"--config.checkpoint={pretrained}", f"--workdir={workdir}"]) == 0
  return workdir


@shares_a_run
def test_linear_eval_counts_the_whole_split_once(linear):
  result = json.loads((linear / "result.json").read_text())
  assert result["eval/examples"] == 80
  assert 0 <= result["eval/top1"] <= result["eval/top5"] <= 1
  assert result["eval/top1"] * 80 == pytest.approx(round(result["eval/top1"] * 80))


@shares_a_run
def test_the_features_protocol_trains_a_grid_on_one_pass_and_counts_the_split_once(pretrained, tmp_path):
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


@shares_a_run
def test_speed_waits_and_flops_are_in_every_row(pretrained):
  rows = [row for row in telemetry.read_rows(str(pretrained)) if "train/loss" in row]
  for row in rows:
    assert row["speed/images_per_second"] > 0
    assert 0 <= row["speed/data_wait_share"] <= 1
    assert 0 <= row["speed/checkpoint_wait_share"] <= 1
    per_image = row["speed/model_tflop_per_second"] * 1e12 / row["speed/images_per_second"]
    assert per_image == pytest.approx(FLOPS_OF_A_PAIR, rel=0.01)
    assert "speed/mfu" not in row  # Nobody knows the peak of this CPU.


@shares_a_run
def test_linear_eval_leaves_the_backbone_bit_for_bit(pretrained, linear):
  before, after = arrays(checkpoint.find(str(pretrained))), arrays(checkpoint.find(str(linear)))
  encoder = [name for name in before if name.startswith("['model']") and "['encoder']" in name]
  assert len(encoder) > 50
  for name in encoder:
    assert before[name].tobytes() == after[name].tobytes(), name
  head = [name for name in after if "['linear_head']" in name and name.startswith("['model']")]
  assert all(np.any(after[name]) for name in head)


def test_a_random_encoder_can_be_evaluated_too(tmp_path):
  job("linear_eval", tmp_path, "--config.checkpoint=random", "--config.linear_eval.total_epochs=0.2")
  assert json.loads((tmp_path / "result.json").read_text())["checkpoint"] == "random"


@shares_a_run
def test_finetuning_trains_the_whole_network(pretrained, tmp_path):
  job("finetune", tmp_path, f"--config.checkpoint={pretrained}")
  before, after = arrays(checkpoint.find(str(pretrained))), arrays(checkpoint.find(str(tmp_path)))
  changed = [n for n in after if n in before and n.startswith("['model']") and np.any(before[n] != after[n])]
  assert any("stem_conv" in name for name in changed)
  assert any("batch_stats" in name for name in changed)


@shares_a_run
def test_an_encoder_loads_in_one_line(pretrained):
  encode, config = simclr_jax.load_encoder(str(pretrained))
  images = np.random.default_rng(0).integers(0, 256, (131, 16, 16, 3), np.uint8)
  features = encode(images)
  assert features.shape == (131, 32)
  assert features.dtype == np.float32
  np.testing.assert_allclose(encode(images.astype(np.float32) / 255), features, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(encode(images[:3]), features[:3], rtol=1e-6)
  assert encode(images[:0]).shape == (0, 32)
  assert config.data.image_size == 16
  with pytest.raises(errors.UserError, match="16, 3"):
    encode(images[0])


@pytest.mark.parametrize(
  ("override", "named"), [("model.width=0.125", "config.model.width"), ("model.depth=18", "depth")]
)
@shares_a_run
def test_a_checkpoint_of_another_architecture_is_refused(pretrained, tmp_path, capsys, override, named):
  argv = [*TINY, f"--config.checkpoint={pretrained}", f"--config.{override}", f"--workdir={tmp_path}"]
  assert command.main(["linear_eval", *argv]) == 2
  assert named in capsys.readouterr().err


@shares_a_run
def test_a_workdir_that_holds_another_run_is_refused(pretrained, capsys):
  assert command.main(["pretrain", *TINY, f"--workdir={pretrained}", "--config.total_steps=7"]) == 2
  assert "total_steps was 6, now is 7" in capsys.readouterr().err


@pytest.mark.parametrize("resident", ["true", "false"])
def test_the_input_is_profiled_alone_and_says_what_a_chip_would_need(capsys, monkeypatch, resident):
  monkeypatch.setattr(input_profile, "SECONDS", 0.1)
  argv = ["pretrain", *TINY, "--profile_input", "--chip=v5e", "--mfu=0.5", f"--config.data.resident={resident}"]
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


def test_a_profile_for_an_unknown_chip_is_refused(capsys):
  assert command.main(["pretrain", *TINY, "--profile_input", "--chip=v5q"]) == 2
  assert "unknown chip 'v5q'; did you mean \"v5p\"?; use one of" in capsys.readouterr().err


def test_steps_to_profile_are_two_numbers(tmp_path, capsys):
  assert command.main(["pretrain", *TINY, f"--workdir={tmp_path}", "--profile_steps=10"]) == 2
  assert "--profile_steps=10 is not FIRST,LAST" in capsys.readouterr().err


def test_a_flat_folder_without_labels_pretrains_and_its_corrupt_image_is_named(tmp_path, capsys):
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
def test_a_killed_and_a_terminated_run_continue_bit_for_bit(tmp_path):
  settings = [
    "--config.total_steps=300",
    "--config.checkpoint_every_steps=50",
    "--config.keep_checkpoints=99",
    "--config.evaluate_every_epochs=0",
    "--config.data.steps_per_dispatch=5",
  ]
  whole, broken = tmp_path / "whole", tmp_path / "broken"
  assert finish(start(whole, *settings)) == 0

  killed = start(broken, *settings)
  wait_for_step(killed, broken, 30)
  killed.kill()
  killed.communicate()
  reached = max(training_rows(broken))
  assert 30 <= reached < 300

  terminated = start(broken, *settings)
  wait_for_step(terminated, broken, reached + 30)
  terminated.send_signal(signal.SIGTERM)
  assert finish(terminated) == 143
  stopped = max(training_rows(broken))
  assert reached < stopped < 300
  assert checkpoint.find(str(broken)).name == str(stopped)

  assert finish(start(broken, *settings)) == 0
  assert training_rows(broken) == training_rows(whole)
  for step in range(50, 301, 50):
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


@pytest.mark.slow
def test_two_processes_of_four_devices_are_one_of_eight(tmp_path):
  # In float64 what differs between the two can only be rounding, so the batches were the same.
  settings = ["--config.total_steps=3", "--config.model.dtype=float64", "--config.model.param_dtype=float64"]
  settings += ["--config.data.resident=false"]  # So that each process reads its part.
  assert finish(start(tmp_path / "one", *settings, devices=8)) == 0
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    port = probe.getsockname()[1]
  together = [f"--coordinator=localhost:{port}", "--processes=2"]
  pair = [start(tmp_path / "two", *settings, *together, f"--process={i}", devices=4) for i in (0, 1)]
  assert [finish(process) for process in pair] == [0, 0]

  one, two = training_rows(tmp_path / "one"), training_rows(tmp_path / "two")
  assert one.keys() == two.keys() == {1, 2, 3}
  for step in one:
    for name, value in one[step].items():
      np.testing.assert_allclose(two[step][name], value, rtol=1e-9, atol=1e-12, err_msg=f"{name} of step {step}")
  ours, theirs = (arrays(checkpoint.find(str(tmp_path / name))) for name in ("two", "one"))
  for name in theirs:
    largest = np.max(np.abs(theirs[name]), initial=1e-30)
    np.testing.assert_allclose(ours[name], theirs[name], rtol=0, atol=1e-9 * largest, err_msg=name)
  results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("one", "two")]
  assert results[0]["eval/online_examples"] == results[1]["eval/online_examples"] == 80
  assert results[0]["eval/online_top1"] == results[1]["eval/online_top1"]
