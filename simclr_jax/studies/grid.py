"""The cells of a study on disk: their configs, the results of their runs, the study's JSON files and its figure."""

import dataclasses
import itertools
import json
from typing import Any

import ml_collections
from etils import epath

from simclr_jax import config as config_lib
from simclr_jax import experiment, figures, files
from simclr_jax.studies import definitions
from simclr_jax.training import telemetry


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """How the cells of a study are evaluated."""

  job: str
  overrides: definitions.Overrides  # of the job's config
  accuracy: str  # key of the job's result


EVALUATIONS = {
  "linear": Evaluation("linear_eval", {"linear_eval.protocol": "features"}, "eval/top1"),
  "reference": Evaluation("linear_eval", {"linear_eval.protocol": "reference"}, "eval/top1"),
  "knn": Evaluation("knn", {}, "eval/knn_top1"),
}
FINISHED, FAILED, NOT_RUN = "finished", "failed", "not run"
NO_RESULT = {"state": NOT_RUN, "accuracy": None, "train_loss": None, "seconds": None}

Values = tuple[str, ...]  # Labels of an axis.
Labels = tuple[str, str, str]  # Row, column, variant.


class Grid:
  """A study in its folder: `cells`, all that this or an earlier command asked for, with their entries in `study.json`.

  `figure` is the path of the PNG, `job` the name of the job that evaluates a cell.
  """

  def __init__(
    self, name: str, config: ml_collections.ConfigDict, workdir: str, evaluation: str, rows: Values, columns: Values
  ):
    """Reads the results of the study `name` in `workdir`.

    `config` is what all cells have in common, `evaluation` one of EVALUATIONS; `rows` and `columns` are the labels that
    this command asks for.
    """
    self._name, self._study, self._config = name, definitions.STUDIES[name], config
    self._base = config_lib.flat(config.to_dict())
    self._workdir, self._evaluation, self.job = epath.Path(workdir), evaluation, EVALUATIONS[evaluation].job
    suffix = "" if evaluation == "linear" else f"_{evaluation}"
    self._path = self._workdir / f"study{suffix}.json"
    self.figure = str(self._workdir / "figures" / f"{name}{suffix}.png")
    before = json.loads(self._path.read_text()) if self._path.exists() else {"rows": [], "columns": [], "cells": []}
    known = {(cell["row"], cell["column"], cell["variant"]): cell for cell in before["cells"]}
    self._rows = _merged(self._study.rows, before["rows"], rows)
    self._columns = _merged(self._study.columns, before["columns"], columns)
    self.cells = {}
    for labels in itertools.product(self._rows, self._columns, self._study.variants):
      self.cells[labels] = _named(labels) | NO_RESULT | known.get(labels, {})
      self.refresh(labels)

  def due(self, rows: Values, columns: Values) -> list[Labels]:
    """Returns the cells of these rows and columns; of cells that share one run only the first."""
    found = {}
    for labels in self.cells:
      if labels[0] in rows and labels[1] in columns:
        found.setdefault(self._study.folder(*labels), labels)
    return list(found.values())

  def folders(self, labels: Labels) -> tuple[str, str]:
    """Returns the folders of a cell's two runs: pretraining and evaluation."""
    folder = self._workdir / "cells" / self._study.folder(*labels)
    return str(folder / "pretrain"), str(folder / self._evaluation)

  def configs(self, labels: Labels) -> tuple[ml_collections.ConfigDict, ml_collections.ConfigDict]:
    """Returns the configs of a cell's two runs: pretraining and evaluation."""
    pretraining = self._config.copy_and_resolve_references()
    pretraining.update_from_flattened_dict(self._study.overrides(*labels, self._base))
    pretraining.baselines.train_images = 0  # A study compares its cells.
    evaluating = pretraining.copy_and_resolve_references()
    evaluating.update_from_flattened_dict(EVALUATIONS[self._evaluation].overrides)
    evaluating.checkpoint = self.folders(labels)[0]
    return pretraining, evaluating

  def refresh(self, labels: Labels) -> bool:
    """Updates a cell from the results of its runs; returns whether it is finished."""
    (pretrained, evaluated), cell = self.folders(labels), self.cells[labels]
    if not self.pretrained(labels) or not experiment.is_finished(evaluated, self.configs(labels)[1]):
      if cell["state"] == FINISHED:  # Its folders were deleted, or hold runs of another config.
        cell |= NO_RESULT
      return False
    top1 = json.loads((epath.Path(evaluated) / "result.json").read_text())[EVALUATIONS[self._evaluation].accuracy]
    losses = [row["train/loss"] for row in telemetry.read_rows(pretrained) if "train/loss" in row]
    cell |= {"state": FINISHED, "accuracy": top1, "train_loss": losses[-1]}
    cell.pop("error", None)
    return True

  def pretrained(self, labels: Labels) -> bool:
    """Returns whether a cell's pretraining is finished."""
    return experiment.is_finished(self.folders(labels)[0], self.configs(labels)[0])

  def outcome(self, labels: Labels) -> str:
    """Returns one line for the log: a cell's labels, then its accuracy, its error or that it was not run."""
    cell = self.cells[labels]
    names = " + ".join(dict.fromkeys(label for label in labels if label))
    if cell["state"] != FINISHED:
      return f"{names}: failed: {cell['error']}" if cell["state"] == FAILED else f"{names}: {cell['state']}"
    seconds = "" if cell["seconds"] is None else f" ({cell['seconds']:.0f} s)"
    return f"{names}: {100 * cell['accuracy']:.1f} %{seconds}"

  def write(self) -> dict[str, Any]:
    """Writes the study's JSON file and `result.json`; returns the latter."""
    for labels in self.cells:  # Cells that share a run finish together.
      self.refresh(labels)
    study, cells = self._study, list(self.cells.values())
    paper = [_named(labels) | {"top1_percent": value} for labels, value in study.published.items()]
    published = {"what": study.published_is, "ours": False, "cells": paper}
    tree = {"study": self._name, "source": study.source, "evaluation": self._evaluation}
    tree |= {"rows": self._rows, "columns": self._columns, "cells": cells, "published": published}
    files.write_json(self._path, tree)
    states = [cell["state"] for cell in cells]
    result = {"study": self._name, "evaluation": self._evaluation}
    result |= {state.replace(" ", "_"): states.count(state) for state in (FINISHED, FAILED, NOT_RUN)}
    done = [labels for labels, cell in self.cells.items() if cell["state"] == FINISHED]
    result["top1"] = {study.folder(*labels): self.cells[labels]["accuracy"] for labels in done}
    telemetry.write_result(str(self._workdir), result)
    return result

  def draw(self) -> None:
    """Draws the accuracies of the finished cells beside the published ones."""
    study, data = self._study, self._base["data.name"] or self._base["data.source"]
    ours = {k: 100 * cell["accuracy"] if cell["state"] == FINISHED else None for k, cell in self.cells.items()}
    panels = {f"This run: {data}": ours}
    if study.published:
      panels[f"Published, not ours: {study.published_is}"] = study.published
    heading = {"title": f"{study.title} ({study.source})"}
    heading["unit"] = f"{'kNN' if self._evaluation == 'knn' else 'linear evaluation'}, top-1 %"
    axes = (study.rows.name, study.columns.name)
    if study.chart == "heat_map":
      tables = {name: {labels[:2]: value for labels, value in panel.items()} for name, panel in panels.items()}
      figures.heat_maps(tables, self._rows, self._columns, self.figure, axes=axes, **heading)
    elif study.chart == "bars":
      heights = {name: {labels[0]: value for labels, value in panel.items()} for name, panel in panels.items()}
      figures.bars(heights, self.figure, axis_name=axes[0], **heading)
    else:
      x, line = (0, 1) if study.chart == "lines_over_rows" else (1, 0)
      families = {name: {} for name in panels}
      for name, panel in panels.items():
        for labels, value in panel.items():
          families[name].setdefault((labels[line], labels[2]), {})[labels[x]] = value
      figures.lines(families, self.figure, axis_name=axes[x], legend=axes[line], **heading)


def _named(labels):
  return dict(zip(("row", "column", "variant"), labels, strict=True))


def _merged(axis: definitions.Axis, before, now) -> list[str]:
  """Returns the labels of an axis in order: all of a fixed set, or the numbers that commands have asked for so far."""
  if axis.number is None:
    return list(axis.labels)
  return sorted({*before, *now}, key=lambda label: (float(label.partition("+")[0]), label))
