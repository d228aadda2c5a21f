"""AUROC and the bootstrap by case against scikit-learn; with --coverage, whether intervals and paired tests hold.

    python bench/metrics.py [--quick] [--coverage]
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import metrics  # noqa: E402
import resample  # noqa: E402


def interleaved(ours, theirs, times):
    """Best seconds of each and their results; taken in turn, so that a busy machine slows both."""
    best, found = [np.inf, np.inf], [None, None]
    for _ in range(times):
        for i, function in enumerate((ours, theirs)):
            start = time.perf_counter()
            found[i] = function()
            best[i] = min(best[i], time.perf_counter() - start)
    return best, found


def compare(args):
    from sklearn.metrics import roc_auc_score
    rng = np.random.default_rng(0)
    n = 10 ** 6
    y, p = rng.integers(0, 2, n), rng.random(n)
    p[y == 1] += 0.3
    tied = np.round(p, 3)
    print("| what | ours, s | scikit-learn, s | ratio | largest difference |\n|---|---|---|---|---|")
    for name, score in (("AUROC of 1e6 scores", p), ("AUROC of 1e6 scores of 3 digits (ties)", tied)):
        (ours, theirs), (a, b) = interleaved(lambda: metrics.auroc(y, score), lambda: roc_auc_score(y, score), 5)
        print(f"| {name} | {ours:.3f} | {theirs:.3f} | {theirs / ours:.1f} × | {abs(a - b):.1e} |")

    n, replicates = 20_000, 100 if args.quick else 1000
    for cases in (60, 250, 5000):
        case = np.sort(rng.integers(0, cases, n))
        y, p = rng.integers(0, 2, n), rng.random(n)
        rows = [np.flatnonzero(case == c) for c in range(cases)]

        def ours():
            return resample.auroc_of_draws(resample.draws(cases, 1000), y, p, case)

        def theirs():
            found = []
            for counts in resample.draws(cases, 1000)[:replicates]:
                drawn = np.concatenate([np.tile(rows[c], int(k)) for c, k in enumerate(counts) if k])
                found.append(roc_auc_score(y[drawn], p[drawn]))
            return found
        (a, b), (first, second) = interleaved(ours, theirs, 1)
        b *= 1000 / replicates
        print(f"| 1,000 bootstrap replicates of 20,000 predictions, {cases:,} cases"
              f"{' (scikit-learn: 100, × 10)' if replicates < 1000 else ''} | {a:.3f} | {b:.2f} | {b / a:.0f} × | "
              f"{np.abs(first[:replicates] - second).max():.1e} |")


def coverage(args):
    studies = 300 if args.quick else 2000
    print("\n| cases | 95% intervals of AUROC that hold the truth | paired tests of equal models with p < 0.05 | "
          "simulated studies |\n|---|---|---|---|")
    for cases in (4, 5, 6, 8, 10, 12, 15, 20, 30, 50, 100):
        print(f"| {cases} | {resample.measured_coverage(cases, studies):.3f} | "
              f"{resample.measured_false_positives(cases, studies):.3f} | {studies} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    parser.add_argument("--coverage", action="store_true", help="simulate clustered studies instead of timing")
    args = parser.parse_args()
    (coverage if args.coverage else compare)(args)
