#!/usr/bin/env bash
# What a GPU has to show, in at most 8 minutes: bench/gpu.sh
#
#   --only PART      some of the parts, by commas or several times: tests step train embeddings onnx
#                    classify hours (hours needs the figures of step and embeddings)
#   --out FOLDER     keeps figures (JSON), logs, table.txt and table.md there; with --only the
#                    figures of an earlier run in it stay and go into the table
#   --stretch N      N times the time limits, for a slower machine
#   --dry-run        all parts on the CPU, small networks and counts: finds what is broken; a few
#                    minutes on one core, and the figures mean nothing
#
# Environment: PYTHON (default: python), TMPDIR. Weights are random, nothing is downloaded.
#
# Every job is a process with a time limit of its own; one that fails leaves a line in the table, and
# the others go on. Exit status 1 if a job failed, 2 for a wrong flag; a goal that is missed is marked
# in the table alone.

usage() { sed -n '2,/^$/s/^# \{0,1\}//p' "$0"; }
wrong() { echo "error: $1 (bench/gpu.sh --help)" >&2; exit 2; }

parts="tests step train embeddings onnx classify hours"
only= out= stretch=1 dry=
while [ $# -gt 0 ]; do
    case $1 in
        --only | --out | --stretch)
            [ $# -ge 2 ] || wrong "$1 needs a value"
            case $1 in
                --only) only="$only ${2//,/ }" ;;
                --out) out=$2 ;;
                --stretch) stretch=$2 ;;
            esac
            shift 2 ;;
        --dry-run) dry=1; shift ;;
        -h | --help) usage; exit 0 ;;
        *) wrong "$1: no such flag" ;;
    esac
done
for part in $only; do
    case " $parts " in *" $part "*) ;; *) wrong "--only $part: choose among $parts" ;; esac
done
case $stretch in '' | 0* | *[!0-9]*) wrong "--stretch $stretch: give a whole number from 1" ;; esac

root=$(cd "$(dirname "$0")/.." && pwd) || exit 2
python=${PYTHON:-python}
command -v "$python" > /dev/null || wrong "there is no $python here: set PYTHON"
work=$(mktemp -d) || exit 2
running= demo=
cleanup() { rm -rf "$work"; }
stop() {
    [ -n "$running$demo" ] && kill $running $demo 2> /dev/null
    wait
    exit 143
}
trap cleanup EXIT
trap stop INT TERM HUP
if [ -z "$out" ]; then out="$work/out"; fi
mkdir -p "$out" "$work/tmp" || exit 2
out=$(cd "$out" && pwd)
if [ -z "$only" ] && ls "$out"/*.json > /dev/null 2>&1; then
    wrong "--out $out holds figures already: name another folder, or the parts to repeat by --only"
fi
cd "$root" || exit 2

unset MITOSIS_DATA MITOSIS_CACHE RANK WORLD_SIZE LOCAL_RANK
export HF_HUB_OFFLINE=1 TMPDIR="$work/tmp" MITOSIS_ROOT="$work/data"
# What is compiled serves all jobs, and nothing of it stays.
export TORCHINDUCTOR_CACHE_DIR="$work/inductor" TRITON_CACHE_DIR="$work/triton"
export XDG_CACHE_HOME="$work/cache" MPLCONFIGDIR="$work/cache" CUDA_CACHE_PATH="$work/cache"

wanted() { case " ${only:-$parts} " in *" $1 "*) return 0 ;; esac; return 1; }

# job NAME SECONDS WORD…: python WORD… with a time limit; its output goes to NAME.log, and if it
# fails, the reason to NAME.failed.
job() {
    local name=$1 limit=$(($2 * stretch)) status begun=$SECONDS
    shift 2
    rm -f "$out/$name.json" "$out/$name.failed"
    echo "$name (at most $limit s)" >&2
    timeout -k 5 "$limit" "$python" "$@" > "$out/$name.log" 2>&1 < /dev/null &
    running=$!
    wait $running
    status=$?
    running=
    if [ $status = 124 ] || [ $status = 137 ]; then
        echo "out of time after $((SECONDS - begun)) s" > "$out/$name.failed"
    elif [ $status != 0 ]; then
        grep -v '^[[:space:]]*$' "$out/$name.log" | tail -n 1 | cut -c 1-300 > "$out/$name.failed"
        [ -s "$out/$name.failed" ] || echo "exit status $status" > "$out/$name.failed"
    fi
    if [ -e "$out/$name.failed" ]; then
        echo "$name failed: $(cat "$out/$name.failed")" >&2
        tail -n 15 "$out/$name.log" >&2
    fi
}

# until_of SECONDS: after how many seconds a job of this limit begins no further measurement, so that
# what matters least is left out rather than cut off.
until_of() { echo $(($1 * stretch * 13 / 20)); }

device=cuda marks=gpu
models="h-optimus-0 uni lunit-s16"
step="--batch-size 16 64 --rounds 20 --seconds 4"
embeddings="--batch-size 128 --batches 4 --rounds 8 --seconds 4"
onnx="--batches 1 8 64 256 --rounds 20 20 20 --seconds 1.5"
train="--model h-optimus-0 --dtype bf16"
classify="--model uni --precision fp16 --candidates 2000"
hours="--val-patches 2000 --rounds 1"
if [ -n "$dry" ]; then
    export CUDA_VISIBLE_DEVICES=-1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    export TORCH_COMPILE_DISABLE=1
    device=cpu marks="not gpu and not slow" stretch=$((stretch * 10))
    step="--batch-size 1 2 --rounds 2 --dry-run"
    embeddings="--batch-size 2 --batches 2 --rounds 2 --dry-run"
    onnx="--quick --batches 1 64 --rounds 1 1 1 --threads 1"
    train="--model demo --compile off --dtype bf16 --batch-size 4 --epochs 2 --epoch-size 8"
    classify="--quick --precision fp16 --candidates 40 --threads 1"
fi

"$python" bench/gpu_table.py "$out" --begin --device $device || exit 2

# The demo's images, which classify reads: made while the tests run, which need not be quick.
if wanted classify; then
    "$python" data.py demo > "$out/demo.log" 2>&1 < /dev/null &
    demo=$!
fi
if wanted tests; then
    side_by_side=
    if [ -z "$dry" ] && "$python" -c "import xdist" 2> /dev/null; then side_by_side="-n 8"; fi
    job tests 55 -m pytest -q -m "$marks" $side_by_side -p no:cacheprovider tests/test_gpu.py
fi
if [ -n "$demo" ]; then
    wait $demo || echo "data.py demo failed: $(tail -n 1 "$out/demo.log")" >&2
    demo=
fi
if wanted step; then
    for model in $models; do
        case $model in
            h-optimus-0) limit=105 more=--full ;;
            uni) limit=35 more= ;;
            *) limit=30 more= ;;
        esac
        job step-$model $limit bench/lora_step.py --alone "$out/step-$model.json" --model $model \
            --device $device $step $more --until $(until_of $limit)
    done
fi
if wanted train; then
    job train 75 bench/whole_run.py "$out/train.json" --device $device $train
fi
if wanted embeddings; then
    for model in h-optimus-0 uni; do
        case $model in h-optimus-0) limit=40 ;; *) limit=20 ;; esac
        job embeddings-$model $limit bench/encode.py --embeddings "$out/embeddings-$model.json" \
            --model $model --device $device $embeddings --until $(until_of $limit)
    done
fi
if wanted onnx; then
    unset TORCH_COMPILE_DISABLE  # of the dry run: here it compiles in earnest
    for model in h-optimus-0 uni; do
        case $model in h-optimus-0) limit=40 ;; *) limit=20 ;; esac
        name=$model
        [ -n "$dry" ] && name=demo
        job onnx-$model $limit bench/onnx.py --json "$out/onnx-$model.json" --model $name \
            --device $device $onnx --until $(until_of $limit)
    done
fi
if wanted classify; then
    job classify 35 bench/classify.py --json "$out/classify.json" $classify
fi
if wanted hours; then
    rates=$("$python" bench/gpu_table.py "$out" --rates 2>&1)
    if [ $? = 0 ]; then
        job hours 25 bench/gpu_hours.py --json "$out/hours.json" --model h-optimus-0 \
            --device $device $rates $hours
    else
        rm -f "$out/hours.json"
        echo "${rates##*error: }" > "$out/hours.failed"
    fi
fi

"$python" bench/gpu_table.py "$out" || exit 1
! ls "$out"/*.failed > /dev/null 2>&1
