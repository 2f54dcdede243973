#!/usr/bin/env bash
# One training run on all hosts of a Cloud TPU VM slice. The slice exists, and each host has the source installed in the
# folder `bnresearch` of its user's home: docs/kubernetes.md. Nothing is created, and nothing is deleted.
#
#   deploy/tpu_pod.sh NAME ZONE --config=FILE --workdir=DIR [--config.a.b=v ...]   # starts, and follows what is printed
#   deploy/tpu_pod.sh NAME ZONE stop                                               # all save and stop; the first goes on
#
# What follows the zone goes to `python -m bnresearch train`. The run does not end with the connection. In the environment:
# DRY_RUN=1 prints the command and runs nothing; FOLDER and PORT (of process 0) replace bnresearch and 12345.
set -euo pipefail

# ---- On each host

running() {
  # -ww: else an exported COLUMNS cuts what ps prints.
  [ -e tpu_pod.pid ] && ps -ww -o args= -p "$(cat tpu_pod.pid)" | grep -q "bnresearch train"
}

attribute() { # of this virtual machine
  curl --fail --silent --show-error --max-time 10 --header "Metadata-Flavor: Google" \
    "http://metadata.google.internal/computeMetadata/v1/instance/attributes/$1"
}

train() { # port, arguments of train
  local port=$1 process hosts
  shift
  if running; then
    echo "error: a run is going on in $PWD of this host; stop it first" >&2
    exit 2
  fi
  # What jax would look up, too; here the supervisors have to know it.
  process=$(attribute agent-worker-number)
  hosts=$(attribute worker-network-endpoints | tr , '\n' | sed 's/.*://') # each is ADDRESS or NAME:NUMBER:ADDRESS
  : >tpu_pod.log # what is followed has to be there
  setsid .venv/bin/python -m bnresearch train --progress=lines "$@" \
    --config.distributed.processes="$(wc -l <<<"$hosts" | tr -d ' ')" \
    --config.distributed.process="$process" \
    --config.distributed.coordinator="$(head -n 1 <<<"$hosts"):$port" >>tpu_pod.log 2>&1 </dev/null &
  echo $! >tpu_pod.pid
  tail --pid=$! --lines=+1 --follow tpu_pod.log
  wait $!
}

stop() {
  if running; then
    kill -TERM "$(cat tpu_pod.pid)"
    timeout 600 tail --pid="$(cat tpu_pod.pid)" --follow /dev/null
  fi
}

# ---- Here

if [ $# -lt 3 ]; then
  sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
name=$1 zone=$2
shift 2
if [ "$*" = stop ]; then
  call=(stop)
else
  call=(train "${PORT:-12345}" "$@")
fi
script="set -euo pipefail
$(declare -f running attribute train stop)
cd $(printf %q "${FOLDER:-bnresearch}")
$(printf '%q ' "${call[@]}")"
command=(gcloud compute tpus tpu-vm ssh "$name" "--zone=$zone" --worker=all "--command=bash -c $(printf %q "$script")")
if [ -n "${DRY_RUN:-}" ]; then
  printf '%q ' "${command[@]}"
  echo
else
  exec "${command[@]}"
fi
