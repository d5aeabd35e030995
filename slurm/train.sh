#!/bin/bash
#SBATCH --job-name=lrscale
#SBATCH --ntasks-per-node=1
#SBATCH --signal=B:USR2@600
#SBATCH --requeue
#SBATCH --open-mode=append
#
# One attempt at a run: starts launchers/node.sh on every node, asks the ranks to save when SLURM says that time is
# short, and puts the job back into the queue while that makes sense.
#
#   sbatch --nodes 2 --exclusive --gpus-per-node 8 slurm/train.sh RUN_DIR       what `lrscale launch` does (job.sh)
#   sbatch --nodes 2 --exclusive --gpus-per-node 8 slurm/train.sh RECIPE [OPTIONS of lrscale launch]
#
# Leaves in RUN_DIR/attempts/N: job.json, slurm.log, node-K.log, rankR.log, and end.json, which says how it ended.
#
# shellcheck disable=SC2154 # job.env sets: python, share, nodes, job_nodes, max_restarts, preflight, roles, container
set -uo pipefail

trap : USR2 # until there is a folder to say it in
unset CDPATH
restarts=${SLURM_RESTART_COUNT:-0}
seconds() { date +%s; }

# A value of this job by its name in `scontrol show job`; nothing where the controller is silent. Of a heterogeneous
# job that of its first component.
job_value() {
    timeout 10 scontrol --oneliner show job "$SLURM_JOB_ID" 2>/dev/null | head -n1 | grep -o " $1=[^ ]*" | cut -d= -f2
}

# --- The run directory: as given, or made from a recipe.
if [[ -f ${1:?usage: sbatch slurm/train.sh RUN_DIR, or a RECIPE with options of lrscale launch}/job.env ]]; then
    run=$(cd -- "$1" && pwd)
else
    python=$(command -v python || command -v python3)
    run=$("$python" -m lrscale launch "$@" --nodes "$SLURM_JOB_NUM_NODES" --in-job) || exit
    run=$(cd -- "$run" && pwd)
    ((restarts)) || printf '{"job_id": %d, "submitted": %d, "nodes": %d, "sbatch": null}\n' \
        "$SLURM_JOB_ID" "$(seconds)" "$SLURM_JOB_NUM_NODES" >>"$run/jobs.jsonl"
fi
# shellcheck source=/dev/null
source "$run/job.env" || exit

# --- The attempt's folder. Whose it is stands in it before anything else does: readers take others for starts by hand.
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
printf -v listed '"%s", ' "${hosts[@]}"
mkdir -p -- "$run/attempts" || exit
number=1
until mkdir -- "$run/attempts/$number" 2>/dev/null; do
    [[ -e $run/attempts/$number ]] || { echo "error: no room or no right to make $run/attempts/$number"; exit 4; }
    number=$((number + 1))
done
attempt=$run/attempts/$number
printf '{"job_id": %d, "restart_count": %d, "nodes": [%s], "started": %d}\n' \
    "$SLURM_JOB_ID" "$restarts" "${listed%, }" "$(seconds)" >"$attempt/.job.tmp" &&
    mv -f -- "$attempt/.job.tmp" "$attempt/job.json"
ln -sfn "$number" "$run/attempts/.tmp-latest" && mv -Tf -- "$run/attempts/.tmp-latest" "$run/attempts/latest"
exec >>"$attempt/slurm.log" 2>&1

# STATE REASON CODE: writes end.json and leaves.
finish() {
    record "$1" "$2"
    exit "$3"
}
record() {
    echo "$1: $2"
    printf '{"state": "%s", "reason": "%s", "ended": %d}\n' "$1" "${2//[\"\\]/}" "$(seconds)" >"$attempt/.end.tmp" &&
        mv -f -- "$attempt/.end.tmp" "$attempt/end.json"
}

# What has been saved so far, as one word: the same word twice means that nothing came of the time between.
saved() {
    (cd -- "$run" && grep -Hs . checkpoints/*/latest; ls -d checkpoints/*/done.json traces/part-* 2>/dev/null) | cksum
}

# REASON STATE-OTHERWISE: back into the queue, within the budget and only if this attempt has saved something.
requeue() {
    trap '' TERM # that is how SLURM ends this attempt of the job
    if grep -qsx stop "$attempt/drain"; then
        finish stopped "stopped on request, after: $1" 6
    elif ((restarts >= max_restarts)); then
        finish stopped "$1; not restarted, for it was $restarts times already (cluster.max_restarts)" 6
    elif [[ $(saved) == "$saved_before" ]]; then
        finish "$2" "$1; not restarted, for this attempt made no checkpoint" 6
    fi
    back_into_queue "$1"
}

# REASON: and next time without the nodes that a preflight has found unfit.
back_into_queue() {
    trap '' TERM
    record requeued "$1"
    for pause in 1 5 20 0; do # a controller that is busy or just being replaced is no reason to give up
        words=$(timeout 30 scontrol requeue "$SLURM_JOB_ID" 2>&1) && break
        echo "SLURM does not requeue: $words"
        ((pause)) || finish stopped "$1; SLURM refused to requeue it: ${words//$'\n'/ }" 5
        sleep "$pause"
    done
    exclude=$({ unfit; job_value ExcNodeList | grep -v null; } | paste -sd,)
    [[ -z $exclude ]] || timeout 30 scontrol update JobId="$SLURM_JOB_ID" ExcNodeList="$exclude"
    exit 0
}

unfit() { cut -d' ' -f1 "$run/bad_nodes.txt" 2>/dev/null | sort -u; }

# A preflight that blames single nodes, new ones, is no reason to give up while the partition has enough others.
after_preflight() {
    names=$(comm -13 <(echo "$unfit_before") <(unfit) | paste -sd' ')
    others=$(timeout 10 sinfo --noheader --Node --format=%N --partition="$SLURM_JOB_PARTITION" | sort -u | comm -23 - <(unfit) | wc -l)
    if [[ -z $names ]]; then
        finish failed "the preflight failed: node-0.log beside this file says what to do" 4
    elif ((others < SLURM_JOB_NUM_NODES)); then
        finish failed "the preflight found unfit: $names; partition $SLURM_JOB_PARTITION has only $others other nodes" 4
    elif ((restarts >= max_restarts)); then
        finish failed "the preflight found unfit: $names; not restarted, for it was $restarts times already" 4
    fi
    back_into_queue "the preflight found unfit: $names"
}

# SLURM ends the job: by scancel, at the time limit, or to take its nodes away (it puts it back into the queue itself).
told_to_end() {
    trap '' TERM
    now=$(job_value Restarts)
    [[ -z ${step:-} ]] || kill -TERM "$step" 2>/dev/null
    if ((${now:-0} > restarts)); then
        finish requeued "SLURM took the job off its nodes: one failed, was preempted, or somebody requeued the job" 0
    elif [[ $(job_value Reason) == TimeLimit ]] || ((ends && $(seconds) >= ends)); then
        requeue "the time limit came before the ranks had saved (raise cluster.drain_s)" stopped
    fi
    finish cancelled "cancelled by scancel or SIGTERM" 143
}

# shellcheck disable=SC2317 # called by trap
drain() {
    echo "asked to save and end"
    touch -- "$attempt/drain"
}

# PID: waits for it to end, whatever signals come meanwhile.
watch() {
    while wait "$1"; code=$?; ((code > 128)) && kill -0 "$1" 2>/dev/null; do :; done
    return "$code"
}

saved_before=$(saved)
echo "$SLURM_JOB_ID $saved_before" >"$attempt/began"
ends=$(date -d "$(job_value EndTime)" +%s 2>/dev/null || echo 0)
trap drain USR2
trap told_to_end TERM

# --- Whether there is anything to begin with.
if ((SLURM_JOB_NUM_NODES != job_nodes)); then
    finish failed "the job has $SLURM_JOB_NUM_NODES nodes, the run directory was made for $job_nodes: sbatch --nodes $job_nodes" 2
elif ((restarts > max_restarts)); then
    finish stopped "SLURM restarted the job $restarts times, more than cluster.max_restarts allows ($max_restarts)" 6
elif cmp -s "$attempt/began" "$run/attempts/$((number - 1))/began" && cmp -s "$attempt/began" "$run/attempts/$((number - 2))/began"; then
    finish stopped "the last two attempts made no checkpoint" 6
fi

# --- A port for the ranks to meet at: of this job and attempt, below what systems hand out by themselves, and free.
# This script runs on the first node, and so does the main rank.
port=$((20000 + (SLURM_JOB_ID + 100 * restarts) % 10000))
for _ in {1..100}; do
    python3 -c "import socket; socket.socket().bind(('', $port))" 2>/dev/null && break
    port=$((20000 + (port - 20000 + 1) % 10000))
done

# --- The ranks: one task a node, which starts those of its node.
export SLURM_EXPORT_ENV=ALL LRSCALE_RUN_DIR=$run LRSCALE_ATTEMPT=$number
cpus=${SLURM_CPUS_PER_TASK:-$SLURM_CPUS_ON_NODE}
train=(srun --kill-on-bad-exit=1 --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --cpus-per-task="$cpus"
    "${container_flags[@]}" bash "$share/launchers/node.sh" "$run" "$number")
echo "job $SLURM_JOB_ID, attempt $number on ${hosts[*]}, port $port"
if ((preflight)); then
    unfit_before=$(unfit)
    "${train[@]}" preflight "${hosts[0]}" "$port" &
    step=$!
    if ! watch "$step"; then
        [[ $(job_value JobState) == RUNNING ]] || told_to_end
        after_preflight
    fi
fi
if ((${#role_names[@]})); then
    bash "$share/slurm/split.sh" "$run" "$number" "${hosts[0]}" "$port" &
else
    "${train[@]}" worker "${hosts[0]}" "$port" &
fi
step=$!
watch "$step"
code=$?

# --- What became of it, by the marks that the ranks left.
state=$(job_value JobState)
[[ ${state:-RUNNING} == RUNNING ]] || told_to_end
# The nodes that were ended because of another one say 143; srun itself says whichever number is largest.
failed=$(grep -hvxE '0|130|143' "$attempt"/node-*.code 2>/dev/null | head -n1)
code=${failed:-$code}
dead_role=$(cat "$attempt/dead_role" 2>/dev/null)
if [[ -f $run/done.json ]]; then
    finish finished "done" 0
elif [[ -f $attempt/checkpointed ]] && grep -qsx stop "$attempt/drain"; then # lrscale stop
    finish stopped "saved and stopped on request; lrscale resume goes on" 0
elif [[ -f $attempt/checkpointed ]]; then
    requeue "saved when time was short" stopped
elif [[ -n $dead_role ]]; then
    requeue "the role $dead_role ended: see role-$dead_role.log" failed
fi
case $code in
130 | 143) finish cancelled "the ranks were interrupted" 143 ;;
2 | 3 | 4 | 7) finish failed "the ranks refused to run (exit code $code): see rank0.log and node-0.log" "$code" ;;
75) finish failed "another worker is at this run" 75 ;;
*) requeue "a rank failed (exit code $code): see rank0.log and node-*.log" failed ;;
esac
