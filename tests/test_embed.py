"""embed: files that hold the split in its order, whatever the devices, and that a second run completes."""

import json
import os
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hidden import hide
from PIL import Image
from pyarrow import parquet
from runs import ROOT, job, tiny

from simclr_jax import __main__ as command
from simclr_jax import config as config_lib
from simclr_jax import errors, inference, network
from simclr_jax.data import arrays, shapes, source, sources
from simclr_jax.hardware import sharding
from simclr_jax.training import checkpoint
from simclr_jax.training import state as state_lib

OPTIONS = ["--config.data.examples=40", "--config.eval_batch_size=8", "--config.embed.rows_per_file=16"]
OPTIONS += ["--config.checkpoint=random"]


@pytest.fixture
def projection(monkeypatch):
  """A matrix f32[768, 5] in place of the network, which takes long to compile."""
  matrix = np.random.default_rng(0).normal(size=(16 * 16 * 3, 5)).astype(np.float32)
  product = lambda matrix, images: jnp.matmul(images.reshape(len(images), -1), matrix, precision="highest")
  placed = lambda mesh: jax.device_put(matrix, sharding.replicated(mesh))
  frozen = lambda run, mesh: inference.Representation(product, placed(mesh), layer=0)
  monkeypatch.setattr(inference, "representation", frozen)
  return matrix


def run(workdir, *more):
  job("embed", workdir, *OPTIONS, *more)
  return json.loads((workdir / "result.json").read_text())


def refused(capsys, workdir, *more):
  """Returns the message of a command that ends with exit code 2."""
  assert command.main(["embed", *tiny("embed"), *OPTIONS, f"--workdir={workdir}", *more]) == 2
  return capsys.readouterr().err.splitlines()[-1]


def whole(workdir, result):
  """Returns the arrays of all files, one after the other."""
  files = [dict(np.load(workdir / name)) for name in result["files"]]
  return {name: np.concatenate([file[name] for file in files]) for name in files[0]}


def folder_of(root, count=11):
  """Writes images of a range of sizes in two classes, and returns their names in order."""
  rng = np.random.default_rng(1)
  for number in range(count):
    path = root / ("cat" if number % 3 else "dog") / f"{number:02d}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 256, (16 + number, 40, 3), np.uint8)).save(path)
  return sorted(str(path.relative_to(root)) for path in root.rglob("*.png"))


@pytest.mark.parametrize("devices", [1, pytest.param(8, marks=pytest.mark.devices(8))])
def test_the_files_hold_every_example_once_in_order(tmp_path, projection, devices):
  assert len(jax.local_devices()) == devices
  result = run(tmp_path)
  table = whole(tmp_path, result)
  images, labels = shapes.draw("train", 40, 16, 0)
  wanted = images.reshape(40, -1).astype(np.float64) / 255 @ projection
  np.testing.assert_allclose(table["features"], wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
  np.testing.assert_array_equal(table["label"], labels)
  np.testing.assert_array_equal(table["index"], np.arange(40))
  np.testing.assert_array_equal(table["name"], np.arange(40).astype(str))
  assert {name: str(column.dtype) for name, column in table.items() if name != "name"} == {
    "features": "float32",
    "label": "int32",
    "index": "int64",
  }
  assert result["files"] == [f"features-0000{i}-of-00003.npz" for i in range(3)]
  assert (result["examples"], result["dimension"], result["layer"]) == (40, 5, 0)
  assert result["class_names"] == list(shapes.CLASS_NAMES)


@pytest.mark.slow
def test_encode_takes_files_and_crops_them_as_embed_does(pretrained, tmp_path):
  names = folder_of(tmp_path / "pictures")
  source_of = ["--config.data.source=folder", f"--config.data.dir={tmp_path}/pictures", "--config.data.resident=false"]
  workdir = job(
    "embed", tmp_path / "out", f"--config.checkpoint={pretrained}", "--config.eval_batch_size=8", *source_of
  )
  table = whole(workdir, json.loads((workdir / "result.json").read_text()))
  encode, _ = inference.load_encoder(str(pretrained))
  files = [tmp_path / "pictures" / name for name in names]
  np.testing.assert_allclose(encode(files), table["features"], rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(encode(str(files[3])), table["features"][3:4], rtol=1e-5, atol=1e-5)
  (tmp_path / "notes.txt").write_text("no image")
  for wrong in ("notes.txt", "absent.png"):
    with pytest.raises(errors.UserError, match=f'{wrong}" cannot be read as an image'):
      encode([files[0], tmp_path / wrong])


@pytest.mark.parametrize(
  ("images", "message"),
  [
    (np.zeros((1, 16, 16, 3), np.int64), "images are int64; wanted uint8, or floats"),
    (np.full((1, 16, 16, 3), 255.0), "values from 255 to 255; wanted uint8, or floats in"),
    (np.full((1, 16, 16, 3), -1.0), "values from -1 to -1"),
    (np.full((1, 16, 16, 3), np.nan, np.float32), "values from nan to nan"),
    (np.zeros((16, 16, 3), np.uint8), "wanted .N, H, W, 3."),
  ],
)
def test_images_of_another_range_are_refused(pretrained, images, message):
  encode, _ = inference.load_encoder(str(pretrained))
  with pytest.raises(errors.UserError, match=message):
    encode(images)


def test_a_second_run_computes_the_rows_of_missing_files_alone(tmp_path, projection, monkeypatch):
  result = run(tmp_path)
  before = whole(tmp_path, result)
  first, second, third = (tmp_path / name for name in result["files"])
  second.unlink()
  # A killed process leaves this behind.
  second.with_name(f".{second.name}.partial").write_bytes(b"half")
  (tmp_path / "result.json").unlink()
  times = [path.stat().st_mtime_ns for path in (first, third)]
  seen, consecutive = [], arrays.Arrays.consecutive
  monkeypatch.setattr(arrays.Arrays, "consecutive", lambda held, *rows: seen.append(rows) or consecutive(held, *rows))
  assert run(tmp_path) == result
  assert seen == [(16, 32)]
  assert [path.stat().st_mtime_ns for path in (first, third)] == times
  for name, column in whole(tmp_path, result).items():
    np.testing.assert_array_equal(column, before[name])
  assert not list(tmp_path.glob(".*.partial"))


@pytest.mark.slow
def test_a_folder_of_any_sizes_becomes_parquet_with_file_names(tmp_path, projection):
  names = folder_of(tmp_path / "images")
  of_folder = ["--config.data.source=folder", f"--config.data.dir={tmp_path}/images", "--config.data.resident=false"]
  result = run(tmp_path / "a", *of_folder, "--config.embed.format=parquet", "--config.embed.rows_per_file=4")
  files = [parquet.read_table(tmp_path / "a" / name) for name in result["files"]]
  assert [len(file) for file in files] == [4, 4, 3]
  # What a killed process left is no part of the folder, which readers take as a whole.
  (tmp_path / "a" / "features.parquet" / ".half.parquet.partial").write_bytes(b"half")
  whole_folder = parquet.read_table(tmp_path / "a" / "features.parquet")
  assert whole_folder["name"].to_pylist() == names
  assert str(files[0].schema.field("features").type) == "fixed_size_list<element: float>[5]"
  columns = {name: [value for file in files for value in file[name].to_pylist()] for name in files[0].column_names}
  assert columns["name"] == names
  assert columns["index"] == list(range(11))
  assert [result["class_names"][label] for label in columns["label"]] == [name.split("/")[0] for name in names]
  # Images of several sizes are cropped one by one, so files of another length hold the same features.
  one = run(tmp_path / "b", *of_folder)
  table = whole(tmp_path / "b", one)
  np.testing.assert_array_equal(table["name"], names)
  np.testing.assert_allclose(np.array(columns["features"], np.float32), table["features"], rtol=1e-6, atol=1e-6)


def test_other_images_do_not_mix_with_those_of_the_folder(tmp_path, projection, capsys):
  folder_of(tmp_path / "images")
  of_folder = ["--config.data.source=folder", f"--config.data.dir={tmp_path}/images", "--config.data.resident=false"]
  run(tmp_path / "run", *of_folder)
  (tmp_path / "images" / "cat" / "01.png").rename(tmp_path / "images" / "cat" / "new.png")
  assert "now has other ones" in refused(capsys, tmp_path / "run", *of_folder)
  folder_of(tmp_path / "others")
  others = [*of_folder[:1], f"--config.data.dir={tmp_path}/others", of_folder[2]]
  assert "data.dir was" in refused(capsys, tmp_path / "run", *others)
  # The checkpoint was trained on resident images of one size.
  assert "set data.resident=false" in refused(capsys, tmp_path / "new", *of_folder[:2])


def test_mistakes_are_one_line(tmp_path, projection, capsys, monkeypatch):
  assert 'did you mean "parquet"' in refused(capsys, tmp_path, "--config.embed.format=parkett")
  assert "rows_per_file is 0" in refused(capsys, tmp_path, "--config.embed.rows_per_file=0")
  assert 'no split "trian"' in refused(capsys, tmp_path, "--config.embed.split=trian")
  np.savez(tmp_path / "none.npz", train_images=np.zeros((0, 16, 16, 3), np.uint8))
  empty = ["--config.data.source=arrays", f"--config.data.dir={tmp_path}/none.npz"]
  assert "has no images" in refused(capsys, tmp_path, *empty)
  hide(monkeypatch, "pyarrow")
  assert "pyarrow, which is not installed" in refused(capsys, tmp_path, "--config.embed.format=parquet")
  assert not list(tmp_path.glob("features-*"))


def test_features_that_are_not_numbers_are_refused(tmp_path, projection, capsys):
  projection[0, 0] = np.nan
  assert "are not numbers" in refused(capsys, tmp_path)


def test_consecutive_rows_of_record_files_are_those_of_the_whole(tfds_dir):
  for cache in (False, True):
    request = source.Request("test[:300]", name="cifar10", data_dir=tfds_dir, cache=cache)
    whole_split = sources.load("tfds", request)
    part = whole_split.consecutive(130, 290)
    np.testing.assert_array_equal(part.labels(), whole_split.labels()[130:290])
    assert part.names() == whole_split.names()[130:290]


@pytest.mark.slow
def test_a_layer_of_the_projection_head_of_a_checkpoint(pretrained, tmp_path):
  argv = [f"--config.checkpoint={pretrained}", "--config.head.evaluate_from=-1", "--config.embed.split=test"]
  assert command.main(["embed", *argv, f"--workdir={tmp_path}"]) == 0
  result = json.loads((tmp_path / "result.json").read_text())
  assert (result["dimension"], result["layer"]) == (8, 2)
  assert result["checkpoint"] == str(pretrained / "checkpoints" / "6")
  images, _ = shapes.draw("test", 80, 16, 0)
  saved = checkpoint.open(str(pretrained))
  model = network.Network(config_lib.completed(saved.config)).pretraining_model(classes=10)
  params, batch_stats = saved.load(*state_lib.abstract_variables(model, 16, sharding.data_mesh()))
  z_of = jax.jit(lambda variables, images: model.apply(variables, images, train=False)[1])
  z = z_of({"params": params, "batch_stats": batch_stats}, images.astype(np.float32) / 255)
  np.testing.assert_allclose(whole(tmp_path, result)["features"], z, rtol=0, atol=1e-5 * np.abs(z).max())


@pytest.mark.slow
def test_two_processes_share_the_files_and_write_what_one_does(pretrained, tmp_path):
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    port = probe.getsockname()[1]
  options = [f"--config.checkpoint={pretrained}", "--config.embed.rows_per_file=16"]
  argv = [sys.executable, "-m", "simclr_jax", "embed", *options, f"--workdir={tmp_path}/two"]
  argv += [f"--coordinator=localhost:{port}", "--processes=2"]
  keys = {"cwd": ROOT, "stderr": subprocess.PIPE, "text": True}
  keys["env"] = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"}
  processes = [subprocess.Popen([*argv, f"--process={number}"], **keys) for number in range(2)]
  assert command.main(["embed", *options, f"--workdir={tmp_path}/one"]) == 0
  for process in processes:
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
  results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("one", "two")]
  assert results[0] == results[1]
  one, two = (whole(tmp_path / name, results[0]) for name in ("one", "two"))
  for name in ("name", "label", "index"):
    np.testing.assert_array_equal(one[name], two[name])
  # Each process takes half of the batch by itself.
  np.testing.assert_allclose(one["features"], two["features"], rtol=1e-5)
