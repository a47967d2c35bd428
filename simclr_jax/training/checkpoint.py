"""Checkpoints (Orbax): asynchronous saves, exact resumption, and strict loading that names what does not fit."""

import dataclasses
import functools
import json
import time
from collections.abc import Sequence
from typing import Any

import jax
from etils import epath
from orbax.checkpoint import v1 as ocp

from simclr_jax import errors, files
from simclr_jax.training import state as state_lib
from simclr_jax.version import __version__

# Two parts, so that a job that only wants the network never touches the optimizer's arrays.
MODEL, TRAINING = "model", "training"

# Orbax cuts every replicated array into one slice for each device and compiles a program for each new shape of slice:
# 120 programs for a small ResNet on eight devices, which write hardly faster. Larger arrays are still cut.
SMALLEST_SLICE_BYTES = 2**20


@dataclasses.dataclass
class Checkpoints:
  """The checkpoints of one run, under `workdir/checkpoints/<step>`."""

  workdir: str  # Local or gs://.
  config: dict[str, Any]  # Of the whole run, nested; travels in each checkpoint.
  every_steps: int  # 0 saves at the end only.
  keep: int  # The number of latest checkpoints that stay.
  keep_every_steps: int = 0  # Multiples of this stay for good; 0 for none.
  every_seconds: float = 0  # Above 0: also so long after the start or the latest save; see `late`.
  classifier_layer: int = 0  # Of the projection head, which feeds the linear classifier; 0 is the encoder's h.
  class_names: Sequence[str] = ()  # Of the linear classifier, in the order of its outputs; empty where it has none.

  def __post_init__(self):
    self._saved_at = time.monotonic()
    preserve = [ocp.training.preservation_policies.LatestN(max(self.keep, 1))]
    if self.keep_every_steps:
      preserve.append(ocp.training.preservation_policies.EveryNSteps(self.keep_every_steps))
    context = ocp.Context()
    context.array.saving.min_slice_bytes_for_replica_parallel = SMALLEST_SLICE_BYTES
    self._manager = ocp.training.Checkpointer(
      epath.Path(self.workdir) / "checkpoints",
      context=context,
      # The loop decides when to save: it knows the last step and preemption.
      save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
      preservation_policy=ocp.training.preservation_policies.AnyPreservationPolicy(preserve),
      # A killed save leaves a temporary folder behind, which is deleted when the run continues.
      cleanup_tmp_directories=True,
    )

  def due(self, step: int) -> bool:
    """Returns whether the interval in steps asks to save `step`, or it is one that stays for good."""
    return any(every > 0 and step % every == 0 for every in (self.every_steps, self.keep_every_steps))

  def late(self, now: float) -> bool:
    """Returns whether the interval in seconds is over at `now` of `time.monotonic`, on this process's clock."""
    return self.every_seconds > 0 and now - self._saved_at >= self.every_seconds

  def save(self, state: state_lib.TrainState, step: int) -> None:
    """Starts an asynchronous save; returns once the arrays may be overwritten."""
    if self._manager.latest is not None and self._manager.latest.step >= step:
      return
    self._saved_at = time.monotonic()
    metadata = {"config": self.config, "classifier_layer": self.classifier_layer, "version": __version__}
    metadata["class_names"] = list(self.class_names)
    self._manager.save_checkpointables_async(step, _parts(state), custom_metadata=metadata)

  def restore_latest(self, state: state_lib.TrainState) -> tuple[state_lib.TrainState, int]:
    """Returns the newest saved state with the placement of `state`, and its step; `state` and 0 if there is none."""
    latest = self._manager.latest
    if latest is None:
      return state, 0
    wanted = _parts(state)
    path = epath.Path(self.workdir) / "checkpoints" / str(latest.step)
    check(wanted, Saved(path).shapes, str(path))
    parts = self._manager.load_checkpointables(latest.step, jax.tree.map(_abstract, wanted))
    training = parts[TRAINING]
    opt_state = jax.tree.unflatten(jax.tree.structure(state.opt_state), jax.tree.leaves(training["opt_state"]))
    rest = {"opt_state": opt_state, "memory": training.get("memory")}
    # Orbax drops empty trees: a network without BatchNorm has no moving averages.
    model = {"params": parts[MODEL]["params"], "batch_stats": parts[MODEL].get("batch_stats") or {}}
    return state_lib.TrainState(training["step"], **model, **rest), latest.step

  def close(self) -> None:
    """Waits for the saves under way and reports their failures."""
    self._manager.close()


@dataclasses.dataclass(frozen=True)
class Saved:
  """One checkpoint on disk, of any job; see `open`."""

  path: epath.Path  # The folder of its step.

  @property
  def step(self) -> int:
    """The optimizer steps done."""
    return int(self.path.name)

  @functools.cached_property
  def shapes(self) -> dict[str, Any]:
    """Shapes and dtypes of the arrays, by part (`model`, `training`)."""
    return {part: self._metadata.metadata[part] for part in (MODEL, TRAINING) if part in self._metadata.metadata}

  @property
  def config(self) -> dict[str, Any]:
    """The configuration of the run, as a nested dict."""
    custom = self._metadata.custom_metadata
    if not custom or "config" not in custom:
      raise errors.UserError(f"checkpoint {self.path} carries no config; it was not written by simclr_jax.")
    return custom["config"]

  @property
  def job(self) -> str:
    """The job that wrote it, "" where that is not known: the folder was taken out of its run."""
    path = self.path.parent.parent / "config.json"
    return json.loads(path.read_text()).get("job", "") if path.exists() else ""

  @property
  def classifier_layer(self) -> int:
    """The layer of the projection head that feeds the linear classifier; 0 is the encoder's h."""
    return self._metadata.custom_metadata.get("classifier_layer", 0)

  @property
  def classes(self) -> int:
    """The number of classes of the linear classifier; a UserError where the checkpoint has none."""
    params = self.shapes[MODEL]["params"]
    if "linear_head" not in params:
      raise errors.UserError(
        f"checkpoint {self.path} has no classifier; it holds {_listed(params)}; give a run of finetune or linear_eval."
      )
    return params["linear_head"]["dense"]["bias"].shape[0]

  @property
  def class_names(self) -> tuple[str, ...]:
    """The names of the classes, in the order of the classifier's outputs; their numbers where none are stored."""
    names = self._metadata.custom_metadata.get("class_names", ())
    return tuple(names) if len(names) == self.classes else tuple(map(str, range(self.classes)))

  def load(self, params: Any, batch_stats: Any) -> tuple[Any, Any]:
    """Returns (params, batch_stats) for the parts asked for, placed as they are placed.

    Both are trees of arrays, or of shapes with placements, keyed by part (`encoder`, ...). Parts that are not asked for
    stay on disk; within a part an array that is missing, extra or of another shape is a UserError.
    """
    model = self.shapes[MODEL]
    saved = {"params": model.get("params") or {}, "batch_stats": model.get("batch_stats") or {}}
    wanted = {"params": params, "batch_stats": {part: tree for part, tree in batch_stats.items() if tree}}
    for collection, found in saved.items():
      for part in wanted[collection]:
        if part not in found:
          raise errors.UserError(f"checkpoint {self.path} has no {collection}/{part}; it holds {_listed(found)}.")
    check(wanted, {c: {p: saved[c][p] for p in wanted[c]} for c in wanted}, str(self.path))
    left_out = lambda collection: jax.tree.map(lambda _: ocp.PLACEHOLDER, saved[collection])
    whole = {c: {**left_out(c), **jax.tree.map(_abstract, wanted[c])} for c in saved if c in model}
    loaded = ocp.load_checkpointables(self.path, {MODEL: whole})[MODEL]
    return tuple(
      {part: loaded[c][part] if part in wanted[c] else {} for part in asked}
      for c, asked in (("params", params), ("batch_stats", batch_stats))
    )

  @functools.cached_property
  def _metadata(self):
    return ocp.checkpointables_metadata(self.path)


def open(path: str) -> Saved:
  """Returns the checkpoint at `path`: a step's folder, or the newest one of a run's workdir or `checkpoints` folder."""
  root = epath.Path(files.absolute(path))  # Orbax refuses relative paths.
  if not root.exists():
    raise errors.UserError(f"checkpoint {path} does not exist; give a run's workdir or one of its checkpoints.")
  if not root.is_dir():
    raise errors.UserError(f"checkpoint {path} is a file; give a run's workdir or one of its checkpoints/STEP folders.")
  folder = root / "checkpoints" if (root / "checkpoints").exists() else root
  steps = sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit())
  step = folder / str(steps[-1]) if steps else folder
  if not (step / "_CHECKPOINT_METADATA").exists():
    raise errors.UserError(f"{path} holds no checkpoint; give a run's workdir or one of its checkpoints/STEP folders.")
  return Saved(step)


def check(wanted: Any, saved: Any, where: str) -> None:
  """Raises a UserError that names the first array whose shape in `saved`, at the path `where`, is not as wanted."""
  want, have = _named(wanted), _named(saved)
  remedy = "use the config that it was trained with, or another checkpoint"
  for name in want | have:
    if name not in have:
      raise errors.UserError(f"checkpoint {where} lacks the array {name} {want[name]}; {remedy}.")
    if name not in want:
      raise errors.UserError(f"checkpoint {where} has an extra array {name} {have[name]}; {remedy}.")
    if want[name] != have[name]:
      raise errors.UserError(f"checkpoint {where}: array {name} is {have[name]}, wanted {want[name]}; {remedy}.")


def _parts(state):
  # Optax's nested named tuples change between its versions; a list of leaves does not.
  leaves = {f"{i:04d}": leaf for i, leaf in enumerate(jax.tree.leaves(state.opt_state))}
  memory = {} if state.memory is None else {"memory": state.memory}
  return {MODEL: state.variables, TRAINING: {"step": state.step, "opt_state": leaves, **memory}}


def _abstract(leaf):
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def _named(tree) -> dict[str, list[int]]:
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path, simple=True, separator="/"): list(leaf.shape) for path, leaf in leaves}


def _listed(tree) -> str:
  return ", ".join(sorted(tree or {})) or "nothing"
