"""Convolution in float64 that compiles and runs faster than ours, for tests whose subject is something else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from simclr_jax.models import layers

# The matrices of Winograd's F(4x4, 3x3): Lavin and Gray 2016, section 4.3. A transform of both axes is one product.
_IMAGE = np.array(
  [[4, 0, -5, 0, 1, 0], [0, -4, -4, 1, 1, 0], [0, 4, -4, -1, 1, 0]]
  + [[0, -2, -1, 2, 1, 0], [0, 2, -1, -2, 1, 0], [0, 4, 0, -5, 0, 1]]
)
_KERNEL = np.array([[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]]) / 24
_OUTPUT = np.array([[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]])
OF_IMAGE, OF_KERNEL, OF_OUTPUT = (np.kron(matrix, matrix) for matrix in (_IMAGE, _KERNEL, _OUTPUT))


def patch(monkeypatch: pytest.MonkeyPatch) -> None:
  """Lets all networks convolve like this."""
  monkeypatch.setattr(layers, "_our_convolution", lambda: convolve)


def convolve(images: jax.Array, kernel: jax.Array, strides, padding, **_) -> jax.Array:
  """Returns f64[N, H', W', O] of images f64[N, H, W, I] and a kernel f64[h, w, I, O]; JAX derives the gradients."""
  same = kernel.shape[:2] == (3, 3) and tuple(strides) == (1, 1) and tuple(map(tuple, padding)) == ((1, 1), (1, 1))
  if same and images.shape[1] % 4 == images.shape[2] % 4 == 0:
    return _by_tiles(images, kernel)
  return _by_one_product(images, kernel, strides, padding)


def _by_tiles(images, kernel):
  """A quarter of the multiplications: tiles of 4 x 4 pixels, each computed from 6 x 6, to about 1e-14."""
  count, height, width, channels = images.shape
  rows, columns = height // 4, width // 4
  x = jnp.pad(images, ((0, 0), (1, 3), (1, 3), (0, 0))).reshape(count, rows + 1, 4, width + 4, channels)
  x = jnp.concatenate([x[:, :-1], x[:, 1:, :2]], axis=2).reshape(count, rows, 6, columns + 1, 4, channels)
  x = jnp.concatenate([x[:, :, :, :-1], x[:, :, :, 1:, :2]], axis=4).transpose(2, 4, 0, 1, 3, 5)
  x = (OF_IMAGE @ x.reshape(36, -1)).reshape(36, -1, channels)
  x = x @ (OF_KERNEL @ kernel.reshape(9, -1)).reshape(36, channels, -1)
  x = (OF_OUTPUT @ x.reshape(36, -1)).reshape(4, 4, count, rows, columns, -1)
  return x.transpose(2, 3, 0, 4, 1, 5).reshape(count, height, width, -1)


def _by_one_product(images, kernel, strides, padding):
  padded = jnp.pad(images, ((0, 0), *padding, (0, 0)))
  rows, columns = kernel.shape[:2]
  lasts = [
    (size - tap) // stride * stride
    for size, tap, stride in zip(padded.shape[1:3], (rows, columns), strides, strict=True)
  ]
  taps = [
    padded[:, y : y + lasts[0] + 1 : strides[0], x : x + lasts[1] + 1 : strides[1]]
    for y in range(rows)
    for x in range(columns)
  ]
  return jnp.concatenate(taps, axis=-1) @ kernel.reshape(-1, kernel.shape[-1])
