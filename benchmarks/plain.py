"""plain: the same ResNet in Linen's own layers, as in a tutorial, and its step: the baseline of ours."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from benchmarks import loss
from simclr_jax.models import resnet

BATCH_NORM = {"momentum": 0.9, "epsilon": 1e-5}


class Block(nn.Module):
  """A basic residual block; its names are those of `resnet.Block`, so that weights fit both."""

  filters: int
  stride: int
  project: bool

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    conv = lambda kernel, stride, name: nn.Conv(
      self.filters, (kernel, kernel), (stride, stride), padding=kernel // 2, use_bias=False, name=name
    )
    norm = lambda name, **rest: nn.BatchNorm(not train, **BATCH_NORM, **rest, name=name)
    shortcut = x
    if self.project:
      shortcut = norm("shortcut_bn")(conv(1, self.stride, "shortcut_conv")(x))
    x = nn.relu(norm("bn1")(conv(3, self.stride, "conv1")(x)))
    x = norm("bn2", scale_init=nn.initializers.zeros)(conv(3, 1, "conv2")(x))
    return nn.relu(x + shortcut)


class ResNet(nn.Module):
  """A ResNet of basic blocks for small images: f32[N, H, W, 3] -> f32[N, 512 times width]."""

  depth: int = 18
  width: float = 1

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
    filters = resnet.channels(64, self.width)
    x = nn.Conv(filters, (3, 3), padding=1, use_bias=False, name="stem_conv1")(images)
    x = nn.relu(nn.BatchNorm(not train, **BATCH_NORM, name="stem_bn1")(x))
    for group, blocks in enumerate(resnet.BASIC_BLOCKS[self.depth]):
      for block in range(blocks):
        stride = 2 if group > 0 and block == 0 else 1
        filters = resnet.channels(64 * 2**group, self.width)
        x = Block(filters, stride, block == 0, name=f"group{group + 1}_block{block + 1}")(x, train=train)
    return x.mean(axis=(1, 2))


def step_of(model: nn.Module, tx: optax.GradientTransformation) -> Callable:
  """Returns the jitted (state, views f32[N, 2, H, W, 3]) -> (state, loss): all logits at once, nothing else.

  A state is (params, batch_stats, opt_state), and is donated.
  """

  def step(state, views):
    params, batch_stats, opt_state = state

    def loss_fn(params):
      images = views.reshape(-1, *views.shape[2:])
      variables = {"params": params, "batch_stats": batch_stats}
      (_, z, _), updates = model.apply(variables, images, train=True, mutable=["batch_stats"])
      value, _ = loss.dense(z.reshape(-1, 2, loss.DIM).astype(jnp.float32))
      return value, updates["batch_stats"]

    (value, batch_stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
    updates, opt_state = tx.update(grads, opt_state, params)
    return (optax.apply_updates(params, updates), batch_stats, opt_state), value

  return jax.jit(step, donate_argnums=0)
