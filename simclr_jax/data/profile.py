"""The input alone, without a network: how fast it is, and what a chip would need of it."""

import math
import os
import statistics
import time

import jax
import jax.numpy as jnp

from simclr_jax.data import inputs
from simclr_jax.hardware import chips

SECONDS = 10.0
ROUNDS = 5


def run(
  images: inputs.Input, *, batch_size: int, flops_per_image: float, chip: str = "", mfu: float = 0.4
) -> dict[str, float | int | str]:
  """Prints and returns what the input delivers, and the host threads that one chip would need.

  Training takes `flops_per_image` model FLOPs. `chip` is the name of the chip to be fed ("": this machine's, if it is
  known), `mfu` the share of its peak that the training is expected to reach; plain Flax reached 0.4 on TPU v3.
  """
  target = chips.named(chip) if chip else chips.chip_of(jax.devices()[0])
  result = {"batch_size": batch_size}
  if isinstance(images, inputs.Streamed):
    rows, threads = images.batches(0), os.cpu_count()
    rate = _rate(lambda: next(rows), batch_size // jax.process_count())
    result |= {"images_per_second": rate, "threads": threads, "images_per_second_and_thread": rate / threads}
    each = f"{rate / threads:,.1f} pairs/s and thread ({threads} threads)"
    lines = [f"Input alone: {rate:,.0f} pairs/s on this host, {each}"]
  else:
    step = jax.jit(lambda dataset, number: images.prepare(images.batch_of(dataset, number)))
    numbers = iter(range(10**9))
    rate = _rate(lambda: jax.block_until_ready(step(images.dataset, jnp.int32(next(numbers)))), batch_size)
    result |= {"images_per_second": rate, "threads": 0}
    lines = [f"Input alone: {rate:,.0f} pairs/s on {images.mesh.size} devices; resident, no host thread takes part"]
  if target:
    needed = mfu * target.flops / flops_per_image
    result |= {"chip": target.name, "mfu": mfu, "chip_images_per_second": needed}
    giga = f"{flops_per_image / 1e9:,.1f} GFLOP a pair"
    lines.append(f"One {target.name} takes {needed:,.0f} pairs/s at {mfu:.0%} of its peak ({giga})")
    if isinstance(images, inputs.Streamed):
      result["threads_for_chip"] = math.ceil(needed / (rate / threads))
      lines.append(f"Threads like these to feed it: {result['threads_for_chip']:,}")
  else:
    lines.append(f"--chip=NAME says how many threads one needs: {', '.join(c.name for c in chips.CHIPS.values())}")
  print("\n".join(lines), flush=True)
  return result


def _rate(take, images: int) -> float:
  """Returns pairs/s, the median of several rounds after a warm-up."""
  begin = time.perf_counter()
  take()
  for _ in range(3):  # What was prepared ahead is gone then.
    take()
  once = max((time.perf_counter() - begin) / 4, 1e-4)
  count = max(2, int(SECONDS / ROUNDS / once))
  rates = []
  for _ in range(ROUNDS):
    begin = time.perf_counter()
    for _ in range(count):
      take()
    rates.append(images * count / (time.perf_counter() - begin))
  return statistics.median(rates)
