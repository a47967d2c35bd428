"""Checkpoints (Orbax): asynchronous saves, exact resumption, and strict loading that names what does not fit."""

import dataclasses
import json
from typing import Any

import jax
from etils import epath
from orbax.checkpoint import v1 as ocp

from simclr_jax import errors
from simclr_jax.training import state as state_lib

# Two parts, so that a job that only wants the network never touches the optimizer's arrays.
MODEL, TRAINING = "model", "training"


@dataclasses.dataclass
class Checkpoints:
  """The checkpoints of one run, under `workdir/checkpoints/<step>`.

  Attributes:
    workdir: the run's folder, local or gs://.
    config: plain nested dict of the whole run's configuration; travels in each checkpoint.
    every_steps: interval between saves; 0 saves at the end only.
    keep: how many of the latest stay.
    keep_every_steps: multiples of this stay for good; 0 for none.
    classifier_layer: of the projection head, whose output feeds the linear classifier; 0 is the encoder's h.
  """

  workdir: str
  config: dict[str, Any]
  every_steps: int
  keep: int
  keep_every_steps: int = 0
  classifier_layer: int = 0

  def __post_init__(self):
    preserve = [ocp.training.preservation_policies.LatestN(max(self.keep, 1))]
    if self.keep_every_steps:
      preserve.append(ocp.training.preservation_policies.EveryNSteps(self.keep_every_steps))
    self._manager = ocp.training.Checkpointer(
      epath.Path(self.workdir) / "checkpoints",
      # When to save is the loop's business: it knows the last step and preemption.
      save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
      preservation_policy=ocp.training.preservation_policies.AnyPreservationPolicy(preserve),
      # What a killed save left behind goes when the run continues.
      cleanup_tmp_directories=True,
    )

  def due(self, step: int) -> bool:
    """Whether `step` is one that the interval asks to save."""
    return self.every_steps > 0 and step % self.every_steps == 0

  def save(self, state: state_lib.TrainState, step: int) -> None:
    """Starts an asynchronous save; returns once the arrays may be overwritten."""
    if self._manager.latest is not None and self._manager.latest.step >= step:
      return
    parts = _parts(state)
    metadata = {"config": self.config, "classifier_layer": self.classifier_layer}
    self._manager.save_checkpointables_async(step, parts, custom_metadata=metadata)

  def restore_latest(self, state: state_lib.TrainState) -> tuple[state_lib.TrainState, int]:
    """Returns the newest saved state with the placement of `state`, and its step; `state` and 0 if there is none."""
    latest = self._manager.latest
    if latest is None:
      return state, 0
    wanted = _parts(state)
    path = epath.Path(self.workdir) / "checkpoints" / str(latest.step)
    check(wanted, _shapes(path), str(path))
    parts = self._manager.load_checkpointables(latest.step, jax.tree.map(_abstract, wanted))
    training = parts[TRAINING]
    opt_state = jax.tree.unflatten(jax.tree.structure(state.opt_state), jax.tree.leaves(training["opt_state"]))
    rest = {"opt_state": opt_state, "memory": training.get("memory")}
    return state_lib.TrainState(training["step"], **parts[MODEL], **rest), latest.step

  def close(self) -> None:
    """Waits for the saves under way and reports their failures."""
    self._manager.close()


def find(path: str) -> epath.Path:
  """Returns the folder of one checkpoint: `path` itself, or the newest of the run that `path` is.

  Args:
    path: a run's workdir, its `checkpoints` folder, or one step's folder.

  Raises:
    UserError: there is no checkpoint.
  """
  root = epath.Path(errors.absolute(path))  # Orbax refuses relative paths.
  if not root.exists():
    raise errors.UserError(f"checkpoint {path} does not exist; give a run's workdir or one of its checkpoints.")
  folder = root / "checkpoints" if (root / "checkpoints").exists() else root
  steps = sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit())
  step = folder / str(steps[-1]) if steps else folder
  if not (step / "_CHECKPOINT_METADATA").exists():
    raise errors.UserError(f"{path} holds no checkpoint; give a run's workdir or one of its checkpoints/STEP folders.")
  return step


def read_config(path: str) -> dict[str, Any]:
  """Returns the configuration that the checkpoint at `path` was trained with."""
  step = find(path)
  metadata = ocp.checkpointables_metadata(step).custom_metadata
  if not metadata or "config" not in metadata:
    raise errors.UserError(f"checkpoint {step} carries no config; it was not written by simclr_jax.")
  return metadata["config"]


def classifier_layer(path: str) -> int:
  """Returns which layer of the projection head feeds the linear classifier of the checkpoint at `path`; 0 is h."""
  return ocp.checkpointables_metadata(find(path)).custom_metadata.get("classifier_layer", 0)


def classes(path: str) -> int:
  """Returns how many classes the linear classifier of the checkpoint at `path` tells apart.

  Raises:
    UserError: it has no classifier.
  """
  params = _shapes(find(path))[MODEL]["params"]
  if "linear_head" not in params:
    raise errors.UserError(
      f"checkpoint {path} has no classifier; it holds {_listed(params)}; give a run of finetune or linear_eval."
    )
  return params["linear_head"]["dense"]["bias"].shape[0]


def load_model(path: str, params, batch_stats) -> tuple[Any, Any]:
  """Returns (params, batch_stats) of the checkpoint at `path` for the parts asked for, placed as they are placed.

  Args:
    path: see `find`.
    params: arrays or ShapeDtypeStructs with shardings, keyed by part (`encoder`, ...). Parts that are not asked for
      stay on disk; within a part the names and shapes must be the checkpoint's, no more and no less.
    batch_stats: the same for BatchNorm's moving averages.

  Raises:
    UserError: an array is missing, extra or of another shape; names it.
  """
  step = find(path)
  saved = _shapes(step)[MODEL]
  for collection, tree in (("params", params), ("batch_stats", batch_stats)):
    for part in tree:
      if part not in saved.get(collection, {}):
        raise errors.UserError(
          f"checkpoint {step} has no {collection}/{part}; it holds {_listed(saved.get(collection))}."
        )
  wanted = {"params": params, "batch_stats": batch_stats}
  check(wanted, {c: {p: saved[c][p] for p in wanted[c]} for c in wanted}, str(step))
  abstract = jax.tree.map(_abstract, wanted)
  left_out = {c: {p: _placeholders(saved[c][p]) for p in saved[c] if p not in wanted[c]} for c in saved}
  whole = {c: {**left_out[c], **abstract[c]} for c in saved}
  model = ocp.load_checkpointables(step, {MODEL: whole})[MODEL]
  return {p: model["params"][p] for p in params}, {p: model["batch_stats"][p] for p in batch_stats}


def check(wanted, saved, where: str) -> None:
  """Raises a UserError that names the first array in which `saved` differs from `wanted`.

  Args:
    wanted: tree of anything with a shape.
    saved: the same for what is on disk.
    where: the checkpoint's path, for the message.
  """
  want, have = _named(wanted), _named(saved)
  remedy = "use the config that it was trained with, or another checkpoint"
  for name in want:
    if name not in have:
      raise errors.UserError(f"checkpoint {where} lacks the array {name} {list(want[name])}; {remedy}.")
    if want[name] != have[name]:
      raise errors.UserError(
        f"checkpoint {where}: array {name} is {list(have[name])}, wanted {list(want[name])}; {remedy}."
      )
  for name in have:
    if name not in want:
      raise errors.UserError(f"checkpoint {where} has an extra array {name} {list(have[name])}; {remedy}.")


def claim_workdir(workdir: str, config: dict[str, Any], job: str, free: tuple[str, ...]) -> None:
  """Writes `workdir/config.json`, or checks that it already holds this very run.

  Args:
    workdir: the run's folder; made if missing.
    config: plain nested dict.
    job: name of the job, part of the identity.
    free: dotted keys (or prefixes of them) that may change between restarts of one run.

  Raises:
    UserError: the folder holds another run; names the first key that differs.
  """
  path = epath.Path(workdir) / "config.json"
  ours = {"job": job, **flat(config)}
  if path.exists():
    theirs = json.loads(path.read_text())
    theirs = {"job": theirs["job"], **flat(theirs["config"])}
    for key in sorted(ours.keys() | theirs.keys()):
      if ours.get(key) != theirs.get(key) and not key.startswith(free):
        raise errors.UserError(
          f"workdir {workdir} holds another run: {key} was {theirs.get(key)!r}, now is {ours.get(key)!r}; "
          "choose another --workdir or repeat that run's command."
        )
  if jax.process_index() == 0:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Whole or not at all: another process may be reading it now, and a kill may come.
    partial = path.with_name("config.json.partial")
    partial.write_text(json.dumps({"job": job, "config": config}, indent=2) + "\n")
    partial.replace(path)


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
  """Returns {"a.b": value} of {"a": {"b": value}}."""
  out = {}
  for key, value in tree.items():
    if isinstance(value, dict):
      out.update(flat(value, f"{prefix}{key}."))
    else:
      out[prefix + key] = list(value) if isinstance(value, tuple) else value
  return out


def _parts(state):
  training = {"step": state.step, "opt_state": _plain(state.opt_state)}
  if state.memory is not None:
    training["memory"] = state.memory
  return {MODEL: {"params": state.params, "batch_stats": state.batch_stats}, TRAINING: training}


def _plain(opt_state):
  # Optax's nested named tuples change between its versions; a list of leaves does not.
  return {f"{i:04d}": leaf for i, leaf in enumerate(jax.tree.leaves(opt_state))}


def _abstract(leaf):
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def _placeholders(tree):
  return jax.tree.map(lambda _: ocp.PLACEHOLDER, tree)


def _shapes(step: epath.Path):
  metadata = ocp.checkpointables_metadata(step).metadata
  return {k: metadata[k] for k in (MODEL, TRAINING) if k in metadata}


def _named(tree) -> dict[str, tuple[int, ...]]:
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape) for path, leaf in leaves}


def _listed(tree) -> str:
  return ", ".join(sorted(tree or {})) or "nothing"
