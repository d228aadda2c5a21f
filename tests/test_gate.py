"""The gate of the export: sound models of every family pass, wrong ones do not.

Wrong ones are networks with one mistake, written as ONNX and compared with the right network. In
fp32 each is refused. In fp16 those are whose mistake is larger than what rounding explains.
"""

import argparse
import copy
import dataclasses
import functools

import numpy as np
import pytest
import torch
from onnx_models import (
    FAMILIES,
    classifier,
    dataset,
    encoder,
    make_run,
    patches,
    register,
    with_head,
    write_model,
)

import data
import export
import models
from dataset.patches import Patches
from encoders import rounding
from onnx_model import nodes, parity, session

VITS = [family for family in FAMILIES if family not in ("resnet50", "swin")]
LABELS = np.arange(16) % 2


@pytest.fixture(autouse=True)
def families(monkeypatch):
    register(monkeypatch)


def realistic(family, layerscale=0.1, **choices):
    """A classifier with scales as in trained networks: biases of 1e-2, tokens of 0.02, LayerScale
    below 1.
    """
    network, generator = encoder(family, **choices), torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, value in network.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            if name.endswith("bias"):
                value.copy_(1e-2 * noise)
            elif name.endswith("gamma"):
                value.copy_(layerscale * (1 + 0.3 * noise))
            elif name.endswith(("token", "pos_embed")):
                value.mul_(0.04)
        if family == "dinov3":  # its keys have no bias
            for block in network.blocks:
                block.attn.qkv.bias[64:128] = 0
    return with_head(network)


@functools.cache
def right(family, precision, make=realistic):
    """(model, patches, torch's Reference of it)"""
    model, images = make(family), patches(16, seed=9)
    arguments = argparse.Namespace(device="cpu", precision=precision)
    return model, images, export.torch_output(model, images, arguments)


def judge(written, reference, images, precision, folder):
    """What the gate says of the network `written`, whose right outputs are the reference's →
    problems, as texts.
    """
    path = folder / "m.onnx"
    write_model(path, written, precision, peaks=reference.peaks)
    opened = session.Classifier(path, "cpu", threads=1, warm_up=False)
    arrays, labels = export.probabilities(reference, 1.0), LABELS[: len(images)]
    return parity.problems(parity.measure(opened, images, labels=labels, **arrays), precision)


def effect(wrong, reference, images):
    """How far a mistake moves the probabilities in float32, as a share of what rounding may."""
    arrays = export.probabilities(reference, 1.0)
    with torch.inference_mode():
        moved = parity.sigmoid(wrong(torch.from_numpy(images)).numpy())
    return float((np.abs(moved - arrays["expected"]) / arrays["allowed"]).max())


# ---------------------------------------------------------------- sound models


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("family", [pytest.param("swin", marks=pytest.mark.slow), *VITS])
def test_sound_models_pass(family, precision, tmp_path):
    """In the runtime, and as torch computes it in float16 alone, which is what a GPU does."""
    for make in (realistic, classifier):
        model, images, reference = right(family, precision, make)
        assert judge(model, reference, images, precision, tmp_path) == []
    if precision == "fp16":
        half = copy.deepcopy(model)
        half.encoder.half()
        assert 0.05 < effect(half, reference, images) < 1


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_sound_models_pass_with_augmentation_at_test_time(precision, tmp_path):
    """Errors of weights are the same in all eight views, so their mean does not average them."""
    plain = classifier("gelu")
    model = models.PatchClassifier(plain.encoder, tta=True).eval()
    model.load_state_dict(plain.state_dict())
    images, arguments = patches(8, seed=9), argparse.Namespace(device="cpu", precision=precision)
    reference = export.torch_output(model, images, arguments)
    assert judge(model, reference, images, precision, tmp_path) == []
    if precision == "fp16":
        half = copy.deepcopy(model)
        half.encoder.half()
        assert 0.05 < effect(half, reference, images) < 1


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_sound_resnet_passes(precision, tmp_path):
    model, images = classifier("resnet50"), patches(4, seed=9)
    arguments = argparse.Namespace(device="cpu", precision=precision)
    reference = export.torch_output(model, images, arguments)
    assert judge(model, reference, images, precision, tmp_path) == []


# ---------------------------------------------------------------- wrong models


def swap_gate(model):
    for block in model.encoder.blocks:
        for values in (block.mlp.fc1.weight, block.mlp.fc1.bias):
            values.copy_(values.roll(len(values) // 2, 0))


def forget_layerscale(model):
    model.encoder.blocks[-1].ls2.gamma.fill_(1)


def swap_tokens(model):
    cls, first = model.encoder.cls_token, model.encoder.reg_token[:, :1]
    kept = cls.clone()
    cls.copy_(first)
    first.copy_(kept)


def forget_head_bias(model):
    model.head.bias.zero_()


def permute_qkv(*order):
    def change(model):
        qkv = model.encoder.blocks[0].attn.qkv
        for values in (qkv.weight, qkv.bias):
            values.copy_(torch.cat([values.chunk(3)[part] for part in order]))

    return change


def swap_mean_and_std(model):
    renormalise(model, *reversed(model.encoder.spec.norm))


def forget_mean(model):
    renormalise(model, (0, 0, 0), model.encoder.spec.norm[1])


def forget_std(model):
    renormalise(model, model.encoder.spec.norm[0], (1, 1, 1))


def renormalise(model, mean, std):
    model.encoder.spec = dataclasses.replace(model.encoder.spec, norm=(mean, std))
    model.mean.copy_(torch.tensor(mean).view(1, 3, 1, 1))
    model.std.copy_(torch.tensor(std).view(1, 3, 1, 1))


def interpolate(model, how):
    """Position embedding of 16 × 16 tokens, from one of 12 × 12."""
    stored = torch.randn(1, 64, 12, 12, generator=torch.Generator().manual_seed(4)) * 0.02
    options = {} if how == "nearest" else {"antialias": how == "bicubic"}
    resized = torch.nn.functional.interpolate(stored, (16, 16), mode=how, **options)
    model.encoder.pos_embed.copy_(resized.flatten(2).transpose(1, 2))


def interpolated(family):
    model = realistic(family)
    with torch.no_grad():
        interpolate(model, "bicubic")
    return model


def published_layerscale(family):
    """As published before training: the blocks do next to nothing."""
    return realistic(family, layerscale=1e-5, pool="mean")


def other_eps(model):
    for block in model.encoder.blocks:
        block.norm1.eps = block.norm2.eps = 1e-5


# mistake: (families, the change, how the right network is made, whether float16 shows it too)
MISTAKES = {
    "gate order": (("swiglu", "clsmean"), swap_gate, realistic, True),
    "mean and std swapped": (("gelu", "swiglu"), swap_mean_and_std, realistic, True),
    "no mean": (("gelu", "swiglu"), forget_mean, realistic, True),
    "no std": (("gelu", "dinov3"), forget_std, realistic, True),
    "a LayerScale of 1e-5 forgotten": (
        ("swiglu", "dinov3"),
        forget_layerscale,
        published_layerscale,
        True,
    ),
    "a LayerScale of 0.1 forgotten": (("swiglu", "conch"), forget_layerscale, realistic, True),
    "class token among the registers": (("clsmean", "dinov3"), swap_tokens, realistic, False),
    "no bias of the head": (("gelu", "clsmean"), forget_head_bias, realistic, True),
    "k, q, v": (("gelu", "dinov3"), permute_qkv(1, 0, 2), realistic, False),
    "q, v, k": (("gelu", "swiglu"), permute_qkv(0, 2, 1), realistic, True),
    "bilinear positions": (
        ("swiglu",),
        functools.partial(interpolate, how="bilinear"),
        interpolated,
        False,
    ),
    "nearest positions": (
        ("swiglu",),
        functools.partial(interpolate, how="nearest"),
        interpolated,
        False,
    ),
    "eps of 1e-5 for 1e-6": (("gelu", "swiglu"), other_eps, realistic, False),
}


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize(
    "mistake,family",
    [(mistake, family) for mistake, row in MISTAKES.items() for family in row[0]],
)
def test_one_mistake_is_found(mistake, family, precision, tmp_path):
    _, change, make, in_half = MISTAKES[mistake]
    model, images, reference = right(family, precision, make)
    wrong = copy.deepcopy(model)
    with torch.no_grad():
        change(wrong)
    size = effect(wrong, reference, images)
    found = judge(wrong, reference, images, precision, tmp_path)
    print(f"{mistake}, {family}, {precision}: {size:.3g} times what rounding explains")
    if precision == "fp32" or in_half or size > 2:
        assert found and size > 1, f"{size:.3g} times what rounding explains"


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_another_gelu_is_found(precision, tmp_path, monkeypatch):
    """By tanh instead of erf: at most 5e-4 off, which float16 itself may be."""
    model, images, reference = right("gelu", precision)
    monkeypatch.setattr(nodes, "gelu", lambda g, x, half, at: g.op("Gelu", x, approximate="tanh"))
    found = judge(model, reference, images, precision, tmp_path)
    assert bool(found) == (precision == "fp32"), found


def parts_of_biases(model):
    """Every bias that the output depends on, as (name, tensor): of qkv those of q and of v. That of
    k adds the same to all scores of a query, which softmax does not see.
    """
    for name, value in model.named_parameters():
        if name.endswith("qkv.bias"):
            q, _, v = value.chunk(3)
            yield f"{name} of q", q
            yield f"{name} of v", v
        elif name.endswith("bias"):
            yield name, value


SLOWER = [pytest.param(name, marks=pytest.mark.slow) for name in ("dinov3", "conch", "swin")]


@pytest.mark.parametrize("family", ["gelu", "swiglu", *SLOWER])
def test_one_dropped_bias_is_found(family, tmp_path, monkeypatch):
    """A bias of 1e-2, in whichever layer."""
    monkeypatch.setattr(parity, "BATCHES", {64: None})
    model, images, reference = right(family, "fp32")
    names = [name for name, _ in parts_of_biases(model)]
    assert len(names) >= 17
    for i, name in enumerate(names):
        wrong = copy.deepcopy(model)
        with torch.no_grad():
            list(parts_of_biases(wrong))[i][1].zero_()
        assert judge(wrong, reference, images, "fp32", tmp_path), name


def test_a_small_bias_dropped_in_a_probability_near_certainty(tmp_path):
    """Logits around 8, where probabilities hardly move: the bound becomes as narrow."""
    model, images, _ = right("gelu", "fp32")
    sure, arguments = copy.deepcopy(model), argparse.Namespace(device="cpu", precision="fp32")
    with torch.no_grad():
        sure.head.bias.add_(8)
    reference = export.torch_output(sure, images, arguments)
    assert judge(sure, reference, images, "fp32", tmp_path) == []
    with torch.no_grad():
        sure.encoder.blocks[0].mlp.fc2.bias.zero_()
    assert judge(sure, reference, images, "fp32", tmp_path)


# ---------------------------------------------------------------- the bound itself


@pytest.mark.parametrize("family", ["gelu", "swiglu"])
def test_the_bound_follows_the_scale_of_the_logits(family):
    """Ten times the logits, or a tenth of the temperature: ten times the bound."""
    model, images, reference = right(family, "fp16")
    larger, arguments = copy.deepcopy(model), argparse.Namespace(device="cpu", precision="fp16")
    with torch.no_grad():
        larger.head.weight.mul_(10)
    assert export.torch_output(larger, images, arguments).bound == pytest.approx(
        10 * reference.bound, rel=1e-3
    )
    hotter = export.probabilities(reference, 0.1)["allowed"]
    logits = reference.values.astype(np.float64) * 10
    assert np.allclose(hotter, parity.allowed_of_logits(logits, 10 * reference.bound))


def test_the_bound_follows_precision_and_sums():
    assert parity.bound("int8", 10, 768) is None
    assert parity.bound("fp16", 10, 768) == pytest.approx(parity.SAFETY * 10 * 2**-11, rel=1e-4)
    plain = parity.bound("fp32", 10, 0)
    assert plain == parity.SAFETY * 10 * 2**-24
    assert parity.bound("fp32", 10, 600) == pytest.approx(plain * 101**0.5)
    slope = parity.allowed_of_logits(np.zeros(1), 1e-3) - parity.LAST_DIGITS
    assert slope == pytest.approx(2.5e-4, rel=1e-5)
    assert parity.allowed_of_logits(np.zeros(1), 9.0) == parity.TOO_MUCH["probability"]
    assert parity.allowed_of_embeddings(np.zeros((3, 8)), 9.0).tolist() == [0.1] * 3


def test_the_longest_sum_is_that_of_a_product():
    assert rounding.longest_sum(encoder("gelu")) == 3 * 16 * 16  # the patch embedding
    with torch.device("meta"):
        assert rounding.longest_sum(models.build(FAMILIES["resnet50"])) == 512 * 9


def test_noise_is_gone_afterwards_and_the_same_again():
    model, images, _ = right("swiglu", "fp32")
    with torch.inference_mode():
        before = model(torch.from_numpy(images))
        gains = [rounding.gain(model, images, before.numpy()) for _ in range(2)]
        assert gains[0] == gains[1] > 0
        assert torch.equal(model(torch.from_numpy(images)), before)


def test_an_embedding_is_judged_by_its_length(tmp_path):
    model, images, _ = right("gelu", "fp32")
    bare, arguments = copy.deepcopy(model), argparse.Namespace(device="cpu", precision="fp32")
    bare.head = None
    reference = export.torch_output(bare, images, arguments)
    arrays = export.embeddings(reference)
    write_model(tmp_path / "m.onnx", bare, metadata={"labels": None, "threshold": None})
    opened = session.Classifier(tmp_path / "m.onnx", "cpu", threads=1, warm_up=False)
    rows = parity.measure(opened, images, labels=LABELS, **arrays)
    assert parity.problems(rows, "fp32", "embedding") == []
    arrays["expected"] = arrays["expected"] * (1 + 1e-4)
    rows = parity.measure(opened, images, labels=LABELS, **arrays)
    (first, *_) = parity.problems(rows, "fp32", "embedding")
    assert "the embedding differs by up to" in first


class OnGpu:
    """Stands in for a Classifier on a GPU that gives these probabilities."""

    device, input, threshold = "cuda:0", "uint8", 0.5

    def __init__(self, values):
        self.values, self.session = values, self

    def get_providers(self):
        return ["CUDAExecutionProvider"]

    def __call__(self, patches, output):
        return self.values[patches]


def on_gpu(values, expected, allowed, half=None):
    rows = parity.measure(
        OnGpu(np.float32(values)), np.arange(16), expected, LABELS, np.full(16, allowed), half
    )
    return parity.problems(rows, "fp16"), rows


def test_a_gpu_may_lose_what_torch_loses_there_but_not_more():
    expected = np.linspace(0.01, 0.97, 16)
    for off, half_off, passes in (
        (0.9e-3, None, True),
        (1.2e-3, None, False),
        (1.2e-3, 0.5e-3, True),
        (1.6e-3, 0.5e-3, False),
        (1.9e-3, 40e-3, True),
        (2.1e-3, 40e-3, False),  # however wrong torch's float16 is
    ):
        half = None if half_off is None else expected + half_off
        found, rows = on_gpu(expected + off, expected, 1e-3, half)
        assert (found == []) == passes, (off, half_off)
        assert rows[-1]["torch"] == (half_off and pytest.approx(half_off))
    values = expected.copy()
    values[3] = np.nan
    assert "not a finite number" in on_gpu(values, expected, 1e-3)[0][0]


def test_a_decision_may_change_only_at_the_threshold():
    expected = np.full(16, 0.2)
    expected[::2] = 0.4995
    found, rows = on_gpu(np.where(expected > 0.3, 0.5003, expected), expected, 1e-3)
    assert found == [] and rows[-1]["changed"] == 8
    found, rows = on_gpu(np.where(expected > 0.3, 0.5017, expected), expected, 1e-3)
    assert rows[-1]["changed"] == 8 and "times what rounding in fp16 explains" in found[0]


def test_a_bound_that_is_no_number_is_no_bound():
    expected = np.full(16, 0.2)
    assert on_gpu(expected + 0.01, expected, np.nan)[0]


def test_more_than_too_much_is_never_explained():
    """Not even if torch's float16 on the GPU loses as much again."""
    expected = np.full(16, 0.2)
    off = parity.TOO_MUCH["probability"]
    assert on_gpu(expected + 1.1 * off, expected, off, expected + off)[0]


def test_auroc_counts_beside_the_bound():
    row = {
        "provider": "CPU",
        "batch": 64,
        "patches": 64,
        "largest": 1e-3,
        "mean": 0,
        "changed": 0,
        "auroc_change": -0.004,
        "pairs": 32 * 32,
        "used": 0.5,
    }
    for precision in ("fp32", "fp16"):
        assert parity.problems([row], precision) == []
        assert parity.problems([{**row, "auroc_change": -0.006}], precision)
        few = {**row, "pairs": 16, "auroc_change": -1 / 16}
        assert parity.problems([few], precision) == []
        assert parity.problems([{**few, "auroc_change": -2 / 16}], precision)
    plain = {**row, "used": None}
    assert parity.problems([plain], "int8") == []
    assert parity.problems([{**plain, "auroc_change": -0.006}], "int8")
    assert parity.problems([{**plain, "pairs": 16, "auroc_change": -1 / 16}], "int8")
    assert parity.problems([{**plain, "auroc_change": None}], "int8")
    infinite = {**row, "largest": float("inf")}
    assert all(parity.problems([infinite], precision) for precision in ("fp32", "fp16", "int8"))


# On an H200 (torch 2.11, onnxruntime-gpu 1.31.1): largest |Δp| of sound models of these families.
@pytest.mark.parametrize(
    "family,precision,seen", [("swiglu", "fp32", 1.2e-5), ("clsmean", "fp16", 5.2e-3)]
)
def test_what_a_gpu_gave_once_passes(family, precision, seen, tmp_path):
    """Runs with an adapter, as tests/test_export.py exports them, at batch 64."""
    dataset(tmp_path / "data")
    _, model = make_run(tmp_path / "run", family, "lora", tmp_path / "data")
    table = data.load_dataset(tmp_path / "data/MIDOG.json", images=tmp_path / "data")
    images = Patches(table).read(np.arange(64))
    arguments = argparse.Namespace(device="cpu", precision=precision)
    reference = export.torch_output(model, images, arguments)
    allowed = export.probabilities(reference, 1.0)["allowed"]
    assert seen < allowed.max() < 8 * seen


def test_reports_say_what_was_required_and_older_ones_still_read():
    old = {
        "source": "patches",
        "wanted": "largest |Δp| ≤ 1e-5",
        "measured": [
            {
                "provider": "CPUExecutionProvider",
                "batch": 64,
                "patches": 64,
                "largest": 1e-6,
                "mean": 1e-7,
                "changed": 0,
                "auroc_change": None,
            }
        ],
    }
    assert session.is_parity(old)
    assert session.describe_parity(old).split("\n")[-1].split()[5:] == ["–", "0", "–"]
    row = old["measured"][0] | {"used": 0.3456, "torch": 4e-3, "allowed": 1e-2}
    new = old | {"wanted": parity.wanted("fp16", "probability", np.array([1e-2]))}
    new["measured"] = [row]
    assert session.is_parity(new)
    text = session.describe_parity(new)
    assert "0.346" in text and "explained by rounding in fp16 (|Δp| ≤ 1.0e-02)" in text
    assert "torch fp16 against torch fp32 on the GPU: largest 4.00e-03" in text
    for key in ("used", "torch"):
        assert not session.is_parity(new | {"measured": [row | {key: "x"}]})
    assert "AUROC" in parity.wanted("int8", "probability", None)
    assert "|Δe| / |e| explained by rounding in fp16 (≤ 1.0e-02)" in parity.wanted(
        "fp16", "embedding", np.array([1e-2])
    )
