"""Candidates of a detector: read from the format they come in, written back in it with probability
and class. No torch.

    MIDOG JSON          every annotation (bbox = corners); gains "probability" and "class"
    challenge JSON      "Multiple points" in millimetres, what detectors of the MIDOG challenge
    write
    CSV                 columns x, y and, for several images, filename; gains the columns
                        probability and class
    SlideRunner SQLite  every annotation; gains the table Predictions
    QuPath GeoJSON      points and shapes (their middle); gains a measurement and a coloured
    classification

Everything else in the file is kept as it is. The file that was read is never written to.
"""

import csv
import io
import math
import sqlite3
import urllib.parse
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import common
from common import UserError

COLOURS = {1: (220, 30, 40), 0: (40, 110, 220)}  # RGB of a mitotic figure, of a look-alike
NAME_COLUMNS = ("filename", "file_name", "image", "slide")


@dataclass
class Candidates:
    kind: str  # midog | challenge | csv | sqlite | geojson
    path: Path
    ids: list  # how each is named in messages
    images: list  # file name of the image of each; None where the format has none
    x: np.ndarray  # centre, level 0 px ("challenge": mm)
    y: np.ndarray
    content: object  # what the file held, for writing it back
    places: list  # where in `content` each comes from

    def __len__(self):
        return len(self.ids)


def read(path):
    """The candidates in a file; UserError where it is none of the formats, or a candidate has no
    place.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"--candidates {path}: no such file")
    with open(path, "rb") as file:
        start = file.read(16)
    if start == b"SQLite format 3\0":
        return read_sqlite(path)
    if path.suffix.lower() in (".json", ".geojson") or start.lstrip(b"\xef\xbb\xbf \r\n\t")[:1] in (
        b"{",
        b"[",
    ):
        content = common.read_json(path)
        if isinstance(content, dict) and "annotations" in content and "images" in content:
            return read_midog(path, content)
        if isinstance(content, dict) and content.get("type") == "Multiple points":
            return read_challenge(path, content)
        return read_geojson(path, content)
    return read_csv(path)


def write(candidates, path, probability, threshold, names, relabel=False):
    """Write them to `path` with probability [n] (NaN: not scored) and class names[0 | 1].

    relabel: also put the class where the format keeps its own (category_id, agreedClass, label).
    """
    path = Path(path)
    if path.exists() and path.samefile(candidates.path):
        raise UserError(
            f"--out {path}: is the file of the candidates itself; it is never written to, choose "
            "another"
        )
    scores = [None if math.isnan(p) else (float(p), int(p >= threshold)) for p in probability]
    WRITERS[candidates.kind](candidates, path, scores, names, relabel)


def places(path, kind, rows, content):
    """Candidates out of rows (id, image, x, y, place); every x and y must be a number."""
    x, y = [], []
    for name, _, a, b, _ in rows:
        try:
            a, b = float(a), float(b)
        except (TypeError, ValueError):
            a = math.nan
        if not (math.isfinite(a) and math.isfinite(b)):
            raise UserError(f"{path}: candidate {name} has no place (x, y must be numbers)")
        x.append(a)
        y.append(b)
    return Candidates(
        kind,
        path,
        [str(row[0]) for row in rows],
        [row[1] for row in rows],
        np.array(x),
        np.array(y),
        content,
        [row[4] for row in rows],
    )


# ---------------------------------------------------------------- JSON


def read_midog(path, content):
    try:
        files = {image["id"]: str(image["file_name"]) for image in content["images"]}
        rows = []
        for i, annotation in enumerate(content["annotations"]):
            name, box = annotation.get("id", i), annotation.get("bbox")
            if (
                not isinstance(box, list)
                or len(box) != 4
                or not all(isinstance(v, (int, float)) for v in box)
            ):
                raise UserError(f"{path}: annotation {name} has no bbox of four numbers")
            if box[2] < box[0] or box[3] < box[1]:
                raise UserError(
                    f"{path}: the bbox of annotation {name} is not [x1, y1, x2, y2]; MIDOG's "
                    "boxes are "
                    "corners (COCO's [x, y, width, height] must be converted)"
                )
            if annotation["image_id"] not in files:
                raise UserError(
                    f"{path}: annotation {name} belongs to image {annotation['image_id']}, which "
                    "is not "
                    "in the list of images"
                )
            rows.append(
                (
                    name,
                    files[annotation["image_id"]],
                    (box[0] + box[2]) / 2,
                    (box[1] + box[3]) / 2,
                    i,
                )
            )
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not MIDOG's JSON ({type(error).__name__}: {error})") from None
    return places(path, "midog", rows, content)


def write_midog(candidates, path, scores, names, relabel):
    content = dict(candidates.content)
    annotations = content["annotations"] = [dict(a) for a in content["annotations"]]
    for place, score in zip(candidates.places, scores):
        if score:
            annotations[place].update(probability=score[0], **{"class": names[score[1]]})
            if relabel:
                annotations[place]["category_id"] = 1 if score[1] else 2
    common.write_json(path, content)


def read_challenge(path, content):
    try:
        rows = [(i, None, *point["point"][:2], i) for i, point in enumerate(content["points"])]
        return places(path, "challenge", rows, content)
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path}: not a list of points as in the MIDOG challenge") from None


def write_challenge(candidates, path, scores, names, relabel):
    content = dict(candidates.content)
    points = content["points"] = [dict(p) for p in content["points"]]
    for place, score in zip(candidates.places, scores):
        if score:  # the challenge's own two names
            points[place].update(
                probability=score[0], name="mitotic figure" if score[1] else "non-mitotic figure"
            )
    common.write_json(path, content)


def challenge(x, y, probability, threshold, mpp):
    """Points in level-0 px → the MIDOG challenge's output: all of them, with name by threshold, in
    millimetres.
    """
    points = [
        {
            "name": "mitotic figure" if p >= threshold else "non-mitotic figure",
            "point": [float(a) * mpp / 1000, float(b) * mpp / 1000, 0],
            "probability": float(p),
        }
        for a, b, p in zip(x, y, probability)
    ]
    return {
        "name": "Points of interest",
        "type": "Multiple points",
        "points": points,
        "version": {"major": 1, "minor": 0},
    }


def read_geojson(path, content):
    features = (
        content.get("features")
        if isinstance(content, dict) and content.get("type") == "FeatureCollection"
        else [content]
        if isinstance(content, dict) and content.get("type") == "Feature"
        else content
    )
    if not isinstance(features, list) or not all(
        isinstance(f, dict) and "geometry" in f for f in features
    ):
        raise UserError(
            f"{path}: neither MIDOG's JSON (images, annotations) nor GeoJSON (features)"
        )
    rows, pieces = [], []
    for i, feature in enumerate(features):
        geometry, name = feature["geometry"] or {}, feature.get("id", i)
        check_feature(path, name, geometry, feature.get("properties"))
        coordinates = geometry.get("coordinates")
        if (
            geometry.get("type") == "MultiPoint"
        ):  # QuPath's points: each gets a class, so each becomes a feature
            for j, point in enumerate(coordinates or []):
                one = {**feature, "geometry": {**geometry, "type": "Point", "coordinates": point}}
                if "id" in feature and len(coordinates) > 1:
                    del one["id"]  # must be unique; QuPath makes new ones
                rows.append((f"{name}.{j}", None, *middle(path, name, point), len(pieces)))
                pieces.append(one)
        else:
            rows.append((name, None, *middle(path, name, coordinates), len(pieces)))
            pieces.append(feature)
    return places(path, "geojson", rows, (content, pieces))


def check_feature(path, name, geometry, properties):
    """UserError where a part of a feature that is read or written is of another type than
    GeoJSON's.
    """
    if not isinstance(geometry, dict):
        raise UserError(f"{path}: the geometry of feature {name} is no object")
    if geometry.get("type") == "MultiPoint" and not isinstance(geometry.get("coordinates"), list):
        raise UserError(
            f"{path}: feature {name} has no coordinates (a MultiPoint has a list of points)"
        )
    if not isinstance(properties or {}, dict):
        raise UserError(f"{path}: the properties of feature {name} are no object")
    for key, types in (("measurements", (dict, list)), ("metadata", dict)):
        if not isinstance((properties or {}).get(key) or {}, types):
            raise UserError(f"{path}: the {key} of feature {name} are no object")


def middle(path, name, coordinates):
    """Middle of the bounding box of GeoJSON coordinates, however deep they are nested."""
    points, todo = [], [coordinates]
    while todo:
        item = todo.pop()
        if (
            isinstance(item, list)
            and len(item) >= 2
            and all(isinstance(v, (int, float)) for v in item)
        ):
            points.append(item[:2])
        elif isinstance(item, list):
            todo += item
    if not points:
        raise UserError(f"{path}: feature {name} has no coordinates")
    low, high = np.min(points, axis=0), np.max(points, axis=0)
    return (low + high) / 2


def write_geojson(candidates, path, scores, names, relabel):
    content, pieces = candidates.content
    pieces = [dict(piece) for piece in pieces]
    for place, score in zip(candidates.places, scores):
        if not score:
            continue
        properties = dict(pieces[place].get("properties") or {})
        measurements, key = properties.get("measurements"), f"probability of {names[1]}"
        if isinstance(measurements, list):  # QuPath before 0.4
            properties["measurements"] = [*measurements, {"name": key, "value": score[0]}]
        else:
            properties["measurements"] = {**(measurements or {}), key: score[0]}
        if properties.get("classification"):
            given = properties["classification"]
            properties["metadata"] = {
                **(properties.get("metadata") or {}),
                "class of the candidate": str(
                    given.get("name", given) if isinstance(given, dict) else given
                ),
            }
        properties["classification"] = {"name": names[score[1]], "color": list(COLOURS[score[1]])}
        pieces[place]["properties"] = properties
    whole = (
        {**content, "features": pieces}
        if isinstance(content, dict) and "features" in content
        else {"type": "FeatureCollection", "features": pieces}
    )
    common.write_json(path, whole)


# ---------------------------------------------------------------- CSV


def read_csv(path):
    try:
        text = path.read_text(encoding="utf-8-sig")
        first = text.split("\n", 1)[0]
        delimiter = max(",;\t", key=first.count)
        table = list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter))
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not a readable CSV file ({error})") from None
    header = [column.strip() for column in table[0]] if table else []
    lower = [column.lower() for column in header]
    if "x" not in lower or "y" not in lower:
        raise UserError(
            f"{path}: not a file of candidates: wanted is MIDOG JSON, GeoJSON, SlideRunner "
            "SQLite, or a "
            "CSV file with the columns x and y (and filename)"
        )
    x, y = lower.index("x"), lower.index("y")
    name = next((lower.index(c) for c in NAME_COLUMNS if c in lower), None)
    rows = []
    for i, row in enumerate(table[1:], start=1):
        if not row:
            continue
        if len(row) != len(header):
            raise UserError(f"{path}, row {i}: {len(row)} columns, the header has {len(header)}")
        rows.append((f"row {i}", None if name is None else row[name].strip(), row[x], row[y], i))
    blank = [row[0] for row in rows if row[1] == ""]
    if (
        0 < len(blank) < len(rows)
    ):  # a column that is all blank says nothing, one blank would lie on no image
        raise UserError(f"{path}, {blank[0]}: the {header[name]} is blank")
    return places(
        path, "csv", [(row[0], row[1] or None, *row[2:]) for row in rows], (table, delimiter)
    )


def write_csv(candidates, path, scores, names, relabel):
    table, delimiter = candidates.content
    table = [list(row) for row in table]
    header = table[0]
    lower = [column.strip().lower() for column in header]
    columns = []
    for name in ("probability", "class"):
        if name not in lower:
            header.append(name)
            for row in table[1:]:
                if row:
                    row.append("")
        columns.append(lower.index(name) if name in lower else len(header) - 1)
    label = lower.index("label") if relabel and "label" in lower else None
    for place, score in zip(candidates.places, scores):
        if score:
            table[place][columns[0]], table[place][columns[1]] = repr(score[0]), names[score[1]]
            if label is not None:
                table[place][label] = str(score[1])
    with (
        common.atomic(path) as temporary,
        open(temporary, "w", newline="", encoding="utf-8") as file,
    ):
        csv.writer(file, delimiter=delimiter, lineterminator="\n").writerows(table)


# ---------------------------------------------------------------- SlideRunner


def connect(path):
    # immutable: neither a journal nor a lock beside somebody's database; not where a log waits to
    # be merged
    name = urllib.parse.quote(str(Path(path).resolve()))
    immutable = "" if Path(f"{path}-wal").exists() else "&immutable=1"
    return sqlite3.connect(f"file:{name}?mode=ro{immutable}", uri=True)


def read_sqlite(path):
    try:
        database = connect(path)
        try:
            columns = {row[1] for row in database.execute("PRAGMA table_info(Annotations)")}
            alive = "WHERE coalesce(a.deleted, 0) = 0" if "deleted" in columns else ""
            found = database.execute(
                "SELECT a.uid, s.filename, min(c.coordinateX), max(c.coordinateX), "
                "min(c.coordinateY), "
                "max(c.coordinateY) FROM Annotations a JOIN Annotations_coordinates c ON c.annoId "
                "= a.uid "
                f"JOIN Slides s ON s.uid = a.slide {alive} GROUP BY a.uid ORDER BY a.uid"
            ).fetchall()
            classes = {
                str(name).lower(): uid
                for uid, name in database.execute("SELECT uid, name FROM Classes")
            }
        finally:
            database.close()
    except sqlite3.Error as error:
        raise UserError(f"{path}: not a readable SlideRunner database ({error})") from None
    rows = []
    for uid, name, left, right, top, bottom in found:
        known = None not in (left, right, top, bottom)
        rows.append(
            (
                uid,
                name,
                (left + right) / 2 if known else None,
                (top + bottom) / 2 if known else None,
                uid,
            )
        )
    return places(path, "sqlite", rows, classes)


def class_numbers(candidates, names, relabel):
    """The database's numbers of the classes names[0 | 1], None where it has none: with `relabel` a
    UserError.
    """
    classes = candidates.content
    wanted = [classes.get(name.lower()) for name in names]
    wanted[0] = wanted[0] or classes.get("not mitotic figure") or classes.get("nonmitosis")
    wanted[1] = wanted[1] or classes.get("mitosis") or classes.get("mitose")
    if relabel and None in wanted:
        raise UserError(
            f"{candidates.path}: its classes ({', '.join(classes)}) do not name both {names[1]} "
            "and "
            f"{names[0]}, so --relabel cannot tell their numbers"
        )
    return wanted


def write_sqlite(candidates, path, scores, names, relabel):
    wanted = class_numbers(candidates, names, relabel)
    with common.atomic(path) as temporary:
        source = connect(candidates.path)
        copy = sqlite3.connect(temporary)
        try:
            source.backup(copy)
            # A table of its own: SlideRunner reads its tables by name, and looks at no other.
            copy.execute("DROP TABLE IF EXISTS Predictions")
            copy.execute(
                "CREATE TABLE Predictions (annoId INTEGER PRIMARY KEY, probability REAL, class "
                "TEXT, "
                "classId INTEGER)"
            )
            scored = [(place, *score) for place, score in zip(candidates.places, scores) if score]
            copy.executemany(
                "INSERT INTO Predictions VALUES (?, ?, ?, ?)",
                [(uid, p, names[c], wanted[c]) for uid, p, c in scored],
            )
            if relabel:
                copy.executemany(
                    "UPDATE Annotations SET agreedClass = ? WHERE uid = ?",
                    [(wanted[c], uid) for uid, _, c in scored],
                )
            copy.commit()
        except sqlite3.Error as error:
            if "full" in str(error):
                raise OSError(28, "disk full", str(path)) from None
            raise UserError(
                f"{candidates.path}: cannot be copied with its predictions ({error})"
            ) from None
        finally:
            source.close()
            copy.close()


WRITERS = {
    "midog": write_midog,
    "challenge": write_challenge,
    "geojson": write_geojson,
    "csv": write_csv,
    "sqlite": write_sqlite,
}
