import csv
import json
import random
import signal
import sys
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import crops
import data
import lora
import models
import runs
import small
import train

RUN = "frac1-fold0"


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return small.dataset(tmp_path_factory.mktemp("data"))


def flags(table, out, *more, epochs=3, epoch_size=32, lora=True):
    return ["--data", table, "--model", "tiny", "--weights", "random", "--runs", out, "--epochs", epochs,
            "--epoch-size", epoch_size, "--batch-size", 8, "--device", "cpu", "--lr", "3e-3",
            *(["--lora"] if lora else []), *more]


def folder(out, method="lora", name="tiny"):
    return out / "small" / f"{name}-{method}" / RUN


def weights(path):
    return load_file(path / "model.safetensors")


def test_learning_rate_is_torchs_one_cycle():
    for total in (20, 97, 8000):
        p = torch.nn.Parameter(torch.zeros(1))
        optimizer = torch.optim.Adam([p], lr=1e-4)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-4, total_steps=total, cycle_momentum=False)
        for step in range(total):
            assert train.learning_rate(step, total, 1e-4) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
            optimizer.step()
            if step < total - 1:
                schedule.step()


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_run_learns_and_leaves_its_files(tmp_path, table, method):
    args = flags(table, tmp_path, epochs=8, epoch_size=96, lora=method == "lora")
    assert small.call(train, *args) == 0
    run = folder(tmp_path, method)
    assert sorted(p.name for p in run.iterdir()) == ["config.json", "curves.png", "lock", "log.csv", "metrics.json",
                                                     "model.safetensors", "predictions.csv", "split.json"]
    metrics = runs.read_json(run / "metrics.json")
    # Swapped labels give 0 here, patches that do not belong to their labels 0.5.
    assert metrics["sets"]["test"]["auroc"] > 0.9 and metrics["sets"]["test"]["balanced_accuracy"] > 0.8
    log = list(csv.DictReader(open(run / "log.csv")))
    assert [int(row["epoch"]) for row in log] == list(range(1, 9))
    assert float(log[-1]["train_loss"]) < 0.8 * float(log[0]["train_loss"])
    annotations = data.load_dataset(table)
    split = data.load_split(run / "split.json", annotations)
    predictions = runs.read_predictions(run / "predictions.csv")
    assert set(predictions["id"][predictions["set"] == "test"]) == set(split.test)
    # The saved model, loaded and merged, gives what the run predicted.
    model, config = models.load_run(run, merge=True)
    rows = annotations.rows(predictions["id"])
    again = models.predict(model, crops.Patches(annotations), rows)
    assert np.abs(again - predictions["logit"]).max() < 1e-4
    assert (predictions["label"] == annotations.label[rows]).all()
    names = set(weights(run))
    assert ("encoder.blocks.0.attn.qkv.lora_A" in names) == (method == "lora")
    assert len(names) == (2 + 2 * 4 * 2 if method == "lora" else len(model.state_dict()))


def test_the_epoch_of_lowest_validation_loss_is_kept_and_tested(tmp_path, table, monkeypatch):
    losses, logits = iter([0.9, 0.4, 0.7, 0.4]), []
    real = train.predict_together
    monkeypatch.setattr(train, "validation_loss", lambda labels, values: next(losses))
    monkeypatch.setattr(train, "predict_together", lambda *a: logits.append(real(*a)) or logits[-1])
    assert small.call(train, *flags(table, tmp_path, epochs=4)) == 0
    metrics = runs.read_json(folder(tmp_path) / "metrics.json")
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
@pytest.mark.parametrize("stop", [1, 5, 10])
def test_a_resumed_run_ends_bit_for_bit_the_same(tmp_path, table, monkeypatch, method, stop):
    """Interrupted after `stop` of 12 steps (4 per epoch): no more than one epoch is repeated."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert small.call(train, *flags(table, whole, lora=method == "lora")) == 0
    real, done = train.Engine.step, []

    def step(self, number, *rest):
        if len(done) == stop:
            raise KeyboardInterrupt
        done.append(number)
        return real(self, number, *rest)
    monkeypatch.setattr(train.Engine, "step", step)
    args = flags(table, cut, lora=method == "lora")
    assert small.call(train, *args) == 130
    before, stop = list(done), None
    assert small.call(train, *args) == 2  # begun: needs --resume
    assert small.call(train, *args, "--resume") == 0
    repeated = set(before) & set(done[len(before):])
    assert len(repeated) < 4 and sorted(set(done)) == list(range(12))
    a, b = weights(folder(whole, method)), weights(folder(cut, method))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    for name in ("metrics.json", "predictions.csv"):
        assert (folder(whole, method) / name).read_bytes() == (folder(cut, method) / name).read_bytes()
    strip = [[row[:5] for row in csv.reader(open(folder(out, method) / "log.csv"))] for out in (whole, cut)]
    assert strip[0] == strip[1]


def kill_and_resume(tmp_path, table, kills, seed):
    """kill -9 at random moments of a run, then --resume; → (weights of the interrupted run, of an uninterrupted)."""
    rng = random.Random(seed)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    size = {"epochs": 6, "epoch_size": 64}
    assert small.call(train, *flags(table, whole, **size)) == 0
    args, run = [*flags(table, cut, **size), "--resume"], folder(cut)
    killed, epochs = 0, []
    while killed < kills:
        process = small.command("train", *args, wait=False)
        # From the moment it writes to the run's folder; some of them while a checkpoint is being written.
        while process.poll() is None and not (run / "split.json").exists():
            time.sleep(0.01)
        deadline, writing = time.time() + rng.uniform(0, 5), rng.random() < 0.3
        while process.poll() is None and time.time() < deadline:
            if writing and any(run.glob(".checkpoint*")):
                break
            time.sleep(0.002)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            killed += 1
        process.communicate()
        epochs.append(epoch_of(run))
        if (run / "metrics.json").exists():
            break
    assert epochs == sorted(epochs)  # nothing that was reached is lost
    code, out, err = small.command("train", *args)
    assert code == 0, err
    return whole, cut, epochs


def epoch_of(run):
    if (run / "metrics.json").exists():
        return 99
    if not (run / "checkpoint.safetensors").exists():
        return 0
    return train.load_tensors(run / "checkpoint.safetensors")[1]["epoch"]


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_kill_9(tmp_path, table, kills):
    whole, cut, epochs = kill_and_resume(tmp_path, table, kills, seed=kills)
    a, b = weights(folder(whole)), weights(folder(cut))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert (folder(whole) / "metrics.json").read_text() == (folder(cut) / "metrics.json").read_text()
    assert not list(folder(cut).glob("checkpoint*")) and not list(folder(cut).glob(".*.tmp"))


def test_parts_of_a_batch_give_the_same_run(tmp_path, table):
    """Gradient accumulation: the same samples, masks and augmentation; equal but for rounding."""
    for name, parts in (("one", 1), ("three", 3)):
        assert small.call(train, *flags(table, tmp_path / name), "--accumulate", parts) == 0
    a, b = (weights(folder(tmp_path / name)) for name in ("one", "three"))
    assert all((a[name] - b[name]).norm() <= 1e-3 * a[name].norm() for name in a)
    logs = [np.genfromtxt(folder(tmp_path / n) / "log.csv", delimiter=",", names=True) for n in ("one", "three")]
    assert np.abs(logs[0]["train_loss"] - logs[1]["train_loss"]).max() < 1e-5


def test_out_of_memory_halves_the_batch(tmp_path, table, monkeypatch, capsys):
    real = train.Engine.backward

    def backward(self, step, images, *rest):
        if self.parts == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, step, images, *rest)
    monkeypatch.setattr(train.Engine, "backward", backward)
    assert small.call(train, *flags(table, tmp_path, epochs=1)) == 0
    assert "accumulated over 2 parts" in capsys.readouterr().err


def test_checkpointing_changes_nothing(tmp_path, table):
    for name, more in (("plain", []), ("checkpointing", ["--checkpointing"])):
        assert small.call(train, *flags(table, tmp_path / name), *more) == 0
    a, b = (weights(folder(tmp_path / name)) for name in ("plain", "checkpointing"))
    assert all((a[name] - b[name]).norm() <= 1e-5 * a[name].norm() for name in a)


def test_a_loss_that_is_not_finite_stops_with_step_and_patches(tmp_path, table, monkeypatch, capsys):
    real = train.Engine.step

    def step(self, number, *rest):
        total = real(self, number, *rest)
        return total * float("nan") if number == 5 else total
    monkeypatch.setattr(train.Engine, "step", step)
    assert small.call(train, *flags(table, tmp_path)) == 2
    error = capsys.readouterr().err
    assert "step 5" in error and "--lr" in error and "--resume" in error and "small.csv#" in error
    monkeypatch.undo()
    assert small.call(train, *flags(table, tmp_path), "--resume") == 0


def test_two_processes_equal_one(tmp_path, table):
    one, two = tmp_path / "one", tmp_path / "two"
    assert small.call(train, *flags(table, one)) == 0
    script = tmp_path / "script.py"
    script.write_text(f"import sys; sys.path[:0] = [{str(small.HERE.parent)!r}, {str(small.HERE)!r}]\n"
                      "import small, cli, train\ncli.command(train.main)\n")
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script)
    code, out, err = small.command("train", *flags(table, two), launcher=tuple(map(str, launcher)))
    assert code == 0, err
    logs = [np.genfromtxt(folder(out) / "log.csv", delimiter=",", names=True) for out in (one, two)]
    for column in ("train_loss", "val_loss", "val_auroc"):
        assert np.abs(logs[0][column] - logs[1][column]).max() < 1e-6, column
    assert "1 of" not in out or "2 processes" in out


def test_fold_and_seed_change_the_run(tmp_path, table):
    for fold in (0, 1):
        assert small.call(train, *flags(table, tmp_path, epochs=1), "--fold", fold) == 0
    a, b = (weights(tmp_path / "small" / "tiny-lora" / f"frac1-fold{fold}") for fold in (0, 1))
    assert not torch.equal(a["encoder.blocks.0.attn.qkv.lora_A"], b["encoder.blocks.0.attn.qkv.lora_A"])


def test_domains_and_further_datasets(tmp_path, table, capsys):
    other = small.dataset(tmp_path / "other", cases=4, seed=9, name="elsewhere")
    args = flags(table, tmp_path / "runs", epochs=1)
    assert small.call(train, *args, "--domain", "A", "--test", other) == 0
    run = tmp_path / "runs" / "small" / "tiny-lora" / "domainA-fold0"
    predictions = runs.read_predictions(run / "predictions.csv")
    assert set(predictions["set"]) == {"val", "test", "B", "elsewhere"}
    assert (predictions["domain"][predictions["set"] == "B"] == "B").all()
    assert (predictions["set"] == "elsewhere").sum() == 24
    metrics = runs.read_json(run / "metrics.json")
    assert set(metrics["sets"]) == {"val", "test", "B", "elsewhere"} and "training" in metrics
    assert "shares 4 cases" in capsys.readouterr().out.replace(",", "")


@pytest.mark.parametrize("more, words", [
    (["--model", "resnet50"], ["resnet50", "--lora"]), (["--rank", "0"], ["--rank"]), (["--epochs", "0"], ["--epochs"]),
    (["--lr", "nan"], ["--lr"]), (["--frac", "10"], ["--frac", "0.1"]), (["--domain", "Z"], ["Z"]),
    (["--model", "unknown"], ["unknown", "h-optimus-0"]), (["--device", "cuda:77"], ["--device"])])
def test_mistakes_are_one_line(tmp_path, table, more, words, capsys):
    assert small.call(train, *flags(table, tmp_path), *more) == 2
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1 and all(word in error for word in words)
    assert not list(tmp_path.glob("**/config.json"))


def test_a_gated_encoder_says_what_to_do(tmp_path, table):
    code, out, err = small.command("train", "--data", table, "--model", "h-optimus-0", "--lora", "--frac", "0.1",
                                   "--runs", tmp_path, HF_HUB_OFFLINE="", HF_TOKEN="", HF_HOME=str(tmp_path / "hf"))
    last = err.strip().splitlines()[-1]
    assert code == 2 and last.startswith("error: ") and "--weights" in last and "Traceback" not in err


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
    annotations, args = data.from_source(config["source"])
    assert annotations.fingerprint() == config["data"]["fingerprint"] and args.fit == "resize"
