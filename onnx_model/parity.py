"""Does an exported model give torch's numbers? On every provider that runs here, for several batch
sizes. No torch.

    python -m onnx_model.parity MODEL.onnx FOLDER      what export.py runs, in a process of its own,
    so that the memory of torch's
                                            model is free by then; prints the report as JSON

FOLDER holds patches.npy (uint8 [n, 224, 224, 3]), probability.npy (torch's, in float32, with
adapters unmerged) and labels.npy (0, 1; -1: unknown)."""

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


def measure(classifier, patches, probability, labels, threshold):
    """Rows of the report for one provider: {provider, batch, patches, largest, mean, changed,
    auroc_change}.
    """
    rows = []
    values = as_input(classifier, patches)
    for batch, count in BATCHES.items():
        n = min(len(patches), count or len(patches))
        got = np.concatenate(
            [classifier(values[i : min(i + batch, n)]) for i in range(0, n, batch)]
        )
        expected, known = probability[:n], labels[:n] >= 0
        difference = np.abs(got.astype(np.float64) - expected)
        change = None
        if count is None and len(set(labels[known].tolist())) == 2:
            change = float(auroc(labels[known], got[known]) - auroc(labels[known], expected[known]))
        rows.append(
            {
                "provider": classifier.session.get_providers()[0],
                "batch": batch,
                "patches": n,
                "largest": float(difference.max()) if np.isfinite(got).all() else float("inf"),
                "mean": float(difference.mean()) if np.isfinite(got).all() else float("inf"),
                "changed": int(((got >= threshold) != (expected >= threshold)).sum()),
                "auroc_change": change,
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
    found = []
    for row in rows:
        place = f"{row['provider']}, batch {row['batch']}"
        if not np.isfinite(row["largest"]):
            found.append(f"{place}: the probability is not a finite number")
        elif precision in LARGEST and row["largest"] > LARGEST[precision]:
            found.append(
                f"{place}: probabilities differ by up to {row['largest']:.2e}, "
                f"{LARGEST[precision]:g} is "
                "allowed"
            )
        elif (
            precision == "int8"
            and row["auroc_change"] is not None
            and row["auroc_change"] < -AUROC_LOSS
        ):
            found.append(
                f"{place}: AUROC falls by {-row['auroc_change']:.4f}, {AUROC_LOSS} is allowed"
            )
    if precision == "int8" and all(row["auroc_change"] is None for row in rows):
        found.append(
            "int8 is judged by its AUROC, and the patches are not of both classes; give --data "
            "with labels"
        )
    return found


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
    if args.quick:
        patches, probability, labels = patches[:2], probability[:2], labels[:2]
    rows = []
    for device in ("cpu",) if args.quick else ("cpu", "auto"):
        classifier = session.Classifier(args.model, device, batch_size=max(BATCHES), warm_up=False)
        if rows and classifier.device == "cpu":
            continue
        rows += measure(classifier, patches, probability, labels, classifier.threshold)
        del classifier
    json.dump(rows, sys.stdout)


if __name__ == "__main__":
    common.command(main)
