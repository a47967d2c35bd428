"""Label -1, "none": such images take part where labels are not used and nowhere else."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from plain_encoder import PlainEncoder
from runs import job, read_by

from simclr_jax import __main__ as command
from simclr_jax import errors, losses
from simclr_jax.data import arrays, subset
from simclr_jax.evaluation import neighbours, scores
from simclr_jax.hardware import sharding
from simclr_jax.models import encoders
from simclr_jax.training import objectives

CLASSES = 4
LABEL = np.array([2, -1, 0, -1, -1, 1, 3, 0], np.int32)
KNOWN = LABEL >= 0


@pytest.mark.slow
def test_cross_entropy_is_the_mean_over_labelled_rows():
  logits = jnp.asarray(np.random.default_rng(0).normal(size=(8, CLASSES)), jnp.float32)
  loss, accuracy = losses.cross_entropy(logits, LABEL)
  log_p = np.asarray(jax.nn.log_softmax(logits.astype(jnp.float32)))[KNOWN, LABEL[KNOWN]]
  np.testing.assert_allclose(loss, -log_p.mean(), rtol=1e-6)
  np.testing.assert_allclose(accuracy, np.mean(np.argmax(logits, 1)[KNOWN] == LABEL[KNOWN]))
  gradient = jax.grad(lambda logits: losses.cross_entropy(logits, LABEL)[0])(logits)
  assert not np.any(gradient[~KNOWN])
  assert [float(x) for x in losses.cross_entropy(logits, np.full(8, -1))] == [0, 0]


def test_micro_batches_weigh_their_labelled_images():
  logits = jnp.asarray(np.random.default_rng(0).normal(size=(8, CLASSES)), jnp.float32)
  objective = objectives.Classification(None, None)
  totals = objective.totals({"label": LABEL})
  whole, _ = objective.loss(logits, {"label": LABEL}, totals, 1)
  parts = [objective.loss(logits[n::2], {"label": LABEL[n::2]}, totals, 2)[0] for n in range(2)]
  np.testing.assert_allclose(np.mean(parts), whole, rtol=1e-6)
  np.testing.assert_allclose(whole, losses.cross_entropy(logits, LABEL)[0], rtol=1e-6)


@pytest.mark.slow
def test_sup_con_attracts_no_unlabelled_images():
  z = jnp.asarray(np.random.default_rng(0).normal(size=(8, 2, 5)), jnp.float32)
  objective = objectives.Contrastive(None, None, kind="sup_con")
  state = type("State", (), {"memory": None})
  loss, _ = objective.compare(z, {"label": LABEL}, state)
  own = np.where(KNOWN, LABEL, 100 + np.arange(8))
  np.testing.assert_allclose(loss, losses.sup_con(z, own, temperature=0.1)[0], rtol=1e-6)
  assert abs(float(loss) - float(losses.sup_con(z, LABEL, temperature=0.1)[0])) > 1e-3


def test_neighbours_without_a_label_neither_vote_nor_count():
  rng = np.random.default_rng(0)
  train, test = (rng.normal(size=(n, 6)).astype(np.float32) for n in (40, 30))
  label, other = (rng.integers(-1, CLASSES, n).astype(np.int32) for n in (40, 30))
  keys = {"neighbours": [5], "temperatures": [0.1], "classes": CLASSES}
  with_none = neighbours.accuracies((train, label), (test, other), **keys)
  known, counted = label >= 0, other >= 0
  assert with_none == neighbours.accuracies((train[known], label[known]), (test[counted], other[counted]), **keys)
  with pytest.raises(errors.UserError, match="no image of a split has a label"):
    neighbours.accuracies((train, label), (test, other * 0 - 1), **keys)


def test_accuracy_counts_labelled_rows():
  rng, mesh = np.random.default_rng(0), sharding.data_mesh()
  logits = rng.normal(size=(8, CLASSES)).astype(np.float32)
  batch = {"image": logits, "label": LABEL, "mask": np.ones(8, np.float32)}
  found = scores.accuracy(lambda _, image: image, (), [batch], mesh)
  assert found["examples"] == KNOWN.sum()
  assert found["top1"] == pytest.approx(np.mean(np.argmax(logits, 1)[KNOWN] == LABEL[KNOWN]))
  with pytest.raises(errors.UserError, match="no held-out image has a label"):
    scores.accuracy(lambda _, image: image, (), [{**batch, "label": LABEL * 0 - 1}], mesh)


def test_a_share_of_the_labels_leaves_out_images_without():
  rows = subset.balanced(LABEL, 1.0, 0)
  np.testing.assert_array_equal(rows, np.flatnonzero(KNOWN))


@pytest.mark.parametrize(
  ("labels", "message"),
  [
    (np.array([0, -2, 1]), r"labels from -2 to 1; number the classes from 0"),
    (np.array([0, 10**12, 1]), r"labels from 0 to 1000000000000"),
    (np.array([0, np.nan, 1]), r"float64\[3\], wanted int\[3\]"),
    (np.array([0.0, 2.0, 1.0]), r"float64\[3\], wanted int\[3\]"),
  ],
)
def test_labels_that_are_none_are_refused_in_one_line(labels, message):
  content = {"train_images": np.zeros((3, 8, 8, 3), np.uint8), "train_labels": labels}
  with pytest.raises(errors.UserError, match=message):
    arrays.from_mapping(content, "train")


# The jobs: a data set with unlabelled images gives what it gives without them.

TINY = ["--config.model.encoder=plain", "--config.data.source=arrays", "--config.knn.neighbours=3"]
PROBES = ("epochs=2", "batch_size=16", "lbfgs_steps=3", "lbfgs_tolerance=10.0", "learning_rates=0.1")
PROBES += ("weight_decays=0.0", "l2_strengths=1e-2")
TINY += [f"--config.probes.{key}" for key in PROBES]


@pytest.fixture
def pair(tmp_path, monkeypatch):
  """Two .npz files: with unlabelled images among the others, and without them."""
  monkeypatch.setitem(encoders.ENCODERS, "plain", PlainEncoder)
  rng = np.random.default_rng(0)
  mixed, clean = {"class_names": list("abcd")}, {"class_names": list("abcd")}
  for split, count in (("train", 80), ("test", 40)):
    images = rng.integers(0, 256, (count, 16, 16, 3), np.uint8)
    labels = rng.integers(-1, CLASSES, count).astype(np.int32)
    mixed |= {f"{split}_images": images, f"{split}_labels": labels}
    clean |= {f"{split}_images": images[labels >= 0], f"{split}_labels": labels[labels >= 0]}
  for name, content in (("mixed", mixed), ("clean", clean)):
    np.savez(tmp_path / f"{name}.npz", **content)
  return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize(
  ("name", "settings"),
  [
    ("knn", ["checkpoint=random"]),
    ("linear_eval", ["checkpoint=random", "linear_eval.protocol=features"]),
    ("finetune", ["finetune.total_epochs=0.3"]),
    ("finetune", ["finetune.total_epochs=0.3", "labels.fraction=0.5"]),
  ],
)
def test_a_job_gives_what_it_gives_without_unlabelled_images(pair, name, settings):
  results = []
  for data in ("mixed", "clean"):
    options = [f"--config.{setting}" for setting in (*settings, f"data.dir={pair}/{data}.npz")]
    workdir = job(name, pair / data, *read_by(name, TINY), *options)
    result = json.loads((workdir / "result.json").read_text())
    results.append({key: value for key, value in result.items() if "seconds" not in key})
  assert results[0] == results[1]
  assert results[0]["eval/examples"] == len(np.load(pair / "clean.npz")["test_labels"])


@pytest.mark.slow
def test_pretraining_counts_labelled_images_alone(pair):
  options = ["--config.total_steps=1", f"--config.data.dir={pair}/mixed.npz", "--config.monitor.knn_images=80"]
  result = json.loads((job("pretrain", pair / "run", *read_by("pretrain", TINY), *options) / "result.json").read_text())
  assert result["eval/online_examples"] == len(np.load(pair / "clean.npz")["test_labels"])
  assert 0 <= result["eval/knn_top1"] <= 1


def test_a_job_that_finds_no_label_says_so(pair, capsys):
  none = dict(np.load(pair / "mixed.npz"))
  none["train_labels"] = none["train_labels"] * 0 - 1
  np.savez(pair / "none.npz", **none)
  argv = ["--config=cifar10", f"--config.data.dir={pair}/none.npz", "--config.checkpoint=random"]
  for name in ("finetune", "linear_eval", "knn"):
    options = [*read_by(name, TINY), "--config.data.image_size=16"]
    assert command.main([name, *argv, *options, f"--workdir={pair}/{name}"]) == 2
    assert "none.npz (train): no image has a label (all are -1); name a split with labels." in capsys.readouterr().err
