#!/bin/bash
# The trainer and other roles side by side in one job: train.sh starts it where the recipe has cluster.split.roles.
#
#   slurm/split.sh RUN_DIR ATTEMPT MAIN_HOST PORT
#
# The allocation is split by node index: the trainer has the first nodes, each role the next ones. (In a heterogeneous
# job each has a component of its own.) Every role is an srun of its own; the first one to end ends the others.
# Exit code: the trainer's; 6 if another role ended first, whose name is then in attempts/N/dead_role.
#
# shellcheck disable=SC2154 # job.env sets: share, nodes, roles, container
set -uo pipefail

run=$1 attempt=$2 host=$3 port=$4
# shellcheck source=/dev/null
source "$run/job.env" || exit
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")

# INDEX FIRST COUNT: where a role runs, as options of srun.
place() {
    local names=("${hosts[@]:$2:$3}") of_group=SLURM_CPUS_PER_TASK_HET_GROUP_$1
    local cpus=${!of_group:-${SLURM_CPUS_PER_TASK:-$SLURM_CPUS_ON_NODE}}
    where=(--nodes="$3" --ntasks="$3" --ntasks-per-node=1 --cpus-per-task="$cpus" --kill-on-bad-exit=1)
    if ((heterogeneous)); then
        where+=(--het-group="$1")
    else
        where+=(--nodelist="$(IFS=,; echo "${names[*]}")")
    fi
}

declare -A name_of
place 0 0 "$nodes"
srun "${where[@]}" "${container_flags[@]}" bash "$share/launchers/node.sh" "$run" "$attempt" worker "$host" "$port" &
name_of[$!]=train
first=$nodes
for index in "${!role_names[@]}"; do
    place $((index + 1)) "$first" "${role_nodes[index]}"
    srun "${where[@]}" bash -c "${role_commands[index]}" >>"$run/attempts/$attempt/role-${role_names[index]}.log" 2>&1 &
    name_of[$!]=${role_names[index]}
    first=$((first + role_nodes[index]))
done

stop_all() { kill -TERM "${!name_of[@]}" 2>/dev/null; }
trap 'stop_all; wait; exit 143' TERM
wait -n "${!name_of[@]}"
code=$?
for pid in "${!name_of[@]}"; do kill -0 "$pid" 2>/dev/null || ended=$pid; done
if [[ ${name_of[$ended]} != train ]]; then
    echo "the role ${name_of[$ended]} ended first (exit code $code): the job ends"
    echo "${name_of[$ended]}" >"$run/attempts/$attempt/dead_role"
    code=6
fi
unset "name_of[$ended]"
stop_all
wait
exit "$code"
