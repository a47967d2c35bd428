"""One tiny network, and finished runs of it that tests of all jobs share: each is made once, by the first who asks."""

import contextlib
import fcntl
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from simclr_jax import __main__ as command
from simclr_jax import keys
from simclr_jax.training import checkpoint, telemetry

ROOT = pathlib.Path(__file__).parents[1]
REAL_DATA = ROOT.parent / "shared" / "data"
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
  "--config.distill.batch_size=16",
  "--config.distill.total_epochs=0.4",
  "--config.knn.neighbours=5",
  # What these measure has tests of its own, and takes long to compile.
  "--config.monitor.knn_images=0",
  "--config.monitor.pairs=0",
  "--config.baselines.train_images=0",
]


def read_by(name: str, options: list[str]) -> list[str]:
  """Returns those options that a job reads, or leaves to later ones."""
  key = lambda text: text.partition("=")[0].removeprefix("--config.")
  unread = keys.unread(name, list(map(key, options)))
  return [text for text in options if key(text) not in unread]


def tiny(name: str) -> list[str]:
  """Returns the options of TINY for a job."""
  return read_by(name, TINY)


def sizes(name: str) -> list[str]:
  """Returns the options of TINY that a job has for itself, beside what comes with a checkpoint."""
  return [text for text in tiny(name) if text.startswith(f"--config.{name}.")]


def job(name: str, workdir, *more: str) -> pathlib.Path:
  """Runs a job of the tiny network in this process."""
  assert command.main([name, *tiny(name), f"--workdir={workdir}", *more]) == 0
  return pathlib.Path(workdir)


def start(workdir, *more: str) -> subprocess.Popen:
  """Starts a pretraining process of its own, with one device and the compiler's options of this one."""
  environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
  argv = [sys.executable, "-m", "simclr_jax", "pretrain", *tiny("pretrain"), f"--workdir={workdir}", *more]
  return subprocess.Popen(argv, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)


def arrays(path) -> dict[str, np.ndarray]:
  """Returns every array of a checkpoint by name, wherever it was written."""
  folder = checkpoint.open(str(path)).path
  saved = ocp.checkpointables_metadata(folder).metadata
  here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  abstract = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here),
    {part: saved[part] for part in (checkpoint.MODEL, checkpoint.TRAINING)},
  )
  leaves = jax.tree_util.tree_leaves_with_path(ocp.load_checkpointables(folder, abstract))
  return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def training_rows(workdir) -> dict[int, dict[str, float]]:
  """Returns the training metrics by step, without what depends on the clock."""
  trained = [row for row in telemetry.read_rows(str(workdir)) if "train/loss" in row]
  steps = [row["step"] for row in trained]
  assert steps == sorted(set(steps))
  return {row["step"]: {k: v for k, v in row.items() if k.startswith("train/")} for row in trained}


@contextlib.contextmanager
def only_once(folder: pathlib.Path):
  """Yields whether `folder` is still to be made; the workers of one pytest run wait for each other."""
  with open(f"{folder}.lock", "w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    done = pathlib.Path(f"{folder}.done")
    yield not done.exists()
    done.touch()


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory) -> pathlib.Path:
  """A folder that all workers of this pytest run share."""
  base = tmp_path_factory.getbasetemp()
  return base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base


def _made(folder: pathlib.Path, name: str, *more: str) -> pathlib.Path:
  with only_once(folder) as to_make:
    if to_make:
      job(name, folder, *more)
  return folder


@pytest.fixture(scope="session")
def pretrained(shared_folder) -> pathlib.Path:
  """A pretraining run of six steps on one device. Nobody may write into it."""
  return _made(shared_folder / "pretrained", "pretrain", "--config.total_steps=6", "--config.keep_checkpoints=9",
               "--config.checkpoint_every_steps=3")  # fmt: skip


@pytest.fixture(scope="session")
def linear(pretrained, shared_folder) -> pathlib.Path:
  """A linear evaluation of `pretrained`, its config taken from the checkpoint. Nobody may write into it."""
  folder = shared_folder / "linear"
  with only_once(folder) as to_make:
    if to_make:
      argv = ["linear_eval", f"--config.checkpoint={pretrained}", f"--workdir={folder}", *sizes("linear_eval")]
      assert command.main(argv) == 0
  return folder


@pytest.fixture(scope="session")
def finetuned(pretrained, shared_folder) -> pathlib.Path:
  """A fine-tuning of `pretrained`. Nobody may write into it."""
  return _made(shared_folder / "finetuned", "finetune", f"--config.checkpoint={pretrained}")
