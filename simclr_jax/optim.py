"""LARS with its masks, Nesterov momentum, Adam, the schedule, and steps from epochs."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from simclr_jax import errors

OPTIMIZERS: tuple[str, ...] = ("lars", "momentum", "adam")
SCALINGS: tuple[str, ...] = ("linear", "sqrt")

Schedule = Callable[[Any], jax.Array]


def total_steps(examples: int, epochs: float, batch_size: int) -> int:
  """Returns the optimizer steps of a run: whole batches (of images, not views) plus one, which the reference adds."""
  return warmup_steps(examples, epochs, batch_size) + 1


def warmup_steps(examples: int, warmup_epochs: float, batch_size: int) -> int:
  """Returns the number of steps of linear warm-up, rounded down; a UserError where an argument is out of range."""
  if examples < 1 or batch_size < 1 or warmup_epochs < 0:
    raise errors.UserError(
      f"got {examples} examples, {warmup_epochs} epochs and batch_size {batch_size}; "
      "examples and batch_size must be positive, epochs not negative"
    )
  return int(warmup_epochs * examples // batch_size)


def schedule(
  *, base_learning_rate: float, batch_size: int, scaling: str, warmup_steps: int, total_steps: int
) -> Schedule:
  """Returns step -> learning rate: linear warm-up from zero, then half a cosine to zero, without restarts.

  Appendix B.1 of Chen et al. 2020. The peak is base * batch_size / 256 (`linear`) or base * sqrt(batch_size) (`sqrt`);
  the rate of the first step (step 0) is 0. The step may be an int, an array or traced.
  """
  if scaling not in SCALINGS:
    raise errors.UserError(
      f'learning-rate scaling "{scaling}" is unknown; use linear or sqrt{errors.nearest(scaling, SCALINGS)}'
    )
  peak = base_learning_rate * (batch_size / 256 if scaling == "linear" else math.sqrt(batch_size))
  # A short trial run may end before its warm-up does.
  decay_steps = max(total_steps - warmup_steps, 1)

  def learning_rate(step):
    step = jnp.asarray(step)
    # (1 + cos) / 2 cancels near the end and has no correct digits in float32; the squared sine of the remaining part is
    # the same function without cancellation.
    remaining = jnp.clip(total_steps - step, 0, decay_steps) / jnp.asarray(decay_steps, float)
    cosine = jnp.square(jnp.sin(math.pi / 2 * remaining))
    return peak * jnp.where(step < warmup_steps, step / jnp.asarray(max(warmup_steps, 1), float), cosine)

  return learning_rate


def lars(
  learning_rate: float | Schedule, *, weight_decay: float, momentum: float = 0.9, trust_coefficient: float = 0.001
) -> optax.GradientTransformation:
  """Returns LARS (You et al. 2017) with the reference's exclusions, see `lars_mask`.

  The learning rate is inside the momentum buffer; the trust coefficient is eta in the paper.
  """
  # Both masks are needed: optax adapts every leaf by default.
  return optax.lars(
    learning_rate,
    weight_decay=weight_decay,
    weight_decay_mask=lars_mask,
    trust_coefficient=trust_coefficient,
    trust_ratio_mask=lars_mask,
    momentum=momentum,
    nesterov=False,
  )


def momentum(learning_rate: float | Schedule, *, momentum: float = 0.9) -> optax.GradientTransformation:
  """Returns Nesterov momentum with the learning rate inside the buffer; `optax.sgd` has it outside.

  v = m v - lr g; w = w + m v - lr g, the form of TensorFlow 2.
  """
  return optax.chain(optax.scale_by_learning_rate(learning_rate), optax.trace(decay=momentum, nesterov=True))


def adam(
  learning_rate: float | Schedule, *, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-7
) -> optax.GradientTransformation:
  """Returns Adam in TensorFlow's form, which adds epsilon before the bias correction.

  w = w - lr sqrt(1 - b2^t) / (1 - b1^t) m / (sqrt(v) + eps). Kingma and Ba 2015, end of section 2.
  """

  def update(grads, state, params=None):
    del params
    count = optax.safe_increment(state.count)
    mu = optax.tree.update_moment(grads, state.mu, b1, 1)
    nu = optax.tree.update_moment_per_elem_norm(grads, state.nu, b2, 2)
    # expm1, because 1 - b2^t loses half its digits in float32 when t is small.
    correction = jnp.sqrt(-jnp.expm1(count * math.log(b2))) / -jnp.expm1(count * math.log(b1))
    updates = jax.tree.map(lambda m, v: (correction * m / (jnp.sqrt(v) + eps)).astype(m.dtype), mu, nu)
    return updates, optax.ScaleByAdamState(count=count, mu=mu, nu=nu)

  scaled = optax.GradientTransformation(optax.scale_by_adam().init, update)
  return optax.chain(scaled, optax.scale_by_learning_rate(learning_rate))


def weight_decay_loss(params: Any, weight_decay: float, *, optimizer: str) -> jax.Array:
  """Returns the L2 term that the reference adds to the loss: weight_decay / 2 times a sum of squared weights.

  With LARS, which decays the other weights itself, the sum is over the kernels of the supervised head; with the
  other optimizers it is over all weights except those of normalisation layers, biases of dense layers included.
  """
  if optimizer not in OPTIMIZERS:
    hint = errors.nearest(optimizer, OPTIMIZERS)
    raise errors.UserError(f'optimizer "{optimizer}" is unknown; use one of {", ".join(OPTIMIZERS)}{hint}')
  if optimizer == "lars":
    chosen = [_in_linear_head(name) and name[-1] == "kernel" for name in leaf_names(params)]
  else:
    chosen = [not normalization for normalization in jax.tree.leaves(normalization_mask(params))]
  leaves = [leaf for leaf, use in zip(jax.tree.leaves(params), chosen, strict=True) if use]
  squares = [jnp.sum(jnp.square(x.astype(jnp.promote_types(x.dtype, jnp.float32)))) for x in leaves]
  return jnp.asarray(weight_decay / 2 * sum(squares))


def lars_mask(params: Any) -> Any:
  """Returns a tree of bools: False for `scale`, `bias` and modules named like `linear_head`, which LARS spares."""
  adapted = [name[-1] not in ("scale", "bias") and not _in_linear_head(name) for name in leaf_names(params)]
  return jax.tree.unflatten(jax.tree.structure(params), adapted)


def normalization_mask(params: Any) -> Any:
  """Returns a tree of bools, True for the leaves of batch and layer norms: a `scale`, or a `bias` beside one."""
  names = leaf_names(params)
  scaled = {name[:-1] for name in names if name[-1] == "scale"}
  mask = [name[-1] in ("scale", "bias") and name[:-1] in scaled for name in names]
  return jax.tree.unflatten(jax.tree.structure(params), mask)


def leaf_names(params: Any) -> list[tuple[str, ...]]:
  """Returns each leaf's path as names, in the order of `jax.tree.leaves`."""
  return [
    tuple(jax.tree_util.keystr((key,), simple=True) for key in path)
    for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]
  ]


def _in_linear_head(name: tuple[str, ...]) -> bool:
  return any("linear_head" in module for module in name[:-1])
