"""A sign of life every second, on a terminal: bars that tick while the main thread waits, and a line between them.

Imports neither JAX nor TensorFlow.
"""

import contextlib
import logging
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any

from tqdm import auto as tqdm

SECONDS = 1.0
# 80 columns hold the numbers too.
FORMAT = "{desc} {percentage:3.0f}% {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"

log = logging.getLogger("simclr_jax")

# What the run is doing where no bar says so, and since when.
_phase = ["starting", 0.0]
# The line that shows it, while there is one.
_lines: list[tqdm.tqdm] = []


def doing(what: str) -> None:
  """Says what begins now, such as `compiling the probes`; shown with the seconds since."""
  _phase[:] = [what, time.monotonic()]


def bar(total: int, what: str, unit: str, **more: Any) -> tqdm.tqdm:
  """Returns a progress bar for 80 columns; none where the log has warnings only."""
  _clear()
  options = {"desc": what, "unit": unit, "bar_format": FORMAT, "dynamic_ncols": True, "smoothing": 0.1, **more}
  return tqdm.tqdm(total=total, disable=log.getEffectiveLevel() > logging.INFO, **options)


def counted(items: Iterable[Any], total: int, what: str, unit: str) -> Iterator[Any]:
  """Yields the items of a task that may take more than a second; its bar goes when it is done."""
  # Without a terminal a line for each task would be left.
  with bar(total, what, unit, leave=False, delay=SECONDS) if sys.stderr.isatty() else contextlib.nullcontext() as shown:
    for item in items:
      yield item
      if shown is not None:
        shown.update()


@contextlib.contextmanager
def alive() -> Iterator[None]:
  """Within it a thread redraws the bars every second, or a line with what `doing` says; nothing without a terminal."""
  if not sys.stderr.isatty():
    yield
    return
  over = threading.Event()
  doing("starting")
  thread = threading.Thread(target=_beat, args=(over,), name="progress", daemon=True)
  thread.start()
  try:
    yield
  finally:
    over.set()
    thread.join()


def _beat(over: threading.Event) -> None:
  while not over.wait(SECONDS):
    # tqdm's own list of the bars that are on the screen.
    bars = [shown for shown in list(tqdm.tqdm._instances) if shown not in _lines and not shown.disable]
    for shown in bars:
      shown.refresh()
    if not bars:
      what, since = _phase
      if not _lines:
        _lines.append(tqdm.tqdm(total=0, bar_format="{desc}", leave=False, dynamic_ncols=True))
      _lines[0].set_description_str(f"{what} ... {time.monotonic() - since:.0f} s")
  _clear()


def _clear() -> None:
  while _lines:
    _lines.pop().close()
