"""The report: tables against means by hand, the paper's values, LaTeX, figures, gallery, the page
in a real browser.
"""

import csv
import html.parser
import json
import re
import shutil
import statistics
import subprocess
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import matplotlib.colors
import numpy as np
import pytest
import small
from PIL import Image
from run_folders import annotations, make
from small import call

import common
import data
import evaluate
import flags
import runs
from reporting import bootstrap, figures, metrics, results, tables

MODELS, METHODS, FOLDS, DOMAINS = ("uni", "virchow2"), ("probe", "lora"), range(3), "ABC"
STRENGTH = {
    ("uni", "probe"): 0.5,
    ("uni", "lora"): 1.2,
    ("virchow2", "probe"): 0.8,
    ("virchow2", "lora"): 1.0,
}
NAMES = {"probe": "linear probe", "lora": "LoRA", "full": "end-to-end"}


def write_study(root):
    """Two models, two methods, three repeats: two fractions, three domains, by annotation, a
    further dataset.
    """
    tissue, extra = (
        annotations("midog2022", cases=8, size=12),
        annotations("ccmct", domains="T", cases=6, seed=4),
    )
    for (model, method), strength in STRENGTH.items():
        for fold in FOLDS:
            make(root, tissue, model, method, 0.1, fold, strength=0.6 * strength)
            make(root, tissue, model, method, 1.0, fold, strength=strength, tests=[extra])
            make(root, tissue, model, method, 1.0, fold, by="annotation", strength=strength + 0.5)
            for domain in DOMAINS:
                make(root, tissue, model, method, 1.0, fold, domain, strength=strength)
    make(
        root, tissue, "uni", "lora", 1.0, 0, strength=1.1, suffixes=["r8"], rank=8
    )  # one repeat of three
    shutil.rmtree(root / "midog2022/uni-lora/frac0.1-fold2")
    shutil.rmtree(root / "midog2022/virchow2-probe/domainB-fold1")


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """(folder of runs, folder of the report, what was printed)."""
    folder = tmp_path_factory.mktemp("study")
    write_study(folder / "runs")
    assert (
        call(evaluate, folder / "runs", "--out", folder / "report", "--paper", "--replicates", 200)
        == 0
    )
    return folder / "runs", folder / "report"


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
    assert [text.strip() for text in line[3::2]] == [
        "0.89 ± 0.02",
        "0.87 ± 0.02",
        "0.82 ± 0.02",
        "0.79 ± 0.03",
        "0.83 ± 0.01",
        "0.80 ± 0.05",
    ]  # Table 5
    assert [text.strip() for text in heading[3::2]] == ["paper"] * 6


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
    assert header[2::2] == [
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
    assert all(row["weighted F1"] != "–" for row in rows)
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
    assert [row[1] for row in rows] == ["**0.9**", "**0.9**", "0.8", "–"]
    rows = [["a", "0.9"], ["b", "–"]]
    tables.embolden(rows, 1, [0.9, None])
    assert rows[0][1] == "0.9"
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
    assert names == sorted(path.stem for path in out.glob("*.tex")) and len(names) == 8
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
        [[r"x_1 & {y}\z", "**0.9 ± 0.1**"], ["< 0.001 − 5%", "–"]],
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


# ---------------------------------------------------------------- figures


def test_an_equal_report_is_equal_byte_by_byte(study, tmp_path):
    root, out = study
    assert call(evaluate, root, "--out", tmp_path, "--paper", "--replicates", 200) == 0
    names = sorted(path.name for path in out.iterdir())
    assert names == sorted(path.name for path in tmp_path.iterdir())
    for name in names:
        assert (out / name).read_bytes() == (tmp_path / name).read_bytes(), name
    assert {
        f"{kind}_midog2022.{end}"
        for kind in ("scaling", "cross", "roc_pr", "reliability", "leak")
        for end in ("png", "svg")
    } <= set(names)
    assert not [name for name in names if name.endswith(".tmp")]


def test_figures_are_a_column_wide_not_empty_and_valid(study):
    _, out = study
    for path in out.glob("*_midog2022.png"):
        image = Image.open(path)
        assert image.size[0] == round(figures.WIDTH * 300) and image.size[1] < 9.2 * 300, (
            path
        )  # a page is 9 inches
        grey = np.asarray(image.convert("L"))
        assert 0.01 < (grey < 128).mean() < 0.5 and (grey[0] == 255).all(), path
        root = ElementTree.parse(path.with_suffix(".svg")).getroot()
        assert root.tag.endswith("svg") and root.get("width") == f"{figures.WIDTH * 72:g}pt"


@pytest.fixture
def drawn(monkeypatch):
    """The figures as they would be saved, to look at their texts."""
    kept = []
    monkeypatch.setattr(figures, "save", lambda figure, path: kept.append(figure) or str(path))
    yield kept
    figures.plt.close("all")


def texts(figure):
    return [
        text.get_text()
        for text in figure.findobj(lambda artist: hasattr(artist, "get_text"))
        if text.get_text()
    ]


def many(
    models=(
        "h-optimus-0",
        "phikon",
        "prov-gigapath",
        "resnet50",
        "uni",
        "virchow",
        "virchow2",
        "vit-b",
        "vit-h",
        "uni2-h",
    ),
):
    rng = np.random.default_rng(0)
    y = rng.random(300) < 0.4
    return {
        (method, model): [
            (y, np.clip(0.4 * rng.random(300) + 0.3 * y + 0.2, 0, 1)) for _ in range(2)
        ]
        for method in NAMES.values()
        for model in models
    }


def test_every_axis_has_a_label_and_every_line_a_look_of_its_own(drawn):
    curves = many()
    lines = {
        method: {model: {f: [0.7, 0.8] for f in (0.001, 0.01, 0.1, 1.0)} for _, model in curves}
        for method in NAMES.values()
    }
    domains = [
        "human breast cancer",
        "canine lung cancer",
        "canine lymphoma",
        "human melanoma",
        "A",
    ]
    matrices = {
        f"{model} {method}": {(a, b): 0.8 for a in domains for b in domains}
        for method, model in curves
    }
    figures.scaling("s", lines), figures.roc_pr("r", curves), figures.reliability("c", curves)
    figures.cross_domain("x", matrices, domains), figures.leak("l", [("uni LoRA, 100%", 0.8, 0.9)])
    assert len(drawn) == 5
    for figure in drawn:
        axes = [ax for ax in figure.axes if ax.axison]
        below = {ax.get_position().x0 for ax in axes if ax.get_xlabel()}
        left = {ax.get_position().y0 for ax in axes if ax.get_ylabel() or ax.get_yticklabels()}
        assert {ax.get_position().x0 for ax in axes} <= below and {
            ax.get_position().y0 for ax in axes
        } <= left
        # No two lines of a panel look the same in grey: marker, dashes and filling tell them apart.
        for ax in axes:
            looks = [
                (
                    line.get_marker(),
                    str(line.get_linestyle()),
                    str(line._dash_pattern),
                    str(line.get_markerfacecolor() == "white"),
                )
                for line in ax.lines
                if line.get_marker() != "None"
            ]
            assert figure is drawn[4] or len(looks) == len(set(looks))
    assert list(dict.fromkeys(text for text in texts(drawn[0]) if text.endswith("%"))) == [
        "0.1%",
        "1%",
        "10%",
        "100%",
    ]
    assert {"share of the training pool", "AUROC"} <= set(texts(drawn[0]))
    assert {"1 − specificity", "sensitivity", "precision"} <= set(texts(drawn[1]))
    assert {"AUROC", "HBC", "CLC", "CL", "HM", "A"} <= set(texts(drawn[3]))
    assert "human breast cancer" not in texts(drawn[3])


def test_neighbouring_lines_differ_in_grey():
    def grey(colour):
        return np.dot(matplotlib.colors.to_rgb(colour), (0.299, 0.587, 0.114))

    looks = [figures.style(i) for i in range(10)]
    assert len({(look["marker"], look["dashes"]) for look in looks}) == 10
    assert all(grey(look["color"]) < 0.72 for look in looks)  # none fades on white paper


def test_numbers_of_the_matrix_are_the_means_and_read_on_their_grey(drawn):
    domains = ["A", "B"]
    matrix = {("A", "A"): 0.987, ("A", "B"): 0.5, ("B", "A"): 1.0}
    figures.cross_domain("x", {"uni LoRA": matrix}, domains)
    ax = drawn[0].axes[0]
    assert {tuple(map(int, text.get_position())): text.get_text() for text in ax.texts} == {
        (0, 0): ".99",
        (1, 0): ".50",
        (0, 1): "1.0",
        (1, 1): "–",
    }  # (tested on, trained on)
    figures.cross_domain(
        "y", {"uni LoRA": {("B", "A"): 0.7, ("B", "B"): 0.8}}, domains
    )  # a row per training alone
    assert [text.get_text() for text in drawn[1].axes[0].texts] == [".70", ".80"]
    assert [label.get_text() for label in drawn[1].axes[0].get_yticklabels()] == ["B"]
    image = ax.images[0]
    greys = image.cmap(image.norm(image.get_array().compressed()))[:, :3].mean(1)
    assert greys.min() > 0.45  # black numbers on it are read


def test_names_on_axes_are_short_and_differ():
    names = [
        "human breast cancer",
        "canine lung cancer",
        "canine lymphoma",
        "canine cutaneous mast cell tumor",
        "human neuroendocrine tumor",
        "canine soft tissue sarcoma",
        "human melanoma",
        "canine liver cancer",
        "A",
        "CLC",
        "adenocarcinoma",
        "adenocarcinoid",
        "Hamamatsu_XR",
        "Hamamatsu_S360",
    ]
    found = figures.short_names(names)
    assert set(found) == set(names) and len(set(found.values())) == len(names)
    assert all(len(short) <= 8 for short in found.values())
    assert (found["A"], found["CLC"], found["human breast cancer"]) == ("A", "CLC", "HBC")
    assert figures.short_names(["B", "A"]) == {"A": "A", "B": "B"}
    assert tables.legend("mine", ["human melanoma", "A"]) == " HM: human melanoma."
    assert (
        tables.legend("midog2022", ["A", "D"])
        == " A: canine cutaneous mast cell tumour, D: human neuroendocrine tumour."
    )
    assert tables.legend("mine", ["A", "B"]) == ""


# ---------------------------------------------------------------- gallery


class Solid:
    """Patches of one grey each: that of their row."""

    def read(self, rows):
        return np.stack([np.full((224, 224, 3), row, np.uint8) for row in rows])


def test_the_most_confident_errors_come_first_by_domain():
    y = np.array([0, 0, 0, 1, 1, 0, 1, 1])
    p = np.array([0.6, 0.9, 0.2, 0.1, 0.4, 0.7, 0.8, 0.3])
    domain = np.array(list("AAAAABBB"))
    rows, ids = np.arange(8) * 20 + 30, np.array([f"id{k}" for k in range(8)])
    sheet = np.asarray(tables.draw_errors(Solid(), rows, ids, y, p, domain, columns=2).convert("L"))
    height, width = tables.TILE + 30, tables.TILE + 6

    def tile(line, side, k):  # grey in its middle
        left = tables.MARGIN + side * (2 * width + 24) + k * width
        return sheet[20 + line * height + tables.TILE // 2, left + tables.TILE // 2]

    assert [tile(0, 0, 0), tile(0, 0, 1)] == [
        rows[1],
        rows[0],
    ]  # false positives of A, 0.9 before 0.6
    assert [tile(0, 1, 0), tile(0, 1, 1)] == [
        rows[3],
        rows[4],
    ]  # false negatives of A, 0.1 before 0.4
    assert tile(1, 0, 0) == rows[5] and tile(1, 0, 1) == 255  # B: one look-alike
    assert tile(1, 1, 0) == rows[7] and tile(1, 1, 1) == 255  # B: one missed figure
    # With more errors than places the most confident ones are shown; none at all is said.
    sheet = np.asarray(tables.draw_errors(Solid(), rows, ids, y, p, domain, columns=1).convert("L"))
    assert sheet[20 + tables.TILE // 2, tables.MARGIN + tables.TILE // 2] == rows[1]
    right = np.asarray(
        tables.draw_errors(Solid(), rows, ids, y, y.astype(float), domain).convert("L")
    )
    assert 0 < (right[20:] < 200).sum() < 2000


def test_the_command_draws_the_gallery_of_the_best_model(tmp_path, monkeypatch):
    path = small.dataset(tmp_path / "data", cases=30)
    patches = data.load_dataset(path)
    for fold in range(2):
        for model, strength in (("uni", 0.0), ("virchow", 0.4)):
            make(tmp_path / "runs", patches, model, "probe", 1.0, fold, strength=strength)
    monkeypatch.chdir(tmp_path)
    assert call(evaluate, "runs", "--data", path, "--replicates", 100) == 0
    page = Path("report/index.html").read_text()
    assert (
        "the most confident errors of virchow linear probe on the test set, mean over 2 repeats"
        in page
    )
    image = Image.open("report/errors_small.png")
    assert image.size == (
        tables.MARGIN + 10 * (tables.TILE + 6) + 24,
        20 + 2 * (tables.TILE + 30),
    )  # two domains
    # The first tile of a line is the patch with the highest probability among the look-alikes of
    # its domain.
    run = next(run for run in results.collect(["runs"])[0] if run.model == "virchow")
    ids, y, _, _, domain = run.rows("test")
    p = np.mean(
        [run.rows("test")[2] for run in results.collect(["runs"])[0] if run.model == "virchow"],
        axis=0,
    )
    worst = np.argmax(np.where(y == 0, p, 0))
    assert p[worst] > 0.5
    patch = Image.open(patches.image_path(patches.image[patches.rows(ids[[worst]])[0]]))
    top = 20 + "AB".index(domain[worst]) * (tables.TILE + 30)
    tile = np.asarray(
        image.crop((tables.MARGIN, top, tables.MARGIN + tables.TILE, top + tables.TILE)), float
    )
    assert np.abs(tile - np.asarray(patch.resize((tables.TILE, tables.TILE)), float)).mean() < 12


def test_without_the_images_the_reason_is_said(study, tmp_path, monkeypatch):
    _, out = study
    assert "no gallery of errors for midog2022: " in (out / "index.html").read_text()
    make(tmp_path / "runs", annotations("small"))
    other = small.dataset(tmp_path / "data")
    call(
        evaluate,
        tmp_path / "runs",
        "--out",
        tmp_path / "report",
        "--data",
        other,
        "--replicates",
        100,
    )
    assert (
        "holds other annotations than the runs were made with"
        in (tmp_path / "report/index.html").read_text()
    )
    assert not (tmp_path / "report/errors_small.png").exists()


def test_the_gallery_reads_a_dataset_of_ones_own_as_the_run_did(tmp_path, monkeypatch):
    """A CSV with labels, columns and images of its own, which no name finds: the run says how it
    was read.
    """
    path = small.dataset(tmp_path / "data", cases=30)
    header, *lines = path.read_text().splitlines()
    lines = [line.replace(",0,", ",no,").replace(",1,", ",yes,") for line in lines]
    odd = tmp_path / "odd.csv"
    odd.write_text("\n".join([header.replace("label", "verdict"), *lines]) + "\n")
    source = dict.fromkeys(flags.SOURCE) | {
        "data": str(odd),
        "images": str(path.parent),
        "positive": "yes",
        "columns": "label=verdict",
        "fit": "resize",
    }
    run = make(tmp_path / "runs", flags.from_source(source)[0], "uni", "probe", strength=0.0)
    config = common.read_json(run / "config.json")
    common.write_json(run / "config.json", config | {"source": source})
    monkeypatch.chdir(tmp_path)
    assert call(evaluate, "runs", "--replicates", 100) == 0
    assert (
        "odd: the most confident errors of uni linear probe"
        in Path("report/index.html").read_text()
    )
    assert Image.open("report/errors_odd.png").width > 1000
    # Moved since: the flags name the new place, and the labels are still read as the run read them.
    odd.rename(path.parent / "odd.csv")
    assert call(evaluate, "runs", "--out", "gone", "--replicates", 100) == 0
    assert "no gallery of errors for odd: " in Path("gone/index.html").read_text()
    assert (
        call(
            evaluate,
            "runs",
            "--out",
            "moved",
            "--data",
            path.parent / "odd.csv",
            "--replicates",
            100,
        )
        == 0
    )
    assert Path("moved/errors_odd.png").read_bytes() == Path("report/errors_odd.png").read_bytes()


# ---------------------------------------------------------------- the page


class Elements(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))


def test_the_page_holds_everything_and_nothing_from_elsewhere(study):
    _, out = study
    page = (out / "index.html").read_text()
    elements = Elements(page).found
    names = {attributes["id"] for tag, attributes in elements if tag == "table"}
    assert names == {path.stem for path in out.glob("*.md")}
    pictures = [attributes["src"] for tag, attributes in elements if tag == "img"]
    assert len(pictures) == 5 and all(
        source.startswith("data:image/svg+xml;base64,") for source in pictures
    )
    assert all(attributes["alt"] for tag, attributes in elements if tag == "img")
    assert not {"script", "iframe", "object", "embed", "audio", "video", "base", "form"} & {
        tag for tag, _ in elements
    }
    for tag, attributes in elements:
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href", "srcset", "data", "action", "poster"):
                assert value.startswith("data:"), (tag, name)
    assert not re.search(r"@import|url\(", page)


def test_names_cannot_become_markup(tmp_path):
    make(tmp_path / "runs", annotations("<i>data"), "<script>alert(1)</script>")
    damaged = make(tmp_path / "runs", annotations("<i>data"), "<img src=x onerror=y>", fold=1)
    common.write_json(damaged / "metrics.json", {})
    assert call(evaluate, tmp_path / "runs", "--out", tmp_path / "report", "--replicates", 100) == 0
    page = (tmp_path / "report/index.html").read_text()
    tags = {tag for tag, _ in Elements(page).found}
    assert (
        "script" not in tags and "i" not in tags and "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    )
    assert all("onerror" not in attributes for _, attributes in Elements(page).found)
    assert all(
        path.parent == tmp_path / "report" for path in (tmp_path / "report").rglob("*")
    )  # nor folders


BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))),
    None,
)
# Put into a copy of the page: what is broken or wider than the window ends up in the title.
LOOK = """<script>addEventListener("load", () => { document.title = JSON.stringify({
    broken: [...document.images].filter(i => !i.complete || i.naturalWidth < 100).length,
    images: document.images.length, width: document.documentElement.scrollWidth, window: innerWidth,
    tables: document.querySelectorAll("table").length,
    rows: document.querySelectorAll("tbody tr").length,
    asked: performance.getEntriesByType("resource").map(e => e.name).filter(name => !name.startsWith("data:"))
}) })</script></body>"""


def browse(page, tmp_path, *flags):
    return subprocess.run(
        [
            BROWSER,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            "--disable-background-networking",
            f"--user-data-dir={tmp_path / 'profile'}",
            *flags,
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )


def look(page, tmp_path, width):
    seen = browse(page, tmp_path, f"--window-size={width},900", "--dump-dom")
    return json.loads(html.unescape(re.search(r"<title>(\{.*?\})</title>", seen.stdout)[1]))


@pytest.mark.skipif(BROWSER is None, reason="needs a browser: chromium")
@pytest.mark.parametrize("width", [1280, 600])
def test_a_real_browser_shows_all_of_it_and_asks_nobody(study, tmp_path, width):
    _, out = study
    page = tmp_path / "copy.html"
    text = (out / "index.html").read_text()
    page.write_text(text.replace("</body>", LOOK))
    title = look(page, tmp_path, width)
    assert (
        title["images"] == 5
        and title["broken"] == 0
        and title["tables"] == len(list(out.glob("*.md")))
    )
    assert title["rows"] == text.count("<tr>") - title["tables"] and title["asked"] == []
    assert (
        title["width"] <= title["window"] == width
    )  # wide tables scroll in their own box, not the page
    # What would ask somebody is seen as that.
    page.write_text(text.replace("</body>", '<img src="http://127.0.0.1:9/a.png">' + LOOK))
    title = look(page, tmp_path, width)
    assert title["asked"] == ["http://127.0.0.1:9/a.png"] and title["broken"] == 1


@pytest.mark.skipif(BROWSER is None, reason="needs a browser: chromium")
def test_the_page_looks_like_tables_and_figures(study, tmp_path):
    _, out = study
    browse(
        out / "index.html",
        tmp_path,
        "--window-size=1280,4000",
        f"--screenshot={tmp_path / 'page.png'}",
    )
    picture = np.asarray(Image.open(tmp_path / "page.png").convert("L"))
    assert picture.shape == (4000, 1280)
    rows = (picture < 128).any(1)
    assert rows[:2500].mean() > 0.3 and 0.01 < (picture[:2500] < 128).mean() < 0.3


def test_metrics_named_in_the_tables_are_those_of_the_summary():
    assert set(tables.METRICS) == set(KEYS.values()) <= set(metrics.summarise([0, 1], [0.2, 0.8]))
