#!/usr/bin/env bash
# Figures 2 and 3, Tables 3 and 4: models at 0.1, 1, 10 and 100% of the training data, five repeats.
#
#     sweeps/scaling.sh ccmct                       the paper's models
#     sweeps/scaling.sh midog2022 uni virchow2      two models
#     sweeps/scaling.sh --list midog2022 uni        prints the commands and runs none
#     python evaluate.py runs/ --grid "sweeps/scaling.sh midog2022 uni"
#                                                   what is done, failed and missing
#     VAL_PATCHES=all sweeps/scaling.sh ccmct       validated as the protocol says
#
# The protocol validates every pseudo-epoch on the whole validation set: 11,655 annotations of CCMCT
# a hundred times, where a run trains on 128,000 patches. The sweep validates on a fixed sample of
# VAL_PATCHES=2000 and the best three pseudo-epochs on everything, a fifth of the work; what it
# chooses may be another epoch. Its runs are named -val2000, so those of a sweep that was begun
# without it count, and are continued, with VAL_PATCHES=all.
#
# grid: --list prints the commands and runs none of them
set -u
. "$(dirname "$0")/grid.sh"
[ $# -ge 1 ] || { echo "usage: sweeps/scaling.sh [--list] DATASET [MODEL …]" >&2; exit 2; }
data=$1
shift

fracs=${FRACS:-0.001 0.01 0.1 1}
val_patches=${VAL_PATCHES:-2000}
sample=
[ "$val_patches" = all ] || sample="--val-patches $val_patches"
for model in ${*:-$paper_models}; do
    for method in $(methods_of "$model"); do
        if [ "$method" = probe ]; then  # all of them from one pass over the patches
            run probe.py --data "$data" --model "$model" --frac $fracs --fold $folds \
                --runs "$runs" --resume ${MODEL_FLAGS:-}
            continue
        fi
        for frac in $fracs; do
            for fold in $folds; do
                run train.py --data "$data" --model "$model" $(lora_flag "$method") \
                    --frac "$frac" --fold "$fold" --runs "$runs" --resume \
                    $sample ${FLAGS:-} ${MODEL_FLAGS:-}
            done
        done
    done
done
finish
