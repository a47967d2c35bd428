"""Fixtures of the tests of the launch scripts."""

import signal

import clouds
import pytest


@pytest.fixture(autouse=True)
def _listen_to_signals():
  """Ends that this process ignores SIGINT and SIGHUP: what it starts could not even trap them.

  A shell makes what it starts in the background ignore SIGINT, nohup SIGHUP, and libtpu, once JAX has looked for TPUs
  in this process, SIGHUP without Python's knowledge.
  """
  signal.signal(signal.SIGINT, signal.default_int_handler)
  signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture
def cloud(tmp_path):
  cloud = clouds.Cloud(tmp_path)
  yield cloud
  for process in cloud.processes:  # A failed test leaves some.
    if process.poll() is None:
      process.terminate()
      process.communicate()


@pytest.fixture
def tpu(cloud):
  """Stubs of a cloud where no TPU exists yet, every command succeeds and a TPU has four hosts."""
  cloud.says("describe", clouds.FREE)
  cloud.says("networkEndpoints.len", (0, "4"))
  cloud.says("worker.sh result", (0, clouds.results("exited 0", "exited 0")))
  cloud.says("queued-resources describe", clouds.FREE, (0, "WAITING_FOR_RESOURCES"), (0, "ACTIVE"))
  return cloud
