#!/usr/bin/env bash
# Figure 4 and Table 5: models trained on one domain and tested on each, five repeats.
#
#     sweeps/cross_domain.sh midog2022                  the paper's models, domains A to E
#     sweeps/cross_domain.sh midogpp uni                one model, the seven tumour types of MIDOG++
#     DOMAINS="A C" sweeps/cross_domain.sh midog2022 uni virchow2
#     DOMAINS="human melanoma;canine lung cancer" sweeps/cross_domain.sh midogpp uni
#                                                       separate names that hold blanks by ";"
#     sweeps/cross_domain.sh --list midog2022 uni       prints the commands and runs none
#
# Every pseudo-epoch is validated on the whole validation set, as the protocol says: that of a domain
# has a few hundred annotations. FLAGS="--val-patches 500" for more of them.
#
# grid: --list prints the commands and runs none of them
set -u
. "$(dirname "$0")/grid.sh"
[ $# -ge 1 ] || { echo "usage: sweeps/cross_domain.sh [--list] DATASET [MODEL …]" >&2; exit 2; }
data=$1
shift
every="A B C D E"
if [ "$data" = midogpp ]; then
    every="human breast cancer;canine lung cancer;canine lymphosarcoma"
    every+=";canine cutaneous mast cell tumor;human neuroendocrine tumor"
    every+=";canine soft tissue sarcoma;human melanoma"
fi
every=${DOMAINS:-$every}
case $every in
    *";"*) IFS=';' read -ra domains <<< "${every//; /;}" ;;
    *) read -ra domains <<< "$every" ;;
esac

for model in ${*:-$paper_models}; do
    for method in $(methods_of "$model"); do
        if [ "$method" = probe ]; then
            run probe.py --data "$data" --model "$model" --domain "${domains[@]}" --fold $folds \
                --runs "$runs" --resume ${MODEL_FLAGS:-}
            continue
        fi
        for domain in "${domains[@]}"; do
            for fold in $folds; do
                run train.py --data "$data" --model "$model" $(lora_flag "$method") \
                    --domain "$domain" --fold "$fold" --runs "$runs" --resume \
                    ${FLAGS:-} ${MODEL_FLAGS:-}
            done
        done
    done
done
finish
