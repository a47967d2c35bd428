"""pretrain: SimCLR on images without labels; writes checkpoints that every other job reads.

Two augmented views of each image go through encoder and projection head; NT-Xent pulls them together and pushes all
other images of the global batch away. Where the images have labels, a linear classifier behind stop_gradient learns
along and shows how good the features are. Needs --config and --workdir. Killed or preempted, the same command goes on
where the last checkpoint stands.

--profile_steps=10,15 writes a profiler trace of these steps to DIR/profile. --profile_input runs the input pipeline
alone and says how many host threads it takes to feed a chip (--chip=v5e, --mfu=0.4 the share of its peak expected).
"""

import dataclasses
import functools
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from etils import epath

from simclr_jax import errors, figures, inference, losses, optim
from simclr_jax.hardware import cost, sharding
from simclr_jax.jobs import feed, input_profile, monitor, setup
from simclr_jax.losses import negatives as memory_lib
from simclr_jax.models import simclr
from simclr_jax.training import loop as training_loop
from simclr_jax.training import state as state_lib
from simclr_jax.training import telemetry

SHOWN = {"train/loss": "loss", "train/contrast_acc": "contrast acc"}


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
  loss_kind: str = "nt_xent",
  margin: float = 0.8,
  memory_decay: float = 0.999,
  micro_batches: int = 1,
  whole: Callable[[Any], Any] = lambda params: params,
  prepare: Callable[[Any], Any] = lambda batch: batch,
) -> tuple[state_lib.TrainState, dict[str, jax.Array]]:
  """Returns the state after one update, and the metrics before it.

  Args:
    state: donated by the caller.
    batch: sharded over N; `label` i32[N], and what `prepare` needs.
    model: the network.
    tx: its optimizer.
    schedule: the learning rate, for the metrics.
    mesh: the devices that share the batch; None for one.
    temperature: of the loss.
    normalize: whether embeddings are L2-normalised.
    loss_scale: factor on the paper's loss in what is optimised.
    weight_decay: for what the optimizer leaves to the loss (reference: supervised kernel under LARS, else everything
      but BatchNorm).
    optimizer: its name, which decides that.
    loss_kind: one of `losses.KINDS`.
    margin: of its margin losses.
    memory_decay: of the moving average of the weights that embed older batches, where the state has a memory.
    micro_batches: parts of the batch that go through the network one after the other. The contrastive gradient stays
      that of the whole batch; BatchNorm takes its statistics over one part, see `_micro_batched_gradients`.
    whole: makes parameters that are split over the devices whole on each.
    prepare: rows of the batch -> the same with `views` f[n, 2, H, W, 3] in [0, 1]; the part of the augmentation that is
      done here, on one micro-batch at a time.
  """

  older = {}
  if state.memory is not None:
    rows = memory_lib.filled(state.memory, state.step, 2 * batch["label"].shape[0])
    older = {"memory": state.memory["buffer"], "filled": rows}

  def contrast(z):
    keys = {"temperature": temperature, "normalize": normalize, "margin": margin, "mesh": mesh}
    value, metrics = losses.contrast(loss_kind, z, batch["label"], **keys, **older)
    return loss_scale * value, {**metrics, "loss": value}

  def network(params, batch):
    # One pass over both views: BatchNorm's statistics are theirs together, and those of all devices.
    views = prepare(batch)["views"]
    images = views.reshape(-1, *views.shape[2:])  # [2N, H, W, 3], the views of an image adjacent.
    variables = {"params": params, "batch_stats": state.batch_stats}
    (_, z, logits), updates = model.apply(variables, images, train=True, mutable=["batch_stats"])
    supervised = {}
    if logits is not None:
      names = ("supervised_loss", "supervised_acc")
      supervised = dict(zip(names, setup.cross_entropy(logits, batch["label"].repeat(2)), strict=True))
    return z.reshape(-1, 2, z.shape[-1]), supervised, updates["batch_stats"]

  decay = functools.partial(optim.weight_decay_loss, weight_decay=weight_decay, optimizer=optimizer)
  if micro_batches == 1:
    parts = _gradients(network, contrast, decay, state.params, batch, whole)
  else:
    parts = _micro_batched_gradients(network, contrast, decay, state.params, batch, whole, micro_batches, mesh)
  grads, metrics, batch_stats = parts
  updates, opt_state = tx.update(grads, state.opt_state, state.params)
  metrics["total_loss"] = loss_scale * metrics["loss"] + metrics["weight_decay"] + metrics.get("supervised_loss", 0)
  metrics |= {"learning_rate": schedule(state.step), "grad_norm": optax.tree.norm(grads)}
  params = optax.apply_updates(state.params, updates)
  memory = state.memory
  if memory is not None:
    metrics["memory_filled"] = older["filled"] / memory["buffer"].shape[0]
    embed = functools.partial(_embeddings_for_memory, state, model=model, whole=whole, prepare=prepare)
    z = _in_parts(embed, batch, micro_batches, mesh)
    z = losses.l2_normalized(z) if normalize else z
    memory = memory_lib.after(memory, state.step, z, params, decay=memory_decay, mesh=mesh)
  return state_lib.TrainState(state.step + 1, params, batch_stats, opt_state, memory), metrics


def _embeddings_for_memory(state, batch, *, model, whole, prepare):
  """Returns f32[N, 2, D]: a batch, or a part of it, embedded by the memory's weights in BatchNorm's training mode."""
  views = prepare(batch)["views"]
  variables = {"params": whole(state.memory["params"]), "batch_stats": state.batch_stats}
  network = model.clone(linear_head=None)
  # The moving averages that come out are dropped: nothing ever runs these weights in inference mode.
  (_, z, _), _ = network.apply(variables, views.reshape(-1, *views.shape[2:]), train=True, mutable=["batch_stats"])
  return z.reshape(-1, 2, z.shape[-1]).astype(state.memory["buffer"].dtype)


def _in_parts(embed, batch, count, mesh):
  """Returns f[N, 2, D], the rows of `embed` of a batch, holding the activations of one micro-batch at a time."""
  if count == 1:
    return embed(batch)
  z = jax.lax.map(lambda number: embed(_part(batch, number, count, mesh)), jnp.arange(count))
  z = z.swapaxes(0, 1)  # f[N / count, count, 2, D], the order of the batch.
  return z.reshape(-1, *z.shape[2:])


def _part(batch, number, count, mesh):
  # Every `count`-th image, so that nothing moves between devices, and the parts do not depend on how many there are.
  rows = jax.tree.map(lambda x: x.reshape(-1, count, *x.shape[1:])[:, number], batch)
  return rows if mesh is None else jax.lax.with_sharding_constraint(rows, sharding.batched(mesh))


def _gradients(network, contrast, decay, params, batch, whole):
  """Returns (gradients, metrics, new batch_stats) of a batch that goes through the network in one piece."""

  def loss_fn(params):
    z, supervised, batch_stats = network(whole(params), batch)
    value, metrics = contrast(z)
    metrics |= {**supervised, "weight_decay": decay(params)}
    return value + metrics["weight_decay"] + supervised.get("supervised_loss", 0), (metrics, batch_stats)

  grads, (metrics, batch_stats) = jax.grad(loss_fn, has_aux=True)(params)
  return grads, metrics, batch_stats


def _micro_batched_gradients(network, contrast, decay, params, batch, whole, count, mesh):
  """Returns what `_gradients` does, holding the activations of one micro-batch at a time.

  Everything is embedded without gradients, the loss is differentiated at the embeddings of the whole batch, and each
  micro-batch is embedded again to take its part of that gradient back through the network (Gao et al. 2021,
  arXiv 2101.06983). BatchNorm sees one micro-batch, the same in both passes; its moving averages move once, by the
  mean over the micro-batches.
  """
  z = _in_parts(lambda rows: network(whole(params), rows)[0], batch, count, mesh)
  pull, metrics = jax.grad(contrast, has_aux=True)(z)
  pull = pull.reshape(-1, count, *pull.shape[1:])

  def back(number):
    def loss_fn(params):
      z, supervised, batch_stats = network(whole(params), _part(batch, number, count, mesh))
      value = jnp.sum(pull[:, number] * z) + supervised.get("supervised_loss", 0) / count
      return value, (supervised, batch_stats)

    grads, means = jax.grad(loss_fn, has_aux=True)(params)
    return grads, jax.tree.map(lambda x: x / count, means)

  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(back, 0))
  add = lambda total, number: (jax.tree.map(jnp.add, total, back(number)), None)
  (grads, (supervised, batch_stats)), _ = jax.lax.scan(add, zeros, jnp.arange(count))
  metrics["weight_decay"], decay_grads = jax.value_and_grad(decay)(params)
  return jax.tree.map(jnp.add, grads, decay_grads), {**metrics, **supervised}, batch_stats


def run(
  config,
  workdir: str,
  *,
  profile_steps: str = "",
  profile_input: str = "",
  chip: str = "",
  mfu: str = "0.4",
  draw: bool = True,
  programs: dict | None = None,
) -> dict[str, float] | None:
  """Pretrains, and returns (and writes to `result.json`) what `monitor` measures at the end; draws the figures.

  Args:
    config: the run's.
    workdir: its folder.
    profile_steps, profile_input, chip, mfu: options of the command line.
    draw: leave the figures out where False, as a study does, which has one for all its runs.
    programs: steps of earlier runs of this process, by what they depend on; this run takes its own from there if it
      can, rather than to trace it again, and leaves it there alone.
  """
  mesh = mesh_of(config)
  train = setup.source_of(config, config.data.train_split)
  if config.loss.kind == "sup_con" and not train.num_classes:
    raise errors.UserError("config.loss.kind sup_con attracts images of one label, and these have none; use nt_xent.")
  model, tx, schedule, total_steps = parts_of(config, examples=train.num_examples, classes=train.num_classes)
  images = feed.pairs(config, train, mesh)
  if profile_input:
    forward = forward_flops(config, model, state_lib.abstract(model, config.data.image_size, tx, mesh, split=False))
    flops = passes(config) * forward
    return input_profile.run(images, batch_size=config.batch_size, flops_per_image=flops, chip=chip, mfu=mfu)
  sizes = {"examples": train.num_examples, "batch_size": config.batch_size}
  views = monitor.views_of(config, images)
  evaluate = monitor.evaluate_of(config, model, mesh, train, views)
  profiled = setup.profiled_steps(profile_steps)
  checkpoints = setup.checkpoints_of(config, workdir, job="pretrain", **sizes)

  split = setup.is_split(config)
  state = state_lib.create(*state_lib.variables(model, config.data.image_size, config.seed, mesh, split=split), tx)
  state = with_memory(config, model, state)
  telemetry.log.info(
    "pretrain: %d images, %d steps of %d, encoder %s parameters, %s",
    train.num_examples,
    total_steps,
    config.batch_size,
    f"{state_lib.count(state.params['encoder']):,}",
    setup.describe(mesh),
  )
  steps = images.steps(step_of(config, model, tx, schedule, mesh, images.prepare), state)
  if programs is not None:
    steps = _shared(steps, feed.step_depends_on(config), programs)
  _, result = training_loop.train(
    state,
    steps,
    workdir=workdir,
    total_steps=total_steps,
    batch_size=config.batch_size,
    checkpoints=checkpoints,
    log_every_steps=config.log_every_steps,
    title="pretrain",
    show=SHOWN,
    flops_per_step=step_flops(config, forward_flops(config, model, state)),
    evaluate=evaluate,
    evaluate_every_steps=setup.every(config.evaluate_every_epochs, **sizes),
    profile_steps=profiled,
  )
  return _finish(workdir, views, result, draw)


def _shared(steps, depends_on: str, programs: dict):
  """Returns the steps with the jitted function of `programs` that is theirs, and makes it the only one there."""
  step_fn = programs.get(depends_on, steps.step_fn)
  programs.clear()
  programs[depends_on] = step_fn
  return dataclasses.replace(steps, step_fn=step_fn)


def forward_flops(config, model, state) -> int:
  """Returns the matrix FLOPs of both views of one image on their way through encoder and heads.

  Args:
    config: the run's.
    model: the network.
    state: its variables, or their shapes.
  """
  views = jax.ShapeDtypeStruct((2, config.data.image_size, config.data.image_size, 3), jnp.float32)
  variables = {"params": state.params, "batch_stats": state.batch_stats}
  return cost.matrix_flops(lambda v, x: model.apply(v, x, train=False), variables, views)


def passes(config) -> int:
  """Returns the passes of a batch through the network: forward, backward twice that, forward by a memory's weights."""
  return 4 if config.memory.size else 3


def step_flops(config, forward: int) -> int:
  """Returns the model FLOPs of one step: what both views of an image and all pairs of the batch need.

  With a memory its forward pass counts (as a whole one, classifier included) and the products with what it holds.
  """
  # Every pair of views is scored once forward; the gradient takes two more products of that size. Nothing flows back
  # into a memory, which spares one of them.
  views = 2 * config.batch_size
  pairs = 2 * views * config.head.out_dim * (3 * views + 2 * config.memory.size)
  return passes(config) * forward * config.batch_size + pairs


def with_memory(config, model, state: state_lib.TrainState) -> state_lib.TrainState:
  """Returns the state, arrays or placed shapes alike, with a memory if `config.memory.size` asks for one."""
  if not config.memory.size:
    return state
  views = jax.ShapeDtypeStruct((2, config.data.image_size, config.data.image_size, 3), jnp.float32)
  variables = {"params": state.params, "batch_stats": state.batch_stats}
  embedding = jax.eval_shape(lambda v, x: model.apply(v, x, train=False)[1], variables, views)
  make = memory_lib.create if isinstance(state.step, jax.Array) else memory_lib.shapes
  return state.replace(memory=make(state.params, embedding, config.memory.size))


def mesh_of(config, devices=None) -> jax.sharding.Mesh:
  """Returns the mesh of the devices (default: all), once what the config says of it is known to fit."""
  setup.choice("loss.kind", config.loss.kind, losses.KINDS)
  memory_lib.check(config.memory.size, config.memory.decay, batch_size=config.batch_size, kind=config.loss.kind)
  sizes = (("batch_size", config.batch_size), ("eval_batch_size", config.eval_batch_size))
  return setup.mesh_for(config, *sizes, devices=devices, micro_batches=config.micro_batches)


def parts_of(config, *, examples: int, classes: int):
  """Returns (model, optimizer, schedule, steps of the run) for a training split of so many images and classes."""
  model = simclr.SimCLR(
    inference.encoder_of(config.model),
    setup.projection_head_of(config),
    setup.linear_head_of(config, classes if config.head.online else 0),
  )
  return model, *setup.optimizer_of(
    config.optimizer,
    examples=examples,
    batch_size=config.batch_size,
    total_epochs=config.total_epochs,
    total_steps=config.total_steps,
  )


def step_of(config, model, tx, schedule, mesh, prepare):
  """Returns `train_step` as (state, batch) -> (state, metrics), not jitted yet."""
  return functools.partial(
    train_step,
    model=model,
    tx=tx,
    schedule=schedule,
    mesh=mesh,
    temperature=config.loss.temperature,
    normalize=config.loss.normalize,
    loss_scale=config.loss.scale,
    weight_decay=config.optimizer.weight_decay,
    optimizer=config.optimizer.name,
    loss_kind=config.loss.kind,
    margin=config.loss.margin,
    memory_decay=config.memory.decay,
    micro_batches=config.micro_batches,
    whole=setup.whole_of(config, mesh),
    prepare=prepare,
  )


def _finish(workdir, views, result, draw):
  folder = epath.Path(workdir)
  if jax.process_index() == 0:
    (folder / "result.json").write_text(json.dumps(result, indent=2) + "\n")
  # By all processes: resident data is on the devices of all.
  pairs = monitor.shown(views) if draw else None
  if jax.process_index() == 0 and draw:
    panels = {
      "Contrastive loss (mean over 2N)": {"train/loss": "training"},
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
    figures.curves(telemetry.read_rows(workdir), panels, str(folder / "figures" / "curves.png"), title="Pretraining")
    figures.view_pairs(pairs, str(folder / "figures" / "view_pairs.png"))
    telemetry.log.info("Checkpoints, metrics and figures: %s", workdir)
  return result
