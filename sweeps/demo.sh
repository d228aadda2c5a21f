#!/usr/bin/env bash
# The whole way on synthetic tissue: dataset, probe, LoRA and end-to-end on held-out cases, table, ONNX model,
# candidates of a demo image scored and drawn. `make demo` calls this. Minutes on 2 cores; nothing is downloaded.
set -euo pipefail
cd "$(dirname "$0")/.."

runs=runs out=demo-out
export MITOSIS_ROOT=data  # wherever the caller's own datasets are: `make clean` looks for the demo's here
# 3% of the protocol's steps, so larger learning rates than its 1e-4.
short="--epochs ${EPOCHS:-6} --epoch-size 640 --val-frac 0.5"
mkdir -p "$out"

say() { printf '\n== %s\n' "$*"; }

say "1. the demo dataset (synthetic H&E, five domains)"
python -m demo.synthetic

say "2. linear probe, LoRA, end-to-end on the same split, by case"
python probe.py --data demo --runs $runs --resume
# shellcheck disable=SC2086
python train.py --data demo --runs $runs --lora --resume $short --lr 2e-3
# shellcheck disable=SC2086
python train.py --data demo --runs $runs --resume $short --lr 3e-4

say "3. what they score on cases that none of them has seen"
python evaluate.py $runs/demo --out "$out/report"

say "4. the LoRA run as an ONNX model, checked against torch"
python export.py $runs/demo/demo-lora/frac1-fold0 --out "$out/model.onnx"

say "5. the model behind a detector: candidates of one image scored"
image=$(python - <<'PY'
import data
annotations = data.load_dataset("data/demo")
split = data.make_split(annotations)
rows = [i for i, id in enumerate(annotations.id) if id in set(split.test)]
print(annotations.path(rows[0]))
PY
)
python classify.py "$out/model.onnx" --slide "$image" --candidates data/demo/MIDOG.json --out "$out/scored.json" \
    --overlay "$out/scored.png"

printf '\nThe report: %s/report/index.html    the figure: %s/scored.png    the model: %s/model.onnx\n' "$out" "$out" "$out"
