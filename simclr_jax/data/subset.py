"""Row numbers of a part of a split: a seeded share of each class, or the images that a list names."""

import os
from collections.abc import Sequence

import numpy as np

from simclr_jax import errors


def balanced(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
  """Returns the sorted row numbers i64[n] of a random share of each class, rounded, at least one image of each class.

  For one seed a smaller share is a subset of a larger one, as the reference's 1 % of ImageNet is of its 10 %.
  Images of label -1 have none and are never chosen. `fraction` is above 0 and at most 1.
  """
  chosen = [np.zeros(0, np.int64)]
  for label in np.unique(labels[labels >= 0]):
    rows = np.flatnonzero(labels == label)
    order = np.random.default_rng([seed, int(label)]).permutation(len(rows))
    chosen.append(rows[order[: max(1, round(fraction * len(rows)))]])
  return np.sort(np.concatenate(chosen))


def listed(names: Sequence[str], path: str) -> np.ndarray:
  """Returns the sorted row numbers i64[n] of the images that a file lists, one name a line.

  `names` are those of all images of the split. Folders are ignored, there and in the file: "n01440764_10026.JPEG" is
  compared. A file that is not there, or lists an image that the split does not have, is a UserError.
  """
  if not os.path.isfile(path):
    raise errors.UserError(f'no file "{path}" for config.labels.ids; give a list of image names, one a line.')
  with open(path, encoding="utf-8") as file:
    wanted = {os.path.basename(line.strip()) for line in file if line.strip()}
  base = [os.path.basename(name) for name in names]
  missing = wanted - set(base)
  if missing or not wanted:
    example = f" (first: {min(missing)})" if missing else ""
    raise errors.UserError(
      f"{len(missing)} of the {len(wanted)} images that {path} names are not in the split{example}; "
      f"the split has names such as {base[0]}."
    )
  return np.flatnonzero([name in wanted for name in base])
