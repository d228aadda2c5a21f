# Sourced by the sweeps: `run` starts one command after the other, or prints them with --list.
#
# Every command skips what is finished and continues what was interrupted, so a sweep may be stopped
# anywhere and started again. A command that fails does not stop the others; it is tried once more
# at the end, and named if it fails again.
#
# Environment: RUNS (folder of runs), FRACS, FOLDS, DOMAINS, METHODS, PYTHON, FLAGS (more flags for
# train.py), MODEL_FLAGS (for train.py and probe.py, "--weights /models/uni --device cuda:1").

list= failed=()
if [ "${1:-}" = --list ]; then list=1; shift; fi
python=${PYTHON:-python} runs=${RUNS:-runs} folds=${FOLDS:-0 1 2 3 4}
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

# Of the jobs, not of a variable: the signal may come before the variable is set.
stop() {
    local running
    running=$(jobs -pr)
    [ -n "$running" ] && kill $running 2>/dev/null
    wait
    exit 143
}
trap stop INT TERM HUP

start() {
    "$python" "$@" &
    wait $!
}

run() {
    if [ -n "$list" ]; then
        printf 'python'
        printf ' %q' "$@"
        echo
        return
    fi
    start "$@" || failed+=("$(printf '%q ' "$@")")
}

finish() {
    [ -n "$list" ] && exit 0
    local line words
    local again=(${failed[@]+"${failed[@]}"})  # an empty array is unbound in old versions of bash
    failed=()
    for line in ${again[@]+"${again[@]}"}; do
        IFS=' ' read -a words <<< "$line"  # without -r: takes the quotes of %q away
        start "${words[@]}" || failed+=("$line")
    done
    for line in ${failed[@]+"${failed[@]}"}; do echo "failed: python $line" >&2; done
    [ ${#failed[@]} -eq 0 ]
}

lora_flag() { if [ "$1" = lora ]; then echo --lora; fi; }

# What the paper did with each model.
methods_of() {
    if [ -n "${METHODS:-}" ]; then echo "$METHODS"; return; fi
    case $1 in
        resnet50 | vit-h) echo "full probe" ;;
        vit-b) echo full ;;
        demo) echo "probe lora full" ;;
        *) echo "probe lora" ;;
    esac
}

paper_models="resnet50 vit-b vit-h phikon uni virchow virchow2 prov-gigapath h-optimus-0"
