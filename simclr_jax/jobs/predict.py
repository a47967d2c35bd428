"""predict: classes and probabilities of new images, and where their labels are known, what is taken for what.

Needs --workdir and --config.checkpoint=RUN, a run of finetune, linear_eval or distill (of pretrain: its online
classifier). Images go through the evaluation's centre crop. Writes predictions.csv and `result.json`.

  --config.predict.images=new/photos    a file, a folder with all below it, or a pattern such as 'new/*.jpg'; an image
                                        has a label where a folder above it has the name of a class
  --config.predict.split=test           without images: a split of the run's data, its held-out one by default
  --config.predict.format=parquet       or json, in place of csv
  --config.predict.top_k=3              classes that are named for each image

Files that cannot be decoded are left out and listed in unreadable.csv. Where images have labels, classes.csv has the
accuracy of each class, confusion.csv how many of a class (row) are taken for another (column), and figures/ the matrix
and the most confident mistakes.
"""

import contextlib
import csv
import importlib.util
import io
import itertools
import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from etils import epath

from simclr_jax import config as config_lib
from simclr_jax import errors, experiment, figures, files, inference, progress
from simclr_jax.data import inputs, source, sources
from simclr_jax.data import parts as splits
from simclr_jax.evaluation import confusion, features
from simclr_jax.training import checkpoint, telemetry

# Files that are in memory at the same time.
CHUNK = 1024
# Rows of a table in the log.
SHOWN = 20


class Predictions(NamedTuple):
  """What the classifier says of N images."""

  names: tuple[str, ...]
  label: np.ndarray  # i32[N], -1 where it is not known.
  probability: np.ndarray  # f32[N, K].
  unreadable: dict[str, str]  # Why a file could not be decoded, by its name.


def run(config: ml_collections.ConfigDict, workdir: str) -> dict[str, Any]:
  """Returns (and writes to `result.json`) what is known of the predictions that it leaves in `workdir`."""
  keys = config.predict
  if not config_lib.names_run(config.checkpoint):
    raise errors.UserError(
      "predict has no classifier; give --config.checkpoint=RUN, a run of finetune, linear_eval or distill."
    )
  if keys.format == "parquet" and importlib.util.find_spec("pyarrow") is None:
    raise errors.UserError("config.predict.format parquet is written by pyarrow, which is not installed; use csv.")
  if "linear_head" not in checkpoint.open(config.checkpoint).shapes[checkpoint.MODEL]["params"]:
    raise errors.UserError(
      f"{config.checkpoint} has no classifier; train one with labels first: linear_eval or finetune with "
      f"--config.checkpoint={config.checkpoint}, and predict with that run."
    )
  if checkpoint.open(config.checkpoint).job == "pretrain":
    telemetry.log.info(
      "predict: the classifier of %s learned beside pretraining; linear_eval trains a better one.", config.checkpoint
    )
  this = experiment.Experiment(config, "predict", workdir)
  found = inference.classifier(config.checkpoint, this.mesh)
  ours, theirs = this.config.data.image_size, found.config.data.image_size
  if ours != theirs:
    raise errors.UserError(
      f"{config.checkpoint} was trained at {theirs} pixels and config.data.image_size is {ours}; leave it out."
    )
  images = _Files(this, found.class_names) if keys.images else _Split(this, found.class_names)
  this.claim()
  told = _predict(this, found, images)
  result = {
    "examples": len(told.names),
    "unreadable": len(told.unreadable),
    "source": images.name,
    "class_names": list(found.class_names),
    "checkpoint": config.checkpoint,
    "predictions": f"predictions.{keys.format}",
  }
  known = told.label >= 0
  if np.any(known):
    best = np.argmax(told.probability, axis=1)
    counts = confusion.matrix(told.label[known], best[known], found.classes)
    rows = confusion.by_class(counts, found.class_names)
    result |= {f"eval/{name}": value for name, value in confusion.summary(counts).items()} | {"classes": rows}
    mistakes = _mistakes(told, best, keys.mistakes)
    shown = images.shown([told.names[row] for row in mistakes], mistakes)
  if jax.process_index() == 0:
    _write(epath.Path(workdir), told, found.class_names, keys)
    if np.any(known):
      _write_confusions(epath.Path(workdir), counts, rows, found.class_names)
      _draw(epath.Path(workdir) / "figures", counts, told, best, mistakes, shown, found.class_names)
  path = telemetry.write_result(workdir, result)
  telemetry.log.info("%s\n%s", _report(result, told, found.class_names), path)
  return result


class _Split:
  """A split of the config's data; its classes are matched with the model's by name."""

  def __init__(self, this: experiment.Experiment, class_names: Sequence[str]):
    config = this.config
    split = config.predict.split or (splits.HELD_OUT if config.data.holdout else config.data.eval_split)
    if not split:
      raise errors.UserError("predict has no images; set --config.predict.images=FOLDER, or --config.predict.split.")
    self._this, self._images = this, this.images_of(split)
    self.name, self.total, self.unreadable = self._images.name, self._images.num_examples, {}
    self._classes = _matched(self._images, class_names)

  def parts(self) -> Iterator[source.Source]:
    yield self._images

  def rows(self, part: source.Source, *, shared: bool = True) -> Iterator[inputs.Rows]:
    """Returns one pass over a part; every process gets all rows where it is not shared."""
    return self._this.rows(part, shared=shared)()

  def label(self, label: np.ndarray) -> np.ndarray:
    """Returns the model's number i32[N] of the data's classes."""
    return np.where(label >= 0, self._classes[label], -1) if len(self._classes) else np.full_like(label, -1)

  def shown(self, names: Sequence[str], rows: np.ndarray) -> list[np.ndarray]:
    """Returns the images f32[size, size, 3] of some rows as the network sees them."""
    order = np.sort(rows)
    found = _pixels(self.rows(self._images.take(order), shared=False)) if len(rows) else []
    return [found[np.searchsorted(order, row)] for row in rows]


class _Files:
  """Files of a folder or a pattern."""

  def __init__(self, this: experiment.Experiment, class_names: Sequence[str]):
    sources.check_tensorflow("folder")
    # It imports TensorFlow.
    from simclr_jax.data import image_files

    self._open, self._this, self._names, self.unreadable = image_files.opened, this, class_names, {}
    self._root, self._paths = image_files.found(this.config.predict.images)
    self.name, self.total = this.config.predict.images, len(self._paths)
    folders = {part for path in self._paths for part in path.split("/")[:-1]}
    if folders and (others := sorted(folders - set(class_names))):
      telemetry.log.info(
        "predict: folders without the name of a class, whose images have no label unless a folder above or below has: "
        "%s%s.",
        *(", ".join(others[:5]), ", ..." * (len(others) > 5)),
      )

  def parts(self) -> Iterator[source.Source]:
    for begin in range(0, self.total, CHUNK):
      part, bad = self._opened(self._paths[begin : begin + CHUNK])
      self.unreadable |= bad
      if part.num_examples:
        yield part

  def rows(self, part: source.Source, *, shared: bool = True) -> Iterator[inputs.Rows]:
    config, devices = self._this.config, self._this.mesh.size
    # A few files do not wait for a whole batch of padding.
    batch_size = min(config.eval_batch_size, -(-self.total // devices) * devices)
    keys = {"batch_size": batch_size, "is_resident": False, "shared": shared}
    return inputs.evaluation(part, config.data.image_size, **keys)()

  def label(self, label: np.ndarray) -> np.ndarray:
    return label

  def _opened(self, paths):
    return self._open(self._root, paths, self._names, self._this.pictures)

  def shown(self, names: Sequence[str], rows: np.ndarray) -> list[np.ndarray]:
    return _pixels(self.rows(self._opened(names)[0], shared=False)) if names else []


def _pixels(batches):
  """Returns the images of all rows in order, without padding."""
  return [image for rows in batches for image, real in zip(rows["image"], rows["mask"], strict=True) if real > 0]


def _matched(images: source.Source, class_names: Sequence[str]) -> np.ndarray:
  """Returns the model's number i32[classes] of each class of a split, -1 for one that it does not know."""
  numbers = {name: number for number, name in enumerate(class_names)}
  nameless = inference.are_numbers(class_names) or inference.are_numbers(images.class_names)
  if nameless and images.num_classes == len(class_names):
    return np.arange(images.num_classes, dtype=np.int32)
  found = np.array([numbers.get(name, -1) for name in images.class_names], np.int32)
  if unknown := [name for name, number in zip(images.class_names, found, strict=True) if number < 0]:
    telemetry.log.warning(
      "predict: %d of the %d classes of %s are unknown to the classifier, and their images count as unlabelled: %s%s.",
      *(len(unknown), images.num_classes, images.name, ", ".join(unknown[:5]), ", ..." * (len(unknown) > 5)),
    )
  return found


def _predict(this, found, images) -> Predictions:
  rows_of = lambda variables, batch: {
    "probability": inference.probabilities(found.logits_of(variables, batch["image"])),
    "label": batch["label"],
  }
  read = features.table_of(rows_of, this.mesh)
  names, tables = [], []
  bar = progress.bar(-(-images.total // jax.process_count()), "predict", "image")
  with bar:
    for part in images.parts():
      table = read(found.variables, _counted(images.rows(part), bar))
      features.check_finite(table["probability"], images.name, this.config.checkpoint)
      names.extend(part.names())
      tables.append(table)
  if not tables:
    raise errors.UserError(f"none of the {images.total} images of {images.name} can be decoded; name others.")
  if images.unreadable:
    telemetry.log.warning("predict: files that cannot be decoded and are left out: %d", len(images.unreadable))
    for name, reason in itertools.islice(images.unreadable.items(), SHOWN):
      telemetry.log.warning("  %s: %s", name, reason)
  whole = {name: np.concatenate([table[name] for table in tables]) for name in tables[0]}
  return Predictions(tuple(names), images.label(whole["label"]), whole["probability"], images.unreadable)


def _counted(batches, bar):
  for rows in batches:
    yield rows
    bar.update(int(np.sum(rows["mask"])))


def _mistakes(told: Predictions, best: np.ndarray, most: int) -> np.ndarray:
  """Returns the rows of the labelled images that are wrong, the most confident ones first."""
  wrong = np.flatnonzero((told.label >= 0) & (best != told.label))
  confidence = told.probability[wrong, best[wrong]]
  return wrong[np.argsort(-confidence, kind="stable")][:most]


def _columns(told: Predictions, class_names: Sequence[str], top_k: int) -> dict[str, Any]:
  """Returns the table of predictions, a column by name."""
  order = np.argsort(-told.probability, axis=1, kind="stable")[:, : min(top_k, len(class_names))]
  named = np.array(class_names, object)
  columns = {"file": list(told.names)}
  for place in range(order.shape[1]):
    end = f"_{place + 1}" if place else ""
    columns[f"class{end}"] = list(named[order[:, place]])
    columns[f"probability{end}"] = np.take_along_axis(told.probability, order[:, place : place + 1], axis=1)[:, 0]
  if np.any(told.label >= 0):
    columns["label"] = [class_names[label] if label >= 0 else "" for label in told.label]
  return columns | {f"p_{name}": told.probability[:, number] for number, name in enumerate(class_names)}


def _write(folder: epath.Path, told: Predictions, class_names: Sequence[str], keys: Any) -> None:
  """Writes the predictions, and the names of the files that could not be decoded."""
  columns = _columns(told, class_names, keys.top_k)
  files.write_bytes(folder / f"predictions.{keys.format}", WRITERS[keys.format](columns, class_names))
  unreadable = folder / "unreadable.csv"
  if told.unreadable:
    files.write_bytes(unreadable, _lines([("file", "reason"), *told.unreadable.items()]))
  else:
    unreadable.unlink(missing_ok=True)


def _csv(columns, class_names) -> bytes:
  del class_names
  # As many digits as float32 has.
  shown = [[f"{x:.7g}" for x in c] if isinstance(c, np.ndarray) else c for c in columns.values()]
  return _lines([list(columns), *zip(*shown, strict=True)])


def _lines(rows) -> bytes:
  out = io.StringIO()
  csv.writer(out, lineterminator="\n").writerows(rows)
  return out.getvalue().encode()


def _parquet(columns, class_names) -> bytes:
  del class_names
  import pyarrow
  from pyarrow import parquet

  out = io.BytesIO()
  parquet.write_table(pyarrow.table(columns), out)
  return out.getvalue()


def _json(columns, class_names) -> bytes:
  """Returns a list of {file, class, probability, label, top: [{class, probability}], probabilities: {class: p}}."""
  plain = {name: c.tolist() if isinstance(c, np.ndarray) else c for name, c in columns.items()}
  places = ["", *itertools.takewhile(lambda end: f"class{end}" in plain, (f"_{n}" for n in itertools.count(2)))]
  rows = []
  for row, name in enumerate(plain["file"]):
    first = {"file": name, **{key: plain[key][row] for key in ("class", "probability", "label") if key in plain}}
    top = [{key: plain[f"{key}{end}"][row] for key in ("class", "probability")} for end in places]
    rows.append({**first, "top": top, "probabilities": {name: plain[f"p_{name}"][row] for name in class_names}})
  return (json.dumps(rows, indent=1) + "\n").encode()


WRITERS = {"csv": _csv, "parquet": _parquet, "json": _json}


def _write_confusions(folder, counts, rows, class_names) -> None:
  files.write_bytes(folder / "confusion.csv", _lines([["", *class_names], *zip(class_names, *counts.T, strict=True)]))
  files.write_bytes(folder / "classes.csv", _lines([list(rows[0]), *(row.values() for row in rows)]))


def _draw(folder, counts, told, best, mistakes, shown, class_names) -> None:
  title = f"What is taken for what: {counts.sum()} images"
  figures.confusion(counts, class_names, str(folder / "confusion.png"), title=title)
  if shown:
    confidence = lambda row: f"{100 * told.probability[row, best[row]]:.0f} %"
    short = figures.short
    captions = [
      f"{short(class_names[told.label[r]])}\n→ {short(class_names[best[r]])}, {confidence(r)}" for r in mistakes
    ]
    title = "The most confident mistakes: true class → prediction, its probability"
    figures.captioned(shown, captions, str(folder / "mistakes.png"), title=title)
  else:
    with contextlib.suppress(FileNotFoundError):
      (folder / "mistakes.png").unlink()


def _report(result: dict[str, Any], told: Predictions, class_names: Sequence[str]) -> str:
  """Returns the accuracies where there are labels, else how often each class was predicted, for people."""
  head = f"predict: {result['examples']} images of {result['source']} -> {result['predictions']}"
  if "classes" not in result:
    number = np.bincount(np.argmax(told.probability, axis=1), minlength=len(class_names))
    order = np.argsort(-number, kind="stable")[:SHOWN]
    counts = ", ".join(f"{class_names[n]} {number[n]}" for n in order if number[n])
    return f"{head}\npredicted: {counts}"
  ends = lambda low, high: f"{100 * low:.1f} to {100 * high:.1f}"
  lines = [
    head,
    *(
      f"{name} {100 * result[f'eval/{key}']:.2f} % (95 %: {ends(*result[f'eval/{key}_interval'])})"
      for name, key in (("top-1", "top1"), ("balanced", "balanced_top1"))
    ),
    f"of {result['eval/examples']} images with a label, by class, the worst first:",
    f"{'class':<24}{'images':>8}{'correct %':>11}{'95 %':>16}  most often taken for",
  ]
  for row in sorted(result["classes"], key=lambda row: row["accuracy"])[:SHOWN]:
    numbers = f"{row['images']:>8}{100 * row['accuracy']:>11.1f}{ends(row['low'], row['high']):>16}"
    lines.append(f"{row['class'][:23]:<24}{numbers}  {row['taken_for']}")
  rest = len(result["classes"]) - SHOWN
  return "\n".join(lines + [f"... and {rest} more in classes.csv"] * (rest > 0))
