"""bench/gpu.sh and its table, with jobs that leave given figures instead of measuring."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PYTHON = """#!/usr/bin/env bash
echo "$*" >> "$FAKE/calls"
for word in "$@"; do
    case $word in *.json) cp "$FAKE/$(basename "$word")" "$word" 2> /dev/null ;; esac
done
case "$*" in
    *--begin*) echo '{{"device": "a card"}}' > "$2/machine.json" ;;
    *gpu_table.py*) exec {python} "$@" ;;
    *xdist*) exit 1 ;;
    *"-m pytest"*) echo "== 24 passed, 1 skipped in 3.00s ==" ;;
    *"$FAILS"*) echo first; echo "error: the last line"; echo; exit 2 ;;
    *"$WAITS"*) touch "$FAKE/waiting"; exec sleep 60 ;;
esac
"""
# In the place of timeout(1): notes the limit, and lets one job run out of its time.
TIMEOUT = """#!/usr/bin/env bash
echo "$3" >> "$FAKE/limits"
shift 3
case "$*" in *"$SLOW"*) exit 124 ;; esac
exec "$@"
"""


def cell(variant, batch=None, **figures):
    found = {"variant": variant, **figures}
    if batch is not None:
        found["batch"] = batch
    return found


def steps(ours, eager, compiled, **more):
    """Figures of bench/lora_step.py --alone, in ms per step of 16."""
    cells = [
        cell("peft bf16 autocast", 16, ms=eager, spread=0.1, gib=18.0, share=0.2),
        cell("ours bf16, engine", 16, ms=ours, spread=0.01, gib=9.0, share=0.4, graph=True),
        cell("peft bf16 autocast, blocks compiled", 16, ms=compiled, gib=16.0, share=0.3),
        cell("timm bf16 autocast, all trained", 16, ms=400, gib=30.0),
        cell("ours bf16 autocast, all trained, engine", 16, ms=200, gib=30.0),
    ]
    cells[1] |= more
    return {"cells": cells}


FIGURES = {
    "step-h-optimus-0": steps(80, 200, 120),
    "step-uni": steps(50, 100, 80),
    "step-lunit-s16": steps(10, 60, 20),
    "train": {"cells": [cell("slides", per_s=190), cell("store", per_s=170)]},
    "embeddings-h-optimus-0": {
        "batch": 128,
        "cells": [
            cell("timm bf16 autocast", per_s=600, share=0.5),
            cell("ours, models.predict", per_s=800, share=0.7),
            cell("timm bf16 autocast, blocks compiled", missing="no time left"),
        ],
    },
    "embeddings-uni": {
        "batch": 128,
        "cells": [
            cell("timm bf16 autocast", missing="timm is not installed"),
            cell("ours, models.predict", per_s=3000, share=0.7),
        ],
    },
    "onnx-h-optimus-0": {
        "cells": [
            cell("torch bf16", 1, per_s=84),
            cell("torch bf16", 64, per_s=740),
            cell("ONNX Runtime fp16", 1, per_s=134),
            cell("ONNX Runtime fp16", 64, per_s=581),
        ]
    },
    "onnx-uni": {
        "cells": [
            cell("ONNX Runtime fp16", missing="onnxruntime without CUDA"),
            cell("torch bf16", 1, per_s=154),
        ]
    },
    "classify": {"alone": 500, "slide": 480, "folder": 440},
    "hours": {
        "val_patches": 2000,
        "ours": 100,
        "ordinary": 310,
        "ours_on_all": 300,
        "ordinary_on_all": 450,
    },
}


@pytest.fixture
def gpu(tmp_path):
    """Function (arguments of gpu.sh, environment) → Popen."""
    fake = tmp_path / "fake"
    fake.mkdir()
    (tmp_path / "tmp").mkdir()
    for name, text in (("python", PYTHON.format(python=sys.executable)), ("timeout", TIMEOUT)):
        (fake / name).write_text(text)
        (fake / name).chmod(0o755)
    for name, figures in FIGURES.items():
        (fake / f"{name}.json").write_text(json.dumps(figures))

    def start(*arguments, **environment):
        environment = {"FAILS": "-none-", "WAITS": "-none-", "SLOW": "-none-", **environment}
        environment |= {"FAKE": str(fake), "PATH": f"{fake}:{os.environ['PATH']}"}
        environment |= {"PYTHON": str(fake / "python"), "TMPDIR": str(tmp_path / "tmp")}
        return subprocess.Popen(
            ["bash", ROOT / "bench/gpu.sh", *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )

    def run(*arguments, **environment):
        process = start(*arguments, **environment)
        out, err = process.communicate(timeout=120)
        return process.returncode, out, err

    run.start, run.folder = start, fake
    return run


def rows(table):
    """{first column: the other columns} of table.md."""
    lines = [line.strip("|").split("|") for line in table.splitlines() if line.startswith("| ")]
    return {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in lines}


def test_the_table_of_a_whole_run(gpu, tmp_path):
    status, out, err = gpu("--out", tmp_path / "out")
    assert status == 0, err
    assert list((tmp_path / "tmp").iterdir()) == []
    table = rows((tmp_path / "out" / "table.md").read_text())
    expected = {
        "GPU tests": ["24 passed", "", "", "", "", "", ""],
        "LoRA step, h-optimus-0, batch 16, ms": [
            *("80.0 ±1.0%", "200.0", "120.0", "2.50", "1.50", "≥ 2.3, ≥ 1.6", "**missed**"),
        ],
        "spread": ["±1.0%", "", "", "", "", "≤ ±3%", "met"],
        "LoRA step, uni, batch 16, ms": [
            *("50.0 ±1.0%", "100.0", "80.0", "2.00", "1.60", "≥ 3", "**missed**"),
        ],
        "LoRA step, lunit-s16, batch 16, ms": [
            *("10.0 ±1.0%", "60.0", "20.0", "6.00", "2.00", "≥ 5", "met"),
        ],
        # The bare step does 16 patches in 80 ms.
        "train.py, slides (eager: bare step), /s": [
            *("190.0", "200.0", "–", "0.95", "–", "≥ 0.9", "met"),
        ],
        "train.py, store (eager: bare step), /s": [
            *("170.0", "200.0", "–", "0.85", "–", "≥ 0.9", "**missed**"),
        ],
        "embeddings, h-optimus-0, batch 128, /s": [
            *("800.0", "600.0", "no time left", "1.33", "–", "≥ 1.3, ≥ 1.03", "?"),
        ],
        "embeddings, uni, batch 128, /s": [
            *("3,000", "timm is not installed", "–", "–", "–", "", ""),
        ],
        "export fp16, h-optimus-0, batch 1, /s": [
            *("134.0", "84.0", "–", "1.60", "–", "≥ 1.5", "met"),
        ],
        "export fp16, h-optimus-0, batch 64, /s": [
            *("581.0", "740.0", "–", "0.79", "–", "≥ 1", "**missed**"),
        ],
        "export fp16, uni, batch 1, /s": [
            "onnxruntime without CUDA",
            *("154.0", "–", "–", "–", "≥ 1.5", "?"),
        ],
        "grid, --val-patches 2000, GPU-hours": [
            *("100.0", "310.0", "–", "3.10", "–", "≥ 3", "met"),
        ],
        "grid, validated on all, GPU-hours": [
            *("300.0", "450.0", "–", "1.50", "–", "≥ 3", "**missed**"),
        ],
    }
    for name, cells in expected.items():
        assert table[name] == cells, name
    memory = re.search(r"peak GiB +9.00 +18.0 +16.0 +0.50 +0.56 +≤ 0.65 × eager +met", out)
    assert memory and "MISSED" in out and "a card" in out
    assert out.rstrip().endswith((tmp_path / "out" / "table.txt").read_text().rstrip())


def test_all_limits_together_are_eight_minutes(gpu):
    assert gpu()[0] == 0
    limits = [int(line) for line in (gpu.folder / "limits").read_text().split()]
    assert len(limits) == 11 and sum(limits) <= 480
    assert gpu("--stretch", 3)[0] == 0
    assert [int(n) for n in (gpu.folder / "limits").read_text().split()[11:]] == [
        3 * limit for limit in limits
    ]


def test_the_hours_get_the_rates_just_measured(gpu):
    assert gpu()[0] == 0
    (call,) = re.findall(r"gpu_hours.py .*", (gpu.folder / "calls").read_text())
    # 16 patches in 80 and 200 ms, end to end in 200 and 400 ms; embeddings per second
    assert "--lora 200.00 80.00 --full 80.00 40.00 --infer 800.00 600.00" in call


def test_a_job_that_fails_or_takes_too_long_stops_no_other(gpu, tmp_path):
    status, out, err = gpu("--out", tmp_path / "out", FAILS="model uni", SLOW="whole_run")
    assert status == 1
    assert "failed: step-uni: error: the last line" in out
    assert "failed: train: out of time after" in out
    assert "failed: onnx-uni: error: the last line" in out
    assert "first" in err  # the end of its output
    assert "grid, --val-patches 2000" in out and "LoRA step, lunit-s16" in out
    status, out, _ = gpu("--only", "step,train", "--out", tmp_path / "out")
    assert status == 1 and "step-uni" not in out and "failed: onnx-uni" in out


def test_tests_that_are_cut_off_count_until_then(gpu, tmp_path):
    assert gpu("--only", "tests", "--out", tmp_path / "out", SLOW="-m pytest")[0] == 1
    (tmp_path / "out" / "tests.log").write_text("bringing up nodes...\n.....s..F.. [ 45%]\n....E")
    command = [sys.executable, ROOT / "bench/gpu_table.py", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "13 passed, 2 failed until then" in done.stdout
    assert "failed: tests: out of time" in done.stdout


def test_a_missing_figure_fails_the_hours_alone(gpu, tmp_path):
    status, out, _ = gpu("--only", "hours")
    assert status == 1 and "failed: hours: needs the figure of ours bf16, engine" in out


def test_parts_are_repeated_into_a_folder_that_is_not_overwritten(gpu, tmp_path):
    out = tmp_path / "out"
    assert gpu("--only", "step", "--only", "embeddings", "--out", out)[0] == 0
    names = sorted(file.stem for file in out.glob("*.json"))
    steps = ["step-h-optimus-0", "step-lunit-s16", "step-uni"]
    assert names == ["embeddings-h-optimus-0", "embeddings-uni", "machine", *steps]
    status, _, err = gpu("--out", out)
    assert status == 2 and err.startswith("error: --out") and "--only" in err
    status, printed, _ = gpu("--only", "hours", "--out", out)
    assert status == 0 and "LoRA step" in printed and "grid" in printed


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--only", "steps"], "--only steps: choose among"),
        (["--only"], "--only needs a value"),
        (["--stretch", "0"], "--stretch 0"),
        (["--stretch", "1.5"], "--stretch 1.5"),
        (["--quick"], "--quick: no such flag"),
    ],
)
def test_wrong_flags_are_one_line(gpu, arguments, words):
    status, _, err = gpu(*arguments)
    assert status == 2 and err.startswith(f"error: {words}") and err.count("\n") == 1


def test_a_python_that_is_not_there_is_one_line():
    process = subprocess.run(
        ["bash", ROOT / "bench/gpu.sh"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHON": "/nowhere/python"},
    )
    assert process.returncode == 2 and process.stderr.count("\n") == 1
    assert "there is no /nowhere/python here" in process.stderr


def test_a_signal_ends_the_job_and_leaves_nothing(gpu, tmp_path):
    process = gpu.start("--only", "classify", WAITS="bench/classify.py")
    for _ in range(200):
        if (gpu.folder / "waiting").exists():
            break
        time.sleep(0.05)
    begun = time.monotonic()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 143 and time.monotonic() - begun < 20
    assert list((tmp_path / "tmp").iterdir()) == []


def test_without_a_gpu_the_command_says_so():
    done = subprocess.run(
        ["bash", ROOT / "bench/gpu.sh"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "-1"},
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: no GPU") and "--dry-run" in done.stderr
