"""Images in memory as NumPy arrays, and the source that reads them from an .npz file. Imports no TensorFlow."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import pathlib
import zipfile
from collections.abc import Iterator, Mapping
from concurrent import futures

import numpy as np

from simclr_jax import errors
from simclr_jax.data import pictures
from simclr_jax.data import source as source_lib


@dataclasses.dataclass(frozen=True, eq=False)
class Arrays(source_lib.Source):
  """One split of images in memory; for the fields of every source see `source.Source`."""

  name: str
  images: np.ndarray  # u8[N, H, W, 3], or object[N] of bytes, encoded images of any size
  example_labels: np.ndarray  # i32[N], -1 without labels; see `Source.labels`
  class_names: tuple[str, ...]
  example_names: tuple[str, ...] = ()
  multi_label: bool = False
  checksums: tuple[int, ...] = ()
  rule: pictures.Rule = pictures.PLAIN  # how encoded images that are no 8-bit RGB become that

  @property
  def num_examples(self) -> int:
    return len(self.images)

  def labels(self) -> np.ndarray:
    return self.example_labels

  def decoded(self) -> Arrays:
    if self.images.dtype == np.uint8:
      return self
    check_any(self)
    first = self._decode(0)
    images = np.empty((self.num_examples, *first.shape), np.uint8)

    def fill(number):
      image = self._decode(number)
      check_size(image, first, number, self.name)
      images[number] = image

    # Threads, because Pillow releases the interpreter's lock while it decodes.
    with futures.ThreadPoolExecutor(os.cpu_count()) as pool:
      list(pool.map(fill, range(self.num_examples)))
    return dataclasses.replace(self, images=images)

  def stored(self) -> source_lib.Source:
    if importlib.util.find_spec("tensorflow") is None:
      raise errors.UserError(
        f"{self.name} is streamed by TensorFlow, which is not installed; install it, or set data.resident=true."
      )
    from simclr_jax.data import stored

    fields = {"example_names": self.example_names, "multi_label": self.multi_label, "checksums": self.checksums}
    images = self.images
    if images.dtype != np.uint8:
      images = np.empty(self.num_examples, object)
      for number, content in enumerate(self.images):
        with self._reading(number):
          images[number] = pictures.plain(content, self.rule)
    examples = stored.on_host(images, self.example_labels)
    return stored.Stored(self.name, self.class_names, lambda *example: example, examples, **fields)

  def _at(self, rows):
    return {"images": self.images[rows], "example_labels": self.example_labels[rows]}

  def _decode(self, number: int) -> np.ndarray:
    with self._reading(number):
      return pictures.rgb(self.images[number], self.rule)

  @contextlib.contextmanager
  def _reading(self, number: int) -> Iterator[None]:
    """Turns what cannot be decoded inside into a UserError."""
    try:
      yield
    except pictures.BROKEN as error:
      name = self.example_names[number] if self.example_names else number
      raise errors.UserError(f"image {name} of {self.name} cannot be decoded ({error}); replace it.") from error


def open(request: source_lib.Request) -> Arrays:
  """Returns the split `request.split` of the .npz file `request.data_dir`; raises what `from_mapping` does."""
  with _npz(request.data_dir) as file:
    images = from_mapping(file, request.split, name=os.path.basename(request.data_dir))
  return dataclasses.replace(images, rule=request.pictures)


def split_names(request: source_lib.Request) -> tuple[str, ...]:
  """Returns the names of the splits in the .npz file `request.data_dir`."""
  with _npz(request.data_dir) as file:
    return _splits_in(file)


def from_mapping(arrays: Mapping[str, np.ndarray], split: str, *, name: str = "arrays") -> Arrays:
  """Returns a split of named arrays; `name` is for messages.

  The arrays of a split S are either `S_images` u8[N, H, W, 3], or `S_bytes` u8[...] and `S_offsets` int[N + 1], where
  bytes[offsets[i] : offsets[i + 1]] is the encoded image i; `S_labels` int[N] and `class_names` are optional.
  A split that is not there, or has arrays of another form, is a UserError.
  """
  splits = _splits_in(arrays)
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
  labels, num_classes = _labels(arrays, split, len(images), name)
  names = tuple(str(n) for n in arrays.get("class_names", range(num_classes)))
  if num_classes and len(names) != num_classes:
    raise errors.UserError(
      f"{name} has {len(names)} class_names and labels up to {num_classes - 1}; give one name a class."
    )
  return Arrays(f"{name} ({split})", images, labels, names[:num_classes])


def check_any(source: source_lib.Source) -> None:
  """Raises a UserError for a split without images."""
  if not source.num_examples:
    raise errors.UserError(f"{source.name} has no images; write at least one.")


def check_size(image: np.ndarray, first: np.ndarray, number: int, name: str) -> None:
  """Raises a UserError unless an image of a split has the size of the first one."""
  if image.shape != first.shape:
    raise errors.UserError(
      f"image {number} of {name} is {image.shape[0]} x {image.shape[1]} pixels and the first one is "
      f"{first.shape[0]} x {first.shape[1]}; resident images need one size: resize them, or set data.resident=false."
    )


@contextlib.contextmanager
def _npz(path: str) -> Iterator[Mapping[str, np.ndarray]]:
  if not os.path.isfile(path):
    raise errors.UserError(f'no file "{path}" for the source arrays; set data_dir to an .npz file.')
  with pathlib.Path(path).open("rb") as stream:
    try:
      file = np.load(stream)
    except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
      raise errors.UserError(f'"{path}" is no .npz file ({error}); write it with np.savez.') from error
    if not isinstance(file, Mapping):
      raise errors.UserError(f'"{path}" holds one array, wanted several by name; write it with np.savez.')
    yield file


def _splits_in(arrays: Mapping[str, np.ndarray]) -> tuple[str, ...]:
  return tuple(sorted({key.rsplit("_", 1)[0] for key in arrays if key.endswith(("_images", "_bytes"))}))


def _encoded(arrays: Mapping[str, np.ndarray], split: str, name: str) -> np.ndarray:
  """Returns object[N] of bytes for encoded images that are stored one after the other."""
  if f"{split}_offsets" not in arrays:
    raise errors.UserError(f"{name} has {split}_bytes but no {split}_offsets; add them, int[N + 1].")
  data = np.asarray(arrays[f"{split}_bytes"], np.uint8)
  offsets = np.asarray(arrays[f"{split}_offsets"], np.int64)
  rising = offsets.ndim == 1 and len(offsets) > 0 and np.all(np.diff(offsets) > 0)
  if not rising or offsets[0] < 0 or offsets[-1] > len(data):
    raise errors.UserError(f"{split}_offsets of {name} do not cut its {len(data)} bytes; wanted int[N + 1], rising.")
  return np.array([data[a:b].tobytes() for a, b in zip(offsets[:-1], offsets[1:], strict=True)], object)


def _labels(arrays: Mapping[str, np.ndarray], split: str, count: int, name: str) -> tuple[np.ndarray, int]:
  """Returns (i32[count], number of classes of all splits together), or (-1s, 0) where the split has no labels."""
  if f"{split}_labels" not in arrays:
    return np.full(count, -1, np.int32), 0
  labels = np.asarray(arrays[f"{split}_labels"])
  if labels.shape != (count,) or not np.issubdtype(labels.dtype, np.integer):
    raise errors.UserError(
      f"{split}_labels of {name} is {labels.dtype}{list(labels.shape)}, wanted int[{count}]; give each image one."
    )
  if labels.size and not -1 <= labels.min() <= labels.max() < 2**20:  # A classifier of more would not fit in memory.
    raise errors.UserError(
      f"{split}_labels of {name} has labels from {labels.min()} to {labels.max()}; number the classes from 0, and give "
      "images without a label -1 (largest label: 1048575)."
    )
  every = [np.asarray(arrays[key]) for key in arrays if key.endswith("_labels")]
  return labels.astype(np.int32), max((int(labels.max()) + 1 for labels in every if labels.size), default=0)
