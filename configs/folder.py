"""A folder of your own images, with class sub-folders or without, with ResNet-18 at 96 pixels.

  simclr-jax pretrain --config=folder --config.data.dir=my/images --workdir=runs/mine
  simclr-jax linear_eval --config.checkpoint=runs/mine --workdir=runs/mine-linear

Both jobs work with `my/images/train/CLASS/*.jpg` and `my/images/test/CLASS/*.jpg`. Pretraining alone takes any folder
of images; add `--config.data.eval_split=` if it has class folders but no held-out images. The recipe is the SimCLR
authors' advice for small batches (issue 166 of google-research/simclr): square-root scaling, temperature 0.2. The
accuracy depends on the images.
"""

from simclr_jax import config


def get_config():
  c = config.defaults()
  c.batch_size = 256
  c.total_epochs = 200.0
  c.data.source = "folder"
  c.data.name = ""
  c.data.image_size = 96
  c.data.cache = False
  c.model.depth = 18
  c.head.layers = 2
  c.loss.temperature = 0.2
  c.optimizer.base_learning_rate = 0.075
  c.optimizer.scaling = "sqrt"
  c.optimizer.warmup_epochs = 10.0
  c.optimizer.weight_decay = 1e-4
  c.linear_eval.batch_size = 256
  return c
