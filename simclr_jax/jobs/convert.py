"""convert: a checkpoint of google-research/simclr becomes one that every job here reads.

Needs --source=PATH and --workdir=DIR. PATH is a TF1 checkpoint (the prefix `model.ckpt-N`, or its folder), a hub
module, a TF2 checkpoint (`ckpt-N`) or the folder of a SavedModel; local or gs://. Depth, width, selective kernels and
heads are read from the variables; every one of them must be known and none may be missing. Give DIR to the other jobs
as --config.checkpoint.

  --ema                 the moving averages of v2's pretraining in place of the weights
  --classifier_layer=1  for v2's networks fine-tuned with 1 % and 10 % of the labels, whose classifier reads the first
                        layer of the projection head (-1: the last one); 0, the encoder's output, is the default
  --image_size=224      what goes into the config; the default is 224 pixels, 32 where the stem is that of CIFAR-10
"""

import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from simclr_jax import __main__ as command
from simclr_jax import errors, inference
from simclr_jax.hardware import sharding
from simclr_jax.jobs import setup
from simclr_jax.models import simclr
from simclr_jax.released import architecture
from simclr_jax.released import files as reference_files
from simclr_jax.released import names as reference
from simclr_jax.training import checkpoint, telemetry
from simclr_jax.training import state as state_lib

# With the small stem, by the number of classes; everything else was trained on ImageNet.
SMALL_DATA = {0: "cifar10", 10: "cifar10", 100: "cifar100"}


def run(workdir: str, *, source: str = "", ema: str = "", classifier_layer: str = "0", image_size: str = "") -> None:
  """Writes the network in `source` as `workdir/checkpoints/0`, and says what it is."""
  if not source:
    raise errors.UserError("convert has no --source; give a checkpoint or SavedModel of the reference.")
  if ema not in ("", "true"):
    raise errors.UserError(f"--ema={ema}; give --ema alone, or leave it out.")
  asked = setup.number("classifier_layer", classifier_layer, int, lambda x: x >= -1, "0, 1, ... or -1 for the last one")
  size = setup.number("image_size", image_size, int, lambda x: x > 0, "pixels") if image_size else 0
  contents = reference_files.read(source, ema=bool(ema))
  tree = from_reference(contents.variables)
  shapes = {name: np.shape(value) for name, value in contents.variables.items()}
  found = architecture.of(shapes)
  layer = _layer(asked, found)
  config = config_of(found, size)
  check(config, found, layer, shapes)
  checkpoint.claim_workdir(
    workdir,
    {**config.to_dict(), "convert": {"source": source, "weights": _checksum(contents.variables), "layer": layer}},
    "convert",
    free=("convert.source",),
  )
  # There is nothing to compute: one device of each process holds it.
  mesh = sharding.data_mesh(list({device.process_index: device for device in jax.devices()}.values()))
  state = state_lib.TrainState(np.zeros((), np.int32), tree["params"], tree["batch_stats"], opt_state=())
  checkpoints = checkpoint.Checkpoints(
    workdir, config.to_dict(), every_steps=0, keep=config.keep_checkpoints, classifier_layer=layer
  )
  checkpoints.save(jax.device_put(state, sharding.replicated(mesh)), 0)
  checkpoints.close()
  telemetry.log.info("%s", _report(contents, config, tree["params"], found, layer, workdir))


def from_reference(variables: Mapping[str, Any]) -> dict[str, Any]:
  """Returns `{"params": ..., "batch_stats": ...}` from arrays under the reference's TF1 names.

  Under each are the keys `encoder`, `projection_head` and `linear_head`, as far as variables of
  that part are given; depth, width, stem, selective kernels and number of projection layers are
  those of the variables. Arrays are passed on as they are, in their own type. Every name must
  belong to the network and every variable of a part that is there must be given.

  Args:
    variables: for example `{"base_model/conv2d/kernel": f32[7, 7, 3, 64], ...}`.
  """
  if not variables:
    raise errors.UserError("no variables came; give arrays under the reference's checkpoint names.")
  paths = reference.paths({name: np.shape(value) for name, value in variables.items()})
  for name in variables:
    if name not in paths:
      raise errors.UserError(
        f'unknown variable "{name}"; give weights and moving statistics alone, without optimizer '
        f"slots, averages and global_step{errors.nearest(name, paths.keys() - variables.keys())}"
      )
  for name in paths:
    if name not in variables:
      raise errors.UserError(f'"{name}" is missing from the variables of this network; add it.')
  flat = {path: variables[name] for name, path in paths.items()}
  return {"params": {}, "batch_stats": {}} | traverse_util.unflatten_dict(flat)


def config_of(found: architecture.Architecture, image_size: int):
  """Returns the base config with this network in it; what trained it (loss, optimizer, batch) no file says.

  Args:
    found: the network.
    image_size: pixels; 0 for what its stem is for.
  """
  config = command.load_config(str(command.ROOT / "configs" / "base.py"), {})
  config.model.update(found.encoder)
  config.head.layers = found.layers
  if found.layers:
    config.head.out_dim = found.dims[-1]
  config.head.online = bool(found.classes)
  small = found.encoder["small_images"]
  config.data.image_size = image_size or (32 if small else 224)
  config.data.name = SMALL_DATA.get(found.classes, "imagenet2012") if small else "imagenet2012"
  config.data.eval_split = "validation" if config.data.name == "imagenet2012" else "test"
  config.data.cache = config.data.name != "imagenet2012"
  return config


def check(config, found: architecture.Architecture, layer: int, shapes: Mapping[str, tuple[int, ...]]) -> None:
  """Raises a UserError that names the first variable whose shape is not that of the config's network."""
  encoder = inference.encoder_of(config.model)
  projection = setup.projection_head_of(config) if found.layers else None
  if found.classes:
    model = simclr.Classifier(encoder, setup.linear_head_of(config, found.classes), projection, layer)
  else:
    model = simclr.Representation(encoder, projection)
  images = jax.ShapeDtypeStruct((1, config.data.image_size, config.data.image_size, 3), jnp.float32)
  tree = jax.eval_shape(lambda images: model.init(jax.random.key(0), images, train=False), images)
  wanted = traverse_util.flatten_dict(tree)
  for name, path in reference.paths(shapes).items():
    if wanted[path].shape != shapes[name]:
      raise errors.UserError(
        f'"{name}" has shape {list(shapes[name])}, but {list(wanted[path].shape)} in {_described(found)}; '
        "these variables are no network of the reference."
      )


def _layer(asked: int, found: architecture.Architecture) -> int:
  """Returns the layer of the projection head that the linear head reads, counted from h = 0."""
  if asked and not found.classes:
    raise errors.UserError(f"--classifier_layer={asked}, but there is no linear head; leave it out.")
  if asked > found.layers:
    raise errors.UserError(f"--classifier_layer={asked}, but the projection head has {found.layers} layers.")
  layer = asked % (found.layers + 1)
  if found.classes and found.dims[layer] != found.classifier_dim:
    fitting = [str(number) for number, dim in enumerate(found.dims) if dim == found.classifier_dim]
    raise errors.UserError(
      f"the linear head reads {found.classifier_dim} numbers and layer {layer} gives {found.dims[layer]}; "
      + (f"give --classifier_layer={' or '.join(fitting)}." if fitting else f"of {list(found.dims)} none fits.")
    )
  return layer


def _checksum(variables: Mapping[str, np.ndarray]) -> str:
  total = 0
  for name in sorted(variables):
    total = zlib.crc32(np.ascontiguousarray(variables[name]), zlib.crc32(name.encode(), total))
  return f"{total:08x}"


def _described(found: architecture.Architecture) -> str:
  """Returns "ResNet-50, width 2, selective kernels 0.0625"."""
  keys = found.encoder
  parts = [f"ResNet-{keys['depth']}", f"width {keys['width']:g}"]
  parts += [f"selective kernels {keys['sk_ratio']:g}"] * bool(keys["sk_ratio"])
  parts += [f"squeeze-and-excite {keys['se_ratio']:g}"] * bool(keys["se_ratio"])
  parts += ["stem for small images"] * keys["small_images"]
  return ", ".join(parts)


def _report(contents, config, params, found, layer: int, workdir: str) -> str:
  rows = [("read", f"{contents.form} {contents.path}")]
  counts = {part: f"{state_lib.count(tree):,} parameters" for part, tree in params.items()}
  rows.append(("encoder", f"{_described(found)}: {counts['encoder']}; {config.data.image_size} pixels"))
  if found.layers:
    rows.append(("projection", f"{found.layers} layers to {found.dims[-1]}: {counts['projection_head']}"))
  if found.classes:
    reads = f"layer {layer} of the projection head" if layer else "the encoder"
    rows.append(("linear head", f"{found.classes} classes, reads {reads}: {counts['linear_head']}"))
  absent = [part for part in ("projection_head", "linear_head") if part not in params]
  rows += [("absent", ", ".join(absent))] * bool(absent)
  left_out = ", ".join(f"{count} {kind}" for kind, count in contents.left_out.items() if count)
  rows += [("left out", left_out)] * bool(left_out)
  rows += [("note", note) for note in contents.notes]
  rows.append(("written", f"{workdir}/checkpoints/0"))
  return "\n".join(f"convert: {title:<12}{text}" for title, text in rows)
