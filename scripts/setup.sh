#!/bin/sh
# Creates .venv with the pinned requirements and this package; does nothing if that is up to date.
#
#   sh scripts/setup.sh [EXTRA]      EXTRA, from pyproject.toml: dev, tpu or cuda
#   PYTHON=/path/to/python3.12 sh scripts/setup.sh      selects the Python of a new .venv
#
# Python 3.11, 3.12 or 3.13. Uses uv if it is on PATH, else pip.
set -eu
cd "$(dirname "$0")/.."

extra=${1:-}
package=".${extra:+[$extra]}"
stamp=".venv/.installed${extra:+-$extra}"
uv=$(command -v uv || true)

say() { echo "setup: $*"; }
fail() { echo "setup: $*" >&2; exit 2; }
version() { "$1" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null; }

# Runs the command, because one that is found may not work: pyenv has shims for versions that are not activated.
fits() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1; }

# Debian and Ubuntu ship ensurepip in a separate package, python3-venv; uv does not need it.
can_make_venv() { [ -n "$uv" ] || "$1" -c 'import ensurepip, venv' 2>/dev/null; }

# Sets `python` to the first one that fits and can create a virtual environment.
find_python() {
  if [ -n "${PYTHON:-}" ]; then
    fits "$PYTHON" || fail "PYTHON=$PYTHON does not run or is not Python 3.11, 3.12 or 3.13; name one or unset it."
    set -- "$PYTHON"
  else
    set -- python3 python3.13 python3.12 python3.11 python
  fi
  fitting=
  for python in "$@"; do
    fits "$python" || continue
    if can_make_venv "$python"; then return; fi
    fitting=${fitting:-$python}
  done
  if [ -n "$uv" ] && python=$(uv python find --system '>=3.11,<3.14' 2>/dev/null); then return; fi
  if [ -n "$fitting" ]; then
    fail "$fitting ($(version "$fitting")) lacks the module venv; on Debian or Ubuntu:" \
      "apt-get install python$(version "$fitting" | cut -d. -f1,2)-venv."
  fi
  found=$(version python3) || found=missing
  fail "needs Python 3.11, 3.12 or 3.13, but python3 is $found; on Debian 12 or Ubuntu 24.04 and newer:" \
    "apt-get install python3-venv; elsewhere install one and set PYTHON=/path/to/it."
}

# Checks sys.prefix as well: in a partly deleted .venv, bin/python runs as the Python that .venv was made from, and the
# packages would be installed there, outside the project.
is_usable() {
  fits .venv/bin/python || return
  .venv/bin/python -c 'import os, sys; sys.exit(not os.path.samefile(sys.prefix, ".venv"))' || return
  [ -n "$uv" ] || .venv/bin/python -m pip --version >/dev/null 2>&1
}

pip_install() { .venv/bin/python -m pip --require-virtualenv --disable-pip-version-check --no-input install -qq "$@"; }

if ! is_usable; then
  find_python
  say "creating .venv with Python $(version "$python") ($(command -v "$python"))"
  rm -rf .venv
  if [ -n "$uv" ]; then uv venv --quiet --python "$python" .venv; else "$python" -m venv .venv; fi
  is_usable || fail "$python created a .venv that does not work; select another with PYTHON=/path/to/it."
fi

# The folder is part of the key because an editable installation refers to it.
key=$(cat requirements.txt constraints.txt pyproject.toml simclr_jax/version.py | cksum; pwd)
if [ "$(cat "$stamp" 2>/dev/null)" = "$key" ]; then
  say ".venv is up to date"
  exit
fi

say "installing $package with the pinned requirements into .venv, with ${uv:-pip}; a new .venv takes minutes and 3 GB"
if [ -n "$uv" ]; then
  uv pip install --quiet --python .venv/bin/python --constraint constraints.txt --editable "$package"
else
  # pip is upgraded first: the version that Debian 12 ships prints warnings when it builds a source package.
  pip_install pip==26.3 && pip_install --constraint constraints.txt --editable "$package"
fi || {
  say "the installation failed, see above; the same command tries again." >&2
  exit 1
}
echo "$key" >"$stamp"
say "done"
