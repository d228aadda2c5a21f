#!/usr/bin/env bash
# Atypical against normal mitotic figures (AMi-Br): every method, each technique of the field on and
# off, five repeats and their means, tested on the authors' 826 held-out patches and on AtNorM-Br.
# From nothing to the table: the patches (217 MB) and the encoders' weights are fetched.
#
#     sweeps/amibr.sh                          DINOv2-S
#     sweeps/amibr.sh phikon hibou-b           other encoders
#     QUICK=1 sweeps/amibr.sh                  for 2 CPU cores: two repeats, the middle 64 px of the
#                                              patches at 112 px, a quarter of the work per patch
#     sweeps/amibr.sh --list                   prints the commands and runs none
#     python evaluate.py runs-amibr --grid sweeps/amibr.sh
#                                              what is done, failed and missing
#
# Without a network: MITOSIS_ROOT names the folder that holds amibr/, MODEL_FLAGS="--weights FILE"
# the weights. DATA, DATA_FLAGS and TESTS name other files of such patches.
#
# There are 50 training runs of 240 steps for each encoder (QUICK: 18). With DINOv2-S on 2 cores one
# takes a quarter of an hour (QUICK: two and a half minutes on one core); no GPU has run it yet.
#
# Environment beside that of grid.sh: QUICK, DATA, DATA_FLAGS, TESTS, REPORT (folder of the report),
# EPOCHS, EPOCH_SIZE (the length of the training runs).
#
# grid: --list prints the commands and runs none of them
set -u
RUNS=${RUNS:-runs-amibr}
[ -z "${QUICK:-}" ] || FOLDS=${FOLDS:-0 1}
. "$(dirname "$0")/grid.sh"

data=${DATA:-amibr}
common="${DATA_FLAGS:---split given} --fold $folds --test ${TESTS:-atnorm-br} --runs $runs --resume"
short="--epochs ${EPOCHS:-6} --epoch-size ${EPOCH_SIZE:-640} --val-frac 1"
techniques=(
    "--crop 64"
    "--loss focal"
    "--class-weight balanced"
    "--balance domain --name domains"
    "--weight-decay 0.05 --name decay"
    "--augment heavy"
    "--soft-labels"
)
if [ -n "${QUICK:-}" ]; then
    common+=" --crop 64 --size 112"
    techniques=("${techniques[@]:1}")
fi

# Whether all patches are there: AMi-Br and AtNorM-Br.
complete() {
    local root=${MITOSIS_ROOT:-data}/amibr
    [ -f "$root/AMI-BR.csv" ] || return
    [ "$(find "$root/AMi-Br" "$root/AtNorM-Br" -name '*.png' 2>/dev/null | wc -l)" -ge 4466 ]
}

if [ -z "$list" ] && [ -z "${DATA:-}" ] && ! complete; then
    start data.py --download amibr || exit
fi
for model in ${*:-dinov2-s}; do
    train() {
        run train.py --data "$data" --model "$model" "$@" $common $short ${FLAGS:-} ${MODEL_FLAGS:-}
    }
    for pool in cls patch-center; do
        run probe.py --data "$data" --model "$model" --pool $pool --probe uni l2 $common \
            ${MODEL_FLAGS:-}
        train --lora --pool $pool --lr 1e-3
    done
    run probe.py --data "$data" --model "$model" --pool patch-center --probe uni l2 \
        --class-weight balanced $common ${MODEL_FLAGS:-}
    train --pool cls --lr 1e-4
    for technique in "${techniques[@]}"; do
        train --lora --pool cls --lr 1e-3 $technique
    done
done
finish
status=$?
start evaluate.py "$runs" --ensemble --threshold-rule balanced --out "${REPORT:-report-amibr}" &&
    exit $status
