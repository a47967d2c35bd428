"""pretrain: SimCLR on images without labels; writes checkpoints that every other job reads.

Two augmented views of each image go through encoder and projection head; NT-Xent pulls them together and pushes all
other images of the global batch away. Where the images have labels, a linear classifier behind stop_gradient learns
along and shows how good the features are. Needs --config and --workdir. Killed or preempted, the same command continues
from the last checkpoint. --config.checkpoint=RUN starts from a run's weights, with a fresh optimizer at step 0.

--profile_steps=10,15 writes a profiler trace of these steps to DIR/profile. --profile_input runs the input pipeline
alone and says how many host threads it takes to feed a chip (--chip=v5e, --mfu=0.4 the share of its peak expected).
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from etils import epath

from simclr_jax import comparison, errors, experiment, figures, optim
from simclr_jax.data import inputs, profile
from simclr_jax.evaluation import baselines, monitor
from simclr_jax.hardware import sharding
from simclr_jax.models import simclr
from simclr_jax.training import loop, symptoms, telemetry
from simclr_jax.training import state as state_lib

Views = Callable[[], Iterator[jax.Array]]

CHANCE = "Contrastive loss (mean over 2N)"  # The panel that shows the loss of guessing too.


class Pairs(NamedTuple):
  """Functions whose calls go through some images by batches."""

  views: Views  # f[N, 2, H, W, 3].
  labels: Views  # i32[N], -1 without.


def run(
  config: ml_collections.ConfigDict,
  workdir: str,
  *,
  profile_steps: tuple[int, int] | None = None,
  profile_input: bool = False,
  chip: str = "",
  mfu: float = 0.4,
  draw: bool = True,
) -> dict[str, Any]:
  """Pretrains, and returns (and writes to `result.json`) what is measured at the end.

  Draws the figures, unless `draw` is False: a study has one for all its runs.
  """
  this = experiment.Experiment(config, "pretrain", workdir)
  config, train = this.config, this.train
  if train.num_examples < 2:
    raise errors.UserError(f"{train.name} has {train.num_examples} image, and the loss compares images; give more.")
  this.fit_batch(train.num_examples)
  if config.loss.kind == "sup_con" and not this.classes:
    raise errors.UserError("config.loss.kind sup_con attracts images of one label, and these have none; use nt_xent.")
  model = this.network.pretraining_model(this.classes)
  optimizer, images = this.optimizer(train.num_examples), this.pairs(train)
  objective = this.contrastive(model, images.prepare)
  if profile_input:
    state = state_lib.abstract(model, config.data.image_size, optimizer.tx, this.mesh, sharded=False)
    flops = this.network.passes * this.network.forward_flops(model, state)
    return profile.run(images, batch_size=config.batch_size, flops_per_image=flops, chip=chip, mfu=mfu)
  pairs, is_comparable = _pairs_of(this, images), _is_comparable(this)
  options = {"evaluate": _evaluate_of(this, model, pairs.views), "profile_steps": profile_steps}
  options["class_names"] = train.class_names if model.linear_head else ()
  state = this.state(model, optimizer.tx)
  flops = this.network.step_flops(this.network.forward_flops(model, state))
  facts = _facts(this, model, optimizer)
  watch = symptoms.Watch(facts, telemetry.log.warning)
  settings = this.run(objective, optimizer, train.num_examples, flops_per_step=flops, watch=watch, **options)
  telemetry.log.info(
    "pretrain: %d images, %d steps of %d, encoder %s parameters, %s",
    *(train.num_examples, optimizer.total_steps, config.batch_size),
    *(f"{state_lib.count(state.params['encoder']):,}", this.hardware),
  )
  step_fn = images.jit(this.step(objective, optimizer), state)
  state, result = loop.train(state, step_fn, images, settings)
  if config.checkpoint:
    result = {**result, "checkpoint": config.checkpoint}
  if "eval/knn_top1" in result:
    examples = int(result.get("eval/online_examples", this.held_out.num_examples))
    result = {**result, "eval/top1_interval": baselines.interval(result["eval/knn_top1"], examples)}
  telemetry.write_result(workdir, result)
  if is_comparable:
    result = {**result, **_compared(this, state)}
    telemetry.write_result(workdir, result)
  if draw:
    _draw(workdir, pairs, facts)
  return result


def _facts(this: experiment.Experiment, model: simclr.SimCLR, optimizer: experiment.Optimizer) -> symptoms.Facts:
  """Returns what the warnings of `symptoms` know of this run."""
  config, steps = this.config, optimizer.total_steps
  warmup = optim.warmup_steps(this.train.num_examples, config.optimizer.warmup_epochs, config.batch_size)
  chance = symptoms.chance_loss(config.loss.kind, config.batch_size, config.memory.size)
  classes = this.classes if model.linear_head else 0
  return symptoms.Facts(config.batch_size, chance, classes, settled=max(warmup, steps // 5))


def _evaluate_of(this: experiment.Experiment, model: simclr.SimCLR, views: Views) -> loop.Evaluate | None:
  """Returns state -> metrics, called by all processes alike, or None where there is nothing to measure.

  `eval/online_*` (accuracies, loss, examples) and `eval/knn_*top1` of the held-out split; `eval/alignment`,
  `eval/uniformity` of the projection z, and the effective ranks `eval/rank_h`, `eval/rank_z`. The same on any number
  of devices and processes, to rounding.
  """
  config, knobs, train = this.config, this.config.monitor, this.train
  parts = []
  if this.classes and this.has_held_out and (model.linear_head or knobs.knn_images):
    if this.held_out.num_classes:
      known = this.rows(train.sample(knobs.knn_images, config.seed)) if knobs.knn_images else None
      options = {"knn_neighbours": knobs.knn_neighbours, "classes": this.classes}
      options["gather_params"] = this.gather_params
      parts.append(monitor.held_out_accuracies(model, this.mesh, this.rows(this.held_out), known, **options))
    else:
      telemetry.log.info("%s has no labels: no online accuracy and no online kNN.", this.held_out.name)
  if knobs.pairs:
    parts.append(monitor.pair_geometry(model, this.mesh, views, knobs.pairs, this.gather_params))

  def evaluate(state):
    return {f"eval/{name}": value for part in parts for name, value in part(state.variables).items()}

  return evaluate if parts else None


def _is_comparable(this: experiment.Experiment) -> bool:
  """Returns whether `_compared` has what it needs; says what is missing."""
  if not this.config.baselines.train_images:
    return False
  if not this.classes:
    missing = "these images have no labels"
  elif not this.has_held_out or not this.held_out.num_classes:
    missing = "there are no held-out images with labels (--config.data.holdout=0.2 holds out a fifth)"
  else:
    return True
  telemetry.log.info("pretrain: %s: the encoder is not compared with baselines.", missing)
  return False


def _compared(this: experiment.Experiment, state: state_lib.TrainState) -> dict[str, Any]:
  """Returns what the encoder is worth beside baselines, by nearest neighbours; see `comparison.of_result`."""
  keys = this.config.monitor
  judge = comparison.neighbours_judge(this, this.classes, keys.knn_neighbours, monitor.KNN_TEMPERATURE)
  encode = this.applied(simclr.Representation(this.network.encoder()))
  own = {kind: {k: v for k, v in tree.items() if k == "encoder"} for kind, tree in state.variables.items()}
  return comparison.of_result(this, this.train, this.held_out, judge, encoder=(encode, own))


def _pairs_of(this: experiment.Experiment, images: inputs.Input) -> Pairs:
  """Returns `monitor.pairs` images as the network sees them.

  They are taken from the batches of step 0 on, split over the devices; at least a few, for the figure.
  """
  batch_size, mesh = this.config.batch_size, this.mesh
  least = -(-figures.PAIRS // mesh.size) * mesh.size
  count = this.config.monitor.pairs or min(least, batch_size)
  batches, rows = -(-count // batch_size), min(count, batch_size)
  sharding.check_divisible(rows, mesh, name="config.monitor.pairs")
  first = images.first_batches(batches, rows)
  prepare = jax.jit(lambda rows: images.prepare(rows)["views"], out_shardings=sharding.batched(mesh))
  return Pairs(lambda: map(prepare, first()), lambda: (rows["label"] for rows in first()))


def _own(x: jax.Array) -> np.ndarray:
  """Returns this process's rows of an array that is split over the devices."""
  shards = sorted(x.addressable_shards, key=lambda shard: shard.index[0].start or 0)
  return np.concatenate([np.asarray(shard.data) for shard in shards])


def _draw(workdir: str, pairs: Pairs, facts: symptoms.Facts) -> None:
  # On all processes: resident data is on the devices of all.
  views, classes = (_own(next(part())) for part in pairs)
  views = views.astype(np.float32)[figures.varied(classes, figures.PAIRS)]
  if jax.process_index():
    return
  panels = {
    CHANCE: {"train/loss": "training"},
    "Accuracy": {
      "train/contrast_acc": "contrastive (N-way)",
      "train/supervised_acc": "online head, training views",
      "eval/online_top1": "online head, held out",
      "eval/knn_top1": "nearest neighbours, held out",
    },
    "Learning rate": {"train/learning_rate": "schedule"},
    "Collapse watch: z on the sphere": {
      "eval/alignment": "alignment (distance of views)",
      "eval/uniformity": "uniformity (0: one point)",
    },
    "Collapse watch: effective rank": {"eval/rank_h": "of h, the encoder's", "eval/rank_z": "of z, the projection's"},
  }
  folder = epath.Path(workdir) / "figures"
  levels = {}
  if facts.chance is not None:
    levels[CHANCE] = {f"guessing: ln {math.exp(facts.chance):.0f} = {facts.chance:.2f}": facts.chance}
  path = str(folder / "curves.png")
  figures.curves(telemetry.read_rows(workdir), panels, path, title="Pretraining", levels=levels)
  figures.view_pairs(views, str(folder / "view_pairs.png"))
  telemetry.log.info("Checkpoints, metrics and figures: %s", workdir)
