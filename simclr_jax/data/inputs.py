"""Batches on their way into a compiled step: streamed from the host, or taken from a data set on the devices."""

import contextlib
import dataclasses
import functools
import importlib
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from simclr_jax import errors
from simclr_jax.data import composition, device_augment, order, prefetch, resident, source
from simclr_jax.data import distortion as distortions
from simclr_jax.hardware import sharding

# Imported late: they import TensorFlow, which a resident run must do without.
_host = functools.partial(importlib.import_module, "simclr_jax.data.host_augment")
_pipeline = functools.partial(importlib.import_module, "simclr_jax.data.pipeline")

Batch = dict[str, jax.Array]
Rows = dict[str, np.ndarray]
Prepare = Callable[[Batch], Batch]


def jit_step(step_fn: Callable, mesh: jax.sharding.Mesh, state: Any, *constants: Any, fed: tuple = ()) -> Callable:
  """Returns the jitted (state, batch, *constants) -> (state, metrics): one program for all devices, the state donated.

  `state` and `constants` are trees of arrays or of their shapes, placed as they are to stay. `fed` are the placements
  of the arguments between them, where these are not one batch.
  """
  placement, *others = (jax.tree.map(lambda array: array.sharding, tree) for tree in (state, *constants))
  return jax.jit(
    step_fn,
    in_shardings=(placement, *(fed or (sharding.batched(mesh),)), *others),
    out_shardings=(placement, sharding.replicated(mesh)),
    donate_argnums=0,
  )


@dataclasses.dataclass(frozen=True)
class Streamed:
  """Batches that the host makes; each waits on the devices before it is due."""

  mesh: jax.sharding.Mesh
  # The device's part of the augmentation, to be done in the step: a batch, or any of its rows -> the same with what the
  # network sees, `views` or `image`.
  prepare: Prepare
  batches: Callable[[int], Iterator[Rows]]  # first step -> this process's rows of the batch of each step from then on
  steps_per_dispatch: ClassVar[int] = 1

  def jit(self, step_fn: Callable, state: Any, *constants: Any) -> Callable:
    """Returns the jitted step; its arguments after the state are those that `feeding` gives. See `jit_step`."""
    return jit_step(step_fn, self.mesh, state, *constants)

  @contextlib.contextmanager
  def feeding(self, done: int, *constants: Any) -> Iterator[Callable[[int], tuple[Any, ...]]]:
    """Yields (steps of the next dispatch) -> its arguments, from step `done` on."""
    with contextlib.closing(prefetch.to_devices(self.batches(done), self.mesh)) as batches:
      yield lambda count: (next(batches), *constants)

  def first_batches(self, count: int, rows: int) -> Callable[[], Iterator[Batch]]:
    """Returns a function whose call yields `rows` evenly spaced rows of each of the first `count` global batches."""

    @functools.cache
    def held():
      # Kept in the host's memory, as it was read: device memory is scarce. Evenly spaced rows of every process's own
      # rows are evenly spaced rows of the global batch.
      batches, own = iter(self.batches(0)), rows // jax.process_count()
      return [_spread(next(batches), own) for _ in range(count)]

    return lambda: (sharding.global_batch(self.mesh, batch) for batch in held())


@dataclasses.dataclass(frozen=True)
class Resident:
  """Batches that the step takes from a data set on the devices, several steps in one dispatch; else as `Streamed`."""

  mesh: jax.sharding.Mesh
  prepare: Prepare
  dataset: Any  # tree of arrays on the devices
  batch_of: Callable[[Any, jax.Array], Batch]  # (dataset, step i32[]) -> global batch
  steps_per_dispatch: int  # at most so many

  def jit(self, step_fn: Callable, state: Any, *constants: Any) -> Callable:
    """Returns the jitted (state, dataset, count i32[], *constants) -> (state, metrics f[steps_per_dispatch]).

    One program for any count, so that the same steps give the same bits however they are dispatched, and nothing is
    compiled again where an evaluation or a checkpoint comes between.
    """

    # Jitted, so that the step is traced once for the shapes of its metrics and for the body of the loop.
    @jax.jit
    def one(state, dataset, *constants):
      return step_fn(state, self.batch_of(dataset, state.step), *constants)

    def steps(state, dataset, count, *constants):
      _, metrics = jax.eval_shape(one, state, dataset, *constants)
      rows = jax.tree.map(lambda x: jnp.zeros((self.steps_per_dispatch, *x.shape), x.dtype), metrics)

      def body(number, carry):
        state, rows = carry
        state, metrics = one(state, dataset, *constants)
        return state, jax.tree.map(lambda row, x: row.at[number].set(x), rows, metrics)

      return jax.lax.fori_loop(0, count, body, (state, rows))

    return jit_step(steps, self.mesh, state, *constants, fed=(sharding.replicated(self.mesh),) * 2)

  @contextlib.contextmanager
  def feeding(self, done: int, *constants: Any) -> Iterator[Callable[[int], tuple[Any, ...]]]:
    """Yields (steps of the next dispatch) -> its arguments."""
    place = lambda count: jax.device_put(np.int32(count), sharding.replicated(self.mesh))
    yield lambda count: (self.dataset, place(count), *constants)

  def first_batches(self, count: int, rows: int) -> Callable[[], Iterator[Batch]]:
    """Returns what `Streamed.first_batches` does."""
    batch_of = lambda dataset, step: _spread(self.batch_of(dataset, step), rows)
    batch_of = jax.jit(batch_of, out_shardings=sharding.batched(self.mesh))
    return lambda: (batch_of(self.dataset, np.int32(step)) for step in range(count))


@dataclasses.dataclass(frozen=True)
class Listed(Resident):
  """As `Resident`, of examples that the host names: they are sent with each dispatch."""

  positions: Callable[[int], tuple[np.ndarray, np.ndarray]]  # see `pipeline.Positions`

  @contextlib.contextmanager
  def feeding(self, done: int, *constants: Any) -> Iterator[Callable[[int], tuple[Any, ...]]]:
    """Yields (steps of the next dispatch) -> its arguments, from step `done` on."""
    place = lambda x: jax.device_put(x, sharding.replicated(self.mesh))
    begin = done

    def arguments(count):
      nonlocal begin
      rows = np.stack([self.positions(step) for step in range(begin, begin + count)], axis=1)
      # Every dispatch has the same shapes; its unused steps repeat the last one.
      index, epoch = np.pad(rows, ((0, 0), (0, self.steps_per_dispatch - count), (0, 0)), mode="edge")
      listed = {"index": place(index), "epoch": place(epoch), "first": place(np.int32(begin))}
      begin += count
      return {**self.dataset, "listed": listed}, place(np.int32(count)), *constants

    yield arguments


def _listed_batch(dataset, step, *, mesh):
  listed = dataset["listed"]
  row = step.astype(jnp.int32) - listed["first"]
  return resident.gathered(dataset, (listed["index"][row], listed["epoch"][row]), mesh)


Input = Streamed | Resident


@dataclasses.dataclass(frozen=True)
class Plan:
  """How the training images are ordered, augmented and fed."""

  order: order.Order
  place: str = "device"  # device: the host crops, colours and blur are part of the step; host: everything in tf.data
  resident: bool = False  # whether the images are on the devices
  steps_per_dispatch: int = 1  # of resident images
  dtype: Any = jnp.float32  # of the device's part of the augmentation
  batch_key: str = "batch_size"  # the config's name of the batch size, for messages


def pairs(
  images: source.Source, distortion: distortions.Distortion, plan: Plan, mesh: jax.sharding.Mesh, *, compose: str = ""
) -> Input:
  """Returns two augmented views of each image for pretraining.

  With operations of `composition` in `compose`, these take the place of the distortion's colours and blur.
  """
  found = _input(images, plan, mesh, *pair_augmentation(distortion, plan, compose))
  if not plan.resident or not compose:
    return found
  # The operations are data of the step, not part of its program, so that the cells of a study share what is compiled.
  operations = jax.device_put(composition.codes(compose), sharding.replicated(mesh))

  def batch_of(dataset, step):
    rows = found.batch_of(dataset, step)
    shape = (len(rows["index"]), *operations.shape)
    return {**rows, "operations": jnp.broadcast_to(dataset["operations"], shape)}

  return dataclasses.replace(found, dataset={**found.dataset, "operations": operations}, batch_of=batch_of)


def singles(
  images: source.Source,
  distortion: distortions.Distortion,
  plan: Plan,
  mesh: jax.sharding.Mesh,
  *,
  positions: Callable[[int], tuple[np.ndarray, np.ndarray]] | None = None,
) -> Input:
  """Returns one random crop, mirrored or not, of each image, as supervised training sees it; arguments as `pairs`.

  `positions` (see `pipeline.Positions`) takes the place of the plan's order.
  """
  if not plan.resident:
    transform = _single_on_host(distortion, plan.place)
    return _input(images, plan, mesh, transform, lambda batch: batch, positions)
  view = lambda batch: device_augment.train_view(batch["image"], _keys(plan, batch), distortion)
  return _input(images, plan, mesh, None, lambda batch: {**batch, "image": view(batch)}, positions)


def pair_augmentation(
  distortion: distortions.Distortion, plan: Plan, compose: str = ""
) -> tuple[Callable | None, Prepare]:
  """Returns the host's transform of an image (None where images are resident), and the step's part of a batch."""
  keys, dtype = functools.partial(_keys, plan), plan.dtype
  if compose:
    transform, views = _composition(distortion, plan, compose)
  elif plan.resident:
    transform, views = None, lambda b: device_augment.two_views(b["image"], keys(b), distortion, dtype=dtype)
  elif plan.place == "host":
    return lambda content, seed: {"views": _host().two_views(content, seed, distortion)}, lambda batch: batch
  else:
    transform = lambda content, seed: {"views": _host().two_crops(content, seed, distortion)}
    views = lambda b: device_augment.distorted_pairs(b["views"], keys(b), distortion, dtype=dtype)
  return transform, lambda batch: {**batch, "views": views(batch)}


def evaluation(
  images: source.Source, size: int, *, batch_size: int, is_resident: bool, shared: bool = True
) -> Callable[[], Iterator[Rows]]:
  """Returns a function whose call starts one pass over a split with the evaluation's centre crop of `size` pixels.

  The processes go through the split together, each with its part, or (not `shared`) each by itself. `batch_size` is
  that of all processes. The images of a resident split are decoded in memory.
  """
  process = _process() if shared else order.ALONE
  batch_size = batch_size if shared else batch_size // jax.process_count()
  if is_resident:
    return lambda: resident.evaluation_batches(images, image_size=size, batch_size=batch_size, process=process)
  view = lambda content, seed: {"image": _host().eval_view(content, size=size)}
  return lambda: _pipeline().evaluation_batches(images, view, batch_size=batch_size, process=process)


def augmented_pass(
  images: source.Source, distortion: distortions.Distortion, plan: Plan, number: int
) -> Iterator[Rows]:
  """Returns one pass over a split like `evaluation`, but randomly cropped and mirrored, anew for each number."""
  seed, size = plan.order.seed, plan.order.batch_size
  if plan.resident:
    view = lambda images, keys: device_augment.train_view(images, keys, distortion)
    return resident.augmented_batches(images, view, seed=seed, epoch=number, batch_size=size, process=_process())
  # Every pass has a seed of its own: an evaluation is always epoch 0.
  transform = _single_on_host(distortion, plan.place)
  return _pipeline().evaluation_batches(images, transform, seed=seed + number, batch_size=size, process=_process())


def transfer_pass(images: source.Source, size: int, *, batch_size: int) -> Iterator[Rows]:
  """Returns one pass over a split with the crop of the transfer protocol (v1 appendix B.8)."""
  view = lambda content, seed: {"image": _host().transfer_view(content, size=size)}
  return _pipeline().evaluation_batches(images, view, batch_size=batch_size, process=_process())


def _input(images, plan, mesh, transform, prepare, positions=None) -> Input:
  batch_size = plan.order.batch_size
  if images.num_examples < batch_size:
    raise errors.UserError(
      f"{images.num_examples} training images cannot fill a batch of config.{plan.batch_key} = {batch_size}; choose a "
      "smaller one."
    )
  plan.order.check(images, jax.process_count())
  if plan.resident and positions:
    batch_of = functools.partial(_listed_batch, mesh=mesh)
    return Listed(mesh, prepare, resident.on_devices(images, mesh), batch_of, plan.steps_per_dispatch, positions)
  if plan.resident:
    batch_of = functools.partial(resident.batch, order=plan.order, mesh=mesh)
    return Resident(mesh, prepare, resident.on_devices(images, mesh), batch_of, plan.steps_per_dispatch)
  options = {"process": _process(), "positions": positions}
  batches = lambda step: _pipeline().train_batches(images, transform, plan.order, start_step=step, **options)
  return Streamed(mesh, prepare, batches)


def _composition(distortion, plan, compose):
  """Returns the host's transform and batch -> views, the second of which went through the operations of `compose`."""
  operations = composition.codes(compose)
  if plan.place != "device":
    raise errors.UserError(
      f"config.augment.compose is done on the devices, config.augment.place is {plan.place!r}; set it to device."
    )
  plain, transform = dataclasses.replace(distortion, flip=False), None
  if not plan.resident:
    transform = _single_on_host(plain, plan.place)

  def views(batch):
    crops, keys, codes = batch["image"], _keys(plan, batch), operations
    if plan.resident:
      # All rows hold the same operations.
      crops, codes = device_augment.train_view(crops, keys, plain), batch["operations"][0]
    return composition.pairs_of_crops(crops, keys, codes, plain, dtype=plan.dtype)

  return transform, views


def _single_on_host(distortion, place):
  """Returns the host's transform to one crop."""
  if place == "host":
    return lambda content, seed: {"image": _host().train_view(content, seed, distortion)}
  return lambda content, seed: {"image": _host().train_crop(content, seed, distortion)}


def _keys(plan, batch):
  return device_augment.example_keys(plan.order.seed, batch["epoch"], batch["index"])


def _spread(batch, rows):
  """Returns evenly spaced rows of a batch: the first ones would come from the first shards of the data alone."""
  return jax.tree.map(lambda x: x[np.arange(rows) * len(x) // rows], batch)


def _process():
  return order.Process(jax.process_index(), jax.process_count())
