"""What every test runs under: an environment that does not depend on the user's."""

import ctypes
import os
import re
import signal
import sys
import tempfile

import pytest

# Removed: what steers the commands, the Hub, torchrun and the sweeps. The variables of the sweeps
# are those that sweeps/grid.sh and sweeps/*.sh list.
STEERING = (
    "HF_",
    "HUGGING",
    "TRANSFORMERS_",
    "MITOSIS_",
    "TORCHELASTIC_",
    "TORCHINDUCTOR_",
    "TORCH_HOME",
    "KMP_",
    "OPENBLAS_",
    "SLURM_",
)
NAMES = (
    ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"]
    + ["RUNS", "FRACS", "FOLDS", "DOMAINS", "METHODS", "PYTHON", "FLAGS", "MODEL_FLAGS", "MODEL"]
    + ["QUICK", "DATA", "DATA_FLAGS", "TESTS", "REPORT"]
    + ["EPOCHS", "EPOCH_SIZE", "VAL_PATCHES", "COLUMNS", "LINES", "XDG_CACHE_HOME"]
)
KEPT = ("MITOSIS_REALDATA",)


def clear_environment(environment):
    for name in list(environment):
        if (name.startswith(STEERING) or name in NAMES) and name not in KEPT:
            del environment[name]
    # One thread per process: as many tests run side by side as there are cores.
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        environment[name] = "1"
    # No weights, no token of the user: an empty cache. Set before anything imports huggingface_hub.
    cache = tempfile.TemporaryDirectory(prefix="mitfig-tests-")
    environment["HF_HOME"] = f"{cache.name}/huggingface"
    environment["TORCH_HOME"] = f"{cache.name}/torch"
    for name in ("NO_PROXY", "no_proxy"):  # the tests' servers are on this machine
        environment[name] = ",".join(filter(None, [environment.get(name), "localhost,127.0.0.1"]))
    return cache


def default_signals():
    """Undo what a background job or nohup leaves to its children: signals that are ignored.

    The commands keep an ignored signal ignored, as they should; the tests stop them by signals.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_DFL)


cache = clear_environment(os.environ)
default_signals()


def wants_gpu(marks):
    """Whether the expression of pytest's -m asks for the tests marked gpu."""
    words = re.findall(r"\w+", marks)
    return any(word == "gpu" and before != "not" for before, word in zip(["", *words], words))


def pytest_configure(config):
    """Hide the GPUs from this process and its children, unless it runs the tests marked gpu.

    So a test means the same everywhere: `auto` is the CPU and float32. CUDA reads the variable
    once, hence a run of its own for the others. Empty would do too, but not on Windows.
    """
    if not wants_gpu(config.option.markexpr):
        os.environ["CUDA_VISIBLE_DEVICES"] = "-1"


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("no GPU here, or hidden (pytest -m gpu shows them)")


class SignalStack(ctypes.Structure):
    """stack_t of sigaltstack(2)."""

    _fields_ = [("pointer", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]


@pytest.fixture(autouse=sys.platform == "linux")
def signal_stack():
    """Give the thread its signal stack back.

    Models that OpenVINO (seen in 2026.4) compiles put another in the place of the one that pytest's
    faulthandler installed, and leave it unmapped: the next signal with a handler in Python (a
    worker of a DataLoader that ends) would then end the process.
    """
    libc, stack = ctypes.CDLL(None), SignalStack()
    libc.sigaltstack(None, ctypes.byref(stack))
    yield
    libc.sigaltstack(ctypes.byref(stack), None)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """An exported model, a small classifier of random weights."""
    from onnx_models import classifier, register, write_model

    path = tmp_path_factory.mktemp("model") / "model.onnx"
    with pytest.MonkeyPatch.context() as monkeypatch:
        register(monkeypatch)
        write_model(path, classifier("gelu"))
    return path


@pytest.fixture(scope="session")
def study(tmp_path_factory):
    """(folder of runs, folder of their report): run_folders.report_study()."""
    from run_folders import report_study
    from small import call

    import evaluate

    folder = tmp_path_factory.mktemp("study")
    report_study(folder / "runs")
    flags = ("--out", folder / "report", "--paper", "--replicates", 200)
    assert call(evaluate, folder / "runs", *flags) == 0
    return folder / "runs", folder / "report"


@pytest.fixture(scope="session")
def tissue():
    """A small dataset of three domains, without images."""
    from run_folders import annotations

    return annotations()


@pytest.fixture(scope="session")
def three_folds(tissue, tmp_path_factory):
    """Runs of one model with three repeats."""
    from run_folders import make

    root = tmp_path_factory.mktemp("three") / "runs"
    for fold in range(3):
        make(root, tissue, "uni", "lora", 1.0, fold)
    return root


@pytest.fixture
def copied(three_folds, tmp_path):
    """The same runs, to be damaged."""
    import shutil

    return shutil.copytree(three_folds, tmp_path / "runs")
