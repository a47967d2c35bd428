"""Conversion of weights: from the reference's checkpoint names to this project's trees."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import traverse_util

from simclr_jax import errors, reference


def from_reference(variables: Mapping[str, Any]) -> dict[str, Any]:
  """Returns `{"params": ..., "batch_stats": ...}` from arrays under the reference's TF1 names.

  Under each are the keys `encoder`, `projection_head` and `linear_head`, as far as variables of
  that part are given; depth, width, stem, selective kernels and number of projection layers are
  those of the variables. Arrays are passed on as they are, in their own type. Every name must
  belong to the network and every variable of a part that is there must be given.

  Args:
    variables: for example `{"base_model/conv2d/kernel": f32[7, 7, 3, 64], ...}`.
  """
  if not variables:
    raise errors.UserError("no variables came; give arrays under the reference's checkpoint names.")
  paths = reference.paths({name: np.shape(value) for name, value in variables.items()})
  for name in variables:
    if name not in paths:
      raise errors.UserError(
        f'unknown variable "{name}"; give weights and moving statistics alone, without optimizer '
        f"slots, averages and global_step{errors.nearest(name, paths.keys() - variables.keys())}"
      )
  for name in paths:
    if name not in variables:
      raise errors.UserError(f'"{name}" is missing from the variables of this network; add it.')
  flat = {path: variables[name] for name, path in paths.items()}
  return {"params": {}, "batch_stats": {}} | traverse_util.unflatten_dict(flat)
