"""What the mean of several runs costs as one ONNX model, against one of them: size and speed.

    python bench/ensemble.py runs/demo/demo-lora/frac1-fold{0,1,2,3,4}

Both are exported first, which checks them against torch. Then they take turns batch by batch, so
that a machine that slows down slows both; medians are compared."""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:1] = [str(ROOT)]  # not this folder: its classify.py would hide the real one

import common
from onnx_model import session

BATCHES = 1, 8, 64


def exported(runs, out, args):
    """The model of one run or of the mean of several → Classifier."""
    command = [sys.executable, str(ROOT / "export.py"), *runs, "--out", str(out)]
    command += ["--precision", args.precision, "--external"]
    subprocess.run(command, check=True)
    return session.Classifier(out, args.device, batch_size=max(BATCHES), threads=args.threads)


def rates(classifiers, rounds):
    """Patches per second by batch size, {name: [numbers]}: the medians of turns."""
    random, found = np.random.default_rng(0), {name: [] for name in classifiers}
    for batch in BATCHES:
        size = next(iter(classifiers.values())).size
        patches = random.integers(0, 256, (batch, size, size, 3), np.uint8)
        seconds = {name: [] for name in classifiers}
        for _ in range(rounds + 1):
            for name, classifier in classifiers.items():
                start = time.perf_counter()
                classifier(patches)
                seconds[name].append(time.perf_counter() - start)
        for name, times in seconds.items():
            found[name].append(batch / statistics.median(times[1:]))  # the first warms up
    return found


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--precision", choices=("fp32", "fp16", "int8"), default="fp32")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count(), help="of the CPU (default: all)"
    )
    parser.add_argument("--rounds", type=int, default=9, help="turns per batch size (default: 9)")
    args = parser.parse_args()
    if len(args.runs) < 2:
        raise common.UserError("name at least two runs")
    with tempfile.TemporaryDirectory() as folder:
        names = "one", f"mean of {len(args.runs)}"
        files = [Path(folder) / f"{i}.onnx" for i in range(2)]
        models = {}
        for name, runs, out in zip(names, (args.runs[:1], args.runs), files):
            models[name] = exported(runs, out, args)
        measured = rates(models, args.rounds)
        rows = []
        for name, out in zip(names, files):
            size = out.stat().st_size + Path(f"{out}.data").stat().st_size
            parity = json.loads(out.with_suffix(".parity.json").read_text())["parity"]
            largest = max(row["largest"] for row in parity["measured"])
            row = [name, f"{size / 1e6:.1f}", *(f"{rate:.1f}" for rate in measured[name])]
            row += [f"{measured[name][-1] / measured['one'][-1]:.2f}", f"{largest:.1e}"]
            rows.append(row)
    header = ["model", "MB", *(f"patches/s at {batch}" for batch in BATCHES)]
    header += [f"× one at {BATCHES[-1]}", "largest |Δp|"]
    print(f"\n{args.precision}, {args.device}, {args.threads} threads")
    print(common.table(rows, header, range(1, len(header))))


if __name__ == "__main__":
    common.command(main)
