"""Every key of every run: its default, its meaning and its choices. The values are the reference's own defaults.

Keys are independent: what follows from others (steps, peak learning rate) is derived in the code, so that overriding
one key never leaves another one stale. Sections of papers: v1 is arXiv 2002.05709, v2 2006.10029.
"""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from simclr_jax import errors, losses, optim
from simclr_jax.data import distortion, sources
from simclr_jax.models import encoders

Value = bool | int | float | str

COUNT, WHOLE, AMOUNT, POSITIVE = "[1, 2147483648)", "[0, 2147483648)", "[0, 1e9]", "(0, 1e9]"
SHARE, INNER, UNIT, BELOW_1 = "(0, 1]", "(0, 1)", "[0, 1]", "[0, 1)"
PIXELS, WIDTH, LAYERS, LAYER = "[1, 4096]", "(0, 64]", "[0, 100]", "[-1, 100]"


@dataclasses.dataclass(frozen=True)
class Key:
  """One key of the configuration."""

  default: Value  # Its value where an experiment does not set it; its type is the key's.
  meaning: str  # One line for people.
  within: str = ""  # The numbers that there are, an interval such as "(0, 1]"; every one is finite.
  # The values that there are; empty where any value of the type is one. A table is looked up when a value is checked,
  # so that entries which are added later count.
  choices: Collection[str] = ()
  is_path: bool = False  # Names a file or folder; relative paths are made absolute when they are typed.
  is_free: bool = False  # May change when a run continues, because no result depends on it.
  from_folder: bool = False  # 0 takes what a folder of images suggests; other sources have no 0.

  def problem(self, value: Value) -> str:
    """Returns what to use in place of a value that the key cannot have, or ""."""
    if self.choices:
      return "" if value in self.choices else f"{errors.nearest(value, self.choices)}; use {', '.join(self.choices)}."
    if isinstance(value, bool) or not isinstance(value, int | float):
      return ""
    low, high = (float(text) for text in self.within[1:-1].split(","))
    from_low, to_high = self.within.startswith("["), self.within.endswith("]")
    # Every comparison with NaN is false.
    if (low <= value if from_low else low < value) and (value <= high if to_high else value < high):
      return ""
    begin = f"{low:.10g} or more" if from_low else f"more than {low:.10g}"
    return f"; use {begin}, {'at most' if to_high else 'less than'} {high:.10g}."


def _optimizer(
  name: str, base_learning_rate: float, warmup_epochs: float, weight_decay: float, scaling: str = "linear"
) -> dict[str, Key]:
  return {
    "name": Key(name, "lars, momentum (Nesterov) or adam", choices=optim.OPTIMIZERS),
    "base_learning_rate": Key(base_learning_rate, "before scaling with the batch size", AMOUNT),
    "scaling": Key(scaling, "linear: base * batch_size / 256; sqrt: base * sqrt(batch_size)", choices=optim.SCALINGS),
    "warmup_epochs": Key(warmup_epochs, "linear warm-up from zero", AMOUNT),
    "momentum": Key(0.9, "decay of the momentum buffer, of lars and momentum", BELOW_1),
    "weight_decay": Key(weight_decay, "L2; batch normalisation is left out, under lars biases too", AMOUNT),
    "trust_coefficient": Key(0.001, "of lars", POSITIVE),
  }


def _recipe(optimizer: dict[str, Key], batch_size: int, total_epochs: float) -> dict[str, Any]:
  """Returns the keys of a job that trains a classifier on the encoder."""
  return {
    "optimizer": optimizer,
    "batch_size": Key(batch_size, "images in a global batch, over all devices", COUNT),
    "total_epochs": Key(total_epochs, "length of the training", POSITIVE),
    "micro_batches": Key(1, "parts of a batch that go through the network one after the other", COUNT),
    "min_area": Key(0.08, "smallest share of the image in a random crop", SHARE),
    "zero_init": Key(True, "the classifier starts at zero where weights are loaded"),
    "evaluate_every_epochs": Key(0.0, "on eval_split while training; 0: at the end only", AMOUNT),
  }


# Where classes have very different numbers of images.
_RARE = {
  "class_weights": Key("none", "balanced: n / (k n_c) in the loss, n_c of a class", choices=("none", "balanced")),
  "sampling": Key("uniform", "balanced: every class comes as often as the others", choices=("uniform", "balanced")),
}

_PRECISIONS = tuple(encoders.DTYPES)

# Every key by its sections.
TREE: dict[str, Any] = {
  "seed": Key(0, "of parameters, data order and augmentation", WHOLE),
  "batch_size": Key(512, "images (not views) in a global batch; 0: by the folder's images", COUNT, from_folder=True),
  "total_epochs": Key(100.0, "length of pretraining; 0: by the folder's images", POSITIVE, from_folder=True),
  "total_steps": Key(0, "above 0: so many steps in place of total_epochs", WHOLE),
  "micro_batches": Key(1, "parts of a batch that go through the network in turn; BatchNorm sees one part", COUNT),
  "eval_batch_size": Key(256, "over all devices; changes speed only, every example counts once", COUNT, is_free=True),
  "data": {
    "source": Key("tfds", "tfds, folder, arrays (an .npz file) or shapes (built in)", choices=sources.SOURCES),
    "name": Key("cifar10", "of the TFDS data set, with /config where it has one"),
    "dir": Key("", "TFDS data_dir ('' is its default), folder of images, or .npz file", is_path=True, is_free=True),
    "train_split": Key("train", "or a part of it: train[:80%], of a folder or file that share of each class"),
    "eval_split": Key("test", "'' pretrains without held-out images"),
    "holdout": Key(0.0, "share of each class of train_split that is held out, in place of eval_split", BELOW_1),
    "holdout_group": Key("", "regular expression: images whose names match alike stay on one side, such as ^p\\d+"),
    "holdout_seed": Key(0, "of the choice", WHOLE),
    "image_size": Key(32, "side of the network's input in pixels; 0: by the folder's images", PIXELS, from_folder=True),
    "shards": Key(16, "parts with an order of their own, at most; hosts divide them", COUNT),
    "shuffle_window": Key(2048, "records of a part shuffled together where the data does not fit in memory", COUNT),
    "cache": Key(True, "keep the encoded images in memory; each epoch is then one permutation of a part"),
    "resident": Key(False, "keep all images, of one size, decoded on every device; the host feeds nothing then"),
    "steps_per_dispatch": Key(20, "at most so many steps of resident data in one dispatch", COUNT, is_free=True),
    "examples": Key(0, "images in a split of the built-in shapes", WHOLE),
    "white": Key(65535, "value of a 16-bit image that is white; 4095 for 12-bit data", "[255, 65535]"),
    "background": Key("white", "behind transparent pixels: a colour's name or #rrggbb"),
    "allow_changed": Key(False, "continue a run although its training images have changed", is_free=True),
    "max_bad_share": Key(0.01, "share of a folder's images that may be corrupt before the run stops", UNIT),
  },
  "measured": {
    "image_size": Key(224, "the largest, where data.image_size is 0", PIXELS),
    "batch_size": Key(256, "the largest, where batch_size is 0", COUNT),
    "epochs": Key(200, "the most, where total_epochs is 0; warm-up is then at most a tenth", COUNT),
    "images_seen": Key(20_000_000, "about so many together in these epochs", COUNT),
  },
  "augment": {
    "place": Key(
      "device", "device: the host crops, the step does the rest; host: all in tf.data", choices=("host", "device")
    ),
    "dtype": Key("float32", "of the device's part", choices=_PRECISIONS),
    "resize": Key("bicubic", "the host's crops where place is device; bilinear is faster", choices=distortion.RESIZES),
    "min_area": Key(0.08, "smallest share of the image in a random crop", SHARE),
    "max_area": Key(1.0, "largest share of the image in a random crop", SHARE),
    "flip": Key(True, "mirror half of the views"),
    "color_strength": Key(1.0, "v1 appendix A: 1.0 for ImageNet, 0.5 for CIFAR-10", AMOUNT),
    "brightness": Key("multiplicative", "multiplicative (v2) or additive (v1)", choices=distortion.BRIGHTNESS),
    "color_probability": Key(0.8, "of the colour jitter", UNIT),
    "grayscale_probability": Key(0.2, "of the conversion to grey", UNIT),
    "blur_probability": Key(0.5, "of the blur; 0 for CIFAR-10", UNIT),
    "compose": Key(
      "",
      "v1 figure 5, in place of flip, colours and blur: both views are one random crop, the second goes through"
      " these too: crop, cutout, color, sobel, noise, blur, rotate",
    ),
  },
  "model": {
    "encoder": Key("resnet", "the network", choices=encoders.ENCODERS),
    "depth": Key(50, "10, 18, 34, 50, 101, 152 or 200", COUNT),
    "width": Key(1.0, "multiplies the channels", WIDTH),
    "sk_ratio": Key(0.0, "0.0625 turns on selective kernels and the ResNet-D stem and shortcuts", UNIT),
    "se_ratio": Key(0.0, "above 0 turns on squeeze-and-excite", UNIT),
    "small_images": Key(False, "CIFAR stem: 3x3 stride 1, no pooling"),
    "dtype": Key("float32", "of activations; statistics and loss are at least float32", choices=_PRECISIONS),
    "param_dtype": Key("float32", "of parameters", choices=_PRECISIONS),
    "remat": Key("none", "recomputed by the backward pass: none, convs, blocks, or one of them a group", is_free=True),
  },
  "head": {
    "layers": Key(3, "of the projection head: 0 none, 1 linear, 2 in v1, 3 in v2", LAYERS),
    "out_dim": Key(128, "dimension of z", COUNT),
    "finetune_from": Key(
      0, "layer under finetune's classifier: 0 the encoder's h, 1 the first (v2), -1 the last", LAYER
    ),
    "evaluate_from": Key(0, "the same for linear_eval, knn, transfer and embed", LAYER),
    "online": Key(True, "train a linear classifier beside it, behind stop_gradient, where the images have labels"),
    "online_rate": Key(
      "optimizer",
      "the online classifier's: optimizer (that of all, the reference's) or safe (no higher than the size of the"
      " features allows, of lars and momentum)",
      choices=("optimizer", "safe"),
    ),
  },
  "loss": {
    "kind": Key(
      "nt_xent", "dcl: no positive below; sup_con: one label attracts; others: v1 table 4", choices=losses.KINDS
    ),
    "temperature": Key(0.1, "divides the similarities", POSITIVE),
    "normalize": Key(True, "L2-normalise the embeddings"),
    "margin": Key(0.8, "of the two margin losses", POSITIVE),
    "scale": Key(2.0, "times the paper's mean over 2N; the reference sums two means over N", POSITIVE),
  },
  "optimizer": {
    **_optimizer("lars", 0.3, 10.0, 1e-6),
    "warmup_epochs": Key(10.0, "linear warm-up from zero; -1: a tenth of the run, at most 10", "[-1, 1e9]"),
  },
  "memory": {
    "size": Key(0, "embeddings in the queue of negatives from earlier steps (v2 section 3.1: 65536); 0: none", WHOLE),
    "decay": Key(0.999, "of the moving average of the weights that embed them", BELOW_1),
  },
  "sharding": {
    "parameters": Key(
      "replicated",
      "sharded: parameters and optimizer state are split over the devices",
      choices=("replicated", "sharded"),
      is_free=True,
    )
  },
  "log_every_steps": Key(50, "interval of metric rows; 0: about 100 rows a run", WHOLE, is_free=True),
  "evaluate_every_epochs": Key(10.0, "interval of what pretrain measures beside; 0: at the end", AMOUNT, is_free=True),
  "monitor": {
    "knn_images": Key(5000, "training images whose features vote on eval_split; 0: no online kNN", WHOLE, is_free=True),
    "knn_neighbours": Key(20, "all where there are fewer images", COUNT, is_free=True),
    "pairs": Key(512, "of views, for alignment, uniformity and effective rank; 0: none of these", WHOLE, is_free=True),
  },
  "baselines": {
    "train_images": Key(
      5000, "labelled images, at most, that pixels and others learn from; 0: no baselines", WHOLE, is_free=True
    ),
    "held_out_images": Key(2000, "images, at most, that they are counted on", COUNT, is_free=True),
  },
  "checkpoint_every_epochs": Key(1.0, "interval of checkpoints", AMOUNT, is_free=True),
  "checkpoint_every_steps": Key(0, "above 0: in place of checkpoint_every_epochs", WHOLE, is_free=True),
  "checkpoint_every_seconds": Key(0.0, "above 0: also so long after the latest one", AMOUNT, is_free=True),
  "keep_checkpoints": Key(3, "the number of latest checkpoints that stay", COUNT, is_free=True),
  "keep_every_epochs": Key(0.0, "checkpoints at multiples of this stay for good; 0: none", AMOUNT, is_free=True),
  "checkpoint": Key("", "what a job starts from: a run, one of its checkpoints, or random", is_path=True),
  "labels": {
    "fraction": Key(1.0, "share of each class whose labels finetune, linear_eval, distill and knn see", SHARE),
    "seed": Key(0, "of the choice", WHOLE),
    "ids": Key("", "a file with one image name a line (imagenet_subsets), in place of a fraction", is_path=True),
  },
  "linear_eval": {
    # v1 appendix B.6.
    **_recipe(_optimizer("momentum", 0.1, 0.0, 0.0), 512, 100.0),
    **_RARE,
    "protocol": Key(
      "reference",
      "reference (v1 appendix B.6), features (one pass, then many classifiers) or stored (count with"
      " the checkpoint's own)",
      choices=("reference", "features", "stored"),
    ),
  },
  "probes": {
    "passes": Key(1, "over the training images: the first uncropped, the others cropped and flipped", COUNT),
    "learning_rates": Key("0.01,0.03,0.1,0.3,1.0,3.0", "of the grid, each for 256 images, linearly scaled"),
    "weight_decays": Key("0.0,1e-6,1e-5,1e-4", "of the grid"),
    "epochs": Key(100, "of the grid's classifiers", COUNT),
    "batch_size": Key(512, "of the grid's classifiers", COUNT),
    "l2_strengths": Key("1e-6,1e-5,1e-4,1e-3,1e-2", "of logistic regression on standardised features"),
    "lbfgs_steps": Key(500, "at most, for each strength", COUNT),
    "lbfgs_tolerance": Key(1e-4, "of the largest entry of the gradient, as scikit-learn's", POSITIVE),
    "validation_share": Key(0.1, "of the training images; these choose the setting", INNER),
  },
  "finetune": {
    # v1 appendix B.5; without a checkpoint the supervised baseline.
    **_recipe(_optimizer("momentum", 0.05, 0.0, 0.0), 512, 60.0),
    **_RARE,
    "after_block": Key(-1, "what learns: -1 all, 0 what follows the stem, 1 to 4 what follows that block group", LAYER),
  },
  "distill": {
    # v2 section 3.3: LARS as in pretraining, 400 epochs, crop and flip.
    **_recipe(_optimizer("lars", 0.1, 10.0, 1e-4, "sqrt"), 512, 400.0),
    "zero_init": Key(False, "the classifier starts at zero where weights are loaded"),
    "teacher": Key("", "a run of finetune, linear_eval or distill (of pretrain: its online classifier)", is_path=True),
    "temperature": Key(1.0, "v2: 1.0 from a big network to a small one, 0.1 for self-distillation", POSITIVE),
    "label_weight": Key(0.0, "1 - alpha of v2's equation 3: of the cross-entropy of the images with labels", UNIT),
    "images": Key("all", "what the student sees of train_split", choices=("all", "labelled")),
    "cache_teacher": Key(False, "run the teacher once, on the centre crop, rather than on each crop of each step"),
  },
  "knn": {
    "neighbours": Key("10,20,100,200", "numbers of voting neighbours"),
    "temperatures": Key("0.07,0.1", "votes weigh exp(similarity / temperature); the first of both is the headline"),
  },
  "transfer": {
    # v1 appendix B.8.
    "datasets": Key("paper", "TFDS names, NAME:TRAIN:VALIDATION:TEST, folder:DIR, or paper: its twelve"),
    "l2_strengths": Key(45, "number of strengths, evenly spaced in the logarithm", COUNT),
    "l2_low": Key(1e-6, "the smallest, on sums over examples as in the paper", POSITIVE),
    "l2_high": Key(1e5, "the largest", POSITIVE),
    "lbfgs_steps": Key(1000, "at most, for each strength", COUNT),
    "lbfgs_tolerance": Key(1e-4, "of the largest entry of the gradient", POSITIVE),
    "validation_share": Key(0.2, "of the training images of a data set that has no validation split", INNER),
  },
  "embed": {
    "split": Key("train", "which split"),
    "format": Key("npz", "of the files", choices=("npz", "parquet")),
    "rows_per_file": Key(8192, "images in one file", COUNT),
  },
  "predict": {
    "images": Key("", "a file, a folder or a pattern such as 'new/*.jpg'; '' predicts a split", is_path=True),
    "split": Key("", "which split of data.*, where there are no predict.images; '' is data.eval_split"),
    "format": Key("csv", "of the predictions", choices=("csv", "parquet", "json")),
    "top_k": Key(3, "classes that are named for each image, the most probable first", COUNT),
    "mistakes": Key(24, "the most confident ones that are drawn, where the images have labels; 0: none", WHOLE),
  },
}


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """Returns {"a.b": value} of {"a": {"b": value}}."""
  out = {}
  for key, value in tree.items():
    if isinstance(value, Mapping):
      out.update(flat(value, f"{prefix}{key}."))
    else:
      out[prefix + key] = list(value) if isinstance(value, tuple) else value
  return out


# Every key by its dotted name, in the order of the help.
KEYS: dict[str, Key] = flat(TREE)

# The keys and sections (with a dot) that each job reads; one that is not here may read all.
_OF_ALL = ("seed", "eval_batch_size", "checkpoint", "data.", "model.", "head.", "augment.", "sharding.", "measured.")
_SAVES = ("checkpoint_every_epochs", "checkpoint_every_steps", "checkpoint_every_seconds", "keep_checkpoints")
_TRAINING = (*_OF_ALL, "log_every_steps", *_SAVES, "keep_every_epochs")
_PRETRAINING = ("batch_size", "total_epochs", "total_steps", "micro_batches", "optimizer.", "loss.", "memory.")
READ = {
  "pretrain": (*_TRAINING, *_PRETRAINING, "evaluate_every_epochs", "monitor.", "baselines."),
  "linear_eval": (*_TRAINING, "linear_eval.", "probes.", "labels.", "baselines."),
  "finetune": (*_TRAINING, "finetune.", "labels.", "baselines."),
  "distill": (*_TRAINING, "distill.", "labels."),
  "knn": (*_OF_ALL, "knn.", "labels.", "baselines."),
  "transfer": (*_OF_ALL, "transfer."),
  "embed": (*_OF_ALL, "embed."),
  "predict": (*_OF_ALL, "predict."),
}


def _is_read(job, name):
  return job not in READ or any(name == key or key.endswith(".") and name.startswith(key) for key in READ[job])


def unread(job: str, names: Collection[str]) -> list[str]:
  """Returns those of some keys that a job does not read."""
  return [name for name in names if name in KEYS and not _is_read(job, name)]


def matters(job: str, name: str) -> bool:
  """Returns whether a key changes what a job that starts from a checkpoint does, for what it prints."""
  return _is_read(job, name) and name not in _SAVES and not name.startswith("measured.")
