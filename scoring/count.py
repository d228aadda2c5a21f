"""The mitotic count as a pathologist reports it: figures per mm², and the densest 2.37 mm².

2.37 mm² are ten high-power fields of 0.237 mm². The window is upright and 4:3, 1.778 mm wide and
1.333 mm high, as Aubreville et al. count (Scientific Reports 10:16447, 2020). Of all its positions
the one with the most figures is found exactly; figures on its border count.

Per mm² of what: of the tumour if its outline is given, else of the slide's tissue."""

from typing import NamedTuple

import numpy as np

from common import UserError
from dataset import slides
from dataset.formats import files, geojson
from dataset.formats.cells import listed, plain

FIELDS_AREA = 2.37  # mm²
WIDTH = 1000 * (FIELDS_AREA * 4 / 3) ** 0.5  # µm
HEIGHT = 1000 * (FIELDS_AREA * 3 / 4) ** 0.5
ROWS = 16384  # scan lines through an outline whose area is measured
MAX_CROSSINGS = 50_000_000  # of outlines with scan lines; what needs more is no tumour's outline
# Classes of outlines, as `plain` writes them, that are the tumour beyond doubt.
TUMOUR = {"tumor", "tumour", "tumor area", "tumour area", "tumor region", "tumour region"}


class Window(NamedTuple):
    """Where the densest 2.37 mm² lie, in level-0 px, and how many figures they hold. On a slide
    that is smaller, the window is the slide's part of it."""

    figures: int
    left: float
    top: float
    right: float
    bottom: float


class Count(NamedTuple):
    """A slide's mitotic count. None: unknown."""

    figures: int  # of the area, if one is given, else of the slide
    area: float | None  # mm²
    area_of: str | None  # "tumour" or "tissue"
    window: Window | None  # None: µm/px unknown, or no figure
    window_area: float | None  # mm² of the window: 2.37, or less on a smaller slide

    @property
    def per_mm2(self):
        if not self.area:
            return None
        return self.figures / self.area


def count(x, y, mpp, size, tumour=None, tissue=None):
    """The Count of the mitotic figures at x, y [n], level-0 px.

    mpp     µm/px; None: unknown, and with it every area
    size    (width, height) of the slide, px
    tumour  outlines, see `outlines`; figures outside them do not count
    tissue  the slide's tissue in mm², see tissue.area; used if there is no tumour
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    area_of = None
    if tumour is not None:
        inside = contains(tumour, x, y)
        x, y = x[inside], y[inside]
        area_of = "tumour"
    elif tissue is not None:
        area_of = "tissue"
    if mpp is None:
        return Count(len(x), None, area_of, None, None)
    area = tissue
    if tumour is not None:
        area = area_px(tumour, size) * (mpp / 1000) ** 2
    window, window_area = densest(x, y, WIDTH / mpp, HEIGHT / mpp, size), None
    if window is not None:
        sides = (window.right - window.left) * (window.bottom - window.top)
        window_area = sides * (mpp / 1000) ** 2
    return Count(len(x), area, area_of, window, window_area)


def text(result):
    """A Count as one line for the terminal."""
    if result.area is None and result.window is None and result.figures:
        return f"{result.figures} mitotic figures; per mm² unknown, like the slide's µm/px (--mpp)"
    parts = [f"{result.figures} mitotic figures"]
    if result.per_mm2 is not None:
        of = f"{result.area:.2f} mm² of {result.area_of}"
        parts[0] += f" on {of}: {result.per_mm2:.2f} per mm²"
    elif result.area_of is not None and result.area == 0:
        parts[0] += f", no {result.area_of}"
    if result.window is not None:
        window = result.window
        place = f"({(window.left + window.right) / 2:.0f}, {(window.top + window.bottom) / 2:.0f})"
        parts.append(f"densest {result.window_area:.2f} mm²: {window.figures}, around {place} px")
    return "; ".join(parts)


def record(result):
    """A Count as a row {column: value} of a report; None: unknown."""
    row = {
        "figures": result.figures,
        "area_mm2": result.area,
        "area_of": result.area_of,
        "per_mm2": result.per_mm2,
        "densest_figures": None,
        "densest_mm2": result.window_area,
        "densest_x": None,
        "densest_y": None,
    }
    window = result.window
    if window is not None:
        row["densest_figures"] = window.figures
        row["densest_x"] = (window.left + window.right) / 2
        row["densest_y"] = (window.top + window.bottom) / 2
    return row


# ---------------------------------------------------------------- the densest window


def densest(x, y, width, height, size):
    """The Window of width × height px with the most of the points x, y [n]; None without points.

    size: (width, height) of the slide, beyond which the window never reaches; on a smaller slide it
    is cut. Of several best windows it is the leftmost, then the uppermost, centred on its figures.
    """
    if not len(x):
        return None
    figures, left, top = most_in_window(x, y, width, height)
    held = (left <= x) & (x <= left + width) & (top <= y) & (y <= top + height)
    # Centred on what it holds, and moved into the slide: neither loses a figure of the slide's.
    sides = []
    for values, side, whole in ((x[held], width, size[0]), (y[held], height, size[1])):
        start = (values.min() + values.max() - side) / 2
        start = max(0.0, min(start, whole - side))
        sides.append((start, min(start + side, whole)))
    (left, right), (top, bottom) = sides
    return Window(figures, float(left), float(top), float(right), float(bottom))


def most_in_window(x, y, width, height):
    """(most points in a closed window, its left, its top), exactly.

    Some best window has a point on its left edge and one on its top edge. Its left edge sweeps over
    the points from left to right; `held` counts, for every top edge, what the window holds. A count
    can only become the largest where a point has just entered, so only there it is looked at: for
    100,000 points seconds, in memory that is linear."""
    order = np.lexsort((y, x))
    x, y = np.asarray(x, np.float64)[order], np.asarray(y, np.float64)[order]
    lefts, tops = np.unique(x), np.unique(y)
    # Point i lies in the windows of the tops first[i]:last[i].
    first = np.searchsorted(tops + height, y, "left").tolist()
    last = np.searchsorted(tops, y, "right").tolist()
    # With the left edge at lefts[k], the window holds the points gone[k]:come[k].
    gone = np.searchsorted(x, lefts, "left").tolist()
    come = np.searchsorted(x, lefts + width, "right").tolist()
    held = np.zeros(len(tops), np.int32)
    best, left, top, out, inside = 0, 0.0, 0.0, 0, 0
    for k, edge in enumerate(lefts.tolist()):
        for i in range(out, gone[k]):
            held[first[i] : last[i]] -= 1
        for i in range(inside, come[k]):
            part = held[first[i] : last[i]]
            part += 1
            most = int(part.max())
            if most > best:
                best, left, top = most, edge, float(tops[first[i] + int(part.argmax())])
        out, inside = gone[k], come[k]
    return best, left, top


# ---------------------------------------------------------------- outlines of the tumour


def outlines(path, image):
    """The tumour's polygons out of a GeoJSON file, in level-0 px of the image: list of polygons,
    each a list of rings float [n, 2] (the first is the outline, the others are holes).

    Of several classes it is the one called Tumor; UserError if none is, or without a region."""
    by_class = {}
    for name, rings in geojson.regions(files.Source(path)):
        by_class.setdefault(name, []).append(rings)
    if not by_class:
        raise UserError(f"{path}: holds no region (a polygon larger than a cell)")
    chosen = [name for name in by_class if name is not None and plain(name) in TUMOUR]
    if not chosen and len(by_class) == 1:
        chosen = list(by_class)
    if not chosen:
        names = {name or "without a class": None for name in by_class}
        raise UserError(
            f"{path}: none of its classes of regions ({listed(names)}) is called Tumor; give the "
            "tumour's outlines that class, or a file of their own"
        )
    offset = np.array(slides.bounds_offset(image), np.float64)
    return [[ring + offset for ring in rings] for name in chosen for rings in by_class[name]]


def contains(polygons, x, y):
    """Which points lie in at least one of the polygons, by the even-odd rule → bool [n]."""
    order = np.argsort(y, kind="stable")
    sorted_x, sorted_y = x[order], y[order]
    inside = np.zeros(len(x), bool)
    for rings in polygons:
        odd = np.zeros(len(x), bool)
        for x0, y0, x1, y1 in edges(rings).tolist():
            # The points at the height of this edge; the upper end counts, the lower does not.
            start, end = np.searchsorted(sorted_y, sorted((y0, y1)), "left")
            if start < end:
                crossing = x0 + (sorted_y[start:end] - y0) * ((x1 - x0) / (y1 - y0))
                odd[start:end] ^= sorted_x[start:end] < crossing
        inside |= odd
    result = np.zeros(len(x), bool)
    result[order] = inside
    return result


def edges(rings):
    """The edges of a polygon's rings, holes included: float [n, 4], x0, y0, x1, y1."""
    return np.concatenate([np.hstack([ring, np.roll(ring, -1, axis=0)]) for ring in rings])


def area_px(polygons, size):
    """Area in px² of the union of polygons, on a slide of size (width, height).

    By ROWS scan lines, on each of which the length is exact: what overlaps counts once. The error
    is below a thousandth of any outline that is drawn by hand."""
    every = [np.concatenate(rings) for rings in polygons]
    top = max(0.0, min(points[:, 1].min() for points in every))
    bottom = min(float(size[1]), max(points[:, 1].max() for points in every))
    if top >= bottom:
        return 0.0
    step = (bottom - top) / ROWS
    row_width = size[0] + 1.0  # lines one after the other, on one axis
    starts, ends = [], []
    for rings in polygons:
        row, x = crossings(edges(rings), top, step)
        place = np.sort(row * row_width + np.clip(x, 0, size[0]))
        starts.append(place[0::2])
        ends.append(place[1::2])
    starts, ends = np.concatenate(starts), np.concatenate(ends)
    order = np.argsort(starts, kind="stable")
    starts, ends = starts[order], np.maximum.accumulate(ends[order])
    covered_until = np.r_[-np.inf, ends[:-1]]
    return float(np.maximum(ends - np.maximum(starts, covered_until), 0).sum() * step)


def crossings(lines, top, step):
    """Where edges [n, 4] cross scan lines at top + (row + 0.5) * step → (row [m], x [m])."""
    x0, y0, x1, y1 = lines.T
    # Rows from `first` to before `last`, within the slide.
    first = np.ceil((np.minimum(y0, y1) - top) / step - 0.5).clip(0, ROWS).astype(np.int64)
    last = np.ceil((np.maximum(y0, y1) - top) / step - 0.5).clip(0, ROWS).astype(np.int64)
    number = last - first
    if number.sum() > MAX_CROSSINGS:
        raise UserError("the tumour's outline has too many points; simplify it")
    row = np.arange(number.sum()) - np.repeat(np.cumsum(number) - number, number)
    row += np.repeat(first, number)
    edge = np.repeat(np.arange(len(lines)), number)
    slope = np.zeros(len(lines))
    steep = y0 != y1
    slope[steep] = (x1 - x0)[steep] / (y1 - y0)[steep]
    return row, x0[edge] + (top + (row + 0.5) * step - y0[edge]) * slope[edge]
