"""The tables of the report, the paper's and others, and how they are written: Markdown, LaTeX,
HTML."""

import csv
import html
import re
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

import common
from dataset.annotations import KNOWN
from reporting import bootstrap, figures, metrics

# In the order of the paper's tables.
METHODS = {"full": "end-to-end", "probe": "linear probe", "lora": "LoRA"}
METRICS = {"balanced_accuracy": "balanced accuracy", "weighted_f1": "weighted F1", "auroc": "AUROC"}
AT_T = "balanced accuracy at t"  # the threshold chosen on validation
DECISIONS = {
    "balanced_accuracy": "balanced accuracy",
    "weighted_f1": "weighted F1",
    "accuracy": "accuracy",
    "kappa": "Cohen's kappa",
}
TEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "_": r"\_",
    "#": r"\#",
    "$": r"\$",
    "{": r"\{",
    "}": r"\}",
    "^": r"\^{}",
    "~": r"\~{}",
    "±": r"$\pm$",
    "–": "--",
    "→": r"$\to$",
    "<": r"$<$",
    ">": r"$>$",
    "−": r"$-$",
    "µ": r"\textmu{}",
    "≥": r"$\ge$",
    "|": r"$|$",
}


class Bold(str):
    """A cell in bold."""


@dataclass
class Table:
    name: str  # of its files
    title: str
    header: list
    rows: list  # of lists of text; Bold cells are bold
    notes: list = field(default_factory=list)


# ---------------------------------------------------------------- writing tables


def plain_markdown(text):
    """`text` for Markdown: nothing in a name starts a tag, a link or another cell."""
    text = common.printable(text).replace("|", "\\|")
    text = re.sub(r"<(?=[A-Za-z/!?])", "&lt;", text)
    return text.replace("](", "]\\(")


def markdown(table):
    """A Table as Markdown."""

    def line(cells):
        texts = []
        for cell in cells:
            text = plain_markdown(cell)
            if isinstance(cell, Bold):
                text = f"**{text}**"
            texts.append(text)
        return "| " + " | ".join(texts) + " |"

    rule = "|---|" + "---:|" * (len(table.header) - 1)
    return "\n".join(
        [
            f"### {plain_markdown(table.title)}",
            "",
            line(table.header),
            rule,
            *map(line, table.rows),
            "",
            *(f"{plain_markdown(note)}  " for note in table.notes),
            "",
        ]
    )


def latex(table):
    """A Table as LaTeX (booktabs); over both columns of a page if it is wide."""

    def cell(text):
        escaped = "".join(TEX.get(character, character) for character in common.printable(text))
        if isinstance(text, Bold):
            return rf"\textbf{{{escaped}}}"
        return escaped

    rows = [" & ".join(map(cell, row)) + r" \\" for row in table.rows]
    body = [
        rf"\begin{{tabular}}{{l{'r' * (len(table.header) - 1)}}}",
        r"\toprule",
        " & ".join(map(cell, table.header)) + r" \\",
        r"\midrule",
        *rows,
        r"\bottomrule",
        r"\end{tabular}",
    ]
    notes = [rf"\par\footnotesize {cell(note)}" for note in table.notes]
    columns = zip(table.header, *table.rows)
    width = sum(max(_shown_length(text) for text in column) + 2 for column in columns)
    environment = "table"
    if width > 48:
        environment = "table*"
    if width > 96:
        body = [r"\resizebox{\textwidth}{!}{%", *body, "}"]
    return "\n".join(
        [
            r"% needs \usepackage{booktabs, graphicx}",
            rf"\begin{{{environment}}}",
            r"\centering",
            rf"\caption{{{cell(table.title)}}}",
            rf"\label{{tab:{table.name}}}",
            *body,
            *notes,
            rf"\end{{{environment}}}",
            "",
        ]
    )


def _shown_length(text):
    """Characters that a cell takes; bold ones are wider."""
    return len(text) + 4 * isinstance(text, Bold)


def as_html(table):
    """A Table as HTML: its title, and a box of its own that scrolls."""

    def cell(text, tag):
        inner = html.escape(common.printable(text))
        if isinstance(text, Bold):
            inner = f"<b>{inner}</b>"
        return f"<{tag}>{inner}</{tag}>"

    def row(cells, tag="td"):
        return f"<tr>{''.join(cell(text, tag) for text in cells)}</tr>"

    name, title = html.escape(table.name), html.escape(common.printable(table.title))
    return "\n".join(
        [
            f'<h3 id="title_{name}">{title}</h3>',
            f'<div class="scroll" tabindex="0"><table id="{name}" aria-labelledby="title_{name}">',
            f"<thead>{row(table.header, 'th')}</thead><tbody>",
            *map(row, table.rows),
            "</tbody></table></div>",
            *(f'<p class="note">{html.escape(common.printable(note))}</p>' for note in table.notes),
        ]
    )


# ---------------------------------------------------------------- cells


def mean(values):
    """Mean of the values that are not None; None without any."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    return float(np.mean(known))


def mean_sd(values, digits=3):
    """ "0.873 ± 0.011" of the values that are not None; no deviation for one, "–" for none."""
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    text = f"{np.mean(known):.{digits}f}"
    if len(known) > 1:
        text += f" ± {np.std(known, ddof=1):.{digits}f}"
    return text


def embolden(rows, column, values, lowest=False):
    """Make the cells of a column with the best mean bold; values: one number or None per row."""
    known = [round(value, 3) for value in values if value is not None]
    if len(known) < 2:
        return
    best = min(known) if lowest else max(known)
    for row, value in zip(rows, values):
        if value is not None and round(value, 3) == best:
            row[column] = Bold(row[column])


def missing(groups, complete, what):
    """Notes on repeats that some models lack. groups: {label: repeats it has}; complete: all."""
    notes = []
    for label, repeats in groups.items():
        if complete - repeats:
            lacking = ", ".join(map(str, sorted(complete - repeats)))
            notes.append(f"missing: {label}: {what} {lacking}")
    return notes


def published():
    """paper.csv as {(data or "5", label of a run with the paper's choices, setting, metric):
    "0.88 ± 0.01"}; "5": the paper's Table 5.
    """
    values = {}
    with open(Path(__file__).with_name("paper.csv"), newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            data = "5" if row["table"] == "5" else row["data"]
            key = data, f"{row['model']}-{row['method']}", row["setting"], row["metric"]
            values[key] = f"{row['mean']} ± {row['sd']}"
    return values


def name_of(run):
    """Model and method of a run in tables and figures: "uni LoRA", "uni LoRA r8", "uni knn"; --name
    stays as it is, "uni LoRA lr1e-3".
    """
    label, tag = run.label, run.flags.get("name")
    if tag:
        label = label.removesuffix(f"-{tag}")
    choices = label.removeprefix(f"{run.model}-{run.method}").strip("-").split("-")
    words = [run.model]
    if choices[0] not in ("knn", "prototype"):  # these are no linear probes
        words.append(METHODS.get(run.method, run.method))
    return " ".join([*words, *filter(None, choices), *filter(None, [tag])])


def papers_label(run):
    """A run's label for published(): --val-patches makes validation cheaper, not the method another
    one.
    """
    count = run.flags.get("val_patches")
    return run.label.replace(f"-val{count}", "", 1) if count else run.label


def without_method(run):
    """name_of() for a panel whose title is the method."""
    return name_of(run).replace(f" {METHODS.get(run.method, run.method)}", "", 1)


def in_order(finished):
    """{name_of: runs}: end-to-end, probes, LoRA, as in the paper; then by name."""
    order = list(METHODS)

    def key(run):
        place = order.index(run.method) if run.method in order else len(order)
        return place, run.label, run.fold

    named = defaultdict(list)
    for run in sorted(finished, key=key):
        named[name_of(run)].append(run)
    return named


def legend(data, domains):
    """Sentence on what the short names of the domains stand for; "" if they explain themselves."""
    known = KNOWN[data].domains if data in KNOWN else {}
    meanings = {}
    for name, short in figures.short_names(domains).items():
        if short != name:
            meanings[short] = common.printable(name)
        elif name in known and known[name][2]:
            meanings[short] = known[name][2]
    if not meanings:
        return ""
    return f" {', '.join(f'{short}: {text}' for short, text in sorted(meanings.items()))}."


def interval_name(cases):
    """Heading of a column of intervals; with few cases it tells what such intervals held in
    simulations.
    """
    coverage = bootstrap.measured(min(cases, default=bootstrap.FEW_CASES))
    if coverage is None:
        return "95% interval"
    return f"95% interval (measured: {coverage:.0%})"


# ---------------------------------------------------------------- the paper's tables


def full_table(name, title, named, trust, paper):
    """Tables 3 and 4: one row per model, at the largest fraction. named: in_order(); trust:
    trusted(); paper: published() or {}.
    """
    folds = {run.fold for repeats in named.values() for run in repeats}
    rows, means = [], {key: [] for key in METRICS}
    for label, repeats in named.items():
        count = str(len(repeats))
        if len(repeats) < len(folds):
            count += f" of {len(folds)}"
        row = [label, count]
        for key in METRICS:
            values = [run.sets["test"][key] for run in repeats]
            row.append(mean_sd(values))
            means[key].append(mean(values))
        row.append(_bounds(trust.get(label, {}).get("interval")))
        if paper:
            first = repeats[0]
            label = papers_label(first)
            row += [paper.get((first.data, label, "all", key), "–") for key in METRICS]
        rows.append(row)
    for column, key in enumerate(METRICS, start=2):
        embolden(rows, column, means[key])

    cases = sorted({entry["cases"] for entry in trust.values()})
    header = ["model", "repeats", *METRICS.values(), "AUROC, " + interval_name(cases)]
    if paper:
        header += [f"paper: {text}" for text in METRICS.values()]
    notes = [
        "Mean ± standard deviation over the repeats, threshold 0.5, best in bold. The interval is "
        "of the mean over the repeats, by drawing the test set's "
        f"{', '.join(map(str, cases)) or 'few'} cases anew; it holds the chance of the test set, "
        "not that of training."
    ]
    notes += filter(None, map(bootstrap.coverage_note, cases))
    notes += missing(
        {label: {run.fold for run in repeats} for label, repeats in named.items()}, folds, "repeats"
    )
    if paper:
        if "midog2022" in {run.data for repeats in named.values() for run in repeats}:
            notes.append(
                "The paper's rows of linear probes and of ResNet50 are the same for CCMCT and "
                "MIDOG 2022: doubtful as a target here."
            )
        notes.append("The paper's published code splits by annotation; here cases are kept apart.")
    return Table(name, title, header, rows, notes)


def decisions_table(name, title, named, positive):
    """Beyond the paper: class 1 at 0.5 and at the threshold chosen on validation; probabilities.

    positive: name of class 1."""
    rows = []
    scores = {"average_precision": False, "brier": True, "ece": True}  # whether the lowest is best
    decisions = ("sensitivity", "specificity", "precision", "f1")
    for label, repeats in named.items():
        tests = [run.sets["test"] for run in repeats]
        row = [label, *(mean_sd([test[key] for test in tests]) for key in scores)]
        for part in ("at_0.5", "at_threshold"):
            row += [mean_sd([test[part][key] for test in tests], 2) for key in decisions]
        rows.append(row + [mean_sd([run.threshold for run in repeats], 2)])
    for column, (key, lowest) in enumerate(scores.items(), start=1):
        means = [mean([run.sets["test"][key] for run in repeats]) for repeats in named.values()]
        embolden(rows, column, means, lowest)
    header = ["model", "av. precision", "Brier", "ECE"]
    for threshold in ("0.5", "t"):
        header += [f"{key} at {threshold}" for key in (*decisions[:3], "F1")]
    note = f"Sensitivity, precision and F1 of the class {positive}; {chosen(named)}"
    return Table(name, title, [*header, "t"], rows, [note])


def chosen(named):
    """Sentence on the threshold t of the runs in a table."""
    first = next(iter(named.values()))[0]
    return f"t: the threshold {metrics.describe_rule(first.rule)}."


def thresholds_table(name, title, named, trust):
    """What both classes together gain by the threshold chosen on validation: DECISIONS at 0.5 and
    at that threshold, there with intervals. trust: trusted().
    """
    rows, means = [], {key: [] for key in DECISIONS}
    for label, repeats in named.items():
        row = [label, mean_sd([run.threshold for run in repeats], 2)]
        tests = [run.sets["test"] for run in repeats]
        for key in DECISIONS:
            at_t = [test["at_threshold"][key] for test in tests]
            row += [mean_sd([test["at_0.5"][key] for test in tests]), mean_sd(at_t)]
            bounds = trust.get(label, {}).get("decisions", {}).get(key)
            row.append(_bounds(bounds))
            means[key].append(mean(at_t))
        rows.append(row)
    header = ["model", "t"]
    for key, called in DECISIONS.items():
        embolden(rows, len(header) + 1, means[key])
        header += [f"{called} at 0.5", f"{called} at t", f"95% interval of {called} at t"]
    cases = sorted({entry["cases"] for entry in trust.values()})
    note = (
        "Mean ± standard deviation over the repeats, best at t in bold; the intervals are by "
        f"drawing the test set's cases anew, with the thresholds as they are; {chosen(named)}"
    )
    notes = [note, *filter(None, map(bootstrap.coverage_note, cases))]
    return Table(name, title, header, rows, notes)


def scaling_table(name, title, finished):
    """AUROC by the share of the training pool (Figures 2 and 3 as numbers)."""
    fractions = sorted({run.frac for run in finished})
    folds = {run.fold for run in finished}
    complete = common.counted(len(folds), "repeat")
    rows, means, lacking = [], [], []
    for label, repeats in in_order(finished).items():
        row, row_means = [label], []
        for frac in fractions:
            values = [run.sets["test"]["auroc"] for run in repeats if run.frac == frac]
            row_means.append(mean(values))
            cell = mean_sd(values)
            if not values:
                lacking.append(f"{label} at {100 * frac:g}%: none")
            elif len(values) < len(folds):
                cell += f" ({len(values)})"
                lacking.append(f"{label} at {100 * frac:g}%: {len(values)} of {complete}")
            row.append(cell)
        rows.append(row)
        means.append(row_means)
    for i in range(len(fractions)):
        embolden(rows, i + 1, [row_means[i] for row_means in means])

    sizes = []
    for frac in fractions:
        ids = [run.split["ids"] for run in finished if run.frac == frac]
        train, val = ([len(part[key]) for part in ids] for key in ("train", "val"))
        sizes.append(
            f"{100 * frac:g}%: {_span(train)} training and {_span(val)} validation annotations"
        )
    notes = [
        f"AUROC, mean ± standard deviation over {complete} (in brackets: how many, where fewer).",
        "Validation is not reduced with the training set: " + "; ".join(sizes) + ".",
    ]
    if lacking:
        notes.append("Missing: " + "; ".join(lacking) + ".")
    header = ["model", *(f"{100 * frac:g}%" for frac in fractions)]
    return Table(name, title, header, rows, notes)


def _span(values):
    low, high = min(values), max(values)
    if low == high:
        return f"{low:,}"
    return f"{low:,}–{high:,}"


def cross_table(name, title, finished, paper):
    """Table 5: in the domain of training and out of it, over all values of train domain × test
    domain × repeat.
    """
    domains, folds = sorted({run.domain for run in finished}), {run.fold for run in finished}
    complete = {f"{domain}/{fold}" for domain in domains for fold in folds}
    named = in_order(finished)
    rows, keys = [], ("auroc", "balanced_accuracy", "weighted_f1", AT_T)
    means = {(key, side): [] for key in keys for side in ("in", "out")}
    for label, repeats in named.items():
        row = [label, str(len(repeats))]
        for key, side in means:
            values = sides(repeats, key)[side]
            row.append(mean_sd(values))
            means[key, side].append(mean(values))
            if paper and key in METRICS:
                row.append(paper.get(("5", papers_label(repeats[0]), side, key), "–"))
        rows.append(row)
    header = ["model", "runs"]
    for key, side in means:
        embolden(rows, len(header), means[key, side])
        header.append(f"{METRICS.get(key, AT_T)} {side}")
        if paper and key in METRICS:
            header.append("paper")
    notes = [
        f"Trained on one domain ({', '.join(domains)}), {common.counted(len(folds), 'repeat')} "
        "each; in: withheld cases of that domain, out: every other domain whole. Mean ± standard "
        f"deviation over all of these values, best in bold; {chosen(named)}"
    ]
    notes += missing(
        {
            label: {f"{run.domain}/{run.fold}" for run in repeats}
            for label, repeats in named.items()
        },
        complete,
        "domain/repeat",
    )
    return Table(name, title, header, rows, notes)


def sides(repeats, key):
    """{"in": values of a metric in the domain of training, "out": in the other domains}."""
    values = {"in": [value_of(run.sets["test"], key) for run in repeats], "out": []}
    for run in repeats:
        others = [run.sets[name] for name in run.split["others"] if name in run.sets]
        values["out"] += [value_of(summary, key) for summary in others]
    return values


def value_of(summary, key):
    """A metric of a set: of METRICS, or balanced accuracy at the chosen threshold (AT_T)."""
    if key == AT_T:
        return summary["at_threshold"]["balanced_accuracy"]
    return summary[key]


def external_table(name, title, finished, datasets, replicates):
    """Tested on whole other datasets (train on CCMCT, test on MIDOG). replicates: of the bootstrap
    for the intervals."""
    rows = []
    for label, runs in in_order(finished).items():
        for frac in sorted({run.frac for run in runs}):
            for dataset in datasets:
                tested = [run for run in runs if run.frac == frac and dataset in run.sets]
                if not tested:
                    continue
                sets = [run.sets[dataset] for run in tested]
                cells = [mean_sd([values[key] for values in sets]) for key in METRICS]
                at_t = [value_of(values, AT_T) for values in sets]
                samples = [run.rows(dataset)[1:4] for run in tested]
                thresholds = [run.threshold for run in tested]
                bounds = _decision_intervals(bootstrap.replicate, samples, thresholds, replicates)
                cells += [mean_sd(at_t), _bounds(bounds["balanced_accuracy"])]
                rows.append([label, f"{100 * frac:g}%", dataset, str(len(tested)), *cells])
    header = ["model", "share", "tested on", "repeats", *METRICS.values()]
    header += [AT_T, f"95% interval of {AT_T}"]
    notes = [
        "Whole datasets that nothing was trained on; mean ± standard deviation over the repeats.",
        f"The interval is by drawing the dataset's cases anew; {chosen({'': finished})}",
    ]
    return Table(name, title, header, rows, notes)


def _decision_intervals(replicate, samples, thresholds, replicates):
    """{key of DECISIONS: interval of its mean over the repeats, each at its threshold}. replicate:
    of bootstrap; samples: (labels, probabilities, cases) of each repeat."""
    parts, cases = replicate(samples, replicates, thresholds=thresholds, ranking=False)
    return {key: bootstrap.interval(*parts[key][1:], cases) for key in DECISIONS}


def _bounds(interval):
    """An interval, or None, as a cell."""
    if interval is None:
        return "–"
    return "{:.3f} – {:.3f}".format(*interval)


def leak_rows(finished):
    """(label, AUROC by case, by annotation, {"case": repeats, "annotation": repeats}) of models
    that have both, at equal fractions and seeds.
    """
    pairs = defaultdict(lambda: defaultdict(list))
    for run in finished:
        if run.domain is None and run.by in ("case", "annotation"):
            pairs[name_of(run), run.frac, run.seed][run.by].append(run.sets["test"]["auroc"])
    rows = []
    for (label, frac, seed), both in sorted(pairs.items()):
        honest, leaking = mean(both["case"]), mean(both["annotation"])
        if honest is not None and leaking is not None:
            label = f"{label}, {100 * frac:g}%"
            if seed:
                label += f", seed {seed}"
            rows.append((label, honest, leaking, both))
    return rows


def leak_table(name, data, rows):
    """What splitting by annotation adds. rows: leak_rows()."""
    cells = []
    for label, honest, leaking, both in rows:
        cells.append(
            [
                label,
                mean_sd(both["case"]),
                mean_sd(both["annotation"]),
                f"{leaking - honest:+.3f}",
            ]
        )
    return Table(
        name,
        f"What the leak is worth: AUROC on {data} by case and by annotation",
        ["model", "by case", "by annotation", "difference"],
        cells,
        [
            "By annotation, as the paper's published code draws, patches of one slide are in "
            "training and in test. The test sets differ, so part of the difference is chance."
        ],
    )


def ensemble_table(name, title, rows, notes):
    """Means of probabilities. rows: ensemble.results() of one dataset; notes: on what has none."""
    header = ["mean of", "runs", "tested on", "bal. acc. at 0.5", "bal. acc. at t"]
    cases = [row["cases"] for row in rows]
    header += [interval_name(cases), "t", "AUROC", interval_name(cases), "AUROC, gain", "p"]
    lines = []
    for row in rows:
        lines.append(
            [
                ensemble_label(row),
                str(row["members"]),
                row["set"],
                number(row["balanced_accuracy"]),
                number(row["balanced_accuracy_at_threshold"]),
                bounds_of(row, "balanced_accuracy_at_threshold"),
                f"{row['threshold']:.3f}",
                number(row["auroc"]),
                bounds_of(row, "auroc"),
                number(row["auroc_gain"], "+.3f"),
                _p(row["auroc_gain_p"]),
            ]
        )
    text = (
        "The mean of the members' probabilities: one model made of several. t: chosen by the rule "
        "of a single run on all validation patches of the members, each with the mean of those "
        "that held it out. Intervals by drawing cases anew. Gain: over the mean of the members' "
        "own AUROC, on the same draws, and its p (not corrected for the number of rows)."
    )
    return Table(name, title, header, lines, [text, *notes])


def ensemble_label(row):
    """What a row of ensemble.results() is the mean of: "uni-lora, 10%, domain A, seed 1"."""
    text = row["label"]
    if row["frac"] < 1:
        text += f", {100 * row['frac']:g}%"
    if row["domain"]:
        text += f", domain {row['domain']}"
    if row["split"] != "case":
        text += f", by {row['split']}"
    if row["seed"]:
        text += f", seed {row['seed']}"
    return text


def number(value, form=".3f"):
    """A number of a table; "–" for None."""
    if value is None:
        return "–"
    return f"{value:{form}}"


def bounds_of(row, key):
    """The interval of a row of ensemble.results(), as text."""
    if row[f"{key}_low"] is None:
        return "–"
    return f"{row[f'{key}_low']:.3f} – {row[f'{key}_high']:.3f}"


# ---------------------------------------------------------------- trust


def trusted(named, replicates):
    """{label: {"interval", "decisions", "cases", "parts", "ids", "folds"}} of the means over the
    repeats of each model; without models whose test set lacks a class. interval: of AUROC;
    decisions: {key of DECISIONS: interval at the chosen threshold}; parts: of
    bootstrap.replicate().
    """
    trust = {}
    for label, repeats in named.items():
        tests = [run.rows("test") for run in repeats]
        ids, replicate = tests[0][0], bootstrap.replicate
        if any(not np.array_equal(test[0], ids) for test in tests):
            if not repeats[0].folds:
                # collect() keeps one test set per section; a table by domain may still come here
                continue
            ids = np.concatenate([test[0] for test in tests])
            replicate = bootstrap.replicate_folds
        samples = [(y, p, case) for _, y, p, case, _ in tests]
        parts, cases = replicate(samples, replicates)
        if not np.isfinite(parts["auroc"][0]):
            continue
        thresholds = [run.threshold for run in repeats]
        trust[label] = {
            "interval": bootstrap.interval(*parts["auroc"][1:], cases),
            "decisions": _decision_intervals(replicate, samples, thresholds, replicates),
            "cases": cases,
            "parts": parts,
            "ids": ids,
            "folds": {run.fold for run in repeats},
        }
    return trust


def paired_tests(trust):
    """Rows (dicts) of all pairs of models on the same test set; p corrected by Holm for all."""
    rows, labels = [], list(trust)
    for metric in METRICS:
        of_metric = []
        for i, first in enumerate(labels):
            for second in labels[i + 1 :]:
                a, b = trust[first], trust[second]
                if not np.array_equal(a["ids"], b["ids"]):
                    continue
                difference, bounds, p = bootstrap.paired(
                    a["parts"][metric], b["parts"][metric], a["cases"]
                )
                low, high = bounds or (None, None)
                of_metric.append(
                    {
                        "metric": metric,
                        "first": first,
                        "second": second,
                        "difference": difference,
                        "low": low,
                        "high": high,
                        "p": p,
                        "cases": a["cases"],
                        "repeats_first": len(a["folds"]),
                        "repeats_second": len(b["folds"]),
                    }
                )
        corrected = bootstrap.holm([row["p"] for row in of_metric])
        for row, p_holm in zip(of_metric, corrected):
            row["p_holm"] = p_holm
        rows += of_metric
    return rows


def tests_table(name, title, tests, trust):
    """The best model by AUROC against every other. tests: paired_tests()."""
    scores = {label: entry["parts"]["auroc"][0] for label, entry in trust.items()}
    best = max(scores, key=scores.get)
    rows, pairs = [], 0
    for row in tests:
        if row["metric"] != "auroc":
            continue
        pairs += 1
        if best not in (row["first"], row["second"]):
            continue
        sign, other = 1, row["second"]
        if row["second"] == best:
            sign, other = -1, row["first"]
        bounds = "–"
        if row["low"] is not None:
            bounds = "{:+.3f} – {:+.3f}".format(*sorted((sign * row["low"], sign * row["high"])))
        difference = f"{sign * row['difference']:+.3f}"
        rows.append([f"{best} − {other}", difference, bounds, _p(row["p"]), _p(row["p_holm"])])
    cases = next(iter(trust.values()))["cases"]
    notes = [
        "Differences of the mean AUROC over the repeats; cases resampled in pairs. p after Holm "
        f"is corrected for all {pairs} pairs of models (tests.csv has them all, and the other "
        "metrics). Patches of a case are not independent: DeLong's test would be wrong here."
    ]
    if cases < bootstrap.FEW_CASES:
        notes.append(bootstrap.coverage_note(cases) + "; read the p values with the same care.")
    header = ["models", "difference", interval_name([cases]), "p", "p after Holm"]
    return Table(name, title, header, rows, notes)


def _p(value):
    if value is None:
        return "–"
    if value < 0.001:
        return "< 0.001"
    return f"{value:.3f}"
