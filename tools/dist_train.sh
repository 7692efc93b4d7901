#!/usr/bin/env bash
# Train on the GPUs of one host, or of several: then on each, with NNODES, NODE_RANK (from 0 on),
# MASTER_ADDR (the host with NODE_RANK=0) and PORT (29500 if not set) in the environment.
# Usage: tools/dist_train.sh CONFIG GPUS [arguments of tools/train.py]; GPUS are those of a host.
set -euo pipefail
source "$(dirname "$0")/launch.sh"
need CONFIG GPUS -- "$@"
on_hosts "$2" "$here/train.py" "$1" "${@:3}"
