"""A memory-mapped array on disk that is filled row by row, survives a kill, and knows what it was
made from. No torch.

    <path>.npy    the array, an ordinary NumPy file
    <path>.json   shape, dtype, fingerprint, and when complete the checksum of the array
    <path>.done   one byte per row, 1 where it is written; gone when complete
    <path>.lock   held by whoever fills it; let go by any end of the process

The crop store and the embeddings are kept this way.
"""

import fcntl
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
    path = Path(path)
    return tuple(path.with_name(path.name + end) for end in (".npy", ".json", ".done"))


def open_store(path, fingerprint, verify=True):
    """The complete array at `path`, as a read-only memory map.

    Missing where there is none or it is unfinished; Stale where its fingerprint (a dict of plain
    values) differs; Damaged where the bytes are not those written. `verify` reads the whole array
    once and compares its checksum; without it, only the file's length, shape and type are looked
    at."""
    array_file, index_file, _ = files(path)
    index = _index(path)
    if index is None or not index["complete"] or not array_file.exists():
        raise Missing(f"{path}: not there, or not finished")
    _compare(path, index["fingerprint"], fingerprint)
    try:
        array = np.load(array_file, mmap_mode="r", allow_pickle=False)
        sound = list(array.shape) == index["shape"] and array.dtype.str == index["dtype"]
        sound = sound and array_file.stat().st_size == array.offset + array.nbytes
    except (ValueError, OSError, EOFError):
        sound = False
    if not sound or verify and _checksum(array_file) != index.get("checksum"):
        raise Damaged(f"{array_file}: damaged; delete it, the next command makes it anew")
    return array


def _index(path):
    index_file = files(path)[1]
    if not index_file.exists():
        return None
    index = common.read_json(index_file)
    if (
        not isinstance(index, dict)
        or not {"shape", "dtype", "fingerprint", "complete"} <= set(index)
        or not (isinstance(index["fingerprint"], dict))
    ):
        raise UserError(f"{index_file}: not the index of a store; delete it")
    return index


def _plain(fingerprint):
    return json.loads(json.dumps(fingerprint, default=str))


def _compare(path, old, new):
    new = _plain(new)
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

    A half-filled array with another fingerprint, shape or dtype is started anew, which is said in
    one line; with a complete one of the same fingerprint nothing is to do. `shared`: several
    processes may write disjoint rows of one path at the same time. UserError where the disk is too
    small for what is still to be written, and where another process fills it."""

    def __init__(self, path, shape, dtype, fingerprint, shared=False):
        self.path, self.shape, self.dtype = (
            Path(path),
            tuple(int(n) for n in shape),
            np.dtype(dtype),
        )
        self.index = {
            "shape": list(self.shape),
            "dtype": self.dtype.str,
            "fingerprint": _plain(fingerprint),
            "complete": False,
        }
        self.shared, self.done, self._file = shared, None, None
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            header,
            {
                "descr": np.lib.format.dtype_to_descr(self.dtype),
                "fortran_order": False,
                "shape": self.shape,
            },
        )
        self.header = header.getvalue()
        self.row_bytes = int(np.prod(self.shape[1:], dtype=object)) * self.dtype.itemsize
        self.bytes = self.shape[0] * self.row_bytes

    def __enter__(self):
        array_file, index_file, done_file = files(self.path)
        array_file.parent.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(
            self.path.with_name(self.path.name + ".lock"), os.O_RDWR | os.O_CREAT, 0o666
        )
        try:
            with common.exclusive(self.path.with_name(self.path.name + ".enter")):
                alone = self._take(fcntl.LOCK_EX)
                if not alone and not (self.shared and self._take(fcntl.LOCK_SH)):
                    raise UserError(
                        f"{self.path}: another process fills it; wait for it or stop it"
                    )
                old = _index(self.path)
                same = old is not None and {**old, "complete": 0, "checksum": 0} == {
                    **self.index,
                    "complete": 0,
                    "checksum": 0,
                }
                size = len(self.header) + self.bytes
                there = array_file.exists() and array_file.stat().st_size == size
                if same and old["complete"] and there:
                    self.done = np.ones(self.shape[0], np.uint8)
                else:
                    if not (
                        same
                        and there
                        and not old["complete"]
                        and done_file.exists()
                        and done_file.stat().st_size == self.shape[0]
                    ):
                        if not alone:
                            raise UserError(
                                f"{self.path}: another process fills it with other settings"
                            )
                        if old is not None and not old["complete"]:
                            print(
                                f"{self.path}: begun with other settings or damaged; starting anew",
                                flush=True,
                            )
                        self._begin(array_file, index_file, done_file)
                    else:
                        self._need(array_file, size - array_file.stat().st_blocks * 512)
                    self._file = os.open(array_file, os.O_RDWR)
                    self.done = np.memmap(done_file, np.uint8, "r+", shape=(self.shape[0],))
                if self.shared:
                    self._take(fcntl.LOCK_SH)
        except BaseException:
            self._close()
            raise
        return self

    def _take(self, kind):
        try:
            fcntl.flock(self._lock, kind | fcntl.LOCK_NB)
        except OSError:
            return False
        return True

    def _need(self, array_file, need):
        free = shutil.disk_usage(array_file.parent).free
        if need > free:
            raise UserError(
                f"{self.path}: needs {need / 1e9:.1f} GB on the disk, {free / 1e9:.1f} GB are "
                "free; make "
                "room or choose another folder"
            )

    def _begin(self, array_file, index_file, done_file):
        for file in (
            index_file,
            done_file,
            array_file,
        ):  # the index first: without it nothing counts
            file.unlink(missing_ok=True)
        self._need(array_file, self.bytes)
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
        if len(rows) and not (rows.min() >= 0 and rows.max() < self.shape[0]):
            raise IndexError(f"rows {rows.min()} to {rows.max()} of {self.shape[0]}")
        values = np.ascontiguousarray(
            np.broadcast_to(np.asarray(values, self.dtype), (len(rows), *self.shape[1:]))
        )
        # Written as a file: pages of a memory map would count as this process's memory, and a full
        # disk kill it.
        breaks = np.flatnonzero(np.diff(rows) != 1) + 1
        for part, first in zip(np.split(values, breaks), np.r_[0, breaks] if len(rows) else ()):
            left, at = (
                memoryview(part.reshape(-1).view(np.uint8)),
                len(self.header) + int(rows[first]) * self.row_bytes,
            )
            while len(left):
                n = os.pwrite(self._file, left, at)
                left, at = left[n:], at + n
        os.fdatasync(
            self._file
        )  # before the rows count as done: a kill of the machine cannot leave holes
        self.done[rows] = 1
        self.done.flush()

    def finish(self):
        if isinstance(self.done, np.memmap):
            left = len(self.todo)
            if left:
                raise ValueError(f"{left} rows are not written")
            array_file, index_file, done_file = files(self.path)
            common.write_json(
                index_file, {**self.index, "complete": True, "checksum": _checksum(array_file)}
            )
            done_file.unlink(missing_ok=True)

    def _close(self):
        if self._file is not None:
            os.close(self._file)
        os.close(self._lock)
        self.done = self._file = None

    def __exit__(self, *exception):
        self._close()
