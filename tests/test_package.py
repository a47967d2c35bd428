"""The sdist and the wheel: what they hold, and that the wheel works outside a checkout."""

import ast
import email
import json
import os
import pathlib
import subprocess
import sys
import tarfile
import zipfile

import pytest

from simclr_jax import version

ROOT = pathlib.Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.py"))

# Loads a bundled config, then lists all of them through the console script; the first line of the output is JSON.
SCRIPT = """
import importlib.metadata, json, sys
import simclr_jax
config = simclr_jax.load_config("cifar10:small", batch_size=64)
files = [getattr(module, "__file__", None) or "" for module in sys.modules.values()]
found = {"package": simclr_jax.__file__, "version": simclr_jax.__version__, "files": files}
found |= {"batch_size": config.batch_size, "depth": config.model.depth}
print(json.dumps(found), flush=True)
[script] = [point for point in importlib.metadata.distribution("simclr-jax").entry_points if point.name == "simclr-jax"]
sys.argv = ["simclr-jax", "configs"]
script.load()()
"""


def build(target: str, source: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
  """Builds an sdist or a wheel of `source` without downloads and returns the archive."""
  command = [sys.executable, "-m", "hatchling", "build", "--target", target, "--directory", str(folder)]
  subprocess.run(command, cwd=source, check=True, capture_output=True)
  [archive] = folder.iterdir()
  return archive


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
  """The wheel, built from the sdist."""
  pytest.importorskip("hatchling", reason="hatchling builds the package; the extra [dev] has it")
  folder = tmp_path_factory.mktemp("package")
  with tarfile.open(build("sdist", ROOT, folder / "sdist")) as sdist:
    sdist.extractall(folder / "source", filter="data")
  [source] = (folder / "source").iterdir()
  return build("wheel", source, folder / "wheel")


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
  """A folder for PYTHONPATH that holds the unpacked wheel."""
  folder = tmp_path_factory.mktemp("installed")
  zipfile.ZipFile(wheel).extractall(folder)
  return folder


def outside(installed: pathlib.Path, folder: pathlib.Path, *args: str) -> str:
  """Runs Python in `folder` with the unpacked wheel first on its path, and returns the output."""
  environment = {**os.environ, "PYTHONPATH": str(installed), "JAX_PLATFORMS": "cpu"}
  done = subprocess.run([sys.executable, *args], cwd=folder, env=environment, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  return done.stdout


def metadata(wheel: pathlib.Path) -> email.message.Message:
  with zipfile.ZipFile(wheel) as archive:
    [name] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
    return email.message_from_bytes(archive.read(name))


def test_the_wheel_holds_the_package_and_the_configs_and_nothing_else(wheel):
  names = zipfile.ZipFile(wheel).namelist()
  modules = [path.relative_to(ROOT).as_posix() for path in (ROOT / "simclr_jax").rglob("*.py")]
  configs = [f"simclr_jax/configs/{path.name}" for path in CONFIGS]
  assert sorted(name for name in names if ".dist-info/" not in name) == sorted(modules + configs)


def test_the_wheel_asks_for_what_requirements_txt_pins(wheel):
  lines = [line.partition("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
  normal = lambda text: text.replace("_", "-").replace("'", '"')
  wanted = sorted(normal(line) for line in lines if line)
  needed = metadata(wheel).get_all("Requires-Dist")
  assert sorted(normal(line) for line in needed if "extra ==" not in line) == wanted
  assert all("==" in line for line in wanted)


def test_every_place_states_the_same_version(wheel):
  assert metadata(wheel)["Version"] == version.__version__
  assert f"\nversion: {version.__version__}\n" in (ROOT / "CITATION.cff").read_text()
  assert f"\n## [{version.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.slow
def test_the_wheel_works_in_any_folder(installed, tmp_path):
  first, _, listing = outside(installed, tmp_path, "-c", SCRIPT).partition("\n")
  found = json.loads(first)
  assert found["package"] == str(installed / "simclr_jax" / "__init__.py")
  assert found["version"] == version.__version__
  assert (found["batch_size"], found["depth"]) == (64, 10)
  checkout = f"{ROOT}{os.sep}"
  packages = f"{ROOT / '.venv'}{os.sep}"
  assert [file for file in found["files"] if file.startswith(checkout) and not file.startswith(packages)] == []
  for path in CONFIGS:
    assert path.stem in listing
    assert ast.get_docstring(ast.parse(path.read_text())).splitlines()[0] in listing


@pytest.mark.slow
def test_a_bundled_config_is_found_by_name_on_the_command_line(installed, tmp_path):
  arguments = ["config", "--config=cifar10:small", "--config.batch_size=64"]
  lines = outside(installed, tmp_path, "-m", "simclr_jax", *arguments).splitlines()
  assert any("batch_size" in line and "64" in line for line in lines)
  assert list(tmp_path.iterdir()) == []
