"""The table, the network, the classifier and the inference loop of models.py."""

import dataclasses
import json
import os
import threading
from pathlib import Path

import numpy as np
import pytest
import references
import torch
from safetensors.torch import save_file

import checkpoint
import common
import models
import weights
from common import UserError
from encoders.layers import Linear, attention
from encoders.names import rename
from encoders.table import OPTIMUS, ROWS, Encoder, embed_dim, flops

TINY = dict(dim=48, depth=3, heads=3, hidden=96, patch=16, layerscale=True)
TRANSFORMERS_SPECS = {
    "phikon": ("phikon_hf_v4", "phikon_hf_v5"),
    "hibou-b": ("hibou_b_hf_v4", "hibou_b_hf_v5"),
    "hibou-l": ("hibou_l_hf_v4",),
    "phikon-v2": ("phikon_v2_hf_v4", "phikon_v2_hf_v5"),
    "midnight": ("midnight12k_hf_v4",),
    "vit-b-tv": ("tv_vit_b_16",),
    "vit-h-swag": ("tv_vit_h_14",),
    # google's two files have the names and the shape of these
    "vit-b": ("phikon_hf_v4", "phikon_hf_v5"),
    "vit-h": ("tv_vit_h_14",),
}
TIMM_SPECS = {
    "phikon": "phikon_timm_equiv",
    "uni": "uni",
    "virchow": "virchow",
    "virchow2": "virchow2",
    "h-optimus-0": "h_optimus_0",
    "h-optimus-1": "h_optimus_1",
    "prov-gigapath": "prov_gigapath",
    "uni2-h": "uni2_h",
    "h0-mini": "h0_mini",
    "phikon-v2": "phikon_v2_timm_equiv",
    "hibou-b": "hibou_b_timm_equiv",
    "hibou-l": "hibou_l_timm_equiv",
    "midnight": "midnight12k_timm_equiv",
    "kaiko-s16": "kaiko_vits16",
    "kaiko-b16": "kaiko_vitb16",
    "kaiko-l14": "kaiko_vitl14",
    "lunit-s16": "lunit_vits16",
    "lunit-s8": "lunit_vits8",
    "dinov2-s": "timm_vit_small_patch14_dinov2",
    "dinov2-b": "timm_vit_base_patch14_dinov2",
    "dinov2-l": "timm_vit_large_patch14_dinov2",
    "dinov2-g": "timm_vit_giant_patch14_dinov2",
}


def shapes(model):
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def on_meta(spec):
    with torch.device("meta"):
        return models.build(spec, size=spec.stored)


@pytest.fixture
def tiny(monkeypatch):
    """Rows of small networks, one per kind of embedding."""
    rows = {
        "tiny": Encoder("tiny", "", "MIT", 0, **TINY, files=("tiny.safetensors",)),
        "tiny-regs": Encoder(
            "tiny-regs",
            "",
            "MIT",
            0,
            **{**TINY, "patch": 14},
            mlp="swiglu",
            registers=4,
            pos="patches",
            pool="cls+mean",
            norm=OPTIMUS,
        ),
    }
    for name, row in rows.items():
        monkeypatch.setitem(models.ENCODERS, name, row)
    return rows


def patches(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, 224, 224, 3), dtype=np.uint8)


# ---------------------------------------------------------------- the table


@pytest.mark.parametrize("name", [*references.TIMM, *references.EQUIVALENT])
def test_names_shapes_and_parameters_are_the_reference(name):
    """The whole depth, on meta, at the resolution of the published file."""
    spec = models.ENCODERS[name]
    network, reference = on_meta(spec), references.timm_model(name)
    assert shapes(network) == shapes(reference)
    assert sum(p.numel() for p in network.parameters()) == spec.params
    assert [b.norm1.eps for b in reference.blocks] == [
        1e-6
    ] * spec.depth  # timm's; the table may say otherwise
    assert spec.eps == (1e-12 if spec.repo.startswith("google/") else 1e-6)
    assert spec.heads == reference.blocks[0].attn.num_heads


def test_every_row_has_a_reference():
    assert {row.name for row in ROWS} == {
        "demo",
        "resnet50",
        *references.TIMM,
        *references.EQUIVALENT,
        *references.SWIN,
        *references.DINOV3,
        "conch-v1.5",
    }


@pytest.mark.parametrize("name", references.SWIN)
def test_a_swin_transformer_is_timms(name):
    spec, reference = models.ENCODERS[name], references.swin_model(name)
    network = on_meta(spec)
    theirs = {k: v for k, v in shapes(reference).items() if not k.endswith("batches_tracked")}
    assert shapes(network) == theirs
    assert sum(p.numel() for p in network.parameters()) == spec.params
    assert len(network.blocks) == spec.depth
    blocks = [block for stage in reference.layers for block in stage.blocks]
    assert [block.norm1.eps for block in blocks] == [spec.eps] * spec.depth


@pytest.mark.parametrize("name", references.DINOV3)
def test_dinov3_is_timms(name):
    """Of all depth, on meta; its files have biases of queries and values, timm's may have none."""
    spec, reference = models.ENCODERS[name], references.dinov3_timm(name, depth=None, bias=False)
    plan, _ = rename(reference.state_dict())
    theirs = shapes(reference)
    joined = {}
    for ours, parts in plan.items():
        joined[ours] = (sum(theirs[part][0] for part in parts), *theirs[parts[0]][1:])
        if len(parts) == 1:
            joined[ours] = theirs[parts[0]]
    if spec.qkv_bias:
        joined |= {f"blocks.{i}.attn.qkv.bias": (3 * spec.dim,) for i in range(spec.depth)}
    assert shapes(on_meta(spec)) == joined
    parameters = sum(p.numel() for p in reference.parameters())
    assert spec.params == parameters + spec.qkv_bias * spec.depth * 3 * spec.dim
    assert {block.norm1.eps for block in reference.blocks} == {spec.eps}
    assert spec.heads == reference.blocks[0].attn.num_heads


def test_conch_is_a_vit_and_a_pooler():
    reference = references.Conch(24)
    plan, _ = rename(reference.state_dict())
    theirs = shapes(reference)
    spec = models.ENCODERS["conch-v1.5"]
    assert shapes(on_meta(spec)) == {ours: theirs[name] for ours, (name,) in plan.items()}
    assert spec.params == sum(p.numel() for p in reference.parameters())


def test_resnet50_is_torchvisions():
    from torchvision.models import resnet50

    with torch.device("meta"):
        reference = resnet50()
    spec = models.ENCODERS["resnet50"]
    theirs = {k: v for k, v in shapes(reference).items() if not k.startswith("fc.")}
    assert shapes(on_meta(spec)) == theirs
    assert (
        sum(p.numel() for p in reference.parameters())
        == spec.params + 2048 * 1000 + 1000
        == 25_557_032
    )


def test_parameters_with_torchvisions_heads():
    assert models.ENCODERS["vit-b-tv"].params + 768 * 1000 + 1000 == 86_567_656
    assert models.ENCODERS["vit-h-swag"].params + 1280 * 1000 + 1000 == 632_045_800


def test_a_network_with_a_field_reads_the_middle_alone():
    spec = dataclasses.replace(models.ENCODERS["demo"], field=64, patch=16, pool="cls")
    network = models.build(spec)
    cropped = models.ViT(spec, size=64)
    cropped.load_state_dict(network.state_dict())
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    assert torch.equal(network(images), cropped(images[:, :, 80:144, 80:144]))


def test_demo_parameters():
    spec = models.ENCODERS["demo"]
    assert sum(p.numel() for p in on_meta(spec).parameters()) == spec.params


@pytest.mark.parametrize("name", [row.name for row in ROWS if row.name != "demo"])
def test_normalisation(name):
    assert models.ENCODERS[name].norm == references.NORMALISATION.get(name, references.IN)


def model_spec(name):
    root = os.environ.get("MITOSIS_REALDATA")
    file = Path(root or ".").parent / "reference" / "model_specs" / f"{name}.json"
    if not root or not file.exists():
        pytest.skip("the collected names of published files are not here")
    return json.loads(file.read_text())


def expanded(spec, block):
    """All names with shapes: the listed ones, block 0 repeated over the depth."""
    found = {name: tuple(shape) for name, shape in spec["non_block"].items()}
    for i in range(spec["depth"]):
        found |= {
            name.replace(block.format(0), block.format(i), 1): tuple(shape)
            for name, shape in spec["block0"].items()
        }
    return found


@pytest.mark.parametrize("name", TIMM_SPECS)
def test_collected_names(name):
    collected = model_spec(TIMM_SPECS[name])
    network = on_meta(models.ENCODERS[name])
    assert shapes(network) == expanded(collected, "blocks.{}.")
    assert sum(p.numel() for p in network.parameters()) == collected["total_params"]
    spec = models.ENCODERS[name]
    assert (spec.eps, spec.heads, 1 + spec.registers) == tuple(
        collected[fact] for fact in ("norm_eps", "num_heads", "num_prefix_tokens")
    )


def test_collected_names_of_resnet50():
    collected = model_spec("tv_resnet50")
    theirs = {
        name: tuple(shape)
        for part in ("non_block", "block0")
        for name, shape in collected[part].items()
    }
    ours = shapes(on_meta(models.ENCODERS["resnet50"]))
    assert len(ours) == collected["n_tensors"] - 2  # fc's two
    assert theirs.items() - ours.items() == {("fc.weight", (1000, 2048)), ("fc.bias", (1000,))}


@pytest.mark.parametrize(
    "name, file", [(n, f) for n, files in TRANSFORMERS_SPECS.items() for f in files]
)
def test_collected_names_are_translated(name, file):
    collected = model_spec(file)
    block = next(
        b
        for b in ("encoder.layers.encoder_layer_{}.", "encoder.layer.{}.", "layers.{}.")
        if next(iter(collected["block0"])).startswith(b.format(0))
    )
    theirs = expanded(collected, block)
    if "n_tensors" in collected:
        assert len(theirs) == collected["n_tensors"]
    plan, _ = rename(theirs)
    ours = {}
    for target, names in plan.items():
        first = theirs[names[0]]
        ours[target] = (sum(theirs[n][0] for n in names), *first[1:]) if len(names) > 1 else first
    expected = shapes(on_meta(models.ENCODERS[name]))
    if name.startswith("hibou"):  # the class token's position embedding is added to the class token
        ours["pos_embed"] = (1, ours["pos_embed"][1] - 1, ours["pos_embed"][2])
    assert ours == expected


# ---------------------------------------------------------------- embeddings


def filled(spec, **choices):
    with torch.device("meta"):
        network = models.build(spec, **choices)
    network.spec = spec
    return references.fill(network).eval()


@pytest.mark.parametrize(
    "patch, middle", [(16, slice(5, 9)), (14, slice(6, 10)), (8, slice(10, 18))]
)
def test_pools(patch, middle):
    spec = Encoder("x", "", "MIT", 0, **{**TINY, "patch": patch}, registers=2, pos="patches")
    x = references.noise(2 * 3 * 224 * 224, 3).view(2, 3, 224, 224)
    with torch.inference_mode():
        whole = filled(spec, pool="mean")
        tokens = whole.tokens(x)
        for block in whole.blocks:
            tokens = block(tokens)
        tokens = whole.norm(tokens)
        grid = tokens[:, 3:].unflatten(1, (224 // patch, 224 // patch))
        expected = {
            "cls": tokens[:, 0],
            "mean": tokens[:, 3:].mean(1),
            "cls+mean": torch.cat([tokens[:, 0], tokens[:, 3:].mean(1)], 1),
            "patch-center": grid[:, middle, middle].mean((1, 2)),
            "cls+center": torch.cat([tokens[:, 0], grid[:, middle, middle].mean((1, 2))], 1),
        }
        for pool, value in expected.items():
            network = filled(spec, pool=pool)
            assert network.embed_dim == value.shape[1]
            torch.testing.assert_close(network(x), value, rtol=1e-5, atol=1e-5)
            assert embed_dim(spec, pool) == value.shape[1]


@pytest.mark.parametrize("dtype, bound", [(torch.bfloat16, 2e-2), (torch.float32, 1e-5)])
def test_attention_and_its_gradients_in_training(dtype, bound):
    generator = torch.Generator().manual_seed(0)
    q, k, v, g = (torch.randn(2, 3, 17, 8, generator=generator).to(dtype) for _ in range(4))
    found, wanted = [], []
    for one, exact in ((found, False), (wanted, True)):
        leaves = [(t.double() if exact else t.clone()).requires_grad_() for t in (q, k, v)]
        scores = leaves[0] @ leaves[1].transpose(-2, -1) / 8**0.5
        out = scores.softmax(-1) @ leaves[2] if exact else attention(*leaves)
        out.backward(g.to(out.dtype))
        one += [out.detach().double(), *(leaf.grad.double() for leaf in leaves)]
    for a, b in zip(found, wanted):
        assert (a - b).norm() / b.norm() < bound


def test_layer_reads_an_earlier_block_after_the_final_norm():
    reference = references.fill(references.timm_model("kaiko-s16", depth=4))
    spec = dataclasses.replace(models.ENCODERS["kaiko-s16"], depth=4)
    x = references.noise(2 * 3 * 224 * 224, 3).view(2, 3, 224, 224)
    with torch.inference_mode():
        for layer in (1, 3, 4):
            with torch.device("meta"):
                network = models.build(spec, layer=layer)
            state = {k: v for k, v in reference.state_dict().items() if k in network.state_dict()}
            network.load_state_dict(state, assign=True)
            ((_, prefix),) = reference.get_intermediate_layers(
                x, n=[layer - 1], norm=True, return_prefix_tokens=True
            )
            torch.testing.assert_close(network(x), prefix[:, 0], rtol=1e-5, atol=1e-5)


def test_what_cannot_be_chosen():
    for choices, word in (
        (dict(pool="max"), "--pool max"),
        (dict(layer=0), "--layer 0"),
        (dict(layer=13), "1 to 12"),
    ):
        with pytest.raises(UserError, match=word):
            models.load_encoder("kaiko-s16", "random", **choices)
    for choices in (dict(pool="cls"), dict(layer=1)):
        with pytest.raises(UserError, match="resnet50 is a ResNet and has one embedding"):
            models.load_encoder("resnet50", "random", **choices)
        with pytest.raises(UserError, match="swin-t is a Swin and has one embedding"):
            models.load_encoder("swin-t", "random", **choices)
    with pytest.raises(UserError, match="unknown encoder; choose among demo, phikon"):
        models.load_encoder("vit")


def test_random_weights(tiny):
    a, b = (models.load_encoder("tiny-regs", "random") for _ in range(2))
    x = references.noise(2 * 3 * 224 * 224, 3).view(2, 3, 224, 224)
    with torch.inference_mode():
        assert torch.equal(a(x), b(x)) and a(x).isfinite().all()
        assert (a(x)[0] - a(x)[1]).norm() > 1e-2 * a(x)[0].norm()
    assert (
        a.weights_hash == "random" and a.licence == "MIT" and a.embed_dim == 96 and not a.training
    )
    assert models.load_encoder("resnet50", "random", dtype="bf16")(x.bfloat16()).isfinite().all()


@pytest.mark.parametrize("shape", [(5, 48), (2, 7, 48)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_is_torchs(shape, bias):
    """With a gradient and without (another library on CPUs), in every precision, under autocast
    too.
    """
    torch.manual_seed(0)
    layer, plain = Linear(48, 32, bias=bias), torch.nn.Linear(48, 32, bias=bias)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(shape)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                mine, its = layer.to(dtype)(x.to(dtype)), plain.to(dtype)(x.to(dtype))
                assert (
                    mine.dtype == dtype and mine.shape == its.shape and mine.requires_grad == grad
                )
                torch.testing.assert_close(
                    mine, its, rtol=0, atol=2e-2 if dtype == torch.bfloat16 else 2e-6
                )
    layer.float()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


def test_linear_layers_are_named_as_in_timm(tiny):
    """What LoRA looks for: replacing these modules must change the result."""
    encoder = models.load_encoder("tiny", "random")
    x = references.noise(3 * 224 * 224, 3).view(1, 3, 224, 224)
    for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
        layer = encoder.blocks[1].get_submodule(name)
        assert isinstance(layer, torch.nn.Linear)
        before = encoder(x)
        handle = layer.register_forward_hook(lambda module, args, out: 3 * out)
        assert (encoder(x) - before).abs().max() > 1e-3, name
        handle.remove()


# ---------------------------------------------------------------- the classifier


@pytest.mark.parametrize("name", ["kaiko-s16", "lunit-s16", "dinov2-s"])
def test_classifier_normalises_as_published(name):
    encoder = models.load_encoder(name, "random", layer=1)
    model = models.PatchClassifier(encoder).eval()
    images = patches(2)
    mean, std = (np.array(v) for v in references.NORMALISATION.get(name, references.IN))
    x = torch.from_numpy(((images / 255 - mean) / std).transpose(0, 3, 1, 2)).float()
    with torch.inference_mode():
        torch.testing.assert_close(
            model.embed(torch.from_numpy(images)), encoder(x), rtol=1e-5, atol=1e-5
        )
        model.mean += 0.02  # another normalisation is seen
        assert (model.embed(torch.from_numpy(images)) - encoder(x)).abs().max() > 1e-4


def test_classifier_takes_bytes_and_floats(tiny):
    model = models.PatchClassifier(models.load_encoder("tiny-regs", "random")).eval()
    images = torch.from_numpy(patches(3))
    with torch.inference_mode():
        logits = model(images)
        assert logits.shape == (3,) and logits.dtype == torch.float32
        torch.testing.assert_close(
            model(images.permute(0, 3, 1, 2) / 255), logits, rtol=1e-6, atol=1e-6
        )
        torch.testing.assert_close(model.classify(model.embed(images)), logits, rtol=0, atol=0)
    assert {k for k in model.state_dict() if not k.startswith("encoder.")} == {
        "head.weight",
        "head.bias",
    }


def test_classifier_keeps_the_head_in_float32(tiny):
    for dtype in (torch.bfloat16, torch.float64):
        model = models.PatchClassifier(models.load_encoder("tiny", "random", dtype=dtype)).eval()
        wanted = torch.float64 if dtype == torch.float64 else torch.float32
        assert model.head.weight.dtype == model.embed(torch.from_numpy(patches(1))).dtype == wanted
    model = models.PatchClassifier(models.load_encoder("tiny", "random"))
    with torch.autocast("cpu", torch.bfloat16):
        assert model(torch.from_numpy(patches(1))).dtype == torch.float32


def test_tta_is_the_mean_over_flips_and_turns(tiny):
    model = models.PatchClassifier(models.load_encoder("tiny", "random"), tta=True).eval()
    plain = models.PatchClassifier(model.encoder).eval()
    plain.head = model.head
    images = patches(2)
    views = [np.rot90(v, k, (1, 2)).copy() for v in (images, images[:, :, ::-1]) for k in range(4)]
    with torch.inference_mode():
        expected = torch.stack([plain(torch.from_numpy(v)) for v in views]).mean(0)
        torch.testing.assert_close(model(torch.from_numpy(images)), expected, rtol=1e-5, atol=1e-5)
        assert len({round(plain(torch.from_numpy(v))[0].item(), 6) for v in views}) == 8
        model.train()
        torch.testing.assert_close(model(torch.from_numpy(images)), plain(torch.from_numpy(images)))


def test_compiles_without_graph_breaks(tiny):
    for name in ("tiny", "tiny-regs"):
        model = models.PatchClassifier(models.load_encoder(name, "random")).eval()
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        images = torch.from_numpy(patches(2))
        with torch.inference_mode():
            torch.testing.assert_close(compiled(images), model(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "name, pool", [("tiny", "cls"), ("tiny-regs", "cls+mean"), ("tiny-regs", "patch-center")]
)
def test_exports_with_a_dynamic_batch(tiny, name, pool):
    model = models.PatchClassifier(models.load_encoder(name, "random", pool=pool)).eval()
    program = torch.export.export(
        model,
        (torch.from_numpy(patches(2)),),
        dynamic_shapes=({0: torch.export.Dim("n", min=1, max=512)},),
    )
    for count in (1, 5):
        images = torch.from_numpy(patches(count, seed=1))
        with torch.inference_mode():
            torch.testing.assert_close(
                program.module()(images), model(images), rtol=1e-5, atol=1e-5
            )


# ---------------------------------------------------------------- predict


class Reader:
    """Patches that know who read them."""

    def __init__(self, count, broken=None):
        self.array, self.asked, self.threads, self.broken = patches(count), [], set(), broken

    def __len__(self):
        return len(self.array)

    def read(self, rows):
        self.asked.append(list(rows))
        self.threads.add(threading.current_thread().name)
        if self.broken is not None and self.broken in rows:
            raise UserError(f"patch {self.broken} cannot be read")
        return self.array[rows]


@pytest.fixture
def classifier(tiny):
    torch.manual_seed(0)
    return models.PatchClassifier(models.load_encoder("tiny-regs", "random")).eval()


def test_predict(classifier):
    reader = Reader(11)
    with torch.inference_mode():
        expected = classifier(torch.from_numpy(reader.array)).numpy()
        embeddings = classifier.embed(torch.from_numpy(reader.array)).numpy()
    for size in (1, 4, 11, 64):
        found = models.predict(classifier, reader, batch_size=size, progress=None)
        assert found.dtype == np.float32 and found.shape == (11,)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    rows = [7, 2, 2, 10]
    np.testing.assert_allclose(
        models.predict(classifier, reader, rows, batch_size=3), expected[rows], rtol=1e-5, atol=1e-5
    )
    np.testing.assert_allclose(
        models.predict(classifier, reader, batch_size=4, output="embedding"),
        embeddings,
        rtol=1e-5,
        atol=1e-5,
    )
    np.testing.assert_allclose(
        models.predict(classifier, reader.array, batch_size=4), expected, rtol=1e-5, atol=1e-5
    )
    kept = []
    models.predict(
        classifier, reader, [7, 2, 2, 10], batch_size=3, keep=lambda *batch: kept.append(batch)
    )
    assert [own.tolist() for own, _ in kept] == [[7, 2, 2], [10]]
    np.testing.assert_allclose(
        np.concatenate([values for _, values in kept]), expected[rows], rtol=1e-5, atol=1e-5
    )
    assert threading.current_thread().name not in reader.threads
    assert models.predict(classifier, reader, []).shape == (0,)
    assert models.predict(classifier, reader, [], output="embedding").shape == (0, 96)


def test_predict_in_half_precision(classifier):
    reader = Reader(4)
    full = models.predict(classifier, reader)
    half = models.predict(classifier, reader, dtype="bf16")
    assert 0 < np.abs(half - full).max() < 0.05
    assert next(classifier.encoder.parameters()).dtype == torch.float32
    cast = models.PatchClassifier(models.load_encoder("tiny-regs", "random", dtype="bf16"))
    cast.head = classifier.head
    assert np.abs(models.predict(cast, reader) - full).max() < 0.05
    with pytest.raises(ValueError, match="load it in that precision"):
        models.predict(cast, reader, dtype="fp32")


def test_predict_restores_the_mode(classifier):
    for training in (True, False):
        classifier.train(training)
        models.predict(classifier, Reader(2))
        assert classifier.training is training


def test_predict_refuses_what_is_not_finite(classifier):
    with torch.no_grad():
        classifier.encoder.norm.bias[0] = float("nan")
    with pytest.raises(UserError, match="not a finite number .first at patch 3. in fp32"):
        models.predict(classifier, Reader(6), [3, 4], batch_size=1)


def test_predict_passes_on_the_readers_error_and_leaves_no_thread(classifier):
    before = threading.active_count()
    with pytest.raises(UserError, match="patch 5 cannot be read"):
        models.predict(classifier, Reader(40, broken=5), batch_size=2)
    with torch.no_grad():
        classifier.head.bias[0] = float("nan")
    with pytest.raises(UserError, match="finite"):
        models.predict(classifier, Reader(40), batch_size=1)
    assert threading.active_count() == before


# ---------------------------------------------------------------- device and precision


def test_devices_and_precisions(monkeypatch, capsys):
    assert models.resolve_device("cpu").type == "cpu"
    for name in ("gpu", "meta:x", *([] if torch.cuda.is_available() else ["cuda", "cuda:3"])):
        with pytest.raises(UserError, match=f"--device {name}"):
            models.resolve_device(name)
    assert models.resolve_dtype("auto", "cpu") == torch.float32
    assert models.resolve_dtype("bf16", torch.device("cpu")) == torch.bfloat16
    for capability, expected in (
        ((7, 5), torch.float32),
        ((8, 0), torch.bfloat16),
        ((9, 0), torch.bfloat16),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        assert models.resolve_dtype("auto", "cuda", models.ENCODERS["uni"]) == expected
    with pytest.raises(UserError, match="--dtype half"):
        models.resolve_dtype("half", "cpu")
    models.resolve_dtype("fp16", "cpu", models.ENCODERS["virchow"])
    assert not capsys.readouterr().err
    models.resolve_dtype("fp16", "cpu", models.ENCODERS["uni"])
    assert "does not advise fp16" in capsys.readouterr().err


# ---------------------------------------------------------------- finished runs


@pytest.fixture
def base(tiny, tmp_path):
    """A weights file of the row "tiny", and its encoder."""
    encoder = models.load_encoder("tiny", "random")
    save_file(encoder.state_dict(), tmp_path / "tiny.safetensors")
    return tmp_path / "tiny.safetensors"


def make_run(folder, base, method, state, **flags):
    encoder = models.load_encoder("tiny", base)
    flags = dict(model="tiny", method=method, pool=None, layer=None, **flags)
    common.write_json(
        folder / "config.json",
        {"flags": flags, "encoder": {"name": "tiny", "weights_hash": encoder.weights_hash}},
    )
    save_file(state, folder / "model.safetensors")
    return folder


def test_load_probe_run(base, tmp_path):
    model = models.PatchClassifier(models.load_encoder("tiny", base)).eval()
    run = make_run(tmp_path / "run", base, "probe", model.head.state_dict(prefix="head."))
    loaded, config = checkpoint.load_run(run, base)
    images = torch.from_numpy(patches(2))
    assert torch.equal(loaded(images), model(images)) and not loaded.training
    assert config["flags"]["method"] == "probe"
    make_run(
        tmp_path / "run", base, "probe", model.head.state_dict(prefix="head."), weights=str(base)
    )
    assert torch.equal(checkpoint.load_run(run)[0](images), model(images))


def test_load_full_run_needs_no_base_weights(base, tmp_path):
    model = models.PatchClassifier(models.load_encoder("tiny", base)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.01)
    run = make_run(tmp_path / "run", base, "full", model.state_dict())
    base.unlink()
    images = torch.from_numpy(patches(2))
    assert torch.equal(checkpoint.load_run(run)[0](images), model(images))


def test_load_lora_run(base, tmp_path):
    lora = pytest.importorskip("lora")
    model = models.PatchClassifier(models.load_encoder("tiny", base))
    lora.add_lora(model.encoder, rank=4, alpha=8, dropout=0.1)
    model.eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.normal_(0, 0.2)
    state = {f"encoder.{k}": v for k, v in lora.lora_state_dict(model.encoder).items()}
    run = make_run(
        tmp_path / "run",
        base,
        "lora",
        {**state, **model.head.state_dict(prefix="head.")},
        rank=4,
        alpha=8,
        dropout=0.1,
        targets=["qkv", "proj", "fc1", "fc2"],
    )
    images = torch.from_numpy(patches(2))
    plain = models.PatchClassifier(models.load_encoder("tiny", base)).eval()
    plain.head = model.head
    with torch.inference_mode():
        expected = model(images)
        assert (expected - plain(images)).abs().max() > 1e-3
        torch.testing.assert_close(checkpoint.load_run(run, base)[0](images), expected)
        merged = checkpoint.load_run(run, base, merge=True)[0]
        torch.testing.assert_close(merged(images), expected, rtol=1e-5, atol=1e-5)
    assert type(merged.encoder.blocks[0].attn.qkv) is Linear


def test_load_run_refuses(base, tiny, tmp_path):
    head = models.PatchClassifier(models.load_encoder("tiny", base)).head.state_dict(prefix="head.")
    run = make_run(tmp_path / "run", base, "probe", head)
    with pytest.raises(UserError, match="no such file"):
        checkpoint.load_run(tmp_path / "nowhere")
    other = {k: v + 1 for k, v in models.load_encoder("tiny", base).state_dict().items()}
    save_file(other, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="trained on other weights of tiny"):
        checkpoint.load_run(run, tmp_path / "other.safetensors")
    save_file({**head, "extra": torch.zeros(1)}, run / "model.safetensors")
    with pytest.raises(UserError, match=r"1 unexpected \(extra\)"):
        checkpoint.load_run(run, base)
    save_file({"head.weight": head["head.weight"]}, run / "model.safetensors")
    with pytest.raises(UserError, match=r"1 missing \(head.bias\)"):
        checkpoint.load_run(run, base)
    save_file(
        {"head.weight": torch.zeros(1, 7), "head.bias": torch.zeros(1)}, run / "model.safetensors"
    )
    with pytest.raises(UserError, match="head.weight"):
        checkpoint.load_run(run, base)
    (run / "model.safetensors").write_bytes(b"123")
    with pytest.raises(UserError, match="truncated"):
        checkpoint.load_run(run, base)
    (run / "model.safetensors").unlink()
    with pytest.raises(UserError, match="not a finished run"):
        checkpoint.load_run(run, base)
    common.write_json(run / "config.json", {})
    with pytest.raises(UserError):
        checkpoint.load_run(run, base)


# ---------------------------------------------------------------- the command


def command(monkeypatch, capsys, *arguments):
    monkeypatch.setattr("sys.argv", ["models.py", *map(str, arguments)])
    models.main()
    return capsys.readouterr().out


def test_the_table_is_printed(monkeypatch, capsys):
    for name in ("tiny", "wide"):  # of other tests
        monkeypatch.delitem(models.ENCODERS, name, raising=False)
    monkeypatch.setattr(weights, "reachable", lambda: False)
    for name in list(models.ENCODERS):
        if not models.ENCODERS[name].repo and name != "demo":  # of other tests
            monkeypatch.delitem(models.ENCODERS, name)
    out = command(monkeypatch, capsys)
    for name, spec in models.ENCODERS.items():
        line = next(line for line in out.splitlines() if line.split()[:1] == [name])
        assert spec.licence in line and str(spec.embed_dim) in line
    assert max(map(len, out.splitlines())) <= 120
    rows = json.loads(command(monkeypatch, capsys, "--json"))
    assert rows["virchow"]["embed_dim"] == 2560 and rows["uni"]["gated"]


@pytest.mark.parametrize(
    "name", ["resnet50", "uni", "h0-mini", "dinov3-s-plus", "ctranspath", "swin-b", "conch-v1.5"]
)
def test_flops_are_torchs_count(name):
    from torch.utils.flop_counter import FlopCounterMode

    spec = models.ENCODERS[name]
    with torch.device("meta"):
        pool = "attention" if spec.pooler else "mean"
        network = models.build(spec, pool=pool).eval()
        images = torch.empty(1, 3, spec.size, spec.size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(images)
    assert flops(spec) == pytest.approx(counter.get_total_flops(), rel=2e-3)


def test_a_file_is_verified(monkeypatch, capsys, base):
    out = command(monkeypatch, capsys, "tiny", "--weights", base, "--device", "cpu")
    assert models.load_encoder("tiny", base).weights_hash in out
    assert "ms per image" in out and "first four" in out
    assert (
        out.splitlines()[3]
        == command(monkeypatch, capsys, "tiny", "--weights", base, "--device", "cpu").splitlines()[
            3
        ]
    )
    with pytest.raises(UserError, match="no such file"):
        command(monkeypatch, capsys, "tiny", "--weights", base.parent / "other")
