"""Finished runs, read back and checked against themselves. No torch."""

import hashlib
import os
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

import common
import runs
from common import UserError
from reporting import metrics

SUMMARY = (
    "n",
    "positives",
    "balanced_accuracy",
    "weighted_f1",
    "auroc",
    "average_precision",
    "brier",
    "ece",
)
# Flags in which the repeats of a model may differ: what tables keep apart themselves, and what
# changes no method.
ELSEWHERE = {"frac", "fold", "domain", "weights", "dtype"}


@dataclass
class Finished:
    """A finished run: its flags and predictions, checked against its metrics."""

    path: Path
    root: Path
    flags: dict
    data: str  # name of the dataset it was trained on
    fingerprint: str
    label: str  # model and method with the choices that are not the default, as the folder is named
    split: dict  # ids by set, counts, settings
    columns: dict  # predictions
    threshold: float
    sets: dict  # name → summary
    seconds: float = None
    source: dict = field(
        default_factory=dict
    )  # the flags that its data was read with, "data" among them
    hashes: dict = field(default_factory=dict)  # of the split and of the test sets
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
        return (
            self.data,
            self.label,
            self.by,
            self.flags.get("seed", 0),
            self.domain or "",
            self.frac,
        )

    def rows(self, name):
        """(ids, labels, probabilities, cases, domains) of a set, in the order of the ids."""
        rows = np.flatnonzero(self.columns["set"] == name)
        rows = rows[np.argsort(self.columns["id"][rows], kind="stable")]
        return tuple(
            self.columns[key][rows] for key in ("id", "label", "probability", "case", "domain")
        )


def find(roots):
    """Run folders below the given folders, sorted; UserError where one is not there or cannot be
    read.
    """

    def refuse(error):
        raise UserError(f"{error.filename}: cannot be searched for runs ({error.strerror})")

    found = {}
    for root in roots:
        if not Path(root).is_dir():
            raise UserError(
                f"{root}: {'this is a file, a' if Path(root).exists() else 'no such'} folder of "
                "runs" + (" is needed" if Path(root).exists() else "")
            )
        for folder, subfolders, files in os.walk(root, onerror=refuse):
            subfolders[:] = sorted(
                name for name in subfolders if not name.startswith(".") and name != "embeddings"
            )
            if {"config.json", "metrics.json", "predictions.csv", "split.json"} & set(files):
                found[os.path.realpath(folder)] = Path(folder)
    return [found[key] for key in sorted(found)]


def is_locked(path):
    """Whether a live process works on the run."""
    if not (path / "lock").exists():
        return False
    lock = common.try_lock(path / "lock")
    if lock is not None:
        lock.release()
    return lock is None


def read_run(path):
    """A Finished run; UserError says what is damaged. None where it is not finished (yet)."""
    config = common.read_json(path / "config.json")
    if not isinstance(config, dict) or not {"flags", "data"} <= config.keys():
        raise UserError(f"{path}: not a run's folder: its config.json is that of another program")
    if not (path / "metrics.json").exists():
        return None
    stored = common.read_json(path / "metrics.json")
    split = common.read_json(path / "split.json")
    columns = runs.read_predictions(path / "predictions.csv")
    try:
        flags, data = dict(config["flags"]), dict(config["data"])
        name, fingerprint = str(data["name"]), str(data.get("fingerprint"))
        ids = {
            part: np.array(sorted(map(str, split["ids"][part])))
            for part in ("train", "val", "test")
        }
        others = {
            str(key): np.array(sorted(map(str, values))) for key, values in split["others"].items()
        }
        split_of, of_cases = str(split["dataset"].get("fingerprint")), dict(split.get("cases", {}))
        before = {key: [stored["sets"][key][name] for name in SUMMARY] for key in stored["sets"]}
        (
            float(flags.get("frac", 1)),
            int(flags.get("fold", 0)),
            str(flags["model"]),
            str(flags["method"]),
        )
        encoder = config.get("encoder", {}).get("weights_hash")
        twice = [
            (a, b, same)
            for what in (ids, of_cases if flags.get("by", "case") == "case" else {})
            for a, b in (("train", "val"), ("train", "test"), ("val", "test"))
            for same in [set(what.get(a, ())) & set(what.get(b, ()))]
            if same
        ]
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UserError(
            f"{path}: config.json, split.json or metrics.json lacks what belongs there"
        ) from None
    if split_of != fingerprint:
        raise UserError(f"{path}: split.json is of another dataset than config.json")
    for a, b, same in twice:
        raise UserError(f"{path}: split.json leaks: {min(same)} is in {a} and in {b}")
    if not len(columns["set"]):
        raise UserError(f"{path}: predictions.csv is empty")
    if not np.isin(columns["label"], (0, 1)).all():
        raise UserError(f"{path}: predictions.csv has labels other than 0 and 1")
    try:
        found = metrics.of_predictions(columns)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    for key in sorted(before.keys() | found["sets"].keys()):
        now = [found["sets"].get(key, {}).get(name) for name in SUMMARY]
        if key not in before or not all(map(_equal, now, before[key])):
            raise UserError(
                f"{path}: predictions.csv and metrics.json do not agree on the set {key}; one of "
                "them is "
                "of another run, or cut off"
            )
    for key, wanted in (ids | others).items():
        if key == "train":
            continue
        own = np.sort(columns["id"][columns["set"] == key])
        if (key != "val" or len(own)) and not np.array_equal(own, wanted):
            raise UserError(
                f"{path}: the predictions of {key} are not those of the annotations that "
                "split.json lists"
            )
    label = (
        path.parent.name
        if path.parent.name.startswith(f"{flags['model']}-")
        else f"{flags['model']}-{flags['method']}"
    )
    if flags.get("by", "case") != "case":
        label = label.replace(f"-by{flags['by']}", "")
    seconds = stored.get("seconds")
    if not isinstance(seconds, (int, float)):
        seconds = max(
            0.0, (path / "metrics.json").stat().st_mtime - (path / "config.json").stat().st_mtime
        )
    run = Finished(
        path,
        path.parent.parent,
        flags,
        name,
        fingerprint,
        label,
        {"ids": ids, "others": others, "pool": split.get("pool")},
        columns,
        found["threshold"],
        found["sets"],
        seconds,
        source_of(config),
    )
    run.hashes = {
        "split": _hash(*ids.values(), *others.values()),
        "test": _hash(ids["test"], *others.values()),
    }
    run.hashes |= {
        key: _hash(run.rows(key)[0]) for key in found["sets"] if key not in {"val", "test", *others}
    }
    # Everything that makes another model of the same name; where it was computed and in what
    # precision does not.
    run.settings = {key: value for key, value in flags.items() if key not in ELSEWHERE} | {
        "weights_hash": encoder
    }
    return run


def source_of(config):
    """The flags that said which data, as flags.source() keeps them; {} where the run does not tell."""
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
    """(runs that count, problems): problems are (path, what) of everything below the roots that is
    left out.
    """
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
            problems.append(
                (
                    path,
                    "a process works on it"
                    if is_locked(path)
                    else "not finished; the same command with --resume continues it",
                )
            )
        else:
            found.append(run)
    # runs/<data>/…: a run that is not of its folder's dataset was copied there by mistake.
    homes = {
        run.root.resolve() for run in found if run.root.resolve().name == common.file_name(run.data)
    }
    for run in found:
        if run.root.resolve() in homes and run.root.resolve().name != common.file_name(run.data):
            problems.append(
                (
                    run.path,
                    f"a run of the dataset {run.data} in the folder of {run.root.name}: left out",
                )
            )
    found = [
        run
        for run in found
        if run.root.resolve() not in homes or run.root.resolve().name == common.file_name(run.data)
    ]
    found = _agreeing(
        found,
        problems,
        "annotations of its dataset",
        lambda run: run.data,
        lambda run: run.fingerprint,
    )
    found = _agreeing(
        found,
        problems,
        "test set",
        lambda run: (run.data, run.by, run.flags.get("seed"), run.domain),
        lambda run: run.hashes["test"],
    )
    found = _agreeing(
        found,
        problems,
        "split",
        lambda run: (
            run.data,
            run.by,
            run.flags.get("seed"),
            run.domain,
            run.frac,
            run.fold,
            run.flags.get("val_frac"),
        ),
        lambda run: run.hashes["split"],
    )
    found = _agreeing(
        found,
        problems,
        "choice of settings",
        lambda run: (*run.group()[:4], bool(run.domain), run.frac),
        lambda run: tuple(sorted((key, str(value)) for key, value in run.settings.items())),
        _differing,
    )
    for name in sorted({key for run in found for key in run.hashes} - {"split", "test"}):
        found = _agreeing(
            found,
            problems,
            f"test set {name}",
            lambda run: name in run.hashes,
            lambda run: run.hashes.get(name),
        )
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
            problems += [
                (
                    run.path,
                    "the same name and repeat as "
                    + ", ".join(str(other.path) for other in same if other is not run)
                    + ", with other predictions: none of them "
                    "counts",
                )
                for run in same
            ]
    return sorted(counted, key=lambda run: str(run.path)), sorted(
        problems, key=lambda problem: str(problem[0])
    )


def _differing(run, other):
    """ " (--epochs 2, there 100)": the settings in which two runs differ."""
    keys = sorted(
        key
        for key in run.settings.keys() | other.settings.keys()
        if str(run.settings.get(key)) != str(other.settings.get(key))
    )
    return (
        " ("
        + ", ".join(
            f"--{key.replace('_', '-')} {run.settings.get(key)}, there {other.settings.get(key)}"
            if key != "weights_hash"
            else "other weights"
            for key in keys
        )
        + ")"
    )


def _agreeing(found, problems, what, key, value, say=lambda run, other: ""):
    """Runs that have the value most runs of their key have; the others go to the problems. On a tie
    none counts.
    """
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
            problems.append(
                (
                    run.path,
                    f"another {what} than {ranked[0][1]} other runs have ({other.path})"
                    f"{say(run, other)}: left out",
                )
            )
        else:
            other = next(r for r in found if key(r) == key(run) and value(r) != value(run))
            problems.append(
                (
                    run.path,
                    f"another {what} than {other.path}{say(run, other)}, and no telling which is "
                    "right: neither counts",
                )
            )
    return kept


def results(found):
    """Rows (dicts) of results.csv: one per run and test set."""
    rows = []
    for run in found:
        for name, values in run.sets.items():
            if name == "val":
                continue
            row = {
                "run": str(run.path),
                "data": run.data,
                "model": run.model,
                "method": run.method,
                "label": run.label,
                "split": run.by,
                "seed": run.flags.get("seed"),
                "frac": run.frac,
                "fold": run.fold,
                "train_domain": run.domain or "",
                "set": name,
                "train": len(run.split["ids"]["train"]),
                "val": len(run.split["ids"]["val"]),
            }
            row |= {
                key: values[key]
                for key in (
                    "n",
                    "positives",
                    "cases",
                    "balanced_accuracy",
                    "weighted_f1",
                    "auroc",
                    "average_precision",
                    "brier",
                    "ece",
                )
            }
            for part in ("at_0.5", "at_threshold"):
                row |= {
                    f"{key}_{part}": values[part][key]
                    for key in ("sensitivity", "specificity", "precision", "f1")
                }
            row["threshold"] = values["at_threshold"]["threshold"]
            rows.append(row)
    return rows
