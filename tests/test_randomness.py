"""Random numbers: one generator whatever JAX's flags say, and no key that serves two purposes."""

import itertools

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from simclr_jax import config as config_lib
from simclr_jax import experiment, randomness
from simclr_jax.data import composition, device_augment, resident
from simclr_jax.data.distortion import Distortion
from simclr_jax.data.order import Order
from simclr_jax.evaluation import probes

EPOCHS, EXAMPLES, SHARDS, SIZE = 3, 20, 16, 8


@pytest.fixture
def drawn(monkeypatch):
  """Records the raw data of every key that numbers are drawn from, within compiled programs too."""
  found = []

  def recorded(draw):
    def wrapped(key, *args, **options):
      jax.debug.callback(lambda data: found.append(tuple(np.ravel(data).tolist())), jax.random.key_data(key))
      return draw(key, *args, **options)

    return wrapped

  for name in ("bits", "uniform", "normal", "randint", "permutation"):
    monkeypatch.setattr(jax.random, name, recorded(getattr(jax.random, name)))
  make_rng = flax.core.Scope.make_rng

  def of_parameters(scope, name="params"):
    key = make_rng(scope, name)
    jax.debug.callback(lambda data: found.append(tuple(np.ravel(data).tolist())), jax.random.key_data(key))
    return key

  monkeypatch.setattr(flax.core.Scope, "make_rng", of_parameters)

  def taken():
    jax.effects_barrier()
    keys = list(found)
    found.clear()
    return keys

  return taken


def order_of(examples, batch_size, seed, law):
  order = Order(batch_size, SHARDS, seed, law=law)
  steps = jnp.arange(-(-EPOCHS * examples // batch_size), dtype=jnp.int32)
  return jax.lax.map(lambda step: resident.positions(step, examples=examples, order=order), steps)


def augmentations(seed):
  index, epoch = np.arange(EXAMPLES, dtype=np.int32), np.zeros(EXAMPLES, np.int32)
  images = np.zeros((EXAMPLES, SIZE, SIZE, 3), np.uint8)
  every = composition.codes(",".join(composition.OPERATIONS))
  for number in range(EPOCHS):
    keys = device_augment.example_keys(seed, epoch + number, index)
    device_augment.two_views(images, keys, Distortion(SIZE))
    composition.pairs_of_crops(images, keys, every, Distortion(SIZE))


def purposes(seed, law):
  """What draws numbers, by purpose."""
  network = lambda: flax.linen.Dense(3).init(randomness.key(seed), jnp.zeros((1, 2)))
  x, y = np.zeros((EXAMPLES, 2), np.float32), np.arange(EXAMPLES) % 2
  grid = probes.Grid((0.1,), (0.0,), EPOCHS, EXAMPLES)
  return {
    "order": lambda: order_of(EXAMPLES, EXAMPLES * SHARDS, seed, law),
    "augmentation": lambda: augmentations(seed),
    "parameters": network,
    "probes": lambda: probes.train_grid(x, y, grid, classes=2, seed=seed),
  }


@pytest.mark.slow
def test_no_key_serves_two_purposes_or_examples(drawn):
  keys = {}
  for name, draw in purposes(5, law=2).items():
    draw()
    keys[name] = set(drawn())
  # Of an example in an epoch: crop and coin of two views, colours, and the operations, of which `sobel` draws none.
  assert len(keys["augmentation"]) == EPOCHS * EXAMPLES * (2 * 2 + 1 + len(composition.OPERATIONS) - 1)
  assert len(keys["order"]) >= EPOCHS * SHARDS
  assert len(keys["parameters"]) == 2  # Kernel and bias.
  assert len(keys["probes"]) >= EPOCHS
  for one, other in itertools.combinations(keys, 2):
    assert not keys[one] & keys[other], (one, other)


@pytest.mark.slow
def test_the_former_order_shared_keys_with_the_augmentation(drawn):
  found = purposes(5, law=1)
  found["order"]()
  order = set(drawn())
  found["augmentation"]()
  assert order & set(drawn())


def test_the_host_s_purposes_have_states_of_their_own():
  lists = [(5, epoch, shard) for epoch in range(3) for shard in range(3)]
  lists += [(5, 0, 0, purpose) for purpose in (randomness.SAMPLE, randomness.HELD_BACK)]
  states = {tuple(np.random.SeedSequence(numbers).generate_state(4)) for numbers in lists}
  assert len(states) == len(lists)


@pytest.mark.slow
def test_flags_of_jax_change_no_number():
  def numbers():
    keys = device_augment.example_keys(5, np.zeros(4, np.int32), np.arange(4, dtype=np.int32))
    images = np.random.default_rng(0).integers(0, 256, (4, SIZE, SIZE, 3), np.uint8)
    views = device_augment.two_views(images, keys, Distortion(SIZE))
    order = order_of(37, 64, 5, 2)
    parameters = flax.linen.Dense(3, param_dtype=jnp.float32).init(randomness.key(5), jnp.zeros((1, 2), jnp.float32))
    return [np.asarray(x) for x in jax.tree.leaves((order, views, parameters))]

  plain = numbers()
  with jax.default_prng_impl("rbg"):
    assert all(a.tobytes() == b.tobytes() for a, b in zip(plain, numbers(), strict=True))
  with jax.enable_x64(True):
    for a, b in zip(plain, numbers(), strict=True):
      assert a.dtype == b.dtype
      np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    index, epoch = order_of(37, 64, 5, 2)
    whole = np.asarray(index)[np.asarray(epoch) == 0]
    np.testing.assert_array_equal(np.sort(whole), np.arange(37))


def test_a_run_keeps_the_law_of_order_that_it_began_with(tmp_path):
  config = config_lib.load("cifar10")
  law = lambda: experiment.Experiment(config, "pretrain", str(tmp_path))._plan().order.law
  assert law() == 2
  config_lib.claim(str(tmp_path), config.to_dict(), "pretrain")
  path = tmp_path / "config.json"
  assert '"order": 2' in path.read_text()
  path.write_text(path.read_text().replace('"order": 2,', ""))  # As releases before 0.2.0 wrote it.
  assert law() == 1
  config_lib.claim(str(tmp_path), config.to_dict(), "pretrain")
  assert law() == 1
