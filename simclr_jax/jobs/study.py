"""study: a grid of the paper's, each cell pretrained and evaluated; runs or resumes it, and draws its figure.

Needs --config (what the cells have in common), --workdir and --study=NAME:

  augmentations    compositions of two augmentations, a heat map (v1 figure 5)
  color_strength   of the colour distortion (table 1)
  batch_epochs     batch size x epochs, linear and square-root learning rates (figure 9, table B.1)
  temperature      temperature x normalisation (table 5)
  head             kind of projection head x output dimension (figure 8)
  loss             kind of loss (table 4)
  encoder          depth x width (figure 7)

  --rows=a,b --columns=c,d   a part of the grid, or numbers of one's own where an axis is one of numbers
  --evaluation=linear        linear (linear_eval on features that are computed once) | reference (linear_eval with
                             augmented images) | knn

A cell is an ordinary run in DIR/cells/ROW-COLUMN/pretrain, evaluated in .../linear, .../reference or .../knn. Finished
cells are not run again, an interrupted one continues, the rest goes on where one fails. Writes `study.json`,
`result.json` and figures/NAME.png, after each cell. Exit code 2 if cells failed by a mistake in their input (one that
diverges is such), 1 if one failed by a bug of ours. docs/studies.md has the published numbers.
"""

import contextlib
import gc
import importlib
import signal
import time
import traceback
from collections.abc import Iterator
from typing import Any

import jax
import ml_collections
from etils import epath
from jax.experimental.compilation_cache import compilation_cache

from simclr_jax import config as config_lib
from simclr_jax import errors, experiment, progress
from simclr_jax.jobs import pretrain
from simclr_jax.studies import definitions, grid
from simclr_jax.training import interruption, telemetry


def run(
  config: ml_collections.ConfigDict,
  workdir: str,
  *,
  study: str = "",
  rows: str = "",
  columns: str = "",
  evaluation: str = "linear",
) -> dict[str, Any]:
  """Runs what is missing of a grid, and returns (and writes to `result.json`) its accuracies."""
  asked = {}
  if config_lib.unmeasured(config):
    measured = experiment.Experiment(config, "study", workdir)
    config, asked = measured.config, measured.asked
  chosen = _checked(config_lib.flat(config.to_dict()), study, rows, columns, evaluation)
  config_lib.claim(workdir, {**config.to_dict(), "study": study}, "study", asked=asked)
  cells = grid.Grid(study, config, workdir, evaluation, *chosen)
  due = cells.due(*chosen)
  telemetry.log.info(
    "study %s: %d cells, each pretrained and evaluated (%s), in %s", study, len(due), evaluation, workdir
  )
  bugs = []
  bar = progress.bar(len(due), "study", "cell")
  with _compiled_in(str(epath.Path(workdir) / "compiled")), _stopping(), bar:
    for number, labels in enumerate(due, 1):
      known = cells.refresh(labels)
      if not known:
        bugs += _run_cell(cells, labels)
        cells.write()
        # What a cell compiled goes with its functions, which hold each other.
        gc.collect()
      telemetry.log.info("[%d/%d] %s%s", number, len(due), cells.outcome(labels), ", finished before" if known else "")
      bar.update()
  result = cells.write()
  cells.draw()
  telemetry.log.info("Figure: %s", cells.figure)
  failed = [labels for labels in due if cells.cells[labels]["state"] == grid.FAILED]
  if bugs:
    raise RuntimeError(f"{len(bugs)} of {len(due)} cells failed by a bug, first: {bugs[0]}") from bugs[0]
  if failed:
    raise errors.UserError(
      f"{len(failed)} of {len(due)} cells failed, the others are done; first {cells.outcome(failed[0])} "
      "The same command runs those that failed again."
    )
  return result


def _checked(base: dict[str, Any], study: str, rows: str, columns: str, evaluation: str) -> list[tuple[str, ...]]:
  """Returns the labels of the rows and columns asked for, once the command is known to make sense."""
  if study not in definitions.STUDIES:
    near = errors.nearest(study, definitions.STUDIES)
    named = f"--study={study} is unknown{near}" if study else "study has no --study"
    raise errors.UserError(f"{named}; give --study=NAME, one of {', '.join(definitions.STUDIES)}.")
  known = grid.EVALUATIONS
  if evaluation not in known:
    raise errors.UserError(
      f"--evaluation={evaluation} is unknown{errors.nearest(evaluation, known)}; use {', '.join(known)}."
    )
  if jax.process_count() > 1:
    raise errors.UserError(
      f"study is one process with all its devices, and this is one of {jax.process_count()}; start it alone, or give "
      "each machine its own --rows and --workdir."
    )
  axes = definitions.STUDIES[study].rows, definitions.STUDIES[study].columns
  asked = zip(axes, (rows, columns), ("rows", "columns"), strict=True)
  return [axis.chosen(text, option) if text else axis.default(base) for axis, text, option in asked]


def _run_cell(cells: grid.Grid, labels: grid.Labels) -> list[Exception]:
  """Runs what is missing of one cell; returns the exception if it failed by a bug of ours."""
  begin, cell, bugs = time.monotonic(), cells.cells[labels], []
  try:
    (pretrained, evaluated), (pretraining, evaluating) = cells.folders(labels), cells.configs(labels)
    with telemetry.quiet():
      if not cells.pretrained(labels):
        pretrain.run(pretraining, pretrained, draw=False)
      importlib.import_module(f"simclr_jax.jobs.{cells.job}").run(evaluating, evaluated)
    cells.refresh(labels)
  except errors.UserError as error:
    cell |= {"state": grid.FAILED, "error": str(error)}
  except Exception as error:
    telemetry.log.error("%s", traceback.format_exc())
    cell |= {"state": grid.FAILED, "error": f"{type(error).__name__}: {error}".partition("\n")[0]}
    bugs.append(error)
  cell["seconds"] = round(time.monotonic() - begin, 1)
  return bugs


@contextlib.contextmanager
def _compiled_in(folder: str) -> Iterator[None]:
  """Keeps compiled programs in a folder, where later cells find those that are theirs too; a cache of the user's stays.

  Most of a small cell's time would go into compiling the same encoder, classifier and initialisation again.
  """
  if jax.config.jax_compilation_cache_dir:
    yield
    return
  least = jax.config.jax_persistent_cache_min_compile_time_secs
  _use_cache(folder, 0.1)  # What compiles faster is compiled again rather than kept.
  try:
    yield
  finally:
    _use_cache(None, least)


def _use_cache(folder: str | None, least_seconds: float) -> None:
  jax.config.update("jax_compilation_cache_dir", folder)
  jax.config.update("jax_persistent_cache_min_compile_time_secs", least_seconds)
  # It looks at the folder once, before the first compilation.
  compilation_cache.reset_cache()


@contextlib.contextmanager
def _stopping() -> Iterator[None]:
  """Lets SIGTERM end the study where it is; the loop, which has a handler of its own, saves and passes it on."""

  def stop(*_):
    raise interruption.Preempted(interruption.CODES[signal.SIGTERM])

  previous = signal.signal(signal.SIGTERM, stop)
  try:
    yield
  finally:
    signal.signal(signal.SIGTERM, previous)
