import errno
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import small
from PIL import Image

import common
import data
import models
import probe
import train
from dataset import slides
from demo import picture, pretrain, synthetic

HERE = Path(__file__).resolve().parent.parent
# Of the first image (an x86 machine, NumPy 2): its first cells, and the green of 64 pixels.
CELLS = [
    (369, 654, "prometaphase"),
    (350, 321, "hyperchromatic"),
    (945, 53, "anaphase"),
    (949, 381, "telophase"),
]
GREEN = [
    [166, 172, 150, 174, 160, 161, 165, 123],
    [157, 153, 173, 195, 145, 180, 151, 156],
    [163, 137, 149, 93, 177, 158, 141, 166],
    [151, 108, 157, 179, 163, 177, 156, 146],
    [145, 116, 183, 187, 190, 156, 181, 166],
    [163, 157, 166, 98, 140, 179, 152, 179],
    [128, 161, 167, 185, 168, 187, 158, 176],
    [168, 164, 106, 195, 161, 170, 139, 168],
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("demo") / "demo"
    synthetic.build(path, images_per_domain=4)
    return path


def pixels(folder):
    return {path.stem: np.asarray(Image.open(path)) for path in sorted(folder.glob("*.tiff"))}


def test_the_dataset_is_what_it_says(folder):
    annotations = data.load_dataset(folder)
    assert len(annotations) == 20 * 40 and sorted(set(annotations.domain)) == list("ABCDE")
    assert (annotations.label == 1).sum() == 20 * 18
    assert slides.microns_per_pixel(annotations.path(0)) == pytest.approx(0.25)
    content = json.loads((folder / "MIDOG.json").read_text())
    assert {a["cell"] for a in content["annotations"]} == {
        *synthetic.MITOTIC,
        *synthetic.LOOK_ALIKE,
    }
    for annotation in content["annotations"]:
        assert (annotation["category_id"] == 1) == (annotation["cell"] in synthetic.MITOTIC)
    split = data.make_split(annotations)
    assert not set(split.cases["train"]) & set(split.cases["test"])


def test_a_cell_is_where_its_box_says(folder):
    """The middle of each box is darker than the ring around it, whatever the kind."""
    annotations, images = data.load_dataset(folder), pixels(folder)
    inside = []
    for image, x, y in zip(annotations.image, annotations.x, annotations.y):
        crop = images[Path(image).stem][int(y) - 32 : int(y) + 32, int(x) - 32 : int(x) + 32]
        crop = crop.mean(-1)
        middle = np.partition(crop[12:52, 12:52].ravel(), 60)[:60].mean()
        inside.append(np.median(crop) - middle)
    assert np.mean(np.array(inside) > 25) > 0.97


def test_the_same_on_every_run_and_another_with_another_seed(folder, tmp_path):
    content, images = json.loads((folder / "MIDOG.json").read_text()), pixels(folder)
    for number, name in ((1, "A01"), (20, "E04")):
        boxes = [(a["bbox"], a["cell"]) for a in content["annotations"] if a["image_id"] == number]
        for seed in (0, 1):
            *_, cells = synthetic.make_image((tmp_path, number, f"{name}.tiff", name[0], seed))
            again = [
                (a["bbox"], a["cell"])
                for a in synthetic.as_midog([(number, "", "", cells)], 0)["annotations"]
            ]
            difference = np.abs(pixels(tmp_path)[name].astype(int) - images[name])
            if seed == 0:
                assert again == boxes and difference.max() <= 1
            else:
                assert again != boxes and difference.mean() >= 5


def test_the_same_on_every_machine(tmp_path):
    """Against what was painted elsewhere: annotations exactly, pixels within a grey level."""
    *_, cells = synthetic.make_image((tmp_path, 1, "A01.tiff", "A", 0))
    assert [(round(cell["x"]), round(cell["y"]), cell["kind"]) for cell in cells[:4]] == CELLS
    green = pixels(tmp_path)["A01"][64::128, 64::128, 1]
    assert np.abs(green.astype(int) - np.array(GREEN)).max() <= 1


def aurocs(runs):
    """AUROC on the test cases of every run in the folder `runs`."""
    files = sorted(runs.glob("**/metrics.json"))
    return [json.loads(file.read_text())["sets"]["test"]["auroc"] for file in files]


@pytest.mark.slow
def test_a_probe_learns_the_demo_and_lora_is_ahead(tmp_path, monkeypatch):
    """With the shipped encoder and the demo's settings, on the whole dataset; its size too."""
    monkeypatch.setenv("MITOSIS_ROOT", str(tmp_path))
    synthetic.build(tmp_path / "demo")
    files = list((tmp_path / "demo").iterdir())
    assert len(files) == 41 and sum(file.stat().st_size for file in files) <= 150e6
    data_and_runs = ("--data", "demo", "--runs")
    assert small.call(probe, *data_and_runs, tmp_path / "probes", "--fold", "0", "1", "2") == 0
    probes = aurocs(tmp_path / "probes")
    assert len(probes) == 3 and all(0.75 <= auroc <= 0.93 for auroc in probes)
    text = (HERE / "sweeps/demo.sh").read_text()
    short = re.search(r"^short=\((.*)\)$", text, re.MULTILINE)[1].replace('"${EPOCHS:-6}"', "6")
    lr = re.search(r"--lora .*--lr (\S+)$", text, re.MULTILINE)[1]
    flags = (*data_and_runs, tmp_path / "lora", "--lora", *short.split(), "--lr", lr)
    assert small.call(train, *flags) == 0
    (lora,) = aurocs(tmp_path / "lora")
    assert lora >= max(0.93, probes[0] + 0.05)


@pytest.mark.slow
def test_colour_does_not_solve_it(folder):
    """Logistic regression on the colour moments of 224 px and 64 px around each cell, on held-out
    images.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    annotations, images = data.load_dataset(folder), pixels(folder)
    for half in (112, 32):
        features = []
        for image, x, y in zip(annotations.image, annotations.x, annotations.y):
            top, left = max(0, int(y) - half), max(0, int(x) - half)
            crop = (
                images[Path(image).stem][top : int(y) + half, left : int(x) + half]
                .reshape(-1, 3)
                .astype(float)
            )
            mean, std = crop.mean(0), crop.std(0)
            features.append(np.r_[mean, std, ((crop - mean) ** 3).mean(0) / std**3])
        features, moments = np.array(features), []
        for fold in range(4):
            held_out = np.array(
                [Path(image).stem.endswith(str(fold + 1)) for image in annotations.image]
            )
            fitted = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)).fit(
                features[~held_out], annotations.label[~held_out]
            )
            moments.append(
                roc_auc_score(
                    annotations.label[held_out], fitted.decision_function(features[held_out])
                )
            )
        assert np.mean(moments) <= 0.65, (half, moments)


def test_another_seed_is_not_taken_for_the_one_that_is_there(folder, tmp_path, capsys):
    assert small.call(synthetic, "--out", folder, "--seed", 7) == 2
    assert (
        "holds the dataset of seed 0, not 7; remove it or choose another --out"
        in capsys.readouterr().err
    )
    assert (
        small.call(synthetic, "--out", folder, "--seed", 0)
        == small.call(synthetic, "--out", folder)
        == 0
    )
    synthetic.build(tmp_path / "demo", 3, images_per_domain=1)
    assert (
        small.call(synthetic, "--out", tmp_path / "demo") == 0
    )  # without the flag, whatever is there
    assert (
        small.call(synthetic, "--out", tmp_path / "new", "--seed", -1) == 2
        and not (tmp_path / "new").exists()
    )


def test_a_half_made_dataset_is_not_taken_for_a_whole_one(tmp_path):
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "A01.tiff").write_bytes(b"")
    with pytest.raises(common.UserError, match="--out"):
        synthetic.build(tmp_path / "demo")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGKILL"])
def test_killed_while_painting_leaves_nothing_that_counts(tmp_path, name):
    """The process alone is killed: its workers end by themselves and free the lock."""
    process = subprocess.Popen(
        [sys.executable, "-m", "demo.synthetic", "--out", tmp_path / "demo"],
        stderr=subprocess.PIPE,  # the workers hold it too
    )
    while process.poll() is None and not list(tmp_path.glob(".demo.*/*.tiff")):
        time.sleep(0.05)
    process.send_signal(getattr(signal, name))
    process.communicate(timeout=60)  # ends with the last of the workers
    assert not (tmp_path / "demo").exists() and list(tmp_path.glob(".demo.*.part"))
    synthetic.build(tmp_path / "demo", images_per_domain=1)
    assert len(list((tmp_path / "demo").glob("*.tiff"))) == 5
    assert sorted(os.listdir(tmp_path)) == [".demo.lock", "demo"]


def test_a_process_that_waits_for_another_says_so(tmp_path, capfd):
    held = threading.Event()

    def hold():
        with common.exclusive(tmp_path / ".demo.lock"):
            held.set()
            time.sleep(2)

    threading.Thread(target=hold).start()
    held.wait()
    synthetic.build(tmp_path / "demo", images_per_domain=1)
    assert ".demo.lock: another process holds this lock; waiting for it" in capfd.readouterr().err


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_said():
    """Pillow's own writer loses the number of the error, without which it cannot be told."""
    with pytest.raises(OSError) as failure:
        synthetic.make_image(("/dev", 1, "full", "A", 0))
    assert failure.value.errno == errno.ENOSPC


def test_a_folder_that_cannot_be_written_ends_in_one_line(tmp_path, capfd):
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file/demo", "/proc/demo/demo"):
        assert small.call(synthetic, "--out", out) == 2
        said = capfd.readouterr().err
        assert said.startswith("error: ") and said.count("\n") == 1


def test_the_shipped_encoder_is_small_and_knows_nuclei(folder):
    """Not by chance: its embeddings tell nuclear area better than a random encoder's do."""
    assert (HERE / "demo/encoder.safetensors").stat().st_size <= 8e6
    rng = np.random.Generator(np.random.PCG64(5))
    image, tissue = synthetic.paint(rng, synthetic.DOMAINS["A"], measured=True)
    nuclei = [n for n in tissue.nuclei if 112 <= min(n[:2]) and max(n[:2]) <= synthetic.SIZE - 112]
    nuclei = nuclei[:160]
    patches = np.stack([pretrain.crop(image, round(x), round(y), 224) for x, y, _ in nuclei])
    area = np.array([attributes[0] for *_, attributes in nuclei])
    area -= area.mean()
    errors = {}
    for weights in (None, "random"):
        model = models.PatchClassifier(models.load_encoder("demo", weights))
        X = models.predict(model, patches, output="embedding", progress=None).astype(np.float64)
        X = (X - X.mean(0)) / (X.std(0) + 1e-6)
        train = np.arange(len(X)) % 2 == 0
        gram = X[train].T @ X[train] + 30 * np.eye(X.shape[1])
        fitted = X[~train] @ np.linalg.solve(gram, X[train].T @ area[train])
        errors[weights] = np.mean((fitted - area[~train]) ** 2) / area.var()
    assert errors[None] < 0.4 < errors["random"]


def scored_files(tmp_path, folder, probability=(0.9, 0.8, 0.1, 0.2)):
    """The first cells of the first image, scored: two called mitotic figures, two look-alikes."""
    content = json.loads((folder / "MIDOG.json").read_text())
    for annotation, p in zip(content["annotations"], probability):
        annotation |= {"probability": p, "class": ["look-alike", "mitotic figure"][p >= 0.5]}
    (tmp_path / "scored.json").write_text(json.dumps(content))
    return tmp_path / "scored.json", content["annotations"][: len(probability)]


def test_the_picture_tells_right_from_wrong(folder, tmp_path, capsys):
    """By its counts, and by a black cross at every wrong call: not by colour alone."""
    scored, cells = scored_files(tmp_path, folder)
    truth = [cell["category_id"] == 1 for cell in cells]
    right = [called == true for called, true in zip((True, True, False, False), truth)]
    out = tmp_path / "picture.png"
    annotations = folder / "MIDOG.json"
    assert small.call(picture, scored, "--annotations", annotations, "--out", out) == 0
    assert f"{sum(right)} of 4 cells of A01.tiff called right" in capsys.readouterr().out
    name, x, y, *_ = picture.scored_cells(scored, annotations)
    assert name == "A01.tiff"
    drawn = np.asarray(Image.open(out).convert("RGB")).astype(int)
    left, top = max(0, int(x.min()) - 200), max(0, int(y.min()) - 200)
    for cx, cy, is_right in zip(x - left, y - top, right):
        corner = drawn[int(cy) - 29 : int(cy) - 20, int(cx) + 21 : int(cx) + 30]
        assert (corner.sum(-1) == 0).any() == (not is_right)


def test_a_picture_of_unscored_candidates_is_an_error(folder, tmp_path, capsys):
    annotations = folder / "MIDOG.json"
    out = tmp_path / "picture.png"
    assert small.call(picture, annotations, "--annotations", annotations, "--out", out) == 2
    assert "holds no scored candidate" in capsys.readouterr().err and not out.exists()
    (tmp_path / "other.json").write_text('{"annotations": [{"id": 5000}]}')
    for truth in (tmp_path / "other.json", tmp_path / "none.json"):
        scored, _ = scored_files(tmp_path, folder)
        assert small.call(picture, scored, "--annotations", truth, "--out", out) == 2
        assert capsys.readouterr().err.startswith("error: ") and not out.exists()


def test_pretraining_turns_stains_with_the_image(folder):
    """The dense targets belong to the pixels that the encoder sees, however they were turned."""
    nuclei = pretrain.Nuclei([pretrain.paint(0)])
    images, stains, targets = nuclei.batch(np.random.default_rng(0), 12, 64)
    dark = 255 - images.float().mean(-1)
    dark = dark.view(12, 16, 4, 16, 4).mean((2, 4))
    for darkness, stain in zip(dark.flatten(1), stains[..., 0].flatten(1)):
        assert np.corrcoef(darkness, stain)[0, 1] > 0.6
    assert targets.shape == (12, len(synthetic.ATTRIBUTES) + 4)
