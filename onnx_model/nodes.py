"""The nodes of an ONNX graph that the networks share, in three precisions. See graph.py."""

import hashlib

import numpy as np
from onnx import TensorProto, helper, numpy_helper

FUSED = 23  # from this opset on, attention is one operator
GELU = 20  # from this opset on, GELU is one operator
INLINE = 1024  # bytes; smaller tensors stay in the graph, where shape inference sees them
PAGE = 4096  # alignment in the file of weights, so that runtimes can map it
HALF_MAX = 65504.0
HEADROOM = 4  # how many times larger than seen activations may get before float16 overflows


def fits_half(peak):
    """Whether float16 holds activations up to `peak`, with headroom."""
    return peak * HEADROOM < HALF_MAX


class Graph:
    """Nodes, and weights that go straight into a file.

    share  a constant of the same content, or a node that computes the same from the same, is
           written once: networks that have a part in common store and run it once
    """

    def __init__(self, weights, opset, precision, share=False):
        self.weights, self.opset, self.precision, self.share = weights, opset, precision, share
        self.nodes, self.tensors, self.names = [], [], {}
        self.shared = {}  # what a constant or a node is made of → its name(s)

    def name(self, base):
        """`base`, with a number if it is in use."""
        count = self.names[base] = self.names.get(base, -1) + 1
        return f"{base}_{count}" if count else base

    def op(self, kind, *inputs, at="", outputs=1, **attributes):
        """Add a node; returns the name(s) of its output(s). `at`: its place in the network."""
        made_of = kind, inputs, outputs, repr(sorted(attributes.items()))
        if self.share and made_of in self.shared:
            return self.shared[made_of]
        name = self.name(f"{at}/{kind}" if at else kind)
        results = [name]
        if outputs > 1:
            results = [f"{name}.{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(kind, inputs, results, name=name, **attributes))
        self.shared[made_of] = results
        if outputs == 1:
            self.shared[made_of] = name
        return self.shared[made_of]

    def tensor(self, name, array, dtype=None):
        """Add a constant; returns its name. Large ones are written to the file of weights."""
        array = np.asarray(array, dtype, order="C")  # ascontiguousarray would make scalars 1-D
        if self.share:
            content = hashlib.sha256(array.reshape(-1).view(np.uint8)).digest()
            made_of = content, array.dtype.str, array.shape
            if made_of not in self.shared:
                self.shared[made_of] = self.add_tensor(name, array)
            return self.shared[made_of]
        return self.add_tensor(name, array)

    def add_tensor(self, name, array):
        name = self.name(name)
        if array.nbytes <= INLINE:
            self.tensors.append(numpy_helper.from_array(array, name))
            return name
        self.weights.write(b"\0" * (-self.weights.tell() % PAGE))
        proto = TensorProto(
            name=name,
            dims=array.shape,
            data_type=helper.np_dtype_to_tensor_dtype(array.dtype),
            data_location=TensorProto.EXTERNAL,
        )
        place = {"location": "weights", "offset": self.weights.tell(), "length": array.nbytes}
        for key, value in place.items():
            proto.external_data.add(key=key, value=str(value))
        self.weights.write(memoryview(array).cast("B"))
        self.tensors.append(proto)
        return name

    def ints(self, *values):
        name = "int" + "_".join(map(str, values))
        if name not in self.names:
            name = self.tensor(name, np.array(values, np.int64))
        return name

    def to_half(self, x, at):
        return self.op("Cast", x, at=at, to=TensorProto.FLOAT16)

    def to_float(self, x, at):
        return self.op("Cast", x, at=at, to=TensorProto.FLOAT)


def to_numpy(tensor):
    return tensor.detach().double().numpy()


def float_type(half):
    return np.float16 if half else np.float32


def cast(g, x, half, wanted, at):
    """x, which is float16 if `half`, as float16 if `wanted`."""
    if half == wanted:
        return x
    if wanted:
        return g.to_half(x, at)
    return g.to_float(x, at)


def linear(g, x, at, weight, bias=None, half=False, shared=None):
    """x [..., in] times weight [out, in], plus bias → [..., out]; `half`: x is float16 and so is
    the result. A bias of zeros is left out.

    shared: a dict in which products of the same x keep its quantised form.
    """
    if g.precision == "int8":
        return linear_int8(g, x, at, weight, bias, {} if shared is None else shared)
    kind = float_type(half)
    y = g.op("MatMul", x, g.tensor(f"{at}.weight", weight.T, kind), at=at)
    if bias is None or not bias.any():
        return y
    return g.op("Add", y, g.tensor(f"{at}.bias", bias, kind), at=at)


def linear_int8(g, x, at, weight, bias, shared):
    # Weights: one step per output channel, symmetric.
    scale = np.maximum(np.abs(weight).max(axis=1), 1e-30) / 127
    quantised = np.rint(weight / scale[:, None]).astype(np.int8)
    # Activations: one step and zero point per batch, from the range of its values.
    if x not in shared:
        shared[x] = g.op("DynamicQuantizeLinear", x, at=at, outputs=3)
    values, step, zero = shared[x]
    y = g.op("MatMulInteger", values, g.tensor(f"{at}.weight", quantised.T), zero, at=at)
    # Back to numbers: products of steps.
    y = g.to_float(y, at)
    step = g.op("Mul", step, g.tensor(f"{at}.scale", scale, np.float32), at=at)
    y = g.op("Mul", y, step, at=at)
    if bias is None:
        return y
    return g.op("Add", y, g.tensor(f"{at}.bias", bias, np.float32), at=at)


def layer_norm(g, x, norm, at):
    return normalise(g, x, to_numpy(norm.weight), to_numpy(norm.bias), norm.eps, at)


def normalise(g, x, scale, shift, eps, at, half=False):
    """LayerNorm of x with its scale and shift [dim]. `half`: x is float16 and so is the result; the
    operator computes in float32 between them.
    """
    scale = g.tensor(f"{at}.weight", scale, float_type(half))
    shift = g.tensor(f"{at}.bias", shift, float_type(half))
    return g.op("LayerNormalization", x, scale, shift, at=at, axis=-1, epsilon=eps)


def attention(g, q, k, v, heads, dim, half, at):
    """softmax(q kᵀ / √d) v per head; q [N, Q, dim], k and v [N, T, dim] → [N, Q, dim]."""
    if g.opset >= FUSED:
        # Without softmax_precision: the kernels for float16 sum in float32 in any case, and some
        # versions of ONNX Runtime have none on GPUs for a node that asks for it.
        return g.op("Attention", q, k, v, at=at, q_num_heads=heads, kv_num_heads=heads)
    split = g.ints(0, -1, heads, dim // heads)
    # to [N, heads, Q, d], [N, heads, d, T] and [N, heads, T, d]
    q = g.op("Transpose", g.op("Reshape", q, split, at=at), at=at, perm=[0, 2, 1, 3])
    k = g.op("Transpose", g.op("Reshape", k, split, at=at), at=at, perm=[0, 2, 3, 1])
    v = g.op("Transpose", g.op("Reshape", v, split, at=at), at=at, perm=[0, 2, 1, 3])
    scale = g.tensor(f"{at}.scale", (dim // heads) ** -0.5, float_type(half))
    q = g.op("Mul", q, scale, at=at)
    weights = softmax(g, g.op("MatMul", q, k, at=at), half, at)
    y = g.op("Transpose", g.op("MatMul", weights, v, at=at), at=at, perm=[0, 2, 1, 3])
    return g.op("Reshape", y, g.ints(0, -1, dim), at=at)


def softmax(g, x, half, at):
    """softmax of the last axis of x, float16 if `half`. In files of older opsets, which TensorRT
    reads too, in float32: TensorRT has no float32 inside.
    """
    outside = half and g.opset >= FUSED
    y = g.op("Softmax", cast(g, x, half, outside, at), at=at, axis=-1)
    return cast(g, y, outside, half, at)


def gelu(g, x, half, at):
    """x Φ(x), exact."""
    if g.opset >= GELU:
        return g.op("Gelu", x, at=at)
    kind = float_type(half)
    root = g.tensor(f"{at}.gelu", 2**0.5, kind)
    one = g.tensor(f"{at}.gelu", 1, kind)
    middle = g.tensor(f"{at}.gelu", 0.5, kind)
    y = g.op("Add", g.op("Erf", g.op("Div", x, root, at=at), at=at), one, at=at)
    return g.op("Mul", g.op("Mul", x, y, at=at), middle, at=at)


def evening(g, peaks, key, weight):
    """Divisors [in] of a product's input channels, for int8 (SmoothQuant, Xiao et al. 2023); 1
    without known peaks.

    One step quantises all channels, so a channel that stands out leaves few digits to the others.
    Divided by these (in whatever gives the input, exactly), with the weights multiplied, the input
    is as even as the weights are.
    """
    if g.precision != "int8" or key not in peaks:
        return 1.0
    activations, weights = peaks[key], np.abs(weight).max(axis=0)
    # A channel that is never used must not get a divisor of 0.
    activations = np.maximum(activations, 1e-3 * activations.max() + 1e-30)
    weights = np.maximum(weights, 1e-3 * weights.max() + 1e-30)
    return np.sqrt(activations / weights)


# ---------------------------------------------------------------- a transformer's block


def stream_type(g, peaks, i):
    """Whether the residual stream through block number i is float16."""
    return g.precision == "fp16" and fits_half(peaks.get((i, "stream"), 0))


def block(g, x, layers, spec, at, i, peaks, attend, first=False):
    """A pre-norm block (encoders/vit.py) on the residual stream x [N, T, dim], whose type is
    `stream_type` → the same.

    i       the block's number, as in `peaks`
    attend  called with q, k, v [N, T, dim], whether they are float16, and the place; returns what
            attention gives [N, T, dim]
    first   only the first token's query → [N, 1, dim]
    """
    stream, halves = stream_type(g, peaks, i), {}
    for part in ("attn", "mlp"):
        halves[part] = g.precision == "fp16" and fits_half(peaks.get((i, part), 0))
    x = self_attention(g, x, stream, layers, spec, at, i, peaks, halves["attn"], attend, first)
    return perceptron(g, x, stream, layers, spec, at, i, peaks, halves["mlp"])


def self_attention(g, x, stream, layers, spec, at, i, peaks, half, attend, first):
    """x + LayerScale(attention(LayerNorm(x))); x float16 if `stream`, the products if `half`."""
    weight, proj = to_numpy(layers.attn.qkv.weight), layers.attn.proj
    dim = weight.shape[1]
    bias = np.zeros(3 * dim)
    if layers.attn.qkv.bias is not None:
        bias = to_numpy(layers.attn.qkv.bias)
    proj_weight, proj_bias = to_numpy(proj.weight), to_numpy(proj.bias)
    scale, shift = to_numpy(layers.norm1.weight), to_numpy(layers.norm1.bias)
    if g.precision != "int8":  # there the runtime adds a bias while it scales the product
        # Each bias of its own would be a pass over the tokens.
        weight, bias = weight * scale, bias + weight @ shift
        # That of k adds the same number to all scores of a query, which softmax does not see,
        # unless k is turned after it.
        if spec.pos != "rotary":
            bias[dim : 2 * dim] = 0
        # Attention averages v, so what is added to v is added to its result, the input of proj.
        proj_bias = proj_bias + proj_weight @ bias[2 * dim :]
        bias[2 * dim :] = 0
        scale, shift, weight, bias = bias_inside(weight, bias)
    divisor = evening(g, peaks, (i, "attn.qkv"), weight)
    affine = scale / divisor, shift / divisor
    y = normed(g, x, stream, affine, layers.norm1.eps, f"{at}.norm1", half)
    weight = weight * divisor
    asking = y
    if first:  # only the first token is read after this block, so only its query is computed
        asking, x = (g.op("Slice", t, g.ints(0), g.ints(1), g.ints(1), at=at) for t in (y, x))
    # For the same reason, what divides v divides the input of proj.
    divisor = evening(g, peaks, (i, "attn.proj"), proj_weight)
    weight[2 * dim :] /= np.reshape(divisor, (-1, 1))
    bias = np.concatenate([bias[: 2 * dim], bias[2 * dim :] / divisor])
    shared, parts = {}, {}
    for name, tokens, start in (("q", asking, 0), ("k", y, dim), ("v", y, 2 * dim)):
        rows = slice(start, start + dim)
        parts[name] = linear(g, tokens, f"{at}.attn.{name}", weight[rows], bias[rows], half, shared)
    y = attend(**parts, half=half, at=f"{at}.attn")
    projection = proj_weight * divisor, proj_bias
    return residual(g, x, stream, y, half, projection, layers.ls1, f"{at}.attn.proj", f"{at}.ls1")


def perceptron(g, x, stream, layers, spec, at, i, peaks, half):
    """x + LayerScale(fc2(activation(fc1(LayerNorm(x))))); x float16 if `stream`, the products if
    `half`.
    """
    at_fc1 = f"{at}.mlp.fc1"
    weight, bias = to_numpy(layers.mlp.fc1.weight), to_numpy(layers.mlp.fc1.bias)
    scale, shift = to_numpy(layers.norm2.weight), to_numpy(layers.norm2.bias)
    # Elsewhere the runtime adds the bias in one pass with GELU, or with the scales of int8.
    if g.precision != "int8" and spec.mlp == "swiglu":
        scale, shift, weight, bias = bias_inside(weight * scale, bias + weight @ shift)
    divisor = evening(g, peaks, (i, "mlp.fc1"), weight)
    affine = scale / divisor, shift / divisor
    y = normed(g, x, stream, affine, layers.norm2.eps, f"{at}.norm2", half)
    weight = weight * divisor
    fc2_weight, fc2_bias = to_numpy(layers.mlp.fc2.weight), to_numpy(layers.mlp.fc2.bias)
    divisor = evening(g, peaks, (i, "mlp.fc2"), fc2_weight)
    if spec.mlp == "swiglu":
        # silu(gate) · value is linear in the value, so that half takes the divisor of fc2's input.
        middle, shared = len(weight) // 2, {}
        gate = linear(g, y, f"{at}.mlp.gate", weight[:middle], bias[:middle], half, shared)
        evened = weight[middle:] / np.reshape(divisor, (-1, 1))
        value = linear(g, y, f"{at}.mlp.value", evened, bias[middle:] / divisor, half, shared)
        # Not as Swish, of opset 24: ONNX Runtime has no kernel for it, but fuses these two.
        gate = g.op("Mul", gate, g.op("Sigmoid", gate, at=at_fc1), at=at_fc1)
        y = g.op("Mul", gate, value, at=at_fc1)
    else:
        y = gelu(g, linear(g, y, at_fc1, weight, bias, half), half, at_fc1)
        if np.ndim(divisor):  # GELU is not linear, so nothing can be divided before it
            y = g.op("Mul", y, g.tensor(f"{at_fc1}.even", 1 / divisor, np.float32), at=at_fc1)
    projection = fc2_weight * divisor, fc2_bias
    return residual(g, x, stream, y, half, projection, layers.ls2, f"{at}.mlp.fc2", f"{at}.ls2")


def bias_inside(weight, bias):
    """A product [out, in] of normalised channels without an addition after it → (scale and shift of
    the LayerNorm before it, weight, bias of zeros).

    LayerNorm takes off the mean, so its channels add up to 0 and each of them follows from the
    others. One less in the product, its weights subtracted from all others, that channel is free to
    be 1, and its weights to be the bias. The one with the smallest weights is taken: the rounding
    of all channels comes in with these.
    """
    free = np.linalg.norm(weight, axis=0).argmin()
    weight = weight - weight[:, [free]]
    weight[:, free] = bias
    shift = np.zeros(weight.shape[1])
    shift[free] = 1
    return 1 - shift, shift, weight, np.zeros(len(weight))


def normed(g, x, stream, affine, eps, at, half):
    """LayerNorm of x, with its scale and shift `affine`, as the input of products: float16 if
    `half`. It is computed on float16 only if both the stream and the products are.
    """
    narrow = stream and half
    y = normalise(g, cast(g, x, stream, narrow, at), *affine, eps, at, narrow)
    return cast(g, y, narrow, half, at)


def residual(g, x, stream, y, half, projection, scale, at, at_scale):
    """x + LayerScale(y · weightᵀ + bias), LayerScale folded into the projection (weight, bias); x
    float16 if `stream`, y if `half`.
    """
    weight, bias = projection
    gamma = None
    if hasattr(scale, "gamma"):
        gamma = to_numpy(scale.gamma)
        folded = weight * gamma[:, None]
        # float16 has few digits below 6e-5: a LayerScale that would push the weights there stays
        # outside, in float32.
        if not half or np.median(np.abs(folded).max(axis=1)) > 2**-9:
            weight, bias, gamma = folded, bias * gamma, None
    y = linear(g, y, at, weight, bias, half)
    if gamma is not None:
        y = cast(g, y, half, False, at)
        y = g.op("Mul", y, g.tensor(f"{at_scale}.gamma", gamma, np.float32), at=at_scale)
        half = False
    return g.op("Add", x, cast(g, y, half, stream, at), at=at)


# ---------------------------------------------------------------- pixels


def patch_product(g, x, at, weight, bias, grid, input_type, mean, std):
    """Patch embedding: a convolution whose stride is its kernel size, as one product.

    x       "uint8" input_type: float32 [N, S, S, 3] in 0 … 255 | "float": normalised [N, 3, S, S]
    weight  [dim, 3, p, p]; bias [dim]
    → (x [N, grid², dim], the bias [dim] that is still to be added). float32 in every precision: it
    is 0.1% of the work, and pixels are worth their eight bits
    """
    dim, _, p, _ = weight.shape
    if input_type == "uint8":
        # (x / 255 - mean) / std is linear, so it goes into weight and bias.
        bias = bias - (weight * (mean / std)[None, :, None, None]).sum(axis=(1, 2, 3))
        weight = (weight / (255 * std)[None, :, None, None]).transpose(0, 2, 3, 1).reshape(dim, -1)
        # to [N, row, y, column, x · channel], then the patches one after the other
        x = g.op("Reshape", x, g.ints(-1, grid, p, grid, p * 3), at=at)
        x = g.op("Transpose", x, at=at, perm=[0, 1, 3, 2, 4])
    else:
        weight = weight.reshape(dim, -1)
        # to [N, channel, row, y, column, x], then [N, row, column, channel, y, x]
        x = g.op("Reshape", x, g.ints(-1, 3, grid, p, grid, p), at=at)
        x = g.op("Transpose", x, at=at, perm=[0, 2, 4, 1, 3, 5])
    x = g.op("Reshape", x, g.ints(-1, grid * grid, 3 * p * p), at=at)
    x = g.op("MatMul", x, g.tensor(f"{at}.weight", weight.T, np.float32), at=at)
    return x, bias


def normalised(g, x, input_type, mean, std):
    """Normalised pixels float32 [N, 3, S, S], for networks that begin with a padded convolution:
    the padding is the mean colour (0 after normalisation), so it cannot go into the weights.
    """
    if input_type == "float":
        return x
    x = g.op("Transpose", x, at="input", perm=[0, 3, 1, 2])
    scale = g.tensor("normalise.scale", (1 / (255 * std))[:, None, None], np.float32)
    x = g.op("Mul", x, scale, at="input")
    shift = g.tensor("normalise.mean", (mean / std)[:, None, None], np.float32)
    return g.op("Sub", x, shift, at="input")


def convolution(g, x, conv, norm, at, half, integer=True):
    """A convolution with its BatchNorm (None: with its own bias) folded in. `integer`: int8 in an
    int8 graph; else its first layer, in float32.
    """
    weight = to_numpy(conv.weight)
    if norm is None:
        bias = to_numpy(conv.bias)
    else:
        scale = to_numpy(norm.weight) / np.sqrt(to_numpy(norm.running_var) + norm.eps)
        bias = to_numpy(norm.bias) - to_numpy(norm.running_mean) * scale
        weight = weight * scale[:, None, None, None]
    shape = dict(
        kernel_shape=list(conv.kernel_size), strides=list(conv.stride), pads=list(conv.padding) * 2
    )
    if g.precision != "int8" or not integer:
        kind = float_type(half)
        tensors = g.tensor(f"{at}.weight", weight, kind), g.tensor(f"{at}.bias", bias, kind)
        return g.op("Conv", x, *tensors, at=at, **shape)
    step = np.maximum(np.abs(weight).max(axis=(1, 2, 3)), 1e-30) / 127
    quantised = np.rint(weight / step[:, None, None, None]).astype(np.int8)
    values, x_step, zero = g.op("DynamicQuantizeLinear", x, at=at, outputs=3)
    y = g.op("ConvInteger", values, g.tensor(f"{at}.weight", quantised), zero, at=at, **shape)
    y = g.to_float(y, at)
    step = g.tensor(f"{at}.scale", step[:, None, None], np.float32)
    y = g.op("Mul", y, g.op("Mul", x_step, step, at=at), at=at)
    return g.op("Add", y, g.tensor(f"{at}.bias", bias[:, None, None], np.float32), at=at)
