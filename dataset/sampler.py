"""The sampler of pseudo-epochs: which patches training sees, as a function of seed, fold and epoch
alone; and a sample of the validation set.
"""

import math

import numpy as np

from common import UserError
from dataset.annotations import PATCH, by_image, near_any
from dataset.draws import generator, shuffled
from dataset.images import pool_size, random_pool

SAMPLE = np.dtype(
    [
        ("row", "i8"),  # of the table; -1: random
        ("image", "i8"),  # index into the table's sorted image names
        ("x", "f8"),
        ("y", "f8"),
        ("label", "i1"),
        ("pool", "i8"),  # number within the image's pool; -1: annotated
    ]
)


def balanced(share):
    """Weights float64 [2] of the labels 0 and 1 that give both half of the loss: n / (2 n_c), as
    scikit-learn's "balanced". share: of label 1.
    """
    return 1 / (2 * np.array([1 - share, share]))


class Sampler:
    """The patches of each pseudo-epoch: half of label 1 (mitotic figures), and of the rest those of
    label 0 (hard negatives) and random patches.

    ids: the training set. random_share: share of random patches (label 0), drawn uniformly from the
    training images; a position whose final window might contain any annotated mitotic figure is
    rejected. balance: "annotation" draws a class's annotations uniformly; "slide" and "domain" draw
    the image or the domain first, then among its annotations. halves: False draws annotations of
    both classes as they come, not half of the epoch mitotic figures; class_weights() makes up for
    it. window: px at level 0 that the final patch covers (224 × mpp
    / the image's mpp, when resampled; Patches.window). jitter: centres of annotated patches move by
    up to this share of the window (0.1 in the published code). accept: function (random part of a
    sample) → bool array that may refuse positions (Patches.tissue).

    Random positions come from a fixed pool per image (images.random_pool), with or without a store
    of crops, so that training sees the same patches in both cases. Epoch k takes the k-th part of a
    random order of the pool's allowed positions, so none comes twice before all have come; one that
    `accept` refuses is replaced by any other."""

    def __init__(
        self,
        annotations,
        ids,
        epoch_size: int = 1280,
        seed: int = 0,
        fold: int = 0,
        balance: str = "annotation",
        random_share: float = 0.25,
        window: float = PATCH,
        jitter: float = 0.0,
        accept=None,
        halves: bool = True,
    ):
        if balance not in ("annotation", "slide", "domain"):
            raise UserError(f"--balance {balance}: annotation, slide or domain")
        if epoch_size < 2 or not 0 <= random_share <= 0.5:
            raise UserError(
                "an epoch needs at least 2 patches, and a share of random patches between 0 and 0.5"
            )
        self.annotations = annotations
        self.epoch_size = int(epoch_size)
        self.seed = seed
        self.fold = fold
        self.balance = balance
        self.window = float(window)
        self.jitter = float(jitter)
        self.accept = accept
        self.halves = halves
        # Sorted, so that the order of the ids does not matter.
        self.rows = rows = np.sort(annotations.rows(ids))
        self.positive = rows[annotations.label[rows] == 1]
        self.negative = rows[annotations.label[rows] == 0]
        if not len(self.positive) or not len(self.negative):
            raise UserError(
                f"{annotations.name}: the training set needs both classes; it has "
                f"{annotations.classes[1]}: {len(self.positive)}, {annotations.classes[0]}: "
                f"{len(self.negative)}"
            )
        self.names, self.image_of = annotations.codes("image")
        self.images = np.unique(annotations.image[rows])
        self.random = round(random_share * self.epoch_size)
        if annotations.kind == "patches":
            self.random = 0
            if random_share:
                negative, positive = annotations.classes
                drawn = f"half {positive}, half {negative}"
                if not halves:
                    drawn = f"{positive} and {negative} as they come, weighted alike"
                print(
                    f"{annotations.name}: ready-made patches have no random ones to draw: {drawn}",
                    flush=True,
                )
        # A mitotic figure within half the diagonal may lie in the window, whatever the rotation.
        self.reach = self.window / 2 * math.sqrt(2)
        self.mitotic = by_image(annotations, np.flatnonzero(annotations.label == 1))
        # If an image holds several cases: windows that would touch the patch of one that is not
        # trained on.
        foreign = ~np.isin(annotations.case, np.unique(annotations.case[rows]))
        foreign &= np.isin(annotations.image, self.images)
        self.foreign = by_image(annotations, np.flatnonzero(foreign))
        self._allowed = None
        self._order = None, None  # turn, the pool's positions in its order

    def _pool(self):
        """Columns image, pool, x, y of the positions that may be drawn: on the training images,
        without a mitotic figure in the window, and without tissue around the annotations of cases
        that are not trained on."""
        if self._allowed is None:
            number, parts = pool_size(self.annotations), []
            for name in self.images.tolist():
                x, y = random_pool(self.annotations, name, number, self.window)
                near = self._near(self.mitotic, name, x, y, self.reach)
                near |= self._near(self.foreign, name, x, y, 2 * self.reach)
                free = np.flatnonzero(~near)
                image = np.full(len(free), np.searchsorted(self.names, name))
                parts.append((image, free, x[free], y[free]))
            self._allowed = [np.concatenate(column) for column in zip(*parts)]
        if not len(self._allowed[0]):
            raise UserError(
                f"{self.annotations.name}: the training images have no place for random patches "
                f"without an annotated {self.annotations.classes[1]}; use --random-share 0"
            )
        return self._allowed

    def _near(self, rows, image, x, y, reach):
        """Which positions are within `reach` px of the annotations `rows` (by image)."""
        rows = rows.get(image)
        if rows is None:
            return np.zeros(len(x), bool)
        return near_any(x, y, self.annotations.x[rows], self.annotations.y[rows], reach)

    def epoch(self, epoch: int) -> np.ndarray:
        """Structured array of SAMPLE, [epoch_size]: a pure function of the table, the ids, seed,
        fold and epoch.
        """
        table, rng = self.annotations, generator("epoch", self.seed, self.fold, int(epoch))
        sample = np.zeros(self.epoch_size, SAMPLE)
        sample["pool"] = -1
        # Annotated patches first: half of the epoch mitotic figures, then hard negatives …
        if self.halves:
            positives = self.epoch_size // 2
            negatives = self.epoch_size - positives - self.random
            rows = np.concatenate(
                [
                    self._draw(rng, self.positive, positives),
                    self._draw(rng, self.negative, negatives),
                ]
            )
        else:
            rows = self._draw(rng, self.rows, self.epoch_size - self.random)
        annotated = sample[: len(rows)]
        annotated["row"] = rows
        annotated["image"] = self.image_of[rows]
        annotated["label"] = table.label[rows]
        annotated["x"] = table.x[rows]
        annotated["y"] = table.y[rows]
        if self.jitter:
            shift = (rng.random((len(rows), 2)) * 2 - 1) * self.jitter * self.window
            annotated["x"] += shift[:, 0]
            annotated["y"] += shift[:, 1]
        # … then random ones, and all of it in random order.
        if self.random:
            self._draw_random(rng, sample[len(rows) :], int(epoch))
        return shuffled(rng, sample)

    def class_weights(self):
        """`balanced` of the numbers that an epoch holds on average."""
        share = 0.5
        if not self.halves:
            shares = [self.annotations.label[rows].mean() for rows in self._groups(self.rows)]
            share = np.mean(shares) * (1 - self.random / self.epoch_size)
        return balanced(share)

    def _groups(self, rows):
        """`rows` by what is drawn first."""
        if self.balance == "annotation":
            return [rows]
        if self.balance == "slide":
            return list(by_image(self.annotations, rows).values())
        domains, code = np.unique(self.annotations.domain[rows], return_inverse=True)
        return [rows[code == number] for number in range(len(domains))]

    def _draw(self, rng, rows, n):
        """n of `rows`, with replacement: uniform, or the image or the domain first."""
        u = rng.random((2, n))
        if self.balance == "annotation":
            return rows[(u[0] * len(rows)).astype(np.int64)]
        groups = self._groups(rows)
        group = (u[0] * len(groups)).astype(np.int64)
        lengths = np.array([len(group) for group in groups])
        starts = np.cumsum(lengths) - lengths
        return np.concatenate(groups)[starts[group] + (u[1] * lengths[group]).astype(np.int64)]

    def _draw_random(self, rng, sample, epoch):
        """Fill `sample` with this epoch's part of the pool; `accept` may refuse positions."""
        pool = self._pool()
        size = len(pool[0])
        sample["row"], sample["label"] = -1, 0

        def place(at, index):
            for name, column in zip(("image", "pool", "x", "y"), pool):
                sample[name][at] = column[index]

        open_places = np.arange(len(sample))
        place(open_places, self._turn(epoch * len(sample) + open_places, size))
        for _ in range(1000):
            if self.accept is None or not len(open_places):
                return
            open_places = open_places[~self.accept(sample[open_places])]
            place(open_places, (rng.random(len(open_places)) * size).astype(np.int64))
        raise UserError(
            f"{self.annotations.name}: the training images have no tissue for random patches; "
            "omit --tissue, or use --random-share 0"
        )

    def _turn(self, draws, n):
        """Which of n positions each draw of the run is: every n draws go through all of them, in
        another order.
        """
        index = np.empty(len(draws), np.int64)
        for turn in np.unique(draws // n).tolist():
            if self._order[0] != turn:
                rng = generator("random", self.seed, self.fold, turn)
                self._order = turn, shuffled(rng, np.arange(n))
            of_turn = draws // n == turn
            index[of_turn] = self._order[1][draws[of_turn] % n]
        return index


# ---------------------------------------------------------------- validation


def validation_sample(annotations, rows, count, seed, fold):
    """`count` of the validation set `rows`, in their order; all of them if there are no more.

    One sample for each (seed, fold): the classes in proportion, with at least one annotation of
    each if count > 1, and within a class the domains and cases in proportion, to within one.
    """
    if count >= len(rows):
        return rows
    rng = generator("validation", seed, fold)
    positive = rows[annotations.label[rows] == 1]
    negative = rows[annotations.label[rows] == 0]
    least, most = min(1, len(positive)), count - min(1, len(negative))
    positives = int(np.clip(round(count * len(positive) / len(rows)), least, most))
    drawn = [
        _spread(annotations, positive, positives, rng),
        _spread(annotations, negative, count - positives, rng),
    ]
    return rows[np.isin(rows, np.concatenate(drawn))]


def _spread(annotations, rows, count, rng):
    """`count` of `rows` at equal steps through them, sorted by domain and case, so that each of
    these holds its share to within one; in random order within a case.
    """
    case, domain = (annotations.codes(name)[1][rows] for name in ("case", "domain"))
    order = np.lexsort((rng.random(len(rows)), case, domain))
    start = int(rng.random() * len(rows))
    return rows[order[(np.arange(count) * len(rows) + start) // max(1, count)]]
