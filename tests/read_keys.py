"""Which keys of the config a program reads, found in its text: `keys = config.probes` and then `keys.epochs`."""

import ast
import dataclasses
from collections.abc import Iterable

from simclr_jax import experiment
from simclr_jax.keys import KEYS
from simclr_jax.models import encoders

# Every prefix of a key's dotted name; "" is the whole config.
SECTIONS = {name[:end] for name in KEYS for end, letter in enumerate(name) if letter == "."} | {""}
RECIPES = frozenset({"", *experiment.RECIPES})

Paths = frozenset[str]  # Dotted names of keys and sections that an expression may stand for.
NOTHING: Paths = frozenset()


def of(files: Iterable[str]) -> set[str]:
  """Returns the keys that Python files read, as attributes or subscripts of the section that has them.

  A section with a name that is computed (`keys[name]`) reads those of its keys that a string of these files names. The
  section that `encoders.build` takes is read as far as the fields of the encoders go.
  """
  trees = [ast.parse(text) for text in files]
  strings = {node.value for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant)}
  return {name for tree in trees for name in _File(tree, strings).read if name in KEYS}


def _member(paths: Paths, name: str) -> Paths:
  found = {f"{path}.{name}" if path else name for path in paths}
  return frozenset(path for path in found if path in KEYS or path in SECTIONS)


class _File:
  """One file: its functions, what their parameters stand for, and what its objects' attributes stand for."""

  def __init__(self, tree: ast.Module, strings: set[str]):
    self._strings, self.read = strings, set()
    self._attributes: dict[str, Paths] = {}
    self._parameters: dict[str, dict[str, Paths]] = {}
    self._signatures = {
      node.name: [argument.arg for argument in node.args.args]
      for node in ast.walk(tree)
      if isinstance(node, ast.FunctionDef)
    }
    methods = [node for top in tree.body if isinstance(top, ast.ClassDef) for node in top.body]
    functions = [node for node in (*tree.body, *methods) if isinstance(node, ast.FunctionDef)]
    # Calls say what parameters stand for, whatever the order of the functions.
    for _ in range(3):
      for function in functions:
        _Function(self, self._parameters.get(function.name, {})).visit(function)

  def assign(self, attribute: str, paths: Paths) -> None:
    self._attributes[attribute] = self._attributes.get(attribute, NOTHING) | paths

  def attribute(self, name: str) -> Paths:
    return self._attributes.get(name, NOTHING)

  def call(self, name: str, arguments: list[Paths]) -> None:
    known = self._parameters.setdefault(name, {})
    for parameter, paths in zip(self._signatures.get(name, []), arguments, strict=False):
      known[parameter] = known.get(parameter, NOTHING) | paths

  def computed(self, paths: Paths) -> Paths:
    found = (_member(paths, text) for text in self._strings if isinstance(text, str) and text.isidentifier())
    return frozenset().union(*found)


class _Function(ast.NodeVisitor):
  """Goes through a function with the functions inside of it, in the order of the text."""

  def __init__(self, file: _File, parameters: dict[str, Paths]):
    self._file, self._names = file, {"config": frozenset({""}), **parameters}

  def paths(self, node: ast.expr) -> Paths:
    """Returns what an expression stands for."""
    if isinstance(node, ast.Name):
      return self._names.get(node.id, NOTHING)
    if isinstance(node, ast.Attribute):
      if node.attr in ("config", "recipe"):
        return frozenset({""}) if node.attr == "config" else RECIPES
      if isinstance(node.value, ast.Name) and node.value.id == "self":
        return self._file.attribute(node.attr)
      return _member(self.paths(node.value), node.attr)
    if isinstance(node, ast.Subscript):
      return self._item(node.value, node.slice)
    return NOTHING

  def _item(self, section, index):
    paths = self.paths(section)
    if isinstance(index, ast.Constant):
      return _member(paths, index.value) if isinstance(index.value, str) else NOTHING
    # A section of a name that is computed would stand for every section.
    return self._file.computed(paths - {""})

  def visit_Assign(self, node):
    self.visit(node.value)
    for target in node.targets:
      is_tuple = isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple)
      pairs = zip(target.elts, node.value.elts, strict=True) if is_tuple else [(target, node.value)]
      for name, value in pairs:
        if isinstance(name, ast.Name):
          self._names[name.id] = self.paths(value)
        elif isinstance(name, ast.Attribute):
          self._file.assign(name.attr, self.paths(value))

  def visit_Attribute(self, node):
    self._file.read |= self.paths(node)
    self.generic_visit(node)

  def visit_Subscript(self, node):
    self._file.read |= self.paths(node)
    self.generic_visit(node)

  def visit_Call(self, node):
    function = node.func
    if isinstance(function, ast.Name):
      self._file.call(function.id, [self.paths(argument) for argument in node.args])
    elif isinstance(function, ast.Attribute) and function.attr == "get" and node.args:
      self._file.read |= self._item(function.value, node.args[0])
    elif isinstance(function, ast.Attribute) and function.attr == "build":
      fields = {field.name for encoder in encoders.ENCODERS.values() for field in dataclasses.fields(encoder)}
      for name in (*fields, "encoder"):
        self._file.read |= _member(self.paths(node.args[0]), name)
    self.generic_visit(node)
