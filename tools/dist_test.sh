#!/usr/bin/env bash
# Test on the GPUs of one host, or of several: then on each, with NNODES, NODE_RANK (from 0 on),
# MASTER_ADDR (the host with NODE_RANK=0) and PORT (29500 if not set) in the environment.
# Usage: tools/dist_test.sh CONFIG CHECKPOINT GPUS [arguments of tools/test.py]
set -euo pipefail
source "$(dirname "$0")/launch.sh"
need CONFIG CHECKPOINT GPUS -- "$@"
on_hosts "$3" "$here/test.py" "$1" "$2" "${@:4}"
