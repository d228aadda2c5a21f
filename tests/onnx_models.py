"""Small networks of every architecture family, runs made of them, and exported models, for the tests."""

import dataclasses
import json

import numpy as np
import torch
from safetensors.torch import save_file

import classify
import emit
import models
import runs

SMALL = dict(dim=64, depth=2, heads=2, hidden=128, params=0, repo="", licence="MIT", files=("x.safetensors",))
FAMILIES = {
    "gelu": models.Encoder("tiny-gelu", **SMALL, patch=16),
    "swiglu": models.Encoder("tiny-swiglu", **SMALL, patch=14, mlp="swiglu", layerscale=True, registers=4,
                             pos="patches", norm=models.OPTIMUS),
    "clsmean": models.Encoder("tiny-clsmean", **SMALL, patch=28, mlp="swiglu", layerscale=True, registers=4,
                              pool="cls+mean"),
    "torchvision": models.Encoder("tiny-tv", **SMALL, patch=16, keys="torchvision", eps=1e-5),
    "resnet50": dataclasses.replace(models.ENCODERS["resnet50"], name="tiny-resnet50", repo="", files=("x.safetensors",)),
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
            noise = torch.randn(value.shape, generator=generator) if value.is_floating_point() else None
            if family == "resnet50":
                if value.dim() == 4:  # He's initialisation, so that images come through 50 layers
                    value.copy_(noise * (2 / value[0].numel()) ** 0.5)
                elif noise is not None:
                    value.copy_((1 + 0.2 * noise).clamp(0.3) * (0.6 if name.endswith("weight") else 1)
                                if name.endswith(("weight", "var")) else 0.2 * noise)
            elif value.dim() > 1:
                value.copy_(noise * (0.5 if "token" in name or "pos" in name else 1.5 / value[0].numel() ** 0.5))
            else:
                value.copy_((1 if name.endswith("weight") or "gamma" in name else 0) + 0.3 * noise)
    network.weights_hash, network.licence = "random", "MIT"
    return network


def classifier(family, seed=0, **choices):
    model = models.PatchClassifier(encoder(family, seed, **choices)).eval()
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


def patches(n, seed=0, size=224):
    """Blobs on pink: smooth, with structure, not two alike."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[0:size, 0:size] / size
    out = np.empty((n, size, size, 3), np.uint8)
    for i in range(n):
        image = np.array([230, 190, 220.])[None, None] * np.ones((size, size, 1))
        for _ in range(6):
            cx, cy, r = generator.uniform(0.1, 0.9, 2).tolist() + [generator.uniform(0.02, 0.15)]
            blob = np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / (2 * r * r))[..., None]
            image = image * (1 - blob) + blob * generator.uniform(30, 160, 3)
        out[i] = np.clip(image + generator.normal(0, 6, image.shape), 0, 255)
    return out


METADATA = {"version": 1, "encoder": "tiny", "pool": "cls", "method": "lora", "dataset": "none", "licence": "MIT",
            "redistribution": "yes", "mpp": 0.25, "size": 224, "patch": 224, "fit": "resize", "temperature": 1.0,
            "labels": ["hard negative", "mitotic figure"], "threshold": {"value": 0.5, "rule": "given"},
            "metrics": {}, "commit": "none", "weights_hash": "0" * 64, "normalisation": models.IMAGENET,
            "parity": {"source": "nothing", "wanted": "nothing", "measured": []}, "data_bytes": 0}


def write_model(path, model, precision="fp32", opset=23, input="uint8", metadata=(), inline=True, **choices):
    """Emit `model` with metadata, as export.py would; returns the ModelProto."""
    weights = path.with_name(path.name + ".data")
    extra = {"precision": precision, "opset": opset, "input": input, "export_id": "ab" * classify.TRAILER}
    with open(weights, "wb") as file:
        proto = emit.emit(model, file, precision, opset, input, **choices)
        file.write(bytes.fromhex(extra["export_id"]))
        extra["data_bytes"] = 0 if inline else file.tell()
    extra["data_name"] = weights.name
    proto.metadata_props.add(key="format", value=classify.FORMAT)
    for key, value in {**METADATA, **extra, **dict(metadata)}.items():
        proto.metadata_props.add(key=key, value=json.dumps(value, default=runs._plain))
    emit.save(proto, weights, path, inline)
    if inline:
        weights.unlink()
    return proto


def save_weights(path, network):
    save_file({name: value.contiguous() for name, value in network.state_dict().items()
               if not name.endswith("num_batches_tracked")}, path)
