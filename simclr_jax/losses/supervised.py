"""The supervised objective: softmax cross-entropy with its accuracy."""

import jax
import jax.numpy as jnp
import optax


def cross_entropy(logits: jax.Array, label: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns the mean softmax cross-entropy and the accuracy of logits f[N, K] for label i[N].

  Rows of label -1 have no label and do not count; without any other row both are 0.
  """
  known = label >= 0
  losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(label, 0))
  mean = lambda x: jnp.sum(jnp.where(known, x, 0)) / jnp.maximum(jnp.sum(known), 1)
  return mean(losses), mean((jnp.argmax(logits, -1) == label).astype(losses.dtype))


def weighted_cross_entropy(logits: jax.Array, label: jax.Array, weights: jax.Array) -> jax.Array:
  """Returns the sum over N of the softmax cross-entropies of logits f[N, K], each times the weight f[K] of its label.

  Rows of label -1 have no label and do not count.
  """
  own = jnp.maximum(label, 0)
  losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, own)
  return jnp.sum(jnp.where(label >= 0, weights[own] * losses, 0))
