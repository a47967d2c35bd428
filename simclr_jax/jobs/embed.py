"""embed: features of a folder or split, in files that need no JAX to be read.

Needs --workdir and --config.checkpoint=RUN, a pretraining run (or `random`, the encoder as it is initialised); takes
its config from there unless --config is given. Every image goes once through the evaluation's centre crop and the
encoder, and the files hold the split in its order: `name` (its file, or its number), `label` (-1: none), `index` and
`features`. Complete files are not computed again when the same command is repeated. Writes `result.json` at the end.

  --config.embed.split=train            which split
  --config.data.source=folder --config.data.dir=my/images --config.data.resident=false
                                        of other images than those that the checkpoint was trained on
  --config.embed.format=parquet         in place of npz
  --config.embed.rows_per_file=8192
  --config.head.evaluate_from=-1        outputs of a layer of the projection head in place of the encoder's h
"""

import dataclasses
import hashlib
import importlib.util
import io
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from tqdm import auto as tqdm

from simclr_jax import errors
from simclr_jax.data import subset
from simclr_jax.evaluation import features as evaluation
from simclr_jax.hardware import sharding
from simclr_jax.jobs import knn, representation, setup
from simclr_jax.training import checkpoint, telemetry

JOB = "embed"

# Images from another folder are another result.
FREE_KEYS = tuple(key for key in setup.FREE_KEYS if key != "data.dir")


@dataclasses.dataclass(frozen=True)
class Part:
  """The file `path`, which holds the rows `begin` to `end` of the split."""

  path: epath.Path
  begin: int
  end: int


def run(config, workdir: str) -> dict:
  """Returns (and writes to `result.json`) what the files that it leaves in `workdir` hold."""
  keys = config.embed
  setup.choice("embed.format", keys.format, WRITERS)
  if keys.rows_per_file < 1:
    raise errors.UserError(f"config.embed.rows_per_file is {keys.rows_per_file}; use 1 or more, such as 8192.")
  if keys.format == "parquet" and importlib.util.find_spec("pyarrow") is None:
    raise errors.UserError("config.embed.format parquet is written by pyarrow, which is not installed; use npz.")
  setup.mesh_for(config, ("eval_batch_size", config.eval_batch_size))
  # Each process by itself, on files of its own: nothing has to travel between them.
  mesh = sharding.data_mesh(jax.local_devices())
  source = setup.source_of(config, keys.split)
  if not source.num_examples:
    raise errors.UserError(f"{source.name} has no images; choose another --config.embed.split.")
  if config.checkpoint not in ("", setup.RANDOM):
    # Of a run that goes on, all files are of one checkpoint.
    config = config.copy_and_resolve_references()
    config.checkpoint = str(checkpoint.find(config.checkpoint))
  encode, variables = representation.load(config, mesh, job=JOB)
  checkpoint.claim_workdir(workdir, config.to_dict(), JOB, FREE_KEYS)
  _claim_contents(workdir, source)

  parts = _parts(epath.Path(workdir), source.num_examples, keys)
  dimension = _write_missing(config, source, _own(parts), encode, variables, mesh)
  multihost_utils.sync_global_devices(f"{JOB}: all files are written")
  result = {
    "examples": source.num_examples,
    "dimension": dimension,
    "files": [part.path.name for part in parts],
    "rows_per_file": keys.rows_per_file,
    "format": keys.format,
    "source": source.name,
    "class_names": list(source.class_names),
    "checkpoint": config.checkpoint,
    "layer": setup.layer_of(config, "evaluate_from"),
    "image_size": config.data.image_size,
  }
  if jax.process_index() == 0:
    lost = [part.path.name for part in parts if not part.path.exists()]
    if lost:
      raise errors.UserError(f"{workdir} lacks {lost[0]}, which another process wrote; give a folder that all share.")
    telemetry.write_json(epath.Path(workdir) / "result.json", result)
  return result


def _claim_contents(workdir: str, source) -> None:
  """Writes `contents.json`, or checks that the files in the folder are of these very images."""
  path = epath.Path(workdir) / "contents.json"
  # Names that would have to be read from the records first are not compared.
  names = hashlib.sha256("\n".join(source.names).encode()).hexdigest() if source.names else ""
  ours = {"examples": source.num_examples, "names_sha256": names}
  if path.exists():
    theirs = json.loads(path.read_text())
    if theirs != ours:
      raise errors.UserError(
        f"workdir {workdir} holds features of {theirs['examples']} images of {source.name}, which now has other ones "
        f"({ours['examples']}); choose another --workdir."
      )
  elif jax.process_index() == 0:
    telemetry.write_json(path, ours)


def _parts(folder: epath.Path, examples: int, keys) -> list[Part]:
  """Returns the files of the whole split."""
  count = -(-examples // keys.rows_per_file)
  return [
    Part(
      folder / f"features-{number:05d}-of-{count:05d}.{keys.format}",
      number * keys.rows_per_file,
      min((number + 1) * keys.rows_per_file, examples),
    )
    for number in range(count)
  ]


def _own(parts: list[Part]) -> list[Part]:
  """Returns this process's consecutive share of the files."""
  index, count = jax.process_index(), jax.process_count()
  return parts[len(parts) * index // count : len(parts) * (index + 1) // count]


def _write_missing(config, source, parts: list[Part], encode, variables, mesh) -> int:
  """Writes those of the files that are not there yet, and returns the number of features of an image."""
  embed = lambda variables, images: encode(variables, images).astype(jnp.float32)
  rows_of = lambda variables, batch: {"features": embed(variables, batch["image"]), "label": batch["label"]}
  table_of = evaluation.table_of(rows_of, mesh)
  missing = [part for part in parts if not part.path.exists()]
  rows = sum(part.end - part.begin for part in missing)
  begin = time.monotonic()
  with tqdm.tqdm(total=rows, desc=JOB, unit="image", dynamic_ncols=True, disable=jax.process_index() > 0) as bar:
    for part in missing:
      held = subset.consecutive(source, part.begin, part.end)
      batches = setup.evaluation_rows(config, held, shared=False)()
      table = table_of(variables, _counted(batches, bar))
      knn.check_finite(table["features"], held.name, config.checkpoint)
      index = np.arange(part.begin, part.end, dtype=np.int64)
      _write(part.path, {"name": subset.names_of(held), **table, "index": index}, WRITERS[config.embed.format])
  seconds = time.monotonic() - begin
  telemetry.log.info(
    "%s: %d images in %d files in %.1f s, %.0f images/s with compilation; %d files were there before.",
    *(JOB, rows, len(missing), seconds, rows / seconds, len(parts) - len(missing)),
  )
  size = config.data.image_size
  images = jax.ShapeDtypeStruct((mesh.size, size, size, 3), jnp.float32)
  return jax.eval_shape(embed, variables, images).shape[1]


def _counted(batches, bar):
  """Yields the batches, and moves the bar when the next one is asked for."""
  for rows in batches:
    yield rows
    bar.update(int(np.sum(rows["mask"])))


def _write(path: epath.Path, table, encoded) -> None:
  """Writes one file, whole or not at all."""
  partial = path.with_name(path.name + ".partial")
  partial.write_bytes(encoded(table))
  partial.replace(path)


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
