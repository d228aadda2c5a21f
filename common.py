"""What every command shares: errors of the user, progress, tables, files that appear whole. No
torch.
"""

import contextlib
import errno
import json
import os
import re
import sys
import tempfile
import time
from pathlib import Path

import filelock
import numpy as np

NAME = "mitfig"  # of this software, in the files that it writes
VERSION = "1.0.0"  # see CHANGELOG.md


class UserError(Exception):
    """A mistake of the user, or bad input: one line that says what is wrong and what to do. Exit
    status 2.
    """


def command(main):
    """Run `main()` as a command line program: users' mistakes end with one line on stderr, never a
    traceback.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal without µ or ± shows a question mark
    try:
        status = main()
        sys.stdout.flush()
        sys.exit(status or 0)
    except UserError as error:
        fail(str(error))
    except KeyboardInterrupt:
        print(
            "stopped; what was finished is kept, the same command with --resume (where it has "
            "one) continues",
            file=sys.stderr,
        )
        sys.exit(130)
    except BrokenPipeError:  # `... | head`: the reader went away, which is no error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except MemoryError:
        fail("out of memory: use a smaller --batch-size or fewer --workers")
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which need not be there
            raise
        fail("out of GPU memory: use a smaller --batch-size")
    except OSError as error:
        # Only what the user can mend is shortened to a line; any other OSError is a bug and keeps
        # its traceback.
        advice = {
            errno.ENOSPC: "the disk is full: make room, then run the same command again",
            errno.EDQUOT: "the disk quota is used up: make room, then run the same command again",
            errno.EACCES: "no permission",
            errno.EPERM: "no permission",
            errno.EROFS: "read-only file system",
            errno.ENOENT: "no such file or folder",
            errno.EISDIR: "this is a folder, a file is needed",
            errno.ENOTDIR: "this is a file, a folder is needed",
            errno.EEXIST: "is there already, and is no folder",
            errno.EBUSY: "in use by the system",
            errno.ENAMETOOLONG: "too long a name",
            errno.EIO: "the disk cannot be read or written",
            errno.ESTALE: "the network drive has lost this file: try again",
        }.get(error.errno)
        if advice is None:
            raise
        fail(f"{error.filename}: {advice}" if error.filename else advice)


def fail(message):
    print("error: " + printable(" ".join(message.split())), file=sys.stderr)
    sys.exit(2)


def printable(text):
    """`text` without control characters, for terminals and reports: "\\x1b" instead of an escape.

    Names come from files of others. Line breaks, terminal escapes, marks that turn the direction of
    writing and halves of surrogate pairs show as their escapes.
    """
    text = str(text)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def progress(items=None, total=None, desc="", unit="it"):
    """A progress bar over `items` (or, without items, an object with .update(n),
    .set_postfix_str(s) and .close()).

    On a terminal it is tqdm's bar; elsewhere (log files, CI) a plain line every ten seconds.
    """
    if total is None and items is not None:
        total = len(items)
    if sys.stderr.isatty():
        from tqdm import tqdm

        return tqdm(items, total=total, desc=desc, unit=unit, dynamic_ncols=True, smoothing=0.1)
    return PlainProgress(items, total, desc, unit)


class PlainProgress:
    """tqdm's interface, as far as it is used here, in whole lines: a log file stays readable."""

    def __init__(self, items, total, desc, unit, every=10.0):
        self.items, self.total, self.desc, self.unit, self.every = items, total, desc, unit, every
        self.n, self.note = 0, ""
        self.start = self.last = time.monotonic()

    def __iter__(self):
        for item in self.items:
            yield item
            self.update(1)
        self.close()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def update(self, n=1):
        self.n += n
        now = time.monotonic()
        if now - self.last >= self.every:
            self.last = now
            rate = self.n / (now - self.start)
            left = f", {(self.total - self.n) / rate:.0f} s left" if self.total and rate else ""
            of = f"/{self.total}" if self.total else ""
            print(
                f"{self.desc}: {self.n}{of} {self.unit}, {rate:.1f} {self.unit}/s{left} "
                f"{self.note}".rstrip(),
                file=sys.stderr,
                flush=True,
            )

    def set_postfix_str(self, note, refresh=True):
        self.note = note

    def close(self):
        pass


def table(rows, header, right=()):
    """Rows of strings as text in aligned columns; `right`: indices of the columns to align to the
    right.
    """
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in [list(header), *rows]) for i in range(len(header))]

    def line(cells):
        return "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(cells, widths))
        ).rstrip()

    return "\n".join([line(header), "  ".join("-" * width for width in widths), *map(line, rows)])


# ---------------------------------------------------------------- files


@contextlib.contextmanager
def atomic(path):
    """Yield a temporary path beside `path`; on success it replaces `path` in one step, on an error
    it is removed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp makes private files; a result is as readable as any other file of the user's.
        temporary.chmod(0o666 & ~_umask())
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        code = re.search(r"\(os error (\d+)\)$", str(error))
        # a library in Rust (safetensors) wrote the file: what the system said stands in the text
        # alone
        if code:
            raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error
        raise


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def try_lock(path, seconds=0.0):
    """Lock the file `path` → the lock (release it with .release()), or None if another process
    still holds it after `seconds`. Any end of the process releases it."""
    # Not thread-local: some runs are opened by one thread and closed by another.
    lock = filelock.FileLock(path, timeout=seconds, thread_local=False)
    try:
        lock.acquire()
    except filelock.Timeout:
        return None
    return lock


@contextlib.contextmanager
def exclusive(path):
    """Hold the lock file `path`; waits for another process that holds it, and says so."""
    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=1)
    except filelock.Timeout:
        print(f"{path}: another process holds this lock; waiting for it", file=sys.stderr)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def write_text(path, text):
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path, value):
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, default=_plain) + "\n")


def _plain(value):
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


def read_json(path):
    """The content of a JSON file; UserError where it is missing or broken."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path}: not a readable JSON file ({error}); delete it or restore it"
        ) from None


def file_name(text):
    """`text` as the name of a file or folder: nothing in it leads elsewhere."""
    return "".join(c if c.isalnum() or c in "-_.+" else "_" for c in str(text)).lstrip(".")
