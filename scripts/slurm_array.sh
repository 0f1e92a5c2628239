#!/usr/bin/env bash
# A Slurm array that makes one cache: a worker a task, preempted and requeued as the cluster likes.
#
#   sbatch scripts/slurm_array.sh --target Qwen/Qwen3-8B --data /shared/train.jsonl --out /shared/cache
#
# Every task takes its share of the shards, the last one to finish seals the cache. A task that is preempted or runs out
# of time gets SIGTERM, stops within 10 s with what it finished kept, and is put back into the queue; what a task that
# failed for good left undone is made by submitting the same line again, with any number of tasks. All tasks see the
# cache, the data and the target under the same paths, on a file system with flock across hosts.
#
#SBATCH --job-name=dflash-cache
#SBATCH --array=0-7
#SBATCH --gpus-per-task=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
# SIGTERM to this script (B:) two minutes before the time is up; a preemption sends it too.
#SBATCH --signal=B:TERM@120
#SBATCH --output=dflash-cache-%A_%a.log
set -u

stop() {
    # srun passes SIGTERM on to the task; dflash-cache ends with 143.
    kill -TERM "$worker" 2>/dev/null
}
trap stop TERM

srun --kill-on-bad-exit=1 ${DFLASH_COMMAND:-dflash-cache} extract "$@" &
worker=$!
# A trapped signal ends `wait` early: wait again for the worker's own code.
wait "$worker"
code=$?
while kill -0 "$worker" 2>/dev/null; do
    wait "$worker"
    code=$?
done

if [ "$code" -eq 143 ]; then
    echo "stopped by SIGTERM: back into the queue (restart ${SLURM_RESTART_COUNT:-0})" >&2
    scontrol requeue "${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}"
fi
exit "$code"
