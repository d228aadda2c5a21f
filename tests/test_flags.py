"""Flags that commands share: ranges, sources, further test sets."""

import argparse
import os
import re
import shutil

import pytest
import small

import data
import flags
from common import UserError


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return small.dataset(tmp_path_factory.mktemp("data"))


def parsed(*more):
    parser = argparse.ArgumentParser()
    flags.add_arguments(parser)
    flags.add_split_arguments(parser)
    flags.add_run_arguments(parser)
    return parser.parse_args([str(value) for value in more])


@pytest.mark.parametrize(
    "more, words",
    [
        (["--fold", 10**23], "--fold 1000"),
        (["--fold", 0, 65536], "--fold 65536"),
        (["--fold", -1], "--fold -1"),
        (["--seed", 2**47], "--seed"),
        (["--seed", -1], "--seed -1"),
        (["--mpp", "nan"], "--mpp nan"),
        (["--source-mpp", 0], "--source-mpp"),
        (["--negative", "x"], "--negative needs --positive"),
        (["--positive", ","], "need a label"),
        (["--positive", "1", "--classes", "mitotic=1,other=0"], "mean the same"),
        (["--test", "demo", "--test-images", "a", "b"], "2 folders for 1"),
    ],
)
def test_values_out_of_range_are_refused(table, more, words):
    args = parsed("--data", table, *more)
    with pytest.raises(UserError, match=words):
        flags.further(args, flags.from_arguments(args))


def test_seeds_of_different_runs_differ(table):
    """The largest fold of one seed lies below the first of the next."""
    split = flags.splits(parsed("--fold", 65535, 0), flags.load_dataset(table))
    assert [s.settings["fold"] for s in split] == [65535, 0]
    assert ((3 << 16) + flags.FOLDS - 1) < (4 << 16)
    assert ((flags.SEEDS - 1) << 16) + flags.FOLDS - 1 < 2**63


def test_a_source_is_found_again_from_anywhere(table, monkeypatch, tmp_path):
    monkeypatch.chdir(table.parent)
    args = parsed("--data", table.name, "--source-mpp", 0.5, "--fit", "pad")
    kept = flags.source(args)
    monkeypatch.chdir(tmp_path)
    annotations, choices = flags.from_source(kept)
    assert annotations.fingerprint() == flags.load_dataset(table).fingerprint()
    assert (choices.fit, choices.source_mpp, choices.mpp) == ("pad", 0.5, None)
    with pytest.raises(AttributeError):
        choices.fit = "resize"


def test_splits_come_in_the_order_of_the_flags(table):
    args = parsed("--domain", "B", "A", "--frac", 1, 0.5, 1, "--fold", 1, 0)
    splits = flags.splits(args, flags.load_dataset(table))
    order = [(s.settings["domain"], s.settings["frac"], s.settings["fold"]) for s in splits]
    assert order == [(d, frac, fold) for d in "BA" for frac in (1, 0.5) for fold in (1, 0)]


def test_shared_cases_and_one_class_are_said_once(table, tmp_path, capsys):
    other = small.dataset(tmp_path / "other", cases=3, name="elsewhere")
    lines = other.read_text().splitlines()
    head, rows = lines[0], [line.split(",") for line in lines[1:]]
    rows = [
        ",".join((path, "1", case.replace("elsewhere-", "case"), domain))
        for path, _, case, domain in rows
    ]
    other.write_text("\n".join([head, *rows]) + "\n")
    args = parsed("--data", table, "--test", other, "--fold", 0, 1, "--shared-cases", "allow")
    annotations = flags.from_arguments(args)
    capsys.readouterr()
    tests = flags.further(args, annotations)
    assert [test.name for test in tests] == ["elsewhere"]
    flags.splits(args, annotations, tests)
    out = capsys.readouterr().out
    assert len(re.findall("note: elsewhere shares . cases? with the training on small", out)) == 1
    assert "problem: the test set elsewhere holds label 1 only" in out
    flags.further(args, annotations, quiet=True)
    flags.splits(args, annotations, tests, quiet=True)
    assert capsys.readouterr().out == ""
    args.shared_cases = "refuse"
    with pytest.raises(UserError, match="--test: elsewhere shares .*--shared-cases allow"):
        flags.splits(args, annotations, tests)


def test_cases_that_are_not_trained_on_may_be_tested(table, tmp_path):
    """A test set of the cases that a domain or a given split leaves out."""
    annotations = flags.load_dataset(table)
    lines = table.read_text().splitlines()
    other = table.with_name("held.csv")
    other.write_text("\n".join([lines[0], *(x for x in lines if x.endswith(",B"))]) + "\n")
    args = parsed("--data", table, "--test", other, "--domain", "A")
    assert len(flags.splits(args, annotations, flags.further(args, annotations))) == 1
    args = parsed("--data", table, "--test", other)
    with pytest.raises(UserError, match="held shares"):
        flags.splits(args, annotations, flags.further(args, annotations))


def test_a_test_set_is_read_in_a_way_of_its_own(table, tmp_path):
    other = small.dataset(tmp_path / "other", cases=4, name="elsewhere")
    text = other.read_text().replace(",0,", ",typical,").replace(",1,", ",odd,")
    other.write_text(text.replace("label", "kind"))
    (other.parent / "patches").rename(tmp_path / "patches")
    args = parsed("--data", table, "--positive", 1, "--test", other)
    with pytest.raises(UserError, match="no column for label"):
        flags.further(args, flags.from_arguments(args))
    args.test = [f"{other}:label=kind,positive=typical,images={tmp_path}"]
    (test,) = flags.further(args, flags.from_arguments(args))
    assert test.label.mean() == 0.5 and test.name == "elsewhere" and len(test) == 24
    args.test = [f"{other}:label=kind,negative=typical,positive=a,positive=b"]
    with pytest.raises(UserError, match="positive needs one value"):
        flags.further(args, flags.from_arguments(args))


def test_names_that_are_not_utf8_are_one_line(table, tmp_path):
    name = os.fsencode(tmp_path) + b"/lat\xfcn.csv"
    try:
        shutil.copy(table, name)
    except OSError:
        pytest.skip("this file system has UTF-8 names only")
    args = parsed("--data", os.fsdecode(name), "--images", table.parent)
    with pytest.raises(UserError, match="not UTF-8"):
        flags.from_arguments(args)


def test_data_says_which_planned_sets_hold_one_class(tmp_path, capsys):
    table = small.dataset(tmp_path)
    rows = [line.split(",") for line in table.read_text().splitlines()]
    for row in rows[1:]:
        if row[2] not in ("case04", "case05"):  # one case of each domain holds all figures
            row[1] = "0"
    table.write_text("\n".join(",".join(row) for row in rows) + "\n")
    assert small.call(data, table, "--fold", 0, "--frac", 1, 0.5) == 0
    out = capsys.readouterr().out
    assert out.count("problem: small, fold 0: the test set holds label 0 only") == 1
