"""The exception for mistakes of the user, and helpers for its messages."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
  """A mistake in the input, described in one line: what came, what was wanted, what to do.

  `__main__` prints the line and exits with code 2; any other exception is a bug and exits with code 1.
  """


def nearest(name: str, known: Iterable[str]) -> str:
  """Returns `; did you mean "x"?` for the known name closest to `name`, or an empty string."""
  close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
  return f'; did you mean "{close[0]}"?' if close else ""
