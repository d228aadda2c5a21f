"""AUROC and the bootstrap by case against scikit-learn; with --coverage, whether intervals and
paired tests hold.

python bench/metrics.py [--quick] [--coverage]
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import math

from reporting import (
    bootstrap,
    metrics,
)


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
    n = 10**6
    y, p = rng.integers(0, 2, n), rng.random(n)
    p[y == 1] += 0.3
    tied = np.round(p, 3)
    print(
        "| what | ours, s | scikit-learn, s | ratio | largest difference |\n|---|---|---|---|---|"
    )
    for name, score in (
        ("AUROC of 1e6 scores", p),
        ("AUROC of 1e6 scores of 3 digits (ties)", tied),
    ):
        (ours, theirs), (a, b) = interleaved(
            lambda: metrics.auroc(y, score), lambda: roc_auc_score(y, score), 5
        )
        print(f"| {name} | {ours:.3f} | {theirs:.3f} | {theirs / ours:.1f} × | {abs(a - b):.1e} |")

    n, replicates = 20_000, 100 if args.quick else 1000
    for cases in (60, 250, 5000):
        case = np.sort(rng.integers(0, cases, n))
        y, p = rng.integers(0, 2, n), rng.random(n)
        rows = [np.flatnonzero(case == c) for c in range(cases)]

        def ours():
            return bootstrap.auroc_of_draws(bootstrap.draws(cases, 1000), y, p, case)

        def theirs():
            found = []
            for counts in bootstrap.draws(cases, 1000)[:replicates]:
                drawn = np.concatenate(
                    [np.tile(rows[c], int(k)) for c, k in enumerate(counts) if k]
                )
                found.append(roc_auc_score(y[drawn], p[drawn]))
            return found

        (a, b), (first, second) = interleaved(ours, theirs, 1)
        b *= 1000 / replicates
        print(
            f"| 1,000 bootstrap replicates of 20,000 predictions, {cases:,} cases"
            f"{' (scikit-learn: 100, × 10)' if replicates < 1000 else ''} | {a:.3f} | {b:.2f} | "
            f"{b / a:.0f} × | "
            f"{np.abs(first[:replicates] - second).max():.1e} |"
        )


def coverage(args):
    studies = 300 if args.quick else 2000
    print(
        "\n| cases | 95% intervals of AUROC that hold the truth | paired tests of equal models "
        "with p < 0.05 | "
        "simulated studies |\n|---|---|---|---|"
    )
    for cases in (4, 5, 6, 8, 10, 12, 15, 20, 30, 50, 100):
        print(
            f"| {cases} | {measured_coverage(cases, studies):.3f} | "
            f"{measured_false_positives(cases, studies):.3f} | {studies} |",
            flush=True,
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    parser.add_argument(
        "--coverage", action="store_true", help="simulate clustered studies instead of timing"
    )
    args = parser.parse_args()
    (coverage if args.coverage else compare)(args)


# of simulate() with very many cases: two patches of different cases differ by 1.7 with variance 2
# (1 + 0.7²).
TRUE_AUROC = 0.5 * (1 + math.erf(1.7 / math.sqrt(2 * (1 + 0.49)) / math.sqrt(2)))


def simulate(rng, cases, models=1, correlation=0.5):
    """A clustered test set → (labels, [scores of each model], cases). All models have the same true
    AUROC (TRUE_AUROC).

    Sizes of cases are skewed (about 5 to 200 patches), and so is their share of mitotic figures;
    each case shifts the scores of its mitotic figures and of its look-alikes, partly in common for
    all models."""
    size = np.clip(np.exp(rng.normal(3.3, 0.8, cases)), 5, 200).astype(int)
    share = rng.beta(2, 3, cases)
    case = np.repeat(np.arange(cases), size)
    y = rng.random(len(case)) < share[case]
    shared, noise = rng.normal(0, 0.7, (cases, 2)), rng.normal(0, 1, len(case))
    scores = []
    for _ in range(models):
        own = rng.normal(0, 0.7, (cases, 2))
        shift = math.sqrt(correlation) * shared + math.sqrt(1 - correlation) * own
        error = math.sqrt(correlation) * noise + math.sqrt(1 - correlation) * rng.normal(
            0, 1, len(case)
        )
        scores.append(1.7 * y + shift[case, y.astype(int)] + error)
    return y, scores, case


def measured_coverage(cases, studies=400, replicates=1000, seed=0):
    """Share of the 95% intervals of AUROC that hold TRUE_AUROC, over simulated studies with so many
    cases.
    """
    rng, held = np.random.Generator(np.random.Philox(key=[seed, cases])), 0
    for k in range(studies):
        y, (score,), case = simulate(rng, cases)
        values = bootstrap.auroc_of_draws(
            np.concatenate([bootstrap.draws(cases, replicates, k), bootstrap.leave_one_out(cases)]),
            y,
            score,
            case,
        )
        found = bootstrap.interval(values[:replicates], values[replicates:], cases)
        held += found is not None and found[0] <= TRUE_AUROC <= found[1]
    return held / studies


def measured_false_positives(cases, studies=400, replicates=500, seed=0, level=0.05):
    """Share of simulated studies of two equally good models in which the paired test finds p <
    level.
    """
    rng, significant = np.random.Generator(np.random.Philox(key=[seed + 1, cases])), 0
    for k in range(studies):
        y, (a, b), case = simulate(rng, cases, models=2)
        counts = np.concatenate(
            [bootstrap.draws(cases, replicates, k), bootstrap.leave_one_out(cases)]
        )
        both = [
            (metrics.auroc(y, score), found[:replicates], found[replicates:])
            for score, found in (
                (score, bootstrap.auroc_of_draws(counts, y, score, case)) for score in (a, b)
            )
        ]
        p = bootstrap.paired(*both, cases)[2]
        significant += p is not None and p < level
    return significant / studies
