import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import common
import runs

ROOT = Path(__file__).resolve().parent.parent
CONFIG = {
    "flags": {"lr": 1e-4, "rank": 16, "targets": ("qkv", "proj")},
    "data": {"fingerprint": "abc"},
    "encoder": {"name": "demo"},
    "environment": {"commit": "x"},
}


def test_run_path_names_what_is_not_default(tmp_path):
    path = runs.run_path(
        tmp_path, "midog2022", "h-optimus-0", "lora", 0.1, 3, suffixes=("r8", "byannotation")
    )
    assert path == tmp_path / "midog2022" / "h-optimus-0-lora-r8-byannotation" / "frac0.1-fold3"
    assert runs.run_path(tmp_path, "d", "m", "probe", 1.0, 0, domain="A").name == "domainA-fold0"
    assert runs.run_path(tmp_path, "d", "m", "probe", 0.001, 0).name == "frac0.001-fold0"


def test_run_path_stays_in_its_root(tmp_path):
    for name in ("../../etc", "..", "a/b", "/abs"):
        path = runs.run_path(tmp_path / "runs", name, name, "probe", 1.0, 0, domain=name)
        assert (tmp_path / "runs").resolve() in path.resolve().parents
        assert ".." not in path.relative_to(tmp_path).parts


def test_second_start_of_a_finished_run_finds_it_finished(tmp_path):
    with runs.open_run(tmp_path / "r", CONFIG) as run:
        assert not run.finished
        run.checkpoint.write_text("x")
        run.finish({"test": {"auroc": 0.5}})
        assert not run.checkpoint.exists()
    with runs.open_run(tmp_path / "r", CONFIG) as run:
        assert run.finished


def test_remains_of_a_killed_force_or_of_an_export_harm_nothing(tmp_path):
    with runs.open_run(tmp_path / "r", CONFIG) as run:
        run.finish({"sets": {}})
    (tmp_path / "r" / ".model.onnx.77.tmp").mkdir()  # an export works there, or was killed
    with runs.open_run(tmp_path / "r", CONFIG) as run:
        assert run.finished
    (tmp_path / "r" / "metrics.json").unlink()  # killed while --force cleared the folder
    (tmp_path / "r" / ".model.safetensors.7.tmp").touch()
    for _ in range(2):
        with runs.open_run(tmp_path / "r", CONFIG, resume=True) as run:
            assert not run.finished
    (tmp_path / "r" / "metrics.json").write_text("{}")
    removed, real = [], type(tmp_path).unlink

    def unlink(path, **options):
        removed.append(path.name)
        real(path, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(tmp_path), "unlink", unlink)
        runs.open_run(tmp_path / "r", CONFIG, force=True).close()
    assert removed[0] == "metrics.json" and removed[-1] == "config.json"


def test_an_unfinished_run_wants_resume(tmp_path):
    runs.open_run(tmp_path / "r", CONFIG).close()
    with pytest.raises(common.UserError, match="--resume"):
        runs.open_run(tmp_path / "r", CONFIG)
    with runs.open_run(tmp_path / "r", CONFIG, resume=True) as run:
        assert not run.finished
    with runs.open_run(
        tmp_path / "new", CONFIG, resume=True
    ) as run:  # harmless where nothing exists
        assert not run.finished


def test_another_setting_under_the_same_name_is_named(tmp_path):
    with runs.open_run(tmp_path / "r", CONFIG) as run:
        run.finish({})
    other = json.loads(json.dumps(CONFIG))
    other["flags"]["lr"] = 3e-4
    for resume in (False, True):
        with pytest.raises(common.UserError, match=r"--lr \(was 0.0001, now 0.0003\).*--force"):
            runs.open_run(tmp_path / "r", other, resume=resume)
    with runs.open_run(tmp_path / "r", other, force=True) as run:
        assert not run.finished and run.config["flags"]["lr"] == 3e-4


def test_the_environment_is_not_compared(tmp_path):
    with runs.open_run(tmp_path / "r", CONFIG) as run:
        run.finish({})
    with runs.open_run(tmp_path / "r", CONFIG | {"environment": {"commit": "y"}}) as run:
        assert run.finished


def test_a_failed_open_releases_the_lock(tmp_path):
    runs.open_run(tmp_path / "r", CONFIG).close()
    with pytest.raises(common.UserError, match="--resume"):
        runs.open_run(tmp_path / "r", CONFIG)
    runs.open_run(tmp_path / "r", CONFIG, resume=True).close()


def test_lock_keeps_a_second_process_off_and_dies_with_its_owner(tmp_path):
    script = textwrap.dedent(f"""
        import sys, time; sys.path.insert(0, {str(ROOT)!r})
        import runs
        run = runs.open_run({str(tmp_path / "r")!r}, {CONFIG!r})
        print("locked", flush=True); time.sleep(60)
    """)
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "locked\n"
        with pytest.raises(common.UserError, match="another process"):
            runs.open_run(tmp_path / "r", CONFIG, resume=True)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    for _ in range(100):
        try:
            runs.open_run(tmp_path / "r", CONFIG, resume=True).close()
            break
        except common.UserError:
            time.sleep(0.05)
    else:
        pytest.fail("the lock outlived its owner")


def test_log_and_truncate(tmp_path):
    with runs.open_run(tmp_path / "r", CONFIG) as run:
        for epoch in range(5):
            run.log({"epoch": epoch, "loss": np.float32(0.5)})
        run.truncate_log(2)
        run.log({"epoch": 2, "loss": 0.25})
        assert (run.path / "log.csv").read_text() == "epoch,loss\n0,0.5\n1,0.5\n2,0.25\n"
        run.truncate_log(0)
        run.log({"epoch": 0, "loss": 1.0})
        assert (run.path / "log.csv").read_text() == "epoch,loss\n0,1.0\n"


def test_predictions_keep_all_digits(tmp_path):
    rows = {
        "set": ["val", "test"],
        "id": ["1", 'a,b\n"c'],
        "case": ["x", "y"],
        "domain": ["", "ä"],
        "label": [0, 1],
        "logit": [0.1 + 0.2, -1e-17],
        "probability": [1 / 3, 0.5],
    }
    runs.write_predictions(tmp_path / "p.csv", rows)
    back = runs.read_predictions(tmp_path / "p.csv")
    for name in runs.PREDICTION_COLUMNS:
        assert list(back[name]) == rows[name]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a,b\n",
        "set,id,case,domain,label,logit,probability\nval,1,c,d,1,0.5\n",
        "set,id,case,domain,label,logit,probability\nval,1,c,d,x,0.5,0.5\n",
    ],
)
def test_broken_predictions_are_refused(tmp_path, text):
    (tmp_path / "p.csv").write_text(text)
    with pytest.raises(common.UserError, match="p.csv"):
        runs.read_predictions(tmp_path / "p.csv")


def test_domains_never_share_a_folder():
    domains = ["a_b", "a/b", "a b", "A_b", "c"]

    def folder(domain, domains=domains):
        return runs.run_path("r", "d", "m", "probe", 1.0, 0, domain, (), domains).name

    names = [folder(domain) for domain in domains]
    # Some file systems do not tell upper from lower case.
    assert len({name.casefold() for name in names}) == len(domains)
    assert names[-1] == "domainc-fold0" and "domaina_b-fold0" in [name.lower() for name in names]
    assert folder("a/b", ["a/b", "c"]) == "domaina_b-fold0"  # as without a clash


def test_a_folder_without_a_configuration_is_not_cleared(tmp_path):
    path = tmp_path / "r"
    path.mkdir()
    (path / "model.safetensors").write_text("precious")
    with pytest.raises(common.UserError, match="model.safetensors.*no config.json.*--force"):
        runs.open_run(path, CONFIG, resume=True)
    assert (path / "model.safetensors").read_text() == "precious"
    (path / "notes.txt").write_text("mine")
    (path / "sub").mkdir()
    (path / "checkpoint.best-3.safetensors").touch()
    with runs.open_run(path, CONFIG, force=True) as run:
        assert not run.finished
    # What a run wrote goes, the user's files stay.
    assert sorted(p.name for p in path.iterdir()) == ["config.json", "lock", "notes.txt", "sub"]


def test_a_glance_at_the_lock_does_not_refuse_a_starting_run(tmp_path):
    """As evaluate.py looks whether a run is under way."""
    (tmp_path / "r").mkdir()
    held = common.try_lock(tmp_path / "r" / "lock")
    threading.Timer(0.3, held.release).start()
    runs.open_run(tmp_path / "r", CONFIG).close()


def test_the_pixels_are_compared_if_both_runs_tell(tmp_path):
    def config(**data):
        return CONFIG | {"data": {"fingerprint": "abc", **data}}

    assert runs.differing(config(), config(pixels="1")) == []
    assert runs.differing(config(pixels="1"), config(pixels="1")) == []
    (line,) = runs.differing(config(pixels="1"), config(pixels="2"))
    assert "images or their µm/px" in line


def test_sets_of_one_class_get_a_line_and_no_figures():
    assert runs.one_class_line("test", np.array([0, 1])) is None
    assert "test set holds label 0 only" in runs.one_class_line("test", np.zeros(4))
    assert "test set B holds label 1 only" in runs.one_class_line("B", np.ones(4))
    values = {"n": 4, "balanced_accuracy": None, "weighted_f1": 1.0, "auroc": None}
    assert runs.metric_rows("r", {"sets": {"test": values}}) == [("r", "test", 4, "–", "–", "–")]
