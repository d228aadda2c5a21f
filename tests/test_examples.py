"""What examples/ shows: the two-stage detector on demo images, and every line of Python that its
README has.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from onnx_models import classifier, patches, register, write_model
from PIL import Image

import data
from dataset import slides
from demo import synthetic

HERE = Path(__file__).resolve().parent.parent
sys.path.append(str(HERE / "examples"))
import two_stage_detector as detector

from onnx_model import session


@pytest.fixture(scope="module")
def tissue(tmp_path_factory):
    """Five demo images, one per domain: annotated; and a model that knows nothing, with the split
    of its run.
    """
    folder = tmp_path_factory.mktemp("examples")
    synthetic.build(folder / "demo", images_per_domain=1)
    with pytest.MonkeyPatch.context() as monkeypatch:
        register(monkeypatch)
        model = classifier("gelu")
    (folder / "run").mkdir()
    write_model(folder / "run" / "model.onnx", model)
    table = data.load_dataset(folder / "demo")
    split = data.make_split(table)
    split.save(folder / "run" / "split.json")
    return folder, table, split


def run(script, *arguments, folder=HERE):
    return subprocess.run(
        [sys.executable, str(HERE / "examples" / script), *map(str, arguments)],
        cwd=folder,
        capture_output=True,
        text=True,
    )


def points(path, mpp=0.25):
    """(x, y in px, probability, name) out of the challenge's JSON, which is in millimetres."""
    content = json.loads(path.read_text())
    assert content["type"] == "Multiple points" and content["version"] == {"major": 1, "minor": 0}
    rows = [
        (p["point"][0] * 1000 / mpp, p["point"][1] * 1000 / mpp, p["probability"], p["name"])
        for p in content["points"]
    ]
    assert all(len(p["point"]) == 3 for p in content["points"])
    return rows


# ---------------------------------------------------------------- the first stage


def test_the_first_stage_finds_the_figures(tissue):
    """In every domain's stain: nearly every mitotic figure lies near a candidate, and none is found
    twice.
    """
    _, table, _ = tissue
    for name in np.unique(table.image):
        x, y, score = detector.blobs(table.image_path(name), 0.25)
        figures = (table.image == name) & (table.label == 1)
        truth = np.stack([table.x[figures], table.y[figures]], axis=1)
        away = np.hypot(x[:, None] - truth[:, 0], y[:, None] - truth[:, 1])
        assert (away.min(axis=0) <= detector.MATCH / 0.25).mean() >= 0.9, name
        assert (np.diff(score) <= 0).all() and len(x) < 600
        apart = np.hypot(x[:, None] - x, y[:, None] - y)
        assert apart[~np.eye(len(x), dtype=bool)].min() >= detector.APART / 0.25


@pytest.mark.slow
def test_tiles_leave_no_trace(tmp_path):
    """A blob is found where it is, once, between two tiles too, and at any resolution; on glass
    there is none.
    """
    side, places = 2600, [(700, 700), (1856.5, 400.5), (1856, 1856), (30, 2570), (2560, 1300)]
    y, x = np.mgrid[0:side, 0:side].astype(np.float32)
    amount = sum(np.exp(-((x - a) ** 2 + (y - b) ** 2) / (2 * 12**2)) for a, b in places) + 0.4
    colours = np.exp(-amount[..., None] * np.array([0.65, 0.70, 0.29])) * 255
    Image.fromarray(colours.astype(np.uint8)).save(tmp_path / "a.png")
    for mpp in (0.25, 0.2):
        found = np.stack(detector.blobs(tmp_path / "a.png", mpp)[:2], axis=1)
        assert len(found) == len(places)
        away = np.hypot(*(found[:, None] - np.array(places)).transpose(2, 0, 1))
        assert away.min(axis=0).max() < 5, "px"
    Image.new("RGB", (600, 600), "white").save(tmp_path / "glass.png")
    assert len(detector.blobs(tmp_path / "glass.png", 0.25)[0]) == 0


def test_blur_is_nearly_a_gaussian():
    """Of a point: its sum and its width. Beside pixels that are not known (outside of the slide) as
    if these were as those that are."""
    image = np.zeros((201, 201), np.float32)
    image[100, 100] = 1
    distance = np.arange(201) - 100
    for sigma in (4, 12):
        spread = detector.blur(image, sigma)
        assert spread.sum() == pytest.approx(1, abs=1e-3)
        for axis in (0, 1):
            assert (spread.sum(axis=axis) @ distance**2) ** 0.5 == pytest.approx(sigma, rel=0.15)
    known = np.ones((201, 201), bool)
    known[:, 150:] = False
    flat = np.where(known, np.float32(0.7), np.float32(0))
    assert np.allclose(detector.blur(flat, 12, known)[:, :150], 0.7, atol=1e-4)
    assert detector.blur(flat, 12)[100, 149] < 0.5


# ---------------------------------------------------------------- how it is measured


def test_measures_against_brute_force():
    """Every threshold by itself: matched greedily, each figure once, and F1 by its definition."""
    generator = np.random.default_rng(0)
    images = []
    for _ in range(3):
        truth = generator.uniform(0, 300, (6, 2))
        near = truth[generator.integers(0, 6, 12)] + generator.normal(0, 15, (12, 2))
        x, y = np.concatenate([near, generator.uniform(0, 300, (10, 2))]).T
        images.append({"x": x, "y": y, "p": generator.random(len(x)), "truth": truth, "mpp": 0.25})
    scores, precision, recall, f1 = detector.curve(images, "p")
    for k, threshold in enumerate(scores):
        found = called = 0
        for one in images:
            left = one["truth"].tolist()
            for i in sorted(np.flatnonzero(one["p"] >= threshold), key=lambda i: -one["p"][i]):
                called += 1
                distances = [np.hypot(one["x"][i] - a, one["y"][i] - b) for a, b in left]
                if distances and min(distances) <= 30:
                    left.pop(int(np.argmin(distances)))
                    found += 1
        expected = found / called, found / 18, 2 * found / (called + 18)
        assert (precision[k], recall[k], f1[k]) == pytest.approx(expected)
        assert detector.at(images, "p", threshold) == pytest.approx(
            (f1[k], precision[k], recall[k])
        )
    assert detector.at(images, "p", detector.best(images, "p"))[0] == f1.max()
    assert detector.at(images, "p", 2.0) == (0, 0, 0)


# ---------------------------------------------------------------- the command


def test_the_command_measures_on_held_out_images(tissue, tmp_path):
    """What it writes, against the same computed from its own output: thresholds from validation
    images alone.
    """
    folder, table, split = tissue
    done = run(
        "two_stage_detector.py",
        folder / "run" / "model.onnx",
        "--data",
        folder / "demo",
        "--out",
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    held_out = np.unique(table.image[table.rows(split.test)])
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == [
        Path(n).stem for n in held_out
    ]
    result = json.loads((tmp_path / "detection.json").read_text())
    model, images = session.Classifier(folder / "run" / "model.onnx", "cpu"), []
    for name in held_out:
        x, y, probability, names = zip(*points(tmp_path / Path(name).stem / "mitotic-figures.json"))
        chosen = np.array(probability) >= result["both"]["threshold"]
        assert [n == "mitotic figure" for n in names] == chosen.tolist()
        crops = np.stack(
            [slides.read(table.image_path(name), a, b, 224) for a, b in zip(x[:20], y[:20])]
        )
        assert np.abs(model(crops) - probability[:20]).max() <= 1e-5
        figures = (table.image == name) & (table.label == 1)
        images.append(
            {
                "x": np.array(x),
                "y": np.array(y),
                "p": np.array(probability),
                "mpp": 0.25,
                "truth": np.stack([table.x[figures], table.y[figures]], axis=1),
            }
        )
    f1, precision, recall = detector.at(images, "p", result["both"]["threshold"])
    assert (result["both"]["f1"], result["both"]["recall"]) == pytest.approx((f1, recall))
    for name, one in zip(
        held_out, images
    ):  # the first stage's score is not in the file; its best threshold, again
        x, y, one["blob"] = detector.blobs(table.image_path(name), 0.25)
        assert np.allclose(x, one["x"]) and np.allclose(y, one["y"])
    best = max(
        detector.at(images, "blob", t)[0] for t in np.concatenate([one["blob"] for one in images])
    )
    assert result["first"]["f1"] == pytest.approx(best)
    assert result["candidates"] == sum(len(one["x"]) for one in images) and result["images"] == len(
        held_out
    )
    assert Image.open(tmp_path / "detection.png").width > 1000
    assert f"{result['first']['f1']:.3f}" in done.stdout and f"{f1:.3f}" in done.stdout


def test_the_command_on_a_slide_and_its_mistakes(tissue, tmp_path):
    folder, table, split = tissue
    held_out = table.image_path(table.image[table.rows(split.test)[0]])
    model, image = folder / "run" / "model.onnx", table.image_path(table.image[0])
    done = run("two_stage_detector.py", model, "--slide", image, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    rows = points(tmp_path / "out" / Path(image).stem / "mitotic-figures.json")
    mitotic = sum(name == "mitotic figure" for *_, name in rows)
    assert f"{len(rows)} candidates, {mitotic} mitotic figures" in done.stdout
    for arguments, text in (
        ([model], "--slide is needed"),
        ([tmp_path / "no.onnx", "--slide", image], "no such file"),
        ([model, "--slide", tmp_path / "no.svs"], "no such image"),
        ([model, "--data", tmp_path / "none"], "none"),
        ([model, "--data", folder / "demo", "--split", tmp_path / "no.json"], "no such file"),
        ([model, "--slide", image, "--mpp", 0], "between 0.01 and 100"),
        ([model, "--slide", image, "--mpp", -0.25], "between 0.01 and 100"),
        ([model, "--slide", image, "--mpp", "nan"], "between 0.01 and 100"),
        ([model, "--slide", image, tmp_path / f"{image.stem}.png"], "would replace the other's"),
        ([model, "--data", folder / "demo", "--slide", held_out], "would replace the other's"),
    ):
        done = run("two_stage_detector.py", *arguments, "--out", tmp_path / "not")
        assert done.returncode == 2 and text in done.stderr and "Traceback" not in done.stderr, (
            done.stderr
        )
    assert not (tmp_path / "not").exists()


@pytest.mark.slow
@pytest.mark.skipif("MITOSIS_REALDATA" not in os.environ, reason="MITOSIS_REALDATA is not set")
def test_the_command_on_a_real_slide(tissue, tmp_path):
    folder, _, _ = tissue
    slide = Path(os.environ["MITOSIS_REALDATA"]) / "slides" / "CMU-1-Small-Region.svs"
    done = run(
        "two_stage_detector.py", folder / "run" / "model.onnx", "--slide", slide, "--out", tmp_path
    )
    assert done.returncode == 0, done.stderr
    x, y, probability, _ = zip(*points(tmp_path / slide.stem / "mitotic-figures.json", mpp=0.499))
    assert (
        100 < len(x) < 20_000 and 0 <= min(x) and max(x) <= 2220 and 0 <= min(y) and max(y) <= 2967
    )
    assert np.isfinite(probability).all()


@pytest.mark.long
def test_the_second_stage_raises_f1(tmp_path):
    """From the demo dataset to detections: on held-out images both stages are better than the first
    at its best.
    """

    def python(*arguments):
        done = subprocess.run(
            [sys.executable, *map(str, arguments)], cwd=HERE, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr

    python("-m", "demo.synthetic", "--out", tmp_path / "demo")
    python(
        "train.py",
        "--data",
        tmp_path / "demo",
        "--lora",
        "--epochs",
        8,
        "--epoch-size",
        640,
        "--val-frac",
        0.25,
        "--lr",
        "2e-3",
        "--runs",
        tmp_path / "runs",
    )  # few steps, so a larger learning rate
    (run_folder,) = (path.parent for path in (tmp_path / "runs").rglob("metrics.json"))
    python("export.py", run_folder)
    python(
        "examples/two_stage_detector.py",
        run_folder / "model.onnx",
        "--data",
        tmp_path / "demo",
        "--out",
        tmp_path / "out",
    )
    result = json.loads((tmp_path / "out" / "detection.json").read_text())
    assert result["both"]["f1"] > result["first"]["f1"] + 0.1, result


# ---------------------------------------------------------------- the README


def blocks(language):
    return re.findall(
        rf"```{language}\n(.*?)```", (HERE / "examples" / "README.md").read_text(), re.DOTALL
    )


@pytest.fixture
def field(tissue, tmp_path, monkeypatch):
    """The files that the lines name, in the current folder, and places on the image."""
    folder, table, _ = tissue
    shutil.copy(folder / "run" / "model.onnx", tmp_path / "model.onnx")
    image = Image.open(table.image_path(table.image[0])).crop((0, 0, 300, 260))
    image.save(tmp_path / "field.tiff", resolution=40000, resolution_unit=3)
    monkeypatch.chdir(tmp_path)
    return np.array([[50.0, 60.0], [120.0, 200.0], [297.0, 3.0]])


def lines(about):
    (code,) = (block for block in blocks("python") if about in block and "score(" in block)
    return code


def module(monkeypatch, name, **content):
    """A package that is not installed here, as far as the lines use it."""
    for part in (name.split(".")[0], name):
        monkeypatch.setitem(sys.modules, part, types.SimpleNamespace(**content))


def expected_at(places):
    return session.Classifier("model.onnx", "cpu").score("field.tiff", *np.transpose(places))


def test_the_torchvision_lines(field):
    """A detection model of torchvision's own, with random weights."""
    torch.manual_seed(0)
    detector = torchvision.models.detection.fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None, weights_backbone=None, box_score_thresh=0.0, box_detections_per_img=9
    ).eval()
    boxes = []

    def detect(images):
        result = detector(images)
        boxes.append(result[0]["boxes"].numpy())
        return result

    names = {"detector": detect}
    exec(lines("torchvision"), names)
    assert len(boxes[0]) > 2
    centres = (boxes[0][:, :2] + boxes[0][:, 2:]) / 2
    assert np.allclose(names["probability"], expected_at(centres), atol=1e-6)
    names["detector"] = lambda images: [{"boxes": torch.zeros(0, 4)}]  # nothing detected
    exec(lines("torchvision"), names)
    assert names["probability"].shape == (0,)


def test_the_ultralytics_lines(field, monkeypatch):
    score = np.array([0.9, 0.5, 0.2])
    data = torch.from_numpy(np.column_stack([field - 25, field + 25, score, [0, 0, 1]]))
    boxes = types.SimpleNamespace(data=data)
    detect = lambda weights: lambda image: [types.SimpleNamespace(boxes=boxes)]  # noqa: E731
    module(monkeypatch, "ultralytics", YOLO=detect)
    names = {}
    exec(lines("ultralytics"), names)
    assert np.allclose(names["combined"], score * expected_at(field), atol=1e-6)


def test_the_stardist_lines(field, monkeypatch):
    module(monkeypatch, "csbdeep.utils", normalize=lambda pixels: pixels / 255)
    model = types.SimpleNamespace(
        predict_instances=lambda pixels: (None, {"points": field[:, ::-1]}),
    )
    stardist = types.SimpleNamespace(from_pretrained=lambda name: model)
    module(monkeypatch, "stardist.models", StarDist2D=stardist)
    names = {}
    exec(lines("stardist"), names)
    assert np.allclose(names["probability"], expected_at(field), atol=1e-6)


def test_the_cellpose_lines(field, monkeypatch):
    """Masks of squares around the places, with numbers that leave some out."""
    masks = np.zeros((260, 300), np.int32)
    centres = field.astype(int)
    for number, (x, y) in zip((1, 4, 9), centres):
        masks[y - 3 : y + 4, x - 2 : x + 3] = number
    cellpose = types.SimpleNamespace(eval=lambda pixels: (masks, None, None))
    models = types.SimpleNamespace(CellposeModel=lambda gpu: cellpose)
    module(monkeypatch, "cellpose", models=models)
    names = {}
    exec(lines("cellpose"), names)
    assert np.allclose(names["x"], centres[:, 0]) and np.allclose(names["y"], centres[:, 1])
    assert np.allclose(names["probability"], expected_at(centres), atol=1e-6)


def test_the_openvino_lines(tissue, tmp_path, monkeypatch):
    pytest.importorskip("openvino")
    folder, _, _ = tissue
    (code,) = (block for block in blocks("python") if "openvino" in block)
    (tmp_path / "model.onnx").write_bytes((folder / "run" / "model.onnx").read_bytes())
    model = session.Classifier(tmp_path / "model.onnx", "cpu")
    (tmp_path / "model.parity.json").write_text(json.dumps(model.metadata))
    np.save(tmp_path / "patches.npy", patches(5))
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code, names)
    expected = model(patches(5))
    assert np.abs(names["probability"] - expected).max() <= 1e-5
    assert names["mitotic"].tolist() == (expected >= model.threshold).tolist()


def test_every_block_is_python_and_every_flag_exists():
    for block in blocks("python"):
        compile(block, "README", "exec")
    text = (HERE / "examples" / "README.md").read_text()
    commands = re.findall(r"(?:^    |`)python (\S+\.py) ([^`\n]*)", text, re.MULTILINE)
    assert len(commands) >= 4
    for script, rest in commands:
        for flag in re.findall(r"--[a-z-]+", " ".join(shlex.split(rest, comments=True))):
            assert f'"{flag}"' in (HERE / script).read_text(), (script, flag)
