"""What a cell is, and where, in every annotation format: read for training and for candidates."""

import codecs
import csv
import gzip
import io
import json
import os
import sqlite3
import unicodedata
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image
from test_data import places, sliderunner

import data
from common import UserError
from dataset import formats, slides

REAL = Path(os.environ.get("MITOSIS_REALDATA") or "/nowhere") / "annotations"
NAMES = ["hard negative", "mitotic figure"]
# x, y, label of the cells on 001.tiff, in every format.
CELLS = [(100.0, 200.0, 1), (350.5, 40.0, 0), (77.0, 801.5, 1), (512.0, 512.0, 0)]
QUPATH = {1: "Mitosis", 0: "Non-mitotic"}


def box(x, y, side=50):
    return [x - side / 2, y - side / 2, x + side / 2, y + side / 2]


# ---------------------------------------------------------------- the same cells in every format


def midog(cells=CELLS, category=lambda label: 2 - label, **rest):
    annotations = []
    for i, (x, y, label) in enumerate(cells):
        annotations.append(
            {"id": i, "image_id": 1, "category_id": category(label), "bbox": box(x, y)}
        )
    return {
        "images": [{"id": 1, "file_name": "001.tiff", "width": 1000, "height": 1000}],
        "categories": [{"id": 1, "name": NAMES[1]}, {"id": 2, "name": NAMES[0]}],
        "annotations": annotations,
        **rest,
    }


def coco():
    """Boxes as [x, y, width, height], which `area` gives away; small x and y look like corners."""
    content = midog()
    for record, (x, y, _) in zip(content["annotations"], CELLS):
        record.update(bbox=[x - 25, y - 25, 50, 50], area=2500.0)
    return content


def outline(x, y, side=50):
    left, top, right, bottom = box(x, y, side)
    ring = [[left, top], [right, top], [right, bottom], [left, bottom], [left, top]]
    return {"type": "Polygon", "coordinates": [ring]}


def feature(geometry, name=None, children=None, **properties):
    if name is not None:
        properties["classification"] = {"name": name}
    if children is not None:
        properties["childObjects"] = children
    return {"type": "Feature", "geometry": geometry, "properties": properties}


def cell_features():
    features = []
    for i, (x, y, label) in enumerate(CELLS):
        geometry = {"type": "Point", "coordinates": [x, y]} if i % 2 else outline(x, y)
        features.append(feature(geometry, QUPATH[label]))
    return features


def geojson(features=None):
    return {"type": "FeatureCollection", "features": features or cell_features()}


def hierarchy():
    inner = feature(outline(200, 200, 400), "ROI", cell_features()[1:])
    outer = feature(outline(500, 500, 1000), "Tumor", [inner, cell_features()[0]])
    return geojson([outer])


def table(delimiter=",", header="filename,x,y,label", row="001.tiff,{x},{y},{label}", head=""):
    lines = [head + header.replace(",", delimiter)]
    for x, y, label in CELLS:
        lines.append(row.replace(",", delimiter).format(x=x, y=y, label=label, name=NAMES[label]))
    return "\n".join(lines) + "\n"


def boxes_table(header, row):
    lines = [header]
    for x, y, label in CELLS:
        left, top, right, bottom = box(x, y)
        values = {"left": left, "top": top, "right": right, "bottom": bottom, "label": label}
        lines.append(row.format(**values))
    return "\n".join(lines) + "\n"


def imagescope(layers=False):
    """Regions named by their text, or by their layer."""
    root = ElementTree.Element("Annotations", MicronsPerPixel="0.25")
    for wanted in (1, 0):
        name = QUPATH[wanted] if layers else ""
        layer = ElementTree.SubElement(root, "Annotation", Id=str(wanted), Name=name)
        regions = ElementTree.SubElement(layer, "Regions")
        for x, y, label in CELLS:
            if label != wanted:
                continue
            text = "" if layers else QUPATH[label]
            region = ElementTree.SubElement(regions, "Region", Type="2", Text=text)
            vertices = ElementTree.SubElement(region, "Vertices")
            left, top, right, bottom = box(x, y)
            for vx, vy in ((left, top), (right, bottom)):
                ElementTree.SubElement(vertices, "Vertex", X=str(vx), Y=str(vy))
    return ElementTree.tostring(root, encoding="unicode")


def german(x):
    return str(x).replace(".", ",")


GERMAN = "filename;x;y;label\n" + "".join(
    f"001.tiff;{german(x)};{german(y)};{label}\n" for x, y, label in CELLS
)
FILES = {  # file name → content: text, JSON, or bytes
    "midog.json": midog(),
    "coco.json": coco(),
    "bom.json": codecs.BOM_UTF8 + json.dumps(midog()).encode(),
    "utf16.json": json.dumps(midog()).encode("utf-16"),
    "packed.json.gz": gzip.compress(json.dumps(midog()).encode()),
    "windows.json": json.loads(json.dumps(midog()).replace("001.tiff", r"D:\\slides\\001.tiff")),
    "unc.json": json.loads(json.dumps(midog()).replace("001.tiff", r"\\\\srv\\slides\\001.tiff")),
    "001.geojson": geojson(),
    "hierarchy/001.geojson": hierarchy(),
    "list/001.geojson": cell_features(),
    "utf16/001.geojson": json.dumps(geojson()).encode("utf-16"),
    "packed/001.geojson.gz": gzip.compress(json.dumps(geojson()).encode()),
    "points.csv": table(),
    "words.csv": table(row="001.tiff,{x},{y},{name}"),
    "semicolon.csv": table(";"),
    "tab.tsv": table("\t"),
    "sep.csv": table(";", head="sep=;\n"),
    "german.csv": codecs.BOM_UTF8 + GERMAN.encode(),
    "utf16.csv": table("\t").encode("utf-16"),
    "packed.csv.gz": gzip.compress(table().encode()),
    "windows1252.csv": table(
        header="filename,x,y,label,note", row="001.tiff,{x},{y},{label},geprüft"
    ).encode("cp1252"),
    "commas.csv": table(
        header="filename;x;y;label;one, two, three, four", row="001.tiff;{x};{y};{label};ok"
    ),
    "size.csv": boxes_table(
        "image_name,x,y,width,height,label", "001.tiff,{left},{top},50,50,{label}"
    ),
    "corners.csv": boxes_table(
        "file,xmin,ymin,xmax,ymax,class", "001.tiff,{left},{top},{right},{bottom},{label}"
    ),
    "named.csv": table(header="Image Name,Centroid X px,Centroid Y px,Class"),
    "paths.csv": table(row=r"C:\data\slides\001.tiff,{x},{y},{label}"),
    "xml/001.xml": imagescope(),
    "layers/001.xml": imagescope(layers=True),
    "utf16/001.xml": imagescope().encode("utf-16"),
    "packed/001.xml.gz": gzip.compress(imagescope().encode()),
}


def saved(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, (dict, list)):
        content = json.dumps(content)
    if isinstance(content, str):
        content = content.encode()
    path.write_bytes(content)
    return path


def written_database(path):
    rows = [("001.tiff", x, y, 1 if label else 2) for x, y, label in CELLS]
    sliderunner(path, rows, [(1, "Mitosis"), (2, "Nonmitosis")]).close()
    return path


@pytest.mark.parametrize("name", [*FILES, "spots.sqlite"])
def test_training_and_candidates_find_the_same_cells_at_the_same_places(name, tmp_path):
    path = tmp_path / name
    if name == "spots.sqlite":
        written_database(path)
    else:
        saved(path, FILES[name])
    annotations = data.load_dataset(path)
    expected = sorted((x, y, label) for x, y, label in CELLS)
    found = zip(annotations.x.tolist(), annotations.y.tolist(), annotations.label.tolist())
    assert sorted(found) == expected
    assert {Path(image).stem for image in annotations.image.tolist()} == {"001"}
    candidates = formats.read_candidates(path)
    assert sorted(zip(candidates.x, candidates.y)) == [(x, y) for x, y, _ in expected]
    assert {image and image.replace("\\", "/").rsplit("/")[-1] for image in candidates.images} <= {
        "001.tiff",
        None,
    }
    # Scores are written back in the same format, at the same cells.
    out = path.with_name("out-" + path.name)
    probability = np.array([0.9 if x < 300 else 0.2 for x in candidates.x])
    formats.write(candidates, out, probability, 0.5, NAMES)
    again = formats.read_candidates(out)
    assert again.x.tolist() == candidates.x.tolist() and again.images == candidates.images


@pytest.mark.skipif(not REAL.is_dir(), reason="MITOSIS_REALDATA is not set")
@pytest.mark.parametrize(
    "path",
    [path for path in sorted(REAL.rglob("*")) if path.is_file()],
    ids=lambda path: path.name,
)
def test_real_files_hold_the_same_cells_for_training_and_for_candidates(path):
    """Each is read by both or refused in one line by both readings alike."""
    try:
        table = formats.read(path)
    except UserError as error:
        table = None
        assert "\n" not in str(error)
    try:
        candidates = formats.read_candidates(path)
    except UserError as error:
        assert "\n" not in str(error)
        assert table is None or table.kind == "patches"
        return
    if table is None:
        return
    places_of = {}
    for image, x, y in zip(candidates.images, candidates.x.tolist(), candidates.y.tolist()):
        places_of[image, x, y] = places_of.get((image, x, y), 0) + 1
    for place in zip(table.images, table.x, table.y):
        places_of[place] -= 1  # KeyError: a cell that only training finds
        assert places_of[place] >= 0
    assert len(candidates) >= len(table) > 0


# ---------------------------------------------------------------- what is no cell


def test_regions_of_midog_json_are_no_cells_in_either_reading(tmp_path):
    content = midog()
    content["categories"].append({"id": 3, "name": "tumour"})
    content["categories"].append({"id": 4, "name": "tumour region"})
    for category, side in ((3, 900), (3, 400), (3, 60), (4, 60), (1, 500)):
        record = {"image_id": 1, "category_id": category, "bbox": box(500, 500, side)}
        content["annotations"].append(record)
    path = saved(tmp_path / "a.json", content)
    assert len(data.load_dataset(path)) == len(formats.read_candidates(path)) == len(CELLS)
    note = " ".join(formats.read_candidates(path).notes)
    assert "5 shapes left out" in note and "tumour 3" in note and "tumour region 1" in note
    scored = formats.read_candidates(path)
    formats.write(scored, tmp_path / "out.json", np.full(4, 0.9), 0.5, NAMES)
    written = json.loads((tmp_path / "out.json").read_text())["annotations"]
    assert written[4:] == content["annotations"][4:]
    assert all(record["probability"] == 0.9 for record in written[:4])


def test_boxes_larger_than_a_cell_are_named_if_nothing_else_is_left(tmp_path):
    header = "filename,x,y,width,height,label"  # the size of the image, not of a box
    path = saved(tmp_path / "a.csv", table(header=header, row="001.tiff,{x},{y},2000,1000,{label}"))
    with pytest.raises(UserError, match="more than 256 px count as regions"):
        data.load_dataset(path)


@pytest.mark.parametrize(
    "geometry",
    [
        None,
        {"type": "Point", "coordinates": [float("nan"), 3]},
        {"type": "Point"},
        {"type": "Polygon", "coordinates": []},
        {"type": "Polygon", "coordinates": [[["a", 1]]]},
        {"type": "LineString", "coordinates": [[0, 0], [1, 1]]},
        {"type": "MultiPolygon", "coordinates": 7},
        {"type": "Circle", "coordinates": [1, 2]},
        {"type": "GeometryCollection", "geometries": []},
    ],
)
def test_a_feature_that_nobody_asked_for_stops_no_file(geometry, tmp_path):
    path = saved(tmp_path / "001.geojson", geojson([feature(geometry, "Tumor"), *cell_features()]))
    assert len(data.load_dataset(path)) == len(formats.read_candidates(path)) == len(CELLS)
    assert "Tumor 1" in " ".join(data.load_dataset(path).notes)
    assert "Tumor 1" in " ".join(formats.read_candidates(path).notes)
    if geometry and "type" in geometry and geometry["type"] in ("Point", "Polygon", "Circle"):
        path = saved(path, geojson([feature(geometry, "Mitosis"), *cell_features()]))
        for read in (data.load_dataset, formats.read_candidates):
            with pytest.raises(UserError, match="feature 1: "):
                read(path)


def test_nan_matters_in_coordinates_alone(tmp_path):
    features = cell_features()
    features[0]["properties"]["measurements"] = {"Nucleus: Area": float("nan")}
    path = saved(tmp_path / "001.geojson", geojson(features))
    assert len(data.load_dataset(path)) == len(CELLS)
    formats.write(
        formats.read_candidates(path), tmp_path / "out.geojson", np.full(4, 0.1), 0.5, NAMES
    )
    written = json.loads((tmp_path / "out.geojson").read_text())["features"][0]
    assert np.isnan(written["properties"]["measurements"]["Nucleus: Area"])


def test_derived_classes_are_named_in_the_note(tmp_path):
    derived = feature(outline(300, 300))
    derived["properties"]["classification"] = {"names": ["Tumor", "Mitosis"]}
    path = saved(tmp_path / "001.geojson", geojson([*cell_features(), derived]))
    a = data.load_dataset(path)
    assert len(a) == len(CELLS)
    assert "1 annotation of other classes left out (Tumor: Mitosis 1)" in a.notes
    classes = {"mitotic": ["Mitosis", "Tumor: Mitosis"], "other": ["Non-mitotic"]}
    assert data.load_dataset(path, classes=classes).label.sum() == 3


def test_shapes_of_imagescope(tmp_path):
    """Points and outlines are cells; rulers, arrows, negative and large regions are not."""
    root = ElementTree.fromstring(imagescope())
    regions = root.find("Annotation/Regions")
    for kind, vertices, more in (
        ("0", [(10, 10), (30, 10), (20, 40)], {}),
        ("5", [(600, 700)], {}),
        ("3", [(1, 1), (5, 5)], {}),
        ("4", [(1, 1), (5, 5)], {}),
        ("1", [(0, 0), (900, 900)], {}),
        ("1", [(0, 0), (50, 50)], {"NegativeROA": "1"}),
    ):
        region = ElementTree.SubElement(regions, "Region", Type=kind, Text="Mitosis", **more)
        box = ElementTree.SubElement(region, "Vertices")
        for x, y in vertices:
            ElementTree.SubElement(box, "Vertex", X=str(x), Y=str(y))
    path = saved(tmp_path / "001.xml", ElementTree.tostring(root, encoding="unicode"))
    a = data.load_dataset(path)
    assert {(20.0, 25.0), (600.0, 700.0)} <= set(zip(a.x.tolist(), a.y.tolist()))
    assert len(a) == len(formats.read_candidates(path)) == len(CELLS) + 2
    assert "4 shapes left out: regions or lines, not cells (Mitosis 4)" in a.notes


def test_imagescope_keeps_what_it_does_not_score(tmp_path):
    path = saved(tmp_path / "001.xml", imagescope())
    candidates = formats.read_candidates(path)
    probability = np.array([0.9, 0.2, np.nan, 0.7])
    out = tmp_path / "out.xml"
    formats.write(candidates, out, probability, 0.5, NAMES, relabel=True)
    before = list(ElementTree.parse(path).getroot().iter("Region"))
    after = list(ElementTree.parse(out).getroot().iter("Region"))
    assert [region.get("Text") for region in after] == [
        "Mitosis",
        "Non-mitotic",
        "Non-mitotic",
        "Mitosis",
    ]
    assert ElementTree.tostring(after[2]) == ElementTree.tostring(before[2])
    attributes = {a.get("Name"): a.get("Value") for a in after[0].iter("Attribute")}
    assert attributes == {"probability": "0.9", "class": "mitotic figure"}


@pytest.mark.parametrize(
    "content, says",
    [
        ("<Annotations>", "not a readable XML"),
        ("<ASAP_Annotations/>", "not an ImageScope file"),
        ('<!DOCTYPE a [<!ENTITY b "c">]><Annotations/>', "document type"),
        ("<Annotations/>", "no region has"),
        (imagescope().replace('X="', 'X="a'), "a number is needed"),
        (imagescope().replace('X="', 'Y2="'), "a number is needed"),
        (imagescope().replace("Vertex", "Other"), "has no vertices"),
        (b'<?xml version="1.0" encoding="klingon"?><Annotations a="\xff"/>', "not a readable XML"),
    ],
)
def test_broken_xml_ends_in_one_line(content, says, tmp_path):
    with pytest.raises(UserError, match=says) as error:
        data.load_dataset(saved(tmp_path / "001.xml", content))
    assert "\n" not in str(error.value)


def test_xml_in_the_encoding_that_it_states(tmp_path):
    text = '<?xml version="1.0" encoding="ISO-8859-1"?>' + imagescope().replace("Mitosis", "Mitosé")
    path = saved(tmp_path / "001.xml", text.encode("latin-1"))
    a = data.load_dataset(path, classes={"mitotic": ["Mitosé"], "other": ["Non-mitotic"]})
    assert len(a) == len(CELLS)


# ---------------------------------------------------------------- QuPath's bounds


def test_qupath_coordinates_are_relative_to_the_bounds_of_the_slide(tmp_path, monkeypatch):
    """Added on reading, in both readings; the file that is written has the geometry as it was."""
    Image.new("RGB", (64, 64)).save(tmp_path / "001.tiff")
    path = saved(tmp_path / "001.geojson", geojson())
    other = saved(tmp_path / "a.csv", table())
    monkeypatch.setattr(slides, "bounds_offset", lambda image: (3000, 2000))
    a = data.load_dataset(path)
    expected = sorted((x + 3000, y + 2000, label) for x, y, label in CELLS)
    assert sorted(zip(a.x.tolist(), a.y.tolist(), a.label.tolist())) == expected
    assert sum("by 3000, 2000 px" in note for note in a.notes) == 1
    assert data.load_dataset(other).x.max() < 1000  # no other format counts from there
    candidates, said = formats.read_candidates(path), []
    formats.move_to_level0(candidates, [tmp_path / "001.tiff"] * 4, said.append)
    assert sorted(zip(candidates.x, candidates.y)) == [(x, y) for x, y, _ in expected]
    assert len(said) == 1 and "as QuPath" in said[0]
    formats.write(candidates, tmp_path / "out.geojson", np.full(4, 0.9), 0.5, NAMES)
    written = json.loads((tmp_path / "out.geojson").read_text())["features"]
    assert [f["geometry"] for f in written] == [f["geometry"] for f in geojson()["features"]]


# ---------------------------------------------------------------- classes, and --relabel

SCORES = np.array([0.9, 0.1, 0.2, 0.8])  # 1, 0, 0, 1


@pytest.mark.parametrize(
    "names, expected",
    [
        ({1: "hard negative", 2: "mitotic figure"}, [2, 1, 1, 2]),
        ({0: "mitotic figure", 1: "hard negative"}, [0, 1, 1, 0]),
        ({1: "Mitosis", 2: "Look-alike", 7: "tumour region"}, [1, 2, 2, 1]),
        ({"5": "Mitotic_Figure", 2: "imposter"}, ["5", 2, 2, "5"]),
        ({1: "a", 2: "b"}, None),
        ({1: "mitotic figure", 2: "imposter", 3: "non-mitotic"}, None),
        ({}, None),
    ],
)
def test_relabel_writes_the_files_own_categories(names, expected, tmp_path):
    content = midog(category=lambda label: 1)
    content["categories"] = [{"id": number, "name": name} for number, name in names.items()]
    candidates = formats.read_candidates(saved(tmp_path / "a.json", content))
    out = tmp_path / "out.json"
    if expected is None:
        with pytest.raises(UserError, match="--relabel cannot tell"):
            formats.write(candidates, out, SCORES, 0.5, NAMES, relabel=True)
        assert not out.exists()
        return
    formats.write(candidates, out, SCORES, 0.5, NAMES, relabel=True)
    records = json.loads(out.read_text())["annotations"]
    assert [record["category_id"] for record in records] == expected
    assert [record["class"] for record in records] == [NAMES[int(p >= 0.5)] for p in SCORES]


@pytest.mark.parametrize(
    "labels, expected",
    [
        ("0101", "1001"),
        (["1.0", "0.0", "0.0", "1.0"], ["1.0", "0.0", "0.0", "1.0"]),
        (["", "", "", ""], "1001"),
        (["True", "False"] * 2, ["True", "False", "False", "True"]),
        (["MF", "imposter"] * 2, ["MF", "imposter", "imposter", "MF"]),
        ("1212", None),
        (["MF"] * 4, None),
        (["MF", "NMF"] * 2, None),
    ],
)
def test_relabel_of_a_csv_keeps_its_vocabulary(labels, expected, tmp_path):
    lines = ["x,y,label", *(f"{100 * i + 5},7,{label}" for i, label in enumerate(labels))]
    candidates = formats.read_candidates(saved(tmp_path / "a.csv", "\n".join(lines)))
    out = tmp_path / "out.csv"
    if expected is None:
        with pytest.raises(UserError, match="--relabel cannot tell"):
            formats.write(candidates, out, SCORES, 0.5, NAMES, relabel=True)
        return
    formats.write(candidates, out, SCORES, 0.5, NAMES, relabel=True)
    rows = list(csv.DictReader(io.StringIO(out.read_text())))
    assert [row["label"] for row in rows] == list(expected)
    formats.write(candidates, out, SCORES, 0.5, NAMES)
    rows = list(csv.DictReader(io.StringIO(out.read_text())))
    assert [row["label"] for row in rows] == list(labels)


def test_relabel_by_the_names_of_the_model(tmp_path):
    content = midog(category=lambda label: 1)
    content["categories"] = [{"id": 4, "name": "Normal"}, {"id": 5, "name": "atypical"}]
    candidates = formats.read_candidates(saved(tmp_path / "a.json", content))
    assert formats.own_classes(candidates, ["Normal", "Atypical"]) == ["4", "5"]
    with pytest.raises(UserError, match="--relabel cannot tell"):
        formats.own_classes(candidates, NAMES)


@pytest.mark.parametrize("labels", [["MF", "NMF"], ["NMF", "imposter"], ["MF", "NMF", "imposter"]])
def test_nmf_is_asked_for(labels, tmp_path):
    """The non-mitotic figure of some is the normal mitotic figure of MIDOG 2025."""
    lines = ["filename,x,y,label"]
    lines += [f"a.tiff,{50 * i + 3},9,{label}" for i, label in enumerate(labels)]
    path = saved(tmp_path / "a.csv", "\n".join(lines))
    with pytest.raises(UserError, match="NMF is the non-mitotic figure of some"):
        data.load_dataset(path)
    content = midog(category=lambda label: 1)
    content["categories"] = [{"id": i + 1, "name": name} for i, name in enumerate(labels)]
    with pytest.raises(UserError, match="NMF is the non-mitotic figure of some"):
        data.load_dataset(saved(tmp_path / "a.json", content))
    classes = {"mitotic": [labels[0]], "other": [labels[1]]}
    assert data.load_dataset(path, classes=classes).label.tolist() == [1, 0]


# ---------------------------------------------------------------- CSV


@pytest.mark.parametrize(
    "header, row, says",
    [
        ("filename,x,y,w,h,label", "001.tiff,0.36,0.64,0.05,0.05,{label}", "between 0 and 1"),
        ("filename,Centroid X µm,y,label", "001.tiff,{x},{y},{label}", "no column for x"),
        ("filename,row,col,label", "001.tiff,{y},{x},{label}", "no column for x, y"),
        ("001.tiff,5,7,1", "001.tiff,{x},{y},{label}", "no column for"),
        ("# exported by me", "001.tiff,{x},{y},{label}", "no column for"),
        ("scan,x,y,label", "001.tiff,{x},{y},{label}", "scan seems to name the images"),
        ("remark,x,y,label", "001.tiff,{x},{y},{label}", "remark seems to name the images"),
        ("slide no,x,y,label", "S 7,{x},{y},{label}", "slide no seems to name the images"),
        ("filename,x,y,width,height,label", "001.tiff,{x},{y},-5,50,{label}", "negative size"),
    ],
)
def test_tables_that_are_not_understood_are_refused_in_both_readings(header, row, says, tmp_path):
    path = saved(tmp_path / "a.csv", table(header=header, row=row))
    for read in (data.load_dataset, formats.read_candidates):
        with pytest.raises(UserError, match=says) as error:
            read(path)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("unit", ["µm", "μm", "um", "microns", "mm"])
def test_columns_in_microns_are_refused(unit, tmp_path):
    header = f"filename,Centroid X {unit},Centroid Y {unit},label"
    path = saved(tmp_path / "a.csv", table(header=header))
    columns = {"x": f"Centroid X {unit}", "y": f"Centroid Y {unit}"}
    with pytest.raises(UserError, match="is in µm or mm"):
        data.load_dataset(path, columns=columns)


@pytest.mark.parametrize(
    "values, read",
    [
        (["1.369", "1.654"], False),
        (["369", "1.654"], False),
        (["1,369", "12,654"], False),
        (["1.234.369", "999"], False),
        (["1.369", "1.65"], True),
        (["0.369", "1.654"], True),
        (["369.5", "12,5"], True),
    ],
)
def test_separators_of_thousands_are_not_taken_for_decimal_points(values, read, tmp_path):
    lines = ["filename;x;y;label", *(f"a.png;{v};{v};{i % 2}" for i, v in enumerate(values))]
    path = saved(tmp_path / "a.csv", "\n".join(lines))
    if read:
        expected = [float(value.replace(",", ".")) for value in values]
        assert sorted(data.load_dataset(path).x.tolist()) == sorted(expected)
        return
    for reading in (data.load_dataset, formats.read_candidates):
        with pytest.raises(UserError, match="thousands separator"):
            reading(path)


IMAGE_COLUMNS = "filename file_name Image image_name img file file_path path slide slide_name wsi"


@pytest.mark.parametrize("column", [*IMAGE_COLUMNS.split(), "Slide-ID"])
def test_the_column_of_the_image_is_one_list_for_both_readings(column, tmp_path):
    """Candidates on another image are not read from the slide at hand."""
    path = saved(tmp_path / "a.csv", f"{column},x,y\nA01.tiff,30,40\nB01.tiff,50,60\n")
    assert formats.read_candidates(path).images == ["A01.tiff", "B01.tiff"]


def test_one_patient_in_several_spellings_is_one_case(tmp_path):
    cases = ["12", "12.0", "12 ", "P-01", "p-01", "P-01", "P 2", "P  2", "Zoë", "Zoe\u0308", "13"]
    lines = ["filename,x,y,label,case"]
    for i, case in enumerate(cases):
        lines.append(f"{i:03d}.png,5,6,{i % 2},{case}")
    a = data.load_dataset(saved(tmp_path / "a.csv", "\n".join(lines)))
    assert a.case.tolist() == [*["12"] * 3, *["P-01"] * 3, *["P 2"] * 2, *["Zoë"] * 0, *a.case[8:]]
    assert len(set(a.case.tolist())) == 5 and a.case[8] == a.case[9]
    assert any("cases written in several ways count as one: 12, 12.0" in note for note in a.notes)
    # Which spelling is chosen does not depend on the order of the rows.
    backwards = saved(tmp_path / "b.csv", "\n".join([lines[0], *reversed(lines[1:])]))
    assert data.load_dataset(backwards).case.tolist() == a.case.tolist()
    # A single spelling stays as it is, so that datasets of before stay what they were.
    single = saved(tmp_path / "c.csv", "filename,x,y,label,case\na.png,5,6,1,12.0\n")
    assert data.load_dataset(single).case.tolist() == ["12.0"]


def test_shared_cases_see_through_spellings(tmp_path):
    a = data.load_dataset(saved(tmp_path / "a.csv", "filename,x,y,label,case\n1.png,5,6,1,P-01"))
    b = data.load_dataset(saved(tmp_path / "b.csv", "filename,x,y,label,case\n9.png,5,6,1,p-01 "))
    assert data.shared_cases(a, b) == ["p-01"]


def test_an_unclosed_quote_loses_no_candidates(tmp_path):
    path = saved(tmp_path / "a.csv", 'x,y,class\n100,100,"old\n200,200,b\n300,300,c\n')
    with pytest.raises(UserError, match="line 4: not a readable CSV file"):
        formats.read_candidates(path)


def test_a_file_that_was_utf8_and_is_damaged_is_not_taken_for_windows_1252(tmp_path):
    content = table(header="filename,x,y,label,note", row="001.tiff,{x},{y},{label},geprüft")
    path = saved(tmp_path / "a.csv", content.encode() + b"\xff")
    with pytest.raises(UserError, match="UTF-8"):
        data.load_dataset(path)


# ---------------------------------------------------------------- names of images


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(path)
    return path


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_file_names_match_in_any_unicode_normal_form(form, tmp_path):
    other = {"NFC": "NFD", "NFD": "NFC"}[form]
    picture(tmp_path / "imgs" / unicodedata.normalize(form, "Präparat 1.tiff"))
    name = unicodedata.normalize(other, "Präparat 1.tiff")
    path = saved(tmp_path / "a.csv", f"filename,x,y,label\n{name},5,6,1\n")
    a = data.load_dataset(path, tmp_path / "imgs")
    assert not a.missing and a.path(0).is_file()


def test_qupath_leaves_out_the_ome_of_a_file_name(tmp_path):
    picture(tmp_path / "001.ome.tif")
    path = saved(tmp_path / "001.geojson", geojson())
    a = data.load_dataset(path)
    assert a.image[0] == "001.ome.tif" and not a.missing and set(a.case) == {"001"}
    picture(tmp_path / "001.tif")  # the plain name comes first
    assert data.load_dataset(path).image[0] == "001.tif"


def test_absolute_paths_inside_the_folder_of_images(tmp_path):
    for folder in ("one", "two"):
        picture(tmp_path / "images" / folder / "a.png")
    lines = ["filename,x,y,label"]
    lines += [f"{tmp_path}/images/{folder}/a.png,5,6,1" for folder in ("one", "two")]
    path = saved(tmp_path / "a.csv", "\n".join(lines))
    a = data.load_dataset(path, tmp_path / "images")
    assert a.image.tolist() == ["one/a.png", "two/a.png"] and not a.missing
    with pytest.raises(UserError, match="leads out of the folder of images"):
        data.load_dataset(path, tmp_path / "images" / "one")
    # Paths of Windows come from another machine: they count from their end.
    text = path.read_text().replace(f"{tmp_path}/images/", "D:\\slides\\").replace("/a", "\\a")
    a = data.load_dataset(saved(tmp_path / "b.csv", text), tmp_path / "images")
    assert a.image.tolist() == ["one/a.png", "two/a.png"] and not a.missing


def test_a_folder_per_class_is_a_dataset_of_patches(tmp_path):
    for name in ("Atypical/1.png", "Atypical/2.png", "Normal/deep/3.png", "Normal/.h/4.png"):
        picture(tmp_path / "p" / name)
    (tmp_path / "p" / "notes").mkdir()
    with pytest.raises(UserError, match="Atypical, Normal"):
        data.load_dataset(tmp_path / "p")
    a = data.load_dataset(tmp_path / "p", classes={"mitotic": ["Atypical"], "other": None})
    assert a.kind == "patches" and a.name == "p" and not a.missing
    assert a.image.tolist() == ["Atypical/1.png", "Atypical/2.png", "Normal/deep/3.png"]
    assert a.label.tolist() == [1, 1, 0]
    (tmp_path / "p" / "Atypical").rename(tmp_path / "p" / "mitosis")
    (tmp_path / "p" / "Normal").rename(tmp_path / "p" / "nonmitosis")
    assert data.load_dataset(tmp_path / "p").label.tolist() == [1, 1, 0]


# ---------------------------------------------------------------- hostile files


@pytest.mark.parametrize("suffix", [".csv", ".json", ".geojson", ".sqlite", ".xml"])
def test_a_pipe_is_no_file(suffix, tmp_path):
    os.mkfifo(tmp_path / f"a{suffix}")
    for read in (formats.read, formats.read_candidates):
        with pytest.raises(UserError, match="not an ordinary file"):
            read(tmp_path / f"a{suffix}")


def database(path, *statements):
    written_database(path)
    connection = sqlite3.connect(path)
    connection.executescript(";".join(statements))
    connection.commit()
    connection.close()
    return path


ENDLESS = "WITH RECURSIVE r(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM r)"


@pytest.mark.parametrize(
    "statement, says",
    [
        (
            "DROP TABLE Annotations_coordinates; CREATE VIEW Annotations_coordinates AS "
            f"{ENDLESS} SELECT n AS uid, 5 AS coordinateX, 5 AS coordinateY, 1 AS annoId FROM r",
            "lacks the table annotations_coordinates",
        ),
        (
            "ALTER TABLE Slides RENAME COLUMN filename TO f; ALTER TABLE Slides ADD COLUMN "
            "filename TEXT GENERATED ALWAYS AS (hex(zeroblob(400000000))) VIRTUAL",
            "lacks filename in the table slides",
        ),
        (
            "UPDATE Slides SET filename = NULL; ALTER TABLE Classes RENAME TO C; "
            "CREATE VIRTUAL TABLE Classes USING fts5(uid, name)",
            "lacks the table classes",
        ),
        ("UPDATE Slides SET filename = x'00ff'", "a text is needed"),
        ("UPDATE Annotations_coordinates SET coordinateX = 'abc'", "a number is needed"),
        ("UPDATE Annotations_coordinates SET annoId = 1", "has more"),
        ("UPDATE Slides SET filename = hex(zeroblob(20000000))", "too big|longer than"),
    ],
)
def test_hostile_databases_end_in_one_line_in_both_readings(statement, says, tmp_path):
    path = database(tmp_path / "a.sqlite", statement)
    for read in (formats.read, formats.read_candidates):
        with pytest.raises(UserError, match=says) as error:
            read(path)
        assert "\n" not in str(error.value)


def test_triggers_of_a_database_do_not_run(tmp_path):
    """Nor are they lost."""
    trigger = (
        'CREATE TRIGGER "a ""b" AFTER UPDATE ON Annotations BEGIN INSERT INTO big '
        f"{ENDLESS} SELECT n FROM r; END"
    )
    path = database(tmp_path / "a.sqlite", "CREATE TABLE big (t)", trigger)
    out = tmp_path / "out.sqlite"
    candidates = formats.read_candidates(path)
    formats.write(candidates, out, SCORES, 0.5, NAMES, relabel=True)
    connection = sqlite3.connect(out)
    assert connection.execute("SELECT count(*) FROM big").fetchone() == (0,)
    (kept,) = connection.execute("SELECT sql FROM sqlite_master WHERE type = 'trigger'").fetchone()
    assert kept == trigger
    relabelled = connection.execute("SELECT agreedClass FROM Annotations ORDER BY uid").fetchall()
    assert relabelled == [(1,), (2,), (2,), (1,)]
    connection.close()


LONG = "1" + "0" * 400


@pytest.mark.parametrize(
    "text, says",
    [
        (json.dumps(midog()).replace("[75.0,", f"[{LONG},"), "a number is needed"),
        (json.dumps(geojson()).replace("[[75.0,", f"[[{LONG},"), "a number is needed"),
        (f'{{"type": "Multiple points", "points": [{{"point": [{LONG}, 1]}}]}}', "a number is"),
        (json.dumps(midog()).replace('"id": 0', '"id": 0, "id": 9'), "a key occurs twice"),
        ("[" * 100_000, "nested too deeply|not a readable JSON"),
        ("9" * 5000, "not a readable JSON"),
        (json.dumps(midog()).replace('"id": 1,', '"id": 1, "x": [],', 1)[:-9], "not a readable"),
    ],
)
def test_odd_json_ends_in_one_line_in_both_readings(text, says, tmp_path):
    path = saved(tmp_path / "a.json", text)
    for read in (formats.read, formats.read_candidates):
        with pytest.raises(UserError, match=says) as error:
            read(path)
        assert "\n" not in str(error.value)


def test_ids_of_images_that_occur_twice_are_refused_in_both_readings(tmp_path):
    content = midog()
    content["images"].append({"id": 1, "file_name": "002.tiff"})
    path = saved(tmp_path / "a.json", content)
    for read in (formats.read, formats.read_candidates):
        with pytest.raises(UserError, match="the id '1' occurs twice"):
            read(path)


def test_halves_of_surrogate_pairs_are_written_as_they_were_read(tmp_path):
    path = saved(tmp_path / "a.json", json.dumps(midog(info="\ud800")))
    formats.write(formats.read_candidates(path), tmp_path / "o.json", SCORES, 0.5, NAMES)
    assert json.loads((tmp_path / "o.json").read_text())["info"] == "\ud800"


def test_no_name_carries_control_characters_into_a_message(tmp_path):
    escape = "\x1b[31m"
    content = midog()
    content["categories"].append({"id": 3, "name": f"{escape}red"})
    content["annotations"].append({"image_id": 1, "category_id": 3, "bbox": box(9, 9, 20)})
    path = saved(tmp_path / "a.json", content)
    for note in [*formats.read(path).notes, *formats.read_candidates(path).notes]:
        assert escape not in note
    for change in ({"id": f"{escape}RED"}, {"bbox": [f"{escape}", 1, 2, 3]}):
        broken = midog()
        broken["annotations"][0].update(change)
        with pytest.raises(UserError) as error:
            formats.read_candidates(saved(path, broken))
        assert escape not in str(error.value)
    assert places(data.load_dataset(saved(tmp_path / "b.json", midog())))


def test_what_is_written_is_packed_if_its_name_says_so(tmp_path):
    path = saved(tmp_path / "001.geojson.gz", gzip.compress(json.dumps(geojson()).encode()))
    out = tmp_path / "out.geojson.gz"
    formats.write(formats.read_candidates(path), out, SCORES, 0.5, NAMES)
    assert len(json.loads(gzip.decompress(out.read_bytes()))["features"]) == len(CELLS)
    assert len(formats.read_candidates(out)) == len(CELLS)
