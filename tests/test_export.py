"""From a finished run to a verified model, and what happens when it does not come to that."""

import argparse
import json
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
import small
import torch
from onnx_models import FAMILIES, allowed, dataset, make_run, mounted, patches, register
from PIL import Image

import checkpoint
import common
import data
import export
import flags
import models
import probe
import runs
from dataset.formats.cells import MITOSIS
from onnx_model import graph, nodes, parity, session, vit
from reporting import ensemble, metrics, results

HERE = Path(__file__).resolve().parent.parent
HARNESS = (
    "import sys; sys.path[:0] = [{here!r}, {tests!r}]\n"
    "import onnx_models, models, export, common\n"
    "for spec in onnx_models.FAMILIES.values(): models.ENCODERS[spec.name] = spec\n"
    "sys.argv[0] = 'export.py'\ncommon.command(export.main)\n"
).format(here=str(HERE), tests=str(HERE / "tests"))


@pytest.fixture(autouse=True)
def families(monkeypatch):
    register(monkeypatch)


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """A dataset, and runs by (family, method), made when first asked for."""
    folder, done = tmp_path_factory.mktemp("export"), {}
    dataset(folder / "data")

    def get(family="gelu", method="lora", taught=0):
        if (family, method, taught) not in done:
            path = folder / f"{family}-{method}{taught}"
            done[family, method, taught] = (
                path,
                *make_run(path, family, method, folder / "data", taught=taught),
            )
        return done[family, method, taught]

    return get


def command(monkeypatch, *arguments):
    """export.py in this process → exit status."""
    monkeypatch.setattr(sys, "argv", ["export.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        common.command(export.main)
    return ended.value.code


def names(folder):
    return sorted(path.name for path in Path(folder).iterdir())


@pytest.mark.parametrize(
    "family,method",
    [
        *((name, "lora") for name in FAMILIES if name not in ("resnet50", "swin", "conch")),
        pytest.param("swin", "lora", marks=pytest.mark.slow),
        pytest.param("conch", "lora", marks=pytest.mark.slow),
        pytest.param("resnet50", "probe", marks=pytest.mark.slow),
        ("gelu", "full"),
    ],
)
def test_run_to_model(family, method, made, tmp_path, monkeypatch, capsys):
    """The file gives the probabilities of the unmerged model, says what it is, and comes with its
    report.
    """
    run, weights, unmerged = made(family, method)
    out, images = tmp_path / "model.onnx", patches(64, seed=9)[: 64 if family != "resnet50" else 8]
    assert (
        command(monkeypatch, run, "--out", out, "--patches", 70 if family != "resnet50" else 8) == 0
    )
    assert names(tmp_path) == ["model.onnx", "model.parity.json"]
    classifier = session.Classifier(out, device="cpu")
    with torch.inference_mode():
        expected = torch.sigmoid(unmerged(torch.from_numpy(images))).numpy()
    limit, _ = allowed(unmerged, images)
    for batch in (1, 2, 7, 64):
        assert (np.abs(classifier(images[:batch]) - expected[:batch]) <= limit[:batch]).all()
    report = json.loads((tmp_path / "model.parity.json").read_text())
    assert report["parity"] == classifier.metadata["parity"] and report["parity"]["problems"] == []
    assert [row["batch"] for row in report["parity"]["measured"]] == [1, 2, 7, 64]
    if family != "resnet50":
        assert report["parity"]["measured"][-1]["patches"] >= 64
    assert report["encoder"] == FAMILIES[family].name and report["method"] == method
    assert report["licence"] == FAMILIES[family].licence and report["mpp"] == 0.25
    printed = capsys.readouterr().out
    assert "licence" in printed and "largest" in printed and str(out) in printed


TAUGHT = {"method": "full", "taught": 120}


# A random SwiGLU network blows the noise of bytes up to a tenth of its embedding or more, and its
# AUROC, near a half, follows. The gate refuses some of them, as it should; so those that have to
# pass have learned something.
@pytest.mark.parametrize(
    "precision,family,how",
    [
        *(("fp16", name, {}) for name in FAMILIES if name not in ("resnet50", "swin")),
        pytest.param("fp16", "swin", {}, marks=pytest.mark.slow),
        ("int8", "gelu", {}),
        ("int8", "torchvision", {}),
        pytest.param("int8", "swiglu", TAUGHT, marks=pytest.mark.slow),
        pytest.param("int8", "clsmean", TAUGHT, marks=pytest.mark.slow),
    ],
)
def test_smaller_precisions(precision, family, how, made, tmp_path, monkeypatch):
    """Adapters merged, in fewer bits, the weights in a file of their own: at every batch near the
    unmerged model.
    """
    run, _, unmerged = made(family, **how)
    out, images = tmp_path / "m.onnx", patches(64, seed=9)
    assert (
        command(
            monkeypatch, run, "--out", out, "--precision", precision, "--external", "--patches", 70
        )
        == 0
    )
    assert names(tmp_path) == ["m.onnx", "m.onnx.data", "m.parity.json"]
    with torch.inference_mode():
        expected = torch.sigmoid(unmerged(torch.from_numpy(images))).numpy()
    classifier, limit = session.Classifier(out, "cpu"), None
    if precision == "fp16":
        limit, _ = allowed(unmerged, images, precision)
    for batch in (1, 2, 7, 64):
        off = np.abs(classifier(images[:batch]) - expected[:batch])
        assert off.max() > 1e-8
        if limit is None:
            assert off.mean() <= 0.1, batch
        else:
            assert (off <= limit[:batch]).all(), batch
    report = classifier.metadata["parity"]
    assert report["problems"] == [] and [row["batch"] for row in report["measured"]] == [
        1,
        2,
        7,
        64,
    ]
    assert report["measured"][-1]["auroc_change"] >= -parity.AUROC_LOSS
    blocks = sum(p.numel() for block in unmerged.encoder.blocks for p in block.parameters())
    whole = sum(p.numel() for p in unmerged.encoder.parameters())
    smaller = (
        blocks * (2 if precision == "fp16" else 1) + (whole - blocks) * 4
    )  # the patch embedding stays float32
    size = (tmp_path / "m.onnx.data").stat().st_size
    if family != "swin":  # whose positions are written out for each window
        assert size < 1.1 * smaller + 100_000  # biases, scales, borders of pages


def test_an_earlier_export_leaves_nothing(made, tmp_path, monkeypatch):
    """Written again without --external: no weights of the old one are left beside it."""
    run, _, _ = made()
    assert command(monkeypatch, run, "--out", tmp_path / "m.onnx", "--external") == 0
    assert command(monkeypatch, run, "--out", tmp_path / "m.onnx") == 0
    assert names(tmp_path) == ["m.onnx", "m.parity.json"]


def test_options(made, tmp_path, monkeypatch):
    run, _, _ = made("swiglu")
    assert (
        command(
            monkeypatch,
            run,
            "--out",
            tmp_path / "m.onnx",
            "--opset",
            18,
            "--input",
            "float",
            "--embedding",
            "--threshold",
            "sensitivity=0.9",
            "--calibrate",
        )
        == 0
    )
    model = session.Classifier(tmp_path / "m.onnx", "cpu")
    m = model.metadata
    assert (
        model.input == "float"
        and model.outputs == ["probability", "embedding"]
        and m["opset"] == 18
    )
    assert "sensitivity" in m["threshold"]["rule"] and m["temperature"] != 1
    saved = runs.read_predictions(run / "predictions.csv")
    calibrated = export.sigmoid(saved["logit"] / m["temperature"])
    assert (calibrated[saved["label"] == 1] >= m["threshold"]["value"]).mean() >= 0.9
    assert "Attention" not in {node.op_type for node in onnx.load(tmp_path / "m.onnx").graph.node}


def test_annotations_whose_images_are_gone_fall_back_to_the_demo(
    made, tmp_path, monkeypatch, capsys
):
    run, _, _ = made()
    config, from_source = json.loads((run / "config.json").read_text()), export.flags.from_source
    here = dict(config["source"])
    shutil.copy(here["data"], tmp_path / "MIDOG.json")
    config["source"] |= {"data": str(tmp_path / "MIDOG.json"), "images": str(tmp_path)}
    monkeypatch.setattr(
        export.flags,
        "from_source",  # the run's own data stands in for the demo's
        lambda kept, **options: from_source(here if kept["data"] == "demo" else kept, **options),
    )
    args = argparse.Namespace(data=None, images=None)
    found, labels, ids, source = export.validation_patches(run, config, args, 8)
    assert source.startswith("demo patches") and len(found) == len(labels) == 8 and len(ids) == 0
    assert "the run's data is not available" in capsys.readouterr().err
    args.data = str(tmp_path / "MIDOG.json")
    with pytest.raises(common.UserError):  # named by the user: no other is taken
        export.validation_patches(run, config, args, 8)


@pytest.mark.parametrize("break_it", ["normalisation", "lora", "head", "block"])
def test_a_wrong_graph_does_not_come_out(break_it, made, tmp_path, monkeypatch, capsys):
    run, _, _ = made()
    if break_it == "normalisation":
        tokens = vit.tokens
        monkeypatch.setattr(
            vit, "tokens", lambda g, e, x, i, mean, std: tokens(g, e, x, i, mean * 1.01, std)
        )
    elif break_it == "lora":
        import lora

        merge = lora.merge_lora

        def half(encoder):
            for _, module in lora.adapted(encoder):
                if hasattr(module, "lora_B"):
                    module.lora_B.data *= 0.99
            return merge(encoder)

        monkeypatch.setattr(lora, "merge_lora", half)
    elif break_it == "head":
        emitted = graph.emit
        monkeypatch.setattr(
            graph,
            "emit",
            lambda model, file, p, o, i, e, t, peaks: emitted(
                model, file, p, o, i, e, t * 1.01, peaks
            ),
        )
    else:
        monkeypatch.setattr(nodes, "gelu", lambda g, x, half, at: g.op("Relu", x, at=at))
    assert command(monkeypatch, run, "--out", tmp_path / "m.onnx") == 2
    assert "not within its tolerance" in capsys.readouterr().err
    assert names(tmp_path) == []


def test_predictions_in_lower_precision_are_reported(made, tmp_path, monkeypatch):
    run, _, _ = made("clsmean")
    saved = runs.read_predictions(run / "predictions.csv")
    text = (run / "predictions.csv").read_bytes()
    try:
        saved["logit"] = saved["logit"] + 0.01
        saved["probability"] = export.sigmoid(saved["logit"])
        runs.write_predictions(run / "predictions.csv", saved)
        assert command(monkeypatch, run, "--out", tmp_path / "m.onnx") == 0
        seen = json.loads((tmp_path / "m.parity.json").read_text())["parity"]["predictions.csv"]
        assert 1e-4 < seen["largest"] < 0.01 and seen["patches"] > 10
    finally:
        (run / "predictions.csv").write_bytes(text)


# ---------------------------------------------------------------- threshold, temperature, licence


def predictions_of(labels, logits, name="val"):
    """Columns as runs.read_predictions gives them."""
    columns = {"label": np.asarray(labels), "logit": np.asarray(logits, np.float32)}
    columns["probability"] = export.sigmoid(columns["logit"])
    return columns | {"set": np.full(len(labels), name), "case": np.full(len(labels), "c")}


def test_threshold_is_the_best_f1():
    generator = np.random.default_rng(0)
    for _ in range(20):
        labels = generator.integers(0, 2, 60)
        p = labels * 0.2 + generator.uniform(0, 0.8, 60)
        p = p.round(1).clip(0.05, 0.95)  # many ties
        predictions = predictions_of(labels, np.log(p / (1 - p)))
        p = predictions["probability"]

        def f1(t):
            hit = ((p >= t) & (labels == 1)).sum()
            return 2 * hit / ((p >= t).sum() + labels.sum())

        value, text, _ = export.decide(predictions, "f1")
        assert f1(value) == pytest.approx(max(f1(t) for t in np.unique(p)))
        assert np.abs(p - value).min() > 1e-6 and f"({f1(value):.4f})" in text
        value, _, _ = export.decide(predictions, "sensitivity=0.8")
        assert (p[labels == 1] >= value).mean() >= 0.8
        assert (p[labels == 1] >= value + 0.1).mean() < 0.8  # the next higher one finds too few
        value, text, _ = export.decide(predictions, "balanced")
        best = max(metrics.balanced_accuracy(labels, p >= t) for t in np.unique(p))
        assert metrics.balanced_accuracy(labels, p >= value) == pytest.approx(best)
        assert text == f"highest balanced accuracy on validation ({best:.4f})"
    assert export.decide(predictions, "0.3") == (0.3, "given", 1.0)
    for nothing in (None, predictions_of([1, 0], [1, 2], "test"), predictions_of([1, 1], [1, 2])):
        assert export.decide(nothing, "f1")[0] == 0.5


@pytest.mark.parametrize(
    "rule", ["1.5", "0", "1", "f2", "sensitivity", "sensitivity=2", "f1=3", "nan", "", "inf", "x"]
)
def test_thresholds_that_are_none(rule):
    with pytest.raises(common.UserError, match="--threshold"):
        export.decide(None, rule)


def test_the_exported_threshold_is_the_reports(tmp_path):
    """One rule: for 300 random validation sets, ties included, to the last bit."""
    generator = np.random.default_rng(0)
    for _ in range(300):
        n = int(generator.integers(4, 200))
        labels = generator.integers(0, 2, n)
        logits = labels * generator.uniform(0, 2) + generator.normal(0, 1, n)
        logits = logits.round(int(generator.integers(0, 6)))
        predictions = predictions_of(labels, logits)
        assert (
            export.decide(predictions, "f1")[0] == metrics.of_predictions(predictions)["threshold"]
        )


def test_temperature_recovers_the_scale():
    generator = np.random.default_rng(0)
    z = generator.normal(0, 2, 20000)
    labels = generator.uniform(size=20000) < export.sigmoid(z)
    assert export.best_temperature(labels, 3 * z) == pytest.approx(3, rel=0.05)
    assert export.best_temperature(labels, 0.5 * z) == pytest.approx(0.5, rel=0.05)
    with pytest.raises(common.UserError, match="--calibrate"):
        export.best_temperature(z > 0, z)  # separable: the temperature would go to 0
    with pytest.raises(common.UserError, match="--calibrate"):
        export.best_temperature(z < 0, z)


def test_a_run_on_mixed_scales_says_so_in_its_model(made, tmp_path, monkeypatch, capsys):
    """The images as scanned at 0.25 and 0.5 µm/px: told to config.json, to the terminal, and to
    whoever reads a slide with the model.
    """
    folder = tmp_path / "data"
    source = dataset(folder, images=5, each=2)
    for name in ("0.tiff", "3.tiff"):
        image = Image.open(folder / name)
        image.load()
        image.save(folder / name, resolution=20000, resolution_unit=3)
    facts = flags.facts(data.load_dataset(source, images=folder))
    assert facts["mpp"] is None and facts["mixed_mpp"] == {"0.25": 3, "0.5": 2}
    run, _, _ = made()
    shutil.copytree(run, tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    config["data"] |= facts
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    out = tmp_path / "m.onnx"
    assert command(monkeypatch, tmp_path / "run", "--out", out, "--patches", 4) == 0
    assert "different µm/px (0.25 µm/px: 3 images, 0.5 µm/px: 2 images)" in capsys.readouterr().out
    model = session.Classifier(out, "cpu")
    assert model.mpp is None and "µm/px mixed (0.25: 3 images, 0.5: 2 images)" in model.describe()


@pytest.mark.slow
def test_licences_that_forbid(made, tmp_path, monkeypatch, capsys):
    import dataclasses

    run, _, _ = made()
    for change, text in (
        ({"derivatives": False, "licence": "CC-BY-NC-ND-4.0"}, "no"),
        ({"licence": "Owkin non-commercial"}, "not for commercial use"),
    ):
        monkeypatch.setitem(
            models.ENCODERS, "tiny-gelu", dataclasses.replace(FAMILIES["gelu"], **change)
        )
        assert command(monkeypatch, run, "--out", tmp_path / "m.onnx") == 0
        assert f"redistribution: {text}" in capsys.readouterr().out
        assert session.Classifier(tmp_path / "m.onnx", "cpu").metadata["redistribution"] == text


# ---------------------------------------------------------------- mistakes and accidents


def test_mistakes_are_one_line(made, tmp_path, monkeypatch, capsys):
    run, weights, _ = made()
    other = tmp_path / "other"
    other.mkdir()
    folder = Path(json.loads((run / "config.json").read_text())["source"]["images"])
    wrong, _ = make_run(other / "run", "gelu", "lora", folder, seed=5)
    out = tmp_path / "out"
    out.mkdir()
    for arguments, text in (
        (["--out", out / "m.bin"], "must end with .onnx"),
        (["--opset", 12], "--opset"),
        (["--out", out / "m.onnx", "--weights", wrong], "trained on other weights"),
        (["--out", out / "m.onnx", "--weights", tmp_path / "none"], "none"),
        (["--out", out / "m.onnx", "--data", tmp_path / "none"], "none"),
        (["--out", out / "m.onnx", "--threshold", "f3"], "--threshold"),
        (["--patches", 1], "--patches"),
    ):
        assert command(monkeypatch, run, *arguments) == 2
        error = capsys.readouterr().err
        assert text in error and "Traceback" not in error, (arguments, error)
    assert command(monkeypatch, tmp_path / "norun") == 2 and command(monkeypatch) == 2
    assert command(monkeypatch, out) == 2
    assert names(out) == []


def damaged_values(value):
    return [v for v in (None, 0, -1, 1e300, float("nan"), "x", "", [], {}, [1], True) if v != value]


@pytest.mark.parametrize(
    "method, step",
    [
        ("lora", 7),
        pytest.param("lora", 1, marks=pytest.mark.slow),
        pytest.param("full", 1, marks=pytest.mark.slow),
    ],
)
def test_a_damaged_run_is_refused_in_one_line(method, step, made, tmp_path):
    """Each entry of its configuration with values of the wrong kinds: one line, or a model that
    does not depend on it. step: one of so many is tried.
    """
    run, _, _ = made("gelu", method)
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    config = json.loads((run / "config.json").read_text())

    def described(changed):
        """Whether what is known of the model before it is written is read without a traceback."""
        (copy / "config.json").write_text(json.dumps(changed))
        args = argparse.Namespace(
            run=str(copy), weights=None, threshold="f1", calibrate=False, precision="fp32",
            opset=23, input="uint8", data=None, images=None,
        )  # fmt: skip
        try:
            model, metadata, _, read = export.load_run(args)
        except common.UserError as error:
            assert len(str(error).splitlines()) == 1
            return False
        json.dumps(metadata, default=common.plain)
        export.validation_patches(copy, read, args, 4)
        return True

    assert described(config)
    for part in (None, *config):
        for value in damaged_values(None):
            if part is None:
                assert not described(value)
            elif part not in ("environment",):
                described(config | {part: value})
    damages = []
    for part in ("flags", "data", "encoder", "source"):
        for key, right in config[part].items():
            damages += [(part, key, value) for value in damaged_values(right)]
    refused = 0
    for part, key, value in damages[::step]:
        changed = json.loads(json.dumps(config))
        changed[part][key] = value
        refused += not described(changed)
    assert refused > 100 / step


def test_damaged_files_of_a_run_are_refused_in_one_line(made, tmp_path, monkeypatch, capsys):
    run, _, _ = made()
    out = tmp_path / "m.onnx"
    for name, content in (
        ("metrics.json", b"[]"),
        ("metrics.json", b'{"sets": {"val\\u001b": 1}}'),
        ("metrics.json", b"{"),
        ("config.json", b"\xff\xfe"),
        ("config.json", b"[" * 100_000),
        ("model.safetensors", b"x" * 100),
        ("model.safetensors", None),
        ("predictions.csv", b"x"),
        ("predictions.csv", None),
    ):
        copy = tmp_path / "run"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(run, copy)
        if content is None:
            content = (run / name).read_bytes()
            content = content[: len(content) // 2 - 3]
        (copy / name).write_bytes(content)
        assert command(monkeypatch, copy, "--out", out, "--patches", 4) == 2, name
        error = capsys.readouterr().err
        assert error.count("error: ") == 1 and name in error, error
    text = (run / "predictions.csv").read_text()
    for wrong in ("nan", "7"):
        lines = text.splitlines()
        lines[2] = ",".join([*lines[2].split(",")[:-1], wrong])
        shutil.copytree(run, copy, dirs_exist_ok=True)
        (copy / "predictions.csv").write_text("\n".join(lines) + "\n")
        assert command(monkeypatch, copy, "--out", out, "--patches", 4) == 2
        assert "predictions.csv" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("size,check", [("8m", True), ("10m", True), ("10m", False)])
def test_full_disk(size, check, made, tmp_path, monkeypatch, capsys):
    """Too small for the patches; for the model; for the model, when what is free was not looked at
    before.
    """
    run, _, _ = made()
    with mounted(tmp_path / "small", f"size={size}") as disk:
        if not check:
            monkeypatch.setattr(export, "room", lambda *_: None)
        assert command(monkeypatch, run, "--out", disk / "m.onnx", "--patches", 64) == 2
        error = capsys.readouterr().err
        assert (
            "are needed" if check and size == "10m" else "the disk is full"
        ) in error and "Traceback" not in error
        assert names(disk) == []


def test_no_output_replaces_an_input(made, tmp_path, monkeypatch, capsys):
    """Neither the weights nor a file of the run, by a link of either kind; nor a link itself."""
    run, weights, _ = made()
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    inputs = (weights, copy / "model.safetensors", copy / "split.json")
    before = [path.read_bytes() for path in inputs]
    for path in inputs:
        for name in ("m.onnx", "m.onnx.data", "m.parity.json"):
            for link in (os.link, os.symlink):
                link(path, tmp_path / name)
                assert command(monkeypatch, copy, "--out", tmp_path / "m.onnx") == 2
                assert "reads or writes this file" in capsys.readouterr().err
                (tmp_path / name).unlink()
    (tmp_path / "target").touch()
    (tmp_path / "m.onnx").symlink_to("target")
    assert command(monkeypatch, copy, "--out", tmp_path / "m.onnx") == 2
    assert "a symbolic link" in capsys.readouterr().err
    (tmp_path / "m.onnx").unlink()
    os.mkfifo(tmp_path / "m.onnx")
    assert command(monkeypatch, copy, "--out", tmp_path / "m.onnx") == 2
    assert "not a regular file" in capsys.readouterr().err
    assert [path.read_bytes() for path in inputs] == before


def test_permissions_of_a_replaced_model_stay(made, tmp_path, monkeypatch):
    run, _, _ = made()
    (tmp_path / "m.onnx").touch(0o600)
    assert command(monkeypatch, run, "--out", tmp_path / "m.onnx", "--patches", 4) == 0
    assert stat.S_IMODE((tmp_path / "m.onnx").stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "m.parity.json").stat().st_mode) != 0o600


@pytest.mark.skipif(sys.platform != "linux", reason="names of bytes are Linux's")
def test_paths_that_are_not_utf8(made, tmp_path, monkeypatch, capsys):
    run, _, _ = made()
    folder = tmp_path / os.fsdecode(b"lat\xfcn")
    shutil.copytree(run, folder / "run")
    assert command(monkeypatch, folder / "run", "--patches", 4) == 2
    assert "paths in UTF-8 alone" in capsys.readouterr().err
    assert command(monkeypatch, folder / "run", "--out", tmp_path / "m.onnx") == 2
    assert "not valid UTF-8" in capsys.readouterr().err  # safetensors cannot open it


def test_read_only_folder(made, tmp_path, monkeypatch, capsys):
    run, _, _ = made()
    with mounted(tmp_path / "ro", "ro") as disk:
        assert command(monkeypatch, run, "--out", disk / "m.onnx") == 2
        assert "not writable" in capsys.readouterr().err


@pytest.mark.slow
def test_killed_at_any_time(made, tmp_path, monkeypatch):
    """Twenty times: while a model.onnx stands there it is whole; the next export clears away what a
    killed one left, and gives the bytes of an uninterrupted one.
    """
    run, _, _ = made()
    out, whole = tmp_path / "m.onnx", tmp_path / "whole" / "m.onnx"
    arguments = (str(run), "--patches", "4", "--external", "--out")
    assert command(monkeypatch, *arguments, whole) == 0
    expected = session.Classifier(whole, "cpu")(patches(2))
    start = time.monotonic()
    assert command(monkeypatch, *arguments, out) == 0
    seconds = time.monotonic() - start
    generator = random.Random(0)
    for i in range(20):
        kind = (signal.SIGKILL, signal.SIGTERM)[i % 2]
        process = subprocess.Popen(
            [sys.executable, "-c", HARNESS, *arguments, str(out)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        end = time.monotonic() + 120
        while not (folders := list(tmp_path.glob(f".m.onnx.{process.pid}.*"))):
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.01)
        time.sleep(generator.uniform(0, seconds))
        process.send_signal(kind)
        process.wait()
        if kind == signal.SIGTERM:
            assert not any(folder.exists() for folder in folders)
        if out.exists():
            assert np.array_equal(session.Classifier(out, "cpu")(patches(2)), expected)
    assert command(monkeypatch, *arguments, out) == 0
    assert names(tmp_path) == ["m.onnx", "m.onnx.data", "m.parity.json", "whole"]
    for name in names(tmp_path / "whole"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_no_moment_with_an_old_graph_and_new_weights(tmp_path, monkeypatch):
    folder = tmp_path / "work"
    folder.mkdir()
    for name in ("m.onnx", "m.onnx.data", "m.parity.json"):
        (folder / name).write_text("new")
        (tmp_path / name).write_text("old")
    replace, seen = os.replace, []

    def watch(source, target):
        replace(source, target)
        seen.append(
            {
                name: (tmp_path / name).read_text() if (tmp_path / name).exists() else None
                for name in ("m.onnx", "m.onnx.data")
            }
        )

    monkeypatch.setattr(os, "replace", watch)
    export.put_in_place(folder, tmp_path / "m.onnx")
    assert [state["m.onnx"] for state in seen] == [None, None, "new"] and seen[-1][
        "m.onnx.data"
    ] == "new"


# ---------------------------------------------------------------- large


@pytest.mark.long
def test_giant_with_little_memory(tmp_path):
    """1.1 billion parameters in fp16: the peak of the export and of its check stays under 1.6 times
    the fp32 size.
    """
    sys.path.insert(0, str(HERE / "bench"))
    done = subprocess.run(
        [sys.executable, str(HERE / "bench" / "giant_export.py"), "--folder", str(tmp_path)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


# ---------------------------------------------------------------- adapters in peft's format


def adapter(monkeypatch, folder, weights, out, *arguments):
    return command(
        monkeypatch,
        "--adapter",
        folder,
        "--model",
        "tiny-gelu",
        "--weights",
        weights,
        "--out",
        out,
        "--patches",
        8,
        *arguments,
    )


@pytest.mark.slow
def test_a_runs_adapter_goes_out_and_comes_back(made, tmp_path, monkeypatch, capsys):
    """--peft, then --adapter: the run's probabilities; without the head its embedding."""
    run, weights, unmerged = made()
    assert command(monkeypatch, run, "--peft", tmp_path / "peft") == 0
    assert names(tmp_path / "peft") == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "head.safetensors",
    ]
    assert "head.safetensors" in capsys.readouterr().out
    assert adapter(monkeypatch, tmp_path / "peft", weights, tmp_path / "m.onnx", "--mpp", 0.25) == 0
    images = patches(6, seed=4)
    with torch.inference_mode():
        embedding = unmerged.embed(torch.from_numpy(images))
        probability = torch.sigmoid(unmerged.classify(embedding)).numpy()
    model = session.Classifier(tmp_path / "m.onnx", "cpu")
    assert np.abs(model(images) - probability).max() <= 1e-5
    assert (model.mpp, model.threshold, model.labels) == (0.25, 0.5, list(MITOSIS))
    assert model.metadata["licence"] == "MIT" and "on unknown data" in model.describe()

    (tmp_path / "peft" / "head.safetensors").unlink()
    capsys.readouterr()
    for precision, tolerance in (("fp32", 1e-4), ("fp16", 2e-2)):
        out = tmp_path / f"{precision}.onnx"
        arguments = (tmp_path / "peft", weights, out, "--precision", precision)
        assert adapter(monkeypatch, *arguments) == 0
        assert "no head in the folder, so the model gives the embedding alone" in (
            said := capsys.readouterr().out
        )
        assert "largest |Δe| / |e|" in said
        model = session.Classifier(out, "cpu")
        off = model(images, output="embedding") - embedding.numpy()
        assert np.linalg.norm(off, axis=1).max() <= tolerance * np.linalg.norm(embedding[0])
        assert (model.outputs, model.threshold, model.labels) == (["embedding"], None, None)
        assert "an encoder without a head" in model.describe()
        with pytest.raises(common.UserError, match="no output probability"):
            model(images)
        done = subprocess.run(
            [sys.executable, str(HERE / "classify.py"), str(out)], capture_output=True, text=True
        )
        assert done.returncode == 0 and "an encoder without a head" in done.stdout
    assert adapter(monkeypatch, tmp_path / "peft", weights, out, "--precision", "int8") == 2
    assert "has no head" in capsys.readouterr().err


def test_an_adapter_trained_by_peft(made, tmp_path, monkeypatch):
    """Of rank 3 on two of the layers, with a head of two outputs that peft saved with it."""
    peft = pytest.importorskip("peft")
    _, weights, _ = made()
    network = models.PatchClassifier(models.load_encoder("tiny-gelu", weights)).eval()
    network.encoder.add_module("head", torch.nn.Linear(64, 2))
    config = peft.LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=["attn.qkv", "mlp.fc1"],
        modules_to_save=["head"],
        init_lora_weights=False,
    )
    adapted = peft.get_peft_model(network.encoder, config)
    adapted.save_pretrained(tmp_path / "peft")
    assert adapter(monkeypatch, tmp_path / "peft", weights, tmp_path / "m.onnx") == 0
    images = patches(6, seed=4)
    with torch.inference_mode():
        embedding = network.embed(torch.from_numpy(images))
        logits = adapted.base_model.model.head(embedding)
    expected = torch.softmax(logits, dim=1)[:, 1].numpy()
    probability = session.Classifier(tmp_path / "m.onnx", "cpu")(images)
    assert np.abs(probability - expected).max() <= 1e-5 and np.ptp(expected) > 1e-3


def test_mistakes_with_adapters_are_one_line(made, tmp_path, monkeypatch, capsys):
    run, weights, _ = made()
    probe, _, _ = made("gelu", "full")
    folder, out = tmp_path / "peft", tmp_path / "m.onnx"
    assert command(monkeypatch, run, "--peft", folder) == 0
    (tmp_path / "none").mkdir()
    given = ("--adapter", folder, "--model", "tiny-gelu", "--weights", weights)
    for arguments, text in (
        ([run, *given, "--out", out], "which run?"),
        (["--adapter", folder, "--out", out], "--adapter needs --model"),
        (given, "--adapter needs --model NAME (its encoder) and --out"),
        ([*given, "--out", out, "--peft", tmp_path / "p"], "--adapter has one already"),
        ([*given, "--out", out, "--calibrate"], "--calibrate needs"),
        ([*given, "--out", out, "--mpp", 0], "--mpp"),
        ([*given, "--out", out, "--threshold", "sensitivity=0.9"], "validation predictions"),
        (["--adapter", tmp_path / "none", *given[2:], "--out", out], "adapter_model.safetensors"),
        (["--adapter", tmp_path / "gone", *given[2:], "--out", out], "no such folder"),
        (["--adapter", folder, "--model", "tiny-none", "--out", out], "tiny-none"),
        ([run, "--model", "tiny-gelu"], "--model goes with --adapter"),
        ([run, "--mpp", 0.5], "--mpp goes with --adapter"),
        ([run, "--peft", tmp_path / "p", "--out", out], "give one of them"),
        ([probe, "--peft", tmp_path / "p"], "has no adapter to write"),
        ([run, "--peft", weights], "name a folder"),
    ):
        assert command(monkeypatch, *arguments) == 2, arguments
        error = capsys.readouterr().err
        assert text in error and "Traceback" not in error, (arguments, error)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"init_lora_weights": "pissa"}))
    assert command(monkeypatch, *given, "--out", out) == 2
    assert "init_lora_weights" in capsys.readouterr().err
    assert not out.exists() and names(tmp_path) == ["none", "peft"]


# ---------------------------------------------------------------- several runs as one model


@pytest.fixture(scope="module")
def probes(tmp_path_factory):
    """Three folds of two probes on one encoder."""
    folder = tmp_path_factory.mktemp("probes")
    table = small.dataset(folder / "data", cases=12, per_case=8)
    words = ["--data", table, "--model", "wide", "--weights", "random", "--runs", folder / "runs"]
    words += ["--probe", "uni", "l2", "--fold", 0, 1, 2, "--device", "cpu"]
    assert small.call(probe, *words) == 0
    return folder / "runs/small"


def of_folds(runs_of_data, kind="wide-probe"):
    return [runs_of_data / kind / f"frac1-fold{fold}" for fold in range(3)]


def test_folds_become_one_model(probes, tmp_path, monkeypatch, capsys):
    """The mean of what torch gives for each, with the threshold of the mean, one encoder inside."""
    folders, out = of_folds(probes), tmp_path / "mean.onnx"
    assert command(monkeypatch, *folders, "--out", out, "--threshold", "balanced") == 0
    assert names(tmp_path) == ["mean.onnx", "mean.parity.json"]
    images = patches(20, seed=3)
    expected = []
    for folder in folders:
        model, _ = checkpoint.load_run(folder)
        expected.append(1 / (1 + np.exp(-models.predict(model, images, progress=None))))
    classifier = session.Classifier(out, "cpu")
    assert np.abs(classifier(images) - np.mean(expected, axis=0)).max() <= 1e-5
    (mean,), _ = ensemble.ensembles(results.collect(folders, "balanced")[0])
    assert classifier.threshold == mean.threshold
    metadata = classifier.metadata
    assert metadata["metrics"]["test"] == mean.sets["test"]
    assert metadata["method"] == "mean of 3: probe" and metadata["encoder"] == "wide"
    assert [member["fold"] for member in metadata["members"]] == [0, 1, 2]
    assert metadata["members"][1]["run"] == "small/wide-probe/frac1-fold1"
    assert metadata["parity"]["predictions.csv"]["largest"] < 1e-5
    own = [run.sets["val"]["n"] for run in mean.members]
    assert metadata["parity"]["predictions.csv"]["patches"] == sum(own)  # each on its own
    assert command(monkeypatch, folders[0], "--out", tmp_path / "one.onnx") == 0
    size, alone = (path.stat().st_size for path in (out, tmp_path / "one.onnx"))
    assert size < alone + 16384
    assert "mean of 3: probe on wide" in capsys.readouterr().out
    assert "mean of 3: probe" in classifier.describe()


def test_calibrated_members_in_fewer_bits_beside_their_weights(probes, tmp_path, monkeypatch):
    folders, out = [], tmp_path / "out/mean.onnx"
    for fold, folder in enumerate(of_folds(probes, "wide-probe-l2")):
        folders.append(shutil.copytree(folder, tmp_path / f"fold{fold}"))
        columns = runs.read_predictions(folders[-1] / "predictions.csv")
        first = np.flatnonzero(columns["set"] == "val")[: 2 + fold]  # these are made mistakes
        columns["logit"][first] *= -0.5
        columns["probability"][first] = 1 / (1 + np.exp(-columns["logit"][first]))
        runs.write_predictions(folders[-1] / "predictions.csv", columns)
        common.write_json(folders[-1] / "metrics.json", metrics.of_predictions(columns))
    flags = ["--precision", "fp16", "--external", "--calibrate", "--threshold", "0.4"]
    assert command(monkeypatch, *folders, "--out", out, *flags) == 0
    assert names(out.parent) == ["mean.onnx", "mean.onnx.data", "mean.parity.json"]
    classifier, images = session.Classifier(out, "cpu"), patches(20, seed=3)
    temperatures = [member["temperature"] for member in classifier.metadata["members"]]
    assert classifier.threshold == 0.4 and 1.0 not in temperatures
    expected = []
    for folder, temperature in zip(folders, temperatures):
        model, _ = checkpoint.load_run(folder)
        logits = models.predict(model, images, progress=None)
        expected.append(1 / (1 + np.exp(-logits / temperature)))
    assert np.abs(classifier(images) - np.mean(expected, axis=0)).max() <= 5e-3


def test_runs_that_have_no_mean_are_refused_in_one_line(probes, tmp_path, monkeypatch, capsys):
    first, second, _ = of_folds(probes)
    out = ["--out", tmp_path / "m.onnx"]

    def changed(name, change, source=second):
        copy = tmp_path / name
        shutil.copytree(source, copy)
        config = json.loads((copy / "config.json").read_text())
        change(config)
        (copy / "config.json").write_text(json.dumps(config))
        return copy

    scale = changed("scale", lambda config: config["data"].update(mpp=0.5))
    classes = changed("classes", lambda config: config["data"].update(classes=["a", "b"]))
    unfinished = changed("unfinished", lambda config: None)
    (unfinished / "metrics.json").unlink()
    for words, text in (
        ([first, second], "give --out"),
        ([first, first / ".." / first.name, *out], "named twice"),
        ([first, scale, *out], "mpp 0.5"),
        ([first, classes, *out], "a/b and hard negative/mitotic figure"),
        ([first, unfinished, *out], "not a finished run"),
        ([first, second, *out, "--embedding"], "--embedding"),
        ([first, second, "--peft", tmp_path / "peft"], "--peft"),
        ([first, tmp_path / "none", *out], "no such run"),
    ):
        assert command(monkeypatch, *words) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: ") and text in error, (words, error)
    assert not list(tmp_path.glob("m.*")) and not list(tmp_path.glob(".m*"))


def test_members_trained_on_tests_of_others_are_named(probes):
    members = [results.read_run(folder) for folder in of_folds(probes)]
    assert export.trained_on_tests(members) == []
    ids = members[1].split["ids"]
    ids["test"], ids["train"] = ids["train"][:5], ids["test"]
    lines = export.trained_on_tests(members[:2])
    assert len(lines) == 2 and " 5 of the test patches of " in lines[0] + lines[1]
