"""Scores of classifiers: accuracy of a network on a split, and top-1, mean per class, average precision of a table."""

import collections
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from simclr_jax import errors
from simclr_jax.evaluation import features
from simclr_jax.hardware import sharding


def accuracy(
  logits_of: Callable[[Any, jax.Array], jax.Array], variables: Any, batches: features.Batches, mesh: jax.sharding.Mesh
) -> dict[str, float]:
  """Returns accuracies, the mean cross-entropy (`loss`) and the number of `examples` of a whole split.

  Accuracies are `top1`, its mean over the classes that have images (`balanced_top1`) and, where `tops` has it, `top5`.
  `logits_of` is (variables, [B, H, W, 3]) -> f32[B, K]; the mesh shares each batch. Images of label -1 have no label
  and do not count; a split with no other is a UserError.
  """

  # Each batch is summed on the devices, as integers and float32, and the batches on the host in float64.
  def count(variables, batch):
    logits, label = logits_of(variables, batch["image"]), jnp.maximum(batch["label"], 0)
    mask = (batch["mask"] > 0) & (batch["label"] >= 0)
    loss = optax.losses.softmax_cross_entropy_with_integer_labels(logits, label)
    rank = ranks(logits, label)
    by_class = lambda rows: jnp.zeros(logits.shape[1], jnp.int32).at[label].add(rows.astype(jnp.int32))
    return {
      **{name: jnp.sum((rank < top) & mask) for name, top in tops(logits.shape[1]).items()},
      "correct": by_class((rank < 1) & mask),
      "of_class": by_class(mask),
      "loss": jnp.sum(jnp.where(mask, loss, 0.0)),
      "examples": jnp.sum(mask),
    }

  count = jax.jit(count, out_shardings=sharding.replicated(mesh))
  totals = collections.defaultdict(float)
  for rows in batches:
    batch = sharding.global_batch(mesh, {key: rows[key] for key in ("image", "label", "mask")})
    for name, value in jax.device_get(count(variables, batch)).items():
      totals[name] += np.asarray(value, np.float64)
  examples = totals.pop("examples", 0)
  if not examples:
    raise errors.UserError("no held-out image has a label; set --config.data.eval_split to a split with labels.")
  balanced = float(balanced_of(totals.pop("correct"), totals.pop("of_class")))
  shares = {name: float(total / examples) for name, total in totals.items()}
  return {"top1": shares.pop("top1"), "balanced_top1": balanced, **shares, "examples": int(examples)}


def tops(classes: int) -> dict[str, int]:
  """Returns the accuracies that mean something of so many classes, by name: `top1`, and from six classes on `top5`."""
  return {"top1": 1, "top5": 5} if classes > 5 else {"top1": 1}


def balanced_of(correct: np.ndarray, of_class: np.ndarray) -> np.ndarray:
  """Returns f64[...], the mean over the classes with images of the share of `of_class` [K] in `correct` [..., K]."""
  # A class beyond the K that the classifier knows is never correct.
  correct = np.pad(correct, [(0, 0)] * (correct.ndim - 1) + [(0, len(of_class) - correct.shape[-1])])
  present = of_class > 0
  return np.mean(correct[..., present] / of_class[present], axis=-1)


def shown(result: Mapping[str, Any], prefix: str = "eval/") -> str:
  """Returns "top-1 81.20 %, balanced 79.00 %, top-5 97.00 %" of what is there of a result, for people."""
  names = {"top1": "top-1", "balanced_top1": "balanced", "top5": "top-5"}
  known = {shown: result[prefix + name] for name, shown in names.items() if prefix + name in result}
  return ", ".join(f"{shown} {100 * value:.2f} %" for shown, value in known.items())


def wilson(correct: float, n: int) -> tuple[float, float]:
  """Returns the ends of the 95 % interval of the probability of which `correct` of `n` are a sample; Wilson 1927.

  Unlike the normal approximation it stays in [0, 1] and has a width at 0 and at n. Raises ValueError unless
  0 <= correct <= n and n >= 1.
  """
  if not (n >= 1 and 0 <= correct <= n):
    raise ValueError(f"correct {correct} of n {n}; at least one and no more than all can be correct.")
  z = 1.959963984540054  # The 97.5 % point of the normal distribution.
  share = correct / n
  centre = share + z**2 / (2 * n)
  half = z * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
  low, high = ((centre + sign * half) / (1 + z**2 / n) for sign in (-1, 1))
  # Rounding alone would leave 1e-17 below zero at 0 of n, and an end beyond the share itself.
  return max(0.0, min(low, share)), min(1.0, max(high, share))


def ranks(logits: jax.Array, label: jax.Array) -> jax.Array:
  """Returns i32[N], how many classes rank above the correct one in logits f32[N, K]: 0 where the prediction is correct.

  Of equal logits the lower class ranks higher, as in argmax. In a row with NaN every class ranks above the correct
  one, so that a classifier that diverged is never correct.
  """
  own = jnp.take_along_axis(logits, label[:, None], axis=1)
  not_lower = jnp.arange(logits.shape[1])[None] >= label[:, None]
  # Classes that do not rank below are counted, because every comparison with NaN is false.
  return jnp.sum(~((logits < own) | ((logits == own) & not_lower)), axis=1)


def top1(scores: np.ndarray, y: np.ndarray) -> float:
  """Returns the share of rows f[N, K] whose `predicted` class is that of i32[N]."""
  return float(np.mean(predicted(scores) == y))


def mean_per_class(scores: np.ndarray, y: np.ndarray) -> float:
  """Returns the mean over the classes in i32[N] of the share of their rows f[N, K] that is correct, as in `top1`."""
  return balanced(predicted(scores) == y, y)


def balanced(correct: np.ndarray, y: np.ndarray) -> float:
  """Returns the mean over the classes in i32[N] of the share of their rows that is correct, bool[N]."""
  return float(np.mean([np.mean(correct[y == label]) for label in np.unique(y)]))


def mean_average_precision(scores: np.ndarray, y: np.ndarray) -> float:
  """Returns the mean of `average_precision` over the classes with at least one positive row (PASCAL VOC 2007's mAP).

  Scores are f[N, K], labels i32[N, K]: 1 positive, 0 negative, -1 not counted for this class.
  """
  present = np.flatnonzero(np.any(y == 1, axis=0))
  return float(np.mean([average_precision(scores[:, label], y[:, label]) for label in present]))


def average_precision(scores: np.ndarray, y: np.ndarray) -> float:
  """Returns the 11-point interpolated average precision of one class; Everingham et al. 2010, section 4.2.

  It is the mean over recalls r = 0, 0.1, ..., 1 of the highest precision at a recall of at least r. Rows are sorted by
  score f[N], rows with equal scores keep their order; with a NaN among the scores the result is 0. Labels are i32[N]:
  1 positive, 0 negative, -1 not counted; at least one is 1.
  """
  scores, y = scores[y >= 0], y[y >= 0]
  if np.any(np.isnan(scores)):
    return 0.0
  found = np.cumsum(y[np.argsort(-scores, kind="stable")])
  precision = found / np.arange(1, len(y) + 1)
  # In integers, because 3 / 10 is not equal to 3 * 0.1 in floating point.
  reached = [10 * found >= tenths * found[-1] for tenths in range(11)]
  return float(np.mean([np.max(precision[at_least]) for at_least in reached]))


def predicted(scores: np.ndarray) -> np.ndarray:
  """Returns i64[N], the class with the highest of the scores f[N, K], of equal ones the lower; -1 for rows with NaN."""
  return np.where(np.any(np.isnan(scores), axis=1), -1, np.argmax(scores, axis=1))
