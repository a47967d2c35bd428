"""The configuration of a run: load, override, check, compare, write. `keys` has every key and its default."""

import importlib.util
import inspect
import json
import logging
import pathlib
import traceback
import types
from collections.abc import Mapping
from typing import Any

import jax
import ml_collections
from etils import epath

from simclr_jax import errors, files, keys
from simclr_jax.data import order, transfer_sets
from simclr_jax.keys import KEYS, TREE, Value, flat
from simclr_jax.version import __version__

log = logging.getLogger("simclr_jax")

# In place of a checkpoint: the encoder as it is initialised.
RANDOM = "random"


def defaults() -> ml_collections.ConfigDict:
  """Returns the unlocked configuration that experiments start from: the reference's own defaults."""
  of = lambda tree: {name: of(entry) if isinstance(entry, dict) else entry.default for name, entry in tree.items()}
  return ml_collections.ConfigDict(of(TREE))


def load(name_or_path: str = "", overrides: Mapping[str, Any] | None = None) -> ml_collections.ConfigDict:
  """Returns the locked, checked config of an experiment, or of the checkpoint that `overrides` names.

  `name_or_path` is that of `read`; "" takes the config that the checkpoint `checkpoint` (or `distill.teacher`) carries.
  `overrides` maps dotted keys to values, or to their text; one that does not fit its key is a UserError.
  """
  overrides = overrides or {}
  if name_or_path:
    config = read(name_or_path)
  elif path := next((overrides[k] for k in ("checkpoint", "distill.teacher") if names_run(overrides.get(k, ""))), ""):
    # Imported late: it brings Orbax, and --help should answer at once.
    from simclr_jax.training import checkpoint

    config = inherited(checkpoint.open(path).config)
  else:
    raise errors.UserError(
      f"no --config; give an experiment, such as one of {', '.join(bundled())}, or, to go on from a run, "
      "--config.checkpoint=RUN."
    )
  config.lock()
  for key, value in overrides.items():
    set_key(config, key, value)
  for name, key in KEYS.items():
    value = get_key(config, name)
    if key.is_path and names_run(value):
      set_key(config, name, files.absolute(value))
  config.transfer.datasets = transfer_sets.absolute(config.transfer.datasets)
  check(config)
  return config


def read(name_or_path: str) -> ml_collections.ConfigDict:
  """Returns the unlocked config of an experiment: a bundled one by name, or a Python file; a variant after a colon."""
  name, _, variant = name_or_path.partition(":")
  path, known = pathlib.Path(name).expanduser(), bundled()
  if not path.is_file():
    # Bundled experiments go by name, and by the path that they have in a checkout.
    stem = path.stem if path.suffix in ("", ".py") and str(path.parent) in (".", "configs") else ""
    if stem not in known:
      beside = sorted(p.name for p in path.parent.glob("*.py")) if path.parent.is_dir() and path.suffix else []
      names = [*known, *beside]
      raise errors.UserError(
        f"config {name} does not exist{errors.nearest(path.name if path.suffix else name, names) or ';'} bundled are "
        f"{', '.join(known)}" + (f", and {path.parent} has {', '.join(beside)}." if beside else ".")
      )
    path = known[stem]
  spec = importlib.util.spec_from_file_location("experiment", path)
  if spec is None:
    raise errors.UserError(f"config {name} is not a Python file; see configs/cifar10.py for the form.")
  module = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
    takes_variant = bool(inspect.signature(module.get_config).parameters)
    if variant and not takes_variant:
      raise errors.UserError(f"config {name} has no variants, got {variant!r}; leave the colon out.")
    config = module.get_config(variant) if variant else module.get_config()
  except errors.UserError:
    raise
  except Exception as error:
    line = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{error.filename}:{error.lineno}" if isinstance(error, SyntaxError) else f"{line.filename}:{line.lineno}"
    moved = isinstance(error, ImportError) and (error.name or "").startswith("configs")
    hint = " Since 0.2 the defaults are `from simclr_jax import config; c = config.defaults()`." if moved else ""
    raise errors.UserError(f"config {name} cannot be read: {type(error).__name__}: {error} ({where}).{hint}") from error
  if not isinstance(config, ml_collections.ConfigDict):
    raise errors.UserError(f"config {name}: get_config() gave a {type(config).__name__}, wanted a ConfigDict.")
  return config


def names_run(path: str) -> bool:
  """Returns whether the value of a path key names something on disk: it is neither "" nor `random`."""
  return path not in ("", RANDOM)


def check(config: ml_collections.ConfigDict) -> None:
  """Raises a UserError for the first value that is not among its key's choices or outside of its interval."""
  for name, key in KEYS.items():
    value = get_key(config, name)
    if name in unmeasured(config):
      continue
    if problem := key.problem(value):
      raise errors.UserError(f"config.{name} is {value!r}{problem}")
  low, high = config.augment.min_area, config.augment.max_area
  if low > high:
    raise errors.UserError(f"config.augment.min_area is {low} and max_area {high}; use a smaller min_area.")


def unmeasured(config: ml_collections.ConfigDict) -> list[str]:
  """Returns the keys whose values the images of a folder are to give."""
  if config.data.source != "folder":
    return []
  return [name for name, key in KEYS.items() if key.from_folder and get_key(config, name) == 0]


def bundled() -> dict[str, pathlib.Path]:
  """Returns the experiments that come with the package: name -> Python file, sorted."""
  package = pathlib.Path(__file__).parent
  # In a wheel they are inside of the package, in a checkout beside it.
  folder = next((f for f in (package / "configs", package.parent / "configs") if f.is_dir()), package)
  return {path.stem: path for path in sorted(folder.glob("*.py")) if path.stem != "__init__"}


def summary(path: pathlib.Path) -> str:
  """Returns the first line of an experiment's docstring."""
  return path.read_text().partition('"""')[2].partition("\n")[0].strip().removesuffix('"""')


def completed(saved: Mapping[str, Any]) -> ml_collections.ConfigDict:
  """Returns a stored config with the defaults of keys that are younger than it."""
  config = defaults()
  # Before this key existed, all of the augmentation was the host's.
  config.augment.place = "host"
  config.update(saved)
  return config


# Of the job that wrote a checkpoint alone: what a later one starts from and which labels it sees, it says itself.
OWN = tuple(name for name in KEYS if name.startswith("labels.")) + ("checkpoint", "distill.teacher")


def inherited(saved: Mapping[str, Any]) -> ml_collections.ConfigDict:
  """Returns the config that a job takes from a checkpoint's: all of it but the keys OWN, which have their defaults."""
  config = completed(saved)
  for name in OWN:
    set_key(config, name, KEYS[name].default)
  return config


def changed(config: ml_collections.ConfigDict, typed: Mapping[str, Any], job: str) -> str:
  """Returns the keys that matter to a job, differ from the defaults and were not typed, "model.depth=18, ..."."""
  values = {name: get_key(config, name) for name in KEYS if name not in typed and keys.matters(job, name)}
  return ", ".join(f"{name}={value}" for name, value in values.items() if value != KEYS[name].default)


def described(config: ml_collections.ConfigDict) -> str:
  """Returns every key, its value and meaning, a line each; a star marks what differs from the defaults."""
  rows = [(name, get_key(config, name), key) for name, key in KEYS.items()]
  width = max(len(f"{name} = {value!r}") for name, value, _ in rows if len(repr(value)) < 30)
  return "\n".join(
    f"{' ' if value == key.default else '*'} {f'{name} = {value!r}':<{width}}  # {key.meaning}"
    + (f" (default: {key.default!r})" if value != key.default else "")
    for name, value, key in rows
  )


def get_key(config: ml_collections.ConfigDict, name: str) -> Value:
  """Returns the value of a dotted key."""
  for part in name.split("."):
    config = config[part]
  return config


def set_key(config: ml_collections.ConfigDict, name: str, value: Any) -> None:
  """Sets a dotted key, text being converted; a UserError where there is no such key or the value has another type."""
  known = flat(config.to_dict())
  if name not in known:
    first = next((key for key in known if key.startswith(f"{name}.")), None)
    if first:
      raise errors.UserError(f"config.{name} is a section; set one of its keys, such as config.{first}.")
    raise errors.UserError(
      f"unknown config key {name!r}{_nearest_key(name, known) or ';'} `simclr-jax config` lists all keys."
    )
  section, _, leaf = name.rpartition(".")
  (get_key(config, section) if section else config)[leaf] = _converted(name, known[name], value)


# Keys that may change when a run continues.
FREE = tuple(name for name, key in KEYS.items() if key.is_free)


def difference(ours: Mapping[str, Any], theirs: Mapping[str, Any], free: tuple[str, ...] = FREE) -> str:
  """Returns the first dotted key, not in `free`, in which a plain config differs from a stored one, or ""."""
  ours, theirs = flat(ours), flat(completed(theirs).to_dict())
  differing = (n for n in sorted(ours.keys() | theirs.keys()) if ours.get(n) != theirs.get(n) and n not in free)
  return next(differing, "")


def order_law(workdir: str) -> int:
  """Returns the law of the order of resident data: of the run in `workdir`, or the present `order.LAW`."""
  path = epath.Path(workdir) / "config.json"
  return json.loads(path.read_text()).get("order", 1) if workdir and path.exists() else order.LAW


def recorded(workdir: str, config: ml_collections.ConfigDict) -> dict[str, Value]:
  """Returns the values, by key, that the run in a folder took in place of what was asked for, as `config` does again.

  They depend on the data, which may have grown since. See `claim`.
  """
  path = epath.Path(workdir) / "config.json"
  if not workdir or not path.exists():
    return {}
  stored = json.loads(path.read_text())
  ours, theirs = flat(config.to_dict()), flat(stored["config"])
  return {name: theirs[name] for name, asked in stored.get("asked", {}).items() if ours[name] in (asked, theirs[name])}


def claim(
  workdir: str,
  config: Mapping[str, Any],
  job: str,
  free: tuple[str, ...] = FREE,
  asked: Mapping[str, Value] = types.MappingProxyType({}),
  images: Mapping[str, Any] = types.MappingProxyType({}),
  allow_changed: bool = False,
) -> None:
  """Writes `workdir/config.json`, or checks that it already holds this very run: its job and its plain nested config.

  Keys in `free` may differ; the UserError for another run names the first one else that does. `asked` has the values
  that the user gave for keys whose values the data changed; see `recorded`. `images` is what identifies the training
  images (`examples`, their number, and `sha256`): others are refused, unless `allow_changed`.
  """
  path = epath.Path(workdir) / "config.json"
  if path.exists():
    stored = json.loads(path.read_text())
    # Completed, so that the message gives the default of a key that is younger than the run rather than None.
    # An earlier release took keys that the job does not read.
    free = (*free, *keys.unread(job, KEYS))
    ours, theirs = {"job": job, **config}, completed({"job": stored["job"], **stored["config"]}).to_dict()
    if name := difference(ours, theirs, free):
      was, now = (flat(tree).get(name) for tree in (theirs, ours))
      raise errors.UserError(
        f"workdir {workdir} holds another run: {name} was {was!r}, now is {now!r}; "
        + (
          f"to train for longer, start from its weights: another --workdir and --config.checkpoint={workdir}."
          if name.rpartition(".")[2] in ("total_epochs", "total_steps") and theirs["job"] == job
          else "choose another --workdir or repeat that run's command."
        )
      )
    _check_images(workdir, stored.get("images", {}), images, allowed=allow_changed)
    images = images or stored.get("images", {})
  if jax.process_index() == 0:
    facts = {"job": job, "version": __version__, "order": order_law(workdir), "images": dict(images)}
    files.write_json(path, {**facts, "config": config, "asked": dict(asked)})


def _check_images(workdir: str, theirs: Mapping[str, Any], ours: Mapping[str, Any], *, allowed: bool) -> None:
  """Raises a UserError where a run would continue on other training images than those it began with."""
  if not theirs or not ours or theirs == ours:
    return
  was, now = theirs["examples"], ours["examples"]
  what = f"there were {was} and now are {now}" if was != now else f"of the {now}, some have other names or contents"
  if not allowed:
    raise errors.UserError(
      f"the training images of the run in {workdir} have changed: {what}; restore them, choose another --workdir, or "
      "continue all the same with --config.data.allow_changed=true."
    )
  log.warning("The training images have changed (%s); the run continues on the present ones.", what)


def _nearest_key(name: str, known: Mapping[str, Any]) -> str:
  # Who leaves the section out means the key of that name.
  same_leaf = [f'"{key}"' for key in known if key.rpartition(".")[2] == name.rpartition(".")[2]]
  return f"; did you mean {' or '.join(same_leaf)}?" if same_leaf else errors.nearest(name, known)


def _converted(name: str, present: Value, value: Any) -> Value:
  """Returns a value, or its text, in the type of the present one."""
  kinds = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}
  kind = type(present)
  try:
    if isinstance(value, str) and kind is bool:
      return {"true": True, "1": True, "false": False, "0": False}[value.lower()]
    if isinstance(value, str) or kind is float and isinstance(value, int) and not isinstance(value, bool):
      return kind(value)
  except (KeyError, ValueError):
    pass
  else:
    if type(value) is kind:
      return value
  raise errors.UserError(f"config.{name} is {kinds.get(kind, kind.__name__)} (now {present!r}), got {value!r}.")
