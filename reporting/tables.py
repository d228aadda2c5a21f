"""The report on finished runs: tables (Markdown, LaTeX, HTML), figures, paired tests, gallery of
errors. No torch.
"""

import base64
import csv
import html
import os
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

import common
import flags as data_flags
from common import UserError
from dataset.annotations import KNOWN, root_folder
from dataset.patches import Patches
from reporting import bootstrap, figures

METHODS = {
    "full": "end-to-end",
    "probe": "linear probe",
    "lora": "LoRA",
}  # in the order of the paper's tables
METRICS = {"balanced_accuracy": "balanced accuracy", "weighted_f1": "weighted F1", "auroc": "AUROC"}
TABLES = {"ccmct": "Table 3", "midog2022": "Table 4"}
FIGURES = {"ccmct": "Figure 2", "midog2022": "Figure 3"}
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
TILE, MARGIN = 112, 60  # px of a patch in the gallery, and of the domain's name left of its line


@dataclass
class Table:
    name: str  # of its files
    title: str
    header: list
    rows: list  # of lists of text; "**…**" is bold
    notes: list = field(default_factory=list)


# ---------------------------------------------------------------- writing tables


def markdown(table):
    def line(cells):
        return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"

    rule = "|" + "|".join("---" if i == 0 else "---:" for i in range(len(table.header))) + "|"
    return (
        "\n".join(
            [
                f"### {table.title}",
                "",
                line(table.header),
                rule,
                *map(line, table.rows),
                "",
                *(f"{note}  " for note in table.notes),
            ]
        )
        + "\n"
    )


def latex(table):
    def cell(text):
        text, bold = str(text), str(text).startswith("**")
        text = "".join(TEX.get(character, character) for character in text.replace("**", ""))
        return rf"\textbf{{{text}}}" if bold else text

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
    width = sum(
        max(len(str(row[i])) for row in [table.header, *table.rows]) + 2
        for i in range(len(table.header))
    )
    wide = "*" * (width > 48)  # over both columns of a page, and no wider than these
    if width > 96:
        body = [r"\resizebox{\textwidth}{!}{%", *body, "}"]
    return (
        "\n".join(
            [
                r"% needs \usepackage{booktabs, graphicx}",
                rf"\begin{{table{wide}}}",
                r"\centering",
                rf"\caption{{{cell(table.title)}}}",
                rf"\label{{tab:{table.name}}}",
                *body,
                *notes,
                rf"\end{{table{wide}}}",
            ]
        )
        + "\n"
    )


def as_html(table):
    def cell(text, tag="td"):
        text = str(text)
        inner = html.escape(text.strip("*"))
        return f"<{tag}>{f'<b>{inner}</b>' if text.startswith('**') else inner}</{tag}>"

    return "\n".join(
        [
            '<div class="scroll"><table '
            f'id="{table.name}"><caption>{html.escape(table.title)}</caption>',
            f"<thead><tr>{''.join(cell(text, 'th') for text in table.header)}</tr></thead><tbody>",
            *(f"<tr>{''.join(map(cell, row))}</tr>" for row in table.rows),
            "</tbody></table></div>",
            *(f'<p class="note">{html.escape(note)}</p>' for note in table.notes),
        ]
    )


def write_csv(path, rows, header=None):
    """Rows (dicts) as CSV; None is an empty cell, numbers keep all digits."""
    with (
        common.atomic(path) as temporary,
        open(temporary, "w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.DictWriter(file, header or list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def mean_sd(values, digits=3):
    """ "0.873 ± 0.011" of the values that are there; without deviation for one, "–" for none."""
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    deviation = f" ± {np.std(known, ddof=1):.{digits}f}" if len(known) > 1 else ""
    return f"{np.mean(known):.{digits}f}{deviation}"


def embolden(rows, column, values, lowest=False):
    """Make bold the cells of a column with the best mean; values: one number or None per row."""
    known = [round(value, 3) for value in values if value is not None]
    if len(known) > 1:
        best = min(known) if lowest else max(known)
        for row, value in zip(rows, values):
            if value is not None and round(value, 3) == best:
                row[column] = f"**{row[column]}**"


def mean(values):
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def missing(groups, wanted, what):
    """Notes on repeats that some models have and others lack. groups: {label: the repeats it has}."""
    return [
        f"missing: {label}: {what} {', '.join(map(str, sorted(wanted - have)))}"
        for label, have in groups.items()
        if wanted - have
    ]


def published():
    """paper.csv as {(data or "5", label of a run of the paper's choices, setting, metric): "0.88 ±
    0.01"}.
    """
    with open(Path(__file__).with_name("paper.csv"), newline="") as file:
        return {
            (
                row["data"] if row["table"] != "5" else "5",
                f"{row['model']}-{row['method']}",
                row["setting"],
                row["metric"],
            ): f"{row['mean']} ± {row['sd']}"
            for row in csv.DictReader(file)
        }


def name_of(run):
    """Model and method of a run, as tables and figures call it: "uni LoRA", "uni LoRA r8", "uni
    knn".
    """
    rest = run.label.removeprefix(f"{run.model}-{run.method}").strip("-").split("-")
    method = (
        [] if rest[0] in ("knn", "prototype") else [METHODS.get(run.method, run.method)]
    )  # no linear probes
    return " ".join([run.model, *method, *filter(None, rest)])


def without_method(run):
    """What is left of name_of() in a panel that says the method."""
    return name_of(run).replace(f" {METHODS.get(run.method, run.method)}", "", 1)


def in_order(found):
    """Runs of a section by model name: end-to-end, probes, LoRA, as in the paper; then by name."""
    order = list(METHODS)
    named = defaultdict(list)
    for run in sorted(
        found,
        key=lambda run: (
            order.index(run.method) if run.method in order else len(order),
            run.label,
            run.fold,
        ),
    ):
        named[name_of(run)].append(run)
    return named


# ---------------------------------------------------------------- the paper's tables


def interval_name(cases):
    """The heading of a column of intervals; with few cases it says what such intervals held in
    simulations.
    """
    few = bootstrap.measured(min(cases, default=bootstrap.FEW_CASES))
    return "95% interval" + (f" (measured: {few:.0%})" if few else "")


def full_table(name, title, named, trust, paper):
    """Tables 3 and 4: one row per model at the largest fraction."""
    folds = {run.fold for own in named.values() for run in own}
    rows, means = [], {key: [] for key in METRICS}
    for label, own in named.items():
        row = [label, f"{len(own)}" + (f" of {len(folds)}" if len(own) < len(folds) else "")]
        for key in METRICS:
            values = [run.sets["test"][key] for run in own]
            row.append(mean_sd(values))
            means[key].append(mean(values))
        found = trust.get(label)
        row.append(
            "–"
            if found is None or found["interval"] is None
            else "{:.3f} – {:.3f}".format(*found["interval"])
        )
        row += [paper.get((own[0].data, own[0].label, "all", key), "–") for key in METRICS if paper]
        rows.append(row)
    for column, key in enumerate(METRICS, start=2):
        embolden(rows, column, means[key])
    cases = sorted({found["cases"] for found in trust.values()})
    header = ["model", "repeats", *METRICS.values(), "AUROC, " + interval_name(cases)]
    header += [f"paper: {text}" for text in METRICS.values() if paper]
    notes = [
        "Mean ± standard deviation over the repeats, threshold 0.5, best in bold. The interval is "
        "of the mean "
        f"over the repeats, by drawing the test set's {', '.join(map(str, cases)) or 'few'} cases "
        "anew; it holds "
        "the chance of the test set, not that of training."
    ]
    notes += [note for note in {bootstrap.coverage_note(n) for n in cases} if note]
    notes += missing(
        {label: {run.fold for run in own} for label, own in named.items()}, folds, "repeats"
    )
    if paper and "midog2022" in {run.data for own in named.values() for run in own}:
        notes.append(
            "The paper's rows of linear probes and of ResNet50 are the same for CCMCT and MIDOG "
            "2022: "
            "doubtful as a target here."
        )
    if paper:
        notes.append("The paper's published code splits by annotation; here cases are kept apart.")
    return Table(name, title, header, rows, notes)


def decisions_table(name, title, named):
    """Beyond the paper: the mitotic class at 0.5 and at the threshold that validation chose;
    probabilities.
    """
    rows = []
    keys = ("sensitivity", "specificity", "precision", "f1")
    for label, own in named.items():
        row = [
            label,
            *(
                mean_sd([run.sets["test"][key] for run in own])
                for key in ("average_precision", "brier", "ece")
            ),
        ]
        for part in ("at_0.5", "at_threshold"):
            row += [mean_sd([run.sets["test"][part][key] for run in own], 2) for key in keys]
        rows.append(row + [mean_sd([run.threshold for run in own], 2)])
    for column, key, lowest in (
        (1, "average_precision", False),
        (2, "brier", True),
        (3, "ece", True),
    ):
        embolden(
            rows,
            column,
            [mean([run.sets["test"][key] for run in own]) for own in named.values()],
            lowest,
        )
    decided = [f"{key} at {t}" for t in ("0.5", "t") for key in (*keys[:3], "F1")]
    return Table(
        name,
        title,
        ["model", "av. precision", "Brier", "ECE", *decided, "t"],
        rows,
        [
            "Sensitivity, precision and F1 of the mitotic class; t: the threshold of the best F1 "
            "on validation."
        ],
    )


def scaling_table(name, title, found):
    """AUROC by the share of the training pool (Figures 2 and 3 as numbers)."""
    fractions = sorted({run.frac for run in found})
    folds = {run.fold for run in found}
    rows, values, lacking = [], [], []
    for label, own in in_order(found).items():
        cells = [[run for run in own if run.frac == frac] for frac in fractions]
        values.append([mean([run.sets["test"]["auroc"] for run in cell]) for cell in cells])
        rows.append(
            [
                label,
                *(
                    mean_sd([run.sets["test"]["auroc"] for run in cell])
                    + (f" ({len(cell)})" if 0 < len(cell) < len(folds) else "")
                    for cell in cells
                ),
            ]
        )
        lacking += [
            f"{label} at {100 * frac:g}%: "
            + ("none" if not cell else f"{len(cell)} of {len(folds)} repeats")
            for frac, cell in zip(fractions, cells)
            if len(cell) < len(folds)
        ]
    for i in range(len(fractions)):
        embolden(rows, i + 1, [row[i] for row in values])
    sizes = []
    for frac in fractions:
        train = [len(run.split["ids"]["train"]) for run in found if run.frac == frac]
        val = [len(run.split["ids"]["val"]) for run in found if run.frac == frac]
        sizes.append(
            f"{100 * frac:g}%: {_span(train)} training and {_span(val)} validation annotations"
        )
    return Table(
        name,
        title,
        ["model", *(f"{100 * frac:g}%" for frac in fractions)],
        rows,
        [
            f"AUROC, mean ± standard deviation over {len(folds)} repeats (in brackets: how many, "
            "where fewer).",
            "Validation is not reduced with the training set: " + "; ".join(sizes) + ".",
        ]
        + (["Missing: " + "; ".join(lacking) + "."] if lacking else []),
    )


def _span(values):
    return f"{min(values):,}" if min(values) == max(values) else f"{min(values):,}–{max(values):,}"


def cross_table(name, title, found, paper):
    """Table 5: in the domain of training and out of it, over all train domain × test domain ×
    repeat values.
    """
    domains, folds = sorted({run.domain for run in found}), {run.fold for run in found}
    wanted = {f"{domain}/{fold}" for domain in domains for fold in folds}
    named = in_order(found)
    rows, keys = [], ("auroc", "balanced_accuracy", "weighted_f1")
    means = {(key, side): [] for key in keys for side in ("in", "out")}
    for label, own in named.items():
        row = [label, str(len(own))]
        for key in keys:
            for side in ("in", "out"):
                values = sides(own, key)[side]
                row.append(mean_sd(values))
                means[key, side].append(mean(values))
                if paper:
                    row.append(paper.get(("5", own[0].label, side, key), "–"))
        rows.append(row)
    header, column = ["model", "runs"], 2
    for key in keys:
        for side in ("in", "out"):
            header.append(f"{METRICS[key]} {side}")
            embolden(rows, column, means[key, side])
            header += ["paper"] * bool(paper)
            column += 1 + bool(paper)
    notes = [
        f"Trained on one domain ({', '.join(domains)}), {len(folds)} repeats each; in: withheld "
        "cases of that "
        "domain, out: every other domain whole. Mean ± standard deviation over all of these "
        "values, best in bold."
    ]
    notes += missing(
        {label: {f"{run.domain}/{run.fold}" for run in own} for label, own in named.items()},
        wanted,
        "domain/repeat",
    )
    return Table(name, title, header, rows, notes)


def sides(own, key):
    found = {"in": [], "out": []}
    for run in own:
        found["in"].append(run.sets["test"][key])
        found["out"] += [run.sets[name][key] for name in run.split["others"] if name in run.sets]
    return found


def external_table(name, title, found, extra):
    """Tested on whole other datasets (train on CCMCT, test on MIDOG)."""
    rows = []
    for label, own in in_order(found).items():
        for frac in sorted({run.frac for run in own}):
            for dataset in extra:
                have = [run for run in own if run.frac == frac and dataset in run.sets]
                if have:
                    rows.append(
                        [
                            label,
                            f"{100 * frac:g}%",
                            dataset,
                            str(len(have)),
                            *(mean_sd([run.sets[dataset][key] for run in have]) for key in METRICS),
                        ]
                    )
    return Table(
        name,
        title,
        ["model", "share", "tested on", "repeats", *METRICS.values()],
        rows,
        ["Whole datasets that nothing was trained on; mean ± standard deviation over the repeats."],
    )


def leak_rows(found):
    """(label, AUROC by case, by annotation, repeats of both) of models that have both, at equal
    fractions and seeds.
    """
    pairs = defaultdict(lambda: defaultdict(list))
    for run in found:
        if run.domain is None and run.by in ("case", "annotation"):
            key = (name_of(run), run.frac, run.flags.get("seed") or 0)
            pairs[key][run.by].append(run.sets["test"]["auroc"])
    rows = []
    for (label, frac, seed), both in sorted(pairs.items()):
        if len(both) == 2:
            said = f"{label}, {100 * frac:g}%" + (f", seed {seed}" if seed else "")
            rows.append((said, mean(both["case"]), mean(both["annotation"]), both))
    return rows


# ---------------------------------------------------------------- trust


def trusted(named, replicates):
    """{label: {"interval", "cases", "replicates", "folds"}} of the mean AUROC over the repeats of
    each model.
    """
    found = {}
    for label, own in named.items():
        repeats = [run.rows("test") for run in own]
        if any(not np.array_equal(rows[0], repeats[0][0]) for rows in repeats):
            # collect() keeps one test set per section; a table by domain may still come here
            continue
        parts, cases = bootstrap.replicate(
            [(label_, p, case) for _, label_, p, case, _ in repeats], replicates
        )
        if not np.isfinite(parts["auroc"][0]):
            continue  # a test set without one of the classes
        found[label] = {
            "interval": bootstrap.interval(*parts["auroc"][1:], cases),
            "cases": cases,
            "parts": parts,
            "ids": repeats[0][0],
            "folds": {run.fold for run in own},
        }
    return found


def paired_tests(trust):
    """Rows (dicts) of all pairs of models on the same test set; p corrected for all of them (Holm)."""
    rows = []
    labels = list(trust)
    for metric in METRICS:
        own = []
        for i, first in enumerate(labels):
            for second in labels[i + 1 :]:
                a, b = trust[first], trust[second]
                if not np.array_equal(a["ids"], b["ids"]):
                    continue
                difference, between, p = bootstrap.paired(
                    a["parts"][metric], b["parts"][metric], a["cases"]
                )
                own.append(
                    {
                        "metric": metric,
                        "first": first,
                        "second": second,
                        "difference": difference,
                        "low": between and between[0],
                        "high": between and between[1],
                        "p": p,
                        "cases": a["cases"],
                        "repeats_first": len(a["folds"]),
                        "repeats_second": len(b["folds"]),
                    }
                )
        for row, corrected in zip(own, bootstrap.holm([row["p"] for row in own])):
            row["p_holm"] = corrected
        rows += own
    return rows


def tests_table(name, title, tests, trust):
    """The best model by AUROC against every other."""
    scores = {label: found["parts"]["auroc"][0] for label, found in trust.items()}
    best = max(scores, key=scores.get)
    rows = []
    for row in tests:
        if row["metric"] == "auroc" and best in (row["first"], row["second"]):
            sign = 1 if row["first"] == best else -1
            other = row["second"] if sign == 1 else row["first"]
            bounds = (
                sorted((sign * row["low"], sign * row["high"])) if row["low"] is not None else None
            )
            rows.append(
                [
                    f"{best} − {other}",
                    f"{sign * row['difference']:+.3f}",
                    "–" if bounds is None else f"{bounds[0]:+.3f} – {bounds[1]:+.3f}",
                    _p(row["p"]),
                    _p(row["p_holm"]),
                ]
            )
    pairs = sum(row["metric"] == "auroc" for row in tests)
    cases = next(iter(trust.values()))["cases"]
    notes = [
        "Differences of the mean AUROC over the repeats; cases resampled in pairs. p after Holm "
        "is corrected for "
        f"all {pairs} pairs of models (tests.csv has them all, and the other metrics). Patches of "
        "a case are not "
        "independent: DeLong's test would be wrong here."
    ]
    if cases < bootstrap.FEW_CASES:
        notes.append(bootstrap.coverage_note(cases) + "; read the p values with the same care.")
    return Table(
        name,
        title,
        ["models", "difference", interval_name([cases]), "p", "p after Holm"],
        rows,
        notes,
    )


def _p(value):
    return "–" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


# ---------------------------------------------------------------- gallery


def dataset_of(run, args):
    """(Annotations, flags) of a run's dataset as the run read it, or as the flags say; UserError
    where it is not here.
    """
    kept = {"data": run.data} | run.source
    if run.data in KNOWN and os.path.isabs(str(kept["data"])) and not Path(kept["data"]).exists():
        kept["data"] = run.data  # trained on another machine: here it is found by its name
    if args.data:
        kept["images"] = None  # those of the other place
    kept |= {name: getattr(args, name) for name in data_flags.SOURCE if getattr(args, name, None)}
    if kept["data"] == "demo" and not (root_folder() / "demo").is_dir():
        raise UserError(f"the demo dataset is not in {root_folder()}")  # it would be made otherwise
    annotations, flags = data_flags.from_source(kept)
    if annotations.fingerprint() != run.fingerprint:
        raise UserError(
            f"{annotations.source} holds other annotations than the runs were made with"
        )
    return annotations, flags


def gallery(path, found, args):
    """An image of the most confident errors of the best model, per domain → (text of its caption,
    or None; reason).
    """
    named = in_order(found)
    label = max(named, key=lambda key: mean([run.sets["test"]["auroc"] for run in named[key]]) or 0)
    own = named[label]
    ids, y, _, case, domain = own[0].rows("test")
    p = np.mean([run.rows("test")[2] for run in own], axis=0)
    name = own[0].data
    try:
        annotations, flags = dataset_of(own[0], args)
        rows = annotations.rows(ids)
        patches = Patches(
            annotations,
            fit=own[0].flags.get("fit") or "resize",
            mpp=own[0].flags.get("mpp"),
            source_mpp=flags.source_mpp,
        )
        image = draw_errors(patches, rows, ids, y, p, domain)
    except (UserError, OSError) as error:
        return None, f"no gallery of errors for {name}: {error}"
    with common.atomic(path) as temporary:
        image.save(temporary, format="PNG")
    return (
        f"{name}: the most confident errors of {label} on the test set, mean over {len(own)} "
        "repeats, by domain. "
        "Left: look-alikes called mitotic figures; right: mitotic figures missed. p: probability "
        "of a mitotic "
        f"figure.{legend(name, np.unique(domain))}"
    ), None


def draw_errors(patches, rows, ids, y, p, domain, columns=5):
    """PIL image: one line of tiles per domain, false positives left, false negatives right, with p
    and id below.
    """
    font = ImageFont.load_default(12)
    domains = sorted(set(domain.tolist()))
    short = figures.short_names(domains)
    height, width, gap, top = TILE + 30, TILE + 6, 24, 20
    sheet = Image.new(
        "RGB", (MARGIN + 2 * columns * width + gap, top + height * len(domains)), "white"
    )
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, 3), "false positives", fill="black", font=font)
    draw.text((MARGIN + columns * width + gap, 3), "false negatives", fill="black", font=font)
    for line, name in enumerate(domains):
        own = np.flatnonzero(domain == name)
        wrong = [own[(y[own] == 0) & (p[own] >= 0.5)], own[(y[own] == 1) & (p[own] < 0.5)]]
        wrong = [
            wrong[0][np.argsort(-p[wrong[0]], kind="stable")],
            wrong[1][np.argsort(p[wrong[1]], kind="stable")],
        ]
        draw.text((4, top + line * height + TILE // 2 - 7), short[name], fill="black", font=font)
        for side, chosen in enumerate(wrong):
            left = MARGIN + side * (columns * width + gap)
            if not len(chosen):
                draw.text(
                    (left + 4, top + line * height + TILE // 2 - 7),
                    "none",
                    fill="#666666",
                    font=font,
                )
                continue
            tiles = patches.read(rows[chosen[:columns]])
            for k, (tile, i) in enumerate(zip(tiles, chosen)):
                at = (left + k * width, top + line * height)
                sheet.paste(
                    Image.fromarray(tile).resize((TILE, TILE), Image.Resampling.LANCZOS), at
                )
                draw.text((at[0], at[1] + TILE + 1), f"p {p[i]:.3f}", fill="black", font=font)
                draw.text((at[0], at[1] + TILE + 13), str(ids[i])[-16:], fill="#444444", font=font)
    return sheet


# ---------------------------------------------------------------- the report


def write(found, problems, rows, args):
    """Write the report on the runs into args.out; returns the path of its index.html."""
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    write_csv(out / "results.csv", rows)
    paper, parts, tests = published() if args.paper else {}, [], []
    for data in sorted({run.data for run in found}):
        here = [run for run in found if run.data == data]
        parts.append(("h2", f"Dataset {data}"))
        if data == "demo":
            parts.append(
                (
                    "p",
                    "Synthetic tissue: these numbers show that the programs work, and nothing "
                    "about a "
                    "model on real tissue.",
                )
            )
        for by, seed in sorted(
            {(run.by, run.flags.get("seed") or 0) for run in here}, key=_main_first
        ):
            own = [run for run in here if (run.by, run.flags.get("seed") or 0) == (by, seed)]
            name = common.file_name(
                data + (f"_by_{by}" if by != "case" else "") + (f"_seed{seed}" if seed else "")
            )
            where = f"{data}, split by {by}" + (f", seed {seed}" if seed else "")
            if by == "annotation":
                where += " (leaks: patches of the test slides were trained on)"
            plain, crossed = (
                [run for run in own if not run.domain],
                [run for run in own if run.domain],
            )
            if plain:
                tests += section(parts, out, name, where, plain, paper, args)
            if crossed:
                cross_section(parts, out, name, where, crossed, paper)
        compared = leak_rows(here)
        if compared:
            parts.append(
                Table(
                    f"leak_{common.file_name(data)}",
                    f"What the leak is worth: AUROC on {data} by case and by annotation",
                    ["model", "by case", "by annotation", "difference"],
                    [
                        [label, mean_sd(both["case"]), mean_sd(both["annotation"]), f"{b - a:+.3f}"]
                        for label, a, b, both in compared
                    ],
                    [
                        "By annotation, as the paper's published code draws, patches of one slide "
                        "are in "
                        "training and in test. The test sets differ, so part of the difference is "
                        "chance."
                    ],
                )
            )
            parts.append(
                (
                    "figure",
                    figures.leak(
                        out / f"leak_{common.file_name(data)}", [row[:3] for row in compared]
                    ),
                    f"{data}: AUROC with cases kept apart (filled) and with the leak (hollow).",
                )
            )
    if tests:
        write_csv(out / "tests.csv", tests)
    else:
        (out / "tests.csv").unlink(missing_ok=True)
    for part in parts:
        if isinstance(part, Table):
            common.write_text(out / f"{part.name}.md", markdown(part))
            common.write_text(out / f"{part.name}.tex", latex(part))
    common.write_text(out / "index.html", page(parts, problems, len(found), out))
    return out / "index.html"


def _main_first(key):
    return key[0] != "case", key


def section(parts, out, name, where, found, paper, args):
    """Tables and figures of runs without --domain; returns the rows of their paired tests."""
    largest = max(run.frac for run in found)
    whole = [run for run in found if run.frac == largest]
    named = in_order(whole)
    trust = trusted(named, args.replicates)
    share = (
        "all training data"
        if largest == 1
        else f"{100 * largest:g}% of the training data, the most there is"
    )
    by_case = found[0].by == "case"
    table = TABLES.get(found[0].data) if largest == 1 and by_case else None
    parts.append(
        full_table(
            f"full_{name}",
            f"{where}: {share}" + (f" (the paper's {table})" if table else ""),
            named,
            trust,
            paper if by_case else {},
        )
    )
    if found[0].by == "annotation":  # of use for the comparison with the split by case alone
        return []
    tests = paired_tests(trust)
    if tests:
        parts.append(
            tests_table(
                f"tests_{name}", f"{where}: the best model against each other", tests, trust
            )
        )
    parts.append(
        decisions_table(
            f"decisions_{name}", f"{where}: decisions and probabilities, {share}", named
        )
    )
    parts.append(
        scaling_table(f"scaling_{name}", f"{where}: AUROC by share of the training data", found)
    )
    panels = {}
    for method, title in METHODS.items():
        lines = defaultdict(lambda: defaultdict(list))
        for run in found:
            value = run.sets["test"]["auroc"]
            if run.method == method and value is not None:
                lines[without_method(run)][run.frac].append(value)
        if lines:
            panels[title] = {label: dict(line) for label, line in lines.items()}
    if panels:
        known = (
            f" (the paper's {FIGURES[found[0].data]})"
            if by_case and found[0].data in FIGURES
            else ""
        )
        parts.append(
            (
                "figure",
                figures.scaling(out / f"scaling_{name}", panels),
                f"{where}: AUROC over the share of the training pool{known}; bands: ± one "
                "standard deviation.",
            )
        )
    curves = {
        (METHODS.get(own[0].method, own[0].method), without_method(own[0])): [
            run.rows("test")[1:3] for run in own
        ]
        for own in named.values()
        if all(run.sets["test"]["auroc"] is not None for run in own)
    }
    if curves:
        parts.append(
            (
                "figure",
                figures.roc_pr(out / f"roc_pr_{name}", curves),
                f"{where}: ROC and precision-recall, {share}, mean over the repeats. Grey: chance.",
            )
        )
        parts.append(
            (
                "figure",
                figures.reliability(out / f"reliability_{name}", curves),
                f"{where}: reliability of the probabilities, {share}, repeats pooled. Grey: "
                "calibrated.",
            )
        )
    extra = sorted(
        {
            key
            for run in found
            for key in run.sets
            if key not in ("val", "test", *run.split["others"])
        }
    )
    if extra:
        parts.append(
            external_table(f"external_{name}", f"{where}: tested on other datasets", found, extra)
        )
    if not args.no_gallery and by_case:
        caption, reason = gallery(out / f"errors_{name}.png", whole, args)
        parts.append(("figure", f"errors_{name}.png", caption) if caption else ("p", reason))
    return [{"data": found[0].data, "split": found[0].by, "frac": largest, **row} for row in tests]


def cross_section(parts, out, name, where, found, paper):
    """Table 5 and Figure 4."""
    largest = max(run.frac for run in found)
    found = [run for run in found if run.frac == largest]
    parts.append(
        cross_table(
            f"cross_{name}",
            f"{where}: across domains"
            + (" (the paper's Table 5)" if found[0].data == "midog2022" else ""),
            found,
            paper,
        )
    )
    matrices = {}
    domains = sorted(
        {run.domain for run in found} | {test for run in found for test in run.split["others"]}
    )
    for label, own in in_order(found).items():
        cells = defaultdict(list)
        for run in own:
            for test, values in run.sets.items():
                if test == "test" or test in run.split["others"]:
                    cells[run.domain, run.domain if test == "test" else test].append(
                        values["auroc"]
                    )
        matrices[label] = {
            key: mean(values) for key, values in cells.items() if mean(values) is not None
        }
    known = " (the paper's Figure 4)" if found[0].data == "midog2022" else ""
    parts.append(
        (
            "figure",
            figures.cross_domain(out / f"cross_{name}", matrices, domains),
            f"{where}: AUROC by domain of training and of test{known}, mean over the repeats; – : "
            "missing."
            f"{legend(found[0].data, domains)}",
        )
    )


def legend(data, domains):
    """What the short names of the domains stand for, as a sentence; "" where they say it
    themselves.
    """
    known = KNOWN[data].domains if data in KNOWN else {}
    said = {
        short: name if short != name else known[name][2] if name in known else ""
        for name, short in figures.short_names(domains).items()
    }
    said = [f"{short}: {text}" for short, text in sorted(said.items()) if text]
    return f" {', '.join(said)}." if said else ""


STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; color: #111; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px; }
caption { text-align: left; font-weight: 600; padding: .5rem 0; }
th, td { padding: .2rem .7rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }
th { white-space: normal; vertical-align: bottom; border-bottom: 1.5px solid #111; }
th:first-child, td:first-child { text-align: left; }
.scroll { overflow-x: auto; margin-top: 1.5rem; }
.note { color: #444; font-size: 13px; margin: .3rem 0; }
figure { display: inline-block; margin: 1.5rem 1.5rem 0 0; vertical-align: top; max-width: 100%; }
figure img { max-width: 100%; } figcaption { font-size: 13px; color: #444; max-width: 26rem; }
figure.wide, figure.wide figcaption { display: block; max-width: 100%; }
.problems { background: #f3f3f3; padding: .6rem 1rem; border-left: 4px solid #111; }
"""


def page(parts, problems, count, out):
    """The self-contained HTML page: pictures inside, no script, nothing from elsewhere."""
    body = [f"<h1>Mitotic figure classification: {count} finished runs</h1>"]
    if problems:
        body.append(
            f'<div class="problems" id="problems"><b>{len(problems)} not counted</b><ul>'
            + "".join(
                f"<li><code>{html.escape(os.fspath(path))}</code>: {html.escape(what)}</li>"
                for path, what in problems
            )
            + "</ul></div>"
        )
    for part in parts:
        if isinstance(part, Table):
            body.append(as_html(part))
        elif part[0] == "figure":
            _, name, caption = part
            vector = (out / name).with_suffix(".svg")
            source, kind = (vector, "svg+xml") if vector.exists() else (out / name, "png")
            picture = base64.b64encode(source.read_bytes()).decode()
            wide = ' class="wide"' if kind == "png" else ""
            body.append(
                f'<figure{wide}><img alt="{html.escape(caption)}" '
                f'src="data:image/{kind};base64,{picture}">'
                f"<figcaption>{html.escape(caption)}</figcaption></figure>"
            )
        else:
            body.append(f"<{part[0]}>{html.escape(part[1])}</{part[0]}>")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="data:,"><title>Mitotic figure '
        f"classification</title><style>{STYLE}</style></head>"
        "\n<body>\n" + "\n".join(body) + "\n</body></html>\n"
    )
