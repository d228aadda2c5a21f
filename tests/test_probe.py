import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import small
import torch
from safetensors.torch import load_file, save_file
from scipy.optimize import minimize
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss

import checkpoint
import common
import data
import models
import probe
import runs
from dataset import patches as patches_module
from encoders.table import HALF
from reporting import results


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return small.dataset(tmp_path_factory.mktemp("data"), cases=12, per_case=8)


def flags(table, out, *more):
    return [
        "--data",
        table,
        "--model",
        "wide",
        "--weights",
        "random",
        "--runs",
        out,
        "--device",
        "cpu",
        *more,
    ]


def folder(out, probe="", fold=0, frac=1):
    return out / "small" / f"wide-probe{probe}" / f"frac{frac:g}-fold{fold}"


def test_all_probes_of_a_grid_in_one_command(tmp_path, table, counted):
    grid = ["--probe", "uni", "l2", "knn", "prototype", "--k", 3, "--frac", 0.2, 1, "--fold", 0, 1]
    assert small.call(probe, *flags(table, tmp_path, *grid)) == 0
    assert sorted(counted) == list(range(96))  # every patch once, whatever the grid
    for suffix in ("", "-l2", "-knn-k3", "-prototype"):
        for frac in (0.2, 1):
            for fold in (0, 1):
                run = folder(tmp_path, suffix, fold, frac)
                metrics = common.read_json(run / "metrics.json")
                assert metrics["sets"]["test"]["auroc"] > 0.9, run
                assert (run / "model.safetensors").exists() == (suffix != "-knn-k3")
    before = len(counted)
    assert small.call(probe, *flags(table, tmp_path, *grid)) == 0
    assert len(counted) == before


def test_a_saved_probe_loads_and_predicts_the_same(tmp_path, table):
    assert small.call(probe, *flags(table, tmp_path, "--probe", "uni", "l2", "prototype")) == 0
    annotations = data.load_dataset(table)
    for suffix in ("", "-l2", "-prototype"):
        predictions = runs.read_predictions(folder(tmp_path, suffix) / "predictions.csv")
        model, _ = checkpoint.load_run(folder(tmp_path, suffix))
        logits = models.predict(
            model, patches_module.Patches(annotations), annotations.rows(predictions["id"])
        )
        assert np.abs(logits - predictions["logit"]).max() < 1e-3 * max(1, np.abs(logits).max())


def test_the_uni_probe_minimises_its_formula(tmp_path, table):
    """Mean cross-entropy of a two-class softmax + (1/C) ½ ‖W‖, C = 2 D / 100, on the training pool
    alone.
    """
    assert small.call(probe, *flags(table, tmp_path)) == 0
    annotations = data.load_dataset(table)
    split = data.load_split(folder(tmp_path) / "split.json", annotations)
    rows = annotations.rows(split.train)
    X = np.load(tmp_path / "embeddings" / "small" / "wide-cls.npy")[rows].astype(np.float64)
    sign, C = 1 - 2.0 * annotations.label[rows], 2 * 256 / 100

    def loss(theta):
        w, b = theta[:-1], theta[-1]
        m, norm = sign * (X @ w + b), np.linalg.norm(w)
        # The rows of W are ∓ w / 2, so that ‖W‖ = ‖w‖ / √2.
        slope = sign / (1 + np.exp(-m)) / len(rows)
        gradient = np.append(slope @ X + w / max(norm, 1e-300) / np.sqrt(2) / 2 / C, slope.sum())
        return np.logaddexp(0, m).mean() + norm / np.sqrt(2) / 2 / C, gradient

    head = load_file(folder(tmp_path) / "model.safetensors")
    found = loss(
        np.append(head["head.weight"][0].double().numpy(), head["head.bias"].double().numpy())
    )[0]
    theta = np.random.default_rng(0).normal(0, 1e-3, 257)
    for _ in range(5):  # restarts clear its memory
        theta = minimize(
            loss, theta, jac=True, method="L-BFGS-B", options={"maxiter": 5000, "ftol": 1e-16}
        ).x
    assert abs(found - loss(theta)[0]) < 1e-6
    training = common.read_json(folder(tmp_path) / "metrics.json")["training"]
    assert training["C"] == C and training["train_loss"] == pytest.approx(found, abs=1e-6)
    assert training["iterations"] > 3 and training["excess"] < 1e-6 and training["change"] < 1e-6


def test_l2_chooses_C_on_validation_and_uni_does_not_see_it(tmp_path, table):
    assert small.call(probe, *flags(table, tmp_path, "--probe", "l2", "uni")) == 0
    chosen = common.read_json(folder(tmp_path, "-l2") / "metrics.json")["training"]
    assert chosen["C"] in probe.C_GRID
    fixed = [
        common.read_json(folder(tmp_path, f"-l2-C{C:g}") / "metrics.json")["training"]["val_loss"]
        for C in probe.C_GRID
        if small.call(probe, *flags(table, tmp_path, "--probe", "l2", "--C", C)) == 0
    ]
    assert chosen["C"] == probe.C_GRID[int(np.argmin(fixed))]
    # Fitted alone and side by side, as near as the solver promises; the sums differ with the number
    # of threads.
    assert chosen["val_loss"] == pytest.approx(min(fixed), abs=1e-8)


def test_C_is_the_best_on_validation_not_on_training():
    rng = np.random.default_rng(0)
    X, w = rng.normal(size=(400, 60)).astype(np.float32), rng.normal(size=60) / 8
    labels = (1 / (1 + np.exp(-X @ w)) > rng.random(400)).astype(int)
    train, val = np.arange(120), np.arange(120, 400)
    job = probe.Job(train, val, "x")
    probe.fit_logistic(X, labels, [job], "l2", False, None, "cpu")
    losses = {}
    for C in probe.C_GRID:
        p = (
            LogisticRegression(C=C, solver="newton-cholesky")
            .fit(X[train], labels[train])
            .predict_proba(X[val])[:, 1]
        )
        losses[C] = log_loss(labels[val], p)
    best = min(losses, key=losses.get)
    assert probe.C_GRID[0] < best < probe.C_GRID[-1]  # neither end, where training would take it
    assert job.facts["C"] == best and job.facts["val_loss"] == pytest.approx(losses[best], abs=1e-4)


def test_knn_votes():
    X = np.array([[1, 0], [0.9, 0.1], [0, 1], [0.1, 1]], np.float32)
    labels = np.array([1, 1, 0, 0])
    query = np.array([[2.0, 0.1], [0.0, 3.0], [1, 1]], np.float32)
    logits = probe.knn_logits(query, X, labels, np.arange(4), np.arange(3), k=2)
    assert logits[0] == pytest.approx(np.log(3)) and logits[1] == pytest.approx(-np.log(3))
    assert (
        np.abs(probe.knn_logits(query, X, labels, np.arange(4), np.arange(3), k=99)).max() < 1e-12
    )


def test_prototypes_lie_between_the_means():
    X, labels = np.array([[0.0, 0], [2, 0], [0, 4], [2, 4]]), np.array([0, 0, 1, 1])
    job = probe.Job(np.arange(4), np.arange(0), "x")
    probe.fit_prototypes(X, labels, job, 10, 0)
    assert X @ job.weight + job.bias == pytest.approx([-2, -2, 2, 2])


def test_one_class_names_fraction_fold_and_counts(tmp_path, table, capsys):
    rows = [line.split(",") for line in table.read_text().splitlines()]
    one = table.with_name("one.csv")
    one.write_text(
        "\n".join(
            ",".join((path, "0" if domain == "B" else label, case, domain))
            for path, label, case, domain in rows
        )
    )
    assert (
        small.call(probe, *flags(one, tmp_path, "--domain", "B", "--frac", 0.5, "--fold", 3)) == 2
    )
    (error,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert error.startswith(
        "error: one, fraction 0.5, fold 3: the training pool holds one class only (mitotic "
        "figure: 0, "
    )
    assert not list(tmp_path.glob("one/*/*/config.json")) and not (tmp_path / "embeddings").exists()


@pytest.fixture
def counted(monkeypatch):
    """Rows that went through the encoder."""
    rows, real = [], models.predict
    monkeypatch.setattr(
        models, "predict", lambda m, p, own, *a, **k: rows.extend(own) or real(m, p, own, *a, **k)
    )
    return rows


def test_stored_embeddings_are_used_only_for_what_they_are(
    tmp_path, table, monkeypatch, capsys, counted
):
    path = tmp_path / "embeddings" / "small" / "wide-cls.npy"
    state = models.load_encoder("wide", "random").state_dict()
    save_file(state, tmp_path / "a.safetensors")
    save_file({name: tensor * 1.01 for name, tensor in state.items()}, tmp_path / "b.safetensors")

    def embeddings(weights="a", *more):
        """(embeddings after a repeated run, rows that were computed, lines that say why)"""
        counted.clear()
        capsys.readouterr()
        assert (
            small.call(
                probe,
                *flags(
                    table,
                    tmp_path,
                    "--weights",
                    tmp_path / f"{weights}.safetensors",
                    "--force",
                    *more,
                ),
            )
            == 0
        )
        return (
            np.load(path),
            len(counted),
            [x for x in capsys.readouterr().out.splitlines() if "anew" in x],
        )

    first, count, why = embeddings()
    assert count == 96 and not why
    again, count, why = embeddings()
    assert count == 0 and not why and np.array_equal(first, again)
    other, count, why = embeddings("b")
    assert count == 96 and len(why) == 1 and "made from other weights" in why[0]
    assert np.abs(other - first).max() > 1e-3
    embeddings()
    images = sorted((table.parent / "patches").iterdir())
    old = images[5].read_bytes()
    images[5].write_bytes(images[6].read_bytes())  # another image under the same name
    _, count, why = embeddings()
    images[5].write_bytes(old)
    assert count == 96 and len(why) == 1 and "made from other pixels" in why[0]
    embeddings()
    with monkeypatch.context() as patch:
        patch.setitem(
            models.ENCODERS, "wide", dataclasses.replace(models.ENCODERS["wide"], norm=HALF)
        )
        _, count, why = embeddings()
    assert count == 96 and len(why) == 1 and "made from other normalisation" in why[0]
    _, count, why = embeddings("a", "--dtype", "bf16")
    assert count == 96 and "anew" in why[0]

    content = bytearray(path.read_bytes())  # damaged on the disk
    content[-3] ^= 255
    path.write_bytes(content)
    capsys.readouterr()
    assert (
        small.call(
            probe,
            *flags(
                table,
                tmp_path,
                "--weights",
                tmp_path / "a.safetensors",
                "--force",
                "--dtype",
                "bf16",
            ),
        )
        == 2
    )
    assert f"error: {path}: damaged; delete it" in capsys.readouterr().err


def test_half_precision_is_stored_as_it_is(tmp_path):
    annotations = data.load_dataset(small.dataset(tmp_path, cases=2, per_case=2))
    model = models.PatchClassifier(models.load_encoder("tiny", "random", dtype="fp16"))
    patches = patches_module.Patches(annotations)
    X = probe.embeddings(model, patches, annotations, tmp_path / "e", torch.float16, 4)
    expected = models.predict(model, patches, batch_size=4, output="embedding")
    assert X.dtype == np.float16 and np.array_equal(X.astype(np.float32), expected)


def test_a_stopped_extraction_is_continued(tmp_path, table, monkeypatch, capsys):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert small.call(probe, *flags(table, whole)) == 0
    real, done = patches_module.Patches.read, []

    def read(self, rows):
        if len(done) == 48 and read.stops:
            raise KeyboardInterrupt
        done.extend(rows)
        return real(self, rows)

    read.stops = True
    monkeypatch.setattr(patches_module.Patches, "read", read)
    assert small.call(probe, *flags(table, cut, "--batch-size", 16)) == 130
    found = capsys.readouterr()
    assert "finished work is kept" in found.err
    read.stops = False
    kept = int((np.fromfile(cut / "embeddings" / "small" / "wide-cls.done", np.uint8)).sum())
    assert kept in (16, 32, 48)  # a batch is written when the next one is under way
    del done[kept:]
    assert small.call(probe, *flags(table, cut, "--batch-size", 16)) == 0
    assert f"continuing, {kept} of 96 are done" in capsys.readouterr().out
    assert sorted(done) == list(range(96))  # what was kept is not done twice
    a, b = (np.load(out / "embeddings" / "small" / "wide-cls.npy") for out in (whole, cut))
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def script(path, text):
    """probe.py as a process that knows the small encoders and writes every batch, with `text` run
    before.
    """
    path.write_text(
        f"import sys; sys.path[:0] = [{str(small.HERE.parent)!r}, {str(small.HERE)!r}]\n"
        "import small, common, models, probe\nprobe.SECONDS = "
        f"0\n{text}\ncommon.command(probe.main)\n"
    )
    return path


STOPS = """
import time
real, calls = models.PatchClassifier.embed, []
def embed(self, images):
    calls.append(1)
    if len(calls) == 5:
        print("three batches are written", flush=True)
        time.sleep(600)
    return real(self, images)
models.PatchClassifier.embed = embed
"""


@pytest.mark.slow
def test_kill_9_in_the_extraction(tmp_path, table, capsys):
    args = flags(table, tmp_path / "cut", "--batch-size", 16)
    process = subprocess.Popen(
        [sys.executable, script(tmp_path / "stops.py", STOPS), *map(str, args)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert any(line.startswith("three batches") for line in process.stdout)  # reads up to that line
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert small.call(probe, *args) == 0
    assert "continuing, 48 of 96 are done" in capsys.readouterr().out
    assert small.call(probe, *flags(table, tmp_path / "whole", "--batch-size", 16)) == 0
    cut, whole = (
        tmp_path / name / "embeddings" / "small" / "wide-cls.npy" for name in ("cut", "whole")
    )
    np.testing.assert_allclose(np.load(cut), np.load(whole), rtol=1e-5, atol=1e-5)
    assert not cut.with_suffix(".done").exists()


@pytest.mark.parametrize(
    "more, name, width",
    [
        (["--pool", "mean"], "wide-mean", 256),
        (["--pool", "cls+mean"], "wide-cls+mean", 512),
        (["--pool", "patch-center"], "wide-patch-center", 256),
        (["--pool", "cls+center"], "wide-cls+center", 512),
        (["--layer", 1], "wide-cls-layer1", 256),
        (["--tta"], "wide-cls-tta", 256),
    ],
)
def test_pools_layers_and_tta_have_their_own_embeddings_and_runs(
    tmp_path, table, more, name, width
):
    assert small.call(probe, *flags(table, tmp_path, *more)) == 0
    X = np.load(tmp_path / "embeddings" / "small" / f"{name}.npy")
    assert X.shape == (96, width)
    run = next(tmp_path.glob("small/wide-probe-*/frac1-fold0"))
    model, config = checkpoint.load_run(run)
    annotations = data.load_dataset(table)
    again = models.predict(model, patches_module.Patches(annotations), output="embedding")
    assert np.abs(again - X).max() < 1e-4


def test_balanced_classes_have_runs_of_their_own(tmp_path, table, capsys):
    more = ["--probe", "uni", "l2", "knn", "--class-weight", "balanced", "--name", "try1"]
    assert small.call(probe, *flags(table, tmp_path, *more)) == 0
    names = sorted(path.parent.name for path in tmp_path.glob("small/*/frac1-fold0"))
    assert names == [
        "wide-probe-balanced-try1",
        "wide-probe-knn-try1",
        "wide-probe-l2-balanced-try1",
    ]
    for name, expected in zip(names, ("balanced", None, "balanced")):
        config = common.read_json(tmp_path / "small" / name / "frac1-fold0" / "config.json")
        assert config["flags"].get("class_weight") == expected
        assert config["flags"]["name"] == "try1"
    capsys.readouterr()
    more = ["--probe", "knn", "--class-weight", "balanced"]
    assert small.call(probe, *flags(table, tmp_path, *more)) == 2
    assert "only the probes uni and l2" in capsys.readouterr().err


def test_tta_is_the_mean_over_flips_and_turns(table):
    encoder = models.load_encoder("wide", "random")
    images = patches_module.Patches(data.load_dataset(table)).read([3])
    views = [np.rot90(part, k) for part in (images[0], images[0][:, ::-1]) for k in range(4)]
    plain = models.predict(
        models.PatchClassifier(encoder), np.stack(views), output="embedding"
    ).mean(0)
    tta = models.predict(models.PatchClassifier(encoder, tta=True), images, output="embedding")[0]
    assert np.abs(plain - tta).max() < 1e-5


def test_further_datasets_and_domains(tmp_path, table):
    other = small.dataset(tmp_path / "other", cases=4, seed=9, name="elsewhere")
    assert (
        small.call(probe, *flags(table, tmp_path / "r", "--domain", "A", "B", "--test", other)) == 0
    )
    for domain, rest in (("A", "B"), ("B", "A")):
        metrics = common.read_json(
            tmp_path / "r" / "small" / "wide-probe" / f"domain{domain}-fold0" / "metrics.json"
        )
        assert set(metrics["sets"]) == {"val", "test", rest, "elsewhere"}
    assert (tmp_path / "r" / "embeddings" / "elsewhere" / "wide-cls.npy").exists()


def test_a_further_dataset_of_a_finished_run(tmp_path, table):
    other = small.dataset(tmp_path / "other", cases=4, seed=9, name="elsewhere")
    assert small.call(probe, *flags(table, tmp_path / "r", "--probe", "uni", "knn")) == 0
    assert (
        small.call(probe, *flags(table, tmp_path / "r", "--probe", "uni", "knn", "--test", other))
        == 0
    )
    for suffix in ("", "-knn"):
        metrics = json.loads((folder(tmp_path / "r", suffix) / "metrics.json").read_text())
        assert set(metrics["sets"]) == {"val", "test", "elsewhere"} and "training" in metrics
        assert metrics["sets"]["elsewhere"]["auroc"] > 0.8


def test_two_further_datasets_at_once(tmp_path, table):
    """Also of runs that are finished, and one after the other."""
    others = [
        small.dataset(tmp_path / name, cases=4, seed=seed, name=name)
        for seed, name in enumerate(("first", "second", "third"))
    ]
    args = flags(table, tmp_path / "r", "--probe", "uni", "knn")
    assert small.call(probe, *args, "--test", *others[:2]) == 0
    assert small.call(probe, *args, "--test", *others) == 0
    for suffix in ("", "-knn"):
        metrics = common.read_json(folder(tmp_path / "r", suffix) / "metrics.json")
        assert set(metrics["sets"]) == {"val", "test", "first", "second", "third"}
        assert set(metrics["tests"]) == {"first", "second", "third"}


def test_source_mpp_is_the_runs_own_data_alone(tmp_path, table, monkeypatch):
    other = small.dataset(tmp_path / "other", cases=4, seed=9, name="elsewhere")
    scales = {}

    class Recorded(patches_module.Patches):
        def __init__(self, annotations, **choices):
            super().__init__(annotations, **choices)
            scales[annotations.name] = (self.source_mpp, bool(annotations.mpp))

    monkeypatch.setattr(probe, "Patches", Recorded)
    args = flags(table, tmp_path / "r", "--source-mpp", 0.5, "--test", other)
    assert small.call(probe, *args) == 0
    assert scales == {"small": (0.5, True), "elsewhere": (None, False)}


def test_a_dataset_may_be_called_embeddings(tmp_path, table):
    named = table.with_name("embeddings.csv")
    named.write_bytes(table.read_bytes())
    assert small.call(probe, *flags(named, tmp_path)) == 0
    run = tmp_path / "embeddings" / "wide-probe" / "frac1-fold0"
    assert (tmp_path / "embeddings" / "embeddings" / "wide-cls.npy").exists()
    assert results.find([tmp_path]) == [run] and results.read_run(run).data == "embeddings"


def test_names_of_further_datasets(tmp_path, table, capsys):
    """One like a set of the run itself, another dataset of a known name, images elsewhere: nothing
    silently wrong.
    """
    out, other = tmp_path / "r", small.dataset(tmp_path / "one", cases=4, seed=9, name="two")
    assert small.call(probe, *flags(table, out)) == 0
    for name in ("test", "small"):
        taken = small.dataset(tmp_path / name, cases=4, seed=9, name=name)
        assert small.call(probe, *flags(table, out, "--test", taken)) == 2
        assert f"{name} is the name of one of the run's own" in capsys.readouterr().err
    assert small.call(probe, *flags(table, out, "--images", table.parent, "--test", other)) == 0
    metrics = folder(out) / "metrics.json"
    first = common.read_json(metrics)["sets"]["two"]
    assert first["auroc"] > 0.8  # its own images, not those of --images
    assert (
        small.call(
            probe, *flags(table, out, "--test", small.dataset(tmp_path / "2", cases=3, name="two"))
        )
        == 2
    )
    assert "another dataset called two" in capsys.readouterr().err
    assert small.call(probe, *flags(table, out, "--test", other, other)) == 2
    assert "two datasets are called two" in capsys.readouterr().err
    moved = tmp_path / "moved.csv"
    moved.write_bytes(other.read_bytes())
    for folders, status in (((), 2), ((other.parent, other.parent), 2), ((other.parent,), 0)):
        more = ["--test-images", *folders] if folders else []
        assert small.call(probe, *flags(table, out, "--test", moved, *more)) == status
    assert common.read_json(metrics)["sets"]["moved"] == first


def test_killed_between_the_two_files_of_a_further_test(tmp_path, table, monkeypatch):
    out, other = tmp_path / "r", small.dataset(tmp_path / "one", cases=4, seed=9, name="two")
    assert small.call(probe, *flags(table, out)) == 0
    with monkeypatch.context() as patch:
        patch.setattr(runs, "finish_tests", lambda *rest: sys.exit(9))
        assert small.call(probe, *flags(table, out, "--test", other)) == 9
    assert small.call(probe, *flags(table, out, "--test", other)) == 0
    assert "two" in common.read_json(folder(out) / "metrics.json")["sets"]
    assert (runs.read_predictions(folder(out) / "predictions.csv")["set"] == "two").sum() == 24


def test_the_run_says_what_was_done(tmp_path, table):
    assert small.call(probe, *flags(table, tmp_path, "--domain", "a")) == 0
    flags_kept = common.read_json(
        tmp_path / "small" / "wide-probe" / "domainA-fold0" / "config.json"
    )["flags"]
    assert flags_kept["domain"] == "A" and flags_kept["dtype"] == "fp32"


@pytest.mark.parametrize(
    "more, words",
    [
        (["--seed", -1], "--seed"),
        (["--C", "inf"], "--C"),
        (["--k", 0], "--k"),
        (["--fold", 10**23], "--fold"),
        (["--batch-size", 0], "--batch-size"),
        (["--C", -1], "--C"),
        (["--model", "nope"], "nope"),
        (["--layer", 9], "--layer"),
        (["--frac", 0], "--frac"),
    ],
)
def test_mistakes_are_one_line(tmp_path, table, more, words, capsys):
    assert small.call(probe, *flags(table, tmp_path, *more)) == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1 and words in error


@pytest.mark.slow
def test_torchrun_shares_the_pass(tmp_path, table):
    other = small.dataset(tmp_path / "other", cases=4, seed=9, name="elsewhere")
    launcher = (
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(script(tmp_path / "script.py", "")),
    )
    code, out, err = small.command(
        "probe", *flags(table, tmp_path / "two", "--test", other), launcher=launcher
    )
    assert code == 0, err
    assert small.call(probe, *flags(table, tmp_path / "one", "--test", other)) == 0
    for name in ("small", "elsewhere"):
        a, b = (
            np.load(tmp_path / run / "embeddings" / name / "wide-cls.npy") for run in ("one", "two")
        )
        assert np.abs(a - b).max() < 1e-5 and np.isfinite(b).all()
    assert set(common.read_json(folder(tmp_path / "two") / "metrics.json")["sets"]) == {
        "val",
        "test",
        "elsewhere",
    }


def test_another_setting_is_refused_before_the_pass(tmp_path, table, counted, capsys):
    assert small.call(probe, *flags(table, tmp_path)) == 0
    shutil.rmtree(tmp_path / "embeddings")
    counted.clear()
    assert small.call(probe, *flags(table, tmp_path, "--val-frac", 0.5)) == 2
    assert "--val-frac (was 1.0, now 0.5)" in capsys.readouterr().err and not counted
