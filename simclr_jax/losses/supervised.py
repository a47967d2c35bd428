"""The supervised objective: softmax cross-entropy with its accuracy."""

import jax
import jax.numpy as jnp
import optax


def cross_entropy(logits: jax.Array, label: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns the mean softmax cross-entropy and the accuracy of logits f[N, K] for label i[N]."""
  losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, label)
  return jnp.mean(losses), jnp.mean(jnp.argmax(logits, -1) == label)
