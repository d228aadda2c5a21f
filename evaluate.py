"""What finished runs are worth: tables, figures, intervals, paired tests, a gallery of errors.

    python evaluate.py runs/                             a table here, everything else in report/
    python evaluate.py runs/midog2022 --paper            the paper's values beside ours
    python evaluate.py runs/ --threshold-rule balanced   decisions at a threshold from validation
    python evaluate.py runs/midog2022 --ensemble         also the mean of the folds of each model
    python evaluate.py runs/ --grid "sweeps/scaling.sh midog2022 uni virchow2"
                                                         done, failed, missing, time left
    python evaluate.py --detection scored.json --data midog2022 --threshold 0.4
                                                         F1 of detection before and after

A run counts only if all of it is there and agrees with itself; the others are named and never
averaged."""

import argparse
import math
import textwrap
from collections import defaultdict
from pathlib import Path

import numpy as np

import common
import flags
from common import UserError
from dataset import splits
from reporting import detection, ensemble, figures, folder, grid, metrics, page, results, tables
from reporting.metrics import (  # noqa: F401  other programs use them as evaluate.…
    accuracy,
    auroc,
    average_precision,
    balanced_accuracy,
    brier,
    choose_threshold,
    cohen_kappa,
    expected_calibration_error,
    f1,
    of_predictions,
    precision,
    sensitivity,
    specificity,
    summarise,
    weighted_f1,
)

MOST_REPLICATES = 20_000  # of which the draws of 1,000 cases take half a gigabyte
DETECTION_FILES = (
    "detection.csv",
    "detection_curve.csv",
    "detection_combined.csv",
    "detection.png",
    "detection.svg",
)


def overview(finished, rule=None):
    """The table of the terminal (at most 100 columns wide) as text, one per dataset and seed.

    rule: --threshold-rule if it was given; what it gains then stands in the place of weighted F1.
    """
    columns = {"bal. acc.": (None, "balanced_accuracy"), "w. F1": (None, "weighted_f1")}
    if rule is not None:
        columns = {**columns, "at t": ("at_threshold", "balanced_accuracy")}
        del columns["w. F1"]
    columns["AUROC"] = None, "auroc"
    values, repeats = defaultdict(list), defaultdict(set)
    for run in finished:
        for name in run.tests():
            side = name
            if run.domain and name == "test":
                side = "in domain"
            elif run.domain and name in run.split["others"]:
                side = "elsewhere"  # the report has each pair of domains
            key = (
                run.data,
                run.seed,
                run.by != "case",
                run.model,
                run.label.removeprefix(run.model + "-"),
                run.by,
                run.domain is not None,
                run.frac,
                side,
            )
            values[key].append(run.sets[name])
            repeats[key].add((run.domain, run.left_out, run.fold))

    tables_of = defaultdict(list)
    for key in sorted(values):
        data, seed, _, model, method, by, _, frac, side = key
        remark = {"case": "", "annotation": ", leaking"}.get(by, f", {by}")
        title = f"{data}, seed {seed}" if seed else data
        tables_of[title].append(
            (
                model[:13],
                shortened(method, 20 - len(remark)) + remark,
                f"{frac:g}",
                side[:10],
                len(repeats[key]),
                *(_mean_sd(values[key], *column) for column in columns.values()),
            )
        )
    leaks = ""
    if any(run.by == "annotation" for run in finished):
        leaks = "; leaking: split by annotation"
    header = ("model", "method", "frac", "test", "runs", *columns)
    texts = []
    for title, rows in tables_of.items():
        heading = f"{title}: mean ± standard deviation over the runs{leaks}"
        texts.append(f"{common.printable(heading)}\n{common.table(rows, header, range(4, 8))}")
    if rule is not None:
        described = metrics.describe_rule(rule)
        texts.append(f"at t: balanced accuracy at the threshold {described}")
    return "\n\n".join(texts)


def shortened(text, width):
    """Text in `width` columns: what is too long loses its middle, for its end tells runs apart."""
    if len(text) <= width:
        return text
    return f"{text[:5]}…{text[len(text) - width + 6 :]}"


def _mean_sd(summaries, part, key):
    """Mean±deviation of a metric, as narrow as a terminal needs it. part: of the summaries, or
    None."""
    if part is not None:
        summaries = [summary[part] for summary in summaries]
    known = [summary[key] for summary in summaries if summary[key] is not None]
    if not known:
        return "-"
    text = f"{np.mean(known):.3f}"
    if len(known) > 1:
        text += f"±{np.std(known, ddof=1):.3f}"
    return text


def means_overview(means):
    """The means of probabilities as text for the terminal. means: of ensemble.report()."""
    header = ("mean of", "runs", "test", "bal. acc.", "at t", "t", "AUROC", "gain")
    texts = []
    for data, (rows, notes) in means.items():
        lines = []
        for row in rows:
            lines.append(
                (
                    shortened(common.printable(tables.ensemble_label(row)), 44),
                    row["members"],
                    row["set"][:10],
                    tables.number(row["balanced_accuracy"]),
                    tables.number(row["balanced_accuracy_at_threshold"]),
                    tables.number(row["threshold"]),
                    tables.number(row["auroc"]),
                    tables.number(row["auroc_gain"], "+.3f"),
                )
            )
        if lines:
            described = metrics.describe_rule(rows[0]["threshold_rule"])
            title = f"{data}: means of probabilities; t: the threshold {described}"
            texts.append(
                f"{common.printable(title)}\n{common.table(lines, header, [1, *range(3, 8)])}"
            )
        texts += [common.printable(note) for note in notes]
    return "\n".join(texts)


# ---------------------------------------------------------------- the command


def arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "runs",
        nargs="*",
        metavar="RUNS",
        help="folders of runs, searched with their subfolders (default: runs)",
    )
    parser.add_argument(
        "--out", default="report", metavar="DIR", help="folder of the report (default: report)"
    )
    parser.add_argument(
        "--paper", action="store_true", help="add the paper's published values to the tables"
    )
    parser.add_argument(
        "--ensemble",
        action="store_true",
        help="add rows for the mean of the probabilities of each model's folds, and of all models "
        "that were tested alike",
    )
    parser.add_argument(
        "--grid",
        metavar="'SWEEP ARGS'",
        help="list which runs of a sweep are done, failed and missing, in its folder of runs and "
        "in RUNS; runs nothing and writes no report",
    )
    parser.add_argument(
        "--replicates",
        type=int,
        default=2000,
        metavar="N",
        help="draws of the bootstrap (default: 2000)",
    )
    parser.add_argument(
        "--threshold-rule",
        metavar="RULE",
        help="how the threshold of the decisions at t is chosen on validation: f1, balanced (best "
        "balanced accuracy), sensitivity=0.9, or a probability (default: f1)",
    )
    parser.add_argument(
        "--no-gallery", action="store_true", help="no gallery of errors (it reads the images)"
    )
    parser.add_argument(
        "--figure",
        nargs="+",
        default=[],
        metavar="FILE",
        help="PNG or JPEG pictures to put at the top of the page, such as classify.py --overlay "
        "draws",
    )
    group = parser.add_argument_group("detection (instead of a report on runs)")
    group.add_argument(
        "--detection",
        metavar="SCORED",
        help="compare candidates that classify.py scored (MIDOG JSON, the challenge's JSON, CSV) "
        "with the annotations of --data",
    )
    group.add_argument(
        "--threshold",
        metavar="P",
        help="decision threshold of the second stage, between 0 and 1 (default: 0.5; with "
        "--combine: the best of the validation images)",
    )
    group.add_argument(
        "--only", metavar="RUN", help="compare only on the test images of this run's split"
    )
    group.add_argument(
        "--combine",
        choices=detection.COMBINATIONS,
        help="combine the detector's own score with the probability: their product, or a logistic "
        "regression fitted on the validation images of --only RUN (default: the probability alone)",
    )
    group.add_argument(
        "--data",
        metavar="D",
        help="dataset of the annotations (for the gallery: if its name does not find it)",
    )
    group.add_argument("--images", metavar="DIR", help="folder of its images")
    group.add_argument(
        "--source-mpp", type=float, metavar="MPP", help="µm/px, if the images do not say it"
    )
    flags.add_reading_arguments(group)
    return parser.parse_args()


def detect(args):
    """F1 of detection before and after the second stage: table, CSV files and a figure."""
    if not args.data:
        raise UserError("--detection needs --data: the dataset with the annotated mitotic figures")
    if args.combine and not args.only:
        raise UserError(
            "--combine needs --only RUN: thresholds and weights come from its validation images"
        )
    threshold = metrics.parse_threshold(args.threshold or "0.5")
    mpp = args.source_mpp
    if mpp is not None and not (math.isfinite(mpp) and 0.01 <= mpp <= 100):
        raise UserError(f"--source-mpp {mpp:g}: µm/px between 0.01 and 100 are needed")
    folder.check(args.out, DETECTION_FILES, [args.detection, args.data])
    annotations, _ = flags.from_source(vars(args))
    ids, split, files = None, None, {}
    if args.only:
        split = splits.load_split(Path(args.only) / "split.json", annotations)
        ids = split.test
    if args.combine:
        rows, compared = detection.combined_report(
            args.detection, annotations, split, args.combine, mpp
        )
        print(
            f"on the test images of {args.only}, each score from its best threshold on the "
            "validation images on"
        )
        print(detection.comparison(compared) + "\n")
        files["detection_combined.csv"] = detection.comparison_file(compared)
        if args.threshold is None:
            threshold = compared[-1][1]["threshold"]
    else:
        rows = detection.report(args.detection, annotations, ids, mpp)

    print(
        f"detection within {detection.RADIUS} µm, one to one; after: candidates with p >= "
        f"{threshold:g}; best F1: over all thresholds, chosen on these very images"
    )
    domains = [domain for domain, *_ in rows]
    short = figures.short_names(domains)
    print(detection.table([(short[domain], *rest) for domain, *rest in rows], threshold))
    legend = tables.legend(annotations.name, domains).strip()
    if legend:
        print(textwrap.fill(legend, 100))
    pictures = figures.images(figures.detection(rows, threshold))
    files |= {f"detection.{kind}": content for kind, content in pictures.items()}
    folder.write(args.out, "detection", detection.files(rows, threshold) | files)
    written = ["detection.csv", "detection_curve.csv", "detection.png"]
    if args.combine:
        written.append("detection_combined.csv")
    print(f"{args.out}/{', '.join(written)}")


def main():
    args = arguments()
    if not 100 <= args.replicates <= MOST_REPLICATES:
        raise UserError(f"--replicates {args.replicates}: give 100 to {MOST_REPLICATES}")
    if args.threshold_rule and (args.grid is not None or args.detection is not None):
        raise UserError("--threshold-rule goes with a report on runs, not with --grid, --detection")
    if args.grid is not None:
        print(grid.grid(args.grid, args.runs))
        return
    if args.detection is not None:
        detect(args)
        return
    rule = args.threshold_rule or "f1"
    metrics.parse_threshold(rule, rules=True, flag="--threshold-rule")
    folder.check(args.out, ("results.csv", "index.html"), args.figure)
    for path in args.figure:
        page.embedded(path)  # its mistakes before the work
    roots = args.runs or ["runs"]
    finished, problems = results.collect(roots, rule)
    for path, what in problems:
        print(f"not counted: {common.printable(path)}: {common.printable(what)}")
    if not finished:
        raise UserError(
            f"{', '.join(roots)}: no usable finished run; see above, or run train.py or probe.py "
            "first"
        )
    print(overview(finished, args.threshold_rule))
    for note in results.notes(finished):
        print(common.printable(note))
    means = None
    if args.ensemble:
        means = ensemble.report(finished, args.replicates)
        print(f"\n{means_overview(means)}")
    print(f"report: {page.write(finished, problems, args, means)}")


if __name__ == "__main__":
    common.command(main)
