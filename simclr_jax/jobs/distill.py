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

import functools
from typing import Any

import ml_collections
import numpy as np

from simclr_jax import classifier, errors, experiment, inference
from simclr_jax.data import source
from simclr_jax.evaluation import features
from simclr_jax.hardware import sharding
from simclr_jax.training import objectives, telemetry


def run(
  config: ml_collections.ConfigDict, workdir: str, *, profile_steps: tuple[int, int] | None = None
) -> dict[str, Any]:
  """Returns the held-out accuracies of the student trained by `config.distill`."""
  keys = config.distill
  if not keys.teacher:
    raise errors.UserError(
      "distill has no teacher; give --config.distill.teacher=RUN, the workdir of a run of finetune or linear_eval."
    )
  this = experiment.Experiment(config, "distill", workdir)
  layer = this.network.layer("finetune_from")
  teacher = inference.classifier(keys.teacher, this.mesh)
  theirs, ours = teacher.config.data.image_size, this.config.data.image_size
  if theirs != ours:
    raise errors.UserError(
      f"teacher {keys.teacher} was trained at {theirs} pixels and the student sees {ours}; "
      f"set --config.data.image_size={theirs}."
    )
  train, labelled = _images(this, teacher)

  def constants():
    if not keys.cache_teacher:
      return sharding.replicate(labelled, this.mesh), teacher.variables
    telemetry.log.info("distill: the teacher looks at %d images once.", train.num_examples)
    logits = features.of_split(teacher.logits_of, teacher.variables, this.rows(train)(), this.mesh).x
    return sharding.replicate(labelled, this.mesh), sharding.replicate(logits, this.mesh)

  if keys.cache_teacher:
    teacher_of = lambda batch, table: table[batch["index"]]
  else:
    teacher_of = lambda batch, variables: teacher.logits_of(variables, batch["image"])
  options = {"teacher_of": teacher_of, "temperature": keys.temperature, "label_weight": keys.label_weight}
  task = classifier.Task(
    *(train, this.held_out, teacher.classes, layer),
    objective=functools.partial(objectives.Distillation, **options),
    constants=constants,
    class_names=teacher.class_names,
    about={"teacher": keys.teacher, "layer": layer, "labelled_examples": int(labelled.sum())},
  )
  return classifier.train(this, task, profile_steps=profile_steps)


def _images(this: experiment.Experiment, teacher: inference.Classifier) -> tuple[source.Source, np.ndarray]:
  """Returns the student's images, and which of them give their labels away, bool[N]."""
  keys, train, held_out = this.config.distill, this.train, this.held_out
  teacher.check_classes(held_out, keys.teacher)
  uses_labels = keys.images == "labelled" or keys.label_weight > 0
  if uses_labels and train.num_classes != teacher.classes:
    raise errors.UserError(
      f"{train.name} has {train.num_classes} classes, the teacher {teacher.classes}; with distill.label_weight=0 and "
      "distill.images=all no labels are needed."
    )
  if uses_labels:
    teacher.check_classes(train, keys.teacher)
  rows = this.labelled_rows(train) if uses_labels else np.arange(0)
  if keys.images == "labelled":
    train, rows = train.take(rows), np.arange(len(rows))
  labelled = np.zeros(train.num_examples, bool)
  labelled[rows] = True
  return train, labelled
