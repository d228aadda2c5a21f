"""Penalised binary logistic regression for linear probes: many problems over one feature matrix,
solved at once.

Two penalties, for features x [d], labels y in {0, 1}, n training rows, weight w [d], bias b (never
penalised):

    l2    mean log-loss + |w|^2 / (2 C n)             scikit-learn's LogisticRegression(C=C),
          divided by C n
    uni   mean log-loss + |w| / (2 sqrt(2) C)         the norm NOT squared; C = 2 d / 100

`uni` is the classifier of UNI's evaluation (Chen et al. 2024), which the benchmark uses: a
Linear(d, 2) under softmax cross-entropy + (1/C) 1/2 |W| over both rows of W. Its optimum has W =
(-w/2, w/2): adding the same vector to both rows changes no probability, and |W| is smallest where
they are opposite; there |W| = |w| / sqrt(2). So it is the binary problem above in half the
unknowns, with the same optimum.

Both are convex; an L-BFGS finds the optimum. What makes it fast: all problems (folds, fractions,
values of C) share one pass over the features per evaluation, and the search is preconditioned with
the Hessian's bound X'X / 4, so that it takes tens of passes where the raw features, with variances
over many orders of magnitude, take hundreds."""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

HISTORY = 20
CHUNK_BYTES = 4 << 20  # rows are taken in pieces that stay in the cache between X w and X' r


@dataclass
class Fit:
    """One solved problem: logit(x) = x @ weight + bias."""

    weight: np.ndarray  # [d] float64
    bias: float
    loss: float  # the penalised objective at the end, accumulated in float64
    excess: float  # estimate of (loss - optimum): half the squared Newton decrement
    change: float  # the last change of the loss
    iterations: int
    converged: bool


def uni_C(dim):
    """C of the paper's probe for `dim` features and two classes: d K / 100."""
    return dim * 2 / 100


def fit(
    features,
    labels,
    problems,
    penalty="uni",
    standardize=False,
    dtype=torch.float32,
    device="cpu",
    max_iterations=1000,
    tolerance=None,
    progress=None,
):
    """Solve every problem; returns a list of Fit in their order.

    features: [N, d] array or tensor (float16/32/64, may be a memory map); labels: [N] of 0/1;
    problems: list of (rows, C): the training rows of the problem, and C (None for `uni`: 2 d /
    100); standardize: zero mean and unit variance over each problem's own rows (constant columns
    are left alone), undone in the weight returned. dtype: of the products; float32 continues in
    float64 where float32's noise ends the progress. ValueError where a problem's rows hold one
    class only: there is nothing to separate."""
    if penalty not in ("uni", "l2"):
        raise ValueError(f"unknown penalty {penalty!r}: uni or l2")
    labels = np.asarray(labels)
    problems = [(np.asarray(rows), C) for rows, C in problems]
    for rows, _ in problems:
        counts = np.bincount(labels[rows].astype(int), minlength=2)
        if len(rows) == 0 or counts.min() == 0:
            raise ValueError(
                f"a training set needs both classes: {counts[1]} of class 1, {counts[0]} of class 0"
            )

    # Problems of about the same rows are solved side by side: folds of one fraction, values of C.
    groups = {}
    for index, (rows, _) in enumerate(problems):
        groups.setdefault(round(math.log2(len(rows))), []).append(index)
    fits = [None] * len(problems)
    for members in groups.values():
        rows = np.unique(np.concatenate([problems[i][0] for i in members]))
        solver = _Solver(
            features,
            labels,
            rows,
            [problems[i] for i in members],
            penalty,
            standardize,
            dtype,
            device,
        )
        for i, result in zip(members, solver.solve(max_iterations, tolerance)):
            fits[i] = result
            if progress is not None:
                progress.update(1)
    return fits


def _times(X, V):
    """X [n, d] @ V [d, p] -> [n, p]. On CPUs the products of a few columns run several times faster
    one by one.
    """
    if X.is_cuda or V.shape[1] > 4:
        return F.linear(X, V.T.contiguous())
    return torch.stack([X @ column for column in V.T.contiguous()], 1)


def _transposed_times(X, R):
    """X [n, d] ' @ R [n, p] -> [d, p], likewise."""
    if X.is_cuda or R.shape[1] > 7:
        return (R.T.contiguous() @ X).T
    return torch.stack([column @ X for column in R.T.contiguous()], 1)


class _Solver:
    """The problems of one group over the rows they use together. Columns of a matrix [.., P] are
    problems.
    """

    def __init__(self, features, labels, rows, problems, penalty, standardize, dtype, device):
        self.penalty, self.dtype, self.device = penalty, dtype, torch.device(device)
        n, d, P = len(rows), features.shape[1], len(problems)
        self.X = self._load(features, rows)  # [n, d]
        self.basis = None
        if n < d and not standardize:
            # Fewer rows than dimensions: the optimal w lies in the rows' span, so w = basis @ u
            # with |w| = |u|.
            self.basis, R = torch.linalg.qr(self.X.T.double())  # [d, n], [n, n]
            self.X = R.T.to(self.X.dtype)
        self.y = torch.as_tensor(labels[rows].astype(np.float32), device=self.device)  # [n]
        member = np.zeros((n, P), np.float32)
        for p, (own, _) in enumerate(problems):
            np.add.at(
                member[:, p], np.searchsorted(rows, own), 1.0
            )  # a row drawn twice counts twice
        self.count = torch.as_tensor(member.sum(0), device=self.device).double()  # [P] rows of each
        self.M = torch.as_tensor(member / member.sum(0), device=self.device)  # [n, P] mean weights
        C = [uni_C(d) if C is None else C for _, C in problems]
        C = torch.tensor(C, dtype=torch.float64, device=self.device)
        self.strength = 1 / (2 * math.sqrt(2) * C) if penalty == "uni" else 1 / (C * self.count)

        self.step = max(64, CHUNK_BYTES // (self.X.shape[1] * 4))
        moments = self._moments()  # means [d, P] and variances of every problem
        self.center = moments[0]
        self.scale = torch.ones_like(moments[1])
        if standardize:
            deviation = moments[1].clamp(min=0).sqrt()
            self.scale = torch.where(
                deviation > 1e-12 * deviation.max(), deviation, torch.ones_like(deviation)
            )

    def _load(self, features, rows):
        """The rows as one tensor of the device; a float32 matrix used nearly whole is not copied."""
        kind = torch.float64 if self.dtype == torch.float64 else torch.float32
        if isinstance(features, torch.Tensor):
            return features[torch.as_tensor(rows)].to(self.device, kind)
        if len(rows) == len(features) and features.dtype == np.float32 and features.flags.writeable:
            return torch.from_numpy(features).to(self.device, kind)
        X = torch.empty(len(rows), features.shape[1], dtype=kind)
        for i in range(
            0, len(rows), 4096
        ):  # in pieces: a float16 memory map never has a second whole copy
            X[i : i + 4096] = torch.from_numpy(np.ascontiguousarray(features[rows[i : i + 4096]]))
        return X.to(self.device)

    def _pieces(self):
        for i in range(0, len(self.X), self.step):
            yield slice(i, i + self.step), self.X[i : i + self.step].to(self.dtype)

    def _moments(self):
        first = torch.zeros(
            self.X.shape[1], self.M.shape[1], dtype=torch.float64, device=self.device
        )
        second = torch.zeros_like(first)
        for piece, X in self._pieces():
            first += _transposed_times(X, self.M[piece].to(X.dtype))
        shift = first.mean(1).to(self.dtype)  # squares around the common mean: no cancellation
        for piece, X in self._pieces():
            second += _transposed_times((X - shift).square(), self.M[piece].to(X.dtype))
        return first, second - (first - shift.double()[:, None]).square()

    def _gram(self):
        """Mean over the problems' rows of (x - m)(x - m)', [d, d], m the common mean: the bound of
        all Hessians.
        """
        weight = self.M.mean(1).double()
        mean = self.center.mean(1)
        G = torch.zeros(self.X.shape[1], self.X.shape[1], dtype=self.dtype, device=self.device)
        for i in range(0, len(self.X), 4096):
            X = self.X[i : i + 4096].to(self.dtype) - mean.to(self.dtype)
            X *= weight[i : i + 4096].sqrt().to(X.dtype)[:, None]
            G.addmm_(X.T, X)
        G = G.double()
        scale = self.scale.mean(1)
        return G / scale[:, None] / scale

    def evaluate(self, W, b, columns):
        """Objective [p] and gradient (gW [d, p], gb [p]) of some columns; everything but the
        products in float64.

        z = (x - center) / scale @ w + b: the bias belongs to the mean, which decouples it from w.
        """
        scale, center = self.scale[:, columns], self.center[:, columns]
        V = W / scale
        offset = (b - (center * V).sum(0)).to(self.dtype)
        V = V.to(self.dtype)
        M, loss = self.M[:, columns], torch.zeros_like(b)
        gV, gb = torch.zeros_like(W), torch.zeros_like(b)
        sharp = torch.zeros_like(b)  # mean p (1 - p): how far the Hessian lies below its bound
        for piece, X in self._pieces():
            z = _times(X, V) + offset  # [rows, p]
            y, m = self.y[piece, None].to(z.dtype), M[piece].to(z.dtype)
            loss += (F.softplus((1 - 2 * y) * z) * m).sum(0, dtype=torch.float64)
            p = torch.sigmoid(z)
            residual = (p - y) * m
            gV += _transposed_times(X, residual)
            gb += residual.sum(0, dtype=torch.float64)
            sharp += (p * (1 - p) * m).sum(0, dtype=torch.float64)
        gW = (gV - center * gb) / scale
        strength = self.strength[columns]
        if self.penalty == "l2":
            return loss + strength * W.square().sum(0) / 2, gW + strength * W, gb, sharp
        norm = W.norm(dim=0)
        return loss + strength * norm, gW + strength * W / norm.clamp(min=1e-300), gb, sharp

    def solve(self, max_iterations, tolerance):
        P, d = self.M.shape[1], self.X.shape[1]
        kind = {"dtype": torch.float64, "device": self.device}
        W, b = torch.zeros(d, P, **kind), torch.zeros(P, **kind)
        prevalence = (self.M * self.y[:, None]).sum(0).double()
        b += torch.log(prevalence / (1 - prevalence))  # the optimum for w = 0
        every = torch.arange(P, device=self.device)
        f, gW, gb, sharp = self.evaluate(W, b, every)
        active = torch.ones(P, dtype=torch.bool, device=self.device)
        change = torch.full((P,), math.inf, **kind)
        excess = torch.full((P,), math.inf, **kind)
        iterations = torch.zeros(P, dtype=torch.long, device=self.device)
        converged, stuck = torch.zeros_like(active), torch.zeros_like(active)
        if self.penalty == "uni":
            # |w| has a kink at 0. Where the log-loss pulls less than the kink holds, w = 0 is the
            # optimum; elsewhere the search starts a little way along the pull, where the objective
            # is smooth.
            pull = gW.norm(dim=0)
            at_zero = pull <= self.strength
            converged |= at_zero
            active &= ~at_zero
            excess[at_zero], change[at_zero] = 0.0, 0.0

        G = self._gram() if active.any() else None
        pairs = []  # the last (s, y, 1 / s'y) of every column, [d + 1, P]
        factors = None
        for iteration in range(max_iterations):
            if not active.any():
                break
            if iteration in (0, 5, 12):
                factors = self._factor(G, W, sharp)
            elif iteration % 25 == 24:  # still going: Hessians now differ from their common bound
                self._factor_own(factors, W, b, active.nonzero().flatten())
            g = torch.cat([gW, gb[None]])
            direction = -self._two_loop(g, pairs, factors)
            decrement = -(g * direction).sum(0) / 2
            slope = (g * direction).sum(0)
            if self.penalty == "uni" and iteration == 0:
                # At the kink the penalty grows with |direction|. Where the preconditioned direction
                # does not descend for that, the pull itself does.
                direction = torch.where(
                    slope + self.strength * direction[:-1].norm(dim=0) < 0, direction, -g
                )
                slope = (g * direction).sum(0) + self.strength * direction[:-1].norm(dim=0)
            limit = tolerance or (4e-9 if self.dtype == torch.float32 else 1e-13)
            excess = torch.where(active, decrement, excess)
            done = (
                active
                & (decrement.abs() <= limit)
                & (change.abs() <= 10 * limit)
                & (iterations > 0)
            )
            converged |= done
            active &= ~done
            if not active.any():
                break

            # Backtracking (Armijo) for each column; the columns that still search are evaluated
            # together.
            size = torch.ones(P, **kind)
            new = [W.clone(), b.clone(), f.clone(), gW.clone(), gb.clone(), sharp.clone()]
            search = active.clone()
            for _ in range(30):
                columns = search.nonzero().flatten()
                trial = W[:, columns] + size[columns] * direction[:-1, columns]
                trial_b = b[columns] + size[columns] * direction[-1, columns]
                got = self.evaluate(trial, trial_b, columns)
                drop = got[0] - f[columns]
                ok = drop <= 1e-4 * size[columns] * slope[columns]
                for old, value in zip(new, (trial, trial_b, *got)):
                    old[..., columns[ok]] = value[..., ok]
                search[columns[ok]] = False
                if not search.any():
                    break
                left = columns[~ok]
                # The parabola through value and slope here and the value there, kept within a sane
                # range.
                down = slope[left] * size[left]
                size[left] *= (-down / (2 * (drop[~ok] - down))).clamp(0.1, 0.5)
            failed = search
            moved = active & ~failed
            s = torch.cat([new[0] - W, (new[1] - b)[None]])
            yy = torch.cat([new[3] - gW, (new[4] - gb)[None]])
            if self.penalty == "uni" and iteration == 0:
                yy[:] = 0.0  # across the kink the difference of gradients is no curvature
            sy = (s * yy).sum(0)
            useful = moved & (sy > 1e-14 * s.norm(dim=0) * yy.norm(dim=0))
            pairs.append((s, yy, torch.where(useful, 1 / sy, torch.zeros_like(sy))))
            pairs = pairs[-HISTORY:]
            change = torch.where(moved, new[2] - f, change)
            iterations += moved
            W, b, f, gW, gb, sharp = new

            if failed.any():
                # No step pays any more: the optimum, or the noise of the products. Where it is
                # noise in float32, go on in float64; there, forget the history once, and then
                # believe it.
                converged |= failed & (excess <= limit)
                failed &= excess > limit
                active &= ~converged
                if failed.any() and self.dtype == torch.float32:
                    self.dtype = torch.float64
                    f, gW, gb, sharp = self.evaluate(W, b, every)
                    pairs = []
                elif (failed & ~stuck).any():
                    stuck |= failed
                    pairs = []
                else:
                    active &= ~failed

        weight = W / self.scale
        bias = b - (self.center * weight).sum(0)
        if self.basis is not None:
            weight = self.basis @ weight
        return [
            Fit(
                weight[:, p].cpu().numpy(),
                float(bias[p]),
                float(f[p]),
                float(excess[p].abs()),
                float(change[p].abs()),
                int(iterations[p]),
                bool(converged[p]),
            )
            for p in range(P)
        ]

    def _factor(self, G, W, sharp):
        """Cholesky factors of the approximate Hessians; columns with about the same penalty share
        one.
        """
        curvature = sharp.clamp(min=1e-4)
        if self.penalty == "l2":
            ridge = self.strength
        else:
            norm = W.norm(dim=0)
            ridge = torch.where(norm > 0, self.strength / norm.clamp(min=1e-12), self.strength)
        # Relative ridge in steps of a factor of 4: a preconditioner need not be exact, and a
        # factorisation costs d^3/3.
        level = torch.round(torch.log(ridge / curvature) / math.log(4)).long()
        return (
            {value: self._cholesky(G, 4.0**value) for value in level.unique().tolist()},
            level,
            curvature,
        )

    def _cholesky(self, G, ridge):
        """Cholesky factor of G + ridge, with as little more on the diagonal as it takes.

        Of collinear features G is singular but for float32's rounding, which grows with their
        scale, may make it indefinite, and is far above a small ridge."""
        jitter = 1e-9 * float(G.diagonal().mean().clamp(min=1e-30))
        for _ in range(10):
            A = G.clone()
            A.diagonal().add_(ridge + jitter)
            factor, failed = torch.linalg.cholesky_ex(A)
            if not failed:
                break
            jitter *= 10
        return (
            torch.linalg.cholesky(A) if failed else factor
        )  # its error: not even the diagonal's size was enough

    def _factor_own(self, factors, W, b, columns):
        """Replace the preconditioner of some columns by the Cholesky factor of their Hessian where
        they stand.
        """
        cholesky, level, curvature = factors
        for p in columns.tolist():
            rows = self.M[:, p].nonzero().flatten()
            H, first, total = (
                torch.zeros(len(W), len(W), dtype=self.dtype, device=self.device),
                0.0,
                0.0,
            )
            v = W[:, p] / self.scale[:, p]
            offset = float(b[p] - self.center[:, p] @ v)
            for i in range(0, len(rows), 4096):
                own = rows[i : i + 4096]
                X = self.X[own].to(self.dtype)
                z = X @ v.to(self.dtype) + offset
                h = torch.sigmoid(z) * torch.sigmoid(-z) * self.M[own, p].to(self.dtype)
                X = (X - self.center[:, p].to(self.dtype)) / self.scale[:, p].to(self.dtype)
                first, total = first + h @ X, total + h.sum()
                H.addmm_((X * h[:, None]).T, X)
            H = H.double()
            H -= torch.outer(first, first).double() / total.double().clamp(
                min=1e-30
            )  # the bias follows the mean
            ridge = (
                self.strength[p]
                if self.penalty == "l2"
                else self.strength[p] / W[:, p].norm().clamp(min=1e-12)
            )
            H.diagonal().add_(ridge + 1e-7 * H.diagonal().mean())
            factor, failed = torch.linalg.cholesky_ex(H)
            if not failed:
                level[p], curvature[p] = -1000 - p, total.double()
                cholesky[-1000 - p] = (
                    factor * total.double().rsqrt()
                )  # _two_loop divides by the curvature

    def _two_loop(self, g, pairs, factors):
        """L-BFGS' product of the inverse Hessian and g [d + 1, P] (Nocedal & Wright, algorithm
        7.4).
        """
        q, alphas = g.clone(), []
        for s, y, rho in reversed(pairs):
            alpha = rho * (s * q).sum(0)
            q -= alpha * y
            alphas.append(alpha)
        cholesky, level, curvature = factors
        r = torch.empty_like(q)
        for value, L in cholesky.items():
            columns = (level == value).nonzero().flatten()
            r[:-1, columns] = torch.cholesky_solve(q[:-1, columns], L) / curvature[columns]
        r[-1] = q[-1] / curvature
        for (s, y, rho), alpha in zip(pairs, reversed(alphas)):
            r += s * (alpha - rho * (y * r).sum(0))
        return r
