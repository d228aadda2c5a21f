"""What tests of whole runs share: a small dataset, an encoder that takes milliseconds, the commands
called in process.
"""

import csv
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

import common
import engine
import lora
import models
from encoders.table import Encoder

HERE = Path(__file__).resolve().parent
TINY = Encoder("tiny", "", "MIT", 0, dim=32, depth=2, heads=2, patch=32, hidden=64, layerscale=True)
WIDE = Encoder(
    "wide", "", "MIT", 0, dim=256, depth=2, heads=4, patch=32, hidden=64, layerscale=True
)
for row in (TINY, WIDE):
    models.ENCODERS.setdefault(row.name, row)


def dataset(folder, cases=10, per_case=6, seed=0, name="small"):
    """Patch CSV of 48 px images: mitotic figures are blue bars, look-alikes brown discs; easy, for
    a tiny encoder.
    """
    folder = Path(folder)
    (folder / "patches").mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    rows = []
    prefix = "case" if name == "small" else f"{name}-"  # other datasets have other cases
    y, x = np.mgrid[-24:24, -24:24]
    for case in range(cases):
        tint = rng.integers(-15, 16, 3)
        for k in range(per_case):
            label = k % 2
            shape = (np.abs(x) < 9) & (np.abs(y) < 18) if label else np.hypot(x, y) < 14
            colour = np.array([150, 90, 40]) if label else np.array([50, 90, 140])
            pixels = (
                np.array([215, 150, 200])
                + tint
                - colour * shape[..., None]
                + rng.normal(0, 8, (48, 48, 3))
            )
            path = f"patches/{case:02d}-{k}.png"
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / path)
            rows.append((path, label, f"{prefix}{case:02d}", "AB"[case % 2]))
    with open(folder / f"{name}.csv", "w", newline="") as file:
        csv.writer(file).writerows([("path", "label", "case", "domain"), *rows])
    return folder / f"{name}.csv"


def training_settings(method="lora", **changes):
    """engine's settings of a run that needs no dataset, at the defaults of train.py."""
    settings = dict(
        **dict(data="noise", model="tiny", method=method, frac=1.0, fold=0, domain=None, seed=0),
        **dict(by="case", val_frac=1.0, weights="random", pool=None, layer=None, fit="resize"),
        **dict(mpp=None, dtype="fp32", epochs=100, epoch_size=1280, batch_size=16, lr=1e-4),
        **dict(balance="annotation", random_share=0.25, jitter=0.0, stain_jitter=0.0),
        tissue=False,
    )
    if method != "lora":
        return engine.TrainingSettings(**settings | changes)
    settings |= dict(rank=16, alpha=16, dropout=0.1, targets=lora.TARGETS, dora=False, rslora=False)
    return engine.LoRASettings(**settings | changes)


def call(module, *args):
    """Run a script's main() in this process as its command would → exit status."""
    old = sys.argv
    sys.argv = [f"{module.__name__}.py", *map(str, args)]
    try:
        common.command(module.main)
    except SystemExit as stop:
        return stop.code
    finally:
        sys.argv = old


def torchrun(script):
    """The launcher, for `command`, of two processes that run a file."""
    words = (sys.executable, "-m", "torch.distributed.run", "--standalone")
    return (*words, "--nproc-per-node", "2", str(script))


def command(script, *args, wait=True, launcher=(), **environment):
    """The same in a process of its own, which knows the tiny encoder."""
    code = (
        f"import sys; sys.path[:0] = [{str(HERE.parent)!r}, {str(HERE)!r}]; import small, common, "
        f"{script} as script; "
        "common.command(script.main)"
    )
    start = launcher or (sys.executable, "-c", code)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    process = subprocess.Popen(
        [*start, *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    if not wait:
        return process
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err
