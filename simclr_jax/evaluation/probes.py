"""Linear classifiers on fixed features, many trained at once: a grid by gradient descent, and logistic regressions."""

import collections
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from sklearn import linear_model, pipeline, preprocessing

from simclr_jax import errors, optim, progress, randomness
from simclr_jax.data import balanced
from simclr_jax.evaluation import scores
from simclr_jax.hardware import sharding
from simclr_jax.models import heads

# Rows per step of `accuracies`: their logits, of all classifiers, are in memory at the same time.
BLOCK = 1024

# Under a weak penalty the gradient at the solution of the next stronger one is already below any usual tolerance, so
# that the gradient alone would end a search where it starts.
STEADY, FALL = 10, 1e-3


@dataclasses.dataclass(frozen=True)
class Grid:
  """Settings of the classifiers that `train_grid` trains: L learning rates times W weight decays."""

  learning_rates: Sequence[float]  # Per 256 images, linearly scaled.
  weight_decays: Sequence[float]
  epochs: int
  batch_size: int  # A multiple of the devices.
  momentum: float = 0.9


@dataclasses.dataclass(frozen=True)
class L2Path:
  """Settings of the logistic regressions that `logistic_regression` solves, one for each of S strengths."""

  l2_strengths: Sequence[float]
  max_steps: int  # Of L-BFGS, for each strength.
  # L-BFGS stops when no entry of the gradient is larger, and STEADY steps lowered the objective by less than FALL.
  tolerance: float


def train_grid(
  train_x: np.ndarray,
  train_y: np.ndarray,
  grid: Grid,
  *,
  classes: int,
  seed: int,
  is_balanced: bool = False,
  mesh: Mesh | None = None,
) -> dict[str, Any]:
  """Returns a linear classifier for each learning rate and weight decay, all trained at once on f[N, D] and i32[N].

  They are params of `heads.LinearHead` with two leading axes: kernel f[L, W, D, K], bias f[L, W, K], in the dtype of
  the features. Appendix B.6 of Chen et al. 2020, on fixed features: `optim.momentum`, a cosine learning rate without
  warm-up, weights initialised to zero, the L2 term of `optim.weight_decay_loss` (which includes the bias, as in the
  reference). `is_balanced` weighs the rows by `balanced.weights`. All classifiers see the same batches, so that the
  product of a batch with all weights is one matrix product.

  An epoch is one dispatch of N // batch_size steps. Its order is a function of (seed, epoch); the rows that do not fill
  a last batch are left out, others in each epoch. The schedule counts epochs * (N // batch_size) steps.

  Every device holds all features (those of ImageNet with ResNet-50: 1.28M x 2048 x 4 bytes = 10.5 GB, which limits the
  size of the data), three copies of every classifier (24 of them: 0.6 GB) and the logits of its part of a batch.
  """
  mesh = mesh or _one_device()
  sharding.check_divisible(grid.batch_size, mesh)
  if len(train_x) < grid.batch_size:
    raise errors.UserError(
      f"{len(train_x)} training rows cannot fill a batch of {grid.batch_size}; choose a smaller one."
    )
  x, y = sharding.replicate(train_x, mesh), sharding.replicate(np.asarray(train_y, np.int32), mesh)
  cells = [
    sharding.replicate(np.asarray(values, x.dtype), mesh) for values in (grid.learning_rates, grid.weight_decays)
  ]
  everywhere = sharding.replicated(mesh)
  weights = jnp.asarray(balanced.weights(train_y, classes), x.dtype) if is_balanced else None
  start, run_epoch = _grid_functions(grid, _head(classes, x.dtype), x.shape, seed, weights, mesh)
  state = jax.jit(start, out_shardings=everywhere)(*cells)
  run_epoch = jax.jit(run_epoch, donate_argnums=0, out_shardings=everywhere)
  progress.doing("training linear classifiers")
  for epoch in progress.counted(range(grid.epochs), grid.epochs, "linear classifiers", "epoch"):
    state = run_epoch(state, epoch, cells, x, y)
  return state[0]


def _grid_functions(grid, head, shape, seed, weights, mesh):
  """Returns (start, run_epoch) of the whole grid.

  start: (learning rates, weight decays) -> state. run_epoch: (state, epoch, (rates, decays), x, y) -> state.
  """
  examples, dim = shape
  steps = examples // grid.batch_size

  def optimizer(learning_rate):
    schedule = optim.schedule(
      base_learning_rate=learning_rate,
      batch_size=grid.batch_size,
      scaling="linear",
      warmup_steps=0,
      total_steps=grid.epochs * steps,
    )
    return optim.momentum(schedule, momentum=grid.momentum)

  def start(learning_rate, weight_decay):
    del weight_decay  # An argument only because the state has an axis for it.
    params = _zeros(head, dim)
    return params, optimizer(learning_rate).init(params)

  def update(learning_rate, weight_decay, state, x, y):
    def loss_fn(params):
      logits = head.apply({"params": params}, x)
      losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, y)
      loss = jnp.mean(losses if weights is None else weights[y] * losses)
      return loss + optim.weight_decay_loss(params, weight_decay, optimizer="momentum")

    params, opt_state = state
    updates, opt_state = optimizer(learning_rate).update(jax.grad(loss_fn)(params), opt_state, params)
    return optax.apply_updates(params, updates), opt_state

  def run_epoch(state, epoch, cells, x, y):
    key = jax.random.fold_in(jax.random.fold_in(randomness.key(seed), randomness.PROBES), epoch)
    order = jax.random.permutation(key, jnp.arange(examples, dtype=jnp.int32))
    order = order[: steps * grid.batch_size].reshape(steps, grid.batch_size)
    order = jax.lax.with_sharding_constraint(order, NamedSharding(mesh, PartitionSpec(None, sharding.AXIS)))
    step = lambda state, rows: (_over_grid(update, 0, None, None)(*cells, state, x[rows], y[rows]), None)
    return jax.lax.scan(step, state, order)[0]

  return _over_grid(start), run_epoch


def logistic_regression(
  train_x: np.ndarray,
  train_y: np.ndarray,
  path: L2Path,
  *,
  classes: int,
  is_balanced: bool = False,
  mesh: Mesh | None = None,
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
  """Returns multinomial logistic regressions of f[N, D], one for each strength of the L2 penalty, and how each ended.

  The first are params of `heads.LinearHead` with one leading axis: kernel f[S, D, K], bias f[S, K], in the dtype of the
  features; the second are `objective` f[S], `gradient` f[S] (its largest entry), `steps` i32[S] and `converged` bool[S]
  of the searches.

  Labels are i32[N]; or i32[N, K], whether row n is of class k: 1 yes, 0 no, -1 unknown (not counted). There is then a
  binary regression for each class: the sum of their objectives is minimised, with one strength for all; its minimum is
  the minimum of each.

  The objective is mean cross-entropy + strength / 2 * ||kernel||^2 (scikit-learn's with C = 1 / (N strength)); the bias
  is not penalised; `is_balanced` weighs the rows of i32[N] by `balanced.weights`. It is minimised by `optax.lbfgs` on
  the devices; scikit-learn's L-BFGS uses one processor. The strongest penalty is solved first and each solution is the
  start of the next weaker one: four times as fast as all at once under vmap, where every line search waits for the
  longest. Features are not standardised here; `standardise` improves the conditioning and gives a strength the same
  meaning for every encoder.

  The rows and their logits (for ImageNet 1.28M x 1000 x 4 bytes = 5.1 GB, and as much again for each of the few arrays
  of that shape in a gradient) are split over the devices; products have the full precision of the features' dtype.
  """
  mesh = mesh or _one_device()
  share = np.full(len(train_x), 1 / len(train_x), train_x.dtype)
  if is_balanced:
    share *= np.asarray(balanced.weights(train_y, classes), train_x.dtype)[train_y]
  # Padded rows have the share 0.
  data = [sharding.place_rows(array, mesh) for array in (train_x, np.asarray(train_y, np.int32), share)]
  dtype = data[0].dtype
  head = _head(classes, dtype)
  order = np.argsort(-np.asarray(path.l2_strengths), kind="stable")

  def along_path(strengths, *data):
    start = _zeros(head, train_x.shape[1])
    with jax.default_matmul_precision("highest"):
      solve = lambda params, strength: _solve(head, path, params, strength, data)
      solved = jax.lax.scan(solve, start, strengths)[1]
    return jax.tree.map(lambda leaf: leaf[np.argsort(order)], solved)

  strengths = sharding.replicate(np.asarray(path.l2_strengths, dtype)[order], mesh)
  progress.doing("solving logistic regressions")
  params, ended = jax.jit(along_path, out_shardings=sharding.replicated(mesh))(strengths, *data)
  return params, jax.device_get(ended)


def _solve(head, path, params, strength, data):
  """Returns (params, (params, how the search ended)) of the regression of one strength, from a start."""
  x, y, share = data
  tx = optax.lbfgs()

  def objective(params):
    logits = head.apply({"params": params}, x)
    loss = jnp.sum(share * _losses(logits, y))
    return loss + strength / 2 * jnp.sum(jnp.square(params["dense"]["kernel"]))

  value_and_grad = optax.value_and_grad_from_state(objective)
  largest = lambda state: optax.tree.norm(optax.tree.get(state, "grad"), ord=jnp.inf)

  def step(carry):
    params, state, count, _, anchor, _ = carry
    value, grad = value_and_grad(params, state=state)
    updates, state = tx.update(grad, state, params, value=value, grad=grad, value_fn=objective)
    moved = optax.tree.norm(updates, ord=jnp.inf) > 0
    params, count, now = optax.apply_updates(params, updates), count + 1, optax.tree.get(state, "value")
    # Every STEADY steps the objective is compared with that of STEADY steps before.
    due = count % STEADY == 0
    steady = due & (anchor - now <= FALL * jnp.abs(now))
    return params, state, count, moved, jnp.where(due, now, anchor), steady

  converged = lambda state, moved, steady: (largest(state) <= path.tolerance) & (steady | ~moved)

  # A line search that finds no lower value has reached the limit of the precision.
  def going_on(carry):
    _, state, count, moved, _, steady = carry
    return (count < 1) | ((count < path.max_steps) & moved & ~converged(state, moved, steady))

  start = (params, tx.init(params), 0, jnp.array(True), objective(params), jnp.array(False))
  params, state, count, moved, _, steady = jax.lax.while_loop(going_on, step, start)
  ended = {"objective": optax.tree.get(state, "value"), "gradient": largest(state), "steps": count}
  ended["converged"] = converged(state, moved, steady)
  return params, (params, ended)


def _losses(logits, y):
  """Returns f[N]: softmax cross-entropies, or the sums over the known labels of sigmoid cross-entropies."""
  if y.ndim == 1:
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, y)
  by_class = optax.losses.sigmoid_binary_cross_entropy(logits, jnp.maximum(y, 0).astype(logits.dtype))
  return jnp.sum(jnp.where(y >= 0, by_class, 0), axis=1)


def logits(params: dict[str, Any], x: np.ndarray, *, mesh: Mesh | None = None) -> Iterator[np.ndarray]:
  """Yields the logits f[M, K] of f[M, D] for each classifier of an L2 path (kernel f[S, D, K], bias f[S, K])."""
  mesh = mesh or _one_device()
  of_rows = jax.jit(
    lambda kernel, bias, x: jnp.dot(x, kernel, precision="highest") + bias[None],
    out_shardings=sharding.replicated(mesh),
  )
  rows = sharding.place_rows(x, mesh)
  for kernel, bias in zip(params["dense"]["kernel"], params["dense"]["bias"], strict=True):
    yield np.asarray(of_rows(kernel, bias, rows))[: len(x)]


def accuracies(
  params: dict[str, Any], x: np.ndarray, y: np.ndarray, *, mesh: Mesh | None = None
) -> dict[str, np.ndarray]:
  """Returns accuracies f64[...] of every classifier of a grid or an L2 path; 0 for one that diverged.

  These are `top1`, `balanced_top1` (its mean over the classes) and, where `scores.tops` has it, `top5`. Classifiers
  have any leading axes: kernel f[..., D, K], bias f[..., K]. The rows are f[M, D] and i32[M].
  """
  mesh = mesh or _one_device()
  examples, block = len(x), -(-BLOCK // mesh.size) * mesh.size
  classes = params["dense"]["bias"].shape[-1]

  def count(dense, x, y, real):
    logits = jnp.dot(x, dense["kernel"], precision="highest") + dense["bias"][None]
    rank = scores.ranks(logits, y)
    counts = {name: jnp.sum((rank < top) & real) for name, top in scores.tops(classes).items()}
    return counts | {"correct": jnp.zeros(classes, jnp.int32).at[y].add((rank < 1) & real)}

  for _ in range(params["dense"]["bias"].ndim - 1):
    count = jax.vmap(count, in_axes=(0, None, None, None))
  count = jax.jit(count, out_shardings=sharding.replicated(mesh))
  totals = collections.defaultdict(int)
  for begin in range(0, examples, block):
    rows = slice(begin, begin + block)
    part = (x[rows], np.asarray(y[rows], np.int32), np.ones(len(x[rows]), bool))
    counts = count(params["dense"], *(sharding.place_rows(array, mesh, block) for array in part))
    for name, value in counts.items():
      totals[name] += np.asarray(value, np.int64)
  of_classes = scores.balanced_of(totals.pop("correct"), np.bincount(y, minlength=classes))
  return {**{name: total / examples for name, total in totals.items()}, "balanced_top1": of_classes}


def standardise(train: np.ndarray, *others: np.ndarray) -> list[np.ndarray]:
  """Returns arrays f[..., D] minus the mean of `train`, by its standard deviation; constant features become 0."""
  mean, scale = _standard(train)
  return [(x - mean) * scale for x in (train, *others)]


def of_raw(dense: dict[str, np.ndarray], train: np.ndarray) -> dict[str, np.ndarray]:
  """Returns a classifier of features as they are that is equal to one of those that `standardise` makes by `train`.

  Both are a `kernel` f[D, K] with a `bias` f[K].
  """
  mean, scale = (x.astype(np.float64) for x in _standard(train))
  kernel = np.asarray(dense["kernel"], np.float64) * scale[:, None]
  bias = np.asarray(dense["bias"], np.float64) - mean @ kernel
  return {name: x.astype(dense["kernel"].dtype) for name, x in (("kernel", kernel), ("bias", bias))}


def _standard(train):
  """Returns the mean f[D], and the factors f[D] that make the deviations of f[N, D] one; 0 for a constant column."""
  mean, variance = _moments(train)
  deviation = np.sqrt(variance)
  varies = deviation > np.finfo(train.dtype).eps * np.abs(mean)
  scale = np.where(varies, 1 / np.where(varies, deviation, 1), 0).astype(train.dtype)
  return mean.astype(train.dtype), scale


def precondition(train: np.ndarray, *others: np.ndarray) -> tuple[list[np.ndarray], float]:
  """Returns arrays f[..., D] minus the mean of `train` and divided by one number, and that number.

  The logistic regressions are the same in the new coordinates if the L2 strength is divided by the number's square (the
  bias, which is not penalised, absorbs the mean), and L-BFGS needs a tenth of the steps.
  """
  mean, variance = _moments(train)
  scale = float(np.sqrt(np.mean(variance))) or 1.0
  return [(x - mean.astype(train.dtype)) / train.dtype.type(scale) for x in (train, *others)], scale


def _moments(x):
  """Returns float64 (mean, variance) of the columns."""
  # Float32 loses precision over a million rows; a few columns at a time need no float64 copy of x.
  columns = np.array_split(x, -(-x.shape[1] // 64), axis=1)
  return tuple(np.concatenate([of(part, axis=0, dtype=np.float64) for part in columns]) for of in (np.mean, np.var))


def held_back(examples: int, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns sorted row numbers (to train on, to choose by), at least one each, about `share` of them in the second."""
  count = min(max(1, round(examples * share)), examples - 1)
  order = randomness.host(seed, randomness.HELD_BACK).permutation(examples)
  return np.sort(order[count:]), np.sort(order[:count])


def probe_accuracy(
  train_x: np.ndarray, train_y: np.ndarray, test_x: np.ndarray, test_y: np.ndarray, *, regularisation: float = 1.0
) -> float:
  """Returns the held-out accuracy of scikit-learn's logistic regression on standardised features; for small data.

  Rows are f32[N, D] and i32[N]; `regularisation` is scikit-learn's C, the inverse strength of the L2 penalty.
  """
  probe = pipeline.make_pipeline(
    preprocessing.StandardScaler(), linear_model.LogisticRegression(C=regularisation, max_iter=2000)
  )
  return float(probe.fit(train_x, train_y).score(test_x, test_y))


def _head(classes, dtype):
  return heads.LinearHead(classes, zero_init=True, dtype=dtype, param_dtype=dtype)


def _zeros(head, dim):
  return head.init(randomness.key(0), jnp.zeros((1, dim), head.dtype))["params"]


def _over_grid(of, *rest):
  """Returns `of(learning rate, weight decay, ...)` mapped over vectors of both; results have leading axes [L, W].

  `rest` says of each further argument whether it has the grid's axes: 0 if so, else None.
  """
  return jax.vmap(jax.vmap(of, in_axes=(None, 0, *rest)), in_axes=(0, None, *rest))


def _one_device():
  return sharding.data_mesh(jax.local_devices()[:1])
