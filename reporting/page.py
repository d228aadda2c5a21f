"""The report: its sections, and one self-contained HTML page of tables and figures."""

import base64
import html
import os
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

import common
from common import UserError
from reporting import figures, folder, groups, results, tables
from reporting.gallery import gallery

PAPER_TABLES = {"ccmct": "Table 3", "midog2022": "Table 4"}
PAPER_FIGURES = {"ccmct": "Figure 2", "midog2022": "Figure 3"}


@dataclass
class Text:
    tag: str  # h2 | p
    text: str


@dataclass
class Picture:
    name: str  # of its files without ending
    caption: str
    files: dict  # "png", "svg" or "jpeg" → bytes; the page shows the SVG if there is one

    @property
    def wide(self):
        return "svg" not in self.files


# ---------------------------------------------------------------- the report


def write(finished, problems, args, means=None):
    """Write the report on the runs into args.out; returns the path of its index.html.

    finished, problems: of results.collect(); args: out, paper, replicates, no_gallery, figure and
    the flags that say where the dataset is; means: of ensemble.report(), or None."""
    paper = tables.published() if args.paper else {}
    parts = [embedded(path) for path in args.figure]
    tests = []
    for data in sorted({run.data for run in finished}):
        runs = [run for run in finished if run.data == data]
        parts += dataset_parts(data, runs, paper, args, tests)
        if means is not None:
            parts += means_parts(data, *means[data])

    files = {"results.csv": folder.csv_text(results.results(finished))}
    by_group = groups.rows(finished)
    if by_group:
        files["groups.csv"] = folder.csv_text(by_group)
    if tests:
        files["tests.csv"] = folder.csv_text(tests)
    rows = [row for of_data, _ in (means or {}).values() for row in of_data]
    if rows:
        files["ensembles.csv"] = folder.csv_text(rows)
    for part in parts:
        if isinstance(part, tables.Table):
            files[f"{part.name}.md"] = tables.markdown(part)
            files[f"{part.name}.tex"] = tables.latex(part)
        elif isinstance(part, Picture) and part.name:
            for kind, content in part.files.items():
                files[f"{part.name}.{kind}"] = content
    files["index.html"] = page(
        parts, problems, results.notes(finished), len(finished), title(finished)
    )
    folder.write(args.out, "runs", files)
    return Path(args.out) / "index.html"


def title(finished):
    """What the runs tell apart, if it is the same in all."""
    pairs = {run.classes for run in finished}
    if len(pairs) > 1:
        return "Patch classification"
    negative, positive = pairs.pop()
    return f"{positive} against {negative}"


def embedded(path):
    """Picture of a file given with --figure; it is put into the page, not into the folder."""
    try:
        with Image.open(path, formats=("PNG", "JPEG")) as image:
            kind = image.format.lower()
            caption = image.info.get("Description")
            image.verify()
        content = Path(path).read_bytes()
    except FileNotFoundError:
        raise UserError(f"--figure {path}: no such file") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        raise UserError(f"--figure {path}: not a readable PNG or JPEG") from None
    if not isinstance(caption, str):
        caption = Path(path).name
    return Picture("", caption, {kind: content})


def dataset_parts(data, finished, paper, args, tests):
    """Parts of the report on one dataset: a section per way of splitting and seed, then what the
    leak of splitting by annotation is worth. Appends rows of tests.csv to `tests`."""
    negative, positive = finished[0].classes
    parts = [Text("h2", f"Dataset {data}")]
    if data == "demo":
        parts.append(
            Text(
                "p",
                "Synthetic tissue: these numbers show that the programs work, and nothing about a "
                "model on real tissue.",
            )
        )
    parts.append(Text("p", f"Classes: {positive} (1) against {negative} (0)."))

    def main_first(key):
        return key[0] != "case", key

    for by, seed in sorted({(run.by, run.seed) for run in finished}, key=main_first):
        name, where = data, f"{data}, split by {by}"
        if by == results.LEFT_OUT:
            where = f"{data}, one domain left out"
        if by not in ("case", results.LEFT_OUT):
            name += f"_by_{by}"
        if seed:
            name += f"_seed{seed}"
            where += f", seed {seed}"
        if by == "annotation":
            where += " (leaks: patches of the test slides were trained on)"
        name = common.file_name(name)
        runs = [run for run in finished if (run.by, run.seed) == (by, seed)]
        plain = [run for run in runs if not run.domain]
        by_domain = [run for run in runs if run.domain]
        if by == results.LEFT_OUT:
            parts += left_out_section(name, where, runs)
        elif plain:
            parts += section(name, where, plain, paper, args, tests)
        if by_domain:
            parts += cross_section(name, where, by_domain, paper)

    leaks = tables.leak_rows(finished)
    if leaks:
        name = f"leak_{common.file_name(data)}"
        parts.append(tables.leak_table(name, data, leaks))
        parts.append(
            Picture(
                name,
                f"{data}: AUROC with cases kept apart (filled) and with the leak (hollow).",
                figures.images(figures.leak([row[:3] for row in leaks])),
            )
        )
    return parts


def means_parts(data, rows, notes):
    """Parts on the means of probabilities. rows, notes: of ensemble.report()."""
    if not rows:
        return [Text("p", f"No mean of probabilities: {note}") for note in notes]
    title = f"{data}: the mean of several runs' probabilities"
    return [tables.ensemble_table(f"ensembles_{common.file_name(data)}", title, rows, notes)]


def section(name, where, finished, paper, args, tests):
    """Tables and figures of runs without --domain; appends the rows of their paired tests to
    `tests`.
    """
    first = finished[0]
    largest = max(run.frac for run in finished)
    whole = [run for run in finished if run.frac == largest]
    named = tables.in_order(whole)
    trust = tables.trusted(named, args.replicates)
    by_case = first.by == "case"
    share = "all training data"
    if largest < 1:
        share = f"{100 * largest:g}% of the training data, the most there is"
    title = f"{where}: {share}"
    if largest == 1 and by_case and first.data in PAPER_TABLES:
        title += f" (the paper's {PAPER_TABLES[first.data]})"
    parts = [tables.full_table(f"full_{name}", title, named, trust, paper if by_case else {})]
    if first.by == "annotation":  # of use for the comparison with the split by case alone
        return parts

    pairs = tables.paired_tests(trust)
    if pairs:
        title = f"{where}: the best model against each other"
        parts.append(tables.tests_table(f"tests_{name}", title, pairs, trust))
        tests += [{"data": first.data, "split": first.by, "frac": largest, **row} for row in pairs]
    title = f"{where}: decisions and probabilities, {share}"
    parts.append(tables.decisions_table(f"decisions_{name}", title, named, first.classes[1]))
    title = f"{where}: decisions at 0.5 and at the threshold chosen on validation, {share}"
    parts.append(tables.thresholds_table(f"thresholds_{name}", title, named, trust))
    parts += groups.group_tables(name, where, named)
    title = f"{where}: AUROC by share of the training data"
    parts.append(tables.scaling_table(f"scaling_{name}", title, finished))
    datasets = sorted({name for run in finished for name in run.hashes} - {"split", "test"})
    if datasets:
        title = f"{where}: tested on other datasets"
        table = tables.external_table(
            f"external_{name}", title, finished, datasets, args.replicates
        )
        parts.append(table)

    if len({run.frac for run in finished}) > 1:  # one share alone is no curve
        parts.append(scaling_picture(name, where, finished))
    parts += curve_pictures(name, where, share, named)
    parts += training_picture(name, where, share, named)
    if by_case and not args.no_gallery:
        try:
            content, caption = gallery(whole, vars(args))
            parts.append(Picture(f"errors_{name}", caption, {"png": content}))
        except (UserError, OSError) as error:
            parts.append(Text("p", f"no gallery of errors for {first.data}: {error}"))
    return parts


def scaling_picture(name, where, finished):
    """The paper's Figures 2 and 3."""
    panels = {}
    for method, title in tables.METHODS.items():
        lines = defaultdict(lambda: defaultdict(list))
        for run in finished:
            value = run.sets["test"]["auroc"]
            if run.method == method and value is not None:
                lines[tables.without_method(run)][run.frac].append(value)
        if lines:
            panels[title] = {label: dict(line) for label, line in lines.items()}
    if not panels:
        return Text("p", f"{where}: no AUROC at any share of the training data.")
    paper = ""
    if finished[0].by == "case" and finished[0].data in PAPER_FIGURES:
        paper = f" (the paper's {PAPER_FIGURES[finished[0].data]})"
    return Picture(
        f"scaling_{name}",
        f"{where}: AUROC over the share of the training pool{paper}; bands: ± one standard "
        "deviation.",
        figures.images(figures.scaling(panels)),
    )


def curve_pictures(name, where, share, named):
    """ROC, precision-recall and reliability of the models at the largest fraction."""
    curves = {}
    for repeats in named.values():
        run = repeats[0]
        if all(run.sets["test"]["auroc"] is not None for run in repeats):
            method = tables.METHODS.get(run.method, run.method)
            curves[method, tables.without_method(run)] = [run.rows("test")[1:3] for run in repeats]
    if not curves:
        return []
    positive = next(iter(named.values()))[0].classes[1]
    return [
        Picture(
            f"roc_pr_{name}",
            f"{where}: ROC and precision-recall, {share}, mean over the repeats. Grey: chance.",
            figures.images(figures.roc_pr(curves)),
        ),
        Picture(
            f"reliability_{name}",
            f"{where}: reliability of the probabilities, {share}, repeats pooled. Grey: "
            "calibrated.",
            figures.images(figures.reliability(curves, positive)),
        ),
    ]


def training_picture(name, where, share, named):
    """The training curves of the models at the largest fraction: [] for probes, which have none."""
    logs, notes = defaultdict(list), []
    for label, repeats in named.items():
        for run in repeats:
            try:
                log = results.read_log(run.path)
            except UserError as error:
                notes.append(Text("p", f"no training curve: {error}"))
                continue
            if log is not None and len(log["epoch"]) > 1:
                logs[label].append(log)
    if not logs:
        return notes
    caption = (
        f"{where}: training, {share}, each repeat. Left: cross-entropy on validation; right: "
        "validation AUROC. Mark: the epoch that was kept."
    )
    if any("sample_loss" in log for repeats in logs.values() for log in repeats):
        caption += (
            " Lines of runs with --val-patches are of a sample of the validation set; crosses: on "
            "all of it."
        )
    return [
        Picture(f"training_{name}", caption, figures.images(figures.training(logs))),
        *notes,
    ]


def left_out_section(name, where, finished):
    """Runs with --leave-out, at the largest fraction."""
    largest = max(run.frac for run in finished)
    finished = [run for run in finished if run.frac == largest]
    title = f"{where}: trained on all domains but one"
    return [groups.left_out_table(f"left_out_{name}", title, finished)]


def cross_section(name, where, finished, paper):
    """Table 5 and Figure 4: runs with --domain, at the largest fraction."""
    largest = max(run.frac for run in finished)
    finished = [run for run in finished if run.frac == largest]
    data = finished[0].data
    of_paper = data == "midog2022"
    title = f"{where}: across domains"
    if of_paper:
        title += " (the paper's Table 5)"
    parts = [tables.cross_table(f"cross_{name}", title, finished, paper)]

    domains = {run.domain for run in finished}
    for run in finished:
        domains |= run.split["others"].keys()
    matrices = {}
    for label, repeats in tables.in_order(finished).items():
        cells = defaultdict(list)
        for run in repeats:
            cells[run.domain, run.domain].append(run.sets["test"]["auroc"])
            for test in run.split["others"]:
                if test in run.sets:
                    cells[run.domain, test].append(run.sets[test]["auroc"])
        means = {key: tables.mean(values) for key, values in cells.items()}
        matrices[label] = {key: value for key, value in means.items() if value is not None}
    matrices = {label: matrix for label, matrix in matrices.items() if matrix}
    if matrices:
        domains = sorted(domains)
        caption = f"{where}: AUROC by domain of training and of test"
        if of_paper:
            caption += " (the paper's Figure 4)"
        caption += f", mean over the repeats; – : missing.{tables.legend(data, domains)}"
        pictures = figures.images(figures.cross_domain(matrices, domains))
        parts.append(Picture(f"cross_{name}", caption, pictures))
    return parts


# ---------------------------------------------------------------- the page

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem;
  color: #111; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.25; } h2 { margin-top: 2.5rem; }
h3 { font-size: 14px; margin: 1.8rem 0 .4rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px; }
th, td { padding: .2rem .7rem; text-align: right; border-bottom: 1px solid #ddd;
  white-space: nowrap; overflow-wrap: normal; }
th { white-space: normal; vertical-align: bottom; border-bottom: 1.5px solid #111; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff; }
.scroll { overflow-x: auto; }
.note, figcaption { color: #444; font-size: 13px; margin: .3rem 0; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(20rem, 100%), 1fr));
  gap: 1.5rem; margin-top: 1.5rem; align-items: start; }
figure { margin: 0; min-width: 0; } figure.wide { grid-column: 1 / -1; }
figure img { display: block; width: 100%; max-width: 34rem; height: auto; }
figure.wide img { width: auto; max-width: 100%; } figure.given img { max-width: min(100%, 44rem); }
.problems { background: #f3f3f3; padding: .6rem 1rem; border-left: 4px solid #111;
  margin-top: 1rem; }
.problems ul { padding-left: 1.2rem; margin: .3rem 0; }
@media print {
  @page { margin: 12mm; }
  body { font-size: 10pt; max-width: none; margin: 0; padding: 0; }
  table { font-size: 6.5pt; } th, td { padding: .1rem .25rem; white-space: normal; }
  th:first-child, td:first-child { position: static; white-space: nowrap; }
  .note, figcaption { font-size: 8pt; }
  .scroll { overflow: visible; }
  .figures { display: block; columns: 2; } .figures figure.wide { column-span: all; }
  figure, tr, .problems { break-inside: avoid; } h2, h3 { break-after: avoid; }
  figure { margin-bottom: 1rem; } figure.given img { max-height: 15cm; }
}
"""


def _escaped(text):
    return html.escape(common.printable(text))


def page(parts, problems, notes, count, title):
    """The self-contained HTML page: pictures inside, no script, nothing from elsewhere.

    parts: Table, Picture and Text in their order; problems: (path, what) of runs that do not count;
    notes: sentences; count: number of runs; title: what they tell apart."""
    runs = common.counted(count, "finished run")
    body = [f"<h1>{_escaped(title)}: {runs}</h1>"]
    if problems:
        items = [
            f"<li><code>{_escaped(os.fspath(path))}</code>: {_escaped(what)}</li>"
            for path, what in problems
        ]
        body.append(
            f'<div class="problems" id="problems"><b>{len(problems)} not counted</b>'
            f"<ul>{''.join(items)}</ul></div>"
        )
    if notes:
        items = [f"<li>{_escaped(note)}</li>" for note in notes]
        body.append(
            '<div class="problems" id="notes"><b>Sets of one class</b>'
            f"<ul>{''.join(items)}</ul></div>"
        )
    pictures = []
    for part in [*parts, None]:
        if isinstance(part, Picture):  # neighbouring figures share a grid
            pictures.append(_figure(part))
            continue
        if pictures:
            body.append('<div class="figures">\n' + "\n".join(pictures) + "\n</div>")
            pictures = []
        if isinstance(part, tables.Table):
            body.append(tables.as_html(part))
        elif part is not None:
            body.append(f"<{part.tag}>{_escaped(part.text)}</{part.tag}>")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{_escaped(title)}</title>'
        f"<style>{STYLE}</style></head>\n<body>\n" + "\n".join(body) + "\n</body></html>\n"
    )


def _figure(picture):
    """A Picture as HTML with its content inside."""
    kind = next(kind for kind in ("svg", "png", "jpeg") if kind in picture.files)
    subtype = kind.replace("svg", "svg+xml")
    content = base64.b64encode(picture.files[kind]).decode()
    caption = _escaped(picture.caption)
    shape = "narrow"
    if picture.wide:
        shape = "wide"
    if not picture.name:
        shape = "wide given"
    return (
        f'<figure class="{shape}"><img alt="{caption}" src="data:image/{subtype};base64,{content}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )
