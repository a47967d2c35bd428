"""The parameters of the random augmentation, shared by its implementations on the host and on the devices."""

import dataclasses
import itertools

import numpy as np

from simclr_jax import errors

LUMA = (0.2989, 0.5870, 0.1140)
ORDERS = np.array(list(itertools.permutations(range(4))), np.int32)  # i32[24, 4], orders of the colour operations
BRIGHTNESS = ("multiplicative", "additive")  # SimCLR v2 and v1
LARGEST_STRENGTH = 1.25  # above it the smallest contrast factor, 1 - 0.8 strength, is negative
MIN_COVERED = 0.1  # smallest crop as a share of the image, whatever `min_area` is
ATTEMPTS = 100  # random crops tried before the whole image is taken
SMALL_IMAGE = 32  # pixels; up to this size the evaluation takes an image of the network's size uncropped
RESIZES = ("bicubic", "bilinear")  # interpolation of the host's crops; the reference uses bicubic
EVALUATION_SHARE = 0.875  # side of the evaluation's centre crop as a share of the image's shorter side


@dataclasses.dataclass(frozen=True)
class Distortion:
  """The parameters of a random view: crop, flip, colour jitter, grayscale and blur (Chen et al. 2020, appendix A).

  A `color_strength`, `brightness` or `resize` that is not possible is a UserError.
  """

  size: int  # height and width of the view in pixels
  min_area: float = 0.08  # of the crop as a share of the image
  max_area: float = 1.0
  aspect: tuple[float, float] = (3 / 4, 4 / 3)  # range of the crop's width / height
  flip: bool = True  # whether a view is mirrored left to right with probability 0.5
  resize: str = "bicubic"  # one of RESIZES, for the crops that the host makes for the devices; all others are bicubic
  color_strength: float = 1.0  # s of the paper: factors of up to 1 + 0.8 s, hue shifts of up to 0.2 s turns
  brightness: str = "multiplicative"  # one of BRIGHTNESS
  color_probability: float = 0.8
  grayscale_probability: float = 0.2
  blur_probability: float = 0.5
  blur_sigma: tuple[float, float] = (0.1, 2.0)  # range of the blur's standard deviation in pixels

  def __post_init__(self):
    if not 0.0 <= self.color_strength <= LARGEST_STRENGTH:
      raise errors.UserError(
        f"color_strength {self.color_strength} is outside 0 to {LARGEST_STRENGTH}, above which contrast factors "
        f"would be negative; use at most {LARGEST_STRENGTH}."
      )
    for kind, name, known in (("brightness", self.brightness, BRIGHTNESS), ("resize", self.resize, RESIZES)):
      if name not in known:
        raise errors.UserError(f'unknown {kind} "{name}"; use one of {", ".join(known)}{errors.nearest(name, known)}')

  @property
  def area(self) -> tuple[float, float]:
    """The range of the crop's area as a share of the image's."""
    return self.min_area, self.max_area

  @property
  def additive(self) -> bool:
    """Whether the brightness factor is added rather than multiplied."""
    return self.brightness == "additive"

  @property
  def color_ranges(self) -> list[tuple[float, float]]:
    """The ranges (low, high) of the factors of brightness, contrast, saturation and hue."""
    spread, turn = 0.8 * self.color_strength, 0.2 * self.color_strength
    bright = (-spread, spread) if self.additive else (max(0.0, 1.0 - spread), 1.0 + spread)
    return [bright, (1.0 - spread, 1.0 + spread), (1.0 - spread, 1.0 + spread), (-turn, turn)]
