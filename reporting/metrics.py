"""What a set of predictions is worth: NumPy metrics, the choice of a threshold, the summary of a
run. No torch.

Labels are 0 (look-alike) and 1 (mitotic figure), weights are counts or any numbers from 0. NaN is
refused in all. Where a class is missing, a metric that needs it is NaN, and None in the summaries
that go into JSON: AUROC and balanced accuracy of a summary need both classes, average precision and
sensitivity a mitotic figure."""

import numpy as np

from common import UserError

ECE_BINS = 15


def checked(y, p, weight=None, what="probabilities"):
    """(y as bool, p, weight) as arrays of one length; UserError: NaN, another label than 0 and 1,
    negative weights.
    """
    y, p = np.asarray(y), np.asarray(p)
    if y.dtype != bool:
        found = y == 1
        if np.count_nonzero(found) + np.count_nonzero(y == 0) != y.size:
            raise UserError(f"the labels hold {y[(y != 0) & (y != 1)].flat[0]}; 0 and 1 are known")
        y = found
    if p.dtype not in (np.float64, np.float32, bool):
        p = p.astype(np.float64)
    if y.ndim != 1 or y.shape != p.shape:
        raise ValueError(
            f"labels of shape {y.shape} and {what} of shape {p.shape}: two equally long lists are "
            "needed"
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


def auroc(y, p, weight=None):
    """Area under the ROC curve: P(p of a mitotic figure > p of a look-alike) + P(equal) / 2. NaN
    without both classes.

    y: labels [N]; p: scores [N], any monotone function of the probability; weight: [N] or None.
    """
    y, p, weight = checked(y, p, weight, "scores")
    if weight is not None:
        return _weighted_auroc(y, p, weight)
    few, many = np.sort(p[y]), np.sort(p[~y])
    if not len(few) or not len(many):
        return float("nan")
    # Ranks of the smaller class among the larger one. Sorting the classes apart is several times
    # faster than argsort, and a sorted list is looked up in sorted order, which stays in the cache.
    swapped = len(few) > len(many)
    if swapped:
        few, many = many, few
    place = np.searchsorted(many, few, "left")
    tied = (
        many[np.minimum(place, len(many) - 1)] == few
    )  # only these need to be looked up from the other side
    twice = 2 * place.sum(dtype=np.int64)
    if tied.any():
        twice += (np.searchsorted(many, few[tied], "right") - place[tied]).sum(dtype=np.int64)
    area = float(twice) / (2.0 * len(few) * len(many))
    return 1.0 - area if swapped else area


def _weighted_auroc(y, p, weight):
    order = np.argsort(p)
    y, p, weight = y[order], p[order], weight[order]
    positive, total = weight * y, np.cumsum(weight * ~y)
    if positive.sum() == 0 or total[-1] == 0:
        return float("nan")
    first = np.flatnonzero(np.r_[True, p[1:] != p[:-1]])  # of each group of ties
    upto = total[np.r_[first[1:], len(p)] - 1]
    below = np.r_[0.0, upto[:-1]]
    return float(
        (np.add.reduceat(positive, first) * (below + upto)).sum() / (2 * positive.sum() * total[-1])
    )


def counts_by_score(y, p, weight=None):
    """(scores, true positives, false positives) at each distinct score, from the highest:
    predicting p >= score.
    """
    y, p, weight = checked(y, p, weight, "scores")
    if weight is None:
        weight = np.ones(len(y))
    order = np.argsort(-p, kind="stable")
    p, hits, weight = p[order], (weight * y)[order], weight[order]
    last = np.flatnonzero(np.r_[p[1:] != p[:-1], True]) if len(p) else np.zeros(0, int)
    positive, total = np.cumsum(hits)[last], np.cumsum(weight)[last]
    return p[last], positive, total - positive


def average_precision(y, p, weight=None):
    """Sum of precision × gain in recall over the distinct scores from the highest. NaN without a
    mitotic figure.
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
    """Share of the mitotic figures that are found; NaN where there is none."""
    tp, _, fn, _ = confusion(y, pred, weight)
    return _ratio(tp, tp + fn)


def specificity(y, pred, weight=None):
    """Share of the look-alikes that are rejected; NaN where there is none."""
    _, fp, _, tn = confusion(y, pred, weight)
    return _ratio(tn, tn + fp)


def precision(y, pred, weight=None):
    """Share of mitotic figures among what is called one; 0 where nothing is."""
    tp, fp, _, _ = confusion(y, pred, weight)
    return tp / (tp + fp) if tp + fp else 0.0


def f1(y, pred, weight=None):
    """2 tp / (2 tp + fp + fn) of the mitotic class; 0 where there is neither a mitotic figure nor a
    call of one.
    """
    tp, fp, fn, _ = confusion(y, pred, weight)
    return _f1(tp, fp, fn)


def _f1(tp, fp, fn):
    return 2 * tp / (2 * tp + fp + fn) if tp + fp + fn else 0.0


def balanced_accuracy(y, pred, weight=None):
    """Mean of sensitivity and specificity; where a class is missing, the other one's alone (NaN
    where both are).
    """
    tp, fp, fn, tn = confusion(y, pred, weight)
    recalls = [a / (a + b) for a, b in ((tp, fn), (tn, fp)) if a + b]
    return float(np.mean(recalls)) if recalls else float("nan")


def weighted_f1(y, pred, weight=None):
    """Mean of both classes' F1, weighted by how often each class is there (scikit-learn's
    average="weighted").
    """
    tp, fp, fn, tn = confusion(y, pred, weight)
    n = tp + fp + fn + tn
    return (_f1(tp, fp, fn) * (tp + fn) + _f1(tn, fn, fp) * (tn + fp)) / n if n else float("nan")


# ---------------------------------------------------------------- probabilities


def brier(y, p, weight=None):
    """Mean squared difference between probability and label."""
    y, p, weight = checked(y, p, weight)
    return (
        float(np.average((p - y) ** 2, weights=weight))
        if len(y) and (weight is None or weight.any())
        else float("nan")
    )


def reliability(y, p, bins=ECE_BINS, weight=None):
    """(count, mean probability, share of mitotic figures) of `bins` equally wide bins; NaN where
    empty.
    """
    y, p, weight = checked(y, p, weight)
    if len(p) and not (0 <= p.min() and p.max() <= 1):
        raise UserError("probabilities outside 0 … 1; are these logits?")
    index = np.minimum((p * bins).astype(int), bins - 1)
    weight = np.ones(len(y)) if weight is None else weight
    count, mean, share = (np.bincount(index, w, bins) for w in (weight, weight * p, weight * y))
    with np.errstate(invalid="ignore"):
        return count, mean / count, share / count


def expected_calibration_error(y, p, bins=ECE_BINS, weight=None):
    """Mean over 15 equally wide bins, weighted by their counts, of |mean probability - share of
    mitotic figures|.
    """
    count, mean, share = reliability(y, p, bins, weight)
    return (
        float(np.nansum(count * np.abs(mean - share)) / count.sum())
        if count.sum()
        else float("nan")
    )


# ---------------------------------------------------------------- thresholds and summaries


def choose_threshold(labels, probabilities, target="f1"):
    """The threshold (p >= t is mitotic) of a rule on validation predictions → float.

    target: "f1", the highest F1 (of several the one nearest to 0.5); ("sensitivity", s), the
    highest threshold that finds the share s of the mitotic figures. It lies halfway to the next
    lower score, so that rounding of an exported model does not push the deciding patch over it. 0.5
    where a class is missing."""
    score, tp, fp = counts_by_score(labels, probabilities)
    if not len(score) or tp[-1] == 0 or fp[-1] == 0:
        return 0.5
    score = score.astype(np.float64)
    half = (score + np.r_[score[1:], min(0.0, score[-1])]) / 2
    half = np.where(half > np.r_[score[1:], -np.inf], half, score)
    if target == "f1":
        value = 2 * tp / (tp[-1] + tp + fp)
        best = np.flatnonzero(value >= value.max() - 1e-12)
        return float(half[best[np.argmin(np.abs(half[best] - 0.5))]])
    rule, share = target
    if rule != "sensitivity" or not 0 < share <= 1:
        raise ValueError(f"target {target!r}: 'f1' or ('sensitivity', share in (0, 1])")
    return float(half[np.argmax(tp >= share * tp[-1] - 1e-9)])


def decided(labels, probabilities, threshold):
    """Metrics of the decisions p >= threshold, as a dict for JSON."""
    tp, fp, fn, tn = (int(k) for k in confusion(labels, np.asarray(probabilities) >= threshold))
    n = tp + fp + fn + tn
    return {
        "threshold": float(threshold),
        "balanced_accuracy": _plain(
            (tp / (tp + fn) + tn / (tn + fp)) / 2 if tp + fn and tn + fp else np.nan
        ),
        "weighted_f1": _plain(
            (_f1(tp, fp, fn) * (tp + fn) + _f1(tn, fn, fp) * (tn + fp)) / n if n else np.nan
        ),
        "sensitivity": _plain(_ratio(tp, tp + fn)),
        "specificity": _plain(_ratio(tn, tn + fp)),
        "precision": tp / (tp + fp) if tp + fp else 0.0,
        "f1": _f1(tp, fp, fn),
        "tp": tp,
        "fp": fp,
        "fn": fn,
        "tn": tn,
    }


def _plain(value):
    return float(value) if np.isfinite(value) else None


def summarise(labels, probabilities, cases=None, threshold=0.5):
    """The metrics of one set as a dict for JSON; those that need both classes are None where one is
    missing.

    balanced_accuracy and weighted_f1 are at 0.5, as in the paper; at_0.5 and at_threshold hold the
    decisions' metrics."""
    y, p, _ = checked(labels, probabilities)
    found = {
        "n": len(y),
        "positives": int(y.sum()),
        "cases": None if cases is None else len(set(map(str, cases))),
    }
    at_half = decided(y, p, 0.5)
    return found | {
        "balanced_accuracy": at_half["balanced_accuracy"],
        "weighted_f1": at_half["weighted_f1"],
        "auroc": _plain(auroc(y, p)),
        "average_precision": _plain(average_precision(y, p)),
        "brier": _plain(brier(y, p)),
        "ece": _plain(expected_calibration_error(y, p)),
        "at_0.5": at_half,
        "at_threshold": decided(y, p, threshold),
    }


def of_predictions(columns, target="f1"):
    """metrics.json of a run: the threshold chosen on the set "val" (0.5 without one), and the
    summary of each set.

    columns: dict of equally long sequences, runs.PREDICTION_COLUMNS.
    """
    sets, case = np.asarray(columns["set"], dtype=str), np.asarray(columns["case"], dtype=str)
    label, p = np.asarray(columns["label"]), np.asarray(columns["probability"], dtype=np.float64)
    val = sets == "val"
    threshold = choose_threshold(label[val], p[val], target) if val.any() else 0.5
    found = {}
    for name in dict.fromkeys(sets.tolist()):
        rows = sets == name
        try:
            found[name] = summarise(label[rows], p[rows], case[rows], threshold)
        except UserError as error:
            raise UserError(f"set {name}: {error}") from None
    return {"threshold": threshold, "sets": found}
