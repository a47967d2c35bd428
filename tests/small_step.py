"""The real pretraining step on a network that compiles in seconds, for tests that take it in many ways."""

from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from simclr_jax import optim
from simclr_jax.hardware import sharding
from simclr_jax.jobs import pretrain, setup
from simclr_jax.models import heads, layers, simclr
from simclr_jax.training import state as state_lib

WEIGHT_DECAY, LOSS_SCALE, TEMPERATURE = 1e-4, 2.0, 0.2
IMAGES = 48


class Encoder(nn.Module):
  """Convolutions and batch norms, few enough to compile quickly; one kernel is large enough to be split."""

  dtype: Any

  @nn.compact
  def __call__(self, images, *, train):
    make = layers.Layers(self.dtype, self.dtype)
    x = nn.relu(make.batch_norm(train=train, name="bn1")(make.conv(32, 3, 2, name="conv1")(images)))
    x = nn.relu(make.batch_norm(train=train, name="bn2")(make.conv(64, 3, 2, name="conv2")(x)))
    return x.mean(axis=(1, 2))


def network(dtype):
  types = {"dtype": dtype, "param_dtype": dtype}
  return simclr.SimCLR(Encoder(dtype), heads.ProjectionHead(2, 32, **types), heads.LinearHead(10, **types))


def rows(dtype):
  rng = np.random.default_rng(0)
  views = rng.random((IMAGES, 2, 16, 16, 3)).astype(dtype)
  return {"views": views, "label": rng.integers(0, 10, IMAGES, np.int32)}


def start(model, mesh, *, split=False, optimizer="lars"):
  """Returns the state before the first step, its optimizer and schedule."""
  rate = optim.schedule(base_learning_rate=0.3, batch_size=256, scaling="linear", warmup_steps=0, total_steps=9)
  tx = optim.lars(rate, weight_decay=WEIGHT_DECAY) if optimizer == "lars" else optim.momentum(rate)
  abstract = state_lib.abstract(model, 16, tx, mesh, split=split)
  # Drawn by NumPy: to compile the network's own initialisation takes longer than the rest of the test.
  rng = np.random.default_rng(0)
  draw = lambda x: jax.device_put((0.1 * rng.normal(size=x.shape)).astype(x.dtype), x.sharding)
  params = jax.tree.map(draw, abstract.params)
  batch_stats = jax.tree.map(lambda x: jax.device_put(jnp.ones(x.shape, x.dtype), x.sharding), abstract.batch_stats)
  return state_lib.create(params, batch_stats, tx), tx, rate


def jitted(model, mesh, state, tx, rate, *, micro_batches=1, split=False, loss_kind="nt_xent", optimizer="lars"):
  return setup.jitted(
    pretrain.train_step,
    mesh,
    state,
    model=model,
    tx=tx,
    schedule=rate,
    mesh=mesh,
    temperature=TEMPERATURE,
    normalize=True,
    loss_scale=LOSS_SCALE,
    weight_decay=WEIGHT_DECAY,
    optimizer=optimizer,
    loss_kind=loss_kind,
    micro_batches=micro_batches,
    whole=sharding.gathered(mesh) if split else lambda params: params,
  )


def step(devices, dtype, *, split=False, optimizer="lars", **options):
  """Returns the metrics of one step on so many devices, and the state after it."""
  model, mesh = network(dtype), sharding.data_mesh(jax.devices()[:devices])
  state, tx, rate = start(model, mesh, split=split, optimizer=optimizer)
  step_fn = jitted(model, mesh, state, tx, rate, split=split, optimizer=optimizer, **options)
  state, metrics = step_fn(state, sharding.global_batch(mesh, rows(dtype)))
  return jax.device_get((metrics, flax.serialization.to_state_dict(state)))
