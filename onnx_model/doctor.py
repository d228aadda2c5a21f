"""Is the GPU there, and is it used? Versions, libraries, and a tiny model really run on every
provider: one screen.
"""

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

import common
from onnx_model import session

# What ONNX Runtime's CUDA provider links against; torch brings all of them but libcurand.
LIBRARIES = {
    "12": (
        "libcudart.so.12",
        "libcublas.so.12",
        "libcublasLt.so.12",
        "libcufft.so.11",
        "libcurand.so.10",
        "libcudnn.so.9",
    ),
    "13": (
        "libcudart.so.13",
        "libcublas.so.13",
        "libcublasLt.so.13",
        "libcufft.so.12",
        "libcurand.so.10",
        "libcudnn.so.9",
    ),
}


def version(*names):
    for name in names:
        try:
            return f"{importlib.metadata.version(name)}" + (f" ({name})" if len(names) > 1 else "")
        except importlib.metadata.PackageNotFoundError:
            continue
    return "not installed"


def gpus():
    """Names of the NVIDIA GPUs that the driver sees, asked in a way that needs neither torch nor
    ONNX Runtime.
    """
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    return (
        [line.strip() for line in done.stdout.splitlines() if line.strip()]
        if done.returncode == 0
        else []
    )


def libraries():
    """{library: where it was found | None} for the CUDA version that the provider was built for."""
    provider = Path(onnxruntime.__file__).parent / "capi" / "libonnxruntime_providers_cuda.so"
    if not provider.exists():
        return {}
    content = provider.read_bytes() if provider.stat().st_size < 1 << 30 else b""
    wanted = LIBRARIES["13" if b"libcublas.so.13" in content else "12"]
    if hasattr(onnxruntime, "preload_dlls"):
        with session.muted():
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
    weight = helper.make_tensor(
        "w", TensorProto.FLOAT, [64, 64], np.eye(64, dtype=np.float32).ravel()
    )
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w"], ["q"]),
            helper.make_node("Attention", ["q", "x", "x"], ["y"], q_num_heads=1, kv_num_heads=1),
        ],
        "tiny",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        [weight],
    )
    opsets = [helper.make_opsetid("", 23)]
    model = helper.make_model(
        graph, opset_imports=opsets, ir_version=helper.find_min_ir_version_for(opsets)
    )
    Path(path).write_bytes(model.SerializeToString())


def expected(x):
    weights = np.exp(x @ x.transpose(0, 2, 1) / 8)
    return weights / weights.sum(-1, keepdims=True) @ x


def try_device(path, device):
    """(works, text) of really running the tiny model on a device."""
    try:
        opened, _, _ = session.open_session(path, device)
        x = np.random.default_rng(0).standard_normal((2, 4, 64)).astype(np.float32)
        (y,) = opened.run(None, {"x": x})
    except common.UserError as error:
        text = str(error).removeprefix(f"--device {device}: ")
        return False, text.removesuffix(" (python export.py --doctor says which)")
    except Exception as error:  # a provider that loads and then fails has many ways to say so
        return False, str(error).split("\n")[0][:100]
    if not np.allclose(y, expected(x), atol=1e-3):
        return False, "runs, but its numbers are wrong"
    return True, f"runs ({', '.join(opened.get_providers())})"


def report():
    """Print the screen → exit status: 0 in order, 1 a GPU is here and is not used, or nothing runs
    at all.
    """
    devices, problems = gpus(), []
    rows = [
        (
            "python",
            f"{platform.python_version()}, {platform.system()} {platform.machine()}, "
            f"{os.cpu_count()} CPUs",
        )
    ]
    try:
        import torch

        cuda = torch.cuda.is_available()
        rows.append(
            (
                "torch",
                f"{torch.__version__}, CUDA {torch.version.cuda or 'not built in'}, "
                + (f"uses {torch.cuda.get_device_name()}" if cuda else "no GPU in use"),
            )
        )
        if cuda and not devices:  # containers often lack nvidia-smi
            devices = [torch.cuda.get_device_name()]
        elif devices and not cuda:
            problems.append(
                "torch does not use it (its CUDA must not be newer than the driver's: install the "
                "torch "
                "of an older CUDA, or update the driver)"
            )
    except ImportError:
        rows.append(("torch", "not installed (classify.py does not need it)"))
    listed = onnxruntime.get_available_providers()
    rows.append(
        (
            "onnxruntime",
            f"{version('onnxruntime-gpu', 'onnxruntime')}, lists "
            + ", ".join(name.replace("ExecutionProvider", "") for name in listed),
        )
    )
    rows.append(("onnx", version("onnx")))
    import openslide

    rows.append(
        ("openslide", f"{openslide.__library_version__}, python {version('openslide-python')}")
    )
    if not devices and session.nvidia_device():
        devices = ["a device in /dev, but no driver that answers"]
    rows.append(("GPU", "; ".join(devices) or "none that nvidia-smi sees"))
    found = libraries()
    rows += [(name, place or "MISSING") for name, place in found.items()]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tiny.onnx"
        tiny_model(path)
        cpu, text = try_device(path, "cpu")
        rows.append(("CPU", text))
        if not cpu:
            problems.append("ONNX Runtime does not even run on the CPU: install it again")
        if "CUDAExecutionProvider" not in listed:
            gpu, text = False, "not in this onnxruntime: pip install 'onnxruntime-gpu[cuda,cudnn]'"
        elif not devices:
            gpu, text = None, "not tried: no GPU"
        else:
            gpu, text = try_device(path, "cuda")
        rows.append(("CUDA", text))
    if devices and not gpu:
        missing = [name for name, place in found.items() if place is None]
        problems.append(
            "ONNX Runtime does not use it"
            + (
                f": {', '.join(missing)} missing, pip install 'onnxruntime-gpu[cuda,cudnn]'"
                if missing
                else ""
            )
        )
    print("\n".join(f"{name:20}{text}" for name, text in rows) + "\n")
    print(
        "\n".join(f"a GPU is here and {text}" if cpu else text for text in problems)
        or "in order" + ("" if devices else "; there is no GPU to be used")
    )
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(report())
