"""Fetching public datasets: resumable, several files at once. `python data.py --download NAME`
calls it.

A file appears under its name when it is complete; until then it is a hidden .part file, which the
next run continues by a range request. addresses.json holds the public addresses (figshare's file
ids). Images and tables of an archive are unpacked beside it.
"""

import contextlib
import email.utils
import fnmatch
import http.client
import json
import os
import re
import shutil
import ssl
import stat
import struct
import threading
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path, PurePosixPath

import common
from common import UserError
from dataset.formats import IMAGE_SUFFIXES

CHUNK = 1 << 18
TIMEOUT = 60  # s without a byte
IDLE_TRIES = 8  # failures in a row that bring nothing new, before a file is given up
MAX_TRIES = 200  # of one file in all, so that a server that gives a byte at a time ends too
MAX_PAUSE = 120  # s, whatever the server's Retry-After says
MAX_UNPACKED = 1 << 33  # bytes of an archive's files together: more is no public dataset of patches


def addresses(name):
    """{file name: address} of a public dataset."""
    if name == "midog2022":  # Zenodo names the files themselves
        files = [f"{i:03d}.png" for i in range(1, 406)]
        files += ["MIDOG2022_training_png.json", "MIDOG2022_training_png.sqlite"]
        return {file: f"https://zenodo.org/records/6547151/files/{file}" for file in files}
    table = common.read_json(Path(__file__).with_name("addresses.json"))
    if name not in table:
        raise UserError(
            f"--download {name}: {', '.join(sorted([*table, 'midog2022']))} can be fetched"
        )
    base, files = table[name]["base"], table[name]["files"]
    return {file: base.format(id=number) for file, number in files.items()}


def fetch(name, folder, workers=4, only=None, files=None, pause=1.0):
    """Fetch a dataset's files into `folder`. files: {name: address}, instead of the public ones.

    only: a pattern that names must match. pause: s before the second try, doubled each time.
    UserError names a file that could not be fetched; all others are complete then, and the same
    command continues."""
    if files is None:
        files = addresses(name)
    if only:
        files = {file: url for file, url in files.items() if fnmatch.fnmatch(file, only)}
        if not files:
            raise UserError(f"--only {only}: no file of {name} has such a name")
    for file in files:
        if file != Path(file).name or file.startswith(".") or "\\" in file:
            raise UserError(f"{name}: {file!r} is no plain file name; nothing is fetched")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with _lock(folder):
        todo = {file: url for file, url in files.items() if not (folder / file).exists()}
        print(f"{name}: {len(files) - len(todo):,} of {len(files):,} files exist", flush=True)
        if todo:
            _fetch_all(name, folder, todo, workers, pause)
        for file in files:
            if file.endswith(".zip"):
                print(f"{file}: {unpack(folder / file, folder):,} files unpacked", flush=True)


def _fetch_all(name, folder, todo, workers, pause):
    """Fetch the files `todo`, several at once."""
    stop, errors = threading.Event(), {}
    pool = ThreadPoolExecutor(max(1, workers))
    try:
        sizes = dict(zip(todo, pool.map(lambda url: _size(url, stop, pause), todo.values())))
        announced = sum(size for size in sizes.values() if size)
        _check_room(name, folder, todo, sizes, announced)
        bar = common.progress(total=round(announced / 1e6), desc=name, unit="MB")
        report = _Megabytes(bar)
        jobs = {
            pool.submit(_fetch_one, url, folder / file, sizes[file], stop, pause, report): file
            for file, url in todo.items()
        }
        for job in as_completed(jobs):
            try:
                job.result()
            except UserError as error:
                errors[jobs[job]] = error
            except OSError as error:  # the disk: the other files would fail as well
                stop.set()
                raise UserError(
                    f"{folder / jobs[job]}: {error.strerror or error}; what was fetched is kept"
                ) from None
        bar.close()
    except BaseException:
        stop.set()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    if errors:
        file, error = next(iter(sorted(errors.items())))
        more = f" (and {len(errors) - 1:,} more files)" if len(errors) > 1 else ""
        raise UserError(f"{error}{more}; the same command continues")


def _check_room(name, folder, todo, sizes, announced):
    """Print how much is to be fetched; UserError if the disk is too small for it."""
    parts = [_part(folder, file) for file in todo]
    fetched = sum(part.stat().st_size for part in parts if part.exists())
    unknown = sum(size is None for size in sizes.values())
    text = f"{name}: {len(todo):,} files, {announced / 1e9:.2f} GB"
    if unknown:
        text += f" and {unknown:,} files of unknown size"
    if fetched:
        text += f"; {fetched / 1e9:.2f} GB of it is fetched already"
    print(text, flush=True)
    free, needed = shutil.disk_usage(folder).free, announced - fetched
    if needed > free:
        raise UserError(
            f"{folder}: {needed / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free; make "
            "room or set MITOSIS_ROOT to another disk"
        )


@contextlib.contextmanager
def _lock(folder):
    lock = common.try_lock(folder / ".download.lock")
    if lock is None:
        raise UserError(
            f"{folder}: another process fetches into this folder; wait for it or stop it"
        )
    try:
        yield
    finally:
        lock.release()


class _Megabytes:
    """Whole megabytes for the bar, from bytes of several threads."""

    def __init__(self, bar):
        self.bar, self.lock = bar, threading.Lock()
        self.bytes = self.shown = 0

    def __call__(self, n):
        with self.lock:
            self.bytes += n
            now = self.bytes // 1_000_000
            if now > self.shown:
                self.bar.update(now - self.shown)
                self.shown = now


def _part(folder, file):
    return folder / f".{file}.part"


# ---------------------------------------------------------------- one file


class _Redirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, request, fp, code, message, headers, url):
        if request.type == "https" and not url.lower().startswith("https:"):
            raise urllib.error.URLError(f"redirected to an address without encryption, {url[:80]}")
        return super().redirect_request(request, fp, code, message, headers, url)


_opener = urllib.request.build_opener(_Redirects)


def _open(url, headers):
    headers = {
        "User-Agent": f"{common.NAME}/{common.VERSION}",
        "Accept-Encoding": "identity",
    } | headers
    request = urllib.request.Request(url, headers=headers)
    return _opener.open(request, timeout=TIMEOUT)


def _size(url, stop, pause):
    """A file's size by the server's headers, or None. One byte is asked for: figshare's storage
    refuses HEAD.
    """
    for attempt in range(3):
        if stop.is_set():
            return None
        try:
            with _open(url, {"Range": "bytes=0-0"}) as response:
                if response.status == 206:
                    return _content_range(response)[1]
                return _length(response)
        except urllib.error.HTTPError as error:
            with error:
                if error.code not in (408, 425, 429, 500, 502, 503, 504):
                    return None
                _sleep(stop, _retry_after(error.headers), pause * 2**attempt)
        except (OSError, http.client.HTTPException):
            _sleep(stop, None, pause * 2**attempt)
    return None


def _content_range(response):
    """(first byte, total or None) of a 206 answer; (None, None) if the header is missing or
    makes no sense.
    """
    text = response.headers.get("Content-Range", "").strip()
    match = re.fullmatch(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18}|\*)", text)
    if not match:
        return None, None
    total = None if match[3] == "*" else int(match[3])
    return int(match[1]), total


def _length(response):
    text = response.headers.get("Content-Length") or ""
    return int(text) if re.fullmatch(r"\d{1,18}", text) else None


def _retry_after(headers):
    text = (headers.get("Retry-After") or "").strip()
    if re.fullmatch(r"\d{1,9}", text):
        return float(text)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None


def _sleep(stop, asked, fallback):
    """Wait as long as the server asks, else the fallback; a stop ends it."""
    if asked is None:
        asked = fallback
    stop.wait(min(MAX_PAUSE, asked))


def _fetch_one(url, path, size, stop, pause, report):
    """Fetch one file to `path`, over as many connections as it takes; continues a .part file."""
    part = _part(path.parent, path.name)
    etag_file = part.with_suffix(".etag")
    # idle: tries in a row without a new byte; broken: complete files that were damaged
    idle, broken, reason = 0, 0, ""
    for _ in range(MAX_TRIES):
        if stop.is_set():
            return
        if idle >= IDLE_TRIES or broken >= 3:
            break
        if idle:
            _sleep(stop, None, pause * 2 ** (idle - 1))
        have = part.stat().st_size if part.exists() else 0
        total, before = None, have
        try:
            total, have = _continue(url, part, etag_file, have, size, stop, report)
            if stop.is_set():
                return
            if total is not None and have < total:
                reason = f"the connection ended after {have:,} of {total:,} bytes"
                idle = 0 if have > before else idle + 1
                continue
        except _Again as again:
            reason, idle = str(again), idle + 1
            _sleep(stop, again.wait, 0)
            continue
        except _Never as never:
            raise UserError(f"{path.name}: {never} ({url})") from None
        except (
            http.client.HTTPException,
            TimeoutError,
            ConnectionError,
            ssl.SSLError,
            urllib.error.URLError,
        ) as error:
            reason = f"{type(error).__name__} {error}".strip()
            now = part.stat().st_size if part.exists() else 0
            idle = 0 if now > before else idle + 1
            continue
        if size is not None and have != size:
            wrong = f"{have:,} bytes came, the server had announced {size:,}"
        else:
            wrong = damage(part, path.name)
        if wrong is None:
            etag_file.unlink(missing_ok=True)
            with open(part, "rb+") as file:
                os.fsync(file.fileno())
            common.replace(part, path)
            return
        # What the server called the complete file is damaged: the next try begins anew, and asks
        # for the size again.
        part.unlink(missing_ok=True)
        reason, broken, size = wrong, broken + 1, None
        _sleep(stop, None, pause)
    raise UserError(f"{path.name}: could not be fetched, {reason} ({url})")


class _Again(Exception):
    """The server asks for patience, or its answer does not fit: try again (after `wait` s)."""

    def __init__(self, message, wait=None):
        super().__init__(message)
        self.wait = wait


class _Never(Exception):
    """Trying again cannot help."""


def _continue(url, part, etag_file, have, size, stop, report):
    """One connection: append to `part` what is missing. Returns (total size or None, bytes that it
    has now).

    size: what the server announced before, or None; more than that is never written."""
    headers = {}
    if have:
        headers["Range"] = f"bytes={have}-"
        etag = etag_file.read_text(encoding="utf-8") if etag_file.exists() else ""
        if etag:  # a file that changed meanwhile comes whole, not as a wrong tail
            headers["If-Range"] = etag
    try:
        response = _open(url, headers)
    except urllib.error.HTTPError as error:
        with error:
            if error.code == 416 and _is_complete(error, have):
                return have, have  # the last connection had brought everything
            _refused(error, part)
    with response:
        if response.status == 206:
            first, total = _content_range(response)
            if first != have:
                part.unlink(missing_ok=True)
                raise _Again("the server sent another part of the file than was asked for")
        elif response.status == 200:  # no ranges, or the file has changed: all of it comes
            total, have = _length(response), 0
        else:
            raise _Again(f"the server answers {response.status}")
        etag = response.headers.get("ETag") or ""
        if etag and not etag.startswith("W/") and etag.isprintable() and len(etag) < 1000:
            etag_file.write_text(etag, encoding="utf-8")
        else:
            etag_file.unlink(missing_ok=True)
        most = max((limit for limit in (total, size) if limit is not None), default=None)
        with open(part, "ab" if have else "wb") as file:
            while not stop.is_set():
                broken_off = False
                try:
                    data = response.read(CHUNK)
                except http.client.IncompleteRead as error:
                    data, broken_off = error.partial, True
                have += len(data)
                if most is not None and have > most:
                    break
                file.write(data)
                report(len(data))
                if not data or broken_off:
                    break
    if most is not None and have > most:
        part.unlink(missing_ok=True)
        raise _Again(f"more bytes came than the {most:,} that the server had announced")
    return total, have


def _is_complete(error, have):
    """Whether a 416 answer says that the file has exactly the bytes that were fetched."""
    text = error.headers.get("Content-Range", "").strip()
    total = re.fullmatch(r"bytes \*/(\d{1,18})", text)
    return have and total and int(total[1]) == have


def _refused(error, part):
    """Raise what an HTTP error means for the next try."""
    if error.code == 416:
        part.unlink(missing_ok=True)
        raise _Again("the server has another size than before (416)") from None
    if error.code in (408, 425, 429, 500, 502, 503, 504):
        raise _Again(f"the server answers {error.code}", _retry_after(error.headers)) from None
    hint = {
        401: "a login is needed",
        403: "access is refused",
        404: "it no longer exists",
        410: "it no longer exists",
    }.get(error.code, "the server refuses")
    raise _Never(f"{hint} (status {error.code})") from None


# ---------------------------------------------------------------- archives

# What zipfile raises for damaged and encrypted archives.
BROKEN = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError)


def unpack(archive, folder):
    """Write the images and tables of a ZIP archive below `folder`, without the archive's own top
    folder; returns their number. Files that are there in full are kept, so it can be repeated.

    UserError: a name that leads out of the folder, a link, a damaged file, no room."""
    try:
        with zipfile.ZipFile(archive) as content:
            members = _members(archive, content)
            total = sum(info.file_size for info in members.values())
            free = shutil.disk_usage(folder).free
            if total > min(MAX_UNPACKED, free):
                raise UserError(
                    f"{archive}: {total / 1e9:.1f} GB unpacked, and {free / 1e9:.1f} GB are free; "
                    "nothing is unpacked"
                )
            for name, info in members.items():
                path = Path(folder) / name
                if path.is_file() and path.stat().st_size == info.file_size:
                    continue
                path.parent.mkdir(parents=True, exist_ok=True)
                with (
                    common.atomic(path) as temporary,
                    content.open(info) as source,
                    open(temporary, "wb") as target,
                ):
                    shutil.copyfileobj(source, target)
    except BROKEN as error:
        raise UserError(f"{archive}: damaged ({error}); delete it and fetch it again") from None
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror or error}; the archive is kept") from None
    return len(members)


def _members(archive, content):
    """{path below the folder: ZipInfo} of the images and tables in an open archive."""
    members = {}
    for info in content.infolist():
        parts = PurePosixPath(info.filename).parts
        if info.is_dir() or not info.filename.lower().endswith((*IMAGE_SUFFIXES, ".csv")):
            continue
        out = info.filename.startswith("/") or ".." in parts or re.search(r"[\\:\0]", info.filename)
        if out or len(parts) < 2 or stat.S_ISLNK(info.external_attr >> 16):
            raise UserError(
                f"{archive}: {info.filename[:80]!r} is a link, or lies outside of the archive's "
                "own folder; nothing is unpacked"
            )
        if not any(part.startswith(".") for part in parts):
            members[PurePosixPath(*parts[1:])] = info
    return members


# ---------------------------------------------------------------- is it what its name says


def damage(path, name):
    """What is wrong with a fetched file by its format, or None. A login page or a cut-off image is
    noticed.
    """
    size = path.stat().st_size
    suffix = Path(name).suffix.lower()
    with open(path, "rb") as file:
        head = file.read(16)
        if head.lstrip()[:1] == b"<" and suffix != ".svg":
            return "a web page came instead of the file"
        if suffix == ".png":
            file.seek(max(0, size - 12))
            if head[:8] != b"\x89PNG\r\n\x1a\n" or file.read(12)[4:8] != b"IEND":
                return "not a complete PNG image"
        elif suffix in (".tif", ".tiff", ".svs"):
            if not _whole_tiff(file, head, size):
                return "not a complete TIFF image"
        elif suffix == ".sqlite":
            return _sqlite_damage(file, size)
        elif suffix == ".zip":
            return _zip_damage(path)
        elif suffix == ".json":
            file.seek(0)
            try:
                json.load(file)
            except (ValueError, RecursionError):
                return "not a complete JSON file"
    return None


def _zip_damage(path):
    try:
        with zipfile.ZipFile(path) as content:
            if content.testzip() is None:
                return None
    except (*BROKEN, OSError):
        pass
    return "not a complete ZIP archive"


def _sqlite_damage(file, size):
    file.seek(0)
    head = file.read(100)
    if len(head) < 100 or head[:16] != b"SQLite format 3\0":
        return "not an SQLite database"
    page, pages = struct.unpack(">H", head[16:18])[0], struct.unpack(">I", head[28:32])[0]
    if page == 1:  # the format's way to write 65,536
        page = 65536
    # The header's number of pages counts only if it was written with the last change.
    if head[24:28] == head[92:96] and page * pages > size:
        return "not a complete SQLite database"
    return None


def _whole_tiff(file, head, size):
    """Whether a TIFF's (or BigTIFF's, as .svs may be) image directories and the pixels they list
    lie in the file.
    """
    order = {b"II": "<", b"MM": ">"}.get(head[:2])
    if order is None or len(head) < 16 or head[2:4] not in (b"*\0", b"\0*", b"+\0", b"\0+"):
        return False
    big = 43 in head[2:4]
    # Sizes of BigTIFF and TIFF: an offset, an entry of a directory, the number of its entries.
    word, entry, count, first = ("Q", 20, "Q", 8) if big else ("I", 12, "H", 4)

    def read(at, kind, n=1):
        length = struct.calcsize("<" + kind) * n
        if at + length > size:
            raise ValueError("beyond the end")
        file.seek(at)
        return struct.unpack(f"{order}{n}{kind}", file.read(length))

    def values(at):
        """Offsets or lengths of the directory's entry at `at`; few of them stand in it itself."""
        kind = {3: "H", 4: "I", 16: "Q"}[read(at + 2, "H")[0]]
        n = read(at + 4, word)[0]
        place = at + 4 + struct.calcsize(word)
        if struct.calcsize(kind) * n > struct.calcsize(word):
            place = read(place, word)[0]
        return read(place, kind, n)

    try:
        at, seen = read(first, word)[0], set()
        while at:
            if at in seen or len(seen) > 1000:
                return False
            seen.add(at)
            n, start = read(at, count)[0], at + struct.calcsize("<" + count)
            tags = {read(start + i * entry, "H")[0]: start + i * entry for i in range(n)}
            for offsets, lengths in ((273, 279), (324, 325)):  # strips, tiles
                if offsets in tags and lengths in tags:
                    pixels = zip(values(tags[offsets]), values(tags[lengths]))
                    if any(offset + length > size for offset, length in pixels):
                        return False
            at = read(start + n * entry, word)[0]
    except (KeyError, ValueError, struct.error, OverflowError, MemoryError):
        return False
    return bool(seen)
