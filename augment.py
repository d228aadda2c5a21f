"""Augmentation of training patches: batched, on the device, parameters of each sample from a key of its own.

    python augment.py --data D --gallery out.png

Operations and probabilities as in the paper's published code: colour jitter 0.1 each (p 0.5), Gaussian blur 5 px,
sigma 0.1-1 (p 0.1), flips (p 0.5 each), rotation by any angle (p 0.5).
"""

import math

import numpy as np
import torch
import torch.nn.functional as F

def margin(size=224):
    """Side of the crop that a patch of `size` px is rotated within, so that no corner of it lies outside."""
    return math.ceil(size * math.sqrt(2) / 32) * 32


def parameters(seed, step, samples):
    """Random parameters of the samples of a step: dict of arrays [B]. Each depends on (seed, step, sample) alone."""
    names = ("brightness", "contrast", "saturation", "hue", "sigma", "angle")
    out = {name: np.zeros(len(samples)) for name in names}
    for key in ("jitter", "blur", "hflip", "vflip", "rotate"):
        out[key] = np.zeros(len(samples), bool)
    out["order"] = np.zeros((len(samples), 4), np.int64)
    for i, sample in enumerate(samples):
        u = np.random.Generator(np.random.Philox(key=[seed & (2**64 - 1), (step << 32) + int(sample)])).random(16)
        out["jitter"][i], out["blur"][i], out["hflip"][i], out["vflip"][i], out["rotate"][i] = u[:5] < (
            0.5, 0.1, 0.5, 0.5, 0.5)
        for name, value in zip(names[:3], u[5:8]):
            out[name][i] = 0.9 + 0.2 * value
        out["hue"][i], out["sigma"][i], out["angle"][i] = 0.2 * u[8] - 0.1, 0.1 + 0.9 * u[9], 360 * u[10] - 180
        out["order"][i] = np.argsort(u[11:15])
    return out


def augment(images, keys, size=224):
    """uint8 [B, S, S, 3] (S >= size) → float32 [B, 3, size, size] in [0, 1]. keys: (seed, step, samples)."""
    p = parameters(*keys)
    x = images.permute(0, 3, 1, 2).float() / 255
    S = x.shape[-1]
    a = (S - size) // 2
    out = x[:, :, a:a + size, a:a + size].clone()
    r = np.flatnonzero(p["rotate"])
    if len(r):
        src = x[r]
        if S < margin(size):
            pad = (margin(size) - S + 1) // 2
            src = F.pad(src, (pad,) * 4, mode="reflect")
        angle = torch.as_tensor(np.deg2rad(p["angle"][r]), dtype=torch.float32, device=x.device)
        c, s, k = angle.cos(), angle.sin(), size / src.shape[-1]
        theta = torch.stack([torch.stack([c, -s, c * 0], 1), torch.stack([s, c, c * 0], 1)], 1) * k
        grid = F.affine_grid(theta, (len(r), 3, size, size), align_corners=False)
        out[r] = F.grid_sample(src, grid, align_corners=False)
    out = torch.where(_of(p["hflip"], x), out.flip(3), out)
    out = torch.where(_of(p["vflip"], x), out.flip(2), out)
    j = np.flatnonzero(p["jitter"])
    if len(j):
        v = out[j]
        grey = torch.tensor([0.2989, 0.587, 0.114], device=x.device).view(1, 3, 1, 1)
        for _ in range(1):
            v = (v * _of(p["brightness"][j], x)).clamp(0, 1)
            m = (v * grey).sum(1, keepdim=True).mean((2, 3), keepdim=True)
            v = (m + (v - m) * _of(p["contrast"][j], x)).clamp(0, 1)
            g = (v * grey).sum(1, keepdim=True)
            v = (g + (v - g) * _of(p["saturation"][j], x)).clamp(0, 1)
        out[j] = v
    b = np.flatnonzero(p["blur"])
    if len(b):
        t = torch.arange(-2, 3, device=x.device).float()
        w = torch.exp(-t ** 2 / (2 * torch.as_tensor(p["sigma"][b], device=x.device).float()[:, None] ** 2))
        w = w / w.sum(1, keepdim=True)
        v = F.pad(out[b], (2, 2, 2, 2), mode="reflect").reshape(1, -1, size + 4, size + 4)
        w3 = w.repeat_interleave(3, 0)
        v = F.conv2d(v, w3[:, None, None, :], groups=len(w3))
        out[b] = F.conv2d(v, w3[:, None, :, None], groups=len(w3)).view(len(b), 3, size, size)
    return out


def _of(values, x):
    return torch.as_tensor(values, device=x.device, dtype=None if values.dtype == bool else x.dtype).view(-1, 1, 1, 1)
