"""Progress of a sweep: what is done, running, failed and missing, and the time left."""

import argparse
import fcntl
import os

import pytest
from run_folders import annotations, make
from small import HERE, call
from test_sweeps import CHOICES

import common
import evaluate
from common import UserError
from reporting import grid, results, tables

SWEEPS = HERE.parent / "sweeps"


@pytest.fixture
def begun(tmp_path, monkeypatch):
    """A sweep of 2 fractions × 3 folds × probe and LoRA on the way: 7 done, one at work, one
    failed, three missing.
    """
    for name in CHOICES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FRACS", "0.1 1")
    monkeypatch.setenv("FOLDS", "0 1 2")
    monkeypatch.setenv("VAL_PATCHES", "all")
    monkeypatch.setenv("RUNS", str(tmp_path / "runs"))
    tissue = annotations()
    for frac in (0.1, 1.0):
        for fold in range(3):
            make("runs", tissue, "uni", "probe", frac, fold, seconds=6)
    make("runs", tissue, "uni", "lora", 0.1, 0, seconds=1200)
    for fold in (1, 2):
        path = make("runs", tissue, "uni", "lora", 0.1, fold)
        (path / "metrics.json").unlink()
    return tmp_path / "runs"


def counts(text):
    """{(data, model, method): (done, running, failed, missing)} of what --grid prints."""
    return {
        tuple(words[:3]): tuple(map(int, words[3:]))
        for words in map(str.split, text.splitlines()[2:])
        if len(words) == 7 and words[2].split("-")[0] in ("probe", "lora", "full")
    }


SWEEP = f"{SWEEPS / 'scaling.sh'} tissue uni"


def test_grid_says_what_is_done_running_failed_and_missing_and_the_time_left(begun, capsys):
    with open(begun / "tissue/uni-lora/frac0.1-fold1/lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert call(evaluate, begun, "--grid", SWEEP) == 0
    said = capsys.readouterr().out
    assert counts(said) == {
        ("tissue", "uni", "probe"): (6, 0, 0, 0),
        ("tissue", "uni", "lora"): (1, 1, 1, 3),
    }
    lines = said.splitlines()
    assert "failed: uni-lora on tissue, frac 0.1, fold 2" in lines
    assert "running: uni-lora on tissue, frac 0.1, fold 1" in lines
    assert "missing: uni-lora on tissue, frac 1, fold 0 1 2" in lines
    # Five LoRA runs of 1,200 s are left; the probes' 6 s say nothing about those.
    assert (
        lines[-1]
        == "5 of 12 runs are left: about 1.7 h one after the other, by the time that finished "
        "runs took"
    )
    assert not (begun.parent / "report").exists()


def test_grid_looks_where_the_sweep_writes(begun, capsys, monkeypatch):
    """Without a folder, from a place where nothing is; and what lies in another folder counts where
    that is named.
    """
    (begun.parent / "empty").mkdir()
    monkeypatch.chdir(begun.parent / "empty")
    assert call(evaluate, "--grid", SWEEP) == 0
    assert counts(capsys.readouterr().out) == {
        ("tissue", "uni", "probe"): (6, 0, 0, 0),
        ("tissue", "uni", "lora"): (1, 0, 2, 3),
    }
    for fold in range(3):
        make(begun.parent / "more", annotations(), "uni", "lora", 1.0, fold)
    assert call(evaluate, begun.parent / "more", "--grid", SWEEP) == 0
    assert counts(capsys.readouterr().out)["tissue", "uni", "lora"] == (4, 0, 2, 0)


def test_grid_of_a_finished_sweep_and_of_none(begun, capsys, monkeypatch):
    monkeypatch.setenv("METHODS", "probe")
    assert call(evaluate, begun, "--grid", SWEEP) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "all 6 runs are done"
    monkeypatch.setenv("METHODS", "full")
    monkeypatch.setenv("RUNS", str(begun / "nowhere"))
    assert call(evaluate, begun / "nowhere", "--grid", SWEEP) == 0
    said = capsys.readouterr().out
    assert counts(said) == {("tissue", "uni", "full"): (0, 0, 0, 6)}
    assert said.splitlines()[-1] == "6 of 6 runs are left: no finished run tells how long they take"


def test_tagged_runs_are_rows_of_their_own(begun, capsys, monkeypatch):
    tissue = annotations()
    for fold in range(2):
        make(begun, tissue, "uni", "lora", 1.0, fold, suffixes=["lr1e-3"], name="lr1e-3")
    assert call(evaluate, begun, "--grid", SWEEP) == 0
    assert counts(capsys.readouterr().out)["tissue", "uni", "lora"] == (1, 0, 2, 3)
    monkeypatch.setenv("FLAGS", "--name lr1e-3 --loss bce")  # the second says nothing new
    monkeypatch.setenv("FRACS", "1")
    assert call(evaluate, begun, "--grid", SWEEP) == 0
    said = capsys.readouterr().out
    assert counts(said)["tissue", "uni", "probe"] == (3, 0, 0, 0)
    line = next(line.split() for line in said.splitlines() if "lora-lr1e-3" in line)
    assert line == ["tissue", "uni", "lora-lr1e-3", "2", "0", "0", "1"]


def test_tagged_runs_stand_apart_in_the_report(begun, capsys):
    for tag, strength in (("lr1e-3", 2.0), ("lr1e-4", 0.5)):
        for fold in range(2):
            suffixes = ["r8", "patch-center", "crop64", tag]
            choices = {"rank": 8, "pool": "patch-center", "crop": 64, "name": tag}
            make(
                begun,
                annotations(),
                "uni",
                "lora",
                1.0,
                fold,
                strength=strength,
                suffixes=suffixes,
                **choices,
            )
    finished, _ = results.collect([begun])
    named = tables.in_order(finished)
    for tag in ("lr1e-3", "lr1e-4"):
        repeats = named[f"uni LoRA r8 patch center crop64 {tag}"]
        assert [run.flags["name"] for run in repeats] == [tag, tag]
    rows = {row["name"] for row in results.results(finished)}
    assert rows == {"", "lr1e-3", "lr1e-4"}
    lines = evaluate.overview(finished).splitlines()
    assert sum("lora-" in line and "lr1e-3" in line for line in lines) == 1
    assert evaluate.shortened("lora-patch-center-crop64-lr1e-3", 20) == "lora-…-crop64-lr1e-3"


def test_grid_counts_damaged_runs_as_failed_and_other_choices_not_at_all(
    begun, capsys, monkeypatch
):
    path = begun / "tissue/uni-probe/frac1-fold2/predictions.csv"
    path.write_text(path.read_text()[:500])
    tissue = annotations()
    for fold in range(3):  # neither of these is what the sweep wants
        make(begun, tissue, "uni", "lora", 1.0, fold, suffixes=["r8"], rank=8)
        make(begun, tissue, "uni", "lora", 1.0, fold, by="annotation")
        make(begun, tissue, "uni", "lora", 1.0, fold, "A")
    assert call(evaluate, begun, "--grid", SWEEP) == 0
    assert counts(capsys.readouterr().out) == {
        ("tissue", "uni", "probe"): (5, 0, 1, 0),
        ("tissue", "uni", "lora"): (1, 0, 2, 3),
    }
    monkeypatch.setenv("FLAGS", "--rank 8")  # and now it is
    assert call(evaluate, begun, "--grid", SWEEP) == 0
    assert counts(capsys.readouterr().out)["tissue", "uni", "lora"] == (3, 0, 0, 3)


def test_grid_knows_data_by_its_name_and_by_its_place(begun, capsys, monkeypatch):
    place = begun.parent / "my data" / "points.csv"
    place.parent.mkdir()
    place.touch()
    for path in begun.glob("tissue/uni-probe/*/config.json"):
        common.write_json(path, common.read_json(path) | {"source": {"data": str(place)}})
    monkeypatch.setenv("METHODS", "probe")
    for name, done in (
        (place, 6),
        (os.path.relpath(place, SWEEPS.parent), 6),
        ("somewhere/tissue", 6),
        (begun.parent / "other.csv", 0),
    ):
        assert call(evaluate, begun, "--grid", f"{SWEEPS / 'scaling.sh'} '{name}' uni") == 0
        said = capsys.readouterr().out.splitlines()
        assert said[-1].startswith("all 6 runs are done" if done else "6 of 6 runs are left"), name


def test_grid_knows_domains_and_probes(begun, capsys, monkeypatch):
    make(begun, annotations(), "uni", "probe", 1.0, 0, "B")
    monkeypatch.setenv("DOMAINS", "A B")
    monkeypatch.setenv("FOLDS", "0")
    monkeypatch.setenv("METHODS", "probe")
    assert call(evaluate, begun, "--grid", f"{SWEEPS / 'cross_domain.sh'} tissue uni") == 0
    said = capsys.readouterr().out
    assert counts(said) == {("tissue", "uni", "probe"): (1, 0, 0, 1)} and "domain A, fold 0" in said
    wanted = grid.cells(
        "python probe.py --data d --model uni --probe uni l2 --frac 0.1 1 --fold 0 1".split()
    )
    assert [(c["probe"], c["frac"], c["fold"]) for c in wanted] == [
        (probe, frac, fold) for probe in ("uni", "l2") for frac in (0.1, 1.0) for fold in (0, 1)
    ]


def test_grid_tells_runs_apart_that_differ_in_one_setting(begun, capsys, monkeypatch):
    """A run with focal loss is not the plain one, nor the other way round."""
    for name, value in (("DATA", "tissue"), ("DATA_FLAGS", "--split case"), ("FOLDS", "0")):
        monkeypatch.setenv(name, value)
    tissue, token = annotations(), {"pool": "cls", "epochs": 6, "epoch_size": 640}
    make(begun, tissue, "uni", "lora", suffixes=["cls"], **token)
    sweep = f"{SWEEPS / 'amibr.sh'} uni"

    def missing():
        capsys.readouterr()
        assert call(evaluate, "--grid", sweep) == 0
        said = counts(capsys.readouterr().out)
        return {method: numbers[3] for (_, _, method), numbers in said.items()}

    # In runs/ are also a plain probe (begun) and LoRA without --pool, which are no part of this.
    before = missing()
    assert before["lora"] == 6 and before["lora-decay"] == before["lora-domains"] == 1
    make(begun, tissue, "uni", "lora", suffixes=["focal", "cls"], loss="focal", **token)
    changes = {"suffixes": ["cls", "decay"], "name": "decay", "weight_decay": 0.05}
    make(begun, tissue, "uni", "lora", **changes, **token)
    make(begun, tissue, "uni", "lora", suffixes=["cls", "other"], name="other", **token)
    assert missing() == before | {"lora": 5, "lora-decay": 0}


def test_grid_runs_nothing_but_a_sweep_that_can_list(tmp_path, capsys):
    script = tmp_path / "train_everything.sh"
    script.write_text(f"touch {tmp_path}/ran\n")
    for text, said in (
        (str(script), "not a sweep that can list its commands"),
        ("no.sh d", "no such script"),
        ("", "no such script"),
        (f"{SWEEPS / 'scaling.sh'} 'x", "No closing quotation"),
        (f"{SWEEPS / 'scaling.sh'}", "usage: sweeps/scaling.sh"),
    ):
        with pytest.raises(UserError, match=said):
            grid.grid_commands(text)
    assert not (tmp_path / "ran").exists()
    listing = tmp_path / "mine.sh"  # and python is not python there
    listing.write_text(
        f'{grid.GRID_MARK}\n${{PYTHON:-python}} -c \'open("{tmp_path}/ran", "w")\'\n'
        "echo python train.py --data d --model uni --fold 0\n"
    )
    assert grid.grid_commands(str(listing)) == [
        "python train.py --data d --model uni --fold 0".split()
    ]
    assert not (tmp_path / "ran").exists()


def test_flags_are_those_of_the_commands():
    """What grid.py cannot import: their names, kinds and defaults."""
    import probe
    import train

    def actions(parser):
        return {action.dest: action for action in parser._actions}

    def parser_of(script):
        """The parser that a command builds, caught when it parses."""
        caught = []

        def catch(self, *_):
            caught.append(self)
            raise KeyboardInterrupt

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(argparse.ArgumentParser, "parse_args", catch)
            with pytest.raises(KeyboardInterrupt):
                script.arguments()
        return actions(caught[0])

    ours, commands = actions(grid._parser()), [parser_of(script) for script in (train, probe)]
    for name in ("model", "lora", "probe", "runs", "data", "frac", "fold", "domain", "seed"):
        theirs = [command[name] for command in commands if name in command]
        assert theirs, name
        for action in theirs:
            assert action.default == ours[name].default, name
            assert (action.nargs, action.type) == (ours[name].nargs, ours[name].type), name
    known = commands[0].keys() | commands[1].keys()
    assert {*grid.NAMED, *grid.COMPARED, *grid.OPTIONAL} <= known


def test_choices_that_go_into_a_name_are_those_of_the_commands():
    """A command with one of these flags may make a folder with an addition to its name."""
    words = "python train.py --data d --model uni --lora".split()
    assert [cell["label"] for cell in grid.cells(words)] == ["uni-lora"]
    for flag in grid.NAMED:
        value = "pad" if flag == "fit" else "1"
        (cell,) = grid.cells([*words, f"--{flag.replace('_', '-')}", value])
        assert "label" not in cell, flag


def test_a_command_with_a_mistake_is_one_of_the_sweep():
    with pytest.raises(UserError, match="the sweep lists a command with a mistake: .*--fold"):
        grid.cells("python train.py --data d --fold x".split())
