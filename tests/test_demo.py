"""The demo, made tiny: every step of it, the table and the figures."""

import json
import pathlib

import pytest
from PIL import Image

from simclr_jax import __main__ as command

CONFIG = pathlib.Path(__file__).parents[1] / "configs" / "demo.py"


@pytest.mark.slow
def test_the_demo_compares_four_ways_and_draws_three_figures(tmp_path, capsys):
  tiny = ["model.width=0.0625", "data.image_size=16", "data.examples=80", "batch_size=16", "eval_batch_size=40"]
  tiny += ["total_steps=2", "linear_eval.total_epochs=0.2", "finetune.total_epochs=0.2"]
  tiny += ["linear_eval.batch_size=16", "finetune.batch_size=16"]
  argv = [f"--config={CONFIG}", *(f"--config.{override}" for override in tiny), f"--workdir={tmp_path}"]
  assert command.main(["demo", *argv]) == 0
  table = capsys.readouterr().out
  result = json.loads((tmp_path / "result.json").read_text())
  assert set(result) == {"raw pixels", "random encoder", "SimCLR", "supervised"}
  for value in result.values():
    assert f"{100 * value:5.1f} %" in table
  for name in ("view_pairs", "curves", "features"):
    with Image.open(tmp_path / "figures" / f"{name}.png") as image:
      assert image.size[0] > 300
