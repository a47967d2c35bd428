"""Schedules, LARS and its masks, momentum, Adam and the L2 term against the reference's numbers."""

import flax
import jax
import jax.numpy as jnp
import numpy as np
import numpy_reference
import optax
import pytest

from simclr_jax import errors, optim
from simclr_jax.models import heads, resnet, simclr


def recipe(arrays, name):
  """Returns the arguments of `optim.schedule` for one recipe of schedule.npz."""
  get = lambda key: arrays[f"{name}__{key}"].item()
  return {
    "base_learning_rate": get("base_lr"),
    "batch_size": get("batch"),
    "scaling": get("scaling"),
    "warmup_steps": optim.warmup_steps(get("n_train"), get("warmup_epochs"), get("batch")),
    "total_steps": optim.total_steps(get("n_train"), get("epochs"), get("batch")),
  }


def test_steps_and_warmup_steps_are_the_references(reference):
  arrays = reference("schedule")
  for name in arrays["recipes"]:
    arguments = recipe(arrays, name)
    assert arguments["total_steps"] == arrays[f"{name}__total_steps"], name
    assert arguments["warmup_steps"] == arrays[f"{name}__warmup_steps"], name


# The recorded rates are float32 and off by 1.3e-7 of the peak; rounding ours adds half of that.
@pytest.mark.parametrize(("x64", "tolerance"), [(True, 1.3e-7), (False, 2e-7)])
def test_the_rate_of_every_recorded_step_is_the_references(reference, x64, tolerance):
  arrays = reference("schedule")
  with jax.enable_x64(x64):
    for name in arrays["recipes"]:
      rates = optim.schedule(**recipe(arrays, name))(arrays[f"{name}__steps"])
      atol = tolerance * arrays[f"{name}__peak"]
      np.testing.assert_allclose(rates, arrays[f"{name}__lr"], rtol=0, atol=atol, err_msg=name)


def test_the_schedule_keeps_its_digits_in_float32_over_millions_of_steps():
  arguments = {"warmup_steps": 312_785, "total_steps": 9_999_991}
  schedule = optim.schedule(base_learning_rate=0.3, batch_size=4096, scaling="linear", **arguments)
  steps = [0, 1, 2, 312_784, 312_785, 312_786, 5_000_000, 9_000_001, 9_999_000, 9_999_990]
  rates = schedule(np.array(steps))
  assert rates.dtype == jnp.float32
  want = [numpy_reference.learning_rate(step, peak=4.8, **arguments) for step in steps]
  # The last step's rate is 1e-13 of the peak, where the twin's own float64 cosine has three digits left.
  np.testing.assert_allclose(rates[:-1], want[:-1], rtol=5e-7)
  np.testing.assert_allclose(rates[-1], 4.8 * (np.pi / 2 / (9_999_991 - 312_785)) ** 2, rtol=5e-7)


def test_the_schedule_takes_python_integers_arrays_and_tracers_alike():
  schedule = optim.schedule(base_learning_rate=1.0, batch_size=256, scaling="linear", warmup_steps=3, total_steps=10)
  one_by_one = [schedule(step) for step in range(12)]
  for schedule_fn in (schedule, jax.jit(schedule)):
    for steps in (jnp.arange(12), np.arange(12), np.arange(12, dtype=np.int32)):
      np.testing.assert_allclose(schedule_fn(steps), one_by_one, rtol=5e-7)
  np.testing.assert_array_equal(one_by_one[0], 0)
  np.testing.assert_array_equal(one_by_one[10:], 0)
  assert one_by_one[3] == 1


def test_the_imagenet_schedule_has_its_golden_numbers():
  schedule = optim.schedule(
    base_learning_rate=0.3, batch_size=4096, scaling="linear", warmup_steps=3127, total_steps=31279
  )
  rates = schedule(np.array([0, 1, 3126, 3127, 15639, 31279]))
  np.testing.assert_allclose(rates, [0, 0.001535, 4.798465, 4.8, 2.816756, 0], atol=5e-7)


def test_the_schedule_is_in_float64_when_asked(x64):
  arguments = {"warmup_steps": 10, "total_steps": 100}
  schedule = optim.schedule(base_learning_rate=0.1, batch_size=512, scaling="sqrt", **arguments)
  want = [numpy_reference.learning_rate(step, peak=0.1 * np.sqrt(512), **arguments) for step in range(101)]
  np.testing.assert_allclose(schedule(jnp.arange(101)), want, rtol=1e-12, atol=1e-15)
  assert schedule(jnp.int32(5)).dtype == jnp.float64


def test_a_run_may_end_inside_its_warmup():
  schedule = optim.schedule(base_learning_rate=1.0, batch_size=256, scaling="linear", warmup_steps=10, total_steps=5)
  np.testing.assert_allclose(schedule(jnp.arange(6)), np.arange(6) / 10, rtol=1e-6)


def test_an_unknown_scaling_is_answered_with_the_nearest():
  with pytest.raises(errors.UserError, match='did you mean "sqrt"') as caught:
    optim.schedule(base_learning_rate=0.3, batch_size=256, scaling="sqr", warmup_steps=1, total_steps=9)
  assert "\n" not in str(caught.value)


def test_steps_of_an_empty_dataset_are_refused():
  with pytest.raises(errors.UserError, match="0 examples"):
    optim.total_steps(0, 100, 256)
  with pytest.raises(errors.UserError, match="batch_size 0"):
    optim.warmup_steps(100, 10, 0)


def our_name(name):
  """Returns a checkpoint name of the reference as a path in our trees."""
  ours = {"head_supervised": "linear_head", "gamma": "scale", "beta": "bias"}
  return tuple(ours.get(part, part) for part in name.split("/"))


def lars_trajectory(arrays, decay, dtype):
  """Returns names, and per step the parameters and the momentum buffers by path."""
  paths = [our_name(str(name)) for name in arrays["names"]]
  tree = lambda key, *at: flax.traverse_util.unflatten_dict(
    {path: jnp.asarray(arrays[f"p{i:02}__{key}"][at], dtype) for i, path in enumerate(paths)}
  )
  rates = jnp.asarray(arrays["learning_rates"], dtype)
  tx = optim.lars(
    lambda step: rates[step],
    weight_decay=float(decay),
    momentum=float(str(arrays["momentum"])),
    trust_coefficient=float(str(arrays["eeta"])),
  )

  @jax.jit
  def step_fn(params, opt_state, grads):
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state

  params = tree("init")
  opt_state = tx.init(params)
  for step in range(len(rates)):
    params, opt_state = step_fn(params, opt_state, tree("grads", step))
    flat = flax.traverse_util.flatten_dict
    # optax keeps the buffer with the sign of the update.
    buffers = jax.tree.map(jnp.negative, optax.tree.get(opt_state, "trace"))
    yield paths, flat(params), flat(buffers)


@pytest.mark.slow
@pytest.mark.optimized
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_lars_gives_the_references_parameters_and_buffers_after_every_step(reference, dtype):
  arrays = reference("lars")
  with jax.enable_x64(dtype == np.float64):
    for j, decay in enumerate(arrays["weight_decays"]):
      for step, (paths, params, buffers) in enumerate(lars_trajectory(arrays, decay, dtype)):
        for i, path in enumerate(paths):
          for what, got in (("params", params[path]), ("momentum", buffers[path])):
            want = arrays[f"p{i:02}__wd{j}_{what}"]
            message = f"{path} {what} step {step}, decay {decay}"
            assert got.dtype == dtype
            np.testing.assert_allclose(got, want[step], rtol=0, atol=3.2e-7 * np.abs(want).max(), err_msg=message)


def test_lars_is_the_twins_in_float64(reference, x64):
  arrays = reference("lars")
  for decay in arrays["weight_decays"]:
    trajectory = list(lars_trajectory(arrays, decay, np.float64))
    for i, path in enumerate(trajectory[0][0]):
      w, buffer = arrays[f"p{i:02}__init"].astype(np.float64), 0.0
      adapted = path[-1] == "kernel" and "linear_head" not in path
      for step, (_, params, buffers) in enumerate(trajectory):
        w, buffer = numpy_reference.lars_step(
          w,
          buffer,
          arrays[f"p{i:02}__grads"][step].astype(np.float64),
          np.float64(arrays["learning_rates"][step]),
          weight_decay=decay,
          momentum=0.9,
          trust_coefficient=0.001,
          adapted=adapted,
        )
        np.testing.assert_allclose(params[path], w, rtol=1e-12, atol=1e-14, err_msg=str(path))
        np.testing.assert_allclose(buffers[path], buffer, rtol=1e-12, atol=1e-14, err_msg=str(path))


@pytest.fixture(scope="module")
def network():
  """Shapes of a SimCLR network that has every kind of parameter."""
  model = simclr.SimCLR(
    encoder=resnet.ResNet(depth=50, width=0.125, sk_ratio=0.0625, se_ratio=0.25),
    projection_head=heads.ProjectionHead(layers=3, out_dim=16),
    linear_head=heads.LinearHead(classes=10),
  )
  images = jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.float32)
  init = lambda images: model.init(jax.random.key(0), images, train=True)
  return jax.eval_shape(init, images)["params"]


def rows_of(mask):
  return {"/".join(path): value for path, value in flax.traverse_util.flatten_dict(mask).items()}


def test_the_masks_of_a_network_are_this_table(network):
  adapted, normalization = rows_of(optim.lars_mask(network)), rows_of(optim.normalization_mask(network))
  table = """
    encoder/stem_conv1/kernel                                adapted
    encoder/stem_bn1/scale                                   -         normalization
    encoder/stem_bn1/bias                                    -         normalization
    encoder/group1_block1/shortcut_conv/kernel               adapted
    encoder/group1_block1/selective/conv/kernel              adapted
    encoder/group1_block1/selective/reduce_bn/bias           -         normalization
    encoder/group1_block1/squeeze_excite/reduce/kernel       adapted
    encoder/group1_block1/squeeze_excite/reduce/bias         -
    encoder/group4_block3/conv3/kernel                       adapted
    encoder/group4_block3/bn3/scale                          -         normalization
    projection_head/dense1/kernel                            adapted
    projection_head/bn1/bias                                 -         normalization
    projection_head/dense3/kernel                            adapted
    projection_head/bn3/scale                                -         normalization
    linear_head/dense/kernel                                 -
    linear_head/dense/bias                                   -
  """
  for row in table.strip().splitlines():
    name, *words = row.split()
    assert adapted[name] == ("adapted" in words), name
    assert normalization[name] == ("normalization" in words), name


def test_only_kernels_outside_of_linear_heads_are_adapted(network):
  for name, adapted in rows_of(optim.lars_mask(network)).items():
    assert adapted == (name.endswith("/kernel") and not name.startswith("linear_head")), name


def test_batch_norm_is_every_leaf_of_a_module_named_bn_and_no_other(network):
  for name, normalization in rows_of(optim.normalization_mask(network)).items():
    assert normalization == ("bn" in name.split("/")[-2]), name


def test_any_module_named_like_a_linear_head_is_left_alone_by_lars():
  params = {"probe": {"linear_head_2": {"dense": {"kernel": jnp.ones(3)}}}, "linear": {"kernel": jnp.ones(3)}}
  mask = optim.lars_mask(params)
  assert not mask["probe"]["linear_head_2"]["dense"]["kernel"]
  assert mask["linear"]["kernel"]


def test_masks_fit_trees_of_lists_too():
  params = {"layers": [{"kernel": jnp.ones(2), "bias": jnp.ones(2)}, {"scale": jnp.ones(2), "bias": jnp.ones(2)}]}
  assert optim.lars_mask(params)["layers"][0] == {"kernel": True, "bias": False}
  assert optim.normalization_mask(params)["layers"] == [
    {"kernel": False, "bias": False},
    {"scale": True, "bias": True},
  ]


def run(tx, w, grads):
  """Returns w after one update of `tx` for each gradient."""
  opt_state = tx.init(w)
  for grad in grads:
    updates, opt_state = tx.update(jnp.asarray(grad, w.dtype), opt_state, w)
    w = optax.apply_updates(w, updates)
  return w


def test_nesterov_momentum_has_its_golden_number():
  rates = jnp.asarray([1, 0.5, 0.25, 0.1])
  w = run(optim.momentum(lambda step: rates[step]), jnp.float32(0), [1, 2, -1, 0.5])
  np.testing.assert_allclose(w, -6.9515996, rtol=1e-6)


def test_momentum_and_adam_are_the_twins_in_float64(x64):
  rng = np.random.default_rng(0)
  start, grads, rates = rng.normal(size=5), rng.normal(size=(9, 5)) * 1e-6, rng.uniform(0.1, 2, size=9)
  schedule = lambda step: jnp.asarray(rates)[step]
  w = run(optim.momentum(schedule, momentum=0.8), jnp.asarray(start), grads)
  np.testing.assert_allclose(w, numpy_reference.nesterov_steps(start, grads, rates, 0.8), rtol=1e-13)
  w = run(optim.adam(schedule), jnp.asarray(start), grads)
  np.testing.assert_allclose(w, numpy_reference.adam_steps(start, grads, rates), rtol=1e-12)
  # With epsilon where optax has it, small gradients move otherwise.
  other = run(optax.adam(schedule, eps=1e-7), jnp.asarray(start), grads)
  assert np.abs(w - other).max() > 1e-3


def test_adam_keeps_its_digits_in_float32():
  grads = np.full((3, 2), 0.1)
  w = run(optim.adam(0.001), jnp.zeros(2), grads)
  np.testing.assert_allclose(w, numpy_reference.adam_steps(np.zeros(2), grads, [0.001] * 3), rtol=1e-6)


def test_the_l2_term_covers_what_the_optimizer_does_not_decay():
  params = {
    "encoder": {
      "conv": {"kernel": jnp.full(2, 1.0)},
      "bn": {"scale": jnp.full(2, 10.0), "bias": jnp.full(2, 10.0)},
    },
    "projection_head": {"dense": {"kernel": jnp.full(2, 2.0)}, "bn": {"scale": jnp.full(2, 10.0)}},
    "linear_head": {"dense": {"kernel": jnp.full(2, 3.0), "bias": jnp.full(2, 4.0)}},
  }
  assert optim.weight_decay_loss(params, 0.5, optimizer="lars") == 0.25 * 2 * 9
  for optimizer in ("momentum", "adam"):
    assert optim.weight_decay_loss(params, 0.5, optimizer=optimizer) == 0.25 * 2 * (1 + 4 + 9 + 16)
  del params["linear_head"]
  assert optim.weight_decay_loss(params, 0.5, optimizer="lars") == 0
  with pytest.raises(errors.UserError, match='did you mean "momentum"'):
    optim.weight_decay_loss(params, 0.5, optimizer="momentun")


def test_the_l2_terms_gradient_is_the_weight_times_the_decay():
  params = {"linear_head": {"dense": {"kernel": jnp.arange(3.0), "bias": jnp.arange(2.0)}}}
  grads = jax.grad(lambda params: optim.weight_decay_loss(params, 0.1, optimizer="lars"))(params)
  np.testing.assert_allclose(grads["linear_head"]["dense"]["kernel"], 0.1 * np.arange(3), rtol=1e-6)
  np.testing.assert_array_equal(grads["linear_head"]["dense"]["bias"], 0)


# Who decays what (SIMCLR.md 3.7): the optimizer itself, the L2 term of the loss, or nobody.
DECAYED = {
  "lars": {"encoder/conv/kernel": "optimizer", "linear_head/dense/kernel": "loss"},
  "momentum": dict.fromkeys(("encoder/conv/kernel", "linear_head/dense/kernel", "linear_head/dense/bias"), "loss"),
}
DECAYED["adam"] = DECAYED["momentum"]


@pytest.mark.slow
@pytest.mark.parametrize("name", DECAYED)
def test_each_optimizer_with_the_l2_term_takes_the_twins_steps_in_float64(name, x64):
  names = (*DECAYED["adam"], "encoder/bn/scale", "encoder/bn/bias")
  rng, decay, rates = np.random.default_rng(0), 0.3, np.array([0.5, 1.0, 0.7, 0.2])
  start = {leaf: rng.normal(size=4) for leaf in names}
  gradients = {leaf: rng.normal(size=(4, 4)) for leaf in names}
  schedule = lambda step: jnp.asarray(rates)[step]
  tx = {
    "lars": lambda: optim.lars(schedule, weight_decay=decay),
    "momentum": lambda: optim.momentum(schedule),
    "adam": lambda: optim.adam(schedule),
  }[name]()
  unflatten = lambda flat: flax.traverse_util.unflatten_dict(flat, sep="/")
  params = unflatten({leaf: jnp.asarray(w) for leaf, w in start.items()})
  opt_state = tx.init(params)
  for step in range(len(rates)):
    direction = unflatten({leaf: grads[step] for leaf, grads in gradients.items()})

    def loss_fn(params, direction=direction):
      linear = sum(jnp.sum(w * g) for w, g in zip(jax.tree.leaves(params), jax.tree.leaves(direction), strict=True))
      return linear + optim.weight_decay_loss(params, decay, optimizer=name)

    updates, opt_state = tx.update(jax.grad(loss_fn)(params), opt_state, params)
    params = optax.apply_updates(params, updates)

  for leaf, got in flax.traverse_util.flatten_dict(params, sep="/").items():
    w, grads, buffer, where = start[leaf], [], 0.0, DECAYED[name].get(leaf)
    for step, rate in enumerate(rates):
      grads.append(gradients[leaf][step] + (decay * w if where == "loss" else 0))
      if name == "lars":
        knobs = {"weight_decay": decay, "momentum": 0.9, "trust_coefficient": 0.001, "adapted": where == "optimizer"}
        w, buffer = numpy_reference.lars_step(w, buffer, grads[-1], rate, **knobs)
      elif name == "momentum":
        w = numpy_reference.nesterov_steps(start[leaf], grads, rates[: step + 1], 0.9)
      else:
        w = numpy_reference.adam_steps(start[leaf], grads, rates[: step + 1])
    np.testing.assert_allclose(got, w, rtol=1e-10, atol=1e-12, err_msg=leaf)


def test_bfloat16_weights_are_squared_in_float32():
  kernel = jnp.full(1000, 1.0, jnp.bfloat16)
  loss = optim.weight_decay_loss({"dense": {"kernel": kernel}}, 2.0, optimizer="adam")
  assert loss.dtype == jnp.float32
  assert loss == 1000
