"""How embeddings lie in their space: alignment, uniformity, effective rank; a collapse shows here first of all."""

import numpy as np


def alignment(z) -> float:
  """Returns the mean squared distance of the two views of an image on the unit sphere, 0 (all alike) to 4.

  Wang and Isola 2020 (arXiv 2005.10242), equation 1 with alpha = 2.

  Args:
    z: f[N, 2, D].
  """
  z = _unit(z)
  return float(np.mean(np.sum((z[:, 0] - z[:, 1]) ** 2, axis=-1)))


def uniformity(z) -> float:
  """Returns the logarithm of the mean of exp(-2 d^2), d the distance on the unit sphere of views of different images.

  Wang and Isola 2020, equation 2 with t = 2: 0 where all embeddings are one point, about -4 where they spread evenly
  over many dimensions.

  Args:
    z: f[N, V, D], V views of N images, N at least 2.
  """
  images, views = np.shape(z)[:2]
  z = _unit(z).reshape(images * views, -1)
  # On the unit sphere a squared distance is 2 - 2 cos; rounding may take it below zero.
  weights = np.exp(-2 * np.maximum(2 - 2 * z @ z.T, 0)).reshape(images, views, images, views)
  different = ~np.eye(images, dtype=bool)
  return float(np.log(np.mean(weights.swapaxes(1, 2)[different])))


def effective_rank(x) -> float:
  """Returns over how many directions the rows of x spread: the exponential of the entropy of their singular values.

  Roy and Vetterli 2007, "The effective rank"; RankMe of Garrido et al. 2023 (arXiv 2210.02885) has it of embeddings,
  not centred. 1 where all rows are multiples of one, min(N, D) where all singular values are equal, 0 of zeros, not a
  number where an entry is none.

  Args:
    x: f[N, D].
  """
  x = np.asarray(x, np.float64)
  if not np.all(np.isfinite(x)):
    return float("nan")  # A network that diverged; the decomposition would raise.
  values = np.linalg.svd(x, compute_uv=False)
  shares = values[values > 0] / max(np.sum(values), np.finfo(np.float64).tiny)
  return float(np.exp(-np.sum(shares * np.log(shares)))) if len(shares) else 0.0


def _unit(z):
  z = np.asarray(z, np.float64)
  return z / np.maximum(np.linalg.norm(z, axis=-1, keepdims=True), 1e-12)
