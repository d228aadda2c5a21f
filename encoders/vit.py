"""The vision transformer of most encoders."""

import torch
from torch import nn

from encoders.layers import LayerScale, Linear, Mlp, SwiGLU, attention
from encoders.table import SIZE, embed_dim


class PatchEmbed(nn.Module):
    def __init__(self, patch, dim):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch, stride=patch)

    def forward(self, images):  # [B, 3, S, S]
        return self.proj(images).flatten(2).transpose(1, 2)  # [B, (S/patch)², dim], row by row


class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)

    def forward(self, x, first=False):
        """x [B, T, dim] → the same; first: only the first token's query → [B, 1, dim]."""
        B, T, dim = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.heads, dim // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, h, T, d]
        if first:
            q = q[:, :, :1]
        x = attention(q, k, v)
        return self.proj(x.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, spec):
        super().__init__()
        mlp = SwiGLU if spec.mlp == "swiglu" else Mlp
        self.norm1 = nn.LayerNorm(spec.dim, eps=spec.eps)
        self.attn = Attention(spec.dim, spec.heads)
        self.ls1 = LayerScale(spec.dim) if spec.layerscale else nn.Identity()
        self.norm2 = nn.LayerNorm(spec.dim, eps=spec.eps)
        self.mlp = mlp(spec.dim, spec.hidden)
        self.ls2 = LayerScale(spec.dim) if spec.layerscale else nn.Identity()

    def forward(self, x, first=False):
        """x [B, T, dim] → the same; first: the first token alone → [B, 1, dim]."""
        attended = self.ls1(self.attn(self.norm1(x), first))
        if first:
            x = x[:, :1]
        x = x + attended
        return x + self.ls2(self.mlp(self.norm2(x)))


class ViT(nn.Module):
    """Pre-norm vision transformer (Dosovitskiy et al. 2021) with what its descendants added:
    LayerScale, packed SwiGLU, registers. The names of the parameters are timm's.

    forward: normalised images [B, 3, size, size] → embedding [B, D]. Tokens are in the order class,
    registers, patches. `pool` reads them after the final norm:
        cls           the class token                                              D = dim
        mean          mean of the patch tokens, without class token and registers  D = dim
        cls+mean      both, one after the other                                    D = 2 dim
        patch-center  mean of the patch tokens around the cell: 4 × 4 of the       D = dim
                      grids of 14 × 14 and 16 × 16 (56 and 64 px), 8 × 8 of 28 × 28 (64 px)
    `layer`: the number of blocks that run (1 … depth). Later blocks are not built; the final norm
    is still applied, so that embeddings of different layers have comparable scales.
    """

    def __init__(self, spec, size=SIZE, pool=None, layer=None):
        super().__init__()
        self.spec, self.pool, self.layer = spec, pool or spec.pool, layer or spec.depth
        self.embed_dim = embed_dim(spec, self.pool)
        self.prefix = 1 + spec.registers  # tokens before the patches
        self.size, self.grid = size, size // spec.patch
        self.cls_token = nn.Parameter(torch.zeros(1, 1, spec.dim))
        self.reg_token = None
        if spec.registers:
            self.reg_token = nn.Parameter(torch.zeros(1, spec.registers, spec.dim))
        positions = self.grid**2
        if spec.pos == "all":
            positions += self.prefix
        self.pos_embed = nn.Parameter(torch.zeros(1, positions, spec.dim))
        self.patch_embed = PatchEmbed(spec.patch, spec.dim)
        self.blocks = nn.ModuleList(Block(spec) for _ in range(self.layer))
        self.norm = nn.LayerNorm(spec.dim, eps=spec.eps)

    @property
    def centre(self):
        """(first row, number of rows) of the patch tokens that `patch-center` reads."""
        side = 2 * round(self.grid / 8 + 0.01)
        return (self.grid - side) // 2, side

    def tokens(self, images):
        """[B, 3, size, size] → what the first block reads [B, prefix + grid², dim]."""
        x = self.patch_embed(images)
        prefix = self.cls_token
        if self.reg_token is not None:
            prefix = torch.cat([prefix, self.reg_token], dim=1)
        prefix = prefix.expand(x.shape[0], -1, -1)
        if self.spec.pos == "all":
            return torch.cat([prefix, x], dim=1) + self.pos_embed
        return torch.cat([prefix, x + self.pos_embed], dim=1)

    def forward(self, images):
        x = self.tokens(images)
        for block in self.blocks[:-1]:
            x = block(x)
        # If only the class token is pooled, compute only its query in the last block: same result,
        # less work.
        x = self.norm(self.blocks[-1](x, first=self.pool == "cls"))
        if self.pool == "cls":
            return x[:, 0]
        patches = x[:, self.prefix :]
        if self.pool == "patch-center":
            start, side = self.centre
            rows = patches.unflatten(1, (self.grid, self.grid))
            return rows[:, start : start + side, start : start + side].mean(dim=(1, 2))
        mean = patches.mean(dim=1)
        if self.pool == "mean":
            return mean
        return torch.cat([x[:, 0], mean], dim=-1)
