"""Transfer: the view of its images, and the notation of its data sets."""

import io

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from simclr_jax import errors
from simclr_jax.data import host_augment, transfer_sets

RNG = np.random.default_rng(0)


def test_the_view_is_the_resized_central_square():
  image = RNG.integers(0, 256, (40, 67, 3)).astype(np.uint8)
  wanted = tf.image.resize(image / np.float32(255), [24, 40], method="bicubic").numpy()[:, 8:32]
  np.testing.assert_allclose(host_augment.transfer_view(image, size=24), np.clip(wanted, 0, 1), atol=1e-5)
  tall = host_augment.transfer_view(image.transpose(1, 0, 2), size=24).numpy()
  np.testing.assert_allclose(tall.transpose(1, 0, 2), np.clip(wanted, 0, 1), atol=1e-5)
  small = RNG.integers(0, 256, (32, 32, 3)).astype(np.uint8)
  np.testing.assert_allclose(host_augment.transfer_view(small, size=32), small / np.float32(255), atol=1e-6)
  encoded = io.BytesIO()
  Image.fromarray(small).save(encoded, "png")
  np.testing.assert_array_equal(
    host_augment.transfer_view(encoded.getvalue(), size=32), host_augment.transfer_view(small, size=32)
  )


def test_names_of_data_sets_are_read():
  tasks = transfer_sets.chosen(
    "cifar10,voc/2007,sun397,mnist:train[:90%]:train[90%:]:test,a:b::c,folder:/d/pics/", "/d"
  )
  assert [(task.key, task.location, task.splits) for task in tasks] == [
    ("cifar10", "cifar10", ("train", "", "test")),
    ("voc2007", "voc/2007", ("train", "validation", "test")),
    ("sun397", "sun397/standard-part1-120k", ("train", "", "test")),
    ("mnist_train_90%_train_90%_test", "mnist", ("train[:90%]", "train[90%:]", "test")),
    ("a_b_c", "a", ("b", "", "c")),
    ("pics", "/d/pics", None),
  ]
  assert len(transfer_sets.chosen("paper,cifar10", "/d")) == 12
  assert [t.location for t in transfer_sets.chosen("birdsnap,folder:/e/aircraft", "/d")] == [
    "/d/birdsnap",
    "/e/aircraft",
  ]
  other = transfer_sets.Task("a", "tfds", "a", None)
  assert transfer_sets.splits_of(other, ("train", "test")) == ("train", "", "test")
  assert transfer_sets.splits_of(other, ("train", "validation")) == ("train", "", "validation")
  assert transfer_sets.splits_of(other, ("test", "train", "validation")) == ("train", "validation", "test")
  with pytest.raises(errors.UserError, match="a has the splits train, not train and test; name three as NAME:TRAIN"):
    transfer_sets.splits_of(other, ("train",))


def test_paper_stands_for_twelve_and_named_ones_are_not_optional():
  assert transfer_sets.optional("cifar10,folder:/d/pics") == set()
  assert transfer_sets.optional("paper,dtd") == {task.key for task in transfer_sets.TWELVE} - {"dtd"}
