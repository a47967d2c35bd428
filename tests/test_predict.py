"""Classifiers put to use: load_classifier, and the job predict on new files and on splits."""

import json

import numpy as np
import pytest
from PIL import Image

import simclr_jax
from simclr_jax.data import shapes
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
