"""Margin and NT-logistic against their definitions, pair by pair in float64, and on eight devices."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_losses import random_views

from simclr_jax import errors, losses
from simclr_jax.hardware import sharding

MARGIN, TEMPERATURE = 0.8, 0.3
DENSE = [kind for kind in losses.KINDS if kind not in losses.BLOCKWISE]


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def twin(kind, z, temperature=TEMPERATURE, margin=MARGIN, normalize=True):
  """Returns loss and gradient [N, 2, D] from v1's table 2, adding up rows, and for each its negatives."""
  z = np.asarray(z, np.float64)
  norms = np.linalg.norm(z, axis=2, keepdims=True)
  u = z / norms if normalize else z
  n = len(u)
  loss, grad = 0.0, np.zeros_like(u)

  def add(a, b, value, slope):
    nonlocal loss
    loss += value / (2 * n)
    grad[a] += slope / (2 * n) * u[b]
    grad[b] += slope / (2 * n) * u[a]

  for i in range(n):
    for view in (0, 1):
      row, positive = (i, view), (i, 1 - view)
      similarity = u[row] @ u[positive]
      negatives = [((j, 1 - view), u[row] @ u[j, 1 - view]) for j in range(n) if j != i]
      if kind.endswith("semi_hard"):
        negatives = sorted((x for x in negatives if x[1] < similarity), key=lambda x: x[1])[-1:]
      if kind.startswith("nt_logistic"):
        add(
          row, positive, -np.log(sigmoid(similarity / temperature)), -sigmoid(-similarity / temperature) / temperature
        )
      for other, s in negatives:
        share = 1 / len(negatives)
        if kind.startswith("nt_logistic"):
          add(row, other, -share * np.log(sigmoid(-s / temperature)), share * sigmoid(s / temperature) / temperature)
        elif margin + s - similarity > 0:
          add(row, other, share * (margin + s), share)
          add(row, positive, -share * similarity, -share)
  if normalize:
    grad = (grad - u * np.sum(u * grad, axis=2, keepdims=True)) / norms
  return loss, grad


@functools.partial(jax.jit, static_argnames=("kind", "normalize", "mesh"))
def evaluate(z, kind, temperature=TEMPERATURE, normalize=True, mesh=None):
  options = {"temperature": temperature, "margin": MARGIN, "normalize": normalize, "mesh": mesh}
  return jax.value_and_grad(lambda z: losses.contrast(kind, z, **options), has_aux=True)(z)


@pytest.mark.slow
@pytest.mark.devices(8)
@pytest.mark.parametrize("kind", DENSE)
def test_loss_and_gradient_are_the_definition_on_one_device_and_eight(kind, x64):
  mesh = sharding.data_mesh()
  for noise, normalize, on in ((0.5, True, None), (1.5, True, None), (0.5, True, mesh), (0.5, False, mesh)):
    z = random_views(16, 3, seed=2, noise=noise)
    want_loss, want_grad = twin(kind, z, normalize=normalize)
    placed = z if on is None else jax.device_put(z, sharding.batched(on))
    (loss, _), grad = evaluate(placed, kind, normalize=normalize, mesh=on)
    np.testing.assert_allclose(loss, want_loss, rtol=1e-9)
    np.testing.assert_allclose(grad, want_grad, rtol=0, atol=1e-9 * np.abs(want_grad).max())
    assert grad.dtype == np.float64


@pytest.mark.parametrize("kind", DENSE)
def test_the_twins_gradient_is_the_slope_of_its_loss(kind):
  z = random_views(6, 3, seed=1)
  direction = np.random.default_rng(2).normal(size=z.shape)
  ahead, behind = (twin(kind, z + s * 1e-6 * direction)[0] for s in (1, -1))
  np.testing.assert_allclose((ahead - behind) / 2e-6, np.sum(twin(kind, z)[1] * direction), rtol=1e-7)


# across[i, j]: the similarity of image i's first view and image j's second one.
ACROSS = np.array([[0.9, 0.95, 0.5], [0.2, 0.6, -0.9], [0.95, 0.7, 0.1]])


@pytest.mark.slow
@pytest.mark.parametrize(
  ("kind", "rows"),
  [
    # First views, then second views; the mean over two negatives of each, then the closest farther one alone.
    ("margin", [(0.85 + 0.4) / 2, 0.4 / 2, (1.65 + 1.4) / 2, (0.1 + 0.85) / 2, (1.15 + 0.9) / 2, 1.2 / 2]),
    ("margin_semi_hard", [0.4, 0.4, 0, 0.1, 0, 0]),
  ],
)
def test_margin_by_hand(kind, rows):
  z = jnp.asarray(np.stack([np.eye(3), ACROSS.T], axis=1), jnp.float32)
  loss, _ = losses.contrast(kind, z, temperature=1.0, margin=0.8, normalize=False)
  np.testing.assert_allclose(loss, np.mean(rows), rtol=1e-6)


@pytest.mark.slow
@pytest.mark.devices(8)
@pytest.mark.parametrize("kind", DENSE)
def test_metrics_are_those_of_nt_xent_and_have_no_gradient(kind):
  z = jnp.asarray(random_views(16, 4, dtype=np.float32))
  want = losses.nt_xent(z, temperature=TEMPERATURE)[1]
  mesh = sharding.data_mesh()

  def after(z):
    loss, metrics = losses.contrast(kind, z, temperature=TEMPERATURE, margin=MARGIN, mesh=mesh)
    return loss + sum(metrics.values()), metrics

  grad, metrics = jax.jit(jax.grad(after, has_aux=True))(z)
  assert metrics.keys() == want.keys()
  for name in want:
    np.testing.assert_allclose(metrics[name], want[name], rtol=1e-6)
  (_, _), alone = evaluate(z, kind)
  np.testing.assert_allclose(grad, alone, rtol=0, atol=1e-6 * np.abs(alone).max())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nt_logistic", "nt_logistic_semi_hard"])
def test_the_temperature_can_be_learned(x64, kind):
  # All similarities are equal, so that some rows have no negative farther than the positive.
  z = random_views(8, 3)
  z[:4] = z[0, 0]
  slope = (twin(kind, z, temperature=0.5 + 1e-6)[0] - twin(kind, z, temperature=0.5 - 1e-6)[0]) / 2e-6
  loss_fn = lambda temperature: losses.contrast(kind, jnp.asarray(z), temperature=temperature)[0]
  np.testing.assert_allclose(jax.grad(loss_fn)(0.5), slope, rtol=1e-7)


def test_margin_semi_hard_is_zero_without_a_negative_farther_away():
  z = jnp.asarray([[[1.0, 0], [-1, 0]], [[-1, 0], [1, 0]]])
  (loss, _), grad = evaluate(z, "margin_semi_hard")
  assert loss == 0
  np.testing.assert_array_equal(grad, 0)


@pytest.mark.parametrize(
  ("kind", "images", "options", "says"),
  [
    ("margin", 4, {"margin": 0.0}, "margin got margin 0.0; it must be positive"),
    ("margin_semi_hard", 4, {"margin": -1.0}, "must be positive"),
    ("nt_logistic", 1, {}, "at least 2"),
    ("nt_logistic", 4, {"temperature": 0.0}, "temperature"),
    ("nt_logistic_semihard", 4, {}, 'did you mean "nt_logistic_semi_hard"'),
    ("margin", 4, {"queue": jnp.zeros((8, 4))}, "use nt_xent or dcl"),
  ],
)
def test_a_wrong_argument_is_named_in_one_line(kind, images, options, says):
  with pytest.raises(errors.UserError, match=re.escape(says)) as caught:
    losses.contrast(kind, jnp.zeros((images, 2, 4)), **{"temperature": 0.1, **options})
  assert "\n" not in str(caught.value)
