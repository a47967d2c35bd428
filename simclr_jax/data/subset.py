"""A part of a split: a seeded share of each class, or the images that a list names."""

import dataclasses
import os
from collections.abc import Sequence

import numpy as np

from simclr_jax import errors
from simclr_jax.data import arrays


def balanced(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
  """Returns the sorted row numbers of a share of each class, rounded, at least one image of each.

  Of one seed a smaller share is part of a larger one, as the reference's 1 % is of its 10 %.

  Args:
    labels: i32[N], none negative.
    fraction: above 0, at most 1.
    seed: of the choice.
  """
  chosen = []
  for label in np.unique(labels):
    rows = np.flatnonzero(labels == label)
    order = np.random.default_rng([seed, int(label)]).permutation(len(rows))
    chosen.append(rows[order[: max(1, round(fraction * len(rows)))]])
  return np.sort(np.concatenate(chosen))


def listed(names: Sequence[str], path: str) -> np.ndarray:
  """Returns the sorted row numbers of the images that a file names, one a line.

  Args:
    names: of all images of the split, with or without folders.
    path: of the list; its entries are compared without their folders, as `n01440764_10026.JPEG`.

  Raises:
    UserError: there is no such file, or it names an image that the split does not have.
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


def names_of(source) -> tuple[str, ...]:
  """Returns a name for each example of a source, by its number where it has no other."""
  if isinstance(source, arrays.Arrays):
    return source.names or tuple(map(str, range(source.num_examples)))
  from simclr_jax.data import sources  # Brings TensorFlow, which resident arrays do without.

  return sources.names_of(source)


def labels_of(source) -> np.ndarray:
  """Returns the label of each example, i32[N]; -1 where there is none."""
  if isinstance(source, arrays.Arrays):
    return source.labels
  from simclr_jax.data import sources

  return sources.labels_of(source)


def take(source, rows: np.ndarray):
  """Returns a source of these rows of another, in their order; what is in memory of it are these rows alone."""
  name = f"{source.name}, {len(rows)} of {source.num_examples}"
  kept = names_of(source) if source.names else ()
  names = tuple(kept[row] for row in rows) if kept else ()
  if isinstance(source, arrays.Arrays):
    return dataclasses.replace(source, name=name, images=source.images[rows], labels=source.labels[rows], names=names)
  from simclr_jax.data import sources

  return dataclasses.replace(
    source, name=name, num_examples=len(rows), examples=sources.rows_of(source, rows), pieces=(), names=names
  )


def consecutive(source, begin: int, end: int):
  """Returns the source of the rows `begin` to `end` of another; no other record is read. Rows keep their names."""
  name = f"{source.name}, rows {begin} to {end}"
  names = source.names[begin:end]
  if isinstance(source, arrays.Arrays):
    names = names or tuple(map(str, range(begin, end)))
    cut = {"images": source.images[begin:end], "labels": source.labels[begin:end]}
    return dataclasses.replace(source, name=name, names=names, **cut)
  if not names and source.read_name is None:
    names = tuple(map(str, range(begin, end)))
  cut = {"num_examples": end - begin, "names": names}
  if source.examples is not None:
    examples = tuple(column[begin:end] for column in source.examples)
    return dataclasses.replace(source, name=name, examples=examples, **cut)
  from simclr_jax.data import sources

  return dataclasses.replace(source, name=name, pieces=tuple(sources.cut(source.pieces, begin, end)), **cut)


def sample(source, count: int, seed: int):
  """Returns a source of at most `count` rows of another, spread over it, the same ones every time.

  Seeded random rows of what is in memory, sorted. Of files the first records of each: those further on cost as much as
  reading the file, and who writes such files shuffles them.
  """
  if count >= source.num_examples:
    return source
  if isinstance(source, arrays.Arrays) or source.examples is not None:
    return take(source, np.sort(np.random.default_rng(seed).permutation(source.num_examples)[:count]))
  files = len(source.pieces)
  shares = [count * (i + 1) // files - count * i // files for i in range(files)]
  pieces = [
    dataclasses.replace(piece, take=min(piece.take, share))
    for piece, share in zip(source.pieces, shares, strict=True)
    if share
  ]
  return dataclasses.replace(
    source,
    name=f"{source.name}, {count} of {source.num_examples}",
    num_examples=sum(piece.take for piece in pieces),
    pieces=tuple(pieces),
  )
