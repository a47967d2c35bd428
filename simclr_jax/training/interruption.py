"""SIGTERM and Ctrl-C: the loop saves and stops at the next step, the same one on all processes."""

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils

# What a shell reports for a process that a signal ended; a supervisor starts the same command again after SIGTERM.
CODES = {signal.SIGTERM: 128 + signal.SIGTERM, signal.SIGINT: 128 + signal.SIGINT}
NAMES = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}

Stop = signal.Signals | None


class Preempted(SystemExit):
  """A signal asked for the end, the state is saved; the same command continues the run. Its code is one of CODES."""


@contextlib.contextmanager
def notice() -> Iterator[Callable[[int], Stop]]:
  """Yields step -> the signal that asks to stop after it, or None; outside, signals keep their effect.

  A second Ctrl-C ends the process at once. In one of several processes only SIGTERM is noticed, by jax.distributed,
  which lets all stop after the same step.
  """
  if jax.process_count() > 1:
    yield lambda step: signal.SIGTERM if multihost_utils.reached_preemption_sync_point(step) else None
    return
  received: list[signal.Signals] = []
  with contextlib.ExitStack() as stack:
    previous = {number: signal.signal(number, lambda n, _: received.append(signal.Signals(n))) for number in CODES}
    stack.enter_context(_watching())
    try:
      yield lambda step: received[0] if received else None
    finally:
      for number, handler in previous.items():
        signal.signal(number, handler)
      # A caller that runs one training after the other has a handler of its own.
      if signal.SIGTERM in received and callable(previous[signal.SIGTERM]):
        previous[signal.SIGTERM](signal.SIGTERM, None)


@contextlib.contextmanager
def _watching() -> Iterator[None]:
  """Answers signals at once, from a thread: Python's handlers wait until a compilation is over."""
  ours, theirs = socket.socketpair()
  theirs.setblocking(False)

  def watch():
    seen = []
    while numbers := ours.recv(1):
      number = signal.Signals(numbers[0])
      if number == signal.SIGINT and number in seen:
        _say("Ctrl-C again: leaving without saving.")
        os._exit(CODES[number])
      if number in CODES and number not in seen:
        again = "; press it again to leave at once" if number == signal.SIGINT else ""
        _say(f"{NAMES[number]}: the run stops after this step and saves{again}.")
      seen.append(number)

  before = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
  thread = threading.Thread(target=watch, name="signals", daemon=True)
  thread.start()
  try:
    yield
  finally:
    signal.set_wakeup_fd(before)
    theirs.close()
    thread.join()
    ours.close()


def _say(text: str) -> None:
  print(f"\n{text}", file=sys.stderr, flush=True)
