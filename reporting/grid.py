"""Progress of a sweep: which runs of its grid are done, running, failed or missing."""

import argparse
import os
import shlex
import subprocess
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

import common
import flags
from common import UserError
from reporting import results

ROOT = Path(__file__).resolve().parent.parent  # where the sweeps run
GRID_MARK = "# grid: --list prints the commands and runs none of them"
# Flags whose choices go into a run's name: without any of them the run has no such addition.
NAMED = (
    "rank",
    "alpha",
    "dropout",
    "targets",
    "dora",
    "rslora",
    "pool",
    "layer",
    "size",
    "crop",
    "name",
    "loss",
    "class_weight",
    "augment",
    "soft_labels",
    "val_patches",
    "fit",
    "tta",
    "C",
    "standardize",
    "k",
    "shots",
    "adapter",
)
# Flags that must agree with the run's if a command gives them.
COMPARED = ("val_frac", "epochs", "epoch_size", "rank", "pool", "layer", "balance")
# Flags that must agree also if the command does not give them: a run's configuration holds them
# only if they are not this default.
OPTIONAL = {
    "size": None,
    "crop": None,
    "name": None,
    "loss": "bce",
    "class_weight": None,
    "augment": "paper",
    "soft_labels": None,
    "weight_decay": "0",
    "patience": None,
    "val_patches": None,
}
STATES = ("done", "running", "failed", "missing")


# ---------------------------------------------------------------- what a sweep consists of


def grid_commands(text):
    """The commands of a sweep, as lists of words. The sweep is asked to list them and cannot start
    any.
    """
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UserError(f"--grid {text}: not a shell command ({error})") from None
    script = Path(words[0]) if words else Path()
    if not script.is_file():
        raise UserError(f"--grid {text}: no such script")
    # A script that does not know --list might train: only those that say so are run, and with a
    # python that does nothing.
    if GRID_MARK not in script.read_text(encoding="utf-8", errors="replace").splitlines():
        raise UserError(
            f"--grid {script}: not a sweep that can list its commands (it lacks the line "
            f"'{GRID_MARK}')"
        )
    try:
        listing = subprocess.run(
            ["bash", str(script), "--list", *words[1:]],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=60,
            env=os.environ | {"PYTHON": "false"},
            check=False,
        )
    except FileNotFoundError:
        raise UserError(
            f"--grid {script}: sweeps are shell scripts, and there is no bash here (on Windows "
            "install Git for Windows or WSL)"
        ) from None
    except subprocess.TimeoutExpired:
        raise UserError(f"--grid {script}: did not list its commands within a minute") from None
    if listing.returncode:
        lines = listing.stderr.strip().splitlines() or ["failed"]
        raise UserError(f"--grid {script}: {lines[-1]}")
    return [
        shlex.split(line)
        for line in listing.stdout.splitlines()
        if " train.py " in line or " probe.py " in line
    ]


class _Parser(argparse.ArgumentParser):
    """Flags are read as train.py and probe.py read them; mistakes are those of the sweep."""

    def error(self, message):
        raise UserError(f"--grid: the sweep lists a command with a mistake: {message}")


def _parser():
    """Parser of the flags of train.py and probe.py that say which runs a command makes. Most are
    the shared ones of flags.py; a test compares the others with both commands."""
    parser = _Parser(allow_abbrev=False, add_help=False)
    flags.add_arguments(parser)
    flags.add_split_arguments(parser)
    flags.add_run_arguments(parser)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--probe", nargs="+", default=["uni"])
    return parser


def cells(command):
    """The runs that one command makes, as dicts: what must agree with the flags of a run ("data",
    "model", "method", what flags.split_grid gives, OPTIONAL, and of COMPARED what the command
    gives), "runs": their folder, "probe", "label": the name of their folder if it has no additions.
    """
    position = next(i for i, word in enumerate(command) if word.endswith(".py"))
    words = command[position + 1 :]
    args, others = _parser().parse_known_args(words)
    given = _given(words)
    given = {key: value for key, value in given.items() if OPTIONAL.get(key, "") != value}
    if Path(command[position]).name == "probe.py":
        method, probes = "probe", args.probe
    else:
        method, probes = ("lora" if args.lora else "full"), [None]

    fixed = {
        "runs": str(ROOT / args.runs),
        "data": args.data or "demo",
        "model": args.model,
        "method": method,
        "domain": None,
        "leave_out": None,
    }
    fixed |= {name: given[name] for name in COMPARED if name in given}
    fixed |= {name: given.get(name) for name in OPTIONAL}
    if not given.keys() & set(NAMED):
        fixed["label"] = f"{args.model}-{method}"
    runs = []
    for probe in probes:
        for split in flags.split_grid(args):
            cell = fixed | {key: value for key, value in split.items() if key != "val_frac"}
            if probe:
                cell["probe"] = probe
            runs.append(cell)
    return runs


def _given(words):
    """{flag without dashes: its last value, True without one} of a command's words."""
    given, name = {}, None
    for word in words:
        if word.startswith("--"):
            name = word[2:].replace("-", "_")
            given[name] = True
        elif name:
            given[name] = word
    return given


# ---------------------------------------------------------------- what of it exists


def _is_cell(cell, run_flags, label, source):
    """Whether a run is the one of a cell. run_flags, source: of its config.json; label: name of its
    model's folder.
    """
    for key, value in cell.items():
        current = run_flags.get(key)
        if key == "runs":
            continue
        if key == "data":
            if not _same_data(value, current, str(source.get("data"))):
                return False
            continue
        if key == "label":
            current = label.replace(f"-by{cell['by']}", "").replace(f"-{cell['folds']}folds", "")
            if cell.get("probe", "uni") != "uni":
                value = f"{value}-{cell['probe']}"
        if str(current) != str(value) and not _same_number(current, value):
            return False
    return True


def _same_data(value, name, source):
    """Whether --data `value` means the dataset that a run calls `name` and read from `source`: by
    name, or by a path seen from the sweeps' folder.
    """
    path = ROOT / value
    return source in (value, os.path.realpath(path)) or name == path.name


def _same_number(a, b):
    try:
        return float(a) == float(b)
    except (TypeError, ValueError):
        return False


def _unfinished(problems):
    """(path, flags, source) of the runs that do not count, if their config.json can be read."""
    unfinished = []
    for path, _ in problems:
        try:
            config = common.read_json(path / "config.json")
            unfinished.append((path, dict(config["flags"]), results.source_of(config)))
        except (UserError, OSError, AttributeError, KeyError, TypeError, ValueError):
            continue
    return unfinished


def _state(cell, finished, unfinished):
    """One of STATES."""
    if any(_is_cell(cell, run.flags, run.label, run.source) for run in finished):
        return "done"
    for path, run_flags, source in unfinished:
        if _is_cell(cell, run_flags, path.parent.name, source):
            return "running" if results.is_locked(path) else "failed"
    return "missing"


def grid(text, roots):
    """Text that tells of each run of a sweep whether it is done, running, failed or missing, and
    the time left.

    roots: folders of runs beside those that the sweep writes to. A damaged run counts as failed."""
    grid_cells = [cell for command in grid_commands(text) for cell in cells(command)]
    roots = [*roots, *sorted({cell["runs"] for cell in grid_cells})]
    finished, problems = results.collect([root for root in roots if Path(root).is_dir()])
    unfinished = _unfinished(problems)
    took = defaultdict(list)  # seconds of finished runs, by (model or None, method)
    for run in finished:
        took[run.model, run.method].append(run.seconds)
        took[None, run.method].append(run.seconds)

    counts, left = Counter(), defaultdict(lambda: defaultdict(list))
    seconds, untimed = 0.0, 0
    for cell in grid_cells:
        data, model, method = cell["data"], cell["model"], cell["method"]
        shown = method  # two tags are two rows
        if cell.get("name"):
            shown = f"{method}-{cell['name']}"
        key = data, model, shown
        state = _state(cell, finished, unfinished)
        counts[key, state] += 1
        if state == "done":
            continue
        known = took.get((model, method)) or took.get((None, method))
        if known:
            seconds += float(np.median(known))
        else:
            untimed += 1
        place = f"frac {cell['frac']:g}"
        if cell["domain"] or cell["leave_out"]:
            place = f"domain {cell['domain']}"
            if cell["leave_out"]:
                place = f"all but {cell['leave_out']}"
        left[state][f"{model}-{shown} on {data}, {place}"].append(str(cell["fold"]))

    keys = sorted({key for key, _ in counts})
    rows = [[*key, *(counts[key, state] for state in STATES)] for key in keys]
    lines = [common.table(rows, ("data", "model", "method", *STATES), right=range(3, 7))]
    for state in ("failed", "running", "missing"):
        for place, folds in left[state].items():
            lines.append(common.printable(f"{state}: {place}, fold {' '.join(folds)}"))
    lines.append(_time_left(counts, seconds, untimed))
    return "\n".join(lines)


def _time_left(counts, seconds, untimed):
    """The last line: how many runs are left and how long they take. untimed: those of which no such
    run has finished yet.
    """
    total = sum(counts.values())
    left = total - sum(count for (_, state), count in counts.items() if state == "done")
    if not left:
        return f"all {total} runs are done"
    if untimed == left:
        return f"{left} of {total} runs are left: no finished run tells how long they take"
    hours = f"about {max(1, round(seconds / 60))} min"
    if seconds >= 5400:
        hours = f"about {seconds / 3600:.1f} h"
    line = (
        f"{left} of {total} runs are left: {hours} one after the other, by the time that finished "
        "runs took"
    )
    if untimed:
        line += f"; {untimed} of them not counted (no such run finished yet)"
    return line
