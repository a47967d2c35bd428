"""What all benchmarks share: timing, processes of their own, the facts of the machine, and the record of a run."""

import contextlib
import datetime
import functools
import json
import multiprocessing
import os
import pathlib
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any

import jax

ROOT = pathlib.Path(__file__).parents[1]

ROUNDS = 5
# A step that takes longer is run once, without a warm-up.
SLOW_SECONDS = 30

# In a child process: the function that it calls repeatedly.
_made = []


def timed(step: Callable[[], Any]) -> list[float]:
  """Returns the seconds of several calls of `step` after a warm-up, or of the first one where it is slow."""
  seconds = []
  for _ in range(1 + ROUNDS):
    seconds.append(once(step))
    if seconds[0] > SLOW_SECONDS:
      return seconds
  return seconds[1:]


def once(step: Callable[[], Any]) -> float:
  """Returns the seconds of one call."""
  begin = time.perf_counter()
  step()
  return time.perf_counter() - begin


def interleaved(
  contestants: dict[str, Callable[[], float]], rounds: int, *, warm_up: bool = True
) -> dict[str, list[float]]:
  """Returns what each contestant measures in each round; they take turns, so that a slow moment meets them all.

  Args:
    contestants: by name, each returns one measurement.
    rounds: that count.
    warm_up: whether there is one more round before, which does not.
  """
  found = {name: [] for name in contestants}
  for number in range(rounds + warm_up):
    for name, measure in contestants.items():
      value = measure()
      if number >= warm_up:
        found[name].append(value)
  return found


def medians(found: dict[str, list[float]]) -> dict[str, float]:
  """Returns the median of each contestant's measurements."""
  return {name: statistics.median(values) for name, values in found.items()}


@contextlib.contextmanager
def in_a_process(make: Callable, *args, environment: dict[str, str] | None = None) -> Iterator[Callable[..., Any]]:
  """Yields a function that calls, in a process of its own, the function that `make(*args)` returned there.

  Args:
    make: of a module, so that it can be sent.
    *args: its arguments.
    environment: of that process, beside this one's.
  """
  before = {name: os.environ.get(name) for name in environment or {}}
  os.environ.update(environment or {})
  try:
    # Spawned, because a fork would inherit JAX's threads' locks.
    with futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
      pool.submit(_make, make, args).result()
      yield lambda *more: pool.submit(_call, more).result()
  finally:
    for name, value in before.items():
      os.environ.pop(name)
      os.environ.update({} if value is None else {name: value})


def alone(function: Callable, *args, environment: dict[str, str] | None = None) -> Any:
  """Returns `function(*args)` of a process of its own, which leaves nothing behind on the accelerator."""
  with in_a_process(functools.partial, function, *args, environment=environment) as call:
    return call()


def _make(make, args):
  _made[:] = [make(*args)]


def _call(args):
  return _made[0](*args)


def available_memory() -> int:
  """Returns the bytes that are free on the first device."""
  stats = jax.devices()[0].memory_stats()
  if stats and "bytes_limit" in stats:
    return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
  meminfo = pathlib.Path("/proc/meminfo")
  if meminfo.exists():
    return kilobytes(meminfo, "MemAvailable") * 1024
  return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def kilobytes(path: pathlib.Path, name: str) -> int:
  """Returns the number after `name` in one of Linux's tables of memory."""
  lines = dict(line.split(":", 1) for line in path.read_text().splitlines())
  return int(lines[name].split()[0])


def circumstances(command: str) -> dict:
  """Returns when, where and from which commit something was measured."""
  return {
    "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    "commit": _commit(),
    "command": command,
    "device": jax.devices()[0].device_kind,
    "machine": {"cpu": _cpu_model(), "cores": os.cpu_count()},
    "jax": jax.__version__,
  }


def _commit() -> str:
  try:
    found = subprocess.run(["git", "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True)
  except FileNotFoundError:  # no git here
    return "unknown"
  return found.stdout.strip() or "unknown"


def _cpu_model() -> str:
  cpuinfo = pathlib.Path("/proc/cpuinfo")
  lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
  models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
  return models[0] if models else platform.processor() or platform.machine()


def record(line: dict) -> pathlib.Path | None:
  """Appends a line to results/bench.jsonl of the checkout and returns its path; None where there is no checkout."""
  folder = ROOT / "results"
  if not (ROOT / "pyproject.toml").exists() or not folder.is_dir():
    return None
  path = folder / "bench.jsonl"
  with path.open("a") as stream:
    stream.write(json.dumps(line) + "\n")
  return path


def say(text: str) -> None:
  """Prints without buffering, because a benchmark takes long."""
  print(text, flush=True)
