"""What only a GPU can show (`pytest -m gpu`). Each check is a function of the device, and runs on
the CPU in every other run of the tests, so that nothing in it is tried for the first time on a GPU.
"""

import os

# Read once by CUDA, before the first product: --deterministic needs it.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import contextlib
import gc
import sys

import dropout_checks
import numpy as np
import onnx_models
import pytest
import small
import tape
import test_step as steps
import test_train as runs
import torch

import engine
import export
import models
import train
from encoders import dropout
from onnx_model import session

STEPS = {"cpu": 8, "cuda": 50}


def devices(*marks):
    """Parametrise by device: the CPU, with these marks, and a GPU."""
    gpu = pytest.param("cuda", marks=pytest.mark.gpu)
    return pytest.mark.parametrize("device", [pytest.param("cpu", marks=marks), gpu])


@pytest.fixture
def deterministic():
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def recorded(monkeypatch):
    """Let the CPU replay a step too, from the tape of its operators. → function of a trainer."""

    def allow(trainer):
        if trainer.device.type == "cpu":
            monkeypatch.setattr(engine, "record", tape.record)
            trainer.may_capture = True
        return trainer

    return allow


@pytest.fixture(autouse=True)
def families(monkeypatch):
    onnx_models.register(monkeypatch)


# ---------------------------------------------------------------- the training step


@devices()
@pytest.mark.parametrize("kind", steps.KINDS)
def test_a_captured_step_is_the_eager_one(device, kind, recorded, deterministic):
    """The last step on a smaller batch: the same losses and weights, bit by bit."""
    settings = steps.settings_for(**steps.KINDS[kind])
    trainer = recorded(steps.make_engine(settings, device=device))
    got = steps.run(trainer, STEPS[device])
    assert trainer.replays is not None
    eager = steps.make_engine(settings, device=device)
    eager.may_capture = False
    steps.assert_same(got, steps.run(eager, STEPS[device]))


@devices()
@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
def test_a_step_in_parts_is_the_captured_one(device, kind, recorded, deterministic):
    """Parts have other roundings, no other samples, masks or gradients."""
    settings = steps.settings_for(**steps.KINDS[kind] | {"lr": 1e-3})
    whole = recorded(steps.make_engine(settings, device=device))
    parts = steps.make_engine(settings, parts=2, device=device)
    (_, expected), (_, losses) = (steps.run(trainer, STEPS[device]) for trainer in (whole, parts))
    assert whole.replays is not None and parts.replays is None and parts.parts == 2
    torch.testing.assert_close(losses, expected, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(losses[:2], expected[:2], rtol=1e-4, atol=1e-5)
    # The check of the check: the masks of another step are seen.
    other = steps.make_engine(settings, parts=2, device=device)
    other.settings = steps.settings_for(**steps.KINDS[kind] | {"lr": 1e-3, "seed": 4})
    _, different = steps.run(other, 2)
    assert ((different - expected[:2]).abs() > 1e-3).any()


@devices(pytest.mark.slow)
def test_a_step_of_compiled_blocks_is_the_eager_one(device):
    """On a GPU it is captured too: the step of train.py by default."""
    settings = steps.settings_for(**steps.KINDS["lora"] | {"lr": 1e-3})
    eager, compiled = (steps.make_engine(settings, device=device) for _ in range(2))
    eager.may_capture = False
    models.compile_blocks(compiled.model.encoder)
    (_, expected), (_, losses) = (
        steps.run(trainer, STEPS[device]) for trainer in (eager, compiled)
    )
    assert (compiled.replays is not None) == (device == "cuda")
    torch.testing.assert_close(losses, expected, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(losses[:2], expected[:2], rtol=1e-4, atol=1e-5)


@contextlib.contextmanager
def scarce_memory(device, trainer, most, limit):
    """Let whole batches run out of memory: on a GPU by a limit in bytes, on the CPU by a pretence
    that more than `most` patches at once do not fit.
    """
    if device == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total))
    real = trainer.backward

    def backward(n, whole):
        if n > most:
            raise torch.OutOfMemoryError("out of memory")
        return real(n, whole)

    if device == "cpu":
        trainer.backward = backward
    try:
        yield
    finally:
        trainer.backward = real
        if device == "cuda":
            torch.cuda.set_per_process_memory_fraction(1.0)


@devices()
def test_out_of_memory_turns_into_parts(device, capsys, deterministic):
    count = 2 if device == "cpu" else 64  # of patches: enough to be missed
    settings = steps.settings_for(dtype="fp32", batch_size=count)
    (step, images, samples, labels, whole), *_ = steps.batches(2, count)
    batch = (step, images, samples, labels, whole)
    gc.collect()  # of other tests: what they leave must not count as room
    in_parts = steps.make_engine(settings, parts=2, device=device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    expected = in_parts.step(*batch)
    limit = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    del in_parts
    trainer = steps.make_engine(settings, device=device)
    with scarce_memory(device, trainer, count // 2, 1.1 * limit):
        loss = trainer.step(*batch)
    assert trainer.parts >= 2
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)
    err = capsys.readouterr().err
    assert "does not fit into memory" in err and f"--accumulate {trainer.parts}" in err


@devices()
def test_masks_are_those_of_the_cpu(device):
    """Bit by bit: the hash itself, and what is dropped by it."""
    keys = torch.tensor(dropout_checks.KEYS)
    for elements, p in ((1, 0.5), (7, 0.1), (1027, 0.1), (4096, 0.9)):
        mask = dropout.keep_mask(keys, elements, p)
        assert torch.equal(dropout.keep_mask(keys.to(device), elements, p).cpu(), mask)
        ones = torch.ones(len(keys), elements, device=device)
        dropped, _ = dropout.drop(ones, keys.to(device), elements, p)
        assert torch.equal(dropped.cpu().bool(), mask)


@pytest.mark.gpu
def test_dropout_kernels_on_a_gpu():
    """The checks that test_dropout.py runs under Triton's interpreter, and in a CUDA graph."""
    dropout_checks.run_on_gpu("cuda")


# ---------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return small.dataset(tmp_path_factory.mktemp("data"))


def on(device, args):
    """The arguments of a run of test_train.py, on this device."""
    args = [str(word) for word in args]
    args[args.index("--device") + 1] = device
    return args


@devices()
@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_resumed_deterministic_run_ends_bit_for_bit_the_same(
    device, method, tmp_path, table, monkeypatch, deterministic
):
    """Interrupted where the uninterrupted run replays its graph: the resumed one starts eagerly."""

    def flags(out):
        return [*on(device, runs.flags(table, out, lora=method == "lora")), "--deterministic"]

    assert small.call(train, *flags(tmp_path / "whole")) == 0
    real, done = engine.Engine.step, []

    def step(self, number, *rest):
        if len(done) == 9:
            raise KeyboardInterrupt
        done.append(number)
        return real(self, number, *rest)

    monkeypatch.setattr(engine.Engine, "step", step)
    assert small.call(train, *flags(tmp_path / "cut")) == 130
    monkeypatch.setattr(engine.Engine, "step", real)
    assert small.call(train, *flags(tmp_path / "cut"), "--resume") == 0
    runs.assert_equal_runs(*(runs.folder(tmp_path / name, method) for name in ("whole", "cut")))


@devices(pytest.mark.slow)
def test_two_processes_on_one_device_are_one(device, tmp_path, table):
    """gloo: the same samples, masks and losses."""
    one, two = tmp_path / "one", tmp_path / "two"
    place = "cuda:0" if device == "cuda" else "cpu"  # a GPU that is named is all processes'
    assert small.call(train, *on(place, runs.flags(table, one)), "--dtype", "fp32") == 0
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys; sys.path[:0] = [{str(small.HERE.parent)!r}, {str(small.HERE)!r}]\n"
        "import small, train, common\n"
        "common.command(train.main)\n"
    )
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone")
    launcher += ("--nproc-per-node", "2", str(script))
    args = [*on(place, runs.flags(table, two)), "--dtype", "fp32"]
    code, _, err = small.command("train", *args, launcher=launcher)
    assert code == 0, err
    logs = []
    for out in (one, two):
        log = runs.folder(out) / "log.csv"
        logs.append(np.genfromtxt(log, delimiter=",", names=True))
    assert [len(log) for log in logs] == [3, 3]
    for column in ("train_loss", "val_loss"):
        difference = np.abs(logs[0][column] - logs[1][column]).max()
        # Other shapes may have other kernels on a GPU, whose convolutions round to TF32.
        assert difference < (1e-6 if device == "cpu" else 1e-3), column


# ---------------------------------------------------------------- the exported model


@pytest.fixture
def runtime(device):
    """Skip where ONNX Runtime cannot use the device."""
    if missing := onnx_models.lacks_cuda(device):
        pytest.skip(missing)


def family_devices(*left_out):
    rows = []
    for family in [name for name in onnx_models.FAMILIES if name not in left_out]:
        # On the CPU test_export.py shows all of them, too.
        marks = [] if family == "gelu" else [pytest.mark.slow]
        rows.append(pytest.param("cpu", family, marks=marks, id=f"cpu-{family}"))
        rows.append(pytest.param("cuda", family, marks=pytest.mark.gpu, id=f"cuda-{family}"))
    return pytest.mark.parametrize("device, family", rows)


def exported_and_torch(device, family, tmp_path, precision):
    """Run export.py on a run of this family → (path of the model, the unmerged PatchClassifier)."""
    data, run = tmp_path / "data", tmp_path / f"run-{precision}"
    if not data.exists():
        onnx_models.dataset(data)
    method = "probe" if family == "resnet50" else "lora"
    _, model = onnx_models.make_run(run, family, method, data)
    out = tmp_path / f"{precision}.onnx"
    count = 8 if family == "resnet50" else 32
    flags = ("--precision", precision, "--patches", count, "--device", device)
    assert small.call(export, run, "--out", out, *flags) == 0
    return out, model


@family_devices()
@pytest.mark.usefixtures("runtime")
def test_each_family_passes_the_gate_of_the_export(device, family, tmp_path):
    out, model = exported_and_torch(device, family, tmp_path, "fp32")
    classifier = session.Classifier(out, device)
    assert classifier.device.startswith(device)
    images = onnx_models.patches(8, seed=9)
    with torch.inference_mode():
        expected = torch.sigmoid(model(torch.from_numpy(images))).numpy()
    assert np.abs(classifier(images) - expected).max() < 1e-4


# The families that test_export.py exports in float16 without having taught them anything.
@family_devices("resnet50", "swin")
@pytest.mark.usefixtures("runtime")
def test_half_precision_passes_the_gate_of_the_export(device, family, tmp_path):
    out, model = exported_and_torch(device, family, tmp_path, "fp16")
    images = onnx_models.patches(8, seed=9)
    with torch.inference_mode():
        expected = torch.sigmoid(model(torch.from_numpy(images))).numpy()
    assert np.abs(session.Classifier(out, device)(images) - expected).max() < 5e-2


class Borrowed:
    """An array of another library: DLPack, shape and dtype, nothing of torch."""

    def __init__(self, tensor):
        self.tensor = tensor
        self.shape, self.dtype = tuple(tensor.shape), "uint8"

    def __len__(self):
        return len(self.tensor)

    def __getitem__(self, part):
        return Borrowed(self.tensor[part])

    def __dlpack__(self, **choices):
        return self.tensor.__dlpack__(**choices)

    def __dlpack_device__(self):
        return self.tensor.__dlpack_device__()


@devices()
@pytest.mark.usefixtures("runtime")
def test_numpy_dlpack_and_torch_give_the_same(device, tmp_path):
    model = onnx_models.classifier("gelu")
    onnx_models.write_model(tmp_path / "model.onnx", model)
    classifier = session.Classifier(tmp_path / "model.onnx", device, batch_size=8)
    images = onnx_models.patches(20)
    with torch.inference_mode():
        expected = torch.sigmoid(model(torch.from_numpy(images))).numpy()
    assert np.abs(classifier(images) - expected).max() < 1e-4
    there = torch.from_numpy(images).to(device)
    for given in (there, Borrowed(there)):
        assert np.abs(classifier(given) - classifier(images)).max() < 1e-6
    strided = torch.from_numpy(np.repeat(images, 2, axis=0)).to(device)[::2]
    assert np.abs(classifier(strided) - classifier(images)).max() < 1e-6
    live = session.Classifier(tmp_path / "model.onnx", device, live=True)
    assert (live.captured is not None) == (device == "cuda"), live.note
    for count in (1, 8, 3):  # two captured sizes, and another one
        for given in (images, there):
            assert np.abs(live(given[:count]) - classifier(images[:count])).max() < 1e-4


# ---------------------------------------------------------------- inference


@devices(pytest.mark.slow)
@pytest.mark.parametrize("family", ["gelu", "swiglu", "dinov3"])
def test_compiled_blocks_give_the_same_embeddings(device, family):
    images = onnx_models.patches(11)
    model = onnx_models.classifier(family).to(device)
    expected = models.predict(model, images, batch_size=4, output="embedding", progress=None)
    models.compile_blocks(model.encoder)
    got = models.predict(model, images, batch_size=4, output="embedding", progress=None)
    assert np.abs(got - expected).max() < 1e-4 * np.abs(expected).max()
