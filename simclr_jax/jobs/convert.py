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

import jax
import ml_collections
import numpy as np
from flax import traverse_util

from simclr_jax import config as config_lib
from simclr_jax import errors, network
from simclr_jax.hardware import sharding
from simclr_jax.models import simclr
from simclr_jax.released import architecture, files, names
from simclr_jax.training import checkpoint, telemetry
from simclr_jax.training import state as state_lib

# With the small stem, by the number of classes; everything else was trained on ImageNet.
SMALL_DATA = {0: "cifar10", 10: "cifar10", 100: "cifar100"}

# Arrays under the reference's TF1 names -> `{"params": ..., "batch_stats": ...}`.
from_reference = names.tree_of


def run(workdir: str, *, source: str = "", ema: bool = False, classifier_layer: int = 0, image_size: int = 0) -> None:
  """Writes the network in `source` as `workdir/checkpoints/0`, and says what it is."""
  if not source:
    raise errors.UserError("convert has no --source; give a checkpoint or SavedModel of the reference.")
  contents = files.read(source, ema=ema)
  tree = from_reference(contents.variables)
  shapes = {name: np.shape(value) for name, value in contents.variables.items()}
  found = architecture.of(shapes)
  layer = _layer(classifier_layer, found)
  config = config_of(found, image_size)
  check(config, found, layer, shapes)
  weights = {"source": source, "weights": _checksum(contents.variables), "layer": layer}
  config_lib.claim(workdir, {**config.to_dict(), "convert": weights}, "convert", free=("convert.source",))
  # Nothing is computed: one device of each process holds the arrays.
  mesh = sharding.data_mesh(list({device.process_index: device for device in jax.devices()}.values()))
  state = state_lib.TrainState(np.zeros((), np.int32), tree["params"], tree["batch_stats"], opt_state=())
  keys = {"every_steps": 0, "keep": config.keep_checkpoints, "classifier_layer": layer}
  checkpoints = checkpoint.Checkpoints(workdir, config.to_dict(), **keys)
  checkpoints.save(jax.device_put(state, sharding.replicated(mesh)), 0)
  checkpoints.close()
  telemetry.log.info("%s", _report(contents, config, tree["params"], found, layer, workdir))


def config_of(found: architecture.Architecture, image_size: int) -> ml_collections.ConfigDict:
  """Returns the default config with this network in it; what trained it (loss, optimizer, batch) no file says.

  `image_size` is in pixels; 0 takes what the network's stem is for.
  """
  config = config_lib.defaults()
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
  return config.lock()


def check(
  config: ml_collections.ConfigDict, found: architecture.Architecture, layer: int, shapes: Mapping[str, tuple[int, ...]]
) -> None:
  """Raises a UserError that names the first variable whose shape is not that of the config's network."""
  parts = network.Network(config)
  projection = parts.projection_head() if found.layers else None
  if found.classes:
    model = simclr.Classifier(parts.encoder(), parts.linear_head(found.classes), projection, layer)
  else:
    model = simclr.Representation(parts.encoder(), projection)
  mesh = sharding.data_mesh(jax.local_devices()[:1])
  params, batch_stats = state_lib.abstract_variables(model, config.data.image_size, mesh)
  wanted = traverse_util.flatten_dict({"params": params, "batch_stats": batch_stats})
  for name, path in names.paths(shapes).items():
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
