"""Images in memory as NumPy arrays: from an .npz file or the built-in shapes, without TensorFlow."""

import dataclasses
import io
import os
import zipfile
from collections.abc import Mapping
from concurrent import futures

import numpy as np
from PIL import Image

from simclr_jax import errors
from simclr_jax.data import shapes


@dataclasses.dataclass(frozen=True, eq=False)
class Arrays:
  """One split of images in memory.

  Attributes:
    name: for messages.
    images: u8[N, H, W, 3], or object[N] of bytes, encoded images of any size.
    labels: i32[N], -1 without labels.
    class_names: one for each class; empty without labels.
    names: of the examples, where they have any.
  """

  name: str
  images: np.ndarray
  labels: np.ndarray
  class_names: tuple[str, ...]
  names: tuple[str, ...] = ()

  @property
  def num_examples(self) -> int:
    return len(self.images)

  @property
  def num_classes(self) -> int:
    return len(self.class_names)


def from_mapping(arrays: Mapping[str, np.ndarray], split: str, *, name: str = "arrays") -> Arrays:
  """Returns a split of named arrays.

  Args:
    arrays: for each split S either `S_images` u8[N, H, W, 3], or `S_bytes` u8[...] and `S_offsets`
      int[N + 1], where bytes[offsets[i] : offsets[i + 1]] is the encoded image i; if there are any,
      `S_labels` int[N] and `class_names`.
    split: which S.
    name: for messages.
  """
  splits = sorted({key.rsplit("_", 1)[0] for key in arrays if key.endswith(("_images", "_bytes"))})
  if split not in splits:
    raise errors.UserError(
      f'{name} has no split "{split}" (no arrays {split}_images or {split}_bytes and {split}_offsets); '
      f"its splits: {', '.join(splits) or 'none'}{errors.nearest(split, splits)}"
    )
  if f"{split}_images" in arrays:
    images = np.asarray(arrays[f"{split}_images"])
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
      raise errors.UserError(
        f"{split}_images of {name} is {images.dtype}{list(images.shape)}; convert it to uint8[N, H, W, 3]."
      )
  else:
    images = _encoded(arrays, split, name)
  labels, num_classes = _labels_of(arrays, split, len(images), name)
  names = tuple(str(n) for n in arrays.get("class_names", range(num_classes)))
  if num_classes and len(names) != num_classes:
    raise errors.UserError(
      f"{name} has {len(names)} class_names and labels up to {num_classes - 1}; give one name a class."
    )
  return Arrays(f"{name} ({split})", images, labels, names[:num_classes])


def from_npz(path: str, split: str) -> Arrays:
  """Returns a split of the arrays in an .npz file; see `from_mapping`."""
  if not os.path.isfile(path):
    raise errors.UserError(f'no file "{path}" for the source arrays; set data_dir to an .npz file.')
  with open(path, "rb") as stream:
    try:
      file = np.load(stream)
    except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
      raise errors.UserError(f'"{path}" is no .npz file ({error}); write it with np.savez.') from error
    if not isinstance(file, Mapping):
      raise errors.UserError(f'"{path}" holds one array, wanted several by name; write it with np.savez.')
    return from_mapping(file, split, name=os.path.basename(path))


def from_shapes(split: str, num_examples: int, image_size: int, seed: int) -> Arrays:
  """Returns a split of the built-in shapes."""
  if num_examples < 1:
    raise errors.UserError(f"{num_examples} shapes asked for; set the number of examples to at least 1.")
  if split not in shapes.SPLITS:
    raise errors.UserError(
      f'the shapes have no split "{split}"; their splits: {", ".join(shapes.SPLITS)}'
      f"{errors.nearest(split, shapes.SPLITS)}"
    )
  images, labels = shapes.draw(split, num_examples, image_size, seed)
  return Arrays(f"shapes ({split})", images, labels, shapes.CLASS_NAMES)


def decoded(arrays: Arrays) -> Arrays:
  """Returns the split with its images decoded, u8[N, H, W, 3]; they must have one size."""
  if arrays.images.dtype == np.uint8:
    return arrays
  if not len(arrays.images):
    raise errors.UserError(f"{arrays.name} has no images; write at least one.")
  first = _decode(arrays, 0)
  images = np.empty((len(arrays.images), *first.shape), np.uint8)

  def fill(number):
    image = _decode(arrays, number)
    check_size(image, first, number, arrays.name)
    images[number] = image

  # Pillow lets go of the interpreter's lock while it decodes.
  with futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    list(pool.map(fill, range(len(images))))
  return dataclasses.replace(arrays, images=images)


def check_size(image: np.ndarray, first: np.ndarray, number: int, name: str) -> None:
  """Raises a UserError unless an image of a split has the size of the first one."""
  if image.shape != first.shape:
    raise errors.UserError(
      f"image {number} of {name} is {image.shape[0]} x {image.shape[1]} pixels and the first one is "
      f"{first.shape[0]} x {first.shape[1]}; resident images need one size: resize them, or set data.resident=false."
    )


def _decode(arrays, number):
  try:
    with Image.open(io.BytesIO(arrays.images[number])) as image:
      return np.asarray(image.convert("RGB"))
  except (OSError, Image.DecompressionBombError) as error:
    raise errors.UserError(f"image {number} of {arrays.name} cannot be decoded ({error}); replace it.") from error


def _encoded(arrays, split, name):
  """Returns bytes objects [N] for encoded images that lie one after the other."""
  if f"{split}_offsets" not in arrays:
    raise errors.UserError(f"{name} has {split}_bytes but no {split}_offsets; add them, int[N + 1].")
  data = np.asarray(arrays[f"{split}_bytes"], np.uint8)
  offsets = np.asarray(arrays[f"{split}_offsets"], np.int64)
  if (
    offsets.ndim != 1 or len(offsets) < 1 or np.any(np.diff(offsets) <= 0) or offsets[0] < 0 or offsets[-1] > len(data)
  ):
    raise errors.UserError(f"{split}_offsets of {name} do not cut its {len(data)} bytes; wanted int[N + 1], rising.")
  return np.array([data[a:b].tobytes() for a, b in zip(offsets[:-1], offsets[1:], strict=True)], object)


def _labels_of(arrays, split, count, name):
  """Returns (i32[count], number of classes over all splits), or (-1s, 0) where the split has no labels."""
  if f"{split}_labels" not in arrays:
    return np.full(count, -1, np.int32), 0
  labels = np.asarray(arrays[f"{split}_labels"])
  if labels.shape != (count,) or not np.issubdtype(labels.dtype, np.integer):
    raise errors.UserError(
      f"{split}_labels of {name} is {labels.dtype}{list(labels.shape)}, wanted int[{count}]; give each image one."
    )
  every = [np.asarray(arrays[key]) for key in arrays if key.endswith("_labels")]
  return labels.astype(np.int32), max((int(labels.max()) + 1 for labels in every if labels.size), default=0)
