"""The reference's training trajectories in tests/reference: networks, optimizers and comparisons of a case."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from weights_by_name import of_network

from simclr_jax import optim
from simclr_jax.hardware import sharding
from simclr_jax.jobs import convert
from simclr_jax.models import heads, resnet
from simclr_jax.released import names
from simclr_jax.training import objectives

SIZE, CLASSES = 32, 10  # of all cases
TYPES = {"dtype": jnp.float64, "param_dtype": jnp.float64}


class Case:
  """One case of a fixture."""

  def __init__(self, arrays: dict[str, np.ndarray], name: str):
    self.images, self.labels = arrays["images"], arrays["labels"].astype(np.int32)
    self._arrays, self._name = arrays, name
    assert self.flag("image_size") == SIZE
    depth = self.flag("resnet_depth")
    self.encoder = resnet.ResNet(depth=depth, small_images=True, **TYPES)
    self.projection_head = heads.ProjectionHead(layers=self.flag("num_proj_layers"), **TYPES)
    self.linear_head = heads.LinearHead(CLASSES, **TYPES)
    encoder = names.encoder_paths(names.encoder_layers(depth, stem="small", selective=False, squeeze=False))
    # The reference's variable names -> paths in our tree.
    self.paths = encoder | names.projection_paths(self.flag("num_proj_layers")) | names.LINEAR_HEAD_PATHS

  def get(self, key: str) -> np.ndarray:
    """Returns an array of the case."""
    return self._arrays[f"{self._name}__{key}"]

  def flag(self, name: str):
    """Returns the value of one of the reference's command-line flags."""
    return self.get(f"flag_{name}").item()

  @property
  def decay(self) -> objectives.Decay:
    """The L2 term of the loss."""
    return objectives.Decay(self.flag("weight_decay"), self.flag("optimizer"))

  def variables(self, model, mesh):
    """Returns the network's variables before the first step."""
    tree = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), jnp.zeros((1, SIZE, SIZE, 3)))
    initial = convert.from_reference(of_network(tree, self.paths, self.get("name_prefix").item()))
    return jax.device_put(jax.tree.map(jnp.asarray, initial), sharding.replicated(mesh))

  def optimizer(self):
    """Returns the optimizer and its schedule."""
    examples, batch = self.get("n_train").item(), self.get("batch").item()
    rate = optim.schedule(
      base_learning_rate=self.flag("learning_rate"),
      batch_size=batch,
      scaling=self.flag("learning_rate_scaling"),
      warmup_steps=optim.warmup_steps(examples, self.flag("warmup_epochs"), batch),
      total_steps=optim.total_steps(examples, self.flag("train_epochs"), batch),
    )
    if self.flag("optimizer") == "lars":
      return optim.lars(rate, weight_decay=self.flag("weight_decay")), rate
    return optim.momentum(rate), rate

  def assert_variables(self, initial, state, prefix: str = "") -> int:
    """Compares every variable after the last step whose name begins with `prefix`; returns how many there are."""
    before = traverse_util.flatten_dict(initial)
    after = traverse_util.flatten_dict({"params": state.params, "batch_stats": state.batch_stats})
    compared = [(i, name) for i, name in enumerate(self.get("variable_names")) if name.startswith(prefix)]
    for i, name in compared:
      ours, start = (np.asarray(tree[self.paths[name]]) for tree in (after, before))
      np.testing.assert_allclose(np.linalg.norm(ours), self.get("final_norm")[i], rtol=1e-6, err_msg=name)
      np.testing.assert_allclose(np.linalg.norm(ours - start), self.get("change_norm")[i], rtol=1e-6, err_msg=name)
      first = ours.ravel()[:4]
      wanted = self.get("final_first4")[i][: len(first)]
      np.testing.assert_allclose(first, wanted, rtol=1e-6, atol=1e-9, err_msg=name)
      if self.get("first_step_grad_norm")[i] == -1 and "moving" not in name:
        np.testing.assert_array_equal(ours, start, f"{name} is frozen")
    return len(compared)
