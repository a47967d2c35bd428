"""Weights that follow from their names alone, so that the fixtures need not ship any."""

import math
import zlib

import numpy as np
from flax import traverse_util


def variable(name: str, shape: tuple[int, ...], prefix: str = "") -> np.ndarray:
  """Returns the f32 array that the fixtures' rule gives to a variable of this name and shape."""
  rs = np.random.RandomState(zlib.crc32((prefix + name).encode()))
  kind = name.rsplit("/", 1)[-1]
  if kind == "kernel":
    value = rs.standard_normal(shape) / math.sqrt(math.prod(shape[:-1]))
  elif kind == "gamma":
    value = 0.9 + 0.2 * rs.random_sample(shape)
  elif kind == "moving_variance":
    value = 1 + 0.5 * rs.random_sample(shape)
  elif kind in ("beta", "moving_mean", "bias"):
    value = -0.1 + 0.2 * rs.random_sample(shape)
  else:
    raise ValueError(f"no rule for {name}")
  return value.astype(np.float32)


def parse_shape(text: str) -> tuple[int, ...]:
  """Returns (3, 3, 64, 64) for the fixtures' `3x3x64x64`."""
  return tuple(int(side) for side in text.split("x"))


def variables(names: np.ndarray, shapes: np.ndarray, prefix: str, dtype: type = np.float64) -> dict[str, np.ndarray]:
  """Returns all variables of a fixture by name; float32 values, in `dtype`."""
  return {
    str(name): variable(str(name), parse_shape(str(shape)), prefix).astype(dtype)
    for name, shape in zip(names, shapes, strict=True)
  }


def of_network(
  tree: dict, paths: dict[str, tuple[str, ...]], prefix: str, dtype: type = np.float64
) -> dict[str, np.ndarray]:
  """Returns variables by reference name for a network of ours, where a fixture gives no shapes.

  Args:
    tree: `{"params": ..., "batch_stats": ...}` with anything that has a shape as leaves.
    paths: reference name -> path in the tree, from `simclr_jax.released.names`.
    prefix: the fixture's `name_prefix`.
    dtype: type of the arrays; their values are those of float32.
  """
  flat = traverse_util.flatten_dict(tree)
  return {name: variable(name, flat[path].shape, prefix).astype(dtype) for name, path in paths.items()}


def filled(tree: dict) -> dict:
  """Returns a tree of ours with the rule's values, in each leaf's own type, from its abstract twin.

  Nothing is compiled: XLA takes about a second for every array that an initialiser draws.
  """
  kinds = {"scale": "gamma", "bias": "beta", "mean": "moving_mean", "var": "moving_variance"}
  flat = traverse_util.flatten_dict(tree)
  values = {
    path: variable("/".join((*path[:-1], kinds.get(path[-1], path[-1]))), leaf.shape) for path, leaf in flat.items()
  }
  values = {path: value.astype(flat[path].dtype) for path, value in values.items()}
  return traverse_util.unflatten_dict(values)


def checksum(value: np.ndarray) -> int:
  """Returns the crc32 of an array's float32 bytes, as in the fixtures' `variable_crc32`."""
  return zlib.crc32(np.ascontiguousarray(value, np.float32).tobytes())
