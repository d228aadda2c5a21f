"""Metrics of predictions in NumPy, the choice of a threshold, the summary of a run.

Labels are 0 and 1, whatever the data call them (the positive class is label 1); weights are counts
or any numbers from 0. NaN is an error everywhere. A metric that needs a missing class is NaN, and
None in the summaries that go into JSON: there AUROC, balanced accuracy and weighted F1 need both
classes, average precision and sensitivity need a positive."""

import numpy as np
from numpy.typing import ArrayLike

from common import UserError

ECE_BINS = 15


def checked(y, p, weight=None, what="probabilities"):
    """(y as bool [N], p [N], weight [N] or None) as arrays of one length.

    UserError: NaN, labels other than 0 and 1, negative weights. ValueError: different lengths.
    """
    y, p = np.asarray(y), np.asarray(p)
    if y.dtype != bool:
        positive = y == 1
        if np.count_nonzero(positive) + np.count_nonzero(y == 0) != y.size:
            raise UserError(f"a label is {y[(y != 0) & (y != 1)].flat[0]}; labels must be 0 or 1")
        y = positive
    if p.dtype not in (np.float64, np.float32, bool):
        p = p.astype(np.float64)
    if y.ndim != 1 or y.shape != p.shape:
        raise ValueError(
            f"labels of shape {y.shape} and {what} of shape {p.shape} are not equally long lists"
        )
    with np.errstate(invalid="ignore"):  # inf - inf is NaN too, hence the second look
        suspect = p.dtype != bool and np.isnan(p.sum())
    if suspect and np.isnan(p).any():
        raise UserError(
            f"{np.isnan(p).sum()} of {len(p)} {what} are NaN: the run diverged, or its file is "
            "damaged"
        )
    if weight is not None:
        weight = np.asarray(weight, np.float64)
        if weight.shape != y.shape:
            raise ValueError(f"weights of shape {weight.shape} for {len(y)} labels")
        if not (np.isfinite(weight) & (weight >= 0)).all():
            raise UserError("the weights hold NaN, an infinite or a negative number")
    return y, p, weight


# ---------------------------------------------------------------- ranking


def auroc(y: ArrayLike, p: ArrayLike, weight: ArrayLike | None = None) -> float:
    """Area under the ROC curve: P(p of a positive > p of a negative) + P(equal) / 2.

    y: labels [N]; p: scores [N], any monotone function of the probability; weight: [N] or None.
    NaN unless both classes are present.
    """
    y, p, weight = checked(y, p, weight, "scores")
    if weight is not None:
        return _weighted_auroc(y, p, weight)
    few, many = np.sort(p[y]), np.sort(p[~y])
    if not len(few) or not len(many):
        return float("nan")
    # Ranks of the smaller class among the larger one. Sorting the classes apart is several times
    # faster than argsort, and looking up a sorted list in sorted order stays in the cache.
    swapped = len(few) > len(many)
    if swapped:
        few, many = many, few
    place = np.searchsorted(many, few, "left")
    tied = many[np.minimum(place, len(many) - 1)] == few
    twice = 2 * place.sum(dtype=np.int64)
    if tied.any():  # only ties need the second look-up, from the other side
        twice += (np.searchsorted(many, few[tied], "right") - place[tied]).sum(dtype=np.int64)
    area = float(twice) / (2.0 * len(few) * len(many))
    return 1.0 - area if swapped else area


def _weighted_auroc(y, p, weight):
    order = np.argsort(p)
    y, p, weight = y[order], p[order], weight[order]
    positive, negative = weight * y, weight * ~y
    pairs = positive.sum() * negative.sum()
    if pairs == 0:
        return float("nan")
    return float(won_pairs(positive, negative, tie_starts(p)) / pairs)


def tie_starts(p):
    """Index of the first of each group of equal scores in the sorted scores p [N]."""
    return np.flatnonzero(np.r_[True, p[1:] != p[:-1]])


def won_pairs(positive, negative, starts):
    """Weighted number of pairs in which the positive has the higher score; ties count half.

    positive, negative: weights of the two classes [N] in the order of rising scores; starts: where
    each group of equal scores starts (tie_starts).
    """
    last = np.r_[starts[1:], len(positive)] - 1
    upto = np.cumsum(negative)[last]  # negatives up to and including each group
    below = np.r_[0.0, upto[:-1]]
    return (np.add.reduceat(positive, starts) * (below + upto)).sum() / 2


def counts_by_score(y, p, weight=None):
    """(scores, true positives, false positives) of the decisions p >= score at each distinct score,
    from the highest.
    """
    y, p, weight = checked(y, p, weight, "scores")
    if weight is None:
        weight = np.ones(len(y))
    order = np.argsort(-p, kind="stable")
    p, hits, weight = p[order], (weight * y)[order], weight[order]
    last = np.zeros(0, int)
    if len(p):
        last = np.flatnonzero(np.r_[p[1:] != p[:-1], True])
    positive, total = np.cumsum(hits)[last], np.cumsum(weight)[last]
    return p[last], positive, total - positive


def average_precision(y, p, weight=None):
    """Sum of precision × gain in recall over the distinct scores, from the highest. NaN without a
    positive.
    """
    _, tp, fp = counts_by_score(y, p, weight)
    if not len(tp) or tp[-1] == 0:
        return float("nan")
    return float((np.diff(tp, prepend=0.0) * (tp / np.maximum(tp + fp, 1e-300))).sum() / tp[-1])


# ---------------------------------------------------------------- decisions


def confusion(y, pred, weight=None):
    """tp, fp, fn, tn (weighted) of decisions `pred` (bool or 0/1)."""
    y, pred, weight = checked(y, pred, weight, "decisions")
    pred = checked(pred, y)[0]
    code = 2 * y + pred
    tn, fp, fn, tp = np.bincount(code, weights=weight, minlength=4).tolist()
    return tp, fp, fn, tn


def _ratio(a, b):
    return a / b if b else float("nan")


def sensitivity(y, pred, weight=None):
    """Share of the positives called positive; NaN if there is none."""
    tp, _, fn, _ = confusion(y, pred, weight)
    return _ratio(tp, tp + fn)


def specificity(y, pred, weight=None):
    """Share of the negatives called negative; NaN if there is none."""
    _, fp, _, tn = confusion(y, pred, weight)
    return _ratio(tn, tn + fp)


def precision(y, pred, weight=None):
    """Share of positives among those called positive; 0 if none is."""
    tp, fp, _, _ = confusion(y, pred, weight)
    return tp / (tp + fp) if tp + fp else 0.0


def f1(y, pred, weight=None):
    """2 tp / (2 tp + fp + fn) of the positive class; 0 if nothing is positive or called so."""
    tp, fp, fn, _ = confusion(y, pred, weight)
    return _f1(tp, fp, fn)


def _f1(tp, fp, fn):
    return 2 * tp / (2 * tp + fp + fn) if tp + fp + fn else 0.0


def balanced_accuracy(y: ArrayLike, pred: ArrayLike, weight: ArrayLike | None = None) -> float:
    """Mean of sensitivity and specificity. If a class is missing, the other one's alone; NaN if
    both are missing.

    y: labels [N]; pred: decisions [N], bool or 0/1; weight: [N] or None.
    """
    tp, fp, fn, tn = confusion(y, pred, weight)
    recalls = [a / (a + b) for a, b in ((tp, fn), (tn, fp)) if a + b]
    if not recalls:
        return float("nan")
    return float(np.mean(recalls))


def weighted_f1(y: ArrayLike, pred: ArrayLike, weight: ArrayLike | None = None) -> float:
    """Mean of the F1 of both classes, weighted by their frequency (scikit-learn's
    average="weighted").

    y: labels [N]; pred: decisions [N], bool or 0/1; weight: [N] or None.
    """
    return _weighted_f1(*confusion(y, pred, weight))


def _weighted_f1(tp, fp, fn, tn):
    n = tp + fp + fn + tn
    if not n:
        return float("nan")
    return (_f1(tp, fp, fn) * (tp + fn) + _f1(tn, fn, fp) * (tn + fp)) / n


def accuracy(y, pred, weight=None):
    """Share of right decisions, which a frequent class dominates; NaN without any."""
    tp, fp, fn, tn = confusion(y, pred, weight)
    return _ratio(tp + tn, tp + fp + fn + tn)


def cohen_kappa(y, pred, weight=None):
    """Cohen's kappa, the agreement of decisions and labels beyond chance: 1 at best, 0 by chance.
    NaN if all labels and decisions are of one and the same class.
    """
    return _kappa(*confusion(y, pred, weight))


def _kappa(tp, fp, fn, tn):
    # (observed - expected) / (1 - expected) agreement, both times n².
    return _ratio(2 * (tp * tn - fp * fn), (tp + fp) * (fp + tn) + (tp + fn) * (fn + tn))


# ---------------------------------------------------------------- probabilities


def brier(y, p, weight=None):
    """Mean squared difference between probability and label."""
    y, p, weight = checked(y, p, weight)
    if not len(y) or (weight is not None and not weight.any()):
        return float("nan")
    return float(np.average((p - y) ** 2, weights=weight))


def reliability(y, p, bins=ECE_BINS, weight=None):
    """(count, mean probability, share of positives), each [bins], in bins of equal width; NaN
    in empty bins.
    """
    y, p, weight = checked(y, p, weight)
    if len(p) and not (0 <= p.min() and p.max() <= 1):
        raise UserError("probabilities outside 0 … 1; are these logits?")
    if weight is None:
        weight = np.ones(len(y))
    index = np.minimum((p * bins).astype(int), bins - 1)
    count, mean, share = (np.bincount(index, w, bins) for w in (weight, weight * p, weight * y))
    with np.errstate(invalid="ignore"):
        return count, mean / count, share / count


def expected_calibration_error(y, p, bins=ECE_BINS, weight=None):
    """Mean of |mean probability - share of positives| over bins of equal width, weighted by
    their counts.
    """
    count, mean, share = reliability(y, p, bins, weight)
    if not count.sum():
        return float("nan")
    return float(np.nansum(count * np.abs(mean - share)) / count.sum())


def logit(p, least=0.0):
    """log(p / (1 - p)); p nearer to 0 or 1 than `least` counts as this near. Finite also without
    it, for probabilities that were rounded to 0 or 1.
    """
    low, high = max(least, np.finfo(np.float64).tiny), 1 - max(least, 2.0**-53)
    p = np.clip(np.asarray(p, np.float64), low, high)
    return np.log(p) - np.log1p(-p)


# ---------------------------------------------------------------- thresholds and summaries


RULES = {  # what `choose_threshold` looks for, in words
    "f1": "the best F1",
    "balanced": "the best balanced accuracy",
}


def parse_threshold(text, rules=False, flag="--threshold"):
    """The text of a flag --threshold → a probability, or with `rules` also the rule to choose one
    by: "f1" | "balanced" | ("sensitivity", share). UserError for anything else, NaN included.
    """
    allowed = "a probability between 0 and 1"
    if rules:
        allowed += f", {', '.join(RULES)}, or a share of class 1 to find such as sensitivity=0.9"
    kind, _, share = text.partition("=")
    if rules and text in RULES:
        return text
    if rules and kind == "sensitivity" and 0 < _as_number(share) <= 1:
        return "sensitivity", float(share)
    if not 0 < _as_number(text) < 1:
        raise UserError(f"{flag} {text}: give {allowed}")
    return float(text)


def describe_rule(rule):
    """What a threshold was chosen for, after "the threshold". rule: text of a flag."""
    target = parse_threshold(rule, rules=True)
    if isinstance(target, float):
        return f"given as {target:g}"
    if target in RULES:
        return f"of {RULES[target]} on validation"
    return f"that finds {100 * target[1]:g}% of class 1 on validation"


def _as_number(text):
    try:
        return float(text)
    except ValueError:
        return float("nan")


def choose_threshold(labels, probabilities, target="f1"):
    """The threshold (p >= t is class 1) of a rule on validation predictions → float.

    target: "f1" or "balanced", the highest F1 or balanced accuracy (of several thresholds the one
    nearest to 0.5, of two equally near ones the higher); ("sensitivity", s), the highest threshold
    that finds the share s of class 1; or a number, which is the threshold itself. A chosen one lies
    halfway to the next lower score, so that rounding of an exported model does not push the
    deciding patch over it. 0.5 where a class is missing."""
    if isinstance(target, float):
        return target
    score, tp, fp = counts_by_score(labels, probabilities)
    if not len(score) or tp[-1] == 0 or fp[-1] == 0:
        return 0.5
    score = score.astype(np.float64)
    half = (score + np.r_[score[1:], min(0.0, score[-1])]) / 2
    half = np.where(half > np.r_[score[1:], -np.inf], half, score)
    if target in RULES:
        if target == "f1":
            value, slack = 2 * tp / (tp[-1] + tp + fp), 1e-12
        else:  # sensitivity + specificity, as a whole number, so that ties are exact
            value, slack = tp * fp[-1] - fp * tp[-1], 0
        best = np.flatnonzero(value >= value.max() - slack)
        return float(half[best[np.argmin(np.abs(half[best] - 0.5))]])
    rule, share = target
    if rule != "sensitivity" or not 0 < share <= 1:
        rules = ", ".join(map(repr, RULES))
        raise ValueError(f"target {target!r}: {rules} or ('sensitivity', share in (0, 1])")
    return float(half[np.argmax(tp >= share * tp[-1] - 1e-9)])


def decided(labels, probabilities, threshold):
    """Metrics of the decisions p >= threshold, as a dict for JSON; None if a class is missing."""
    tp, fp, fn, tn = (int(k) for k in confusion(labels, np.asarray(probabilities) >= threshold))
    both = tp + fn > 0 and tn + fp > 0
    balanced = weighted = right = kappa = None
    if both:
        balanced = (tp / (tp + fn) + tn / (tn + fp)) / 2
        # Not for one class alone: 1.000 for a model that calls everything that class.
        weighted = _weighted_f1(tp, fp, fn, tn)
        right = (tp + tn) / (tp + fp + fn + tn)
        kappa = _kappa(tp, fp, fn, tn)
    return {
        "threshold": float(threshold),
        "balanced_accuracy": balanced,
        "weighted_f1": weighted,
        "accuracy": right,
        "kappa": kappa,
        "sensitivity": _or_none(_ratio(tp, tp + fn)),
        "specificity": _or_none(_ratio(tn, tn + fp)),
        "precision": tp / (tp + fp) if tp + fp else 0.0,
        "f1": _f1(tp, fp, fn),
        "tp": tp,
        "fp": fp,
        "fn": fn,
        "tn": tn,
    }


def _or_none(value):
    return float(value) if np.isfinite(value) else None


def summarise(labels, probabilities, cases=None, threshold=0.5):
    """The metrics of one set as a dict for JSON; None for those that need a class which is missing.

    balanced_accuracy and weighted_f1 are at 0.5, as in the paper; at_0.5 and at_threshold hold the
    metrics of the decisions."""
    y, p, _ = checked(labels, probabilities)
    at_half = decided(y, p, 0.5)
    return {
        "n": len(y),
        "positives": int(y.sum()),
        "cases": None if cases is None else len(set(map(str, cases))),
        "balanced_accuracy": at_half["balanced_accuracy"],
        "weighted_f1": at_half["weighted_f1"],
        "auroc": _or_none(auroc(y, p)),
        "average_precision": _or_none(average_precision(y, p)),
        "brier": _or_none(brier(y, p)),
        "ece": _or_none(expected_calibration_error(y, p)),
        "at_0.5": at_half,
        "at_threshold": decided(y, p, threshold),
    }


def of_predictions(columns, target="f1"):
    """metrics.json of a run: the threshold chosen on the set "val" (0.5 without one), and the
    summary of each set.

    columns: dict of equally long sequences, runs.PREDICTION_COLUMNS; target: see choose_threshold.
    """
    sets, case = np.asarray(columns["set"], dtype=str), np.asarray(columns["case"], dtype=str)
    label, p = np.asarray(columns["label"]), np.asarray(columns["probability"], dtype=np.float64)
    val = sets == "val"
    threshold = choose_threshold(label[val], p[val], target)
    summaries = {}
    for name in dict.fromkeys(sets.tolist()):
        rows = sets == name
        try:
            summaries[name] = summarise(label[rows], p[rows], case[rows], threshold)
        except UserError as error:
            raise UserError(f"set {name}: {error}") from None
    return {"threshold": threshold, "sets": summaries}
