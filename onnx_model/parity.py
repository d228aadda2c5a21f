"""Does an exported model give torch's numbers? On every provider that runs here, for several batch
sizes.

    python -m onnx_model.parity MODEL.onnx FOLDER

is what export.py runs, in a process of its own, so that the memory of torch's model is free by
then; it prints the report as JSON. FOLDER holds patches.npy (uint8 [n, 224, 224, 3]), labels.npy
(0, 1; -1: unknown), and torch's output in float32, with adapters unmerged: probability.npy [n], or
of an encoder without a head embedding.npy [n, D]."""

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
    "probability": {
        "fp32": "largest |Δp| ≤ 1e-5",
        "fp16": "largest |Δp| ≤ 5e-3",
        "int8": "AUROC not lower by more than 0.005",
    },
    "embedding": {
        "fp32": "largest |Δe| ≤ 1e-4 |e|",
        "fp16": "largest |Δe| ≤ 2e-2 |e|",
    },
}
LARGEST = {
    "probability": {"fp32": 1e-5, "fp16": 5e-3},
    "embedding": {"fp32": 1e-4, "fp16": 2e-2},
}
AUROC_LOSS = 0.005


def measure(classifier, patches, expected, labels):
    """Rows of the report for one provider: {provider, batch, patches, largest, mean, changed,
    auroc_change}.

    patches uint8 [n, S, S, 3]; expected: torch's probabilities [n] or embeddings [n, D]; labels
    [n]: 0, 1, -1 unknown
    """
    rows = []
    output = "probability"
    if expected.ndim == 2:
        output = "embedding"
    values = as_input(classifier, patches)
    for batch, count in BATCHES.items():
        n = min(len(patches), count or len(patches))
        starts = range(0, n, batch)
        actual = np.concatenate([classifier(values[i : min(i + batch, n)], output) for i in starts])
        changed, auroc_change = 0, None
        if output == "probability":
            threshold = classifier.threshold
            changed = int(((actual >= threshold) != (expected[:n] >= threshold)).sum())
            if count is None:
                auroc_change = change_of_auroc(labels, expected, actual)
        largest, mean = differences(expected[:n], actual)
        rows.append(
            {
                "provider": classifier.session.get_providers()[0],
                "batch": batch,
                "patches": n,
                "largest": largest,
                "mean": mean,
                "changed": changed,
                "auroc_change": auroc_change,
            }
        )
    return rows


def differences(expected, actual):
    """Largest and mean difference: of probabilities [n], or of embeddings [n, D] relative to their
    lengths; infinite if one is not finite.
    """
    if not np.isfinite(actual).all():
        return float("inf"), float("inf")
    difference = np.abs(actual.astype(np.float64) - expected)
    if expected.ndim == 2:
        difference = np.linalg.norm(difference, axis=1)
        difference /= np.linalg.norm(expected, axis=1)
    return float(difference.max()), float(difference.mean())


def change_of_auroc(labels, before, after):
    """None unless both classes are known among the labels."""
    known = labels >= 0
    if len(np.unique(labels[known])) < 2:
        return None
    return float(auroc(labels[known], after[known]) - auroc(labels[known], before[known]))


def as_input(classifier, patches):
    """uint8 patches as this model takes them: as they are, or normalised floats."""
    if classifier.input == "uint8":
        return patches
    mean, std = (np.array(values, np.float64) for values in classifier.metadata["normalisation"])
    return np.ascontiguousarray(((patches / 255 - mean) / std).transpose(0, 3, 1, 2), np.float32)


def problems(rows, precision, output="probability"):
    """What in a report exceeds the tolerance of its precision, as texts."""
    texts = []
    largest = LARGEST[output].get(precision, float("inf"))
    for row in rows:
        place = f"{row['provider']}, batch {row['batch']}"
        loss = -(row["auroc_change"] or 0.0)
        if not np.isfinite(row["largest"]):
            texts.append(f"{place}: the {output} is not a finite number")
        elif row["largest"] > largest:
            texts.append(
                f"{place}: the {output} differs by up to {row['largest']:.2e}, the tolerance is "
                f"{largest:g}"
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
    parser.add_argument("folder", metavar="FOLDER", help="with the arrays to compare with")
    parser.add_argument(
        "--quick", action="store_true", help="two patches on the CPU: is the file in order?"
    )
    args = parser.parse_args()
    output = "probability"
    if (Path(args.folder) / "embedding.npy").exists():
        output = "embedding"
    patches, expected, labels = (
        np.load(Path(args.folder) / f"{name}.npy", mmap_mode="r", allow_pickle=False)
        for name in ("patches", output, "labels")
    )
    devices = ["cpu", "auto"]
    if args.quick:
        patches, expected, labels = patches[:2], expected[:2], labels[:2]
        devices = ["cpu"]
    rows = []
    for device in devices:
        classifier = session.Classifier(args.model, device, batch_size=max(BATCHES), warm_up=False)
        if rows and classifier.device == "cpu":
            continue
        rows += measure(classifier, patches, expected, labels)
        del classifier
    json.dump(rows, sys.stdout)


if __name__ == "__main__":
    common.command(main)
