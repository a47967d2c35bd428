"""Studies: the definitions as data, and a grid of cells on disk, read, written and drawn."""

import json
import pathlib

import pytest
from PIL import Image

import simclr_jax
from simclr_jax import config as config_lib
from simclr_jax import losses
from simclr_jax.data import composition
from simclr_jax.studies import definitions, grid

DEMO = str(pathlib.Path(__file__).parents[1] / "configs" / "study_demo.py")


@pytest.mark.parametrize("name", definitions.STUDIES)
def test_cells_set_keys_of_the_config_and_differ_from_each_other(name):
  definition = definitions.STUDIES[name]
  base = config_lib.flat(simclr_jax.load_config(DEMO).to_dict())
  by_folder = {}
  for row in definition.rows.default(base):
    for column in definition.columns.default(base):
      for variant in definition.variants:
        overrides = definition.overrides(row, column, variant, base)
        assert {key: type(value) for key, value in overrides.items()} == {key: type(base[key]) for key in overrides}
        assert by_folder.setdefault(definition.folder(row, column, variant), overrides) == overrides
  distinct = {json.dumps(overrides, sort_keys=True) for overrides in by_folder.values()}
  assert len(distinct) == len(by_folder)
  assert definition.chart in ("heat_map", "bars", "lines_over_rows", "lines_over_columns")


def test_studies_name_all_operations_and_losses():
  # The order of the columns of figure 5.
  assert composition.OPERATIONS == ("crop", "cutout", "color", "sobel", "noise", "blur", "rotate")
  assert set(definitions.LOSS.rows.labels) == set(losses.KINDS) - {"sup_con"}
  averages = {}
  for (row, _, _), value in definitions.AUGMENTATIONS.published.items():
    averages.setdefault(row, []).append(value)
  # The row averages that the paper prints.
  printed = [39.2, 29.4, 25.7, 18.8, 15.5, 14.5, 13.8]
  assert [sum(row) / 7 for row in averages.values()] == pytest.approx(printed, abs=0.06)


def test_both_scalings_have_the_same_rate_at_the_base_batch_size():
  base = {"batch_size": 4096, "optimizer.base_learning_rate": 0.3, "optimizer.scaling": "linear", "total_epochs": 100.0}
  of = lambda scaling: definitions.BATCH_EPOCHS.overrides("512", "200", scaling, base)
  assert of("linear")["optimizer.base_learning_rate"] == 0.3
  assert of("sqrt")["optimizer.base_learning_rate"] == pytest.approx(0.075)
  swapped = base | {"optimizer.base_learning_rate": 0.075, "optimizer.scaling": "sqrt"}
  there = definitions.BATCH_EPOCHS.overrides("512", "200", "linear", swapped)
  assert there["optimizer.base_learning_rate"] == pytest.approx(0.3)
  assert (there["batch_size"], there["total_epochs"]) == (512, 200.0)
  assert definitions.BATCH_EPOCHS.rows.default(base) == ("1024", "2048", "4096", "8192")
  assert definitions.BATCH_EPOCHS.columns.default(base) == ("50", "100", "200")


def test_equal_numbers_of_an_axis_are_one_label():
  assert definitions.TEMPERATURE.rows.chosen("0.10,0.2,1e2,0.1", "rows") == ("0.1", "0.2", "100")
  assert definitions.COLOR_STRENGTH.rows.chosen("1+blur,0.3", "rows") == ("1+blur", "0.3")


@pytest.fixture
def finish(monkeypatch):
  """Returns a function that writes what the runs of a cell leave; a folder with a result counts as finished."""
  monkeypatch.setattr(
    grid.experiment, "is_finished", lambda folder, config: (pathlib.Path(folder) / "result.json").exists()
  )

  def write(cells, labels, accuracy, loss=2.5):
    for folder in map(pathlib.Path, cells.folders(labels)):
      folder.mkdir(parents=True, exist_ok=True)
      (folder / "result.json").write_text(json.dumps({"eval/top1": accuracy, "eval/knn_top1": accuracy / 2}))
      (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "train/loss": loss}) + "\n")

  return write


@pytest.mark.parametrize("name", definitions.STUDIES)
def test_every_study_is_drawn_with_the_published_accuracies(tmp_path, finish, name):
  definition, config = definitions.STUDIES[name], simclr_jax.load_config(DEMO)
  base = config_lib.flat(config.to_dict())
  cells = grid.Grid(
    name, config, str(tmp_path), "linear", definition.rows.default(base), definition.columns.default(base)
  )
  first, *others = cells.cells
  for labels in others[::3]:
    finish(cells, labels, 0.5)
  finish(cells, first, 0.25)
  result = cells.write()
  cells.draw()
  assert result["top1"][definition.folder(*first)] == 0.25
  assert result["finished"] + result["not_run"] == len(cells.cells)
  with Image.open(tmp_path / "figures" / f"{name}.png") as image:
    assert image.size[0] > 500
  tree = json.loads((tmp_path / "study.json").read_text())
  assert tree["published"]["ours"] is False
  assert len(tree["published"]["cells"]) == len(definition.published)


def test_a_grid_keeps_cells_of_earlier_commands_and_rereads_its_runs(tmp_path, finish):
  config = simclr_jax.load_config(DEMO)
  make = lambda evaluation, rows: grid.Grid("temperature", config, str(tmp_path), evaluation, rows, ("normalized",))
  first, second = ("0.1", "normalized", ""), ("0.5", "normalized", "")
  cells = make("linear", ("0.1",))
  assert not cells.refresh(first)
  finish(cells, first, 0.25, loss=1.5)
  assert cells.pretrained(first)
  assert cells.refresh(first)
  assert cells.outcome(first) == "0.1 + normalized: 25.0 %"
  cells.write()
  # A second command asks for another row; the cell of the first stays in the table.
  cells = make("linear", ("0.5",))
  assert cells.due(("0.5",), ("normalized",)) == [second]
  assert (cells.cells[first]["accuracy"], cells.cells[first]["train_loss"]) == (0.25, 1.5)
  assert cells.outcome(second) == "0.5 + normalized: not run"
  # Another evaluation reads its own folder and key of the result.
  by_neighbours = make("knn", ("0.1",))
  assert (by_neighbours.job, by_neighbours.cells[first]["state"]) == ("knn", "not run")
  finish(by_neighbours, first, 0.25)
  by_neighbours.refresh(first)
  assert by_neighbours.cells[first]["accuracy"] == 0.125
  # A cell whose run was deleted is not finished any more.
  (pathlib.Path(cells.folders(first)[1]) / "result.json").unlink()
  assert make("linear", ("0.1",)).cells[first]["state"] == "not run"


def test_cells_with_the_same_config_share_one_run(tmp_path):
  cells = grid.Grid("head", simclr_jax.load_config(DEMO), str(tmp_path), "linear", ("none", "linear"), ("8", "16"))
  named = [pathlib.Path(cells.folders(labels)[0]).parent.name for labels in cells.due(("none", "linear"), ("8", "16"))]
  assert named == ["none", "linear-8", "linear-16"]


def test_the_configs_of_a_cell_hold_its_overrides(tmp_path):
  config = simclr_jax.load_config(DEMO)
  labels = ("0.1", "plain", "")
  cells = grid.Grid("temperature", config, str(tmp_path), "reference", ("0.1",), ("plain",))
  pretraining, evaluating = cells.configs(labels)
  assert (pretraining.loss.temperature, pretraining.loss.normalize, pretraining.checkpoint) == (0.1, False, "")
  assert (evaluating.linear_eval.protocol, evaluating.checkpoint) == ("reference", cells.folders(labels)[0])
  assert (config.loss.temperature, config.linear_eval.protocol) == (0.2, "features")
