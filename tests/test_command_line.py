"""The command line: help, overrides, and one clear line with exit code 2 for every mistake."""

import pathlib
import re

import numpy as np
import pytest
from PIL import Image

from simclr_jax import __main__ as command
from simclr_jax.training import checkpoint

ROOT = pathlib.Path(__file__).parents[1]
TINY = [
  "--config.model.depth=10",
  "--config.model.width=0.0625",
  "--config.head.out_dim=8",
  "--config.batch_size=16",
  "--config.eval_batch_size=16",
  "--config.total_steps=2",
]
SHAPES = ["--config.data.source=shapes", "--config.data.examples=64", f"--config={ROOT}/configs/cifar10.py"]


def fails(capsys, *argv) -> str:
  """Returns the one line that a mistaken command prints."""
  assert command.main(list(argv)) == 2
  lines = capsys.readouterr().err.strip().splitlines()
  messages = [line for line in lines if line.startswith("simclr_jax: ")]
  assert len(messages) == 1, lines
  assert "Traceback" not in "".join(lines)
  return messages[0]


@pytest.fixture
def pretrain(capsys, tmp_path):
  """Runs a tiny pretraining command that is expected to fail, with these arguments added."""
  return lambda *more: fails(capsys, "pretrain", *SHAPES, *TINY, f"--workdir={tmp_path}/run", *more)


def test_help_names_every_job_and_exits_0(capsys):
  assert command.main(["--help"]) == 0
  text = capsys.readouterr().out
  assert all(job in text for job in command.JOBS)


@pytest.mark.parametrize("job", command.JOBS)
def test_every_job_has_a_help_that_says_what_it_needs(job, capsys):
  assert command.main([job, "--help"]) == 0
  assert "--workdir" in capsys.readouterr().out


def test_an_unknown_job_gets_the_nearest_one(capsys):
  assert 'did you mean "pretrain"' in fails(capsys, "pretain")


def test_an_unknown_key_gets_the_nearest_one(pretrain):
  assert 'did you mean "batch_size"' in pretrain("--config.bath_size=3")
  assert 'did you mean "distill.temperature" or "loss.temperature"?' in pretrain("--config.temperature=3")


def test_a_section_is_not_a_key(pretrain):
  assert "config.model.depth" in pretrain("--config.model=3")


@pytest.mark.parametrize("value", ["abc", "0.5", ""])
def test_a_wrong_type_is_named(pretrain, value):
  message = pretrain(f"--config.batch_size={value}")
  assert "config.batch_size is a whole number" in message
  assert repr(value) in message


def test_a_flag_takes_true_or_false(pretrain):
  assert "true or false" in pretrain("--config.augment.flip=maybe")


def test_an_unknown_option_and_a_stray_word_are_named(pretrain):
  assert 'did you mean "workdir"' in pretrain("--workdri=x")
  assert "'stray'" in pretrain("stray")


def test_a_missing_config_lists_the_experiments(capsys, tmp_path):
  assert "cifar10.py" in fails(capsys, "pretrain", f"--workdir={tmp_path}")
  assert "cifar10.py" in fails(capsys, "pretrain", f"--config={ROOT}/configs/cifar.py", f"--workdir={tmp_path}")


@pytest.mark.parametrize(
  ("text", "expected"),
  [
    ("def get_config(:\n", "SyntaxError"),
    ("import nothing_of_this_name\n", "nothing_of_this_name"),
    ("x = 1\n", "get_config"),
    ("def get_config():\n  return {}\n", "ConfigDict"),
  ],
)
def test_an_unreadable_config_says_where(capsys, tmp_path, text, expected):
  (tmp_path / "broken.py").write_text(text)
  assert expected in fails(capsys, "pretrain", f"--config={tmp_path}/broken.py", f"--workdir={tmp_path}")


def test_an_unknown_variant_lists_the_known_ones(capsys, tmp_path):
  message = fails(capsys, "pretrain", f"--config={ROOT}/configs/imagenet.py:v3", f"--workdir={tmp_path}")
  assert ":readme" in message


def test_a_missing_workdir_is_asked_for(capsys):
  assert "--workdir" in fails(capsys, "pretrain", *SHAPES)


def test_a_batch_that_does_not_split_over_the_devices_names_one_that_does(pretrain):
  assert re.search(r"config.batch_size 12 .* 8 devices.* 8 or 16", pretrain("--config.batch_size=12"))


@pytest.mark.parametrize(
  ("override", "expected"),
  [
    ("model.depth=51", "50"),
    ("model.dtype=float31", "float32"),
    ("optimizer.name=larz", "lars"),
    ("optimizer.scaling=cubic", "linear"),
    ("augment.brightness=both", "additive"),
    ("augment.color_strength=2.0", "1.25"),
    ("augment.place=tpu", "host"),
    ("data.source=tfdz", "tfds"),
    ("data.train_split=trian", "train"),
    ("data.shards=7", "shards"),
    ("head.layers=-1", "layers"),
    ("batch_size=128", "64 training images"),
  ],
)
def test_a_bad_value_is_named_before_anything_is_compiled(pretrain, override, expected):
  assert expected in pretrain(f"--config.{override}")


@pytest.mark.parametrize(
  ("overrides", "expected"),
  [
    (["data.name=cifar11"], "cifar10"),
    (["data.name=cifar10", "data.train_split=trian"], "train"),
  ],
)
def test_an_unknown_tfds_name_or_split_is_named(pretrain, tfds_dir, overrides, expected):
  settings = [f"--config.{o}" for o in ["data.source=tfds", f"data.dir={tfds_dir}", *overrides]]
  assert expected in pretrain(*settings)


def test_a_missing_or_empty_folder_is_named(pretrain, tmp_path):
  settings = ["--config.data.source=folder", "--config.data.name="]
  assert "nowhere" in pretrain(*settings, "--config.data.dir=/nowhere")
  (tmp_path / "empty").mkdir()
  assert "empty" in pretrain(*settings, f"--config.data.dir={tmp_path}/empty")


def test_a_folder_with_too_many_corrupt_images_stops_the_run(pretrain, tmp_path):
  folder = tmp_path / "images"
  folder.mkdir()
  for i in range(32):
    Image.fromarray(np.full((40, 40, 3), i, np.uint8)).save(folder / f"{i}.jpg")
  (folder / "0.jpg").write_bytes(b"no image")
  settings = ["--config.data.source=folder", f"--config.data.dir={folder}"]
  assert "max_bad_share" in pretrain(*settings, "--config.data.max_bad_share=0.01")


@pytest.mark.parametrize("checkpoint", ["", "/nowhere"])
def test_linear_eval_without_a_checkpoint_says_what_to_give(capsys, tmp_path, checkpoint):
  message = fails(capsys, "linear_eval", *SHAPES, f"--workdir={tmp_path}/run", f"--config.checkpoint={checkpoint}")
  assert "checkpoint" in message


def test_the_config_of_an_older_checkpoint_is_completed_as_it_ran(monkeypatch):
  saved = command.load_config(str(ROOT / "configs" / "demo.py"), {}).to_dict()
  saved["batch_size"] = 96
  for section, key in (("data", "resident"), ("augment", "place"), ("linear_eval", "protocol")):
    del saved[section][key]
  del saved["probes"]
  monkeypatch.setattr(checkpoint, "read_config", lambda path: saved)
  config = command.load_config("", {"checkpoint": "old"})
  assert (config.batch_size, config.data.source) == (96, "shapes")
  # There was no other place than the host, and no other way than to feed.
  assert (config.augment.place, config.data.resident, config.linear_eval.protocol) == ("host", False, "reference")
  assert config.probes.passes == 1


def test_a_dispatch_has_a_step_at_least(capsys, tmp_path):
  argv = [*SHAPES, "--config.batch_size=16", "--config.data.steps_per_dispatch=0", f"--workdir={tmp_path}/run"]
  assert "steps_per_dispatch is 0; use 1 or more" in fails(capsys, "pretrain", *argv)


def test_the_features_protocol_has_no_steps_to_profile(capsys, tmp_path):
  argv = [*SHAPES, "--config.checkpoint=random", "--config.linear_eval.protocol=features", "--profile_steps=1,2"]
  assert "--profile_steps is for" in fails(capsys, "linear_eval", *argv, f"--workdir={tmp_path}/run")
