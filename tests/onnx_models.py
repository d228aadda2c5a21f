"""Small networks of every architecture family, runs made of them, and exported models, for the
tests.
"""

import contextlib
import dataclasses
import json
import subprocess

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.torch import save_file

import common
import models
import runs
from encoders import rounding
from encoders.table import IMAGENET, OPTIMUS, Encoder
from onnx_model import graph, parity, session

SMALL = dict(
    dim=64, depth=2, heads=2, hidden=128, params=0, repo="", licence="MIT", files=("x.safetensors",)
)
FAMILIES = {
    "gelu": Encoder("tiny-gelu", **SMALL, patch=16),
    "field": Encoder("tiny-field", **SMALL, patch=8, field=64, stored=64, pool="mean"),
    "swiglu": Encoder(
        "tiny-swiglu",
        **SMALL,
        patch=14,
        mlp="swiglu",
        layerscale=True,
        registers=4,
        pos="patches",
        norm=OPTIMUS,
    ),
    "clsmean": Encoder(
        "tiny-clsmean",
        **SMALL,
        patch=28,
        mlp="swiglu",
        layerscale=True,
        registers=4,
        pool="cls+mean",
    ),
    "dinov3": Encoder(
        "tiny-dinov3", **SMALL, patch=16, layerscale=True, registers=4, pos="rotary", eps=1e-5
    ),
    "conch": Encoder("tiny-conch", **SMALL, patch=16, layerscale=True, pool="attention", pooler=48),
    "swin": Encoder(
        "tiny-swin",
        **{**SMALL, "heads": 4, "depth": 4},
        patch=4,
        pos="window",
        pool="mean",
        eps=1e-5,
        stages=(2, 2),
        stem="convolutions",
    ),
    "torchvision": Encoder("tiny-tv", **SMALL, patch=16, keys="torchvision", eps=1e-5),
    "resnet50": dataclasses.replace(
        models.ENCODERS["resnet50"], name="tiny-resnet50", repo="", files=("x.safetensors",)
    ),
}


def register(monkeypatch):
    for spec in FAMILIES.values():
        monkeypatch.setitem(models.ENCODERS, spec.name, spec)


def encoder(family, seed=0, **choices):
    """An encoder whose every parameter, biases and LayerScale included, is something."""
    network = models.build(FAMILIES[family], **choices).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in network.state_dict().items():
            noise = (
                torch.randn(value.shape, generator=generator) if value.is_floating_point() else None
            )
            if family == "resnet50":
                if value.dim() == 4:  # He's initialisation, so that images come through 50 layers
                    value.copy_(noise * (2 / value[0].numel()) ** 0.5)
                elif noise is not None:
                    value.copy_(
                        (1 + 0.2 * noise).clamp(0.3) * (0.6 if name.endswith("weight") else 1)
                        if name.endswith(("weight", "var"))
                        else 0.2 * noise
                    )
            elif value.dim() > 1:
                value.copy_(
                    noise
                    * (0.5 if "token" in name or "pos" in name else 1.5 / value[0].numel() ** 0.5)
                )
            elif name.endswith("running_var"):
                value.copy_(0.5 + noise.abs())
            else:
                value.copy_((1 if name.endswith("weight") or "gamma" in name else 0) + 0.3 * noise)
            if family == "dinov3" and name.endswith("qkv.bias"):
                value[64:128] = 0  # the keys have none
    network.weights_hash, network.licence = "random", "MIT"
    return network


def classifier(family, seed=0, **choices):
    return with_head(encoder(family, seed, **choices), seed)


def with_head(network, seed=0):
    model = models.PatchClassifier(network).eval()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        model.head.weight.copy_(torch.randn(model.head.weight.shape, generator=generator) * 0.2)
        model.head.bias.copy_(0.1 * torch.randn(1, generator=generator))
        # logits around 0 with a spread of about 1, so that probabilities mean something
        z = model(torch.from_numpy(patches(16, seed=5)))
        scale = 1 / max(float(z.std()), 1e-6)
        model.head.weight.mul_(scale)
        model.head.bias.copy_((model.head.bias - z.mean()) * scale)
    return model


def allowed(model, images, precision="fp32"):
    """What the gate of the export allows: how far each probability may be from torch's [n], and an
    embedding relative to its length.
    """
    with torch.inference_mode():
        logits = model(torch.from_numpy(images)).numpy().astype(np.float64)
        embeddings = model.embed(torch.from_numpy(images)).numpy()
    bare = models.PatchClassifier(model.encoder, model.tta).eval()
    bare.head = None
    terms = rounding.longest_sum(model.encoder)
    gains = rounding.gain(model, images, logits), rounding.gain(bare, images, embeddings)
    bounds = [parity.bound(precision, gain, terms) for gain in gains]
    return parity.allowed_of_logits(logits, bounds[0]), bounds[1]


def patches(n, seed=0, size=224):
    """Blobs on pink: smooth, with structure, not two alike."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[0:size, 0:size] / size
    out = np.empty((n, size, size, 3), np.uint8)
    for i in range(n):
        image = np.array([230, 190, 220.0])[None, None] * np.ones((size, size, 1))
        for _ in range(6):
            cx, cy, r = generator.uniform(0.1, 0.9, 2).tolist() + [generator.uniform(0.02, 0.15)]
            blob = np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / (2 * r * r))[..., None]
            image = image * (1 - blob) + blob * generator.uniform(30, 160, 3)
        out[i] = np.clip(image + generator.normal(0, 6, image.shape), 0, 255)
    return out


METADATA = {
    "version": 1,
    "encoder": "tiny",
    "pool": "cls",
    "method": "lora",
    "dataset": "none",
    "licence": "MIT",
    "redistribution": "yes",
    "mpp": 0.25,
    "size": 224,
    "patch": 224,
    "fit": "resize",
    "temperature": 1.0,
    "labels": ["hard negative", "mitotic figure"],
    "threshold": {"value": 0.5, "rule": "given"},
    "metrics": {},
    "commit": "none",
    "weights_hash": "0" * 64,
    "normalisation": IMAGENET,
    "parity": {"source": "nothing", "wanted": "nothing", "measured": []},
    "data_bytes": 0,
}


def write_model(
    path, model, precision="fp32", opset=23, input_type="uint8", metadata=(), inline=True, **choices
):
    """Emit `model` with metadata, as export.py would; returns the ModelProto."""
    weights = path.with_name(path.name + ".data")
    extra = {
        "precision": precision,
        "opset": opset,
        "input": input_type,
        "export_id": "ab" * session.TRAILER,
    }
    with open(weights, "wb") as file:
        proto = graph.emit(model, file, precision, opset, input_type, **choices)
        file.write(bytes.fromhex(extra["export_id"]))
        extra["data_bytes"] = 0 if inline else file.tell()
    extra["data_name"] = weights.name
    proto.metadata_props.add(key="format", value=session.FORMAT)
    for key, value in {**METADATA, **extra, **dict(metadata)}.items():
        proto.metadata_props.add(key=key, value=json.dumps(value, default=common.plain))
    graph.save(proto, weights, path, inline)
    if inline:
        weights.unlink()
    return proto


def lacks_cuda(device):
    """Why ONNX Runtime cannot run on the "cuda" of a benchmark, or "": it is built without."""
    built_for_it = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    if device == "cuda" and not built_for_it:
        return "onnxruntime without CUDA"
    return ""


@contextlib.contextmanager
def mounted(path, options):
    """A small file system of its own at `path`, which is made: "size=8m", "ro"."""
    path.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "none", str(path)], capture_output=True
    ).returncode:
        pytest.skip("no right to mount")
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)


def save_weights(path, network):
    save_file({name: value.contiguous() for name, value in network.state_dict().items()}, path)


# ---------------------------------------------------------------- runs


def dataset(folder, images=20, each=6):
    """Small images of two kinds of blobs in MIDOG's format: labels that have something to do with
    the pixels.
    """
    from PIL import Image

    generator, annotations = np.random.default_rng(3), []
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(images):
        canvas = np.full((480, 480, 3), (235, 195, 222), np.float64)
        y, x = np.mgrid[0:480, 0:480]
        for j in range(each):
            cx, cy, label = *generator.uniform(60, 420, 2), int((i + j) % 2)
            flat, r = 2 if label else 1, generator.uniform(9, 16)
            blob = np.exp(-((x - cx) ** 2 + ((y - cy) * flat) ** 2) / (2 * r * r))
            canvas = canvas * (1 - blob[..., None]) + blob[..., None] * np.array(
                [90, 40, 130 if label else 90]
            )
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": i,
                    "category_id": 1 if label else 2,
                    "bbox": [cx - 25, cy - 25, cx + 25, cy + 25],
                }
            )
        canvas += generator.normal(0, 5, canvas.shape)
        Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8)).save(
            folder / f"{i}.tiff", resolution=40000, resolution_unit=3
        )
    (folder / "MIDOG.json").write_text(
        json.dumps(
            {
                "images": [
                    {"id": i, "file_name": f"{i}.tiff", "width": 480, "height": 480}
                    for i in range(images)
                ],
                "categories": [
                    {"id": 1, "name": "mitotic figure"},
                    {"id": 2, "name": "hard negative"},
                ],
                "annotations": annotations,
            }
        )
    )
    return folder / "MIDOG.json"


def teach(model, images, labels, steps):
    """Train all of a small network, so that it is no random one."""
    generator, images = torch.Generator().manual_seed(0), torch.from_numpy(images)
    labels = torch.from_numpy(labels).float()
    optimizer = torch.optim.AdamW(model.requires_grad_(True).parameters(), lr=4e-4)
    for _ in range(steps):
        batch = torch.randint(0, len(images), (16,), generator=generator)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(
            model(images[batch]).view(-1), labels[batch]
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.requires_grad_(False)


def make_run(path, family, method, folder, seed=0, taught=0):
    """A finished run, as train.py and probe.py leave it, with adapters that move the embedding; →
    its weights file.

    taught: steps of training before, of a full run. Returns (weights, the unmerged
    PatchClassifier)."""
    import data
    import lora
    from dataset import patches as patches_module

    spec = FAMILIES[family]
    path.mkdir(parents=True)
    weights = path / "base.safetensors"
    network = encoder(family, seed)
    save_weights(weights, network)
    network = models.load_encoder(spec.name, weights)
    table = data.load_dataset(folder / "MIDOG.json", images=folder)
    split = data.make_split(table)
    split.save(path / "split.json")
    rows = table.rows(split.val)[: 8 if family == "resnet50" else None]  # a tenth of a second each
    images = patches_module.Patches(table).read(rows)
    flags = {
        "data": "blobs",
        "model": spec.name,
        "method": method,
        "weights": str(weights),
        "frac": 1.0,
        "fold": 0,
        "seed": 0,
        "pool": None,
        "layer": None,
        "fit": "resize",
        "mpp": None,
        "rank": 4,
        "alpha": 4,
        "dropout": 0.1,
        "targets": ["qkv", "proj", "fc1", "fc2"],
    }
    before = models.PatchClassifier(network).eval().embed(torch.from_numpy(images[:4])).detach()
    state = {}
    if method == "lora":
        torch.manual_seed(7)  # of the A that lora.py draws
        lora.add_lora(network, rank=4, alpha=4, dropout=0.1)
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for name, value in network.named_parameters():
                if name.endswith("lora_B"):
                    value.copy_(torch.randn(value.shape, generator=generator) * 0.3)
        state = {f"encoder.{name}": value for name, value in lora.lora_state_dict(network).items()}
    model = models.PatchClassifier(network).eval()
    if taught:
        every = np.arange(len(table))
        teach(model, patches_module.Patches(table).read(every), table.label, taught)
    after = model.embed(torch.from_numpy(images[:4])).detach()
    moved = float((after - before).norm() / before.norm())
    assert method != "lora" or moved > 0.1, f"the adapter moves the embedding by {moved:.1%} only"
    every = (
        rows if family == "resnet50" else np.arange(len(table))
    )  # so that the classes are well apart
    embeddings = models.predict(
        model, patches_module.Patches(table).read(every), output="embedding", progress=None
    )
    embeddings = embeddings.astype(np.float64)
    # A head that leans on numbers which hardly vary would blow up the noise of float32.
    center, spread = embeddings.mean(0), embeddings.std(0)
    spread += 0.3 * spread.mean()
    sign = 2.0 * table.label[every] - 1
    w = ((embeddings - center) / spread * sign[:, None]).mean(0) / spread
    w *= 2 / ((embeddings - center) @ w).std()
    with torch.no_grad():
        model.head.weight.copy_(torch.from_numpy(w)[None])
        model.head.bias.copy_(torch.tensor([-float(center @ w)]))
    if method == "full":
        state = {
            name: value
            for name, value in model.state_dict().items()
            if not name.startswith("head.")
        }
    state |= {f"head.{name}": value for name, value in model.head.state_dict().items()}
    save_file(
        {k: v.detach().contiguous() for k, v in state.items()},
        path / "model.safetensors",
        {"format": f"{common.NAME}-run", "method": method, "encoder": spec.name},
    )
    logits = models.predict(model, images, progress=None)
    runs.write_predictions(
        path / "predictions.csv",
        {
            "set": ["val"] * len(rows),
            "id": table.id[rows],
            "case": table.case[rows],
            "domain": table.domain[rows],
            "label": table.label[rows],
            "logit": logits,
            "probability": 1 / (1 + np.exp(-logits.astype(np.float64))),
        },
    )
    common.write_json(
        path / "config.json",
        {
            "flags": flags,
            "data": {"name": "blobs", "mpp": 0.25},
            "encoder": {
                "name": spec.name,
                "licence": spec.licence,
                "weights_hash": network.weights_hash,
            },
            "source": {"data": str(folder / "MIDOG.json"), "images": str(folder), "fit": "resize"},
        },
    )
    common.write_json(path / "metrics.json", {"sets": {"val": {"auroc": 0.9}}})
    return weights, model
