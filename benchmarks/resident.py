"""resident: the share of input and augmentation in a step on data that is on the devices."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import measure, step

OVERRIDES = {
  "data.resident": True,
  "data.source": "shapes",
  "data.examples": 5000,
  "batch_size": 64,
}
# One input is short against the clock: a measurement is the mean of so many.
INPUTS = 10


def run(overrides: dict[str, Any] | None = None, rounds: int = measure.ROUNDS) -> dict:
  """Prints and returns the seconds of a step with its input, of the input alone, and their ratio.

  Args:
    overrides: of the config, for a smaller network.
    rounds: of which the medians are taken.
  """
  this = step.experiment_of({**OVERRIDES, **(overrides or {})})
  config, train = this.config, this.train
  model, optimizer = this.network.pretraining_model(train.num_classes), this.optimizer(train.num_examples)
  images = this.pairs(train)
  state = [this.state(model, optimizer.tx)]
  step_fn = images.jit(this.step(this.contrastive(model, images.prepare), optimizer), state[0])
  # What the loop compiles together with the network.
  prepared = jax.jit(lambda dataset, number: images.prepare(images.batch_of(dataset, number))["views"])

  def whole():
    with images.feeding(0) as arguments:
      state[0], metrics = step_fn(state[0], *arguments(1))
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
