import contextlib
import csv
import functools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import small
import torch
from safetensors.torch import load_file
from tqdm import tqdm

import checkpoint
import common
import data
import engine
import flags as data_flags
import lora
import models
import runs
import train
from dataset import patches as patches_module

RUN = "frac1-fold0"


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return small.dataset(tmp_path_factory.mktemp("data"))


def flags(table, out, *more, epochs=3, epoch_size=32, lora=True):
    return [
        "--data",
        table,
        "--model",
        "tiny",
        "--weights",
        "random",
        "--runs",
        out,
        "--epochs",
        epochs,
        "--epoch-size",
        epoch_size,
        "--batch-size",
        8,
        "--device",
        "cpu",
        "--lr",
        "3e-3",
        *(["--lora"] if lora else []),
        *more,
    ]


def folder(out, method="lora", name="tiny"):
    return out / "small" / f"{name}-{method}" / RUN


def weights(path):
    return load_file(path / "model.safetensors")


@pytest.mark.parametrize("method", ["lora", pytest.param("full", marks=pytest.mark.slow)])
def test_a_run_learns_and_leaves_its_files(tmp_path, table, method):
    args = flags(table, tmp_path, epochs=8, epoch_size=96, lora=method == "lora")
    assert small.call(train, *args) == 0
    run = folder(tmp_path, method)
    assert sorted(p.name for p in run.iterdir()) == [
        "config.json",
        "curves.png",
        "lock",
        "log.csv",
        "metrics.json",
        "model.safetensors",
        "predictions.csv",
        "split.json",
    ]
    metrics = common.read_json(run / "metrics.json")
    # Swapped labels give 0 here, patches that do not belong to their labels 0.5.
    assert (
        metrics["sets"]["test"]["auroc"] > 0.9
        and metrics["sets"]["test"]["balanced_accuracy"] > 0.8
    )
    log = list(csv.DictReader(open(run / "log.csv")))
    assert [int(row["epoch"]) for row in log] == list(range(1, 9))
    assert float(log[-1]["train_loss"]) < 0.8 * float(log[0]["train_loss"])
    annotations = data.load_dataset(table)
    split = data.load_split(run / "split.json", annotations)
    predictions = runs.read_predictions(run / "predictions.csv")
    assert set(predictions["id"][predictions["set"] == "test"]) == set(split.test)
    # The saved model, loaded and merged, gives what the run predicted.
    model, config = checkpoint.load_run(run, merge=True)
    rows = annotations.rows(predictions["id"])
    again = models.predict(model, patches_module.Patches(annotations), rows)
    assert np.abs(again - predictions["logit"]).max() < 1e-4
    assert (predictions["label"] == annotations.label[rows]).all()
    names = set(weights(run))
    assert ("encoder.blocks.0.attn.qkv.lora_A" in names) == (method == "lora")
    assert len(names) == (2 + 2 * 4 * 2 if method == "lora" else len(model.state_dict()))


def test_the_epoch_of_lowest_validation_loss_is_kept_and_tested(tmp_path, table, monkeypatch):
    losses, logits = iter([0.9, 0.4, 0.7, 0.4]), []
    real = engine.predict_together
    monkeypatch.setattr(engine, "validation_loss", lambda labels, values: next(losses))
    monkeypatch.setattr(
        engine, "predict_together", lambda *a: logits.append(real(*a)) or logits[-1]
    )
    assert small.call(train, *flags(table, tmp_path, epochs=4)) == 0
    metrics = common.read_json(folder(tmp_path) / "metrics.json")
    assert metrics["training"]["best_epoch"] == 2 and metrics["training"]["val_loss"] == 0.4
    predictions = runs.read_predictions(folder(tmp_path) / "predictions.csv")
    final = predictions["logit"][predictions["set"] == "val"]
    assert np.abs(final - logits[1]).max() < 1e-6 < np.abs(final - logits[3]).max()


def test_finished_other_rank_and_other_lr(tmp_path, table, capsys):
    args = flags(table, tmp_path, epochs=1)
    assert small.call(train, *args) == 0
    stamp = (folder(tmp_path) / "model.safetensors").stat().st_mtime_ns
    capsys.readouterr()
    assert small.call(train, *args) == 0
    assert f"finished: {folder(tmp_path)}" in capsys.readouterr().out
    assert (folder(tmp_path) / "model.safetensors").stat().st_mtime_ns == stamp
    assert small.call(train, *args, "--rank", 8) == 0
    assert weights(folder(tmp_path, "lora-r8"))["encoder.blocks.0.mlp.fc1.lora_A"].shape == (8, 32)
    capsys.readouterr()
    assert small.call(train, *args, "--lr", "1e-5") == 2
    error = capsys.readouterr().err
    assert "--lr" in error and len(error.splitlines()) == 1
    # The weights' place may change, they themselves may not.
    assert small.call(train, *args, "--force", "--lr", "1e-5") == 0


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize(
    "stop", [5, *(pytest.param(stop, marks=pytest.mark.slow) for stop in (1, 10))]
)
def test_a_resumed_run_ends_bit_for_bit_the_same(tmp_path, table, monkeypatch, method, stop):
    """Interrupted after `stop` of 12 steps (4 per epoch): no more than one epoch is repeated."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert small.call(train, *flags(table, whole, lora=method == "lora")) == 0
    real, done = engine.Engine.step, []

    def step(self, number, *rest):
        if len(done) == stop:
            raise KeyboardInterrupt
        done.append(number)
        return real(self, number, *rest)

    monkeypatch.setattr(engine.Engine, "step", step)
    args = flags(table, cut, lora=method == "lora")
    assert small.call(train, *args) == 130
    before, stop = list(done), None
    assert small.call(train, *args) == 2  # begun: needs --resume
    assert small.call(train, *args, "--resume") == 0
    repeated = set(before) & set(done[len(before) :])
    assert len(repeated) < 4 and sorted(set(done)) == list(range(12))
    assert_equal_runs(folder(whole, method), folder(cut, method))


# ---------------------------------------------------------------- kills

# Forked copies of one process run the command; each ends by SIGKILL at the moment it was given:
# after so many calls of Python or C functions, or within the n-th file of a checkpoint, half
# written. So the moments are as random as with a clock, but the same on slow machines and fast
# ones.
LIVES = """
import json, os, signal, sys
sys.path[:0] = [{root!r}, {here!r}]
import small, safetensors.torch, train
import checkpoint, common, engine
import matplotlib.pyplot, torch._dynamo  # what a run imports on its way: once, before the forks

def live(log, flags, calls=None, file=None, share=0.5):
    log, seen, files = open(log, "a", buffering=1), 0, 0
    def count(*event):
        nonlocal seen
        seen += 1
        if seen == calls:
            os.kill(os.getpid(), signal.SIGKILL)
    real_step, real_save = engine.Engine.step, checkpoint.save_file
    def step(self, number, *rest):
        log.write(f"{{os.getpid()}} {{number}} {{seen}}\\n")
        return real_step(self, number, *rest)
    def save_file(tensors, path, metadata):
        nonlocal files
        files += 1
        if files == file:
            content = safetensors.torch.save(tensors, metadata)
            path.write_bytes(content[:int(share * len(content))])
            os.kill(os.getpid(), signal.SIGKILL)
        real_save(tensors, path, metadata)
    engine.Engine.step, checkpoint.save_file = step, save_file
    sys.argv = ["train.py", *flags]
    sys.setprofile(count)
    common.command(train.main)

for line in sys.stdin:
    if not (child := os.fork()):
        os.dup2(2, 1)
        live(**json.loads(line))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Lives:
    """Starts runs one after the other: start(…) → (exit status, [(step, calls so far)] that were
    begun).
    """

    def __init__(self, folder):
        code = LIVES.format(root=str(small.HERE.parent), here=str(small.HERE))
        self.log, self.errors = folder / "steps.log", open(folder / "stderr.log", "w")
        self.process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
        self.errors.close()

    def start(self, flags, **end):
        self.log.write_text("")
        print(
            json.dumps({"log": str(self.log), "flags": list(map(str, flags)), **end}),
            file=self.process.stdin,
            flush=True,
        )
        status = int(self.process.stdout.readline())
        return status, [
            tuple(map(int, line.split()[1:])) for line in self.log.read_text().splitlines()
        ]


@pytest.mark.slow
@pytest.mark.parametrize("more, name", [([], "lora"), (["--val-patches", 8], "lora-val8")])
def test_kill_9_at_twenty_moments(tmp_path, table, more, name):
    rng, epochs, per_epoch = random.Random(1), 14, 4
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run, kills, checkpointed, writing, reached = folder(cut, name), 0, 0, 0, 0
    with Lives(tmp_path) as lives:
        status, steps = lives.start(flags(table, whole, *more, epochs=epochs))
        assert status == 0 and [number for number, _ in steps] == list(range(epochs * per_epoch))
        start, epoch = steps[0][1], steps[per_epoch][1] - steps[0][1]
        args = [*flags(table, cut, *more, epochs=epochs), "--resume"]
        while kills < 20:
            if kills % 4 == 3:
                end = {"file": rng.randint(1, 3), "share": rng.random()}
            elif kills % 7 == 0:
                end = {"calls": rng.randint(1, start)}
            else:
                end = {"calls": start + rng.randint(1, 3 * epoch // 2)}
            there = (run / "checkpoint.safetensors").exists()
            status, steps = lives.start(args, **end)
            assert status == -signal.SIGKILL, (tmp_path / "stderr.log").read_text()
            kills += 1
            checkpointed += there or (run / "checkpoint.safetensors").exists()
            writing += bool(list(run.glob(".checkpoint*.tmp")))
            numbers = [number for number, _ in steps]
            if numbers:
                assert numbers == list(range(numbers[0], numbers[-1] + 1))
                assert (
                    reached - per_epoch <= numbers[0] <= reached
                )  # starting from zero is not resuming
                reached = max(reached, numbers[-1] + 1)
        assert checkpointed >= 10 and writing >= 2
        status, steps = lives.start(args)
        assert (
            status == 0
            and reached - per_epoch <= steps[0][0] <= reached
            and steps[-1][0] == epochs * per_epoch - 1
        )
    assert_equal_runs(folder(whole, name), run)
    assert not list(run.glob("checkpoint*")) and not list(run.glob(".*.tmp"))


def assert_equal_runs(one, other):
    """The same bits: weights, metrics, predictions, and the log but for the speed."""
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    for name in ("metrics.json", "predictions.csv"):
        assert (one / name).read_bytes() == (other / name).read_bytes()
    strip = [[row[:5] for row in csv.reader(open(run / "log.csv"))] for run in (one, other)]
    assert strip[0] == strip[1] and len(strip[0]) > 1


@pytest.mark.slow
def test_kill_9_from_outside(tmp_path, table):
    """The same with whole processes and a clock: each finishes an epoch at least, and is killed
    after it.
    """
    rng, whole, cut = random.Random(20), tmp_path / "whole", tmp_path / "cut"
    size = {"epochs": 60, "epoch_size": 64}
    assert small.call(train, *flags(table, whole, **size)) == 0
    args, run, kills, epochs = [*flags(table, cut, **size), "--resume"], folder(cut), 0, []
    while kills < 20 and not (run / "metrics.json").exists():
        process = small.command("train", *args, wait=False)
        before = epoch_of(run)
        while process.poll() is None and epoch_of(run) == before:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.5))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.communicate()
        epochs.append(epoch_of(run))
    assert kills > 5 and epochs == sorted(set(epochs))  # nothing that was reached is lost
    code, out, err = small.command("train", *args)
    assert code == 0, err
    assert_equal_runs(folder(whole), run)


def epoch_of(run):
    if not (run / "checkpoint.safetensors").exists():
        return 0
    return checkpoint.load_tensors(run / "checkpoint.safetensors")[1]["epoch"]


def test_a_full_disk_leaves_the_former_checkpoint(tmp_path, table, monkeypatch, capsys):
    whole, disk = tmp_path / "whole", tmp_path / "disk"
    assert small.call(train, *flags(table, whole)) == 0
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(disk)], capture_output=True
    ).returncode:
        pytest.skip("no right to mount")
    try:
        real, run = checkpoint.Progress.save, folder(disk)

        def save(self, *rest):
            if self.epoch == 1:
                with open(disk / "filler", "wb", buffering=0) as file, contextlib.suppress(OSError):
                    while file.write(bytes(4096)):
                        pass
            return real(self, *rest)

        monkeypatch.setattr(checkpoint.Progress, "save", save)
        assert small.call(train, *flags(table, disk)) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: ") and "disk is full" in error and epoch_of(run) == 1
        assert not list(run.glob(".*.tmp"))
        (disk / "filler").unlink()
        monkeypatch.undo()
        assert small.call(train, *flags(table, disk), "--resume") == 0
        assert "continuing after pseudo-epoch 1" in capsys.readouterr().out
        assert_equal_runs(folder(whole), run)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# ---------------------------------------------------------------- the step


def test_parts_of_a_batch_give_the_same_gradient(tmp_path, table, monkeypatch):
    """Gradient accumulation: the same samples, masks and augmentation; equal but for rounding."""
    grads, real = {}, engine.Engine.accumulate

    def accumulate(self, batch, whole):
        total = real(self, batch, whole)
        if batch[0] == 0:  # later ones start from weights that differ by Adam's amplified rounding
            grads[self.parts] = {name: p.grad.clone() for name, p in self.parameters.items()}
        return total

    monkeypatch.setattr(engine.Engine, "accumulate", accumulate)
    for parts in (1, 3):
        assert small.call(train, *flags(table, tmp_path / str(parts)), "--accumulate", parts) == 0
    for name, whole in grads[1].items():
        assert (grads[3][name] - whole).norm() <= 1e-5 * whole.norm(), name
    assert (
        sum(bool(whole.any()) for whole in grads[1].values()) > 8
    )  # all but A, behind a B of zeros
    logs = [
        np.genfromtxt(folder(tmp_path / n) / "log.csv", delimiter=",", names=True) for n in "13"
    ]
    assert np.abs(logs[0]["train_loss"] - logs[1]["train_loss"]).max() < 1e-5


@pytest.mark.parametrize("method", ["lora", "full"])
def test_bf16_trains_and_resumes(tmp_path, table, monkeypatch, method):
    args = [*flags(table, tmp_path / "cut", lora=method == "lora"), "--dtype", "bf16"]
    real = engine.Engine.epoch

    def epoch(self, number, *rest):
        assert self.dtype == torch.bfloat16
        # LoRA holds the frozen weights in bf16; what is trained is float32 in both.
        held = {p.dtype for p in self.model.parameters() if not p.requires_grad}
        assert held == ({torch.bfloat16} if method == "lora" else set())
        assert {p.dtype for p in self.parameters.values()} == {torch.float32}
        if number == 2 and stop:
            raise KeyboardInterrupt
        return real(self, number, *rest)

    monkeypatch.setattr(engine.Engine, "epoch", epoch)
    stop = True
    assert small.call(train, *args) == 130
    stop = False
    assert small.call(train, *args, "--resume") == 0
    assert (
        small.call(
            train, *flags(table, tmp_path / "whole", lora=method == "lora"), "--dtype", "bf16"
        )
        == 0
    )
    assert_equal_runs(folder(tmp_path / "whole", method), folder(tmp_path / "cut", method))
    model, _ = checkpoint.load_run(folder(tmp_path / "cut", method))
    annotations = data.load_dataset(table)
    predictions = runs.read_predictions(folder(tmp_path / "cut", method) / "predictions.csv")
    again = models.predict(
        model, patches_module.Patches(annotations), annotations.rows(predictions["id"])
    )
    assert (
        0 < np.abs(again - predictions["logit"]).max() < 0.05 * np.abs(again).max()
    )  # bf16, not fp32, predicted


def test_the_encoder_is_loaded_once_and_left_as_it_is(tmp_path, table, monkeypatch):
    real, loaded = train.load_base, []

    def load_base(*a):
        loaded.append(real(*a))
        loaded.append({name: value.clone() for name, value in loaded[0].state_dict().items()})
        return loaded[0]

    monkeypatch.setattr(train, "load_base", load_base)
    for method in ("lora", "full"):
        loaded.clear()
        assert (
            small.call(
                train,
                *flags(table, tmp_path / "both", epochs=1, lora=method == "lora"),
                "--fold",
                0,
                1,
            )
            == 0
        )
        base, before = loaded
        assert base.state_dict().keys() == before.keys()
        assert all(torch.equal(before[name], value) for name, value in base.state_dict().items())
        assert (
            small.call(
                train, *flags(table, tmp_path / "one", epochs=1, lora=method == "lora"), "--fold", 1
            )
            == 0
        )
        assert_equal_runs(
            *(
                tmp_path / out / "small" / f"tiny-{method}" / "frac1-fold1"
                for out in ("both", "one")
            )
        )


@pytest.mark.slow
def test_resnet50_trains_and_resumes(tmp_path, table, monkeypatch):
    """A convolutional network: statistics of the batches are part of the checkpoint."""
    args = [
        "--data",
        table,
        "--model",
        "resnet50",
        "--weights",
        "random",
        "--epochs",
        2,
        "--epoch-size",
        4,
        "--batch-size",
        4,
        "--device",
        "cpu",
        "--val-frac",
        0.25,
        "--domain",
        "A",
        "--frac",
        0.1,
    ]
    real, stop = engine.Engine.epoch, True

    def epoch(self, number, *rest):
        if number == 1 and stop:
            raise KeyboardInterrupt
        return real(self, number, *rest)

    monkeypatch.setattr(engine.Engine, "epoch", epoch)
    monkeypatch.setattr(
        engine, "predict_together", lambda model, reader, count, *rest: np.zeros(count)
    )
    assert small.call(train, *args, "--runs", tmp_path / "cut") == 130
    stop = False
    assert small.call(train, *args, "--runs", tmp_path / "cut", "--resume") == 0
    assert small.call(train, *args, "--runs", tmp_path / "whole") == 0
    cut, whole = (
        tmp_path / out / "small" / "resnet50-full" / "domainA-frac0.1-fold0"
        for out in ("cut", "whole")
    )
    assert_equal_runs(whole, cut)
    assert (
        weights(cut)["encoder.bn1.num_batches_tracked"] == 1
    )  # all losses are equal: the first epoch is kept


@pytest.mark.parametrize(
    "more", [["--dora", "--targets", "qkv", "proj"], ["--rslora", "--alpha", 8, "--dropout", 0]]
)
def test_kinds_of_adapters_are_kept_in_the_run(tmp_path, table, more):
    assert small.call(train, *flags(table, tmp_path, epochs=1), *more) == 0
    (run,) = (tmp_path / "small").glob("tiny-lora*/frac1-fold0")
    model, _ = checkpoint.load_run(run, merge=True)
    annotations, predictions = (
        data.load_dataset(table),
        runs.read_predictions(run / "predictions.csv"),
    )
    again = models.predict(
        model, patches_module.Patches(annotations), annotations.rows(predictions["id"])
    )
    assert np.abs(again - predictions["logit"]).max() < 1e-4


@pytest.mark.parametrize("terminal", [False, True])
def test_the_bar_shows_loss_auroc_speed_and_time_left(
    tmp_path, table, monkeypatch, capsys, terminal
):
    monkeypatch.setattr(common.PlainProgress.__init__, "__defaults__", (0.0,))
    monkeypatch.setattr(engine, "WATCH", 2)
    if terminal:
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
        monkeypatch.setattr(tqdm, "__init__", functools.partialmethod(tqdm.__init__, mininterval=0))
    assert small.call(train, *flags(table, tmp_path)) == 0
    lines = [line for line in re.split("[\r\n]", capsys.readouterr().err) if "training" in line]
    number = r"\d+\.\d+"
    within = [line for line in lines if "epoch 2/3" in line]
    assert re.search(rf"loss {number}, validation {number}, AUROC {number}", within[0]), lines
    assert re.search(rf"{number}\s?patches/s", within[0])
    assert re.search(r"\d+ s left|<\d+:\d+", within[0])
    assert len(within) > 1  # during the epoch, not only at its end


def test_out_of_memory_halves_the_batch(tmp_path, table, monkeypatch, capsys):
    real = engine.Engine.accumulate

    def accumulate(self, *rest):
        if self.parts == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, *rest)

    monkeypatch.setattr(engine.Engine, "accumulate", accumulate)
    assert small.call(train, *flags(table, tmp_path, epochs=1)) == 0
    assert "accumulated over 2 parts" in capsys.readouterr().err


def test_checkpointing_changes_nothing(tmp_path, table):
    for name, more in (("plain", []), ("checkpointing", ["--checkpointing"])):
        assert small.call(train, *flags(table, tmp_path / name), *more) == 0
    a, b = (weights(folder(tmp_path / name)) for name in ("plain", "checkpointing"))
    assert all((a[name] - b[name]).norm() <= 1e-5 * a[name].norm() for name in a)


def test_a_loss_that_is_not_finite_stops_with_step_and_patches(
    tmp_path, table, monkeypatch, capsys
):
    real = engine.Engine.step

    def step(self, number, *rest):
        total = real(self, number, *rest)
        return total * float("nan") if number == 5 else total

    monkeypatch.setattr(engine.Engine, "step", step)
    assert small.call(train, *flags(table, tmp_path)) == 2
    error = capsys.readouterr().err
    assert "step 5" in error and "--lr" in error and "--resume" in error and "small.csv#" in error
    monkeypatch.undo()
    assert small.call(train, *flags(table, tmp_path), "--resume") == 0


@pytest.mark.slow
def test_two_processes_equal_one_even_if_one_is_killed(tmp_path, table):
    """torchrun with gloo: a killed process ends the job, --resume continues it; losses as with one
    process.
    """
    one, two = tmp_path / "one", tmp_path / "two"
    other = small.dataset(tmp_path / "other", cases=3, seed=9, name="elsewhere")
    assert small.call(train, *flags(table, one), "--test", other) == 0
    script = tmp_path / "script.py"
    script.write_text(f"""import os, signal, sys
sys.path[:0] = [{str(small.HERE.parent)!r}, {str(small.HERE)!r}]
import small, train
import common, engine
real = engine.Engine.step
def step(self, number, *rest):
    if number == 6 and os.environ["RANK"] == os.environ["KILLED"]:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, number, *rest)
engine.Engine.step = step
common.command(train.main)
""")
    launcher = small.torchrun(script)
    args = [*flags(table, two), "--test", other]
    code, out, err = small.command("train", *args, launcher=launcher, KILLED="1")
    assert code and ("another process of this job has ended" in err or "SIGKILL" in err), err
    assert "Traceback" not in err.split("torch/distributed")[0]
    assert epoch_of(folder(two)) == 1
    code, out, err = small.command("train", *args, "--resume", launcher=launcher, KILLED="no")
    assert code == 0, err
    assert "continuing after pseudo-epoch 1 of 3" in out
    logs = [np.genfromtxt(folder(out) / "log.csv", delimiter=",", names=True) for out in (one, two)]
    assert [len(log) for log in logs] == [3, 3]
    for column in ("train_loss", "val_loss", "val_auroc"):
        assert np.abs(logs[0][column] - logs[1][column]).max() < 1e-6, column
    a, b = (runs.read_predictions(folder(out) / "predictions.csv") for out in (one, two))
    assert (a["id"] == b["id"]).all() and set(a["set"]) == {"val", "test", "elsewhere"}
    assert np.abs(a["logit"] - b["logit"]).max() < 1e-4


def test_fold_and_seed_change_the_run(tmp_path, table):
    for fold in (0, 1):
        assert small.call(train, *flags(table, tmp_path, epochs=1), "--fold", fold) == 0
    a, b = (weights(tmp_path / "small" / "tiny-lora" / f"frac1-fold{fold}") for fold in (0, 1))
    assert not torch.equal(
        a["encoder.blocks.0.attn.qkv.lora_A"], b["encoder.blocks.0.attn.qkv.lora_A"]
    )


def test_domains_and_further_datasets(tmp_path, table, capsys):
    other = small.dataset(tmp_path / "other", cases=4, seed=9, name="elsewhere")
    args = [*flags(table, tmp_path / "runs", epochs=1), "--domain", "A"]
    assert small.call(train, *args) == 0
    run = tmp_path / "runs" / "small" / "tiny-lora" / "domainA-fold0"
    before = runs.read_predictions(run / "predictions.csv")
    assert set(before["set"]) == {"val", "test", "B"}
    model = (run / "model.safetensors").read_bytes()
    assert small.call(train, *args, "--test", other) == 0  # the finished run, on one more set
    out = capsys.readouterr().out
    assert f"finished: {run}" in out and "elsewhere" in out.splitlines()[-1]
    predictions = runs.read_predictions(run / "predictions.csv")
    assert set(predictions["set"]) == {"val", "test", "B", "elsewhere"}
    assert (predictions["domain"][predictions["set"] == "B"] == "B").all()
    assert (predictions["set"] == "elsewhere").sum() == 24
    assert (predictions["logit"][: len(before["logit"])] == before["logit"]).all()
    metrics = common.read_json(run / "metrics.json")
    assert set(metrics["sets"]) == {"val", "test", "B", "elsewhere"} and "training" in metrics
    assert (run / "model.safetensors").read_bytes() == model
    merged, _ = checkpoint.load_run(run, merge=True)
    table = data.load_dataset(other)
    again = models.predict(merged, patches_module.Patches(table))
    assert np.abs(again - predictions["logit"][predictions["set"] == "elsewhere"]).max() < 1e-4


@pytest.mark.parametrize(
    "more, words",
    [
        (["--model", "resnet50"], ["resnet50", "--lora"]),
        (["--model", "resnet50", "--accumulate", "2"], ["--accumulate 2"]),
        (["--rank", "0"], ["--rank"]),
        (["--epochs", "0"], ["--epochs"]),
        (["--batch-size", "1" + 23 * "0"], ["--batch-size"]),
        (["--lr", "nan"], ["--lr"]),
        (["--frac", "10"], ["--frac", "0.1"]),
        (["--domain", "Z"], ["Z"]),
        (["--model", "unknown"], ["unknown", "h-optimus-0"]),
        (["--device", "cuda:77"], ["--device"]),
        (["--device", "meta"], ["--device meta"]),
        (["--dropout", "0.999999"], ["--dropout 0.999999"]),
        (["--rank", "100000000"], ["--rank 100000000", "32"]),
        (["--fold", "1" + 23 * "0"], ["--fold 1000", "65535"]),
        (["--fold", "65536"], ["--fold 65536"]),
        (["--alpha", "inf"], ["--alpha"]),
        (["--adapter", "nowhere"], ["nowhere"]),
        (["--focal-gamma", "1"], ["--focal-gamma 1", "--loss focal"]),
        (["--loss", "focal", "--focal-gamma", "-1"], ["--focal-gamma -1"]),
        (["--weight-decay", "-1"], ["--weight-decay -1"]),
        (["--patience", "0"], ["--patience 0"]),
        (["--soft-labels"], ["--soft-labels", "no votes"]),
        (["--stain-jitter", "1"], ["--stain-jitter 1"]),
        (["--targets", "qkv", "qkv"], ["--targets"]),
    ],
)
def test_mistakes_are_one_line(tmp_path, table, more, words, capsys):
    assert small.call(train, *flags(table, tmp_path), *more) == 2
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1 and all(word in error for word in words)
    assert not list(tmp_path.glob("**/config.json"))


@pytest.mark.slow
def test_a_gated_encoder_says_what_to_do(tmp_path, table):
    code, out, err = small.command(
        "train",
        "--data",
        table,
        "--model",
        "h-optimus-0",
        "--lora",
        "--frac",
        "0.1",
        "--runs",
        tmp_path,
        HF_HUB_OFFLINE="",
        HF_TOKEN="",
        HF_HOME=str(tmp_path / "hf"),
    )
    last = err.strip().splitlines()[-1]
    assert (
        code == 2 and last.startswith("error: ") and "--weights" in last and "Traceback" not in err
    )


def test_a_damaged_checkpoint_is_one_line(tmp_path, table, monkeypatch, capsys):
    monkeypatch.setattr(train, "finish", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    assert small.call(train, *flags(table, tmp_path)) == 130
    monkeypatch.undo()
    path = folder(tmp_path) / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert small.call(train, *flags(table, tmp_path), "--resume") == 2
    assert "--force" in capsys.readouterr().err


def test_config_tells_everything(tmp_path, table):
    assert small.call(train, *flags(table, tmp_path, epochs=1)) == 0
    config = json.loads((folder(tmp_path) / "config.json").read_text())
    assert config["flags"]["targets"] == list(lora.TARGETS) and config["flags"]["dtype"] == "fp32"
    assert config["data"]["patch"] == 48 and config["encoder"]["weights_hash"] == "random"
    annotations, args = data_flags.from_source(config["source"])
    assert annotations.fingerprint() == config["data"]["fingerprint"] and args.fit == "resize"


# ---------------------------------------------------------------- starting from an adapter


def test_training_starts_from_an_adapter_in_pefts_format(tmp_path, table, monkeypatch, capsys):
    """Rank, targets … are the adapter's; before the first step the model is the adapter's run."""
    args = flags(table, tmp_path / "first", "--rank", 4, "--targets", "qkv", "fc1")
    assert small.call(train, *args) == 0
    run = folder(tmp_path / "first", "lora-r4-qkv+fc1")
    model, _ = checkpoint.load_run(run)
    lora.save_peft(model.encoder, tmp_path / "adapter", "tiny", model.head)
    starts, real = [], engine.make_model

    def make_model(*rest):
        made = real(*rest)
        starts.append({name: value.clone() for name, value in made[0].state_dict().items()})
        return made

    monkeypatch.setattr(engine, "make_model", make_model)
    second = flags(table, tmp_path / "second", "--adapter", tmp_path / "adapter", epochs=1)
    assert small.call(train, *second) == 0
    before = model.state_dict()
    assert starts[0].keys() == before.keys()
    assert all(torch.equal(starts[0][name], value) for name, value in before.items())
    (continued,) = (tmp_path / "second" / "small").glob("tiny-lora-r4-qkv+fc1-from*/frac1-fold0")
    config = common.read_json(continued / "config.json")
    assert (config["flags"]["rank"], config["flags"]["targets"]) == (4, ["qkv", "fc1"])
    assert continued.parent.name.endswith(config["encoder"]["adapter_hash"][:8])
    after, _ = checkpoint.load_run(continued)
    assert not torch.equal(after.head.weight, model.head.weight)
    capsys.readouterr()
    assert small.call(train, *second) == 0
    assert f"finished: {continued}" in capsys.readouterr().out
    for more, words in (
        (["--rank", 8], "--rank: the adapter of --adapter has 4"),
        (["--targets", "proj"], "--targets"),
        (["--dora"], "--dora"),
    ):
        assert small.call(train, *second, *more) == 2
        assert words in capsys.readouterr().err
    assert small.call(train, *second, "--dropout", 0.3) == 0
    assert len(list((tmp_path / "second" / "small").glob("*-d0.3-*/frac1-fold0"))) == 1
    full = flags(table, tmp_path, "--adapter", tmp_path / "adapter", lora=False)
    assert small.call(train, *full) == 2
    assert "needs --lora" in capsys.readouterr().err


def test_a_resumed_run_with_an_adapter_ends_the_same(tmp_path, table, monkeypatch):
    encoder = models.load_encoder("tiny", "random")
    torch.manual_seed(1)
    lora.add_lora(encoder, 2, 4)
    for _, layer in lora.adapted(encoder):
        torch.nn.init.normal_(layer.lora_B, 0, 0.1)
    lora.save_peft(encoder, tmp_path / "adapter")
    whole, cut = (
        flags(table, tmp_path / name, "--adapter", tmp_path / "adapter")
        for name in ("whole", "cut")
    )
    assert small.call(train, *whole) == 0
    real = engine.Engine.epoch

    def epoch(self, number, *rest):
        if number == 2:
            raise KeyboardInterrupt
        return real(self, number, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(engine.Engine, "epoch", epoch)
        assert small.call(train, *cut) == 130
    assert small.call(train, *cut, "--resume") == 0
    one, other = (next((tmp_path / name).glob("small/*/*")) for name in ("whole", "cut"))
    assert_equal_runs(one, other)


# ---------------------------------------------------------------- other data, other runs


def test_source_mpp_is_the_runs_own_data_alone(tmp_path, table, monkeypatch):
    other = small.dataset(tmp_path / "other", cases=4, seed=9, name="elsewhere")
    scales = {}

    class Recorded(patches_module.Patches):
        def __init__(self, annotations, **choices):
            super().__init__(annotations, **choices)
            scales[annotations.name] = (self.source_mpp, bool(annotations.mpp))

    monkeypatch.setattr(train, "Patches", Recorded)
    args = flags(table, tmp_path, "--source-mpp", 0.5, "--test", other, epochs=1)
    assert small.call(train, *args) == 0
    assert scales == {"small": (0.5, True), "elsewhere": (None, False)}


def test_changed_images_are_noticed_by_resume(tmp_path, monkeypatch, capsys):
    table = small.dataset(tmp_path / "data")
    args = flags(table, tmp_path / "runs")
    with monkeypatch.context() as patch:
        patch.setattr(train, "finish", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        assert small.call(train, *args) == 130
    images = sorted((tmp_path / "data" / "patches").iterdir())
    os.utime(images[0], (1, 1))  # a copied dataset is the same dataset
    first = images[3].read_bytes()
    images[3].write_bytes(images[4].read_bytes())
    capsys.readouterr()
    assert small.call(train, *args, "--resume") == 2
    error = capsys.readouterr().err
    assert "images" in error and "--force" in error and len(error.splitlines()) == 1
    images[3].write_bytes(first)
    assert small.call(train, *args, "--resume") == 0


def test_runs_of_the_first_version_are_finished_runs(tmp_path, table, capsys):
    """Their config.json has no version, no pixels, and the order of an earlier program."""
    args = flags(table, tmp_path, epochs=1)
    assert small.call(train, *args) == 0
    path = folder(tmp_path) / "config.json"
    config = json.loads(path.read_text())
    del config["data"]["pixels"]
    names = "data model method frac fold domain seed by val_frac weights pool layer fit mpp dtype"
    names += " epochs epoch_size batch_size lr balance random_share jitter stain_jitter tissue"
    names += " rank alpha dropout targets dora rslora"
    assert set(config["flags"]) == set(names.split())  # so they have been since the first version
    path.write_text(json.dumps(config))
    capsys.readouterr()
    assert small.call(train, *args) == 0
    assert f"finished: {folder(tmp_path)}" in capsys.readouterr().out


def test_equal_runs_have_equal_files(tmp_path, table):
    args = [flags(table, tmp_path / name, epochs=1) for name in "ab"]
    for one in args:
        assert small.call(train, *one) == 0
    a, b = (folder(tmp_path / name) for name in "ab")
    for name in ("model.safetensors", "predictions.csv", "metrics.json", "split.json"):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name


def test_a_set_of_one_class_is_said(tmp_path, capsys):
    table = small.dataset(tmp_path / "data")
    head, *lines = table.read_text().splitlines()
    mitotic = {"case04", "case05"}  # one case of each domain
    for i, line in enumerate(lines):
        path, label, case, domain = line.split(",")
        if case not in mitotic:
            label = "0"
        lines[i] = ",".join((path, label, case, domain))
    table.write_text("\n".join([head, *lines]) + "\n")
    assert small.call(train, *flags(table, tmp_path / "runs", epochs=1)) == 0
    out = capsys.readouterr().out
    assert "problem: small, fold 0: the" in out and "holds label 0 only" in out
    assert "1.000" not in out.splitlines()[-1]


# ---------------------------------------------------------------- choices beyond the protocol


def with_votes(table, folder):
    """The table of `dataset` with two experts' votes; the second says yes to every third patch."""
    folder.mkdir()
    head, *lines = table.read_text().splitlines()
    lines = [f"{line},{line.split(',')[1]},{int(i % 3 == 0)}" for i, line in enumerate(lines)]
    (folder / "small.csv").write_text("\n".join([f"{head},one,two", *lines]) + "\n")
    return folder / "small.csv", ["--images", table.parent, "--columns", "votes=one+two"]


ALL = "--loss focal --class-weight balanced --balance domain --weight-decay 0.05 --augment heavy"
ALL_NAME = "lora-focal-balanced-heavy-soft-all"


def test_all_of_them_resume_bit_for_bit_the_same(tmp_path, table, monkeypatch):
    votes, reading = with_votes(table, tmp_path / "votes")
    more = [*reading, *ALL.split(), "--soft-labels", "--patience", 2, "--name", "all"]
    assert small.call(train, *flags(votes, tmp_path / "whole", *more)) == 0
    config = json.loads((folder(tmp_path / "whole", ALL_NAME) / "config.json").read_text())
    kept = {name: config["flags"][name] for name in ("loss", "focal_gamma", "class_weight")}
    assert kept == {"loss": "focal", "focal_gamma": 2.0, "class_weight": "balanced"}
    kept = {name: config["flags"][name] for name in ("augment", "stain_jitter", "soft_labels")}
    assert kept == {"augment": "heavy", "stain_jitter": 0.1, "soft_labels": True}
    assert config["data"]["votes"]
    real, done = engine.Engine.step, []

    def step(self, number, *rest):
        if len(done) == 6:
            raise KeyboardInterrupt
        done.append(number)
        return real(self, number, *rest)

    args = flags(votes, tmp_path / "cut", *more)
    with monkeypatch.context() as patch:
        patch.setattr(engine.Engine, "step", step)
        assert small.call(train, *args) == 130
    assert small.call(train, *args, "--resume") == 0
    assert_equal_runs(folder(tmp_path / "whole", ALL_NAME), folder(tmp_path / "cut", ALL_NAME))


def test_patience_ends_a_run_and_a_resumed_one_at_the_same_place(
    tmp_path, table, monkeypatch, capsys
):
    losses, real = [0.9, 0.4, 0.7, 0.5, 0.1, 0.05], train.finish
    epochs = []
    monkeypatch.setattr(engine, "validation_loss", lambda *_: losses[len(epochs) - 1])
    epoch = engine.Engine.epoch
    monkeypatch.setattr(
        engine.Engine, "epoch", lambda self, n, *rest: epochs.append(n) or epoch(self, n, *rest)
    )

    def interrupted(*_):
        raise KeyboardInterrupt

    args = flags(table, tmp_path, "--patience", 2, epochs=6, epoch_size=8)
    monkeypatch.setattr(train, "finish", interrupted)
    assert small.call(train, *args) == 130 and epochs == [0, 1, 2, 3]
    monkeypatch.setattr(train, "finish", real)
    assert small.call(train, *args, "--resume") == 0 and epochs == [0, 1, 2, 3]
    assert capsys.readouterr().out.count("stopped after pseudo-epoch 4 of 6") == 2
    training = common.read_json(folder(tmp_path) / "metrics.json")["training"]
    assert training["epochs"] == 4 and training["best_epoch"] == 2
    config = common.read_json(folder(tmp_path) / "config.json")
    assert config["flags"]["patience"] == 2 and config["flags"]["epochs"] == 6


def test_weight_decay_shrinks_what_is_trained_by_the_rate(tmp_path, table, monkeypatch):
    """AdamW: after one step the weights lie lr * W of their start lower than Adam's."""
    starts, real = [], engine.make_model

    def make_model(*rest):
        model, parameters = real(*rest)
        starts.append({name: p.detach().clone() for name, p in parameters.items()})
        return model, parameters

    monkeypatch.setattr(engine, "make_model", make_model)
    for name, more in (("plain", []), ("decay", ["--weight-decay", 0.5])):
        args = flags(table, tmp_path / name, *more, epochs=1, epoch_size=8)
        assert small.call(train, *args) == 0
    rate = engine.learning_rate(0, 1, 3e-3)
    plain, decayed = (weights(folder(tmp_path / name)) for name in ("plain", "decay"))
    config = common.read_json(folder(tmp_path / "decay") / "config.json")
    assert config["flags"]["weight_decay"] == 0.5
    for name, start in starts[0].items():
        assert torch.equal(start, starts[1][name])
        torch.testing.assert_close(
            plain[name] - decayed[name], rate * 0.5 * start, atol=1e-7, rtol=1e-4
        )
    assert any(start.abs().max() > 0.01 for start in starts[0].values())


def test_votes_are_the_targets_of_training_alone(tmp_path, table, monkeypatch):
    votes, reading = with_votes(table, tmp_path / "votes")
    seen, real = [], engine.Engine.step

    def step(self, number, images, samples, labels, *rest):
        seen.append(labels)
        return real(self, number, images, samples, labels, *rest)

    monkeypatch.setattr(engine.Engine, "step", step)
    args = flags(votes, tmp_path / "runs", *reading, "--soft-labels", epochs=1)
    assert small.call(train, *args) == 0
    assert set(np.concatenate(seen).tolist()) == {0.0, 0.5, 1.0}
    predictions = runs.read_predictions(folder(tmp_path / "runs", "lora-soft") / "predictions.csv")
    assert set(predictions["label"].tolist()) == {0, 1}


def test_two_rates_stand_side_by_side_by_a_name(tmp_path, table, capsys):
    args = flags(table, tmp_path, epochs=1, epoch_size=8)
    assert small.call(train, *args) == 0
    assert small.call(train, *args, "--lr", "1e-5") == 2
    assert "--name TAG" in capsys.readouterr().err
    assert small.call(train, *args, "--lr", "1e-5", "--name", "lr1e-5") == 0
    run = folder(tmp_path, "lora-lr1e-5")
    assert common.read_json(run / "config.json")["flags"]["name"] == "lr1e-5"
    for name in ("../x", "a b", "", "-x", 41 * "x"):
        capsys.readouterr()
        assert small.call(train, *args, f"--name={name}") == 2
        assert capsys.readouterr().err.startswith(f"error: --name {name}")
