"""Training of a linear classifier on an encoder, of which any part may learn along: what three jobs share."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from etils import epath

from simclr_jax import errors, figures, inference, optim
from simclr_jax.evaluation import features as evaluation
from simclr_jax.hardware import cost
from simclr_jax.jobs import feed, setup
from simclr_jax.models import simclr
from simclr_jax.training import checkpoint, telemetry
from simclr_jax.training import loop as training_loop
from simclr_jax.training import state as state_lib

SHOWN = {"train/loss": "loss", "train/accuracy": "accuracy"}


def supervised(logits: jax.Array, batch: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Returns the mean cross-entropy of logits f[N, K] and the batch's `label`, and the metrics `loss` and `accuracy`."""
  loss, accuracy = setup.cross_entropy(logits, batch["label"])
  return loss, {"loss": loss, "accuracy": accuracy}


def train_step(
  state: state_lib.TrainState,
  batch: dict[str, jax.Array],
  *constants: Any,
  model: simclr.Classifier,
  tx: optax.GradientTransformation,
  schedule: optax.Schedule,
  weight_decay: float,
  optimizer: str,
  loss_of: Callable[..., tuple[jax.Array, dict[str, jax.Array]]] = supervised,
  whole: Callable[[Any], Any] = lambda params: params,
  prepare: Callable[[Any], Any] = lambda batch: batch,
) -> tuple[state_lib.TrainState, dict[str, jax.Array]]:
  """Returns the state after one update, and the metrics before it.

  What the model freezes leaves as it came, bit for bit.

  Args:
    state: donated by the caller.
    batch: sharded over N; `label` i32[N], and what `prepare` needs.
    *constants: arrays that `loss_of` needs and no step changes.
    model: encoder and classifier.
    tx: the optimizer of the part that learns.
    schedule: the learning rate, for the metrics.
    weight_decay: for what the optimizer leaves to the loss; over the part that learns.
    optimizer: its name, which decides that.
    loss_of: (logits, batch, *constants) -> (loss, metrics).
    whole: makes parameters that are split over the devices whole on each.
    prepare: batch -> the same with `image` f32[N, H, W, 3] in [0, 1] or u8; the part of the augmentation that is done
      here.
  """
  batch = prepare(batch)

  def loss_fn(trained):
    variables = {"params": whole(simclr.merged(state.params, trained)), "batch_stats": state.batch_stats}
    logits, updates = model.apply(variables, batch["image"], train=True, mutable=["batch_stats"])
    loss, metrics = loss_of(logits, batch, *constants)
    decay = optim.weight_decay_loss(trained, weight_decay, optimizer=optimizer)
    return loss + decay, ({**metrics, "weight_decay": decay, "total_loss": loss + decay}, updates["batch_stats"])

  trained = simclr.trained_part(model, state.params)
  grads, (metrics, batch_stats) = jax.grad(loss_fn, has_aux=True)(trained)
  steps, opt_state = tx.update(grads, state.opt_state, trained)
  params = simclr.merged(state.params, optax.apply_updates(trained, steps))
  metrics |= {"learning_rate": schedule(state.step), "grad_norm": optax.tree.norm(grads)}
  return state.replace(step=state.step + 1, params=params, batch_stats=batch_stats, opt_state=opt_state), metrics


def train(
  config,
  recipe,
  workdir: str,
  *,
  job: str,
  train,
  held_out,
  classes: int,
  mesh: jax.sharding.Mesh,
  after_block: int,
  layer: int,
  frozen_head: bool = False,
  loss_of: Callable[..., tuple[jax.Array, dict[str, jax.Array]]] = supervised,
  constants_of: Callable[[], tuple[Any, ...]] = tuple,
  shown: dict[str, str] = SHOWN,
  result: dict[str, Any],
  profile_steps: str = "",
) -> dict[str, Any]:
  """Trains by `recipe` on what `config.checkpoint` names, and returns (and writes to `result.json`) accuracies.

  Args:
    config: the run's.
    recipe: its section of this job.
    workdir: of the run.
    job: its name.
    train: images to learn from.
    held_out: those to count on, with labels.
    classes: of the classifier.
    mesh: from `mesh_of`.
    after_block: what comes before is frozen, see `simclr.Classifier`.
    layer: of the projection head, which feeds the classifier; 0 is the encoder's h, which needs no such head.
    frozen_head: whether the projection head is frozen too.
    loss_of: see `train_step`.
    constants_of: makes its constants, once everything else is known to fit.
    shown: metric -> label, for the progress bar.
    result: what `result.json` says beside the accuracies.
    profile_steps: see `pretrain`.
  """
  pretrained = config.checkpoint not in ("", setup.RANDOM)
  if pretrained:
    setup.fits(config, config.checkpoint, head=bool(layer))
  # The reference starts the classifier at zero only on top of weights that were loaded.
  head = setup.linear_head_of(config, classes, zero_init=recipe.zero_init and bool(config.checkpoint))
  projection = setup.projection_head_of(config) if layer else None
  model = simclr.Classifier(inference.encoder_of(config.model), head, projection, layer, after_block, frozen_head)
  sizes = {"examples": train.num_examples, "batch_size": recipe.batch_size}
  tx, schedule, total_steps = setup.optimizer_of(recipe.optimizer, total_epochs=recipe.total_epochs, **sizes)
  images = feed.singles(
    config, train, mesh, batch_size=recipe.batch_size, min_area=recipe.min_area, key=f"{job}.batch_size"
  )
  profiled = setup.profiled_steps(profile_steps)
  constants = constants_of()
  state = _start(config, model, tx, mesh, pretrained)
  checkpoints = setup.checkpoints_of(config, workdir, job=job, classifier_layer=layer, **sizes)
  step_fn = functools.partial(
    train_step,
    model=model,
    tx=tx,
    schedule=schedule,
    weight_decay=recipe.optimizer.weight_decay,
    optimizer=recipe.optimizer.name,
    loss_of=loss_of,
    whole=setup.whole_of(config, mesh),
    prepare=images.prepare,
  )
  learning = simclr.trained_part(model, state.params)
  telemetry.log.info(
    "%s: %d images, %d classes, %d steps of %d, %s of %s parameters learn, %s",
    *(job, train.num_examples, classes, total_steps, recipe.batch_size),
    *(f"{state_lib.count(tree):,}" for tree in (learning, state.params)),
    setup.describe(mesh),
  )
  _, accuracies = training_loop.train(
    state,
    images.steps(step_fn, state, *constants),
    workdir=workdir,
    total_steps=total_steps,
    batch_size=recipe.batch_size,
    checkpoints=checkpoints,
    log_every_steps=config.log_every_steps,
    title=job,
    show=shown,
    flops_per_step=recipe.batch_size * flops_of_image(config, model, state),
    evaluate=_held_out_accuracy(model, setup.evaluation_rows(config, held_out), mesh),
    evaluate_every_steps=setup.every(recipe.evaluate_every_epochs, **sizes),
    profile_steps=profiled,
  )
  about = {"checkpoint": config.checkpoint, "steps": total_steps, "train_examples": train.num_examples}
  return _finish(workdir, job, {**accuracies, **about, **result})


def mesh_of(config, recipe, job: str) -> jax.sharding.Mesh:
  """Returns the mesh of all devices, once the batches of the recipe are known to fit them."""
  return setup.mesh_for(config, (f"{job}.batch_size", recipe.batch_size), ("eval_batch_size", config.eval_batch_size))


def after_block_of(config) -> int:
  """Returns `config.finetune.after_block`, once it is known to be one."""
  block = config.finetune.after_block
  if not -1 <= block <= 4:
    raise errors.UserError(
      f"config.finetune.after_block is {block}; use -1 (all learns), 0 (what follows the stem) or 1 to 4 (what follows "
      "that block group)."
    )
  return block


def flops_of_image(config, model: simclr.Classifier, state: state_lib.TrainState) -> int:
  """Returns the model FLOPs of a step for each image: three forward passes of what learns, one of what is frozen."""
  image = jax.ShapeDtypeStruct((1, config.data.image_size, config.data.image_size, 3), jnp.float32)
  variables = {"params": state.params, "batch_stats": state.batch_stats}
  learning = {tuple(path[:-1]) for path in optim.leaf_names(simclr.trained_part(model, state.params))}
  layers = cost.flops_by_module(model, variables, image, train=False)
  return sum(flops * (3 if path in learning else 1) for path, flops in layers.items())


def _start(config, model, tx, mesh, pretrained):
  params, batch_stats = state_lib.variables(
    model, config.data.image_size, config.seed, mesh, split=setup.is_split(config)
  )
  if pretrained:
    loaded = [{k: v for k, v in tree.items() if k != "linear_head"} for tree in (params, batch_stats)]
    parts, statistics = checkpoint.load_model(config.checkpoint, *loaded)
    params, batch_stats = {**params, **parts}, {**batch_stats, **statistics}
  return state_lib.create(params, batch_stats, tx, functools.partial(simclr.trained_part, model))


def _held_out_accuracy(model, rows, mesh):
  logits_of = lambda variables, images: model.apply(variables, images, train=False)

  def evaluate(state):
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    return {f"eval/{name}": v for name, v in evaluation.accuracy(logits_of, variables, rows(), mesh).items()}

  return evaluate


def _finish(workdir, job, result):
  if jax.process_index() == 0:
    folder = epath.Path(workdir)
    telemetry.write_json(str(folder / "result.json"), result)
    panels = {
      "Loss": {"train/loss": "training", "eval/loss": "cross-entropy, held out"},
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
