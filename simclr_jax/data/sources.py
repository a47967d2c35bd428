"""Where images come from: TensorFlow Datasets, a folder of files, arrays, or the built-in shapes."""

import dataclasses
import logging
import os
from collections.abc import Callable, Sequence

import numpy as np
import tensorflow as tf

from simclr_jax import errors
from simclr_jax.data import arrays

tf.config.set_visible_devices([], "GPU")  # the accelerators belong to JAX

SOURCES = ("tfds", "folder", "arrays", "shapes")
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp")
SPLIT_FOLDERS = {"train": ("train",), "test": ("test",), "validation": ("validation", "val", "valid")}

log = logging.getLogger("simclr_jax")


@dataclasses.dataclass(frozen=True)
class Piece:
  """`take` consecutive records of a TFRecord file, after the first `skip`."""

  file: str
  skip: int
  take: int


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
  """One split of images.

  Attributes:
    name: for messages.
    num_examples: of the split.
    num_classes: 0 without labels.
    class_names: one for each class.
    read: a stored example (TensorFlow) to (content, label i32[], -1 if it has none); the content is an image
      u8[H, W, 3] or the bytes of an encoded one. Of a multi-label source the label is i32[num_classes]: 1 the image
      shows the class, 0 it does not, -1 nobody can tell.
    examples: tensors whose row i is stored example i; None when the examples stay in `pieces`.
    pieces: of TFRecord files whose records, one after the other, are the stored examples.
    names: of the examples, where they come with the source; see `names_of`.
    read_name: a stored example (TensorFlow) to its name, where that is part of it.
    multi_label: whether an image has any number of classes.
  """

  name: str
  num_examples: int
  num_classes: int
  class_names: tuple[str, ...]
  read: Callable
  examples: tuple[tf.Tensor, ...] | None = None
  pieces: tuple[Piece, ...] = ()
  names: tuple[str, ...] = ()
  read_name: Callable | None = None
  multi_label: bool = False


def load(
  source: str,
  *,
  split: str,
  name: str = "",
  data_dir: str = "",
  image_size: int = 32,
  cache: bool = False,
  max_bad_share: float = 0.01,
  num_examples: int = 0,
  seed: int = 0,
  multi_label: bool = False,
) -> Source:
  """Returns one split of a source.

  Args:
    source: "tfds", "folder", "arrays" or "shapes".
    split: its name; for TFDS also a part of one, as "train[:90%]".
    name: of the TFDS data set, as "imagenet2012_subset/1pct".
    data_dir: TFDS folder, image folder or .npz file.
    image_size: of the shapes.
    cache: whether the encoded images of TFDS or of a folder are kept in memory.
    max_bad_share: of the images of a folder that may be unreadable.
    num_examples, seed: of the shapes.
    multi_label: whether a TFDS data set without the feature `label` may give its `labels`, any number of classes for an
      image (VOC's are: what only `labels_no_difficult` leaves out is -1). Others see a data set without labels then.
  """
  if source == "tfds":
    return _tfds(name, split, data_dir, cache, multi_label)
  if source == "folder":
    return _folder(data_dir, split, cache, max_bad_share)
  if source == "arrays":
    return in_memory(arrays.from_npz(data_dir, split))
  if source == "shapes":
    return in_memory(arrays.from_shapes(split, num_examples, image_size, seed))
  raise errors.UserError(
    f'unknown data source "{source}"; use one of {", ".join(SOURCES)}{errors.nearest(source, SOURCES)}'
  )


def split_names(source: str, *, name: str = "", data_dir: str = "") -> tuple[str, ...]:
  """Returns the splits of a TFDS data set that is prepared, or of a folder (train, validation, test), by name."""
  if source == "tfds":
    return tuple(_builder(name, data_dir).info.splits)
  return tuple(_split_folders([path.split(os.sep) for path in _files_of(data_dir)])) or ("train",)


def in_memory(held: arrays.Arrays) -> Source:
  """Returns the source of images that are in memory already."""
  return Source(
    held.name,
    num_examples=len(held.images),
    num_classes=len(held.class_names),
    class_names=held.class_names,
    read=lambda content, label: (content, label),
    examples=_on_host(held.images, held.labels),
  )


def stored(source: Source) -> tf.data.Dataset:
  """Returns the stored examples of the split in order, each a tuple."""
  if source.examples is not None:
    return tf.data.Dataset.from_tensor_slices(source.examples)
  return records(source.pieces).map(lambda record: (record,))


def names_of(source: Source) -> tuple[str, ...]:
  """Returns a name for each example: a folder's relative paths, TFDS's file names, else its number in the split."""
  if source.names:
    return source.names
  if source.read_name is None:
    return tuple(map(str, range(source.num_examples)))
  rows = stored(source).map(source.read_name, num_parallel_calls=os.cpu_count()).batch(4096)
  return tuple(name.decode() for block in rows.as_numpy_iterator() for name in block)


def labels_of(source: Source) -> np.ndarray:
  """Returns the label of each example, i32[N], without decoding any image; -1 where there is none."""
  rows = stored(source).map(lambda *example: source.read(*example)[1], num_parallel_calls=os.cpu_count())
  return np.concatenate([np.zeros(0, np.int32), *rows.batch(4096).as_numpy_iterator()])


def rows_of(source: Source, rows: np.ndarray) -> tuple[tf.Tensor, ...]:
  """Returns the stored examples of some rows (sorted), in memory, as `Source.examples` has them."""
  if source.examples is not None:
    with tf.device("CPU"):
      return tuple(tf.gather(column, rows) for column in source.examples)
  wanted = np.zeros(source.num_examples, bool)
  wanted[rows] = True
  chosen = tf.data.Dataset.zip(stored(source), tf.data.Dataset.from_tensor_slices(wanted))
  chosen = chosen.filter(lambda _, use: use).map(lambda example, _: example[0])
  return (_all_rows(chosen),)


def decoded(source: Source) -> arrays.Arrays:
  """Returns the split in memory with its images decoded; they must have one size."""
  rows = stored(source)

  def decode(*stored):
    content, label = source.read(*stored)
    return decode_image(content), label

  images, labels = None, np.empty(source.num_examples, np.int32)
  for number, (image, label) in enumerate(rows.map(decode, num_parallel_calls=os.cpu_count()).as_numpy_iterator()):
    if images is None:
      images = np.empty((source.num_examples, *image.shape), np.uint8)
    arrays.check_size(image, images[0], number, source.name)
    images[number], labels[number] = image, label
  return arrays.Arrays(source.name, images, labels, source.class_names, names_of(source))


def decode_image(content):
  """Returns u8[H, W, 3] for the bytes of a JPEG, PNG, BMP, GIF (its first frame) or WebP image.

  An image is returned as it is.
  """
  if content.dtype != tf.string:
    return content
  return tf.ensure_shape(tf.io.decode_image(content, channels=3, expand_animations=False), [None, None, 3])


def _on_host(*arrays):
  with tf.device("CPU"):
    return tuple(tf.constant(array) for array in arrays)


# TensorFlow Datasets.


def _tfds(name, split, data_dir, cache, multi_label):
  builder = _builder(name, data_dir)
  where = f"{builder.info.full_name} in {builder.data_dir}"
  features = builder.info.features
  kinds = dict(features.items())
  import tensorflow_datasets as tfds

  if not isinstance(kinds.get("image"), tfds.features.Image):
    raise errors.UserError(f'{where} has no feature "image"; its features: {", ".join(kinds)}.')
  if builder.info.file_format.value != "tfrecord":
    raise errors.UserError(f"{where} is stored as {builder.info.file_format.value}; prepare it as tfrecord.")
  try:
    info = builder.info.splits[split]
    pieces = tuple(
      Piece(str(file.filename), file.skip, file.take if file.take >= 0 else file.examples_in_shard - file.skip)
      for file in info.file_instructions
    )
    if not pieces or any(piece.take <= 0 for piece in pieces):
      raise ValueError("it holds no example")
  except (ValueError, KeyError) as error:
    known = list(builder.info.splits)
    raise errors.UserError(
      f'cannot take split "{split}" of {where}: {str(error).splitlines()[0]}; '
      f"its splits: {', '.join(known)}, and parts as train[:90%]{errors.nearest(split, known)}"
    ) from error

  label = kinds.get("label")
  many = kinds.get("labels") if multi_label and "label" not in kinds else None
  many = isinstance(many, tfds.features.Sequence) and isinstance(many.feature, tfds.features.ClassLabel)
  label = kinds["labels"].feature if many else label
  labelled = isinstance(label, tfds.features.ClassLabel)
  # Only what is used: others may be large to decode, as the masks of oxford_iiit_pet.
  used = ("image", *(("labels", "labels_no_difficult") if many else ("label",) if labelled else ()))
  wanted = tfds.features.FeaturesDict({key: kinds[key] for key in used if key in kinds})

  def read(record):
    example = wanted.deserialize_example(record, decoders={"image": tfds.decode.SkipDecoding()})
    if many:
      return example["image"], _multi_hot(example, label.num_classes)
    return example["image"], tf.cast(example["label"], tf.int32) if labelled else tf.constant(-1)

  def read_name(record):
    return features.deserialize_example(record, decoders={"image": tfds.decode.SkipDecoding()})["file_name"]

  return Source(
    f"{builder.info.full_name} ({split})",
    num_examples=sum(piece.take for piece in pieces),
    num_classes=label.num_classes if labelled else 0,
    class_names=tuple(label.names) if labelled else (),
    read=read,
    examples=(_all_rows(records(pieces)),) if cache else None,
    pieces=() if cache else pieces,
    read_name=read_name if isinstance(kinds.get("file_name"), tfds.features.Text) else None,
    multi_label=many,
  )


def _multi_hot(example, classes):
  """Returns i32[classes]: 1 for `labels`, -1 for those of them that `labels_no_difficult` leaves out, 0 for others."""
  present, sure = (
    tf.minimum(tf.reduce_sum(tf.one_hot(example[key], classes, dtype=tf.int32), axis=0), 1)
    for key in ("labels", "labels_no_difficult" if "labels_no_difficult" in example else "labels")
  )
  return 2 * sure - present


def cut(pieces: Sequence[Piece], begin: int, end: int) -> list[Piece]:
  """Returns the pieces that hold the records `begin` to `end` of `pieces`."""
  found, first = [], 0
  for piece in pieces:
    low, high = max(begin, first), min(end, first + piece.take)
    if low < high:
      found.append(Piece(piece.file, piece.skip + low - first, high - low))
    first += piece.take
  return found


def records(pieces: Sequence[Piece]) -> tf.data.Dataset:
  """Returns the stream of the records of `pieces`, one after the other."""
  return records_of(
    np.array([piece.file for piece in pieces], np.str_),
    np.array([piece.skip for piece in pieces], np.int64),
    np.array([piece.take for piece in pieces], np.int64),
  )


def records_of(files, skips, takes) -> tf.data.Dataset:
  """Returns the stream of `takes[i]` records of `files[i]` after the first `skips[i]`, for each i in turn."""
  pieces = tf.data.Dataset.from_tensor_slices((files, skips, takes))
  stream = pieces.flat_map(lambda file, skip, take: tf.data.TFRecordDataset(file).skip(skip).take(take))
  # A file that holds fewer records than its data set says is an error, not a shorter epoch.
  return stream.apply(tf.data.experimental.assert_cardinality(tf.reduce_sum(takes)))


def _all_rows(dataset):
  """Returns all elements of a finite dataset in one tensor, with a leading axis."""
  return tf.concat(list(dataset.batch(4096)), 0)


def _builder(name, data_dir):
  """Returns the TFDS builder of a data set that is prepared on disk."""
  import tensorflow_datasets as tfds

  place = f' in "{data_dir}"' if data_dir else ""
  if data_dir and not tf.io.gfile.isdir(data_dir):
    raise errors.UserError(f'no folder "{data_dir}"; set data_dir to the folder that holds the TFDS data sets.')
  try:
    builder = tfds.builder(name, data_dir=data_dir or None)
  except tfds.core.DatasetNotFoundError as error:
    known = {*tfds.list_builders(), *(tf.io.gfile.listdir(data_dir) if data_dir else ())}
    raise errors.UserError(
      f'unknown TFDS data set "{name}"{place}; see https://www.tensorflow.org/datasets/catalog'
      f"{errors.nearest(name.split('/')[0], (entry.rstrip('/') for entry in known))}"
    ) from error
  except (ValueError, AssertionError) as error:
    reason = " ".join(str(error).rsplit('": ', 1)[-1].splitlines()[:3])
    raise errors.UserError(f'cannot open TFDS data set "{name}"{place}: {reason}') from error
  if not builder.info.splits:
    command = f"tfds build {name}" + (f" --data_dir={data_dir}" if data_dir else "")
    raise errors.UserError(f'TFDS data set "{name}" is not prepared{place}; prepare it with: {command}')
  return builder


# A folder of images.


def _folder(root, split, cache, max_bad_share):
  files = _files_of(root)
  paths, kinds, class_names = _choose(root, split, files)
  good = _readable(root, paths, max_bad_share)
  log.info("%s: split %s has %d images in %d classes.", root, split, len(good), len(class_names))
  class_of = {class_name: number for number, class_name in enumerate(class_names)}
  labels = np.array([class_of.get(kinds[number], -1) for number in good], np.int32)
  content, labels = _on_host(np.array([os.path.join(root, paths[number]) for number in good]), labels)
  load = tf.io.read_file
  if cache:
    content, load = _all_rows(tf.data.Dataset.from_tensor_slices(content).map(load)), tf.identity
  return Source(
    f"{root} ({split})",
    num_examples=len(good),
    num_classes=len(class_names),
    class_names=class_names,
    read=lambda path, label: (load(path), label),
    examples=(content, labels),
    names=tuple(paths[number] for number in good),
  )


def _files_of(root):
  """Returns the sorted paths, relative to `root`, of the images under it; there is at least one."""
  if not root or not tf.io.gfile.isdir(root):
    raise errors.UserError(f'no folder "{root}"; set data_dir to the folder that holds the images.')
  files, others = _image_files(root)
  if not files:
    raise errors.UserError(f'no image in folder "{root}"; put files there that end in {", ".join(IMAGE_ENDINGS)}.')
  if others:
    log.info("%s: %d files that are no images are ignored.", root, others)
  return files


def _image_files(root):
  """Returns the sorted paths, relative to `root`, of the images under it, and the number of other files."""
  images, others = [], 0
  for folder, _, names in tf.io.gfile.walk(root):
    for name in names:
      path = os.path.relpath(os.path.join(folder, name), root)
      hidden = any(part.startswith(".") for part in path.split(os.sep))
      if hidden or not name.lower().endswith(IMAGE_ENDINGS):
        others += 1
      else:
        images.append(path)
  return sorted(images), others


def _choose(root, split, files):
  """Returns the images of one split: their paths, the class (or "") of each, and the names of all classes.

  The classes are those of all splits together, so that every split numbers them alike.
  """
  parts = [path.split(os.sep) for path in files]
  splits = _split_folders(parts)
  wanted = next((name for name, known in SPLIT_FOLDERS.items() if split in known), split)
  if wanted not in (splits or ("train",)):
    known = list(splits.values()) or ["train"]
    raise errors.UserError(
      f'folder "{root}" has no split "{split}"; its splits: {", ".join(known)}; '
      f"put the images of a split into a sub-folder of that name{errors.nearest(split, known)}"
    )
  depth = 1 if splits else 0
  used = [names for names in parts if not splits or names[0] in splits.values()]
  if len(used) < len(files):
    log.warning("%s: %d images outside the folders of splits are not used.", root, len(files) - len(used))
  loose = sum(len(names) == depth + 1 for names in used)
  if 0 < loose < len(used):
    log.warning("%s: %d images are in no class folder, so no image has a label.", root, loose)
  class_names = () if loose else tuple(sorted({names[depth] for names in used}))
  chosen = [names for names in used if not splits or names[0] == splits[wanted]]
  kinds = [names[depth] if class_names else "" for names in chosen]
  return [os.path.join(*names) for names in chosen], kinds, class_names


def _split_folders(parts):
  """Returns {split: its folder}, empty where there are none, given the parts of each image's path."""
  tops = {names[0] for names in parts if len(names) > 1}
  splits = {name: top for name, known in SPLIT_FOLDERS.items() for top in sorted(tops) if top in known}
  # A class may be called "train": folders of splits come in numbers, or alone.
  return {} if len(splits) < 2 and tops - set(splits.values()) else splits


def _readable(root, paths, max_bad_share):
  """Returns which of `paths` are images that decode; others are named in the log, too many stop the run."""

  def size(number, path):
    return number, tf.shape(decode_image(tf.io.read_file(path)))

  (names,) = _on_host(np.array([os.path.join(root, path) for path in paths]))
  numbered = tf.data.Dataset.from_tensor_slices(names).enumerate()
  decoded = numbered.map(size, num_parallel_calls=os.cpu_count()).ignore_errors().batch(1024)
  good = sorted(number for numbers, _ in decoded.as_numpy_iterator() for number in numbers.tolist())
  bad = sorted(set(range(len(paths))) - set(good))
  if len(bad) > max_bad_share * len(paths) or not good:
    raise errors.UserError(
      f'{len(bad)} of {len(paths)} images in "{root}" cannot be read (first: {paths[bad[0]]}), more than the '
      f"allowed share of {max_bad_share}; repair or remove them, or raise max_bad_share."
    )
  if bad:
    log.warning("%s: %d of %d images cannot be read and are left out:", root, len(bad), len(paths))
  for number in bad:
    log.warning("  left out: %s", paths[number])
  return good
