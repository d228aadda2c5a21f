"""AUROC and the bootstrap by case against scikit-learn; with --coverage, whether intervals and
paired tests keep their promise on simulated studies.

python bench/metrics.py [--quick] [--coverage]
"""

import argparse
import math
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from reporting import bootstrap, metrics

# True AUROC of simulate(): with very many cases, two patches of different cases differ by 1.7 with
# variance 2 (1 + 0.7²).
TRUE_AUROC = 0.5 * (1 + math.erf(1.7 / math.sqrt(2 * (1 + 0.49)) / math.sqrt(2)))


# ---------------------------------------------------------------- speed and agreement


def interleaved(ours, theirs, times):
    """([best seconds of each], [result of each]); in turn, so that a busy machine slows both."""
    seconds, results = [np.inf, np.inf], [None, None]
    for _ in range(times):
        for i, function in enumerate((ours, theirs)):
            start = time.perf_counter()
            results[i] = function()
            seconds[i] = min(seconds[i], time.perf_counter() - start)
    return seconds, results


def compare(args):
    """Print the table of times and largest differences."""
    from sklearn.metrics import roc_auc_score

    rng = np.random.default_rng(0)
    n = 10**6
    y, p = rng.integers(0, 2, n), rng.random(n)
    p[y == 1] += 0.3
    print(
        "| what | ours, s | scikit-learn, s | ratio | largest difference |\n|---|---|---|---|---|"
    )
    for name, score in (
        ("AUROC of 1e6 scores", p),
        ("AUROC of 1e6 scores of 3 digits (ties)", np.round(p, 3)),
    ):
        (ours, theirs), (a, b) = interleaved(
            lambda: metrics.auroc(y, score), lambda: roc_auc_score(y, score), 5
        )
        print(f"| {name} | {ours:.3f} | {theirs:.3f} | {theirs / ours:.1f} × | {abs(a - b):.1e} |")

    n, replicates = 20_000, 100 if args.quick else 1000
    remark = " (scikit-learn: 100, × 10)" if args.quick else ""
    for cases in (60, 250, 5000):
        case = np.sort(rng.integers(0, cases, n))
        y, p = rng.integers(0, 2, n), rng.random(n)
        rows = [np.flatnonzero(case == c) for c in range(cases)]

        def ours():
            return bootstrap.auroc_of_draws(bootstrap.draws(cases, 1000), y, p, case)

        def theirs():
            values = []
            for counts in bootstrap.draws(cases, 1000)[:replicates]:
                drawn = [np.tile(rows[c], int(k)) for c, k in enumerate(counts) if k]
                drawn = np.concatenate(drawn)
                values.append(roc_auc_score(y[drawn], p[drawn]))
            return values

        (a, b), (first, second) = interleaved(ours, theirs, 1)
        b *= 1000 / replicates
        difference = np.abs(first[:replicates] - second).max()
        print(
            f"| 1,000 bootstrap replicates of 20,000 predictions, {cases:,} cases{remark} | "
            f"{a:.3f} | {b:.2f} | {b / a:.0f} × | {difference:.1e} |"
        )


# ---------------------------------------------------------------- simulated studies


def simulate(rng, cases, models=1, correlation=0.5):
    """A clustered test set → (labels [N], [scores [N] of each model], cases [N]). All models have
    the same true AUROC, TRUE_AUROC.

    Sizes of cases are skewed (about 5 to 200 patches), and so is their share of mitotic figures.
    Each case shifts the scores of its mitotic figures and of its look-alikes, partly in common for
    all models."""
    size = np.clip(np.exp(rng.normal(3.3, 0.8, cases)), 5, 200).astype(int)
    share = rng.beta(2, 3, cases)
    case = np.repeat(np.arange(cases), size)
    y = rng.random(len(case)) < share[case]
    shared_shift, shared_noise = rng.normal(0, 0.7, (cases, 2)), rng.normal(0, 1, len(case))
    scores = []
    for _ in range(models):
        own_shift = rng.normal(0, 0.7, (cases, 2))
        shift = math.sqrt(correlation) * shared_shift + math.sqrt(1 - correlation) * own_shift
        own_noise = rng.normal(0, 1, len(case))
        noise = math.sqrt(correlation) * shared_noise + math.sqrt(1 - correlation) * own_noise
        scores.append(1.7 * y + shift[case, y.astype(int)] + noise)
    return y, scores, case


def measured_coverage(cases, studies=400, replicates=1000, seed=0):
    """Share of the 95% intervals of AUROC that hold TRUE_AUROC, over simulated studies with so many
    cases.
    """
    rng, held = np.random.Generator(np.random.Philox(key=[seed, cases])), 0
    left_out = bootstrap.leave_one_out(cases)
    for k in range(studies):
        y, (score,), case = simulate(rng, cases)
        counts = np.concatenate([bootstrap.draws(cases, replicates, k), left_out])
        values = bootstrap.auroc_of_draws(counts, y, score, case)
        bounds = bootstrap.interval(values[:replicates], values[replicates:], cases)
        held += bounds is not None and bounds[0] <= TRUE_AUROC <= bounds[1]
    return held / studies


def measured_false_positives(cases, studies=400, replicates=500, seed=0, level=0.05):
    """Share of simulated studies of two equally good models in which the paired test finds
    p < level.
    """
    rng, significant = np.random.Generator(np.random.Philox(key=[seed + 1, cases])), 0
    left_out = bootstrap.leave_one_out(cases)
    for k in range(studies):
        y, scores, case = simulate(rng, cases, models=2)
        counts = np.concatenate([bootstrap.draws(cases, replicates, k), left_out])
        both = []
        for score in scores:
            values = bootstrap.auroc_of_draws(counts, y, score, case)
            both.append((metrics.auroc(y, score), values[:replicates], values[replicates:]))
        p = bootstrap.paired(*both, cases)[2]
        significant += p is not None and p < level
    return significant / studies


def coverage(args):
    """Print the table that bootstrap.COVERAGE was typed from."""
    studies = 300 if args.quick else 2000
    print(
        "\n| cases | 95% intervals of AUROC that hold the truth | paired tests of equal models "
        "with p < 0.05 | simulated studies |\n|---|---|---|---|"
    )
    for cases in bootstrap.COVERAGE:
        print(
            f"| {cases} | {measured_coverage(cases, studies):.3f} | "
            f"{measured_false_positives(cases, studies):.3f} | {studies} |",
            flush=True,
        )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    parser.add_argument(
        "--coverage", action="store_true", help="simulate clustered studies instead of timing"
    )
    args = parser.parse_args()
    if args.coverage:
        coverage(args)
    else:
        compare(args)


if __name__ == "__main__":
    main()
