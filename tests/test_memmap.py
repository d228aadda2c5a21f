"""The resumable array on disk: what a kill, a change, damage, a full disk and several writers do to
it.
"""

import errno
import json
import os
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest

from common import UserError
from dataset import memmap

ROOT = Path(__file__).resolve().parent.parent
PRINT = {"weights": "abc", "size": [224, 224], "margin": None}


def fill(path, n=10, fingerprint=PRINT, dtype=np.float32):
    with memmap.Writer(path, (n, 3), dtype, fingerprint) as writer:
        for row in writer.todo:
            writer.write([row], np.arange(3) + 10 * row)
        writer.finish()
    return np.arange(3) + 10 * np.arange(n)[:, None]


def test_what_is_written_is_read(tmp_path):
    expected = fill(tmp_path / "x")
    array = memmap.open_store(tmp_path / "x", PRINT)
    assert isinstance(array, np.memmap) and array.mode == "r" and array.dtype == np.float32
    assert np.array_equal(array, expected)
    assert np.array_equal(np.load(tmp_path / "x.npy"), expected)  # an ordinary NumPy file
    assert not (tmp_path / "x.done").exists()
    with pytest.raises(ValueError):
        array[0] = 1


@pytest.mark.parametrize(
    "dtype, shape", [(np.uint8, (7, 5, 5, 3)), (np.float16, (7, 9)), (np.int64, (7,))]
)
def test_rows_in_any_order_and_grouping(tmp_path, dtype, shape):
    values = np.random.default_rng(0).integers(0, 200, shape).astype(dtype)
    with memmap.Writer(tmp_path / "x", shape, dtype, {}) as writer:
        for rows in ([5, 1, 2, 3], np.array([6]), np.array([], int), [4, 0]):
            writer.write(rows, values[rows])
            assert writer.todo.tolist() == [r for r in writer.todo if r not in rows]
        writer.finish()
    assert np.array_equal(memmap.open_store(tmp_path / "x", {}), values)


def test_rows_outside_are_refused(tmp_path):
    with memmap.Writer(tmp_path / "x", (4, 2), np.uint8, {}) as writer:
        for rows in ([4], [-1]):
            with pytest.raises(IndexError):
                writer.write(rows, np.zeros((1, 2)))
        assert (tmp_path / "x.npy").stat().st_size == len(writer.header) + 8


def test_unfinished_is_missing(tmp_path):
    with pytest.raises(memmap.Missing):
        memmap.open_store(tmp_path / "x", PRINT)
    with memmap.Writer(tmp_path / "x", (4, 3), np.float32, PRINT) as writer:
        writer.write([0, 1], 1)
        with pytest.raises(ValueError, match="2 rows are not written"):
            writer.finish()
    with pytest.raises(memmap.Missing):
        memmap.open_store(tmp_path / "x", PRINT)


KILLED = """
import os, sys, time
import numpy as np
from dataset import memmap
with memmap.Writer(sys.argv[1], (1000, 50), np.float32, {"a": 1}) as writer:
    todo = writer.todo
    print("todo", *todo, flush=True)
    for rows in np.split(todo, range(7, len(todo), 7)):
        print("computed", *rows, flush=True)
        writer.write(rows, rows[:, None] * np.ones(50))
        print("written", *rows, flush=True)
        time.sleep(0.002)
    writer.finish()
"""


def run_and_kill(path, after):
    """Rows begun and rows written when the process was killed with `after` parts written (None: not
    killed).
    """
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    todo, computed, written, parts = None, set(), set(), 0
    for line in process.stdout:
        word, *rows = line.split()
        rows = {int(row) for row in rows}
        if word == "todo":
            todo = rows
        elif word == "computed":
            computed |= rows
        else:
            written |= rows
            parts += 1
            if parts == after:
                process.send_signal(signal.SIGKILL)
    process.wait()
    return todo, computed, written


def test_a_killed_writer_continues_and_repeats_nothing(tmp_path):
    path, done = tmp_path / "x", set()
    for after in (30, 20, 1, None):
        todo, computed, written = run_and_kill(path, after)
        assert (
            todo == set(range(1000)) - done
        )  # what was written is never computed again, nothing else is left out
        if after is not None:
            here = set(np.flatnonzero(np.fromfile(path.with_name("x.done"), np.uint8)).tolist())
            assert done | written <= here <= done | computed  # of the rows in work, at most
            done = here
    assert np.array_equal(memmap.open_store(path, {"a": 1}), np.arange(1000)[:, None] * np.ones(50))


def test_rows_count_only_once_they_are_on_the_disk(tmp_path, monkeypatch):
    with memmap.Writer(tmp_path / "x", (10, 3), np.float32, PRINT) as writer:
        seen, sync = [], os.fsync
        monkeypatch.setattr(
            memmap.os, "fsync", lambda file: seen.append(writer.done[:4].tolist()) or sync(file)
        )
        writer.write([0, 1], 1)
        assert seen == [[0, 0, 0, 0]] and writer.done[:4].tolist() == [1, 1, 0, 0]

        class Full:
            def seek(self, at):
                pass

            def write(self, content):
                raise OSError(errno.ENOSPC, "No space left on device")

        file, writer._file = writer._file, Full()
        with pytest.raises(OSError):
            writer.write([2, 3], 1)
        writer._file = file
        assert writer.done[:4].tolist() == [1, 1, 0, 0]


def test_stale_names_what_differs_in_one_line(tmp_path):
    fill(tmp_path / "x")
    for change, says in (
        ({"weights": "other"}, 'other weights ("abc", now "other")'),
        ({"size": (224, 320)}, "other size ([224, 224], now [224, 320])"),
        ({"new": 1}, "other new (null, now 1)"),
    ):
        with pytest.raises(memmap.Stale) as error:
            memmap.open_store(tmp_path / "x", {**PRINT, **change})
        assert (
            says in str(error.value)
            and "\n" not in str(error.value)
            and str(tmp_path / "x") in str(error.value)
        )
    memmap.open_store(tmp_path / "x", {**PRINT, "size": (224, 224)})  # a tuple is a list in JSON


def test_another_version_is_named_before_what_else_differs(tmp_path):
    fill(tmp_path / "x")
    with pytest.raises(memmap.Stale, match="made by another version of this program"):
        memmap.open_store(tmp_path / "x", {**PRINT, "version": 2, "weights": "other"})


def test_half_done_with_another_fingerprint_is_started_anew(tmp_path, capsys):
    with memmap.Writer(tmp_path / "x", (10, 3), np.float32, PRINT) as writer:
        writer.write([0, 1], 1)
    with memmap.Writer(tmp_path / "x", (10, 3), np.float32, PRINT) as writer:
        assert writer.todo.tolist() == list(range(2, 10))
    assert capsys.readouterr().out == ""
    for shape, dtype, fingerprint in (
        ((10, 3), np.float32, {"weights": "b"}),
        ((11, 3), np.float32, {"weights": "b"}),
        ((11, 3), np.float16, {"weights": "b"}),
    ):
        with memmap.Writer(tmp_path / "x", shape, dtype, fingerprint) as writer:
            assert len(writer.todo) == shape[0]
        out = capsys.readouterr().out
        assert out.count("\n") == 1 and "starting anew" in out


def test_a_complete_one_is_left_as_it_is_and_a_stale_one_replaced(tmp_path, capsys):
    fill(tmp_path / "x")
    with memmap.Writer(tmp_path / "x", (10, 3), np.float32, PRINT) as writer:
        assert len(writer.todo) == 0
        writer.finish()
    memmap.open_store(tmp_path / "x", PRINT)
    expected = fill(tmp_path / "x", 12, {"b": 2})
    assert np.array_equal(memmap.open_store(tmp_path / "x", {"b": 2}), expected)


def test_damage_is_found(tmp_path):
    path, array = tmp_path / "x", tmp_path / "x.npy"
    fill(path, 40)
    good = array.read_bytes()
    for at in (len(good) - 1, len(good) // 2, 130):
        array.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        with pytest.raises(memmap.Damaged, match="damaged; delete it"):
            memmap.open_store(path, PRINT)
        memmap.open_store(path, PRINT, verify=False)  # asked not to look
    for bad in (good[:-1], good + b"x", b"", good[:50], b"\x00" * len(good)):
        array.write_bytes(bad)
        with pytest.raises(memmap.Damaged):
            memmap.open_store(path, PRINT, verify=False)
    array.write_bytes(good)
    memmap.open_store(path, PRINT)
    # A damaged file of a half-done store is started anew.
    array.unlink()
    expected = fill(path, 40)
    assert np.array_equal(memmap.open_store(path, PRINT), expected)


def test_a_broken_index_is_one_line(tmp_path):
    fill(tmp_path / "x")
    index = tmp_path / "x.json"
    good = json.loads(index.read_text())
    for text in ("", "{", "[]", json.dumps({"shape": 3}), json.dumps({**good, "fingerprint": 3})):
        index.write_text(text)
        for use in (
            lambda: memmap.open_store(tmp_path / "x", PRINT),
            lambda: memmap.Writer(tmp_path / "x", (10, 3), np.float32, PRINT).__enter__(),
        ):
            with pytest.raises(UserError, match="delete it"):
                use()
    for edit in ({"shape": [9, 3]}, {"dtype": "<f8"}, {"checksum": 1}):
        index.write_text(json.dumps({**good, **edit}))
        with pytest.raises(memmap.Damaged):
            memmap.open_store(tmp_path / "x", PRINT)


def test_a_full_disk_is_said_before_it_starts(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(memmap.shutil, "disk_usage", lambda path: usage(10**9, 10**9, 119))
    with pytest.raises(UserError, match="needs 0.0 GB on the disk, 0.0 GB are free"):
        with memmap.Writer(tmp_path / "x", (10, 3), np.float32, PRINT):
            raise AssertionError("it started")
    assert not (tmp_path / "x.npy").exists()
    monkeypatch.setattr(memmap.shutil, "disk_usage", lambda path: usage(10**9, 10**9, 120))
    fill(tmp_path / "x")


def test_continuing_needs_room_for_the_rest_only(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    shape = (100, 1 << 16)
    with memmap.Writer(tmp_path / "x", shape, np.uint8, PRINT) as writer:
        writer.write(np.arange(90), 1)
    free = 11 << 16
    monkeypatch.setattr(memmap.shutil, "disk_usage", lambda path: usage(10**9, 10**9, free))
    with memmap.Writer(tmp_path / "x", shape, np.uint8, PRINT) as writer:
        assert len(writer.todo) == 10
    free = 8 << 16
    with pytest.raises(UserError, match="make room"):
        memmap.Writer(tmp_path / "x", shape, np.uint8, PRINT).__enter__()


def test_a_second_writer_is_refused_and_the_first_is_not_disturbed(tmp_path):
    with memmap.Writer(tmp_path / "x", (10, 3), np.float32, PRINT) as writer:
        for options in ({}, {"shared": True}):
            with pytest.raises(UserError, match="another process fills it"):
                memmap.Writer(tmp_path / "x", (10, 3), np.float32, PRINT, **options).__enter__()
        writer.write(np.arange(10), 1)
        writer.finish()
    with memmap.Writer(tmp_path / "y", (10, 3), np.float32, PRINT, shared=True):
        with pytest.raises(UserError, match="another process fills it"):
            memmap.Writer(tmp_path / "y", (10, 3), np.float32, PRINT).__enter__()
        with pytest.raises(UserError, match="with other settings"):
            memmap.Writer(tmp_path / "y", (10, 3), np.float32, {}, shared=True).__enter__()
        with memmap.Writer(tmp_path / "y", (10, 3), np.float32, PRINT, shared=True) as second:
            assert len(second.todo) == 10


LIVING = """
import sys, time
import numpy as np
from dataset import memmap
with memmap.Writer(sys.argv[1], (10, 3), np.float32, {"a": 1}, shared=True) as writer:
    writer.write([0, 1], 5)
    print("ready", flush=True)
    time.sleep(60)
"""


def test_a_living_writer_is_respected_and_a_killed_one_is_not(tmp_path):
    def begin():
        process = subprocess.Popen(
            [sys.executable, "-c", LIVING, str(tmp_path / "x")],
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        assert process.stdout.readline() == "ready\n"
        return process

    processes = [begin(), begin()]
    arguments = tmp_path / "x", (10, 3), np.float32
    processes[0].kill()
    processes[0].wait()
    with pytest.raises(UserError, match="another process fills it"):
        memmap.Writer(*arguments, {"a": 1}).__enter__()
    with pytest.raises(UserError, match="with other settings"):
        memmap.Writer(*arguments, {"a": 2}, shared=True).__enter__()
    with memmap.Writer(*arguments, {"a": 1}, shared=True) as writer:
        assert writer.todo.tolist() == list(range(2, 10))
    processes[1].kill()
    processes[1].wait()
    with memmap.Writer(*arguments, {"a": 1}) as writer:
        assert writer.todo.tolist() == list(range(2, 10))
    with memmap.Writer(*arguments, {"a": 2}, shared=True) as writer:  # alone: it may start anew
        assert len(writer.todo) == 10
    assert not list(tmp_path.glob("*.writer-*"))


SHARED = """
import sys, time
import numpy as np
from dataset import memmap
rank, world, path = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
with memmap.Writer(path, (400, 1000), np.uint16, {"a": 1}, shared=True) as writer:
    own = writer.todo
    own = own[own % world == rank]
    for rows in np.split(own, range(3, len(own), 3)):
        writer.write(rows, rows[:, None] * np.ones(1000))
    while rank == 0 and len(writer.todo):
        time.sleep(0.01)
    if rank == 0:
        writer.finish()
"""


def test_several_processes_write_disjoint_rows(tmp_path):
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SHARED, str(rank), "4", str(tmp_path / "x")], cwd=ROOT
        )
        for rank in range(4)
    ]
    assert [process.wait(60) for process in processes] == [0] * 4
    array = memmap.open_store(tmp_path / "x", {"a": 1})
    assert np.array_equal(array, np.arange(400)[:, None] * np.ones(1000))


def test_a_writer_that_comes_after_the_end_destroys_nothing(tmp_path):
    fill(tmp_path / "x")
    before = (tmp_path / "x.npy").stat().st_mtime_ns
    subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys, numpy as np\nfrom dataset import memmap\n"
            "with memmap.Writer(sys.argv[1], (10, 3), np.float32, "
            f"{PRINT!r}, shared=True) as w: assert not len(w.todo); w.finish()",
            str(tmp_path / "x"),
        ],
        cwd=ROOT,
        check=True,
    )
    assert (tmp_path / "x.npy").stat().st_mtime_ns == before
    memmap.open_store(tmp_path / "x", PRINT)


def test_writing_takes_no_memory(tmp_path):
    # Pages of a memory map would count: 400 MB are written here.
    code = """
import sys, psutil
import numpy as np
from dataset import memmap
with memmap.Writer(sys.argv[1], (100, 4 << 20), np.uint8, {}) as writer:
    before = psutil.Process().memory_info().rss
    for row in range(100):
        writer.write([row], row)
    writer.finish()
    print((psutil.Process().memory_info().rss - before) >> 20)
"""
    out = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "x")],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert int(out) < 60
