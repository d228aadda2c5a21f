"""A PatchClassifier as an ONNX graph, written node by node.

torch's exporter traces; here the few operators of a vision transformer are simply written down. So
the graph is what one would draw: one Attention node per block, LayerScale folded into the
projection before it, the position embedding added up with the bias of the patch embedding, the
normalisation inside its weights. And the weights pass one tensor at a time into a file, so that the
memory needed is the model's own.

fp32   everything in float32
fp16   weights and products in float16; float32 where a transformer needs it: the residual stream
       and its LayerNorms,
       softmax, patch embedding, head, and every part of a block whose activations come near the end
       of float16
int8   products of signed bytes (weights per output channel, symmetric) and unsigned bytes
       (activations, scaled by
       the range each batch has, after channels that stand out were evened out); everything between
       them in float32
"""

import contextlib

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

import common

FUSED = 23  # from this opset on there is an operator for attention
OLDEST, NEWEST = 18, 24
GELU = 20  # from this opset on there is an operator for GELU
INLINE = 1024  # bytes; smaller tensors stay in the graph, where shape inference sees them
PAGE = 4096  # alignment in the file of weights, so that runtimes can map it
HALF_MAX = 65504.0
HEADROOM = 4  # times that the activations may grow over those seen before float16 overflows


class Graph:
    """Nodes, and weights that go straight into a file."""

    def __init__(self, weights, opset, precision):
        self.weights, self.opset, self.precision = weights, opset, precision
        self.nodes, self.tensors, self.names = [], [], {}

    def name(self, wanted):
        count = self.names[wanted] = self.names.get(wanted, -1) + 1
        return f"{wanted}_{count}" if count else wanted

    def op(self, kind, *inputs, at="", outputs=1, **attributes):
        """Add a node; the name(s) of its output(s). `at`: the place in the network that it belongs
        to.
        """
        name = self.name(f"{at}/{kind}" if at else kind)
        results = [name] if outputs == 1 else [f"{name}.{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(kind, inputs, results, name=name, **attributes))
        return name if outputs == 1 else results

    def tensor(self, name, array):
        """Add a constant; large ones are written to the file of weights and forgotten."""
        array, name = (
            np.asarray(array, order="C"),
            self.name(name),
        )  # (ascontiguousarray makes scalars 1-D)
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
        for key, value in (
            ("location", "weights"),
            ("offset", self.weights.tell()),
            ("length", array.nbytes),
        ):
            proto.external_data.add(key=key, value=str(value))
        self.weights.write(memoryview(array).cast("B"))
        self.tensors.append(proto)
        return name

    def ints(self, *values):
        name = "int" + "_".join(map(str, values))
        if name not in self.names:
            self.tensor(name, np.array(values, np.int64))
        return name

    def cast(self, x, half, at):
        return self.op("Cast", x, at=at, to=TensorProto.FLOAT16 if half else TensorProto.FLOAT)


def emit(
    model,
    weights,
    precision="fp32",
    opset=FUSED,
    input="uint8",
    embedding=False,
    temperature=1.0,
    peaks=None,
):
    """Write `model` (a PatchClassifier without adapters, on the CPU) as ONNX → ModelProto.

    weights   binary file, open for writing: takes every tensor over 1 KB; the proto points to it as
              "weights" (see
              `save`)
    input     "uint8": patches uint8 [N, S, S, 3], normalisation inside | "float": normalised
              float32 [N, 3, S, S]
    embedding adds the output `embedding` float32 [N, D]
    temperature  the logit is divided by it before the sigmoid
    peaks     what `activation_peaks` gave; for fp16: parts of blocks that would overflow stay in
              float32; for int8:
              how the channels are evened out
    """
    assert precision in ("fp32", "fp16", "int8") and OLDEST <= opset <= NEWEST
    encoder = model.encoder
    g = Graph(weights, opset, precision)
    x, views = "patches", 1
    if input == "uint8":  # first of all: TensorRT knows bytes as inputs only, not between operators
        x = g.cast(x, False, "input")
    if model.tta:
        x, views = flips_and_turns(g, x, input), 8
    mean, std = (np.array(v, np.float64) for v in encoder.spec.norm)
    if encoder.spec.depth:
        size = encoder.grid * encoder.spec.patch
        out = vit(g, encoder, x, input, mean, std, peaks or {})
    else:
        size = 224
        out = resnet(g, encoder, x, input, mean, std)
    if views > 1:
        out = g.op("Reshape", out, g.ints(views, -1, encoder.embed_dim), at="tta")
        out = g.op("ReduceMean", out, g.ints(0), at="tta", keepdims=0)
    weight, bias = to_numpy(model.head.weight), to_numpy(model.head.bias)
    if embedding:
        g.nodes.append(helper.make_node("Identity", [out], ["embedding"], name="embedding"))
    logit = g.op(
        "MatMul",
        out,
        g.tensor("head.weight", (weight.T / temperature).astype(np.float32)),
        at="head",
    )
    logit = g.op(
        "Add", logit, g.tensor("head.bias", (bias / temperature).astype(np.float32)), at="head"
    )
    logit = g.op("Reshape", logit, g.ints(-1), at="head")
    g.nodes.append(helper.make_node("Sigmoid", [logit], ["probability"], name="probability"))

    shape = ["N", size, size, 3] if input == "uint8" else ["N", 3, size, size]
    kind = TensorProto.UINT8 if input == "uint8" else TensorProto.FLOAT
    outputs = [helper.make_tensor_value_info("probability", TensorProto.FLOAT, ["N"])]
    if embedding:
        outputs.append(
            helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["N", encoder.embed_dim])
        )
    graph = helper.make_graph(
        g.nodes,
        "mitotic figure classifier",
        [helper.make_tensor_value_info("patches", kind, shape)],
        outputs,
        g.tensors,
    )
    opsets = [helper.make_opsetid("", opset)]
    return helper.make_model(
        graph,
        opset_imports=opsets,
        ir_version=helper.find_min_ir_version_for(opsets),
        producer_name=common.NAME,
        producer_version=common.VERSION,
    )


def to_numpy(tensor):
    return tensor.detach().double().numpy()


# ---------------------------------------------------------------- operators in three precisions


def linear(g, x, at, weight, bias, half=False, shared=None):
    """x [..., in] times weight [out, in], plus bias → [..., out]; `half`: x is float16 and so is
    the result.

    shared: a dict in which products of the same x keep its quantised form.
    """
    if g.precision == "int8":
        scale = np.maximum(np.abs(weight).max(axis=1), 1e-30) / 127
        quantised = np.rint(weight / scale[:, None]).astype(np.int8)
        shared = {} if shared is None else shared
        if x not in shared:
            shared[x] = g.op("DynamicQuantizeLinear", x, at=at, outputs=3)
        values, step, zero = shared[x]
        y = g.op("MatMulInteger", values, g.tensor(f"{at}.weight", quantised.T), zero, at=at)
        y = g.op("Cast", y, at=at, to=TensorProto.FLOAT)
        step = g.op("Mul", step, g.tensor(f"{at}.scale", scale.astype(np.float32)), at=at)
        y = g.op("Mul", y, step, at=at)
        return g.op("Add", y, g.tensor(f"{at}.bias", bias.astype(np.float32)), at=at)
    kind = np.float16 if half else np.float32
    y = g.op("MatMul", x, g.tensor(f"{at}.weight", weight.T.astype(kind)), at=at)
    return g.op("Add", y, g.tensor(f"{at}.bias", bias.astype(kind)), at=at)


def layer_norm(g, x, norm, at, divisor=1.0):
    weight, bias = (
        g.tensor(f"{at}.{name}", (to_numpy(value) / divisor).astype(np.float32))
        for name, value in (("weight", norm.weight), ("bias", norm.bias))
    )
    return g.op("LayerNormalization", x, weight, bias, at=at, axis=-1, epsilon=norm.eps)


def attention(g, q, k, v, heads, dim, half, at):
    """softmax(q kᵀ / √d) v per head; q [N, Q, dim], k and v [N, T, dim] → [N, Q, dim]."""
    if g.opset >= FUSED:
        # softmax in float32 also between float16 products
        precise = {"softmax_precision": TensorProto.FLOAT} if half else {}
        return g.op("Attention", q, k, v, at=at, q_num_heads=heads, kv_num_heads=heads, **precise)
    d = dim // heads
    split = g.ints(0, -1, heads, d)
    q, k, v = (
        g.op("Transpose", g.op("Reshape", t, split, at=at), at=at, perm=perm)
        for t, perm in ((q, [0, 2, 1, 3]), (k, [0, 2, 3, 1]), (v, [0, 2, 1, 3]))
    )
    q = g.op(
        "Mul",
        q,
        g.tensor(f"{at}.scale", np.array(d**-0.5, np.float16 if half else np.float32)),
        at=at,
    )
    weights = g.op("MatMul", q, k, at=at)
    if half:
        weights = g.cast(g.op("Softmax", g.cast(weights, False, at), at=at, axis=-1), True, at)
    else:
        weights = g.op("Softmax", weights, at=at, axis=-1)
    y = g.op("Transpose", g.op("MatMul", weights, v, at=at), at=at, perm=[0, 2, 1, 3])
    return g.op("Reshape", y, g.ints(0, -1, dim), at=at)


def gelu(g, x, half, at):
    """x Φ(x), exact; its own operator from opset 20 on."""
    if g.opset >= GELU:
        return g.op("Gelu", x, at=at)
    kind = np.float16 if half else np.float32
    root, one, middle = (
        g.tensor(f"{at}.gelu", np.array(value, kind)) for value in (2**0.5, 1, 0.5)
    )
    y = g.op("Add", g.op("Erf", g.op("Div", x, root, at=at), at=at), one, at=at)
    return g.op("Mul", g.op("Mul", x, y, at=at), middle, at=at)


def evening(g, peaks, key, weight):
    """Divisors [in] of a product's input channels, for int8 (SmoothQuant, Xiao et al. 2023); 1
    where nothing is known.

    One step quantises all channels, so one that stands out leaves few digits to the others. Divided
    by these (in whatever gives the input, exactly), with the weights multiplied, the input is as
    even as the weights are."""
    if g.precision != "int8" or key not in peaks:
        return 1.0
    input, weight = (
        np.maximum(v, 1e-3 * v.max() + 1e-30) for v in (peaks[key], np.abs(weight).max(axis=0))
    )
    return np.sqrt(input / weight)


# ---------------------------------------------------------------- vision transformer


def vit(g, encoder, x, input, mean, std, peaks):
    spec = encoder.spec
    x = tokens(g, encoder, x, input, mean, std)
    last = len(encoder.blocks) - 1
    for i, block in enumerate(encoder.blocks):
        parts = {
            part: g.precision == "fp16" and peaks.get((i, part), 0) * HEADROOM < HALF_MAX
            for part in ("attn", "mlp")
        }
        x = attend(
            g, x, block, spec, i, peaks, parts["attn"], first=i == last and encoder.pool == "cls"
        )
        x = perceptron(g, x, block, spec, i, peaks, parts["mlp"])
    x = layer_norm(g, x, encoder.norm, "norm")
    return pool(g, encoder, x)


def tokens(g, encoder, x, input, mean, std):
    """Patch embedding as one product; class token, registers and position embedding as constants."""
    grid, p, dim, at = encoder.grid, encoder.spec.patch, encoder.spec.dim, "patch_embed.proj"
    weight, bias = (
        to_numpy(encoder.patch_embed.proj.weight),
        to_numpy(encoder.patch_embed.proj.bias),
    )  # [D, 3, p, p]
    if input == "uint8":
        # (x / 255 - mean) / std is linear, so it goes into weight and bias.
        bias = bias - (weight * (mean / std)[None, :, None, None]).sum(axis=(1, 2, 3))
        weight = (weight / (255 * std)[None, :, None, None]).transpose(0, 2, 3, 1).reshape(dim, -1)
        x = g.op(
            "Reshape", x, g.ints(-1, grid, p, grid, p * 3), at=at
        )  # [N, row, y, column, x·channel]
        x = g.op("Transpose", x, at=at, perm=[0, 1, 3, 2, 4])
        x = g.op("Reshape", x, g.ints(-1, grid * grid, p * p * 3), at=at)
    else:
        weight = weight.reshape(dim, -1)
        x = g.op("Reshape", x, g.ints(-1, 3, grid, p, grid, p), at=at)
        x = g.op("Transpose", x, at=at, perm=[0, 2, 4, 1, 3, 5])  # [N, row, column, channel, y, x]
        x = g.op("Reshape", x, g.ints(-1, grid * grid, 3 * p * p), at=at)
    position = to_numpy(encoder.pos_embed)[0]
    prefix = to_numpy(encoder.cls_token)[0]
    if encoder.reg_token is not None:
        prefix = np.concatenate([prefix, to_numpy(encoder.reg_token)[0]])
    if encoder.spec.pos == "all":
        prefix, position = prefix + position[: encoder.prefix], position[encoder.prefix :]
    # float32 in every precision: it is 0.1% of the work, and pixels are worth their eight bits
    x = g.op("MatMul", x, g.tensor(f"{at}.weight", weight.T.astype(np.float32)), at=at)
    x = g.op(
        "Add", x, g.tensor("pos_embed", (position + bias)[None].astype(np.float32)), at=at
    )  # [N, grid², D]
    batch = g.op("Slice", g.op("Shape", x, at="tokens"), g.ints(0), g.ints(1), at="tokens")
    shape = g.op("Concat", batch, g.ints(*prefix.shape), at="tokens", axis=0)
    prefix = g.op("Expand", g.tensor("prefix", prefix[None].astype(np.float32)), shape, at="tokens")
    return g.op("Concat", prefix, x, at="tokens", axis=1)


def attend(g, x, block, spec, i, peaks, half, first):
    at = f"blocks.{i}"
    weight, bias, shared = to_numpy(block.attn.qkv.weight), to_numpy(block.attn.qkv.bias), {}
    divisor = evening(g, peaks, (i, "attn.qkv"), weight)
    y = layer_norm(g, x, block.norm1, f"{at}.norm1", divisor)
    if half:
        y = g.cast(y, True, at)
    asking = y
    if first:  # only the class token is read after this block, so only it asks
        asking, x = (g.op("Slice", t, g.ints(0), g.ints(1), g.ints(1), at=at) for t in (y, x))
    weight = weight * divisor
    # attention averages v, so what divides v divides its result
    divisor = evening(g, peaks, (i, "attn.proj"), to_numpy(block.attn.proj.weight))
    weight[2 * spec.dim :] /= np.reshape(divisor, (-1, 1))
    bias = np.concatenate([bias[: 2 * spec.dim], bias[2 * spec.dim :] / divisor])
    q, k, v = (
        linear(
            g,
            t,
            f"{at}.attn.{name}",
            weight[j * spec.dim :][: spec.dim],
            bias[j * spec.dim :][: spec.dim],
            half,
            shared,
        )
        for j, (name, t) in enumerate((("q", asking), ("k", y), ("v", y)))
    )
    y = attention(g, q, k, v, spec.heads, spec.dim, half, f"{at}.attn")
    return residual(
        g, x, y, block.attn.proj, block.ls1, f"{at}.attn.proj", f"{at}.ls1", half, divisor
    )


def perceptron(g, x, block, spec, i, peaks, half):
    at, at_fc1 = f"blocks.{i}", f"blocks.{i}.mlp.fc1"
    weight, bias = to_numpy(block.mlp.fc1.weight), to_numpy(block.mlp.fc1.bias)
    divisor = evening(g, peaks, (i, "mlp.fc1"), weight)
    y = layer_norm(g, x, block.norm2, f"{at}.norm2", divisor)
    if half:
        y = g.cast(y, True, at)
    weight = weight * divisor
    if spec.mlp == "swiglu":
        middle, shared = spec.hidden // 2, {}
        divisor = evening(g, peaks, (i, "mlp.fc2"), to_numpy(block.mlp.fc2.weight))
        gate = linear(g, y, f"{at}.mlp.gate", weight[:middle], bias[:middle], half, shared)
        value = linear(
            g,
            y,
            f"{at}.mlp.value",
            weight[middle:] / np.reshape(divisor, (-1, 1)),
            bias[middle:] / divisor,
            half,
            shared,
        )
        gate = g.op("Mul", gate, g.op("Sigmoid", gate, at=at_fc1), at=at_fc1)
        y = g.op("Mul", gate, value, at=at_fc1)
    else:
        divisor = evening(g, peaks, (i, "mlp.fc2"), to_numpy(block.mlp.fc2.weight))
        y = gelu(g, linear(g, y, at_fc1, weight, bias, half), half, at_fc1)
        if np.ndim(divisor):  # GELU is not linear, so nothing can be divided before it
            y = g.op(
                "Mul", y, g.tensor(f"{at_fc1}.even", (1 / divisor).astype(np.float32)), at=at_fc1
            )
    return residual(g, x, y, block.mlp.fc2, block.ls2, f"{at}.mlp.fc2", f"{at}.ls2", half, divisor)


def residual(g, x, y, projection, scale, at, at_scale, half, divisor):
    """x + LayerScale(projection(divisor · y)), the scale folded into the projection, x in float32."""
    weight, bias = to_numpy(projection.weight) * divisor, to_numpy(projection.bias)
    gamma = to_numpy(scale.gamma) if hasattr(scale, "gamma") else None
    if gamma is not None:
        folded = weight * gamma[:, None]
        # float16 has few digits below 6e-5: a LayerScale that would push the weights there stays
        # outside, in float32
        if not half or np.median(np.abs(folded).max(axis=1)) > 2**-9:
            weight, bias, gamma = folded, bias * gamma, None
    y = linear(g, y, at, weight, bias, half)
    if half:
        y = g.cast(y, False, at)
    if gamma is not None:
        y = g.op("Mul", y, g.tensor(f"{at_scale}.gamma", gamma.astype(np.float32)), at=at_scale)
    return g.op("Add", x, y, at=at)


def pool(g, encoder, x):
    """The embedding [N, D] out of the tokens after the last norm; see models.ViT."""

    def mean(tokens, axes):
        return g.op("ReduceMean", tokens, g.ints(*axes), at="pool", keepdims=0)

    if encoder.pool == "patch-center":
        side = 2 * round(encoder.grid / 8 + 0.01)
        start = (encoder.grid - side) // 2
        rows = np.arange(encoder.grid**2).reshape(encoder.grid, encoder.grid)
        rows = rows[start : start + side, start : start + side].ravel() + encoder.prefix
        return mean(g.op("Gather", x, g.tensor("center", rows), at="pool", axis=1), [1])
    parts = []
    if "cls" in encoder.pool:
        parts.append(g.op("Gather", x, g.tensor("first", np.array(0, np.int64)), at="pool", axis=1))
    if "mean" in encoder.pool:
        end = encoder.prefix + encoder.grid**2
        parts.append(
            mean(g.op("Slice", x, g.ints(encoder.prefix), g.ints(end), g.ints(1), at="pool"), [1])
        )
    return parts[0] if len(parts) == 1 else g.op("Concat", *parts, at="pool", axis=-1)


def flips_and_turns(g, x, input):
    """The eight views of test-time augmentation, one after the other along the batch: [N, …] → [8
    N, …].
    """
    rows, columns = (1, 2) if input == "uint8" else (2, 3)
    swap = [0, 2, 1, 3] if input == "uint8" else [0, 1, 3, 2]

    def flip(t, *axes):
        n = len(axes)
        return g.op(
            "Slice",
            t,
            g.ints(*[-1] * n),
            g.ints(*[-(2**31)] * n),
            g.ints(*axes),
            g.ints(*[-1] * n),
            at="tta",
        )

    turned = g.op("Transpose", x, at="tta", perm=swap)
    views = [
        t if not axes else flip(t, *axes)
        for t in (x, turned)
        for axes in ((), (rows,), (columns,), (rows, columns))
    ]
    return g.op("Concat", *views, at="tta", axis=0)


# ---------------------------------------------------------------- ResNet-50


def resnet(g, encoder, x, input, mean, std):
    """torchvision's ResNet, BatchNorm folded into the convolutions → [N, 2048]."""
    if input == "uint8":
        x = g.op("Transpose", x, at="input", perm=[0, 3, 1, 2])
        # The border is padded with the mean colour (0 after normalisation), so this cannot go into
        # the weights.
        x = g.op(
            "Mul",
            x,
            g.tensor("normalise.scale", (1 / (255 * std))[:, None, None].astype(np.float32)),
            at="input",
        )
        x = g.op(
            "Sub",
            x,
            g.tensor("normalise.mean", (mean / std)[:, None, None].astype(np.float32)),
            at="input",
        )
    half = g.precision == "fp16"
    if half:
        x = g.cast(x, True, "input")
    x = g.op("Relu", convolution(g, x, encoder.conv1, encoder.bn1, "conv1", half), at="conv1")
    x = g.op("MaxPool", x, at="maxpool", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    for name in ("layer1", "layer2", "layer3", "layer4"):
        for i, block in enumerate(getattr(encoder, name)):
            at = f"{name}.{i}"
            y = g.op("Relu", convolution(g, x, block.conv1, block.bn1, f"{at}.conv1", half), at=at)
            y = g.op("Relu", convolution(g, y, block.conv2, block.bn2, f"{at}.conv2", half), at=at)
            y = convolution(g, y, block.conv3, block.bn3, f"{at}.conv3", half)
            if block.downsample is not None:
                x = convolution(g, x, *block.downsample, f"{at}.downsample", half)
            x = g.op("Relu", g.op("Add", x, y, at=at), at=at)
    if half:
        x = g.cast(x, False, "pool")
    return g.op("ReduceMean", x, g.ints(2, 3), at="pool", keepdims=0)


def convolution(g, x, conv, norm, at, half):
    weight = to_numpy(conv.weight)
    scale = to_numpy(norm.weight) / np.sqrt(to_numpy(norm.running_var) + norm.eps)
    bias = to_numpy(norm.bias) - to_numpy(norm.running_mean) * scale
    weight = weight * scale[:, None, None, None]
    shape = dict(
        kernel_shape=list(conv.kernel_size), strides=list(conv.stride), pads=list(conv.padding) * 2
    )
    if g.precision == "int8" and at != "conv1":
        step = np.maximum(np.abs(weight).max(axis=(1, 2, 3)), 1e-30) / 127
        quantised = np.rint(weight / step[:, None, None, None]).astype(np.int8)
        values, x_step, zero = g.op("DynamicQuantizeLinear", x, at=at, outputs=3)
        y = g.op("ConvInteger", values, g.tensor(f"{at}.weight", quantised), zero, at=at, **shape)
        y = g.op("Cast", y, at=at, to=TensorProto.FLOAT)
        step = g.op(
            "Mul", x_step, g.tensor(f"{at}.scale", step[:, None, None].astype(np.float32)), at=at
        )
        y = g.op("Mul", y, step, at=at)
        return g.op("Add", y, g.tensor(f"{at}.bias", bias[:, None, None].astype(np.float32)), at=at)
    kind = np.float16 if half else np.float32
    return g.op(
        "Conv",
        x,
        g.tensor(f"{at}.weight", weight.astype(kind)),
        g.tensor(f"{at}.bias", bias.astype(kind)),
        at=at,
        **shape,
    )


# ---------------------------------------------------------------- what float16 and int8 would not hold


@contextlib.contextmanager
def activation_peaks(encoder):
    """Largest absolute values while images go through the encoder: of each part of a block,
    {(block, "attn" | "mlp"): number}, and of each channel that goes into a product, {(block,
    "attn.qkv" | …): array}."""
    peaks, hooks = {}, []

    def watch(module, block, layer):
        def hook(module, given, result):
            channels = given[0].detach().abs().flatten(0, -2).amax(dim=0).float().cpu().numpy()
            peaks[block, layer] = np.maximum(peaks.get((block, layer), 0), channels)
            key = block, layer.split(".")[0]
            peaks[key] = max(
                peaks.get(key, 0.0), float(channels.max()), result.detach().abs().amax().item()
            )

        hooks.append(module.register_forward_hook(hook))

    for i, block in enumerate(encoder.blocks or ()):
        for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
            watch(block.get_submodule(layer), i, layer)
    try:
        yield peaks
    finally:
        for hook in hooks:
            hook.remove()


# ---------------------------------------------------------------- files


def save(model, weights, path, inline):
    """Write the ModelProto of `emit` to `path`; its weights (a file) stay beside it, or come inside
    (`inline`).

    A protobuf message is the concatenation of its fields, so the weights are copied from file to
    file, a megabyte at a time, and never are in memory together."""
    if not inline:
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = weights.name
        path.write_bytes(model.SerializeToString())
        return
    rest, graph = onnx.ModelProto(), onnx.GraphProto()
    rest.CopyFrom(model)
    rest.ClearField("graph")
    graph.CopyFrom(model.graph)
    graph.ClearField("initializer")
    head, pieces = graph.SerializeToString(), []
    for tensor in model.graph.initializer:
        place = {entry.key: entry.value for entry in tensor.external_data}
        bare = onnx.TensorProto()
        bare.CopyFrom(tensor)
        bare.ClearField("external_data")
        bare.ClearField("data_location")
        start = bare.SerializeToString()
        size = 0
        if place:
            size = int(place["length"])
            start += b"\x4a" + varint(size)  # field 9, raw_data
        pieces.append(
            (b"\x2a" + varint(len(start) + size) + start, int(place.get("offset", 0)), size)
        )  # field 5
    total = len(head) + sum(len(start) + size for start, _, size in pieces)
    with open(path, "wb") as out, open(weights, "rb") as source:
        out.write(rest.SerializeToString())
        out.write(b"\x3a" + varint(total) + head)  # field 7, graph
        for start, offset, size in pieces:
            out.write(start)
            source.seek(offset)
            while size:
                chunk = source.read(min(size, 1 << 20))
                if not chunk:
                    raise OSError(f"{weights}: ends too early")
                out.write(chunk)
                size -= len(chunk)


def varint(value):
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)
