"""Data sets of TensorFlow Datasets (TFDS) that are prepared on disk."""

import tensorflow as tf
import tensorflow_datasets as tfds

from simclr_jax import errors
from simclr_jax.data import source as source_lib
from simclr_jax.data import stored


def open(request: source_lib.Request) -> stored.Stored:
  """Returns one split, or part of one, of the data set `request.name`.

  The data set needs the feature `image`, and has labels where it has a class feature `label` (or, if
  `request.multi_label`, `labels`). Classes of `labels` that VOC's `labels_no_difficult` leaves out count as unknown.
  A data set or split that is not there, or is stored in a form that is not read here, is a UserError.
  """
  builder = _builder(request.name, request.data_dir)
  where = f"{builder.info.full_name} in {builder.data_dir}"
  features = builder.info.features
  kinds = dict(features.items())
  if not isinstance(kinds.get("image"), tfds.features.Image):
    raise errors.UserError(f'{where} has no feature "image"; its features: {", ".join(kinds)}.')
  if builder.info.file_format.value != "tfrecord":
    raise errors.UserError(f"{where} is stored as {builder.info.file_format.value}; prepare it as tfrecord.")
  pieces = _pieces(builder, request.split, where)
  listed = getattr(kinds.get("labels"), "feature", None)  # what `labels` is a sequence of
  many = request.multi_label and "label" not in kinds and isinstance(listed, tfds.features.ClassLabel)
  label = listed if many else kinds.get("label")
  labelled = isinstance(label, tfds.features.ClassLabel)
  # Other features may be slow to decode, as the masks of oxford_iiit_pet.
  used = ("image", *(("labels", "labels_no_difficult") if many else ("label",) if labelled else ()))
  wanted = tfds.features.FeaturesDict({key: kinds[key] for key in used if key in kinds})

  def read(record):
    example = wanted.deserialize_example(record, decoders={"image": tfds.decode.SkipDecoding()})
    if many:
      return example["image"], _multi_hot(example, label.num_classes)
    return example["image"], tf.cast(example["label"], tf.int32) if labelled else tf.constant(-1)

  def read_name(record):
    return features.deserialize_example(record, decoders={"image": tfds.decode.SkipDecoding()})["file_name"]

  return stored.Stored(
    f"{builder.info.full_name} ({request.split})",
    class_names=tuple(label.names) if labelled else (),
    read=read,
    examples=(stored.all_elements(stored.read_pieces(pieces)),) if request.cache else None,
    pieces=() if request.cache else pieces,
    read_name=read_name if isinstance(kinds.get("file_name"), tfds.features.Text) else None,
    multi_label=many,
  )


def split_names(request: source_lib.Request) -> tuple[str, ...]:
  """Returns the names of the prepared splits of the data set `request.name`."""
  return tuple(_builder(request.name, request.data_dir).info.splits)


def _pieces(builder, split: str, where: str) -> tuple[stored.Piece, ...]:
  """Returns which records of which files hold a split; there is at least one."""
  try:
    info = builder.info.splits[split]
    pieces = tuple(
      stored.Piece(str(file.filename), file.skip, file.take if file.take >= 0 else file.examples_in_shard - file.skip)
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
  return pieces


def _multi_hot(example, classes: int) -> tf.Tensor:
  """Returns i32[classes]: 1 for `labels`, -1 for those of them that `labels_no_difficult` leaves out, 0 for others."""
  present, sure = (
    tf.minimum(tf.reduce_sum(tf.one_hot(example[key], classes, dtype=tf.int32), axis=0), 1)
    for key in ("labels", "labels_no_difficult" if "labels_no_difficult" in example else "labels")
  )
  return 2 * sure - present


def _builder(name: str, data_dir: str) -> tfds.core.DatasetBuilder:
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
