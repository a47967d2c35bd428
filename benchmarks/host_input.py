"""host_input: how fast the host decodes and augments images at 224, one pinned thread and all of them."""

import dataclasses
import importlib.util
import io
import os
import time

import numpy as np
from PIL import Image

from benchmarks import measure

SIZE = 224
# A measurement takes at least so many seconds and batches, after a warm-up of some batches.
SECONDS, FEWEST, WARM_UP = 1.0, 3, 4
BATCH, SHARDS = 16, 4
# At most so many images are kept in memory.
KEPT = 256
# The images that stand in for real ones; ImageNet's have 110 kB on average.
MADE, MADE_SHAPE, MADE_QUALITY = 64, (375, 500), 92

WHAT = {
  "decode": "JPEG decoded, nothing else",
  "host": "decoded, two float crops, colours on the host; no blur",
  "host_blur": "the same with blur",
  "crops": "two uint8 crops, bicubic; colours and blur are the device's",
  "crops_bilinear": "the same, bilinear (augment.resize)",
}


def run(data_dir: str, rounds: int = measure.ROUNDS, seconds: float = SECONDS) -> dict:
  """Prints and returns images/s of the ways from JPEGs to pairs of views, and what a deterministic order costs.

  Args:
    data_dir: TFDS folder that has imagenet2012; "" for images that are made here.
    rounds: of which the medians are taken.
    seconds: of each measurement.
  """
  if importlib.util.find_spec("tensorflow") is None:
    reason = "input is left out: TensorFlow, which reads and augments on the host, is not installed"
    measure.say(reason)
    return {"left_out": reason}
  images = f"imagenet2012 of {data_dir}" if data_dir else f"{MADE} images of noise made here, not photographs"
  with measure.in_a_process(_pinned, data_dir, seconds) as call:
    about = call("about")
    pinned = "one pinned thread" if about["pinned"] else "one thread, not pinned on this system"
    measure.say(
      f"images/s at {SIZE}, {pinned}, {images} ({about['bytes'] / 1000:.0f} kB on average)\n\n"
      f"{'of decode':>9}{'of host':>9}{'of blur':>9}{'images/s':>10}"
    )
    found = measure.interleaved({name: lambda name=name: call("rate", name) for name in WHAT}, rounds, warm_up=False)
    error = call("error")
  rates = measure.medians(found)
  ratios = {
    name: {f"of_{other}": rate / rates[other] for other in ("decode", "host", "host_blur")}
    for name, rate in rates.items()
  }
  for name, text in WHAT.items():
    shown = "".join(f"{ratio:>9.2f}" for ratio in ratios[name].values())
    measure.say(f"{shown}{rates[name]:>10.0f}  {text}")
  measure.say(f"bilinear differs from bicubic by {error['mean']:.2f} of 255 levels on average, {error['max']} at most")
  result = {"images": images, **about, "rates": rates, "ratios": ratios, "rounds": found, "bilinear_error": error}
  result["determinism"] = _determinism(data_dir, rounds, seconds)
  result["headline"] = {
    "crops_of_decode": ratios["crops"]["of_decode"],
    "crops_of_host": ratios["crops"]["of_host"],
    "crops_of_host_blur": ratios["crops"]["of_host_blur"],
    "bilinear_of_decode": ratios["crops_bilinear"]["of_decode"],
    "bilinear_mean_error": error["mean"],
    "deterministic_of_unordered": result["determinism"]["ratio"],
    "decode_per_second": rates["decode"],
    "crops_per_second": rates["crops"],
    "real_images": bool(data_dir),
  }
  return result


def _determinism(data_dir, rounds, seconds):
  """Returns the rates of our pipeline and of one that keeps no order, with all threads, and their ratio."""
  with measure.in_a_process(_unpinned, data_dir, seconds) as call:
    contestants = {name: lambda name=name: call("rate", name) for name in ("deterministic", "unordered")}
    found = measure.interleaved(contestants, rounds, warm_up=False)
  rates = measure.medians(found)
  ratio = rates["deterministic"] / rates["unordered"]
  measure.say(
    f"order and crops a function of the seed: {ratio:.3f} of the rate without any order "
    f"({rates['deterministic']:.0f} and {rates['unordered']:.0f} pairs/s, {os.cpu_count()} threads)"
  )
  return {"ratio": ratio, "rates": rates, "rounds": found, "threads": os.cpu_count()}


def _pinned(data_dir, seconds):
  """Returns (what, name) -> measurement, in a process that has one processor from now on."""
  # Before TensorFlow starts threads, which inherit this; the parent keeps all processors.
  if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
  return _measurements(data_dir, seconds)


def _unpinned(data_dir, seconds):
  return _measurements(data_dir, seconds)


def _measurements(data_dir, seconds):
  import tensorflow as tf

  from simclr_jax.data import host_augment, order, pipeline
  from simclr_jax.data.distortion import Distortion

  source = _source(data_dir)
  crops = lambda content, seed: host_augment.two_crops(content, seed, Distortion(SIZE))
  bilinear = lambda content, seed: host_augment.two_crops(content, seed, Distortion(SIZE, resize="bilinear"))
  views = lambda content, seed, **blur: host_augment.two_views(content, seed, Distortion(SIZE, **blur))
  transforms = {
    # The shape is enough to have the image decoded.
    "decode": lambda content, seed: {"x": tf.shape(tf.io.decode_jpeg(content, channels=3))},
    "host": lambda content, seed: {"x": views(content, seed, blur_probability=0.0)},
    "host_blur": lambda content, seed: {"x": views(content, seed)},
    "crops": lambda content, seed: {"x": crops(content, seed)},
    "crops_bilinear": lambda content, seed: {"x": bilinear(content, seed)},
    "both": lambda content, seed: {"bicubic": crops(content, seed), "bilinear": bilinear(content, seed)},
  }
  examples = order.Order(BATCH, SHARDS, seed=0, shuffle_window=100)
  batches = lambda name, threads: pipeline.train_batches(source, transforms[name], examples, threads=threads)

  def measured(what, name=""):
    if what == "about":
      return {"bytes": _mean_bytes(source), "pinned": hasattr(os, "sched_setaffinity")}
    if what == "error":
      return _error(batches("both", 1))
    if name == "unordered":
      return _rate(_unordered(source, transforms["crops"]), seconds)
    if name == "deterministic":
      return _rate(batches("crops", 0), seconds)
    return _rate(batches(name, 1), seconds)

  return measured


def _rate(batches, seconds) -> float:
  """Returns images/s. Each call takes a new pipeline: one that nobody reads goes on prefetching and takes CPU time."""
  for _ in range(WARM_UP):
    next(batches)
  begin, count = time.perf_counter(), 0
  while count < FEWEST or time.perf_counter() - begin < seconds:
    next(batches)
    count += 1
  return BATCH * count / (time.perf_counter() - begin)


def _unordered(source, transform):
  """Returns batches as `pipeline.train_batches` does, but in any order: shuffled without a seed, and as they come."""
  import tensorflow as tf

  from simclr_jax.data import pipeline

  def finish(index):
    content, label = source.read(*(column[index] for column in source.examples))
    position = {"index": tf.cast(index, tf.int32), "epoch": tf.zeros([], tf.int32)}
    return {**transform(content, pipeline.example_seed(0, 0, index)), "label": label, **position}

  options = tf.data.Options()
  options.threading.private_threadpool_size = os.cpu_count()
  options.threading.max_intra_op_parallelism = 1
  options.deterministic = False
  rows = tf.data.Dataset.range(source.num_examples).shuffle(source.num_examples).repeat()
  rows = rows.map(pipeline.NO_CONVERSION(finish), num_parallel_calls=os.cpu_count(), deterministic=False)
  return rows.with_options(options).batch(BATCH).prefetch(2).as_numpy_iterator()


def _error(batches) -> dict:
  """Returns mean and largest difference between the two resizes of the same crops, in levels of 255."""
  differences = []
  for _ in range(WARM_UP):
    rows = next(batches)
    differences.append(np.abs(rows["bicubic"].astype(np.int16) - rows["bilinear"]))
  return {"mean": float(np.mean(differences)), "max": int(np.max(differences))}


def _source(data_dir):
  """Returns encoded images in memory."""
  from simclr_jax.data import arrays, source, sources

  if data_dir:
    whole = source.Request("train", name="imagenet2012", data_dir=data_dir)
    count = min(KEPT, sources.load("tfds", whole).num_examples)
    return sources.load("tfds", dataclasses.replace(whole, split=f"train[:{count}]", cache=True)).stored()
  encoded = np.array([made_jpeg(number) for number in range(MADE)], object)
  return arrays.Arrays("noise", encoded, np.full(MADE, -1, np.int32), ()).stored()


def made_jpeg(number: int) -> bytes:
  """Returns a JPEG with details of every scale, of about the size and the bytes of ImageNet's."""
  rng = np.random.default_rng(number)
  height, width = MADE_SHAPE
  image = np.full((height, width, 3), 127.0)
  for scale in (1, 2, 4, 8, 16, 32, 64, 128):
    grid = rng.normal(0, 4 * scale**0.5, (-(-height // scale), -(-width // scale), 3))
    image += grid.repeat(scale, 0).repeat(scale, 1)[:height, :width]
  stream = io.BytesIO()
  Image.fromarray(np.clip(image, 0, 255).astype(np.uint8)).save(stream, "JPEG", quality=MADE_QUALITY)
  return stream.getvalue()


def _mean_bytes(source) -> float:
  """Returns how long the encoded images are on average."""
  contents = (source.read(*(column[i] for column in source.examples))[0] for i in range(source.num_examples))
  return float(np.mean([len(content.numpy()) for content in contents]))
