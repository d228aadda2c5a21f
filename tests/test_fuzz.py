"""Readers against made-up and mutated files: the same table from every format; whatever is wrong
ends in one line.

A mutated file may be read or refused. What is read must be what a second, naive reader of the same
file finds: the same places with the same labels, and no image outside its folder. Anything else
than a UserError fails the test."""

import contextlib
import csv
import io
import json
import math
import re
import signal
import sqlite3
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from test_data import places, sliderunner

import data
from common import UserError
from dataset import formats, slides

QUICK, MANY = 120, 2500  # mutated inputs of each kind; the second marked as slow
NAME = {1: "mitotic figure", 0: "not mitotic figure"}
# What a value may turn into: other types, no numbers, paths out of the folder, control characters,
# too much of it.
ODD = (
    None,
    True,
    False,
    0,
    1,
    2,
    -1,
    0.5,
    1e308,
    -1e9,
    10**400,
    "",
    " ",
    "1",
    "2",
    "1.0",
    "nan",
    "inf",
    "1e999",
    "0x1",
    "١",
    "1_0",
    "../001.png",
    "../../etc/passwd",
    "/etc/passwd",
    "C:\\001.png",
    "a/../../b.png",
    "..\\b.png",
    "~/b",
    "a\0b",
    "\n",
    "\ud800",
    "é" * 200,
    "x" * 3000,
    "mitotic figure",
    "other",
    "Mitosis",
    [],
    {},
    [1],
    {"a": 1},
    [[]],
)


@contextlib.contextmanager
def no_hang(seconds=60):
    """An input that needs a minute is one that hangs: the alarm's exception is no UserError."""

    def alarm(*_):
        raise TimeoutError

    old = signal.signal(signal.SIGALRM, alarm)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)


# ---------------------------------------------------------------- the same table in every format


def as_midog(rows):
    images = sorted({row[0] for row in rows})
    return json.dumps(
        {
            "images": [
                {"id": i, "file_name": name, "width": 900, "height": 800}
                for i, name in enumerate(images)
            ],
            "categories": [{"id": 1, "name": NAME[1]}, {"id": 2, "name": NAME[0]}],
            "annotations": [
                {
                    "id": i,
                    "image_id": images.index(image),
                    "category_id": 1 if label else 2,
                    "bbox": [x - 25, y - 25, x + 25, y + 25],
                }
                for i, (image, x, y, label) in enumerate(rows)
            ],
        }
    )


def as_csv(rows, label=str):
    file = io.StringIO()
    csv.writer(file).writerows(
        [("filename", "x", "y", "label"), *((i, x, y, label(k)) for i, x, y, k in rows)]
    )
    return file.getvalue()


def as_patches(rows):
    file = io.StringIO()
    csv.writer(file).writerows(
        [
            ("path", "label", "case", "domain"),
            *((f"{i:03d}.png", label, image, "a") for i, (image, _, _, label) in enumerate(rows)),
        ]
    )
    return file.getvalue()


def as_geojson(rows):
    return json.dumps(
        {
            "type": "FeatureCollection",
            "features": [
                {
                    "type": "Feature",
                    "id": f"{i}",
                    "properties": {"classification": {"name": NAME[label]}},
                    "geometry": {"type": "Point", "coordinates": [x, y]}
                    if i % 2
                    else {
                        "type": "Polygon",
                        "coordinates": [
                            [[x - 9, y - 9], [x + 9, y - 9], [x + 9, y + 9], [x - 9, y + 9]]
                        ],
                    },
                }
                for i, (_, x, y, label) in enumerate(rows)
            ],
        }
    )


def as_children(rows):
    """The same cells below a region that is below another one, as QuPath exports a hierarchy."""
    content = json.loads(as_geojson(rows))
    for name, side in (("ROI", 800), ("Tumor", 900)):
        ring = [[0, 0], [side, 0], [side, side], [0, side]]
        region = {
            "type": "Feature",
            "geometry": {"type": "Polygon", "coordinates": [ring]},
            "properties": {
                "classification": {"name": name},
                "childObjects": content["features"],
            },
        }
        content["features"] = [region]
    return json.dumps(content)


def as_imagescope(rows):
    root = ElementTree.Element("Annotations")
    regions = ElementTree.SubElement(ElementTree.SubElement(root, "Annotation"), "Regions")
    for _, x, y, label in rows:
        region = ElementTree.SubElement(regions, "Region", Type="1", Text=NAME[label])
        vertices = ElementTree.SubElement(region, "Vertices")
        for d in (-25, 25):
            ElementTree.SubElement(vertices, "Vertex", X=str(x + d), Y=str(y + d))
    return ElementTree.tostring(root, encoding="unicode")


def as_sqlite(rows, path, schema="old"):
    sliderunner(
        path,
        [(i, x, y, 1 if label else 2) for i, x, y, label in rows],
        [(1, NAME[1]), (2, NAME[0])],
        schema,
    ).close()
    return path.read_bytes()


file_names = st.text(
    st.characters(codec="utf-8", exclude_characters="/\\:", exclude_categories=("Cc", "Cs", "Z")),
    min_size=1,
    max_size=20,
).filter(lambda name: name.strip(".") and name.isprintable())
positions = st.integers(3, 4000).map(lambda n: n / 2)  # not all of them within 0 to 1


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    names=st.lists(file_names, min_size=1, max_size=4, unique=True),
    folder=st.sampled_from(["", "a/", "a b/c/"]),
    cells=st.lists(st.tuples(st.integers(0, 3), positions, positions), min_size=2, max_size=20),
    first=st.booleans(),
)
def test_every_format_gives_the_table_that_was_written(
    tmp_path_factory, names, folder, cells, first
):
    here = tmp_path_factory.mktemp("formats")
    rows = [
        (f"{folder}{names[which % len(names)]}.png", x, y, int((i % 2) ^ first))
        for i, (which, x, y) in enumerate(cells)
    ]
    wanted = sorted((Path(image).stem, x, y, label) for image, x, y, label in rows)
    (here / "a.json").write_text(as_midog(rows))
    (here / "a.csv").write_text(as_csv(rows))
    (here / "b.csv").write_text(as_csv(rows, NAME.get))
    as_sqlite(rows, here / "a.sqlite")
    as_sqlite(rows, here / "b.sqlite", "new")
    for file in ("a.json", "a.csv", "b.csv", "a.sqlite", "b.sqlite"):
        a = data.load_dataset(here / file)
        assert places(a) == wanted and len(set(a.id)) == len(a) == len(rows), file
        assert set(a.image) == {row[0] for row in rows}, file
    (here / "a.geojson").write_text(as_geojson(rows))
    a = data.load_dataset(here / "a.geojson")  # one file is one image, which it is called after
    assert places(a) == sorted(("a", x, y, label) for _, x, y, label in rows)


# ---------------------------------------------------------------- naive readers of the same files
# Each gives rows (image, x, y, class, side of the shape) of all records; a record of a class that
# is neither mitotic figure nor hard negative may be broken, and is left out then.


def naive_midog(path):
    content = json.loads(path.read_text("utf-8-sig"))
    images = {same(image["id"]): image["file_name"] for image in content["images"]}
    names = {}
    for category in content.get("categories", ()):
        name = category.get("name")
        names[same(category["id"])] = name if isinstance(name, str) else str(category["id"])
    rows = []
    for a in content["annotations"]:
        name = None
        if type(a.get("category_id")) in (int, float, str):
            name = names.get(same(a["category_id"]), f"class {a['category_id']}")
        with skipped_if_nobody_asks(name):
            x1, y1, x2, y2 = (coordinate(value) for value in a["bbox"])
            image = images[same(a["image_id"])]
            rows.append((image, (x1 + x2) / 2, (y1 + y2) / 2, name, max(x2 - x1, y2 - y1)))
    return rows


def naive_geojson(path):
    content, rows = json.loads(path.read_text("utf-8-sig")), []
    features = list(content["features"] if isinstance(content, dict) else content)
    for feature in features:
        properties = feature.get("properties")
        if isinstance(properties, dict):
            features += properties.get("childObjects") or []  # and theirs in turn
        name = feature.get("properties")
        name = name.get("classification") if isinstance(name, dict) else None
        name = name.get("name") if isinstance(name, dict) else name
        if not isinstance(name, str) or not name.strip():
            name = None
        with skipped_if_nobody_asks(name):
            points = feature["geometry"]["coordinates"]
            kind = feature["geometry"]["type"]
            if kind in ("LineString", "MultiLineString", "MultiPolygon", "GeometryCollection"):
                continue
            ring = {"Point": [points], "MultiPoint": points, "Polygon": points[0]}[kind]
            xs, ys = zip(*((coordinate(p[0]), coordinate(p[1])) for p in ring))
            side = max(max(xs) - min(xs), max(ys) - min(ys))
            image = path.name.replace(".geojson", "")
            rows.append((image, (min(xs) + max(xs)) / 2, (min(ys) + max(ys)) / 2, name, side))
    return rows


def naive_csv(path):
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError:
        text = path.read_text("cp1252")
    rows = list(csv.reader(io.StringIO(text, newline="")))
    rows = [row for row in rows if "".join(row).strip()]
    header = [name.strip().lower() for name in rows[0]]

    def column(*names):
        return next((header.index(name) for name in names if name in header), None)

    image, label = column("path", "filename", "image", "file"), column("label", "class")
    x, y = (column("x"), column("y")) if "path" not in header else (None, None)
    found = []
    for row in rows[1:]:
        place = (float(row[x]), float(row[y])) if x is not None else (math.nan, math.nan)
        name = row[label] if label is not None else None
        found.append((row[image] if image is not None else "", *place, name, 0))
    return found if x is not None else list({row[0]: row for row in found}.values())


def naive_imagescope(path):
    rows = []
    for region in ElementTree.parse(path).getroot().iterfind("Annotation/Regions/Region"):
        name = region.get("Text", "").strip() or None
        if region.get("Type") in ("3", "4") or region.get("NegativeROA") == "1":
            continue
        with skipped_if_nobody_asks(name):
            vertices = region.findall("Vertices/Vertex")
            xs = [coordinate(vertex.get("X")) for vertex in vertices]
            ys = [coordinate(vertex.get("Y")) for vertex in vertices]
            side = max(max(xs) - min(xs), max(ys) - min(ys))
            center = (min(xs) + max(xs)) / 2, (min(ys) + max(ys)) / 2
            rows.append((path.stem, *center, name, side))
    return rows


def naive_sqlite(path):
    connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    connection.text_factory = lambda raw: raw.decode("utf-8", "replace")
    with contextlib.closing(connection):
        names = {}
        for uid, name in connection.execute("SELECT uid, name FROM Classes"):
            names[str(uid)] = name if isinstance(name, str) else str(uid)
        columns = [row[1] for row in connection.execute("PRAGMA table_info(Annotations)")]
        alive = "AND coalesce(deleted, 0) = 0" if "deleted" in columns else ""
        slide = dict(connection.execute("SELECT uid, filename FROM Slides"))
        where = {}
        for owner, x, y in connection.execute(
            "SELECT annoId, coordinateX, coordinateY FROM Annotations_coordinates"
        ):
            where.setdefault(owner, []).append((x, y))
        rows = []
        for uid, s, kind in connection.execute(
            f"SELECT uid, slide, agreedClass FROM Annotations WHERE type IN (1, 4) {alive}"
        ):
            name = None if kind is None else names.get(str(kind), f"class {kind}")
            with skipped_if_nobody_asks(name):
                ((x, y),) = where[uid]
                rows.append((slide[s], coordinate(x), coordinate(y), name, 0))
        return rows


def same(value):
    """1, "1" and 1.0 are one id."""
    if isinstance(value, bool) or not str(value).isascii():
        return str(value)
    try:
        return float(value)
    except (ValueError, OverflowError):
        return value


def coordinate(value):
    if isinstance(value, bool) or "_" in str(value) or not abs(float(value)) <= 1e7:
        raise ValueError
    return float(value)


@contextlib.contextmanager
def skipped_if_nobody_asks(name):
    try:
        yield
    except (KeyError, ValueError, TypeError, IndexError, OverflowError):
        if meaning(name) is not None:
            raise


def cells_of(rows):
    """The rows that are cells: no shape of more than 256 px, no class that marks regions."""
    sides = {}
    for *_, name, side in rows:
        if side > 0:
            sides.setdefault(name, []).append(side > 256)
    regions = set()
    for name, large in sides.items():
        if name is not None and meaning(name) is None:
            if 2 * sum(large) > len(large) or {"region", "roi"} & set(name.lower().split()):
                regions.add(name)
    return [row for row in rows if row[4] == 0 or row[4] <= 256 and row[3] not in regions]


WORDS = {
    "mitotic figure": 1,
    "mitotic": 1,
    "mitosis": 1,
    "not mitotic figure": 0,
    "not mitotic": 0,
    "no mitotic figure": 0,
}


def meaning(name, numbers=False):
    """1, 0, or None where it says neither; numbers: 1 and 0 mean themselves."""
    if not isinstance(name, str):
        return None
    if numbers and re.fullmatch(r"[+-]?0*[01](\.0*)?", name.strip()):
        return int(float(name.strip()))
    return WORDS.get(" ".join(re.findall(r"[a-z0-9]+", name.lower())))


def tidy(rows):
    """Rows (image, x, y, …) in one order, with the images' names as the readers write them."""
    result = []
    for image, x, y, *rest in rows:
        name = str(image or "").strip().replace("\\", "/")
        absolute = re.match(r"[A-Za-z]:|/", name)
        parts = [part for part in name.split("/") if part not in ("", ".")]
        name = parts[-1] if absolute and parts else "/".join(parts)
        result.append((name, "" if math.isnan(x) else x, "" if math.isnan(y) else y, *rest))
    return sorted(result, key=repr)


# ---------------------------------------------------------------- mutations


def mutated_bytes(rng, content):
    """Flipped bits, bytes cut out, put in, doubled; the end cut off."""
    content = bytearray(content)
    for _ in range(rng.integers(1, 4)):
        at, n = int(rng.integers(0, len(content) + 1)), int(rng.integers(1, 9))
        kind = rng.integers(0, 6)
        if kind == 0 and at < len(content):
            content[at] ^= 1 << int(rng.integers(0, 8))
        elif kind == 1:
            del content[at : at + n]
        elif kind == 2:
            content[at:at] = rng.integers(0, 256, n, np.uint8).tobytes()
        elif kind == 3:
            content[at:at] = content[at : at + 10 * n]
        elif kind == 4:
            content[at : at + n] = (
                bytes([int(rng.choice([0, 255, 34, 44, 46, 47, 48, 49, 50, 91, 123, 10]))]) * n
            )
        elif rng.random() < 0.3:
            del content[at:]
    return bytes(content)


def nodes(tree):
    """(container, key) of every value in nested lists and dicts."""
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        yield tree, key
        if isinstance(value, (dict, list)):
            yield from nodes(value)


def mutated_json(rng, content):
    """Some values become odd ones, vanish, come twice, or change places."""
    tree = json.loads(content)
    for _ in range(rng.integers(1, 4)):
        every = list(nodes(tree))
        if not every:
            break
        (container, key), (other, other_key) = (
            every[int(i)] for i in rng.integers(0, len(every), 2)
        )
        kind = rng.integers(0, 6)
        if kind <= 2:
            container[key] = ODD[int(rng.integers(0, len(ODD)))]
        elif kind == 3:
            del container[key]
        elif kind == 4 and isinstance(container, list):
            container.insert(int(key), json.loads(json.dumps(container[key])))
        else:
            container[key] = json.loads(json.dumps(other[other_key]))
    return json.dumps(tree, ensure_ascii=bool(rng.integers(0, 2))).encode("utf-8", "surrogatepass")


def mutated_csv(rng, content):
    rows = list(csv.reader(io.StringIO(content.decode())))
    for _ in range(rng.integers(1, 4)):
        i = int(rng.integers(0, len(rows)))
        if not rows[i]:
            continue
        j, kind = int(rng.integers(0, len(rows[i]))), rng.integers(0, 5)
        if kind <= 1:
            rows[i][j] = str(ODD[int(rng.integers(0, len(ODD) - 5))])
        elif kind == 2:
            rows[i].insert(j, rows[i][j]) if rng.random() < 0.5 else rows[i].pop(j)
        elif kind == 3:
            rows.insert(i, list(rows[int(rng.integers(0, len(rows)))]))
        else:
            other = rows[int(rng.integers(0, len(rows)))]
            rows[i][j] = other[j % len(other)] if other else ""
    file = io.StringIO()
    csv.writer(file).writerows(rows)
    return file.getvalue().encode("utf-8", "surrogatepass")


def mutated_xml(rng, content):
    """Attributes become odd values, vanish or change places; elements vanish or come twice."""
    root = ElementTree.fromstring(content)
    for _ in range(rng.integers(1, 4)):
        parents = [element for element in root.iter() if len(element)]
        elements = [element for element in root.iter() if element.attrib]
        if not parents or not elements:
            break
        parent, element, other = (
            group[int(rng.integers(0, len(group)))] for group in (parents, elements, elements)
        )
        name = list(element.attrib)[int(rng.integers(0, len(element.attrib)))]
        kind = rng.integers(0, 6)
        if kind <= 2:
            odd = str(ODD[int(rng.integers(0, len(ODD)))])
            element.set(name, re.sub("[\0-\x08\ud800-\udfff]", "?", odd))
        elif kind == 3:
            del element.attrib[name]
        elif kind == 4:
            element.set(name, list(other.attrib.values())[0])
        elif rng.random() < 0.5:
            parent.append(parent[int(rng.integers(0, len(parent)))])
        else:
            parent.remove(parent[int(rng.integers(0, len(parent)))])
    return ElementTree.tostring(root)


def mutated_sqlite(rng, content):
    """Cells of the tables become odd values; rows vanish; columns and tables get other names."""
    connection = sqlite3.connect(":memory:")
    connection.deserialize(content)
    tables = ("Slides", "Annotations", "Annotations_coordinates", "Classes")
    for _ in range(rng.integers(1, 4)):
        with contextlib.suppress(sqlite3.Error, OverflowError, UnicodeEncodeError):
            table = tables[int(rng.integers(0, 4))]
            columns = [row[1] for row in connection.execute(f"PRAGMA table_info({table})")]
            if not columns:
                continue  # dropped before
            column, kind = columns[int(rng.integers(0, len(columns)))], rng.integers(0, 10)
            pick = f"SELECT rowid FROM {table} ORDER BY rowid LIMIT 1 OFFSET {rng.integers(0, 12)}"
            row = f"rowid = ({pick})"
            value = ODD[int(rng.integers(0, len(ODD)))]
            value = value if not isinstance(value, (list, dict)) else b"\xff\x00bytes"
            if kind < 7:
                connection.execute(f"UPDATE {table} SET {column} = ? WHERE {row}", (value,))
            elif kind == 7:
                connection.execute(f"DELETE FROM {table} WHERE {row}")
            elif kind == 8:
                connection.execute(f"ALTER TABLE {table} RENAME COLUMN {column} TO other")
            else:
                connection.execute(f"DROP TABLE {table}")
    connection.commit()
    content = connection.serialize()
    connection.close()
    return content


ROWS = [(f"{1 + i % 3:03d}.png", 10.5 * i, 800.0 - 7 * i, i % 2) for i in range(12)]
KINDS = {  # name of the file → (content, mutation that knows the format, naive reader)
    "a.json": (lambda path: as_midog(ROWS).encode(), mutated_json, naive_midog),
    "a.csv": (lambda path: as_csv(ROWS).encode(), mutated_csv, naive_csv),
    "patches.csv": (lambda path: as_patches(ROWS).encode(), mutated_csv, naive_csv),
    "a.geojson": (lambda path: as_geojson(ROWS).encode(), mutated_json, naive_geojson),
    "b.geojson": (lambda path: as_children(ROWS).encode(), mutated_json, naive_geojson),
    "a.xml": (lambda path: as_imagescope(ROWS).encode(), mutated_xml, naive_imagescope),
    "old.sqlite": (lambda path: as_sqlite(ROWS, path, "old"), mutated_sqlite, naive_sqlite),
    "new.sqlite": (lambda path: as_sqlite(ROWS, path, "new"), mutated_sqlite, naive_sqlite),
}


def read_or_refuse(path, naive):
    """Whether a file was read for training; both readings must hold what the naive reader finds."""
    candidates_or_refuse(path, naive)
    with no_hang():
        try:
            a = data.load_dataset(path)
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 2000
            return False
    root = path.parent.resolve()
    for image in [*a.image.tolist(), *a.all_images, *a.missing]:
        assert a.image_path(image).resolve().is_relative_to(root), image
        assert ".." not in image.split("/"), image
    assert set(a.label.tolist()) <= {0, 1} and len(set(a.id.tolist())) == len(a)
    found = list(zip(a.image.tolist(), a.x.tolist(), a.y.tolist(), a.label.tolist()))
    expected = []
    for image, x, y, name, _ in cells_of(naive(path)):
        label = meaning(name, numbers=path.suffix == ".csv")
        if label is not None:
            expected.append((image, x, y, label))
    assert tidy(found) == tidy(expected)
    return True


def candidates_or_refuse(path, naive):
    """The same file for classify.py: all cells, whatever their class; written with scores and read
    again, they are the same ones."""
    with no_hang():
        try:
            candidates = formats.read_candidates(path)
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 2000
            return
        out = path.with_name(f"out{path.suffix}")
        probability = np.linspace(0.1, 0.9, len(candidates))
        try:
            formats.write(candidates, out, probability, 0.5, [NAME[0], NAME[1]])
        except UserError as error:  # a database may be read in part, but not copied
            assert "\n" not in str(error) and path.suffix == ".sqlite" and not out.exists()
            return
        again = formats.read_candidates(out)
        out.unlink()
    images = [name or "" for name in candidates.images]
    found = list(zip(images, candidates.x.tolist(), candidates.y.tolist()))
    expected = []
    for image, x, y, _, _ in cells_of(naive(path)):
        expected.append((image if any(images) else "", x, y))
    assert tidy(found) == tidy(expected)
    assert again.images == candidates.images
    assert again.x.tolist() == candidates.x.tolist() and again.y.tolist() == candidates.y.tolist()


def fuzz(tmp_path, name, how, number, seed):
    make, by_format, naive = KINDS[name]
    path, rng, accepted = (
        tmp_path / name,
        np.random.default_rng([seed, list(KINDS).index(name), how == "bytes"]),
        0,
    )
    content = make(path)
    path.write_bytes(content)
    assert read_or_refuse(path, naive)
    for i in range(number):
        bad = (mutated_bytes if how == "bytes" else by_format)(rng, content)
        path.write_bytes(bad)
        try:
            accepted += read_or_refuse(path, naive)
        except BaseException:
            print(f"input {i}: {bad[:20000]!r}")
            raise
    print(f"{name}, {how}: {accepted} of {number} read, the others refused")
    assert (
        0.02 * number < accepted < 0.98 * number
    )  # else the mutations are too coarse or too fine to tell


@pytest.mark.parametrize("how", ["bytes", "values"])
@pytest.mark.parametrize("name", KINDS)
def test_mutated_files_are_read_right_or_refused_in_one_line(tmp_path, name, how):
    fuzz(tmp_path, name, how, QUICK, 0)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["bytes", "values"])
@pytest.mark.parametrize("name", KINDS)
def test_many_mutated_files(tmp_path, name, how):
    fuzz(tmp_path, name, how, MANY, 1)


# ---------------------------------------------------------------- split files and images


def test_a_mutated_split_file_never_leaks(tmp_path):
    rows = [(f"{i % 12:03d}.png", 10.0 * i, 5.0 * i, i // 12 % 2) for i in range(96)]
    (tmp_path / "a.csv").write_text(as_csv(rows))
    a, rng, accepted = data.load_dataset(tmp_path / "a.csv"), np.random.default_rng(0), 0
    data.make_split(a).save(tmp_path / "split.json")
    content = (tmp_path / "split.json").read_bytes()
    for i in range(2 * QUICK):
        (tmp_path / "split.json").write_bytes(
            (mutated_bytes if i % 2 else mutated_json)(rng, content)
        )
        try:
            split = data.load_split(tmp_path / "split.json", a)
        except UserError as error:
            assert "\n" not in str(error)
            continue
        accepted += 1
        cases = [set(a.case[a.rows(ids)].tolist()) for ids in (split.train, split.val, split.test)]
        if split.settings["by"] != "annotation":
            assert not (cases[0] & cases[1] or cases[0] & cases[2] or cases[1] & cases[2])
    assert 0 < accepted < 2 * QUICK


@pytest.mark.parametrize(
    "name, options",
    [
        ("a.png", {}),
        ("a.jpg", {"quality": 90}),
        ("strips.tif", {"compression": "tiff_lzw"}),
        ("tiles.tif", {"tile": (64, 64), "compression": "jpeg", "tiffinfo": {322: 64, 323: 64}}),
    ],
)
def test_mutated_images_are_read_or_refused_in_one_line(tmp_path, name, options):
    path, rng, refused = tmp_path / name, np.random.default_rng(0), 0
    Image.fromarray(rng.integers(0, 255, (8, 8, 3), np.uint8)).resize((128, 128)).save(
        path, **options
    )
    content = path.read_bytes()
    for _ in range(QUICK // 2):
        path.write_bytes(
            mutated_bytes(
                rng, content[: rng.integers(1, len(content))] if rng.random() < 0.2 else content
            )
        )
        try:
            with no_hang():
                assert slides.read(path, 64, 64, 128).shape == (128, 128, 3)
        except UserError as error:
            refused += 1
            assert "\n" not in str(error) and name in str(error)
        slides.close(path)
    assert 0 < refused < QUICK // 2
