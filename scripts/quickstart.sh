#!/usr/bin/env bash
# Sets up what is missing, then answers the first question: does BatchNorm help an MLP on real digits?
# Arguments go to the command at the end: --seeds=20, --out=runs/elsewhere, --help.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" "" # else it would get the arguments of this script
exec "$python" -m bnresearch study configs/studies/bn_vs_none.py --scale=quick --out=runs/quickstart "$@"
