"""How far a result can be trusted: intervals and paired tests that resample cases. No torch.

Patches of one case resemble each other, so a case is what is drawn, never a patch: tests that take
patches as independent (DeLong's among them) call differences significant far too often on such data
and are not offered.

A replicate is a vector of counts: how often each case was drawn. AUROC is a quadratic form of the
counts, everything made of tp, fp, fn, tn is linear in them, so all replicates are a few matrix
products. Models that are compared get the same draws."""

import math

import numpy as np

from common import UserError
from reporting import metrics

REPLICATES = 2000
FEW_CASES = 20
METRICS = ("auroc", "balanced_accuracy", "weighted_f1")

# Share of the 95% intervals of AUROC that held the true value, by number of cases: python
# bench/metrics.py --coverage
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


# ---------------------------------------------------------------- Student's t, so that scipy is not needed


def t_within(t, df):
    """P(|T| <= t) of Student's t with a whole number of degrees of freedom (Abramowitz and Stegun
    26.7.3, 26.7.4).
    """
    theta = math.atan(abs(t) / math.sqrt(df))
    sin, cos = math.sin(theta), math.cos(theta)
    term, total = (cos, 0.0) if df % 2 else (1.0, 0.0)
    for k in range(1 + df % 2, df, 2):
        total += term
        term *= cos * cos * k / (k + 1)
    return 2 / math.pi * (theta + sin * total) if df % 2 else sin * total


def t_quantile(share, df):
    """t with P(|T| <= t) = share."""
    low, high = 0.0, 1.0
    while t_within(high, df) < share:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if t_within(middle, df) < share else (low, middle)
    return high


# ---------------------------------------------------------------- replicates


def draws(cases, replicates=REPLICATES, seed=0):
    """How often each of `cases` cases is drawn: float64 [replicates, cases], each row sums to the
    number of cases.
    """
    rng = np.random.Generator(np.random.Philox(key=seed))
    drawn = (rng.random((replicates, cases)) * cases).astype(np.int64) + np.arange(replicates)[
        :, None
    ] * cases
    return (
        np.bincount(drawn.ravel(), minlength=replicates * cases)
        .reshape(replicates, cases)
        .astype(np.float64)
    )


def codes(cases):
    """(names, code of each patch): the sorted different cases, so that equal test sets get equal
    draws.
    """
    return np.unique(np.asarray(cases, dtype=str), return_inverse=True)


def auroc_of_draws(counts, y, p, case):
    """AUROC of each replicate [R]; NaN where a class was not drawn. case: code of each patch,
    counts: [R, cases].
    """
    y, p, _ = metrics.checked(y, p)
    cases = counts.shape[1]
    positive, negative = (
        np.bincount(case[y], minlength=cases),
        np.bincount(case[~y], minlength=cases),
    )
    pairs = (counts @ positive) * (counts @ negative)
    if cases <= 300:
        # wins[a, b]: pairs of a mitotic figure of case a and a look-alike of case b in the right
        # order, ties half.
        score, own = p[y], case[y]
        order = np.argsort(score, kind="stable")
        score, own = score[order], own[order]
        other = np.argsort(p[~y], kind="stable")
        scores, others = p[~y][other], case[~y][other]
        group = np.argsort(others, kind="stable")
        ends = np.cumsum(negative)
        wins = np.zeros((cases, cases))
        for b in np.flatnonzero(negative):
            rejected = scores[group[ends[b] - negative[b] : ends[b]]]
            wins[:, b] = np.bincount(own, np.searchsorted(rejected, score, "left"), cases)
            wins[:, b] += np.bincount(own, np.searchsorted(rejected, score, "right"), cases)
        area = ((counts @ wins) * counts).sum(1) / 2
    # the matrix would be large: each replicate by weights on the scores, which are sorted once
    else:
        order = np.argsort(p, kind="stable")
        y, p, case = y[order], p[order], case[order]
        first = np.flatnonzero(np.r_[True, p[1:] != p[:-1]])
        last = np.r_[first[1:], len(p)] - 1
        area = np.empty(len(counts))
        for r, drawn in enumerate(counts):
            weight = drawn[case]
            upto = np.cumsum(np.where(y, 0, weight))[last]
            area[r] = (
                np.add.reduceat(np.where(y, weight, 0), first) * (upto + np.r_[0.0, upto[:-1]])
            ).sum() / 2
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(pairs > 0, area / pairs, np.nan)


def decisions_of_draws(counts, y, pred, case):
    """{"balanced_accuracy", "weighted_f1"}: [R] of the replicates of decisions `pred`; NaN where a
    class is missing.
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
        weighted = (f1 * (tp + fn) + other * (tn + fp)) / (tp + fp + fn + tn)
    return {"balanced_accuracy": balanced, "weighted_f1": weighted}


def replicate(repeats, replicates=REPLICATES, seed=0):
    """Replicates of the mean over repeats, as {metric: (observed, values [R], left [cases])}, and
    the number of cases.

    repeats: list of (labels, probabilities, cases) with the same patches in the same order, one per
    repeat. values: of the draws; left: with each case left out in turn. The repeats share their
    draws: what is resampled are the cases of the test set, not the training."""
    names, case = codes(repeats[0][2])
    counts = np.concatenate([draws(len(names), replicates, seed), leave_one_out(len(names))])
    sums, observed = dict.fromkeys(METRICS, 0.0), dict.fromkeys(METRICS, 0.0)
    for y, p, cases in repeats:
        if not np.array_equal(np.asarray(cases, dtype=str), np.asarray(repeats[0][2], dtype=str)):
            raise UserError(
                "the repeats have different test sets; they cannot be resampled together"
            )
        pred = np.asarray(p) >= 0.5
        parts = {"auroc": auroc_of_draws(counts, y, p, case)} | decisions_of_draws(
            counts, y, pred, case
        )
        whole = {
            "auroc": metrics.auroc(y, p),
            "balanced_accuracy": metrics.balanced_accuracy(y, pred),
            "weighted_f1": metrics.weighted_f1(y, pred),
        }
        for name in METRICS:
            sums[name] = sums[name] + parts[name] / len(repeats)
            observed[name] += whole[name] / len(repeats)
    return {
        name: (observed[name], sums[name][:replicates], sums[name][replicates:]) for name in METRICS
    }, len(names)


def leave_one_out(cases):
    """Counts with each case left out in turn, [cases, cases] (at most 2,000 of them, evenly
    spread).
    """
    out = np.unique(np.linspace(0, cases - 1, min(cases, 2000)).astype(int))
    counts = np.ones((len(out), cases))
    counts[np.arange(len(out)), out] = 0
    return counts


def standard_error(left, cases):
    """Of the values with each case left out in turn: the jackknife's. NaN where one of them is not
    defined.
    """
    return float(np.sqrt((cases - 1) * np.mean((left - left.mean()) ** 2)))


def interval(values, left, cases, share=0.95):
    """(low, high) out of the replicates `values` [R] and `left` (each case left out); None where
    too little is defined.

    Plain percentiles are too narrow where cases are few or differ much in size. As in Hesterberg's
    expanded percentile interval (What Teachers Should Know About the Bootstrap, 2015) the levels
    are moved outwards: to Student's t with cases - 1 degrees of freedom, and by the ratio of the
    jackknife's standard error, which errs to the wide side, to that of the replicates."""
    values, error = (
        values[np.isfinite(values)],
        standard_error(left, cases) if cases > 2 else np.nan,
    )
    if len(values) < 100 or not np.isfinite(error):
        return None
    if values.std() < 1e-12:
        return float(values.mean()), float(values.mean())
    z = t_quantile(share, cases - 1) * max(1.0, error / values.std())
    outside = math.erfc(z / math.sqrt(2)) / 2
    low, high = np.quantile(values, (outside, 1 - outside))
    return float(low), float(high)


def paired(a, b, cases):
    """(difference, its interval, two-sided p) of two models: (observed, values, left) of each, from
    the same draws.

    The observed difference over its jackknife standard error is compared with Student's t with
    cases - 1 degrees of freedom. Equal models give p = 1; with too few cases the interval and p are
    None."""
    observed, values, left = (x - y for x, y in zip(a, b))
    found = interval(values, left, cases)
    if found is None:
        return observed, None, None
    error = standard_error(left, cases)
    if error < 1e-12:
        return observed, found, 1.0 if abs(observed) < 1e-12 else 0.0
    return observed, found, 1 - t_within(observed / error, cases - 1)


def holm(p):
    """p values corrected for their number (Holm 1979); None stays None."""
    known = [i for i, value in enumerate(p) if value is not None]
    corrected, worst = list(p), 0.0
    for rank, i in enumerate(sorted(known, key=lambda i: p[i])):
        worst = max(worst, min(1.0, p[i] * (len(known) - rank)))
        corrected[i] = worst
    return corrected


def measured(cases):
    """The coverage that was measured for the 95% interval of so few cases; None for enough cases."""
    return (
        None
        if cases >= FEW_CASES
        else COVERAGE[max((n for n in COVERAGE if n <= cases), default=min(COVERAGE))]
    )


def coverage_note(cases):
    """What is to be said beside an interval of so few cases; "" for enough cases."""
    if cases >= FEW_CASES:
        return ""
    return (
        f"{cases} cases: such 95% intervals held the truth in {measured(cases):.0%} of simulations"
    )


# ---------------------------------------------------------------- simulated studies
