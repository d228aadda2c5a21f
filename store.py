"""A memory-mapped array on disk that is filled row by row, survives a kill, and knows what it was made from. No torch.

    <path>.npy    the array, an ordinary NumPy file
    <path>.json   shape, dtype, fingerprint, and when complete the checksum of the array
    <path>.done   one byte per row, 1 where it is written; gone when complete

The crop store and the embeddings are kept this way.
"""

import json
import shutil
import zlib
from pathlib import Path

import numpy as np

import runs
from cli import UserError

BLOCK = 64 << 20  # bytes read at a time for the checksum


class Missing(UserError):
    """There is no complete array at the path."""


class Stale(UserError):
    """The array at the path was made from something else; the message names what differs."""


def files(path):
    path = Path(path)
    return tuple(path.with_name(path.name + end) for end in (".npy", ".json", ".done"))


def open_store(path, fingerprint, verify=True):
    """The complete array at `path`, as a read-only memory map.

    Missing where there is none or it is unfinished; Stale where its fingerprint (a dict of plain values) differs;
    UserError where the file is damaged. `verify` reads the whole array once and compares its checksum.
    """
    array_file, index_file, _ = files(path)
    index = _index(path)
    if index is None or not index["complete"] or not array_file.exists():
        raise Missing(f"{path}: not there, or not finished")
    _compare(path, index["fingerprint"], fingerprint)
    try:
        array = np.load(array_file, mmap_mode="r", allow_pickle=False)
        sound = list(array.shape) == index["shape"] and array.dtype == np.dtype(index["dtype"])
    except (ValueError, OSError, EOFError):
        sound = False
    if not sound or verify and _checksum(array) != index["checksum"]:
        raise UserError(f"{array_file}: damaged; delete it, the next command makes it anew")
    return array


def _index(path):
    index_file = files(path)[1]
    if not index_file.exists():
        return None
    index = runs.read_json(index_file)
    if not isinstance(index, dict) or not {"shape", "dtype", "fingerprint", "complete"} <= set(index):
        raise UserError(f"{index_file}: not the index of a store; delete it")
    return index


def _plain(fingerprint):
    return json.loads(json.dumps(fingerprint, default=str))


def _compare(path, old, new):
    new = _plain(new)
    for key in sorted(set(old) | set(new)):
        if old.get(key) != new.get(key):
            raise Stale(f"{path}: made from other {key} ({_short(old.get(key))}, now {_short(new.get(key))})")


def _short(value):
    text = json.dumps(value)
    return text if len(text) <= 24 else text[:20] + "…"


def _checksum(array):
    flat = array.reshape(-1).view(np.uint8)
    value = 0
    for i in range(0, len(flat), BLOCK):
        value = zlib.crc32(flat[i:i + BLOCK], value)
    return value


class Writer:
    """Fill the array at `path`, continuing what a killed process left; use as a context manager.

    todo      indices of the rows that are still to be written (a snapshot of the disk, also of other processes' rows)
    write     store some rows; they count as done once their values are on their way to the disk
    finish    checksum, mark complete

    A half-filled array with another fingerprint, shape or dtype is started anew, which is said in one line.
    `shared`: several processes may write disjoint rows of one path at the same time.
    UserError where the disk is too small for what is still to be written.
    """

    def __init__(self, path, shape, dtype, fingerprint, shared=False):
        self.path, self.shape, self.dtype = Path(path), tuple(int(n) for n in shape), np.dtype(dtype)
        self.index = {"shape": list(self.shape), "dtype": self.dtype.str, "fingerprint": _plain(fingerprint),
                      "complete": False}
        self.shared = shared

    def __enter__(self):
        array_file, index_file, done_file = files(self.path)
        array_file.parent.mkdir(parents=True, exist_ok=True)
        with runs.exclusive(self.path.with_name(self.path.name + ".lock")):
            old = _index(self.path)
            same = old is not None and {**old, "complete": False, "checksum": 0} == {**self.index, "checksum": 0}
            if not (same and array_file.exists() and done_file.exists()):
                if old is not None and not old["complete"]:
                    print(f"{self.path}: begun with other settings or damaged; starting anew", flush=True)
                self._begin(array_file, index_file, done_file)
        self.array = np.load(array_file, mmap_mode="r+", allow_pickle=False)
        self.done = np.memmap(done_file, np.uint8, "r+", shape=(self.shape[0],))
        return self

    def _begin(self, array_file, index_file, done_file):
        for file in (index_file, done_file, array_file):  # the index first: without it nothing counts
            file.unlink(missing_ok=True)
        need = int(np.prod(self.shape)) * self.dtype.itemsize
        free = shutil.disk_usage(array_file.parent).free
        if need > free:
            raise UserError(f"{self.path}: needs {need / 1e9:.1f} GB on the disk, {free / 1e9:.1f} GB are free; make "
                            "room or choose another folder")
        np.lib.format.open_memmap(array_file, "w+", self.dtype, self.shape).flush()
        done_file.write_bytes(bytes(self.shape[0]))
        runs.write_json(index_file, self.index)

    @property
    def todo(self):
        return np.flatnonzero(self.done == 0)

    def write(self, rows, values):
        self.array[rows] = values
        self.array.flush()  # before the rows count as done: a kill of the machine cannot leave holes
        self.done[rows] = 1
        self.done.flush()

    def finish(self):
        left = len(self.todo)
        if left:
            raise ValueError(f"{left} rows are not written")
        self.array.flush()
        runs.write_json(files(self.path)[1], {**self.index, "complete": True, "checksum": _checksum(self.array)})
        files(self.path)[2].unlink(missing_ok=True)

    def __exit__(self, *exception):
        del self.array, self.done
