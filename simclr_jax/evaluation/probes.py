"""Linear classifiers of fixed features, many at once: a grid of stochastic ones, and logistic regressions."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from simclr_jax import errors, optim
from simclr_jax.evaluation import features as evaluation
from simclr_jax.hardware import sharding
from simclr_jax.models import heads

# Rows whose logits, of all classifiers, are in memory together when they are counted.
BLOCK = 1024


def train_grid(
  train_x,
  train_y,
  *,
  classes: int,
  learning_rates: Sequence[float],
  weight_decays: Sequence[float],
  epochs: int,
  batch_size: int,
  seed: int,
  momentum: float = 0.9,
  mesh: jax.sharding.Mesh | None = None,
) -> dict[str, Any]:
  """Returns a linear classifier for each learning rate and weight decay, all trained at once.

  Appendix B.6 of Chen et al. 2020, on features that do not change: `optim.momentum`, a cosine rate without warm-up,
  weights from zero, the L2 term of `optim.weight_decay_loss` (which takes the bias along, as the reference's). All
  classifiers see the same batches, so that each product of a batch with its weights is one for the whole grid.

  An epoch is one dispatch of examples // batch_size steps: its order is a function of (seed, epoch), and what does not
  fill a batch at its end is left out, others each time. The steps of the schedule are epochs times that.

  Every device holds all features (those of ImageNet with ResNet-50: 1.28M x 2048 x 4 bytes = 10.5 GB; the limit on
  what can be done here), three copies of every classifier (24 of them: 0.6 GB) and the logits of its own part of a
  batch.

  Args:
    train_x: f[N, D], computed in its own type.
    train_y: i32[N].
    classes: K.
    learning_rates: L of them, for 256 images (linear scaling).
    weight_decays: W of them.
    epochs: over the training rows.
    batch_size: rows of a step; a multiple of the devices.
    seed: of the order.
    momentum: decay of the buffer.
    mesh: whose devices share every batch; None for one device.

  Returns:
    params of `heads.LinearHead`, with two more axes in front: kernel f[L, W, D, K], bias f[L, W, K].
  """
  mesh = mesh or _one_device()
  sharding.check_divisible(batch_size, mesh)
  steps = len(train_x) // batch_size
  if not steps:
    raise errors.UserError(f"{len(train_x)} training rows cannot fill a batch of {batch_size}; choose a smaller one.")
  x, y = _whole(train_x, mesh), _whole(np.asarray(train_y, np.int32), mesh)
  grid = [_whole(np.asarray(values, x.dtype), mesh) for values in (learning_rates, weight_decays)]
  head = _head(classes, x.dtype)

  def optimizer(learning_rate):
    schedule = optim.schedule(
      base_learning_rate=learning_rate,
      batch_size=batch_size,
      scaling="linear",
      warmup_steps=0,
      total_steps=epochs * steps,
    )
    return optim.momentum(schedule, momentum=momentum)

  def start(learning_rate, weight_decay):
    del weight_decay  # only there for the grid's second axis
    params = _zeros(head, x.shape[1])
    return params, optimizer(learning_rate).init(params)

  def update(learning_rate, weight_decay, state, x, y):
    def loss_fn(params):
      logits = head.apply({"params": params}, x)
      loss = jnp.mean(optax.losses.softmax_cross_entropy_with_integer_labels(logits, y))
      return loss + optim.weight_decay_loss(params, weight_decay, optimizer="momentum")

    params, opt_state = state
    updates, opt_state = optimizer(learning_rate).update(jax.grad(loss_fn)(params), opt_state, params)
    return optax.apply_updates(params, updates), opt_state

  def run_epoch(state, epoch, grid, x, y):
    order = jax.random.permutation(jax.random.fold_in(jax.random.key(seed), epoch), len(x))
    order = order[: steps * batch_size].reshape(steps, batch_size)
    order = jax.lax.with_sharding_constraint(order, NamedSharding(mesh, PartitionSpec(None, sharding.AXIS)))
    step = lambda state, rows: (_over_grid(update, 0, None, None)(*grid, state, x[rows], y[rows]), None)
    return jax.lax.scan(step, state, order)[0]

  everywhere = sharding.replicated(mesh)
  state = jax.jit(_over_grid(start), out_shardings=everywhere)(*grid)
  run_epoch = jax.jit(run_epoch, donate_argnums=0, out_shardings=everywhere)
  for epoch in range(epochs):
    state = run_epoch(state, epoch, grid, x, y)
  return state[0]


def logistic_regression(
  train_x,
  train_y,
  *,
  classes: int,
  l2_strengths: Sequence[float],
  max_steps: int,
  tolerance: float,
  mesh: jax.sharding.Mesh | None = None,
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
  """Returns logistic regressions, one for each strength of the L2 penalty, and how their searches ended.

  Multinomial ones; where labels are vectors, one of two classes for each class, all at once: the sum of their
  objectives, which is lowest where each of them is, with one strength for all.

  Each minimises mean cross-entropy + strength / 2 * ||kernel||^2 (scikit-learn's with C = 1 / (N strength); the bias
  is free). By `optax.lbfgs`, which is here already and runs where the features are: scikit-learn's would have one
  processor do it. From the strongest penalty to the weakest, each from the solution before: four times as fast as
  all at once under vmap, where every line search waits for the longest. The features are taken as they come: see
  `standardise`, which makes the problem better conditioned and a strength mean the same for every encoder.

  The rows and their logits (for ImageNet 1.28M x 1000 x 4 bytes = 5.1 GB, and as much again for each of the few arrays
  of that shape in a gradient) are split over the devices; products are in the features' full precision.

  Args:
    train_x: f[N, D], computed in its own type.
    train_y: i32[N]; or i32[N, K], whether row n is of class k: 1 yes, 0 no, -1 (does not count) unknown.
    classes: K.
    l2_strengths: S of them.
    max_steps: of each search.
    tolerance: a search ends where no entry of the gradient is larger.
    mesh: whose devices share the rows; None for one device.

  Returns:
    params of `heads.LinearHead` with one more axis in front: kernel f[S, D, K], bias f[S, K]; and by strength
    `objective` f[S], `gradient` f[S] (its largest entry) and `steps` i32[S].
  """
  mesh = mesh or _one_device()
  examples = len(train_x)
  share = np.full(examples, 1 / examples, train_x.dtype)
  rows = -(-examples // mesh.size) * mesh.size
  x, y, share = (_split(array, rows, mesh) for array in (train_x, np.asarray(train_y, np.int32), share))
  head, tx = _head(classes, x.dtype), optax.lbfgs()

  def objective(params, strength, x, y, share):
    logits = head.apply({"params": params}, x)
    loss = jnp.sum(share * _losses(logits, y))
    return loss + strength / 2 * jnp.sum(jnp.square(params["dense"]["kernel"]))

  def solve(params, strength, *data):
    of = lambda params: objective(params, strength, *data)
    value_and_grad = optax.value_and_grad_from_state(of)
    largest = lambda state: optax.tree.norm(optax.tree.get(state, "grad"), ord=jnp.inf)

    def step(carry):
      params, state, count, _ = carry
      value, grad = value_and_grad(params, state=state)
      updates, state = tx.update(grad, state, params, value=value, grad=grad, value_fn=of)
      moved = optax.tree.norm(updates, ord=jnp.inf) > 0
      return optax.apply_updates(params, updates), state, count + 1, moved

    # A line search that finds nothing lower has reached the end of the precision.
    going_on = lambda carry: (carry[2] < 1) | ((carry[2] < max_steps) & (largest(carry[1]) > tolerance) & carry[3])
    params, state, count, _ = jax.lax.while_loop(going_on, step, (params, tx.init(params), 0, True))
    ended = {"objective": optax.tree.get(state, "value"), "gradient": largest(state), "steps": count}
    return params, (params, ended)

  def path(strengths, *data):
    start = _zeros(head, x.shape[1])
    with jax.default_matmul_precision("highest"):
      solved = jax.lax.scan(lambda params, strength: solve(params, strength, *data), start, strengths)[1]
    return jax.tree.map(lambda leaf: leaf[np.argsort(order)], solved)

  order = np.argsort(-np.asarray(l2_strengths), kind="stable")
  strengths = _whole(np.asarray(l2_strengths, x.dtype)[order], mesh)
  params, ended = jax.jit(path, out_shardings=sharding.replicated(mesh))(strengths, x, y, share)
  return params, jax.device_get(ended)


def _losses(logits, y):
  """Returns f[N]: softmax cross-entropies, or sums over the classes of sigmoid cross-entropies of known labels."""
  if y.ndim == 1:
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, y)
  of_class = optax.losses.sigmoid_binary_cross_entropy(logits, jnp.maximum(y, 0).astype(logits.dtype))
  return jnp.sum(jnp.where(y >= 0, of_class, 0), axis=1)


def logits(params, x, *, mesh: jax.sharding.Mesh | None = None) -> Iterator[np.ndarray]:
  """Yields f[M, K] for each classifier of a path.

  Args:
    params: of `heads.LinearHead`, with one more axis in front: kernel f[S, D, K], bias f[S, K].
    x: f[M, D].
    mesh: whose devices share the rows; None for one device.
  """
  mesh = mesh or _one_device()
  of_rows = jax.jit(
    lambda kernel, bias, x: jnp.dot(x, kernel, precision="highest") + bias[None],
    out_shardings=sharding.replicated(mesh),
  )
  rows = _split(x, -(-len(x) // mesh.size) * mesh.size, mesh)
  for kernel, bias in zip(params["dense"]["kernel"], params["dense"]["bias"], strict=True):
    yield np.asarray(of_rows(kernel, bias, rows))[: len(x)]


def accuracies(params, x, y, *, mesh: jax.sharding.Mesh | None = None) -> dict[str, np.ndarray]:
  """Returns top-1 and top-5 accuracy of every classifier of a grid or a path; one that diverged has 0.

  Args:
    params: of `heads.LinearHead`, with any axes in front: kernel f[..., D, K], bias f[..., K].
    x: f[M, D].
    y: i32[M].
    mesh: whose devices share the rows; None for one device.

  Returns:
    `top1` and `top5`, float64[...], shares of M.
  """
  mesh = mesh or _one_device()
  examples, block = len(x), -(-BLOCK // mesh.size) * mesh.size

  def count(dense, x, y, real):
    logits = jnp.dot(x, dense["kernel"], precision="highest") + dense["bias"][None]
    rank = evaluation.ranks(logits, y)
    return {name: jnp.sum((rank < top) & real) for name, top in (("top1", 1), ("top5", 5))}

  for _ in range(params["dense"]["bias"].ndim - 1):
    count = jax.vmap(count, in_axes=(0, None, None, None))
  count = jax.jit(count, out_shardings=sharding.replicated(mesh))
  right = {"top1": 0, "top5": 0}
  for begin in range(0, examples, block):
    rows = slice(begin, begin + block)
    part = (x[rows], np.asarray(y[rows], np.int32), np.ones(len(x[rows]), bool))
    counts = count(params["dense"], *(_split(array, block, mesh) for array in part))
    right = {name: right[name] + np.asarray(counts[name], np.int64) for name in right}
  return {name: total / examples for name, total in right.items()}


def standardise(train, *others) -> list[np.ndarray]:
  """Returns features with the training ones' mean taken off and divided by their deviation; constant ones become 0.

  Args:
    train: f[N, D].
    others: f[M, D] each, of the same features.
  """
  # In float64, because the squares of a million rows do not add up in float32, some columns at a time.
  columns = np.array_split(train, -(-train.shape[1] // 64), axis=1)
  mean, deviation = (
    np.concatenate([of(part, axis=0, dtype=np.float64) for part in columns]) for of in (np.mean, np.std)
  )
  varies = deviation > np.finfo(train.dtype).eps * np.abs(mean)
  scale = np.where(varies, 1 / np.where(varies, deviation, 1), 0).astype(train.dtype)
  return [(x - mean.astype(train.dtype)) * scale for x in (train, *others)]


def held_back(examples: int, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns the sorted row numbers (to train on, to choose by) of a random split with about `share` in the second.

  Both have at least one row.
  """
  count = min(max(1, round(examples * share)), examples - 1)
  order = np.random.default_rng([seed, 0]).permutation(examples)
  return np.sort(order[count:]), np.sort(order[:count])


def _head(classes, dtype):
  return heads.LinearHead(classes, zero_init=True, dtype=dtype, param_dtype=dtype)


def _zeros(head, dim):
  return head.init(jax.random.key(0), jnp.zeros((1, dim), head.dtype))["params"]


def _over_grid(of, *rest):
  """Returns `of(learning rate, weight decay, ...)` for vectors of both: results have the axes [L, W] in front.

  Args:
    of: the function for one cell.
    rest: for each further argument 0, if it has the grid's axes, or None.
  """
  return jax.vmap(jax.vmap(of, in_axes=(None, 0, *rest)), in_axes=(0, None, *rest))


def _one_device():
  return sharding.data_mesh(jax.local_devices()[:1])


def _whole(array, mesh):
  """Returns the array on every device."""
  # Not device_put, which would compare it among the processes.
  return jax.make_array_from_callback(array.shape, sharding.replicated(mesh), lambda part: array[part])


def _split(array, rows, mesh):
  """Returns the array, filled up with zeros to so many rows, its rows split over the devices."""
  padding = np.zeros((rows - len(array), *array.shape[1:]), array.dtype)
  array = np.concatenate([array, padding]) if len(padding) else array
  return jax.make_array_from_callback(array.shape, sharding.batched(mesh), lambda part: array[part])
