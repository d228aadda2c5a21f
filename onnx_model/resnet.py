"""The graph of torchvision's ResNet (encoders/resnet.py)."""

from onnx_model.nodes import convolution, normalised


def resnet(g, encoder, x, input_type, mean, std):
    """BatchNorm folded into the convolutions → [N, 2048]."""
    x = normalised(g, x, input_type, mean, std)
    half = g.precision == "fp16"
    if half:
        x = g.to_half(x, "input")
    x = convolution(g, x, encoder.conv1, encoder.bn1, "conv1", half, integer=False)
    x = g.op("Relu", x, at="conv1")
    x = g.op("MaxPool", x, at="maxpool", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    for name in ("layer1", "layer2", "layer3", "layer4"):
        for i, bottleneck in enumerate(getattr(encoder, name)):
            x = residual_block(g, x, bottleneck, f"{name}.{i}", half)
    if half:
        x = g.to_float(x, "pool")
    return g.op("ReduceMean", x, g.ints(2, 3), at="pool", keepdims=0)


def residual_block(g, x, bottleneck, at, half):
    y = convolution(g, x, bottleneck.conv1, bottleneck.bn1, f"{at}.conv1", half)
    y = g.op("Relu", y, at=at)
    y = convolution(g, y, bottleneck.conv2, bottleneck.bn2, f"{at}.conv2", half)
    y = g.op("Relu", y, at=at)
    y = convolution(g, y, bottleneck.conv3, bottleneck.bn3, f"{at}.conv3", half)
    if bottleneck.downsample is not None:
        x = convolution(g, x, *bottleneck.downsample, f"{at}.downsample", half)
    return g.op("Relu", g.op("Add", x, y, at=at), at=at)
