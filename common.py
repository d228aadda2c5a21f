"""What every command shares: users' errors, progress, text tables, files that appear whole."""

import contextlib
import errno
import json
import math
import os
import re
import shutil
import stat
import sys
import tempfile
import time
from pathlib import Path

STOPPED = "stopped: finished work is kept; --resume, if the command has it, continues"


def _hide_interrupt(kind, error, trace):
    if issubclass(kind, KeyboardInterrupt):
        print(STOPPED, file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


# Ctrl-C while a command still imports its libraries: one line, as later. Only if this project's
# command is what Python was started with; other programs keep their own behaviour.
_main_file = getattr(sys.modules.get("__main__"), "__file__", None)
if _main_file and Path(__file__).resolve().parent in Path(_main_file).resolve().parents:
    sys.excepthook = _hide_interrupt

import filelock  # noqa: E402  (after the hook: imports take time)
import numpy as np  # noqa: E402

NAME = "mitfig"  # of this software, in the files that it writes
VERSION = "1.0.0"  # see CHANGELOG.md


class UserError(Exception):
    """A user's mistake or bad input: one line that says what is wrong and what to do.

    The command ends with exit status 2.
    """


def note(text):
    """One line on stderr: what a user should know but need not act on."""
    print(text, file=sys.stderr, flush=True)


def first_line(error):
    """What an exception says, in one short line; its type's name if it says nothing."""
    text = str(error).strip()
    return text.splitlines()[0][:160] if text else type(error).__name__


# What the user can mend; any other OSError is a bug and keeps its traceback.
ADVICE = {
    errno.ENOSPC: "the disk is full: make room, then run the same command again",
    errno.EDQUOT: "the disk quota is used up: make room, then run the same command again",
    errno.EFBIG: "the file would be larger than the system allows",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.EROFS: "read-only file system",
    errno.ENOENT: "no such file or folder",
    errno.EISDIR: "this is a folder; name a file",
    errno.ENOTDIR: "this is a file; name a folder",
    errno.EEXIST: "exists already and is not a folder",
    errno.ELOOP: "too many symbolic links",
    errno.EBUSY: "in use by the system",
    errno.ENAMETOOLONG: "the name is too long",
    errno.EMFILE: "too many open files: raise the limit (ulimit -n)",
    errno.EIO: "the disk cannot be read or written",
    errno.ESTALE: "the network drive has lost this file: try again",
}


# Windows' numbers for a file that another program has open, locked or mapped.
IN_USE = (32, 33, 1224)
CLOSE_IT = "another program has this file open; close it, then run the same command again"


def command(main):
    """Run `main()` as a command-line program.

    A user's mistake ends with one line on stderr and exit status 2, Ctrl-C with 130, a closed pipe
    (`… | head`) with 141. Only bugs show a traceback.
    """
    _open_closed_streams()
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
        print(STOPPED, file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        _end_without_reader()
    except MemoryError:
        fail("out of memory: use a smaller --batch-size or fewer --workers")
    except RuntimeError as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's, which need not be imported
            fail("out of GPU memory: use a smaller --batch-size")
        if "can't allocate memory" in str(error):  # torch on the CPU
            fail("out of memory: use a smaller --batch-size")
        raise
    except OSError as error:
        if sys.platform == "win32" and error.errno == errno.EINVAL and error.filename is None:
            _end_without_reader()  # Windows' number for a closed pipe
        advice = ADVICE.get(error.errno)
        if getattr(error, "winerror", None) in IN_USE:
            advice = CLOSE_IT
        if advice is None:
            raise
        fail(f"{error.filename}: {advice}" if error.filename else advice)


def _open_closed_streams():
    """Let a stream that the caller closed (`2>&-`) lead to /dev/null.

    Otherwise it is None, which libraries do not expect, and the next opened file would get its
    number and everything that a library prints.
    """
    for number, name in ((1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is not None:
            continue
        try:
            os.fstat(number)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
        setattr(sys, name, open(os.devnull, "w"))


def _end_without_reader():
    """End the program: what read its output is gone. Its work may be unfinished, so with a status
    that is not 0.
    """
    _drop_output()
    with contextlib.suppress(OSError):
        print("stopped: the program that read the output has ended", file=sys.stderr)
    sys.exit(141)


def _drop_output():
    """Send what is still printed to /dev/null, so that Python's own flush at exit succeeds."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def fail(message):
    """End the program with exit status 2 and `message` as one line on stderr."""
    try:
        sys.stdout.flush()
    except OSError:  # stdout itself is what failed: a full disk, a closed pipe
        _drop_output()
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


def progress(items=None, total=None, desc="", unit="it", quiet=False):
    """A progress bar over `items`, or without items an object with .update(n),
    .set_postfix_str(text) and .close().

    On a terminal it is tqdm's bar; elsewhere (log files, CI) a plain line every ten seconds; with
    `quiet` nothing is shown.
    """
    if total is None and items is not None:
        total = len(items)
    if quiet:
        return PlainProgress(items, total, desc, unit, every=math.inf)
    if sys.stderr.isatty():
        from tqdm import tqdm

        return tqdm(items, total=total, desc=desc, unit=unit, dynamic_ncols=True, smoothing=0.1)
    return PlainProgress(items, total, desc, unit)


class PlainProgress:
    """The part of tqdm's interface that this project uses, in whole lines: logs stay readable."""

    def __init__(self, items, total, desc, unit, every=10.0):
        self.items, self.total = items, total
        self.desc, self.unit = desc, unit
        self.every = every  # seconds between two lines
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
        if now - self.last < self.every:
            return
        self.last = now
        rate = self.n / (now - self.start)
        count, left = str(self.n), ""
        if self.total:
            count += f"/{self.total}"
            if rate:
                left = f", {(self.total - self.n) / rate:.0f} s left"
        line = f"{self.desc}: {count} {self.unit}, {rate:.1f} {self.unit}/s{left} {self.note}"
        print(line.rstrip(), file=sys.stderr, flush=True)

    def set_postfix_str(self, note, refresh=True):
        self.note = note

    def close(self):
        pass


def counted(number, thing):
    """ "1 run", "5 runs"."""
    if number == 1:
        return f"1 {thing}"
    return f"{number} {thing}s"


def table(rows, header, right=()):
    """Rows of strings as text in aligned columns; `right`: indices of right-aligned columns."""
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in [list(header), *rows]) for i in range(len(header))]

    def line(cells):
        padded = []
        for i, (cell, width) in enumerate(zip(cells, widths)):
            padded.append(cell.rjust(width) if i in right else cell.ljust(width))
        return "  ".join(padded).rstrip()

    return "\n".join([line(header), "  ".join("-" * width for width in widths), *map(line, rows)])


# ---------------------------------------------------------------- files


@contextlib.contextmanager
def atomic(path):
    """Yield a temporary path; on success it replaces `path` in one step, on an error it goes.

    A symbolic link stays: what it points to is replaced. A replaced file keeps its permissions. A
    device (/dev/null, /dev/stdout) is written through. OSError if `path` is a folder, FIFO or
    socket.
    """
    path = Path(path)
    if _is_stream(path):
        with _written_through(path) as temporary:
            yield temporary
        return
    mode = default_mode()
    if path.is_symlink():
        path = Path(os.path.realpath(path))
    if path.exists():
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{path}: not a regular file; choose another name for the output")
        mode = stat.S_IMODE(status.st_mode)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp makes private files; a result is as readable as any other file of the user's.
        temporary.chmod(mode)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        # safetensors, written in Rust, gives the system's error number only in its text.
        code = re.search(r"\(os error (\d+)\)$", str(error))
        if code:
            raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error
        raise


def replace(source, target):
    """os.replace, with patience: Windows refuses while another program has one of them open, as
    virus scanners and indexers do for a moment. UserError if it stays open.
    """
    for pause in (0.05, 0.1, 0.2, 0.4, 0.8, None):
        try:
            os.replace(source, target)
            return
        except PermissionError as error:
            code = getattr(error, "winerror", None)  # 5: also for a target that is open
            if code != 5 and code not in IN_USE:
                raise
            if pause is None:
                raise UserError(f"{target}: {CLOSE_IT}") from None
        time.sleep(pause)


def _is_stream(path):
    """Whether `path` is a device or stream, which is written to rather than replaced."""
    if os.path.abspath(path).startswith("/dev/"):
        return not Path(path).is_dir()
    return path.is_char_device()


@contextlib.contextmanager
def _written_through(path):
    with tempfile.TemporaryDirectory() as folder:
        # With the same ending: some libraries choose the format by it.
        temporary = Path(folder) / f"output{path.suffix}"
        temporary.touch()
        yield temporary
        with open(temporary, "rb") as source, open(path, "wb") as stream:
            shutil.copyfileobj(source, stream)


def check_output(flag, path, inputs=()):
    """UserError if the output `path` of `flag` could not be written, or would replace an input.

    Call it before the work. inputs: paths of files that the same command reads (None is skipped),
    or of its other outputs.
    """
    path = Path(path)
    if _is_stream(path):
        return
    for other in inputs:
        if other is not None and _same_file(path, other):
            raise UserError(
                f"{flag} {path}: the same command reads or writes this file as {other}; choose "
                "another name"
            )
    if path.is_dir():
        raise UserError(f"{flag} {path}: this is a folder; name a file")
    if path.exists() and not path.is_file():
        raise UserError(f"{flag} {path}: not a regular file; choose another name")
    folder = Path(os.path.realpath(path)).parent
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir():
        raise UserError(f"{flag} {path}: {folder} is a file, not a folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{flag} {path}: the folder {folder} is not writable; choose another one")


def _same_file(one, other):
    try:
        return os.path.samefile(one, other)
    except OSError:  # one of them does not exist yet
        paths = [os.path.normcase(os.path.realpath(path)) for path in (one, other)]
        if sys.platform == "darwin":  # knows no case either, and normcase does not know that
            paths = [path.casefold() for path in paths]
        return paths[0] == paths[1]


def default_mode():
    """Permissions of a new file, as the user's umask has them."""
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


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
    """Write `value` as JSON; names with bytes that are not UTF-8 (Linux paths) as escapes."""
    text = json.dumps(value, indent=1, ensure_ascii=False, default=plain)
    if not is_utf8(text):
        text = json.dumps(value, indent=1, default=plain)
    write_text(path, text + "\n")


def is_utf8(text):
    """Whether `text` can be written as UTF-8: file names on Linux may hold other bytes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def plain(value):
    """NumPy's numbers and arrays and paths as what JSON has; `default` of json.dumps."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


def read_json(path):
    """The content of a JSON file; UserError if it is missing or broken."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path}: not a readable JSON file ({error}); delete it or restore it"
        ) from None


def file_name(text):
    """`text` as the name of a file or folder that leads nowhere else."""
    name = "".join(c if c.isalnum() or c in "-_.+" else "_" for c in str(text)).lstrip(".")
    if RESERVED.fullmatch(name.split(".")[0]):
        name = f"_{name}"
    return name or "_"


# Names of devices on Windows, with any suffix.
RESERVED = re.compile("con|prn|aux|nul|com[0-9]|lpt[0-9]", re.IGNORECASE)
