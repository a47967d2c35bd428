"""The encoder protocol: construction from config keys, stages, and networks without batch norm."""

import jax
import jax.numpy as jnp
import numpy as np
import plain_encoder
import pytest
from flax import traverse_util
from test_models import abstract, filled, images_like

from simclr_jax import config, errors, optim
from simclr_jax.models import encoders, heads, resnet, simclr


@pytest.fixture
def plain(monkeypatch):
  """Puts an encoder without batch norm into the table of encoders."""
  monkeypatch.setitem(encoders.ENCODERS, "plain", plain_encoder.PlainEncoder)


DTYPES = {"dtype": "bfloat16", "param_dtype": "float32"}


def test_an_encoder_is_built_from_those_keys_that_are_its_fields(plain):
  keys = {"depth": 18, "width": 0.5, "features": 48, **DTYPES}
  want = resnet.ResNet(18, width=0.5, dtype=jnp.bfloat16, param_dtype=jnp.float32)
  assert encoders.build(keys) == encoders.build({**keys, "encoder": "resnet"}) == want
  assert encoders.build({**keys, "encoder": "plain"}) == plain_encoder.PlainEncoder(48, dtype=jnp.bfloat16)


def test_an_unknown_encoder_or_dtype_gets_the_nearest_one():
  with pytest.raises(errors.UserError, match='did you mean "resnet"') as caught:
    encoders.build({**DTYPES, "encoder": "resnt"})
  assert "\n" not in str(caught.value)
  for key, wrong, nearest in (("encoder", "resnt", "resnet"), ("param_dtype", "float23", "float32")):
    with pytest.raises(errors.UserError, match=f'config.model.{key} is .*did you mean "{nearest}"'):
      config.load("demo", {f"model.{key}": wrong})


@pytest.mark.slow
@pytest.mark.parametrize("encoder", [resnet.ResNet(50, sk_ratio=0.1, se_ratio=0.1), plain_encoder.PlainEncoder()])
def test_every_top_level_module_of_an_encoder_belongs_to_a_stage(encoder):
  variables = abstract(encoder, images_like(), train=True)
  found = [encoder.stage_of(name) for tree in variables.values() for name in tree]
  assert set(found) == set(range(len(encoder.stages)))


@pytest.mark.parametrize("after_stage", [-1, 0, 1, 2])
def test_an_encoder_without_batch_norm_can_be_frozen_up_to_any_stage(after_stage):
  encoder, images = plain_encoder.PlainEncoder(8), images_like()
  model = simclr.Classifier(encoder, heads.LinearHead(5), after_stage=after_stage)
  variables = filled(model, images)
  assert variables.keys() == {"params"}

  @jax.jit
  @jax.grad
  def gradient(params):
    logits, state = model.apply({"params": params}, images, train=True, mutable=["batch_stats"])
    assert not state
    return (logits**2).sum()

  grads = gradient(variables["params"])
  for name, tree in grads["encoder"].items():
    trained = encoder.stage_of(name) > after_stage
    assert all(np.any(leaf) == trained for leaf in jax.tree.leaves(tree)), name
  learning = simclr.trained_part(model, variables["params"])
  assert learning.get("encoder", {}).keys() == {
    name for name in grads["encoder"] if encoder.stage_of(name) > after_stage
  }
  assert not simclr.moving_part(model, {})


def test_layer_norms_are_left_out_of_decay_and_trust_ratio():
  params = abstract(plain_encoder.PlainEncoder(), images_like(), train=True)["params"]
  for path, adapted in traverse_util.flatten_dict(optim.lars_mask(params)).items():
    assert adapted == (path[-1] == "kernel"), path
  for path, normalization in traverse_util.flatten_dict(optim.normalization_mask(params)).items():
    assert normalization == path[0].endswith("_norm"), path
