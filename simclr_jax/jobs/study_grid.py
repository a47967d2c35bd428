"""The cells of a study on disk: their configs, what their runs have left, the tables and the figure of them."""

import json

from etils import epath

from simclr_jax import figures, studies
from simclr_jax.jobs import knn, linear_eval, setup
from simclr_jax.training import checkpoint, telemetry

# By the evaluation's name: its job, what it overrides, and the accuracy that is shown.
EVALUATIONS = {
  "linear": (linear_eval, {"linear_eval.protocol": "features"}, "eval/top1"),
  "reference": (linear_eval, {"linear_eval.protocol": "reference"}, "eval/top1"),
  "knn": (knn, {}, "eval/knn_top1"),
}
FINISHED, FAILED, OPEN = "finished", "failed", "not run"
NOTHING_YET = {"state": OPEN, "accuracy": None, "train_loss": None, "seconds": None}

Labels = tuple[str, str, str]  # Row, column, variant.


class Grid:
  """A study in its folder.

  Attributes:
    cells: labels -> what `study.json` says of a cell; all that were asked for, now or before.
    figure: path of the PNG.
    job: evaluates a cell.
  """

  def __init__(self, name: str, config, workdir: str, evaluation: str, rows: tuple[str, ...], columns: tuple[str, ...]):
    """Reads what is there; rows and columns are those that are asked for now."""
    self._name, self._study, self._config = name, studies.STUDIES[name], config
    self._base = checkpoint.flat(config.to_dict())
    self._workdir, self._evaluation = epath.Path(workdir), evaluation
    self.job, self._overrides, self._accuracy = EVALUATIONS[evaluation]
    suffix = "" if evaluation == "linear" else f"_{evaluation}"
    self._path = self._workdir / f"study{suffix}.json"
    self.figure = str(self._workdir / "figures" / f"{name}{suffix}.png")
    before = json.loads(self._path.read_text()) if self._path.exists() else {"rows": [], "columns": [], "cells": []}
    known = {(cell["row"], cell["column"], cell["variant"]): cell for cell in before["cells"]}
    self._rows = _merged(self._study.rows, before["rows"], rows)
    self._columns = _merged(self._study.columns, before["columns"], columns)
    self.cells = {}
    for labels in ((r, c, v) for r in self._rows for c in self._columns for v in self._study.variants):
      self.cells[labels] = dict(zip(("row", "column", "variant"), labels, strict=True)) | NOTHING_YET
      self.cells[labels] |= known.get(labels, {})
      self.refresh(labels)

  def due(self, rows: tuple[str, ...], columns: tuple[str, ...]) -> list[Labels]:
    """Returns the cells of some rows and columns; of those that are one run, the first."""
    found = {}
    for labels in self.cells:
      if labels[0] in rows and labels[1] in columns:
        found.setdefault(self._study.folder(*labels), labels)
    return list(found.values())

  def folders(self, labels: Labels) -> tuple[str, str]:
    """Returns the folders of a cell's two runs, of pretraining and of the evaluation."""
    folder = self._workdir / "cells" / self._study.folder(*labels)
    return str(folder / "pretrain"), str(folder / self._evaluation)

  def configs(self, labels: Labels):
    """Returns the configs of a cell's two runs."""
    pretraining = self._config.copy_and_resolve_references()
    _set(pretraining, self._study.overrides(*labels, self._base))
    evaluating = pretraining.copy_and_resolve_references()
    _set(evaluating, {**self._overrides, "checkpoint": self.folders(labels)[0]})
    return pretraining, evaluating

  def refresh(self, labels: Labels) -> bool:
    """Reads what the runs of a cell have left, into all cells that are the same; returns whether it is finished."""
    (pretrained, evaluated), cell = self.folders(labels), self.cells[labels]
    if not all(map(_is_finished, (pretrained, evaluated), self.configs(labels))):
      if cell["state"] == FINISHED:  # Its folders went, or are of another config.
        cell |= NOTHING_YET
      return False
    top1 = json.loads((epath.Path(evaluated) / "result.json").read_text())[self._accuracy]
    losses = [row["train/loss"] for row in telemetry.read_rows(pretrained) if "train/loss" in row]
    cell |= {"state": FINISHED, "accuracy": top1, "train_loss": losses[-1]}
    cell.pop("error", None)
    return True

  def pretrained(self, labels: Labels) -> bool:
    """Whether a cell's pretraining is done."""
    return _is_finished(self.folders(labels)[0], self.configs(labels)[0])

  def outcome(self, labels: Labels) -> str:
    """Returns a cell and how it went, in one line."""
    cell = self.cells[labels]
    names = " + ".join(dict.fromkeys(label for label in labels if label))
    seconds = "" if cell["seconds"] is None else f" ({cell['seconds']:.0f} s)"
    return (
      f"{names}: {100 * cell['accuracy']:.1f} %{seconds}" if cell["state"] == FINISHED else f"{names}: {_why(cell)}"
    )

  def write(self) -> dict:
    """Writes the study's JSON file and `result.json`; returns the latter."""
    for labels in self.cells:  # Some may be the run of another.
      self.refresh(labels)
    tree = {"study": self._name, "source": self._study.source, "evaluation": self._evaluation}
    tree |= {"rows": self._rows, "columns": self._columns, "cells": list(self.cells.values())}
    paper = [
      {"row": row, "column": column, "variant": variant, "top1_percent": value}
      for (row, column, variant), value in self._study.published.items()
    ]
    tree["published"] = {"what": self._study.published_is, "ours": False, "cells": paper}
    telemetry.write_json(str(self._path), tree)
    states = [cell["state"] for cell in self.cells.values()]
    result = {"study": self._name, "evaluation": self._evaluation}
    result |= {state.replace(" ", "_"): states.count(state) for state in (FINISHED, FAILED, OPEN)}
    result["top1"] = {
      self._study.folder(*labels): cell["accuracy"] for labels, cell in self.cells.items() if cell["state"] == FINISHED
    }
    telemetry.write_json(str(self._workdir / "result.json"), result)
    return result

  def draw(self) -> None:
    """Draws what is finished, beside what was published."""
    study, data = self._study, self._base["data.name"] or self._base["data.source"]
    ours = {k: 100 * cell["accuracy"] if cell["state"] == FINISHED else None for k, cell in self.cells.items()}
    panels = {f"This run: {data}": ours}
    if study.published:
      panels[f"Published, not ours: {study.published_is}"] = study.published
    heading = {"title": f"{study.title} ({study.source})"}
    heading["unit"] = f"{'kNN' if self._evaluation == 'knn' else 'linear evaluation'}, top-1 %"
    if study.chart == "heat_map":
      tables = {name: {labels[:2]: value for labels, value in panel.items()} for name, panel in panels.items()}
      axes = (study.rows.name, study.columns.name)
      figures.heat_maps(tables, self._rows, self._columns, self.figure, axes=axes, **heading)
    elif study.chart == "bars":
      heights = {name: {labels[0]: value for labels, value in panel.items()} for name, panel in panels.items()}
      figures.bars(heights, self.figure, axis_name=study.rows.name, **heading)
    else:
      x, line = (0, 1) if study.chart == "lines_over_rows" else (1, 0)
      families = {name: _families(panel, x, line) for name, panel in panels.items()}
      names = (study.rows.name, study.columns.name)
      figures.lines(families, self.figure, axis_name=names[x], legend=names[line], **heading)


def _families(panel, x: int, line: int):
  """Returns {(line, variant): {x: value}} of {labels: value}."""
  families = {}
  for labels, value in panel.items():
    families.setdefault((labels[line], labels[2]), {})[labels[x]] = value
  return families


def _merged(axis: studies.Axis, before, now) -> list[str]:
  """Returns the labels of an axis: all there are, or the numbers that were asked for before and now."""
  if axis.number is None:
    return list(axis.labels)
  return sorted({*before, *now}, key=lambda label: (float(label.partition("+")[0]), label))


def _set(config, overrides) -> None:
  for key, value in overrides.items():
    section, _, leaf = key.rpartition(".")
    holder = config
    for name in section.split(".") if section else ():
      holder = holder[name]
    holder[leaf] = value


def _is_finished(folder: str, config) -> bool:
  """Whether a folder holds the result of a run of this very config."""
  path = epath.Path(folder)
  if not (path / "result.json").exists():
    return False
  ours, theirs = (
    checkpoint.flat(tree) for tree in (config.to_dict(), json.loads((path / "config.json").read_text())["config"])
  )
  return all(ours.get(key) == theirs.get(key) or key.startswith(setup.FREE_KEYS) for key in ours.keys() | theirs.keys())


def _why(cell) -> str:
  return f"failed: {cell['error']}" if cell["state"] == FAILED else cell["state"]
