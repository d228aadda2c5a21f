#!/usr/bin/env bash
# From nothing to a scored slide, on synthetic tissue: dataset, probe, LoRA and end-to-end training
# on the same split, ONNX model, the candidates of an unseen image scored and drawn with the truth,
# report. `make demo` calls this. Two minutes on 2 cores; nothing is downloaded. What is finished is
# not repeated.
set -euo pipefail
cd "$(dirname "$0")/.."

runs=runs out=demo-out
# Wherever the caller's own datasets are: `make clean` looks for the demo's here.
export MITOSIS_ROOT=data
# 3% of the protocol's steps, so larger learning rates than its 1e-4: chosen on other seeds.
short=(--epochs "${EPOCHS:-6}" --epoch-size 640 --random-share 0)
lora=$runs/demo/demo-lora/frac1-fold0
mkdir -p "$out"

number=0 begun=0
say() {
    done_with
    number=$((number + 1)) begun=$SECONDS
    printf '\n== %d. %s\n' "$number" "$*"
}
done_with() { [ "$number" -eq 0 ] || printf '   %d s\n' "$((SECONDS - begun))"; }

say "the demo dataset (synthetic H&E, five domains)"
python -m demo.synthetic

say "linear probe"
python probe.py --data demo --runs $runs --resume

say "LoRA, on the same split by case"
python train.py --data demo --runs $runs --lora --resume "${short[@]}" --lr 2e-3

say "end-to-end training, on the same split"
python train.py --data demo --runs $runs --resume "${short[@]}" --lr 5e-4

say "the LoRA run as an ONNX model, checked against torch"
model=$out/model.onnx
if [ "$model" -nt "$lora/metrics.json" ]; then
    echo "$model: exists"
else
    python export.py $lora --out "$model"
fi

say "the model behind a detector: candidates of an unseen image scored, drawn with the truth"
scored=$out/scored.json
first="import json, sys; print(min(json.load(open(sys.argv[1]))['cases']['test']))"
case=$(python -c "$first" $lora/split.json)
if [ "$scored" -nt "$model" ]; then
    echo "$scored: exists"
else
    python classify.py "$model" --slide "data/demo/$case.tiff" --candidates data/demo/MIDOG.json \
        --out "$scored"
fi
python -m demo.picture "$scored" --annotations data/demo/MIDOG.json --out "$out/scored.png"

say "the table: balanced accuracy, F1 and AUROC on cases that no training has seen"
python evaluate.py $runs/demo --out "$out/report" --figure "$out/scored.png"
done_with

printf '\nDone in %d s. Open\n' "$SECONDS"
printf '    %s\n' "$out/report/index.html" "$out/scored.png" "$model"
