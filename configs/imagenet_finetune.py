"""Fine-tuning and supervised training on ImageNet: the recipes of both papers and of the reference's README.

  simclr-jax finetune --config=imagenet_finetune:v2_1pct --config.checkpoint=RUN \\
    --config.data.dir=DIR --workdir=runs/imagenet-1pct

RUN is a pretraining run (or a converted release, see docs/convert.md) of ResNet-50; for other encoders set `model`, for
example --config.model.width=2 --config.model.sk_ratio=0.0625. The labels are those of TFDS's imagenet2012_subset, whose
images are the ones of the reference's lists. With a folder of images, give the list itself (--config.data.source=folder
--config.data.name= --config.labels.ids=1percent.txt); with any data set, a share (--config.labels.fraction=0.01).

| variant     | recipe                                                                           | top-1 *           |
| :v1_1pct    | v1 B.5: momentum, 0.05 for each 256 images, batch 4096, 60 epochs                | 48.3 (v1 table 7) |
| :v1_10pct   | the same, 30 epochs                                                              | 65.6 (v1 table 7) |
| :v2_1pct    | reference's README, v2 3.2: LARS, 0.005 * sqrt(1024), 60 epochs, from the head's | 57.9 (v2 table 1) |
|             | first layer                                                                      |                   |
| :v2_10pct   | the same, 30 epochs                                                              | 68.4 (v2 table 1) |
| :v2_100pct  | the same on all labels, from the encoder's h                                     | 76.3 (v2 table 1) |
| :supervised | from scratch (no --config.checkpoint): momentum, 0.1 for each 256, decay 1e-4    | 76.5 (v1 B.3) +   |
| :linear     | linear_eval as in the reference's README, decay 1e-6                             | 64.5 (100 epochs) |

* Published for ResNet-50, not reproduced here. Larger networks (wider, or with selective kernels) take
--config.finetune.optimizer.base_learning_rate=0.002 in the v2 recipes (from memory of the paper, not verified).
+ with crops and flips, 90 epochs; the length is from the paper's table, the rate from the authors (issues 10 and 83 of
google-research/simclr).
"""

from simclr_jax import config, errors

VARIANTS = ("v1_1pct", "v1_10pct", "v2_1pct", "v2_10pct", "v2_100pct", "supervised", "linear")


def get_config(variant: str = "v2_1pct"):
  if variant not in VARIANTS:
    known = ", ".join(f":{name}" for name in VARIANTS)
    raise errors.UserError(f"configs/imagenet_finetune.py has no variant {variant!r}; use {known}.")
  kind, _, part = variant.partition("_")
  c = config.read("imagenet:v1" if kind == "v1" else "imagenet:v2")
  if part in ("1pct", "10pct"):
    c.data.name = f"imagenet2012_subset/{part}"
    c.data.cache = True  # 1.4 and 14 GB.
  recipe = c.finetune
  recipe.total_epochs = {"1pct": 60.0, "10pct": 30.0, "100pct": 30.0}.get(part, 90.0)
  if kind == "v2":
    c.head.finetune_from = 0 if part == "100pct" else 1
    recipe.batch_size = 1024
    recipe.optimizer.name = "lars"
    recipe.optimizer.base_learning_rate = 0.005
    recipe.optimizer.scaling = "sqrt"
  elif kind == "supervised":
    recipe.optimizer.base_learning_rate = 0.1
    recipe.optimizer.weight_decay = 1e-4
  elif kind == "linear":
    c.linear_eval.optimizer.weight_decay = 1e-6
  return c
