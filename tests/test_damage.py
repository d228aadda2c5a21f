"""Any damage to one run, of any kind, is named; the report on the others is made."""

import json
import os
import shutil

import pytest
from run_folders import folder, half, make
from small import call

import common
import evaluate
from reporting import results

FILES = ("config.json", "split.json", "metrics.json")
VALUES = [
    None,
    True,
    -1,
    0.5,
    float("nan"),
    float("inf"),
    10**30,
    "",
    "text",
    "\ud800",
    "../..",
    [],
    {},
    [[1]],
    ["text"],
    {"key": None},
]


def places(value, path=()):
    """Paths of keys to every entry of a JSON value, of lists only the first."""
    yield path
    if isinstance(value, dict):
        for key in value:
            yield from places(value[key], (*path, key))
    elif isinstance(value, list) and value:
        yield from places(value[0], (*path, 0))


def replaced(content, path, value):
    """A copy of a JSON value with another entry at `path`."""
    if not path:
        return value
    copy = list(content) if isinstance(content, list) else dict(content)
    copy[path[0]] = replaced(content[path[0]], path[1:], value)
    return copy


def removed(content, path):
    copy = list(content) if isinstance(content, list) else dict(content)
    if len(path) == 1:
        del copy[path[0]]
    else:
        copy[path[0]] = removed(content[path[0]], path[1:])
    return copy


def damages(path):
    """(what, content) of the JSON file `path`, each with one entry replaced or removed."""
    content = common.read_json(path)
    for place in places(content):
        if place:
            yield f"no {place}", removed(content, place)
        for value in VALUES:
            yield f"{place} = {value!r}", replaced(content, place, value)


@pytest.fixture
def source(copied):
    """Runs that tell how their data was read, and how they were trained."""
    for path in copied.glob("*/*/*/config.json"):
        content = common.read_json(path)
        content["source"] = dict.fromkeys(evaluate.flags.SOURCE) | {"data": "tissue"}
        content["data"] |= {"mpp": 0.25, "patch": None}
        content["encoder"]["weights_hash"] = "abc"
        common.write_json(path, content)
    return copied


def check(root, what, out=None, capsys=None):
    """The damaged run is named or counts; the others count either way."""
    finished, problems = results.collect([root])
    paths = {run.path for run in finished}
    assert {folder(root, 0), folder(root, 2)} <= paths, what
    assert len(paths) == 3 or [path for path, _ in problems] == [folder(root)], what
    for _, text in problems:
        assert "\n" not in text and len(text) < 400, what
    results.notes(finished), results.results(finished), evaluate.overview(finished)
    if out is not None:
        assert call(evaluate, root, "--out", out, "--replicates", 100) == 0, what
        said = capsys.readouterr()
        assert "Traceback" not in said.err, what
    return len(paths) == 3


@pytest.mark.parametrize("step", [7, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", FILES)
def test_every_entry_replaced_by_every_kind(source, name, step):
    """Reading alone: thousands of damages, or each seventh of them."""
    path = folder(source) / name
    number = counted = 0
    for what, content in list(damages(path))[::step]:
        path.write_text(json.dumps(content))
        counted += check(source, f"{name}: {what}")
        number += 1
    assert number > 300 / step and counted < number


REPORTED = [
    (name, keys, value)
    for name, keys in (
        ("config.json", ("flags", "fold")),
        ("config.json", ("flags", "frac")),
        ("config.json", ("flags", "seed")),
        ("config.json", ("flags", "domain")),
        ("config.json", ("flags", "mpp")),
        ("config.json", ("flags", "fit")),
        ("config.json", ("source", "mpp")),
        ("config.json", ("source", "columns")),
        ("config.json", ("source", "profile")),
        ("config.json", ("source", "data")),
        ("metrics.json", ("sets", "test", "balanced_accuracy")),
        ("metrics.json", ("sets", "test", "n")),
    )
    for value in (float("inf"), float("nan"), [], ["A"], "x", 5, {}, "0.5")
]


@pytest.mark.slow
@pytest.mark.parametrize("name, keys, value", REPORTED, ids=str)
def test_the_whole_report_with_a_damaged_run(source, tmp_path, capsys, name, keys, value):
    path = folder(source) / name
    path.write_text(json.dumps(replaced(common.read_json(path), keys, value)))
    check(source, f"{name}: {keys} = {value!r}", tmp_path / "report", capsys)


NESTED = "[" * 100_000 + "]" * 100_000
FILE_DAMAGES = {
    "nested": lambda path: path.write_text('{"flags": ' + NESTED + "}"),
    "nested less": lambda path: path.write_text('{"flags": ' + NESTED[99_100:100_900] + "}"),
    "latin-1": lambda path: path.write_bytes(b'{"flags": "caf\xe9"}'),
    "utf-16": lambda path: path.write_bytes('{"flags": 1}'.encode("utf-16")),
    "zeros": lambda path: path.write_bytes(bytes(4096)),
    "long number": lambda path: path.write_text('{"flags": ' + "9" * 5000 + "}"),
    "duplicate keys": lambda path: path.write_text('{"flags": 1, "flags": {}, "data": {}}'),
    "empty": lambda path: path.write_bytes(b""),
    "half": lambda path: half(path.name)(path.parent),
    "folder": lambda path: path.unlink() or path.mkdir(),
    "link to nothing": lambda path: path.unlink() or path.symlink_to("nothing"),
    "link to itself": lambda path: path.unlink() or path.symlink_to(path.name),
    "link to a device": lambda path: path.unlink() or path.symlink_to("/dev/zero"),
    "fifo": lambda path: path.unlink() or os.mkfifo(path),
}


@pytest.mark.parametrize("name", [*FILES, "predictions.csv", "log.csv"])
@pytest.mark.parametrize("damage", FILE_DAMAGES)
def test_every_file_damaged_in_every_way(source, name, damage, tmp_path, capsys):
    path = folder(source) / name
    if name == "log.csv":
        path.write_text("epoch,train_loss,val_loss,val_auroc\n1,1,1,0.5\n2,1,1,0.5\n")
    FILE_DAMAGES[damage](path)
    counted = check(source, f"{name}: {damage}")
    assert counted == (name == "log.csv"), damage  # a run without its log is still a result


def test_a_damaged_log_is_named_in_the_report(copied, tmp_path):
    (folder(copied) / "log.csv").write_text("epoch,loss\n1,nothing\n")
    flags = ("--out", tmp_path / "report", "--no-gallery", "--replicates", 100)
    assert call(evaluate, copied, *flags) == 0
    page = (tmp_path / "report/index.html").read_text()
    assert f"no training curve: {folder(copied) / 'log.csv'}: not a log of training" in page


PREDICTIONS = {
    "probability of inf": lambda row: [*row[:6], "inf"],
    "probability of 1.5": lambda row: [*row[:6], "1.5"],
    "probability of -0.1": lambda row: [*row[:6], "-0.1"],
    "a column more": lambda row: [*row, "x"],
    "a column less": lambda row: row[:6],
    "label of 1.0": lambda row: [*row[:4], "1.0", *row[5:]],
    "NUL": lambda row: ["\0", *row[1:]],
    "huge field": lambda row: [row[0], "x" * 200_000, *row[2:]],
}


@pytest.mark.parametrize("damage", PREDICTIONS)
def test_every_kind_of_damaged_row(copied, damage):
    path = folder(copied) / "predictions.csv"
    header, first, *rest = path.read_text().splitlines()
    row = ",".join(PREDICTIONS[damage](first.split(",")))
    path.write_text("\n".join([header, row, *rest]) + "\n")
    assert not check(copied, damage)


def test_an_interrupted_test_on_another_dataset_costs_only_that_set(copied, tissue, tmp_path):
    """Killed between its two files: predictions.csv has the set, metrics.json does not yet."""
    from run_folders import annotations

    extra = annotations("extra", domains="T", cases=4, seed=4)
    shutil.rmtree(folder(copied))
    path = make(copied, tissue, "uni", "lora", 1.0, 1, tests=[extra])
    content = common.read_json(path / "metrics.json")
    before = content["sets"].pop("extra")
    common.write_json(path / "metrics.json", content)
    finished, problems = results.collect([copied])
    assert len(finished) == 3
    (run,) = (run for run in finished if run.path == path)
    assert "extra" not in run.sets and before["n"] == len(extra)
    assert problems == [
        (path, "its test set extra is not finished; the same command continues --test")
    ]
