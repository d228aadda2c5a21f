"""Does an exported model give torch's numbers? On every provider that runs here, for several batch
sizes.

    python -m onnx_model.parity MODEL.onnx FOLDER

is what export.py runs, in a process of its own, so that the memory of torch's model is free by
then; it prints the report as JSON. FOLDER holds patches.npy (uint8 [n, 224, 224, 3]),
probability.npy (torch's, in float32, with adapters unmerged) and labels.npy (0, 1; -1: unknown)."""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

import common
from onnx_model import session
from reporting.metrics import auroc

BATCHES = {1: 4, 2: 8, 7: 14, 64: None}  # batch size → patches that it is tried on; None: all
WANTED = {
    "fp32": "largest |Δp| ≤ 1e-5",
    "fp16": "largest |Δp| ≤ 5e-3",
    "int8": "AUROC not lower by more than 0.005",
}
LARGEST = {"fp32": 1e-5, "fp16": 5e-3}
AUROC_LOSS = 0.005


def measure(classifier, patches, probability, labels):
    """Rows of the report for one provider: {provider, batch, patches, largest, mean, changed,
    auroc_change}.

    patches uint8 [n, S, S, 3]; probability [n]: torch's; labels [n]: 0, 1, -1 unknown
    """
    rows = []
    values = as_input(classifier, patches)
    for batch, count in BATCHES.items():
        n = min(len(patches), count or len(patches))
        starts = range(0, n, batch)
        actual = np.concatenate([classifier(values[i : min(i + batch, n)]) for i in starts])
        expected = probability[:n]
        largest = mean = float("inf")
        if np.isfinite(actual).all():
            difference = np.abs(actual.astype(np.float64) - expected)
            largest, mean = float(difference.max()), float(difference.mean())
        auroc_change = None
        known = labels[:n] >= 0
        if count is None and len(set(labels[known].tolist())) == 2:
            before, after = (auroc(labels[known], p[known]) for p in (expected, actual))
            auroc_change = float(after - before)
        changed = (actual >= classifier.threshold) != (expected >= classifier.threshold)
        rows.append(
            {
                "provider": classifier.session.get_providers()[0],
                "batch": batch,
                "patches": n,
                "largest": largest,
                "mean": mean,
                "changed": int(changed.sum()),
                "auroc_change": auroc_change,
            }
        )
    return rows


def as_input(classifier, patches):
    """uint8 patches as this model takes them: as they are, or normalised floats."""
    if classifier.input == "uint8":
        return patches
    mean, std = (np.array(values, np.float64) for values in classifier.metadata["normalisation"])
    return np.ascontiguousarray(((patches / 255 - mean) / std).transpose(0, 3, 1, 2), np.float32)


def problems(rows, precision):
    """What in a report exceeds the tolerance of its precision, as texts."""
    texts = []
    for row in rows:
        place = f"{row['provider']}, batch {row['batch']}"
        loss = -(row["auroc_change"] or 0.0)
        if not np.isfinite(row["largest"]):
            texts.append(f"{place}: the probability is not a finite number")
        elif precision in LARGEST and row["largest"] > LARGEST[precision]:
            texts.append(
                f"{place}: probabilities differ by up to {row['largest']:.2e}, the tolerance is "
                f"{LARGEST[precision]:g}"
            )
        elif precision == "int8" and loss > AUROC_LOSS:
            texts.append(f"{place}: AUROC falls by {loss:.4f}, the tolerance is {AUROC_LOSS}")
    if precision == "int8" and all(row["auroc_change"] is None for row in rows):
        texts.append(
            "int8 is judged by its AUROC, and the patches are not of both classes; give --data "
            "with labels"
        )
    return texts


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", metavar="MODEL.onnx")
    parser.add_argument(
        "folder", metavar="FOLDER", help="with patches.npy, probability.npy and labels.npy"
    )
    parser.add_argument(
        "--quick", action="store_true", help="two patches on the CPU: is the file in order?"
    )
    args = parser.parse_args()
    patches, probability, labels = (
        np.load(Path(args.folder) / f"{name}.npy", mmap_mode="r", allow_pickle=False)
        for name in ("patches", "probability", "labels")
    )
    devices = ["cpu", "auto"]
    if args.quick:
        patches, probability, labels = patches[:2], probability[:2], labels[:2]
        devices = ["cpu"]
    rows = []
    for device in devices:
        classifier = session.Classifier(args.model, device, batch_size=max(BATCHES), warm_up=False)
        if rows and classifier.device == "cpu":
            continue
        rows += measure(classifier, patches, probability, labels)
        del classifier
    json.dump(rows, sys.stdout)


if __name__ == "__main__":
    common.command(main)
