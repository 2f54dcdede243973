#!/usr/bin/env bash
# Sourced by the other scripts: `source scripts/setup.sh EXTRAS` ("" for none, "test,compare" for two) stands in the
# repository root afterwards and leaves the interpreter of an installed virtual environment in $python. What is
# installed already, stays.
# PYTHON=python3.12 in the environment chooses the interpreter, which then has a .venv of its own.

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

new_enough() {
  # An interpreter has to be run to be known: version managers leave names behind that only print an error.
  command -v "$1" >/dev/null 2>&1 && "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

find_python() {
  local candidate candidates=(python3 python3.14 python3.13 python3.12 python3.11 python)
  [ -n "${PYTHON:-}" ] && candidates=("$PYTHON")
  for candidate in "${candidates[@]}"; do
    if new_enough "$candidate"; then
      echo "$candidate"
      return
    fi
  done
  echo "No Python >= 3.11 found; tried: ${candidates[*]}" >&2
  echo "Install one, or name the one you have: PYTHON=/path/to/python3 $0" >&2
  return 2
}

install() { # base interpreter, environment folder, extra
  if ! "$2/bin/python" -m pip --version >/dev/null 2>&1; then
    echo "Making $2 with $("$1" --version)" >&2
    if ! "$1" -m venv --clear "$2" >&2; then
      echo "Python could not make a virtual environment. On Debian and Ubuntu: apt-get install python3-venv" >&2
      return 1
    fi
  fi
  echo "Installing the pinned packages of constraints.txt (once, a few minutes)" >&2
  local quiet=--quiet
  [ -t 2 ] && quiet=
  "$2/bin/python" -m pip install $quiet --disable-pip-version-check --constraint constraints.txt --editable ".${3:+[$3]}" >&2 </dev/null
}

setup() { # extra
  local base folder stamp now
  base=$(find_python) || return
  folder=.venv${PYTHON:+-$("$base" -c 'import sys; print("%d.%d" % sys.version_info[:2])')}
  # An environment does not survive a move of the repository, hence the path in what is compared.
  stamp=$folder/installed${1:+-$1}
  now=$(pwd; cat pyproject.toml constraints.txt)
  if [ "$(cat "$stamp" 2>/dev/null)" != "$now" ]; then
    install "$base" "$folder" "${1:-}" || return
    echo "$now" | tee "$folder/installed" >"$stamp" # an extra comes on top of the rest
  fi
  python=$PWD/$folder/bin/python
}

setup "${1:-}" || exit
