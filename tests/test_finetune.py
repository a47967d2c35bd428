"""Fine-tuning: the reference's four-step trajectories, what is frozen, and which labels are used."""

import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import weights_by_name
from flax import traverse_util
from orbax.checkpoint import v1 as ocp
from PIL import Image

from simclr_jax import __main__ as command
from simclr_jax import errors, optim
from simclr_jax.data import arrays, sources, subset
from simclr_jax.hardware import cost, sharding
from simclr_jax.jobs import classifier, convert
from simclr_jax.models import heads, resnet, simclr
from simclr_jax.released import names as reference
from simclr_jax.training import checkpoint
from simclr_jax.training import state as state_lib

# Which variables the issue of TF1's and TF2's oddities leaves comparable; see the fixtures' description.
WHOLE, HEAD = "", "head_supervised"
CASES = {"linear_frozen_bn": WHOLE, "linear_frozen_bn_wd": HEAD, "finetune_selector1_lars": WHOLE}


def trajectory(array, case):
  """Returns the metrics of each step of a case, its variables before and after by path, and the paths by name."""
  get = lambda key: array[f"{case}__{key}"]
  flag = lambda key: get(f"flag_{key}").item()
  types = {"dtype": jnp.float64, "param_dtype": jnp.float64}
  classes = 10
  model = simclr.Classifier(
    resnet.ResNet(depth=flag("resnet_depth"), small_images=True, **types),
    heads.LinearHead(classes, **types),
    heads.ProjectionHead(layers=flag("num_proj_layers"), **types),
    layer=flag("ft_proj_selector"),
    after_block=flag("fine_tune_after_block"),
  )
  size = flag("image_size")
  tree = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), jnp.zeros((1, size, size, 3)))
  layers = reference.encoder_layers(flag("resnet_depth"), stem="small", selective=False, squeeze=False)
  paths = (
    reference.encoder_paths(layers) | reference.projection_paths(flag("num_proj_layers")) | reference.LINEAR_HEAD_PATHS
  )
  mesh = sharding.data_mesh(jax.devices()[:1])
  initial = convert.from_reference(weights_by_name.of_network(tree, paths, get("name_prefix").item()))
  initial = jax.device_put(jax.tree.map(jnp.asarray, initial), sharding.replicated(mesh))

  examples, batch = get("n_train").item(), get("batch").item()
  rate = optim.schedule(
    base_learning_rate=flag("learning_rate"),
    batch_size=batch,
    scaling=flag("learning_rate_scaling"),
    warmup_steps=optim.warmup_steps(examples, flag("warmup_epochs"), batch),
    total_steps=optim.total_steps(examples, flag("train_epochs"), batch),
  )
  decay = flag("weight_decay")
  tx = optim.lars(rate, weight_decay=decay) if flag("optimizer") == "lars" else optim.momentum(rate)
  step = functools.partial(
    classifier.train_step, model=model, tx=tx, schedule=rate, weight_decay=decay, optimizer=flag("optimizer")
  )
  step = jax.jit(step)
  trained = functools.partial(simclr.trained_part, model)
  state = state_lib.create(initial["params"], initial["batch_stats"], tx, trained)
  rows = []
  for images, label in zip(array["images"], array["labels"], strict=True):
    given = {"image": images.astype(np.float64) / 255, "label": label.astype(np.int32)}
    state, metrics = step(state, jax.device_put(given, sharding.batched(mesh)))
    rows.append(jax.device_get(metrics))
  flat = lambda params, batch_stats: traverse_util.flatten_dict({"params": params, "batch_stats": batch_stats})
  return rows, flat(initial["params"], initial["batch_stats"]), flat(state.params, state.batch_stats), paths


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_four_steps_are_the_reference_s(reference_arrays, x64, case):
  get = lambda key: reference_arrays[f"{case}__{key}"]
  rows, before, after, paths = trajectory(reference_arrays, case)
  wanted = {"loss": "supervised_loss", "accuracy": "supervised_acc", "learning_rate": "learning_rate"}
  if CASES[case] == WHOLE:
    wanted |= {key: key for key in ("weight_decay", "total_loss", "grad_norm")}
  for step, row in enumerate(rows):
    for ours, theirs in wanted.items():
      np.testing.assert_allclose(row[ours], get(theirs)[step], rtol=1e-6, atol=1e-12, err_msg=f"{ours}, step {step}")
  compared = [(i, name) for i, name in enumerate(get("variable_names")) if name.startswith(CASES[case])]
  assert len(compared) == (len(get("variable_names")) if CASES[case] == WHOLE else 2)
  for i, name in compared:
    ours, start = np.asarray(after[paths[name]]), np.asarray(before[paths[name]])
    np.testing.assert_allclose(np.linalg.norm(ours), get("final_norm")[i], rtol=1e-6, err_msg=name)
    change = np.linalg.norm(ours - start)
    np.testing.assert_allclose(change, get("change_norm")[i], rtol=1e-6, err_msg=name)
    first = ours.ravel()[:4]
    np.testing.assert_allclose(first, get("final_first4")[i][: len(first)], rtol=1e-6, atol=1e-9, err_msg=name)
    if get("first_step_grad_norm")[i] == -1 and "moving" not in name:
      assert change == 0, f"{name} is frozen"


@pytest.fixture(scope="module")
def reference_arrays():
  from conftest import FIXTURES

  return dict(np.load(FIXTURES / "finetune_steps.npz"))


def test_a_balanced_part_has_the_same_share_of_every_class_and_grows_by_adding():
  labels = np.random.default_rng(0).choice(5, 4000, p=[0.4, 0.3, 0.2, 0.08, 0.02])
  parts = [subset.balanced(labels, fraction, seed=3) for fraction in (0.001, 0.01, 0.1, 1.0)]
  for fraction, rows in zip((0.001, 0.01, 0.1, 1.0), parts, strict=True):
    wanted = [max(1, round(fraction * np.sum(labels == c))) for c in range(5)]
    assert [int(np.sum(labels[rows] == c)) for c in range(5)] == wanted
    assert np.all(np.diff(rows) > 0)
  for small, large in zip(parts, parts[1:], strict=False):
    assert set(small) <= set(large)
  assert not np.array_equal(parts[1], subset.balanced(labels, 0.01, seed=4))


@pytest.mark.parametrize("cache", [True, False])
def test_a_part_of_a_stored_data_set_is_these_examples(tfds_dir, cache):
  source = sources.load("tfds", name="imagenet2012", split="validation", data_dir=tfds_dir, cache=cache)
  labels, names = sources.labels_of(source), sources.names_of(source)
  rows = np.array([0, 5, 17, 40])
  part = subset.take(source, rows)
  assert part.num_examples == 4
  np.testing.assert_array_equal(sources.labels_of(part), labels[rows])
  assert sources.names_of(part) == tuple(names[row] for row in rows)


def test_images_are_chosen_by_the_names_of_a_list(tmp_path):
  rng = np.random.default_rng(0)
  for kind in ("n01440764", "n01443537"):
    (tmp_path / "images" / kind).mkdir(parents=True)
    for i in range(3):
      image = Image.fromarray(rng.integers(0, 256, (20, 20, 3), np.uint8))
      image.save(tmp_path / "images" / kind / f"{kind}_{i}.JPEG")
  source = sources.load("folder", split="train", data_dir=str(tmp_path / "images"))
  ids = tmp_path / "1percent.txt"
  ids.write_text("n01440764_2.JPEG\nn01443537_0.JPEG\n\n")
  rows = subset.listed(subset.names_of(source), str(ids))
  part = subset.take(source, rows)
  assert part.names == ("n01440764/n01440764_2.JPEG", "n01443537/n01443537_0.JPEG")
  np.testing.assert_array_equal(subset.labels_of(part), [0, 1])
  ids.write_text("n01440764_2.JPEG\nn01443537_9.JPEG\n")
  with pytest.raises(errors.UserError, match=r"1 of the 2 images .* \(first: n01443537_9.JPEG\)"):
    subset.listed(subset.names_of(source), str(ids))
  with pytest.raises(errors.UserError, match="no file"):
    subset.listed(subset.names_of(source), str(tmp_path / "absent.txt"))


def test_a_part_of_resident_arrays_keeps_their_names():
  whole = arrays.Arrays(
    "a", np.arange(24, dtype=np.uint8).reshape(2, 2, 2, 3), np.array([1, 0]), ("x", "y"), ("p", "q")
  )
  part = subset.take(whole, np.array([1]))
  assert part.names == ("q",)
  np.testing.assert_array_equal(part.images, whole.images[1:])
  np.testing.assert_array_equal(part.labels, [0])


def test_flops_by_module_are_those_of_the_whole():
  model = simclr.Classifier(resnet.ResNet(depth=10, width=0.25), heads.LinearHead(5), heads.ProjectionHead(2, 16), 1)
  image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
  variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), image)
  parts = cost.flops_by_module(model, variables, image, train=False)
  whole = cost.matrix_flops(lambda v, x: model.apply(v, x, train=False), variables, image)
  assert sum(parts.values()) == whole
  assert parts["encoder", "stem_conv1"] == 2 * 16 * 16 * 16 * 49 * 3


# The job, on a network that compiles in seconds.

TINY = (
  "--config=configs/demo.py",
  "--config.data.examples=200",
  "--config.data.image_size=16",
  "--config.model.width=0.125",
  "--config.head.out_dim=16",
  "--config.batch_size=16",
  "--config.eval_batch_size=40",
  "--config.finetune.batch_size=16",
  "--config.finetune.total_epochs=0.5",
  "--config.distill.batch_size=16",
  "--config.distill.total_epochs=0.2",
  "--config.log_every_steps=2",
  "--config.total_steps=3",
  "--config.evaluate_every_epochs=0",
  "--config.monitor.knn_images=0",
  "--config.monitor.pairs=0",
)


def job(name, workdir, *settings, code=0):
  assert command.main([name, *TINY, f"--workdir={workdir}", *settings]) == code
  return json.loads((workdir / "result.json").read_text()) if code == 0 else None


def arrays_of(workdir):
  """Returns the model's arrays of a run's last checkpoint, by path."""
  step = checkpoint.find(str(workdir))
  saved = ocp.checkpointables_metadata(step).metadata[checkpoint.MODEL]
  here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), saved)
  loaded = ocp.load_checkpointables(step, {checkpoint.MODEL: abstract})[checkpoint.MODEL]
  return traverse_util.flatten_dict(jax.tree.map(np.asarray, loaded), sep="/")


shares_a_run = pytest.mark.xdist_group("finetune")


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("finetune") / "pretrained"
  job("pretrain", workdir)
  return workdir


@pytest.fixture(scope="module")
def tuned(pretrained, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("finetune") / "tuned"
  settings = ["--config.head.finetune_from=1", "--config.finetune.after_block=2", "--config.labels.fraction=0.5"]
  result = job("finetune", workdir, f"--config.checkpoint={pretrained}", *settings)
  assert (result["layer"], result["after_block"], result["train_examples"]) == (1, 2, 100)
  return workdir


@shares_a_run
def test_what_is_frozen_leaves_bit_for_bit_and_the_head_s_first_layer_learns(pretrained, tuned):
  before, after = arrays_of(pretrained), arrays_of(tuned)
  for name, array in before.items():
    if "/encoder/" not in name:
      continue
    frozen = resnet.group_of(name.split("/")[2]) <= 2  # collection/encoder/module/...
    assert (array.tobytes() == after[name].tobytes()) == frozen, name
  moved = {name for name in after if "/projection_head/" in name and np.any(before[name] != after[name])}
  assert {name.split("/")[2] for name in moved if name.startswith("params")} == {"dense1", "bn1"}
  assert checkpoint.classifier_layer(str(tuned)) == 1
  assert checkpoint.classifier_layer(str(pretrained)) == 0


@shares_a_run
@pytest.mark.parametrize("cached", ["true", "false"])
def test_a_student_learns_from_a_tuned_teacher(tuned, tmp_path, cached):
  settings = [f"--config.distill.teacher={tuned}", f"--config.distill.cache_teacher={cached}"]
  settings += ["--config.distill.label_weight=0.3", "--config.labels.fraction=0.1", "--config.model.depth=10"]
  result = job("distill", tmp_path, *settings, "--config.model.width=0.0625")
  assert result["labelled_examples"] == 20
  assert result["train_examples"] == 200
  rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  row = next(row for row in rows if "train/loss" in row)
  wanted = 0.7 * row["train/distill_loss"] + 0.3 * row["train/supervised_loss"]
  assert row["train/loss"] == pytest.approx(wanted, rel=1e-5)
  assert checkpoint.classes(str(tmp_path)) == 10


@shares_a_run
def test_a_student_that_was_stopped_goes_on_bit_for_bit(tuned, tmp_path):
  settings = [f"--config.distill.teacher={tuned}", "--config.model.width=0.0625", "--config.distill.total_epochs=0.3"]
  settings += ["--config.checkpoint_every_steps=1", "--config.keep_checkpoints=9", "--config.log_every_steps=1"]
  job("distill", tmp_path, *settings)
  whole, rows = arrays_of(tmp_path), (tmp_path / "metrics.jsonl").read_text().splitlines()
  # As a kill after the second step leaves the folder: later rows may be there, a later checkpoint is not.
  for step in (tmp_path / "checkpoints").iterdir():
    if int(step.name) > 2:
      shutil.rmtree(step)
  (tmp_path / "result.json").unlink()
  job("distill", tmp_path, *settings)
  again = arrays_of(tmp_path)
  assert again.keys() == whole.keys()
  assert all(again[name].tobytes() == whole[name].tobytes() for name in whole)
  losses = lambda lines: [json.loads(line).get("train/loss") for line in lines]
  assert losses((tmp_path / "metrics.jsonl").read_text().splitlines()) == losses(rows)


@shares_a_run
def test_a_stored_classifier_counts_as_it_did_when_it_was_trained(tuned, tmp_path):
  argv = [f"--config.checkpoint={tuned}", "--config.linear_eval.protocol=stored", f"--workdir={tmp_path}"]
  assert command.main(["linear_eval", *argv]) == 0
  ours, theirs = (json.loads((folder / "result.json").read_text()) for folder in (tmp_path, tuned))
  for name in ("eval/top1", "eval/top5", "eval/examples", "layer"):
    assert ours[name] == theirs[name]
  assert ours["eval/loss"] == pytest.approx(theirs["eval/loss"], rel=1e-6)


@shares_a_run
def test_without_a_config_the_student_is_the_teacher_s_like(tuned, tmp_path):
  argv = [f"--config.distill.teacher={tuned}", "--config.checkpoint=", f"--workdir={tmp_path}"]
  assert command.main(["distill", *argv, "--config.distill.images=labelled"]) == 0
  ours, theirs = arrays_of(tmp_path), arrays_of(tuned)
  assert {name: array.shape for name, array in ours.items()} == {name: array.shape for name, array in theirs.items()}
  assert json.loads((tmp_path / "result.json").read_text())["train_examples"] == 100


@shares_a_run
@pytest.mark.parametrize(
  ("name", "settings", "words"),
  [
    ("finetune", ["head.finetune_from=3"], "config.head.finetune_from is 3 and the projection head has 2 layers"),
    ("finetune", ["finetune.after_block=5"], "config.finetune.after_block is 5"),
    ("finetune", ["labels.fraction=0"], "config.labels.fraction is 0"),
    ("finetune", ["labels.ids=absent.txt"], 'no file "absent.txt"'),
    ("finetune", ["checkpoint=RUN", "model.width=0.25"], "config.model.width = 0.125, not 0.25"),
    ("finetune", ["checkpoint=RUN", "head.layers=3", "head.finetune_from=1"], "config.head.layers = 2, not 3"),
    ("distill", [], "distill has no teacher"),
    ("distill", ["distill.teacher=RUN", "distill.temperature=0"], "config.distill.temperature is 0.0"),
    ("distill", ["distill.teacher=RUN", "distill.label_weight=2"], "config.distill.label_weight is 2.0"),
    ("distill", ["distill.teacher=RUN", "distill.images=some"], "config.distill.images is 'some'"),
    ("distill", ["distill.teacher=RUN", "data.image_size=20"], "trained at 16 pixels and the student sees 20"),
  ],
)
def test_what_does_not_fit_is_said_in_one_line(pretrained, tmp_path, capsys, name, settings, words):
  job(name, tmp_path, *(f"--config.{text.replace('RUN', str(pretrained))}" for text in settings), code=2)
  assert words in capsys.readouterr().err
