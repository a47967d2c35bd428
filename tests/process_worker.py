"""Computes CASES on the devices of all processes: python process_worker.py OUT.npz [HOST:PORT PROCESSES PROCESS]."""

import sys

import jax
import numpy as np
import small_step
from jax.experimental import multihost_utils

from simclr_jax import losses
from simclr_jax.hardware import sharding


def loss_case(kind, mesh, dtype):
  """Returns loss, gradient and metrics for 40 images in blocks of 16 columns."""
  rng = np.random.default_rng(0)
  batch = {
    "z": (rng.normal(size=(40, 1, 8)) + 0.5 * rng.normal(size=(40, 2, 8))).astype(dtype),
    "label": rng.integers(0, 12, 40).astype(np.int32),
  }
  batch = sharding.global_batch(mesh, jax.tree.map(own_rows, batch))

  def loss_fn(z, label):
    return losses.contrast(kind, z, label, temperature=0.2, mesh=mesh, block_size=16)

  (loss, metrics), grad = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(batch["z"], batch["label"])
  return {"loss": loss, "gradient": grad, **metrics}


def micro_batched_step(name, mesh, dtype):
  """Returns the metrics of a step in two micro-batches and the state after it, in float64 alone.

  In float32 the gradients of a network with batch norm differ by rounding alone.
  """
  if dtype == "float32":
    return {}
  model = small_step.network(np.float64)
  state, tx, rate = small_step.start(model, mesh)
  step = small_step.jitted(model, mesh, state, tx, rate, micro_batches=2)
  state, metrics = step(state, sharding.global_batch(mesh, jax.tree.map(own_rows, small_step.rows(np.float64))))
  kept = {"metrics": metrics, "params": state.params, "batch_stats": state.batch_stats}
  return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(kept)}


# Name -> function(name, mesh, dtype) that returns global arrays by name.
CASES = {**dict.fromkeys(losses.BLOCKWISE, loss_case), "micro-batches": micro_batched_step}


def own_rows(rows):
  """Returns this process's contiguous part of the rows."""
  return np.split(rows, jax.process_count())[jax.process_index()]


def results():
  """Returns every array of every case in both precisions as NumPy, the same on every process."""
  mesh, arrays = sharding.data_mesh(), {}
  for dtype in ("float64", "float32"):
    with jax.enable_x64(dtype == "float64"):
      for name, case in CASES.items():
        for key, value in case(name, mesh, dtype).items():
          arrays[f"{name}/{dtype}/{key}"] = multihost_utils.process_allgather(value, tiled=True)
  return arrays


if __name__ == "__main__":
  out, *together = sys.argv[1:]
  if together:
    jax.distributed.initialize(together[0], int(together[1]), int(together[2]))
  np.savez(out, **results())
