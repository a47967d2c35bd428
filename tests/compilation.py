"""How tests compile: environment variables that must be set before JAX is imported; conftest.py imports this first."""

import importlib.metadata
import os
import pathlib

# The fastest compilation, and XLA's default, of what costs most beside LLVM's optimisations: its emitters of fusions
# (newer versions have no others and end at a flag that they do not know), and to divide a program among threads, which
# costs more than it gains where two workers keep two cores busy.
FLAGS = {"xla_cpu_parallel_codegen_split_count": (1, 32)}
if tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 11):
  FLAGS["xla_cpu_use_fusion_emitters"] = (False, True)

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
# Many tests compile the same small networks, in many processes. The folder is git-ignored; child processes and later
# runs of the suite find it too.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{pathlib.Path(__file__).parents[1]}/.pytest_cache/compiled")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "true"
_flags = [os.environ.get("XLA_FLAGS", ""), *(f"--{name}={str(fast).lower()}" for name, (fast, _) in FLAGS.items())]
os.environ["XLA_FLAGS"] = " ".join(_flags)


def as_usual(options):
  """Returns the options of a compilation (of jaxlib) with XLA's defaults in place of FLAGS."""
  usual = [(name, default) for name, (_, default) in FLAGS.items()]
  options.env_option_overrides = [*options.env_option_overrides, *usual]
  return options
