"""The losses against the reference's numbers, their definitions in float64, and across device counts."""

import functools
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import numpy_reference
import pytest

from simclr_jax import errors, losses
from simclr_jax.hardware import sharding

METRICS = ("contrast_acc", "contrast_entropy", "contrast_top1")
BOTH = ((np.float64, 1e-9), (np.float32, 1e-5))
ON_ONE_AND_EIGHT = [None, pytest.param(8, marks=pytest.mark.devices(8))]


@functools.partial(jax.jit, static_argnames=("kind", "normalize", "mesh", "block_size"))
def loss_and_gradient(z, kind, label, **options):
  return jax.value_and_grad(lambda z: losses.contrast(kind, z, label, **options), has_aux=True)(z)


def evaluate(z, kind="nt_xent", label=None, **options):
  """Returns loss, gradient and metrics as NumPy numbers, from one jitted call."""
  (loss, metrics), grad = loss_and_gradient(z, kind, label, **options)
  return np.asarray(loss), np.asarray(grad), {name: np.asarray(value) for name, value in metrics.items()}


def twin(z, kind, label, **options):
  """Returns what the definition says in float64."""
  if kind == "sup_con":
    return numpy_reference.sup_con(z, label, **options)
  return getattr(numpy_reference, kind)(z, **options)


def random_views(n, dim, seed=0, noise=1.0, dtype=np.float64):
  rng = np.random.default_rng(seed)
  return (rng.normal(size=(n, 1, dim)) + noise * rng.normal(size=(n, 2, dim))).astype(dtype)


def paired(rows):
  """[all first views ; all second views] to [N, 2, D]."""
  return np.stack(np.split(rows, 2), axis=1)


@pytest.fixture(scope="module")
def cases():
  """The reference's cases: name -> (z [N, 2, D], options, what the reference says, what the twin says)."""
  arrays = np.load(pathlib.Path(__file__).parent / "reference" / "nt_xent.npz")
  cases = {}
  for name in arrays["cases"]:
    z = paired(arrays[f"{name}__hidden"])
    options = {
      # Through its decimal form, because the float32 number nearest to 0.1 is not the 0.1 that was meant.
      "temperature": float(str(arrays[f"{name}__temperature"])),
      "normalize": bool(arrays[f"{name}__hidden_norm"]),
    }
    says = {
      key: arrays[f"{name}__{key}"] for key in ("loss", "loss_float64", "grad", "contrast_acc", "contrast_entropy")
    }
    says["grad"] = paired(says["grad"])
    cases[str(name)] = z, options, says, numpy_reference.nt_xent(z, **options)
  return cases


def gradient_scale(z, temperature, normalize):
  """The size [N, 1 or 2, 1] of the terms whose sum is the reference's gradient, before they cancel."""
  norms = np.linalg.norm(z.astype(np.float64), axis=2, keepdims=True)
  factor = 1 / np.maximum(norms, 1e-6) if normalize else norms.max(keepdims=True)
  return 2 / (len(z) * temperature) * factor


def test_the_twin_agrees_with_every_case_of_the_reference(cases):
  for name, (z, options, says, (loss, grad, metrics)) in cases.items():
    np.testing.assert_allclose(2 * loss, says["loss_float64"], rtol=1e-12, atol=1e-12, err_msg=name)
    np.testing.assert_allclose(2 * loss, says["loss"], rtol=0, atol=1.5e-6, err_msg=name)
    # Eight roundings of a unit vector to float32.
    bound = 8 * 2**-24 * gradient_scale(z, **options)
    assert np.all(np.abs(2 * grad - says["grad"]) <= bound), name
    np.testing.assert_allclose(metrics["contrast_entropy"], says["contrast_entropy"], atol=1e-6, err_msg=name)
    np.testing.assert_allclose(metrics["contrast_acc"], says["contrast_acc"], atol=1e-6, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("devices", ON_ONE_AND_EIGHT)
def test_loss_gradient_and_metrics_are_the_twins_in_float64(cases, x64, devices):
  mesh = devices and sharding.data_mesh()
  for name, (z, options, _, (want_loss, want_grad, want_metrics)) in cases.items():
    if devices and len(z) % devices:
      continue
    loss, grad, metrics = evaluate(z.astype(np.float64), mesh=mesh, **options)
    assert loss.dtype == grad.dtype == np.float64
    np.testing.assert_allclose(loss, want_loss, rtol=1e-12, atol=1e-13, err_msg=name)
    assert np.all(np.abs(grad - want_grad) <= 1e-12 * gradient_scale(z, **options)), name
    for metric in METRICS:
      np.testing.assert_allclose(metrics[metric], want_metrics[metric], rtol=1e-12, atol=1e-14, err_msg=name)


@pytest.mark.slow
@pytest.mark.optimized
@pytest.mark.parametrize("devices", ON_ONE_AND_EIGHT)
def test_float32_is_as_close_to_the_truth_as_the_reference_is(cases, devices):
  mesh = devices and sharding.data_mesh()
  for name, (z, options, says, (want_loss, want_grad, want_metrics)) in cases.items():
    if devices and len(z) % devices:
      continue
    loss, grad, metrics = evaluate(z, mesh=mesh, **options)
    np.testing.assert_allclose(loss, want_loss, rtol=0, atol=1e-6, err_msg=name)
    reference_error = np.abs(says["grad"] / 2 - want_grad).max()
    bound = 2 * reference_error + 1e-6 * np.abs(want_grad).max()
    np.testing.assert_allclose(grad, want_grad, rtol=0, atol=bound, err_msg=name)
    np.testing.assert_allclose(metrics["contrast_entropy"], says["contrast_entropy"], atol=2e-6, err_msg=name)
    np.testing.assert_allclose(metrics["contrast_acc"], says["contrast_acc"], atol=1e-6, err_msg=name)
    open_to_rounding = {"contrast_top1": near_ties(z, options["normalize"])}
    for metric in METRICS:
      bound = 2e-6 + open_to_rounding.get(metric, 0)
      np.testing.assert_allclose(metrics[metric], want_metrics[metric], atol=bound, err_msg=name)


def near_ties(z, normalize):
  """The share of views whose two largest similarities differ, but by less than float32 rounds a similarity."""
  rows = z.reshape(-1, z.shape[2]).astype(np.float64)
  norms = np.linalg.norm(rows, axis=1, keepdims=True)
  rows, scale = (rows / np.maximum(norms, 1e-6), 1) if normalize else (rows, norms.max() ** 2)
  logits = np.where(np.eye(len(rows)) == 1, -np.inf, rows @ rows.T)
  second, first = np.sort(logits, axis=1)[:, -2:].T
  return np.mean((second < first) & (first - second < 2**-24 * scale))


def test_the_golden_numbers_of_the_reference_come_out():
  i, j = np.arange(32)[:, None], np.arange(8)[None, :]
  z = paired(np.sin(0.7 * i + 0.3 * j**2 + 0.11 * i * j).astype(np.float32))
  for temperature, loss, entropy, norm in [
    (0.1, 13.8114386, 1.438690, 3.898776),
    (0.5, 7.1215701, 2.630761, 0.719527),
    (1.0, 6.8784971, 2.735443, 0.355242),
  ]:
    got_loss, grad, metrics = evaluate(z, temperature=temperature)
    np.testing.assert_allclose(2 * got_loss, loss, rtol=1e-6)
    np.testing.assert_allclose(2 * np.linalg.norm(grad), norm, rtol=2e-6)
    np.testing.assert_allclose(metrics["contrast_entropy"], entropy, rtol=1e-6)
    assert metrics["contrast_acc"] == 0.125
  np.testing.assert_allclose(2 * evaluate(z, temperature=1.0, normalize=False)[0], 8.3335495, rtol=1e-6)
  for constant in (0.0, 1.0):
    collapsed = np.full_like(z, constant)
    np.testing.assert_allclose(2 * evaluate(collapsed, temperature=0.1)[0], 2 * np.log(31), rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", losses.BLOCKWISE)
def test_loss_and_gradient_are_those_of_the_dense_definition(x64, kind):
  z, label = jnp.asarray(random_views(7, 5)), np.array([0, 1, 0, 2, -7, 0, 1])

  def dense(z):
    z = z.reshape(14, 5)
    z = z / jnp.linalg.norm(z, axis=1, keepdims=True)
    logits = jnp.where(jnp.eye(14) == 1, -jnp.inf, z @ z.T / 0.3)
    log_p = jax.nn.log_softmax(logits)
    positive = np.arange(14)[:, None] ^ 1 == np.arange(14)[None, :]
    if kind == "dcl":
      log_p = logits - jax.nn.logsumexp(jnp.where(positive, -jnp.inf, logits), axis=1, keepdims=True)
    if kind == "sup_con":
      labels = np.repeat(label, 2)
      positive = (labels[:, None] == labels[None, :]) & ~np.eye(14, dtype=bool)
    return -jnp.mean(jnp.sum(jnp.where(positive, log_p, 0), axis=1) / positive.sum(axis=1))

  want_loss, want_grad = jax.value_and_grad(dense)(z)
  loss, grad, _ = evaluate(z, kind, label, temperature=0.3, block_size=4)
  np.testing.assert_allclose(loss, want_loss, rtol=1e-13)
  np.testing.assert_allclose(grad, want_grad, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("kind", losses.BLOCKWISE)
def test_the_twins_gradient_is_the_slope_of_its_loss(kind):
  label = np.array([3, 5, 3, 4])
  for normalize in (True, False):
    z = random_views(4, 3, seed=1)
    options = {"temperature": 0.4, "normalize": normalize}
    _, grad, _ = twin(z, kind, label, **options)
    direction = np.random.default_rng(2).normal(size=z.shape)
    ahead, behind = (twin(z + s * 1e-5 * direction, kind, label, **options)[0] for s in (1, -1))
    np.testing.assert_allclose((ahead - behind) / 2e-5, np.sum(grad * direction), rtol=1e-8)


@pytest.mark.slow
@pytest.mark.devices(8)
@pytest.mark.parametrize(
  ("kind", "n", "dim", "block_size", "normalize", "dtypes"),
  [
    ("nt_xent", 8, 1, 1, False, BOTH),
    ("nt_xent", 264, 4, None, True, BOTH),
    ("sup_con", 264, 4, None, True, BOTH[:1]),
    ("sup_con", 88, 3, 5, False, BOTH[:1]),
    ("dcl", 88, 3, 5, True, BOTH),
  ],
)
def test_eight_devices_equal_one(kind, n, dim, block_size, normalize, dtypes):
  label = np.random.default_rng(n).integers(0, n // 4, n)
  for dtype, tolerance in dtypes:
    with jax.enable_x64(dtype == np.float64):
      z = random_views(n, dim, seed=n, dtype=dtype)
      options = {"kind": kind, "label": label, "temperature": 0.5, "normalize": normalize, "block_size": block_size}
      loss, grad, metrics = evaluate(z, **options)
      sharded_loss, sharded_grad, sharded_metrics = evaluate(z, mesh=sharding.data_mesh(), **options)
      np.testing.assert_allclose(sharded_loss, loss, rtol=tolerance)
      np.testing.assert_allclose(sharded_grad, grad, rtol=0, atol=tolerance * np.abs(grad).max())
      for name in METRICS:
        np.testing.assert_allclose(sharded_metrics[name], metrics[name], rtol=tolerance)


@pytest.mark.devices(8)
@pytest.mark.parametrize("kind", losses.BLOCKWISE)
def test_eight_devices_equal_one_on_near_duplicates(kind):
  # Pairs of nearly equal images, so most of the gradient's terms cancel.
  z = random_views(40, 16, seed=5, noise=1e-3, dtype=np.float32)
  z[1::2] = z[::2] + 1e-3 * random_views(20, 16, seed=6, dtype=np.float32)
  options = {"kind": kind, "label": np.arange(40) // 2, "temperature": 0.1, "block_size": 16}
  loss, grad, _ = evaluate(z, **options)
  sharded_loss, sharded_grad, _ = evaluate(z, mesh=sharding.data_mesh(), **options)
  np.testing.assert_allclose(sharded_loss, loss, rtol=1e-5)
  np.testing.assert_allclose(sharded_grad, grad, rtol=0, atol=2e-4 * np.abs(grad).max())
  _, want_grad, _ = twin(z, options["kind"], options["label"], temperature=0.1)
  np.testing.assert_allclose(grad, want_grad, rtol=0, atol=2e-4 * np.abs(want_grad).max())


@pytest.mark.slow
@pytest.mark.devices(8)
@pytest.mark.parametrize("kind", losses.BLOCKWISE)
def test_any_shape_temperature_block_and_rows_give_the_definition(x64, kind):
  rng = np.random.default_rng(losses.BLOCKWISE.index(kind))
  for trial in range(3):
    devices = int(rng.choice([1, 2, 3, 8]))
    n = devices * int(rng.integers(1, 9)) + (kind == "dcl" and devices == 1)
    z = random_views(n, int(rng.integers(1, 20)), seed=trial, noise=10 ** rng.uniform(-3, 1))
    # Some images are copies of the first one, both views equal, and some rows are zero.
    z[rng.random(n) < 0.2] = z[0, 0]
    z[rng.random((n, 2)) < 0.2] = 0
    label = rng.integers(-3, int(rng.integers(1, n + 1)), n)
    options = {"temperature": 10 ** rng.uniform(-1.5, 1), "normalize": bool(rng.integers(2))}
    mesh = None if devices == 1 else sharding.data_mesh(jax.devices()[:devices])
    want_loss, want_grad, want_metrics = twin(z, kind, label, **options)
    block_size = int(rng.integers(1, 2 * n + 1))
    loss, grad, metrics = evaluate(z, kind, label, mesh=mesh, block_size=block_size, **options)
    message = f"trial {trial}: {z.shape}, {devices} devices, block {block_size}, {options}"
    scale = np.where(np.any(z, axis=2, keepdims=True), np.linalg.norm(z, axis=2, keepdims=True), 1e-6)
    scale = 1 / scale if options["normalize"] else np.abs(z).max()
    np.testing.assert_allclose(loss, want_loss, rtol=1e-10, atol=1e-13, err_msg=message)
    assert np.all(np.abs(grad - want_grad) <= 1e-10 * scale / (n * options["temperature"])), message
    for name in ("contrast_entropy",) if has_ties(z) else METRICS:
      np.testing.assert_allclose(metrics[name], want_metrics[name], rtol=1e-10, atol=1e-12, err_msg=message)


def has_ties(z):
  """Whether two rows are the same, so that the last bit of a product decides which is the larger."""
  return len(np.unique(z.reshape(-1, z.shape[2]), axis=0)) < 2 * len(z)


def test_with_all_labels_different_sup_con_is_nt_xent(x64):
  z = random_views(24, 5, noise=0.1)
  loss, grad, _ = evaluate(z, temperature=0.1)
  for mesh in (None, sharding.data_mesh()):
    sup_con_loss, sup_con_grad, _ = evaluate(z, "sup_con", 3 * np.arange(24)[::-1], temperature=0.1, mesh=mesh)
    np.testing.assert_allclose(sup_con_loss, loss, rtol=1e-14)
    np.testing.assert_allclose(sup_con_grad, grad, rtol=0, atol=1e-14 * np.abs(grad).max())


def test_dcl_goes_below_zero_where_nt_xent_stops(x64):
  z = random_views(8, 16, noise=1e-3)
  assert evaluate(z, temperature=0.1)[0] > 0
  loss, grad, _ = evaluate(z, "dcl", temperature=0.1)
  assert loss < -1
  assert np.abs(grad).max() > 10 * np.abs(evaluate(z, temperature=0.1)[1]).max()


def test_similar_views_keep_their_digits_in_float32():
  # The loss is near zero and so are p - 1 and the gradient: the regime that training ends in.
  z = random_views(16, 64, noise=0.01, dtype=np.float32)
  want_loss, want_grad, _ = numpy_reference.nt_xent(z, 0.1)
  loss, grad, _ = evaluate(z, temperature=0.1)
  assert want_loss < 0.02
  np.testing.assert_allclose(loss, want_loss, rtol=2e-6)
  np.testing.assert_allclose(grad, want_grad, rtol=0, atol=1e-5 * np.abs(want_grad).max())


def test_a_tie_counts_for_the_lowest_index():
  # Images 1 and 2 are the same, so for both the second view of image 1 comes first.
  z = np.eye(3, dtype=np.float32)[[0, 1, 1, 2]][:, None].repeat(2, axis=1)
  for block_size in (1, 4):
    _, _, metrics = evaluate(z, temperature=0.5, block_size=block_size)
    assert metrics["contrast_acc"] == 0.75
    assert metrics["contrast_top1"] == 0.75


def test_a_tie_with_a_higher_index_still_counts_as_correct():
  # The first image's first view is as close to both second views, and the other one's is not.
  z = np.array([[[1, 0], [1, 1]], [[0, -1], [1, -1]]], np.float32)
  for block_size in (1, 2):
    _, _, metrics = evaluate(z, temperature=0.5, normalize=False, block_size=block_size)
    assert metrics["contrast_acc"] == 1
    assert metrics["contrast_top1"] == 0.75


def test_accuracy_is_over_the_second_views_and_top1_over_everything():
  # Each first view is closest to the other first view, and of the second views to its own.
  z = np.array([[[1, 0], [1, -0.9]], [[1, 0.2], [1, 1]]], np.float32)
  _, _, metrics = evaluate(z, temperature=1.0)
  assert metrics["contrast_acc"] == 1
  assert metrics["contrast_top1"] == 0.5


def test_the_three_names_are_the_three_kinds():
  z, label = random_views(8, 4, dtype=np.float32), np.arange(8) // 2
  three = lambda z: (
    losses.nt_xent(z, temperature=0.5),
    losses.sup_con(z, label, temperature=0.5),
    losses.dcl(z, temperature=0.5),
  )
  for (loss, metrics), kind in zip(jax.jit(three)(z), losses.BLOCKWISE, strict=True):
    want_loss, _, want_metrics = twin(z, kind, label, temperature=0.5)
    np.testing.assert_allclose(loss, want_loss, rtol=1e-6)
    assert metrics.keys() == want_metrics.keys()


def test_the_loss_without_gradient_is_that_of_the_gradients_call():
  z, label = random_views(24, 4, dtype=np.float32), np.arange(24) % 5
  loss, _, metrics = evaluate(z, "sup_con", label, temperature=0.5, block_size=7)
  alone = jax.jit(functools.partial(losses.sup_con, temperature=0.5, block_size=7))(z, label)
  np.testing.assert_allclose(alone[0], loss, rtol=1e-6)
  for name in METRICS:
    np.testing.assert_allclose(alone[1][name], metrics[name], rtol=1e-6)


@pytest.mark.devices(8)
@pytest.mark.parametrize("kind", losses.BLOCKWISE)
def test_the_gradient_scales_with_its_cotangent_and_metrics_have_none(kind):
  z, label = jnp.asarray(random_views(8, 4, dtype=np.float32)), np.arange(8) // 3
  mesh = sharding.data_mesh()

  def after(z, scale):
    loss, metrics = losses.contrast(kind, z, label, temperature=0.5, mesh=mesh)
    return scale * loss + sum(metrics.values())

  gradient = jax.jit(jax.grad(after))
  once = gradient(z, 1.0)
  np.testing.assert_allclose(gradient(z, 3.0), 3 * once, rtol=0, atol=1e-6 * np.abs(once).max())
  np.testing.assert_array_equal(gradient(z, 0.0), 0)


@pytest.mark.devices(8)
@pytest.mark.parametrize("kind", losses.BLOCKWISE)
def test_the_temperature_can_be_learned(x64, kind):
  z, label = jnp.asarray(random_views(16, 4)), np.arange(16) // 3
  slope = (twin(z, kind, label, temperature=0.5 + 1e-6)[0] - twin(z, kind, label, temperature=0.5 - 1e-6)[0]) / 2e-6
  for mesh in (None, sharding.data_mesh()):
    loss_fn = lambda temperature, mesh=mesh: losses.contrast(kind, z, label, temperature=temperature, mesh=mesh)[0]
    np.testing.assert_allclose(jax.jit(jax.grad(loss_fn))(0.5), slope, rtol=1e-8)


def test_bfloat16_embeddings_are_scored_in_float32():
  z = jnp.asarray(random_views(16, 8), jnp.bfloat16)
  loss, grad, metrics = evaluate(z, temperature=0.1)
  assert loss.dtype == np.float32
  assert grad.dtype == jnp.bfloat16
  assert all(value.dtype == np.float32 for value in metrics.values())
  np.testing.assert_allclose(loss, evaluate(z.astype(jnp.float32), temperature=0.1)[0], rtol=1e-7)


def test_strongly_negative_similarities_do_not_overflow():
  # The corners of a simplex in five dimensions: every similarity is -500, and the last block is padded.
  corners = (np.eye(6) - 1 / 6) * np.sqrt(3000)
  z = corners.reshape(3, 2, 6).astype(np.float32)
  loss, grad, metrics = evaluate(z, temperature=1.0, normalize=False, block_size=2)
  want_loss, want_grad, _ = numpy_reference.nt_xent(z, 1.0, normalize=False)
  np.testing.assert_allclose(loss, want_loss, rtol=1e-3)
  np.testing.assert_allclose(grad, want_grad, rtol=0, atol=1e-3 * np.abs(z).max())
  assert np.isfinite(metrics["contrast_entropy"])


@pytest.mark.parametrize("kind", losses.BLOCKWISE)
def test_every_product_is_at_the_highest_precision(kind):
  # Accelerators round the factors otherwise, to bfloat16 or TF32, and a CPU would not show it.
  loss_fn = jax.value_and_grad(lambda z: losses.contrast(kind, z, np.arange(8), temperature=0.1), has_aux=True)
  program = jax.jit(loss_fn).lower(jnp.zeros((8, 2, 4))).as_text()
  products = [line for line in program.splitlines() if "dot_general" in line]
  # For each view of the columns: the logits of both passes and the gradient.
  assert len(products) == 6
  assert all("precision = [HIGHEST, HIGHEST]" in line for line in products)


def compiled_on_eight_devices(kind, n, dim, block_size):
  mesh = sharding.data_mesh()
  z = jax.ShapeDtypeStruct((n, 2, dim), jnp.float32, sharding=sharding.batched(mesh))
  label = jax.ShapeDtypeStruct((n,), jnp.int32, sharding=sharding.batched(mesh))
  options = {"temperature": 0.1, "mesh": mesh, "block_size": block_size}
  loss_fn = lambda z, label: losses.contrast(kind, z, label, **options)
  return jax.jit(jax.value_and_grad(loss_fn, has_aux=True)).lower(z, label).compile()


@pytest.mark.devices(8)
@pytest.mark.optimized
@pytest.mark.parametrize("kind", losses.BLOCKWISE)
def test_no_device_holds_its_rows_of_the_logits(kind):
  n, dim, block_size = 128, 4, 16
  hlo = compiled_on_eight_devices(kind, n, dim, block_size).as_text()
  sizes = [np.prod([int(d) for d in dims.split(",")]) for dims in re.findall(r"\w\d+\[([\d,]+)\]", hlo)]
  rows_of_one_view = n // 8 * n
  assert 2 * n * dim in sizes, "the gathered embeddings are in the program"
  assert max(sizes) < rows_of_one_view


@pytest.mark.devices(8)
@pytest.mark.optimized
@pytest.mark.parametrize(("kind", "gathers"), [("nt_xent", 2), ("sup_con", 3), ("dcl", 2)])
def test_nothing_but_the_gathers_and_scalars_crosses_devices(kind, gathers):
  hlo = compiled_on_eight_devices(kind, 16, 4, None).as_text()
  results = re.findall(r"= (.*?) (all-\w+|reduce-scatter|collective-\w+|ragged-\S+)(?:-start)?\(", hlo)
  assert sum(operation == "all-gather" for _, operation in results) == gathers
  for result, operation in results:
    assert operation in ("all-gather", "all-reduce")
    if operation == "all-reduce":
      assert set(re.findall(r"\w+\[.*?\]", result)) == {"f32[]"}


@pytest.mark.parametrize("kind", losses.BLOCKWISE)
def test_memory_grows_linearly_with_the_batch(kind):
  def peak(n):
    z, label = jax.ShapeDtypeStruct((n, 2, 32), jnp.float32), jax.ShapeDtypeStruct((n,), jnp.int32)
    loss_fn = jax.value_and_grad(lambda z, label: losses.contrast(kind, z, label, temperature=0.1), has_aux=True)
    return jax.jit(loss_fn).lower(z, label).compile().memory_analysis().temp_size_in_bytes

  assert peak(8192) < 2.2 * peak(4096)


@pytest.mark.devices(8)
@pytest.mark.parametrize(
  ("shape", "options", "says"),
  [
    ((32, 128), {}, "[N, 2, D]"),
    ((8, 3, 4), {}, "[N, 2, D]"),
    ((0, 2, 4), {}, "[N, 2, D]"),
    ((12, 2, 4), {"mesh": 8}, "multiple of 8"),
    ((8, 2, 4), {"temperature": 0.0}, "temperature"),
    ((8, 2, 4), {"block_size": 0}, "block_size"),
    ((8, 2, 4), {"kind": "supcon"}, 'did you mean "sup_con"'),
    ((1, 2, 4), {"kind": "dcl"}, "at least 2"),
    ((8, 2, 4), {"kind": "sup_con"}, "no labels"),
    ((8, 2, 4), {"kind": "sup_con", "label": np.zeros(16, int)}, "[8]"),
    ((8, 2, 4), {"kind": "sup_con", "label": np.zeros(8)}, "integer"),
  ],
)
def test_a_wrong_argument_is_named_in_one_line(shape, options, says):
  options = {"kind": "nt_xent", "temperature": 0.1, **options}
  if "mesh" in options:
    options["mesh"] = sharding.data_mesh()
  with pytest.raises(errors.UserError, match=re.escape(says)) as caught:
    losses.contrast(z=jnp.zeros(shape), **options)
  assert "\n" not in str(caught.value)
