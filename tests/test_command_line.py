"""The command line: help, overrides, and one clear line with exit code 2 for every mistake."""

import json
import pathlib
import re
import types

import numpy as np
import pytest
from PIL import Image

import simclr_jax
from simclr_jax import __main__ as command
from simclr_jax import config as config_lib
from simclr_jax import errors, jobs
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
  assert all(job in text for job in jobs.JOBS)


@pytest.mark.parametrize("job", [*jobs.JOBS, "config", "configs"])
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
  assert "cifar10" in fails(capsys, "pretrain", f"--workdir={tmp_path}")
  assert 'did you mean "cifar10' in fails(
    capsys, "pretrain", f"--config={ROOT}/configs/cifar.py", f"--workdir={tmp_path}"
  )
  assert 'did you mean "cifar10"' in fails(capsys, "pretrain", "--config=cifar", f"--workdir={tmp_path}")


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


@pytest.mark.devices(8)
def test_a_batch_that_does_not_split_names_one_that_does(pretrain):
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
    ("head.layers=-1", "layers"),
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


def test_the_config_of_an_older_checkpoint_is_completed(monkeypatch):
  saved = config_lib.load("demo").to_dict()
  saved["batch_size"] = 96
  for section, key in (("data", "resident"), ("augment", "place"), ("linear_eval", "protocol"), ("model", "encoder")):
    del saved[section][key]
  del saved["probes"]
  monkeypatch.setattr(checkpoint, "open", lambda path: types.SimpleNamespace(config=saved))
  config = config_lib.load("", {"checkpoint": "old"})
  assert (config.batch_size, config.data.source, config.model.encoder) == (96, "shapes", "resnet")
  # There was no other place than the host, and no other way than to feed.
  assert (config.augment.place, config.data.resident, config.linear_eval.protocol) == ("host", False, "reference")
  assert config.probes.passes == 1


def test_a_dispatch_has_a_step_at_least(capsys, tmp_path):
  argv = [*SHAPES, "--config.batch_size=16", "--config.data.steps_per_dispatch=0", f"--workdir={tmp_path}/run"]
  assert "steps_per_dispatch is 0; use 1 or more" in fails(capsys, "pretrain", *argv)


def test_the_features_protocol_has_no_steps_to_profile(capsys, tmp_path):
  argv = [*SHAPES, "--config.checkpoint=random", "--config.linear_eval.protocol=features", "--profile_steps=1,2"]
  assert "--profile_steps is for" in fails(capsys, "linear_eval", *argv, f"--workdir={tmp_path}/run")


def test_the_bundled_experiments_are_listed(capsys):
  assert command.main(["configs"]) == 0
  lines = capsys.readouterr().out.splitlines()
  assert len(lines) == len(config_lib.bundled())
  assert any(line.startswith("cifar10 ") and "CIFAR-10" in line for line in lines)


def test_a_config_is_printed_with_meanings_and_what_differs(capsys):
  assert command.main(["config", "--config=cifar10:small", "--config.loss.temperature=0.25"]) == 0
  lines = capsys.readouterr().out.splitlines()
  (line,) = [line for line in lines if "loss.temperature =" in line]
  assert re.fullmatch(r"\* loss.temperature = 0.25 +# divides the similarities \(default: 0.1\)", line)
  (line,) = [line for line in lines if "loss.kind =" in line]
  assert line.startswith("  loss.kind = 'nt_xent'")


@pytest.mark.parametrize("name", ["cifar10", "cifar10:small", "configs/cifar10.py", f"{ROOT}/configs/cifar10.py:small"])
def test_an_experiment_goes_by_name_and_by_path(tmp_path, monkeypatch, name):
  monkeypatch.chdir(tmp_path)
  assert config_lib.load(name).data.name == "cifar10"


def test_a_config_file_anywhere_needs_the_package_alone(tmp_path, monkeypatch):
  text = (
    "from simclr_jax import config\n\n\ndef get_config():\n  c = config.read('demo')\n  c.batch_size = 8\n  return c\n"
  )
  (tmp_path / "mine.py").write_text(text)
  monkeypatch.chdir(tmp_path)
  assert config_lib.load("mine.py").batch_size == 8
  (tmp_path / "old.py").write_text("from configs import base\n")
  with pytest.raises(errors.UserError, match=r"Since 0.2 the defaults are"):
    config_lib.load("old.py")


def test_python_overrides_are_nested_dotted_or_plain():
  config = simclr_jax.load_config("demo", batch_size=64, loss={"temperature": 1}, **{"model.width": "0.5"})
  assert (config.batch_size, config.loss.temperature, config.model.width) == (64, 1.0, 0.5)
  for wrong in (64.5, True, None, [64]):
    with pytest.raises(errors.UserError, match="config.batch_size is a whole number"):
      simclr_jax.load_config("demo", batch_size=wrong)
  with pytest.raises(errors.UserError, match='did you mean "batch_size"'):
    simclr_jax.load_config("demo", bath_size=64)


def test_options_take_their_values_after_a_space_too():
  options, overrides = command.parse("pretrain", ["--workdir", "runs/x", "--profile_steps", "3,4", "--profile_input"])
  assert (options, overrides) == ({"workdir": "runs/x", "profile_steps": (3, 4), "profile_input": True}, {})
  assert command.parse("knn", ["--config.a.b=c d", "--config.flag"])[1] == {"a.b": "c d", "flag": "true"}


@pytest.mark.parametrize(
  ("argv", "expected"),
  [
    (["plan", "--mfu=2"], "--mfu got '2'; it wants a share of the peak"),
    (["plan", "--batch_sizes=16,x"], "--batch_sizes is '16,x'; give whole numbers"),
    (["bench", "--rounds=0"], "--rounds got '0'; it wants a number from 1"),
    (["convert", "--classifier_layer=-2"], "--classifier_layer got '-2'"),
    (["convert", "--config=demo"], "convert takes no --config"),
    (["pretrain", "--workdir"], "option --workdir needs a value"),
  ],
)
def test_a_value_that_no_option_takes_is_named(capsys, argv, expected):
  assert expected in fails(capsys, *argv)


def test_the_console_script_prints_its_version(capsys):
  assert command.main(["--version"]) == 0
  assert capsys.readouterr().out.strip() == simclr_jax.__version__


def test_a_workdir_belongs_to_one_run(tmp_path):
  config = config_lib.load("demo").to_dict()
  claim = lambda config, job="pretrain": config_lib.claim(str(tmp_path), config, job)
  claim(config)
  claim({**config, "log_every_steps": 6, "data": {**config["data"], "dir": "b"}})
  with pytest.raises(errors.UserError, match="batch_size was 128, now is 9"):
    claim({**config, "batch_size": 9})
  with pytest.raises(errors.UserError, match="job was 'pretrain', now is 'finetune'"):
    claim(config, "finetune")
  # Keys that are younger than the stored run have their defaults.
  stored = json.loads((tmp_path / "config.json").read_text())
  assert stored["version"] == simclr_jax.__version__
  del stored["config"]["memory"], stored["config"]["micro_batches"], stored["version"]
  (tmp_path / "config.json").write_text(json.dumps(stored))
  with pytest.raises(errors.UserError, match="micro_batches was 1, now is 2"):
    claim({**config, "micro_batches": 2})
  # A key that the job does not read changes nothing.
  claim({**config, "finetune": {**config["finetune"], "micro_batches": 2}})
  claim(config)
