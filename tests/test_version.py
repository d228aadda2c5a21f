"""The name and the version of the software: in the files that it writes, and one everywhere."""

import json
import re
from pathlib import Path

import numpy as np
import onnx
import onnx_models
import pytest
import small

import common
import data
import runs
from onnx_model import session

ROOT = Path(__file__).resolve().parent.parent


def test_one_version_everywhere():
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(r"^## (\S+)", changelog, re.M)[1] == common.VERSION
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.search(r"^version: (\S+)$", citation, re.M)[1] == common.VERSION
    assert re.search(r"^title: \"(\w+)", citation, re.M)[1] == common.NAME
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert re.match(r"# (\w+)", readme)[1] == common.NAME


def test_a_run_says_which_version_made_it():
    assert runs.environment()["versions"][common.NAME] == common.VERSION


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model.onnx"
    onnx_models.write_model(path, onnx_models.classifier("gelu"))
    return path


def test_an_exported_model_says_which_version_made_it(model_file):
    proto = onnx.load(model_file)
    assert (proto.producer_name, proto.producer_version) == (common.NAME, common.VERSION)


def test_models_exported_before_the_project_had_a_name_run(model_file, tmp_path):
    proto = onnx.load(model_file)
    for prop in proto.metadata_props:
        if prop.key == "format":
            prop.value = "mitosis-classifier"
    onnx.save(proto, tmp_path / "old.onnx")
    patches = np.zeros((2, 224, 224, 3), np.uint8)
    now, before = (
        session.Classifier(path, "cpu")(patches) for path in (model_file, tmp_path / "old.onnx")
    )
    assert np.array_equal(now, before)


def test_splits_made_before_the_project_had_a_name_are_read(tmp_path):
    annotations = data.load_dataset(small.dataset(tmp_path))
    path = tmp_path / "split.json"
    data.make_split(annotations).save(path)
    content = json.loads(path.read_text(encoding="utf-8"))
    assert content["format"] == f"{common.NAME}-split"
    content["format"] = "mitosis-split"
    path.write_text(json.dumps(content), encoding="utf-8")
    assert data.load_split(path, annotations).train.tolist() == content["ids"]["train"]
