"""What every command shares: errors of the user, progress, tables. No torch."""

import errno
import os
import sys
import time


class UserError(Exception):
    """A mistake of the user, or bad input: one line that says what is wrong and what to do. Exit status 2."""


def command(main):
    """Run `main()` as a command line program: users' mistakes end with one line on stderr, never a traceback."""
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
        print("stopped; what was finished is kept, the same command with --resume (where it has one) continues",
              file=sys.stderr)
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
        # Only what the user can mend is shortened to a line; any other OSError is a bug and keeps its traceback.
        advice = {errno.ENOSPC: "the disk is full: make room, then run the same command again",
                  errno.EDQUOT: "the disk quota is used up: make room, then run the same command again",
                  errno.EACCES: "no permission", errno.EPERM: "no permission", errno.EROFS: "read-only file system",
                  errno.ENOENT: "no such file or folder", errno.EISDIR: "this is a folder, a file is needed",
                  errno.ENOTDIR: "this is a file, a folder is needed",
                  errno.EEXIST: "is there already, and is no folder", errno.EBUSY: "in use by the system",
                  errno.ENAMETOOLONG: "too long a name", errno.EIO: "the disk cannot be read or written",
                  errno.ESTALE: "the network drive has lost this file: try again"}.get(error.errno)
        if advice is None:
            raise
        fail(f"{error.filename}: {advice}" if error.filename else advice)


def fail(message):
    print("error: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(2)


def progress(items=None, total=None, desc="", unit="it"):
    """A progress bar over `items` (or, without items, an object with .update(n), .set_postfix_str(s) and .close()).

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
            print(f"{self.desc}: {self.n}{of} {self.unit}, {rate:.1f} {self.unit}/s{left} {self.note}".rstrip(),
                  file=sys.stderr, flush=True)

    def set_postfix_str(self, note, refresh=True):
        self.note = note

    def close(self):
        pass


def table(rows, header, right=()):
    """Rows of strings as text in aligned columns; `right`: indices of the columns to align to the right."""
    rows = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in [list(header), *rows]) for i in range(len(header))]

    def line(cells):
        return "  ".join(cell.rjust(width) if i in right else cell.ljust(width)
                         for i, (cell, width) in enumerate(zip(cells, widths))).rstrip()
    return "\n".join([line(header), "  ".join("-" * width for width in widths), *map(line, rows)])
