"""The built-in data set: ten classes of shapes, drawn from a seed, several copies of one shape in every image."""

import numpy as np

CLASS_NAMES = ("disc", "ring", "square", "frame", "triangle", "star", "plus", "saltire", "crescent", "bars")

SPLITS = ("train", "test")
GRID = 3
CELLS = GRID * GRID
SHARE = 0.78
KNOTS = 4
STROKES = 6
BLOCK = 250
CELL_NUMBERS = 16
STROKE_NUMBERS = 8
NUMBERS = KNOTS * KNOTS * 3 + CELLS * CELL_NUMBERS + STROKES * STROKE_NUMBERS
RMIN, RMAX = 0.105, 0.165
ROT = 0.35


def draw(split, count, size, seed):
  stream = SPLITS.index(split)
  order = np.random.default_rng([seed, stream, 0]).random((-(-count // len(CLASS_NAMES)), len(CLASS_NAMES)))
  labels = np.argsort(order, axis=1).reshape(-1)[:count].astype(np.int32)
  numbers = np.random.default_rng([seed, stream, 1])  # filled row by row: image i owns row i
  images = np.empty((count, size, size, 3), np.uint8)
  for start in range(0, count, BLOCK):
    block = labels[start : start + BLOCK]
    images[start : start + BLOCK] = _draw_block(block, numbers.random((len(block), NUMBERS)), size)
  return images, labels


def _draw_block(labels, numbers, size):
  n = len(labels)
  numbers = numbers.astype(np.float32)
  a, b = KNOTS * KNOTS * 3, KNOTS * KNOTS * 3 + CELLS * CELL_NUMBERS
  canvas = _background(numbers[:, :a].reshape(n, KNOTS, KNOTS, 3), size)
  _strokes(canvas, numbers[:, b:].reshape(n, STROKES, STROKE_NUMBERS))
  cells = numbers[:, a:b].reshape(n, CELLS, CELL_NUMBERS)
  for label in range(len(CLASS_NAMES)):
    rows = np.flatnonzero(labels == label)
    if len(rows):
      part = canvas[rows]
      _copies(part, cells[rows], label)
      canvas[rows] = part
  return np.clip(canvas * 255 + 0.5, 0, 255).astype(np.uint8)


def _background(knots, size):
  t = (np.arange(size, dtype=np.float32) + 0.5) / size * (KNOTS - 1)
  w = np.clip(1 - np.abs(t[:, None] - np.arange(KNOTS, dtype=np.float32)), 0, 1)
  knots = 0.25 + 0.5 * knots
  return np.einsum("yk,nklc,xl->nyxc", w, knots, w, optimize=True)


def _strokes(canvas, numbers):
  n, size = canvas.shape[:2]
  y, x = np.meshgrid(*[(np.arange(size, dtype=np.float32) + 0.5) / size] * 2, indexing="ij")
  for k in range(STROKES):
    p = numbers[:, k, :, None, None]
    c, s = np.cos(p[:, 2] * np.pi), np.sin(p[:, 2] * np.pi)
    dx, dy = x - p[:, 0], y - p[:, 1]
    along, across = np.abs(c * dx + s * dy), np.abs(c * dy - s * dx)
    d = np.maximum(along - (0.03 + 0.12 * p[:, 3]), across - (0.012 + 0.012 * p[:, 4]))
    alpha = np.clip(0.5 - d * size, 0, 1)[..., None]
    canvas += alpha * (numbers[:, k, None, None, 5:8] - canvas)


def _colour(p):
  """Light or dark."""
  light = (p[:, 0] > 0.5)[:, None]
  return np.where(light, 1 - 0.45 * p[:, 1:4], 0.45 * p[:, 1:4]) .astype(np.float32)


def _copies(canvas, cells, label):
  n, size = canvas.shape[:2]
  y, x = np.meshgrid(*[(np.arange(size, dtype=np.float32) + 0.5) / size] * 2, indexing="ij")
  for k in range(CELLS):
    p = cells[:, k]
    q = p[:, :, None, None]
    radius = (RMIN + (RMAX - RMIN) * q[:, 2]) * SCALE[label]
    cx = (k % GRID + 0.5 + 0.5 * (q[:, 0] - 0.5)) / GRID
    cy = (k // GRID + 0.5 + 0.5 * (q[:, 1] - 0.5)) / GRID
    angle = ROT * (2 * q[:, 3] - 1)
    c, s = np.cos(angle) / radius, np.sin(angle) / radius
    dx, dy = x - cx, y - cy
    u, v = c * dx + s * dy, c * dy - s * dx
    present = (p[:, 4] < SHARE) | (k == CELLS // 2)
    distance = SHAPES[label](u, v) * radius * size
    alpha = np.clip(0.5 - distance, 0, 1) * present[:, None, None]
    colour = _colour(p[:, 5:9])
    # fill texture: a wave in brightness
    freq, phase = 2 + 4 * q[:, 9], 2 * np.pi * q[:, 10]
    c, s = np.cos(q[:, 11] * np.pi) * freq, np.sin(q[:, 11] * np.pi) * freq
    wave = 0.22 * q[:, 12] * np.sin(c * u + s * v + phase)
    fill = colour[:, None, None] + wave[..., None]
    canvas += alpha[..., None] * (fill - canvas)


def _disc(u, v):
  return np.sqrt(u * u + v * v) - 0.85

def _ring(u, v):
  return np.abs(np.sqrt(u * u + v * v) - 0.75) - 0.23

def _square(u, v):
  return np.maximum(np.abs(u), np.abs(v)) - 0.76

def _frame(u, v):
  return np.abs(np.maximum(np.abs(u), np.abs(v)) - 0.68) - 0.19

def _triangle(u, v):
  return np.maximum(v, 0.8660254 * np.abs(u) - 0.5 * v) - 0.58

def _star(u, v):
  r = np.sqrt(u * u + v * v)
  a = np.arctan2(u, -v)
  w = 2 * np.pi / 5
  a = np.abs(a - w * np.round(a / w))
  tip = 1.15
  ix, iy = 0.55 * np.cos(w / 2), 0.55 * np.sin(w / 2)
  nx, ny = iy, tip - ix
  norm = np.hypot(nx, ny)
  nx, ny = np.float32(nx / norm), np.float32(ny / norm)
  return r * (nx * np.cos(a) + ny * np.sin(a)) - nx * np.float32(tip)

def _plus(u, v):
  u, v = np.abs(u), np.abs(v)
  return np.maximum(np.minimum(u, v) - 0.33, np.maximum(u, v) - 0.95)

def _saltire(u, v):
  h = np.float32(0.70710678)
  return _plus(h * (u + v), h * (u - v))

def _crescent(u, v):
  outer = np.sqrt(u * u + v * v) - 1.0
  return np.maximum(outer, 0.8 - np.sqrt((u - 0.55) ** 2 + v * v))

def _bars(u, v):
  return np.maximum(np.abs(np.abs(v) - 0.55) - 0.28, np.abs(u) - 0.9)

SHAPES = (_disc, _ring, _square, _frame, _triangle, _star, _plus, _saltire, _crescent, _bars)


def _areas():
  g = (np.arange(400, dtype=np.float32) + 0.5) / 400 * 2.6 - 1.3
  v, u = np.meshgrid(g, g, indexing="ij")
  return np.array([(f(u, v) < 0).mean() * 2.6**2 for f in SHAPES])


SCALE = np.sqrt(2.0 / _areas()).astype(np.float32)
