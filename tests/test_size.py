"""--size: patches of another size through training, probes, export and scoring."""

import json

import numpy as np
import pytest
import small
import torch

import checkpoint
import export
import flags
import models
import probe
import runs
import train
from dataset.patches import Patches
from onnx_model import session

QUICK = ("--model", "tiny", "--weights", "random", "--device", "cpu", "--size", 160)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A LoRA run on patches of 160 px, and where its data is."""
    root = tmp_path_factory.mktemp("size")
    table = small.dataset(root / "data")
    arguments = ("--data", table, "--runs", root / "runs", *QUICK)
    steps = ("--lora", "--epochs", 1, "--epoch-size", 16, "--batch-size", 8, "--frac", 0.5)
    assert small.call(train, *arguments, *steps) == 0
    (run,) = (root / "runs" / "small").glob("*/frac0.5-fold0")
    return root, table, run


def test_the_run_knows_its_size(finished):
    root, table, run = finished
    assert run.parent.name == "tiny-lora-160px"
    config = json.loads((run / "config.json").read_text())
    assert config["flags"]["size"] == 160
    model, _ = checkpoint.load_run(run)
    assert model.encoder.size == 160 and model.encoder.grid == 5


def test_predictions_are_of_patches_of_that_size(finished):
    root, table, run = finished
    annotations, _ = flags.from_source({"data": str(table), "fit": "resize"})
    model, _ = checkpoint.load_run(run)
    predictions = runs.read_predictions(run / "predictions.csv")
    rows = annotations.rows(predictions["id"][:8])
    images = Patches(annotations, size=160).read(rows)
    assert images.shape == (8, 160, 160, 3)
    got = models.predict(model, images, progress=None)
    np.testing.assert_allclose(got, predictions["logit"][:8].astype(float), rtol=1e-4, atol=1e-5)


def test_the_exported_model_reads_that_size(finished, tmp_path):
    root, table, run = finished
    assert small.call(export, run, "--out", tmp_path / "m.onnx", "--patches", 8) == 0
    classifier = session.Classifier(tmp_path / "m.onnx", "cpu")
    assert classifier.size == 160
    images = np.random.default_rng(0).integers(0, 256, (3, 160, 160, 3), dtype=np.uint8)
    model, _ = checkpoint.load_run(run)
    expected = torch.sigmoid(torch.from_numpy(models.predict(model, images, progress=None)))
    np.testing.assert_allclose(classifier(images), expected, atol=1e-5)


def test_embeddings_of_two_sizes_lie_apart(finished):
    root, table, _ = finished
    arguments = ("--data", table, "--runs", root / "probes", *QUICK[:-2])
    assert small.call(probe, *arguments) == 0
    assert small.call(probe, *arguments, "--size", 160) == 0
    names = {
        path.name.split(".")[0] for path in (root / "probes" / "embeddings" / "small").iterdir()
    }
    assert {"tiny-cls", "tiny-cls-160px"} <= names


def test_a_size_that_does_not_fit_is_refused(finished, capsys):
    _, table, _ = finished
    assert small.call(train, "--data", table, *QUICK[:-1], 100, "--lora") == 2
    assert "multiples of its patches of 32 px, such as 96" in capsys.readouterr().err
