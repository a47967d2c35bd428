"""bench: how fast the loss, the input and the step are on this machine, as ratios to the alternatives in the same run.

Needs no --config. Sections, of which --only=loss,step chooses:

  loss      NT-Xent by batch size N (--sizes=1024,2048), time and memory: dense, blockwise, optax's and lightly's
  input     JPEGs to pairs of views at 224 on the host; --data_dir=DIR has TFDS's imagenet2012 (else images made here)
  step      a step of ResNet-18 on small images: ours, plain Flax layers, PyTorch
  resident  what input and augmentation take of a step on data that is on the devices

--gpu measures instead, on one accelerator:

  resnet50  views/s and MFU at 224 in bfloat16 against PyTorch; --data_dir=DIR for real images; --batches=256,128
  cifar     --npz=FILE: 200 epochs of CIFAR-10 (--epochs, --steps), the wall clock, kNN and linear accuracy

Figures are medians of --rounds=5. PyTorch and lightly take part where they are installed (`pip install -e ".[bench]"`).
--small tries the --gpu sections on a tiny network, on any machine, and is not recorded. Writes DIR/bench.json, and a
line to results/bench.jsonl of a checkout.
"""

import json
import os

from etils import epath

from benchmarks import accelerator, cifar, host_input, loss, measure, resident, step
from simclr_jax import errors

SIZES = "1024,2048,4096,8192,16384,32768,65536"
SECTIONS = ("loss", "input", "step", "resident")
GPU_SECTIONS = ("resnet50", "cifar")
# What stands for the accelerator's batches where the network is a tiny one.
SMALL_BATCHES = "8"


def run(
  workdir: str,
  *,
  only: str = "",
  sizes: str = SIZES,
  data_dir: str = "",
  rounds: str = str(measure.ROUNDS),
  gpu: str = "",
  small: str = "",
  batches: str = "",
  npz: str = "",
  epochs: str = "200",
  steps: str = "0",
) -> dict:
  """Prints the sections and returns what `workdir`/bench.json holds: the circumstances, each section, the headlines."""
  given = {name: value for name, value in locals().items() if name != "workdir"}
  known = GPU_SECTIONS if gpu else SECTIONS
  names = only.split(",") if only else known
  for name in names:
    if name not in known:
      raise errors.UserError(
        f"--only={only}: no section {name!r}{errors.nearest(name, known)}; use {', '.join(known)}."
      )
  for option, path, is_there in (("data_dir", data_dir, os.path.isdir), ("npz", npz, os.path.isfile)):
    if path and not is_there(path):
      raise errors.UserError(f"--{option}={path} does not exist; give one that does, or leave it out.")
  if small and not gpu:
    raise errors.UserError("--small is for --gpu; the other sections have --rounds, and --sizes for the loss.")
  count = int(_number("rounds", rounds, least=1))
  n = loss.parsed(sizes)
  batch_sizes = _batches(batches or (SMALL_BATCHES if small else accelerator.BATCHES))
  tiny = {"small": bool(small)}
  length = {"epochs": _number("epochs", epochs, least=0), "steps": int(_number("steps", steps, least=0))}
  sections = {
    "loss": lambda: loss.run(n),
    "input": lambda: host_input.run(data_dir, count),
    "step": lambda: step.run(rounds=count),
    "resident": lambda: resident.run(rounds=count),
    "resnet50": lambda: accelerator.run(data_dir=data_dir, batches=batch_sizes, rounds=count, **tiny),
    "cifar": lambda: cifar.run(workdir, npz=npz, **length, **tiny),
  }
  result = measure.circumstances(_command(given))
  machine = f"{result['machine']['cores']} cores of {result['machine']['cpu']}"
  measure.say(f"{result['device']}, {machine}, jax {result['jax']}, commit {result['commit']}")
  path = epath.Path(workdir) / "bench.json"
  path.parent.mkdir(parents=True, exist_ok=True)
  result |= {"headline": {}, "sections": {}}
  for name in names:
    measure.say(f"\n{name}\n")
    section = sections[name]()
    result["headline"] |= {name: section.get("headline", {})}
    result["sections"] |= {name: section}
    # After each, because what follows may take hours.
    path.write_text(json.dumps(result, indent=2) + "\n")
  # What was only tried is no result.
  line = None if small else measure.record({key: value for key, value in result.items() if key != "sections"})
  measure.say(f"\n{path}" + (f"\n{line}" if line else ""))
  return result


def _command(given: dict[str, str]) -> str:
  """Returns the command line that gives these options."""
  defaults = run.__kwdefaults__
  options = [f"--{name}={value}" for name, value in given.items() if value != defaults[name]]
  options = [option.removesuffix("=true") for option in options]
  return " ".join(["python -m simclr_jax bench", *options])


def _number(option: str, text: str, *, least: float) -> float:
  try:
    value = float(text)
  except ValueError:
    value = -1.0
  if not least <= value < 1e9:
    raise errors.UserError(f"--{option}={text} is not a number from {least:g}; give one, such as --{option}=5.")
  return value


def _batches(text: str) -> list[int]:
  parts = text.split(",")
  if not all(part.isdecimal() and int(part) > 1 for part in parts):
    raise errors.UserError(f"--batches={text} is not a list of batch sizes; give numbers from 2, such as 256,128.")
  return [int(part) for part in parts]
