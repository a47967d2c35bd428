"""The one exception that means: the user can fix this."""

import difflib
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
