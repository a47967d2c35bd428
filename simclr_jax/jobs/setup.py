"""From a config to the things that jobs are made of: data, transforms, model, optimizer, checkpoints."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import optax

from simclr_jax import errors, optim
from simclr_jax.data import arrays, law, order, resident, subset
from simclr_jax.hardware import sharding
from simclr_jax.inference import DTYPES
from simclr_jax.models import heads
from simclr_jax.training import checkpoint

# In place of a checkpoint: the encoder as it is initialised.
RANDOM = "random"

# Keys of a run that may change when it continues: they do not change what it computes.
FREE_KEYS = (
  "log_every_steps",
  "checkpoint_every",
  "keep_",
  "eval_batch_size",
  "evaluate_every_epochs",
  "monitor.",
  "data.dir",
  "data.steps_per_dispatch",
  "model.remat",
  "sharding.",
)


def choice(key: str, value: str, known) -> str:
  """Returns `value` if it is one of `known`, else raises a UserError that lists them."""
  if value not in known:
    raise errors.UserError(f"config.{key} is {value!r}{errors.nearest(value, known)}; use {', '.join(known)}.")
  return value


def mesh_for(config, *batch_sizes: tuple[str, int], devices=None, micro_batches: int = 1) -> jax.sharding.Mesh:
  """Returns the mesh of the devices (default: all), after checking what can be checked before anything is compiled.

  The first of the batch sizes is the one that `micro_batches` cuts.
  """
  mesh = sharding.data_mesh(devices)
  for key, size in batch_sizes:
    sharding.check_divisible(size, mesh, micro_batches=micro_batches, name=f"config.{key}")
    micro_batches = 1
  for key in ("dtype", "param_dtype"):
    choice(f"model.{key}", config.model[key], DTYPES)
  choice("augment.place", config.augment.place, ("host", "device"))
  choice("sharding.parameters", config.sharding.parameters, ("replicated", "sharded"))
  law.check_color(config.augment.color_strength, config.augment.brightness)
  return mesh


def describe(mesh: jax.sharding.Mesh) -> str:
  """Returns what the mesh is made of, for the log."""
  kind = mesh.devices.flat[0].device_kind
  return f"{mesh.size} x {kind}, {jax.process_count()} process{'es' * (jax.process_count() > 1)}"


def source_of(config, split: str):
  """Returns the examples of one split: a `sources.Source`, or decoded `arrays.Arrays` where they are resident."""
  source = choice("data.source", config.data.source, ("tfds", "folder", "arrays", "shapes"))
  if not config.data.resident:
    return _streamed(config, split)
  if config.augment.place != "device":
    raise errors.UserError(
      "config.data.resident augments on the devices, config.augment.place is 'host'; set it to device."
    )
  if source == "arrays":
    return arrays.decoded(arrays.from_npz(config.data.dir, split))
  if source == "shapes":
    return arrays.from_shapes(split, config.data.examples, config.data.image_size, config.seed)
  held = _streamed(config, split)
  from simclr_jax.data import sources

  return sources.decoded(held)


def _streamed(config, split):
  if importlib.util.find_spec("tensorflow") is None:
    raise errors.UserError(
      f"config.data.source {config.data.source} is read by TensorFlow, which is not installed; install it, or use "
      "data.resident=true with data.source=arrays (an .npz file) or shapes."
    )
  from simclr_jax.data import sources

  return sources.load(
    config.data.source,
    name=config.data.name,
    split=split,
    data_dir=config.data.dir,
    image_size=config.data.image_size,
    cache=config.data.cache,
    max_bad_share=config.data.max_bad_share,
    num_examples=config.data.examples,
    seed=config.seed,
  )


def labelled_splits(config, job: str):
  """Returns the part of the training split whose labels `config.labels` gives away, and the held-out split."""
  train, held_out = splits(config, job)
  if not train.num_classes:
    raise errors.UserError(f"{job} needs labels; {config.data.source} {config.data.name or config.data.dir} has none.")
  rows = labelled_rows(config, train)
  return (train if len(rows) == train.num_examples else subset.take(train, rows)), held_out


def splits(config, job: str):
  """Returns the whole training split, and the held-out one."""
  held_out = held_out_split(config, job)
  return source_of(config, config.data.train_split), held_out


def held_out_split(config, job: str):
  """Returns the split that `job` counts on."""
  if not config.data.eval_split:
    raise errors.UserError(f"{job} counts on held-out images; set --config.data.eval_split, for example to test.")
  return source_of(config, config.data.eval_split)


def labelled_rows(config, source) -> np.ndarray:
  """Returns the sorted row numbers of the examples whose labels `config.labels` gives away."""
  keys = config.labels
  if not 0 < keys.fraction <= 1:
    raise errors.UserError(f"config.labels.fraction is {keys.fraction}; use a share above 0, at most 1, such as 0.01.")
  if keys.ids:
    if keys.fraction != 1:
      raise errors.UserError("config.labels has a list of ids and a fraction; use one of them.")
    return subset.listed(subset.names_of(source), keys.ids)
  if keys.fraction == 1:
    return np.arange(source.num_examples)
  if not 0 <= keys.seed < 2**31:
    raise errors.UserError(f"config.labels.seed is {keys.seed}; use one from 0 to {2**31 - 1}.")
  return subset.balanced(subset.labels_of(source), keys.fraction, keys.seed)


def check_order(source, **numbers) -> None:
  """Raises a UserError where batch, shards, seed, window, hosts and the data's size do not fit each other."""
  order.check(source, process_count=jax.process_count(), **numbers)


def evaluation_rows(config, source, *, shared: bool = True):
  """Returns a function whose call starts one pass over the split with the reference's centre crop.

  Args:
    config: the run's.
    source: of the images.
    shared: whether all processes go through it together, each with its part; else each with a source of its own.
  """
  knobs = {
    "batch_size": config.eval_batch_size,
    "process_index": jax.process_index(),
    "process_count": jax.process_count(),
  }
  if not shared:
    knobs = {"batch_size": config.eval_batch_size // jax.process_count(), "process_index": 0, "process_count": 1}
  if isinstance(source, arrays.Arrays):
    return lambda: resident.evaluation_batches(source, image_size=config.data.image_size, **knobs)
  from simclr_jax.data import host_augment, pipeline

  view = lambda content, seed: {"image": host_augment.eval_view(content, size=config.data.image_size)}
  return lambda: pipeline.evaluation_batches(source, view, **knobs)


def projection_head_of(config) -> heads.ProjectionHead:
  """Returns the projection head that `config.head` describes."""
  return heads.ProjectionHead(
    layers=config.head.layers,
    out_dim=config.head.out_dim,
    dtype=DTYPES[config.model.dtype],
    param_dtype=DTYPES[config.model.param_dtype],
  )


def layer_of(config, key: str) -> int:
  """Returns the layer of the projection head that `config.head.<key>` names, counted from h = 0."""
  layer, layers = config.head[key], config.head.layers
  if not -layers - 1 <= layer <= layers:
    raise errors.UserError(
      f"config.head.{key} is {layer} and the projection head has {layers} layers; use 0 (the encoder's h) to {layers}, "
      "or -1 for the last one."
    )
  return layer % (layers + 1)


def linear_head_of(config, classes: int, *, zero_init: bool = False) -> heads.LinearHead | None:
  """Returns the classifier, or None where there are no labels."""
  if not classes:
    return None
  return heads.LinearHead(
    classes,
    zero_init=zero_init,
    dtype=DTYPES[config.model.dtype],
    param_dtype=DTYPES[config.model.param_dtype],
  )


def optimizer_of(
  keys, *, examples: int, batch_size: int, total_epochs: float, total_steps: int = 0
) -> tuple[optax.GradientTransformation, optax.Schedule, int]:
  """Returns (optimizer, its schedule, steps of the run) for `config.optimizer` or a recipe's."""
  choice("optimizer.name", keys.name, ("lars", "momentum", "adam"))
  steps = total_steps or optim.total_steps(examples, total_epochs, batch_size)
  schedule = optim.schedule(
    base_learning_rate=keys.base_learning_rate,
    batch_size=batch_size,
    scaling=keys.scaling,
    warmup_steps=optim.warmup_steps(examples, keys.warmup_epochs, batch_size),
    total_steps=steps,
  )
  if keys.name == "lars":
    tx = optim.lars(
      schedule,
      weight_decay=keys.weight_decay,
      momentum=keys.momentum,
      trust_coefficient=keys.trust_coefficient,
    )
  elif keys.name == "momentum":
    tx = optim.momentum(schedule, momentum=keys.momentum)
  else:
    tx = optim.adam(schedule)
  return tx, schedule, steps


def is_split(config) -> bool:
  """Whether parameters and optimizer state are split over the devices."""
  return config.sharding.parameters == "sharded"


def whole_of(config, mesh: jax.sharding.Mesh):
  """Returns what makes parameters whole on every device before the network uses them."""
  return sharding.gathered(mesh) if is_split(config) else lambda params: params


def jitted(step_fn, devices: jax.sharding.Mesh, state, /, *arrays, **knobs):
  """Returns the jitted (state, batch, *arrays) -> (state, metrics): one program for all devices, the state donated.

  `state` is one, or its shapes, placed as the step's is to stay; so are the further `arrays`, trees that no step
  changes.
  """
  placement, *others = (jax.tree.map(lambda array: array.sharding, tree) for tree in (state, *arrays))
  return jax.jit(
    functools.partial(step_fn, **knobs),
    in_shardings=(placement, sharding.batched(devices), *others),
    out_shardings=(placement, sharding.replicated(devices)),
    donate_argnums=0,
  )


def number(option: str, text: str, kind, valid, wanted: str):
  """Returns the value of --option=text as a `kind`, or raises a UserError that says what is `wanted`."""
  try:
    value = kind(text)
  except ValueError:
    value = None
  if value is None or not valid(value):
    raise errors.UserError(f"--{option} got {text!r}; it wants {wanted}.")
  return value


def share_of_peak(text: str) -> float:
  """Returns the value of --mfu=text."""
  return number("mfu", text, float, lambda x: 0 < x <= 1, "a share of the peak above 0, at most 1")


def profiled_steps(text: str) -> tuple[int, int] | None:
  """Returns the first and last step of --profile_steps=10,15; None where there is none."""
  if not text:
    return None
  parts = text.split(",")
  if len(parts) != 2 or not all(part.isdecimal() for part in parts) or not 0 < int(parts[0]) <= int(parts[1]):
    raise errors.UserError(f"--profile_steps={text} is not FIRST,LAST; give two steps, such as 10,15.")
  return int(parts[0]), int(parts[1])


def every(epochs: float, *, examples: int, batch_size: int) -> int:
  """Returns an interval in steps: 0 for 0 epochs, else at least one step."""
  return max(1, round(epochs * round(examples / batch_size))) if epochs else 0


def checkpoints_of(
  config, workdir: str, *, job: str, examples: int, batch_size: int, classifier_layer: int = 0
) -> checkpoint.Checkpoints:
  """Returns the run's checkpoints, once `workdir` is known to be this run's."""
  checkpoint.claim_workdir(workdir, config.to_dict(), job, FREE_KEYS)
  steps = functools.partial(every, examples=examples, batch_size=batch_size)
  return checkpoint.Checkpoints(
    workdir,
    config.to_dict(),
    every_steps=config.checkpoint_every_steps or steps(config.checkpoint_every_epochs),
    keep=config.keep_checkpoints,
    keep_every_steps=steps(config.keep_every_epochs),
    classifier_layer=classifier_layer,
  )


def fits(config, path: str, *, head: bool = False) -> None:
  """Raises a UserError if the config asks for another encoder, or projection head, than the checkpoint's."""
  ours, theirs = config.to_dict(), checkpoint.read_config(path)
  # Precision and what is computed again are the reader's choice; the arrays are the same.
  wanted = [("model", key) for key in theirs["model"] if key not in ("dtype", "param_dtype", "remat")]
  wanted += [("head", key) for key in ("layers", "out_dim") if head]
  for section, key in wanted:
    if ours[section].get(key) != theirs[section][key]:
      raise errors.UserError(
        f"checkpoint {path} was trained with config.{section}.{key} = {theirs[section][key]!r}, "
        f"not {ours[section].get(key)!r}; leave --config out to use the checkpoint's own."
      )


def cross_entropy(logits: jax.Array, label: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns (mean softmax cross-entropy, accuracy) of logits f32[N, K] and label i32[N]."""
  losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, label)
  return jnp.mean(losses), jnp.mean(jnp.argmax(logits, -1) == label)
