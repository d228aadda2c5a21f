"""Where a slide shows tissue, on a grid of cells of 32 µm: the rule of `dataset.patches`, on the
coarsest level of the slide that still shows it."""

from typing import NamedTuple

import numpy as np

from dataset import slides
from dataset.patches import TISSUE_GREEN, TISSUE_SHARE

CELL = 32.0  # µm
COARSEST = 8.0  # µm/px of the level that is looked at, at most: four px across a cell
TILE = 1024  # px that are read at once, at that level


class Tissue(NamedTuple):
    """cells bool [rows, columns]: which squares of `side` level-0 px, from the slide's upper left
    corner on, show tissue; size: (width, height) of the slide."""

    cells: np.ndarray
    side: int
    size: tuple

    def area(self, mpp):
        """mm² of tissue; cells at the border count as far as the slide goes."""
        width, height = self.size
        rows, columns = self.cells.shape
        heights = np.minimum(self.side, height - np.arange(rows) * self.side)
        widths = np.minimum(self.side, width - np.arange(columns) * self.side)
        return float(heights @ self.cells @ widths) * (mpp / 1000) ** 2

    def grown(self):
        """The same with the eight neighbours of every cell, for what lies at the edge of tissue."""
        padded = np.pad(self.cells, 1)
        rows, columns = self.cells.shape
        cells = np.zeros_like(self.cells)
        for down in range(3):
            for right in range(3):
                cells |= padded[down : down + rows, right : right + columns]
        return self._replace(cells=cells)


def find(image, mpp):
    """The Tissue of an image. A cell shows it if a quarter of it at least is darker than glass in
    the green channel, which both stains absorb.

    image  a path, or what slides.held gives
    mpp    µm/px of level 0
    """
    width, height = slides.dimensions(image)
    side = max(1, round(CELL / mpp))
    columns, rows = -(-width // side), -(-height // side)
    dark, seen = np.zeros(rows * columns, np.int64), np.zeros(rows * columns, np.int64)
    for left, top, step, green in overview(image, mpp):
        # Level-0 px of the middle of each pixel → its cell.
        row = ((top + (np.arange(green.shape[0]) + 0.5) * step) // side).astype(np.int64)
        column = ((left + (np.arange(green.shape[1]) + 0.5) * step) // side).astype(np.int64)
        row, column = row.clip(0, rows - 1), column.clip(0, columns - 1)
        cell = (row[:, None] * columns + column).ravel()
        seen += np.bincount(cell, minlength=len(seen))
        dark += np.bincount(cell[green.ravel() < TISSUE_GREEN], minlength=len(dark))
    cells = dark >= TISSUE_SHARE * np.maximum(seen, 1)
    return Tissue(cells.reshape(rows, columns), side, (width, height))


def overview(image, mpp):
    """The green channel of the whole image in tiles, on its coarsest level of at most COARSEST
    µm/px: yields (left, top in level-0 px, level-0 px per px, uint8 [h, w]).
    """
    slide = slides.open_slide(image)
    level, step, size = 0, 1.0, (slide.width, slide.height)
    whole = isinstance(slide, slides.WholeSlide)
    if whole:
        level = slide.handle.get_best_level_for_downsample(max(1.0, COARSEST / mpp))
        size = slide.handle.level_dimensions[level]
        step = slide.handle.level_downsamples[level]
    for y in range(0, size[1], TILE):
        for x in range(0, size[0], TILE):
            wide, high = min(TILE, size[0] - x), min(TILE, size[1] - y)
            if whole:
                pixels = slide.level_window(level, round(x * step), round(y * step), wide, high)
            else:
                pixels = slide.window(x, y, TILE)[:high, :wide]
            yield x * step, y * step, step, pixels[..., 1]
