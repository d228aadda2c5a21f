"""The model card: its numbers are those of the run and of the report, the Hub can read it."""

import json
import re

import huggingface_hub
import numpy as np
import pytest
import run_folders
import small
from onnx_models import METADATA, dataset, register

import common
import evaluate
import export
import train
from common import UserError
from onnx_model import card
from reporting import bootstrap, tables

PARITY = {
    "source": "validation patches of tissue",
    "wanted": "largest |Δp| ≤ 1e-5",
    "measured": [
        {
            "provider": "CPUExecutionProvider",
            "batch": 64,
            "patches": 200,
            "largest": 1.32e-06,
            "mean": 9.4e-08,
            "changed": 0,
            "auroc_change": 0.0,
            "used": 0.4123,
        }
    ],
}
ABOUT = METADATA | {
    "encoder": "uni",
    "licence": "CC-BY-NC-ND-4.0",
    "redistribution": "no",
    "labels": ["Normal", "Atypical"],
    "threshold": {"value": 0.3, "rule": "highest F1 on validation (0.8)"},
    "precision": "fp32",
    "opset": 23,
    "input": "uint8",
    "versions": {"mitfig": "1.0.0", "torch": "2.11"},
    "base_weights_hash": "1" * 64,
    "parity": PARITY,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on cases with names that must not get out, with a further test set."""
    root = tmp_path_factory.mktemp("runs")
    table = run_folders.annotations()
    extra = run_folders.annotations("elsewhere", domains="T", cases=6, seed=4)
    path = run_folders.make(
        root, table, "uni", "lora", tests=[extra], weights="/home/anna/uni.bin", rank=16
    )
    return card.read_run(path)


def text_of(run, **changes):
    return card.card(run, ABOUT | changes, "model.onnx", "MahmoodLab/UNI", replicates=200)


def tables_of(text):
    """{title: [rows of cells]} of the Markdown."""
    found = {}
    for title, body in re.findall(r"^### (.*?)\n\n(.*?)\n\n", text, re.MULTILINE | re.DOTALL):
        rows = [line.strip("| ").split(" | ") for line in body.splitlines()]
        found[title] = [rows[0], *rows[2:]]
    return found


def test_the_numbers_are_the_runs(run):
    text = text_of(run)
    found = tables_of(text)
    header, *rows = found["Test sets"]
    assert header[1:] == list(tables.METRICS.values())
    for row in rows:
        _, labels, probability, cases, _ = run.rows(row[0])
        parts, count = bootstrap.replicate([(labels, probability, cases)], 200)
        for cell, key in zip(row[1:], tables.METRICS):
            low, high = bootstrap.interval(*parts[key][1:], count)
            assert cell == f"{run.sets[row[0]][key]:.3f} [{low:.3f}, {high:.3f}]"
    assert [row[0] for row in rows] == run.tests() == ["test", "elsewhere"]
    for set_name, *cells in found["Annotations of each set"][1:]:
        if set_name == "training":
            assert cells[0] == str(len(run.split["ids"]["train"]))
        else:
            name = {"validation": "val", "test": "test"}.get(set_name, "elsewhere")
            _, labels, _, cases, _ = run.rows(name)
            assert cells == [str(len(labels)), str(labels.sum()), str(len(set(cases)))]
    assert "| CPU | 64 | 200 | 1.32e-06 | 9.40e-08 | 0.412 | 0 | +0.00000 |" in text


def test_the_report_has_the_same_intervals(run, tmp_path):
    words = ("--out", tmp_path / "report", "--no-gallery", "--replicates", 200)
    assert small.call(evaluate, run.path, *words) == 0
    report = "".join(path.read_text("utf-8") for path in (tmp_path / "report").glob("*.md"))
    cell = tables_of(text_of(run))["Test sets"][1][3]
    assert "{} – {}".format(*re.search(r"\[(\S+), (\S+)\]", cell).groups()) in report


@pytest.mark.parametrize("threshold, temperature", [(0.3, 1.0), (0.3, 2.5), (0.8, 0.6), (0.0, 2)])
def test_decisions_are_those_of_the_exported_model(run, threshold, temperature):
    text = text_of(
        run, threshold={"value": threshold, "rule": "given"}, temperature=float(temperature)
    )
    (title,) = (title for title in tables_of(text) if title.startswith("Decisions"))
    (row,) = (row for row in tables_of(text)[title] if row[0] == "test")
    rows = run.columns["set"] == "test"
    p = 1 / (1 + np.exp(-run.columns["logit"][rows] / temperature))
    y, called = run.columns["label"][rows] == 1, p >= threshold
    sensitivity, specificity = called[y].mean(), (~called)[~y].mean()
    assert row[1:3] == [f"{sensitivity:.3f}", f"{specificity:.3f}"]
    assert row[3] == f"{y[called].mean():.3f}"


def test_the_hub_reads_its_head(run):
    data = huggingface_hub.ModelCard(text_of(run)).data
    assert data.license == "cc-by-nc-nd-4.0" and data.base_model == "MahmoodLab/UNI"
    assert data.library_name == "onnx" and data.pipeline_tag == "image-classification"
    values = {(one.dataset_split, one.metric_type): one.metric_value for one in data.eval_results}
    for name in run.tests():
        assert values[name, "roc_auc"] == pytest.approx(run.sets[name]["auroc"], abs=5e-5)
    assert len(values) == 6
    other = huggingface_hub.ModelCard(text_of(run, licence='Owkin "non-commercial"\n: x')).data
    assert other.license == "other" and other.license_name == "owkin-non-commercial-x"


def test_licence_and_limits_follow_the_metadata(run):
    text = text_of(run)
    assert "**CC-BY-NC-ND-4.0**: the base weights must not be passed on" in text
    assert "Licence of the base weights: CC-BY-NC-ND-4.0; redistribution: no." in text
    assert "(int8)" not in text
    text = text_of(run, redistribution="yes", licence="MIT", precision="int8", mpp=None)
    assert "> **" not in text and "µm/px unknown" in text and "batch (int8)" in text


def test_nothing_private_and_no_markup_gets_out(run):
    text = text_of(run, labels=["a|b", "<script>x](y)\x1b"])
    assert "/home/anna" not in text and str(run.path) not in text
    for case in set(run.columns["case"]):
        assert not re.search(rf"\b{case}\b", text)
    assert "<script>" not in text and "\x1b" not in text and "a\\|b" in text


def test_an_unfinished_run_has_no_card(run, tmp_path):
    table = run_folders.annotations()
    path = run_folders.make(tmp_path, table)
    (path / "metrics.json").unlink()
    with pytest.raises(UserError, match="not a finished run"):
        card.read_run(path)


# ---------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A tiny LoRA run on small images."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as monkeypatch:
        register(monkeypatch)
        source = dataset(folder / "data", images=10, each=4)
        words = "--model tiny-gelu --weights random --lora --rank 2 --device cpu --epochs 1".split()
        words += "--epoch-size 8 --batch-size 4 --random-share 0".split()
        status = small.call(train, "--data", source, "--runs", folder / "runs", *words)
        assert status == 0
    (metrics,) = (folder / "runs").rglob("metrics.json")
    return metrics.parent


def test_export_writes_it_beside_the_model(trained, tmp_path, monkeypatch, capsys):
    register(monkeypatch)
    words = ("--out", tmp_path / "m.onnx", "--patches", 4, "--device", "cpu")
    assert small.call(export, trained, "--card", *words) == 0
    text = (tmp_path / "m.md").read_text("utf-8")
    about = json.loads((tmp_path / "m.parity.json").read_text("utf-8"))
    summary = common.read_json(trained / "metrics.json")["sets"]["test"]
    assert f"{summary['auroc']:.3f}" in text and about["weights_hash"] in text
    assert f"Threshold {about['threshold']['value']:.4g}" in text
    assert "base_model" not in huggingface_hub.ModelCard(text).data.to_dict()

    # A second time, under a name of its own; in the run's folder too.
    assert small.call(export, trained, "--card", tmp_path / "README.md", *words) == 0
    assert (tmp_path / "README.md").read_text("utf-8") == text
    for _ in range(2):
        assert small.call(export, trained, "--card", "--patches", 4, "--device", "cpu") == 0
    assert (trained / "model.md").exists()


def test_what_is_refused_before_the_work(trained, tmp_path, monkeypatch, capsys):
    register(monkeypatch)
    monkeypatch.setattr(export, "export", lambda *_: pytest.fail("worked"))
    for more, words in (
        ((trained, "--card", trained / "config.json"), "reads or writes this file"),
        ((trained, "--card", tmp_path / "m.onnx", "--out", tmp_path / "m.onnx"), "reads or writes"),
        ((trained, "--card", tmp_path), "this is a folder"),
        ((trained, "--card", "--peft", tmp_path / "peft"), "--peft writes an adapter"),
        (("--adapter", tmp_path, "--card"), "tells of a RUN"),
    ):
        capsys.readouterr()
        assert small.call(export, *more) == 2
        assert words in capsys.readouterr().err
