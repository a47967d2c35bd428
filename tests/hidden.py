"""Hides an installed package from code that asks whether it is there."""

import importlib.util


def hide(monkeypatch, package: str) -> None:
  """Makes `importlib.util.find_spec` know no `package`; libraries that ask for others, and remember, get the truth."""
  find_spec = importlib.util.find_spec
  monkeypatch.setattr(
    importlib.util, "find_spec", lambda name, *more: None if name == package else find_spec(name, *more)
  )
