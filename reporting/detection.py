"""A detector's candidates against the annotations: F1 of detection before and after the second
stage. No torch.

A candidate finds a mitotic figure within 7.5 µm of it (the radius of the MIDOG challenges); one
candidate finds at most one figure and the other way round. The number found is that of a maximum
matching, so it does not depend on the order of the file. This is not the challenges' own script,
which may pair greedily."""

import csv
from pathlib import Path

import numpy as np

import common
from common import UserError
from dataset import candidates as formats
from dataset import slides
from dataset.annotations import by_image, near_pairs

RADIUS = 7.5  # µm


def matched(x, y, score, figures_x, figures_y, radius):
    """For candidates in the order of falling score: how many figures the first k of them find at
    most, k = 1 … n.

    A maximum matching grown one candidate at a time: a candidate adds one to it exactly where an
    augmenting path starts at it, and one that adds nothing never will. → (order [n], found [n]
    bool); cumulate `found` for the sizes."""
    order = np.argsort(-np.asarray(score, np.float64), kind="stable")
    first, second = near_pairs(
        np.asarray(x, np.float64),
        np.asarray(y, np.float64),
        np.asarray(figures_x, np.float64),
        np.asarray(figures_y, np.float64),
        radius,
    )
    near = [[] for _ in order]
    for i, j in zip(first.tolist(), second.tolist()):
        near[i].append(j)
    owner, found = {}, np.zeros(len(order), bool)
    for k, i in enumerate(order.tolist()):
        found[k] = _augment(i, near, owner)
    return order, found


def _augment(start, near, owner):
    """Give candidate `start` a figure, moving others along; breadth first, so that depth of
    recursion is no limit.
    """
    reached, queue = {}, [start]
    for i in queue:
        for j in near[i]:
            if j in reached:
                continue
            reached[j] = i
            if j in owner:
                queue.append(owner[j])
                continue
            while True:  # back along the path, each candidate takes the figure it was reached by
                i = reached[j]
                previous = next((figure for figure in near[i] if owner.get(figure) == i), None)
                owner[j] = i
                if i == start:
                    return True
                j = previous
    return False


def score_images(images, radius=RADIUS):
    """Detection over images → dict. images: list of dicts with x, y, probability (candidates, px),
    figures_x, figures_y (px), mpp (µm/px), domain.

    before: all candidates; curve: thresholds from the highest probability with tp, fp, fn,
    precision, recall, f1."""
    parts, figures = [], 0
    for image in images:
        order, found = matched(
            image["x"],
            image["y"],
            image["probability"],
            image["figures_x"],
            image["figures_y"],
            radius / image["mpp"],
        )
        parts.append((np.asarray(image["probability"], np.float64)[order], found))
        figures += len(image["figures_x"])
    p = np.concatenate([part[0] for part in parts]) if parts else np.zeros(0)
    found = np.concatenate([part[1] for part in parts]) if parts else np.zeros(0, bool)
    if np.isnan(p).any():
        raise UserError("the candidates' probabilities hold NaN")
    order = np.argsort(
        -p, kind="stable"
    )  # keeps each image's own order, so its prefixes stay prefixes
    p, tp = p[order], np.cumsum(found[order])
    last = np.flatnonzero(np.r_[p[1:] != p[:-1], True]) if len(p) else np.zeros(0, int)
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
    kept = (
        len(curve["thresholds"])
        if threshold is None
        else int((curve["thresholds"] >= threshold).sum())
    )
    tp, fp, fn = (
        (int(curve[name][kept - 1]) for name in ("tp", "fp", "fn"))
        if kept
        else (0, 0, curve["figures"])
    )
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
    """The threshold with the highest F1 (of several the highest); it is chosen on the very data it
    is scored on.
    """
    if not len(curve["thresholds"]):
        return at(curve, 1.0)
    f1 = 2 * curve["tp"] / np.maximum(2 * curve["tp"] + curve["fp"] + curve["fn"], 1)
    return at(curve, float(curve["thresholds"][np.argmax(f1)]))


# ---------------------------------------------------------------- files

ADVICE = "score them with classify.py first (MIDOG JSON, the challenge's JSON or CSV)"


def probabilities(found):
    """The probability that classify.py wrote beside each candidate, -1 where it wrote none;
    UserError: none at all.
    """
    try:
        if found.kind == "csv":
            table = found.content[0]
            column = [name.strip().lower() for name in table[0]].index("probability")
            values = [table[place][column] for place in found.places]
        else:
            records = found.content[{"midog": "annotations", "challenge": "points"}[found.kind]]
            values = [records[place].get("probability") for place in found.places]
        values = np.array([-1.0 if value in (None, "") else float(value) for value in values])
    except (KeyError, TypeError, ValueError):
        values = None
    if values is None or len(values) and (values == -1).all():
        raise UserError(f"{found.path}: the candidates have no probability; {ADVICE}")
    if np.isnan(values).any():
        raise UserError(f"{found.path}: the candidates' probabilities hold NaN")
    return values


def images_of(found, probability, annotations, ids=None, mpp=None):
    """Candidates and figures by image. ids: of the annotations of a test set, whose images alone
    are scored.
    """

    def stem(name):
        return Path(str(name)).name.rsplit(".", 1)[0].lower()

    table, twice = {}, set()
    for image, rows in by_image(annotations).items():
        if stem(image) in table:
            twice.add(stem(image))
        table[stem(image)] = image, rows
    names = np.array([stem(name) if name else "" for name in found.images], dtype=object)
    wanted = set(names.tolist())
    if found.kind == "midog":  # its list of images also names those without a candidate
        wanted |= {
            stem(image.get("file_name", ""))
            for image in found.content.get("images", ())
            if isinstance(image, dict)
        }
    if wanted <= {""}:  # also of a detector that found nothing on its one image
        if len(table) != 1:
            raise UserError(f"{found.path}: does not say which image its candidates are on")
        names[:], wanted = next(iter(table)), {next(iter(table))}
    if wanted & twice:
        raise UserError(
            f"{annotations.name}: two images are called {min(wanted & twice)}; candidates name an "
            "image by "
            "its file name alone"
        )
    if ids is not None:
        wanted &= {stem(annotations.image[row]) for row in annotations.rows(ids)}
    unknown = wanted - set(table)
    if unknown - {""}:
        print(
            f"{found.path}: {len(unknown)} images are not in {annotations.name} and are left out "
            f"({', '.join(sorted(unknown)[:3])})"
        )
    images, unscored = [], []
    for name in sorted(wanted & set(table)):
        (image, rows), own = table[name], names == name
        if (probability[own] == -1).any():  # classify.py scores one slide at a time
            if (probability[own] != -1).any():
                raise UserError(
                    f"{found.path}: {(probability[own] == -1).sum()} of {own.sum()} candidates on "
                    f"{image} "
                    f"have no probability; {ADVICE}"
                )
            unscored.append(name)
            continue
        scale = mpp or (annotations.mpp or {}).get(image)
        if scale is None and annotations.image_path(image).exists():
            scale = slides.microns_per_pixel(annotations.image_path(image))
        if scale is None:
            raise UserError(f"{image}: its µm/px is not known, so 7.5 µm is not; give --source-mpp")
        figures = rows[annotations.label[rows] == 1]
        x, y = found.x[own], found.y[own]
        if found.kind == "challenge":  # millimetres
            x, y = x * 1000 / scale, y * 1000 / scale
        images.append(
            {
                "x": x,
                "y": y,
                "probability": probability[own],
                "figures_x": annotations.x[figures],
                "figures_y": annotations.y[figures],
                "mpp": scale,
                "domain": str(annotations.domain[rows[0]]),
            }
        )
    if unscored:
        print(
            f"{found.path}: {len(unscored)} images have candidates that are not scored yet, and "
            "are left out "
            f"({', '.join(unscored[:3])})"
        )
    if not images:
        raise UserError(
            f"{found.path}: none of its {'scored ' * bool(unscored)}images is in {annotations.name}"
        )
    return images


def report(path, annotations, threshold, ids=None, mpp=None):
    """Scores of a file of candidates: list of rows (domain, images, curve), all first."""
    found = formats.read(path)
    images = images_of(found, probabilities(found), annotations, ids, mpp)
    domains = sorted({image["domain"] for image in images})
    rows = [("all", len(images), score_images(images))]
    if len(domains) > 1:
        for domain in domains:
            own = [image for image in images if image["domain"] == domain]
            rows.append((domain, len(own), score_images(own)))
    return rows


def table(rows, threshold):
    """The rows of report() as text and as a list of dicts."""
    text, records = [], []
    for domain, images, curve in rows:
        stages = {"before": at(curve), "after": at(curve, threshold), "best": best(curve)}
        records.append(
            {
                "domain": domain,
                "images": images,
                "figures": curve["figures"],
                "candidates": curve["candidates"],
            }
            | {
                f"{stage}_{key}": value
                for stage, values in stages.items()
                for key, value in values.items()
            }
        )
        text.append(
            [domain, images, curve["figures"], curve["candidates"]]
            + [
                f"{stages[stage][key]:.3f}"
                for stage in ("before", "after")
                for key in ("precision", "recall", "f1")
            ]
            + [f"{stages['best']['f1']:.3f} @ {stages['best']['threshold']:.2f}"]
        )
    header = (
        "domain",
        "images",
        "figures",
        "cand.",
        "P before",
        "R",
        "F1",
        "P after",
        "R",
        "F1",
        "best F1",
    )
    return common.table(text, header, right=range(1, 11)), records


def write(out, rows, threshold):
    """detection.csv (by domain) and detection_curve.csv (all thresholds) into the folder `out`."""
    _, records = table(rows, threshold)
    with (
        common.atomic(Path(out) / "detection.csv") as temporary,
        open(temporary, "w", newline="") as file,
    ):
        writer = csv.DictWriter(file, records[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)
    with (
        common.atomic(Path(out) / "detection_curve.csv") as temporary,
        open(temporary, "w", newline="") as file,
    ):
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("domain", "threshold", "tp", "fp", "fn"))
        for domain, _, curve in rows:
            for row in zip(*(curve[name].tolist() for name in ("thresholds", "tp", "fp", "fn"))):
                writer.writerow((domain, *row))
