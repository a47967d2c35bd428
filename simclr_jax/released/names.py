"""The names of the reference's TF1 checkpoints, and where each variable lives in our trees."""

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from simclr_jax import errors
from simclr_jax.models import resnet

Path = tuple[str, ...]

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
  """A convolution of the encoder: its place in the tree and the side of its kernel."""

  path: Path
  kernel: int
  bias: bool = False


class Norm(NamedTuple):
  """A batch norm of the encoder: its place in the tree."""

  path: Path


class Form(NamedTuple):
  """What decides the encoder's layers; see `encoder_layers`."""

  depth: int
  stem: str
  selective: bool
  squeeze: bool


def encoder_layers(depth: int, *, stem: str, selective: bool, squeeze: bool) -> Iterator[Conv | Norm]:
  """Yields the encoder's layers in the order in which the reference creates, so numbers, them.

  Args:
    depth: a depth that `resnet.ResNet` knows.
    stem: a key of `STEMS`: one 7x7, one 3x3 (small images), or ResNet-D's three 3x3.
    selective: whether bottlenecks have selective kernels.
    squeeze: whether blocks end with squeeze-and-excite.
  """
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
  result = {}
  convs = norms = 0
  for layer in layers:
    path = ("encoder", *layer.path)
    if isinstance(layer, Conv):
      name = _numbered("conv2d", convs)
      result[f"{name}/kernel"] = ("params", *path, "kernel")
      if layer.bias:
        result[f"{name}/bias"] = ("params", *path, "bias")
      convs += 1
    else:
      result |= _norm_paths(_numbered("batch_normalization", norms), path)
      norms += 1
  return result


def projection_paths(layers: int, *, linear: bool = False) -> dict[str, Path]:
  """Returns reference name -> (collection, "projection_head", module, leaf) for so many layers.

  The reference names the one layer of its linear head l_0, those of the others nl_0, nl_1, ...
  """
  result = {}
  for number in range(1, layers + 1):
    scope = f"head_contrastive/{'l' if linear else 'nl'}_{number - 1}"
    path = ("params", "projection_head", f"dense{number}", "kernel")
    result[f"{scope}/dense/kernel"] = path
    # The last batch norm scales only.
    result |= _norm_paths(
      f"{scope}/batch_normalization",
      ("projection_head", f"bn{number}"),
      beta=number < layers,
    )
  return result


def paths(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Path]:
  """Returns where each variable goes: its reference name -> (collection, part, module..., leaf).

  The architecture is read from the names and shapes given; a part of which no variable is given
  (encoder, projection head, linear head) is left out. The names returned are all that such a
  network has: the caller finds what is missing, and what is too much, by comparing.
  """
  result = {}
  if any(name.startswith("base_model/") for name in shapes):
    form = form_of(shapes)
    layers = list(encoder_layers(**form._asdict()))
    _check_norms(layers, shapes)
    result |= encoder_paths(layers)
  matches = [re.match(r"head_contrastive/(n?l)_(\d+)/", name) for name in shapes]
  nonlinear = [int(match[2]) for match in matches if match and match[1] == "nl"]
  if nonlinear:
    result |= projection_paths(max(nonlinear) + 1)
  elif any(matches):
    result |= projection_paths(1, linear=True)
  if any(name.startswith("head_supervised/") for name in shapes):
    result |= LINEAR_HEAD_PATHS
  return result


def _numbered(stem: str, number: int) -> str:
  return f"base_model/{stem}_{number}" if number else f"base_model/{stem}"


def _norm_paths(name: str, path: Path, *, beta: bool = True) -> dict[str, Path]:
  return {
    f"{name}/{leaf}": (collection, *path, ours)
    for leaf, (collection, ours) in NORM_LEAVES.items()
    if beta or leaf != "beta"
  }


def form_of(shapes: Mapping[str, tuple[int, ...]]) -> Form:
  """Returns the one form of encoder whose kernels are those given, in this order.

  Args:
    shapes: by reference name; what is not a variable of the encoder does not count.

  Raises:
    UserError: there is none.
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
  # Biases decide first: a selective kernel's 1x1 convolutions look like squeeze-and-excite's.
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


def _check_norms(layers: Iterable[Conv | Norm], shapes: Mapping[str, tuple[int, ...]]) -> None:
  """Raises where a batch norm does not have the channels of the convolution before it."""
  conv, norms, width = "", 0, 0
  convs = itertools.count()
  for layer in layers:
    if isinstance(layer, Conv):
      conv = _numbered("conv2d", next(convs))
      width = shapes[f"{conv}/kernel"][-1]
      continue
    for name in _norm_paths(_numbered("batch_normalization", norms), layer.path):
      if shapes.get(name, (width,)) != (width,):
        raise errors.UserError(
          f'"{name}" has shape {shapes[name]}, but "{conv}/kernel" before it gives {width} '
          "channels; the numbers in the names must follow the order of creation."
        )
    norms += 1
