"""Eight virtual CPU devices for every test, fixtures from the reference, and the real data if it is there."""

import os
import pathlib

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
# Many tests compile the same small networks, in many processes; the folder is the test runner's and not in git.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{pathlib.Path(__file__).parents[1]}/.pytest_cache/compiled")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")

import jax
import numpy as np
import pytest

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

FIXTURES = pathlib.Path(__file__).parent / "reference"
REAL_DATA = pathlib.Path(__file__).parents[2] / "shared" / "data"


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
