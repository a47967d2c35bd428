"""The sections of the job `bench` by the options of its command line, and their record."""

import dataclasses
import os
from typing import Any

from etils import epath

from benchmarks import accelerator, cifar, host_input, loss, measure, resident, step
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
  rounds = given.rounds
  batches = given.batches or ((8,) if given.small else accelerator.BATCHES)
  length = {"epochs": given.epochs, "steps": given.steps, "small": given.small}
  sections = {
    "loss": lambda: loss.run(given.sizes or SIZES),
    "input": lambda: host_input.run(given.data_dir, rounds),
    "step": lambda: step.run(rounds=rounds),
    "resident": lambda: resident.run(rounds=rounds),
    "resnet50": lambda: accelerator.run(data_dir=given.data_dir, batches=batches, rounds=rounds, small=given.small),
    "cifar": lambda: cifar.run(workdir, npz=given.npz, **length),
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


def _command(given: Options) -> str:
  """Returns the command line that gives these options."""
  as_text = lambda value: ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
  changed = {name: value for name, value in vars(given).items() if value != getattr(Options, name)}
  options = [f"--{name}" if value is True else f"--{name}={as_text(value)}" for name, value in changed.items()]
  return " ".join(["python -m simclr_jax bench", *options])
