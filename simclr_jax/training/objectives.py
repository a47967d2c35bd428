"""What a batch means for the network: its loss and its metrics. One class for each way of training."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from simclr_jax import losses, optim
from simclr_jax.losses import negatives
from simclr_jax.models import simclr
from simclr_jax.training import state as state_lib

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
Params = Any

# Of the online classifier whose rate is safe: step times the mean of 1 + |h|^2, at most.
HEAD_STEP = 1.0


def as_it_is(tree: Any) -> Any:
  """Returns its argument: the batch without a device part of the augmentation, or parameters that are replicated."""
  return tree


class Output(NamedTuple):
  """What the network makes of a batch, or of one micro-batch of it."""

  # Embeddings f[n, 2, D] whose loss compares all images of the batch; None where each image has a loss of its own.
  z: jax.Array | None
  loss: jax.Array | float  # f[], the mean over the rows of the losses that images have of their own.
  metrics: Metrics  # Means over the rows.
  batch_stats: Any  # BatchNorm's moving averages after these rows.


@dataclasses.dataclass(frozen=True)
class Placement:
  """How a step is spread over devices and over time."""

  mesh: jax.sharding.Mesh | None = None  # The devices that share the batch; None for one device.
  micro_batches: int = 1  # Parts of the batch that go through the network one after the other.
  gather_params: Callable[[Params], Params] = as_it_is  # All-gathers sharded parameters before the network uses them.


@dataclasses.dataclass(frozen=True)
class Decay:
  """The L2 term of the loss: `weight_decay` for what the optimizer of this name does not decay itself."""

  weight_decay: float
  optimizer: str

  def __call__(self, params: Params) -> jax.Array:
    return optim.weight_decay_loss(params, self.weight_decay, optimizer=self.optimizer)


@dataclasses.dataclass(frozen=True)
class Objective:
  """What step, loop and checkpoints need to know of a way of training; this one trains all of the model."""

  model: nn.Module
  decay: Decay  # The L2 term that the optimizer leaves to the loss.
  prepare: Callable[[Batch], Batch] = as_it_is  # The device's part of the augmentation: adds what the network sees.
  # Metric name -> label, for the progress bar.
  shown: ClassVar[dict[str, str]] = {"train/loss": "loss"}

  def trained(self, params: Params) -> Params:
    """Returns the part of the parameters that learns: a tree of the same form with some of the leaves."""
    return params

  def moving(self, batch_stats: Any) -> Any:
    """Returns the part of the moving averages that a step changes: a tree of the same form with some of the leaves."""
    return batch_stats

  def totals(self, batch: Batch, *constants: Any) -> Any:
    """Returns the sums over the whole batch that `forward` needs with every micro-batch: i32[], its labelled images."""
    return jnp.sum(batch["label"] >= 0)

  def forward(self, variables: Any, rows: Batch, totals: Any, parts: int, *constants: Any) -> Output:
    """Returns what the network makes of one of `parts` micro-batches."""
    raise NotImplementedError

  def compare(self, z: jax.Array, batch: Batch, state: state_lib.TrainState) -> tuple[jax.Array, Metrics]:
    """Returns the loss that compares all embeddings f[N, 2, D] of the batch, and its metrics."""
    raise NotImplementedError

  def steadied(self, grads: Params, metrics: Metrics, rate: jax.Array) -> tuple[Params, Metrics]:
    """Returns the gradients that the optimizer takes at this learning rate, and the metrics to log."""
    return grads, metrics

  def after(
    self, before: state_lib.TrainState, now: state_lib.TrainState, embed: Callable[..., jax.Array], batch: Batch
  ) -> tuple[Any, Metrics]:
    """Returns the queue of negatives after a step (None where there is none), and metrics of it."""
    return None, {}


@dataclasses.dataclass(frozen=True)
class Contrastive(Objective):
  """Two views of an image attract each other, all other images of the batch repel; an online classifier learns along.

  `model` is a `simclr.SimCLR`; `prepare` gives `views` f[n, 2, H, W, 3] in [0, 1].
  """

  kind: str = "nt_xent"  # One of `losses.KINDS`.
  temperature: float = 0.1
  normalize: bool = True
  scale: float = 1.0  # Factor on the paper's loss in what is optimised (the reference: 2).
  margin: float = 0.8  # Of the margin losses.
  queue_decay: float = 0.999  # Of the averaged weights that fill the queue of negatives, where the state has one.
  online_rate: str = "optimizer"  # "safe": see `steadied`.
  mesh: jax.sharding.Mesh | None = None
  shown: ClassVar[dict[str, str]] = {"train/loss": "loss", "train/contrast_acc": "contrast acc"}

  def forward(self, variables: Any, rows: Batch, totals: jax.Array, parts: int) -> Output:
    z, h, logits, updates = self._embedded(self.model, variables, rows)
    metrics, loss = {}, 0
    if logits is not None:
      loss, accuracy = _of_labelled(logits, rows["label"].repeat(2), 2 * totals, parts)
      metrics = {"supervised_loss": loss, "supervised_acc": accuracy}
      if self.online_rate == "safe":
        h = h.astype(logits.dtype)
        metrics["online_energy"] = jax.lax.stop_gradient(1 + jnp.mean(jnp.sum(jnp.square(h), axis=-1)))
    return Output(z, loss, metrics, updates.get("batch_stats", {}))

  def steadied(self, grads: Params, metrics: Metrics, rate: jax.Array) -> tuple[Params, Metrics]:
    """Returns the gradients with the online classifier's made smaller where a step at this rate would be unstable.

    The curvature of its loss is at most half of the mean of 1 + |h|^2, the energy: a step of HEAD_STEP / energy is far
    below the limit of gradient descent, 2 / curvature, whatever the momentum.
    """
    if "online_energy" not in metrics:
      return grads, metrics
    metrics = dict(metrics)
    share = HEAD_STEP / jnp.maximum(rate * metrics.pop("online_energy"), HEAD_STEP)
    head = jax.tree.map(lambda grad: (share * grad).astype(grad.dtype), grads["linear_head"])
    return {**grads, "linear_head": head}, metrics

  def _embedded(self, model, variables, rows):
    # One pass over both views: BatchNorm takes its statistics over them together, and over all devices.
    views = self.prepare(rows)["views"]
    images = views.reshape(-1, *views.shape[2:])  # [2N, H, W, 3], the views of an image adjacent.
    (h, z, logits), updates = model.apply(variables, images, train=True, mutable=["batch_stats"])
    return z.reshape(-1, 2, z.shape[-1]), h, logits, updates

  def compare(self, z: jax.Array, batch: Batch, state: state_lib.TrainState) -> tuple[jax.Array, Metrics]:
    """Returns the scaled contrastive loss of the whole batch; the metric `loss` is the paper's."""
    older = {}
    if state.memory is not None:
      rows = negatives.filled(state.memory, state.step, 2 * batch["label"].shape[0])
      older = {"queue": state.memory["buffer"], "filled": rows}
    keys = {"temperature": self.temperature, "normalize": self.normalize, "margin": self.margin, "mesh": self.mesh}
    # Images without a label (-1) are of no class: each gets a number of its own, so that SupCon attracts none of them.
    label = batch["label"]
    label = jnp.where(label == -1, -1 - jnp.arange(label.shape[0], dtype=label.dtype), label)
    value, metrics = losses.contrast(self.kind, z, label, **keys, **older)
    return self.scale * value, {**metrics, "loss": value}

  def after(
    self, before: state_lib.TrainState, now: state_lib.TrainState, embed: Callable[..., jax.Array], batch: Batch
  ) -> tuple[Any, Metrics]:
    """Returns the queue after the batch has entered it, embedded by the moving average of the weights."""
    queue = before.memory
    if queue is None:
      return None, {}
    # The moving averages of BatchNorm that come out are dropped: these weights never run in inference mode.
    network, dtype = self.model.clone(linear_head=None), queue["buffer"].dtype
    z = embed(lambda variables, rows: self._embedded(network, variables, rows)[0].astype(dtype), queue["params"])
    z = losses.l2_normalized(z) if self.normalize else z
    rows = negatives.filled(queue, before.step, 2 * batch["label"].shape[0])
    filled = {"memory_filled": rows / queue["buffer"].shape[0]}
    return negatives.after(queue, before.step, z, now.params, decay=self.queue_decay, mesh=self.mesh), filled


@dataclasses.dataclass(frozen=True)
class Classification(Objective):
  """A linear classifier on the encoder, of which any part may learn along (finetune, linear_eval).

  `prepare` gives `image` f32[n, H, W, 3] in [0, 1] or u8. What the model freezes keeps its bits.
  """

  class_weights: tuple[float, ...] = ()  # Of each class in the loss; empty for equal ones.
  shown: ClassVar[dict[str, str]] = {"train/loss": "loss", "train/accuracy": "accuracy"}

  def trained(self, params: Params) -> Params:
    return simclr.trained_part(self.model, params)

  def moving(self, batch_stats: Any) -> Any:
    return simclr.moving_part(self.model, batch_stats)

  def forward(self, variables: Any, rows: Batch, totals: Any, parts: int, *constants: Any) -> Output:
    rows = self.prepare(rows)
    logits, updates = self.model.apply(variables, rows["image"], train=True, mutable=["batch_stats"])
    loss, metrics = self.loss(logits, rows, totals, parts, *constants)
    return Output(None, loss, metrics, updates.get("batch_stats", {}))

  def loss(self, logits: jax.Array, rows: Batch, totals: Any, parts: int) -> tuple[jax.Array, Metrics]:
    """Returns the mean, weighted cross-entropy of logits f[n, K] and `label`; metrics `loss` and `accuracy`."""
    loss, accuracy = _of_labelled(logits, rows["label"], totals, parts)
    if self.class_weights:
      weights = jnp.asarray(self.class_weights, logits.dtype)
      total = losses.weighted_cross_entropy(logits, rows["label"], weights)
      loss = parts * total / jnp.maximum(totals, 1).astype(total.dtype)
    return loss, {"loss": loss, "accuracy": accuracy}


@dataclasses.dataclass(frozen=True)
class Distillation(Classification):
  """A student learns the class probabilities of a teacher, and labels where there are any: equation 3 of v2.

  Each of the two terms is a mean over its own images of the batch; a batch without labelled ones has the first alone.
  The step's constants are `labelled` bool[examples], by `index`, and what `teacher_of` needs.
  """

  teacher_of: Callable[..., jax.Array] | None = None  # (rows, *arrays) -> the teacher's logits f[n, K].
  temperature: float = 1.0  # Of both softmaxes.
  label_weight: float = 0.0  # 1 - alpha of equation 3.
  shown: ClassVar[dict[str, str]] = {"train/loss": "loss", "train/agreement": "agrees with the teacher"}

  def totals(self, batch: Batch, *constants: Any) -> jax.Array | None:
    """Returns i32[], the labelled images of the batch, where their labels count."""
    labelled = constants[0]
    return jnp.sum(labelled[batch["index"]] & (batch["label"] >= 0)) if self.label_weight else None

  def loss(
    self, logits: jax.Array, rows: Batch, totals: jax.Array | None, parts: int, *constants: Any
  ) -> tuple[jax.Array, Metrics]:
    """Returns the weighted sum of both terms, and each of them as a metric."""
    labelled, *arrays = constants
    teacher = self.teacher_of(rows, *arrays)
    distilled = distillation(logits, teacher, self.temperature)
    agreement = jnp.mean(jnp.argmax(logits, -1) == jnp.argmax(teacher, -1))
    metrics = {"distill_loss": distilled, "agreement": agreement}
    total = (1 - self.label_weight) * distilled
    if self.label_weight:
      known = labelled[rows["index"]] & (rows["label"] >= 0)
      label = jnp.where(known, rows["label"], 0)
      of_rows = optax.losses.softmax_cross_entropy_with_integer_labels(logits, label)
      # The mean over the parts is then the sum over the batch by the number of its labelled images.
      supervised = parts * jnp.sum(jnp.where(known, of_rows, 0)) / jnp.maximum(totals, 1)
      metrics["supervised_loss"] = supervised
      total = total + self.label_weight * supervised
    return total, {**metrics, "loss": total}


def _of_labelled(logits, label, totals, parts):
  """Returns cross-entropy and accuracy of a micro-batch, so weighted that their mean over the parts is the batch's."""
  weight = parts * jnp.sum(label >= 0) / jnp.maximum(totals, 1)
  return tuple(value * weight.astype(value.dtype) for value in losses.cross_entropy(logits, label))


def distillation(student: jax.Array, teacher: jax.Array, temperature: float) -> jax.Array:
  """Returns the mean over N of T^2 times the cross-entropy of softmax(student / T) under softmax(teacher / T).

  Logits are f[N, K], T is the temperature. Equation 2 of Chen et al. 2020b (v2) with the factor T^2 of the reference's
  notebook, which keeps gradients of one size (Hinton et al. 2015). No gradient reaches the teacher.
  """
  target = jax.nn.softmax(jax.lax.stop_gradient(teacher) / temperature)
  return temperature**2 * jnp.mean(optax.losses.softmax_cross_entropy(student / temperature, target))
