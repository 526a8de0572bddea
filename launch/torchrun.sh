#!/usr/bin/env bash
# One machine or several, started by hand or by a scheduler, with the same command on each:
#
#     NODES=2 NODE_RANK=0 HEAD=node0 launch/torchrun.sh pretrain base_224 --data.root /shared/data --out /shared/runs/base
#
# GPUS: processes on this machine (default: its number of GPUs, or 1). RESTARTS: how often all processes start
# again from the last checkpoint after one has died. JOIN_TIMEOUT: seconds that machines wait for each other.
# DRY=1 prints the command instead.
set -euo pipefail
NODES=${NODES:-1}
NODE_RANK=${NODE_RANK:-0}
HEAD=${HEAD:-localhost}
PORT=${PORT:-29500}
RESTARTS=${RESTARTS:-3}
GPUS=${GPUS:-$( (nvidia-smi --list-gpus 2>/dev/null || echo cpu) | wc -l)}
# Seconds between a stop signal and the moment when torchrun kills its processes. The last checkpoint must be
# written by then.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

command=(
  torchrun --nnodes "$NODES" --node-rank "$NODE_RANK" --nproc-per-node "$GPUS" --max-restarts "$RESTARTS"
  --rdzv-backend c10d --rdzv-endpoint "$HEAD:$PORT" --rdzv-id "${RUN_ID:-beit3}" --rdzv-conf "join_timeout=${JOIN_TIMEOUT:-3600}"
  -m beit3 train "$@"
)
if [ -n "${DRY:-}" ]; then
  printf '%q ' "${command[@]}" && echo
else
  exec "${command[@]}"
fi
