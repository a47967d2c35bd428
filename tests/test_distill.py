"""The distillation loss against a NumPy twin, and which images its terms are about."""

import jax
import jax.numpy as jnp
import numpy as np

from simclr_jax.jobs import distill


def softmax(x):
  e = np.exp(x - x.max(axis=1, keepdims=True))
  return e / e.sum(axis=1, keepdims=True)


def test_the_loss_is_the_scaled_cross_entropy_and_no_gradient_reaches_the_teacher(x64):
  rng = np.random.default_rng(0)
  student, teacher = rng.normal(size=(2, 6, 5))
  for temperature in (0.1, 1.0, 4.0):
    p, q = softmax(teacher / temperature), softmax(student / temperature)
    wanted = temperature**2 * -np.mean(np.sum(p * np.log(q), axis=1))
    np.testing.assert_allclose(distill.distillation(student, teacher, temperature), wanted, rtol=1e-12)
    ours, theirs = jax.grad(distill.distillation, (0, 1))(jnp.asarray(student), jnp.asarray(teacher), temperature)
    np.testing.assert_allclose(ours, temperature * (q - p) / len(p), rtol=1e-9, atol=1e-15)
    np.testing.assert_array_equal(theirs, 0)


def test_labels_count_only_where_they_are_given_away(x64):
  rng = np.random.default_rng(1)
  logits, teacher = rng.normal(size=(2, 4, 3))
  label, index = np.array([2, -1, 0, 1], np.int32), np.array([9, 3, 5, 7])
  labelled = np.isin(np.arange(10), [5, 9])
  loss = distill.loss_of(lambda batch, table: table[batch["index"]], 2.0, 0.25)
  table = np.zeros((10, 3))
  table[index] = teacher
  value, metrics = loss(
    jnp.asarray(logits), {"label": label, "index": index}, jnp.asarray(labelled), jnp.asarray(table)
  )
  supervised = -np.mean([np.log(softmax(logits)[0, 2]), np.log(softmax(logits)[2, 0])])
  distilled = float(distill.distillation(logits, teacher, 2.0))
  np.testing.assert_allclose(metrics["supervised_loss"], supervised, rtol=1e-12)
  np.testing.assert_allclose(value, 0.75 * distilled + 0.25 * supervised, rtol=1e-12)
  assert metrics["agreement"] == np.mean(logits.argmax(1) == teacher.argmax(1))


def test_a_batch_without_labelled_images_has_no_supervised_loss():
  loss = distill.loss_of(lambda batch: batch["teacher"], 1.0, 0.5)
  batch = {"label": np.array([-1, -1]), "index": np.array([0, 1]), "teacher": np.eye(2, 3, dtype=np.float32)}
  gradient, metrics = jax.grad(loss, has_aux=True)(jnp.ones((2, 3)), batch, jnp.zeros(2, bool))
  assert metrics["supervised_loss"] == 0
  assert np.all(np.isfinite(gradient))
