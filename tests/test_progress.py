"""A sign of life on a terminal: lines and bars tick while the main thread waits."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time

from runs import ROOT

PROGRAM = """
import logging, time
from simclr_jax import progress
logging.getLogger("simclr_jax").setLevel("INFO")
with progress.alive():
  progress.doing("reading the weather")
  time.sleep(2.2)
  with progress.bar(10, "digging", "hole") as bar:
    bar.update(3)
    bar.set_postfix_str("loss=1.25, contrast acc=0.5, images/s=250")
    time.sleep(2.2)
"""


def on_a_terminal(program):
  """Returns [(seconds since the line before, text)] of what a program writes to a terminal of 80 columns."""
  ours, theirs = pty.openpty()
  fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
  environment = {**os.environ, "PYTHONPATH": str(ROOT)}
  child = subprocess.Popen([sys.executable, "-c", program], stdout=theirs, stderr=theirs, env=environment)
  os.close(theirs)
  found, last = [], None
  while True:
    try:
      text = os.read(ours, 65536).decode()
    except OSError:  # The terminal's end, on Linux.
      break
    now = time.monotonic()
    found.append((now - last if last else 0.0, text))
    last = now
  assert child.wait() == 0
  os.close(ours)
  return found


def test_lines_and_bars_tick_every_second_within_80_columns():
  found = on_a_terminal(PROGRAM)
  text = "".join(part for _, part in found)
  assert re.search(r"reading the weather \.\.\. 1 s", text)
  assert re.search(r"reading the weather \.\.\. 2 s", text)
  bars = [line for line in re.split(r"[\r\n]", text) if "digging" in line]
  # The elapsed time moves, and the numbers have room.
  assert len({re.search(r"\[(\d\d:\d\d)<", line)[1] for line in bars}) >= 2
  assert "images/s=250" in bars[-1]
  assert max(map(len, bars)) <= 80
  assert max(seconds for seconds, _ in found) < 2


def test_without_a_terminal_nothing_ticks():
  done = subprocess.run(
    [sys.executable, "-c", "import time\nfrom simclr_jax import progress\nwith progress.alive(): time.sleep(1.2)"],
    env={**os.environ, "PYTHONPATH": str(ROOT)},
    capture_output=True,
    text=True,
    check=True,
  )
  assert (done.stdout, done.stderr) == ("", "")
