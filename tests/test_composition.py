"""Compositions of augmentations: each operation against a NumPy twin, each random law, and how both feeds use them."""

import functools
import itertools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from samples import distance_to_uniform

from simclr_jax import __main__ as command
from simclr_jax import errors
from simclr_jax.data import arrays, composition, device_augment, resident, sources
from simclr_jax.hardware import cost, sharding
from simclr_jax.jobs import feed

ROOT = pathlib.Path(__file__).parents[1]
SIZE = 16
COLORS = {"color_strength": 0.5, "brightness": "multiplicative", "color_probability": 0.8, "grayscale_probability": 0.2}


@pytest.fixture(autouse=True, scope="module")
def compiles_fast():
  """What is run here is tiny, and compiling it takes longer."""
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)


def keys_of(count):
  return device_augment.example_keys(3, jnp.zeros(count, jnp.int32), jnp.arange(count))


def images_of(count, size=SIZE):
  return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), np.uint8)


def unit(images):
  return images.astype(np.float64) / 255


def each(function, images, numbers):
  """Returns `function` of each image and its number."""
  return np.stack([function(*pair) for pair in zip(images, np.asarray(numbers), strict=True)])


def pairs(crops, keys, operations, **knobs):
  return composition.pairs_of_crops(crops, keys, operations, area=(0.25, 0.5), **COLORS, **knobs)


jitted = jax.jit(pairs)  # Compiled once: always so many images and so many operations.
COUNT, MOST = 40, 3


def changed(text):
  """Returns the second views of `images_of(COUNT)`, and checks that the first are as they came."""
  operations = composition.codes(text)
  operations = np.append(operations, [composition.NOTHING] * (MOST - len(operations))).astype(np.int32)
  views = np.asarray(jitted(images_of(COUNT), keys_of(COUNT), operations))
  np.testing.assert_allclose(views[:, 0], unit(images_of(COUNT)), rtol=0, atol=1e-7)
  assert views.min() >= 0
  assert views.max() <= 1
  return views[:, 1]


# NumPy twins, in float64.


def sobel(images):
  padded = np.pad(images, [(0, 0), (1, 1), (1, 1), (0, 0)], mode="reflect")
  kernel, height, width = np.array([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]]), *images.shape[1:3]
  across, down = np.zeros_like(images), np.zeros_like(images)
  for y, x in np.ndindex(3, 3):
    window = padded[:, y : y + height, x : x + width]
    across += kernel[y, x] * window
    down += kernel[x, y] * window
  return np.clip(np.hypot(across, down) / 4, 0, 1)


def cutout(image, center):
  image, side = image.copy(), len(image) // 2
  top, left = np.asarray(center) - side // 2
  image[max(top, 0) : max(top + side, 0), max(left, 0) : max(left + side, 0)] = 0.5
  return image


def test_sobel_is_that_of_numpy():
  images = images_of(3, 12)
  seen = jax.jit(composition.sobel)(jnp.asarray(unit(images), jnp.float32))
  np.testing.assert_allclose(seen, sobel(unit(images)), rtol=0, atol=1e-6)
  edge = np.zeros((1, 8, 8, 3), np.float32)
  edge[:, :, 4:] = 1
  np.testing.assert_array_equal(composition.sobel(edge)[0, :, :, 0], [[0, 0, 0, 1, 1, 0, 0, 0]] * 8)


@pytest.mark.parametrize("size", [16, 11])
def test_the_square_of_cutout_is_that_of_numpy_also_at_the_borders(size):
  corners = [(y, x) for y in (0, 5, size - 1) for x in (0, 4, size - 1)]
  images = unit(images_of(len(corners), size)).astype(np.float32)
  seen = jax.jit(composition.cutout)(images, np.array(corners, np.int32))
  np.testing.assert_array_equal(seen, each(cutout, images, corners))


def test_a_rotation_is_that_of_numpy():
  images = images_of(3)
  seen = jax.jit(composition.rotate)(images, np.array([1, 2, 3], np.int32))
  np.testing.assert_array_equal(seen, [np.rot90(image, k + 1) for k, image in enumerate(images)])


def test_noise_is_that_of_numpy():
  images, normal = unit(images_of(3)), np.random.default_rng(1).standard_normal((3, SIZE, SIZE, 3))
  seen = jax.jit(composition.noise)(jnp.asarray(images, jnp.float32), jnp.asarray(normal, jnp.float32))
  np.testing.assert_allclose(seen, np.clip(images + 0.2 * normal, 0, 1), rtol=0, atol=1e-6)


def own_keys(count, position):
  """Returns the keys of the operation at `position`, by the rule that composed views are documented to follow."""
  key = jax.random.key(3, impl="threefry2x32")
  chain = lambda index: functools.reduce(jax.random.fold_in, (0, index, composition.COMPOSED, position), key)
  return jax.vmap(chain)(jnp.arange(count))


def test_each_operation_draws_its_own_numbers_and_does_what_it_is_named_for():
  images, keys = images_of(COUNT), own_keys(COUNT, 0)
  floats = unit(images).astype(np.float32)
  crop = jax.jit(lambda boxes: device_augment.crop_and_resize(floats, boxes, SIZE))
  normal = jax.jit(jax.vmap(lambda key: jax.random.normal(key, (SIZE, SIZE, 3))))
  distort = jax.jit(lambda: device_augment.distorted_pairs(floats[:, None], keys, blur=False, **COLORS)[:, 0])
  wanted = {
    "cutout": lambda: each(cutout, floats, composition.centers(keys, SIZE)),
    "sobel": lambda: sobel(unit(images)),
    "rotate": lambda: each(np.rot90, floats, composition.quarter_turns(keys)),
    "noise": lambda: np.clip(unit(images) + 0.2 * normal(keys), 0, 1),
    "blur": lambda: np.clip(device_augment.gaussian_blur(floats, composition.sigmas(keys), 3), 0, 1),
    "crop": lambda: np.clip(crop(composition.crop_boxes(keys, SIZE, (0.25, 0.5))), 0, 1),
    "color": distort,
  }
  assert set(wanted) == set(composition.OPERATIONS)
  for name, twin in wanted.items():
    seen = changed(name)
    np.testing.assert_allclose(seen, twin(), rtol=0, atol=3e-6, err_msg=name)
    share = np.mean(np.abs(seen - floats).max((1, 2, 3)) > 1e-3)
    # Always, but for the colours, whose law has coins of its own, and a blur whose sigma is a fraction of a pixel.
    assert 0.6 < share < 1 if name == "color" else share > 0.8 if name == "blur" else share == 1, name


def test_operations_follow_each_other_in_the_order_asked_for():
  turned = each(np.rot90, unit(images_of(COUNT)), composition.quarter_turns(own_keys(COUNT, 0)))
  twice = each(np.rot90, turned, composition.quarter_turns(own_keys(COUNT, 1)))
  cut = each(cutout, sobel(turned), composition.centers(own_keys(COUNT, 2), SIZE))
  np.testing.assert_allclose(changed("rotate,rotate"), twice, rtol=0, atol=1e-6)
  np.testing.assert_allclose(changed("rotate,sobel"), sobel(turned), rtol=0, atol=1e-6)
  np.testing.assert_allclose(changed("rotate, sobel,cutout"), cut, rtol=0, atol=1e-6)
  assert np.abs(changed("sobel,noise") - changed("noise,sobel")).max() > 0.1


def test_what_is_drawn_for_an_example_depends_on_nothing_beside_it():
  order, images, keys = np.random.default_rng(2).permutation(COUNT), images_of(COUNT), keys_of(COUNT)
  for text in ("crop,color,noise", "cutout,blur,rotate"):
    operations = composition.codes(text)
    together = np.asarray(jitted(images, keys, operations))
    other = jitted(images[order], keys[order], operations)
    np.testing.assert_allclose(other, together[order], rtol=0, atol=1e-6)


def test_random_numbers_are_uniform():
  keys = own_keys(20000, 1)
  sigmas = np.asarray(composition.sigmas(keys))
  assert distance_to_uniform(sigmas, np.float32(0.1), np.float32(2.0)) < 0.02
  for numbers, values in ((composition.quarter_turns(keys), [1, 2, 3]), (composition.centers(keys, 12), range(12))):
    numbers = np.asarray(numbers).reshape(20000, -1)
    for column in numbers.T:
      seen, counts = np.unique(column, return_counts=True)
      np.testing.assert_array_equal(seen, values)
      assert np.abs(counts / 20000 - 1 / len(counts)).max() < 0.02
  rows, columns = np.asarray(composition.centers(keys, 12)).T
  assert abs(np.corrcoef(rows, columns)[0, 1]) < 0.02
  boxes = np.asarray(composition.crop_boxes(keys[:4000], 64, (0.25, 0.5)))
  areas = boxes[:, 2] * boxes[:, 3] / 64**2
  assert 0.249 < areas.min() < 0.26
  assert 0.49 < areas.max() < 0.51


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float64])
def test_the_type_asked_for_comes_out(dtype):
  with jax.enable_x64(dtype == jnp.float64):
    views = jax.eval_shape(lambda: pairs(images_of(4), keys_of(4), composition.codes("noise"), dtype=dtype))
  assert (views.dtype, views.shape) == (dtype, (4, 2, SIZE, SIZE, 3))


@pytest.mark.parametrize("text", ["crop,colour", "crop,", "crop;color"])
def test_an_unknown_operation_is_a_user_error(text):
  with pytest.raises(errors.UserError, match=r"config.augment.compose is .*no operation .*use one or more of"):
    composition.codes(text)


# The feeds.


def config_of(**overrides):
  known = {"batch_size": 16, "data.image_size": SIZE, "data.shards": 4, "augment.compose": "crop,color"}
  known |= {name.replace("__", "."): value for name, value in overrides.items()}
  return command.load_config(f"{ROOT}/configs/cifar10.py", {name: str(value) for name, value in known.items()})


@pytest.fixture(scope="module")
def split():
  named = {"train_images": images_of(20, 20), "train_labels": np.arange(20) % 3}
  return arrays.from_mapping(named, "train")


def test_a_streamed_example_is_the_host_s_crop_beside_that_crop_changed(split):
  config, mesh = config_of(data__resident="false", augment__compose="rotate"), sharding.data_mesh(jax.devices()[:1])
  images = feed.pairs(config, sources.in_memory(split), mesh)
  prepare, seen = jax.jit(images.prepare), {}
  for batch in itertools.islice(images.batches(0), 3):
    assert batch["image"].dtype == np.uint8
    views = np.asarray(prepare(batch)["views"])
    np.testing.assert_allclose(views[:, 0], unit(batch["image"]), rtol=0, atol=1e-7)
    seen |= {(int(i), int(e)): v for i, e, v in zip(batch["index"], batch["epoch"], views, strict=True)}
  for (index, epoch), views in seen.items():
    keys = device_augment.example_keys(0, jnp.array([epoch], jnp.int32), jnp.array([index], jnp.int32))
    own = jax.random.fold_in(jax.random.fold_in(keys[0], composition.COMPOSED), 0)
    turn = int(composition.quarter_turns(own[None])[0])
    np.testing.assert_array_equal(views[1], np.rot90(views[0], turn))
  first, second = next((seen[i, 0], seen[i, 1]) for i, epoch in seen if epoch and (i, 0) in seen)
  assert np.abs(first - second).max() > 0.05


def test_resident_compositions_are_one_program_where_nothing_of_the_images_moves(split):
  mesh, lowered = sharding.data_mesh(), {}
  step = jax.device_put(np.int32(0), sharding.replicated(mesh))
  for compose in ("blur,color", "rotate"):
    images = feed.pairs(config_of(augment__compose=compose, augment__min_area=0.5), split, mesh)
    rows = lambda dataset, step, images=images: images.prepare(images.batch_of(dataset, step))
    lowered[compose] = jax.jit(rows, out_shardings=sharding.batched(mesh)).lower(images.dataset, step)
  texts = [program.as_text() for program in lowered.values()]
  assert texts[0] == texts[1]
  program = lowered["rotate"].compile()
  # The two numbers of the operations, and nothing else.
  assert sum(collective.bytes for collective in cost.collectives(program.as_text(), mesh.size)) <= 8

  # The first view is the random crop, not mirrored, and the second one that crop turned.
  batch = jax.device_get(program(images.dataset, step))
  keys = device_augment.example_keys(0, batch["epoch"], batch["index"])
  law = {"size": SIZE, "flip": False, "area": (0.5, 1.0)}
  crops = jax.jit(lambda images: device_augment.train_view(images, keys, **law))(split.images[batch["index"]])
  np.testing.assert_allclose(batch["views"][:, 0], crops, rtol=0, atol=1e-6)
  for first, second in batch["views"]:
    same = [np.array_equal(np.rot90(first, turns), second) for turns in range(4)]
    assert (sum(same), same[0]) == (1, False)


def test_without_compositions_the_dataset_is_what_it_was(split):
  images = feed.pairs(config_of(augment__compose=""), split, sharding.data_mesh())
  assert images.dataset.keys() == resident.on_devices(split, sharding.data_mesh()).keys()


def test_compositions_on_the_host_are_a_user_error(split):
  with pytest.raises(errors.UserError, match=r"config.augment.compose is done on the devices, .*'host'; set it to dev"):
    feed.law_of_pairs(config_of(augment__place="host", data__resident="false"))
