"""A memory-mapped array on disk that is filled row by row, survives a kill, and knows what it was
made from.

    <path>.npy         the array, an ordinary NumPy file
    <path>.json        shape, dtype, fingerprint, and when complete the checksum of the array
    <path>.done        one byte per row, 1 once it is written; gone when complete
    <path>.lock        held by a process that fills it alone
    <path>.writer-…    one for each of several processes that fill it together, held by that process

Any end of a process releases its locks, so a killed writer never blocks the next one. The crop
store and the embeddings are kept this way.
"""

import contextlib
import glob
import io
import json
import os
import shutil
import zlib
from pathlib import Path

import numpy as np

import common
from common import UserError

BLOCK = 16 << 20  # bytes read at a time for the checksum


class Missing(UserError):
    """There is no complete array at the path."""


class Stale(UserError):
    """The array at the path was made from something else; the message names what differs."""


class Damaged(UserError):
    """The bytes at the path are not those that were written."""


def files(path):
    """The array, its index and its list of finished rows."""
    path = Path(path)
    return tuple(path.with_name(path.name + end) for end in (".npy", ".json", ".done"))


def open_store(path, fingerprint, verify=True):
    """The complete array at `path`, as a read-only memory map.

    Missing if there is none or it is unfinished; Stale if its fingerprint (a dict of plain values)
    differs; Damaged if the bytes are not those written. `verify` reads the whole array once and
    compares its checksum; without it, only the file's length, shape and type are checked."""
    array_file, index_file, _ = files(path)
    index = _index(path)
    if index is None or not index["complete"] or not array_file.exists():
        raise Missing(f"{path}: does not exist, or is not finished")
    _compare(path, index["fingerprint"], fingerprint)
    try:
        array = np.load(array_file, mmap_mode="r", allow_pickle=False)
        sound = list(array.shape) == index["shape"] and array.dtype.str == index["dtype"]
        sound = sound and array_file.stat().st_size == array.offset + array.nbytes
    except (ValueError, OSError, EOFError):
        sound = False
    if not sound or verify and _checksum(array_file) != index.get("checksum"):
        raise Damaged(f"{array_file}: damaged; delete it, the next command rebuilds it")
    return array


def _index(path):
    index_file = files(path)[1]
    if not index_file.exists():
        return None
    index = common.read_json(index_file)
    keys = {"shape", "dtype", "fingerprint", "complete"}
    if (
        not isinstance(index, dict)
        or not keys <= set(index)
        or not isinstance(index["fingerprint"], dict)
    ):
        raise UserError(f"{index_file}: not the index of a store; delete it")
    return index


def _as_json(fingerprint):
    return json.loads(json.dumps(fingerprint, default=str))


def _compare(path, old, new):
    """Stale if two fingerprints differ; another version is named before anything else."""
    new = _as_json(new)
    if old.get("version") != new.get("version"):
        raise Stale(f"{path}: made by another version of this program")
    for key in sorted(set(old) | set(new)):
        if old.get(key) != new.get(key):
            raise Stale(
                f"{path}: made from other {key} ({_short(old.get(key))}, now "
                f"{_short(new.get(key))})"
            )


def _short(value):
    text = json.dumps(value)
    return text if len(text) <= 24 else text[:20] + "…"


def _checksum(array_file):
    # Read as a file, not through the memory map, whose pages would count as this process's memory.
    value = 0
    with open(array_file, "rb") as file:
        while block := file.read(BLOCK):
            value = zlib.crc32(block, value)
    return value


class Writer:
    """Fill the array at `path`, continuing what a killed process left; use as a context manager.

    todo      indices of the rows that are still to be written (a snapshot of the disk, also of
              other processes' rows)
    write     store some rows; they count as done once their values are on the disk
    finish    checksum, mark complete

    A half-filled array with another fingerprint, shape or dtype is started anew, which one line
    says; a complete one with the same fingerprint has nothing left to do. `shared`: several
    processes may write disjoint rows of one path at the same time. UserError if the disk is too
    small for what is still to be written, or another process fills the array."""

    def __init__(self, path, shape, dtype, fingerprint, shared=False):
        self.path = Path(path)
        self.shape = tuple(int(n) for n in shape)
        self.dtype = np.dtype(dtype)
        self.shared = shared
        self.index = {
            "shape": list(self.shape),
            "dtype": self.dtype.str,
            "fingerprint": _as_json(fingerprint),
            "complete": False,
        }
        self.done = self._file = self._lock = None
        header = io.BytesIO()
        description = {
            "descr": np.lib.format.dtype_to_descr(self.dtype),
            "fortran_order": False,
            "shape": self.shape,
        }
        np.lib.format.write_array_header_1_0(header, description)
        self.header = header.getvalue()
        self.row_bytes = int(np.prod(self.shape[1:], dtype=object)) * self.dtype.itemsize
        self.bytes = self.shape[0] * self.row_bytes

    def __enter__(self):
        """Take the lock, then continue the files on disk or begin new ones."""
        array_file, _, done_file = files(self.path)
        array_file.parent.mkdir(parents=True, exist_ok=True)
        try:
            # One process at a time looks who else writes, and begins the files.
            with common.exclusive(self._beside(".enter")):
                alone = self._take_lock()
                state = self._state()
                if state == "complete":
                    self.done = np.ones(self.shape[0], np.uint8)
                    return self
                if state == "other":
                    if not alone:
                        raise UserError(
                            f"{self.path}: another process fills it with other settings"
                        )
                    self._begin()
                else:
                    done = np.fromfile(done_file, np.uint8)
                    self._need(int((done == 0).sum()) * self.row_bytes)
                # Unbuffered, so that a write is with the system when it returns.
                self._file = open(array_file, "r+b", buffering=0)
                self.done = np.memmap(done_file, np.uint8, "r+", shape=(self.shape[0],))
        except BaseException:
            self._close()
            raise
        return self

    def _beside(self, end):
        return self.path.with_name(self.path.name + end)

    def _take_lock(self):
        """Take this process's lock → whether it writes alone; UserError if others forbid it."""
        busy = f"{self.path}: another process fills it; wait for it or stop it"
        alone = common.try_lock(self._beside(".lock"))
        if alone is None:
            raise UserError(busy)
        living = False
        for file in self.path.parent.glob(f"{glob.escape(self.path.name)}.writer-*"):
            lock = common.try_lock(file)
            if lock is None:
                living = True
            else:  # of a process that was killed
                lock.release()
                _remove(file)
        if not self.shared:
            self._lock = alone
            if living:
                raise UserError(busy)
            return True
        self._lock = common.try_lock(self._beside(f".writer-{os.getpid()}-{id(self)}"))
        alone.release()
        return not living

    def _state(self):
        """What the files on disk are: "complete", "begun" (by a writer of the same), or "other"."""
        array_file, _, done_file = files(self.path)
        old = _index(self.path)
        ours = {"complete": 0, "checksum": 0}
        same = old is not None and {**old, **ours} == {**self.index, **ours}
        size = len(self.header) + self.bytes
        if not same or not array_file.exists() or array_file.stat().st_size != size:
            return "other"
        if old["complete"]:
            return "complete"
        if done_file.exists() and done_file.stat().st_size == self.shape[0]:
            return "begun"
        return "other"

    def _need(self, need):
        free = shutil.disk_usage(self.path.parent).free
        if need > free:
            raise UserError(
                f"{self.path}: needs {need / 1e9:.1f} GB on the disk, {free / 1e9:.1f} GB are "
                "free; make room or choose another folder"
            )

    def _begin(self):
        """Make the files anew, empty."""
        array_file, index_file, done_file = files(self.path)
        old = _index(self.path)
        if old is not None and not old["complete"]:
            print(f"{self.path}: begun with other settings or damaged; starting anew", flush=True)
        # The index first: without it nothing counts.
        for file in (index_file, done_file, array_file):
            file.unlink(missing_ok=True)
        self._need(self.bytes)
        with open(array_file, "wb") as file:
            file.write(self.header)
            file.truncate(len(self.header) + self.bytes)
        done_file.write_bytes(bytes(self.shape[0]))
        common.write_json(index_file, self.index)

    @property
    def todo(self):
        return np.flatnonzero(self.done == 0)

    def write(self, rows, values):
        """Store values [n, …] as the rows (n indices); a single value is stored in all of them."""
        rows = np.atleast_1d(np.asarray(rows, np.int64))
        if not len(rows):
            return
        if rows.min() < 0 or rows.max() >= self.shape[0]:
            raise IndexError(f"rows {rows.min()} to {rows.max()} of {self.shape[0]}")
        values = np.broadcast_to(np.asarray(values, self.dtype), (len(rows), *self.shape[1:]))
        values = np.ascontiguousarray(values)
        # Written as a file, one call per run of neighbours: pages of a memory map would count as
        # this process's memory, and a full disk would kill it.
        breaks = np.flatnonzero(np.diff(rows) != 1) + 1
        for part, first in zip(np.split(values, breaks), np.r_[0, breaks]):
            self._file.seek(len(self.header) + int(rows[first]) * self.row_bytes)
            left = memoryview(part.reshape(-1).view(np.uint8))
            while len(left):
                left = left[self._file.write(left) :]
        # Before the rows count as done: a crash of the machine cannot leave holes.
        os.fsync(self._file.fileno())
        self.done[rows] = 1
        self.done.flush()

    def finish(self):
        """Mark the array complete; ValueError if rows are missing."""
        if not isinstance(self.done, np.memmap):  # it was complete before
            return
        left = len(self.todo)
        if left:
            raise ValueError(f"{left} rows are not written")
        array_file, index_file, done_file = files(self.path)
        complete = {**self.index, "complete": True, "checksum": _checksum(array_file)}
        common.write_json(index_file, complete)
        self.done = np.ones(self.shape[0], np.uint8)  # Windows removes no file that is mapped
        _remove(done_file)

    def _close(self):
        if self._file is not None:
            self._file.close()
        self.done = self._file = None
        if self._lock is not None:
            self._lock.release()
            if self.shared:
                _remove(Path(self._lock.lock_file))
            self._lock = None

    def __exit__(self, *exception):
        self._close()


def _remove(file):
    # Windows keeps a file that another process has open; the next writer removes it.
    with contextlib.suppress(PermissionError):
        file.unlink(missing_ok=True)
