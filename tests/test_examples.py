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
from onnx_model import session
from reporting import detection
from scoring import blobs

HERE = Path(__file__).resolve().parent.parent


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
        found = blobs.find(table.image_path(name))
        figures = (table.image == name) & (table.label == 1)
        truth = np.stack([table.x[figures], table.y[figures]], axis=1)
        away = np.hypot(found.x[:, None] - truth[:, 0], found.y[:, None] - truth[:, 1])
        assert (away.min(axis=0) <= detection.RADIUS / 0.25).mean() >= 0.9, name
        assert len(found.x) < 600
        apart = np.hypot(found.x[:, None] - found.x, found.y[:, None] - found.y)
        assert apart[~np.eye(len(found.x), dtype=bool)].min() >= blobs.APART / 0.25


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
    scores = result["scores"]
    model = session.Classifier(folder / "run" / "model.onnx", "cpu")
    by_part = []
    for ids in (split.val, split.test):
        images = []
        for name in np.unique(table.image[table.rows(ids)]):
            first = blobs.find(table.image_path(name))
            figures = (table.image == name) & (table.label == 1)
            images.append(
                {
                    "x": first.x,
                    "y": first.y,
                    "score": first.score,
                    "probability": model.score(table.image_path(name), first.x, first.y),
                    "figures_x": table.x[figures],
                    "figures_y": table.y[figures],
                    "mpp": 0.25,
                    "tissue": first.tissue.area(0.25),
                }
            )
        by_part.append(images)
    validation, test = by_part
    for name, one in zip(held_out, test):
        x, y, probability, names = zip(*points(tmp_path / Path(name).stem / "mitotic-figures.json"))
        assert np.allclose(x, one["x"]) and np.allclose(y, one["y"])
        assert np.allclose(probability, one["probability"], atol=1e-5)
        chosen = np.array(probability) >= scores["classifier"]["threshold"]
        assert [n == "mitotic figure" for n in names] == chosen.tolist()
    for how in ("product", "logistic"):
        compared = dict(add_and_compare(validation, test, how))
        for name, ours in ((how, how), ("detector", "first stage"), ("classifier", "classifier")):
            for key in ("threshold", "f1", "precision", "recall"):
                assert scores[ours][key] == pytest.approx(compared[name][key], abs=1e-6)
    threshold = scores["classifier"]["threshold"]
    for one, (found, true) in zip(test, scores["classifier"]["counts"]):
        called = (one["probability"] >= threshold).sum()
        assert found == pytest.approx(called / one["tissue"], rel=1e-6)
        assert true == pytest.approx(len(one["figures_x"]) / one["tissue"])
    assert result["candidates"] == sum(len(one["x"]) for one in test)
    assert result["images"] == len(held_out)
    assert Image.open(tmp_path / "detection.png").width > 1000
    assert all(f"{values['f1']:.3f}" in done.stdout for values in scores.values())


def add_and_compare(validation, test, how):
    detection.add_combined(validation, test, how)
    return detection.compare(validation, test, how)


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
    f1 = {name: values["f1"] for name, values in result["scores"].items()}
    assert f1["classifier"] > f1["first stage"] + 0.1, result
    assert f1["logistic"] > max(f1["first stage"], f1["classifier"]) - 0.02, result


# ---------------------------------------------------------------- the README


def blocks(language):
    return re.findall(
        rf"```{language}\n(.*?)```", (HERE / "examples" / "README.md").read_text(), re.DOTALL
    )


REAL = pytest.mark.skipif("MITOSIS_REALDATA" not in os.environ, reason="no MITOSIS_REALDATA")


@pytest.fixture(params=["demo", pytest.param("real", marks=REAL)])
def field(tissue, tmp_path, monkeypatch, request):
    """The files that the lines name, in the current folder, and places on the image: of the demo,
    or of a real slide, whose µm/px the lines then give.
    """
    folder, table, _ = tissue
    shutil.copy(folder / "run" / "model.onnx", tmp_path / "model.onnx")
    mpp = 0.25
    if request.param == "demo":
        image = Image.open(table.image_path(table.image[0])).crop((0, 0, 300, 260))
    else:
        slide = Path(os.environ["MITOSIS_REALDATA"]) / "slides" / "CMU-1-Small-Region.svs"
        mpp = slides.microns_per_pixel(slide)
        image = Image.fromarray(slides.read(slide, 900, 1200, 300)[:260])
    image.save(tmp_path / "field.tiff", resolution=10_000 / mpp, resolution_unit=3)
    monkeypatch.chdir(tmp_path)
    said = f"mpp={slides.microns_per_pixel('field.tiff')}"
    monkeypatch.setattr(sys.modules[__name__], "scale", said)
    return np.array([[50.0, 60.0], [120.0, 200.0], [297.0, 3.0]])


scale = "mpp=0.25"  # what the lines must say of the field


def lines(about):
    (code,) = (block for block in blocks("python") if about in block and "score(" in block)
    return code.replace("mpp=0.25", scale)


def test_the_lines_of_each_detector_are_few():
    looped = [block for block in blocks("python") if "score(" in block]
    assert len(looped) == 4
    for block in looped:
        assert sum(bool(line.strip()) for line in block.splitlines()) <= 10


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


def node_modules():
    """The folder with onnxruntime-node, from $NODE_PATH or beside the checkout; None: not here."""
    if shutil.which("node") is None:
        return None
    for folder in (*os.environ.get("NODE_PATH", "").split(os.pathsep), HERE / "node_modules"):
        if folder and (Path(folder) / "onnxruntime-node").is_dir():
            return Path(folder).resolve()
    return None


@pytest.mark.skipif(node_modules() is None, reason="no node with onnxruntime-node ($NODE_PATH)")
@pytest.mark.parametrize("family", ["gelu", "dinov3", "swin"])
def test_the_lines_for_node(family, tmp_path, monkeypatch):
    """Fused attention, rotary positions and windows; the same probabilities as in Python."""
    register(monkeypatch)
    write_model(tmp_path / "model.onnx", classifier(family))
    model, images = session.Classifier(tmp_path / "model.onnx", "cpu"), patches(5)
    (tmp_path / "model.parity.json").write_text(json.dumps(model.metadata))
    (tmp_path / "patches.bin").write_bytes(images.tobytes())
    expected = model(images)
    assert np.ptp(expected) > 0.1
    (code,) = blocks("javascript")
    done = subprocess.run(
        ["node", "-e", code],
        cwd=tmp_path,
        env={**os.environ, "NODE_PATH": str(node_modules())},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    rows = [line.split(" ", 1) for line in done.stdout.splitlines()]
    assert np.abs(np.array([float(p) for p, _ in rows]) - expected).max() <= 1e-5
    called = (expected >= model.threshold).astype(int)
    assert [name for _, name in rows] == [model.labels[label] for label in called]


def test_every_block_is_python_and_every_flag_exists():
    for block in blocks("python"):
        compile(block, "README", "exec")
    text = (HERE / "examples" / "README.md").read_text()
    commands = re.findall(r"(?:^    |`)python (\S+\.py) ([^`\n]*)", text, re.MULTILINE)
    assert len(commands) >= 4
    for script, rest in commands:
        for flag in re.findall(r"--[a-z-]+", " ".join(shlex.split(rest, comments=True))):
            assert f'"{flag}"' in (HERE / script).read_text(), (script, flag)
