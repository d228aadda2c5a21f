"""Is the GPU there, and is it used? Versions, libraries, and a tiny model really run on every provider: one screen."""

import ctypes
import importlib.metadata
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnxruntime
from onnx import TensorProto, helper

import classify
import cli

# What ONNX Runtime's CUDA provider links against; torch brings all of them but libcurand.
LIBRARIES = {"12": ("libcudart.so.12", "libcublas.so.12", "libcublasLt.so.12", "libcufft.so.11", "libcurand.so.10",
                    "libcudnn.so.9"),
             "13": ("libcudart.so.13", "libcublas.so.13", "libcublasLt.so.13", "libcufft.so.12", "libcurand.so.10",
                    "libcudnn.so.9")}


def version(*names):
    for name in names:
        try:
            return f"{importlib.metadata.version(name)}" + (f" ({name})" if len(names) > 1 else "")
        except importlib.metadata.PackageNotFoundError:
            continue
    return "not installed"


def gpus():
    """Names of the NVIDIA GPUs that the driver sees, asked in a way that needs neither torch nor ONNX Runtime."""
    try:
        done = subprocess.run(["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"],
                              capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()] if done.returncode == 0 else []


def libraries():
    """{library: where it was found | None} for the CUDA version that the provider was built for."""
    provider = Path(onnxruntime.__file__).parent / "capi" / "libonnxruntime_providers_cuda.so"
    if not provider.exists():
        return {}
    content = provider.read_bytes() if provider.stat().st_size < 1 << 30 else b""
    wanted = LIBRARIES["13" if b"libcublas.so.13" in content else "12"]
    if hasattr(onnxruntime, "preload_dlls"):
        with classify.muted():
            onnxruntime.preload_dlls()
    found = {}
    for name in wanted:
        try:
            ctypes.CDLL(name)
            with open("/proc/self/maps") as maps:
                paths = [line.split()[-1] for line in maps if name in line]
            found[name] = paths[0] if paths else "loaded"
        except OSError:
            found[name] = None
    return found


def tiny_model(path):
    """One product and one attention: what a vision transformer is made of."""
    shape = ["N", 4, 64]
    weight = helper.make_tensor("w", TensorProto.FLOAT, [64, 64], np.eye(64, dtype=np.float32).ravel())
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["q"]),
         helper.make_node("Attention", ["q", "x", "x"], ["y"], q_num_heads=1, kv_num_heads=1)], "tiny",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)], [weight])
    opsets = [helper.make_opsetid("", 23)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=helper.find_min_ir_version_for(opsets))
    Path(path).write_bytes(model.SerializeToString())


def expected(x):
    weights = np.exp(x @ x.transpose(0, 2, 1) / 8)
    return weights / weights.sum(-1, keepdims=True) @ x


def try_device(path, device):
    """(works, text) of really running the tiny model on a device."""
    try:
        session, _, note = classify.open_session(path, device)
        x = np.random.default_rng(0).standard_normal((2, 4, 64)).astype(np.float32)
        y, = session.run(None, {"x": x})
    except cli.UserError as error:
        return False, str(error)
    except Exception as error:  # a provider that loads and then fails has many ways to say so
        return False, str(error).split("\n")[0][:100]
    if not np.allclose(y, expected(x), atol=1e-3):
        return False, "runs, but its numbers are wrong"
    return True, f"runs ({', '.join(session.get_providers())})"


def report():
    """Print the screen → exit status: 0 in order, 1 a GPU is here and is not used."""
    devices, rows = gpus(), []
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs"
    rows.append(("python", f"{platform.python_version()}, {machine}"))
    try:
        import torch
        cuda = torch.cuda.is_available()
        rows.append(("torch", f"{torch.__version__}, CUDA {torch.version.cuda or 'not built in'}, "
                              + (f"uses {torch.cuda.get_device_name()}" if cuda else "no GPU in use")))
    except ImportError:
        cuda = None
        rows.append(("torch", "not installed (classify.py does not need it)"))
    rows.append(("onnxruntime", f"{version('onnxruntime-gpu', 'onnxruntime')}, lists "
                                + ", ".join(p.replace("ExecutionProvider", "")
                                            for p in onnxruntime.get_available_providers())))
    rows.append(("onnx", version("onnx")))
    import openslide
    rows.append(("openslide", f"{openslide.__library_version__}, python {version('openslide-python')}"))
    rows.append(("GPU", "; ".join(devices) or "none that nvidia-smi sees"))
    for name, place in libraries().items():
        rows.append((name, place or "MISSING: pip install 'onnxruntime-gpu[cuda,cudnn]'"))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tiny.onnx"
        tiny_model(path)
        cpu, text = try_device(path, "cpu")
        rows.append(("CPU", text))
        gpu = None
        if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
            gpu, text = try_device(path, "cuda")
            rows.append(("CUDA", text))
    print("\n".join(f"{name:20}{text}" for name, text in rows))
    if not cpu:
        print("\nONNX Runtime does not even run on the CPU: install it again")
        return 1
    if devices and not (gpu and cuda is not False):
        print("\na GPU is here and " + ("ONNX Runtime" if not gpu else "torch") + " does not use it")
        return 1
    print("\nin order" + ("" if devices else "; there is no GPU to be used"))
    return 0


if __name__ == "__main__":
    sys.exit(report())
