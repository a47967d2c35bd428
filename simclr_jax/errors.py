"""The one exception that means: the user can fix this."""

import difflib
import os
from collections.abc import Iterable


class UserError(ValueError):
  """A mistake in the input: one line with what came, what was wanted, what to do.

  `__main__` prints the line and exits with code 2; anything else that is
  raised is our bug and exits with code 1.
  """


def nearest(name: str, known: Iterable[str]) -> str:
  """Returns `; did you mean "x"?` for the known name closest to `name`, or an empty string."""
  close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
  return f'; did you mean "{close[0]}"?' if close else ""


def absolute(path: str) -> str:
  """Returns a path without `~` and independent of the current folder; URLs such as gs://... stay as they are."""
  return path if "://" in path else os.path.abspath(os.path.expanduser(path))
