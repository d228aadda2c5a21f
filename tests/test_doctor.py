"""The doctor: what it says, and its exit status, with a faked nvidia-smi and faked providers."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

import common
from onnx_model import devices, doctor

HERE = Path(__file__).resolve().parent.parent
NO_GPU = pytest.mark.skipif(
    torch.cuda.is_available() or devices.nvidia_device(), reason="a GPU is here"
)


def nvidia_smi(folder, script):
    """A folder for PATH with an nvidia-smi that is this shell script."""
    folder.mkdir()
    path = folder / "nvidia-smi"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


def screen(capsys):
    status = doctor.report()
    return status, capsys.readouterr().out


@NO_GPU
@pytest.mark.parametrize("command", ["classify.py", "export.py"])
def test_the_command_with_a_gpu_that_is_not_used(command, tmp_path):
    """A driver that sees a GPU on a machine where nothing can use it: status 1, both named."""
    path = nvidia_smi(tmp_path / "bin", "echo 'NVIDIA H100 80GB HBM3, 550.54.15, 81559 MiB'")
    done = subprocess.run(
        [sys.executable, str(HERE / command), "--doctor"],
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": path},
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "NVIDIA H100 80GB HBM3" in done.stdout
    assert "a GPU is available, but torch does not use it" in done.stdout
    assert "a GPU is available, but ONNX Runtime does not use it" in done.stdout


@NO_GPU
@pytest.mark.parametrize("script", ["exit 9", "echo; exit 0", None])
def test_no_gpu_is_in_order(script, tmp_path, monkeypatch, capsys):
    """nvidia-smi that fails (no driver), that sees nothing, that is not there."""
    monkeypatch.setenv("PATH", nvidia_smi(tmp_path / "bin", script) if script else str(tmp_path))
    status, text = screen(capsys)
    assert status == 0 and text.endswith("in order; no GPU on this machine\n")
    assert len(text.splitlines()) <= 24 and max(map(len, text.splitlines())) < 200
    for name in ("python", "torch", "onnxruntime", "onnx", "openslide", "CPU", "CUDA"):
        assert f"\n{name} " in f"\n{text}"
    assert "runs (CPUExecutionProvider)" in text


class Session:
    """A session of a provider that works, or whose numbers are not right."""

    def __init__(self, error=0.0):
        self.error = error

    def run(self, _, inputs):
        return [doctor.expected(inputs["x"]) + np.float32(self.error)]

    def get_providers(self):
        return ["CUDAExecutionProvider", "CPUExecutionProvider"]


@pytest.fixture
def machine(monkeypatch):
    """A machine with a GPU: torch uses it, ONNX Runtime's CUDA session is what the test gives."""
    monkeypatch.setattr(doctor, "gpus", lambda: ["a GPU, 1.0, 80 GB"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a GPU")
    monkeypatch.setattr(
        onnxruntime,
        "get_available_providers",
        lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"],
    )
    monkeypatch.setattr(doctor, "libraries", lambda: {"libcublas.so.13": True})
    opened = devices.open_session

    def give(answer):
        def open_session(path, device):
            if device == "cpu":
                return opened(path, device)
            if isinstance(answer, Exception):
                raise answer
            return answer, device, "note"

        monkeypatch.setattr(devices, "open_session", open_session)

    return give


def test_a_gpu_that_is_used(machine, capsys):
    machine(Session())
    status, text = screen(capsys)
    assert status == 0 and text.endswith("\nin order\n") and "runs (CUDAExecutionProvider" in text


def test_tensorrt_has_a_line_and_is_no_problem(machine, capsys, monkeypatch):
    machine(Session())
    _, text = screen(capsys)
    assert "\nTensorRT            not in this onnxruntime\n" in text
    names = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: names)
    _, text = screen(capsys)
    assert "\nTensorRT            runs (" in text
    given = devices.open_session

    def without_tensorrt(path, device):
        if device == "tensorrt":
            raise common.UserError("device tensorrt: TensorRT is not installed (…)")
        return given(path, device)

    monkeypatch.setattr(devices, "open_session", without_tensorrt)
    status, text = screen(capsys)
    assert status == 0 and "\nTensorRT            TensorRT is not installed (" in text


def test_a_gpu_with_wrong_numbers(machine, capsys):
    machine(Session(error=0.1))
    status, text = screen(capsys)
    assert (
        status == 1 and "its numbers are wrong" in text and "ONNX Runtime does not use it" in text
    )


def test_a_missing_library_is_named(machine, capsys, monkeypatch):
    machine(common.UserError("device cuda: the CUDA provider did not load"))
    monkeypatch.setattr(
        doctor, "libraries", lambda: {"libcublas.so.13": True, "libcurand.so.10": False}
    )
    status, text = screen(capsys)
    assert (
        status == 1 and "libcurand.so.10 missing, pip install 'onnxruntime-gpu[cuda,cudnn]'" in text
    )


def test_an_onnxruntime_without_cuda(machine, capsys, monkeypatch):
    machine(Session())
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    status, text = screen(capsys)
    assert status == 1 and "not in this onnxruntime" in text and "does not use it" in text


def test_a_provider_that_crashes_is_reported(machine, capsys):
    machine(RuntimeError("CUDA failure 35: driver version is insufficient\nmore"))
    status, text = screen(capsys)
    assert (
        status == 1
        and "driver version is insufficient" in text
        and "more" not in text.split("insufficient")[1]
    )


def test_the_tiny_model_is_right(tmp_path):
    """Its numbers from another side: attention of one head, written out."""
    doctor.tiny_model(tmp_path / "tiny.onnx")
    x = np.random.default_rng(1).standard_normal((3, 4, 8)).astype(np.float32)
    opened = onnxruntime.InferenceSession(
        str(tmp_path / "tiny.onnx"), providers=["CPUExecutionProvider"]
    )
    (y,) = opened.run(None, {"x": x})
    given = torch.from_numpy(x)
    attention = torch.nn.functional.scaled_dot_product_attention(given, given, given).numpy()
    assert np.abs(y - attention).max() < 1e-5
    assert np.abs(doctor.expected(x) - attention).max() < 1e-5


def test_the_tiny_model_is_what_onnx_builds(tmp_path):
    shape = ["N", 4, 8]
    weight = np.eye(8, dtype=np.float32).tobytes()
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w"], ["q"]),
            helper.make_node("Attention", ["q", "x", "x"], ["y"], q_num_heads=1, kv_num_heads=1),
        ],
        "tiny",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        [helper.make_tensor("w", TensorProto.FLOAT, [8, 8], weight, raw=True)],
    )
    opsets = [helper.make_opsetid("", 23)]
    version = helper.find_min_ir_version_for(opsets)
    model = helper.make_model(graph, opset_imports=opsets, ir_version=version)
    doctor.tiny_model(tmp_path / "tiny.onnx")
    assert onnx.load(tmp_path / "tiny.onnx") == model
    onnx.checker.check_model(str(tmp_path / "tiny.onnx"))


def test_the_doctor_needs_neither_torch_nor_onnx():
    """As in an environment of requirements-classify.txt."""
    code = (
        "import sys, runpy\n"
        "for name in ('torch', 'onnx', 'models', 'matplotlib', 'safetensors'):\n"
        "    sys.modules[name] = None\n"
        f"sys.path.insert(0, {str(HERE)!r})\n"
        "sys.argv = ['classify.py', '--doctor']\n"
        f"runpy.run_path({str(HERE / 'classify.py')!r}, run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode in (0, 1) and "Traceback" not in done.stderr, done.stderr
    assert "not installed (classify.py does not need it)" in done.stdout
    assert "runs (CPUExecutionProvider)" in done.stdout


def test_users_are_sent_to_the_command_that_they_have():
    """Nobody who has classify.py alone is told to run export.py."""
    for file in (
        "classify.py",
        "onnx_model/devices.py",
        "onnx_model/session.py",
        "onnx_model/doctor.py",
    ):
        assert "export.py --doctor" not in (HERE / file).read_text(encoding="utf-8")
