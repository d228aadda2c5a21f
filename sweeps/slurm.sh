#!/usr/bin/env bash
#SBATCH --job-name=mitfig
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=12
#SBATCH --mem=64G
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --output=slurm-%A_%a.log
# A sweep as a job array: each task is one line of the sweep's --list.
#
#     sweeps/slurm.sh sweeps/scaling.sh midog2022 uni virchow2
#
# AT_ONCE (default 8) tasks run side by side. Submit again after failures: finished runs are
# skipped. The probes of one model are one task; every other task is one run.
set -eu
if [ $# -lt 2 ] || [ ! -f "$1" ]; then
    echo "usage: sweeps/slurm.sh SWEEP.sh DATASET [MODEL …]" >&2
    exit 2
fi
mapfile -t commands < <(bash "$1" --list "${@:2}")
if [ ${#commands[@]} -eq 0 ]; then
    echo "error: $1 lists no commands" >&2
    exit 2
fi
if [ -z "${SLURM_ARRAY_TASK_ID:-}" ]; then
    exec sbatch --array="0-$((${#commands[@]} - 1))%${AT_ONCE:-8}" "$0" "$@"
fi
# Slurm starts in the folder of the submission. Without -r, read removes the quotes of --list.
IFS=' ' read -a words <<< "${commands[$SLURM_ARRAY_TASK_ID]}"
exec "${PYTHON:-python}" "${words[@]:1}"
