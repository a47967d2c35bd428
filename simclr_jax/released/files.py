"""Reads weights from the reference's TF1 and TF2 files, under their TF1 names."""

import collections
import importlib.util
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from simclr_jax import errors

OBJECT_GRAPH = "_CHECKPOINTABLE_OBJECT_GRAPH"

# v2's pretraining keeps the averaged network under this scope; TensorFlow's own averages have this suffix.
EMA_SCOPE = "ema_model/"
EMA_SUFFIX = "/ExponentialMovingAverage"

# Patterns of variables that are not weights, by name in a TF1 checkpoint.
LEFT_OUT = {
  "optimizer slots": r".*/(Momentum|LARSOptimizer|Adam|Adam_1)|beta[12]_power",
  "step counters": r"global_step|save_counter|(.*/)?iter",
  "v2's memory of embeddings": r"memory(/.*)?",
}
# The same in a TF2 checkpoint, by key.
LEFT_OUT_KEYS = {
  "optimizer slots": r".*/\.OPTIMIZER_SLOT/.*|optimizer/.*",
  "step counters": r"(global_step|save_counter)/.*",
}

LEAVES = "kernel|bias|gamma|beta|moving_mean|moving_variance"


class Contents(NamedTuple):
  """The weights in a file."""

  path: str  # of the file that was read, without the suffix `.index`
  form: str  # `TF1 checkpoint`, `TF1 hub module`, `TF2 checkpoint` or `TF2 SavedModel`
  variables: dict[str, np.ndarray]  # f32, by TF1 name
  left_out: dict[str, int]  # number of variables of each kind that were not read
  notes: list[str]  # sentences on weights without moving averages


def read(source: str, *, ema: bool) -> Contents:
  """Returns the weights in a checkpoint or SavedModel of the reference, or (`ema`) the moving averages in their place.

  `source` is a checkpoint's prefix (`model.ckpt-250228`) or one of its files, or the folder of a checkpoint or of a
  SavedModel; local or gs://.
  UserError: there is no such file, it cannot be read, or it has no moving averages.
  """
  if importlib.util.find_spec("tensorflow") is None:
    raise errors.UserError(
      f"{source} is read by TensorFlow, which is not installed; install it (pip install tensorflow-cpu)."
    )
  import tensorflow as tf

  tf.config.set_visible_devices([], "GPU")  # the accelerators belong to JAX
  prefix, is_saved_model = _find(source, tf)
  reader = _checked(prefix, tf.train.load_checkpoint, prefix)
  keys = reader.get_variable_to_shape_map()
  is_tf2 = OBJECT_GRAPH in keys
  tensor = lambda key: _checked(prefix, reader.get_tensor, key)
  names, left_out = _tf2_names(tensor(OBJECT_GRAPH)) if is_tf2 else _weights_alone({k: k for k in keys}, LEFT_OUT)
  names, notes = _chosen(names, left_out, ema=ema)
  variables = {name: np.asarray(tensor(key), np.float32) for name, key in sorted(names.items())}
  tf1, tf2 = ("TF1 hub module", "TF2 SavedModel") if is_saved_model else ("TF1 checkpoint", "TF2 checkpoint")
  return Contents(prefix, tf2 if is_tf2 else tf1, variables, dict(left_out), notes)


def tf1_names(full_names: Mapping[str, str]) -> dict[str, str]:
  """Returns TF1 name -> value, given {name in the TF2 code: value}.

  The TF2 code nests the scopes of its layers (`resnet/block_group1/bottleneck_block/conv2d_fixed_padding_1/conv2d_1/
  kernel`) and calls batch norms with global statistics `sync_batch_normalization`. It numbers the layers of each class
  through the whole network in order of creation, as TF1 does: shortcuts come first in their block. Names of variables
  outside the network are returned unchanged.
  UserError: two variables get the same name.
  """
  scope = r"(?:.*/)?"
  layer = r"(?:sync_)?(conv2d|dense|batch_normalization)"
  encoder = re.compile(rf"{scope}resnet(?:_\d+)?/{scope}{layer}(?:_(\d+))?/({LEAVES})")
  projection = re.compile(rf"{scope}projection_head(?:_\d+)?/(n?l_\d+)/{scope}{layer}(?:_\d+)?/({LEAVES})")
  linear = re.compile(rf"{scope}head_supervised(?:_\d+)?/linear_layer/dense(?:_\d+)?/({LEAVES})")
  matches = {name: encoder.fullmatch(name) for name in full_names}
  # A process that built another network before continues its numbers.
  first = {}
  for match in filter(None, matches.values()):
    kind, number = match[1], int(match[2] or 0)
    first[kind] = min(number, first.get(kind, number))
  result, origin = {}, {}
  for name, value in full_names.items():
    renamed = name
    if match := matches[name]:
      kind = match[1]
      number = int(match[2] or 0) - first[kind]
      renamed = f"base_model/{kind}{f'_{number}' if number else ''}/{match[3]}"
    elif match := projection.fullmatch(name):
      renamed = f"head_contrastive/{match[1]}/{match[2]}/{match[3]}"
    elif match := linear.fullmatch(name):
      renamed = f"head_supervised/linear_layer/dense/{match[1]}"
    if renamed in result:
      raise errors.UserError(
        f'"{origin[renamed]}" and "{name}" are both {renamed} of the network; give a file with one network.'
      )
    result[renamed], origin[renamed] = value, name
  return result


def _find(source: str, tf: Any) -> tuple[str, bool]:
  """Returns the prefix of the checkpoint at or in `source`, and whether it belongs to a SavedModel."""
  files = tf.io.gfile
  path = source.rstrip("/")
  if files.isdir(path):
    if files.exists(f"{path}/saved_model.pb"):
      if not files.exists(f"{path}/variables/variables.index"):
        raise errors.UserError(f"{path} has a saved_model.pb but no variables/variables.index; is it complete?")
      return f"{path}/variables/variables", True
    found = sorted(name.removesuffix(".index") for name in files.listdir(path) if name.endswith(".index"))
    state = tf.train.get_checkpoint_state(path) if files.exists(f"{path}/checkpoint") else None
    # The path in the file `checkpoint` may be that of another machine; only its last part counts.
    latest = state.model_checkpoint_path.rpartition("/")[2] if state else ""
    if latest in found or len(found) == 1:
      return f"{path}/{latest if latest in found else found[0]}", False
    held = f"{len(found)} checkpoints ({', '.join(found[:3])})" if found else "no checkpoint"
    raise errors.UserError(
      f"{path} holds {held}; give a prefix, such as {path}/{found[0] if found else 'model.ckpt-0'}."
    )
  prefix = re.sub(r"\.(index|meta|data-\d+-of-\d+)$", "", path)
  if files.exists(f"{prefix}.index"):
    return prefix, False
  if files.exists(path):
    raise errors.UserError(f"{path} is no TensorFlow checkpoint, which has a file ending in .index; give its prefix.")
  raise errors.UserError(f"--source={source} does not exist, nor {prefix}.index; give a checkpoint or SavedModel.")


def _checked(prefix: str, call: Callable[[str], Any], argument: str) -> Any:
  """Returns call(argument); a UserError replaces TensorFlow's errors about incomplete checkpoints."""
  from tensorflow import errors as tf_errors

  try:
    return call(argument)
  except (tf_errors.OpError, IndexError) as error:  # IndexError: the file is truncated.
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    raise errors.UserError(f"{prefix} cannot be read as a checkpoint: {reason}; is it complete?") from error


def _tf2_names(object_graph: bytes) -> tuple[dict[str, str], collections.Counter]:
  """Returns TF1 name -> key in a TF2 checkpoint with this object graph, and counts of variables left out."""
  from tensorflow.core.protobuf import trackable_object_graph_pb2

  graph = trackable_object_graph_pb2.TrackableObjectGraph.FromString(object_graph)
  attributes = [a for node in graph.nodes for a in node.attributes if a.name == "VARIABLE_VALUE"]
  full_names = {a.checkpoint_key: a.full_name.removesuffix(":0") or a.checkpoint_key for a in attributes}
  full_names, left_out = _weights_alone(full_names, LEFT_OUT_KEYS)
  weights = {}
  for key, name in full_names.items():
    if name in weights:
      raise errors.UserError(f'two variables of {key} have the name "{name}"; give a file with one network.')
    weights[name] = key
  names, rest = _weights_alone(weights, LEFT_OUT)
  return tf1_names(names), left_out + rest


def _weights_alone(names, patterns) -> tuple[dict[str, str], collections.Counter]:
  """Returns the entries whose names may be those of weights, and the number of others by kind."""
  kinds = {name: next((kind for kind, p in patterns.items() if re.fullmatch(p, name)), "") for name in names}
  weights = {name: key for name, key in names.items() if not kinds[name]}
  return weights, collections.Counter(kind for kind in kinds.values() if kind)


def _chosen(names: Mapping[str, str], left_out: collections.Counter, *, ema: bool) -> tuple[dict[str, str], list[str]]:
  """Returns weight name -> key of the weight or of its moving average, and notes; counts the others in `left_out`.

  The linear head has no averages, because v2 averages only what is trained without labels; TensorFlow's own averages
  leave out BatchNorm's moving statistics as well.
  """
  plain, averages = {}, {}
  for name, key in names.items():
    weight = name.removeprefix(EMA_SCOPE).removesuffix(EMA_SUFFIX)
    (plain if weight == name else averages)[weight] = key
  if not ema:
    if averages:
      left_out["moving averages of weights (--ema takes these)"] = len(averages)
    return plain, []
  if not averages:
    raise errors.UserError("--ema asks for moving averages of the weights and there are none; leave --ema out.")
  left_out["weights that have a moving average"] = len(plain.keys() & averages.keys())
  averaged = {name.partition("/")[0] for name in averages}
  without = sorted(plain.keys() - averages.keys())
  inside = [name for name in without if name.partition("/")[0] in averaged]
  for name in inside:
    if not name.rpartition("/")[2].startswith("moving_"):
      raise errors.UserError(f'"{name}" has no moving average and others have; leave --ema out.')
  notes = [f"{len(inside)} moving statistics of BatchNorm have no averages: taken as they are"] * bool(inside)
  others = sorted({name.partition("/")[0] for name in without} - averaged)
  return {**plain, **averages}, notes + [f"{scope} has no moving averages: taken as it is" for scope in others]
