"""Does an exported model give torch's numbers? On every provider that runs here, for several batch
sizes.

    python -m onnx_model.parity MODEL.onnx FOLDER

is what export.py runs, in a process of its own, so that the memory of torch's model is free by
then; it prints the report as JSON. FOLDER holds patches.npy (uint8 [n, 224, 224, 3]), labels.npy
(0, 1; -1: unknown), and torch's output in float32, with adapters unmerged: probability.npy [n], or
of an encoder without a head embedding.npy [n, D]. For fp32 and fp16 also allowed.npy [n], how far
each of them may be from that, and for fp16, where torch ran on a GPU, half.npy, the output of torch
in float16 there.

What is required. Two sound programs that compute the same network differ by their rounding, and by
nothing else. The difference that this makes is

    |Δ logit|  or  |Δ embedding| / |embedding|   ≤   SAFETY · u · gain

u     what one layer loses, relative to its result. float16 rounds weights and results to 11 digits,
      u = 2^-11, and adds up in float32. float32 rounds them to 24 digits, but then the sums weigh
      more: adding up K terms rounds K partial sums, and these errors, each up to 2^-24 of a partial
      sum that grows like a random walk, come to 2^-24 √(K / 6) of the result. So
      u² = u(weights, results)² + (2^-24)² K / 6, K: the longest sum of the network.
gain  of the network: the output's change when every layer errs by one roundoff at random, in
      roundoffs. Depth, scale of the logits and what the network does to small changes are in it;
      encoders/rounding.py measures it. Logits are divided by the temperature, and so is the gain.
SAFETY  gain is a root mean square, of errors of one roundoff each, and the bound is for the worst
      of hundreds of patches. Measured on 36 random, adapted and trained networks of all families,
      largest |Δ| / (u · gain): ONNX Runtime on a CPU 0.06 to 2.3 in fp32, 0.1 to 1.6 in fp16;
      torch in true float16, all of it, 0.15 to 3.0. On an H200 two of them were refused by fixed
      tolerances: 1.2e-5 in fp32 (|Δp| up to 1.8e-5 is allowed to that network) and 5.2e-3 in fp16
      (3e-2). tests/test_gate.py measures it anew, and shows which errors in a network are found.

From logit to probability: the sigmoid of a logit that is off by the bound (a slope of at most 1/4),
and the float32 of the probability itself. On a GPU, float16 is also compared with torch's float16
there: the bound grows by what that loses against torch's float32, at most to twice. Of a network
that blows up rounding beyond TOO_MUCH no more than that is allowed.

So a decision may change only where the bound reaches the threshold. AUROC must not fall by more
than AUROC_LOSS (or one pair of patches, where a pair is more than that). int8 has no such bound: it
is judged by its AUROC alone."""

import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np

import common
from onnx_model import session
from reporting.metrics import auroc

BATCHES = {1: 4, 2: 8, 7: 14, 64: None}  # batch size → patches that it is tried on; None: all
ROUNDOFF = {"fp32": 2.0**-24, "fp16": 2.0**-11}
SAFETY = 4
TOO_MUCH = {"probability": 0.05, "embedding": 0.1}  # even where rounding explains more
LAST_DIGITS = 4 * 2.0**-24  # of a probability in float32, by different formulas of the sigmoid
AUROC_LOSS = 0.005


def bound(precision, gain, terms):
    """Largest difference that rounding explains: of logits, or of embeddings relative to their
    lengths; None for int8.

    gain   of the network, see encoders/rounding.py
    terms  of its longest sum
    """
    if precision not in ROUNDOFF:
        return None
    return SAFETY * gain * math.hypot(ROUNDOFF[precision], ROUNDOFF["fp32"] * math.sqrt(terms / 6))


def allowed_of_logits(logits, largest):
    """How far each probability may be off if its logit may by `largest`: [n] → [n]."""
    low, middle, high = (sigmoid(logits + step) for step in (-largest, 0, largest))
    allowed = np.maximum(middle - low, high - middle) + LAST_DIGITS
    return np.minimum(allowed, TOO_MUCH["probability"])


def allowed_of_embeddings(embeddings, largest):
    """How far each embedding may be off, relative to its length: [n, D] → [n]."""
    return np.full(len(embeddings), min(largest, TOO_MUCH["embedding"]))


def sigmoid(z):
    return 0.5 * (1 + np.tanh(np.asarray(z, np.float64) / 2))


def wanted(precision, output, allowed, half=None):
    """What is required of a model, as text. allowed: of each patch [n], None for int8; half: as for
    `measure`.
    """
    if allowed is None:
        return f"AUROC not lower by more than {AUROC_LOSS}"
    text = f"each |Δp| explained by rounding in {precision} (|Δp| ≤ {allowed.max():.1e}"
    if output == "embedding":
        text = f"each |Δe| / |e| explained by rounding in {precision} (≤ {allowed.max():.1e}"
    if half is not None:
        text += ", on a GPU up to twice that if torch loses as much"
    if output == "embedding":
        return text + ")"
    return text + f"), AUROC not lower by more than {AUROC_LOSS}"


def measure(classifier, patches, expected, labels, allowed=None, half=None):
    """Rows of the report for one provider: {provider, batch, patches, largest, mean, changed,
    auroc_change, pairs, allowed, used, torch}.

    patches   uint8 [n, S, S, 3]
    expected  torch's probabilities [n] or embeddings [n, D]
    labels    [n]: 0, 1, -1 unknown
    allowed   how far each may be off [n]; None: no bound
    half      expected, of torch in float16 on a GPU, or None; counts on a GPU

    allowed: the largest difference that may be; used: the largest share of what is allowed, over
    the patches; torch: the largest difference of `half`; pairs: of a positive and a negative patch.
    """
    rows, torch_loss = [], None
    output = "probability"
    if expected.ndim == 2:
        output = "embedding"
    if half is not None and classifier.device != "cpu":
        off = differences(expected, half)
        torch_loss = float(off.max())
        allowed = allowed * (1 + min(1.0, float((off / allowed).max())))
        allowed = np.minimum(allowed, TOO_MUCH[output])
    values = as_input(classifier, patches)
    for batch, count in BATCHES.items():
        n = min(len(patches), count or len(patches))
        starts = range(0, n, batch)
        actual = np.concatenate([classifier(values[i : min(i + batch, n)], output) for i in starts])
        off = differences(expected[:n], actual)
        row = {
            "provider": classifier.session.get_providers()[0],
            "batch": batch,
            "patches": n,
            "largest": float(off.max()),
            "mean": float(off.mean()),
            "changed": 0,
            "auroc_change": None,
            "pairs": int((labels[:n] == 1).sum() * (labels[:n] == 0).sum()),
            "allowed": None,
            "used": None,
            "torch": torch_loss,
        }
        if output == "probability":
            decided = (values >= classifier.threshold for values in (actual, expected[:n]))
            row["changed"] = int(np.not_equal(*decided).sum())
            if count is None and np.isfinite(off).all():
                row["auroc_change"] = change_of_auroc(labels, expected, actual)
        if allowed is not None:
            limit = allowed[:n]
            row |= {"allowed": float(limit.max()), "used": float((off / limit).max())}
        rows.append(row)
    return rows


def differences(expected, actual):
    """How far each is off [n]: of probabilities [n], or of embeddings [n, D] relative to their
    lengths; infinite if it is not finite.
    """
    difference = np.abs(actual.astype(np.float64) - expected)
    if expected.ndim == 2:
        difference = np.linalg.norm(difference, axis=1) / np.linalg.norm(expected, axis=1)
    return np.where(np.isfinite(difference), difference, np.inf)


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
    """What in a report is more than rounding explains, or too much of it, as texts."""
    texts = []
    for row in rows:
        place = f"{row['provider']}, batch {row['batch']}"
        if not np.isfinite(row["largest"]):
            texts.append(f"{place}: the {output} is not a finite number")
        elif row["used"] is not None and not row["used"] <= 1:
            texts.append(
                f"{place}: the {output} differs by up to {row['largest']:.2e}, {row['used']:.3g} "
                f"times what rounding in {precision} explains"
            )
        elif -(row["auroc_change"] or 0.0) > auroc_loss(row, precision):
            texts.append(
                f"{place}: AUROC falls by {-row['auroc_change']:.4f}, the tolerance is "
                f"{auroc_loss(row, precision):.3g}"
            )
    if precision == "int8" and all(row["auroc_change"] is None for row in rows):
        texts.append(
            "int8 is judged by its AUROC, and the patches are not of both classes; give --data "
            "with labels"
        )
    return texts


def unseen(rows, precision):
    """What these rows say nothing of, as text; None: they cover it all."""
    if precision == "fp16" and all(row["provider"] == "CPUExecutionProvider" for row in rows):
        return (
            "checked on a CPU, which computes float16 models in float32: an overflow of float16 "
            "would show on a GPU alone"
        )
    return None


def auroc_loss(row, precision):
    """How much AUROC may fall; where a bound holds, two patches may always change places."""
    if precision == "int8":
        return AUROC_LOSS
    return max(AUROC_LOSS, 1.001 / max(row["pairs"], 1))


def read_arrays(folder):
    """The arrays that export.py wrote, as arguments of `measure`."""
    output = "probability"
    if (folder / "embedding.npy").exists():
        output = "embedding"
    names = {"patches": "patches", "expected": output, "labels": "labels"}
    for optional in ("allowed", "half"):
        if (folder / f"{optional}.npy").exists():
            names[optional] = optional
    return {
        argument: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
        for argument, name in names.items()
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", metavar="MODEL.onnx")
    parser.add_argument("folder", metavar="FOLDER", help="with the arrays to compare with")
    parser.add_argument(
        "--quick", action="store_true", help="two patches on the CPU: is the file in order?"
    )
    args = parser.parse_args()
    arrays, devices = read_arrays(Path(args.folder)), ["cpu", "auto"]
    if args.quick:
        arrays = {name: array[:2] for name, array in arrays.items()}
        devices = ["cpu"]
    rows = []
    for device in devices:
        classifier = session.Classifier(args.model, device, batch_size=max(BATCHES), warm_up=False)
        if rows and classifier.device == "cpu":
            continue
        rows += measure(classifier, **arrays)
        del classifier
    json.dump(rows, sys.stdout)


if __name__ == "__main__":
    common.command(main)
