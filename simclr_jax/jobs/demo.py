"""demo: the whole story in a few minutes, without a download: pretrain on built-in images, measure what was learned.

Compares a linear classifier on raw pixels, on the encoder as initialised and on the SimCLR encoder with the same
encoder trained with labels, all on held-out images, and draws the figures. Needs --config and --workdir; `make demo`
gives both.
"""

import time

import ml_collections
import numpy as np
from etils import epath

from simclr_jax import config as config_lib
from simclr_jax import experiment, figures, inference
from simclr_jax.data import source
from simclr_jax.evaluation import probes
from simclr_jax.jobs import finetune, linear_eval, pretrain
from simclr_jax.training import telemetry


def run(config: ml_collections.ConfigDict, workdir: str) -> dict[str, float]:
  """Runs the jobs in sub-folders of `workdir`, prints the table, and returns held-out accuracy by method."""
  begin = time.monotonic()
  folder = epath.Path(workdir)
  config = config.copy_and_resolve_references()
  config.baselines.train_images = 0  # The demo's own table is the comparison.

  def say(text):
    telemetry.log.info("[%3.0f s] %s", time.monotonic() - begin, text)

  def accuracy_of(job, name, checkpoint):
    part = config.copy_and_resolve_references()
    part.checkpoint = checkpoint
    return job.run(part, str(folder / name))["eval/top1"]

  say("1/5 SimCLR: pretraining without labels")
  pretrain.run(config, str(folder / "pretrain"))
  say("2/5 linear classifier on the frozen SimCLR encoder")
  simclr = accuracy_of(linear_eval, "linear_simclr", str(folder / "pretrain"))
  say("3/5 linear classifier on the same encoder as initialised")
  random = accuracy_of(linear_eval, "linear_random", config_lib.RANDOM)
  say("4/5 the same encoder trained with all labels")
  supervised = accuracy_of(finetune, "supervised", "")
  say("5/5 linear classifier on raw pixels, and the map of the features")
  images = experiment.Experiment(config, "demo")
  train, held_out = (_arrays(images, split) for split in (images.train, images.held_out))
  flat = [array for images, label in (train, held_out) for array in (images.reshape(len(images), -1), label)]
  pixels = probes.probe_accuracy(*flat, regularisation=1e-3)
  encode, _ = inference.load_encoder(str(folder / "pretrain"))
  names = images.held_out.class_names
  shown = slice(0, 1500)  # More points hide each other.
  features, labels = encode(held_out[0][shown]), held_out[1][shown]
  path, title = str(folder / "figures" / "features.png"), "Held-out images by SimCLR features (t-SNE)"
  figures.embedding_map(features, labels, names, path, title=title)
  for name in ("view_pairs.png", "curves.png"):
    (folder / "pretrain" / "figures" / name).copy(folder / "figures" / name, overwrite=True)

  result = {"raw pixels": pixels, "random encoder": random, "SimCLR": simclr, "supervised": supervised}
  telemetry.write_result(workdir, result)
  print(_table(result, len(held_out[1])), flush=True)
  say(f"done. Figures: {folder / 'figures'}; metrics, checkpoints and TensorBoard files beside them.")
  return result


def _arrays(this: experiment.Experiment, images: source.Source) -> tuple[np.ndarray, np.ndarray]:
  """Returns f32 or u8 [N, H, W, 3], the split as the network sees it in evaluation, and label i32[N]."""
  parts = list(this.rows(images)())
  table = {key: np.concatenate([part[key] for part in parts]) for key in ("image", "label", "mask")}
  return table["image"][table["mask"] > 0], table["label"][table["mask"] > 0]


def _table(result: dict[str, float], examples: int) -> str:
  described = {
    "raw pixels": "linear classifier on pixels",
    "random encoder": "linear classifier on the encoder as initialised",
    "SimCLR": "linear classifier on the encoder pretrained without labels",
    "supervised": "the same encoder trained with all labels",
  }
  lines = [f"\nAccuracy on {examples} held-out images (chance: 10 %)\n"]
  lines += [f"  {described[name]:<60}{100 * value:5.1f} %" for name, value in result.items()]
  lines.append(
    f"\nSimCLR beats the random encoder by {100 * (result['SimCLR'] - result['random encoder']):.1f} points.\n"
  )
  return "\n".join(lines)
