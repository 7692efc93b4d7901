#!/usr/bin/env bash
# Test on a Slurm cluster. Read if set: GPUS (of all nodes together, 8), NNODES, GPUS_PER_NODE (at
# most 8), CPUS_PER_TASK (5), PORT (29500) and SRUN_ARGS.
# Usage: tools/slurm_test.sh PARTITION JOB_NAME CONFIG CHECKPOINT [arguments of tools/test.py]
set -euo pipefail
source "$(dirname "$0")/launch.sh"
need PARTITION JOB_NAME CONFIG CHECKPOINT -- "$@"
on_slurm "$1" "$2" "$here/test.py" "$3" "$4" "${@:5}"
