"""embed: features of a folder or split, in files that need no JAX to be read.

Needs --workdir and --config.checkpoint=RUN, a pretraining run (or `random`, the encoder as it is initialised); takes
its config from there unless --config is given. Every image goes once through the evaluation's centre crop and the
encoder, and the files hold the split in its order: `name` (its file, or its number), `label` (-1: none), `index` and
`features`. Complete files are not computed again when the same command is repeated. Writes `result.json` at the end.

  --config.embed.split=train            which split
  --config.data.source=folder --config.data.dir=my/images --config.data.resident=false
                                        of other images than those that the checkpoint was trained on
  --config.embed.format=parquet         in place of npz; pandas.read_parquet opens DIR/features.parquet
  --config.embed.rows_per_file=8192
  --config.head.evaluate_from=-1        outputs of a layer of the projection head in place of the encoder's h
"""

import hashlib
import importlib.util
import io
import json
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from tqdm import auto as tqdm

from simclr_jax import config as config_lib
from simclr_jax import errors, experiment, files, inference, progress
from simclr_jax.data import inputs, source
from simclr_jax.evaluation import features
from simclr_jax.hardware import sharding
from simclr_jax.training import checkpoint, telemetry


def run(config: ml_collections.ConfigDict, workdir: str) -> dict[str, Any]:
  """Returns (and writes to `result.json`) what the files that it leaves in `workdir` hold."""
  keys = config.embed
  if keys.format == "parquet" and importlib.util.find_spec("pyarrow") is None:
    raise errors.UserError("config.embed.format parquet is written by pyarrow, which is not installed; use npz.")
  if config_lib.names_run(config.checkpoint):
    # A pretraining that still runs saves newer checkpoints; all files are of one.
    config = config.copy_and_resolve_references()
    config.checkpoint = str(checkpoint.open(config.checkpoint).path)
  this = experiment.Experiment(config, "embed", workdir)
  # Each process embeds by itself, into files of its own: no array travels between processes.
  mesh = sharding.data_mesh(jax.local_devices())
  images = this.images_of(keys.split)
  if not images.num_examples:
    raise errors.UserError(f"{images.name} has no images; choose another --config.embed.split.")
  frozen = inference.representation(this, mesh)
  # Images of another folder are another result.
  this.claim(tuple(key for key in config_lib.FREE if key != "data.dir"))
  _claim_contents(workdir, images)

  # Each file and its rows of the split.
  split = range(images.num_examples)
  pieces = [split[begin : begin + keys.rows_per_file] for begin in split[:: keys.rows_per_file]]
  folder = epath.Path(workdir) / FOLDERS[keys.format]
  path = lambda number: folder / f"features-{number:05d}-of-{len(pieces):05d}.{keys.format}"
  parts = [(path(number), rows) for number, rows in enumerate(pieces)]
  index, count = jax.process_index(), jax.process_count()
  own = parts[len(parts) * index // count : len(parts) * (index + 1) // count]
  dimension = _write_missing(this, images, own, frozen, mesh)
  multihost_utils.sync_global_devices("embed: all files are written")
  result = {
    "examples": images.num_examples,
    "dimension": dimension,
    "files": [str(path.relative_to(workdir)) for path, _ in parts],
    "rows_per_file": keys.rows_per_file,
    "format": keys.format,
    "source": images.name,
    "class_names": list(images.class_names),
    "checkpoint": config.checkpoint,
    "layer": frozen.layer,
    "image_size": this.config.data.image_size,
  }
  lost = [path.name for path, _ in parts if not path.exists()] if jax.process_index() == 0 else []
  if lost:
    raise errors.UserError(f"{workdir} lacks {lost[0]}, which another process wrote; give a folder that all share.")
  telemetry.write_result(workdir, result)
  return result


def _claim_contents(workdir: str, images: source.Source) -> None:
  """Writes `contents.json`, or checks that the files in the folder are of these very images."""
  path = epath.Path(workdir) / "contents.json"
  # Names that would have to be read from the records first are not compared.
  names = hashlib.sha256("\n".join(images.names()).encode()).hexdigest() if images.has_names else ""
  ours = {"examples": images.num_examples, "names_sha256": names}
  if path.exists():
    theirs = json.loads(path.read_text())
    if theirs != ours:
      raise errors.UserError(
        f"workdir {workdir} holds features of {theirs['examples']} images of {images.name}, which now has other ones "
        f"({ours['examples']}); choose another --workdir."
      )
  elif jax.process_index() == 0:
    files.write_json(path, ours)


def _write_missing(
  this: experiment.Experiment,
  images: source.Source,
  parts: list[tuple[epath.Path, range]],
  frozen: inference.Representation,
  mesh: jax.sharding.Mesh,
) -> int:
  """Writes those of the files that are not there yet, and returns the number of features of an image."""
  embed = lambda variables, batch: frozen.encode(variables, batch).astype(jnp.float32)
  rows_of = lambda variables, batch: {"features": embed(variables, batch["image"]), "label": batch["label"]}
  table_of = features.table_of(rows_of, mesh)
  missing = [(path, rows) for path, rows in parts if not path.exists()]
  total = sum(len(rows) for _, rows in missing)
  begin = time.monotonic()
  with progress.bar(total, "embed", "image") as bar:
    for path, rows in missing:
      held = images.consecutive(rows.start, rows.stop)
      table = table_of(frozen.variables, _counted(this.rows(held, shared=False)(), bar))
      features.check_finite(table["features"], held.name, this.config.checkpoint)
      table = {"name": held.names(), **table, "index": np.array(rows, np.int64)}
      files.write_bytes(path, WRITERS[this.config.embed.format](table))
  seconds = time.monotonic() - begin
  telemetry.log.info(
    "embed: %d images in %d files in %.1f s, %.0f images/s with compilation; %d files were there before.",
    *(total, len(missing), seconds, total / seconds, len(parts) - len(missing)),
  )
  return jax.eval_shape(embed, frozen.variables, this.network.images(mesh.size)).shape[1]


def _counted(batches: Iterator[inputs.Rows], bar: tqdm.tqdm) -> Iterator[inputs.Rows]:
  """Yields the batches, and moves the bar when the next one is asked for."""
  for rows in batches:
    yield rows
    bar.update(int(np.sum(rows["mask"])))


def _npz(table) -> bytes:
  out = io.BytesIO()
  np.savez(out, **{**table, "name": np.array(table["name"], np.str_)})
  return out.getvalue()


def _parquet(table) -> bytes:
  import pyarrow
  from pyarrow import parquet

  features = pyarrow.FixedSizeListArray.from_arrays(table["features"].reshape(-1), table["features"].shape[1])
  out = io.BytesIO()
  parquet.write_table(pyarrow.table({**table, "name": list(table["name"]), "features": features}), out)
  return out.getvalue()


WRITERS = {"npz": _npz, "parquet": _parquet}
# Under the workdir. Readers of a folder of Parquet files take every file for one whose name does not begin with _ or .
FOLDERS = {"npz": "", "parquet": "features.parquet"}
