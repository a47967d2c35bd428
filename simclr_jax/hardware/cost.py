"""The cost of a program: model FLOPs from its jaxpr, memory and collectives from the compiled HLO."""

import collections
import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.extend import core


def matrix_flops(function: Callable, *args: Any) -> int:
  """Returns the FLOPs of the convolutions and matrix products in one call of a function; arguments may be shapes.

  A multiply-add counts as two, and multiplications with padding count, as in ResNet's published 4.1 billion
  multiply-adds. Nothing is computed or compiled. The body of a scan counts once per iteration; rematerialised code
  counts as often as it stands in the jaxpr.
  """
  return _flops_of(jax.make_jaxpr(function)(*args))


def flops_by_module(model: nn.Module, variables: Any, *args: Any, **kwargs: Any) -> dict[tuple[str, ...], int]:
  """Returns the FLOPs of each convolution and dense layer in one call of a network, by path in the parameter tree.

  FLOPs are counted as in `matrix_flops`; nothing is computed or compiled. Variables and arguments may be shapes.
  """
  found = collections.Counter()

  def record(call, inputs, keywords, context):
    out = call(*inputs, **keywords)
    if isinstance(context.module, nn.Conv | nn.Dense):
      taps = math.prod(getattr(context.module, "kernel_size", ()))
      found[context.module.path] += 2 * math.prod(out.shape) * taps * inputs[0].shape[-1]
    return out

  with nn.intercept_methods(record):
    jax.eval_shape(lambda variables, *args: model.apply(variables, *args, **kwargs), variables, *args)
  return dict(found)


def _flops_of(jaxpr) -> int:
  total = 0
  for equation in jaxpr.eqns:
    name, params, shapes = equation.primitive.name, equation.params, [v.aval.shape for v in equation.invars]
    if name == "dot_general":
      (contracted, _), _ = params["dimension_numbers"]
      out = math.prod(equation.outvars[0].aval.shape)
      total += 2 * out * math.prod(shapes[0][axis] for axis in contracted)
    elif name == "conv_general_dilated":
      spec = params["dimension_numbers"].rhs_spec
      # The kernel's input channels are those of one group.
      taps = math.prod(shapes[1][axis] for axis in spec[1:])
      total += 2 * math.prod(equation.outvars[0].aval.shape) * taps
    else:
      inner = [x for x in jax.tree.leaves(params) if isinstance(x, core.ClosedJaxpr | core.Jaxpr)]
      total += (params["length"] if name == "scan" else 1) * sum(map(_flops_of, inner))
  return total


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective operation in a compiled program."""

  kind: str  # `all-reduce`, `all-gather`, `reduce-scatter`, `all-to-all` or `collective-permute`.
  purpose: str  # `loss`, `batch norm` or `parameters` (all-reduce of gradients, all-gather of split parameters).
  calls: int  # In one run of the program.
  bytes: int  # Size of the operand or of the result on one device, whichever is larger, times `calls`.
  shapes: tuple[str, ...]  # Of the results, in HLO notation.


_KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|collective-broadcast"
# An asynchronous pair counts at its -done: the result of the -start holds operands and scratch space as well.
_OPERATION = re.compile(rf"= (?P<result>.*?) (?P<kind>{_KINDS})(?P<phase>-start|-done)?\(")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|branch_computations)=\{?((?:%[\w.\-]+(?:, )?)+)")
_SHAPE = re.compile(r"\b(pred|[a-z]+\d+)(?:e\d+m\d+\w*)?\[([\d,]*)\]")
_WIDTHS = {"pred": 1, "s8": 1, "u8": 1, "f8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f64": 8, "s64": 8, "u64": 8}


def collectives(hlo: str, devices: int) -> list[Collective]:
  """Returns the collectives in one run of a compiled module, given its HLO text (of any backend) and its devices.

  Those in a loop count once per iteration.
  """
  bodies, entry = _computations(hlo)
  runs = _runs(bodies, entry)
  found = []
  for name, lines in bodies.items():
    for line in lines if runs[name] else ():
      match = _OPERATION.search(line)
      if match is None or match["phase"] == "-start":
        continue
      shapes = tuple(f"{kind}[{dims}]" for kind, dims in _SHAPE.findall(match["result"]))
      size = sum(map(_size, shapes)) * (devices if match["kind"] == "reduce-scatter" else 1)
      found.append(Collective(match["kind"], _purpose(line, lines, shapes), runs[name], runs[name] * size, shapes))
  return found


def _computations(hlo: str) -> tuple[dict[str, list[str]], str]:
  bodies, entry, current = {}, "", None
  for line in hlo.splitlines():
    header = re.match(r"(ENTRY )?(%[\w.\-]+) \(.*\{\s*$", line)
    if header:
      current = bodies.setdefault(header[2], [])
      entry = header[2] if header[1] else entry
    elif current is not None and line.startswith(" "):
      current.append(line)
  return bodies, entry


def _runs(bodies: dict[str, list[str]], entry: str) -> collections.Counter:
  """Returns the number of runs of each computation."""
  runs = collections.Counter()

  def visit(name, times):
    runs[name] += times
    for line in bodies.get(name, ()):
      # These lines belong to an async-start and name the same computation again.
      if re.search(r" async-(done|update)\(", line):
        continue
      for called in _CALLED.findall(line):
        for inner in called.split(", "):
          visit(inner, times * (_iterations(bodies, line) if " while(" in line else 1))

  visit(entry, 1)
  return runs


def _iterations(bodies: dict[str, list[str]], loop: str) -> int:
  """Returns the trip count of a while loop: the compiler's, or the bound in the loop's condition."""
  known = re.search(r'known_trip_count":\{"n":"(\d+)"', loop)
  if known:
    return int(known[1])
  condition = bodies[re.search(r"condition=(%[\w.\-]+)", loop)[1]]
  bounds = [int(n) for line in condition for n in re.findall(r"s32\[\]\S* constant\((\d+)\)", line)]
  return max(bounds, default=1)


def _size(shape: str) -> int:
  kind, dims = shape.rstrip("]").split("[")
  return math.prod(int(d) for d in dims.split(",") if d) * _WIDTHS.get(kind, 4)


def _purpose(line: str, lines: list[str], shapes: tuple[str, ...]) -> str:
  if "op_name" not in line:
    # Operations that the compiler inserted have no op_name; that of a producer or a consumer serves instead.
    own, *operands = re.findall(r"%[\w.\-]+", line.partition("), ")[0])
    related = "|".join([rf"^\s*(?:ROOT )?{re.escape(x)} =" for x in operands] + [rf"= .*{re.escape(own)}\b"])
    line = next((other for other in lines if "op_name" in other and re.search(related, other)), line)
  path = re.search(r'op_name="([^"]*)"', line)
  names = path[1].split("/") if path else []
  # The compiler may merge the all-reduce of the loss's scalars with that of the gradients, under the name of either: a
  # collective is the loss's only with one result, or with scalars alone.
  if "shard_map" in names and (len(shapes) == 1 or set(shapes) <= {"f32[]", "f64[]"}):
    return "loss"
  if any(re.fullmatch(r"(\w+_)?bn\d*", name) for name in names):
    return "batch norm"
  return "parameters"


def bytes_per_device(tree: Any) -> int:
  """Returns the bytes on one device of a tree of arrays, or of shapes with placements."""
  return sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree)
  )
