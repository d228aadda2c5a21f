"""The second stage: the classifier, the four formats of candidates, the command and its errors."""

import csv
import json
import os
import random
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import openslide
import pytest
import tifffile
import torch
from onnx_models import classifier, mounted, patches, register, write_model
from PIL import Image

import classify
import common
import data
from classify import Classifier
from dataset import formats, slides
from dataset.patches import Patches
from onnx_model import devices, reading
from scoring import match, plan

HERE = Path(__file__).resolve().parent.parent
POINTS = [
    (150.0, 160.0),
    (400.5, 300.0),
    (20.0, 30.0),
    (620.0, 470.0),
]  # the last two reach over the border


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """An exported model, an image (0.25 µm/px) and what torch says about the points on it."""
    folder = tmp_path_factory.mktemp("classify")
    with pytest.MonkeyPatch.context() as monkeypatch:
        register(monkeypatch)
        model = classifier("gelu")
    write_model(folder / "model.onnx", model, embedding=True)
    image = np.concatenate([np.concatenate(patches(3, seed=r), axis=1) for r in (1, 2, 3)])[
        :500, :640
    ]
    Image.fromarray(image).save(folder / "a.tiff", resolution=40000, resolution_unit=3)
    padded = np.pad(image, ((112, 112), (112, 112), (0, 0)), constant_values=255)
    crops = np.stack(
        [padded[int(np.floor(y + 0.5)) :, int(np.floor(x + 0.5)) :][:224, :224] for x, y in POINTS]
    )
    with torch.inference_mode():
        expected = torch.sigmoid(model(torch.from_numpy(crops))).numpy()
    return folder, expected


def tiled(path, pixels, mpp):
    """A tiled TIFF, which OpenSlide reads at random."""
    resolution = (10000 / mpp, 10000 / mpp)
    tifffile.imwrite(
        path,
        pixels,
        tile=(256, 256),
        photometric="rgb",
        resolution=resolution,
        resolutionunit="CENTIMETER",
    )


def run(*arguments, **options):
    return subprocess.run(
        [sys.executable, str(HERE / "classify.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        **options,
    )


def failure(*arguments):
    """The one line of a command that must fail as a user's mistake."""
    done = run(*arguments)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(errors) == 1 and "Traceback" not in done.stderr, done.stderr
    return errors[0]


# ---------------------------------------------------------------- the formats


def midog(path, points=POINTS, images=("a.tiff",)):
    boxes = [[x - 25, y - 25, x + 25, y + 25] for x, y in points]
    content = {
        "info": {"kept": True},
        "images": [{"id": i, "file_name": n} for i, n in enumerate(images, 1)],
        "annotations": [
            {
                "id": 10 + i,
                "image_id": 1 + i % len(images),
                "bbox": box,
                "category_id": 2,
                "extra": i,
            }
            for i, box in enumerate(boxes)
        ],
        "categories": [{"id": 1, "name": "mitotic figure"}, {"id": 2, "name": "hard negative"}],
    }
    path.write_text(json.dumps(content))
    return path


def challenge(path):
    path.write_text(
        json.dumps(formats.challenge.content_of(*np.array(POINTS).T, [0.5] * 4, 0.4, 0.25))
    )
    return path


def table(path):
    lines = ["filename;x;y;note", *(f"a.tiff;{x};{y};n {i}" for i, (x, y) in enumerate(POINTS))]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8-sig")
    return path


def geojson(path):
    square = [
        [[x - 9, y - 9], [x + 9, y - 9], [x + 9, y + 9], [x - 9, y + 9], [x - 9, y - 9]]
        for x, y in POINTS[2:3]
    ]
    features = [
        {
            "type": "Feature",
            "id": "one",
            "geometry": {"type": "MultiPoint", "coordinates": list(POINTS[:2])},
            "properties": {"objectType": "annotation", "classification": {"name": "Candidate"}},
        },
        {
            "type": "Feature",
            "id": "two",
            "geometry": {"type": "Polygon", "coordinates": square},
            "properties": {"measurements": {"area": 3.0}},
        },
        {
            "type": "Feature",
            "id": "three",
            "geometry": {"type": "Point", "coordinates": list(POINTS[3])},
        },
    ]
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    return path


def sqlite(path):
    database = sqlite3.connect(path)
    database.executescript("""
        CREATE TABLE Slides (uid INTEGER PRIMARY KEY, filename TEXT, width INTEGER,
            height INTEGER, directory TEXT);
        CREATE TABLE Annotations (uid INTEGER PRIMARY KEY, slide INTEGER, type INTEGER,
            agreedClass INTEGER, deleted INTEGER DEFAULT 0);
        CREATE TABLE Annotations_coordinates (uid INTEGER PRIMARY KEY, coordinateX REAL,
            coordinateY REAL, slide INTEGER, annoId INTEGER, orderIdx INTEGER);
        CREATE TABLE Classes (uid INTEGER PRIMARY KEY, name TEXT);
        INSERT INTO Classes VALUES (1, 'mitotic figure'), (2, 'not mitotic figure');
        INSERT INTO Slides VALUES (1, 'a.tiff', 640, 500, 'x');
        INSERT INTO Annotations VALUES (9, 1, 1, 1, 1);
        INSERT INTO Annotations_coordinates VALUES (900, 5, 5, 1, 9, 1);
        INSERT INTO Annotations VALUES (8, 1, 2, 1, 0);
        INSERT INTO Annotations_coordinates VALUES (800, 5, 5, 1, 8, 1), (801, 45, 45, 1, 8, 2)""")
    for i, (x, y) in enumerate(POINTS, start=1):
        database.execute("INSERT INTO Annotations VALUES (?, 1, 1, 2, 0)", (i,))
        database.execute(
            "INSERT INTO Annotations_coordinates VALUES (?, ?, ?, 1, ?, 1)", (10 * i, x, y, i)
        )
    database.commit()
    database.close()
    return path


def read_scores(kind, path):
    """(probabilities, classes) out of a written file, by the csv, json and sqlite3 modules."""
    if kind == "csv":
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file, delimiter=";"))
        assert [row["note"] for row in rows] == [f"n {i}" for i in range(4)]
        return [float(row["probability"]) for row in rows], [row["class"] for row in rows]
    if kind == "sqlite":
        database = sqlite3.connect(path)
        rows = database.execute(
            "SELECT probability, class FROM Predictions ORDER BY annoId"
        ).fetchall()
        assert database.execute("SELECT count(*) FROM Annotations").fetchone() == (6,)
        database.close()
        return [row[0] for row in rows], [row[1] for row in rows]
    content = json.loads(Path(path).read_text())
    if kind == "midog":
        assert content["info"] == {"kept": True} and [
            a["extra"] for a in content["annotations"]
        ] == [0, 1, 2, 3]
        return [a["probability"] for a in content["annotations"]], [
            a["class"] for a in content["annotations"]
        ]
    if kind == "challenge":
        assert content["type"] == "Multiple points" and content["version"] == {
            "major": 1,
            "minor": 0,
        }
        names = [
            p["name"].replace("non-mitotic figure", "hard negative") for p in content["points"]
        ]
        return [p["probability"] for p in content["points"]], names
    features = content["features"]
    assert [f["geometry"]["type"] for f in features] == ["Point", "Point", "Polygon", "Point"]
    ids = [f["id"] for f in features if "id" in f]
    assert len(ids) == len(set(ids)) and features[2]["properties"]["measurements"]["area"] == 3.0
    for feature in features:
        given = feature["properties"]["classification"]
        assert given["color"] == list(formats.COLOURS[given["name"] == "mitotic figure"])
    return (
        [f["properties"]["measurements"]["probability of mitotic figure"] for f in features],
        [f["properties"]["classification"]["name"] for f in features],
    )


MAKERS = {
    "midog": midog,
    "challenge": challenge,
    "csv": table,
    "geojson": geojson,
    "sqlite": sqlite,
}
SUFFIX = {
    "midog": ".json",
    "challenge": ".json",
    "csv": ".csv",
    "geojson": ".geojson",
    "sqlite": ".sqlite",
}


@pytest.mark.parametrize("kind", MAKERS)
def test_command_scores_every_format(kind, tiny, tmp_path):
    folder, expected = tiny
    given = MAKERS[kind](tmp_path / f"in{SUFFIX[kind]}")
    before, out = given.read_bytes(), tmp_path / f"out{SUFFIX[kind]}"
    done = run(
        folder / "model.onnx", "--slide", folder / "a.tiff", "--candidates", given, "--out", out
    )
    assert done.returncode == 0, done.stderr
    assert "4 candidates scored" in done.stdout and "candidates/s" in done.stdout
    probability, classes = read_scores(kind, out)
    assert np.abs(np.array(probability) - expected).max() <= 2e-5
    assert classes == [["hard negative", "mitotic figure"][int(p >= 0.5)] for p in expected]
    assert given.read_bytes() == before and sorted(p.name for p in tmp_path.iterdir()) == sorted(
        [given.name, out.name]
    )
    again = formats.read_candidates(out)  # what was written can be read again, and scored again
    assert len(again) == 4


@pytest.mark.parametrize("kind", MAKERS)
def test_the_input_is_never_written_to(kind, tiny, tmp_path):
    folder, _ = tiny
    given = MAKERS[kind](tmp_path / f"in{SUFFIX[kind]}")
    before = given.read_bytes()
    (tmp_path / "link").symlink_to(given)
    for out in (given, tmp_path / "link"):
        assert "the same command reads or writes this file" in failure(
            folder / "model.onnx", "--slide", folder / "a.tiff", "--candidates", given, "--out", out
        )
    assert given.read_bytes() == before


def test_relabel(tiny, tmp_path):
    folder, expected = tiny
    found = formats.read_candidates(midog(tmp_path / "in.json"))
    formats.write(
        found,
        tmp_path / "out.json",
        expected,
        0.5,
        ["hard negative", "mitotic figure"],
        relabel=True,
    )
    written = json.loads((tmp_path / "out.json").read_text())["annotations"]
    assert [a["category_id"] for a in written] == [1 if p >= 0.5 else 2 for p in expected]
    found = formats.read_candidates(sqlite(tmp_path / "in.sqlite"))
    formats.write(
        found,
        tmp_path / "out.sqlite",
        expected,
        0.5,
        ["hard negative", "mitotic figure"],
        relabel=True,
    )
    rows = (
        sqlite3.connect(tmp_path / "out.sqlite")
        .execute("SELECT agreedClass FROM Annotations WHERE deleted = 0 AND type = 1 ORDER BY uid")
        .fetchall()
    )
    assert [row[0] for row in rows] == [1 if p >= 0.5 else 2 for p in expected]


def test_images_in_a_folder_and_candidates_elsewhere(tiny, tmp_path):
    folder, expected = tiny
    shutil.copy(folder / "a.tiff", tmp_path / "b.tiff")
    shutil.copy(folder / "a.tiff", tmp_path / "a.tiff")
    given = midog(
        tmp_path / "in.json", images=("a.tiff", "b.png")
    )  # the list says .png, the file is .tiff
    done = run(
        folder / "model.onnx",
        "--slide",
        tmp_path,
        "--candidates",
        given,
        "--out",
        tmp_path / "out.json",
    )
    assert done.returncode == 0, done.stderr
    assert np.abs(np.array(read_scores("midog", tmp_path / "out.json")[0]) - expected).max() <= 2e-5
    done = run(
        folder / "model.onnx",
        "--slide",
        tmp_path / "a.tiff",
        "--candidates",
        given,
        "--out",
        tmp_path / "out.json",
    )
    assert done.returncode == 0 and "2 candidates lie on other images" in done.stdout
    written = json.loads((tmp_path / "out.json").read_text())["annotations"]
    assert ["probability" in a for a in written] == [True, False, True, False]


# ---------------------------------------------------------------- what is wrong with the input


def test_mistakes_are_one_line(tiny, tmp_path):
    folder, _ = tiny
    model, image, given = folder / "model.onnx", folder / "a.tiff", midog(tmp_path / "in.json")
    usual = ("--slide", image, "--candidates", given, "--out", tmp_path / "out.json")
    assert "no such file" in failure(tmp_path / "none.onnx", *usual)
    assert "belong together" in failure(model, "--slide", image)
    assert "no such file" in failure(
        model, "--slide", tmp_path / "none.svs", "--candidates", given, "--out", "o.json"
    )
    assert "no such file" in failure(
        model, "--slide", image, "--candidates", tmp_path / "no.json", "--out", "o.json"
    )
    assert "folder does not exist" in failure(model, *usual[:-1], tmp_path / "no" / "out.json")
    assert "--batch-size" in failure(model, *usual, "--batch-size", 0)
    assert "plausible" in failure(model, *usual, "--mpp", 0)
    for threshold in (0, 1, 50, "nan"):
        assert "between 0 and 1" in failure(model, *usual, "--threshold", threshold)
    assert "choose auto" in failure(model, *usual, "--device", "tpu")
    for text, message in (
        ("{", "not a readable JSON"),
        ("[1]", "neither MIDOG"),
        ('{"type": "Multiple points"}', "points"),
        ('{"images": [], "annotations": [{"id": 1}]}', "among the images"),
        (
            '{"images": [{"id": 1, "file_name": "a.tiff"}], "annotations": [{"id": 1, "image_id": '
            "1, "
            '"bbox": [100, 100, 50, 50]}]}',
            "upper left",
        ),
    ):
        (tmp_path / "bad.json").write_text(text)
        assert message in failure(
            model, "--slide", image, "--candidates", tmp_path / "bad.json", "--out", "o.json"
        )
    for text, message in (
        ("a,b\n1,2\n", "columns x and y"),
        ("x,y\n1\n", "line 2: 1 fields"),
        ("x,y\n1,nan\n", "no position"),
    ):
        (tmp_path / "bad.csv").write_text(text)
        assert message in failure(
            model, "--slide", image, "--candidates", tmp_path / "bad.csv", "--out", "o.csv"
        )
    (tmp_path / "bad.sqlite").write_bytes(sqlite(tmp_path / "good.sqlite").read_bytes()[:5000])
    assert "SlideRunner" in failure(
        model, "--slide", image, "--candidates", tmp_path / "bad.sqlite", "--out", "o.db"
    )
    assert not (tmp_path / "out.json").exists() and not Path("o.json").exists()


def test_output_that_cannot_be_written_is_found_before_the_model_is_loaded(tmp_path):
    """There is no model here: a message about it would say that its loading came first."""
    (tmp_path / "a.png").write_bytes(b"")
    usual = ("--slide", tmp_path / "a.png", "--candidates", midog(tmp_path / "in.json"), "--out")
    assert (
        "--out" in (said := failure("none.onnx", *usual, tmp_path)) and "this is a folder" in said
    )
    usual = (*usual, tmp_path / "out.json", "--overlay")
    assert (
        "--overlay" in (said := failure("none.onnx", *usual, tmp_path))
        and "this is a folder" in said
    )
    assert "its folder does not exist" in failure("none.onnx", *usual, tmp_path / "no" / "o.png")


@pytest.fixture
def case(tiny, tmp_path):
    """Copies that a test may spoil: (arguments without outputs, {name: path of an input})."""
    folder, _ = tiny
    write_model(tmp_path / "m.onnx", classifier("gelu"), inline=False)
    shutil.copy(folder / "a.tiff", tmp_path / "a.tiff")
    midog(tmp_path / "in.json")
    inputs = {name: tmp_path / name for name in ("m.onnx", "m.onnx.data", "a.tiff", "in.json")}
    arguments = (inputs["m.onnx"], "--slide", tmp_path / "a.tiff", "--candidates")
    return (*arguments, inputs["in.json"]), inputs


def call(monkeypatch, *arguments):
    """classify.py in this process → exit status."""
    monkeypatch.setattr(sys, "argv", ["classify.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        common.command(classify.main)
    return ended.value.code


def test_no_output_replaces_an_input(case, tmp_path, monkeypatch, capsys):
    """By its name, by a link of either kind; of a folder of slides, each of its images."""
    arguments, inputs = case
    before = {name: path.read_bytes() for name, path in inputs.items()}
    (tmp_path / "other").mkdir()
    folder = (*arguments[:2], tmp_path, *arguments[3:])
    for name, path in inputs.items():
        (tmp_path / "other" / f"symbolic-{name}").symlink_to(path)
        os.link(path, tmp_path / "other" / f"hard-{name}")
        for output in (path, *sorted((tmp_path / "other").glob(f"*-{name}"))):
            for given in (arguments, folder):
                for outputs in (
                    ("--out", output),
                    ("--out", tmp_path / "o.json", "--overlay", output),
                ):
                    assert call(monkeypatch, *given, *outputs) == 2
                    assert "reads or writes this file" in capsys.readouterr().err
    same = ("--out", tmp_path / "o.json", "--overlay", tmp_path / "o.json")
    assert call(monkeypatch, *arguments, *same) == 2
    assert {name: path.read_bytes() for name, path in inputs.items()} == before
    assert not (tmp_path / "o.json").exists()


def test_outputs_that_are_no_regular_files(case, tmp_path, monkeypatch, capsys):
    """A link stays one, and what it points to gets the result; a device is written through; a FIFO
    is refused; permissions stay.
    """
    arguments, _ = case
    assert call(monkeypatch, *arguments, "--out", tmp_path / "o.json") == 0
    expected = (tmp_path / "o.json").read_bytes()
    (tmp_path / "o.json").chmod(0o600)
    (tmp_path / "target.json").touch()
    (tmp_path / "link.json").symlink_to("target.json")
    for name in ("o.json", "link.json"):
        assert call(monkeypatch, *arguments, "--out", tmp_path / name) == 0
    assert stat.S_IMODE((tmp_path / "o.json").stat().st_mode) == 0o600
    assert (tmp_path / "link.json").is_symlink()
    assert (tmp_path / "target.json").read_bytes() == expected
    os.mkfifo(tmp_path / "fifo")
    assert call(monkeypatch, *arguments, "--out", tmp_path / "fifo") == 2
    assert "not a regular file" in capsys.readouterr().err
    try:
        os.mknod(tmp_path / "null", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        (tmp_path / "null").write_bytes(b"")
    except PermissionError:
        pytest.skip("no right to make a device")
    for outputs in (("--out", "null"), ("--out", "o.json", "--overlay", "null")):
        given = [tmp_path / text if text[0] != "-" else text for text in outputs]
        assert call(monkeypatch, *arguments, *given) == 0
        assert (tmp_path / "null").is_char_device()


@pytest.mark.skipif(sys.platform != "linux", reason="names of bytes are Linux's")
def test_paths_that_are_not_utf8(case, tmp_path, monkeypatch, capsys):
    """Slides, candidates and outputs may be called anything; a model may not, in one line."""
    arguments, inputs = case
    folder = tmp_path / os.fsdecode(b"lat\xfcn")
    folder.mkdir()
    shutil.copy(inputs["a.tiff"], folder / "a.tiff")
    shutil.copy(inputs["in.json"], folder / "in.json")
    given = ("--slide", folder / "a.tiff", "--candidates", folder / "in.json")
    outputs = ("--out", folder / "o.json", "--overlay", folder / "o.png")
    for slide in (folder / "a.tiff", folder):
        given = ("--slide", slide, "--candidates", folder / "in.json")
        assert call(monkeypatch, arguments[0], *given, *outputs) == 0, capsys.readouterr().err
    shutil.copy(inputs["m.onnx"], folder / "m.onnx")
    assert call(monkeypatch, folder / "m.onnx", *given, *outputs) == 2
    assert "paths in UTF-8 alone" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["midog", "sqlite"])
def test_killed_at_any_time(kind, tiny, tmp_path):
    """Twenty times, on a folder of images: an earlier result stays whole or is replaced by the new
    one; at the end come the bytes of an uninterrupted run.
    """
    folder, _ = tiny
    (tmp_path / "out").mkdir()
    shutil.copy(folder / "a.tiff", tmp_path / "a.tiff")
    given, suffix = MAKERS[kind](tmp_path / f"in{SUFFIX[kind]}"), SUFFIX[kind]
    out, picture = tmp_path / "out" / f"o{suffix}", tmp_path / "out" / "o.png"
    usual = (folder / "model.onnx", "--slide", tmp_path, "--candidates", given)
    whole = (tmp_path / f"whole{suffix}", tmp_path / "whole.png")
    start = time.monotonic()
    done = run(*usual, "--out", whole[0], "--overlay", whole[1])
    seconds = time.monotonic() - start
    assert done.returncode == 0, done.stderr
    generator = random.Random(0)
    command = [sys.executable, HERE / "classify.py", *usual, "--out", out, "--overlay", picture]
    for _ in range(20):
        out.write_bytes(b"earlier")
        process = subprocess.Popen(
            list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        time.sleep(generator.uniform(0.3, 1) * seconds)
        process.kill()
        process.wait()
        assert out.read_bytes() in (b"earlier", whole[0].read_bytes())
        assert not picture.exists() or picture.read_bytes() == whole[1].read_bytes()
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert out.read_bytes() == whole[0].read_bytes()
    assert picture.read_bytes() == whole[1].read_bytes()


def test_ctrl_c_ends_with_one_line(tiny, tmp_path):
    """In the middle of the scoring, with threads that read: no traceback, no output."""
    folder, _ = tiny
    points = np.random.default_rng(0).uniform(0, 480, (30_000, 2)).tolist()
    out = tmp_path / "o.json"
    process = subprocess.Popen(
        [
            sys.executable,
            str(HERE / "classify.py"),
            str(folder / "model.onnx"),
            "--slide",
            str(folder / "a.tiff"),
            "--candidates",
            str(midog(tmp_path / "in.json", points)),
            "--out",
            str(out),
        ],
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stderr:
        if "a.tiff" in line:  # said when the scoring is about to begin
            break
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    error = process.stderr.read()
    assert process.wait(timeout=60) == 130 and "Traceback" not in error
    assert error.strip().splitlines()[-1].startswith("stopped") and not out.exists()


def test_an_unwritable_folder_is_found_before_the_scoring(case, tmp_path, monkeypatch, capsys):
    arguments, _ = case
    monkeypatch.setattr(reading, "score", lambda *_, **__: pytest.fail("scored"))
    with mounted(tmp_path / "ro", "ro") as disk:
        for outputs in (("--out", disk / "o"), ("--out", tmp_path / "o", "--overlay", disk / "o")):
            assert call(monkeypatch, *arguments, *outputs) == 2
            assert "not writable" in capsys.readouterr().err


def image(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(patches(1, seed=seed)[0]).save(path, resolution=40000, resolution_unit=3)
    return path


def places_of(tmp_path, names, slide):
    """find_images of candidates on these images."""
    rows = ["filename,x,y", *(f'"{name}",100,100' for name in names)]
    (tmp_path / "c.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return match.find_images(formats.read_candidates(tmp_path / "c.csv"), slide)[0]


def test_candidates_belong_to_a_slide_by_its_path(tmp_path):
    one, two = image(tmp_path / "one" / "a.tiff"), image(tmp_path / "two" / "a.tiff")
    for names in (
        ("one/a.tiff", "two/a.tiff"),
        ("one\\a.tiff", "two\\a.tiff"),
        (str(one), str(two)),
        ("C:\\s\\one\\a.tiff", "C:\\s\\two\\a.tiff"),
        ("/elsewhere/one/a.tiff", "/elsewhere/two/a.tiff"),
    ):
        assert places_of(tmp_path, names, tmp_path) == [one, two], names
        assert places_of(tmp_path, names, one) == [one, None], names
        assert places_of(tmp_path, names, two) == [None, two], names
    twice = ("one/a.tiff", "one\\a.tiff")  # one image, spelt in two ways
    assert places_of(tmp_path, twice, one) == places_of(tmp_path, twice, tmp_path) == [one, one]
    # The image of the folder itself, and one of the same name below it.
    top = image(tmp_path / "a.tiff")
    assert places_of(tmp_path, ("a.tiff", "one/a.tiff"), one) == [None, one]
    assert places_of(tmp_path, ("a.tiff", "one/a.tiff"), tmp_path) == [top, one]


def test_candidates_belong_to_a_slide_by_its_name_if_only_one_has_it(tmp_path):
    slide = image(tmp_path / "data" / "a.tiff")
    for names, expected in (
        (("elsewhere/a.tiff", "b.tiff"), [slide, None]),
        (("C:\\slides\\a.tiff", "C:\\slides\\b.tiff"), [slide, None]),
        (("a.svs", "b.svs"), [slide, None]),
        (("a", "b"), [slide, None]),
        (("a.ome.tif", "b.tiff"), [slide, None]),
    ):
        assert places_of(tmp_path, names, slide) == expected, names
    for names, text in (
        (("x/a.tiff", "y/a.tiff"), "either could be this slide"),
        (("a.svs", "a.png"), "either could be this slide"),
        (("b.tiff",), "no candidates on it, only on b.tiff"),
        (("b.tiff", "c.tiff"), "no candidates on it, only on b.tiff and 1 more"),
    ):
        with pytest.raises(common.UserError, match=text):
            places_of(tmp_path, names, slide)


def test_in_a_folder_only_images_are_taken_for_slides(tmp_path):
    folder = tmp_path / "data"
    slide = image(folder / "a.tiff")
    for name in ("a.csv", "a.json", "a.txt"):
        (folder / name).write_text("no image")
    assert places_of(tmp_path, ("a.svs",), folder) == [slide]
    assert places_of(tmp_path, ("a",), folder) == [slide]
    image(folder / "sub" / "a.png")
    for names, text in (
        (("a.svs",), "several files under"),
        (("x/a.tiff", "y/a.tiff"), "would both be"),
    ):
        with pytest.raises(common.UserError, match=text):
            places_of(tmp_path, names, folder)


def test_relabel_that_cannot_be_is_found_before_the_scoring(tiny, tmp_path, monkeypatch):
    folder, _ = tiny
    database = sqlite3.connect(sqlite(tmp_path / "in.sqlite"))
    database.execute("UPDATE Classes SET name = 'cell' WHERE uid = 2")
    database.commit()
    database.close()
    monkeypatch.setattr(reading, "score", lambda *_, **__: pytest.fail("scored"))
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "classify.py",
            *map(
                str,
                (
                    folder / "model.onnx",
                    "--slide",
                    folder / "a.tiff",
                    "--candidates",
                    tmp_path / "in.sqlite",
                    "--out",
                    tmp_path / "out.sqlite",
                    "--relabel",
                    "--device",
                    "cpu",
                ),
            ),
        ],
    )
    with pytest.raises(common.UserError, match="--relabel cannot tell"):
        classify.main()


def test_candidates_outside_and_unreadable_slides(tiny, tmp_path):
    folder, expected = tiny
    shutil.copy(folder / "a.tiff", tmp_path / "a.tiff")
    (tmp_path / "b.tiff").write_bytes((folder / "a.tiff").read_bytes()[:3000])
    out = tmp_path / "out.json"
    far = midog(tmp_path / "far.json", [*POINTS, (5000, 40)])
    usual = ("--slide", tmp_path / "a.tiff", "--candidates", far, "--out", out)
    assert "candidate 14 at (5000, 40) lies outside a.tiff (640 × 500 px)" in failure(
        folder / "model.onnx", *usual
    )
    assert not out.exists()
    done = run(folder / "model.onnx", *usual, "--skip")
    assert (
        done.returncode == 1
        and "candidate 14" in done.stderr
        and "1 candidates could not be scored" in done.stdout
    )
    written = json.loads(out.read_text())["annotations"]
    assert np.abs(np.array([a["probability"] for a in written[:4]]) - expected).max() <= 2e-5
    assert "probability" not in written[4]
    out.unlink()

    several = midog(tmp_path / "several.json", POINTS, images=("a.tiff", "b.tiff", "c.tiff"))
    usual = ("--slide", tmp_path, "--candidates", several, "--out", out)
    assert "c.tiff: no such file" in failure(folder / "model.onnx", *usual) and not out.exists()
    done = run(folder / "model.onnx", *usual, "--skip")
    assert done.returncode == 1 and "b.tiff" in done.stderr and "c.tiff" in done.stderr
    written = json.loads(out.read_text())["annotations"]
    assert ["probability" in a for a in written] == [True, False, False, True]


def test_no_candidates_is_no_error(tiny, tmp_path):
    folder, _ = tiny
    done = run(
        folder / "model.onnx",
        "--slide",
        folder / "a.tiff",
        "--candidates",
        midog(tmp_path / "in.json", []),
        "--out",
        tmp_path / "out.json",
        "--overlay",
        tmp_path / "o.png",
    )
    assert done.returncode == 0, done.stderr
    assert (
        "0 candidates scored" in done.stdout
        and json.loads((tmp_path / "out.json").read_text())["annotations"] == []
    )


def test_names_cannot_leave_the_folder(tiny, tmp_path):
    folder, _ = tiny
    (tmp_path / "inner").mkdir()
    shutil.copy(folder / "a.tiff", tmp_path / "secret.tiff")
    with pytest.raises(common.UserError, match="leads out"):
        formats.read_candidates(midog(tmp_path / "in.json", images=("../secret.tiff",)))
    for name in ("/secret.tiff", "C:\\secret.tiff", str(tmp_path / "secret.tiff")):
        found = formats.read_candidates(midog(tmp_path / "in.json", images=(name,)))
        paths, missing = match.find_images(found, tmp_path / "inner")
        assert missing and all(tmp_path / "inner" in path.parents for path in missing)


@pytest.mark.parametrize("kind", MAKERS)
def test_full_disk_and_read_only_folder_leave_nothing(kind, tiny, tmp_path):
    folder, _ = tiny
    given = MAKERS[kind](tmp_path / f"in{SUFFIX[kind]}")
    usual = ("--slide", folder / "a.tiff", "--candidates", given, "--out")
    with mounted(tmp_path / "small", "size=4k") as disk:
        (disk / "full").write_bytes(bytes(4096))
        assert "the disk is full" in failure(folder / "model.onnx", *usual, disk / "out")
        assert [path.name for path in disk.iterdir()] == ["full"]
    with mounted(tmp_path / "ro", "ro") as disk:
        assert "not writable" in failure(folder / "model.onnx", *usual, disk / "out")


def test_a_full_disk_spoils_no_older_file(tiny, tmp_path):
    """An earlier result stays as it was if there is no room for the new one; an overlay too."""
    folder, _ = tiny
    usual = ("--slide", folder / "a.tiff", "--candidates", midog(tmp_path / "in.json"))
    with mounted(tmp_path / "small", "size=8k") as disk:
        (disk / "o.png").write_bytes(b"old" * 1000)
        assert "the disk is full" in failure(
            folder / "model.onnx",
            *usual,
            "--out",
            tmp_path / "out.json",
            "--overlay",
            disk / "o.png",
        )
        assert (disk / "o.png").read_bytes() == b"old" * 1000 and len(list(disk.iterdir())) == 1


# ---------------------------------------------------------------- resolution


def test_resolution_rules():
    def resolution(mpp, mixed=None):
        return reading.resolution({"mpp": 0.25, "mixed_mpp": mixed}, mpp)

    assert resolution(0.26) == (None, "0.26 µm/px, read as it is (model: 0.25)", None)
    assert resolution(0.2252)[::2] == (None, None)
    assert resolution(0.5) == (0.25, "0.5 µm/px, resampled to the model's 0.25", None)
    target, note, warning = resolution(None)
    assert target is None and "unknown" in note and "taken for the model's 0.25" in warning
    unknown = reading.resolution({"mpp": None}, 0.5)
    assert unknown[::2] == (None, None) and "does not know" in unknown[1]
    mixed = {"mpp": None, "mixed_mpp": {"0.25": 3, "0.5": 4}}
    for mpp, doubt in ((0.25, None), (0.23, None), (0.54, None), (1.0, "never trained at 1 µm/px")):
        target, note, warning = reading.resolution(mixed, mpp)
        assert target is None and "model: 0.25 to 0.5 µm/px, as scanned" in note
        assert (warning or "").endswith(doubt or "")
    assert reading.resolution(mixed, None)[2] == "its µm/px is unknown"


def test_an_unknown_scale_is_said_loudly(case, tmp_path, monkeypatch, capsys):
    """Never taken for the model's without a word; --mpp ends the doubt."""
    arguments, inputs = case
    Image.open(inputs["a.tiff"]).save(tmp_path / "a.png")
    usual = (arguments[0], "--slide", tmp_path / "a.png", *arguments[3:], "--out", tmp_path / "o")
    text = (tmp_path / "in.json").read_text().replace("a.tiff", "a.png")
    (tmp_path / "in.json").write_text(text)
    assert call(monkeypatch, *usual) == 0
    assert (
        "warning: a.png: its µm/px is unknown and taken for the model's 0.25; at another scale "
        "every probability is wrong (--mpp gives the µm/px)" in capsys.readouterr().err
    )
    for mpp in (0.25, 0.5):
        assert call(monkeypatch, *usual, "--mpp", mpp) == 0
        assert "warning" not in capsys.readouterr().err


def test_a_look_at_the_patches(case, tmp_path, monkeypatch, capsys):
    """Places on glass, as with a wrong origin or unit: one line with counts and the cause."""
    arguments, _ = case
    glass = np.full((900, 900, 3), 245, np.uint8)
    glass[:100] = np.asarray(Image.open(tmp_path / "a.tiff"))[:100, :300].repeat(3, axis=1)
    Image.fromarray(glass).save(tmp_path / "a.tiff", resolution=40000, resolution_unit=3)
    points = np.random.default_rng(0).uniform(300, 880, (30, 2)).tolist()
    midog(tmp_path / "in.json", points)
    assert call(monkeypatch, *arguments, "--out", tmp_path / "o.json") == 0
    assert "warning: of 30 patches looked at, 30 are blank" in capsys.readouterr().err
    midog(tmp_path / "in.json")
    assert call(monkeypatch, *arguments, "--out", tmp_path / "o.json") == 0


def test_a_model_of_mixed_scales_says_so(tmp_path, tiny, monkeypatch, capsys):
    folder, _ = tiny
    mixed = {"mpp": None, "mixed_mpp": {"0.25": 3, "0.5": 4}}
    write_model(tmp_path / "m.onnx", classifier("gelu"), metadata=mixed)
    assert call(monkeypatch, tmp_path / "m.onnx") == 0
    assert "µm/px mixed (0.25: 3 images, 0.5: 4 images)" in capsys.readouterr().out
    pixels = np.asarray(Image.open(folder / "a.tiff"))
    tiled(tmp_path / "a.tiff", pixels, mpp=1.0)
    given = ("--slide", tmp_path / "a.tiff", "--candidates", midog(tmp_path / "in.json"))
    assert call(monkeypatch, tmp_path / "m.onnx", *given, "--out", tmp_path / "o.json") == 0
    error = capsys.readouterr().err
    assert "warning: a.tiff: the model was never trained at 1 µm/px" in error


def test_a_coarser_slide_is_resampled_and_said_so(tiny, tmp_path):
    folder, _ = tiny
    Image.open(folder / "a.tiff").save(
        tmp_path / "a.tiff", resolution=20000, resolution_unit=3
    )  # 0.5 µm/px
    usual = ("--candidates", midog(tmp_path / "in.json"), "--out", tmp_path / "out.json")
    done = run(folder / "model.onnx", "--slide", tmp_path / "a.tiff", *usual)
    assert "0.5 µm/px, resampled to the model's 0.25" in done.stderr
    resampled = read_scores("midog", tmp_path / "out.json")[0]
    classifier = Classifier(folder / "model.onnx", "cpu")
    crops = np.stack(
        [slides.read(tmp_path / "a.tiff", x, y, 224, mpp=0.25, source_mpp=0.5) for x, y in POINTS]
    )
    assert np.allclose(classifier(crops), resampled, atol=1e-6)
    done = run(folder / "model.onnx", "--slide", tmp_path / "a.tiff", *usual, "--mpp", "0.25")
    assert "read as it is" in done.stderr and not np.allclose(
        read_scores("midog", tmp_path / "out.json")[0], resampled
    )


@pytest.mark.parametrize("fit", ["resize", "pad"])
def test_patches_of_another_size(fit, tiny):
    folder, _ = tiny

    def read(patch):
        metadata = {"patch": patch, "size": 224, "fit": fit, "mpp": 0.25}
        return reading.SlideReader(metadata, folder / "a.tiff").read(300, 300)

    plain, smaller = read(224), read(128)
    assert smaller.shape == read(257).shape == (224, 224, 3)
    assert np.array_equal(smaller[48:176, 48:176], plain[48:176, 48:176]) == (fit == "pad")
    assert np.array_equal(read(256), plain) == (fit == "pad")


# ---------------------------------------------------------------- the class


def test_classifier_takes_arrays_tensors_and_threads(tiny):
    folder, _ = tiny
    classifier = Classifier(folder / "model.onnx", device="cpu", batch_size=8)
    images = patches(20)
    alone = np.concatenate([classifier(images[i : i + 1]) for i in range(20)])
    assert alone.shape == (20,) and alone.dtype == np.float32
    assert np.allclose(classifier(images), alone, atol=1e-6)
    assert np.allclose(classifier(torch.from_numpy(images)), alone, atol=1e-6)  # DLPack
    assert np.allclose(
        classifier(torch.from_numpy(images)[::2]), alone[::2], atol=1e-6
    )  # not contiguous
    assert classifier(images, output="embedding").shape == (20, 64)
    assert classifier(images[:0]).shape == (0,) and classifier(
        images[:0], output="embedding"
    ).shape == (0, 64)
    results = {}
    threads = [
        threading.Thread(target=lambda i=i: results.update({i: classifier(images[i : i + 5])}))
        for i in range(8)
    ]
    [t.start() for t in threads], [t.join() for t in threads]
    assert all(np.allclose(results[i], alone[i : i + 5], atol=1e-6) for i in range(8))
    for wrong in (
        images.astype(np.float32),
        images[:, :200],
        images[0],
        images.transpose(0, 3, 1, 2),
    ):
        with pytest.raises(ValueError, match="this model takes"):
            classifier(wrong)
    with pytest.raises(common.UserError, match="no output"):
        classifier(images, output="logits")


def near(a, b):
    return np.allclose(a, b, atol=1e-6)


def test_score_is_what_the_command_writes_and_what_training_reads(tiny, tmp_path):
    """At the borders too, from a path, an open slide and an array, in any order of the cells."""
    folder, expected = tiny
    classifier = Classifier(folder / "model.onnx", "cpu")
    pixels = np.asarray(Image.open(folder / "a.tiff"))
    tiled(tmp_path / "a.svs.tif", pixels, mpp=0.25)
    x, y = np.array(POINTS).T
    given, out = midog(tmp_path / "in.json"), tmp_path / "out.json"
    done = run(
        folder / "model.onnx", "--slide", folder / "a.tiff", "--candidates", given, "--out", out
    )
    assert done.returncode == 0, done.stderr
    written = read_scores("midog", out)[0]
    with openslide.OpenSlide(tmp_path / "a.svs.tif") as slide:
        for image, mpp in ((folder / "a.tiff", None), (slide, None), (pixels, 0.25)):
            probability = classifier.score(image, x, y, mpp=mpp)
            assert probability.dtype == np.float32 and near(probability, expected)
            assert near(probability, written)
            assert near(classifier.score(image, x[::-1], y[::-1], mpp=mpp), probability[::-1])
    table = data.load_dataset(midog(tmp_path / "train.json"), images=folder)
    assert near(classifier(Patches(table).read(np.arange(4))), written)
    assert near(classifier.score(pixels, POINTS[0][0], POINTS[0][1], 0.25), written[:1])
    assert classifier.score(pixels, [], [], 0.25).shape == (0,)


def test_one_image_in_many_kinds_of_file_is_scored_alike(tiny, tmp_path):
    """Colour in grey planes, µm/px in OME-XML and ImageJ's words, turned files, several pages."""
    folder, _ = tiny
    pixels = np.asarray(Image.open(folder / "a.tiff"))
    scale = {"PhysicalSizeX": 0.25, "PhysicalSizeY": 0.25}
    turned = {"extratags": [(274, "H", 1, 6, True)], "photometric": "rgb"}
    centimetre = {"resolution": (40000, 40000), "resolutionunit": "CENTIMETER"}
    tifffile.imwrite(
        tmp_path / "planes.ome.tif",
        np.moveaxis(pixels, 2, 0),
        tile=(256, 256),
        photometric="minisblack",
        metadata={"axes": "CYX", **scale},
    )
    tifffile.imwrite(
        tmp_path / "ome.ome.tif",
        pixels,
        tile=(256, 256),
        photometric="rgb",
        metadata={"axes": "YXS", **scale},
    )
    tifffile.imwrite(
        tmp_path / "ij.tif", pixels, imagej=True, resolution=(4, 4), metadata={"unit": "um"}
    )
    tifffile.imwrite(tmp_path / "turned.tif", pixels, tile=(256, 256), **turned, **centimetre)
    pages = np.stack([pixels, 255 - pixels])
    tifffile.imwrite(tmp_path / "pages.tif", pages, photometric="rgb", **centimetre)
    warnings = {"turned.tif": "the orientation tag 6", "pages.tif": "2 images; only the first"}
    given = tmp_path / "in.csv"
    given.write_text("x,y\n" + "".join(f"{x},{y}\n" for x, y in POINTS))
    expected = None
    for slide in (folder / "a.tiff", *sorted(tmp_path.glob("*.tif"))):
        out = tmp_path / f"{slide.name}.csv"
        done = run(folder / "model.onnx", "--slide", slide, "--candidates", given, "--out", out)
        assert done.returncode == 0 and "unknown" not in done.stderr, done.stderr
        with open(out, newline="") as file:
            scores = [float(row["probability"]) for row in csv.DictReader(file)]
        if expected is None:
            expected = scores
        assert near(scores, expected), slide.name
        assert warnings.get(slide.name, "") in done.stderr
        said = f"warning: {slide.name} h" in done.stderr
        assert said == (slide.name in warnings)


def test_score_of_a_coarser_slide_is_what_training_at_another_resolution_reads(tiny, tmp_path):
    folder, _ = tiny
    classifier = Classifier(folder / "model.onnx", "cpu")
    pixels = np.asarray(Image.open(folder / "a.tiff"))
    tiled(tmp_path / "a.tiff", pixels, mpp=0.5)
    x, y = np.array(POINTS).T
    table = data.load_dataset(midog(tmp_path / "train.json"), images=tmp_path)
    expected = classifier(Patches(table, mpp=0.25).read(np.arange(4)))
    with openslide.OpenSlide(tmp_path / "a.tiff") as slide:
        for image, mpp in ((tmp_path / "a.tiff", None), (slide, None), (pixels, 0.5)):
            assert near(classifier.score(image, x, y, mpp=mpp), expected)
        assert not near(classifier.score(slide, x, y, mpp=0.25), expected)


def test_score_from_several_threads(tiny):
    folder, _ = tiny
    classifier = Classifier(folder / "model.onnx", "cpu", batch_size=4)
    generator = np.random.default_rng(0)
    x, y = generator.uniform(0, 640, 40), generator.uniform(0, 500, 40)
    alone = classifier.score(folder / "a.tiff", x, y)
    with ThreadPoolExecutor(6) as pool:
        parts = pool.map(lambda i: classifier.score(folder / "a.tiff", x[i::6], y[i::6]), range(6))
        for i, part in enumerate(parts):
            assert near(part, alone[i::6])


def test_score_refuses_what_would_be_wrong(tiny, tmp_path):
    folder, _ = tiny
    classifier = Classifier(folder / "model.onnx", "cpu")
    pixels = np.asarray(Image.open(folder / "a.tiff"))
    with pytest.raises(common.UserError, match="µm/px is unknown; give mpp="):
        classifier.score(pixels, 100, 100)
    with pytest.raises(common.UserError, match=r"\(5000, 3\) lies outside"):
        classifier.score(folder / "a.tiff", [100, 5000], [100, 3])
    with pytest.raises(common.UserError, match="no such image"):
        classifier.score(tmp_path / "none.tiff", 100, 100)
    for wrong in ((np.nan, 100), ([1, 2], [1]), ([[1]], [[1]])):
        with pytest.raises(ValueError, match="x and y must be"):
            classifier.score(folder / "a.tiff", *wrong)
    for wrong in (pixels[..., 0], pixels / 255):
        with pytest.raises(ValueError, match=r"uint8 \[H, W, 3\] is needed"):
            classifier.score(wrong, 100, 100, mpp=0.25)
    with pytest.raises(TypeError, match="is no slide"):
        classifier.score(object(), 100, 100)


def test_a_classifier_says_how_many_px_to_read(tiny, tmp_path):
    folder, _ = tiny
    write_model(tmp_path / "m.onnx", classifier("gelu"), metadata={"patch": 128})
    model = Classifier(tmp_path / "m.onnx", device="cpu")
    assert (model.patch, model.size) == (128, 224)
    assert model.score(folder / "a.tiff", 300, 300).shape == (1,)


def test_gpus_by_any_name_of_their_device(tmp_path):
    for name in ("nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    assert not devices.nvidia_device(tmp_path)
    for name in ("nvidia3", "dxg"):
        (tmp_path / name).touch()
        assert devices.nvidia_device(tmp_path)
        (tmp_path / name).unlink()


def test_cuda_that_is_not_obtained_is_an_error(tiny):
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    folder, _ = tiny
    with pytest.raises(common.UserError, match="device cuda"):
        Classifier(folder / "model.onnx", device="cuda")
    classifier = Classifier(folder / "model.onnx", device="auto")
    assert classifier.device == "cpu" and "CPU" in classifier.note


def test_a_session_that_fell_back_is_an_error(tiny, monkeypatch):
    """The provider is listed, its libraries do not load, ONNX Runtime takes the CPU and says
    nothing.
    """
    folder, _ = tiny
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(
        devices.onnxruntime,
        "get_available_providers",
        lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"],
    )
    start = devices.start
    monkeypatch.setattr(
        devices, "start", lambda path, _, threads: start(path, ["CPUExecutionProvider"], threads)
    )
    with pytest.raises(common.UserError, match="did not load"):
        Classifier(folder / "model.onnx", device="cuda")


def test_model_alone_is_described(tiny):
    folder, _ = tiny
    done = run(folder / "model.onnx")
    assert done.returncode == 0
    for text in ("licence", "redistribution: yes", "0.25 µm/px", "threshold", "against torch"):
        assert text in done.stdout


def test_a_model_that_does_not_know_its_resolution_is_described(tmp_path):
    write_model(tmp_path / "m.onnx", classifier("gelu"), metadata={"mpp": None})
    assert (
        "µm/px unknown" in Classifier(tmp_path / "m.onnx", device="cpu", warm_up=False).describe()
    )


def test_foreign_and_damaged_models(tiny, tmp_path):
    folder, _ = tiny
    foreign = onnx.load(folder / "model.onnx")
    del foreign.metadata_props[:]
    onnx.save(foreign, tmp_path / "foreign.onnx")
    assert "not a model exported by export.py" in failure(tmp_path / "foreign.onnx")
    (tmp_path / "cut.onnx").write_bytes((folder / "model.onnx").read_bytes()[:5000])
    assert "cannot load it" in failure(tmp_path / "cut.onnx")
    write_model(tmp_path / "m.onnx", classifier("gelu"), inline=False)
    whole = (tmp_path / "m.onnx.data").read_bytes()
    assert run(tmp_path / "m.onnx").returncode == 0
    for broken in (whole[: len(whole) // 2], whole[:-1], b""):
        (tmp_path / "m.onnx.data").write_bytes(broken)
        assert "both files again" in failure(tmp_path / "m.onnx")
    (tmp_path / "m.onnx.data").write_bytes(whole[:-32] + b"x" * 32)
    assert "another export" in failure(tmp_path / "m.onnx")
    (tmp_path / "m.onnx.data").unlink()
    assert "both files again" in failure(tmp_path / "m.onnx")


def with_metadata(model, path, **changes):
    """A copy of a model whose metadata is this text; None: without it."""
    proto = onnx.load(model)
    props = {prop.key: prop.value for prop in proto.metadata_props} | changes
    del proto.metadata_props[:]
    for key, value in props.items():
        if value is not None:
            proto.metadata_props.add(key=key, value=value)
    onnx.save(proto, path)
    return path


DAMAGED = {
    "threshold": (
        '{"value": NaN, "rule": "f1"}',
        '{"value": 2, "rule": "f1"}',
        '{"value": -0.1, "rule": "f1"}',
        '{"value": "0.5", "rule": "f1"}',
        '{"value": true, "rule": "f1"}',
        '{"value": 0.5}',
        "0.5",
        None,
    ),
    "labels": ('["one"]', '["a", "a"]', '["a", ""]', '["a", 1]', '["a", "b\\u001b[2J"]', "5", None),
    "patch": ("0", '"x"', "224.5", "-224", "true", "1e9", None),
    "size": ("100", "null", '"224"', None),
    "mpp": ("0", '"x"', "NaN", "Infinity", "-0.25", "[0.25]", None),
    "input": ('"foo"', '"float"', "1", None),
    "fit": ('"crop"', None),
    "temperature": ("0", "NaN", '"1"', None),
    "normalisation": ("[[0, 0, 0], [0, 0, 0]]", "[[0.5, 0.5, 0.5]]", "null", None),
    "precision": ("16", None),
    "metrics": ("5", '{"a": {"\\u001b[2J": 1}}', None),
    "parity": ("[]", '{"source": "s", "wanted": "w", "measured": [{}]}', "null", None),
    "licence": ("[1]", None),
    "encoder": ("{", "[" * 100_000),
    "mixed_mpp": ('{"0": 1}', '{"x": 1}', '{"0.25": "3"}', "5", "{}"),
}


@pytest.mark.parametrize("key", DAMAGED)
def test_damaged_metadata_is_refused(key, tiny, tmp_path):
    """What it says decides how slides are read and what is called a mitotic figure."""
    folder, _ = tiny
    for value in DAMAGED[key]:
        path = with_metadata(folder / "model.onnx", tmp_path / "x.onnx", **{key: value})
        with pytest.raises(common.UserError, match="its metadata is damaged .*; export it again"):
            Classifier(path, "cpu").describe()


def test_damaged_names_of_weights_are_refused(tiny, tmp_path):
    """The name of the .data file never leads to another folder."""
    folder, _ = tiny
    (tmp_path / "secret").write_bytes(bytes(100))
    for name in ('"../secret"', '"/etc/passwd"', '""', '".."', "5", '"a\\\\b"', '"a/b"'):
        path = tmp_path / "x.onnx"
        with_metadata(folder / "model.onnx", path, data_bytes="100", data_name=name)
        with pytest.raises(common.UserError, match="data_name"):
            Classifier(path, "cpu")
    for identity in ('"xy"', "null", "5", '"' + "g" * 64 + '"'):
        with_metadata(folder / "model.onnx", path, data_bytes="100", export_id=identity)
        with pytest.raises(common.UserError, match="export_id"):
            Classifier(path, "cpu")
    for size in ("-5", "1.5", '"x"'):
        with_metadata(folder / "model.onnx", path, data_bytes=size)
        with pytest.raises(common.UserError, match="data_bytes"):
            Classifier(path, "cpu")
    with_metadata(folder / "model.onnx", path, data_bytes="5")
    assert "both files again" in failure(path)


def test_overlay(tiny, tmp_path):
    folder, _ = tiny
    done = run(
        folder / "model.onnx",
        "--slide",
        folder / "a.tiff",
        "--candidates",
        midog(tmp_path / "in.json"),
        "--out",
        tmp_path / "out.json",
        "--overlay",
        tmp_path / "o.png",
        "--threshold",
        "0.5",
    )
    assert done.returncode == 0, done.stderr
    drawn = np.asarray(Image.open(tmp_path / "o.png"))
    assert drawn.shape == (500, 640, 3)
    colours = [tuple(c) for c in formats.COLOURS.values()]
    assert any((drawn == c).all(axis=-1).any() for c in colours)


def test_overlay_where_the_first_slide_failed(tiny, tmp_path):
    folder, _ = tiny
    shutil.copy(folder / "a.tiff", tmp_path / "b.tiff")
    job = plan.Plan()
    for row, path in enumerate((tmp_path / "b.tiff", folder / "a.tiff")):
        job.add_reader({"mpp": 0.25, "patch": 224}, path, None)
        job.add_cell(row, row, 150.0, 160.0)
    classify.overlay(tmp_path / "none.png", job, np.array([np.nan, np.nan]), 0.5, ["no", "yes"])
    assert not (tmp_path / "none.png").exists()
    (tmp_path / "b.tiff").unlink()
    classify.overlay(tmp_path / "o.png", job, np.array([np.nan, 0.7]), 0.5, ["no", "yes"])
    assert Image.open(tmp_path / "o.png").size == (350, 360)


# ---------------------------------------------------------------- without torch


def test_no_torch(tiny, tmp_path):
    """The command in a process that has no torch, onnx or data of the project to import."""
    folder, expected = tiny
    blocker = (
        "import sys, runpy\n"
        "class No:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('torch', 'onnx', 'models', 'data', 'scipy', "
        "'matplotlib'):\n"
        "            raise ImportError('blocked: ' + name)\n"
        "sys.meta_path.insert(0, No())\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            blocker,
            str(HERE / "classify.py"),
            str(folder / "model.onnx"),
            "--slide",
            str(folder / "a.tiff"),
            "--candidates",
            str(midog(tmp_path / "in.json")),
            "--out",
            str(tmp_path / "out.json"),
        ],
        capture_output=True,
        text=True,
        cwd=HERE,
    )
    assert done.returncode == 0, done.stderr
    assert np.abs(np.array(read_scores("midog", tmp_path / "out.json")[0]) - expected).max() <= 2e-5


@pytest.mark.slow
def test_fresh_environment(tiny, tmp_path):
    """requirements-classify.txt alone is enough."""
    folder, expected = tiny
    python = tmp_path / "env" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "env")], check=True)
    subprocess.run(
        [str(python), "-m", "pip", "install", "-q", "-r", str(HERE / "requirements-classify.txt")],
        check=True,
    )
    for kind, make in MAKERS.items():
        out = tmp_path / f"out{SUFFIX[kind]}"
        done = subprocess.run(
            [
                str(python),
                str(HERE / "classify.py"),
                str(folder / "model.onnx"),
                "--slide",
                str(folder / "a.tiff"),
                "--candidates",
                str(make(tmp_path / f"in{SUFFIX[kind]}")),
                "--out",
                str(out),
                "--overlay",
                str(tmp_path / "o.png"),
            ],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert np.abs(np.array(read_scores(kind, out)[0]) - expected).max() <= 2e-5
    assert subprocess.run([str(python), "-c", "import torch"], capture_output=True).returncode != 0


@pytest.mark.skipif("MITOSIS_REALDATA" not in os.environ, reason="MITOSIS_REALDATA is not set")
def test_a_real_slide(tiny, tmp_path):
    folder, _ = tiny
    slide = Path(os.environ["MITOSIS_REALDATA"]) / "slides" / "CMU-1-Small-Region.svs"
    given = midog(
        tmp_path / "in.json",
        [(500, 600), (1200, 900), (2219, 2966), (-2, -5)],
        images=(slide.name,),
    )
    done = run(
        folder / "model.onnx",
        "--slide",
        slide,
        "--candidates",
        given,
        "--out",
        tmp_path / "out.json",
        "--overlay",
        tmp_path / "o.png",
    )
    assert done.returncode == 0, done.stderr
    assert (
        "0.499 µm/px, resampled to the model's 0.25" in done.stderr
        and "4 candidates scored" in done.stdout
    )
    assert max(Image.open(tmp_path / "o.png").size) <= 2000
