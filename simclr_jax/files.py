"""Paths as people type them, and files that are written whole or not at all."""

import json
import os
from typing import Any

from etils import epath


def absolute(path: str) -> str:
  """Returns a path without `~` and independent of the current folder; URLs such as gs://... stay as they are."""
  return path if "://" in path else os.path.abspath(os.path.expanduser(path))


def write_bytes(path: epath.PathLike, content: bytes) -> None:
  """Writes a file whole or not at all, whenever the process is killed; makes its folder if that is missing."""
  target = epath.Path(path)
  target.parent.mkdir(parents=True, exist_ok=True)
  # Readers of a whole folder, such as Arrow's, skip hidden files.
  partial = target.with_name(f".{target.name}.partial")
  partial.write_bytes(content)
  partial.replace(target)


def write_json(path: epath.PathLike, tree: Any) -> None:
  """Writes a JSON file as `write_bytes` does."""
  write_bytes(path, (json.dumps(tree, indent=2) + "\n").encode())
