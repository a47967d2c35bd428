"""linear_eval: how good are frozen features? Trains a linear classifier on them and counts the held-out split once.

The reference's protocol (v1 appendix B.6): the encoder runs in inference mode and never changes, images are cropped and
flipped, the classifier learns with Nesterov momentum and a cosine rate. Needs --workdir and
--config.checkpoint=RUN, a pretraining run's workdir (or `random`: the encoder as it is initialised, the number to
beat). Without --config the run's own is used. Writes `result.json`, and a checkpoint with encoder and classifier.
"""

import functools
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from etils import epath

from simclr_jax import checkpoint, cost, errors, evaluation, figures, inference, optim, telemetry
from simclr_jax import loop as training_loop
from simclr_jax import state as state_lib
from simclr_jax.jobs import feature_eval, feed, setup
from simclr_jax.models import simclr

SHOWN = {"train/loss": "loss", "train/accuracy": "accuracy"}


def train_step(
  state: state_lib.TrainState,
  batch: dict[str, jax.Array],
  *,
  model: simclr.Classifier,
  tx: optax.GradientTransformation,
  schedule: optax.Schedule,
  frozen: bool,
  weight_decay: float,
  optimizer: str,
  whole: Callable[[Any], Any] = lambda params: params,
  prepare: Callable[[Any], Any] = lambda batch: batch,
) -> tuple[state_lib.TrainState, dict[str, jax.Array]]:
  """Returns the state after one update, and the metrics before it.

  Args:
    state: donated by the caller.
    batch: sharded over N; `label` i32[N], and what `prepare` needs.
    model: encoder and classifier.
    tx: the optimizer of the trainable part.
    schedule: the learning rate, for the metrics.
    frozen: train the classifier alone; the encoder's arrays leave as they came, bit for bit.
    weight_decay: for what the optimizer leaves to the loss.
    optimizer: its name, which decides that.
    whole: makes parameters that are split over the devices whole on each.
    prepare: batch -> the same with `image` f32[N, H, W, 3] in [0, 1] or u8; the part of the augmentation that is done
      here.
  """
  batch = prepare(batch)

  def loss_fn(trained):
    variables = {"params": whole({**state.params, **trained}), "batch_stats": state.batch_stats}
    logits, updates = model.apply(
      variables, batch["image"], train=True, frozen=frozen, mutable=[] if frozen else ["batch_stats"]
    )
    loss, accuracy = setup.cross_entropy(logits, batch["label"])
    total = loss + optim.weight_decay_loss(trained, weight_decay, optimizer=optimizer)
    return total, ({"loss": loss, "accuracy": accuracy, "total_loss": total}, updates)

  trained = trainable(state.params, frozen=frozen)
  grads, (metrics, updates) = jax.grad(loss_fn, has_aux=True)(trained)
  steps, opt_state = tx.update(grads, state.opt_state, trained)
  params = {**state.params, **optax.apply_updates(trained, steps)}
  batch_stats = updates.get("batch_stats", state.batch_stats)
  metrics |= {"learning_rate": schedule(state.step), "grad_norm": optax.tree.norm(grads)}
  return state_lib.TrainState(state.step + 1, params, batch_stats, opt_state), metrics


def trainable(params: dict[str, Any], *, frozen: bool) -> dict[str, Any]:
  """Returns the parts of the parameters that learn."""
  return {"linear_head": params["linear_head"]} if frozen else params


def run(config, workdir: str, *, profile_steps: str = "") -> dict[str, float]:
  """Returns the held-out accuracies of a linear classifier on the frozen encoder of `config.checkpoint`."""
  if not config.checkpoint:
    raise errors.UserError(
      "linear_eval has no encoder; give --config.checkpoint=RUN, the workdir of a pretraining run (or `random`)."
    )
  protocol = setup.choice("linear_eval.protocol", config.linear_eval.protocol, ("reference", "features"))
  if protocol == "features":
    if profile_steps:
      raise errors.UserError("--profile_steps is for linear_eval.protocol reference; features trains no network.")
    return feature_eval.run(config, workdir)
  return train_classifier(
    config, config.linear_eval, workdir, job="linear_eval", frozen=True, profile_steps=profile_steps
  )


def train_classifier(
  config, recipe, workdir: str, *, job: str, frozen: bool, profile_steps: str = ""
) -> dict[str, float]:
  """Trains a classifier on the encoder by `recipe`, and returns (and writes to `result.json`) held-out accuracies."""
  mesh = setup.mesh_for(config, (f"{job}.batch_size", recipe.batch_size), ("eval_batch_size", config.eval_batch_size))
  pretrained = config.checkpoint not in ("", setup.RANDOM)
  if pretrained:
    setup.fits(config.to_dict(), checkpoint.read_config(config.checkpoint), config.checkpoint)
  train, held_out = setup.labelled_splits(config, job)
  model = simclr.Classifier(
    inference.encoder_of(config.model),
    setup.linear_head_of(config, train.num_classes, zero_init=recipe.zero_init),
  )
  sizes = {"examples": train.num_examples, "batch_size": recipe.batch_size}
  tx, schedule, total_steps = setup.optimizer_of(recipe.optimizer, total_epochs=recipe.total_epochs, **sizes)
  images = feed.singles(
    config, train, mesh, batch_size=recipe.batch_size, min_area=recipe.min_area, key=f"{job}.batch_size"
  )
  profiled = setup.profiled_steps(profile_steps)
  checkpoints = setup.checkpoints_of(config, workdir, job=job, **sizes)

  params, batch_stats = state_lib.variables(
    model, config.data.image_size, config.seed, mesh, split=setup.is_split(config)
  )
  if pretrained:
    encoder, statistics = checkpoint.load_model(
      config.checkpoint, {"encoder": params["encoder"]}, {"encoder": batch_stats["encoder"]}
    )
    params, batch_stats = {**params, **encoder}, {**batch_stats, **statistics}
  state = state_lib.create(params, batch_stats, tx, functools.partial(trainable, frozen=frozen))
  step_fn = functools.partial(
    train_step,
    model=model,
    tx=tx,
    schedule=schedule,
    frozen=frozen,
    weight_decay=recipe.optimizer.weight_decay,
    optimizer=recipe.optimizer.name,
    whole=setup.whole_of(config, mesh),
    prepare=images.prepare,
  )
  evaluate = _held_out_accuracy(model, setup.evaluation_rows(config, held_out), mesh)
  telemetry.log.info(
    "%s: %d images, %d classes, %d steps of %d, %s",
    job,
    train.num_examples,
    train.num_classes,
    total_steps,
    recipe.batch_size,
    setup.describe(mesh),
  )
  _, result = training_loop.train(
    state,
    images.steps(step_fn, state),
    workdir=workdir,
    total_steps=total_steps,
    batch_size=recipe.batch_size,
    checkpoints=checkpoints,
    log_every_steps=config.log_every_steps,
    title=job,
    show=SHOWN,
    flops_per_step=_step_flops(config, model, state, recipe.batch_size, frozen=frozen),
    evaluate=evaluate,
    evaluate_every_steps=setup.every(recipe.evaluate_every_epochs, **sizes),
    profile_steps=profiled,
  )
  return _finish(workdir, job, {**result, "checkpoint": config.checkpoint, "steps": total_steps})


def _step_flops(config, model, state, batch_size: int, *, frozen: bool) -> int:
  """Returns the model FLOPs of one step: three forward passes, or about one where the encoder is frozen."""
  image = jax.ShapeDtypeStruct((1, config.data.image_size, config.data.image_size, 3), jnp.float32)
  variables = {"params": state.params, "batch_stats": state.batch_stats}
  forward = cost.matrix_flops(lambda v, x: model.apply(v, x, train=False), variables, image)
  return batch_size * forward * (1 if frozen else 3)


def _held_out_accuracy(model, rows, mesh):
  def evaluate(state):
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    logits_of = lambda variables, images: model.apply(variables, images, train=False)
    return {f"eval/{name}": v for name, v in evaluation.accuracy(logits_of, variables, rows(), mesh).items()}

  return evaluate


def _finish(workdir, job, result):
  if jax.process_index() == 0:
    folder = epath.Path(workdir)
    (folder / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    panels = {
      "Cross-entropy": {"train/loss": "training", "eval/loss": "held out"},
      "Top-1 accuracy": {"train/accuracy": "training batches", "eval/top1": "held out"},
    }
    figures.curves(telemetry.read_rows(workdir), panels, str(folder / "figures" / "curves.png"), title=job)
    telemetry.log.info(
      "%s: top-1 %.2f %%, top-5 %.2f %% of %d held-out images; %s",
      job,
      100 * result["eval/top1"],
      100 * result["eval/top5"],
      result["eval/examples"],
      folder / "result.json",
    )
  return result
