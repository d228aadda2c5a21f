"""Commands on Windows and macOS, as far as Linux can play them: tests/windows/sitecustomize.py
takes away what Windows lacks, refuses what it refuses, and starts processes by spawn.
docs/platforms.md lists every place where the platform matters.
"""

import ast
import json
import ntpath
import os
import re
import subprocess
import sys
import types
from pathlib import Path, PureWindowsPath

import numpy as np
import onnx_models
import pytest
from PIL import Image

import common
from dataset import annotations
from onnx_model import devices, session
from scoring import match

HERE = Path(__file__).resolve().parent.parent
PLAYED = HERE / "tests" / "windows"
# Windows' console and its files in the encoding of Western Europe; here files are even ASCII.
OLD_ENCODINGS = {
    "PYTHONIOENCODING": "cp1252",
    "PYTHONUTF8": "0",
    "PYTHONCOERCECLOCALE": "0",
    "LC_ALL": "C",
}


def windows(disk, *words, without="", status=0):
    """Run Python with `words` on the played Windows → what it says on stdout and stderr."""
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith("LC_")},
        **OLD_ENCODINGS,
        "PYTHONPATH": f"{PLAYED}{os.pathsep}{HERE}",
        "PLAYED_ROOT": str(HERE),
        "PLAYED_DISK": str(disk),
        "PLAYED_WITHOUT": without,
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment,
        cwd=HERE,
    )
    text = done.stdout.decode("cp1252")
    assert done.returncode == status and "Traceback" not in text, text
    return text


# ---------------------------------------------------------------- the stage itself


def test_what_is_played(tmp_path):
    """The project's files see Windows, libraries see Linux, and the disk refuses."""
    (tmp_path / "sub").mkdir()
    (tmp_path / "probe.py").write_text(ATTEMPTS)
    attempts = {
        "os.fork": "AttributeError",
        "os.geteuid()": "AttributeError",
        "signal.SIGKILL": "AttributeError",
        "signal.SIGTERM": "did",
        "__import__('fcntl')": "ModuleNotFoundError",
        "os.replace(path + '/probe.py', path + '/sub/open.txt')": "PermissionError",
        "os.remove(path + '/sub/open.txt')": "PermissionError",
        "os.rename(path + '/sub', path + '/sub2')": "PermissionError",
        "open(path + '/a:b', 'w')": "OSError",
        "open(path + '/nul.txt', 'w')": "OSError",
        "open(path + '/new.txt', 'w')": "did",
        "os.symlink(path, path + '/link')": "OSError",
    }
    words = [tmp_path / "probe.py", tmp_path, *attempts]
    environment = {
        **os.environ,
        "PYTHONPATH": str(PLAYED),
        "PLAYED_ROOT": str(tmp_path),
        "PLAYED_DISK": str(tmp_path),
    }
    done = subprocess.run(
        [sys.executable, *map(str, words)], capture_output=True, text=True, env=environment
    )
    assert done.stdout.split() == ["win32", "nt", *attempts.values(), "0"], done.stderr


ATTEMPTS = """
import os, signal, subprocess, sys
def attempt(what):
    names = {"os": os, "signal": signal, "path": sys.argv[1], "open": open}
    try:
        eval(compile(what, __file__, "eval"), names)
        return "did"
    except (AttributeError, ImportError, OSError) as error:
        return type(error).__name__
file = open(sys.argv[1] + "/sub/open.txt", "w")
print(sys.platform, os.name, *map(attempt, sys.argv[2:]))
print(subprocess.run(["true"]).returncode)  # the library forks and waits as ever
"""


# ---------------------------------------------------------------- commands on it


def test_every_command_explains_itself_in_cp1252(tmp_path):
    names = "classify data evaluate export models probe train augment".split()
    said = windows(tmp_path, "-c", EXPLAIN, *names)
    assert said.count("usage: ") == len(names) and "?m/px" not in said and "µm/px" in said


EXPLAIN = """
import contextlib, importlib, sys
import common
for name in sys.argv[1:]:
    module = importlib.import_module(name)
    sys.argv = [name + ".py", "--help"]
    with contextlib.suppress(SystemExit):
        common.command(module.main)
"""


def test_the_second_stage_runs(tmp_path):
    """A small model on two images, with threads that read and an overlay, without torch."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        onnx_models.register(monkeypatch)
        onnx_models.write_model(tmp_path / "m.onnx", onnx_models.classifier("gelu"))
    for seed in (1, 2):
        image = Image.fromarray(onnx_models.patches(1, seed=seed, size=400)[0])
        image.save(tmp_path / f"{seed}.tiff", resolution=40000, resolution_unit=3)
    # Paths of the machine where the detector ran.
    rows = ["filename,x,y", r"D:\slides\1.tiff,100,120", r"\\server\slides\2.tiff,390,5"]
    (tmp_path / "c.csv").write_text("\n".join([*rows, r"D:\slides\1.tiff,3,200"]) + "\n")
    words = ["classify.py", tmp_path / "m.onnx", "--slide", tmp_path]
    words += ["--candidates", tmp_path / "c.csv", "--out", tmp_path / "out.csv"]
    words += ["--overlay", tmp_path / "o.png"]
    for _ in range(2):  # the second time over what is there
        assert "3 candidates scored" in windows(tmp_path, *words, without="torch onnx")
    model = session.Classifier(tmp_path / "m.onnx", "cpu")
    expected = np.concatenate(
        [model.score(tmp_path / f"{i}.tiff", x, y) for i, x, y in ((1, 100, 120), (2, 390, 5))]
    )
    written = [line.split(",") for line in (tmp_path / "out.csv").read_text().splitlines()[1:]]
    assert np.allclose([float(row[3]) for row in written[:2]], expected, atol=1e-5)
    assert Image.open(tmp_path / "o.png").size[0] > 100
    said = windows(tmp_path, "classify.py", "--doctor", without="torch onnx")
    assert "runs (CPUExecutionProvider)" in said


def test_a_folder_of_slides_is_scored_and_gone_on_with(tmp_path):
    with pytest.MonkeyPatch.context() as monkeypatch:
        onnx_models.register(monkeypatch)
        onnx_models.write_model(tmp_path / "m.onnx", onnx_models.classifier("gelu"))
    for name in ("slides", "candidates"):
        (tmp_path / name / "sub").mkdir(parents=True)
    for seed, name in ((1, "a"), (2, "sub/b")):
        image = Image.fromarray(onnx_models.patches(1, seed=seed, size=400)[0])
        image.save(tmp_path / f"slides/{name}.tiff", resolution=40000, resolution_unit=3)
        (tmp_path / f"candidates/{name}.csv").write_text("x,y\n100,120\n390,5\n")
    words = ["classify.py", tmp_path / "m.onnx", "--slide", tmp_path / "slides"]
    words += ["--candidates", tmp_path / "candidates", "--out", tmp_path / "scored"]
    windows(tmp_path, *words, without="torch onnx")
    first = {path: path.read_bytes() for path in (tmp_path / "scored").rglob("*.csv")}
    assert sorted(path.name for path in first) == ["a.csv", "b.csv", "report.csv"]
    (tmp_path / "scored/sub/b.csv").unlink()  # as a run leaves it that was stopped before it
    windows(tmp_path, *words, without="torch onnx")
    assert (tmp_path / "scored/sub/b.csv").read_bytes() == first[tmp_path / "scored/sub/b.csv"]


def test_the_demo_dataset_is_painted_by_processes_of_spawn(tmp_path):
    code = "from demo import synthetic; synthetic.build({!r}, images_per_domain=1)"
    windows(tmp_path, "-c", code.format(str(tmp_path / "demo")))
    assert len(list((tmp_path / "demo").glob("*.tiff"))) == 5
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".part")] == []


@pytest.mark.slow
def test_a_run_from_data_to_model(tmp_path):
    """Every command on small images: a store filled by processes, a run that is stopped and
    continued, probes, report, model and card; then all of it again over what is there.
    """
    source = onnx_models.dataset(tmp_path / "data", images=12, each=6)
    given = ("--data", source, "--images", tmp_path / "data")
    runs = ("--runs", tmp_path / "runs", "--device", "cpu")
    said = windows(
        tmp_path, "data.py", source, "--images", tmp_path / "data", "--cache", "--workers", 2
    )
    assert "12 images" in said
    short = ("--lora", "--epochs", 2, "--epoch-size", 16, "--batch-size", 8)
    train = ("train.py", *given, *runs, *short)
    windows(tmp_path, "-c", STOPPED_AFTER_AN_EPOCH, *train[1:], status=130)
    (checkpoint,) = (tmp_path / "runs").rglob("checkpoint.safetensors")
    windows(tmp_path, *train, "--resume")
    assert not checkpoint.exists()
    windows(tmp_path, "probe.py", *given, *runs)
    report = ("--out", tmp_path / "report", "--replicates", 100)
    for _ in range(2):
        windows(tmp_path, "evaluate.py", tmp_path / "runs", *report)
        for metrics in sorted((tmp_path / "runs").rglob("metrics.json")):
            model = tmp_path / f"{metrics.parent.parent.name}.onnx"
            windows(tmp_path, "export.py", metrics.parent, "--out", model, "--patches", 8, "--card")
            parity = json.loads(model.with_suffix(".parity.json").read_text("utf-8"))["parity"]
            assert parity["problems"] == []
            assert "µm/px" in model.with_suffix(".md").read_text("utf-8")
    assert len(list(tmp_path.glob("*.onnx"))) == 2


STOPPED_AFTER_AN_EPOCH = """
import checkpoint, common, train
save = checkpoint.Progress.save
def stop(*arguments):
    save(*arguments)
    raise KeyboardInterrupt
checkpoint.Progress.save = stop
common.command(train.main)
"""


# ---------------------------------------------------------------- files


def busy(times, code=32):
    """os.replace of a Windows on which the file is open for the first `times` tries."""
    replace, tries = os.replace, []

    def attempt(source, target):
        tries.append(target)
        if len(tries) <= times:
            error = PermissionError(13, "Access is denied", str(target))
            error.winerror = code
            raise error
        replace(source, target)

    return attempt, tries


@pytest.mark.parametrize("code", [5, 32, 1224])
def test_a_file_that_is_open_for_a_moment_is_waited_for(code, tmp_path, monkeypatch):
    attempt, tries = busy(2, code)
    monkeypatch.setattr(os, "replace", attempt)
    monkeypatch.setattr(common.time, "sleep", lambda seconds: None)
    (tmp_path / "a").write_text("old")
    common.write_text(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "new" and len(tries) == 3


def test_a_file_that_stays_open_is_one_line_and_stays_as_it_was(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(os, "replace", busy(99)[0])
    monkeypatch.setattr(common.time, "sleep", lambda seconds: None)
    (tmp_path / "a").write_text("old")

    def main():
        common.write_text(tmp_path / "a", "new")

    with pytest.raises(SystemExit) as stop:
        common.command(main)
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'a'}: {common.CLOSE_IT}\n"
    assert (tmp_path / "a").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_a_file_that_cannot_be_removed_is_one_line(capsys):
    def main():
        error = PermissionError(13, "…", "m.onnx")
        error.winerror = 1224
        raise error

    with pytest.raises(SystemExit):
        common.command(main)
    assert capsys.readouterr().err == f"error: m.onnx: {common.CLOSE_IT}\n"


def test_a_missing_permission_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "replace", busy(1, code=None)[0])
    monkeypatch.setattr(common.time, "sleep", lambda seconds: pytest.fail("waited"))
    with pytest.raises(PermissionError):
        common.replace(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("name", ["con", "NUL", "aux.tiff", "Com1", "lpt9.x.y"])
def test_no_folder_is_named_like_a_device(name):
    assert common.file_name(name) == f"_{name}"
    assert common.file_name(f"{name}a") == f"{name}a" or "." in name


def test_outputs_that_differ_in_case_are_one_file_on_macos(tmp_path, monkeypatch):
    one, other = tmp_path / "out.csv", tmp_path / "OUT.csv"
    common.check_output("--out", one, [other])
    monkeypatch.setattr(common.sys, "platform", "darwin")
    with pytest.raises(common.UserError, match="reads or writes this file"):
        common.check_output("--out", one, [other])


# ---------------------------------------------------------------- names of images


class WindowsPath(PureWindowsPath):
    """Windows' paths with a disk of their own."""

    files = frozenset()

    def is_file(self):
        return self in self.files  # compared without case

    def resolve(self):
        return self


@pytest.fixture
def disk(monkeypatch):
    """dataset/annotations.py on a Windows whose images are below D:\\slides."""
    files = {WindowsPath(p) for p in (r"D:\slides\a.svs", r"D:\slides\b\c.svs", r"D:\other.svs")}
    monkeypatch.setattr(WindowsPath, "files", frozenset(files))
    monkeypatch.setattr(annotations, "Path", WindowsPath)
    monkeypatch.setattr(annotations, "os", types.SimpleNamespace(path=ntpath, sep="\\"))
    monkeypatch.setattr(annotations, "_walk", lambda root: ["a.svs", "b/c.svs"])
    return WindowsPath(r"D:\slides")


@pytest.mark.parametrize(
    "name, place",
    [
        ("a.svs", "a.svs"),
        ("b/c.svs", "b/c.svs"),
        ("D:/slides/a.svs", "a.svs"),
        ("d:/Slides/b/c.svs", "b/c.svs"),
        ("E:/scans/b/c.svs", "b/c.svs"),
        ("//server/scans/a.svs", "a.svs"),
        ("D:/other.svs", None),
        ("D:other.svs", None),
    ],
)
def test_names_of_images_on_windows(name, place, disk):
    assert annotations.locate([name], disk, []) == {name: place}


@pytest.mark.parametrize("name", ["/other.svs", "/slides/a.svs"])
def test_a_path_from_the_root_of_the_drive_is_refused(name, disk):
    with pytest.raises(common.UserError, match="leads out of the folder"):
        annotations.locate([name], disk, [])


def test_no_name_leads_out_of_the_folder_of_slides(tmp_path):
    for name in (r"\\server\x\a.svs", "//server/x/a.svs", "/x/a.svs", r"C:\x\a.svs", "../x/a.svs"):
        below = match.relative(name, tmp_path)
        assert (tmp_path / below).is_relative_to(tmp_path) and below.endswith("a.svs")


# ---------------------------------------------------------------- what the code says


def sources():
    for file in [*HERE.glob("*.py"), *HERE.glob("*/*.py"), *HERE.glob("*/*/*.py")]:
        if file.relative_to(HERE).parts[0] not in ("tests", "bench", ".venv"):
            yield file, ast.parse(file.read_text(encoding="utf-8"))


# What may be another thing on another system.
MATTERS = re.compile(
    r"\bsys\.platform|\bos\.(name|open|dup2|replace|rename|sysconf|umask|getpid|symlink)\b|\"/dev"
    r"|\bsignal\.|\bsubprocess\.|\bmultiprocessing\b|\bmmap|\bcommon\.replace\b|\.rename\("
    r"|ctypes\.CDLL|\bmps\b|is_windows_path|replace\(\"\\\\|/sys/|O_BINARY|torch\.distributed\.init"
)


def test_every_place_where_the_platform_matters_is_listed():
    listed = set(re.findall(r"`([\w/]+\.py)`", (HERE / "docs/platforms.md").read_text("utf-8")))
    found = set()
    for file, _ in sources():
        text = file.read_text(encoding="utf-8")
        name = file.relative_to(HERE).as_posix()
        if MATTERS.search(text) and not name.startswith("examples/"):
            found.add(name)
    assert found - listed == set()
    assert {name for name in listed if not (HERE / name).exists()} == set()


def test_every_text_file_is_opened_with_its_encoding():
    """Without one, Windows reads and writes cp1252."""
    without = []
    for file, tree in sources():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and opens_text(node):
                if "encoding" not in {keyword.arg for keyword in node.keywords}:
                    without.append(f"{file.relative_to(HERE)}:{node.lineno}")
    assert without == []


def opens_text(call):
    """Whether a call is open(…) of a text file, .read_text() or .write_text(text)."""
    name = getattr(call.func, "id", None)
    if isinstance(call.func, ast.Attribute):
        if call.func.attr == "read_text":
            return not call.args
        return call.func.attr == "write_text" and len(call.args) == 1
    if name != "open" or ast.unparse(call.args[0]) == "os.devnull":
        return False
    words = [node.value for mode in call.args[1:2] for node in ast.walk(mode) if is_text(node)]
    return not any("b" in word for word in words)


def is_text(node):
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


@pytest.mark.parametrize(
    "code, found",
    [
        ("open(p)", True),
        ("open(p, 'w')", True),
        ("open(p, 'rb')", False),
        ("Path(p).read_text()", True),
        ("common.write_text(p, t)", False),
        ("file.write_text(t)", True),
    ],
)
def test_such_openings_are_found(code, found):
    assert opens_text(ast.parse(code, mode="eval").body) == found


def test_no_file_of_the_project_needs_a_module_that_windows_lacks():
    """Imports at the top of a file; inside of a function, one may be tried."""
    missing = "fcntl grp posix pty pwd resource syslog termios tty".split()
    for file, tree in sources():
        for node in tree.body:
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            assert not set(names) & set(missing), f"{file}, line {node.lineno}"


@pytest.mark.parametrize("nothing", ["", "-1"])
def test_hidden_gpus_are_not_tried(nothing, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", nothing)
    monkeypatch.setattr(
        devices.onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"]
    )
    monkeypatch.setattr(devices, "start", lambda *_: pytest.fail("tried"))
    reason = "CUDA_VISIBLE_DEVICES hides every GPU"
    assert devices.open_cuda("m.onnx", 0, 1, expected=True) == (None, reason)


def test_windows_tries_the_gpu_without_devices_in_dev(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(devices, "nvidia_device", lambda: False)
    monkeypatch.setattr(
        devices.onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"]
    )
    monkeypatch.setattr(devices, "start", lambda *_: pytest.fail("tried"))
    assert devices.open_cuda("m.onnx", 0, 1, expected=False) == (None, "no NVIDIA device")
    monkeypatch.setattr(devices.sys, "platform", "win32")
    with pytest.raises(pytest.fail.Exception, match="tried"):
        devices.open_cuda("m.onnx", 0, 1, expected=False)
