"""What finished runs are worth: tables, figures, intervals, paired tests, an error gallery. No torch.

    python evaluate.py runs/                             a table here, everything else into report/
    python evaluate.py runs/midog2022 --paper            with the values the paper published beside ours
    python evaluate.py runs/ --grid "sweeps/scaling.sh midog2022 uni virchow2"      done, failed, missing, time left
    python evaluate.py --detection scored.json --data midog2022 --threshold 0.4     F1 of detection before and after

A run counts only when all of it is there and agrees with itself; what does not is named, and never averaged.
"""

import argparse
import fcntl
import hashlib
import os
import shlex
import subprocess
import textwrap
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

import cli
import data as datasets
import runs
from cli import UserError
from metrics import (  # noqa: F401  what other scripts use by the name evaluate.…
    auroc, average_precision, balanced_accuracy, brier, choose_threshold, expected_calibration_error, f1,
    of_predictions, precision, sensitivity, specificity, summarise, weighted_f1)

GRID_MARK = "# grid: --list prints the commands and runs none of them"
# Flags that go into a run's name: a command that gives none of them means the run without such an addition.
NAMED = {"rank", "alpha", "dropout", "targets", "dora", "rslora", "pool", "layer", "fit", "tta", "C", "standardize",
         "k", "shots"}
SUMMARY = ("n", "positives", "balanced_accuracy", "weighted_f1", "auroc", "average_precision", "brier", "ece")
# Flags in which the repeats of a model may differ: what tables keep apart themselves, and what changes no method.
ELSEWHERE = {"frac", "fold", "domain", "weights", "dtype"}


# ---------------------------------------------------------------- reading runs

@dataclass
class Finished:
    """A finished run: its flags and predictions, checked against its metrics."""
    path: Path
    root: Path
    flags: dict
    data: str          # name of the dataset it was trained on
    fingerprint: str
    label: str         # model and method with the choices that are not the default, as the folder is named
    split: dict        # ids by set, counts, settings
    columns: dict      # predictions
    threshold: float
    sets: dict         # name → summary
    seconds: float = None
    source: dict = field(default_factory=dict)    # the flags that its data was read with, "data" among them
    hashes: dict = field(default_factory=dict)    # of the split and of the test sets
    settings: dict = field(default_factory=dict)  # what repeats must have in common

    @property
    def model(self):
        return str(self.flags.get("model"))

    @property
    def method(self):
        return str(self.flags.get("method"))

    @property
    def domain(self):
        return self.flags.get("domain")

    @property
    def frac(self):
        return float(self.flags.get("frac", 1.0))

    @property
    def fold(self):
        return int(self.flags.get("fold", 0))

    @property
    def by(self):
        return str(self.flags.get("by", "case"))

    def group(self):
        """What repeats are averaged over: everything but the fold."""
        return self.data, self.label, self.by, self.flags.get("seed", 0), self.domain or "", self.frac

    def rows(self, name):
        """(ids, labels, probabilities, cases, domains) of a set, in the order of the ids."""
        rows = np.flatnonzero(self.columns["set"] == name)
        rows = rows[np.argsort(self.columns["id"][rows], kind="stable")]
        return tuple(self.columns[key][rows] for key in ("id", "label", "probability", "case", "domain"))


def find(roots):
    """Run folders below the given folders, sorted; UserError where one is not there or cannot be read."""
    def refuse(error):
        raise UserError(f"{error.filename}: cannot be searched for runs ({error.strerror})")
    found = {}
    for root in roots:
        if not Path(root).is_dir():
            raise UserError(f"{root}: {'this is a file, a' if Path(root).exists() else 'no such'} folder of runs" +
                            (" is needed" if Path(root).exists() else ""))
        for folder, subfolders, files in os.walk(root, onerror=refuse):
            subfolders[:] = sorted(name for name in subfolders if not name.startswith(".") and name != "embeddings")
            if {"config.json", "metrics.json", "predictions.csv", "split.json"} & set(files):
                found[os.path.realpath(folder)] = Path(folder)
    return [found[key] for key in sorted(found)]


def is_locked(path):
    """Whether a live process works on the run."""
    try:
        with open(path / "lock") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def read_run(path):
    """A Finished run; UserError says what is damaged. None where it is not finished (yet)."""
    config = runs.read_json(path / "config.json")
    if not isinstance(config, dict) or not {"flags", "data"} <= config.keys():
        raise UserError(f"{path}: not a run's folder: its config.json is that of another program")
    if not (path / "metrics.json").exists():
        return None
    stored = runs.read_json(path / "metrics.json")
    split = runs.read_json(path / "split.json")
    columns = runs.read_predictions(path / "predictions.csv")
    try:
        flags, data = dict(config["flags"]), dict(config["data"])
        name, fingerprint = str(data["name"]), str(data.get("fingerprint"))
        ids = {part: np.array(sorted(map(str, split["ids"][part]))) for part in ("train", "val", "test")}
        others = {str(key): np.array(sorted(map(str, values))) for key, values in split["others"].items()}
        split_of, of_cases = str(split["dataset"].get("fingerprint")), dict(split.get("cases", {}))
        before = {key: [stored["sets"][key][name] for name in SUMMARY] for key in stored["sets"]}
        float(flags.get("frac", 1)), int(flags.get("fold", 0)), str(flags["model"]), str(flags["method"])
        encoder = config.get("encoder", {}).get("weights_hash")
        twice = [(a, b, same) for what in (ids, of_cases if flags.get("by", "case") == "case" else {})
                 for a, b in (("train", "val"), ("train", "test"), ("val", "test"))
                 for same in [set(what.get(a, ())) & set(what.get(b, ()))] if same]
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UserError(f"{path}: config.json, split.json or metrics.json lacks what belongs there") from None
    if split_of != fingerprint:
        raise UserError(f"{path}: split.json is of another dataset than config.json")
    for a, b, same in twice:
        raise UserError(f"{path}: split.json leaks: {min(same)} is in {a} and in {b}")
    if not len(columns["set"]):
        raise UserError(f"{path}: predictions.csv is empty")
    if not np.isin(columns["label"], (0, 1)).all():
        raise UserError(f"{path}: predictions.csv has labels other than 0 and 1")
    try:
        found = of_predictions(columns)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    for key in sorted(before.keys() | found["sets"].keys()):
        now = [found["sets"].get(key, {}).get(name) for name in SUMMARY]
        if key not in before or not all(map(_equal, now, before[key])):
            raise UserError(f"{path}: predictions.csv and metrics.json do not agree on the set {key}; one of them is "
                            "of another run, or cut off")
    for key, wanted in (ids | others).items():
        if key == "train":
            continue
        own = np.sort(columns["id"][columns["set"] == key])
        if (key != "val" or len(own)) and not np.array_equal(own, wanted):
            raise UserError(f"{path}: the predictions of {key} are not those of the annotations that split.json lists")
    label = path.parent.name if path.parent.name.startswith(f"{flags['model']}-") else \
        f"{flags['model']}-{flags['method']}"
    if flags.get("by", "case") != "case":
        label = label.replace(f"-by{flags['by']}", "")
    seconds = stored.get("seconds")
    if not isinstance(seconds, (int, float)):
        seconds = max(0.0, (path / "metrics.json").stat().st_mtime - (path / "config.json").stat().st_mtime)
    run = Finished(path, path.parent.parent, flags, name, fingerprint, label,
                   {"ids": ids, "others": others, "pool": split.get("pool")}, columns, found["threshold"],
                   found["sets"], seconds, source_of(config))
    run.hashes = {"split": _hash(*ids.values(), *others.values()), "test": _hash(ids["test"], *others.values())}
    run.hashes |= {key: _hash(run.rows(key)[0]) for key in found["sets"] if key not in {"val", "test", *others}}
    # Everything that makes another model of the same name; where it was computed and in what precision does not.
    run.settings = {key: value for key, value in flags.items() if key not in ELSEWHERE} | {"weights_hash": encoder}
    return run


def source_of(config):
    """The flags that said which data, as data.source() keeps them; {} where the run does not tell."""
    source = config.get("source")
    return source if isinstance(source, dict) else {}


def _equal(a, b):
    return a == b if a is None or b is None else abs(a - b) < 1e-9


def _hash(*arrays):
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(("\x1f".join(array.tolist()) + "\x1e").encode())
    return digest.hexdigest()[:16]


def collect(roots):
    """(runs that count, problems): problems are (path, what) of everything below the roots that is left out."""
    found, problems = [], []
    for path in find(roots):
        try:
            run = read_run(path)
        except UserError as error:
            problems.append((path, str(error).removeprefix(f"{path}: ").removeprefix(f"{path}/")))
            continue
        except OSError as error:
            problems.append((path, f"cannot be read ({error.strerror})"))
            continue
        if run is None:
            problems.append((path, "a process works on it" if is_locked(path) else
                             "not finished; the same command with --resume continues it"))
        else:
            found.append(run)
    # runs/<data>/…: a run that is not of its folder's dataset was copied there by mistake.
    homes = {run.root.resolve() for run in found if run.root.resolve().name == runs.file_name(run.data)}
    for run in found:
        if run.root.resolve() in homes and run.root.resolve().name != runs.file_name(run.data):
            problems.append((run.path, f"a run of the dataset {run.data} in the folder of {run.root.name}: left out"))
    found = [run for run in found
             if run.root.resolve() not in homes or run.root.resolve().name == runs.file_name(run.data)]
    found = _agreeing(found, problems, "annotations of its dataset", lambda run: run.data,
                      lambda run: run.fingerprint)
    found = _agreeing(found, problems, "test set", lambda run: (run.data, run.by, run.flags.get("seed"), run.domain),
                      lambda run: run.hashes["test"])
    found = _agreeing(found, problems, "split", lambda run: (
        run.data, run.by, run.flags.get("seed"), run.domain, run.frac, run.fold, run.flags.get("val_frac")),
        lambda run: run.hashes["split"])
    found = _agreeing(found, problems, "choice of settings", lambda run: (*run.group()[:4], bool(run.domain), run.frac),
                      lambda run: tuple(sorted((key, str(value)) for key, value in run.settings.items())), _differing)
    for name in sorted({key for run in found for key in run.hashes} - {"split", "test"}):
        found = _agreeing(found, problems, f"test set {name}", lambda run: name in run.hashes,
                          lambda run: run.hashes.get(name))
    names, counted = defaultdict(list), []
    for run in found:
        names[run.group() + (run.fold,)].append(run)
    for same in names.values():
        if len(same) == 1:
            counted += same
        elif len({_hash(run.columns["id"], run.columns["logit"].astype(str)) for run in same}) == 1:
            counted.append(same[0])
            problems += [(run.path, f"a copy of {same[0].path}") for run in same[1:]]
        else:
            problems += [(run.path, "the same name and repeat as " + ", ".join(
                str(other.path) for other in same if other is not run) + ", with other predictions: none of them "
                "counts") for run in same]
    return sorted(counted, key=lambda run: str(run.path)), sorted(problems, key=lambda problem: str(problem[0]))


def _differing(run, other):
    """" (--epochs 2, there 100)": the settings in which two runs differ."""
    keys = sorted(key for key in run.settings.keys() | other.settings.keys()
                  if str(run.settings.get(key)) != str(other.settings.get(key)))
    return " (" + ", ".join(f"--{key.replace('_', '-')} {run.settings.get(key)}, there {other.settings.get(key)}"
                            if key != "weights_hash" else "other weights" for key in keys) + ")"


def _agreeing(found, problems, what, key, value, say=lambda run, other: ""):
    """Runs that have the value most runs of their key have; the others go to the problems. On a tie none counts."""
    votes = defaultdict(Counter)
    for run in found:
        votes[key(run)][value(run)] += 1
    kept = []
    for run in found:
        ranked = votes[key(run)].most_common(2)
        if len(ranked) == 1 or (ranked[0][1] > ranked[1][1] and value(run) == ranked[0][0]):
            kept.append(run)
        elif ranked[0][1] > ranked[1][1]:
            other = next(r for r in found if key(r) == key(run) and value(r) == ranked[0][0])
            problems.append((run.path, f"another {what} than {ranked[0][1]} other runs have ({other.path})"
                             f"{say(run, other)}: left out"))
        else:
            other = next(r for r in found if key(r) == key(run) and value(r) != value(run))
            problems.append((run.path, f"another {what} than {other.path}{say(run, other)}, and no telling which is "
                             "right: neither counts"))
    return kept


# ---------------------------------------------------------------- one row per run and test set

def results(found):
    """Rows (dicts) of results.csv: one per run and test set."""
    rows = []
    for run in found:
        for name, values in run.sets.items():
            if name == "val":
                continue
            row = {"run": str(run.path), "data": run.data, "model": run.model, "method": run.method,
                   "label": run.label, "split": run.by, "seed": run.flags.get("seed"), "frac": run.frac,
                   "fold": run.fold, "train_domain": run.domain or "", "set": name,
                   "train": len(run.split["ids"]["train"]), "val": len(run.split["ids"]["val"])}
            row |= {key: values[key] for key in ("n", "positives", "cases", "balanced_accuracy", "weighted_f1", "auroc",
                                                 "average_precision", "brier", "ece")}
            for part in ("at_0.5", "at_threshold"):
                row |= {f"{key}_{part}": values[part][key] for key in ("sensitivity", "specificity", "precision", "f1")}
            row["threshold"] = values["at_threshold"]["threshold"]
            rows.append(row)
    return rows


def overview(found):
    """The compact table of the terminal (at most 100 columns wide) as text, one per dataset and seed."""
    groups = defaultdict(lambda: ([], set()))
    for run in found:
        for name, values in run.sets.items():
            if name == "val":
                continue
            # One line in the domain of training and one out of it; the report has each pair of domains.
            side = "in domain" if name == "test" else "elsewhere" if name in run.split["others"] else name
            key = (run.data, run.flags.get("seed") or 0, run.by != "case", run.model,
                   run.label.removeprefix(run.model + "-"), run.by, run.domain is not None, run.frac,
                   side if run.domain else name)
            groups[key][0].append(values)
            groups[key][1].add((run.domain, run.fold))

    def cell(values, key):
        known = [v[key] for v in values if v[key] is not None]
        return "-" if not known else f"{np.mean(known):.3f}" + (f"±{np.std(known, ddof=1):.3f}" if len(known) > 1
                                                                else "")
    rows = defaultdict(list)
    for (data, seed, _, model, method, by, _, frac, name), (values, repeats) in sorted(groups.items()):
        said = {"case": "", "annotation": ", leaking"}.get(by, f", {by}")
        rows[data + f", seed {seed}" * bool(seed)].append((
            model[:13], method[:20 - len(said)] + said, f"{frac:g}", name[:10], len(repeats),
            *(cell(values, k) for k in ("balanced_accuracy", "weighted_f1", "auroc"))))
    leaks = "; leaking: split by annotation" * any(run.by == "annotation" for run in found)
    header = ("model", "method", "frac", "test", "runs", "bal. acc.", "w. F1", "AUROC")
    return "\n\n".join(f"{data}: mean ± standard deviation over the runs{leaks}\n{cli.table(own, header, range(4, 8))}"
                       for data, own in rows.items())


# ---------------------------------------------------------------- grids

def grid_commands(text):
    """The commands of a sweep, as lists of words. The sweep is asked to list them, and can start none of them."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UserError(f"--grid {text}: not a command of a shell ({error})") from None
    script = Path(words[0]) if words else Path()
    if not script.is_file():
        raise UserError(f"--grid {text}: there is no such script")
    # A script that does not know --list might train: only those that say so are run, and python is not python there.
    if GRID_MARK not in script.read_text(encoding="utf-8", errors="replace").splitlines():
        raise UserError(f"--grid {script}: not a sweep that can list its commands (it lacks the line '{GRID_MARK}')")
    try:
        listed = subprocess.run(["bash", str(script), "--list", *words[1:]], capture_output=True, text=True, timeout=60,
                                env=os.environ | {"PYTHON": "false"}, check=False)
    except subprocess.TimeoutExpired:
        raise UserError(f"--grid {script}: did not list its commands within a minute") from None
    if listed.returncode:
        raise UserError(f"--grid {script}: {(listed.stderr.strip().splitlines() or ['failed'])[-1]}")
    return [shlex.split(line) for line in listed.stdout.splitlines() if " train.py " in line or " probe.py " in line]


def cells(command):
    """The runs one command makes: dicts of the flags that it names, one per fraction, fold and domain."""
    script = next(Path(word).name for word in command if word.endswith(".py"))
    given, flag = {}, None
    for word in command[command.index(next(w for w in command if w.endswith(".py"))) + 1:]:
        if word.startswith("--"):
            flag = word[2:].replace("-", "_")
            given[flag] = []
        elif flag:
            given[flag].append(word)
    method = "probe" if script == "probe.py" else "lora" if "lora" in given else "full"
    folder = str(Path(__file__).resolve().parent / (given.get("runs") or ["runs"])[-1])  # where the sweeps run
    fixed = {"data": (given.get("data") or ["demo"])[-1], "model": (given.get("model") or ["demo"])[-1],
             "method": method, "by": (given.get("split") or ["case"])[-1]}
    for key in ("seed", "val_frac", "epochs", "epoch_size", "rank", "pool", "layer"):
        if given.get(key):
            fixed[key] = given[key][-1]
    fixed.setdefault("seed", "0")
    if not NAMED & given.keys():
        fixed["label"] = f"{fixed['model']}-{method}"
    return [fixed | {"runs": folder, "frac": frac, "fold": fold, "domain": domain} | ({"probe": probe} if probe else {})
            for probe in (given.get("probe") or ["uni" if method == "probe" else None])
            for domain in (given.get("domain") or [None])
            for frac in map(float, given.get("frac") or ["1"]) for fold in map(int, given.get("fold") or ["0"])]


def _same(wanted, flags, label, source):
    """Whether a run of these flags, in a folder of this name, on the data of this place, is the wanted one."""
    for key, value in wanted.items():
        if key == "runs":
            continue
        have = flags.get(key)
        if key == "label":
            have = label.replace(f"-by{wanted['by']}", "")
            value += f"-{wanted['probe']}" if wanted.get("probe", "uni") != "uni" else ""
        if key == "data":
            # A name, or a path that is seen from the sweeps' folder: the run keeps both.
            path = Path(__file__).resolve().parent / value
            value = have if str(source.get("data")) in (value, os.path.realpath(path)) else path.name
        if str(have) != str(value) and not (_number(have) is not None and _number(have) == _number(value)):
            return False
    return True


def _number(value):
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def grid(text, roots):
    """Text that says of each cell of a sweep whether it is done, running, failed or missing, and the time left.

    roots: folders of runs beside those that the sweep writes to. A run that does not count for being damaged has
    failed, too.
    """
    wanted = [cell for command in grid_commands(text) for cell in cells(command)]
    roots = [*roots, *sorted({cell["runs"] for cell in wanted})]
    found, problems = collect([root for root in roots if Path(root).is_dir()])
    unfinished = []
    for path, _ in problems:
        try:
            config = runs.read_json(path / "config.json")
            unfinished.append((path, dict(config["flags"]), source_of(config)))
        except (UserError, KeyError, TypeError, ValueError):
            continue
    state, left, took = Counter(), defaultdict(lambda: defaultdict(list)), defaultdict(list)
    lines, seconds, unknown = [], 0.0, 0
    for run in found:
        took[run.model, run.method].append(run.seconds)
        took[None, run.method].append(run.seconds)
    for cell in wanted:
        key = (cell["data"], cell["model"], cell["method"])
        begun = next((path for path, have, source in unfinished if _same(cell, have, path.parent.name, source)), None)
        if any(_same(cell, run.flags, run.label, run.source) for run in found):
            what = "done"
        elif begun is not None:
            what = "running" if is_locked(begun) else "failed"
        else:
            what = "missing"
        state[key, what] += 1
        if what != "done":
            known = took.get((cell["model"], cell["method"])) or took.get((None, cell["method"]))
            seconds += float(np.median(known)) if known else 0.0
            unknown += not known
            place = f"domain {cell['domain']}" if cell["domain"] else f"frac {cell['frac']:g}"
            left[what][f"{'-'.join(key[1:])} on {key[0]}, {place}"].append(str(cell["fold"]))
    keys = sorted({key for key, _ in state})
    rows = [[*key, *(state[key, what] for what in ("done", "running", "failed", "missing"))] for key in keys]
    header = ("data", "model", "method", "done", "running", "failed", "missing")
    lines.append(cli.table(rows, header, right=range(3, 7)))
    for what in ("failed", "running", "missing"):
        lines += [f"{what}: {place}, fold {' '.join(folds)}" for place, folds in left[what].items()]
    total = sum(len(folds) for places in left.values() for folds in places.values())
    if total:
        hours = f"about {seconds / 3600:.1f} h" if seconds >= 5400 else f"about {max(1, round(seconds / 60))} min"
        lines.append(f"{total} of {len(wanted)} runs are left: " + (
            f"{hours} one after the other, by the time that finished runs took" if unknown < total else
            "no finished run tells how long they take") + (f"; {unknown} of them not counted (no such run finished yet)"
                                                          if 0 < unknown < total else ""))
    else:
        lines.append(f"all {len(wanted)} runs are done")
    return "\n".join(lines)


# ---------------------------------------------------------------- the command

def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", metavar="RUNS", help="folders of runs, searched with their subfolders "
                        "(default: runs)")
    parser.add_argument("--out", default="report", metavar="DIR", help="folder of the report (default: report)")
    parser.add_argument("--paper", action="store_true", help="the paper's published values beside ours")
    parser.add_argument("--grid", metavar="'SWEEP ARGS'", help="say which runs of a sweep are done, failed and "
                        "missing in its folder of runs, or in RUNS too; nothing is run and no report is written")
    parser.add_argument("--replicates", type=int, default=2000, metavar="N", help="draws of the bootstrap (default: "
                        "2000)")
    parser.add_argument("--no-gallery", action="store_true", help="no gallery of errors (it reads the images)")
    group = parser.add_argument_group("detection (instead of a report on runs)")
    group.add_argument("--detection", metavar="SCORED", help="candidates that classify.py scored (MIDOG JSON, the "
                       "challenge's JSON, CSV), to be compared with the annotations of --data")
    group.add_argument("--threshold", type=float, metavar="P", help="of the second stage, as its model chose it on "
                       "validation (default: 0.5)")
    group.add_argument("--only", metavar="RUN", help="score the test images of this run's split alone")
    group.add_argument("--data", metavar="D", help="dataset with the annotations (and of the gallery, where it is not "
                       "found by its name)")
    group.add_argument("--images", metavar="DIR", help="folder of its images")
    group.add_argument("--source-mpp", type=float, metavar="MPP", help="µm/px, where the images do not say it")
    datasets.add_reading_arguments(group)
    return parser.parse_args()


def detect(args):
    import detection
    if not args.data:
        raise UserError("--detection needs --data: the dataset whose annotations tell where mitotic figures are")
    annotations, _ = datasets.from_source(vars(args))
    ids = None
    if args.only:
        ids = datasets.load_split(Path(args.only) / "split.json", annotations).test
    threshold = 0.5 if args.threshold is None else args.threshold
    rows = detection.report(args.detection, annotations, threshold, ids, args.source_mpp)
    print(f"detection within {detection.RADIUS} µm, one to one; after: candidates with p >= {threshold:g}; best F1: "
          "over all thresholds, chosen on these very images")
    import figures
    import report
    domains = [domain for domain, *_ in rows]
    short = figures.short_names(domains)
    print(detection.table([(short[domain], *rest) for domain, *rest in rows], threshold)[0])
    said = report.legend(annotations.name, domains).strip()
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
        print(grid(args.grid, args.runs))
        return
    roots = args.runs or ["runs"]
    found, problems = collect(roots)
    for path, what in problems:
        print(f"not counted: {path}: {what}")
    if not found:
        raise UserError(f"{', '.join(roots)}: no finished run that can be used; see above, or run "
                        "train.py or probe.py first")
    print(overview(found))
    import report
    index = report.write(found, problems, results(found), args)
    print(f"report: {index}")


if __name__ == "__main__":
    cli.command(main)
