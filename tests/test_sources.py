"""Data sources: images, labels and names, the subsets of them, and the messages for mistakes."""

import dataclasses
import io
import logging
import re

import numpy as np
import pytest
import tensorflow as tf
from hidden import hide
from PIL import Image

from simclr_jax import errors, randomness
from simclr_jax.data import arrays, decode, pipeline, shapes, sources, stored
from simclr_jax.data.source import Request

FOLDER = {"split": "train", "max_bad_share": 0.0}


def load(kind, **request):
  return sources.load(kind, Request(**request))


def encoded(color, kind="png", mode="RGB", size=(6, 4)):
  """Returns the bytes of an image of one colour."""
  data = io.BytesIO()
  Image.new("RGB", size, color).convert(mode).save(data, kind)
  return data.getvalue()


def put(root, files):
  for name, data in files.items():
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
  return str(root)


def examples(source):
  """Returns (images, labels) of a source, in the order of the split."""

  def show(content, seed):
    image = decode.decode_image(content)
    return {"size": tf.shape(image), "first": image[0, 0]}

  rows = list(pipeline.evaluation_batches(source, show, batch_size=1))
  return (
    [row["first"][0] for row in rows],
    [int(row["label"][0]) for row in rows],
    [row["size"][0] for row in rows],
  )


def test_class_folders_give_the_labels_in_order_of_their_names(tmp_path):
  root = put(
    tmp_path,
    {
      "dog/deep/er/1.png": encoded((10, 0, 0)),
      "dog/0.PNG": encoded((20, 0, 0)),
      "cat/x.png": encoded((30, 0, 0)),
      "cat/notes.txt": b"no image",
      "cat/.hidden.png": b"no image",
    },
  )
  source = load("folder", data_dir=root, **FOLDER)
  assert (source.num_examples, source.num_classes, source.class_names) == (3, 2, ("cat", "dog"))
  colors, labels, sizes = examples(source)
  assert [color[0] for color in colors] == [30, 20, 10]
  assert labels == [0, 1, 1]
  assert all(size.tolist() == [4, 6, 3] for size in sizes)


def test_a_flat_folder_has_no_labels(tmp_path):
  root = put(tmp_path, {f"{i}.png": encoded((i, 0, 0)) for i in range(3)})
  source = load("folder", data_dir=root, **FOLDER)
  assert (source.num_examples, source.num_classes, source.class_names) == (3, 0, ())
  assert examples(source)[1] == [-1, -1, -1]


def test_folders_of_splits_number_the_classes_alike(tmp_path):
  files = {"train/ape/1.png": encoded(0), "train/bee/1.png": encoded(0), "val/bee/1.png": encoded(0)}
  root = put(tmp_path, {**files, "val/cow/2.png": encoded(0)})
  train = load("folder", data_dir=root, **FOLDER)
  assert examples(train)[1] == [0, 1]
  for split in ("val", "validation"):
    validation = load("folder", data_dir=root, **{**FOLDER, "split": split})
    assert validation.class_names == train.class_names == ("ape", "bee", "cow")
    assert examples(validation)[1] == [1, 2]
  with pytest.raises(errors.UserError, match='has no split "tset"; its splits: train, val;'):
    load("folder", data_dir=root, **{**FOLDER, "split": "tset"})


def test_a_class_may_be_called_train(tmp_path):
  root = put(tmp_path, {f"{kind}/1.png": encoded(0) for kind in ("car", "plane", "train")})
  source = load("folder", data_dir=root, **FOLDER)
  assert source.class_names == ("car", "plane", "train")
  with pytest.raises(errors.UserError, match='has no split "test"; its splits: train;'):
    load("folder", data_dir=root, **{**FOLDER, "split": "test"})


def test_images_outside_the_class_folders_mean_no_labels_and_a_warning(tmp_path, caplog):
  root = put(tmp_path, {"a/1.png": encoded(0), "b/1.png": encoded(0), "loose.png": encoded(0)})
  source = load("folder", data_dir=root, **FOLDER)
  assert (source.num_examples, source.num_classes) == (3, 0)
  assert "1 images are in no class folder" in caplog.text


@pytest.mark.parametrize("data_dir", ["missing", "empty", ""])
def test_a_missing_or_empty_folder_is_a_user_error(tmp_path, data_dir):
  put(tmp_path, {"empty/readme.txt": b"text"})
  with pytest.raises(errors.UserError, match="no folder|no image in folder"):
    load("folder", data_dir=data_dir and str(tmp_path / data_dir), **FOLDER)


def test_corrupt_images_are_left_out_counted_and_named(tmp_path, caplog):
  caplog.set_level(logging.INFO, logger="simclr_jax")
  whole = {f"{i:02d}.png": encoded((i, 0, 0), size=(40, 40)) for i in range(20)}
  photo = io.BytesIO()
  noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
  Image.fromarray(noise).save(photo, "jpeg")
  bad = {"03.png": b"", "07.png": b"text", "11.png": whole["11.png"][:60], "12.jpg": photo.getvalue()[:1500]}
  root = put(tmp_path, {**whole, **bad, "good.jpg": photo.getvalue(), "notes.txt": b""})
  source = load("folder", data_dir=root, split="train", max_bad_share=0.25)
  assert source.num_examples == 18
  assert [color[0] for color in examples(source)[0]][:17] == [i for i in range(20) if i not in (3, 7, 11)]
  assert "4 of 22 images cannot be read and are left out" in caplog.text
  assert re.findall(r"left out: (\S+)", caplog.text) == sorted(bad)
  assert "1 files that are no images are ignored" in caplog.text
  with pytest.raises(errors.UserError, match=r"4 of 22 images .* cannot be read \(first: 03\.png\), more than"):
    load("folder", data_dir=root, split="train", max_bad_share=0.1)


def test_a_folder_of_nothing_but_corrupt_images_is_a_user_error(tmp_path):
  with pytest.raises(errors.UserError, match="1 of 1 images"):
    load("folder", data_dir=put(tmp_path, {"a.png": b"text"}), split="train", max_bad_share=1.0)


@pytest.mark.parametrize(
  ("kind", "mode"),
  [("png", "P"), ("png", "RGBA"), ("png", "L"), ("png", "LA"), ("png", "1"), ("png", "I;16"), ("gif", "P")]
  + [("jpeg", "RGB"), ("jpeg", "L"), ("jpeg", "CMYK"), ("bmp", "RGB"), ("webp", "RGB"), ("webp", "RGBA")],
)
def test_every_kind_of_image_has_three_channels(tmp_path, kind, mode):
  color = 255 if mode == "1" else 204  # 204 is in the palette of the web
  gray = Image.new("L", (6, 4), color)
  if mode == "I;16":
    image = Image.fromarray(np.full([4, 6], 204 * 257, np.uint16))
  else:
    image = gray if mode == "L" else gray.convert("RGB").convert(mode)
  image.save(tmp_path / f"a.{kind}")
  colors, _, sizes = examples(load("folder", data_dir=str(tmp_path), **FOLDER))
  assert sizes[0].tolist() == [4, 6, 3]
  np.testing.assert_allclose(colors[0].astype(int), [color] * 3, atol=3)


def test_a_cached_folder_gives_the_same_images(tmp_path):
  root = put(tmp_path, {f"{i % 2}/{i}.png": encoded((i, 0, 0)) for i in range(6)})
  plain = load("folder", data_dir=root, **FOLDER)
  cached = load("folder", data_dir=root, cache=True, **FOLDER)
  for path in tmp_path.rglob("*.png"):
    path.unlink()
  colors, labels, _ = examples(cached)
  assert [color[0] for color in colors] == [0, 2, 4, 1, 3, 5]
  assert labels == [0, 0, 0, 1, 1, 1]
  with pytest.raises(tf.errors.OpError):  # an image that vanishes stops the run
    examples(plain)


def test_arrays_come_from_memory_and_from_npz_files(tmp_path):
  images = np.arange(4 * 2 * 2 * 3, dtype=np.uint8).reshape(4, 2, 2, 3)
  held = {"train_images": images, "train_labels": np.array([2, 0, 1, 2]), "test_images": images[:1]}
  np.savez(tmp_path / "a.npz", **held)
  from_file = load("arrays", split="train", data_dir=str(tmp_path / "a.npz"))
  for source in (arrays.from_mapping(held, "train"), from_file):
    assert (source.num_examples, source.num_classes, source.class_names) == (4, 3, ("0", "1", "2"))
    colors, labels, _ = examples(source)
    np.testing.assert_array_equal(colors, images[:, 0, 0])
    assert labels == [2, 0, 1, 2]
  test = arrays.from_mapping(held, "test")
  assert (test.num_examples, test.num_classes) == (1, 0)


def test_arrays_may_hold_encoded_images(tmp_path):
  data = [encoded((i, 0, 0)) for i in range(5)]
  held = {
    "test_bytes": np.frombuffer(b"".join(data), np.uint8),
    "test_offsets": np.cumsum([0] + [len(d) for d in data]),
    "test_labels": np.array([0, 1, 0, 1, 0], np.uint8),
    "class_names": np.array(["no", "yes"]),
  }
  np.savez(tmp_path / "a.npz", **held)
  source = load("arrays", split="test", data_dir=str(tmp_path / "a.npz"))
  assert source.class_names == ("no", "yes")
  colors, labels, sizes = examples(source)
  assert [color[0] for color in colors] == [0, 1, 2, 3, 4]
  assert labels == [0, 1, 0, 1, 0]
  assert sizes[0].tolist() == [4, 6, 3]


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"train_images": np.zeros([4, 2, 2, 3], np.float32)}, r"float32\[4, 2, 2, 3\]; convert it to uint8"),
    ({"train_images": np.zeros([4, 2, 2], np.uint8)}, r"uint8\[4, 2, 2\]; convert it to uint8\[N, H, W, 3\]"),
    ({"train_labels": np.zeros([3], int)}, r"train_labels .* int64\[3\], wanted int\[4\]"),
    ({"train_labels": np.zeros([4])}, r"train_labels .* float64\[4\], wanted int\[4\]"),
    ({"class_names": np.array(["one"])}, "1 class_names and labels up to 1"),
  ],
)
def test_arrays_of_another_form_are_a_user_error(change, message):
  held = {"train_images": np.zeros([4, 2, 2, 3], np.uint8), "train_labels": np.array([0, 1, 0, 1])}
  with pytest.raises(errors.UserError, match=message):
    arrays.from_mapping({**held, **change}, "train")


def test_offsets_that_do_not_cut_the_bytes_are_a_user_error():
  for offsets in ([0, 5, 3], [0, 11], [-1, 4], []):
    with pytest.raises(errors.UserError, match="do not cut its 10 bytes"):
      arrays.from_mapping({"a_bytes": np.zeros(10, np.uint8), "a_offsets": np.array(offsets)}, "a")
  with pytest.raises(errors.UserError, match="no a_offsets; add them"):
    arrays.from_mapping({"a_bytes": np.zeros(10, np.uint8)}, "a")


def test_a_file_that_holds_no_arrays_is_a_user_error(tmp_path):
  put(tmp_path, {"text.npz": b"text", "empty.npz": b"", "cut.npz": b"PK\x03\x04 and no more"})
  np.save(tmp_path / "one.npy", np.zeros(3))
  np.savez(tmp_path / "a.npz", train_images=np.zeros([1, 2, 2, 3], np.uint8))
  for name in ("text.npz", "empty.npz", "cut.npz", "one.npy", "missing.npz"):
    with pytest.raises(errors.UserError, match=re.escape(name)):
      load("arrays", split="train", data_dir=str(tmp_path / name))
  with pytest.raises(errors.UserError, match='no split "trian".*its splits: train; did you mean "train"'):
    load("arrays", split="trian", data_dir=str(tmp_path / "a.npz"))


def test_the_shapes_are_a_source():
  source = load("shapes", split="test", num_examples=20, image_size=32, seed=3)
  images, labels = shapes.draw("test", 20, 32, 3)
  assert (source.num_examples, source.num_classes, source.class_names) == (20, 10, shapes.CLASS_NAMES)
  colors, given, _ = examples(source)
  np.testing.assert_array_equal(colors, images[:, 0, 0])
  assert given == labels.tolist()
  with pytest.raises(errors.UserError, match='no split "validation"; their splits: train, test'):
    load("shapes", split="validation", num_examples=20)
  with pytest.raises(errors.UserError, match="0 shapes asked for; set"):
    load("shapes", split="train")


def test_an_unknown_source_gets_the_nearest_name():
  with pytest.raises(errors.UserError, match='unknown data source "tdfs".*did you mean "tfds"'):
    load("tdfs", split="train")


def test_a_range_of_records_is_cut_out_of_pieces_of_files():
  pieces = [stored.Piece("a", 2, 5), stored.Piece("b", 0, 3), stored.Piece("c", 1, 4)]
  held = [(piece.file, piece.skip + k) for piece in pieces for k in range(piece.take)]
  for begin in range(13):
    for end in range(begin, 13):
      cut = stored.pieces_between(pieces, begin, end)
      assert [(piece.file, piece.skip + k) for piece in cut for k in range(piece.take)] == held[begin:end]
      assert all(piece.take > 0 for piece in cut)


@pytest.fixture
def tiny_tfds(tmp_path):
  """A TFDS folder with the data set tiny: 11 and 4 images of the sizes (4 + i, 5), in 3 files and 1."""
  import tensorflow_datasets as tfds

  kinds = {
    "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
    "label": tfds.features.ClassLabel(names=["x", "y"]),
  }
  folder = tmp_path / "tiny" / "1.0.0"
  folder.mkdir(parents=True)
  features = tfds.features.FeaturesDict(kinds)
  infos = []
  for split, lengths in {"train": [4, 4, 3], "test": [4]}.items():
    number = 0
    for shard, length in enumerate(lengths):
      name = f"tiny-{split}.tfrecord-{shard:05d}-of-{len(lengths):05d}"
      with tf.io.TFRecordWriter(str(folder / name)) as writer:
        for _ in range(length):
          image = np.full([4 + number, 5, 3], number, np.uint8)
          writer.write(features.serialize_example(features.encode_example({"image": image, "label": number % 2})))
          number += 1
    template = tfds.core.ShardedFileTemplate(
      folder, "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}", "tiny", split, "tfrecord"
    )
    infos.append(tfds.core.SplitInfo(name=split, shard_lengths=lengths, num_bytes=0, filename_template=template))
  tfds.folder_dataset.write_metadata(data_dir=folder, features=features, split_infos=infos, check_data=False)
  return str(tmp_path)


@pytest.mark.parametrize("cache", [False, True])
def test_tfds_splits_and_parts_of_splits_hold_their_images(tiny_tfds, cache):
  for split, numbers in {
    "train": range(11),
    "test": range(4),
    "train[3:9]": range(3, 9),
    "train[:50%]": range(6),
  }.items():
    source = load("tfds", name="tiny", split=split, data_dir=tiny_tfds, cache=cache)
    assert (source.num_examples, source.num_classes, source.class_names) == (len(numbers), 2, ("x", "y"))
    colors, labels, sizes = examples(source)
    assert [color[0] for color in colors] == list(numbers)
    assert labels == [number % 2 for number in numbers]
    assert [size.tolist() for size in sizes] == [[4 + number, 5, 3] for number in numbers]
  both = load("tfds", name="tiny", split="test+train[:2]", data_dir=tiny_tfds, cache=cache)
  assert [color[0] for color in examples(both)[0]] == [0, 1, 2, 3, 0, 1]


@pytest.mark.parametrize(
  ("name", "split", "message"),
  [
    ("tiny", "trian", 'cannot take split "trian" .*its splits: train, test.*did you mean "train"'),
    ("tiny", "train[", "cannot take split"),
    ("tiny", "train[:0]", "it holds no example"),
    ("tiny", "train[5:3]", "it holds no example"),
    ("tinny", "train", 'unknown TFDS data set "tinny".*did you mean "tiny"'),
    ("cifar11", "train", 'unknown TFDS data set "cifar11".*did you mean "cifar1'),
    ("cifar10", "train", "is not prepared .*tfds build cifar10 --data_dir="),
    ("mnist/x", "train", 'cannot open TFDS data set "mnist/x".*BuilderConfig x not found'),
    ("a/b/c", "train", 'cannot open TFDS data set "a/b/c"'),
    ("", "train", 'cannot open TFDS data set ""'),
  ],
)
def test_unknown_tfds_names_and_splits_get_one_line(tiny_tfds, name, split, message):
  with pytest.raises(errors.UserError, match=message) as caught:
    load("tfds", name=name, split=split, data_dir=tiny_tfds)
  assert "\n" not in str(caught.value)


def test_a_missing_tfds_folder_is_a_user_error(tmp_path):
  with pytest.raises(errors.UserError, match="no folder .*set data_dir to the folder"):
    load("tfds", name="cifar10", split="train", data_dir=str(tmp_path / "none"))


def test_real_tfds_data_sets_open(tfds_dir):
  cifar = load("tfds", name="cifar10", split="test[:1%]", data_dir=tfds_dir)
  assert (cifar.num_examples, cifar.num_classes, cifar.class_names[3]) == (100, 10, "cat")
  assert all(size.tolist() == [32, 32, 3] for size in examples(cifar)[2])
  subset = load("tfds", name="imagenet2012_subset/1pct", split="train", data_dir=tfds_dir, cache=True)
  assert (subset.num_examples, subset.num_classes) == (20, 1000)
  assert len(set(examples(subset)[1])) == 20


# What all sources have in common.


def in_memory():
  """Returns five images whose pixels and numbers are equal, with labels 0 and 1."""
  images = np.broadcast_to(np.arange(5, dtype=np.uint8)[:, None, None, None], (5, 4, 6, 3))
  return arrays.from_mapping({"train_images": images, "train_labels": np.arange(5) % 2}, "train")


@pytest.fixture(params=["arrays", "encoded", "tensors", "folder", "tfds"])
def source(request, tmp_path):
  """Five images of each implementation; the pixels of image i are i and its label is i % 2."""
  if request.param in ("arrays", "tensors"):
    return in_memory() if request.param == "arrays" else in_memory().stored()
  if request.param == "encoded":
    data = [encoded((i, i, i)) for i in range(5)]
    held = {"train_bytes": np.frombuffer(b"".join(data), np.uint8), "train_labels": np.arange(5) % 2}
    return arrays.from_mapping({**held, "train_offsets": np.cumsum([0, *map(len, data)])}, "train")
  if request.param == "folder":
    root = put(tmp_path, {f"{i}.png": encoded((i, i, i)) for i in range(5)})
    folder = load("folder", data_dir=root, **FOLDER)
    # A flat folder has no labels: these are taken from the number of the image.
    read = lambda path, _: (folder.read(path, _)[0], tf.strings.to_number(tf.strings.substr(path, -5, 1), tf.int32) % 2)
    return dataclasses.replace(folder, class_names=("0", "1"), read=read)
  pieces = []
  for name, numbers in {"a": [0, 1], "b": [2, 3, 4]}.items():
    path = str(tmp_path / name)
    with tf.io.TFRecordWriter(path) as writer:
      for number in numbers:
        writer.write(str(number).encode())
    pieces.append(stored.Piece(path, 0, len(numbers)))

  def read(record):
    number = tf.strings.to_number(record, tf.int32)
    return tf.cast(tf.fill([4, 6, 3], number), tf.uint8), number % 2

  return stored.Stored("files", ("0", "1"), read, pieces=tuple(pieces), read_name=lambda record: record)


def assert_holds(source, numbers):
  """Checks that a source holds the images of these numbers."""
  names = {str(number) for number in numbers} | {f"{number}.png" for number in numbers}
  assert source.num_examples == len(numbers)
  np.testing.assert_array_equal(source.labels(), np.array(numbers) % 2)
  held = source.decoded()
  np.testing.assert_array_equal(held.images, np.broadcast_to(np.array(numbers)[:, None, None, None], held.images.shape))
  np.testing.assert_array_equal(held.labels(), np.array(numbers) % 2)
  assert set(source.names()) <= names or not source.has_names
  assert [int(color[0]) for color in examples(source)[0]] == list(numbers)


@pytest.mark.slow
def test_every_source_gives_its_images_and_its_subsets(source):
  assert (source.num_examples, source.num_classes, source.multi_label) == (5, 2, False)
  assert_holds(source, range(5))
  assert_holds(source.take(np.array([0, 2, 3])), [0, 2, 3])
  part = source.consecutive(1, 4)
  assert_holds(part, range(1, 4))
  assert part.names() == source.names()[1:4]
  assert_holds(part.take(np.array([0, 2])), [1, 3])
  assert_holds(part.stored(), range(1, 4))
  assert source.sample(5, 0) is source
  if getattr(source, "pieces", ()):
    assert_holds(source.sample(2, 0), [0, 2])
  else:
    assert_holds(source.sample(2, 0), np.sort(randomness.host(0, randomness.SAMPLE).permutation(5)[:2]))


def test_every_kind_of_source_names_its_splits(tmp_path):
  np.savez(tmp_path / "a.npz", a_images=np.zeros([1, 2, 2, 3], np.uint8), b_images=np.zeros([1, 2, 2, 3], np.uint8))
  root = put(tmp_path, {f"{split}/a/1.png": encoded(0) for split in ("train", "val")})
  assert sources.split_names("arrays", Request("", data_dir=str(tmp_path / "a.npz"))) == ("a", "b")
  assert sources.split_names("shapes", Request("")) == ("train", "test")
  assert sources.split_names("folder", Request("", data_dir=root)) == ("train", "validation")
  assert sources.split_names("folder", Request("", data_dir=f"{root}/val")) == ("train",)


def test_without_tensorflow_only_arrays_and_shapes_open(monkeypatch):
  hide(monkeypatch, "tensorflow")
  for kind in ("tfds", "folder"):
    with pytest.raises(errors.UserError, match=f"config.data.source {kind} is read by TensorFlow, .*resident=true"):
      load(kind, split="train", data_dir="anywhere")
  drawn = load("shapes", split="train", num_examples=3)
  assert drawn.decoded() is drawn
  with pytest.raises(errors.UserError, match=r"shapes \(train\) is streamed by TensorFlow, which is not installed"):
    drawn.stored()
