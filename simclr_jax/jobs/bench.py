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

import importlib
from typing import Any

from simclr_jax import errors


def run(workdir: str, **options: Any) -> dict[str, Any]:
  """Prints the sections and returns what `workdir`/bench.json holds: the circumstances, each section, the headlines."""
  try:
    command = importlib.import_module("benchmarks.command")
  except ModuleNotFoundError as error:
    if error.name not in ("benchmarks", "benchmarks.command"):
      raise
    raise errors.UserError(
      "bench measures with the folder benchmarks/ of a checkout, which an installed package does not have; clone the "
      "repository and run `pip install -e .` there."
    ) from None
  return command.run(workdir, **options)
