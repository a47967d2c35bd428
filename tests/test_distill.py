"""The distillation loss against a NumPy twin, and which images its terms are about."""

import jax
import jax.numpy as jnp
import numpy as np

from simclr_jax.training import objectives


def softmax(x):
  e = np.exp(x - x.max(axis=1, keepdims=True))
  return e / e.sum(axis=1, keepdims=True)


def loss_of(logits, rows, *constants, teacher_of, temperature=1.0, label_weight=0.5, parts=1):
  """Returns (loss, metrics) of the student's logits; the network takes no part."""
  keys = {"teacher_of": teacher_of, "temperature": temperature, "label_weight": label_weight}
  objective = objectives.Distillation(None, None, **keys)
  return objective.loss(logits, rows, objective.totals(rows, *constants), parts, *constants)


def test_the_loss_is_the_scaled_cross_entropy_under_the_teacher(x64):
  rng = np.random.default_rng(0)
  student, teacher = rng.normal(size=(2, 6, 5))
  for temperature in (0.1, 1.0, 4.0):
    p, q = softmax(teacher / temperature), softmax(student / temperature)
    wanted = temperature**2 * -np.mean(np.sum(p * np.log(q), axis=1))
    np.testing.assert_allclose(objectives.distillation(student, teacher, temperature), wanted, rtol=1e-12)
    gradients = jax.grad(objectives.distillation, (0, 1))
    ours, theirs = gradients(jnp.asarray(student), jnp.asarray(teacher), temperature)
    np.testing.assert_allclose(ours, temperature * (q - p) / len(p), rtol=1e-9, atol=1e-15)
    np.testing.assert_array_equal(theirs, 0, "no gradient reaches the teacher")


def test_labels_count_only_where_they_are_given_away(x64):
  rng = np.random.default_rng(1)
  logits, teacher = rng.normal(size=(2, 4, 3))
  rows = {"label": np.array([2, -1, 0, 1], np.int32), "index": np.array([9, 3, 5, 7])}
  labelled, table = np.isin(np.arange(10), [5, 9]), np.zeros((10, 3))
  table[rows["index"]] = teacher
  teacher_of = lambda rows, table: table[rows["index"]]
  constants = jnp.asarray(labelled), jnp.asarray(table)
  keys = {"teacher_of": teacher_of, "temperature": 2.0, "label_weight": 0.25}
  value, metrics = loss_of(jnp.asarray(logits), rows, *constants, **keys)
  supervised = -np.mean([np.log(softmax(logits)[0, 2]), np.log(softmax(logits)[2, 0])])
  distilled = float(objectives.distillation(logits, teacher, 2.0))
  np.testing.assert_allclose(metrics["supervised_loss"], supervised, rtol=1e-12)
  np.testing.assert_allclose(value, 0.75 * distilled + 0.25 * supervised, rtol=1e-12)
  assert metrics["agreement"] == np.mean(logits.argmax(1) == teacher.argmax(1))


def test_a_batch_without_labelled_images_has_no_supervised_loss():
  rows = {"label": np.array([-1, -1]), "index": np.array([0, 1]), "teacher": np.eye(2, 3, dtype=np.float32)}
  loss = lambda logits: loss_of(logits, rows, jnp.zeros(2, bool), teacher_of=lambda rows: rows["teacher"])
  gradient, metrics = jax.jit(jax.grad(loss, has_aux=True))(jnp.ones((2, 3)))
  assert metrics["supervised_loss"] == 0
  assert np.all(np.isfinite(gradient))
