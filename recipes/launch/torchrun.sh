#!/bin/bash
# One run on several machines without a batch queue: start this on each of them, with the same arguments.
#
#   HEAD=10.0.0.1 NODES=2 PER_NODE=4 bash torchrun.sh imagenet/petra_revnet50 stages=8 output=/shared/runs/first
#
# HEAD is the address of one of the machines, by which all others reach it; ADDRESS this machine's, where its name does
# not lead the others to it. A process that dies is started again with all others, at most RESTARTS times, and the run
# goes on from its last checkpoint: its directory must be one that all machines see.
set -eu

: "${HEAD:?the address of one of the machines}"
NODES=${NODES:-2}
PER_NODE=${PER_NODE:-1}
PORT=${PORT:-29500}
RESTARTS=${RESTARTS:-3}

exec torchrun \
    --nnodes "$NODES" \
    --nproc-per-node "$PER_NODE" \
    --rdzv-backend c10d \
    --rdzv-endpoint "$HEAD:$PORT" \
    --rdzv-id "${RUN_ID:-petra-zoo}" \
    ${ADDRESS:+--local-addr "$ADDRESS"} \
    --max-restarts "$RESTARTS" \
    -m petra_zoo train "$@"
