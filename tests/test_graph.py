"""The graph against the network it was written from: every family, precision, opset, batch; and in
other runtimes.
"""

import collections
import functools

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx_models import FAMILIES, allowed, classifier, patches, register, write_model

import models
from onnx_model import graph

VITS = [name for name in FAMILIES if name != "resnet50"]
LARGE = ("swin", "resnet50")  # seconds each
MARKED = [
    pytest.param(name, marks=pytest.mark.slow) if name in LARGE else name for name in FAMILIES
]


@pytest.fixture(autouse=True)
def families(monkeypatch):
    register(monkeypatch)


def session(path):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def torch_numbers(model, images):
    with torch.inference_mode():
        embedding = model.embed(torch.from_numpy(images))
        return torch.sigmoid(model.classify(embedding)).numpy(), embedding.numpy()


@pytest.mark.parametrize("family", MARKED)
def test_every_precision_and_batch(family, tmp_path):
    model, images = classifier(family), patches(3 if family == "resnet50" else 64)
    probability, embedding = torch_numbers(model, images)
    assert probability.std() > 0.05, "the network says nothing about these images"
    for precision in ("fp32", "fp16", "int8"):
        path = tmp_path / f"{precision}.onnx"
        write_model(path, model, precision, embedding=True)
        onnx.checker.check_model(str(path), full_check=True)
        runtime = session(path)
        if precision != "int8":
            limit, share = allowed(model, images, precision)
        for batch in (1, 3) if family == "resnet50" else (1, 2, 7, 64):
            some = images[:batch]
            p, e = runtime.run(["probability", "embedding"], {"patches": some})
            assert p.shape == (len(some),) and e.shape == (len(some), model.encoder.embed_dim)
            assert p.dtype == e.dtype == np.float32
            if precision == "int8":  # random networks: the embedding keeps its direction
                assert np.linalg.norm(e - embedding[:batch]) <= 0.1 * np.linalg.norm(
                    embedding[:batch]
                ), batch
                continue
            assert (np.abs(p - probability[:batch]) <= limit[:batch]).all(), (precision, batch)
            off = np.linalg.norm(e - embedding[:batch], axis=1)
            assert (off <= share * np.linalg.norm(embedding[:batch], axis=1)).all()


@pytest.mark.parametrize("opset", [18, 20, 22, 24])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_other_opsets(opset, precision, tmp_path):
    model, images = classifier("swiglu" if opset == 18 else "gelu"), patches(3)
    proto = write_model(tmp_path / "m.onnx", model, precision, opset)
    onnx.checker.check_model(str(tmp_path / "m.onnx"), full_check=True)
    assert ("Attention" in {node.op_type for node in proto.graph.node}) == (opset >= 23)
    (p,) = session(tmp_path / "m.onnx").run(["probability"], {"patches": images})
    assert np.abs(p - torch_numbers(model, images)[0]).max() <= (
        1e-5 if precision == "fp32" else 5e-3
    )


@pytest.mark.parametrize(
    "family", [family for family in VITS if family not in ("dinov3", "swin", "conch")]
)
def test_one_attention_per_block_and_nothing_left_to_fold(family, tmp_path):
    proto = write_model(tmp_path / "m.onnx", classifier(family))
    kinds = [node.op_type for node in proto.graph.node]
    assert kinds.count("Attention") == 2 and "Softmax" not in kinds
    assert not any("gamma" in tensor.name for tensor in proto.graph.initializer), (
        "LayerScale is folded"
    )
    # Two per block for SwiGLU, and one that makes the zeros in the place of the class token.
    assert kinds.count("Mul") == (4 if FAMILIES[family].mlp == "swiglu" else 0) + 1


def kinds_of(proto):
    return collections.Counter(node.op_type for node in proto.graph.node)


def optimised(path):
    """The graph as ONNX Runtime runs it on the CPU, where it has the fused kernels for float32."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(path.with_name("optimised.onnx"))
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return onnx.load(options.optimized_model_filepath)


@pytest.mark.parametrize("family", VITS)
def test_the_runtime_fuses_what_the_blocks_are_written_as(family, tmp_path):
    """Bias and GELU, and sigmoid and product, become one node each. Of the Adds in a block four are
    left: biases of proj and fc2, and the two of the residual stream. No shape is computed.
    """
    model, path = classifier(family), tmp_path / "m.onnx"
    write_model(path, model)
    left, depth = kinds_of(optimised(path)), len(model.encoder.blocks)
    swiglu = FAMILIES[family].mlp == "swiglu"
    assert left["QuickGelu" if swiglu else "BiasGelu"] == depth
    assert not {"Gelu", "Swish", "Shape", "Expand"} & set(left)
    assert left["Sigmoid"] == 1  # of the head
    adds = 4 * depth + 1  # and one for the tokens
    if (
        family == "swin"
    ):  # bias and mask of the windows; the last convolution of the stem has its own
        adds += depth - 1
    if family == "dinov3":  # q and k are turned; of the last block k alone
        adds += 2 * depth - 1
    assert left["Add"] == adds


@pytest.mark.parametrize("family", VITS)
def test_half_precision_stays_half_through_the_blocks(family, tmp_path):
    """The same nodes as in float32, and the casts of bytes to float32, of the tokens to float16,
    and back.
    """
    model = classifier(family)
    single = kinds_of(write_model(tmp_path / "a.onnx", model))
    half = kinds_of(write_model(tmp_path / "b.onnx", model, "fp16"))
    stages = len(FAMILIES[family].stages or (1,))  # of Swin, which merges its tokens in float32
    assert half - single == {"Cast": 2 * stages} and not single - half


@pytest.mark.parametrize("precision, tolerance", [("fp32", 1e-5), ("fp16", 5e-3)])
@pytest.mark.parametrize("family", ["gelu", "swiglu", "dinov3"])
def test_biases_before_attention_and_swiglu_are_no_nodes(family, precision, tolerance, tmp_path):
    """However large they are: in the products, and that of v in the one of proj. A key's bias
    matters with rotary positions alone, which turn it differently at each place."""
    model, images, path = classifier(family), patches(3), tmp_path / "m.onnx"
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layers in model.encoder.blocks:
            qkv = layers.attn.qkv
            qkv.bias.copy_(2 * torch.randn(qkv.bias.shape, generator=generator))
            layers.norm1.bias.copy_(torch.randn(layers.norm1.bias.shape, generator=generator))
            if family == "dinov3":  # whose layer leaves the key's bias out
                qkv.forward = functools.partial(torch.nn.Linear.forward, qkv)
    expected = torch_numbers(model, images)[0]
    proto = write_model(path, model, precision)
    names = [tensor.name for tensor in proto.graph.initializer]
    left = {name.split(".", 2)[2] for name in names if name.startswith("blocks") and "bias" in name}
    fc1 = set() if FAMILIES[family].mlp == "swiglu" else {"mlp.fc1.bias"}
    assert left == {"norm1.bias", "norm2.bias", "attn.proj.bias", "mlp.fc2.bias"} | fc1
    (p,) = session(path).run(["probability"], {"patches": images})
    assert np.abs(p - expected).max() <= tolerance
    # In int8 files they stay: there the runtime adds them with the scales.
    proto = write_model(path, model, "int8")
    assert sum("attn.k.bias" in t.name for t in proto.graph.initializer) == 2


def test_constants_of_the_positions_are_baked(tmp_path):
    """DINOv3's factors and Swin's bias are constants: no trigonometry, and no look-up but of the
    tokens' order.
    """
    for family in ("dinov3", "swin"):
        proto = write_model(tmp_path / "m.onnx", classifier(family))
        kinds = [node.op_type for node in proto.graph.node]
        assert not {"Sin", "Cos", "Range", "Where", "ScatterND"} & set(kinds)
        orders = [node for node in proto.graph.node if node.op_type == "Gather"]
        assert all("order" in node.input[1] or node.input[1] == "first" for node in orders)
        names = [tensor.name for tensor in proto.graph.initializer]
        wanted = ".cos" if family == "dinov3" else ".attn.bias"
        assert sum(name.endswith(wanted) for name in names) >= 3


@pytest.mark.parametrize("family", ["gelu", "resnet50"])
def test_bytes_become_floats_first_of_all(family, tmp_path):
    """TensorRT takes bytes as an input and knows no operator on them but the cast."""
    model = models.PatchClassifier(classifier(family).encoder, tta=family == "gelu").eval()
    proto = write_model(tmp_path / "m.onnx", model)
    assert [node.op_type for node in proto.graph.node if "patches" in node.input] == ["Cast"]


def test_float_input_is_the_same_model(tmp_path):
    for family in ("gelu", "resnet50"):
        model, images = classifier(family), patches(3)
        write_model(tmp_path / "m.onnx", model, input_type="float")
        mean, std = (np.array(v, np.float32) for v in model.encoder.spec.norm)
        given = ((images / np.float32(255) - mean) / std).transpose(0, 3, 1, 2).astype(np.float32)
        (p,) = session(tmp_path / "m.onnx").run(["probability"], {"patches": given})
        assert (np.abs(p - torch_numbers(model, images)[0]) <= allowed(model, images)[0]).all()


@pytest.mark.parametrize("pool", models.POOLS)
def test_every_pooling_and_a_middle_layer(pool, tmp_path):
    model, images = classifier("swiglu", pool=pool, layer=1), patches(3)
    write_model(tmp_path / "m.onnx", model, embedding=True)
    p, e = session(tmp_path / "m.onnx").run(["probability", "embedding"], {"patches": images})
    probability, embedding = torch_numbers(model, images)
    assert np.abs(p - probability).max() <= 1e-5 and np.abs(e - embedding).max() <= 1e-4


@pytest.mark.parametrize("input_type", ["uint8", "float"])
def test_augmentation_at_test_time_is_inside(input_type, tmp_path):
    plain = classifier("gelu")
    model = models.PatchClassifier(plain.encoder, tta=True).eval()
    model.load_state_dict(plain.state_dict())
    images = patches(3)
    write_model(tmp_path / "m.onnx", model, input_type=input_type)
    mean, std = (np.array(v) for v in model.encoder.spec.norm)
    given = (
        images
        if input_type == "uint8"
        else ((images / 255 - mean) / std).transpose(0, 3, 1, 2).astype(np.float32)
    )
    (p,) = session(tmp_path / "m.onnx").run(["probability"], {"patches": given})
    assert np.abs(p - torch_numbers(model, images)[0]).max() <= 1e-5
    assert np.abs(p - torch_numbers(plain, images)[0]).max() > 1e-4


def test_temperature_divides_the_logit(tmp_path):
    model, images = classifier("gelu"), patches(4)
    write_model(tmp_path / "m.onnx", model, temperature=2.5)
    (p,) = session(tmp_path / "m.onnx").run(["probability"], {"patches": images})
    with torch.inference_mode():
        expected = torch.sigmoid(model(torch.from_numpy(images)) / 2.5).numpy()
    assert np.abs(p - expected).max() <= 1e-5


@pytest.mark.parametrize("family", ["gelu", "swiglu"])
def test_half_precision_survives_large_activations(family, tmp_path):
    """The residual stream at 1e4 (as in large DINOv2 models), then also the hidden layer at 1e4 and
    beyond.
    """
    images = patches(4)
    for where in ("residual", "hidden"):
        model = classifier(family)
        with torch.no_grad():
            if where == "residual":
                model.encoder.blocks[0].mlp.fc2.bias[3] = 1.2e4
                if FAMILIES[family].layerscale:
                    model.encoder.blocks[0].ls2.gamma[3] = 1.0
            else:
                model.encoder.blocks[0].mlp.fc1.weight.mul_(3e4)
                model.encoder.blocks[0].mlp.fc2.weight.mul_(3e-5 if family == "gelu" else 1e-9)
        expected = torch_numbers(model, images)[0]
        with graph.activation_peaks(model.encoder) as peaks, torch.inference_mode():
            model(torch.from_numpy(images))
        assert max(peaks[0, "attn"], peaks[0, "mlp"], peaks[1, "attn"], peaks[1, "mlp"]) > 1e4
        write_model(tmp_path / "m.onnx", model, "fp16", peaks=peaks)
        (p,) = session(tmp_path / "m.onnx").run(["probability"], {"patches": images})
        assert np.isfinite(p).all() and np.abs(p - expected).max() <= 5e-3, where


@pytest.mark.parametrize("family", ["gelu", "swin"])
def test_a_residual_stream_beyond_float16_stays_float32(family, tmp_path):
    """A channel of 1e5 from the first block on, which the last one takes back: the stream is
    float32 in the blocks that see it, and products stay float16, whose inputs are normalised.
    """
    model, images = classifier(family), patches(4)
    blocks = model.encoder.blocks
    with torch.no_grad():
        blocks[0].mlp.fc2.bias[3] = 1e5
        blocks[1].mlp.fc2.bias[3] = -1e5
    expected = torch_numbers(model, images)[0]
    with graph.activation_peaks(model.encoder) as peaks, torch.inference_mode():
        model(torch.from_numpy(images))
    assert min(peaks[0, "stream"], peaks[1, "stream"]) > 9e4
    assert graph.float32_blocks(peaks) == [0, 1]
    write_model(tmp_path / "m.onnx", model, "fp16", peaks=peaks)
    (p,) = session(tmp_path / "m.onnx").run(["probability"], {"patches": images})
    assert np.isfinite(p).all() and np.abs(p - expected).max() <= 5e-3
    with np.errstate(over="ignore"):
        write_model(tmp_path / "m.onnx", model, "fp16", peaks={})
    (p,) = session(tmp_path / "m.onnx").run(["probability"], {"patches": images})
    assert not np.abs(p - expected).max() <= 5e-3, "the stream would have done in float16"


def test_layerscale_counts_among_the_peaks():
    """It is folded into the product, which float16 may not hold though it holds that before it."""
    model = classifier("clsmean")
    block = model.encoder.blocks[0]
    with torch.no_grad():
        block.mlp.fc2.bias[3] = 6e3
        block.ls2.gamma[3] = 30
    with graph.activation_peaks(model.encoder) as peaks, torch.inference_mode():
        model(torch.from_numpy(patches(2)))
    assert peaks[0, "mlp"] > 1.7e5 and 0 in graph.float32_blocks(peaks)


@pytest.mark.parametrize("family", ["gelu", "swiglu"])
def test_bytes_survive_channels_that_stand_out(family, tmp_path):
    """Channels a hundred times larger than the others before every product, and weights that undo
    it: the same network, but one step for all channels leaves the others no digits, until they are
    evened out."""
    model, images = classifier(family), patches(8)
    with torch.no_grad():
        for block in model.encoder.blocks:
            for norm, layer in ((block.norm1, block.attn.qkv), (block.norm2, block.mlp.fc1)):
                for parameter in norm.weight, norm.bias:
                    parameter[3] *= 100
                layer.weight[:, 3] /= 100
            for parameter in block.attn.qkv.weight, block.attn.qkv.bias:
                parameter[-5] *= 100
            block.attn.proj.weight[:, -5] /= 100
            if FAMILIES[family].mlp == "swiglu":
                for parameter in block.mlp.fc1.weight, block.mlp.fc1.bias:
                    parameter[-7] *= 100
                block.mlp.fc2.weight[:, -7] /= 100
            else:
                block.mlp.fc1.bias[-7] += 1000  # of which GELU leaves as much
                block.mlp.fc2.weight[:, -7] /= 1000
    expected = torch_numbers(model, images)[1]
    with graph.activation_peaks(model.encoder) as peaks, torch.inference_mode():
        model(torch.from_numpy(patches(8, seed=1)))
    off = []
    for seen in (None, peaks):
        write_model(tmp_path / "m.onnx", model, "int8", embedding=True, peaks=seen)
        (e,) = session(tmp_path / "m.onnx").run(["embedding"], {"patches": images})
        off.append(np.linalg.norm(e - expected) / np.linalg.norm(expected - expected.mean(axis=0)))
    assert off[1] < 0.3 and off[1] < 0.2 * off[0], off


def test_half_precision_with_a_tiny_layerscale(tmp_path):
    """Folded, a LayerScale of 1e-6 would leave weights of a digit or none."""
    model, images = classifier("swiglu"), patches(4)
    with torch.no_grad():
        for block in model.encoder.blocks:
            block.ls1.gamma.mul_(1e-6)
            block.attn.proj.weight.mul_(300)
            block.norm2.weight.mul_(30)
        model.encoder.pos_embed.mul_(1e-3)
        model.encoder.cls_token.mul_(1e-3)
    write_model(tmp_path / "m.onnx", model, "fp16")
    (p,) = session(tmp_path / "m.onnx").run(["probability"], {"patches": images})
    assert np.abs(p - torch_numbers(model, images)[0]).max() <= 5e-3


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("family", ["gelu", "clsmean"])
def test_reference_evaluator_agrees(family, precision, tmp_path):
    from onnx.reference import ReferenceEvaluator

    model, images = classifier(family), patches(2)
    write_model(tmp_path / "m.onnx", model, precision)
    (expected,) = session(tmp_path / "m.onnx").run(["probability"], {"patches": images})
    (got,) = ReferenceEvaluator(str(tmp_path / "m.onnx")).run(["probability"], {"patches": images})
    assert np.abs(got - expected).max() <= (1e-5 if precision == "fp32" else 2e-2)


@pytest.mark.parametrize("family", FAMILIES)
def test_openvino_agrees(family, tmp_path):
    openvino = pytest.importorskip("openvino")
    model, images = classifier(family), patches(2)
    for opset in (23, 20)[
        : 1 if family == "resnet50" else 2
    ]:  # without attention these are one graph
        write_model(tmp_path / "m.onnx", model, opset=opset)
        compiled = openvino.Core().compile_model(
            str(tmp_path / "m.onnx"), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
        )
        got = compiled({"patches": images})["probability"]
        assert np.abs(got - torch_numbers(model, images)[0]).max() <= (
            5e-5 if family == "resnet50" else 1e-5
        )


def test_weights_beside_and_inside_are_the_same(tmp_path):
    model, images = classifier("gelu"), patches(2)
    write_model(tmp_path / "a.onnx", model)
    write_model(tmp_path / "b.onnx", model, inline=False)
    assert (tmp_path / "b.onnx").stat().st_size < 60_000 < (tmp_path / "b.onnx.data").stat().st_size
    onnx.checker.check_model(str(tmp_path / "b.onnx"))
    a, b = (
        session(tmp_path / f"{name}.onnx").run(["probability"], {"patches": images})[0]
        for name in "ab"
    )
    assert np.array_equal(a, b)


def write_mean(path, members, precision="fp32", **choices):
    """Emit the mean of classifiers into one file → ModelProto."""
    weights = path.with_suffix(".data")
    with open(weights, "wb") as file:
        proto = graph.emit_mean(members, file, precision, **choices)
    graph.save(proto, weights, path, inline=True)
    onnx.checker.check_model(str(path), full_check=True)
    return proto


def test_probes_on_one_encoder_store_and_run_it_once(tmp_path):
    one, other = classifier("gelu"), classifier("gelu")
    with torch.no_grad():
        other.head.weight.mul_(-0.7)
    images, path = patches(9), tmp_path / "mean.onnx"
    proto = write_mean(path, iter([(one, 1.0, None), (other, 2.0, None)]))
    single = write_model(tmp_path / "one.onnx", one)
    ops = [node.op_type for node in proto.graph.node]
    assert ops.count("Attention") == len(one.encoder.blocks) and ops.count("Sigmoid") == 2
    assert [value.name for value in proto.graph.output] == ["probability"]
    assert proto.graph.input == single.graph.input and proto.graph.output == single.graph.output
    size, alone = (p.stat().st_size for p in (path, tmp_path / "one.onnx"))
    assert size < alone + 4096
    with torch.inference_mode():
        cooler = torch.sigmoid(other(torch.from_numpy(images)) / 2).numpy()
    expected = (torch_numbers(one, images)[0] + cooler) / 2
    (actual,) = session(path).run(["probability"], {"patches": images})
    assert actual.shape == (9,) and actual.dtype == np.float32
    assert np.abs(actual - expected).max() <= 1e-5


@pytest.mark.parametrize("precision, tolerance", [("fp32", 1e-5), ("fp16", 5e-3), ("int8", 0.1)])
def test_members_of_other_networks_keep_their_own(precision, tolerance, tmp_path):
    """Other weights, another pooling, another family with another normalisation."""
    members = [
        classifier("gelu"),
        classifier("gelu", seed=3),
        classifier("gelu", pool="patch-center"),
        classifier("swiglu"),
    ]
    images = patches(16)
    expected = np.mean([torch_numbers(model, images)[0] for model in members], axis=0)
    path = tmp_path / "mean.onnx"
    proto = write_mean(path, [(model, 1.0, {}) for model in members], precision)
    blocks = len(members[0].encoder.blocks)
    attentions = [node.op_type for node in proto.graph.node].count("Attention")
    # The pooling of the third needs all tokens of the last block, the first only one.
    assert attentions == 4 * blocks - (blocks - 1)
    (actual,) = session(path).run(["probability"], {"patches": images})
    assert np.abs(actual - expected).max() <= tolerance
    repeated = write_mean(tmp_path / "again.onnx", [(members[0], 1.0, {})] * 3, precision)
    single = write_model(tmp_path / "single.onnx", members[0], precision)
    assert len(repeated.graph.initializer) <= len(single.graph.initializer) + 1


def test_certain_members_have_a_mean_of_at_most_one(tmp_path):
    model = classifier("gelu")
    with torch.no_grad():
        model.head.bias.fill_(60)
    others = [classifier("gelu", seed=seed) for seed in (1, 2)]
    for other in others:
        with torch.no_grad():
            other.head.bias.fill_(90)
    path = tmp_path / "mean.onnx"
    write_mean(path, [(member, 1.0, None) for member in (model, *others)])
    (actual,) = session(path).run(["probability"], {"patches": patches(5)})
    assert (actual == 1).all()
