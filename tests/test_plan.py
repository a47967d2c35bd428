"""The plan: what one real training step needs, on described TPUs and on this machine."""

import importlib.util
import json
import os
import re
import signal

import jax
import jax.numpy as jnp
import pytest
from hidden import hide
from plain_encoder import PlainEncoder
from runs import ROOT

from simclr_jax import __main__ as command
from simclr_jax.hardware import cost
from simclr_jax.jobs import plan
from simclr_jax.models import encoders

# The schedule is that of ImageNet; the network is small.
TINY = [
  "--config=imagenet:v1",
  "--config.data.image_size=32",
  "--config.model.depth=10",
  "--config.model.width=0.0625",
  "--config.head.layers=2",
  "--config.head.out_dim=32",
]
WITH_COMPILER = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None,
  reason="the TPU compiler (libtpu, in the extras dev and tpu) is not installed",
)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
  """Plans without --workdir are written below the current folder."""
  monkeypatch.chdir(tmp_path)


@pytest.fixture
def planned(tmp_path, capsys):
  """Runs a plan of a tiny network and returns (what plan.json holds, what was printed)."""

  def run(*more):
    assert command.main(["plan", *TINY, *more, f"--workdir={tmp_path}"]) == 0
    return json.loads((tmp_path / "plan.json").read_text()), capsys.readouterr().out

  return run


def fails(capsys, *argv) -> str:
  assert command.main(["plan", *TINY, *argv]) == 2
  (message,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("simclr_jax: ")]
  return message


@pytest.mark.slow
@WITH_COMPILER
def test_a_plan_for_tpus_that_are_not_here_says_what_the_compiler_found(planned):
  # Compiled quickly: the augmentation is no part of the step.
  more = ["--config.micro_batches=2", "--mfu=0.5", "--config.augment.place=host"]
  written, text = planned("--topology=v5e:2x2", "--batch_sizes=64,4194304", *more)
  one, large = written["plans"]
  # What does not fit is said plainly, with what to change.
  assert large["fits"] is False
  assert large["needed"] > large["available"]
  assert text.count("DOES NOT FIT. Try --config.micro_batches=") == 1
  assert (one["devices"], one["device_kind"], one["available"], one["fits"]) == (4, "TPU v5 lite", 16 * 2**30, True)
  assert one["needed"] == sum(one["memory"].values())
  assert one["memory"]["batch"] == 64 // 4 * (4 * 2 * 32 * 32 * 3 + 4 + 4 + 4)  # float32 views, label, index, epoch
  # The steps of the paper's run, at half the peak of four chips.
  assert one["steps"] == 1_281_167 * 1000 // 64 + 1
  assert one["step_seconds_at_peak"] == pytest.approx(one["step_flops"] / (4 * 197e12))
  assert one["hours"] == pytest.approx(one["steps"] * one["step_seconds_at_peak"] / 0.5 / 3600)
  loss = {row["kind"]: row for row in one["exchanged"] if row["purpose"] == "loss"}
  assert loss["all-gather"]["calls"] == 2
  assert loss["all-gather"]["bytes"] == 64 * 2 * 32 * 4 + 64 * 2 * 4
  assert {row["kind"] for row in one["exchanged"]} == {"all-gather", "all-reduce"}
  assert re.search(r"the chip has +16\.000 GiB", text)


@pytest.mark.slow
def test_a_sweep_has_a_plan_of_each_batch_size_and_touches_no_device(planned, monkeypatch):
  monkeypatch.setitem(encoders.ENCODERS, "plain", PlainEncoder)
  before = {id(array) for array in jax.live_arrays()}
  written, text = planned(
    "--batch_sizes=16,32",
    "--devices=1",
    "--config.model.encoder=plain",
    "--config.head.online=false",
    "--config.augment.blur_probability=0",
    "--config.data.resident=true",
  )
  assert {id(array) for array in jax.live_arrays()} <= before
  one, two = written["plans"]
  assert [p["batch_size"] for p in (one, two)] == [16, 32]
  assert [p["devices"] for p in (one, two)] == [1, 1]
  # Nobody knows a CPU's memory and peak.
  assert one["available"] is one["hours"] is None
  assert one["fits"]
  assert two["memory"]["batch"] == 2 * one["memory"]["batch"]
  assert one["memory"]["resident images"] == 1_281_167 * (32 * 32 * 3 + 4)
  assert two["memory"]["parameters"] == one["memory"]["parameters"]
  loss = lambda p: 3 * 2 * (2 * p["batch_size"]) ** 2 * 32
  assert (two["step_flops"] - loss(two)) == 2 * (one["step_flops"] - loss(one))
  assert text.count("memory of one device") == 2


@pytest.mark.slow
@WITH_COMPILER
def test_a_crash_of_the_compiler_gets_one_line(capsys, monkeypatch):
  monkeypatch.setattr(plan, "make", crash)
  message = fails(capsys, "--topology=v5e:1x1", "--config.batch_size=64")
  assert "compiler crashed on batch 64 for v5e:1x1" in message


def crash(*_):
  """Ends the process as a fault in native code does."""
  os.kill(os.getpid(), signal.SIGSEGV)


def test_the_compilers_complaint_is_read():
  early = "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (44.82G) exceeds"
  assert plan._memory_in(early) == pytest.approx(44.82 * 2**30, rel=1e-3)
  late = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 512.50M of 15.75G hbm."
  assert plan._memory_in(late) == pytest.approx(512.5 * 2**20, rel=1e-3)
  assert plan._memory_in("INTERNAL: something else") == 0


@pytest.mark.parametrize(
  ("option", "says"),
  [
    ("--topology=v5x:4x4", 'did you mean "v5p"|did you mean "v5e"'),
    ("--topology=v3", "v3:8x8"),
    ("--batch_sizes=4096,many", "--batch_sizes is '4096,many'"),
    ("--mfu=2", "--mfu"),
    ("--devices=9", "1 to 8"),
    ("--config.batch_size=12", "8 devices"),
    ("--config.model.remat=some", "none, convs, blocks"),
    ("--config.model.remat=convs,none", "2 parts"),
    ("--config.loss.kind=infonce", "nt_xent"),
    ("--config.sharding.parameters=zero", "replicated"),
    ("--config.micro_batches=3", "3 micro-batches"),
  ],
)
@pytest.mark.devices(8)
def test_a_wrong_option_is_named_before_anything_is_compiled(capsys, option, says):
  assert re.search(says, fails(capsys, "--config.batch_size=64", option))


def test_without_the_compiler_the_message_says_what_to_install(capsys, monkeypatch):
  hide(monkeypatch, "libtpu")
  assert "[tpu]" in fails(capsys, "--topology=v3:2x2")


def test_exchanges_of_one_kind_and_purpose_are_added_up():
  found = [
    cost.Collective("all-reduce", "loss", 2, 8, ("f32[]",)),
    cost.Collective("all-reduce", "loss", 1, 4, ("f32[]",)),
  ]
  assert plan._exchanged(found) == [{"kind": "all-reduce", "purpose": "loss", "calls": 3, "bytes": 12}]


def test_the_table_of_the_docs_is_that_of_the_committed_plans():
  spec = importlib.util.spec_from_file_location("plans_table", ROOT / "scripts" / "plans_table.py")
  plans_table = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(plans_table)
  assert plans_table.main() in (ROOT / "docs" / "scale.md").read_text()


def test_steps_on_this_cpu_are_timed_on_zeros():
  def step(state, batch):
    return state + jnp.sum(batch), {"loss": state}

  at = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  shape = lambda *dims: jax.ShapeDtypeStruct(dims, jnp.float32, sharding=at)
  compiled = jax.jit(step, donate_argnums=0).lower(shape(), shape(4)).compile()
  assert 0 < plan._seconds(compiled, shape(), shape(4)) < 10
