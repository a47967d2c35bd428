"""Prints the table of docs/scale.md from the plans in results/plans."""

import json
import pathlib

from simclr_jax.hardware import chips

COLUMNS = (
  "network",
  "batch",
  "micro-batches",
  "devices",
  "needed on each",
  "parameters, optimizer",
  "activations, temporaries",
  "TFLOP a step",
  "step at the peak",
  "run at 35 % of it",
)


def main() -> str:
  """Returns the table in Markdown, a row for each plan."""
  folder = pathlib.Path(__file__).parents[1] / "results" / "plans"
  files = [json.loads(path.read_text()) for path in sorted(folder.glob("*/plan.json"))]
  rows = [row(file, plan) for file in files for plan in file["plans"]]
  return "\n".join([_line(COLUMNS), _line(["---"] * len(COLUMNS)), *rows])


def row(file: dict, plan: dict) -> str:
  """Returns one row of the table."""
  keys = file["config"]["model"]
  network = f"R{keys['depth']} {keys['width']:g}x" + (" + SK" if keys["sk_ratio"] else "")
  split = file["config"]["sharding"]["parameters"] == "sharded"
  extras = [text for text, on in (("split", split), (f"remat {keys['remat']}", keys["remat"] != "none")) if on]
  memory = f"{plan['needed'] / chips.GIB:.1f} of {plan['available'] / chips.GIB:.0f} GiB"
  held, activations = "", ""
  if plan["memory"] is not None:
    held = f"{(plan['memory']['parameters'] + plan['memory']['optimizer']) / chips.GIB:.2f}"
    activations = f"{plan['memory']['activations and temporaries'] / chips.GIB:.1f}"
  cells = [
    ", ".join([network, *extras]),
    f"{plan['batch_size']:,}",
    str(plan["micro_batches"]),
    f"{file['topology']}: {plan['devices']}",
    memory if plan["fits"] else f"**does not fit**: {memory}",
    held,
    activations,
    f"{plan['step_flops'] / 1e12:,.0f}",
    f"{1e3 * plan['step_seconds_at_peak']:,.0f} ms",
    f"{plan['steps']:,} steps, {plan['hours']:.1f} h",
  ]
  return _line(cells)


def _line(cells) -> str:
  return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
  print(main())
