"""The metrics against scikit-learn and against loops that follow the definitions word by word."""

import json
import warnings

import numpy as np
import pytest
import sklearn.metrics as reference

from common import UserError
from reporting import metrics

PROBLEMS = 1000
NEAR = 1e-12


def problem(k):
    """(labels, probabilities, weights or None): of 1 to 200 patches, with ties, weights of zero,
    single classes.
    """
    rng = np.random.default_rng([5, k])
    n = int(rng.integers(1, 201))
    p = rng.random(n)
    if k % 3:
        p = np.round(p, 1 + k % 2)  # few different values, 0 and 1 among them
    y = (rng.random(n) < rng.choice([0.05, 0.4, 0.9])).astype(int)
    if k % 10 == 7:
        y[:] = k // 10 % 2
    weight = None
    if k % 2:
        weight = (
            rng.integers(0, 4, n).astype(float)
            if k % 4 == 1
            else rng.random(n) * (rng.random(n) < 0.7)
        )
    return y, p, weight


@pytest.fixture(scope="module")
def problems():
    return [problem(k) for k in range(PROBLEMS)]


def holds(y, weight, label):
    """Whether a class is there with any weight."""
    return bool((y == label).any() if weight is None else weight[y == label].sum() > 0)


def compared(problems, ours, theirs, needs):
    """Largest difference over the problems in which the needed classes are there, and how many
    those were.

    Elsewhere ours must be NaN: that is what `needs` says.
    """
    worst, defined = 0.0, 0
    for y, p, weight in problems:
        if all(any(holds(y, weight, label) for label in group) for group in needs):
            worst = max(worst, abs(ours(y, p, weight) - theirs(y, p, weight)))
            defined += 1
        else:
            assert np.isnan(ours(y, p, weight))
    assert not np.isnan(worst) and defined > 0.7 * PROBLEMS
    return worst


def weighed(problems):
    """Those in which anything has a weight; scikit-learn refuses the others."""
    return [one for one in problems if holds(one[0], one[2], 0) or holds(one[0], one[2], 1)]


BOTH, POSITIVE, NEGATIVE, ANY = ((0,), (1,)), ((1,),), ((0,),), ((0, 1),)


def test_the_problems_hold_every_special_case(problems):
    assert sum(len(set(y.tolist())) == 1 for y, _, _ in problems) > 90
    assert sum(len(set(p.tolist())) < len(p) for _, p, _ in problems) > 500
    assert sum(weight is not None and (weight == 0).any() for _, _, weight in problems) > 400
    # a class that is there, but with weights of zero alone
    assert any(
        weight is not None and (y == 1).any() and not holds(y, weight, 1)
        for y, _, weight in problems
    )


def test_auroc_equals_scikit_learn(problems):
    def theirs(y, p, weight):
        return reference.roc_auc_score(y, p, sample_weight=weight)

    assert compared(problems, metrics.auroc, theirs, BOTH) <= NEAR


def test_auroc_of_logits_in_single_precision_and_of_infinite_scores_equals_scikit_learn(problems):
    for y, p, weight in problems[:200]:
        if holds(y, weight, 0) and holds(y, weight, 1):
            logit = np.log((p.astype(np.float32) + 1e-6) / (1 - p + 1e-3)).astype(np.float32)
            wanted = reference.roc_auc_score(y, logit, sample_weight=weight)
            assert abs(metrics.auroc(y, logit, weight) - wanted) <= NEAR
    # scikit-learn refuses infinite scores; their ranks are those of large ones
    y, score = np.array([1, 0, 1, 0, 1]), np.array([np.inf, -np.inf, -np.inf, 0.0, 3.0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert metrics.auroc(y, score) == reference.roc_auc_score(y, [9, -9, -9, 0, 3])
        assert metrics.auroc(y, score, np.ones(5)) == reference.roc_auc_score(y, [9, -9, -9, 0, 3])


def test_auroc_of_a_rare_and_of_a_frequent_class_counts_every_pair():
    rng = np.random.default_rng(0)
    for share in (0.02, 0.98):
        y, p = rng.random(400) < share, np.round(rng.random(400), 2)
        pairs = p[y][:, None] - p[~y][None]
        wanted = ((pairs > 0) + 0.5 * (pairs == 0)).mean()
        assert abs(metrics.auroc(y, p) - wanted) <= NEAR
        assert abs(metrics.auroc(y, p, np.ones(400)) - wanted) <= NEAR


def test_average_precision_equals_scikit_learn(problems):
    def theirs(y, p, weight):
        return reference.average_precision_score(y, p, sample_weight=weight)

    assert compared(problems, metrics.average_precision, theirs, POSITIVE) <= NEAR


def at_half(function):
    return lambda y, p, weight: function(y, p >= 0.5, weight)


def test_balanced_accuracy_equals_scikit_learn_also_with_a_single_class(problems):
    def theirs(y, p, weight):
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # it warns of the missing class, and takes the other one alone
            return reference.balanced_accuracy_score(y, p >= 0.5, sample_weight=weight)

    assert compared(problems, at_half(metrics.balanced_accuracy), theirs, ANY) <= NEAR


def test_weighted_f1_equals_scikit_learn(problems):
    def theirs(y, p, weight):
        return reference.f1_score(
            y, p >= 0.5, sample_weight=weight, average="weighted", zero_division=0, labels=[0, 1]
        )

    assert compared(problems, at_half(metrics.weighted_f1), theirs, ANY) <= NEAR


def test_accuracy_and_kappa_equal_scikit_learn(problems):
    def accuracy(y, p, weight):
        return reference.accuracy_score(y, p >= 0.5, sample_weight=weight)

    assert compared(problems, at_half(metrics.accuracy), accuracy, ANY) <= NEAR
    undefined = 0
    for y, p, weight in weighed(problems):
        found = metrics.cohen_kappa(y, p >= 0.5, weight)
        if np.isnan(found):  # labels and decisions are all of one class
            tp, fp, fn, tn = metrics.confusion(y, p >= 0.5, weight)
            assert max(tp, tn) == tp + fp + fn + tn
            undefined += 1
            continue
        wanted = reference.cohen_kappa_score(y, p >= 0.5, sample_weight=weight, labels=[0, 1])
        assert abs(found - wanted) <= NEAR
    assert 0 < undefined < 0.3 * PROBLEMS
    assert metrics.cohen_kappa([0, 0, 1, 1], [1, 1, 0, 0]) == -1
    assert metrics.cohen_kappa([0, 0, 1, 1], [0, 1, 0, 1]) == 0


def test_sensitivity_and_specificity_equal_scikit_learn(problems):
    for ours, label, needs in (
        (metrics.sensitivity, 1, POSITIVE),
        (metrics.specificity, 0, NEGATIVE),
    ):

        def theirs(y, p, weight):
            return reference.recall_score(
                y, p >= 0.5, pos_label=label, sample_weight=weight, zero_division=0
            )

        assert compared(problems, at_half(ours), theirs, needs) <= NEAR


def test_precision_and_f1_of_the_mitotic_class_equal_scikit_learn(problems):
    for ours, theirs in (
        (metrics.precision, reference.precision_score),
        (metrics.f1, reference.f1_score),
    ):
        for y, p, weight in weighed(problems):
            wanted = theirs(y, p >= 0.5, sample_weight=weight, zero_division=0)
            assert abs(ours(y, p >= 0.5, weight) - wanted) <= NEAR


def test_confusion_equals_scikit_learn(problems):
    for y, p, weight in weighed(problems):
        tn, fp, fn, tp = reference.confusion_matrix(
            y, p >= 0.5, sample_weight=weight, labels=[0, 1]
        ).ravel()
        assert np.allclose(
            metrics.confusion(y, p >= 0.5, weight), (tp, fp, fn, tn), rtol=0, atol=NEAR * 200
        )


def test_brier_equals_scikit_learn(problems):
    def theirs(y, p, weight):
        return reference.brier_score_loss(y, p, sample_weight=weight, pos_label=1)

    assert compared(problems, metrics.brier, theirs, ANY) <= NEAR


def ece_by_loop(y, p, weight, bins):
    total, error = 0.0, 0.0
    weight = np.ones(len(y)) if weight is None else weight
    for k in range(bins):
        # [k/bins, (k+1)/bins), the last one closed; as p * bins, which is how the borders are
        # rounded
        own = [
            i for i in range(len(y)) if k <= p[i] * bins < k + 1 or (k == bins - 1 and p[i] == 1)
        ]
        mass = sum(weight[i] for i in own)
        if mass:
            mean = sum(weight[i] * p[i] for i in own) / mass
            share = sum(weight[i] * y[i] for i in own) / mass
            error += mass * abs(mean - share)
        total += mass
    return error / total if total else float("nan")


@pytest.mark.parametrize("bins", [15, 7])
def test_calibration_error_equals_a_loop_over_bins(problems, bins):
    def ours(y, p, weight):
        return metrics.expected_calibration_error(y, p, bins, weight)

    def theirs(y, p, weight):
        return ece_by_loop(y, p, weight, bins)

    assert compared(problems, ours, theirs, ANY) <= NEAR


def test_calibration_of_what_is_known_by_hand():
    assert metrics.expected_calibration_error([0, 1], [0.0, 1.0]) == 0
    assert metrics.expected_calibration_error([1, 0], [0.0, 1.0]) == 1
    # one bin: 0.32 on average, a quarter mitotic
    assert abs(metrics.expected_calibration_error([1, 0, 0, 0], [0.32] * 4) - 0.07) < NEAR
    count, mean, share = metrics.reliability([1, 0, 1], [0.05, 0.15, 1.0], 10)
    assert count.tolist() == [1, 1, 0, 0, 0, 0, 0, 0, 0, 1]
    assert np.isnan(mean[2]) and np.isnan(share[2]) and share[[0, 1, 9]].tolist() == [1, 0, 1]
    with pytest.raises(UserError, match="logits"):
        metrics.expected_calibration_error([0, 1], [-2.0, 3.0])


def test_a_missing_class_is_not_a_number_where_it_is_needed():
    nan = np.isnan
    for y in ([1, 1, 1], [0, 0, 0]):
        assert nan(metrics.auroc(y, [0.1, 0.5, 0.9])) and nan(
            metrics.auroc(y, [0.1, 0.5, 0.9], [1, 1, 1])
        )
    assert (
        nan(metrics.average_precision([0, 0], [0.1, 0.9]))
        and metrics.average_precision([1, 1], [0.1, 0.9]) == 1
    )
    assert nan(metrics.sensitivity([0, 0], [0, 1])) and nan(metrics.specificity([1, 1], [0, 1]))
    assert metrics.precision([1, 0], [0, 0]) == 0 and metrics.f1([0, 0], [0, 0]) == 0
    assert metrics.balanced_accuracy([1, 1, 1, 1], [1, 1, 1, 0]) == 0.75
    assert metrics.weighted_f1([0, 0], [0, 0]) == 1


def test_no_predictions_at_all_are_not_a_number():
    for function in (
        metrics.auroc,
        metrics.average_precision,
        metrics.brier,
        metrics.expected_calibration_error,
        metrics.balanced_accuracy,
        metrics.weighted_f1,
        metrics.sensitivity,
        metrics.specificity,
    ):
        assert np.isnan(function([], [])), function
    assert metrics.precision([], []) == metrics.f1([], []) == 0


RANKING = (metrics.auroc, metrics.average_precision)
PROBABILITY = (metrics.brier, metrics.expected_calibration_error)
DECISION = (
    metrics.balanced_accuracy,
    metrics.weighted_f1,
    metrics.sensitivity,
    metrics.specificity,
    metrics.precision,
    metrics.f1,
)


@pytest.mark.parametrize("function", RANKING + PROBABILITY + DECISION, ids=lambda f: f.__name__)
def test_nan_is_refused_in_all(function):
    with pytest.raises(UserError, match="1 of 3 .* are NaN"):
        function([0, 1, 1], [0.0, np.nan, 1.0])
    with pytest.raises(UserError, match="a label is nan"):
        function([0, 1, np.nan], [0.0, 1.0, 1.0])
    with pytest.raises(UserError, match="a label is 2"):
        function([0, 1, 2], [0.0, 1.0, 1.0])
    for weight in ([1, 1, np.nan], [1, 1, -1], [1, 1, np.inf]):
        with pytest.raises(UserError, match="weights hold"):
            function([0, 1, 1], [0.0, 1.0, 1.0], weight=weight)
    with pytest.raises(ValueError, match="equally long"):
        function([0, 1, 1], [0.0, 1.0])
    with pytest.raises(ValueError, match="weights of shape"):
        function([0, 1], [0.0, 1.0], weight=[1.0])


def test_decisions_are_zero_or_one():
    with pytest.raises(UserError, match="0.7"):
        metrics.balanced_accuracy([0, 1, 1], [0.0, 0.7, 1.0])


# ---------------------------------------------------------------- thresholds


def f1_by_hand(y, p, t):
    tp, fp, fn = (
        np.sum((p >= t) & (y == 1)),
        np.sum((p >= t) & (y == 0)),
        np.sum((p < t) & (y == 1)),
    )
    return 2 * tp / (2 * tp + fp + fn)


def test_the_threshold_of_the_best_f1_equals_brute_force(problems):
    several = 0
    for y, p, _ in problems:
        if len(set(y.tolist())) < 2:
            assert metrics.choose_threshold(y, p) == 0.5
            continue
        found = metrics.choose_threshold(y, p)
        values = {score: f1_by_hand(y, p, score) for score in np.unique(p)}
        best = max(values.values())
        assert abs(f1_by_hand(y, p, found) - best) <= NEAR
        # Of several: the one whose middle between its score and the next lower one is nearest to
        # 0.5.
        scores = sorted(values)
        middles = [
            (s + (scores[i - 1] if i else min(0, s))) / 2
            for i, s in enumerate(scores)
            if values[s] >= best - NEAR
        ]
        several += len(middles) > 1
        assert min(abs(m - 0.5) for m in middles) == abs(found - 0.5)
        # Halfway: a score that moves by rounding stays on its side.
        assert not len(p[p == found]) or found == 0
    assert several > 10


def test_the_threshold_of_the_best_balanced_accuracy_equals_brute_force(problems):
    several = 0
    for y, p, _ in problems:
        if len(set(y.tolist())) < 2:
            assert metrics.choose_threshold(y, p, "balanced") == 0.5
            continue
        found = metrics.choose_threshold(y, p, "balanced")
        positives, negatives = int(y.sum()), int((1 - y).sum())
        gain = {}  # sensitivity - (1 - specificity), as a whole number
        for score in np.unique(p).tolist():
            tp, fp = np.sum((p >= score) & (y == 1)), np.sum((p >= score) & (y == 0))
            gain[score] = int(tp) * negatives - int(fp) * positives
        best = max(gain.values())
        tp, fp = np.sum((p >= found) & (y == 1)), np.sum((p >= found) & (y == 0))
        assert int(tp) * negatives - int(fp) * positives == best
        # Of several the nearest to 0.5, of two equally near ones the higher.
        scores = sorted(gain)
        middles = [
            (score + (scores[i - 1] if i else min(0, score))) / 2
            for i, score in enumerate(scores)
            if gain[score] == best
        ]
        several += len(middles) > 1
        nearest = min(abs(middle - 0.5) for middle in middles)
        assert found == max(middle for middle in middles if abs(middle - 0.5) == nearest)
    assert several > 10
    # Imbalanced and shifted: 0.5 finds nothing, the threshold everything.
    y, p = np.array([0] * 8 + [1] * 2), np.array([0.1] * 8 + [0.3] * 2)
    assert metrics.balanced_accuracy(y, p >= 0.5) == 0.5
    assert metrics.choose_threshold(y, p, "balanced") == 0.2
    # 0.25 and 0.75 are equally good and equally near to 0.5.
    p = [0.125, 0.375, 0.625, 0.875]
    assert metrics.choose_threshold([0, 1, 0, 1], p, "balanced") == 0.75


def test_the_text_of_a_rule():
    for text, target in (
        ("f1", "f1"),
        ("balanced", "balanced"),
        ("sensitivity=0.9", ("sensitivity", 0.9)),
        ("0.25", 0.25),
    ):
        assert metrics.parse_threshold(text, rules=True) == target
    assert metrics.choose_threshold([0, 1], [0.4, 0.6], 0.25) == 0.25
    assert metrics.choose_threshold([], [], 0.25) == 0.25
    assert metrics.describe_rule("balanced") == "of the best balanced accuracy on validation"
    assert metrics.describe_rule("sensitivity=0.9") == "that finds 90% of class 1 on validation"
    assert metrics.describe_rule("0.25") == "given as 0.25"
    for text in ("balance", "sensitivity=0", "sensitivity=nan", "1", "nan", ""):
        with pytest.raises(UserError, match="--threshold-rule .*: give .*balanced"):
            metrics.parse_threshold(text, rules=True, flag="--threshold-rule")
    with pytest.raises(UserError, match="give a probability between 0 and 1$"):
        metrics.parse_threshold("balanced")


def test_the_threshold_of_a_sensitivity_is_the_highest_that_reaches_it(problems):
    for k, (y, p, _) in enumerate(problems):
        if len(set(y.tolist())) < 2:
            continue
        share = (0.5, 0.9, 0.95, 1.0)[k % 4]
        found = metrics.choose_threshold(y, p, ("sensitivity", share))
        positives = y.sum()
        assert np.sum((p >= found) & (y == 1)) >= share * positives - 1e-9
        higher = np.unique(p[p >= found])[1:]  # predicting from the next higher score on
        assert not len(higher) or np.sum((p >= higher[0]) & (y == 1)) < share * positives
    with pytest.raises(ValueError, match="target"):
        metrics.choose_threshold([0, 1], [0.1, 0.9], ("sensitivity", 0))
    with pytest.raises(ValueError, match="target"):
        metrics.choose_threshold([0, 1], [0.1, 0.9], ("specificity", 0.9))


def test_the_threshold_separates_scores_that_differ_in_the_last_digit():
    low = 0.3
    high = np.nextafter(low, 1)
    t = metrics.choose_threshold([0, 0, 1, 1], [low, low, high, high])
    assert ([low, high] >= np.float64(t)).tolist() == [False, True]


# ---------------------------------------------------------------- summaries


def test_a_summary_equals_scikit_learn_and_is_plain_json():
    rng = np.random.default_rng(3)
    y, p, cases = rng.integers(0, 2, 300), np.round(rng.random(300), 2), rng.integers(0, 9, 300)
    found = json.loads(json.dumps(metrics.summarise(y, p, cases, 0.37)))
    assert (found["n"], found["positives"], found["cases"]) == (300, y.sum(), 9)
    for key, wanted in (
        ("balanced_accuracy", reference.balanced_accuracy_score(y, p >= 0.5)),
        ("weighted_f1", reference.f1_score(y, p >= 0.5, average="weighted")),
        ("auroc", reference.roc_auc_score(y, p)),
        ("brier", reference.brier_score_loss(y, p)),
        ("average_precision", reference.average_precision_score(y, p)),
        ("ece", ece_by_loop(y, p, None, 15)),
    ):
        assert abs(found[key] - wanted) <= NEAR, key
    for part, t in (("at_0.5", 0.5), ("at_threshold", 0.37)):
        own, pred = found[part], p >= t
        assert own["threshold"] == t
        for key, wanted in (
            ("balanced_accuracy", reference.balanced_accuracy_score(y, pred)),
            ("weighted_f1", reference.f1_score(y, pred, average="weighted")),
            ("sensitivity", reference.recall_score(y, pred)),
            ("specificity", reference.recall_score(y, pred, pos_label=0)),
            ("precision", reference.precision_score(y, pred)),
            ("f1", reference.f1_score(y, pred)),
        ):
            assert abs(own[key] - wanted) <= NEAR, (part, key)
        assert [own[k] for k in ("tn", "fp", "fn", "tp")] == reference.confusion_matrix(
            y, pred
        ).ravel().tolist()


def test_a_summary_of_one_class_says_none():
    found = metrics.summarise([1, 1], [0.2, 0.9])
    assert (
        found["auroc"] is None
        and found["balanced_accuracy"] is None
        and found["at_0.5"]["specificity"] is None
    )
    assert (
        found["average_precision"] == 1
        and found["at_0.5"]["sensitivity"] == 0.5
        and found["cases"] is None
    )
    found = metrics.summarise([0, 0], [0.2, 0.3])
    assert found["average_precision"] is None and found["at_0.5"]["sensitivity"] is None
    # 1.000 for whoever calls everything a look-alike: nothing to be proud of
    assert metrics.weighted_f1([0, 0], [0, 0]) == 1
    for part in (found, found["at_0.5"], found["at_threshold"]):
        assert part["weighted_f1"] is None and part["balanced_accuracy"] is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert metrics.summarise([], [])["weighted_f1"] is None


def predictions():
    rng = np.random.default_rng(4)
    label = rng.integers(0, 2, 90)
    p = np.clip(0.2 + 0.3 * label + 0.3 * rng.random(90), 0, 1)
    return {
        "set": np.repeat(["val", "test", "B"], 30),
        "case": np.repeat(list("abcdef"), 15),
        "label": label,
        "probability": p,
    }


def test_the_threshold_of_a_run_is_chosen_on_validation_alone():
    columns = predictions()
    found = metrics.of_predictions(columns)
    t = metrics.choose_threshold(columns["label"][:30], columns["probability"][:30])
    assert found["threshold"] == t and list(found["sets"]) == ["val", "test", "B"]
    for name, rows in (("val", slice(30)), ("test", slice(30, 60)), ("B", slice(60, 90))):
        y, p = columns["label"][rows], columns["probability"][rows]
        assert found["sets"][name]["at_threshold"]["f1"] == pytest.approx(
            f1_by_hand(y, p, t), abs=NEAR
        )
        assert found["sets"][name]["auroc"] == pytest.approx(
            reference.roc_auc_score(y, p), abs=NEAR
        )
        assert found["sets"][name]["cases"] == 2
    columns["probability"] = columns["probability"].copy()
    columns["probability"][30:] = (
        1 - columns["probability"][30:]
    )  # other test predictions, the same threshold
    assert metrics.of_predictions(columns)["threshold"] == t
    assert (
        metrics.of_predictions({key: values[30:] for key, values in columns.items()})["threshold"]
        == 0.5
    )


def test_nan_in_one_set_of_a_run_is_named():
    columns = predictions()
    columns["probability"][70] = np.nan
    with pytest.raises(UserError, match="set B: 1 of 30 probabilities are NaN"):
        metrics.of_predictions(columns)
