"""Scored candidates as a file of another format than the one they came in.

A format that can be written so has `create(path, pictures, cells, names)`, and `ONE_IMAGE = True`
if its files hold the cells of one image, `SCALED = True` if it needs µm/px and `SCORED = True` if
it has no place for a cell without a probability."""

import math
from pathlib import Path
from typing import NamedTuple

from common import UserError
from dataset import dicom, slides
from dataset.formats.cells import several, shown


class Picture(NamedTuple):
    """An image on which cells lie; what is not known of it is None."""

    name: str | None
    path: Path | None
    width: int | None = None
    height: int | None = None
    mpp: float | None = None


class Cell(NamedTuple):
    """A candidate: index of its picture, level-0 px; the file's own id, class and detector's score,
    each or None; (probability, label) or None.
    """

    picture: int
    x: float
    y: float
    id: str | None
    own: str | None
    detector: float | None
    score: tuple | None


def check(candidates, module, path, images, scales):
    """UserError if the format `module` cannot hold the candidates; else notes on what will be left
    out. The arguments are those of `create`.
    """
    if not hasattr(module, "create"):
        raise UserError(
            f"--out {path}: a SlideRunner database is written from such a database alone; choose "
            ".csv, .json, .geojson or .xml"
        )
    own = list(dict.fromkeys(image for image in images if image is not None))
    if not getattr(module, "ONE_IMAGE", False):
        return []
    if len(own) > 1:
        raise UserError(
            f"--out {path}: such a file holds the candidates of one image, and these lie on "
            f"{len(own)}; choose .csv or .json, or score a folder of files, one per slide"
        )
    if getattr(module, "SCALED", False) and own and scales.get(own[0]) is None:
        raise UserError(
            f"--out {path}: this format is in millimetres, and the µm/px of {own[0]} is unknown; "
            "give --mpp"
        )
    elsewhere = images.count(None)
    if elsewhere:
        return [f"{several(elsewhere, 'candidate')} on other images will not be in {path}"]
    return []


def create(candidates, module, path, scores, names, relabel, images, scales, **more):
    """Write the candidates in the format `module` → how many it could not hold.

    scores   (probability, label) or None, of each candidate
    names    of the labels 0 and 1
    relabel  whether the new class takes the place of the candidates' own
    images   the file of each candidate's slide; None: on another image
    scales   {file of a slide: µm/px or None}
    more     for the format's own `create`
    """
    one_image, scored = (getattr(module, name, False) for name in ("ONE_IMAGE", "SCORED"))
    pictures, places, cells, left = [], {}, [], 0
    for i, (image, score) in enumerate(zip(images, scores)):
        if (one_image and image is None) or (scored and score is None):
            left += 1
            continue
        key = image or candidates.images[i]
        if key not in places:
            places[key] = len(pictures)
            pictures.append(_picture(candidates.images[i], image, scales))
        x, y = float(candidates.x[i]), float(candidates.y[i])
        if candidates.unit == "mm":
            x, y = x * 1000 / scales[image], y * 1000 / scales[image]
        own = candidates.categories[i]
        if own is not None:
            own = candidates.names.get(own) or own
        if relabel and score is not None:
            own = names[score[1]]
        detector = candidates.scores[i]
        if detector is None and candidates.format == "challenge":  # whose points have only one
            detector = candidates.probabilities[i]
        cells.append(
            Cell(places[key], x, y, candidates.given_ids[i], own, _finite(detector), score)
        )
    module.create(path, pictures, cells, names, **more)
    return left


def _finite(value):
    """A detector's score as a number; None where the file has none or something else."""
    try:
        value = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return value if math.isfinite(value) else None


def _picture(name, path, scales):
    if path is None:
        return Picture(name, None)
    width = height = None
    try:
        width, height = slides.dimensions(path)
    except UserError:  # left out, and said so
        pass
    return Picture(name or dicom.name_of(path), path, width, height, scales.get(path))


# ---------------------------------------------------------------- what formats share

BOX = 50  # px: side of the box around a cell, as MIDOG has it


def box(cell):
    """[x1, y1, x2, y2] around a cell."""
    return [cell.x - BOX / 2, cell.y - BOX / 2, cell.x + BOX / 2, cell.y + BOX / 2]


def class_of(cell, names):
    """The class that a new file shows where a format has one: the candidate's own, else the new
    one; None if it has neither.
    """
    if cell.own is not None or cell.score is None:
        return cell.own
    return names[cell.score[1]]


def ids_of(cells):
    """An id for each cell: its own if all have one of their own, as a number if it is one, else 1,
    2, …
    """
    own = [cell.id for cell in cells]
    if None in own or len(set(own)) < len(own):
        return list(range(1, len(cells) + 1))
    return [int(name) if name.isascii() and name.isdigit() else shown(name) for name in own]
