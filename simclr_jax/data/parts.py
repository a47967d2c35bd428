"""Parts of a split: `train[80%:]`, and images that are held out of it."""

import re
from collections.abc import Sequence

import numpy as np

from simclr_jax import errors, randomness
from simclr_jax.data import source

# In place of a split's name: the images that `config.data.holdout` holds out of the training split.
HELD_OUT = "holdout"


def named(split: str) -> tuple[str, str]:
  """Returns (the split's name, the slice between brackets or "") of `train` or `train[80%:]`."""
  match = re.fullmatch(r"([^\[\]]+)(?:\[([^\[\]]*)\])?", split)
  if not match:
    raise errors.UserError(f'cannot read split "{split}"; write NAME or a part of one, such as train[80%:].')
  return match[1], match[2] or ""


def rows(cut: str, labels: np.ndarray) -> np.ndarray:
  """Returns the sorted row numbers i64[n] of a slice `80%:`, `:100` or `20%:40%` of the images with labels i32[N].

  A percentage is one of each class, in the order of the images, so that every class is in every part: folders are
  sorted by class. Images without a label are a class of their own. A number counts images of the whole split.
  """
  match = re.fullmatch(r"\s*(\d+%?)?\s*:\s*(\d+%?)?\s*", cut)
  if not match:
    raise errors.UserError(f'cannot read the part "[{cut}]" of a split; write such as [80%:], [:80%] or [:1000].')
  ends = [match[1] or "0%", match[2] or "100%"]
  if any(end.endswith("%") and int(end[:-1]) > 100 for end in ends):
    raise errors.UserError(f'the part "[{cut}]" of a split goes beyond 100 %; write such as [80%:].')
  place = lambda end, count: round(count * int(end[:-1]) / 100) if end.endswith("%") else min(int(end), count)
  if any(end and not end.endswith("%") for end in match.groups()):
    low, high = (place(end, len(labels)) for end in ends)
    return np.arange(low, max(low, high))
  chosen = [np.zeros(0, np.int64)]
  for label in np.unique(labels):
    of_class = np.flatnonzero(labels == label)
    low, high = (place(end, len(of_class)) for end in ends)
    chosen.append(of_class[low:high])
  return np.sort(np.concatenate(chosen))


def held_out(labels: np.ndarray, names: Sequence[str], share: float, *, seed: int, group: str = "") -> np.ndarray:
  """Returns which images, bool[N], are held out: about `share` of each class, a function of the seed.

  `group` is a regular expression that is searched in the names: images with the same match (of its first group, where
  it has one) stay together, as all slices of a patient should. A class then has its share by whole groups, filled in
  random order; a group of several classes counts for its commonest. An image without a match, an expression that is
  none, or a share that leaves one side empty is a UserError.
  """
  groups = _groups(names, group) if group else np.arange(len(labels))
  sizes, main = np.bincount(groups), _commonest(labels, groups)
  generator = randomness.host(seed, randomness.HOLDOUT)
  taken = []
  for label in np.unique(main):
    own = generator.permutation(np.flatnonzero(main == label))
    before = np.cumsum(sizes[own]) - sizes[own]
    # A group is taken where it brings the count nearer to what is wanted; of two or more one goes to each side.
    count = int(np.sum(before + sizes[own] / 2 <= share * sizes[own].sum()))
    taken.append(own[: min(max(count, 1), len(own) - 1)])
  held = np.isin(groups, np.concatenate(taken))
  if not held.any() or held.all():
    what = f"{len(sizes)} groups" if group else f"{len(labels)} images"
    raise errors.UserError(f"config.data.holdout is {share}: of {what} none is left on one side; use another share.")
  return held


def _groups(names, expression):
  """Returns i64[N], the same number where the expression's matches in the names are the same."""
  try:
    pattern = re.compile(expression)
  except re.error as error:
    raise errors.UserError(f'config.data.holdout_group is "{expression}", no regular expression ({error}).') from error
  found = [pattern.search(name) for name in names]
  if None in found:
    name = names[found.index(None)]
    raise errors.UserError(
      f'config.data.holdout_group "{expression}" matches nothing in "{name}" (and in {found.count(None) - 1} more of '
      f"{len(names)}); every image needs a group."
    )
  keys = [match[1] if pattern.groups else match[0] for match in found]
  return np.unique(np.array([key or "" for key in keys], np.str_), return_inverse=True)[1]


def _commonest(labels, groups):
  """Returns i64[G], the commonest label of each group."""
  kinds, numbered = np.unique(labels, return_inverse=True)
  counts = np.zeros((groups.max() + 1, len(kinds)), np.int64)
  np.add.at(counts, (groups, numbered), 1)
  return kinds[np.argmax(counts, axis=1)]


def divided(images: source.Source, share: float, *, seed: int, group: str = "") -> tuple[source.Source, source.Source]:
  """Returns (the images to train on, those that are held out) of a split; see `held_out`."""
  held = held_out(images.labels(), images.names() if group else (), share, seed=seed, group=group)
  return images.take(np.flatnonzero(~held)), images.take(np.flatnonzero(held))
