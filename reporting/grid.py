"""How far a sweep has come: what of its grid is done, running, failed and missing. No torch."""

import os
import shlex
import subprocess
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

import common
from common import UserError
from reporting import results

GRID_MARK = "# grid: --list prints the commands and runs none of them"
# Flags that go into a run's name: a command that gives none of them means the run without such an
# addition.
NAMED = {
    "rank",
    "alpha",
    "dropout",
    "targets",
    "dora",
    "rslora",
    "pool",
    "layer",
    "fit",
    "tta",
    "C",
    "standardize",
    "k",
    "shots",
}


def grid_commands(text):
    """The commands of a sweep, as lists of words. The sweep is asked to list them, and can start
    none of them.
    """
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UserError(f"--grid {text}: not a command of a shell ({error})") from None
    script = Path(words[0]) if words else Path()
    if not script.is_file():
        raise UserError(f"--grid {text}: there is no such script")
    # A script that does not know --list might train: only those that say so are run, and python is
    # not python there.
    if GRID_MARK not in script.read_text(encoding="utf-8", errors="replace").splitlines():
        raise UserError(
            f"--grid {script}: not a sweep that can list its commands (it lacks the line "
            f"'{GRID_MARK}')"
        )
    try:
        listed = subprocess.run(
            ["bash", str(script), "--list", *words[1:]],
            capture_output=True,
            text=True,
            timeout=60,
            env=os.environ | {"PYTHON": "false"},
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise UserError(f"--grid {script}: did not list its commands within a minute") from None
    if listed.returncode:
        raise UserError(
            f"--grid {script}: {(listed.stderr.strip().splitlines() or ['failed'])[-1]}"
        )
    return [
        shlex.split(line)
        for line in listed.stdout.splitlines()
        if " train.py " in line or " probe.py " in line
    ]


def cells(command):
    """The runs one command makes: dicts of the flags that it names, one per fraction, fold and
    domain.
    """
    script = next(Path(word).name for word in command if word.endswith(".py"))
    given, flag = {}, None
    for word in command[command.index(next(w for w in command if w.endswith(".py"))) + 1 :]:
        if word.startswith("--"):
            flag = word[2:].replace("-", "_")
            given[flag] = []
        elif flag:
            given[flag].append(word)
    method = "probe" if script == "probe.py" else "lora" if "lora" in given else "full"
    folder = str(
        Path(__file__).resolve().parent / (given.get("runs") or ["runs"])[-1]
    )  # where the sweeps run
    fixed = {
        "data": (given.get("data") or ["demo"])[-1],
        "model": (given.get("model") or ["demo"])[-1],
        "method": method,
        "by": (given.get("split") or ["case"])[-1],
    }
    for key in ("seed", "val_frac", "epochs", "epoch_size", "rank", "pool", "layer"):
        if given.get(key):
            fixed[key] = given[key][-1]
    fixed.setdefault("seed", "0")
    if not NAMED & given.keys():
        fixed["label"] = f"{fixed['model']}-{method}"
    return [
        fixed
        | {"runs": folder, "frac": frac, "fold": fold, "domain": domain}
        | ({"probe": probe} if probe else {})
        for probe in (given.get("probe") or ["uni" if method == "probe" else None])
        for domain in (given.get("domain") or [None])
        for frac in map(float, given.get("frac") or ["1"])
        for fold in map(int, given.get("fold") or ["0"])
    ]


def _same(wanted, flags, label, source):
    """Whether a run of these flags, in a folder of this name, on the data of this place, is the
    wanted one.
    """
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
            value = (
                have if str(source.get("data")) in (value, os.path.realpath(path)) else path.name
            )
        if str(have) != str(value) and not (
            _number(have) is not None and _number(have) == _number(value)
        ):
            return False
    return True


def _number(value):
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def grid(text, roots):
    """Text that says of each cell of a sweep whether it is done, running, failed or missing, and
    the time left.

    roots: folders of runs beside those that the sweep writes to. A run that does not count for
    being damaged has failed, too."""
    wanted = [cell for command in grid_commands(text) for cell in cells(command)]
    roots = [*roots, *sorted({cell["runs"] for cell in wanted})]
    found, problems = results.collect([root for root in roots if Path(root).is_dir()])
    unfinished = []
    for path, _ in problems:
        try:
            config = common.read_json(path / "config.json")
            unfinished.append((path, dict(config["flags"]), results.source_of(config)))
        except (UserError, KeyError, TypeError, ValueError):
            continue
    state, left, took = Counter(), defaultdict(lambda: defaultdict(list)), defaultdict(list)
    lines, seconds, unknown = [], 0.0, 0
    for run in found:
        took[run.model, run.method].append(run.seconds)
        took[None, run.method].append(run.seconds)
    for cell in wanted:
        key = (cell["data"], cell["model"], cell["method"])
        begun = next(
            (
                path
                for path, have, source in unfinished
                if _same(cell, have, path.parent.name, source)
            ),
            None,
        )
        if any(_same(cell, run.flags, run.label, run.source) for run in found):
            what = "done"
        elif begun is not None:
            what = "running" if results.is_locked(begun) else "failed"
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
    rows = [
        [*key, *(state[key, what] for what in ("done", "running", "failed", "missing"))]
        for key in keys
    ]
    header = ("data", "model", "method", "done", "running", "failed", "missing")
    lines.append(common.table(rows, header, right=range(3, 7)))
    for what in ("failed", "running", "missing"):
        lines += [f"{what}: {place}, fold {' '.join(folds)}" for place, folds in left[what].items()]
    total = sum(len(folds) for places in left.values() for folds in places.values())
    if total:
        hours = (
            f"about {seconds / 3600:.1f} h"
            if seconds >= 5400
            else f"about {max(1, round(seconds / 60))} min"
        )
        lines.append(
            f"{total} of {len(wanted)} runs are left: "
            + (
                f"{hours} one after the other, by the time that finished runs took"
                if unknown < total
                else "no finished run tells how long they take"
            )
            + (
                f"; {unknown} of them not counted (no such run finished yet)"
                if 0 < unknown < total
                else ""
            )
        )
    else:
        lines.append(f"all {len(wanted)} runs are done")
    return "\n".join(lines)
