"""The layout: imports run downwards only, no circles, no torch below its floor, a root that one
reads at a glance.

Imports are read from the text of every file, those inside functions too.
"""

import ast
import subprocess
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = ["train", "probe", "evaluate", "export", "classify", "data"]
# From the bottom to the top. A name without a dot is a file of the root or a whole folder; a file
# imports from its own folder, from its own line and from lines above its own, never from a line
# further down.
FLOORS = [
    ["common"],
    ["runs"],
    ["dataset"],
    ["demo.synthetic"],
    ["flags"],
    ["reporting"],
    ["demo.picture"],
    ["onnx_model"],
    ["scoring"],
    [  # the floor of torch
        "weights",
        "encoders",
        "models",
        "lora",
        "augment",
        "logistic",
        "checkpoint",
        "engine",
        "demo.pretrain",
    ],
    COMMANDS,
]
TORCH_FLOOR = next(i for i, names in enumerate(FLOORS) if "models" in names)
TORCH_FREE = {"data", "evaluate", "classify"}  # the commands that need no torch
TORCH_IF_INSTALLED = {"onnx_model.doctor"}  # prints the version of torch, runs without
TORCH_LIBRARIES = {"torch", "torchvision"}


def read(root):
    """Every module of the project in `root` → {name: set of the names that it imports}.

    "dataset/slides.py" is called dataset.slides. Imports of the project's own modules are resolved
    to files; of libraries only the first name is kept."""
    paths = [*root.glob("*.py"), *(p for f in folders(root) for p in (root / f).rglob("*.py"))]
    names = {}
    for path in paths:
        parts = path.relative_to(root).with_suffix("").parts
        if parts[-1] == "__init__":
            parts = parts[:-1]
        names[".".join(parts)] = path
    return {name: imports(name, path, names) for name, path in names.items()}


def folders(root):
    """The folders of the project that hold code for others to import."""
    inner = {name.split(".")[0] for floor in FLOORS for name in floor}
    return sorted(name for name in inner if (root / name).is_dir())


def imports(name, path, names):
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:  # relative: from the folder of the file, one further up per dot
                package = name.split(".")
                if path.name != "__init__.py":
                    package = package[:-1]
                package = package[: len(package) - node.level + 1]
                base = ".".join([*package, *filter(None, [node.module])])
            targets = [f"{base}.{alias.name}".strip(".") for alias in node.names]
        elif is_import_by_name(node):
            targets = [node.args[0].value]
        else:
            continue
        for target in targets:
            found.add(resolve(target, names))
    return found - {name}


def is_import_by_name(node):
    """importlib.import_module("x") or __import__("x")."""
    if not (isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant)):
        return False
    function = node.func
    called = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    return called in ("import_module", "__import__") and isinstance(node.args[0].value, str)


def resolve(target, names):
    """dataset.slides.read_patch → dataset.slides; torch.nn.functional → torch."""
    parts = target.split(".")
    for end in range(len(parts), 0, -1):
        if ".".join(parts[:end]) in names:
            return ".".join(parts[:end])
    return parts[0]


def floor_of(name):
    """Index in FLOORS, or None for what the table does not hold."""
    for index, floor in enumerate(FLOORS):
        for entry in floor:
            if name == entry or name.startswith(f"{entry}."):
                return index
    return None


def structure_faults(root):
    """What is wrong with the imports of the project in `root`, one line each."""
    graph = read(root)
    graph = {name: targets for name, targets in graph.items() if name != "demo"}
    faults = []
    for name, targets in sorted(graph.items()):
        floor = floor_of(name)
        if floor is None:
            faults.append(f"{name} is on no floor")
            continue
        for target in sorted(targets & graph.keys()):
            above = floor_of(target)
            if above is not None and above > floor:
                faults.append(f"{name} imports {target}, upwards")
            elif name in COMMANDS and target in COMMANDS:
                faults.append(f"{name} imports {target}, both are commands")
        torch_free = floor < TORCH_FLOOR or name in TORCH_FREE
        if torch_free and name not in TORCH_IF_INSTALLED:
            for library in sorted(targets & TORCH_LIBRARIES):
                faults.append(f"{name} imports {library} and must not")
    try:
        TopologicalSorter({k: v & graph.keys() for k, v in graph.items()}).prepare()
    except CycleError as error:
        faults.append("a circle: " + " → ".join(error.args[1]))
    return faults


def root_faults(files):
    """What does not belong at the root, of the names of files there."""
    faults = []
    python = [name for name in files if name.endswith(".py")]
    if len(python) > 16:
        faults.append(f"{len(python)} Python files at the root, at most 16")
    data = (".json", ".csv", ".safetensors", ".npy", ".png", ".onnx", ".sqlite", ".pt", ".bin")
    faults += [f"{name}: data belong in a folder" for name in files if name.endswith(data)]
    return faults


@cache
def tracked():
    """Names of the files at the root that belong to the project (all of them without git)."""
    done = subprocess.run(["git", "-C", str(ROOT), "ls-files"], capture_output=True, text=True)
    if done.returncode == 0:
        return [name for name in done.stdout.splitlines() if "/" not in name]
    return [path.name for path in ROOT.iterdir() if path.is_file()]


def test_imports_run_downwards():
    assert structure_faults(ROOT) == []


def test_the_root_is_small():
    assert root_faults(tracked()) == []


@pytest.mark.parametrize(
    "modules",
    [
        "data, evaluate, classify",
        "dataset.patches, dataset.download, demo.synthetic, demo.picture, flags, reporting.tables",
        "onnx_model.session, onnx_model.doctor",
        "scoring.blobs, scoring.count, scoring.folder",
    ],
)
def test_no_torch_is_loaded(modules):
    code = f"import sys, {modules}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# ---------------------------------------------------------------- the test finds what it is for

PROJECT = {
    "common.py": "import json",
    "runs.py": "import common",
    "dataset/__init__.py": "",
    "dataset/slides.py": "import common",
    "dataset/patches.py": "from dataset import slides\nfrom . import memmap",
    "dataset/memmap.py": "from .slides import read_patch",
    "models.py": "import torch\nfrom dataset.patches import Patches",
    "lora.py": "def add():\n    import models",
    "train.py": "import lora",
    "data.py": "from dataset import slides",
}


@pytest.mark.parametrize(
    "path, text, says",
    [
        ("lora.py", "import models", None),
        ("models.py", "def load():\n    import lora", "a circle: "),
        ("dataset/slides.py", "def f():\n    from dataset import patches", "a circle: "),
        ("dataset/slides.py", "import importlib\nimportlib.import_module('lora')", "upwards"),
        ("dataset/memmap.py", "from ..runs import Run", None),
        ("dataset/memmap.py", "from .. import models", "dataset.memmap imports models, upwards"),
        ("dataset/slides.py", "import models", "dataset.slides imports models, upwards"),
        ("dataset/slides.py", "from torch import nn", "dataset.slides imports torch"),
        ("common.py", "def f():\n    import runs", "common imports runs, upwards"),
        ("train.py", "import data", "train imports data, both are commands"),
        ("train.py", "def f():\n    from data import main", "both are commands"),
        ("data.py", "import torch", "data imports torch"),
        ("other.py", "", "other is on no floor"),
    ],
)
def test_faults_of_imports_are_found(tmp_path, path, text, says):
    for name, content in {**PROJECT, path: text}.items():
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(content, encoding="utf-8")
    faults = structure_faults(tmp_path)
    if says is None:
        assert faults == []
    else:
        assert any(says in fault for fault in faults), faults


def test_faults_of_the_root_are_found():
    assert root_faults(["README.md", "models.py"]) == []
    assert root_faults([f"{i}.py" for i in range(17)]) != []
    assert root_faults(["addresses.json"]) != []
