"""The folder of a report: only files that evaluate.py wrote are replaced or removed; kills; names
of others in what it writes."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import small
from PIL import Image
from run_folders import annotations, make
from small import call

import common
import evaluate
from common import UserError
from reporting import folder

QUICK = ("--no-gallery", "--replicates", 100)


def contents(out):
    return {path.name: path.read_bytes() for path in out.iterdir() if path.name != ".lock"}


def refused(capsys, *arguments):
    assert call(evaluate, *arguments) == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line)
    assert line.startswith("error: ")
    return line


# ---------------------------------------------------------------- whose files they are


@pytest.mark.parametrize("name", ["results.csv", "index.html", "tests.csv", "full_tissue.md"])
def test_files_of_the_user_are_neither_replaced_nor_removed(three_folds, tmp_path, capsys, name):
    out = tmp_path / "mine"
    out.mkdir()
    (out / name).write_text("mine")
    if name == "tests.csv":  # not a file of this report, which has one model: nothing to do with it
        assert call(evaluate, three_folds, "--out", out, *QUICK) == 0
    else:
        said = refused(capsys, three_folds, "--out", out, *QUICK)
        assert f"{out / name}: evaluate.py did not write this file" in said
        assert os.listdir(out) == [name] or name == "full_tissue.md"
    assert (out / name).read_text() == "mine"


def test_a_report_replaces_its_own_files_and_removes_those_it_no_longer_has(
    copied, tissue, tmp_path
):
    out = tmp_path / "report"
    make(copied, tissue, "phikon", "lora", 1.0, 0)
    make(copied, tissue, "uni", "lora", 0.1, 0)
    assert call(evaluate, copied, "--out", out, *QUICK) == 0
    (out / "notes.txt").write_text("mine")
    (out / "full_mine.md").write_text("mine, whatever its name")
    first = contents(out)
    assert {"tests.csv", "scaling_tissue.png", "tests_tissue.md"} <= first.keys()
    shutil.rmtree(copied / "tissue/phikon-lora")
    shutil.rmtree(copied / "tissue/uni-lora/frac0.1-fold0")
    assert call(evaluate, copied, "--out", out, *QUICK) == 0
    second = contents(out)
    gone = first.keys() - second.keys()
    assert gone == {"tests.csv", "tests_tissue.md", "tests_tissue.tex"} | {
        f"scaling_tissue.{kind}" for kind in ("png", "svg")
    }
    assert second["notes.txt"] == b"mine" and second["full_mine.md"].startswith(b"mine")
    listed = json.loads(second["report.json"])["files"]["runs"]
    assert set(listed) == second.keys() - {"report.json", "notes.txt", "full_mine.md"}


def test_a_report_of_an_earlier_version_is_replaced(three_folds, tmp_path):
    """It has no list of its files; they are known by how they start."""
    out = tmp_path / "report"
    assert call(evaluate, three_folds, "--out", out, *QUICK) == 0
    whole = contents(out)
    (out / "report.json").unlink()
    (out / "results.csv").write_text(whole["results.csv"].decode().splitlines()[0] + "\n")
    assert call(evaluate, three_folds, "--out", out, *QUICK) == 0
    assert contents(out) == whole


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", '{"files": []}', '{"format": "mitfig-report", "files": {"runs": 5}}'],
)
def test_a_damaged_list_is_refused(three_folds, tmp_path, capsys, content):
    out = tmp_path / "report"
    assert call(evaluate, three_folds, "--out", out, *QUICK) == 0
    (out / "report.json").write_text(content)
    before = contents(out)
    capsys.readouterr()
    assert "report.json" in refused(capsys, three_folds, "--out", out, *QUICK)
    assert contents(out) == before


def test_a_list_changed_by_hand_leads_nowhere_else(three_folds, tmp_path):
    out = tmp_path / "report"
    assert call(evaluate, three_folds, "--out", out, *QUICK) == 0
    (tmp_path / "precious").write_text("mine")
    (out / "sub").mkdir()
    (out / "sub/precious").write_text("mine")
    content = json.loads((out / "report.json").read_text())
    content["files"]["runs"] += ["../precious", "sub/precious", str(tmp_path / "precious"), "sub"]
    (out / "report.json").write_text(json.dumps(content))
    assert call(evaluate, three_folds, "--out", out, *QUICK) == 0
    assert (tmp_path / "precious").read_text() == (out / "sub/precious").read_text() == "mine"


def test_reports_on_runs_and_on_detection_share_a_folder(tmp_path):
    folder.write(tmp_path, "runs", {"results.csv": "a", "tests.csv": "b"})
    folder.write(tmp_path, "detection", {"detection.csv": "c"})
    folder.write(tmp_path, "runs", {"results.csv": "d"})
    assert sorted(contents(tmp_path)) == ["detection.csv", "report.json", "results.csv"]
    assert (tmp_path / "results.csv").read_text() == "d"


# ---------------------------------------------------------------- before the work


def test_outputs_that_cannot_be_are_found_before_the_work(
    three_folds, tmp_path, capsys, monkeypatch
):
    def work(*_):
        raise AssertionError("work was begun")

    monkeypatch.setattr(evaluate.results, "collect", work)
    (tmp_path / "file").write_text("text")
    run = next(three_folds.glob("*/*/*"))
    for out, said in (
        (tmp_path / "file", "this is a file; name a folder"),
        (tmp_path / "file/below", "this is a file; name a folder"),
        (run, "this is the folder of a run"),
        ("/dev/null", "this is a file; name a folder"),
        ("/dev/null/report", "this is a file; name a folder"),
        ("/proc/report", "no permission to write"),
    ):
        if str(out).startswith("/proc") and os.access("/proc", os.W_OK):
            continue  # of root nobody knows before
        assert said in refused(capsys, three_folds, "--out", out), out
    link = tmp_path / "report"
    link.mkdir()
    (link / "results.csv").symlink_to(tmp_path / "file")
    assert "not a regular file" in refused(capsys, three_folds, "--out", link)
    assert (tmp_path / "file").read_text() == "text"


def test_an_input_is_never_an_output(tmp_path, capsys):
    out = tmp_path / "report"
    out.mkdir()
    picture = out / "errors_tissue.png"
    Image.new("RGB", (20, 20)).save(picture)
    scored = out / "detection.csv"
    scored.write_text("domain,images,figures,candidates,x,y,probability\n")
    folder._write_list(out, {"runs": ["errors_tissue.png"], "detection": ["detection.csv"]})
    before = contents(out)
    (tmp_path / "runs").mkdir()
    assert "would be replaced" in refused(
        capsys, tmp_path / "runs", "--out", out, "--figure", picture
    )
    assert "would be replaced" in refused(
        capsys, "--detection", scored, "--data", tmp_path, "--out", out
    )
    assert contents(out) == before


@pytest.mark.parametrize("content", [b"", b"GIF89a", b"\x89PNG\r\n\x1a\n" + bytes(40), b"%!PS"])
def test_pictures_that_are_none_are_refused(three_folds, tmp_path, capsys, content):
    (tmp_path / "a.png").write_bytes(content)
    flags = (three_folds, "--out", tmp_path / "report", "--figure", tmp_path / "a.png")
    assert "not a readable PNG or JPEG" in refused(capsys, *flags)
    assert "no such file" in refused(capsys, *flags[:-1], tmp_path / "b.png")
    assert not (tmp_path / "report").exists()


# ---------------------------------------------------------------- kills


def test_what_a_killed_process_left_is_replaced(three_folds, tmp_path):
    out = tmp_path / "report"
    assert call(evaluate, three_folds, "--out", out, *QUICK) == 0
    whole = contents(out)
    (out / "results.csv").unlink()
    (out / ".index.html.abc.tmp").write_text("half")
    (out / ".mine.tmp").write_text("mine")
    assert call(evaluate, three_folds, "--out", out, *QUICK) == 0
    after = contents(out)
    assert after.pop(".mine.tmp") == b"mine" and after == whole


@pytest.mark.slow
def test_twenty_kills_and_a_second_run_give_the_files_of_an_uninterrupted_one(
    copied, tissue, tmp_path
):
    for fold in range(2):
        make(copied, tissue, "virchow2", "probe", 1.0, fold)
        make(copied, tissue, "uni", "lora", 0.1, fold)
        make(copied, tissue, "uni", "lora", 1.0, fold, "A")
    arguments = (copied, *QUICK)
    start = time.monotonic()
    assert small.command("evaluate", *arguments, "--out", tmp_path / "whole")[0] == 0
    took = time.monotonic() - start
    whole = contents(tmp_path / "whole")
    rng, stopped = np.random.default_rng(0), 0
    for k, moment in enumerate(rng.permutation(20)):
        out = tmp_path / f"killed{k % 4}"  # each folder sees several kills
        process = small.command("evaluate", *arguments, "--out", out, wait=False)
        if k % 2:  # most of the time nothing is written; half of the kills wait for the writing
            while process.poll() is None and not (out / "report.json").exists():
                time.sleep(0.001)
            time.sleep(0.01 * moment)
        else:
            time.sleep(took * moment / 20)
        stopped += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if k % 4 == 3 or k >= 16:
            assert small.command("evaluate", *arguments, "--out", out)[0] == 0
            assert contents(out) == whole, k
            shutil.rmtree(out)
    assert stopped >= 15


def test_two_reports_into_one_folder_at_once_give_one_of_them(three_folds, tmp_path):
    out, errors = tmp_path / "report", []

    def write(text):
        try:
            for _ in range(20):
                folder.write(out, "runs", {f"{k}.md": text for k in range(5)})
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(text * 1000,)) for text in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    texts = {path.read_text() for path in out.glob("*.md")}
    assert not errors and len(texts) == 1 and not list(out.glob(".*.tmp"))


# ---------------------------------------------------------------- names of others

NAMES = {
    "A": "<script>alert(1)</script>",
    "B": "=cmd|'/C calc'!A0",
    "C": "\x1b[31mred\x07 $\\q$ [x](http://a) \u202eback\nline",
}


@pytest.fixture
def named(tmp_path):
    """Runs whose domains, cases and dataset have such names."""
    table = annotations("@data\x1b[2J", domains=tuple(NAMES.values()), cases=5)
    for model in ("uni", "virchow2"):
        for fold in range(2):
            make(tmp_path / "runs", table, model, "lora", 1.0, fold)
            for domain in NAMES.values():
                make(tmp_path / "runs", table, model, "lora", 1.0, fold, domain)
    return tmp_path / "runs"


def test_names_of_others_command_no_terminal_page_or_spreadsheet(named, tmp_path, capsys):
    out = tmp_path / "report"
    broken = next(named.rglob("domain*B*fold0/metrics.json"), None) or next(
        named.rglob("metrics.json")
    )
    broken.write_text("{}")
    assert call(evaluate, named, "--out", out, "--replicates", 100) == 0
    said = capsys.readouterr()
    for text in (said.out, said.err):
        assert all(c.isprintable() or c == "\n" for c in text)
    assert "\\x1b[2J" in said.out
    for path in out.iterdir():
        if path.suffix in (".md", ".tex", ".html", ".csv"):
            text = path.read_text()
            assert all(c.isprintable() or c == "\n" for c in text), path.name
            assert "<script" not in text or path.suffix in (".csv", ".tex"), path.name
        if path.suffix == ".md":
            assert "](http" not in path.read_text()
    with open(out / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["data"] for row in rows} == {"'@data\\x1b[2J"}
    assert "'" + NAMES["B"] in {row["train_domain"] for row in rows}
    for row in rows:
        assert not any(cell.startswith(("=", "+", "@")) for cell in row.values())
    assert call(evaluate, named, "--grid", "\x1b[31m") == 2
    assert "\x1b" not in capsys.readouterr().err


def test_numbers_below_zero_stay_numbers():
    text = folder.csv_text([{"a": -0.5, "b": "-0.5", "c": None, "d": "x\ny", "e": "\tx"}])
    assert text == "a,b,c,d,e\n-0.5,'-0.5,,x\\ny,\\tx\n"


def test_printable_shows_what_a_terminal_would_obey():
    assert common.printable("µ ± “text” 漢字 é") == "µ ± “text” 漢字 é"
    assert common.printable("\x1b[31m\r\n\u202e\ud800") == "\\x1b[31m\\r\\n\\u202e\\ud800"
    assert common.table([["a\x1b[0m\nb"]], ["x\x07"]).splitlines()[2] == "a\\x1b[0m\\nb"
    with pytest.raises(SystemExit):
        common.fail("\x1b[31m bad")


def test_errors_of_the_command_carry_no_escapes(tmp_path):
    script = (
        "import sys; sys.path.insert(0, sys.argv.pop(1)); import common, evaluate; "
        "common.command(evaluate.main)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(small.HERE.parent), "\x1b[31mruns"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=60,
    )
    assert done.returncode == 2 and done.stderr == (
        "error: \\x1b[31mruns: no such folder of runs\n"
    )


def test_a_lone_surrogate_in_a_name_is_written_as_its_escape(tmp_path):
    folder.write(tmp_path, "runs", {"a.md": "x \ud800"})
    assert (tmp_path / "a.md").read_text() == "x \\ud800"
    with pytest.raises(UserError, match="did not write this file"):
        (tmp_path / "b.md").write_text("mine")
        folder.write(tmp_path, "runs", {"b.md": ""})
