"""A run's folder: its settings, name, configuration, lock, log, predictions.

    runs/<data>/<model>-<probe|lora|full>[-choices]/<frac0.1-fold0 | domainA-fold0>/

A run is finished when its folder holds `metrics.json`: that file is written last. Every file
appears whole or not at all, so a sweep is a shell loop that can be killed and restarted anywhere.
"""

import csv
import dataclasses
import hashlib
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
GROUP_COLUMNS = ("scanner", "species")  # behind them, where the data name any; may be blank
# Everything that a run, or an export into its folder, writes: what --force clears.
WRITTEN = (
    "metrics.json",
    "checkpoint.*",
    "log.csv",
    "curves.png",
    "model.safetensors",
    "predictions.csv",
    "split.json",
    "model.onnx*",
    "model-fp16.onnx*",
    "model-int8.onnx*",
    "model*.parity.json",
    ".*.tmp",
    "config.json",
)
SETS = {"val": "validation set", "test": "test set"}


# ---------------------------------------------------------------- settings


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The flags that change a run's result, by their names in config.json's "flags".

    Fields with a default came later: runs of earlier versions do not have them, and mean it.
    """

    data: str  # name of the dataset
    model: str
    method: str  # "probe", "lora" or "full"
    frac: float
    fold: int
    domain: str | None
    seed: int
    by: str  # --split
    val_frac: float
    weights: str | None
    pool: str | None
    layer: int | None
    fit: str
    mpp: float | None
    dtype: str
    size: int | None = None  # px of the patches that the encoder reads; None: as published
    crop: int | None = None  # px of a patch that are shown; None: all
    name: str | None = None  # a tag chosen by the user, for the run's name
    folds: int | None = None  # of a cross-validation
    leave_out: str | None = None  # domain

    def flags(self):
        """config.json's "flags", without what is at its default (see above)."""
        flags = dataclasses.asdict(self)
        for field in dataclasses.fields(self):
            if flags[field.name] == field.default:
                del flags[field.name]
        return flags

    @property
    def run_seed(self):
        """Seed of everything random in the run: another one for each seed and fold."""
        return (int(self.seed) << 16) + int(self.fold)

    def choices(self, own=(), pool=None, tta=False):
        """The parts of the run's name after the method: choices that are not the default.

        own: those of the method; pool: --pool, if it is not the encoder's default.
        """
        parts = list(own)
        if pool:
            parts.append(pool)
        if self.layer:
            parts.append(f"layer{self.layer}")
        if self.size:
            parts.append(f"{self.size}px")
        if self.crop:
            parts.append(f"crop{self.crop}")
        if tta:
            parts.append("tta")
        if self.by != "case":
            parts.append(f"by{self.by}")
        if self.folds:
            parts.append(f"{self.folds}folds")
        if self.fit != "resize":
            parts.append(self.fit)
        if self.name:
            parts.append(self.name)
        return parts


def configuration(settings, annotations, facts, encoder, source, **base):
    """Content of config.json.

    facts: flags.facts(annotations, …); encoder: has .licence and .weights_hash; source: the flags
    that say where the data is; base: more of what the encoder starts from.
    """
    return {
        "flags": settings.flags(),
        "data": {
            "name": annotations.name,
            "fingerprint": annotations.fingerprint(),
            "classes": list(annotations.classes),
            **facts,
        },
        "encoder": {
            "name": settings.model,
            "licence": encoder.licence,
            "weights_hash": encoder.weights_hash,
            **base,
        },
        "source": source,
        "environment": environment(),
    }


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
    root = Path(__file__).resolve().parent
    command = ["git", "-C", str(root), "describe"]
    command += ["--always", "--dirty", "--abbrev=12", "--match="]
    try:
        git = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
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
    differences = []
    for part in ("flags", "data", "encoder"):
        before, after = old.get(part, {}), new.get(part, {})
        for key in sorted(set(before) | set(after)):
            if part == "flags" and key in ("weights", "adapter"):
                continue  # compared by their hash: where they lie does not matter
            unsaid = not (before.get(key) and after.get(key))
            if part == "data" and key in ("pixels", "mixed_mpp", "classes") and unsaid:
                continue  # runs of earlier versions do not tell
            # Through JSON, so that tuples equal lists and NumPy's numbers equal Python's.
            was = json.dumps(before.get(key), default=common.plain, sort_keys=True)
            now = json.dumps(after.get(key), default=common.plain, sort_keys=True)
            if was == now:
                continue
            if (part, key) == ("data", "pixels"):
                differences.append("the images or their µm/px are not those of the run any more")
                continue
            name = f"{part} {key}"
            if part == "flags":
                name = f"--{key.replace('_', '-')}"
            differences.append(f"{name} (was {was}, now {now})")
    return differences


# ---------------------------------------------------------------- the folder


def run_path(
    root, data, model, method, frac, fold, domain=None, suffixes=(), domains=(), leave_out=None
):
    """Folder of a run.

    method: probe | lora | full; suffixes: Settings.choices(…), e.g. ("r8",); domains: all of the
    dataset's, so that two of them never share a folder; leave_out: the domain that was left out.
    """
    share = f"frac{frac:g}"
    word = "domain"
    if leave_out:
        word, domain = "without", leave_out
    if domain:
        name = f"{word}{domain}"
        clashes = [other for other in domains if _folder_key(other) == _folder_key(domain)]
        # The plain name goes to the domain that is spelled like it.
        clashes.sort(key=lambda other: (other != common.file_name(other), other))
        if domain in clashes[1:]:
            name += "-" + hashlib.sha256(str(domain).encode()).hexdigest()[:6]
        share = name if frac == 1 else f"{name}-{share}"
    path = Path(root)
    for part in (data, "-".join([model, method, *suffixes]), f"{share}-fold{fold}"):
        path = path / common.file_name(part)
    return path


def folder(root, settings, choices, domains):
    """run_path of a run with these Settings; choices: Settings.choices(…)."""
    return run_path(
        root,
        settings.data,
        settings.model,
        settings.method,
        settings.frac,
        settings.fold,
        settings.domain,
        choices,
        [str(domain) for domain in domains],
        settings.leave_out,
    )


def _folder_key(domain):
    # Some file systems do not tell upper from lower case.
    return common.file_name(domain).casefold()


class Run:
    """An opened run folder; holds its lock until close() or the end of the process."""

    def __init__(self, path, config, finished, lock):
        self.path, self.config, self.finished, self._lock = path, config, finished, lock
        self.checkpoint = path / "checkpoint.safetensors"

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def log(self, row):
        """Append a row (dict) to log.csv as one whole line, the first time with a header."""
        path = self.path / "log.csv"
        text = ",".join(_cell(value) for value in row.values()) + "\n"
        if not path.exists() or path.stat().st_size == 0:
            text = ",".join(row) + "\n" + text
        # One write call: after a kill the line is whole, or missing.
        binary = getattr(os, "O_BINARY", 0)  # Windows: no \r before \n
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | binary, 0o666)
        try:
            os.write(handle, text.encode())
        finally:
            os.close(handle)

    def truncate_log(self, rows):
        """Keep the first `rows` rows of log.csv; training repeats what came after them."""
        path = self.path / "log.csv"
        if path.exists():
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = lines[: rows + 1] if rows else []  # the header is written with the first row
            common.write_text(path, "".join(kept))

    def complete_log(self, values):
        """Fill cells of log.csv that were left blank: {epoch: {column: value}}."""
        path = self.path / "log.csv"
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        for row in rows:
            row.update(values.get(int(row["epoch"]), {}))
        lines = [list(rows[0]), *(map(_cell, row.values()) for row in rows)]
        common.write_text(path, "".join(",".join(line) + "\n" for line in lines))

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
    if isinstance(value, (float, np.floating)):
        return repr(float(value))  # all digits
    return str(value)


def open_run(path, config, resume=False, force=False):
    """Open or make the run folder `path` for `config` → a locked Run.

    `.finished` is True if the same configuration is done already: nothing is left to do. The parts
    "flags", "data" and "encoder" are compared. `force` clears what the former run wrote.
    UserError: another process works on the run; it was done or begun with another configuration
    (the flags are named); it was begun and neither `resume` nor `force` is given; the folder holds
    something, but no config.json.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    # With some patience: evaluate.py holds the lock for a moment to see whether it is free.
    lock = common.try_lock(path / "lock", seconds=1)
    if lock is None:
        raise UserError(f"{path}: another process works on this run; wait for it or stop it")
    try:
        for rest in path.glob(".*.tmp"):  # of a process that was killed while it wrote
            if rest.is_file():  # export.py works in a folder, and may still be running
                rest.unlink(missing_ok=True)
        if force:
            _clear(path)
        if (path / "config.json").exists():
            return _reopened(path, config, resume, lock)
        others = sorted(p.name for p in path.iterdir() if p.name != "lock" and p.is_file())
        if others and not force:
            raise UserError(
                f"{path}: holds files ({', '.join(others[:3])}) but no config.json: not the "
                "folder of a run, or a damaged one; empty it, use another --runs folder, or "
                "--force to delete what a run wrote there"
            )
        # Through JSON once, so that a new and a reopened run hold equal values.
        config = json.loads(json.dumps(config, default=common.plain))
        common.write_json(path / "config.json", config)
        return Run(path, config, False, lock)
    except BaseException:
        lock.release()
        raise


def _reopened(path, config, resume, lock):
    """The Run of a folder with a config.json; UserError if it is not to be continued."""
    old = common.read_json(path / "config.json")
    if not isinstance(old, dict):
        raise UserError(f"{path}/config.json: not the configuration of a run; restore it")
    finished = (path / "metrics.json").exists()
    differences = differing(old, config)
    if differences:
        state = "done" if finished else "begun"
        raise UserError(
            f"{path}: this run was {state} with other settings: "
            f"{'; '.join(differences)}. Repeat it with --force, or give it a name of its own "
            "with --name TAG"
        )
    if not finished and not resume:
        raise UserError(
            f"{path}: this run was begun and is not finished; continue it with --resume, or start "
            "it over with --force"
        )
    return Run(path, old, finished, lock)


def _clear(path):
    """Delete what a run wrote.

    metrics.json goes first and config.json last: whenever this is killed, the folder is an
    unfinished run.
    """
    for pattern in WRITTEN:
        for file in path.glob(pattern):
            if file.is_file() or file.is_symlink():
                file.unlink()


# ---------------------------------------------------------------- predictions


def write_predictions(path, rows):
    """Write predictions.csv, all digits. rows: dict of equally long arrays, one per
    PREDICTION_COLUMNS, and of GROUP_COLUMNS those that there are.
    """
    groups = [name for name in GROUP_COLUMNS if name in rows]
    columns = [rows[name] for name in (*PREDICTION_COLUMNS, *groups)]
    if len({len(column) for column in columns}) != 1:
        raise ValueError("the columns differ in length")
    with (
        common.atomic(path) as temporary,
        open(temporary, "w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*PREDICTION_COLUMNS, *groups])
        for row in zip(*columns):
            texts, (label, logit, probability), own = row[:4], row[4:7], row[7:]
            numbers = int(label), repr(float(logit)), repr(float(probability))
            writer.writerow([*texts, *numbers, *own])


def predictions(sets):
    """Columns for write_predictions of [(name of the set, Annotations, its rows, their logits)]."""
    sets = list(sets)
    groups = []
    for name in GROUP_COLUMNS:
        if any(getattr(table, name) is not None for _, table, _, _ in sets):
            groups.append(name)
    columns = {name: [] for name in (*PREDICTION_COLUMNS, *groups)}
    for name, table, rows, logits in sets:
        logits = np.asarray(logits, np.float64)
        columns["set"].extend([name] * len(rows))
        columns["id"].extend(table.id[rows])
        columns["case"].extend(table.case[rows])
        columns["domain"].extend(table.domain[rows])
        columns["label"].extend(table.label[rows])
        columns["logit"].extend(logits)
        columns["probability"].extend(1 / (1 + np.exp(-logits.clip(-700, 700))))
        for group in groups:
            values = getattr(table, group)
            columns[group].extend([""] * len(rows) if values is None else values[rows])
    return {name: np.asarray(values) for name, values in columns.items()}


def add_predictions(path, columns):
    """Add sets to the predictions.csv of a finished run, in place of its sets of the same names.

    Returns all columns, old and new.
    """
    old = read_predictions(path)
    keep = ~np.isin(old["set"], np.unique(columns["set"]))
    both = {}
    for name in (*PREDICTION_COLUMNS, *GROUP_COLUMNS):
        if name in old or name in columns:
            parts = []
            for part in (old, columns):
                parts.append(part.get(name, np.full(len(part["set"]), "")))
            both[name] = np.concatenate([parts[0][keep], parts[1]])
    write_predictions(path, both)
    return both


def pending_tests(path, tests):
    """Those of `tests` (Annotations of --test) on which the finished run at `path` has no results.

    UserError if it has results on another dataset of the same name.
    """
    metrics, pending = common.read_json(Path(path) / "metrics.json"), []
    for other in tests:
        if other.name not in metrics["sets"]:
            pending.append(other)
        elif metrics.get("tests", {}).get(other.name, other.fingerprint()) != other.fingerprint():
            raise UserError(
                f"{path}: has results on another dataset called {other.name}, or on these "
                "annotations before they were changed; rename the file, or repeat the run with "
                "--force"
            )
    return pending


def finish_tests(path, metrics, tests):
    """Write metrics.json of a run with further test sets.

    It is written after predictions.csv: after a kill between the two, the tests are computed again.
    """
    old = common.read_json(Path(path) / "metrics.json")
    known = old.get("tests", {}) | {other.name: other.fingerprint() for other in tests}
    common.write_json(Path(path) / "metrics.json", {**old, **metrics, "tests": known})


def sets_of(split):
    """{name: ids} of the sets that a run predicts: validation, test, other domains."""
    return {"val": split.val, "test": split.test, **split.others}


def one_class(annotations, split):
    """Lines about the validation and test sets of a split that hold one class only."""
    lines = []
    for name, ids in sets_of(split).items():
        line = one_class_line(name, annotations.label[annotations.rows(ids)])
        if line:
            lines.append(f"{annotations.name}, fold {split.settings['fold']}: {line}")
    return lines


def one_class_line(name, labels):
    """What is wrong with a set that holds one class only; None if it holds both."""
    positives = int(np.sum(labels))
    if len(labels) and positives not in (0, len(labels)):
        return None
    held = "no annotation"
    if len(labels):
        held = f"label {min(positives, 1)} only"
    title = SETS.get(name, f"test set {name}")
    return f"the {title} holds {held}: balanced accuracy and AUROC are undefined on it"


METRICS_HEADER = ("run", "set", "patches", "balanced acc", "weighted F1", "AUROC")


def metric_rows(path, metrics, only=None):
    """Rows of the table that train.py and probe.py print (METRICS_HEADER), one per test set."""
    rows = []
    for name, values in metrics["sets"].items():
        if name == "val" or (only is not None and name not in only):
            continue
        scores = [values[key] for key in ("balanced_accuracy", "weighted_f1", "auroc")]
        if values["auroc"] is None:  # one class only: a weighted F1 of 1.000 would mean nothing
            scores = [None] * 3
        texts = ["–" if score is None else f"{score:.3f}" for score in scores]
        rows.append((str(path), name, values["n"], *texts))
    return rows


def print_metrics(rows):
    """Print the table of metric_rows, if there are any."""
    if rows:
        print(common.table(rows, METRICS_HEADER, right=(2, 3, 4, 5)))


def read_predictions(path):
    """predictions.csv as a dict of arrays: PREDICTION_COLUMNS, and those of GROUP_COLUMNS that it
    has; UserError naming the line if it is damaged.
    """
    rows, number = [], 1
    try:
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.reader(file)
            header = tuple(next(reader, ()))
            groups = header[len(PREDICTION_COLUMNS) :]
            known = tuple(name for name in GROUP_COLUMNS if name in groups)
            if header != (*PREDICTION_COLUMNS, *known):
                raise UserError(
                    f"{path}: not a predictions file (columns {', '.join(PREDICTION_COLUMNS)} "
                    "expected)"
                )
            for number, row in enumerate(reader, start=2):
                try:
                    *texts, label, logit, probability = row[: len(PREDICTION_COLUMNS)]
                    if len(row) != len(header) or label not in ("0", "1"):
                        raise ValueError
                    numbers = int(label), float(logit), float(probability)
                    rows.append((*texts, *numbers, *row[len(PREDICTION_COLUMNS) :]))
                except ValueError:
                    raise UserError(
                        f"{path}, line {number}: not a row of predictions; the file is damaged"
                    ) from None
        with open(path, "rb") as file:
            file.seek(-1, os.SEEK_END)
            if file.read() != b"\n":  # a last number may have lost its last digits
                raise UserError(f"{path}, line {number}: cut off; the file is damaged")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not a readable CSV file ({error})") from None
    columns = list(zip(*rows)) or [()] * len(header)
    types = (str, str, str, str, np.int8, np.float64, np.float64, *[str] * len(groups))
    return {
        name: np.array(column, dtype=kind) for name, column, kind in zip(header, columns, types)
    }
