"""Mistakes of the user: one line each that names the key and what to type, exit code 2, before anything slow."""

import os
import re
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image
from runs import ROOT

from simclr_jax import __main__ as command
from simclr_jax import config as config_lib
from simclr_jax import errors, preflight

SMALL = "--config=folder:small"
IMAGES = "--config.data.dir=photos"
HELD = "--config.data.holdout=0.25"


@pytest.fixture
def here(tmp_path, monkeypatch):
  """The current folder: photos/CLASS/*.png, an empty folder, a file."""
  for kind in ("cat", "dog"):
    for number in range(4):
      path = tmp_path / "photos" / kind / f"{number}.png"
      path.parent.mkdir(parents=True, exist_ok=True)
      Image.fromarray(np.full((8, 8, 3), number, np.uint8)).save(path)
  (tmp_path / "empty").mkdir()
  (tmp_path / "file").write_text("text")
  monkeypatch.chdir(tmp_path)
  return tmp_path


MISTAKES = {
  "a workdir that is a file": (
    ["pretrain", SMALL, IMAGES, HELD, "--workdir=file"],
    "file is a file; give --workdir=DIR",
  ),
  "below a file": (
    ["pretrain", SMALL, IMAGES, HELD, "--workdir=file/run"],
    "file/run cannot be written .*--workdir=DIR",
  ),
  "impossible": (["pretrain", SMALL, IMAGES, HELD, "--workdir=/proc/run"], "workdir /proc/run cannot be written"),
  "no workdir": (["pretrain", SMALL, IMAGES], "has no --workdir"),
  "a checkpoint that is a file": (
    ["knn", "--config.checkpoint=file", "--workdir=w"],
    "checkpoint .*file is a file; give",
  ),
  "a checkpoint that is not there": (["knn", "--config.checkpoint=none", "--workdir=w"], "none does not exist"),
  "an empty checkpoint": (["knn", "--config.checkpoint=empty", "--workdir=w"], "empty holds no checkpoint"),
  "a checkpoint beside a config": (
    ["finetune", SMALL, IMAGES, HELD, "--config.checkpoint=none", "--workdir=w"],
    "config.checkpoint .*none does not exist; give a run's workdir",
  ),
  "a teacher that is a file": (
    ["distill", SMALL, IMAGES, HELD, "--config.distill.teacher=file", "--workdir=w"],
    "config.distill.teacher .*file is a file; give a run's workdir",
  ),
  "a TFDS data set that is not prepared": (
    ["pretrain", "--config=cifar10", "--config.data.dir=empty", "--workdir=w"],
    '"cifar10" is not prepared in ".*empty"; prepare it with: tfds build cifar10 --data_dir=',
  ),
  "no images": (["pretrain", SMALL, "--workdir=w"], "has no images; .*--config.data.dir=FOLDER"),
  "an empty folder": (["pretrain", SMALL, "--config.data.dir=empty", "--workdir=w"], "no image in folder .*empty"),
  "a missing folder": (["pretrain", SMALL, "--config.data.dir=fotos", "--workdir=w"], "no folder .*fotos.*data.dir"),
  "a missing file": (
    ["pretrain", "--config=cifar10", "--config.data.source=arrays", "--config.data.dir=a.npz", "--workdir=w"],
    "no file .*a.npz.*--config.data.dir=FILE.npz",
  ),
  "a missing TFDS folder": (
    ["pretrain", "--config=cifar10", "--config.data.dir=x", "--workdir=w"],
    "no folder .*data.dir",
  ),
  "a missing split": (
    ["pretrain", SMALL, IMAGES, "--config.data.train_split=tset", "--workdir=w"],
    'no split "tset"; its splits: train',
  ),
  "no held-out images": (["pretrain", SMALL, IMAGES, "--workdir=w"], 'no split "test".*--config.data.holdout=0.2'),
  "image_size": (
    ["pretrain", "--config=cifar10", "--config.data.image_size=0", "--workdir=w"],
    "config.data.image_size is 0",
  ),
  "min_area": (
    ["pretrain", SMALL, IMAGES, "--config.augment.min_area=2", "--workdir=w"],
    "config.augment.min_area is 2",
  ),
  "batch_size": (
    ["pretrain", SMALL, IMAGES, "--config.batch_size=-4", "--workdir=w"],
    "config.batch_size is -4; use 1 or",
  ),
  "temperature": (
    ["pretrain", SMALL, IMAGES, "--config.loss.temperature=0", "--workdir=w"],
    "config.loss.temperature is 0",
  ),
  "total_epochs": (
    ["pretrain", "--config=cifar10", "--config.total_epochs=0", "--workdir=w"],
    "config.total_epochs is 0",
  ),
  "no prefix": (
    ["pretrain", SMALL, IMAGES, "--batch_size=32", "--workdir=w"],
    "have a prefix: --config.batch_size=32.",
  ),
  "a key of another job": (
    ["knn", "--config.checkpoint=empty", "--config.optimizer.name=adam", "--workdir=w"],
    "knn does not read config.optimizer.name; it is for pretrain. Leave it out",
  ),
  "a job": (["pretrian", SMALL], 'unknown job .pretrian.; did you mean "pretrain"'),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing(name, here, capsys, monkeypatch):
  argv, message = MISTAKES[name]
  # Jobs are imported once all of this is known to be right.
  monkeypatch.setattr(command.simclr_jax.importlib, "import_module", lambda job: pytest.fail(f"{job} was imported"))
  assert command.main(argv) == 2
  error = capsys.readouterr().err
  assert error.count("\n") == 1
  assert error.startswith("simclr_jax: ")
  assert re.search(message, error), error
  assert (here / "file").read_text() == "text"
  assert sorted(os.listdir(here)) == ["empty", "file", "photos"]


def test_a_mistake_is_found_within_three_seconds(here):
  """In a process of its own, where nothing is imported yet; the best of two, for what else the machine does."""
  argv = [sys.executable, "-m", "simclr_jax", "pretrain", SMALL, "--config.data.dir=fotos", "--workdir=w"]
  seconds = []
  for _ in range(2):
    begin = time.monotonic()
    done = subprocess.run(argv, cwd=here, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    seconds.append(time.monotonic() - begin)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
  assert min(seconds) < 3


def test_jobs_begin_without_messages_of_libraries(here):
  """Where libtpu is installed and there is no TPU it has much to say when JAX looks for devices."""
  program = "from simclr_jax import __main__\nimport jax\nprint(jax.devices()[0].platform)"
  environment = {name: value for name, value in os.environ.items() if not name.startswith(("TPU_", "JAX_PLATFORMS"))}
  environment |= {"PYTHONPATH": str(ROOT), "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
  done = subprocess.run([sys.executable, "-c", program], cwd=here, env=environment, capture_output=True, text=True)
  assert (done.returncode, done.stderr) == (0, "")


def test_images_to_predict_are_looked_for_first(here):
  config = config_lib.load("cifar10", {"predict.images": "nowhere"})
  with pytest.raises(errors.UserError, match='no file or folder ".*nowhere" for config.predict.images'):
    preflight.check("predict", config, "")
  for path in ("photos", "photos/cat/0.png", "photos/*/*.png", "gs://bucket/images"):
    preflight.check("predict", config_lib.load("cifar10", {"predict.images": path}), "")
