"""Numbers of a run that a folder's images suggest: size, batch and length."""

import collections
import dataclasses
from collections.abc import Sequence

from etils import epath
from PIL import Image

from simclr_jax import errors

# Files whose headers are read; they are spread over the whole folder.
SAMPLE = 200
# Sides that are chosen from: whole numbers of the encoder's strides.
SIDES = (64, 96, 128, 160, 192, 224)
# A batch is at most a tenth of the images, so that they meet other negatives, and not below this without need.
STEPS_OF_EPOCH, LEAST_BATCH = 10, 64
LEAST_EPOCHS = 10


@dataclasses.dataclass(frozen=True)
class Limits:
  """What is chosen stays within these."""

  image_size: int
  batch_size: int
  epochs: int
  images_seen: int  # Images times epochs.


def sizes(paths: Sequence[str]) -> list[tuple[int, int]]:
  """Returns (width, height) of at most SAMPLE evenly spaced image files, by their headers; unreadable ones are skipped.

  UserError: none can be read.
  """
  spread = [paths[number * len(paths) // SAMPLE] for number in range(SAMPLE)] if len(paths) > SAMPLE else paths
  found = []
  for path in spread:
    try:
      with epath.Path(path).open("rb") as file, Image.open(file) as image:
        found.append(image.size)
    except (OSError, SyntaxError):  # Pillow's way to say that a PNG is broken.
      continue
  if not found:
    raise errors.UserError("the sizes of the images cannot be read; set --config.data.image_size, such as 96.")
  return found


def commonest(found: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], bool]:
  """Returns the commonest (width, height), and whether it is that of more than half of the images."""
  ((size, count),) = collections.Counter(found).most_common(1)
  return size, 2 * count > len(found)


def image_size(found: Sequence[tuple[int, int]], limits: Limits) -> int:
  """Returns the largest of SIDES up to the limit that half of the images have pixels for, or the smallest one."""
  sides = sorted(min(size) for size in found)
  most = min(sides[len(sides) // 2], limits.image_size)
  return max((side for side in SIDES if side <= most), default=min(SIDES[0], limits.image_size))


def batch_size(examples: int, limits: Limits) -> int:
  """Returns a power of two up to the limit."""
  power = lambda number: 1 << (number.bit_length() - 1)
  wanted = max(examples // STEPS_OF_EPOCH, min(LEAST_BATCH, examples), 1)
  return power(min(wanted, limits.batch_size))


def epochs(examples: int, limits: Limits) -> float:
  """Returns a whole number of epochs: as many as the images to be seen allow, within LEAST_EPOCHS and the limit."""
  return float(min(max(limits.images_seen // examples, LEAST_EPOCHS), limits.epochs))
