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

import dataclasses
import importlib
import os
from typing import Any

from etils import epath

from simclr_jax import errors, files
from simclr_jax.version import __version__

SIZES = (1024, 2048, 4096, 8192, 16384, 32768, 65536)
SECTIONS = ("loss", "input", "step", "resident")
GPU_SECTIONS = ("resnet50", "cifar")


@dataclasses.dataclass(frozen=True)
class Options:
  """The options of the command line."""

  only: tuple[str, ...] = ()
  sizes: tuple[int, ...] = SIZES
  data_dir: str = ""
  rounds: int = 5
  gpu: bool = False
  small: bool = False
  batches: tuple[int, ...] = ()
  npz: str = ""
  epochs: float = 200.0
  steps: int = 0


def run(workdir: str, **options: Any) -> dict[str, Any]:
  """Prints the sections and returns what `workdir`/bench.json holds: the circumstances, each section, the headlines."""
  given = Options(**options)
  known = GPU_SECTIONS if given.gpu else SECTIONS
  for name in given.only:
    if name not in known:
      raise errors.UserError(
        f"--only={','.join(given.only)}: no section {name!r}{errors.nearest(name, known)}; use {', '.join(known)}."
      )
  for option, path, is_there in (("data_dir", given.data_dir, os.path.isdir), ("npz", given.npz, os.path.isfile)):
    if path and not is_there(path):
      raise errors.UserError(f"--{option}={path} does not exist; give one that does, or leave it out.")
  if given.small and not given.gpu:
    raise errors.UserError("--small is for --gpu; the other sections have --rounds, and --sizes for the loss.")
  measure, accelerator, rounds = _module("measure"), _module("accelerator"), given.rounds
  batches = given.batches or ((8,) if given.small else accelerator.BATCHES)
  length = {"epochs": given.epochs, "steps": given.steps, "small": given.small}
  sections = {
    "loss": lambda: _module("loss").run(given.sizes or SIZES),
    "input": lambda: _module("host_input").run(given.data_dir, rounds),
    "step": lambda: _module("step").run(rounds=rounds),
    "resident": lambda: _module("resident").run(rounds=rounds),
    "resnet50": lambda: accelerator.run(data_dir=given.data_dir, batches=batches, rounds=rounds, small=given.small),
    "cifar": lambda: _module("cifar").run(workdir, npz=given.npz, **length),
  }
  result = measure.circumstances(_command(given)) | {"version": __version__}
  machine = f"{result['machine']['cores']} cores of {result['machine']['cpu']}"
  measure.say(f"{result['device']}, {machine}, jax {result['jax']}, commit {result['commit']}")
  path = epath.Path(workdir) / "bench.json"
  result |= {"headline": {}, "sections": {}}
  for name in given.only or known:
    measure.say(f"\n{name}\n")
    section = sections[name]()
    result["headline"] |= {name: section.get("headline", {})}
    result["sections"] |= {name: section}
    # After each, because what follows may take hours.
    files.write_json(path, result)
  # A trial on a tiny network is no result.
  line = None if given.small else measure.record({key: value for key, value in result.items() if key != "sections"})
  measure.say(f"\n{path}" + (f"\n{line}" if line else ""))
  return result


def _module(name: str) -> Any:
  try:
    return importlib.import_module(f"benchmarks.{name}")
  except ModuleNotFoundError as error:
    if error.name not in ("benchmarks", f"benchmarks.{name}"):
      raise
    raise errors.UserError(
      "bench measures with the folder benchmarks/ of a checkout, which an installed package does not have; clone the "
      "repository and run `pip install -e .` there."
    ) from None


def _command(given: Options) -> str:
  """Returns the command line that gives these options."""
  as_text = lambda value: ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
  changed = {name: value for name, value in vars(given).items() if value != getattr(Options, name)}
  options = [f"--{name}" if value is True else f"--{name}={as_text(value)}" for name, value in changed.items()]
  return " ".join(["python -m simclr_jax bench", *options])
