"""--crop: the cell in the middle, enlarged; the same pixels in training, export and scoring. And
the poolings that read the tokens around the cell.
"""

import json

import numpy as np
import pytest
import small
import tifffile
import torch
from PIL import Image

import checkpoint
import data
import export
import models
import probe
import runs
import train
from common import UserError
from dataset import slides
from dataset.patches import Patches, build_store, margin
from onnx_model import reading, session

QUICK = ("--model", "tiny", "--weights", "random", "--device", "cpu")
STEPS = ("--epochs", 1, "--epoch-size", 16, "--batch-size", 8, "--frac", 0.5)


def smooth(seed, side=128):
    """Blobs without white, so that white in a patch is a fault."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(30, 200, (side // 8 + 2, side // 8 + 2, 3), np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC))


def enlarged(pixels, size):
    image = Image.fromarray(np.ascontiguousarray(pixels))
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))


def table_of(folder, names, x, y, **more):
    n = len(x)
    return data.Annotations(
        np.array([f"a{i}" for i in range(n)]),
        np.array(names),
        np.array([f"c{i}" for i in range(n)]),
        np.full(n, "all"),
        np.asarray(x, np.float64),
        np.asarray(y, np.float64),
        np.arange(n).astype(np.int8) % 2,
        "made",
        folder,
        **more,
    )


def ready_made(folder, *sides):
    """Annotations of one square file per side."""
    for i, side in enumerate(sides):
        Image.fromarray(smooth(i, side)).save(folder / f"{i}.png")
    names = [f"{i}.png" for i in range(len(sides))]
    nowhere = np.full(len(sides), np.nan)
    return table_of(folder, names, nowhere, nowhere, kind="patches")


# ---------------------------------------------------------------- pixels


@pytest.mark.parametrize("size", [224, 112])
def test_a_ready_made_patch_is_its_middle_enlarged(tmp_path, size):
    a = ready_made(tmp_path, 128, 129, 300)
    got = Patches(a, size=size, crop=64).read([0, 1, 2])
    for patch, side, start in zip(got, (128, 129, 300), (32, 33, 118)):
        row = (128, 129, 300).index(side)
        middle = smooth(row, side)[start : start + 64, start : start + 64]
        assert np.array_equal(patch, enlarged(middle, size))


@pytest.mark.parametrize("size, crop", [(224, 64), (112, 64), (224, 80), (224, 63), (96, 120)])
def test_the_middle_of_a_margin_is_the_patch(tmp_path, size, crop):
    """Of real pixels as far as the file goes, then reflected; never white."""
    patches = Patches(ready_made(tmp_path, 128, 129), size=size, crop=crop)
    wide, side = patches.read([0, 1], margin(size)), patches.read([0, 1])
    start, edge = (margin(size) - size) // 2, 3 * max(1, size // crop)
    middle = wide[:, start : start + size, start : start + size].astype(int)
    inner = slice(edge, -edge)
    # Of the same pixels, but for those whose kernel reaches over the border.
    difference = np.abs(middle - side)[:, inner, inner]
    assert difference.max() <= 2 and difference.mean() < 0.02  # roundings of Pillow's two passes
    assert np.abs(middle - side).mean() < 2
    assert wide.max() < 255


def test_points_show_a_smaller_field_with_and_without_a_store(tmp_path):
    folder = tmp_path / "d"
    folder.mkdir()
    for i in range(2):
        Image.fromarray(smooth(i, 600)).save(folder / f"{i}.png")
    x, y = np.array([200.0, 311.5, 300.2, 20]), np.array([211.5, 300, 200, 300])
    a = table_of(folder, ["0.png", "0.png", "1.png", "1.png"], x, y)
    direct = Patches(a, crop=64, cache=False)
    for row, patch in enumerate(direct.read(range(4))):
        assert np.array_equal(patch, enlarged(slides.read(a.path(row), x[row], y[row], 64), 224))
    assert direct.window == 64
    stored = Patches(a, crop=64, cache=tmp_path / "store")
    build_store(stored, 1)
    assert stored.layout["side"] == 92  # 320 * 64 / 224, and even
    plain = Patches(a, cache=tmp_path / "store")
    assert plain.store_path() != stored.store_path()
    assert plain.fingerprint() != stored.fingerprint()
    sample = data.Sampler(a, a.id, 16, window=stored.window).epoch(0)
    wanted = direct.read_sample(sample, 320)
    assert np.array_equal(stored.read_sample(sample, 320), wanted)
    assert stored._crops is not None


@pytest.mark.parametrize("mpp", [None, 0.25, 0.5])
def test_a_slide_is_scored_on_the_pixels_of_training(tmp_path, mpp):
    """Whatever µm/px training resampled to; the slide has 0.25."""
    tifffile.imwrite(
        tmp_path / "a.tif",
        smooth(0, 768),
        tile=(256, 256),
        photometric="rgb",
        resolution=(40000, 40000),
        resolutionunit="CENTIMETER",
    )
    x, y = [300, 411.5], [350.5, 400]
    a = table_of(tmp_path, ["a.tif", "a.tif"], x, y)
    for size in (224, 112):
        trained = Patches(a, size=size, crop=64, mpp=mpp).read([0, 1])
        metadata = {"patch": 64, "size": size, "fit": "resize", "mpp": mpp or 0.25}
        reader = reading.SlideReader(metadata, tmp_path / "a.tif")
        for i in range(2):
            assert np.array_equal(reader.read(x[i], y[i]), trained[i])


def test_files_smaller_than_the_crop_are_refused(tmp_path):
    a = ready_made(tmp_path, 128, 60)
    with pytest.raises(UserError, match="1.png: is smaller than the 64 px of --crop"):
        Patches(a, crop=64).read([0, 1])


# ---------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A LoRA run on the middle 24 of 48 px, and where its data is."""
    root = tmp_path_factory.mktemp("crop")
    table = small.dataset(root / "data")
    other = small.dataset(root / "other", cases=3, seed=1, name="other")
    arguments = ("--data", table, "--runs", root / "runs", *QUICK, "--crop", 24, "--size", 96)
    assert small.call(train, *arguments, *STEPS, "--lora", "--test", other) == 0
    (run,) = (root / "runs" / "small").glob("*/frac0.5-fold0")
    return root, table, run


def test_the_run_and_its_export_know_the_crop(finished, tmp_path):
    root, table, run = finished
    assert run.parent.name == "tiny-lora-96px-crop24"
    config = json.loads((run / "config.json").read_text())
    assert config["flags"]["crop"] == config["source"]["crop"] == config["data"]["patch"] == 24
    # What the exported model says of itself reads the pixels that the run predicted on.
    assert small.call(export, run, "--out", tmp_path / "m.onnx", "--patches", 8) == 0
    classifier = session.Classifier(tmp_path / "m.onnx", "cpu")
    known = {key: classifier.metadata[key] for key in ("patch", "crop", "size", "fit")}
    assert known == {"patch": 24, "crop": 24, "size": 96, "fit": "resize"}
    predictions = runs.read_predictions(run / "predictions.csv")
    for name, folder in (("test", "data"), ("other", "other")):
        annotations = data.load_dataset(next((root / folder).glob("*.csv")))
        rows = np.flatnonzero(predictions["set"] == name)
        images = []
        for row in annotations.rows(predictions["id"][rows]):
            pixels = np.asarray(Image.open(annotations.path(row)))
            images.append(reading.to_size(pixels[12:36, 12:36], 96, "resize"))
        got = classifier(np.stack(images))
        np.testing.assert_allclose(got, predictions["probability"][rows], atol=1e-5)


def test_without_the_flag_nothing_of_it_is_kept(finished):
    root, table, _ = finished
    arguments = ("--data", table, "--runs", root / "plain", *QUICK)
    assert small.call(probe, *arguments) == 0
    assert small.call(probe, *arguments, "--crop", 24) == 0
    plain, cropped = (
        json.loads((root / "plain/small" / name / "frac1-fold0/config.json").read_text())
        for name in ("tiny-probe", "tiny-probe-crop24")
    )
    assert "crop" not in plain["flags"] and cropped["flags"] == plain["flags"] | {"crop": 24}
    assert plain["data"]["pixels"] != cropped["data"]["pixels"]
    names = {path.name.split(".")[0] for path in (root / "plain/embeddings/small").iterdir()}
    assert {"tiny-cls", "tiny-cls-crop24"} <= names


@pytest.mark.parametrize(
    "more, words",
    [
        (["--crop", 64], "--crop 64: .* is 48 x 48 px; give at most 48"),
        (["--crop", 4], "--crop 4: give a number of px from 8"),
        (["--crop", 24, "--fit", "pad"], "--fit pad does not"),
    ],
)
def test_mistakes_are_one_line(finished, more, words, tmp_path, capsys):
    _, table, _ = finished
    for command in (train, probe):
        assert small.call(command, "--data", table, "--runs", tmp_path, *QUICK, *more) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and np.all([w in error for w in words.split(" .* ")])


# ---------------------------------------------------------------- the tokens around the cell


@pytest.mark.parametrize("pool", ["patch-center", "cls+center"])
@pytest.mark.parametrize("method", ["lora", "full", "probe"])
def test_poolings_around_the_cell_train_and_export(finished, tmp_path, pool, method):
    _, table, _ = finished
    arguments = ("--data", table, "--runs", tmp_path, *QUICK, "--pool", pool)
    if method == "probe":
        assert small.call(probe, *arguments) == 0
    else:
        more = ["--lora"] if method == "lora" else []
        assert small.call(train, *arguments, *STEPS, *more) == 0
    (run,) = (tmp_path / "small").glob(f"tiny-{method}-{pool}/*")
    model, _ = checkpoint.load_run(run)
    if method == "lora":  # the loss reaches every layer
        state, _ = checkpoint.load_tensors(run / "model.safetensors")
        assert all(value.abs().max() > 0 for name, value in state.items() if "lora_B" in name)
    width = {"patch-center": 32, "cls+center": 64}[pool]
    assert model.head.weight.shape == (1, width)
    assert small.call(export, run, "--out", tmp_path / "m.onnx", "--patches", 8) == 0
    images = np.stack([smooth(i, 224) for i in range(3)])
    expected = torch.sigmoid(torch.from_numpy(models.predict(model, images, progress=None)))
    got = session.Classifier(tmp_path / "m.onnx", "cpu")(images)
    np.testing.assert_allclose(got, expected, atol=1e-5)
