#!/usr/bin/env bash
# Every table and figure of the report from the synthetic demo: five repeats of probe, LoRA and end-to-end at three
# fractions, of probe and LoRA across domains and with the split by annotation. A quarter of an hour on 2 cores. The
# trainings are far too short to be worth anything (10 steps): this shows that the machinery works.
#
#     sweeps/quick.sh [REPORT]       runs into $RUNS (default: runs-quick/), the report into REPORT (default: report/)
#
# grid: --list prints the commands and runs none of them
set -u
RUNS=${RUNS:-runs-quick}  # not runs/, where `make demo` has runs of these names with other settings
. "$(dirname "$0")/grid.sh"
model=${MODEL:-demo}
short="--epochs ${EPOCHS:-2} --epoch-size ${EPOCH_SIZE:-80} --val-frac 0.25"
fracs="--frac ${FRACS:-0.01 0.1 1}"

[ -n "$list" ] || start -m demo.synthetic || exit
for grid in "$fracs" "--domain ${DOMAINS:-A B C}" "--split annotation"; do
    run probe.py --data demo --model "$model" $grid --fold $folds --runs "$runs" --resume ${MODEL_FLAGS:-}
    run train.py --data demo --model "$model" --lora $grid --fold $folds --runs "$runs" --resume $short \
        ${FLAGS:-} ${MODEL_FLAGS:-}
done
run train.py --data demo --model "$model" $fracs --fold $folds --runs "$runs" --resume $short \
    ${FLAGS:-} ${MODEL_FLAGS:-}
finish
status=$?
start evaluate.py "$runs" --out "${1:-report}" && exit $status
