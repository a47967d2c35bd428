"""The law of the augmentation, the same on host and device: constants, ranges and what is refused."""

import itertools

import numpy as np

from simclr_jax import errors

LUMA = (0.2989, 0.5870, 0.1140)
ORDERS = np.array(list(itertools.permutations(range(4))), np.int32)  # of the four colour operations
BRIGHTNESS = ("multiplicative", "additive")  # SimCLR v2 and v1
LARGEST_STRENGTH = 1.25  # above it 1 - 0.8 strength, the smallest contrast factor, is negative
MIN_COVERED = 0.1  # of the image: no crop is smaller, whatever the range of areas
ATTEMPTS = 100  # at a crop in the ranges, before the whole image is taken
SMALL_IMAGE = 32  # up to this size the evaluation neither crops nor resizes
RESIZES = ("bicubic", "bilinear")  # of the host's crops; the reference's is bicubic
EVALUATION_SHARE = 0.875  # of the shorter side


def color_ranges(strength: float, additive: bool) -> list[tuple[float, float]]:
  """Returns the ranges of the factors of brightness, contrast, saturation and hue."""
  spread, turn = 0.8 * strength, 0.2 * strength
  least = max(0.0, 1.0 - spread)
  ranges = [(-spread, spread) if additive else (least, 1.0 + spread)]
  return ranges + [(1.0 - spread, 1.0 + spread)] * 2 + [(-turn, turn)]


def check_color(color_strength: float, brightness: str) -> None:
  """Raises a UserError for a strength or an implementation of brightness that has no meaning."""
  if not 0.0 <= color_strength <= LARGEST_STRENGTH:
    raise errors.UserError(
      f"color_strength {color_strength} is outside 0 to {LARGEST_STRENGTH}, above which contrast factors "
      f"would be negative; use at most {LARGEST_STRENGTH}."
    )
  if brightness not in BRIGHTNESS:
    raise errors.UserError(
      f'unknown brightness "{brightness}"; use one of {", ".join(BRIGHTNESS)}{errors.nearest(brightness, BRIGHTNESS)}'
    )
