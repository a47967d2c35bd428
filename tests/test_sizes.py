"""Numbers that follow from the data: batches that shrink, and what a folder of images suggests."""

import json
import math

import numpy as np
import pytest
from PIL import Image

import simclr_jax
from simclr_jax import config as config_lib
from simclr_jax import errors, experiment
from simclr_jax.data import measure, order
from simclr_jax.training import checkpoint, loop

LIMITS = measure.Limits(image_size=224, batch_size=256, epochs=200, images_seen=20_000_000)


def pictures(root, count, size=(100, 100), start=0):
  root.mkdir(exist_ok=True)
  for number in range(start, start + count):
    Image.fromarray(np.full((size[1], size[0], 3), number % 256, np.uint8)).save(root / f"{number:03d}.png")
  return root


def test_any_batch_has_shards_and_those_of_old_runs_stay():
  assert [order.shards_of(batch, 16) for batch in (512, 4096, 16, 40, 100, 7)] == [16, 16, 16, 8, 4, 1]


@pytest.mark.parametrize("examples", [1, 3, 10, 17, 300, 511, 512, 9999])
@pytest.mark.parametrize("batch_size", [1, 12, 100, 256, 512])
def test_a_batch_that_shrinks_is_filled_and_splits_into_its_shards(batch_size, examples):
  fitted = order.fitted(batch_size, examples, shards=16)
  assert 1 <= fitted <= min(batch_size, examples)
  assert fitted == batch_size or 2 * fitted > examples
  assert math.gcd(fitted, 16) >= min(math.gcd(batch_size, 16), 2 ** int(math.log2(examples))) or fitted == batch_size


def test_a_batch_that_shrinks_keeps_its_micro_batches():
  assert order.fitted(512, 300, micro_batches=3) == 288
  assert order.fitted(512, 10, micro_batches=3) == 6
  with pytest.raises(errors.UserError, match="2 images do not fill 3 micro-batches"):
    order.fitted(512, 2, micro_batches=3)


@pytest.mark.parametrize(
  ("examples", "batch", "length"),
  [(20, 16, 200), (100, 64, 200), (2062, 128, 200), (3264, 256, 200), (10**6, 256, 20), (10**7, 256, 10)],
)
def test_batch_and_length_follow_from_the_number_of_images(examples, batch, length):
  assert (measure.batch_size(examples, LIMITS), measure.epochs(examples, LIMITS)) == (batch, length)


@pytest.mark.parametrize(("side", "chosen"), [(28, 64), (100, 96), (191, 160), (3000, 224)])
def test_the_input_has_no_more_pixels_than_the_images(tmp_path, side, chosen):
  folder = pictures(tmp_path, 3, (side, side + 7))
  (folder / "broken.png").write_bytes(b"no image")
  assert measure.image_size(measure.sizes([str(path) for path in folder.iterdir()]), LIMITS) == chosen


def test_a_folder_is_measured_and_its_run_keeps_the_numbers(tmp_path, caplog):
  folder, workdir = pictures(tmp_path / "images", 90), str(tmp_path / "run")
  config = simclr_jax.load_config("folder", data={"dir": str(folder), "eval_split": ""}, seed=1)
  this = experiment.Experiment(config, "pretrain", workdir)
  found = this.config
  assert (found.data.image_size, found.batch_size, found.total_epochs) == (96, 64, 200)
  assert (config.batch_size, found.optimizer.warmup_epochs) == (0, 10)
  this.claim()
  stored = json.loads((tmp_path / "run" / "config.json").read_text())
  assert (stored["config"]["batch_size"], stored["asked"]["batch_size"]) == (64, 0)
  pictures(folder, 200, (300, 300), start=90)
  again = experiment.Experiment(config, "pretrain", workdir)
  again.claim()
  assert again.config == found
  assert experiment.Experiment(config, "pretrain").config.data.image_size == 224
  config_lib.set_key(config, "batch_size", 32)
  with pytest.raises(errors.UserError, match="batch_size was 64, now is 32"):
    experiment.Experiment(config, "pretrain", workdir).claim()


def test_what_is_typed_is_not_measured(tmp_path):
  folder = pictures(tmp_path / "images", 90)
  typed = {"data.dir": str(folder), "batch_size": 40, "total_epochs": 30, "data.image_size": 48}
  found = experiment.Experiment(config_lib.load("folder", typed), "pretrain").config
  assert (found.batch_size, found.total_epochs, found.data.image_size, found.optimizer.warmup_epochs) == (
    40,
    30,
    48,
    3,
  )
  typed |= {"total_epochs": 0, "measured.epochs": 20}
  short = experiment.Experiment(config_lib.load("folder", typed), "pretrain")
  assert (short.config.total_epochs, short.config.optimizer.warmup_epochs) == (20, 2)
  with pytest.raises(errors.UserError, match="batch_size is 0; use 1 or more"):
    config_lib.load("cifar10", {"batch_size": 0})


def test_the_batch_shrinks_to_the_labels_and_the_run_keeps_it(tmp_path):
  config = config_lib.load("demo", {"finetune.batch_size": 512})
  this = experiment.Experiment(config, "finetune", str(tmp_path))
  this.fit_batch(10)
  assert (this.recipe.batch_size, this.config.finetune.batch_size, this.asked) == (8, 8, {"finetune.batch_size": 512})
  peak = lambda run: float(max(run.optimizer(10).schedule(step) for step in range(9)))
  same = experiment.Experiment(config_lib.load("demo", {"finetune.batch_size": 8}), "finetune")
  assert peak(this) == peak(same)
  this.claim()
  again = experiment.Experiment(config, "finetune", str(tmp_path))
  again.fit_batch(5000)
  assert again.recipe.batch_size == 8


def test_saves_by_time_follow_the_clock_and_the_steps(tmp_path, monkeypatch):
  saves = checkpoint.Checkpoints(str(tmp_path), {}, every_steps=0, keep=1, keep_every_steps=7, every_seconds=60)
  now = saves._saved_at
  run = loop.Run(str(tmp_path), 100, 8, saves, log_every_steps=10, title="", shown={})
  monkeypatch.setattr(loop.time, "monotonic", lambda: now + 59)
  assert [run.save_due(step - 1, step) for step in (1, 7, 10)] == [False, True, False]
  monkeypatch.setattr(loop.time, "monotonic", lambda: now + 60)
  assert run.save_due(0, 1)
  # Processes ask the first one's clock, where rows are logged.
  asked = []
  monkeypatch.setattr(loop.jax, "process_count", lambda: 2)
  monkeypatch.setattr(loop.multihost_utils, "broadcast_one_to_all", lambda late: asked.append(bool(late)) or late)
  assert [run.save_due(step - 1, step) for step in (9, 10, 11)] == [False, True, False]
  assert asked == [True]
  saves.close()
