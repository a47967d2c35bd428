"""The built-in data set: ten classes of shapes, drawn from a seed, with several copies of one shape in each image."""

import numpy as np

from simclr_jax import errors
from simclr_jax.data import arrays, distortion
from simclr_jax.data import source as source_lib

SPLITS = ("train", "test")
SMALLEST = 16  # height and width in pixels below which a person cannot tell the shapes apart

# Lengths are relative to the image's side, colours are in [0, 1].
COPIES = 4  # places for copies of the shape: a jittered grid of two by two
SHARE = 0.9  # probability that a place holds a copy
RADIUS = (0.165, 0.225)  # range, before the shapes are scaled to equal areas
JITTER = 0.15
TURN = 0.3  # radians, largest rotation either way; a plus rotated by 0.79 is a saltire
# Luma of shapes and of grounds. It is the same for all images, so that brightness does not give the class away.
INK = 0.8
GROUND = 0.35
LUMA = np.array(distortion.LUMA, np.float32)
WAVE = 0.12  # largest amplitude of luma in a copy's texture
KNOTS = 6  # the ground's colours are interpolated from a grid of 6 by 6
STROKES = 4
SECTIONS = np.cumsum([KNOTS * KNOTS * 3, STROKES * 8, 2])  # ends of the groups of one image's random numbers
NUMBERS = int(SECTIONS[-1]) + COPIES * 12
BLOCK = 250  # images drawn at once, so that the working arrays fit in the processor's cache


def _plus(u, v):
  u, v = np.abs(u), np.abs(v)
  return np.maximum(np.minimum(u, v) - 0.33, np.maximum(u, v) - 0.95)


def _star(u, v):
  tip, notch, sector = 1.15, 0.55, 2 * np.pi / 5
  angle = np.arctan2(u, -v)
  angle = np.abs(angle - sector * np.round(angle / sector))  # from the nearest tip
  edge = np.array([notch * np.sin(sector / 2), tip - notch * np.cos(sector / 2)])
  across, along = (edge[::-1] / np.hypot(*edge)).astype(np.float32)[::-1]
  return np.sqrt(u * u + v * v) * (across * np.cos(angle) + along * np.sin(angle)) - across * np.float32(tip)


# Class -> (u, v) -> signed distance from the shape's edge, negative inside, in units of its radius. y points down.
SHAPES = {
  "disc": lambda u, v: np.sqrt(u * u + v * v) - 0.85,
  "ring": lambda u, v: np.abs(np.sqrt(u * u + v * v) - 0.75) - 0.23,
  "square": lambda u, v: np.maximum(np.abs(u), np.abs(v)) - 0.76,
  "frame": lambda u, v: np.abs(np.maximum(np.abs(u), np.abs(v)) - 0.68) - 0.19,
  "triangle": lambda u, v: np.maximum(v, 0.866 * np.abs(u) - 0.5 * v) - 0.58,
  "star": _star,
  "plus": _plus,
  "saltire": lambda u, v: _plus(0.7071 * (u + v), 0.7071 * (u - v)),
  "crescent": lambda u, v: np.maximum(np.sqrt(u * u + v * v) - 1, 0.8 - np.sqrt((u - 0.55) ** 2 + v * v)),
  "bars": lambda u, v: np.maximum(np.abs(np.abs(v) - 0.55) - 0.28, np.abs(u) - 0.9),
}
CLASS_NAMES, DISTANCES = tuple(SHAPES), tuple(SHAPES.values())


def _even_scales():
  """Returns the factors, f32[10], that give all shapes an area of 2 at radius 1."""
  side = np.linspace(-1.3, 1.3, 400, dtype=np.float32)
  areas = np.array([2.6**2 * np.mean(distance(side[None, :], side[:, None]) < 0) for distance in DISTANCES])
  return np.sqrt(2 / areas).astype(np.float32)


EVEN = _even_scales()


def open(request: source_lib.Request) -> arrays.Arrays:
  """Returns `request.num_examples` images of a split, of `request.image_size` pixels, drawn from `request.seed`."""
  if request.num_examples < 1:
    raise errors.UserError(f"{request.num_examples} shapes asked for; set the number of examples to at least 1.")
  images, labels = draw(request.split, request.num_examples, request.image_size, request.seed)
  return arrays.Arrays(f"shapes ({request.split})", images, labels, CLASS_NAMES)


def split_names(request: source_lib.Request) -> tuple[str, ...]:
  """Returns the names of the splits."""
  del request
  return SPLITS


def draw(split: str, count: int, size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns the first `count` images of a split, u8[count, size, size, 3], and their classes, i32[count].

  Image i is a function of the split, i, `size` and `seed` alone. Every ten images, counted from the first, hold each
  class once. An image shows several copies of its shape, each with its own colour, texture, scale, place and rotation,
  so that two crops share the shape and little else. Everything else has the same distribution for all classes: the mean
  area of a shape, the luma of shapes and grounds, and, because the grid of copies is shifted at random across periodic
  edges, the distribution of every pixel. No such split, or a number that is too small, is a UserError.
  """
  if split not in SPLITS:
    raise errors.UserError(
      f'the shapes have no split "{split}"; their splits: {", ".join(SPLITS)}{errors.nearest(split, SPLITS)}'
    )
  if count < 0 or seed < 0 or size < SMALLEST:
    raise errors.UserError(
      f"{count} shapes of {size} pixels from seed {seed}; set a count and a seed of at least 0,"
      f" and a size of at least {SMALLEST}."
    )
  classes = len(CLASS_NAMES)
  deals = np.random.default_rng([seed, SPLITS.index(split), 0]).random((-(-count // classes), classes))
  labels = deals.argsort(axis=1).reshape(-1)[:count].astype(np.int32)
  rng = np.random.default_rng([seed, SPLITS.index(split), 1])  # drawn row by row: image i has row i of the numbers
  images = np.empty((count, size, size, 3), np.uint8)
  for start in range(0, count, BLOCK):
    block = slice(start, min(start + BLOCK, count))
    images[block] = _draw_block(labels[block], rng.random((block.stop - start, NUMBERS)), size)
  return images, labels


def _draw_block(labels, numbers, size):
  """labels i32[n], numbers f64[n, NUMBERS] in [0, 1) -> u8[n, size, size, 3]."""
  n = len(labels)
  knots, strokes, shift, copies = np.split(numbers.astype(np.float32), SECTIONS, axis=1)
  canvas = _ground(knots.reshape(n, KNOTS, KNOTS, 3), size)
  for stroke in np.split(strokes, STROKES, axis=1):
    _paint_stroke(canvas, stroke)
  copies = copies.reshape(n, COPIES, -1)
  # The place with the smallest number always holds a copy, so that no image is without its shape.
  present = copies[..., 0] <= np.maximum(SHARE, copies[..., 0].min(axis=1, keepdims=True))
  for label, distance in enumerate(DISTANCES):
    rows = np.flatnonzero(labels == label)
    part = canvas[rows]
    for place in range(COPIES):
      _paint_copy(part, distance, EVEN[label], place, present[rows, place], shift[rows], copies[rows, place])
    canvas[rows] = part
  return np.clip(255 * canvas + 0.5, 0, 255).astype(np.uint8)


def _ground(knots, size):
  """Blends the knots' colours linearly: f32[n, K, K, 3] -> f32[n, size, size, 3] of even luma."""
  n = len(knots)
  position = (np.arange(size, dtype=np.float32) + 0.5) / size * (KNOTS - 1)
  weights = np.clip(1 - np.abs(position[:, None] - np.arange(KNOTS, dtype=np.float32)), 0, 1)
  tinted = GROUND + 0.5 * _chroma(knots)
  columns = (weights @ tinted.reshape(n, KNOTS, KNOTS * 3)).reshape(n, size, KNOTS, 3)
  return weights @ columns


def _chroma(colour):
  return colour - (colour * LUMA).sum(axis=-1, keepdims=True)


def _paint_stroke(canvas, numbers):
  """Paints clutter, a short line of any colour from f32[n, 8], on f32[n, size, size, 3]."""
  size = canvas.shape[1]
  x, y, turn, length, width = numbers[:, :5].T[..., None, None]
  u, v = _local(size, x, y, np.pi * turn)
  distance = np.maximum(np.abs(u) - 0.03 - 0.12 * length, np.abs(v) - 0.012 - 0.012 * width)
  _blend(canvas, distance, numbers[:, None, None, 5:])


def _paint_copy(canvas, distance, even, place, present, shift, numbers):
  """Paints one copy of a shape, from f32[n, 12], where `present`, bool[n], on f32[n, size, size, 3]."""
  size = canvas.shape[1]
  _, x, y, scale, turn, frequency, phase, course, depth = numbers[:, :9].T[..., None, None]
  radius = even * (RADIUS[0] + (RADIUS[1] - RADIUS[0]) * scale)
  across, down = shift.T[..., None, None]
  x = across + 0.5 * (place % 2) + JITTER * (2 * x - 1)
  y = down + 0.5 * (place // 2) + JITTER * (2 * y - 1)
  u, v = _local(size, x, y, TURN * (2 * turn - 1))
  u, v = u / radius, v / radius
  wave = np.sin((2 + 4 * frequency) * (np.cos(np.pi * course) * u + np.sin(np.pi * course) * v) + 2 * np.pi * phase)
  fill = INK + 0.5 * _chroma(numbers[:, None, None, 9:]) + (WAVE * depth * wave)[..., None]
  _blend(canvas, np.where(present[:, None, None], radius * distance(u, v), 1), fill)


def _local(size, x, y, turn):
  """Returns the pixels' coordinates, f32[n, size, size] each, relative to (x, y), with periodic edges, and rotated."""
  pixel = (np.arange(size, dtype=np.float32) + 0.5) / size
  dx, dy = pixel[None, None, :] - x, pixel[None, :, None] - y
  dx, dy = dx - np.round(dx), dy - np.round(dy)
  cos, sin = np.cos(turn), np.sin(turn)
  return cos * dx + sin * dy, cos * dy - sin * dx


def _blend(canvas, distance, colour):
  """Paints the pixels of negative distance, with an antialiased edge one pixel wide."""
  cover = np.clip(0.5 - canvas.shape[1] * distance, 0, 1)[..., None]
  canvas += cover * (colour - canvas)
