#!/usr/bin/env bash
# Train on the GPUs of one machine, or of several with NNODES, NODE_RANK, MASTER_ADDR and PORT set.
# Usage: tools/dist_train.sh CONFIG GPUS [arguments of tools/train.py]
set -euo pipefail
here=$(dirname "$0")
config=${1:?CONFIG is missing}
gpus=${2:?GPUS is missing}

PYTHONPATH="$here/..:${PYTHONPATH:-}" exec python -m torch.distributed.run \
    --nnodes "${NNODES:-1}" --node_rank "${NODE_RANK:-0}" --nproc_per_node "$gpus" \
    --master_addr "${MASTER_ADDR:-127.0.0.1}" --master_port "${PORT:-29500}" \
    "$here/train.py" "$config" --launcher pytorch "${@:3}"
