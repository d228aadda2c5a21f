"""LoRA (Hu et al. 2022) around the linear layers of a transformer: wrap, count, merge, save, load.

    y = W x + b + scale * B A dropout(x)        scale = alpha / rank (rsLoRA: alpha / sqrt(rank))

A [r, in] starts kaiming-uniform(a = sqrt 5), B [out, r] at zero, so a fresh adapter changes nothing. Parameters are
called lora_A, lora_B (DoRA: also lora_magnitude); everything else is frozen.

The dropout mask is a hash of (seed, step, layer, sample, element): it needs no memory for the backward pass, a resumed
run draws the same one, and so does any number of processes.
"""

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

import runs
from cli import UserError

TARGETS = ("qkv", "proj", "fc1", "fc2")
MIX1, MIX2, WEYL = -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15, -0x61C8864680B583EB  # splitmix64's, as signed numbers


def splitmix(x):
    """splitmix64's finaliser on an int64 tensor (or on a Python int, modulo 2^64)."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * MIX1
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * MIX2
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def keep_mask(key, elements, p):
    """Boolean [B, elements]: which are kept. key: int64 [B], one per sample. Four 16-bit numbers per hash."""
    words = (elements + 3) // 4
    counter = torch.arange(1, words + 1, device=key.device, dtype=torch.int64) * WEYL
    lanes = splitmix(key[:, None] + counter).view(torch.int16)[:, :elements]
    return lanes >= round(p * 65536) - 32768


def kept_share(p):
    """The true probability of being kept: p in steps of 2^-16."""
    return 1 - round(p * 65536) / 65536


class LoRAFunction(torch.autograd.Function):
    """Adapted linear layer that keeps only its input for the backward pass; the mask is hashed again there."""

    @staticmethod
    def forward(ctx, x, weight, bias, A, B, scale, key, p):
        y = F.linear(x, weight, bias)
        ctx.save_for_backward(x, weight, A, B, key)
        ctx.scale, ctx.p = scale, p
        h = F.linear(LoRAFunction.drop(x, key, p), A.to(x.dtype))
        return y.add_(F.linear(h, B.to(x.dtype)), alpha=scale)

    @staticmethod
    def drop(x, key, p):
        if p == 0:
            return x
        mask = keep_mask(key, x[0].numel(), p).view(x.shape)
        return x * mask * (1 / kept_share(p))

    @staticmethod
    def backward(ctx, grad):
        x, weight, A, B, key = ctx.saved_tensors
        g = grad.reshape(-1, grad.shape[-1])
        dropped = LoRAFunction.drop(x, key, ctx.p).reshape(-1, x.shape[-1])
        down = A.to(x.dtype)
        gh = (g @ B.to(g.dtype)) * ctx.scale                     # [n, r]
        gB = (g.T @ (dropped @ down.T)).to(B.dtype) * ctx.scale
        gA = (gh.T @ dropped).to(A.dtype)
        gx = None
        if ctx.needs_input_grad[0]:
            back = (gh @ down).view(x.shape)
            gx = (g @ weight).view(x.shape) + LoRAFunction.drop(back, key, ctx.p)
        return gx, None, None, gA, gB, None, None, None


class LoRALinear(nn.Module):
    """A frozen nn.Linear with a low-rank correction. `base` keeps weight and bias."""

    def __init__(self, base, rank, alpha, dropout, layer, dora=False, rslora=False):
        super().__init__()
        self.weight, self.bias = base.weight, base.bias
        self.rank, self.alpha, self.p, self.layer = rank, alpha, dropout, layer
        self.scale = alpha / math.sqrt(rank) if rslora else alpha / rank
        kind = {"device": base.weight.device,
                "dtype": torch.float64 if base.weight.dtype == torch.float64 else torch.float32}
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, **kind))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, **kind))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.lora_magnitude = nn.Parameter(base.weight.detach().to(kind["dtype"]).norm(dim=1)) if dora else None
        self.register_buffer("key", torch.zeros(1, dtype=torch.int64, device=base.weight.device), persistent=False)

    in_features = property(lambda self: self.weight.shape[1])
    out_features = property(lambda self: self.weight.shape[0])

    def forward(self, x):
        p = self.p if self.training else 0.0
        key = self.key if len(self.key) == len(x) or p == 0 else self.key[:1] + torch.arange(
            len(x), device=x.device) * WEYL
        if self.lora_magnitude is not None:
            return self.dora(x, key, p)
        return LoRAFunction.apply(x, self.weight, self.bias, self.lora_A, self.lora_B, self.scale, key, p)

    def dora(self, x, key, p):
        """DoRA (Liu et al. 2024): the adapted weight's rows get learned lengths; the norm is not differentiated."""
        weight, low = self.weight.to(self.lora_A.dtype), self.scale * self.lora_B @ self.lora_A
        factor = (self.lora_magnitude / (weight + low).norm(dim=1).detach()).to(x.dtype)
        dropped = LoRAFunction.drop(x, key, p)
        up = F.linear(F.linear(dropped, self.lora_A.to(x.dtype)), self.lora_B.to(x.dtype)) * self.scale
        y = F.linear(dropped if p else x, self.weight)
        y = F.linear(x, self.weight, self.bias) + (factor - 1) * y + factor * up
        return y

    def merged(self):
        """The plain layer with the same outputs; computed in float32 at least, rounded once."""
        exact = torch.promote_types(self.weight.dtype, torch.float32)
        weight = self.weight.to(exact) + (self.scale * self.lora_B.to(exact) @ self.lora_A.to(exact))
        if self.lora_magnitude is not None:
            weight *= (self.lora_magnitude.to(exact) / weight.norm(dim=1))[:, None]
        if not weight.isfinite().all():
            raise UserError("the adapter holds numbers that are not finite: the training that made it diverged")
        plain = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        plain.weight = nn.Parameter(weight.to(self.weight.dtype), requires_grad=False)
        plain.bias = self.bias
        return plain


def adapted(encoder):
    return [(name, module) for name, module in encoder.named_modules() if isinstance(module, LoRALinear)]


def add_lora(encoder, rank=16, alpha=16, dropout=0.1, targets=TARGETS, dora=False, rslora=False):
    """Wrap the target layers of every block of `encoder.blocks`; freeze the rest. Returns their number.

    UserError where fewer than targets x depth are found (a name that matches nothing is never skipped silently).
    """
    if rank < 1 or not 0 <= dropout < 1:
        raise UserError(f"--rank {rank} --dropout {dropout}: the rank is at least 1, the dropout in [0, 1)")
    blocks = getattr(encoder, "blocks", None)
    if not blocks:
        raise UserError(f"{getattr(getattr(encoder, 'spec', None), 'name', 'this encoder')} has no transformer blocks "
                        "to put LoRA on: train it end to end, without --lora")
    encoder.requires_grad_(False)
    count = 0
    for block in blocks:
        for module in block.modules():
            for name, child in list(module.named_children()):
                if name in targets and isinstance(child, nn.Linear):
                    setattr(module, name, LoRALinear(child, rank, alpha, dropout, count, dora, rslora))
                    count += 1
    if count != len(targets) * len(blocks):
        raise UserError(f"LoRA targets {', '.join(targets)}: {count} layers found, {len(targets) * len(blocks)} expected "
                        f"({len(targets)} in each of {len(blocks)} blocks); there are {', '.join(TARGETS)}")
    return count


def set_step(encoder, seed, step, samples):
    """Key the dropout masks of the coming forward pass. samples: numbers [B] of the batch's samples within the step."""
    samples = torch.as_tensor(samples, dtype=torch.int64)
    for _, module in adapted(encoder):
        key = splitmix(samples + splitmix(torch.tensor((seed << 40) ^ (step << 12) ^ module.layer)) * 3)
        module.key = key.to(module.weight.device)


def merge_lora(encoder):
    """Put the adapters into plain layers, once. Returns the encoder; merging again changes nothing."""
    for name, module in adapted(encoder):
        parent = encoder.get_submodule(name.rpartition(".")[0])
        setattr(parent, name.rpartition(".")[2], module.merged())
    return encoder


def lora_state_dict(encoder):
    return {f"{name}.{key}": value.detach() for name, module in adapted(encoder)
            for key, value in module.named_parameters() if key.startswith("lora_")}


def load_lora(encoder, state):
    """Fill the adapters, strictly."""
    own = {f"{name}.{key}": value for name, module in adapted(encoder)
           for key, value in module.named_parameters() if key.startswith("lora_")}
    wrong = sorted(set(own) ^ set(state)) or [k for k in own if own[k].shape != state[k].shape]
    if wrong:
        raise UserError(f"the adapter does not fit: {len(wrong)} tensors differ, for example {wrong[0]}")
    with torch.no_grad():
        for key, value in own.items():
            value.copy_(state[key])
