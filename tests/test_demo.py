import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import cli
import data
import demo
import demo_encoder
import models
import slides

HERE = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("demo") / "demo"
    demo.build(path, images_per_domain=4)
    return path


def pixels(folder):
    return {path.stem: np.asarray(Image.open(path)) for path in sorted(folder.glob("*.tiff"))}


def test_the_dataset_is_what_it_says(folder):
    annotations = data.load_dataset(folder)
    assert len(annotations) == 20 * 40 and sorted(set(annotations.domain)) == list("ABCDE")
    assert (annotations.label == 1).sum() == 20 * 18
    assert slides.microns_per_pixel(annotations.path(0)) == pytest.approx(0.25)
    content = json.loads((folder / "MIDOG.json").read_text())
    assert {a["cell"] for a in content["annotations"]} == {*demo.MITOTIC, *demo.LOOK_ALIKE}
    for annotation in content["annotations"]:
        assert (annotation["category_id"] == 1) == (annotation["cell"] in demo.MITOTIC)
    split = data.make_split(annotations)
    assert not set(split.cases["train"]) & set(split.cases["test"])


def test_a_cell_is_where_its_box_says(folder):
    """The middle of each box is darker than the ring around it, whatever the kind."""
    annotations, images = data.load_dataset(folder), pixels(folder)
    inside = []
    for image, x, y in zip(annotations.image, annotations.x, annotations.y):
        crop = images[Path(image).stem][int(y) - 32:int(y) + 32, int(x) - 32:int(x) + 32].mean(-1)
        middle = np.partition(crop[12:52, 12:52].ravel(), 60)[:60].mean()
        inside.append(np.median(crop) - middle)
    assert np.mean(np.array(inside) > 25) > 0.97


def test_the_same_on_every_run_and_another_with_another_seed(folder, tmp_path):
    demo.build(tmp_path / "again", images_per_domain=4)
    demo.build(tmp_path / "other", seed=1, images_per_domain=4)
    assert (tmp_path / "again" / "MIDOG.json").read_bytes() == (folder / "MIDOG.json").read_bytes()
    a, b, c = pixels(folder), pixels(tmp_path / "again"), pixels(tmp_path / "other")
    assert all(np.abs(a[name].astype(int) - b[name]).max() <= 1 for name in a)
    assert all(np.abs(a[name].astype(int) - c[name]).mean() > 5 for name in a)


def test_colour_does_not_solve_it(folder):
    """Logistic regression on the colour moments of 224 px and 64 px around each cell, on held-out images."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    annotations, images = data.load_dataset(folder), pixels(folder)
    for half in (112, 32):
        features = []
        for image, x, y in zip(annotations.image, annotations.x, annotations.y):
            top, left = max(0, int(y) - half), max(0, int(x) - half)
            crop = images[Path(image).stem][top:int(y) + half, left:int(x) + half].reshape(-1, 3).astype(float)
            mean, std = crop.mean(0), crop.std(0)
            features.append(np.r_[mean, std, ((crop - mean) ** 3).mean(0) / std ** 3])
        features, aurocs = np.array(features), []
        for fold in range(4):
            held_out = np.array([Path(image).stem.endswith(str(fold + 1)) for image in annotations.image])
            fitted = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)).fit(
                features[~held_out], annotations.label[~held_out])
            aurocs.append(roc_auc_score(annotations.label[held_out], fitted.decision_function(features[held_out])))
        assert np.mean(aurocs) <= 0.65, (half, aurocs)


def test_a_half_made_dataset_is_not_taken_for_a_whole_one(tmp_path):
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "A01.tiff").write_bytes(b"")
    with pytest.raises(cli.UserError, match="--out"):
        demo.build(tmp_path / "demo")


def test_killed_while_painting_leaves_nothing_that_counts(tmp_path):
    process = subprocess.Popen([sys.executable, HERE / "demo.py", "--out", tmp_path / "demo"],
                               stderr=subprocess.DEVNULL, start_new_session=True)
    while process.poll() is None and not list(tmp_path.glob(".demo.*/*.tiff")):
        pass
    os.killpg(process.pid, 9)
    process.wait()
    assert not (tmp_path / "demo").exists()
    demo.build(tmp_path / "demo", images_per_domain=1)
    assert len(list((tmp_path / "demo").glob("*.tiff"))) == 5


def test_the_shipped_encoder_is_small_and_knows_nuclei(folder):
    """Not by chance: its embeddings tell nuclear area better than a random encoder's do."""
    assert (HERE / "demo_encoder.safetensors").stat().st_size <= 8e6
    rng = np.random.Generator(np.random.PCG64(5))
    image, tissue = demo.paint(rng, demo.DOMAINS["A"])
    nuclei = [n for n in tissue.nuclei if 112 <= min(n[:2]) and max(n[:2]) <= demo.SIZE - 112]
    patches = np.stack([demo_encoder.crop(image, round(x), round(y), 224) for x, y, _ in nuclei])
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


def test_pretraining_turns_stains_with_the_image(folder):
    """The dense targets belong to the pixels that the encoder sees, however the patch was turned."""
    painted = [demo_encoder.paint(0)]
    index = np.array([0, len(painted[0][2])])
    rng = np.random.default_rng(0)
    images, stains, wanted = demo_encoder.batch_of(painted, index, painted[0][3], rng, 12)
    dark = 255 - images.float().mean(-1)
    dark = dark.view(12, 56, 4, 56, 4).mean((2, 4))
    for darkness, stain in zip(dark.flatten(1), stains[..., 0].flatten(1)):
        assert np.corrcoef(darkness, stain)[0, 1] > 0.6
    assert wanted.shape == (12, len(demo.ATTRIBUTES) + 4)
