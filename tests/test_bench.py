"""The bench job: its oracle, its figures, and what it does about sizes and libraries that it cannot time."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hidden import hide

from simclr_jax import __main__ as command
from simclr_jax.jobs import bench

STUB = """
class NTXentLoss:
  def __init__(self, temperature):
    assert temperature == 0.1

  def __call__(self, first, second):
    return Loss(first, second)


class Loss:
  def __init__(self, first, second):
    self.first, self.second = first, second

  def backward(self):
    import numpy

    assert self.first.requires_grad and self.second.requires_grad
    assert self.first.value.shape == self.second.value.shape
    numpy.ones(2**26, numpy.uint8).sum()
"""
TORCH_STUB = """
class tensor:
  def __init__(self, value, requires_grad):
    self.value, self.requires_grad = value, requires_grad
"""


@pytest.fixture
def stubbed(tmp_path, monkeypatch):
  """Returns a function that installs a lightly of the given source, beside a torch."""

  def install(source):
    (tmp_path / "lightly").mkdir()
    (tmp_path / "lightly" / "__init__.py").write_text("")
    (tmp_path / "lightly" / "loss.py").write_text(source)
    (tmp_path / "torch.py").write_text(TORCH_STUB)
    monkeypatch.syspath_prepend(str(tmp_path))

  return install


def only(monkeypatch, *names):
  monkeypatch.setattr(bench, "LOSSES", {name: bench.LOSSES[name] for name in names})


def without_lightly(monkeypatch):
  monkeypatch.setitem(sys.modules, "lightly", None)
  hide(monkeypatch, "lightly")


def test_every_contestant_computes_the_same_loss_and_gradient():
  z = jnp.asarray(bench.embeddings(24))
  (want, want_metrics), want_grad = jax.value_and_grad(bench.dense, has_aux=True)(z)
  for name in ("blockwise", "optax"):
    (loss, metrics), grad = jax.jit(jax.value_and_grad(bench.LOSSES[name], has_aux=True))(z)
    np.testing.assert_allclose(loss, want, rtol=1e-5, err_msg=name)
    np.testing.assert_allclose(grad, want_grad, rtol=0, atol=1e-5 * np.abs(want_grad).max(), err_msg=name)
    for metric, value in metrics.items():
      np.testing.assert_allclose(value, want_metrics[metric], rtol=1e-5, err_msg=metric)


def test_the_job_writes_what_it_prints(tmp_path, capsys, monkeypatch):
  only(monkeypatch, "dense", "blockwise")
  without_lightly(monkeypatch)
  assert command.main(["bench", "--sizes=64,32", f"--workdir={tmp_path}"]) == 0
  result = json.loads((tmp_path / "loss_bench.json").read_text())
  assert result["jax"] == jax.__version__
  assert result["machine"]["cores"] >= 1
  assert [(row["n"], row["loss"]) for row in result["rows"]] == [
    (n, loss) for n in (32, 64) for loss in ("dense", "blockwise")
  ]
  table = capsys.readouterr().out
  for row in result["rows"]:
    assert row["seconds"] > 0
    assert row["temporaries"] > 0
    assert row["runs"] == bench.REPEATS
    np.testing.assert_allclose(row["flop_per_second"] * row["seconds"], 6 * (2 * row["n"]) ** 2 * 128)
    assert f"{row['seconds']:.3f} s" in table
  dense, blockwise = result["rows"][:2]
  assert blockwise["seconds_of_dense"] == blockwise["seconds"] / dense["seconds"]


def test_what_does_not_fit_or_takes_too_long_is_compiled_and_not_run(tmp_path, monkeypatch):
  only(monkeypatch, "dense", "blockwise")
  without_lightly(monkeypatch)
  # Enough for the blockwise loss of 1024 alone.
  monkeypatch.setattr(bench, "_available_memory", lambda: 20e6)
  dense, blockwise = bench.run(str(tmp_path), sizes="1024")["rows"]
  assert "free" in dense["not_timed"]
  assert "seconds" not in dense
  assert dense["temporaries"] > 4 * 2048**2
  assert blockwise["seconds"] > 0
  assert "seconds_of_dense" not in blockwise
  monkeypatch.setattr(bench, "MAX_SECONDS", 0)
  small, large = (row for row in bench.run(str(tmp_path), sizes="64,128")["rows"] if row["loss"] == "blockwise")
  assert "seconds" in small
  assert "would take" in large["not_timed"]


def test_a_slow_loss_is_run_once(monkeypatch):
  calls = []
  assert len(bench.timed(lambda: calls.append(1))) == bench.REPEATS
  assert len(calls) == bench.REPEATS + 1
  monkeypatch.setattr(bench, "SLOW_SECONDS", 0)
  assert len(bench.timed(lambda: calls.append(1))) == 1


def test_lightly_is_timed_in_a_process_of_its_own_where_it_is_installed(tmp_path, monkeypatch, stubbed):
  only(monkeypatch, "dense")
  stubbed(STUB)
  _, lightly = bench.run(str(tmp_path / "out"), sizes="32")["rows"]
  assert lightly["loss"] == "lightly"
  assert lightly["seconds"] > 0
  # What the stub allocates; the system counts pages a little late.
  assert 0.9 * 2**26 < lightly["temporaries"] < 2**27
  assert "lightly" not in sys.modules


@pytest.mark.parametrize(
  ("source", "says"), [("import absent_package", "absent_package"), ("import os; os.kill(os.getpid(), 9)", "killed")]
)
def test_a_lightly_that_fails_is_reported_and_not_fatal(tmp_path, monkeypatch, stubbed, source, says):
  only(monkeypatch, "dense")
  stubbed(source)
  assert says in bench.run(str(tmp_path / "out"), sizes="32")["rows"][1]["not_timed"]


@pytest.mark.parametrize("sizes", ["1k", "1024,,2048", "1", "-4"])
def test_wrong_sizes_are_named_in_one_line(tmp_path, capsys, sizes):
  assert command.main(["bench", f"--sizes={sizes}", f"--workdir={tmp_path}"]) == 2
  assert "batch sizes" in capsys.readouterr().err


@pytest.mark.slow
def test_blockwise_keeps_its_bars_at_8192():
  def temporaries(loss_fn, n):
    z = jax.ShapeDtypeStruct((n, 2, bench.DIM), jnp.float32)
    return jax.jit(jax.value_and_grad(loss_fn, has_aux=True)).lower(z).compile().memory_analysis().temp_size_in_bytes

  assert 15 * temporaries(bench.blockwise, 8192) <= temporaries(bench.dense, 8192)
  assert temporaries(bench.blockwise, 65536) < 1e9
