"""Numbers in text: lists with commas between, and the values of options; each with one line for what does not fit."""

import math
from collections.abc import Callable
from typing import TypeVar

from simclr_jax import errors

T = TypeVar("T", int, float)


def parsed(name: str, text: str, kind: type[T], valid: Callable[[T], bool], wanted: str) -> T:
  """Returns `text` as a valid int or float; else a UserError that the option or key `name` wants what is `wanted`."""
  try:
    value = kind(text)
  except ValueError:
    value = None
  if value is None or not math.isfinite(value) or not valid(value):
    raise errors.UserError(f"{name} got {text!r}; it wants {wanted}.")
  return value


def floats(name: str, text: str, *, zero: bool = False) -> list[float]:
  """Returns the numbers of a text such as "0.1,1e-3": finite, and positive (or 0, where `zero` is allowed)."""
  least = "0 or more" if zero else "above 0"
  fits = lambda value: math.isfinite(value) and (value > 0 or zero and value == 0)
  return _listed(name, text, float, fits, f"give numbers {least} with commas between, such as 1e-4,1e-3")


def integers(name: str, text: str, *, least: int = 1) -> list[int]:
  """Returns the different whole numbers of a text such as "20,200", each at least `least`."""
  wanted = f"give whole numbers above {least - 1} with commas between, such as {20 * least},{200 * least}"
  return list(dict.fromkeys(_listed(name, text, int, lambda value: value >= least, wanted)))


def _listed(name, text, kind, valid, wanted):
  try:
    values = [kind(word.strip()) for word in text.split(",")]
  except ValueError:
    values = []
  if not values or not all(map(valid, values)):
    raise errors.UserError(f"{name} is {text!r}; {wanted}.")
  return values
