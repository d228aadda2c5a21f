"""Files that appear whole, outputs, and how every command ends."""

import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import common

ROOT = Path(__file__).resolve().parent.parent
POSIX = pytest.mark.skipif(os.name != "posix", reason="POSIX")


# ---------------------------------------------------------------- files


def test_atomic_keeps_the_old_file_on_an_error(tmp_path):
    path = tmp_path / "a" / "file.txt"
    common.write_text(path, "old")
    with pytest.raises(ZeroDivisionError), common.atomic(path) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "old"
    assert [p.name for p in path.parent.iterdir()] == ["file.txt"]


def test_atomic_file_is_readable_by_others(tmp_path):
    common.write_text(tmp_path / "x", "1")
    (tmp_path / "y").write_text("1")
    assert (tmp_path / "x").stat().st_mode == (tmp_path / "y").stat().st_mode


def test_a_replaced_file_keeps_its_permissions(tmp_path):
    path = tmp_path / "x"
    path.write_text("old")
    path.chmod(0o600)
    common.write_text(path, "new")
    assert path.read_text() == "new" and stat.S_IMODE(path.stat().st_mode) == 0o600


@POSIX
@pytest.mark.parametrize("exists", [True, False])
def test_a_symbolic_link_stays_and_its_target_is_replaced(tmp_path, exists):
    target, link = tmp_path / "elsewhere" / "target", tmp_path / "link"
    target.parent.mkdir()
    if exists:
        target.write_text("old")
    link.symlink_to(target)
    common.write_text(link, "new")
    assert link.is_symlink() and target.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir() if p.name.endswith(".tmp")] == []


@POSIX
def test_devices_are_written_through(tmp_path):
    common.write_text("/dev/null", "gone")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import common\n"
    code += (
        "common.write_text('/dev/stdout', 'through'); common.check_output('--out', '/dev/stdout')"
    )
    with open(tmp_path / "out", "w") as out:
        subprocess.run([sys.executable, "-c", code], stdout=out, check=True)
    assert (tmp_path / "out").read_text() == "through"
    piped = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True)
    assert piped.stdout == b"through"


@POSIX
def test_a_fifo_is_refused_rather_than_waited_for(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(common.UserError, match="not a regular file"):
        common.write_text(tmp_path / "fifo", "x")
    with pytest.raises(common.UserError, match="not a regular file"):
        common.check_output("--out", tmp_path / "fifo")


def test_outputs_that_cannot_be_or_would_replace_an_input_are_refused(tmp_path, monkeypatch):
    slide, out = tmp_path / "slide.png", tmp_path / "out.csv"
    slide.write_text("pixels")
    common.check_output("--out", out, [slide, None])
    common.check_output("--out", tmp_path / "new" / "folder" / "out.csv", [slide])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["slide.png"]  # nothing is made yet
    (tmp_path / "hard.png").hardlink_to(slide)
    names = [slide, tmp_path / "." / "slide.png", tmp_path / "hard.png"]
    if os.name == "posix":
        (tmp_path / "link.png").symlink_to(slide)
        names.append(tmp_path / "link.png")
    for name in names:
        with pytest.raises(common.UserError, match="--out .*slide.png; choose another name"):
            common.check_output("--out", name, [slide])
    with pytest.raises(common.UserError, match="--overlay"):  # two outputs of one name
        common.check_output("--overlay", out, [slide, out])
    with pytest.raises(common.UserError, match="this is a folder"):
        common.check_output("--out", tmp_path)
    with pytest.raises(common.UserError, match="is a file, not a folder"):
        common.check_output("--out", slide / "out.csv")
    monkeypatch.setattr(os, "access", lambda *a, **k: False)
    with pytest.raises(common.UserError, match="not writable"):
        common.check_output("--out", out)


@pytest.mark.parametrize("text", ["", "{", "[" * 100000])
def test_broken_json_is_refused(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(common.UserError, match="x.json"):
        common.read_json(tmp_path / "x.json")


def test_json_keeps_names_that_are_not_utf8(tmp_path):
    name = os.fsdecode(b"lat\xfcn")
    common.write_json(tmp_path / "x.json", {"data": name, "µm": 1})
    assert common.read_json(tmp_path / "x.json") == {"data": name, "µm": 1}
    (tmp_path / "x.json").read_text(encoding="utf-8")


def test_file_names_lead_nowhere_else():
    assert common.file_name("../a/b c") == "_a_b_c"
    for name in ("..", "", "."):
        assert common.file_name(name) == "_"


# ---------------------------------------------------------------- how commands end


def ends(main, **options):
    """Run `main` (source) as a command → the finished process."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\nimport common\n{main}"
    code += "\ncommon.command(main)"
    return subprocess.run([sys.executable, "-c", code], text=True, **options)


def test_command_ends_with_one_line(tmp_path):
    script = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import common\ndef main(): raise %s\ncommon.command(main)"
    )
    for raised, status, line in [
        ("common.UserError('wrong\\nthing')", 2, "error: wrong thing\n"),
        ("OSError(28, 'x', 'out.bin')", 2, "error: out.bin: the disk is full"),
        ("PermissionError(13, 'x', 'out.bin')", 2, "error: out.bin: permission denied\n"),
        ("KeyboardInterrupt", 130, "stopped"),
    ]:
        result = subprocess.run(
            [sys.executable, "-c", script % raised], capture_output=True, text=True
        )
        assert result.returncode == status
        assert result.stderr.startswith(line) and result.stderr.count("\n") == 1
    result = subprocess.run(
        [sys.executable, "-c", script % "ValueError('a bug')"], capture_output=True, text=True
    )
    assert result.returncode == 1 and "Traceback" in result.stderr  # bugs stay visible


def test_running_out_of_memory_is_one_line():
    for text in ("MemoryError()", 'RuntimeError("DefaultCPUAllocator: can\'t allocate memory")'):
        done = ends(f"def main(): raise {text}", capture_output=True)
        assert done.returncode == 2 and done.stderr.startswith("error: out of memory")
        assert done.stderr.count("\n") == 1


@POSIX
def test_a_closed_pipe_is_not_success(tmp_path):
    """`command | head`: the work may be unfinished."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\nimport common, pathlib\n"
    code += "def main():\n for i in range(100000): print(i, flush=True)\n"
    code += f" pathlib.Path({str(tmp_path / 'done')!r}).touch()\ncommon.command(main)"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.readline()
    process.stdout.close()
    error = process.stderr.read()
    process.stderr.close()
    assert process.wait() == 141 and not (tmp_path / "done").exists()
    assert error.count("\n") == 1 and "Traceback" not in error


@POSIX
def test_closed_streams_do_no_harm(tmp_path):
    """As `>&-` and `2>&-` of a shell leave them."""
    main = f"""
def main():
    print("text")
    print("text", file=sys.stderr)
    sys.stdout.flush(), sys.stderr.flush()
    with open({str(tmp_path / "result")!r}, "w") as file:
        assert file.fileno() > 2
        file.write("result")
    {{raised}}"""
    for closed in ((1,), (2,), (1, 2), (0, 1, 2)):
        for raised, status in (("pass", 0), ("raise common.UserError('wrong')", 2)):
            done = ends(
                main.format(raised=raised),
                preexec_fn=lambda closed=closed: [os.close(number) for number in closed],
            )
            assert done.returncode == status, closed
            assert (tmp_path / "result").read_text() == "result"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_behind_stdout_is_one_line():
    with open("/dev/full", "w") as full:
        done = ends("def main(): print('text')", stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 2
    assert done.stderr.startswith("error: the disk is full") and done.stderr.count("\n") == 1


@POSIX
@pytest.mark.parametrize("script", ["train.py", "probe.py"])
def test_ctrl_c_during_the_imports_is_one_line(tmp_path, script):
    """numpy imports a module that waits: a stand-in for slow disks."""
    (tmp_path / "numpy.py").write_text(
        "import sys, time\nprint('importing', flush=True)\ntime.sleep(60)\n"
    )
    process = subprocess.Popen(
        [sys.executable, ROOT / script],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "importing\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert error == common.STOPPED + "\n" and process.returncode in (130, -signal.SIGINT)


def test_other_programs_keep_their_traceback():
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import common; raise KeyboardInterrupt"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "Traceback" in done.stderr


# ---------------------------------------------------------------- progress


def test_a_quiet_bar_shows_nothing(capsys):
    with common.progress(total=3, desc="x", quiet=True) as bar:
        for _ in range(3):
            bar.update(1)
        bar.set_postfix_str("note")
    assert list(common.progress([1, 2], quiet=True)) == [1, 2]
    assert capsys.readouterr() == ("", "")


def test_a_plain_bar_tells_rate_and_time_left(capsys):
    bar = common.PlainProgress(None, 4, "training", "patches", every=0.0)
    bar.start -= 2.0
    bar.set_postfix_str("loss 0.5")
    bar.update(2)
    line = capsys.readouterr().err
    assert line.startswith("training: 2/4 patches, 1.0 patches/s, 2 s left loss 0.5")


def test_tables_align_their_columns():
    text = common.table([("a", 1), ("bbb", np.int64(22))], ("name", "n"), right=(1,))
    assert text.splitlines() == ["name   n", "----  --", "a      1", "bbb   22"]
