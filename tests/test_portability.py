"""Commands on a system without POSIX's own modules and functions: a Windows that is played here by
taking them away. Third-party packages have builds of their own there, so they are imported before.
"""

import ast
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx_models
import pytest
from PIL import Image

from onnx_model import session

HERE = Path(__file__).resolve().parent.parent

# Modules and functions of os that Windows lacks (Python's documentation: "Availability: Unix").
MODULES = ("fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios", "tty")
FUNCTIONS = """chown chroot confstr ctermid fchdir fchmod fchown fork forkpty fpathconf fstatvfs
    getegid geteuid getgid getgroups getloadavg getpgid getpgrp getpriority getresuid getsid getuid
    initgroups killpg lchown lockf login_tty makedev mkfifo mknod nice openpty pathconf
    posix_fadvise posix_fallocate posix_openpt posix_spawn posix_spawnp pread preadv pwrite pwritev
    readv register_at_fork sched_getaffinity sched_setaffinity sched_yield sendfile setegid seteuid
    setgid setpgid setpriority setsid setuid statvfs sync sysconf tcgetpgrp ttyname wait wait3
    wait4 waitid writev""".split()

WITHOUT_POSIX = f"""
import os, shutil, signal, sys
sys.path.insert(0, {str(HERE)!r})
third_party = {{
    "classify": "numpy PIL.Image PIL.ImageDraw PIL.ImageFont openslide onnxruntime tqdm",
    "torch": "torch torchvision safetensors.torch huggingface_hub onnx matplotlib.pyplot numpy "
    "torch._dynamo openslide onnxruntime PIL.Image",
}}
for name in third_party[sys.argv[1]].split():
    __import__(name)
if sys.argv[1] == "classify":
    sys.modules["torch"] = sys.modules["onnx"] = None
usage = shutil.disk_usage("/")
shutil.disk_usage = lambda path: usage  # Windows has its own
for name in {MODULES!r}:
    sys.modules[name] = None
for name in {FUNCTIONS!r}:
    if hasattr(os, name):
        delattr(os, name)
for name in ("SIGKILL", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGCHLD", "SIGPIPE"):
    delattr(signal, name)
del signal.alarm, signal.setitimer, signal.pthread_kill
for name in [name for name in sys.modules if name.split(".")[0] == "filelock"]:
    del sys.modules[name]
sys.argv = sys.argv[2:]
"""


def without_posix(packages, code, *arguments):
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_POSIX + code, packages, "x.py", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=HERE,
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    return done.stdout


COMMAND = "import runpy\nrunpy.run_path({!r}, run_name='__main__')\n"


def command(script, packages, *arguments):
    return without_posix(packages, COMMAND.format(str(HERE / script)), *arguments)


def test_every_command_is_imported():
    names = "classify, data, evaluate, export, models, probe, train, augment"
    assert "all" in without_posix("torch", f"import {names}\nprint('all')\n")


def test_the_second_stage_runs(tmp_path):
    """A small model on two images, with threads that read and an overlay."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        onnx_models.register(monkeypatch)
        onnx_models.write_model(tmp_path / "m.onnx", onnx_models.classifier("gelu"))
    for seed in (1, 2):
        image = Image.fromarray(onnx_models.patches(1, seed=seed, size=400)[0])
        image.save(tmp_path / f"{seed}.tiff", resolution=40000, resolution_unit=3)
    rows = ["filename,x,y", "1.tiff,100,120", "2.tiff,390,5", "1.tiff,3,200"]
    (tmp_path / "c.csv").write_text("\n".join(rows) + "\n")
    stdout = command(
        "classify.py",
        "classify",
        tmp_path / "m.onnx",
        "--slide",
        tmp_path,
        "--candidates",
        tmp_path / "c.csv",
        "--out",
        tmp_path / "out.csv",
        "--overlay",
        tmp_path / "o.png",
    )
    assert "3 candidates scored" in stdout
    model = session.Classifier(tmp_path / "m.onnx", "cpu")
    expected = np.concatenate(
        [model.score(tmp_path / f"{i}.tiff", x, y) for i, x, y in ((1, 100, 120), (2, 390, 5))]
    )
    written = [line.split(",") for line in (tmp_path / "out.csv").read_text().splitlines()[1:]]
    assert np.allclose([float(row[3]) for row in written[:2]], expected, atol=1e-5)
    assert Image.open(tmp_path / "o.png").size[0] > 100
    assert "runs (CPUExecutionProvider)" in command("classify.py", "classify", "--doctor")


@pytest.mark.slow
def test_a_run_from_data_to_model(tmp_path):
    """data.py, train.py (one process), probe.py, evaluate.py and export.py on small images."""
    source = onnx_models.dataset(tmp_path / "data", images=12, each=6)
    given = ("--data", source, "--images", tmp_path / "data")
    runs = ("--runs", tmp_path / "runs", "--device", "cpu")
    assert "cases" in command("data.py", "torch", source, "--images", tmp_path / "data")
    small = ("--lora", "--epochs", 1, "--epoch-size", 16, "--batch-size", 8)
    command("train.py", "torch", *given, *runs, *small)
    command("probe.py", "torch", *given, *runs)
    command(
        "evaluate.py", "torch", tmp_path / "runs", "--out", tmp_path / "report", "--replicates", 100
    )
    for metrics in sorted((tmp_path / "runs").rglob("metrics.json")):
        model = tmp_path / f"{metrics.parent.parent.name}.onnx"
        command("export.py", "torch", metrics.parent, "--out", model, "--patches", 8)
        parity = json.loads(model.with_suffix(".parity.json").read_text())["parity"]
        assert parity["problems"] == []
    assert len(list(tmp_path.glob("*.onnx"))) == 2


def test_no_file_of_the_project_needs_a_module_that_windows_lacks():
    """Imports at the top of a file; inside of a function, one may be tried."""
    for file in [*HERE.glob("*.py"), *HERE.glob("*/*.py"), *HERE.glob("dataset/formats/*.py")]:
        if file.parent.name in ("tests", "bench"):
            continue
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            assert not set(names) & set(MODULES), f"{file}, line {node.lineno}"


def test_windows_tries_the_gpu_without_devices_in_dev(monkeypatch):
    monkeypatch.setattr(session, "nvidia_device", lambda: False)
    monkeypatch.setattr(
        session.onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"]
    )
    monkeypatch.setattr(session, "start", lambda *_: pytest.fail("tried"))
    assert session.open_cuda("m.onnx", 0, 1, expected=False) == (None, "no NVIDIA device")
    monkeypatch.setattr(session.sys, "platform", "win32")
    with pytest.raises(pytest.fail.Exception, match="tried"):
        session.open_cuda("m.onnx", 0, 1, expected=False)
