"""The mean of several runs' probabilities: what is averaged, its threshold, what has no mean."""

import csv
import shutil

import numpy as np
import pytest
from run_folders import annotations, make
from small import call

import evaluate
from reporting import ensemble, metrics, results


def collected(*roots):
    return results.collect(roots)[0]


def by_id(run, name):
    """{id: probability} of a set of a run."""
    ids, _, probability, *_ = run.rows(name)
    return dict(zip(ids.tolist(), probability.tolist()))


def test_the_mean_of_the_folds_and_its_metrics(three_folds):
    members = collected(three_folds)
    (mean,), notes = ensemble.ensembles(members)
    assert notes == [] and mean.label == "uni-lora" and len(mean.members) == 3
    labels, probability, _ = mean.rows("test")
    tests = [by_id(run, "test") for run in members]
    expected = [np.mean([test[i] for test in tests]) for i in sorted(tests[0])]
    assert np.array_equal(probability, expected)
    assert mean.sets["test"]["auroc"] == metrics.auroc(labels, expected)
    at = mean.sets["test"]["at_threshold"]
    assert at["threshold"] == mean.threshold
    decided = metrics.balanced_accuracy(labels, probability >= mean.threshold)
    assert at["balanced_accuracy"] == decided


def test_no_member_judges_a_validation_patch_that_it_was_trained_on(three_folds):
    """Each validation patch has the mean of the folds that held it out, and the threshold is that
    of the rule on all of them."""
    members = collected(three_folds)
    (mean,), _ = ensemble.ensembles(members)
    held_out = [by_id(run, "val") for run in members]
    for run, values in zip(members, held_out):
        assert not values.keys() & set(run.split["ids"]["train"].tolist())
    rows = mean.columns["set"] == "val"
    ids, probability = mean.columns["id"][rows], mean.columns["probability"][rows]
    assert sorted(ids.tolist()) == sorted(set().union(*held_out)) and len(ids) > len(held_out[0])
    for name, value in zip(ids.tolist(), probability):
        assert value == pytest.approx(
            np.mean([values[name] for values in held_out if name in values]), abs=1e-15
        )
    wanted = metrics.choose_threshold(mean.columns["label"][rows], probability)
    assert mean.threshold == wanted


def test_ids_of_two_datasets_are_two_patches(tmp_path):
    for name in ("one", "two"):
        make(tmp_path, annotations(name, seed=len(name) + ord(name[0])))
    members = collected(tmp_path)
    assert members[0].fingerprint != members[1].fingerprint
    columns, reasons = ensemble.average(members)
    count = sum(int((run.columns["set"] == "val").sum()) for run in members)
    assert (columns["set"] == "val").sum() == count
    assert "test" in reasons or np.array_equal(*(run.rows("test")[0] for run in members))


def test_models_tested_alike_have_a_mean_and_others_none(tissue, tmp_path):
    extra = annotations("extra", domains="T", cases=6, seed=4)
    for fold in range(2):
        make(tmp_path, tissue, "uni", "probe", fold=fold, tests=[extra])
        make(tmp_path, tissue, "uni", "lora", fold=fold, tests=[extra] if fold else [])
        make(tmp_path / "seed1", tissue, "uni", "lora", fold=fold, seed=1)
        make(tmp_path, tissue, "uni", "lora", frac=0.1, fold=fold)
    make(tmp_path, tissue, "uni", "full")
    means, notes = ensemble.ensembles(collected(tmp_path))
    shown = {(mean.label, mean.members[0].seed, mean.members[0].frac): mean for mean in means}
    assert sorted(
        (label, seed, frac, len(shown[label, seed, frac].members)) for label, seed, frac in shown
    ) == [
        ("mean of 3 models", 0, 1.0, 5),
        ("uni-lora", 0, 0.1, 2),
        ("uni-lora", 0, 1.0, 2),
        ("uni-lora", 1, 1.0, 2),
        ("uni-probe", 0, 1.0, 2),
    ]
    assert set(shown["uni-probe", 0, 1.0].sets) == {"test", "extra", "val"}
    assert set(shown["uni-lora", 0, 1.0].sets) == {"test", "val"}
    assert any(note.startswith("uni-full on tissue: fold 0 is alone") for note in notes)
    untested = [note for note in notes if "uni-lora on tissue: no mean on extra" in note]
    assert len(untested) == 1 and "frac1-fold0 was not tested on it" in untested[0]


def test_runs_with_other_rows_or_classes_are_named_and_not_averaged(copied, tissue):
    members = collected(copied)
    first = members[0].columns
    swapped = {**first, "label": 1 - first["label"]}
    members[0].columns = swapped
    columns, reasons = ensemble.average(members)
    assert list(reasons) == ["test"] and "other labels" in reasons["test"]
    assert set(columns["set"].tolist()) == {"val"}
    members[0].columns = first
    members[0].classes = ("mitotic figure", "look-alike")
    means, notes = ensemble.ensembles(members)
    assert means == [] and len(notes) == 1 and "hard negative/mitotic figure and" in notes[0]


def test_logits_of_certain_probabilities_are_finite():
    p = np.array([0.0, 1e-300, 0.25, 0.5, 1.0])
    z = metrics.logit(p)
    assert np.isfinite(z).all() and (np.diff(z) > 0).all() and z[3] == 0
    assert z[2] == pytest.approx(np.log(1 / 3), abs=1e-15)


def test_the_report_has_rows_with_intervals(three_folds, tmp_path, capsys):
    arguments = (three_folds, "--out", tmp_path / "report", "--no-gallery", "--replicates", 200)
    assert call(evaluate, *arguments) == 0
    without = {path.name: path.read_bytes() for path in (tmp_path / "report").iterdir()}
    capsys.readouterr()
    assert call(evaluate, *arguments, "--ensemble") == 0
    printed = capsys.readouterr().out
    assert "uni-lora" in printed and "t: the threshold of the best F1" in printed
    assert max(map(len, printed.splitlines())) <= 100
    names = {path.name for path in (tmp_path / "report").iterdir()} - without.keys()
    assert names == {"ensembles.csv", "ensembles_tissue.md", "ensembles_tissue.tex"}
    for name in without.keys() - {"index.html", "report.json"}:
        assert (tmp_path / "report" / name).read_bytes() == without[name]
    with open(tmp_path / "report/ensembles.csv") as file:
        (row,) = csv.DictReader(file)
    members = collected(three_folds)
    (mean,), _ = ensemble.ensembles(members)
    single = np.mean([run.sets["test"]["auroc"] for run in members])
    assert float(row["auroc"]) == mean.sets["test"]["auroc"] and row["folds"] == "0 1 2"
    assert float(row["auroc_gain"]) == pytest.approx(mean.sets["test"]["auroc"] - single, abs=1e-12)
    own = np.mean([run.sets["test"]["at_threshold"]["balanced_accuracy"] for run in members])
    value = mean.sets["test"]["at_threshold"]["balanced_accuracy"]
    assert float(row["balanced_accuracy_at_threshold"]) == pytest.approx(value, abs=1e-12)
    gain = float(row["balanced_accuracy_at_threshold_gain"])
    assert gain == pytest.approx(value - own, abs=1e-12)
    kappa = metrics.cohen_kappa(mean.rows("test")[0], mean.rows("test")[1] >= 0.5)
    assert float(row["kappa_at_0.5"]) == pytest.approx(kappa, abs=1e-12)
    for key in ("auroc", "balanced_accuracy", "balanced_accuracy_at_threshold"):
        assert float(row[f"{key}_low"]) < float(row[key]) < float(row[f"{key}_high"])
    assert f"{value:.3f}" in (tmp_path / "report/ensembles_tissue.md").read_text()


def test_runs_without_a_mean_are_said_to_have_none(copied, tmp_path, capsys):
    for fold in (1, 2):
        shutil.rmtree(copied / f"tissue/uni-lora/frac1-fold{fold}")
    arguments = ("--out", tmp_path / "report", "--no-gallery", "--replicates", 100, "--ensemble")
    assert call(evaluate, copied, *arguments) == 0
    assert "uni-lora on tissue: fold 0 is alone" in capsys.readouterr().out
    assert "fold 0 is alone" in (tmp_path / "report/index.html").read_text()
    assert not (tmp_path / "report/ensembles.csv").exists()


def test_the_rule_chosen_for_the_runs_is_that_of_their_mean(three_folds):
    members = results.collect([three_folds], "balanced")[0]
    (mean,), _ = ensemble.ensembles(members)
    rows = mean.columns["set"] == "val"
    labels, probability = mean.columns["label"][rows], mean.columns["probability"][rows]
    assert mean.threshold == metrics.choose_threshold(labels, probability, "balanced")
    assert ensemble.results([mean], 100)[0]["threshold_rule"] == "balanced"
