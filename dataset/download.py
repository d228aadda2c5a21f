"""Fetching public datasets: resumable, several files at once. `python data.py --download NAME`
calls it. No torch.

A file appears under its name when it is whole; until then it is a hidden .part file, which the next
run continues by a range request. addresses.json holds the public addresses (figshare's file ids).
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
import struct
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import common
from common import UserError

CHUNK = 1 << 18
TIMEOUT = 60  # s without a byte
IDLE_TRIES = 8  # failures in a row that bring nothing new, before a file is given up
MAX_TRIES = 200  # of one file in all, so that a server that gives a byte at a time ends too
MAX_PAUSE = 120  # s, whatever the server's Retry-After says


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
    return {file: table[name]["base"].format(id=id) for file, id in table[name]["files"].items()}


def fetch(name, folder, workers=4, only=None, files=None, pause=1.0):
    """Fetch a dataset's files into `folder`. files: {name: address}, instead of the public ones.

    only: a pattern that names must match. pause: s before the second try, doubled each time.
    UserError names the files that could not be had; all others are there then, and the same command
    continues."""
    files = files if files is not None else addresses(name)
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
        print(f"{name}: {len(files) - len(todo):,} of {len(files):,} files are there", flush=True)
        if not todo:
            return
        stop, errors = threading.Event(), {}
        pool = ThreadPoolExecutor(max(1, workers))
        try:
            sizes = dict(zip(todo, pool.map(lambda url: _size(url, stop, pause), todo.values())))
            known = sum(size for size in sizes.values() if size)
            have = sum(
                _part(folder, file).stat().st_size for file in todo if _part(folder, file).exists()
            )
            without = sum(size is None for size in sizes.values())
            print(
                f"{name}: {len(todo):,} files, {known / 1e9:.2f} GB"
                + (f" and {without:,} files of unknown size" if without else "")
                + (f"; {have / 1e9:.2f} GB of it is there" if have else ""),
                flush=True,
            )
            free = shutil.disk_usage(folder).free
            if known - have > free:
                raise UserError(
                    f"{folder}: {(known - have) / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB "
                    "are free; "
                    "make room or set MITOSIS_ROOT to another disk"
                )
            bar = common.progress(total=round(known / 1e6), desc=name, unit="MB")
            jobs = {
                pool.submit(
                    _fetch_one, url, folder / file, sizes[file], stop, pause, _Megabytes(bar)
                ): file
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
    """Whole megabytes for the bar, out of bytes from several threads."""

    lock = threading.Lock()

    def __init__(self, bar):
        self.bar, self.bytes, self.shown = bar, 0, 0

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
    headers = {"User-Agent": f"{common.NAME}/{common.VERSION}", "Accept-Encoding": "identity"} | headers
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
    """(first byte, total or None) of a 206 answer; (None, None) where the header is missing or
    makes no sense.
    """
    text = response.headers.get("Content-Range", "").strip()
    match = re.fullmatch(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18}|\*)", text)
    if not match:
        return None, None
    return int(match[1]), None if match[3] == "*" else int(match[3])


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


def _sleep(stop, wanted, fallback):
    stop.wait(min(MAX_PAUSE, wanted if wanted is not None else fallback))


def _fetch_one(url, path, size, stop, pause, report):
    """Fetch one file to `path`, over as many connections as it takes; continues a .part file."""
    part, facts = _part(path.parent, path.name), _part(path.parent, path.name).with_suffix(".etag")
    idle, reason, broken = 0, "", 0
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
            total, have = _continue(url, part, facts, have, stop, report)
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
        wrong = (
            f"{have:,} bytes came where the server had said {size:,}"
            if size is not None and have != size
            else damage(part, path.name)
        )
        if wrong is None:
            facts.unlink(missing_ok=True)
            with open(part, "rb") as file:
                os.fsync(file.fileno())
            os.replace(part, path)
            return
        # What the server called the whole file is none: the next try begins anew, and asks for the
        # size again.
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


def _continue(url, part, facts, have, stop, report):
    """One connection: append to `part` what is missing. Returns (total size or None, bytes that are
    there now).
    """
    headers = {}
    if have:
        headers["Range"] = f"bytes={have}-"
        etag = facts.read_text() if facts.exists() else ""
        if etag:
            headers["If-Range"] = (
                etag  # a file that was changed meanwhile comes whole, not as a wrong tail
            )
    try:
        response = _open(url, headers)
    except urllib.error.HTTPError as error:
        with error:
            if error.code == 416:
                total = re.fullmatch(
                    r"bytes \*/(\d{1,18})", error.headers.get("Content-Range", "").strip()
                )
                if have and total and int(total[1]) == have:
                    return have, have  # the last connection had brought everything
                part.unlink(missing_ok=True)
                raise _Again("the server has another size than before (416)") from None
            if error.code in (408, 425, 429, 500, 502, 503, 504):
                raise _Again(
                    f"the server answers {error.code}", _retry_after(error.headers)
                ) from None
            hint = {
                401: "a login is needed",
                403: "access is refused",
                404: "it is not there any more",
                410: "it is not there any more",
            }.get(error.code, "the server refuses")
            raise _Never(f"{hint} (status {error.code})") from None
    with response:
        if response.status == 206:
            first, total = _content_range(response)
            if first != have:
                part.unlink(missing_ok=True)
                raise _Again("the server sent another part of the file than was asked for")
        elif (
            response.status == 200
        ):  # ranges are not known there, or the file has changed: all of it comes
            total, have = _length(response), 0
        else:
            raise _Again(f"the server answers {response.status}")
        etag = response.headers.get("ETag") or ""
        if etag and not etag.startswith("W/") and etag.isprintable():
            facts.write_text(etag)
        else:
            facts.unlink(missing_ok=True)
        with open(part, "ab" if have else "wb") as file:
            while not stop.is_set():
                try:
                    data = response.read(CHUNK)
                except http.client.IncompleteRead as error:
                    data = error.partial
                    file.write(data)
                    report(len(data))
                    have += len(data)
                    break
                if not data:
                    break
                file.write(data)
                report(len(data))
                have += len(data)
    if total is not None and have > total:
        part.unlink(missing_ok=True)
        raise _Again("more bytes came than the server had announced")
    return total, have


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
                return "not a whole PNG image"
        elif suffix in (".tif", ".tiff", ".svs"):
            if not _whole_tiff(file, head, size):
                return "not a whole TIFF image"
        elif suffix == ".sqlite":
            file.seek(0)
            head = file.read(100)
            if len(head) < 100 or head[:16] != b"SQLite format 3\0":
                return "not an SQLite database"
            page = struct.unpack(">H", head[16:18])[0]
            page, pages = 65536 if page == 1 else page, struct.unpack(">I", head[28:32])[0]
            if head[24:28] == head[92:96] and page * pages > size:
                return "not a whole SQLite database"
        elif suffix == ".json":
            file.seek(0)
            try:
                json.load(file)
            except (ValueError, RecursionError):
                return "not a whole JSON file"
    return None


def _whole_tiff(file, head, size):
    """Whether a TIFF's (or BigTIFF's, as .svs may be) image directories and the pixels they list
    lie in the file.
    """
    order = {b"II": "<", b"MM": ">"}.get(head[:2])
    if order is None or len(head) < 16 or head[2:4] not in (b"*\0", b"\0*", b"+\0", b"\0+"):
        return False
    big = 43 in head[2:4]
    word, entry = ("Q", 20) if big else ("I", 12)
    inline = struct.calcsize(word)

    def read(at, kind, n=1):
        length = struct.calcsize("<" + kind) * n
        if at + length > size:
            raise ValueError("beyond the end")
        file.seek(at)
        return struct.unpack(f"{order}{n}{kind}", file.read(length))

    def values(at):
        """Of the directory's entry at `at`: a list of offsets or lengths."""
        kind, n = {3: "H", 4: "I", 16: "Q"}[read(at + 2, "H")[0]], read(at + 4, word)[0]
        beside = at + 4 + inline
        return read(
            beside if struct.calcsize(kind) * n <= inline else read(beside, word)[0], kind, n
        )

    try:
        at, seen = read(8 if big else 4, word)[0], set()
        while at:
            if at in seen or len(seen) > 1000:
                return False
            seen.add(at)
            n, start = read(at, "Q" if big else "H")[0], at + (8 if big else 2)
            tags = {read(start + i * entry, "H")[0]: start + i * entry for i in range(n)}
            for offsets, lengths in ((273, 279), (324, 325)):  # strips, tiles
                if offsets in tags and lengths in tags:
                    ends = [
                        o + length
                        for o, length in zip(values(tags[offsets]), values(tags[lengths]))
                    ]
                    if max(ends, default=0) > size:
                        return False
            at = read(start + n * entry, word)[0]
    except (KeyError, ValueError, struct.error, OverflowError, MemoryError):
        return False
    return bool(seen)
