"""Published weights through load_encoder: equal to the reference implementation, in every published
format.
"""

import dataclasses
import hashlib
import http.server
import json
import os
import pickle
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
import references
import torch
from safetensors.torch import load_file, save_file

import models
import weights
from common import UserError
from encoders import layers, swin, vit
from encoders.names import rename
from encoders.table import ROWS

DEPTH = 2
STAGES = (2, 2, 2, 2)  # of a Swin transformer
ALL = [row.name for row in ROWS if row.name not in ("demo", "dinov3-7b")]


@pytest.fixture(autouse=True)
def two_blocks(monkeypatch):
    """Real width, two blocks: the table with another depth."""
    for name, spec in models.ENCODERS.items():
        shallow = dataclasses.replace(spec, depth=min(spec.depth, DEPTH))
        if spec.stages:
            shallow = dataclasses.replace(spec, depth=sum(STAGES), stages=STAGES)
        monkeypatch.setitem(models.ENCODERS, name, shallow)


@pytest.fixture
def folder():
    # Not tmp_path, which pytest keeps: these files are hundreds of megabytes.
    with tempfile.TemporaryDirectory() as path:
        yield Path(path)


def images(count=5, size=224):
    return references.noise(count * 3 * size * size, 11).view(count, 3, size, size)


def reference(name, depth=DEPTH):
    """(state dict as published, function images → embedding, convertible with .double())."""
    if name in references.TIMM:
        model = references.fill(references.timm_model(name, depth=depth))
        state, run = (
            dict(model.state_dict()),
            Reference(name, resampled(name, model, depth), "forward_features"),
        )
    elif name == "conch-v1.5":
        model = references.fill(references.Conch(depth)).eval()
        state, run = dict(model.state_dict()), Reference(name, model, None)
    elif name in references.SWIN:
        model = references.fill(references.swin_model(name, STAGES if depth == DEPTH else None))
        state = {k: v for k, v in model.state_dict().items() if not k.endswith("tracked")}
        run = Reference(name, model, "swin")
    elif name in references.DINOV3:
        state = dict(references.dinov3_transformers(name, depth).state_dict())
        model = references.fill(references.dinov3_timm(name, depth))
        model.load_state_dict(references.dinov3_timm_names(state))
        run = Reference(name, model, "forward_features")
    elif name in references.TRANSFORMERS:
        model = references.fill(references.transformers_model(name, depth))
        state, run = dict(model.state_dict()), Reference(name, model, "last_hidden_state")
    elif name in references.DINOV2:
        source = references.fill(references.transformers_model(name, depth))
        state = dict(source.state_dict())
        run = Reference(
            name, resampled(name, timm_of_dinov2(name, state, depth), depth), "forward_features"
        )
    elif name == "resnet50":
        from torchvision.models import resnet50

        with torch.device("meta"):
            model = resnet50().eval()
        state = dict(references.fill(model).state_dict())
        model.fc = torch.nn.Identity()
        run = Reference(name, model, None)
    else:
        model = references.fill(references.torchvision_model(name, depth))
        state = dict(model.state_dict())
        model.heads = torch.nn.Identity()
        run = Reference(name, model, None)
    return state, run


class Reference:
    def __init__(self, name, model, output):
        self.name, self.model, self.output = name, model, output

    @torch.inference_mode()
    def __call__(self, x):
        self.model.to(x.dtype)
        if self.output == "forward_features":
            return references.embedding_of(self.name, self.model.forward_features(x))
        if self.output == "swin":
            return self.model.forward_features(x).mean((1, 2))
        if self.output == "last_hidden_state":
            return references.embedding_of(self.name, self.model(x).last_hidden_state)
        return self.model(x)


def resampled(name, model, depth):
    """timm's network at 224 px with the weights of one at another resolution, by timm's own
    resampling.
    """
    from timm.layers import resample_abs_pos_embed

    if model.patch_embed.img_size == (224, 224):
        return model
    small = references.timm_model(name, depth=depth, img_size=224).to_empty(device="cpu")
    prefix = 0 if model.no_embed_class else model.num_prefix_tokens
    state = dict(model.state_dict())
    state["pos_embed"] = resample_abs_pos_embed(
        state["pos_embed"], small.patch_embed.grid_size, num_prefix_tokens=prefix
    )
    small.load_state_dict(state)
    return small


def timm_of_dinov2(name, state, depth):
    """timm's DINOv2 with the weights of transformers', put in block by block."""
    model = references.timm_model(name, depth=depth).to_empty(device="cpu")
    state = references.old_names(state)
    mine = {
        "cls_token": state["embeddings.cls_token"],
        "pos_embed": state["embeddings.position_embeddings"],
        "norm.weight": state["layernorm.weight"],
        "norm.bias": state["layernorm.bias"],
        "patch_embed.proj.weight": state["embeddings.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": state["embeddings.patch_embeddings.projection.bias"],
    }
    for i in range(depth):
        theirs, ours = f"encoder.layer.{i}.", f"blocks.{i}."
        for leaf in ("weight", "bias"):
            mine[f"{ours}attn.qkv.{leaf}"] = torch.cat(
                [
                    state[f"{theirs}attention.attention.{part}.{leaf}"]
                    for part in ("query", "key", "value")
                ]
            )
            mine[f"{ours}attn.proj.{leaf}"] = state[f"{theirs}attention.output.dense.{leaf}"]
            for norm in ("norm1", "norm2"):
                mine[f"{ours}{norm}.{leaf}"] = state[f"{theirs}{norm}.{leaf}"]
            for fc, names in (("fc1", ("fc1", "weights_in")), ("fc2", ("fc2", "weights_out"))):
                found = [
                    state[f"{theirs}mlp.{n}.{leaf}"]
                    for n in names
                    if f"{theirs}mlp.{n}.{leaf}" in state
                ]
                (mine[f"{ours}mlp.{fc}.{leaf}"],) = found
        for k in (1, 2):
            mine[f"{ours}ls{k}.gamma"] = state[f"{theirs}layer_scale{k}.lambda1"]
    if "embeddings.register_tokens" in state:
        mine["reg_token"] = state["embeddings.register_tokens"]
        mine["cls_token"] = mine["cls_token"] + mine["pos_embed"][:, :1]
        mine["pos_embed"] = mine["pos_embed"][:, 1:]
    model.load_state_dict(mine)
    return model


def publish(name, state, folder):
    """Save `state` as the weights of `name` are published: file name, format and names of the
    tensors.
    """
    spec = models.ENCODERS[name]
    if name == "openmidnight":
        state = references.dinov2_native_names(state, state["cls_token"] / 2)
    if name == "keep":
        state = {re.sub(r"(ls\d)\.gamma", r"\1.weight", k): v for k, v in state.items()}
        state = {f"visual.{k}": v for k, v in state.items()}
        state |= {"visual_head.0.weight": torch.ones(2, 2), "text.pooler.weight": torch.ones(2, 2)}
    if name.startswith("sp"):
        state = {f"encoder.{k}": v for k, v in state.items()}
    if spec.keys == "transformers" and not name.startswith("dinov3"):
        state = references.old_names(state)
        if spec.repo.startswith("google/"):
            state["pooler.dense.weight"] = state.get(
                "pooler.dense.weight", torch.zeros(spec.dim, spec.dim)
            )
        else:
            state = {k: v for k, v in state.items() if not k.startswith("pooler")}
    if name.startswith("vit-") and spec.keys == "torchvision":  # the names before torchvision 0.13
        state = {
            k.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."): v
            for k, v in state.items()
        }
    file = folder / spec.files[0]
    if file.suffix == ".safetensors":
        save_file({k: v.contiguous() for k, v in state.items()}, file, metadata={"format": "pt"})
    else:
        torch.save(state, file)
    return file


def relative(a, b):
    """The largest difference, relative to the length of the reference embedding."""
    assert a.shape == b.shape and a.isfinite().all()
    return ((a.double() - b.double()).norm(dim=-1) / b.double().norm(dim=-1)).max().item()


def embed(name, file, x, **choices):
    encoder = models.load_encoder(name, file, dtype=x.dtype, **choices)
    with torch.inference_mode():
        return encoder(x)


def assert_parity(name, folder, doubles=1, count=5):
    """fp32 within 1e-5 for batches of 5 and 1; fp64 within 1e-12 (where no position embedding is
    resampled).
    """
    state, run = reference(name)
    file = publish(name, state, folder)
    x = images(count, models.ENCODERS[name].size)
    expected = run(x)
    assert expected.std(0).mean() > 1e-3  # the embedding depends on the image
    encoder = models.load_encoder(name, file)
    assert encoder.embed_dim == expected.shape[1] == models.ENCODERS[name].embed_dim
    with torch.inference_mode():
        assert relative(encoder(x), expected) < 1e-5
        assert relative(encoder(x[:1]), expected[:1]) < 1e-5
    if doubles:
        x = x[:doubles].double()
        spec = models.ENCODERS[name]
        limit = 1e-12 if spec.stored == spec.size else 1e-6
        assert relative(embed(name, file, x), run(x)) < limit


def quick(name):
    """Whether a row's test is among the quick ones: of the large networks, one of each kind."""
    large = models.ENCODERS[name].dim > 1024 and not models.ENCODERS[name].stages
    return not large or name in ("virchow2", "prov-gigapath", "openmidnight")


@pytest.mark.parametrize("name", filter(quick, ALL))
def test_equals_the_reference(name, folder):
    doubles = 0  # large networks: below
    if models.ENCODERS[name].dim <= 1024:
        doubles = 1
    assert_parity(name, folder, doubles, count=2 if name == "conch-v1.5" else 5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_equals_the_reference_in_double_for_a_batch(name, folder):
    assert_parity(name, folder, doubles=5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        *("dinov2-s", "lunit-s8", "h0-mini", "kaiko-l14", "hibou-b"),
        *("dinov3-s", "dinov3-s-plus", "ctranspath", "swin-b"),
        pytest.param("virchow2", marks=pytest.mark.long),  # 5 GB
    ],
)
def test_equals_the_reference_at_full_depth(name, folder, monkeypatch):
    monkeypatch.undo()
    depth = models.ENCODERS[name].depth
    state, run = reference(name, depth)
    file = publish(name, state, folder)
    x = images(2)
    assert relative(embed(name, file, x), run(x)) < 1e-5


# ---------------------------------------------------------------- what the parity tests would catch


def swapped(self, x):
    value, gate = self.fc1(x).chunk(2, dim=-1)
    return self.fc2(torch.nn.functional.silu(gate) * value)


def test_swapped_gate_is_caught(folder, monkeypatch):
    monkeypatch.setattr(layers.SwiGLU, "forward", swapped)
    with pytest.raises(AssertionError):
        assert_parity("h0-mini", folder, doubles=0, count=2)


def test_dropped_register_positions_are_caught(folder, monkeypatch):
    def tokens(self, x):
        x = self.patch_embed(x)
        prefix = torch.cat([self.cls_token + self.pos_embed[:, :1], self.reg_token], dim=1)
        return torch.cat([prefix.expand(len(x), -1, -1), x + self.pos_embed[:, 5:]], dim=1)

    monkeypatch.setattr(vit.ViT, "tokens", tokens)
    with pytest.raises(AssertionError):
        assert_parity("virchow2", folder, doubles=0, count=2)


def test_other_eps_is_caught(folder, monkeypatch):
    monkeypatch.setitem(
        models.ENCODERS, "phikon", dataclasses.replace(models.ENCODERS["phikon"], eps=1e-12)
    )
    with pytest.raises(AssertionError):
        assert_parity("phikon", folder, count=2)


def test_resampling_without_antialias_is_caught(folder, monkeypatch):
    true = torch.nn.functional.interpolate
    monkeypatch.setattr(
        weights.F, "interpolate", lambda x, **kw: true(x, **{**kw, "antialias": False})
    )
    with pytest.raises(AssertionError):
        state, _ = reference("dinov2-s")
        file = publish("dinov2-s", state, folder)
        mine = models.load_encoder("dinov2-s", file)
        monkeypatch.undo()
        expected = resampled("dinov2-s", timm_of_dinov2("dinov2-s", state, DEPTH), DEPTH).pos_embed
        assert relative(mine.pos_embed.detach(), expected) < 1e-5


def test_another_shift_of_windows_is_caught(folder, monkeypatch):
    monkeypatch.setattr(swin, "SHIFT", 2)
    with pytest.raises(AssertionError):
        assert_parity("swin-t", folder, doubles=0, count=2)


def test_a_missing_mask_of_windows_is_caught(folder, monkeypatch):
    monkeypatch.setattr(swin, "NEVER", 0.0)
    with pytest.raises(AssertionError):
        assert_parity("swin-t", folder, doubles=0, count=2)


@pytest.mark.slow
def test_another_scale_of_the_pooler_is_caught(folder, monkeypatch):
    attend = vit.attention
    monkeypatch.setattr(
        vit, "attention", lambda q, k, v: attend(q * 1.1 if q.shape[2] == 1 else q, k, v)
    )
    with pytest.raises(AssertionError):
        assert_parity("conch-v1.5", folder, doubles=0, count=2)


@pytest.mark.slow
def test_other_positions_of_conch_are_caught(folder, monkeypatch):
    spec = dataclasses.replace(models.ENCODERS["conch-v1.5"], resample="timm")
    monkeypatch.setitem(models.ENCODERS, "conch-v1.5", spec)
    with pytest.raises(AssertionError):
        assert_parity("conch-v1.5", folder, doubles=0, count=2)


def axes_swapped(cos, sin):
    cos, sin = (factor.clone() for factor in (cos, sin))
    for factor in cos, sin:
        factor[5:] = factor[5:].unflatten(0, (14, 14)).transpose(0, 1).flatten(0, 1)
    return cos, sin


def registers_turned(cos, sin):
    cos, sin = (factor.clone() for factor in (cos, sin))
    cos[1:5], sin[1:5] = cos[5:9], sin[5:9]
    return cos, sin


@pytest.mark.parametrize("change", [axes_swapped, registers_turned])
def test_other_rotary_factors_are_caught(folder, monkeypatch, change):
    factors = vit.rotary_factors
    monkeypatch.setattr(vit, "rotary_factors", lambda *given: change(*factors(*given)))
    with pytest.raises(AssertionError):
        assert_parity("dinov3-s", folder, doubles=0, count=2)


# ---------------------------------------------------------------- other sizes


@pytest.mark.parametrize("name, size", [("kaiko-s16", 160), ("dinov2-s", 518), ("dinov3-s", 288)])
def test_another_size_equals_timm(name, size, folder):
    """The position embedding is resampled by timm's function, or is stored for this size, or is
    computed.
    """
    from timm.layers import resample_abs_pos_embed

    state, run = reference(name)
    x = images(2, size)
    if name == "kaiko-s16":
        theirs = references.timm_model(name, depth=DEPTH, img_size=size).to_empty(device="cpu")
        pos = resample_abs_pos_embed(state["pos_embed"], (size // 16,) * 2)
        theirs.load_state_dict(state | {"pos_embed": pos})
    elif name == "dinov2-s":
        theirs = timm_of_dinov2(name, state, DEPTH)
    else:
        theirs = run.model
    with torch.inference_mode():
        expected = theirs.forward_features(x)[:, 0]
    encoder = models.load_encoder(name, publish(name, state, folder), size=size)
    assert encoder.size == size
    with torch.inference_mode():
        assert relative(encoder(x), expected) < 1e-5


def test_sizes_that_do_not_fit():
    for name, size, words in (
        ("kaiko-s16", 230, "multiples of its patches of 16 px, such as 224"),
        ("kaiko-s16", 0, "such as 16"),
        ("dinov2-s", 320, "such as 322"),
        ("resnet50", 448, "reads patches of 224 px only"),
        ("swin-t", 448, "reads patches of 224 px only"),
        ("demo", 448, "reads patches of 224 px only"),
    ):
        with pytest.raises(UserError, match=words):
            models.load_encoder(name, "random", size=size)


# ---------------------------------------------------------------- formats


def loaded(name, state, folder, wrap=None):
    """Hash of the weights and embedding of two images, by way of a file."""
    file = folder / "weights.pth"
    torch.save(wrap(state) if wrap else state, file)
    encoder = models.load_encoder(name, file)
    with torch.inference_mode():
        return encoder.weights_hash, encoder(images(2))


@pytest.mark.parametrize("name", ["dinov3-s", "dinov3-s-plus"])
def test_dinov3_in_the_names_of_three_publishers(name, folder):
    state = dict(references.dinov3_transformers(name, DEPTH).state_dict())
    timms = references.dinov3_timm_names(state)
    native = references.dinov3_native_names(timms)
    earlier = {re.sub(r"^model\.layer\.", "layer.", k): v for k, v in state.items()}
    assert earlier.keys() != state.keys()
    first, embedding = loaded(name, state, folder)
    for other in (earlier, timms, native):
        found, same = loaded(name, other, folder)
        assert found == first and torch.equal(same, embedding)
    # The distilled models' biases are all zero, and timm's files leave them out.
    without = {k: v for k, v in timms.items() if not k.endswith(("q_bias", "v_bias"))}
    zero = {k: torch.zeros_like(v) if k.endswith("_bias") else v for k, v in timms.items()}
    assert loaded(name, without, folder)[0] == loaded(name, zero, folder)[0] != first
    del timms["blocks.1.attn.q_bias"]
    with pytest.raises(UserError, match=r"blocks.1.attn.qkv.bias \[384\] instead of \[1152\]"):
        loaded(name, timms, folder)


@pytest.mark.parametrize("name", ["dinov3-s", "dinov3-s-plus"])
def test_dinov3_equals_transformers(name, folder, monkeypatch):
    """Its angles are always products of float32 numbers; in double precision the test gives it
    those of timm, whose angles have the precision of the network.
    """
    from transformers.models.dinov3_vit import modeling_dinov3_vit as theirs_module

    theirs = references.dinov3_transformers(name, DEPTH)
    save_file(dict(theirs.state_dict()), folder / "model.safetensors")
    x = images(2)
    with torch.inference_mode():
        assert relative(embed(name, folder, x), theirs(x).last_hidden_state[:, 0]) < 1e-5
    theirs.double()
    centres = theirs_module.get_patches_center_coordinates
    monkeypatch.setattr(
        theirs_module, "get_patches_center_coordinates", lambda *a, **k: centres(*a, **k).double()
    )
    (rope,) = [m for m in theirs.modules() if hasattr(m, "inv_freq")]
    rope.inv_freq = 1 / (100 ** (torch.arange(16) * 2 / 32)).double()
    x = x.double()
    with torch.inference_mode():
        assert relative(embed(name, folder, x), theirs(x).last_hidden_state[:, 0]) < 1e-12


def early_swin(state):
    """Names of timm 0.5.4 and of the original, with the buffers and classifier of their files."""
    old = {"head.weight": torch.zeros(1000, 768), "head.bias": torch.zeros(1000)}
    for name, tensor in state.items():
        name = re.sub(r"^layers\.(\d)\.down", lambda m: f"layers.{int(m[1]) - 1}.down", name)
        old[name] = tensor
        if name.endswith("relative_position_bias_table"):
            block = name.removesuffix("attn.relative_position_bias_table")
            old[f"{block}attn.relative_position_index"] = torch.zeros(49, 49, dtype=torch.int64)
            old[f"{block}attn_mask"] = torch.zeros(64, 49, 49)
    return old


def test_swin_in_the_layout_of_early_timm(folder):
    state, _ = reference("ctranspath")
    first, embedding = loaded("ctranspath", state, folder)
    old = early_swin(state)
    assert "layers.0.downsample.reduction.weight" in old and "layers.0.downsample.norm.bias" in old
    counted = old | {"patch_embed.proj.1.num_batches_tracked": torch.tensor(5)}
    for other, wrap in ((old, None), (counted, lambda inner: {"model": inner})):
        found, same = loaded("ctranspath", other, folder, wrap)
        assert found == first and torch.equal(same, embedding)
    refused(folder / "weights.pth", "not the weights of swin-t", name="swin-t")


def prefixed(start):
    return lambda state: {f"{start}{name}": tensor for name, tensor in state.items()}


def dino(state):
    """A training state of DINO: both networks with their heads, and more beside them."""
    networks = {}
    for network, factor in (("student", 0.5), ("teacher", 1.0)):
        networks[network] = {f"backbone.{name}": factor * t for name, t in state.items()}
        networks[network]["head.last_layer.weight"] = torch.ones(2, 2)
    return {**networks, "epoch": 3, "optimizer": {"state": {}}}


def dinov2(state):
    """A training state of DINOv2: both networks in one."""
    model = {"dino_loss.center": torch.ones(1, 2)}
    for network, factor in (("student", 0.5), ("teacher", 1.0)):
        model |= {f"{network}.backbone.{name}": factor * t for name, t in state.items()}
        model[f"{network}.dino_head.mlp.0.weight"] = torch.ones(2, 2)
    return {"model": model, "iteration": 7}


WRAPPED = {
    "module": prefixed("module."),
    "compiled": prefixed("_orig_mod."),
    "both": prefixed("module._orig_mod."),
    "backbone": prefixed("backbone."),
    "encoder": prefixed("encoder."),
    "open_clip": prefixed("visual.trunk."),
    "lightning": lambda state: {"state_dict": prefixed("model.")(state), "epoch": 1},
    "model_state_dict": lambda state: {"model_state_dict": state, "loss": 0.5},
    "dino": dino,
    "dinov2": dinov2,
    "with a head": lambda state: {**state, "head.weight": torch.ones(2, 384)},
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_what_trainers_put_around_the_names(kind, small, folder):
    first, embedding = loaded("kaiko-s16", small[0], folder)
    found, same = loaded("kaiko-s16", small[0], folder, WRAPPED[kind])
    assert found == first and torch.equal(same, embedding)


def test_several_encoders_in_one_file_are_refused(small, folder):
    both = prefixed("left.")(small[0]) | prefixed("right.")(small[0])
    torch.save(both, folder / "weights.pth")
    refused(folder / "weights.pth", "holds several encoders (left., right.)")


def test_a_refusal_names_what_the_file_holds(small, folder):
    torch.save({"net": small[0], "epoch": 3}, folder / "weights.pth")
    refused(folder / "weights.pth", "holds no state dict", "epoch, net")
    torch.save({"model": {"generator": {}, "step": 1}}, folder / "weights.pth")
    refused(folder / "weights.pth", "generator, step")
    torch.save(prefixed("tower.vision_")(small[0]), folder / "weights.pth")
    refused(folder / "weights.pth", "unexpected (tower.vision_blocks.0.attn.proj.bias")


@pytest.fixture(scope="module")
def small():
    """kaiko-s16 with two blocks: state dict and the embedding of two images."""
    model = references.fill(references.timm_model("kaiko-s16", depth=DEPTH))
    return dict(model.state_dict()), Reference("kaiko-s16", model, "forward_features")(images(2))


def shard(state, folder, stem, save):
    names = sorted(state)
    parts = {f"{stem[0]}-0000{i + 1}-of-00002.{stem[1]}": names[i::2] for i in range(2)}
    for file, mine in parts.items():
        save({k: state[k] for k in mine}, folder / file)
    index = {"metadata": {}, "weight_map": {k: file for file, mine in parts.items() for k in mine}}
    (folder / f"{stem[0]}.{stem[1]}.index.json").write_text(json.dumps(index))


def test_every_container_gives_the_same(small, tmp_path):
    state, expected = small
    hashes = set()
    for kind in ("safetensors", "bin", "old bin", "sharded safetensors", "sharded bin", "wrapped"):
        folder = tmp_path / kind
        folder.mkdir()
        if kind == "safetensors":
            save_file(state, folder / "model.safetensors")
        elif kind == "bin":
            torch.save(state, folder / "pytorch_model.bin")
        elif kind == "old bin":
            torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
        elif kind == "wrapped":
            torch.save({"state_dict": state}, folder / "checkpoint.pth")
        elif kind == "sharded safetensors":
            shard(state, folder, ("model", "safetensors"), save_file)
        else:
            shard(state, folder, ("pytorch_model", "bin"), torch.save)
        encoder = models.load_encoder("kaiko-s16", folder)
        with torch.inference_mode():
            assert relative(encoder(images(2)), expected) < 1e-5, kind
        hashes.add(encoder.weights_hash)
    assert len(hashes) == 1


def test_transformers_4_and_5_names_give_the_same(folder):
    for name in ("phikon", "hibou-b", "phikon-v2", "midnight"):
        model = references.fill(references.transformers_model(name, 1))
        state = {k: v for k, v in model.state_dict().items() if not k.startswith("pooler")}
        generations = []
        # as the installed version writes them, and both ways that files have
        for names in (state, references.new_names(state), references.old_names(state)):
            plan, kind = rename(names)
            assert kind == "transformers"
            generations.append(
                {
                    ours: torch.cat([names[n] for n in theirs])
                    if len(theirs) > 1
                    else names[theirs[0]]
                    for ours, theirs in plan.items()
                }
            )
        assert set(references.new_names(state)) != set(references.old_names(state))
        first, *others = generations
        for other in others:
            assert first.keys() == other.keys()
            assert all(torch.equal(first[k], other[k]) for k in first)


def test_torchvision_names_of_both_ages():
    names = list(references.torchvision_model("vit-b-tv", 2).state_dict())
    old = [n.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2.") for n in names]
    assert (
        rename(names)[0].keys()
        == rename(old)[0].keys()
        == set(references.timm_model("vit-b-tv", depth=2).state_dict())
    )


def test_mask_token_and_pooler_are_the_only_things_left_out(folder):
    model = references.fill(references.transformers_model("dinov2-s", DEPTH))
    state = references.old_names(dict(model.state_dict()))
    assert "embeddings.mask_token" in state
    file = publish("dinov2-s", dict(model.state_dict()), folder)
    models.load_encoder("dinov2-s", file)
    save_file({**state, "classifier.weight": torch.zeros(2, 384)}, file)
    with pytest.raises(UserError, match=r"1 unexpected \(classifier.weight\)"):
        models.load_encoder("dinov2-s", file)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16, torch.float16])
def test_precisions(small, tmp_path, stored, wanted):
    state = {k: v.to(stored) for k, v in small[0].items()}
    save_file(state, tmp_path / "model.safetensors")
    encoder = models.load_encoder("kaiko-s16", tmp_path, dtype=wanted)
    for name, tensor in encoder.state_dict().items():
        assert tensor.dtype == wanted
        assert torch.equal(tensor, state[name].to(wanted)), name


def test_the_file_may_change_after_loading(small, tmp_path):
    state, expected = small
    file = tmp_path / "model.safetensors"
    save_file(state, file)
    encoder = models.load_encoder("kaiko-s16", file)
    with open(file, "r+b") as stream:
        stream.truncate(100)
    with torch.inference_mode():
        assert relative(encoder(images(2)), expected) < 1e-5


def test_layers_left_out_are_checked_all_the_same(small, tmp_path):
    state, _ = small
    save_file(
        {k: v for k, v in state.items() if "blocks.1.mlp" not in k}, tmp_path / "model.safetensors"
    )
    with pytest.raises(UserError, match="4 missing"):
        models.load_encoder("kaiko-s16", tmp_path, layer=1)


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="reads Linux's account of the process"
)
@pytest.mark.slow
def test_memory_peaks_near_the_size_of_the_network(tmp_path):
    """A fp32 file read as bf16: the process grows by little more than the network."""
    code = """
import dataclasses, re, sys, torch
import models
models.ENCODERS["uni"] = dataclasses.replace(models.ENCODERS["uni"], depth=6)
# not ru_maxrss, which a process inherits from the one that started it
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
before = peak()
encoder = models.load_encoder("uni", sys.argv[1], dtype=torch.bfloat16)
print(peak() - before)
"""
    state = references.fill(references.timm_model("uni", depth=6)).state_dict()
    size = sum(t.numel() for t in state.values()) * 2 / 2**20  # of the network in bf16, MiB
    for name in ("pytorch_model.bin", "model.safetensors"):
        file = tmp_path / name
        torch.save(state, file) if name.endswith("bin") else save_file(state, file)
        grown = float(
            subprocess.run(
                [sys.executable, "-c", code, str(file)],
                check=True,
                capture_output=True,
                cwd=Path(models.__file__).parent,
                text=True,
            ).stdout
        )
        file.unlink()
        # with the whole file mapped it would be three times the size
        assert 0.9 * size < grown < 1.5 * size, (name, grown, size)


# ---------------------------------------------------------------- real weights


def real(path):
    root = os.environ.get("MITOSIS_REALDATA")
    if not root or not (Path(root) / path).exists():
        pytest.skip("MITOSIS_REALDATA is not set")
    return Path(root) / path


def test_real_dinov2(monkeypatch):
    file = real("weights/dinov2_vits14_derived.safetensors")
    monkeypatch.undo()
    from timm.layers import resample_abs_pos_embed

    state = {k: v.float() for k, v in load_file(file).items()}
    state["pos_embed"] = resample_abs_pos_embed(state["pos_embed"], (16, 16))
    model = references.timm_model("dinov2-s", img_size=224).to_empty(device="cpu")
    model.load_state_dict(state)
    x = images()
    expected = Reference("dinov2-s", model, "forward_features")(x)
    assert relative(embed("dinov2-s", file, x), expected) < 1e-5
    assert relative(embed("dinov2-s", file, x[:1]), expected[:1]) < 1e-5


# ---------------------------------------------------------------- broken input


def refused(path, *words, name="kaiko-s16"):
    with pytest.raises(UserError) as caught:
        models.load_encoder(name, path)
    message = str(caught.value)
    assert "\n" not in message.strip() and len(message) < 700
    for word in words:
        assert word in message, message


def test_truncated_files(small, tmp_path):
    for name in ("model.safetensors", "pytorch_model.bin"):
        file = tmp_path / name
        save_file(small[0], file) if name.endswith("safetensors") else torch.save(small[0], file)
        whole = file.read_bytes()
        for keep in (0, 5, 1000, len(whole) // 2, len(whole) - 8):
            file.write_bytes(whole[:keep])
            refused(file, str(file), "truncated or not a weights file")


def test_not_weights_at_all(tmp_path):
    for name in ("model.safetensors", "pytorch_model.bin", "x.pth"):
        file = tmp_path / name
        for text in (
            "<html>Sign in to continue</html>" * 100,
            '\n{"error": "Not found"}',
            "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4539168745\n",
        ):
            file.write_text(text)
            refused(file, str(file), "not a weights file (a Git LFS pointer or a web page?)")
    file = tmp_path / "pytorch_model.bin"
    torch.save([1, 2], file)
    refused(file, "holds no state dict")


def test_wrong_architecture(small, tmp_path):
    file = tmp_path / "model.safetensors"
    save_file(small[0], file)
    refused(
        file,
        "not the weights of uni",
        "missing",
        "blocks.",
        "another shape",
        models.ENCODERS["uni"].page,
        name="uni",
    )
    refused(file, "not the weights of lunit-s8", "patch_embed.proj.weight", name="lunit-s8")
    refused(file, "not the weights of resnet50", "missing", name="resnet50")


def test_odd_tensors(small, tmp_path):
    file = tmp_path / "pytorch_model.bin"
    for odd in (
        torch.ones(384, dtype=torch.int32),
        torch.ones(384, dtype=torch.complex64),
        torch.tensor(1.0),
        torch.ones(384).to_sparse(),
        torch.ones(384, device="meta"),
        torch.ones(0),
    ):
        torch.save({**small[0], "norm.weight": odd}, file)
        refused(
            file,
            "norm.weight"
            if odd.layout == torch.strided and not odd.is_meta
            else "holds no state dict",
        )
    for odd in (
        torch.ones(3),
        torch.ones(1, 198, 384),
        torch.ones(1, 1, 384),
        torch.ones(1, 0, 384),
    ):
        torch.save({**small[0], "pos_embed": odd}, file)
        refused(file, "not the weights of kaiko-s16")
    torch.save({k: torch.nn.Parameter(v) for k, v in small[0].items()}, file)
    models.load_encoder("kaiko-s16", file)


def test_a_transformers_file_is_no_registers_model(folder):
    state, _ = reference("phikon-v2")
    refused(publish("phikon-v2", state, folder), "reg_token", name="hibou-l")


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_a_pickle_with_code_does_not_run(small, tmp_path):
    touched, file = tmp_path / "touched", tmp_path / "pytorch_model.bin"
    torch.save({**small[0], "evil": Evil(touched)}, file)
    refused(file, "which is never loaded", "safetensors")
    torch.save({**small[0], "evil": Evil(touched)}, file, _use_new_zipfile_serialization=False)
    refused(file, "which is never loaded")
    file.write_bytes(pickle.dumps(Evil(touched)))
    refused(file)
    assert not touched.exists()


def test_folders(small, tmp_path):
    refused(tmp_path, str(tmp_path), "no weights in this folder")
    refused(tmp_path / "nowhere", "no such file or folder", "huggingface.co")
    save_file(small[0], tmp_path / "a.safetensors")
    models.load_encoder("kaiko-s16", tmp_path)
    save_file(small[0], tmp_path / "b.safetensors")
    refused(tmp_path, "several weights files", "a.safetensors, b.safetensors")


def test_broken_index(small, tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    for text in (
        "{",
        "[]",
        '{"weight_map": []}',
        '{"weight_map": {}}',
        '{"weight_map": {"a": "../a.safetensors"}}',
        '{"weight_map": {"a": "/etc/passwd"}}',
        '{"weight_map": {"a": 3}}',
    ):
        index.write_text(text)
        refused(tmp_path, "not an index of weights files")
    index.write_text('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}')
    refused(tmp_path, "1 missing (model-00001-of-00002.safetensors)")


@pytest.fixture
def nobody():
    """The rights of a user who is not root (root reads everything)."""
    if os.geteuid():
        return (yield)
    try:
        os.seteuid(65534)
    except OSError:
        pytest.skip("root that cannot become another user")
    yield
    os.seteuid(0)


def test_no_permission(small, folder, request):
    closed = folder / "model.safetensors", folder / "pytorch_model.bin", folder / "closed"
    save_file(small[0], closed[0])
    torch.save(small[0], closed[1])
    closed[2].mkdir()
    save_file(small[0], closed[2] / "model.safetensors")
    folder.chmod(0o755)
    for path in closed:
        path.chmod(0)
    request.getfixturevalue("nobody")
    for path in closed:
        refused(path, str(path), "no permission")


# ---------------------------------------------------------------- the Hub


class Hub(http.server.BaseHTTPRequestHandler):
    """A stand-in for the Hub that answers as it does; `answers` maps a path to (status, error code,
    body).
    """

    answers, asked, default = {}, [], (404, "EntryNotFound", b"")
    breaks = None  # "cut": connections end before the body; "stall": the body never comes

    def do_HEAD(self):
        code, error, body = self.answers.get(self.path, self.default)
        self.asked.append((self.command, self.path, self.headers.get("authorization")))
        self.send_response(code)
        if error:
            self.send_header("X-Error-Code", error)
            self.send_header("X-Error-Message", error)
        if code == 200:
            self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
            self.send_header("X-Repo-Commit", "c" * 40)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        return body

    def do_GET(self):
        body = self.do_HEAD()
        if self.breaks == "stall":
            self.server.stalled.wait(1)
        if self.breaks:
            self.close_connection = True
        else:
            self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(monkeypatch, tmp_path):
    constants = pytest.importorskip("huggingface_hub.constants")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.stalled = threading.Event()  # never set: waiting that the tests' time.sleep leaves alone
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(
        constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        address + "/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    # What huggingface_hub read from the environment when it was imported.
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", False)
    for name in (
        "HF_TOKEN",
        "HUGGING_FACE_HUB_TOKEN",
        "HF_HUB_OFFLINE",
        "TRANSFORMERS_OFFLINE",
        "HTTPS_PROXY",
        "https_proxy",
        "HTTP_PROXY",
        "http_proxy",
        "ALL_PROXY",
        "all_proxy",
    ):
        monkeypatch.delenv(name, raising=False)
    forget = weights.reachable.cache_clear
    forget()
    monkeypatch.setattr(Hub, "answers", {})
    monkeypatch.setattr(Hub, "asked", [])
    monkeypatch.setattr(Hub, "breaks", None)
    yield Hub
    server.shutdown()
    server.server_close()
    forget()


def fails(name, *words, **choices):
    with pytest.raises(UserError) as caught:
        models.load_encoder(name, **choices)
    message = str(caught.value)
    for word in (*words, "--weights PATH", models.ENCODERS[name].page):
        assert word in message, message
    return message


def test_hub_download(hub, small, tmp_path):
    file = tmp_path / "model.safetensors"
    save_file(small[0], file)
    spec = models.ENCODERS["kaiko-s16"]
    assert spec.revision is None
    hub.answers[f"/{spec.repo}/resolve/main/model.safetensors"] = 200, None, file.read_bytes()
    encoder = models.load_encoder("kaiko-s16")
    assert encoder.weights_hash == models.load_encoder("kaiko-s16", file).weights_hash
    assert weights.availability(spec) == "cached"
    assert not [
        path for _, path, _ in hub.asked if path.endswith((".py", ".json"))
    ]  # weights and nothing else


def test_hub_is_used_from_the_cache_when_it_is_away(hub, small, tmp_path, monkeypatch):
    test_hub_download(hub, small, tmp_path)
    for away in ("offline", "unreachable"):
        with monkeypatch.context() as patch:
            if away == "offline":
                patch.setenv("HF_HUB_OFFLINE", "1")
            else:
                patch.setattr(weights, "reachable", lambda: False)
            asked = len(hub.asked)
            models.load_encoder("kaiko-s16")
            assert len(hub.asked) == asked


def test_hub_sharded(hub, small, tmp_path):
    shard(small[0], tmp_path, ("model", "safetensors"), save_file)
    spec = models.ENCODERS["kaiko-s16"]
    for file in tmp_path.glob("model*"):
        hub.answers[f"/{spec.repo}/resolve/main/{file.name}"] = 200, None, file.read_bytes()
    models.load_encoder("kaiko-s16")


def test_hub_no_token(hub):
    hub.default = 401, "GatedRepo", b""
    message = fails("uni", "gated", "no token", "accept the licence", "hf auth login")
    assert "cannot be reached" not in message
    assert weights.availability(models.ENCODERS["uni"]) == "needs token"


def test_hub_licence_not_accepted(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 30)
    hub.default = 403, "GatedRepo", b""
    message = fails("uni", "gated", "licence is not accepted", "accept the licence")
    assert "no token" not in message
    assert hub.asked[0][2].startswith("Bearer hf_")


def test_hub_invalid_token(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 30)
    hub.default = 401, None, b""
    fails("phikon", "token")


def test_hub_revision(hub):
    hub.default = 404, "RevisionNotFound", b""
    fails("phikon", "no revision 1234", "--revision main", revision="1234")
    assert all("/resolve/1234/" in path for _, path, _ in hub.asked)


def test_hub_pinned(hub):
    hub.default = 404, "RevisionNotFound", b""
    fails("vit-b", "no revision b4569560")


def test_hub_file_missing(hub):
    hub.default = 404, "EntryNotFound", b""
    fails("phikon", "holds none of model.safetensors, pytorch_model.bin")


def test_hub_repository_missing(hub):
    hub.default = 401, "RepoNotFound", b""
    fails("phikon", "cannot be seen without a token")


def test_hub_out_of_order(hub, monkeypatch):
    import huggingface_hub.utils._http as http_utils

    monkeypatch.setattr(http_utils.time, "sleep", lambda seconds: None)
    hub.default = 500, None, b""
    fails("phikon", "the Hub answered with status 500")


@pytest.mark.parametrize("breaks", ["cut", "stall"])
def test_hub_download_breaks_off(hub, monkeypatch, breaks):
    import huggingface_hub.file_download as client

    wait = time.sleep
    monkeypatch.setattr(client.time, "sleep", lambda seconds: wait(min(seconds, 0.01)))
    monkeypatch.setattr(client.constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.1)
    spec = models.ENCODERS["kaiko-s16"]
    hub.breaks = breaks
    hub.answers[f"/{spec.repo}/resolve/main/model.safetensors"] = 200, None, bytes(1000)
    message = fails("kaiko-s16", "download of kaiko-s16 broke off", "same command continues it")
    assert "\n" not in message


def test_no_network(hub, monkeypatch):
    monkeypatch.setattr(weights, "reachable", lambda: False)
    fails("phikon", "cannot be reached")
    fails("uni", "no token", "accept the licence")
    assert not hub.asked
    assert weights.availability(models.ENCODERS["phikon"]) == "no network"


def test_offline_mode(hub, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    fails("phikon", "HF_HUB_OFFLINE")
    fails("uni", "HF_HUB_OFFLINE")
    assert not hub.asked
    monkeypatch.setattr(torch.hub, "get_dir", lambda: "/nowhere")
    fails("vit-b-tv", "HF_HUB_OFFLINE")
    assert weights.availability(models.ENCODERS["phikon"]) == "offline"


def test_torchvision_download_is_checked(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    asked = []

    def fetch(url, target, hash_prefix):
        asked.append((url, hash_prefix))
        raise RuntimeError("invalid hash value")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    fails("vit-b-tv", "invalid hash")
    assert asked == [("https://download.pytorch.org/models/vit_b_16-c867db91.pth", "c867db91")]


@pytest.mark.parametrize(
    "address", ("http://127.0.0.1:99999", "http://[::1", "mirror.example", "ftp://mirror.example")
)
def test_an_address_of_the_hub_that_is_none(address, monkeypatch):
    from huggingface_hub import constants

    for name in weights.PROXIES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    weights.reachable.cache_clear()
    with pytest.raises(UserError, match="HF_ENDPOINT=.*: not an address"):
        weights.reachable()
