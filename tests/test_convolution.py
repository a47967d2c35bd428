"""The convolution whose gradients are forward passes: XLA's numbers, and off the CPU XLA's operations."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from simclr_jax.hardware import cost, sharding
from simclr_jax.models import convolution, layers

# (kernel, stride, height, width, images): fewer images than a part, one part, several; small and large outputs; sizes
# that the stride does not divide. The numbers of channels differ and are odd, so that a wrong transposition shows.
CASES = [
  (1, 1, 6, 5, 4),
  (1, 2, 8, 7, 8),
  (3, 1, 5, 6, 5),
  (3, 1, 10, 7, 64),
  (3, 2, 8, 7, 64),
  (3, 2, 19, 18, 8),
  (3, 2, 18, 19, 12),
  (7, 1, 9, 10, 24),
  (7, 2, 12, 11, 24),
  (7, 2, 19, 20, 8),
]


def layer(kernel, stride, dtype, features=5):
  """Returns the convolution that the encoder is made of, and the same with XLA's own operation."""
  ours = layers.Layers(dtype, dtype).conv(features, kernel, stride, name="conv")
  return ours, ours.clone(conv_general_dilated_cls=None)


def drawn(dtype, kernel, height, width, images, channels=3, features=5):
  """Returns (images, kernel)."""
  rng = np.random.default_rng(0)
  shapes = (images, height, width, channels), (kernel, kernel, channels, features)
  return [rng.normal(size=shape).astype(dtype) for shape in shapes]


def with_gradients(module):
  """Returns (images, kernel) -> (output, gradients of images and kernel), of a loss whose slope is the sine."""

  @jax.jit
  def run(images, kernel):
    apply = lambda images, kernel: module.apply({"params": {"kernel": kernel}}, images)
    output, pullback = jax.vjp(apply, images, kernel)
    return output, *pullback(jnp.sin(output))

  return run


def assert_equal(ours, theirs, tolerance):
  """Compares output and gradients to so much of the largest entry of each."""
  for name, a, b in zip(("output", "images", "kernel"), ours, theirs, strict=True):
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max(), err_msg=name)


def assert_those_of_xla(case, dtype, tolerance):
  kernel, stride, height, width, images = case
  ours, theirs = layer(kernel, stride, jnp.dtype(dtype))
  arrays = drawn(dtype, kernel, height, width, images)
  assert_equal(with_gradients(ours)(*arrays), with_gradients(theirs)(*arrays), tolerance)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_output_and_gradients_are_those_of_xla(case):
  assert_those_of_xla(case, "float32", 1e-4)


# There are no parts in float64, and a tap of the kernel is a product to compile.
@pytest.mark.parametrize("case", [(1, 2, 7, 8, 8), (3, 1, 5, 6, 5), (5, 2, 8, 7, 24)], ids=str)
def test_output_and_gradients_are_those_of_xla_in_float64(case, x64):
  assert_those_of_xla(case, "float64", 1e-12)


@pytest.mark.optimized
def test_the_kernel_gradient_of_a_bfloat16_network_is_summed_in_float32():
  images = np.abs(drawn(np.float32, 3, 9, 9, 512)[0]).astype(jnp.bfloat16)

  def gradient(module, dtype):
    total = lambda kernel: module.apply({"params": {"kernel": kernel}}, images.astype(dtype)).astype(jnp.float32).sum()
    return jax.jit(jax.grad(total))(np.ones((3, 3, 3, 5), dtype)).astype(jnp.float32)

  exact = gradient(layer(3, 1, jnp.float32)[1], np.float32)
  # Half a unit of eight bits for each part's sum, and for the sum of the 64 parts; sums in bfloat16 are off by more.
  np.testing.assert_allclose(gradient(layer(3, 1, jnp.bfloat16)[0], jnp.bfloat16), exact, rtol=2**-7)


@pytest.mark.devices(8)
@pytest.mark.optimized
@pytest.mark.parametrize("images", [24, 64])
def test_eight_devices_compute_what_one_does_and_move_no_images(images):
  ours, _ = layer(3, 1, jnp.float32)
  arrays = drawn(np.float32, 3, 9, 8, images)
  alone = with_gradients(ours)(*arrays)
  mesh = sharding.data_mesh()
  placed = jax.device_put(arrays[0], sharding.batched(mesh)), jax.device_put(arrays[1], sharding.replicated(mesh))
  together = with_gradients(ours)(*placed)
  assert_equal(together, alone, 1e-5)
  assert together[1].sharding.is_equivalent_to(sharding.batched(mesh), 4)
  exchanges = cost.collectives(with_gradients(ours).lower(*placed).compile().as_text(), mesh.size)
  assert {(exchange.kind, exchange.shapes) for exchange in exchanges} == {("all-reduce", ("f32[3,3,3,5]",))}


@pytest.mark.optimized
def test_a_gradient_in_a_loop_takes_about_as_long_as_outside_of_one():
  ours, _ = layer(3, 1, jnp.float32, features=16)
  images, kernel = drawn(np.float32, 3, 16, 16, 64, channels=16, features=16)
  turns = 3

  def gradients(images, kernel):
    return jax.grad(lambda x, k: jnp.square(ours.apply({"params": {"kernel": k}}, x)).sum(), (0, 1))(images, kernel)

  @jax.jit
  def looped(images, kernel, turns):
    descend = lambda _, pair: jax.tree.map(lambda x, g: x - 1e-9 * g, pair, gradients(*pair))
    return jax.lax.fori_loop(0, turns, descend, (images, kernel))

  def seconds(function, *args):
    jax.block_until_ready(function(*args))
    times = []
    for _ in range(5):
      start = time.perf_counter()
      jax.block_until_ready(function(*args))
      times.append(time.perf_counter() - start)
    return min(times)

  # XLA's own gradients take about fifty times as long there.
  assert seconds(looped, images, kernel, turns) / turns < 5 * seconds(jax.jit(gradients), images, kernel)


@pytest.mark.parametrize("platform", ["cpu", "tpu", "cuda"])
def test_only_a_cpu_gets_the_gradients_in_parts(platform):
  ours, theirs = layer(3, 1, jnp.float32)
  arrays = drawn(np.float32, 3, 9, 8, 64)

  def convolutions(module):
    """Returns the convolutions of the program by their attributes and shapes, and whether there is a loop."""
    text = with_gradients(module).trace(*arrays).lower(lowering_platforms=(platform,)).as_text()
    lines = [line.partition(") ")[2] for line in text.splitlines() if "stablehlo.convolution" in line]
    return sorted(lines), "stablehlo.while" in text

  if platform == "cpu":
    assert convolutions(ours)[1]
  else:
    assert convolutions(ours) == convolutions(theirs)
    assert len(convolutions(ours)[0]) == 3


@pytest.mark.parametrize(
  "arguments",
  [
    {"precision": jax.lax.Precision.HIGHEST},
    {"rhs_dilation": (2, 2)},
    {"lhs_dilation": (2, 1)},
    {"feature_group_count": 3},
    {"batch_group_count": 2},
    {"preferred_element_type": jnp.float32},
    {"dimension_numbers": ("NCHW", "OIHW", "NCHW")},
  ],
  ids=str,
)
def test_an_unsupported_argument_is_refused(arguments):
  with pytest.raises(NotImplementedError, match=next(iter(arguments))):
    convolution.convolve(jnp.zeros((6, 3, 3, 3)), jnp.zeros((3, 3, 3, 3)), (1, 1), ((1, 1), (1, 1)), **arguments)
