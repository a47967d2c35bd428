"""pretrain: SimCLR on images without labels; writes checkpoints that every other job reads.

Two augmented views of each image go through encoder and projection head; NT-Xent pulls them together and pushes all
other images of the global batch away. Where the images have labels, a linear classifier behind stop_gradient learns
along and shows how good the features are. Needs --config and --workdir. Killed or preempted, the same command goes on
where the last checkpoint stands.
"""

import json

import jax
import numpy as np
import optax
from etils import epath

from simclr_jax import evaluation, figures, inference, losses, optim, telemetry
from simclr_jax import loop as training_loop
from simclr_jax import state as state_lib
from simclr_jax.data import host_augment
from simclr_jax.jobs import setup
from simclr_jax.models import simclr

SHOWN = {"train/loss": "loss", "train/contrast_acc": "contrast acc", "speed/images_per_second": "images/s"}


def train_step(
  state: state_lib.TrainState,
  batch: dict[str, jax.Array],
  *,
  model: simclr.SimCLR,
  tx: optax.GradientTransformation,
  schedule: optax.Schedule,
  mesh: jax.sharding.Mesh | None,
  temperature: float,
  normalize: bool,
  loss_scale: float,
  weight_decay: float,
  optimizer: str,
) -> tuple[state_lib.TrainState, dict[str, jax.Array]]:
  """Returns the state after one update, and the metrics before it.

  Args:
    state: donated by the caller.
    batch: `views` f32[N, 2, H, W, 3] in [0, 1], sharded over N; `label` i32[N].
    model: the network.
    tx: its optimizer.
    schedule: the learning rate, for the metrics.
    mesh: the devices that share the batch; None for one.
    temperature: of NT-Xent.
    normalize: whether embeddings are L2-normalised.
    loss_scale: factor on the paper's loss in what is optimised.
    weight_decay: for what the optimizer leaves to the loss (reference: supervised kernel under LARS, else everything
      but BatchNorm).
    optimizer: its name, which decides that.
  """
  images = batch["views"].reshape(-1, *batch["views"].shape[2:])  # [2N, H, W, 3], the views of an image adjacent.

  def loss_fn(params):
    variables = {"params": params, "batch_stats": state.batch_stats}
    # One pass over both views: BatchNorm's statistics are theirs together, and those of all devices.
    (_, z, logits), updates = model.apply(variables, images, train=True, mutable=["batch_stats"])
    loss, metrics = losses.nt_xent(
      z.reshape(-1, 2, z.shape[-1]), temperature=temperature, normalize=normalize, mesh=mesh
    )
    metrics |= {
      "loss": loss,
      "weight_decay": optim.weight_decay_loss(params, weight_decay, optimizer=optimizer),
    }
    total = loss_scale * loss + metrics["weight_decay"]
    if logits is not None:
      metrics["supervised_loss"], metrics["supervised_acc"] = setup.cross_entropy(logits, batch["label"].repeat(2))
      total += metrics["supervised_loss"]
    return total, ({**metrics, "total_loss": total}, updates["batch_stats"])

  grads, (metrics, batch_stats) = jax.grad(loss_fn, has_aux=True)(state.params)
  updates, opt_state = tx.update(grads, state.opt_state, state.params)
  metrics |= {"learning_rate": schedule(state.step), "grad_norm": optax.tree.norm(grads)}
  params = optax.apply_updates(state.params, updates)
  return state_lib.TrainState(state.step + 1, params, batch_stats, opt_state), metrics


def run(config, workdir: str) -> dict[str, float]:
  """Pretrains, and returns (and writes to `result.json`) the accuracy of the online head if there is one."""
  mesh = setup.mesh_for(config, ("batch_size", config.batch_size), ("eval_batch_size", config.eval_batch_size))
  train = setup.source_of(config, config.data.train_split)
  classes = train.num_classes if config.head.online else 0
  model = simclr.SimCLR(
    inference.encoder_of(config.model),
    setup.projection_head_of(config),
    setup.linear_head_of(config, classes),
  )
  tx, schedule, total_steps = setup.optimizer_of(
    config.optimizer,
    examples=train.num_examples,
    batch_size=config.batch_size,
    total_epochs=config.total_epochs,
    total_steps=config.total_steps,
  )
  sizes = {"examples": train.num_examples, "batch_size": config.batch_size}
  rows = setup.train_rows(config, train, views_of(config), batch_size=config.batch_size, key="batch_size")
  evaluate = _online_accuracy(config, model, mesh) if classes and config.data.eval_split else None
  checkpoints = setup.checkpoints_of(config, workdir, job="pretrain", **sizes)

  state = state_lib.create(*state_lib.variables(model, config.data.image_size, config.seed, mesh), tx)
  step_fn = setup.jitted(
    train_step,
    mesh,
    model=model,
    tx=tx,
    schedule=schedule,
    mesh=mesh,
    temperature=config.loss.temperature,
    normalize=config.loss.normalize,
    loss_scale=config.loss.scale,
    weight_decay=config.optimizer.weight_decay,
    optimizer=config.optimizer.name,
  )
  telemetry.log.info(
    "pretrain: %d images, %d steps of %d, encoder %s parameters, %s",
    train.num_examples,
    total_steps,
    config.batch_size,
    f"{state_lib.count(state.params['encoder']):,}",
    setup.describe(mesh),
  )
  _, result = training_loop.train(
    state,
    step_fn,
    rows,
    mesh=mesh,
    workdir=workdir,
    total_steps=total_steps,
    batch_size=config.batch_size,
    checkpoints=checkpoints,
    log_every_steps=config.log_every_steps,
    title="pretrain",
    show=SHOWN,
    evaluate=evaluate,
    evaluate_every_steps=setup.every(config.evaluate_every_epochs, **sizes),
  )
  return _finish(workdir, rows, result)


def views_of(config):
  """Returns the transform that makes two views of each image, by the reference's law and the config's knobs."""
  keys = config.augment
  return lambda image, seed: {
    "views": host_augment.two_views(
      image,
      seed,
      size=config.data.image_size,
      area=(keys.min_area, keys.max_area),
      flip=keys.flip,
      color_strength=keys.color_strength,
      brightness=keys.brightness,
      color_probability=keys.color_probability,
      grayscale_probability=keys.grayscale_probability,
      blur=keys.blur_probability > 0,
      blur_probability=keys.blur_probability,
    )
  }


def _online_accuracy(config, model, mesh):
  source = setup.source_of(config, config.data.eval_split)
  rows = setup.evaluation_rows(config, source)

  def evaluate(state):
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    logits_of = lambda variables, images: model.apply(variables, images, train=False)[2]
    return {f"eval/online_{k}": v for k, v in evaluation.accuracy(logits_of, variables, rows(), mesh).items()}

  return evaluate


def _finish(workdir, rows, result):
  if jax.process_index() == 0:
    folder = epath.Path(workdir)
    (folder / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    panels = {
      "NT-Xent loss (mean over 2N)": {"train/loss": "training"},
      "Accuracy": {
        "train/contrast_acc": "contrastive (N-way)",
        "train/supervised_acc": "online head, training views",
        "eval/online_top1": "online head, held out",
      },
      "Learning rate": {"train/learning_rate": "schedule"},
    }
    figures.curves(telemetry.read_rows(workdir), panels, str(folder / "figures" / "curves.png"), title="Pretraining")
    views = next(iter(rows(0)))["views"]
    figures.view_pairs(np.asarray(views), str(folder / "figures" / "view_pairs.png"))
    telemetry.log.info("Checkpoints, metrics and figures: %s", workdir)
  return result
