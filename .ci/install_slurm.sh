#!/usr/bin/env bash
# Installs SLURM and munge for the tests that start a cluster on this machine (tests/slurm_tools.py), where that is possible:
# as root, with apt-get. Without them these tests are skipped, so whatever goes wrong here is only told.
missing=
for command in slurmctld slurmd sbatch munged; do
  command -v "$command" >/dev/null || missing=1
done
[ -n "$missing" ] || exit 0
if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
  echo "SLURM is not installed: its tests are skipped" >&2
  exit 0
fi
log=$(mktemp)
install() {
  # Packages start their services where they can; the tests start their own.
  DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 timeout 300 \
    apt-get install --yes --quiet --no-install-recommends slurmctld slurmd slurm-client munge </dev/null >>"$log" 2>&1
}
if ! install; then
  timeout 300 apt-get update --quiet </dev/null >>"$log" 2>&1
  install || { echo "SLURM could not be installed: its tests are skipped. The last lines of apt-get:"; tail -5 "$log"; } >&2
fi
rm -f "$log"
exit 0
