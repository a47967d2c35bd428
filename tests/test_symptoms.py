"""Warnings from the metric rows of pretraining, the loss of guessing, and an online classifier that cannot diverge."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_step

from simclr_jax import figures, losses, optim
from simclr_jax.hardware import sharding
from simclr_jax.training import symptoms

FACTS = symptoms.Facts(images=128, chance=math.log(255), classes=10, settled=50)
HEALTHY = {"train/loss": 4.0, "train/contrast_acc": 0.3, "train/supervised_loss": 2.0}


def trained(count=3, first=100, **changed):
  row = {**HEALTHY, **{f"train/{name}": value for name, value in changed.items()}}
  return [{"step": first + number, **row} for number in range(count)]


@pytest.mark.parametrize(("kind", "queue"), [("nt_xent", 0), ("nt_xent", 8), ("dcl", 8), ("sup_con", 0)])
def test_the_loss_of_guessing_is_that_of_equal_embeddings(kind, queue):
  z, label = jnp.ones((6, 2, 3)), jnp.arange(6) % 2
  more = {"queue": jnp.ones((queue, 3)) / 3**0.5} if queue else {}
  value, _ = losses.contrast(kind, z, label, temperature=0.2, **more)
  assert symptoms.chance_loss(kind, 6, queue) == pytest.approx(float(value), rel=1e-5)


def test_kinds_without_a_loss_of_guessing_have_none():
  assert symptoms.chance_loss("margin", 8) is None
  assert symptoms.chance_loss("dcl", 1) is None


@pytest.mark.parametrize(
  ("rows", "evaluated", "name", "words"),
  [
    (trained(loss=5.6), {}, "loss", "guessing gives 5.54"),
    (trained(contrast_acc=0.01), {}, "accuracy", "raise augment.min_area"),
    (trained(first=1, supervised_loss=25.0), {}, "online head", "head.online_rate=safe"),
    (trained(), {"step": 90, "eval/rank_z": 1.2, "eval/uniformity": -1.0}, "collapse", "lower optimizer"),
    (trained(), {"step": 90, "eval/rank_z": 9.0, "eval/uniformity": -0.01}, "collapse", "lower optimizer"),
  ],
)
def test_a_symptom_is_found_with_its_cause(rows, evaluated, name, words):
  found = symptoms.found(rows, evaluated, FACTS)
  assert list(found) == [name]
  assert words in found[name]


@pytest.mark.parametrize(
  ("rows", "evaluated"),
  [
    (trained(), {"step": 90, "eval/rank_z": 30.0, "eval/uniformity": -3.0}),
    (trained(2, loss=5.6, contrast_acc=0.01), {}),  # Too few rows.
    (trained(first=10, loss=5.6, contrast_acc=0.01), {"step": 9, "eval/rank_z": 1.0}),  # While warming up.
    (trained(loss=math.nan, contrast_acc=math.nan, supervised_loss=math.nan), {}),
    ([*trained(2, loss=5.6), *trained(1, 102)], {}),
    ([{"step": 100 + number, "train/loss": 4.0} for number in range(3)], {"step": 100}),
  ],
)
def test_what_is_healthy_short_early_or_missing_says_nothing(rows, evaluated):
  assert symptoms.found(rows, evaluated, FACTS) == {}


def test_every_line_is_said_once_a_run():
  said = []
  watch = symptoms.Watch(FACTS, said.append)
  for row in trained(9, loss=5.6):
    watch(row["step"], row)
  watch(110, {"eval/rank_z": 1.0})
  watch(111, {"eval/rank_z": 1.0})
  assert [line.partition(":")[0] for line in said] == ["Step 102", "Step 110"]
  assert "The loss is 5.6" in said[0]


def test_a_row_of_pairs_shows_one_image_of_each_class_in_turn():
  labels = np.repeat([0, 1, 2], [40, 4, 1])
  assert labels[figures.varied(labels, 6)].tolist() == [0, 1, 2, 0, 1]
  assert figures.varied(labels, 6)[[0, 3]].tolist() == [0, 20]
  assert figures.varied(np.full(8, -1), 4).tolist() == [0, 2, 4, 6]
  assert figures.varied(np.full(3, -1), 12).tolist() == [0, 1, 2]


def test_curves_show_the_loss_of_guessing(tmp_path, monkeypatch):
  drawn = []
  monkeypatch.setattr(figures, "_save", lambda figure, *_: drawn.append(figure))
  rows = [{"step": step, "loss": 1.0} for step in range(5)]
  figures.curves(rows, {"Loss": {"loss": "training"}}, "", title="", levels={"Loss": {"guessing": 2.5}})
  lines = {line.get_label(): set(line.get_ydata()) for line in drawn[0].axes[0].lines}
  assert lines == {"training": {1.0}, "guessing": {2.5}}


@pytest.mark.slow
@pytest.mark.parametrize(("online_rate", "micro_batches"), [("optimizer", 1), ("safe", 1), ("safe", 2)])
def test_the_online_head_diverges_at_the_rate_of_all_and_not_at_a_safe_one(online_rate, micro_batches):
  mesh = sharding.data_mesh(jax.devices()[:1])
  model = small_step.network(jnp.float32)
  state, _, _ = small_step.start(model, mesh)
  # Features as large as those of photographs, at the rate of a folder's recipe.
  scale = jax.tree.map(lambda x: x, state.params)
  scale["encoder"]["bn2"]["scale"] = scale["encoder"]["bn2"]["scale"] * 0 + 8.0
  rate = optim.schedule(base_learning_rate=0.85, batch_size=256, scaling="linear", warmup_steps=0, total_steps=60)
  tx = optim.lars(rate, weight_decay=0.0)
  state = state.replace(params=scale, opt_state=tx.init(scale))
  objective = small_step.contrastive(model, mesh, online_rate=online_rate)
  step = small_step.jitted(objective, mesh, state, tx, rate, micro_batches=micro_batches)
  rows, seen = small_step.rows(np.float32), []
  for _ in range(40):
    state, metrics = step(state, rows)
    seen.append(float(metrics["supervised_loss"]))
  assert "online_energy" not in metrics
  if online_rate == "safe":
    assert max(seen) < 2 * math.log(10)
    assert seen[-1] < seen[0]
  else:
    assert max(seen) > 10 * math.log(10)
