"""Cells of slides read as a model wants them: which pixels, in which order, ahead of it."""

import itertools
import math
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image

from common import UserError
from dataset import slides

TOLERANCE = 0.1  # µm/px may be off by this share before a slide is resampled
PIECE = 16  # patches that one thread reads at a time, at most


class SlideReader:
    """How one slide is read for a model; threads may share it.

    metadata  of the model
    slide     path | openslide.OpenSlide | uint8 [H, W, 3]
    mpp       µm/px of the slide; None: as its file says

    Attributes: .name .mpp (None: unknown) .extent (text) .side (px at level 0 that a patch covers)
    .note (how it is read, a line) .warning (why its scale may be wrong, or None)."""

    def __init__(self, metadata, slide, mpp=None):
        self.metadata = metadata
        self.slide = slides.held(slide)
        self.name = str(self.slide)
        self.width, self.height = slides.dimensions(self.slide)
        self.extent = f"{self.width} × {self.height} px"
        self.mpp = mpp or slides.microns_per_pixel(self.slide)
        self.target, self.note, self.warning = resolution(metadata, self.mpp)
        self.side = metadata["patch"]
        if self.target is not None:
            self.side = metadata["patch"] * self.target / self.mpp

    def outside(self, x, y):
        """Whether the patches around x, y (numbers or arrays) show nothing of the slide."""
        half = self.side / 2
        inside = (-half < x) & (x < self.width + half) & (-half < y) & (y < self.height + half)
        return ~np.asarray(inside)

    def read(self, x, y):
        """The patch around (x, y), level 0, as the model wants it: uint8 [size, size, 3]."""
        patch = self.metadata["patch"]
        pixels = slides.read(self.slide, x, y, patch, mpp=self.target, source_mpp=self.mpp)
        return to_size(pixels, self.metadata["size"], self.metadata["fit"])


def resolution(metadata, slide_mpp):
    """How a slide is read → (µm/px to resample it to, None: read as it is; a note that says so; a
    warning if the scale may be another than in training, else None).
    """
    target, mixed = metadata["mpp"], metadata.get("mixed_mpp")
    given = "µm/px unknown"
    if slide_mpp is not None:
        given = f"{slide_mpp:.4g} µm/px"
    if target is None and mixed:
        known = sorted(float(scale) for scale in mixed)
        note = f"{given}, read as it is (model: {known[0]:g} to {known[-1]:g} µm/px, as scanned)"
        warning = None
        if slide_mpp is None:
            warning = "its µm/px is unknown"
        elif not known[0] / (1 + TOLERANCE) <= slide_mpp <= known[-1] * (1 + TOLERANCE):
            warning = f"the model was never trained at {slide_mpp:.4g} µm/px"
        return None, note, warning
    if target is None:
        return None, f"{given}, read as it is: the model does not know its µm/px", None
    if slide_mpp is None:
        warning = f"its µm/px is unknown and taken for the model's {target:g}"
        return None, f"µm/px unknown, read as if it were the model's {target:g}", warning
    if abs(slide_mpp / target - 1) <= TOLERANCE:
        return None, f"{given}, read as it is (model: {target:g})", None
    return target, f"{given}, resampled to the model's {target:g}", None


def to_size(pixels, size, fit):
    """uint8 [patch, patch, 3] → [size, size, 3], as training did it: "resize", or "pad", which
    keeps the scale: smaller patches get a white border, larger ones are cut.
    """
    patch = len(pixels)
    if patch == size:
        return pixels
    if fit == "resize":
        return np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC))
    if patch > size:
        start = (patch - size) // 2
        return pixels[start : start + size, start : start + size]
    border = (size - patch) // 2
    around = (border, size - patch - border)
    return np.pad(pixels, (around, around, (0, 0)), constant_values=slides.WHITE)


# ---------------------------------------------------------------- cells of slides


class Cells:
    """Cells that are scored together, on one slide or more.

    readers  SlideReader of each slide
    which    index into `readers`, of each cell [n]
    x, y     level-0 px [n]
    failed   called with (index of the cell, error) if a patch cannot be read; None: all fail then
    sample   indices of cells whose patches are kept, to be looked at

    When `score_each` yields them: .probability float32 [n], NaN where a cell could not be read;
    .error, a UserError or None; .looked, the patches of the sample."""

    def __init__(self, readers, which, x, y, failed=None, sample=()):
        self.readers, self.which = readers, np.asarray(which, int)
        self.x, self.y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        self.failed, self.sample = failed, set(sample)
        self.probability = np.full(len(self.x), np.nan, np.float32)
        self.error, self.looked = None, []

    def pieces(self, size):
        """Index arrays of `size` cells; neighbours in a slide follow each other, so that a tile is
        decoded once. Without a cell, one empty piece.
        """
        order = np.lexsort((self.x, self.y // 512, self.which))
        return [order[i : i + size] for i in range(0, max(1, len(order)), size)]

    def read(self, piece):
        """Patches of cells → (patches, the cells that could be read)."""
        patches, readable = [], []
        for i in piece:
            if self.error is not None:
                break
            reader = self.readers[self.which[i]]
            try:
                patches.append(reader.read(self.x[i], self.y[i]))
            except (UserError, OSError, ValueError) as error:
                if self.failed is not None:
                    self.failed(i, error)
                    continue
                self.error = UserError(
                    f"{reader.name}: cannot be read at ({self.x[i]:g}, {self.y[i]:g}): {error}"
                )
                break
            readable.append(i)
            if i in self.sample:
                self.looked.append(patches[-1])
        return patches, readable


def score(classifier, readers, which, x, y, workers=4, progress=None, failed=None):
    """Probabilities of cells on one or more slides → float32 [n], in the order of the cells; NaN
    if `failed` took an error. The arguments are those of Cells and `score_each`.
    """
    cells = Cells(readers, which, x, y, failed)
    for scored in score_each(classifier, [cells], workers, progress):
        if scored.error is not None:
            raise scored.error
    return cells.probability


def score_each(classifier, sets, workers=4, progress=None):
    """Score one set of cells after the other; yields each when it is done.

    Threads read ahead of the model, over the end of a set into the next; what is read ahead has a
    bound. A batch holds cells of one set, so that no result depends on the other sets.

    sets      Cells; an iterator is asked for the next when the threads need it
    workers   threads that read
    progress  its .update(count) is called
    """
    pool = ThreadPoolExecutor(workers, thread_name_prefix="read")
    try:
        for cells, piece, patches, last in batches(sets, pool, workers, classifier.batch_size):
            if patches and cells.error is None:
                cells.probability[piece] = classifier(np.stack(patches))
            if progress is not None:
                progress.update(len(piece))
            if last:
                yield cells
    finally:
        pool.shutdown(cancel_futures=True)


def batches(sets, pool, workers, most):
    """Yield (cells, those of a batch, their patches, whether the set ends with it); a batch has at
    most `most` cells.
    """
    # Pieces smaller than a batch, so that several threads work on one; enough of them ahead to
    # ride over slow tiles.
    size = max(1, min(PIECE, most))
    per_batch = math.ceil(most / size)

    def pieces(cells):
        share = size
        if len(cells.x) <= most:  # one batch, which waits for all of it: shared by all threads
            share = min(size, max(1, math.ceil(len(cells.x) / workers)))
        return marked_last(cells.pieces(share))

    waiting = ((cells, piece, last) for cells in sets for piece, last in pieces(cells))
    running = deque()
    while True:
        for cells, piece, last in itertools.islice(waiting, workers + 2 * per_batch - len(running)):
            running.append((cells, piece, pool.submit(cells.read, piece), last))
        if not running:
            return
        read, patches, asked, last = [], [], 0, False
        while asked < most and not last:
            cells, piece, future, last = running.popleft()
            some, readable = future.result()
            patches += some
            read += readable
            asked += len(piece)
        yield cells, read, patches, last


def marked_last(items):
    """(item, whether it is the last) of a list."""
    return [(item, i == len(items) - 1) for i, item in enumerate(items)]
