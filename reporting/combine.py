"""A detector's own score and the classifier's probability as one score per candidate.

    from reporting import combine
    score = combine.product(detector, probability)

    fitted = combine.fit(detector, probability, found)     # of validation images
    score = fitted(detector, probability)                  # calibrated, of any other image

The product takes both for independent probabilities. The logistic regression weighs them as
validation images say, whatever the scale of the detector's score; what it gives is the probability
that the candidate is a mitotic figure, if the images are like those."""

from typing import NamedTuple

import numpy as np

from common import UserError
from reporting import metrics

LIMIT = 1e-6  # probabilities nearer to 0 or 1 count as this near
RIDGE = 1e-3  # of the squared weights: keeps them finite where a score separates everything
STEPS = 100  # of Newton's method, which needs some ten


class Logistic(NamedTuple):
    """A fitted combination: the probability is 1 / (1 + exp(-z)) of z = bias + a · detector +
    b · classifier, after both were brought to mean 0 and deviation 1 of the validation candidates.
    """

    weights: np.ndarray  # [3]: bias, detector, classifier
    mean: np.ndarray  # [2]
    deviation: np.ndarray  # [2]
    log_odds: bool  # the detector's scores are probabilities, of which the log odds count

    def __call__(self, detector, probability):
        """Calibrated probability of each candidate, float64 [n]; UserError: scores that are none,
        or that are no probabilities while those of the fit were.
        """
        both = (columns(detector, probability, self.log_odds) - self.mean) / self.deviation
        return sigmoid(self.weights[0] + both @ self.weights[1:])


def product(detector, probability):
    """Detector's score × classifier's probability, [n]; UserError if one is not from 0 to 1."""
    detector, probability = checked(detector, probability)
    if not are_probabilities(detector):
        raise UserError(
            "the product of both scores needs a detector's scores from 0 to 1; these go from "
            f"{detector.min():g} to {detector.max():g}: combine them by logistic regression"
        )
    return detector * probability


def fit(detector, probability, found):
    """The Logistic of validation candidates.

    detector, probability  of each candidate [n]; the detector's may have any scale
    found                  bool [n]: which candidates are mitotic figures

    UserError: there are not candidates of both kinds."""
    found = np.asarray(found, bool)
    log_odds = are_probabilities(checked(detector, probability)[0])
    both = columns(detector, probability, log_odds)
    if found.all() or not found.any():
        raise UserError(
            "the combination of both scores needs validation candidates that are mitotic figures "
            f"and others that are not; of {len(found)} there are {int(found.sum())}"
        )
    mean, deviation = both.mean(axis=0), both.std(axis=0)
    deviation = np.where(deviation > 0, deviation, 1.0)
    design = np.column_stack([np.ones(len(found)), (both - mean) / deviation])
    ridge = RIDGE * np.array([0.0, 1.0, 1.0])
    weights = np.zeros(3)
    for _ in range(STEPS):
        p = sigmoid(design @ weights)
        gradient = design.T @ (p - found) + ridge * weights
        curvature = (design * (p * (1 - p))[:, None]).T @ design + np.diag(ridge)
        step = np.linalg.solve(curvature + 1e-12 * np.eye(3), gradient)
        # Far from the optimum a whole step may overshoot: halve it until the loss falls.
        before = loss(design, found, weights, ridge)
        while loss(design, found, weights - step, ridge) > before and np.abs(step).max() > 1e-12:
            step = step / 2
        weights = weights - step
        if np.abs(step).max() < 1e-10:
            break
    return Logistic(weights, mean, deviation, log_odds)


def loss(design, found, weights, ridge):
    """Negative log likelihood, with the penalty of the weights."""
    z = design @ weights
    return float((np.logaddexp(0, z) - found * z).sum() + (ridge * weights**2).sum() / 2)


def columns(detector, probability, log_odds):
    """What the regression sees of both scores: float64 [n, 2]."""
    detector, probability = checked(detector, probability)
    if log_odds:
        if not are_probabilities(detector):
            raise UserError(
                "the detector's scores of the validation candidates lie between 0 and 1, these go "
                f"from {detector.min():g} to {detector.max():g}: scores of one detector are needed"
            )
        detector = metrics.logit(detector, LIMIT)
    return np.column_stack([detector, metrics.logit(probability, LIMIT)])


def checked(detector, probability):
    """Both scores as float64 [n]; UserError: a score is no number or the second no probability."""
    detector, probability = (np.asarray(v, np.float64) for v in (detector, probability))
    if detector.ndim != 1 or detector.shape != probability.shape:
        raise ValueError(
            f"one score of the detector per probability is needed, not {detector.shape} and "
            f"{probability.shape}"
        )
    if not np.isfinite(detector).all():
        raise UserError("a candidate has no score of the detector's, or one that is no number")
    if not are_probabilities(probability):
        raise UserError("a candidate has no probability from 0 to 1; score it with classify.py")
    return detector, probability


def are_probabilities(values):
    return bool(((values >= 0) & (values <= 1)).all())


def sigmoid(z):
    return np.exp(-np.logaddexp(0, -z))
