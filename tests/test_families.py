"""DINOv3, Swin transformers and CONCH beyond their numbers: adapters, training, precision,
compilers.
"""

import copy
import dataclasses
import functools

import numpy as np
import peft
import pytest
import references
import torch
from safetensors.torch import save_file

import lora
import models
from encoders import vit

BLOCKS = r".*blocks\..*\.(qkv|proj|fc1|fc2|fc1_g|fc1_x)"  # not the patch embedding's proj
STAGES = (1, 1, 2, 1)


def images(count=2):
    return references.noise(count * 3 * 224 * 224, 11).view(count, 3, 224, 224)


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def pair(name, folder, monkeypatch, bias=True):
    """Our encoder of real width and few blocks, and timm's with the same weights. bias: for DINOv3,
    those of queries and values too.
    """
    spec = models.ENCODERS[name]
    if spec.stages:
        spec = dataclasses.replace(spec, stages=STAGES, depth=sum(STAGES))
        theirs = references.fill(references.swin_model(name, STAGES))
    elif spec.pooler:  # at 224 px, for which its file has positions
        spec = dataclasses.replace(spec, depth=2, size=224)
        theirs = references.fill(references.Conch(2))
    else:
        spec = dataclasses.replace(spec, depth=2)
        theirs = references.fill(references.dinov3_timm(name, 2, bias))
    monkeypatch.setitem(models.ENCODERS, name, spec)
    save_file(theirs.state_dict(), folder / "model.safetensors")
    return models.load_encoder(name, folder / "model.safetensors"), theirs


def embedding(name, theirs, x):
    if name == "conch-v1.5":
        return theirs.pool(theirs.trunk.forward_features(x))
    tokens = theirs.forward_features(x)
    return tokens.mean((1, 2)) if "swin" in name or "trans" in name else tokens[:, 0]


@pytest.mark.parametrize(
    "name",
    [
        *("dinov3-s", "dinov3-s-plus", "ctranspath", "swin-t"),
        pytest.param("conch-v1.5", marks=pytest.mark.slow),
    ],
)
def test_lora_equals_peft_on_timms_model(name, tmp_path, monkeypatch):
    """Embedding and gradients of the adapters in float64; then merged into plain layers. CONCH's
    pooler is not adapted and passes the gradients on.

    DINOv3 without biases of queries and values, as timm publishes it: with them, timm reads the
    weight of qkv past peft's wrapper, and an adapter there changes nothing.
    """
    ours, theirs = pair(name, tmp_path, monkeypatch, bias=False)
    ours, theirs, x = ours.double(), theirs.double(), images().double()
    count = lora.add_lora(ours, rank=4, alpha=8, dropout=0.0)
    assert count == 4 * models.ENCODERS[name].depth
    config = peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules=BLOCKS)
    adapted = peft.get_peft_model(theirs, config).double().eval()
    named = dict(adapted.named_modules())
    pairs = []  # of a parameter of ours and those of peft that are parts of it
    with torch.no_grad():
        for layer_name, layer in lora.adapted(ours):
            layer.lora_B.normal_(0, 0.1)
            trunk = "trunk." if name == "conch-v1.5" else ""
            parts = [f"base_model.model.{trunk}{layer_name}"]
            if name == "dinov3-s-plus" and layer_name.endswith("fc1"):  # two layers in timm
                parts = [f"{parts[0]}_g", f"{parts[0]}_x"]
            others = [named[part] for part in parts]
            for other, rows in zip(others, layer.lora_B.chunk(len(others))):
                other.lora_A["default"].weight.copy_(layer.lora_A)
                other.lora_B["default"].weight.copy_(rows)
            pairs.append((layer, others))
    statistics = copy.deepcopy(ours.state_dict())
    ours.train()  # as the training loop does; timm's stays in evaluation mode
    a, b = ours(x), embedding(name, adapted.base_model.model, x)
    assert relative(a, b) < 1e-12
    a.square().sum().backward()
    b.square().sum().backward()
    for layer, others in pairs:
        gradient_A = sum(other.lora_A["default"].weight.grad for other in others)
        gradient_B = torch.cat([other.lora_B["default"].weight.grad for other in others])
        assert relative(layer.lora_A.grad, gradient_A) < 1e-10
        assert relative(layer.lora_B.grad, gradient_B) < 1e-10
    assert all(torch.equal(value, statistics[key]) for key, value in ours.state_dict().items())
    lora.merge_lora(ours.eval())
    assert not lora.adapted(ours)
    with torch.inference_mode():
        assert relative(ours(x), a.detach()) < 1e-12


def test_statistics_of_the_stem_stay_in_training(tmp_path, monkeypatch):
    """A batch normalisation that followed the training patches would change the network under an
    adapter, which does not hold it.
    """
    ours, _ = pair("ctranspath", tmp_path, monkeypatch)
    x, before = images(), copy.deepcopy(ours.state_dict())
    with torch.no_grad():
        expected = ours.eval()(x)
        assert torch.equal(ours.train()(x), expected)
    assert all(torch.equal(value, before[name]) for name, value in ours.state_dict().items())


def test_the_bias_of_the_keys_stays_zero_in_full_training(tmp_path, monkeypatch):
    ours, _ = pair("dinov3-s", tmp_path, monkeypatch)
    optimizer = torch.optim.Adam(ours.train().parameters(), lr=0.1)
    ours(images()).square().sum().backward()
    optimizer.step()
    for block in ours.blocks:
        query, key, value = block.attn.qkv.bias.detach().chunk(3)
        assert not key.any() and query.all() and value.all()


def test_positions_are_turned_in_float32():
    """Also in a bf16 network: the turned numbers are rounded once."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 201, 64, generator=generator).bfloat16()
    cos, sin = vit.rotary_factors(14, 5, 64, torch.bfloat16)
    assert cos.dtype == sin.dtype == torch.float32
    exact = vit.rotate(x.double(), cos.double(), sin.double()).bfloat16()
    turned = vit.rotate(x, cos, sin)
    assert turned.dtype == torch.bfloat16
    assert (turned != exact).float().mean() < 1e-3
    rounded = vit.rotate(x, cos.bfloat16(), sin.bfloat16())
    assert (rounded != exact).float().mean() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dinov3-s-plus", "ctranspath"])
def test_one_graph_for_compilers_also_of_a_dynamic_batch(name, tmp_path, monkeypatch):
    ours, _ = pair(name, tmp_path, monkeypatch)
    model, x = models.PatchClassifier(ours).eval(), images(2)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    program = torch.export.export(
        model, (x,), dynamic_shapes=({0: torch.export.Dim("n", min=1, max=64)},)
    ).module()
    with torch.inference_mode():
        expected = model(x)
        torch.testing.assert_close(compiled(x), expected, rtol=1e-5, atol=1e-5)
        for count in (1, 3):
            y = images(count)
            torch.testing.assert_close(program(y), model(y), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["dinov3-s-plus", "ctranspath"])
def test_blocks_computed_again_in_the_backward_pass(name, tmp_path, monkeypatch):
    ours, _ = pair(name, tmp_path, monkeypatch)
    x = images(1)
    ours(x).sum().backward()
    gradients = {n: p.grad.clone() for n, p in ours.named_parameters() if p.grad is not None}
    ours.zero_grad()
    for block in ours.blocks:
        block.forward = functools.partial(
            torch.utils.checkpoint.checkpoint, block.forward, use_reentrant=False
        )
    ours(x).sum().backward()
    for parameter_name, parameter in ours.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, gradients[parameter_name])


def test_a_probe_reads_the_mean_of_swins_tokens(tmp_path, monkeypatch):
    ours, theirs = pair("swin-t", tmp_path, monkeypatch)
    model = models.PatchClassifier(ours).eval()
    patches = np.random.default_rng(0).integers(0, 256, (3, 224, 224, 3), dtype=np.uint8)
    got = models.predict(model, patches, batch_size=2, output="embedding", progress=None)
    mean, std = (np.array(values) for values in references.IN)
    x = torch.from_numpy(((patches / 255 - mean) / std).transpose(0, 3, 1, 2)).float()
    with torch.inference_mode():
        assert relative(torch.from_numpy(got), theirs.forward_features(x).mean((1, 2))) < 1e-5
