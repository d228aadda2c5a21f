"""Figures of the report: one column of a journal wide, lines told apart by marker and dash, not by
colour alone. Each function returns a matplotlib Figure; images() makes PNG and SVG of it."""

import io
import textwrap
import warnings
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

import common
from reporting import metrics, results

WIDTH = 3.4  # inches
WIDE_LABEL = 26  # characters; two such labels of a legend are wider than the figure
# Names come from the data: a "$" in them starts no formula (text.parse_math).
STYLE = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "legend.fontsize": 6.5,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "axes.linewidth": 0.6,
    "lines.linewidth": 1.1,
    "lines.markersize": 3.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.5,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "svg.hashsalt": "report",
    "figure.constrained_layout.use": True,
    "legend.handlelength": 2.8,
    "text.parse_math": False,
}
styled = matplotlib.rc_context(STYLE)  # as a decorator: the process's own settings stay as they are
# Dark and light in turn, so that neighbours differ in grey; marker and dash repeat the difference.
COLOURS = (
    "#000000",
    "#d55e00",
    "#0072b2",
    "#009e73",
    "#8c510a",
    "#cc79a7",
    "#555555",
    "#e69f00",
    "#56b4e9",
    "#999999",
)
MARKERS = "os^DvPX<>*"
DASHES = ((), (4, 1.5), (1, 1), (6, 1, 1, 1), (3, 1, 1, 1, 1, 1))
CHANCE = {"color": "#777777", "linewidth": 0.7}


def look(i):
    """Colour, marker and dash of the i-th line."""
    colour = COLOURS[i % 10]
    return {
        "color": colour,
        "marker": MARKERS[i % 10],
        "dashes": DASHES[i % 5],
        "markerfacecolor": "white" if i % 2 else colour,
    }


@styled
def images(figure):
    """{"png": bytes, "svg": bytes} of a figure; nothing in them depends on the time, so equal runs
    give equal files.
    """
    pictures = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # names in other scripts
        for kind, options in (("png", {"dpi": 300}), ("svg", {"metadata": {"Date": None}})):
            buffer = io.BytesIO()
            figure.savefig(buffer, format=kind, **options)
            pictures[kind] = buffer.getvalue()
    return pictures


def _legend(figure, handles, labels, columns=2):
    labels = list(labels)
    if max(map(len, labels), default=0) > WIDE_LABEL:
        columns = 1
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, columnspacing=1.2)


def short_names(names, length=8):
    """{name: its short form for an axis}: itself if it is short, else its initials, numbered if two
    agree.
    """
    short_forms = {}
    for name in sorted(map(str, names), key=lambda name: (len(name) > length, name)):
        words = name.replace("_", " ").split()
        if len(name) <= length:
            short = name
        elif len(words) > 1:
            short = "".join(word[0] for word in words).upper()[:length]
        else:
            short = name[:length]
        used, number = set(short_forms.values()), 1
        short_forms[name] = common.printable(short)
        while short_forms[name] in used:
            number += 1
            short_forms[name] = f"{short[: length - len(str(number))]}{number}"
    return short_forms


# ---------------------------------------------------------------- the paper's figures


@styled
def scaling(panels):
    """AUROC over the fraction. panels: {method: {model: {frac: [AUROC of each repeat]}}}; bands: ±
    one standard deviation.
    """
    models = sorted({model for lines in panels.values() for model in lines})
    fractions = set()
    for lines in panels.values():
        for line in lines.values():
            fractions |= line.keys()
    fractions = sorted(fractions)

    figure = Figure(figsize=(WIDTH, 0.5 + 1.55 * len(panels) + 0.13 * len(models)))
    axes = figure.subplots(len(panels), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    handles = {}
    for ax, (method, lines) in zip(axes, panels.items()):
        for model in sorted(lines):
            x = sorted(lines[model])
            repeats = [lines[model][frac] for frac in x]
            mean = np.array([np.mean(values) for values in repeats])
            deviation = np.array([np.std(v, ddof=min(1, len(v) - 1)) for v in repeats])
            line = look(models.index(model))
            (handles[model],) = ax.plot(x, mean, **line)
            low, high = mean - deviation, mean + deviation
            ax.fill_between(x, low, high, color=line["color"], alpha=0.13, linewidth=0)
        ax.set_xscale("log")
        ax.set_title(method, loc="left")
        ax.set_ylabel("AUROC")
    axes[-1].set_xticks(fractions, [f"{100 * frac:g}%" for frac in fractions])
    axes[-1].minorticks_off()
    axes[-1].set_xlabel("share of the training pool")
    _legend(figure, [handles[model] for model in models], models)
    return figure


@styled
def cross_domain(matrices, domains):
    """Matrices of AUROC, one per model. matrices: {label: {(train, test): mean}}; domains: in the
    order drawn.
    """
    columns = min(2, len(matrices))
    if len(matrices) > 4 and len(domains) < 7:
        columns = 3
    rows = -(-len(matrices) // columns)
    trained_on = {train for matrix in matrices.values() for train, _ in matrix}
    trained = [domain for domain in domains if domain in trained_on]
    values = [value for matrix in matrices.values() for value in matrix.values()]
    low, spread = min(values), max(values) - min(values) + 0.01
    # Only the lighter part of the map, so that black numbers are readable everywhere.
    shades = {"vmin": low - 0.05 * spread, "vmax": max(values) + 1.3 * spread}
    short = short_names(domains)
    turned = columns > 1 and max(map(len, short.values())) > 2

    panel_height = 0.3 + {1: 2.6, 2: 1.45, 3: 0.95}[columns] * len(trained) / len(domains)
    figure = Figure(figsize=(WIDTH, 0.55 + rows * panel_height))
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for i, ax in enumerate(axes.ravel()):
        if i >= len(matrices):
            ax.axis("off")
        elif i + columns >= len(matrices):  # the lowest of its column
            ax.tick_params(labelbottom=True)
            ax.set_xlabel("tested on")
            # Above an empty panel the labels may hang into it; elsewhere the layout makes room.
            ax.xaxis.set_in_layout(i // columns == rows - 1)
    for ax, (label, matrix) in zip(axes.ravel(), matrices.items()):
        grid = np.array([[matrix.get((a, b), np.nan) for b in domains] for a in trained])
        ax.imshow(grid, cmap="Greys", aspect="auto", **shades)
        for i, j in np.ndindex(grid.shape):
            ax.text(
                j,
                i,
                _two_digits(grid[i, j]),
                ha="center",
                va="center",
                fontsize=6.5 if columns < 3 else 5.5,
                fontweight="bold" if trained[i] == domains[j] else None,
            )
        ax.set_xticks(
            range(len(domains)),
            [short[domain] for domain in domains],
            rotation=90 if turned else 0,
        )
        ax.set_yticks(range(len(trained)), [short[domain] for domain in trained])
        if columns == 3:
            label = label.replace("linear probe", "probe")
            label = textwrap.fill(label, 20, break_on_hyphens=False)
        ax.set_title(label, fontsize=7 if columns < 3 else 6)
        ax.grid(False)
        ax.tick_params(length=0)
    for ax in axes[:, 0]:
        ax.set_ylabel("trained on")
    figure.suptitle("AUROC", fontsize=8)
    return figure


def _two_digits(value):
    """.87 of 0.87, 1.0 of 1, "–" of NaN."""
    if np.isnan(value):
        return "–"
    return f"{value:.2f}".removeprefix("0").replace("1.00", "1.0")


# ---------------------------------------------------------------- beyond the paper's


def panels_of(curves):
    """({title: {label: …}}, sorted labels) of {(method, model): …}: one panel for a few lines, one
    per method for many.
    """
    if len(curves) <= 4:
        lines = {f"{model} {method}": repeats for (method, model), repeats in curves.items()}
        panels = {"": lines}
    else:
        panels = {}
        for (method, model), repeats in curves.items():
            panels.setdefault(method, {})[model] = repeats
    return panels, sorted({label for lines in panels.values() for label in lines})


def _mean_curves(repeats, grid):
    """(sensitivity at each false positive rate, precision at each recall) of `grid`, both averaged
    over the repeats, a list of (labels, probabilities).
    """
    rates, precisions = [], []
    for y, p in repeats:
        _, tp, fp = metrics.counts_by_score(y, p)
        rates.append(np.interp(grid, np.r_[0, fp / fp[-1]], np.r_[0, tp / tp[-1]]))
        recall, precision = tp / tp[-1], tp / (tp + fp)
        # The precision at a recall: the best among the thresholds that reach it.
        best = np.maximum.accumulate(precision[::-1])[::-1]
        reached = np.searchsorted(recall, grid - 1e-12).clip(max=len(recall) - 1)
        precisions.append(best[reached])
    return np.mean(rates, 0), np.mean(precisions, 0)


@styled
def roc_pr(curves):
    """ROC and precision-recall, averaged over the repeats. curves: {(method, model): [(labels,
    probabilities)]}.
    """
    panels, labels = panels_of(curves)
    figure = Figure(figsize=(WIDTH, 0.5 + 1.75 * len(panels) + 0.07 * len(labels)))
    axes = figure.subplots(len(panels), 2, squeeze=False, sharex="col", sharey="col")
    grid, handles = np.linspace(0, 1, 201), {}
    for (roc, pr), (title, lines) in zip(axes, panels.items()):
        shares = []
        for label, repeats in lines.items():
            rates, precisions = _mean_curves(repeats, grid)
            shares += [np.mean(y) for y, _ in repeats]
            position = labels.index(label)
            line = look(position) | {"markevery": (6 * position, 50), "markersize": 3}
            (handles[label],) = roc.plot(np.r_[0, grid], np.r_[0, rates], **line)
            pr.plot(grid, precisions, **line)
        roc.plot((0, 1), (0, 1), **CHANCE)
        pr.axhline(np.mean(shares), **CHANCE)
        roc.set(ylabel="sensitivity")
        roc.set_title(title, loc="left")
        pr.set(ylabel="precision", ylim=(0, 1.02))
    axes[-1][0].set_xlabel("1 − specificity")
    axes[-1][1].set_xlabel("sensitivity (recall)")
    _legend(figure, [handles[label] for label in labels], labels)
    return figure


@styled
def reliability(curves, positive):
    """Observed share of class 1 over its probability, repeats pooled; bins of fewer than 5 patches
    are left out. curves: as in roc_pr(); positive: name of class 1.
    """
    panels, labels = panels_of(curves)
    panel_height = 2.6 if len(panels) == 1 else 1.6
    figure = Figure(figsize=(WIDTH, 0.5 + panel_height * len(panels) + 0.07 * len(labels)))
    axes = figure.subplots(len(panels), 1, squeeze=False, sharex=True)[:, 0]
    handles = {}
    for ax, (title, lines) in zip(axes, panels.items()):
        ax.plot((0, 1), (0, 1), **CHANCE)
        for label, repeats in lines.items():
            y, p = (np.concatenate(part) for part in zip(*repeats))
            count, mean, share = metrics.reliability(y, p, 10)
            enough = count >= 5
            line = look(labels.index(label))
            (handles[label],) = ax.plot(mean[enough], share[enough], **line)
        ax.set(xlim=(0, 1), ylim=(-0.02, 1.02), ylabel="observed share")
        ax.set_title(title, loc="left")
    axes[-1].set_xlabel(f"predicted probability ({positive})")
    _legend(figure, [handles[label] for label in labels], labels)
    return figure


@styled
def leak(rows):
    """What splitting by annotation adds to AUROC. rows: list of (label, by case, by annotation)."""
    figure = Figure(figsize=(WIDTH, 0.95 + 0.22 * len(rows)))
    ax = figure.subplots()
    for i, (_, honest, leaking) in enumerate(rows):
        ax.plot((honest, leaking), (i, i), color="#888888", linewidth=1, zorder=1)
        (filled,) = ax.plot(honest, i, "o", color="black")
        (hollow,) = ax.plot(leaking, i, "o", color="black", markerfacecolor="white")
    ax.set_yticks(range(len(rows)), [row[0] for row in rows])
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.set_xlabel("AUROC")
    _legend(figure, [filled, hollow], ["split by case", "by annotation"])
    return figure


@styled
def detection(rows, threshold):
    """Precision and recall of detection over all thresholds, by domain, with the chosen threshold
    marked. rows: of detection.report().
    """
    figure = Figure(figsize=(WIDTH, 3.0 + 0.13 * len(rows)))
    ax = figure.subplots()
    short = short_names([domain for domain, *_ in rows])
    for i, (domain, _, curve) in enumerate(rows):
        tp, fp, figures = curve["tp"], curve["fp"], max(curve["figures"], 1)
        recall, precision = tp / figures, tp / np.maximum(tp + fp, 1)
        line = look(i) | {"markevery": (len(tp) // 16, max(1, len(tp) // 8)), "markersize": 3}
        ax.plot(recall, precision, label=short[domain], **line)
        every = len(tp) - 1
        chosen = int((curve["thresholds"] >= threshold).sum()) - 1
        if every >= 0:
            ring = {"markeredgecolor": line["color"], "markerfacecolor": "none"}
            ax.plot(recall[every], precision[every], "o", markersize=8, markeredgewidth=0.8, **ring)
        if chosen >= 0:
            star = {"markeredgecolor": "black", "markerfacecolor": line["color"]}
            ax.plot(
                recall[chosen], precision[chosen], "*", markersize=8, markeredgewidth=0.8, **star
            )
    ax.set(
        xlabel="recall of detection",
        ylabel="precision of detection",
        xlim=(0, 1.02),
        ylim=(0, 1.02),
        title=f"ring: detector alone; star: p ≥ {threshold:.3g}",
    )
    _legend(figure, *ax.get_legend_handles_labels(), columns=3)
    return figure


# ---------------------------------------------------------------- training


@styled
def training(logs, width=WIDTH):
    """Losses and validation AUROC over the pseudo-epochs. logs: {label: [results.read_log() of each
    repeat]}; a marker stands at the epoch that was kept, the one of the lowest validation loss.

    Lines of runs with --val-patches are of the sample, crosses of the whole validation set.
    """
    figure = Figure(figsize=(width, 2.15 + 0.07 * len(logs)))
    losses, ranking = figure.subplots(1, 2)
    handles, sampled = {}, False
    for i, (label, repeats) in enumerate(logs.items()):
        line = look(i)
        thin = {"color": line["color"], "linewidth": 0.5, "alpha": 0.6}
        cross = {"color": line["color"], "marker": "x", "linestyle": ""}
        for log in repeats:
            epoch, loss, auroc = log["epoch"], log["val_loss"], log["val_auroc"]
            kept = [int(np.nanargmin(loss))]
            losses.plot(epoch, log["train_loss"], **thin)
            if "sample_loss" in log:
                losses.plot(epoch, loss, **cross)
                ranking.plot(epoch, auroc, **cross)
                loss, auroc = log["sample_loss"], log["sample_auroc"]
                sampled = True
            (handles[label],) = losses.plot(epoch, loss, markevery=kept, **line)
            ranking.plot(epoch, auroc, markevery=kept, **line)
    losses.set(xlabel="pseudo-epoch", ylabel="cross-entropy")
    ranking.set(xlabel="pseudo-epoch", ylabel="validation AUROC")
    for ax in (losses, ranking):
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    handles["thin: training loss"] = Line2D([], [], color="#555555", linewidth=0.5)
    if sampled:
        cross = {"color": "#555555", "marker": "x", "linestyle": ""}
        handles["whole validation set"] = Line2D([], [], **cross)
    _legend(figure, handles.values(), handles.keys())
    return figure


def curves(path):
    """Write curves.png of a run's log.csv: losses and validation AUROC over the pseudo-epochs."""
    log, label = results.read_log(path), "validation (mark: kept epoch)"
    if "sample_loss" in log:
        label = "sample of validation (mark: kept epoch)"
    figure = training({label: [log]}, width=2 * WIDTH)
    with common.atomic(Path(path) / "curves.png") as temporary:
        temporary.write_bytes(images(figure)["png"])
