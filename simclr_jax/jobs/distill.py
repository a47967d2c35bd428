"""distill: trains a student on what a teacher says of images, labelled or not (v2 section 2.3).

The teacher's class probabilities take the place of labels, so that a fine-tuned network teaches all unlabelled images
to a student of the same size (self-distillation) or a smaller one. Needs --workdir and --config.distill.teacher=RUN, a
run of finetune, linear_eval or distill. Without --config the teacher's own serves, and the student is its like.
Writes `result.json` and a checkpoint that other jobs read, as a teacher too.

  --config.checkpoint=RUN             starts the student from a run; without it, from scratch
  --config.distill.temperature=0.1    of both softmaxes; v2: 0.1 for self-distillation, 1.0 from big to small
  --config.distill.label_weight=0.5   of the cross-entropy of the images whose labels --config.labels.* gives away; the
                                      rest is the teacher's
  --config.distill.images=labelled    leaves the other images out
  --config.distill.cache_teacher=true runs the teacher once over the images, on the centre crop
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from simclr_jax import errors
from simclr_jax.data import subset
from simclr_jax.evaluation import features as evaluation
from simclr_jax.hardware import sharding
from simclr_jax.jobs import classifier, representation, setup
from simclr_jax.training import telemetry

SHOWN = {"train/loss": "loss", "train/agreement": "agrees with the teacher"}


def distillation(student: jax.Array, teacher: jax.Array, temperature: float) -> jax.Array:
  """Returns the mean over N of T^2 times the cross-entropy of softmax(student / T) under softmax(teacher / T).

  Equation 2 of Chen et al. 2020b (v2) with the factor T^2 of the reference's notebook, which keeps gradients of one
  size (Hinton et al. 2015). No gradient reaches the teacher.

  Args:
    student: f[N, K], logits.
    teacher: f[N, K], logits.
    temperature: T.
  """
  target = jax.nn.softmax(jax.lax.stop_gradient(teacher) / temperature)
  return temperature**2 * jnp.mean(optax.losses.softmax_cross_entropy(student / temperature, target))


def loss_of(teacher_of, temperature: float, label_weight: float):
  """Returns the loss that `classifier.train_step` takes: equation 3 of v2, label_weight being its 1 - alpha.

  Each of its two terms is a mean over its own images of the batch; a batch without labelled ones has the first alone.

  Args:
    teacher_of: (batch, *arrays) -> the teacher's logits f[N, K].
    temperature, label_weight: of the config.
  """

  def loss(logits, batch, labelled, *arrays):
    teacher = teacher_of(batch, *arrays)
    distilled = distillation(logits, teacher, temperature)
    agreement = jnp.mean(jnp.argmax(logits, -1) == jnp.argmax(teacher, -1))
    metrics = {"distill_loss": distilled, "agreement": agreement}
    total = (1 - label_weight) * distilled
    if label_weight:
      known = labelled[batch["index"]]
      label = jnp.where(known, batch["label"], 0)
      losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, label)
      supervised = jnp.sum(jnp.where(known, losses, 0)) / jnp.maximum(jnp.sum(known), 1)
      metrics["supervised_loss"] = supervised
      total = total + label_weight * supervised
    return total, {**metrics, "loss": total}

  return loss


def run(config, workdir: str, *, profile_steps: str = "") -> dict[str, float]:
  """Returns the held-out accuracies of the student trained by `config.distill`."""
  keys = config.distill
  _check(keys)
  mesh = classifier.mesh_of(config, keys, "distill")
  layer = setup.layer_of(config, "finetune_from")
  teacher, variables, classes, theirs = representation.classifier(keys.teacher, mesh)
  size = config.data.image_size
  if theirs.data.image_size != size:
    raise errors.UserError(
      f"teacher {keys.teacher} was trained at {theirs.data.image_size} pixels and the student sees {size}; "
      f"set --config.data.image_size={theirs.data.image_size}."
    )
  train, held_out, labelled = _images(config, classes)

  def constants():
    mask = jax.device_put(labelled, sharding.replicated(mesh))
    return mask, (_cached(config, teacher, variables, train, mesh) if keys.cache_teacher else variables)

  if keys.cache_teacher:
    teacher_of = lambda batch, table: table[batch["index"]]
  else:
    teacher_of = lambda batch, variables: teacher(variables, batch["image"])
  return classifier.train(
    config,
    keys,
    workdir,
    job="distill",
    train=train,
    held_out=held_out,
    classes=classes,
    mesh=mesh,
    after_block=-1,
    layer=layer,
    loss_of=loss_of(teacher_of, keys.temperature, keys.label_weight),
    constants_of=constants,
    shown=SHOWN,
    result={"teacher": keys.teacher, "layer": layer, "labelled_examples": int(labelled.sum())},
    profile_steps=profile_steps,
  )


def _check(keys):
  if not keys.teacher:
    raise errors.UserError(
      "distill has no teacher; give --config.distill.teacher=RUN, the workdir of a run of finetune or linear_eval."
    )
  setup.choice("distill.images", keys.images, ("all", "labelled"))
  if not keys.temperature > 0:
    raise errors.UserError(f"config.distill.temperature is {keys.temperature}; it must be positive, for example 1.0.")
  if not 0 <= keys.label_weight <= 1:
    raise errors.UserError(f"config.distill.label_weight is {keys.label_weight}; use a share from 0 to 1.")


def _images(config, classes):
  """Returns the student's images, the held-out ones, and which of the former give their labels away, bool[N]."""
  keys = config.distill
  train, held_out = setup.splits(config, "distill")
  if held_out.num_classes != classes:
    raise errors.UserError(
      f"the teacher tells {classes} classes apart and {held_out.name} has {held_out.num_classes}; "
      "use the data that it was trained on."
    )
  uses_labels = keys.images == "labelled" or keys.label_weight > 0
  if uses_labels and train.num_classes != classes:
    raise errors.UserError(
      f"{train.name} has {train.num_classes} classes, the teacher {classes}; with distill.label_weight=0 and "
      "distill.images=all no labels are needed."
    )
  rows = setup.labelled_rows(config, train) if uses_labels else np.arange(0)
  if keys.images == "labelled":
    train, rows = subset.take(train, rows), np.arange(len(rows))
  labelled = np.zeros(train.num_examples, bool)
  labelled[rows] = True
  return train, held_out, labelled


def _cached(config, teacher, variables, train, mesh):
  """Returns the teacher's logits f32[N, K] of the centre crop of every image, on every device."""
  telemetry.log.info("distill: the teacher looks at %d images once.", train.num_examples)
  logits, _ = evaluation.features(teacher, variables, setup.evaluation_rows(config, train)(), mesh)
  return jax.make_array_from_callback(logits.shape, sharding.replicated(mesh), lambda part: logits[part])
