"""The graph of a Swin transformer (encoders/swin.py)."""

import functools

import numpy as np

from onnx_model.nodes import (
    block,
    cast,
    convolution,
    float_type,
    layer_norm,
    linear,
    normalised,
    patch_product,
    softmax,
    stream_type,
    to_numpy,
)


def swin(g, encoder, x, input_type, mean, std, peaks):
    """→ the mean of the tokens after the final norm [N, dim]."""
    x = patch_embed(g, encoder, x, input_type, mean, std)
    i = 0  # number of the block in the whole network
    for number, stage in enumerate(encoder.layers):
        x = swin_stage(g, x, stage, encoder.spec, f"layers.{number}", i, peaks)
        i += len(stage.blocks)
    x = layer_norm(g, x, encoder.norm, "norm")
    return g.op("ReduceMean", x, g.ints(1), at="pool", keepdims=0)


def patch_embed(g, encoder, x, input_type, mean, std):
    """Pixels → tokens float32 [N, (S/4)², dim]."""
    at, stem = "patch_embed.proj", encoder.patch_embed.proj
    side = encoder.layers[0].side
    if encoder.spec.stem == "convolutions":
        x = normalised(g, x, input_type, mean, std)
        first, first_norm, _, second, second_norm, _, last = stem
        x = g.op("Relu", convolution(g, x, first, first_norm, f"{at}.0", False, False), at=at)
        x = g.op("Relu", convolution(g, x, second, second_norm, f"{at}.3", False, False), at=at)
        x = convolution(g, x, last, None, f"{at}.6", False, False)  # [N, dim, S/4, S/4]
        x = g.op("Reshape", x, g.ints(0, 0, side * side), at=at)
        x = g.op("Transpose", x, at=at, perm=[0, 2, 1])
    else:
        weight, bias = to_numpy(stem.weight), to_numpy(stem.bias)
        x, bias = patch_product(g, x, at, weight, bias, side, input_type, mean, std)
        x = g.op("Add", x, g.tensor(f"{at}.bias", bias, np.float32), at=at)
    return layer_norm(g, x, encoder.patch_embed.norm, "patch_embed.norm")


def swin_stage(g, x, stage, spec, at, i, peaks):
    """As Stage.forward, from float32 to float32: the tokens stay in the order of windows between
    the blocks.
    """
    if stage.downsample is not None:
        x = merge_patches(g, x, stage.downsample, 2 * stage.side, f"{at}.downsample")
    place, half = np.arange(stage.side**2), False
    for number, layers in enumerate(stage.blocks):
        order, mask = stage.windows(number, "cpu")
        order, wanted = order.numpy(), stream_type(g, peaks, i + number)
        x, half = cast(g, x, half, wanted, f"{at}.blocks.{number}"), wanted
        x = reorder(g, x, place[order], f"{at}.blocks.{number}")
        bias = to_numpy(layers.attn.bias(mask))
        d = layers.attn.qkv.in_features // layers.attn.heads
        attend = functools.partial(
            window_attention, g, bias=bias, d=d, windows=len(order) // bias.shape[-1]
        )
        x = block(g, x, layers, spec, f"{at}.blocks.{number}", i + number, peaks, attend)
        place = np.argsort(order)
    return cast(g, reorder(g, x, place, at), half, False, at)


def reorder(g, x, order, at):
    if np.array_equal(order, np.arange(len(order))):
        return x
    return g.op("Gather", x, g.tensor(f"{at}.order", order, np.int64), at=at, axis=1)


def window_attention(g, q, k, v, half, at, bias, d, windows):
    """Attention within each window of 49 tokens; q, k and v [N, T, dim] → the same. bias: [1 or
    windows, heads, 49, 49], position bias and mask.
    """
    heads, area = bias.shape[1:3]
    split = g.ints(0, windows, area, heads, -1)
    # to [N, windows, heads, 49, d], k to [N, windows, heads, d, 49]
    q = g.op("Transpose", g.op("Reshape", q, split, at=at), at=at, perm=[0, 1, 3, 2, 4])
    k = g.op("Transpose", g.op("Reshape", k, split, at=at), at=at, perm=[0, 1, 3, 4, 2])
    v = g.op("Transpose", g.op("Reshape", v, split, at=at), at=at, perm=[0, 1, 3, 2, 4])
    scale = g.tensor(f"{at}.scale", d**-0.5, float_type(half))
    scores = g.op("MatMul", g.op("Mul", q, scale, at=at), k, at=at)
    scores = g.op("Add", scores, g.tensor(f"{at}.bias", bias, float_type(half)), at=at)
    y = g.op("MatMul", softmax(g, scores, half, at), v, at=at)
    y = g.op("Transpose", y, at=at, perm=[0, 1, 3, 2, 4])
    return g.op("Reshape", y, g.ints(0, windows * area, -1), at=at)


def merge_patches(g, x, downsample, side, at):
    """Four neighbouring tokens become one: [N, side², dim] → [N, side²/4, 2 dim], float32."""
    weight = to_numpy(downsample.reduction.weight)
    dim = weight.shape[1] // 4
    # to [N, row, column, column of the four, row of the four, channel]
    x = g.op("Reshape", x, g.ints(0, side // 2, 2, side // 2, 2, dim), at=at)
    x = g.op("Transpose", x, at=at, perm=[0, 1, 3, 4, 2, 5])
    x = g.op("Reshape", x, g.ints(0, side * side // 4, 4 * dim), at=at)
    x = layer_norm(g, x, downsample.norm, f"{at}.norm")
    at = f"{at}.reduction"
    if g.precision == "int8":
        return linear(g, x, at, weight)
    # float32 in an fp16 graph too: the result is the residual stream
    return g.op("MatMul", x, g.tensor(f"{at}.weight", weight.T, np.float32), at=at)
