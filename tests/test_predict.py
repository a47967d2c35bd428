"""Classifiers put to use: load_classifier, and the job predict on new files and on splits."""

import csv
import json
import pathlib

import numpy as np
import pytest
from PIL import Image
from pyarrow import parquet

import simclr_jax
from simclr_jax import __main__ as command
from simclr_jax import errors, inference
from simclr_jax.data import arrays, image_files, shapes
from simclr_jax.evaluation import confusion, scores, selection
from simclr_jax.jobs import predict as job
from simclr_jax.training import checkpoint


@pytest.mark.slow
def test_a_loaded_classifier_gives_the_accuracy_of_its_run(finetuned, tmp_path):
  classify, names, config = simclr_jax.load_classifier(str(finetuned))
  assert (names, config.data.image_size) == (shapes.CLASS_NAMES, 16)
  images, labels = shapes.draw("test", 80, 16, 0)
  found = classify(images)
  assert (found.shape, found.dtype) == ((80, 10), np.float32)
  np.testing.assert_allclose(found.sum(1), 1, rtol=1e-5)
  result = json.loads((finetuned / "result.json").read_text())
  assert np.mean(found.argmax(1) == labels) == pytest.approx(result["eval/top1"])
  for number in range(2):
    Image.fromarray(images[number]).save(tmp_path / f"{number}.png")
  files = [tmp_path / "1.png", tmp_path / "0.png"]
  np.testing.assert_allclose(classify(files), found[[1, 0]], rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(classify(images[:2].astype(np.float32) / 255), found[:2], rtol=1e-4, atol=1e-6)


def test_names_of_classes_are_stored_and_numbers_take_their_place(linear, finetuned, monkeypatch):
  for run in (linear, finetuned):
    assert checkpoint.open(str(run)).class_names == shapes.CLASS_NAMES
  saved = checkpoint.open(str(finetuned))
  # As a checkpoint of an earlier release.
  saved._metadata.custom_metadata.pop("class_names")
  assert saved.class_names == tuple("0123456789")


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
  """Images of the held-out split in folders: `good` by class in another order, `flat` without, two that are broken."""
  root = tmp_path_factory.mktemp("photographs")
  images, labels = shapes.draw("test", 30, 16, 0)
  for number, (image, label) in enumerate(zip(images, labels, strict=True)):
    for path in (
      root / "good" / "new" / shapes.CLASS_NAMES[label] / f"{number:02d}.png",
      root / "flat" / f"{number:02d}.png",
    ):
      path.parent.mkdir(parents=True, exist_ok=True)
      Image.fromarray(image).save(path)
  (root / "good" / "new" / "ring" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
  (root / "good" / "new" / "ring" / "empty.JPG").write_bytes(b"")
  (root / "good" / "notes.txt").write_text("no image")
  # Whoever follows this link never comes back.
  (root / "good" / "again").symlink_to(root / "good")
  return root


def predict(workdir, run, *settings):
  argv = [f"--config.{text}" for text in (f"checkpoint={run}", *settings)]
  assert command.main(["predict", *argv, f"--workdir={workdir}"]) == 0
  return json.loads((workdir / "result.json").read_text())


def table_of(path):
  with path.open(newline="") as file:
    return list(csv.DictReader(file))


@pytest.mark.slow
def test_files_are_classified_counted_by_class_and_broken_ones_listed(finetuned, photographs, tmp_path):
  result = predict(tmp_path, finetuned, f"predict.images={photographs}/good")
  rows = table_of(tmp_path / "predictions.csv")
  images, labels = shapes.draw("test", 30, 16, 0)
  by_number = {int(pathlib.Path(row["file"]).stem): row for row in rows}
  assert sorted(by_number) == list(range(30))
  bad = [row["file"] for row in table_of(tmp_path / "unreadable.csv")]
  assert bad == ["new/ring/broken.png", "new/ring/empty.JPG"]
  classify, names, _ = simclr_jax.load_classifier(str(finetuned))
  wanted = classify(images)
  best = wanted.argmax(1)
  for number, row in by_number.items():
    found = [float(row[f"p_{name}"]) for name in names]
    np.testing.assert_allclose(found, wanted[number], rtol=1e-4, atol=1e-6)
    assert row["label"] == names[labels[number]] == pathlib.Path(row["file"]).parent.name
    assert (row["class"], float(row["probability"])) == (names[np.argmax(found)], max(found))
    assert [float(row[key]) for key in ("probability", "probability_2", "probability_3")] == sorted(found)[:-4:-1]
    assert row["class_2"] == names[np.argsort(found)[-2]]
  counts = np.zeros((10, 10), int)
  np.add.at(counts, (labels, best), 1)
  written = table_of(tmp_path / "confusion.csv")
  np.testing.assert_array_equal([[int(row[name]) for name in names] for row in written], counts)
  assert [row[""] for row in written] == list(names)
  assert (result["examples"], result["unreadable"], result["eval/examples"]) == (30, 2, 30)
  assert result["eval/top1"] == pytest.approx(np.mean(best == labels))
  assert result["eval/balanced_top1"] == pytest.approx(np.mean(np.diag(counts) / counts.sum(1)))
  for name in ("top1", "balanced_top1"):
    low, high = result[f"eval/{name}_interval"]
    assert 0 <= low <= result[f"eval/{name}"] <= high <= 1
  assert [row["class"] for row in table_of(tmp_path / "classes.csv")] == list(names)
  assert {path.name for path in (tmp_path / "figures").iterdir()} == {"confusion.png", "mistakes.png"}


@pytest.mark.slow
def test_formats_hold_the_same_table_and_flat_folders_no_labels(finetuned, photographs, tmp_path, capsys):
  pattern = f"predict.images={photographs}/flat/0*.png"
  result = predict(tmp_path / "json", finetuned, pattern, "predict.format=json", "predict.top_k=99")
  assert "eval/top1" not in result
  assert "predicted: " in capsys.readouterr().err
  rows = json.loads((tmp_path / "json" / "predictions.json").read_text())
  assert [row["file"] for row in rows] == [f"{number:02d}.png" for number in range(10)]
  assert list(rows[0]) == ["file", "class", "probability", "top", "probabilities"]
  assert [len(row["top"]) for row in rows] == [10] * 10
  assert rows[0]["top"][0] == {key: rows[0][key] for key in ("class", "probability")}
  predict(tmp_path / "parquet", finetuned, pattern, "predict.format=parquet")
  frame = parquet.read_table(tmp_path / "parquet" / "predictions.parquet").to_pydict()
  assert frame["file"] == [row["file"] for row in rows]
  for name in shapes.CLASS_NAMES:
    np.testing.assert_allclose(frame[f"p_{name}"], [row["probabilities"][name] for row in rows], rtol=1e-6)


@pytest.mark.slow
def test_a_split_is_predicted_as_its_run_has_counted_it(linear, tmp_path):
  result = predict(tmp_path, linear, "predict.mistakes=0")
  counted = json.loads((linear / "result.json").read_text())
  assert result["eval/top1"] == pytest.approx(counted["eval/top1"])
  assert result["eval/balanced_top1"] == pytest.approx(counted["eval/balanced_top1"])
  assert result["eval/examples"] == 80


def test_classes_of_a_split_are_matched_by_name():
  images = arrays.Arrays("x", np.zeros((2, 1, 1, 3), np.uint8), np.zeros(2, np.int32), ("dog", "cat", "fish"))
  np.testing.assert_array_equal(job._matched(images, ("cat", "cow", "dog")), [2, 0, -1])
  # Of an older checkpoint, which has no names.
  np.testing.assert_array_equal(job._matched(images, ("0", "1", "2")), [0, 1, 2])


def test_a_classifier_counts_on_classes_of_its_own_order_alone():
  found = inference.Classifier(None, None, 2, ("cat", "dog"), None)
  split = lambda *names: arrays.Arrays("x", np.zeros((1, 1, 1, 3), np.uint8), np.zeros(1, np.int32), names)
  found.check_classes(split("cat", "dog"), "runs/a")
  found.check_classes(split("0", "1"), "runs/a")
  found._replace(class_names=("0", "1")).check_classes(split("dog", "cat"), "runs/a")
  with pytest.raises(errors.UserError, match="tells 2 classes apart and x has 3"):
    found.check_classes(split("cat", "dog", "eel"), "runs/a")
  with pytest.raises(errors.UserError, match="class 0 of the classifier of runs/a is cat and that of x is dog"):
    found.check_classes(split("dog", "eel"), "runs/a")


@pytest.mark.slow
def test_what_is_held_out_of_a_folder_is_predicted_without_saying_so(finetuned, photographs, tmp_path):
  settings = ["data.source=folder", f"data.dir={photographs}/good/new", "data.resident=false", "data.holdout=0.3"]
  result = predict(tmp_path, finetuned, *settings, "data.max_bad_share=0.1")
  assert 5 <= result["eval/examples"] == result["examples"] <= 12


def test_the_interval_of_balanced_accuracy_covers_it():
  rng, share, of_class = np.random.default_rng(0), np.array([0.95, 0.5, 0.8]), np.array([20, 300, 60])
  ends = np.array([confusion.balanced_interval(rng.binomial(of_class, share), of_class) for _ in range(2000)])
  assert 0.93 < np.mean((ends[:, 0] <= share.mean()) & (share.mean() <= ends[:, 1])) < 0.98
  # A class without images has no part in it.
  assert confusion.balanced_interval(np.array([3, 0]), np.array([4, 0])) == pytest.approx(scores.wilson(3, 4))


@pytest.mark.parametrize(
  ("settings", "said"),
  [
    (["predict.images={root}/absent"], 'absent" for config.predict.images; give one, or a pattern'),
    (["predict.images={root}/*.png"], "config.predict.images wants files that match"),
    (["predict.images={root}/good/new/ring/empty.JPG"], "none of the 1 images of"),
    (["data.image_size=32"], "was trained at 16 pixels and config.data.image_size is 32; leave it out"),
    (["data.eval_split="], "predict has no images; set --config.predict.images=FOLDER, or"),
  ],
)
def test_what_cannot_be_predicted_gets_one_line(finetuned, photographs, tmp_path, capsys, settings, said):
  argv = [f"--config.{text}" for text in (f"checkpoint={finetuned}", *settings)]
  argv = [text.format(root=photographs) for text in argv]
  assert command.main(["predict", *argv, f"--workdir={tmp_path}"]) == 2
  assert said in capsys.readouterr().err.splitlines()[-1]


def test_a_pretraining_without_classifier_says_what_to_run(pretrained, tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(checkpoint.Saved, "shapes", {checkpoint.MODEL: {"params": {"encoder": {}}}})
  assert command.main(["predict", f"--config.checkpoint={pretrained}", f"--workdir={tmp_path}"]) == 2
  said = capsys.readouterr().err.splitlines()[-1]
  assert f"{pretrained} has no classifier; train one with labels first: linear_eval or finetune with" in said


@pytest.mark.slow
def test_a_linear_evaluation_on_stored_features_leaves_its_classifier(pretrained, tmp_path, monkeypatch):
  worse = selection.GridChoice(0.1, 0.0, 0.0, 0.0, validation_top1=np.full((1, 1), -1.0))
  monkeypatch.setattr(selection, "choose_from_grid", lambda *_, **__: worse)
  settings = [f"checkpoint={pretrained}", "linear_eval.protocol=features", "head.evaluate_from=1"]
  settings += [
    "probes.learning_rates=0.1",
    "probes.weight_decays=0",
    "probes.l2_strengths=1e-3",
    "linear_eval.class_weights=balanced",
  ]
  assert command.main(["linear_eval", *(f"--config.{text}" for text in settings), f"--workdir={tmp_path}"]) == 0
  result = json.loads((tmp_path / "result.json").read_text())
  assert result["stored_classifier"] == "lbfgs"
  classify, names, _ = simclr_jax.load_classifier(str(tmp_path))
  images, labels = shapes.draw("test", 80, 16, 0)
  assert np.mean(classify(images).argmax(1) == labels) == pytest.approx(result["eval/lbfgs_top1"])
  assert names == shapes.CLASS_NAMES


def test_files_of_every_form_are_read_and_a_reason_is_given_for_the_others(tmp_path):
  deep = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000
  (tmp_path / "dog" / "cat").mkdir(parents=True)
  Image.fromarray(deep).save(tmp_path / "dog" / "cat" / "deep.png")
  Image.fromarray(np.uint8(deep // 257)).save(tmp_path / "dog" / "flat.tif")
  (tmp_path / "text.jpg").write_text("no image")
  root, paths = image_files.found(str(tmp_path))
  images, bad = image_files.opened(root, paths, ("cat", "dog"))
  assert images.names() == ("dog/cat/deep.png", "dog/flat.tif")
  np.testing.assert_array_equal(images.labels(), [0, 1])
  assert bad == {"text.jpg": "it is no image"}
  first, second = images.decoded().images.astype(int)
  np.testing.assert_allclose(first, second, atol=1)
  assert image_files.found(str(tmp_path / "d*" / "*.tif")) == (str(tmp_path), ["dog/flat.tif"])
  assert image_files.found(str(tmp_path / "text.jpg")) == (str(tmp_path), ["text.jpg"])
