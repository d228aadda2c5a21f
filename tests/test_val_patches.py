"""--val-patches: the sample, the choice among the epochs that were best on it, interruptions."""

import csv
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import run_folders
import small
from test_train import assert_equal_runs, flags, folder, weights

import checkpoint
import common
import data
import engine
import runs
import train
from dataset.sampler import validation_sample
from reporting import figures, grid, results, tables

N = 8
SAMPLED = f"lora-val{N}"


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """120 annotations of 20 cases; 24 of 4 cases are validation."""
    return small.dataset(tmp_path_factory.mktemp("data"), cases=20)


def sampled(table, out, *more, **size):
    return flags(table, out, "--val-patches", N, *more, **{"epoch_size": 8, **size})


# ---------------------------------------------------------------- the sample


def uneven(positives=(0, 1, 7, 40, 3, 200), negatives=(9, 30, 0, 300, 5, 100)):
    """Annotations of cases with these numbers of either class, in two domains, shuffled."""
    case = np.repeat(np.arange(len(positives)), positives), np.repeat(np.arange(6), negatives)
    label = np.repeat([1, 0], [sum(positives), sum(negatives)]).astype(np.int8)
    order = np.random.default_rng(0).permutation(len(label))
    case, label = np.concatenate(case)[order], label[order]
    names = np.array([f"c{k}" for k in case])
    ids = np.array([f"a{k}" for k in range(len(case))])
    x = np.zeros(len(case))
    domain = np.array(list("ABBABA"))[case]
    return data.Annotations(ids, names, names, domain, x, x, label, "uneven", ".")


@pytest.mark.parametrize("count", [2, 10, 50, 333, 594])
def test_the_sample_has_each_class_domain_and_case_in_proportion(count):
    a = uneven()
    rows = np.flatnonzero(np.arange(len(a)) % 7 > 0)  # validation is a part of the table
    drawn = validation_sample(a, rows, count, 0, 0)
    assert len(drawn) == count and np.isin(drawn, rows).all()
    assert (np.diff(drawn) > 0).all()  # in the order of the rows, none twice
    for label in (0, 1):
        of_class, taken = rows[a.label[rows] == label], drawn[a.label[drawn] == label]
        assert abs(len(taken) - count * len(of_class) / len(rows)) <= 1
        for column in (a.domain, a.case):
            for name in np.unique(column[of_class]):
                quota = len(taken) * (column[of_class] == name).mean()
                assert abs((column[taken] == name).sum() - quota) < 1


def test_the_sample_is_a_function_of_seed_and_fold():
    a = uneven()
    rows = np.arange(len(a))
    first = validation_sample(a, rows, 100, 3, 1)
    assert (validation_sample(a, rows, 100, 3, 1) == first).all()
    for other in ((4, 1), (3, 2)):
        assert not np.array_equal(validation_sample(a, rows, 100, *other), first)
    # Every annotation is as likely as any other: 4 standard deviations at 1 of 7, and no place of
    # a case is left out.
    times = np.zeros(len(a))
    for seed in range(400):
        times[validation_sample(a, rows, len(a) // 7, seed, 0)] += 1
    assert abs(times - 400 / 7).max() < 4.5 * np.sqrt(400 / 7 * 6 / 7)


def test_rare_classes_single_ones_and_small_sets():
    rare = uneven(positives=(0, 0, 1, 0, 1, 0))
    rows = np.arange(len(rare))
    for seed in range(20):
        for count in (2, 3, 20):
            labels = rare.label[validation_sample(rare, rows, count, seed, 0)]
            assert len(labels) == count and labels.sum() == 1
    mostly = uneven(negatives=(0, 0, 0, 1, 0, 0))
    labels = mostly.label[validation_sample(mostly, np.arange(len(mostly)), 5, 0, 0)]
    assert labels.tolist().count(0) == 1 and len(labels) == 5
    assert len(validation_sample(rare, rows, 1, 0, 0)) == 1
    for count in (len(rows), len(rows) + 1, 10**9):
        assert validation_sample(rare, rows, count, 0, 0) is rows
    alone = np.flatnonzero(rare.label == 0)  # a set of one class, which is said elsewhere
    assert len(validation_sample(rare, alone, 30, 0, 0)) == 30


# ---------------------------------------------------------------- the choice


class Watched:
    """Validations of a run with invented losses: those of the sample in turn, those of the whole
    set by epoch; weights and logits as they were.
    """

    def __init__(self, monkeypatch, on_sample, on_all):
        self.weights, self.logits, self.files, self.epoch = {}, {}, [], 0
        losses, real = engine.validation_loss, engine.predict_together
        save = checkpoint.Progress.save

        def predict(model, reader, count, *rest):
            logits = real(model, reader, count, *rest)
            if count == N:
                self.epoch += 1
                self.weights[self.epoch] = checkpoint.trained_state(model, "lora")
            else:
                state = checkpoint.trained_state(model, "lora")["head.weight"]
                same = (e for e, w in self.weights.items() if w["head.weight"].equal(state))
                self.last = next(same)
                self.logits.setdefault(self.last, logits)
            return logits

        def loss(labels, logits):
            if len(labels) == N:
                return on_sample[self.epoch - 1]
            assert losses(labels, logits) > 0
            return on_all[next(e for e, x in self.logits.items() if x is logits)]

        def saved(progress, *rest):
            save(progress, *rest)
            files = progress.run.path.glob("checkpoint.best-*")
            self.files.append(sorted(int(p.stem.split("-")[1]) for p in files))

        monkeypatch.setattr(engine, "predict_together", predict)
        monkeypatch.setattr(engine, "validation_loss", loss)
        monkeypatch.setattr(checkpoint.Progress, "save", saved)


def test_the_lowest_loss_on_the_whole_set_decides_among_the_best_of_the_sample(
    tmp_path, table, monkeypatch, capsys
):
    """The best epoch of the sample, 3, is the worst of the kept ones; the best of all, 1, was not
    kept and is not known.
    """
    seen = Watched(monkeypatch, [0.5, 0.2, 0.1, 0.3, 0.25, 0.3], {3: 0.9, 2: 0.6, 5: 0.4})
    assert small.call(train, *sampled(table, tmp_path, epochs=6)) == 0
    assert seen.files == [[1], [1, 2], [1, 2, 3], [2, 3, 4], [2, 3, 5], [2, 3, 5]]
    run = folder(tmp_path, SAMPLED)
    assert list(seen.logits) == [3, 2, 5]  # each once
    training = common.read_json(run / "metrics.json")["training"]
    assert training["best_epoch"] == 5 and training["epochs"] == 6
    assert training["val_loss"] == 0.4 and training["sample_loss"] == 0.25
    assert {"val_auroc", "sample_auroc"} < training.keys()
    ours = weights(run)
    assert all(ours[name].equal(value) for name, value in seen.weights[5].items())
    predictions = runs.read_predictions(run / "predictions.csv")
    of_val = predictions["set"] == "val"
    assert (predictions["logit"][of_val] == seen.logits[5]).all() and of_val.sum() == 24
    log = list(csv.DictReader(open(run / "log.csv")))
    assert [float(row["sample_loss"]) for row in log] == [0.5, 0.2, 0.1, 0.3, 0.25, 0.3]
    assert [row["val_loss"] for row in log] == ["", "0.6", "0.9", "", "0.4", ""]
    assert [bool(row["val_auroc"]) for row in log] == [bool(row["val_loss"]) for row in log]
    out = capsys.readouterr().out
    assert "validation 24 (8 of them after each pseudo-epoch)" in out
    assert "kept pseudo-epoch 5: " in out and "(3 has 0.9000, 2 has 0.6000, 5 has 0.4000)" in out
    assert common.read_json(run / "config.json")["flags"]["val_patches"] == N
    assert not list(run.glob("checkpoint*"))


def test_of_equal_losses_the_better_on_the_sample_then_the_earlier(tmp_path, table, monkeypatch):
    Watched(monkeypatch, [0.3, 0.2, 0.2, 0.2, 0.2], {2: 0.5, 3: 0.4, 4: 0.4})
    assert small.call(train, *sampled(table, tmp_path, epochs=5)) == 0
    assert run_of(tmp_path)["training"]["best_epoch"] == 3


def test_patience_counts_on_the_sample(tmp_path, table, monkeypatch, capsys):
    Watched(monkeypatch, [0.5, 0.2, 0.3, 0.4, 0.1], {2: 0.8, 3: 0.7, 4: 0.9})
    assert small.call(train, *sampled(table, tmp_path, "--patience", 2, epochs=6)) == 0
    assert "stopped after pseudo-epoch 4 of 6" in capsys.readouterr().out
    training = run_of(tmp_path)["training"]
    assert training["epochs"] == 4 and training["best_epoch"] == 3


def run_of(out, name=SAMPLED):
    return common.read_json(folder(out, name) / "metrics.json")


def test_losses_on_the_whole_set_are_those_of_a_run_without_the_flag(tmp_path, table):
    """Training is the same; the sample's loss is that of its annotations."""
    assert small.call(train, *sampled(table, tmp_path, epochs=4)) == 0
    assert small.call(train, *flags(table, tmp_path, epochs=4, epoch_size=8)) == 0
    logs = [results.read_log(folder(tmp_path, name)) for name in (SAMPLED, "lora")]
    known = ~np.isnan(logs[0]["val_loss"])
    assert known.sum() == 3 and not np.isnan(logs[0]["sample_loss"]).any()
    for name in ("train_loss", "val_loss", "val_auroc"):
        assert (logs[0][name][known] == logs[1][name][known]).all()
    best = run_of(tmp_path)["training"]["best_epoch"]
    annotations = data.load_dataset(table)
    split = data.load_split(folder(tmp_path, SAMPLED) / "split.json", annotations)
    sample = annotations.id[validation_sample(annotations, annotations.rows(split.val), N, 0, 0)]
    predictions = runs.read_predictions(folder(tmp_path, SAMPLED) / "predictions.csv")
    rows = np.isin(predictions["id"], sample)
    loss = engine.validation_loss(predictions["label"][rows], predictions["logit"][rows])
    assert rows.sum() == N and loss == pytest.approx(logs[0]["sample_loss"][best - 1], abs=1e-6)


def test_a_sample_of_the_sets_size_is_a_run_of_its_own_with_the_same_results(tmp_path, table):
    for more in ([], ["--val-patches", 24], ["--val-patches", 10**9]):
        assert small.call(train, *flags(table, tmp_path, *more, epochs=2, epoch_size=8)) == 0
    plain = folder(tmp_path)
    for count in (24, 10**9):
        run = folder(tmp_path, f"lora-val{count}")
        assert_equal_runs(plain, run)
        assert common.read_json(run / "config.json")["flags"]["val_patches"] == count
    assert "val_patches" not in common.read_json(plain / "config.json")["flags"]


@pytest.mark.parametrize("count", ["1", "0", "-3", "x"])
def test_a_sample_needs_two_annotations(tmp_path, table, count, capsys):
    assert small.call(train, *flags(table, tmp_path, f"--val-patches={count}")) == 2
    assert "--val-patches" in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.glob("**/config.json"))


def test_another_sample_is_another_run(tmp_path, table, capsys):
    assert small.call(train, *sampled(table, tmp_path, epochs=1)) == 0
    shutil.copytree(folder(tmp_path, SAMPLED), folder(tmp_path, "lora-val6"))
    args = flags(table, tmp_path, "--val-patches", 6, epochs=1, epoch_size=8)
    assert small.call(train, *args) == 2
    assert "--val-patches (was 8, now 6)" in capsys.readouterr().err


# ---------------------------------------------------------------- interruptions


def interrupted_everywhere(monkeypatch, args, functions):
    """Start and resume a command; each life ends before the first call of a function of `functions`
    [(owner, name)] that no earlier life came to, told apart by their arguments → number of lives
    that ended so.
    """
    reached, lives = set(), 0

    for owner, name in functions:
        real = getattr(owner, name)

        def call(*rest, real=real, owner=owner, name=name, **named):
            key = owner, name, event((*rest, *named.values()))
            if key not in reached:
                reached.add(key)
                raise KeyboardInterrupt
            return real(*rest, **named)

        monkeypatch.setattr(owner, name, call)
    while (status := small.call(train, *args)) == 130:
        lives += 1
        args = [*args, *([] if "--resume" in args else ["--resume"])]
    assert status == 0
    return lives


def event(values):
    """What tells one call from another: numbers, paths and scores, not tensors."""
    kinds = (int, float, str)
    return tuple(str(v) for v in values if isinstance(v, kinds) or hasattr(v, "suffix"))


FINAL = [
    (checkpoint.Progress, "load"),
    (checkpoint.Progress, "save_logits"),
    (runs.Run, "complete_log"),
    (figures, "curves"),
    (checkpoint, "finish"),
    (runs, "write_predictions"),
    (runs.Run, "finish"),
]
EVERY = [
    (engine.Engine, "step"),
    (checkpoint.Progress, "save"),
    (checkpoint, "save_tensors"),
    *FINAL,
]


@pytest.mark.parametrize(
    "functions, least, more",
    [
        (FINAL, 11, []),
        pytest.param(EVERY, 25, [], marks=pytest.mark.slow),
        pytest.param(EVERY, 20, ["--patience", "1", "--seed", "1"], marks=pytest.mark.slow),
    ],
)
def test_interrupted_before_every_piece_of_work_it_ends_the_same(
    tmp_path, table, monkeypatch, functions, least, more
):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert small.call(train, *sampled(table, whole, *more, epochs=4)) == 0
    with monkeypatch.context() as patch:
        lives = interrupted_everywhere(patch, sampled(table, cut, *more, epochs=4), functions)
    assert lives >= least
    one, other = folder(whole, SAMPLED), folder(cut, SAMPLED)
    assert_equal_runs(one, other)
    logs = [[row[:5] + row[6:] for row in csv.reader(open(p / "log.csv"))] for p in (one, other)]
    assert logs[0] == logs[1]
    assert (one / "curves.png").read_bytes() == (other / "curves.png").read_bytes()
    assert not list(other.glob("checkpoint*")) and not list(other.glob(".*.tmp"))


def test_a_model_is_validated_on_the_whole_set_once(tmp_path, table, monkeypatch):
    """Interrupted before the third: the first two are not computed again, nor anything trained."""
    args, real, computed = sampled(table, tmp_path, epochs=4), engine.predict_together, []

    def predict(model, reader, count, *rest):
        if count != N:
            if len(computed) == 2:
                computed.append("interrupted")
                raise KeyboardInterrupt
            computed.append(count)
        return real(model, reader, count, *rest)

    monkeypatch.setattr(engine, "predict_together", predict)
    assert small.call(train, *args) == 130
    kept = folder(tmp_path, SAMPLED).glob("checkpoint.logits-*")
    assert len(list(kept)) == 2 and computed == [24, 24, "interrupted"]
    monkeypatch.setattr(engine.Engine, "step", None)  # any step is an error
    assert small.call(train, *args, "--resume") == 0
    assert computed[3:] == [24, 24]  # the third, then the test set
    assert small.call(train, *args, "--resume") == 0 and len(computed) == 5


@pytest.mark.slow
def test_two_processes_choose_as_one_even_if_one_is_killed(tmp_path, table):
    """torchrun with gloo; one is killed before the second model is validated on everything."""
    one, two = tmp_path / "one", tmp_path / "two"
    assert small.call(train, *sampled(table, one, epochs=4)) == 0
    script = tmp_path / "script.py"
    script.write_text(f"""import os, signal, sys
sys.path[:0] = [{str(small.HERE.parent)!r}, {str(small.HERE)!r}]
import small, train
import common, engine
real, whole = engine.predict_together, 0
def predict(model, reader, count, *rest):
    global whole
    whole += count != {N}
    if whole == 2 and os.environ["RANK"] == os.environ["KILLED"]:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(model, reader, count, *rest)
engine.predict_together = predict
common.command(train.main)
""")
    args, run = sampled(table, two, epochs=4), folder(two, SAMPLED)
    launcher = small.torchrun(script)
    code, _, err = small.command("train", *args, launcher=launcher, KILLED="1")
    assert code and ("another process of this job has ended" in err or "SIGKILL" in err), err
    assert len(list(run.glob("checkpoint.logits-*"))) == 1
    code, out, err = small.command("train", *args, "--resume", launcher=launcher, KILLED="no")
    assert code == 0 and "continuing after pseudo-epoch 4 of 4" in out, err
    ours, theirs = (run_of(place)["training"] for place in (one, two))
    assert ours["best_epoch"] == theirs["best_epoch"]
    logs = [results.read_log(folder(place, SAMPLED)) for place in (one, two)]
    for name in logs[0]:
        np.testing.assert_allclose(logs[1][name], logs[0][name], atol=1e-6, err_msg=name)
    a, b = (runs.read_predictions(folder(o, SAMPLED) / "predictions.csv") for o in (one, two))
    assert (a["id"] == b["id"]).all() and abs(a["logit"] - b["logit"]).max() < 1e-4


def test_damaged_logits_are_one_line(tmp_path, table, monkeypatch, capsys):
    args = sampled(table, tmp_path, epochs=2)

    def stop(*rest):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(runs.Run, "complete_log", stop)
        assert small.call(train, *args) == 130
    file = next(folder(tmp_path, SAMPLED).glob("checkpoint.logits-*"))
    content = file.read_bytes()
    for damaged in (content[:-1], b""):
        file.write_bytes(damaged)
        assert small.call(train, *args, "--resume") == 2
        assert file.name in capsys.readouterr().err.splitlines()[-1]
    checkpoint.save_tensors(file, {"logits": checkpoint.torch.zeros(23)})
    assert small.call(train, *args, "--resume") == 2
    assert f"{file.name}: not the logits" in capsys.readouterr().err
    file.unlink()
    assert small.call(train, *args, "--resume") == 0


def test_runs_of_earlier_versions_resume(tmp_path, table, monkeypatch):
    """Their checkpoint names the one best epoch and its loss."""
    args, real = flags(table, tmp_path / "cut", epochs=4, epoch_size=8), engine.Engine.epoch

    def epoch(self, number, *rest):
        if number == 2:
            raise KeyboardInterrupt
        return real(self, number, *rest)

    assert small.call(train, *flags(table, tmp_path / "whole", epochs=4, epoch_size=8)) == 0
    with monkeypatch.context() as patch:
        patch.setattr(engine.Engine, "epoch", epoch)
        assert small.call(train, *args) == 130
    file = folder(tmp_path / "cut") / "checkpoint.safetensors"
    tensors, numbers = checkpoint.load_tensors(file)
    ((loss, best),) = numbers.pop("best")
    checkpoint.save_tensors(file, tensors, **numbers, best_epoch=best, best_loss=loss)
    assert small.call(train, *args, "--resume") == 0
    assert_equal_runs(folder(tmp_path / "whole"), folder(tmp_path / "cut"))


# ---------------------------------------------------------------- figures, tables, progress


def sampled_log():
    return {
        "epoch": np.arange(1.0, 6),
        "train_loss": 1 / np.arange(1.0, 6),
        "sample_loss": np.array([0.5, 0.2, 0.1, 0.3, 0.25]),
        "sample_auroc": np.linspace(0.5, 0.9, 5),
        "val_loss": np.array([np.nan, 0.3, 0.4, np.nan, 0.35]),
        "val_auroc": np.array([np.nan, 0.8, 0.7, np.nan, 0.75]),
    }


def test_the_figure_tells_sample_and_whole_set_apart():
    plain = {key: sampled_log()[key] for key in ("epoch", "train_loss")}
    plain |= {"val_loss": np.array([5.0, 4, 3, 2, 1]), "val_auroc": np.linspace(0.4, 0.8, 5)}
    figure = figures.training({"sampled": [sampled_log()], "plain": [plain]})
    losses, ranking = figure.axes
    for ax, column in ((losses, "sample_loss"), (ranking, "sample_auroc")):
        (line,) = [x for x in ax.lines if np.array_equal(x.get_ydata(), sampled_log()[column])]
        assert line.get_markevery() == [1]  # of the lowest loss on the whole set
    crosses = [line for line in losses.lines if line.get_marker() == "x"]
    assert len(crosses) == 1
    np.testing.assert_array_equal(crosses[0].get_ydata(), sampled_log()["val_loss"])
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert "whole validation set" in texts
    figure = figures.training({"plain": [plain]})
    assert "whole validation set" not in [t.get_text() for t in figure.legends[0].get_texts()]


def test_a_log_with_blank_cells_is_read_only_where_there_is_a_sample(tmp_path):
    log = sampled_log()
    rows = [["" if np.isnan(value) else str(value) for value in row] for row in zip(*log.values())]

    def write(columns):
        places = [list(log).index(name) for name in columns]
        lines = [",".join(columns), *(",".join(row[k] for k in places) for row in rows)]
        (tmp_path / "log.csv").write_text("\n".join(lines) + "\n")

    write(list(log))
    read = results.read_log(tmp_path)
    for name in log:
        np.testing.assert_array_equal(read[name], log[name])
    write([name for name in log if not name.startswith("sample")])
    with pytest.raises(common.UserError, match="not a log of training"):
        results.read_log(tmp_path)
    rows = [[*row[:4], "", ""] for row in rows]
    write(list(log))
    with pytest.raises(common.UserError, match="not a log of training"):
        results.read_log(tmp_path)


def test_the_papers_values_and_the_grid_know_such_runs(tmp_path):
    table = run_folders.annotations("midog2022")
    path = run_folders.make(
        tmp_path, table, method="lora", suffixes=["val2000"], val_patches=2000, epochs=100
    )
    ((run,), problems) = results.collect([tmp_path])
    assert run.path == path and not problems and tables.name_of(run) == "uni LoRA val2000"
    assert tables.papers_label(run) == "uni-lora"
    words = ["python", "train.py", "--data", "midog2022", "--model", "uni", "--lora", "--fold", "0"]
    for more, found in (
        (["--val-patches", "2000"], True),
        (["--val-patches", "500"], False),
        ([], False),
    ):
        (cell,) = grid.cells([*words, *more])
        assert grid._is_cell(cell, run.flags, run.label, run.source) == found, more
    assert json.loads((path / "config.json").read_text())["flags"]["val_patches"] == 2000


@pytest.mark.slow
def test_the_grid_of_gpu_hours_counts_the_same_passes():
    """Against the passes of each run, by hand; the default is the protocol's."""
    calls = "*g.predictions(), *g.predictions(2000), *g.predictions(10**9)"
    code = f"import gpu_hours as g; print({calls})"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(small.HERE.parent / "bench"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    counts = np.array(done.stdout.split(), float).reshape(3, 3)
    val = np.array([0.16 * 72845, 0.16 * 20552, 0.16 * 20552 / 5])
    test = np.array([0.2 * 72845, 0.2 * 20552, 4.2 * 20552 / 5])
    runs_of = np.array([20, 20, 25])
    whole = [runs_of @ (100 * val), runs_of @ (val + test), runs_of @ (val + test)]
    kept, sample = np.array([3, 3, 1]), np.array([2000, 2000, val[2]])
    again = np.array([2000, 2000, 0])
    part = [runs_of @ (100 * sample), runs_of @ (kept * val + test), runs_of @ (again + val + test)]
    np.testing.assert_allclose(counts, [whole, part, whole], rtol=1e-12)
