"""Built-in shapes with a small ResNet, a few minutes on two CPU cores: what `make demo` runs.

  simclr-jax demo --config=demo --workdir=runs/demo

The recipe follows v1, with changes for a small data set and a short run: larger crops, so that each shows a whole
shape, and weak colour distortion with frequent grayscale, since the copies of a shape in one image differ in colour.
README.md has the measured accuracies.
"""

from simclr_jax import config


def get_config():
  c = config.defaults()
  c.batch_size = 128
  c.total_epochs = 20.0

  c.data.source = "shapes"
  c.data.name = ""
  c.data.examples = 6000
  c.data.image_size = 32
  c.data.resident = True

  c.augment.min_area = 0.25
  c.augment.color_strength = 0.2
  c.augment.grayscale_probability = 0.7
  c.augment.blur_probability = 0.0

  c.model.depth = 10
  c.model.width = 0.25

  c.head.layers = 2
  c.head.out_dim = 64
  c.head.online_rate = "safe"

  c.loss.temperature = 0.2
  c.loss.scale = 1.0

  c.optimizer.base_learning_rate = 6.0
  c.optimizer.warmup_epochs = 1.0
  c.optimizer.weight_decay = 1e-4

  c.log_every_steps = 10
  c.evaluate_every_epochs = 5.0
  c.checkpoint_every_epochs = 5.0

  c.linear_eval.batch_size = 128
  c.linear_eval.total_epochs = 6.0
  c.linear_eval.min_area = 0.5  # Smaller crops cut the shapes off.
  c.finetune.batch_size = 128
  c.finetune.total_epochs = 9.0
  c.finetune.min_area = 0.5
  c.finetune.zero_init = False
  c.finetune.optimizer.base_learning_rate = 0.1
  c.finetune.optimizer.warmup_epochs = 1.0
  c.finetune.optimizer.weight_decay = 1e-4
  return c
