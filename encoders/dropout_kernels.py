"""Triton's kernels for LoRA's dropout: one pass over the memory, same masks as dropout.keep_mask.

A file of its own, because the decorator needs Triton at once: dropout.py imports it for tensors on
GPUs alone, and passes its constants of the hash, `mixers` (MIX1, MIX2, WEYL), and first_kept(p).
"""

import torch
import triton
import triton.language as tl

WORDS = 256  # hashes per program; each serves four elements


@triton.jit
def _splitmix(x, MIX1: tl.constexpr, MIX2: tl.constexpr):
    # int64 as in dropout.splitmix: the shifts copy the sign, the masks remove these copies.
    x = (((x >> 30) & 0x3FFFFFFFF) ^ x) * MIX1
    x = (((x >> 27) & 0x1FFFFFFFFF) ^ x) * MIX2
    return ((x >> 31) & 0x1FFFFFFFF) ^ x


@triton.jit
def _mask(
    key,
    elements,
    programs,
    first_kept,
    MIX1: tl.constexpr,
    MIX2: tl.constexpr,
    WEYL: tl.constexpr,
    WORDS: tl.constexpr,
):
    """This program's elements, [WORDS, 4] each: offset (int64), whether it exists, is kept."""
    sample = tl.program_id(0) // programs
    word = (tl.program_id(0) % programs).to(tl.int64) * WORDS + tl.arange(0, WORDS)
    lane = tl.arange(0, 4)
    hashed = _splitmix(tl.load(key + sample) + (word + 1) * WEYL, MIX1, MIX2)
    number = (hashed[:, None] >> (16 * lane[None, :])).to(tl.int16)
    element = word[:, None] * 4 + lane[None, :]
    offset = sample.to(tl.int64) * elements + element
    return offset, element < elements, number >= first_kept


# Keys are rows of one buffer and start at any multiple of 8 bytes: one kernel for all of them.
@triton.jit(do_not_specialize_on_alignment=["key"])
def _drop(
    x,
    out,
    key,
    elements,
    programs,
    first_kept,
    MIX1: tl.constexpr,
    MIX2: tl.constexpr,
    WEYL: tl.constexpr,
    WORDS: tl.constexpr,
):
    offset, exists, kept = _mask(key, elements, programs, first_kept, MIX1, MIX2, WEYL, WORDS)
    value = tl.load(x + offset, mask=exists)
    tl.store(out + offset, tl.where(kept, value, 0.0), mask=exists)


@triton.jit(do_not_specialize_on_alignment=["key"])
def _add_kept(
    total,
    x,
    key,
    elements,
    programs,
    first_kept,
    MIX1: tl.constexpr,
    MIX2: tl.constexpr,
    WEYL: tl.constexpr,
    WORDS: tl.constexpr,
    EXACT: tl.constexpr,
):
    offset, exists, kept = _mask(key, elements, programs, first_kept, MIX1, MIX2, WEYL, WORDS)
    before = tl.load(total + offset, mask=exists).to(EXACT)
    after = before + tl.load(x + offset, mask=exists).to(EXACT)
    tl.store(total + offset, tl.where(kept, after, before), mask=exists)


def drop(x, key, elements, first_kept, mixers):
    """See dropout.drop; always a new contiguous tensor."""
    x, key = x.contiguous(), key.contiguous()
    out = torch.empty_like(x)
    programs = triton.cdiv(elements, 4 * WORDS)  # per sample
    with torch.cuda.device_of(x):  # Triton launches on the current device
        _drop[(len(key) * programs,)](x, out, key, elements, programs, first_kept, *mixers, WORDS)
    return out


def add_kept(total, x, key, elements, first_kept, mixers):
    """See dropout.add_kept. The sum is computed in float32 at least and rounded once."""
    total, x, key = total.contiguous(), x.contiguous(), key.contiguous()
    exact = tl.float64 if x.dtype == torch.float64 else tl.float32
    programs = triton.cdiv(elements, 4 * WORDS)
    with torch.cuda.device_of(x):
        _add_kept[(len(key) * programs,)](
            total, x, key, elements, programs, first_kept, *mixers, WORDS, exact
        )
    return total
