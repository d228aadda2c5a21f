"""The tables of the report: against means by hand, the paper's values; LaTeX and Markdown."""

import csv
import re
import shutil
import statistics
import subprocess
from pathlib import Path

import pytest
from run_folders import DOMAINS, STRENGTH, annotations, make
from small import call

import common
import evaluate
import runs
from reporting import bootstrap, metrics, results, tables

MODELS, METHODS = ("uni", "virchow2"), ("probe", "lora")
NAMES = {"probe": "linear probe", "lora": "LoRA", "full": "end-to-end"}


def table(path):
    """A Markdown table as a list of dicts, and the notes below it."""
    lines = path.read_text().splitlines()
    parts = [
        [cell.strip() for cell in line.strip("|").split(" | ")]
        for line in lines
        if line.startswith("| ")
    ]
    rows = [dict(zip(parts[0], cells, strict=True)) for cells in parts[1:]]
    return rows, [line.strip() for line in lines if line and not line.startswith(("|", "#"))]


def stored(root, folder, share, key, name="test"):
    """A metric of each repeat, out of the runs' metrics.json."""
    return [
        common.read_json(path)["sets"][name][key]
        for path in sorted((root / "midog2022" / folder).glob(f"{share}-fold*/metrics.json"))
    ]


def by_hand(values):
    return f"{statistics.mean(values):.3f}" + (
        f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    )


def plain(cell):
    return cell.replace("**", "")


KEYS = {"balanced accuracy": "balanced_accuracy", "weighted F1": "weighted_f1", "AUROC": "auroc"}


# ---------------------------------------------------------------- the tables


def test_table_4_is_mean_and_deviation_of_the_repeats_and_the_best_is_bold(study):
    root, out = study
    rows, notes = table(out / "full_midog2022.md")
    wanted = {f"{model} {NAMES[method]}": f"{model}-{method}" for model, method in STRENGTH}
    wanted["uni LoRA r8"] = "uni-lora-r8"
    assert [row["model"] for row in rows] == [
        "uni linear probe",
        "virchow2 linear probe",
        "uni LoRA",
        "uni LoRA r8",
        "virchow2 LoRA",
    ]  # probes before LoRA, as in the paper
    for heading, key in KEYS.items():
        means = {}
        for row in rows:
            values = stored(root, wanted[row["model"]], "frac1", key)
            assert plain(row[heading]) == by_hand(values)
            means[row["model"]] = round(statistics.mean(values), 3)
        bold = {
            row["model"]
            for row in rows
            if row[heading].startswith("**") and row[heading].endswith("**")
        }
        assert bold == {model for model, mean in means.items() if mean == max(means.values())}
    assert [row["repeats"] for row in rows] == ["3", "3", "3", "1 of 3", "3"]
    assert "missing: uni LoRA r8: repeats 1, 2" in notes
    assert "the paper's Table 4" in (out / "full_midog2022.md").read_text().splitlines()[0]


def test_the_interval_of_a_table_is_that_of_the_mean_over_the_repeats_by_case(study):
    root, out = study
    rows, notes = table(out / "full_midog2022.md")
    heading = next(key for key in rows[0] if "interval" in key)
    found = [
        run
        for run in results.collect([root])[0]
        if run.label == "uni-lora" and run.frac == 1 and not run.domain and run.by == "case"
    ]
    parts, cases = bootstrap.replicate(
        [(y, p, case) for _, y, p, case, _ in (run.rows("test") for run in found)], 200
    )
    low, high = bootstrap.interval(*parts["auroc"][1:], cases)
    assert (
        next(row for row in rows if row["model"] == "uni LoRA")[heading]
        == f"{low:.3f} – {high:.3f}"
    )
    # With so few cases the coverage that was measured stands beside it.
    assert (
        cases < bootstrap.FEW_CASES
        and heading == f"AUROC, 95% interval (measured: {bootstrap.measured(cases):.0%})"
    )
    assert bootstrap.coverage_note(cases) in notes


def test_with_many_cases_nothing_is_said_of_coverage():
    assert tables.interval_name([20]) == tables.interval_name([50, 100]) == "95% interval"
    assert tables.interval_name([6]) == "95% interval (measured: 92%)"


def test_the_papers_values_stand_beside_ours(study):
    _, out = study
    rows, notes = table(out / "full_midog2022.md")
    found = {row["model"]: [row[f"paper: {heading}"] for heading in KEYS] for row in rows}
    assert found == {  # typed from the paper's Table 4
        "uni linear probe": ["0.73 ± 0.00", "0.76 ± 0.00", "0.83 ± 0.00"],
        "virchow2 linear probe": ["0.76 ± 0.00", "0.78 ± 0.00", "0.85 ± 0.00"],
        "uni LoRA": ["0.77 ± 0.06", "0.77 ± 0.06", "0.85 ± 0.07"],
        "virchow2 LoRA": ["0.79 ± 0.02", "0.80 ± 0.01", "0.88 ± 0.01"],
        "uni LoRA r8": ["–"] * 3,
    }  # another model than the paper's
    assert any("the same for CCMCT and MIDOG 2022: doubtful" in note for note in notes)
    heading, *cells = (
        line.strip("|").split(" | ")
        for line in (out / "cross_midog2022.md").read_text().splitlines()
        if line.startswith("| ")
    )
    line = next(line for line in cells if line[0].strip() == "virchow2 LoRA")
    assert [text.strip() for text in line[3:14:2]] == [
        "0.89 ± 0.02",
        "0.87 ± 0.02",
        "0.82 ± 0.02",
        "0.79 ± 0.03",
        "0.83 ± 0.01",
        "0.80 ± 0.05",
    ]  # Table 5
    assert [text.strip() for text in heading[3:14:2]] == ["paper"] * 6


def test_the_papers_numbers_are_complete():
    with open(Path(tables.__file__).with_name("paper.csv")) as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len({tuple(row.values())[:6] for row in rows}) == 17 * 3 + 17 * 3 + 17 * 6
    assert all(
        re.fullmatch(r"0\.\d\d", row["mean"]) and re.fullmatch(r"0\.[01]\d", row["sd"])
        for row in rows
    )
    assert {row["model"] for row in rows} == {
        "resnet50",
        "vit-b",
        "vit-h",
        "phikon",
        "uni",
        "virchow",
        "virchow2",
        "prov-gigapath",
        "h-optimus-0",
    }
    # What the paper prints twice: its probes and its ResNet50 are the same in Tables 3 and 4.
    values = {
        tuple(row[k] for k in ("table", "model", "method", "metric")): (row["mean"], row["sd"])
        for row in rows
    }
    for (number, model, method, metric), value in values.items():
        if number == "3" and (method == "probe" or model == "resnet50"):
            assert values["4", model, method, metric] == value
    assert values["3", "h-optimus-0", "lora", "auroc"] == ("0.88", "0.01")
    assert values["4", "h-optimus-0", "lora", "auroc"] == ("0.89", "0.02")
    # Every column adds up to what the one of the paper's text does, means and deviations.
    totals = {
        ("3", "all"): ((12.45, 0.24), (12.76, 0.29), (14.02, 0.24)),
        ("4", "all"): ((12.49, 0.37), (12.78, 0.38), (14.02, 0.39)),
        ("5", "in"): ((12.43, 0.58), (12.77, 0.55), (13.73, 0.64)),
        ("5", "out"): ((11.11, 0.71), (11.02, 1.23), (12.20, 0.89)),
    }
    for (number, setting), columns in totals.items():
        for metric, total in zip(KEYS.values(), columns):
            own = [
                row
                for row in rows
                if (row["table"], row["setting"], row["metric"]) == (number, setting, metric)
            ]
            assert len(own) == 17
            assert [sum(float(row[key]) for row in own) for key in ("mean", "sd")] == pytest.approx(
                total
            )


def test_table_5_is_over_all_domains_and_repeats(study):
    root, out = study
    lines = [
        line.strip("|").split(" | ")
        for line in (out / "cross_midog2022.md").read_text().splitlines()
        if line.startswith("| ")
    ]
    header, *rows = [[cell.strip() for cell in line] for line in lines]
    notes = table(out / "full_midog2022.md") and (out / "cross_midog2022.md").read_text()
    assert header[14:] == ["balanced accuracy at t in", "balanced accuracy at t out"]
    assert header[2:14:2] == [
        "AUROC in",
        "AUROC out",
        "balanced accuracy in",
        "balanced accuracy out",
        "weighted F1 in",
        "weighted F1 out",
    ]
    for row in rows:
        model, method = row[0].split(" ", 1)
        folder = f"{model}-{ {name: key for key, name in NAMES.items()}[method] }"
        column = 2
        for key in ("auroc", "balanced_accuracy", "weighted_f1"):
            inside = [
                value
                for domain in DOMAINS
                for value in stored(root, folder, f"domain{domain}", key)
            ]
            outside = [
                value
                for domain in DOMAINS
                for test in DOMAINS
                if test != domain
                for value in stored(root, folder, f"domain{domain}", key, test)
            ]
            assert plain(row[column]) == by_hand(inside) and plain(row[column + 2]) == by_hand(
                outside
            )
            column += 4
        at_t = [
            values["balanced_accuracy"]
            for domain in DOMAINS
            for values in stored(root, folder, f"domain{domain}", "at_threshold")
        ]
        assert plain(row[14]) == by_hand(at_t)
    assert {row[0]: row[1] for row in rows} == {
        "uni linear probe": "9",
        "virchow2 linear probe": "8",
        "uni LoRA": "9",
        "virchow2 LoRA": "9",
    }
    assert "missing: virchow2 linear probe: domain/repeat B/1" in notes
    for column in range(2, 14, 2):
        best = max(float(plain(row[column]).split(" ")[0]) for row in rows)
        assert all(
            row[column].startswith("**") == (float(plain(row[column]).split(" ")[0]) == best)
            for row in rows
        )


def test_scaling_says_how_many_repeats_and_what_is_missing(study):
    root, out = study
    rows, notes = table(out / "scaling_midog2022.md")
    found = {row["model"]: row for row in rows}
    for model, method in STRENGTH:
        for share, folder in (("10%", "frac0.1"), ("100%", "frac1")):
            values = stored(root, f"{model}-{method}", folder, "auroc")
            few = " (2)" if (model, method, share) == ("uni", "lora", "10%") else ""
            assert plain(found[f"{model} {NAMES[method]}"][share]) == by_hand(values) + few
    assert found["uni LoRA r8"]["10%"] == "–" and found["uni LoRA r8"]["100%"].endswith("(1)")
    assert (
        "Missing: uni LoRA at 10%: 2 of 3 repeats; uni LoRA r8 at 10%: none; uni LoRA r8 at 100%: "
        "1 of 3 repeats." in notes
    )
    split = common.read_json(root / "midog2022/uni-lora/frac0.1-fold0/split.json")["ids"]
    assert any(
        f"10%: {len(split['train'])} training and {len(split['val'])} validation" in note
        for note in notes
    )


def test_decisions_at_half_and_at_the_threshold_of_validation(study):
    root, out = study
    rows, _ = table(out / "decisions_midog2022.md")
    paths = sorted((root / "midog2022/virchow2-lora").glob("frac1-fold*/metrics.json"))
    content = [common.read_json(path) for path in paths]
    row = next(row for row in rows if row["model"] == "virchow2 LoRA")
    for heading, part in (("0.5", "at_0.5"), ("t", "at_threshold")):
        for name, key in (
            ("sensitivity", "sensitivity"),
            ("specificity", "specificity"),
            ("precision", "precision"),
            ("F1", "f1"),
        ):
            values = [one["sets"]["test"][part][key] for one in content]
            assert (
                row[f"{name} at {heading}"]
                == f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"
            )
    assert row["t"] == "{:.2f} ± {:.2f}".format(
        *(f([one["threshold"] for one in content]) for f in (statistics.mean, statistics.stdev))
    )
    for heading, best in (("av. precision", max), ("Brier", min), ("ECE", min)):
        means = [float(plain(row[heading]).split(" ")[0]) for row in rows]
        assert [row[heading].startswith("**") for row in rows] == [
            value == best(means) for value in means
        ]


def test_what_the_threshold_of_validation_gains_with_intervals_by_case(tmp_path):
    tissue, extra = annotations("mine"), annotations("other", domains="T", cases=6, seed=4)
    for fold in range(2):
        make(tmp_path / "runs", tissue, "uni", "lora", 1.0, fold, tests=[extra])
    flags = ["--no-gallery", "--replicates", 300, "--threshold-rule", "balanced"]
    assert call(evaluate, tmp_path / "runs", "--out", tmp_path / "report", *flags) == 0
    paths = sorted((tmp_path / "runs").rglob("predictions.csv"))
    repeats = [runs.read_predictions(path) for path in paths]
    thresholds = []
    for columns in repeats:
        val = columns["set"] == "val"
        label, p = columns["label"][val], columns["probability"][val]
        thresholds.append(metrics.choose_threshold(label, p, "balanced"))
    (row,), notes = table(tmp_path / "report/thresholds_mine.md")
    assert "the best balanced accuracy on validation" in " ".join(notes)
    mean, deviation = statistics.mean(thresholds), statistics.stdev(thresholds)
    assert row["t"] == f"{mean:.2f} ± {deviation:.2f}"
    of = {
        "balanced accuracy": metrics.balanced_accuracy,
        "weighted F1": metrics.weighted_f1,
        "accuracy": metrics.accuracy,
        "Cohen's kappa": metrics.cohen_kappa,
    }
    for name, metric in of.items():
        for heading, cuts in (("at 0.5", [0.5, 0.5]), ("at t", thresholds)):
            values = []
            for columns, cut in zip(repeats, cuts):
                rows = columns["set"] == "test"
                values.append(metric(columns["label"][rows], columns["probability"][rows] >= cut))
            assert plain(row[f"{name} {heading}"]) == by_hand(values)
        low, high = map(float, row[f"95% interval of {name} at t"].split(" – "))
        assert low < statistics.mean(values) < high and high - low < 0.6
    (row,), notes = table(tmp_path / "report/external_mine.md")
    values = []
    for columns, cut in zip(repeats, thresholds):
        rows = columns["set"] == "other"
        called = columns["probability"][rows] >= cut
        values.append(metrics.balanced_accuracy(columns["label"][rows], called))
    assert row["balanced accuracy at t"] == by_hand(values)
    low, high = map(float, row["95% interval of balanced accuracy at t"].split(" – "))
    assert low < statistics.mean(values) < high


def test_what_the_leak_is_worth(study):
    root, out = study
    rows, _ = table(out / "leak_midog2022.md")
    assert len(rows) == 4
    for row in rows:
        model, method = row["model"].removesuffix(", 100%").split(" ", 1)
        folder = f"{model}-{ {name: key for key, name in NAMES.items()}[method] }"
        honest, leaking = (
            stored(root, folder + end, "frac1", "auroc") for end in ("", "-byannotation")
        )
        assert (row["by case"], row["by annotation"]) == (by_hand(honest), by_hand(leaking))
        assert row["difference"] == f"{statistics.mean(leaking) - statistics.mean(honest):+.3f}"
    title = (out / "full_midog2022_by_annotation.md").read_text().splitlines()[0]
    assert "leaks" in title and "Table 4" not in title


def test_whole_other_datasets_have_a_table(study):
    root, out = study
    rows, _ = table(out / "external_midog2022.md")
    assert [(row["model"], row["share"], row["tested on"], row["repeats"]) for row in rows] == [
        (f"{model} {NAMES[method]}", "100%", "ccmct", "3") for method in METHODS for model in MODELS
    ]
    values = stored(root, "uni-lora", "frac1", "auroc", "ccmct")
    assert rows[2]["AUROC"] == by_hand(values)


def test_other_datasets_have_a_row_per_share_and_their_own_mean(tmp_path):
    tissue, extra = annotations("mine"), annotations("other", domains="T", cases=6, seed=4)
    for fold in range(2):
        make(tmp_path / "runs", tissue, "uni", "lora", 0.1, fold, strength=0.2, tests=[extra])
        make(tmp_path / "runs", tissue, "uni", "lora", 1.0, fold, strength=9.0, tests=[extra])
    assert (
        call(
            evaluate,
            tmp_path / "runs",
            "--out",
            tmp_path / "report",
            "--no-gallery",
            "--replicates",
            100,
        )
        == 0
    )
    rows, _ = table(tmp_path / "report/external_mine.md")
    assert [(row["share"], row["tested on"], row["repeats"]) for row in rows] == [
        ("10%", "other", "2"),
        ("100%", "other", "2"),
    ]
    for row, share in zip(rows, ("frac0.1", "frac1")):
        values = [
            common.read_json(path)["sets"]["other"]["auroc"]
            for path in (tmp_path / "runs/mine/uni-lora").glob(f"{share}-fold*/metrics.json")
        ]
        assert row["AUROC"] == by_hand(values)
    assert rows[0]["AUROC"] < "0.8" and rows[1]["AUROC"].startswith("1.000")


def test_the_leak_is_compared_within_a_seed(tmp_path):
    tissue = annotations("mine")
    for seed, strength in ((0, 0.5), (1, 2.0)):
        make(tmp_path / f"runs{seed}", tissue, strength=strength, seed=seed)
        make(tmp_path / f"runs{seed}", tissue, by="annotation", strength=strength + 0.5, seed=seed)
    make(tmp_path / "runs2", tissue, seed=2)  # without a counterpart
    found, problems = results.collect(sorted(tmp_path.iterdir()))
    rows = tables.leak_rows(found)
    assert not problems and [row[0] for row in rows] == [
        "uni linear probe, 100%",
        "uni linear probe, 100%, seed 1",
    ]
    for seed, row in enumerate(rows):
        for by, value in zip(("case", "annotation"), row[1:3]):
            (own,) = (run for run in found if (run.by, run.flags["seed"]) == (by, seed))
            assert value == own.sets["test"]["auroc"] and row[3][by] == [value]


def test_every_pair_is_tested_and_corrected_for_their_number(study):
    root, out = study
    with open(out / "tests.csv") as file:
        rows = list(csv.DictReader(file))
    own = [row for row in rows if row["metric"] == "auroc"]
    assert len(rows) == 30 and len(own) == 10  # of five models
    assert bootstrap.holm([float(row["p"]) for row in own]) == pytest.approx(
        [float(row["p_holm"]) for row in own]
    )
    found = {}
    for run in results.collect([root])[0]:
        if run.frac == 1 and not run.domain and run.by == "case":
            found.setdefault(tables.name_of(run), []).append(run.rows("test"))
    parts = {
        label: bootstrap.replicate([(y, p, case) for _, y, p, case, _ in own], 200)
        for label, own in found.items()
    }
    for row in own:
        (a, cases), (b, _) = parts[row["first"]], parts[row["second"]]
        difference, (low, high), p = bootstrap.paired(a["auroc"], b["auroc"], cases)
        assert (
            float(row["difference"]),
            float(row["low"]),
            float(row["high"]),
            float(row["p"]),
        ) == pytest.approx((difference, low, high, p), abs=1e-12)
        assert (row["repeats_first"], row["repeats_second"]) == tuple(
            "1" if row[side] == "uni LoRA r8" else "3" for side in ("first", "second")
        )
    shown, notes = table(out / "tests_midog2022.md")
    assert len(shown) == 4 and all(
        row["models"].startswith("uni LoRA − ") for row in shown
    )  # the best of them
    line = next(row for row in shown if row["models"] == "uni LoRA − uni linear probe")
    assert (
        line["difference"]
        == f"{parts['uni LoRA'][0]['auroc'][0] - parts['uni linear probe'][0]['auroc'][0]:+.3f}"
    )
    assert any("all 10 pairs" in note for note in notes) and any(
        "the same care" in note for note in notes
    )


def test_a_test_set_without_one_of_the_classes_says_nothing_of_ranking(tmp_path):
    for model in MODELS:
        path = make(tmp_path / "runs", annotations("alone", domains="A"), model)
        columns = runs.read_predictions(path / "predictions.csv")
        columns["label"][columns["set"] == "test"] = 1
        runs.write_predictions(path / "predictions.csv", columns)
        common.write_json(path / "metrics.json", evaluate.of_predictions(columns))
    assert call(evaluate, tmp_path / "runs", "--out", tmp_path / "report", "--replicates", 100) == 0
    rows, _ = table(tmp_path / "report/full_alone.md")
    assert [(row["AUROC"], row["balanced accuracy"]) for row in rows] == [("–", "–")] * 2
    assert [row["weighted F1"] for row in rows] == ["–"] * 2  # no 1.000 to be proud of
    assert "nan" not in (tmp_path / "report/index.html").read_text().lower().split("<img")[0]


def test_a_single_run_makes_a_report(tmp_path):
    make(tmp_path / "runs", annotations("alone"))
    assert (
        call(
            evaluate,
            tmp_path / "runs",
            "--out",
            tmp_path / "report",
            "--replicates",
            100,
            "--paper",
        )
        == 0
    )
    rows, _ = table(tmp_path / "report/full_alone.md")
    assert len(rows) == 1 and "±" not in rows[0]["AUROC"] and "**" not in rows[0]["AUROC"]
    assert rows[0]["paper: AUROC"] == "–" and not (tmp_path / "report/tests.csv").exists()


def test_bold_is_for_the_best_also_where_two_are_equal_and_never_for_one_alone():
    rows = [["a", "0.9"], ["b", "0.9"], ["c", "0.8"], ["d", "–"]]
    tables.embolden(rows, 1, [0.9001, 0.9004, 0.8, None])
    assert [row[1] for row in rows] == ["0.9", "0.9", "0.8", "–"]
    assert [isinstance(row[1], tables.Bold) for row in rows] == [True, True, False, False]
    rows = [["a", "0.9"], ["b", "–"]]
    tables.embolden(rows, 1, [0.9, None])
    assert rows[0][1] == "0.9" and not isinstance(rows[0][1], tables.Bold)
    assert (
        tables.mean_sd([]) == tables.mean_sd([None]) == "–"
        and tables.mean_sd([0.5, None]) == "0.500"
    )
    assert tables.mean_sd([0.5, 0.7]) == "0.600 ± 0.141"


# ---------------------------------------------------------------- LaTeX, Markdown


def cells_of(tex):
    """Rows of cells of a tabular, its macros resolved to the text."""
    back = {new: old for old, new in tables.TEX.items()}
    pattern = "|".join(re.escape(new) for new in sorted(back, key=len, reverse=True))
    found = []
    for line in tex.splitlines():
        if line.endswith(r" \\") and not line.startswith("\\"):
            parts = re.split(r"(?<!\\) & ", line.removesuffix(r" \\"))
            parts = [
                re.fullmatch(r"\\textbf\{(.*)\}", part)[1] if part.startswith("\\textbf{") else part
                for part in parts
            ]
            left = [re.sub(pattern, "", part) for part in parts]
            # nothing is left that TeX takes as its own
            assert not re.search(r"[\\&%_#${}^~<>]|[^\x00-\x7f]", "".join(left)), line
            found.append([re.sub(pattern, lambda hit: back[hit[0]], part) for part in parts])
    return found


def test_every_table_says_the_same_in_latex(study):
    _, out = study
    names = sorted(path.stem for path in out.glob("*.md"))
    assert names == sorted(path.stem for path in out.glob("*.tex")) and len(names) == 10
    for name in names:
        tex = (out / f"{name}.tex").read_text()
        cells = [
            [cell.strip() for cell in line.strip("|").split(" | ")]
            for line in (out / f"{name}.md").read_text().splitlines()
            if line.startswith("| ")
        ]
        assert cells_of(tex) == [[plain(cell) for cell in row] for row in cells]
        assert tex.count(r"\textbf{") == sum(cell.startswith("**") for row in cells for cell in row)
        columns = re.search(r"\\begin\{tabular\}\{(l r*)\}".replace(" ", ""), tex)[1]
        assert {len(row) for row in cells} == {len(columns)}
        for environment in ("table", "tabular"):
            assert len(re.findall(rf"\\begin\{{{environment}\*?\}}", tex)) == 1
            assert len(re.findall(rf"\\end\{{{environment}\*?\}}", tex)) == 1


def awkward():
    return tables.Table(
        "odd_name",
        r"50% of A_1 & B: \x{y} ~ #3 $5 ^2 | µm ≥ 1 → 2",
        ["model", "a|b"],
        [[r"x_1 & {y}\z", tables.Bold("0.9 ± 0.1")], ["< 0.001 − 5%", "–"]],
        ["note_1: 100% & more"],
    )


def test_what_latex_and_markdown_take_as_their_own_is_escaped():
    odd = awkward()
    assert cells_of(tables.latex(odd)) == [
        ["model", "a|b"],
        [r"x_1 & {y}\z", "0.9 ± 0.1"],
        ["< 0.001 − 5%", "–"],
    ]
    assert r"50\% of A\_1 \& B: \textbackslash{}x\{y\} \~{} \#3 \$5 \^{}2" in tables.latex(odd)
    assert "a\\|b" in tables.markdown(odd)
    assert "&lt; 0.001 − 5%" in tables.as_html(odd) and "<b>0.9 ± 0.1</b>" in tables.as_html(odd)


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="needs pdflatex")
def test_latex_takes_every_table(study, tmp_path):
    _, out = study
    (tmp_path / "odd.tex").write_text(tables.latex(awkward()))
    inputs = "\n".join(
        rf"\input{{{path}}}" for path in [*sorted(out.glob("*.tex")), tmp_path / "odd.tex"]
    )
    (tmp_path / "all.tex").write_text(
        r"\documentclass[twocolumn]{article}\usepackage{booktabs, graphicx}"
        f"\n\\begin{{document}}\n{inputs}\n\\end{{document}}\n"
    )
    done = subprocess.run(
        ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "all.tex"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0 and (tmp_path / "all.pdf").stat().st_size > 10_000
    assert "Overfull" not in done.stdout  # no table is wider than its place
