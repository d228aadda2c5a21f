"""Candidates in every dialect of their formats, what is kept of a file, and what is refused. No
model, no pixels.
"""

import json
import math
import sqlite3

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common import UserError
from dataset import formats
from dataset.formats import challenge

NAMES = ["hard negative", "mitotic figure"]


def feature(geometry, **rest):
    return {"type": "Feature", "geometry": geometry, **rest}


def point(x, y):
    return {"type": "Point", "coordinates": [x, y]}


def saved(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def scored(path, out, probability, **options):
    formats.write(formats.read_candidates(path), out, np.array(probability), 0.5, NAMES, **options)
    return out


# ---------------------------------------------------------------- CSV


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(
        st.tuples(
            st.floats(2, 1e6),
            st.floats(-1e6, 1e6),
            st.text(st.characters(codec="utf-8", exclude_characters="\r\0"), max_size=12),
        ),
        min_size=1,
        max_size=5,
    ),
    delimiter=st.sampled_from(",;\t"),
    bom=st.booleans(),
)
def test_csv_keeps_every_cell(rows, delimiter, bom, tmp_path_factory):
    """Any text in the other columns, quotes, line ends and delimiters included; the numbers as they
    were written.
    """
    import csv

    folder = tmp_path_factory.mktemp("csv")
    with open(folder / "in.csv", "w", newline="", encoding="utf-8-sig" if bom else "utf-8") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow(["Note", "X", "y", "filename"])
        writer.writerows([note, repr(x), repr(y), "a.tif"] for x, y, note in rows)
    found = formats.read_candidates(folder / "in.csv")
    assert found.format == "csv" and found.images == ["a.tif"] * len(rows)
    assert found.x.tolist() == [row[0] for row in rows] and found.y.tolist() == [
        row[1] for row in rows
    ]
    probability = np.linspace(0, 1, len(rows))
    probability[0] = math.nan
    formats.write(found, folder / "out.csv", probability, 0.5, NAMES)
    with open(folder / "out.csv", newline="", encoding="utf-8") as file:
        header, *table = csv.reader(file, delimiter=delimiter)
    assert header == ["Note", "X", "y", "filename", "probability", "class"]
    assert [row[:4] for row in table] == [[note, repr(x), repr(y), "a.tif"] for x, y, note in rows]
    assert table[0][4:] == ["", ""]
    assert [row[4:] for row in table[1:]] == [
        [repr(float(p)), NAMES[int(p >= 0.5)]] for p in probability[1:]
    ]


def test_csv_scored_again_replaces_its_columns(tmp_path):
    given = saved(tmp_path / "in.csv", "x,y,label\n1,2,0\n3,4,0\n\n")
    once = scored(given, tmp_path / "once.csv", [0.25, 0.75])
    twice = scored(once, tmp_path / "twice.csv", [0.75, 0.25], relabel=True)
    assert (
        twice.read_text()
        == "x,y,label,probability,class\n1,2,1,0.75,mitotic figure\n3,4,0,0.25,hard negative\n\n"
    )
    assert formats.read_candidates(given).images == [None, None]


def test_csv_names_of_images_lose_their_blanks(tmp_path):
    given = saved(tmp_path / "in.csv", "filename,x,y\n im.png,1,2\nim.png ,3,4\n")
    assert formats.read_candidates(given).images == ["im.png", "im.png"]
    blank = saved(
        tmp_path / "blank.csv", "filename,x,y\n,1,2\n ,3,4\n"
    )  # all of them: the format names no image
    assert formats.read_candidates(blank).images == [None, None]


# ---------------------------------------------------------------- GeoJSON


@pytest.mark.parametrize(
    "wrap",
    [
        lambda f: {"type": "FeatureCollection", "features": f, "kept": 1},
        lambda f: f,
        lambda f: f[0],
    ],
)
def test_geojson_in_every_wrapping(wrap, tmp_path):
    features = [feature(point(10, 20), id="a"), feature(point(30, 40), id="b")]
    found = formats.read_candidates(saved(tmp_path / "in.geojson", wrap(features)))
    n = len(found)
    assert found.x.tolist() == [10, 30][:n] and found.y.tolist() == [20, 40][:n]
    written = json.loads(scored(found.path, tmp_path / "out.geojson", [0.9, 0.1][:n]).read_text())
    assert written["type"] == "FeatureCollection" and ("kept" in written) == (
        "kept" in found.content
    )
    assert [f["properties"]["classification"]["name"] for f in written["features"]] == NAMES[::-1][
        :n
    ]


def outline(left, top, right, bottom):
    ring = [[left, top], [right, top], [right, bottom], [left, bottom], [left, top]]
    return {"type": "Polygon", "coordinates": [ring]}


def test_geojson_outlines_have_their_middle_and_regions_are_no_cells(tmp_path):
    """Lines, MultiPolygons, tiles and large shapes are counted by class and written back as they
    were."""
    cells = [
        feature(outline(0, 0, 10, 30)),
        feature({"type": "Point", "coordinates": [5, 6, 0]}, properties={"classification": "x"}),
    ]
    regions = [
        feature(
            {"type": "MultiPolygon", "coordinates": [outline(0, 0, 9, 9)["coordinates"]]},
            properties={"classification": {"name": "Tumor"}},
        ),
        feature({"type": "LineString", "coordinates": [[1, 2], [3, 4]]}),
        feature(outline(0, 0, 400, 30), properties={"classification": {"name": "Tumor"}}),
        feature(outline(0, 0, 40, 40), properties={"classification": {"name": "Region*"}}),
        feature(outline(0, 0, 40, 40), properties={"objectType": "tile"}),
        feature(None, properties={"classification": {"name": "Tumor"}}),
    ]
    given = saved(tmp_path / "in.json", cells + regions)
    found = formats.read_candidates(given)
    assert list(zip(found.x, found.y)) == [(5, 15), (5, 6)]
    notes = " ".join(found.notes)
    assert "5 shapes left out" in notes and "1 record without a valid place" in notes
    assert "Tumor 2" in notes and "unclassified 2" in notes and "Region* 1" in notes
    written = json.loads(scored(given, tmp_path / "out.json", [0.9, 0.1]).read_text())["features"]
    assert written[2:] == regions
    assert [f["properties"]["classification"]["name"] for f in written[:2]] == NAMES[::-1]


def test_geojson_children_are_read_and_written_in_their_place(tmp_path):
    """A hierarchy export: cells in properties.childObjects, at any depth."""
    cell = feature(point(30, 40), id="c")
    inner = feature(outline(0, 0, 20, 20), id="b", properties={"childObjects": [cell]})
    points = feature({"type": "MultiPoint", "coordinates": [[1, 2], [3, 4]]}, id="d")
    properties = {"objectType": "annotation", "childObjects": [inner, points]}
    roi = feature(outline(0, 0, 1000, 1000), id="a", properties=properties)
    given = saved(tmp_path / "in.geojson", {"type": "FeatureCollection", "features": [roi]})
    found = formats.read_candidates(given)
    assert sorted(zip(found.x, found.y)) == [(1, 2), (3, 4), (10, 10), (30, 40)]
    probability = [x / 100 for x in found.x]
    out = scored(given, tmp_path / "out.geojson", probability)
    (written,) = json.loads(out.read_text())["features"]
    assert written["id"] == "a" and "classification" not in written["properties"]
    inner, *points = written["properties"]["childObjects"]
    (cell,) = inner["properties"]["childObjects"]
    key = "probability of mitotic figure"
    scores = [one["properties"]["measurements"][key] for one in (inner, cell, *points)]
    assert scores == [0.1, 0.3, 0.01, 0.03]
    assert [one["geometry"]["coordinates"] for one in points] == [[1, 2], [3, 4]]


def test_qupath_measurements_old_and_new(tmp_path):
    """Until 0.3 a list of name and value, since then an object; the class that was there is kept as
    metadata.
    """
    content = [
        feature(
            point(1, 2),
            properties={
                "measurements": [{"name": "area", "value": 3}],
                "classification": {"name": "Tumor", "colorRGB": -1},
            },
        ),
        feature(
            point(1, 2),
            properties={"measurements": {"area": 3}, "classification": "Tumor", "name": "n"},
        ),
        feature(point(1, 2)),
    ]
    out = scored(
        saved(tmp_path / "in.json", content), tmp_path / "out.json", [0.75, 0.25, math.nan]
    )
    old, new, left = json.loads(out.read_text())["features"]
    key = "probability of mitotic figure"
    assert old["properties"]["measurements"] == [
        {"name": "area", "value": 3},
        {"name": key, "value": 0.75},
    ]
    assert (
        new["properties"]["measurements"] == {"area": 3, key: 0.25}
        and new["properties"]["name"] == "n"
    )
    assert all(
        f["properties"]["metadata"] == {"class of the candidate": "Tumor"} for f in (old, new)
    )
    assert left == content[2]


# ---------------------------------------------------------------- SlideRunner


def database(path, classes=("mitotic figure", "hard negative"), deleted=True):
    connection = sqlite3.connect(path)
    connection.executescript(f"""
        CREATE TABLE Slides (uid INTEGER PRIMARY KEY, filename TEXT);
        CREATE TABLE Annotations (uid INTEGER PRIMARY KEY, slide INTEGER, type INTEGER,
                                  agreedClass INTEGER {", deleted INTEGER" if deleted else ""});
        CREATE TABLE Annotations_coordinates (coordinateX REAL, coordinateY REAL, annoId INTEGER);
        CREATE TABLE Classes (uid INTEGER PRIMARY KEY, name TEXT);
        INSERT INTO Slides VALUES (7, 'a.svs');
        INSERT INTO Annotations (uid, slide, type, agreedClass) VALUES (3, 7, 1, 5), (4, 7, 4, 5);
        INSERT INTO Annotations (uid, slide, type, agreedClass) VALUES (5, 7, 2, 6), (6, 7, 3, 6);
        INSERT INTO Annotations_coordinates VALUES (20, 40, 3), (5, 5, 4), (1, 1, 5), (9, 9, 5);""")
    connection.executemany("INSERT INTO Classes VALUES (?, ?)", enumerate(classes, start=5))
    connection.commit()
    return connection


@pytest.mark.parametrize("deleted", [True, False])
def test_sqlite_with_and_without_deletions(deleted, tmp_path):
    connection = database(tmp_path / "in.sqlite", deleted=deleted)
    if deleted:
        connection.execute("UPDATE Annotations SET deleted = 1 WHERE uid = 4")
        connection.commit()
    connection.close()
    found = formats.read_candidates(tmp_path / "in.sqlite")
    assert found.ids == (["3"] if deleted else ["3", "4"]) and (found.x[0], found.y[0]) == (20, 40)
    assert "2 shapes left out" in found.notes[0] and "hard negative 2" in found.notes[0]


def test_sqlite_that_another_program_has_open(tmp_path):
    """What SlideRunner has written and not yet merged (a WAL) is read too, and nothing is written
    beside it.
    """
    connection = database(tmp_path / "in.sqlite")
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute(
        "INSERT INTO Annotations (uid, slide, type, agreedClass) VALUES (8, 7, 1, 5)"
    )
    connection.execute("INSERT INTO Annotations_coordinates VALUES (1, 2, 8)")
    connection.commit()
    assert (tmp_path / "in.sqlite-wal").stat().st_size > 0
    out = scored(tmp_path / "in.sqlite", tmp_path / "out.sqlite", [0.9, 0.1, 0.7])
    rows = (
        sqlite3.connect(out)
        .execute("SELECT annoId, class FROM Predictions ORDER BY annoId")
        .fetchall()
    )
    assert rows == [(3, NAMES[1]), (4, NAMES[0]), (8, NAMES[1])]
    connection.close()


def test_relabel_needs_both_classes_in_the_database(tmp_path):
    database(tmp_path / "in.sqlite", classes=("Mitose", "Eosinophile")).close()
    with pytest.raises(UserError, match="--relabel cannot tell"):
        scored(tmp_path / "in.sqlite", tmp_path / "out.sqlite", [0.9, 0.1], relabel=True)
    assert [path.name for path in tmp_path.iterdir()] == ["in.sqlite"]
    database(tmp_path / "named.sqlite", classes=("Mitosis", "not mitotic figure")).close()
    out = scored(tmp_path / "named.sqlite", tmp_path / "out.sqlite", [0.9, 0.1], relabel=True)
    assert sqlite3.connect(out).execute(
        "SELECT agreedClass FROM Annotations WHERE type IN (1, 4) ORDER BY uid"
    ).fetchall() == [(5,), (6,)]


def test_a_database_without_classes_is_refused_when_it_is_read(tmp_path):
    connection = database(tmp_path / "in.sqlite")
    connection.execute("DROP TABLE Classes")
    connection.commit()
    connection.close()
    with pytest.raises(UserError, match="lacks the table classes"):
        formats.read_candidates(tmp_path / "in.sqlite")


# ---------------------------------------------------------------- the challenge's JSON


def test_challenge_is_in_millimetres(tmp_path):
    content = challenge.content_of([4000.0], [8000.0], [0.75], 0.5, mpp=0.25)
    assert content["points"] == [
        {"name": "mitotic figure", "point": [1.0, 2.0, 0], "probability": 0.75}
    ]
    out = scored(saved(tmp_path / "in.json", content), tmp_path / "out.json", [0.25])
    assert json.loads(out.read_text())["points"][0] == {
        "name": "non-mitotic figure",
        "point": [1.0, 2.0, 0],
        "probability": 0.25,
        "detector_probability": 0.75,
    }


# ---------------------------------------------------------------- what is refused

BOX = {"id": 4, "image_id": 1, "bbox": [1, 2, 3, 4]}
IMAGE = {"id": 1, "file_name": "a"}


@pytest.mark.parametrize(
    "name,content,message",
    [
        ("a.json", "{not json", "a.json"),
        ("a.json", {"type": "other"}, "neither MIDOG's JSON"),
        ("a.json", {"images": [IMAGE], "annotations": [{**BOX, "bbox": [9, 9, 3, 4]}]}, "COCO"),
        ("a.json", {"images": [IMAGE], "annotations": [{**BOX, "bbox": "wrong"}]}, "bbox must be"),
        (
            "a.json",
            {"images": [IMAGE], "annotations": [{**BOX, "image_id": 2}]},
            "not among the images",
        ),
        ("a.json", {"images": [{"id": 1}], "annotations": [BOX]}, "image 1: the image's name"),
        (
            "a.json",
            {"images": [IMAGE], "annotations": [{**BOX, "bbox": [1, 2, 3, math.inf]}]},
            "no position",
        ),
        ("a.json", {"type": "Multiple points", "points": [{"where": [1, 2]}]}, "MIDOG challenge"),
        ("a.geojson", [feature([])], "no geometry"),
        ("a.geojson", [feature([1, 2])], "has no geometry"),
        ("a.geojson", [feature({"type": "MultiPoint", "coordinates": 5})], "no coordinates"),
        ("a.geojson", [feature(point(1, 2), properties="wrong")], "properties are no object"),
        (
            "a.geojson",
            [feature(point(1, 2), properties={"measurements": "wrong"})],
            "measurements are no object",
        ),
        (
            "a.geojson",
            [feature(point(1, 2), properties={"metadata": "wrong"})],
            "metadata are no object",
        ),
        ("a.csv", "filename,x,y\na.png,1,2\n ,3,4\n", "line 3: the image's name is empty"),
        ("a.geojson", [feature(None)], "no geometry"),
        ("a.geojson", [feature(point("x", 2))], "a number is needed"),
        ("a.csv", "a,b\n1,2\n", "columns x and y"),
        ("a.csv", "x,y\n1\n", "line 2: 1 fields"),
        ("a.csv", "x,y\n1,\n", "line 2: y is"),
        ("a.csv", "x,y\nnan,1\n", "line 2: x is nan"),
        ("a.csv", "", "the file is empty"),
        ("a.sqlite", "SQLite format 3\0 and then nothing", "SlideRunner"),
    ],
)
def test_what_is_no_candidate_is_refused_in_one_line(name, content, message, tmp_path):
    with pytest.raises(UserError, match=message) as error:
        formats.read_candidates(saved(tmp_path / name, content))
    assert "\n" not in str(error.value) and str(tmp_path / name) in str(error.value)


def test_an_empty_file_of_candidates_is_one(tmp_path):
    """A detector that found nothing: no error, and the same comes out."""
    empty = {"images": [IMAGE], "annotations": []}
    for name, content in (
        ("a.json", empty),
        ("b.csv", "x,y\n"),
        ("c.geojson", {"type": "FeatureCollection", "features": []}),
    ):
        found = formats.read_candidates(saved(tmp_path / name, content))
        assert len(found) == 0 and len(found.x) == 0
        scored(found.path, tmp_path / f"out-{name}", [])
    assert json.loads((tmp_path / "out-a.json").read_text()) == empty
