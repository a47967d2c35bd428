"""Built-in shapes at 16 pixels, so small that a cell of a study takes seconds on two CPU cores.

  simclr-jax study --study=augmentations --config=study_demo --workdir=runs/heatmap

With 2500 images and some 470 small steps it shows differences between settings, not what SimCLR can do (`demo` trains
for longer). Nothing is measured while pretraining, and one checkpoint is written.
"""

from simclr_jax import config


def get_config():
  c = config.defaults()
  c.batch_size = 64
  c.total_epochs = 12.0
  c.eval_batch_size = 500

  c.data.source = "shapes"
  c.data.name = ""
  c.data.examples = 2500
  c.data.image_size = 16
  c.data.resident = True

  c.augment.min_area = 0.5  # Smaller ones take longer to learn from.
  c.augment.color_strength = 0.5
  c.augment.grayscale_probability = 0.5
  c.augment.blur_probability = 0.0

  c.model.depth = 10
  c.model.width = 0.25

  c.head.layers = 2
  c.head.out_dim = 64
  c.head.online = False

  c.loss.temperature = 0.2
  c.loss.scale = 1.0

  c.optimizer.base_learning_rate = 12.0
  c.optimizer.warmup_epochs = 1.0
  c.optimizer.weight_decay = 1e-4

  c.log_every_steps = 50
  c.evaluate_every_epochs = 0.0
  c.monitor.knn_images = 0
  c.monitor.pairs = 0
  c.checkpoint_every_epochs = 0.0
  c.keep_checkpoints = 1

  c.linear_eval.protocol = "features"
  c.probes.learning_rates = "0.1"
  c.probes.weight_decays = "0.0"
  c.probes.epochs = 20
  c.probes.batch_size = 100
  c.probes.l2_strengths = "1e-2"
  c.probes.lbfgs_steps = 200
  c.knn.neighbours = "20"
  c.knn.temperatures = "0.1"
  return c
