"""ResNet-50, torchvision's."""

from torch import nn
from torchvision.models import resnet50


def ResNet(spec, size=None):
    """torchvision's network up to its global average pool: normalised images [B, 3, S, S] →
    [B, 2048].
    """
    network = resnet50()
    network.fc = nn.Identity()
    network.spec, network.pool, network.size = spec, spec.pool, size or spec.size
    network.layer = network.blocks = None
    network.embed_dim = spec.dim
    return network
