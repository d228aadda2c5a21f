"""The graph of a vision transformer (encoders/vit.py)."""

import functools

import numpy as np

from onnx_model.nodes import (
    attention,
    block,
    cast,
    float_type,
    layer_norm,
    patch_product,
    stream_type,
    to_numpy,
)


def vit(g, encoder, x, input_type, mean, std, peaks):
    spec = encoder.spec
    attend = functools.partial(attention, g, heads=spec.heads, dim=spec.dim)
    x = tokens(g, encoder, x, input_type, mean, std)
    last, half = len(encoder.blocks) - 1, False
    for i, layers in enumerate(encoder.blocks):
        first = i == last and encoder.pool == "cls"
        wanted = stream_type(g, peaks, i)
        x, half = cast(g, x, half, wanted, f"blocks.{i}"), wanted
        if spec.pos == "rotary":
            attend = functools.partial(rotary_attention, g, encoder=encoder, first=first)
        x = block(g, x, layers, spec, f"blocks.{i}", i, peaks, attend, first)
    x = layer_norm(g, cast(g, x, half, False, "norm"), encoder.norm, "norm")
    return pool(g, encoder, x)


def tokens(g, encoder, x, input_type, mean, std):
    """Patch embedding as one product; class token, registers and positions as one constant →
    [N, T, dim], float32.
    """
    weight = to_numpy(encoder.patch_embed.proj.weight)
    bias = to_numpy(encoder.patch_embed.proj.bias)
    position = None
    if encoder.pos_embed is not None:
        position = to_numpy(encoder.pos_embed)[0]
    prefix = to_numpy(encoder.cls_token)[0]
    if encoder.reg_token is not None:
        prefix = np.concatenate([prefix, to_numpy(encoder.reg_token)[0]])
    if encoder.spec.pos == "all":
        prefix, position = prefix + position[: encoder.prefix], position[encoder.prefix :]
    if encoder.field < encoder.size:
        start, end = (encoder.size - encoder.field) // 2, (encoder.size + encoder.field) // 2
        axes = (2, 3)
        if input_type == "uint8":  # [N, size, size, 3]
            axes = (1, 2)
        x = g.op("Slice", x, g.ints(start, start), g.ints(end, end), g.ints(*axes), at="field")
    x, bias = patch_product(
        g, x, "patch_embed.proj", weight, bias, encoder.grid, input_type, mean, std
    )  # [N, grid², dim]
    patches = np.broadcast_to(bias, (encoder.grid**2, len(bias)))
    if position is not None:
        patches = position + bias
    # The tokens before the patches are zeros to which a constant is added, like the position. No
    # Pad, for which ONNX Runtime up to 1.24 has no kernel on GPUs at these opsets.
    some = g.op("Slice", x, g.ints(0), g.ints(len(prefix)), g.ints(1), at="tokens")
    zeros = g.op("Mul", some, g.tensor("zero", 0, np.float32), at="tokens")
    x = g.op("Concat", zeros, x, at="tokens", axis=1)
    constant = np.concatenate([prefix, patches])[None]
    return g.op("Add", x, g.tensor("tokens", constant, np.float32), at="tokens")


def rotary_attention(g, q, k, v, half, at, encoder, first):
    """Attention after q and k were turned by DINOv3's rotary factors, as constants. first: q is
    that of the class token alone, which is not turned.
    """
    spec = encoder.spec
    factors = [to_numpy(factor) for factor in encoder.rotary(encoder.norm.weight)]
    k = rotate(g, k, factors, spec.heads, half, f"{at}.k")
    if not first:
        q = rotate(g, q, factors, spec.heads, half, f"{at}.q")
    return attention(g, q, k, v, spec.heads, spec.dim, half, at)


def rotate(g, x, factors, heads, half, at):
    """Turn the channels of each head of x [N, T, dim] by (cos, sin), each [T, d]."""
    d = factors[0].shape[1]
    cos, sin = (
        g.tensor(f"{at}.{name}", factor[:, None, : d // 2], float_type(half))
        for name, factor in zip(("cos", "sin"), factors)
    )  # [T, 1, d/2]; the other half of the channels has the same
    x = g.op("Reshape", x, g.ints(0, 0, heads, d), at=at)
    low, high = g.op("Split", x, at=at, outputs=2, axis=-1, num_outputs=2)
    turned = (
        g.op("Sub", g.op("Mul", low, cos, at=at), g.op("Mul", high, sin, at=at), at=at),
        g.op("Add", g.op("Mul", high, cos, at=at), g.op("Mul", low, sin, at=at), at=at),
    )
    x = g.op("Concat", *turned, at=at, axis=-1)
    return g.op("Reshape", x, g.ints(0, 0, heads * d), at=at)


def attention_pool(g, x, pooler):
    """AttentionPooler on tokens [N, T, dim], in float32 in every precision: its query is constant,
    and the product of that with the keys' weights is one vector per head.
    """
    at, heads = "pooler", pooler.heads
    query = to_numpy(pooler.to_q(pooler.ln_q(pooler.query)).view(heads, -1))  # [h, d]
    d = query.shape[1]
    keys, values = np.split(to_numpy(pooler.to_kv.weight).reshape(2 * heads, d, -1), 2)
    x = layer_norm(g, x, pooler.ln_k, f"{at}.ln_k")
    # q · (K x) = (q K) · x: scores [N, T, h], then [N, h, T]
    directions = np.einsum("hd,hdc->ch", query, keys) * d**-0.5
    scores = g.op("MatMul", x, g.tensor(f"{at}.query", directions, np.float32), at=at)
    scores = g.op("Softmax", g.op("Transpose", scores, at=at, perm=[0, 2, 1]), at=at, axis=-1)
    # Σ w (V x) = V (Σ w x): [N, h, 1, dim] times [h, dim, d]
    x = g.op("Unsqueeze", g.op("MatMul", scores, x, at=at), g.ints(2), at=at)
    values = g.tensor(f"{at}.values", values.transpose(0, 2, 1), np.float32)
    x = g.op("Reshape", g.op("MatMul", x, values, at=at), g.ints(0, heads * d), at=at)
    out = g.tensor(f"{at}.to_out", to_numpy(pooler.to_out.weight).T, np.float32)
    return layer_norm(g, g.op("MatMul", x, out, at=at), pooler.norm, f"{at}.norm")


def pool(g, encoder, x):
    """The embedding [N, D] out of the tokens after the last norm; see encoders/vit.py."""

    def mean(patches):
        return g.op("ReduceMean", patches, g.ints(1), at="pool", keepdims=0)

    if encoder.pool == "attention":
        return attention_pool(g, x, encoder.pooler)
    parts = []
    if "cls" in encoder.pool:
        parts.append(g.op("Gather", x, g.tensor("first", 0, np.int64), at="pool", axis=1))
    if "center" in encoder.pool:
        start, side = encoder.centre
        rows = np.arange(encoder.grid**2).reshape(encoder.grid, encoder.grid)
        rows = rows[start : start + side, start : start + side].ravel() + encoder.prefix
        parts.append(mean(g.op("Gather", x, g.tensor("center", rows), at="pool", axis=1)))
    if "mean" in encoder.pool:
        start, end = g.ints(encoder.prefix), g.ints(encoder.prefix + encoder.grid**2)
        parts.append(mean(g.op("Slice", x, start, end, g.ints(1), at="pool")))
    if len(parts) == 1:
        return parts[0]
    return g.op("Concat", *parts, at="pool", axis=-1)
