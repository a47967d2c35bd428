"""Geometry of embeddings: alignment, uniformity and effective rank, where a collapse of the network shows first."""

import jax
import numpy as np

# The smallest norm that `unit` divides by: a zero vector stays zero.
EPSILON = 1e-12


def unit(x: np.ndarray | jax.Array) -> np.ndarray | jax.Array:
  """Returns x / max(||x||, EPSILON) of f[..., D], the norm along the last axis, in the library of x.

  Evaluation normalises with this function only. The losses have their own, `losses.l2_normalized`, which multiplies by
  the reference's rsqrt(max(||x||^2, 1e-12)) and rounds differently.
  """
  xp = x.__array_namespace__()
  return x / xp.maximum(xp.linalg.norm(x, axis=-1, keepdims=True), EPSILON)


def alignment(z: np.ndarray) -> float:
  """Returns the mean squared distance of the two views f[N, 2, D] of an image on the unit sphere: 0 (all equal) to 4.

  Wang and Isola 2020 (arXiv 2005.10242), equation 1 with alpha = 2.
  """
  z = unit(np.asarray(z, np.float64))
  return float(np.mean(np.sum((z[:, 0] - z[:, 1]) ** 2, axis=-1)))


def uniformity(z: np.ndarray) -> float:
  """Returns log(mean(exp(-2 d^2))), where d are the distances on the unit sphere between views of different images.

  z is f[N, V, D], V views of N images, N at least 2. Wang and Isola 2020, equation 2 with t = 2: 0 if all embeddings
  are equal, about -4 if they are spread evenly over many dimensions.
  """
  images, views = np.shape(z)[:2]
  z = unit(np.asarray(z, np.float64)).reshape(images * views, -1)
  # On the unit sphere a squared distance is 2 - 2 cos; rounding can make it negative.
  weights = np.exp(-2 * np.maximum(2 - 2 * z @ z.T, 0)).reshape(images, views, images, views)
  different = ~np.eye(images, dtype=bool)
  return float(np.log(np.mean(weights.swapaxes(1, 2)[different])))


def effective_rank(x: np.ndarray) -> float:
  """Returns the effective number of dimensions of the rows of x f[N, D], which are not centred.

  It is exp of the entropy of the normalised singular values: Roy and Vetterli 2007, "The effective rank"; RankMe of
  Garrido et al. 2023 (arXiv 2210.02885). 1 if all rows are multiples of one vector, min(N, D) if all singular values
  are equal, 0 if all entries are 0, NaN if an entry is not finite.
  """
  x = np.asarray(x, np.float64)
  if not np.all(np.isfinite(x)):
    return float("nan")  # The network diverged; np.linalg.svd would raise.
  values = np.linalg.svd(x, compute_uv=False)
  shares = values[values > 0] / max(np.sum(values), np.finfo(np.float64).tiny)
  return float(np.exp(-np.sum(shares * np.log(shares)))) if len(shares) else 0.0
