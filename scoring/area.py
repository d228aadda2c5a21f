"""The area on which a slide's mitotic figures are counted: its tissue, or the tumour's outlines."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from common import UserError
from dataset.formats.cells import MITOTIC, plain
from scoring import count, tissue

TISSUE = "tissue"  # --area tissue
HOTSPOT = "mitotic hotspot"  # class of the densest 2.37 mm² in a GeoJSON


class Area(NamedTuple):
    """What `count.count` takes: polygons of the tumour, or mm² of tissue; None: not known."""

    tumour: list | None = None
    tissue: float | None = None


def of_slide(reader, outline=None, of_tissue=False, searched=None):
    """The Area of a slide: in the outlines of a GeoJSON file, or of its tissue, or unknown.

    reader    the SlideReader
    searched  the slide's tissue.Tissue if it is known already

    UserError: its µm/px is unknown; no outlines in the file"""
    if outline is None and not of_tissue:
        return Area()
    if reader.mpp is None:
        raise UserError(
            f"{reader.name}: its µm/px is unknown, and so is every area on it; give --mpp"
        )
    if outline is not None:
        return Area(tumour=count.outlines(Path(outline), reader.slide))
    searched = searched or tissue.find(reader.slide, reader.mpp)
    return Area(tissue=searched.area(reader.mpp))


def count_figures(job, probability, threshold, labels, area):
    """(count.Count of the cells of a plan whose probability is `threshold` at least, what a GeoJSON
    shows of it: `regions_of`, nothing without an Area). (None, []) unless they lie on one slide and
    are mitotic figures.
    """
    if len(job.readers) != 1 or not are_mitotic(labels):
        return None, []
    reader, figures = job.readers[0], probability >= threshold
    x, y = np.asarray(job.x)[figures], np.asarray(job.y)[figures]
    size = reader.width, reader.height
    counted = count.count(x, y, reader.mpp, size, area.tumour, area.tissue)
    if area == Area():
        return counted, []
    return counted, regions_of(counted)


def are_mitotic(labels):
    """Whether a model's class 1 are mitotic figures, the only ones that are counted so."""
    return plain(labels[1]) in MITOTIC


def regions_of(counted):
    """What a GeoJSON shows of a Count: [(class, name, box in level-0 px, measurements)]."""
    window = counted.window
    if window is None:
        return []
    measurements = {"mitotic figures": window.figures, "area mm²": counted.window_area}
    if counted.per_mm2 is not None:
        measurements[f"per mm² of {counted.area_of}"] = counted.per_mm2
    box = window.left, window.top, window.right, window.bottom
    return [(HOTSPOT, f"densest {counted.window_area:.2f} mm²", box, measurements)]
