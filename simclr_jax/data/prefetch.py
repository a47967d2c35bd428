"""Prefetching: a thread that reads batches and copies them to the devices while these compute."""

import contextlib
import queue
import threading
from collections.abc import Iterator
from typing import Any

import jax

from simclr_jax.hardware import sharding

# Batches on the devices that wait to be used. With two, a short delay on either side does not stall the other.
AHEAD = 2


def to_devices(rows: Iterator[Any], mesh: jax.sharding.Mesh, *, ahead: int = AHEAD) -> Iterator[Any]:
  """Yields global batches, sharded over the mesh, from this process's rows; at most `ahead` wait on the devices.

  Close the generator (`contextlib.closing`) to stop its thread. Exceptions of the thread are raised here.
  """
  ready, stopped = queue.Queue(ahead), threading.Event()

  def put(batch, error=None):
    while not stopped.is_set():
      with contextlib.suppress(queue.Full):
        ready.put((batch, error), timeout=0.1)
        return

  def work():
    try:
      for batch in rows:
        put(sharding.global_batch(mesh, batch))
        if stopped.is_set():
          return
      put(None, StopIteration())
    except Exception as error:
      put(None, error)

  thread = threading.Thread(target=work, name="prefetch", daemon=True)
  thread.start()
  try:
    while True:
      batch, error = ready.get()
      if isinstance(error, StopIteration):
        return
      if error is not None:
        raise error
      yield batch
  finally:
    stopped.set()
    thread.join()
