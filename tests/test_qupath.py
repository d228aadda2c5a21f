"""QuPath's files and the scripts for it, without QuPath: GeoJSON as its source code writes it, and
plain Groovy with a stand-in for its functions.
"""

import copy
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from onnx_models import METADATA, classifier, patches, register, write_model
from PIL import Image

from dataset import formats
from onnx_model import reading, session

HERE = Path(__file__).resolve().parent.parent
SCRIPTS = HERE / "examples" / "qupath"
GROOVY = pytest.mark.skipif(
    not (shutil.which("groovy") and shutil.which("java")), reason="no Groovy"
)
SIDE = 400  # px of the image


def qupath_json(value):
    """JSON as QuPath's Gson writes it: no spaces, but in coordinates and colours "[1, 2.5]"."""
    if isinstance(value, dict):
        inner = (
            f"{json.dumps(key, ensure_ascii=False)}:{qupath_json(v)}" for key, v in value.items()
        )
        return "{" + ",".join(inner) + "}"
    if isinstance(value, list):
        numbers = all(isinstance(v, (int, float)) for v in value)
        return "[" + (", " if numbers else ",").join(map(qupath_json, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


def feature(number, x, y, **properties):
    """A detection as QuPath writes it: coordinates of two decimals at most, closed outlines."""
    ring = [[x - 12.25, y - 9], [x + 12.25, y - 9.5], [x + 12.25, y + 9.5], [x - 12.25, y - 9]]
    return {
        "type": "Feature",
        "id": f"8f0e1c1a-0000-4000-8000-{number:012d}",
        "geometry": {"type": "Polygon", "coordinates": [ring]},
        "properties": {"objectType": "detection", **properties},
    }


def exported():
    """A file of everything that may stand beside a cell, and of what is no cell."""
    tumour = {"name": "Tumor", "color": [200, 0, 0]}
    measured = {"Area µm^2": 35.4375, "Circularity": 0.8, "Hämatoxylin: Mean": 1.25e-05, "n": 3}
    cell = feature(2, 200.5, 180, classification=tumour, isLocked=True, measurements=measured)
    cell["nucleusGeometry"] = copy.deepcopy(cell["geometry"])
    ellipse = feature(3, 390.75, 20, name="Zelle „drei“", color=[1, 2, 3])
    ellipse["geometry"] |= {"plane": {"c": -1, "z": 1, "t": 0}, "isEllipse": True}
    region = {
        "type": "Feature",
        "id": "8f0e1c1a-0000-4000-8000-000000000009",
        "geometry": {"type": "MultiPolygon", "coordinates": [[[[0, 0], [9, 0], [9, 9], [0, 0]]]]},
        "properties": {"objectType": "annotation", "metadata": {"Fall": "7"}},
    }
    return {
        "type": "FeatureCollection",
        "features": [feature(1, 50, 60), region, cell, ellipse],
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """An image, its detections, a model."""
    folder = tmp_path_factory.mktemp("qupath")
    Image.fromarray(patches(1, seed=4, size=SIDE)[0]).save(folder / "slide.png", dpi=(101600,) * 2)
    (folder / "slide.geojson").write_bytes(qupath_json(exported()).encode())
    with pytest.MonkeyPatch.context() as monkeypatch:
        register(monkeypatch)
        metadata = {"labels": ["hard negative", "mitotic figure"]}
        write_model(folder / "model.onnx", classifier("gelu"), metadata=metadata)
    return folder


def score(folder, out):
    words = [folder / "model.onnx", "--slide", folder / "slide.png"]
    words += ["--candidates", folder / "slide.geojson", "--out", out]
    subprocess.run(
        [sys.executable, HERE / "classify.py", *words], check=True, capture_output=True, cwd=folder
    )


def test_all_else_comes_back_byte_for_byte(made, tmp_path):
    """The scored file without what the scoring adds is the file that was exported."""
    before = (made / "slide.geojson").read_bytes()
    score(made, tmp_path / "scored.geojson")
    content = json.loads((tmp_path / "scored.geojson").read_text("utf-8"))
    scored = 0
    for new, old in zip(content["features"], exported()["features"]):
        properties = new["properties"]
        probability = properties.get("measurements", {}).pop("probability of mitotic figure", None)
        if probability is None:
            continue
        scored += 1
        label = int(probability >= 0.5)
        name = ("hard negative", "mitotic figure")[label]
        assert properties["classification"] == {
            "name": name,
            "color": list(formats.COLOURS[label]),
        }
        for key in ("classification", "measurements"):
            if key in old["properties"]:
                properties[key] = (
                    properties[key] if key == "measurements" else old["properties"][key]
                )
            else:
                del properties[key]
        if "classification" in old["properties"]:
            assert properties.pop("metadata") == {"class of the candidate": "Tumor"}
    assert scored == 3
    # QuPath's order of keys is kept where a key was there; new keys come last.
    assert qupath_json(content).encode() == before


def play(script, made, out, *arguments):
    done = subprocess.run(
        [
            *("groovy", str(HERE / "tests/qupath/stand_in.groovy"), str(script)),
            *(str(made / "slide.png"), "0.25", str(made / "slide.geojson"), str(out)),
            *map(str, arguments),
        ],
        capture_output=True,
        text=True,
        env={"JAVA_HOME": str(Path(shutil.which("java")).resolve().parent.parent), **os.environ},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(out.read_text("utf-8")), done.stdout


@GROOVY
def test_the_script_that_calls_classify(made, tmp_path):
    """Every detection gets its class and probability."""
    script, folder = SCRIPTS / "score_detections.groovy", cells_alone(made, tmp_path)
    own = (sys.executable, HERE, made / "model.onnx")
    left, said = play(script, folder, tmp_path / "out.json", *own)
    model = session.Classifier(made / "model.onnx", "cpu")
    cells = json.loads((tmp_path / "slide.geojson").read_text("utf-8"))["features"]
    x, y = zip(*map(centre, cells))
    expected = model.score(made / "slide.png", x, y)
    assert left["updates"] == 1 and "3 of 3 detections have a score" in said
    for cell, p in zip(cells, expected):
        name, colour, measurements = left["cells"][cell["id"]]
        label = int(p >= 0.5)
        assert name == model.labels[label]
        red, green, blue = formats.COLOURS[label]
        assert colour & 0xFFFFFF == red << 16 | green << 8 | blue
        assert measurements == {"probability of mitotic figure": pytest.approx(p, abs=1e-5)}


def cells_alone(made, folder):
    """A folder like `made` whose file holds detections alone, as the script exports them."""
    content = exported()
    del content["features"][1]
    (folder / "slide.geojson").write_text(qupath_json(content), encoding="utf-8")
    shutil.copy(made / "slide.png", folder)
    return folder


def centre(cell):
    xs, ys = zip(*cell["geometry"]["coordinates"][0])
    return (min(xs) + max(xs)) / 2, (min(ys) + max(ys)) / 2


@GROOVY
def test_the_script_that_calls_djl_reads_the_same_pixels(made, tmp_path):
    """Its patches are those of classify.py, at the border of the image too."""
    folder = cells_alone(made, tmp_path)
    text = (SCRIPTS / "score_with_djl.groovy").read_text("utf-8")
    assert text.count("/path/to/model.onnx") == 1
    (tmp_path / "script.groovy").write_text(text.replace("batch = 64", "batch = 2"), "utf-8")
    about = METADATA | {"labels": ["Normal", "Atypical"], "input": "uint8"}
    about["threshold"] = {"value": 0.15, "rule": "given"}
    props = {key: json.dumps(value) for key, value in about.items()}
    metadata = {"format": session.FORMAT, **props}
    (tmp_path / "out.json.metadata").write_text(json.dumps(metadata), encoding="utf-8")
    left, said = play(tmp_path / "script.groovy", folder, tmp_path / "out.json")
    cells = json.loads((tmp_path / "slide.geojson").read_text("utf-8"))["features"]
    reader = reading.SlideReader(about | {"size": 224, "patch": 224}, made / "slide.png")
    read = np.fromfile(tmp_path / "out.json.patches", np.uint8).reshape(-1, 224, 224, 3)
    assert len(read) == 3 and "3 detections have a score" in said
    for i, cell in enumerate(cells):
        assert np.array_equal(read[i], reader.read(*centre(cell))), i
        name, _, measurements = left["cells"][cell["id"]]
        assert measurements == {"probability of Atypical": pytest.approx(i / 10)}
        assert name == ("Normal", "Atypical")[i / 10 >= 0.15]


def test_the_readme_names_both_scripts():
    text = (SCRIPTS / "README.md").read_text("utf-8")
    assert set(re.findall(r"`(\w+\.groovy)`", text)) == {p.name for p in SCRIPTS.glob("*.groovy")}
