"""Finished runs, read back and checked against themselves."""

import csv
import hashlib
import os
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

import common
import runs
from common import UserError
from dataset.formats.cells import MITOSIS, are_class_names
from reporting import metrics

FILES = ("config.json", "split.json", "predictions.csv", "metrics.json")
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
# Flags in which repeats of one model may differ: the tables group by them, or they do not change
# the method.
GROUPED = {"frac", "fold", "domain", "leave_out", "weights", "adapter", "dtype"}
# What a run started from, in config.json's "encoder".
BASES = {"weights_hash": "weights", "adapter_hash": "adapter"}
LEFT_OUT = "left out"  # Finished.by of runs with --leave-out
LOG_COLUMNS = ("epoch", "train_loss", "val_loss", "val_auroc")
SAMPLE_COLUMNS = ("sample_loss", "sample_auroc")  # of runs with --val-patches


@dataclass
class Finished:
    """A finished run: its flags and predictions, checked against its metrics."""

    path: Path
    root: Path
    flags: dict
    data: str  # name of the dataset it was trained on
    fingerprint: str
    label: str  # model and method with the choices that are not the default, as the folder is named
    split: dict  # "ids": ids by set; "others": ids of the other domains
    columns: dict  # predictions
    threshold: float
    sets: dict  # name → summary
    seconds: float | None = None
    rule: str = "f1"  # what the threshold was chosen for on validation
    classes: tuple = MITOSIS  # names of the labels 0 and 1
    source: dict = field(default_factory=dict)  # the flags that its data was read with
    hashes: dict = field(default_factory=dict)  # of the split and of the test sets
    settings: dict = field(default_factory=dict)  # what repeats must have in common
    unfinished: list = field(default_factory=list)  # test sets that an interrupted --test left

    @property
    def model(self):
        return self.flags["model"]

    @property
    def method(self):
        return self.flags["method"]

    @property
    def domain(self):
        return self.flags.get("domain")

    @property
    def frac(self):
        return float(self.flags["frac"])

    @property
    def fold(self):
        return self.flags["fold"]

    @property
    def seed(self):
        return self.flags.get("seed") or 0

    @property
    def left_out(self):
        return self.flags.get("leave_out")

    @property
    def folds(self):
        return self.flags.get("folds")

    @property
    def by(self):
        """How the test set was chosen, in words that keep runs of other ways apart."""
        if self.folds:
            return f"{self.folds} folds"
        if self.left_out:
            return LEFT_OUT
        return self.flags["by"]

    def group(self):
        """What the repeats that are averaged have in common: everything but the fold."""
        place = self.domain or self.left_out or ""
        return self.data, self.label, self.by, self.seed, place, self.frac

    def tests(self):
        """Names of the test sets: "test", other domains, other datasets."""
        return [name for name in self.sets if name != "val"]

    def rows(self, name):
        """(ids, labels, probabilities, cases, domains) of a set, in the order of the ids."""
        rows = np.flatnonzero(self.columns["set"] == name)
        rows = rows[np.argsort(self.columns["id"][rows], kind="stable")]
        return tuple(
            self.columns[key][rows] for key in ("id", "label", "probability", "case", "domain")
        )


# ---------------------------------------------------------------- finding runs


def find(roots):
    """Run folders below the folders `roots`, sorted; UserError if one is missing or unreadable."""

    def refuse(error):
        raise UserError(f"{error.filename}: cannot be searched for runs ({error.strerror})")

    folders = {}
    for root in roots:
        if not Path(root).exists():
            raise UserError(f"{root}: no such folder of runs")
        if not Path(root).is_dir():
            raise UserError(f"{root}: this is a file; name a folder of runs")
        for folder, subfolders, files in os.walk(root, onerror=refuse):
            subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
            if set(FILES) & {*files, *subfolders}:
                folders[os.path.realpath(folder)] = Path(folder)
                subfolders[:] = [name for name in subfolders if name not in FILES]
    return [folders[key] for key in sorted(folders)]


def is_locked(path):
    """Whether a live process works on the run. Holds the run's lock for an instant; a run that
    starts just then waits for it (runs.open_run)."""
    if not (path / "lock").is_file():
        return False
    try:
        lock = common.try_lock(path / "lock")
    except OSError:  # read-only, or another user's: no lock of ours says anything
        return False
    if lock is None:
        return True
    lock.release()
    return False


# ---------------------------------------------------------------- reading one run


def _is_text(value):
    """Non-empty text that can be written as UTF-8."""
    if not isinstance(value, str) or not value:
        return False
    return not any("\ud800" <= character <= "\udfff" for character in value)


def _is_number(value):
    """A finite number of ordinary size."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 2**63


def _is_whole(value):
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _expect(fits, place, value, what):
    """UserError unless the entry at `place` of a run's file is what belongs there."""
    if not fits:
        shown = repr(value)
        if len(shown) > 40:
            shown = shown[:37] + "…"
        raise UserError(f"{place} is {shown}, but must be {what}; the file is damaged")


def _object(content, key, place):
    """content[key], which must be a JSON object."""
    value = content.get(key)
    _expect(isinstance(value, dict), f"{place}: {key}", value, "an object")
    return value


def _id_list(content, key, place):
    """content[key] as a sorted array of texts; must be a list of texts or whole numbers."""
    values = content.get(key)
    fits = isinstance(values, list) and all(_is_text(v) or _is_whole(v) for v in values)
    _expect(fits, f"{place}.{key}", values, "a list of ids")
    return np.array(sorted(map(str, values)), dtype=str)


def _checked_flags(flags):
    """The flags of a config.json; UserError if one that the report uses is of another kind."""
    place = "config.json: flags."
    for key in ("model", "method"):
        _expect(_is_text(flags.get(key)), place + key, flags.get(key), "a name")
    for key, fits, what in (
        ("frac", lambda v: _is_number(v) and 0 < v <= 1, "a number above 0, up to 1"),
        ("fold", _is_whole, "a whole number from 0"),
        ("by", _is_text, "a way of splitting"),
    ):
        _expect(fits(flags.get(key)), place + key, flags.get(key), what)
    for key, fits, what in (
        ("seed", _is_whole, "a whole number from 0"),
        ("domain", _is_text, "a name or null"),
        ("leave_out", _is_text, "a name or null"),
        ("folds", lambda v: _is_whole(v) and v > 1, "a whole number from 2"),
        ("val_frac", lambda v: _is_number(v) and 0 < v <= 1, "a number above 0, up to 1"),
        ("fit", lambda v: v in ("resize", "pad"), "resize or pad"),
        ("mpp", lambda v: _is_number(v) and v > 0, "a number above 0 or null"),
        ("name", _is_text, "text or null"),
        ("crop", lambda v: _is_whole(v) and 8 <= v <= 4096, "a whole number from 8 to 4096"),
    ):
        if flags.get(key) is not None:
            _expect(fits(flags[key]), place + key, flags[key], what)
    return flags


def source_of(config):
    """The flags that the run's data was read with, as flags.source() keeps them; {} if the run does
    not tell. UserError if one is of the wrong kind."""
    source = config.get("source")
    if source is None:
        return {}
    _expect(isinstance(source, dict), "config.json: source", source, "an object")
    for key, value in source.items():
        if value is None:
            continue
        place = f"config.json: source.{key}"
        if key in ("mpp", "source_mpp", "crop"):
            _expect(_is_number(value) and value > 0, place, value, "a number above 0 or null")
        else:
            _expect(_is_text(value), place, value, "text or null")
    return source


def _class_names(data):
    """Names of the labels 0 and 1 in a config.json's "data"; those of the mitosis data sets if it
    has none, as in runs of earlier versions."""
    names = data.get("classes")
    if names is None:
        return MITOSIS
    _expect(are_class_names(names), "config.json: data.classes", names, "two different names")
    return tuple(names)


def _read_split(split, by):
    """(ids by set, ids of other domains, fingerprint) of a split.json; UserError: sets overlap."""
    lists = _object(split, "ids", "split.json")
    ids = {name: _id_list(lists, name, "split.json: ids") for name in ("train", "val", "test")}
    others = _object(split, "others", "split.json")
    others = {name: _id_list(others, name, "split.json: others") for name in others}
    disjoint = [ids]
    if by == "case" and split.get("cases"):
        cases = _object(split, "cases", "split.json")
        disjoint.append({name: _id_list(cases, name, "split.json: cases") for name in cases})
    for sets in disjoint:
        for one, other in (("train", "val"), ("train", "test"), ("val", "test")):
            shared = set(sets.get(one, ())) & set(sets.get(other, ()))
            if shared:
                raise UserError(f"split.json leaks: {min(shared)} is in {one} and in {other}")
    return ids, others, str(_object(split, "dataset", "split.json").get("fingerprint"))


def _check_settings(flags, split):
    """UserError if config.json and split.json tell of different splits."""
    settings = split.get("settings", {})
    _expect(isinstance(settings, dict), "split.json: settings", settings, "an object")
    for key in ("fold", "frac", "domain", "seed", "by", "val_frac", "folds", "leave_out"):
        optional = key in ("folds", "leave_out") and settings
        both = key in flags and key in settings
        if (both or optional) and flags.get(key) != settings.get(key):
            raise UserError(f"config.json and split.json do not agree on {key}; one is damaged")


def _stored_metrics(stored):
    """{set: {metric: number or None}} of a metrics.json."""
    sets = _object(stored, "sets", "metrics.json")
    values = {}
    for name in sets:
        summary = _object(sets, name, "metrics.json: sets")
        for key in SUMMARY:
            place = f"metrics.json: sets.{name}.{key}"
            _expect(key in summary, place, "missing", "a number or null")
            value = summary[key]
            _expect(value is None or _is_number(value), place, value, "a number or null")
        values[name] = {key: summary[key] for key in SUMMARY}
    return values


def _check_predictions(columns):
    """UserError unless there are predictions, with labels 0 and 1; metrics checks the rest."""
    if not len(columns["set"]):
        raise UserError("predictions.csv is empty")
    if not np.isin(columns["label"], (0, 1)).all():
        raise UserError("predictions.csv has labels other than 0 and 1")


def _without_unfinished(columns, complete):
    """(columns, names of sets) without the sets that metrics.json does not have yet: --test writes
    their predictions first, and was interrupted. complete: names of all other sets."""
    unfinished = sorted(set(columns["set"].tolist()) - complete)
    if unfinished and complete & set(columns["set"].tolist()):
        rows = ~np.isin(columns["set"], unfinished)
        columns = {key: values[rows] for key, values in columns.items()}
        return columns, unfinished
    return columns, []


def _compare(summaries, before):
    """UserError if the predictions give other metrics than metrics.json holds."""
    for name in sorted(before.keys() | summaries.keys()):
        now = summaries.get(name, {})
        for key in SUMMARY:
            then, value = before.get(name, {}).get(key), now.get(key)
            if key == "weighted_f1" and now.get("auroc") is None and name in before and now:
                continue  # earlier versions gave one for sets of one class
            same = then == value
            if then is not None and value is not None:
                same = abs(then - value) < 1e-9
            if not same or name not in before or not now:
                raise UserError(
                    f"predictions.csv and metrics.json do not agree on the set {name}; one of them "
                    "is of another run, or cut off"
                )


def _check_ids(columns, ids):
    """UserError unless the predictions of each set are of its annotations. ids: {set: ids}."""
    for name, listed in ids.items():
        predicted = np.sort(columns["id"][columns["set"] == name])
        optional = name == "train" or (name == "val" and not len(predicted))
        if not optional and not np.array_equal(predicted, listed):
            raise UserError(
                f"the predictions of {name} are not those of the annotations that split.json lists"
            )


def _read_json(path):
    """A JSON object of a run; UserError names the file without its folder."""
    if path.exists() and not path.is_file():
        raise UserError(f"{path.name}: this is not a file")
    content = common.read_json(path)
    _expect(isinstance(content, dict), path.name, content, "a JSON object")
    return content


def read_run(path, rule="f1"):
    """The Finished run in the folder `path`; None if it is not finished (yet). UserError names what
    is damaged. rule: text of --threshold-rule, by which the threshold is chosen on validation."""
    try:
        return _read_run(Path(path), rule)
    except UserError as error:
        message = str(error).removeprefix(f"{path}: ").removeprefix(f"{path}{os.sep}")
        raise UserError(f"{path}: {message}") from None
    except RecursionError:
        raise UserError(f"{path}: one of its JSON files is nested too deeply") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def _read_run(path, rule):
    """read_run(), with errors that do not name the folder yet."""
    config = _read_json(path / "config.json")
    if not {"flags", "data"} <= config.keys():
        raise UserError("not a run's folder: its config.json is that of another program")
    if not (path / "metrics.json").exists():
        return None
    stored = _read_json(path / "metrics.json")
    if (path / "predictions.csv").exists() and not (path / "predictions.csv").is_file():
        raise UserError("predictions.csv: this is not a file")
    columns = runs.read_predictions(path / "predictions.csv")

    # The run's settings and its split, which must be of the same data.
    flags = _checked_flags(_object(config, "flags", "config.json"))
    data = _object(config, "data", "config.json")
    _expect(_is_text(data.get("name")), "config.json: data.name", data.get("name"), "a name")
    encoder = {} if config.get("encoder") is None else _object(config, "encoder", "config.json")
    split = _read_json(path / "split.json")
    ids, others, fingerprint = _read_split(split, flags["by"])
    _check_settings(flags, split)
    if fingerprint != str(data.get("fingerprint")):
        raise UserError("split.json is of another dataset than config.json")

    # Its predictions, which must give its metrics and be of the split's annotations.
    before = _stored_metrics(stored)
    columns, unfinished = _without_unfinished(columns, before.keys() | ids.keys() | others.keys())
    _check_predictions(columns)
    result = metrics.of_predictions(columns, metrics.parse_threshold(rule, rules=True))
    _compare(result["sets"], before)
    _check_ids(columns, ids | others)

    run = Finished(
        path=path,
        root=path.parent.parent,
        flags=flags,
        data=data["name"],
        fingerprint=fingerprint,
        label=_label(path, flags),
        split={"ids": ids, "others": others},
        columns=columns,
        threshold=result["threshold"],
        sets=result["sets"],
        seconds=_seconds(path, stored),
        rule=rule,
        classes=_class_names(data),
        source=source_of(config),
        unfinished=unfinished,
    )
    run.hashes["split"] = _hash(*ids.values(), *others.values())
    run.hashes["test"] = _hash(ids["test"], *others.values())
    for name in run.sets:
        if name not in {"val", "test", *others}:
            run.hashes[name] = _hash(run.rows(name)[0])
    # Whatever makes another model of the same name; machine and precision do not.
    run.settings = {key: value for key, value in flags.items() if key not in GROUPED}
    run.settings |= {key: encoder.get(key) for key in BASES}
    return run


def _label(path, flags):
    """Model, method and choices that are not the default, from the name of the run's folder."""
    label = f"{flags['model']}-{flags['method']}"
    if path.parent.name.startswith(f"{flags['model']}-"):
        label = path.parent.name
    if flags["by"] != "case":
        label = label.replace(f"-by{flags['by']}", "")
    if flags.get("folds"):
        label = label.replace(f"-{flags['folds']}folds", "")
    return label


def _seconds(path, stored):
    """How long the run took; by the times of its files if it does not say."""
    seconds = stored.get("seconds")
    if seconds is None:
        start, end = (path / name for name in ("config.json", "metrics.json"))
        return max(0.0, end.stat().st_mtime - start.stat().st_mtime)
    _expect(
        _is_number(seconds) and seconds >= 0, "metrics.json: seconds", seconds, "a number from 0"
    )
    return float(seconds)


def _hash(*arrays):
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(("\x1f".join(array.tolist()) + "\x1e").encode())
    return digest.hexdigest()[:16]


def read_log(path):
    """log.csv of a run as {column: float64 [epochs]}, LOG_COLUMNS; None without one (probes).
    UserError: damaged.

    With --val-patches also SAMPLE_COLUMNS, of every epoch; what the whole validation set gives is
    NaN but for the epochs that were validated on it.
    """
    path = Path(path) / "log.csv"
    if not path.is_file():
        return None
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        columns = LOG_COLUMNS
        if rows and set(SAMPLE_COLUMNS) <= rows[0].keys():
            columns += SAMPLE_COLUMNS
            for row in rows:
                row |= {name: row[name] or "nan" for name in ("val_loss", "val_auroc")}
        log = {key: np.array([float(row[key]) for row in rows]) for key in columns}
        if rows and np.isnan(log["val_loss"]).all():
            raise ValueError
    except (KeyError, TypeError, ValueError, csv.Error, OSError):
        raise UserError(f"{path}: not a log of training; the file is damaged") from None
    if not rows:
        return None
    return log


# ---------------------------------------------------------------- runs that belong together


# What the runs of one table must share, in the order of the checks: (what, key of the runs that
# must agree, in what). The majority of each key counts.
SHARED = (
    ("annotations of its dataset", lambda run: run.data, lambda run: run.fingerprint),
    (
        "test set",
        lambda run: (run.data, run.by, run.seed, run.domain, run.left_out, run.folds and run.fold),
        lambda run: run.hashes["test"],
    ),
    (
        "split",
        lambda run: (
            run.data,
            run.by,
            run.seed,
            run.domain,
            run.left_out,
            run.frac,
            run.fold,
            run.flags.get("val_frac"),
        ),
        lambda run: run.hashes["split"],
    ),
    (
        "choice of settings",
        lambda run: (*run.group()[:4], bool(run.domain), run.frac),
        lambda run: tuple(sorted((key, str(value)) for key, value in run.settings.items())),
    ),
)


def collect(roots, rule="f1"):
    """(runs that count, problems); problems: (path, what) of all that is left out below `roots`.
    rule: see read_run."""
    finished, problems = [], []
    for path in find(roots):
        try:
            run = read_run(path, rule)
        except UserError as error:
            problems.append((path, str(error).removeprefix(f"{path}: ")))
            continue
        if run is not None:
            finished.append(run)
            for name in run.unfinished:
                what = f"its test set {name} is not finished; the same command continues --test"
                problems.append((path, what))
        elif is_locked(path):
            problems.append((path, "a process works on it"))
        else:
            problems.append((path, "not finished; the same command with --resume continues it"))

    finished = _at_home(finished, problems)
    for what, key, value in SHARED:
        finished = _agreeing(finished, problems, what, key, value)
    for name in sorted({key for run in finished for key in run.hashes} - {"split", "test"}):
        finished = _agreeing(
            finished,
            problems,
            f"test set {name}",
            lambda run, name=name: name in run.hashes,
            lambda run, name=name: run.hashes.get(name),
        )
    finished = _without_copies(finished, problems)
    finished.sort(key=lambda run: str(run.path))
    problems.sort(key=lambda problem: str(problem[0]))
    return finished, problems


def _at_home(finished, problems):
    """Without the runs of another dataset in a folder runs/<data>: copied there by mistake."""
    homes = {run.root.resolve() for run in finished if _is_home(run)}
    at_home = []
    for run in finished:
        if run.root.resolve() in homes and not _is_home(run):
            what = f"a run of the dataset {run.data} in the folder of {run.root.name}: left out"
            problems.append((run.path, what))
        else:
            at_home.append(run)
    return at_home


def _is_home(run):
    return run.root.resolve().name == common.file_name(run.data)


def _without_copies(finished, problems):
    """One run per name and repeat: the first of equal copies, none of those that contradict each
    other."""
    repeats = defaultdict(list)
    for run in finished:
        repeats[*run.group(), run.fold].append(run)
    single = []
    for same in repeats.values():
        contents = {_hash(run.columns["id"], run.columns["logit"].astype(str)) for run in same}
        if len(contents) == 1:
            single.append(same[0])
            problems += [(run.path, f"a copy of {same[0].path}") for run in same[1:]]
            continue
        for run in same:
            others = ", ".join(str(other.path) for other in same if other is not run)
            what = f"the same name and repeat as {others}, with other predictions: none counts"
            problems.append((run.path, what))
    return single


def _difference(run, other):
    """The settings in which two runs differ, as " (--epochs 2, not 100)"; "" if in none."""
    parts = []
    for key in sorted(run.settings.keys() | other.settings.keys()):
        value, others = run.settings.get(key), other.settings.get(key)
        if str(value) == str(others):
            continue
        if key in BASES:
            parts.append(f"other {BASES[key]}")
        else:
            parts.append(f"--{key.replace('_', '-')} {value}, not {others}")
    return f" ({', '.join(parts)})" if parts else ""


def _agreeing(finished, problems, what, key, value):
    """The runs that agree with most runs of their key; the others go to the problems. On a tie none
    counts.

    key(run): which runs must agree; value(run): in what."""
    votes = defaultdict(Counter)
    for run in finished:
        votes[key(run)][value(run)] += 1
    agreeing = []
    for run in finished:
        ranked = votes[key(run)].most_common(2)
        majority, count = ranked[0]
        tie = len(ranked) == 2 and ranked[1][1] == count
        if not tie and value(run) == majority:
            agreeing.append(run)
            continue
        others = [r for r in finished if key(r) == key(run) and value(r) != value(run)]
        if tie:
            other = others[0]
            outcome = "and no telling which is right: neither counts"
            text = f"another {what} than {other.path}{_difference(run, other)}, {outcome}"
        else:
            other = next(r for r in others if value(r) == majority)
            text = (
                f"another {what} than {count} other runs have ({other.path})"
                f"{_difference(run, other)}: left out"
            )
        problems.append((run.path, text))
    return agreeing


def notes(finished):
    """Lines on the validation and test sets of one class, which have no AUROC."""
    counts = Counter()
    for run in finished:
        for name in run.sets:
            shown = run.domain if name == "test" and run.domain else name
            line = runs.one_class_line(shown, run.rows(name)[1])
            if line:
                counts[f"{run.data}: {line}"] += 1
    return [f"{line} ({common.counted(count, 'run')})" for line, count in sorted(counts.items())]


def results(finished):
    """Rows (dicts) of results.csv: one per run and test set."""
    rows = []
    for run in finished:
        for name in run.tests():
            values = run.sets[name]
            row = {
                "run": str(run.path),
                "data": run.data,
                "model": run.model,
                "method": run.method,
                "label": run.label,
                "name": run.flags.get("name") or "",
                "split": run.by,
                "seed": run.flags.get("seed"),
                "frac": run.frac,
                "fold": run.fold,
                "train_domain": run.domain or "",
                "left_out": run.left_out or "",
                "set": name,
                "train": len(run.split["ids"]["train"]),
                "val": len(run.split["ids"]["val"]),
                "n": values["n"],
                "positives": values["positives"],
                "cases": values["cases"],
            }
            row |= {key: values[key] for key in SUMMARY[2:]}
            for part in ("at_0.5", "at_threshold"):
                for key in ("sensitivity", "specificity", "precision", "f1"):
                    row[f"{key}_{part}"] = values[part][key]
            row["threshold"] = values["at_threshold"]["threshold"]
            row["threshold_rule"] = run.rule
            for key in ("balanced_accuracy", "weighted_f1"):
                row[f"{key}_at_threshold"] = values["at_threshold"][key]
            for key in ("accuracy", "kappa"):
                for part in ("at_0.5", "at_threshold"):
                    row[f"{key}_{part}"] = values[part][key]
            rows.append(row)
    return rows
