"""Measures of a network during pretraining beside its loss: held-out accuracies, and the geometry of positive pairs.

Accuracies need labels: of the online classifier, and of nearest neighbours among training images. Alignment, uniformity
and effective rank need none; they are computed on the pairs that the network trains on, in inference mode.
"""

from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from simclr_jax.evaluation import features, geometry, neighbours, scores
from simclr_jax.hardware import sharding

KNN_TEMPERATURE = 0.1

Measure = Callable[[Any], dict[str, float]]  # Variables of the network -> metrics by name.


def held_out_accuracies(
  model: nn.Module,  # (images, train) -> (h, z, logits), for example a `simclr.SimCLR`; logits may be None.
  mesh: jax.sharding.Mesh,
  rows_of_held_out: Callable[[], features.Batches],  # Starts a pass: batches with `image`, `label`, `index`, `mask`.
  rows_of_known: Callable[[], features.Batches] | None,  # The same of the images that vote; None: no neighbours.
  *,
  knn_neighbours: int,  # All known images if they are fewer.
  gather_params: Callable[[Any], Any],
  classes: int,
) -> Measure:
  """Returns variables -> accuracies on the held-out split, through which the network goes once for all of them.

  Where the model has an online classifier `online_top1`, its mean over the classes `online_balanced_top1`, from six
  classes on `online_top5`, `online_loss` and `online_examples`; and `knn_top1` and `knn_balanced_top1` of cosine
  nearest neighbours at temperature 0.1 on the encoder's output h. Every process calls it; the values are the same on
  any number of devices and processes, up to rounding.
  """

  def rows_of(variables, batch):
    variables = {**variables, "params": gather_params(variables["params"])}
    h, _, logits = model.apply(variables, batch["image"], train=False)
    row = {"label": batch["label"]}
    if rows_of_known:
      row["h"] = h.astype(jnp.float32)
    if logits is not None:
      label = jnp.maximum(batch["label"], 0)  # Rows of label -1 are left out below.
      row |= {
        "rank": scores.ranks(logits, label),
        "loss": optax.losses.softmax_cross_entropy_with_integer_labels(logits, label),
      }
    return row

  table_of = features.table_of(rows_of, mesh)

  def measure(variables):
    table, metrics = table_of(variables, rows_of_held_out()), {}
    table = {name: rows[table["label"] >= 0] for name, rows in table.items()}
    if not len(table["label"]):
      return {}
    if "rank" in table:
      metrics |= {f"online_{name}": float(np.mean(table["rank"] < k)) for name, k in scores.tops(classes).items()}
      metrics["online_balanced_top1"] = scores.balanced(table["rank"] < 1, table["label"])
      metrics |= {"online_loss": float(np.mean(table["loss"], dtype=np.float64)), "online_examples": len(table["rank"])}
    known = table_of(variables, rows_of_known()) if rows_of_known else None
    if known and np.any(known["label"] >= 0):
      (found,) = neighbours.accuracies(
        (known["h"], known["label"]),
        (table["h"], table["label"]),
        neighbours=[min(knn_neighbours, int(np.sum(known["label"] >= 0)))],
        temperatures=[KNN_TEMPERATURE],
        classes=classes,
        mesh=mesh,
      )
      metrics |= {f"knn_{name}": found[name] for name in ("top1", "balanced_top1")}
    return metrics

  return measure


def pair_geometry(
  model: nn.Module,
  mesh: jax.sharding.Mesh,
  views: Callable[[], Iterator[jax.Array]],  # Starts a pass over f[N, 2, H, W, 3] split over the devices.
  count: int,  # How many pairs are measured; `views` yields at least as many.
  gather_params: Callable[[Any], Any],
) -> Measure:
  """Returns variables -> `alignment` and `uniformity` of z, and the effective ranks `rank_h` and `rank_z`.

  Arguments and promises as those of `held_out_accuracies`.
  """

  def embed(variables, pairs):
    variables = {**variables, "params": gather_params(variables["params"])}
    h, z, _ = model.apply(variables, pairs.reshape(-1, *pairs.shape[2:]), train=False)
    # In at least float32 and replicated: each process computes the same measures from the same rows.
    return tuple(x.astype(jnp.promote_types(x.dtype, jnp.float32)).reshape(len(pairs), 2, -1) for x in (h, z))

  embed = jax.jit(embed, out_shardings=sharding.replicated(mesh))

  def measure(variables):
    parts = [jax.device_get(embed(variables, pairs)) for pairs in views()]
    h, z = (np.concatenate(column)[:count] for column in zip(*parts, strict=True))
    return {
      "alignment": geometry.alignment(z),
      "uniformity": geometry.uniformity(z),
      "rank_h": geometry.effective_rank(h.reshape(-1, h.shape[-1])),
      "rank_z": geometry.effective_rank(z.reshape(-1, z.shape[-1])),
    }

  return measure
