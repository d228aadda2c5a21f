"""Scored cells drawn on a view of their slide."""

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dataset import slides
from dataset.formats import COLOURS

CELL = 25  # px at level 0: from a cell's centre to its mark


def view_around(image, x, y, longest, margin=200):
    """The part of an image that holds the points → (PIL image of at most `longest` px, its left and
    top in level-0 px, its scale).
    """
    width, height = slides.dimensions(image)
    left, top = max(0, int(x.min()) - margin), max(0, int(y.min()) - margin)
    right, bottom = min(width, int(x.max()) + margin), min(height, int(y.max()) + margin)
    wide, high = max(1, right - left), max(1, bottom - top)
    scale = min(1.0, longest / max(wide, high))
    slide = slides.open_slide(image)
    if slide.random_access:
        level = slide.handle.get_best_level_for_downsample(1 / scale)
        factor = slide.handle.level_downsamples[level]
        size = max(1, round(wide / factor)), max(1, round(high / factor))
        pixels = slide.handle.read_region((left, top), level, size)
        view = Image.new("RGB", pixels.size, "white")
        view.paste(pixels, mask=pixels.getchannel("A"))  # transparent where nothing was scanned
    else:
        view = Image.fromarray(slide.pixels()[top : top + high, left : left + wide])
    size = max(1, round(wide * scale)), max(1, round(high * scale))
    return view.resize(size), left, top, scale


class Marks:
    """Draws marks of one size on a view: rings or squares, whole or dashed, with a text beside
    them. Each has a white border, to be legible on dark nuclei too.
    """

    def __init__(self, view, scale=1.0):
        self.draw, self.width = ImageDraw.Draw(view), view.width
        self.radius = max(4, round(CELL * scale))
        self.line = max(2, self.radius // 6)
        self.font = ImageFont.load_default(max(12, max(view.size) // 80))

    def mark(self, x, y, label, text="", square=False, dashed=False):
        """A mark around (x, y), px of the view, in the colour of `label` (1 or 0)."""
        colour = COLOURS[label]
        for r, width, stroke in (
            (self.radius + 1, self.line + 2, "white"),
            (self.radius, self.line, colour),
        ):
            box = (x - r, y - r, x + r, y + r)
            if dashed:
                self._dashes(box, square, stroke, width)
            elif square:
                self.draw.rectangle(box, outline=stroke, width=width)
            else:
                self.draw.ellipse(box, outline=stroke, width=width)
        if text:
            gap = self.radius + 3
            width = self.draw.textlength(text, font=self.font)
            if x + gap + width > self.width and x - gap - width > 0:  # no room on the right
                gap = -gap - width
            self.text(x + gap, y, text, colour)

    def _dashes(self, box, square, stroke, width):
        if not square:
            for start in range(0, 360, 45):
                self.draw.arc(box, start, start + 25, fill=stroke, width=width)
            return
        left, top, right, bottom = box
        sides = np.linspace(0, 1, 7)  # dash, gap, dash, gap, dash, gap
        for i in (0, 2, 4):
            a, b = left + (right - left) * sides[[i, i + 1]]
            c, d = top + (bottom - top) * sides[[i, i + 1]]
            # Around the square in one direction, so that a dash begins at every corner.
            self.draw.line((a, top, b, top), fill=stroke, width=width)
            self.draw.line((right, c, right, d), fill=stroke, width=width)
            self.draw.line((left + right - a, bottom, left + right - b, bottom), stroke, width)
            self.draw.line((left, top + bottom - c, left, top + bottom - d), stroke, width)

    def cross(self, x, y):
        """A cross at the upper right of the mark around (x, y)."""
        half = self.radius * 0.3
        x, y = x + self.radius, y - self.radius
        for width, stroke in ((2 * self.line, "white"), (self.line, "black")):
            self.draw.line((x - half, y - half, x + half, y + half), fill=stroke, width=width)
            self.draw.line((x - half, y + half, x + half, y - half), fill=stroke, width=width)

    def text(self, x, y, text, colour):
        self.draw.text(
            (x, y),
            text,
            fill=colour,
            font=self.font,
            anchor="lm",
            stroke_width=2,
            stroke_fill="white",
        )
