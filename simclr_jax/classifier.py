"""Training of a linear classifier on an encoder, of which any part may learn along: finetune, linear_eval, distill."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from simclr_jax import experiment, figures, optim
from simclr_jax.data import source
from simclr_jax.evaluation import baselines, scores
from simclr_jax.hardware import cost, sharding
from simclr_jax.models import simclr
from simclr_jax.training import checkpoint, loop, objectives, telemetry
from simclr_jax.training import state as state_lib


@dataclasses.dataclass(frozen=True)
class Task:
  """What a job trains on its recipe."""

  train: source.Source
  held_out: source.Source  # The images to count on, with labels.
  classes: int
  layer: int  # Of the projection head, which feeds the classifier; 0 is the encoder's h, which needs no such head.
  after_stage: int = -1  # Stages of the encoder up to this one are frozen; -1 none.
  frozen_head: bool = False  # Whether the projection head is frozen too.
  # (model, decay, prepare) -> a `Classification`, or a subclass.
  objective: Callable[..., objectives.Classification] = objectives.Classification
  # Makes the arrays of the step that no step changes, once everything else is known to fit.
  constants: Callable[[], tuple[Any, ...]] = tuple
  class_names: tuple[str, ...] = ()  # In the order of the outputs; empty takes those of the training images.
  # (top-1, examples) -> what this is worth, for `result.json`.
  compare: Callable[[float, int], dict[str, Any]] = lambda top1, examples: {}
  about: dict[str, Any] = dataclasses.field(default_factory=dict)  # For `result.json`, beside the accuracies.


def train(run: experiment.Experiment, task: Task, *, profile_steps: tuple[int, int] | None = None) -> dict[str, Any]:
  """Trains what `config.checkpoint` names by the job's recipe; returns (and writes to `result.json`) accuracies."""
  saved = run.saved(head=bool(task.layer)) if run.is_pretrained else None
  # The reference starts the classifier at zero only on top of weights that were loaded.
  head = run.network.linear_head(task.classes, zero_init=run.recipe.zero_init and bool(run.config.checkpoint))
  projection = run.network.projection_head() if task.layer else None
  encoder = run.network.encoder()
  model = simclr.Classifier(encoder, head, projection, task.layer, task.after_stage, task.frozen_head)
  examples = task.train.num_examples
  run.fit_batch(examples)
  optimizer, images = run.optimizer(examples), run.singles(task.train)
  constants = task.constants()
  weights = run.class_weights(task.train)
  objective = task.objective(model, run.decay, images.prepare, **({"class_weights": weights} if weights else {}))
  params, batch_stats = run.variables(model)
  if saved:
    loaded = [{k: v for k, v in tree.items() if k != "linear_head"} for tree in (params, batch_stats)]
    parts, statistics = saved.load(*loaded)
    params, batch_stats = {**params, **parts}, {**batch_stats, **statistics}
  state = state_lib.create(params, batch_stats, optimizer.tx, objective.trained)
  settings = run.run(
    objective,
    optimizer,
    examples,
    flops_per_step=run.recipe.batch_size * flops_of_image(run, model, state),
    evaluate=_held_out_accuracy(run, model, task.held_out),
    classifier_layer=task.layer,
    class_names=task.class_names or task.train.class_names,
    profile_steps=profile_steps,
  )
  telemetry.log.info(
    "%s: %d images, %d classes, %d steps of %d, %s of %s parameters learn, %s",
    *(run.job, examples, task.classes, optimizer.total_steps, run.recipe.batch_size),
    *(f"{state_lib.count(tree):,}" for tree in (objective.trained(state.params), state.params)),
    run.hardware,
  )
  step_fn = images.jit(run.step(objective, optimizer), state, *constants)
  _, accuracies = loop.train(state, step_fn, images, settings, constants)
  about = {"checkpoint": run.config.checkpoint, "steps": optimizer.total_steps, "train_examples": examples}
  return _finish(run, task, {**accuracies, **about, **task.about})


def store(
  run: experiment.Experiment, variables: Any, layer: int, dense: dict[str, np.ndarray], class_names: Sequence[str]
) -> None:
  """Writes a checkpoint of a frozen network (a tree of `params` and `batch_stats`) and a classifier of its features.

  They are the outputs of a layer of the projection head; the classifier is a `kernel` f[D, K] and a `bias` f[K].
  """
  step, head = jax.device_put((np.zeros((), np.int32), {"dense": dense}), sharding.replicated(run.mesh))
  params = {**variables["params"], "linear_head": head}
  state = state_lib.TrainState(step, params, variables["batch_stats"], opt_state=())
  about = {"every_steps": 0, "keep": 1, "classifier_layer": layer, "class_names": class_names}
  checkpoints = checkpoint.Checkpoints(run.workdir, run.config.to_dict(), **about)
  checkpoints.save(state, 0)
  checkpoints.close()


def flops_of_image(run: experiment.Experiment, model: simclr.Classifier, state: state_lib.TrainState) -> int:
  """Returns the model FLOPs of a step for each image: three forward passes of what learns, one of what is frozen."""
  learning = {tuple(path[:-1]) for path in optim.leaf_names(simclr.trained_part(model, state.params))}
  layers = cost.flops_by_module(model, state.variables, run.network.images(1), train=False)
  return sum(flops * (3 if path in learning else 1) for path, flops in layers.items())


def _held_out_accuracy(run, model, held_out) -> loop.Evaluate:
  gather_params, rows = run.gather_params, run.rows(held_out)

  def logits_of(variables, images):
    return model.apply({**variables, "params": gather_params(variables["params"])}, images, train=False)

  def evaluate(state):
    return {f"eval/{name}": v for name, v in scores.accuracy(logits_of, state.variables, rows(), run.mesh).items()}

  return evaluate


def _finish(run, task, result):
  if jax.process_index() == 0:
    panels = {
      "Loss": {"train/loss": "training", "eval/loss": "cross-entropy, held out"},
      "Top-1 accuracy": {
        "train/accuracy": "training batches",
        "eval/top1": "held out",
        "eval/balanced_top1": "held out, mean over the classes",
      },
    }
    curves = str(epath.Path(run.workdir) / "figures" / "curves.png")
    figures.curves(telemetry.read_rows(run.workdir), panels, curves, title=run.job)
    telemetry.log.info("%s: %s of %d held-out images", run.job, scores.shown(result), result["eval/examples"])
  own = result["eval/top1"], result["eval/examples"]
  result = {**result, "eval/top1_interval": baselines.interval(*own)}
  # Written before the comparison too, which takes a while.
  path = telemetry.write_result(run.workdir, result)
  if compared := task.compare(*own):
    result |= compared
    telemetry.write_result(run.workdir, result)
  telemetry.log.info("%s", path)
  return result
