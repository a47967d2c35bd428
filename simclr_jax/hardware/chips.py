"""Data of accelerators: memory, peak FLOP/s and memory bandwidth, each with its source."""

import dataclasses
from collections.abc import Sequence

import jax

from simclr_jax import errors

_TPU = "docs.cloud.google.com/tpu/docs"
_NVIDIA = "nvidia.com, data sheet"


@dataclasses.dataclass(frozen=True)
class Chip:
  """One chip, with the figures that its maker publishes."""

  name: str
  memory: float  # Bytes of high-bandwidth memory.
  flops: float  # Peak dense FLOP/s of matrix products in bfloat16 (V100: float16) with float32 accumulation.
  bandwidth: float  # Of the memory, in bytes/s.
  source: str  # Of these figures.
  devices: int = 1  # JAX devices per chip.


GIB, TERA, GIGA = 2**30, 1e12, 1e9

# By JAX's `device_kind`; peaks without sparsity.
CHIPS: dict[str, Chip] = {
  "TPU v2": Chip("TPU v2", 16 * GIB, 45 * TERA, 700 * GIGA, "Norrie et al. 2021, IEEE Micro 41(2), table 1", 2),
  "TPU v3": Chip("TPU v3", 32 * GIB, 123 * TERA, 900 * GIGA, f"{_TPU}/v3", 2),
  "TPU v4": Chip("TPU v4", 32 * GIB, 275 * TERA, 1200 * GIGA, f"{_TPU}/v4"),
  "TPU v5 lite": Chip("TPU v5e", 16 * GIB, 197 * TERA, 819 * GIGA, f"{_TPU}/v5e"),
  "TPU v5": Chip("TPU v5p", 95 * GIB, 459 * TERA, 2765 * GIGA, f"{_TPU}/v5p"),
  "TPU v6 lite": Chip("TPU v6e", 32 * GIB, 918 * TERA, 1638 * GIGA, f"{_TPU}/v6e"),
  "TPU7x": Chip("TPU7x", 192 * GIB, 2307 * TERA, 7380 * GIGA, f"{_TPU}/tpu7x", 2),
  "Tesla V100-SXM2-16GB": Chip("V100 16 GB", 16 * GIB, 125 * TERA, 900 * GIGA, _NVIDIA),
  "Tesla V100-SXM2-32GB": Chip("V100 32 GB", 32 * GIB, 125 * TERA, 900 * GIGA, _NVIDIA),
  "NVIDIA A100-SXM4-40GB": Chip("A100 40 GB", 40 * GIB, 312 * TERA, 1555 * GIGA, _NVIDIA),
  "NVIDIA A100-SXM4-80GB": Chip("A100 80 GB", 80 * GIB, 312 * TERA, 2039 * GIGA, _NVIDIA),
  "NVIDIA H100 80GB HBM3": Chip("H100", 80 * GIB, 989 * TERA, 3350 * GIGA, _NVIDIA),
  "NVIDIA H200": Chip("H200", 141 * GIB, 989 * TERA, 4800 * GIGA, _NVIDIA),
}


def chip_of(device: jax.Device) -> Chip | None:
  """Returns the chip that `device` belongs to; None for a CPU or an unknown chip."""
  return CHIPS.get(device.device_kind)


def peak_of(devices: Sequence[jax.Device]) -> float:
  """Returns the peak FLOP/s of all devices together, which are of one kind; 0 if it is unknown."""
  chip = chip_of(devices[0]) if devices else None
  return len(devices) * chip.flops / chip.devices if chip else 0.0


def named(name: str) -> Chip:
  """Returns the only chip (else a UserError) whose name begins like this, or is it: `v5e`, `TPU v3`, `h100`."""
  plain = lambda text: text.lower().removeprefix("tpu").replace(" ", "")
  found = [chip for chip in CHIPS.values() if plain(chip.name).startswith(plain(name))] if name else []
  exact = [chip for chip in found if plain(chip.name) == plain(name)]
  if len(exact or found) != 1:
    known = [chip.name for chip in CHIPS.values()]
    hint = errors.nearest(plain(name), [plain(chip) for chip in known])
    raise errors.UserError(f"unknown chip {name!r}{hint}; use one of {', '.join(known)}.")
  return (exact or found)[0]
