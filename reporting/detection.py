"""A detector's candidates against the annotations: F1 of detection before and after the second
stage.

A candidate finds a mitotic figure within 7.5 µm of it (the radius of the MIDOG challenges); one
candidate finds at most one figure, and at most one candidate finds a figure. The number of finds is
that of a maximum matching, so it does not depend on the order of the file. The challenges' own
script may pair greedily and differ."""

from pathlib import Path

import numpy as np

import common
from common import UserError
from dataset import formats, slides
from dataset.annotations import by_image
from dataset.formats import cells
from reporting import combine, folder

RADIUS = 7.5  # µm
CURVE_COLUMNS = ("domain", "threshold", "tp", "fp", "fn")
COMBINATIONS = ("product", "logistic")  # see reporting/combine.py


def matched(x, y, score, figures_x, figures_y, radius):
    """For candidates in the order of falling score: how many figures the first k of them find at
    most, k = 1 … n → (order [n], adds [n] bool); cumulate `adds` for the sizes.

    A maximum matching grown one candidate at a time: a candidate adds one to it exactly if an
    augmenting path starts at it, and one that adds nothing never will. Memory is linear, also where
    many points coincide."""
    order = np.argsort(-np.asarray(score, np.float64), kind="stable")
    matching = Matching(x, y, figures_x, figures_y, radius)
    adds = np.zeros(len(order), bool)
    for k, i in enumerate(order.tolist()):
        adds[k] = matching.augment(i)
    return order, adds


class Matching:
    """A matching of candidates (x, y) [n] and figures [m] at most `radius` apart."""

    def __init__(self, x, y, figures_x, figures_y, radius):
        figures_x, figures_y = (np.asarray(v, np.float64) for v in (figures_x, figures_y))
        by_x = np.argsort(figures_x, kind="stable")
        self.x, self.y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        self.figures_x, self.figures_y, self.radius = figures_x[by_x], figures_y[by_x], radius
        # The figures of candidate i lie among low[i]:high[i].
        self.low = np.searchsorted(self.figures_x, self.x - radius, "left").tolist()
        self.high = np.searchsorted(self.figures_x, self.x + radius, "right").tolist()
        self.candidate_of = np.full(len(by_x), -1)  # by figure
        self.figure_of = {}  # by candidate
        self.closed = np.zeros(len(by_x), bool)  # figures from which no path leads to a free one
        self.reached_from = np.full(len(by_x), -1)  # by figure, during a search

    def near(self, i):
        """Figures that candidate i could find, without closed ones."""
        figures = np.arange(self.low[i], self.high[i])
        dx = np.abs(self.x[i] - self.figures_x[figures])
        dy = np.abs(self.y[i] - self.figures_y[figures])
        return figures[(np.hypot(dx, dy) <= self.radius) & ~self.closed[figures]]

    def augment(self, start):
        """Give candidate `start` a figure, moving others along → whether that is possible. Breadth
        first, so that depth of recursion is no limit."""
        if self.low[start] == self.high[start]:
            return False
        queue, reached, augmented = [start], [], False
        for i in queue:
            figures = self.near(i)
            free = figures[self.candidate_of[figures] < 0]
            if len(free):
                self._take(start, i, free[0])
                augmented = True
                break
            new = figures[self.reached_from[figures] < 0]
            self.reached_from[new] = i
            reached.append(new)
            queue += self.candidate_of[new].tolist()
        for figures in reached:
            self.reached_from[figures] = -1
            # No later path can leave these figures either: searches need not enter them again.
            if not augmented:
                self.closed[figures] = True
        return augmented

    def _take(self, start, i, figure):
        """Back along the path: each candidate takes the figure that it reached, up to `start`."""
        while True:
            previous = self.figure_of.get(i)
            self.candidate_of[figure] = i
            self.figure_of[i] = figure
            if i == start:
                return
            figure, i = previous, int(self.reached_from[previous])


def score_images(images, radius=RADIUS, key="probability"):
    """The curve of detection over images, as a dict: thresholds [T] from the highest probability,
    tp, fp, fn [T] of the candidates with p >= threshold, and the numbers of figures and candidates.

    images: list of dicts with x, y, probability (candidates, px), figures_x, figures_y (px), mpp
    (µm/px), domain; radius: µm; key: another score of the candidates, of any scale."""
    probability, adds, figures = [np.zeros(0)], [np.zeros(0, bool)], 0
    for image in images:
        p = np.asarray(image[key], np.float64)
        order, adds_one = matched(
            image["x"],
            image["y"],
            p,
            image["figures_x"],
            image["figures_y"],
            radius / image["mpp"],
        )
        probability.append(p[order])
        adds.append(adds_one)
        figures += len(image["figures_x"])
    p, adds = np.concatenate(probability), np.concatenate(adds)
    if key == "probability" and not ((p >= 0) & (p <= 1)).all():
        raise UserError("the candidates' probabilities hold NaN or numbers outside 0 … 1")
    if not np.isfinite(p).all():
        raise UserError(f"the candidates' values of {key} hold NaN or infinity")
    # A stable sort keeps the order within each image, so that its prefixes stay prefixes.
    order = np.argsort(-p, kind="stable")
    p, tp = p[order], np.cumsum(adds[order])
    last = np.zeros(0, int)
    if len(p):
        last = np.flatnonzero(np.r_[p[1:] != p[:-1], True])
    return {
        "figures": figures,
        "candidates": len(p),
        "thresholds": p[last],
        "tp": tp[last],
        "fp": last + 1 - tp[last],
        "fn": figures - tp[last],
    }


def at(curve, threshold=None):
    """tp, fp, fn, precision, recall and f1 of the candidates with p >= threshold (None: of all)."""
    steps = len(curve["thresholds"])
    if threshold is not None:
        steps = int((curve["thresholds"] >= threshold).sum())
    tp, fp, fn = 0, 0, curve["figures"]
    if steps:
        tp, fp, fn = (int(curve[name][steps - 1]) for name in ("tp", "fp", "fn"))
    return {
        "threshold": threshold,
        "tp": tp,
        "fp": fp,
        "fn": fn,
        "precision": tp / (tp + fp) if tp + fp else 0.0,
        "recall": tp / (tp + fn) if tp + fn else float("nan"),
        "f1": 2 * tp / (2 * tp + fp + fn) if tp + fp + fn else float("nan"),
    }


def best(curve):
    """at() the threshold with the highest F1 (of several the highest), chosen on the very data that
    it is scored on.
    """
    if not len(curve["thresholds"]):
        return at(curve, 1.0)
    f1 = 2 * curve["tp"] / np.maximum(2 * curve["tp"] + curve["fp"] + curve["fn"], 1)
    return at(curve, float(curve["thresholds"][np.argmax(f1)]))


# ---------------------------------------------------------------- files

ADVICE = "score them with classify.py first (MIDOG JSON, the challenge's JSON or CSV)"


def probabilities(candidates):
    """The probability of each candidate [n], NaN for those that are not scored; UserError: none is
    scored, or one is no probability."""
    values = np.full(len(candidates), np.nan)
    for i, value in enumerate(candidates.probabilities):
        if value in (None, ""):
            continue
        try:
            p = float(value)
        except (OverflowError, TypeError, ValueError):
            p = float("nan")
        if not 0 <= p <= 1 or isinstance(value, bool):
            raise UserError(
                f"{candidates.path}: the probability of candidate {candidates.ids[i]} is "
                f"{cells.shown(value)}, not a number from 0 to 1"
            )
        values[i] = p
    if len(values) and np.isnan(values).all():
        raise UserError(f"{candidates.path}: the candidates have no probability; {ADVICE}")
    return values


def detector_scores(candidates):
    """The detector's own score of each candidate [n], NaN where the file has none; UserError: one
    is no number."""
    values = np.full(len(candidates), np.nan)
    for i, value in enumerate(candidates.scores):
        if value not in (None, ""):
            where = f"{candidates.path}, candidate {candidates.ids[i]}"
            values[i] = cells.number(where, value, "the detector's score")
    return values


def stem(name):
    """How candidates name an image: file name without folder, ending and case."""
    return Path(str(name)).name.rsplit(".", 1)[0].lower()


def annotated_images(annotations):
    """({stem: (image, its rows)}, stems of several images)."""
    images, ambiguous = {}, set()
    for image, rows in by_image(annotations).items():
        if stem(image) in images:
            ambiguous.add(stem(image))
        images[stem(image)] = image, rows
    return images, ambiguous


def images_of(candidates, probability, annotations, ids=None, mpp=None):
    """Candidates and figures by image, as score_images() wants them, with the detector's own score.

    probability: [n], NaN: not scored; ids: of the annotations of a test set, whose images alone are
    compared; mpp: µm/px of all images, else as they say."""
    scores = detector_scores(candidates)
    images, ambiguous = annotated_images(annotations)
    names = np.array([stem(name) if name else "" for name in candidates.images], dtype=object)
    # MIDOG JSON also lists the images without a candidate.
    named = set(names.tolist()) | {stem(image) for image in candidates.sizes}
    if named <= {""}:  # also of a detector that found nothing on its one image
        if len(images) != 1:
            raise UserError(f"{candidates.path}: does not say which image its candidates are on")
        (only,) = images
        names[:] = only
        named = {only}
    if named & ambiguous:
        raise UserError(
            f"{annotations.name}: two images are called {min(named & ambiguous)}; candidates name "
            "an image by its file name alone"
        )
    if ids is not None:
        named &= {stem(annotations.image[row]) for row in annotations.rows(ids)}
    unknown = named - images.keys() - {""}
    if unknown:
        tell_left_out(candidates, unknown, f"not in {annotations.name}")

    scored, unscored = [], []
    for name in sorted(named & images.keys()):
        image, rows = images[name]
        on_image = names == name
        lacking = int(np.isnan(probability[on_image]).sum())
        if lacking:  # classify.py scores one slide at a time
            if lacking < on_image.sum():
                raise UserError(
                    f"{candidates.path}: {lacking} of {on_image.sum()} candidates on {image} have "
                    f"no probability; {ADVICE}"
                )
            unscored.append(name)
            continue
        scale = mpp or microns_per_pixel(annotations, image)
        figures = rows[annotations.label[rows] == 1]
        unit = 1.0
        if candidates.unit == "mm":  # millimetres
            unit = 1000 / scale
        scored.append(
            {
                "x": candidates.x[on_image] * unit,
                "y": candidates.y[on_image] * unit,
                "probability": probability[on_image],
                "score": scores[on_image],
                "figures_x": annotations.x[figures],
                "figures_y": annotations.y[figures],
                "mpp": scale,
                "domain": str(annotations.domain[rows[0]]),
            }
        )
    if unscored:
        tell_left_out(candidates, unscored, "with unscored candidates")
    if not scored:
        images = "scored images" if unscored else "images"
        raise UserError(f"{candidates.path}: none of its {images} is in {annotations.name}")
    return scored


def tell_left_out(candidates, names, why):
    first = common.printable(", ".join(sorted(names)[:3]))
    count = common.counted(len(names), "image")
    print(f"{candidates.path}: left out {count} {why} ({first})")


def microns_per_pixel(annotations, image):
    """µm/px of an image, from the annotations or the image itself; UserError if unknown."""
    scale = (annotations.mpp or {}).get(image)
    if scale is None and annotations.image_path(image).exists():
        scale = slides.microns_per_pixel(annotations.image_path(image))
    if scale is None:
        raise UserError(
            f"{image}: its µm/px is unknown, which {RADIUS} µm need; give it with --source-mpp"
        )
    return scale


def report(path, annotations, ids=None, mpp=None):
    """Detection by a file of scored candidates: rows (domain, number of images, curve), "all"
    first.

    ids, mpp: see images_of()."""
    candidates = formats.read_candidates(path)
    return by_domain(images_of(candidates, probabilities(candidates), annotations, ids, mpp))


def by_domain(images):
    """The rows of report() of images as of images_of()."""
    rows = [("all", len(images), score_images(images))]
    domains = sorted({image["domain"] for image in images})
    if len(domains) > 1:
        for domain in domains:
            of_domain = [image for image in images if image["domain"] == domain]
            rows.append((domain, len(of_domain), score_images(of_domain)))
    return rows


# ---------------------------------------------------------------- two scores as one


def combined_report(path, annotations, split, how, mpp=None):
    """Detection by a file of scored candidates that also have the detector's own score → (rows as
    of report(), by the combined score of the split's test images; rows of compare()).

    how: one of COMBINATIONS. Weights and thresholds come from the split's validation images, never
    from those of the test. UserError: an image is in both, a candidate has no score."""
    candidates = formats.read_candidates(path)
    probability = probabilities(candidates)
    shared = set(annotations.image[annotations.rows(split.val)].tolist())
    shared &= set(annotations.image[annotations.rows(split.test)].tolist())
    if shared:
        raise UserError(
            f"--combine: {min(shared)} has both validation and test annotations; a run that was "
            "split by case is needed"
        )
    validation, test = (
        images_of(candidates, probability, annotations, ids, mpp) for ids in (split.val, split.test)
    )
    if any(np.isnan(image["score"]).any() for image in (*validation, *test)):
        raise UserError(
            f"{path}: a candidate has no score of the detector's (CSV: a column score; MIDOG JSON: "
            "score; the challenge's JSON: detector_probability, which classify.py keeps)"
        )
    add_combined(validation, test, how)
    by_combined = [{**image, "probability": image["combined"]} for image in test]
    return by_domain(by_combined), compare(validation, test, how)


def add_combined(validation, test, how):
    """Give each image, as of images_of(), its candidates' "combined" score: of the product, or of
    the logistic regression that was fitted on the validation images."""
    combination = combine.product
    if how == "logistic":
        found = [found_by(image) for image in validation]
        combination = combine.fit(
            *(np.concatenate([i[key] for i in validation]) for key in ("score", "probability")),
            np.concatenate(found),
        )
    for image in (*validation, *test):
        image["combined"] = combination(image["score"], image["probability"])


def found_by(image):
    """Which candidates of an image find a figure, one to one: bool [n]."""
    order, adds = matched(
        image["x"],
        image["y"],
        image["probability"],
        image["figures_x"],
        image["figures_y"],
        RADIUS / image["mpp"],
    )
    found = np.zeros(len(order), bool)
    found[order] = adds
    return found


def compare(validation, test, how):
    """Either score alone and both combined on the test images, each from its threshold of the best
    F1 on the validation images on: rows of (name, at()).
    """
    rows = []
    for name, key in (("detector", "score"), ("classifier", "probability"), (how, "combined")):
        threshold = best(score_images(validation, key=key))["threshold"]
        rows.append((name, at(score_images(test, key=key), threshold)))
    return rows


def comparison(rows):
    """The rows of compare() as the text of a table."""
    lines = []
    for name, values in rows:
        numbers = [values[key] for key in ("threshold", "precision", "recall", "f1")]
        lines.append([name, *(f"{number:.3f}" for number in numbers)])
    header = ["score", "threshold", "precision", "recall", "F1"]
    return common.table(lines, header, right=range(1, 5))


def comparison_file(rows):
    """The rows of compare() as the text of a CSV file."""
    return folder.csv_text([{"score": name, **values} for name, values in rows])


# ---------------------------------------------------------------- tables


def table(rows, threshold):
    """The rows of report() as the text of a table."""
    lines = []
    for domain, images, curve in rows:
        line = [domain, images, curve["figures"], curve["candidates"]]
        for stage in (at(curve), at(curve, threshold)):
            line += [f"{stage[key]:.3f}" for key in ("precision", "recall", "f1")]
        highest = best(curve)
        lines.append([*line, f"{highest['f1']:.3f} @ {highest['threshold']:.2f}"])
    header = ["domain", "images", "figures", "cand.", "P before", "R", "F1", "P after", "R", "F1"]
    return common.table(lines, [*header, "best F1"], right=range(1, 11))


def files(rows, threshold):
    """{"detection.csv": by domain, "detection_curve.csv": at all thresholds} as text."""
    records, steps = [], []
    for domain, images, curve in rows:
        record = {
            "domain": domain,
            "images": images,
            "figures": curve["figures"],
            "candidates": curve["candidates"],
        }
        stages = {"before": at(curve), "after": at(curve, threshold), "best": best(curve)}
        for stage, values in stages.items():
            record |= {f"{stage}_{key}": value for key, value in values.items()}
        records.append(record)
        columns = [curve[name].tolist() for name in ("thresholds", "tp", "fp", "fn")]
        for step in zip(*columns):
            steps.append(dict(zip(CURVE_COLUMNS, (domain, *step))))
    return {
        "detection.csv": folder.csv_text(records),
        "detection_curve.csv": folder.csv_text(steps, CURVE_COLUMNS),
    }
