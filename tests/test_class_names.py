"""What the two classes are called comes with the data, and nothing on the way calls them anything
else: table, run, report, exported model, scored files.
"""

import csv
import json
import sqlite3

import numpy as np
import pytest
import run_folders
import small
import torch
from PIL import Image, ImageDraw

import augment
import checkpoint
import classify
import common
import data
import evaluate
import export
import flags
import lora
import models
import runs
from dataset import formats
from dataset.formats.cells import MITOSIS, class_names
from onnx_model import session
from reporting import results

POSITIVE = {"mitotic": ["AMF"], "other": ["NMF"], "own_names": True}
WRONG = ("hard negative", "mitotic figure", "look-alike")


# ---------------------------------------------------------------- the names of a table


def points(path, labels):
    rows = [(f"{k}.tif", 300 + k, 300, label) for k, label in enumerate(labels)]
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([("filename", "x", "y", "label"), *rows])
    return path


def chosen(positive, negative=None):
    """What --positive and --negative become."""
    return {"mitotic": positive, "other": negative, "own_names": True}


@pytest.mark.parametrize(
    "labels, classes, names",
    [
        (["0", "1"], None, MITOSIS),
        (["mitosis", "Non-mitotic"], None, MITOSIS),
        (["Normal", "Atypical"], chosen(["atypical"]), ("Normal", "Atypical")),
        (["NMF", "AMF", "x"], chosen(["AMF"], ["NMF"]), ("NMF", "AMF")),
        (["MF", "AMF"], chosen(["AMF"]), ("MF", "AMF")),
        (["MF", "imposter"], chosen(["MF"]), MITOSIS),
        (["0", "1"], chosen(["1"]), ("0", "1")),
        (["1", "2"], {"mitotic": ["2"], "other": ["1"]}, MITOSIS),
        (["a", "b", "c"], chosen(["b", "c"]), ("a", "b or c")),
        (["n", *"abcde"], chosen(list("abcde")), ("n", "a or b or c or 2 others")),
        (["+", "-"], chosen(["+"]), ("-", "+")),
        (["normal\xa0 one", "odd\u200aone"], chosen(["odd\u200aone"]), ("normal one", "odd one")),
    ],
)
def test_the_names_are_those_of_the_data(labels, classes, names, tmp_path):
    table = data.load_dataset(points(tmp_path / "t.csv", labels), classes=classes)
    assert table.classes == names and table.take([0]).classes == names


def test_classes_that_only_their_ids_tell_apart_are_told_apart():
    named = class_names({"1": "cell", "2": "Cell"}, {"1": 1, "2": 0}, chosen(["1"], ["2"]))
    assert named == ("Cell (2)", "cell (1)")
    nameless = {"1": None, "2": " "}
    assert class_names(nameless, {"1": 1, "2": 0}, chosen(["1"], ["2"])) == ("2", "1")
    assert class_names({"a": "e\x1b[2Jvil", "b": "b"}, {"a": 1, "b": 0}, chosen(["a"]))[
        1
    ].isprintable()


def test_the_flags_of_the_command_name_the_classes(tmp_path, capsys):
    path = points(tmp_path / "t.csv", ["Normal", "Atypical"] * 9)
    for name in {f"{k}.tif" for k in range(18)}:
        Image.new("RGB", (600, 600), "pink").save(tmp_path / name)
    assert small.call(data, path, "--positive", "Atypical") == 0
    printed = capsys.readouterr().out
    assert "Atypical" in printed and "planned splits: Atypical + Normal (cases)" in printed
    assert not any(word in printed for word in WRONG)
    source = {"data": str(path), "positive": "Atypical"}
    assert flags.from_source(source)[0].classes == ("Normal", "Atypical")


# ---------------------------------------------------------------- the whole way


@pytest.fixture(scope="module")
def atypical(tmp_path_factory):
    """(a finished run on patches of the classes AMF and NMF, without training; its model.onnx; a
    slide), made by the commands.
    """
    root = tmp_path_factory.mktemp("atypical")
    path = small.dataset(root / "data", name="figures")
    text = path.read_text().replace(",1,", ",AMF,").replace(",0,", ",NMF,")
    path.write_text(text)
    table = data.load_dataset(path, classes=POSITIVE)
    run = run_folders.make(root / "runs", table, "tiny", weights="random", size=None)
    config = common.read_json(run / "config.json")
    assert config["data"]["classes"] == ["NMF", "AMF"]
    config["source"] = {"data": str(path), "positive": "AMF", "negative": "NMF"}
    common.write_json(run / "config.json", config)
    head = torch.Generator().manual_seed(1)
    tensors = {"head.weight": torch.randn(1, 32, generator=head), "head.bias": torch.zeros(1)}
    checkpoint.save_tensors(run / "model.safetensors", tensors)
    assert small.call(export, run, "--device", "cpu", "--patches", 8) == 0

    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (25, 32, 3)).astype(np.uint8)
    slide = root / "a.tiff"
    Image.fromarray(pixels).resize((640, 500)).save(slide, resolution=40000, resolution_unit=3)
    return run, run / "model.onnx", slide


POINTS = [(150.0, 160.0), (400.5, 300.0), (320.0, 330.0), (520.0, 370.0)]


def midog(path):
    boxes = [[x - 25, y - 25, x + 25, y + 25] for x, y in POINTS]
    content = {
        "images": [{"id": 1, "file_name": "a.tiff"}],
        "annotations": [
            {"id": i, "image_id": 1, "bbox": box, "category_id": 1} for i, box in enumerate(boxes)
        ],
        "categories": [{"id": 1, "name": "cell"}],
    }
    path.write_text(json.dumps(content))


def challenge(path):
    content = {
        "type": "Multiple points",
        "points": [
            {"name": "cell", "point": [x * 0.00025, y * 0.00025, 0], "probability": 0.5}
            for x, y in POINTS
        ],
    }
    path.write_text(json.dumps(content))


def points_alone(path):
    rows = [("a.tiff", x, y) for x, y in POINTS]
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([("filename", "x", "y"), *rows])


def geojson(path):
    features = []
    for x, y in POINTS:
        geometry = {"type": "Point", "coordinates": [x, y]}
        features.append({"type": "Feature", "geometry": geometry, "properties": {}})
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))


def imagescope(path):
    regions = "".join(
        f'<Region Type="5" Text="cell"><Vertices><Vertex X="{x}" Y="{y}"/></Vertices></Region>'
        for x, y in POINTS
    )
    path.write_text(
        f"<Annotations><Annotation><Regions>{regions}</Regions></Annotation></Annotations>"
    )


def sqlite(path, classes=("cell",)):
    database = sqlite3.connect(path)
    database.executescript(
        """
        CREATE TABLE Slides (uid INTEGER PRIMARY KEY, filename TEXT);
        CREATE TABLE Classes (uid INTEGER PRIMARY KEY, name TEXT);
        CREATE TABLE Annotations (uid INTEGER PRIMARY KEY, slide, type, agreedClass);
        CREATE TABLE Annotations_coordinates (coordinateX, coordinateY, annoId);
        INSERT INTO Slides VALUES (1, 'a.tiff');
        """
    )
    database.executemany("INSERT INTO Classes (name) VALUES (?)", [(name,) for name in classes])
    for uid, (x, y) in enumerate(POINTS, 1):
        database.execute("INSERT INTO Annotations VALUES (?, 1, 1, 1)", (uid,))
        database.execute("INSERT INTO Annotations_coordinates VALUES (?, ?, ?)", (x, y, uid))
    database.commit()
    database.close()


MAKERS = {
    "midog.json": midog,
    "challenge.json": challenge,
    "a.csv": points_alone,
    "a.geojson": geojson,
    "a.xml": imagescope,
    "a.sqlite": sqlite,
}


@pytest.fixture
def drawn(monkeypatch):
    """The texts that are drawn into pictures."""
    texts, draw = [], ImageDraw.ImageDraw.text

    def recorded(self, xy, text, *arguments, **options):
        texts.append(text)
        return draw(self, xy, text, *arguments, **options)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", recorded)
    return texts


def middle(model, slide):
    """A threshold that half of the candidates reach."""
    x, y = np.array(POINTS).T
    return float(np.median(session.Classifier(model, "cpu").score(slide, x, y)))


@pytest.mark.parametrize("name", MAKERS)
def test_every_scored_file_says_the_names_of_the_data(name, atypical, tmp_path, drawn, capsys):
    _, model, slide = atypical
    (tmp_path / "in").mkdir()
    given, out = tmp_path / "in" / name, tmp_path / name
    MAKERS[name](given)
    flag = ["--candidates", given, "--out", out, "--overlay", tmp_path / "o.png"]
    threshold = middle(model, slide)
    assert (
        small.call(
            classify, model, "--slide", slide, *flag, "--threshold", threshold, "--device", "cpu"
        )
        == 0
    ), capsys.readouterr().err
    printed = capsys.readouterr().out
    assert "4 candidates scored, 2 AMF, 2 NMF" in printed
    assert any("red: AMF (p from" in text and text.endswith("blue: NMF") for text in drawn)
    written = out.read_bytes()
    assert b"AMF" in written and b"NMF" in written
    for text in (written.decode("latin-1"), printed, *drawn):
        assert not any(word in text.lower() for word in WRONG)
    again = formats.read_candidates(out)
    assert len(again) == 4
    if name in ("a.csv", "a.geojson"):  # what was written there is the class itself
        table = formats.read(out, POSITIVE)
        assert sorted(table.labels) == [0, 0, 1, 1] and table.classes == ("NMF", "AMF")
    if name == "a.geojson":
        for feature in json.loads(written)["features"]:
            properties = feature["properties"]
            called = properties["classification"]
            assert set(properties["measurements"]) == {"probability of AMF"}
            assert called["color"] == list(formats.COLOURS[called["name"] == "AMF"])


@pytest.mark.parametrize(
    "kind, name",
    [
        ("midog", "o.json"),
        ("challenge", "o.json"),
        ("csv", "o.csv"),
        ("geojson", "o.geojson"),
        ("imagescope", "o.xml"),
    ],
)
def test_another_format_says_them_too(kind, name, atypical, tmp_path, capsys):
    _, model, slide = atypical
    points_alone(tmp_path / "in.csv") if kind != "csv" else geojson(tmp_path / "in.geojson")
    given = next(tmp_path.glob("in.*"))
    flag = ["--candidates", given, "--out", tmp_path / name, "--format", kind]
    flag += ["--threshold", middle(model, slide), "--device", "cpu"]
    assert small.call(classify, model, "--slide", slide, *flag) == 0, capsys.readouterr().err
    written = (tmp_path / name).read_bytes()
    assert b"AMF" in written and b"NMF" in written
    assert not any(word in written.decode("latin-1").lower() for word in WRONG)


def test_the_model_and_the_report_say_the_names_of_the_data(atypical, tmp_path, drawn, capsys):
    run, model, _ = atypical
    classifier = session.Classifier(model, "cpu")
    assert classifier.labels == ["NMF", "AMF"]
    assert "0 NMF, 1 AMF" in classifier.describe()
    texts = [classifier.describe(), model.read_bytes().decode("latin-1")]
    texts.append((run / "model.parity.json").read_text())
    assert small.call(evaluate, run, "--out", tmp_path / "report", "--replicates", 100) == 0
    texts.append(capsys.readouterr().out)
    for path in (tmp_path / "report").iterdir():
        if path.suffix in (".html", ".md", ".tex", ".csv", ".json"):
            texts.append(path.read_text())
    page = (tmp_path / "report/index.html").read_text()
    assert "<h1>AMF against NMF: 1 finished run</h1>" in page and "NMF called AMF" in page
    source = common.read_json(run / "config.json")["source"]
    sheet = ["--gallery", tmp_path / "sheet.png", "--positive", "AMF", "--negative", "NMF"]
    assert small.call(augment, "--data", source["data"], *sheet) == 0
    assert "AMF" in drawn and "NMF" in drawn
    for text in (*texts, *drawn):
        assert not any(word in text.lower() for word in WRONG)


def test_relabel_writes_the_categories_of_the_file(tmp_path):
    probability, names = np.array([0.9, 0.1, 0.8, 0.2]), ["NMF", "AMF"]
    sqlite(tmp_path / "in.sqlite", ("NMF", "other", "amf"))
    found = formats.read_candidates(tmp_path / "in.sqlite")
    formats.write(found, tmp_path / "out.sqlite", probability, 0.5, names, relabel=True)
    database = sqlite3.connect(tmp_path / "out.sqlite")
    agreed = database.execute("SELECT agreedClass FROM Annotations ORDER BY uid").fetchall()
    database.close()
    assert [int(value) for (value,) in agreed] == [3, 1, 3, 1]
    points(tmp_path / "in.csv", ["AMF", "AMF", "NMF", "NMF"])
    found = formats.read_candidates(tmp_path / "in.csv")
    formats.write(found, tmp_path / "out.csv", probability, 0.5, names, relabel=True)
    with open(tmp_path / "out.csv") as file:
        assert [row["label"] for row in csv.DictReader(file)] == ["AMF", "NMF", "AMF", "NMF"]
    # 1 is a mitotic figure there, not an atypical one.
    points(tmp_path / "in.csv", ["0", "1", "1", "0"])
    found = formats.read_candidates(tmp_path / "in.csv")
    with pytest.raises(common.UserError, match="cannot tell which of its classes"):
        formats.write(found, tmp_path / "out.csv", probability, 0.5, names, relabel=True)
    formats.write(found, tmp_path / "out.csv", probability, 0.5, list(MITOSIS), relabel=True)
    with open(tmp_path / "out.csv") as file:
        assert [row["label"] for row in csv.DictReader(file)] == ["1", "0", "1", "0"]


# ---------------------------------------------------------------- runs that do not say it


def test_an_old_run_is_of_the_mitosis_data_and_goes_on(tmp_path):
    table = run_folders.annotations()
    run = run_folders.make(tmp_path, table)
    config = common.read_json(run / "config.json")
    old = json.loads(json.dumps(config))
    del old["data"]["classes"]
    assert runs.differing(old, config) == []
    other = json.loads(json.dumps(config))
    other["data"]["classes"] = ["NMF", "AMF"]
    assert len(runs.differing(config, other)) == 1
    common.write_json(run / "config.json", old)
    assert results.read_run(run).classes == MITOSIS
    for damaged in (["a"], ["a", "a"], ["a", "b\x1b"], "ab", ["a", 1]):
        old["data"]["classes"] = damaged
        common.write_json(run / "config.json", old)
        for read in (results.read_run, checkpoint.read_config):
            with pytest.raises(common.UserError, match="data.classes"):
                read(run)


def test_the_export_of_an_old_run_says_that_its_names_are_a_guess(tmp_path, capsys):
    config = {"data": {}, "source": {"positive": "Atypical"}}
    assert export.class_names(tmp_path, config) == list(MITOSIS)
    assert "did not record what its classes are called (--positive Atypical)" in (
        capsys.readouterr().err
    )
    assert export.class_names(tmp_path, {"data": {}, "source": {}}) == list(MITOSIS)
    config["data"]["classes"] = ["Normal", "Atypical"]
    assert export.class_names(tmp_path, config) == ["Normal", "Atypical"]
    assert not capsys.readouterr().err


def test_an_adapter_in_pefts_format_keeps_the_names(tmp_path):
    encoder = models.load_encoder("tiny", "random")
    lora.add_lora(encoder, rank=2, alpha=2)
    head = torch.nn.Linear(32, 1)
    lora.save_peft(encoder, tmp_path, head=head, classes=["NMF", "AMF"])
    assert lora.head_classes(tmp_path) == ["NMF", "AMF"]
    assert torch.equal(lora.load_head(tmp_path)[0], head.weight)
    lora.save_peft(encoder, tmp_path, head=head)
    assert lora.head_classes(tmp_path) is None
    lora.save_peft(encoder, tmp_path, head=head, classes=["a", "a"])
    with pytest.raises(common.UserError, match="class names"):
        lora.head_classes(tmp_path)
