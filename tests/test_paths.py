"""Relative paths, as people type them: every job that reads a checkpoint takes one, from any folder."""

import json
import shutil

import numpy as np
import pytest
from runs import tiny

import simclr_jax
from simclr_jax import __main__ as command
from simclr_jax import files


@pytest.fixture
def home(pretrained, tmp_path, monkeypatch):
  """A folder that holds a pretraining run `runs/tiny`; the current one."""
  (tmp_path / "runs").mkdir()
  shutil.copytree(pretrained, tmp_path / "runs" / "tiny")
  monkeypatch.chdir(tmp_path)
  return tmp_path


@pytest.mark.slow
def test_pretraining_takes_a_relative_workdir(home):
  # Done before: the same command, typed beside the run, takes no step.
  more = ["--config.total_steps=6", "--config.keep_checkpoints=9", "--config.checkpoint_every_steps=3"]
  assert command.main(["pretrain", *tiny("pretrain"), *more, "--workdir=runs/tiny"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
  ("job", "setting"),
  [("linear_eval", "linear_eval.total_epochs=0.2"), ("knn", "knn.neighbours=5"), ("embed", "embed.split=test")],
)
def test_a_job_takes_a_relative_checkpoint(home, job, setting):
  argv = ["--config.checkpoint=runs/tiny", f"--workdir=runs/{job}", f"--config.{setting}"]
  assert command.main([job, *argv]) == 0
  recorded = json.loads((home / "runs" / job / "config.json").read_text())["config"]["checkpoint"]
  assert recorded.startswith(f"{home}/runs/tiny")  # Another folder must not change what it means.


def test_load_encoder_takes_a_relative_path(home, monkeypatch):
  monkeypatch.chdir(home / "runs")
  encode, _ = simclr_jax.load_encoder("tiny")
  assert encode(np.zeros((1, 16, 16, 3), np.uint8)).shape[0] == 1


def test_folders_to_transfer_to_are_relative_to_where_they_are_typed(home):
  (home / "runs" / "pics").mkdir()
  config = simclr_jax.load_config("cifar10", **{"transfer.datasets": "dtd, folder:runs/pics,folder:~/x"})
  assert config.transfer.datasets == f"dtd,folder:{home}/runs/pics,folder:{files.absolute('~/x')}"


def test_urls_stay_and_the_home_folder_is_expanded(monkeypatch):
  monkeypatch.setenv("HOME", "/home/somebody")
  assert files.absolute("gs://bucket/run") == "gs://bucket/run"
  assert files.absolute("~/run") == "/home/somebody/run"
