"""A folder of your own images, labelled (class sub-folders) or not, with ResNet-18 at 96 pixels.

  python -m simclr_jax pretrain --config=configs/folder.py --config.data.dir=my/images --workdir=runs/mine
  python -m simclr_jax linear_eval --config.checkpoint=runs/mine --workdir=runs/mine-linear

With `my/images/train/CLASS/*.jpg` and `my/images/test/CLASS/*.jpg` both jobs work. For pretraining alone any folder of
images does; add `--config.data.eval_split=` if it has class folders but no held-out ones. The recipe is the small-batch
one of the SimCLR authors (issue 166 of google-research/simclr): square-root scaling, temperature 0.2. No accuracy is
promised: it depends on the images.
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
