"""Penalised binary logistic regression for linear probes: many problems over one matrix at once.

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
    class_weight=None,
):
    """Solve every problem; returns a list of Fit in their order.

    features     [N, d] array or tensor (float16/32/64, may be a memory map)
    labels       [N] of 0/1
    problems     list of (rows, C): the training rows of the problem, and C (None for `uni`: 2 d /
                 100)
    standardize  zero mean and unit variance over each problem's own rows (constant columns are left
                 alone), undone in the weight returned
    class_weight "balanced": the loss of each row weighs n / (2 n_c), n_c the rows of its class in
                 the problem, as in scikit-learn; `standardize` is of the rows as they are
    dtype        of the products; float32 continues in float64 when its rounding noise ends the
                 progress

    ValueError if a problem's rows hold one class only: there is nothing to separate.
    """
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
            class_weight,
        )
        for i, result in zip(members, solver.solve(max_iterations, tolerance)):
            fits[i] = result
            if progress is not None:
                progress.update(1)
    return fits


def _times(X, V):
    """X [n, d] @ V [d, p] → [n, p]. On CPUs a few columns run several times faster one by one."""
    if X.is_cuda or V.shape[1] > 4:
        return F.linear(X, V.T.contiguous())
    return torch.stack([X @ column for column in V.T.contiguous()], 1)


def _transposed_times(X, R):
    """X [n, d]' @ R [n, p] → [d, p], likewise."""
    if X.is_cuda or R.shape[1] > 7:
        return (R.T.contiguous() @ X).T
    return torch.stack([column @ X for column in R.T.contiguous()], 1)


class _State:
    """Where the search of all problems stands; a point is (W, b, objective, its gradients, sharp),
    see _Solver.evaluate.
    """

    def __init__(self, point, P, kind):
        device = kind["device"]
        self.point = point
        self.active = torch.ones(P, dtype=torch.bool, device=device)
        self.converged = torch.zeros_like(self.active)
        self.stuck = torch.zeros_like(self.active)  # no step helped, the history was forgotten
        self.excess = torch.full((P,), math.inf, **kind)
        self.change = torch.full((P,), math.inf, **kind)
        self.iterations = torch.zeros(P, dtype=torch.long, device=device)
        self.pairs = []  # the last (s, y, 1 / s'y) of every column, [d + 1, P]

    W = property(lambda self: self.point[0])
    b = property(lambda self: self.point[1])
    f = property(lambda self: self.point[2])
    gW = property(lambda self: self.point[3])
    gb = property(lambda self: self.point[4])
    sharp = property(lambda self: self.point[5])

    def stop_converged(self, decrement, limit):
        """Stop the columns that promise less than `limit` and last changed by little."""
        done = self.active & (decrement.abs() <= limit) & (self.change.abs() <= 10 * limit)
        done &= self.iterations > 0
        self.converged |= done
        self.active &= ~done

    def move(self, point, failed, at_kink):
        """Go to `point` in the active columns that have not failed; remember the step."""
        moved = self.active & ~failed
        s = torch.cat([point[0] - self.W, (point[1] - self.b)[None]])
        y = torch.cat([point[3] - self.gW, (point[4] - self.gb)[None]])
        if at_kink:
            y[:] = 0.0  # across the kink the difference of gradients is no curvature
        sy = (s * y).sum(0)
        useful = moved & (sy > 1e-14 * s.norm(dim=0) * y.norm(dim=0))
        self.pairs.append((s, y, torch.where(useful, 1 / sy, torch.zeros_like(sy))))
        self.pairs = self.pairs[-HISTORY:]
        self.change = torch.where(moved, point[2] - self.f, self.change)
        self.iterations += moved
        self.point = point


class _Solver:
    """The problems of one group over the rows they use together; columns [.., P] are problems."""

    def __init__(
        self,
        features,
        labels,
        rows,
        problems,
        penalty,
        standardize,
        dtype,
        device,
        class_weight=None,
    ):
        """rows: those of all problems; problems: [(rows, C)]; the rest as for fit."""
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
        for p, (chosen, _) in enumerate(problems):
            # A row drawn twice counts twice.
            np.add.at(member[:, p], np.searchsorted(rows, chosen), 1.0)
        self.count = torch.as_tensor(member.sum(0), device=self.device).double()  # [P] rows of each
        members = torch.as_tensor(member / member.sum(0), device=self.device)  # [n, P] sum to 1
        self.M = members  # weights of the losses, which sum to 1 too
        if class_weight == "balanced":
            of_class = (labels[rows] == 0, labels[rows] == 1)
            weights = member / np.float32(2)
            for chosen in of_class:
                weights[chosen] /= member[chosen].sum(0)
            self.M = torch.as_tensor(weights, device=self.device)
        C = [uni_C(d) if C is None else C for _, C in problems]
        C = torch.tensor(C, dtype=torch.float64, device=self.device)
        self.strength = 1 / (2 * math.sqrt(2) * C) if penalty == "uni" else 1 / (C * self.count)

        self.step = max(64, CHUNK_BYTES // (self.X.shape[1] * 4))
        self.center, variance = self._moments(members)
        self.scale = torch.ones_like(variance)
        if standardize:
            deviation = variance.clamp(min=0).sqrt()
            varies = deviation > 1e-12 * deviation.max()
            self.scale = torch.where(varies, deviation, self.scale)

    def _load(self, features, rows):
        """The rows as one tensor on the device; a whole float32 matrix is not copied."""
        kind = torch.float64 if self.dtype == torch.float64 else torch.float32
        if isinstance(features, torch.Tensor):
            return features[torch.as_tensor(rows)].to(self.device, kind)
        if len(rows) == len(features) and features.dtype == np.float32 and features.flags.writeable:
            return torch.from_numpy(features).to(self.device, kind)
        X = torch.empty(len(rows), features.shape[1], dtype=kind)
        for i in range(0, len(rows), 4096):  # in pieces: no whole copy of a float16 memory map
            X[i : i + 4096] = torch.from_numpy(np.ascontiguousarray(features[rows[i : i + 4096]]))
        return X.to(self.device)

    def _pieces(self):
        for i in range(0, len(self.X), self.step):
            yield slice(i, i + self.step), self.X[i : i + self.step].to(self.dtype)

    def _moments(self, members):
        """Means and variances [d, P] of the features over every problem's rows."""
        first = torch.zeros(
            self.X.shape[1], members.shape[1], dtype=torch.float64, device=self.device
        )
        second = torch.zeros_like(first)
        for piece, X in self._pieces():
            first += _transposed_times(X, members[piece].to(X.dtype))
        shift = first.mean(1).to(self.dtype)  # squares around the common mean: no cancellation
        for piece, X in self._pieces():
            second += _transposed_times((X - shift).square(), members[piece].to(X.dtype))
        return first, second - (first - shift.double()[:, None]).square()

    def _gram(self):
        """Mean [d, d] over the problems' rows of (x - m)(x - m)', m the common mean.

        A quarter of it bounds all Hessians.
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
        """(objective [p], its gradients gW [d, p] and gb [p], sharp [p]) of some columns.

        z = (x - center) / scale @ w + b: the bias belongs to the mean, which decouples it from w.
        sharp: mean p (1 - p), how far the Hessian lies below its bound. All but the products is in
        float64.
        """
        scale, center = self.scale[:, columns], self.center[:, columns]
        V = W / scale
        offset = (b - (center * V).sum(0)).to(self.dtype)
        V = V.to(self.dtype)
        M, loss = self.M[:, columns], torch.zeros_like(b)
        gV, gb = torch.zeros_like(W), torch.zeros_like(b)
        sharp = torch.zeros_like(b)
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
        """Minimise all problems by a preconditioned L-BFGS → a list of Fit.

        tolerance: of the excess over the optimum; None: as small as the precision allows.
        """
        state = self._start()
        if self.penalty == "uni":
            self._settle_at_zero(state)
        G = self._gram() if state.active.any() else None
        factors = None
        for iteration in range(max_iterations):
            if not state.active.any():
                break
            # 1. The preconditioner, renewed as the curvature becomes known.
            if iteration in (0, 5, 12):
                factors = self._factor(G, state.W, state.sharp)
            elif iteration % 25 == 24:  # still going: Hessians now differ from their common bound
                columns = state.active.nonzero().flatten()
                self._factor_own(factors, state.W, state.b, columns)
            # 2. The direction, its slope and the excess that it promises to remove.
            at_kink = self.penalty == "uni" and iteration == 0
            direction, slope, decrement = self._direction(state, factors, at_kink)
            # 3. Columns that are done.
            limit = tolerance or (4e-9 if self.dtype == torch.float32 else 1e-13)
            state.excess = torch.where(state.active, decrement, state.excess)
            state.stop_converged(decrement, limit)
            if not state.active.any():
                break
            # 4. The step, and what it tells about the curvature.
            point, failed = self._line_search(state, direction, slope)
            state.move(point, failed, at_kink)
            # 5. Columns that no step improves.
            if failed.any():
                self._handle_failed(state, failed, limit)
        return self._fits(state)

    def _start(self):
        """The state at w = 0 and the bias that is optimal there."""
        P, d = self.M.shape[1], self.X.shape[1]
        kind = {"dtype": torch.float64, "device": self.device}
        W, b = torch.zeros(d, P, **kind), torch.zeros(P, **kind)
        prevalence = (self.M * self.y[:, None]).sum(0).double()
        b += torch.log(prevalence / (1 - prevalence))
        point = (W, b, *self.evaluate(W, b, torch.arange(P, device=self.device)))
        return _State(point, P, kind)

    def _settle_at_zero(self, state):
        """Finish the columns of `uni` whose optimum is w = 0.

        |w| has a kink at 0. If the log-loss pulls less than the kink holds, w = 0 is the optimum;
        elsewhere the search leaves it along the pull, and the objective is smooth from there on.
        """
        at_zero = state.gW.norm(dim=0) <= self.strength
        state.converged |= at_zero
        state.active &= ~at_zero
        state.excess[at_zero], state.change[at_zero] = 0.0, 0.0

    def _direction(self, state, factors, at_kink):
        """(direction [d + 1, P], its slope [P], half the squared Newton decrement [P])."""
        g = torch.cat([state.gW, state.gb[None]])
        direction = -self._two_loop(g, state.pairs, factors)
        slope = (g * direction).sum(0)
        decrement = -slope / 2
        if at_kink:
            # The penalty grows with |direction|. If the preconditioned direction does not descend
            # for that, the pull itself does.
            descends = slope + self.strength * direction[:-1].norm(dim=0) < 0
            direction = torch.where(descends, direction, -g)
            slope = (g * direction).sum(0) + self.strength * direction[:-1].norm(dim=0)
        return direction, slope, decrement

    def _line_search(self, state, direction, slope):
        """Backtracking (Armijo) for each active column → (the new point, which columns failed).

        The columns that still search are evaluated together; the others keep their point.
        """
        size = torch.ones_like(state.b)
        point = [value.clone() for value in state.point]
        search = state.active.clone()
        for _ in range(30):
            columns = search.nonzero().flatten()
            W = state.W[:, columns] + size[columns] * direction[:-1, columns]
            b = state.b[columns] + size[columns] * direction[-1, columns]
            trial = (W, b, *self.evaluate(W, b, columns))
            drop = trial[2] - state.f[columns]
            ok = drop <= 1e-4 * size[columns] * slope[columns]
            for old, value in zip(point, trial):
                old[..., columns[ok]] = value[..., ok]
            search[columns[ok]] = False
            if not search.any():
                break
            # The parabola through value and slope at the old point and the value at the trial,
            # kept within a sane range.
            left = columns[~ok]
            down = slope[left] * size[left]
            size[left] *= (-down / (2 * (drop[~ok] - down))).clamp(0.1, 0.5)
        return point, search

    def _handle_failed(self, state, failed, limit):
        """Decide about columns that no step improves: at the optimum, or lost in rounding noise.

        Noise in float32: all go on in float64. In float64: forget the history once, then give up.
        """
        state.converged |= failed & (state.excess <= limit)
        failed = failed & (state.excess > limit)
        state.active &= ~state.converged
        if failed.any() and self.dtype == torch.float32:
            self.dtype = torch.float64
            columns = torch.arange(len(state.b), device=self.device)
            state.point = (state.W, state.b, *self.evaluate(state.W, state.b, columns))
            state.pairs = []
        elif (failed & ~state.stuck).any():
            state.stuck |= failed
            state.pairs = []
        else:
            state.active &= ~failed

    def _fits(self, state):
        """The solutions in the units of the features as given."""
        weight = state.W / self.scale
        bias = state.b - (self.center * weight).sum(0)
        if self.basis is not None:
            weight = self.basis @ weight
        fits = []
        for p in range(len(bias)):
            fits.append(
                Fit(
                    weight[:, p].cpu().numpy(),
                    float(bias[p]),
                    float(state.f[p]),
                    float(state.excess[p].abs()),
                    float(state.change[p].abs()),
                    int(state.iterations[p]),
                    bool(state.converged[p]),
                )
            )
        return fits

    def _factor(self, G, W, sharp):
        """Cholesky factors of the approximate Hessians, {level: factor}, with the level of every
        column and its curvature. Columns with about the same penalty share one.
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
        factors = {value: self._cholesky(G, 4.0**value) for value in level.unique().tolist()}
        return factors, level, curvature

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
        if failed:  # not even the diagonal's size was enough: raise torch's error
            return torch.linalg.cholesky(A)
        return factor

    def _factor_own(self, factors, W, b, columns):
        """Replace the preconditioner of some columns by the factor of their present Hessian."""
        cholesky, level, curvature = factors
        for p in columns.tolist():
            rows = self.M[:, p].nonzero().flatten()
            H = torch.zeros(len(W), len(W), dtype=self.dtype, device=self.device)
            first, total = 0.0, 0.0
            v = W[:, p] / self.scale[:, p]
            offset = float(b[p] - self.center[:, p] @ v)
            for i in range(0, len(rows), 4096):
                piece = rows[i : i + 4096]
                X = self.X[piece].to(self.dtype)
                z = X @ v.to(self.dtype) + offset
                h = torch.sigmoid(z) * torch.sigmoid(-z) * self.M[piece, p].to(self.dtype)
                X = (X - self.center[:, p].to(self.dtype)) / self.scale[:, p].to(self.dtype)
                first, total = first + h @ X, total + h.sum()
                H.addmm_((X * h[:, None]).T, X)
            H = H.double()
            # The bias follows the mean.
            H -= torch.outer(first, first).double() / total.double().clamp(min=1e-30)
            ridge = self.strength[p]
            if self.penalty == "uni":
                ridge = ridge / W[:, p].norm().clamp(min=1e-12)
            H.diagonal().add_(ridge + 1e-7 * H.diagonal().mean())
            factor, failed = torch.linalg.cholesky_ex(H)
            if not failed:
                level[p], curvature[p] = -1000 - p, total.double()
                # _two_loop divides by the curvature.
                cholesky[-1000 - p] = factor * total.double().rsqrt()

    def _two_loop(self, g, pairs, factors):
        """L-BFGS' product of the inverse Hessian and g [d + 1, P] (Nocedal & Wright, alg. 7.4)."""
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
