"""The real pretraining step on a network that compiles in seconds, for tests that take it in many ways."""

import functools
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from simclr_jax import optim
from simclr_jax.data import inputs
from simclr_jax.hardware import sharding
from simclr_jax.models import heads, layers, simclr
from simclr_jax.training import objectives, step
from simclr_jax.training import state as state_lib

WEIGHT_DECAY, LOSS_SCALE, TEMPERATURE = 1e-4, 2.0, 0.2
IMAGES = 48


class Encoder(nn.Module):
  """Convolutions and batch norms, few enough to compile quickly; one kernel is large enough to be sharded."""

  dtype: Any
  stages = ("conv1", "conv2")

  def stage_of(self, name: str) -> int:
    return int(name[-1]) - 1

  @nn.compact
  def __call__(self, images, *, train, after_stage=-1):
    make = layers.Layers(self.dtype, self.dtype)
    x = images
    for number, features in ((1, 32), (2, 64)):
      x = make.conv(features, 3, 2, name=f"conv{number}")(x)
      x = nn.relu(make.batch_norm(train=train and number - 1 > after_stage, name=f"bn{number}")(x))
      if after_stage == number - 1:
        x = jax.lax.stop_gradient(x)
    return x.mean(axis=(1, 2))


def network(dtype):
  types = {"dtype": dtype, "param_dtype": dtype}
  return simclr.SimCLR(Encoder(dtype), heads.ProjectionHead(2, 32, **types), heads.LinearHead(10, **types))


def rows(dtype):
  rng = np.random.default_rng(0)
  views = rng.random((IMAGES, 2, 16, 16, 3)).astype(dtype)
  return {"views": views, "label": rng.integers(0, 10, IMAGES, np.int32)}


def drawn(abstract):
  """Returns (params, batch_stats) drawn by NumPy: to compile an initialisation takes longer than the rest of a test."""
  params, batch_stats = abstract
  rng = np.random.default_rng(0)
  draw = lambda x: jax.device_put((0.1 * rng.normal(size=x.shape)).astype(x.dtype), x.sharding)
  return jax.tree.map(draw, params), jax.tree.map(
    lambda x: jax.device_put(jnp.ones(x.shape, x.dtype), x.sharding), batch_stats
  )


def start(model, mesh, *, sharded=False, optimizer="lars"):
  """Returns the state before the first step, its optimizer and schedule."""
  rate = optim.schedule(base_learning_rate=0.3, batch_size=256, scaling="linear", warmup_steps=0, total_steps=9)
  tx = optim.lars(rate, weight_decay=WEIGHT_DECAY) if optimizer == "lars" else optim.momentum(rate)
  params, batch_stats = drawn(state_lib.abstract_variables(model, 16, mesh, sharded=sharded))
  return state_lib.create(params, batch_stats, tx), tx, rate


def contrastive(model, mesh, *, optimizer="lars", **options):
  """Returns the objective of these tests; options are those of `objectives.Contrastive`."""
  known = {"temperature": TEMPERATURE, "scale": LOSS_SCALE, "mesh": mesh}
  return objectives.Contrastive(model, objectives.Decay(WEIGHT_DECAY, optimizer), **known | options)


def jitted(objective, mesh, state, tx, rate, *constants, micro_batches=1, sharded=False):
  """Returns the jitted step of an objective."""
  gather_params = sharding.gather_params(mesh) if sharded else objectives.as_it_is
  placement = objectives.Placement(mesh, micro_batches, gather_params)
  step_fn = functools.partial(step.train_step, objective=objective, tx=tx, schedule=rate, placement=placement)
  return inputs.jit_step(step_fn, mesh, state, *constants)


def one_step(devices, dtype, *, sharded=False, optimizer="lars", micro_batches=1, **options):
  """Returns the metrics of one step of pretraining on so many devices, and the state after it."""
  model, mesh = network(dtype), sharding.data_mesh(jax.devices()[:devices])
  assert mesh.size == devices
  state, tx, rate = start(model, mesh, sharded=sharded, optimizer=optimizer)
  objective = contrastive(model, mesh, optimizer=optimizer, **options)
  step_fn = jitted(objective, mesh, state, tx, rate, micro_batches=micro_batches, sharded=sharded)
  state, metrics = step_fn(state, sharding.global_batch(mesh, rows(dtype)))
  return jax.device_get((metrics, flax.serialization.to_state_dict(state)))
