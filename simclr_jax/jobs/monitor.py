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

from simclr_jax import errors, figures
from simclr_jax.data import subset
from simclr_jax.evaluation import features as evaluation
from simclr_jax.evaluation import geometry, neighbours
from simclr_jax.hardware import sharding
from simclr_jax.jobs import feed, setup
from simclr_jax.training import telemetry

KNN_TEMPERATURE = 0.1


Views = Callable[[], Iterator[jax.Array]]


def evaluate_of(config, model, mesh: jax.sharding.Mesh, train, views: Views) -> Callable[..., dict[str, float]] | None:
  """Returns state -> metrics, called by all processes alike, or None where there is nothing to measure.

  `eval/online_*` (accuracies, loss, examples) and `eval/knn_top1` of the held-out split; `eval/alignment`,
  `eval/uniformity` of the projection z, and the effective ranks `eval/rank_h`, `eval/rank_z`. The same on any number
  of devices and processes, to rounding.

  Args:
    config: the run's.
    model: a `simclr.SimCLR`.
    mesh: the devices.
    train: the source of the training images.
    views: from `views_of`.
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
    parts.append(_geometry(config, model, mesh, views))
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


def _geometry(config, model, mesh, views):
  """Returns variables -> alignment, uniformity and ranks of the positive pairs of `views`."""
  whole, count = setup.whole_of(config, mesh), config.monitor.pairs

  def embed(variables, pairs):
    variables = {**variables, "params": whole(variables["params"])}
    h, z, _ = model.apply(variables, pairs.reshape(-1, *pairs.shape[2:]), train=False)
    # In at least float32, whole on every device: each process computes the same from the same rows.
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


def views_of(config, images: feed.Feed) -> Views:
  """Returns a function whose call goes through f[N, 2, H, W, 3]: `config.monitor.pairs` as the network sees them.

  Of the batches of step 0 on, split over the devices; at least a few, for the figure.
  """
  least = -(-figures.PAIRS // images.mesh.size) * images.mesh.size
  batches = _pairs(images, config.monitor.pairs or min(least, config.batch_size), config.batch_size)
  prepare = jax.jit(lambda rows: images.prepare(rows)["views"], out_shardings=sharding.batched(images.mesh))
  return lambda: map(prepare, batches())


def shown(views: Views) -> np.ndarray:
  """Returns the first pairs that this process has, f32[n, 2, H, W, 3], for the figure; called by all processes."""
  shards = sorted(next(views()).addressable_shards, key=lambda shard: shard.index[0].start or 0)
  return np.concatenate([np.asarray(shard.data, np.float32) for shard in shards])[: figures.PAIRS]


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
