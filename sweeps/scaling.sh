#!/usr/bin/env bash
# Figures 2 and 3, Tables 3 and 4: models at 0.1, 1, 10 and 100% of the training data, five repeats.
#
#     sweeps/scaling.sh ccmct                       the paper's models
#     sweeps/scaling.sh midog2022 uni virchow2      two models
#     sweeps/scaling.sh --list midog2022 uni        prints the commands and runs none
#     python evaluate.py runs/ --grid "sweeps/scaling.sh midog2022 uni"
#                                                   what is done, failed and missing
#
# grid: --list prints the commands and runs none of them
set -u
. "$(dirname "$0")/grid.sh"
[ $# -ge 1 ] || { echo "usage: sweeps/scaling.sh [--list] DATASET [MODEL …]" >&2; exit 2; }
data=$1
shift

fracs=${FRACS:-0.001 0.01 0.1 1}
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
                    ${FLAGS:-} ${MODEL_FLAGS:-}
            done
        done
    done
done
finish
