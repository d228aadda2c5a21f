"""How far rounding moves what a network says: measured, by noise of its size.

Every layer rounds its result and has rounded weights. Each such error is relative to what is
rounded, at most one roundoff u, and the errors of different layers are independent:
on their way to the output they add up like a random walk. How much arrives depends on the
number of layers, on the size of the numbers (of the logits most of all) and on how each network
passes on small changes, which differ a hundredfold between networks of one shape. So it is not
derived from the shape but measured on the network itself, in float32, on any device: `gain` puts
noise into every layer and looks at what comes out.

                                 difference of the output = gain · u · (a number of order 1)

onnx_model/parity.py says what is allowed of that, and u of each precision.
"""

import contextlib

import torch

STEP = 2.0**-11  # size of the noise: small enough to add up linearly, far above float32's own
FEW = 32  # patches that the gain is measured on
BATCH = 4


def gain(model, patches, values):
    """What one roundoff in every layer becomes, per roundoff: the root mean square over the first
    patches, of the change of the logit; without a head, of the embedding's, relative to its length.

    model    a PatchClassifier in float32, in evaluation mode, on its device
    patches  uint8 [n, S, S, 3]
    values   what the model gives for them: logits [n], without a head embeddings [n, D]
    """
    device = next(model.encoder.parameters()).device
    generator = torch.Generator(device).manual_seed(0)
    squares = []
    with torch.inference_mode():
        for start in range(0, min(len(patches), FEW), BATCH):
            images = torch.from_numpy(patches[start : start + BATCH]).to(device)
            expected = torch.from_numpy(values[start : start + BATCH]).to(device)
            with noise(model.encoder, STEP, generator):
                moved = model.embed(images)
            if model.head is None:
                change = (moved - expected).norm(dim=1) / expected.norm(dim=1)
            else:
                change = model.classify(moved) - expected
            squares += (change / STEP).square().tolist()
    return (sum(squares) / len(squares)) ** 0.5


@contextlib.contextmanager
def noise(encoder, size, generator):
    """While this lasts, the result y of every layer with weights, and of every block, is
    y (1 + size · noise).

    Noise of the result: independent for each number. Noise of the weights: independent for each
    image and channel, and the same for all tokens (and for all views of --tta), since a mean over
    tokens, which averages errors of results away, does not average errors of weights.
    """
    blocks, shared, hooks = list(encoder.blocks or ()), {}, []

    def draw(shape, like):
        return torch.randn(shape, generator=generator, device=like.device, dtype=like.dtype)

    def disturb(layer, inputs, y):
        factor = 1 + size * draw(y.shape, y)
        if layer not in blocks:
            if layer not in shared:
                shape = [1] * y.dim()
                channels = 1 if y.dim() == 4 else -1  # images [B, C, H, W], tokens [B, T, C]
                shape[0], shape[channels] = y.shape[0], y.shape[channels]
                shared[layer] = draw(shape, y)
            factor += size * shared[layer]
        return y * factor

    for module in encoder.modules():
        own = next(module.parameters(recurse=False), None) is not None
        if module in blocks or (own and next(module.children(), None) is None):
            hooks.append(module.register_forward_hook(disturb))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def longest_sum(encoder):
    """Terms of the longest sum in a product of the network: inputs of a layer, of a convolution
    those under its kernel.
    """
    terms = 1
    for name, weight in encoder.named_parameters():
        if name.endswith(".weight") and weight.dim() > 1:
            terms = max(terms, weight[0].numel())
    return terms
