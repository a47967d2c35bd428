"""The study job by its command: run, stopped, continued, with a cell that fails, and drawn."""

import json
import os
import pathlib
import signal

import pytest
from PIL import Image
from plain_encoder import PlainEncoder
from runs import TINY

from simclr_jax import __main__ as command
from simclr_jax import config as config_lib
from simclr_jax import errors, files
from simclr_jax.jobs import knn, linear_eval, pretrain, study
from simclr_jax.models import encoders
from simclr_jax.training import checkpoint, interruption, telemetry

PROBES = ("epochs=1", "batch_size=16", "lbfgs_steps=5", "lbfgs_tolerance=10.0", "learning_rates=0.1")
PROBES += ("weight_decays=0.0", "l2_strengths=1e-2")
CELLS = ["--config.model.encoder=plain", "--config.total_steps=2", "--config.head.online=false"]
CELLS += [f"--config.probes.{key}" for key in PROBES]


@pytest.fixture(autouse=True)
def registered(monkeypatch):
  """Lets the cells have an encoder that compiles quickly."""
  monkeypatch.setitem(encoders.ENCODERS, "plain", PlainEncoder)


def run(workdir, name, *more):
  return command.main(["study", f"--study={name}", *TINY, *CELLS, f"--workdir={workdir}", *more])


def cells(workdir, file="study.json"):
  tree = json.loads((workdir / file).read_text())
  return {(cell["row"], cell["column"]): cell for cell in tree["cells"]}


@pytest.fixture
def calls(monkeypatch):
  """The runs that a study starts, in order: the folders' last two names."""
  made = []
  for job in (pretrain, linear_eval, knn):
    inner = job.run

    def counted(config, workdir, inner=inner, **options):
      made.append("/".join(pathlib.Path(workdir).parts[-2:]))
      return inner(config, workdir, **options)

    monkeypatch.setattr(job, "run", counted)
  return made


@pytest.mark.slow
def test_a_grid_is_run_continued_and_drawn(tmp_path, calls, capsys):
  few = ("--rows=crop", "--columns=crop,color,blur", "--evaluation=knn")
  assert run(tmp_path, "augmentations", *few) == 0
  names = ["crop-crop", "crop-color", "crop-blur"]
  assert calls == [f"{name}/{part}" for name in names for part in ("pretrain", "knn")]
  said = capsys.readouterr().err
  assert "[2/3] crop + color: " in said
  assert "Checkpoints, metrics and figures" not in said
  found = cells(tmp_path, "study_knn.json")
  assert len(found) == 49
  done = {labels: cell for labels, cell in found.items() if cell["state"] == "finished"}
  assert list(done) == [("crop", "crop"), ("crop", "color"), ("crop", "blur")]
  last = set()
  for name, cell in zip(names, done.values(), strict=True):
    of_run = json.loads((tmp_path / "cells" / name / "knn" / "result.json").read_text())
    assert cell["accuracy"] == of_run["eval/knn_top1"]
    assert cell["train_loss"] == telemetry.read_rows(str(tmp_path / "cells" / name / "pretrain"))[-1]["train/loss"]
    assert cell["seconds"] > 0
    last.add(cell["train_loss"])
    kept = checkpoint.open(str(tmp_path / "cells" / name / "pretrain")).config
    assert kept["augment"]["compose"] == ("crop" if name == "crop-crop" else name.replace("-", ","))
  assert len(last) == 3  # The cells share a program; the operations are its data.
  result = json.loads((tmp_path / "result.json").read_text())
  assert (result["finished"], result["failed"], result["not_run"]) == (3, 0, 46)
  with Image.open(tmp_path / "figures" / "augmentations_knn.png") as image:
    assert image.size[0] > 800

  # Finished cells are not run again. A cell that a kill left unfinished is; where the evaluation alone is missing, the
  # pretraining is not repeated.
  calls.clear()
  assert run(tmp_path, "augmentations", *few) == 0
  assert calls == []
  (tmp_path / "cells" / "crop-blur" / "knn" / "result.json").unlink()
  (tmp_path / "cells" / "crop-color" / "pretrain" / "result.json").unlink()
  (tmp_path / "cells" / "crop-color" / "knn" / "result.json").unlink()
  (tmp_path / "study_knn.json").unlink()
  before = (tmp_path / "cells" / "crop-color" / "pretrain" / "metrics.jsonl").read_text()
  assert run(tmp_path, "augmentations", *few) == 0
  assert calls == ["crop-color/pretrain", "crop-color/knn", "crop-blur/knn"]
  assert (tmp_path / "cells" / "crop-color" / "pretrain" / "metrics.jsonl").read_text() == before
  again = cells(tmp_path, "study_knn.json")
  assert [cell["accuracy"] for cell in again.values()] == [cell["accuracy"] for cell in found.values()]

  # Another evaluation takes the same pretraining runs; another study is refused in this folder.
  calls.clear()
  assert run(tmp_path, "augmentations", "--rows=crop", "--columns=blur") == 0
  assert calls == ["crop-blur/linear"]
  of_run = json.loads((tmp_path / "cells" / "crop-blur" / "linear" / "result.json").read_text())
  assert cells(tmp_path)["crop", "blur"]["accuracy"] == of_run["eval/top1"]
  assert cells(tmp_path)["color", "blur"]["state"] == "not run"
  capsys.readouterr()
  assert run(tmp_path, "loss") == 2
  assert "holds another run: study was 'augmentations', now is 'loss'" in capsys.readouterr().err
  assert run(tmp_path, "augmentations", "--config.loss.temperature=0.3") == 2
  assert "loss.temperature" in capsys.readouterr().err


@pytest.fixture
def pretended(monkeypatch):
  """Jobs that only write the files of real ones; returns cell name -> function that its pretraining calls."""
  happens = {}

  def pretrained(config, workdir, **options):
    config_lib.claim(workdir, config.to_dict(), "pretrain")
    happens.get(pathlib.Path(workdir).parent.name, lambda: None)()
    files.write_json(f"{workdir}/result.json", {})
    (pathlib.Path(workdir) / "metrics.jsonl").write_text(json.dumps({"step": 1, "train/loss": 2.5}) + "\n")

  def evaluated(config, workdir, **options):
    config_lib.claim(workdir, config.to_dict(), "linear_eval")
    files.write_json(f"{workdir}/result.json", {"eval/top1": 0.5})

  monkeypatch.setattr(pretrain, "run", pretrained)
  monkeypatch.setattr(linear_eval, "run", evaluated)
  return happens


def raising(error):
  def happen():
    raise error

  return happen


TEMPERATURES = ("--rows=0.1,0.2,0.5", "--columns=normalized")


@pytest.mark.slow
def test_the_rest_goes_on_where_a_cell_fails(tmp_path, pretended, capsys):
  pretended["0.1-normalized"] = raising(errors.UserError("training diverged; lower the rate."))
  assert run(tmp_path, "temperature", *TEMPERATURES) == 2
  said = capsys.readouterr().err
  assert "[1/3] 0.1 + normalized: failed: training diverged; lower the rate." in said
  assert "[2/3] 0.2 + normalized: 50.0 % (" in said
  assert "1 of 3 cells failed, the others are done; first 0.1 + normalized: failed: training diverged" in said
  assert "Traceback" not in said

  pretended["0.2-plain"] = raising(ZeroDivisionError("of ours"))
  assert run(tmp_path, "temperature", *TEMPERATURES[:1], "--columns=normalized,plain") == 1
  said = capsys.readouterr().err
  assert "[1/6] 0.1 + normalized: failed" in said
  assert "[3/6] 0.2 + normalized: 50.0 % (0 s), finished before" in said
  assert "[4/6] 0.2 + plain: failed: ZeroDivisionError: of ours" in said
  assert "in happen" in said  # Its traceback.
  found = cells(tmp_path)
  assert {cell["state"] for cell in found.values()} == {"finished", "failed"}
  assert found["0.2", "plain"]["error"] == "ZeroDivisionError: of ours"
  assert (found["0.5", "plain"]["accuracy"], found["0.5", "plain"]["train_loss"]) == (0.5, 2.5)

  # The same command runs the failed cells again; the rows of earlier commands stay in the table.
  pretended.clear()
  assert run(tmp_path, "temperature", "--rows=0.1,7", "--columns=normalized") == 0
  found = cells(tmp_path)
  assert {row for row, _ in found} == {"0.1", "0.2", "0.5", "7"}
  assert "error" not in found["0.1", "normalized"]
  states = {labels: cell["state"] for labels, cell in found.items()}
  assert (states["0.1", "normalized"], states["0.2", "plain"], states["7", "plain"]) == (
    "finished",
    "failed",
    "not run",
  )


@pytest.mark.slow
def test_sigterm_stops_the_whole_study(tmp_path, pretended):
  pretended["0.2-normalized"] = lambda: os.kill(os.getpid(), signal.SIGTERM)
  before = signal.getsignal(signal.SIGTERM)
  with pytest.raises(interruption.Preempted) as stopped:
    run(tmp_path, "temperature", *TEMPERATURES)
  assert stopped.value.code == 143
  assert signal.getsignal(signal.SIGTERM) is before
  assert {row: cell["state"] for (row, column), cell in cells(tmp_path).items() if column == "normalized"} == {
    "0.1": "finished",
    "0.2": "not run",
    "0.5": "not run",
  }
  pretended.clear()
  assert run(tmp_path, "temperature", *TEMPERATURES) == 0


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({}, r"study has no --study; give --study=NAME, one of augmentations, "),
    ({"study": "augmentation"}, r'--study=augmentation is unknown; did you mean "augmentations"\?'),
    ({"study": "loss", "evaluation": "kn"}, r'--evaluation=kn is unknown; did you mean "knn"\?; use linear'),
    ({"study": "loss", "rows": "nt_xent,mse"}, r"--rows=nt_xent,mse: 'mse' is no loss"),
    ({"study": "temperature", "rows": "0.1,-1"}, r"--rows=0.1,-1: '-1' is no temperature; give positive numbers"),
    ({"study": "encoder", "rows": "1.5"}, r"'1.5' is no depth; give positive whole numbers"),
  ],
)
def test_a_study_that_is_not_there_is_a_user_error(tmp_path, options, message):
  with pytest.raises(errors.UserError, match=message):
    study.run(config_lib.load("study_demo"), str(tmp_path), **options)
  assert not list(tmp_path.iterdir())
