"""Fine-tuning and its jobs: the reference's trajectories, what is frozen, which labels are used, distillation."""

import functools
import json
import shutil

import float64_convolution
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
import small_step
import trajectories
from PIL import Image
from runs import job, tiny, training_rows

from simclr_jax import __main__ as command
from simclr_jax import errors
from simclr_jax.data import sources, subset
from simclr_jax.data.source import Request
from simclr_jax.hardware import cost, sharding
from simclr_jax.models import heads, resnet, simclr
from simclr_jax.training import checkpoint, objectives
from simclr_jax.training import state as state_lib

# Case -> which variables are compared, by the start of their names: the reference's TF1 and TF2 code differ in the
# others, see the fixtures' description.
WHOLE, HEAD = "", "head_supervised"
CASES = {"linear_frozen_bn": WHOLE, "linear_frozen_bn_wd": HEAD, "finetune_selector1_lars": WHOLE}


@pytest.mark.slow
@pytest.mark.large
@pytest.mark.parametrize("name", CASES)
def test_four_steps_are_the_reference_s(reference, monkeypatch, x64, name):
  float64_convolution.patch(monkeypatch)
  case, mesh = trajectories.Case(reference("finetune_steps"), name), sharding.data_mesh()
  layer, after_stage = case.flag("ft_proj_selector"), case.flag("fine_tune_after_block")
  model = simclr.Classifier(case.encoder, case.linear_head, case.projection_head, layer, after_stage)
  initial, (tx, rate) = case.variables(model, mesh), case.optimizer()
  before = jax.device_get(initial)
  trained = functools.partial(simclr.trained_part, model)
  state = state_lib.create(initial["params"], initial["batch_stats"], tx, trained)
  step_fn = small_step.jitted(objectives.Classification(model, case.decay), mesh, state, tx, rate)
  wanted = {"loss": "supervised_loss", "accuracy": "supervised_acc", "learning_rate": "learning_rate"}
  if CASES[name] == WHOLE:
    wanted |= {key: key for key in ("weight_decay", "total_loss", "grad_norm")}
  assert len(case.labels) == 4
  for t, (images, label) in enumerate(zip(case.images / np.float64(255), case.labels, strict=True)):
    state, metrics = step_fn(state, sharding.global_batch(mesh, {"image": images, "label": label}))
    for ours, theirs in wanted.items():
      value = case.get(theirs)[t]
      np.testing.assert_allclose(metrics[ours], value, rtol=1e-6, atol=1e-12, err_msg=f"{ours}, step {t}")
  assert case.assert_variables(before, state, CASES[name]) == (len(case.paths) if CASES[name] == WHOLE else 2)


def test_balanced_parts_keep_the_shares_of_classes_and_grow_by_adding():
  labels = np.random.default_rng(0).choice(5, 4000, p=[0.4, 0.3, 0.2, 0.08, 0.02])
  parts = [subset.balanced(labels, fraction, seed=3) for fraction in (0.001, 0.01, 0.1, 1.0)]
  for fraction, rows in zip((0.001, 0.01, 0.1, 1.0), parts, strict=True):
    wanted = [max(1, round(fraction * np.sum(labels == c))) for c in range(5)]
    assert [int(np.sum(labels[rows] == c)) for c in range(5)] == wanted
    assert np.all(np.diff(rows) > 0)
  for small, large in zip(parts, parts[1:], strict=False):
    assert set(small) <= set(large)
  assert not np.array_equal(parts[1], subset.balanced(labels, 0.01, seed=4))


def test_images_are_chosen_by_the_names_of_a_list(tmp_path):
  rng = np.random.default_rng(0)
  for kind in ("n01440764", "n01443537"):
    (tmp_path / "images" / kind).mkdir(parents=True)
    for i in range(3):
      image = Image.fromarray(rng.integers(0, 256, (20, 20, 3), np.uint8))
      image.save(tmp_path / "images" / kind / f"{kind}_{i}.JPEG")
  source = sources.load("folder", Request("train", data_dir=str(tmp_path / "images")))
  ids = tmp_path / "1percent.txt"
  ids.write_text("n01440764_2.JPEG\nn01443537_0.JPEG\n\n")
  rows = subset.listed(source.names(), str(ids))
  part = source.take(rows)
  assert part.names() == ("n01440764/n01440764_2.JPEG", "n01443537/n01443537_0.JPEG")
  np.testing.assert_array_equal(part.labels(), [0, 1])
  ids.write_text("n01440764_2.JPEG\nn01443537_9.JPEG\n")
  with pytest.raises(errors.UserError, match=r"1 of the 2 images .* \(first: n01443537_9.JPEG\)"):
    subset.listed(source.names(), str(ids))
  with pytest.raises(errors.UserError, match="no file"):
    subset.listed(source.names(), str(tmp_path / "absent.txt"))


def test_listed_images_of_one_name_are_told_apart_by_folder(tmp_path):
  names, ids = ("cat/1.png", "cat/2.png", "dog/1.png"), tmp_path / "ids.txt"
  for text, rows in (("cat/1.png", [0]), ("./dog/1.png\n2.png", [1, 2]), ("/data/train/cat/1.png", [0])):
    ids.write_text(text)
    np.testing.assert_array_equal(subset.listed(names, str(ids)), rows)
  ids.write_text("1.png")
  with pytest.raises(
    errors.UserError, match=r"names 1.png, and the split has cat/1.png and dog/1.png; list whole paths"
  ):
    subset.listed(names, str(ids))


def test_flops_by_module_are_those_of_the_whole():
  model = simclr.Classifier(resnet.ResNet(depth=10, width=0.25), heads.LinearHead(5), heads.ProjectionHead(2, 16), 1)
  image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
  variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), image)
  parts = cost.flops_by_module(model, variables, image, train=False)
  whole = cost.matrix_flops(lambda v, x: model.apply(v, x, train=False), variables, image)
  assert sum(parts.values()) == whole
  assert parts["encoder", "stem_conv1"] == 2 * 16 * 16 * 16 * 49 * 3


# The jobs, on the tiny network of all tests.


def options(*settings):
  return [f"--config.{text}" for text in settings]


def result_of(workdir):
  return json.loads((workdir / "result.json").read_text())


RATE = "finetune.optimizer.base_learning_rate"


@pytest.fixture(scope="session")
def tuned(pretrained, shared_folder):
  """A fine-tuning behind the head's first layer, the encoder frozen up to group 2. Nobody may write into it."""
  folder = shared_folder / "tuned"
  with runs.only_once(folder) as to_make:
    if to_make:
      # Enough steps at a rate that moves every weight of the tiny network.
      settings = ["head.finetune_from=1", "finetune.after_block=2", "labels.fraction=0.5", f"checkpoint={pretrained}"]
      job("finetune", folder, *options(*settings, "finetune.total_epochs=1.2", f"{RATE}=20"))
  return folder


def test_frozen_parts_keep_their_bits_and_the_first_layer_learns(pretrained, tuned):
  result = result_of(tuned)
  assert (result["layer"], result["after_block"], result["train_examples"]) == (1, 2, 40)
  before, after = (
    {name: x for name, x in runs.arrays(run).items() if "['model']" in name} for run in (pretrained, tuned)
  )
  for name, array in before.items():
    if "['encoder']" in name:
      frozen = any(f"['{stage}" in name for stage in ("stem_", "group1_", "group2_"))
      assert (array.tobytes() == after[name].tobytes()) == frozen, name
  head = [name for name in after if "['projection_head']" in name and "['params']" in name]
  moved = {name for name in head if np.any(before[name] != after[name])}
  assert moved == {name for name in head if "['dense1']" in name or "['bn1']" in name}
  assert checkpoint.open(str(tuned)).classifier_layer == 1
  assert checkpoint.open(str(pretrained)).classifier_layer == 0


@pytest.mark.slow
@pytest.mark.devices(2)
@pytest.mark.parametrize("name", ["finetune", "distill"])  # linear_eval trains as finetune does, by classifier.train.
def test_every_recipe_takes_micro_batches_and_sharded_parameters(request, pretrained, tmp_path, monkeypatch, name):
  monkeypatch.setattr(sharding, "SMALLEST_SPLIT", 2**8)
  states, create = [], state_lib.create
  monkeypatch.setattr(state_lib, "create", lambda *arguments: states.append(create(*arguments)) or states[-1])
  settings = [f"{name}.micro_batches=2", "sharding.parameters=sharded", f"{name}.total_epochs=0.1"]
  if name == "distill":
    settings += [f"distill.teacher={request.getfixturevalue('tuned')}", "distill.label_weight=0.5"]
  else:
    settings += [f"checkpoint={pretrained}"]
  job(name, tmp_path, *options(*settings))
  assert any(not leaf.is_fully_replicated for leaf in jax.tree.leaves(states[-1].params["encoder"]))
  assert result_of(tmp_path)["steps"] == 1
  row = training_rows(tmp_path)[1]
  assert np.isfinite(row["train/grad_norm"])
  if name == "finetune":
    # The classifier starts at zero: the first loss does not depend on the features, its gradient does, and so shows
    # that BatchNorm took its statistics over each part.
    whole = training_rows(request.getfixturevalue("finetuned"))[1]
    assert row["train/loss"] == pytest.approx(whole["train/loss"], rel=1e-6)
    assert row["train/grad_norm"] != pytest.approx(whole["train/grad_norm"], rel=1e-4)
    assert row["train/grad_norm"] == pytest.approx(whole["train/grad_norm"], rel=0.5)


LABELS = ("distill.label_weight=0.3", "labels.fraction=0.25")


def assert_student_of(tuned, workdir):
  """Checks the result of a distillation with the settings LABELS."""
  result, row = result_of(workdir), training_rows(workdir)[1]
  assert (result["train_examples"], result["labelled_examples"]) == (80, 20)
  wanted = 0.7 * row["train/distill_loss"] + 0.3 * row["train/supervised_loss"]
  assert row["train/loss"] == pytest.approx(wanted, rel=1e-5)
  assert checkpoint.open(str(workdir)).classes == checkpoint.open(str(tuned)).classes


@pytest.mark.slow
def test_a_student_learns_from_the_cached_logits_of_its_teacher(tuned, tmp_path):
  job("distill", tmp_path, *options(f"distill.teacher={tuned}", "distill.cache_teacher=true", *LABELS))
  assert_student_of(tuned, tmp_path)


@pytest.mark.slow
def test_a_student_beside_its_teacher_continues_bit_for_bit(tuned, tmp_path):
  settings = [f"distill.teacher={tuned}", "distill.cache_teacher=false", "distill.total_epochs=0.4", *LABELS]
  settings = options(*settings, "checkpoint_every_steps=1", "keep_checkpoints=9")
  job("distill", tmp_path, *settings)
  assert_student_of(tuned, tmp_path)
  whole, rows = runs.arrays(tmp_path), training_rows(tmp_path)
  assert set(rows) == {1, 2, 3}
  # As a kill after the second step leaves the folder: later rows may be there, a later checkpoint is not.
  shutil.rmtree(tmp_path / "checkpoints" / "3")
  (tmp_path / "result.json").unlink()
  job("distill", tmp_path, *settings)
  again = runs.arrays(tmp_path)
  assert again.keys() == whole.keys()
  assert all(again[name].tobytes() == whole[name].tobytes() for name in whole)
  assert training_rows(tmp_path) == rows


def test_a_stored_classifier_counts_as_when_it_was_trained(tuned, tmp_path):
  argv = [f"--config.checkpoint={tuned}", "--config.linear_eval.protocol=stored", f"--workdir={tmp_path}"]
  assert command.main(["linear_eval", *argv]) == 0
  ours, theirs = result_of(tmp_path), result_of(tuned)
  for name in ("eval/top1", "eval/balanced_top1", "eval/top5", "eval/examples", "layer"):
    assert ours[name] == theirs[name]
  assert ours["eval/loss"] == pytest.approx(theirs["eval/loss"], rel=1e-6)


@pytest.mark.slow
def test_without_a_config_the_student_is_built_like_the_teacher(tuned, tmp_path):
  argv = [f"--config.distill.teacher={tuned}", "--config.checkpoint=", f"--workdir={tmp_path}"]
  assert command.main(["distill", *argv, "--config.distill.images=labelled", "--config.labels.fraction=0.5"]) == 0
  ours, theirs = ({n: x.shape for n, x in runs.arrays(run).items() if "['model']" in n} for run in (tmp_path, tuned))
  assert ours == theirs
  assert result_of(tmp_path)["train_examples"] == 40


@pytest.mark.parametrize(
  ("name", "settings", "words"),
  [
    ("finetune", ["finetune.micro_batches=3"], "config.finetune.batch_size 16 in 3 micro-batches does not split"),
    ("finetune", ["finetune.micro_batches=0"], "micro_batches is 0; use 1"),
    ("finetune", ["head.finetune_from=3"], "config.head.finetune_from is 3 and the projection head has 2 layers"),
    ("finetune", ["finetune.after_block=5"], "config.finetune.after_block is 5"),
    ("finetune", ["labels.fraction=0"], "config.labels.fraction is 0"),
    ("finetune", ["labels.ids=absent.txt"], 'absent.txt" for config.labels.ids'),
    ("finetune", ["checkpoint=RUN", "model.width=0.25"], "config.model.width = 0.0625, not 0.25"),
    ("finetune", ["checkpoint=RUN", "head.layers=3", "head.finetune_from=1"], "config.head.layers = 2, not 3"),
    ("distill", [], "distill has no teacher"),
    ("distill", ["distill.teacher=RUN", "distill.temperature=0"], "config.distill.temperature is 0.0"),
    ("distill", ["distill.teacher=RUN", "distill.label_weight=2"], "config.distill.label_weight is 2.0"),
    ("distill", ["distill.teacher=RUN", "distill.images=some"], "config.distill.images is 'some'"),
    ("distill", ["distill.teacher=RUN", "data.image_size=20"], "trained at 16 pixels and the student sees 20"),
  ],
)
def test_what_does_not_fit_is_said_in_one_line(pretrained, tmp_path, capsys, name, settings, words):
  overrides = options(*(text.replace("RUN", str(pretrained)) for text in settings))
  assert command.main([name, *tiny(name), f"--workdir={tmp_path}", *overrides]) == 2
  assert words in capsys.readouterr().err
