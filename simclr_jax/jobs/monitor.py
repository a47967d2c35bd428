"""monitor: what pretraining measures beside its loss, so that a collapse is seen early.

On held-out images, where there are labels: the accuracy of the online classifier, and of nearest neighbours among
training images. On positive pairs as the network trains on them, but with the encoder in inference mode: alignment,
uniformity and effective rank, which need no labels.
"""

import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from simclr_jax import errors, evaluation, geometry, neighbours, sharding, telemetry
from simclr_jax.data import subset
from simclr_jax.jobs import feed, setup

KNN_TEMPERATURE = 0.1


def evaluate_of(
  config, model, mesh: jax.sharding.Mesh, train, images: feed.Feed
) -> Callable[..., dict[str, float]] | None:
  """Returns state -> metrics, called by all processes alike, or None where there is nothing to measure.

  `eval/online_*` (accuracies, loss, examples) and `eval/knn_top1` of the held-out split; `eval/alignment`,
  `eval/uniformity` of the projection z, and the effective ranks `eval/rank_h`, `eval/rank_z`. The same on any number
  of devices and processes, to rounding.

  Args:
    config: the run's.
    model: a `simclr.SimCLR`.
    mesh: the devices.
    train: the source of the training images.
    images: they on their way into the step.
  """
  knobs = config.monitor
  for key, least in (("knn_images", 0), ("knn_neighbours", 1), ("pairs", 0)):
    if knobs[key] < least:
      raise errors.UserError(f"config.monitor.{key} is {knobs[key]}; use {least} or more.")
  parts = []
  if train.num_classes and config.data.eval_split and (model.linear_head or knobs.knn_images):
    held_out = setup.source_of(config, config.data.eval_split)
    if held_out.num_classes:
      parts.append(_accuracies(config, model, mesh, train, held_out))
    else:
      telemetry.log.info("%s has no labels: no online accuracy and no online kNN.", held_out.name)
  if knobs.pairs:
    parts.append(_geometry(config, model, mesh, images))
  if not parts:
    return None

  def evaluate(state):
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    return {f"eval/{name}": value for part in parts for name, value in part(variables).items()}

  return evaluate


def _accuracies(config, model, mesh, train, held_out):
  """Returns variables -> the accuracies on the held-out split, which the network sees once for all of them."""
  whole, knn = setup.whole_of(config, mesh), config.monitor.knn_images > 0

  def rows_of(variables, batch):
    variables = {**variables, "params": whole(variables["params"])}
    h, _, logits = model.apply(variables, batch["image"], train=False)
    row = {"label": batch["label"]}
    if knn:
      row["h"] = h.astype(jnp.float32)
    if logits is not None:
      row |= {
        "rank": evaluation.ranks(logits, batch["label"]),
        "loss": evaluation.cross_entropies(logits, batch["label"]),
      }
    return row

  table_of = evaluation.table_of(rows_of, mesh)
  held_out_rows = setup.evaluation_rows(config, held_out)
  if knn:
    known_rows = setup.evaluation_rows(config, subset.sample(train, config.monitor.knn_images, config.seed))

  def accuracies(variables):
    table, metrics = table_of(variables, held_out_rows()), {}
    if "rank" in table:
      metrics |= {f"online_top{k}": float(np.mean(table["rank"] < k)) for k in (1, 5)}
      metrics |= {"online_loss": float(np.mean(table["loss"], dtype=np.float64)), "online_examples": len(table["rank"])}
    if knn:
      known = table_of(variables, known_rows())
      (found,) = neighbours.accuracies(
        *(known["h"], known["label"], table["h"], table["label"]),
        neighbours=[min(config.monitor.knn_neighbours, len(known["h"]))],
        temperatures=[KNN_TEMPERATURE],
        classes=train.num_classes,
        mesh=mesh,
      )
      metrics["knn_top1"] = found["top1"]
    return metrics

  return accuracies


def _geometry(config, model, mesh, images):
  """Returns variables -> alignment, uniformity and ranks of the first positive pairs of the run."""
  whole, count = setup.whole_of(config, mesh), config.monitor.pairs
  batches = _pairs(images, count, config.batch_size)

  def embed(variables, rows):
    variables = {**variables, "params": whole(variables["params"])}
    views = images.prepare(rows)["views"]
    h, z, _ = model.apply(variables, views.reshape(-1, *views.shape[2:]), train=False)
    # In at least float32, whole on every device: each process computes the same from the same rows.
    return tuple(x.astype(jnp.promote_types(x.dtype, jnp.float32)).reshape(len(views), 2, -1) for x in (h, z))

  embed = jax.jit(embed, out_shardings=sharding.replicated(mesh))

  def measure(variables):
    parts = [jax.device_get(embed(variables, rows)) for rows in batches()]
    h, z = (np.concatenate(column)[:count] for column in zip(*parts, strict=True))
    return {
      "alignment": geometry.alignment(z),
      "uniformity": geometry.uniformity(z),
      "rank_h": geometry.effective_rank(h.reshape(-1, h.shape[-1])),
      "rank_z": geometry.effective_rank(z.reshape(-1, z.shape[-1])),
    }

  return measure


def _pairs(images: feed.Feed, count: int, batch_size: int) -> Callable[[], Iterator[feed.Batch]]:
  """Returns a function whose call goes through global batches of at least `count` training images, as step 0 on has.

  Of a batch that holds more, rows in even steps: the first ones alone would be of the first parts of the data.
  """
  rounds, rows = -(-count // batch_size), min(count, batch_size)
  sharding.check_divisible(rows, images.mesh, name="config.monitor.pairs")

  def spread(batch, rows):
    return jax.tree.map(lambda x: x[np.arange(rows) * len(x) // rows], batch)

  if images.dataset is not None:
    batch_of = lambda dataset, step: spread(images.batch_of(dataset, step), rows)
    batch_of = jax.jit(batch_of, out_shardings=sharding.batched(images.mesh))
    return lambda: (batch_of(images.dataset, np.int32(step)) for step in range(rounds))

  @functools.cache
  def held():
    # In the host's memory, as it was read: the devices have better use of theirs. The even steps of every process's
    # own rows are those of the global batch.
    batches, own = iter(images.batches(0)), rows // jax.process_count()
    return [spread(next(batches), own) for _ in range(rounds)]

  return lambda: (sharding.global_batch(images.mesh, batch) for batch in held())
