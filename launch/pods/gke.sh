#!/usr/bin/env bash
# A run on a TPU slice of a GKE cluster that has JobSet installed; to be called in the checkout, with kubectl set up.
#
#   bash launch/pods/gke.sh              starts it (kubectl apply); kubectl delete jobset NAME saves the step in hand and ends it
#   bash launch/pods/gke.sh show         shows what would be applied
set -euo pipefail

# ---- to be filled in: here and nowhere else ----
export NAME=flash
export IMAGE=us-docker.pkg.dev/my-project/dsv4/train:latest   # the checkout in its working folder, with jax[tpu] and its packages
export ACCELERATOR=tpu-v5p-slice TOPOLOGY=4x4x8               # of the node pool
export HOSTS=32 CHIPS=4                                       # VMs of that slice, and chips of each
export CLAIM=shared                                           # PersistentVolumeClaim, ReadWriteMany, mounted as /mnt/shared
export CONFIG=configs/pod_flash_4k.py WORKDIR=/mnt/shared/runs/flash DATA=/mnt/shared/data
export CRASHES=10                                             # after so many the run ends; preemptions do not count
# ------------------------------------------------

filled() {
  python3 -c 'import os, string, sys; print(string.Template(sys.stdin.read()).substitute(os.environ), end="")' \
    < "$(dirname "$0")/gke.yaml"
}

case "${1:-apply}" in
  apply) filled | kubectl apply -f - ;;
  show) filled ;;
  *) sed -n '2,5p' "$0" >&2; exit 2 ;;
esac
