"""Two scores as one: the logistic regression against scikit-learn, calibration, and bad input."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from common import UserError
from reporting import combine


def candidates(n=2000, seed=0):
    """A detector and a classifier that see different things: scores [n] and the truth."""
    rng = np.random.default_rng(seed)
    truth = rng.random(n) < 0.2
    detector = combine.sigmoid(rng.normal(truth * 1.5 - 1, 1))
    probability = combine.sigmoid(rng.normal(truth * 2.5 - 2, 1.2))
    return detector, probability, truth


def test_the_fit_equals_scikit_learns():
    detector, probability, truth = candidates()
    for scores, kind in ((detector, True), (5 * detector - 2, False)):
        fitted = combine.fit(scores, probability, truth)
        assert fitted.log_odds == kind
        columns = combine.columns(scores, probability, kind)
        scaled = (columns - columns.mean(axis=0)) / columns.std(axis=0)
        # scikit-learn's C is the inverse of the weight of |w|² / 2.
        reference = LogisticRegression(C=1 / combine.RIDGE, tol=1e-10, max_iter=1000)
        expected = reference.fit(scaled, truth).predict_proba(scaled)[:, 1]
        assert np.allclose(fitted(scores, probability), expected, atol=1e-6)


def test_the_combination_is_calibrated_and_better_than_either():
    fitted = combine.fit(*candidates(20_000, seed=1))
    detector, probability, truth = candidates(20_000, seed=2)
    p = fitted(detector, probability)
    for low in np.arange(0, 1, 0.2):
        among = (low <= p) & (p < low + 0.2)
        assert truth[among].mean() == pytest.approx(p[among].mean(), abs=0.05)

    def auroc(score):
        order = np.argsort(np.argsort(score))
        positive = truth.sum()
        return (order[truth].sum() - positive * (positive - 1) / 2) / positive / (~truth).sum()

    assert auroc(p) > max(auroc(detector), auroc(probability)) + 0.01
    assert auroc(combine.product(detector, probability)) > auroc(detector)


def test_scores_that_separate_everything_keep_finite_weights():
    score, probability = np.array([0.1, 0.2, 0.8, 0.9]), np.array([0.01, 0.2, 0.9, 0.99])
    truth = np.array([False, False, True, True])
    fitted = combine.fit(score, probability, truth)
    assert np.isfinite(fitted.weights).all()
    assert ((fitted(score, probability) > 0.5) == truth).all()
    constant = combine.fit(np.ones(4), probability, truth)  # a detector that always says 1
    assert np.isfinite(constant.weights).all()


def test_the_product():
    assert combine.product([0.5, 1.0], [0.5, 0.2]).tolist() == [0.25, 0.2]
    assert len(combine.product([], [])) == 0


def test_scores_that_cannot_be_combined():
    truth = np.array([True, False])
    fitted = combine.fit([0.5, 0.2], [0.5, 0.2], truth)
    for call, says in (
        (lambda: combine.product([3.0], [0.5]), "from 0 to 1"),
        (lambda: combine.product([np.nan], [0.5]), "no score"),
        (lambda: combine.product([0.5], [1.5]), "score it with classify.py"),
        (lambda: combine.fit([0.5, 0.2], [0.5, 0.2], [True, True]), "are mitotic figures"),
        (lambda: combine.fit([], [], []), "of 0 there are 0"),
        (lambda: fitted([3.0], [0.5]), "scores of one detector"),
    ):
        with pytest.raises(UserError, match=says):
            call()
    with pytest.raises(ValueError, match="per probability"):
        combine.product([0.5], [0.5, 0.2])
