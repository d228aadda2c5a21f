"""The graph of a vision transformer (encoders/vit.py)."""

import functools

import numpy as np

from onnx_model.nodes import attention, block, layer_norm, patch_product, to_numpy


def vit(g, encoder, x, input_type, mean, std, peaks):
    spec = encoder.spec
    attend = functools.partial(attention, g, heads=spec.heads, dim=spec.dim)
    x = tokens(g, encoder, x, input_type, mean, std)
    last = len(encoder.blocks) - 1
    for i, layers in enumerate(encoder.blocks):
        first = i == last and encoder.pool == "cls"
        x = block(g, x, layers, spec, f"blocks.{i}", i, peaks, attend, first)
    x = layer_norm(g, x, encoder.norm, "norm")
    return pool(g, encoder, x)


def tokens(g, encoder, x, input_type, mean, std):
    """Patch embedding as one product; class token, registers and positions as constants."""
    weight = to_numpy(encoder.patch_embed.proj.weight)
    bias = to_numpy(encoder.patch_embed.proj.bias)
    position = to_numpy(encoder.pos_embed)[0]
    prefix = to_numpy(encoder.cls_token)[0]
    if encoder.reg_token is not None:
        prefix = np.concatenate([prefix, to_numpy(encoder.reg_token)[0]])
    if encoder.spec.pos == "all":
        prefix, position = prefix + position[: encoder.prefix], position[encoder.prefix :]
    x = patch_product(
        g, x, "patch_embed.proj", weight, bias, position, encoder.grid, input_type, mean, std
    )  # [N, grid², dim]
    batch = g.op("Slice", g.op("Shape", x, at="tokens"), g.ints(0), g.ints(1), at="tokens")
    shape = g.op("Concat", batch, g.ints(*prefix.shape), at="tokens", axis=0)
    prefix = g.op("Expand", g.tensor("prefix", prefix[None], np.float32), shape, at="tokens")
    return g.op("Concat", prefix, x, at="tokens", axis=1)


def pool(g, encoder, x):
    """The embedding [N, D] out of the tokens after the last norm; see encoders/vit.py."""

    def mean(patches):
        return g.op("ReduceMean", patches, g.ints(1), at="pool", keepdims=0)

    if encoder.pool == "patch-center":
        start, side = encoder.centre
        rows = np.arange(encoder.grid**2).reshape(encoder.grid, encoder.grid)
        rows = rows[start : start + side, start : start + side].ravel() + encoder.prefix
        return mean(g.op("Gather", x, g.tensor("center", rows), at="pool", axis=1))
    parts = []
    if "cls" in encoder.pool:
        parts.append(g.op("Gather", x, g.tensor("first", 0, np.int64), at="pool", axis=1))
    if "mean" in encoder.pool:
        start, end = g.ints(encoder.prefix), g.ints(encoder.prefix + encoder.grid**2)
        parts.append(mean(g.op("Slice", x, start, end, g.ints(1), at="pool")))
    if len(parts) == 1:
        return parts[0]
    return g.op("Concat", *parts, at="pool", axis=-1)
