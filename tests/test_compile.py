"""Compiled blocks: the same numbers, one compilation for all blocks, life without a compiler."""

import copy
import functools
import os
import types

import numpy as np
import pytest
import small
import torch
from safetensors.torch import load_file
from torch._dynamo.backends.common import aot_autograd

import common
import engine
import lora
import models
import probe
import train
from common import UserError
from encoders.dropout import keep_mask
from encoders.table import Encoder

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
VIT = {"dim": 32, "depth": 4, "heads": 2, "patch": 56, "hidden": 64}
ROWS = [
    Encoder("gelu-c", "", "MIT", 0, **VIT, layerscale=True),
    Encoder("swiglu-c", "", "MIT", 0, **VIT, registers=2, mlp="swiglu", layerscale=True),
    Encoder("mean-c", "", "MIT", 0, **VIT, pool="cls+mean"),
    Encoder("rotary-c", "", "MIT", 0, **VIT, registers=2, pos="rotary", layerscale=True),
]
for row in ROWS:
    models.ENCODERS.setdefault(row.name, row)
NAMES = [row.name for row in ROWS]


@pytest.fixture(autouse=True)
def fresh():
    models.block_compiler.cache_clear()
    yield
    models.block_compiler.cache_clear()


@pytest.fixture
def compiler(monkeypatch):
    """compiler(backend) → list of what it has compiled since; blocks are compiled by it."""
    real = torch.compile
    torch._dynamo.reset()

    def use(backend):
        graphs = []

        def counting(graph, inputs):
            graphs.append(graph)
            return backend(graph, inputs)

        monkeypatch.setattr(torch, "compile", functools.partial(real, backend=counting))
        return graphs

    yield use
    torch._dynamo.reset()


def eager(graph, inputs):
    return graph


def no_compiler(graph, inputs):
    raise RuntimeError("no working compiler\nin this test")


def encoder(name, dtype="fp32"):
    torch.manual_seed(0)
    return models.load_encoder(name, "random", dtype=dtype)


def adapted(name, dtype="fp32", dora=False):
    network = encoder(name, dtype)
    lora.add_lora(network, 4, 4, 0.1, dora=dora)
    with torch.no_grad():
        for _, layer in lora.adapted(network):
            layer.lora_B.normal_(std=0.1)
    return network


def images(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, 224, 224, 3), np.uint8)


def gradients(network, step=0, count=3):
    """Output and gradients of a training step."""
    network.train().zero_grad()
    if lora.adapted(network):
        lora.set_step(network, 0, step, range(count))
    x = torch.randn(count, 3, 224, 224, generator=torch.Generator().manual_seed(step))
    out = network(x.to(next(network.parameters()).dtype))
    (out.float() * torch.linspace(-1, 1, out.shape[1])).sum().backward()  # well conditioned
    return [out, *(p.grad for p in network.parameters() if p.grad is not None)]


def distance(a, b):
    """Largest relative distance of two lists of tensors."""
    assert len(a) == len(b)
    return max(((x - y).norm() / y.norm().clamp_min(1e-12)).item() for x, y in zip(a, b))


# ---------------------------------------------------------------- how often


def test_one_compilation_serves_all_blocks(compiler):
    graphs = compiler(eager)
    for run in range(2):  # the second one of the command finds everything compiled
        network = adapted("swiglu-c")
        models.compile_blocks(network)
        for step in range(2):
            gradients(network, step)
            # The first block's input needs no gradient; the last one computes a single token.
            assert len(graphs) == (3 if run == 0 else 5)
        classifier = models.PatchClassifier(network)
        for _ in range(2):
            with lora.folded(classifier):
                models.predict(classifier, images(5), batch_size=2, progress=None)
            assert len(graphs) == 5


def test_more_forms_than_the_limit_are_said_and_right(compiler, capsys):
    graphs = compiler(eager)
    network = encoder("mean-c").eval()
    wanted = [network(torch.ones(n, 3, 224, 224)) for n in (1, 2, 3)]
    models.compile_blocks(network)
    with torch._dynamo.config.patch(recompile_limit=2):
        for n, expected in zip((1, 2, 3), wanted):
            torch.testing.assert_close(network(torch.ones(n, 3, 224, 224)), expected)
    assert len(graphs) == 2
    assert capsys.readouterr().err.count("the compiler fails here") == 1


# ---------------------------------------------------------------- when


@pytest.mark.parametrize(
    "choice, device, patches, expected",
    [
        ("auto", CPU, 10**9, False),
        ("auto", CUDA, models.COMPILE_FROM - 1, False),
        ("auto", CUDA, models.COMPILE_FROM, True),
        ("on", CPU, 1, True),
        ("off", CUDA, 10**9, False),
    ],
)
def test_auto_is_for_long_runs_on_gpus(choice, device, patches, expected):
    assert models.should_compile(choice, device, patches, models.ENCODERS["uni"]) == expected
    if choice == "auto":
        assert not models.should_compile(choice, device, patches, models.ENCODERS["resnet50"])


def test_the_protocols_run_earns_it():
    assert 100 * 1280 >= models.COMPILE_FROM > 160 * 16  # the paper's, sweeps/quick.sh's


# ---------------------------------------------------------------- without a compiler


def test_a_compiler_that_fails_is_one_note_and_changes_nothing(compiler, capsys):
    network = adapted("gelu-c")
    wanted = gradients(copy.deepcopy(network))
    compiler(no_compiler)
    for _ in range(2):  # two runs of a command
        other = copy.deepcopy(network)
        models.compile_blocks(other)
        assert distance(gradients(other), wanted) == 0
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" (")[0] for line in lines] == [
        "compiling the network's blocks",
        "the compiler fails here",
    ]
    assert "no working compiler)" in lines[1]


def test_a_compiler_that_fails_at_the_backward_pass_loses_no_step(compiler, capsys):
    network = adapted("gelu-c")
    wanted = gradients(copy.deepcopy(network))
    compiler(aot_autograd(fw_compiler=lambda graph, _: graph, bw_compiler=no_compiler))
    models.compile_blocks(network)
    assert distance(gradients(network), wanted) == 0
    assert "the compiler fails here" in capsys.readouterr().err


def test_a_python_without_torch_compile(monkeypatch, capsys):
    def unsupported(*_, **__):
        raise RuntimeError("torch.compile is not supported on Python 4")

    monkeypatch.setattr(torch, "compile", unsupported)
    network = encoder("gelu-c").eval()
    wanted = network(torch.ones(1, 3, 224, 224))
    models.compile_blocks(network)
    assert torch.equal(network(torch.ones(1, 3, 224, 224)), wanted)
    assert "not supported on Python 4" in capsys.readouterr().err


def test_a_compiler_that_the_user_has_turned_off(capsys):
    models.block_compiler.cache_clear()
    network = encoder("gelu-c").eval()
    wanted = network(torch.ones(1, 3, 224, 224))
    with torch._dynamo.config.patch(disable=True):  # as TORCH_COMPILE_DISABLE=1 does
        models.compile_blocks(network)
        assert torch.equal(network(torch.ones(1, 3, 224, 224)), wanted)
    assert "TORCH_COMPILE_DISABLE is set" in capsys.readouterr().err
    models.block_compiler.cache_clear()


def test_compiled_code_is_kept_beside_torchs_downloads(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "torch's own")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    folder = models.compiler_cache()
    assert folder == os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "torch" / "inductor")
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "torch's own")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "file"))  # not a folder
    assert models.compiler_cache() == "a temporary folder"
    monkeypatch.setattr(models, "COMPILER_CACHE", "the user's")
    assert models.compiler_cache() == "the user's"
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "torch's own"


def test_deterministic_runs_do_not_choose_kernels_by_time(monkeypatch):
    from torch._inductor import config

    monkeypatch.setattr(config, "deterministic", False)
    models.block_compiler()
    assert not config.deterministic
    models.block_compiler.cache_clear()
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    models.block_compiler()
    assert config.deterministic


@pytest.mark.parametrize("when", ["compiling", "running"])
def test_out_of_memory_stays_out_of_memory(compiler, capsys, when):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    compiler(full if when == "compiling" else lambda graph, inputs: full)
    network = encoder("gelu-c").eval()
    models.compile_blocks(network)
    with torch.no_grad(), pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        network(torch.ones(1, 3, 224, 224))
    assert "fails" not in capsys.readouterr().err


# ---------------------------------------------------------------- batches of one shape


class Reader:
    def __init__(self, count):
        self.array, self.asked = images(count), []

    def __len__(self):
        return len(self.array)

    def read(self, rows):
        self.asked += list(rows)
        return self.array[rows]


@pytest.mark.parametrize("output", ["logits", "embedding"])
@pytest.mark.parametrize("tta", [False, True])
def test_padded_batches_give_the_same(output, tta):
    model = models.PatchClassifier(encoder("gelu-c"), tta).eval()
    shapes, call = set(), functools.partial(models.predict, model, output=output, progress=None)
    model.encoder.register_forward_pre_hook(lambda _, inputs: shapes.add(len(inputs[0])))
    whole = call(images(8), batch_size=4)
    assert shapes == {4}
    model.encoder.compiled = True  # pads, though nothing is compiled
    for count in (0, 1, 3, 5, 8):
        reader = Reader(count)
        found = call(reader, batch_size=4)
        assert np.array_equal(found, whole[:count]) and reader.asked == list(range(count))
    kept = []
    rows = [5, 0, 5, 1, 2]
    assert call(images(8), rows, batch_size=4, keep=lambda *batch: kept.append(batch)) is None
    assert [own.tolist() for own, _ in kept] == [rows[:4], rows[4:]]
    assert np.array_equal(np.concatenate([values for _, values in kept]), whole[rows])
    assert shapes == {4}


def test_a_batch_that_does_not_fit_is_computed_in_parts(monkeypatch, capsys):
    model = models.PatchClassifier(encoder("gelu-c")).eval()
    wanted = models.predict(model, images(7), batch_size=2, progress=None)
    most, real = 2, model.encoder.forward

    def forward(x):
        if len(x) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(x)

    monkeypatch.setattr(model.encoder, "forward", forward)
    for _ in range(2):  # it is remembered
        reader = Reader(7)
        found = models.predict(model, reader, batch_size=6, progress=None)
        assert np.abs(found - wanted).max() < 1e-5 and reader.asked == list(range(7))
    assert capsys.readouterr().err.splitlines() == [
        "6 patches do not fit into memory: from now on 3 at once",
        "3 patches do not fit into memory: from now on 2 at once",
    ]
    most = 0
    with pytest.raises(UserError, match="out of memory on cpu with a single patch"):
        models.predict(model, Reader(7), batch_size=6, progress=None)


# ---------------------------------------------------------------- the same numbers


@pytest.mark.slow
@pytest.mark.parametrize("name, dtype", [*((name, "fp32") for name in NAMES), ("swiglu-c", "bf16")])
def test_compiled_inference_is_eager(name, dtype):
    model = models.PatchClassifier(encoder(name, dtype)).eval()
    call = functools.partial(models.predict, model, images(5), batch_size=2, progress=None)
    wanted = [call(), call(output="embedding")]
    models.compile_blocks(model.encoder)
    tolerance = {"fp32": 1e-5, "bf16": 2e-2}[dtype]
    for found, expected in zip((call(), call(output="embedding")), wanted):
        assert np.abs(found - expected).max() < tolerance * np.abs(expected).max()


def made(name, dtype="fp32", dora=False, **how):
    """The encoder of engine.make_model, with adapters that change something."""
    settings = types.SimpleNamespace(model=name, method="lora", run_seed=0, adapter=None)
    vars(settings).update(rank=4, alpha=4, dropout=0.1, targets=lora.TARGETS, dora=dora)
    settings.rslora = False
    model, _ = engine.make_model(settings, encoder(name, dtype), CPU, **how)
    with torch.no_grad():
        for _, layer in lora.adapted(model.encoder):
            layer.lora_B.normal_(std=0.1)
    return model.encoder


@pytest.mark.slow
@pytest.mark.parametrize("name, dora", [("swiglu-c", False), ("rotary-c", True)])
def test_a_compiled_lora_step_is_eager(name, dora):
    network = made(name, dora=dora)
    wanted = [gradients(network, step) for step in range(2)]
    wanted = [[value.detach().clone() for value in values] for values in wanted]
    models.compile_blocks(network)
    for step in range(2):
        assert distance(gradients(network, step), wanted[step]) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("elements", [7, 4096])
def test_compiled_masks_are_the_eager_ones(elements):
    compiled = torch.compile(keep_mask, dynamic=False, fullgraph=True)
    keys = torch.tensor([0, 1, -1, 2**63 - 1, -(2**63), 0x123456789ABCDEF])
    for p in (0.1, 0.5):
        assert torch.equal(compiled(keys, elements, p), keep_mask(keys, elements, p))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_folded_adapters_compiled_are_eager(dtype):
    model = models.PatchClassifier(adapted("swiglu-c", dtype)).eval()
    model.head.to(torch.float32)

    def logits():
        with lora.folded(model):
            return models.predict(model, images(5), batch_size=4, progress=None)

    wanted = logits()
    models.compile_blocks(model.encoder)
    found = logits()
    assert np.abs(found - wanted).max() < {"fp32": 1e-5, "bf16": 2e-2}[dtype]
    with torch.no_grad():
        for _, layer in lora.adapted(model.encoder):
            layer.lora_B.zero_()
    assert np.abs(logits() - found).max() > 0.05  # the next pass sees the adapters as they are then


@pytest.mark.slow
def test_checkpointing_around_compiled_blocks():
    network = made("swiglu-c", checkpointing=True)
    wanted = [value.detach().clone() for value in gradients(network)]
    compiled = made("swiglu-c", checkpointing=True, compiled=True)
    compiled.load_state_dict(network.state_dict())
    assert distance(gradients(compiled), wanted) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_compiled_run_is_the_eager_one_and_resumes(tmp_path, monkeypatch, capsys, method):
    table = small.dataset(tmp_path)
    args = ["--data", table, "--model", "tiny", "--weights", "random", "--device", "cpu"]
    args += ["--epochs", 3, "--epoch-size", 24, "--batch-size", 8, "--lr", 1e-3]
    args += ["--lora"] if method == "lora" else []
    assert small.call(train, *args, "--runs", tmp_path / "eager") == 0
    assert "compil" not in capsys.readouterr().err  # auto, on a CPU
    for name in ("whole", "cut"):
        real = engine.Engine.epoch
        with monkeypatch.context() as patch:
            if name == "cut":

                def epoch(self, number, *rest):
                    if number == 2:
                        raise KeyboardInterrupt
                    return real(self, number, *rest)

                patch.setattr(engine.Engine, "epoch", epoch)
            status = small.call(train, *args, "--runs", tmp_path / name, "--compile")
            assert status == (130 if name == "cut" else 0)
    assert small.call(train, *args, "--runs", tmp_path / "cut", "--compile", "--resume") == 0
    assert "fails" not in capsys.readouterr().err
    found = {}
    for name in ("eager", "whole", "cut"):
        run = tmp_path / name / "small" / f"tiny-{method}" / "frac1-fold0"
        assert "compile" not in common.read_json(run / "config.json")["flags"]
        found[name] = load_file(run / "model.safetensors")
    for key, value in found["whole"].items():
        assert torch.equal(value, found["cut"][key])
        assert (value - found["eager"][key]).abs().max() < 1e-3


@pytest.mark.slow
def test_a_probe_on_compiled_embeddings(tmp_path, capsys):
    table = small.dataset(tmp_path)
    args = ["--data", table, "--model", "tiny", "--weights", "random", "--device", "cpu"]
    for name in ("off", "on"):
        assert small.call(probe, *args, "--runs", tmp_path / name, "--compile", name) == 0
        assert ("compiling" in capsys.readouterr().err) == (name == "on")
    off, on = (
        np.load(tmp_path / name / "embeddings" / "small" / "tiny-cls.npy") for name in ("off", "on")
    )
    assert on.shape == (60, 32) and np.abs(on - off).max() < 1e-4 and not np.array_equal(on, off)


def test_only_transformers_are_compiled(tmp_path, capsys):
    table = small.dataset(tmp_path, cases=2)
    for script in (train, probe):
        args = ("--data", table, "--model", "resnet50", "--runs", tmp_path / "runs")
        assert small.call(script, *args, "--compile", "on") == 2
        assert "--compile works on transformer blocks, resnet50 has none" in capsys.readouterr().err
