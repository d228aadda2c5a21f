import json
import signal
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import crops
import data
import models
import probe
import runs
import small


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return small.dataset(tmp_path_factory.mktemp("data"), cases=12, per_case=8)


def flags(table, out, *more):
    return ["--data", table, "--model", "wide", "--weights", "random", "--runs", out, "--device", "cpu", *more]


def folder(out, probe="", fold=0, frac=1):
    return out / "small" / f"wide-probe{probe}" / f"frac{frac:g}-fold{fold}"


def test_all_probes_of_a_grid_in_one_command(tmp_path, table, monkeypatch):
    passes, real = [], models.predict
    monkeypatch.setattr(models, "predict", lambda m, p, rows, *a, **k: passes.extend(rows) or real(m, p, rows, *a, **k))
    grid = ["--probe", "uni", "l2", "knn", "prototype", "--k", 3, "--frac", 0.2, 1, "--fold", 0, 1]
    assert small.call(probe, *flags(table, tmp_path, *grid)) == 0
    assert sorted(passes) == list(range(96))  # every patch once, whatever the grid
    for suffix in ("", "-l2", "-knn-k3", "-prototype"):
        for frac in (0.2, 1):
            for fold in (0, 1):
                run = folder(tmp_path, suffix, fold, frac)
                metrics = runs.read_json(run / "metrics.json")
                assert metrics["sets"]["test"]["auroc"] > 0.9, run
                assert (run / "model.safetensors").exists() == (suffix != "-knn-k3")
    before = len(passes)
    assert small.call(probe, *flags(table, tmp_path, *grid)) == 0
    assert len(passes) == before


def test_a_saved_probe_loads_and_predicts_the_same(tmp_path, table):
    assert small.call(probe, *flags(table, tmp_path, "--probe", "uni", "l2", "prototype")) == 0
    annotations = data.load_dataset(table)
    for suffix in ("", "-l2", "-prototype"):
        predictions = runs.read_predictions(folder(tmp_path, suffix) / "predictions.csv")
        model, _ = models.load_run(folder(tmp_path, suffix))
        logits = models.predict(model, crops.Patches(annotations), annotations.rows(predictions["id"]))
        assert np.abs(logits - predictions["logit"]).max() < 1e-3 * max(1, np.abs(logits).max())


def test_the_uni_probe_minimises_its_formula(tmp_path, table):
    """Mean cross-entropy of a two-class softmax + (1/C) ½ ‖W‖, C = 2 D / 100: no nearby head does better."""
    assert small.call(probe, *flags(table, tmp_path)) == 0
    head = load_file(folder(tmp_path) / "model.safetensors")
    annotations = data.load_dataset(table)
    split = data.load_split(folder(tmp_path) / "split.json", annotations)
    X = np.load(tmp_path / "embeddings" / "small" / "wide-cls.npy")
    rows = annotations.rows(split.train)
    y, C = annotations.label[rows], 2 * 256 / 100

    def loss(w, b):
        z = X[rows].astype(np.float64) @ w + b
        # The rows of W are ∓ w / 2, so that ‖W‖ = ‖w‖ / √2.
        return np.logaddexp(0, (1 - 2 * y) * z).mean() + np.linalg.norm(w) / np.sqrt(2) / 2 / C
    w, b = head["head.weight"][0].double().numpy(), head["head.bias"].double().item()
    best, rng = loss(w, b), np.random.default_rng(0)
    assert best < 0.9 * loss(0 * w, 0)
    for _ in range(100):
        assert best <= loss(w + rng.normal(0, 1e-3, 256), b + rng.normal(0, 1e-2)) + 1e-7


def test_l2_chooses_C_on_validation_and_uni_does_not_see_it(tmp_path, table):
    assert small.call(probe, *flags(table, tmp_path, "--probe", "l2", "uni")) == 0
    chosen = runs.read_json(folder(tmp_path, "-l2") / "metrics.json")["training"]
    assert chosen["C"] in probe.C_GRID
    fixed = [runs.read_json(folder(tmp_path, f"-l2-C{C:g}") / "metrics.json")["training"]["val_loss"]
             for C in probe.C_GRID if small.call(probe, *flags(table, tmp_path, "--probe", "l2", "--C", C)) == 0]
    assert chosen["val_loss"] == pytest.approx(min(fixed), rel=1e-6)


def test_knn_votes():
    X = np.array([[1, 0], [0.9, 0.1], [0, 1], [0.1, 1]], np.float32)
    labels = np.array([1, 1, 0, 0])
    query = np.array([[2.0, 0.1], [0.0, 3.0], [1, 1]], np.float32)
    logits = probe.knn_logits(query, X, labels, np.arange(4), np.arange(3), k=2)
    assert logits[0] == pytest.approx(np.log(3)) and logits[1] == pytest.approx(-np.log(3))
    assert np.abs(probe.knn_logits(query, X, labels, np.arange(4), np.arange(3), k=99)).max() < 1e-12


def test_prototypes_lie_between_the_means():
    X, labels = np.array([[0.0, 0], [2, 0], [0, 4], [2, 4]]), np.array([0, 0, 1, 1])
    job = {"train": np.arange(4)}
    probe.fit_prototypes(X, labels, job, 10, 0)
    assert X @ job["weight"] + job["bias"] == pytest.approx([-2, -2, 2, 2])


def test_one_class_names_fraction_fold_and_counts(tmp_path, capsys):
    annotations = data.load_dataset(small.dataset(tmp_path / "d"))
    job = {"train": np.flatnonzero(annotations.label == 0)[:7], "frac": 0.01, "fold": 3}
    with pytest.raises(probe.UserError, match="0.01, fold 3: .* 0 mitotic figures and 7 look-alikes"):
        probe.one_class(annotations, job)


def test_stored_embeddings_are_used_only_for_what_they_are(tmp_path, table, monkeypatch, capsys):
    assert small.call(probe, *flags(table, tmp_path)) == 0
    first = np.load(tmp_path / "embeddings" / "small" / "wide-cls.npy")
    folder(tmp_path).joinpath("metrics.json").unlink()
    counted, real = [], models.predict

    def predict(model, patches, rows, *rest, **more):
        counted.extend(rows)
        return real(model, patches, rows, *rest, **more)
    monkeypatch.setattr(models, "predict", predict)
    assert small.call(probe, *flags(table, tmp_path, "--resume")) == 0 and not counted
    # Another image under the same name.
    image = sorted((table.parent / "patches").iterdir())[5]
    old = image.read_bytes()
    image.write_bytes(sorted((table.parent / "patches").iterdir())[6].read_bytes())
    code, out, err = small.command("probe", *flags(table, tmp_path, "--force"))
    image.write_bytes(old)
    assert code == 0 and "pixels" in out and "anew" in out
    second = np.load(tmp_path / "embeddings" / "small" / "wide-cls.npy")
    assert (np.abs(second - first).max(1) > 1e-4).sum() == 1
    # Another normalisation.
    row = models.ENCODERS["wide"]
    monkeypatch.setitem(models.ENCODERS, "wide", type(row)(**{**vars(row), "norm": ((0.5,) * 3, (0.5,) * 3)}))
    counted.clear()
    assert small.call(probe, *flags(table, tmp_path, "--force")) == 0
    assert len(counted) == 96
    # Damaged on the disk.
    path = tmp_path / "embeddings" / "small" / "wide-cls.npy"
    content = bytearray(path.read_bytes())
    content[-3] ^= 255
    path.write_bytes(content)
    assert small.call(probe, *flags(table, tmp_path, "--force")) in (0, 2)


def test_a_killed_extraction_is_continued(tmp_path, table, monkeypatch):
    monkeypatch.setattr(probe, "ROWS_AT_ONCE", 16)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert small.call(probe, *flags(table, whole)) == 0
    real, done = models.predict, []

    def predict(model, patches, rows, *rest, **more):
        if len(done) == 40 + 8 and predict.stops:
            raise KeyboardInterrupt
        done.extend(rows)
        return real(model, patches, rows, *rest, **more)
    predict.stops = True
    monkeypatch.setattr(models, "predict", predict)
    assert small.call(probe, *flags(table, cut)) == 130
    predict.stops = False
    assert small.call(probe, *flags(table, cut, "--resume")) == 0
    assert sorted(done) == list(range(96))  # nothing twice
    a, b = (np.load(out / "embeddings" / "small" / "wide-cls.npy") for out in (whole, cut))
    assert np.array_equal(a, b)
    assert runs.read_json(folder(whole) / "metrics.json") == runs.read_json(folder(cut) / "metrics.json")


def test_kill_9_in_the_extraction(tmp_path, table):
    args = flags(table, tmp_path, "--batch-size", 2)
    process = small.command("probe", *args, wait=False)
    done = tmp_path / "embeddings" / "small" / "wide-cls.done"
    while process.poll() is None and not done.exists():
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    code, out, err = small.command("probe", *args, "--resume")
    assert code == 0, err
    assert np.isfinite(np.load(done.with_suffix(".npy"))).all() and not done.exists()


@pytest.mark.parametrize("more, name, width", [
    (["--pool", "mean"], "wide-mean", 256), (["--pool", "cls+mean"], "wide-cls+mean", 512),
    (["--pool", "patch-center"], "wide-patch-center", 256), (["--layer", 1], "wide-cls-layer1", 256),
    (["--tta"], "wide-cls-tta", 256)])
def test_pools_layers_and_tta_have_their_own_embeddings_and_runs(tmp_path, table, more, name, width):
    assert small.call(probe, *flags(table, tmp_path, *more)) == 0
    X = np.load(tmp_path / "embeddings" / "small" / f"{name}.npy")
    assert X.shape == (96, width)
    run = next(tmp_path.glob("small/wide-probe-*/frac1-fold0"))
    model, config = models.load_run(run)
    annotations = data.load_dataset(table)
    again = models.predict(model, crops.Patches(annotations), output="embedding")
    assert np.abs(again - X).max() < 1e-4


def test_tta_is_the_mean_over_flips_and_turns(table):
    encoder = models.load_encoder("wide", "random")
    images = crops.Patches(data.load_dataset(table)).read([3])
    views = [np.rot90(part, k) for part in (images[0], images[0][:, ::-1]) for k in range(4)]
    plain = models.predict(models.PatchClassifier(encoder), np.stack(views), output="embedding").mean(0)
    tta = models.predict(models.PatchClassifier(encoder, tta=True), images, output="embedding")[0]
    assert np.abs(plain - tta).max() < 1e-5


def test_further_datasets_and_domains(tmp_path, table):
    other = small.dataset(tmp_path / "other", cases=4, seed=9, name="elsewhere")
    assert small.call(probe, *flags(table, tmp_path / "r", "--domain", "A", "B", "--test", other)) == 0
    for domain, rest in (("A", "B"), ("B", "A")):
        metrics = runs.read_json(tmp_path / "r" / "small" / "wide-probe" / f"domain{domain}-fold0" / "metrics.json")
        assert set(metrics["sets"]) == {"val", "test", rest, "elsewhere"}
    assert (tmp_path / "r" / "embeddings" / "elsewhere" / "wide-cls.npy").exists()


def test_a_further_dataset_of_a_finished_run(tmp_path, table):
    other = small.dataset(tmp_path / "other", cases=4, seed=9, name="elsewhere")
    assert small.call(probe, *flags(table, tmp_path / "r", "--probe", "uni", "knn")) == 0
    assert small.call(probe, *flags(table, tmp_path / "r", "--probe", "uni", "knn", "--test", other)) == 0
    for suffix in ("", "-knn"):
        metrics = json.loads((folder(tmp_path / "r", suffix) / "metrics.json").read_text())
        assert set(metrics["sets"]) == {"val", "test", "elsewhere"} and "training" in metrics
        assert metrics["sets"]["elsewhere"]["auroc"] > 0.8


@pytest.mark.parametrize("more, words", [(["--k", 0], "--k"), (["--C", -1], "--C"), (["--model", "nope"], "nope"),
                                         (["--layer", 9], "--layer"), (["--frac", 0], "--frac")])
def test_mistakes_are_one_line(tmp_path, table, more, words, capsys):
    assert small.call(probe, *flags(table, tmp_path, *more)) == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1 and words in error


def test_torchrun_shares_the_pass(tmp_path, table):
    import sys
    script = tmp_path / "script.py"
    script.write_text(f"import sys; sys.path[:0] = [{str(small.HERE.parent)!r}, {str(small.HERE)!r}]\n"
                      "import small, cli, probe\nprobe.ROWS_AT_ONCE = 8\ncli.command(probe.main)\n")
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script))
    code, out, err = small.command("probe", *flags(table, tmp_path / "two"), launcher=launcher)
    assert code == 0, err
    assert small.call(probe, *flags(table, tmp_path / "one")) == 0
    a, b = (np.load(tmp_path / name / "embeddings" / "small" / "wide-cls.npy") for name in ("one", "two"))
    assert np.abs(a - b).max() < 1e-5 and torch.isfinite(torch.from_numpy(b)).all()
