"""Annotation formats: one file per format, which reads it once, for training (`read`) and for
candidates (`read_candidates`), and writes scores back (`write`).

A new format is a file with `recognises(source)`, `read(source)`, `write(...)` and, if other formats
are to become it, `create(...)`, and a line in FORMATS (in SUFFIXES too if it has one file per
image). It may also say what its labels mean (`labels_of`) and which of them --relabel writes
(`own_categories`). `cells.py` holds the table that all formats fill and the rule what a cell is;
`fresh.py` turns candidates into another format; `files.py` holds the guarded loaders."""

import math
from pathlib import Path

import numpy as np

from common import UserError
from dataset import slides
from dataset.formats import (
    cells,
    challenge,
    class_folders,
    csv_table,
    files,
    fresh,
    geojson,
    imagescope,
    midog,
    sliderunner,
)
from dataset.formats.cells import IMAGE_SUFFIXES, PROFILES, Table, parse_classes  # noqa: F401
from dataset.formats.csv_table import COLUMNS, parse_columns  # noqa: F401
from dataset.formats.geojson import COLOURS  # noqa: F401

# The first that recognises a file reads it.
FORMATS = {
    "sqlite": sliderunner,
    "imagescope": imagescope,
    "midog": midog,
    "challenge": challenge,
    "geojson": geojson,
    "csv": csv_table,
}
SUFFIXES = (".geojson", ".geojson.gz", ".xml", ".xml.gz")  # one file per image: a folder of them
BY_SUFFIX = {
    **dict.fromkeys((".sqlite", ".sqlite3", ".db"), "sqlite"),
    **dict.fromkeys((".csv", ".tsv", ".txt"), "csv"),
    ".json": "midog",
    ".geojson": "geojson",
    ".xml": "imagescope",
}
KNOWN = (
    ".sqlite (SlideRunner), .json (MIDOG), .csv (points or patches), .geojson (QuPath) and .xml "
    "(ImageScope)"
)


def read(
    path: str | Path,
    classes: dict | None = None,
    profile: str | None = None,
    columns: dict | None = None,
) -> Table:
    """The labelled cells of an annotation file, of a folder of .geojson or .xml files, or of a
    folder per class.

    classes: {"mitotic": [...], "other": [...] or None}, the class ids or names of each label (see
    `parse_classes`); with "own_names": True also numbers are names that the outputs show. profile:
    a name of PROFILES. columns: {"path": "dataset_uid", ...}, see `parse_columns`. UserError:
    unknown format, damaged file, labels that do not say which class is which."""
    path = Path(path)
    if profile is not None and profile not in PROFILES:
        raise UserError(f"--profile {profile}: unknown; known are {', '.join(PROFILES)}")
    if classes and profile:
        raise UserError(
            "--classes (or --positive) and --profile both say which class is which: give one of "
            "them"
        )
    table = _read_folder(path) if path.is_dir() else _read_file(path, columns)
    if table.no_training:
        raise UserError(table.no_training)
    cells.drop_regions(table)
    # Classes that only regions have take no part in telling which classes the labels are.
    used = {*table.categories, *(category for category, _ in table.damaged)}
    names = {}
    for category, name in table.names.items():
        if category in used or category not in table.regions:
            names[category] = name
    module = FORMATS.get(table.format)
    if hasattr(module, "labels_of"):
        labels = module.labels_of(table, classes, profile)
    else:
        labels = cells.class_labels(path, names, classes, profile)
    cells.labelled(table, labels)
    table.classes = cells.class_names(table.names, labels, classes)
    cells.check_scale(table)
    cells.unique_ids(table, path.name)
    return table


def _read_file(path, columns=None):
    source = files.Source(path)
    for module in FORMATS.values():
        if module.recognises(source):
            if module is csv_table:
                return module.read(source, columns)
            return module.read(source)
    if source.suffix == ".json":
        raise UserError(
            f"{path}: neither MIDOG's JSON (images, annotations) nor GeoJSON (features), nor the "
            "MIDOG challenge's"
        )
    raise UserError(f"{path}: unknown annotation format; known are {KNOWN}")


def _read_folder(path):
    """One table of a folder of files per image, or of a folder per class."""
    paths = per_image_files(path)
    if not paths:
        if class_folders.recognises(path):
            return class_folders.read(path)
        raise UserError(f"{path}: holds no .geojson or .xml file, and no folder per class")
    table, problem = None, None
    for file in paths:
        part = _read_file(file)
        problem = problem or part.no_training
        if table is None:
            table = part
        elif part.format != table.format:
            raise UserError(f"{path}: holds both .geojson and .xml files; give one kind a folder")
        else:
            table.extend(part)
    table.path = path
    # A file of an image without a cell has no class either; one that names classes is enough.
    table.no_training = problem if not table.names else None
    return table


def per_image_files(folder):
    """The annotation files in a folder of the formats that have one file per image."""
    paths = []
    for path in sorted(folder.iterdir()):
        if path.name.lower().endswith(SUFFIXES) and not path.name.startswith("."):
            paths.append(path)
    return paths


# ---------------------------------------------------------------- candidates


def read_candidates(path: str | Path) -> Table:
    """All cells of a file, labelled or not; x and y become arrays, ids say how messages call each.

    UserError: none of the formats, or a candidate without a valid place."""
    table = _read_file(Path(path))
    if table.kind == "patches":
        raise UserError(
            f"{path}: a table of patches, not of candidates: it lacks the columns x and y"
        )
    cells.unlabelled(table)
    cells.drop_regions(table)
    cells.check_scale(table)
    table.given_ids, table.ids = table.ids, table.titles
    if table.image_by_file:  # --slide says which image it is
        table.images = [None] * len(table)
        table.sizes = {}
    table.x = np.array(table.x, np.float64)
    table.y = np.array(table.y, np.float64)
    return table


def from_points(slide: str | Path, x: np.ndarray, y: np.ndarray, scores: np.ndarray) -> Table:
    """Candidates on a slide that no file holds, with their finder's scores [n], as of
    `read_candidates`. They are written in the format that the output's suffix says."""
    table = Table("points", Path(slide))
    for i, (a, b, score) in enumerate(zip(x.tolist(), y.tolist(), scores.tolist())):
        table.add(slide, a, b, title=i + 1, score=score)
    table.given_ids, table.ids = table.ids, table.titles
    table.x, table.y = np.array(x, np.float64), np.array(y, np.float64)
    return table


def own_classes(candidates, names):
    """[class of names[0], class of names[1]] that `write` puts where the format keeps its own;
    UserError if the file's classes do not say which they are."""
    module = FORMATS[candidates.format]
    if hasattr(module, "own_categories"):
        return module.own_categories(candidates, names)
    return cells.categories_of(candidates, names)


def kind_of(candidates: Table, path: str | Path, kind: str | None = None) -> str:
    """The format (of FORMATS) in which candidates are written to a path: `kind` if given, else the
    suffix's; their own where that says nothing, or says .json, which several formats have."""
    if kind is not None:
        return kind
    suffix = suffix_of(path)
    if suffix == ".json" and suffix_of(candidates.path) == ".json":
        return candidates.format
    if candidates.format not in FORMATS:
        return kind_of_new(path)
    return BY_SUFFIX.get(suffix, candidates.format)


def kind_of_new(path: str | Path, kind: str | None = None) -> str:
    """`kind_of` for candidates that no file holds; UserError if the suffix does not say it."""
    kind = kind or BY_SUFFIX.get(suffix_of(path))
    if not hasattr(FORMATS.get(kind), "create"):
        raise UserError(
            f"--out {path}: says no format of new files; choose .csv, .json, .geojson or .xml"
        )
    return kind


def suffix_of(path):
    """The suffix of a file's name in lower case, without .gz."""
    return Path(Path(path).name.lower().removesuffix(".gz")).suffix


def check_relabel(candidates, names, path, kind=None):
    """UserError if --relabel could not tell which of the file's own classes is which; a file that
    changes its format gets new ones. The arguments are those of `write`."""
    if kind_of(candidates, path, kind) == candidates.format:
        own_classes(candidates, names)


def check_write(candidates, path, images, scales, kind=None):
    """UserError if `write` could not write the candidates in that format; else what it will leave
    out, a line each. The arguments are those of `write`."""
    target = kind_of(candidates, path, kind)
    if target == candidates.format:
        return []
    return fresh.check(candidates, FORMATS[target], path, images, scales)


def write(
    candidates: Table,
    path: str | Path,
    probability: np.ndarray,
    threshold: float,
    names: list,
    relabel: bool = False,
    kind: str | None = None,
    images: list | None = None,
    scales: dict | None = None,
    regions: list = (),
) -> int:
    """Write candidates to `path` with probability [n] (NaN: not scored) and class names[0 | 1] →
    how many of them the file does not hold.

    relabel: also put the class where the format keeps its own (category_id, agreedClass, label).
    kind: the format, see `kind_of`. Where it is another than the candidates': images, the file of
    the slide of each candidate or None, and scales, {that file: µm/px or None}. regions: of the one
    slide, (class, name, box in level-0 px, {measurement: number}), which GeoJSON alone shows."""
    path = Path(path)
    if path.exists() and path.samefile(candidates.path):
        raise UserError(
            f"--out {path}: is the file of the candidates, which is never written to; choose "
            "another"
        )
    scores = []
    for p in probability:
        scores.append(None if math.isnan(p) else (float(p), int(p >= threshold)))
    target = kind_of(candidates, path, kind)
    module, more = FORMATS[target], {}
    if regions and module is geojson:
        left, top = _offset(next(image for image in images if image is not None))
        more["regions"] = [
            (name, title, (x1 - left, y1 - top, x2 - left, y2 - top), measured)
            for name, title, (x1, y1, x2, y2), measured in regions
        ]
    if target != candidates.format:
        fresh.check(candidates, module, path, images, scales)
        return fresh.create(
            candidates, module, path, scores, names, relabel, images, scales, **more
        )
    categories = own_classes(candidates, names) if relabel else None
    module.write(candidates, path, scores, names, categories, **more)
    return 0


# ---------------------------------------------------------------- QuPath's bounds


def move_to_level0(table, paths, say):
    """Add the bounds' corner to coordinates that are relative to it. paths: the image of each row,
    None for cells on other images."""
    if not table.relative_to_bounds:
        return
    offsets = {}
    for i, path in enumerate(paths):
        if path is None:
            continue
        if path not in offsets:
            offsets[path] = _offset(path)
        table.x[i] += offsets[path][0]
        table.y[i] += offsets[path][1]
    moved = [path for path, offset in offsets.items() if offset != (0, 0)]
    if moved:
        x, y = offsets[moved[0]]
        say(
            f"coordinates on {cells.several(len(moved), 'slide')} are relative to the slide's "
            f"bounds, as QuPath writes them, and were moved ({Path(moved[0]).name}: by {x}, {y} px)"
        )


def _offset(path):
    try:
        return slides.bounds_offset(path)
    except UserError:  # whoever reads its pixels says what is wrong with the image
        return 0, 0
