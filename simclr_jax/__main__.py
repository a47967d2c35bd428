"""The command line: simclr-jax JOB --config=NAME[:VARIANT] --config.key=value --workdir=DIR."""

import argparse
import functools
import os
import pathlib
import sys
import textwrap
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

from simclr_jax import startup

# Before TensorFlow or JAX is imported anywhere.
startup.quiet()

import jax  # noqa: E402

import simclr_jax  # noqa: E402
from simclr_jax import config as config_lib  # noqa: E402
from simclr_jax import errors, jobs, keys, numbers  # noqa: E402

# What these compute is of no use to a later run, so they need no folder of their own.
DEFAULT_WORKDIR = {"plan": "runs/plan", "bench": "runs/bench"}

USAGE = """\
  --config=NAME[:VARIANT]   an experiment: a bundled one, such as cifar10 or imagenet:v1 (`simclr-jax configs` lists
                            them), or a Python file; jobs that read a checkpoint use the config that it carries where
                            this is left out
  --config.KEY=VALUE        overrides one key, such as --config.loss.temperature=0.5; `simclr-jax config` lists all keys
  --workdir=DIR             where checkpoints, metrics and results go, local or gs://; the same command continues there
  --coordinator=HOST:PORT --processes=N --process=I
                            one of N processes of a run; on a TPU pod or under Slurm, --processes=auto finds all three

Exit codes: 0 done, 2 a mistake in the input, 143 stopped by SIGTERM and 130 by Ctrl-C with the state saved, 1 a bug."""


class Option(NamedTuple):
  """An option: its name, its help, its value's text -> value, and what it is worth without one (None: it needs one)."""

  name: str
  help: str
  convert: Callable[[str], Any] = str
  bare: str | None = None


def _number(name: str, kind: type, valid: Callable[[Any], bool], wanted: str, text: str) -> Option:
  return Option(name, text, lambda value: numbers.parsed(f"--{name}", value, kind, valid, wanted))


def _switch(name: str, text: str) -> Option:
  def convert(value):
    if value not in ("true", "false"):
      raise errors.UserError(f"--{name}={value}; give --{name} alone, or leave it out.")
    return value == "true"

  return Option(name, text, convert, bare="true")


def _sizes(name: str, least: int, text: str) -> Option:
  return Option(name, text, lambda value: tuple(numbers.integers(f"--{name}", value, least=least)) if value else ())


def _profiled_steps(text: str) -> tuple[int, int] | None:
  parts = text.split(",") if text else ()
  if text and (len(parts) != 2 or not all(map(str.isdecimal, parts)) or not 0 < int(parts[0]) <= int(parts[1])):
    raise errors.UserError(f"--profile_steps={text} is not FIRST,LAST; give two steps, such as 10,15.")
  return (int(parts[0]), int(parts[1])) if parts else None


_PROFILE = Option("profile_steps", "FIRST,LAST: steps of a profiler trace", _profiled_steps)
_SHARE = "a share of the peak above 0, at most 1"
_MFU = _number("mfu", float, lambda x: 0 < x <= 1, _SHARE, "expected share of the peak")
_LAYER = "0, 1, ... or -1 for the last one"

# The options of each job beside those that all have.
OPTIONS: dict[str, tuple[Option, ...]] = {
  "pretrain": (
    _PROFILE,
    _switch("profile_input", "time the input pipeline alone"),
    Option("chip", "with --profile_input: the chip to be fed, such as v5e"),
    _MFU,
  ),
  **dict.fromkeys(("linear_eval", "finetune", "distill"), (_PROFILE,)),
  "study": (
    Option("study", "which grid"),
    Option("rows", "a part of the grid's rows"),
    Option("columns", "a part of the grid's columns"),
    Option("evaluation", "linear, reference or knn"),
  ),
  "convert": (
    Option("source", "checkpoint, hub module or SavedModel of the reference"),
    _switch("ema", "take the moving averages of the weights"),
    _number("classifier_layer", int, lambda x: x >= -1, _LAYER, "layer that the classifier reads"),
    _number("image_size", int, lambda x: x > 0, "pixels", "pixels, for the config"),
  ),
  "plan": (
    Option("topology", "NAME:SHAPE of a TPU, such as v3:8x8"),
    _number("devices", int, lambda x: x > 0, "a number of devices", "take the first N devices"),
    _sizes("batch_sizes", 1, "plan for each of them"),
    _MFU,
  ),
  "bench": (
    Option("only", "sections, with commas between", lambda text: tuple(text.split(",")) if text else ()),
    _sizes("sizes", 2, "batch sizes of the loss"),
    Option("data_dir", "TFDS folder with imagenet2012"),
    _number("rounds", int, lambda x: 1 <= x < 1e9, "a number from 1, such as 5", "of the medians"),
    _switch("gpu", "the sections for one accelerator"),
    _switch("small", "try the --gpu sections on a tiny network"),
    _sizes("batches", 2, "batch sizes of ResNet-50"),
    Option("npz", "CIFAR-10 in one file"),
    _number("epochs", float, lambda x: 0 <= x < 1e9, "a number from 0, such as 200", "of CIFAR-10"),
    _number("steps", int, lambda x: 0 <= x < 1e9, "a number from 0, such as 100", "of CIFAR-10"),
  ),
}
SHARED = tuple(Option(name, argparse.SUPPRESS) for name in ("config", "workdir", "coordinator", "processes", "process"))
# Commands that run no job, and their help.
OTHERS = {
  "configs": "lists the bundled experiments",
  "config": "prints a config, resolved: each key's value and meaning, with a star where it differs from the defaults",
}


class _Parser(argparse.ArgumentParser):
  def error(self, message: str) -> None:
    raise errors.UserError(f"{message}; see --help.")


def main(argv: list[str]) -> int:
  """Runs the command `argv` (without the program's name) and returns the exit code."""
  try:
    _run(argv)
    return 0
  except errors.UserError as error:
    print(f"simclr_jax: {error}", file=sys.stderr)
    return 2
  except KeyboardInterrupt:
    print("simclr_jax: interrupted; the same command starts again.", file=sys.stderr)
    return 130
  except BrokenPipeError:
    # The reader has closed the pipe, as `--help | head` does; Python would complain once more when it flushes.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0
  except Exception:
    traceback.print_exc()
    print(
      f"simclr_jax {simclr_jax.__version__}: this is a bug of ours; please report the lines above with your command.",
      file=sys.stderr,
    )
    return 1


def entry() -> None:
  """The console script."""
  sys.exit(main(sys.argv[1:]))


def _run(argv: list[str]) -> None:
  name, known = argv[0] if argv else "help", (*jobs.JOBS, *OTHERS)
  if name in ("--help", "-h", "help"):
    print(_parsers()[0].format_help())
  elif name == "--version":
    print(simclr_jax.__version__)
  elif name not in known:
    raise errors.UserError(f"unknown job {name!r}{errors.nearest(name, known)}; the jobs are {', '.join(jobs.JOBS)}.")
  elif "--help" in argv or "-h" in argv:
    print(_parsers()[1][name].format_help())
  else:
    options, overrides = parse(name, argv[1:])
    if name == "configs":
      print("\n".join(f"{stem:<20}{config_lib.summary(path)}" for stem, path in config_lib.bundled().items()))
    elif name == "config":
      given = options or overrides
      config = config_lib.load(options.get("config", ""), overrides) if given else config_lib.defaults()
      print(config_lib.described(config))
    else:
      _run_job(name, options, overrides)


def _run_job(name: str, options: dict[str, Any], overrides: dict[str, str]) -> None:
  shared = {option.name: options.pop(option.name) for option in SHARED if option.name in options}
  if "topology" in options or "gpu" in options:
    # The devices are described ones, or those of processes of their own: this process leaves them alone.
    jax.config.update("jax_platforms", "cpu")
  # Before a checkpoint's config is read, because that uses the devices.
  _join(shared)
  if name in jobs.WITHOUT_CONFIG and ("config" in shared or overrides):
    raise errors.UserError(f"{name} takes no --config; see --help.")
  if wrong := keys.unread(name, overrides):
    readers = ", ".join(job for job in keys.READ if not keys.unread(job, wrong[:1]))
    raise errors.UserError(f"{name} does not read config.{wrong[0]}; it is for {readers}. Leave it out.")
  config = None if name in jobs.WITHOUT_CONFIG else config_lib.load(shared.get("config", ""), overrides)
  workdir = shared.get("workdir") or DEFAULT_WORKDIR.get(name, "")
  if not workdir and "profile_input" not in options:
    raise errors.UserError(f"{name} has no --workdir; give the folder that its results should go to.")
  if config is not None and not shared.get("config") and jax.process_index() == 0:
    taken = config_lib.changed(config, overrides, name) or "the defaults"
    print(f"{name}: from the checkpoint: {taken}", file=sys.stderr)
  simclr_jax.run(name, config, workdir, **options)


def parse(name: str, args: list[str]) -> tuple[dict[str, Any], dict[str, str]]:
  """Returns (the options of a command that `args` give, by name; overrides of the config by dotted key).

  UserError: an argument is not of the form that the help shows.
  """
  overrides, rest = {}, []
  for arg in args:
    option, has_value, value = arg.partition("=")
    if option.startswith("--config."):
      # A bare --config.flag turns a flag on.
      overrides[option.removeprefix("--config.")] = value if has_value else "true"
    else:
      rest.append(arg)
  given, unknown = _parsers()[1][name].parse_known_args(rest)
  known = {option.name: option for option in (*SHARED, *OPTIONS.get(name, ()))}
  options = {}
  # Converted here and not by argparse, which has a message of its own for a mistake in a value.
  for option, text in vars(given).items():
    text = known[option].bare if text is None else text
    if text is None or option == "config" and not text:
      raise errors.UserError(f"option --{option} needs a value: --{option}=VALUE.")
    options[option] = known[option].convert(text)
  for arg in unknown:
    option = arg.removeprefix("--").partition("=")[0]
    if not arg.startswith("--"):
      raise errors.UserError(f"unexpected argument {arg!r}; options look like --name=value.")
    if option in keys.KEYS:
      raise errors.UserError(f"unknown option --{option}; keys of the config have a prefix: --config.{arg[2:]}.")
    raise errors.UserError(f"unknown option --{option}{errors.nearest(option, known)}; see --help.")
  return options, overrides


@functools.cache
def _parsers() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
  """Returns the parser of the command line, and that of each command by name."""
  formatter = functools.partial(argparse.RawDescriptionHelpFormatter, max_help_position=20, width=120)
  shared = {"epilog": f"options of all jobs:\n{USAGE}", "formatter_class": formatter, "add_help": False}
  usage = "simclr-jax JOB --config=NAME[:VARIANT] [--config.KEY=VALUE ...] --workdir=DIR"
  parser = _Parser(prog="simclr-jax", description="SimCLR in JAX.", usage=usage, **shared)
  commands = parser.add_subparsers(title="jobs", metavar="JOB")
  for name in (*jobs.JOBS, *OTHERS):
    doc = f"{name}: {OTHERS[name]}." if name in OTHERS else _doc(name)
    arguments = "" if name == "configs" else " --config=NAME[:VARIANT] [--config.KEY=VALUE ...]"
    arguments += "" if name in OTHERS else " --workdir=DIR"
    command = commands.add_parser(
      name,
      help=OTHERS.get(name) or doc.splitlines()[0].partition(": ")[2],
      description=doc,
      usage=f"simclr-jax {name}{arguments}",
      allow_abbrev=False,
      argument_default=argparse.SUPPRESS,
      **shared,
    )
    group = command.add_argument_group("options of this job")
    for option in (*OPTIONS.get(name, ()), *SHARED):
      group.add_argument(f"--{option.name}", nargs="?", help=option.help, metavar="VALUE")
  return parser, commands.choices


def _join(options: dict[str, str]) -> None:
  """Makes this process one of a run's several."""
  given = [name for name in ("coordinator", "processes", "process") if name in options]
  if options.get("processes") == "auto":
    jax.distributed.initialize()
  elif given:
    if len(given) < 3 or not (options["processes"].isdigit() and options["process"].isdigit()):
      raise errors.UserError(
        f"got only {', '.join('--' + name for name in given)}; a run of several processes needs "
        "--coordinator=HOST:PORT --processes=N --process=I with numbers, or --processes=auto."
      )
    count, index = int(options["processes"]), int(options["process"])
    if index >= count:
      raise errors.UserError(f"--process={index} is not below --processes={count}; count from 0.")
    jax.distributed.initialize(options["coordinator"], count, index)


def _doc(name: str) -> str:
  """Returns a job's docstring; it is not imported, so that help answers at once."""
  path = pathlib.Path(jobs.__file__).with_name(f"{name}.py")
  return textwrap.dedent(path.read_text().split('"""')[1]).strip()


if __name__ == "__main__":
  entry()
