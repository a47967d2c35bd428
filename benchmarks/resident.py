"""resident: what input and augmentation take of a step on data that is on the devices."""

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import measure, step
from simclr_jax.jobs import feed, pretrain, setup
from simclr_jax.training import state as state_lib

OVERRIDES = {
  "data.resident": "true",
  "data.source": "shapes",
  "data.examples": "5000",
  "batch_size": "64",
}
# The input is short: so many of them are one measurement.
INPUTS = 10


def run(overrides: dict[str, str] | None = None, rounds: int = measure.ROUNDS) -> dict:
  """Prints and returns the seconds of a step with its input, of the input alone, and their ratio.

  Args:
    overrides: of the config, for a smaller network.
    rounds: of which the medians are taken.
  """
  config = step.config_of({**OVERRIDES, **(overrides or {})})
  mesh = pretrain.mesh_of(config, jax.devices()[:1])
  train = setup.source_of(config, config.data.train_split)
  model, tx, schedule, _ = pretrain.parts_of(config, examples=train.num_examples, classes=train.num_classes)
  images = feed.pairs(config, train, mesh)
  params, batch_stats = state_lib.variables(model, config.data.image_size, config.seed, mesh)
  state = [state_lib.create(params, batch_stats, tx)]
  steps = images.steps(pretrain.step_of(config, model, tx, schedule, mesh, images.prepare), state[0])
  # All of what the loop jits together, but for the network.
  prepared = jax.jit(lambda dataset, number: images.prepare(images.batch_of(dataset, number))["views"])

  def whole():
    with steps.feeding(0) as arguments:
      state[0], metrics = steps.step_fn(state[0], *arguments(1))
    jax.block_until_ready((state[0], metrics))

  def alone():
    for number in range(INPUTS):
      jax.block_until_ready(prepared(images.dataset, jnp.asarray(np.int32(number))))

  contestants = {"step": lambda: measure.once(whole), "input": lambda: measure.once(alone) / INPUTS}
  found = measure.interleaved(contestants, rounds)
  seconds = measure.medians(found)
  share = seconds["input"] / seconds["step"]
  measure.say(
    f"input and augmentation: {share:.1%} of a step ({seconds['input']:.3f} of {seconds['step']:.3f} s; "
    f"ResNet-{config.model.depth}, batch {config.batch_size}, {train.num_examples} resident images of "
    f"{config.data.image_size} pixels, one {jax.devices()[0].device_kind})"
  )
  headline = {"input_share_of_step": share, **{f"{name}_seconds": value for name, value in seconds.items()}}
  return {"share": share, "seconds": seconds, "rounds": found, "headline": headline}
