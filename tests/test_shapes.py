"""The built-in shapes depend on (split, index, size, seed) only; pixels and colours do not solve them."""

import numpy as np
import pytest
from sklearn import linear_model, preprocessing

from simclr_jax import errors
from simclr_jax.data import shapes


def test_the_same_seed_draws_the_same_images_and_another_seed_others():
  images, labels = shapes.draw("train", 40, 32, 7)
  again, labels_again = shapes.draw("train", 40, 32, 7)
  others, _ = shapes.draw("train", 40, 32, 8)
  np.testing.assert_array_equal(images, again)
  np.testing.assert_array_equal(labels, labels_again)
  assert not (images == others).all(axis=(1, 2, 3)).any()


@pytest.mark.parametrize("count", [1, 33, shapes.BLOCK, shapes.BLOCK + 7])
def test_an_image_does_not_depend_on_how_many_are_drawn(count):
  images, labels = shapes.draw("test", 2 * shapes.BLOCK + 10, 32, 3)
  fewer, fewer_labels = shapes.draw("test", count, 32, 3)
  np.testing.assert_array_equal(fewer, images[:count])
  np.testing.assert_array_equal(fewer_labels, labels[:count])


def test_images_and_classes_have_the_promised_form():
  images, labels = shapes.draw("train", 23, 40, 0)
  assert (images.shape, images.dtype) == ((23, 40, 40, 3), np.uint8)
  assert (labels.shape, labels.dtype) == ((23,), np.int32)
  empty, none = shapes.draw("train", 0, 40, 0)
  assert (empty.shape, none.shape) == ((0, 40, 40, 3), (0,))


def test_every_ten_images_have_each_class_once_in_an_order_of_their_own():
  tens = shapes.draw("train", 500, 16, 1)[1].reshape(50, 10)
  np.testing.assert_array_equal(np.sort(tens, axis=1), np.tile(np.arange(10), (50, 1)))
  assert len(np.unique(tens, axis=0)) == 50


def test_no_image_is_in_both_splits():
  train, _ = shapes.draw("train", 1000, 16, 5)
  test, _ = shapes.draw("test", 1000, 16, 5)
  assert len(np.unique(np.concatenate([train, test]).reshape(2000, -1), axis=0)) == 2000


def test_every_image_shows_its_shape():
  # Light ink covers part of each image: the ground and the clutter alone are darker.
  images, _ = shapes.draw("train", 1000, 32, 2)
  luma = images @ shapes.LUMA / 255
  assert (luma > 0.6).mean(axis=(1, 2)).min() > 0.02


def test_all_shapes_have_the_same_area():
  side = np.linspace(-1.5, 1.5, 600, dtype=np.float32)
  for name, distance, even in zip(shapes.CLASS_NAMES, shapes.DISTANCES, shapes.EVEN, strict=True):
    area = 9 * np.mean(distance(side[None, :] / even, side[:, None] / even) < 0)
    np.testing.assert_allclose(area, 2, rtol=0.02, err_msg=name)


def _colours(images):
  """Returns histograms, means and deviations of the three channels, f64[n, 30]."""
  levels = [(images // 32 == level).mean(axis=(1, 2)) for level in range(8)]
  return np.concatenate([*levels, images.mean(axis=(1, 2)), images.std(axis=(1, 2))], axis=1)


@pytest.mark.slow
@pytest.mark.parametrize(
  ("features", "model", "limit"),
  [
    (lambda images: images.reshape(len(images), -1) / 255, linear_model.RidgeClassifier(3e3), 0.18),
    # The blended pixels along the edges give a little away: a star has more of them than a disc.
    (_colours, linear_model.LogisticRegression(C=0.1, max_iter=500), 0.28),
  ],
  ids=["pixels", "colours"],
)
def test_a_linear_classifier_stays_near_chance_on(features, model, limit):
  images, labels = shapes.draw("train", 2000, 32, 0)
  held_out, held_out_labels = shapes.draw("test", 1000, 32, 0)
  scale = preprocessing.StandardScaler().fit(features(images))
  model.fit(scale.transform(features(images)), labels)
  accuracy = model.score(scale.transform(features(held_out)), held_out_labels)
  assert accuracy < limit, f"{accuracy:.1%}, where chance is 10 %"


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (("tran", 10, 32, 0), r'no split "tran"; their splits: train, test; did you mean "train"\?'),
    (("train", -1, 32, 0), "-1 shapes of 32 pixels"),
    (("train", 10, 8, 0), "10 shapes of 8 pixels"),
    (("train", 10, 32, -4), "from seed -4"),
  ],
)
def test_a_mistaken_request_gets_one_line(arguments, message):
  with pytest.raises(errors.UserError, match=message) as caught:
    shapes.draw(*arguments)
  assert "\n" not in str(caught.value)
