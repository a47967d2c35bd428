"""Folders as their owners have them: spellings, wrappers, links, runs inside, odd images, and parts held out."""

import io
import json
import os

import numpy as np
import pytest
import tifffile
from PIL import Image

from simclr_jax import config as config_lib
from simclr_jax import errors, experiment
from simclr_jax.data import arrays, decode, parts, pictures, source, sources


def write(root, *names, image=None):
  """Writes an image, of any content, under each name."""
  image = image or Image.fromarray(np.full((4, 6, 3), 90, np.uint8))
  for name in names:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
  return str(root)


def opened(root, split="train", **more):
  return sources.load("folder", source.Request(split, data_dir=str(root), **more))


def table(images):
  """Returns {name: class} of a source; "" without one."""
  names = (*images.class_names, "")
  return {name: names[label] for name, label in zip(images.names(), images.labels(), strict=True)}


@pytest.mark.parametrize(
  ("train", "test"), [("Training", "Testing"), ("Train", "Test"), ("TRAIN", "valid"), ("training_set", "test_set")]
)
def test_the_usual_spellings_of_splits_are_known(tmp_path, train, test):
  root = write(tmp_path, *(f"{top}/{kind}/{i}.png" for top in (train, test) for kind in ("cat", "dog") for i in "12"))
  assert sources.split_names("folder", source.Request("", data_dir=root))[0] == "train"
  images = opened(root)
  assert images.class_names == ("cat", "dog")
  assert set(images.names()) == {f"{train}/{kind}/{i}.png" for kind in ("cat", "dog") for i in "12"}
  other = opened(root, "val" if test == "valid" else "test")
  assert set(other.names()) == {f"{test}/{kind}/{i}.png" for kind in ("cat", "dog") for i in "12"}
  assert opened(root, test).names() == other.names()


@pytest.mark.parametrize("inside", ["images", "archive/data"])
def test_a_folder_around_everything_is_no_class(tmp_path, inside):
  root = write(tmp_path, *(f"{inside}/{kind}/1.png" for kind in ("cat", "dog")))
  assert table(opened(root)) == {f"{inside}/cat/1.png": "cat", f"{inside}/dog/1.png": "dog"}


def test_tiny_imagenet_as_it_is_unpacked(tmp_path):
  names = [f"tiny/train/{kind}/images/{kind}_{i}.JPEG" for kind in ("n01", "n02") for i in "01"]
  root = write(tmp_path, *names, "tiny/val/images/val_0.JPEG", "tiny/val/images/val_1.JPEG", "tiny/test/images/t.JPEG")
  (tmp_path / "tiny/val/val_annotations.txt").write_text("val_0.JPEG\tn02\t0\t0\t9\t9\nval_1.JPEG\tn01\t0\t0\t9\t9\n")
  assert table(opened(root)) == {name: name.split("/")[2] for name in names}
  assert table(opened(root, "val")) == {"tiny/val/images/val_0.JPEG": "n02", "tiny/val/images/val_1.JPEG": "n01"}
  unlabelled = opened(root, "test")
  assert unlabelled.class_names == ("n01", "n02")
  assert unlabelled.labels().tolist() == [-1]


def test_links_to_a_folder_above_are_not_followed(tmp_path, caplog):
  root = write(tmp_path / "all", *(f"{kind}/{i}.png" for kind in ("cat", "dog") for i in range(3)))
  os.symlink(root, tmp_path / "all/cat/again")
  os.symlink(tmp_path / "all/dog", tmp_path / "all/elk")
  images = opened(root)
  assert images.num_examples == 9  # A link to a folder beside is a class like others.
  assert images.class_names == ("cat", "dog", "elk")
  assert "cat/again is a link to a folder above it" in caplog.text


def test_what_a_run_left_inside_is_no_image(tmp_path, caplog):
  root = write(tmp_path, "cat/1.png", "dog/1.png", "runs/mine/figures/curves.png", "figures/view_pairs.png")
  run = json.dumps({"job": "pretrain", "version": "0", "config": {}})
  (tmp_path / "runs/mine/config.json").write_text(run)
  (tmp_path / "config.json").write_text(run)
  assert set(opened(root).names()) == {"cat/1.png", "dog/1.png"}
  assert "runs/mine is the folder of a run" in caplog.text
  assert "figures belongs to a run" in caplog.text
  # Somebody's own config.json means nothing.
  (tmp_path / "cat/config.json").write_text("[1]")
  assert opened(root).num_examples == 2


def test_formats_that_are_not_read_are_counted(tmp_path, caplog):
  root = write(tmp_path, "cat/1.png", "cat/2.tif", "dog/1.webp")
  (tmp_path / "dog/2.heic").write_bytes(b"x")
  assert opened(root).num_examples == 3
  assert "1 images are in formats that are not read, such as dog/2.heic" in caplog.text
  for number in range(5):
    (tmp_path / f"dog/{number}.dcm").write_bytes(b"x")
  with pytest.raises(errors.UserError, match="6 images are in formats that are not read.*convert them"):
    opened(root)


@pytest.mark.parametrize(
  ("names", "message"),
  [
    (("train/cat/1.png", "train/dog/1.png", "test/elk/1.png"), 'splits "train" .cat, dog.* "test" .elk.* no class in'),
    (("train/cat/1.png", "train/Cat/2.png", "train/dog/3.png"), '"Cat" and "cat" differ in case only'),
    (("val/cat/1.png", "valid/cat/1.png", "train/cat/1.png"), '"val" and "valid" both spell the split validation'),
  ],
)
def test_folders_that_cannot_be_meant_are_refused(tmp_path, names, message):
  with pytest.raises(errors.UserError, match=message):
    opened(write(tmp_path, *names))


def test_the_log_names_the_classes_and_their_counts(tmp_path, caplog):
  caplog.set_level("INFO", "simclr_jax")
  opened(write(tmp_path / "a", "cat/1.png", "cat/2.png", "dog/1.png"))
  assert "split train has 3 images in 2 classes: cat 2, dog 1." in caplog.text
  images = opened(write(tmp_path / "b", "photos/1.png", "photos/2.png"))
  assert images.class_names == ()
  assert "one class folder (photos), and so no labels" in caplog.text


# Images of many forms, and the pixel that each begins with.


def encoded(image, form, **more):
  out = io.BytesIO()
  image.save(out, form, **more)
  return out.getvalue()


def tiff(array, **more):
  out = io.BytesIO()
  tifffile.imwrite(out, array, **more)
  return out.getvalue()


def exif(number):
  tags = Image.Exif()
  tags[pictures.ORIENTATION] = number
  return tags


DEEP = np.full((4, 6), 257 * 60, np.uint16)
SEE_THROUGH = Image.new("RGBA", (6, 4), (200, 0, 0, 0))
LEFT = Image.fromarray(np.repeat(np.uint8([[10, 10, 10, 250, 250, 250]] * 4)[..., None], 3, axis=-1))
FORMS = {
  "16-bit PNG": (encoded(Image.fromarray(DEEP), "PNG"), {}, (4, 6), (60, 60, 60)),
  "12-bit PNG": (encoded(Image.fromarray(DEEP // 16), "PNG"), {"white": 4095}, (4, 6), (60, 60, 60)),
  "16-bit TIFF": (tiff(DEEP), {}, (4, 6), (60, 60, 60)),
  "12-bit colour TIFF": (
    tiff(np.stack([DEEP // 16, DEEP // 32, 0 * DEEP], axis=-1), photometric="rgb"),
    {"white": 4095},
    (4, 6),
    (60, 30, 0),
  ),
  "8-bit TIFF": (encoded(LEFT, "TIFF"), {}, (4, 6), (10, 10, 10)),
  "rotated JPEG": (encoded(LEFT, "JPEG", quality=95, exif=exif(6)), {}, (6, 4), (10, 10, 10)),
  "upside down PNG": (encoded(LEFT, "PNG", exif=exif(3)), {}, (4, 6), (250, 250, 250)),
  "upright JPEG": (encoded(LEFT, "JPEG", quality=95, exif=exif(1)), {}, (4, 6), (10, 10, 10)),
  "transparent on white": (encoded(SEE_THROUGH, "PNG"), {}, (4, 6), (255, 255, 255)),
  "transparent on black": (encoded(SEE_THROUGH, "WEBP", lossless=True), {"background": "#000000"}, (4, 6), (0, 0, 0)),
  "palette": (encoded(LEFT.quantize(), "GIF"), {}, (4, 6), (10, 10, 10)),
  "grey": (encoded(LEFT.convert("L"), "PNG"), {}, (4, 6), (10, 10, 10)),
  "CMYK": (encoded(LEFT.convert("CMYK"), "JPEG", quality=95), {}, (4, 6), (10, 10, 10)),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_image_is_the_same_in_every_path(form):
  content, rule, size, first = FORMS[form]
  rule = pictures.Rule(**rule)
  image = pictures.rgb(content, rule)
  assert image.shape == (*size, 3)
  np.testing.assert_allclose(image[0, 0].astype(int), first, atol=3)
  # TensorFlow decodes JPEG by a faster transform, which differs most at a sharp edge.
  same = lambda ours: np.testing.assert_allclose(ours, image, atol=12 * pictures.is_plain(content))
  same(np.int32(decode.decode_image(pictures.plain(content, rule))))
  held = arrays.Arrays("held", np.array([content, content], object), np.zeros(2, np.int32), (), rule=rule)
  np.testing.assert_array_equal(held.decoded().images[1], image)
  same(np.int32(held.stored().decoded().images[1]))


def test_ordinary_images_are_left_as_they_are():
  for form in ("JPEG", "PNG", "BMP"):
    content = encoded(LEFT, form)
    assert pictures.plain(content) is content


@pytest.mark.parametrize("cache", [True, False])
def test_a_folder_converts_its_odd_images_alone(tmp_path, cache, caplog):
  caplog.set_level("INFO", "simclr_jax")
  for number, form in enumerate(("16-bit PNG", "transparent on white", "grey")):
    (tmp_path / f"{number}.png").write_bytes(FORMS[form][0])
  images = opened(tmp_path, cache=cache).decoded().images
  assert images[:, 0, 0, 0].tolist() == [60, 255, 10]
  assert "2 images are 16-bit, transparent, rotated" in caplog.text


def test_images_whose_range_is_unknown_count_as_unreadable(tmp_path):
  (tmp_path / "a.tif").write_bytes(tiff(np.zeros((4, 6), np.float32)))
  with pytest.raises(errors.UserError, match="1 of 1 images .* cannot be read"):
    opened(tmp_path)
  with pytest.raises(errors.UserError, match='background is "pinkish", wanted a colour'):
    pictures.Rule(background="pinkish")


# Parts.


def test_a_percentage_is_one_of_each_class():
  labels = np.array([0] * 10 + [1] * 5 + [-1] * 2)
  assert parts.rows("80%:", labels).tolist() == [8, 9, 14]
  assert parts.rows(":80%", labels).tolist() == [*range(8), 10, 11, 12, 13, 15, 16]
  assert parts.rows("2:4", labels).tolist() == [2, 3]
  assert parts.rows(":", labels).tolist() == list(range(17))
  for wrong in ("80", "a:b", "120%:", "-3:"):
    with pytest.raises(errors.UserError, match="part"):
      parts.rows(wrong, labels)


def test_parts_of_folders_and_files(tmp_path):
  root = write(tmp_path / "f", *(f"{kind}/{i}.png" for kind in ("cat", "dog") for i in range(5)))
  assert opened(root, "train[80%:]").names() == ("cat/4.png", "dog/4.png")
  np.savez(tmp_path / "a.npz", train_images=np.zeros((10, 4, 4, 3), np.uint8), train_labels=np.arange(10) % 2)
  held = sources.load("arrays", source.Request("train[50%:]", data_dir=str(tmp_path / "a.npz")))
  assert held.labels().tolist() == [0, 1] * 3  # From 2.5, rounded to even.


def test_a_held_out_share_is_of_each_class_and_of_the_seed_alone():
  labels = np.repeat([0, 1, 2], [50, 20, 1])
  held = parts.held_out(labels, (), 0.2, seed=0)
  assert np.bincount(labels[held]).tolist() == [10, 4]  # A class of one image is trained on.
  np.testing.assert_array_equal(held, parts.held_out(labels, (), 0.2, seed=0))
  assert (held != parts.held_out(labels, (), 0.2, seed=1)).any()


def test_groups_stay_together():
  generator = np.random.default_rng(0)
  patients, labels = generator.integers(0, 40, 400), generator.integers(0, 2, 400)
  names = [
    f"class{label}/p{patient:02d}_{row}.png" for row, (patient, label) in enumerate(zip(patients, labels, strict=True))
  ]
  held = parts.held_out(labels, names, 0.25, seed=0, group=r"/(p\d+)_")
  assert not set(patients[held]) & set(patients[~held])
  assert 0.15 < held.mean() < 0.35
  with pytest.raises(errors.UserError, match='matches nothing in "class'):
    parts.held_out(labels, names, 0.25, seed=0, group="q")
  with pytest.raises(errors.UserError, match="no regular expression"):
    parts.held_out(labels, names, 0.25, seed=0, group="(")
  with pytest.raises(errors.UserError, match="none is left on one side"):
    parts.held_out(labels[:1], names[:1], 0.25, seed=0)


def test_a_run_refuses_training_images_that_have_changed(tmp_path, caplog):
  root = write(tmp_path / "images", *(f"{kind}/{i}.png" for kind in ("cat", "dog") for i in range(5)))
  start = lambda **more: experiment.Experiment(
    config_lib.load("folder", {"data.dir": root, "data.holdout": 0.2, "batch_size": 2, "data.image_size": 8, **more}),
    "pretrain",
    str(tmp_path / "run"),
  )
  continues = lambda **more: (lambda this: this.claim(images=this.train))(start(**more))
  continues()
  continues()
  (moved := tmp_path / "images/cat/0.png").rename(tmp_path / "0.png")
  with pytest.raises(errors.UserError, match="have changed: there were 8 and now are 7; .*allow_changed=true"):
    continues()
  write(tmp_path / "images", "cat/0.png", image=Image.new("RGB", (6, 4), "red"))
  assert moved.exists()
  with pytest.raises(errors.UserError, match="of the 8, some have other names or contents"):
    continues()
  continues(**{"data.allow_changed": True})
  assert "the run continues on the present ones" in caplog.text
  continues()


def test_fingerprints_are_of_names_labels_and_contents(tmp_path):
  root = write(tmp_path, "cat/1.png", "cat/2.png", "dog/1.png")
  images = opened(root)
  assert images.fingerprint() == opened(root, cache=True).fingerprint() == images.decoded().fingerprint()
  assert images.take(np.array([0, 1])).fingerprint() != images.take(np.array([0, 2])).fingerprint()
  assert len(images.consecutive(1, 3).checksums) == 2


def test_images_that_use_few_of_their_16_bits_are_noticed(tmp_path, caplog):
  (tmp_path / "a.png").write_bytes(FORMS["12-bit PNG"][0])
  opened(tmp_path)
  assert "the brightest pixel of these is 4 of 255; give --config.data.white=VALUE" in caplog.text
  caplog.clear()
  opened(tmp_path, pictures=pictures.Rule(white=1000))
  assert "brightest" not in caplog.text
