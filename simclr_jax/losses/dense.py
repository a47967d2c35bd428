"""The losses that v1 compares NT-Xent with (its tables 2 and 4): margin and NT-logistic, dense and short."""

import jax
import jax.numpy as jnp
from jax import lax

KINDS = ("margin", "margin_semi_hard", "nt_logistic", "nt_logistic_semi_hard")


def pair_loss(kind: str, z: jax.Array, *, temperature: jax.Array, margin: float) -> jax.Array:
  """Returns the mean over all 2N embeddings of one of KINDS.

  Table 2 of Chen et al. 2020. A row's positive p is the other view of its image, its negatives are those N-1 views of
  the other images that p was drawn with (v1 section 5.1 too takes the negatives of one view only); its loss is

    margin       the mean over its negatives n of max(0, margin + z.n - z.p)
    nt_logistic  ln(1 + exp(-z.p / temperature)) + the mean over its negatives of ln(1 + exp(z.n / temperature))

  With semi-hard mining (Schroff et al. 2015) the closest of those negatives that are farther away than the positive
  stands for all of them; where all are closer, there is none, and no term for it. For a device, memory is that of its
  rows of the similarities, so it grows with the square of N.

  Args:
    kind: one of KINDS.
    z: f32[N, 2, D], both views of an image together, normalised if they are to be; N at least 2.
    temperature: f32[], of nt_logistic.
    margin: of margin.
  """
  # Second views against first views are the same products, read by columns.
  across = jnp.matmul(z[:, 0], z[:, 1].T, precision=lax.Precision.HIGHEST)
  similarity = jnp.stack([across, across.T])
  positive = jnp.diagonal(across)[None, :, None]
  negative = ~jnp.eye(z.shape[0], dtype=bool)[None]

  if kind.endswith("_semi_hard"):
    farther = negative & (similarity < positive)
    negative = jnp.any(farther, axis=2, keepdims=True)
    closest = jnp.max(jnp.where(farther, similarity, -jnp.inf), axis=2, keepdims=True)
    # Infinity must not reach the logarithms: in a gradient, zero times infinity is not a number.
    similarity, count = jnp.where(negative, closest, 0), 1
  else:
    count = z.shape[0] - 1

  if kind.startswith("margin"):
    terms, attraction = jax.nn.relu(margin + similarity - positive), 0
  else:
    terms, attraction = jax.nn.softplus(similarity / temperature), jax.nn.softplus(-positive / temperature)
  return jnp.mean(jnp.sum(jnp.where(negative, terms, 0), axis=2, keepdims=True) / count + attraction)
