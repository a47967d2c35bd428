"""Features and accuracies of a split: every example counts once, padding never, ties as argmax resolves them."""

import jax.numpy as jnp
import numpy as np
import pytest

from simclr_jax import errors
from simclr_jax.evaluation import features, scores
from simclr_jax.hardware import sharding


def batches(values, labels, size):
  """Yields rows in which image i is a constant f32[4, 4, 3] of value i, the last batch padded."""
  for start in range(0, len(values), size):
    rows = slice(start, start + size)
    real = len(values[rows])
    image = np.zeros((size, 4, 4, 3), np.float32)
    image[:real] = values[rows, None, None, None]
    padded = lambda x, fill, real=real: np.concatenate([x, np.full(size - real, fill, x.dtype)])
    yield {
      "image": image,
      "label": padded(labels[rows], -1),
      "index": padded(np.arange(len(values))[rows], -1),
      "mask": padded(np.ones(real, np.float32), 0),
    }


@pytest.mark.devices(8)
def test_accuracies_count_each_example_once_and_padding_never():
  rng = np.random.default_rng(0)
  table = rng.standard_normal((37, 10)).astype(np.float32)
  labels = rng.integers(0, 10, 37).astype(np.int32)
  values = np.arange(37, dtype=np.float32)
  logits_of = lambda table, images: table[images[:, 0, 0, 0].astype(jnp.int32)]
  result = scores.accuracy(logits_of, table, batches(values, labels, 16), sharding.data_mesh())
  order = np.argsort(-table, axis=1, kind="stable")
  assert result["examples"] == 37
  np.testing.assert_allclose(result["top1"], np.mean(order[:, 0] == labels))
  np.testing.assert_allclose(result["top5"], np.mean(np.any(order[:, :5] == labels[:, None], axis=1)))
  recalls = [np.mean(order[labels == label, 0] == label) for label in np.unique(labels)]
  np.testing.assert_allclose(result["balanced_top1"], np.mean(recalls))
  losses = np.log(np.exp(table).sum(1)) - table[np.arange(37), labels]
  np.testing.assert_allclose(result["loss"], losses.mean(), rtol=1e-6)


@pytest.mark.parametrize("classes", [5, 6])
def test_top5_is_left_out_below_six_classes(classes):
  labels = np.array([0, 0, 0, 2], np.int32)
  first = lambda _, images: jnp.zeros((len(images), classes))
  result = scores.accuracy(first, None, batches(np.zeros(4, np.float32), labels, 4), sharding.data_mesh())
  assert (result["top1"], result["balanced_top1"]) == (0.75, 0.5)
  assert ("top5" in result) == (classes == 6)
  result = {f"eval/{name}": value for name, value in result.items()}
  assert scores.shown(result) == "top-1 75.00 %, balanced 50.00 %" + (", top-5 100.00 %" if classes == 6 else "")


def test_of_equal_logits_the_first_class_ranks_first():
  labels = np.array([0, 1, 5, 9], np.int32)
  np.testing.assert_array_equal(scores.ranks(jnp.zeros((4, 10)), labels), labels)


def test_a_classifier_that_diverged_is_never_correct():
  labels = np.arange(8, dtype=np.int32)
  broken = lambda _, images: jnp.full((len(images), 10), jnp.nan)
  result = scores.accuracy(broken, None, batches(np.zeros(8, np.float32), labels, 8), sharding.data_mesh())
  assert (result["top1"], result["top5"]) == (0, 0)


@pytest.mark.devices(8)
def test_features_of_a_split_come_once_in_the_order_of_its_index():
  values = np.arange(37, dtype=np.float32)
  labels = np.arange(37, dtype=np.int32) % 5
  shuffled = list(batches(values, labels, 16))[::-1]
  for rows in shuffled:
    order = np.random.default_rng(0).permutation(16)
    rows.update({key: array[order] for key, array in rows.items()})
  encode = lambda scale, images: (scale * images[:, 0, 0, :2]).astype(jnp.bfloat16)
  x, label = features.of_split(encode, jnp.float32(2), shuffled, sharding.data_mesh())
  assert x.dtype == np.float32
  np.testing.assert_array_equal(x, np.stack([2 * values, 2 * values], axis=1))
  np.testing.assert_array_equal(label, labels)


def test_features_with_a_nan_or_an_infinity_are_refused():
  x = np.ones((5, 3), np.float32)
  features.check_finite(x, "test", "runs/a")
  x[1, 2], x[3, 0] = np.nan, np.inf
  with pytest.raises(errors.UserError, match="2 of 5 features of test are not numbers; checkpoint runs/a has diverged"):
    features.check_finite(x, "test", "runs/a")
