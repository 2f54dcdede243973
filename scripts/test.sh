#!/usr/bin/env bash
# Sets up what is missing, then all checks: ruff, mypy, pytest. Arguments go to pytest (-m "not slow", a file ...).
# COMPARE=1 in the environment also installs the libraries that the norms are compared with: torch, keras, equinox, haiku,
# and oneDNN for the kernels on CPUs.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" "test${COMPARE:+,compare,cpu}"
"$python" -m ruff check --quiet .
"$python" -m ruff format --check --quiet .
"$python" -m mypy
# Each process has eight fake devices and compiles for itself: more than four are not worth their memory.
exec "$python" -m pytest --numprocesses=auto --maxprocesses=4 --dist=loadgroup "$@" </dev/null
