"""The experiments: all have the same keys, and their recipes are the published ones."""

import pathlib
import re

import jax.numpy as jnp
import pytest
import read_keys

from simclr_jax import config as config_lib
from simclr_jax import errors, experiment, optim
from simclr_jax.keys import KEYS

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
PACKAGE = pathlib.Path(config_lib.__file__).parent


def config(name):
  return config_lib.load(f"{CONFIGS}/{name}")


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda path: path.name)
def test_every_experiment_has_the_keys_of_the_defaults(path):
  assert config_lib.flat(config(path.name).to_dict()).keys() == KEYS.keys()


def test_every_key_has_a_meaning_and_its_default_is_allowed():
  assert all(key.meaning for key in KEYS.values())
  config_lib.check(config_lib.defaults())


@pytest.mark.parametrize(
  ("name", "examples", "steps", "warmup", "peak"),
  [
    ("cifar10.py", 50_000, 97_657, 976, 2.0),
    ("imagenet.py:v1", 1_281_167, 312_785, 3_127, 4.8),
    ("imagenet.py:v2", 1_281_167, 250_228, 12_511, 6.4),
    ("imagenet.py:v2_memory", 1_281_167, 250_228, 12_511, 6.4),
    ("imagenet.py:readme", 1_281_167, 31_279, 3_127, 4.8),
  ],
)
def test_the_recipes_take_the_published_steps(name, examples, steps, warmup, peak):
  keys = config(name)
  total = optim.total_steps(examples, keys.total_epochs, keys.batch_size)
  warm = optim.warmup_steps(examples, keys.optimizer.warmup_epochs, keys.batch_size)
  assert (total, warm) == (steps, warmup)
  schedule = optim.schedule(
    base_learning_rate=keys.optimizer.base_learning_rate,
    batch_size=keys.batch_size,
    scaling=keys.optimizer.scaling,
    warmup_steps=warm,
    total_steps=total,
  )
  assert float(schedule(0)) == 0
  assert jnp.allclose(schedule(warm), peak, rtol=1e-6)


@pytest.mark.parametrize(("name", "steps", "rate"), [("cifar10.py", 9_766, 0.2), ("imagenet.py:v1", 28_151, 1.6)])
def test_the_linear_evaluations_take_the_published_steps(name, steps, rate):
  examples = {"cifar10.py": 50_000, "imagenet.py:v1": 1_281_167}[name]
  recipe = config(name).linear_eval
  assert optim.total_steps(examples, recipe.total_epochs, recipe.batch_size) == steps
  assert recipe.optimizer.base_learning_rate * recipe.batch_size / 256 == pytest.approx(rate)
  assert (recipe.optimizer.name, recipe.optimizer.warmup_epochs, recipe.zero_init) == ("momentum", 0.0, True)


def test_v1_and_v2_differ_where_the_papers_do():
  one, two = config("imagenet.py:v1"), config("imagenet.py:v2")
  assert (one.head.layers, two.head.layers) == (2, 3)
  assert (one.optimizer.weight_decay, two.optimizer.weight_decay) == (1e-6, 1e-4)
  assert (one.augment.brightness, two.augment.brightness) == ("additive", "multiplicative")


@pytest.mark.parametrize(
  ("variant", "examples", "steps", "rate", "layer"),
  [
    ("v1_1pct", 12_811, 188, 0.8, 0),
    ("v1_10pct", 128_116, 939, 0.8, 0),
    ("v2_1pct", 12_811, 751, 0.16, 1),
    ("v2_10pct", 128_116, 3_754, 0.16, 1),
    ("v2_100pct", 1_281_167, 37_535, 0.16, 0),
    ("supervised", 1_281_167, 28_151, 1.6, 0),
  ],
)
def test_the_fine_tunings_take_the_published_steps(variant, examples, steps, rate, layer):
  keys = config(f"imagenet_finetune.py:{variant}")
  recipe = keys.finetune
  assert optim.total_steps(examples, recipe.total_epochs, recipe.batch_size) == steps
  scale = recipe.batch_size / 256 if recipe.optimizer.scaling == "linear" else recipe.batch_size**0.5
  assert recipe.optimizer.base_learning_rate * scale == pytest.approx(rate)
  assert (recipe.optimizer.warmup_epochs, recipe.zero_init, keys.head.finetune_from) == (0.0, True, layer)


READERS = (
  "config.py",
  "experiment.py",
  "splits.py",
  "network.py",
  "classifier.py",
  "comparison.py",
  "inference.py",
  "jobs/*.py",
)


def test_every_key_is_read():
  files = [path.read_text() for pattern in READERS for path in PACKAGE.glob(pattern)]
  read = read_keys.of(files)
  assert [name for name in KEYS if name not in read] == []


@pytest.mark.parametrize(
  ("text", "read"),
  [
    ("def run(config):\n  keys = config.probes\n  return keys.epochs", {"probes.epochs"}),
    ("def run(config):\n  keys = config.knn\n  return keys.epochs", set()),
    ("def f(keys):\n  return keys.format\ndef run(this):\n  f(this.config.embed)", {"embed.format"}),
    ("def run(config):\n  config.batch_size = 8", set()),
    ("def run(self):\n  a, b = self.config, 1\n  return a.loss.kind, b.seed", {"loss.kind"}),
    ("def run(config):\n  return [config.monitor[k] for k in ('pairs', 'seed')]", {"monitor.pairs"}),
    ("def run(run):\n  return run.recipe.zero_init", {f"{job}.zero_init" for job in experiment.RECIPES}),
  ],
)
def test_a_key_is_read_in_its_own_section(text, read):
  assert read_keys.of([text]) == read


def test_the_table_of_features_names_keys_and_jobs_that_exist():
  page = (PACKAGE.parent / "docs" / "features.md").read_text()
  known = KEYS
  quoted = [text.partition("=")[0].partition(":")[0] for text in re.findall(r"`([^`]+)`", page.split("## Flags")[1])]
  ours = [name for name in quoted if re.fullmatch(r"[a-z_]+\.[a-z_.]+", name) and not name.startswith("simclr_jax")]
  assert len(ours) > 40
  assert [name for name in ours if name not in known] == []
  flags = re.findall(r"(?m)^\| ((?:`\w+`(?:, )?)+) \|", page)
  assert sum(len(row.split(", ")) for row in flags) == 50  # TF1 and TF2 together have so many different ones.
  assert {"pretrain", "finetune", "linear_eval", "distill", "convert", "study", "transfer", "knn"} <= set(quoted)


NUMBERS = sorted(name for name, key in KEYS.items() if type(key.default) in (int, float))


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_beyond_its_interval_is_refused_before_anything_else(name):
  kind = type(KEYS[name].default)
  assert config_lib.load("cifar10", {name: str(KEYS[name].default)})
  for value in ("-1e300", "1e300", "nan", "inf") if kind is float else (str(-(10**12)), str(10**12)):
    with pytest.raises(errors.UserError, match=f"^config.{name} is .*; use "):
      config_lib.load("cifar10", {name: value})


@pytest.mark.parametrize(
  ("name", "value", "says"),
  [
    ("augment.min_area", "2", "config.augment.min_area is 2.0; use more than 0, at most 1."),
    ("augment.min_area", "0", "config.augment.min_area is 0.0; use more than 0, at most 1."),
    ("augment.max_area", "0.01", "config.augment.min_area is 0.08 and max_area 0.01; use a smaller min_area."),
    ("batch_size", "-4", "config.batch_size is -4; use 1 or more, less than 2147483648."),
    ("data.image_size", "0", "config.data.image_size is 0; use 1 or more, at most 4096."),
    ("loss.temperature", "0", "config.loss.temperature is 0.0; use more than 0, at most 1000000000."),
    ("total_epochs", "0", "config.total_epochs is 0.0; use more than 0, at most 1000000000."),
    ("optimizer.momentum", "1", "config.optimizer.momentum is 1.0; use 0 or more, less than 1."),
    ("head.layers", "1000000", "config.head.layers is 1000000; use 0 or more, at most 100."),
    ("keep_checkpoints", "0", "config.keep_checkpoints is 0; use 1 or more, less than 2147483648."),
  ],
)
def test_what_to_use_is_said(name, value, says):
  with pytest.raises(errors.UserError) as caught:
    config_lib.load("cifar10", {name: value})
  assert str(caught.value) == says
