"""The provider of ONNX Runtime that runs a model: TensorRT, CUDA or the CPU, if it really works."""

import contextlib
import hashlib
import importlib
import math
import os
import sys
import threading
from pathlib import Path

import numpy as np
import onnxruntime

import common
from common import UserError
from onnx_model import cuda_graphs

TENSORRT_OFF = 0.02  # most that TensorRT may differ: it chooses types, and overflows in some models


def open_session(path, device="auto", threads=0, live=False):
    """InferenceSession of a file → (session, "cpu" | "cuda:i", note). UserError if the device is
    not available.

    live  on a GPU: ready for cuda_graphs.CapturedRuns
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    if not common.is_utf8(str(path)):
        raise UserError(f"{path}: ONNX Runtime reads paths in UTF-8 alone; rename it")
    kind, index = parse_device(device)
    version, why_not = f"onnxruntime {onnxruntime.__version__}", ""
    if kind == "tensorrt":
        session, why_not = open_tensorrt(path, index, threads)
        if session is not None:
            return session, f"cuda:{index}", f"TensorRT, device {index} ({version})"
    elif kind != "cpu":
        session, why_not = open_cuda(path, index, threads, kind == "cuda", live)
        if session is not None:
            return session, f"cuda:{index}", f"CUDA, device {index} ({version})"
    if kind in ("cuda", "tensorrt"):
        raise UserError(f"device {device}: {why_not}")
    note = f"CPU ({version})"
    if why_not:
        note += f"; not CUDA: {why_not}"
    return start(path, ["CPUExecutionProvider"], threads), "cpu", note


def parse_device(device):
    """The kind of device and its number: ("cuda", 1) of "cuda:1". UserError if there is no such
    kind.
    """
    kind, _, index = str(device).partition(":")
    if kind not in ("auto", "cpu", "cuda", "tensorrt") or (
        index and not (kind in ("cuda", "tensorrt") and index.isdigit())
    ):
        raise UserError(
            f"device {device}: choose auto, cpu, cuda, tensorrt, or one of several GPUs: cuda:1"
        )
    return kind, int(index or 0)


def gpu_index(device):
    return int(device.partition(":")[2])


def open_cuda(path, index, threads, expected, live=False):
    """(session on a GPU, "") or (None, why there is none).

    expected  try also on a machine that shows no NVIDIA device
    """
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        return None, "this onnxruntime has no CUDA (pip install 'onnxruntime-gpu[cuda,cudnn]')"
    if gpus_hidden():
        return None, "CUDA_VISIBLE_DEVICES hides every GPU"
    if not (expected or nvidia_device() or sys.platform == "win32"):
        return None, "no NVIDIA device"
    preload()
    options = cuda_options(index)
    if live:
        options |= cuda_graphs.OPTIONS
    try:
        session = start(path, [("CUDAExecutionProvider", options), "CPUExecutionProvider"], threads)
    except UserError as error:
        if live:  # a part of the model may run on the CPU, which no CUDA graph can hold
            return open_cuda(path, index, threads, expected)
        return None, str(error)
    # A session without its libraries silently falls back to the CPU.
    if session.get_providers()[0] != "CUDAExecutionProvider":
        return None, (
            "the CUDA provider did not load: a library is missing, or there is no GPU or driver "
            "(python classify.py --doctor names it)"
        )
    return session, ""


def cuda_options(index):
    return {
        "device_id": str(index),
        "use_tf32": "0",  # would cost float32 models their digits
        "cudnn_conv_algo_search": "HEURISTIC",  # the default searches for every batch size
    }


def preload():
    """CUDA's libraries, by path from the nvidia packages: the provider's own search finds them only
    by luck.
    """
    with muted():
        if hasattr(onnxruntime, "preload_dlls"):
            onnxruntime.preload_dlls()


def open_tensorrt(path, index, threads):
    """(session by TensorRT, "") or (None, why there is none). What TensorRT does not know runs by
    CUDA. Its engines are kept for the next start, in `engine_folder`.
    """
    if "TensorrtExecutionProvider" not in onnxruntime.get_available_providers():
        return None, "this onnxruntime has no TensorRT (onnxruntime-gpu for Linux or Windows has)"
    if gpus_hidden():
        return None, "CUDA_VISIBLE_DEVICES hides every GPU"
    preload()
    with contextlib.suppress(ImportError), muted():
        importlib.import_module("tensorrt_libs")  # of the tensorrt packages: loads its libraries
    looked_at = start(path, ["CPUExecutionProvider"], threads, optimise=False)
    half = looked_at.get_modelmeta().custom_metadata_map.get("precision") == '"fp16"'
    del looked_at
    folder = engine_folder(path)
    options = {
        "device_id": str(index),
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": str(folder),
        "trt_fp16_enable": str(int(half)),
        "trt_layer_norm_fp32_fallback": str(int(half)),
    }
    providers = [
        ("TensorrtExecutionProvider", options),
        ("CUDAExecutionProvider", cuda_options(index)),
        "CPUExecutionProvider",
    ]
    with contextlib.suppress(UserError):
        session = start(path, providers, threads)
        if session.get_providers()[0] == "TensorrtExecutionProvider":
            off = difference(session, start(path, providers[1:], threads))
            if off <= TENSORRT_OFF:
                return session, ""
            return None, (
                f"TensorRT's numbers differ from ONNX Runtime's by {off:.2g} for this model, which "
                "it computes in types of its own choice; --device cuda does without it"
            )
    with contextlib.suppress(OSError):  # nothing stays of what did not work; engines do
        folder.rmdir()
    return None, (
        "TensorRT is not installed (version 10, for example pip install 'tensorrt-cu13<11'), there "
        "is no GPU or driver, or it cannot take this model (python classify.py --doctor tells "
        "which); --device cuda does without it"
    )


def difference(session, reference):
    """Largest difference of the first output between two sessions of a model, as a share of its
    largest value, but of 1 at least; infinite if one is not finite. On patches of noise, one at a
    time, which is the first batch to be run anyway.
    """
    given, output = session.get_inputs()[0], session.get_outputs()[0].name
    generator, largest = np.random.default_rng(0), 0.0
    for _ in range(4):
        patch = generator.standard_normal((1, *given.shape[1:]), np.float32)
        if given.type == "tensor(uint8)":
            patch = generator.integers(0, 256, patch.shape, np.uint8)
        ours, theirs = (s.run([output], {given.name: patch})[0] for s in (session, reference))
        off = np.abs(ours - theirs).max() / max(1.0, np.abs(theirs).max())
        if not np.isfinite(off):
            return math.inf
        largest = max(largest, float(off))
    return largest


def engine_folder(path):
    """Where TensorRT keeps what it builds of a model; made if it does not exist. It is named after
    the model's content, so another model never gets these engines.
    """
    with open(path, "rb") as file:  # weights in a .data file: their hash is in the metadata
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:32]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / common.NAME / "tensorrt" / digest
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be made for TensorRT's engines ({error.strerror}); name another "
            "folder in XDG_CACHE_HOME"
        ) from None
    return folder


def gpus_hidden():
    return os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")


def nvidia_device(folder=Path("/dev")):
    """Whether the system shows an NVIDIA GPU; in a container the first may be nvidia3, in WSL all
    are behind dxg.
    """
    return (folder / "dxg").exists() or any(folder.glob("nvidia[0-9]*"))


def start(path, providers, threads, optimise=True):
    """InferenceSession of a file on these providers; UserError if ONNX Runtime cannot load it.

    optimise  False: only to look into the file
    """
    options = onnxruntime.SessionOptions()
    if not optimise:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # what matters is raised here as an error of one line
    if threads != 1:
        # Threads that spin while they wait for work slow down the threads that read slides.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        with muted():
            # Without the fallback, which prints to stdout: who asks for a provider looks whether it
            # is there.
            return onnxruntime.InferenceSession(
                str(path), options, providers=providers, enable_fallback=0
            )
    except Exception as error:  # onnxruntime's exceptions have no common class but this one
        text = str(error).strip().split("\n")[0]
    weights = Path(f"{path}.data")
    about_weights = "external" in text.lower() or "out of bounds" in text
    if about_weights or (weights.exists() and weights.name in text):
        raise UserError(
            f"{path}: its weights in {weights.name} are missing or cut off; copy both files again, "
            "or export again"
        )
    raise UserError(f"{path}: onnxruntime {onnxruntime.__version__} cannot load it ({text[:200]})")


_muting = threading.Lock()


@contextlib.contextmanager
def muted():
    """Stderr of C++ libraries sent away: a provider that does not load writes pages there."""
    with _muting:
        try:
            saved = os.dup(2)
        except OSError:  # a closed stderr is mute already
            yield
            return
        if sys.stderr is not None:
            sys.stderr.flush()
        empty = os.open(os.devnull, os.O_WRONLY)
        os.dup2(empty, 2)
        os.close(empty)
        try:
            yield
        finally:
            os.dup2(saved, 2)
            os.close(saved)
