"""Dropout masks of LoRA: a hash of a key per sample and the element's place.

They need no memory for the backward pass, and are the same on every device, in a resumed run and
in any number of processes. Plain torch computes them on CPUs, and under a compiler, which makes
one kernel of these operations itself. Run one by one on a GPU they cost more than the layer that
they belong to; there one kernel of Triton's hashes, compares and selects
(encoders/dropout_kernels.py).
"""

import functools

import torch

import common

# splitmix64's constants (Steele et al. 2014), as signed numbers
MIX1, MIX2, WEYL = -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15, -0x61C8864680B583EB
# Devices that keep the masks for the backward pass, a byte per element; others hash them again.
MASK_KEPT_ON = ("cpu",)


def splitmix(x):
    """splitmix64's finaliser on an int64 tensor, mostly in place: half the time on CPUs."""
    x = (x >> 30).bitwise_and_(0x3FFFFFFFF).bitwise_xor_(x).mul_(MIX1)
    x = (x >> 27).bitwise_and_(0x1FFFFFFFFF).bitwise_xor_(x).mul_(MIX2)
    return (x >> 31).bitwise_and_(0x1FFFFFFFF).bitwise_xor_(x)


def keep_mask(key, elements, p):
    """Boolean [B, elements]: which are kept. key: int64 [B], one per sample. Four 16-bit numbers
    per hash.
    """
    # 1, 2, 3, … times WEYL, in 64 bits. Written (i + 1) * WEYL, inductor would compute with
    # constants beyond them.
    counter = ~torch.arange((elements + 3) // 4, device=key.device) * -WEYL
    words = splitmix(key[:, None] + counter)
    if torch.compiler.is_compiling():
        # On CPUs, inductor's code for the view writes beyond its memory.
        shifts = torch.arange(0, 64, 16, device=key.device)
        lanes = (words[..., None] >> shifts).to(torch.int16).flatten(1)
    else:
        lanes = words.view(torch.int16)
    return lanes[:, :elements] >= first_kept(p)


def first_kept(p):
    """The smallest of the numbers -32768 … 32767 whose element is kept."""
    return round(p * 65536) - 32768


def kept_share(p):
    """The true probability of being kept: p in steps of 2^-16."""
    return 1 - round(p * 65536) / 65536


def drop(x, key, elements, p):
    """x with zeros where its mask drops, not scaled, and the mask if it is worth keeping.

    x: the samples one after another, in any shape; key: int64 [B]; elements: of one sample. Returns
    (like x, boolean like x or None).
    """
    if p == 0:
        return x, None
    kernels = kernels_for(x)
    if kernels is not None:
        return kernels.drop(x, key, elements, first_kept(p), (MIX1, MIX2, WEYL)), None
    keep = keep_mask(key, elements, p).view(x.shape)
    return x * keep, keep if x.device.type in MASK_KEPT_ON else None


def add_kept(total, x, key, elements, p, keep=None):
    """total + x where x's mask keeps it, in the memory of `total` if that is contiguous.

    total, x: of one shape and type; keep: the mask, if `drop` returned it.
    """
    if p == 0:
        return total.add_(x)
    kernels = kernels_for(x)
    if kernels is not None:
        return kernels.add_kept(total, x, key, elements, first_kept(p), (MIX1, MIX2, WEYL))
    if keep is None:
        keep = keep_mask(key, elements, p).view(x.shape)
    return total.addcmul_(x, keep.to(x.dtype))


class Dropout(torch.autograd.Function):
    """`drop` with its gradient, which the same mask drops. x: [B, …]."""

    @staticmethod
    def forward(ctx, x, key, p):
        ctx.p, ctx.elements = p, x.shape[1:].numel()
        dropped, keep = drop(x, key, ctx.elements, p)
        ctx.save_for_backward(key, keep)
        return dropped

    @staticmethod
    def backward(ctx, grad):
        key, keep = ctx.saved_tensors
        if keep is not None:
            return grad * keep, None, None
        return drop(grad, key, ctx.elements, ctx.p)[0], None, None


# ---------------------------------------------------------------- kernels on GPUs


def kernels_for(x):
    """The module of Triton's kernels, or None where plain torch computes x's mask."""
    if x.device.type != "cuda" or torch.compiler.is_compiling():
        return None
    return kernels_on(x.device)


@functools.cache
def kernels_on(device):
    """The module of Triton's kernels, tried on `device`. None, with a note, if they do not run:
    Triton is not installed (Windows), or finds no C compiler.
    """
    x = torch.zeros(1, device=device)
    key = torch.zeros(1, dtype=torch.int64, device=device)
    try:
        from encoders import dropout_kernels as kernels  # imports triton

        kernels.add_kept(x, x, key, 1, first_kept(0.5), (MIX1, MIX2, WEYL))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # Triton's own are of many kinds
        common.note(
            f"note: no Triton kernels on {device} ({common.first_line(error)}): LoRA's dropout "
            "takes longer, with the same masks"
        )
        return None
    return kernels
