"""The demo on a tiny network: every step of it, the table and the figures."""

import json

import pytest
from PIL import Image
from plain_encoder import PlainEncoder
from runs import job

from simclr_jax.models import encoders

TINY = ["--config.model.encoder=plain", "--config.total_steps=2", "--config.linear_eval.total_epochs=0.4"]


@pytest.mark.slow
def test_the_demo_compares_four_ways_and_draws_three_figures(tmp_path, capsys, monkeypatch):
  monkeypatch.setitem(encoders.ENCODERS, "plain", PlainEncoder)
  job("demo", tmp_path, *TINY)
  table = capsys.readouterr().out
  result = json.loads((tmp_path / "result.json").read_text())
  assert set(result) == {"raw pixels", "random encoder", "SimCLR", "supervised", "version"}
  for name, value in result.items():
    assert name == "version" or f"{100 * value:5.1f} %" in table
  for name in ("view_pairs", "curves", "features"):
    with Image.open(tmp_path / "figures" / f"{name}.png") as image:
      assert image.size[0] > 300
