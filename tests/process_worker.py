"""Computes CASES on the devices of all processes: python process_worker.py OUT.npz [HOST:PORT PROCESSES PROCESS]."""

import sys

import jax
import numpy as np
import small_step
from jax.experimental import multihost_utils

from simclr_jax import losses
from simclr_jax.hardware import sharding


def every_loss(mesh, dtype):
  """Returns loss, gradient and metrics of each kind for 40 images in blocks of 16 columns, from one program."""
  rng = np.random.default_rng(0)
  batch = {
    "z": (rng.normal(size=(40, 1, 8)) + 0.5 * rng.normal(size=(40, 2, 8))).astype(dtype),
    "label": rng.integers(0, 12, 40).astype(np.int32),
  }
  batch = sharding.global_batch(mesh, jax.tree.map(own_rows, batch))

  @jax.jit
  def evaluate(z, label):
    found = {}
    for kind in losses.BLOCKWISE:
      loss_of = lambda z, kind=kind: losses.contrast(kind, z, label, temperature=0.2, mesh=mesh, block_size=16)
      (loss, metrics), gradient = jax.value_and_grad(loss_of, has_aux=True)(z)
      found[kind] = {"loss": loss, "gradient": gradient, **metrics}
    return found

  return evaluate(batch["z"], batch["label"])


def micro_batched_step(mesh, dtype):
  """Returns the metrics of a step in two micro-batches and the state after it, in float64 alone.

  In float32 the gradients of a network with batch norm differ by rounding alone.
  """
  if dtype == "float32":
    return {}
  model = small_step.network(np.float64)
  state, tx, rate = small_step.start(model, mesh)
  step_fn = small_step.jitted(small_step.contrastive(model, mesh), mesh, state, tx, rate, micro_batches=2)
  state, metrics = step_fn(state, sharding.global_batch(mesh, jax.tree.map(own_rows, small_step.rows(np.float64))))
  return {"metrics": metrics, "params": state.params, "batch_stats": state.batch_stats}


# Name -> function(mesh, dtype) that returns a tree of global arrays.
CASES = {"losses": every_loss, "micro-batches": micro_batched_step}


def own_rows(rows):
  """Returns this process's contiguous part of the rows."""
  return np.split(rows, jax.process_count())[jax.process_index()]


def results():
  """Returns every array of every case in both precisions as NumPy, the same on every process."""
  mesh, arrays = sharding.data_mesh(), {}
  for dtype in ("float64", "float32"):
    with jax.enable_x64(dtype == "float64"):
      for name, case in CASES.items():
        for path, value in jax.tree_util.tree_leaves_with_path(case(mesh, dtype)):
          whole = multihost_utils.process_allgather(value, tiled=True)
          arrays[f"{name}/{dtype}/{jax.tree_util.keystr(path)}"] = whole
  return arrays


if __name__ == "__main__":
  out, *together = sys.argv[1:]
  if together:
    jax.distributed.initialize(together[0], int(together[1]), int(together[2]))
  np.savez(out, **results())
