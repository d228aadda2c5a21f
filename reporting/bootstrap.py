"""How far a result can be trusted: intervals and paired tests that resample cases.

Patches of one case resemble each other, so cases are drawn, never patches. Tests that assume
independent patches, such as DeLong's, call differences significant far too often on such data and
are not offered.

A replicate is a vector of counts: how often each case was drawn. AUROC is a quadratic form of the
counts, everything made of tp, fp, fn, tn is linear in them, so all replicates are a few matrix
products. Models that are compared share their draws."""

import math
from collections import defaultdict

import numpy as np

from common import UserError
from reporting import metrics

REPLICATES = 2000
FEW_CASES = 20
DECISIONS = {
    "balanced_accuracy": metrics.balanced_accuracy,
    "weighted_f1": metrics.weighted_f1,
    "accuracy": metrics.accuracy,
    "kappa": metrics.cohen_kappa,
}

# Share of the 95% intervals of AUROC that held the true value, by number of cases:
# python bench/metrics.py --coverage
COVERAGE = {
    4: 0.853,
    5: 0.915,
    6: 0.919,
    8: 0.922,
    10: 0.929,
    12: 0.922,
    15: 0.924,
    20: 0.934,
    30: 0.939,
    50: 0.940,
    100: 0.942,
}


# ---------------------------------------------------------------- Student's t without SciPy


def t_within(t, df):
    """P(|T| <= t) of Student's t with a whole number of degrees of freedom (Abramowitz and Stegun
    26.7.3, 26.7.4).
    """
    theta = math.atan(abs(t) / math.sqrt(df))
    sin, cos = math.sin(theta), math.cos(theta)
    total = 0.0
    term = cos if df % 2 else 1.0
    for k in range(1 + df % 2, df, 2):
        total += term
        term *= cos * cos * k / (k + 1)
    if df % 2:
        return 2 / math.pi * (theta + sin * total)
    return sin * total


def t_quantile(share, df):
    """t with P(|T| <= t) = share."""
    low, high = 0.0, 1.0
    while t_within(high, df) < share:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        if t_within(middle, df) < share:
            low = middle
        else:
            high = middle
    return high


# ---------------------------------------------------------------- replicates


def draws(cases, replicates=REPLICATES, seed=0):
    """How often each of `cases` cases is drawn: float64 [replicates, cases]; each row sums to the
    number of cases.
    """
    rng = np.random.Generator(np.random.Philox(key=seed))
    drawn = (rng.random((replicates, cases)) * cases).astype(np.int64)
    drawn += np.arange(replicates)[:, None] * cases
    counts = np.bincount(drawn.ravel(), minlength=replicates * cases)
    return counts.reshape(replicates, cases).astype(np.float64)


def codes(cases):
    """(names, code of each patch): the distinct cases, sorted so that equal test sets get equal
    draws.
    """
    return np.unique(np.asarray(cases, dtype=str), return_inverse=True)


def auroc_of_draws(counts, y, p, case):
    """AUROC of each replicate [R]; NaN where a class was not drawn.

    counts: [R, cases]; y, p: labels and scores [N]; case: code of each patch [N].
    """
    y, p, _ = metrics.checked(y, p)
    cases = counts.shape[1]
    positive = np.bincount(case[y], minlength=cases)
    negative = np.bincount(case[~y], minlength=cases)
    pairs = (counts @ positive) * (counts @ negative)
    if cases <= 300:
        won = ((counts @ _wins(y, p, case, cases)) * counts).sum(1) / 2
    else:  # the matrix of wins would be large: weight the scores, which are sorted once
        order = np.argsort(p, kind="stable")
        y, p, case = y[order], p[order], case[order]
        starts = metrics.tie_starts(p)
        won = np.empty(len(counts))
        for r, drawn in enumerate(counts):
            weight = drawn[case]
            won[r] = metrics.won_pairs(np.where(y, weight, 0), np.where(y, 0, weight), starts)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(pairs > 0, won / pairs, np.nan)


def _wins(y, p, case, cases):
    """[a, b]: twice the pairs of a positive of case a and a negative of case b in the right
    order; ties count once.
    """
    order = np.argsort(p[y], kind="stable")
    positive_score, positive_case = p[y][order], case[y][order]
    order = np.argsort(p[~y], kind="stable")
    other_score, other_case = p[~y][order], case[~y][order]
    # The negatives of each case, in the order of their scores.
    by_case = np.argsort(other_case, kind="stable")
    size = np.bincount(other_case, minlength=cases)
    ends = np.cumsum(size)
    wins = np.zeros((cases, cases))
    for b in np.flatnonzero(size):
        scores = other_score[by_case[ends[b] - size[b] : ends[b]]]
        for side in ("left", "right"):
            beaten = np.searchsorted(scores, positive_score, side)
            wins[:, b] += np.bincount(positive_case, beaten, cases)
    return wins


def decisions_of_draws(counts, y, pred, case):
    """{name of DECISIONS: [R]} of decisions `pred` [N] in each replicate; balanced accuracy is NaN
    where a class was not drawn.
    """
    y, pred = np.asarray(y).astype(bool), np.asarray(pred).astype(bool)
    cases = counts.shape[1]
    tp, fp, fn, tn = (
        counts @ np.bincount(case[rows], minlength=cases)
        for rows in (y & pred, ~y & pred, y & ~pred, ~y & ~pred)
    )
    with np.errstate(invalid="ignore", divide="ignore"):
        balanced = (tp / (tp + fn) + tn / (tn + fp)) / 2
        f1, other = (np.nan_to_num(2 * a / (2 * a + fp + fn)) for a in (tp, tn))
        total = tp + fp + fn + tn
        weighted = (f1 * (tp + fn) + other * (tn + fp)) / total
        kappa = 2 * (tp * tn - fp * fn) / ((tp + fp) * (fp + tn) + (tp + fn) * (fn + tn))
    return {
        "balanced_accuracy": balanced,
        "weighted_f1": weighted,
        "accuracy": (tp + tn) / total,
        "kappa": kappa,
    }


def replicate(repeats, replicates=REPLICATES, seed=0, thresholds=None, ranking=True):
    """Replicates of the mean over repeats → ({metric: (observed, values [R], left [cases])}, number
    of cases).

    repeats: list of (labels, probabilities, cases), one per repeat, with the same patches in the
    same order. thresholds: one per repeat, None: 0.5. ranking: AUROC beside the metrics of
    DECISIONS; it takes longest. values: of the draws; left: with each case left out in turn. The
    repeats share their draws: this resamples the cases of the test set, not the training."""
    names, case = codes(repeats[0][2])
    counts = np.concatenate([draws(len(names), replicates, seed), leave_one_out(len(names))])
    sums, observed = defaultdict(float), defaultdict(float)
    first_cases = np.asarray(repeats[0][2], dtype=str)
    for (y, p, cases), threshold in zip(repeats, thresholds or [0.5] * len(repeats), strict=True):
        if not np.array_equal(np.asarray(cases, dtype=str), first_cases):
            raise UserError(
                "the repeats have different test sets; they cannot be resampled together"
            )
        pred = np.asarray(p) >= threshold
        of_draws = decisions_of_draws(counts, y, pred, case)
        whole = {name: metric(y, pred) for name, metric in DECISIONS.items()}
        if ranking:
            of_draws["auroc"] = auroc_of_draws(counts, y, p, case)
            whole["auroc"] = metrics.auroc(y, p)
        for name, drawn in of_draws.items():
            sums[name] = sums[name] + drawn / len(repeats)
            observed[name] += whole[name] / len(repeats)
    parts = {}
    for name, drawn in sums.items():
        parts[name] = observed[name], drawn[:replicates], drawn[replicates:]
    return parts, len(names)


def replicate_folds(repeats, replicates=REPLICATES, seed=0, thresholds=None, ranking=True):
    """replicate() of a cross-validation, whose repeats have test sets of different cases: these are
    drawn in each test set on its own. The number of cases is that of all test sets.
    """
    single = []
    for number, repeat in enumerate(repeats):
        own = None if thresholds is None else [thresholds[number]]
        single.append(replicate([repeat], replicates, seed + number, own, ranking))
    parts = {}
    for name in single[0][0]:
        observed = float(np.mean([of_fold[name][0] for of_fold, _ in single]))
        values = np.mean([of_fold[name][1] for of_fold, _ in single], axis=0)
        left = []  # without a case, one of the means changes
        for of_fold, _ in single:
            own, _, without = of_fold[name]
            left.append(observed + (without - own) / len(single))
        parts[name] = observed, values, np.concatenate(left)
    return parts, sum(cases for _, cases in single)


def leave_one_out(cases):
    """Counts with each case left out in turn: [cases, cases]; at most 2,000 rows, evenly spread."""
    out = np.unique(np.linspace(0, cases - 1, min(cases, 2000)).astype(int))
    counts = np.ones((len(out), cases))
    counts[np.arange(len(out)), out] = 0
    return counts


def standard_error(left, cases):
    """Jackknife standard error from the values with each case left out; NaN if one of these is."""
    return float(np.sqrt((cases - 1) * np.mean((left - left.mean()) ** 2)))


def interval(values, left, cases, share=0.95):
    """(low, high) from the replicates `values` [R] and `left` (each case left out); None if too few
    of them are defined.

    Plain percentiles are too narrow if cases are few or differ much in size. As in Hesterberg's
    expanded percentile interval (What Teachers Should Know About the Bootstrap, 2015), the levels
    move outwards: to Student's t with cases - 1 degrees of freedom, and by the ratio of the
    jackknife's standard error, which errs to the wide side, to that of the replicates."""
    values = values[np.isfinite(values)]
    error = standard_error(left, cases) if cases > 2 else np.nan
    if len(values) < 100 or not np.isfinite(error):
        return None
    if values.std() < 1e-12:
        return float(values.mean()), float(values.mean())
    z = t_quantile(share, cases - 1) * max(1.0, error / values.std())
    outside = math.erfc(z / math.sqrt(2)) / 2
    low, high = np.quantile(values, (outside, 1 - outside))
    return float(low), float(high)


def paired(a, b, cases):
    """(difference, its interval, two-sided p) of two models, each (observed, values, left) of the
    same draws.

    Compares the observed difference over its jackknife standard error with Student's t with
    cases - 1 degrees of freedom. Equal models give p = 1; with too few cases interval and p are
    None."""
    observed, values, left = (x - y for x, y in zip(a, b))
    bounds = interval(values, left, cases)
    if bounds is None:
        return observed, None, None
    error = standard_error(left, cases)
    if error < 1e-12:
        p = 1.0 if abs(observed) < 1e-12 else 0.0
        return observed, bounds, p
    return observed, bounds, 1 - t_within(observed / error, cases - 1)


def holm(p):
    """p values corrected for their number (Holm 1979); None stays None."""
    known = [i for i, value in enumerate(p) if value is not None]
    corrected, worst = list(p), 0.0
    for rank, i in enumerate(sorted(known, key=lambda i: p[i])):
        worst = max(worst, min(1.0, p[i] * (len(known) - rank)))
        corrected[i] = worst
    return corrected


def measured(cases):
    """Measured coverage of the 95% interval with so few cases; None from FEW_CASES on."""
    if cases >= FEW_CASES:
        return None
    nearest = max((n for n in COVERAGE if n <= cases), default=min(COVERAGE))
    return COVERAGE[nearest]


def coverage_note(cases):
    """Caveat for an interval from so few cases; "" from FEW_CASES on."""
    if cases >= FEW_CASES:
        return ""
    return (
        f"{cases} cases: such 95% intervals held the truth in {measured(cases):.0%} of simulations"
    )
