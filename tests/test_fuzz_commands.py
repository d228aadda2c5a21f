"""Every command with mutated flags and mutated input files: it ends in time with its exit status
and at most one line of error, without a traceback, without eating the memory, with its inputs as
they were, and never with a candidate in another place.

A thousand tries by default, ten thousand with `-m slow`. A failure names its seed:
`FUZZ_SEED=17 pytest tests/test_fuzz_commands.py -k one_seed` tries that alone.
"""

import collections
import contextlib
import json
import os
import random
import shutil
import signal
import sqlite3
import sys

import psutil
import pytest
import run_folders
import small
from onnx_models import classifier, dataset, register, write_model

import augment
import classify
import data
import evaluate
import export
import models
import probe
import train

SECONDS = 30
BYTES = 2 << 30

NUMBERS = (
    *("0", "-1", "-0.0", "1", "2", "3", "0.5", "1e-300", "1e400", "-1e9", "nan", "inf", "-inf"),
    *("1" * 24, "2147483648", "9223372036854775808", "0x10", "1_000", "١٢", "0,25", "1.", " 7 "),
)
TEXTS = (
    *(
        "",
        " ",
        "-",
        "--",
        ".",
        "..",
        "/",
        "~",
        "*",
        "a/b",
        "a\\b",
        "C:\\x",
        "x" * 300,
        "é",
        "e\u0301",
    ),
    *("$x$", "=1+1", "a\tb", "\x1b[31m", "\udce9", "cpu", "cuda", "cuda:9", "meta", "auto"),
    *("random", "uni", "f1", "sensitivity=0.9", "sensitivity=2", "mitotic=1,other=2", "label=x"),
    *("/dev/null", "/dev/zero", "/proc/self/mem", "missing.csv", "path=a,path=b", "tiny", "1=2"),
)
VALUES = (*NUMBERS, *TEXTS)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """One of each input file."""
    folder = tmp_path_factory.mktemp("made")
    small.dataset(folder, cases=6, per_case=4)
    annotations = dataset(folder / "blobs", images=5, each=2)
    content = json.loads(annotations.read_text())
    centres = [
        ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2, f"{a['image_id']}.tiff")
        for a in content["annotations"]
        for box in [a["bbox"]]
    ]
    features = [
        {
            "type": "Feature",
            "id": str(i),
            "geometry": {"type": "Point", "coordinates": [x, y]},
            "properties": {"classification": {"name": ("Mitosis", "Non-mitosis")[i % 2]}},
        }
        for i, (x, y, _) in enumerate(centres)
    ]
    (folder / "0.geojson").write_text(
        json.dumps({"type": "FeatureCollection", "features": features})
    )
    lines = [f"{name},{x},{y},{i % 2}" for i, (x, y, name) in enumerate(centres)]
    (folder / "points.csv").write_text("\n".join(["filename,x,y,label", *lines]) + "\n")
    points = [{"name": "c", "point": [x / 4000, y / 4000, 0]} for x, y, _ in centres]
    (folder / "challenge.json").write_text(
        json.dumps({"name": "c", "type": "Multiple points", "points": points})
    )
    slide_runner(folder / "cells.sqlite", centres)
    table = run_folders.annotations(domains=("A", "B"), cases=4, size=4)
    for fold in (0, 1):
        run_folders.make(folder / "runs", table, fold=fold)
    write_model(folder / "model.onnx", classifier("gelu"))
    with pytest.MonkeyPatch.context() as patch:
        register(patch)
        patch.chdir(folder)
        words = ("--data", "small.csv", "--model", "tiny", "--weights", "random")
        assert small.call(probe, *words, "--runs", "probes") == 0
        words = ("--slide", "blobs", "--candidates", "blobs/MIDOG.json", "--out", "scored.json")
        assert small.call(classify, "model.onnx", *words) == 0
    return folder


def slide_runner(path, centres):
    with contextlib.closing(sqlite3.connect(path)) as base:
        base.executescript(
            "CREATE TABLE Slides (uid INTEGER PRIMARY KEY, filename TEXT, width INTEGER, "
            "height INTEGER);"
            "CREATE TABLE Classes (uid INTEGER PRIMARY KEY, name TEXT);"
            "CREATE TABLE Annotations (uid INTEGER PRIMARY KEY, slide INTEGER, type INTEGER, "
            "agreedClass INTEGER, deleted INTEGER DEFAULT 0);"
            "CREATE TABLE Annotations_coordinates (uid INTEGER PRIMARY KEY, coordinateX INTEGER, "
            "coordinateY INTEGER, slide INTEGER, annoId INTEGER, orderIdx INTEGER);"
            "INSERT INTO Classes VALUES (1, 'mitotic figure'), (2, 'hard negative');"
        )
        for i in range(5):
            base.execute("INSERT INTO Slides VALUES (?, ?, 480, 480)", (i + 1, f"{i}.tiff"))
        for i, (x, y, name) in enumerate(centres, 1):
            slide = int(name[0]) + 1
            base.execute("INSERT INTO Annotations VALUES (?, ?, 1, ?, 0)", (i, slide, 1 + i % 2))
            base.execute(
                "INSERT INTO Annotations_coordinates (coordinateX, coordinateY, slide, annoId) "
                "VALUES (?, ?, ?, ?)",
                (round(x), round(y), slide, i),
            )
        base.commit()


# ---------------------------------------------------------------- one try

ANNOTATIONS = ("blobs/MIDOG.json", "small.csv", "0.geojson", "points.csv", "cells.sqlite")
CANDIDATES = ("blobs/MIDOG.json", "0.geojson", "points.csv", "cells.sqlite", "challenge.json")
RUN = "probes/small/tiny-probe/frac1-fold0"


def reading(rng):
    given = rng.choice(ANNOTATIONS)
    return [given, "--images", "." if given == "small.csv" else "blobs"]


def data_words(rng):
    return [*reading(rng), "--fold", "0", "--frac", "1", "--seed", "0", "--val-frac", "1"]


def classify_words(rng):
    given = rng.choice(CANDIDATES)
    slide = "blobs/0.tiff" if given in ("0.geojson", "challenge.json") else "blobs"
    return [
        *("model.onnx", "--slide", slide, "--candidates", given, "--device", "cpu"),
        *("--out", "out" + os.path.splitext(given)[1], "--threshold", "0.5", "--batch-size", "8"),
        *("--workers", "2", "--threads", "1", "--mpp", "0.25"),
    ]


def evaluate_words(rng):
    if rng.random() < 0.3:
        return [
            *("--detection", "scored.json", "--data", rng.choice(ANNOTATIONS[:4])),
            *("--images", "blobs", "--threshold", "0.5", "--out", "report"),
        ]
    return ["runs", "--out", "report", "--replicates", "100", "--no-gallery"]


def export_words(rng):
    return [
        *(RUN, "--out", "m.onnx", "--precision", "fp32", "--opset", "23", "--threshold", "f1"),
        *("--patches", "2", "--device", "cpu", "--input", "uint8"),
    ]


def probe_words(rng):
    return [
        *("--data", *reading(rng), "--model", "tiny", "--weights", "random", "--runs", "made-runs"),
        *("--probe", "prototype", "--shots", "2", "--k", "3", "--batch-size", "8", "--fold", "0"),
        *("--frac", "1", "--seed", "0", "--device", "cpu", "--dtype", "fp32", "--fit", "resize"),
    ]


def train_words(rng):
    return [
        *("--data", *reading(rng), "--model", "tiny", "--weights", "random", "--runs", "made-runs"),
        *("--lora", "--rank", "2", "--alpha", "2", "--dropout", "0.1", "--epochs", "1", "--lr"),
        *("1e-4", "--epoch-size", "2", "--batch-size", "2", "--random-share", "0", "--jitter", "0"),
        *("--fold", "0", "--frac", "1", "--device", "cpu", "--accumulate", "1", "--seed", "0"),
    ]


def models_words(rng):
    return ["tiny", "--weights", "random", "--device", "cpu", "--dtype", "fp32"]


def augment_words(rng):
    return ["--data", *reading(rng), "--gallery", "gallery.png"]


COMMANDS = {  # command → (its words, how often it is tried)
    data: (data_words, 10),
    classify: (classify_words, 8),
    evaluate: (evaluate_words, 3),
    export: (export_words, 1),
    probe: (probe_words, 3),
    train: (train_words, 3),
    models: (models_words, 1),
    augment: (augment_words, 1),
}
# Files that a try may damage, by command.
DAMAGED = {
    data: ANNOTATIONS,
    classify: (*CANDIDATES, "model.onnx", "blobs/0.tiff"),
    evaluate: tuple(
        f"runs/tissue/uni-probe/frac1-fold0/{name}"
        for name in ("config.json", "metrics.json", "split.json", "predictions.csv")
    )
    + ("scored.json",),
    export: tuple(
        f"{RUN}/{name}"
        for name in ("config.json", "metrics.json", "predictions.csv", "model.safetensors")
    ),
    probe: ANNOTATIONS,
    train: ANNOTATIONS,
    augment: ANNOTATIONS,
}
PIECES = (
    b"\0",
    b"\xff",
    b'"',
    b",",
    b"\n",
    b"{",
    b"]",
    b"1e999",
    b"NaN",
    b"-1",
    b"null",
    b"9" * 30,
)


def mutate_words(rng, words):
    words = list(words)
    for _ in range(rng.choice((0, 1, 1, 1, 2, 3))):
        at = rng.randrange(len(words))
        kind = rng.random()
        if kind < 0.7:
            words[at] = rng.choice(VALUES)
        elif kind < 0.85:
            del words[at]
        else:
            words.insert(at, rng.choice(words))
        if not words:
            break
    return words


def mutate_file(rng, path):
    content = bytearray(path.read_bytes())
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(len(content) + 1)
        kind = rng.random()
        if kind < 0.4:
            content[at : at + 1] = bytes([rng.randrange(256)])
        elif kind < 0.8:
            content[at : at + rng.choice((0, 1, 8))] = rng.choice(PIECES)
        else:
            del content[at : at + rng.choice((1, 10, 1000))]
    path.write_bytes(content)


def state_of(folder):
    """Content of every file, by its name, without the locks that reading a run leaves."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "lock"
    }


def places(path, suffix):
    """Where the candidates of a JSON, GeoJSON or CSV are, in their order; None of other formats."""
    if suffix == ".csv":
        return [line.split(",")[:3] for line in path.read_text().splitlines()]
    if suffix in (".json", ".geojson"):
        content = json.loads(path.read_text())
        for key in ("annotations", "features", "points"):
            if key in content:
                return [a.get("bbox") or a.get("point") or a["geometry"] for a in content[key]]
    return None


class TooLong(BaseException):
    pass


def ring(*_):
    raise TooLong


def attempt(seed, folder, inputs, capsys):
    """One try in the folder, which holds `inputs` (name → content) before and afterwards."""
    rng = random.Random(seed)
    weights = [often for _, often in COMMANDS.values()]
    module = rng.choices(list(COMMANDS), weights)[0]
    words = COMMANDS[module][0](rng)
    damaged = None
    if module in DAMAGED and rng.random() < 0.5:
        named = [name for name in DAMAGED[module] if name in words] or DAMAGED[module]
        damaged = folder / rng.choice(named)
        mutate_file(rng, damaged)
    if damaged is None or rng.random() < 0.2:
        words = mutate_words(rng, words)
    expected = dict(inputs)
    if damaged:
        expected[damaged.relative_to(folder).as_posix()] = damaged.read_bytes()
    capsys.readouterr()
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        status = small.call(module, *words)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    said = capsys.readouterr()
    assert status in (0, 1, 2), (module.__name__, words, status)
    assert "Traceback" not in said.err
    if status == 2:
        last = said.err.strip().splitlines()[-1]
        by_argparse = ".py: error: " in last  # which repeats the user's own words
        mine = last.startswith("error: ") and last.isprintable()
        assert mine or by_argparse, (module.__name__, words, said.err[-500:])
    after = state_of(folder)
    assert {name: after.get(name) for name in expected} == expected, (module.__name__, words)
    if module is classify and status == 0 and not damaged and "--out" in words:
        given, out = (folder / words[words.index(f) + 1] for f in ("--candidates", "--out"))
        if out.is_file():
            assert places(out, given.suffix) == places(given, given.suffix), words
    for name in after.keys() - inputs.keys():
        (folder / name).unlink()
    if damaged:
        damaged.write_bytes(inputs[damaged.relative_to(folder).as_posix()])
    return module, status


@pytest.fixture
def arena(made, tmp_path, monkeypatch):
    """The folder of the tries with the inputs in it, and a clock that rings after SECONDS."""
    folder = tmp_path / "arena"
    shutil.copytree(made, folder)
    register(monkeypatch)
    monkeypatch.setenv("MITOSIS_ROOT", str(tmp_path / "datasets"))
    monkeypatch.setenv("MITOSIS_DATA", "small.csv")  # not the demo, which takes seconds to paint
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(folder)
    old = signal.signal(signal.SIGALRM, ring)
    yield folder
    signal.signal(signal.SIGALRM, old)


def try_all(seeds, folder, capsys):
    inputs, memory = state_of(folder), psutil.Process().memory_info().rss
    ends = collections.Counter()
    for seed in seeds:
        try:
            module, status = attempt(seed, folder, inputs, capsys)
        except (Exception, TooLong) as error:
            raise AssertionError(f"FUZZ_SEED={seed}: {type(error).__name__}: {error}") from error
        ends[module.__name__, status] += 1
        if seed % 50 == 0:
            assert psutil.Process().memory_info().rss - memory < BYTES, f"memory by seed {seed}"
    return ends


posix = pytest.mark.skipif(sys.platform == "win32", reason="needs an interval timer")


# Two halves, for two processes side by side.
@posix
@pytest.mark.parametrize("half", (0, 1))
def test_a_thousand_tries(half, arena, capsys):
    ends = try_all(range(500 * half, 500 * half + 500), arena, capsys)
    for module in COMMANDS:  # neither all refused nor all accepted
        assert ends[module.__name__, 0] and ends[module.__name__, 2], (module.__name__, ends)


@posix
@pytest.mark.slow
@pytest.mark.long
def test_ten_thousand_tries(arena, capsys):
    try_all(range(1000, 11_000), arena, capsys)


@posix
@pytest.mark.skipif("FUZZ_SEED" not in os.environ, reason="FUZZ_SEED names no try")
def test_one_seed(arena, capsys):
    try_all([int(os.environ["FUZZ_SEED"])], arena, capsys)
