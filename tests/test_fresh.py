"""Candidates of one format written in another: each cell at its place, with id, class, score."""

import json
import sqlite3

import numpy as np
import pytest
from onnx_models import classifier, register, write_model
from PIL import Image
from small import call

import classify
from common import UserError
from dataset import formats, slides

NAMES = ["hard negative", "mitotic figure"]
PROBABILITY = np.array([0.9, 0.25, np.nan], np.float32)
POINTS = [(100.0, 120.5), (301.25, 40.0), (7.0, 8.0)]
WRITTEN = {"csv": ".csv", "midog": ".json", "geojson": ".geojson", "imagescope": ".xml"}


@pytest.fixture
def slide(tmp_path):
    Image.new("RGB", (640, 500), "white").save(tmp_path / "a.tiff")
    return tmp_path / "a.tiff"


def candidates(tmp_path, kind):
    """The three points as candidates of a format, with ids and classes where it has them."""
    path = tmp_path / f"in{WRITTEN[kind]}"
    classes = ["hard negative", "mitotic figure", "hard negative"]
    if kind == "csv":
        rows = [
            f"a.tiff,{x},{y},n{i},{c},{0.5 + i}"
            for i, ((x, y), c) in enumerate(zip(POINTS, classes))
        ]
        path.write_text("\n".join(["filename,x,y,id,label,score", *rows]))
    elif kind == "midog":
        records = [
            {"id": 7 + i, "image_id": 1, "bbox": [x - 25, y - 25, x + 25, y + 25], "category_id": c}
            | {"score": 0.5 + i}
            for i, ((x, y), c) in enumerate(zip(POINTS, (2, 1, 2)))
        ]
        names = [{"id": 1, "name": "mitotic figure"}, {"id": 2, "name": "hard negative"}]
        images = [{"id": 1, "file_name": "a.tiff"}]
        path.write_text(json.dumps({"images": images, "annotations": records, "categories": names}))
    elif kind == "geojson":
        features = [
            {
                "type": "Feature",
                "geometry": {"type": "Point", "coordinates": [x, y]},
                "properties": {"classification": {"name": c}},
            }
            for (x, y), c in zip(POINTS, classes)
        ]
        path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    else:
        regions = "".join(
            f'<Region Type="5" Text="{c}"><Vertices><Vertex X="{x}" Y="{y}"/></Vertices></Region>'
            for (x, y), c in zip(POINTS, classes)
        )
        path.write_text(
            f"<Annotations><Annotation><Regions>{regions}</Regions></Annotation></Annotations>"
        )
    return formats.read_candidates(path)


def scores_in(path, kind):
    """[(probability, class) or None] as a file says by itself."""
    if kind == "csv":
        header, *rows = [line.split(",") for line in path.read_text().splitlines()]
        columns = header.index("probability"), header.index("class")
        return [(float(r[columns[0]]), r[columns[1]]) if r[columns[0]] else None for r in rows]
    if kind == "midog":
        records = json.loads(path.read_text())["annotations"]
        return [(r["probability"], r["class"]) if "class" in r else None for r in records]
    if kind == "geojson":
        result = []
        for feature in json.loads(path.read_text())["features"]:
            properties = feature["properties"]
            measured = properties.get("measurements", {}).get("probability of mitotic figure")
            name = properties["classification"]["name"]
            result.append(None if measured is None else (measured, name))
        return result
    found = []
    for region in path.read_text().split("<Region ")[1:]:
        values = [part.split('"')[0] for part in region.split('Value="')[1:]]
        found.append((float(values[-2]), values[-1]) if len(values) >= 2 else None)
    return found


@pytest.mark.parametrize("target", WRITTEN)
@pytest.mark.parametrize("source", WRITTEN)
def test_every_format_becomes_every_other(source, target, slide, tmp_path):
    given = candidates(tmp_path, source)
    out = tmp_path / f"out{WRITTEN[target]}"
    images, scales = [slide] * 3, {slide: 0.25}
    assert formats.check_write(given, out, images, scales) == []
    left = formats.write(given, out, PROBABILITY, 0.5, NAMES, images=images, scales=scales)
    assert left == 0
    expected = [(float(PROBABILITY[0]), NAMES[1]), (0.25, NAMES[0]), None]
    assert scores_in(out, target) == expected
    again = formats.read_candidates(out)
    assert again.format == target
    assert np.array_equal(np.stack([again.x, again.y], 1), POINTS)
    if target in ("csv", "midog"):
        assert again.images == ["a.tiff"] * 3
    if target in ("csv", "midog", "imagescope"):  # GeoJSON shows the new class, as always
        own = [again.category_name(category) for category in again.categories]
        assert own == ["hard negative", "mitotic figure", "hard negative"]
    if source in ("csv", "midog") and target in ("csv", "midog"):
        assert [float(score) for score in again.scores] == [0.5, 1.5, 2.5]
    ids = {"csv": ["n0", "n1", "n2"], "midog": ["7", "8", "9"]}
    if source in ids and target in ids:
        assert again.given_ids == ids[source]


@pytest.mark.parametrize("target", ["csv", "midog", "imagescope"])
def test_relabel_replaces_the_class(target, slide, tmp_path):
    given = candidates(tmp_path, "geojson")
    out = tmp_path / f"out{WRITTEN[target]}"
    more = {"images": [slide] * 3, "scales": {slide: 0.25}}
    formats.write(given, out, PROBABILITY, 0.5, NAMES, relabel=True, **more)
    again = formats.read_candidates(out)
    own = [again.category_name(category) for category in again.categories]
    assert own == ["mitotic figure", "hard negative", "hard negative"]  # the last has no score


def test_candidates_without_classes_get_the_new_ones(slide, tmp_path):
    (tmp_path / "c.csv").write_text("x,y\n1,2\n30,40\n5,6\n")
    given = formats.read_candidates(tmp_path / "c.csv")
    out, more = tmp_path / "o.json", {"images": [slide] * 3, "scales": {slide: 0.25}}
    formats.write(given, out, PROBABILITY, 0.5, NAMES, **more)
    content = json.loads(out.read_text())
    assert content["categories"] == [
        {"id": 1, "name": "mitotic figure"},
        {"id": 2, "name": "hard negative"},
    ]
    assert [r.get("category_id") for r in content["annotations"]] == [1, 2, None]
    assert content["images"] == [
        {"id": 1, "file_name": "a.tiff", "width": 640, "height": 500, "mpp": 0.25}
    ]
    assert formats.read_candidates(out).x.tolist() == [1, 30, 5]


def test_millimetres_and_back(slide, tmp_path):
    given = candidates(tmp_path, "csv")
    out, more = tmp_path / "o.json", {"images": [slide] * 3, "scales": {slide: 0.5}}
    assert formats.write(given, out, PROBABILITY, 0.5, NAMES, kind="challenge", **more) == 1
    points = json.loads(out.read_text())["points"]
    assert points[0]["point"] == [pytest.approx(0.05), pytest.approx(0.06025), 0]
    assert [p["name"] for p in points] == ["mitotic figure", "non-mitotic figure"]
    assert [p["detector_probability"] for p in points] == [0.5, 1.5]
    given = formats.read_candidates(out)
    back, more = tmp_path / "back.csv", {"images": [slide] * 2, "scales": {slide: 0.5}}
    formats.write(given, back, PROBABILITY[:2], 0.5, NAMES, **more)
    again = formats.read_candidates(back)
    assert np.allclose(np.stack([again.x, again.y], 1), POINTS[:2], atol=1e-9)
    with pytest.raises(UserError, match="µm/px of .* is unknown; give --mpp"):
        formats.check_write(again, out, [slide] * 2, {slide: None}, kind="challenge")


def test_qupaths_origin_is_that_of_the_scanned_area(slide, tmp_path, monkeypatch):
    monkeypatch.setattr(slides, "bounds_offset", lambda image: (90, 5))
    given = candidates(tmp_path, "csv")
    more = {"images": [slide] * 3, "scales": {slide: 0.25}}
    formats.write(given, tmp_path / "o.geojson", PROBABILITY, 0.5, NAMES, **more)
    again = formats.read_candidates(tmp_path / "o.geojson")
    assert again.x[0] == 10 and again.y[0] == 115.5
    formats.move_to_level0(again, [slide] * 3, print)
    assert again.x[0] == 100 and again.y[0] == 120.5
    formats.write(again, tmp_path / "o.csv", PROBABILITY, 0.5, NAMES, **more)
    assert formats.read_candidates(tmp_path / "o.csv").x.tolist() == [x for x, _ in POINTS]


def test_what_a_format_cannot_hold_is_an_error(slide, tmp_path):
    given = candidates(tmp_path, "csv")
    images = [slide, slide, tmp_path / "b.tiff"]
    for name in ("o.geojson", "o.xml"):
        with pytest.raises(UserError, match="the candidates of one image"):
            formats.check_write(given, tmp_path / name, images, {})
    with pytest.raises(UserError, match="a SlideRunner database is written from"):
        formats.check_write(given, tmp_path / "o.sqlite", [slide] * 3, {})
    notes = formats.check_write(given, tmp_path / "o.geojson", [slide, slide, None], {})
    assert notes and "1 candidate on other images will not be in" in notes[0]
    left = formats.write(
        given,
        tmp_path / "o.geojson",
        PROBABILITY,
        0.5,
        NAMES,
        images=[slide, slide, None],
        scales={},
    )
    assert left == 1 and len(formats.read_candidates(tmp_path / "o.geojson")) == 2
    # A table keeps them all.
    assert formats.check_write(given, tmp_path / "o.json", [slide, slide, None], {}) == []


def test_the_suffix_chooses_and_says_nothing_where_it_is_ambiguous(tmp_path):
    table, points = candidates(tmp_path, "csv"), candidates(tmp_path, "geojson")
    assert formats.kind_of(table, "o.csv.gz") == formats.kind_of(table, "o.dat") == "csv"
    assert formats.kind_of(table, "O.JSON") == formats.kind_of(points, "o.json") == "midog"
    assert formats.kind_of(table, "o.json", "challenge") == "challenge"
    (tmp_path / "in.geojson").rename(tmp_path / "in.json")
    renamed = formats.read_candidates(tmp_path / "in.json")
    assert renamed.format == formats.kind_of(renamed, "o.json") == "geojson"


def test_a_database_becomes_a_table(slide, tmp_path):
    with sqlite3.connect(tmp_path / "d.sqlite") as database:
        database.executescript("""
            CREATE TABLE Slides (uid INTEGER PRIMARY KEY, filename TEXT);
            CREATE TABLE Annotations (uid INTEGER PRIMARY KEY, slide INTEGER, type INTEGER,
                agreedClass INTEGER);
            CREATE TABLE Annotations_coordinates (uid INTEGER PRIMARY KEY, coordinateX REAL,
                coordinateY REAL, annoId INTEGER);
            CREATE TABLE Classes (uid INTEGER PRIMARY KEY, name TEXT);
            INSERT INTO Classes VALUES (1, 'mitotic figure');
            INSERT INTO Slides VALUES (1, 'a.tiff');
            INSERT INTO Annotations VALUES (5, 1, 1, 1);
            INSERT INTO Annotations_coordinates VALUES (9, 30, 40, 5)""")
    given = formats.read_candidates(tmp_path / "d.sqlite")
    out = tmp_path / "o.csv"
    formats.write(given, out, np.array([0.75]), 0.5, NAMES, images=[slide], scales={slide: None})
    assert out.read_text() == (
        "filename,x,y,id,label,probability,class\n"
        "a.tiff,30.0,40.0,5,mitotic figure,0.75,mitotic figure\n"
    )


def test_the_command_says_what_the_file_does_not_hold(slide, tmp_path, capsys, monkeypatch):
    """Of candidates on two images, a GeoJSON holds those of the slide; a table holds all."""
    monkeypatch.chdir(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        register(patch)
        write_model(tmp_path / "model.onnx", classifier("gelu"))
    rows = ["filename,x,y", "a.tiff,300,300", "b.tiff,9,9", "a.tiff,400,200"]
    (tmp_path / "c.csv").write_text("\n".join(rows))
    usual = ("model.onnx", "--slide", slide, "--candidates", "c.csv", "--device", "cpu", "--mpp")
    assert call(classify, *usual, 0.25, "--out", "o.geojson") == 0
    said = capsys.readouterr()
    assert "1 candidate on other images will not be in o.geojson" in said.err
    assert "1 candidates are not in the file" in said.out and "left as they were" not in said.out
    assert len(formats.read_candidates("o.geojson")) == 2
    assert call(classify, *usual, 0.25, "--out", "o.json") == 0
    assert "1 candidates lie on other images and are left as they were" in capsys.readouterr().out
    assert len(formats.read_candidates("o.json")) == 3
    for flags, text in (
        (("--out", "o.sqlite"), "a SlideRunner database is written from"),
        (("--out", "o.csv", "--format", "sqlite"), "a SlideRunner database is written from"),
    ):
        assert call(classify, *usual, 0.25, *flags) == 2
        assert text in capsys.readouterr().err
    assert not list(tmp_path.glob("o.[cs]*"))
