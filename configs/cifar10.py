"""CIFAR-10 with ResNet-18: the reference's own recipe (its README; v1 appendix B.9 has ResNet-50).

  simclr-jax pretrain --config=cifar10 --config.data.dir=DIR --workdir=runs/cifar10
  simclr-jax linear_eval --config.checkpoint=runs/cifar10 --workdir=runs/cifar10-linear

Expected: about 91 % top-1 (the reference's README; not reproduced here, it takes 1000 epochs on an accelerator).
`:small` is the same pipeline with an encoder and a length for a laptop's CPU; README.md has its measured results.

The data comes from TFDS (DIR is its data_dir), or from an .npz file without TFDS
(`--config.data.source=arrays --config.data.dir=FILE.npz`). In both cases all images stay on the device.
"""

from simclr_jax import config, errors


def get_config(variant: str = "reference"):
  c = config.defaults()
  c.batch_size = 512
  c.total_epochs = 1000.0

  c.data.name = "cifar10"
  c.data.eval_split = "test"
  c.data.image_size = 32
  c.data.resident = True  # 154 MB on each device.

  c.augment.color_strength = 0.5
  c.augment.blur_probability = 0.0

  c.model.depth = 18
  c.model.small_images = True

  c.loss.temperature = 0.5

  c.optimizer.base_learning_rate = 1.0
  c.optimizer.warmup_epochs = 10.0
  c.optimizer.weight_decay = 1e-4

  if variant == "small":
    c.batch_size = 256
    c.total_epochs = 8.0
    c.model.depth = 10
    c.model.width = 0.25
    c.model.small_images = False  # The strided stem is five times as fast on a CPU, at some cost in accuracy.
    c.head.layers = 2
    c.head.online_rate = "safe"
    c.loss.temperature = 0.2  # A short run gets further with hard negatives weighted more.
    c.optimizer.base_learning_rate = 2.0
    c.optimizer.warmup_epochs = 0.5
    c.evaluate_every_epochs = 2.0
    c.linear_eval.total_epochs = 5.0
    c.linear_eval.optimizer.base_learning_rate = 0.01  # The features of so small a net are large.
  elif variant != "reference":
    raise errors.UserError(f"configs/cifar10.py has no variant {variant!r}; use :small or none.")
  return c
