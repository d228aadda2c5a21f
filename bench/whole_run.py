"""Patches per second of train.py as its log says, from slides and from the crop store.

    python bench/whole_run.py FILE [--model h-optimus-0] [--device cuda]

LoRA with random weights on eight synthetic slides in JPEG tiles, as bench/patches.py makes them.
The same run twice: its patches are read from the slides, and from the store of crops that `data.py
--cache` builds of them. Each command is a process of its own; the first pseudo-epoch, which
compiles, captures and fills caches, does not count. Figures go to FILE as JSON (bench/gpu.sh).
"""

import argparse
import csv
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "tests"), str(HERE)]

import patches as bench_patches  # bench/patches.py

import common
from common import UserError

SLIDES, SIDE, EACH = 8, 1536, 60  # px along a side; annotations on a slide


def write_table(path, annotations):
    with open(path, "w", newline="") as file:
        rows = zip(annotations.image, annotations.x, annotations.y, annotations.label)
        csv.writer(file).writerows([("filename", "x", "y", "label"), *rows])


def command(script, *words, **environment):
    """Run a command of this project; UserError with its last line if it fails."""
    done = subprocess.run(
        [sys.executable, HERE.parent / script, *map(str, words)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    if done.returncode:
        raise UserError(f"{script}: {(done.stderr or done.stdout).strip().splitlines()[-1]}")


def logged(runs):
    """Patches per second of each pseudo-epoch of the only run in a folder."""
    (log,) = runs.glob("*/*/*/log.csv")
    with open(log, newline="") as file:
        return [float(row["patches_per_s"]) for row in csv.DictReader(file)]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", metavar="FILE", help="takes the figures")
    parser.add_argument("--model", default="h-optimus-0", help="default: h-optimus-0")
    parser.add_argument("--device", default="auto", help="of train.py (default: auto)")
    parser.add_argument("--dtype", default="bf16", help="of train.py (default: bf16)")
    parser.add_argument(
        "--compile",
        default="on",
        help="of train.py (default: on, as long runs have it; this one is too short for auto)",
    )
    parser.add_argument("--batch-size", type=int, default=16, help="default: 16")
    parser.add_argument(
        "--epochs", type=int, default=3, help="pseudo-epochs, the first a warm-up (default: 3)"
    )
    parser.add_argument("--epoch-size", type=int, default=480, help="patches (default: 480)")
    args = parser.parse_args()
    if args.epochs < 2:
        raise UserError(f"--epochs {args.epochs}: give 2 or more; the first does not count")
    figures = {"model": args.model, "batch": args.batch_size, "cells": []}
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
        folder = Path(folder)
        annotations = bench_patches.synthetic(folder, SLIDES, SIDE, EACH)
        write_table(folder / "points.csv", annotations)
        data = folder / "points.csv", "--images", folder
        for source in ("slides", "store"):
            if source == "store":
                command("data.py", *data, "--cache")
            begun = time.perf_counter()
            command(
                "train.py",
                *("--data", *data),
                *("--model", args.model, "--weights", "random", "--lora", "--fold", 0),
                *("--device", args.device, "--dtype", args.dtype, "--runs", folder / source),
                *("--epochs", args.epochs, "--epoch-size", args.epoch_size),
                *("--batch-size", args.batch_size, "--compile", args.compile),
            )
            rates = logged(folder / source)
            figures["cells"].append(
                {
                    "variant": source,
                    "per_s": statistics.median(rates[1:]),
                    "epochs": rates,
                    "seconds": time.perf_counter() - begun,
                }
            )
            common.write_json(args.file, figures)
            print(figures["cells"][-1], flush=True)


if __name__ == "__main__":
    common.command(main)
