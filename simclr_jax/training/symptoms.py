"""What the metric rows of pretraining say when something is wrong: one line each with the likely cause."""

import collections
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

Row = Mapping[str, float]

# Rows in sequence that must show the same, because single batches vary.
STEADY = 3
# A network that tells no images apart finds the other view as often as 1 in N; this many times that is "near".
NEAR = 2
# Of classes: the online classifier's loss may exceed that of guessing for a while, by less than this factor.
DIVERGED = 2
# Effective rank and uniformity of embeddings that are all in one place: 1 and 0.
POINT_RANK, POINT_UNIFORMITY = 1.5, -0.1


@dataclasses.dataclass(frozen=True)
class Facts:
  """What the rules know of a run."""

  images: int  # Of a batch, N.
  chance: float | None  # See `chance_loss`.
  classes: int = 0  # Of the online classifier; 0: there is none.
  settled: int = 0  # Steps before which only the online classifier is judged: warm-up, and a fifth of the run.


def chance_loss(kind: str, images: int, queue: int = 0) -> float | None:
  """Returns the loss of embeddings that are all equally similar, or None for kinds whose loss says nothing then.

  It is ln(2N - 1) of nt_xent and sup_con, ln(2N - 2) of dcl, with a full queue of negatives more by its size.
  """
  candidates = {"nt_xent": 2 * images - 1, "sup_con": 2 * images - 1, "dcl": 2 * images - 2}.get(kind, 0) + queue
  return math.log(candidates) if kind in ("nt_xent", "sup_con", "dcl") and candidates > 0 else None


def found(recent: Sequence[Row], evaluated: Row, facts: Facts) -> dict[str, str]:
  """Returns what is wrong, name -> line, given the last training rows (oldest first) and the last evaluation.

  Rows have `step` and the names of metrics.jsonl; a metric that is missing or NaN shows nothing.
  """
  lines, guessing = {}, math.log(max(facts.classes, 1))
  if guessing and _all(recent, "train/supervised_loss", lambda loss: loss > DIVERGED * guessing):
    loss = recent[-1]["train/supervised_loss"]
    lines["online head"] = (
      f"The online classifier's loss is {loss:.3g}, guessing gives {guessing:.3g}: its rate is too high "
      "for these features. The encoder does not learn from it; set --config.head.online_rate=safe."
    )
  settled = [row for row in recent if row["step"] > facts.settled]
  if facts.chance is not None and _all(settled, "train/loss", lambda loss: loss > facts.chance):
    lines["loss"] = (
      f"The loss is {settled[-1]['train/loss']:.3g}, guessing gives {facts.chance:.3g} (of {facts.images} images): the "
      "learning rate is too high, or so low that training has hardly begun; try optimizer.base_learning_rate three "
      "times lower and three times higher."
    )
  if facts.images > 4 and _all(settled, "train/contrast_acc", lambda share: share < NEAR / facts.images):
    lines["accuracy"] = (
      f"The other view of an image is found in {settled[-1]['train/contrast_acc']:.1%}, guessing gives "
      f"{1 / facts.images:.1%}: the views have too little in common (raise augment.min_area, lower "
      "augment.color_strength), or the learning rate is wrong, or all images are alike."
    )
  rank, uniformity = (evaluated.get(f"eval/{name}", math.nan) for name in ("rank_z", "uniformity"))
  if evaluated and evaluated["step"] > facts.settled and (rank < POINT_RANK or uniformity > POINT_UNIFORMITY):
    lines["collapse"] = (
      f"All images have nearly the same embedding (effective rank {rank:.3g}, uniformity {uniformity:.2g}): the "
      "representation collapses; lower optimizer.base_learning_rate, or take a larger batch."
    )
  return lines


def _all(rows, name, holds):
  """Returns whether the STEADY last rows are there and hold; every comparison with NaN is false."""
  last = rows[-STEADY:]
  return len(last) == STEADY and all(holds(row.get(name, math.nan)) for row in last)


class Watch:
  """Says each line of `found` once, as soon as the rows of a run show it."""

  def __init__(self, facts: Facts, say: Callable[[str], None]):
    self._facts, self._say, self._said = facts, say, set()
    self._recent, self._evaluated = collections.deque(maxlen=STEADY), {}

  def __call__(self, step: int, row: Row) -> None:
    """Takes the next row, of a training step or an evaluation."""
    row = {"step": step, **row}
    if "train/loss" in row:
      self._recent.append(row)
    else:
      self._evaluated = row
    for name, line in found(list(self._recent), self._evaluated, self._facts).items():
      if name not in self._said:
        self._said.add(name)
        self._say(f"Step {step}: {line}")
