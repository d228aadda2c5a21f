"""Swin transformers (Liu et al. 2021), CTransPath among them. The names of the parameters are
timm's (0.9 and later)."""

import torch
import torch.nn.functional as F
from torch import nn

from encoders.layers import Block, Linear, attention

WINDOW = 7  # patches, the side of a window
SHIFT = WINDOW // 2  # of the windows, in every second block
NEVER = -100.0  # added to the scores of patches that only the cyclic shift made neighbours


class BatchNorm(nn.BatchNorm2d):
    """Normalises by the stored statistics in training too, as befits a pretrained network in small
    batches: an adapter then belongs to exactly the weights that it was trained on.
    """

    def __init__(self, channels):
        super().__init__(channels)
        self.track_running_stats, self.num_batches_tracked = False, None  # no count of batches

    def train(self, mode=True):
        return super().train(False)


class PatchEmbed(nn.Module):
    """Images [B, 3, S, S] → tokens [B, (S/4)², dim], row by row."""

    def __init__(self, stem, dim, eps):
        super().__init__()
        if stem == "convolutions":  # CTransPath
            self.proj = nn.Sequential(
                nn.Conv2d(3, dim // 8, 3, stride=2, padding=1, bias=False),
                BatchNorm(dim // 8),
                nn.ReLU(),
                nn.Conv2d(dim // 8, dim // 4, 3, stride=2, padding=1, bias=False),
                BatchNorm(dim // 4),
                nn.ReLU(),
                nn.Conv2d(dim // 4, dim, 1),
            )
        else:
            self.proj = nn.Conv2d(3, dim, 4, stride=4)
        self.norm = nn.LayerNorm(dim, eps=eps)

    def forward(self, images):
        return self.norm(self.proj(images).flatten(2).transpose(1, 2))


class WindowAttention(nn.Module):
    """Attention among the tokens of each window, with a bias by their relative position."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * WINDOW - 1) ** 2, heads))
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)

    def bias(self, mask):
        """What is added to the scores: [1 or windows, heads, 49, 49]. mask: see `mask_of`."""
        index = relative_index(self.relative_position_bias_table.device)
        bias = F.embedding(index, self.relative_position_bias_table).permute(2, 0, 1)[None]
        if mask is not None:
            bias = bias + mask[:, None].to(bias.dtype)
        return bias

    def forward(self, x, mask=None, first=False):  # [B, T, dim], one window after the other
        B, T, dim = x.shape
        windows = T // WINDOW**2
        qkv = self.qkv(x).view(B, windows, WINDOW**2, 3, self.heads, dim // self.heads)
        qkv = qkv.permute(3, 0, 1, 4, 2, 5)  # [3, B, windows, h, 49, d]
        bias = self.bias(mask)
        if mask is None:  # all windows are alike
            q, k, v = qkv.flatten(1, 2)
        else:
            q, k, v = qkv.flatten(2, 3)
            bias = bias.flatten(0, 1)[None]
        x = attention(q, k, v, bias).view(B, windows, self.heads, WINDOW**2, -1)
        return self.proj(x.transpose(2, 3).reshape(B, T, dim))


def relative_index(device):
    """Row of the bias table for each pair of tokens, (Δy + 6) · 13 + Δx + 6 [49, 49]."""
    place = torch.arange(WINDOW**2, device=device)
    y, x = place // WINDOW, place % WINDOW
    dy, dx = y[:, None] - y, x[:, None] - x
    return (dy + WINDOW - 1) * (2 * WINDOW - 1) + dx + WINDOW - 1


def window_order(side, shift, device):
    """Numbers (row by row) of the tokens of a grid of side × side, window by window, after the grid
    was moved up and left by `shift`, around the edges. [side²]
    """
    tokens = torch.arange(side * side, device=device).view(side, side)
    tokens = tokens.roll((-shift, -shift), (0, 1))
    windows = tokens.view(side // WINDOW, WINDOW, side // WINDOW, WINDOW)
    return windows.transpose(1, 2).flatten()


def mask_of(side, shift, device):
    """[windows, 49, 49], to add to the scores: NEVER between tokens of a shifted window that come
    from opposite edges of the image, else 0.
    """
    place = torch.arange(side, device=device)
    band = (place >= side - WINDOW).int() + (place >= side - shift).int()  # [side]
    region = (3 * band[:, None] + band).flatten()  # of the moved grid
    region = region[window_order(side, 0, device)].view(-1, WINDOW**2)
    return (region[:, :, None] != region[:, None]) * NEVER


class PatchMerging(nn.Module):
    """Four neighbouring tokens become one: [B, side², dim] → [B, side²/4, 2 dim]."""

    def __init__(self, dim, eps):
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim, eps=eps)
        self.reduction = Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x, side):
        B, _, dim = x.shape
        x = x.view(B, side // 2, 2, side // 2, 2, dim).permute(0, 1, 3, 4, 2, 5)
        return self.reduction(self.norm(x.reshape(B, side * side // 4, 4 * dim)))


class Stage(nn.Module):
    """Blocks on one grid, after the merging of patches (all stages but the first)."""

    def __init__(self, spec, dim, heads, blocks, side, merges):
        super().__init__()
        self.side = side
        self.downsample = PatchMerging(dim // 2, spec.eps) if merges else None
        self.blocks = nn.ModuleList()
        for _ in range(blocks):
            self.blocks.append(Block(WindowAttention(dim, heads), dim, 4 * dim, spec.eps))

    def windows(self, number, device):
        """(order of the tokens, mask or None) for a block: see `window_order` and `mask_of`."""
        shifted = number % 2 == 1 and self.side > WINDOW
        if not shifted:
            return window_order(self.side, 0, device), None
        return window_order(self.side, SHIFT, device), mask_of(self.side, SHIFT, device)

    def forward(self, x):
        """Tokens [B, T, dim], row by row → the same after merging, row by row.

        Between its blocks the tokens stay in the order of windows: everything but attention works
        on single tokens.
        """
        if self.downsample is not None:
            x = self.downsample(x, 2 * self.side)
        place = torch.arange(self.side**2, device=x.device)  # of each token of the grid in x
        for number, block in enumerate(self.blocks):
            order, mask = self.windows(number, x.device)
            x = block(x.index_select(1, place[order]), mask)
            place = order.argsort()
        return x.index_select(1, place)


class Swin(nn.Module):
    """forward: normalised images [B, 3, 224, 224] → the mean of the tokens after the final norm
    [B, dim].

    `blocks` are those of all stages; torch knows them as layers.I.blocks.J.
    """

    def __init__(self, spec, size=None):
        super().__init__()
        size = size or spec.size
        self.spec, self.size, self.pool, self.layer = spec, size, spec.pool, spec.depth
        self.embed_dim = spec.dim
        last = len(spec.stages) - 1
        self.patch_embed = PatchEmbed(spec.stem, spec.dim >> last, spec.eps)
        self.layers = nn.ModuleList()
        for number, blocks in enumerate(spec.stages):
            halvings = last - number  # of width and heads, from the last stage
            stage = Stage(
                spec,
                dim=spec.dim >> halvings,
                heads=spec.heads >> halvings,
                blocks=blocks,
                side=size // 4 >> number,
                merges=number > 0,
            )
            self.layers.append(stage)
        self.norm = nn.LayerNorm(spec.dim, eps=spec.eps)

    @property
    def blocks(self):
        return [block for stage in self.layers for block in stage.blocks]

    def forward(self, images):
        x = self.patch_embed(images)
        for stage in self.layers:
            x = stage(x)
        return self.norm(x).mean(dim=1)
