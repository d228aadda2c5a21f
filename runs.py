"""A run's folder: its name, configuration, lock, log, predictions. No torch.

    runs/<data>/<model>-<probe|lora|full>[-choices]/<frac0.1-fold0 | domainA-fold0>/

A run is finished when `metrics.json` stands in it: that file is written last. Everything appears
whole or not at all, so a sweep is a shell loop that can be killed and restarted anywhere."""

import csv
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np

import common
from common import UserError

PREDICTION_COLUMNS = ("set", "id", "case", "domain", "label", "logit", "probability")


# ---------------------------------------------------------------- the folder


def run_path(root, data, model, method, frac, fold, domain=None, suffixes=()):
    """Folder of a run. `method`: probe | lora | full; `suffixes`: choices that are not the default,
    e.g. ("r8",).
    """
    name = "-".join([model, method, *suffixes])
    share = f"domain{domain}" if domain else f"frac{frac:g}"
    if domain and frac != 1:
        share += f"-frac{frac:g}"
    path = Path(root)
    for part in (data, name, f"{share}-fold{fold}"):
        path = path / common.file_name(part)
    return path


def environment():
    """What a result may depend on beside its flags: versions, commit, machine, command line."""
    versions = {
        common.NAME: common.VERSION,
        "python": platform.python_version(),
        "numpy": np.__version__,
    }
    for name in ("torch", "torchvision", "onnxruntime"):
        if name in sys.modules:
            versions[name] = getattr(sys.modules[name], "__version__", "?")
    here = Path(__file__).resolve().parent
    try:
        git = subprocess.run(
            ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12", "--match="],
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
        commit = git.stdout.strip() or "unknown"
    except (OSError, subprocess.SubprocessError):
        commit = "unknown"
    return {
        "versions": versions,
        "commit": commit,
        "machine": f"{platform.machine()} {platform.system()}",
        "cpus": os.cpu_count(),
        "argv": sys.argv,
    }


def differing(old, new):
    """Names of the result-changing entries in which two configurations differ, with both values."""
    found = []
    for part in ("flags", "data", "encoder"):
        before, after = old.get(part, {}), new.get(part, {})
        for key in sorted(set(before) | set(after)):
            if (part, key) == ("flags", "weights"):
                continue  # what the weights are is compared by their hash, not where they lie
            # Through JSON, so that tuples equal lists and numpy's numbers equal Python's.
            was, now = (
                json.dumps(d.get(key), default=common._plain, sort_keys=True)
                for d in (before, after)
            )
            if was != now:
                flag = f"--{key.replace('_', '-')}" if part == "flags" else f"{part} {key}"
                found.append(f"{flag} (was {was}, now {now})")
    return found


class Run:
    """An opened run folder; holds its lock until close() (or the end of the process, however it
    ends).
    """

    def __init__(self, path, config, finished, lock):
        self.path, self.config, self.finished, self._lock = path, config, finished, lock
        self.checkpoint = path / "checkpoint.safetensors"

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def log(self, row):
        """Append a row (dict) to log.csv as one whole line; the header is written with the first."""
        path = self.path / "log.csv"
        new = not path.exists() or path.stat().st_size == 0
        text = (
            ("" if not new else ",".join(row) + "\n")
            + ",".join(_cell(value) for value in row.values())
            + "\n"
        )
        # One write call: a kill leaves the line out, or whole.
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            os.write(handle, text.encode())
        finally:
            os.close(handle)

    def truncate_log(self, rows):
        """Keep the first `rows` rows of log.csv: what was logged after the last checkpoint is done
        again.
        """
        path = self.path / "log.csv"
        if path.exists():
            lines = path.read_text().splitlines(keepends=True)
            common.write_text(path, "".join(lines[: rows + 1]) if rows else "")

    def finish(self, metrics):
        """Write metrics.json, which makes the run finished, then drop the checkpoint."""
        common.write_json(self.path / "metrics.json", metrics)
        for path in self.path.glob("checkpoint.*"):
            path.unlink(missing_ok=True)
        self.finished = True

    def close(self):
        if self._lock is not None:
            self._lock.release()
            self._lock = None


def _cell(value):
    return repr(float(value)) if isinstance(value, (float, np.floating)) else str(value)


def open_run(path, config, resume=False, force=False):
    """Open or make the run folder `path` for `config` (parts "flags", "data", "encoder" are
    compared).

    Returns a locked Run. `.finished` is True where the same configuration is already done: there is
    nothing to do. UserError: another process works on it; finished or begun with another
    configuration (the flags are named); begun and neither `resume` nor `force` given. `force`
    clears the folder."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    lock = common.try_lock(path / "lock")
    if lock is None:
        raise UserError(f"{path}: another process works on this run; wait for it or stop it")
    try:
        for rest in path.glob(".*.tmp"):  # of a process killed while it wrote
            if rest.is_file():  # export.py works in a folder, and may be alive
                rest.unlink(missing_ok=True)
        if force:
            _clear(path)
        if (path / "config.json").exists():
            old = common.read_json(path / "config.json")
            differences = differing(old, config)
            finished = (path / "metrics.json").exists()
            if differences:
                raise UserError(
                    f"{path}: this run was {'done' if finished else 'begun'} with other settings: "
                    f"{'; '.join(differences)}. Repeat it with --force, or choose another --runs "
                    "folder"
                )
            if finished:
                return Run(path, old, True, lock)
            if not resume:
                raise UserError(
                    f"{path}: this run was begun and is not finished; continue it with --resume, "
                    "or "
                    "start it over with --force"
                )
            return Run(path, old, False, lock)
        _clear(path)  # a folder without a configuration holds remains at most
        # Through JSON once, so that a new and a reopened run hold equal values.
        config = json.loads(json.dumps(config, default=common._plain))
        common.write_json(path / "config.json", config)
        return Run(path, config, False, lock)
    except BaseException:
        lock.release()
        raise


def _clear(path):
    (path / "metrics.json").unlink(
        missing_ok=True
    )  # first: killed after it, the folder is unfinished
    for old in path.iterdir():
        if old.name != "lock" and old.is_file():
            old.unlink()


# ---------------------------------------------------------------- predictions


def write_predictions(path, rows):
    """Write predictions.csv. rows: dict of equally long arrays, one per PREDICTION_COLUMNS; all
    digits are kept.
    """
    columns = [rows[name] for name in PREDICTION_COLUMNS]
    if len({len(column) for column in columns}) != 1:
        raise ValueError("the columns differ in length")
    with (
        common.atomic(path) as temporary,
        open(temporary, "w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(PREDICTION_COLUMNS)
        for name, id, case, domain, label, logit, probability in zip(*columns):
            writer.writerow(
                [name, id, case, domain, int(label), repr(float(logit)), repr(float(probability))]
            )


def predictions(sets):
    """Columns for write_predictions of [(name of the set, Annotations, its rows, their logits)]."""
    columns = {name: [] for name in PREDICTION_COLUMNS}
    for name, table, rows, logits in sets:
        logits = np.asarray(logits, np.float64)
        probability = 1 / (1 + np.exp(-logits.clip(-700, 700)))
        for key, values in (
            ("set", [name] * len(rows)),
            ("id", table.id[rows]),
            ("case", table.case[rows]),
            ("domain", table.domain[rows]),
            ("label", table.label[rows]),
            ("logit", logits),
            ("probability", probability),
        ):
            columns[key].extend(values)
    return {name: np.asarray(values) for name, values in columns.items()}


def add_predictions(path, columns):
    """Put sets into the predictions.csv of a finished run, in the place of its own of the same
    names.

    Returns all columns, old and new.
    """
    old = read_predictions(path)
    keep = ~np.isin(old["set"], np.unique(columns["set"]))
    both = {name: np.concatenate([old[name][keep], columns[name]]) for name in PREDICTION_COLUMNS}
    write_predictions(path, both)
    return both


def pending_tests(path, tests):
    """Those of `tests` (Annotations of --test) on which the finished run at `path` has no results
    yet.

    UserError where it has some on another dataset of the same name.
    """
    metrics, pending = common.read_json(Path(path) / "metrics.json"), []
    for other in tests:
        if other.name not in metrics["sets"]:
            pending.append(other)
        elif metrics.get("tests", {}).get(other.name, other.fingerprint()) != other.fingerprint():
            raise UserError(
                f"{path}: has results on another dataset called {other.name}, or on these "
                "annotations "
                "before they were changed; rename the file, or repeat the run with --force"
            )
    return pending


def finish_tests(path, metrics, tests):
    """Write metrics.json of a run with further test sets. Whoever dies before it computes them
    again.
    """
    old = common.read_json(Path(path) / "metrics.json")
    known = old.get("tests", {}) | {other.name: other.fingerprint() for other in tests}
    common.write_json(Path(path) / "metrics.json", {**old, **metrics, "tests": known})


def metric_rows(path, metrics, only=None):
    """Rows (run, set, patches, balanced accuracy, weighted F1, AUROC) of the table that train.py
    and probe.py print.
    """

    def text(value):
        return "–" if value is None else f"{value:.3f}"

    return [
        (
            str(path),
            name,
            values["n"],
            *(text(values[k]) for k in ("balanced_accuracy", "weighted_f1", "auroc")),
        )
        for name, values in metrics["sets"].items()
        if name != "val" and (only is None or name in only)
    ]


def read_predictions(path):
    """predictions.csv as a dict of arrays; UserError naming the line where it is broken."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.reader(file)
            if tuple(next(reader, ())) != PREDICTION_COLUMNS:
                raise UserError(
                    f"{path}: not a predictions file (columns {', '.join(PREDICTION_COLUMNS)} "
                    "expected)"
                )
            rows, number = [], 1
            for number, row in enumerate(reader, start=2):
                try:
                    name, id, case, domain, label, logit, probability = row
                    if label not in ("0", "1"):
                        raise ValueError
                    rows.append(
                        (name, id, case, domain, int(label), float(logit), float(probability))
                    )
                except ValueError:
                    raise UserError(
                        f"{path}, line {number}: not a row of predictions; the file is damaged"
                    ) from None
        with open(path, "rb") as file:
            file.seek(-1, os.SEEK_END)
            if file.read() != b"\n":  # a last number without its last digits would go unseen
                raise UserError(f"{path}, line {number}: cut off; the file is damaged")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not a readable CSV file ({error})") from None
    columns = list(zip(*rows)) if rows else [()] * len(PREDICTION_COLUMNS)
    types = (str, str, str, str, np.int8, np.float64, np.float64)
    return {
        name: np.array(column, dtype=kind)
        for name, column, kind in zip(PREDICTION_COLUMNS, columns, types)
    }
