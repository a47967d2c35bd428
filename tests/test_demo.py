"""The demo on a tiny network: every step of it, the table and the figures."""

import json

import pytest
from PIL import Image
from runs import job


@pytest.mark.slow
def test_the_demo_compares_four_ways_and_draws_three_figures(tmp_path, capsys):
  # The lengths are those of the runs in runs.py, whose programs are compiled already.
  job("demo", tmp_path, "--config.total_steps=6")
  table = capsys.readouterr().out
  result = json.loads((tmp_path / "result.json").read_text())
  assert set(result) == {"raw pixels", "random encoder", "SimCLR", "supervised", "version"}
  for name, value in result.items():
    assert name == "version" or f"{100 * value:5.1f} %" in table
  for name in ("view_pairs", "curves", "features"):
    with Image.open(tmp_path / "figures" / f"{name}.png") as image:
      assert image.size[0] > 300
