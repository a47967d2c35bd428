"""The convert job: what the reference writes, by its command, to what every job here reads."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_writer
import weights_by_name
from flax import traverse_util
from hidden import hide
from orbax.checkpoint import v1 as ocp
from runs import job

import simclr_jax
from simclr_jax import __main__ as command
from simclr_jax import errors, inference
from simclr_jax.jobs import convert
from simclr_jax.models import heads, resnet, simclr
from simclr_jax.released import architecture
from simclr_jax.released import files as reference_files
from simclr_jax.released import names as reference
from simclr_jax.training import checkpoint

SMALL = dict(depth=10, width=0.0625, small_images=True)


def variables_of(*, layers=3, classes=10, linear=False, out_dim=16, **encoder):
  """Returns f32 variables by TF1 name of a network of ours."""
  shapes = shapes_of(layers=layers, classes=classes, linear=linear, out_dim=out_dim, **encoder)
  return {name: weights_by_name.variable(name, shape) for name, shape in shapes.items()}


def shapes_of(*, layers=3, classes=10, linear=False, out_dim=128, **encoder):
  head = heads.LinearHead(classes) if classes else None
  model = simclr.SimCLR(resnet.ResNet(**encoder), heads.ProjectionHead(layers, out_dim), head)
  images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
  tree = jax.eval_shape(lambda images: model.init(jax.random.key(0), images, train=False), images)
  selective, small = encoder.get("sk_ratio", 0) > 0, encoder.get("small_images", False)
  form = reference.Form(
    encoder["depth"],
    "small" if small else "three" if selective else "large",
    selective and encoder["depth"] in resnet.BOTTLENECK_BLOCKS,
    encoder.get("se_ratio", 0) > 0,
  )
  paths = reference.encoder_paths(reference.encoder_layers(**form._asdict()))
  paths |= reference.projection_paths(layers, linear=linear)
  paths |= reference.LINEAR_HEAD_PATHS if classes else {}
  flat = traverse_util.flatten_dict(tree)
  assert len(flat) == len(paths)
  return {name: flat[path].shape for name, path in paths.items()}


def run(source, workdir, *options) -> pathlib.Path:
  """Converts by the command, and returns the workdir."""
  assert command.main(["convert", f"--source={source}", f"--workdir={workdir}", *options]) == 0
  return pathlib.Path(workdir)


def fails(capsys, source, workdir, *options) -> str:
  """Returns the one line of a conversion that is a mistake."""
  capsys.readouterr()
  assert command.main(["convert", f"--source={source}", f"--workdir={workdir}", *options]) == 2
  lines = capsys.readouterr().err.strip().splitlines()
  assert len(lines) == 1, lines
  assert lines[0].startswith("simclr_jax: ")
  return lines[0]


def saved(workdir) -> dict[str, np.ndarray]:
  """Returns the model's arrays in the checkpoint, by path."""
  step = checkpoint.open(str(workdir)).path
  shapes = ocp.checkpointables_metadata(step).metadata[checkpoint.MODEL]
  here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), shapes)
  tree = ocp.load_checkpointables(step, {checkpoint.MODEL: abstract})[checkpoint.MODEL]
  return {"/".join(path): np.asarray(leaf) for path, leaf in traverse_util.flatten_dict(tree).items()}


def expected(variables) -> dict[str, np.ndarray]:
  flat = traverse_util.flatten_dict(convert.from_reference(variables))
  return {"/".join(path): leaf for path, leaf in flat.items()}


def same(ours, theirs) -> None:
  assert ours.keys() == theirs.keys()
  for name in ours:
    assert ours[name].dtype == np.float32, name
    np.testing.assert_array_equal(ours[name], theirs[name], name)


def fixture_variables(arrays):
  return weights_by_name.variables(
    arrays["variable_names"], arrays["variable_shapes"], str(arrays["name_prefix"]), np.float32
  )


def close(ours, theirs) -> None:
  np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * np.abs(theirs).max())


@pytest.fixture(scope="module")
def tiny():
  """Variables of a narrow ResNet-10 with both heads."""
  return variables_of(**SMALL)


def converted(arrays, folder, *options) -> pathlib.Path:
  """Returns the workdir of a conversion of a fixture's network, written as the reference writes it."""
  variables = reference_writer.with_training(fixture_variables(arrays))
  return run(reference_writer.write_folder(folder / "released", 250228, variables), folder / "run", *options)


@pytest.mark.slow
def test_the_encoder_and_heads_compute_what_the_reference_does(reference, tmp_path, monkeypatch):
  arrays = reference("resnet_r18_32")
  workdir = converted(arrays, tmp_path)
  # The fixture has fewer images than a batch.
  monkeypatch.setattr(inference, "BATCH", len(arrays["images"]))
  encode, config = simclr_jax.load_encoder(str(workdir))
  close(encode(arrays["images"]), arrays["infer__hidden0"])

  flat = {tuple(name.split("/")): value for name, value in saved(workdir).items()}
  tree = traverse_util.unflatten_dict(flat)
  head = {"params": tree["params"]["projection_head"], "batch_stats": tree["batch_stats"]["projection_head"]}
  h = jnp.asarray(arrays["infer__hidden0"], jnp.float32)
  layers = heads.ProjectionHead(config.head.layers, config.head.out_dim).apply(head, h, train=False)
  for number, layer in enumerate(layers):
    close(layer, arrays[f"infer__hidden{number}"])
  logits = heads.LinearHead(int(arrays["num_classes"])).apply({"params": tree["params"]["linear_head"]}, h)
  close(logits, arrays["infer__logits"])


# test_models compares what these networks compute, from the same variables.
@pytest.mark.slow
@pytest.mark.parametrize(
  "name", ["resnet_r18_32", *(pytest.param(f"resnet_{n}_64", marks=pytest.mark.slow) for n in ("r18", "r50_sk"))]
)
def test_a_network_of_the_reference_is_converted_to_the_bit(reference, tmp_path, name):
  arrays = reference(name)
  size = arrays["images"].shape[1]
  workdir = converted(arrays, tmp_path, f"--image_size={size}")
  same(saved(workdir), expected(fixture_variables(arrays)))
  config = checkpoint.open(str(workdir)).config
  assert config["model"]["depth"] == arrays["depth"]
  assert config["model"]["sk_ratio"] == arrays["sk_ratio"]
  assert config["data"]["image_size"] == size


@pytest.mark.slow
def test_tf2_s_files_hold_the_same_network(tmp_path, tiny):
  tf2 = reference_writer.TF2(tiny, depth=10, layers=3)
  same(saved(run(tf2.checkpoint(tmp_path / "model" / "ckpt"), tmp_path / "one")), expected(tiny))
  same(saved(run(tf2.saved_model(tmp_path / "exported"), tmp_path / "two")), expected(tiny))
  same(saved(run(tmp_path / "model", tmp_path / "three")), expected(tiny))


@pytest.mark.parametrize("norm", ["batch_normalization", "sync_batch_normalization"])
@pytest.mark.parametrize(
  ("encoder", "layers"),
  [
    (dict(depth=10, width=0.125), 1),
    (dict(depth=10, width=0.125, small_images=True, se_ratio=0.25), 2),
    (dict(depth=50, width=0.125, sk_ratio=0.0625), 3),
  ],
)
def test_tf2_s_names_are_read_for_every_kind_of_block(encoder, layers, norm):
  variables = variables_of(layers=layers, **encoder)
  tf2 = reference_writer.TF2(
    variables,
    depth=encoder["depth"],
    sk=encoder.get("sk_ratio", 0) > 0,
    se=encoder.get("se_ratio", 0) > 0,
    small=encoder.get("small_images", False),
    layers=layers,
    norm=norm,
  )
  names = {variable.name.removesuffix(":0"): variable.numpy() for variable in tf2.made}
  assert len(names) == len(variables)
  assert any("projection_head/nl_0/batch_norm_relu_" in name and f"/{norm}_" in name for name in names)
  found = reference_files.tf1_names(names)
  assert found.keys() == variables.keys()
  assert all(np.array_equal(found[name], variables[name]) for name in variables)


def test_names_that_count_on_from_an_earlier_network_are_read(tiny):
  names = reference_writer.numbered_from(tiny, 12)
  assert "resnet/block/conv2d_12/kernel" in names
  assert reference_files.tf1_names(dict.fromkeys(names)).keys() == tiny.keys()


def test_two_networks_in_a_file_are_told():
  names = ["resnet/conv2d/kernel", "ema/resnet/conv2d/kernel"]
  with pytest.raises(errors.UserError, match="resnet/conv2d/kernel.*both"):
    reference_files.tf1_names(dict.fromkeys(names))


SIZES = [
  dict(depth=50, width=4.0),
  dict(depth=50, width=2.0, sk_ratio=0.0625),
  dict(depth=101, width=1.0, sk_ratio=0.0625),
  pytest.param(dict(depth=152, width=3.0, sk_ratio=0.0625), marks=pytest.mark.slow),
  dict(depth=18, width=1.0, small_images=True),
  dict(depth=34, width=2.0),
  pytest.param(dict(depth=200, width=1.0, se_ratio=0.25), marks=pytest.mark.slow),
  dict(depth=50, width=2.0, sk_ratio=0.5, small_images=True),
  dict(depth=18, width=1.0, sk_ratio=0.0625),
  dict(depth=10, width=0.3, se_ratio=0.1),
]


@pytest.mark.slow
@pytest.mark.parametrize("encoder", SIZES, ids=lambda keys: "-".join(f"{value:g}" for value in keys.values()))
def test_the_config_s_network_is_that_of_the_shapes(encoder):
  shapes = shapes_of(classes=1000, **encoder)
  found = architecture.of(shapes)
  assert found.encoder == {"sk_ratio": 0.0, "se_ratio": 0.0, "small_images": False, **encoder}
  assert (found.layers, found.dims[-1], found.classes) == (3, 128, 1000)
  config = convert.config_of(found, 0)
  # Deeper networks have more of the same blocks, and take long to trace.
  if encoder["depth"] <= 50:
    convert.check(config, found, 0, shapes)
  small = encoder.get("small_images", False)
  assert config.data.image_size == (32 if small else 224)
  assert (config.data.name, config.data.eval_split) == ("imagenet2012", "validation")


def test_a_shape_that_no_network_has_is_named(tiny):
  shapes = {name: value.shape for name, value in tiny.items()}
  name = "base_model/conv2d_5/kernel"
  shapes[name] = (*shapes[name][:2], 7, shapes[name][3])
  found = architecture.of(shapes)
  with pytest.raises(errors.UserError, match=f'"{name}" has shape .* in ResNet-10, width 0.0625'):
    convert.check(convert.config_of(found, 0), found, 0, shapes)


@pytest.mark.parametrize("name", ["group3_block1/conv1", "group1_block1/squeeze_excite/reduce"])
def test_channels_of_no_width_or_ratio_are_told(name):
  shapes = shapes_of(depth=10, width=1.0, se_ratio=0.25)
  layers = reference.encoder_layers(10, stem="large", selective=False, squeeze=True)
  paths = {"/".join(path[2:-1]): name for name, path in reference.encoder_paths(layers).items() if path[-1] == "kernel"}
  shapes[paths[name]] = (*shapes[paths[name]][:3], 5)
  with pytest.raises(errors.UserError, match="no network of the reference"):
    architecture.of(shapes)


@pytest.mark.parametrize(
  ("kept", "parts"),
  [
    (dict(layers=0), ("encoder", "linear_head")),
    (dict(classes=0), ("encoder", "projection_head")),
    (dict(layers=0, classes=0), ("encoder",)),
    (dict(layers=1, linear=True), ("encoder", "linear_head", "projection_head")),
  ],
)
def test_what_is_absent_in_the_source_is_absent_in_the_checkpoint(tmp_path, kept, parts):
  variables = variables_of(**SMALL, **kept)
  workdir = run(reference_writer.write_tf1(tmp_path / "model.ckpt-1", variables), tmp_path / "run")
  assert {path.split("/")[1] for path in saved(workdir)} == set(parts)
  config = checkpoint.open(str(workdir)).config
  assert config["head"]["layers"] == kept.get("layers", 3)
  assert config["data"]["name"] == "cifar10"
  assert config["data"]["eval_split"] == "test"
  same(saved(workdir), expected(variables))


@pytest.mark.parametrize("form", ["scope", "suffix"])
def test_averages_are_taken_where_they_are_asked_for(tmp_path, tiny, form):
  everything, averages = reference_writer.with_averages(tiny, form)
  # The averages have optimizer slots of their own.
  rest = dict.fromkeys(["memory/memory", "ema_model/x/kernel/Momentum"], np.zeros(3, np.float32))
  everything = {**reference_writer.with_training(everything), **rest}
  source = reference_writer.write_tf1(tmp_path / "model.ckpt-1", everything)
  same(saved(run(source, tmp_path / "plain")), expected(tiny))
  same(saved(run(source, tmp_path / "ema", "--ema")), expected({**tiny, **averages}))
  contents = reference_files.read(source, ema=True)
  assert contents.left_out["step counters"] == 1
  assert contents.left_out["v2's memory of embeddings"] == 1
  assert contents.left_out["weights that have a moving average"] == len(averages)
  statistics = sum("moving_" in name for name in tiny)
  assert (f"{statistics} moving statistics" in contents.notes[0]) == (form == "suffix")
  assert contents.notes[-1] == "head_supervised has no moving averages: taken as it is"
  plain = reference_files.read(source, ema=False)
  assert plain.left_out["moving averages of weights (--ema takes these)"] == len(averages)
  assert not plain.notes


def test_averages_that_are_not_there_are_told(tmp_path, tiny, capsys):
  source = reference_writer.write_tf1(tmp_path / "a" / "model.ckpt-1", tiny)
  assert "leave --ema out" in fails(capsys, source, tmp_path / "run", "--ema")
  everything, _ = reference_writer.with_averages(tiny, "scope")
  del everything["ema_model/base_model/conv2d_3/kernel"]
  source = reference_writer.write_tf1(tmp_path / "b" / "model.ckpt-1", everything)
  assert '"base_model/conv2d_3/kernel" has no moving average' in fails(capsys, source, tmp_path / "run", "--ema")
  assert not (tmp_path / "run").exists()


def test_the_classifier_s_layer_travels_with_the_checkpoint(tmp_path, tiny, capsys):
  source = reference_writer.write_tf1(tmp_path / "model.ckpt-1", tiny)
  assert checkpoint.open(str(run(source, tmp_path / "0"))).classifier_layer == 0
  assert checkpoint.open(str(run(source, tmp_path / "1", "--classifier_layer=1"))).classifier_layer == 1
  assert "has 3 layers" in fails(capsys, source, tmp_path / "x", "--classifier_layer=4")
  # z has 16 numbers and the classifier reads 32.
  assert "give --classifier_layer=0 or 1 or 2" in fails(capsys, source, tmp_path / "x", "--classifier_layer=-1")
  assert "--classifier_layer got 'first'" in fails(capsys, source, tmp_path / "x", "--classifier_layer=first")
  headless = {name: value for name, value in tiny.items() if not name.startswith("head_supervised/")}
  source = reference_writer.write_tf1(tmp_path / "headless", headless)
  assert "no linear head" in fails(capsys, source, tmp_path / "x", "--classifier_layer=1")


def test_the_same_command_twice_is_harmless_and_another_one_refused(tmp_path, tiny, capsys):
  source = reference_writer.write_tf1(tmp_path / "model.ckpt-1", tiny)
  workdir = run(source, tmp_path / "run")
  before = saved(workdir)
  run(source, workdir)
  same(saved(workdir), before)
  # Other weights of the same shapes have the same config.
  other = {name: value + 1 for name, value in tiny.items()}
  other = reference_writer.write_tf1(tmp_path / "other", other)
  assert "holds another run: convert.weights" in fails(capsys, other, workdir)
  assert "holds another run: convert.layer" in fails(capsys, source, workdir, "--classifier_layer=1")
  same(saved(workdir), before)


def test_a_conversion_killed_before_its_save_is_done_by_the_next(tmp_path, tiny, monkeypatch):
  source = reference_writer.write_tf1(tmp_path / "model.ckpt-1", tiny)
  with monkeypatch.context() as patch:
    patch.setattr(checkpoint.Checkpoints, "save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert command.main(["convert", f"--source={source}", f"--workdir={tmp_path}/run"]) == 130
  assert json.loads((tmp_path / "run" / "config.json").read_text())["job"] == "convert"
  same(saved(run(source, tmp_path / "run")), expected(tiny))


def test_a_prefix_a_file_or_a_folder_names_the_checkpoint(tmp_path, tiny):
  folder = tmp_path / "released"
  reference_writer.write_folder(folder, 10, {"x": np.zeros(1, np.float32)})
  prefix = str(folder / "model.ckpt-20")
  reference_writer.write_folder(folder, 20, tiny)
  for source in (folder, f"{folder}/", prefix, f"{prefix}.index", f"{prefix}.data-00000-of-00001"):
    assert reference_files.read(str(source), ema=False).path == prefix


def test_a_hub_module_of_tf1_is_read(tmp_path, tiny):
  (tmp_path / "hub").mkdir()
  (tmp_path / "hub" / "saved_model.pb").write_bytes(b"")
  reference_writer.write_tf1(tmp_path / "hub" / "variables" / "variables", tiny)
  contents = reference_files.read(str(tmp_path / "hub"), ema=False)
  assert contents.form == "TF1 hub module"
  assert contents.variables.keys() == tiny.keys()


def test_a_source_that_is_none_is_one_line(tmp_path, tiny, capsys, monkeypatch):
  bad = lambda source, *options: fails(capsys, source, tmp_path / "run", *options)
  assert "does not exist" in bad(tmp_path / "nowhere")
  assert "holds no checkpoint" in bad(tmp_path)
  (tmp_path / "weights.pth").write_bytes(b"torch")
  assert "no TensorFlow checkpoint" in bad(tmp_path / "weights.pth")
  (tmp_path / "broken.index").write_bytes(b"nothing of the kind")
  assert "cannot be read as a checkpoint" in bad(tmp_path / "broken")
  prefix = reference_writer.write_tf1(tmp_path / "cut" / "model.ckpt-1", tiny)
  data = pathlib.Path(f"{prefix}.data-00000-of-00001")
  data.write_bytes(data.read_bytes()[:-1000])
  assert "is it complete?" in bad(prefix)
  data.unlink()
  assert "is it complete?" in bad(prefix)
  for number in (1, 2):
    reference_writer.write_tf1(tmp_path / "several" / f"model.ckpt-{number}", tiny)
  assert "2 checkpoints (model.ckpt-1, model.ckpt-2)" in bad(tmp_path / "several")
  (tmp_path / "exported").mkdir()
  (tmp_path / "exported" / "saved_model.pb").write_bytes(b"")
  assert "variables/variables.index" in bad(tmp_path / "exported")
  assert not (tmp_path / "run").exists()
  hide(monkeypatch, "tensorflow")
  assert "TensorFlow, which is not installed" in bad(prefix)


def test_variables_that_do_not_fit_are_one_line(tmp_path, tiny, capsys):
  def bad(variables, *options):
    source = reference_writer.write_tf1(tmp_path / "source" / "model.ckpt-1", variables)
    return fails(capsys, source, tmp_path / "run", *options)

  name = "base_model/batch_normalization_3/gamma"
  assert f'"{name}" is missing' in bad({key: value for key, value in tiny.items() if key != name})
  assert 'unknown variable "head_other/kernel"' in bad({**tiny, "head_other/kernel": np.zeros(3, np.float32)})
  heads_alone = {key: value for key, value in tiny.items() if not key.startswith("base_model/")}
  assert "no encoder" in bad(heads_alone)
  assert "no variables" in bad({"global_step": np.int64(3)})
  odd = {**tiny, "base_model/conv2d/kernel": np.zeros((5, 5, 3, 8), np.float32)}
  assert "no ResNet of depth" in bad(odd)
  assert "--ema=no; give --ema alone" in bad(tiny, "--ema=no")
  assert "--image_size got '0'" in bad(tiny, "--image_size=0")


def test_no_source_is_one_line(tmp_path, capsys):
  assert command.main(["convert", f"--workdir={tmp_path}"]) == 2
  assert "no --source" in capsys.readouterr().err


def test_the_report_says_what_was_found(tmp_path, tiny, capsys):
  everything = reference_writer.with_training(tiny)
  run(reference_writer.write_tf1(tmp_path / "model.ckpt-1", everything), tmp_path / "run", "--classifier_layer=1")
  text = capsys.readouterr().err
  encoder = sum(v.size for n, v in tiny.items() if n.startswith("base_model/") and "moving_" not in n)
  slots = sum("moving_" not in name for name in tiny)
  for part in (
    f"ResNet-10, width 0.0625, stem for small images: {encoder:,} parameters; 32 pixels",
    "3 layers to 16",
    "10 classes, reads layer 1 of the projection head",
    f"{slots} optimizer slots, 1 step counters",
  ):
    assert part in text, text


@pytest.mark.slow
def test_jobs_read_what_was_converted(tmp_path):
  # The network of the other jobs' tests, whose programs are compiled already.
  variables = variables_of(**SMALL, layers=2, out_dim=8)
  source = reference_writer.write_tf1(tmp_path / "model.ckpt-1", variables)
  workdir = run(source, tmp_path / "run", "--image_size=16")
  # A frozen encoder with its head, parameters that learn, and a classifier: the other jobs read it as one of these.
  job("knn", tmp_path / "knn", f"--config.checkpoint={workdir}", "--config.head.evaluate_from=1")
  job("finetune", tmp_path / "finetune", f"--config.checkpoint={workdir}")
  job("distill", tmp_path / "distill", f"--config.distill.teacher={workdir}")
