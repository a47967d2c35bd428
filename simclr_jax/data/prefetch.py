"""Batches on their way to the devices while these work: fetched and placed by a thread of its own."""

import queue
import threading
from collections.abc import Iterator
from typing import Any

import jax

from simclr_jax.hardware import sharding

# Placed batches that wait: one in use, one on its way, so that neither side ever waits for the other's jitter.
AHEAD = 2


def to_devices(rows: Iterator[Any], mesh: jax.sharding.Mesh, *, ahead: int = AHEAD) -> Iterator[Any]:
  """Yields the global batches of this process's rows, at most `ahead` of which wait on the devices.

  Close it (`contextlib.closing`) to stop its thread. What goes wrong there is raised here.
  """
  ready, stopped = queue.Queue(ahead), threading.Event()

  def put(item) -> bool:
    while not stopped.is_set():
      try:
        ready.put(item, timeout=0.1)
      except queue.Full:
        continue
      return True
    return False

  def work():
    try:
      for batch in rows:
        if not put((sharding.global_batch(mesh, batch), None)):
          return
      put((None, StopIteration()))
    except Exception as error:
      put((None, error))

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
