"""The command: what it prints and writes, and how mistakes end."""

import csv
import json
import shutil

import numpy as np
from run_folders import annotations, folder, half, make
from small import call

import common
import evaluate
from reporting import results


def failure(capsys, *arguments):
    """The one line that a mistake ends with."""
    assert call(evaluate, *arguments) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line]
    assert len(errors) == 1 and errors[0].startswith("error: ")
    return errors[0]


def test_what_is_not_counted_is_printed_and_stands_in_the_report(copied, tmp_path, capsys):
    half("predictions.csv")(folder(copied))
    assert (
        call(evaluate, copied, "--out", tmp_path / "report", "--no-gallery", "--replicates", 100)
        == 0
    )
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith(f"not counted: {folder(copied)}: predictions.csv")
    page = (tmp_path / "report/index.html").read_text()
    assert "1 not counted" in page and str(folder(copied)) in page.split("</ul>")[0]
    # and its numbers are in no table: all is as if it were not there
    shutil.rmtree(folder(copied))
    assert (
        call(evaluate, copied, "--out", tmp_path / "without", "--no-gallery", "--replicates", 100)
        == 0
    )
    names = sorted(path.name for path in (tmp_path / "without").iterdir())
    assert (
        names == sorted(path.name for path in (tmp_path / "report").iterdir())
        and "results.csv" in names
    )
    for name in set(names) - {"index.html"}:
        assert (tmp_path / "report" / name).read_bytes() == (
            tmp_path / "without" / name
        ).read_bytes(), name


def test_one_row_per_run_and_test_set_with_all_digits(tissue, tmp_path):
    for fold in range(2):
        make(tmp_path / "runs", tissue, "uni", "probe", 1.0, fold, "A")
    call(
        evaluate,
        tmp_path / "runs",
        "--out",
        tmp_path / "report",
        "--no-gallery",
        "--replicates",
        100,
    )
    with open(tmp_path / "report/results.csv") as file:
        rows = list(csv.DictReader(file))
    assert [(row["fold"], row["set"]) for row in rows] == [
        (k, name) for k in "01" for name in ("test", "B", "C")
    ]
    for row in rows:
        stored = common.read_json(f"{row['run']}/metrics.json")["sets"][row["set"]]
        for key in (
            "balanced_accuracy",
            "weighted_f1",
            "auroc",
            "average_precision",
            "brier",
            "ece",
        ):
            assert float(row[key]) == stored[key]
        assert float(row["f1_at_threshold"]) == stored["at_threshold"]["f1"]
        assert (int(row["n"]), int(row["cases"]), row["train_domain"]) == (
            stored["n"],
            stored["cases"],
            "A",
        )


def test_the_overview_is_mean_and_deviation_and_fits_a_terminal(three_folds, capsys, tmp_path):
    found, _ = results.collect([three_folds])
    text = evaluate.overview(found)
    values = [run.sets["test"]["auroc"] for run in found]
    mean = sum(values) / 3
    deviation = (sum((v - mean) ** 2 for v in values) / 2) ** 0.5
    line = text.splitlines()[-1]
    assert line.split()[:5] == ["uni", "lora", "1", "test", "3"] and line.endswith(
        f"{mean:.3f}±{deviation:.3f}"
    )
    assert (
        text.startswith("tissue: mean ± standard deviation")
        and max(map(len, text.splitlines())) <= 100
    )


def test_a_rule_for_the_threshold_changes_what_is_at_it_and_nothing_else(three_folds, tmp_path):
    def rows(out, *rule):
        flags = ["--out", tmp_path / out, "--no-gallery", "--replicates", 100, *rule]
        assert call(evaluate, three_folds, *flags) == 0
        with open(tmp_path / out / "results.csv") as file:
            return list(csv.DictReader(file))

    names = ("f1", "balanced", "sensitivity=0.99", "0.4")
    found = {rule: rows(rule, "--threshold-rule", rule) for rule in names}
    assert rows("plain") == found["f1"]
    for rule, lines in found.items():
        for line, first in zip(lines, found["f1"], strict=True):
            assert line["threshold_rule"] == rule
            for key, value in line.items():
                same = "at_threshold" in key or key.startswith("threshold")
                assert same or value == first[key], key
            val = common.read_json(f"{line['run']}/metrics.json")["sets"]["val"]
            assert float(first["threshold"]) == val["at_threshold"]["threshold"]
            assert rule != "0.4" or float(line["threshold"]) == 0.4
    high = found["sensitivity=0.99"]
    assert all(float(a["threshold"]) < float(b["threshold"]) for a, b in zip(high, found["f1"]))


def test_the_overview_with_a_rule_shows_what_the_threshold_gains(three_folds, capsys):
    found, _ = results.collect([three_folds], "balanced")
    text = evaluate.overview(found, "balanced")
    values = [run.sets["test"]["at_threshold"]["balanced_accuracy"] for run in found]
    header, _, line = text.splitlines()[1:4]
    assert header.split()[-5:] == ["bal.", "acc.", "at", "t", "AUROC"]
    assert line.split()[-2].startswith(f"{np.mean(values):.3f}±")
    assert text.endswith("the threshold of the best balanced accuracy on validation")
    assert max(map(len, text.splitlines())) <= 100
    wrong = failure(capsys, three_folds, "--threshold-rule", "youden")
    assert "--threshold-rule youden: give" in wrong and "balanced" in wrong
    wrong = failure(capsys, "--grid", "x", "--threshold-rule", "f1")
    assert "--threshold-rule goes with a report" in wrong


def test_the_overview_keeps_seeds_apart(copied, tissue):
    for fold in range(2):
        make(copied.parent / "seed1", tissue, "uni", "lora", 1.0, fold, strength=0.3, seed=1)
    found, _ = results.collect([copied, copied.parent / "seed1"])
    first, second = evaluate.overview(found).split("\n\n")
    assert first.startswith("tissue: mean") and second.startswith("tissue, seed 1: mean")
    for text, seed, count in ((first, 0, 3), (second, 1, 2)):
        values = [run.sets["test"]["auroc"] for run in found if run.flags["seed"] == seed]
        (line,) = text.splitlines()[3:]
        assert line.split()[4] == str(count) and line.split()[-1].startswith(
            f"{np.mean(values):.3f}±"
        )


def test_the_overview_of_everything_fits_a_terminal_and_names_what_leaks(tissue, tmp_path):
    long = "vit_large_patch16_224_of_a_long_name"
    for data in (tissue, annotations("a-dataset-with-a-long-name", seed=3)):
        make(
            tmp_path,
            data,
            long,
            "lora",
            0.001 if data is tissue else 1.0,
            0,
            suffixes=["r8", "a32", "rslora"],
        )
        make(tmp_path, data, "uni", "lora", 1.0, 0, by="annotation")
        for domain in "AB":
            make(
                tmp_path, data, "uni", "probe", 1.0, 0, domain, tests=[annotations("extra", seed=1)]
            )
    text = evaluate.overview(results.collect([tmp_path])[0])
    assert max(map(len, text.splitlines())) <= 100
    assert (
        "leaking: split by annotation" in text
        and sum(", leaking" in line for line in text.splitlines()) == 2
    )
    assert [line.split()[3:5] for line in text.splitlines() if " extra " in line] == [
        ["extra", "2"]
    ] * 2
    assert sum(" in domain " in line for line in text.splitlines()) == 2


def test_mistakes_end_with_one_line_and_write_nothing(three_folds, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("text")
    assert "runs: no such folder of runs" in failure(capsys)
    assert "empty: no usable finished run" in failure(capsys, "empty")
    assert "file: this is a file" in failure(capsys, "file")
    for number in (5, 10**9):  # the draws of so many would take all memory
        assert "give 100 to 20000" in failure(capsys, three_folds, "--replicates", number)
    assert "file: this is a file; name a folder" in failure(capsys, three_folds, "--out", "file")
    assert "this is a file; name a folder" in failure(capsys, three_folds, "--out", "file/report")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file"]


def test_a_folder_of_another_program_is_named_as_one(three_folds, tmp_path, capsys):
    hub = tmp_path / "models--google--vit"
    hub.mkdir()
    (hub / "config.json").write_text(
        json.dumps({"hidden_size": 768, "architectures": ["ViTModel"]})
    )
    assert call(evaluate, tmp_path, "--out", tmp_path / "report") == 2
    said = capsys.readouterr()
    assert (
        f"not counted: {hub}: not a run's folder: its config.json is that of another program"
        in said.out
    )
    assert said.err.count("\n") == 1 and not (tmp_path / "report").exists()
