"""Runs every job once on CIFAR-10, for two CPU cores: pretrain, evaluate, fine-tune with few labels, distil, transfer.

  .venv/bin/python scripts/cifar10_chain.py --data_dir=TFDS_DIR [--runs=runs/chain]

Each step is one command, printed before it runs; the same command continues a stopped chain. Results go to
results/cifar10_chain.json, with commit, commands and seconds, and as a table to the terminal.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import time

from benchmarks import measure

ROOT = pathlib.Path(__file__).parents[1]

CONFIG = "--config=cifar10:small"
# Crops and flips, momentum; a network that starts from nothing takes a higher rate and some decay.
SCRATCH = ["--config.finetune.optimizer.base_learning_rate=0.2", "--config.finetune.optimizer.weight_decay=1e-4"]
SMALL_BATCH = "--config.finetune.batch_size=64"
FEW = {
  "1pct": ["--config.labels.fraction=0.01", SMALL_BATCH, "--config.finetune.total_epochs=60"],
  "10pct": ["--config.labels.fraction=0.1", SMALL_BATCH, "--config.finetune.total_epochs=20"],
}
# An epoch of 500 images has eight steps.
SELDOM = "--config.checkpoint_every_epochs=10"


def steps(runs: str):
  """Returns (name, job, arguments) of every step in order."""
  start = f"--config.checkpoint={runs}/pretrain"
  student = ["--config.model.width=0.125"]
  features = "--config.linear_eval.protocol=features"
  yield "pretrain", "pretrain", [CONFIG, "--config.total_epochs=24"]
  yield "linear_eval", "linear_eval", [start]
  yield "linear_features", "linear_eval", [start, features]
  yield "linear_features_random", "linear_eval", [CONFIG, "--config.checkpoint=random", features]
  yield "knn", "knn", [start]
  for name, labels in FEW.items():
    yield f"finetune_{name}", "finetune", [start, *labels, SELDOM]
    yield f"supervised_{name}", "finetune", [CONFIG, *labels, *SCRATCH, SELDOM]
  longer = "--config.finetune.total_epochs=180"
  yield "supervised_1pct_long", "finetune", [CONFIG, *FEW["1pct"], *SCRATCH, longer, SELDOM]
  yield "student_supervised_10pct", "finetune", [CONFIG, *student, *FEW["10pct"], *SCRATCH, SELDOM]
  teacher = f"--config.distill.teacher={runs}/finetune_10pct"
  epochs = ["--config.distill.total_epochs=6", "--config.distill.optimizer.warmup_epochs=0.5"]
  yield "student_distilled", "distill", [CONFIG, *student, teacher, *epochs]
  yield "transfer", "transfer", [start, "--config.transfer.datasets=cifar10"]


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--data_dir", required=True)
  parser.add_argument("--runs", default="runs/chain")
  parser.add_argument("--only", default="", help="steps by name, with commas between; the record keeps the others")
  options = parser.parse_args()
  path = ROOT / "results" / "cifar10_chain.json"
  record = json.loads(path.read_text()) if path.exists() else {}
  for name, job, arguments in steps(options.runs):
    if options.only and name not in options.only.split(","):
      continue
    command = ["-m", "simclr_jax", job, *arguments, f"--config.data.dir={options.data_dir}"]
    command.append(f"--workdir={options.runs}/{name}")
    shown = "python " + " ".join(command).replace(options.data_dir, "DIR")
    print(f"\n$ {shown}", flush=True)
    begin = time.monotonic()
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True)
    result = json.loads((ROOT / options.runs / name / "result.json").read_text())
    seconds = round(time.monotonic() - begin)
    record[name] = {**measure.circumstances(shown), "seconds": seconds, "result": result}
    path.write_text(json.dumps(record, indent=2) + "\n")
  print("\n" + "\n".join(f"{name:<28}{_headline(entry['result'])}" for name, entry in record.items()))


def _headline(result: dict) -> str:
  found = {name: result[name] for name in ("eval/top1", "eval/knn_top1", "eval/online_top1") if name in result}
  found |= {name: entry["value"] for name, entry in result.get("datasets", {}).items()}
  return ", ".join(f"{100 * value:.2f} % {name}" for name, value in found.items())


if __name__ == "__main__":
  main()
