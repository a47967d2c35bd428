"""Tests of the conversion from the reference's checkpoint names."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import weights_by_name
from flax import traverse_util

from simclr_jax import errors
from simclr_jax.jobs import convert
from simclr_jax.models import heads, resnet, simclr
from simclr_jax.released import names as reference

FIXTURES = ["resnet_r18_32", "resnet_r18_64", "resnet_r50_64", "resnet_r50_sk_64"]


def network(*, layers=3, classes=10, **encoder):
  head = heads.LinearHead(classes) if classes else None
  return simclr.SimCLR(resnet.ResNet(**encoder), heads.ProjectionHead(layers), head)


def abstract(model):
  images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
  key = jax.random.key(0)
  return jax.eval_shape(lambda images: model.init(key, images, train=True), images)


def paths_of(depth=18, *, stem="small", selective=False, squeeze=False, layers=3, linear=False):
  described = reference.encoder_layers(depth, stem=stem, selective=selective, squeeze=squeeze)
  return (
    reference.encoder_paths(described) | reference.projection_paths(layers, linear=linear) | reference.LINEAR_HEAD_PATHS
  )


def shapes(tree):
  return jax.tree.map(np.shape, tree)


@pytest.fixture
def small():
  """Variables of a narrow ResNet-10 with a two-layer head, by reference name."""
  model = network(depth=10, width=0.125, small_images=True, layers=2)
  return weights_by_name.of_network(abstract(model), paths_of(10, layers=2), "")


@pytest.mark.parametrize("name", FIXTURES)
def test_the_references_names_and_shapes_are_those_of_our_network(reference, name):
  arrays = reference(name)
  given = {
    str(name): np.empty(weights_by_name.parse_shape(str(shape)), np.float16)
    for name, shape in zip(arrays["variable_names"], arrays["variable_shapes"], strict=True)
  }
  model = network(
    depth=int(arrays["depth"]),
    width=float(arrays["width_multiplier"]),
    sk_ratio=float(arrays["sk_ratio"]),
    small_images=bool(arrays["cifar_stem"]),
    layers=int(arrays["num_proj_layers"]),
    classes=int(arrays["num_classes"]),
  )
  assert shapes(convert.from_reference(given)) == shapes(abstract(model))


@pytest.mark.slow
@pytest.mark.parametrize(
  ("ours", "theirs", "layers"),
  [
    (dict(depth=10, small_images=True), dict(depth=10, stem="small"), 1),
    (dict(depth=10, sk_ratio=0.5), dict(depth=10, stem="three", selective=True), 4),
    (dict(depth=18, width=0.3), dict(depth=18, stem="large"), 0),
    (dict(depth=34, se_ratio=0.1), dict(depth=34, stem="large", squeeze=True), 1),
    (dict(depth=50, width=2, small_images=True), dict(depth=50, stem="small"), 4),
    (
      dict(depth=50, se_ratio=0.2, small_images=True),
      dict(depth=50, stem="small", squeeze=True),
      0,
    ),
    (
      dict(depth=50, sk_ratio=0.2, small_images=True),
      dict(depth=50, stem="small", selective=True),
      1,
    ),
    (
      dict(depth=50, sk_ratio=0.2, se_ratio=0.2),
      dict(depth=50, stem="three", selective=True, squeeze=True),
      4,
    ),
    (dict(depth=101, sk_ratio=0.0625), dict(depth=101, stem="three", selective=True), 0),
  ],
)
def test_any_architecture_is_recognised_from_its_variables_alone(ours, theirs, layers):
  tree = abstract(network(layers=layers, **ours))
  paths = paths_of(layers=layers, **theirs)
  flat = traverse_util.flatten_dict(tree)
  given = {name: np.empty(flat[path].shape, np.float16) for name, path in paths.items()}
  assert shapes(convert.from_reference(given)) == shapes(tree)


def test_variables_are_numbered_in_the_order_in_which_our_modules_run():
  kinds = {nn.Conv: [], nn.BatchNorm: []}

  def record(call, args, kwargs, context):
    if type(context.module) in kinds:
      kinds[type(context.module)].append(context.module.path)
    return call(*args, **kwargs)

  model = resnet.ResNet(50, sk_ratio=0.1, se_ratio=0.1)
  with nn.intercept_methods(record):
    abstract(model)
  layers = list(reference.encoder_layers(50, stem="three", selective=True, squeeze=True))
  convs = [layer.path for layer in layers if isinstance(layer, reference.Conv)]
  norms = [layer.path for layer in layers if isinstance(layer, reference.Norm)]
  assert kinds == {nn.Conv: convs, nn.BatchNorm: norms}


def test_no_two_architectures_have_the_same_kernels_and_biases():
  seen = {}
  for depth, stem, *flags in itertools.product(resnet.BLOCKS, reference.STEMS, (False, True), (False, True)):
    layers = list(reference.encoder_layers(depth, stem=stem, selective=flags[0], squeeze=flags[1]))
    convs = tuple(layer[1:] for layer in layers if isinstance(layer, reference.Conv))
    assert seen.setdefault(convs, layers) == layers


def test_the_linear_projection_head_is_read_under_its_own_name(small):
  model = network(depth=10, width=0.125, small_images=True, layers=1)
  paths = paths_of(10, layers=1, linear=True)
  given = weights_by_name.of_network(abstract(model), paths, "")
  tree = convert.from_reference(given)
  assert set(tree["params"]["projection_head"]) == {"dense1", "bn1"}
  kernel = given["head_contrastive/l_0/dense/kernel"]
  assert tree["params"]["projection_head"]["dense1"]["kernel"] is kernel


def test_every_value_arrives_in_its_place_in_its_own_type(small):
  tree = convert.from_reference(small)
  flat = traverse_util.flatten_dict(tree)
  assert len(flat) == len(small)
  assert {id(value) for value in flat.values()} == {id(value) for value in small.values()}
  assert all(value.dtype == np.float64 for value in flat.values())
  encoder = tree["params"]["encoder"]
  assert encoder["stem_conv1"]["kernel"] is small["base_model/conv2d/kernel"]
  block = encoder["group1_block1"]
  assert block["shortcut_conv"]["kernel"] is small["base_model/conv2d_1/kernel"]
  assert block["conv1"]["kernel"] is small["base_model/conv2d_2/kernel"]
  assert block["bn2"]["scale"] is small["base_model/batch_normalization_3/gamma"]
  moving = tree["batch_stats"]["encoder"]["group1_block1"]["bn2"]
  assert moving["var"] is small["base_model/batch_normalization_3/moving_variance"]


@pytest.mark.parametrize(
  ("prefix", "part"),
  [
    ("base_model/", "encoder"),
    ("head_contrastive/", "projection_head"),
    ("head_supervised/", "linear_head"),
  ],
)
def test_what_is_absent_in_the_variables_is_absent_in_the_tree(small, prefix, part):
  without = {name: value for name, value in small.items() if not name.startswith(prefix)}
  alone = {name: value for name, value in small.items() if name.startswith(prefix)}
  whole = convert.from_reference(small)
  for given, parts in [(without, whole["params"].keys() - {part}), (alone, {part})]:
    tree = convert.from_reference(given)
    expected = {
      collection: {name: tree for name, tree in whole[collection].items() if name in parts}
      for collection in ("params", "batch_stats")
    }
    jax.tree.map(np.testing.assert_array_equal, tree, expected)


@pytest.mark.parametrize(
  "name",
  [
    "global_step",
    "base_model/conv2d/kernel/Momentum",
    "base_model/conv2d/kernel/ExponentialMovingAverage",
    "base_model/conv2d/bias",
    "base_model/conv2d_0/kernel",
    "base_model/batch_normalization_99/gamma",
    "base_model/batch_normalization_3/gama",
    "head_contrastive/nl_1/batch_normalization/beta",
    "head_supervised/linear_layer/dense_1/kernel",
    "head_other/kernel",
  ],
)
def test_a_variable_that_the_network_does_not_have_is_named(small, name):
  with pytest.raises(errors.UserError) as caught:
    convert.from_reference(small | {name: np.zeros((3, 3, 8, 8))})
  assert f'"{name}"' in str(caught.value)
  assert "\n" not in str(caught.value)


def test_a_misspelt_variable_is_named_together_with_the_right_name(small):
  small["base_model/batch_normalization_3/gama"] = small.pop("base_model/batch_normalization_3/gamma")
  with pytest.raises(errors.UserError, match='gama".*did you mean "base_model/.*_3/gamma"'):
    convert.from_reference(small)


def test_every_variable_that_is_missing_is_named(small):
  last = [name for name in small if name.startswith("base_model/conv2d")][-1]
  for name in small:
    rest = {other: value for other, value in small.items() if other != name}
    with pytest.raises(errors.UserError) as caught:
      convert.from_reference(rest)
    # Without its last convolution the rest is simply no known network.
    assert ("the 12 convolutions" if name == last else f'"{name}"') in str(caught.value)


def test_a_batch_norm_of_another_width_than_its_convolution_is_named(small):
  name = "base_model/batch_normalization_5/moving_mean"
  small[name] = np.zeros(7)
  with pytest.raises(errors.UserError, match=name):
    convert.from_reference(small)


def test_nothing_at_all_is_a_mistake():
  with pytest.raises(errors.UserError, match="no variables"):
    convert.from_reference({})
