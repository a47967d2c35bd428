"""loss: time, memory and FLOP/s of the contrastive loss: dense, blockwise and other libraries', by batch size."""

import importlib.util
import multiprocessing
import pathlib
import statistics
from collections.abc import Sequence
from concurrent import futures

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import measure
from simclr_jax import losses

DIM = 128
TEMPERATURE = 0.1
# Share of the free memory that a timed loss may take.
MEMORY_SHARE = 0.6
# A loss that is expected to take longer, by the time of the previous size, is not timed.
MAX_SECONDS = 400


def run(batch_sizes: Sequence[int]) -> dict:
  """Prints the table and returns a row for each loss and batch size N, ascending, each on one device.

  Beyond the memory that is free the compiled figure alone is shown. lightly's NTXentLoss takes part on a CPU where
  torch and lightly are installed.
  """
  contestants = {name: _time_compiled(loss_fn) for name, loss_fn in LOSSES.items()}
  if importlib.util.find_spec("torch") and importlib.util.find_spec("lightly") and jax.default_backend() == "cpu":
    contestants["lightly"] = _time_in_a_process(time_lightly)
  result = {
    "what": "value and gradient of NT-Xent with its metrics, D = 128, float32, one device; temporaries in bytes",
    "flops_counted": "the matrix products alone, 6 (2N)^2 D for every loss",
    "rows": [],
  }
  columns = f"{'N':>6}  {'loss':<10}{'of dense':>10}{'time':>10}{'of dense':>10}{'memory':>12}{'GFLOP/s':>9}"
  measure.say(f"{result['what']}\n\n{columns}")
  previous = {}
  for n in sorted(batch_sizes):
    of_size = {}
    for name, row_of in contestants.items():
      row = {"n": n, "loss": name, **row_of(n, previous.get(name))}
      if "seconds" in row:
        row["flop_per_second"] = product_flops(n) / row["seconds"]
      # The expected time of the next size is extrapolated from the last size that was timed.
      previous[name] = row if "seconds" in row else previous.get(name)
      of_size[name] = row
      _add_ratios(row, of_size["dense"])
      result["rows"].append(row)
      measure.say(_line(row))
  result["headline"] = _headline(result["rows"])
  return result


def product_flops(n: int) -> int:
  """Returns the FLOPs of the matrix products that value and gradient need, elementwise work not counted.

  Three products of 2N x 2N x D for each of the losses here. Dense: the logits, and their gradient times the embeddings
  from both sides. Blockwise: the logits twice, and the complete coefficients times the embeddings once.
  """
  return 3 * 2 * (2 * n) ** 2 * DIM


def dense(z: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Returns loss and metrics of `losses.nt_xent` from all logits at once, as its definition reads."""
  n = z.shape[0]
  rows = losses.l2_normalized(z).swapaxes(0, 1).reshape(2 * n, DIM)
  logits = jnp.matmul(rows, rows.T, precision=jax.lax.Precision.HIGHEST) / TEMPERATURE
  logits = jnp.where(jnp.eye(2 * n, dtype=bool), -jnp.inf, logits)
  index = jnp.arange(2 * n)
  positive = (index + n) % (2 * n)
  # log_softmax would keep one more matrix, twice the memory.
  loss = jnp.mean(jax.nn.logsumexp(logits, axis=1) - logits[index, positive])
  logits = jax.lax.stop_gradient(logits)
  across = logits[:n, n:]
  p = jax.nn.softmax(across)
  return loss, {
    "contrast_acc": jnp.mean(jnp.argmax(across, axis=1) == index[:n]),
    "contrast_entropy": -jnp.mean(jnp.sum(p * jnp.log(p + 1e-8), axis=1)),
    "contrast_top1": jnp.mean(jnp.argmax(logits, axis=1) == positive),
  }


def blockwise(z: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Returns `losses.nt_xent` and its metrics."""
  return losses.nt_xent(z, temperature=TEMPERATURE)


def optax_ntxent(z: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Returns optax's loss, which has no metrics."""
  rows = z.reshape(-1, DIM)
  return optax.losses.ntxent(rows, jnp.arange(len(rows)) // 2, temperature=TEMPERATURE), {}


# Dense comes first because the others are compared with it.
LOSSES = {"dense": dense, "blockwise": blockwise, "optax": optax_ntxent}


def embeddings(n: int) -> np.ndarray:
  """Returns f32[N, 2, D] in which the views of an image are alike."""
  rng = np.random.default_rng(0)
  return (rng.normal(size=(n, 1, DIM)) + 0.5 * rng.normal(size=(n, 2, DIM))).astype(np.float32)


def time_lightly(n: int) -> tuple[list[float], int | None]:
  """Returns the seconds of each run of lightly's NTXentLoss, and by how many bytes its peak exceeds its inputs.

  The peak is read from Linux's /proc and is None elsewhere.
  """
  import torch  # lightly and torch are optional
  from lightly import loss as lightly_losses

  criterion = lightly_losses.NTXentLoss(temperature=TEMPERATURE)
  first, second = (torch.tensor(view, requires_grad=True) for view in embeddings(n).swapaxes(0, 1))

  def step():
    first.grad = second.grad = None
    criterion(first, second).backward()

  status, reset = pathlib.Path("/proc/self/status"), pathlib.Path("/proc/self/clear_refs")
  if not reset.exists():
    return measure.timed(step), None
  # A new process inherits its parent's peak, so that the growth of ru_maxrss would say nothing.
  reset.write_text("5")
  before = measure.kilobytes(status, "VmRSS")
  seconds = measure.timed(step)
  return seconds, 1024 * (measure.kilobytes(status, "VmHWM") - before)


def _time_compiled(loss_fn):
  """Returns row_of(n, previous row) for a loss of z f32[N, 2, D]."""

  def row_of(n, previous):
    shape = jax.ShapeDtypeStruct((n, 2, DIM), jnp.float32)
    compiled = jax.jit(jax.value_and_grad(loss_fn, has_aux=True)).lower(shape).compile()
    row = {"temporaries": compiled.memory_analysis().temp_size_in_bytes}
    reason = _reason_not_to_time(n, row["temporaries"], previous)
    if reason:
      return {**row, "not_timed": reason}
    z = jnp.asarray(embeddings(n))
    seconds = measure.timed(lambda: jax.block_until_ready(compiled(z)))
    return {**row, "seconds": statistics.median(seconds), "runs": len(seconds)}

  return row_of


def _time_in_a_process(function):
  """Returns row_of(n, previous row) for function(n) -> (seconds, peak bytes), which runs in a process of its own."""

  def row_of(n, previous):
    expected = previous.get("temporaries", 0) * (n / previous["n"]) ** 2 if previous else 0
    reason = _reason_not_to_time(n, expected, previous)
    if reason:
      return {"not_timed": reason}
    # Spawned, because a fork would inherit JAX's threads' locks.
    with futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
      try:
        seconds, peak = pool.submit(function, n).result()
      except ImportError as error:
        return {"not_timed": f"not timed: cannot be imported: {error}"}
      except futures.process.BrokenProcessPool:
        return {"not_timed": "not timed: its process was killed, probably for its memory"}
    row = {"seconds": statistics.median(seconds), "runs": len(seconds)}
    return row if peak is None else {"temporaries": peak, **row}

  return row_of


def _reason_not_to_time(n, temporaries, previous) -> str:
  available = measure.available_memory()
  if temporaries > MEMORY_SHARE * available:
    return f"not timed: more than {MEMORY_SHARE:.0%} of the {available / 1e9:.1f} GB that are free"
  expected = previous["seconds"] * (n / previous["n"]) ** 2 if previous else 0
  if expected > MAX_SECONDS:
    return f"not timed: would take about {expected:.0f} s"
  return ""


def _add_ratios(row: dict, dense_row: dict) -> None:
  for key in ("seconds", "temporaries"):
    if key in row and key in dense_row:
      row[f"{key}_of_dense"] = row[key] / dense_row[key]


def _headline(rows: list[dict]) -> dict:
  """Returns our ratios and time at the largest size at which both our loss and the dense one were timed."""
  ours = [row for row in rows if row["loss"] == "blockwise" and "seconds_of_dense" in row]
  keys = ("seconds_of_dense", "temporaries_of_dense", "seconds", "n")
  return {f"blockwise_{key}": ours[-1][key] for key in keys} if ours else {}


def _line(row: dict) -> str:
  def shown(key, form, factor=1.0, unit=""):
    return f"{factor * row[key]:{form}}{unit}" if key in row else "-"

  return (
    f"{row['n']:>6}  {row['loss']:<10}{shown('seconds_of_dense', '.2f'):>10}{shown('seconds', '.3f', unit=' s'):>10}"
    f"{shown('temporaries_of_dense', '.3f'):>10}{shown('temporaries', '.0f', 1e-6, ' MB'):>12}"
    f"{shown('flop_per_second', '.0f', 1e-9):>9}  {row.get('not_timed', '')}"
  ).rstrip()
