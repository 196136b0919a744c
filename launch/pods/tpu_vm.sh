#!/usr/bin/env bash
# A run on the VMs of a Cloud TPU slice, one process on each; to be called in the checkout, on a machine with gcloud.
#
#   bash launch/pods/tpu_vm.sh install   the checkout and its packages, on every VM
#   bash launch/pods/tpu_vm.sh train     starts the run, or goes on with it after a preemption
#   bash launch/pods/tpu_vm.sh log       what process 0 says
#   bash launch/pods/tpu_vm.sh stop      saves the step in hand and ends
set -euo pipefail

# ---- to be filled in: here and nowhere else ----
TPU=flash                        # the slice, as `gcloud compute tpus tpu-vm create` named it
PROJECT=my-project
ZONE=us-east5-a
CONFIG=configs/pod_flash_4k.py
WORKDIR=/mnt/shared/runs/flash   # a folder that all VMs share (Filestore or another NFS), mounted on each
SETTINGS=(data.path=/mnt/shared/data mesh.data=-1)
PYTHON=python3.11                # 3.11 or newer, on the VMs
CRASHES=10                       # after so many the run ends; preemptions do not count
# ------------------------------------------------

on() {  # on WORKER COMMAND
  gcloud compute tpus tpu-vm ssh "$TPU" --project="$PROJECT" --zone="$ZONE" --worker="$1" --command="$2"
}

case "${1:-}" in
  install)
    gcloud compute tpus tpu-vm scp --recurse "$PWD" "$TPU:dsv4" --project="$PROJECT" --zone="$ZONE" --worker=all
    on all "cd dsv4 && $PYTHON -m venv .venv && .venv/bin/pip install --quiet -e . 'jax[tpu]'" ;;
  train)
    command=(.venv/bin/python -u -m launch.train "--config=$CONFIG" "--workdir=$WORKDIR" --distributed
             "${SETTINGS[@]/#/--set=}")
    on all "cd dsv4 && rm -f run.stop && { setsid nohup bash launch/pods/again.sh $CRASHES run.stop \
      $(printf '%q ' "${command[@]}") >> run.log 2>&1 < /dev/null & echo \$! > run.pid; }" ;;
  log)
    on 0 "tail -n 50 -f dsv4/run.log" ;;
  stop)  # all of the session that `train` began; the processes agree on a last step
    on all "cd dsv4 && touch run.stop && pkill -TERM --session \$(cat run.pid) python" ;;
  *)
    sed -n '2,7p' "$0" >&2
    exit 2 ;;
esac
