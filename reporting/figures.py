"""Figures of the report, as PNG and SVG: one column of a journal wide, told apart by marker and
dash, not by colour.
"""

import textwrap
from pathlib import Path

import matplotlib
import numpy as np

from reporting import metrics

matplotlib.use("Agg")
import matplotlib.pyplot as plt

import common

WIDTH = 3.4  # inches
plt.rcParams.update(
    {
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
    }
)
# From dark to light in turn, so that neighbours differ in grey; the marker and the dash say it once
# more.
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


def style(i):
    return {
        "color": COLOURS[i % 10],
        "marker": MARKERS[i % 10],
        "dashes": DASHES[i % 5],
        "markerfacecolor": "white" if i % 2 else COLOURS[i % 10],
    }


def save(figure, path):
    """Write path.png and path.svg whole; nothing in them depends on the time, so equal runs give
    equal files.
    """
    for suffix, extra in ((".png", {"dpi": 300}), (".svg", {"metadata": {"Date": None}})):
        with common.atomic(Path(f"{path}{suffix}")) as temporary:
            figure.savefig(temporary, format=suffix[1:], **extra)
    plt.close(figure)
    return Path(f"{path}.png").name


def _legend(figure, handles, labels, columns=2):
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, columnspacing=1.2)


def short_names(names, length=8):
    """{name: what stands for it on an axis}: itself where it is short, else its initials, numbered
    where two agree.
    """
    found = {}
    for name in sorted(map(str, names), key=lambda name: (len(name) > length, name)):
        words = name.replace("_", " ").split()
        short = (
            name
            if len(name) <= length
            else "".join(word[0] for word in words).upper()
            if len(words) > 1
            else name[:length]
        )
        taken, number = set(found.values()), 1
        found[name] = short
        while found[name] in taken:
            number += 1
            found[name] = f"{short[: length - 1]}{number}"
    return found


# ---------------------------------------------------------------- the paper's figures


def scaling(path, panels):
    """AUROC over the fraction. panels: {method: {model: {frac: [AUROC of each repeat]}}}; bands: ±
    one deviation.
    """
    models = sorted({model for lines in panels.values() for model in lines})
    figure, axes = plt.subplots(
        len(panels),
        1,
        figsize=(WIDTH, 0.5 + 1.55 * len(panels) + 0.13 * len(models)),
        sharex=True,
        sharey=True,
        squeeze=False,
    )
    handles = {}
    fractions = sorted(
        {frac for lines in panels.values() for line in lines.values() for frac in line}
    )
    for ax, (method, lines) in zip(axes[:, 0], panels.items()):
        for model in sorted(lines):
            x = sorted(lines[model])
            mean = np.array([np.mean(lines[model][frac]) for frac in x])
            deviation = np.array(
                [np.std(lines[model][frac], ddof=min(1, len(lines[model][frac]) - 1)) for frac in x]
            )
            look = style(models.index(model))
            (handles[model],) = ax.plot(x, mean, **look)
            ax.fill_between(
                x, mean - deviation, mean + deviation, color=look["color"], alpha=0.13, linewidth=0
            )
        ax.set_xscale("log")
        ax.set_title(method, loc="left")
        ax.set_ylabel("AUROC")
    ax.set_xticks(fractions, [f"{100 * frac:g}%" for frac in fractions])
    ax.minorticks_off()
    if len(fractions) == 1:
        ax.set_xlim(fractions[0] / 3, fractions[0] * 3)
    ax.set_xlabel("share of the training pool")
    _legend(figure, [handles[model] for model in models], models)
    return save(figure, path)


def cross_domain(path, matrices, domains):
    """Matrices of AUROC, one per model. matrices: {label: {(train, test): mean}}; domains: in the
    order drawn.
    """
    columns = min(3 if len(matrices) > 4 and len(domains) < 7 else 2, len(matrices))
    rows = -(-len(matrices) // columns)
    values = [v for matrix in matrices.values() for v in matrix.values()]
    low, high, short = min(values), max(values), short_names(domains)
    trained = [
        domain
        for domain in domains
        if any(domain == own for matrix in matrices.values() for own, _ in matrix)
    ]
    high_as = 0.3 + {1: 2.6, 2: 1.45, 3: 0.95}[columns] * len(trained) / len(domains)
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(WIDTH, 0.55 + rows * high_as),
        squeeze=False,
        sharex=True,
        sharey=True,
    )
    for i, ax in enumerate(axes.ravel()):
        if i >= len(matrices):
            ax.axis("off")
        elif i + columns >= len(matrices):
            ax.tick_params(labelbottom=True)
            ax.set_xlabel("tested on")
            ax.xaxis.set_in_layout(
                i // columns == rows - 1
            )  # else they hang into the empty place below
    for ax, (label, matrix) in zip(axes.ravel(), matrices.items()):
        grid = np.array([[matrix.get((a, b), np.nan) for b in domains] for a in trained])
        # Only the lighter part of the map, so that black numbers are read everywhere.
        ax.imshow(
            grid,
            cmap="Greys",
            vmin=low - 0.05 * (high - low + 0.01),
            vmax=high + 1.3 * (high - low + 0.01),
            aspect="auto",
        )
        for i, j in np.ndindex(grid.shape):
            text = (
                "–"
                if np.isnan(grid[i, j])
                else f"{grid[i, j]:.2f}".removeprefix("0").replace("1.00", "1.0")
            )
            ax.text(
                j,
                i,
                text,
                ha="center",
                va="center",
                fontsize=6.5 if columns < 3 else 5.5,
                fontweight="bold" if trained[i] == domains[j] else None,
            )
        ax.set_xticks(
            range(len(domains)),
            [short[domain] for domain in domains],
            rotation=90 if max(map(len, short.values())) > 2 and columns > 1 else 0,
        )
        ax.set_yticks(range(len(trained)), [short[domain] for domain in trained])
        if columns == 3:
            label = textwrap.fill(
                label.replace("linear probe", "probe"), 20, break_on_hyphens=False
            )
        ax.set_title(label, fontsize=7 if columns < 3 else 6)
        ax.grid(False)
        ax.tick_params(length=0)
    for ax in axes[:, 0]:
        ax.set_ylabel("trained on")
    figure.suptitle("AUROC", fontsize=8)
    return save(figure, path)


# ---------------------------------------------------------------- beyond the paper's


def panels_of(curves):
    """{(method, model): …} as {title: {label: …}}: one panel for a few lines, one per method for
    many; and labels.
    """
    if len(curves) <= 4:
        panels = {"": {f"{model} {method}": repeats for (method, model), repeats in curves.items()}}
    else:
        panels = {
            method: {model: repeats for (m, model), repeats in curves.items() if m == method}
            for method in dict.fromkeys(method for method, _ in curves)
        }
    return panels, sorted({label for lines in panels.values() for label in lines})


def roc_pr(path, curves):
    """ROC and precision-recall, averaged over the repeats. curves: {(method, model): [(labels,
    probabilities)]}.
    """
    panels, labels = panels_of(curves)
    figure, axes = plt.subplots(
        len(panels),
        2,
        figsize=(WIDTH, 0.5 + 1.75 * len(panels) + 0.07 * len(labels)),
        squeeze=False,
        sharex="col",
        sharey="col",
    )
    grid, handles = np.linspace(0, 1, 201), {}
    for row, (title, lines) in zip(axes, panels.items()):
        share = []
        for label, repeats in lines.items():
            rates, precisions = [], []
            for y, p in repeats:
                _, tp, fp = metrics.counts_by_score(y, p)
                rates.append(np.interp(grid, np.r_[0, fp / fp[-1]], np.r_[0, tp / tp[-1]]))
                recall, precision = tp / tp[-1], tp / (tp + fp)
                # The precision at a recall: the best of those that reach it.
                precisions.append(
                    np.maximum.accumulate(precision[::-1])[::-1][
                        np.searchsorted(recall, grid - 1e-12).clip(max=len(recall) - 1)
                    ]
                )
                share.append(np.mean(y))
            look = style(labels.index(label)) | {
                "markevery": (6 * labels.index(label), 50),
                "markersize": 3,
            }
            (handles[label],) = row[0].plot(np.r_[0, grid], np.r_[0, np.mean(rates, 0)], **look)
            row[1].plot(grid, np.mean(precisions, 0), **look)
        row[0].plot((0, 1), (0, 1), color="#777777", linewidth=0.7)
        row[1].axhline(np.mean(share), color="#777777", linewidth=0.7)
        row[0].set(ylabel="sensitivity")
        row[0].set_title(title, loc="left")
        row[1].set(ylabel="precision", ylim=(0, 1.02))
    axes[-1][0].set_xlabel("1 − specificity")
    axes[-1][1].set_xlabel("sensitivity (recall)")
    _legend(figure, [handles[label] for label in labels], labels)
    return save(figure, path)


def reliability(path, curves):
    """Share of mitotic figures over the probability, repeats pooled; bins of fewer than 5 patches
    are left out.
    """
    panels, labels = panels_of(curves)
    high_as = 2.6 if len(panels) == 1 else 1.6
    figure, axes = plt.subplots(
        len(panels),
        1,
        figsize=(WIDTH, 0.5 + high_as * len(panels) + 0.07 * len(labels)),
        squeeze=False,
        sharex=True,
    )
    handles = {}
    for ax, (title, lines) in zip(axes[:, 0], panels.items()):
        ax.plot((0, 1), (0, 1), color="#777777", linewidth=0.7)
        for label, repeats in lines.items():
            y, p = (np.concatenate(part) for part in zip(*repeats))
            count, mean, share = metrics.reliability(y, p, 10)
            (handles[label],) = ax.plot(
                mean[count >= 5], share[count >= 5], **style(labels.index(label))
            )
        ax.set(
            xlim=(0, 1),
            ylim=(-0.02, 1.02),
            ylabel="share of mitotic figures" if len(panels) == 1 else "share mitotic",
        )
        ax.set_title(title, loc="left")
    ax.set_xlabel("predicted probability of a mitotic figure")
    _legend(figure, [handles[label] for label in labels], labels)
    return save(figure, path)


def leak(path, rows):
    """What splitting by annotation adds to AUROC. rows: list of (label, by case, by annotation)."""
    figure, ax = plt.subplots(figsize=(WIDTH, 0.95 + 0.22 * len(rows)))
    for i, (label, honest, leaking) in enumerate(rows):
        ax.plot((honest, leaking), (i, i), color="#888888", linewidth=1, zorder=1)
        ax.plot(honest, i, "o", color="black", label="split by case" if not i else None)
        ax.plot(
            leaking,
            i,
            "o",
            color="black",
            markerfacecolor="white",
            label="by annotation" if not i else None,
        )
    ax.set_yticks(range(len(rows)), [row[0] for row in rows])
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.set_xlabel("AUROC")
    _legend(figure, *ax.get_legend_handles_labels())
    return save(figure, path)


def detection(out, rows, threshold):
    """Precision and recall of detection over all thresholds, by domain, with the chosen threshold
    marked.
    """
    figure, ax = plt.subplots(figsize=(WIDTH, 3.0 + 0.13 * len(rows)))
    short = short_names([domain for domain, *_ in rows])
    for i, (domain, _, curve) in enumerate(rows):
        tp, fp, figures = curve["tp"], curve["fp"], max(curve["figures"], 1)
        look = style(i) | {"markevery": (len(tp) // 16, max(1, len(tp) // 8)), "markersize": 3}
        ax.plot(tp / figures, tp / np.maximum(tp + fp, 1), label=short[domain], **look)
        for k, marker in (
            (len(tp) - 1, "o"),
            (int((curve["thresholds"] >= threshold).sum()) - 1, "*"),
        ):
            if k >= 0:
                ax.plot(
                    tp[k] / figures,
                    tp[k] / max(tp[k] + fp[k], 1),
                    marker,
                    markersize=8,
                    markeredgewidth=0.8,
                    markeredgecolor="black" if marker == "*" else look["color"],
                    markerfacecolor="none" if marker == "o" else look["color"],
                )
    ax.set(
        xlabel="recall of detection",
        ylabel="precision of detection",
        xlim=(0, 1.02),
        ylim=(0, 1.02),
        title=f"ring: detector alone; star: p ≥ {threshold:.3g}",
    )
    _legend(figure, *ax.get_legend_handles_labels(), columns=3)
    return save(figure, Path(out) / "detection")


def curves(path):
    """curves.png of the run's log.csv: losses and AUROC over pseudo-epochs."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    log = np.atleast_1d(np.genfromtxt(path / "log.csv", delimiter=",", names=True))
    figure, (left, right) = plt.subplots(1, 2, figsize=(7, 2.8), layout="constrained")
    left.plot(log["epoch"], log["train_loss"], "-", color="0.6", label="training")
    left.plot(log["epoch"], log["val_loss"], "-k", label="validation")
    best = int(np.argmin(log["val_loss"]))
    left.plot(log["epoch"][best], log["val_loss"][best], "ok", label="kept")
    left.set(xlabel="pseudo-epoch", ylabel="binary cross-entropy")
    left.legend(frameon=False)
    right.plot(log["epoch"], log["val_auroc"], "-k")
    right.set(xlabel="pseudo-epoch", ylabel="validation AUROC")
    with common.atomic(path / "curves.png") as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    plt.close(figure)
