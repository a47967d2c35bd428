"""Evaluation of a split, each example exactly once: accuracies, features, and linear probes of them."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from sklearn import linear_model, pipeline, preprocessing

from simclr_jax.hardware import sharding


def accuracy(
  logits_of: Callable[[Any, jax.Array], jax.Array], variables, batches: Iterable[dict[str, np.ndarray]], mesh
) -> dict[str, float]:
  """Returns top-1 and top-5 accuracy, mean loss and the number of examples of a whole split.

  Args:
    logits_of: (variables, f32[B, H, W, 3]) -> f32[B, classes].
    variables: handed to `logits_of`.
    batches: this process's rows: `image`, `label`, `mask` (0 marks padding, which counts nowhere).
    mesh: where the batches go.
  """

  # Sums are integers or float32 of one batch, added up on the host: exact for any size of split.
  def count(variables, batch):
    logits, label, mask = logits_of(variables, batch["image"]), batch["label"], batch["mask"] > 0
    loss, rank = cross_entropies(logits, label), ranks(logits, label)
    return {
      "top1": jnp.sum((rank < 1) & mask),
      "top5": jnp.sum((rank < 5) & mask),
      "loss": jnp.sum(jnp.where(mask, loss, 0.0)),
      "examples": jnp.sum(mask),
    }

  count = jax.jit(count, out_shardings=sharding.replicated(mesh))
  totals = dict.fromkeys(("top1", "top5", "loss", "examples"), 0.0)
  for rows in batches:
    batch = sharding.global_batch(mesh, {k: rows[k] for k in ("image", "label", "mask")})
    for name, value in jax.device_get(count(variables, batch)).items():
      totals[name] += float(value)
  examples = totals.pop("examples")
  return {**{name: total / examples for name, total in totals.items()}, "examples": int(examples)}


def cross_entropies(logits: jax.Array, label: jax.Array) -> jax.Array:
  """Returns f32[N], the loss of each row of logits f32[N, K], given label i32[N]."""
  own = jnp.take_along_axis(logits, label[:, None], axis=1)
  return jax.nn.logsumexp(logits, axis=1) - own[:, 0]


def ranks(logits: jax.Array, label: jax.Array) -> jax.Array:
  """Returns i32[N]: how many classes come before the right one, 0 where it is the first.

  Among equal logits the lower class comes first, as argmax has it. With logits that are not numbers nothing comes
  after anything, so that a classifier that diverged is never right.

  Args:
    logits: f32[N, K].
    label: i32[N].
  """
  own = jnp.take_along_axis(logits, label[:, None], axis=1)
  not_earlier = jnp.arange(logits.shape[1])[None] >= label[:, None]
  # What does not come after the right class comes before it: comparisons with NaN are all false.
  return jnp.sum(~((logits < own) | ((logits == own) & not_earlier)), axis=1)


def features(
  encode: Callable[[Any, jax.Array], jax.Array], variables, batches: Iterable[dict[str, np.ndarray]], mesh
) -> tuple[np.ndarray, np.ndarray]:
  """Returns (features f32[N, D], label i32[N]) of a whole split in the order of `index`, the same on every process.

  A label may be a vector as well: i32[N, K] then.

  Args:
    encode: (variables, [B, H, W, 3]) -> [B, D].
    variables: handed to `encode`.
    batches: this process's rows: `image`, `label`, `index`, `mask` (0 marks padding, which is dropped); equally many
      on every process.
    mesh: where the batches go.
  """
  table = _feature_table(encode, mesh)(variables, batches)
  return table["x"], table["label"]


@functools.lru_cache(maxsize=4)
def _feature_table(encode, mesh):
  """Returns the `table_of` of `features`: one compilation for all splits of an encoder."""
  rows_of = lambda variables, batch: {
    "x": encode(variables, batch["image"]).astype(jnp.float32),
    "label": batch["label"],
  }
  return table_of(rows_of, mesh)


def table_of(
  rows_of: Callable[[Any, dict[str, jax.Array]], dict[str, jax.Array]], mesh
) -> Callable[[Any, Iterable[dict[str, np.ndarray]]], dict[str, np.ndarray]]:
  """Returns (variables, batches) -> what `rows_of` says of each example of a split, by name, in the order of `index`.

  The same on every process. What is returned compiles once, however many splits and variables it is used on.

  Args:
    rows_of: (variables, batch of `image` and `label`) -> arrays [B, ...] by name.
    mesh: where the batches go.
  """

  def placed(variables, batch):
    return {"row": rows_of(variables, batch), "index": batch["index"], "mask": batch["mask"]}

  # Whole on every device, so that each process reads all rows, not its own alone.
  placed = jax.jit(placed, out_shardings=sharding.replicated(mesh))

  def read(variables, batches):
    parts = []
    for rows in batches:
      batch = {key: rows[key] for key in ("image", "label", "mask")} | {"index": rows["index"].astype(np.int32)}
      part = placed(variables, sharding.global_batch(mesh, batch))
      # The device works on this batch while the last one's rows are fetched.
      parts[-1:] = jax.device_get(parts[-1:])
      parts.append(part)
    index, mask = (np.concatenate([np.asarray(part[key]) for part in parts]) for key in ("index", "mask"))
    real = np.flatnonzero(mask > 0)
    place = np.full(len(index), len(index))
    place[real[np.argsort(index[real], kind="stable")]] = np.arange(len(real))
    # Part by part, each let go once its rows are in their places: features of a large split fit into memory once.
    table = {name: np.empty((len(real), *rows.shape[1:]), rows.dtype) for name, rows in parts[0]["row"].items()}
    ends = np.cumsum([len(part["index"]) for part in parts])
    for end in ends[::-1]:
      part = parts.pop()
      own = place[end - len(part["index"]) : end]
      for name, rows in part["row"].items():
        table[name][own[own < len(index)]] = np.asarray(rows)[own < len(index)]
    return table

  return read


def probe_accuracy(train_x, train_y, test_x, test_y, *, regularisation: float = 1.0) -> float:
  """Returns the held-out accuracy of a logistic regression on standardised fixed features.

  Args:
    train_x: f32[N, D].
    train_y: i32[N].
    test_x: f32[M, D].
    test_y: i32[M].
    regularisation: scikit-learn's C, the inverse strength of the L2 penalty.
  """
  probe = pipeline.make_pipeline(
    preprocessing.StandardScaler(), linear_model.LogisticRegression(C=regularisation, max_iter=2000)
  )
  return float(probe.fit(train_x, train_y).score(test_x, test_y))
