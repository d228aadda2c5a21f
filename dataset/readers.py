"""Annotation formats: SlideRunner SQLite, MIDOG JSON, CSV of points, CSV of patches, QuPath
GeoJSON. No torch.

Each reader turns a file of somebody else's into one `Table`. Labels are 1 (mitotic figure) and 0
(hard negative, the look-alike), and they are never guessed: they follow from class names that
everybody would read the same way, from a named profile, or from what the user says. Files are taken
as untrusted: whatever is wrong with one ends as a UserError that names the file and the place,
never as a traceback, a hang, or a wrong label."""

import csv
import gzip
import io
import json
import math
import re
import sqlite3
import time
import zlib
from dataclasses import dataclass, field
from pathlib import Path

from common import UserError

MAX_BYTES = (
    1 << 29
)  # of a JSON or CSV file, unpacked: MIDOG++ has 3 MB; Python needs ten times the file's size
MAX_COORDINATE = 1e7  # px; the largest scans have some 4e5
MAX_TEXT = 512  # characters of a name, case, domain or id
SQLITE_SECONDS = 120  # a damaged or malicious database must not keep a query running for ever

# SlideRunner's class ids differ between data sets: profile → (mitotic figure, hard negative).
PROFILES = {
    "ccmct": ("2", "7"),
    "cmc": ("2", "1"),
    "midog": ("1", "2"),
    "mitos2014": ("1", "2"),
    "tupac": ("1", "2"),
}

# Class names whose meaning is beyond doubt, as `plain()` writes them.
MITOTIC = {
    "mitotic figure",
    "mitotic figures",
    "mitosis",
    "mitoses",
    "mitose",
    "mitosen",
    "mitotic",
    "mitotic cell",
    "mf",
}
OTHER = {
    "not mitotic figure",
    "not mitotic figures",
    "non mitotic figure",
    "non mitotic figures",
    "nonmitosis",
    "non mitosis",
    "nonmitotic",
    "non mitotic",
    "not mitotic",
    "non mitotic cell",
    "hard negative",
    "hard negatives",
    "hard negative look alike",
    "hard negative lookalike",
    "look alike",
    "look alikes",
    "lookalike",
    "lookalikes",
    "mitotic figure look alike",
    "mitotic figure lookalike",
    "imposter",
    "impostor",
    "imposters",
    "impostors",
    "nmf",
    "no mitosis",
    "no mitotic figure",
}

IMAGE_SUFFIXES = (
    ".svs",
    ".tiff",
    ".tif",
    ".png",
    ".jpg",
    ".jpeg",
    ".ndpi",
    ".mrxs",
    ".scn",
    ".vms",
    ".bif",
    ".dcm",
    ".svslide",
    ".bmp",
)

# Header of a CSV → what it means; the first that is present counts.
COLUMNS = {
    "path": ("path", "patch", "patch_path"),
    "filename": ("filename", "file_name", "image", "image_name", "file"),
    "x": ("x",),
    "y": ("y",),
    "label": ("label", "class"),
    "case": ("case", "case_id", "patient", "patient_id", "slide"),
    "domain": ("domain", "tumortype", "tumor_type", "tumourtype", "tumour_type"),
    "id": ("id",),
}
# The header of the benchmark's files; those of MIDOG++ say 1 (mitotic figure) and 2 (hard
# negative).
BENCHMARK_HEADER = {"x", "y", "label", "filename", "slide", "split", "tumortype"}

UNPRINTABLE = re.compile(
    "[\x00-\x1f\x7f\ud800-\udfff]"
)  # control characters and halves of surrogate pairs


@dataclass
class Table:
    """What a reader found. Columns are lists of equal length; `case` and `domain` hold None where
    the file has none.
    """

    kind: str = "points"  # or "patches": the image is the patch, x and y are NaN
    id: list = field(default_factory=list)
    image: list = field(default_factory=list)
    case: list = field(default_factory=list)
    domain: list = field(default_factory=list)
    x: list = field(default_factory=list)
    y: list = field(default_factory=list)
    label: list = field(default_factory=list)
    images: dict = field(
        default_factory=dict
    )  # name → (width, height) or None; also the unlabelled ones
    image_domain: dict = field(default_factory=dict)  # name → tumour type, where the file says it
    mpp: dict = field(default_factory=dict)  # name → µm/px, where the file says it
    notes: list = field(
        default_factory=list
    )  # what a user should know: what was left out, and how many
    licence: str = None
    description: str = ""

    def add(self, id, image, x, y, label, case=None, domain=None):
        self.id.append(id)
        self.image.append(image)
        self.x.append(x)
        self.y.append(y)
        self.label.append(label)
        self.case.append(case)
        self.domain.append(domain)


def read(path, classes=None, profile=None, columns=None):
    """Read an annotation file (or a folder of .geojson files) into a Table.

    classes: {"mitotic": [...], "other": [...] or None}, the class ids or names of each label (see
    `parse_classes`). profile: a name of PROFILES. columns: {"path": "dataset_uid", ...}, see
    `parse_columns`. UserError: unknown format, damaged file, labels that do not say which class is
    which."""
    path = Path(path)
    if profile is not None and profile not in PROFILES:
        raise UserError(f"--profile {profile}: unknown; there are {', '.join(PROFILES)}")
    if classes and profile:
        raise UserError(
            "--classes (or --positive) and --profile both say which class is which: give one of "
            "them"
        )
    if path.is_dir():
        return read_geojson(path, classes)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    name = path.name.lower()
    if name.endswith((".sqlite", ".sqlite3", ".db")):
        return read_sqlite(path, classes, profile)
    if name.endswith((".csv", ".tsv", ".txt", ".csv.gz")):
        return read_csv(path, classes, profile, columns)
    if name.endswith((".json", ".geojson", ".json.gz", ".geojson.gz")):
        content = load_json(path)
        if isinstance(content, list) or (
            isinstance(content, dict) and content.get("type") in ("FeatureCollection", "Feature")
        ):
            return read_geojson(path, classes, content)
        return read_midog(path, content, classes, profile)
    raise UserError(
        f"{path}: unknown annotation format; known are .sqlite (SlideRunner), .json (MIDOG), .csv "
        "(points "
        "or patches) and .geojson (QuPath)"
    )


# ---------------------------------------------------------------- what the user says about classes and columns


def parse_classes(text):
    """ "mitotic=2,other=7" → {"mitotic": ["2"], "other": ["7"]}; a key may be repeated for several
    classes.
    """
    found = {"mitotic": [], "other": []}
    for part in text.split(","):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or key not in found or not value:
            raise UserError(f"--classes {text}: written as mitotic=2,other=7 (class ids or names)")
        found[key].append(value)
    if not found["mitotic"] or not found["other"]:
        raise UserError(f"--classes {text}: both are needed, as in mitotic=2,other=7")
    if {plain(v) for v in found["mitotic"]} & {plain(v) for v in found["other"]}:
        raise UserError(f"--classes {text}: a class stands on both sides")
    return found


def parse_columns(text):
    """ "path=dataset_uid,case=slide,label=final_label" → {"path": "dataset_uid", ...}."""
    found = {}
    for part in text.split(","):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or key not in COLUMNS or not value or key in found:
            raise UserError(
                f"--columns {text}: written as "
                "path=FILE_COLUMN,case=CASE_COLUMN,label=LABEL_COLUMN; "
                f"what can be named is {', '.join(COLUMNS)}, each once"
            )
        found[key] = value
    return found


def plain(name):
    """A class name without case, punctuation and repeated blanks: "Non-mitotic  figure" → "non
    mitotic figure".
    """
    return " ".join(re.findall(r"\w+", str(name).replace("_", " ").lower()))


def class_labels(where, names, classes=None, profile=None):
    """Class id → label for {id (str): name (str or None)}: by the user's word, by profile, or by
    the names.

    Returns {id: 1 | 0}; ids that are neither are left out. UserError where it does not follow which
    is which."""
    listed = ", ".join(
        f"{id[:20]} {_short(name)}" if name is not None else id[:20]
        for id, name in sorted(names.items())[:8]
    )
    listed = listed + ", …" if len(names) > 8 else listed or "none"
    if profile:
        classes = {"mitotic": [PROFILES[profile][0]], "other": [PROFILES[profile][1]]}
    if classes:
        labels, by_number = {}, set()
        for label, wanted in ((1, classes["mitotic"]), (0, classes["other"])):
            for value in wanted or ():
                # An id counts before a name, so that "2" means class 2 even if some class is called
                # "2".
                ids = [id for id in names if id == canonical(value)] or [
                    id
                    for id, name in names.items()
                    if name is not None and plain(name) == plain(value)
                ]
                if not ids:
                    raise UserError(
                        f"{where}: there is no class {value!r}; its classes are {listed}"
                    )
                by_number |= {id for id in ids if plain(value) != plain(names[id])}
                for id in ids:
                    if labels.setdefault(id, label) != label:
                        raise UserError(
                            f"{where}: class {id} would be both mitotic figure and hard negative"
                        )
        if classes["other"] is None:
            rest = [id for id in names if id not in labels]
            if len(rest) != 1:
                raise UserError(
                    f"{where}: beside {', '.join(classes['mitotic'])} there are {len(rest)} other "
                    "classes "
                    f"(classes: {listed}); name the hard negatives with --negative"
                )
            labels[rest[0]] = 0
        # A number may be a slip; who names a class in words means it ("mitosis" against "atypical
        # mitosis").
        contradicted = [
            id
            for id in sorted(by_number)
            if names[id] is not None and plain(names[id]) in (OTHER if labels[id] else MITOTIC)
        ]
        if contradicted:
            id = contradicted[0]
            raise UserError(
                f"{where}: class {id[:20]} is called {_short(names[id])} there, the opposite of "
                "what "
                f"{'--profile ' + profile if profile else '--classes'} says; its classes are "
                f"{listed}"
            )
        return labels
    labels = {
        id: 1 if plain(name) in MITOTIC else 0
        for id, name in names.items()
        if name is not None and plain(name) in MITOTIC | OTHER
    }
    if len(set(labels.values())) < 2:
        raise UserError(
            f"{where}: its classes ({listed}) do not say which are mitotic figures and which hard "
            "negatives; say so with --classes mitotic=ID,other=ID or --profile "
            f"{'|'.join(PROFILES)}"
        )
    return labels


def canonical(value):
    """A class id or label as text, one way of writing it: 1, "1", "1.0", " 1 " → "1"."""
    text = str(value).strip()
    return (
        str(int(text.split(".")[0]))
        if re.fullmatch(r"[+-]?\d{1,15}(\.0*)?", text, re.ASCII)
        else text
    )


# ---------------------------------------------------------------- values


def text(where, value, what):
    """A short printable string, or UserError."""
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise UserError(f"{where}: {what} is {_short(value)}, a text is needed")
    try:
        value = str(value).strip()
    except ValueError:  # an integer with thousands of digits
        raise UserError(f"{where}: {what} is too long") from None
    if not value or len(value) > MAX_TEXT:
        raise UserError(
            f"{where}: {what} is {'empty' if not value else f'longer than {MAX_TEXT} characters'}"
        )
    if UNPRINTABLE.search(value):
        raise UserError(f"{where}: {what} {_short(value)} holds control characters")
    return value


def number(where, value, what):
    """A finite coordinate in pixels, or UserError."""
    try:
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float, str))
            or isinstance(value, str)
            and ("_" in value or len(value) > 64)
        ):
            raise ValueError
        value = float(value)
    except (ValueError, OverflowError):
        raise UserError(f"{where}: {what} is {_short(value)}, a number is needed") from None
    if not math.isfinite(value) or abs(value) > MAX_COORDINATE:
        raise UserError(f"{where}: {what} is {value:g}, no position in an image")
    return value


def image_name(where, value):
    """A file name (or path relative to the images' folder) out of an annotation file; it may not
    leave the folder.
    """
    name = text(where, value, "the image's name").replace("\\", "/")
    parts = name.split("/")
    if name.startswith("/") or re.match(r"[A-Za-z]:", name) or ".." in parts:
        raise UserError(
            f"{where}: the image's name {_short(value)} leads out of the folder of images; names "
            "must be "
            "relative to it"
        )
    if any(len(part.encode()) > 255 for part in parts):
        raise UserError(f"{where}: the image's name {_short(value)} is too long for a file")
    parts = [part for part in parts if part not in ("", ".")]
    if not parts:
        raise UserError(f"{where}: the image's name is empty")
    return "/".join(parts)


def positive_number(value):
    """value as a positive finite float, else None: for hints such as µm/px and image sizes."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        value = float(value)
    except OverflowError:
        return None
    return value if math.isfinite(value) and 0 < value <= MAX_COORDINATE else None


def _short(value):
    try:
        shown = (
            repr(value)
            if isinstance(value, (str, int, float, type(None)))
            else type(value).__name__
        )
    except ValueError:
        return "a very long number"
    return shown if len(shown) <= 60 else shown[:57] + "..."


def _unique_ids(table, file):
    """The source's ids where they are unique, else "<file>#<row>"."""
    if len(set(table.id)) != len(table.id) or None in table.id:
        if None not in table.id:
            table.notes.append(
                "ids occur more than once in the file: annotations are numbered by their row "
                "instead"
            )
        table.id = [f"{file}#{row}" for row in range(1, len(table.id) + 1)]


def _need_annotations(where, table):
    if not table.id:
        raise UserError(f"{where}: holds no annotation of a mitotic figure or hard negative")


# ---------------------------------------------------------------- JSON


def read_bytes(path):
    """A file's content, unpacked if it ends with .gz, at most MAX_BYTES."""
    try:
        opener = gzip.open if path.name.lower().endswith(".gz") else open
        with opener(path, "rb") as file:
            content = file.read(MAX_BYTES + 1)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: not a whole gzip file ({error}); get it again") from None
    if len(content) > MAX_BYTES:
        raise UserError(
            f"{path}: larger than {MAX_BYTES >> 20} MiB, which no annotation file should be"
        )
    return content


def load_json(path):
    """A JSON file's content. Keys that occur twice, NaN and nesting without end are refused."""

    def unique(pairs):
        found = dict(pairs)
        if len(found) != len(pairs):  # which of the two values counts would be a guess
            raise ValueError("a key stands twice in one object")
        return found

    def no_constant(name):
        raise ValueError(f"{name} is no number")

    try:
        return json.loads(
            read_bytes(path).decode("utf-8-sig"),
            object_pairs_hook=unique,
            parse_constant=no_constant,
        )
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a JSON file in UTF-8") from None
    except RecursionError:
        raise UserError(f"{path}: nested too deeply for an annotation file") from None
    except ValueError as error:
        raise UserError(f"{path}: not a readable JSON file ({_one_line(error)})") from None


def _one_line(error):
    return " ".join(str(error).split())[:200]


def _records(path, content, key):
    """content[key] as a list of objects."""
    records = content.get(key)
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise UserError(
            f"{path}: a MIDOG file has a list of objects called {key!r}; this one has not"
        )
    return records


def _key(value):
    """An id of JSON as a dictionary key; 1 and "1" and 1.0 are one id, true is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        return canonical(value)
    except ValueError:
        return None


def read_midog(path, content, classes=None, profile=None):
    """MIDOG's JSON: like COCO, but bbox = [x1, y1, x2, y2]. The centre is the mean of the corners."""
    if not isinstance(content, dict):
        raise UserError(
            f"{path}: not a MIDOG file (an object with images, categories and annotations)"
        )
    table, images, names = Table(), {}, {}
    for i, record in enumerate(_records(path, content, "images")):
        where = f"{path}, image {i + 1}"
        id, name = _key(record.get("id")), image_name(where, record.get("file_name"))
        if id is None or id in images:
            raise UserError(
                f"{where}: the id {_short(record.get('id'))} "
                f"{'stands twice' if id is not None else 'is missing'}"
            )
        if name in table.images:
            raise UserError(f"{where}: {name} stands twice")
        images[id] = name
        size = positive_number(record.get("width")), positive_number(record.get("height"))
        table.images[name] = (
            (int(size[0]), int(size[1])) if None not in size and min(size) >= 1 else None
        )
        tumour = record.get("tumor_type", record.get("domain"))
        if tumour is not None:
            table.image_domain[name] = text(where, tumour, "the tumour type")
        case = record.get("case")
        if case is not None:
            record["case"] = text(where, case, "the case")
        mpp = positive_number(record.get("mpp"))
        if mpp is not None:
            table.mpp[name] = mpp
    cases = {_key(record["id"]): record.get("case") for record in content["images"]}
    for record in _records(path, content, "categories"):
        id = _key(record.get("id"))
        if id is None or id in names:
            raise UserError(f"{path}: a category's id is missing or stands twice")
        names[id] = record.get("name") if isinstance(record.get("name"), str) else None
    labels = class_labels(path, names, classes, profile)
    without, others = 0, 0
    for i, record in enumerate(_records(path, content, "annotations")):
        where = f"{path}, annotation {i + 1}"
        category = record.get("category_id")
        if category is None:
            without += 1
            continue
        category = _key(category)
        if category not in names:
            raise UserError(
                f"{where}: category_id {_short(record['category_id'])} is not among the categories"
            )
        if category not in labels:
            others += 1
            continue
        image = images.get(_key(record.get("image_id")))
        if image is None:
            raise UserError(
                f"{where}: image_id {_short(record.get('image_id'))} is not among the images"
            )
        box = record.get("bbox")
        if not isinstance(box, list) or len(box) != 4:
            raise UserError(f"{where}: bbox must be [x1, y1, x2, y2]")
        x1, y1, x2, y2 = (number(where, value, "a corner of bbox") for value in box)
        if x2 < x1 or y2 < y1:
            raise UserError(
                f"{where}: bbox {box} does not run from the upper left to the lower right corner; "
                "MIDOG's "
                "is [x1, y1, x2, y2], not COCO's [x, y, width, height]"
            )
        id = None if record.get("id") is None else text(where, _key(record["id"]), "the id")
        table.add(
            id,
            image,
            (x1 + x2) / 2,
            (y1 + y2) / 2,
            labels[category],
            cases[_key(record["image_id"])],
            table.image_domain.get(image),
        )
    if without:
        table.notes.append(f"{without:,} annotations without a category are left out")
    if others:
        table.notes.append(f"{others:,} annotations of other categories are left out")
    _need_annotations(path, table)
    _unique_ids(table, path.name)
    licences = content.get("licenses")
    if isinstance(licences, list) and licences and isinstance(licences[0], dict):
        name = licences[0].get("name")
        table.licence = name[:MAX_TEXT] if isinstance(name, str) else None
    info = content.get("info")
    if isinstance(info, dict) and isinstance(info.get("description"), str):
        table.description = info["description"][:MAX_TEXT]
    return table


# ---------------------------------------------------------------- GeoJSON


def read_geojson(path, classes=None, content=None):
    """QuPath's export: points, and boxes or outlines, whose centre (of the bounding box) counts.

    QuPath does not write the image's name: it is the file's, 001.geojson for 001.tiff. `path` may
    be a folder."""
    table = Table()
    if path.is_dir():
        files = sorted(
            p for p in path.iterdir() if p.name.lower().endswith((".geojson", ".geojson.gz"))
        )
        if not files:
            raise UserError(f"{path}: holds no .geojson file")
    else:
        files = [path]
    found, skipped = [], 0
    for file in files:
        content = load_json(file) if content is None or path.is_dir() else content
        features = (
            content
            if isinstance(content, list)
            else content.get("features", [])
            if content.get("type") == "FeatureCollection"
            else [content]
            if isinstance(content, dict)
            else None
        )
        if not isinstance(features, list) or not all(
            isinstance(f, dict) and f.get("type") == "Feature" for f in features
        ):
            raise UserError(f"{file}: not a GeoJSON file of features, as QuPath exports them")
        image = image_name(
            file, re.sub(r"\.geojson(\.gz)?$|\.json(\.gz)?$", "", file.name, flags=re.IGNORECASE)
        )
        table.images[image] = None
        for i, feature in enumerate(features):
            where = f"{file}, feature {i + 1}"
            properties = feature.get("properties")
            properties = properties if isinstance(properties, dict) else {}
            name = _classification(properties.get("classification"))
            if name is None:
                skipped += 1
                continue
            name = text(where, name, "the classification")
            id = feature.get("id")
            for j, (x, y) in enumerate(_centres(where, feature.get("geometry"))):
                own = None if id is None else text(where, id, "the id") + (f".{j + 1}" if j else "")
                found.append((own, image, x, y, name))
    if skipped:
        table.notes.append(f"{skipped:,} features without a classification are left out")
    names = {row[4]: row[4] for row in found}
    if not names:
        raise UserError(
            f"{path}: no feature has a classification; give the cells a class in QuPath"
        )
    # The class names stand in for ids, so that "--classes mitotic=Mitosis,other=Tumor" finds them
    # either way.
    labels = class_labels(path, {canonical(name): name for name in names}, classes)
    for id, image, x, y, name in found:
        if canonical(name) in labels:
            table.add(id, image, x, y, labels[canonical(name)])
    if len(table.id) < len(found):
        table.notes.append(f"{len(found) - len(table.id):,} features of other classes are left out")
    _need_annotations(path, table)
    _unique_ids(table, path.name)
    return table


def _classification(value):
    """The class name in any of the ways QuPath has written it: {"name": …}, {"names": [… ]} or a
    plain string.
    """
    if isinstance(value, dict):
        value = value.get("name") if value.get("name") is not None else value.get("names")
    if isinstance(value, list):
        value = ": ".join(value) if value and all(isinstance(part, str) for part in value) else None
    return value if isinstance(value, str) and value.strip() else None


def _centres(where, geometry):
    if not isinstance(geometry, dict):
        raise UserError(f"{where}: has no geometry")
    kind, coordinates = geometry.get("type"), geometry.get("coordinates")
    if not isinstance(coordinates, list):
        raise UserError(f"{where}: the geometry has no coordinates")
    if kind == "Point":
        return [_position(where, coordinates)]
    if kind == "MultiPoint":
        return [_position(where, position) for position in coordinates]
    if kind == "Polygon" and coordinates and isinstance(coordinates[0], list) and coordinates[0]:
        xy = [
            _position(where, position) for position in coordinates[0]
        ]  # the outer ring; holes do not matter
        xs, ys = zip(*xy)
        return [((min(xs) + max(xs)) / 2, (min(ys) + max(ys)) / 2)]
    raise UserError(
        f"{where}: a {_short(kind)} is no cell; points, boxes and outlines (polygons) are read"
    )


def _position(where, position):
    if not isinstance(position, list) or len(position) < 2:
        raise UserError(f"{where}: a position is [x, y]")
    return number(where, position[0], "x"), number(where, position[1], "y")


# ---------------------------------------------------------------- CSV


def read_csv(path, classes=None, profile=None, columns=None):
    """A CSV of points (filename, x, y, label) or of ready-made patches (path, label), with case and
    domain if there.
    """
    try:
        content = read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file in UTF-8") from None
    first = content.lstrip("\r\n").split("\n", 1)[0]
    delimiter = max(",;\t", key=first.count)
    rows = csv.reader(io.StringIO(content, newline=""), delimiter=delimiter, strict=True)
    try:
        header = [name.strip() for name in next((row for row in rows if row), [])]
        column = _find_columns(path, header, columns or {})
        kind = "patches" if "path" in column else "points"
        table = Table(kind=kind)
        found, image_key = [], "path" if kind == "patches" else "filename"
        for row in rows:
            if not any(cell.strip() for cell in row):
                continue
            where = f"{path}, line {rows.line_num}"
            if len(row) != len(header):
                raise UserError(f"{where}: {len(row)} fields where the header has {len(header)}")
            value = {key: row[i] for key, i in column.items()}
            x, y = (
                (math.nan, math.nan)
                if kind == "patches"
                else (
                    number(where, value["x"].strip(), "x"),
                    number(where, value["y"].strip(), "y"),
                )
            )
            case, domain, id = (
                text(where, value[key], f"the {key}") if key in value else None
                for key in ("case", "domain", "id")
            )
            found.append(
                (
                    id,
                    image_name(where, value[image_key]),
                    x,
                    y,
                    canonical(text(where, value["label"], "the label")),
                    case,
                    domain,
                )
            )
    except csv.Error as error:
        raise UserError(
            f"{path}, line {rows.line_num}: not a readable CSV file ({_one_line(error)})"
        ) from None
    benchmark = set(header) == BENCHMARK_HEADER or path.name == "MIDOGpp.csv"
    labels = _csv_labels(
        path, {row[4] for row in found}, classes, profile, benchmark, header[column["label"]]
    )
    others, seen, repeated = 0, {}, 0
    for id, image, x, y, value, case, domain in found:
        if value not in labels:
            others += 1
            continue
        if kind == "patches":
            if image in seen:
                if seen[image] != (labels[value], case, domain):
                    raise UserError(
                        f"{path}: {image} stands there twice, with another label, case or domain"
                    )
                repeated += 1
                continue
            seen[image] = labels[value], case, domain
        table.images.setdefault(image, None)
        table.add(id, image, x, y, labels[value], case, domain)
    if others:
        table.notes.append(f"{others:,} rows of other labels are left out")
    if repeated:
        table.notes.append(f"{repeated:,} patches that are listed twice are taken once")
    _need_annotations(path, table)
    _unique_ids(table, path.name)
    return table


def _find_columns(path, header, chosen):
    """{"x": index of its column, …}: as chosen by the user, else by the usual names."""
    if not header:
        raise UserError(f"{path}: the file is empty")
    lower = [name.lower() for name in header]
    column = {}
    for key, name in chosen.items():
        index = [i for i, own in enumerate(header) if own == name] or [
            i for i, own in enumerate(lower) if own == name.lower()
        ]
        if len(index) != 1:
            raise UserError(
                f"{path}: the header has {'no' if not index else 'more than one'} column {name!r} "
                f"(--columns {key}={name}); it has {', '.join(header)[:300]}"
            )
        column[key] = index[0]
    if "path" in column and "filename" in column:
        raise UserError(
            "--columns: path (ready-made patches) and filename (points in an image) exclude each "
            "other"
        )
    for key, names in COLUMNS.items():
        if (
            key in column
            or (key == "filename" and "path" in column)
            or (key == "path" and "filename" in column)
        ):
            continue
        for name in names:
            index = [i for i, own in enumerate(lower) if own == name]
            if len(index) > 1:
                raise UserError(
                    f"{path}: the column {name!r} stands twice in the header; choose with --columns"
                )
            if index and index[0] not in column.values():
                column[key] = index[0]
                break
    if "path" in column and "path" not in chosen and "x" in column and "y" in column:
        raise UserError(
            f"{path}: has path, x and y: say --columns filename={header[column['path']]} if the "
            "rows are "
            f"points in images, --columns path={header[column['path']]} if each file is a patch"
        )
    if "path" in column:
        column = {key: i for key, i in column.items() if key not in ("x", "y")}
    needed = ("path", "label") if "path" in column else ("filename", "x", "y", "label")
    missing = [key for key in needed if key not in column]
    if missing:
        raise UserError(
            f"{path}: no column for {', '.join(missing)} in its header "
            f"({', '.join(header)[:300]}); points "
            "need filename,x,y,label and patches path,label; name other columns with --columns"
        )
    return column


def _csv_labels(path, values, classes, profile, benchmark, column):
    """Label texts → 1, 0. {0, 1} is 1 = mitotic figure; {1, 2} only where the file is the
    benchmark's.
    """
    if classes or profile:
        return class_labels(
            f"{path}, column {column}", {value: value for value in values}, classes, profile
        )
    words = {
        value: {"true": 1, "false": 0}.get(
            value.lower(), 1 if plain(value) in MITOTIC else 0 if plain(value) in OTHER else None
        )
        for value in values
    }
    if values <= {"0", "1"}:
        return {"0": 0, "1": 1}
    if values <= {"1", "2"} and benchmark:
        return {"1": 1, "2": 0}
    if None not in words.values():
        return words
    listed = ", ".join(sorted(values)[:8])
    hint = (
        " (1 and 2 mean one thing in MIDOG and another in other data sets)"
        if values <= {"1", "2"}
        else ""
    )
    raise UserError(
        f"{path}: the labels {listed[:200]} do not say which are mitotic figures{hint}; say so "
        "with "
        "--positive VALUE [--negative VALUE], or use 1 (mitotic figure) and 0"
    )


# ---------------------------------------------------------------- SQLite


def read_sqlite(path, classes=None, profile=None):
    """A SlideRunner database, old or new schema, opened read-only. The final class is agreedClass;
    spots count.
    """
    with open(path, "rb") as file:
        if file.read(16) != b"SQLite format 3\0":
            raise UserError(f"{path}: not an SQLite database")
    # immutable: no lock and no journal is written, so that a read-only folder will do; but it would
    # overlook the changes that another program has left in a -wal file.
    uri = "file:" + _quoted(path.resolve()) + "?mode=ro"
    if not Path(f"{path}-wal").exists():
        uri += "&immutable=1"
    end = time.monotonic() + SQLITE_SECONDS
    connection = None
    try:
        connection = sqlite3.connect(uri, uri=True)
        connection.text_factory = lambda raw: raw.decode("utf-8", "replace")
        connection.set_progress_handler(lambda: time.monotonic() > end, 100_000)
        for pragma in ("query_only = 1", "trusted_schema = 0", "cell_size_check = 1"):
            connection.execute(f"PRAGMA {pragma}")
        return _sliderunner(path, connection, classes, profile)
    except sqlite3.OperationalError as error:
        if "interrupted" in str(error):
            raise UserError(
                f"{path}: reading takes longer than {SQLITE_SECONDS} s; the database is damaged"
            ) from None
        raise UserError(
            f"{path}: not a readable SlideRunner database ({_one_line(error)})"
        ) from None
    except (
        sqlite3.Error,
        OverflowError,
        UnicodeDecodeError,
    ) as error:  # the last: of names in a damaged schema
        raise UserError(
            f"{path}: not a readable SlideRunner database ({_one_line(error)})"
        ) from None
    finally:
        if connection is not None:
            connection.close()


def _quoted(path):
    from urllib.parse import quote

    return quote(str(path))


def _sliderunner(path, connection, classes, profile):
    tables = {}
    for (name,) in connection.execute(
        "SELECT name FROM sqlite_master WHERE type = 'table'"
    ).fetchall():
        if isinstance(name, str) and name.lower() in (
            "slides",
            "annotations",
            "annotations_coordinates",
            "classes",
        ):
            # table_info gives the column names; old databases lack guid, deleted and others
            tables[name.lower()] = {
                row[1].lower()
                for row in connection.execute(f"PRAGMA table_info('{name}')")
                if isinstance(row[1], str)
            }
    needed = {
        "slides": {"uid", "filename"},
        "annotations": {"uid", "slide", "type", "agreedclass"},
        "annotations_coordinates": {"coordinatex", "coordinatey", "annoid"},
        "classes": {"uid", "name"},
    }
    for name, columns in needed.items():
        if not columns <= tables.get(name, set()):
            lacking = (
                f"the table {name}"
                if name not in tables
                else f"{', '.join(sorted(columns - tables[name]))} in the table {name}"
            )
            raise UserError(f"{path}: not a SlideRunner database with cells: it lacks {lacking}")
    names = {}
    for id, name in connection.execute("SELECT uid, name FROM Classes"):
        names[canonical(id)] = name if isinstance(name, str) else None
    deleted = "AND coalesce(deleted, 0) = 0" if "deleted" in tables["annotations"] else ""
    used = {
        canonical(id)
        for (id,) in connection.execute(
            f"SELECT DISTINCT agreedClass FROM Annotations WHERE type IN (1, 4) {deleted}"
        )
        if id is not None
    }
    if not used - {"0"}:
        raise UserError(
            f"{path}: holds no cell labels (points with an agreed class), only areas; its classes "
            "are "
            f"{', '.join(_short(name) for name in list(names.values())[:8]) or 'none'}"
        )
    # Ids that only the annotations use have no name: a profile or the user may still mean them.
    labels = class_labels(path, {id: None for id in used} | names, classes, profile)
    table, slides = Table(), {}
    size = "width, height" if {"width", "height"} <= tables["slides"] else "NULL, NULL"
    for uid, filename, width, height in connection.execute(
        f"SELECT uid, filename, {size} FROM Slides"
    ):
        name = image_name(f"{path}, slide {_short(uid)}", filename)
        if name in table.images:
            raise UserError(f"{path}: the slide {name} stands there twice")
        slides[uid] = name
        width, height = positive_number(width), positive_number(height)
        table.images[name] = (
            (int(width), int(height)) if width and height and min(width, height) >= 1 else None
        )
    others, unagreed, seen = 0, 0, set()
    for uid, slide, agreed, x, y in connection.execute(
        "SELECT a.uid, a.slide, a.agreedClass, c.coordinateX, c.coordinateY FROM Annotations a "
        "LEFT JOIN Annotations_coordinates c ON c.annoId = a.uid "
        f"WHERE a.type IN (1, 4) {deleted.replace('deleted', 'a.deleted')} ORDER BY a.uid"
    ):
        where = f"{path}, annotation {_short(uid)}"
        if agreed is None or canonical(agreed) == "0" and "0" not in labels:
            unagreed += 1
            continue
        if canonical(agreed) not in labels:
            others += 1
            continue
        if uid in seen:
            raise UserError(
                f"{where}: a spot has one position, this one has more: the database is damaged"
            )
        seen.add(uid)
        if slide not in slides:
            raise UserError(
                f"{where}: belongs to slide {_short(slide)}, which the database does not list"
            )
        table.add(
            text(where, uid, "the id"),
            slides[slide],
            number(where, x, "coordinateX"),
            number(where, y, "coordinateY"),
            labels[canonical(agreed)],
        )
    if others:
        table.notes.append(f"{others:,} annotations of other classes are left out")
    if unagreed:
        table.notes.append(f"{unagreed:,} annotations without an agreed class are left out")
    _need_annotations(path, table)
    _unique_ids(table, path.name)
    return table
