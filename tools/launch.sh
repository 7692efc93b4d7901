# What dist_train.sh, dist_test.sh, slurm_train.sh and slurm_test.sh have in common.

stop() {
    echo "$(basename "$0"): $1" >&2
    exit 2
}

# need NAME... -- ARGUMENT...: whether each name has an argument.
need() {
    local names=()
    while [ "$1" != -- ]; do
        names+=("$1")
        shift
    done
    shift
    [ $# -ge ${#names[@]} ] || stop "${names[$#]} is missing; usage: $0 ${names[*]} [more arguments]"
}

need_count() {
    [[ $2 =~ ^[1-9][0-9]*$ ]] || stop "$1 must be a number from 1 on, got '$2'"
}

# on_hosts GPUS SCRIPT ARGUMENT...: by torchrun, this host being one of NNODES.
on_hosts() {
    local gpus=$1 nodes=${NNODES:-1} rank=${NODE_RANK:-}
    need_count GPUS "$gpus"
    need_count NNODES "$nodes"
    if [ "$nodes" -gt 1 ]; then
        # Their defaults would let each host wait for others that wait for themselves.
        [[ $rank =~ ^[0-9]+$ ]] && [ "$rank" -lt "$nodes" ] ||
            stop "NNODES=$nodes needs NODE_RANK, another on each host from 0 to $((nodes - 1)), got '$rank'"
        [ -n "${MASTER_ADDR:-}" ] ||
            stop "NNODES=$nodes needs MASTER_ADDR, the address of the host with NODE_RANK=0"
    fi
    exec python -m torch.distributed.run \
        --nnodes "$nodes" --node_rank "${rank:-0}" --nproc_per_node "$gpus" \
        --master_addr "${MASTER_ADDR:-127.0.0.1}" --master_port "${PORT:-29500}" \
        "${@:2}" --launcher pytorch
}

# on_slurm PARTITION JOB_NAME SCRIPT ARGUMENT...: by srun, a task for each GPU.
on_slurm() {
    local gpus=${GPUS:-8} each=${GPUS_PER_NODE:-} nodes=${NNODES:-}
    need_count GPUS "$gpus"
    if [ -n "$nodes" ]; then
        need_count NNODES "$nodes"
        each=${each:-$((gpus / nodes))}
    fi
    each=${each:-$((gpus < 8 ? gpus : 8))}
    need_count GPUS_PER_NODE "$each"
    nodes=${nodes:-$((gpus / each))}
    [ $((nodes * each)) = "$gpus" ] ||
        stop "GPUS=$gpus must be NNODES times GPUS_PER_NODE, got NNODES=$nodes and GPUS_PER_NODE=$each"
    # MMEngine reads this name.
    export MASTER_PORT=${PORT:-${MASTER_PORT:-29500}}
    # SRUN_ARGS is a list of words.
    # shellcheck disable=SC2086
    exec srun -p "$1" --job-name "$2" --nodes "$nodes" --ntasks "$gpus" --ntasks-per-node "$each" \
        --gres "gpu:$each" --cpus-per-task "${CPUS_PER_TASK:-5}" --kill-on-bad-exit=1 ${SRUN_ARGS:-} \
        python -u "${@:3}" --launcher slurm
}

here=$(dirname "$0")
export PYTHONPATH="$here/..:${PYTHONPATH:-}"
