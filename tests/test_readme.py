"""README.md and CONTRIBUTING.md: their commands and flags exist, their examples run, their tables
are true.
"""

import contextlib
import importlib
import io
import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import jpeg_tiff
import numpy as np
import onnx_models
import pytest
import small
from PIL import Image

import models
from encoders.table import flops

ROOT = Path(__file__).resolve().parent.parent
PAGES = {}
for page in (
    *("README.md", "CONTRIBUTING.md", "docs/platforms.md", "examples/README.md"),
    *("examples/grand_challenge/README.md", "examples/qupath/README.md"),
):
    PAGES[page] = (ROOT / page).read_text(encoding="utf-8")
# Commands in shell blocks that are not run: a part of them → why.
NOT_RUN = {
    "venv": "makes an environment",
    "pip install": "installs packages",
    "make ": "minutes; .ci/run and tests/test_sweeps.py run these",
    "h-optimus-0": "gated weights",
    "--download": "gigabytes",
    "midog2022": "needs MIDOG 2022",
    "amibr": "needs AMi-Br",
    "$D": "needs AMi-Br",
    "evaluate.py runs/": "needs the runs above it",
    "--fold 0 1 2": "an hour on the demo",
    "--candidates blobs": "a minute on this much noise; tests/test_blobs.py runs it",
    "--epochs 6": "a minute; sweeps/demo.sh runs the same",
    "runs/demo/": "needs the run above it",
    "data/demo/": "needs the model of the run above it",
}
# Files that the commands write, or that the reader has.
OTHERS_FILES = {
    "config.json",
    "split.json",
    "log.csv",
    "predictions.csv",
    "metrics.json",
    "scored.json",
    "my.csv",
    "demo-out/",
    "scored/",
    "scored/report.csv",
    "MODEL.parity.json",
    "MODEL.md",
    "inputs.json",
    "mitotic-figures.json",
    "multiple-mitotic-figure-classification.json",
    "amibr_train_split.csv",
}
CHECKED = (".py", ".sh", ".json", ".csv", ".cff", ".md", ".txt")


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", PAGES[page], re.DOTALL | re.MULTILINE)


def shell_commands():
    """The commands in the shell blocks of README.md, loops and continued lines as one."""
    lines = []
    for block in blocks("README.md", "bash"):
        text = block.replace("\\\n", " ")
        text = re.sub(r"^for .*?^done$", lambda m: m[0].replace("\n", " "), text, flags=re.M | re.S)
        lines += [line for line in text.splitlines() if line.strip()]
    return lines


@cache
def help_of(script):
    if script.startswith(("bench/", "examples/")):  # they change sys.path
        done = subprocess.run(
            [sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    with contextlib.redirect_stdout(io.StringIO()) as text:
        assert small.call(module, "--help") == 0
    return text.getvalue()


@pytest.mark.parametrize("page", PAGES)
def test_every_flag_of_every_command_exists(page):
    """In blocks and in the text: `python train.py --lora`, `train.py --adapter DIR`."""
    text = PAGES[page].replace("\\\n", " ")
    for script, arguments in re.findall(r"([\w/]+\.py)((?: [^\s#`|]+)+)", text):
        if not (ROOT / script).is_file() or script.startswith("tests/"):
            continue
        for flag in re.findall(r" (--[a-z][a-z-]*)", arguments):
            assert re.search(rf"{flag}(?![\w-])", help_of(script)), f"{script} has no {flag}"


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_is_named_exists(page):
    for name in re.findall(r"`([\w./-]+)`", PAGES[page]):
        if name.endswith(CHECKED + ("/",)) and name not in OTHERS_FILES | {"runs/", "runs-quick/"}:
            ignored = ("data/", "report/", "slides/", "patches/")
            places = ROOT / name, (ROOT / page).parent / name
            assert name in ignored or any(p.exists() for p in places), f"{page} names {name}"


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        linked = (ROOT / page).parent / name if name else ROOT / page
        assert linked.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
            assert anchor in anchors, target


def test_the_table_of_encoders_is_the_codes():
    section = PAGES["README.md"].split("\n## Encoders\n")[1].split("\n## ")[0]
    rows = {}
    for name, cells in re.findall(r"^\| `(\w[\w.+-]*)` \| (.*) \|$", section, re.MULTILINE):
        rows[name] = [cell.strip() for cell in cells.split("|")]
    # Tests register encoders of their own, without a licence of anybody's.
    ours = {n: s for n, s in models.ENCODERS.items() if s.repo or n == "demo"}
    assert list(rows) == list(ours)
    for name, spec in ours.items():
        if spec.repo and not spec.repo.startswith("torchvision/"):
            assert f"](https://huggingface.co/{spec.repo})" in " ".join(rows[name])
        gflop = f"{flops(spec) / 1e9:,.0f}"
        patch = f"{spec.patch} px" if spec.patch else "–"
        params = f"{spec.params / 1e6:,.0f} M"
        size = f"{spec.size} px"
        expected = [params, str(spec.embed_dim), patch, size, gflop, spec.licence]
        assert rows[name][1:7] == expected, name
        assert ("gated" in rows[name]) == spec.gated, name


def test_the_examples_in_contributing_are_the_code():
    encoder, dataset = blocks("CONTRIBUTING.md", "python")
    assert re.sub(r"\s", "", encoder) in re.sub(r"\s", "", read("encoders/table.py"))
    assert re.sub(r"\s", "", dataset) in re.sub(r"\s", "", read("dataset/annotations.py"))


# ---------------------------------------------------------------- what is run


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the project with small files of the names that the examples use."""
    folder = tmp_path_factory.mktemp("checkout") / "mitfig"
    made = ("data", "runs", "runs-quick", "demo-out", "report", "__pycache__", ".*")
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*made))
    coarse = np.random.default_rng(0).integers(100, 250, (40, 30, 3), np.uint8)
    noise = np.asarray(Image.fromarray(coarse).resize((1200, 900)))
    (folder / "slides").mkdir()
    rows = ["filename,x,y,label,case"]
    for case in range(10):
        Image.fromarray(np.roll(noise, 40 * case, 0)).save(folder / f"slides/{case}.png")
        for k in range(6):
            rows.append(f"{case}.png,{200 + 150 * k},{200 + 90 * k},{k % 2},patient{case}")
    (folder / "my.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    onnx_models.write_model(folder / "model.onnx", onnx_models.classifier("gelu"))
    tile = jpeg_tiff.cut(Image.fromarray(noise))[0, 0]
    for name in ("slide.svs", "CMU-1-Small-Region.svs"):
        jpeg_tiff.write(folder / name, [tile] * 48 * 48, 48 * jpeg_tiff.TILE)
    (folder / "points.csv").write_text("x,y\n0,0\n700,650\n2219,2966\n", encoding="utf-8")
    (folder / "candidates.geojson").write_text(GEOJSON, encoding="utf-8")
    (folder / "candidates").mkdir()
    for case in range(10):
        (folder / f"candidates/{case}.csv").write_text("x,y\n300,300\n", encoding="utf-8")
    return folder


GEOJSON = """{"type": "FeatureCollection", "features": [
 {"type": "Feature", "geometry": {"type": "Point", "coordinates": [700, 650]}, "properties": {}},
 {"type": "Feature", "geometry": {"type": "Point", "coordinates": [1500, 800]}, "properties": {}}
]}"""


def shell(command, folder):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
    )


def test_the_shell_commands_run(checkout):
    ran = 0
    for command in shell_commands():
        if not any(part in command for part in NOT_RUN):
            done = shell(command, checkout)
            assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
            ran += 1
    assert ran >= 3
    for part in NOT_RUN:
        assert any(part in command for command in shell_commands()), f"{part} is in no command"


def test_the_python_runs(checkout):
    (snippet,) = blocks("README.md", "python")
    assert 'device="cuda"' in snippet
    code = snippet.replace('device="cuda"', 'device="cpu"') + "\nprint(probability.shape, mitotic)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=checkout, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("(2,)")
