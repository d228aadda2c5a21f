"""The encoders: one table, one vision transformer, and around them the classifier and the only
inference loop.

    python models.py                        every encoder: size, licence, and whether its weights
    can be had here
    python models.py NAME --weights PATH    check a file: strict load, hash, fingerprint of an
    embedding, speed

An encoder maps normalised images float [B, 3, 224, 224] to embeddings [B, D]. `PatchClassifier`
owns the normalisation and the head; `predict` is the loop that validation, test, embeddings and the
check of exports share. Reading what is published (file formats, names of the tensors, the Hub) is
the subject of weights.py."""

import argparse
import contextlib
import json
import queue
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import common
import weights as published
from common import UserError

SIZE = 224  # px, of every patch

# ---------------------------------------------------------------- the table

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
OPTIMUS = (0.707223, 0.578729, 0.703617), (0.211883, 0.230117, 0.177517)
HIBOU = (0.7068, 0.5755, 0.7220), (0.1950, 0.2316, 0.1816)
LUNIT = (0.70322989, 0.53606487, 0.66096631), (0.21716536, 0.26081574, 0.20723464)

SAFE_OR_BIN = ("model.safetensors", "pytorch_model.bin")
BIN_OR_SAFE = ("pytorch_model.bin", "model.safetensors")


@dataclass(frozen=True)
class Encoder:
    """A row of the table: what is published under a name, and the shape of the network it belongs
    to.
    """

    name: str
    # on the Hugging Face Hub; "torchvision/…": from download.pytorch.org; "": a file in here
    repo: str
    licence: str
    params: int  # of the network as published (at `stored` px), without head, pooler and mask token
    dim: int = 768
    depth: int = 12
    heads: int = 12
    patch: int = 16  # px
    # gelu: fc2(gelu(fc1 x)), exact erf | swiglu: a, b = halves of fc1 x; fc2(silu(a) * b)
    mlp: str = "gelu"
    hidden: int = 3072  # outputs of fc1; with swiglu both halves together
    layerscale: bool = False
    registers: int = 0
    pos: str = "all"  # which tokens carry a position embedding: all (registers too) | patches
    stored: int = (
        SIZE  # px the file's position embedding is for; another grid is resampled as timm does it:
    )
    #                         bicubic with antialias, in float32 (the rows with 518 say why)
    norm: tuple = IMAGENET  # mean, std of the normalisation
    pool: str = "cls"  # the published embedding: cls | cls+mean
    eps: float = 1e-6  # of every LayerNorm
    keys: str = (
        "timm"  # names in the published file: timm | transformers | torchvision (any is accepted)
    )
    files: tuple = SAFE_OR_BIN  # in the order in which they are asked for
    gated: bool = False  # the licence must be accepted on the Hub, by a logged-in user
    derivatives: bool = True  # False: the licence forbids passing on weights made from these (…-ND)
    fp16: bool = (
        False  # the publisher advises fp16 autocast; elsewhere fp16 is tried at one's own risk
    )
    revision: str | None = (
        None  # commit that a download is pinned to (those in public use); None: the newest
    )

    @property
    def embed_dim(self):
        return embed_dim(self, self.pool)

    @property
    def page(self):
        if self.repo.startswith("torchvision/"):
            return "https://docs.pytorch.org/vision/stable/models.html"
        return f"https://huggingface.co/{self.repo}" if self.repo else "the README"


def embed_dim(spec, pool):
    return 2 * spec.dim if pool == "cls+mean" else spec.dim


SMALL = dict(dim=384, depth=12, heads=6, hidden=1536)
BASE = dict(dim=768, depth=12, heads=12, hidden=3072)
LARGE = dict(dim=1024, depth=24, heads=16, hidden=4096)
HUGE = dict(dim=1280, depth=32, heads=16, patch=14)
GIANT = dict(dim=1536, depth=40, heads=24, patch=14, mlp="swiglu", hidden=8192, layerscale=True)
VIRCHOW = dict(
    **HUGE, mlp="swiglu", hidden=6832, layerscale=True, pool="cls+mean", fp16=True, gated=True
)
OPTIMUS_G = dict(**GIANT, registers=4, pos="patches", norm=OPTIMUS, fp16=True, gated=True)
# DINOv2 and Kaiko-L store their position embedding at 518 px. Here it is resampled as timm does it
# (antialias); the originals resample without antialias, which gives materially other embeddings.
# Kaiko publishes its model as a timm model, so timm's way is its own; for DINOv2 timm is the
# reference that most benchmarks (and these tests) use.
DINOV2 = dict(patch=14, layerscale=True, stored=518, keys="transformers")
NC, NC_ND = "non-commercial", "CC-BY-NC-ND-4.0"

ROWS = [
    # the demo's: made by demo/pretrain.py on synthetic tissue; says nothing about real tissue
    Encoder(
        "demo",
        "",
        "MIT",
        2_857_536,
        dim=192,
        depth=6,
        heads=3,
        hidden=768,
        layerscale=True,
        files=("demo/encoder.safetensors",),
    ),
    # the paper's nine
    Encoder(
        "phikon",
        "owkin/phikon",
        f"Owkin {NC}",
        85_798_656,
        **BASE,
        keys="transformers",
        revision="057cc0295895c2df3dd7681a89680da6015cbefe",
    ),
    Encoder(
        "uni",
        "MahmoodLab/UNI",
        NC_ND,
        303_350_784,
        **LARGE,
        layerscale=True,
        files=BIN_OR_SAFE,
        gated=True,
        derivatives=False,
        revision="b55a5ec6cade1a39edfe6534189a9b8ca7a022f0",
    ),
    Encoder(
        "virchow",
        "paige-ai/Virchow",
        "Apache-2.0",
        631_229_184,
        **VIRCHOW,
        revision="19eebc84ae33e79f1b2d866e6ff90ae50e522f9a",
    ),
    Encoder(
        "virchow2",
        "paige-ai/Virchow2",
        NC_ND,
        631_239_424,
        **VIRCHOW,
        registers=4,
        derivatives=False,
        revision="3158645804b69e3f3bc4439d4116edddf0840a72",
    ),
    Encoder(
        "h-optimus-0",
        "bioptimus/H-optimus-0",
        "Apache-2.0",
        1_134_774_272,
        **OPTIMUS_G,
        files=BIN_OR_SAFE,
        revision="b145cc1e6c6b30d3251aa8b1f844e6974188a743",
    ),
    # patch 16, whatever the name of timm's constructor says
    Encoder(
        "prov-gigapath",
        "prov-gigapath/prov-gigapath",
        "Apache-2.0",
        1_134_953_984,
        **{**GIANT, "patch": 16},
        files=BIN_OR_SAFE,
        gated=True,
        fp16=True,
        revision="eba85dd46097c3eedfcc2a3a9a930baecb6bcc19",
    ),
    Encoder(
        "resnet50",
        "torchvision/resnet50-11ad3fa6.pth",
        "BSD-3-Clause",
        23_508_032,
        dim=2048,
        depth=0,
        heads=0,
        patch=0,
        mlp="",
        hidden=0,
        pos="",
        pool="average",
        keys="torchvision",
        files=("resnet50-11ad3fa6.pth",),
    ),
    Encoder(
        "vit-b",
        "google/vit-base-patch16-224-in21k",
        "Apache-2.0",
        85_798_656,
        **BASE,
        norm=HALF,
        eps=1e-12,
        keys="transformers",
        revision="b4569560a39a0f1af58e3ddaf17facf20ab919b0",
    ),
    Encoder(
        "vit-h",
        "google/vit-huge-patch14-224-in21k",
        "Apache-2.0",
        630_764_800,
        **HUGE,
        hidden=5120,
        norm=HALF,
        eps=1e-12,
        keys="transformers",
    ),
    # torchvision's two, through the same network
    Encoder(
        "vit-b-tv",
        "torchvision/vit_b_16-c867db91.pth",
        "BSD-3-Clause",
        85_798_656,
        **BASE,
        keys="torchvision",
        files=("vit_b_16-c867db91.pth",),
    ),
    Encoder(
        "vit-h-swag",
        "torchvision/vit_h_14_lc_swag-c1eb923e.pth",
        "SWAG (CC-BY-NC-4.0)",
        630_764_800,
        **HUGE,
        hidden=5120,
        keys="torchvision",
        files=("vit_h_14_lc_swag-c1eb923e.pth",),
    ),
    # beyond the paper
    Encoder(
        "uni2-h",
        "MahmoodLab/UNI2-h",
        NC_ND,
        681_394_176,
        **{**GIANT, "depth": 24},
        registers=8,
        pos="patches",
        files=BIN_OR_SAFE,
        gated=True,
        derivatives=False,
        revision="d517a8dd47902dd7c308b3c36f63bce47e7b9a43",
    ),
    Encoder(
        "h-optimus-1", "bioptimus/H-optimus-1", NC_ND, 1_134_774_272, **OPTIMUS_G, derivatives=False
    ),
    Encoder(
        "h0-mini",
        "bioptimus/H0-mini",
        NC_ND,
        85_739_520,
        **{**BASE, "hidden": 4096},
        patch=14,
        mlp="swiglu",
        layerscale=True,
        registers=4,
        pos="patches",
        norm=OPTIMUS,
        gated=True,
        derivatives=False,
        fp16=True,
    ),
    Encoder(
        "phikon-v2",
        "owkin/phikon-v2",
        f"Owkin {NC}",
        303_350_784,
        **LARGE,
        layerscale=True,
        keys="transformers",
    ),
    Encoder(
        "hibou-b",
        "histai/hibou-b",
        "Apache-2.0",
        85_739_520,
        **{**BASE, "hidden": 4096},
        patch=14,
        mlp="swiglu",
        layerscale=True,
        registers=4,
        pos="patches",
        norm=HIBOU,
        keys="transformers",
    ),
    Encoder(
        "hibou-l",
        "histai/hibou-L",
        "Apache-2.0",
        303_657_216,
        **{**LARGE, "hidden": 5472},
        patch=14,
        mlp="swiglu",
        layerscale=True,
        registers=4,
        pos="patches",
        norm=HIBOU,
        keys="transformers",
        gated=True,
    ),
    Encoder(
        "midnight",
        "kaiko-ai/midnight",
        "MIT",
        1_134_769_664,
        **GIANT,
        norm=HALF,
        keys="transformers",
    ),
    Encoder(
        "kaiko-s16",
        "1aurent/vit_small_patch16_224.kaiko_ai_towards_large_pathology_fms",
        f"Kaiko {NC}",
        21_665_664,
        **SMALL,
        norm=HALF,
    ),
    Encoder(
        "kaiko-b16",
        "1aurent/vit_base_patch16_224.kaiko_ai_towards_large_pathology_fms",
        f"Kaiko {NC}",
        85_798_656,
        **BASE,
        norm=HALF,
    ),
    Encoder(
        "kaiko-l14",
        "1aurent/vit_large_patch14_reg4_dinov2.kaiko_ai_towards_large_pathology_fms",
        f"Kaiko {NC}",
        304_370_688,
        **LARGE,
        patch=14,
        layerscale=True,
        registers=4,
        pos="patches",
        stored=518,
        norm=HALF,
    ),
    Encoder(
        "lunit-s16",
        "1aurent/vit_small_patch16_224.lunit_dino",
        f"Lunit {NC}",
        21_665_664,
        **SMALL,
        norm=LUNIT,
    ),
    Encoder(
        "lunit-s8",
        "1aurent/vit_small_patch8_224.lunit_dino",
        f"Lunit {NC}",
        21_670_272,
        **SMALL,
        patch=8,
        norm=LUNIT,
    ),
    Encoder(
        "dinov2-s",
        "facebook/dinov2-small",
        "Apache-2.0",
        22_056_192,
        **SMALL,
        **DINOV2,
        revision="ed25f3a31f01632728cabb09d1542f84ab7b0056",
    ),
    Encoder(
        "dinov2-b",
        "facebook/dinov2-base",
        "Apache-2.0",
        86_579_712,
        **BASE,
        **DINOV2,
        revision="f9e44c814b77203eaa57a6bdbbd535f21ede1415",
    ),
    Encoder(
        "dinov2-l",
        "facebook/dinov2-large",
        "Apache-2.0",
        304_367_616,
        **LARGE,
        **DINOV2,
        revision="47b73eefe95e8d44ec3623f8890bd894b6ea2d6c",
    ),
    Encoder(
        "dinov2-g",
        "facebook/dinov2-giant",
        "Apache-2.0",
        1_136_479_232,
        **{**GIANT, **DINOV2},
        revision="611a9d42f2335e0f921f1e313ad3c1b7178d206d",
    ),
]
ENCODERS = {row.name: row for row in ROWS}
POOLS = ("cls", "mean", "cls+mean", "patch-center")


def find_encoder(name):
    if name not in ENCODERS:
        raise UserError(f"--model {name}: no such encoder; there are {', '.join(ENCODERS)}")
    return ENCODERS[name]


# ---------------------------------------------------------------- the network


class PatchEmbed(nn.Module):
    def __init__(self, patch, dim):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch, stride=patch)

    def forward(self, images):  # [B, 3, S, S]
        return self.proj(images).flatten(2).transpose(1, 2)  # [B, (S/patch)², dim], row by row


def attention(q, k, v):
    """softmax(q kᵀ / √d) v. On CPUs the fused operator's backward pass in bf16 takes longer than in
    float32: there the plain products train more than twice as fast."""
    if q.dtype == torch.bfloat16 and q.device.type == "cpu" and q.requires_grad:
        return (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def linear(x, weight, bias=None):
    """x weightᵀ + bias. Where no gradient is wanted, in float32 on CPUs, by oneDNN, which torch
    takes in bf16 anyway: MKL, its choice in float32, needs twice the time on AMD's processors."""
    if (
        ONEDNN
        and not torch.is_grad_enabled()
        and x.dtype == torch.float32
        and x.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
    ):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


class Linear(nn.Linear):
    def forward(self, x):
        return linear(x, self.weight, self.bias)


class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)

    def forward(
        self, x, first=False
    ):  # [B, T, dim]; first: only the first token asks → [B, 1, dim]
        B, T, dim = x.shape
        q, k, v = (
            self.qkv(x).view(B, T, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        )  # each [B, h, T, d]
        if first:
            q = q[:, :, :1]
        x = attention(q, k, v)
        return self.proj(x.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1 = Linear(dim, hidden)
        self.fc2 = Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class SwiGLU(nn.Module):
    """Both halves in one product, the gate first (timm's SwiGLUPacked)."""

    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1 = Linear(dim, hidden)
        self.fc2 = Linear(hidden // 2, dim)

    def forward(self, x):
        gate, value = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(F.silu(gate) * value)


class LayerScale(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return x * self.gamma


class Block(nn.Module):
    def __init__(self, spec):
        super().__init__()
        self.norm1 = nn.LayerNorm(spec.dim, eps=spec.eps)
        self.attn = Attention(spec.dim, spec.heads)
        self.ls1 = LayerScale(spec.dim) if spec.layerscale else nn.Identity()
        self.norm2 = nn.LayerNorm(spec.dim, eps=spec.eps)
        self.mlp = (SwiGLU if spec.mlp == "swiglu" else Mlp)(spec.dim, spec.hidden)
        self.ls2 = LayerScale(spec.dim) if spec.layerscale else nn.Identity()

    def forward(
        self, x, first=False
    ):  # [B, T, dim] → the same; first: → [B, 1, dim], the first token's
        attended = self.ls1(self.attn(self.norm1(x), first))
        x = (x[:, :1] if first else x) + attended
        return x + self.ls2(self.mlp(self.norm2(x)))


class ViT(nn.Module):
    """Pre-norm vision transformer (Dosovitskiy et al. 2021) with what its descendants added:
    LayerScale, packed SwiGLU, registers. The names of the parameters are timm's.

    forward: normalised images [B, 3, size, size] → embedding [B, D]. Tokens are in the order class,
    registers, patches. `pool` reads them after the final norm:
        cls           the class token                                                      D = dim
        mean          mean of the patch tokens, without class token and registers          D = dim
        cls+mean      both, one after the other                                            D = 2 dim
        patch-center  mean of the patch tokens in the middle, where the cell is: 4 × 4 of the grids
                      of 14 × 14 and
                      16 × 16 (56 and 64 px), 8 × 8 of 28 × 28 (64 px)                     D = dim
    `layer`: the number of blocks that are run (1 … depth); the later ones are not built, the final
    norm is applied all the same, so that embeddings of different layers have comparable scales."""

    def __init__(self, spec, size=SIZE, pool=None, layer=None):
        super().__init__()
        self.spec, self.pool, self.layer = spec, pool or spec.pool, layer or spec.depth
        self.embed_dim = embed_dim(spec, self.pool)
        self.prefix = 1 + spec.registers  # tokens before the patches
        self.grid = size // spec.patch
        self.cls_token = nn.Parameter(torch.zeros(1, 1, spec.dim))
        self.reg_token = (
            nn.Parameter(torch.zeros(1, spec.registers, spec.dim)) if spec.registers else None
        )
        positions = self.grid**2 + (self.prefix if spec.pos == "all" else 0)
        self.pos_embed = nn.Parameter(torch.zeros(1, positions, spec.dim))
        self.patch_embed = PatchEmbed(spec.patch, spec.dim)
        self.blocks = nn.ModuleList(Block(spec) for _ in range(self.layer))
        self.norm = nn.LayerNorm(spec.dim, eps=spec.eps)

    def tokens(self, images):  # [B, 3, size, size] → [B, prefix + grid², dim]
        x = self.patch_embed(images)
        prefix = (
            self.cls_token
            if self.reg_token is None
            else torch.cat([self.cls_token, self.reg_token], dim=1)
        )
        prefix = prefix.expand(x.shape[0], -1, -1)
        if self.spec.pos == "all":
            return torch.cat([prefix, x], dim=1) + self.pos_embed
        return torch.cat([prefix, x + self.pos_embed], dim=1)

    def forward(self, images):
        x = self.tokens(images)
        for block in self.blocks[:-1]:
            x = block(x)
        # Where only the class token is read, only it asks in the last block: the same numbers for
        # less work.
        x = self.norm(self.blocks[-1](x, first=self.pool == "cls"))
        if self.pool == "cls":
            return x[:, 0]
        patches = x[:, self.prefix :]
        if self.pool == "patch-center":
            B, side = x.shape[0], 2 * round(self.grid / 8 + 0.01)  # 14 → 4, 16 → 4, 28 → 8
            start = (self.grid - side) // 2
            middle = patches.reshape(B, self.grid, self.grid, -1)[
                :, start : start + side, start : start + side
            ]
            return middle.mean(dim=(1, 2))
        mean = patches.mean(dim=1)
        return mean if self.pool == "mean" else torch.cat([x[:, 0], mean], dim=-1)


def build(spec, pool=None, layer=None, size=SIZE):
    """The network of a row, without weights: make it under `torch.device("meta")`."""
    if spec.depth:
        return ViT(spec, size, pool, layer)
    from torchvision.models import resnet50  # here, since only this row needs torchvision

    network = resnet50()
    network.fc = nn.Identity()  # what is left ends with the global average pool: [B, 2048]
    network.spec, network.pool, network.layer, network.blocks = spec, "average", None, None
    network.embed_dim = spec.dim
    return network


def load_encoder(
    name, weights=None, device="cpu", dtype=None, pool=None, layer=None, revision=None
):
    """The encoder `name` with its published weights, in evaluation mode.

    weights   None: from the Hub (or its cache) | a file or folder as published | "random": seeded
              noise, for tests
              and dry runs
    dtype     of the parameters (torch.dtype or "fp32" …); None: float32
    pool, layer: see ViT; None: the published embedding of the last block

    The module maps normalised images float [B, 3, 224, 224] to [B, D] and has .spec .embed_dim
    .blocks .pool .layer .licence .weights_hash. UserError for everything that can be wrong with the
    weights."""
    spec = find_encoder(name)
    dtype = torch.float32 if dtype is None else DTYPES.get(dtype, dtype)
    if spec.depth == 0 and (pool not in (None, "average") or layer):
        raise UserError(
            f"--pool and --layer choose among a transformer's tokens and blocks; {name} has neither"
        )
    if spec.depth and pool not in (None, *POOLS):
        raise UserError(f"--pool {pool}: there are {', '.join(POOLS)}")
    if spec.depth and layer is not None and not 1 <= layer <= spec.depth:
        raise UserError(f"--layer {layer}: {name} has the layers 1 to {spec.depth}")
    with torch.device("meta"):
        encoder = build(spec, pool, layer)
    if weights == "random":
        randomise(encoder, device, dtype)
        encoder.weights_hash = "random"
    else:
        files = published.find_files(spec, weights, revision, here=Path(__file__).parent)
        encoder.weights_hash = published.load(encoder, files, device, dtype)
    encoder.licence = spec.licence
    return encoder.eval()


def randomise(encoder, device, dtype, seed=0):
    """Fill a meta module with seeded noise that lets the image through to the embedding (LayerScale
    1, not 1e-5).
    """
    encoder.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for name, tensor in encoder.state_dict().items():
            if tensor.dim() > 1:
                tensor.normal_(0, 0.02, generator=generator)
            else:
                tensor.fill_(1 if name.endswith(("weight", "gamma", "running_var")) else 0)
    encoder.to(dtype)


# ---------------------------------------------------------------- device and precision

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}


def resolve_device(name="auto"):
    """ "auto" | "cuda[:i]" | "mps" | "cpu" → torch.device; UserError where the wanted one does not
    work.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)  # the only reliable sign that it works
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(
            f"--device {name}: not usable here ({published.first_line(error)}); use --device cpu "
            "or "
            "auto"
        ) from None
    return device


def resolve_dtype(name, device, spec=None):
    """ "auto" | "fp32" | "bf16" | "fp16" → torch.dtype.

    auto: bf16 on GPUs that compute in it (compute capability 8.0 and later), else fp32. Where
    publishers advise half precision it is fp16 autocast (rows with `fp16`), to which bf16 is the
    safer equal; the others saw NaN in fp16 (UNI), so that asking for it is said aloud."""
    device = torch.device(device)
    if name in (None, "auto"):
        able = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if able else torch.float32
    if name not in DTYPES:
        raise UserError(f"--dtype {name}: there are auto, {', '.join(DTYPES)}")
    if name == "fp16" and spec is not None and not spec.fp16:
        note(
            f"note: the publisher of {spec.name} does not advise fp16; bf16 and fp32 are the safe "
            "choices"
        )
    return DTYPES[name]


def note(text):
    print(text, file=sys.stderr, flush=True)


def add_arguments(parser):
    """The flags that every command with an encoder shares."""
    group = parser.add_argument_group("encoder")
    group.add_argument(
        "--model",
        default="demo",
        metavar="NAME",
        help="which encoder; `python models.py` lists them (default: demo)",
    )
    group.add_argument(
        "--weights",
        metavar="PATH",
        help="file or folder of its published weights, or the word `random` (default: from the "
        "Hub)",
    )
    group.add_argument(
        "--revision",
        metavar="R",
        help="commit or branch on the Hub (default: the pinned one, else main)",
    )
    group.add_argument(
        "--pool", choices=POOLS, help="what of the tokens is the embedding (default: as published)"
    )
    group.add_argument(
        "--layer",
        type=int,
        metavar="N",
        help="read the embedding after block N (default: the last)",
    )
    group.add_argument(
        "--dtype",
        choices=("auto", "fp32", "bf16", "fp16"),
        default="auto",
        help="precision of the encoder; auto: bf16 on GPUs that have it, else fp32 (default: auto)",
    )
    group.add_argument(
        "--device",
        default="auto",
        metavar="D",
        help="auto, cuda, cuda:1, mps or cpu (default: auto)",
    )


# ---------------------------------------------------------------- the classifier


class PatchClassifier(nn.Module):
    """Normalisation, encoder, head: images → logits.

    forward: uint8 [B, 224, 224, 3] or float [B, 3, 224, 224] in [0, 1] → logits [B] (positive:
    mitotic figure)
    embed:   the same images → embeddings [B, D]
    Both return float32 (float64 for a float64 encoder): normalisation and head stay in it whatever
    the encoder's
    precision. `tta`: in evaluation mode the embedding is the mean over the eight flips and quarter
    turns; the head is
    linear, so this is the mean of their logits too.
    """

    def __init__(self, encoder, tta=False):
        super().__init__()
        self.encoder, self.tta = encoder, tta
        device, dtype = next((p.device, p.dtype) for p in encoder.parameters())
        self.precision = torch.float64 if dtype == torch.float64 else torch.float32
        self.head = nn.Linear(encoder.embed_dim, 1, device=device, dtype=self.precision)
        # Not in the state dict: they belong to the row, not to a run.
        for name, values in zip(("mean", "std"), encoder.spec.norm):
            values = torch.tensor(values, dtype=self.precision, device=device).view(1, 3, 1, 1)
            self.register_buffer(name, values, persistent=False)

    def embed(self, images):
        if images.dtype == torch.uint8:  # [B, S, S, 3]
            images = images.permute(0, 3, 1, 2).to(self.precision) / 255
        x = (images.to(self.precision) - self.mean) / self.std  # [B, 3, S, S]
        x = x.to(next(self.encoder.parameters()).dtype)
        if self.tta and not self.training:
            views = [
                torch.rot90(flip, turns, (2, 3)) for flip in (x, x.flip(3)) for turns in range(4)
            ]
            return torch.stack([self.encoder(view).to(self.precision) for view in views]).mean(
                dim=0
            )
        return self.encoder(x).to(self.precision)

    def classify(self, embedding):  # [B, D] → logits [B]
        if torch.is_autocast_enabled(
            embedding.device.type
        ):  # the head is not worth the loss of digits
            with torch.autocast(embedding.device.type, enabled=False):
                return self.head(embedding).squeeze(-1)
        return self.head(embedding).squeeze(-1)

    def forward(self, images):
        return self.classify(self.embed(images))


def predict(
    model,
    patches,
    rows=None,
    batch_size=64,
    device=None,
    dtype=None,
    output="logits",
    progress="patches",
    keep=None,
):
    """Run a PatchClassifier over `patches` → float32 [n] ("logits") or [n, D] ("embedding"), in the
    order of `rows`.

    patches   anything with .read(rows) → uint8 [n, 224, 224, 3] (dataset.patches.Patches), or such
              an array
    rows      row numbers; None: all
    device    moved there first; None: where the model is
    dtype     bf16 or fp16 with float32 parameters: autocast; otherwise the model runs in the
              precision it is in
    progress  text before the progress bar; None: no bar
    keep      called with (row numbers, values) of every batch; then nothing is collected, and None
              returned

    A thread reads the next batches while the model works. UserError where an output is not finite.
    """
    assert output in ("logits", "embedding"), output
    if isinstance(patches, np.ndarray):
        patches = ArrayPatches(patches)
    rows = np.arange(len(patches)) if rows is None else np.asarray(rows)
    if device is not None:
        model.to(device)
    parameter = next(model.encoder.parameters())
    device, stored = parameter.device, parameter.dtype
    wanted = DTYPES.get(dtype, dtype) or stored
    autocast = stored == torch.float32 and wanted in (torch.bfloat16, torch.float16)
    if wanted != stored and not autocast:
        raise ValueError(f"a model in {stored} cannot run in {wanted}: load it in that precision")
    width = (model.encoder.embed_dim,) if output == "embedding" else ()
    result = np.empty((len(rows), *width), np.float32) if keep is None else None
    starts = range(0, len(rows), batch_size)
    bar = (
        common.progress(total=len(rows), desc=progress, unit="patches")
        if progress
        else contextlib.nullcontext()
    )
    training = model.training
    model.eval()

    def take(start, values):  # the copy waits for the device, so it is done a batch late
        values, own = values.float().cpu().numpy(), rows[start : start + len(values)]
        if not np.isfinite(values).all():
            bad = own[~np.isfinite(values.reshape(len(values), -1)).all(1)]
            raise UserError(
                f"the model's output is not a finite number (first at patch {bad[0]}) in "
                f"{name_of(wanted)}"
                "; use --dtype bf16 or fp32, and check the weights with python models.py NAME"
            )
        if keep is None:
            result[start : start + len(values)] = values
        else:
            keep(own, values)
        if progress:
            bar.update(len(values))

    try:
        with (
            torch.inference_mode(),
            bar,
            reading(patches, rows, starts, batch_size, device) as batches,
        ):
            waiting = None
            for start, images in batches:
                images = images.to(device, non_blocking=True)
                with torch.autocast(device.type, wanted, enabled=autocast):
                    values = model.embed(images)
                if output == "logits":
                    values = model.classify(values)
                if waiting:
                    take(*waiting)
                waiting = start, values
            if waiting:
                take(*waiting)
    finally:
        model.train(training)
    return result


class ArrayPatches:
    """An array in the place of dataset.patches.Patches."""

    def __init__(self, array):
        self.array = array

    def __len__(self):
        return len(self.array)

    def read(self, rows):
        return self.array[rows]


@contextlib.contextmanager
def reading(patches, rows, starts, batch_size, device, ahead=3):
    """Iterator over (start, uint8 tensor [n, S, S, 3]), read by a thread up to `ahead` batches
    early.
    """
    batches, stop = queue.Queue(ahead), threading.Event()

    def put(item):
        while (
            not stop.is_set()
        ):  # a loop, so that the thread ends when the reader of the queue is gone
            try:
                return batches.put(item, timeout=0.1)
            except queue.Full:
                continue

    def work():
        try:
            for start in starts:
                if stop.is_set():
                    return
                images = torch.from_numpy(
                    np.ascontiguousarray(patches.read(rows[start : start + batch_size]))
                )
                put((start, images.pin_memory() if device.type == "cuda" else images))
            put(None)
        except BaseException as error:  # belongs to whoever waits for the batch
            put(error)

    def iterate():
        while (item := batches.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item

    thread = threading.Thread(target=work, name="patches", daemon=True)
    thread.start()
    try:
        yield iterate()
    finally:
        stop.set()
        thread.join()


def name_of(dtype):
    return next(name for name, value in DTYPES.items() if value == dtype)


# ---------------------------------------------------------------- a finished run


# ---------------------------------------------------------------- the command


def table():
    header = (
        "name",
        "parameters",
        "embedding",
        "layers",
        "patch",
        "stored",
        "licence",
        "gated",
        "weights here",
    )
    rows = [
        (
            s.name,
            f"{s.params / 1e6:,.1f} M",
            s.embed_dim,
            s.depth or "–",
            s.patch or "–",
            f"{s.stored} px",
            s.licence,
            "yes" if s.gated else "no",
            published.availability(s, here=Path(__file__).parent),
        )
        for s in ENCODERS.values()
    ]
    return common.table(rows, header, right=(1, 2, 3, 4, 5))


def fixed_image():
    """A synthetic image float32 [1, 3, 224, 224] in [0, 1], the same everywhere: no library's
    random numbers.
    """
    y, x = np.mgrid[0:SIZE, 0:SIZE] / SIZE
    waves = [
        0.5 + 0.25 * np.sin(7 * x + 3 * c) + 0.25 * np.cos(11 * y * (1 + x) + c) for c in range(3)
    ]
    return torch.from_numpy(np.stack(waves)[None].astype(np.float32))


def verify(args):
    device = resolve_device(args.device)
    spec = find_encoder(args.name)
    dtype = resolve_dtype(args.dtype, device, spec)
    start = time.perf_counter()
    encoder = load_encoder(
        args.name, args.weights, device, dtype, args.pool, args.layer, args.revision
    )
    seconds = time.perf_counter() - start
    model = PatchClassifier(encoder).eval()
    image = fixed_image().to(device)
    with torch.inference_mode():
        embedding = model.embed(image)[0].cpu().double()
        if not embedding.isfinite().all():
            raise UserError(
                f"{spec.name}: the embedding of the test image is not finite in {name_of(dtype)}"
            )
        for count in (2, 8):  # warm up, then time
            batch = image.expand(8, -1, -1, -1)
            start = time.perf_counter()
            for _ in range(count):
                last = model.embed(batch)
            last.sum().item()  # waits for the device
        each = (time.perf_counter() - start) / count / 8
    parameters = sum(p.numel() for p in encoder.parameters())
    for label, value in (
        ("encoder", f"{spec.name} ({spec.repo or 'in this folder'}), licence {spec.licence}"),
        ("loaded", f"strictly, {parameters:,} parameters in {name_of(dtype)}, {seconds:.1f} s"),
        ("hash", f"{encoder.weights_hash} (of the tensors: the same in every file format)"),
        (
            "embedding",
            f"{encoder.pool}, {encoder.embed_dim} numbers, norm {embedding.norm():.5f}, first four "
            + " ".join(f"{v:.5f}" for v in embedding[:4]),
        ),
        ("speed", f"{each * 1e3:.2f} ms per image ({device.type}, batch 8)"),
    ):
        print(f"{label:10}{value}")


def main():
    parser = argparse.ArgumentParser(
        description="The table of encoders, or with a NAME the check of its weights."
    )
    parser.add_argument(
        "name", nargs="?", metavar="NAME", help="load this encoder strictly and report on it"
    )
    parser.add_argument("--json", action="store_true", help="the table as JSON")
    add_arguments(parser)
    args = parser.parse_args()
    if args.name:
        verify(args)
    elif args.json:
        print(
            json.dumps(
                {n: {**vars(s), "embed_dim": s.embed_dim} for n, s in ENCODERS.items()}, indent=1
            )
        )
    else:
        print(table())
        print(
            "\nA position embedding stored at 518 px is resampled to 224 px as timm does it: "
            "bicubic with antialias, "
            "in float32.\nEvery encoder can be loaded without the Hub: --weights PATH (file or "
            "folder)."
        )


if __name__ == "__main__":
    common.command(main)
