"""From a config to the parts of a run, each made once: images, input, model, optimizer, mesh, checkpoints.

Jobs ask an `Experiment`. Nothing below this module sees a ConfigDict.
"""

import functools
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import ml_collections
import optax
from etils import epath

from simclr_jax import config as config_lib
from simclr_jax import errors, network, optim, splits
from simclr_jax.data import balanced, inputs, measure, order, source
from simclr_jax.data.distortion import Distortion
from simclr_jax.hardware import sharding
from simclr_jax.losses import negatives
from simclr_jax.models import encoders, simclr
from simclr_jax.training import checkpoint, loop, objectives, step, telemetry
from simclr_jax.training import state as state_lib

# Rows of a run whose `log_every_steps` is 0.
LOGGED_ROWS = 100

# Epochs of a warm-up that is chosen here, the reference's.
LONGEST_WARMUP = 10.0

log = logging.getLogger("simclr_jax")

# Jobs that train a classifier by a recipe of their own, a section of the config.
RECIPES = ("linear_eval", "finetune", "distill")


class Optimizer(NamedTuple):
  """An optimizer, its schedule (step -> learning rate) and the steps of the run."""

  tx: optax.GradientTransformation
  schedule: optim.Schedule
  total_steps: int


class Experiment(splits.Splits):
  """One run of a job: its `config`, its name `job` and its folder `workdir` ("" for none)."""

  def __init__(
    self, config: ml_collections.ConfigDict, job: str, workdir: str = "", *, devices: list[jax.Device] | None = None
  ):
    """Checks the config against the devices (default: all), before anything is compiled.

    What is to be measured of the images is measured, unless an earlier start of the run has; `asked` has what was there
    before, by key.
    """
    config_lib.check(config)
    config = config.copy_and_resolve_references()  # Ours: see `fit_batch`.
    self.config, self.job, self.workdir = config, job, workdir
    self.asked = {}
    self._take(config_lib.recorded(workdir, config))
    self._measure()
    self.network = network.Network(config)
    self._section = f"{job}." if job in RECIPES else ""
    # What has batch size, length and optimizer: the whole config for pretrain and for jobs without.
    self.recipe = config[job] if job in RECIPES else config
    self.mesh = sharding.data_mesh(devices)
    if self._section or job in ("pretrain", "plan"):
      name, parts = f"config.{self._section}batch_size", self.recipe.micro_batches
      sharding.check_divisible(self.recipe.batch_size, self.mesh, micro_batches=parts, name=name)
    sharding.check_divisible(config.eval_batch_size, self.mesh, name="config.eval_batch_size")
    self._distortion(config.augment.min_area)

  @property
  def is_sharded(self) -> bool:
    """Whether parameters and optimizer state are split over the devices."""
    return self.config.sharding.parameters == "sharded"

  @property
  def gather_params(self) -> Callable[[Any], Any]:
    """The function that all-gathers sharded parameters before the network uses them."""
    return sharding.gather_params(self.mesh) if self.is_sharded else objectives.as_it_is

  def applied(self, model: Any) -> Callable[[Any, jax.Array], jax.Array]:
    """Returns (variables, images) -> the outputs of a network in inference mode, its parameters gathered."""

    def outputs(variables, images):
      return model.apply({**variables, "params": self.gather_params(variables["params"])}, images, train=False)

    return outputs

  @property
  def hardware(self) -> str:
    """The devices, for the log."""
    kind, processes = self.mesh.devices.flat[0].device_kind, jax.process_count()
    return f"{self.mesh.size} x {kind}, {processes} process{'es' * (processes > 1)}"

  # What depends on the data.

  def _take(self, values: dict[str, config_lib.Value]) -> None:
    """Sets keys to what is used in place of what was asked for."""
    for name, value in values.items():
      self.asked.setdefault(name, config_lib.get_key(self.config, name))
      config_lib.set_key(self.config, name, value)

  def _measure(self) -> None:
    """Chooses the values of the keys that are 0, which the images of a folder give, and says so."""
    config, missing = self.config, config_lib.unmeasured(self.config)
    if "data.image_size" in missing and self.is_pretrained:
      self._take({"data.image_size": checkpoint.open(config.checkpoint).config["data"]["image_size"]})
      missing.remove("data.image_size")
    if not missing:
      self._measure_warmup()
      return
    keys, examples, found = config.measured, self.train.num_examples, []
    limits = measure.Limits(keys.image_size, keys.batch_size, keys.epochs, keys.images_seen)
    if "data.image_size" in missing:
      found = measure.sizes([str(epath.Path(config.data.dir) / name) for name in self.train.names()])
      self._take({"data.image_size": measure.image_size(found, limits)})
    if "batch_size" in missing:
      self._take({"batch_size": measure.batch_size(examples, limits)})
    if "total_epochs" in missing:
      self._take({"total_epochs": measure.epochs(examples, limits)})
    self._measure_warmup()
    common, is_most = measure.commonest(found) if found else (None, False)
    log.info(
      "folder: %d images%s -> image_size %d, batch_size %d, %g epochs, warm-up %g",
      *(examples, f", {'most' if is_most else 'commonest size'} {common[0]}x{common[1]}" if found else ""),
      *(config.data.image_size, config.batch_size, config.total_epochs, config.optimizer.warmup_epochs),
    )

  def _measure_warmup(self) -> None:
    """Chooses the warm-up of pretraining where it is -1."""
    config = self.config
    if config.optimizer.warmup_epochs >= 0:
      return
    length = config.total_epochs
    if config.total_steps:
      length = config.total_steps * config.batch_size / self.train.num_examples
    self._take({"optimizer.warmup_epochs": min(LONGEST_WARMUP, length / 10)})

  def fit_batch(self, examples: int) -> None:
    """Lowers the recipe's batch size to what so many training images fill, and says so."""
    name, asked, parts = f"{self._section}batch_size", self.recipe.batch_size, self.recipe.micro_batches
    fitted = order.fitted(asked, examples, shards=self.config.data.shards, micro_batches=parts)
    if fitted == asked:
      return
    log.info("config.%s is %d and there are %d images: batches of %d.", name, asked, examples, fitted)
    sharding.check_divisible(fitted, self.mesh, micro_batches=parts, name=f"config.{name}")
    self._take({name: fitted})
    self.network = network.Network(self.config)

  # The input.

  def rows(self, images: source.Source, *, shared: bool = True) -> Callable[[], Iterator[inputs.Rows]]:
    """Returns a function whose call starts one pass over a split with the evaluation crop; see `inputs.evaluation`."""
    keys = {"batch_size": self.config.eval_batch_size, "is_resident": self.config.data.resident, "shared": shared}
    return inputs.evaluation(images, self.config.data.image_size, **keys)

  def augmented_rows(self, images: source.Source, number: int) -> Iterator[inputs.Rows]:
    """Returns one pass over a split like `rows`, but randomly cropped and mirrored, anew for each number."""
    distortion = self._distortion(self.config.linear_eval.min_area, 1.0)
    return inputs.augmented_pass(images, distortion, self._plan(self.config.eval_batch_size), number)

  def pairs(self, images: source.Source) -> inputs.Input:
    """Returns the input of pretraining: two augmented views of each image."""
    distortion = self._distortion(self.config.augment.min_area)
    return inputs.pairs(images, distortion, self._plan(), self.mesh, compose=self.config.augment.compose)

  @property
  def prepare_pairs(self) -> inputs.Prepare:
    """The step's part of the augmentation, where there are no images at hand."""
    distortion = self._distortion(self.config.augment.min_area)
    return inputs.pair_augmentation(distortion, self._plan(), self.config.augment.compose)[1]

  def singles(self, images: source.Source) -> inputs.Input:
    """Returns the input of supervised training: one random crop of each image, classes as the recipe's `sampling`."""
    positions, distortion = None, self._distortion(self.recipe.min_area, 1.0)
    if self.recipe.get("sampling", "uniform") == "balanced":
      positions = balanced.Balanced(images.labels(), self.recipe.batch_size, self.config.seed).at
    return inputs.singles(images, distortion, self._plan(), self.mesh, positions=positions)

  def class_weights(self, images: source.Source) -> tuple[float, ...]:
    """Returns the weight of each class in the loss, empty where the recipe's `class_weights` is none.

    It is n / (k n_c) of n images, n_c of the class, and k classes that have any; scikit-learn's `balanced`.
    """
    if self.recipe.get("class_weights", "none") == "none":
      return ()
    if self.recipe.get("sampling", "uniform") == "balanced":
      raise errors.UserError(
        f"config.{self._section}class_weights and sampling are both balanced, which counts rare classes twice; use one."
      )
    return balanced.weights(images.labels(), images.num_classes)

  def _plan(self, batch_size: int = 0) -> inputs.Plan:
    data = self.config.data
    batch_size = batch_size or self.recipe.batch_size
    sizes, law = (batch_size, order.shards_of(batch_size, data.shards)), config_lib.order_law(self.workdir)
    return inputs.Plan(
      order.Order(*sizes, self.config.seed, data.shuffle_window, law),
      place=self.config.augment.place,
      resident=data.resident,
      steps_per_dispatch=data.steps_per_dispatch,
      dtype=encoders.DTYPES[self.config.augment.dtype],
      batch_key=f"{self._section}batch_size",
    )

  def _distortion(self, min_area: float, max_area: float = 0.0) -> Distortion:
    keys, size = self.config.augment, self.config.data.image_size
    colors = ("color_strength", "brightness", "color_probability", "grayscale_probability", "blur_probability")
    same = {name: keys[name] for name in ("flip", "resize", *colors)}
    return Distortion(size, min_area=min_area, max_area=max_area or keys.max_area, **same)

  # The training.

  def optimizer(self, examples: int) -> Optimizer:
    """Returns the optimizer of the recipe for so many training images."""
    keys, recipe = self.recipe.optimizer, self.recipe
    steps = recipe.get("total_steps", 0) or optim.total_steps(examples, recipe.total_epochs, recipe.batch_size)
    schedule = optim.schedule(
      base_learning_rate=keys.base_learning_rate,
      batch_size=recipe.batch_size,
      scaling=keys.scaling,
      warmup_steps=optim.warmup_steps(examples, keys.warmup_epochs, recipe.batch_size),
      total_steps=steps,
    )
    if keys.name == "lars":
      decay, trust = keys.weight_decay, keys.trust_coefficient
      tx = optim.lars(schedule, weight_decay=decay, momentum=keys.momentum, trust_coefficient=trust)
    elif keys.name == "momentum":
      tx = optim.momentum(schedule, momentum=keys.momentum)
    else:
      tx = optim.adam(schedule)
    return Optimizer(tx, schedule, steps)

  @property
  def decay(self) -> objectives.Decay:
    """The L2 term of the loss."""
    return objectives.Decay(self.recipe.optimizer.weight_decay, self.recipe.optimizer.name)

  def contrastive(self, model: simclr.SimCLR, prepare: inputs.Prepare) -> objectives.Contrastive:
    """Returns what `config.loss` makes of a batch."""
    keys, memory = self.config.loss, self.config.memory
    negatives.check(memory.size, memory.decay, batch_size=self.config.batch_size, kind=keys.kind)
    same = {name: keys[name] for name in ("kind", "temperature", "normalize", "scale", "margin")}
    same["online_rate"] = self.config.head.online_rate
    return objectives.Contrastive(model, self.decay, prepare, queue_decay=memory.decay, mesh=self.mesh, **same)

  def step(self, objective: objectives.Objective, optimizer: Optimizer) -> Callable:
    """Returns `train_step` as (state, batch, *constants) -> (state, metrics), not jitted yet."""
    placement = objectives.Placement(self.mesh, self.recipe.micro_batches, self.gather_params)
    keys = {"tx": optimizer.tx, "schedule": optimizer.schedule, "placement": placement}
    return functools.partial(step.train_step, objective=objective, **keys)

  def abstract_state(self, model: simclr.SimCLR, tx: optax.GradientTransformation) -> state_lib.TrainState:
    """Returns shapes, dtypes and placements of the state of pretraining before the first step."""
    state = state_lib.abstract(model, self.config.data.image_size, tx, self.mesh, sharded=self.is_sharded)
    return self._with_queue(model, state, negatives.shapes)

  def state(self, model: simclr.SimCLR, tx: optax.GradientTransformation) -> state_lib.TrainState:
    """Returns the state of pretraining before the first step, with the weights of `config.checkpoint` if it names one.

    They are the encoder's, and the projection head's where it has the same shapes; all else is as initialised.
    """
    params, batch_stats = self.variables(model)
    if self.is_pretrained:
      saved = self.saved()
      theirs, sizes = (
        saved.shapes[checkpoint.MODEL]["params"],
        lambda tree: jax.tree.map(lambda x: tuple(x.shape), tree),
      )
      names = ["encoder"]
      if "projection_head" in params and sizes(theirs.get("projection_head", {})) == sizes(params["projection_head"]):
        names.append("projection_head")
      wanted = [{name: tree[name] for name in names if name in tree} for tree in (params, batch_stats)]
      found, statistics = saved.load(*wanted)
      params, batch_stats = {**params, **found}, {**batch_stats, **statistics}
      telemetry.log.info("%s: starts from %s of %s", self.job, " and ".join(names), saved.path)
    return self._with_queue(model, state_lib.create(params, batch_stats, tx), negatives.create)

  def variables(self, model: Any) -> tuple[Any, Any]:
    """Returns (params, batch_stats) of a network at initialisation, placed."""
    size = self.config.data.image_size
    return state_lib.variables(model, size, self.config.seed, self.mesh, sharded=self.is_sharded)

  def _with_queue(self, model, state, make):
    if not self.config.memory.size:
      return state
    embed = lambda variables, views: model.apply(variables, views, train=False)[1]
    embedding = jax.eval_shape(embed, state.variables, self.network.images(2))
    return state.replace(memory=make(state.params, embedding, self.config.memory.size))

  def run(
    self,
    objective: objectives.Objective,
    optimizer: Optimizer,
    examples: int,
    *,
    flops_per_step: float,
    evaluate: loop.Evaluate | None,
    classifier_layer: int = 0,
    class_names: Sequence[str] = (),
    profile_steps: tuple[int, int] | None = None,
    watch: Callable[[int, dict[str, float]], None] | None = None,
  ) -> loop.Run:
    """Returns what the loop needs, once the workdir is known to be this run's."""
    self.claim(images=self.train)
    config, batch_size = self.config, self.recipe.batch_size
    warmup = optim.warmup_steps(examples, self.recipe.optimizer.warmup_epochs, batch_size)
    if warmup > optimizer.total_steps // 10 + 1:
      log.info(
        "config.%soptimizer.warmup_epochs is %d of %d steps, more than a tenth of the run.",
        *(self._section, warmup, optimizer.total_steps),
      )
    # Intervals in steps: 0 for 0 epochs, else at least one step.
    every = lambda epochs: max(1, round(epochs * round(examples / batch_size))) if epochs else 0
    checkpoints = checkpoint.Checkpoints(
      self.workdir,
      config.to_dict(),
      every_steps=config.checkpoint_every_steps or every(config.checkpoint_every_epochs),
      every_seconds=config.checkpoint_every_seconds,
      keep=config.keep_checkpoints,
      keep_every_steps=every(config.keep_every_epochs),
      classifier_layer=classifier_layer,
      class_names=class_names,
    )
    return loop.Run(
      *(self.workdir, optimizer.total_steps, batch_size, checkpoints),
      log_every_steps=config.log_every_steps or max(1, optimizer.total_steps // LOGGED_ROWS),
      title=self.job,
      shown=objective.shown,
      flops_per_step=flops_per_step,
      evaluate=evaluate,
      evaluate_every_steps=every(self.recipe.evaluate_every_epochs),
      profile_steps=profile_steps,
      watch=watch,
    )

  def claim(self, free: tuple[str, ...] = config_lib.FREE, images: source.Source | None = None) -> None:
    """Writes `workdir/config.json`, or checks that it holds this very run on these images; see `config.claim`."""
    known = {"examples": images.num_examples, "sha256": images.fingerprint()} if images else {}
    allowed = self.config.data.allow_changed
    config_lib.claim(self.workdir, self.config.to_dict(), self.job, free, self.asked, known, allow_changed=allowed)

  # The checkpoint that the run starts from.

  @property
  def is_pretrained(self) -> bool:
    """Whether `config.checkpoint` names a checkpoint."""
    return config_lib.names_run(self.config.checkpoint)

  def saved(self, *, head: bool = False) -> checkpoint.Saved:
    """Returns the checkpoint that `config.checkpoint` names, once its network (with `head`, its head too) is ours."""
    found = checkpoint.open(self.config.checkpoint)
    ours, theirs = self.config.to_dict(), config_lib.completed(found.config).to_dict()
    # Precision and rematerialisation are the reader's choice; the arrays are the same.
    wanted = [("model", key) for key in theirs["model"] if key not in ("dtype", "param_dtype", "remat")]
    wanted += [("head", key) for key in ("layers", "out_dim") if head]
    for section, key in wanted:
      if ours[section].get(key) != theirs[section][key]:
        raise errors.UserError(
          f"checkpoint {self.config.checkpoint} was trained with config.{section}.{key} = {theirs[section][key]!r}, "
          f"not {ours[section].get(key)!r}; leave --config out to use the checkpoint's own."
        )
    return found


def is_finished(workdir: str, config: ml_collections.ConfigDict) -> bool:
  """Returns whether a folder holds the result of a run of this very config."""
  folder = epath.Path(workdir)
  if not (folder / "result.json").exists():
    return False
  stored = json.loads((folder / "config.json").read_text())["config"]
  ours = config_lib.flat(config.to_dict()) | config_lib.recorded(workdir, config)
  return not config_lib.difference(ours, stored)
