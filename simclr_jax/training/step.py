"""One training step for every job: gradients of a whole batch, in micro-batches or at once, and the update."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from simclr_jax import optim
from simclr_jax.hardware import sharding
from simclr_jax.models import simclr
from simclr_jax.training import objectives
from simclr_jax.training import state as state_lib


def train_step(
  state: state_lib.TrainState,  # Donated by the caller.
  batch: objectives.Batch,  # Sharded over the leading axis N: `label` i32[N], and what `objective.prepare` needs.
  *constants: Any,  # Trees of arrays that the objective needs and no step changes.
  objective: objectives.Objective,
  tx: optax.GradientTransformation,  # Of the part that learns.
  schedule: optim.Schedule,  # For the metrics.
  placement: objectives.Placement,
) -> tuple[state_lib.TrainState, objectives.Metrics]:
  """Returns the state after one update, and the metrics before it. Frozen parameters and statistics keep their bits."""
  trained = objective.trained(state.params)
  gradients = _gradients if placement.micro_batches == 1 else _micro_batched_gradients
  grads, metrics, batch_stats = gradients(state, trained, batch, constants, objective, placement)
  norm = optax.tree.norm(grads)
  grads, metrics = objective.steadied(grads, metrics, schedule(state.step))
  updates, opt_state = tx.update(grads, state.opt_state, trained)
  params = simclr.merged(state.params, optax.apply_updates(trained, updates))
  batch_stats = simclr.merged(state.batch_stats, objective.moving(batch_stats))
  metrics |= {"learning_rate": schedule(state.step), "grad_norm": norm}
  after = state.replace(step=state.step + 1, params=params, batch_stats=batch_stats, opt_state=opt_state)

  def embed(embedded, params):
    variables = {"params": placement.gather_params(params), "batch_stats": state.batch_stats}
    return _in_parts(lambda rows: embedded(variables, rows), batch, placement)

  queue, of_queue = objective.after(state, after, embed, batch)
  return after.replace(memory=queue), metrics | of_queue


def _forward(state, trained, rows, totals, constants, objective, placement):
  params = placement.gather_params(simclr.merged(state.params, trained))
  variables = {"params": params, "batch_stats": state.batch_stats}
  return objective.forward(variables, rows, totals, placement.micro_batches, *constants)


def _gradients(state, trained, batch, constants, objective, placement):
  """Returns (gradients, metrics, new batch_stats) of a batch that goes through the network in one piece."""
  totals = objective.totals(batch, *constants)

  def loss_fn(trained):
    output = _forward(state, trained, batch, totals, constants, objective, placement)
    compared, metrics = (0, {}) if output.z is None else objective.compare(output.z, batch, state)
    metrics |= {**output.metrics, "weight_decay": objective.decay(trained)}
    total = compared + metrics["weight_decay"] + output.loss
    return total, ({**metrics, "total_loss": total}, output.batch_stats)

  grads, (metrics, batch_stats) = jax.grad(loss_fn, has_aux=True)(trained)
  return grads, metrics, batch_stats


def _micro_batched_gradients(state, trained, batch, constants, objective, placement):
  """Returns what `_gradients` does, holding the activations of one micro-batch at a time.

  Where the loss compares all images of the batch, they are embedded without gradients first, and the loss is
  differentiated at the embeddings of the whole batch; each micro-batch is then embedded again and takes its part of
  the cotangent back through the network (Gao et al. 2021, arXiv 2101.06983). BatchNorm takes its statistics over one
  micro-batch, the same in both passes; its moving averages move once, by the mean over the micro-batches.
  """
  count, totals = placement.micro_batches, objective.totals(batch, *constants)
  forward = lambda trained, rows: _forward(state, trained, rows, totals, constants, objective, placement)
  compared, metrics, cotangent = 0, {}, None
  first = jax.eval_shape(lambda: forward(trained, _part(batch, 0, placement)))
  if first.z is not None:
    z = _in_parts(lambda rows: forward(trained, rows).z, batch, placement)
    compare = lambda z: objective.compare(z, batch, state)
    (compared, metrics), cotangent = jax.value_and_grad(compare, has_aux=True)(z)
    cotangent = cotangent.reshape(-1, count, *cotangent.shape[1:])

  def back(number):
    def loss_fn(trained):
      output = forward(trained, _part(batch, number, placement))
      value = output.loss / count
      if output.z is not None:
        value = jnp.sum(cotangent[:, number] * output.z) + value
      return value, (output.loss, output.metrics, output.batch_stats)

    grads, means = jax.grad(loss_fn, has_aux=True)(trained)
    return grads, jax.tree.map(lambda x: x / count, means)

  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(back, 0))
  add = lambda total, number: (jax.tree.map(jnp.add, total, back(number)), None)
  (grads, (loss, means, batch_stats)), _ = jax.lax.scan(add, zeros, jnp.arange(count))
  decay, decay_grads = jax.value_and_grad(objective.decay)(trained)
  metrics = {**metrics, **means, "weight_decay": decay, "total_loss": compared + decay + loss}
  return jax.tree.map(jnp.add, grads, decay_grads), metrics, batch_stats


def _in_parts(embed, batch, placement):
  """Returns f[N, 2, D], the rows of `embed` of a batch, holding the activations of one micro-batch at a time."""
  count = placement.micro_batches
  if count == 1:
    return embed(batch)
  z = jax.lax.map(lambda number: embed(_part(batch, number, placement)), jnp.arange(count))
  z = z.swapaxes(0, 1)  # f[N / count, count, 2, D], the order of the batch.
  return z.reshape(-1, *z.shape[2:])


def _part(batch, number, placement):
  # Every `count`-th image, so that nothing moves between devices, and the parts do not depend on how many there are.
  rows = jax.tree.map(lambda x: x.reshape(-1, placement.micro_batches, *x.shape[1:])[:, number], batch)
  if placement.mesh is None:
    return rows
  return jax.lax.with_sharding_constraint(rows, sharding.batched(placement.mesh))
