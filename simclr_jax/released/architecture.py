"""The architecture of a released network (depth, width, ratios, heads), inferred from the shapes of its variables."""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from simclr_jax import errors
from simclr_jax.models import resnet
from simclr_jax.released import names

Shapes = Mapping[str, tuple[int, ...]]

# A selective kernel reduces to at least this many channels, so several ratios may give the same shapes; the ratio of
# all v2 releases is preferred then.
SMALLEST_REDUCTION = 32
RELEASED_SK_RATIO = 0.0625


class Architecture(NamedTuple):
  """The architecture of a network."""

  # Fields of `resnet.ResNet`, so keys of the config's `model` section: depth, width, sk_ratio, se_ratio, small_images.
  encoder: dict[str, int | float | bool]
  dims: tuple[int, ...]  # size of h, then of the output of each layer of the projection head
  classes: int  # of the linear head; 0 without one
  classifier_dim: int  # input size of the linear head; 0 without one

  @property
  def layers(self) -> int:
    """Number of layers of the projection head; 0 without one."""
    return len(self.dims) - 1


def of(shapes: Shapes) -> Architecture:
  """Returns the architecture of the network whose variables have these names, those of `names.paths`, and shapes.

  UserError: there is no encoder, or no width and ratio give its channels.
  """
  if not any(name.startswith("base_model/") for name in shapes):
    raise errors.UserError("there is no encoder (base_model/...) among the variables; give a whole checkpoint.")
  scopes = [name.split("/")[1] for name in shapes if re.fullmatch(r"head_contrastive/.*/dense/kernel", name)]
  scopes.sort(key=lambda scope: int(scope.rpartition("_")[2]))
  encoder, features = _encoder(shapes)
  classifier_dim, classes = shapes.get("head_supervised/linear_layer/dense/kernel", (0, 0))
  dims = (features, *(shapes[f"head_contrastive/{scope}/dense/kernel"][-1] for scope in scopes))
  return Architecture(encoder, dims, classes, classifier_dim)


def _encoder(shapes: Shapes) -> tuple[dict[str, int | float | bool], int]:
  """Returns fields of `resnet.ResNet`, and the size of its output."""
  form = names.form_of(shapes)
  paths = names.encoder_paths(names.encoder_layers(**form._asdict()))
  channels = {path[2:-1]: shapes[name][-1] for name, path in paths.items() if path[-1] == "kernel"}
  blocks = [f"group{group}_block1" for group in range(1, 5)]
  bottleneck = form.depth in resnet.BOTTLENECK_BLOCKS
  if form.selective:
    filters = [channels[block, "selective", "conv"] // 2 for block in blocks]
    reduced = [channels[block, "selective", "reduce"] for block in blocks]
    sk_ratio = _ratio("selective kernels", filters, reduced, SMALLEST_REDUCTION, (RELEASED_SK_RATIO,))
  else:
    filters = [channels[block, "conv2" if bottleneck else "conv1"] for block in blocks]
    # Networks with basic blocks have ResNet-D's stem and shortcuts at any ratio above 0, and no selective kernels.
    sk_ratio = RELEASED_SK_RATIO if form.stem == "three" else 0.0
  se_ratio = 0.0
  if form.squeeze:
    reduced = [channels[block, "squeeze_excite", "reduce"] for block in blocks]
    se_ratio = _ratio("squeeze-and-excite", filters, reduced, 1)
  encoder = {"depth": form.depth, "width": _width(filters), "sk_ratio": sk_ratio, "se_ratio": se_ratio}
  encoder["small_images"] = form.stem == "small"
  return encoder, channels[blocks[-1], "conv3" if bottleneck else "conv2"]


def _width(filters: list[int]) -> float:
  """Returns the width multiplier that turns 64, 128, 256 and 512 channels into these."""
  bases = [64 * 2**group for group in range(4)]
  low = max((count - 0.5) / base for count, base in zip(filters, bases, strict=True))
  high = min((count + 0.5) / base for count, base in zip(filters, bases, strict=True))
  fits = lambda width: all(resnet.channels(b, width) == f for b, f in zip(bases, filters, strict=True))
  sixteenths = (number / 16 for number in range(1, 129))
  return _simplest(f"channels {filters} are those of no width", low, high, fits, sixteenths)


def _ratio(what: str, filters: list[int], reduced: list[int], least: int, preferred: Iterable[float] = ()) -> float:
  """Returns the ratio for which max(int(filters * ratio), least) equals `reduced` in each group."""
  pairs = list(zip(filters, reduced, strict=True))
  low = max(0 if count == least else count / base for base, count in pairs)
  high = min((count + 1) / base for base, count in pairs)
  fits = lambda ratio: all(max(int(base * ratio), least) == count for base, count in pairs)
  problem = f"{what} that reduce {filters} channels to {reduced} have no common ratio"
  return _simplest(problem, low, high, fits, preferred)


def _simplest(problem, low, high, fits, preferred=()):
  """Returns a preferred number that fits, or the one with the fewest digits around the middle of `low` and `high`."""
  for candidate in (*preferred, *(round((low + high) / 2, digits) for digits in range(10))):
    if candidate > 0 and fits(candidate):
      return float(candidate)
  raise errors.UserError(f"{problem}; these variables are no network of the reference.")
