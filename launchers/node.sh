#!/bin/bash
# What srun starts on each node, once: accelerate with the ranks of this node.
#
#   srun ... launchers/node.sh RUN_DIR ATTEMPT worker|preflight MAIN_HOST PORT
#
# The node's rank is read here, inside the task: in the batch script it would be that of the first node for all.
#
# shellcheck disable=SC2154 # job.env sets: python, nodes, ranks_per_node, modules, interface, container_command
set -euo pipefail

run=$1 attempt=$2 what=$3 host=$4 port=$5
exec >>"$run/attempts/$attempt/node-$SLURM_PROCID.log" 2>&1
# shellcheck source=/dev/null
source "$run/job.env"

if ((${#modules[@]})); then
    set +u # these scripts are not ours
    # shellcheck source=/dev/null
    type module &>/dev/null || source /etc/profile
    for name in "${modules[@]}"; do module load "$name"; done
    set -u
fi
if [[ -n $interface ]]; then
    export NCCL_SOCKET_IFNAME=$interface GLOO_SOCKET_IFNAME=$interface
fi
threads=$((SLURM_CPUS_PER_TASK / ranks_per_node))
export OMP_NUM_THREADS=$((threads > 0 ? threads : 1)) DEEPSPEED_TIMEOUT=$timeout_minutes

# A launcher that cannot reach the main node waits ten minutes and names nobody; this takes a second.
if [[ $what == preflight ]] && ((nodes > 1)); then
    "${container_command[@]}" "$python" -m lrscale.stages preflight "$run" --meet "$host" "$port" \
        --node "$SLURMD_NODENAME" --index "$SLURM_PROCID" --nodes "$nodes"
fi

program=(lrscale.stages "$what" "$run")
[[ $what != worker ]] || program+=(--attempt "$attempt")
command=("$python" -m "${program[@]}")
if ((nodes * ranks_per_node > 1)); then
    # Said on the command line, because accelerate does not take them from its file.
    command=("$python" -m lrscale.parallel.agent --config_file "$run/accelerate.yaml"
        --machine_rank "$SLURM_PROCID" --main_process_ip "$host" --main_process_port "$port"
        --rdzv_backend static --same_network --max_restarts 0 --module "${program[@]}")
fi
# The command gets a SIGTERM as well; this shell stays, to write down how it ended.
trap : TERM
code=0
"${container_command[@]}" "${command[@]}" || code=$?
[[ $what != worker ]] || echo "$code" >"$run/attempts/$attempt/node-$SLURM_PROCID.code"
exit "$code"
