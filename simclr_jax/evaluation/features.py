"""Features of a split: each example exactly once, in the order of its index, on every process."""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from simclr_jax import errors, progress
from simclr_jax.hardware import sharding

# This process's rows: `image`, `label`, `index`, `mask` (0 marks padding, which is dropped). Every process has the same
# number of batches.
Batches = Iterable[dict[str, np.ndarray]]


class Features(NamedTuple):
  """Features of a split with their labels."""

  x: np.ndarray  # f[N, D]
  label: np.ndarray  # i32[N], or i32[N, K] where an image may have several: 1 yes, 0 no, -1 unknown.


def of_split(encode: Callable[[Any, jax.Array], jax.Array], variables: Any, batches: Batches, mesh: Mesh) -> Features:
  """Returns float32 features and labels of a whole split in the order of `index`, the same on every process.

  `encode` is (variables, [B, H, W, 3]) -> [B, D]; the mesh shares each batch.
  """
  table = _feature_table(encode, mesh)(variables, batches)
  return Features(table["x"], table["label"])


@functools.lru_cache(maxsize=4)
def _feature_table(encode, mesh):
  """Returns the `table_of` that `of_split` uses, cached so that all splits of an encoder share one compilation."""
  rows_of = lambda variables, batch: {
    "x": encode(variables, batch["image"]).astype(jnp.float32),
    "label": batch["label"],
  }
  return table_of(rows_of, mesh)


def table_of(
  rows_of: Callable[[Any, dict[str, jax.Array]], dict[str, jax.Array]], mesh: Mesh
) -> Callable[[Any, Batches], dict[str, np.ndarray]]:
  """Returns (variables, batches) -> arrays [N, ...] by name, the outputs of `rows_of` for each example of a split.

  Rows are in the order of `index`, the same on every process. `rows_of` is (variables, batch with `image` and `label`)
  -> arrays [B, ...] by name. The returned function compiles once for all splits and variables of the same shapes.
  """

  def compute(variables, batch):
    return {"row": rows_of(variables, batch), "index": batch["index"], "mask": batch["mask"]}

  # Replicated, so that each process can read all rows and not only its own.
  compute = jax.jit(compute, out_shardings=sharding.replicated(mesh))

  def read(variables, batches):
    parts = []
    progress.doing("evaluating images")
    for rows in batches:
      batch = {key: rows[key] for key in ("image", "label", "mask")} | {"index": rows["index"].astype(np.int32)}
      part = compute(variables, sharding.global_batch(mesh, batch))
      # The previous batch is fetched while the device works on this one.
      parts[-1:] = jax.device_get(parts[-1:])
      parts.append(part)
    return _in_order(parts)

  return read


def _in_order(parts):
  """Returns the rows of all parts by name, sorted by index and without padding; `parts` is emptied."""
  index, mask = (np.concatenate([np.asarray(part[key]) for part in parts]) for key in ("index", "mask"))
  real = np.flatnonzero(mask > 0)
  position = np.full(len(index), len(index))
  position[real[np.argsort(index[real], kind="stable")]] = np.arange(len(real))
  # Each part is freed after its rows are copied, so that the features of a large split are in memory once, not twice.
  table = {name: np.empty((len(real), *rows.shape[1:]), rows.dtype) for name, rows in parts[0]["row"].items()}
  ends = np.cumsum([len(part["index"]) for part in parts])
  for end in ends[::-1]:
    part = parts.pop()
    own = position[end - len(part["index"]) : end]
    for name, rows in part["row"].items():
      table[name][own[own < len(index)]] = np.asarray(rows)[own < len(index)]
  return table


def labelled(found: Features) -> Features:
  """Returns the rows f[..., n, D] that have a label (any but -1, all of a multi-label split); a UserError for none."""
  x, label = (np.asarray(part) for part in found)
  if not np.any(label >= 0):
    raise errors.UserError("no image of a split has a label; choose another split.")
  if label.ndim > 1 or np.all(label >= 0):
    return found
  return Features(x[..., label >= 0, :], label[label >= 0])


def check_finite(x: np.ndarray, name: str, source: str) -> None:
  """Raises a UserError if features f[N, D] of the split `name` by the checkpoint `source` have NaN or infinity."""
  # A row's sum is not finite if one of its entries is not; np.isfinite(x) would need an array as large as x.
  bad = np.count_nonzero(~np.isfinite(x.sum(axis=1, dtype=np.float64)))
  if bad:
    raise errors.UserError(
      f"{bad} of {len(x)} features of {name} are not numbers; checkpoint {source} has diverged, take an earlier one."
    )
