"""A PatchClassifier as an ONNX graph, written node by node.

torch's exporter traces; here the few operators of each network are simply written down. So the
graph is what one would draw: one Attention node per block, LayerScale folded into the projection
before it, the position embedding added up with the bias of the patch embedding, the normalisation
inside its weights. And the weights pass one tensor at a time into a file, so that the memory needed
is the model's own.

fp32   everything in float32
fp16   weights, products and the residual stream in float16; float32 where a transformer needs it:
       patch embedding, last LayerNorm, head, and every part of a block whose activations come near
       the end of float16, the stream through it included. ONNX Runtime's kernels sum LayerNorm and
       softmax of float16 in float32
int8   products of signed bytes (weights per output channel, symmetric) and unsigned bytes
       (activations, scaled by the range each batch has, after channels that stand out were evened
       out); everything between them in float32
"""

import contextlib

import numpy as np
import onnx
from onnx import TensorProto, helper

import common
from onnx_model.nodes import FUSED, Graph, fits_half, to_numpy
from onnx_model.resnet import resnet
from onnx_model.swin import swin
from onnx_model.vit import vit

OLDEST, NEWEST = 18, 24  # opsets that can be written


def emit(
    model,
    weights,
    precision="fp32",
    opset=FUSED,
    input_type="uint8",
    embedding=False,
    temperature=1.0,
    peaks=None,
):
    """Write `model` (a PatchClassifier without adapters, on the CPU) as ONNX → ModelProto. If its
    head is None, the only output is the embedding.

    weights      binary file, open for writing: takes every tensor over 1 KB; the proto points to it
                 as "weights" (see `save`)
    input_type   "uint8": patches uint8 [N, S, S, 3], normalisation inside | "float": normalised
                 float32 [N, 3, S, S]
    embedding    adds the output `embedding` float32 [N, D]
    temperature  the logit is divided by it before the sigmoid
    peaks        what `activation_peaks` gave; for fp16: parts of blocks that would overflow stay in
                 float32; for int8: how the channels are evened out
    """
    assert precision in ("fp32", "fp16", "int8") and OLDEST <= opset <= NEWEST
    encoder = model.encoder
    g = Graph(weights, opset, precision)
    out = embed(g, model, pixels(g, input_type), input_type, peaks)
    outputs = {"probability": ["N"], "embedding": ["N", encoder.embed_dim]}
    if embedding or model.head is None:
        g.nodes.append(helper.make_node("Identity", [out], ["embedding"], name="embedding"))
    else:
        del outputs["embedding"]
    if model.head is None:
        del outputs["probability"]
    else:
        logit = head(g, model.head, out, temperature)
        g.nodes.append(helper.make_node("Sigmoid", [logit], ["probability"], name="probability"))
    return proto(g, encoder.size, input_type, outputs)


def emit_mean(members, weights, precision="fp32", opset=FUSED, input_type="uint8"):
    """Write the mean of several classifiers' probabilities as one ONNX graph → ModelProto, with the
    input and the output of a single one.

    members  of (model, temperature, peaks), as for `emit`; taken one after the other, so that an
             iterator needs the memory of one. All read patches of the same size.

    What members have in common is in the graph once: the same constants, and all that is computed
    from them in the same way, such as the whole encoder under several probes."""
    assert precision in ("fp32", "fp16", "int8") and OLDEST <= opset <= NEWEST
    g = Graph(weights, opset, precision, share=True)
    x, sizes, probabilities = pixels(g, input_type), set(), []
    for model, temperature, peaks in members:
        out = embed(g, model, x, input_type, peaks)
        logit = head(g, model.head, out, temperature)
        probabilities.append(g.op("Sigmoid", logit, at="member"))
        sizes.add(model.encoder.size)
        del model, out  # before the next one is loaded
    (size,) = sizes
    total = g.op("Sum", *probabilities, at="mean")
    count = g.tensor("mean.count", len(probabilities), np.float32)
    g.nodes.append(helper.make_node("Div", [total, count], ["probability"], name="probability"))
    return proto(g, size, input_type, {"probability": ["N"]})


def pixels(g, input_type):
    """The input, bytes made floats: first of all, since TensorRT knows bytes as inputs only."""
    if input_type == "uint8":
        return g.to_float("patches", "input")
    return "patches"


def embed(g, model, x, input_type, peaks):
    """The embedding [N, D] of the pixels x."""
    encoder = model.encoder
    if model.tta:
        x = flips_and_turns(g, x, input_type)
    mean, std = (np.array(v, np.float64) for v in encoder.spec.norm)
    if encoder.spec.stages:
        out = swin(g, encoder, x, input_type, mean, std, peaks or {})
    elif encoder.spec.depth:
        out = vit(g, encoder, x, input_type, mean, std, peaks or {})
    else:
        out = resnet(g, encoder, x, input_type, mean, std)
    if model.tta:
        out = g.op("Reshape", out, g.ints(8, -1, encoder.embed_dim), at="tta")
        out = g.op("ReduceMean", out, g.ints(0), at="tta", keepdims=0)
    return out


def head(g, layer, embedding, temperature):
    """The logit [N]."""
    weight, bias = to_numpy(layer.weight) / temperature, to_numpy(layer.bias) / temperature
    weight = g.tensor("head.weight", weight.T, np.float32)
    logit = g.op("MatMul", embedding, weight, at="head")
    logit = g.op("Add", logit, g.tensor("head.bias", bias, np.float32), at="head")
    return g.op("Reshape", logit, g.ints(-1), at="head")


def proto(g, size, input_type, outputs):
    """The nodes and tensors as a ModelProto with its input (patches of `size` px) and outputs
    ({name: shape}).
    """
    shape, kind = ["N", 3, size, size], TensorProto.FLOAT
    if input_type == "uint8":
        shape, kind = ["N", size, size, 3], TensorProto.UINT8
    graph = helper.make_graph(
        g.nodes,
        "patch classifier",
        [helper.make_tensor_value_info("patches", kind, shape)],
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, dimensions)
            for name, dimensions in outputs.items()
        ],
        g.tensors,
    )
    opsets = [helper.make_opsetid("", g.opset)]
    return helper.make_model(
        graph,
        opset_imports=opsets,
        ir_version=helper.find_min_ir_version_for(opsets),
        producer_name=common.NAME,
        producer_version=common.VERSION,
    )


def flips_and_turns(g, x, input_type):
    """The eight views of test-time augmentation, one after the other along the batch: [N, …] →
    [8 N, …].
    """
    rows, columns, swap = 2, 3, [0, 1, 3, 2]
    if input_type == "uint8":
        rows, columns, swap = 1, 2, [0, 2, 1, 3]

    def flip(t, *axes):
        if not axes:
            return t
        start, end, step = ([value] * len(axes) for value in (-1, -(2**31), -1))
        return g.op(
            "Slice", t, g.ints(*start), g.ints(*end), g.ints(*axes), g.ints(*step), at="tta"
        )

    turned = g.op("Transpose", x, at="tta", perm=swap)
    views = []
    for t in (x, turned):
        for axes in ((), (rows,), (columns,), (rows, columns)):
            views.append(flip(t, *axes))
    return g.op("Concat", *views, at="tta", axis=0)


# -------------------------------------------------- what float16 and int8 cannot hold


@contextlib.contextmanager
def activation_peaks(encoder):
    """Largest absolute values while images go through the encoder: of each part of a block,
    {(block, "attn" | "mlp"): number}, of the residual stream through it, {(block, "stream"):
    number}, and of each channel that goes into a product, {(block, "attn.qkv" | …): array}.
    """
    peaks, hooks = {}, []

    def watch(module, block, layer):
        def hook(module, inputs, result):
            channels = inputs[0].detach().abs().flatten(0, -2).amax(dim=0).float().cpu().numpy()
            peaks[block, layer] = np.maximum(peaks.get((block, layer), 0), channels)
            part = block, layer.split(".")[0]
            largest = max(float(channels.max()), result.detach().abs().amax().item())
            peaks[part] = max(peaks.get(part, 0.0), largest)

        hooks.append(module.register_forward_hook(hook))

    def watch_stream(block, i):
        """Before each LayerNorm, and after the block."""

        def see(x):
            peaks[i, "stream"] = max(peaks.get((i, "stream"), 0.0), x.detach().abs().amax().item())

        for norm in (block.norm1, block.norm2):
            hooks.append(norm.register_forward_pre_hook(lambda module, inputs: see(inputs[0])))
        hooks.append(block.register_forward_hook(lambda module, inputs, result: see(result)))

    def watch_scale(module, part):
        def hook(module, inputs, result):
            peaks[part] = max(peaks.get(part, 0.0), result.detach().abs().amax().item())

        hooks.append(module.register_forward_hook(hook))

    for i, block in enumerate(encoder.blocks or ()):
        watch_stream(block, i)
        for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
            watch(block.get_submodule(layer), i, layer)
        # LayerScale is folded into the product before it.
        watch_scale(block.ls1, (i, "attn"))
        watch_scale(block.ls2, (i, "mlp"))
    try:
        yield peaks
    finally:
        for hook in hooks:
            hook.remove()


def float32_blocks(peaks):
    """Numbers of the blocks of which a part stays in float32 in an fp16 graph."""
    blocks = set()
    for (i, part), peak in peaks.items():
        if part in ("attn", "mlp", "stream") and not fits_half(peak):
            blocks.add(i)
    return sorted(blocks)


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
