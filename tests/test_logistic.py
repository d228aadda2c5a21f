"""The probes' solver against SciPy on the formulas as published, and against scikit-learn."""

import functools

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler

import logistic


def problem(n, d, sharpness, prevalence, seed=0):
    """Features with variances over four orders of magnitude and a common offset, as embeddings have
    them.
    """
    rng = np.random.default_rng(seed)
    Z = rng.normal(size=(n, d)) * np.logspace(1, -1, d)
    X = Z @ np.linalg.qr(rng.normal(size=(d, d)))[0] + rng.normal(size=d) * 2
    z = Z @ (rng.normal(size=d) / np.logspace(1, -0.5, d))
    z = z / z.std() * sharpness
    z -= np.quantile(z, 1 - prevalence)
    y = (z > 0) if sharpness > 100 else (1 / (1 + np.exp(-z)) > rng.random(n))
    y[:2] = [False, True]
    return X.astype(np.float32), y.astype(int)


PROBLEMS = {
    "balanced": (1500, 48, 2, 0.5),
    "one to twenty": (3000, 48, 2, 0.05),
    "separable": (600, 48, 1000, 0.5),
    "d > n": (150, 300, 4, 0.5),
    "13 samples": (13, 96, 4, 0.4),
}


def two_row_objective(theta, X, y, C):
    """UNI's formula as it stands: softmax cross-entropy over Linear(d, 2) + 1/C * 1/2 * |W|, and
    its gradient.
    """
    n, d = X.shape
    W, b = theta[: 2 * d].reshape(2, d), theta[2 * d :]
    z = X @ W.T + b
    z = z - z.max(1, keepdims=True)
    logp = z - np.log(np.exp(z).sum(1, keepdims=True))
    residual = (np.exp(logp) - np.eye(2)[y]) / n
    norm = np.linalg.norm(W)
    gradient = residual.T @ X + 0.5 / C * W / max(norm, 1e-300)
    return -logp[np.arange(n), y].mean() + 0.5 / C * norm, np.append(
        gradient.ravel(), residual.sum(0)
    )


@functools.cache
def scipy_optimum(name):
    """(loss, logits) of the formula's optimum for one of the problems."""
    X, y = problem(*PROBLEMS[name])
    X, d = X.astype(np.float64), X.shape[1]
    C = 2 * d / 100
    best = None
    theta = np.random.default_rng(1).normal(size=2 * d + 2) * 1e-3
    for _ in range(
        8
    ):  # restarts clear L-BFGS-B's memory: it stops early on ill-conditioned features
        best = minimize(
            two_row_objective,
            theta,
            args=(X, y, C),
            jac=True,
            method="L-BFGS-B",
            options={"maxiter": 20000, "maxfun": 40000, "ftol": 1e-16, "gtol": 1e-11, "maxcor": 60},
        )
        theta = best.x
    W = theta[: 2 * d].reshape(2, d)
    return best.fun, X @ (W[1] - W[0]) + theta[-1] - theta[-2]


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("dtype, allowed", [(torch.float32, 1e-6), (torch.float64, 1e-8)])
def test_uni_probe_reaches_an_independent_optimum(name, dtype, allowed):
    X, y = problem(*PROBLEMS[name])
    C = logistic.uni_C(X.shape[1])
    result = logistic.fit(X, y, [(np.arange(len(y)), None)], "uni", dtype=dtype)[0]
    optimum, logits = scipy_optimum(name)
    theta = np.concatenate(
        [-result.weight / 2, result.weight / 2, [-result.bias / 2, result.bias / 2]]
    )
    loss = two_row_objective(theta, X.astype(np.float64), y, C)[0]
    assert loss - optimum <= allowed
    assert abs(loss - result.loss) < 1e-6  # the loss it reports is the loss of the formula
    assert result.converged and result.iterations > 3
    own = X @ result.weight + result.bias
    assert abs(roc_auc_score(y, own) - roc_auc_score(y, logits)) <= 1e-4
    clear = np.abs(1 / (1 + np.exp(-logits)) - 0.5) > 1e-3
    assert ((own > 0) == (logits > 0))[clear].all()


def test_uni_C_is_the_published_one():
    assert logistic.uni_C(1024) == 1024 * 2 / 100


def test_uni_probe_knows_the_zero_solution():
    """Where the norm outweighs the data w = 0 is the optimum, and the bias is the log-odds of the
    classes.
    """
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(200, 4)).astype(np.float32) * 1e-3, np.repeat([0, 1], [150, 50])
    result = logistic.fit(X, y, [(np.arange(200), None)], "uni")[0]
    assert not result.weight.any() and result.converged
    assert result.bias == pytest.approx(np.log(50 / 150), abs=1e-6)


def l2_loss(weight, bias, X, y, C):
    z = X.astype(np.float64) @ weight + bias
    return np.logaddexp(0, (1 - 2 * y) * z).mean() + weight @ weight / (2 * C * len(y))


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("C", [0.01, 1.0])
@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("dtype, far", [(torch.float32, 2e-2), (torch.float64, 2e-4)])
def test_l2_equals_scikit_learn(name, C, standardize, dtype, far):
    X, y = problem(*PROBLEMS[name])
    result = logistic.fit(
        X, y, [(np.arange(len(y)), C)], "l2", standardize=standardize, dtype=dtype
    )[0]
    Z = X.astype(np.float64)
    scaler = StandardScaler().fit(Z) if standardize else None
    Z = scaler.transform(Z) if standardize else Z
    reference = LogisticRegression(C=C, solver="newton-cholesky", tol=1e-12, max_iter=1000).fit(
        Z, y
    )
    weight, bias = result.weight, result.bias
    if standardize:
        bias, weight = bias + scaler.mean_ @ weight, weight * scaler.scale_
    reference_loss = l2_loss(reference.coef_[0], reference.intercept_[0], Z, y, C)
    assert abs(l2_loss(weight, bias, Z, y, C) - reference_loss) <= 1e-8
    np.testing.assert_allclose(Z @ weight + bias, reference.decision_function(Z), atol=far)


@pytest.mark.parametrize("name", ["one to twenty", "13 samples", "d > n"])
@pytest.mark.parametrize("standardize", [False, True])
def test_balanced_classes_equal_scikit_learn(name, standardize):
    X, y = problem(*PROBLEMS[name])
    C = 0.1
    ours = logistic.fit(
        X,
        y,
        [(np.arange(len(y)), C)],
        "l2",
        standardize,
        dtype=torch.float64,
        class_weight="balanced",
    )[0]
    Z = X.astype(np.float64)
    scaler = StandardScaler().fit(Z)  # of the rows as they are: the weights belong to the loss
    if standardize:
        Z = scaler.transform(Z)
    reference = LogisticRegression(
        C=C, class_weight="balanced", solver="newton-cholesky", tol=1e-12, max_iter=1000
    ).fit(Z, y)
    logits = X.astype(np.float64) @ ours.weight + ours.bias
    np.testing.assert_allclose(logits, reference.decision_function(Z), atol=2e-4)
    # The loss that is reported is the objective as scikit-learn states it, divided by C n.
    n = len(y)
    weight = n / (2 * np.bincount(y))[y]
    loss = (weight * np.logaddexp(0, (1 - 2 * y) * logits)).mean()
    loss += (reference.coef_**2).sum() / (2 * C * n)
    assert ours.loss == pytest.approx(loss, abs=1e-7)


def test_balanced_classes_are_repeated_rows():
    """Of both penalties: 20 of one class and 60 of the other, or the 20 three times."""
    X, y = problem(400, 12, 2, 0.5)
    rows = np.concatenate([np.flatnonzero(y == 1)[:20], np.flatnonzero(y == 0)[:60]])
    repeated = np.concatenate([rows[:20], rows[:20], rows])
    for penalty, C, scaled in (("uni", None, None), ("l2", 1.0, 80 / 120)):
        weighted = logistic.fit(
            X, y, [(rows, C)], penalty, dtype=torch.float64, class_weight="balanced"
        )[0]
        plain = logistic.fit(X, y, [(repeated, scaled)], penalty, dtype=torch.float64)[0]
        np.testing.assert_allclose(weighted.weight, plain.weight, atol=2e-5)
        assert weighted.bias == pytest.approx(plain.bias, abs=2e-4)


def test_problems_side_by_side_equal_single_ones():
    X, y = problem(900, 40, 2, 0.4)
    rng = np.random.default_rng(3)
    problems = [
        (np.sort(rng.permutation(900)[:size]), C)
        for size in (60, 300, 320, 700)
        for C in (0.01, 0.1, 3.0)
    ]
    together = logistic.fit(X, y, problems, "l2", dtype=torch.float64)
    for (rows, C), result in zip(problems, together):
        alone = logistic.fit(
            X[rows], y[rows], [(np.arange(len(rows)), C)], "l2", dtype=torch.float64
        )[0]
        assert abs(alone.loss - result.loss) < 1e-10
        np.testing.assert_allclose(
            X @ result.weight + result.bias, X @ alone.weight + alone.bias, atol=1e-3
        )


def test_float16_memory_maps_and_repeated_rows(tmp_path):
    X, y = problem(400, 20, 2, 0.5)
    np.save(tmp_path / "x.npy", X.astype(np.float16))
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    rows = np.concatenate([np.arange(300), np.arange(50)])  # a bootstrap sample holds rows twice
    ours = logistic.fit(mapped, y, [(rows, 1.0)], "l2", dtype=torch.float64)[0]
    reference = LogisticRegression(C=1.0, solver="newton-cholesky", tol=1e-12).fit(
        np.asarray(mapped, np.float64)[rows], y[rows]
    )
    np.testing.assert_allclose(ours.weight, reference.coef_[0], atol=1e-4)


@pytest.mark.parametrize("sd", [20, 100])
@pytest.mark.parametrize("penalty", ["l2", "uni"])
def test_collinear_features_of_large_scale(penalty, sd):
    """Rank 60 of 256, and every row four times: float32's rounding makes the Gram matrix
    indefinite.
    """
    rng = np.random.default_rng(0)
    low_rank = rng.normal(size=(800, 60)) @ rng.normal(size=(60, 256))
    repeated = np.repeat(rng.normal(size=(200, 384)), 4, axis=0)
    y = np.repeat(rng.random(200) < 0.4, 4).astype(int)
    for X in (low_rank / low_rank.std(), repeated):
        for C in (
            (100.0, 1e6) if penalty == "l2" else (None, 100.0)
        ):  # uni's is a few, l2's the user's
            result = logistic.fit((X * sd).astype(np.float32), y, [(np.arange(800), C)], penalty)[0]
            assert result.converged and result.excess < 1e-8 and np.isfinite(result.weight).all()


def test_constant_columns_do_no_harm():
    X, y = problem(300, 12, 2, 0.5)
    X = np.concatenate([X, np.full((300, 3), 7.0, np.float32)], 1)
    for penalty in ("uni", "l2"):
        for standardize in (False, True):
            result = logistic.fit(X, y, [(np.arange(300), 1.0)], penalty, standardize=standardize)[
                0
            ]
            assert result.converged and np.isfinite(result.weight).all()


@pytest.mark.parametrize("labels", [np.zeros(10, int), np.ones(10, int)])
def test_one_class_only_is_refused(labels):
    with pytest.raises(ValueError, match="both classes"):
        logistic.fit(np.zeros((10, 3), np.float32), labels, [(np.arange(10), 1.0)], "l2")


def test_the_formula_is_the_unsquared_norm():
    """A scaled problem tells the norm from its square: uni's optimum moves as |w|, not as |w|^2."""
    X, y = problem(800, 30, 2, 0.5)
    losses = []
    for factor in (1.0, 10.0):
        C = logistic.uni_C(30)
        result = logistic.fit(
            X * np.float32(factor),
            y,
            [(np.arange(800), C * factor**-1)],
            "uni",
            dtype=torch.float64,
        )[0]
        losses.append(
            result.loss
        )  # w -> w / factor, penalty factor * |w| / factor: the same objective
    assert abs(losses[0] - losses[1]) < 1e-6
