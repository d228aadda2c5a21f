"""Every output flag of every command, led to an input, a device, a link, a read-only and a full
disk: no input changes, no link or device is replaced, nothing is left half written, and what is
refused is refused in one line.
"""

import os
import shutil
import stat

import pytest
from onnx_models import classifier, dataset, make_run, mounted, register, write_model
from small import call

import augment
import classify
import common
import data
import evaluate
import export
import probe
import train
from demo import picture, synthetic

SHORT = "--device cpu --epochs 1 --epoch-size 4 --batch-size 4 --random-share 0".split()


def scoring(inputs, *outputs):
    return [
        inputs / "model.onnx",
        "--slide",
        inputs / "blobs",
        "--candidates",
        inputs / "blobs/MIDOG.json",
        *outputs,
    ]


def probing(inputs, out):
    return [
        *("--data", inputs / "blobs/MIDOG.json", "--model", "tiny-gelu", "--probe", "prototype"),
        *("--weights", inputs / "run/base.safetensors", "--runs", out),
    ]


def training(inputs, out):
    return [
        *("--data", inputs / "blobs/MIDOG.json", "--model", "tiny-gelu", "--lora", "--rank", "2"),
        *("--weights", inputs / "run/base.safetensors", "--runs", out, *SHORT),
    ]


# Output flag → (module of the command, its words; `inputs` is the folder of all inputs).
FILES = {
    "classify --out": (classify, lambda inputs, out: scoring(inputs, "--out", out)),
    "classify --overlay": (
        classify,
        lambda inputs, out: scoring(inputs, "--out", out.parent / "scores.json", "--overlay", out),
    ),
    "export --out": (
        export,
        lambda inputs, out: [inputs / "run", "--out", out, "--patches", 4, "--device", "cpu"],
    ),
    "export --card": (
        export,
        lambda inputs, out: [
            *(inputs / "runs/run", "--out", inputs.parent / "made.onnx", "--card", out),
            *("--patches", 4, "--device", "cpu"),
        ],
    ),
    "data --save-split": (
        data,
        lambda inputs, out: [inputs / "blobs/MIDOG.json", "--save-split", out],
    ),
    "augment --gallery": (
        augment,
        lambda inputs, out: ["--data", inputs / "blobs/MIDOG.json", "--gallery", out],
    ),
    "picture --out": (
        picture,
        lambda inputs, out: [
            *(inputs / "scored.json", "--annotations", inputs / "blobs/MIDOG.json"),
            *("--out", out),
        ],
    ),
}
FOLDERS = {
    "train --runs": (train, training),
    "classify folder --out": (
        classify,
        lambda inputs, out: [
            *(inputs / "model.onnx", "--slide", inputs / "blobs"),
            *("--candidates", inputs / "points", "--out", out),
        ],
    ),
    "probe --runs": (probe, probing),
    "evaluate --out": (
        evaluate,
        lambda inputs, out: [inputs / "probes", "--out", out, "--replicates", 100, "--no-gallery"],
    ),
    "evaluate --detection --out": (
        evaluate,
        lambda inputs, out: [
            *("--detection", inputs / "scored.json", "--data", inputs / "blobs/MIDOG.json"),
            *("--out", out),
        ],
    ),
    "export --peft": (export, lambda inputs, out: [inputs / "run", "--peft", out]),
    "data --cache": (
        data,
        lambda inputs, out: [inputs / "blobs/MIDOG.json", "--cache", out, "--workers", 1],
    ),
    "synthetic --out": (synthetic, lambda inputs, out: ["--out", out]),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Everything that the commands read, made once."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        register(patch)
        dataset(folder / "blobs", images=8, each=4)
        make_run(folder / "run", "gelu", "lora", folder / "blobs")
        write_model(folder / "model.onnx", classifier("gelu"))
        assert call(classify, *scoring(folder, "--out", folder / "scored.json")) == 0
        (folder / "points").mkdir()
        for image in range(8):
            (folder / f"points/{image}.csv").write_text("x,y\n100,100\n120,90\n")
        assert call(probe, *probing(folder, folder / "probes")) == 0
        assert call(train, *training(folder, folder / "trained")) == 0
        (metrics,) = (folder / "trained").rglob("metrics.json")
        (folder / "runs").mkdir()
        shutil.move(metrics.parent, folder / "runs/run")
    return folder


@pytest.fixture
def inputs(made, tmp_path, monkeypatch):
    register(monkeypatch)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(made, tmp_path / "inputs")
    return tmp_path / "inputs"


def contents(folder):
    """{path: bytes} of all files, without the locks that reading a run may leave."""
    return {
        path: path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "lock"
    }


def status_of(capsys, case, inputs, out):
    """Exit status; a refusal must be one line that is no traceback, and inputs must not change."""
    module, words = case
    before = contents(inputs)
    capsys.readouterr()
    status = call(module, *words(inputs, out))
    error = capsys.readouterr().err
    assert contents(inputs) == before
    assert "Traceback" not in error
    if status:
        assert status == 2 and error.strip().splitlines()[-1].startswith("error: "), error
    return status


def inputs_of(case, inputs):
    """The files among the inputs that the command's words name, an image of the slides too."""
    words = [word for word in case[1](inputs, inputs / "out") if word != inputs / "out"]
    named = [word for word in words if isinstance(word, type(inputs)) and word.is_file()]
    for folder in (inputs / "run", inputs / "runs/run", inputs / "probes"):
        if folder in words:
            named += sorted(path for path in folder.rglob("*") if path.is_file())[:3]
    return [*named, inputs / "blobs/0.tiff"] if inputs / "blobs" in words else named


@pytest.mark.parametrize("flag", FILES)
def test_a_file_never_replaces_an_input(flag, inputs, capsys):
    for path in inputs_of(FILES[flag], inputs):
        link = inputs.parent / "link"
        link.unlink(missing_ok=True)
        link.symlink_to(path)
        for out in (path, link, path.parent / ".." / path.parent.name / path.name):
            assert status_of(capsys, FILES[flag], inputs, out) == 2
        assert link.is_symlink()


@pytest.mark.parametrize("flag", [*FILES, *FOLDERS])
def test_a_device_stays_a_device(flag, inputs, capsys):
    case = FILES.get(flag) or FOLDERS[flag]
    status = status_of(capsys, case, inputs, type(inputs)(os.devnull))
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)
    assert status == 2 or flag in FILES


@pytest.mark.parametrize("flag", FILES)
def test_a_link_stays_a_link(flag, inputs, capsys):
    target = inputs.parent / "target.onnx"
    target.write_bytes(b"old")
    target.chmod(0o640)
    link = inputs.parent / "link.onnx"
    link.symlink_to(target)
    status = status_of(capsys, FILES[flag], inputs, link)
    assert link.is_symlink()
    if status == 0:  # written through, with the permissions that the file had
        assert target.read_bytes() != b"old"
        assert stat.S_IMODE(target.stat().st_mode) == 0o640
    else:
        assert target.read_bytes() == b"old"


@pytest.mark.parametrize("flag", FOLDERS)
def test_a_folder_is_no_input_and_no_file(flag, inputs, capsys):
    for out in (inputs / "blobs/MIDOG.json", inputs / "model.onnx/folder"):
        assert status_of(capsys, FOLDERS[flag], inputs, out) == 2


@pytest.mark.parametrize("flag", [*FILES, *FOLDERS])
def test_a_read_only_disk_is_refused(flag, inputs, capsys):
    case = FILES.get(flag) or FOLDERS[flag]
    with mounted(inputs.parent / "disk", "ro") as disk:
        assert status_of(capsys, case, inputs, disk / "out.onnx") == 2


@pytest.mark.parametrize("flag", [*FILES, *FOLDERS])
def test_a_full_disk_leaves_nothing_half_written(flag, inputs, capsys):
    """Inside a folder of runs or a store, files may remain that the next command continues."""
    case = FILES.get(flag) or FOLDERS[flag]
    with mounted(inputs.parent / "disk", "size=8k") as disk:
        (disk / "old").write_bytes(b"old" * 1000)
        (disk / "filler").write_bytes(bytes(4096))
        assert status_of(capsys, case, inputs, disk / "out.onnx") == 2
        assert (disk / "old").read_bytes() == b"old" * 1000
        if flag in FILES:
            assert {path.name for path in disk.iterdir()} == {"old", "filler"}


def test_every_output_flag_is_tried():
    """A new output flag must be added above."""
    tried = {flag.split(" ", 1)[1].split()[-1] for flag in [*FILES, *FOLDERS]}
    listed = set()
    for module in (train, probe, evaluate, export, classify, data, augment, picture, synthetic):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.argv", [module.__name__, "--help"])
            text = help_of(module)
        listed |= {word for word in OUTPUTS if f"{word} " in text}
    assert listed == tried


OUTPUTS = (
    *("--out", "--overlay", "--card", "--save-split", "--cache", "--gallery", "--runs", "--peft"),
)


def help_of(module):
    import contextlib
    import io

    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        common.command(module.main)
    return said.getvalue()
