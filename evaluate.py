"""What finished runs are worth: tables, figures, intervals, paired tests, an error gallery. No
torch.

    python evaluate.py runs/                             a table here, everything else into report/
    python evaluate.py runs/midog2022 --paper            with the values the paper published beside
    ours
    python evaluate.py runs/ --grid "sweeps/scaling.sh midog2022 uni virchow2"      done, failed,
    missing, time left
    python evaluate.py --detection scored.json --data midog2022 --threshold 0.4     F1 of detection
    before and after

A run counts only when all of it is there and agrees with itself; what does not is named, and never
averaged."""

import argparse
import textwrap
from collections import defaultdict
from pathlib import Path

import numpy as np

import common
import flags
from common import UserError
from dataset import splits
from reporting import grid, results
from reporting.metrics import (  # noqa: F401  what other scripts use by the name evaluate.…
    auroc,
    average_precision,
    balanced_accuracy,
    brier,
    choose_threshold,
    expected_calibration_error,
    f1,
    of_predictions,
    precision,
    sensitivity,
    specificity,
    summarise,
    weighted_f1,
)


def overview(found):
    """The compact table of the terminal (at most 100 columns wide) as text, one per dataset and
    seed.
    """
    groups = defaultdict(lambda: ([], set()))
    for run in found:
        for name, values in run.sets.items():
            if name == "val":
                continue
            # One line in the domain of training and one out of it; the report has each pair of
            # domains.
            side = (
                "in domain"
                if name == "test"
                else "elsewhere"
                if name in run.split["others"]
                else name
            )
            key = (
                run.data,
                run.flags.get("seed") or 0,
                run.by != "case",
                run.model,
                run.label.removeprefix(run.model + "-"),
                run.by,
                run.domain is not None,
                run.frac,
                side if run.domain else name,
            )
            groups[key][0].append(values)
            groups[key][1].add((run.domain, run.fold))

    def cell(values, key):
        known = [v[key] for v in values if v[key] is not None]
        return (
            "-"
            if not known
            else f"{np.mean(known):.3f}"
            + (f"±{np.std(known, ddof=1):.3f}" if len(known) > 1 else "")
        )

    rows = defaultdict(list)
    for (data, seed, _, model, method, by, _, frac, name), (values, repeats) in sorted(
        groups.items()
    ):
        said = {"case": "", "annotation": ", leaking"}.get(by, f", {by}")
        rows[data + f", seed {seed}" * bool(seed)].append(
            (
                model[:13],
                method[: 20 - len(said)] + said,
                f"{frac:g}",
                name[:10],
                len(repeats),
                *(cell(values, k) for k in ("balanced_accuracy", "weighted_f1", "auroc")),
            )
        )
    leaks = "; leaking: split by annotation" * any(run.by == "annotation" for run in found)
    header = ("model", "method", "frac", "test", "runs", "bal. acc.", "w. F1", "AUROC")
    return "\n\n".join(
        f"{data}: mean ± standard deviation over the "
        f"runs{leaks}\n{common.table(own, header, range(4, 8))}"
        for data, own in rows.items()
    )


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
        "--paper", action="store_true", help="the paper's published values beside ours"
    )
    parser.add_argument(
        "--grid",
        metavar="'SWEEP ARGS'",
        help="say which runs of a sweep are done, failed and "
        "missing in its folder of runs, or in RUNS too; nothing is run and no report is written",
    )
    parser.add_argument(
        "--replicates",
        type=int,
        default=2000,
        metavar="N",
        help="draws of the bootstrap (default: 2000)",
    )
    parser.add_argument(
        "--no-gallery", action="store_true", help="no gallery of errors (it reads the images)"
    )
    group = parser.add_argument_group("detection (instead of a report on runs)")
    group.add_argument(
        "--detection",
        metavar="SCORED",
        help="candidates that classify.py scored (MIDOG JSON, the "
        "challenge's JSON, CSV), to be compared with the annotations of --data",
    )
    group.add_argument(
        "--threshold",
        type=float,
        metavar="P",
        help="of the second stage, as its model chose it on validation (default: 0.5)",
    )
    group.add_argument(
        "--only", metavar="RUN", help="score the test images of this run's split alone"
    )
    group.add_argument(
        "--data",
        metavar="D",
        help="dataset with the annotations (and of the gallery, where it is not found by its name)",
    )
    group.add_argument("--images", metavar="DIR", help="folder of its images")
    group.add_argument(
        "--source-mpp", type=float, metavar="MPP", help="µm/px, where the images do not say it"
    )
    flags.add_reading_arguments(group)
    return parser.parse_args()


def detect(args):
    from reporting import detection

    if not args.data:
        raise UserError(
            "--detection needs --data: the dataset whose annotations tell where mitotic figures are"
        )
    annotations, _ = flags.from_source(vars(args))
    ids = None
    if args.only:
        ids = splits.load_split(Path(args.only) / "split.json", annotations).test
    threshold = 0.5 if args.threshold is None else args.threshold
    rows = detection.report(args.detection, annotations, threshold, ids, args.source_mpp)
    print(
        f"detection within {detection.RADIUS} µm, one to one; after: candidates with p >= "
        f"{threshold:g}; best F1: "
        "over all thresholds, chosen on these very images"
    )
    from reporting import figures, tables

    domains = [domain for domain, *_ in rows]
    short = figures.short_names(domains)
    print(detection.table([(short[domain], *rest) for domain, *rest in rows], threshold)[0])
    said = tables.legend(annotations.name, domains).strip()
    print(textwrap.fill(said, 100) + "\n" * bool(said), end="")
    detection.write(args.out, rows, threshold)
    figures.detection(Path(args.out), rows, threshold)
    print(f"{args.out}/detection.csv, detection_curve.csv, detection.png")


def main():
    args = arguments()
    if args.replicates < 100:
        raise UserError(f"--replicates {args.replicates}: at least 100")
    if Path(args.out).exists() and not Path(args.out).is_dir():
        raise UserError(f"--out {args.out}: this is a file, a folder is needed")
    if args.detection:
        return detect(args)
    if args.grid:
        print(grid.grid(args.grid, args.runs))
        return
    roots = args.runs or ["runs"]
    found, problems = results.collect(roots)
    for path, what in problems:
        print(f"not counted: {path}: {what}")
    if not found:
        raise UserError(
            f"{', '.join(roots)}: no finished run that can be used; see above, or run "
            "train.py or probe.py first"
        )
    print(overview(found))
    from reporting import tables

    index = tables.write(found, problems, results.results(found), args)
    print(f"report: {index}")


if __name__ == "__main__":
    common.command(main)
