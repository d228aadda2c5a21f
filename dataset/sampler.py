"""The sampler of pseudo-epochs: which patches training sees, as a function of seed, fold and epoch
alone. No torch.
"""

import math

import numpy as np

from common import UserError
from dataset.annotations import PATCH, by_image, file_stem, near_pairs
from dataset.splits import generator, shuffled


class Sampler:
    """The patches of each pseudo-epoch: half mitotic figures, and of the rest hard negatives and
    random patches.

    ids: the training set. random_share: share of random patches (label 0); they come from the
    images that hold one of the ids, uniformly, and one whose final window could hold a mitotic
    figure of the whole table is drawn again. balance: "annotation" draws a class's annotations
    uniformly; "slide" draws the image first, then among its own. window: px at level 0 that the
    final patch covers (224 × mpp / the image's mpp, when resampled; Patches.window). jitter:
    centres of annotated patches are moved by up to this share of the window (0.1 in the published
    code). accept: function (random part of a sample) → bool array that may refuse positions
    (Patches.tissue).

    Random positions come from a fixed pool per image (random_pool), whether a store of crops is
    there or not: so training sees the same patches with and without it. Epoch k takes the k-th part
    of a random order of the pool's allowed positions, so none comes twice before all have come; one
    that `accept` refuses is replaced by any other."""

    def __init__(
        self,
        annotations,
        ids,
        epoch_size=1280,
        seed=0,
        fold=0,
        balance="annotation",
        random_share=0.25,
        window=PATCH,
        jitter=0.0,
        accept=None,
    ):
        if balance not in ("annotation", "slide"):
            raise UserError(f"--balance {balance}: annotation or slide")
        if epoch_size < 2 or not 0 <= random_share <= 0.5:
            raise UserError(
                "an epoch needs 2 patches at least, and a share of random patches between 0 and 0.5"
            )
        self.annotations, self.epoch_size, self.seed, self.fold = (
            annotations,
            int(epoch_size),
            seed,
            fold,
        )
        self.balance, self.window, self.jitter, self.accept = (
            balance,
            float(window),
            float(jitter),
            accept,
        )
        # Sorted, so that the order of the ids does not matter.
        rows = np.sort(annotations.rows(ids))
        self.positive, self.negative = (
            rows[annotations.label[rows] == 1],
            rows[annotations.label[rows] == 0],
        )
        if not len(self.positive) or not len(self.negative):
            raise UserError(
                f"{annotations.name}: the training set needs mitotic figures and hard negatives; "
                "it has "
                f"{len(self.positive)} and {len(self.negative)}"
            )
        self.names, self.image_of = annotations.codes("image")
        self.images = np.unique(annotations.image[rows])
        self.random = 0 if annotations.kind == "patches" else round(random_share * self.epoch_size)
        if annotations.kind == "patches" and random_share:
            print(
                f"{annotations.name}: ready-made patches have no random ones to draw: half "
                "mitotic figures, half "
                "hard negatives",
                flush=True,
            )
        # The centre of a mitotic figure within the half diagonal may lie in the window, whatever
        # the rotation.
        self.reach = self.window / 2 * math.sqrt(2)
        self.mitotic = by_image(annotations, np.flatnonzero(annotations.label == 1))
        # Where an image holds several cases: windows that would touch the patch of one that is not
        # trained on.
        foreign = ~np.isin(annotations.case, np.unique(annotations.case[rows]))
        self.foreign = by_image(
            annotations, np.flatnonzero(foreign & np.isin(annotations.image, self.images))
        )
        self._allowed, self._order = None, (None, None)

    def _pool(self):
        """(image, number within its pool, x, y) of the positions that may be drawn: on the training
        images, without a mitotic figure in the window, and without tissue around the annotations of
        cases that are not trained on."""
        if self._allowed is None:
            number, parts = pool_size(self.annotations), []
            for name in self.images.tolist():
                x, y = random_pool(self.annotations, name, number, self.window)
                free = np.flatnonzero(
                    ~self._near(self.mitotic, name, x, y, self.reach)
                    & ~self._near(self.foreign, name, x, y, 2 * self.reach)
                )
                parts.append(
                    (np.full(len(free), np.searchsorted(self.names, name)), free, x[free], y[free])
                )
            self._allowed = [np.concatenate(column) for column in zip(*parts)]
        if not len(self._allowed[0]):
            raise UserError(
                f"{self.annotations.name}: the training images have no place for random patches "
                "without a "
                "mitotic figure; use --random-share 0"
            )
        return self._allowed

    def _near(self, rows, image, x, y, reach):
        """Which positions are within `reach` px of the annotations `rows` (by image)."""
        rows = rows.get(image)
        if rows is None:
            return np.zeros(len(x), bool)
        i, _ = near_pairs(x, y, self.annotations.x[rows], self.annotations.y[rows], reach)
        return np.isin(np.arange(len(x)), i)

    def epoch(self, epoch):
        """Structured array [epoch_size]: row (of the table; -1: random), image (index into
        np.unique of the table's), x, y, label, pool (number within the image's pool; -1:
        annotated). A pure function of the table, the ids, seed, fold and epoch."""
        table, rng = self.annotations, generator("epoch", self.seed, self.fold, int(epoch))
        sample = np.zeros(
            self.epoch_size,
            [
                ("row", "i8"),
                ("image", "i8"),
                ("x", "f8"),
                ("y", "f8"),
                ("label", "i1"),
                ("pool", "i8"),
            ],
        )
        sample["pool"] = -1
        positives = self.epoch_size // 2
        negatives = self.epoch_size - positives - self.random
        rows = np.concatenate(
            [self._draw(rng, self.positive, positives), self._draw(rng, self.negative, negatives)]
        )
        annotated = sample[: len(rows)]
        annotated["row"], annotated["image"], annotated["label"] = (
            rows,
            self.image_of[rows],
            table.label[rows],
        )
        annotated["x"], annotated["y"] = table.x[rows], table.y[rows]
        if self.jitter:
            shift = (rng.random((len(rows), 2)) * 2 - 1) * self.jitter * self.window
            annotated["x"] += shift[:, 0]
            annotated["y"] += shift[:, 1]
        if self.random:
            self._draw_random(rng, sample[len(rows) :], int(epoch))
        return shuffled(rng, sample)

    def _draw(self, rng, rows, n):
        """n of `rows`, with replacement: uniform, or the image first."""
        u = rng.random((2, n))
        if self.balance == "annotation":
            return rows[(u[0] * len(rows)).astype(np.int64)]
        groups = list(by_image(self.annotations, rows).values())
        image = (u[0] * len(groups)).astype(np.int64)
        lengths = np.array([len(group) for group in groups])
        starts = np.cumsum(lengths) - lengths
        return np.concatenate(groups)[starts[image] + (u[1] * lengths[image]).astype(np.int64)]

    def _draw_random(self, rng, sample, epoch):
        pool = self._pool()
        sample["row"], sample["label"] = -1, 0

        def place(at, index):
            for name, column in zip(("image", "pool", "x", "y"), pool):
                sample[name][at] = column[index]

        todo = np.arange(len(sample))
        place(todo, self._turn(epoch * len(sample) + todo, len(pool[0])))
        for _ in range(1000):
            if self.accept is None or not len(todo):
                return
            todo = todo[~self.accept(sample[todo])]
            place(todo, (rng.random(len(todo)) * len(pool[0])).astype(np.int64))
        raise UserError(
            f"{self.annotations.name}: the training images have no tissue for random patches; "
            "leave "
            "--tissue out, or use --random-share 0"
        )

    def _turn(self, draws, n):
        """Which of n positions each draw of the run is: every n draws go through all of them, in
        another order.
        """
        index = np.empty(len(draws), np.int64)
        for turn in np.unique(draws // n).tolist():
            if self._order[0] != turn:
                self._order = (
                    turn,
                    shuffled(generator("random", self.seed, self.fold, turn), np.arange(n)),
                )
            here = draws // n == turn
            index[here] = self._order[1][draws[here] % n]
        return index


# Random positions of all images together: a full run draws 100 × 320, from about two thirds of the
# images.
POOL = 64_000


def image_size(annotations, image):
    """(width, height) of an image: of the annotation file, or of the image itself."""
    known = annotations.sizes.get(image)
    if known is None:
        from dataset import slides

        known = annotations.sizes[image] = slides.dimensions(annotations.image_path(image))
    return known


def pool_size(annotations):
    """Random positions per image: POOL in all, but not so many that they cover an image of mean
    area over 4 times.
    """
    names = annotations.codes("image")[0].tolist()
    area = sum(
        width * height for width, height in (image_size(annotations, name) for name in names)
    ) / len(names)
    return max(1, min(math.ceil(POOL / len(names)), math.ceil(4 * area / PATCH**2)))


def random_pool(annotations, image, number, window=PATCH):
    """x, y of the first `number` random positions of an image: uniform where the whole window lies
    inside, in the middle where the image is smaller than it. A pure function of the file's name,
    the image's size and the window."""
    u = generator("pool", file_stem(str(image))).random((number, 2))
    x, y = (
        low + u[:, i] * (high - low)
        for i, (low, high) in enumerate(
            (min(window, extent) / 2, extent - min(window, extent) / 2)
            for extent in image_size(annotations, image)
        )
    )
    return x, y
