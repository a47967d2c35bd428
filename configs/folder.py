"""A folder of your own images, with class sub-folders or without: size, batch and length are measured.

  simclr-jax pretrain --config=folder --config.data.dir=my/images --config.data.holdout=0.2 --workdir=runs/mine
  simclr-jax linear_eval --config.checkpoint=runs/mine --workdir=runs/mine-linear

Both jobs work with `my/images/CLASS/*.jpg`; leave `data.holdout` out where there are `train/` and `test/` folders with
classes. Pretraining alone takes any folder of images. The recipe is the SimCLR authors' advice for small batches (issue
166 of google-research/simclr): square-root scaling, temperature 0.2. The accuracy depends on the images.

Without a variant it is ResNet-18 for a GPU, 200 epochs at 64 to 224 pixels. `--config=folder:small` is ResNet-10 of a
quarter of the width at 48 pixels for a CPU: about 200,000 images in all, which takes ten minutes on two cores. What
was chosen is in the first lines of the log and in config.json; a key that is typed stays as it is.
"""

from simclr_jax import config, errors


def get_config(variant: str = ""):
  c = config.defaults()
  # 0: chosen by the images, within the limits of `measured`.
  c.batch_size = 0
  c.total_epochs = 0.0
  c.data.source = "folder"
  c.data.name = ""
  c.data.image_size = 0
  c.data.cache = False
  c.log_every_steps = 0
  c.checkpoint_every_epochs = 0.0
  c.checkpoint_every_seconds = 300.0
  c.model.depth = 18
  c.head.layers = 2
  c.head.online_rate = "safe"
  c.loss.temperature = 0.2
  c.optimizer.base_learning_rate = 0.075
  c.optimizer.scaling = "sqrt"
  c.optimizer.warmup_epochs = -1.0
  c.optimizer.weight_decay = 1e-4
  c.linear_eval.batch_size = 256
  # Few images make few steps.
  c.finetune.batch_size = 64
  c.finetune.optimizer.base_learning_rate = 0.2
  if variant == "small":
    _small(c)
  elif variant:
    raise errors.UserError(f"configs/folder.py has no variant {variant!r}; use :small or none.")
  return c


def _small(c):
  """The recipe for a CPU."""
  c.data.image_size = 48
  c.data.cache = True
  c.measured.batch_size = 128
  c.measured.epochs = 400
  c.measured.images_seen = 200_000
  c.model.depth = 10
  c.model.width = 0.25
  # Found on a validation part of photographs of hands, checked on CIFAR-10: results/folder_small.json.
  c.augment.min_area = 0.3
  c.augment.color_strength = 1.0
  c.optimizer.base_learning_rate = 0.3
