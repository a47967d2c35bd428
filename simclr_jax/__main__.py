"""The command line: python -m simclr_jax JOB --config=FILE[:ARG] --config.key=value --workdir=DIR."""

import importlib
import importlib.util
import inspect
import os
import pathlib
import sys
import textwrap
import traceback

# Before TensorFlow is imported anywhere: its start-up messages are of no use to our users.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

import jax
import ml_collections

from simclr_jax import errors
from simclr_jax.training import checkpoint, telemetry

# The jobs, and the options of each beside those that all have.
JOBS = {
  "pretrain": ("profile_steps", "profile_input", "chip", "mfu"),
  "linear_eval": ("profile_steps",),
  "finetune": ("profile_steps",),
  "distill": ("profile_steps",),
  "knn": (),
  "transfer": (),
  "embed": (),
  "study": ("study", "rows", "columns", "evaluation"),
  "convert": ("source", "ema", "classifier_layer", "image_size"),
  "demo": (),
  "plan": ("topology", "devices", "batch_sizes", "mfu"),
  "bench": ("only", "sizes", "data_dir", "rounds", "gpu", "small", "batches", "npz", "epochs", "steps"),
}
WITHOUT_CONFIG = ("bench", "convert")
# Options that are on when they are given without a value.
SWITCHES = ("profile_input", "gpu", "small", "ema")
# What these compute is of no use to a later run, so that they need no folder of its own.
DEFAULT_WORKDIR = {"plan": "runs/plan", "bench": "runs/bench"}
ROOT = pathlib.Path(__file__).parents[1]

USAGE = """\
usage: python -m simclr_jax JOB --config=FILE[:VARIANT] [--config.KEY=VALUE ...] --workdir=DIR

  --config=FILE[:VARIANT]   an experiment, such as configs/cifar10.py or configs/imagenet.py:v1; jobs that read a
                            checkpoint use the one that it carries where this is left out
  --config.KEY=VALUE        overrides one key, such as --config.loss.temperature=0.5; configs/base.py has them all
  --workdir=DIR             where checkpoints, metrics and results go, local or gs://; the same command continues there
  --coordinator=HOST:PORT --processes=N --process=I
                            one of N processes of a run; on a TPU pod or under Slurm, --processes=auto finds all three

Exit codes: 0 done, 2 a mistake in the input, 143 stopped by SIGTERM with the state saved, 1 a bug."""

# Keys that hold a path; what is typed is relative to the current folder, what a run stores is not.
PATH_KEYS = ("checkpoint", "data.dir", "labels.ids", "distill.teacher")

FLAGS = ("workdir", "coordinator", "processes", "process")


def main(argv: list[str]) -> int:
  """Runs the command `argv` (without the program's name) and returns the exit code."""
  try:
    if not argv or argv[0] in ("--help", "-h", "help"):
      print(f"{_overview()}\n\n{USAGE}")
      return 0
    name = argv[0]
    if name not in JOBS:
      raise errors.UserError(f"unknown job {name!r}{errors.nearest(name, JOBS)}; the jobs are {', '.join(JOBS)}.")
    if "--help" in argv or "-h" in argv:
      print(f"{_doc(name)}\n\n{USAGE}")
      return 0
    flags, config_file, overrides = parse(argv[1:], JOBS[name])
    if "topology" in flags or "gpu" in flags:
      # The devices are described ones, or those of processes of their own: this one leaves them alone.
      jax.config.update("jax_platforms", "cpu")
    # First of all: to read a checkpoint's config is to use the devices.
    _join(flags)
    inputs = []
    if name in WITHOUT_CONFIG:
      if config_file or overrides:
        raise errors.UserError(f"{name} takes no --config; see --help.")
    else:
      config = load_config(config_file, overrides)
      if "float64" in (config.model.dtype, config.model.param_dtype):
        jax.config.update("jax_enable_x64", True)
      inputs = [config]
    workdir = flags.get("workdir") or DEFAULT_WORKDIR.get(name, "")
    if not workdir and "profile_input" not in flags:
      raise errors.UserError(f"{name} has no --workdir; give the folder that its results should go to.")
    telemetry.set_up_logging()
    # Imported late: it brings TensorFlow, and --help should answer at once.
    job = importlib.import_module(f"simclr_jax.jobs.{name}")
    options = {option: flags[option] for option in JOBS[name] if option in flags}
    job.run(*inputs, errors.absolute(workdir), **options)
    return 0
  except errors.UserError as error:
    print(f"simclr_jax: {error}", file=sys.stderr)
    return 2
  except KeyboardInterrupt:
    return 130
  except BrokenPipeError:
    # Who reads has had enough, as `--help | head`; Python would complain once more when it flushes.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0
  except Exception:
    traceback.print_exc()
    print("simclr_jax: this is a bug of ours; please report the lines above with your command.", file=sys.stderr)
    return 1


def parse(args: list[str], options: tuple[str, ...] = ()) -> tuple[dict[str, str], str, dict[str, str]]:
  """Returns (flags, config file with variant or "", overrides by dotted key) of a job's arguments.

  Args:
    args: what follows the job's name.
    options: the job's own options, beside FLAGS.

  Raises:
    UserError: an argument is not of the form that USAGE shows.
  """
  known = (*FLAGS, *options)
  flags, config_file, overrides = {}, "", {}
  for arg in args:
    name, has_value, value = arg.removeprefix("--").partition("=")
    if not arg.startswith("--"):
      raise errors.UserError(f"unexpected argument {arg!r}; options look like --name=value.")
    if name == "config":
      config_file = value
    elif name.startswith("config."):
      # A bare --config.flag turns a flag on.
      overrides[name.removeprefix("config.")] = value if has_value else "true"
    elif name in known:
      flags[name] = value if has_value or name not in SWITCHES else "true"
    else:
      raise errors.UserError(f"unknown option --{name}{errors.nearest(name, known)}; see --help.")
    bare = name.startswith("config.") or name in SWITCHES
    if not has_value and not bare or name == "config" and not value:
      raise errors.UserError(f"option --{name} needs a value: --{name}=VALUE.")
  return flags, config_file, overrides


def load_config(config_file: str, overrides: dict[str, str]) -> ml_collections.ConfigDict:
  """Returns the locked config of a file, or of the checkpoint that `overrides` names, with the overrides applied.

  Raises:
    UserError: the file cannot be read, or an override does not fit a key.
  """
  if config_file:
    config = _read_config(config_file)
  elif source := _run_of(overrides):
    config = _with_new_keys(checkpoint.read_config(source))
  else:
    known = ", ".join(sorted(str(p.relative_to(ROOT)) for p in (ROOT / "configs").glob("*.py")))
    raise errors.UserError(f"no --config; give an experiment, such as one of {known}.")
  config.lock()
  for key, text in overrides.items():
    _override(config, key, text)
  for key in PATH_KEYS:
    section, _, leaf = key.rpartition(".")
    holder = config[section] if section else config
    if holder[leaf] not in ("", "random"):
      holder[leaf] = errors.absolute(holder[leaf])
  return config


def _run_of(overrides: dict[str, str]) -> str:
  """Returns the run whose config serves where none is given: the checkpoint's, else the teacher's, or ""."""
  named = (overrides.get(key, "") for key in ("checkpoint", "distill.teacher"))
  return next((errors.absolute(path) for path in named if path not in ("", "random")), "")


def _with_new_keys(saved: dict) -> ml_collections.ConfigDict:
  """Returns a checkpoint's config, completed with the defaults of keys that are younger than it."""
  config = _read_config(str(ROOT / "configs" / "base.py"))
  # Where it augmented was no choice then.
  config.augment.place = "host"
  config.update(saved)
  return config


def _read_config(config_file: str) -> ml_collections.ConfigDict:
  name, _, variant = config_file.partition(":")
  path = pathlib.Path(name)
  if not path.is_file():
    folder = path.parent if path.parent.is_dir() else ROOT / "configs"
    known = sorted(p.name for p in folder.glob("*.py"))
    raise errors.UserError(f"config {name} does not exist{errors.nearest(path.name, known)}; {folder} has {known}.")
  # So that an experiment finds `configs.base` from any working directory.
  sys.path.insert(0, str(ROOT))
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
    raise errors.UserError(f"config {name} cannot be read: {type(error).__name__}: {error} ({where}).") from error
  if not isinstance(config, ml_collections.ConfigDict):
    raise errors.UserError(f"config {name}: get_config() gave a {type(config).__name__}, wanted a ConfigDict.")
  return config


def _override(config: ml_collections.ConfigDict, key: str, text: str) -> None:
  known = checkpoint.flat(config.to_dict())
  if key not in known:
    sections = {name.rpartition(".")[0] for name in known} - {""}
    if key in sections:
      raise errors.UserError(f"config.{key} is a section; set one of its keys, such as config.{_first(known, key)}.")
    raise errors.UserError(f"unknown config key {key!r}{_nearest_key(key, known)}; configs/base.py has all keys.")
  section, _, leaf = key.rpartition(".")
  holder = config
  for name in section.split(".") if section else ():
    holder = holder[name]
  holder[leaf] = _converted(key, known[key], text)


def _nearest_key(key: str, known: dict) -> str:
  # Somebody who leaves the section out means the key of that name.
  same_leaf = [f'"{name}"' for name in known if name.rpartition(".")[2] == key.rpartition(".")[2]]
  return f"; did you mean {' or '.join(same_leaf)}?" if same_leaf else errors.nearest(key, known)


def _first(known: dict, section: str) -> str:
  return next(name for name in known if name.startswith(section + "."))


def _converted(key: str, value, text: str):
  """Returns `text` as a value of the type of `value`."""
  kinds = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}
  try:
    if isinstance(value, bool):
      return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
    return type(value)(text)
  except (KeyError, ValueError):
    kind = kinds.get(type(value), type(value).__name__)
    raise errors.UserError(f"config.{key} is {kind} (now {value!r}), got {text!r}.") from None


def _join(flags: dict[str, str]) -> None:
  """Makes this process one of a run's several."""
  given = [name for name in ("coordinator", "processes", "process") if name in flags]
  if not given:
    return
  if flags.get("processes") == "auto":
    jax.distributed.initialize()
    return
  if len(given) < 3 or not (flags["processes"].isdigit() and flags["process"].isdigit()):
    raise errors.UserError(
      f"got only {', '.join('--' + name for name in given)}; a run of several processes needs "
      "--coordinator=HOST:PORT --processes=N --process=I with numbers, or --processes=auto."
    )
  count, index = int(flags["processes"]), int(flags["process"])
  if index >= count:
    raise errors.UserError(f"--process={index} is not below --processes={count}; count from 0.")
  jax.distributed.initialize(flags["coordinator"], count, index)


def _doc(name: str) -> str:
  spec = importlib.util.find_spec(f"simclr_jax.jobs.{name}")
  source = pathlib.Path(spec.origin).read_text()
  return textwrap.dedent(source.split('"""')[1]).strip()


def _overview() -> str:
  lines = [f"  {name:<12}{_doc(name).splitlines()[0].partition(': ')[2]}" for name in JOBS]
  return "simclr_jax: SimCLR in JAX.\n\njobs:\n" + "\n".join(lines)


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
