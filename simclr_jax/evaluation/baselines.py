"""What a result is worth: the same measurement of chance, pixels, colours and an untrained encoder, and a verdict."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from simclr_jax.evaluation import features, scores

# Side of the pixels that are compared, and bins of a colour channel.
PIXELS, BINS = 32, 8

ENCODER, RAW, COLORS, RANDOM, CHANCE = "encoder", "raw pixels", "colour histogram", "random encoder", "chance"

# How a sentence calls them, and what it means when a result is no better than the strongest of them.
NAMED = {RAW: "raw pixels", COLORS: "colour histograms", RANDOM: "an untrained encoder"}
MEANT = {
  RAW: "it has learned nothing that pixels do not have",
  COLORS: "these classes differ in colour, and it has learned nothing beyond that",
  RANDOM: "training has not helped yet",
}
ADVICE = "train longer, on more images, or with another augmentation (docs/evaluation.md)."


class Score(NamedTuple):
  """A share of correct images with the ends of its 95 % interval."""

  top1: float
  low: float
  high: float


def score(top1: float, examples: int) -> Score:
  """Returns a share of so many examples with its interval, see `scores.wilson`."""
  return Score(top1, *scores.wilson(round(top1 * examples), examples))


def interval(top1: float, examples: int) -> list[float]:
  """Returns the ends of the interval of a share of so many examples, for `result.json`."""
  return list(score(top1, examples)[1:])


def raw_pixels(variables: Any, images: jax.Array) -> jax.Array:
  """Returns f32[N, D], images [N, H, W, 3] (u8, or f32 in [0, 1]) shrunk to at most PIXELS a side, antialiased."""
  count, height, width, channels = images.shape
  size = (count, min(height, PIXELS), min(width, PIXELS), channels)
  return jax.image.resize(_unit(images), size, "linear", antialias=True).reshape(count, -1)


def color_histogram(variables: Any, images: jax.Array) -> jax.Array:
  """Returns f32[N, BINS^3], square roots of the shares of an image's pixels [N, H, W, 3] in each cell of the RGB cube.

  The product of two rows is the Bhattacharyya coefficient of the two histograms.
  """
  cell = jnp.clip(jnp.floor(_unit(images) * BINS), 0, BINS - 1).astype(jnp.int32)
  cell = (cell @ jnp.array([BINS**2, BINS, 1], jnp.int32)).reshape(len(images), -1)
  count = jax.vmap(lambda own: jnp.zeros(BINS**3, jnp.float32).at[own].add(1.0))(cell)
  return jnp.sqrt(count / cell.shape[1])


def _unit(images):
  return images / jnp.float32(255) if images.dtype == jnp.uint8 else images.astype(jnp.float32)


def measure(
  encoders: Mapping[str, tuple[Callable[[Any, jax.Array], jax.Array], Any]],  # Name -> (encode, variables).
  known: Callable[[], features.Batches],  # Starts a pass over the images that a classifier may learn from.
  held_out: Callable[[], features.Batches],
  top1: Callable[[features.Features, features.Features], float],  # (of known, of held-out images) -> share correct.
  mesh: jax.sharding.Mesh,
) -> dict[str, Score]:
  """Returns the scores of encoders, of raw pixels, of colour histograms, and of chance, in this order.

  Each split is read once, for all of them. Chance is the share of the largest class of the held-out images, never below
  1 / classes: what a classifier gets that always says this class.
  """
  encoders = {**encoders, RAW: (raw_pixels, ()), COLORS: (color_histogram, ())}

  def rows_of(variables, batch):
    found = {
      name: encode(own, batch["image"]).astype(jnp.float32)
      for (name, (encode, _)), own in zip(encoders.items(), variables, strict=True)
    }
    return {**found, "label": batch["label"]}

  table_of, variables = features.table_of(rows_of, mesh), [own for _, own in encoders.values()]
  tables = [table_of(variables, batches()) for batches in (known, held_out)]
  found = {}
  for name in encoders:
    pair = [features.labelled(features.Features(table.pop(name), table["label"])) for table in tables]
    found[name] = score(top1(*pair), len(pair[1].label))
  label = tables[1]["label"]
  label = label[label >= 0]
  return {**found, CHANCE: score(np.bincount(label).max() / len(label), len(label))}


def verdict(subject: str, own: Score, others: Mapping[str, Score], *, is_trained: bool = True) -> str:
  """Returns a sentence about a score beside those of `measure`, by the first fitting rule of docs/evaluation.md.

  `subject` is "the encoder" or "the classifier"; `is_trained` is False for an encoder as it is initialised.
  """
  rivals = {name: value for name, value in others.items() if name in NAMED}
  best = max(rivals, key=lambda name: rivals[name].top1)
  if not is_trained:
    return f"{subject} is as it was initialised; a trained one has to beat {NAMED[best]}: {rivals[best].top1:.1%}."
  if own.high < others[CHANCE].top1:
    return f"{subject} is below chance: look for labels that differ between the splits, and for constant features."
  if own.low <= others[CHANCE].top1:
    return f"{subject} is no better than chance: it has learned nothing about these classes; {ADVICE}"
  if own.low > rivals[best].high:
    *first, last = [NAMED[name] for name in rivals]
    return f"{subject} is better than {', '.join(first)} and {last}: the intervals do not overlap."
  if own.high < rivals[best].low:
    return f"{subject} is worse than {NAMED[best]}: these are a better start; {ADVICE}"
  return f"{subject} is no better than {NAMED[best]}, as the intervals overlap: {MEANT[best]}; {ADVICE}"


def shortfall(job: str, own: Score, encoder: Score) -> str:
  """Returns " ..." about a job's classifier below a quick regression on the same encoder (rule 7), or ""."""
  if own.high >= encoder.low:
    return ""
  return f" {job}'s classifier is below a quick regression on the same features: raise its epochs or learning rate."


def table(rows: Mapping[str, Score], title: str) -> str:
  """Returns scores with their intervals in lines of at most 80 characters below a title."""
  lines = [title, f"  {'':<44}{'top-1 %':>9}{'95 % interval':>20}"]
  for name, value in rows.items():
    ends = f"{100 * value.low:.1f} to {100 * value.high:.1f}"
    lines.append(f"  {name:<44}{100 * value.top1:>9.1f}{ends:>20}")
  return "\n".join(lines)
