"""The challenge's container without Docker: inference.py on folders laid out as the challenge does
it, and what the Dockerfile copies.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import test_mha
from onnx_models import classifier, patches, register, write_model
from PIL import Image

from demo import synthetic
from onnx_model import reading, session

HERE = Path(__file__).resolve().parent.parent
FOLDER = HERE / "examples" / "grand_challenge"
REALDATA = os.environ.get("MITOSIS_REALDATA")
REGION = "histopathology-region-of-interest-cropout", "images/histopathology-roi-cropout"
STACK = "stacked-histopathology-roi-cropouts", "images/stacked-histopathology-roi-cropouts"
ATYPICAL = ["Normal", "Atypical"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """One network under the names of both tracks: finder.onnx, atypical.onnx, swapped.onnx (the
    atypical figures are class 0), patches of 128 px like AMi-Br's.
    """
    folder = tmp_path_factory.mktemp("models")
    with pytest.MonkeyPatch.context() as monkeypatch:
        register(monkeypatch)
        model = classifier("gelu")
        write_model(folder / "finder.onnx", model)
        small = {"patch": 128, "threshold": {"value": 0.4, "rule": "given"}}
        write_model(folder / "atypical.onnx", model, metadata=small | {"labels": ATYPICAL})
        write_model(folder / "swapped.onnx", model, metadata=small | {"labels": ATYPICAL[::-1]})
    return folder


def lay_out(folder, socket):
    """/input of one job → the folder of its image."""
    slug, place = socket
    entry = {
        "file": None,
        "image": {"name": "case.tiff"},
        "value": None,
        "interface": {
            "slug": slug,
            "kind": "Image",
            "super_kind": "Image",
            "relative_path": place,
            "example_value": None,
        },
    }
    (folder / "input" / place).mkdir(parents=True, exist_ok=True)
    (folder / "input" / "inputs.json").write_text(json.dumps([entry]))
    (folder / "output").mkdir(exist_ok=True)
    return folder / "input" / place


def infer(folder, model, *more, script=FOLDER / "inference.py", **options):
    words = ["--input", folder / "input", "--output", folder / "output", "--model", model, *more]
    done = subprocess.run(
        [sys.executable, str(script), *map(str, words)], capture_output=True, text=True, **options
    )
    assert "Traceback" not in done.stderr
    return done


def save_stack(path, images):
    first, *rest = (Image.fromarray(image) for image in images)
    first.save(
        path, save_all=True, append_images=rest, compression="tiff_deflate", dpi=(101600, 101600)
    )


# ---------------------------------------------------------------- track 1


def test_track_1_end_to_end(models, tmp_path):
    """A demo image as TIFF and as .mha gives the same points, in mm, as the two stages do."""
    synthetic.make_image((str(tmp_path), 1, "A01.tiff", "A", 0))
    pixels = np.asarray(Image.open(tmp_path / "A01.tiff"))[:900, :1000]
    folder = lay_out(tmp_path, REGION)
    Image.fromarray(pixels).save(folder / "case.tiff", resolution=40000, resolution_unit=3)
    done = infer(tmp_path, models / "finder.onnx")
    assert done.returncode == 0, done.stderr
    (file,) = (tmp_path / "output").iterdir()
    assert file.name == "mitotic-figures.json"
    content = json.loads(file.read_text())
    assert content["type"] == "Multiple points" and content["version"] == {"major": 1, "minor": 0}
    assert content["name"] == "Points of interest"
    places = np.array([point["point"] for point in content["points"]])
    probability = np.array([point["probability"] for point in content["points"]])
    assert len(places) > 20 and (places[:, 2] == 0).all()
    assert (places[:, :2] < (1000 * 0.00025, 900 * 0.00025)).all() and (places >= 0).all()
    model = session.Classifier(models / "finder.onnx", "cpu")
    expected = model.score(pixels, *(places[:, :2] / 0.00025).T, mpp=0.25)
    assert np.abs(probability - expected).max() < 1e-5
    names = ["non-mitotic figure", "mitotic figure"]
    said = [names.index(point["name"]) for point in content["points"]]
    assert said == (probability >= model.threshold).astype(int).tolist()

    (folder / "case.tiff").unlink()
    changes = {"ElementSpacing": "0.00025 0.00025", "Offset": "2 -1"}
    test_mha.write(folder / "case.mha", pixels[None], changes=changes, compressed=True)
    done = infer(tmp_path, models / "finder.onnx")
    assert done.returncode == 0, done.stderr
    points = json.loads(file.read_text())["points"]
    moved = np.array([point["point"] for point in points])
    assert np.allclose(moved, places + (2, -1, 0), atol=1e-9)
    assert np.allclose([point["probability"] for point in points], probability, atol=1e-6)


# ---------------------------------------------------------------- track 2


def challenge_score(content):
    """(atypical or not, score of the ROC curve) of each entry, as the evaluation reads them."""
    called, score = [], []
    for entry in content:
        assert sorted(entry) == ["class", "confidence"]
        assert entry["class"] in ("normal", "atypical") and type(entry["confidence"]) is float
        called.append(entry["class"] == "atypical")
        score.append(entry["confidence"] if called[-1] else 1 - entry["confidence"])
    return np.array(called), np.array(score)


@pytest.mark.parametrize("kind", ["tiff", "mha"])
@pytest.mark.parametrize("count", [1, 16])
def test_track_2_end_to_end(kind, count, models, tmp_path):
    images = patches(count, seed=3, size=128)
    path = lay_out(tmp_path, STACK) / f"stack.{kind}"
    if kind == "mha":
        test_mha.write(path, images)
    else:
        save_stack(path, images)
    model = session.Classifier(models / "atypical.onnx", "cpu")
    expected = model(np.stack([reading.to_size(image, 224, "resize") for image in images]))
    for name, sign in (("atypical", 1), ("swapped", -1)):
        done = infer(tmp_path, models / f"{name}.onnx")
        assert done.returncode == 0, done.stderr
        file = tmp_path / "output" / "multiple-mitotic-figure-classification.json"
        called, score = challenge_score(json.loads(file.read_text()))
        assert np.abs(score - (expected if sign > 0 else 1 - expected)).max() < 1e-5
        assert called.tolist() == ((expected >= 0.4) == (sign > 0)).tolist()


@pytest.mark.skipif(not REALDATA, reason="MITOSIS_REALDATA names no folder")
def test_the_challenges_own_stack(models, tmp_path):
    """Against tifffile's reading of the 16 pages."""
    import tifffile

    source = Path(REALDATA) / "slides" / "stack_5.tiff"
    shutil.copy(source, lay_out(tmp_path, STACK) / "stack_5.tiff")
    done = infer(tmp_path, models / "atypical.onnx")
    assert done.returncode == 0, done.stderr
    file = tmp_path / "output" / "multiple-mitotic-figure-classification.json"
    _, score = challenge_score(json.loads(file.read_text()))
    with tifffile.TiffFile(source) as stack:
        pages = [page.asarray() for page in stack.pages]
    assert len(pages) == 16 and pages[0].shape == (128, 128, 3)
    model = session.Classifier(models / "atypical.onnx", "cpu")
    expected = model(np.stack([reading.to_size(page, 224, "resize") for page in pages]))
    assert np.abs(score - expected).max() < 1e-5


# ---------------------------------------------------------------- what is refused


def refused(tmp_path, model, *more):
    done = infer(tmp_path, model, *more)
    assert done.returncode == 2 and not list((tmp_path / "output").iterdir()), done.stdout
    (line,) = done.stderr.strip().splitlines()[-1:]
    assert line.startswith("error: ")
    return line


def test_jobs_that_are_refused(models, tmp_path):
    folder = lay_out(tmp_path, STACK)
    assert "it has 0" in refused(tmp_path, models / "atypical.onnx")
    save_stack(folder / "a.tiff", patches(17, size=128))
    assert "more than 16" in refused(tmp_path, models / "atypical.onnx")
    save_stack(folder / "a.tiff", patches(2, size=128))
    assert "must be called atypical" in refused(tmp_path, models / "finder.onnx")
    assert "no such file" in refused(tmp_path, models / "none.onnx")
    whole = (folder / "a.tiff").read_bytes()
    (folder / "a.tiff").write_bytes(whole[: len(whole) // 2])
    assert "a.tiff" in refused(tmp_path, models / "atypical.onnx")
    save_stack(folder / "b.TIF", patches(2, size=128))
    assert "it has 2" in refused(tmp_path, models / "atypical.onnx")
    (tmp_path / "input" / "inputs.json").write_text('[{"interface": {"slug": "another"}}]')
    assert "it lists another" in refused(tmp_path, models / "atypical.onnx")
    (tmp_path / "input" / "inputs.json").write_text('{"a": 1}')
    assert "not a list of inputs" in refused(tmp_path, models / "atypical.onnx")
    (tmp_path / "input" / "inputs.json").unlink()
    assert "no such file" in refused(tmp_path, models / "atypical.onnx")


def test_regions_that_are_refused(models, tmp_path):
    folder = lay_out(tmp_path, REGION)
    Image.fromarray(patches(1, size=300)[0]).save(folder / "a.tiff")  # without its µm/px
    assert "give --mpp" in refused(tmp_path, models / "finder.onnx")
    assert "track 2" in refused(tmp_path, models / "atypical.onnx")
    assert "between 0.01" in refused(tmp_path, models / "finder.onnx", "--mpp", "nan")
    (folder / "a.tiff").unlink()
    test_mha.write(folder / "a.mha", patches(3, size=64))
    assert "a stack of 3" in refused(tmp_path, models / "finder.onnx")


def test_patches_smaller_than_the_models_are_said(models, tmp_path):
    """The finder's patches have 224 px: around 128 px white is seen that training did not show."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        register(monkeypatch)
        metadata = {"labels": ATYPICAL}
        write_model(tmp_path / "m.onnx", classifier("gelu"), metadata=metadata)
    save_stack(lay_out(tmp_path, STACK) / "a.tiff", patches(2, size=128))
    done = infer(tmp_path, tmp_path / "m.onnx")
    assert done.returncode == 0 and "warning: a.tiff: patches of 128 px" in done.stderr


# ---------------------------------------------------------------- the container


def copied(root, model):
    """Lay out below `root` what the Dockerfile copies from the checkout → its lines."""
    text = (FOLDER / "Dockerfile").read_text()
    for source, target in re.findall(r"^COPY (\S+) (/\S+)$", text, re.MULTILINE):
        place = root / target.lstrip("/")
        if source.startswith("${MODEL}"):
            place.mkdir(parents=True)
            shutil.copy(model, place / "model.onnx")
        elif (HERE / source).is_dir():
            shutil.copytree(HERE / source, place, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            place.mkdir(parents=True, exist_ok=True)
            shutil.copy(HERE / source, place)
    return text


def nobody_runs_python():
    """Whether this process may become a user without rights, and that user may run this Python."""
    try:
        words = [sys.executable, "-c", ""]
        return subprocess.run(words, user=65534, group=65534, extra_groups=[]).returncode == 0
    except OSError:
        return False


def test_what_the_dockerfile_copies_is_enough(models, tmp_path):
    """Its files alone, without torch, and where that can be had as a user without rights."""
    text = copied(tmp_path / "root", models / "atypical.onnx")
    assert re.search(r"^USER user$", text, re.MULTILINE)
    (entry,) = re.findall(r'^ENTRYPOINT \["python", "(\S+)"\]$', text, re.MULTILINE)
    (workdir,) = re.findall(r"^WORKDIR /(\S+)$", text, re.MULTILINE)
    app = tmp_path / "root" / workdir
    save_stack(lay_out(tmp_path, STACK) / "a.tiff", patches(3, size=128))
    (tmp_path / "empty").mkdir()
    for name in ("torch", "onnx", "matplotlib"):
        (tmp_path / "empty" / f"{name}.py").write_text("raise ImportError('not in the container')")
    options = {}
    if nobody_runs_python():
        options = {"user": 65534, "group": 65534, "extra_groups": []}
        subprocess.run(["chmod", "-R", "a+rX", tmp_path], check=True)
        (tmp_path / "output").chmod(0o777)
        for parent in tmp_path.parents[:2]:
            parent.chmod(parent.stat().st_mode | 0o011)
    done = infer(
        tmp_path,
        tmp_path / "root/opt/ml/model/model.onnx",
        script=app / entry,
        cwd=app,
        env={
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(tmp_path / "empty"),
            "CUDA_VISIBLE_DEVICES": "-1",
        },
        **options,
    )
    assert done.returncode == 0, done.stderr
    assert "3 patches" in done.stdout
