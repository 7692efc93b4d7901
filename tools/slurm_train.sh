#!/usr/bin/env bash
# Train on a Slurm cluster. Read if set: GPUS (of all nodes together, 8), NNODES, GPUS_PER_NODE (at
# most 8), CPUS_PER_TASK (5), PORT (29500) and SRUN_ARGS.
# Usage: tools/slurm_train.sh PARTITION JOB_NAME CONFIG WORK_DIR [arguments of tools/train.py]
set -euo pipefail
source "$(dirname "$0")/launch.sh"
need PARTITION JOB_NAME CONFIG WORK_DIR -- "$@"
on_slurm "$1" "$2" "$here/train.py" "$3" --work-dir "$4" "${@:5}"
