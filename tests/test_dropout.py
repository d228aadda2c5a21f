"""The dropout masks: their numbers, their gradients, and the kernels that replace them on GPUs."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from encoders import dropout

ROOT = Path(__file__).resolve().parent.parent
CUDA = SimpleNamespace(device=torch.device("cuda", 0))  # what of a tensor decides


def splitmix64(state):
    """In Python's whole numbers, as published: the hash of a state."""
    word = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB % 2**64
    return word ^ (word >> 31)


def test_masks_are_those_of_splitmix64():
    for key in (0, -1, 2**63 - 1, -(2**63)):
        for p in (0.1, 0.5, 0.9999):
            numbers = []
            for counter in range(1, 4):
                word = splitmix64((key + counter * 0x9E3779B97F4A7C15) % 2**64)
                for lane in range(4):
                    number = word >> (16 * lane) & 0xFFFF
                    numbers.append(number - 2**16 * (number >= 2**15))  # as a signed number
            wanted = [number >= round(p * 2**16) - 2**15 for number in numbers]
            for elements in (1, 9, 12):
                mask = dropout.keep_mask(torch.tensor([key]), elements, p)
                assert mask.tolist() == [wanted[:elements]]


@pytest.mark.parametrize("kept_on", [("cpu",), ()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_is_that_of_the_product(dtype, kept_on, monkeypatch):
    monkeypatch.setattr(dropout, "MASK_KEPT_ON", kept_on)
    key, results = torch.tensor([5, -6]), []
    torch.manual_seed(0)
    x, weight = torch.randn(2, 3, 7, dtype=dtype), torch.randn(2, 3, 7, dtype=dtype)
    for own in (False, True):
        given = x.clone().requires_grad_()
        if own:
            y = dropout.Dropout.apply(given, key, 0.3)
        else:
            y = given * dropout.keep_mask(key, 21, 0.3).view(x.shape)
        (weight * (y / dropout.kept_share(0.3))).sum().backward()
        results.append((y, given.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results)) and (results[0][1] == 0).any()


def test_kernels_under_the_interpreter_equal_torch():
    pytest.importorskip("triton")
    code = (
        "import sys; sys.path.append('tests'); import augment, lora; import dropout_checks\n"
        "assert 'triton' not in sys.modules, 'imported where no GPU needs it'\n"
        "dropout_checks.run('cpu')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_kernels_compile_for_gpus(dtype, capability, tmp_path, monkeypatch):
    """To the machine code of cards that are not here, with one hash per four elements."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from encoders import dropout_kernels as kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    constants = {"MIX1": dropout.MIX1, "MIX2": dropout.MIX2, "WEYL": dropout.WEYL}
    constants["WORDS"] = kernels.WORDS
    numbers = {"key": "*i64", "elements": "i32", "programs": "i32", "first_kept": "i32"}
    exact = {"EXACT": triton.language.float32}
    for kernel, more in ((kernels._drop, {}), (kernels._add_kept, exact)):
        fixed = {**constants, **more}
        types, attributes = {}, {}
        for place, name in enumerate(kernel.arg_names):
            types[name] = "constexpr" if name in fixed else numbers.get(name, f"*{dtype}")
            if types[name] == f"*{dtype}" or name == "elements":  # as torch's memory and ViTs have
                attributes[(place,)] = [["tt.divisibility", 16]]
        source = ASTSource(kernel, types, fixed, attributes)
        code = triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm
        assert code["cubin"]
        products = code["ptx"].count("mul.lo.s64") + code["ptx"].count("mad.lo.s64")
        hashes = kernels.WORDS // 128  # per thread
        assert products <= 3 * hashes + 2  # three per hash, and offsets


# ---------------------------------------------------------------- where they run


@pytest.fixture
def unknown():
    """No device has been tried yet."""
    dropout.kernels_on.cache_clear()
    yield
    dropout.kernels_on.cache_clear()


def test_kernels_are_for_gpus_without_a_compiler(monkeypatch):
    monkeypatch.setattr(dropout, "kernels_on", lambda device: f"kernels on {device}")
    assert dropout.kernels_for(CUDA) == "kernels on cuda:0"
    assert dropout.kernels_for(torch.ones(1)) is None
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert dropout.kernels_for(CUDA) is None


def test_without_triton_one_note(monkeypatch, capsys, unknown):
    from encoders import __name__ as package

    monkeypatch.setitem(sys.modules, f"{package}.dropout_kernels", None)  # its import fails
    monkeypatch.delattr(sys.modules[package], "dropout_kernels", raising=False)
    assert dropout.kernels_on(torch.device("cpu")) is None
    assert dropout.kernels_on(torch.device("cpu")) is None
    assert capsys.readouterr().err.count("note: no Triton kernels on cpu (") == 1


@pytest.mark.parametrize(
    "error, expected",
    [
        (RuntimeError("Failed to find C compiler.\nPlease specify one"), "C compiler.)"),
        (AssertionError(), "(AssertionError)"),
    ],
)
def test_kernels_that_do_not_run_are_not_used(error, expected, monkeypatch, capsys, unknown):
    import encoders

    def add_kept(*_):
        raise error

    broken = SimpleNamespace(add_kept=add_kept)
    monkeypatch.setattr(encoders, "dropout_kernels", broken, raising=False)
    assert dropout.kernels_on(torch.device("cpu")) is None
    assert expected in capsys.readouterr().err


def test_out_of_memory_is_not_taken_for_missing_kernels(monkeypatch, unknown):
    import encoders

    def add_kept(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    broken = SimpleNamespace(add_kept=add_kept)
    monkeypatch.setattr(encoders, "dropout_kernels", broken, raising=False)
    with pytest.raises(torch.OutOfMemoryError):
        dropout.kernels_on(torch.device("cpu"))
