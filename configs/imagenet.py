"""ImageNet with ResNet-50 at 224 pixels: the recipes of both papers and of the reference's README.

  simclr-jax pretrain --config=imagenet:v1 --config.data.dir=DIR --workdir=runs/imagenet
  simclr-jax linear_eval --config.checkpoint=runs/imagenet --workdir=runs/imagenet-linear

| variant    | recipe                                                                         | linear eval top-1 |
| :v1        | v1 section 2.3, appendix B: 2-layer head, 1000 epochs, weight decay 1e-6       | 69.3 (v1 table 6) |
| :v2        | v2 section 3.1: 3-layer head, 800 epochs, 0.1 * sqrt(batch), 5 % warm-up, 1e-4 | 71.1 (issue 77) * |
| :v2_memory | the same with a queue of 65536 negatives, moving average 0.999                 | 71.7 (v2 table 1) |
| :readme    | the reference's README: 3-layer head, 100 epochs, 0.075 * sqrt(batch), 1e-4    | 64.5              |

Published figures, not reproduced here; * the authors' own run in issue 77 of google-research/simclr, where a user had
70.4. docs/negatives.md says how the queue differs from the paper's memory.
Time: 100 epochs took the authors about 1.5 h on 128 TPU v3 cores (v1 section 2.3).
"""

from simclr_jax import config, errors


def get_config(variant: str = "v1"):
  c = config.defaults()
  c.batch_size = 4096
  c.eval_batch_size = 1024

  c.data.name = "imagenet2012"
  c.data.eval_split = "validation"
  c.data.image_size = 224
  c.data.cache = False

  c.model.depth = 50
  c.model.dtype = "bfloat16"

  c.loss.temperature = 0.1

  if variant == "v1":
    c.total_epochs = 1000.0
    c.augment.brightness = "additive"
    c.head.layers = 2
    c.optimizer.base_learning_rate = 0.3
    c.optimizer.scaling = "linear"
    c.optimizer.warmup_epochs = 10.0
    c.optimizer.weight_decay = 1e-6
  elif variant in ("v2", "v2_memory"):
    c.total_epochs = 800.0
    c.head.layers = 3
    c.optimizer.base_learning_rate = 0.1
    c.optimizer.scaling = "sqrt"
    c.optimizer.warmup_epochs = 40.0  # 5 % of 800.
    c.optimizer.weight_decay = 1e-4
    c.memory.size = 65536 if variant == "v2_memory" else 0
  elif variant == "readme":
    c.total_epochs = 100.0
    c.head.layers = 3
    c.optimizer.base_learning_rate = 0.075
    c.optimizer.scaling = "sqrt"
    c.optimizer.warmup_epochs = 10.0
    c.optimizer.weight_decay = 1e-4
  else:
    raise errors.UserError(f"configs/imagenet.py has no variant {variant!r}; use :v1, :v2, :v2_memory or :readme.")

  c.linear_eval.batch_size = 4096
  c.linear_eval.total_epochs = 90.0
  c.finetune.batch_size = 4096
  return c
