"""Relative paths, as people type them: every job that reads a checkpoint takes one, from any folder."""

import json

import numpy as np
import pytest
from test_jobs import TINY

import simclr_jax
from simclr_jax import __main__ as command
from simclr_jax import errors


@pytest.fixture(scope="module")
def home(tmp_path_factory):
  """A folder that holds a pretraining run `runs/tiny`, made by a relative --workdir."""
  home = tmp_path_factory.mktemp("home")
  with pytest.MonkeyPatch.context() as patch:
    patch.chdir(home)
    assert command.main(["pretrain", *TINY, "--config.total_steps=1", "--workdir=runs/tiny"]) == 0
  return home


@pytest.mark.parametrize("job", ["linear_eval", "finetune", "knn", "embed"])
def test_a_job_takes_a_relative_checkpoint(home, monkeypatch, job):
  monkeypatch.chdir(home)
  argv = [
    "--config.checkpoint=runs/tiny",
    f"--workdir=runs/{job}",
    "--config.linear_eval.total_epochs=0.2",
    "--config.knn.neighbours=5",
  ]
  assert command.main([job, *argv]) == 0
  recorded = json.loads((home / "runs" / job / "config.json").read_text())["config"]["checkpoint"]
  assert recorded.startswith(f"{home}/runs/tiny")  # Another folder must not change what it means.


def test_load_encoder_takes_a_relative_path(home, monkeypatch):
  monkeypatch.chdir(home / "runs")
  encode, _ = simclr_jax.load_encoder("tiny")
  assert encode(np.zeros((1, 16, 16, 3), np.uint8)).shape[0] == 1


def test_urls_stay_and_the_home_folder_is_expanded(monkeypatch):
  monkeypatch.setenv("HOME", "/home/somebody")
  assert errors.absolute("gs://bucket/run") == "gs://bucket/run"
  assert errors.absolute("~/run") == "/home/somebody/run"
