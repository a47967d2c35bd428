"""Evaluation: every example counts once, padding never, ties as argmax has them."""

import jax.numpy as jnp
import numpy as np

from simclr_jax.evaluation import features as evaluation
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


def test_accuracies_count_each_example_once_and_padding_never():
  rng = np.random.default_rng(0)
  table = rng.standard_normal((37, 10)).astype(np.float32)
  labels = rng.integers(0, 10, 37).astype(np.int32)
  values = np.arange(37, dtype=np.float32)
  logits_of = lambda table, images: table[images[:, 0, 0, 0].astype(jnp.int32)]
  result = evaluation.accuracy(logits_of, table, batches(values, labels, 16), sharding.data_mesh())
  order = np.argsort(-table, axis=1, kind="stable")
  assert result["examples"] == 37
  np.testing.assert_allclose(result["top1"], np.mean(order[:, 0] == labels))
  np.testing.assert_allclose(result["top5"], np.mean(np.any(order[:, :5] == labels[:, None], axis=1)))
  losses = np.log(np.exp(table).sum(1)) - table[np.arange(37), labels]
  np.testing.assert_allclose(result["loss"], losses.mean(), rtol=1e-6)


def test_of_equal_logits_the_first_class_wins():
  labels = np.array([0, 1, 5, 9], np.int32).repeat(2)
  constant = lambda _, images: jnp.zeros((len(images), 10))
  result = evaluation.accuracy(constant, None, batches(np.zeros(8, np.float32), labels, 8), sharding.data_mesh())
  assert result["top1"] == 0.25
  assert result["top5"] == 0.5


def test_a_probe_separates_what_is_linearly_separable():
  rng = np.random.default_rng(0)
  labels = rng.integers(0, 3, 300)
  x = np.eye(3)[labels] + 0.1 * rng.standard_normal((300, 3))
  assert evaluation.probe_accuracy(x[:200], labels[:200], x[200:], labels[200:]) == 1.0


def test_a_classifier_that_diverged_is_never_right():
  labels = np.arange(8, dtype=np.int32)
  broken = lambda _, images: jnp.full((len(images), 10), jnp.nan)
  result = evaluation.accuracy(broken, None, batches(np.zeros(8, np.float32), labels, 8), sharding.data_mesh())
  assert (result["top1"], result["top5"]) == (0, 0)


def test_features_of_a_split_come_once_in_the_order_of_its_index():
  values = np.arange(37, dtype=np.float32)
  labels = np.arange(37, dtype=np.int32) % 5
  shuffled = list(batches(values, labels, 16))[::-1]
  for rows in shuffled:
    order = np.random.default_rng(0).permutation(16)
    rows.update({key: array[order] for key, array in rows.items()})
  encode = lambda scale, images: (scale * images[:, 0, 0, :2]).astype(jnp.bfloat16)
  features, label = evaluation.features(encode, jnp.float32(2), shuffled, sharding.data_mesh())
  assert features.dtype == np.float32
  np.testing.assert_array_equal(features, np.stack([2 * values, 2 * values], axis=1))
  np.testing.assert_array_equal(label, labels)
