"""Results by domain, scanner and species; runs of a cross-validation and with a domain left out."""

import csv

import numpy as np
import pytest
from run_folders import annotations, make
from small import call

import common
import evaluate
import runs
from reporting import bootstrap, grid, groups, metrics, results


@pytest.fixture(scope="module")
def scanned():
    """Three domains; the scanner is known of two of them."""
    table = annotations()
    table.scanner = np.array([{"A": "one", "B": "two", "C": ""}[d] for d in table.domain.tolist()])
    return table


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_groups_of_a_run(scanned, tmp_path):
    path = make(tmp_path / "runs", scanned)
    run = results.read_run(path)
    whole = groups.of_run(run, "test", "scanner")
    assert sorted(whole) == ["one", "two", "unknown"] and not groups.of_run(run, "test", "species")
    ids, y, p, _, domain = run.rows("test")
    for group, name in (("one", "A"), ("two", "B"), ("unknown", "C")):
        inside = domain == name
        assert whole[group]["n"] == inside.sum()
        assert whole[group]["auroc"] == pytest.approx(metrics.auroc(y[inside], p[inside]))
        decided = p[inside] >= run.threshold
        assert whole[group]["at_threshold"]["balanced_accuracy"] == pytest.approx(
            metrics.balanced_accuracy(y[inside], decided)
        )
    assert groups.of_run(run, "test", "domain")["A"] == whole["one"]


def test_scanner_and_species_are_kept_with_the_predictions(scanned, tissue, tmp_path):
    logits = np.linspace(-1, 1, 5)
    sets = [("val", scanned, np.arange(5), logits), ("other", tissue, np.arange(5), logits)]
    columns = runs.predictions(sets)
    runs.write_predictions(tmp_path / "p.csv", columns)
    back = runs.read_predictions(tmp_path / "p.csv")
    assert list(back) == [*runs.PREDICTION_COLUMNS, "scanner"]
    assert back["scanner"].tolist() == scanned.scanner[:5].tolist() + [""] * 5
    # Without any, the file is as it always was; a set that has them is added to one that has not.
    plain = runs.predictions([("val", tissue, np.arange(5), logits)])
    runs.write_predictions(tmp_path / "q.csv", plain)
    header = (tmp_path / "q.csv").read_text().splitlines()[0]
    assert header == ",".join(runs.PREDICTION_COLUMNS)
    both = runs.add_predictions(tmp_path / "q.csv", runs.predictions(sets[1:]))
    assert "scanner" not in both
    both = runs.add_predictions(
        tmp_path / "q.csv", runs.predictions([("more", scanned, np.arange(5), logits)])
    )
    assert both["scanner"].tolist() == [""] * 10 + scanned.scanner[:5].tolist()
    (tmp_path / "r.csv").write_text(header + ",colour\n")
    with pytest.raises(common.UserError, match="not a predictions file"):
        runs.read_predictions(tmp_path / "r.csv")


def test_the_report_has_tables_by_group(scanned, tmp_path):
    for fold in range(2):
        make(tmp_path / "runs", scanned, fold=fold)
        make(tmp_path / "runs", scanned, method="lora", fold=fold, strength=2.5)
    out = tmp_path / "report"
    assert call(evaluate, tmp_path / "runs", "--out", out, "--replicates", 100) == 0
    text = (out / "scanner_tissue.md").read_text()
    assert "tissue, split by case: by scanner" in text and not (out / "species_tissue.md").exists()
    lines = [line.split(" | ")[:2] for line in text.splitlines() if line.startswith("| ")]
    assert [line[0].strip("| ") for line in lines[1:]] == ["one"] * 2 + ["two"] * 2 + [
        "unknown"
    ] * 2
    assert (out / "domain_tissue.md").exists()
    rows = read(out / "groups.csv")
    assert len(rows) == 4 * 6
    row = next(row for row in rows if row["group"] == "two" and row["label"] == "uni-lora")
    run = results.read_run(tmp_path / "runs/tissue/uni-lora/frac1-fold0")
    assert float(row["auroc"]) == groups.of_run(run, "test", "scanner")["two"]["auroc"]


def test_runs_of_a_cross_validation_stand_together(tissue, tmp_path):
    for fold in range(3):
        for method in ("probe", "lora"):
            make(tmp_path / "runs", tissue, method=method, fold=fold, folds=3)
        make(tmp_path / "runs", tissue, fold=fold)  # the ordinary repeats beside it
    found, problems = results.collect([tmp_path / "runs"])
    assert len(found) == 9 and not problems
    assert {run.by for run in found} == {"case", "3 folds"}
    assert {run.label for run in found} == {"uni-probe", "uni-lora"}
    out = tmp_path / "report"
    assert call(evaluate, tmp_path / "runs", "--out", out, "--replicates", 100) == 0
    text = (out / "full_tissue_by_3_folds.md").read_text()
    assert "drawing the test set's 24 cases" in text  # all of them, each once
    assert (out / "tests_tissue_by_3_folds.md").exists()
    assert len([row for row in read(out / "results.csv") if row["split"] == "3 folds"]) == 6


def test_intervals_of_a_cross_validation():
    """As of one test set if the folds are alike; resampled within each, so narrower than one."""
    rng = np.random.default_rng(0)
    folds = []
    for _ in range(4):
        y = rng.random(400) < 0.4
        folds.append((y, rng.normal(y, 1.2), np.repeat(np.arange(20), 20)))
    parts, cases = bootstrap.replicate_folds(folds, 400)
    observed, values, left = parts["auroc"]
    assert cases == len(left) == 80
    assert observed == pytest.approx(np.mean([metrics.auroc(y, p) for y, p, _ in folds]))
    assert values.mean() == pytest.approx(observed, abs=0.01)
    single = bootstrap.replicate(folds[:1], 400)[0]["auroc"]
    assert values.std() == pytest.approx(single[1].std() / 2, rel=0.35)
    low, high = bootstrap.interval(values, left, cases)
    assert low < observed < high
    assert bootstrap.standard_error(left, cases) == pytest.approx(values.std(), rel=0.3)


def test_a_domain_left_out(tissue, tmp_path):
    for fold in range(2):
        for domain in "ABC":
            make(tmp_path / "runs", tissue, fold=fold, leave_out=domain)
    assert (tmp_path / "runs/tissue/uni-probe/withoutB-fold1").is_dir()
    found, problems = results.collect([tmp_path / "runs"])
    assert len(found) == 6 and not problems and {run.by for run in found} == {"left out"}
    out = tmp_path / "report"
    assert call(evaluate, tmp_path / "runs", "--out", out, "--replicates", 100) == 0
    text = (out / "left_out_tissue.md").read_text()
    lines = [
        line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| uni")
    ]
    assert [line[1:3] for line in lines] == [["A", "2"], ["B", "2"], ["C", "2"], ["mean of 3", "6"]]
    assert "| balanced accuracy at t |" in text
    at_t = [run.sets["test"]["at_threshold"]["balanced_accuracy"] for run in found]
    assert lines[3][6].startswith(f"{sum(at_t) / 6:.3f} ± ")
    assert not list(out.glob("full_*"))


def test_a_split_that_config_and_split_do_not_agree_on(tissue, tmp_path):
    path = make(tmp_path / "runs", tissue, folds=3)
    config = common.read_json(path / "config.json")
    del config["flags"]["folds"]
    common.write_json(path / "config.json", config)
    with pytest.raises(common.UserError, match="do not agree on folds"):
        results.read_run(path)


def test_grids_know_folds_and_left_out_domains(tissue, tmp_path):
    command = ["python", "probe.py", "--data", "tissue", "--model", "uni", "--runs", str(tmp_path)]
    cells = grid.cells([*command, "--folds", "3", "--fold", "0", "1", "2"])
    assert [(cell["folds"], cell["fold"]) for cell in cells] == [(3, 0), (3, 1), (3, 2)]
    cells += grid.cells([*command, "--leave-out", "A", "B"])
    cells += grid.cells(command)
    paths = [make(tmp_path, tissue, fold=1, folds=3), make(tmp_path, tissue, leave_out="B")]
    found = [results.read_run(path) for path in paths]
    states = [grid._state(cell, found, []) for cell in cells]
    assert states == ["missing", "done", "missing", "missing", "done", "missing"]
