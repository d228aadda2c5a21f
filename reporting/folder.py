"""The folder of a report. A list in it (report.json) says which files evaluate.py wrote: only these
are replaced or removed."""

import csv
import io
import os
from pathlib import Path

import common
from common import UserError

LIST = "report.json"
FORMAT = f"{common.NAME}-report"
# Reports of versions without a list are known by the start of these files.
MARKS = {
    "index.html": "<!doctype html>",
    "results.csv": "run,data,model,method,label,",
    "detection.csv": "domain,images,figures,candidates,",
}


def csv_text(rows, header=None):
    """Rows (dicts) as CSV; None is an empty cell, numbers keep all digits."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, header or list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: _cell(value) for key, value in row.items()} for row in rows)
    return buffer.getvalue()


def _cell(value):
    """A cell that spreadsheets show as it is: text that they would compute gets an apostrophe."""
    if not isinstance(value, str):
        return value
    value = common.printable(value)
    return f"'{value}" if value.startswith(("=", "+", "-", "@")) else value


def _listed(out):
    """{part: names} of the files that evaluate.py wrote into the folder `out`; {} for a new one."""
    path = out / LIST
    if path.exists() or path.is_symlink():
        content = common.read_json(path)
        parts = content.get("files") if isinstance(content, dict) else None
        if not isinstance(parts, dict) or content.get("format") != FORMAT:
            raise UserError(f"{path}: not the list of a report; choose another folder with --out")
        listed = {}
        for part, names in parts.items():
            if not isinstance(names, list):
                raise UserError(f"{path}: damaged; delete it, or choose another folder with --out")
            # Nothing in a list that was changed by hand leads out of the folder.
            listed[part] = {name for name in map(str, names) if common.file_name(name) == name}
        return listed
    return {}


def _of_earlier_version(out):
    """Whether a version that kept no list wrote the report in `out`."""
    marked = [name for name in MARKS if (out / name).is_file()]
    for name in marked:
        with open(out / name, encoding="utf-8", errors="replace") as file:
            if not file.read(100).startswith(MARKS[name]):
                return False
    return "results.csv" in marked or "detection.csv" in marked


def _refuse_foreign(out, names):
    """UserError if one of `names` in `out` is not a file that evaluate.py wrote."""
    known = set().union(*_listed(out).values())
    earlier = not known and _of_earlier_version(out)
    for name in sorted(names):
        path = out / name
        if not os.path.lexists(path):
            continue
        if path.is_symlink() or not path.is_file():
            raise UserError(f"{path}: not a regular file; choose another folder with --out")
        if name not in known and not earlier:
            raise UserError(
                f"{path}: evaluate.py did not write this file; choose another folder with --out"
            )


def check(out, names, inputs=()):
    """UserError, before any work, if the report could not be written to the folder `out`, or would
    replace one of `names` that is not a report's, or an input."""
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: this is a file; name a folder")
    if any((out / name).is_file() for name in ("config.json", "predictions.csv")):
        raise UserError(f"--out {out}: this is the folder of a run; name another one")
    _refuse_foreign(out, names)
    written = {*names, LIST}.union(*_listed(out).values())
    for path in inputs:
        if Path(path).exists() and any(
            (out / name).exists() and os.path.samefile(out / name, path) for name in written
        ):
            raise UserError(f"{path}: is read and would be replaced; choose another folder --out")
    folder = out
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir():
        raise UserError(f"--out {out}: {folder}: this is a file; name a folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"--out {out}: no permission to write in {folder}; name another folder")


def write(out, part, files):
    """Write `files` (name → text or bytes) into the folder `out` and remove those that an earlier
    report wrote and this one lacks. part: "runs" or "detection", which share a folder.

    The list names all files before the first is written: at whatever moment this is killed, the
    same command run again leaves the same files."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    with common.exclusive(out / ".lock"):
        _refuse_foreign(out, files)
        parts = _listed(out)
        earlier = parts.get(part, set())
        _write_list(out, parts | {part: earlier | files.keys()})
        for name in {*earlier, *files, LIST}:  # of a process that was killed
            for rest in out.glob(f".{name}.*.tmp"):
                rest.unlink(missing_ok=True)
        for name, content in files.items():
            if isinstance(content, str):
                content = content.encode("utf-8", "backslashreplace")
            with common.atomic(out / name) as temporary:
                temporary.write_bytes(content)
        for name in earlier - files.keys():
            if (out / name).is_file():
                (out / name).unlink()
        _write_list(out, parts | {part: files.keys()})


def _write_list(out, parts):
    files = {part: sorted(names) for part, names in sorted(parts.items())}
    common.write_json(out / LIST, {"format": FORMAT, "files": files})
