"""The bench job: its oracles, its figures, its record, and what it does about what it cannot time."""

import contextlib
import functools
import json
import os
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hidden import hide
from plain_encoder import PlainEncoder

from benchmarks import accelerator, cifar, host_input, loss, measure, plain, resident, step
from simclr_jax import __main__ as command
from simclr_jax import errors
from simclr_jax.data import device_augment
from simclr_jax.jobs import bench, linear_eval
from simclr_jax.models import encoders, heads, resnet, simclr
from simclr_jax.training import step as training_step

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


TINY = {"data.image_size": 16, "batch_size": 8, "data.shards": 8}


@pytest.fixture(autouse=True)
def checkout(tmp_path, monkeypatch):
  """Returns an empty checkout, which gets the lines of the record."""
  root = tmp_path / "checkout"
  (root / "results").mkdir(parents=True)
  (root / "pyproject.toml").write_text("")
  monkeypatch.setattr(measure, "ROOT", root)
  return root


@pytest.fixture
def short(monkeypatch):
  """Leaves what compiles quickly: a small encoder, neither augmentation nor gradients; all in this process."""
  monkeypatch.setattr(encoders, "build", lambda keys: PlainEncoder())
  monkeypatch.setattr(plain, "ResNet", lambda depth, width: PlainEncoder())
  monkeypatch.setattr(training_step, "train_step", counted)
  twice = lambda images, *_, **__: jnp.stack([images, images], axis=1) / 255
  monkeypatch.setattr(device_augment, "two_views", twice)
  monkeypatch.setattr(accelerator, "SMALL_VARIANTS", (("views", "none"),))
  monkeypatch.setattr(measure, "in_a_process", here)


def counted(state, batch, *, objective, **_):
  """A step that only looks at its batch."""
  batch = objective.prepare(batch)
  return state.replace(step=state.step + 1), {"loss": batch["views"].mean(), "contrast_acc": batch["label"].mean()}


@contextlib.contextmanager
def here(make, *args, environment=None):
  """Yields what `measure.in_a_process` does, without one."""
  yield make(*args)


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
  monkeypatch.setattr(loss, "LOSSES", {name: loss.LOSSES[name] for name in names})


def loss_rows(workdir, sizes):
  return bench.run(workdir, only=("loss",), sizes=sizes)["sections"]["loss"]["rows"]


def without_lightly(monkeypatch):
  monkeypatch.setitem(sys.modules, "lightly", None)
  hide(monkeypatch, "lightly")


@pytest.mark.slow
def test_every_contestant_computes_the_same_loss_and_gradient():
  z = jnp.asarray(loss.embeddings(24))
  (want, want_metrics), want_grad = jax.value_and_grad(loss.dense, has_aux=True)(z)
  for name in ("blockwise", "optax"):
    (value, metrics), grad = jax.jit(jax.value_and_grad(loss.LOSSES[name], has_aux=True))(z)
    np.testing.assert_allclose(value, want, rtol=1e-5, err_msg=name)
    np.testing.assert_allclose(grad, want_grad, rtol=0, atol=1e-5 * np.abs(want_grad).max(), err_msg=name)
    for metric, value in metrics.items():
      np.testing.assert_allclose(value, want_metrics[metric], rtol=1e-5, err_msg=metric)


def test_the_job_writes_what_it_prints_and_adds_a_line_to_the_record(tmp_path, capsys, monkeypatch, checkout):
  only(monkeypatch, "dense", "blockwise")
  without_lightly(monkeypatch)
  (checkout / "results" / "bench.jsonl").write_text("{}\n")
  assert command.main(["bench", "--only=loss", "--sizes=64,32", f"--workdir={tmp_path}"]) == 0
  result = json.loads((tmp_path / "bench.json").read_text())
  first, last = map(json.loads, (checkout / "results" / "bench.jsonl").read_text().splitlines())
  assert first == {}
  assert last == {key: value for key, value in result.items() if key != "sections"}
  assert last["headline"]["loss"]["blockwise_n"] == 64
  assert last["command"] == "python -m simclr_jax bench --only=loss --sizes=64,32"
  assert result["jax"] == jax.__version__
  assert result["machine"]["cores"] >= 1
  result = result["sections"]["loss"]
  assert [(row["n"], row["loss"]) for row in result["rows"]] == [
    (n, name) for n in (32, 64) for name in ("dense", "blockwise")
  ]
  table = capsys.readouterr().out
  for row in result["rows"]:
    assert row["seconds"] > 0
    assert row["temporaries"] > 0
    assert row["runs"] == measure.ROUNDS
    np.testing.assert_allclose(row["flop_per_second"] * row["seconds"], 6 * (2 * row["n"]) ** 2 * 128)
    assert f"{row['seconds']:.3f} s" in table
  dense, blockwise = result["rows"][:2]
  assert blockwise["seconds_of_dense"] == blockwise["seconds"] / dense["seconds"]


@pytest.mark.slow
def test_what_does_not_fit_or_takes_too_long_is_compiled_and_not_run(tmp_path, monkeypatch):
  only(monkeypatch, "dense", "blockwise")
  without_lightly(monkeypatch)
  # Enough for the blockwise loss of 1024 alone.
  monkeypatch.setattr(measure, "available_memory", lambda: 20e6)
  dense, blockwise = loss_rows(str(tmp_path), (1024,))
  assert "free" in dense["not_timed"]
  assert "seconds" not in dense
  assert dense["temporaries"] > 4 * 2048**2
  assert blockwise["seconds"] > 0
  assert "seconds_of_dense" not in blockwise
  monkeypatch.setattr(loss, "MAX_SECONDS", 0)
  small, large = (row for row in loss_rows(str(tmp_path), (64, 128)) if row["loss"] == "blockwise")
  assert "seconds" in small
  assert "would take" in large["not_timed"]


def test_a_slow_loss_is_run_once(monkeypatch):
  calls = []
  assert len(measure.timed(lambda: calls.append(1))) == measure.ROUNDS
  assert len(calls) == measure.ROUNDS + 1
  monkeypatch.setattr(measure, "SLOW_SECONDS", 0)
  assert len(measure.timed(lambda: calls.append(1))) == 1


@pytest.mark.slow
def test_lightly_is_timed_in_a_process_of_its_own_where_it_is_installed(tmp_path, monkeypatch, stubbed):
  only(monkeypatch, "dense")
  stubbed(STUB)
  _, lightly = loss_rows(str(tmp_path / "out"), (32,))
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
  assert says in loss_rows(str(tmp_path / "out"), (32,))[1]["not_timed"]


@pytest.mark.parametrize("sizes", ["1k", "1024,,2048", "1", "-4"])
def test_wrong_sizes_are_named_in_one_line(tmp_path, capsys, sizes):
  assert command.main(["bench", f"--sizes={sizes}", f"--workdir={tmp_path}"]) == 2
  assert f"--sizes is '{sizes}'; give whole numbers above 1" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.optimized
def test_blockwise_keeps_its_bars_at_8192():
  def temporaries(loss_fn, n):
    z = jax.ShapeDtypeStruct((n, 2, loss.DIM), jnp.float32)
    return jax.jit(jax.value_and_grad(loss_fn, has_aux=True)).lower(z).compile().memory_analysis().temp_size_in_bytes

  assert 15 * temporaries(loss.blockwise, 8192) <= temporaries(loss.dense, 8192)
  assert temporaries(loss.blockwise, 65536) < 1e9


@pytest.mark.parametrize(
  ("options", "says"),
  [
    (["--only=loss,stepp"], 'did you mean "step"?'),
    (["--only=cifar"], "use loss, input, step, resident"),
    (["--gpu", "--only=step"], "use resnet50, cifar"),
    (["--data_dir=/no/such/folder"], "--data_dir=/no/such/folder does not exist"),
    (["--gpu", "--npz=/no/such.npz"], "--npz=/no/such.npz does not exist"),
    (["--rounds=0"], "--rounds got '0'"),
    (["--gpu", "--epochs=long"], "--epochs got 'long'"),
    (["--gpu", "--batches=1k"], "--batches is '1k'"),
    (["--small"], "--gpu"),
  ],
)
def test_a_wrong_option_is_named_in_one_line(tmp_path, capsys, checkout, options, says):
  assert command.main(["bench", *options, f"--workdir={tmp_path}"]) == 2
  assert says in capsys.readouterr().err
  assert not (checkout / "results" / "bench.jsonl").exists()


def test_contestants_take_turns_and_the_first_round_does_not_count():
  calls = []
  contestants = {name: lambda name=name: calls.append(name) or float(len(calls)) for name in "ab"}
  found = measure.interleaved(contestants, 3)
  assert calls == ["a", "b"] * 4
  assert found == {"a": [3.0, 5.0, 7.0], "b": [4.0, 6.0, 8.0]}
  assert measure.medians(found) == {"a": 5.0, "b": 6.0}


def test_a_child_process_keeps_its_function_and_has_its_own_environment(monkeypatch):
  monkeypatch.delenv("OF_THE_CHILD", raising=False)
  with measure.in_a_process(functools.partial, os.getenv, environment={"OF_THE_CHILD": "1"}) as call:
    assert call("OF_THE_CHILD") == "1"
    assert call("OF_THE_CHILD") == "1"
  assert "OF_THE_CHILD" not in os.environ


def test_outside_of_a_checkout_nothing_is_recorded(checkout):
  (checkout / "pyproject.toml").unlink()
  assert measure.record({"commit": "?"}) is None
  assert not list((checkout / "results").iterdir())


@pytest.mark.slow
def test_the_plain_network_is_ours_with_other_layers(monkeypatch):
  for table in (resnet.BLOCKS, resnet.BASIC_BLOCKS):
    monkeypatch.setitem(table, 10, (1, 1))
  head = heads.ProjectionHead(2, loss.DIM)
  ours = simclr.SimCLR(resnet.ResNet(10, 0.125, small_images=True), head)
  theirs = simclr.SimCLR(plain.ResNet(10, 0.125), head)
  images = np.random.default_rng(0).random((4, 9, 9, 3), np.float32)
  variables = jax.jit(lambda: ours.init(jax.random.key(0), images, train=False))()
  # At initialisation the blocks pass their shortcuts through.
  variables = jax.tree.map(lambda x: x + 0.1, variables)
  outputs = [
    jax.jit(lambda model=model: model.apply(variables, images, train=True, mutable=["batch_stats"]))()
    for model in (ours, theirs)
  ]
  assert jax.tree.structure(outputs[0]) == jax.tree.structure(outputs[1])
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *outputs)


def test_the_plain_resnet_18_and_pytorchs_have_our_parameters():
  images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
  head = heads.ProjectionHead(3, 128)
  shapes = [
    jax.eval_shape(lambda x, model=model: model.init(jax.random.key(0), x, train=False), images)
    for model in (simclr.SimCLR(resnet.ResNet(18, small_images=True), head), simclr.SimCLR(plain.ResNet(18), head))
  ]
  assert shapes[0] == shapes[1]
  pytest.importorskip("torch")
  from benchmarks import pytorch

  count = sum(leaf.size for leaf in jax.tree.leaves(shapes[0]["params"]))
  keys = {"depth": 18, "width": 1, "small_images": True, "layers": 3, "out_dim": 128}
  # Theirs has no batch norm without bias.
  assert pytorch.parameters(keys) - 128 == count
  keys |= {"depth": 50, "small_images": False}
  model = simclr.SimCLR(resnet.ResNet(50), head)
  shape = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), images)["params"]
  assert pytorch.parameters(keys) - 128 == sum(leaf.size for leaf in jax.tree.leaves(shape))


def test_pytorchs_loss_and_step_are_those_of_the_others():
  torch = pytest.importorskip("torch")
  from benchmarks import pytorch

  # Unrelated views, whose loss is far from zero.
  z = np.random.default_rng(0).normal(size=(6, 2, loss.DIM)).astype(np.float32)
  want, _ = loss.dense(jnp.asarray(z))
  np.testing.assert_allclose(pytorch.nt_xent(torch.tensor(z).reshape(12, -1)).item(), want, rtol=1e-5)
  keys = {"depth": 10, "width": 0.0625, "small_images": True, "layers": 2, "out_dim": 128}
  run = pytorch.trainer(keys, images=4, size=8, compiled=False)
  first, later = run(1), run(8)
  assert later["seconds"] > 0
  assert later["loss"] < first["loss"]


@pytest.mark.slow
def test_the_step_is_timed_with_the_plain_one_in_turns(short, monkeypatch, capsys):
  hide(monkeypatch, "torch")
  result = step.run(TINY, rounds=2)
  assert {name: len(seconds) for name, seconds in result["rounds"].items()} == {"ours": 2, "plain_flax": 2}
  seconds = result["seconds"]
  assert result["headline"]["ours_of_plain_flax"] == seconds["ours"] / seconds["plain_flax"]
  assert "PyTorch is left out" in capsys.readouterr().out


@pytest.mark.slow
def test_the_share_of_resident_input_is_measured(short):
  result = resident.run({**TINY, "data.examples": 64, "batch_size": 16}, rounds=2)
  assert result["seconds"]["input"] > 0
  assert result["share"] == result["seconds"]["input"] / result["seconds"]["step"]


@pytest.mark.slow
def test_the_input_is_measured_on_images_made_here(monkeypatch, capsys):
  monkeypatch.setattr(measure, "in_a_process", here)
  pinned = []
  monkeypatch.setattr(os, "sched_setaffinity", lambda pid, processors: pinned.append(processors), raising=False)
  for name, value in {"SIZE": 32, "MADE": 8, "MADE_SHAPE": (60, 80), "BATCH": 4, "WARM_UP": 1, "FEWEST": 1}.items():
    monkeypatch.setattr(host_input, name, value)
  result = host_input.run("", rounds=1, seconds=0.01)
  # The first process is pinned to one processor; the second, for the cost of determinism, has all of them.
  assert [len(processors) for processors in pinned] == [1]
  assert result["rates"].keys() == host_input.WHAT.keys()
  assert result["ratios"]["decode"]["of_decode"] == 1
  assert 0 < result["bilinear_error"]["mean"] < result["bilinear_error"]["max"] < 256
  assert result["determinism"]["ratio"] > 0
  assert not result["headline"]["real_images"]
  assert "not photographs" in capsys.readouterr().out


def test_without_tensorflow_the_input_is_left_out(monkeypatch):
  hide(monkeypatch, "tensorflow")
  assert "TensorFlow" in host_input.run("")["left_out"]


@pytest.mark.slow
def test_the_accelerators_command_runs_in_a_small_form(short, tmp_path, monkeypatch, checkout):
  hide(monkeypatch, "torch")
  # linear_eval is slow and has tests of its own.
  found = lambda config, workdir: config.checkpoint == workdir.replace("linear", "pretrain")
  linear = lambda config, workdir: {"eval/top1": float(found(config, workdir)), "eval/lbfgs_top1": 0.5}
  monkeypatch.setattr(linear_eval, "run", linear)
  options = ["--gpu", "--small", "--rounds=1", "--steps=2"]
  assert command.main(["bench", *options, f"--workdir={tmp_path}"]) == 0
  sections = json.loads((tmp_path / "bench.json").read_text())["sections"]
  rows = sections["resnet50"]["rows"]
  assert [(row["input"], row["remat"]) for row in rows] == [("views", "none")]
  for row in rows:
    np.testing.assert_allclose(row["views_per_second"] * row["seconds"], 2 * row["batch"])
  assert "PyTorch is left out" in sections["resnet50"]["left_out"]
  run = sections["cifar"]
  assert run["steps"] == 2
  assert (run["linear_top1"], run["lbfgs_top1"]) == (1.0, 0.5)
  assert 0 <= run["knn_top1"] <= 1
  assert run["headline"]["knn_top1"] == run["knn_top1"]
  assert not (checkout / "results" / "bench.jsonl").exists()


def test_the_largest_batch_that_fits_both_is_taken(monkeypatch):
  tried = []

  def ours(overrides, *_):
    tried.append(overrides["batch_size"])
    row = {"name": "ours", "input": "views", "remat": "none", "batch": tried[-1]}
    row |= {"left_out": "does not fit"} if tried[-1] > 32 else {"seconds": 2.0}
    return {
      "rows": [row],
      "device": "NVIDIA H100 80GB HBM3",
      "peak": 1e12,
      "flops_per_image": 1e9,
      "depth": 50,
      "size": 224,
    }

  theirs = lambda overrides, *_, compiled: (
    {"name": "pytorch", "input": "views", "batch": 16, "seconds": 3.0} if overrides["batch_size"] == 16 else {},
    "",
  )
  monkeypatch.setattr(measure, "alone", lambda function, *args, environment: ours(*args))
  monkeypatch.setattr(accelerator, "_pytorch", theirs)
  keys = {"data_dir": "", "small": False, "rounds": 1}
  row = accelerator.run(batches=[16, 64, 32], **keys)["rows"][0]
  assert tried == [64, 32, 16]
  assert (row["views_per_second"], row["of_pytorch"], row["mfu"]) == (16, 1.5, 0.008)
  with pytest.raises(errors.UserError, match="--batches"):
    accelerator.run(batches=[64], **keys)


def test_cifar_is_left_out_without_its_file(tmp_path):
  assert "--npz" in cifar.run(str(tmp_path), npz="", epochs=1, steps=0, small=False)["left_out"]
