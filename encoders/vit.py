"""The vision transformer of most encoders."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from encoders.layers import Block, Linear, attention, linear
from encoders.table import embed_dim


class PatchEmbed(nn.Module):
    def __init__(self, patch, dim):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch, stride=patch)

    def forward(self, images):  # [B, 3, S, S]
        return self.proj(images).flatten(2).transpose(1, 2)  # [B, (S/patch)², dim], row by row


class Attention(nn.Module):
    def __init__(self, spec):
        super().__init__()
        self.heads = spec.heads
        qkv = KeylessLinear if spec.pos == "rotary" and spec.qkv_bias else Linear
        self.qkv = qkv(spec.dim, 3 * spec.dim, bias=spec.qkv_bias)
        self.proj = Linear(spec.dim, spec.dim)

    def forward(self, x, rotary=None, first=False):
        """x [B, T, dim] → the same; first: only the first token's query → [B, 1, dim].

        rotary: (cos, sin), each [T, d], for DINOv3.
        """
        B, T, dim = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.heads, dim // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, h, T, d]
        if first:
            q = q[:, :, :1]
        if rotary is not None:
            cos, sin = rotary
            q, k = rotate(q, cos[: q.shape[2]], sin[: q.shape[2]]), rotate(k, cos, sin)
        x = attention(q, k, v)
        return self.proj(x.transpose(1, 2).flatten(2))


class KeylessLinear(Linear):
    """qkv without a bias of the keys: that third of `bias` is zero, and stays so in training."""

    def forward(self, x):
        query, key, value = self.bias.chunk(3)
        return linear(x, self.weight, torch.cat([query, torch.zeros_like(key), value]))


def rotary_factors(grid, prefix, d, dtype, device=None):
    """DINOv3's rotary position embedding: (cos, sin), each [prefix + grid², d], float32 (float64
    for a float64 network).

    The centre of a patch lies at (y, x) in [-1, 1]. d/4 periods from 1 to 100 turn the pairs of
    channels (i, i + d/2) by y, then d/4 by x. The tokens before the patches are not turned.
    Pretraining also jitters the positions; fine-tuning here does not.
    """
    centres = torch.arange(0.5, grid, device=device) / grid * 2 - 1
    periods = 100 ** (torch.arange(d // 4, device=device) * 2 / (d // 2))
    if dtype == torch.float64:
        centres, periods = centres.double(), periods.double()
    angles = 2 * math.pi * centres[:, None] / periods  # [grid, d/4]
    by_y = angles[:, None].expand(-1, grid, -1)
    by_x = angles[None].expand(grid, -1, -1)
    angles = torch.cat([by_y, by_x], dim=-1).flatten(0, 1).tile(2)  # [grid², d]
    angles = F.pad(angles, (0, 0, prefix, 0))
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Turn the channels of x [B, h, T, d] by the factors [T, d], in their precision."""
    low, high = x.chunk(2, dim=-1)
    turned = torch.cat([-high, low], dim=-1)
    return (x * cos + turned * sin).to(x.dtype)


class AttentionPooler(nn.Module):
    """One learned query attends to all tokens [B, T, dim] → [B, D] (CONCH)."""

    def __init__(self, dim, pooled, heads=8):
        super().__init__()
        self.heads = heads
        self.query = nn.Parameter(torch.zeros(1, pooled))
        self.ln_q, self.ln_k = nn.LayerNorm(pooled), nn.LayerNorm(dim)
        self.to_q = Linear(pooled, pooled, bias=False)
        self.to_kv = Linear(dim, 2 * pooled, bias=False)
        self.to_out = Linear(pooled, pooled, bias=False)
        self.norm = nn.LayerNorm(pooled)

    def forward(self, x):
        B, T, _ = x.shape
        q = self.to_q(self.ln_q(self.query)).view(1, 1, self.heads, -1).expand(B, -1, -1, -1)
        kv = self.to_kv(self.ln_k(x)).view(B, T, 2, self.heads, -1)
        k, v = kv.permute(2, 0, 3, 1, 4)  # each [B, h, T, d]
        x = attention(q.transpose(1, 2), k, v)  # [B, h, 1, d]
        return self.norm(self.to_out(x.flatten(1)))


class ViT(nn.Module):
    """Pre-norm vision transformer (Dosovitskiy et al. 2021) with what its descendants added:
    LayerScale, packed SwiGLU, registers, and DINOv3's rotary positions. The names of the parameters
    are timm's.

    forward: normalised images [B, 3, size, size] → embedding [B, D]. Tokens are in the order class,
    registers, patches. `pool` reads them after the final norm:
        cls           the class token                                              D = dim
        mean          mean of the patch tokens, without class token and registers  D = dim
        cls+mean      both, one after the other                                    D = 2 dim
        patch-center  mean of the patch tokens around the cell: 4 × 4 of the       D = dim
                      grids of 14 × 14 and 16 × 16 (56 and 64 px), 8 × 8 of 28 × 28 (64 px)
        cls+center    the class token, then patch-center                           D = 2 dim
        attention     all tokens, by AttentionPooler (CONCH)                       D = pooler
    `layer`: the number of blocks that run (1 … depth). Later blocks are not built; the final norm
    is still applied, so that embeddings of different layers have comparable scales.
    """

    def __init__(self, spec, size=None, pool=None, layer=None):
        super().__init__()
        self.spec, self.pool, self.layer = spec, pool or spec.pool, layer or spec.depth
        self.embed_dim = embed_dim(spec, self.pool)
        self.prefix = 1 + spec.registers  # tokens before the patches
        self.size = size or spec.size
        self.field = spec.field or self.size
        self.grid = self.field // spec.patch
        self.cls_token = nn.Parameter(torch.zeros(1, 1, spec.dim))
        self.reg_token = None
        if spec.registers:
            self.reg_token = nn.Parameter(torch.zeros(1, spec.registers, spec.dim))
        self.pos_embed = None
        if spec.pos != "rotary":
            positions = self.grid**2
            if spec.pos == "all":
                positions += self.prefix
            self.pos_embed = nn.Parameter(torch.zeros(1, positions, spec.dim))
        self.patch_embed = PatchEmbed(spec.patch, spec.dim)
        self.blocks = nn.ModuleList()
        for _ in range(self.layer):
            block = Block(
                Attention(spec), spec.dim, spec.hidden, spec.eps, spec.mlp, spec.layerscale
            )
            self.blocks.append(block)
        self.norm = nn.LayerNorm(spec.dim, eps=spec.eps)
        self.pooler = AttentionPooler(spec.dim, spec.pooler) if spec.pooler else None

    @property
    def centre(self):
        """(first row, number of rows) of the patch tokens that `patch-center` reads."""
        side = 2 * round(self.grid / 8 + 0.01)
        return (self.grid - side) // 2, side

    def tokens(self, images):
        """[B, 3, size, size] → what the first block reads [B, prefix + grid², dim]."""
        start, end = (self.size - self.field) // 2, (self.size + self.field) // 2
        x = self.patch_embed(images[:, :, start:end, start:end])
        prefix = self.cls_token
        if self.reg_token is not None:
            prefix = torch.cat([prefix, self.reg_token], dim=1)
        prefix = prefix.expand(x.shape[0], -1, -1)
        if self.spec.pos == "all":
            return torch.cat([prefix, x], dim=1) + self.pos_embed
        if self.spec.pos == "patches":
            x = x + self.pos_embed
        return torch.cat([prefix, x], dim=1)

    def rotary(self, like):
        """The rotary factors for a network of the precision of `like`, or None."""
        if self.spec.pos != "rotary":
            return None
        d = self.spec.dim // self.spec.heads
        return rotary_factors(self.grid, self.prefix, d, like.dtype, like.device)

    def forward(self, images):
        x = self.tokens(images)
        rotary = self.rotary(x)
        for block in self.blocks[:-1]:
            x = block(x, rotary)
        # If only the class token is pooled, compute only its query in the last block: same result,
        # less work.
        x = self.norm(self.blocks[-1](x, rotary, first=self.pool == "cls"))
        if self.pool == "cls":
            return x[:, 0]
        if self.pool == "attention":
            return self.pooler(x)
        patches = x[:, self.prefix :]
        if self.pool in ("patch-center", "cls+center"):
            start, side = self.centre
            rows = patches.unflatten(1, (self.grid, self.grid))
            mean = rows[:, start : start + side, start : start + side].mean(dim=(1, 2))
        else:
            mean = patches.mean(dim=1)
        if self.pool in ("patch-center", "mean"):
            return mean
        return torch.cat([x[:, 0], mean], dim=-1)
