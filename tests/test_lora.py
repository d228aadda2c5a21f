import copy
import json

import numpy as np
import peft
import pytest
import small  # noqa: F401  registers the tiny encoders
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lora
import models
from common import UserError
from encoders.dropout import keep_mask, kept_share
from encoders.table import Encoder

KINDS = [{}, {"dora": True}, {"rslora": True}]
RANK, ALPHA = 4, 6
TARGETS = r"blocks\.\d+\..*\.(qkv|proj|fc1|fc2)"  # for peft


def vit(dtype=torch.float32, seed=0):
    """A small timm ViT with weights that are not trivial; the same names as models.ViT."""
    torch.manual_seed(seed)
    network = timm.models.vision_transformer.VisionTransformer(
        img_size=32,
        patch_size=8,
        embed_dim=48,
        depth=2,
        num_heads=3,
        num_classes=0,
        init_values=0.5,
    )
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return network.eval().to(dtype)


def pair(dtype=torch.float32, dropout=0.0, dora=False, rslora=False):
    """(ours, peft's) with the same A and B, B not zero; peft's dropout takes our masks."""
    plain = vit(dtype)
    ours = copy.deepcopy(plain)
    assert lora.add_lora(ours, RANK, ALPHA, dropout, dora=dora, rslora=rslora) == 8
    config = peft.LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        lora_dropout=dropout,
        target_modules=TARGETS,
        use_dora=dora,
        use_rslora=rslora,
    )
    theirs = peft.get_peft_model(copy.deepcopy(plain), config)
    generator, named = torch.Generator().manual_seed(3), dict(theirs.named_modules())
    with torch.no_grad():
        for name, layer in lora.adapted(ours):
            other = named[f"base_model.model.{name}"]
            layer.lora_B.copy_(torch.randn(layer.lora_B.shape, generator=generator) * 0.3)
            other.lora_A["default"].weight.copy_(layer.lora_A)
            other.lora_B["default"].weight.copy_(layer.lora_B)
            if dora:
                layer.lora_magnitude.mul_(
                    1 + 0.2 * torch.rand(len(layer.lora_magnitude), generator=generator)
                )
                other.lora_magnitude_vector["default"].weight.copy_(layer.lora_magnitude)
            if dropout:
                other.lora_dropout["default"] = OurDropout(layer)
    x = torch.randn(3, 3, 32, 32, generator=generator).to(dtype)
    with torch.no_grad():
        before, after = plain(x), ours(x)
    assert (
        after - before
    ).norm() > 0.1 * before.norm()  # an adapter that changes nothing would prove nothing
    return ours, theirs.eval(), x


class OurDropout(nn.Module):
    """For peft's layer: dropout with the masks of ours."""

    def __init__(self, layer):
        super().__init__()
        self.layers = [layer]  # in a list, so that it is no part of peft's model

    def forward(self, x):
        if not self.training:
            return x
        (layer,) = self.layers
        return x * keep_mask(layer.key, x[0].numel(), layer.p).view(x.shape) / kept_share(layer.p)


def trained(ours, theirs):
    """[(ours, theirs)] parameters that are trained, in the same order."""
    named = dict(theirs.named_modules())
    out = []
    for name, layer in lora.adapted(ours):
        other = named[f"base_model.model.{name}"]
        out += [
            (layer.lora_A, other.lora_A["default"].weight),
            (layer.lora_B, other.lora_B["default"].weight),
        ]
        if layer.lora_magnitude is not None:
            out.append((layer.lora_magnitude, other.lora_magnitude_vector["default"].weight))
    return out


def relative(a, b):
    return ((a - b).norm() / b.norm().clamp(min=1e-30)).item()


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("kind", KINDS, ids=["lora", "dora", "rslora"])
def test_forward_and_backward_equal_peft(kind, dropout):
    ours, theirs, x = pair(dropout=dropout, **kind)
    assert relative(ours(x), theirs(x)) < 1e-5
    ours.train(), theirs.train()
    lora.set_step(ours, 1, 2, range(3))
    a, b = ours(x), theirs(x)
    assert relative(a, b) < 1e-5
    if dropout:
        assert relative(a, ours.eval()(x)) > 1e-2
    weight = torch.randn(48)
    (a @ weight).square().sum().backward()
    (b @ weight).square().sum().backward()
    for mine, other in trained(ours, theirs):
        assert relative(mine.grad, other.grad) < 1e-5
    assert all(p.grad is None for name, p in ours.named_parameters() if "lora_" not in name)


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-4), (torch.float64, 1e-10)])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_twenty_adam_steps_equal_peft(dtype, bound, dropout):
    ours, theirs, x = pair(dtype, dropout)
    if dtype == torch.float64:  # peft keeps the adapters in float32 otherwise
        theirs.double()
    weight = torch.randn(48, generator=torch.Generator().manual_seed(0)).to(dtype)
    y = torch.tensor([1, 0, 1], dtype=dtype)
    optimizers = [
        torch.optim.Adam([p for p in m.parameters() if p.requires_grad], lr=1e-3)
        for m in (ours, theirs)
    ]
    for step in range(20):
        for network, optimizer in zip((ours, theirs), optimizers):
            network.train()
            lora.set_step(ours, 0, step, range(3))
            loss = nn.functional.binary_cross_entropy_with_logits(network(x) @ weight, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for mine, other in trained(ours, theirs):
        assert relative(mine.detach(), other.detach()) < bound
    assert relative(ours.eval()(x), theirs.eval()(x)) < bound


WHOLE = {  # the encoders' variety at a small width: registers, packed SwiGLU, LayerScale, positions
    "gelu": (dict(dim=48, depth=2, heads=3, patch=32, hidden=96), {}),
    "swiglu": (
        dict(
            dim=48,
            depth=2,
            heads=3,
            patch=32,
            hidden=128,
            mlp="swiglu",
            layerscale=True,
            registers=4,
            pos="patches",
        ),
        dict(
            mlp_ratio=128 / 48,
            mlp_layer=timm.layers.SwiGLUPacked,
            act_layer=nn.SiLU,
            init_values=0.5,
            reg_tokens=4,
            no_embed_class=True,
        ),
    ),
}


@pytest.mark.parametrize("kind", WHOLE)
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_our_encoder_equals_timm_with_peft(kind, dtype, bound):
    """models.ViT, whose last block computes the class token alone, with dropout: embedding and
    gradients.
    """
    row, arguments = WHOLE[kind]
    arguments = {"mlp_ratio": row["hidden"] / row["dim"], **arguments}
    ours = models.build(Encoder(kind, "", "", 0, **row), "cls")
    theirs = timm.models.vision_transformer.VisionTransformer(
        img_size=224, patch_size=32, embed_dim=48, depth=2, num_heads=3, num_classes=0, **arguments
    )
    torch.manual_seed(1)
    with torch.no_grad():
        for p in ours.parameters():
            p.copy_(torch.randn_like(p) * 0.1 + (p.dim() == 1))
    theirs.load_state_dict(ours.state_dict())
    ours, theirs = ours.to(dtype), theirs.to(dtype)
    lora.add_lora(ours, RANK, ALPHA, 0.2)
    theirs = peft.get_peft_model(
        theirs, peft.LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.2, target_modules=TARGETS)
    )
    theirs.to(dtype)
    x, named = torch.randn(3, 3, 224, 224, dtype=dtype), dict(theirs.named_modules())
    before = ours.eval()(x)
    with torch.no_grad():
        for name, layer in lora.adapted(ours):
            other = named[f"base_model.model.{name}"]
            layer.lora_B.normal_(0, 0.3)
            other.lora_A["default"].weight.copy_(layer.lora_A)
            other.lora_B["default"].weight.copy_(layer.lora_B)
            other.lora_dropout["default"] = OurDropout(layer)
    assert relative(ours(x), before) > 0.1
    lora.set_step(ours.train(), 3, 4, range(3))
    a, b, weight = ours(x), theirs.train()(x), torch.randn(48, dtype=dtype)
    assert relative(a, b) < bound
    (a @ weight).square().sum().backward()
    (b @ weight).square().sum().backward()
    for mine, other in trained(ours, theirs):
        assert mine.grad.norm() > 0 and relative(mine.grad, other.grad) < bound


# ---------------------------------------------------------------- merging


@pytest.mark.parametrize("kind", KINDS, ids=["lora", "dora", "rslora"])
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_merged_equals_unmerged_and_peft(kind, dtype, bound):
    ours, theirs, x = pair(dtype, **kind)
    with torch.no_grad():
        before = ours(x)
        with lora.folded(ours):
            assert relative(ours(x), before) < bound
        assert torch.equal(ours(x), before)
        lora.merge_lora(ours)
        assert relative(ours(x), before) < bound
        if dtype == torch.float32:
            assert relative(ours(x), theirs.merge_and_unload()(x)) < 1e-5
    assert not lora.adapted(ours) and all(type(m) is not lora.LoRALinear for m in ours.modules())
    assert sorted(ours.state_dict()) == sorted(vit().state_dict())


def test_merging_twice_changes_nothing():
    ours, _, x = pair()
    lora.merge_lora(ours)
    weights = copy.deepcopy(ours.state_dict())
    lora.merge_lora(ours)
    assert all(torch.equal(weights[name], value) for name, value in ours.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype):
    """The merged weight is the float64 sum, rounded, not a sum of rounded numbers."""
    ours, _, _ = pair(dtype)
    layer = ours.blocks[1].mlp.fc1
    assert layer.lora_A.dtype == torch.float32  # the adapter is not trained in half precision
    exact = layer.weight.double() + layer.scale * layer.lora_B.double() @ layer.lora_A.double()
    merged = layer.merged().weight
    assert merged.dtype == dtype
    assert (merged != exact.to(dtype)).float().mean() < 1e-3  # float32 against float64 at ties
    assert relative(merged.double(), exact) < (4e-3 if dtype == torch.bfloat16 else 5e-4)


def test_an_adapter_with_nan_is_refused_and_nothing_is_merged():
    ours, _, x = pair()
    with torch.no_grad():
        ours.blocks[1].mlp.fc2.lora_B[0, 0] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        lora.merge_lora(ours)
    assert len(lora.adapted(ours)) == 8
    ours, _, x = pair(torch.float16)  # finite in float32, not in float16
    with torch.no_grad():
        ours.blocks[1].mlp.fc2.lora_B.fill_(1e6)
    with pytest.raises(UserError, match="not finite"):
        lora.merge_lora(ours)


def test_the_base_weights_are_not_touched_by_merging():
    ours, _, _ = pair()
    base = ours.blocks[0].attn.qkv.weight
    before = base.clone()
    lora.merge_lora(ours)
    assert torch.equal(base, before) and not torch.equal(ours.blocks[0].attn.qkv.weight, before)


def test_an_adapter_of_zeros_is_no_adapter():
    plain = vit()
    ours = copy.deepcopy(plain)
    lora.add_lora(ours, RANK, ALPHA)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert relative(ours(x), plain(x)) < 1e-6
    lora.merge_lora(ours)
    assert all(
        torch.equal(plain.state_dict()[name], value) for name, value in ours.state_dict().items()
    )


def test_the_adapter_turned_off_is_the_base_model():
    ours, theirs, x = pair()
    for _, layer in lora.adapted(ours):
        layer.scale = 0
    with torch.no_grad(), theirs.disable_adapter():
        assert relative(ours(x), theirs(x)) < 1e-6


def test_a_hundred_switches_change_no_bit():
    ours, _, x = pair(dropout=0.1)
    with torch.no_grad():
        before, weights = ours.eval()(x), copy.deepcopy(ours.state_dict())
        for step in range(100):
            lora.set_step(ours.train(), 0, step, range(3))
            if step % 20 == 0:
                ours(x)
            ours.eval()
        assert torch.equal(ours(x), before)
    assert all(torch.equal(weights[name], value) for name, value in ours.state_dict().items())


# ---------------------------------------------------------------- what is adapted


def test_layers_are_counted_and_the_rest_is_frozen():
    for targets in (lora.TARGETS, ("qkv",), ("fc1", "fc2")):
        network = vit()
        assert lora.add_lora(network, targets=targets) == 2 * len(targets)
        free = {
            name.rpartition(".")[2] for name, p in network.named_parameters() if p.requires_grad
        }
        assert free == {"lora_A", "lora_B"}
    with pytest.raises(UserError, match="0 layers found"):
        lora.add_lora(vit(), targets=("query",))
    network = vit()
    network.blocks[0].mlp.fc1 = nn.Identity()
    with pytest.raises(UserError, match="7 layers found, 8 expected"):
        lora.add_lora(network)
    with pytest.raises(UserError, match="no transformer blocks"):
        lora.add_lora(nn.Sequential(nn.Linear(2, 2)))
    for rank, dropout in ((0, 0.1), (4, 1.0), (4, -0.1)):
        with pytest.raises(UserError):
            lora.add_lora(vit(), rank, dropout=dropout)


def test_the_start_is_the_references():
    torch.manual_seed(0)
    layer = lora.LoRALinear(nn.Linear(64, 32), 8, 16, 0.0, 0)
    assert layer.scale == 2 and (layer.lora_B == 0).all()
    bound = 1 / 64**0.5  # kaiming-uniform with a = sqrt(5)
    A = layer.lora_A.detach()
    assert A.abs().max() <= bound and A.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)
    assert lora.LoRALinear(nn.Linear(4, 4), 16, 16, 0, 0, rslora=True).scale == 4


@pytest.mark.parametrize("name", [n for n, spec in models.ENCODERS.items() if spec.depth])
def test_every_encoder_takes_an_adapter(name):
    with torch.device("meta"):
        network = models.build(models.ENCODERS[name])
        assert lora.add_lora(network) == 4 * models.ENCODERS[name].depth


# ---------------------------------------------------------------- dropout


def test_masks_have_the_share_and_are_independent():
    layer = [lora.LoRALinear(nn.Linear(256, 8), 2, 2, 0.1, i) for i in range(2)]
    network = nn.Module()
    network.blocks = nn.ModuleList(layer)

    def masks(seed, step, samples):
        lora.set_step(network, seed, step, samples)
        return torch.stack(
            [keep_mask(m.key, 50 * 256, 0.1) for m in layer]
        ).float()  # [layer, B, elements]

    a = masks(0, 0, range(16))
    n = a.numel()
    assert abs(a.mean() - kept_share(0.1)) < 4 * (0.09 / n) ** 0.5
    assert abs(kept_share(0.1) - 0.9) < 1e-5
    assert abs(a.mean((0, 2)) - 0.9).max() < 0.01 and abs(a.mean((0, 1)) - 0.9).max() < 0.35
    others = [
        masks(0, 1, range(16)),
        masks(1, 0, range(16)),
        masks(0, 0, range(16, 32)),
        masks(2**62, 0, range(16)),
        masks(-1, 0, range(16)),
        a.flip(0),
        a.roll(1, 1),
        a.roll(1, 2),
        a.roll(4, 2),
        a.roll(257, 2),
    ]
    for b in others:
        correlation = np.corrcoef(a.flatten(), b.flatten())[0, 1]
        assert abs(correlation) < 5 / n**0.5
    assert torch.equal(a, masks(0, 0, range(16)))
    # A batch in parts, as accumulation and several processes see it.
    parts = torch.cat([masks(0, 0, range(k, k + 4)) for k in range(0, 16, 4)], dim=1)
    assert torch.equal(a, parts)


def test_dropout_keeps_the_mean():
    ours, _, x = pair(dropout=0.3)
    layer, inputs = ours.blocks[0].mlp.fc1.train(), torch.randn(4, 5, 48)
    total = 0
    with torch.no_grad():
        for step in range(400):
            lora.set_step(ours, 0, step, range(4))
            total = total + layer(inputs)
        assert relative(total / 400, layer.eval()(inputs)) < 0.05


def test_checkpointing_sees_the_same_masks():
    from torch.utils.checkpoint import checkpoint

    grads = []
    for again in (False, True):
        ours, _, x = pair(dropout=0.3)
        if again:
            for block in ours.blocks:
                block.forward = (
                    lambda f: lambda x, **k: checkpoint(f, x, use_reentrant=False, **k)
                )(block.forward)
        lora.set_step(ours.train(), 5, 6, range(3))
        ours(x).square().sum().backward()
        grads.append([p.grad for p in ours.parameters() if p.requires_grad])
    assert all(relative(a, b) < 1e-6 for a, b in zip(*grads))


def test_bf16_base_trains_float32_adapters():
    ours, _, x = pair(torch.bfloat16, 0.1)
    lora.set_step(ours.train(), 0, 0, range(3))
    ours(x).float().square().sum().backward()
    exact, _, _ = pair(torch.float32, 0.1)
    exact.load_state_dict(
        {k: v.float() if v.is_floating_point() else v for k, v in ours.state_dict().items()}
    )
    lora.set_step(exact.train(), 0, 0, range(3))
    exact(x.float()).square().sum().backward()
    for (_, a), (_, b) in zip(lora.adapted(ours), lora.adapted(exact)):
        assert a.lora_A.grad.dtype == torch.float32 and a.weight.dtype == torch.bfloat16
        assert relative(a.lora_A.grad, b.lora_A.grad) < 0.1


@pytest.mark.parametrize(
    "backend, dora",
    [
        ("aot_eager", False),
        pytest.param("aot_eager", True, marks=pytest.mark.slow),
        pytest.param("inductor", False, marks=pytest.mark.slow),
        pytest.param("inductor", True, marks=pytest.mark.slow),
    ],
)
def test_compiles_whole(backend, dora):
    ours, _, x = pair(dropout=0.1, dora=dora)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(ours, backend=backend, fullgraph=True)
    for step in range(3):  # other masks, same graph
        lora.set_step(ours.train(), 0, step, range(3))
        wanted = ours(x)
        wanted.square().sum().backward()
        grads = [p.grad.clone() for p in ours.parameters() if p.requires_grad]
        ours.zero_grad()
        out = compiled(x)
        out.square().sum().backward()
        assert relative(out, wanted) < 1e-4
        for p, g in zip((p for p in ours.parameters() if p.requires_grad), grads):
            assert relative(p.grad, g) < 1e-3
        ours.zero_grad()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


# ---------------------------------------------------------------- files


def test_state_is_strict():
    ours, _, x = pair()
    state = lora.lora_state_dict(ours)
    fresh = vit()
    lora.add_lora(fresh, RANK, ALPHA)
    lora.load_lora(fresh, state)
    assert relative(fresh(x), ours(x)) < 1e-6
    for wrong in (
        {**state, "more": torch.zeros(1)},
        dict(list(state.items())[1:]),
        {name: value[:2] for name, value in state.items()},
    ):
        with pytest.raises(UserError, match="does not fit"):
            lora.load_lora(fresh, wrong)


@pytest.mark.parametrize("kind", KINDS, ids=["lora", "dora", "rslora"])
def test_our_adapter_loads_into_peft_and_back(tmp_path, kind):
    ours, theirs, x = pair(dropout=0.1, **kind)
    with torch.no_grad():
        wanted = ours.eval()(x)
        lora.save_peft(ours, tmp_path / "ours", "vit")
        loaded = peft.PeftModel.from_pretrained(vit(), str(tmp_path / "ours")).eval()
        assert relative(loaded(x), wanted) < 1e-5
        theirs.save_pretrained(str(tmp_path / "theirs"))
        back = vit()
        assert lora.load_peft(back, tmp_path / "theirs") == 8
        assert relative(back.eval()(x), wanted) < 1e-5
        assert back.blocks[0].mlp.fc1.p == 0.1
    names = [set(load_file(tmp_path / who / lora.TENSORS)) for who in ("ours", "theirs")]
    assert names[0] == names[1]


@pytest.mark.parametrize(
    "change, words",
    [
        ({"peft_type": "IA3"}, "not the configuration"),
        ({"bias": "all"}, "bias"),
        ({"rank_pattern": {"qkv": 8}}, "rank_pattern"),
        ({"r": "many"}, "whole number"),
        ({"r": 16.9}, "whole number"),
        ({"r": True}, "whole number"),
        ({"r": float("inf")}, "whole number"),
        ({"r": 10**9}, "rank 1000000000"),
        ({"lora_alpha": float("nan")}, "alpha"),
        ({"lora_dropout": 1}, "dropout"),
        ({"lora_bias": True}, "lora_bias"),
        ({"a_setting_of_the_future": {"x": 1}}, "a_setting_of_the_future"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = pissa"),
        ({"init_lora_weights": "pissa_niter_16"}, "init_lora_weights = pissa"),
        ({"init_lora_weights": "olora"}, "init_lora_weights"),
        ({"init_lora_weights": "corda"}, "init_lora_weights"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights"),
        ({"modules_to_save": ["score"]}, "modules_to_save = score"),
        ({"r": 8}, "rank 8"),
        ({"r": 0}, "rank"),
    ],
)
def test_an_adapter_that_does_not_fit_is_one_line(tmp_path, change, words):
    ours, _, _ = pair()
    lora.save_peft(ours, tmp_path)
    config = json.loads((tmp_path / lora.CONFIG).read_text())
    (tmp_path / lora.CONFIG).write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=words):
        lora.load_peft(vit(), tmp_path)


def test_broken_adapters_are_one_line(tmp_path):
    ours, _, _ = pair()
    lora.save_peft(ours, tmp_path)
    file = tmp_path / lora.TENSORS
    content = file.read_bytes()
    file.write_bytes(content[:-50])
    with pytest.raises(UserError, match="not readable"):
        lora.load_peft(vit(), tmp_path)
    file.write_bytes(content)
    tensors = load_file(file)
    for name, words in (
        ("base_model.model.norm.weight", "does not belong to a LoRA adapter"),
        ("base_model.model.blocks.7.mlp.fc1.lora_A.weight", "does not fit"),
    ):
        save_file(tensors | {name: torch.zeros(RANK, 48)}, file)
        with pytest.raises(UserError, match=words):
            lora.load_peft(vit(), tmp_path)
    save_file({"base_model.model.head.weight": torch.zeros(2)}, file)
    with pytest.raises(UserError, match="holds no adapter"):
        lora.load_peft(vit(), tmp_path)
    file.unlink()
    with pytest.raises(UserError, match="not readable"):
        lora.load_peft(vit(), tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(UserError, match="safe_serialization"):
        lora.load_peft(vit(), tmp_path)
    with pytest.raises(UserError, match="no adapter"):
        lora.save_peft(vit(), tmp_path)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_an_adapter_on_changed_base_weights_is_refused(tmp_path, start):
    """peft's own files: on the published weights such an adapter would give other numbers."""
    config = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, init_lora_weights=start
    )
    theirs, x = peft.get_peft_model(vit(), config).eval(), torch.randn(2, 3, 32, 32)
    theirs.save_pretrained(str(tmp_path))
    with pytest.raises(UserError, match=f"init_lora_weights = {start}"):
        lora.load_peft(vit(), tmp_path)
    config = json.loads((tmp_path / lora.CONFIG).read_text())
    (tmp_path / lora.CONFIG).write_text(json.dumps(config | {"init_lora_weights": True}))
    unaware = vit()
    lora.load_peft(unaware, tmp_path)
    with torch.no_grad():  # what the refusal saves from
        assert relative(unaware.eval()(x), theirs(x)) > 0.01


@pytest.mark.parametrize("start", [True, "gaussian", "orthogonal"])
def test_starts_that_keep_the_base_weights_are_loaded(tmp_path, start):
    config = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, init_lora_weights=start
    )
    theirs, x = peft.get_peft_model(vit(), config).eval(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.1)
        theirs.save_pretrained(str(tmp_path))
        ours = vit()
        lora.load_peft(ours, tmp_path)
        assert relative(ours.eval()(x), theirs(x)) < 1e-5


@pytest.mark.parametrize("outputs", [1, 2])
def test_a_head_saved_by_peft_is_read(tmp_path, outputs):
    network = vit()
    network.head = nn.Linear(48, outputs)
    config = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, modules_to_save=["head"]
    )
    theirs = peft.get_peft_model(copy.deepcopy(network), config).eval()
    theirs.save_pretrained(str(tmp_path))
    ours, x = vit(), torch.randn(3, 48)
    assert lora.load_peft(ours, tmp_path) == 8
    weight, bias = lora.load_head(tmp_path)
    logits = network.head(x)
    if outputs == 2:  # the log-odds of a softmax over two outputs
        logits = logits.log_softmax(1)[:, 1:] - logits.log_softmax(1)[:, :1]
    assert relative(x @ weight.T + bias, logits) < 1e-5


def test_a_head_is_written_beside_the_adapter_and_read_again(tmp_path):
    ours, _, _ = pair()
    head = nn.Linear(48, 1)
    lora.save_peft(ours, tmp_path, "vit", head)
    peft.PeftModel.from_pretrained(vit(), str(tmp_path))
    weight, bias = lora.load_head(tmp_path)
    assert torch.equal(weight, head.weight) and torch.equal(bias, head.bias)
    first = lora.adapter_hash(tmp_path)
    assert first == lora.adapter_hash(tmp_path)
    lora.save_peft(ours, tmp_path, "vit")
    assert lora.load_head(tmp_path) is None and lora.adapter_hash(tmp_path) != first
    save_file({"head.weight": torch.zeros(3, 48)}, tmp_path / lora.HEAD)
    with pytest.raises(UserError, match="one or two outputs"):
        lora.load_head(tmp_path)
