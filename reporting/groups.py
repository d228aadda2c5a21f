"""Results by domain, scanner and species, and of training on all domains but one."""

from collections import defaultdict

import numpy as np

import common
from reporting import metrics, tables

# Columns of predictions.csv that group patches; what patches without a name are called.
KINDS = ("domain", "scanner", "species")
UNKNOWN = "unknown"
METRICS = {"balanced_accuracy": "balanced accuracy", "auroc": "AUROC"}


def of_run(run, name, kind):
    """{group: its metrics} of a set of a run, as metrics.summarise gives them; {} if the data name
    fewer than two groups of this kind.
    """
    values = run.columns.get(kind)
    rows = np.flatnonzero(run.columns["set"] == name)
    if values is None or len(set(values[rows]) - {""}) < 2:
        return {}
    groups = {}
    for group in np.unique(values[rows]).tolist():
        inside = rows[values[rows] == group]
        label, p, case = (run.columns[key][inside] for key in ("label", "probability", "case"))
        groups[group or UNKNOWN] = metrics.summarise(label, p, case, run.threshold)
    return groups


def rows(finished):
    """Rows (dicts) of groups.csv: one per run, test set and group."""
    lines = []
    for run in finished:
        for name in run.tests():
            for kind in KINDS:
                for group, values in of_run(run, name, kind).items():
                    line = {
                        "run": str(run.path),
                        "data": run.data,
                        "label": run.label,
                        "split": run.by,
                        "frac": run.frac,
                        "fold": run.fold,
                        "train_domain": run.domain or "",
                        "set": name,
                        "kind": kind,
                        "group": group,
                    }
                    for key in ("n", "positives", "cases", *METRICS, "weighted_f1"):
                        line[key] = values[key]
                    at_threshold = values["at_threshold"]
                    line["balanced_accuracy_at_threshold"] = at_threshold["balanced_accuracy"]
                    lines.append(line)
    return lines


def group_tables(name, where, named):
    """A Table for every test set and kind of groups that the data name. named: tables.in_order() of
    the runs at one fraction.
    """
    sets = dict.fromkeys(name for repeats in named.values() for run in repeats for name in run.sets)
    found = []
    for test in sets:
        if test == "val":
            continue
        for kind in KINDS:
            cells = defaultdict(dict)  # group → model → metrics of its repeats
            for label, repeats in named.items():
                for run in repeats:
                    if test in run.sets:
                        for group, values in of_run(run, test, kind).items():
                            cells[group].setdefault(label, []).append(values)
            if cells:
                title, file = f"{where}: by {kind}", f"{kind}_{name}"
                if test != "test":
                    title, file = f"{title}, tested on {test}", f"{file}_{test}"
                found.append(_group_table(common.file_name(file), title, kind, cells))
    return found


def _span(values):
    """ "12" or "12–15" of whole numbers."""
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,}–{high:,}"


def _group_table(file, title, kind, cells):
    lines = []
    for group in sorted(cells, key=lambda group: (group == UNKNOWN, group)):
        own = []
        for label, values in cells[group].items():
            counts = f"{_span([v['positives'] for v in values])} of "
            counts += _span([v["n"] for v in values])
            at_threshold = [v["at_threshold"]["balanced_accuracy"] for v in values]
            own.append(
                [
                    group,
                    label,
                    counts,
                    _span([v["cases"] for v in values]),
                    tables.mean_sd([v["balanced_accuracy"] for v in values]),
                    tables.mean_sd(at_threshold),
                    tables.mean_sd([v["auroc"] for v in values]),
                ]
            )
        best = [tables.mean([v["auroc"] for v in values]) for values in cells[group].values()]
        tables.embolden(own, 6, best)
        lines += own
    header = [kind, "model", "positive", "cases", "balanced accuracy at 0.5", "at t", "AUROC"]
    note = (
        "Mean ± standard deviation over the repeats; – : one class only. t: the threshold of the "
        "run, chosen on its whole validation set."
    )
    return tables.Table(file, title, header, lines, [note])


def left_out_table(name, title, finished):
    """Training on all domains but one: each model by the domain that it was tested on, and over
    all of them.
    """
    lines = []
    for label, repeats in tables.in_order(finished).items():
        domains = sorted({run.left_out for run in repeats})
        for domain in domains:
            lines.append(_left_out_row(label, domain, repeats, [domain]))
        if len(domains) > 1:
            lines.append(_left_out_row(label, f"mean of {len(domains)}", repeats, domains))
    header = ["model", "tested on", "repeats", *tables.METRICS.values(), tables.AT_T]
    note = (
        "Trained on all other domains, tested on the whole of the one left out, threshold 0.5. "
        "Mean ± standard deviation over the repeats; in the last row over domains and repeats; "
        f"{tables.chosen({'': finished})}"
    )
    return tables.Table(name, title, header, lines, [note])


def _left_out_row(label, shown, repeats, domains):
    tests = [run.sets["test"] for run in repeats if run.left_out in domains]
    keys = (*tables.METRICS, tables.AT_T)
    cells = [tables.mean_sd([tables.value_of(test, key) for test in tests]) for key in keys]
    return [label, shown, str(len(tests)), *cells]
