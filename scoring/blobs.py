"""Candidates without a detector: dark blobs of haematoxylin, found by hand-made arithmetic.

A candidate is a local maximum of the haematoxylin that a Gaussian of 2 µm sees above what one of
6 µm sees around it. Nearly every mitotic figure is one, and so is many another nucleus: the second
stage, an exported model, has to tell them apart. A trained detector proposes far fewer.

The slide is read in tiles, on tissue alone. All arithmetic is of whole numbers on one fixed grid,
so the result does not depend on the tiles or on the number of threads, not in the last digit."""

import functools
import math
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from common import UserError
from dataset import slides
from scoring import tissue

WORKING = 0.5  # µm/px at which blobs are looked for, as near as whole numbers of px allow
COARSEST = 1.1  # µm/px of a slide, beyond which a figure is too few pixels
TILE = 1024  # px of the working grid
INNER, OUTER = 2.0, 6.0  # µm, standard deviations of the two blurs: a figure, and its surroundings
APART = 6.0  # µm: of two blobs that are nearer, the weaker is dropped
LEAST = 0.02  # of haematoxylin above the surroundings, below which nothing is looked at
LEAST_SCORE = 0.05  # of a candidate; see the table in the README
UNIT = 4096  # whole numbers per unit of optical density
OUTSIDE = 1 << 62  # larger than any sum
STAINED = 0.99  # quantile of the tissue's haematoxylin that a blob's score is relative to

# What a result depends on beside the slide, as text: another one makes finished slides unfinished.
SETTINGS = f"blobs {WORKING} {INNER} {OUTER} {APART} {LEAST} {LEAST_SCORE} {STAINED}"

# Optical densities of haematoxylin, eosin and the remainder, in red, green and blue (Ruifrok &
# Johnston 2001)
STAINS = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])


class Blobs(NamedTuple):
    """x, y [n]: level-0 px, in the order of rows and columns. score [n]: how far each stands out
    against how strongly the slide is stained, from 0 to 1. tissue: the tissue.Tissue that was
    searched."""

    x: np.ndarray
    y: np.ndarray
    score: np.ndarray
    tissue: tissue.Tissue


def find(image, mpp=None, tile=TILE, workers=4, progress=None):
    """The Blobs of a slide.

    image     a path | openslide.OpenSlide | uint8 [H, W, 3], the pixels of a whole image
    mpp       µm/px; None: as its file says. UserError: unknown, or too coarse
    tile      px of the working grid that are read at once, without their margin
    workers   threads, each of which holds a tile
    progress  its .update(count) is called, with the number of tiles
    """
    image = slides.held(image)
    mpp = mpp or slides.microns_per_pixel(image)
    if mpp is None:
        raise UserError(f"{image}: its µm/px is unknown; give it with --mpp")
    if mpp > COARSEST:
        raise UserError(
            f"{image}: {mpp:.4g} µm/px is too coarse for blobs as small as mitotic figures "
            f"(at most {COARSEST})"
        )
    search = Search(image, mpp)
    tiles = search.tiles(tile)
    if progress is not None:
        progress.total = len(tiles)
    found, amounts = [np.zeros((3, 0), np.int64)], np.zeros(search.most + 1, np.int64)
    with ThreadPoolExecutor(workers, thread_name_prefix="blobs") as pool:
        try:
            for peaks, histogram in pool.map(search.tile, tiles):
                found.append(peaks)
                amounts += histogram
                if progress is not None:
                    progress.update(1)
        finally:
            pool.shutdown(cancel_futures=True)
    column, row, height = np.concatenate(found, axis=1)
    order = np.lexsort((column, row))
    column, row, height = column[order], row[order], height[order]
    level = max(1, int(np.searchsorted(np.cumsum(amounts), STAINED * amounts.sum())))
    keep = strongest(column, row, height, APART / search.mpp)
    score = height[keep] / (height[keep] + level)
    keep, score = keep[score >= LEAST_SCORE], score[score >= LEAST_SCORE]
    x, y = (column[keep] + 0.5) * search.step, (row[keep] + 0.5) * search.step
    return Blobs(x, y, score, search.tissue)


class Search:
    """One slide on its working grid, whose px are the means of `step` × `step` level-0 px."""

    def __init__(self, image, mpp):
        self.image = image
        self.step = max(1, round(WORKING / mpp))
        self.mpp = self.step * mpp
        width, height = slides.dimensions(image)
        self.width, self.height = width // self.step, height // self.step
        self.tissue = tissue.find(image, mpp)
        self.near_tissue = self.tissue.grown().cells
        self.inner, self.outer = (Blur(sigma / self.mpp) for sigma in (INNER, OUTER))
        self.margin = self.outer.reach + 1
        # What the blurs weigh where the slide ends: outside of it nothing is known.
        self.known = {}
        for blur in (self.inner, self.outer):
            for length in (self.width, self.height):
                self.known[blur, length] = blur.line(np.ones(length, np.int64))
        self.tables = stain_tables(self.step)
        self.most = int(sum(table.max() for table in self.tables))

    def tiles(self, side):
        """(left, top, right, bottom) of the tiles that hold tissue or its surroundings."""
        found = []
        for top in range(0, self.height, side):
            for left in range(0, self.width, side):
                right, bottom = min(left + side, self.width), min(top + side, self.height)
                if self.on_tissue(self.near_tissue, left, top, right, bottom).any():
                    found.append((left, top, right, bottom))
        return found

    def on_tissue(self, cells, left, top, right, bottom):
        """Whether the middle of each px of a tile lies in one of the cells: bool [h, w]."""
        row = (2 * np.arange(top, bottom) + 1) * self.step // 2 // self.tissue.side
        column = (2 * np.arange(left, right) + 1) * self.step // 2 // self.tissue.side
        return cells[np.ix_(row, column)]

    def tile(self, box):
        """The peaks of a tile, int64 [3, n] (column, row, height), and how many of its px on tissue
        have each amount of haematoxylin.
        """
        left, top, right, bottom = box
        amount = self.amount(box)
        height = np.zeros((bottom - top + 2, right - left + 2), np.int64)
        for blur, sign in ((self.inner, 1), (self.outer, -1)):
            # A frame of one px around the tile: its peaks are compared with their neighbours.
            cut = self.margin - 1 - blur.reach
            inner = slice(cut, len(amount) - cut), slice(cut, amount.shape[1] - cut)
            sums = blur.valid(blur.valid(amount[inner]).T).T
            height += sign * sums // self.weight(blur, box)
        peaks = local_maxima(height)
        peaks &= self.on_tissue(self.near_tissue, *box)
        peaks &= height[1:-1, 1:-1] > LEAST * UNIT
        row, column = np.nonzero(peaks)
        heights = height[1:-1, 1:-1][row, column]
        of_tile = amount[self.margin : -self.margin, self.margin : -self.margin]
        stained = of_tile[self.on_tissue(self.tissue.cells, *box)]
        histogram = np.bincount(stained, minlength=self.most + 1)
        return np.stack([column + left, row + top, heights]), histogram

    def amount(self, box):
        """Haematoxylin in a tile with its margin, int64 [h, w]; 0 outside of the slide."""
        left, top, right, bottom = box
        margin, step = self.margin, self.step
        wide, high = right - left + 2 * margin, bottom - top + 2 * margin
        window = slides.open_slide(self.image).window(
            (left - margin) * step, (top - margin) * step, max(wide, high) * step
        )
        window = window[: high * step, : wide * step].reshape(high, step, wide, step, 3)
        sums = window.sum((1, 3), dtype=np.int32)
        amount = sum(table[sums[..., i]] for i, table in enumerate(self.tables)).clip(0)
        amount[: max(0, margin - top)] = 0
        amount[:, : max(0, margin - left)] = 0
        amount[max(0, self.height - top + margin) :] = 0
        amount[:, max(0, self.width - left + margin) :] = 0
        return amount

    def weight(self, blur, box):
        """What `blur` weighs around each px of a tile and its frame: int64 [h + 2, w + 2]. Outside
        of the slide so much that no px there is a maximum.
        """
        left, top, right, bottom = box
        lines = []
        for start, end, length in ((top, bottom, self.height), (left, right, self.width)):
            place = np.arange(start - 1, end + 1)
            line = self.known[blur, length][place.clip(0, length - 1)]
            lines.append(np.where((0 <= place) & (place < length), line, 0))
        weight = lines[0][:, None] * lines[1]
        weight[weight == 0] = OUTSIDE
        return weight


class Blur:
    """A Gaussian blur as three box filters, in whole numbers: sums, not means."""

    def __init__(self, sigma):
        self.radius = max(1, round((4 * sigma**2 + 1) ** 0.5 / 2 - 0.5))
        self.reach = 3 * self.radius

    def valid(self, image):
        """Along the first axis: int64 [h, w] → [h - 2 * reach, w]."""
        width = 2 * self.radius + 1
        for _ in range(3):
            sums = np.zeros((len(image) + 1, *image.shape[1:]), np.int64)
            np.cumsum(image, axis=0, out=sums[1:])
            image = sums[width:] - sums[:-width]
        return image

    def line(self, values):
        """Of a line int64 [n], with zeros around it → [n]."""
        return self.valid(np.pad(values, self.reach))


@functools.cache
def stain_tables(step):
    """Haematoxylin of a px by the sum of red, green and blue over step × step level-0 px: three
    int64 [255 * step² + 1], which are to be added; 1 / UNIT of optical density.
    """
    mean = np.arange(255 * step**2 + 1) / step**2
    density = -np.log((mean + 1) / 256)
    weights = np.linalg.inv(STAINS)[:, 0]
    return [np.rint(UNIT * weight * density).astype(np.int64) for weight in weights]


def local_maxima(height):
    """bool [h - 2, w - 2]: which px of [h, w], without its frame, are as high as their neighbours
    before them (above, and on the left) and higher than those after them: of equal ones the last.
    """
    inner, result = height[1:-1, 1:-1], True
    rows, columns = height.shape
    for down in (0, 1, 2):
        for right in (0, 1, 2):
            other = height[down : rows - 2 + down, right : columns - 2 + right]
            if (down, right) < (1, 1):
                result = result & (inner >= other)
            elif (down, right) > (1, 1):
                result = result & (inner > other)
    return result


def strongest(x, y, score, distance):
    """Rows, ascending, that remain if of two points nearer than `distance` the weaker goes; of two
    equal ones the later.
    """
    squares, keep = {}, []  # as wide as `distance`: only those of neighbours can be too near
    for i in np.argsort(-score, kind="stable").tolist():
        a, b = int(x[i]), int(y[i])
        column, row = math.floor(a / distance), math.floor(b / distance)
        near = []
        for u in (-1, 0, 1):
            for v in (-1, 0, 1):
                near += squares.get((column + u, row + v), ())
        if all((a - c) ** 2 + (b - d) ** 2 >= distance**2 for c, d in near):
            squares.setdefault((column, row), []).append((a, b))
            keep.append(i)
    return np.sort(np.array(keep, np.int64))
