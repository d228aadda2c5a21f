"""Sessions on a GPU, on a stand-in for ONNX Runtime that computes on the CPU: which providers and
options are asked for, what CUDA graphs are given to replay, and what is done where they fail.
"""

import concurrent.futures
import functools
import threading
import types

import numpy as np
import onnxruntime
import pytest
import torch
from onnx_models import classifier, patches, write_model

import common
from onnx_model import cuda_graphs, devices, session

Real = onnxruntime.InferenceSession


@functools.cache
def small():
    return classifier("gelu")


class Value:
    """An array with a place of its own, as on a device."""

    def __init__(self, array, device, index):
        self.array, self.place = np.array(array), (device, index)

    @classmethod
    def ortvalue_from_numpy(cls, array, device, index):
        return cls(array, device, index)

    @classmethod
    def ortvalue_from_shape_and_type(cls, shape, kind, device, index):
        return cls(np.full(shape, np.nan, kind), device, index)

    def update_inplace(self, array):
        assert array.shape == self.array.shape and array.dtype == self.array.dtype
        self.array[...] = array

    def numpy(self):
        return self.array.copy()

    def __dlpack__(self, **choices):
        return self.array.__dlpack__(**choices)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


class Binding:
    def __init__(self):
        self.inputs, self.outputs = {}, {}

    def bind_ortvalue_input(self, name, value):
        self.inputs[name] = value

    def bind_ortvalue_output(self, name, value):
        self.outputs[name] = value


class Session:
    """Of the providers asked for; a graph is captured per thread and number, with the buffers of
    that moment, and replayed on them whatever is bound later.
    """

    made = []
    capture_fails = wrong = on_cpu_in_part = False
    tensorrt_adds = 0.0
    most = 10**6  # patches that memory holds

    def __init__(self, path, options, providers, enable_fallback):
        assert enable_fallback == 0, "onnxruntime would print to stdout"
        self.providers = [p if isinstance(p, tuple) else (p, {}) for p in providers]
        if self.on_cpu_in_part and dict(self.providers).get("CUDAExecutionProvider", {}).get(
            "enable_cuda_graph"
        ):
            raise RuntimeError("This session cannot use the graph capture feature as requested")
        self.real = Real(path, options, providers=["CPUExecutionProvider"])
        self.options, self.captured, self.runs = options, {}, []
        Session.made.append(self)

    def __getattr__(self, name):  # get_inputs, get_outputs, get_modelmeta
        return getattr(self.real, name)

    def get_providers(self):
        return [name for name, _ in self.providers]

    def get_provider_options(self):
        return dict(self.providers)

    def run(self, outputs, inputs, options=None):
        (given,) = inputs.values()
        self.runs.append((len(given), number_of(options)))
        if len(given) > self.most:
            raise RuntimeError("Failed to allocate memory")
        results = self.real.run(outputs, inputs)
        if self.providers[0][0] == "TensorrtExecutionProvider":
            results = [result + np.float32(self.tensorrt_adds) for result in results]
        return results

    def io_binding(self):
        return Binding()

    def run_with_iobinding(self, binding, options=None):
        if self.capture_fails:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        key = threading.get_ident(), number_of(options)
        buffers = self.captured.setdefault(key, (binding.inputs, binding.outputs))
        ((name, given),), ((output, result),) = (b.items() for b in buffers)
        self.runs.append((len(given.array), number_of(options)))
        result.array[...] = self.real.run([output], {name: given.array})[0]
        if self.wrong:
            result.array += 0.01


def number_of(options):
    return None if options is None else options.get_run_config_entry("gpu_graph_id")


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """ONNX Runtime on a machine with a GPU and TensorRT → (path of a model, the class Session)."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")  # which hides GPUs from these tests
    names = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: names)
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    monkeypatch.setattr(onnxruntime, "OrtValue", Value)
    monkeypatch.setattr(devices, "preload", lambda: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(Session, "made", [])
    monkeypatch.setattr(session, "GPU_BATCHES", (16, 8))  # seconds faster
    write_model(tmp_path / "m.onnx", small())
    return tmp_path / "m.onnx", Session


def expected(path, images):
    return Real(str(path), providers=["CPUExecutionProvider"]).run(
        ["probability"], {"patches": images}
    )[0]


def test_small_batches_are_replayed_and_others_run_plainly(gpu):
    path, _ = gpu
    model = session.Classifier(path, "cuda:1", live=True)
    (opened,) = Session.made
    options = dict(opened.providers)["CUDAExecutionProvider"]
    assert options["device_id"] == options["enable_cuda_graph"] == "1"
    assert "CUDA graphs" not in model.note and model.device == "cuda:1"
    (given, result, *_), _ = model.captured.buffers.values()
    assert given.place == result.place == ("cuda", 1)
    opened.runs.clear()
    images = patches(21)
    want = expected(path, images)
    sizes = (1, 8, 3, 1, 16, 8)
    for n in sizes:
        start = n % 5
        some = images[start : start + n]
        assert np.allclose(model(some), want[start : start + n], atol=1e-6), n
    numbers = {batch: str(i) for i, batch in enumerate(cuda_graphs.BATCHES, start=1)}
    assert opened.runs == [(n, numbers.get(n, "-1")) for n in sizes]


def test_threads_share_the_captured_graphs(gpu):
    """One thread holds them, and results do not mix."""
    path, _ = gpu
    model, images = session.Classifier(path, "cuda", live=True), patches(24)
    want = expected(path, images)
    (opened,) = Session.made
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        jobs = [(i % 16, n) for i in range(12) for n in (1, 8, 2)]
        results = list(pool.map(lambda job: model(images[job[0] : job[0] + job[1]]), jobs))
    for (start, n), got in zip(jobs, results):
        assert np.allclose(got, want[start : start + n], atol=1e-6)
    assert len({thread for thread, _ in opened.captured}) == 1
    assert {number for _, number in opened.captured} == {"1", "2"}


def test_tensors_of_torch_are_replayed_after_their_copy(gpu, monkeypatch):
    path, _ = gpu
    waited = []
    stream = types.SimpleNamespace(synchronize=lambda: waited.append(len(Session.made[0].runs)))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    captured = session.Classifier(path, "cuda", live=True).captured
    Session.made[0].runs.clear()
    images = patches(9)
    want = expected(path, images)
    for n in (8, 1):
        got = captured.from_torch(torch.from_numpy(images[-n:]), "probability")
        assert np.allclose(got, want[-n:], atol=1e-6)
    assert waited == [0, 1] and [n for n, _ in Session.made[0].runs] == [8, 1]
    assert captured.from_torch(torch.from_numpy(images), "probability") is None
    assert captured.from_torch(torch.from_numpy(images[:8]), "embedding") is None

    def invalid(value):
        raise RuntimeError("from_dlpack received an invalid capsule")

    monkeypatch.setattr(torch, "from_dlpack", invalid)
    assert captured.from_torch(torch.from_numpy(images[:8]), "probability") is None


@pytest.mark.parametrize(
    "trouble, reason",
    [
        ("capture_fails", "operation not permitted when stream is capturing"),
        ("wrong", "gives other numbers"),
        ("on_cpu_in_part", "not all of the model runs on CUDA"),
    ],
)
def test_without_graphs_the_model_runs_plainly(trouble, reason, gpu, monkeypatch):
    path, _ = gpu
    monkeypatch.setattr(Session, trouble, True)
    model, images = session.Classifier(path, "cuda", live=True), patches(8)
    assert model.note.endswith(reason) or reason in model.note
    assert model.captured is None and "\n" not in model.note
    assert "enable_cuda_graph" not in dict(Session.made[-1].providers)["CUDAExecutionProvider"]
    assert np.allclose(model(images), expected(path, images), atol=1e-6)


def test_graphs_are_asked_for(gpu):
    path, _ = gpu
    model = session.Classifier(path, "cuda")
    assert model.captured is None and "CUDA graphs" not in model.note
    assert not cuda_graphs.enabled(model.session)


@pytest.mark.parametrize("precision, half", [("fp32", "0"), ("fp16", "1")])
def test_tensorrt_keeps_its_engines(precision, half, gpu, tmp_path):
    path, _ = gpu
    write_model(path, small(), precision)
    model = session.Classifier(path, "tensorrt:1")
    assert model.device == "cuda:1" and model.note.startswith("TensorRT, device 1")
    names = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    assert model.session.get_providers() == names
    options = dict(model.session.providers)
    engines = options["TensorrtExecutionProvider"]
    assert engines["trt_fp16_enable"] == half and engines["trt_engine_cache_enable"] == "1"
    assert engines["device_id"] == options["CUDAExecutionProvider"]["device_id"] == "1"
    folder = devices.engine_folder(path)
    assert engines["trt_engine_cache_path"] == str(folder) and folder.is_dir()
    assert (tmp_path / "cache") in folder.parents
    # The same model in another place has the same engines, another model others.
    copy = tmp_path / "copy.onnx"
    copy.write_bytes(path.read_bytes())
    assert devices.engine_folder(copy) == folder
    write_model(copy, classifier("gelu", seed=2), precision)
    assert devices.engine_folder(copy) != folder


def test_tensorrt_that_is_not_there_is_one_line(gpu, monkeypatch, tmp_path):
    path, _ = gpu
    monkeypatch.setattr(Session, "get_providers", lambda self: ["CUDAExecutionProvider"])
    with pytest.raises(common.UserError, match=r"^device tensorrt: TensorRT is not inst[^\n]*$"):
        session.Classifier(path, "tensorrt")
    assert not list((tmp_path / "cache" / common.NAME / "tensorrt").iterdir())
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(common.UserError, match="has no TensorRT"):
        session.Classifier(path, "tensorrt")


@pytest.mark.parametrize("off", [0.03, np.nan, np.inf])
def test_tensorrt_with_other_numbers_is_refused(off, gpu, monkeypatch):
    path, _ = gpu
    monkeypatch.setattr(Session, "tensorrt_adds", off)
    with pytest.raises(common.UserError, match="TensorRT's numbers differ"):
        session.Classifier(path, "tensorrt")
    monkeypatch.setattr(Session, "tensorrt_adds", 1e-3)
    session.Classifier(path, "tensorrt")


def test_engines_that_cannot_be_kept_are_one_line(gpu, monkeypatch, tmp_path):
    path, _ = gpu
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(common.UserError, match="XDG_CACHE_HOME"):
        session.Classifier(path, "tensorrt")


def test_batches_on_a_gpu_are_as_large_as_the_model_is_small(gpu, monkeypatch):
    path, _ = gpu
    large, small = max(session.GPU_BATCHES), min(session.GPU_BATCHES)
    assert session.Classifier(path, "cuda", warm_up=False).batch_size == large
    assert session.Classifier(path, "cuda", 16, warm_up=False).batch_size == 16
    monkeypatch.setattr(session, "SMALL", path.stat().st_size - 1)
    assert session.Classifier(path, "cuda", warm_up=False).batch_size == small


def test_a_default_batch_that_does_not_fit_becomes_smaller(gpu, monkeypatch):
    path, _ = gpu
    monkeypatch.setattr(session, "GPU_BATCHES", (12, 6))
    monkeypatch.setattr(Session, "most", 6)
    model = session.Classifier(path, "cuda")
    assert model.batch_size == 6 and [n for n, _ in Session.made[0].runs] == [1, 12, 1, 6]
    with pytest.raises(RuntimeError, match="allocate"):  # what was asked for is not changed
        session.Classifier(path, "cuda", batch_size=12)
    monkeypatch.setattr(Session, "most", 5)
    with pytest.raises(RuntimeError, match="allocate"):
        session.Classifier(path, "cuda")
