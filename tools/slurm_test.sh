#!/usr/bin/env bash
# Test on a Slurm cluster; GPUS, GPUS_PER_NODE, CPUS_PER_TASK and SRUN_ARGS are read if set.
# Usage: tools/slurm_test.sh PARTITION JOB_NAME CONFIG CHECKPOINT [arguments of tools/test.py]
set -euo pipefail
here=$(dirname "$0")
partition=${1:?PARTITION is missing}
job=${2:?JOB_NAME is missing}
config=${3:?CONFIG is missing}
checkpoint=${4:?CHECKPOINT is missing}
gpus=${GPUS:-8}

# SRUN_ARGS is a list of words.
# shellcheck disable=SC2086
PYTHONPATH="$here/..:${PYTHONPATH:-}" exec srun -p "$partition" --job-name "$job" \
    --ntasks "$gpus" --ntasks-per-node "${GPUS_PER_NODE:-8}" --gres "gpu:${GPUS_PER_NODE:-8}" \
    --cpus-per-task "${CPUS_PER_TASK:-5}" --kill-on-bad-exit=1 ${SRUN_ARGS:-} \
    python -u "$here/test.py" "$config" "$checkpoint" --launcher slurm "${@:5}"
