"""Checkpoints as google-research/simclr writes them, in TF1 and in TF2, from variables by TF1 name."""

import pathlib

import numpy as np
import tensorflow as tf

BLOCKS = {10: (1, 1, 1, 1), 18: (2, 2, 2, 2), 50: (3, 4, 6, 3)}


def write_tf1(prefix, variables: dict[str, np.ndarray]) -> str:
  """Writes a TF1 checkpoint with these names, and returns its prefix."""
  pathlib.Path(prefix).parent.mkdir(parents=True, exist_ok=True)
  names = list(variables)
  tensors = [tf.constant(variables[name]) for name in names]
  tf.raw_ops.SaveV2(prefix=str(prefix), tensor_names=names, shape_and_slices=[""] * len(names), tensors=tensors)
  return str(prefix)


def write_folder(folder, step: int, variables: dict[str, np.ndarray]) -> str:
  """Writes a TF1 checkpoint and the file `checkpoint`, which names the folder of another machine."""
  write_tf1(f"{folder}/model.ckpt-{step}", variables)
  path = f"/elsewhere/model.ckpt-{step}"
  pathlib.Path(folder, "checkpoint").write_text(f'model_checkpoint_path: "{path}"\n')
  return str(folder)


class TF2:
  """The objects of the TF2 code with their attributes, and variables under the names that Keras gives them there.

  Written after reading tf2/resnet.py and tf2/model.py: layers number themselves by class when they are constructed;
  a block constructs its shortcut, then its convolutions, then squeeze-and-excite. `projection_head` and
  `head_supervised` name their layers, whose batch norms go on counting where the encoder's end.
  """

  def __init__(self, variables, *, depth, sk=False, se=False, small=True, layers=3, norm="sync_batch_normalization"):
    self.given, self.norm, self.sk, self.se, self.depth = variables, norm, sk, se, depth
    self.counts = {}
    self.made = []
    self.scope = ["resnet"]
    self.model = tf.Module()
    self.model.resnet_model = self.resnet(small)
    self.model._projection_head = tf.Module()
    self.model._projection_head.linear_layers = [self.linear(f"nl_{i}", last=i == layers - 1) for i in range(layers)]
    if "head_supervised/linear_layer/dense/kernel" in variables:
      self.scope = ["head_supervised", "linear_layer", self.numbered("dense")]
      dense = self.leaves("head_supervised/linear_layer/dense", "kernel", "bias")
      self.model.supervised_head = self.module(linear_layer=self.module(dense=dense))

  def checkpoint(self, prefix) -> str:
    """Writes what training saves, LARS's slots and counters with it, and returns the prefix."""
    optimizer = tf.compat.v1.train.MomentumOptimizer(0.1, 0.9, name="LARSOptimizer")
    optimizer.apply_gradients([(tf.zeros_like(self.made[0]), self.made[0])])
    step = tf.Variable(7, dtype=tf.int64, name="LARSOptimizer/iter")
    return tf.train.Checkpoint(model=self.model, optimizer=optimizer, global_step=step).save(str(prefix))

  def saved_model(self, folder) -> str:
    """Writes what the export saves: a module with the model and a list of what is trainable."""
    module = tf.Module()
    module.model = self.model
    module.trainable_variables_list = list(self.model.trainable_variables)
    kernel = self.made[0]
    module.run = tf.function(lambda x: x * kernel[0, 0, 0, 0], input_signature=[tf.TensorSpec([None])])
    tf.saved_model.save(module, str(folder))
    return str(folder)

  def module(self, **attributes):
    made = tf.Module()
    for name, value in attributes.items():
      setattr(made, name, value)
    return made

  def numbered(self, kind):
    number = self.counts[kind] = self.counts.get(kind, -1) + 1
    return f"{kind}_{number}" if number else kind

  def leaves(self, tf1, *leaves):
    made = tf.Module()
    for leaf in leaves:
      variable = tf.Variable(
        self.given[f"{tf1}/{leaf}"], name="/".join([*self.scope, leaf]), trainable=not leaf.startswith("moving_")
      )
      self.made.append(variable)
      setattr(made, leaf, variable)
    return made

  def conv(self, *leaves, wrapped=True):
    outer = [self.numbered("conv2d_fixed_padding")] if wrapped else []
    name = self.numbered("conv2d")
    self.scope += [*outer, name]
    made = self.leaves(f"base_model/{name}", *(leaves or ["kernel"]))
    del self.scope[-len([*outer, name]) :]
    return self.module(conv2d=made) if wrapped else made

  def batch_norm(self, tf1=None, *, beta=True):
    outer, name = self.numbered("batch_norm_relu"), self.numbered(self.norm)
    self.scope += [outer, name]
    tf1 = tf1 or "base_model/" + name.replace(self.norm, "batch_normalization")
    made = self.leaves(tf1, "gamma", *["beta"] * beta, "moving_mean", "moving_variance")
    del self.scope[-2:]
    return self.module(bn=made)

  def selective(self):
    self.scope.append(self.numbered("sk__conv2d"))
    made = self.module(conv2d_fixed_padding=self.conv(), batch_norm_relu=self.batch_norm())
    made.conv2d_0, made.batch_norm_relu_1 = self.conv(wrapped=False), self.batch_norm()
    made.conv2d_1 = self.conv(wrapped=False)
    self.scope.pop()
    return made

  def squeeze_excite(self):
    self.scope.append(self.numbered("se__layer"))
    pair = [self.conv("kernel", "bias", wrapped=False) for _ in range(2)]
    self.scope.pop()
    return self.module(se_reduce=pair[0], se_expand=pair[1])

  def block(self, project):
    bottleneck = self.depth >= 50
    self.scope.append(self.numbered("bottleneck_block" if bottleneck else "residual_block"))
    made = tf.Module()
    shortcut = [self.conv(), self.batch_norm()] if project else []
    # ResNet-D pools before.
    shortcut = [tf.Module()] * (self.sk and project) + shortcut
    setattr(made, "projection_layers" if bottleneck else "shortcut_layers", shortcut)
    main = []
    for number in range(3 if bottleneck else 2):
      if bottleneck and number == 1 and self.sk:
        main.append(self.selective())
      else:
        main += [self.conv(), self.batch_norm()]
    setattr(made, "conv_relu_dropblock_layers" if bottleneck else "conv2d_bn_layers", main)
    if self.se:
      made.se_layer = self.squeeze_excite()
    self.scope.pop()
    return made

  def resnet(self, small):
    made = tf.Module()
    stem = []
    for _ in range(3 if self.sk and not small else 1):
      stem += [self.conv(), self.batch_norm()]
    # Layers without variables stand between: initial_conv, the pooling, initial_max_pool.
    made.initial_conv_relu_max_pool = [*stem[:-1], tf.Module(), stem[-1], tf.Module(), tf.Module()]
    made.block_groups = []
    for group, blocks in enumerate(BLOCKS[self.depth], start=1):
      self.scope.append(f"block_group{group}")
      layers = [self.block(block == 0) for block in range(blocks)]
      made.block_groups.append(self.module(layers=layers))
      self.scope.pop()
    return made

  def linear(self, name, *, last):
    self.scope = ["projection_head", name]
    dense = self.numbered("dense")
    self.scope.append(dense)
    kernel = self.leaves(f"head_contrastive/{name}/dense", "kernel")
    self.scope.pop()
    norm = self.batch_norm(f"head_contrastive/{name}/batch_normalization", beta=not last)
    return self.module(dense=kernel, bn_relu=norm)


def with_training(variables: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Returns the variables with what a TF1 checkpoint holds beside them: the step and LARS's slots."""
  slots = {f"{name}/Momentum": value + 1 for name, value in variables.items() if "moving_" not in name}
  return {**variables, **slots, "global_step": np.int64(250228)}


def with_averages(variables: dict[str, np.ndarray], form: str) -> tuple[dict, dict]:
  """Returns (all variables, the averages by name); form `scope`: ema_model/NAME, `suffix`: TensorFlow's own."""
  learned = {n: v for n, v in variables.items() if not n.startswith("head_supervised/")}
  if form == "suffix":
    learned = {name: value for name, value in learned.items() if "moving_" not in name}
  averages = {name: value + np.float32(0.5) for name, value in learned.items()}
  named = {f"ema_model/{n}" if form == "scope" else f"{n}/ExponentialMovingAverage": v for n, v in averages.items()}
  return {**variables, **named}, averages


def numbered_from(variables: dict[str, np.ndarray], first: int) -> list[str]:
  """Returns TF2 names of these variables, whose convolutions and batch norms count from `first`."""
  names = []
  for name in variables:
    scope, layer, leaf = name.split("/")[0], *name.split("/")[-2:]
    if scope == "base_model":
      kind, _, number = layer.rpartition("_")
      kind, number = (kind, int(number)) if number.isdigit() else (layer, 0)
      names.append(f"resnet/block/{kind}_{number + first}/{leaf}")
    else:
      names.append(name)
  return names
