"""Is the GPU available, and is it used? Versions, libraries, and a tiny model run on every
provider: one screen.

Needs what classify.py needs, no more: neither torch nor onnx."""

import base64
import ctypes
import importlib.metadata
import os
import platform
import shutil
import subprocess
import tempfile
import zlib
from pathlib import Path

import numpy as np
import onnxruntime
import openslide

import common
from onnx_model import devices

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
INSTALL = "pip install 'onnxruntime-gpu[cuda,cudnn]'"

# What a vision transformer is made of, one product and one attention, as an ONNX file (zlib,
# base64): x float32 [N, 4, 8], q = x @ identity, y = Attention(q, x, x), one head, opset 23.
# tests/test_doctor.py builds the same with onnx.helper.
TINY_MODEL = (
    "eNrj4Laax8wlyMVYwcVYLsRYqMTmm1jiW5rD5cDFWAgWrRBirFTidCwpSc0ryczP0xLm4skui88rzY3PSE1MKZZgXMDI"
    "pCXExV2IJibEUpKZV6nVw8QBBAKMTozlXg1MDAwN9gwEwfBVEyUBClBhLkEORiFeLmYhRj8uJg4WIOZIAspUYpVxYuFi"
    "EBAHAPNNJZc="
)


def tiny_model(path):
    Path(path).write_bytes(zlib.decompress(base64.b64decode(TINY_MODEL)))


def expected(x):
    """What the tiny model gives for x float32 [N, 4, 8]."""
    weights = np.exp(x @ x.transpose(0, 2, 1) / 8**0.5)
    return weights / weights.sum(-1, keepdims=True) @ x


def version(*names):
    """The installed version of the first of these packages that is installed."""
    for name in names:
        try:
            text = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if len(names) > 1:
            text += f" ({name})"
        return text
    return "not installed"


def gpus():
    """Names of the NVIDIA GPUs that the driver sees, asked without torch and ONNX Runtime."""
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
    if done.returncode:
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]


def libraries():
    """{library: does it load?} for the CUDA version that the provider was built for."""
    provider = Path(onnxruntime.__file__).parent / "capi" / "libonnxruntime_providers_cuda.so"
    if not provider.exists():
        return {}
    names = LIBRARIES["12"]
    if provider.stat().st_size < 1 << 30 and b"libcublas.so.13" in provider.read_bytes():
        names = LIBRARIES["13"]
    devices.preload()
    return {name: loads(name) for name in names}


def loads(library):
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def try_device(path, device):
    """(works, text) of running the tiny model on a device."""
    try:
        opened, _, _ = devices.open_session(path, device)
        x = np.random.default_rng(0).standard_normal((2, 4, 8)).astype(np.float32)
        (y,) = opened.run(None, {"x": x})
    except common.UserError as error:
        text = str(error).removeprefix(f"device {device}: ").partition(" (python classify.py")[0]
        return False, text
    except Exception as error:  # a provider that loads and then fails has many ways to say so
        return False, str(error).split("\n")[0][:100]
    if not np.allclose(y, expected(x), atol=1e-3):
        return False, "runs, but its numbers are wrong"
    return True, f"runs ({', '.join(opened.get_providers())})"


def torch_row(gpu_seen):
    """(text about torch, the GPU that it uses or None, what is wrong with it or None)."""
    try:
        import torch
    except ImportError:
        return "not installed (classify.py does not need it)", None, None
    except Exception as error:  # a broken installation, of whatever kind
        return f"cannot be imported ({str(error)[:80]})", None, None
    text = f"{torch.__version__}, CUDA {torch.version.cuda or 'not built in'}, "
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        return text + f"uses {name}", name, None
    problem = None
    if gpu_seen:
        problem = (
            "torch does not use it (its CUDA must not be newer than the driver's: install the "
            "torch of an older CUDA, or update the driver)"
        )
    return text + "no GPU in use", None, problem


def report():
    """Print the screen → exit status: 0 in order, 1 a GPU is not used, or nothing runs at all."""
    seen, problems = gpus(), []
    system = f"{platform.system()} {platform.machine()}"
    rows = [("python", f"{platform.python_version()}, {system}, {os.cpu_count()} CPUs")]
    text, torch_gpu, problem = torch_row(bool(seen))
    rows.append(("torch", text))
    if torch_gpu and not seen:  # containers often lack nvidia-smi
        seen = [torch_gpu]
    if problem:
        problems.append(f"a GPU is available, but {problem}")
    providers = onnxruntime.get_available_providers()
    names = ", ".join(name.replace("ExecutionProvider", "") for name in providers)
    rows.append(("onnxruntime", f"{version('onnxruntime-gpu', 'onnxruntime')}, lists {names}"))
    rows.append(("onnx", version("onnx")))
    library, binding = openslide.__library_version__, version("openslide-python")
    rows.append(("openslide", f"{library}, python {binding}"))
    if not seen and devices.nvidia_device():
        seen = ["a device in /dev, but no driver that answers"]
    rows.append(("GPU", "; ".join(seen) or "none that nvidia-smi sees"))
    missing = []
    for name, found in libraries().items():
        rows.append((name, "loads" if found else "MISSING"))
        if not found:
            missing.append(name)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tiny.onnx"
        tiny_model(path)
        works, text = try_device(path, "cpu")
        rows.append(("CPU", text))
        if not works:
            problems.append("ONNX Runtime does not even run on the CPU: install it again")
        if "CUDAExecutionProvider" not in providers:
            works, text = False, f"not in this onnxruntime: {INSTALL}"
        elif seen:
            works, text = try_device(path, "cuda")
        else:
            works, text = False, "not tried: no GPU"
        rows.append(("CUDA", text))
        # Not having it is no problem: nothing needs it.
        if "TensorrtExecutionProvider" not in providers:
            text = "not in this onnxruntime"
        elif works:
            _, text = try_device(path, "tensorrt")
            shutil.rmtree(devices.engine_folder(path), ignore_errors=True)
        else:
            text = "not tried: needs CUDA"
        rows.append(("TensorRT", text))
    if seen and not works:
        problem = "a GPU is available, but ONNX Runtime does not use it"
        if missing:
            problem += f": {', '.join(missing)} missing, {INSTALL}"
        problems.append(problem)

    print("\n".join(f"{name:20}{text}" for name, text in rows) + "\n")
    if problems:
        print("\n".join(problems))
        return 1
    if seen:
        print("in order")
    else:
        print("in order; no GPU on this machine")
    return 0
