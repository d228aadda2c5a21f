#!/usr/bin/env bash
# Figure 4 and Table 5: models trained on one domain and tested on each, five repeats.
#
#     sweeps/cross_domain.sh midog2022                                    the paper's models, domains A to E
#     DOMAINS="A C" sweeps/cross_domain.sh midog2022 uni virchow2         these
#     sweeps/cross_domain.sh midogpp uni                                  its seven tumour types
#     DOMAINS="human melanoma;canine lung cancer" sweeps/cross_domain.sh midogpp uni     names with blanks end at a ";"
#     sweeps/cross_domain.sh --list midog2022 uni                         the commands, one a line; nothing is run
#
# grid: --list prints the commands and runs none of them
set -u
. "$(dirname "$0")/grid.sh"
[ $# -ge 1 ] || { echo "usage: sweeps/cross_domain.sh [--list] DATASET [MODEL …]" >&2; exit 2; }
data=$1
shift
every="A B C D E"
[ "$data" != midogpp ] || every="human breast cancer;canine lung cancer;canine lymphosarcoma;\
canine cutaneous mast cell tumor;human neuroendocrine tumor;canine soft tissue sarcoma;human melanoma"
every=${DOMAINS:-$every}
case $every in
    *";"*) IFS=';' read -ra domains <<< "${every//; /;}" ;;
    *) read -ra domains <<< "$every" ;;
esac

for model in ${*:-$paper_models}; do
    for method in $(methods_of "$model"); do
        if [ "$method" = probe ]; then
            run probe.py --data "$data" --model "$model" --domain "${domains[@]}" --fold $folds --runs "$runs" \
                --resume ${MODEL_FLAGS:-}
            continue
        fi
        for domain in "${domains[@]}"; do
            for fold in $folds; do
                run train.py --data "$data" --model "$model" $([ "$method" = lora ] && echo --lora) \
                    --domain "$domain" --fold "$fold" --runs "$runs" --resume ${FLAGS:-} ${MODEL_FLAGS:-}
            done
        done
    done
done
finish
