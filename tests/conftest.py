"""One virtual CPU device and quick compilation for every test that asks for nothing else; fixtures; the real data."""

import ctypes
import gc
import pathlib
import resource

import compilation  # Sets what JAX reads when it is imported.
import jax
import numpy as np
import pytest
from jax._src import compiler

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

from runs import REAL_DATA, finetuned, linear, pretrained, shared_folder  # noqa: E402, F401  (fixtures)

FIXTURES = pathlib.Path(__file__).parent / "reference"

# A process has eight virtual devices, of which the code under test sees this many.
VISIBLE = {"devices": 1}

# Where Linux says how much memory this process has, its second number in pages; and when that is much, in bytes.
STATM, LARGE = pathlib.Path("/proc/self/statm"), 3 * 2**29


def _show_devices() -> None:
  """Makes `jax.devices` and its like tell of the visible devices alone."""
  for name in ("devices", "local_devices"):
    everything = getattr(jax, name)
    setattr(jax, name, lambda *a, everything=everything, **k: everything(*a, **k)[: VISIBLE["devices"]])
  jax.device_count = jax.local_device_count = lambda *a, **k: len(jax.devices())


_show_devices()


@pytest.fixture(autouse=True)
def _marked(request, monkeypatch):
  """Gives a test the devices and the compiler that its markers `devices(n)` and `optimized` ask for."""
  devices = request.node.get_closest_marker("devices")
  VISIBLE["devices"] = devices.args[0] if devices else 1
  if optimized := request.node.get_closest_marker("optimized") is not None:
    options_of = compiler.get_compile_options
    monkeypatch.setattr(compiler, "get_compile_options", lambda *a, **k: compilation.as_usual(options_of(*a, **k)))
  jax.config.update("jax_disable_most_optimizations", not optimized)
  yield
  jax.config.update("jax_disable_most_optimizations", True)
  jax.config.update("jax_enable_x64", False)  # A job in float64 has turned it on.
  VISIBLE["devices"] = 1


@pytest.fixture(autouse=True, scope="module")
def _memory():
  """Frees the programs of a file where they have grown large; the folder of compiled programs keeps what took long."""
  yield
  if STATM.exists() and int(STATM.read_text().split()[1]) * resource.getpagesize() > LARGE:
    jax.clear_caches()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # The input pipeline has told the allocator to keep what is freed.


def pytest_collection_modifyitems(items):
  """Lets the tests that need most memory come first, while a worker holds little else."""
  items.sort(key=lambda item: item.get_closest_marker("large") is None)


def pytest_collection_finish():
  """Leaves what was imported, half a million objects, out of garbage collection, and collects less often.

  To trace a program allocates so much that collections take a twelfth of the time.
  """
  gc.collect()
  gc.freeze()
  gc.set_threshold(50_000, 20, 100)


@pytest.fixture
def reference():
  """Returns a loader: `reference("lars")` gives the arrays of tests/reference/lars.npz by name."""
  return lambda name: dict(np.load(FIXTURES / f"{name}.npz"))


@pytest.fixture
def tfds_dir():
  """The prepared TFDS folder beside the project; the test is skipped where it is absent."""
  path = REAL_DATA / "tfds"
  if not path.is_dir():
    pytest.skip("real data (../shared/data/tfds) is not beside the project")
  return str(path)


@pytest.fixture
def x64():
  """Runs the test in float64."""
  with jax.enable_x64(True):
    yield
