"""Two processes of four devices each compute what one process of eight does."""

import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import process_worker
import pytest

ROOT = pathlib.Path(__file__).parents[1]
TOLERANCE = {"float64": 1e-9, "float32": 1e-5}


def start(out, *together):
  environment = {
    **os.environ,
    "PYTHONPATH": str(ROOT),
    "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": "4",
  }
  argv = [sys.executable, str(ROOT / "tests" / "process_worker.py"), str(out), *together]
  return subprocess.Popen(argv, env=environment, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
@pytest.mark.devices(8)
def test_two_processes_of_four_devices_compute_what_one_of_eight_does(tmp_path):
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    port = probe.getsockname()[1]
  outs = [tmp_path / f"{i}.npz" for i in (0, 1)]
  pair = [start(out, f"localhost:{port}", "2", str(i)) for i, out in enumerate(outs)]
  assert jax.device_count() == 8
  one = process_worker.results()
  for process in pair:
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
  for two in map(np.load, outs):
    assert set(two.files) == one.keys()
    for name, value in one.items():
      dtype = name.split("/")[1]
      assert two[name].dtype == value.dtype, name
      largest = np.abs(value).max()
      np.testing.assert_allclose(two[name], value, rtol=0, atol=TOLERANCE[dtype] * largest, err_msg=name)
