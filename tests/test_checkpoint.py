"""Tensors of a run: equal files for equal runs, and those of earlier versions."""

import json

import pytest
import torch
from safetensors.torch import save_file

import checkpoint
from common import UserError

TENSORS = {"head.weight": torch.arange(6.0).view(1, 6), "head.bias": torch.tensor([0.5])}


def test_equal_tensors_are_equal_files(tmp_path):
    facts = {"format": "run", "method": "lora", "encoder": "demo", "epoch": 3, "loss": 0.1}
    files = []
    for i in range(12):  # safetensors writes several entries of a header in random order
        checkpoint.save_tensors(tmp_path / str(i), TENSORS, **facts)
        files.append((tmp_path / str(i)).read_bytes())
    assert len(set(files)) == 1
    tensors, back = checkpoint.load_tensors(tmp_path / "0")
    assert back == facts and all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)


def test_files_of_the_first_version_are_read(tmp_path):
    old = {"epoch": json.dumps(3), "scaler": "{}", "method": json.dumps("lora")}
    save_file(TENSORS, tmp_path / "checkpoint", metadata=old)
    assert checkpoint.load_tensors(tmp_path / "checkpoint")[1] == {
        "epoch": 3,
        "scaler": {},
        "method": "lora",
    }
    save_file(TENSORS, tmp_path / "model", metadata={"format": "mitosis-run", "encoder": "demo"})
    assert checkpoint.load_tensors(tmp_path / "model")[1]["encoder"] == "demo"
    save_file(TENSORS, tmp_path / "plain")
    assert checkpoint.load_tensors(tmp_path / "plain")[1] == {}


def test_damaged_files_are_one_line(tmp_path):
    path = tmp_path / "model.safetensors"
    checkpoint.save_tensors(path, TENSORS, epoch=1)
    content = path.read_bytes()
    for damaged in (b"", content[:-3], content[:20], b"\xff" * 100):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="model.safetensors: truncated"):
            checkpoint.load_tensors(path)
    with pytest.raises(UserError, match="truncated, or no"):
        checkpoint.load_tensors(tmp_path / "missing")
    save_file(TENSORS, path, metadata={"mitfig": "{"})
    with pytest.raises(UserError, match="header is damaged"):
        checkpoint.load_tensors(path)


def test_weights_are_kept_as_absolute_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "w.safetensors").touch()
    assert checkpoint.absolute("w.safetensors") == str(tmp_path.resolve() / "w.safetensors")
    for name in (None, "random", "nowhere"):
        assert checkpoint.absolute(name) == name
