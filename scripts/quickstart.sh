#!/usr/bin/env bash
# Sets up what is missing, then answers the first question: does BatchNorm help an MLP on real digits?
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" "" # else it would get the arguments of this script
exec "$python" -m bnresearch.quickstart "$@"
