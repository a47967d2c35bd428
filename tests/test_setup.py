"""scripts/setup.sh against stubs of Python and uv: which Python it selects, what it installs, when it does nothing."""

import os
import pathlib
import shutil
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parents[1]
FILES = ("scripts/setup.sh", "requirements.txt", "constraints.txt", "pyproject.toml", "simclr_jax/version.py")
TOOLS = ("cat", "chmod", "cksum", "cp", "cut", "dirname", "mkdir", "rm", "sh")

# Answers the checks that setup.sh makes with `python -c` and records what else it runs. VERSION and FAILS (the words
# that make a command fail) are filled in.
PYTHON = """\
#!/bin/sh
for words in FAILS; do case "$*" in *$words*) exit 1 ;; esac; done
case $* in
  *"[:3]"*) echo VERSION ;;
  -c*) ;;
  "-m venv"*) mkdir -p .venv/bin; cp "$0" .venv/bin/python ;;
  *--version) ;;
  *) echo "${0##*/} $*" >>calls ;;
esac
"""
UV = """\
#!/bin/sh
echo "uv $*" >>calls
case $1 in
  venv) mkdir -p .venv/bin; cp "STUBS/python3" .venv/bin/python ;;
esac
"""


class Tree:
  """A copy of what setup.sh reads, and a PATH that holds only stubs and a few tools."""

  def __init__(self, folder: pathlib.Path):
    self.folder, self.stubs = folder / "tree", folder / "stubs"
    self.stubs.mkdir()
    for name in FILES:
      (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
      shutil.copy(ROOT / name, self.folder / name)
    for tool in TOOLS:
      (self.stubs / tool).symlink_to(shutil.which(tool))

  def stub(self, name: str, text: str) -> pathlib.Path:
    path = self.stubs / name
    path.write_text(text)
    path.chmod(0o755)
    return path

  def python(self, name: str = "python3", version: str = "3.12.1", fails: str = "") -> pathlib.Path:
    """Adds a stub of Python; commands that contain one of the words in `fails` exit with 1."""
    return self.stub(name, PYTHON.replace("VERSION", version).replace("FAILS", fails))

  def set_up(self, *args: str, **environment: str) -> tuple[int, str, str]:
    """Returns (exit code, output, errors) of setup.sh."""
    done = subprocess.run(
      ["sh", self.folder / "scripts" / "setup.sh", *args],
      env={"PATH": str(self.stubs), **environment},
      capture_output=True,
      text=True,
    )
    return done.returncode, done.stdout, done.stderr

  def calls(self) -> list[str]:
    path = self.folder / "calls"
    return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def tree(tmp_path):
  return Tree(tmp_path)


def test_setup_installs_once_and_again_when_a_requirement_changes(tree):
  tree.python()
  code, out, err = tree.set_up("dev")
  assert (code, err) == (0, "")
  assert "creating .venv with Python 3.12.1" in out
  upgrade, install = tree.calls()
  assert "install -qq pip==" in upgrade
  assert install.endswith("--constraint constraints.txt --editable .[dev]")
  assert tree.set_up("dev")[1] == "setup: .venv is up to date\n"
  assert len(tree.calls()) == 2
  with (tree.folder / "requirements.txt").open("a") as file:
    file.write("# changed\n")
  assert "installing .[dev]" in tree.set_up("dev")[1]
  assert len(tree.calls()) == 4


def test_setup_uses_uv_where_it_is_installed(tree):
  tree.python(fails="ensurepip pip")
  tree.stub("uv", UV.replace("STUBS", str(tree.stubs)))
  code, _, err = tree.set_up()
  assert (code, err) == (0, "")
  assert tree.calls() == [
    "uv venv --quiet --python python3 .venv",
    "uv pip install --quiet --python .venv/bin/python --constraint constraints.txt --editable .",
  ]


def test_setup_reports_a_failed_installation_and_tries_again(tree):
  tree.python(fails="--editable")
  code, _, err = tree.set_up()
  assert (code, err) == (1, "setup: the installation failed, see above; the same command tries again.\n")
  shutil.rmtree(tree.folder / ".venv")
  tree.python()
  assert tree.set_up()[0] == 0


def test_setup_selects_the_first_python_that_fits(tree):
  tree.python(version="3.10.4", fails="not")
  tree.python("python3.13", "3.13.0", fails="ensurepip")
  tree.python("python3.12")
  assert "with Python 3.12.1" in tree.set_up()[1]


def test_setup_names_what_is_missing(tree):
  code, _, err = tree.set_up(PYTHON=str(tree.stubs / "no-python"))
  assert code == 2
  assert "no-python does not run or is not Python 3.11, 3.12 or 3.13" in err
  code, _, err = tree.set_up()
  assert (code, "but python3 is missing" in err) == (2, True)
  tree.python(version="3.10.4", fails="not")
  code, _, err = tree.set_up()
  assert (code, "but python3 is 3.10.4" in err) == (2, True)
  tree.python(version="3.12.1", fails="ensurepip")
  code, _, err = tree.set_up()
  assert (code, err.count("\n")) == (2, 1)
  assert "lacks the module venv" in err
  assert "apt-get install python3.12-venv" in err


def test_setup_replaces_a_partly_deleted_environment(tree):
  tree.python()
  tree.set_up()
  broken = tree.folder / ".venv" / "bin" / "python"
  broken.write_text(tree.python("other", fails="samefile").read_text())
  left = tree.folder / ".venv" / "left"
  left.touch()
  assert "creating .venv" in tree.set_up()[1]
  assert not left.exists()
  tree.python(fails="samefile")
  os.remove(broken)
  code, _, err = tree.set_up()
  assert (code, "created a .venv that does not work" in err) == (2, True)
