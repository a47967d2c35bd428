"""The variable names of the reference's TF1 checkpoints, and the path of each variable in our trees."""

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from flax import traverse_util

from simclr_jax import errors
from simclr_jax.models import resnet

Path = tuple[str, ...]

# Kernel sizes: ResNet's, the one for small images, and ResNet-D's.
STEMS = {"large": (7,), "small": (3,), "three": (3, 3, 3)}
NORM_LEAVES = {
  "gamma": ("params", "scale"),
  "beta": ("params", "bias"),
  "moving_mean": ("batch_stats", "mean"),
  "moving_variance": ("batch_stats", "var"),
}
LINEAR_HEAD_PATHS = {
  f"head_supervised/linear_layer/dense/{leaf}": ("params", "linear_head", "dense", leaf) for leaf in ("kernel", "bias")
}


class Conv(NamedTuple):
  """A convolution of the encoder."""

  path: Path  # in the tree
  kernel: int  # size of the square kernel
  bias: bool = False


class Norm(NamedTuple):
  """A batch norm of the encoder."""

  path: Path  # in the tree


class Form(NamedTuple):
  """The arguments of `encoder_layers`, which determine the layers of an encoder."""

  depth: int  # one of `resnet.BLOCKS`
  stem: str  # a key of `STEMS`
  selective: bool  # whether bottlenecks have selective kernels
  squeeze: bool  # whether blocks end with squeeze-and-excite


def encoder_layers(depth: int, *, stem: str, selective: bool, squeeze: bool) -> Iterator[Conv | Norm]:
  """Yields the encoder's layers in the order in which the reference creates them, which gives their numbers."""
  for number, kernel in enumerate(STEMS[stem], start=1):
    yield Conv((f"stem_conv{number}",), kernel)
    yield Norm((f"stem_bn{number}",))
  for group, blocks in enumerate(resnet.BLOCKS[depth], start=1):
    for block in range(1, blocks + 1):
      scope = f"group{group}_block{block}"
      if block == 1:
        yield Conv((scope, "shortcut_conv"), 1)
        yield Norm((scope, "shortcut_bn"))
      for number, kernel in enumerate([1, 3, 1] if depth in resnet.BOTTLENECK_BLOCKS else [3, 3], start=1):
        if selective and depth in resnet.BOTTLENECK_BLOCKS and kernel == 3:
          yield Conv((scope, "selective", "conv"), 3)
          yield Norm((scope, "selective", "bn"))
          yield Conv((scope, "selective", "reduce"), 1)
          yield Norm((scope, "selective", "reduce_bn"))
          yield Conv((scope, "selective", "expand"), 1)
        else:
          yield Conv((scope, f"conv{number}"), kernel)
          yield Norm((scope, f"bn{number}"))
      if squeeze:
        yield Conv((scope, "squeeze_excite", "reduce"), 1, bias=True)
        yield Conv((scope, "squeeze_excite", "expand"), 1, bias=True)


def encoder_paths(layers: Iterable[Conv | Norm]) -> dict[str, Path]:
  """Returns reference name -> (collection, "encoder", module..., leaf) for these layers."""
  result, convs, norms = {}, itertools.count(), itertools.count()
  for layer in layers:
    path = ("encoder", *layer.path)
    if isinstance(layer, Conv):
      name = _numbered("conv2d", next(convs))
      for leaf in ("kernel", "bias") if layer.bias else ("kernel",):
        result[f"{name}/{leaf}"] = ("params", *path, leaf)
    else:
      result |= _norm_paths(_numbered("batch_normalization", next(norms)), path)
  return result


def projection_paths(layers: int, *, linear: bool = False) -> dict[str, Path]:
  """Returns reference name -> (collection, "projection_head", module, leaf) for this number of layers.

  The reference calls the only layer of its linear head l_0 and not nl_0.
  """
  result = {}
  for number in range(1, layers + 1):
    scope = f"head_contrastive/{'l' if linear else 'nl'}_{number - 1}"
    result[f"{scope}/dense/kernel"] = ("params", "projection_head", f"dense{number}", "kernel")
    # The last batch norm scales only.
    path = ("projection_head", f"bn{number}")
    result |= _norm_paths(f"{scope}/batch_normalization", path, beta=number < layers)
  return result


def paths(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Path]:
  """Returns reference name -> (collection, part, module..., leaf) for all variables of a network.

  The architecture is inferred from the names and shapes given; a part (encoder, projection head, linear head) without
  any variable is left out. Variables that are missing or unknown show in the difference between the names given and
  those returned.
  UserError: the convolutions are those of no encoder, or a batch norm does not fit the convolution before it.
  """
  result = {}
  if any(name.startswith("base_model/") for name in shapes):
    result |= encoder_paths(encoder_layers(**form_of(shapes)._asdict()))
    _check_norms(result, shapes)
  matches = [re.match(r"head_contrastive/(n?l)_(\d+)/", name) for name in shapes]
  nonlinear = [int(match[2]) for match in matches if match and match[1] == "nl"]
  if nonlinear:
    result |= projection_paths(max(nonlinear) + 1)
  elif any(matches):
    result |= projection_paths(1, linear=True)
  if any(name.startswith("head_supervised/") for name in shapes):
    result |= LINEAR_HEAD_PATHS
  return result


def tree_of(variables: Mapping[str, Any]) -> dict[str, Any]:
  """Returns `{"params": ..., "batch_stats": ...}` from arrays such as `{"base_model/conv2d/kernel": f32[7, 7, 3, 64]}`.

  Both have the keys `encoder`, `projection_head` and `linear_head`, as far as variables of that part are given; depth,
  width, stem, selective kernels and number of projection layers are those of the variables. The arrays are returned
  as they are, in their own dtype.
  UserError: there are no variables, one does not belong to the network, or one is missing.
  """
  if not variables:
    raise errors.UserError("no variables came; give arrays under the reference's checkpoint names.")
  places = paths({name: np.shape(value) for name, value in variables.items()})
  for name in variables:
    if name not in places:
      raise errors.UserError(
        f'unknown variable "{name}"; give weights and moving statistics alone, without optimizer '
        f"slots, averages and global_step{errors.nearest(name, places.keys() - variables.keys())}"
      )
  for name in places:
    if name not in variables:
      raise errors.UserError(f'"{name}" is missing from the variables of this network; add it.')
  flat = {path: variables[name] for name, path in places.items()}
  return {"params": {}, "batch_stats": {}} | traverse_util.unflatten_dict(flat)


def _numbered(stem: str, number: int) -> str:
  return f"base_model/{stem}_{number}" if number else f"base_model/{stem}"


def _norm_paths(name: str, path: Path, *, beta: bool = True) -> dict[str, Path]:
  return {
    f"{name}/{leaf}": (collection, *path, ours)
    for leaf, (collection, ours) in NORM_LEAVES.items()
    if beta or leaf != "beta"
  }


def form_of(shapes: Mapping[str, tuple[int, ...]]) -> Form:
  """Returns the form of the encoder with these kernels, in the order of their numbers; ignores other parts.

  UserError: no encoder has these kernels.
  """
  kernels = {}
  for name, shape in shapes.items():
    match = re.fullmatch(r"base_model/conv2d(?:_([1-9]\d*))?/kernel", name)
    if match:
      if len(shape) != 4 or shape[0] != shape[1]:
        raise errors.UserError(f'"{name}" has shape {shape}; wanted [side, side, in, out].')
      kernels[int(match[1] or 0)] = shape[0]
  for number in range(max(kernels, default=0) + 1):
    if number not in kernels:
      raise errors.UserError(f'"{_numbered("conv2d", number)}/kernel" is missing; add it.')
  sides = [kernels[number] for number in range(len(kernels))]
  # The 1x1 convolutions of selective kernels and of squeeze-and-excite differ in their biases alone, so forms that
  # agree with the biases are tried first.
  biases = any(re.fullmatch(r"base_model/conv2d(_\d+)?/bias", name) for name in shapes)
  for squeeze, depth, stem, selective in itertools.product((biases, not biases), resnet.BLOCKS, STEMS, (False, True)):
    form = Form(depth, stem, selective, squeeze)
    layers = encoder_layers(**form._asdict())
    if sides == [layer.kernel for layer in layers if isinstance(layer, Conv)]:
      return form
  known = ", ".join(map(str, resnet.BLOCKS))
  raise errors.UserError(
    f"the {len(sides)} convolutions of base_model (kernels {', '.join(map(str, sides[:6]))}, ...) "
    f"are no ResNet of depth {known}; give all of them, numbered in order of creation."
  )


def _check_norms(encoder: Iterable[str], shapes: Mapping[str, tuple[int, ...]]) -> None:
  """Raises a UserError where a batch norm does not have the channels of the convolution before it, given all names."""
  for name in encoder:
    if name.endswith("/kernel"):
      kernel, width = name, shapes[name][-1]
    elif not name.endswith("/bias") and shapes.get(name, (width,)) != (width,):
      raise errors.UserError(
        f'"{name}" has shape {shapes[name]}, but "{kernel}" before it gives {width} '
        "channels; the numbers in the names must follow the order of creation."
      )
