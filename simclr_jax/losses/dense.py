"""The losses that v1 compares NT-Xent with in its tables 2 and 4: margin and NT-logistic.

Each device holds its rows of the whole similarity matrix, so memory grows with the square of N.
"""

import jax
import jax.numpy as jnp
from jax import lax


def margin_loss(z: jax.Array, *, temperature: jax.Array, margin: float, semi_hard: bool = False) -> jax.Array:
  """Returns the mean margin loss over all 2N embeddings f[N, 2, D], N at least 2; it has no use for the temperature.

  Table 2 of Chen et al. 2020. The positive p of a row is the other view of its image, its negatives n are the N-1
  views of the other images from the other view's draw (section 5.1 of v1 also takes the negatives from one view
  only). The loss of a row z is the mean over n of max(0, margin + z.n - z.p). `semi_hard` replaces this mean by the
  closest negative that is farther away than the positive (Schroff et al. 2015); 0 where all negatives are closer.
  """
  del temperature
  similarity, positive, mask, count = _similarities(z, semi_hard=semi_hard)
  return _mean(jax.nn.relu(margin + similarity - positive), 0, mask, count)


def nt_logistic(z: jax.Array, *, temperature: jax.Array, semi_hard: bool = False) -> jax.Array:
  """Returns the mean NT-logistic loss over all 2N embeddings f[N, 2, D].

  Table 2 of Chen et al. 2020, with positives and negatives as in `margin_loss`. The loss of a row z is
  ln(1 + exp(-z.p / temperature)) plus the mean over n of ln(1 + exp(z.n / temperature)).
  """
  similarity, positive, mask, count = _similarities(z, semi_hard=semi_hard)
  repulsion, attraction = jax.nn.softplus(similarity / temperature), jax.nn.softplus(-positive / temperature)
  return _mean(repulsion, attraction, mask, count)


def _similarities(z: jax.Array, *, semi_hard: bool) -> tuple[jax.Array, jax.Array, jax.Array, int]:
  """Returns what both losses are made of.

  Similarities of each row to its K candidates f[2, N, K] and to its positive f[2, N, 1], a mask bool[..., N, K] of
  the candidates that are negatives, and their number in a row. K is N, or 1 with semi-hard mining.
  """
  # The products of second with first views are those of first with second views, transposed.
  across = jnp.matmul(z[:, 0], z[:, 1].T, precision=lax.Precision.HIGHEST)
  similarity = jnp.stack([across, across.T])
  positive = jnp.diagonal(across)[None, :, None]
  negative = ~jnp.eye(z.shape[0], dtype=bool)[None]
  if not semi_hard:
    return similarity, positive, negative, z.shape[0] - 1
  farther = negative & (similarity < positive)
  negative = jnp.any(farther, axis=2, keepdims=True)
  closest = jnp.max(jnp.where(farther, similarity, -jnp.inf), axis=2, keepdims=True)
  # Infinity must not reach the logarithms: in the gradient, 0 times infinity is NaN.
  return jnp.where(negative, closest, 0), positive, negative, 1


def _mean(repulsion: jax.Array, attraction: jax.Array | int, mask: jax.Array, count: int) -> jax.Array:
  return jnp.mean(jnp.sum(jnp.where(mask, repulsion, 0), axis=2, keepdims=True) / count + attraction)
