#!/usr/bin/env bash
# Every table and figure of the report from the synthetic demo: five repeats of probe, LoRA and
# end-to-end training at three fractions, of probe and LoRA across domains and with the split by
# annotation. A quarter of an hour on 2 cores: the training runs are 160 steps, 2% of the protocol's,
# enough for the demo's small encoder.
#
#     sweeps/quick.sh [REPORT]       runs into $RUNS (default: runs-quick/), the report into REPORT
#                                    (default: report/)
#
# grid: --list prints the commands and runs none of them
set -u
RUNS=${RUNS:-runs-quick}  # not runs/, where `make demo` has runs of these names with other settings
. "$(dirname "$0")/grid.sh"
model=${MODEL:-demo}
short="--epochs ${EPOCHS:-4} --epoch-size ${EPOCH_SIZE:-640} --val-frac 0.5 --random-share 0"
fracs="--frac ${FRACS:-0.01 0.1 1}"

[ -n "$list" ] || start -m demo.synthetic || exit
for grid in "$fracs" "--domain ${DOMAINS:-A B C}" "--split annotation"; do
    run probe.py --data demo --model "$model" $grid --fold $folds --runs "$runs" --resume ${MODEL_FLAGS:-}
    run train.py --data demo --model "$model" --lora --lr 2e-3 $grid --fold $folds --runs "$runs" \
        --resume $short ${FLAGS:-} ${MODEL_FLAGS:-}
done
run train.py --data demo --model "$model" --lr 5e-4 $fracs --fold $folds --runs "$runs" --resume \
    $short ${FLAGS:-} ${MODEL_FLAGS:-}
finish
status=$?
start evaluate.py "$runs" --out "${1:-report}" && exit $status
