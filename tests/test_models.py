"""Tests of the encoder and its heads, against the reference's outputs and by their properties."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import weights_by_name
from flax import traverse_util

from simclr_jax import errors
from simclr_jax.jobs import convert
from simclr_jax.models import convolution, heads, layers, resnet, simclr
from simclr_jax.released import names as reference_names

FIXTURES = [
  "resnet_r18_32",
  "resnet_r18_64",
  pytest.param("resnet_r50_64", marks=pytest.mark.slow),
  pytest.param("resnet_r50_sk_64", marks=pytest.mark.slow),
]
# In float64 the others compile in half the time with XLA's convolution, which test_convolution.py compares ours with.
OWN_CONVOLUTION = "resnet_r18_32"
FLOAT32 = layers.Layers(jnp.float32, jnp.float32)
ENDPOINTS = ["initial_conv", "initial_max_pool", "final_avg_pool"] + [f"block_group{group}" for group in (1, 2, 3, 4)]


@pytest.fixture
def xlas_convolution(monkeypatch):
  """Builds networks with XLA's own convolution."""
  monkeypatch.setattr(convolution, "convolve", lambda *args, **kwargs: jax.lax.conv_general_dilated(*args, **kwargs))


class EveryOutput(simclr.SimCLR):
  """SimCLR that returns all layers of the projection head, and the classifier on h."""

  def __call__(self, images, *, train):
    h = self.encoder(images, train=train)
    return self.projection_head(h, train=train), self.linear_head(h)


def converted(arrays, dtype):
  given = weights_by_name.variables(
    arrays["variable_names"], arrays["variable_shapes"], str(arrays["name_prefix"]), dtype
  )
  return given, convert.from_reference(given)


def run(arrays, variables, dtype):
  """Returns `{mode: (hiddens, logits, endpoints, batch_stats after)}` of a fixture's network."""
  kwargs = {"dtype": dtype, "param_dtype": dtype}
  model = EveryOutput(
    resnet.ResNet(
      int(arrays["depth"]),
      width=float(arrays["width_multiplier"]),
      sk_ratio=float(arrays["sk_ratio"]),
      small_images=bool(arrays["cifar_stem"]),
      **kwargs,
    ),
    heads.ProjectionHead(int(arrays["num_proj_layers"]), **kwargs),
    heads.LinearHead(int(arrays["num_classes"]), **kwargs),
  )

  @jax.jit
  def both(variables, images):
    result = {}
    for mode in ("infer", "train"):
      (hiddens, logits), state = model.apply(
        variables, images, train=mode == "train", mutable=["batch_stats", "intermediates"]
      )
      endpoints = {name: state["intermediates"]["encoder"][name][0] for name in ENDPOINTS}
      result[mode] = (hiddens, logits, endpoints, state["batch_stats"])
    return result

  return jax.device_get(both(variables, arrays["images"]))


def largest_error(actual, expected):
  return np.max(np.abs(actual - expected)) / np.max(np.abs(expected))


@pytest.mark.slow
@pytest.mark.parametrize("name", FIXTURES)
def test_outputs_endpoints_and_moving_averages_equal_the_references(x64, reference, name, request):
  if name != OWN_CONVOLUTION:
    request.getfixturevalue("xlas_convolution")
  arrays = reference(name)
  given, variables = converted(arrays, np.float64)
  result = run(arrays, variables, jnp.float64)
  assert all(leaf.dtype == np.float64 for leaf in jax.tree.leaves(result))
  for mode, (hiddens, logits, endpoints, _) in result.items():
    assert len(hiddens) == int(arrays["num_proj_layers"]) + 1
    for number, hidden in enumerate(hiddens):
      assert largest_error(hidden, arrays[f"{mode}__hidden{number}"]) < 1e-9
    assert largest_error(logits, arrays[f"{mode}__logits"]) < 1e-9
    for endpoint, value in endpoints.items():
      stored = {key: arrays[f"{mode}__{endpoint}__{key}"] for key in ("mean", "std", "shape")}
      assert value.shape == tuple(stored["shape"])
      np.testing.assert_allclose(value.mean(), stored["mean"], rtol=1e-9)
      np.testing.assert_allclose(value.std(), stored["std"], rtol=1e-9)
      first = value.ravel()[:8]
      np.testing.assert_allclose(first, arrays[f"{mode}__{endpoint}__first8"], rtol=1e-9, atol=1e-9)
  paths = reference_names.paths({name: value.shape for name, value in given.items()})
  for number in range(3):
    for statistic in ("moving_mean", "moving_variance"):
      _, *path = paths[f"{arrays[f'bn{number}__name']}/{statistic}"]
      # The reference keeps the update weight, 0.1, as a float32 number.
      expected = arrays[f"bn{number}__{statistic}_after"]
      assert largest_error(leaf_at(result["train"][3], path), expected) < 1e-7
  jax.tree.map(np.testing.assert_array_equal, result["infer"][3], variables["batch_stats"])


def leaf_at(tree, path):
  return functools.reduce(lambda node, key: node[key], path, tree)


@pytest.mark.parametrize("name", FIXTURES)
def test_weights_made_from_names_are_those_of_the_fixtures(reference, name):
  arrays = reference(name)
  given, _ = converted(arrays, np.float32)
  actual = [weights_by_name.checksum(value) for value in given.values()]
  np.testing.assert_array_equal(actual, arrays["variable_crc32"])


@pytest.mark.slow
@pytest.mark.optimized
@pytest.mark.parametrize("name", ["resnet_r18_32", "resnet_r50_sk_64"])
def test_in_float32_outputs_differ_by_no_more_than_rounding(reference, name):
  arrays = reference(name)
  _, variables = converted(arrays, np.float32)
  for mode, (hiddens, logits, _, _) in run(arrays, variables, jnp.float32).items():
    outputs = {f"hidden{number}": hidden for number, hidden in enumerate(hiddens)}
    for key, value in (outputs | {"logits": logits}).items():
      assert value.dtype == np.float32
      tolerance = 10 * arrays[f"{mode}__{key}__float32_error"]
      assert largest_error(value, arrays[f"{mode}__{key}"]) < tolerance


def abstract(module, *inputs, **kwargs):
  key = jax.random.key(0)
  return jax.eval_shape(lambda *inputs: module.init(key, *inputs, **kwargs), *inputs)


def count(tree):
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


SK = {"sk_ratio": 0.0625}


@pytest.mark.slow
@pytest.mark.parametrize(
  ("encoder", "parameters"),
  [
    (dict(depth=18), 11_180_736),
    (dict(depth=18, width=2), 44_684_672),
    (dict(depth=18, small_images=True), 11_173_056),
    (dict(depth=34), 21_288_896),
    (dict(depth=34, width=2), 85_102_464),
    (dict(depth=50), 23_508_032),
    (dict(depth=50, **SK), 35_215_584),
    (dict(depth=50, width=2), 93_907_072),
    (dict(depth=50, width=2, **SK), 140_306_048),
    (dict(depth=50, width=3), 211_197_120),
    (dict(depth=50, width=4), 375_378_176),
    (dict(depth=50, small_images=True), 23_500_352),
    (dict(depth=50, se_ratio=0.25), 26_039_024),
    (dict(depth=101), 42_500_160),
    (dict(depth=101, width=2), 169_771_136),
    (dict(depth=152), 58_143_808),
    (dict(depth=152, width=3, **SK), 794_704_160),
    (dict(depth=200), 62_624_832),
  ],
)
def test_an_encoder_has_the_published_number_of_parameters(encoder, parameters):
  images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
  assert count(abstract(resnet.ResNet(**encoder), images, train=False)["params"]) == parameters


def test_a_fractional_width_rounds_the_channels_of_every_group():
  assert [resnet.channels(base, 0.3) for base in (32, 64, 128, 256, 512)] == [10, 19, 38, 77, 154]
  assert resnet.channels(64, 0.001) == 1


@pytest.mark.parametrize(
  ("dim", "layers", "parameters"),
  [
    (512, 3, 592_000),
    (2048, 3, 8_659_072),
    (4096, 3, 34_095_232),
    (6144, 3, 76_308_608),
    (8192, 3, 135_299_200),
    (512, 2, 328_832),
    (2048, 2, 4_460_672),
    (2048, 1, 2048 * 128 + 128),
  ],
)
def test_a_projection_head_has_the_references_number_of_parameters(dim, layers, parameters):
  h = jax.ShapeDtypeStruct((2, dim), jnp.float32)
  assert count(abstract(heads.ProjectionHead(layers), h, train=True)["params"]) == parameters


@pytest.mark.parametrize("count", [0, 1, 2, 4])
def test_a_projection_head_returns_h_and_every_layer(count):
  h = jnp.linspace(-1, 1, 24).reshape(4, 6)
  head = heads.ProjectionHead(count, out_dim=5)
  outputs, _ = head.apply(filled(head, h), h, train=True, mutable=["batch_stats"])
  assert [output.shape for output in outputs] == [(4, 6)] * max(1, count) + [(4, 5)] * (count > 0)
  assert outputs[0] is h
  for hidden in outputs[1:-1]:
    assert hidden.min() == 0
  if count:
    assert outputs[-1].min() < 0


def narrow(classes=5, depth=10, **kwargs):
  dtypes = {key: value for key, value in kwargs.items() if key in ("dtype", "param_dtype")}
  return simclr.SimCLR(
    resnet.ResNet(depth, width=0.125, small_images=True, **kwargs),
    heads.ProjectionHead(2, out_dim=16, **dtypes),
    heads.LinearHead(classes, **dtypes) if classes else None,
  )


def images_like(shape=(4, 16, 16, 3), seed=0):
  return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def initial(module, *inputs, **kwargs):
  return jax.jit(functools.partial(module.init, **kwargs))(jax.random.key(0), *inputs)


def filled(module, *inputs):
  return weights_by_name.filled(abstract(module, *inputs, train=True))


@pytest.mark.slow
def test_a_fresh_network_is_initialised_as_the_references():
  model = simclr.SimCLR(resnet.ResNet(10, width=0.5), heads.ProjectionHead(2), heads.LinearHead(100))
  params = initial(model, np.zeros((1, 32, 32, 3), np.float32), train=False)["params"]
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    if name.endswith("scale"):
      assert np.all(leaf == (0 if "block1/bn2" in name else 1)), name
    elif name.endswith("bias"):
      assert np.all(leaf == 0), name
    elif "encoder" in name:
      # LeCun's truncated normal: cut at two standard deviations of the normal before cutting.
      std = 1 / math.sqrt(math.prod(leaf.shape[:-1]))
      np.testing.assert_allclose(leaf.std(), std, rtol=4 / math.sqrt(leaf.size), err_msg=name)
      assert np.abs(leaf).max() < 2 * std / 0.8796, name
    else:
      np.testing.assert_allclose(leaf.std(), 0.01, rtol=0.05, err_msg=name)
      assert np.abs(leaf).max() > 0.03, name


@pytest.mark.parametrize("bottleneck", [False, True])
def test_a_fresh_block_passes_its_shortcut_through(bottleneck):
  x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 4, 8)), jnp.float32)
  block = resnet.Block(
    filters=2 if bottleneck else 8,
    stride=1,
    bottleneck=bottleneck,
    project=False,
    sk_ratio=0,
    se_ratio=0,
    make=FLOAT32,
  )
  variables = initial(block, x, train=False)
  np.testing.assert_array_equal(block.apply(variables, x, train=False), jnp.maximum(x, 0))


def test_a_linear_head_can_start_at_zero():
  h = jnp.ones((2, 8))
  logits, _ = heads.LinearHead(3, zero_init=True).init_with_output(jax.random.key(0), h)
  np.testing.assert_array_equal(logits, np.zeros((2, 3)))


@pytest.mark.parametrize("depth", [10, 18, 34])
def test_selective_kernels_change_only_stem_and_shortcuts_of_basic_blocks(depth):
  images = jax.ShapeDtypeStruct((2, 37, 50, 3), jnp.float32)
  kwargs = dict(depth=depth, width=0.125)
  plain = abstract(resnet.ResNet(**kwargs), images, train=True)
  selective = abstract(resnet.ResNet(**kwargs, sk_ratio=0.0625), images, train=True)
  for tree in (plain, selective):
    for collection in tree.values():
      for name in [name for name in collection if name.startswith("stem")]:
        del collection[name]
  assert jax.tree.map(jnp.shape, plain) == jax.tree.map(jnp.shape, selective)


@pytest.mark.parametrize(
  ("stride", "expected"),
  [
    # Padding stays out of the mean at stride 1, and counts as zeros at stride 2.
    (1, [[3, 4, 4.5], [6, 7, 7.5], [7.5, 8.5, 9]]),
    (2, [[3, 2.25], [3.75, 2.25]]),
  ],
)
def test_the_pooled_shortcut_pads_as_the_references(stride, expected):
  block = resnet.Block(
    filters=1,
    stride=stride,
    bottleneck=False,
    project=True,
    sk_ratio=0.1,
    se_ratio=0,
    make=FLOAT32,
  )
  x = jnp.arange(1.0, 10).reshape(1, 3, 3, 1)
  variables = initial(block, x, train=False)
  # The last batch norm of a fresh block has scale zero: what is left is the shortcut.
  variables["params"]["shortcut_conv"]["kernel"] = jnp.ones((1, 1, 1, 1))
  y = block.apply(variables, x, train=False) * math.sqrt(1 + 1e-5)
  np.testing.assert_allclose(y[0, :, :, 0], expected, rtol=1e-6)


def test_squeeze_and_excite_gates_every_channel():
  x = np.random.default_rng(0).normal(size=(2, 3, 3, 4)).astype(np.float32)
  module = resnet.SqueezeExcite(2, FLOAT32)
  variables = weights_by_name.filled(abstract(module, x))
  params, y = variables["params"], module.apply(variables, x)
  reduce, expand = ((params[name]["kernel"][0, 0], params[name]["bias"]) for name in ("reduce", "expand"))
  hidden = np.maximum(np.mean(x, axis=(1, 2)) @ reduce[0] + reduce[1], 0)
  gate = 1 / (1 + np.exp(-(hidden @ expand[0] + expand[1])))
  np.testing.assert_allclose(y, x * gate[:, None, None], rtol=1e-5)


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (20, 31)])
@pytest.mark.parametrize("sk_ratio", [0, 0.0625])
def test_every_stride_halves_the_image_size_rounding_up(size, sk_ratio):
  images = jax.ShapeDtypeStruct((2, *size, 3), jnp.float32)
  model = resnet.ResNet(50, width=0.125, sk_ratio=sk_ratio)
  _, state = jax.eval_shape(
    lambda images: model.init_with_output(
      jax.random.key(0), images, train=False, mutable=["params", "batch_stats", "intermediates"]
    ),
    images,
  )
  height, width = (math.ceil(side / 32) for side in size)
  assert state["intermediates"]["block_group4"][0].shape == (2, height, width, 256)


def test_uint8_images_are_divided_by_255(x64, xlas_convolution):
  model = narrow(dtype=jnp.float64, param_dtype=jnp.float64).encoder
  images = images_like()
  variables = filled(model, images)
  apply = jax.jit(functools.partial(model.apply, train=False))
  expected = apply(variables, images.astype(np.float64) / 255)
  assert largest_error(apply(variables, images), expected) < 1e-12


def dtypes_of(tree):
  return {leaf.dtype.name for leaf in jax.tree.leaves(tree)}


def trained(model, images):
  """Returns variables, outputs and new statistics of one pass in train mode, as shapes and types."""
  variables = abstract(model, images, train=True)
  apply = functools.partial(model.apply, train=True, mutable=["batch_stats"])
  outputs, state = jax.eval_shape(apply, variables, images)
  return variables, outputs, state["batch_stats"]


@pytest.mark.slow
@pytest.mark.parametrize("ratios", [{}, {"depth": 50, "sk_ratio": 0.1, "se_ratio": 0.1}])
def test_bfloat16_keeps_parameters_statistics_and_outputs_in_float32(ratios):
  model = narrow(dtype=jnp.bfloat16, **ratios)
  variables, outputs, batch_stats = trained(model, images_like())
  assert dtypes_of((variables, outputs, batch_stats)) == {"float32"}
  apply = functools.partial(
    model.apply, train=True, mutable=["batch_stats", "intermediates"], capture_intermediates=True
  )
  seen = jax.eval_shape(apply, variables, images_like())[1]["intermediates"]["encoder"]
  for name in ("initial_conv", "initial_max_pool", "block_group1", "block_group4"):
    assert seen[name][0].dtype == jnp.bfloat16
  assert seen["group2_block1"]["conv1"]["__call__"][0].dtype == jnp.bfloat16


def test_bfloat16_and_float32_agree_to_the_precision_of_bfloat16():
  images = images_like((8, 32, 32, 3))
  variables = filled(narrow(), images)
  full, half = (
    jax.jit(functools.partial(narrow(dtype=dtype).apply, train=True, mutable=["batch_stats"]))(variables, images)[0]
    for dtype in (jnp.float32, jnp.bfloat16)
  )
  assert 0 < largest_error(half[0], full[0]) < 0.05


@pytest.mark.slow
@pytest.mark.parametrize(
  ("ratios", "images"),
  [
    ({}, images_like()),
    ({}, images_like().astype(np.float32)),
    ({"depth": 50, "sk_ratio": 0.1, "se_ratio": 0.1}, images_like()),
  ],
)
def test_float64_is_float64_throughout(x64, ratios, images):
  model = narrow(dtype=jnp.float64, param_dtype=jnp.float64, **ratios)
  variables, outputs, batch_stats = trained(model, images)
  assert dtypes_of((variables, outputs, batch_stats)) == {"float64"}
  apply = functools.partial(model.apply, train=True, mutable=["batch_stats", "intermediates"])
  assert dtypes_of(jax.eval_shape(apply, variables, images)) == {"float64"}


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.float64])
@pytest.mark.parametrize("param_dtype", [jnp.bfloat16, jnp.float32, jnp.float64])
def test_statistics_keep_their_type_from_step_to_step(x64, dtype, param_dtype):
  variables, _, batch_stats = trained(narrow(dtype=dtype, param_dtype=param_dtype), images_like())
  assert dtypes_of(batch_stats) == dtypes_of(variables["batch_stats"])
  assert dtypes_of(batch_stats) <= {"float32", "float64"}


def test_the_online_classifier_passes_no_gradient_to_the_encoder(xlas_convolution):
  model, images = narrow(), images_like()
  variables = filled(model, images)

  @jax.jit
  @jax.grad
  def gradient(params):
    outputs, _ = model.apply(variables | {"params": params}, images, train=True, mutable=["batch_stats"])
    return (outputs[2] ** 2).sum()

  grads = gradient(variables["params"])
  assert set(grads) == {"encoder", "projection_head", "linear_head"}
  for part in ("encoder", "projection_head"):
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(grads[part]))
  assert all(np.any(leaf) for leaf in jax.tree.leaves(grads["linear_head"]))


def test_without_a_classifier_there_are_no_logits():
  variables, (_, z, logits), _ = trained(narrow(classes=0), images_like())
  assert z.shape == (4, 16)
  assert logits is None
  assert set(variables["params"]) == {"encoder", "projection_head"}


@pytest.mark.slow
@pytest.mark.parametrize(("after_stage", "layer"), [(-1, 0), (0, 1), (2, 0), (2, 1), (4, 1)])
def test_what_is_frozen_keeps_its_statistics_and_gets_no_gradient(after_stage, layer, xlas_convolution):
  images = images_like()
  model = simclr.Classifier(
    narrow().encoder, heads.LinearHead(5), heads.ProjectionHead(2, 16), layer, after_stage=after_stage
  )
  variables = filled(model, images)

  @jax.jit
  @functools.partial(jax.grad, has_aux=True)
  def gradient(params):
    logits, state = model.apply(variables | {"params": params}, images, train=True, mutable=["batch_stats"])
    return (logits**2).sum(), state["batch_stats"]

  grads, batch_stats = gradient(variables["params"])
  moved = {
    (*path[:-1],)
    for tree in (grads, jax.tree.map(np.subtract, batch_stats, variables["batch_stats"]))
    for path, leaf in traverse_util.flatten_dict(tree).items()
    if np.any(leaf)
  }
  for name in variables["params"]["encoder"]:
    learns = model.encoder.stage_of(name) > after_stage
    assert any(path[:2] == ("encoder", name) for path in moved) == learns, name
  statistics_move = {path[:2] for path in moved if "projection_head" in path and path[1].startswith("bn")}
  assert statistics_move == {("projection_head", "bn1"), ("projection_head", "bn2")}
  assert ("linear_head", "dense") in moved

  learning = simclr.trained_part(model, variables["params"])
  assert set(traverse_util.flatten_dict(learning)) == {
    path
    for path, leaf in traverse_util.flatten_dict(grads).items()
    if path[0] == "linear_head"
    or (path[0] == "encoder" and model.encoder.stage_of(path[1]) > after_stage)
    or (path[0] == "projection_head" and path[1] in (("dense1", "bn1") if layer else ()))
  }
  put_back = simclr.merged(variables["params"], jax.tree.map(lambda leaf: leaf + 1, learning))
  flat, before = traverse_util.flatten_dict(put_back), traverse_util.flatten_dict(variables["params"])
  assert flat.keys() == before.keys()
  assert {path for path in flat if np.any(flat[path] != before[path])} == set(traverse_util.flatten_dict(learning))


def test_a_frozen_head_is_read_in_inference_mode(xlas_convolution):
  images = images_like()
  model = simclr.Classifier(narrow().encoder, heads.LinearHead(5), heads.ProjectionHead(2, 16), 2, 4, True)
  variables = filled(model, images)
  logits, state = jax.jit(functools.partial(model.apply, train=True, mutable=["batch_stats"]))(variables, images)
  jax.tree.map(np.testing.assert_array_equal, state["batch_stats"], variables["batch_stats"])
  in_inference = jax.jit(functools.partial(model.apply, train=False))(variables, images)
  np.testing.assert_allclose(logits, in_inference, rtol=1e-5, atol=1e-6)
  assert set(simclr.trained_part(model, variables["params"])) == {"linear_head"}


@pytest.mark.parametrize(
  ("module", "images", "words"),
  [
    (resnet.ResNet(20), np.zeros((1, 8, 8, 3)), ["20", "10, 18, 34, 50, 101, 152, 200"]),
    (resnet.ResNet(18, width=0), np.zeros((1, 8, 8, 3)), ["width is 0"]),
    (resnet.ResNet(18), np.zeros((8, 8, 3)), ["(8, 8, 3)", "[batch, height, width, 3]"]),
    (resnet.ResNet(18), np.zeros((1, 3, 8, 8)), ["(1, 3, 8, 8)", "[batch, height, width, 3]"]),
    (resnet.ResNet(18), np.zeros((1, 8, 8, 3), np.int32), ["int32", "uint8"]),
    (heads.ProjectionHead(-1), np.zeros((2, 8)), ["-1 layers"]),
  ],
)
def test_wrong_arguments_of_a_network_are_named_in_one_line(module, images, words):
  with pytest.raises(errors.UserError) as caught:
    abstract(module, images, train=True)
  assert all(word in str(caught.value) for word in words)
  assert "\n" not in str(caught.value)
