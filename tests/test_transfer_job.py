"""The transfer job by its command: each data set by its own metric, none run twice, missing ones reported."""

import dataclasses
import json
import pathlib
import re

import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from PIL import Image
from runs import tiny

from simclr_jax import __main__ as command
from simclr_jax import inference
from simclr_jax.data import decode, pipeline, source, sources
from simclr_jax.evaluation import probes
from simclr_jax.jobs import transfer

# The config of a run on resident arrays: this job streams its own data sets all the same.
KEYS = {
  "checkpoint": "random",
  "data.resident": "true",
  "transfer.l2_strengths": "4",
  "transfer.lbfgs_steps": "30",
  "transfer.lbfgs_tolerance": "1e-2",
}
RNG = np.random.default_rng(0)


@pytest.fixture
def quick(monkeypatch):
  """Least squares in place of the regressions, whose search takes long to compile."""

  def least_squares(x, y, path, *, classes, mesh):
    wanted = np.maximum(y, 0) if y.ndim == 2 else np.eye(classes)[y]
    with_one = np.concatenate([x, np.ones((len(x), 1))], axis=1)
    solved = [
      np.linalg.solve(
        with_one.T @ with_one / len(x) + (1e-6 + s) * np.eye(x.shape[1] + 1), with_one.T @ wanted / len(x)
      )
      for s in path.l2_strengths
    ]
    solved = np.float32(solved)
    return {"dense": {"kernel": solved[:, :-1], "bias": solved[:, -1]}}, {"converged": [True], "steps": [1]}

  monkeypatch.setattr(probes, "logistic_regression", least_squares)


def encode_by(monkeypatch, encode):
  """Puts a function of images in place of the network, which takes long to compile."""
  frozen = inference.Representation(lambda _, images: encode(images), None, layer=0)
  monkeypatch.setattr(inference, "representation", lambda run: frozen)


@pytest.fixture
def no_encoder(monkeypatch):
  encode_by(monkeypatch, None)


def argv(data_dir, workdir, datasets, **overrides):
  keys = {**KEYS, "data.dir": data_dir, "transfer.datasets": datasets, **overrides}
  return [
    "transfer",
    *tiny("transfer"),
    f"--workdir={workdir}",
    *(f"--config.{key}={value}" for key, value in keys.items()),
  ]


def photo(value):
  return (RNG.integers(0, 60, (20, 24, 3)) + value).astype(np.uint8)


def write_tfds(folder, name, features, splits):
  """Writes a data set in the form of TFDS; `splits` are {name: examples}."""
  folder.mkdir(parents=True)
  infos = []
  for split, examples in splits.items():
    with tf.io.TFRecordWriter(str(folder / f"{name}-{split}.tfrecord-00000-of-00001")) as writer:
      for example in examples:
        writer.write(features.serialize_example(features.encode_example(example)))
    template = tfds.core.ShardedFileTemplate(
      folder, "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}", name, split, "tfrecord"
    )
    infos.append(
      tfds.core.SplitInfo(name=split, shard_lengths=[len(examples)], num_bytes=0, filename_template=template)
    )
  tfds.folder_dataset.write_metadata(data_dir=folder, features=features, split_infos=infos, check_data=False)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  """A TFDS folder with tiny (train, test), voc/2007 by the stock builder's form, and the folder of images aircraft."""
  root = tmp_path_factory.mktemp("data")
  kinds = tfds.features.FeaturesDict(
    {
      "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
      "label": tfds.features.ClassLabel(names=["x", "y", "z"]),
      "mask": tfds.features.Image(shape=(None, None, 1), encoding_format="png"),
    }
  )
  one = lambda i: {"image": photo(60 * (i % 3)), "label": i % 3, "mask": np.zeros((4, 4, 1), np.uint8)}
  write_tfds(
    root / "tiny" / "1.0.0", "tiny", kinds, {"train": [one(i) for i in range(30)], "test": [one(i) for i in range(21)]}
  )
  voc = tfds.builder("voc/2007", data_dir=str(root))
  several = lambda i: {
    "image": photo(60 * (i % 3)),
    "image/filename": f"{i}.jpg",
    "labels": [i % 3, 5] if i % 2 else [i % 3],
    "labels_no_difficult": [i % 3, 5] if i % 4 == 1 else [i % 3],
    "objects": [],
  }
  counts = {"train": 24, "validation": 12, "test": 18}
  write_tfds(
    pathlib.Path(voc.data_dir),
    "voc",
    voc.info.features,
    {split: [several(i) for i in range(count)] for split, count in counts.items()},
  )
  for split, count in {"train": 12, "val": 6, "test": 8}.items():
    for i in range(count):
      path = root / "aircraft" / split / f"kind{i % 2}" / f"{i}.png"
      path.parent.mkdir(parents=True, exist_ok=True)
      Image.fromarray(photo(90 * (i % 2))).save(path)
  return root


@pytest.mark.slow
def test_each_data_set_has_its_metric_and_is_run_once(data, tmp_path, quick, monkeypatch, capsys):
  # The features are the colours' means over the halves of the image and their squares: with these, least squares can
  # separate three classes along one line.
  means = lambda images: images.reshape(len(images), 2, -1, 3).mean(axis=2).reshape(len(images), 6)
  encode_by(monkeypatch, lambda images: jnp.concatenate([means(images), means(images) ** 2], axis=1))
  datasets = f"voc/2007,tiny,folder:{data}/aircraft"
  assert command.main(argv(data, tmp_path, datasets)) == 0
  text = (tmp_path / "result.json").read_text()
  table = json.loads(text)["datasets"]
  assert {key: row["metric"] for key, row in table.items()} == {
    **{"voc2007": "map_11", "tiny": "top1", "aircraft": "mean_per_class"}
  }
  assert table["voc2007"]["examples"] == {"train": 24, "validation": 12, "test": 18}
  # A fifth of the training images is held back where there is no validation split.
  assert table["tiny"]["examples"] == {"train": 24, "validation": 6, "test": 21}
  assert table["aircraft"]["examples"] == {"train": 12, "validation": 6, "test": 8}
  assert [row["classes"] for row in table.values()] == [20, 3, 2]
  # Their brightness tells the classes apart.
  assert table["tiny"]["value"] == 1
  assert table["aircraft"]["published"] == [50.3, 61.2]
  assert table["tiny"]["published"] is None
  assert [cell["l2"] for cell in table["tiny"]["validation"]] == pytest.approx(
    [1e-6, 10 ** (-7 / 3), 10 ** (4 / 3), 1e5]
  )
  assert re.search(rf"tiny +top-1 +{100 * table['tiny']['value']:.2f} +[0-9.]+ +- +-", capsys.readouterr().err)

  # The state of the folder after a kill in the second data set.
  (tmp_path / "result.json").unlink()
  (tmp_path / "tiny" / "result.json").unlink()
  evaluated, evaluate = [], transfer._evaluate
  counted = lambda this, task, *args: evaluated.append(task.key) or evaluate(this, task, *args)
  monkeypatch.setattr(transfer, "_evaluate", counted)
  assert command.main(argv(data, tmp_path, datasets)) == 0
  assert evaluated == ["tiny"]
  again = json.loads((tmp_path / "result.json").read_text())["datasets"]
  for rows in (again, table):
    rows["tiny"].pop("seconds")
  assert again == table
  assert list(again) == list(table)


def test_missing_data_sets_of_the_paper_are_reported(data, tmp_path, no_encoder, monkeypatch, capsys):
  monkeypatch.setattr(transfer, "_evaluate", lambda this, task, *_: {**ROW, "published": task.published})
  assert command.main(argv(data, tmp_path, "paper")) == 0
  result = json.loads((tmp_path / "result.json").read_text())
  assert list(result["datasets"]) == ["aircraft", "voc2007"]
  assert len(result["missing"]) == 10
  assert "prepare it with: tfds build sun397/standard-part1-120k --data_dir=" in result["missing"]["sun397"]
  assert f'no folder "{data}/birdsnap"' in result["missing"]["birdsnap"]
  assert "food101 is left out: TFDS data set" in capsys.readouterr().err
  # A data set that is named by itself may not be missing.
  assert command.main(argv(data, tmp_path, "paper,dtd")) == 2
  assert 'TFDS data set "dtd" is not prepared' in capsys.readouterr().err


ROW = {"metric": "top1", "value": 0.5, "l2": 1.0, "classes": 2, "examples": {"test": 8}}


def test_where_none_of_them_is_there_the_job_fails(tmp_path, no_encoder, capsys):
  assert command.main(argv(tmp_path, tmp_path / "run", "paper")) == 2
  assert "none of the 12 data sets is there; TFDS data set" in capsys.readouterr().err


@pytest.mark.slow
def test_real_images_of_parts_of_splits(tfds_dir, tmp_path, quick):
  datasets = "cifar10:train[:300]:train[300:400]:test[:100]"
  assert command.main(argv(tfds_dir, tmp_path, datasets)) == 0
  ((key, row),) = json.loads((tmp_path / "result.json").read_text())["datasets"].items()
  assert key == "cifar10_train_300_train_300_400_test_100"
  assert row["examples"] == {"train": 300, "validation": 100, "test": 100}
  # There are ten classes; raw colours alone give a fifth.
  assert 0.1 < row["value"] < 0.5


def test_labels_of_voc_are_vectors_and_difficult_ones_do_not_count(data):
  voc = source.Request("train", name="voc/2007", data_dir=str(data), multi_label=True)
  images = sources.load("tfds", voc)
  assert (images.multi_label, images.num_classes, images.class_names[5]) == (True, 20, "bus")
  show = lambda content, seed: {"shape": tf.shape(decode.decode_image(content))}
  (rows,) = pipeline.evaluation_batches(images, show, batch_size=32)
  assert rows["label"].shape == (32, 20)
  wanted = np.zeros((24, 20), np.int32)
  wanted[np.arange(24), np.arange(24) % 3] = 1
  wanted[1::4, 5], wanted[3::4, 5] = 1, -1
  np.testing.assert_array_equal(rows["label"][:24], wanted)
  # Without the request for vectors the data set has no labels.
  images = sources.load("tfds", dataclasses.replace(voc, multi_label=False))
  assert (images.multi_label, images.num_classes) == (False, 0)


@pytest.mark.parametrize(
  ("overrides", "said"),
  [
    ({"transfer.datasets": "tiny,cifar10:train"}, "config.transfer.datasets has 'cifar10:train'; give paper"),
    ({"transfer.datasets": "tiny,"}, "config.transfer.datasets has ''; give paper"),
    ({"transfer.datasets": "folder:/a/x,folder:/b/x"}, "several data sets 'x'"),
    ({"transfer.datasets": "tiny,tinny"}, 'unknown TFDS data set "tinny"'),
    ({"transfer.datasets": "tiny:train::tset"}, 'cannot take split "tset"'),
    ({"transfer.l2_low": "0"}, "config.transfer.l2_low is 0.0; use more than 0"),
    ({"transfer.l2_low": "1e6"}, "config.transfer.l2_low is 1000000.0 and l2_high"),
    ({"transfer.validation_share": "1"}, "config.transfer.validation_share is 1.0; use more than 0, less than 1"),
    ({"checkpoint": ""}, "transfer has no encoder; give --config.checkpoint=RUN"),
  ],
)
def test_a_mistake_gets_one_line(data, tmp_path, monkeypatch, capsys, overrides, said):
  monkeypatch.setattr(transfer, "_evaluate", lambda *_: pytest.fail("computed before all was known to fit"))
  if overrides.get("checkpoint") != "":
    encode_by(monkeypatch, None)
  assert command.main(argv(data, tmp_path, "tiny", **overrides)) == 2
  err = capsys.readouterr().err
  assert said in err
  assert err.count("\n") == 1
