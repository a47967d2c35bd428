"""ResNet encoders as SimCLR uses them: wide, with selective kernels, for large and small images."""

from collections.abc import Callable
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from simclr_jax import errors
from simclr_jax.models import convolution, layers

BASIC_BLOCKS = {10: (1, 1, 1, 1), 18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}
BOTTLENECK_BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3), 200: (3, 24, 36, 3)}
BLOCKS = BASIC_BLOCKS | BOTTLENECK_BLOCKS

REMAT = ("none", "convs", "blocks")


def channels(base: int, width: float) -> int:
  """Returns the number of channels at a width multiplier, which may be a fraction."""
  return max(1, round(base * width))


def remat_of_groups(remat: str) -> list[str]:
  """Returns the policies of the four block groups, given one for all (`convs`) or four (`blocks,convs,none,none`)."""
  policies = remat.replace(" ", "").split(",")
  for policy in policies:
    if policy not in REMAT:
      raise errors.UserError(f"model.remat has {policy!r}{errors.nearest(policy, REMAT)}; use {', '.join(REMAT)}.")
  if len(policies) not in (1, 4):
    raise errors.UserError(f"model.remat {remat!r} has {len(policies)} parts; give one for all block groups, or four.")
  return policies * (4 // len(policies))


class SelectiveKernel(nn.Module):
  """Two 3x3 convolutions, averaged per channel with weights computed from their pooled sum.

  f[N, H, W, C] -> f[N, ceil(H / stride), ceil(W / stride), features]. Li et al. 2019, in the form
  of SimCLR v2: both branches are 3x3 without dilation, so one convolution computes them.
  """

  features: int
  stride: int
  ratio: float
  make: layers.Layers

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    x = self.make.conv(2 * self.features, 3, self.stride, name="conv")(x)
    x = nn.relu(self.make.batch_norm(train=train, name="bn")(x).astype(self.make.dtype))
    branches = x.reshape(*x.shape[:-1], 2, self.features)
    pooled = branches.sum(axis=-2).mean(axis=(1, 2), keepdims=True)
    mix = self.make.conv(max(int(self.features * self.ratio), 32), 1, name="reduce")(pooled)
    mix = nn.relu(self.make.batch_norm(train=train, name="reduce_bn")(mix))
    mix = self.make.conv(2 * self.features, 1, name="expand")(mix)
    mix = nn.softmax(mix.reshape(*mix.shape[:-1], 2, self.features), axis=-2)
    return (branches * mix).sum(axis=-2)


class SqueezeExcite(nn.Module):
  """Scales every channel by a gate computed from all pooled channels; Hu et al. 2018."""

  hidden: int
  make: layers.Layers

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    gate = x.mean(axis=(1, 2), keepdims=True)
    gate = nn.relu(self.make.conv(self.hidden, 1, bias=True, name="reduce")(gate))
    gate = self.make.conv(x.shape[-1], 1, bias=True, name="expand")(gate)
    return x * nn.sigmoid(gate)


class Block(nn.Module):
  """A residual block, basic or bottleneck: f[N, H, W, C] -> f[N, H / stride, W / stride, C'].

  `filters` is the number of channels of the 3x3 convolutions; a bottleneck returns four times as many.
  The stride is on the first 3x3 convolution. The scale of the last batch norm is initialised with zero, so a
  block starts as its shortcut.
  """

  filters: int
  stride: int
  bottleneck: bool
  project: bool
  sk_ratio: float
  se_ratio: float
  make: layers.Layers

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    features = 4 * self.filters if self.bottleneck else self.filters
    shortcut = self._projection(x, features, train=train) if self.project else x
    if self.bottleneck:
      x = self._conv_bn_relu(x, 1, 1, number=1, train=train)
      if self.sk_ratio > 0:
        selective = SelectiveKernel(self.filters, self.stride, self.sk_ratio, self.make, name="selective")
        x = selective(x, train=train)
      else:
        x = self._conv_bn_relu(x, 3, self.stride, number=2, train=train)
      kernel, last = 1, 3
    else:
      x = self._conv_bn_relu(x, 3, self.stride, number=1, train=train)
      kernel, last = 3, 2
    x = self.make.conv(features, kernel, name=f"conv{last}")(x)
    x = self.make.batch_norm(train=train, zero_scale=True, name=f"bn{last}")(x)
    if self.se_ratio > 0:
      hidden = max(1, int(self.filters * self.se_ratio))
      x = SqueezeExcite(hidden, self.make, name="squeeze_excite")(x)
    return nn.relu((x + shortcut).astype(self.make.dtype))

  def _conv_bn_relu(self, x: jax.Array, kernel: int, stride: int, *, number: int, train: bool) -> jax.Array:
    x = self.make.conv(self.filters, kernel, stride, name=f"conv{number}")(x)
    x = self.make.batch_norm(train=train, name=f"bn{number}")(x)
    return nn.relu(x.astype(self.make.dtype))

  def _projection(self, x: jax.Array, features: int, *, train: bool) -> jax.Array:
    stride = self.stride
    if self.sk_ratio > 0:
      # ResNet-D. At stride 2 an odd size is padded with zeros that count in the average, as in the reference; at
      # stride 1 the padding does not count.
      if stride > 1:
        x = nn.avg_pool(x, (2, 2), (stride, stride), padding=((0, 1), (0, 1)))
      else:
        x = nn.avg_pool(x, (2, 2), padding="SAME", count_include_pad=False)
      stride = 1
    x = self.make.conv(features, 1, stride, name="shortcut_conv")(x)
    return self.make.batch_norm(train=train, name="shortcut_bn")(x)


class ResNet(nn.Module):
  """The encoder: images f[N, H, W, 3] in [0, 1], or u8, -> h f[N, 512 or 2048 times width].

  He et al. 2016 with the stride on the 3x3 convolution and a projection shortcut in the first block of every group.
  Statistics and h are in at least float32, whatever `dtype` is. Intermediates are sown: `initial_conv` (before batch
  norm), `initial_max_pool`, `block_group1` to `block_group4` and `final_avg_pool`. The modules are created in the order
  in which the reference numbers its layers.
  """

  stages: ClassVar[tuple[str, ...]] = ("stem", "group1", "group2", "group3", "group4")

  depth: int = 50  # A key of BLOCKS.
  width: float = 1  # Multiplies the channels of all layers; may be a fraction.
  # Above 0 (0.0625 in SimCLR v2), bottlenecks have selective kernels, and all depths ResNet-D's stem and shortcuts.
  sk_ratio: float = 0.0
  se_ratio: float = 0.0  # Above 0, blocks end with squeeze-and-excite of this reduction.
  small_images: bool = False  # 3x3 stem at stride 1 without max-pooling, for CIFAR.
  # See `remat_of_groups`. What the backward pass keeps (no result changes): `none` everything, `convs` the outputs of
  # convolutions, `blocks` the inputs of blocks.
  remat: str = "none"
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  @nn.nowrap
  def stage_of(self, name: str) -> int:
    """Returns the index in `stages` of a top-level module: 0 for `stem_conv1`, 2 for `group2_block1`."""
    return self.stages.index(name.partition("_")[0])

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool, after_stage: int = -1) -> jax.Array:
    if self.depth not in BLOCKS:
      raise errors.UserError(f"ResNet depth is {self.depth}; the known ones are {', '.join(map(str, BLOCKS))}.")
    if self.width <= 0:
      raise errors.UserError(f"ResNet width is {self.width}; it multiplies the channels and must be above 0.")
    if images.ndim != 4 or images.shape[-1] != 3:
      raise errors.UserError(f"images have shape {images.shape}; a ResNet takes RGB images [batch, height, width, 3].")
    make = layers.Layers(self.dtype, self.param_dtype)
    x = self._stem(layers.as_float(images, self.dtype), make, train=train and after_stage < 0)
    if after_stage == 0:
      x = jax.lax.stop_gradient(x)
    remat = remat_of_groups(self.remat)
    for group, blocks in enumerate(BLOCKS[self.depth]):
      for block in range(blocks):
        residual = Block(
          filters=channels(64 * 2**group, self.width),
          stride=2 if group > 0 and block == 0 else 1,
          bottleneck=self.depth in BOTTLENECK_BLOCKS,
          project=block == 0,
          sk_ratio=self.sk_ratio,
          se_ratio=self.se_ratio,
          make=make,
          name=f"group{group + 1}_block{block + 1}",
        )
        x = _with_remat(remat[group], train and group >= after_stage)(residual, x)
      if after_stage == group + 1:
        x = jax.lax.stop_gradient(x)
      self.sow("intermediates", f"block_group{group + 1}", x)
    h = x.mean(axis=(1, 2), dtype=layers.at_least_float32(self.dtype))
    self.sow("intermediates", "final_avg_pool", h)
    return h

  def _stem(self, x: jax.Array, make: layers.Layers, *, train: bool) -> jax.Array:
    convs = [(32, 3, 2), (32, 3, 1), (64, 3, 1)] if self.sk_ratio > 0 else [(64, 7, 2)]
    if self.small_images:
      convs = [(64, 3, 1)]
    for number, (base, kernel, stride) in enumerate(convs, start=1):
      features = channels(base, self.width)
      x = make.conv(features, kernel, stride, name=f"stem_conv{number}")(x)
      if number == len(convs):
        self.sow("intermediates", "initial_conv", x)
      x = make.batch_norm(train=train, name=f"stem_bn{number}")(x)
      x = nn.relu(x.astype(self.dtype))
    if not self.small_images:
      x = nn.max_pool(x, (3, 3), (2, 2), padding="SAME")
    self.sow("intermediates", "initial_max_pool", x)
    return x


def _with_remat(policy: str, train: bool) -> Callable[[Block, jax.Array], jax.Array]:
  """Returns (block, x) -> block(x), rematerialised in the backward pass by this policy of `REMAT`."""
  call = lambda block, x: block(x, train=train)
  if policy == "none":
    return call
  kept = jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_saveable, jax.checkpoint_policies.save_only_these_names(convolution.NAME)
  )
  return nn.remat(call, policy=kept if policy == "convs" else None)
